"""FaultStream: a stream with the faults that networks have."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal, TypeVar

import trio

__all__ = ["FaultStream", "reset_stream"]

_T = TypeVar("_T")


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
    raise TypeError(f"{stream!r} can't be reset: it has no reset() and is no SocketStream")


class FaultStream(trio.abc.Stream):
    """A stream whose sending, receiving or both have faults; the first eight are toxiproxy's.

    Args:
        stream: what is underneath, and owned.
        on: where latency, bandwidth, slicer and limits hold: "send", "receive" or "both".
        latency: seconds that each piece takes.
        bandwidth: bytes a second.
        slow_close: seconds that closing takes.
        timeout: nothing passes any more, in either direction; after so many seconds the connection is closed (``math.inf``: never).
        reset_peer: after so many seconds the connection is reset.
        slicer: pieces are at most so many bytes.
        limit_data: after so many bytes the connection is closed.
        down: the connection is dead from the start: every operation raises BrokenResourceError.
        cut_after: like ``limit_data``, for sent bytes, with ``cut`` saying how: "eof" or "reset".
        cut: see ``cut_after``.

    Attributes:
        was_cut: whether a limit has been reached.
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
        cut: Literal["eof", "reset"] = "eof",
    ) -> None:
        self.stream = stream
        self._sending = on in ("send", "both")
        self._receiving = on in ("receive", "both")
        self._latency = latency
        self._bandwidth = bandwidth
        self._slow_close = slow_close
        self._timeout = timeout
        self._reset_at = None if reset_peer is None else trio.current_time() + reset_peer
        self._slicer = slicer
        self._limit = limit_data
        self._down = down
        self._cut_after = cut_after
        self._cut: Literal["eof", "reset"] = cut
        self._sent = 0
        self._passed = 0
        self.was_cut = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send through the faults."""
        rest = memoryview(data)
        if not rest:
            await self._before(0)
            await self.stream.send_all(b"")
            return
        while rest:
            size = len(rest)
            if self._slicer is not None and self._sending:
                size = min(size, self._slicer)
            limit = self._limit - self._passed if self._limit is not None and self._sending else None
            if self._cut_after is not None:
                left = self._cut_after - self._sent
                limit = left if limit is None else min(limit, left)
            if limit is not None and limit <= 0:
                await self._break_off()
            if limit is not None:
                size = min(size, limit)
            if self._sending:
                await self._before(size)
            await self._unless_reset(partial(self.stream.send_all, rest[:size]))
            self._sent += size
            self._passed += size if self._sending else 0
            rest = rest[size:]

    def send_nowait(self, data: bytes) -> int:
        """Send without waiting, where neither a fault nor the stream underneath stands against that; returns the size sent."""
        send = getattr(self.stream, "send_nowait", None)
        delayed = self._latency or self._bandwidth != math.inf or self._timeout is not None or self._down
        if send is None or delayed or self._slicer is not None or self._limit is not None or self._reset_at is not None:
            return 0
        if self._cut_after is not None:
            data = data[: self._cut_after - self._sent]
        sent: int = send(data) if data else 0
        self._sent += sent
        return sent

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream underneath."""
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive through the faults."""
        if self._receiving and self._slicer is not None:
            max_bytes = self._slicer if max_bytes is None else min(max_bytes, self._slicer)
        if self._receiving and self._limit is not None:
            left = self._limit - self._passed
            if left <= 0:
                await self._break_off()
            max_bytes = left if max_bytes is None else min(max_bytes, left)
        await self._blocked()
        data = await self._unless_reset(partial(self.stream.receive_some, max_bytes))
        if self._receiving:
            self._passed += len(data)
            await self._before(len(data))
        return data

    async def aclose(self) -> None:
        """Close, slowly where asked."""
        if self._slow_close:
            try:
                await trio.sleep(self._slow_close)
            except BaseException:
                await trio.aclose_forcefully(self.stream)
                raise
        await self.stream.aclose()

    def close(self) -> None:
        """Close at once, where the stream underneath can."""
        if isinstance(self.stream, trio.SocketStream):
            self.stream.socket.close()
        else:
            self.stream.close()  # type: ignore[attr-defined]  # memory streams and other FaultStreams have it

    async def _before(self, size: int) -> None:
        await self._blocked()
        delay = self._latency + size / self._bandwidth
        if delay:
            await trio.sleep(delay)

    async def _blocked(self) -> None:
        if self._down:
            await trio.lowlevel.checkpoint()
            raise trio.BrokenResourceError("the connection is down")
        if self._timeout is not None:
            await trio.sleep(self._timeout)
            await self._break_off()

    async def _break_off(self) -> None:
        """A limit is reached: end the connection, as asked, and tell the user of this end."""
        self.was_cut = True
        if self._cut == "reset" and self._cut_after is not None:
            reset_stream(self.stream)
        else:
            await trio.aclose_forcefully(self.stream)
        raise trio.BrokenResourceError("the connection was cut")

    async def _unless_reset(self, operation: Callable[[], Awaitable[_T]]) -> _T:
        if self._reset_at is None:
            return await operation()
        with trio.move_on_at(self._reset_at):
            return await operation()
        self.was_cut = True
        reset_stream(self.stream)
        raise trio.BrokenResourceError("the connection was reset")
