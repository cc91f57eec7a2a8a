"""Running a handler's code on the connection's own task, for next to nothing.

A handler gets a context of its own, so that the context variables it sets are not seen by the next request on the connection, and
somebody may want to know when it first has to wait.  Both are had by stepping its coroutine here, with nothing but the generator
protocol: what it yields goes on to trio, what trio sends or throws goes in to it.  No task, scope or event is made.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextvars import Context
from typing import Any

import trio
from outcome import Error
from trio.lowlevel import checkpoint_if_cancelled

__all__ = ["drive", "frames_of", "resume"]

_NOT_BEGUN = object()


@types.coroutine
def _steps(
    context: Context,
    coroutine: Coroutine[Any, Any, Any],
    on_wait: Callable[[], None] | None,
    whole: bool,
    trap: Any = _NOT_BEGUN,
) -> Generator[Any, Any, Any]:
    run = context.run
    send = coroutine.send
    if trap is _NOT_BEGUN:
        try:
            trap = run(send, None)
        except StopIteration as stop:
            return stop.value
    if on_wait is not None:
        on_wait()
    cancelled = False
    while True:
        try:
            value = yield trap
        except BaseException as error:
            try:
                trap = run(coroutine.throw, error)
            except StopIteration as stop:
                result = stop.value
                break
        else:
            # This is how trio delivers what wait_task_rescheduled() raises.
            if type(value) is Error and isinstance(value.error, trio.Cancelled):
                cancelled = True
            try:
                trap = run(send, value)
            except StopIteration as stop:
                result = stop.value
                break
    if cancelled and whole:
        yield from checkpoint_if_cancelled()  # noqa: ASYNC105  # this is how a types.coroutine awaits
    return result


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def drive(
    context: Context, awaitable: Awaitable[Any], on_wait: Callable[[], None] | None = None, *, whole: bool = True
) -> Awaitable[Any]:
    """Await ``awaitable`` with each of its steps run in ``context``.

    Args:
        context: where the steps run.
        awaitable: usually a coroutine.
        on_wait: called, synchronously, when it has to wait for the first time, and not at all if it never has to.
        whole: it is all of a handler.  If it swallowed a Cancelled and a scope round it is still cancelled at its end, then that is
            raised: a handler that was cut has no result.  False for one step of a handler, which may see to that itself later.
    """
    coroutine = awaitable if type(awaitable) is types.CoroutineType else _awaited(awaitable)
    return _steps(context, coroutine, on_wait, whole)


def resume(context: Context, step: Any, trap: Any, on_wait: Callable[[], None] | None) -> Awaitable[Any]:
    """:func:`drive` one step of a generator that has been begun by its ``send(None)`` in ``context``, and has to wait.

    Args:
        context: where the step runs.
        step: what ``__anext__()`` and the like have returned.
        trap: what that ``send`` has returned, which is for trio.
        on_wait: called, synchronously, at once.
    """
    return _steps(context, step, on_wait, False, trap)


def frames_of(task: trio.lowlevel.Task) -> Iterator[tuple[types.FrameType, int]]:
    """Where a task waits: as ``task.iter_await_frames()``, and on into a handler that is driven here, which that does not see."""
    frame = None
    for frame, line in task.iter_await_frames():
        yield frame, line
    if frame is not None and frame.f_code is _steps.__code__:
        yield from _await_frames(frame.f_locals["coroutine"])


def _await_frames(awaitable: Any) -> Iterator[tuple[types.FrameType, int]]:
    while awaitable is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(awaitable, f"{kind}_frame", None)
            if frame is not None:
                yield frame, frame.f_lineno
                awaitable = getattr(awaitable, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
                break
        else:
            # A step of an async generator, which does not show whose it is.
            referents = gc.get_referents(awaitable)
            awaitable = next((each for each in referents if isinstance(each, types.AsyncGeneratorType)), None)
