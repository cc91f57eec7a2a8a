"""Group N with pings: calls that last for several of them, cancelled at every step, and silenced after every byte.

Everything here is in virtual time: over memory://, where instants are exact.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.reference.kit import Outcome, Wire, reference
from tests.reference.test_d_calls_and_pool import counts_are_whole
from tests.reference.test_n_sweeps import faults_of
from tests.reference.test_negative_controls import failure
from trio_dcore import CommClosedError, ConnectError, ConnectionPool, Limits, RemoteProtocolError, ServerClosing
from trio_dcore.comm import Silence
from trio_dcore.server._connection import Connection
from trio_dcore.testing import FaultStream, MemoryNetwork, cancel_sweep, wire_sweep

blocked = trio.testing.wait_all_tasks_blocked

#: Both sides ask after a second of silence, and give up five seconds later.
LIMITS = Limits(ping_interval=1.0, ping_timeout=5.0, handshake_timeout=3.0)
#: What the handlers need: two pings in each direction.
LASTS = 2.6
#: Seconds after which a silenced call has ended: what it needs, the silence before a ping, looks between, and the timeout.
AT_MOST = LASTS + 1.0 + 2 * 0.25 + 5.0


class Noting(FaultStream):
    """Notes when something is sent, and falls into a black hole after so many bytes."""

    def __init__(self, stream: trio.abc.Stream, after: float = math.inf) -> None:
        super().__init__(stream)
        self.sent_at: set[float] = set()
        self.fell = False
        self._after = after
        self._fall()

    def _fall(self) -> None:
        if self.sent >= self._after and not self.fell:
            self.fell = True
            self.black_hole()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        whole = bytes(data)
        front = whole if self.fell else whole[: int(min(len(whole), self._after - self.sent))]
        await super().send_all(front)
        self.sent_at.add(trio.current_time())
        self._fall()
        if len(front) < len(whole):
            await super().send_all(whole[len(front) :])

    def send_nowait(self, data: bytes) -> int:
        sent = super().send_nowait(data if self.fell else data[: int(min(len(data), self._after - self.sent))])
        self.sent_at.add(trio.current_time())
        self._fall()
        return sent


class Slow:
    """Handlers that are silent for longer than pings may wait."""

    def __init__(self) -> None:
        self.inside = 0
        self.begun: list[str] = []
        self.handlers = {"work": self.work, "items": self.items, "quick": self.quick}

    async def work(self, number: int = 1, seconds: float = LASTS) -> int:
        self.begun.append(f"work {number}")
        self.inside += 1
        try:
            await trio.sleep(seconds)
            return number
        finally:
            self.inside -= 1

    async def items(self) -> AsyncIterator[int]:
        self.begun.append("items")
        self.inside += 1
        try:
            for number in range(2):
                await trio.sleep(LASTS / 2)
                yield number
        finally:
            self.inside -= 1

    async def quick(self) -> str:
        self.begun.append("quick")
        return "quick"

    def check(self) -> None:
        """Nobody was left inside, and no call was made twice."""
        assert self.inside == 0
        assert len(set(self.begun)) == len(self.begun)
        self.begun.clear()


async def a_call(remote: Any) -> None:
    assert await remote.work() == 1


async def a_stream(remote: Any) -> None:
    async with remote.items.stream() as stream:
        assert [item async for item in stream] == [0, 1]


async def two_at_once(remote: Any) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a_call, remote)
        assert await remote.work(number=2) == 2


USES: tuple[Callable[[Any], Awaitable[None]], ...] = (a_call, a_stream, two_at_once)


def noting(network: MemoryNetwork | None) -> list[tuple[str, Noting]]:
    """Both ends of all connections to come."""
    assert network is not None
    ends: list[tuple[str, Noting]] = []

    def wrap(stream: trio.abc.Stream, side: str) -> trio.abc.Stream:
        ends.append((side, Noting(stream)))
        return ends[-1][1]

    network.wrap = wrap
    return ends


@reference("N01", "m")
async def test_n01_pings_flow(wire: Wire) -> None:
    """What the sweeps below go through: in each direction there are pings, or answers to them, at several instants."""
    subject = Slow()
    ends = noting(wire.network)
    async with wire.server(subject.handlers, limits=LIMITS) as (_, address):
        for use in USES:
            async with wire.client(address, limits=LIMITS) as remote:
                await remote.quick()
                ends_of_it = ends[-2:]
                began = trio.current_time()
                await use(remote)
                for _, end in ends_of_it:
                    assert len({at for at in end.sent_at if began < at < began + LASTS}) >= 2


@reference("N01", "m")
async def test_n01_cancelled_while_pings_flow(wire: Wire) -> None:
    """The client, at every step of whoever makes one: pools and server are whole, and no later call meets a pong."""
    subject = Slow()
    async with (
        wire.server(subject.handlers, limits=LIMITS) as (server, address),
        wire.pool(limit=2, limits=LIMITS) as pool,
    ):

        async def check() -> None:
            counts_are_whole(pool)
            await blocked()
            assert server.statistics().in_flight == 0
            assert await pool(address).quick() == "quick"
            subject.check()
            counts_are_whole(pool)
            await blocked()
            assert server.statistics().connections == pool.open
            pool.collect()
            await blocked()

        for use in USES:

            async def scenario(use: Callable[[Any], Awaitable[None]] = use) -> None:
                await use(pool(address))

            assert await cancel_sweep(scenario, check=check) > 15


@reference("N02", "m")
async def test_n02_servers_cancelled_while_pings_flow(wire: Wire) -> None:
    """The whole of it, server and client, at every step."""
    subject = Slow()
    for use in USES:

        async def scenario(use: Callable[[Any], Awaitable[None]] = use) -> None:
            async with (
                wire.server(subject.handlers, limits=LIMITS, grace=0) as (_, address),
                wire.client(address, limits=LIMITS) as remote,
            ):
                try:
                    await use(remote)
                except* CommClosedError:
                    if trio.current_effective_deadline() != -math.inf:
                        raise  # else the server was cancelled, too, and was faster

        async def check() -> None:
            await blocked()
            subject.check()

        assert await cancel_sweep(scenario, check=check) > 25


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
async def test_n03_cut_while_pings_flow(use: Callable[[Any], Awaitable[None]], autojump_clock: trio.testing.MockClock) -> None:
    """After every byte, those of pings as well, by an end and by a reset: a result or a typed error, at once."""
    wire = Wire("i", None)  # the sweep makes a network for each cut
    subject = Slow()

    async def scenario(network: MemoryNetwork) -> None:
        faults = faults_of(network)
        async with wire.make_server(subject.handlers, limits=LIMITS) as server, wire.pool(limit=2, limits=LIMITS) as pool:
            address = await server.listen("memory://")
            with wire.lasts(0, at_most=LASTS):
                try:
                    await use(pool(address))
                except* (ConnectError, CommClosedError):
                    pass
            counts_are_whole(pool)
            await blocked()
            assert server.statistics().in_flight == 0
            if not faults[0].was_cut:
                pool.collect()  # what is cut later is another call
            assert await pool(address).quick() == "quick"
            subject.check()

    assert await wire_sweep(scenario, first=154) > 4 * 80  # the handshake has nothing to do with pings


# -- silence ---------------------------------------------------------------------------------------------------------------------


@reference("N03", "m")
async def test_n03_silenced_after_every_byte(wire: Wire) -> None:
    """Nothing passes any more, no end and no reset: pings find out, on both sides, and in time."""
    network = wire.network
    assert network is not None
    for side in ("client", "server"):
        after = 0
        while await is_silenced(wire, network, side, after):
            after += 1
        assert after > 154 + 60


async def is_silenced(wire: Wire, network: MemoryNetwork, side: str, after: int) -> bool:
    subject = Slow()
    ends: list[Noting] = []

    def wrap(stream: trio.abc.Stream, which: str) -> trio.abc.Stream:
        if which == side and not ends:
            ends.append(Noting(stream, after))
            return ends[0]
        return stream

    network.wrap = wrap
    async with wire.server(subject.handlers, limits=LIMITS) as (server, address), wire.pool(limit=1, limits=LIMITS) as pool:
        with wire.lasts(0, at_most=AT_MOST):
            try:
                assert await pool(address).work() == 1
                ended = ""
            except (ConnectError, CommClosedError) as error:
                ended = str(error)
            assert not ended or ends[0].fell
        counts_are_whole(pool)
        if ended:  # the server finds out as well, in about the same time
            with trio.fail_after(AT_MOST):
                while server.statistics().in_flight:  # noqa: ASYNC110
                    await trio.sleep(0.1)
            # On a connection of its own the next call works.
            assert await pool(address).quick() == "quick"
        subject.check()
        pool.collect()
        ends[0].cut()
    assert not network.open_ends()
    return ends[0].fell


# -- what crosses ----------------------------------------------------------------------------------------------------------------

# Pings are sent 1 to 1.25 seconds after a call began, and what crosses them is on its way for so long.
WAY = 0.1
AROUND = [round(0.8 + step * 0.04, 2) for step in range(21)]


def far_away(network: MemoryNetwork | None) -> None:
    assert network is not None
    network.wrap = lambda stream, side: FaultStream(stream, latency=WAY, on="receive")


@reference("N03", "m")
async def test_n03_pings_that_cross_the_reply(wire: Wire) -> None:
    """Each side's ping is on its way, or the answer to it, while the call ends: the connection goes on, call after call."""
    subject = Slow()
    far_away(wire.network)
    async with wire.server(subject.handlers, limits=LIMITS) as (server, address), wire.client(address, limits=LIMITS) as remote:
        first = await wire.comm_of(remote, server)
        for number, seconds in enumerate(AROUND):
            with wire.lasts(0, at_most=seconds + 4 * WAY):
                assert await remote.work(number=number, seconds=seconds) == number
            assert await remote.quick() == "quick"
            subject.check()
        assert await wire.comm_of(remote, server) == first


