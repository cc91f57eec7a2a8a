"""trio_dcore: Server, rpc and comms, used as any program would use them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy
import trio

from trio_dcore import Comm, Limits, Server, connect, rpc, run_to_end, to_serialize

from . import AsyncFn, Call


def _add(x: int, y: int) -> int:
    return x + y


async def _add_checkpoint(x: int, y: int) -> int:
    await trio.lowlevel.checkpoint()
    return x + y


async def _emit(comm: Comm, n: int) -> None:
    for i in range(n):
        await comm.write({"op": "tick", "n": i})


async def _ticks(n: int) -> AsyncIterator[dict[str, Any]]:
    for i in range(n):
        yield {"op": "tick", "n": i}


def _echo_array(data: Any) -> Any:
    return to_serialize(data)


def _sink(data: Any) -> int:
    return int(data.nbytes)


async def _add_async(x: int, y: int) -> int:
    return x + y


_HANDLERS: dict[str, Callable[..., Any]] = {
    "add": _add,
    "add_async": _add_async,
    "add_unwatched": run_to_end(_add),
    "add_checkpoint": _add_checkpoint,
    "add_checkpoint_unwatched": run_to_end(_add_checkpoint),
    "emit": _emit,
    "ticks": _ticks,
    "echo_array": _echo_array,
    "sink": _sink,
}


class _RpcLink:
    def __init__(self, address: str, op: str) -> None:
        self._remote = rpc(address)
        self._op = op

    async def call(self) -> Any:
        return await getattr(self._remote, self._op)(x=1, y=2)

    async def aclose(self) -> None:
        self._remote.close_comms()


class _CommLink:
    def __init__(self, comm: Comm, op: str) -> None:
        self._comm = comm
        self._op = op

    async def call(self) -> Any:
        await self._comm.write({"op": self._op, "x": 1, "y": 2, "reply": True})
        return await self._comm.read()

    async def aclose(self) -> None:
        await self._comm.aclose()


class OurSystem:
    """trio_dcore.

    Args:
        where: what the server listens on.
    """

    def __init__(self, where: str = "tcp://127.0.0.1:0") -> None:
        self._where = where

    def run(self, afn: AsyncFn, *args: Any) -> Any:
        return trio.run(afn, *args)

    async def gather(self, afns: list[Call]) -> None:
        async with trio.open_nursery() as nursery:
            for afn in afns:
                nursery.start_soon(afn)

    async def serve(self, announce: Callable[[str], None]) -> None:
        async with Server(_HANDLERS, limits=Limits(connections=None)) as server:
            announce(await server.listen(self._where))
            await server.finished()

    async def open(self, address: str, how: str, op: str) -> _RpcLink | _CommLink:
        if how == "rpc":
            return _RpcLink(address, op)
        return _CommLink(await connect(address), op)

    async def connect(self, address: str) -> None:
        comm = await connect(address)
        await comm.aclose()

    async def drain(self, address: str, count: int, start: Callable[[], None]) -> None:
        async with await connect(address) as comm:
            await comm.write({"op": "emit", "n": count, "reply": False})
            await comm.read()
            start()
            for _ in range(count - 1):
                await comm.read()

    async def stream(self, address: str, count: int, window: int | None, start: Callable[[], None]) -> None:
        limits = None if window is None else Limits(window=window)
        async with rpc(address, limits=limits) as remote, remote.ticks.stream(n=count) as stream:
            await stream.receive()
            start()
            async for _ in stream:
                pass

    async def echo(self, address: str, size: int, count: int, lap: Callable[[], None]) -> None:
        array = numpy.ones(size // 8)
        async with rpc(address) as remote:
            for _ in range(count):
                await remote.echo_array(data=to_serialize(array))
                lap()

    async def sink(self, address: str, size: int, begin: Callable[[], None], end: Callable[[], None]) -> None:
        array = numpy.ones(size // 8)
        async with rpc(address) as remote:
            await remote.sink(data=to_serialize(array[:1]))  # connect outside the window
            begin()
            await remote.sink(data=to_serialize(array))
            end()


SYSTEM = OurSystem()
