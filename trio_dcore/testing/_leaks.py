"""no_leaks(): what was there before is what is there after."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import warnings
from collections import Counter
from types import TracebackType
from typing import Any, Self

import trio

from ._faults import TIMER_NAME
from ._network import current_network

__all__ = ["Inventory", "LeakError", "no_leaks"]

# So trio names the threads that it keeps for a while for the next to_thread.run_sync.
_CACHED_THREADS = "Trio thread "
# trio's own system tasks; what users start of trio's, such as trio.sleep_forever, counts.
_TRIO_INTERNAL = "trio._"
# Passes of the run's loop that tasks which are about to end get.
_SETTLE = 50


class LeakError(AssertionError):
    """Something was left behind; the message lists it."""


class no_leaks:  # reads as a phrase
    """Check that the block leaves nothing behind: ``async with no_leaks():`` in a trio program, ``with no_leaks():`` round one.

    Compared before and after: trio tasks, descriptors by what they refer to (files, sockets, and so ports), connections of a
    :func:`memory_network`, threads (but for those that trio keeps for reuse) and, in a running asyncio loop, its tasks.  Watched
    meanwhile: exceptions that nobody could see, and ResourceWarnings.  Tasks that are about to end get a moment for that.

    Raises:
        LeakError: at the end.  If the block raised, then that goes on, with a note on what nobody could see.
    """

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop(error)

    async def __aenter__(self) -> Self:
        await trio.lowlevel.checkpoint()
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self._before.settle()
        finally:
            self._stop(error)

    def _start(self) -> None:
        gc.collect()
        self._unseen: list[str] = []
        self._old_hook = sys.unraisablehook
        sys.unraisablehook = self._saw_unraisable
        self._catcher = warnings.catch_warnings(record=True)
        caught = self._catcher.__enter__()
        assert caught is not None  # as record=True says
        self._warnings = caught
        warnings.simplefilter("always", ResourceWarning)
        self._before = Inventory()

    def _stop(self, error: BaseException | None) -> None:
        gc.collect()
        problems = self._before.added()
        self._catcher.__exit__(None, None, None)
        sys.unraisablehook = self._old_hook
        unseen = [f"ResourceWarning: {w.message}" for w in self._warnings if issubclass(w.category, ResourceWarning)]
        unseen += self._unseen
        if error is None and problems + unseen:
            raise LeakError("\n".join(problems + unseen))
        if error is not None and unseen:
            error.add_note("\n".join(["Meanwhile:", *unseen]))
        for other in self._warnings:
            if not issubclass(other.category, ResourceWarning):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)

    def _saw_unraisable(self, unraisable: Any) -> None:
        # As text: keeping the objects would keep them alive.
        where = unraisable.err_msg or "ignored in"
        self._unseen.append(f"an exception that nobody could see: {unraisable.exc_value!r}: {where} {unraisable.object!r}")


class Inventory:
    """What there is at one moment."""

    def __init__(self) -> None:
        self._counts = _tasks() + _threads() + _asyncio_tasks()
        self._descriptors = _descriptors()
        self._memory = _memory_streams()

    async def settle(self) -> None:
        """Give what is about to end some passes of the loop; what is still there then stays."""
        for _ in range(_SETTLE):
            if not self.added():
                return
            await trio.lowlevel.checkpoint()

    def added(self) -> list[str]:
        """What there is now beyond that, a line for each."""
        now = Inventory()
        found = [
            f"left behind: {what}" + (f" ({count} of them)" if count > 1 else "")
            for what, count in (now._counts - self._counts).items()
        ]
        more = Counter(map(_kind, now._descriptors.values())) - Counter(map(_kind, self._descriptors.values()))
        for number, target in now._descriptors.items():
            if self._descriptors.get(number) != target and more[_kind(target)] > 0:
                more[_kind(target)] -= 1
                found.append(f"left behind: descriptor {number}, {_described(number, target)}")
        return found + [f"left behind: {stream}" for stream in now._memory if stream not in self._memory]


def _tasks() -> Counter[str]:
    try:
        root = trio.lowlevel.current_root_task()
    except RuntimeError:
        return Counter()
    found: Counter[str] = Counter()
    stack = [root] if root is not None else []
    while stack:
        task = stack.pop()
        if not task.name.startswith(_TRIO_INTERNAL) and task.name != TIMER_NAME:
            found[f"task {task.name}"] += 1
        for nursery in task.child_nurseries:
            stack.extend(nursery.child_tasks)
    return found


def _descriptors() -> dict[int, str]:
    """What each of the process's descriptors refers to; nothing where the system doesn't tell."""
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    found: dict[int, str] = {}
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in names:
        try:
            found[int(name)] = os.readlink(f"{folder}/{name}") if sys.platform == "linux" else "something"
        except OSError:
            continue  # that was the listing's own
    return found


def _kind(target: str) -> str:
    # Which socket or pipe it is doesn't matter, only how many there are: "socket:[4711]".
    return target.partition(":[")[0] if not target.startswith("anon_inode:") else target


def _described(number: int, target: str) -> str:
    if not target.startswith("socket:"):
        return target
    try:
        with socket.socket(fileno=os.dup(number)) as sock:
            listening = hasattr(socket, "SO_ACCEPTCONN") and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            what = "a listening socket" if listening else "a socket"
            where = f" at {sock.getsockname()!r}" if sock.getsockname() else ""
            try:
                return f"{what}{where} connected to {sock.getpeername()!r}"
            except OSError:
                return f"{what}{where}"
    except OSError:
        return target


def _memory_streams() -> list[str]:
    network = current_network()
    return [] if network is None else network.open_ends()


def _threads() -> Counter[str]:
    return Counter(f"thread {thread.name}" for thread in threading.enumerate() if not thread.name.startswith(_CACHED_THREADS))


def _asyncio_tasks() -> Counter[str]:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return Counter()
    try:
        return Counter(f"asyncio task {task.get_name()}" for task in asyncio.all_tasks())
    except RuntimeError:
        return Counter()  # no loop runs here
