"""Decoding: frames to a message, in two phases.  The module :mod:`._messages` says how it works.

What comes is taken for hostile: no number of a peer's is used before it was checked, each frame is deserialized at most once, and
anything that is wrong leads to one of the errors that :meth:`Decoder.resolve` names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from msgpack import ExtType, unpackb

from ._buffers import nbytes
from ._collisions import Keys
from ._compression import Budget
from ._context import Buffer, DecodeContext
from ._enums import enum_member
from ._errors import DcoreError, LimitExceeded, RemoteProtocolError, SerializationError, TooHeavy, UnsafePayload
from ._extensions import DICT, FROZENSET, Tag, TagSeen, decode_ext, untag
from ._families import deserialize, reading_work, unpickle_parts
from ._markers import ENUM, PICKLED, RESERVED, SERIALIZED, SET, at, find_path
from ._types import Serialized

__all__ = ["Decoder"]

# Bytes of an extension value.  An integer of that size is compared with a Decimal within 0.1 ms (measured).
_LARGE = 1024
# Values that are searched for the place of a fault: a stranger can make faults stand behind any number of values, and looking at
# one takes as long as decoding four (measured).
_SEARCHED = 20_000
_TWO_UNDERSCORES = re.compile(b"__")


class Decoder:
    """Turns frames into messages, for one peer.  Keeps nothing of a message, so it may be used from any thread.

    Args:
        ctx: what is accepted from the peer.
        extensions: the peer speaks the wire extension, so extension values of the safe types are read as such.
    """

    __slots__ = ("_ctx", "_ext_hook", "_extensions")

    def __init__(self, ctx: DecodeContext, *, extensions: bool = False) -> None:
        self._ctx = ctx
        self._extensions = extensions
        self._ext_hook: Callable[[int, bytes], object] = _untagged_ext if extensions else ExtType

    def head(self, frame0: Buffer) -> Any:
        """Decode frame 0 and leave markers in place: nothing is deserialized, unpickled or looked up.

        It is the whole message unless :meth:`has_markers`.  In place means a dict with the marker's keys.

        Raises:
            RemoteProtocolError: it is not one complete msgpack value, or the keys of a map in it were chosen to collide.
        """
        try:
            # msgpack's own rule for keys, texts only, costs nothing, and such keys can't be made to collide.
            return unpackb(frame0, raw=False, use_list=False, ext_hook=self._ext_hook)
        except (RemoteProtocolError, MemoryError):
            raise
        except TagSeen:
            pass
        except Exception as exc:
            if type(exc) is not ValueError:  # which is also what a key of another kind gets
                raise _invalid("frame 0", exc) from exc
        return _Reader(self._extensions).read(frame0)

    def has_markers(self, frames: Sequence[Buffer]) -> bool:
        """Whether :meth:`resolve` may give anything else than :meth:`head`; cheap.

        Every key that makes a map a marker holds two underscores, and so do dicts sent in another form because of such a key.
        """
        return len(frames) != 1 or _TWO_UNDERSCORES.search(frames[0]) is not None

    def resolve(self, frames: Sequence[Buffer], most: int | None = None) -> Any:
        """Decode a whole message, payloads included.

        Frames that nothing in the message refers to are ignored, as Dask does.

        Args:
            frames: of the message; not changed.
            most: bytes of work that it may take: of pickles, of what users' functions read, of pieces to be joined, and of all of
                a message that is compressed.  None is any number.

        Raises:
            TooHeavy: it takes more; its ``rest`` decodes the message, and no payload a second time.
            RemoteProtocolError: it is no valid message, or names something that may not be looked up here.
            UnsafePayload: it holds a pickle, and this peer is not trusted; ``field`` says where it stands.
            LimitExceeded: it is larger than allowed when decompressed, or a header frame is larger than allowed.
            SerializationError: a payload can't be deserialized here; ``path`` says where it stands.
            TypeError: a payload's sender could not serialize it and says so, or its family is not among ``deserializers``.
        """
        if not frames:
            raise RemoteProtocolError("a message without frames")
        return self._finish(_Resolution(frames, self._ctx, self._extensions, most))

    def _finish(self, resolution: _Resolution) -> Any:
        try:
            return resolution.message()
        except TooHeavy as exc:
            exc.rest = partial(self._finish, resolution.again())
            raise
        except UnsafePayload as exc:
            path = resolution.path() + exc.field
            why = self._ctx.why()
            text = f"{exc}; see Security(pickle=...)" + (f" ({why})" if why else "")
            raise UnsafePayload(at(path, text), field=path) from exc
        except SerializationError as exc:
            path = resolution.path() + exc.path
            raise SerializationError(at(path, str(exc)), path=path) from exc


def _untagged_ext(code: int, payload: bytes) -> object:
    value = decode_ext(code, payload)
    if type(value) is Tag:
        raise TagSeen
    return value


class _Marker(dict[Any, Any]):
    """A marker left in place.  It can be hashed, since what it stands for may be the key of a map."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class _Reader:
    """Reads frame 0 with a hook for its maps, once, and leaves markers in place.

    Args:
        extensions: read extension values of the safe types as such.
    """

    # What a map must not have any key of, to be just a map.
    special = RESERVED | {FROZENSET, DICT}

    def __init__(self, extensions: bool) -> None:
        self._extensions = extensions
        self._tags = 0
        self._keys = Keys()
        self._failure: BaseException | None = None

    def read(self, frame0: Buffer) -> Any:
        ext_hook = self._ext if self._extensions else ExtType
        try:
            value = unpackb(
                frame0, raw=False, use_list=False, strict_map_key=False, object_pairs_hook=self._map, ext_hook=ext_hook
            )
        except (DcoreError, MemoryError):
            raise
        except Exception as exc:
            if exc is self._failure:
                raise
            raise _invalid("frame 0", exc) from exc
        finally:
            # Its traceback refers to us, and to what had been made of the message, which is to go with it and not with some collection.
            self._failure = None
        if self._tags:
            raise RemoteProtocolError("bad extension value: the tag of a frozenset or dict stands where no tag may")
        return value

    def _ext(self, code: int, payload: bytes) -> object:
        value = decode_ext(code, payload)
        if type(value) is Tag:
            self._tags += 1
            self._keys.expect_slow_ones()
        elif len(payload) > _LARGE:
            self._keys.expect_slow_ones()
        return value

    def _map(self, pairs: list[tuple[Any, Any]]) -> Any:
        value = self._keys.make_dict(pairs)
        if value.keys().isdisjoint(self.special):
            return value
        if FROZENSET in value or DICT in value:
            self._tags -= 1
            return untag(value, self._keys)
        return self._marker(value)

    def _marker(self, value: dict[Any, Any]) -> Any:
        return _Marker(value)


