"""What a server is made with: mistakes are told there and then, and not by the first request."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping

from ..abc import Peer
from ._handlers import Handler, is_code

__all__ = ["check_arguments", "check_seconds"]


def check_seconds(parameter: str, seconds: float) -> None:
    """ValueError if it is no length of time."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise ValueError(f"{parameter}={seconds!r}: must be a number of seconds, 0 or more")


def check_arguments(
    handlers: Mapping[str, Handler],
    stream_handlers: Mapping[str, Handler],
    blocked_handlers: Collection[str],
    authorize: Callable[[Peer, str], bool] | None,
    connection_limit: int,
) -> None:
    """ValueError or TypeError for what can't be right; see :class:`trio_dcore.Server`."""
    if not isinstance(connection_limit, int) or connection_limit < 1:
        raise ValueError(f"connection_limit={connection_limit!r}: must be a whole number, at least 1")
    for parameter, given in (("handlers", handlers), ("stream_handlers", stream_handlers)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{parameter}={given!r}: give a dict of functions by their ops")
    for op, handler in [*handlers.items(), *stream_handlers.items()]:
        if not isinstance(op, str):
            raise TypeError(f"the op {op!r} is not a str")
        if not callable(handler):
            raise TypeError(f"the handler for {op!r} is {handler!r}, which can't be called")
    if isinstance(blocked_handlers, str):
        raise TypeError(f"blocked_handlers={blocked_handlers!r}: give a collection of ops, such as [{blocked_handlers!r}]")
    if authorize is not None and is_code(authorize, inspect.iscoroutinefunction):
        raise TypeError("authorize must be a plain function that returns a bool, not an async one")
    if authorize is not None and not callable(authorize):
        raise TypeError(f"authorize={authorize!r}: must be a function of a peer and an op that returns a bool")
