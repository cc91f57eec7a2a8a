"""The error that only the bridge raises."""

from __future__ import annotations

from ..errors import RPCClosed

__all__ = ["PortalClosed"]


class PortalClosed(RPCClosed, RuntimeError):
    """The trio run that was to do this has ended, or ends: the ``async with open_trio()`` block was left, or the event loop stops.

    Raised by everything of :mod:`trio_dcore.aio` that runs in trio.  What was in flight was cancelled and its cleanup has run; whether
    a request took effect is unknown.
    """
