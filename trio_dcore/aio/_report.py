"""Naming the asyncio tasks that go on although they have been cancelled.  They are waited for, never abandoned."""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
import types
from collections.abc import Iterator
from typing import Any

import trio

__all__ = ["report_asyncio_task", "report_trio_task", "stack_of"]

_log = logging.getLogger("trio_dcore.aio")


def report_asyncio_task(task: asyncio.Task[Any], name: str = "the bridge") -> None:
    """Log that ``task`` goes on although it was cancelled, with its name and stack."""
    _log.warning("%s waits for an asyncio task that does not end: %s\n%s", name, task.get_name(), stack_of(task.get_coro()))


def report_trio_task(task: trio.lowlevel.Task, name: str = "the bridge") -> None:
    """Likewise of a trio task."""
    _log.warning("%s waits for a trio task that does not end: %s\n%s", name, task.name, stack_of(task.coro))
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            report_trio_task(child, name)


def stack_of(awaitable: Any) -> str:
    """Where a suspended coroutine waits, outermost frame first; empty if it doesn't tell."""
    return "".join(traceback.StackSummary.extract(_frames(awaitable)).format())


def _frames(awaitable: Any) -> Iterator[tuple[types.FrameType, int]]:
    # asyncio's Task.get_stack() shows the outermost coroutine only.
    while awaitable is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(awaitable, f"{kind}_frame", None)
            if frame is not None:
                yield frame, frame.f_lineno
                awaitable = getattr(awaitable, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
                break
        else:
            # A step of an async generator, or what __await__ has made of a coroutine: neither shows whose it is.
            kinds = (types.AsyncGeneratorType, types.CoroutineType)
            awaitable = next((each for each in gc.get_referents(awaitable) if isinstance(each, kinds)), None)
