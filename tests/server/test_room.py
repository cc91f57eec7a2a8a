"""How many connections there may be, and who gives way: to the instant, over memory and inproc."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_dcore import CommClosedError, ConnectionPool, Limits, NotAllowed, Overloaded, Server, UnknownOp, connect, rpc
from trio_dcore.abc import CommSettings
from trio_dcore.comm import FramedComm, get_transport, parse_address
from trio_dcore.testing import ManualPeer, MemoryNetwork, memory_network, no_leaks

BOTH = pytest.mark.parametrize("where", ["memory://", "inproc://"])


class Stage:
    """A server, and those who come to it."""

    def __init__(self, server: Server, network: MemoryNetwork) -> None:
        self.server = server
        self.network = network
        self.began = trio.current_time()
        self.peers: list[Any] = []

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return trio.current_time() - self.began

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Connections, handshaking, refused, expired."""
        found = self.server.statistics()
        return found.connections, found.handshaking, found.refused, found.expired

    async def silent(self, count: int = 1, address: str | None = None) -> None:
        """Connect and say nothing."""
        scheme, location = parse_address(address or self.server.address)
        for _ in range(count):
            self.peers.append(await get_transport(scheme).connect(location, CommSettings()))

    async def manual(self) -> ManualPeer:
        """Connect over memory, without a handshake."""
        peer = await ManualPeer.connect(self.server.address, self.network)
        self.peers.append(peer)
        return peer

    async def calls_at(self, address: str | None = None) -> float:
        """When a client that connects now has its answer."""
        patient = Limits(handshake_timeout=None)
        async with rpc(address or self.server.address, limits=patient, timeout=None) as remote:
            assert await remote.echo(data=1) == 1
        return self.now


@asynccontextmanager
async def stage(
    where: str = "memory://", handlers: dict[str, Any] | None = None, *, trusted: bool = True, **limits: Any
) -> AsyncIterator[Stage]:
    with memory_network(trusted) as network:
        async with no_leaks():
            async with Server(handlers, limits=Limits(**limits), name="Small") as server:
                await server.listen(where)
                yield (found := Stage(server, network))
            for peer in found.peers:
                await peer.aclose()


