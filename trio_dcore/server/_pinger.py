"""Pings of a server (wire extension, section 8).

While a handler runs nobody reads its connection, yet the caller's pings want their answers, and a caller that has silently gone is to
be found.  One task looks after all connections, once a second, and only while there are requests that take pings: a request that it
meets twice has run for long enough to be looked after.  Then what comes on its connection is read ahead as it comes.  So a short call
costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import ParkingLot

from ..comm import Silence, last_look
from ..protocol._limits import Limits

if TYPE_CHECKING:
    from ._connection import Connection
    from ._request import Request

__all__ = ["Pinger"]

# Seconds between looks: a quarter of the patience that a client has who says nothing of it.
_PERIOD = 1.0
# A client that wants its answers sooner gets them in so many looks; but nobody makes the server look more often than that.
_LOOKS = 4
_SHORTEST = 0.01


class Pinger:
    """Looks after the requests of one server.

    Args:
        connections: those that are open.
        limits: say how often to ping callers and how long to wait; with None for either they are not pinged, only answered.

    Attributes:
        asleep: there is nothing to look after, as far as it knows.
    """

    def __init__(self, connections: Collection[Connection], limits: Limits) -> None:
        self._connections = connections
        self._interval = limits.ping_interval
        self._timeout = limits.ping_timeout
        self._asks = limits.ping_interval is not None and limits.ping_timeout is not None
        self.asleep = True
        self._lot = ParkingLot()
        self._nap = trio.CancelScope()
        self._period = _PERIOD
        self._hasty: dict[Connection, float] = {}  # those that want their answers sooner
        self._seen: dict[Connection, tuple[Request, Silence | None]] = {}

    def enter(self, connection: Connection) -> None:
        """A connection has shaken hands."""
        extension = connection.comm.extension
        if extension is not None and extension.ping is not None and connection.comm.pings:
            self._hasty[connection] = max(extension.ping / _LOOKS, _SHORTEST)
            self._pace()

    def leave(self, connection: Connection) -> None:
        """It has ended.  May be called again."""
        if self._hasty.pop(connection, None) is not None:
            self._pace()

    def _pace(self) -> None:
        own = math.inf if self._interval is None else max(self._interval / _LOOKS, _SHORTEST)
        self._period = min(_PERIOD, own, *self._hasty.values())
        self._nap.deadline = min(self._nap.deadline, trio.current_time() + self._period)

    def wake(self) -> None:
        """A request begins, and it is :attr:`asleep`.  Not a checkpoint."""
        self.asleep = False
        self._lot.unpark()

    async def run(self) -> None:
        """Look after the requests, until cancelled."""
        self._pace()
        while True:
            due = self._look()
            if due is None:
                self.asleep = True
                await self._lot.park()
                # By now the request may have ended.  The next ones must not wake us each: stay up for a while in any case.
                due = self._look() or trio.current_time() + self._period
            self._nap = trio.CancelScope(deadline=due)
            with self._nap:
                await trio.sleep_forever()
            await last_look()

    def _look(self) -> float | None:
        """See to all requests; returns when to look again, None if there is none."""
        now = trio.current_time()
        before, self._seen = self._seen, {}
        again = math.inf
        for connection in self._connections:
            request = connection.pinged
            if request is None:
                continue
            again = min(again, now + self._period)
            known = before.get(connection)
            if known is None or known[0] is not request:
                id = connection.asked_about if self._asks else None
                self._seen[connection] = request, None if id is None else Silence(connection.comm, id, now)
                continue
            self._seen[connection] = known
            silence = known[1]
            if not connection.attend():
                if silence is not None:
                    silence.restart(now)  # an answer could not be seen
            elif silence is not None:
                assert self._interval is not None
                assert self._timeout is not None
                due = silence.look(now, self._interval, self._timeout)
                if due == -math.inf:
                    connection.caller_is_dead(self._timeout)
                else:
                    again = min(again, due)
        return None if again == math.inf else again
