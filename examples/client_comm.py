"""A client at the level of messages: connect, write, read."""

from __future__ import annotations

import sys

import trio

from trio_dcore import connect


async def main(address: str = "tcp://127.0.0.1:8888") -> None:
    """Ask the server for a sum."""
    async with await connect(address) as comm:
        await comm.write({"op": "add", "x": 1, "y": 2})
        result = await comm.read()
    print(f"1 + 2 = {result}")


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:2])
