"""Encoding: a message to its frames.  The module :mod:`._messages` says how it works."""

from __future__ import annotations

import re
from dataclasses import replace
from enum import Enum
from typing import Any

from msgpack import Packer, packb

from ._context import Buffer, EncodeContext
from ._enums import enum_marker
from ._errors import DcoreError, SerializationError, TooHeavy, UnsafePayload
from ._extensions import encode_ext, tagged_dict
from ._families import bare_numpy, needs_pickle, pickled_parts, serialize
from ._markers import PICKLED, RESERVED, SERIALIZED, SET, Escaped, at, escape, find_path, render, walk
from ._types import Pickled, Serialize, Serialized, ToPickle
from ._weights import weight

__all__ = ["Encoder"]

# A packer keeps its buffer, which only grows.  It begins small, because every comm has one, and a packer that has made a frame 0
# larger than _SMALL is not kept.
_BUFFER = 1024
_SMALL = 64 * 1024

# Every key of a marker is a match, and no two share one: in front of each stands the byte with its length.
_MARKER_KEYS = re.compile(b"__(?:Set|Enum|Serialized|Pickled)__")

# Containers in one another that every msgpack packs; its versions differ (511, 1024).
_DEEP = 500
_WRAPPERS = (Serialize, Serialized, ToPickle, Pickled)
# What the wire can hold of one string, array or map.
_ITEM_LIMIT = 2**32


class Encoder:
    """Turns messages into frames, for one peer.

    Any number of messages may be encoded, also from several threads at once, and also from inside an encoding (by a serialization
    function of the user's).

    Args:
        ctx: what the peer understands and may be sent.
    """

    __slots__ = ("_ctx", "_hook", "_idle")

    def __init__(self, ctx: EncodeContext) -> None:
        self._ctx = ctx
        # The packer refers to the hook, and not the other way round: without a cycle a closed comm's memory is free at once.
        self._hook = _Hook(ctx)
        self._idle = [self._new_packer()]

    @property
    def ctx(self) -> EncodeContext:
        """What it was made with."""
        return self._ctx

    @property
    def payloads_before(self) -> int:
        """Payload frames of other messages that will stand before a message's own: markers count from there.  Usually 0.

        For whoever puts several messages into one (:mod:`._batches`), with an encoder of its own.
        """
        return self._hook.payloads_before

    @payloads_before.setter
    def payloads_before(self, count: int) -> None:
        self._hook.payloads_before = count

    def _new_packer(self) -> Packer:
        return Packer(default=self._hook, use_bin_type=True, buf_size=_BUFFER)

    def encode(self, message: object) -> list[Buffer]:
        """Return the frames of a message: frame 0, then for each payload its header and its own frames.  Not a checkpoint.

        Payload frames are views of the message's own memory, so that must not change until they are sent.

        Raises:
            SerializationError: something in the message can't be sent; ``path`` says where it stands.
            UnsafePayload: something in it needs a pickle, which this peer must not be sent; ``field`` says where it stands.
            TooHeavy: it takes more work than ``ctx.offload``; as good as nothing of that was done.
        """
        # Costs some 100 ns above packer.pack, which for {"op": "add", "x": 1, "y": 2, "reply": True} takes 150 (CPython 3.11).
        # list.pop is atomic, which is what makes this safe in all threads.
        try:
            packer = self._idle.pop()
        except IndexError:
            another = Encoder(self._ctx)
            another.payloads_before = self.payloads_before
            return another.encode(message)
        try:
            head = packer.pack(message)
            if len(head) <= _SMALL:
                # The quickest way to look for two bytes in few: 40 ns; find takes 60, `in` 110.
                marked = head.partition(b"__")[1]
                frames = self._with_markers(packer, message, head) if marked else [head]
            else:
                frames = self._with_markers(packer, message, head)
                packer = self._new_packer()
        except BaseException as exc:
            try:
                if isinstance(exc, Exception) and not isinstance(exc, (MemoryError, TooHeavy)):
                    self._explain(message, exc)
                raise
            finally:
                self._hook.reset()
                packer.reset()
                self._idle.append(packer)
        self._idle.append(packer)
        return frames

    def _with_markers(self, packer: Packer, message: object, head: bytes) -> list[Buffer]:
        """The frames of a message that has, or may have, markers."""
        hook = self._hook
        if len(_MARKER_KEYS.findall(head)) != hook.made:
            # There is such a text elsewhere in the message.  That may be harmless: a value, or part of some bytes.
            escaped = escape(message)
            if escaped is not message:
                hook.reset()
                head = packer.pack(escaped)
        frames = hook.frames
        frames[0] = head
        hook.reset()
        return frames

    def _explain(self, message: object, exc: Exception) -> None:
        """Raise an error that says where in the message the fault lies; return if ``exc`` itself is the one to raise."""
        culprit = self._hook.culprit
        if culprit is None:
            text, path = _diagnose(message, exc)
            raise SerializationError(at(path, text), path=path) from exc
        if isinstance(culprit, Escaped):
            culprit = culprit.original
        path = find_path(message, lambda value: value is culprit) or ""
        if isinstance(exc, UnsafePayload):
            path += exc.field
            # If it may be sent pickles, then what was refused is to pass on a stranger's.
            why = "" if self.ctx.allow_pickle() else self.ctx.why()
            raise UnsafePayload(at(path, f"{exc} ({why})" if why else str(exc)), field=path) from exc
        if isinstance(exc, SerializationError):
            path += exc.path
            raise SerializationError(at(path, str(exc)), path=path) from exc
        if not isinstance(exc, DcoreError):
            text = f"{_kind(culprit)} can't be serialized: {type(exc).__name__}: {exc}"
            raise SerializationError(at(path, text), path=path) from exc


