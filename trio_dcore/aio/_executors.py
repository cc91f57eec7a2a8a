"""Threads and processes of asyncio code: what trio-asyncio refuses, standard executors, and their end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
from collections.abc import Callable
from typing import Any

import trio

from ._carry import name_of

__all__ = ["Executors"]

_log = logging.getLogger("trio_dcore.aio")

# How often, in seconds, what still runs is named.
_EVERY = 1.0


class Executors:
    """The part of an event loop that runs functions elsewhere, as asyncio's own loops do.

    Put before a trio-asyncio loop's class.  That one asserts that an executor is its own ``TrioExecutor``; and where that one is used,
    a task that waits for a thread can't be cancelled, so that ``asyncio.timeout`` round a slow ``getaddrinfo`` does nothing.  Here, as in
    asyncio, the waiting ends, and the thread goes on until :meth:`end_threads`.
    """

    def __init__(self) -> None:
        self._default: concurrent.futures.Executor | None = None
        self._used: list[concurrent.futures.Executor] = []  # what was the default at some time
        self._running: dict[concurrent.futures.Future[Any], str] = {}  # in these
        self._ended = False

    def run_in_executor(
        self, executor: concurrent.futures.Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Run a blocking function in an executor; None is the default one, of threads that are waited for when the loop closes."""
        loop: Any = self
        if loop.is_closed():
            raise RuntimeError("Event loop is closed")
        if executor is not None and not _of_trio(executor):
            return asyncio.wrap_future(executor.submit(func, *args), loop=loop)
        if executor is None:
            if self._ended:
                raise RuntimeError("the default executor of this event loop has been shut down")
            if self._default is None:
                self.set_default_executor(concurrent.futures.ThreadPoolExecutor(thread_name_prefix="asyncio"))
                assert self._default is not None
            executor = self._default
        if _of_trio(executor):
            future: asyncio.Future[Any] = super().run_in_executor(executor, func, *args)  # type: ignore[misc]  # of the loop's class
            return future
        work = executor.submit(func, *args)
        self._running[work] = name_of(func)
        work.add_done_callback(self._done)
        return asyncio.wrap_future(work, loop=loop)

    def _done(self, work: concurrent.futures.Future[Any]) -> None:
        self._running.pop(work, None)

    def set_default_executor(self, executor: concurrent.futures.ThreadPoolExecutor) -> None:
        """Have this one run what names no executor.  It is shut down with the loop, as asyncio does."""
        if not isinstance(executor, concurrent.futures.ThreadPoolExecutor):
            raise TypeError("executor must be a ThreadPoolExecutor")
        self._default = executor
        self._used.append(executor)

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """As asyncio's: take no more for the default executor, and wait for its threads; ``timeout`` gives up waiting."""
        self._ended = True
        loop: Any = self
        async with asyncio.timeout(timeout):
            await asyncio.shield(loop.trio_as_future(self.end_threads))

    async def end_threads(self) -> None:
        """Shut down the default executor.  What runs in it is waited for, however long it takes, and named in the log.

        This is for trio.  Cancellation: not noticed while threads run, for they can't be interrupted.
        """
        self._ended = True
        while self._used:
            executor = self._used.pop()
            executor.shutdown(wait=False)
            if self._running:
                await trio.to_thread.run_sync(self._wait, limiter=trio.CapacityLimiter(1))
            if not _of_trio(executor):
                executor.shutdown(wait=True)  # its threads have nothing left to do

    def _wait(self) -> None:
        """In a thread, since time may be virtual in trio."""
        while running := dict(self._running):
            _, left = concurrent.futures.wait(running, timeout=_EVERY)
            for work in left:
                _log.warning("open_loop() waits for a function that runs in its default executor: %s", running[work])


def _of_trio(executor: concurrent.futures.Executor) -> bool:
    """Whether it is trio-asyncio's, whose submit() is no standard one."""
    return inspect.iscoroutinefunction(executor.submit)
