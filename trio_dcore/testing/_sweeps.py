"""Sweeps: the same scenario again and again, interrupted at every step, or cut at every byte."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import trio

from .._util import leaves
from ._faults import FaultStream, How
from ._leaks import Inventory, LeakError
from ._network import MemoryNetwork, Side, memory_network

__all__ = ["SweepError", "WireCut", "cancel_sweep", "wire_sweep"]

_log = logging.getLogger("trio_dcore.testing")


class SweepError(AssertionError):
    """A sweep found a step or byte at which the scenario breaks; the message says which, ``__cause__`` how."""


class _CancelAtStep(trio.abc.Instrument):
    """Cancels a scope just before the n-th step that any task makes, or only one."""

    def __init__(self, task: trio.lowlevel.Task | None, scope: trio.CancelScope, step: int) -> None:
        self._task = task
        self._scope = scope
        self._left = step
        self.fired = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self.fired and (self._task is None or task is self._task):
            self._left -= 1
            if self._left == 0:
                self.fire()

    def fire(self) -> None:
        self.fired = True
        self._scope.cancel(reason="cancel_sweep has come to its step")


async def cancel_sweep(
    scenario: Callable[[], Awaitable[object]],
    *,
    check: Callable[[], Awaitable[object]] | None = None,
    steps: Literal["all", "own"] = "all",
    patience: float = 60.0,
    limit: int = 2000,
) -> int:
    """Run a scenario once for every step that it has, cancelled at that step.

    Run 0 is cancelled before it begins, run 1 before the first step that a task makes after the scenario has had to wait, run 2
    before the second, and so on until a run ends by itself.  After each run, and its check, there must be no task, descriptor or
    connection of a memory network that was not there before.

    Args:
        scenario: runs in a task of its own, under a scope that is cancelled.  It may be cancelled anywhere; anything else that it
            raises is a finding.
        check: runs after each, not cancelled: say here what must hold, e.g. that the next call works.
        steps: "all" counts the steps of every task, so that the scenario is also cancelled at each moment of what others, such
            as a server, do for it while it waits; "own" counts only those of the scenario's task.
        patience: seconds after which a run is a hang.
        limit: give up after so many steps: the scenario never ends.

    Returns:
        How many runs were cancelled, run 0 included.

    Raises:
        SweepError: the scenario or the check raised, hung or left something behind; the message names the step.
    """
    for step in range(limit + 1):
        before = Inventory()
        try:
            fired = await _cancelled_at(scenario, step, steps == "own", patience)
            if check is not None:
                with _no_hang("the check", patience):
                    await check()
            await _nothing_left(before)
        except BaseException as error:
            _raise_if_not_ours(error)
            raise SweepError(f"cancelled at step {step}: {_said(error)}") from error
        if not fired:
            return step
    raise SweepError(f"the scenario did not end within {limit} steps")


async def _cancelled_at(scenario: Callable[[], Awaitable[object]], step: int, own: bool, patience: float) -> bool:
    instrument: _CancelAtStep | None = None
    done = trio.Event()

    async def run() -> None:
        nonlocal instrument
        task = trio.lowlevel.current_task()
        try:
            with trio.CancelScope() as scope:
                instrument = _CancelAtStep(task if own else None, scope, step)
                if step == 0:
                    instrument.fire()
                trio.lowlevel.add_instrument(instrument)
                try:
                    await scenario()
                finally:
                    trio.lowlevel.remove_instrument(instrument)
        finally:
            done.set()

    async def watch(task: trio.lowlevel.Task) -> None:
        with trio.move_on_after(patience):
            await done.wait()
            return
        stack = "".join(traceback.StackSummary.extract(task.iter_await_frames()).format())
        # It can't be abandoned, and may never end: this is what can be seen of it then.
        _log.error("cancelled at step %d, the scenario has not ended for %s s:\n%s", step, patience, stack)
        raise SweepError(f"it hung for {patience} s at\n{stack}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, name="cancel_sweep scenario")
        (task,) = nursery.child_tasks
        nursery.start_soon(watch, task, name="cancel_sweep patience")
    assert instrument is not None
    return instrument.fired


@dataclass(frozen=True, slots=True)
class WireCut:
    """Where a wire is cut.

    Attributes:
        side: whose sending is cut: "client" or "server".
        after: after so many bytes.
        how: "eof" (both directions end, as when a process exits) or "reset" (as a TCP RST).
        when: "sent": as soon as the last of these bytes was sent; "next": when one more is to follow, which makes a difference
            only between two messages.
    """

    side: Side
    after: int
    how: How
    when: Literal["sent", "next"] = "sent"


async def wire_sweep(
    scenario: Callable[[MemoryNetwork], Awaitable[object]],
    *,
    check: Callable[[MemoryNetwork], Awaitable[object]] | None = None,
    allowed: type[BaseException] | tuple[type[BaseException], ...] = (),
    patience: float = 60.0,
    every: int = 1,
    first: int = 0,
) -> int:
    """Run a scenario over ``memory://`` once for every byte that it sends, with the first connection cut after that byte.

    Both directions are cut, by an end of the stream and by a reset.  Meant for the autojump clock, with which a hang costs no
    time.  After each run, and its check, there must be no task, descriptor or open connection that was not there before.

    Args:
        scenario: is given the network; everything that it starts it must end.
        check: runs after each, in the same network with the wires whole again.
        allowed: what the scenario may raise when its wire is cut.
        patience: seconds of (virtual) time after which a run is a hang.
        every: cut only after each so many bytes, for scenarios that send many.
        first: cut after so many bytes and more, for scenarios that begin as others, whose sweep has cut that: all have a handshake.

    Returns:
        How many cuts were made.

    Raises:
        SweepError: a hang, another exception, a failed check, or something left behind; the message names the cut.
    """
    cuts = 0
    for cut in _starts(first):
        while True:
            fault = await _cut_at(cut, scenario, check, allowed, patience)
            if fault is None or not fault.was_cut:
                break
            cuts += 1
            if fault.cut_between:
                later = WireCut(cut.side, cut.after, cut.how, "next")
                fault = await _cut_at(later, scenario, check, allowed, patience)
                cuts += fault is not None and fault.was_cut
            cut = WireCut(cut.side, cut.after + every, cut.how)
    return cuts


def _starts(first: int) -> Iterator[WireCut]:
    sides: tuple[Side, ...] = ("client", "server")
    ways: tuple[How, ...] = ("eof", "reset")
    for side in sides:
        for how in ways:
            yield WireCut(side, first, how)


async def _cut_at(
    cut: WireCut,
    scenario: Callable[[MemoryNetwork], Awaitable[object]],
    check: Callable[[MemoryNetwork], Awaitable[object]] | None,
    allowed: type[BaseException] | tuple[type[BaseException], ...],
    patience: float,
) -> FaultStream | None:
    fault: FaultStream | None = None

    def wrap(stream: trio.abc.Stream, side: Side) -> trio.abc.Stream:
        nonlocal fault
        if side == cut.side and fault is None:
            fault = FaultStream(stream, cut_after=cut.after, cut=cut.how, cut_when=cut.when)
            return fault
        return stream

    try:
        with memory_network() as network:
            before = Inventory()
            network.wrap = wrap
            with _no_hang("it", patience):
                try:
                    await scenario(network)
                except allowed:
                    pass
            network.wrap = None
            if check is not None:
                with _no_hang("the check", patience):
                    await check(network)
            await _nothing_left(before)
    except BaseException as error:
        _raise_if_not_ours(error)
        raise SweepError(f"{cut}: {_said(error)}") from error
    return fault


class _no_hang:  # reads as a phrase
    """A block that must end within a time."""

    def __init__(self, what: str, patience: float) -> None:
        self._what = what
        self._patience = patience
        self._scope = trio.CancelScope()

    def __enter__(self) -> None:
        self._scope = trio.move_on_after(self._patience)
        self._scope.__enter__()

    def __exit__(self, *error: object) -> bool:
        swallowed = self._scope.__exit__(*error)  # type: ignore[arg-type]  # the three that Python gives
        if self._scope.cancelled_caught:
            raise SweepError(f"{self._what} hung for {self._patience} s")
        return swallowed


async def _nothing_left(before: Inventory) -> None:
    if before.added():  # which takes a good part of a short run's time
        await before.settle()
        if left := before.added():
            raise LeakError("\n".join(left))


def _raise_if_not_ours(error: BaseException) -> None:
    """Re-raise what is no finding: somebody cancels the sweep, or ends the program."""
    exits = any(isinstance(leaf, (KeyboardInterrupt, SystemExit)) for leaf in leaves(error))
    if exits or trio.current_effective_deadline() == -math.inf:
        raise error


def _said(error: BaseException) -> str:
    """The error for a message: a group with a single leaf as that leaf, and what is for reading without its type."""
    found = list(leaves(error))
    if len(found) == 1:
        error = found[0]
    return str(error) if isinstance(error, (SweepError, LeakError)) else repr(error)
