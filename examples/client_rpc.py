"""A client with rpc: calls that look like method calls, several at once, errors, and giving up."""

from __future__ import annotations

import sys

import trio

from trio_dcore import RemoteError, rpc


async def main(address: str = "tcp://127.0.0.1:8888") -> None:
    """Call ``add`` in several ways."""
    async with rpc(address) as remote:
        print(f"1 + 2 = {await remote.add(x=1, y=2)}")

        # Each call in flight has a comm of its own from the pool, so calls may overlap.
        sums: dict[int, int] = {}

        async def double(n: int) -> None:
            sums[n] = await remote.add(x=n, y=n)

        async with trio.open_nursery() as nursery:
            for n in range(5):
                nursery.start_soon(double, n)
        print(f"doubled: {[sums[n] for n in range(5)]}")

        # What a handler raises is raised here: as its own type, and as RemoteError.
        try:
            await remote.add(x=1, y="two")
        except TypeError as exc:
            print(f"TypeError, remote: {isinstance(exc, RemoteError)}")

        # There is no timeout argument: trio has scopes.  A call that is cancelled stops its handler over there.
        with trio.move_on_after(0.2) as scope:
            async with remote.stream_data.stream(interval=60) as stream:
                async for item in stream:
                    print(f"streamed {item}")
        print(f"gave up waiting for the next one: {scope.cancelled_caught}")


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:2])
