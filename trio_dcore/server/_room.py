"""The connections of a server: how many there may be, and who gives way to the next.

``Limits.connections`` bounds all of them, ``Limits.handshaking`` those that have not finished their handshake.  Nothing here waits:
:meth:`Room.make` closes what has to make room, or says when it is worth looking again; waiting is the accept loop's
(:mod:`._accepting`).

Who gives way is a matter of what a stranger can do.  To be silent, or to say a byte, costs nothing, so ten thousand such connections
must not keep an honest client out for long, and there may be 2048 of them in the system's queue before it.  At the limit, a handshake
whose client has not done its part (``BaseComm.heard``) gives way after half a second, since a client that makes a hundred connections
at once may be busy for so long (a stock one is, for 50 ms: measured); any other gives way after a second.  If one has had to, that
was no such client: while that goes on, 10 ms are enough, in which the few bytes that follow a connect are there, and 200 ms for one
whose client has done its part: it has to wait for us, or over TLS we for its answer to ours.

Connections that have shaken hands give way when they have been idle for ten seconds, those of strangers after one: else a small
request now and then would hold a place for ever.  A request that has been coming for ten seconds, and is not complete, does not hold
a stranger's place either.  Whoever has been idle or incomplete for longest is the first to go.  What a handler does for a stranger
is the handler's.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from trio.lowlevel import ParkingLot

from ..protocol._limits import Limits
from ._statistics import Counters
from ._throttle import Throttle

if TYPE_CHECKING:
    from ._connection import Connection

__all__ = ["Room"]

_log = logging.getLogger("trio_dcore.server")

# After so many seconds a handshake may have to give way: if its client has not done its part, and in any case; each at first, and while
# others flood the server.
_SILENT = 0.5
_SLOW = 1.0
_SILENT_FLOODED = 0.01
_SLOW_FLOODED = 0.2
# The flood is over when no handshake has given way for so long.
_FLOOD_ENDS = 1.0
# After so many seconds of nothing an idle connection may, and that of a stranger.
_IDLE = 10.0
_IDLE_STRANGER = 1.0
# After so many seconds a stranger's request of which the rest has not come.
_UNFINISHED = 10.0


class Room:
    """All connections of one server.

    Attributes:
        connections: those that are open.
        changed: unparked when one ends, or has finished its handshake.
    """

    def __init__(self, name: str, limits: Limits, counters: Counters) -> None:
        # The oldest first, so that of two that have been idle for as long it is clear who gives way.
        self.connections: dict[Connection, None] = {}
        self.changed = ParkingLot()
        self._name = name
        self._limits = limits
        self._counters = counters
        self._handshaking: dict[Connection, float] = {}  # since when, the oldest first
        self._flooded_until = -math.inf
        self._paused = False
        self._throttles = {"handshaking": Throttle(), "connections": Throttle()}

    def enter(self, connection: Connection, now: float) -> None:
        """A connection begins, with its handshake."""
        self.connections[connection] = None
        self._handshaking[connection] = now

    def shaken(self, connection: Connection) -> None:
        """Its handshake is over."""
        if self._handshaking.pop(connection, None) is not None:
            self.changed.unpark_all()

    def leave(self, connection: Connection) -> None:
        """It has ended, or has been closed here.  May be called again."""
        if connection in self.connections:
            del self.connections[connection]
            self._handshaking.pop(connection, None)
            self._counters.closed(connection.comm)
            self.changed.unpark_all()

    def make(self, now: float) -> float:
        """Make room for one more connection.

        Returns:
            ``now`` if there is room.  Else the time to look again, unless :attr:`changed` tells earlier.
        """
        limits = self._limits
        if limits.handshaking is not None and len(self._handshaking) >= limits.handshaking:
            again = self._close_handshake(now, "handshaking", limits.handshaking)
            if again > now:
                return self._pause("handshaking", limits.handshaking, again)
        if limits.connections is not None and len(self.connections) >= limits.connections:
            again = self._close_idle(now, limits.connections)
            if again > now:
                # Else strangers could take every place and keep it until Limits.handshake_timeout.
                again = min(again, self._close_handshake(now, "connections", limits.connections))
            if again > now:
                return self._pause("connections", limits.connections, again)
        self._paused = False
        return now

    def expire(self, now: float, patience: float) -> float:
        """Close what has been idle for ``patience`` seconds; returns when to look again."""
        # What is in flight now can't have been idle for so long before that.
        again = now + patience
        for connection in list(self.connections):
            due = connection.idle_since + patience
            if due > now:
                again = min(again, due)
            elif connection.close_idle():
                self._leave_idle(connection)
                _log.info("closed the connection from %s: idle for %s s (Limits.idle)", connection.comm.peer_address, patience)
            # Else something has come in this moment, or part of it, which then has its own time limit.
        return again

    def _leave_idle(self, connection: Connection) -> None:
        self._counters.expired += 1
        self.leave(connection)

    def _close_idle(self, now: float, most: int) -> float:
        """Close the connection that has been idle or incomplete longest, and long enough; returns as :meth:`make`."""
        # What is in flight now may be idle from the next moment on.
        again = now + _IDLE
        stranger = min(_IDLE, _IDLE_STRANGER)
        old: list[tuple[float, Connection, str]] = []
        for connection in self.connections:
            if connection.handshaking:
                continue
            since, patience, what = connection.idle_since, _IDLE, "idle"
            if not connection.comm.peer.trusted:  # settled in the handshake
                again = min(again, now + stranger)
                patience = stranger
                if since < math.inf and (rest := connection.comm.rest_since) < math.inf:
                    since, patience, what = rest, _UNFINISHED, "in the middle of a request"
            if since + patience <= now:
                old.append((since, connection, what))
            else:
                again = min(again, since + patience)
        for since, connection, what in sorted(old, key=lambda each: each[0]):
            if connection.close_idle() if what == "idle" else connection.close_unfinished():
                self._leave_idle(connection)
                self._tell("connections", most, f"{connection.comm.peer_address}, {what} for {now - since:.3g} s, gives way")
                return now
        return again

    def _close_handshake(self, now: float, limit: str, most: int) -> float:
        """Close the oldest handshake that waits for its client, or else the oldest, if it is old enough; returns as :meth:`make`."""
        again = math.inf
        silent, patience = (_SILENT_FLOODED, _SLOW_FLOODED) if now < self._flooded_until else (_SILENT, _SLOW)
        slow = None
        for connection, since in self._handshaking.items():
            heard = connection.comm.heard
            due = since + (patience if heard else silent)
            if due > now:
                again = min(again, due)
            elif not heard:
                return self._give_way(connection, now, limit, most, f"silent for {now - since:.3g} s")
            elif slow is None:
                slow = connection
        if slow is not None:
            return self._give_way(slow, now, limit, most, f"{now - self._handshaking[slow]:.3g} s in its handshake")
        return again

    def _give_way(self, connection: Connection, now: float, limit: str, most: int, why: str) -> float:
        self._flooded_until = now + _FLOOD_ENDS
        connection.give_way()
        self._counters.refused += 1
        self.leave(connection)
        self._tell(limit, most, f"{connection.comm.peer_address}, {why}, gives way")
        return now

    def _pause(self, limit: str, most: int, again: float) -> float:
        if not self._paused:  # told once, however often it looks again
            self._paused = True
            self._tell(limit, most, "accepting pauses")
        return again

    def _tell(self, limit: str, most: int, what: str) -> None:
        more = self._throttles[limit].due()
        if more is not None:
            _log.warning("%s is at its limit, Limits(%s=%d): %s%s", self._name, limit, most, what, more)