class _Resolution(_Reader):
    """Replaces markers by what they stand for."""

    def __init__(self, frames: Sequence[Buffer], ctx: DecodeContext, extensions: bool, most: int | None = None) -> None:
        super().__init__(extensions)
        self._frames = frames
        self._ctx = ctx
        self._taken = bytearray(len(frames))
        self._budget: Budget | None = None
        self._at = "", 0
        self._size = size = sum(map(nbytes, frames))
        self._most = most
        self._counts_work = most is not None and size > most
        self._work = 0
        self._done: dict[int, Any] = {}  # what has been deserialized, by the frame of its header

    def message(self) -> Any:
        """The message."""
        return self.read(self._frames[0])

    def again(self) -> _Resolution:
        """The same from the beginning, for whoever has all the time; what has been deserialized is kept."""
        resolution = _Resolution(self._frames, self._ctx, self._extensions)
        resolution._done = self._done
        if self._budget is not None:
            resolution._budget = self._budget
            self._budget.most = None
        return resolution

    def path(self) -> str:
        """Where the marker stands that was being resolved last."""
        key, index = self._at
        message = _Reader(self._extensions).read(self._frames[0])
        return find_path(message, lambda value: isinstance(value, dict) and value.get(key) == index, _SEARCHED) or ""

    def _marker(self, value: dict[Any, Any]) -> Any:
        # Dask's order.
        if SERIALIZED in value:
            return self._serialized(_index(value, SERIALIZED))
        index = value.get(PICKLED, 0)
        if type(index) is not int or index > 0:
            return self._pickled(_index(value, PICKLED))
        if ENUM in value:
            return enum_member(value, self._ctx.enum_modules)
        if SET in value:
            return _set(value, self._keys)
        return value  # {"__Pickled__": 0} is only a dict, for Dask too

    def _serialized(self, index: int) -> Any:
        self._at = SERIALIZED, index
        ctx = self._ctx
        header, frames = self._parts(index, _HeaderHook(ctx, self._keys))
        if not ctx.deserialize:
            return Serialized(header, frames, trusted=ctx.allow_pickle())
        return self._guarded(partial(deserialize, keys=self._keys), index, header, frames)

    def _pickled(self, index: int) -> Any:
        self._at = PICKLED, index
        if not self._ctx.allow_pickle():
            raise UnsafePayload("a pickle came from a peer that is not trusted; it was not loaded")
        header, frames = self._parts(index, self._keys.make_dict)
        return self._guarded(unpickle_parts, index, header, frames)

    def _guarded(self, load: Callable[..., Any], index: int, header: dict[Any, Any], frames: list[Buffer]) -> Any:
        """Deserialize a payload, so that its errors are not taken for those of frame 0."""
        done = self._done
        if done and index in done:
            return done[index]
        most = self._most
        if self._budget is None:
            self._budget = Budget(self._ctx.max_message, self._size, most)
        used = self._budget.used
        try:
            if self._counts_work:
                self._work += reading_work(header, frames)
                if self._work > most:  # type: ignore[operator]  # it counts because there is a number
                    raise TooHeavy
            value = load(header, frames, self._ctx, budget=self._budget)
        except BaseException as exc:
            self._failure = exc
            self._budget.used = used  # a part of it may have been decompressed, and if it is TooHeavy, will be once more
            raise
        if most is not None:
            done[index] = value
        return value

    def _parts(self, index: int, hook: Callable[[list[tuple[Any, Any]]], Any]) -> tuple[dict[Any, Any], list[Buffer]]:
        """Header and payload frames that a marker names; each belongs to one marker, else a short message could be endless."""
        frames = self._frames
        if index >= len(frames):
            raise RemoteProtocolError(f"a marker names frame {index} of a message with {len(frames)}")
        frame = frames[index]
        limit = self._ctx.max_head()
        if limit is not None and nbytes(frame) > limit:
            raise LimitExceeded.of("head", limit, nbytes(frame), "a payload's header frame")
        try:
            header = unpackb(frame, raw=False, use_list=False, strict_map_key=False, object_pairs_hook=hook)
        except (DcoreError, MemoryError):
            raise
        except Exception as exc:
            raise _invalid(f"the header in frame {index}", exc) from exc
        if type(header) is not dict:
            raise RemoteProtocolError(f"the header in frame {index} is no map")
        count = header.get("num-sub-frames")
        if type(count) is not int or not 0 <= count < len(frames) - index:
            raise RemoteProtocolError(f"the header in frame {index} of {len(frames)} tells of {count!r:.50} frames behind it")
        end = index + 1 + count
        if self._taken.find(1, index, end) >= 0:
            raise RemoteProtocolError(f"two markers name frame {index} or one that belongs to it")
        self._taken[index:end] = b"\1" * (end - index)
        return header, list(frames[index + 1 : end])


