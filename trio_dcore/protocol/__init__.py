"""The sans-IO core: framing, messages, serialization families, compression, the handshake and remote errors.

It is fed bytes and hands out buffers.  It imports neither trio nor asyncio, opens no socket and reads no clock, so it can be
used, and is tested, without any of them.  numpy, the compressors and cloudpickle are imported when a message first needs them.
"""

from __future__ import annotations

from ._bytes import deserialize_bytes, serialize_bytelist, serialize_bytes
from ._context import Buffer, DecodeContext, EncodeContext
from ._errors import (
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
from ._families import deserialize, open_serialized, register_serialization, serialize
from ._frames import FrameParser, pack_prelude
from ._generic import register_generic
from ._handshake import Extension, Negotiated, local_handshake, negotiate
from ._limits import GiB, KiB, Limits, MiB
from ._messages import Decoder, Encoder, dumps, loads
from ._remote_errors import error_reply, error_value, exception_from_reply, exception_from_value
from ._types import Pickled, Serialize, Serialized, ToPickle, to_serialize

__all__ = [
    "Buffer",
    "DcoreError",
    "DecodeContext",
    "Decoder",
    "EncodeContext",
    "Encoder",
    "Extension",
    "FrameParser",
    "GiB",
    "HandlerCancelled",
    "KiB",
    "LimitExceeded",
    "Limits",
    "LocalProtocolError",
    "MiB",
    "Negotiated",
    "NotAllowed",
    "Overloaded",
    "Pickled",
    "ProtocolError",
    "RemoteError",
    "RemoteProtocolError",
    "SerializationError",
    "Serialize",
    "Serialized",
    "ServerClosing",
    "ToPickle",
    "UnknownOp",
    "UnsafePayload",
    "deserialize",
    "deserialize_bytes",
    "dumps",
    "error_reply",
    "error_value",
    "exception_from_reply",
    "exception_from_value",
    "loads",
    "local_handshake",
    "negotiate",
    "open_serialized",
    "pack_prelude",
    "register_generic",
    "register_serialization",
    "serialize",
    "serialize_bytelist",
    "serialize_bytes",
    "to_serialize",
]
