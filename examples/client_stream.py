"""A client that reads a stream: first at the level of messages, then with ``.stream()``."""

from __future__ import annotations

import sys

import trio

from trio_dcore import connect, rpc


async def main(address: str = "tcp://127.0.0.1:8888", interval: float = 0.5) -> None:
    """Take a few items in each of the two ways.  Closing the comm, or leaving the block, ends the handler over there."""
    async with await connect(address) as comm:
        await comm.write({"op": "stream_data", "interval": interval})
        for _ in range(3):
            print(f"read {await comm.read()}")

    async with rpc(address) as remote, remote.stream_data.stream(interval=interval) as stream:
        async for item in stream:
            print(f"streamed {item}")
            if item == 3:
                break


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:2])
