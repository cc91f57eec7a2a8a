"""How slow a peer may be inside a message, in either direction (security document, section 2).

What is measured is progress, not time: a large message over a thin line takes as long as it takes, while one byte now and then, or
none, does not hold a connection for ever, whatever was sent before.  Nothing here runs, and no scope is entered, before there is
something to wait for.
"""

from __future__ import annotations

import errno
import math
import socket
import struct
import sys
from collections.abc import Awaitable, Callable

import trio
from trio.lowlevel import wait_writable

from ..errors import LimitExceeded
from ..protocol._context import Buffer
from ..protocol._frames import FrameParser

if sys.platform != "win32":
    import fcntl
    import termios

__all__ = ["acquire_within", "gone", "pull_rest", "stalled", "untaken", "writable_while_alive", "writable_within"]

# The beginning of Linux's struct tcp_info (tcp(7)), and what is looked at: unanswered retransmissions and probes, segments that are on
# their way, and milliseconds since the peer's system acknowledged anything.
_TCP_INFO = struct.Struct("=8B13I")
_RETRANSMITS, _PROBES, _UNACKED, _LAST_ACK = 2, 3, 12, 20
HAS_TCP_INFO = sys.platform == "linux" and hasattr(socket, "TCP_INFO")
_UNANSWERED = 2

# A socket is writable only when a third of its buffer is free, which may be megabytes: a peer that reads slowly, but reads, is told
# from one that doesn't by looking so many times whether the rest has become less.
_LOOKS = 10


async def pull_rest(
    fill: Callable[[FrameParser], Awaitable[bool]], parser: FrameParser, timeout: float, rate: float | None
) -> list[Buffer] | None:
    """Wait for the rest of a message of which a part has come, and return its frames; None at the end of the stream.

    The clock starts now: nobody may have been reading before.

    Args:
        fill: waits for bytes and gives them to the parser; False at the end of the stream.
        parser: has the part.
        timeout: seconds that nothing may come; ``math.inf`` is no such limit.
        rate: bytes a second, None is no such limit.  The message must be complete by ``timeout + received / rate``, both counted
            from a mark.  That is the beginning at first, and whenever ``timeout`` seconds' worth of bytes have come in time since
            the mark, it moves to now: else who sends much at once could then be silent, nearly, for days.

    Cancellation: nothing is lost; what had come is in the parser.

    Raises:
        LimitExceeded: it is too slow.
    """
    now = trio.current_time()
    mark = _Mark(now, timeout, rate)
    while True:
        late = mark.late(now, _received(parser))
        with trio.CancelScope(deadline=min(now + timeout, late)) as scope:
            while True:
                if not await fill(parser):
                    return None
                frames = parser.next_message()
                if frames is not None:
                    return frames
                now = trio.current_time()
                late = mark.late(now, _received(parser))
                scope.deadline = min(now + timeout, late)
                if scope.cancel_called:
                    break  # something has come all the same: it was we who had no time to look
        if scope.cancelled_caught or late <= now:
            break
    if rate is None or now + timeout <= late:
        raise LimitExceeded(
            f"nothing came for {timeout} s in the middle of a message; change it with Limits(progress_timeout=...)",
            limit="progress_timeout",
            value=timeout,
            seen=timeout,
        )
    seen = mark.seen(trio.current_time(), _received(parser))
    raise LimitExceeded(
        f"a message came at {seen:.3g} bytes a second, below the limit of {rate}; change it with Limits(progress_rate=...)",
        limit="progress_rate",
        value=rate,
        seen=seen,
    )


def _received(parser: FrameParser) -> int:
    return parser.received + parser.buffered


