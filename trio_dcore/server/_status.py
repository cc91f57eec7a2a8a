"""The server's life: a table of states, and Dask's names for them."""

from __future__ import annotations

import enum

from ..errors import LocalProtocolError
from ..protocol._enums import register_enum

__all__ = ["Life", "Status"]


class Status(enum.Enum):
    """The states of a server under Dask's names; on the wire it is ``distributed.core.Status``.

    A handler that has answered by itself returns :attr:`dont_reply`.
    """

    undefined = "undefined"
    created = "created"
    init = "init"
    starting = "starting"
    running = "running"
    paused = "paused"
    stopping = "stopping"
    stopped = "stopped"
    closing = "closing"
    closing_gracefully = "closing_gracefully"
    closed = "closed"
    failed = "failed"
    dont_reply = "dont_reply"


register_enum("distributed.core", "Status", Status)


class Life(enum.Enum):
    """Where a server is in its life, with the status that it shows."""

    NEW = Status.init
    SERVING = Status.running
    DRAINING = Status.closing_gracefully
    CLOSING = Status.closing
    CLOSED = Status.closed

    def move(self, to: Life) -> Life:
        """Return ``to`` if the table allows it from here; anything else is a mistake of this library."""
        if to not in _MOVES[self]:
            raise LocalProtocolError(f"a server can't go from {self.name} to {to.name}")
        return to


_MOVES: dict[Life, frozenset[Life]] = {
    Life.NEW: frozenset({Life.SERVING, Life.CLOSED}),  # CLOSED: the start failed, or it was stopped before
    Life.SERVING: frozenset({Life.DRAINING, Life.CLOSING}),  # CLOSING: cancelled, or a grace of 0
    Life.DRAINING: frozenset({Life.CLOSING}),
    Life.CLOSING: frozenset({Life.CLOSED}),
    Life.CLOSED: frozenset(),
}
