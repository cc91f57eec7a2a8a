"""Pings of a pool: a server that has silently gone must not keep its callers waiting for ever (wire extension, section 8).

One task looks after all calls of a pool, and only while there are some: it is started by the first one, looks a few times in every
``Limits.ping_interval``, and ends when it finds nothing to look after.  A call costs it nothing: what it goes by is the id of the
comm's last request, whether a task reads the comm, and how many bytes have come.
"""

from __future__ import annotations

import math

import trio

from ..comm import BaseComm, Silence, last_look
from ..errors import CommClosedError
from ..protocol._limits import Limits
from ._pool_policy import PoolPolicy

__all__ = ["PINGER_NAME", "Pinger"]

#: Of the system task of a pool that is open.  It ends with the pool, or by itself, and no_leaks() does not count it.
PINGER_NAME = "pings of a ConnectionPool"

# Looks in an interval: so much later than it should the first ping of a call may be.
_LOOKS = 4


class Pinger:
    """Sends the pings of one pool.

    Args:
        policy: knows which comms are in use.
        limits: says how often to ping and how long to wait; with None for either there are no pings.

    Attributes:
        awake: it looks after the calls, or there are no pings at all.
    """

    def __init__(self, policy: PoolPolicy, limits: Limits) -> None:
        self._policy = policy
        self._interval = limits.ping_interval
        self._timeout = limits.ping_timeout
        self.awake = self._interval is None or self._timeout is None
        self._scope: trio.CancelScope | None = None
        self._task: trio.lowlevel.Task | None = None
        self._silences: dict[BaseComm, Silence] = {}

    def wake(self) -> None:
        """A call begins on a comm whose peer answers pings, and nobody is :attr:`awake`.  Not a checkpoint."""
        self.awake = True
        self._scope = trio.CancelScope()
        self._task = trio.lowlevel.spawn_system_task(self._run, self._scope, name=PINGER_NAME)

    def stop(self) -> None:
        """The pool is closed.  Not a checkpoint."""
        if self._scope is not None and self._task is not None:
            self._task.name = f"{PINGER_NAME} that is closed"
            self._scope.cancel(reason="the pool was closed")

    async def _run(self, scope: trio.CancelScope) -> None:
        try:
            with scope:
                # The first call may have ended by now.  The next ones must not start a task each: stay for a while in any case.
                due: float | None = self._look() or self._next_look()
                while due is not None:
                    await trio.sleep_until(due)
                    await last_look()
                    due = self._look()
        finally:
            self._scope = self._task = None
            self._silences = {}
            self.awake = False

    def _next_look(self) -> float:
        assert self._interval is not None
        return trio.current_time() + self._interval / _LOOKS

    def _look(self) -> float | None:
        """Ping whom it is time to ping, and give up those that are dead; returns when to look again, None if there is no call."""
        assert self._interval is not None
        assert self._timeout is not None
        now = trio.current_time()
        before, self._silences = self._silences, {}
        again: float | None = None
        dead = []
        for comm in self._policy.busy:
            if not comm.pings:
                continue
            if again is None:
                again = self._next_look()
            if not comm.reading:
                continue  # it is sending, or its user has not asked for the next item: nobody could see an answer
            silence = before.get(comm)
            if silence is None or silence.id != comm.last_id:
                silence = Silence(comm, comm.last_id, now)
            self._silences[comm] = silence
            due = silence.look(now, self._interval, self._timeout)
            if due == -math.inf:
                dead.append(comm)
            else:
                again = min(again, due)
        for comm in dead:
            comm.give_up(CommClosedError(f"it has not answered a ping for {self._timeout} s (Limits.ping_timeout)"))
        return again
