"""Pumps: bytes between a parser and the operating system, or any :class:`trio.abc.Stream`.

A comm drives one pump.  :class:`SocketPump` works on a bare non-blocking socket with nothing but trio's public
``wait_readable`` and ``wait_writable``: it waits only when the kernel says so, which saves the two checkpoints a round trip that
``trio.SocketStream`` spends.  :class:`StreamPump` serves everything else.
"""

from __future__ import annotations

import inspect
import logging
import math
import select
import socket
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import trio
from trio.lowlevel import cancel_shielded_checkpoint, wait_readable

from ..protocol._context import Buffer
from ..protocol._frames import FrameParser
from ..protocol._limits import KiB, MiB
from ._pace import pull_rest, untaken, writable_while_alive, writable_within

_log = logging.getLogger("trio_dcore.comm")

__all__ = ["Pump", "SocketPump", "StreamPump"]

# struct linger: on, and no time for it.
_RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
# Milliseconds, in a C int.
_LONGEST = 2**31 - 1
# A small first read is measurably cheaper than a large one: CPython allocates the whole buffer and then shrinks it.
_SMALL_READ = 4 * KiB
_LARGE_READ = 64 * KiB
# Reads and writes that need no wait let other tasks run after this many bytes, and every message counts for some more than it
# has: that makes 16 small messages or 64 KiB, as the architecture document promises (section 3.2).
YIELD_BYTES = 64 * KiB
MESSAGE_WEIGHT = YIELD_BYTES // 16
# One call never takes more than this, so that other tasks are not held up while the kernel copies.
_MOST_AT_ONCE = 4 * MiB
# Reads of what came unread before a close; a peer that goes on sending gets its reset.
_DISCARDS = 16
_MOST_BUFFERS = 256  # below every system's IOV_MAX; of less than _MOST_AT_ONCE each, so that no system's int overflows
# A stream that isn't a socket gets pieces of this size: one that takes none of them for the time of a stall is stalled.  It is a record
# of TLS, and at the default of 60 s a quarter of the rate that is asked of senders.
_PIECE = 16 * KiB
_VECTORS = hasattr(socket.socket, "sendmsg")  # Windows has none


