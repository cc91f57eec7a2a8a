"""FaultStream: a stream with the faults that networks have."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import trio

__all__ = ["TIMER_NAME", "FaultStream", "How", "reset_stream"]

#: How a connection is cut: both directions end, as when a process exits; or as by a TCP RST, which loses what is on its way.
How = Literal["eof", "reset"]

#: Of the system tasks that cut a stream when its time has come; they end with it, and no_leaks() does not count them.
TIMER_NAME = "trio_dcore.testing: timer of a FaultStream"

# What a connection that passes nothing on still takes, as the buffers of a kernel would.
_SWALLOWED = 64 * 1024


def reset_stream(stream: trio.abc.Stream) -> None:
    """End a connection as an RST does, in both directions.  Not a checkpoint."""
    reset: Callable[[], None] | None = getattr(stream, "reset", None)
    if reset is not None:
        reset()
        return
    if isinstance(stream, trio.SocketStream):
        # Closing with a linger time of 0 makes the kernel send RST instead of FIN.
        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        stream.socket.close()
        return
    if isinstance(stream, trio.SSLStream):
        reset_stream(stream.transport_stream)
        return
    raise TypeError(f"{stream!r} can't be reset: it has no reset() and is no SocketStream")


def _end_stream(stream: trio.abc.Stream) -> None:
    """Close both directions now; the other end reads what was sent and then the end."""
    if isinstance(stream, trio.SocketStream):
        try:
            stream.socket.shutdown(trio.socket.SHUT_RDWR)  # close() alone sends RST if something is unread
        except OSError:
            pass  # the other end was faster
        stream.socket.close()
    elif callable(close := getattr(stream, "close", None)):
        close()
    else:
        raise TypeError(f"{stream!r} can't be closed without waiting: it has no close() and is no SocketStream")


class FaultStream(trio.abc.Stream):
    """A stream whose sending, receiving or both have faults; the first eight are those of toxiproxy.

    Args:
        stream: what is underneath, and owned: a MemoryStream, a :class:`trio.SocketStream` or another FaultStream.
        on: where latency, bandwidth, slicer and limit_data hold: "send", "receive" or "both".
        latency: seconds that each piece takes.
        bandwidth: bytes a second.
        slow_close: seconds that :meth:`aclose` takes; :meth:`close` takes none.
        timeout: from the start nothing passes, see :meth:`black_hole`, and after so many seconds the connection is cut
            (``math.inf``: never).
        reset_peer: after so many seconds the connection is reset.
        slicer: pieces are at most so many bytes.
        limit_data: after so many bytes in one direction the connection is cut.
        down: the connection is dead from the start: every operation raises BrokenResourceError.
        cut_after: after so many sent bytes the connection is cut.
        cut: how ``cut_after`` does it: "eof" or "reset".
        cut_when: "sent" cuts as soon as the last of these bytes has been handed over, "next" when one more is to follow.

    Attributes:
        stream: what is underneath.
        latency, bandwidth, slicer, slow_close: may be changed at any time, for all pieces that come later.
        sent: bytes that were handed over to the stream underneath.
        received: bytes that came from it.
        was_cut: whether the connection was cut, by a limit, a time or :meth:`cut`.
        cut_between: whether that happened between two calls of send_all, with nothing left to send.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        on: Literal["send", "receive", "both"] = "both",
        latency: float = 0.0,
        bandwidth: float = math.inf,
        slow_close: float = 0.0,
        timeout: float | None = None,
        reset_peer: float | None = None,
        slicer: int | None = None,
        limit_data: int | None = None,
        down: bool = False,
        cut_after: int | None = None,
        cut: How = "eof",
        cut_when: Literal["sent", "next"] = "sent",
    ) -> None:
        self.stream = stream
        self.latency = latency
        self.bandwidth = bandwidth
        self.slicer = slicer
        self.slow_close = slow_close
        self.sent: int = 0
        self.received: int = 0
        self.was_cut: bool = False
        self.cut_between: bool = False
        self._on_send = on in ("send", "both")
        self._on_receive = on in ("receive", "both")
        self._limit = limit_data
        self._down = down
        self._cut_after = cut_after
        self._cut_how: How = cut
        self._at_once = cut_when == "sent"
        self._how: How = "eof"  # it was cut
        self._black = False
        self._swallowed = 0
        self._closed = False
        self._sending = self._receiving = False
        self._held = b""  # received, and not yet delivered
        self._due = 0.0  # when it may be
        self._ended = False
        self._changed = trio.Event()  # replaced with each change
        self._pending: set[trio.CancelScope] = set()  # round what waits for the stream underneath
        self._timers: list[trio.CancelScope] = []
        if timeout is not None:
            self.black_hole(timeout)
        if reset_peer is not None:
            self._start_timer(reset_peer, "reset")
        if cut_after == 0 and self._at_once:
            self.cut_between = True
            self.cut(cut)

    # -- faults at any time ------------------------------------------------------------------------------------------------------

    def black_hole(self, seconds: float = math.inf) -> None:
        """From now on nothing passes in either direction, for good, not even that one end closes; cut after so many seconds.

        What is sent is lost; after 64 KiB of it senders wait.  What was sent before may still arrive.  A stream that is closed in
        a black hole leaves the one underneath open until :meth:`cut`, so that the other end waits in vain.  Not a checkpoint.
        """
        self._black = True
        self._tell()
        if seconds < math.inf:
            self._start_timer(seconds, "eof")

    def cut(self, how: How = "eof") -> None:
        """End the connection now: "eof" as when a process exits, "reset" as by an RST.  Not a checkpoint."""
        if self.was_cut or (self._closed and not self._black):
            return
        self.was_cut = True
        self._how = how
        if self._black:
            self._held = b""
        if how == "reset":
            reset_stream(self.stream)
        else:
            _end_stream(self.stream)
        self._stop_timers()
        self._tell()

    # -- sending -----------------------------------------------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send through the faults.  Cancellation: some of it may have gone."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            rest = memoryview(data).cast("B") if len(data) else memoryview(b"")
            if not rest:
                await self._underneath(partial(self.stream.send_all, b""))
                self._check_sendable()
            while rest:
                self._check_sendable()
                if self._black:
                    taken = self._swallow(len(rest))
                    rest = rest[taken:]
                    if rest:
                        await self._changed.wait()
                    continue
                size = self._piece(len(rest))
                if size == 0:
                    self.cut(self._cut_how)
                    continue
                if self._on_send and not await self._delayed(size):
                    continue  # something has changed meanwhile
                await self._underneath(partial(self.stream.send_all, rest[:size]))
                self._check_sendable()
                rest = rest[size:]
                self._count_sent(size, last=not rest)
        finally:
            self._sending = False

    def send_nowait(self, data: bytes) -> int:
        """Send what needs no wait, where neither a fault nor the stream underneath stands against that; returns its size.

        Not a checkpoint.  Raises as :meth:`send_all` does.
        """
        self._check_sendable()
        if self._sending:
            return 0
        if self._black:
            return self._swallow(len(data))
        send: Callable[[bytes], int] | None = getattr(self.stream, "send_nowait", None)
        if send is None or (self._on_send and (self.latency or self.bandwidth != math.inf or self.slicer is not None)):
            return 0
        size = self._piece(len(data))
        if size == 0:
            return 0
        sent = send(data[:size])
        self._count_sent(sent, last=sent == len(data))
        return sent

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream underneath."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            while True:
                self._check_sendable()
                if not self._black:
                    await self._underneath(self.stream.wait_send_all_might_not_block)
                    self._check_sendable()
                    return
                if self._swallowed < _SWALLOWED:
                    return
                await self._changed.wait()
        finally:
            self._sending = False

    def _check_sendable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._down or self.was_cut:
            raise trio.BrokenResourceError("the connection is down" if self._down else "the connection was cut")

    def _piece(self, size: int) -> int:
        """How much of so many bytes may be sent at once; 0 if the connection is to be cut first."""
        if self._on_send and self.slicer is not None:
            size = min(size, self.slicer)
        return size if (left := self._left()) is None else min(size, left)

    def _left(self) -> int | None:
        limits = [self._cut_after, self._limit if self._on_send else None]
        return min((limit - self.sent for limit in limits if limit is not None), default=None)

    def _count_sent(self, size: int, *, last: bool) -> None:
        self.sent += size
        if self._left() == 0 and (self._at_once or not last):
            self.cut_between = last
            self.cut(self._cut_how)

    def _swallow(self, size: int) -> int:
        taken = min(size, _SWALLOWED - self._swallowed)
        self._swallowed += taken
        return taken

    # -- receiving ---------------------------------------------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive through the faults.  Cancellation: nothing is lost."""
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes!r}: must be at least 1")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            while True:
                if self._closed:
                    raise trio.ClosedResourceError("this stream was closed")
                if self._down or (self.was_cut and self._how == "reset"):
                    raise trio.BrokenResourceError("the connection is down" if self._down else "the connection was reset")
                if self._black and not self.was_cut:
                    await self._changed.wait()
                elif not self._held:
                    if self._ended or self.was_cut:
                        return b""
                    await self._fetch(max_bytes)
                elif trio.current_time() < self._due:
                    with trio.move_on_at(self._due):
                        await self._changed.wait()
                else:
                    taken, self._held = self._held[:max_bytes], self._held[len(self._held[:max_bytes]) :]
                    return taken
        finally:
            self._receiving = False

    async def _fetch(self, max_bytes: int | None) -> None:
        if self._on_receive:
            limits = (max_bytes, self.slicer, None if self._limit is None else self._limit - self.received)
            max_bytes = min((limit for limit in limits if limit is not None), default=None)
        data = await self._underneath(partial(self.stream.receive_some, max_bytes))
        if data is None:
            return
        self._held = bytes(data)
        self._ended = not data
        self.received += len(data)
        if self._on_receive and data:
            self._due = trio.current_time() + self.latency + len(data) / self.bandwidth
            if self.received == self._limit:
                self.cut("eof")

    # -- closing -----------------------------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Close, slowly where asked."""
        try:
            if self.slow_close and not self._closed:
                await trio.sleep(self.slow_close)
        finally:
            self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close at once; in a black hole the other end is not told.  Not a checkpoint."""
        if self._closed:
            return
        self._closed = True
        if not self._black or self.was_cut:
            self._stop_timers()
            _end_stream(self.stream)
        for scope in self._pending:
            scope.cancel(reason="the stream was closed")
        self._tell()

    # -- waiting -----------------------------------------------------------------------------------------------------------------

    async def _underneath(self, operation: Callable[[], Awaitable[bytes | bytearray | None]]) -> bytes | bytearray | None:
        """Do something on the stream underneath; None if it was cut or closed meanwhile, by this side."""
        try:
            with self._interruptible():
                return await operation()
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            if not (self.was_cut or self._closed):
                raise
        return None

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        with trio.CancelScope() as scope:
            self._pending.add(scope)
            try:
                yield
            finally:
                self._pending.discard(scope)

    async def _delayed(self, size: int) -> bool:
        """Wait for as long as so many bytes take; False if something changed meanwhile."""
        delay = self.latency + size / self.bandwidth
        if not delay:
            return True
        with trio.move_on_after(delay) as scope:
            await self._changed.wait()
        return scope.cancelled_caught

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _start_timer(self, seconds: float, how: How) -> None:
        scope = trio.CancelScope()
        self._timers.append(scope)

        async def wait_and_cut() -> None:
            with scope:
                await trio.sleep(seconds)
                self.cut(how)

        trio.lowlevel.spawn_system_task(wait_and_cut, name=TIMER_NAME)

    def _stop_timers(self) -> None:
        for scope in self._timers:
            scope.cancel(reason="the connection has ended")
