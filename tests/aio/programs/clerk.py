"""A client as it is written for ``distributed.core``; the tests change the import and nothing else (tests/aio/test_moving.py)."""

import asyncio
import sys

from distributed.core import CommClosedError, ConnectionPool, connect, rpc, send_recv


async def main(address):
    remote = rpc(address)
    print("bolts:", await remote.get(name="bolts"))
    print("put:", await remote.put(name="nuts", count=7))
    try:
        await remote.take(name="nuts", count=100)
    except ValueError as error:
        print("refused:", error)

    # Overlapping calls, one of which waits for what another one does.
    waiting = asyncio.create_task(remote.wait_for(name="nuts", count=9))
    print("puts:", sorted(await asyncio.gather(*[remote.put(name="nuts") for _ in range(2)])))
    print("waited:", await waiting)
    try:
        await asyncio.wait_for(remote.wait_for(name="nuts", count=1000), 0.1)
    except TimeoutError:
        print("gave up")

    # A comm of its own.
    comm = await connect(address)
    print("by hand:", await send_recv(comm, op="get", name="bolts"))
    await comm.write({"op": "watch", "names": ["bolts", "nuts"], "reply": False})
    print("watched:", await comm.read(), await comm.read())
    try:
        await comm.read()
    except CommClosedError:
        print("closed")
    await comm.close()

    # A stream of messages.
    comm = await connect(address)
    await comm.write({"op": "connection_stream", "reply": False})
    await comm.write([{"op": "add", "name": "washers", "count": n} for n in range(5)])
    print("streamed:", await remote.wait_for(name="washers", count=10))
    await comm.write([{"op": "close-stream"}])
    await comm.close()

    pool = await ConnectionPool(limit=4)
    print("pooled:", await asyncio.gather(*[pool(address).get(name=name) for name in ("bolts", "nuts", "washers", "nails") * 5]))
    await pool(address).stop()
    await pool.close()
    await remote.close_rpc()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