class _Hook:
    """What the packer calls for a value that msgpack has no form for, and what one encoding has collected so far."""

    __slots__ = ("_array_ctx", "_weight", "ctx", "culprit", "frames", "made", "payloads_before")

    def __init__(self, ctx: EncodeContext) -> None:
        self.ctx = ctx
        self.payloads_before = 0
        self._array_ctx: EncodeContext | None = None
        self.reset()

    def reset(self) -> None:
        self.frames: list[Buffer] = [b""]
        self.made = 0  # markers
        self.culprit: object = None
        self._weight = 0  # of what has been encoded

    def __call__(self, obj: object) -> object:
        try:
            most = self.ctx.offload
            if most is not None:
                self._weight += weight(obj, most - self._weight, self.ctx.compression is not None)
                if self._weight > most:
                    raise TooHeavy
            return self._convert(obj)
        except BaseException:
            self.culprit = obj
            raise

    def _convert(self, obj: Any) -> object:
        if isinstance(obj, Serialize):
            return self._serialize(obj.data)
        if isinstance(obj, Serialized):
            return self._forward(obj)
        if bare_numpy(obj):
            return self._array(obj)
        if isinstance(obj, set) and type(obj).__hash__ is None:
            # A subclass that can be hashed may be a map's key, which a set can't be over there.
            self.made += 1
            return {SET: True, "as-list": list(obj)}
        if isinstance(obj, Enum):
            # Between ours the receiver decides which enums it knows; a pickle, where allowed, needs no such decision.
            marker = enum_marker(obj) or (self._bare_enum(obj) if self.ctx.extensions else None)
            if marker is not None:
                self.made += 1
                return marker
        elif isinstance(obj, ToPickle):
            return self._add(PICKLED, *pickled_parts(obj.data, self.ctx))
        elif isinstance(obj, Pickled):
            return self._forward_pickled(obj)
        elif isinstance(obj, Escaped):
            return self._escaped(obj)
        elif self.ctx.extensions:
            safe = encode_ext(obj)
            if safe is not None:
                return safe
        if type(obj) is int and not self.ctx.allow_pickle():
            raise SerializationError("an integer outside [-2**63, 2**64) takes a pickle, which this peer can't be sent")
        return self._add(PICKLED, *pickled_parts(obj, self.ctx))

    def _bare_enum(self, obj: Enum) -> dict[str, object] | None:
        return None if self.ctx.allow_pickle() else enum_marker(obj, everything=True)

    def _add(self, key: str, header: dict[Any, Any], frames: list[Buffer]) -> dict[str, int]:
        """Append a header frame and payload frames, and return the marker for them."""
        count = len(frames)
        if header.get("num-sub-frames") != count:
            header = {**header, "num-sub-frames": count}
        packed = packb(header, default=self._header_default, use_bin_type=True)
        index = self.payloads_before + len(self.frames)
        self.frames.append(packed)
        self.frames.extend(frames)
        self.made += 1
        return {key: index}

    def _serialize(self, data: object) -> object:
        if isinstance(data, Serialized):
            return self._forward(data)
        return self._add(SERIALIZED, *serialize(data, self.ctx))

    def _array(self, array: object) -> object:
        # Whatever `serializers` says: that is about Serialize only, and an array needs no pickle and no trust.
        if self._array_ctx is None:
            self._array_ctx = replace(self.ctx, serializers=("dask",))
        return self._add(SERIALIZED, *serialize(array, self._array_ctx))

    def _forward(self, obj: Serialized) -> object:
        if needs_pickle(obj.header):
            self._may_forward(obj)
        return self._add(SERIALIZED, obj.header, obj.frames)

    def _forward_pickled(self, obj: Pickled) -> object:
        self._may_forward(obj)
        return self._add(PICKLED, obj.header, obj.frames)

    def _may_forward(self, obj: Serialized | Pickled) -> None:
        # To a peer that trusts us, a stranger's pickle would be ours: that it may be sent pickles is no excuse.
        if not obj.trusted and not self.ctx.forward_untrusted:
            raise UnsafePayload(
                f"this {type(obj).__name__} came from a peer that is not trusted and may hold a pickle, so it is not passed on "
                'unless Security(pickle="always") says so'
            )
        if not self.ctx.allow_pickle():
            raise UnsafePayload(
                f"this {type(obj).__name__} may hold a pickle, and this peer can't be sent any; see Security(pickle=...)"
            )

    def _escaped(self, obj: Escaped) -> object:
        if self.ctx.extensions:
            return tagged_dict(obj.items)
        if not self.ctx.allow_pickle():
            raise SerializationError(
                f"a dict with one of the keys {', '.join(sorted(RESERVED))} means something else on the wire; "
                "this peer can't be sent a pickle of it and doesn't speak the wire extension"
            )
        if find_path(obj.original, lambda value: isinstance(value, _WRAPPERS)) is not None:
            raise SerializationError(
                f"a dict with one of the keys {', '.join(sorted(RESERVED))} is pickled as a whole, so it can't hold Serialize"
            )
        return self._add(PICKLED, *pickled_parts(obj.original, self.ctx))

    def _header_default(self, obj: object) -> object:
        """What stands in a header for a value that msgpack doesn't know, put there by a serialization function of the user's."""
        if isinstance(obj, set):
            return {SET: True, "as-list": list(obj)}
        if isinstance(obj, Enum):
            marker = enum_marker(obj, everything=True)
            if marker is not None:
                return marker
        elif isinstance(obj, Serialize):
            # Inline, as Dask has it (wire document, section 5.1): neither cut nor compressed.
            return {SERIALIZED: True, "data": serialize(obj.data, replace(self.ctx, shard=None, compression=None))}
        elif isinstance(obj, Serialized):
            return {SERIALIZED: True, "data": (obj.header, obj.frames)}
        raise SerializationError(f"a serialization header can't hold {_kind(obj)}")


