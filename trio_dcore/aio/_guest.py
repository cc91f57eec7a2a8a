"""The trio run behind the portal of an event loop.

``open_trio()`` starts one as a guest of the running asyncio loop (:func:`trio.lowlevel.start_guest_run`); so does the first rpc, pool,
comm or server of :mod:`trio_dcore.aio` that is used in a loop without one, and that run ends when the last of them has been closed, or
with ``asyncio.run``.  Where the loop is itself one of trio's, as trio-asyncio's are, there is a trio run already, which is used.

Everything happens in the loop's thread.  Only waiting for I/O, when there is nothing else to do, trio hands to a thread of its own.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from contextvars import Context
from functools import partial
from types import TracebackType

import outcome
import trio

from .._util import to_raise
from ._portal import Portal, current_portal

__all__ = ["HOLDER_NAME", "acquire_portal", "hosting_loop", "open_trio"]

#: The asyncio task that ends a trio run that nobody has opened explicitly.
HOLDER_NAME = "trio_dcore guest"
# What other tasks get, in seconds, that are cancelled together with the holder, as asyncio.run does at its end: they may still have to
# say goodbye to somebody.  It waits for them anyway.
_OTHERS = 1.0


class _Run:
    """What is known of the trio run of an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.portal: Portal
        self.failure: BaseException | None = None
        self._ended = loop.create_future()

    def over(self) -> None:
        """The run has ended, or is no business of ours any more."""
        if _runs.get(self.loop) is self:
            del _runs[self.loop]
        self.portal.ended()
        if not self._ended.done():
            self._ended.set_result(None)

    async def wait_ended(self) -> None:
        """Wait until the run has ended; may be cancelled, which changes nothing for it."""
        if not self._ended.done():
            await asyncio.wait([self._ended])

    async def end(self) -> None:
        """Close the portal and wait until the run has ended, whatever happens meanwhile.

        Cancellation: raised when it has ended.
        """
        self.portal.close_now()
        cancelled = None
        while not self._ended.done():
            try:
                await asyncio.wait([self._ended])
            except asyncio.CancelledError as error:
                cancelled = error
        failure, self.failure = self.failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
        if cancelled is not None:
            raise cancelled


#: The portal of each loop that has one.
_runs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Run] = weakref.WeakKeyDictionary()


class _Here(threading.local):
    guest: _Guest | None = None


#: The guest of this thread: there can be one.
_here = _Here()


class _Guest(_Run):
    """A trio run that we have started."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        if _here.guest is not None:
            raise RuntimeError(
                "trio still runs in this thread for an event loop that was closed, or stopped, too early: leave `async with "
                "open_trio()`, close what is used of trio_dcore.aio, or use asyncio.run()"
            )
        super().__init__(loop)
        self._starting: list[Callable[[], object]] | None = []
        # trio's own doings need none of the context variables of who happens to be the first.
        self._context = context = Context()
        self._soon = partial(loop.call_soon, context=context)
        trio.lowlevel.start_guest_run(
            self._root,
            run_sync_soon_threadsafe=partial(loop.call_soon_threadsafe, context=context),
            run_sync_soon_not_threadsafe=self._schedule,
            done_callback=self._done,
            host_uses_signal_set_wakeup_fd=True,
        )
        _here.guest = self
        # The first steps of the run are taken here and now, so that it is there when we return.
        steps = self._starting
        while not hasattr(self, "portal"):
            steps.pop()()
        self._starting = None
        for step in steps:
            self._schedule(step)
        _runs[loop] = self

    def _schedule(self, step: Callable[[], object]) -> None:
        if self._starting is not None:
            self._starting.append(step)
        else:
            self._soon(step)

    async def _root(self) -> None:
        async with trio.open_nursery() as nursery:
            self.portal = Portal(self.loop, nursery)
            try:
                await trio.sleep_forever()
            finally:
                self.portal.close_now()

    def _done(self, result: outcome.Outcome[None]) -> None:
        if isinstance(result, outcome.Error):
            self.failure = to_raise("the trio run failed", result.error)
        _here.guest = None
        self.over()
        if isinstance(self.failure, (KeyboardInterrupt, SystemExit)):
            # Ctrl-C, where nobody but trio has a handler for it.  As it would without trio, it goes through the event loop.
            failure, self.failure = self.failure, None
            try:
                raise failure
            finally:
                del failure


def hosting_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop whose guest the trio run of this thread is, if it is one of ours."""
    return None if _here.guest is None else _here.guest.loop


