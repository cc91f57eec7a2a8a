"""One value to bytes and back, as ``distributed.protocol.serialize_bytes`` does it: for a file or another carrier.

::

    u64 n | n x u64 length | header | frame 1 | ... | frame n-1

The header is that of a ``__Serialized__`` payload (wire document, section 5.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from struct import error as StructError
from typing import Any

from msgpack import packb

from ._buffers import nbytes
from ._collisions import Keys, unpack_plain
from ._compression import AUTO, check_codec, default_codec
from ._context import Buffer, DecodeContext, EncodeContext
from ._errors import RemoteProtocolError
from ._families import deserialize, serialize

__all__ = ["deserialize_bytes", "serialize_bytelist", "serialize_bytes"]

_U64 = Struct("<Q")


def serialize_bytelist(
    value: object, *, compression: str | None = AUTO, serializers: Sequence[str] | None = None
) -> list[Buffer]:
    """The pieces of :func:`serialize_bytes`, which are not joined, so that large ones needn't be copied."""
    codec = check_codec(compression)
    context = EncodeContext(
        compression=default_codec() if codec == AUTO else codec, serializers=None if serializers is None else tuple(serializers)
    )
    header, frames = serialize(value, context)
    header["count"] = len(frames)
    pieces: list[Buffer] = [packb(header, use_bin_type=True), *frames]
    return [Struct(f"<{len(pieces) + 1}Q").pack(len(pieces), *map(nbytes, pieces)), *pieces]


def serialize_bytes(value: object, *, compression: str | None = AUTO, serializers: Sequence[str] | None = None) -> bytes:
    """Serialize a value, as ``Serialize`` in a message would, to bytes that :func:`deserialize_bytes` and stock Dask read.

    Args:
        value: any that ``Serialize`` takes.
        compression: a codec, "auto" for lz4 or else snappy, if it is installed, or None.
        serializers: families to try, in order; default ``("dask", "pickle")``.

    Raises:
        SerializationError: no family takes it.
        ValueError: there is no such codec, or it is not installed.
    """
    return b"".join(serialize_bytelist(value, compression=compression, serializers=serializers))


def deserialize_bytes(
    data: Buffer, *, deserializers: Sequence[str] | None = None, trusted: bool = True, most: int | None = None
) -> Any:
    """The value of what :func:`serialize_bytes`, ours or stock Dask's, made of it.

    Args:
        data: all of it.
        deserializers: families accepted; default all.
        trusted: load pickles, which runs whatever code their maker chose.  For data from a stranger it must be False.
        most: bytes that it may have when decompressed; None is any number.

    Raises:
        UnsafePayload: it takes a pickle, and is not trusted; nothing was unpickled.
        RemoteProtocolError: it is not what that function makes.
        SerializationError, LimitExceeded, TypeError: as for a message.
    """
    view = memoryview(data).cast("B")
    try:
        (count,) = _U64.unpack_from(view)
        # Before anything is made of that number: so many lengths are there.
        if not 0 < count <= (len(view) - 8) // 8:
            raise RemoteProtocolError(f"{len(view)} bytes are too few for the {count} pieces that they tell of")
        lengths = Struct(f"<{count}Q").unpack_from(view, 8)
    except StructError as exc:
        raise RemoteProtocolError(f"{len(view)} bytes are too few for a serialized value") from exc
    position = 8 + 8 * count
    if position + sum(lengths) != len(view):
        raise RemoteProtocolError(f"a serialized value of {position + sum(lengths)} bytes, of which {len(view)} are there")
    pieces = []
    for length in lengths:
        pieces.append(view[position : position + length])
        position += length
    keys = Keys()
    try:
        header = unpack_plain(pieces[0], keys)
    except RemoteProtocolError:
        raise
    except Exception as exc:
        raise RemoteProtocolError(f"the header of a serialized value can't be read: {type(exc).__name__}: {exc}") from exc
    if not isinstance(header, dict):
        raise RemoteProtocolError("the header of a serialized value is no map")
    context = DecodeContext(
        allow_pickle=lambda: trusted,
        deserializers=None if deserializers is None else tuple(deserializers),
        max_message=lambda: most,
    )
    return deserialize(header, list(pieces[1:]), context, keys=keys)
