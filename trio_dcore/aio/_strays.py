"""The end of the asyncio tasks that are left when their loop closes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from typing import Any, NoReturn

import trio

from ._carry import is_carried
from ._report import report_asyncio_task, report_trio_task

__all__ = ["Strays", "report_tasks"]

_NAME = "open_loop()"
# How often, in seconds, what does not end is named.
_EVERY = 1.0
# So many times tasks that were started meanwhile are cancelled.  What is always started anew, as by a callback that restarts whatever
# ends, would go on for ever.
_MOST_GENERATIONS = 1000


class Strays:
    """Ends the asyncio tasks of a loop.

    Args:
        loop: the bridge's.
        redeliver: seconds after which a task that has not ended is cancelled again.
    """

    def __init__(self, loop: Any, redeliver: float) -> None:
        self._loop = loop
        self._redeliver = redeliver
        self._due: dict[asyncio.Task[Any], float] = {}  # when to cancel it again, of each that has been

    async def end(self, *, carried: bool) -> None:
        """Cancel them, those that are started meanwhile as well, and wait until there are none.  May be cancelled and called again.

        Args:
            carried: also those that a trio task waits for.  They are that task's to cancel, so they come last.
        """
        generations = 0
        while True:
            tasks = self._tasks(carried)
            self._tell_failures()
            if tasks:
                if not tasks <= self._due.keys():
                    generations += 1
                    if generations == _MOST_GENERATIONS:
                        self._loop.set_task_factory(_refuse)
                self._cancel(tasks)
                await _wait(tasks, min(self._redeliver, _EVERY))
            else:
                await self._loop.synchronize()  # what has been scheduled may start more
                if not self._tasks(carried):
                    break
        if generations >= _MOST_GENERATIONS:
            self._loop.set_task_factory(None)  # what is still to be done in there needs tasks

    def _tasks(self, carried: bool) -> set[asyncio.Task[Any]]:
        return {task for task in asyncio.all_tasks(self._loop) if carried or not is_carried(task)}

    def _cancel(self, tasks: Collection[asyncio.Task[Any]]) -> None:
        now = trio.current_time()
        for task in tasks:
            due = self._due.get(task)
            if due is not None and (now >= due or math.isinf(self._redeliver)):
                report_asyncio_task(task, _NAME)
            if due is None or now >= due:
                self._due[task] = now + self._redeliver
                task.cancel("the asyncio loop closes")

    def _tell_failures(self) -> None:
        """As asyncio.run() does: nobody else will ask how they ended."""
        for task in [task for task in self._due if task.done()]:
            del self._due[task]
            if not is_carried(task) and not task.cancelled() and (error := task.exception()) is not None:
                message = "an asyncio task that was cancelled because its loop closes has failed"
                self._loop.call_exception_handler({"message": message, "exception": error, "task": task})

    async def end_generators(self) -> None:
        """Close the async generators that asyncio tasks have left suspended."""
        task = self._loop.create_task(self._loop.shutdown_asyncgens(), name="closing async generators")
        await _wait([task], self._redeliver)
        await self.end(carried=True)


def _refuse(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> NoReturn:
    """In place of making a task."""
    coroutine.close()
    raise RuntimeError("this asyncio loop closes, and tasks are started in it again and again: it takes no more")


async def _wait(tasks: Collection[asyncio.Task[Any]], seconds: float) -> None:
    """Wait until the tasks have ended, at most so long."""
    left = len(tasks)
    ended = trio.Event()

    def done(task: asyncio.Task[Any]) -> None:
        nonlocal left
        left -= 1
        if not left:
            ended.set()

    for task in tasks:
        task.add_done_callback(done)
    try:
        with trio.move_on_after(seconds):
            await ended.wait()
    finally:
        for task in tasks:
            task.remove_done_callback(done)


async def report_tasks(nursery: trio.Nursery) -> None:
    """Name the trio tasks of a nursery every second, until cancelled."""
    while True:
        await trio.sleep(_EVERY)
        for task in nursery.child_tasks:
            report_trio_task(task, _NAME)
