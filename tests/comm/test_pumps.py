"""Pumps: bytes in and out of sockets and streams."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore.comm import SocketPump, StreamPump, _pumps
from trio_dcore.protocol._frames import FrameParser, pack_prelude
from trio_dcore.protocol._limits import Limits, MiB
from trio_dcore.testing import memory_stream_pair

PATIENCE = 10.0
OFF = Limits(message=None, head=None, frames=None)


def message(*frames: bytes) -> bytes:
    return b"".join((pack_prelude(frames), *frames))


@pytest.fixture
def sockets() -> Iterator[tuple[SocketPump, socket.socket]]:
    """A pump and the other end of its socket, which does not block either."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    pump = SocketPump(ours)
    yield pump, theirs
    ours.close()
    theirs.close()


async def receive_exactly(sock: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        try:
            data = sock.recv(size - len(found))
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        if not data:
            break
        found += data
    return bytes(found)


class Recorded:
    """A socket that notes how it is used, and takes or gives a little at a time if told to."""

    def __init__(self, sock: socket.socket, most: int | None = None) -> None:
        self._socket = sock
        self._most = most
        self.calls: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def send(self, data: Any) -> int:
        self.calls.append(("send", len(data)))
        return self._socket.send(data[: self._most])

    def sendmsg(self, buffers: Any) -> int:
        self.calls.append(("sendmsg", len(buffers)))
        if self._most is None:
            return self._socket.sendmsg(buffers)
        return self._socket.send(b"".join(buffers)[: self._most])

    def recv(self, size: int, *flags: int) -> bytes:
        self.calls.append(("recv", size))
        return self._socket.recv(size, *flags)

    def recv_into(self, target: Any, size: int) -> int:
        self.calls.append(("recv_into", size))
        return self._socket.recv_into(target, size)


class TestSocketReading:
    @pytest.mark.parametrize("how", ["fill", "pull"])
    async def test_a_message(self, sockets: tuple[SocketPump, socket.socket], how: str) -> None:
        pump, other = sockets
        parser = FrameParser()
        for data in (message(b"one"), message(b"two"), message(b"head", b"x" * 30_000)):
            other.send(data)
            if how == "pull":
                found = await pump.pull(parser)
            else:
                while (found := parser.next_message()) is None:
                    assert await pump.fill(parser)
            assert found is not None
            assert message(*map(bytes, found)) == data

    async def test_several_messages_at_once(self, sockets: tuple[SocketPump, socket.socket]) -> None:
        pump, other = sockets
        parser = FrameParser()
        other.send(message(b"one") + message(b"two", b"payload") + message(b"three")[:-1])
        assert await pump.pull(parser) == [b"one"]
        assert await pump.pull(parser) == [b"two", b"payload"]
        other.send(message(b"three")[-1:])
        assert await pump.pull(parser) == [b"three"]

    async def test_the_end(self, sockets: tuple[SocketPump, socket.socket]) -> None:
        pump, other = sockets
        parser = FrameParser()
        other.send(message(b"one") + message(b"two")[:5])
        other.close()
        assert await pump.pull(parser) == [b"one"]
        for _ in range(2):
            assert await pump.pull(parser) is None
            assert not await pump.fill(parser)
        assert parser.mid_message

    async def test_it_waits_and_may_be_cancelled(self, sockets: tuple[SocketPump, socket.socket]) -> None:
        pump, other = sockets
        parser = FrameParser()
        other.send(message(b"message")[:10])
        with trio.move_on_after(0.02) as scope:
            await pump.pull(parser)
        assert scope.cancelled_caught
        assert parser.buffered == 10
        other.send(message(b"message")[10:])
        assert await pump.pull(parser) == [b"message"]

    async def test_it_reads_more_at_once_while_there_is_more(self) -> None:
        ours, theirs = socket.socketpair()
        recorded = Recorded(ours)
        pump = SocketPump(recorded)  # type: ignore[arg-type]
        parser = FrameParser()
        theirs.send(message(b"x" * 10_000))
        await pump.pull(parser)
        theirs.send(message(b"x"))
        await pump.pull(parser)
        assert recorded.calls == [("recv", 4096), ("recv", 65536), ("recv", 4096)]
        pump.abort()
        theirs.close()

    async def test_a_large_frame_is_read_into_its_place(self) -> None:
        ours, theirs = socket.socketpair()
        recorded = Recorded(ours)
        pump = SocketPump(recorded)  # type: ignore[arg-type]
        sender = SocketPump(theirs)
        parser = FrameParser(OFF)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.send, [message(b"head", b"x" * 10 * MiB)], 0)
            found = await pump.pull(parser)
        assert found is not None
        assert found[1] == b"x" * 10 * MiB
        kinds = [kind for kind, _ in recorded.calls]
        # Not a byte of it in between, but for what came with the prelude and the last of it.
        assert kinds.count("recv") <= 2
        assert max(size for kind, size in recorded.calls if kind == "recv_into") == 4 * MiB
        pump.abort()
        sender.abort()

    async def test_fill_nowait(self, sockets: tuple[SocketPump, socket.socket]) -> None:
        pump, other = sockets
        parser = FrameParser(OFF)
        assert not pump.fill_nowait(parser)
        other.send(message(b"x"))
        assert pump.fill_nowait(parser)
        assert parser.next_message() == [b"x"]
        other.send(message(b"head", bytes(100_000))[:1000])
        assert pump.fill_nowait(parser)
        assert parser.next_message() is None
        other.send(bytes(50_000))
        assert pump.fill_nowait(parser)
        assert parser.received == 51_000
        other.close()
        assert not pump.fill_nowait(parser)

    async def test_a_false_alarm(self, sockets: tuple[SocketPump, socket.socket]) -> None:
        """Whatever says that there is something to read may be wrong; nobody else is kept from running by that."""
        pump, other = sockets
        pump._ready = lambda timeout: [("fd", "event")]
        parser = FrameParser()
        with trio.move_on_after(0.02) as scope:
            await pump.pull(parser)
        assert scope.cancelled_caught
        other.send(message(b"x"))
        assert await pump.pull(parser) == [b"x"]

    @pytest.mark.parametrize("poll", [True, False])
    async def test_readable(self, poll: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not poll:  # as on Windows
            monkeypatch.delattr(_pumps.select, "poll", raising=False)
        ours, other = socket.socketpair()
        pump = SocketPump(ours)
        assert not pump.readable()
        other.send(b"x")
        assert pump.readable()
        assert pump.readable()
        assert pump.socket.recv(5) == b"x"
        other.close()
        assert pump.readable()
        parser = FrameParser()
        assert await pump.pull(parser) is None
        pump.abort()
        if not poll:
            assert pump.readable()  # not fit for use, whatever it is

    async def test_systems_without_poll(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(_pumps.select, "poll", raising=False)
        ours, other = socket.socketpair()
        pump = SocketPump(ours)
        parser = FrameParser()
        async with trio.open_nursery() as nursery:

            async def late() -> None:
                await trio.testing.wait_all_tasks_blocked()
                other.send(message(b"late"))

            nursery.start_soon(late)
            assert await pump.pull(parser) == [b"late"]
        other.send(message(b"x"))
        assert await pump.pull(parser) == [b"x"]
        pump.abort()
        other.close()


class TestSocketWriting:
    async def test_what_the_kernel_takes(self, sockets: tuple[SocketPump, socket.socket]) -> None:
        pump, other = sockets
        assert pump.try_send(b"x" * 100) == 100
        while pump.try_send(b"x" * 100_000):
            pass
        assert pump.try_send(b"y") == 0
        other.close()
        with pytest.raises(OSError, match=r"Broken pipe|reset") as caught:
            pump.try_send(b"y")
        assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET)

    @pytest.mark.parametrize("sizes", [[5], [0, 5, 0], [300_000], [10, 300_000, 0, 20, 100_000], [1000] * 1500, [1] * 600])
    @pytest.mark.parametrize("most", [None, 7_000, 999])
    @pytest.mark.parametrize("vectors", [True, False])
    async def test_all_of_it_in_order(self, sizes: list[int], most: int | None, vectors: bool, monkeypatch: Any) -> None:
        monkeypatch.setattr(_pumps, "_VECTORS", vectors)
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        recorded = Recorded(ours, most)
        pump = SocketPump(recorded)  # type: ignore[arg-type]
        buffers = [bytes([n % 251]) * size for n, size in enumerate(sizes)]
        skip = min(3, sizes[0])
        found = b""

        async def receive() -> None:
            nonlocal found
            found = await receive_exactly(theirs, sum(sizes) - skip)

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await pump.send(buffers, skip)
        assert found == b"".join(buffers)[skip:]
        assert pump.partial
        if vectors:
            assert max([count for kind, count in recorded.calls if kind == "sendmsg"], default=0) <= 256
        else:
            assert {kind for kind, _ in recorded.calls} == {"send"}
        pump.abort()
        theirs.close()

    async def test_no_call_takes_more_than_a_system_may(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        recorded = Recorded(ours)
        pump = SocketPump(recorded)  # type: ignore[arg-type]
        buffers = [bytes(9 * MiB), b"x", bytes(5 * MiB), b"y"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_exactly, theirs, 14 * MiB + 2)
            await pump.send(buffers, 0)
        assert max(size for kind, size in recorded.calls if kind == "send") == 4 * MiB
        pump.abort()
        theirs.close()

    async def test_cancelled_before_and_after_the_first_byte(self, sockets: tuple[SocketPump, socket.socket]) -> None:
        pump, _ = sockets
        with trio.move_on_after(0.02) as scope:
            await pump.send([bytes(8 * MiB)], 0)
        assert scope.cancelled_caught
        assert pump.partial
        with trio.move_on_after(0.02) as scope:
            await pump.send([b"x"], 0)
        assert scope.cancelled_caught
        assert not pump.partial
        with trio.move_on_after(0.02) as scope:
            await pump.send([b"xyz"], 1)
        assert pump.partial

    async def test_a_memoryview_of_part_of_something(self, sockets: tuple[SocketPump, socket.socket]) -> None:
        pump, other = sockets
        whole = bytearray(b"0123456789")
        await pump.send([memoryview(whole)[2:5], memoryview(whole)[7:]], 1)
        assert other.recv(100) == b"34789"


class TestSocketClosing:
    async def test_abort_wakes_who_waits(self, sockets: tuple[SocketPump, socket.socket]) -> None:
        pump, _ = sockets

        async def reader() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await pump.fill(FrameParser())

        async def writer() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await pump.send([bytes(8 * MiB)], 0)

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                nursery.start_soon(writer)
                await trio.testing.wait_all_tasks_blocked(0.01)
                pump.abort()
                pump.abort()
        assert pump.fileno() == -1

    async def test_the_peer_is_told_although_a_copy_of_the_descriptor_lives(
        self, sockets: tuple[SocketPump, socket.socket]
    ) -> None:
        """After a fork a child has one."""
        pump, other = sockets
        copy = pump.socket.dup()
        pump.abort()
        assert await receive_exactly(other, 1) == b""
        copy.close()

    async def test_aclose_is_a_checkpoint_that_always_closes(self, sockets: tuple[SocketPump, socket.socket]) -> None:
        pump, _ = sockets
        with trio.CancelScope() as scope:
            scope.cancel()
            await pump.aclose()
        assert pump.fileno() == -1

    def test_after_the_run(self) -> None:
        """Nobody waits for the socket then, and it is to be closed all the same."""
        ours, theirs = socket.socketpair()
        SocketPump(ours).abort()
        assert ours.fileno() == -1
        assert theirs.recv(1) == b""
        theirs.close()

    async def test_a_peer_that_never_stops_sending_does_not_keep_us(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)

        class Endless(Recorded):
            def recv(self, size: int, *flags: int) -> bytes:
                self.calls.append(("recv", size))
                return b"x" * size

        recorded = Endless(ours)
        pump = SocketPump(recorded)  # type: ignore[arg-type]
        theirs.send(b"x")
        await pump.aclose()
        assert len(recorded.calls) == 16
        theirs.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has it")
class TestUserTimeout:
    @pytest.mark.parametrize(
        ("seconds", "expected"), [(30.0, 30_000), (0.5, 500), (1e-9, 1), (1e12, 2**31 - 1), (float("inf"), 2**31 - 1)]
    )
    @pytest.mark.parametrize("kind", ["socket", "stream"])
    async def test_in_milliseconds(self, kind: str, seconds: float, expected: int) -> None:
        sock = socket.socket()
        if kind == "socket":
            pump: SocketPump | StreamPump = SocketPump(sock)
        else:
            sock.setblocking(False)
            pump = StreamPump(trio.SocketStream.__new__(trio.SocketStream))
            pump.stream.socket = trio.socket.from_stdlib_socket(sock)  # type: ignore[attr-defined]
        pump.set_user_timeout(seconds)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == expected
        sock.close()

    async def test_other_sockets_have_none(self, sockets: tuple[SocketPump, socket.socket]) -> None:
        pump, _ = sockets
        pump.set_user_timeout(30)

    async def test_nor_have_streams_without_a_socket(self) -> None:
        pump = StreamPump(trio.testing.memory_stream_pair()[0])
        pump.set_user_timeout(30)
        assert pump.fileno() is None


class Odd(trio.abc.Stream):
    """A stream of a user's, with nothing but what trio asks for."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.closed = 0
        self.failure = failure

    async def send_all(self, data: Any) -> None:
        raise NotImplementedError

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        await trio.lowlevel.checkpoint()
        return bytearray(message(b"x"))

    async def aclose(self) -> None:
        self.closed += 1
        if self.failure is not None:
            raise self.failure
        await trio.lowlevel.checkpoint()


class OddWithClose(Odd):
    """Whose ``close`` is not what it is elsewhere."""

    async def close(self) -> None:
        raise NotImplementedError


class TestStreamPump:
    async def test_what_is_sent_arrives(self) -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        pump, other = StreamPump(ours), StreamPump(theirs)
        parser = FrameParser()
        await pump.send([b"??" + message(b"head", b"y" * 100_000)[:50], message(b"head", b"y" * 100_000)[50:]], 2)
        assert await other.pull(parser) == [b"head", b"y" * 100_000]
        pump.abort()
        assert await other.pull(parser) is None
        other.abort()

    async def test_bytearrays_become_bytes(self) -> None:
        parser = FrameParser()
        found = await StreamPump(Odd()).pull(parser)
        assert found == [b"x"]
        assert type(found[0]) is bytes

    async def test_without_more_than_trio_asks_for(self) -> None:
        pump = StreamPump(Odd())
        assert pump.try_send(b"x") == 0
        assert not pump.readable()
        assert not pump.fill_nowait(FrameParser())

    async def test_with_more(self) -> None:
        ours, theirs = memory_stream_pair(100)
        pump, other = StreamPump(ours), StreamPump(theirs)
        parser = FrameParser()
        assert not other.readable()
        assert pump.try_send(message(b"x" * 20)) == 44
        assert pump.try_send(b"z" * 100) == 56
        assert other.readable()
        assert other.readable()
        assert other.fill_nowait(parser)
        assert not other.fill_nowait(parser)
        assert parser.next_message() == [b"x" * 20]
        # What was looked at is read next.
        assert pump.try_send(b"more") == 4
        assert other.readable()
        assert pump.try_send(b"?") == 1
        before = parser.total
        assert await other.fill(parser)
        assert parser.total - before == 4
        pump.abort()
        assert other.readable()
        assert other.fill_nowait(parser)  # the last byte
        assert other.readable()
        assert not other.fill_nowait(parser)  # the end
        assert not await other.fill(parser)
        other.abort()
        assert other.readable()
        with pytest.raises(ConnectionError):
            other.try_send(b"x")

    async def test_a_peer_that_has_gone(self) -> None:
        ours, theirs = memory_stream_pair()
        pump = StreamPump(ours)
        theirs.close()
        with pytest.raises(ConnectionError):
            pump.try_send(b"x")
        pump.abort()

    async def test_of_a_socket(self) -> None:
        ours, theirs = trio.socket.socketpair()
        pump = StreamPump(trio.SocketStream(ours))
        assert pump.fileno() == ours.fileno()
        copy = ours.dup()
        pump.abort()
        pump.abort()
        # Although a copy of the descriptor lives.
        assert await theirs.recv(1) == b""
        copy.close()
        theirs.close()
        other = trio.SocketStream((await _tcp_pair())[0])
        other.socket.close()
        StreamPump(other).abort()

    async def test_of_tls(self) -> None:
        ours, theirs = trio.socket.socketpair()
        stream = trio.SSLStream(trio.SocketStream(ours), ssl.create_default_context(), server_hostname="x")
        pump = StreamPump(stream)
        assert pump.fileno() == ours.fileno()
        pump.abort()
        assert ours.fileno() == -1
        theirs.close()

    async def test_of_two_halves(self) -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        pump = StreamPump(ours)
        pump.abort()
        assert await theirs.receive_some() == b""
        with pytest.raises(trio.ClosedResourceError):
            await ours.receive_some()

    @pytest.mark.parametrize("cls", [Odd, OddWithClose])
    async def test_a_stream_that_closes_only_with_await(self, cls: type[Odd]) -> None:
        stream = cls()
        pump = StreamPump(stream)
        pump.abort()
        pump.abort()
        await trio.testing.wait_all_tasks_blocked()
        assert stream.closed == 1

    async def test_one_that_fails_at_it(self, caplog: pytest.LogCaptureFixture) -> None:
        stream = Odd(RuntimeError("can't close"))
        with caplog.at_level(logging.ERROR, "trio_dcore.comm"):
            StreamPump(stream).abort()
            await trio.testing.wait_all_tasks_blocked()
        assert "can't close" in caplog.text

    async def test_aclose_closes_also_when_cancelled(self) -> None:
        stream = Odd()
        pump = StreamPump(stream)
        with trio.CancelScope() as scope:
            scope.cancel()
            await pump.aclose()
        assert scope.cancelled_caught
        pump.abort()
        await trio.testing.wait_all_tasks_blocked()
        assert stream.closed == 1

    async def test_abort_cuts_a_close_short(self) -> None:
        class Slow(Odd):
            cut = False

            async def aclose(self) -> None:
                await trio.sleep_forever()

            def close(self) -> None:
                self.cut = True

        stream = Slow()
        pump = StreamPump(stream)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.aclose)
            await trio.testing.wait_all_tasks_blocked()
            pump.abort()
            assert stream.cut
            nursery.cancel_scope.cancel()


async def _tcp_pair() -> tuple[trio.socket.SocketType, trio.socket.SocketType]:
    ours, theirs = trio.socket.socketpair()
    theirs.close()
    return ours, theirs


def test_the_weight_of_a_message() -> None:
    """16 small messages or 64 KiB (architecture document, section 3.2)."""
    assert _pumps.YIELD_BYTES == 2**16
    assert _pumps.MESSAGE_WEIGHT * 16 == _pumps.YIELD_BYTES
