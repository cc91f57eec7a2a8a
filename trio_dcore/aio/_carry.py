"""Carrying one call across: from trio into asyncio, and from asyncio into trio.

Both run in one thread, one of them hosting the other: trio-asyncio's loop in a trio program, trio's guest mode in an asyncio program.
So nothing has to be handed from thread to thread here: each side may call the synchronous functions of the other.

What differs is how cancellation works.  trio's is a state: every wait in a cancelled scope raises, until the scope is left.  asyncio's
is an event: a task gets one CancelledError, and if it swallows that it goes on.  A call that crosses keeps the rules of the side that it
came from, towards its caller; and it never ends before what it has called has ended.  The exceptions by which one side cancels stay on
that side.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import trio
from trio.lowlevel import (
    Abort,
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    current_task,
    disable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from ..errors import LocalProtocolError
from ._errors import PortalClosed
from ._report import report_asyncio_task, report_trio_task

if TYPE_CHECKING:
    from ._portal import Portal

__all__ = ["REDELIVER", "Carried", "is_carried", "name_of", "run_in_asyncio", "run_in_trio"]

T = TypeVar("T")

# So long, in seconds, a cancelled asyncio task may clean up before it is cancelled again, and named in the log; and then each time.
REDELIVER = 1.0
# So many steps of trio an asyncio task gets to end by itself before trio waits for it; and trio stays awake for one after a call.  A
# guest run that has nothing to do waits for I/O in a thread, and to wake it costs ten times as much as a step.
_STEPS = 2
# How often a trio task is named that does not end.
_REPORT_EVERY = 1.0


def name_of(fn: object) -> str:
    """What to call a task that runs ``fn``."""
    while hasattr(fn, "func"):  # a partial
        fn = fn.func
    return getattr(fn, "__qualname__", None) or repr(fn)


# -- from trio into asyncio ------------------------------------------------------------------------------------------------------------


class _Exit:
    """A KeyboardInterrupt or SystemExit: out of an asyncio task it would go through the event loop, past everybody who waits."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


@disable_ki_protection  # a program that computes in there can be interrupted, and the loop around is not
async def _held(fn: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> T | _Exit:
    try:
        return await fn(*args)
    except (KeyboardInterrupt, SystemExit) as error:
        return _Exit(error)


def is_carried(task: asyncio.Task[Any]) -> bool:
    """Whether a trio task waits for it, in :func:`run_in_asyncio`."""
    return getattr(task.get_coro(), "cr_code", None) is _held.__code__


class Carried:
    """An asyncio task that a trio task waits for."""

    __slots__ = ("_loop", "_raise_cancel", "_redeliver", "_timer", "_told", "_what", "task")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        fn: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        what: str,
        redeliver: float,
    ) -> None:
        if asyncio.current_task(loop) is not None:
            # trio would take the task that runs the loop for the one that waits here, which ends in an internal error.
            raise LocalProtocolError(f"called from asyncio code: this is for trio tasks, and here {what} can be awaited itself")
        coroutine = _held(fn, args)
        try:
            self.task = loop.create_task(coroutine, name=what)
        except BaseException:
            coroutine.close()
            raise
        self._loop = loop
        self._redeliver = redeliver
        self._what = what
        self._raise_cancel: Callable[[], Any] | None = None
        self._told = False
        self._timer: asyncio.TimerHandle | None = None

    async def patiently(self, items: Sequence[object] = ()) -> None:
        """Give it some steps to end, or until there are items: mostly they come soon, and to wait for them costs more."""
        for _ in range(_STEPS):
            if items or self.task.done():
                return
            await cancel_shielded_checkpoint()

    async def wait_rescheduled(self, raise_cancel: Callable[[], Any] | None = None, *, told: bool = False) -> Any:
        """Have the trio task wait until something reschedules it; its cancellation goes to the asyncio task until then.

        ``raise_cancel`` is given where it has been cancelled already.  ``told`` says that the asyncio task knows by an error that it is
        to end: then it gets the time to clean up that a cancelled one has before the cancellation is delivered as well.
        """
        self._raise_cancel = raise_cancel
        self._told = told
        if raise_cancel is not None:
            self._deliver()
        try:
            return await wait_task_rescheduled(self._abort)
        finally:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _abort(self, raise_cancel: Callable[[], Any]) -> Abort:
        if self._raise_cancel is None:
            self._raise_cancel = raise_cancel
            if not self._told:
                self._deliver()
            elif self._redeliver < math.inf:
                self._timer = self._loop.call_later(self._redeliver, self._again)
        return Abort.FAILED  # it is over when the task says so

    def _deliver(self) -> None:
        self._timer = None
        if not self.task.done():
            self.task.cancel("a cancel scope of trio was cancelled")
            if self._redeliver < math.inf:
                self._timer = self._loop.call_later(self._redeliver, self._again)

    def _again(self) -> None:
        if not self.task.done():
            report_asyncio_task(self.task)
            self._deliver()

    def result(self) -> Any:
        """How the task, which is done, has ended, for trio: returned or raised."""
        raise_cancel, self._raise_cancel = self._raise_cancel, None
        try:
            result = self.task.result()
        except asyncio.CancelledError as error:
            if raise_cancel is not None:
                cancelled: BaseException | None = None
                try:
                    raise_cancel()
                except BaseException as raised:
                    cancelled = raised
                assert cancelled is not None
                try:
                    raise cancelled from None
                finally:
                    del cancelled
            raise _nobody_asked(self._what) from error
        except BaseExceptionGroup as group:
            stray, rest = group.split(asyncio.CancelledError)
            if stray is None:
                raise
            if rest is not None:
                raise rest from rest.__cause__
            if raise_cancel is not None:
                raise_cancel()
            raise _nobody_asked(self._what) from group
        if type(result) is _Exit:
            raise result.error
        return result


