"""Naming the tasks that go on although they have been cancelled.  They are waited for, never abandoned."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Collection
from typing import TYPE_CHECKING

import trio

from ._drive import frames_of

if TYPE_CHECKING:
    from ._server import BaseServer

__all__ = ["report_stragglers"]

_log = logging.getLogger("trio_dcore.server")

# How often, in seconds.
_EVERY = 1.0


async def report_stragglers(server: BaseServer) -> None:
    """Say every second what still runs a second after it was cancelled, until cancelled."""
    await server.shutdown_requested.wait()
    due = trio.current_time() + _EVERY
    while True:
        await trio.sleep_until(due)
        # A second after the cut, not after the stop: before it there is nothing that should have ended.  The cut may come earlier
        # than it was to be, so look every second.
        now, first = trio.current_time(), server._deadline + _EVERY
        due = now + _EVERY if now >= first else min(now + _EVERY, first)
        if now >= first and server._connection_tasks is not None:
            _report(server.name, server._connection_tasks.child_tasks)


def _report(name: str, tasks: Collection[trio.lowlevel.Task]) -> None:
    for task in tasks:
        stack = "".join(traceback.StackSummary.extract(frames_of(task)).format())
        _log.warning("%s waits for a task that does not end: %s\n%s", name, task.name, stack)
        for nursery in task.child_nurseries:
            _report(name, nursery.child_tasks)
