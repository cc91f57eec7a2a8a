"""What a mutant has shown that no other test knew; ``mutate.py`` makes the mutants."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_dcore import (
    BatchedSend,
    Comm,
    CommClosedError,
    ConnectionPool,
    Limits,
    LocalProtocolError,
    Server,
    connect,
    rpc,
    send_recv,
)
from trio_dcore.abc import CommSettings, Peer
from trio_dcore.client._pool_policy import PoolPolicy
from trio_dcore.comm import FramedComm, get_transport
from trio_dcore.comm._pumps import StreamPump
from trio_dcore.protocol._envelope import END, ITEM
from trio_dcore.testing import FaultStream, ManualPeer, cancel_sweep, memory_network, memory_stream_pair


class TestServer:
    async def test_a_handler_that_does_not_end_is_named_after_a_cancellation_from_outside(
        self, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
    ) -> None:
        """Not only after a stop(): the task that names it must outlive the cancellation itself."""
        started = trio.Event()

        async def stubborn() -> None:
            with trio.CancelScope(shield=True):
                started.set()
                await trio.sleep(3.5)

        with memory_network():
            server = Server({"stubborn": stubborn}, name="a server")
            async with trio.open_nursery() as nursery:
                (address,) = await nursery.start(server.serve, "memory://")
                async with rpc(address) as remote:
                    await remote.stubborn.notify()
                    await started.wait()
                    nursery.cancel_scope.cancel()
                    await server.finished()
        told = [record.getMessage() for record in caplog.records if "does not end" in record.getMessage()]
        assert len(told) == 3
        assert all(text.startswith("a server waits for a task that does not end: connection from") for text in told)

    async def test_dask_names_closing(self, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock) -> None:
        caplog.set_level(logging.INFO)
        async with Server({"hang": trio.sleep_forever}) as server, trio.open_nursery() as nursery:
            address = await server.listen("inproc://")

            async def call() -> None:
                async with rpc(address) as remote:
                    with pytest.raises(Exception, match="grace over"):
                        await remote.hang()

            nursery.start_soon(call)
            await wait_all_tasks_blocked()
            before = trio.current_time()
            await server.close(timeout=3, reason="it is late")
            assert trio.current_time() - before == 3
            assert server.status.name == "closed"
        assert "Server stops with a grace of 3 s: it is late" in caplog.messages

    async def test_a_listener_that_can_not_be_closed_does_not_keep_the_others_open(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails() -> None:
            raise OSError("as asked")

        with pytest.raises(OSError, match="as asked"):
            async with Server() as server:
                addresses = [await server.listen("tcp://127.0.0.1:0") for _ in range(3)]
                last = server._listeners[-1]
                close = last.close
                monkeypatch.setattr(last, "close", fails)
        for address in addresses[:2]:
            with pytest.raises(ConnectionRefusedError):
                await get_transport("tcp").connect(address.removeprefix("tcp://"), CommSettings())
        assert server.status.name == "closed"
        close()

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a task watches")
    async def test_connections_that_ended_are_not_watched(self) -> None:
        async with Server() as server:
            address = await server.listen("tcp://127.0.0.1:0")
            watcher = server._hangups
            assert watcher is not None
            for _ in range(3):
                async with await connect(address):
                    while not watcher._callbacks:
                        await trio.lowlevel.checkpoint()
                    assert len(watcher._callbacks) == 1
                while server.statistics().connections:
                    await trio.lowlevel.checkpoint()
                assert watcher._callbacks == {}

    async def test_who_gives_way_has_left_at_once(self) -> None:
        """Else two that come in the same moment would both find room."""
        async with Server(limits=Limits(connections=1)) as server:
            async with await connect(await server.listen("inproc://")) as comm:
                await wait_all_tasks_blocked()
                assert len(server._room.connections) == 1
                now = trio.current_time() + 60
                assert server._room.make(now) == now
                assert len(server._room.connections) == 0
                with pytest.raises(CommClosedError):
                    await comm.read()

    @pytest.mark.parametrize("where", ["tcp://127.0.0.1:0", "inproc://"])
    async def test_a_handler_that_reads_is_cancelled_when_it_has_read(self, where: str) -> None:
        """The end was told while it read: what it reads then is its own, and where it waits next it is cancelled."""
        found: list[Any] = []

        async def handler(comm: Comm) -> None:
            found.append(await comm.read())
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                found.append("cancelled")
                raise

        async with Server({"handler": handler}) as server:
            async with await connect(await server.listen(where)) as comm:
                await comm.write({"op": "handler"})
                await wait_all_tasks_blocked(0.01)
                (connection,) = server._connections
                connection.hung_up()
                await wait_all_tasks_blocked(0.01)
                assert found == []
                await comm.write(5)
                with trio.fail_after(10):
                    while server.statistics().connections:
                        await trio.lowlevel.checkpoint()
        assert found == [5, "cancelled"]


class Stuck(trio.abc.Stream):
    """Takes nothing, and does not want to be closed."""

    def __init__(self) -> None:
        self.stuck = trio.Event()
        self.broken = ""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    async def send_all(self, data: Any) -> None:
        self.stuck.set()
        if self.broken:
            raise trio.BrokenResourceError(self.broken)
        await trio.sleep_forever()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.sleep_forever()


def over(stream: trio.abc.Stream, **limits: Any) -> FramedComm:
    return FramedComm(
        StreamPump(stream),
        local_address="x://1",
        peer=Peer("x://2", "memory"),
        settings=CommSettings(limits=Limits(**limits)),
    )


class TestPool:
    def test_an_address_without_comms_is_forgotten(self) -> None:
        """Also if its last one had died when a call got it: else there is an entry for each address of ever."""
        policy = PoolPolicy(1)
        comm = over(Stuck())
        slot, _ = policy.reserve("x://1", "op")
        assert slot is not None
        policy.connected(slot, comm)
        assert policy.release(comm, 0.0) is None
        assert policy.reuse("x://1", "op") is comm
        assert policy.replace(comm) is not None
        assert policy.idle == {}


class TestBatchedSend:
    async def test_why_nothing_can_be_sent_is_told(self) -> None:
        """It is what the comm has said, and not that sending was cancelled."""
        stream = Stuck()
        stream.broken = "the cable is cut"
        comm = over(stream)
        with pytest.raises(CommClosedError, match="the cable is cut"):
            async with BatchedSend(comm) as batched:
                batched.send("x")
                await wait_all_tasks_blocked()


class TestComm:
    async def test_closing_lingers_once(self, autojump_clock: MockClock) -> None:
        """What waits to be sent, and the polite end of the stream, have the time together, not each."""
        stream = Stuck()
        comm = over(stream, linger=2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(comm.write, b"x")
            await stream.stuck.wait()
            before = trio.current_time()
            await comm.aclose()
            assert trio.current_time() - before == 2
            nursery.cancel_scope.cancel()

    async def test_it_is_closed_while_it_closes(self, autojump_clock: MockClock) -> None:
        comm = over(Stuck(), linger=2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(comm.aclose)
            await wait_all_tasks_blocked()
            assert comm.closed()
            with pytest.raises(CommClosedError):
                await comm.write(b"x")

    async def test_what_was_not_read_or_written_is_not_counted(self) -> None:
        ours, theirs = memory_stream_pair()
        reader = over(theirs)
        await ours.aclose()
        with pytest.raises(CommClosedError):
            await reader.read()
        assert reader.messages_read == 0
        stream = Stuck()
        writer = over(stream)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.write, b"x")
            await stream.stuck.wait()
            nursery.cancel_scope.cancel()
        assert (writer.messages_written, writer.bytes_written) == (0, 0)


class TestConnection:
    async def test_half_a_request_behind_one_that_runs_does_not_hold_up_a_shutdown(self, autojump_clock: MockClock) -> None:
        """Nor does it if the rest of it is waited for only after the reply to the first."""
        started, go_on = trio.Event(), trio.Event()

        async def work() -> str:
            started.set()
            await go_on.wait()
            return "done"

        with memory_network() as network:
            async with Server({"work": work}) as server:
                peer = await ManualPeer.connect(await server.listen("memory://"), network)
                async with peer:
                    await peer.handshake()
                    await peer.send({"op": "work", "reply": True})
                    await started.wait()
                    await peer.send_bytes(ManualPeer.encode({"op": "work"})[:-1])
                    server.stop(600)
                    await wait_all_tasks_blocked()
                    go_on.set()
                    assert await peer.receive() == "done"
                    before = trio.current_time()
                    await server.finished()
                    assert trio.current_time() - before == pytest.approx(server.settings.limits.linger)

    async def test_a_hasty_caller_comes_while_another_ones_handler_runs(self) -> None:
        """The server looks at both more often at once, and not only when it would have looked next."""
        async with Server({"work": trio.sleep}, limits=Limits(ping_interval=None)) as server:
            address = await server.listen("tcp://127.0.0.1:0")
            hasty = Limits(ping_interval=0.1, ping_timeout=0.4)
            async with rpc(address) as one, rpc(address, limits=hasty) as other, trio.open_nursery() as nursery:
                nursery.start_soon(lambda: one.work(seconds=100))
                await wait_all_tasks_blocked(0.2)
                await other.work(seconds=0.9)
                nursery.cancel_scope.cancel()

    async def test_a_server_that_asks_often_looks_as_often(self, autojump_clock: MockClock) -> None:
        """Also where no client wants it to."""
        ended: list[float] = []

        async def work() -> None:
            began = trio.current_time()
            try:
                await trio.sleep_forever()
            finally:
                ended.append(trio.current_time() - began)

        with memory_network() as network:
            holes: list[FaultStream] = []

            def wrap(stream: trio.abc.Stream, side: str) -> trio.abc.Stream:
                holes.append(FaultStream(stream))
                return holes[-1]

            network.wrap = wrap
            async with Server({"work": work}, limits=Limits(ping_interval=0.4, ping_timeout=0.4)) as server:
                remote = rpc(await server.listen("memory://"), limits=Limits(ping_interval=None))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(remote.work)
                    await wait_all_tasks_blocked()
                    for hole in holes:
                        hole.black_hole()
                    await trio.sleep(5)
                    nursery.cancel_scope.cancel()
                assert ended == [pytest.approx(0.8)]
                for hole in holes:
                    hole.cut()
                remote.close_comms()

    @pytest.mark.parametrize("asks", ["client", "server"])
    async def test_an_answer_in_the_very_moment_in_which_patience_ends(self, asks: str, autojump_clock: MockClock) -> None:
        """It is seen in time, in whatever order the tasks run that are woken then."""
        off, exact = Limits(ping_interval=None), Limits(ping_interval=0.5, ping_timeout=0.5)
        limits = {"client": off, "server": off, asks: exact}
        with memory_network() as network:
            network.wrap = lambda stream, side: FaultStream(stream, latency=0.25, on="receive")  # so an answer takes as long
            async with Server({"work": trio.sleep}, limits=limits["server"]) as server:
                async with rpc(await server.listen("memory://"), limits=limits["client"]) as remote:
                    await remote.work(seconds=30)


class Halting(FaultStream):
    """Takes what needs no wait at any time; of what may wait the first bytes, and the rest when it may go on."""

    go_on = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await super().send_all(data[:10])
        await self.go_on.wait()
        await super().send_all(data[10:])


async def test_nothing_is_written_into_a_message_when_one_was_made_in_a_thread_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    async def here(work: Callable[[], Any], what: str) -> Any:
        await trio.lowlevel.checkpoint()
        made.append(what)
        return work()

    monkeypatch.setattr("trio_dcore.comm._writing.in_worker", here)
    sizes: list[int] = []

    async def serve() -> None:
        async with ManualPeer(await listener.accept()) as peer:
            await peer.handshake()
            for _ in range(3):
                sizes.append(len(await peer.receive()))

    with memory_network() as network:
        network.wrap = lambda stream, side: Halting(stream)
        async with await network.listen_streams() as listener, trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            Halting.go_on = trio.Event()
            Halting.go_on.set()
            async with await connect(listener.address, offload=50_000) as comm:
                await comm.write(numpy.arange(20_000)[::2])  # whose elements must be brought together
                assert len(made) == 1
                Halting.go_on = trio.Event()
                nursery.start_soon(comm.write, numpy.arange(5_000))
                await wait_all_tasks_blocked()
                assert comm.write_soon("small")  # type: ignore[attr-defined]
                Halting.go_on.set()
                with trio.fail_after(5):
                    while len(sizes) < 3:
                        await trio.lowlevel.checkpoint()
    assert sizes == [10_000, 5_000, 5]


async def test_an_item_whose_sending_was_cancelled_was_not_sent() -> None:
    """At every step, while both sides send first, and so read while they write: or else the comm is closed."""
    big = bytes(150_000)  # more than fits

    async def both(comm: Comm) -> None:
        await comm.write(big)
        await comm.write([len(item) async for item in comm])

    outcomes = set()
    with memory_network():
        async with Server({"both": both}) as server, ConnectionPool() as pool:
            address = await server.listen("memory://")
            stream = await pool(address).both.stream().__aenter__()
            sent = False

            async def scenario() -> None:
                nonlocal sent
                sent = False
                await stream.send(big)
                sent = True

            async def check() -> None:
                nonlocal stream
                try:
                    await stream.send(b"marker")
                    await stream.send_eof()
                    first, found = [item async for item in stream]
                    assert first == big
                    assert found == ((len(big), 6) if sent else (6,))
                    outcomes.add("sent" if sent else "not sent")
                except CommClosedError:
                    assert not sent
                    outcomes.add("closed")
                await stream.aclose()
                stream = await pool(address).both.stream().__aenter__()

            assert await cancel_sweep(scenario, check=check) > 5
            await stream.aclose()
    assert outcomes == {"sent", "not sent", "closed"}


class TestEndings:
    async def test_a_pool_that_is_closed_while_cancelled_is_closed(self) -> None:
        async with Server() as server:
            pool = ConnectionPool()
            await pool(await server.listen("inproc://")).echo()
            with trio.CancelScope() as scope:
                scope.cancel()
                await pool.aclose()
            assert scope.cancelled_caught
            assert (pool.closed, pool.open) == (True, 0)

    async def test_a_stream_that_is_closed_while_cancelled_is_closed(self) -> None:
        async with Server({"hang": trio.sleep_forever}) as server, rpc(await server.listen("inproc://")) as remote:
            async with remote.hang.stream() as stream:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await stream.aclose()
                assert scope.cancelled_caught
                assert remote.pool.active == 0

    async def test_nothing_is_sent_behind_the_end_of_a_stream(self) -> None:
        async def serve() -> None:
            async with ManualPeer(await listener.accept()) as peer:
                await peer.handshake(extension=True)
                assert (await peer.receive())["op"] == "take"
                assert await peer.receive() == (ITEM, 1, "item")
                assert await peer.receive() == (END, 1, None)
                await peer.expect_end()

        with memory_network() as network:
            async with await network.listen_streams() as listener, trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                async with rpc(listener.address) as remote, remote.take.stream() as stream:
                    await stream.send("item")
                    await stream.send_eof()
                    with pytest.raises(LocalProtocolError, match="send_eof"):
                        await stream.send("behind it")

    async def test_a_comm_whose_call_had_no_answer_is_closed_for_both(self) -> None:
        """The server has ended its direction only, and waits for the end of ours."""
        seen = trio.Event()

        async def serve() -> None:
            async with ManualPeer(await listener.accept()) as peer:
                await peer.handshake()
                await peer.receive()
                await peer.stream.send_eof()  # type: ignore[attr-defined]
                await peer.expect_end()
                seen.set()

        listener, *_ = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async with await connect(f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}") as comm:
                with pytest.raises(CommClosedError):
                    await send_recv(comm, op="x")
                with trio.fail_after(5):
                    await seen.wait()

    async def test_callers_are_looked_after_while_a_cancelled_server_drains(self) -> None:
        """Pings are answered, and one that goes is noticed, as long as there is time."""
        cut = trio.Event()

        async def endless() -> None:
            try:
                await trio.sleep_forever()
            finally:
                cut.set()

        hasty = Limits(ping_interval=0.1, ping_timeout=0.4)
        async with trio.open_nursery() as nursery:
            serving = trio.CancelScope()

            async def serve(task_status: trio.TaskStatus[str]) -> None:
                with serving:
                    async with Server({"endless": endless, "work": trio.sleep}, drain_on_cancel=20) as server:
                        task_status.started(await server.listen("tcp://127.0.0.1:0"))
                        await trio.sleep_forever()

            address = await nursery.start(serve)
            async with rpc(address) as one, rpc(address, limits=hasty) as other:
                calling = trio.CancelScope()

                async def go() -> None:
                    with calling:
                        await one.endless()

                async with trio.open_nursery() as calls:
                    calls.start_soon(go)
                    calls.start_soon(lambda: other.work(seconds=1.2))
                    await trio.sleep(0.1)  # pings let nobody wait until all is quiet
                    serving.cancel()
                    await trio.sleep(0.1)  # pings let nobody wait until all is quiet
                    calling.cancel()
                    with trio.fail_after(5):
                        await cut.wait()

    async def test_a_stream_that_is_cancelled_while_its_request_is_written_gives_its_place_back(self) -> None:
        async def serve() -> None:
            async with ManualPeer(await listener.accept()) as peer:
                await peer.handshake(extension=True)
                await trio.sleep_forever()  # and reads nothing

        with memory_network() as network:
            async with await network.listen_streams() as listener, trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                async with rpc(listener.address) as remote:
                    with trio.CancelScope() as scope:
                        async with trio.open_nursery() as calls:
                            calls.start_soon(remote.take.stream(data=bytes(500_000)).__aenter__)
                            await wait_all_tasks_blocked()
                            assert remote.pool.active == 1
                            scope.cancel()
                    assert (remote.pool.active, remote.pool.open) == (0, 0)
                nursery.cancel_scope.cancel()

    async def test_a_sender_that_waits_for_credit_is_cancelled_at_once(self, autojump_clock: MockClock) -> None:
        async def ignores(comm: Comm) -> None:
            await trio.sleep_forever()

        with memory_network():
            async with Server({"ignores": ignores}, limits=Limits(window=1)) as server:
                remote = rpc(await server.listen("memory://"), limits=Limits(stream_stall=300, ping_interval=None))
                async with remote, remote.ignores.stream() as stream:
                    await stream.send(1)
                    before = trio.current_time()
                    with trio.move_on_after(2):
                        await stream.send(2)
                    assert trio.current_time() - before == 2


async def test_who_waits_for_credit_with_a_limit_is_cancelled_at_once(autojump_clock: MockClock) -> None:
    """The scope that counts the time of a stall stands in nobody's way."""
    ended: list[float] = []

    async def count(comm: Comm) -> None:
        try:
            for n in range(1000):
                await comm.write(n)
        finally:
            ended.append(trio.current_time())

    with memory_network():
        async with Server({"count": count}, limits=Limits(stream_stall=300)) as server:
            address = await server.listen("memory://")
            async with rpc(address) as remote, remote.count.stream():
                await wait_all_tasks_blocked()
                assert not ended
                began = trio.current_time()
                server.stop(0)
                await server.finished()
    assert ended == [began]


async def test_the_pinger_of_a_server_forgets_who_has_gone(autojump_clock: MockClock) -> None:
    """Else it would look as often as the most impatient client that it ever had wanted, and keep its connection."""
    with memory_network():
        async with Server({"add": lambda x: x}) as server:
            address = await server.listen("memory://")
            async with rpc(address, limits=Limits(ping_interval=1)) as remote:
                assert await remote.add(x=1) == 1
                assert len(server._pinger._hasty) == 1
            await wait_all_tasks_blocked()
            assert server.statistics().connections == 0
            assert not server._pinger._hasty
