"""The reference tests can fail: each of these broken servers and clients is noticed, by the tests that docs/shutdown-controls.md names."""

from __future__ import annotations

import gc
import inspect
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.reference import kit
from tests.reference.controls import CONTROLS, Catch, Control
from trio_dcore._util import leaves

DOC = Path(__file__).parent.parent.parent / "docs" / "shutdown-controls.md"
# Where a broken server makes a test hang, that is ended after so many seconds: of virtual time, and of real time, which also passes
# for a test that polls, so that virtual time stands still.
VIRTUAL_PATIENCE = 100_000.0
PATIENCE = 2.0
UNBROKEN_PATIENCE = 60.0


class RealTime(trio.abc.Instrument):
    """Calls back, once, when a task makes a step after so many real seconds."""

    def __init__(self, seconds: float, give_up: Callable[[], None]) -> None:
        self._deadline = time.monotonic() + seconds
        self._give_up = give_up

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if time.monotonic() > self._deadline:
            self._deadline = math.inf
            self._give_up()


class Watch:
    """In the place of ``kit.run``: a test that hangs is cancelled, and that is remembered.

    Attributes:
        hung: whether that has happened.
    """

    def __init__(self, patience: float) -> None:
        self.hung = False
        self._patience = patience
        self._run = kit.run

    def run(self, body: kit.Body, transport: str, log: Any = None, *, real: bool = False) -> None:
        async def watched(wire: kit.Wire) -> None:
            def give_up() -> None:
                self.hung = True
                nursery.cancel_scope.cancel(reason="the test hangs")

            async def wait() -> None:
                await trio.sleep(VIRTUAL_PATIENCE if wire.virtual else self._patience)
                give_up()

            # Not a cancel scope with a deadline: that would travel with every call.
            async with trio.open_nursery() as nursery:
                instrument = RealTime(self._patience, give_up)
                trio.lowlevel.add_instrument(instrument)
                nursery.start_soon(wait)
                try:
                    await body(wire)
                finally:
                    trio.lowlevel.remove_instrument(instrument)
                    nursery.cancel_scope.cancel()

        self._run(watched, transport, log, real=real)


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
            said = failure(catch, caplog, PATIENCE)
        print("@@", control.name, catch.test, catch.transport, "=>", said or "NOT CAUGHT")
