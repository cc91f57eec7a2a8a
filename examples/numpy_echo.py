"""Arrays there and back.  Their bytes are sent as they lie in memory: not pickled, not copied on the way out."""

from __future__ import annotations

import numpy as np
import trio

from trio_dcore import Server, rpc, to_serialize


def scale(array: np.ndarray, factor: float) -> np.ndarray:
    """Multiply an array."""
    return array * factor


async def main(address: str = "tcp://127.0.0.1:0") -> None:
    """Send a few arrays to the server, and to its built-in ``echo``."""
    async with Server({"scale": scale}) as server, rpc(await server.listen(address)) as remote:
        array = np.arange(6, dtype="float32").reshape(2, 3)
        scaled = await remote.scale(array=array, factor=10)
        print(f"{scaled.tolist()} {scaled.dtype}")

        # Stock Dask peers pickle bare arrays; wrapped like this they travel as arrays to and from everybody.
        image = np.zeros((1000, 1000, 3), dtype="uint8")
        back = await remote.echo(data=to_serialize(image))
        print(f"{back.nbytes} bytes, equal: {np.array_equal(image, back)}")


if __name__ == "__main__":
    trio.run(main)
