"""How slow a peer may be inside a message: to the instant over streams in memory, in the same way over sockets."""

from __future__ import annotations

import math
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_dcore import Limits, Server, connect
from trio_dcore.comm import SocketPump, StreamPump, _pace
from trio_dcore.comm._pace import acquire_within, writable_within
from trio_dcore.errors import CommClosedError, LimitExceeded
from trio_dcore.protocol._frames import FrameParser, pack_prelude, single_frame
from trio_dcore.testing import FaultStream, MemoryStream, memory_stream_pair

MiB = 2**20
SMALL = single_frame(b"x" * 1000)
LARGE = b"".join((pack_prelude([b"head", bytes(5 * MiB)]), b"head", bytes(5 * MiB)))


class Reader:
    """Pulls one message over a stream in memory."""

    def __init__(self, timeout: float | None = 30.0, rate: float | None = 1024.0, capacity: int = 2**16) -> None:
        ours, self.other = memory_stream_pair(capacity)
        self.pump = StreamPump(ours)
        self.pump.progress = timeout, rate
        self.parser = FrameParser(Limits(message=None, head=None))
        self.came: Any = None
        self.error: LimitExceeded | None = None
        self.at = -1.0

    async def pull(self) -> None:
        try:
            self.came = await self.pump.pull(self.parser)
        except LimitExceeded as error:
            self.error = error
        self.at = trio.current_time()


async def send_slowly(stream: MemoryStream, data: bytes, size: int, seconds: float) -> None:
    """A piece of ``size`` bytes every so many seconds, until the reader is done with it."""
    for start in range(0, len(data), size):
        await stream.send_all(data[start : start + size])
        await trio.sleep(seconds)


