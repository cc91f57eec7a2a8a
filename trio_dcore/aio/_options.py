"""Keyword arguments that mean the same in both flavours; the classes and functions of :mod:`trio_dcore` explain them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from .._security import Security
from ..abc import Peer
from ..protocol import Limits

__all__ = ["CommOptions", "ServerOptions"]


class CommOptions(TypedDict, total=False):
    """Of :func:`trio_dcore.connect`, :class:`trio_dcore.rpc` and :class:`trio_dcore.ConnectionPool`."""

    security: Security | None
    limits: Limits | None
    deserialize: bool
    timeout: float | None
    serializers: Sequence[str] | None
    deserializers: Sequence[str] | None
    compression: str | None
    offload: int | None


class ServerOptions(CommOptions, total=False):
    """Of :class:`trio_dcore.Server`."""

    connection_limit: int
    grace: float
    drain_on_cancel: float
    authorize: Callable[[Peer, str], bool] | None
