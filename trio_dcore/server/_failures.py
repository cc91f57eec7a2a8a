"""What requests fail with that is not their handler's own, and how to tell."""

from __future__ import annotations

import trio

from .._util import leaves
from ..errors import CommClosedError, HandlerCancelled, LimitExceeded, RemoteProtocolError

__all__ = ["ENDS", "cancelled_because", "it_streams", "the_peers_doing"]

#: Say no more than that somebody has gone.
ENDS = CommClosedError, trio.ClosedResourceError, trio.EndOfChannel, HandlerCancelled


def cancelled_because(reason: str) -> HandlerCancelled:
    """The answer to a request whose handler was cancelled: "deadline", "grace over" or "server cancelled"."""
    error = HandlerCancelled(f"the handler was cancelled: {reason}")
    error.reason = reason
    return error


def it_streams(op: str) -> TypeError:
    """The answer to a request for one reply, where the handler gives many; it was not started."""
    return TypeError(f"{op!r} streams; use .stream()")


def the_peers_doing(error: BaseException) -> Exception | None:
    """Why the peer's messages were refused, if that is all that a handler on a closed comm has raised, maybe in a group."""
    faults = [leaf for leaf in leaves(error) if isinstance(leaf, (RemoteProtocolError, LimitExceeded))]
    others = [leaf for leaf in leaves(error) if not isinstance(leaf, (RemoteProtocolError, LimitExceeded))]
    return faults[0] if faults and all(isinstance(leaf, ENDS) for leaf in others) else None
