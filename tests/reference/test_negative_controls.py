"""The reference tests can fail: broken servers and clients are caught, each by the tests that docs/shutdown-controls.md names."""

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

from tests.reference import controls_bridge, controls_clients, controls_limits, controls_servers, kit  # noqa: F401  # which fill CONTROLS
from tests.reference.controls import CONTROLS, Catch, Control

DOC = Path(__file__).parent.parent.parent / "docs" / "shutdown-controls.md"
# Where something broken makes a test hang, that is ended after so many seconds of its time.
VIRTUAL_PATIENCE = 100_000.0
PATIENCE = 2.0
# Where a hang is what is to be seen, there is nothing to wait for.
BRIEF_PATIENCE = 0.7
UNBROKEN_PATIENCE = 60.0
# For a test that polls virtual time stands still.  It is ended after so many times its patience in real time; nothing else takes as long.
POLLING = 10

CATCHES = {(catch.name, catch.transport, catch.arguments): catch for each in CONTROLS.values() for catch in each.catches}
# All of them run unbroken elsewhere; that they do so in a Watch, too, is shown here.  On a real clock one of each module is enough.
UNBROKEN = {(catch.module, catch.transport if catch.transport in "tul" else key): catch for key, catch in CATCHES.items()}


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

    def run(self, body: kit.Body, transport: str, log: Any = None, *, real: bool = False, trusted: bool = True) -> None:
        """Run a body as the kit does."""

        async def watched(wire: kit.Wire) -> None:
            def give_up() -> None:
                self.hung = True
                nursery.cancel_scope.cancel(reason="the test hangs")

            async def wait() -> None:
                await trio.sleep(VIRTUAL_PATIENCE if wire.virtual else self._patience)
                give_up()

            # Not a cancel scope with a deadline: that would travel with every call.
            async with trio.open_nursery() as nursery:
                instrument = RealTime(POLLING * self._patience, give_up)
                trio.lowlevel.add_instrument(instrument)
                nursery.start_soon(wait)
                try:
                    await body(wire)
                finally:
                    trio.lowlevel.remove_instrument(instrument)
                    nursery.cancel_scope.cancel()

        self._run(watched, transport, log, real=real, trusted=trusted)


@contextmanager
def nothing_seen() -> Iterator[None]:
    """What something broken leaves behind is collected here, and is no other test's business."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
            gc.collect()
    finally:
        sys.unraisablehook = hook


def said(error: BaseException) -> list[str]:
    """What an exception says: the leaves of groups, and the groups as well if they are not those of trio's nurseries."""
    this = [f"{type(error).__name__}: {error}"]
    if not isinstance(error, BaseExceptionGroup):
        return this
    inner = [line for each in error.exceptions for line in said(each)]
    return inner if "Exceptions from Trio nursery" in error.message else this + inner


def failure(test: Callable[..., None], patience: float, **available: Any) -> str:
    """How a test fails, run with those of the arguments that it takes; empty if it passes."""
    arguments = {name: available[name] for name in inspect.signature(test).parameters}
    available["caplog"].clear()
    watch = Watch(patience)
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch, nothing_seen():
        patch.setattr(kit, "run", watch.run)
        try:
            test(**arguments)
        except BaseException as error:  # what fails in pytest is none, and neither is a SystemExit that got through
            found = said(error)
    if watch.hung:
        found.insert(0, "hang: it did not end by itself")
    return "\n".join(found)


def outcome(catch: Catch, patience: float, caplog: pytest.LogCaptureFixture) -> str:
    """The same for the test of a control."""
    return failure(catch.function, patience, transport=catch.transport, caplog=caplog, **dict(catch.arguments))


@pytest.mark.parametrize("catch", UNBROKEN.values(), ids=lambda catch: f"{catch.name}-{catch.transport}")
def test_passes_where_nothing_is_broken(catch: Catch, caplog: pytest.LogCaptureFixture) -> None:
    assert outcome(catch, UNBROKEN_PATIENCE, caplog) == ""


@pytest.mark.parametrize("control", CONTROLS.values(), ids=lambda control: control.name)
def test_is_caught(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    assert control.catches
    for catch in control.catches:
        with pytest.MonkeyPatch.context() as patch:
            control.install(patch)
            how = outcome(catch, BRIEF_PATIENCE if catch.says.startswith("hang: ") else PATIENCE, caplog)
        assert how, f"{catch.test} passes"
        assert re.search(catch.says, how), f"{catch.test} fails for another reason: {how}"


# -- what shows that, can fail, too ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["m", "t"])
def test_a_hang_is_ended(transport: str, caplog: pytest.LogCaptureFixture) -> None:
    async def waits(wire: kit.Wire) -> None:
        await trio.sleep_forever()

    async def polls(wire: kit.Wire) -> None:
        while True:
            await trio.lowlevel.checkpoint()

    for body in (waits, polls):

        def test(transport: str, body: kit.Body = body) -> None:
            kit.run(body, transport)

        assert failure(test, 0.1, transport=transport, caplog=caplog, body=body).startswith("hang")


# -- the table -------------------------------------------------------------------------------------------------------------------


def rows() -> list[tuple[str, str, str]]:
    """The rows of the tables: control, what is broken, the tests."""
    found = []
    for line in DOC.read_text(encoding="utf-8").splitlines():
        if re.match(r"\| `\w+` \|", line):
            name, broken, tests = (cell.strip() for cell in line.strip().strip("|").split("|"))
            found.append((name.strip("`"), broken, tests))
    return found


def test_the_tables_are_as_the_controls_are() -> None:
    assert len(CONTROLS) >= 14
    assert sorted(rows()) == sorted(
        (each.name, each.broken, " ".join(dict.fromkeys(f"`{catch.test}`" for catch in each.catches)))
        for each in CONTROLS.values()
    )


def test_those_that_catch_are_reference_tests() -> None:
    assert all(callable(catch.function) for catch in CATCHES.values())  # their modules are imported then
    reference = {test for row in kit.COVERED.values() for tests in row.values() for test in tests}
    named = {f"tests.reference.{catch.module}.test_{catch.name}" for catch in CATCHES.values()}
    assert named <= reference
