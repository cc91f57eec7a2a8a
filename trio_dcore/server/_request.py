"""The request that is being answered, for the handler that answers it."""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import TYPE_CHECKING

import trio

from ..abc import Peer
from ..errors import LocalProtocolError

if TYPE_CHECKING:
    from ._connection import Connection
    from ._server import BaseServer

__all__ = ["Request", "checked_families", "current_request", "request_variable"]


class Request:
    """What a handler may know of its request; see :func:`current_request`.

    Attributes:
        op: the name it was called by.
        peer: who called.
        deadline: the time, by trio's clock, at which the caller stops waiting; ``math.inf`` if it told none.
        serializers: the families that the caller accepts for what it is sent; None if it told none.
    """

    __slots__ = ("_connection", "deadline", "op", "peer", "serializers")

    def __init__(self, connection: Connection, op: str, peer: Peer) -> None:
        self._connection = connection
        self.op: str = op
        self.peer: Peer = peer
        self.deadline: float = math.inf
        self.serializers: tuple[str, ...] | None = None

    @property
    def server(self) -> BaseServer:
        """The server that runs the handler."""
        return self._connection.server

    @property
    def running(self) -> bool:
        """Whether the handler still runs; tasks that it left behind elsewhere may ask."""
        return self._connection.request is self

    @property
    def shutdown_requested(self) -> trio.Event:
        """Set when the server starts to shut down: a stream may then end cleanly within the grace."""
        return self._connection.server.shutdown_requested

    def __repr__(self) -> str:
        return f"<Request {self.op!r} from {self.peer.address}>"


def checked_families(names: object) -> tuple[str, ...]:
    """The names of families in a request, if they are such."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"the request's 'serializers' must be a list of family names, not a {type(names).__name__}")
    return tuple(names)


request_variable: ContextVar[Request] = ContextVar("trio_dcore.request")


def current_request() -> Request:
    """The request that this task, or the task that started it, is answering.  Not a checkpoint.

    Raises:
        LocalProtocolError: called outside of a handler.
    """
    try:
        return request_variable.get()
    except LookupError:
        raise LocalProtocolError("current_request() is for handlers: no request is being answered here") from None
