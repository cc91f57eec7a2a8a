"""rpc: one server, many overlapping calls."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_dcore import ConnectError, ConnectionPool, Limits, LocalProtocolError, RemoteError, RPCClosed, Security, rpc
from trio_dcore.testing import no_leaks


async def add(x: int, y: int = 1) -> int:
    return x + y


async def count(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


async def test_the_example_of_the_architecture(where: str, serving: Any) -> None:
    lines: list[str] = []
    logged = trio.Event()

    async def log(line: str) -> None:
        lines.append(line)
        logged.set()

    handlers = {"add": add, "ticks": count, "log": log, "odd-name": add}
    async with serving(handlers, where) as (server, _remote), rpc(server.address) as remote:
        assert await remote.add(x=1, y=2) == 3
        async with remote.ticks.stream(n=3) as stream:
            assert [item async for item in stream] == [0, 1, 2]
        await remote.log.notify(line="noted")
        assert await remote["odd-name"](x=1) == 2
        await logged.wait()
    assert lines == ["noted"]


async def test_overlapping_calls_are_safe(where: str, serving: Any) -> None:
    arrived = trio.Event()
    waiting = 0

    async def together(x: int) -> int:
        nonlocal waiting
        waiting += 1
        if waiting == 5:
            arrived.set()
        await arrived.wait()
        return x

    results: dict[int, int] = {}

    async def call(x: int) -> None:
        results[x] = await remote.together(x=x)

    async with serving({"together": together}, where) as (_server, remote), trio.open_nursery() as nursery:
        for x in range(5):
            nursery.start_soon(call, x)
    assert results == {x: x for x in range(5)}


async def test_without_a_block_as_dask_has_it(where: str, serving: Any) -> None:
    async with serving({"add": add}, where) as (server, _remote):
        for close in ("close_comms", "close_rpc", "aclose"):
            remote = rpc(server.address)
            assert await remote.add(x=1) == 2
            closed = getattr(remote, close)()
            if inspect.isawaitable(closed):
                await closed
            assert remote.pool.open == 0
            with pytest.raises(RPCClosed):
                await remote.add(x=1)


async def test_made_outside_of_trio_and_never_connected() -> None:
    remote = rpc(
        ("127.0.0.1", 8786), limit=3, security=Security(pickle="never"), limits=Limits(idle=5), deserialize=False, timeout=1
    )
    assert remote.address == "tcp://127.0.0.1:8786"
    assert repr(remote) == "<rpc tcp://127.0.0.1:8786>"
    assert isinstance(remote.pool, ConnectionPool)
    assert remote.pool.limit == 3
    assert remote.pool.timeout == 1
    assert remote.pool.settings.deserialize is False
    assert remote.pool.settings.security.pickle == "never"
    remote.close_comms()


async def test_limit_is_one_pool(where: str, serving: Any) -> None:
    go = trio.Event()
    async with serving({"wait": go.wait, "add": add}, where, client={"limit": 1}) as (server, remote):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(remote.wait)
            nursery.start_soon(remote.echo)
            await wait_all_tasks_blocked(0.01)
            assert server.statistics().connections == 1
            nursery.cancel_scope.cancel()
        assert remote.pool.active == 0


async def test_leaving_the_block_ends_calls_in_flight(where: str, serving: Any) -> None:
    async with no_leaks(), serving({"forever": trio.sleep_forever}, where) as (server, _remote), trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(RPCClosed, match="in flight"):
                await remote.forever()

        async with rpc(server.address) as remote:
            nursery.start_soon(call)
            while not server.statistics().in_flight:
                await trio.lowlevel.checkpoint()


async def test_nobody_there(where: str) -> None:
    address = "inproc://nobody" if where.startswith("inproc") else "tcp://127.0.0.1:1"
    async with rpc(address, timeout=0.05) as remote:
        with pytest.raises(ConnectError, match="could not connect"):
            await remote.add(x=1)
        with pytest.raises(ConnectError):
            async with remote.ticks.stream():
                raise AssertionError("not reached")
        assert remote.pool.open == 0


async def test_encryption_is_required() -> None:
    async with rpc("tcp://127.0.0.1:1", security=Security(require_encryption=True)) as remote:
        with pytest.raises(LocalProtocolError, match="isn't encrypted"):
            await remote.add(x=1)


async def test_remote_errors_of_a_stream_and_a_call_are_the_same(where: str, serving: Any) -> None:
    def fail() -> None:
        raise LookupError("no luck")

    async with serving({"fail": fail}, where) as (_server, remote):
        with pytest.raises(LookupError, match="no luck") as called:
            await remote.fail()
        async with remote.fail.stream() as stream:
            with pytest.raises(LookupError, match="no luck") as streamed:
                await stream.receive()
    assert type(called.value) is type(streamed.value)
    assert isinstance(called.value, RemoteError)
