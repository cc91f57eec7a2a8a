"""Payloads of some gigabytes, to and from trio_dcore and stock Dask: that they arrive, how fast, and what memory they take.

Run as ``python -m benchmarks.large [--gb 3] [--systems ours,stock]``.  Each row is a call with an array of that size in its request or
its reply; client and server are a process each.  Takes about twice that much memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy
import trio

from benchmarks.processes import MemoryWatch

GB = 10**9
# Whoever trusts a peer lets it send 2 GiB by default; sizes like these have to be allowed.
UNLIMITED: dict[str, Any] = {"message_trusted": None}


def total(x: Any) -> int:
    """What can be told of an array without another one."""
    return int(x[::4096].sum())


def made(size: int) -> Any:
    return numpy.arange(size // 8)


# -- the server's process --------------------------------------------------------------------------------------------------------


def serve(system: str) -> None:
    """Serve until the end of stdin; the first line is the address, a peak is printed for each line that comes."""
    watch = MemoryWatch()

    def peak() -> int:
        nonlocal watch
        found = watch.extra()
        watch = MemoryWatch()
        return found

    if system == "ours":
        from trio_dcore import Limits, Server, to_serialize

        async def ours() -> None:
            handlers: Any = {"total": total, "make": lambda size: to_serialize(made(size)), "peak": peak}
            async with Server(handlers, limits=Limits(**UNLIMITED)) as server:
                print(await server.listen("tcp://127.0.0.1:0"), flush=True)
                await trio.to_thread.run_sync(sys.stdin.read)

        trio.run(ours)
    else:
        from distributed.core import Server as StockServer
        from distributed.protocol import to_serialize as stock_to_serialize

        async def stock() -> None:
            handlers = {"total": total, "make": lambda size: stock_to_serialize(made(size)), "peak": peak}
            async with StockServer(handlers) as server:
                await server.listen("tcp://127.0.0.1:0")
                print(server.address, flush=True)
                await asyncio.to_thread(sys.stdin.read)

        asyncio.run(stock())


# -- the client's process --------------------------------------------------------------------------------------------------------


async def calls(remote: Any, wrap: Callable[[Any], Any], size: int) -> list[tuple[str, float, int, int]]:
    """(what, seconds, the client's peak, the server's), of memory beyond what there was before."""
    rows = []
    array = made(size)
    expected = total(array)
    await remote.peak()
    watch = MemoryWatch()
    began = time.perf_counter()
    assert await remote.total(x=wrap(array)) == expected
    rows.append(("request", time.perf_counter() - began, watch.extra(), await remote.peak()))
    del array
    watch = MemoryWatch()
    began = time.perf_counter()
    found = await remote.make(size=size)
    seconds = time.perf_counter() - began
    assert total(found) == expected
    rows.append(("reply", seconds, watch.extra(), await remote.peak()))
    return rows


def call(system: str, address: str, size: int) -> None:
    """Make the calls, and print what there is to tell as JSON."""
    if system == "ours":
        from trio_dcore import Limits, rpc, to_serialize

        async def ours() -> Any:
            async with rpc(address, limits=Limits(**UNLIMITED)) as remote:
                return await calls(remote, to_serialize, size)

        rows = trio.run(ours)
    else:
        from distributed.core import rpc as stock_rpc
        from distributed.protocol import to_serialize as stock_to_serialize

        async def stock() -> Any:
            async with stock_rpc(address) as remote:
                return await calls(remote, stock_to_serialize, size)

        rows = asyncio.run(stock())
    print(json.dumps(rows))


# -- all of it -------------------------------------------------------------------------------------------------------------------


def measure(client: str, server: str, size: int) -> list[tuple[str, float, int, int]]:
    """One pair of processes."""
    command = [sys.executable, "-m", "benchmarks.large"]
    process = subprocess.Popen([*command, "--serve", server], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        arguments = [*command, "--call", client, address, str(size)]
        found: list[tuple[str, float, int, int]] = json.loads(subprocess.run(arguments, capture_output=True, check=True).stdout)
        return found
    finally:
        process.communicate("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=3.0, help="size of the arrays")
    parser.add_argument("--systems", default="ours,stock", help="those that are client and server, in all pairs with ours")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--call", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    if arguments.call:
        system, address, size = arguments.call
        call(system, address, int(size))
        return
    size = int(arguments.gb * GB)
    systems = arguments.systems.split(",")
    print(f"one array of {arguments.gb:g} GB; memory is the peak beyond what there was before, as a part of that")
    print(f"{'client':8} {'server':8} {'payload in':12} {'s':>6} {'MB/s':>7} {'client':>8} {'server':>8}")
    for client, server in ((c, s) for c in systems for s in systems if "ours" in (c, s)):
        for what, seconds, here, there in measure(client, server, size):
            rate = size / seconds / 1e6
            print(
                f"{client:8} {server:8} {what:12} {seconds:6.2f} {rate:7.0f} {here / size:8.2f} {there / size:8.2f}", flush=True
            )


if __name__ == "__main__":
    main()