class TestHandshaking:
    @BOTH
    async def test_silent_ones_do_not_keep_an_honest_client_out(
        self, where: str, caplog: pytest.LogCaptureFixture, autojump_clock: Any
    ) -> None:
        """F01: of 300 silent connections before it, eight are let go every 10 ms, after a start of half a second in which they might
        have been honest."""
        async with stage(where, handshaking=8) as scene:
            await scene.silent(300)
            await wait_all_tasks_blocked()
            assert scene.counts == (8, 8, 0, 0)
            assert await scene.calls_at() == pytest.approx(0.86)  # of 301, the last eight begin in the 38th turn
            await wait_all_tasks_blocked()
            assert scene.counts == (7, 7, 293, 0)
            assert len(caplog.records) == 1
            assert "Small is at its limit, Limits(handshaking=8): " in caplog.text
            # Nobody else knocks: the last of them stay until Limits.handshake_timeout.
            await trio.sleep(10 - 0.02)
            assert scene.counts == (7, 7, 293, 0)
            await trio.sleep(0.03)
            assert scene.counts == (0, 0, 300, 0)

    @BOTH
    async def test_the_log_while_they_hammer(self, where: str, caplog: pytest.LogCaptureFixture, autojump_clock: Any) -> None:
        async with stage(where, handshaking=20) as scene, trio.open_nursery() as nursery:

            async def hammer() -> None:
                while True:
                    await scene.silent()
                    await trio.sleep(0.001)

            nursery.start_soon(hammer)
            await trio.sleep(4.5)
            nursery.cancel_scope.cancel()
        assert len(caplog.records) == 5
        assert {record.levelno for record in caplog.records} == {logging.WARNING}
        assert "more like this before" in caplog.text

    async def test_below_the_limit_nobody_gives_way(self, autojump_clock: Any) -> None:
        async with stage(handshaking=3) as scene:
            await scene.silent(2)
            await trio.sleep(5)
            assert await scene.calls_at() == 5
            assert scene.counts[2] == 0

    async def test_at_the_limit_nobody_gives_way_for_nobody(self, autojump_clock: Any) -> None:
        async with stage(handshaking=2) as scene:
            await scene.silent(2)
            await trio.sleep(5)
            assert scene.counts == (2, 2, 0, 0)
            assert await scene.calls_at() == 5  # both are old enough
            assert scene.counts[2] == 1

    async def test_a_byte_is_as_good_as_none(self, autojump_clock: Any) -> None:
        """Strangers who say one byte don't keep an honest client out any longer than those who say none."""
        async with stage(handshaking=8) as scene:
            for _ in range(300):
                await (await scene.manual()).send_bytes(b"\x40")
            assert await scene.calls_at() == pytest.approx(0.86)
            assert scene.counts[2] == 293

    async def test_who_has_done_its_part_gets_a_second(self, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any) -> None:
        monkeypatch.setattr(FramedComm, "heard", True)
        async with stage(handshaking=3) as scene:
            for seconds in (0.2, 0.1, 0.1):
                await (await scene.manual()).send_bytes(b"\x40")
                await trio.sleep(seconds)
            assert await scene.calls_at() == pytest.approx(1)
            assert scene.counts[2] == 1
            with pytest.raises(CommClosedError):
                await scene.peers[0].receive()

    async def test_a_flood_of_them(self, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any) -> None:
        """As of clients that send a whole hello of TLS: eight go every 0.2 s, after a start of a second."""
        monkeypatch.setattr(FramedComm, "heard", True)
        async with stage(handshaking=8) as scene:
            await scene.silent(60)
            assert await scene.calls_at() == pytest.approx(1 + 6 * 0.2)

    async def test_who_is_silent_gives_way_before_who_is_slow(self, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any) -> None:
        monkeypatch.setattr(FramedComm, "heard", property(lambda comm: comm._parser.total > 0))
        async with stage(handshaking=3) as scene:
            await (await scene.manual()).send_bytes(b"\x40")
            await scene.silent()
            await trio.sleep(2)
            await scene.silent()
            assert await scene.calls_at() == 2
            assert scene.counts[:3] == (3, 2, 1)  # the client's own connection is just ending
            with pytest.raises(trio.BrokenResourceError):
                await scene.peers[1]._pump.stream.send_all(b"x")
            assert await scene.calls_at() == 2  # nobody gives way: there is a place
            await wait_all_tasks_blocked()
            assert scene.counts == (2, 2, 1, 0)

    async def test_who_gets_on_with_it_makes_room_by_itself(self, autojump_clock: Any) -> None:
        """F03: the accept loop wakes when a handshake ends, in whatever way."""
        async with stage(handshaking=2) as scene, trio.open_nursery() as nursery:
            first, second = [await scene.manual() for _ in range(2)]
            await first.send_bytes(b"\x40")
            await second.send_bytes(b"\x40")
            done: list[float] = []

            async def call() -> None:
                done.append(await scene.calls_at())

            nursery.start_soon(call)
            await trio.sleep(0.3)
            assert done == []
            await first.stream.aclose()
            await wait_all_tasks_blocked()
            assert done == [pytest.approx(0.3)]

    async def test_a_finished_handshake_makes_room(self, autojump_clock: Any) -> None:
        async with stage(handshaking=1) as scene, trio.open_nursery() as nursery:
            slow = await scene.manual()
            handshake = ManualPeer.encode({"compression": None, "python": [3, 11, 0], "pickle-protocol": 5})
            await slow.send_bytes(handshake[:20])
            done: list[float] = []

            async def call() -> None:
                done.append(await scene.calls_at())

            nursery.start_soon(call)
            await trio.sleep(0.4)
            assert done == []
            await slow.send_bytes(handshake[20:])
            await wait_all_tasks_blocked()
            assert done == [pytest.approx(0.4)]
            await slow.receive()
            await slow.send({"op": "echo", "data": 2, "reply": True})
            assert await slow.receive() == 2

    async def test_listeners_share_the_limit(self, autojump_clock: Any) -> None:
        async with stage(handshaking=4) as scene:
            other = await scene.server.listen("inproc://")
            await scene.silent(10)
            await scene.silent(10, other)
            await wait_all_tasks_blocked()
            assert scene.counts == (4, 4, 0, 0)
            # They take turns, so it doesn't matter which of them is flooded.
            async with trio.open_nursery() as nursery:
                found: list[float] = []

                async def call(address: str) -> None:
                    found.append(await scene.calls_at(address))

                nursery.start_soon(call, scene.server.address)
                nursery.start_soon(call, other)
            # 22 of them, four every 10 ms; which of the last two is first is chance.
            assert found[0] in (pytest.approx(0.53), pytest.approx(0.54))
            assert found[1] == pytest.approx(0.54)

    async def test_a_client_that_connects_a_hundred_times_before_it_speaks(self, autojump_clock: Any) -> None:
        async with stage(handshaking=8) as scene:
            peers = [await scene.manual() for _ in range(100)]
            await trio.sleep(0.4)
            for peer in peers:
                await peer.handshake()
            assert scene.counts[2] == 0

    async def test_the_flood_ends(self, autojump_clock: Any) -> None:
        """A second after the last one that gave way, silence is given half a second again."""
        async with stage(handshaking=2) as scene:
            for pause, patience in ((0, 0.5), (0.9, 0.01), (0.9, 0.01), (1.1, 0.5), (0.2, 0.01), (100, 0.5)):
                await trio.sleep(pause)
                while scene.peers:
                    await scene.peers.pop().aclose()
                await scene.silent(2)
                await wait_all_tasks_blocked()
                start = scene.now
                assert await scene.calls_at() == pytest.approx(start + patience)

    async def test_no_limit(self, autojump_clock: Any) -> None:
        async with stage(handshaking=None) as scene:
            await scene.silent(100)
            await wait_all_tasks_blocked()
            assert await scene.calls_at() == 0
            assert scene.counts[1:3] == (100, 0)

    @BOTH
    @pytest.mark.parametrize("grace", [0, 600])
    async def test_stopping_while_accepting_pauses(self, grace: float, where: str, autojump_clock: Any) -> None:
        """F04: at once, and who waits for a place is closed as well."""
        async with stage(where, handshaking=2) as scene:
            await scene.silent(5)
            start = trio.current_time()
            scene.server.stop(grace)
            await scene.server.finished()
            assert trio.current_time() == start
            for peer in scene.peers:
                assert peer.stale()

    @BOTH
    async def test_cancelled_while_accepting_pauses(self, where: str, autojump_clock: Any) -> None:
        with memory_network():
            async with no_leaks(), trio.open_nursery() as nursery:
                server = Server(limits=Limits(handshaking=1))
                (address,) = await nursery.start(server.serve, where)
                scheme, location = parse_address(address)
                peers = [await get_transport(scheme).connect(location, CommSettings()) for _ in range(3)]
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await server.finished()
                for peer in peers:
                    assert peer.stale()  # type: ignore[attr-defined]
                    peer.abort()