class _Mark:
    """From where on the rate of a message is measured (see :func:`pull_rest`)."""

    __slots__ = ("_rate", "_received", "_time", "_timeout")

    def __init__(self, now: float, timeout: float, rate: float | None) -> None:
        self._time = now
        # What came before anybody read counts: it buys its sender no more time than it would have without the mark.
        self._received = 0
        self._timeout = timeout
        self._rate = rate

    def late(self, now: float, received: int) -> float:
        """When the message must be complete, if no more of it comes."""
        rate = self._rate
        if rate is None:
            return math.inf
        since = received - self._received
        if since >= rate * self._timeout and since >= rate * (now - self._time):
            self._time, self._received, since = now, received, 0
        return self._time + self._timeout + since / rate

    def seen(self, now: float, received: int) -> float:
        """The rate since the mark, where that is some time ago."""
        return (received - self._received) / (now - self._time)


async def writable_while_alive(sock: socket.socket, silence: float | None) -> None:
    """Wait until a socket is writable, or its peer has gone without a word.

    A peer that does not read is alive: its system acknowledges every probe of a closed window.  ``TCP_USER_TIMEOUT`` ends such a
    connection all the same; this does not.

    Args:
        sock: the socket.
        silence: seconds without a sign of life from the peer's system; None is for ever.  It is looked for twice in that time.

    Raises:
        TimeoutError: there was none.
    """
    if silence is None or not HAS_TCP_INFO:
        await wait_writable(sock)
        return
    while True:
        with trio.CancelScope(deadline=trio.current_time() + silence / 2) as scope:
            await wait_writable(sock)
        if not scope.cancelled_caught:
            return
        if gone(sock, silence):
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"the peer's system has acknowledged nothing for {silence} s; change it with Limits(tcp_user_timeout=...)",
            )


def gone(sock: socket.socket, silence: float) -> bool:
    """Whether a peer's system has left several segments or probes unanswered, and not been heard for so many seconds; Linux."""
    try:
        info = _TCP_INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    except (OSError, struct.error):  # it is no TCP socket
        return False
    # While its window is closed it is probed ever more rarely, so a long silence alone says nothing.
    unanswered = info[_PROBES] >= _UNANSWERED or (info[_UNACKED] > 0 and info[_RETRANSMITS] >= _UNANSWERED)
    return unanswered and bool(info[_LAST_ACK] >= silence * 1000)


async def writable_within(sock: socket.socket, seconds: float) -> None:
    """Wait until a socket is writable.

    Raises:
        trio.TooSlowError: the peer has taken nothing for so many seconds.
    """
    now = trio.current_time()
    due = now + seconds
    left = untaken(sock)
    while True:
        with trio.CancelScope(deadline=min(due, now + seconds / _LOOKS)) as scope:
            await wait_writable(sock)
        if not scope.cancelled_caught:
            return
        now = trio.current_time()
        before, left = left, untaken(sock)
        if left < before:
            due = now + seconds
        elif now >= due:
            raise trio.TooSlowError


def untaken(sock: socket.socket) -> int:
    """Bytes that the kernel has and the peer's has not; 0 where the system doesn't tell."""
    if sys.platform == "win32":
        return 0
    try:
        found: int = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]
    except OSError:
        return 0
    return found


async def acquire_within(lock: trio.StrictFIFOLock, seconds: float, passed: Callable[[], float]) -> None:
    """Acquire a lock that those hold who write before us.

    Args:
        lock: the lock.
        seconds: the time in which nothing of what they write may be taken.
        passed: how much has been taken.

    Raises:
        trio.TooSlowError: nothing was.
    """
    while True:
        before = passed()
        with trio.CancelScope(deadline=trio.current_time() + seconds) as scope:
            await lock.acquire()
        if not scope.cancelled_caught:
            return
        if passed() == before:
            raise trio.TooSlowError


def stalled(address: str, field: str, seconds: float) -> LimitExceeded:
    """The error for a peer that took nothing for ``seconds``, where ``Limits(field=seconds)`` stands."""
    return LimitExceeded(
        f"{address} has taken nothing of what is sent for {seconds} s; change it with Limits({field}=...)",
        limit=field,
        value=seconds,
        seen=seconds,
    )