class Pump(ABC):
    """The byte side of a comm.  One task fills and one sends at a time; the comm sees to that.

    Attributes:
        unwaited: bytes read and written since this pump last waited, and so let other tasks run, with ``MESSAGE_WEIGHT`` for each
            message; the pump counts what it reads, the comm the rest.
        partial: whether the last :meth:`send` got part of its bytes out before it failed.
        progress: ``Limits.progress_timeout`` and ``progress_rate``, which :meth:`pull` sees to inside a message.  Without the first
            there is no second.
        rest_since: since when :meth:`pull` waits for the rest of a message of which a part has come; ``math.inf`` if it doesn't.
        silence: seconds that :meth:`send` goes on without a sign of life from the peer's system, where it has no other limit; None is
            for ever.
        taken: bytes that :meth:`send` got out since the start; for those who wait behind it.
    """

    __slots__ = ("partial", "progress", "rest_since", "silence", "taken", "unwaited")

    partial: bool
    progress: tuple[float | None, float | None]
    rest_since: float
    silence: float | None
    taken: int
    unwaited: int

    def __init__(self) -> None:
        self.unwaited = self.taken = 0
        self.partial = False
        self.progress = None, None
        self.rest_since = math.inf
        self.silence = None

    async def pull(self, parser: FrameParser) -> list[Buffer] | None:
        """Wait for a whole message and return its frames; None at the end of the stream.

        Cancellation: nothing is lost; what had come is in the parser.

        Raises:
            LimitExceeded: part of it has come, and the rest comes more slowly than ``progress`` says.
        """
        while (frames := parser.next_message()) is None:
            if parser.mid_message:
                timeout, rate = self.progress
                self.rest_since = trio.current_time()
                try:
                    return await pull_rest(self.fill, parser, math.inf if timeout is None else timeout, timeout and rate)
                finally:
                    self.rest_since = math.inf
            if not await self.fill(parser):
                return None
        return frames

    @abstractmethod
    async def fill(self, parser: FrameParser) -> bool:
        """Wait for bytes and give them to the parser; False at the end of the stream.

        Cancellation: nothing is lost; what had come is in the parser.
        """

    @property
    def sends_at_once(self) -> bool:
        """Whether :meth:`try_send` sends anything at all."""
        return True

    @abstractmethod
    def try_send(self, data: bytes) -> int:
        """Send what can be sent without waiting and return its size, maybe 0.  Not a checkpoint."""

    @abstractmethod
    async def send(self, buffers: Sequence[Buffer], skip: int, stall: float | None = None) -> None:
        """Send the buffers but for the first ``skip`` bytes of the first of them.

        Args:
            buffers: what to send.
            skip: bytes that have been sent already.
            stall: seconds for which the peer may take nothing; None is for ever.

        Cancellation: some bytes may have gone (see ``partial``), and then the stream is of no use any more.

        Raises:
            trio.TooSlowError: nothing was taken for that time; likewise.
        """

    @abstractmethod
    def readable(self) -> bool:
        """Whether bytes or the end of the stream could be read now, as far as that can be told without waiting."""

    #: Whether :meth:`aclose` only lets other tasks run, and never waits for the peer nor fails.
    closes_at_once: ClassVar[bool] = False

    @property
    def heard(self) -> bool:
        """See ``BaseComm.heard``."""
        return self.readable()

    @abstractmethod
    def fill_nowait(self, parser: FrameParser) -> bool:
        """Give the parser what can be read without waiting; False if that is nothing, or the end."""

    def untaken(self) -> int:
        """Bytes that the system has taken and the peer's has not, as far as it tells."""
        return 0

    @abstractmethod
    def fileno(self) -> int | None:
        """The socket's descriptor, or None if there is none."""

    @abstractmethod
    def set_user_timeout(self, seconds: float) -> None:
        """Have the system end the connection when what was sent stays unacknowledged for so long, if it can."""

    @abstractmethod
    def abort(self, *, reset: bool = False) -> None:
        """Close at once.  Does nothing the second time.

        Args:
            reset: where the peer has not taken all that was sent, drop that, and tell it by a reset if there is such a thing.  Else
                it learns of the end behind what it has not read, and if it reads nothing, never.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close; the peer reads all that was sent and then the end.  Closes also when cancelled."""

    async def close_within(self, seconds: float) -> None:
        """Close: politely, which may involve the peer (it does with TLS), for so many seconds, and then anyway."""
        if self.closes_at_once:
            await self.aclose()
            return
        try:
            with trio.move_on_after(seconds):
                await self.aclose()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer was gone already: closed is closed
        finally:
            self.abort()


