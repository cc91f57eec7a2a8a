"""An async generator of asyncio's flavour, stepped from trio.

All its steps run in one asyncio task: so ``asyncio.timeout`` and TaskGroup blocks that it has open at a ``yield`` see one task, and context
variables that it sets are there in the next step.  While the item that it yielded is being sent, that task waits for what to do next; a
cancellation that comes then, such as that of a timeout of the generator's own, is raised at its ``yield``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import trio
from trio.lowlevel import checkpoint_if_cancelled, current_task, reschedule

from ..errors import CommClosedError
from ._carry import Carried, name_of

__all__ = ["END", "GeneratorRun"]

_Do = Callable[[AsyncGenerator[Any, None]], Awaitable[Any]]

#: In place of an item: there are no more.
END: Any = object()


class GeneratorRun:
    """One run of an async generator; of one trio task.

    Args:
        loop: where it runs.
        make: makes the generator; called in the asyncio task.
        redeliver: see :func:`run_in_asyncio`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, make: Callable[[], AsyncGenerator[Any, None]], redeliver: float) -> None:
        self._loop = loop
        self._make = make
        self._redeliver = redeliver
        self._carried: Carried | None = None
        self._items: list[Any] = []  # at most one: what it yielded, and nobody has taken
        self._waiter: trio.lowlevel.Task | None = None  # for an item, or the end
        self._told: asyncio.Future[_Do] | None = None  # what it is to do next

    # -- the asyncio side --------------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        generator = self._make()
        step = _next(generator)
        while True:
            try:
                item = await step
            except StopAsyncIteration:
                return
            self._items[:] = [item]
            self._told = told = self._loop.create_future()
            self._wake()
            try:
                do = await told
            except asyncio.CancelledError as error:
                # In a cancelled scope it comes together with, and after, what there is to do.
                do = told.result() if told.done() and not told.cancelled() else _next
                step = generator.athrow(error) if do is _next else do(generator)
            else:
                step = do(generator)

    def _wake(self, _: object = None) -> None:
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            reschedule(waiter)

    # -- the trio side -----------------------------------------------------------------------------------------------------------------

    async def next(self) -> Any:
        """The next item, or END.

        Cancellation: cancels the asyncio task, and waits for what comes of that.  An item that the generator yields all the same is
        returned.
        """
        if self._carried is None:
            await checkpoint_if_cancelled()
            self._carried = Carried(self._loop, self._run, (), name_of(self._make), self._redeliver)
            self._carried.task.add_done_callback(self._wake)
        elif not self._items:
            self._tell(_next)
        return await self._outcome()

    async def throw(self, error: BaseException) -> Any:
        """Raise an error at the ``yield``; returns the next item, or END."""
        assert self._carried is not None
        while True:
            self._items.clear()  # what it has recovered to from something of its own meanwhile
            if self._carried.task.done():
                self._carried.result()
                raise error
            if self._tell(lambda generator: generator.athrow(error)):
                # Where nobody is left to yield to, the cancellation that comes for the same reason is no second one.
                return await self._outcome(told=isinstance(error, CommClosedError))
            await self._wait()

    async def cancel(self, cancelled: trio.Cancelled) -> Any:
        """Raise CancelledError at the ``yield``, since ``cancelled`` was raised here; returns the next item, or END.

        Raises:
            trio.Cancelled: the generator has ended by that.
        """

        def again() -> None:
            raise cancelled

        assert self._carried is not None
        self._items.clear()
        if self._carried.task.done():
            self._carried.result()
            raise cancelled
        return await self._outcome(again)

    async def close(self) -> None:
        """End the generator where it is, as its ``aclose()``."""
        if self._carried is None or self._carried.task.done():
            return
        while not self._carried.task.done():
            self._items.clear()
            self._tell(_close)  # else a step of its own is under way
            await self._wait()
        self._carried.result()

    def _tell(self, do: _Do) -> bool:
        """Say what to do next; False if a cancellation of its own came first."""
        if self._told is None or self._told.done():
            return False
        self._told.set_result(do)
        return True

    async def _outcome(self, raise_cancel: Callable[[], Any] | None = None, *, told: bool = False) -> Any:
        assert self._carried is not None
        if raise_cancel is None:
            await self._carried.patiently(self._items)
        if not self._items and not self._carried.task.done():
            await self._wait(raise_cancel, told=told)
        if self._items:
            return self._items.pop()
        self._carried.result()
        return END

    async def _wait(self, raise_cancel: Callable[[], Any] | None = None, *, told: bool = False) -> None:
        assert self._carried is not None
        self._waiter = current_task()
        await self._carried.wait_rescheduled(raise_cancel, told=told)


def _next(generator: AsyncGenerator[Any, None]) -> Awaitable[Any]:
    return generator.__anext__()


async def _close(generator: AsyncGenerator[Any, None]) -> Any:
    try:
        await generator.aclose()
    except BaseExceptionGroup as group:
        _, rest = group.split(GeneratorExit)  # of a TaskGroup round its `yield`, which has put it in there
        if rest is not None:
            raise rest from rest.__cause__
    raise StopAsyncIteration