class TestConnections:
    @BOTH
    async def test_who_has_been_idle_longest_gives_way(
        self, where: str, caplog: pytest.LogCaptureFixture, autojump_clock: Any
    ) -> None:
        """H01: after ten seconds; it is told, so that its pool connects again when it needs to."""
        async with stage(where, connections=2) as scene:
            async with rpc(scene.server.address) as first, rpc(scene.server.address) as second:
                await first.echo(data=1)
                await trio.sleep(1)
                await second.echo(data=1)
                await trio.sleep(1)
                assert await scene.calls_at() == 10
                assert scene.counts[3] == 1
                pauses, gives_way = [record.getMessage() for record in caplog.records]
                assert pauses == "Small is at its limit, Limits(connections=2): accepting pauses"
                assert gives_way.endswith(", idle for 10 s, gives way")
                assert await second.echo(data=2) == 2
                assert await first.echo(data=2) == 2  # on a new connection
                assert scene.now == 10
                assert scene.counts == (2, 0, 0, 1)

    @BOTH
    async def test_at_once_if_it_has_been_idle_for_long(
        self, where: str, caplog: pytest.LogCaptureFixture, autojump_clock: Any
    ) -> None:
        async with stage(where, connections=1) as scene:
            async with rpc(scene.server.address) as first:
                await first.echo(data=1)
                await trio.sleep(25)
                for _ in range(2):
                    assert await scene.calls_at() == 25
                assert ", idle for 25 s, gives way" in caplog.text
                assert scene.counts[3] == 1

    async def test_a_stock_peer_sees_the_end(self, autojump_clock: Any) -> None:
        async with stage(connections=1) as scene:
            peer = await scene.manual()
            await peer.handshake()
            await trio.sleep(30)
            assert await scene.calls_at() == 30
            assert await peer.expect_end()

    @BOTH
    async def test_who_works_goes_on(self, where: str, autojump_clock: Any) -> None:
        """Accepting pauses until one has been idle for ten seconds, though it was busy when the pause began."""
        async with stage(where, {"sleep": trio.sleep}, connections=2) as scene:
            ended: list[tuple[str, float]] = []

            async def work(seconds: float) -> None:
                await remote.sleep(seconds=seconds)
                ended.append(("work", scene.now))

            async def knock() -> None:
                ended.append(("knock", await scene.calls_at()))

            async with rpc(scene.server.address) as remote, trio.open_nursery() as nursery:
                nursery.start_soon(work, 33)
                nursery.start_soon(work, 50)
                await trio.sleep(20)
                nursery.start_soon(knock)
            assert ended == [("work", 33), ("knock", 43), ("work", 50)]

    @BOTH
    async def test_who_leaves_makes_room_at_once(self, where: str, autojump_clock: Any) -> None:
        async with stage(where, connections=1) as scene:
            comm = await connect(scene.server.address)

            async def leave() -> None:
                await trio.sleep(4)
                await comm.aclose()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(leave)
                assert await scene.calls_at() == 4
            assert scene.counts[3] == 0

    @BOTH
    async def test_silent_ones_do_not_take_all_places(self, where: str, autojump_clock: Any) -> None:
        async with stage(where, connections=4, handshaking=None) as scene:
            await scene.silent(10)
            await wait_all_tasks_blocked()
            assert scene.counts == (4, 4, 0, 0)
            assert await scene.calls_at() == pytest.approx(0.51)

    async def test_half_a_request_is_something_in_flight(self, autojump_clock: Any) -> None:
        async with stage(connections=1, progress_timeout=None) as scene:
            peer = await scene.manual()
            await peer.handshake()
            await trio.sleep(12)
            await peer.send_bytes(b"\x40")
            await wait_all_tasks_blocked()
            with trio.move_on_after(100) as scope:
                await scene.calls_at()
            assert scope.cancelled_caught
            await peer.stream.aclose()

    async def strangers(self, scene: Stage, count: int) -> list[ManualPeer]:
        peers = [await scene.manual() for _ in range(count)]
        for peer in peers:
            await peer.handshake()
        await wait_all_tasks_blocked()
        return peers

    async def test_strangers_who_call_now_and_then(self, autojump_clock: Any) -> None:
        """Each time, the one that has been idle longest gives way, after a second."""
        async with stage(trusted=False, connections=5) as scene, trio.open_nursery() as nursery:

            async def call_now_and_then(peer: ManualPeer) -> None:
                with contextlib.suppress(CommClosedError, trio.BrokenResourceError):
                    while True:
                        await peer.send({"op": "identity"})
                        await peer.receive()
                        await trio.sleep(3)

            for peer in await self.strangers(scene, 5):
                nursery.start_soon(call_now_and_then, peer)
            await trio.sleep(3.3)
            assert await scene.calls_at() == 4
            assert scene.counts[3] == 1
            nursery.cancel_scope.cancel()

    async def test_a_stranger_that_was_at_work(self, autojump_clock: Any) -> None:
        async with stage(handlers={"sleep": trio.sleep}, trusted=False, connections=1) as scene:
            (peer,) = await self.strangers(scene, 1)
            await peer.send({"op": "sleep", "seconds": 20.6, "reply": True})
            await trio.sleep(5)
            assert await scene.calls_at() == pytest.approx(21.6)

    async def test_idle_strangers_and_others(self, autojump_clock: Any) -> None:
        """Who has been idle longest goes first, of those that have been for long enough."""
        async with stage(connections=3) as scene:
            oldest, middle = await self.strangers(scene, 2)
            await trio.sleep(3)
            scene.network.trusted = False
            (stranger,) = await self.strangers(scene, 1)
            await trio.sleep(2)
            scene.network.trusted = True
            for peer, when in ((stranger, 5), (oldest, 10)):
                if peer is oldest:
                    await self.strangers(scene, 1)
                assert await scene.calls_at() == when
                assert await peer.expect_end()
            assert not middle.stream.closed  # type: ignore[attr-defined]

    @pytest.mark.parametrize("timeout", [30.0, None])
    async def test_strangers_in_the_middle_of_a_request(
        self, timeout: float | None, caplog: pytest.LogCaptureFixture, autojump_clock: Any
    ) -> None:
        """Ten seconds after its beginning it holds no place, however it goes on."""
        request = ManualPeer.encode({"op": "echo", "data": b"x" * 100_000, "reply": True})
        async with stage(trusted=False, connections=2, progress_timeout=timeout) as scene, trio.open_nursery() as nursery:

            async def send_slowly(peer: ManualPeer, after: float) -> None:
                await trio.sleep(after)
                await peer.send_bytes(request[:60_000])
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while True:
                        await trio.sleep(0.3)
                        await peer.send_bytes(b"x")

            first, second = await self.strangers(scene, 2)
            nursery.start_soon(send_slowly, first, 0.7)
            nursery.start_soon(send_slowly, second, 0.5)
            await trio.sleep(0.9)
            assert await scene.calls_at() == pytest.approx(10.5)
            assert scene.counts[3] == 1
            assert ", in the middle of a request for 10 s, gives way" in caplog.text
            await trio.sleep(0.1)
            assert await scene.calls_at() == pytest.approx(10.6)  # there is a place
            assert scene.counts[3] == 1
            nursery.cancel_scope.cancel()

    async def test_a_stranger_that_finishes_its_request(self, autojump_clock: Any) -> None:
        """It is answered, and then has its second."""
        request = ManualPeer.encode({"op": "echo", "data": 1, "reply": True})
        async with stage(trusted=False, connections=1) as scene, trio.open_nursery() as nursery:
            (peer,) = await self.strangers(scene, 1)
            await peer.send_bytes(request[:-1])
            found: list[float] = []

            async def call() -> None:
                found.append(await scene.calls_at())

            nursery.start_soon(call)
            await trio.sleep(9.75)
            await peer.send_bytes(request[-1:])
            assert await peer.receive() == 1
            await trio.sleep(5)
            assert found == [10.75]

    async def test_a_stranger_is_told_that_its_request_was_not_started(self, autojump_clock: Any) -> None:
        async with stage(trusted=False, connections=1) as scene:
            peer = await scene.manual()
            await peer.handshake(extension=True)
            await peer.send({"op": "echo", "data": 1, "trio-dcore": {"id": 3}})
            assert await peer.receive() == (0, 3, 1)
            await peer.send_bytes(ManualPeer.encode({"op": "echo", "data": 2, "trio-dcore": {"id": 4}})[:-1])
            assert await scene.calls_at() == 10
            closed_at = trio.current_time()
            assert await peer.receive() == (9, 3, None)
            assert await peer.expect_end()
            assert trio.current_time() == closed_at  # and not when the rest of the request is missed

    async def test_no_limit(self, autojump_clock: Any) -> None:
        async with stage(connections=None) as scene:
            comms = [await connect(scene.server.address) for _ in range(50)]
            await wait_all_tasks_blocked()
            assert scene.counts == (50, 0, 0, 0)
            for comm in comms:
                await comm.aclose()

    @BOTH
    async def test_stopping_while_accepting_pauses(self, where: str, autojump_clock: Any) -> None:
        gate = trio.Event()
        async with stage(where, {"wait": gate.wait}, connections=1) as scene, trio.open_nursery() as nursery:
            async with rpc(scene.server.address) as remote:
                nursery.start_soon(remote.wait)
                await wait_all_tasks_blocked()
                await scene.silent(2)
                await wait_all_tasks_blocked()
                scene.server.stop(5)
                await wait_all_tasks_blocked()
                assert all(peer.stale() for peer in scene.peers)
                gate.set()
                await scene.server.finished()
                assert scene.now == 0


