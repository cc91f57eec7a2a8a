"""Broken bridges to asyncio; see controls.py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from tests.reference.controls import by, control, wrap
from trio_dcore.aio import _carry as carry
from trio_dcore.aio import _handler as handlers
from trio_dcore.aio import _strays as strays
from trio_dcore.aio._carry import Carried
from trio_dcore.aio._strays import Strays

SWALLOWS = "l01_a_coroutine_that_swallows_is_cancelled_again_and_named"
STRAY = "l04_one_that_does_not_end_is_named_and_not_abandoned"


@control(
    "A scope that cancels a coroutine doesn't wait for its end.",
    by("l01_a_scope_cancels_a_coroutine", "t", "started.*finally"),
    by("l01_what_cancels_a_handler_cancels_its_coroutine", "t", "started"),
)
def abandons_coroutines(patch: pytest.MonkeyPatch) -> None:
    async def run_in_asyncio(loop: Any, fn: Callable[..., Awaitable[Any]], *args: Any, redeliver: float) -> Any:
        ended = trio.Event()
        task = loop.create_task(fn(*args))
        task.add_done_callback(lambda _: ended.set())
        try:
            await ended.wait()
        except trio.Cancelled:
            task.cancel()
            raise
        return task.result()

    patch.setattr(handlers, "run_in_asyncio", run_in_asyncio)


@control("A coroutine that swallows its cancellation is not cancelled again.", by(SWALLOWS, "t", "hang: "))
def cancels_coroutines_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Carried, "_again", lambda carried: None)


@control(
    "Nobody is told of coroutines and asyncio tasks that don't end.",
    by(SWALLOWS, "t", "assert 0 == 2"),
    by(STRAY, "t", "assert 0 == 2"),
)
def does_not_name_what_does_not_end(patch: pytest.MonkeyPatch) -> None:
    for module in (carry, strays):
        patch.setattr(module, "report_asyncio_task", lambda *args: None)


@control(
    "A coroutine that ends by the cancellation of a scope is an error.",
    by("l01_a_scope_cancels_a_coroutine", "t", "RuntimeError: .* nobody on the other side"),
    by("l01_a_scope_round_the_loop", "t", "RuntimeError: .* nobody on the other side"),
)
def takes_cancellations_for_errors(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Carried, "result")
    def result(original: Any, carried: Carried) -> Any:
        carried._raise_cancel = None
        return original(carried)


@control("Stray asyncio tasks are cancelled once when the loop closes.", by(STRAY, "t", "hang: |swallowed"))
def cancels_strays_once(patch: pytest.MonkeyPatch) -> None:
    async def end(self: Strays, *, carried: bool) -> None:
        """trio-asyncio does that."""
        await trio.lowlevel.checkpoint()

    patch.setattr(Strays, "end", end)


@control("A missing loop is not looked for.", by("l04_a_missing_loop_is_a_clear_error", "t", "no running event loop"))
def does_not_miss_the_loop(patch: pytest.MonkeyPatch) -> None:
    def running_loop() -> asyncio.AbstractEventLoop | None:
        return None

    patch.setattr(handlers, "running_loop", running_loop)
