"""A server of trio's flavour, until its stdin ends."""

import sys

import trio

from trio_dcore import Server


async def mirror(comm):
    async for message in comm:
        await comm.write(message)


async def main():
    async with Server({"forever": trio.sleep_forever, "mirror": mirror}, grace=0) as server:
        print(await server.listen("tcp://127.0.0.1:0"), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)


trio.run(main)