async def run_in_asyncio(
    loop: asyncio.AbstractEventLoop, fn: Callable[..., Awaitable[T]], *args: Any, redeliver: float = REDELIVER
) -> T:
    """Run an asyncio coroutine function from a trio task, and return or raise what it does.  A checkpoint of trio.

    It runs in a new task of ``loop``, with the caller's context variables (a copy, as a new task has).

    Cancellation: cancels the asyncio task, once, and waits for it to end, for what it does in ``finally`` too.  If it has not ended
    ``redeliver`` seconds later, because it swallowed the cancellation or because it takes its time, it is cancelled again and named
    in the log, and so on.  If it ended by that, trio's ``Cancelled`` is raised here; if it returned or raised something else after
    all, then that.

    Args:
        loop: runs in this very thread.
        fn: the coroutine function.
        *args: its arguments.
        redeliver: seconds; ``math.inf`` is never again.

    Raises:
        RuntimeError: it ended by a CancelledError that no cancel scope of trio asked for; that is its ``__cause__``.
    """
    await checkpoint_if_cancelled()
    carried = Carried(loop, fn, args, name_of(fn), redeliver)
    task = carried.task
    await carried.patiently()
    if not task.done():
        waiter = current_task()
        task.add_done_callback(lambda _: reschedule(waiter))
        await carried.wait_rescheduled()
    return carried.result()  # type: ignore[no-any-return]  # what fn returned


def _nobody_asked(what: str) -> RuntimeError:
    return RuntimeError(f"{what} ended by an asyncio.CancelledError that nobody on the other side of the bridge asked for")


# -- from asyncio into trio ------------------------------------------------------------------------------------------------------------