class SocketPump(Pump):
    """A pump on a bare, connected, non-blocking stream socket, which it owns."""

    __slots__ = ("_ready", "_recv", "_send", "_size", "socket")

    closes_at_once = True

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        sock.setblocking(False)
        self.socket: socket.socket = sock
        self._recv = sock.recv
        self._send = sock.send
        self._size = _SMALL_READ
        # Whether there is something to read, or an error or hang-up to be told of, costs a quarter of a recv that fails, most of
        # which is its exception.
        self._ready: Callable[[int], object] = self._peek
        if hasattr(select, "poll"):  # not on Windows
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            self._ready = poll.poll

    async def pull(self, parser: FrameParser) -> list[Buffer] | None:
        # The path of a small message: one call that may wait, and one that parses.
        if parser.mid_message:
            return await super().pull(parser)
        ready = self._ready(0)
        while True:
            if not ready:
                self.unwaited = 0
                await wait_readable(self.socket)
            try:
                data = self._recv(self._size)
            except BlockingIOError:
                ready = False  # a false alarm; to ask again at once could go on for ever
                continue
            size = len(data)
            # A full buffer means that more is waiting: read more at once next time.
            self._size = _LARGE_READ if size == self._size else _SMALL_READ
            self.unwaited += size  # whoever takes the message yields where that is due
            frames = parser.receive(data)
            if frames is not None or not data:
                return frames
            if self._size == _LARGE_READ and parser.want() is None:
                # The rest of a message of some size is here, nearly always: then there is nothing to put a scope round.
                before = parser.total
                self.fill_nowait(parser)
                size = parser.total - before
                self._size = _LARGE_READ if size == _LARGE_READ else _SMALL_READ
                self.unwaited += size
            return await super().pull(parser)

    async def fill(self, parser: FrameParser) -> bool:
        target = parser.want()
        while True:
            try:
                if target is None:
                    data = self._recv(self._size)
                    received = len(data)
                    parser.feed(data)
                    # A full buffer means that more is waiting: read more at once next time.
                    self._size = _LARGE_READ if received == self._size else _SMALL_READ
                else:
                    received = self.socket.recv_into(target, min(len(target), _MOST_AT_ONCE))
                    parser.filled(received)
                break
            except BlockingIOError:
                self.unwaited = 0
                await wait_readable(self.socket)
        self.unwaited += received
        if self.unwaited >= YIELD_BYTES:
            self.unwaited = 0
            await cancel_shielded_checkpoint()
        return received > 0

    def try_send(self, data: bytes) -> int:
        try:
            return self._send(data)
        except BlockingIOError:
            return 0

    async def send(self, buffers: Sequence[Buffer], skip: int, stall: float | None = None) -> None:
        views = [memoryview(buffer) for buffer in buffers]
        views[0] = views[0][skip:]
        first = 0
        since_wait = 0
        self.partial = skip > 0
        while first < len(views):
            try:
                if len(views) - first == 1 or len(views[first]) >= _MOST_AT_ONCE or not _VECTORS:
                    sent = self._send(views[first][:_MOST_AT_ONCE])
                else:
                    sent = self.socket.sendmsg(views[first : first + _MOST_BUFFERS])
            except BlockingIOError:
                since_wait = self.unwaited = 0
                if stall is None:
                    await writable_while_alive(self.socket, self.silence)
                else:
                    await writable_within(self.socket, stall)
                continue
            self.partial = True
            self.taken += sent
            since_wait += sent
            while first < len(views) and sent >= len(views[first]):
                sent -= len(views[first])
                first += 1
            if sent:
                views[first] = views[first][sent:]
            if since_wait >= YIELD_BYTES and first < len(views):
                # Not cancelled out of a frame for nothing: cancellation is delivered where the kernel makes us wait.
                since_wait = 0
                await cancel_shielded_checkpoint()

    def fill_nowait(self, parser: FrameParser) -> bool:
        target = parser.want()
        try:
            if target is None:
                data = self._recv(_LARGE_READ)
                parser.feed(data)
                return bool(data)
            received = self.socket.recv_into(target, min(len(target), _MOST_AT_ONCE))
        except OSError:
            return False  # a reset, or nothing there
        parser.filled(received)
        return received > 0

    def untaken(self) -> int:
        return untaken(self.socket)

    def fileno(self) -> int | None:
        return self.socket.fileno()

    def set_user_timeout(self, seconds: float) -> None:
        _set_user_timeout(self.socket, seconds)

    def readable(self) -> bool:
        return bool(self._ready(0))

    def _peek(self, _timeout: int) -> bool:
        try:
            self._recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def abort(self, *, reset: bool = False) -> None:
        sock = self.socket
        if sock.fileno() == -1:
            return
        if reset and untaken(sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        try:
            trio.lowlevel.notify_closing(sock)
        except RuntimeError:
            pass  # trio has ended: nobody waits for the socket, which is to be closed all the same
        try:
            # After a fork another process may hold the descriptor; close() alone would then leave the peer waiting.
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster; the close below is what counts
        sock.close()

    async def aclose(self) -> None:
        # All that was accepted for sending is with the kernel, which delivers it after the close; unless something has come that
        # was not read: then the close is a reset, which may overtake what was sent.
        if self.readable():
            try:
                for _ in range(_DISCARDS):
                    if not self._recv(_LARGE_READ):
                        break
            except OSError:
                pass  # there is no more, or the peer was faster
        self.abort()
        await cancel_shielded_checkpoint()


class StreamPump(Pump):
    """A pump on any trio stream."""

    __slots__ = ("_ahead", "_closed", "_receive_nowait", "_send_nowait", "stream")

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__()
        self.stream: trio.abc.Stream = stream
        # trio's interface has no such things; streams of the testing kit do.
        self._send_nowait: Callable[[bytes], int] | None = getattr(stream, "send_nowait", None)
        self._receive_nowait: Callable[[], bytes | None] | None = getattr(stream, "receive_nowait", None)
        self._ahead: bytes | None = None  # what was received to see whether there is anything
        self._closed = False

    async def fill(self, parser: FrameParser) -> bool:
        self.unwaited = 0
        data: bytes | bytearray
        if self._ahead is not None:
            await cancel_shielded_checkpoint()
            data, self._ahead = self._ahead, None
        else:
            data = await self.stream.receive_some(_LARGE_READ)
        if type(data) is not bytes:
            data = bytes(data)
        parser.feed(data)
        return bool(data)

    @property
    def sends_at_once(self) -> bool:
        return self._send_nowait is not None

    def try_send(self, data: bytes) -> int:
        if self._send_nowait is None:
            return 0
        try:
            return self._send_nowait(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionError(str(error)) from error

    async def send(self, buffers: Sequence[Buffer], skip: int, stall: float | None = None) -> None:
        self.unwaited = 0
        self.partial = True  # a trio stream doesn't say how much of an interrupted send_all has gone
        for buffer in buffers:
            view = memoryview(buffer)
            for start in range(skip, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                if stall is None:
                    await self.stream.send_all(piece)
                else:
                    with trio.fail_after(stall):
                        await self.stream.send_all(piece)
                self.taken += len(piece)
            skip = 0

    def fileno(self) -> int | None:
        sock = self._socket()
        return None if sock is None else sock.fileno()

    def set_user_timeout(self, seconds: float) -> None:
        sock = self._socket()
        if sock is not None:
            _set_user_timeout(sock, seconds)

    def _socket(self) -> trio.socket.SocketType | None:
        stream = self.stream
        if isinstance(stream, trio.SSLStream):
            stream = stream.transport_stream
        return stream.socket if isinstance(stream, trio.SocketStream) else None

    def readable(self) -> bool:
        if self._ahead is None and self._receive_nowait is not None:
            try:
                self._ahead = self._receive_nowait()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return True
        return self._ahead is not None

    def fill_nowait(self, parser: FrameParser) -> bool:
        if not self.readable() or not self._ahead:
            return False
        parser.feed(self._ahead)
        self._ahead = None
        return True

    def abort(self, *, reset: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        _close_now(self.stream)

    async def aclose(self) -> None:
        try:
            await self.stream.aclose()
        finally:
            self._closed = True


def _set_user_timeout(sock: socket.socket | trio.socket.SocketType, seconds: float) -> None:
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
    if option is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, option, max(1, int(min(seconds * 1000, _LONGEST))))


def _close_now(stream: trio.abc.AsyncResource) -> None:
    """Close a stream from code that can't await.

    trio's own streams, and those of the testing kit, can all be closed synchronously at some level.  Any other stream is closed
    by a system task, at the run's next step.
    """
    if isinstance(stream, trio.StapledStream):
        _close_now(stream.send_stream)
        _close_now(stream.receive_stream)
    elif isinstance(stream, trio.SSLStream):
        _close_now(stream.transport_stream)
    elif isinstance(stream, trio.SocketStream):
        try:
            stream.socket.shutdown(socket.SHUT_RDWR)  # as SocketPump.abort
        except OSError:
            pass
        stream.socket.close()
    elif callable(close := getattr(stream, "close", None)) and not inspect.iscoroutinefunction(close):
        close()
    else:
        trio.lowlevel.spawn_system_task(_close_in_task, stream)


async def _close_in_task(stream: trio.abc.AsyncResource) -> None:
    try:
        await trio.aclose_forcefully(stream)
    except Exception:
        # A system task that raises would take the whole run down.
        _log.exception("closing %r failed", stream)
