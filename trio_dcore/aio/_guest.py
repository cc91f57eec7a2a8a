"""The trio run behind the portal of an event loop.

The first ``open_trio()`` block in an asyncio loop starts one as a guest of that (:func:`trio.lowlevel.start_guest_run`); so does the
first rpc, pool, comm or server of :mod:`trio_dcore.aio` that is used in a loop without one.  It ends when the last of all these has been
closed, or with ``asyncio.run``.  Each block has a nursery of its own in it, for what its task and those started there use: blocks of tasks
that have nothing to do with each other may end in any order.  Where the loop is itself one of trio's, as trio-asyncio's are, there is a
trio run already, which is used.

Everything happens in the loop's thread.  Only waiting for I/O, when there is nothing else to do, trio hands to a thread of its own.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import Callable
from contextvars import Context
from functools import partial
from types import TracebackType

import outcome
import trio

from .._util import to_raise
from ..errors import LocalProtocolError
from ._errors import PortalClosed
from ._portal import Portal, current_portal

__all__ = ["HOLDER_NAME", "acquire_portal", "hosting_loop", "open_trio", "portal_of"]

#: The asyncio task that ends a trio run that is not only used in ``open_trio()`` blocks.
HOLDER_NAME = "trio_dcore guest"
# What other tasks get, in seconds, that are cancelled together with the holder, as asyncio.run does at its end: they may still have to
# say goodbye to somebody.  It waits for them anyway.
_OTHERS = 1.0


class _Run:
    """What is known of a trio run, or of a part of one."""

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

    async def join(self) -> asyncio.CancelledError | None:
        """Wait until the run has ended, whatever happens meanwhile.  Returns the last cancellation."""
        cancelled = None
        while not self._ended.done():
            try:
                await asyncio.wait([self._ended])
            except asyncio.CancelledError as error:
                cancelled = error
        try:
            return cancelled
        finally:
            del cancelled  # its traceback refers to this frame

    def tell_failure(self) -> None:
        """Raise why the run has failed, if it did."""
        if self.failure is not None:
            raise self.failure


#: The guest of each loop that has one.
_runs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Guest] = weakref.WeakKeyDictionary()


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
        self.portal.on_unused = self._unused
        self.portal.end_unused = self._end_unused
        self._holder: asyncio.Task[None] | None = None
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

    def hold(self) -> None:
        """Somebody uses the run who need not say when that ends: have asyncio.run end it, which cancels the tasks that are left."""
        if self._holder is None:
            holder = self._hold()
            try:
                self._holder = self.loop.create_task(holder, name=HOLDER_NAME, context=Context())
            except BaseException:
                holder.close()
                self._unused()
                raise

    def _unused(self) -> None:
        # Not at once: who has closed one may open another now.
        self.loop.call_soon(self.end_if_unused)

    def end_if_unused(self) -> None:
        """End the run if nobody needs it.  Not waited for."""
        if not self.portal.used:
            self.portal.close_now()

    async def _end_unused(self) -> None:
        self.end_if_unused()
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
            self.portal.close_now()
            await self.join()
            self.tell_failure()
            raise
        self.tell_failure()


def hosting_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop whose guest the trio run of this thread is, if it is one of ours."""
    return None if _here.guest is None else _here.guest.loop


class _Block(_Run):
    """What a block has of the trio run of its loop: a nursery, with a portal to it."""

    async def start(self) -> None:
        outer = await acquire_portal(hold=False)
        self._guest = _runs.get(self.loop)
        self._lease = outer.lease()
        ready = self.loop.create_future()
        crossing = outer.start(self._root, (ready,))
        crossing.waiter.add_done_callback(self._root_ended)
        try:
            await asyncio.wait([ready, crossing.waiter], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await crossing.wait_cancelled()
            await self._leave()
            raise
        if not ready.done():
            raise PortalClosed("the trio run of this event loop has ended abnormally")

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

    def _root_ended(self, _: object) -> None:
        if hasattr(self, "portal"):  # and perhaps not by itself
            self.over()

    async def end(self) -> None:
        """Close the portal and wait until the block's part of the run has ended, and if nobody else needs it, the run; whatever happens.

        Cancellation: raised when that is over.
        """
        self.portal.close_now()
        cancelled = await self.join()
        cancelled = await self._leave() or cancelled
        try:
            if self._guest is not None:
                self._guest.tell_failure()
            if cancelled is not None:
                raise cancelled
        finally:
            del cancelled

    async def _leave(self) -> asyncio.CancelledError | None:
        self._lease.release()
        if self._guest is None:
            return None
        self._guest.end_if_unused()
        return await self._guest.join() if self._guest.portal.closed else None


async def acquire_portal(*, hold: bool = True) -> Portal:
    """The portal of the ``open_trio()`` block around, or else that of the running event loop, made if there is none.

    Args:
        hold: what is used through it may be left open.
    """
    return await portal_of(current_portal.get(), hold=hold)


async def portal_of(block: Portal | None, *, hold: bool = True) -> Portal:
    """Likewise, with the block given: that in which something was made that is used now."""
    loop = asyncio.get_running_loop()
    # That of an open_loop() is also found by code that was started without a context, such as by another thread.
    for portal in (block, getattr(loop, "portal", None)):
        if portal is not None and portal.loop is loop and not portal.closed:
            return portal
    while (run := _runs.get(loop)) is not None and run.portal.closed:
        await run.wait_ended()
    if run is None:
        if _foreign_run(loop):
            return Portal(loop, None)  # it needs nobody to close it
        run = _Guest(loop)
    if hold:
        run.hold()
    return run.portal


def _foreign_run(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether a trio run that is none of ours runs in this thread."""
    if not trio.lowlevel.in_trio_run() or _here.guest is not None:
        return False
    trio_asyncio = sys.modules.get("trio_asyncio")
    if trio.lowlevel.in_trio_task() and (trio_asyncio is None or not isinstance(loop, trio_asyncio.BaseTrioEventLoop)):
        raise LocalProtocolError(
            "this event loop runs inside of a trio task, which stands still until it ends, and trio with it: use `async with "
            "trio_dcore.aio.open_loop():` in the trio program, or give asyncio.run() a thread of its own"
        )
    return True


class open_trio:  # reads as a function, like trio's open_nursery
    """Run trio inside an asyncio program: ``async with open_trio() as portal: await portal.run(trio_function, *args)``.

    trio runs as a guest of the running event loop: trio's tasks and asyncio's take turns in one thread.  What is used of
    :mod:`trio_dcore.aio` in the block, and in the tasks that are started there, belongs to the block.  There may be any number of blocks,
    inside of each other or in tasks of their own: all share one run, and each has a nursery of its own in it.

    Leaving the block cancels what its portal still runs, closes what belongs to it, and waits for that to end.  The last one also ends
    the trio run, unless something else still uses it: no thread, task or descriptor of it is left.

    Cancellation: of the end of the block: is raised when it is over.
    """

    async def __aenter__(self) -> Portal:
        self._block = block = _Block(asyncio.get_running_loop())
        await block.start()
        self._before = current_portal.get()
        current_portal.set(block.portal)
        return block.portal

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        current_portal.set(self._before)  # not reset(): a fixture may be torn down in another context
        await self._block.end()
