"""Streams in both directions, cancelled at every step and cut after every byte, on either side."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_dcore import Comm, CommClosedError, ConnectError, ConnectionPool, RemoteError, Server
from trio_dcore.testing import MemoryNetwork, cancel_sweep, memory_network, wire_sweep

#: More than a window, so that batches form, credit runs out and comes back.
COUNT = 20

Use = Callable[[Any], Awaitable[object]]


class Handlers:
    """What is streamed, and who is inside."""

    def __init__(self) -> None:
        self.inside = 0

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        self.inside += 1
        try:
            yield
            await trio.lowlevel.checkpoint()
        finally:
            self.inside -= 1

    async def quick(self) -> AsyncIterator[int]:
        async with self.entered():
            for i in range(COUNT):
                yield i

    async def waiting(self) -> AsyncIterator[int]:
        async with self.entered(), trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.checkpoint)
            for i in range(COUNT):
                if i % 5 == 0:
                    await trio.lowlevel.checkpoint()
                yield i

    async def failing(self) -> AsyncIterator[int]:
        async with self.entered():
            for i in range(COUNT):
                yield i
            raise ValueError("at the end")

    async def take(self, comm: Comm) -> None:
        async with self.entered():
            found = [item async for item in comm]
            await comm.write(found)

    async def few(self, comm: Comm) -> None:
        async with self.entered():
            for _ in range(3):
                await comm.read()

    async def sums(self, comm: Comm) -> None:
        async with self.entered():
            total = 0
            async for item in comm:
                total += item
                await comm.write(total)

    def all(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("quick", "waiting", "failing", "take", "few", "sums")}


async def to_the_end(remote: Any) -> None:
    async with remote.waiting.stream() as stream:
        assert [item async for item in stream] == list(range(COUNT))


async def to_the_error(remote: Any) -> None:
    async with remote.failing.stream() as stream:
        assert [await stream.receive() for _ in range(COUNT)] == list(range(COUNT))
        with pytest.raises(ValueError, match="at the end") as caught:
            await stream.receive()
        assert isinstance(caught.value, RemoteError)


async def to_the_middle(remote: Any) -> None:
    async with remote.quick.stream() as stream:
        assert [await stream.receive() for _ in range(10)] == list(range(10))


async def upwards(remote: Any) -> None:
    async with remote.take.stream() as stream:
        for i in range(COUNT):
            await stream.send(i)
        await stream.send_eof()
        assert [item async for item in stream] == [tuple(range(COUNT))]


async def cut_short(remote: Any) -> None:
    async with remote.few.stream() as stream:
        try:
            for i in range(COUNT):
                await stream.send(i)
        except CommClosedError as error:
            if "takes no more items" not in str(error):
                raise


async def both_ways(remote: Any) -> None:
    async with remote.sums.stream() as stream, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            for _ in range(COUNT):
                await stream.send(1)
            await stream.send_eof()

        assert [item async for item in stream] == list(range(1, COUNT + 1))


USES = [to_the_end, to_the_error, to_the_middle, upwards, cut_short, both_ways]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("place", ["memory://", "tcp://127.0.0.1:0"])
async def test_cancelled_at_every_step(use: Use, place: str) -> None:
    """The client's step: the handler ends, nothing is left, and the next stream is whole."""
    with memory_network():
        await _cancelled_at_every_step(use, place)


async def _cancelled_at_every_step(use: Use, place: str) -> None:
    handlers = Handlers()
    async with Server(handlers.all()) as server, ConnectionPool(1) as pool:
        address = await server.listen(place)

        async def check() -> None:
            await wait_all_tasks_blocked(0.001)
            assert (pool.active, handlers.inside, server.statistics().in_flight) == (0, 0, 0)
            async with pool(address).quick.stream() as stream:
                assert [item async for item in stream] == list(range(COUNT))
            await wait_all_tasks_blocked(0.001)

        await check()
        assert await cancel_sweep(lambda: use(pool(address)), check=check) >= 2


@pytest.mark.parametrize("use", USES)
async def test_the_server_is_cancelled_at_every_step(use: Use) -> None:
    """And so is its client, as the steps come; whatever was made is gone behind it."""
    handlers = Handlers()

    async def scenario() -> None:
        async with Server(handlers.all(), grace=0) as server, ConnectionPool() as pool:
            await use(pool(await server.listen("memory://")))

    async def check() -> None:
        assert handlers.inside == 0

    with memory_network():
        assert await cancel_sweep(scenario, check=check) > 10


@pytest.mark.parametrize("use", USES)
async def test_cut_after_every_byte(use: Use, autojump_clock: trio.testing.MockClock) -> None:
    """Both ways, by an end and by a reset: a typed error, or what was read whole before."""
    handlers = Handlers()

    async def scenario(network: MemoryNetwork) -> None:
        async with Server(handlers.all(), grace=0) as server:
            address = await server.listen("memory://")
            async with ConnectionPool() as pool:
                try:
                    await use(pool(address))
                except* (ConnectError, CommClosedError):
                    pass
            # The next one is on a connection of its own, and whole.
            async with ConnectionPool() as pool, pool(address).quick.stream() as stream:
                assert [item async for item in stream] == list(range(COUNT))
        assert handlers.inside == 0

    # Not a multiple of any message's size: so each part of a message has its cuts, and some message its cut at each place.
    assert await wire_sweep(scenario, every=5) > 100
