"""Stock ``distributed.core``: its Server, its rpc, its comms."""

# mypy: allow-untyped-calls
# (distributed has annotations for some of its functions only)

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy
from distributed.comm.core import connect
from distributed.core import Server, rpc
from distributed.protocol.serialize import to_serialize

from . import AsyncFn, Call


def _add(x: int, y: int) -> int:
    return x + y


async def _add_async(x: int, y: int) -> int:
    return x + y


async def _add_checkpoint(x: int, y: int) -> int:
    await asyncio.sleep(0)
    return x + y


async def _emit(comm: Any, n: int) -> None:
    for i in range(n):
        await comm.write({"op": "tick", "n": i})


def _echo_array(data: Any) -> Any:
    return to_serialize(data)


def _sink(data: Any) -> int:
    return int(data.nbytes)


_HANDLERS = {
    "add": _add,
    "add_async": _add_async,
    "add_checkpoint": _add_checkpoint,
    "emit": _emit,
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
        await self._remote.close_rpc()


class _CommLink:
    def __init__(self, comm: Any, op: str) -> None:
        self._comm = comm
        self._op = op

    async def call(self) -> Any:
        await self._comm.write({"op": self._op, "x": 1, "y": 2, "reply": True})
        return await self._comm.read()

    async def aclose(self) -> None:
        await self._comm.close()


class StockSystem:
    """distributed.core."""

    def run(self, afn: AsyncFn, *args: Any) -> Any:
        return asyncio.run(afn(*args))

    async def gather(self, afns: list[Call]) -> None:
        await asyncio.gather(*[afn() for afn in afns])

    async def serve(self, announce: Callable[[str], None]) -> None:
        async with Server(_HANDLERS) as server:
            await server.listen("tcp://127.0.0.1:0")
            announce(server.address)
            await server.finished()

    async def open(self, address: str, how: str, op: str) -> _RpcLink | _CommLink:
        if how == "rpc":
            return _RpcLink(address, op)
        return _CommLink(await connect(address), op)

    async def connect(self, address: str) -> None:
        comm = await connect(address)
        await comm.close()

    async def drain(self, address: str, count: int, start: Callable[[], None]) -> None:
        comm = await connect(address)
        await comm.write({"op": "emit", "n": count, "reply": False})
        await comm.read()
        start()
        for _ in range(count - 1):
            await comm.read()
        await comm.close()

    async def stream(self, address: str, count: int, window: int | None, start: Callable[[], None]) -> None:
        await self.drain(address, count, start)

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


SYSTEM = StockSystem()
