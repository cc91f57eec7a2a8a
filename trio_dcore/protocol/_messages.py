"""Messages: Python values to frames and back (wire document, section 5).

Frame 0 is the msgpack of the message.  What msgpack has no form for is replaced by a *marker*, a map with one of four keys::

    {"__Serialized__": k}    a value in the frames from k on: a header frame, then its payload frames
    {"__Pickled__": k}       the same, a pickle
    {"__Set__": true, "as-list": [...]}
    {"__Enum__": true, "name": ..., "__module__": ..., "__name__": ...}

and, on a comm that speaks the wire extension, by an extension value (:mod:`._extensions`).

*Encoding* (:mod:`._encoding`) is one call of a msgpack packer, whose hook is called for what msgpack doesn't know, returns a
marker and collects frames.  A message of plain values costs the packing and a look for ``__`` in the result.  Only where that is
found are the marker keys counted, and only if there are more of them than the hook made is the message searched for dicts that
would be taken for markers.  Where in a message a fault lies is found by walking the message once it has failed.

*Decoding* (:mod:`._decoding`) has two phases, since a server decides by a message's op, before anything in it is deserialized,
whether this peer may call it: ``Decoder.head`` decodes frame 0 and leaves markers where they are; ``Decoder.resolve`` decodes it
again, payloads included, and is needed only if ``Decoder.has_markers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._context import Buffer, DecodeContext, EncodeContext
from ._decoding import Decoder
from ._encoding import Encoder

__all__ = ["Decoder", "Encoder", "dumps", "loads"]


def dumps(message: object, ctx: EncodeContext | None = None) -> list[Buffer]:
    """Encode one message; for many to the same peer an :class:`Encoder` is faster."""
    return Encoder(EncodeContext() if ctx is None else ctx).encode(message)


def loads(frames: Sequence[Buffer], ctx: DecodeContext | None = None, *, extensions: bool = False) -> Any:
    """Decode one message, payloads included."""
    return Decoder(DecodeContext() if ctx is None else ctx, extensions=extensions).resolve(frames)
