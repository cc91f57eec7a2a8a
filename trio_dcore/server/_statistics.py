"""What a server counts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..comm import BaseComm

if TYPE_CHECKING:
    from ._connection import Connection

__all__ = ["Counters", "ServerStatistics"]


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """A snapshot of a server's counts.

    Attributes:
        connections: open connections, those still handshaking included.
        handshaking: connections that have not finished their handshake.
        requests: handlers started since the server did, by op.
        in_flight: handlers running now, those cleaning up included.
        bytes_read: received since the start, in bytes; inproc has none.
        bytes_written: sent since the start, in bytes; inproc has none.
        errors: connections that ended because of an error: the peer's or an unexpected one.
        refused: requests and connections that were turned away: draining, overloaded, not allowed, no handshake in time or none
            before others needed the place.
        expired: connections that were closed because they were idle, for ``Limits.idle`` or to make room for others.
    """

    connections: int
    handshaking: int
    requests: Mapping[str, int]
    in_flight: int
    bytes_read: int
    bytes_written: int
    errors: int
    refused: int
    expired: int

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """The same as plain data, for a log or a message."""
        return {**{each.name: getattr(self, each.name) for each in fields(self)}, "requests": dict(self.requests)}


@dataclass(slots=True)
class Counters:
    """The running counts behind :class:`ServerStatistics`."""

    requests: dict[str, int] = field(default_factory=dict)
    in_flight: int = 0
    errors: int = 0
    refused: int = 0
    expired: int = 0
    _bytes_read: int = 0  # of connections that have ended
    _bytes_written: int = 0

    def closed(self, comm: BaseComm) -> None:
        """Keep the counts of a comm that has ended."""
        self._bytes_read += comm.bytes_read
        self._bytes_written += comm.bytes_written

    def snapshot(self, connections: Collection[Connection]) -> ServerStatistics:
        """The counts of this moment."""
        return ServerStatistics(
            connections=len(connections),
            handshaking=sum(connection.handshaking for connection in connections),
            requests=MappingProxyType(dict(self.requests)),
            in_flight=self.in_flight,
            bytes_read=self._bytes_read + sum(connection.comm.bytes_read for connection in connections),
            bytes_written=self._bytes_written + sum(connection.comm.bytes_written for connection in connections),
            errors=self.errors,
            refused=self.refused,
            expired=self.expired,
        )
