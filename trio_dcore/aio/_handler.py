"""Asyncio-flavoured code for trio tasks: a server's handlers, and single calls."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from types import FunctionType, MethodType
from typing import Any, TypeVar, overload

import trio
from trio.lowlevel import checkpoint_if_cancelled

from .. import abc
from ._carry import name_of, run_in_asyncio
from ._comm import Comm
from ._generators import END, GeneratorRun
from ._loop import redeliver_of, running_loop
from ._portal import Portal, current_portal

__all__ = ["handler", "run_asyncio"]

T = TypeVar("T")
# On what is made here, which is for trio.
_MADE = "__trio_dcore_asyncio__"

_F = TypeVar("_F", bound=Callable[..., Any])


async def run_asyncio(fn: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Call an asyncio coroutine function from a trio task: ``await run_asyncio(session.get, url)``.

    It runs in an asyncio task of its own, with the caller's context variables, in the loop of the :func:`open_loop` block around.

    Cancellation: cancels the asyncio task and waits for it to end, for what it does in ``finally`` too.  If it has not ended after
    ``open_loop(redeliver=...)`` seconds it is cancelled again, and named in the log, and so on.  If it ended by that, ``trio.Cancelled`` is
    raised; if it returned or raised something else after all, then that.

    Args:
        fn: the coroutine function; ``functools.partial`` gives it keyword arguments.
        *args: its arguments.

    Raises:
        LocalProtocolError: there is no loop here.
        RuntimeError: it ended by an ``asyncio.CancelledError`` that no cancel scope of trio asked for; that is its ``__cause__``.
    """
    loop = running_loop()
    return await run_in_asyncio(loop, fn, *args, redeliver=redeliver_of(loop))


@overload
def handler(fn: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]: ...


@overload
def handler(fn: _F) -> _F: ...


def handler(fn: Any) -> Any:
    """Make asyncio-flavoured code a handler of a :class:`trio_dcore.Server`; also as a decorator.

    ::

        async with aio.open_loop(), Server(aio.handler({"fetch": fetch, "ticks": ticks})) as server: ...

    Coroutine functions and async generators run in an asyncio task of their own, one for the whole of a request: with the context
    variables of the request, so that :func:`current_request` works, and cancelled where a trio handler would be.  A parameter ``comm``
    that stands first gets an :class:`aio.Comm <trio_dcore.aio.Comm>`.  Plain functions are called as they are, but what they return may
    be for asyncio: an awaitable, or an async generator.  :func:`in_thread` and :func:`run_to_end` may stand inside or outside.

    The loop is that of the :func:`open_loop` block in which the server was started.

    Args:
        fn: a handler, or a dict of handlers.

    Raises:
        TypeError: it can't be called.
    """
    if isinstance(fn, Mapping):
        return {op: handler(each) for op, each in fn.items()}
    if not callable(fn):
        raise TypeError(f"{fn!r} is neither a handler, which can be called, nor a dict of handlers")
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    if hasattr(inner, _MADE):
        return fn  # or a wrapper of one, as that of run_to_end(), which copies attributes
    if _is(fn, inspect.isasyncgenfunction):
        made: Any = _generator(fn)
    elif _is(fn, inspect.iscoroutinefunction):
        made = _coroutine(fn)
    else:
        made = _plain(fn)
    # The marks of in_thread() and run_to_end() are attributes; those of other objects are their own.
    functools.update_wrapper(made, inner, updated=("__dict__",) if isinstance(inner, (FunctionType, MethodType)) else ())
    made.__wrapped__ = fn
    setattr(made, _MADE, True)
    return made


def _is(fn: Any, what: Callable[[object], bool]) -> bool:
    """Whether calling it runs code of that kind: its own, that under a partial, or that of its class's ``__call__``."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return what(fn) or what(getattr(type(fn), "__call__", None))  # noqa: B004  # not a test for being callable


# -- the three kinds -------------------------------------------------------------------------------------------------------------------


def _coroutine(fn: Callable[..., Any]) -> Callable[..., Any]:
    async def carried(*args: Any, **kwargs: Any) -> Any:
        loop = running_loop()
        try:
            return await _run(loop, functools.partial(fn, *_flavoured(loop, args), **kwargs))
        except TypeError as error:
            raise _explained(error, fn, args, kwargs)  # noqa: B904  # it may be the same

    return carried


def _generator(fn: Callable[..., Any]) -> Callable[..., Any]:
    async def carried(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        loop = running_loop()
        run = GeneratorRun(loop, functools.partial(fn, *_flavoured(loop, args), **kwargs), redeliver_of(loop))
        try:
            try:
                item = await run.next()
            except TypeError as error:
                raise _explained(error, fn, args, kwargs)  # noqa: B904  # it may be the same
            while item is not END:
                try:
                    yield item
                except GeneratorExit:
                    raise
                except trio.Cancelled as cancelled:
                    item = await run.cancel(cancelled)
                except BaseException as error:
                    item = await run.throw(error)
                else:
                    item = await run.next()
        finally:
            await run.close()

    return carried


def _plain(fn: Callable[..., Any]) -> Callable[..., Any]:
    def carried(*args: Any, **kwargs: Any) -> Any:
        loop = running_loop()
        try:
            result = fn(*_flavoured(loop, args), **kwargs)
        except TypeError as error:
            raise _explained(error, fn, args, kwargs)  # noqa: B904  # it may be the same
        if inspect.isawaitable(result):
            return _run(loop, functools.partial(_awaited, result))
        if isinstance(result, AsyncGenerator):
            return _generator(lambda: result)()
        return result

    return carried


async def _run(loop: asyncio.AbstractEventLoop, fn: Callable[[], Awaitable[Any]]) -> Any:
    result = await run_in_asyncio(loop, fn, redeliver=redeliver_of(loop))
    # Where it swallowed its cancellation: a handler that was cut has no result.
    await checkpoint_if_cancelled()
    return result


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _flavoured(loop: asyncio.AbstractEventLoop, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with comms of asyncio's flavour.  All others come by name."""
    return tuple(Comm(arg, _portal(loop)) if isinstance(arg, abc.Comm) else arg for arg in args)


def _portal(loop: asyncio.AbstractEventLoop) -> Portal:
    for portal in (current_portal.get(), getattr(loop, "portal", None)):
        if portal is not None and portal.loop is loop and not portal.closed:
            return portal
    return Portal(loop, None)  # of a trio_asyncio.open_loop()


def _explained(error: TypeError, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TypeError:
    """What to raise for an error of calling ``fn``: if the arguments didn't fit, an error that says so in a server's words."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return error
    try:
        signature.bind(*args, **kwargs)
    except TypeError as misfit:
        return TypeError(f"wrong arguments: {misfit}; the handler is {name_of(fn)}{signature}")
    return error
