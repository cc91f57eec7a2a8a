"""Sweeps: the same scenario again and again, interrupted at every step, or cut at every byte."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import trio

from ._faults import FaultStream
from ._network import MemoryNetwork, Side, memory_network

__all__ = ["SweepError", "WireCut", "cancel_sweep", "wire_sweep"]


class SweepError(AssertionError):
    """A sweep found a step or byte at which the scenario breaks; the message says which, ``__cause__`` how."""


class _CancelAtStep(trio.abc.Instrument):
    """Cancels a scope just before the n-th step of one task."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, step: int) -> None:
        self._task = task
        self._scope = scope
        self._left = step
        self.fired = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task and not self.fired:
            self._left -= 1
            if self._left == 0:
                self.fired = True
                self._scope.cancel()


async def cancel_sweep(
    scenario: Callable[[], Awaitable[object]],
    *,
    check: Callable[[], Awaitable[object]] | None = None,
    limit: int = 2000,
) -> int:
    """Run a scenario once for every step that it has, cancelled at that step.

    The first run is cancelled before the first time that the scenario's task goes on after waiting, the next before the second, and so
    on until a run ends by itself.

    Args:
        scenario: runs in a task of its own, under a scope that is cancelled.  It may be cancelled anywhere; anything else that it
            raises is a finding.
        check: runs after each, not cancelled: say here what must hold, e.g. that the next call works.
        limit: give up after so many steps: the scenario never ends.

    Returns:
        How many runs were cancelled.

    Raises:
        SweepError: the scenario or the check raised; the message names the step.
    """
    for step in range(1, limit + 1):
        try:
            fired = await _cancelled_at(scenario, step)
            if check is not None:
                await check()
        except trio.Cancelled:
            raise
        except BaseException as error:
            raise SweepError(f"cancelled at step {step}: {error!r}") from error
        if not fired:
            return step - 1
    raise SweepError(f"the scenario did not end within {limit} steps")


async def _cancelled_at(scenario: Callable[[], Awaitable[object]], step: int) -> bool:
    instrument: _CancelAtStep | None = None

    async def run() -> None:
        nonlocal instrument
        with trio.CancelScope() as scope:
            instrument = _CancelAtStep(trio.lowlevel.current_task(), scope, step)
            trio.lowlevel.add_instrument(instrument)
            try:
                await scenario()
            finally:
                trio.lowlevel.remove_instrument(instrument)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, name="cancel_sweep scenario")
    assert instrument is not None
    return instrument.fired


@dataclass(frozen=True, slots=True)
class WireCut:
    """Where a wire is cut.

    Attributes:
        side: whose sending is cut: "client" or "server".
        after: after so many bytes.
        how: "eof" (both directions end, as when a process exits) or "reset" (as a TCP RST).
    """

    side: Side
    after: int
    how: Literal["eof", "reset"]


async def wire_sweep(
    scenario: Callable[[MemoryNetwork], Awaitable[object]],
    *,
    check: Callable[[MemoryNetwork], Awaitable[object]] | None = None,
    allowed: type[BaseException] | tuple[type[BaseException], ...] = (),
    patience: float = 60.0,
    every: int = 1,
) -> int:
    """Run a scenario over ``memory://`` once for every byte that it sends, with the first connection cut after that byte.

    Both directions are cut, by an end of the stream and by a reset.  Meant for the autojump clock, with which a hang costs no time.

    Args:
        scenario: is given the network; everything that it starts it must end.
        check: runs after each, with the wires whole again, e.g. to see that the server still serves.
        allowed: what the scenario may raise when its wire is cut.
        patience: seconds of (virtual) time after which a run is a hang.
        every: cut only after each so many bytes, for scenarios that send many.

    Returns:
        How many cuts were made.

    Raises:
        SweepError: a hang, another exception, or a failed check; the message names the cut.
    """
    cuts = 0
    for side in ("client", "server"):
        for how in ("eof", "reset"):
            after = 0
            while True:
                cut = WireCut(side, after, how)  # type: ignore[arg-type]  # the loops go over the literals
                if not await _cut_at(cut, scenario, check, allowed, patience):
                    break
                cuts += 1
                after += every
    return cuts


async def _cut_at(
    cut: WireCut,
    scenario: Callable[[MemoryNetwork], Awaitable[object]],
    check: Callable[[MemoryNetwork], Awaitable[object]] | None,
    allowed: type[BaseException] | tuple[type[BaseException], ...],
    patience: float,
) -> bool:
    fault: FaultStream | None = None

    def wrap(stream: trio.abc.Stream, side: Side) -> trio.abc.Stream:
        nonlocal fault
        if side == cut.side and fault is None:
            fault = FaultStream(stream, cut_after=cut.after, cut=cut.how)
            return fault
        return stream

    try:
        with memory_network() as network:
            network.wrap = wrap
            with trio.move_on_after(patience) as scope:
                try:
                    await scenario(network)
                except allowed:
                    pass
            if scope.cancelled_caught:
                raise SweepError(f"it hung for {patience} s")
            network.wrap = None
            if check is not None:
                await check(network)
    except trio.Cancelled:
        raise
    except BaseException as error:
        raise SweepError(f"{cut}: {error!r}") from error
    return fault is not None and fault.was_cut
