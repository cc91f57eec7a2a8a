"""The wire extension, version 1: what opted-in requests and their answers look like (docs/wire-extension.md).

An opted-in request is a plain Dask request with one more key, :data:`KEY`.  Everything sent back on it, and everything the client
sends behind it, is an envelope ``[kind, id, value]``, so that the kind is never guessed from the value.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._errors import RemoteProtocolError

__all__ = [
    "CANCEL",
    "END",
    "ERROR",
    "GOODBYE",
    "ITEM",
    "ITEMS",
    "KEY",
    "PING",
    "PONG",
    "REPLY",
    "WINDOW",
    "Credit",
    "RequestHeader",
    "parse_credit",
    "parse_envelope",
    "parse_request_header",
]

#: The reserved key of opted-in requests, of handshakes and of error replies.
KEY = "trio-dcore"

# Kinds of envelope; the numbers are the wire's (docs/wire-extension.md, section 4).
REPLY = 0
ERROR = 1
ITEM = 2
ITEMS = 3
END = 4
CANCEL = 5
WINDOW = 6
PING = 7
PONG = 8
GOODBYE = 9

_MAX_ID = 2**63 - 1
_MAX_CREDIT = 2**40
_MAX_DEADLINE = 1e9  # seconds


@dataclass(frozen=True, slots=True)
class Credit:
    """How much of a stream may be sent: ``items`` items and ``size`` bytes."""

    items: int
    size: int


@dataclass(slots=True)
class RequestHeader:
    """The value of :data:`KEY` in an opted-in request.

    Args:
        id: names the request in every envelope that belongs to it.
        deadline: seconds that the caller will still wait, None for ever.
        stream: the caller takes items.
        window: credit for items towards the caller; None means what its handshake said.
    """

    id: int
    deadline: float | None = None
    stream: bool = False
    window: Credit | None = None


def parse_request_header(value: object) -> RequestHeader:
    """Check the value of :data:`KEY` in a request.  Unknown keys are ignored; wrong ones raise RemoteProtocolError."""
    if type(value) is not dict:
        raise RemoteProtocolError(f"the request's {KEY!r} is {_shown(value)}, not a map")
    identity = value.get("id")
    if type(identity) is not int or not 1 <= identity <= _MAX_ID:
        raise RemoteProtocolError(f"the request's id is {_shown(identity)}, not an integer from 1 to 2**63 - 1")
    if len(value) == 1:
        return RequestHeader(identity)
    deadline = value.get("deadline")
    if deadline is not None:
        if type(deadline) not in (int, float) or deadline != deadline:
            raise RemoteProtocolError(f"the request's deadline is {_shown(deadline)}, not a number of seconds")
        # Ages, and integers that no float can hold, are for ever.
        deadline = None if deadline > _MAX_DEADLINE else float(max(deadline, -1.0))
    stream = value.get("stream", False)
    if type(stream) is not bool:
        raise RemoteProtocolError(f"the request's stream flag is {_shown(stream)}, not a bool")
    window = value.get("window")
    return RequestHeader(identity, deadline, stream, None if window is None else parse_credit(window))


def parse_credit(value: object) -> Credit:
    """Check the value of a *window* envelope: ``[items, bytes]``, each from 0 to 2**40."""
    if type(value) is tuple and len(value) == 2:
        items, size = value
        if type(items) is int and type(size) is int and 0 <= items <= _MAX_CREDIT and 0 <= size <= _MAX_CREDIT:
            return Credit(items, size)
    raise RemoteProtocolError(f"a window is {_shown(value)}, not [items, bytes], each from 0 to 2**40")


def parse_envelope(message: object) -> tuple[int, int, object]:
    """Check that a message is ``[kind, id, value]`` and return the three."""
    if type(message) is tuple and len(message) == 3:
        kind, identity, value = message
        if type(kind) is int and type(identity) is int and REPLY <= kind <= GOODBYE and 0 <= identity <= _MAX_ID:
            return kind, identity, value
    raise RemoteProtocolError(f"expected an envelope [kind, id, value], got {_shown(message)}")


def _shown(value: object) -> str:
    """A peer's value for an error message: its type, and what it is if that is short."""
    if type(value) is int and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"  # repr() of a huge one raises
    if value is None or type(value) in (int, float, bool):
        return repr(value)
    if isinstance(value, (str, bytes)):
        return repr(value[:40])
    return f"a {type(value).__name__}"
