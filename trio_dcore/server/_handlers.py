"""What kinds of handler there are, and how to tell."""

from __future__ import annotations

import difflib
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from ._throttle import Throttle

__all__ = ["HandlerEntry", "closest", "in_thread", "is_code", "run_to_end", "thread_of", "wrong_arguments"]

Handler = Callable[..., Any]
_F = TypeVar("_F", bound=Handler)

_MARK = "__trio_dcore_mark__"
# difflib compares every pair of characters: names longer than any sensible op get no suggestions.
_LONGEST_GUESS = 64


@dataclass(slots=True)
class _Mark:
    """How a function is marked."""

    function: Handler
    in_thread: bool = False
    limiter: trio.CapacityLimiter | None = None
    run_to_end: bool = False
    #: What carries the mark.
    marked: Handler | None = None


def _mark(mark: _Mark) -> Handler:
    function = mark.function

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    setattr(marked, _MARK, mark)
    mark.marked = marked
    return marked


def _unmarked(function: Handler) -> tuple[Handler, list[_Mark]]:
    """A handler without its marks, and the marks, the outermost first: they may stand on each other, and under a partial."""
    marks: list[_Mark] = []
    while True:
        mark: _Mark | None = getattr(function, _MARK, None)
        if mark is not None:
            marks.append(mark)
            # Of a bound method the mark is on the function that it binds.
            if (function.__func__ if isinstance(function, types.MethodType) else function) is not mark.marked:
                # Somebody's wrapper, to which functools.wraps() copied the mark.  It holds, but the wrapper is not to be passed by.
                return function, marks + _unmarked(mark.function)[1]
            method = function if isinstance(function, types.MethodType) else None
            function = mark.function if method is None else types.MethodType(mark.function, method.__self__)
            continue
        if isinstance(function, functools.partial):
            inner, more = _unmarked(function.func)
            if more:
                return functools.partial(inner, *function.args, **function.keywords), marks + more
        return function, marks


def in_thread(function: _F, *, limiter: trio.CapacityLimiter | None = None) -> _F:
    """Mark a blocking handler to be run in a worker thread.

    Args:
        function: a plain function.
        limiter: bounds how many run at once; trio's default limiter of 40 threads otherwise.

    Cancellation: a thread can't be interrupted, so a cancelled request ends when the function returns, and so does a server that
    is shutting down.

    Raises:
        TypeError: the function is async, so it would only make its coroutine in the thread.
    """
    plain, _ = _unmarked(function)
    if _is_async(plain):
        raise TypeError(f"in_thread() is for blocking functions, and {plain!r} is async")
    return _mark(_Mark(function, in_thread=True, limiter=limiter))  # type: ignore[return-value]  # same call signature


def run_to_end(function: _F) -> _F:
    """Mark a handler that is not cancelled when its caller goes away.  Shutdown and deadlines still cancel it."""
    return _mark(_Mark(function, run_to_end=True))  # type: ignore[return-value]  # same call signature


@dataclass(slots=True)
class HandlerEntry:
    """What the dispatcher must know of a handler, found out once.

    Attributes:
        handler: what stands in the server's dict.
        function: what to call: the handler without its marks.
        streams: it may give many answers: it is a generator or takes the comm.
        failures: of log lines about failures that nobody else is told of.
    """

    handler: Handler
    function: Handler
    generator: bool
    takes_comm: bool
    streams: bool
    takes_serializers: bool
    in_thread: bool
    limiter: trio.CapacityLimiter | None
    run_to_end: bool
    failures: Throttle = field(default_factory=Throttle)

    @classmethod
    def of(cls, function: Handler) -> HandlerEntry:
        """Classify a handler."""
        called, marks = _unmarked(function)
        names = _parameter_names(called)
        generator = is_code(called, inspect.isasyncgenfunction)
        takes_comm = bool(names) and names[0] == "comm"
        return cls(
            handler=function,
            function=called,
            generator=generator,
            takes_comm=takes_comm,
            streams=generator or takes_comm,
            takes_serializers="serializers" in names,
            in_thread=any(mark.in_thread for mark in marks) and not _is_async(called),
            limiter=next((mark.limiter for mark in marks if mark.limiter is not None), None),
            run_to_end=any(mark.run_to_end for mark in marks),
        )


def is_code(function: Handler, what: Callable[[object], bool]) -> bool:
    """Whether calling it runs code of that kind: its own, that under a partial, or that of its class's ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    # Of its class, not its own: calling a class makes an instance, and doesn't run the instance's __call__.
    return what(function) or what(getattr(type(function), "__call__", None))  # noqa: B004  # not a test for being callable


def thread_of(function: Handler) -> tuple[Handler, bool, trio.CapacityLimiter | None]:
    """What to call for a handler of a message stream: (it without its marks, whether that takes a thread, the limiter for it)."""
    called, marks = _unmarked(function)
    if not marks:
        return called, False, None  # nearly always
    limiter = next((mark.limiter for mark in marks if mark.limiter is not None), None)
    return called, any(mark.in_thread for mark in marks) and not _is_async(called), limiter


def _is_async(function: Handler) -> bool:
    return is_code(function, inspect.iscoroutinefunction) or is_code(function, inspect.isasyncgenfunction)


def _parameter_names(function: Handler) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []  # some builtins have no signature; they certainly don't take a comm


def wrong_arguments(
    op: str, function: Handler, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: TypeError, caller: types.CodeType
) -> TypeError | None:
    """The error to answer if ``error`` means that the call itself didn't fit, None if the handler raised it by itself.

    Args:
        op: the name it was called by.
        function: the handler.
        args: what it was called with.
        kwargs: what it was called with by name.
        error: what that raised.
        caller: the code that made the call; if the traceback ends there, no Python code of the handler ran.
    """
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or traceback.tb_frame.f_code is not caller:
        return None
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return TypeError(f"wrong arguments for {op!r}: {error}")
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return TypeError(f"wrong arguments: {error}; the handler is {op}{signature}")
    return None  # the arguments fit: a handler written in C raised this


def closest(op: str, handlers: Mapping[str, object]) -> str:
    """The end of a sentence that names the ops most like ``op``; empty if none is."""
    if len(op) > _LONGEST_GUESS:
        return ""
    names = difflib.get_close_matches(op, [name for name in handlers if isinstance(name, str)][:1000], n=3)
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""
