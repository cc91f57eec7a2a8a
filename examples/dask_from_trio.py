"""A server whose handler hands its work to a Dask cluster, and the cluster itself: stock Dask, in a trio program.

Scheduler, workers and client are asyncio code; it runs on the event loop that ``aio.open_loop`` provides, in this very thread.  A scope
that is left has closed what was opened in it, and a call that is cancelled takes the work back that it has given to Dask.
"""

from __future__ import annotations

import logging
import time
from functools import partial

import trio
from distributed import Client, Scheduler, Worker, wait

from trio_dcore import Server, aio, rpc

# One machine, no web pages, and no fixed port for them.
HERE = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}


def square(n: int, seconds: float) -> int:
    """What the workers do, in their threads."""
    time.sleep(seconds)
    return n * n


async def squares(client: Client, numbers: list[int], seconds: float) -> list[int]:
    """asyncio's flavour: as any program that uses Dask would write it."""
    futures = client.map(partial(square, seconds=seconds), numbers)
    try:
        await wait(futures)
        return list(await client.gather(futures))
    finally:
        # Nobody wants the results any more: what has not begun, never will.
        for future in futures:
            future.release()


async def main(address: str = "tcp://127.0.0.1:0") -> None:
    """Start a cluster in a nursery and a server before it, and call that."""
    async with aio.open_loop(), trio.open_nursery() as nursery:
        scheduler = await nursery.start(partial(aio.serve_dask, Scheduler, port=0, **HERE))
        for _ in range(2):
            await nursery.start(partial(aio.serve_dask, Worker, scheduler.address, nthreads=1, **HERE))

        async with aio.open_dask(Client, scheduler.address) as client:

            async def sum_of_squares(numbers: list[int], seconds: float = 0.0) -> int:
                """The handler, in trio's flavour."""
                return sum(await aio.run_asyncio(squares, client, numbers, seconds))

            async with Server({"sum_of_squares": sum_of_squares}) as server, rpc(await server.listen(address)) as remote:
                print(f"sum of 1000 squares: {await remote.sum_of_squares(numbers=list(range(1000)))}")

                with trio.move_on_after(0.3) as scope:  # it would take 10 seconds
                    await remote.sum_of_squares(numbers=list(range(200)), seconds=0.1)
                print(f"gave up waiting: {scope.cancelled_caught}")
                print(f"the cluster has time for others: {await remote.sum_of_squares(numbers=[3, 4])}")

        nursery.cancel_scope.cancel()  # closes the workers and the scheduler
    print(f"scheduler: {scheduler.status.name}")


if __name__ == "__main__":
    logging.getLogger("distributed").setLevel(logging.WARNING)  # it says much
    trio.run(main)