class TestIdle:
    @BOTH
    async def test_it_is_closed_to_the_instant(self, where: str, caplog: pytest.LogCaptureFixture, autojump_clock: Any) -> None:
        caplog.set_level(logging.INFO, "trio_dcore.server")
        async with stage(where, {"sleep": trio.sleep}, idle=7) as scene:
            async with rpc(scene.server.address) as remote:
                await trio.sleep(1)
                await remote.sleep(seconds=20)  # in flight it is not idle
                await trio.sleep(6)
                await remote.echo(data=1)
                assert scene.now == 27
                await trio.sleep(6.999)
                assert scene.counts == (1, 0, 0, 0)
                await trio.sleep(0.001)
                await wait_all_tasks_blocked()
                assert scene.counts == (0, 0, 0, 1)
                assert "idle for 7" in caplog.text
                assert await remote.echo(data=2) == 2  # it was told, and connects again
                assert scene.now == pytest.approx(34)

    async def test_many_of_them(self, autojump_clock: Any) -> None:
        async with stage(idle=10) as scene:
            comms = []
            for second in range(20):
                comms.append(await connect(scene.server.address))
                await trio.sleep(0.5)
                assert scene.counts[0] == min(second + 1, 10)
                await trio.sleep(0.5)
            for second in range(20, 32):
                await trio.sleep(0.5)
                assert scene.counts[0] == max(0, 29 - second)
                await trio.sleep(0.5)
            for comm in comms:
                await comm.aclose()

    async def test_who_is_told(self, autojump_clock: Any) -> None:
        """A goodbye to those who speak the extension and have made a request, or come from a pool; the end alone to others."""
        async with stage(idle=5) as scene:
            stock, raw, asking, pooled = [await scene.manual() for _ in range(4)]
            await stock.handshake()
            await raw.handshake(extension=True)
            await asking.handshake(extension=True)
            await asking.send({"op": "echo", "data": 1, "trio-dcore": {"id": 3}})
            assert await asking.receive() == (0, 3, 1)
            await pooled.handshake(
                trio_dcore={"version": 1, "features": ["calls", "types", "errors"], "window": [16, 2**20], "pooled": True}
            )
            await trio.sleep(5)
            for peer, last in ((asking, 3), (pooled, 0)):
                assert await peer.receive() == (9, last, None)
            for peer in (stock, raw, asking, pooled):
                assert await peer.expect_end()

    async def test_half_a_request_is_not_idle(self, autojump_clock: Any) -> None:
        async with stage(idle=5) as scene:
            peer = await scene.manual()
            await peer.handshake()
            await trio.sleep(4)
            request = ManualPeer.encode({"op": "echo", "data": 1, "reply": True})
            await peer.send_bytes(request[:10])
            await trio.sleep(8)
            await peer.send_bytes(request[10:])
            assert await peer.receive() == 1
            assert scene.now == 12
            assert await peer.expect_end()
            assert scene.now == 17

    async def test_a_handshake_and_a_stream_are_not_idle(self, autojump_clock: Any) -> None:
        async with stage(idle=1, handshake_timeout=30) as scene:
            scene.server.stream_handlers["note"] = print
            await scene.silent()
            async with rpc(scene.server.address) as remote, remote["echo"].stream(data=1) as stream:
                assert [item async for item in stream] == [1]
            await trio.sleep(20)
            assert scene.counts[:2] == (1, 1)

    @pytest.mark.parametrize("late", [0.0, 1e-9])
    @pytest.mark.parametrize("where", ["memory://", "inproc://", "tcp://127.0.0.1:0"])
    async def test_a_request_at_that_very_moment(self, where: str, late: float, autojump_clock: Any) -> None:
        """It is answered: on the connection, or, being told that it never started, on a new one."""
        if where.startswith("tcp"):
            autojump_clock.autojump_threshold = 0.02
        seen: list[int] = []

        async def note(number: int) -> int:
            seen.append(number)
            return number

        async with stage(where, {"note": note}, idle=2) as scene:
            pool = ConnectionPool()
            async with pool:
                for number in range(5):
                    assert await pool(scene.server.address).note(number=number) == number
                    await trio.sleep(2 + late)
            assert seen == list(range(5))

    async def test_not_if_not_set(self, autojump_clock: Any) -> None:
        async with stage() as scene:
            comm = await connect(scene.server.address)
            await trio.sleep(10**6)
            await comm.write({"op": "echo", "data": 1})
            assert await comm.read() == 1
            await comm.aclose()

    @BOTH
    async def test_stopping_takes_no_time(self, where: str, autojump_clock: Any) -> None:
        async with stage(where, idle=3) as scene:
            comm = await connect(scene.server.address)
            await trio.sleep(2)
            start = trio.current_time()
            await scene.server.aclose()
            assert trio.current_time() == start
            await comm.aclose()


