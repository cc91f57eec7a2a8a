"""Who gets which comm: the decisions of a connection pool, all of them synchronous.

Nothing here does I/O or waits.  The pool (:mod:`._pool`) asks, and closes, connects and wakes as it is told.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field

import trio

from ..comm import BaseComm

__all__ = ["PoolPolicy", "Slot", "Waiter"]


class Slot:
    """The right to make one comm."""

    __slots__ = ("address", "op", "scope")

    def __init__(self, address: str, op: str) -> None:
        self.address = address
        self.op = op
        #: Round the connecting, so that closing the pool can end it.
        self.scope = trio.CancelScope()


@dataclass(eq=False, slots=True)
class Waiter:
    """A call that waits: it is woken with a comm, with a slot, or with neither because the pool has closed."""

    address: str
    op: str
    woken: trio.Event = field(default_factory=trio.Event)
    comm: BaseComm | None = None
    slot: Slot | None = None


class PoolPolicy:
    """At most ``limit`` comms are open: in use, idle, or being connected.

    Attributes:
        limit: the most that may be open.
        idle: comms that may be reused, by address; the most recent is last, and is used first.
        busy: comms in use, with the address and op of the call they are used for.
        connecting: slots whose comm isn't there yet.
        waiters: calls that wait, in order.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.idle: dict[str, list[BaseComm]] = {}
        self.idle_since: dict[BaseComm, tuple[str, float]] = {}  # the longest idle first
        self.busy: dict[BaseComm, tuple[str, str]] = {}
        self.connecting: set[Slot] = set()
        self.waiters: deque[Waiter] = deque()

    @property
    def open(self) -> int:
        """Comms that exist or are being made."""
        return len(self.busy) + len(self.idle_since) + len(self.connecting)

    def reuse(self, address: str, op: str) -> BaseComm | None:
        """Take the most recently used idle comm for an address; the caller must see whether it still lives."""
        comms = self.idle.get(address)
        if not comms:
            return None
        comm = comms.pop()
        del self.idle_since[comm]
        self.busy[comm] = address, op
        return comm

    def reserve(self, address: str, op: str) -> tuple[Slot | None, BaseComm | None]:
        """Take a slot for a new comm: (the slot, an idle comm to close for it), or (None, None) if all are in use."""
        evicted = None
        if self.open >= self.limit:
            if not self.idle_since:
                return None, None
            evicted = next(iter(self.idle_since))
            self.forget_idle(evicted)
        slot = Slot(address, op)
        self.connecting.add(slot)
        return slot, evicted

    def connected(self, slot: Slot, comm: BaseComm) -> None:
        """The slot's comm is there and in use."""
        self.connecting.discard(slot)
        self.busy[comm] = slot.address, slot.op

    def release(self, comm: BaseComm, now: float, *, last: bool = False) -> BaseComm | None:
        """A call has ended and its comm may be used again; returns the comm if it is to be closed instead.

        Args:
            comm: the comm.
            now: the time.
            last: use this one only when there is no other idle comm for its address.
        """
        used_for = self.busy.pop(comm, None)
        if used_for is None:
            return comm  # removed while it was in use
        address = used_for[0]
        if self.waiters:
            waiter = self._next_waiter()
            if waiter.address == address:
                waiter.comm = comm
                self.busy[comm] = waiter.address, waiter.op
                return None
            self._give_slot(waiter)
            return comm
        comms = self.idle.get(address)
        if comms is None:
            self.idle[address] = [comm]
        elif last:
            comms.insert(0, comm)
        else:
            comms.append(comm)
        self.idle_since[comm] = address, now
        return None

    def discard(self, comm: BaseComm) -> None:
        """A comm was closed, or is about to be; its slot is free."""
        used_for = self.busy.pop(comm, None)
        if used_for is not None:
            self._forget_if_empty(used_for[0])
            self._freed()

    def replace(self, comm: BaseComm) -> Slot | None:
        """A comm that was handed to a waiting call had died meanwhile: the slot for another, None if it isn't the call's any more."""
        used_for = self.busy.pop(comm, None)
        if used_for is None:
            return None
        self._forget_if_empty(used_for[0])
        slot = Slot(*used_for)
        self.connecting.add(slot)
        return slot

    def cancel_connecting(self, slot: Slot) -> None:
        """No comm came of the slot; it is free."""
        if slot in self.connecting:
            self.connecting.discard(slot)
            self._freed()

    def give_up(self, waiter: Waiter) -> BaseComm | None:
        """A waiting call has been cancelled or lost patience; what it was given meanwhile goes on to the next.

        Returns a comm that is to be released by the caller.
        """
        if waiter in self.waiters:
            self.waiters.remove(waiter)
        elif waiter.comm is not None:
            return waiter.comm
        elif waiter.slot is not None:
            self.cancel_connecting(waiter.slot)
        return None

    def forget_idle(self, comm: BaseComm) -> None:
        """An idle comm is to be closed.  (No call waits while there is one: it would have been closed for that.)"""
        address, _ = self.idle_since.pop(comm)
        self.idle[address].remove(comm)
        self._forget_if_empty(address)

    def expired(self, before: float) -> list[BaseComm]:
        """The idle comms that have been so since a time, or for longer."""
        ordered = itertools.takewhile(lambda item: item[1][1] <= before, self.idle_since.items())
        return [comm for comm, _ in ordered]

    def holders(self) -> dict[str, int]:
        """How many slots each op holds."""
        counts: dict[str, int] = {}
        ops = [op for _, op in self.busy.values()] + [slot.op for slot in self.connecting]
        for op in ops:
            counts[op] = counts.get(op, 0) + 1
        return counts

    def _forget_if_empty(self, address: str) -> None:
        # Left alone when its last comm is taken for a call, which nearly always brings it back.
        if not self.idle.get(address, True):
            del self.idle[address]

    def _freed(self) -> None:
        if self.waiters and self.open < self.limit:
            self._give_slot(self._next_waiter())

    def _give_slot(self, waiter: Waiter) -> None:
        waiter.slot = Slot(waiter.address, waiter.op)
        self.connecting.add(waiter.slot)

    def _next_waiter(self) -> Waiter:
        waiter = self.waiters.popleft()
        waiter.woken.set()
        return waiter
