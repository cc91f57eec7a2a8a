"""Every error of trio_dcore in one place.

::

    DcoreError
    ├── ProtocolError: LocalProtocolError (you broke the rules) · RemoteProtocolError (the peer did; the comm is closed)
    ├── LimitExceeded        names the limit, its value, what was seen and the setting to change
    ├── UnsafePayload        pickle from or to a peer that is not trusted
    ├── SerializationError   this value cannot be sent
    ├── AddressError(ValueError) · ConnectError(OSError)
    ├── CommClosedError(OSError, trio.BrokenResourceError)
    ├── RPCClosed(OSError)
    ├── ServerClosing · Overloaded · NotAllowed
    └── RemoteError: UnknownOp · HandlerCancelled

trio's ``ClosedResourceError``, ``BrokenResourceError``, ``BusyResourceError`` and ``EndOfChannel`` keep their meaning.
"""

from __future__ import annotations

import trio

from .protocol._errors import (
    DcoreError,
    HandlerCancelled,
    LimitExceeded,
    LocalProtocolError,
    NotAllowed,
    Overloaded,
    ProtocolError,
    RemoteError,
    RemoteProtocolError,
    SerializationError,
    ServerClosing,
    UnknownOp,
    UnsafePayload,
)

__all__ = [
    "AddressError",
    "CommClosedError",
    "ConnectError",
    "DcoreError",
    "HandlerCancelled",
    "LimitExceeded",
    "LocalProtocolError",
    "NotAllowed",
    "Overloaded",
    "ProtocolError",
    "RPCClosed",
    "RemoteError",
    "RemoteProtocolError",
    "SerializationError",
    "ServerClosing",
    "UnknownOp",
    "UnsafePayload",
]


class AddressError(DcoreError, ValueError):
    """This text is no address that can be used here.  Raised before anything is opened."""


class ConnectError(DcoreError, OSError):
    """No comm could be made in the time given; ``__cause__`` is the last attempt's error.  Retrying later is safe."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CommClosedError(DcoreError, OSError, trio.BrokenResourceError):
    """The comm ended, or was closed, before the operation was done.

    The comm is of no use any more.  Whether a request that was being made took effect is unknown, unless nothing of it was sent.

    Attributes:
        nothing_sent: not a byte of the message that was being written has left.
    """

    nothing_sent: bool = False

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class RPCClosed(DcoreError, OSError):
    """The rpc or pool was used after it was closed, or was closed while the call waited for a comm."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""