class TestRequests:
    @pytest.mark.parametrize("where", ["memory://", "inproc://", "tcp://127.0.0.1:0"])
    async def test_beyond_the_limit_nothing_is_started(
        self, where: str, caplog: pytest.LogCaptureFixture, autojump_clock: Any
    ) -> None:
        await _overload(where, caplog, lambda: wait_all_tasks_blocked(0.01))

    async def test_a_stock_peer_is_told_as_well(self, autojump_clock: Any) -> None:
        async with stage(handlers={"sleep": trio.sleep}, requests=1) as scene, rpc(scene.server.address) as remote:
            peer = await scene.manual()
            await peer.handshake()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: remote.sleep(seconds=5))
                await wait_all_tasks_blocked()
                await peer.send({"op": "echo", "data": Canary(), "reply": True})
                answer = await peer.receive()
                assert answer["status"] == "uncaught-error"
                assert type(pickle.loads(answer["exception"])) is ConnectionAbortedError
                await peer.send({"op": "echo", "data": Canary(), "reply": False})
            await peer.send({"op": "echo", "data": 1, "reply": True})
            assert await peer.receive() == 1
            assert scene.server.statistics().requests == {"sleep": 1, "echo": 1}
            assert Canary.sung == 0

    async def test_who_is_not_allowed_is_told_that(self, autojump_clock: Any) -> None:
        with memory_network():
            async with Server({"sleep": trio.sleep}, limits=Limits(requests=1), blocked_handlers=["echo"]) as server:
                async with rpc(await server.listen("memory://")) as remote, trio.open_nursery() as nursery:
                    nursery.start_soon(lambda: remote.sleep(seconds=5))
                    await wait_all_tasks_blocked()
                    with pytest.raises(NotAllowed):
                        await remote.echo(data=1)
                    with pytest.raises(UnknownOp):
                        await remote.echoo(data=1)


