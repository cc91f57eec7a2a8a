"""The reference tests can fail: each of these broken servers and clients is noticed, by the tests that docs/shutdown-controls.md names."""

from __future__ import annotations

import gc
import inspect
import re
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.reference import kit
from tests.reference.controls import CONTROLS, Catch, Control
from trio_dcore._util import leaves

DOC = Path(__file__).parent.parent.parent / "docs" / "shutdown-controls.md"
# Where a broken server makes a test hang it is cancelled after so many seconds by its own clock ...
VIRTUAL_PATIENCE = 100_000.0
REAL_PATIENCE = 2.0
UNBROKEN_PATIENCE = 60.0
# ... or, since a test that polls never lets virtual time pass, after so many steps of its tasks.
STEPS = 50_000


class Hang(AssertionError):
    """A test that did not end by itself."""


class StepLimit(trio.abc.Instrument):
    """Cancels a scope when the tasks of the run have made so many steps."""

    def __init__(self, scope: trio.CancelScope) -> None:
        self.left = STEPS
        self._scope = scope

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.left -= 1
        if self.left == 0:
            self._scope.cancel(reason="too many steps")


class Watch:
    """In the place of ``kit.run``: a test that hangs is cancelled, and that is remembered."""

    def __init__(self, patience: float) -> None:
        self.hung = False
        self._patience = patience
        self._run = kit.run

    def run(self, body: kit.Body, transport: str, log: Any = None, *, real: bool = False) -> None:
        async def watched(wire: kit.Wire) -> None:
            # Not a cancel scope with a deadline: that would travel with every call.
            async with trio.open_nursery() as nursery:
                limit = StepLimit(nursery.cancel_scope)
                if wire.virtual:
                    trio.lowlevel.add_instrument(limit)
                nursery.start_soon(self._give_up, nursery, VIRTUAL_PATIENCE if wire.virtual else self._patience)
                try:
                    await body(wire)
                finally:
                    if wire.virtual:
                        trio.lowlevel.remove_instrument(limit)
                    self.hung = self.hung or limit.left <= 0
                    nursery.cancel_scope.cancel()

        self._run(watched, transport, log, real=real)

    async def _give_up(self, nursery: trio.Nursery, patience: float) -> None:
        await trio.sleep(patience)
        self.hung = True
        nursery.cancel_scope.cancel(reason="the test hangs")


@contextmanager
def nothing_seen() -> Iterator[None]:
    """What a broken server leaves behind is collected here, and is no other test's business."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
            gc.collect()
    finally:
        sys.unraisablehook = hook


def failure(catch: Catch, caplog: pytest.LogCaptureFixture, patience: float) -> str:
    """How a reference test fails; empty if it passes."""
    test = catch.function
    available = {"transport": catch.transport, "caplog": caplog, **dict(catch.arguments)}
    arguments = {name: available[name] for name in inspect.signature(test).parameters}
    watch = Watch(patience)
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch, nothing_seen():
        patch.setattr(kit, "run", watch.run)
        try:
            test(**arguments)
        except BaseException as error:
            found = [f"{type(leaf).__name__}: {leaf}" for leaf in leaves(error)]
        else:
            found = []
    if watch.hung:
        found.insert(0, "hang: it did not end by itself")
    return "\n".join(found)


CATCHES = {(catch.test, catch.transport, catch.arguments): catch for each in CONTROLS.values() for catch in each.catches}


@pytest.mark.parametrize("catch", CATCHES.values(), ids=lambda catch: f"{catch.test}-{catch.transport}")
def test_passes_where_nothing_is_broken(catch: Catch, caplog: pytest.LogCaptureFixture) -> None:
    assert failure(catch, caplog, UNBROKEN_PATIENCE) == ""


@pytest.mark.parametrize("control", CONTROLS.values(), ids=lambda control: control.name)
def test_is_caught(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    assert control.catches
    for catch in control.catches:
        with pytest.MonkeyPatch.context() as patch:
            control.install(patch)
            said = failure(catch, caplog, REAL_PATIENCE)
        print("@@", control.name, catch.test, catch.transport, "=>", said or "NOT CAUGHT")
