"""Streams in both directions, cancelled at every step and cut after every byte, on either side."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.reference.kit import is_loud
from trio_dcore import Comm, CommClosedError, ConnectError, ConnectionPool, Limits, RemoteError, Server, connect
from trio_dcore.client import _stream
from trio_dcore.comm import Substream
from trio_dcore.server import _connection
from trio_dcore.testing import MemoryNetwork, SweepError, cancel_sweep, memory_network, wire_sweep

#: Two windows and more, so that batches form, credit runs out and comes back; and few bytes, since each is cut.
COUNT = 7
LIMITS = Limits(window=3, error_text=100)
#: Bytes of it in each direction.
HANDSHAKE = 154

Use = Callable[[Any], Awaitable[object]]


class Handlers:
    """What is streamed, who is inside, and what they took."""

    def __init__(self) -> None:
        self.inside = 0
        self.taken: list[int] = []

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
                if i % 3 == 0:
                    await trio.lowlevel.checkpoint()
                yield i

    async def failing(self) -> AsyncIterator[int]:
        async with self.entered():
            for i in range(COUNT):
                yield i
            raise ValueError("at the end")

    async def take(self, comm: Comm) -> None:
        async with self.entered():
            self.taken = []
            async for item in comm:
                self.taken.append(item)
            await comm.write(self.taken)

    async def few(self, comm: Comm) -> None:
        async with self.entered():
            for _ in range(2):
                await comm.read()

    async def sums(self, comm: Comm) -> None:
        async with self.entered():
            total = 0
            async for item in comm:
                total += item
                await comm.write(total)

    def server(self, **options: Any) -> Server:
        names = ("quick", "waiting", "failing", "take", "few", "sums")
        return Server({name: getattr(self, name) for name in names}, limits=LIMITS, **options)

    def check(self) -> None:
        """Nobody was left inside, and what was taken is what was sent, from its beginning on."""
        assert self.inside == 0
        assert self.taken == list(range(len(self.taken)))


def new_pool(limit: int = 512) -> ConnectionPool:
    return ConnectionPool(limit, limits=LIMITS)


async def is_whole(remote: Any) -> None:
    """A stream of its own has all its items."""
    async with remote.quick.stream() as stream:
        assert [item async for item in stream] == list(range(COUNT))


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
        assert [await stream.receive() for _ in range(5)] == list(range(5))


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


async def as_stock_clients_do(remote: Any) -> None:
    """Bare messages until the server closes the connection."""
    async with await connect(remote._address) as comm:
        await comm.write({"op": "quick", "reply": True, "close": True})
        found = []
        try:
            while True:
                found.append(await comm.read())
        except CommClosedError:
            whole = [*range(COUNT), None]  # the last is what the handler returned
            assert found == whole[: len(found)]
            if found != whole:
                raise


USES = [to_the_end, to_the_error, to_the_middle, upwards, cut_short, both_ways, as_stock_clients_do]


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Callable[[], None]:
    """Asserts that nothing was logged above INFO, but that a handler failed by itself whose caller had gone: that is news."""
    caplog.set_level(logging.WARNING)

    def check() -> None:
        loud = [record.getMessage() for record in caplog.records if is_loud(record)]
        assert not [each for each in loud if not each.startswith("op 'failing' from ")]
        caplog.clear()

    return check


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("place", ["memory://", "tcp://127.0.0.1:0"])
async def test_cancelled_at_every_step(use: Use, place: str, quiet: Callable[[], None]) -> None:
    """The client's step: the handler ends, nothing is left, and the next stream is whole."""
    with memory_network():
        assert await cancel_clients(use, place, quiet) >= 2


async def cancel_clients(use: Use, place: str, quiet: Callable[[], None]) -> int:
    handlers = Handlers()
    async with handlers.server() as server, new_pool(1) as pool:
        address = await server.listen(place)

        async def check() -> None:
            await wait_all_tasks_blocked(0.001)
            handlers.check()
            assert (pool.active, server.statistics().in_flight) == (0, 0)
            await is_whole(pool(address))
            await wait_all_tasks_blocked(0.001)
            quiet()

        await check()
        return await cancel_sweep(lambda: use(pool(address)), check=check)


@pytest.mark.parametrize("use", USES)
async def test_the_server_is_cancelled_at_every_step(use: Use, quiet: Callable[[], None]) -> None:
    """And so is its client, as the steps come; whatever was made is gone behind it."""
    handlers = Handlers()

    async def scenario() -> None:
        async with handlers.server(grace=0) as server, new_pool() as pool:
            try:
                await use(pool(await server.listen("memory://")))
            except* CommClosedError:
                if trio.current_effective_deadline() != -math.inf:
                    raise  # else the server was cancelled, too, and was faster

    async def check() -> None:
        handlers.check()
        quiet()

    with memory_network():
        assert await cancel_sweep(scenario, check=check) > 10


@pytest.mark.parametrize("use", USES)
async def test_cut_after_every_byte(use: Use, quiet: Callable[[], None], autojump_clock: trio.testing.MockClock) -> None:
    """Both ways, by an end and by a reset: a typed error, or what was read whole before."""
    # The handshake is the same for all.  Each byte is cut by an end and by a reset.
    if use is to_the_end:
        assert await cut_wires(use, quiet) > 4 * (HANDSHAKE + 50)
    else:
        assert await cut_wires(use, quiet, HANDSHAKE) > 4 * 50


async def cut_wires(use: Use, quiet: Callable[[], None], first: int = 0) -> int:
    handlers = Handlers()

    async def scenario(network: MemoryNetwork) -> None:
        async with handlers.server(grace=0) as server:
            address = await server.listen("memory://")
            async with new_pool() as pool:
                try:
                    await use(pool(address))
                except* (ConnectError, CommClosedError):
                    pass
                assert pool.active == 0
            async with new_pool() as pool:  # whose connection is a new one
                await is_whole(pool(address))
        handlers.check()
        quiet()

    return await wire_sweep(scenario, first=first)


# -- negative controls: the sweeps can fail --------------------------------------------------------------------------------------


async def test_the_end_of_the_wire_taken_for_that_of_the_stream(
    quiet: Callable[[], None], autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_one = Substream._read_one

    async def forgiving(self: Substream, ahead: bool = False) -> None:
        try:
            await read_one(self, ahead)
        except CommClosedError:
            self._ended = True

    monkeypatch.setattr(Substream, "_read_one", forgiving)
    with pytest.raises(SweepError, match=r"side='client', after=\d+, how='eof', when='sent'\): AssertionError"):
        await cut_wires(to_the_end, quiet)


async def test_a_stream_that_gives_its_comm_back_too_soon(quiet: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stream._Enveloped, "reusable", True)
    with memory_network(), pytest.raises(SweepError, match="cancelled at step"):
        await cancel_clients(to_the_end, "memory://", quiet)


async def test_a_handler_that_is_left_inside(
    quiet: Callable[[], None], autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def entered(self: Handlers, comm: Comm) -> None:
        self.inside += 1
        async for item in comm:
            await comm.write(item + 1)
        self.inside -= 1  # planted: not in a finally

    monkeypatch.setattr(Handlers, "sums", entered)
    with pytest.raises(SweepError, match="AssertionError"):
        await cut_wires(both_ways, quiet)


async def test_an_end_of_the_wire_told_as_a_failure_of_the_handler(
    quiet: Callable[[], None], autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_connection, "_is_of_no_news", lambda error: isinstance(error, CommClosedError))
    with pytest.raises(SweepError, match="AssertionError.*waiting.* failed (after|while)"):
        await cut_wires(to_the_end, quiet)