class _Held(_Guest):
    """A guest that nobody has opened: it ends with its last lease, or with its task, which asyncio.run cancels."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.portal.on_unused = self._unused
        self.portal.end_unused = self._end_unused
        holder = self._hold()
        try:
            self._holder = loop.create_task(holder, name=HOLDER_NAME, context=Context())
        except BaseException:
            holder.close()
            self.portal.close_now()
            raise

    def _unused(self) -> None:
        # Not at once: who has closed one may open another now.
        self.loop.call_soon(self._end_if_unused)

    def _end_if_unused(self) -> None:
        if not self.portal.used:
            self.portal.close_now()

    async def _end_unused(self) -> None:
        self._end_if_unused()
        if self.portal.closed:
            await self.wait_ended()
            await asyncio.sleep(0)  # and the holder

    async def _hold(self) -> None:
        try:
            await self.wait_ended()
        except asyncio.CancelledError:
            others = asyncio.all_tasks(self.loop) - {self._holder}
            if others:
                try:
                    await asyncio.wait(others, timeout=_OTHERS)
                except asyncio.CancelledError:
                    pass  # they are in a hurry; what was asked for before is done anyway
            await self.end()
            raise
        await self.end()  # raises why


class _Inner(_Run):
    """A nursery inside of a trio run that goes on without it."""

    async def start(self) -> None:
        outer = await acquire_portal()
        self._lease = outer.lease(lambda: None)
        ready = self.loop.create_future()
        crossing = outer.start(self._root, (ready,))
        try:
            await ready
        except asyncio.CancelledError:
            await crossing.wait_cancelled()
            raise

    async def _root(self, ready: asyncio.Future[None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self.portal = Portal(self.loop, nursery)
                if not ready.done():
                    ready.set_result(None)
                try:
                    await trio.sleep_forever()
                finally:
                    self.portal.close_now()
        finally:
            self._lease.release()
            self.over()


async def acquire_portal() -> Portal:
    """The portal of the running event loop, made if there is none."""
    loop = asyncio.get_running_loop()
    # That of an open_loop() is also found by code that was started without a context, such as by another thread.
    for portal in (current_portal.get(), getattr(loop, "portal", None)):
        if portal is not None and portal.loop is loop and not portal.closed:
            return portal
    while (run := _runs.get(loop)) is not None:
        if not run.portal.closed:
            return run.portal
        await run.wait_ended()
    if _foreign_run():
        return Portal(loop, None)  # it needs nobody to close it
    return _Held(loop).portal


def _foreign_run() -> bool:
    """Whether a trio run that is none of ours runs in this thread."""
    return trio.lowlevel.in_trio_run() and _here.guest is None


class open_trio:  # reads as a function, like trio's open_nursery
    """Run trio inside an asyncio program: ``async with open_trio() as portal: await portal.run(trio_function, *args)``.

    trio becomes a guest of the running event loop: trio's tasks and asyncio's take turns in one thread, and everything of
    :mod:`trio_dcore.aio` that is used in this loop meanwhile runs in it.  Inside of another such block, or where trio runs in this
    thread already, the block has a nursery of its own in that run.

    Leaving the block cancels what its portal still runs, waits for that to end, and ends the trio run: no thread, task or descriptor
    of it is left.

    Cancellation: of the end of the block: is raised when it is over.
    """

    async def __aenter__(self) -> Portal:
        loop = asyncio.get_running_loop()
        while (run := _runs.get(loop)) is not None and run.portal.closed:
            await run.wait_ended()
        if run is None and not _foreign_run():
            self._run: _Run = _Guest(loop)
        else:
            self._run = inner = _Inner(loop)
            await inner.start()
        return self._run.portal

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._run.end()
