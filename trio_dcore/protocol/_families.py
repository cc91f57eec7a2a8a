"""The values inside ``Serialize`` and ``ToPickle``: to header and frames, and back (wire document, section 5).

On sending: the value is given to the families in turn (``dask``, then ``pickle``), collections element by element; frames above
the shard size are cut; then compressed if that was negotiated.  On receiving the same backwards.  Frames are views of the
values' own memory on sending, and values are made over the received memory where their class can be; nothing large is copied.

Trust (security document, section 1): whatever would be unpickled is asked for first, and what a header says is checked before
it is used.  Hostile input leads to the errors named at :func:`deserialize` and to nothing else.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from . import _collections, _dask_family
from ._buffers import flat, join, nbytes, shards
from ._collisions import Keys, unpack_plain
from ._compression import Budget, compress_payload, decompress
from ._context import Buffer, DecodeContext, EncodeContext
from ._errors import DcoreError, LimitExceeded, RemoteProtocolError, SerializationError, UnsafePayload
from ._limits import Limits
from ._numpy import bare_numpy
from ._pickle import dump as _pickle_dump
from ._pickle import pickle_dumps, pickle_loads
from ._registry import register_serialization
from ._types import Pickled, Serialize, Serialized

__all__ = [
    "bare_numpy",
    "deserialize",
    "dump_value",
    "load_value",
    "needs_pickle",
    "open_serialized",
    "pickle_dumps",
    "pickle_loads",
    "pickled_parts",
    "reading_work",
    "register_serialization",
    "serialize",
    "unpickle_parts",
]

Header = dict[str, Any]

_DEFAULT = ("dask", "pickle")
# Deeper collections go as one pickle: the header nests with them, and msgpack ends at 511.
_MAX_DEPTH = 64
# Of the traceback of a value that can't be serialized.  Dask sends 100 000 characters; this is the default of Limits.error_text.
_ERROR_TEXT = 10_000
_STOCK_ERROR_TEXT = 100_000
# First bytes of a packed text or bytes, of which nothing can grow.
_TEXTS = frozenset({*range(0xA0, 0xC0), 0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB})


# -- sending -------------------------------------------------------------------------------------------------------------------


def serialize(obj: object, ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    """Header and payload frames of the value inside a ``Serialize``, as they are transmitted.

    Args:
        obj: the value.
        ctx: families to try, compression, shard size, and whether the peer may be sent pickles.

    Returns:
        A new header, complete with ``num-sub-frames``, and the frames: views of the value's own memory where it has any.

    Raises:
        SerializationError: no family takes it.  With ``ctx.on_error == "message"`` the *error* family goes out instead, which
            makes the receiver raise TypeError.
        UnsafePayload: it takes a pickle, and the peer is not trusted with one.
    """
    try:
        header, frames = _dump(obj, ctx, True, ())
    except RecursionError as exc:
        raise SerializationError("a value is nested too deeply, or wrapped in itself") from exc
    if isinstance(obj, Serialized):
        # Cut and compressed already.
        header["num-sub-frames"] = len(frames)
        return header, frames
    given = header.get("compression") or [None] * len(frames)
    counts: list[int] = []
    offsets: list[int] = []
    compression: list[str | None] = []
    out: list[Buffer] = []
    for frame, codec in zip(frames, given, strict=True):
        pieces = shards(frame, ctx.shard) if codec is None else [frame]
        counts.append(len(pieces))
        offsets.append(len(out))
        compression += [codec] * len(pieces)
        out += pieces
    compression, out = compress_payload(out, ctx.compression, compression)
    header["split-num-sub-frames"] = tuple(counts)
    header["split-offsets"] = tuple(offsets)
    header["compression"] = tuple(compression)
    header["num-sub-frames"] = len(out)
    return header, out


def _dump(value: Any, ctx: EncodeContext, iterate: bool, outer: tuple[int, ...]) -> tuple[Header, list[Buffer]]:
    """Header and logical frames, before cutting and compressing.

    Args:
        value: the value, or a ``Serialize`` or ``Serialized`` one.
        ctx: as above.
        iterate: send a collection element by element in any case.
        outer: ids of the collections round this value; one that contains itself is left to pickle, which can do it.
    """
    kind = type(value)
    if kind is Serialized:
        if needs_pickle(value.header):
            _may_pass_on(value, ctx)
        return dict(value.header), list(value.frames)
    if kind is Serialize:
        return _dump(value.data, ctx, True, outer)
    serializers = _DEFAULT if ctx.serializers is None else tuple(ctx.serializers)
    if (
        kind in _collections.COLLECTIONS
        and len(outer) < _MAX_DEPTH
        and id(value) not in outer
        and (iterate or _collections.is_iterated(value, serializers))
        and (kind is not dict or _collections.keys_fit(value))
    ):
        inner = (*outer, id(value))
        return _collections.dump(value, lambda item: _dump(item, ctx, False, inner))
    try:
        return _by_family(value, ctx, serializers, iterate, outer)
    except SerializationError as exc:
        if ctx.on_error != "message":
            raise
        # A traceback tells of files and code: not for strangers.
        text = "".join(traceback.format_exception(exc)) if ctx.allow_pickle() else str(exc)
        return {"serializer": "error"}, [
            f"Could not serialize object of type {kind.__name__}".encode(),
            text[-_ERROR_TEXT:].encode(errors="replace"),
        ]


def dump_value(value: Any, ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    """Header and frames of a value that is part of another one: neither cut nor compressed."""
    return _dump(value, ctx, False, ())


def load_value(header: Header, frames: list[Buffer], ctx: DecodeContext, keys: Keys) -> Any:
    """The value of header and frames that :func:`dump_value` made."""
    return _load(header, frames, ctx, keys)


def _may_pass_on(value: Serialized, ctx: EncodeContext) -> None:
    # To a peer that trusts us, a stranger's pickle would be ours: that it may be sent pickles is no excuse.
    if not value.trusted and not ctx.forward_untrusted:
        raise UnsafePayload("a payload from a peer that is not trusted would be passed on, and reading it takes a pickle")
    if not ctx.allow_pickle():
        raise UnsafePayload("a payload that takes a pickle to read would be passed on, and this peer is not trusted with one")


def _by_family(
    value: Any, ctx: EncodeContext, serializers: tuple[str, ...], iterate: bool, outer: tuple[int, ...]
) -> tuple[Header, list[Buffer]]:
    for name in serializers:
        writer = _WRITERS.get(name)
        if writer is None:
            continue  # the list may be the receiver's, of what it can read
        if name == "pickle" and not ctx.allow_pickle():
            return _without_pickle(value, ctx, iterate, outer)
        try:
            return writer(value, ctx)
        except NotImplementedError:
            continue
        except (UnsafePayload, SerializationError):
            raise
        except Exception as exc:
            raise SerializationError(f"a value of type {_kind(value)} can't be serialized: {type(exc).__name__}: {exc}") from exc
    raise SerializationError(
        f"a value of type {_kind(value)} can't be serialized: none of the families {list(serializers)} takes it; "
        f"known are {list(_WRITERS)}"
    )


def _kind(value: object) -> str:
    cls = type(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _without_pickle(value: Any, ctx: EncodeContext, iterate: bool, outer: tuple[int, ...]) -> tuple[Header, list[Buffer]]:
    """Plain data as the msgpack family, which stock reads too, for a peer that must not be sent pickles."""
    if ctx.serializers is None:
        if _collections.is_plain(value):
            try:
                return _write_msgpack(value, ctx)
            except NotImplementedError:  # an integer of more than 64 bits, or a lone surrogate
                pass
        elif type(value) in _collections.COLLECTIONS and not iterate:
            return _dump(value, ctx, True, outer)
    raise UnsafePayload(
        f"a value of type {_kind(value)} travels as a pickle, and this peer is not trusted with one; "
        "use tls:// with your own CA or unix://, or Security(pickle='always') on both sides of a closed network"
    )


def _write_pickle(value: object, ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    data, buffers = _pickle_dump(value, ctx.pickle_protocol)
    return {"serializer": "pickle", "writeable": tuple(not buffer.readonly for buffer in buffers)}, [data, *buffers]


def _write_msgpack(value: object, ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    try:
        frame = msgpack.packb(value, use_bin_type=True)
    except Exception:  # as in Dask: whatever it is that msgpack can't take is for the next family
        raise NotImplementedError from None
    return {"serializer": "msgpack"}, [frame]


_WRITERS: dict[str, Callable[[Any, EncodeContext], tuple[Header, list[Buffer]]]] = {
    "dask": _dask_family.dump,
    "pickle": _write_pickle,
    "msgpack": _write_msgpack,
}


def pickled_parts(obj: object, ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    """Header and frames of a value that travels as ``__Pickled__`` (wire document, section 5.3).

    Always protocol 5, whatever was negotiated; never cut.

    Raises:
        UnsafePayload: the peer is not trusted with pickles.
        SerializationError: the value can't be pickled.
    """
    if not ctx.allow_pickle():
        raise UnsafePayload(
            f"a value of type {_kind(obj)} travels as a pickle, and this peer is not trusted with one; "
            "use tls:// with your own CA or unix://, or Security(pickle='always') on both sides of a closed network"
        )
    data, buffers = pickle_dumps(obj)
    compression, frames = compress_payload(buffers, ctx.compression)
    return {"pickled-obj": data, "compression": tuple(compression), "num-sub-frames": len(frames)}, frames


# -- receiving -----------------------------------------------------------------------------------------------------------------


def deserialize(
    header: Header, frames: list[Buffer], ctx: DecodeContext, *, budget: Budget | None = None, keys: Keys | None = None
) -> Any:
    """The value of a ``__Serialized__`` header and its payload frames, as they were transmitted.

    Args:
        header: decoded from msgpack; not changed.
        frames: the payload frames.
        ctx: families accepted, and whether the sender may have pickles loaded.
        budget: what the whole message may still grow to; a new one is made for this payload if it isn't given.
        keys: those of the whole message; likewise.

    Raises:
        RemoteProtocolError: header and frames are not what a peer sends.
        SerializationError: the codec, family or class is not known here, or loading it failed.
        UnsafePayload: it takes a pickle, and the sender is not trusted; nothing was unpickled.
        LimitExceeded: it would be too large when decompressed; no memory was taken for it.
        TypeError: the family is not in ``ctx.deserializers``, or the sender could not serialize the value and says so.
    """
    try:
        return _load(header, _plain_frames(_map(header), frames, ctx, budget), ctx, Keys() if keys is None else keys)
    except RecursionError as exc:
        raise RemoteProtocolError("the header of a payload is nested too deeply") from exc


def unpickle_parts(header: Header, frames: list[Buffer], ctx: DecodeContext, *, budget: Budget | None = None) -> Any:
    """The value of a ``__Pickled__`` header and its payload frames.

    Raises:
        RemoteProtocolError, SerializationError, UnsafePayload, LimitExceeded: as :func:`deserialize`.
    """
    data = _map(header).get("pickled-obj")
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise RemoteProtocolError("the header of a pickled value has no proper 'pickled-obj'")
    if not ctx.allow_pickle():
        raise UnsafePayload("a pickle came from a peer that is not trusted; it was not loaded")
    # What is decompressed is read-only with most codecs, and the header doesn't say how it was: arrays come writable in any case.
    return pickle_loads(data, [_with_writeable(frame, True) for frame in _plain_frames(header, frames, ctx, budget)])


def open_serialized(
    wrapper: Serialized | Pickled, *, deserializers: Sequence[str] | None = None, limits: Limits | None = None
) -> Any:
    """The value of a payload that came under ``deserialize=False``, or was made here, with the trust that it came with.

    Args:
        wrapper: what was received; not changed.
        deserializers: families accepted for a ``Serialized``; None accepts all that are known.
        limits: how far it may grow when decompressed, and how large a head in it may be; None is the defaults.

    Raises:
        UnsafePayload: it takes a pickle, and ``wrapper.trusted`` is False; nothing was unpickled.
        RemoteProtocolError, SerializationError, LimitExceeded, TypeError: as :func:`deserialize`.
    """
    if not isinstance(wrapper, (Serialized, Pickled)):
        raise TypeError(f"open_serialized() takes a Serialized or Pickled, not a {type(wrapper).__name__}")
    trusted = bool(wrapper.trusted)
    limits = Limits() if limits is None else limits
    message, head = (limits.message_trusted, limits.head_trusted) if trusted else (limits.message, limits.head)
    ctx = DecodeContext(
        allow_pickle=lambda: trusted,
        deserializers=None if deserializers is None else tuple(deserializers),
        max_message=lambda: message,
        max_head=lambda: head,
    )
    return (deserialize if isinstance(wrapper, Serialized) else unpickle_parts)(wrapper.header, wrapper.frames, ctx)


def _map(header: object) -> Header:
    if not isinstance(header, dict):
        raise RemoteProtocolError("the header of a payload is no map")
    return header


def _plain_frames(header: Header, frames: list[Buffer], ctx: DecodeContext, budget: Budget | None) -> list[Buffer]:
    """The frames decompressed, as the header says, whatever was negotiated."""
    if header.get("num-sub-frames", len(frames)) != len(frames):
        raise RemoteProtocolError(
            f"the header of a payload tells of {header['num-sub-frames']!r:.100} frames where {len(frames)} came"
        )
    compression = header.get("compression")
    if compression is None:
        return frames
    if not isinstance(compression, (tuple, list)) or len(compression) != len(frames):
        raise RemoteProtocolError("the 'compression' of a payload doesn't fit its frames")
    if not any(compression):
        return frames
    if budget is None:
        budget = Budget(ctx.max_message, sum(map(nbytes, frames)))
    return [decompress(codec, frame, budget) for codec, frame in zip(compression, frames, strict=True)]


def _joined(header: Header, frames: list[Buffer]) -> list[Buffer]:
    """The frames as they were before the sender cut them."""
    counts, offsets = header["split-num-sub-frames"], header.get("split-offsets")
    if not isinstance(counts, (tuple, list)) or not isinstance(offsets, (tuple, list)) or len(counts) != len(offsets):
        raise RemoteProtocolError("the header of a payload has no proper 'split-num-sub-frames' and 'split-offsets'")
    position = 0
    for count, offset in zip(counts, offsets, strict=True):
        # Pieces that overlap or leave gaps are no peer's doing, and would let a few frames become many.
        if type(count) is not int or count < 1 or offset != position:
            raise RemoteProtocolError("the 'split-offsets' of a payload are not those of its pieces")
        position += count
    if position != len(frames):
        raise RemoteProtocolError(f"the 'split-num-sub-frames' of a payload tell of {position} frames where {len(frames)} came")
    if len(counts) == len(frames):
        return frames
    return [join(frames[offset : offset + count]) for count, offset in zip(counts, offsets, strict=True)]


def _load(header: Header, frames: list[Buffer], ctx: DecodeContext, keys: Keys) -> Any:
    """The value of logical frames.  (A ``Serialized`` put into a collection keeps its own split lists.)"""
    if "split-num-sub-frames" in header:
        frames = _joined(header, frames)
    # Presence counts, as it does for stock: a header must not be one thing to the check and another to the reader behind us.
    if "is-collection" in header:
        return _collections.load(header, frames, lambda sub_header, own: _load(sub_header, own, ctx, keys), keys)
    name = header.get("serializer")
    if ctx.deserializers is not None and name not in ctx.deserializers:
        raise TypeError(f"Data serialized with {name!r:.100} but only able to deserialize data with {list(ctx.deserializers)}")
    reader = _READERS.get(name) if isinstance(name, str) else None
    if reader is None:
        raise SerializationError(
            f"a payload of the family {name!r:.100} came, which is not known here; known are {', '.join(_READERS)}"
        )
    return reader(header, frames, ctx, keys)


def _read_dask(header: Header, frames: list[Buffer], ctx: DecodeContext, _keys: Keys) -> Any:
    return _dask_family.load(header, frames, ctx)


def _read_pickle(header: Header, frames: list[Buffer], ctx: DecodeContext, _keys: Keys) -> Any:
    writeable = header.get("writeable")
    if not frames or not isinstance(writeable, (tuple, list)) or len(writeable) != len(frames) - 1:
        raise RemoteProtocolError("the header of a pickle has no proper 'writeable'")
    if not ctx.allow_pickle():
        raise UnsafePayload("a pickle came from a peer that is not trusted; it was not loaded")
    return pickle_loads(frames[0], [_with_writeable(frame, flag) for frame, flag in zip(frames[1:], writeable, strict=True)])


def _with_writeable(frame: Buffer, writeable: object) -> memoryview:
    view = memoryview(flat(frame))
    if writeable and view.readonly:
        return memoryview(bytearray(view))
    return view if writeable else view.toreadonly()


def _read_msgpack(header: Header, frames: list[Buffer], ctx: DecodeContext, keys: Keys) -> Any:
    data = b"".join(frames)
    limit = ctx.max_head()
    if limit is not None and len(data) > limit and data[0] not in _TEXTS:
        # As of frame 0: empty containers take up to 78 times the memory of their bytes (security document, section 2).
        raise LimitExceeded.of("head", limit, len(data), "a payload of the msgpack family, in bytes,")
    try:
        return unpack_plain(data, keys)
    except RemoteProtocolError:
        raise
    except Exception as exc:
        raise RemoteProtocolError(f"a payload of the msgpack family can't be read: {type(exc).__name__}: {exc}") from exc


def _read_error(_header: Header, frames: list[Buffer], _ctx: DecodeContext, _keys: Keys) -> Any:
    raise TypeError("\n".join(bytes(frame).decode("utf-8", errors="replace")[:_STOCK_ERROR_TEXT] for frame in frames))


_READERS: dict[str, Callable[[Header, list[Buffer], DecodeContext, Keys], Any]] = {
    "dask": _read_dask,
    "pickle": _read_pickle,
    "msgpack": _read_msgpack,
    "error": _read_error,
}


def reading_work(header: Header, frames: list[Buffer]) -> int:
    """How many bytes of a payload are more than looked at when it is read, about; what decompressing takes is not among them.

    Most values are made over the memory that came, however large it is.  The header may be any that a peer sends.
    """
    if "pickled-obj" in header:
        data = header["pickled-obj"]
        return len(data) if isinstance(data, bytes) else 0
    counts = header.get("split-num-sub-frames")
    joined = isinstance(counts, tuple) and any(count != 1 for count in counts)
    if header.get("serializer") == "pickle" and not joined:
        return nbytes(frames[0]) if frames else 0  # the others are buffers, which stay where they are
    # What takes no pickle is read by functions of this package; others may do anything.
    return sum(map(nbytes, frames)) if joined or needs_pickle(header) else 0


def needs_pickle(header: object) -> bool:
    """Whether reading a payload with that header would unpickle anything, here or at a stock peer.

    What came from a peer that is not trusted may be passed on only if this is False (security document, section 1).
    """
    try:
        return _needs_pickle(header)
    except (RecursionError, DcoreError):
        return True


def _needs_pickle(header: object) -> bool:
    if not isinstance(header, dict):
        return True
    if "is-collection" in header:
        return any(map(_needs_pickle, _collections.sub_headers(header)))
    name = header.get("serializer")
    if name == "dask":
        return _dask_family.needs_pickle(header)
    return name not in ("msgpack", "error")
