"""What a client measures: the same loops for every system, so that they cost every system the same.

Each function runs in the client's process, inside the system's own event loop, and returns a flat dict of numbers.  Times are
seconds; ``cpu`` is the processor time that both ends together spent for one operation.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from .processes import MemoryWatch, cpu_seconds, resident
from .systems import BulkSystem, Link, StreamSystem, System

__all__ = ["WORK"]

_MIB = 2**20


async def small_call(system: System, address: str, server: int, *, how: str, op: str = "add", count: int) -> dict[str, float]:
    """T1, T9, T13: sequential small calls over one connection."""
    link = await system.open(address, how, op)
    call = link.call
    for _ in range(max(50, count // 10)):
        await call()
    clock = time.perf_counter
    laps = []
    cpu = cpu_seconds() + cpu_seconds(server)
    for _ in range(count):
        start = clock()
        await call()
        laps.append(clock() - start)
    cpu = cpu_seconds() + cpu_seconds(server) - cpu
    await link.aclose()
    return {"p50": statistics.median(laps), "cpu": cpu / count}


async def in_flight(
    system: System, address: str, server: int, *, how: str, op: str = "add", width: int, seconds: float
) -> dict[str, float]:
    """T2: ``width`` calls in flight all the time, each on a connection of its own."""
    # One rpc object opens a connection per call in flight by itself; a comm carries one call.
    opened = [await system.open(address, how, op) for _ in range(1 if how == "rpc" else width)]
    links: list[Link] = opened * (width // len(opened))
    clock = time.perf_counter
    done = 0
    end = float("inf")

    async def warm(link: Link) -> None:
        await link.call()
        await link.call()

    async def worker(link: Link) -> None:
        nonlocal done
        while clock() < end:
            await link.call()
            done += 1

    await system.gather([lambda link=link: warm(link) for link in links])  # type: ignore[misc]
    begin = clock()
    end = begin + seconds
    await system.gather([lambda link=link: worker(link) for link in links])  # type: ignore[misc]
    elapsed = clock() - begin
    for link in set(links):
        await link.aclose()
    return {"rate": done / elapsed}


async def connecting(system: System, address: str, server: int, *, count: int) -> dict[str, float]:
    """T7: connect, handshake, close; one after the other."""
    for _ in range(10):
        await system.connect(address)
    clock = time.perf_counter
    laps = []
    for _ in range(count):
        start = clock()
        await system.connect(address)
        laps.append(clock() - start)
    return {"p50": statistics.median(laps)}


async def idle(system: System, address: str, server: int, *, connections: int, count: int) -> dict[str, float]:
    """T8: what connections cost that do nothing, in the server's memory and in the time of a call on one of them.

    Each has carried a call, as those of a pool have.  Memory in KiB, for a server in which nothing has been freed yet.
    """

    async def latency(link: Link) -> float:
        for _ in range(count // 4):
            await link.call()
        clock = time.perf_counter
        laps = []
        for _ in range(count):
            start = clock()
            await link.call()
            laps.append(clock() - start)
        return statistics.median(laps)

    alone = await system.open(address, "comm", "add")
    before = await latency(alone)
    memory = resident(server)
    links = []
    for _ in range(connections):
        link = await system.open(address, "comm", "add")
        await link.call()
        links.append(link)
    memory = resident(server) - memory
    among = await latency(links[connections // 2])
    for link in links:
        await link.aclose()
    # Once more, so that a machine that becomes slower or faster meanwhile does so to both.
    after = await latency(alone)
    await alone.aclose()
    return {"memory": memory / 1024 / connections, "slower": 2 * among / (before + after)}


async def messages(system: System, address: str, server: int, *, count: int) -> dict[str, float]:
    """T5: the server's ``comm.write`` loop, read by the client's ``comm.read`` loop."""
    begin = 0.0

    def start() -> None:
        nonlocal begin
        begin = time.perf_counter()

    await system.drain(address, count, start)
    return {"rate": (count - 1) / (time.perf_counter() - begin)}


async def stream(system: StreamSystem, address: str, server: int, *, count: int, window: int | None = None) -> dict[str, float]:
    """T4: small items of one handler, one after the other."""
    begin = 0.0

    def start() -> None:
        nonlocal begin
        begin = time.perf_counter()

    await system.stream(address, count, window, start)
    return {"rate": (count - 1) / (time.perf_counter() - begin)}


async def echo(system: BulkSystem, address: str, server: int, *, mib: int, count: int) -> dict[str, float]:
    """T6: an array there and back.  MB/s counts the payload once per round trip, as the targets do."""
    laps = [time.perf_counter()]
    await system.echo(address, mib * _MIB, count + 1, lambda: laps.append(time.perf_counter()))
    # The first lap has the connecting in it.
    return {"rate": count * mib * _MIB / 1e6 / (laps[-1] - laps[1])}


async def one_way(system: BulkSystem, address: str, server: int, *, mib: int) -> dict[str, float]:
    """T6: one large array to the server; extra memory at both ends as a part of the payload."""
    size = mib * _MIB
    watches: list[MemoryWatch] = []
    times: list[float] = []

    def begin() -> None:
        watches.extend((MemoryWatch(server), MemoryWatch()))
        times.append(time.perf_counter())

    def end() -> None:
        times.append(time.perf_counter())

    await system.sink(address, size, begin, end)
    receiver, sender = (watch.extra() / size for watch in watches)
    return {"rate": size / 1e6 / (times[1] - times[0]), "receiver": receiver, "sender": sender}


WORK: dict[str, Any] = {
    "small_call": small_call,
    "in_flight": in_flight,
    "connecting": connecting,
    "idle": idle,
    "messages": messages,
    "stream": stream,
    "echo": echo,
    "one_way": one_way,
}
