"""What a handler may know of its request."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio

from trio_dcore import Comm, LocalProtocolError, current_request, in_thread


async def test_in_every_kind_of_handler(where: str, serving: Any) -> None:
    def look() -> tuple[Any, ...]:
        request = current_request()
        return request.op, request.peer.kind, request.deadline, request.running, request.shutdown_requested.is_set()

    async def look_later() -> tuple[Any, ...]:
        await trio.lowlevel.checkpoint()
        return look()

    async def look_streaming() -> AsyncIterator[tuple[Any, ...]]:
        yield look()

    async def look_with_comm(comm: Comm) -> None:
        assert current_request().peer == comm.peer
        await comm.write(look())

    handlers = {"look": look, "later": look_later, "thread": in_thread(look), "streaming": look_streaming, "comm": look_with_comm}
    kind = "inproc" if where.startswith("inproc") else "loopback"
    async with serving(handlers, where) as (_server, remote):
        for op in ("look", "later", "thread"):
            assert await remote[op]() == (op, kind, math.inf, True, False)
        for op in ("streaming", "comm"):
            async with remote[op].stream() as stream:
                assert [item async for item in stream] == [(op, kind, math.inf, True, False)]


async def test_in_tasks_that_a_handler_starts(serving: Any) -> None:
    seen: list[Any] = []

    async def child() -> None:
        seen.append(current_request().op)

    async def parent() -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
        return current_request().op

    async with serving({"parent": parent}) as (_server, remote):
        assert await remote.parent() == "parent"
    assert seen == ["parent"]


async def test_it_names_its_server_and_shows_itself(serving: Any) -> None:
    kept: list[Any] = []

    def keep() -> None:
        request = current_request()
        kept.append(request)
        assert request.server is server
        assert repr(request).startswith("<Request 'keep' from inproc://")

    async with serving({"keep": keep}) as (server, remote):
        await remote.keep()
        assert not kept[0].running
        await remote.keep()
        assert not any(request.running for request in kept)


async def test_outside_of_a_handler(serving: Any) -> None:
    def no_request() -> None:
        with pytest.raises(LocalProtocolError, match=r"current_request\(\) is for handlers"):
            current_request()

    no_request()
    async with serving({}) as (_server, remote):
        await remote.identity()
        no_request()


async def test_shutdown_requested(where: str, serving: Any) -> None:
    """I05: a stream may end cleanly within the grace."""

    async def ticks() -> AsyncIterator[str]:
        yield "tick"
        await current_request().shutdown_requested.wait()
        yield "last"

    async with serving({"ticks": ticks}, where) as (server, remote), remote.ticks.stream() as stream:
        assert await stream.receive() == "tick"
        assert not server.shutdown_requested.is_set()
        server.stop(5)
        assert server.shutdown_requested.is_set()
        assert [item async for item in stream] == ["last"]