def _diagnose(message: object, exc: Exception) -> tuple[str, str]:
    """What is wrong with a message that the packer itself refused, and where."""
    deepest: list[Any] = []
    for steps, value, again in walk(message):
        fault = f"{_kind(value)} contains itself" if again else _fault(value)
        if fault:
            return fault, render(steps)
        if len(steps) > len(deepest):
            deepest = list(steps)
    if len(deepest) > _DEEP:
        return f"the message is nested too deep for msgpack: {len(deepest)} levels", render(deepest)
    return f"the message can't be packed: {type(exc).__name__}: {exc}", ""


def _fault(value: object) -> str:
    """Why msgpack refuses a value of a type that it knows; empty if it doesn't."""
    try:
        if isinstance(value, memoryview):
            if not value.c_contiguous:
                return "a memoryview that is not contiguous can't be sent; send bytes(view)"
            size = value.nbytes
        elif isinstance(value, str):
            value.encode()
            size = len(value)
        elif isinstance(value, (bytes, bytearray, list, tuple, dict)):
            size = len(value)
        else:
            return ""
    except UnicodeEncodeError:
        return "a text with a lone surrogate can't be sent, since UTF-8 has no form for it"
    except ValueError:
        return "a released memoryview can't be sent"
    return f"{_kind(value)} with {size} items or bytes is too large for msgpack" if size >= _ITEM_LIMIT else ""


def _kind(value: object) -> str:
    cls = type(value)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    return f"an object of type {name}"
