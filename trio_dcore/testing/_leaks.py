"""no_leaks(): what was there before is what is there after."""

from __future__ import annotations

import gc
import os
import sys
import threading
import warnings
from collections import Counter
from types import TracebackType
from typing import Any, Self

import trio

__all__ = ["LeakError", "no_leaks"]

# So trio names the threads that it keeps for a while for the next to_thread.run_sync.
_CACHED_THREADS = "Trio thread "
# Passes of the run's loop that tasks which are about to end get.
_SETTLE = 50


class LeakError(AssertionError):
    """Something was left behind; the message lists it."""


class no_leaks:  # noqa: N801  # reads as a phrase
    """Check that the block leaves nothing behind: ``async with no_leaks():`` in a trio program, ``with no_leaks():`` round one.

    Compared before and after: trio tasks, descriptors by what they refer to, threads (but for those that trio keeps for reuse) and
    asyncio tasks.  Watched meanwhile: exceptions that nobody could see, and ResourceWarnings.

    Raises:
        LeakError: at the end, unless the block raised.
    """

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        problems = self._stop()
        if error is None and problems:
            raise LeakError("\n".join(problems))

    async def __aenter__(self) -> Self:
        await trio.lowlevel.checkpoint()
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            # What has been cancelled or closed may need some passes of the loop to be gone; what is still there then stays.
            for _ in range(_SETTLE):
                if not self._differences():
                    break
                await trio.lowlevel.checkpoint()
        problems = self._stop()
        if error is None and problems:
            raise LeakError("\n".join(problems))

    def _start(self) -> None:
        gc.collect()
        self._unraisable: list[str] = []
        self._old_hook = sys.unraisablehook
        sys.unraisablehook = self._saw_unraisable
        self._catcher = warnings.catch_warnings(record=True)
        self._warnings: list[Any] = self._catcher.__enter__() or []
        warnings.simplefilter("always", ResourceWarning)
        self._before = _inventory()

    def _stop(self) -> list[str]:
        gc.collect()
        problems = self._differences()
        self._catcher.__exit__(None, None, None)
        sys.unraisablehook = self._old_hook
        problems += [f"ResourceWarning: {w.message}" for w in self._warnings if issubclass(w.category, ResourceWarning)]
        for other in self._warnings:
            if not issubclass(other.category, ResourceWarning):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
        return problems + self._unraisable

    def _saw_unraisable(self, unraisable: Any) -> None:
        self._unraisable.append(f"an exception that nobody could see: {unraisable.exc_value!r} in {unraisable.object!r}")

    def _differences(self) -> list[str]:
        after = _inventory()
        problems = []
        for what, count in (after - self._before).items():
            problems.append(f"left behind: {what}" + (f" ({count} of them)" if count > 1 else ""))
        return problems


def _inventory() -> Counter[str]:
    return _tasks() + _descriptors() + _threads() + _asyncio_tasks()


def _tasks() -> Counter[str]:
    try:
        root = trio.lowlevel.current_root_task()
    except RuntimeError:
        return Counter()
    found: Counter[str] = Counter()
    stack = [root] if root is not None else []
    while stack:
        task = stack.pop()
        if not task.name.startswith("trio."):
            found[f"task {task.name}"] += 1
        for nursery in task.child_nurseries:
            stack.extend(nursery.child_tasks)
    return found


def _descriptors() -> Counter[str]:
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    found: Counter[str] = Counter()
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in names:
        try:
            target = os.readlink(f"{folder}/{name}") if sys.platform == "linux" else f"descriptor {name}"
        except OSError:
            continue  # that was the listing's own
        # Which socket it is doesn't matter, only how many there are.
        kind = target.partition(":[")[0]
        found[f"descriptor of {kind}"] += 1
    return found


def _threads() -> Counter[str]:
    return Counter(
        f"thread {thread.name}" for thread in threading.enumerate() if not thread.name.startswith(_CACHED_THREADS) and thread.is_alive()
    )


def _asyncio_tasks() -> Counter[str]:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return Counter()
    try:
        return Counter(f"asyncio task {task.get_name()}" for task in asyncio.all_tasks())
    except RuntimeError:
        return Counter()  # no loop runs here
