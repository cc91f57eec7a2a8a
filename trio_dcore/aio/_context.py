"""Asyncio's context managers in trio code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

import trio
from trio.lowlevel import checkpoint_if_cancelled, current_task, reschedule

from .._util import to_raise
from ..errors import LocalProtocolError
from ._carry import Carried, name_of
from ._loop import redeliver_of, running_loop

__all__ = ["enter_asyncio"]

T_co = TypeVar("T_co", covariant=True)


class enter_asyncio(Generic[T_co]):  # reads as a phrase
    """Enter an async context manager of asyncio's flavour in a trio task: ``async with enter_asyncio(ClientSession) as session:``.

    It is made, entered and left in one asyncio task, which waits while the block runs, so that ``asyncio.timeout`` and TaskGroup may be
    in it.  If it fails meanwhile, such as a TaskGroup by one of its tasks, then the block is cancelled, and the failure raised.

    What the block raises is raised inside the context manager, trio's ``Cancelled`` as ``asyncio.CancelledError``.

    Cancellation: of entering and leaving: as of :func:`run_asyncio`.

    Args:
        make: returns the context manager; called in the asyncio task.
        *args: its arguments.

    Raises:
        LocalProtocolError: there is no loop here.
    """

    def __init__(self, make: Callable[..., AbstractAsyncContextManager[T_co, Any]], *args: Any) -> None:
        self._make = make
        self._args = args
        self._carried: Carried | None = None
        self._values: list[T_co] = []  # one, once it has been entered
        self._leave: asyncio.Future[BaseException | None]
        self._waiter: trio.lowlevel.Task | None = None
        self._given: BaseException | None = None  # what was raised inside
        self._scope = trio.CancelScope()  # round the block

    async def __aenter__(self) -> T_co:
        if self._carried is not None:
            raise LocalProtocolError("each enter_asyncio() is for one `async with`; call it again")
        await checkpoint_if_cancelled()
        loop = running_loop()
        self._leave = loop.create_future()
        self._carried = Carried(loop, self._run, (), name_of(self._make), redeliver_of(loop))
        self._carried.task.add_done_callback(self._ended)
        if not self._values and not self._carried.task.done():
            await self._wait()
        if not self._values:
            self._carried.result()  # raises why
        self._scope.__enter__()
        return self._values.pop()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        assert self._carried is not None
        early = self._leave.done() or self._carried.task.done()
        block = error
        try:
            if self._scope.__exit__(kind, error, traceback):
                block = None
        except BaseException as rest:
            block = rest
        failure: BaseException | None = None
        swallowed = False
        try:
            swallowed = await self._finish(block)
        except BaseException as raised:
            failure = raised
        try:
            if early:
                failure = failure or self._too_early()
                if block is not None:
                    failure = to_raise("the block and its context manager failed", block, failure)
                    assert failure is not None
                raise failure
            if failure is None:
                return swallowed
            if failure is block or failure is self._given or failure.__cause__ is self._given is not None:
                return False
            raise failure
        finally:
            self._given = None
            del block, failure, error

    def _too_early(self) -> RuntimeError:
        return RuntimeError(f"{name_of(self._make)} was cancelled in asyncio, and swallowed that")

    async def _finish(self, error: BaseException | None) -> bool:
        """Have the asyncio task leave the context manager with an error of the block; returns whether that swallowed it."""
        assert self._carried is not None
        if not self._carried.task.done():
            raise_cancel: Callable[[], Any] | None = None
            if not self._leave.done():  # else it is on its way out already
                cancelled, rest = error.split(trio.Cancelled) if isinstance(error, BaseExceptionGroup) else (error, error)
                if isinstance(error, trio.Cancelled) or (cancelled is not None and rest is None):

                    def again() -> None:
                        assert error is not None
                        raise error

                    raise_cancel = again
                else:
                    self._given = rest
                    self._leave.set_result(rest)
            await self._wait(raise_cancel)
        return bool(self._carried.result())

    async def _wait(self, raise_cancel: Callable[[], Any] | None = None) -> None:
        assert self._carried is not None
        self._waiter = current_task()
        await self._carried.wait_rescheduled(raise_cancel)

    # -- the asyncio side ----------------------------------------------------------------------------------------------------------

    async def _run(self) -> bool:
        """Returns whether an error of the block was swallowed."""
        ended = False
        async with self._make(*self._args) as value:
            self._values.append(value)
            self._wake()
            try:
                error = await self._leave
            except asyncio.CancelledError:
                error = self._given  # what the block raised came first, and a cancellation before that was seen here
                if error is None:
                    raise
            if error is not None:
                raise error
            ended = True
        return not ended

    def _wake(self) -> None:
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            reschedule(waiter)

    def _ended(self, _: object) -> None:
        self._scope.cancel(reason=f"{name_of(self._make)} has ended in asyncio")
        self._wake()
