"""Servers: handlers, connections and an orderly end."""

from __future__ import annotations

from ._handlers import Handler, in_thread, run_to_end
from ._request import Request, current_request
from ._server import BaseServer
from ._signals import stop_on_signals
from ._statistics import ServerStatistics
from ._status import Status

__all__ = [
    "BaseServer",
    "Handler",
    "Request",
    "ServerStatistics",
    "Status",
    "current_request",
    "in_thread",
    "run_to_end",
    "stop_on_signals",
]
