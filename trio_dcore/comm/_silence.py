"""Is the other side of a request still there?  When to ask it, and when to believe that it is not (wire extension, section 8)."""

from __future__ import annotations

import math

import trio

from ..errors import CommClosedError
from ..protocol._envelope import PING
from ._base import BaseComm

__all__ = ["Silence", "last_look"]


class Silence:
    """What has been heard of the other side since one request was made.

    Args:
        comm: the comm; a task reads it, or reads it ahead.
        id: the request's.
        now: the time.

    Attributes:
        id: the request's.
    """

    __slots__ = ("_asked", "_comm", "_heard", "_out", "_since", "id")

    def __init__(self, comm: BaseComm, id: int, now: float) -> None:
        self._comm = comm
        self.id: int = id
        self.restart(now)

    def restart(self, now: float) -> None:
        """Count from now on."""
        self._heard = self._comm.bytes_read
        self._since = now
        self._asked: float | None = None  # when a ping was sent that has no answer
        self._out = (0, 0)

    def look(self, now: float, interval: float, timeout: float) -> float:
        """Send a ping if it is time for one.  Not a checkpoint.

        Args:
            now: the time.
            interval: seconds of silence before a ping.
            timeout: seconds without any sign of life behind it after which the other side is taken for dead.

        Returns:
            When to look again; ``-math.inf`` if it is dead.
        """
        comm = self._comm
        if comm.bytes_read != self._heard:
            self.restart(now)
        if self._asked is None:
            due = self._since + interval
            if now < due:
                return due
            try:
                if not comm.write_soon((PING, self.id, None)):
                    return now + interval  # far too much waits to be sent already
            except (CommClosedError, trio.ClosedResourceError):
                return math.inf  # the task that reads is told
            self._asked = now
            self._out = comm.outstanding()
        else:
            # The ping waits behind what was sent before: while the other system takes of that, there is somebody.
            taken, untaken = self._out
            self._out = comm.outstanding()
            if self._out[0] != taken or self._out[1] < untaken:
                self._asked = now
        due = self._asked + timeout
        return due if now < due else -math.inf


async def last_look() -> None:
    """Let those read who have something to read, before anybody is taken for dead.

    If this process had no time for its tasks, answers may be here that nobody has seen yet; their readers are woken in the same pass
    of the event loop as whoever looks at the time.
    """
    for _ in range(2):
        await trio.lowlevel.checkpoint()
