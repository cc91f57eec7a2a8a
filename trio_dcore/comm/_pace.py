"""How slow a peer may be inside a message, in either direction (security document, section 2).

What is measured is progress, not time: a large message over a thin line takes as long as it takes, while one byte now and then, or
none, does not hold a connection for ever.  Nothing here runs, and no scope is entered, before there is something to wait for.
"""

from __future__ import annotations

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

__all__ = ["acquire_within", "pull_rest", "stalled", "untaken", "writable_within"]

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
        timeout: seconds that nothing may come.
        rate: bytes a second; the message must be complete by ``timeout + received / rate``.  None is no such limit.

    Cancellation: nothing is lost; what had come is in the parser.

    Raises:
        LimitExceeded: it is too slow.
    """
    began = now = trio.current_time()
    while True:
        late = _late(began, parser, timeout, rate)
        with trio.CancelScope(deadline=min(now + timeout, late)) as scope:
            while True:
                if not await fill(parser):
                    return None
                frames = parser.next_message()
                if frames is not None:
                    return frames
                now = trio.current_time()
                late = _late(began, parser, timeout, rate)
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
    seen = _received(parser) / (trio.current_time() - began)
    raise LimitExceeded(
        f"a message came at {seen:.3g} bytes a second, below the limit of {rate}; change it with Limits(progress_rate=...)",
        limit="progress_rate",
        value=rate,
        seen=seen,
    )


def _received(parser: FrameParser) -> int:
    return parser.received + parser.buffered


def _late(began: float, parser: FrameParser, timeout: float, rate: float | None) -> float:
    return math.inf if rate is None else began + timeout + _received(parser) / rate


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


async def acquire_within(lock: trio.StrictFIFOLock, seconds: float, passed: Callable[[], int]) -> None:
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