@reference("N03", "m")
async def test_n03_pings_that_cross_a_goodbye(wire: Wire) -> None:
    """The server stops about when the call ends, and pings are on their way: the reply comes, and the next call is refused."""
    outcomes = set()
    for seconds in AROUND:
        for stop in AROUND:
            outcomes.add(await cross_goodbye(wire, seconds, stop))
    assert outcomes == {"quick", "refused"}


async def cross_goodbye(wire: Wire, seconds: float, stop: float) -> str:
    subject = Slow()
    far_away(wire.network)
    async with wire.server(subject.handlers, limits=LIMITS) as (server, address), wire.client(address, limits=LIMITS) as remote:
        await remote.echo()

        async def client() -> str:
            with wire.lasts(0, at_most=seconds + 4 * WAY):
                assert await remote.work(seconds=seconds) == 1
            try:
                result: str = await remote.quick()
                return result
            except (ServerClosing, ConnectError):
                return "refused"

        outcome = Outcome()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, client)
            await trio.sleep(stop)
            server.stop()
            with wire.lasts(0, at_most=seconds + 5 * WAY):
                await server.finished()
        assert server.statistics().connections == 0
        assert subject.begun == ["work 1"] + ["quick"] * (outcome.value == "quick")
        subject.check()
    return str(outcome.value)


# -- negative controls: these can fail -------------------------------------------------------------------------------------------


class TestControls:
    def test_one_that_is_found_too_late(self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        look = Silence.look
        monkeypatch.setattr(Silence, "look", lambda self, now, interval, timeout: look(self, now, interval, 4 * timeout))
        assert " s was allowed" in failure(test_n03_silenced_after_every_byte, 30, transport="m", caplog=caplog)

    def test_a_connection_that_a_late_ping_ends(self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        def strict(self: Connection, message: object) -> None:
            raise RemoteProtocolError(f"late: {message}")

        monkeypatch.setattr(Connection, "_left_over", strict)
        assert failure(test_n03_pings_that_cross_the_reply, 30, transport="m", caplog=caplog)

    def test_a_comm_that_is_used_again_after_a_cancellation(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ConnectionPool, "discard", ConnectionPool.release)
        assert "SweepError: cancelled at step" in failure(test_n01_cancelled_while_pings_flow, 30, transport="m", caplog=caplog)