class _HeaderHook:
    """What stands for the maps of a ``__Serialized__`` header: enums, sets, inline payloads (wire document, section 5.4)."""

    __slots__ = ("_ctx", "_keys")

    def __init__(self, ctx: DecodeContext, keys: Keys) -> None:
        self._ctx = ctx
        self._keys = keys

    def __call__(self, pairs: list[tuple[Any, Any]]) -> Any:
        value = self._keys.make_dict(pairs)
        if ENUM in value:
            try:
                return enum_member(value, self._ctx.enum_modules)
            except RemoteProtocolError:
                # A hop that only passes the payload on needs not know the enum, and sends the map as it came.
                if self._ctx.deserialize:
                    raise
                return value
        if SET in value:
            return _set(value, self._keys)
        if SERIALIZED in value:
            parts = value.get("data")
            if type(parts) is tuple and len(parts) == 2:
                header, frames = parts
                if isinstance(header, dict) and type(frames) is tuple and all(type(frame) is bytes for frame in frames):
                    return Serialized(header, list(frames), trusted=self._ctx.allow_pickle())
            raise RemoteProtocolError("a header holds an inline payload that is no pair of header and frames")
        return value


def _index(marker: dict[Any, Any], key: str) -> int:
    """The frame that a marker names; frame 0 is the message itself."""
    index = marker[key]
    if type(index) is not int or index < 1:
        raise RemoteProtocolError(f"a {key} marker holds {index!r:.50}, not the number of a frame")
    return index


def _set(marker: dict[Any, Any], keys: Keys) -> set[Any]:
    elements = marker.get("as-list")
    if type(elements) is not tuple:
        raise RemoteProtocolError("a __Set__ marker has no array 'as-list'")
    return keys.make_set(elements)


def _invalid(what: str, exc: Exception) -> RemoteProtocolError:
    return RemoteProtocolError(f"{what} is not valid: {type(exc).__name__}: {exc}")