class Canary:
    """Marks when it is unpickled."""

    sung = 0

    def __reduce__(self) -> Any:
        return (_sing, ())


def _sing() -> str:
    Canary.sung += 1
    return "sung"


async def _overload(where: str, caplog: pytest.LogCaptureFixture, settle: Callable[[], Awaitable[None]]) -> None:
    gate, started, cleaned = trio.Event(), 0, trio.Event()

    async def work() -> str:
        nonlocal started
        started += 1
        try:
            await gate.wait()
        finally:
            with trio.CancelScope(shield=True):
                await cleaned.wait()
        return "done"

    answers: list[Any] = []
    with memory_network():
        async with no_leaks(), Server({"work": work}, limits=Limits(requests=2), name="Busy") as server:
            async with rpc(await server.listen(where)) as remote, trio.open_nursery() as nursery:

                async def call(scope: trio.CancelScope) -> None:
                    with scope:
                        answers.append(await remote.work())

                scopes = [trio.CancelScope() for _ in range(2)]
                for scope in scopes:
                    nursery.start_soon(call, scope)
                await settle()
                for _ in range(10):
                    with pytest.raises(Overloaded, match=r"Limits\(requests=2\)"):
                        await remote.work()
                    with pytest.raises(Overloaded):
                        await remote.echo(data=1)
                assert started == 2
                assert server.statistics().refused == 20
                assert len(caplog.records) == 1  # of twenty
                assert "Busy is at its limit, Limits(requests=2)" in caplog.text
                scopes[0].cancel()  # one that cleans up after its caller has gone is still there
                await settle()
                assert server.statistics().in_flight == 2
                with pytest.raises(Overloaded):
                    await remote.echo(data=1)
                gate.set()
                cleaned.set()
                await settle()
                assert answers == ["done"]
                assert await remote.echo(data=1) == 1
                assert server.statistics().requests == {"work": 2, "echo": 1}
