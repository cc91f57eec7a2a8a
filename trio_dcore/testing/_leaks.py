"""no_leaks(): what was there before is what is there after."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import trio

from ..client import PINGER_NAME
from ._faults import TIMER_NAME
from ._network import current_network

__all__ = ["Inventory", "LeakError", "no_leaks"]

# So trio names the threads that it keeps for a while for the next to_thread.run_sync.
_CACHED_THREADS = "Trio thread "
# trio's own system tasks; what users start of trio's, such as trio.sleep_forever, counts.
_TRIO_INTERNAL = "trio._"
# System tasks that end with a stream, or with a pool.
_END_WITH_THEIR_OWNER = frozenset({TIMER_NAME, PINGER_NAME})
# Passes of the run's loop that tasks which are about to end get.
_SETTLE = 50


class LeakError(AssertionError):
    """Something was left behind; the message lists it."""


class no_leaks:  # reads as a phrase
    """Check that the block leaves nothing behind: ``async with no_leaks():`` in a trio program, ``with no_leaks():`` round one.

    Compared before and after: trio tasks, descriptors by what they refer to (files, sockets, and so ports), connections of a
    :func:`memory_network`, threads (but for those that trio keeps for reuse) and, in a running asyncio loop, its tasks.  Watched
    meanwhile: exceptions that nobody could see, and ResourceWarnings.  Tasks that are about to end get a moment for that.  Most of
    this belongs to the whole process, so other threads must not come and go meanwhile.

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
    """What there is at one moment: things, each with its kind and a text that says which it is.

    One thing may have taken the place of another of its kind, such as a connection that was made anew.
    """

    def __init__(self) -> None:
        self._things: dict[object, tuple[str, str]] = {}
        self._things.update(_tasks())
        self._things.update(_descriptors())
        self._things.update(_memory_streams())
        self._things.update(_threads())
        self._things.update(_asyncio_tasks())

    async def settle(self) -> None:
        """Give what is about to end some passes of the loop; what is still there then stays."""
        for _ in range(_SETTLE):
            if not self.added():
                return
            await trio.lowlevel.checkpoint()

    def added(self) -> list[str]:
        """What there is now beyond that, a line for each."""
        now = Inventory()._things
        more = Counter(kind for kind, _ in now.values()) - Counter(kind for kind, _ in self._things.values())
        found = []
        for thing, (kind, text) in now.items():
            if more[kind] > 0 and self._things.get(thing) != (kind, text):
                more[kind] -= 1
                found.append(f"left behind: {_described(thing, text) if kind == 'socket' else text}")
        return found


def _tasks() -> Iterator[tuple[object, tuple[str, str]]]:
    try:
        root = trio.lowlevel.current_root_task()
    except RuntimeError:
        return
    stack = [root] if root is not None else []
    while stack:
        task = stack.pop()
        if not task.name.startswith(_TRIO_INTERNAL) and task.name not in _END_WITH_THEIR_OWNER:
            # Of a kind are those that run the same function, whatever they were named.
            yield task, (f"task of {getattr(task.coro, '__qualname__', task.name)}", f"task {task.name}")
        for nursery in task.child_nurseries:
            stack.extend(nursery.child_tasks)


def _descriptors() -> Iterator[tuple[object, tuple[str, str]]]:
    """What each of the process's descriptors refers to; nothing where the system doesn't tell."""
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        try:
            target = os.readlink(f"{folder}/{name}") if sys.platform == "linux" else "something"
        except OSError:
            continue  # that was the listing's own
        yield int(name), (_kind(target), f"descriptor {name}, {target}")


def _kind(target: str) -> str:
    # Which socket or pipe it is doesn't matter, only how many there are: "socket:[4711]".
    return target.partition(":[")[0] if not target.startswith("anon_inode:") else target


def _described(number: object, text: str) -> str:
    """What a socket is, if that can be found out."""
    assert isinstance(number, int)
    try:
        with socket.socket(fileno=os.dup(number)) as sock:
            listening = hasattr(socket, "SO_ACCEPTCONN") and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            what = "a listening socket" if listening else "a socket"
            where = f" at {sock.getsockname()!r}" if sock.getsockname() else ""
            try:
                to = f" connected to {sock.getpeername()!r}"
            except OSError:
                to = ""
            return f"descriptor {number}, {what}{where}{to}"
    except OSError:
        return text


def _memory_streams() -> Iterator[tuple[object, tuple[str, str]]]:
    network = current_network()
    if network is not None:
        for number, side, stream in network.open_ends():
            yield stream, (f"{side} end", f"the {side} end of memory connection {number}")


def _threads() -> Iterator[tuple[object, tuple[str, str]]]:
    for thread in threading.enumerate():
        if not thread.name.startswith(_CACHED_THREADS):
            yield thread, (f"thread {thread.name}",) * 2


def _asyncio_tasks() -> Iterator[tuple[object, tuple[str, str]]]:
    asyncio = sys.modules.get("asyncio")
    try:
        tasks = asyncio.all_tasks() if asyncio is not None else ()
    except RuntimeError:
        return  # no loop runs here
    for task in tasks:
        yield task, (f"asyncio task of {getattr(task.get_coro(), '__qualname__', '')}", f"asyncio task {task.get_name()}")
