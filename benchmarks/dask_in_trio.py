"""A stock Dask cluster inside a trio program, and as the asyncio program that it is made for.

A scheduler, two workers with a thread each, and a client; all in one process, so that what the event loop costs shows as much as it can.
Run as ``python -m benchmarks.dask_in_trio [--rounds N] [--tasks N]``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from typing import Any

import trio
from distributed import Client, Scheduler, Worker, wait

from trio_dcore import aio

GRACE = 1.0

ENTERED = threading.Semaphore(0)
GATE = threading.Event()


def square(n: int) -> int:
    return n * n


def held(_: int) -> None:
    ENTERED.release()
    GATE.wait()


async def compute(client: Client, tasks: int) -> float:
    """Seconds for map and gather; asyncio's flavour."""
    begin = time.perf_counter()
    futures = client.map(square, range(tasks), pure=False)
    await wait(futures)
    assert len(await client.gather(futures)) == tasks
    return time.perf_counter() - begin


async def stock(tasks: int, here: dict[str, Any]) -> dict[str, float]:
    """The asyncio program."""
    begin = time.perf_counter()
    async with (
        Scheduler(port=0, **here) as scheduler,
        Worker(scheduler.address, nthreads=1, **here),
        Worker(scheduler.address, nthreads=1, **here),
        Client(scheduler.address, asynchronous=True) as client,
    ):
        started = time.perf_counter() - begin
        await compute(client, 100)  # a first time
        computed = await compute(client, tasks)
        begin = time.perf_counter()
    return {"start": started, "compute": computed, "close": time.perf_counter() - begin}


async def in_trio(tasks: int, here: dict[str, Any]) -> dict[str, float]:
    """The trio program, once closed when it is idle, and once while both workers run a function that does not end."""
    found = {}
    for busy in (False, True):
        async with aio.open_loop():
            begin = time.perf_counter()
            async with trio.open_nursery() as nursery:
                serve = partial(aio.serve_dask, grace=GRACE)
                scheduler = await nursery.start(partial(serve, Scheduler, port=0, **here))
                for _ in range(2):
                    await nursery.start(partial(serve, Worker, scheduler.address, nthreads=1, **here))
                client = await nursery.start(partial(serve, Client, scheduler.address))
                started = time.perf_counter() - begin
                await aio.run_asyncio(compute, client, 100)
                if busy:
                    futures = client.map(held, range(2))
                    for _ in futures:
                        await trio.to_thread.run_sync(ENTERED.acquire)
                else:
                    found["start"] = started
                    found["compute"] = await aio.run_asyncio(compute, client, tasks)
                begin = time.perf_counter()
                nursery.cancel_scope.cancel()
        found["close, busy" if busy else "close"] = time.perf_counter() - begin
    return found


def measure(who: str, tasks: int) -> None:
    """Measure in this process, and print."""
    logging.getLogger("distributed").setLevel(logging.ERROR)
    logging.getLogger("trio_dcore").setLevel(logging.ERROR)  # it names the threads that don't end
    with tempfile.TemporaryDirectory() as folder:
        here = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0", "local_directory": folder}
        found = asyncio.run(stock(tasks, here)) if who == "stock" else trio.run(in_trio, tasks, here)
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description="stock Dask in a trio program, and in an asyncio program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=1000)
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {"stock": [], "trio": []}
    for number in range(options.rounds):
        for who in sorted(rounds, reverse=bool(number % 2)):
            # Each in a process of its own: importing trio-asyncio changes asyncio.  Not by -m: functions of a main module are pickled
            # with all that they refer to.
            program = f"from benchmarks.dask_in_trio import measure; measure({who!r}, {options.tasks})"
            run = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE)
            rounds[who].append(json.loads(run.stdout))
    for what in rounds["trio"][0]:
        for who, found in rounds.items():
            if what in found[0]:
                times = [1000 * each[what] for each in found]
                print(f"{what:12} {who:6} {statistics.median(times):8.1f} ms  ({min(times):.1f} … {max(times):.1f})")
    ratios = [ours["compute"] / theirs["compute"] for ours, theirs in zip(rounds["trio"], rounds["stock"], strict=True)]
    print(f"compute, trio / stock: {statistics.median(ratios):.2f}  ({min(ratios):.2f} … {max(ratios):.2f})")
    print(f"(busy: two functions that don't end, and a grace of {GRACE:g} s)")


if __name__ == "__main__":
    main()
