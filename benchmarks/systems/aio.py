"""trio_dcore.aio: an asyncio program with trio as a guest of its loop, at either end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from trio_dcore.aio import Comm, Limits, Server, connect, rpc

from . import AsyncFn, Call


def _add(x: int, y: int) -> int:
    return x + y


async def _add_async(x: int, y: int) -> int:
    return x + y


async def _emit(comm: Comm, n: int) -> None:
    for i in range(n):
        await comm.write({"op": "tick", "n": i})


HANDLERS: dict[str, Callable[..., Any]] = {"add": _add, "add_async": _add_async, "emit": _emit}


class _RpcLink:
    def __init__(self, address: str, op: str) -> None:
        self._remote = rpc(address)
        self._op = op

    async def call(self) -> Any:
        return await getattr(self._remote, self._op)(x=1, y=2)

    async def aclose(self) -> None:
        await self._remote.aclose()


class _CommLink:
    def __init__(self, comm: Comm, op: str) -> None:
        self._comm = comm
        self._op = op

    async def call(self) -> Any:
        await self._comm.write({"op": self._op, "x": 1, "y": 2, "reply": True})
        return await self._comm.read()

    async def aclose(self) -> None:
        await self._comm.aclose()


class AioSystem:
    """trio_dcore.aio."""

    def run(self, afn: AsyncFn, *args: Any) -> Any:
        return asyncio.run(afn(*args))

    async def gather(self, afns: list[Call]) -> None:
        await asyncio.gather(*[afn() for afn in afns])

    async def serve(self, announce: Callable[[str], None]) -> None:
        async with Server(HANDLERS, limits=Limits(connections=None)) as server:
            announce(await server.listen("tcp://127.0.0.1:0"))
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


SYSTEM = AioSystem()
