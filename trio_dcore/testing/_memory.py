"""Byte streams in memory that behave as sockets do: bounded, with a half-close and a reset."""

from __future__ import annotations

import trio
from trio.lowlevel import ParkingLot

__all__ = ["MemoryStream", "memory_stream_pair"]

_CAPACITY = 64 * 1024


class _Pipe:
    """One direction: bytes in at one end, out at the other."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data: bytearray = bytearray()
        self.ended = False  # the sender has said that nothing more comes
        self.gone = False  # the receiver has closed: whatever is sent is lost
        self.reset = False
        self.changed: ParkingLot = ParkingLot()

    def wake(self) -> None:
        self.changed.unpark_all()


class MemoryStream(trio.abc.HalfCloseableStream):
    """One end of a pair; see :func:`memory_stream_pair`."""

    def __init__(self, outgoing: _Pipe, incoming: _Pipe) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self._closed = False
        self._sending = False
        self._receiving = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send; waits while more than the capacity is unread.  Cancellation: some of it may have gone."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            pipe = self._outgoing
            rest = memoryview(data).cast("B") if len(data) else memoryview(b"")
            while True:
                self._check_sendable()
                room = pipe.capacity - len(pipe.data)
                if room > 0 and rest:
                    pipe.data += rest[:room]
                    rest = rest[room:]
                    pipe.wake()
                if not rest:
                    return
                await pipe.changed.park()
        finally:
            self._sending = False

    def send_nowait(self, data: bytes) -> int:
        """Send what there is room for and return its size, 0 while a task is in :meth:`send_all`.

        Not a checkpoint.  Raises as :meth:`send_all` does.
        """
        self._check_sendable()
        if self._sending:
            return 0  # it would get in between that task's bytes
        pipe = self._outgoing
        size = min(len(data), max(0, pipe.capacity - len(pipe.data)))
        if size:
            pipe.data += data[:size]
            pipe.wake()
        return size

    def _check_sendable(self) -> None:
        pipe = self._outgoing
        if self._closed or pipe.ended:
            raise trio.ClosedResourceError("this end was closed for sending")
        if pipe.gone or pipe.reset:
            raise trio.BrokenResourceError("the other end was closed" if pipe.gone else "the connection was reset")

    @property
    def closed(self) -> bool:
        """Whether this end was closed, here: by :meth:`close` or :meth:`aclose`."""
        return self._closed

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room, or until sending would fail."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            pipe = self._outgoing
            while True:
                if self._closed or pipe.ended:
                    raise trio.ClosedResourceError("this end was closed for sending")
                if pipe.gone or pipe.reset or len(pipe.data) < pipe.capacity:
                    return
                await pipe.changed.park()
        finally:
            self._sending = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive what there is, b"" at the end.  Cancellation: nothing is lost."""
        if max_bytes is not None:
            if not isinstance(max_bytes, int):
                raise TypeError(f"max_bytes={max_bytes!r}: must be an int")
            if max_bytes < 1:
                raise ValueError(f"max_bytes={max_bytes!r}: must be at least 1")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            pipe = self._incoming
            while True:
                if self._closed:
                    raise trio.ClosedResourceError("this stream was closed")
                if pipe.reset:
                    raise trio.BrokenResourceError("the connection was reset")
                if pipe.data:
                    taken = bytes(pipe.data[:max_bytes])
                    del pipe.data[: len(taken)]
                    pipe.wake()
                    return taken
                if pipe.ended:
                    return b""
                await pipe.changed.park()
        finally:
            self._receiving = False

    def receive_nowait(self) -> bytes | None:
        """Receive what there is, b"" at the end; None if that would wait, or while a task is in :meth:`receive_some`.

        Not a checkpoint.  Raises as :meth:`receive_some` does.
        """
        pipe = self._incoming
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if pipe.reset:
            raise trio.BrokenResourceError("the connection was reset")
        if self._receiving or not (pipe.data or pipe.ended):
            return None
        taken = bytes(pipe.data)
        pipe.data.clear()
        pipe.wake()
        return taken

    async def send_eof(self) -> None:
        """End our direction; the other goes on."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        self._outgoing.ended = True
        self._outgoing.wake()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close both directions; the other end reads what was sent and then the end.  Not a checkpoint."""
        if self._closed:
            return
        self._closed = True
        self._outgoing.ended = True
        self._incoming.gone = True
        self._incoming.data.clear()
        self._outgoing.wake()
        self._incoming.wake()

    def reset(self) -> None:
        """Break as a connection that is reset: what is on its way is lost, and both ends get BrokenResourceError.

        Both ends are still to be closed.  Not a checkpoint.
        """
        for pipe in (self._outgoing, self._incoming):
            pipe.reset = True
            pipe.data.clear()
            pipe.wake()

    async def aclose(self) -> None:
        """Close both directions."""
        self.close()
        await trio.lowlevel.checkpoint()


def memory_stream_pair(capacity: int = _CAPACITY) -> tuple[MemoryStream, MemoryStream]:
    """Two connected streams.

    Args:
        capacity: bytes of each direction that may be unread before a sender waits.
    """
    there, back = _Pipe(capacity), _Pipe(capacity)
    return MemoryStream(there, back), MemoryStream(back, there)
