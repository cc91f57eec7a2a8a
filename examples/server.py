"""A server with two handlers: one that answers, and one that streams.

Run it, then one of the clients beside it.  Stop it with Ctrl-C.
"""

from __future__ import annotations

import sys

import trio

from trio_dcore import Comm, Server


async def add(comm: Comm, x: int, y: int) -> int:
    """Answer with a sum.  A first parameter named ``comm`` gets the comm; leave it out if you don't need it."""
    return x + y


async def stream_data(comm: Comm, interval: float = 1) -> None:
    """Write 1, 2, 3, … until the client goes.  That ends this handler, so there is nothing to clean up."""
    data = 0
    while True:
        data += 1
        await comm.write(data)
        await trio.sleep(interval)


async def main(address: str = "tcp://127.0.0.1:8888", *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve until cancelled."""
    async with Server({"add": add, "stream_data": stream_data}) as server:
        contact = await server.listen(address)
        print(f"listening on {contact}", flush=True)
        task_status.started(contact)
        await server.finished()


if __name__ == "__main__":
    try:
        trio.run(main, *sys.argv[1:2])
    except KeyboardInterrupt:
        print("stopped")