class TestReading:
    async def test_silence_between_messages_is_no_fault(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        r = Reader()
        nursery.start_soon(r.pull)
        await trio.sleep(100_000)
        await r.other.send_all(SMALL)
        await wait_all_tasks_blocked()
        assert r.at == trio.current_time()
        assert r.came == [b"x" * 1000]

    @pytest.mark.parametrize("size", [1, 8, 16, 23, 24, 100, len(SMALL) - 1])
    async def test_silence_inside_one(self, autojump_clock: MockClock, nursery: trio.Nursery, size: int) -> None:
        r = Reader()
        nursery.start_soon(r.pull)
        await trio.sleep(7)
        start = trio.current_time()
        await r.other.send_all(SMALL[:size])
        await trio.sleep(1000)
        assert r.at == start + 30
        assert r.error is not None
        assert (r.error.limit, r.error.value, r.error.seen) == ("progress_timeout", 30, 30)
        assert str(r.error) == "nothing came for 30.0 s in the middle of a message; change it with Limits(progress_timeout=...)"

    async def test_silence_counts_from_the_last_byte(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        r = Reader(rate=None)
        nursery.start_soon(r.pull)
        for n in range(20):
            await r.other.send_all(SMALL[n : n + 1])
            await trio.sleep(29.5)
        last = trio.current_time() - 29.5
        await trio.sleep(1000)
        assert r.at == last + 30

    async def test_one_byte_a_second(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        """Row G04: closed within 31 s."""
        r = Reader()
        nursery.start_soon(r.pull)
        start = trio.current_time()
        nursery.start_soon(send_slowly, r.other, LARGE[:100], 1, 1.0)
        await trio.sleep(1000)
        # The 31st byte has come when time is up.
        assert r.at == pytest.approx(start + 30 + 31 / 1024)
        assert r.error is not None
        assert (r.error.limit, r.error.value) == ("progress_rate", 1024)
        assert r.error.seen == pytest.approx(31 / (30 + 31 / 1024))
        assert "1.03 bytes a second, below the limit of 1024.0; change it with Limits(progress_rate=...)" in str(r.error)

    @pytest.mark.parametrize(("size", "seconds"), [(1024, 0.1), (10_240, 1.0), (29_000, 28.0), (5120, 5.0), (1024, 0.999)])
    async def test_slow_but_steady(self, autojump_clock: MockClock, nursery: trio.Nursery, size: int, seconds: float) -> None:
        r = Reader()
        nursery.start_soon(r.pull)
        first = 150 * size
        await send_slowly(r.other, LARGE[:first], size, seconds)
        assert r.at == -1
        await r.other.send_all(LARGE[first:])
        await wait_all_tasks_blocked()
        assert [len(frame) for frame in r.came] == [4, 5 * MiB]

    async def test_a_rate_just_below(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        """What was received buys time, so a rate that is nearly enough lasts long."""
        r = Reader()
        nursery.start_soon(r.pull)
        start = trio.current_time()
        nursery.start_soon(send_slowly, r.other, LARGE, 1000, 1.0)
        await trio.sleep(10_000)
        assert r.error is not None
        assert r.error.limit == "progress_rate"
        # With its first thousand at once it is in time for 30 seconds.  From there 30 + n * 1000 / 1024 < n + 1 from n = 1238 on,
        # before the next thousand comes.
        assert r.at == pytest.approx(start + 30 + 30 + 1238 * 1000 / 1024)

    @pytest.mark.parametrize("every", [20.0, None])
    async def test_what_came_before_buys_no_time(
        self, autojump_clock: MockClock, nursery: trio.Nursery, every: float | None
    ) -> None:
        """4 MiB at once don't make up for a byte every twenty seconds, for an hour, behind them."""
        r = Reader(capacity=8 * MiB)
        nursery.start_soon(r.pull)
        await trio.sleep(7)
        start = trio.current_time()
        await r.other.send_all(LARGE[: 4 * MiB])
        if every is not None:
            await trio.sleep(every)
            nursery.start_soon(send_slowly, r.other, LARGE[4 * MiB : 4 * MiB + 200], 1, every)
        await trio.sleep(5000)
        assert r.error is not None
        if every is None:
            assert (r.at, r.error.limit) == (start + 30, "progress_timeout")
        else:
            assert r.at == pytest.approx(start + 30 + 1 / 1024)
            assert r.error.limit == "progress_rate"
            assert r.error.seen == pytest.approx(1 / (30 + 1 / 1024))

    async def test_pauses_between_much(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        """Who is in time on the whole may pause for nearly as long as may be, again and again."""
        r = Reader(capacity=8 * MiB)
        nursery.start_soon(r.pull)
        await send_slowly(r.other, LARGE[: 5 * MiB], 32 * 1024, 29.9)
        assert r.at == -1
        await r.other.send_all(LARGE[5 * MiB :])
        await wait_all_tasks_blocked()
        assert [len(frame) for frame in r.came] == [4, 5 * MiB]

    @pytest.mark.parametrize("chunk", [1, 3])
    async def test_a_slicer_at_full_speed(self, autojump_clock: MockClock, nursery: trio.Nursery, chunk: int) -> None:
        r = Reader()
        nursery.start_soon(r.pull)
        sliced = FaultStream(r.other, slicer=chunk)
        with trio.fail_after(1):
            await sliced.send_all(SMALL)
        await wait_all_tasks_blocked()
        assert r.came == [b"x" * 1000]

    async def test_switched_off(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        for timeout, rate in ((None, None), (None, 1024.0)):
            r = Reader(timeout, rate)
            nursery.start_soon(r.pull)
            await r.other.send_all(SMALL[:50])
            await trio.sleep(100_000)
            assert r.at == -1
            await r.other.send_all(SMALL[50:])
            await wait_all_tasks_blocked()
            assert r.came == [b"x" * 1000]

    async def test_the_clock_starts_when_somebody_reads(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        """As with what was read ahead, to see the end of the comm, while a handler ran for hours."""
        r = Reader()
        await r.other.send_all(SMALL[:50])
        assert await r.pump.fill(r.parser)
        await trio.sleep(10_000)
        start = trio.current_time()
        nursery.start_soon(r.pull)
        await trio.sleep(29)
        assert r.at == -1
        await trio.sleep(1000)
        assert r.at == start + 30

    async def test_a_read_that_was_cancelled_starts_anew(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        r = Reader()
        await r.other.send_all(SMALL[:50])
        with trio.move_on_after(29) as scope:
            await r.pump.pull(r.parser)
        assert scope.cancelled_caught
        start = trio.current_time()
        nursery.start_soon(r.pull)
        await trio.sleep(1000)
        assert r.at == start + 30

    async def test_the_end_inside_a_message(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        r = Reader()
        nursery.start_soon(r.pull)
        await r.other.send_all(SMALL[:50])
        await trio.sleep(5)
        r.other.close()
        await wait_all_tasks_blocked()
        assert (r.came, r.error, r.at) == (None, None, trio.current_time())

    async def test_a_program_that_was_busy_itself(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        """Time that went by while nobody looked is not held against a peer that has sent all the while."""
        r = Reader(rate=None)
        nursery.start_soon(r.pull)
        await r.other.send_all(SMALL[:50])
        await wait_all_tasks_blocked()
        autojump_clock.jump(31)
        assert r.other.send_nowait(SMALL[50:60]) == 10  # before the run has looked at the clock again
        await wait_all_tasks_blocked()
        assert r.error is None
        await r.other.send_all(SMALL[60:])
        await wait_all_tasks_blocked()
        assert r.came == [b"x" * 1000]

    async def test_no_scope_for_a_message_that_comes_whole(
        self, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        r = Reader()
        count = 0
        original = _pace.pull_rest

        async def counted(*args: Any) -> Any:
            nonlocal count
            count += 1
            return await original(*args)

        monkeypatch.setattr("trio_dcore.comm._pumps.pull_rest", counted)
        await r.other.send_all(SMALL * 3 + SMALL[:10])
        for _ in range(3):
            assert await r.pump.pull(r.parser) == [b"x" * 1000]
        assert count == 0
        await r.other.send_all(SMALL[10:])
        assert await r.pump.pull(r.parser) == [b"x" * 1000]
        assert count == 1

    @pytest.mark.parametrize("sent", [1, 24, 3 * MiB], ids=["prelude", "head", "in place"])
    async def test_over_a_socket(self, sockets: tuple[socket.socket, socket.socket], sent: int) -> None:
        ours, theirs = sockets
        pump = SocketPump(ours)
        pump.progress = 0.05, 10.0 * MiB
        parser = FrameParser()

        async def send() -> None:
            rest = memoryview(LARGE)[:sent]
            while rest:
                try:
                    rest = rest[theirs.send(rest) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(theirs)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            start = trio.current_time()
            with pytest.raises(LimitExceeded) as caught, trio.fail_after(5):
                await pump.pull(parser)
        assert caught.value.limit == "progress_timeout"
        assert trio.current_time() - start >= 0.05


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def fill_up(sock: socket.socket) -> None:
    try:
        while True:
            sock.send(bytes(MiB))
    except BlockingIOError:
        pass


class TestWritable:
    async def test_at_once(self, sockets: tuple[socket.socket, socket.socket]) -> None:
        await writable_within(sockets[0], 0.001)

    async def test_nothing_is_taken(self, sockets: tuple[socket.socket, socket.socket]) -> None:
        fill_up(sockets[0])
        start = trio.current_time()
        with pytest.raises(trio.TooSlowError):
            await writable_within(sockets[0], 0.05)
        assert trio.current_time() - start >= 0.05

    async def test_it_is(self, sockets: tuple[socket.socket, socket.socket]) -> None:
        fill_up(sockets[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writable_within, sockets[0], 10)
            await wait_all_tasks_blocked(0.01)
            while True:
                try:
                    sockets[1].recv(MiB)
                except BlockingIOError:
                    break

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems don't tell how much is on its way")
    async def test_one_that_takes_little_is_not_stalled(self) -> None:
        """A socket is writable again when a third of its buffer is free; a slow reader needs longer than the limit for that."""
        listener = socket.create_server(("127.0.0.1", 0))
        theirs = socket.socket()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        theirs.connect(listener.getsockname())
        ours, _ = listener.accept()
        with listener, theirs, ours:
            ours.setblocking(False)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**17)
            fill_up(ours)
            await trio.sleep(0.05)
            fill_up(ours)
            limit, took = 0.1, 0.0
            start = trio.current_time()
            async with trio.open_nursery() as nursery:

                async def read_slowly() -> None:
                    while True:
                        theirs.recv(4096)
                        await trio.sleep(0.02)

                nursery.start_soon(read_slowly)
                await writable_within(ours, limit)
                took = trio.current_time() - start
                nursery.cancel_scope.cancel()
            assert took > 2 * limit
            with pytest.raises(trio.TooSlowError):
                fill_up(ours)
                await writable_within(ours, limit)

    async def test_where_the_system_does_not_tell(
        self, sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*args: object) -> bytes:
            raise OSError("no such ioctl")

        fill_up(sockets[0])
        if sys.platform != "win32":
            monkeypatch.setattr(_pace.fcntl, "ioctl", refused)
        with pytest.raises(trio.TooSlowError):
            await writable_within(sockets[0], 0.02)


class TestSending:
    """``Pump.send`` with a limit."""

    async def test_a_stream_that_takes_nothing(self, autojump_clock: MockClock) -> None:
        ours, _theirs = memory_stream_pair(1000)
        pump = StreamPump(ours)
        start = trio.current_time()
        with pytest.raises(trio.TooSlowError):
            await pump.send([bytes(5000)], 0, 60)
        assert trio.current_time() == start + 60
        assert pump.partial

    async def test_one_that_takes_a_piece_in_time(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        ours, theirs = memory_stream_pair(1000)
        pump = StreamPump(ours)

        async def read() -> None:
            while True:
                await trio.sleep(3)
                await theirs.receive_some(1000)

        nursery.start_soon(read)
        await pump.send([bytes(100_000), bytes(100_000)], 10, 60)
        assert trio.current_time() > 500
        assert pump.taken == 199_990
        nursery.cancel_scope.cancel()

    @pytest.mark.parametrize("stall", [None, 60.0])
    async def test_all_of_it_in_order(self, stall: float | None, nursery: trio.Nursery) -> None:
        ours, theirs = memory_stream_pair()
        pump = StreamPump(ours)
        data = bytes(range(256)) * 1000
        found = bytearray()

        async def read() -> None:
            async for chunk in theirs:
                found.extend(chunk)

        nursery.start_soon(read)
        await pump.send([data, b"", data[:5]], 7, stall)
        await pump.aclose()
        await wait_all_tasks_blocked()
        assert bytes(found) == data[7:] + data[:5]

    async def test_a_socket(self, sockets: tuple[socket.socket, socket.socket]) -> None:
        pump = SocketPump(sockets[0])
        with pytest.raises(trio.TooSlowError):
            await pump.send([bytes(10 * MiB)], 0, 0.05)
        assert pump.partial
        assert pump.taken > 0


class TestLock:
    async def test_it_is_free(self) -> None:
        lock = trio.StrictFIFOLock()
        await acquire_within(lock, 1, lambda: 0)
        assert lock.locked()
        lock.release()

    @pytest.mark.parametrize("moving", [True, False])
    async def test_whoever_has_it_makes_progress_or_not(
        self, moving: bool, autojump_clock: MockClock, nursery: trio.Nursery
    ) -> None:
        lock = trio.StrictFIFOLock()
        start = trio.current_time()

        async def hold(task_status: trio.TaskStatus[None]) -> None:
            async with lock:
                task_status.started()
                await trio.sleep(1000)

        await nursery.start(hold)
        if moving:
            await acquire_within(lock, 60, lambda: int(trio.current_time()))
            assert trio.current_time() == start + 1000
            lock.release()
        else:
            with pytest.raises(trio.TooSlowError):
                await acquire_within(lock, 60, lambda: 0)
            assert trio.current_time() == start + 60


class TestComms:
    """What a comm makes of it."""

    KINDS = ("memory", "inproc")

    async def fill(self, comm: Any, stall: str) -> LimitExceeded:
        with pytest.raises(LimitExceeded) as caught:
            while True:
                await comm.put(bytes(10_000), stall=stall)
        return caught.value

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("stall", ["write_stall", "stream_stall"])
    async def test_the_error_names_the_field_and_the_comm_is_closed(
        self, kind: str, stall: str, new_pair: Any, autojump_clock: MockClock
    ) -> None:
        async with new_pair(kind, limits=Limits(write_stall=60, stream_stall=7)) as pair:
            start = trio.current_time()
            error = await self.fill(pair.server, stall)
            seconds = 60 if stall == "write_stall" else 7
            assert trio.current_time() == start + seconds
            assert (error.limit, error.value, error.seen) == (stall, seconds, seconds)
            text = f"{pair.server.peer_address} has taken nothing of what is sent for {seconds} s; change it with Limits({stall}=...)"
            assert str(error) == pair.server.fault == text
            assert pair.server.closed()
            with pytest.raises(CommClosedError):
                await pair.server.write("more")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("operation", ["write", "send", "put"])
    async def test_no_limit(self, kind: str, operation: str, new_pair: Any, autojump_clock: MockClock) -> None:
        """Row H04: a client that sends to a server which reads nothing waits, for as long as it likes."""
        async with new_pair(kind, limits=Limits(write_stall=1, stream_stall=1)) as pair:
            with trio.move_on_after(1000) as scope:
                while True:
                    await getattr(pair.client, operation)(bytes(10_000))
            assert scope.cancelled_caught
            assert not pair.client.fault

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("operation", ["write", "send"])
    async def test_a_handlers_own_writes(self, kind: str, operation: str, new_pair: Any, autojump_clock: MockClock) -> None:
        async with new_pair(kind, limits=Limits(write_stall=1, stream_stall=50)) as pair:
            pair.server.serving = True
            start = trio.current_time()
            with pytest.raises(LimitExceeded) as caught:
                while True:
                    await getattr(pair.server, operation)(bytes(10_000))
            assert caught.value.limit == "stream_stall"
            assert trio.current_time() == start + 50

    @pytest.mark.parametrize("kind", KINDS)
    async def test_a_reader_that_is_slow_but_reads(self, kind: str, new_pair: Any, autojump_clock: MockClock) -> None:
        async with new_pair(kind, capacity=1000, limits=Limits(write_stall=60)) as pair:

            async def read() -> None:
                while True:
                    await trio.sleep(50)
                    await pair.client.read()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                start = trio.current_time()
                for _ in range(40):
                    await pair.server.put(bytes(10_000), stall="write_stall")
                assert trio.current_time() - start > 1000
                nursery.cancel_scope.cancel()

    @pytest.mark.parametrize("kind", KINDS)
    async def test_a_reply_behind_a_write_without_a_limit(
        self, kind: str, new_pair: Any, autojump_clock: MockClock, nursery: trio.Nursery
    ) -> None:
        """A task that a handler has left behind writes for ever; the reply waits no longer for that than for the peer."""
        async with new_pair(kind, limits=Limits(write_stall=60)) as pair:
            told: list[type[BaseException]] = []

            async def left_behind() -> None:
                try:
                    while True:
                        await pair.server.put(bytes(100_000))
                except (CommClosedError, trio.ClosedResourceError) as error:
                    told.append(type(error))

            nursery.start_soon(left_behind)
            await wait_all_tasks_blocked()
            start = trio.current_time()
            with pytest.raises(LimitExceeded) as caught:
                await pair.server.put("reply", stall="write_stall")
            assert caught.value.limit == "write_stall"
            assert trio.current_time() == start + 60
            await wait_all_tasks_blocked()
            assert len(told) == 1

    async def test_what_is_owed(self, new_pair: Any, autojump_clock: MockClock) -> None:
        """A server doesn't hold a connection for ever on which only a goodbye or a pong waits; a client does, unless told otherwise."""
        for serving, limits in (
            (True, Limits(write_stall=60)),
            (False, Limits(write_stall=60)),
            (False, Limits(stream_stall=60)),
        ):
            async with new_pair("memory", capacity=1000, limits=limits) as pair:
                pair.server.serving = serving
                while pair.server.write_soon("x" * 40) and not pair.server._owed:
                    pass
                await trio.sleep(59)
                assert not pair.server.closed()
                await trio.sleep(2)
                assert pair.server.closed() == bool(pair.server.fault) == (serving or limits.stream_stall is not None)

    async def test_a_handshake(self, over_stream: Any, autojump_clock: MockClock) -> None:
        ours, _theirs = memory_stream_pair(10)
        comm = over_stream(ours, limits=Limits(write_stall=5))
        start = trio.current_time()
        with pytest.raises(LimitExceeded, match=r"Limits\(write_stall=...\)"):
            await comm.handshake()
        assert trio.current_time() == start + 5

    @pytest.mark.parametrize("operation", ["read", "receive"])
    async def test_a_slow_message(self, operation: str, new_pair: Any, autojump_clock: MockClock) -> None:
        async with new_pair("memory", limits=Limits(progress_timeout=3, progress_rate=100)) as pair:
            await pair.server._pump.send([SMALL[:70]], 0)
            start = trio.current_time()
            with pytest.raises(LimitExceeded) as caught:
                await getattr(pair.client, operation)()
            assert trio.current_time() == start + 3
            assert caught.value.limit == "progress_timeout"
            assert pair.client.fault == str(caught.value)
            with pytest.raises(CommClosedError, match="progress_timeout"):
                await pair.client.read()

    async def test_nobody_reads_it_so_nobody_minds(self, new_pair: Any, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        """The watch for the end reads ahead, for as long as a handler runs."""
        async with new_pair("stream", limits=Limits(progress_timeout=3)) as pair:
            ends: list[None] = []
            pair.server.watch_end(nursery, lambda: ends.append(None))
            data = single_frame(b"\xa5whole")
            await pair.client._pump.send([data[:9]], 0)
            await trio.sleep(1000)
            assert (pair.server.closed(), ends) == (False, [])
            nursery.start_soon(self.finish_later, pair.client, data[9:])
            assert await pair.server.read() == "whole"
            pair.server.unwatch_end()

    async def finish_later(self, comm: Any, data: bytes) -> None:
        await trio.sleep(2.9)
        await comm._pump.send([data], 0)

    async def test_heard(self, over_stream: Any) -> None:
        """What was read and is not enough doesn't count."""
        ours, theirs = memory_stream_pair()
        comm = over_stream(ours)
        assert not comm.heard
        for _ in range(2):
            await theirs.send_all(b"x")
            assert comm.heard
            assert await comm.wait_incoming()
            assert not comm.heard
        comm.abort()
        quiet, other = memory_stream_pair()
        comm = over_stream(quiet)
        other.close()
        assert comm.heard  # the end is something as well
        comm.abort()
        assert not comm.heard

    @pytest.mark.parametrize("limits", [Limits(), Limits(progress_timeout=None)])
    async def test_since_when_the_rest_is_waited_for(
        self, limits: Limits, new_pair: Any, autojump_clock: MockClock, nursery: trio.Nursery
    ) -> None:
        async with new_pair("memory", limits=limits) as pair:
            server, send = pair.server, pair.client._pump.send
            data = single_frame(b"\xa5whole")

            async def read_all() -> None:
                while True:
                    await server.read()

            nursery.start_soon(read_all)
            for _ in range(2):
                await trio.sleep(100)
                assert server.rest_since == math.inf
                start = trio.current_time()
                for piece in (data[:9], data[9:20]):
                    await send([piece], 0)
                    await trio.sleep(5)
                    assert server.rest_since == start
                await send([data[20:]], 0)
            await wait_all_tasks_blocked()
            assert server.rest_since == math.inf
            nursery.cancel_scope.cancel()


class Told:
    """A socket whose system says this of its connection."""

    def __init__(self, *, retransmits: int = 0, probes: int = 0, unacked: int = 0, last_ack: int = 0) -> None:
        self.info = struct.pack(
            "=8B13I", 1, 0, retransmits, probes, 0, 0, 0, 0, 0, 0, 0, 0, unacked, 0, 0, 0, 0, 0, 0, 0, last_ack
        )

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option, size) == (socket.IPPROTO_TCP, socket.TCP_INFO, len(self.info))
        return self.info


@pytest.mark.skipif(not _pace.HAS_TCP_INFO, reason="Linux has it")
class TestSignsOfLife:
    @pytest.mark.parametrize(
        ("told", "gone"),
        [
            ({"probes": 2, "last_ack": 30_000}, True),
            ({"retransmits": 2, "unacked": 1, "last_ack": 30_000}, True),
            ({"probes": 2, "last_ack": 29_999}, False),  # not for long enough
            ({"probes": 1, "last_ack": 10**6}, False),  # one may be lost
            ({"retransmits": 2, "unacked": 0, "last_ack": 10**6}, False),  # they have been answered
            ({"retransmits": 1, "unacked": 9, "last_ack": 10**6}, False),
            ({"last_ack": 10**6}, False),  # a closed window, whose probes come rarely and are answered
        ],
    )
    def test_what_the_system_tells(self, told: dict[str, int], gone: bool) -> None:
        assert _pace.gone(Told(**told), 30.0) is gone  # type: ignore[arg-type]

    def test_what_is_no_tcp_socket(self) -> None:
        for end in (ends := socket.socketpair()):
            assert _pace.gone(end, 0.0) is False
        for end in ends:
            end.close()
        assert _pace.gone(ends[0], 0.0) is False  # closed meanwhile

    async def test_who_does_not_read_is_alive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Real sockets: the window stays closed while the writer looks five times, and then all of it arrives."""
        writer, reader = tcp_pair()
        looks: list[bool] = []
        enough = trio.Event()
        real = _pace.gone

        def look(sock: socket.socket, silence: float) -> bool:
            looks.append(real(sock, silence))
            if len(looks) == 5:
                enough.set()
            return looks[-1]

        monkeypatch.setattr(_pace, "gone", look)
        pump = SocketPump(writer)
        pump.silence = 0.1
        data = bytes(16 * MiB)
        got = 0
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump.send, [data], 0)
                await enough.wait()
                while got < len(data):
                    await trio.lowlevel.wait_readable(reader)
                    got += len(reader.recv(2**20))
        assert not any(looks)
        writer.close()
        reader.close()

    async def test_who_has_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        writer, reader = tcp_pair()
        answers = [False, True]
        monkeypatch.setattr(_pace, "gone", lambda sock, silence: answers.pop(0))
        pump = SocketPump(writer)
        pump.silence = 0.02
        with trio.fail_after(30):
            with pytest.raises(TimeoutError, match=r"acknowledged nothing for 0\.02 s.*tcp_user_timeout"):
                await pump.send([bytes(64 * MiB)], 0)
        assert not answers
        assert pump.partial
        writer.close()
        reader.close()

    async def test_who_looks(self) -> None:
        """Both ends of a connection between trio_dcore peers, and neither where it was turned off."""
        for limits, silence in ((Limits(), 30.0), (Limits(tcp_user_timeout=None), None)):
            async with Server({}, limits=limits) as server:
                comm: Any = await connect(await server.listen("tcp://127.0.0.1:0"), limits=limits)
                assert comm._pump.silence == silence
                await comm.write({"op": "echo", "data": 1})
                assert await comm.read() == 1
                (other,) = (connection.comm for connection in server._connections)
                assert other._pump.silence == silence  # type: ignore[attr-defined]
                await comm.aclose()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    for end in (one, other):
        end.setblocking(False)
    return one, other
