"""Which handler answers a request, and whether this peer may call it: all that is settled before a payload is touched."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING

from ..abc import Peer
from ..errors import NotAllowed, Overloaded, ServerClosing, UnknownOp
from ._handlers import HandlerEntry, closest
from ._throttle import shown

if TYPE_CHECKING:
    from ._server import BaseServer

__all__ = ["find_handler", "permitted"]

_log = logging.getLogger("trio_dcore.server")


def find_handler(server: BaseServer, peer: Peer, op: object) -> HandlerEntry | None:
    """The handler for an op that this peer may call; None for the pseudo-op "close".

    Raises:
        ValueError: that is no op.
        UnknownOp, NotAllowed, Overloaded, ServerClosing: the handler was not started.
    """
    if type(op) is not str:
        what = "has no 'op'" if op is None else f"has an 'op' that is a {type(op).__name__}, not a str"
        raise ValueError(f"the request {what}")
    if server.draining:
        server._statistics.refused += 1
        raise ServerClosing(f"the server is shutting down; {shown(op)} was not started")
    entry = server._entries.get(op)
    if entry is None or entry.handler is not server.handlers.get(op):
        if op in server.handlers:
            entry = server._entries[op] = HandlerEntry.of(server.handlers[op])
        elif op == "close":
            return None
        else:
            raise UnknownOp(f"unknown op {shown(op)}{closest(op, server.handlers)}")
    if op in server.blocked_handlers:
        server._statistics.refused += 1
        raise NotAllowed(f"the op {op!r} is blocked on this server")
    if server.authorize is not None and not _authorized(server, peer, op):
        server._statistics.refused += 1
        raise NotAllowed(f"{peer.address} may not call {op!r}")
    if server._statistics.in_flight >= server.most_requests:
        raise _overloaded(server, peer, op)
    return entry


def permitted(server: BaseServer, peer: Peer, op: str) -> bool:
    """Whether this peer may have a message of a stream handled."""
    return op not in server.blocked_handlers and (server.authorize is None or _authorized(server, peer, op))


def _overloaded(server: BaseServer, peer: Peer, op: str) -> Overloaded:
    server._statistics.refused += 1
    why = f"Limits(requests={server.most_requests:.0f})"
    if (more := server.overloads.due()) is not None:
        _log.warning("%s is at its limit, %s: %r from %s was not started%s", server.name, why, op, peer.address, more)
    return Overloaded(f"the server runs as many handlers as it may, {why}; {op!r} was not started")


def _authorized(server: BaseServer, peer: Peer, op: str) -> bool:
    assert server.authorize is not None
    try:
        _ = peer.trusted  # reaches its verdict now, so that the callback finds it settled
        verdict: object = server.authorize(peer, op)
        if inspect.isawaitable(verdict):
            # It would be true, whatever it has to say.
            if inspect.iscoroutine(verdict):
                verdict.close()
            raise TypeError("authorize must be a plain function that returns a bool, not an async one")
        return bool(verdict)
    except Exception:
        if (more := server.failed_authorizations.due()) is not None:
            _log.exception("authorize(%r, %r) failed, which refuses the request%s", peer, op, more)
        return False