class Crossing:
    """One call on its way through trio."""

    __slots__ = ("_timer", "args", "cancelled", "done", "error", "fn", "portal", "scope", "task", "value", "waiter")

    def __init__(self, portal: Portal, fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        self.portal: Portal = portal
        self.fn: Callable[..., Awaitable[Any]] = fn
        self.args: tuple[Any, ...] = args
        self.scope: trio.CancelScope = trio.CancelScope()
        self.waiter: asyncio.Future[Any] = portal.loop.create_future()
        self.task: trio.lowlevel.Task | None = None
        self.done: bool = False
        self.cancelled: bool = False  # the scope has caught its cancellation
        self.value: Any = None
        self.error: BaseException | None = None

    async def run(self) -> None:
        """The trio side.  Nothing but the cancellation of the portal's nursery gets out of here."""
        self.task = current_task()
        try:
            with self.scope:
                self.value = await self.fn(*self.args)
            self.cancelled = self.scope.cancelled_caught
        except BaseException as error:
            cancelled, rest = _split(error, trio.Cancelled)
            try:
                if cancelled is None:
                    self.error = error
                elif trio.current_effective_deadline() == -math.inf:
                    self.error = PortalClosed("the trio run of this event loop ends") if rest is None else rest
                    raise cancelled from None
                else:
                    self.error = RuntimeError("a trio.Cancelled that belongs to no cancel scope came out of trio")
                    self.error.__cause__ = error
            finally:
                del cancelled, rest  # whose tracebacks refer to this frame
        finally:
            self.end()
        await cancel_shielded_checkpoint()  # most likely it goes on with another call

    def end(self) -> None:
        """It is over: tell who waits.  Not a checkpoint, and belongs to no side."""
        if not self.done:
            self.done = True
            self.task = None
            self.portal.left(self)
            if not self.waiter.done():
                self.waiter.set_result(None)

    def fail(self, error: BaseException) -> None:
        """The trio run has ended without it, which trio calls an internal error."""
        self.error = error
        self.end()

    async def wait_cancelled(self) -> asyncio.CancelledError | None:
        """The asyncio side, once its task was cancelled: have the trio side end, however often it is cancelled meanwhile.

        Returns the last further cancellation.
        """
        latest = None
        self.scope.cancel(reason="the asyncio task was cancelled")
        loop = self.portal.loop
        self._timer = loop.call_later(_REPORT_EVERY, self._report)
        try:
            while not self.done:
                self.waiter = loop.create_future()
                try:
                    await self.waiter
                except asyncio.CancelledError as error:
                    latest = error
            return latest
        finally:
            self._timer.cancel()
            del latest  # its traceback refers to this frame

    def _report(self) -> None:
        if self.task is not None:
            report_trio_task(self.task)
        self._timer = self.portal.loop.call_later(_REPORT_EVERY, self._report)

    async def join(self, *, failures: bool = True) -> None:
        """The asyncio side: wait for the end.  Cancelled, have it end, and wait for that.

        Args:
            failures: raise what the trio side has raised; else it is of no interest.
        """
        cancelled = None
        late = False
        try:
            await self.waiter
        except asyncio.CancelledError as error:
            cancelled = error
            late = self.done
            if not late:
                cancelled = await self.wait_cancelled() or error
        failure, self.error = self.error, None
        try:
            if failure is not None and failures and (cancelled is None or _outweighs(failure, late)):
                raise _of_ours(failure, self.fn)
            if cancelled is not None:
                raise cancelled
        finally:
            del failure, cancelled


async def run_in_trio(
    portal: Portal, fn: Callable[..., Awaitable[T]], *args: Any, dispose: Callable[[T], object] | None = None
) -> T:
    """Run a trio coroutine function from an asyncio task, and return or raise what it does.

    It runs in a new task of the portal's nursery, inside a cancel scope of its own, with the caller's context variables (a copy, as a
    new task has).

    Cancellation: cancels that scope, and waits for the trio side to end, for its shielded cleanup too, however often the asyncio task
    is cancelled meanwhile.  Then CancelledError is raised, also if there is a value or an error by then, which is lost, as in asyncio; if
    the trio side raised an error while it cleaned up, that is raised instead.  A trio task that does not end is named in the log every
    second.

    Args:
        portal: of the running loop.
        fn: the coroutine function.
        *args: its arguments.
        dispose: called with a value that is lost by cancellation.

    Raises:
        PortalClosed: the portal is closed, or was meanwhile.
        RuntimeError: it raised an ``asyncio.CancelledError`` that nobody asked for; that is its ``__cause__``.
    """
    crossing = portal.start(fn, args)
    try:
        await crossing.waiter
    except asyncio.CancelledError as cancelled:
        late = crossing.done
        latest = None if late else await crossing.wait_cancelled()
        error = crossing.error
        if error is not None and _outweighs(error, late):
            try:
                raise _of_ours(error, fn)  # the CancelledError is its context
            finally:
                del error, crossing.error
        if not crossing.cancelled and error is None and dispose is not None:
            dispose(crossing.value)
        del error
        if latest is None:
            raise
        try:
            raise latest from cancelled
        finally:
            del latest
    except BaseException:  # somebody closes our coroutine
        crossing.scope.cancel(reason="the asyncio task was abandoned")
        raise
    if crossing.error is not None:
        error = _of_ours(crossing.error, fn)
        crossing.error = None
        try:
            raise error
        finally:
            del error
    if crossing.cancelled:
        raise PortalClosed("the trio run of this event loop ends")
    return crossing.value  # type: ignore[no-any-return]  # what fn returned


def _outweighs(error: BaseException, late: bool) -> bool:
    """Whether a task that was cancelled raises this error of the trio side: if it comes of the cancellation.

    One that had come before is lost, as asyncio loses what a future gets in the moment in which its task is cancelled.  Else the
    cancellation would be, which comes once: a loop that tries again after an OSError would never end.

    Args:
        error: of the trio side.
        late: the trio side had ended when the task was cancelled.
    """
    if isinstance(error, PortalClosed):
        return False
    if not isinstance(error, Exception):
        return True
    return not late and _saw_cancelled(error)


def _saw_cancelled(error: BaseException) -> bool:
    """Whether there is a trio.Cancelled among its contexts, causes and leaves."""
    seen: set[int] = set()
    found = [error]
    while found:
        each = found.pop()
        if isinstance(each, trio.Cancelled):
            return True
        if id(each) not in seen:
            seen.add(id(each))
            found += [before for before in (each.__context__, each.__cause__) if before is not None]
            if isinstance(each, BaseExceptionGroup):
                found += each.exceptions
    return False


def _of_ours(error: BaseException, fn: object) -> BaseException:
    """What asyncio is to see of an error from trio."""
    cancelled, rest = _split(error, asyncio.CancelledError)
    if cancelled is None:
        return error
    if rest is not None:
        return rest
    stray = _nobody_asked(name_of(fn))
    stray.__cause__ = error
    return stray


def _split(error: BaseException, kind: type[BaseException]) -> tuple[BaseException | None, BaseException | None]:
    """(what of an error is of that kind, the rest)."""
    if isinstance(error, kind):
        return error, None
    if isinstance(error, BaseExceptionGroup):
        return error.split(kind)
    return None, error
