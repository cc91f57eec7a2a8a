"""The wrappers that say how a value travels: inside the message, beside it, or as a pickle.

They are plain data.  Encoding and decoding them is the business of :mod:`._messages` and :mod:`._families`.
"""

from __future__ import annotations

from typing import Any

from ._context import Buffer

__all__ = ["Pickled", "Serialize", "Serialized", "ToPickle", "to_serialize"]


class _Wrapper:
    """A wrapper round one value.  Equal to another of the same class with equal data, and hashable if the data is."""

    __slots__ = ("data",)

    def __init__(self, data: Any) -> None:
        self.data: Any = data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data!r})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return bool(self.data == other.data)

    def __hash__(self) -> int:
        return hash((type(self), self.data))


class _Parts:
    """A header and its payload frames, as they stand on the wire: compressed and split.

    Equal to another of the same class with the same header and the same bytes, wherever it came from.
    """

    __slots__ = ("frames", "header", "trusted")

    def __init__(self, header: dict[Any, Any], frames: list[Buffer], trusted: bool = True) -> None:
        self.header: dict[Any, Any] = header
        self.frames: list[Buffer] = frames
        self.trusted: bool = trusted

    def __repr__(self) -> str:
        kind = self.header.get("serializer", self.header.get("type-serialized"))
        size = sum(memoryview(frame).nbytes for frame in self.frames)
        what = f"{kind!r}, " if isinstance(kind, str) else ""
        whence = "" if self.trusted else ", untrusted"
        return f"<{type(self).__name__} {what}{len(self.frames)} frames, {size} bytes{whence}>"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return (
            self.header == other.header
            and len(self.frames) == len(other.frames)
            and all(memoryview(mine) == memoryview(theirs) for mine, theirs in zip(self.frames, other.frames, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]  # header and frames are mutable


class Serialize(_Wrapper):
    """Send ``data`` beside the message, by the serialization families, in frames of its own.

    For large payloads and for values that a hop should be able to pass on unread.  The receiver gets the data itself, or a
    :class:`Serialized` if it asked for ``deserialize=False``.

    Args:
        data: the value to send.
    """

    __slots__ = ()


#: Dask's second name for :class:`Serialize`.
to_serialize = Serialize


class Serialized(_Parts):
    """A payload that was serialized by somebody and is passed on as it is: not decompressed, not looked into.

    Args:
        header: the header as transmitted (wire document, section 5.4).
        frames: the payload frames as transmitted.
        trusted: it came from a comm whose peer is trusted, or was made here.  An untrusted one is neither deserialized where
            that takes a pickle, nor forwarded, unless its family needs none.
    """

    __slots__ = ()


class ToPickle(_Wrapper):
    """Send ``data`` as a pickle.  The receiver unpickles it even under ``deserialize=False``, if it trusts this side.

    Args:
        data: the value to send.
    """

    __slots__ = ()


class Pickled(_Parts):
    """A pickle that was made by somebody and is passed on as it is.

    Args:
        header: the header as transmitted (wire document, section 5.3).
        frames: the out-of-band buffers as transmitted.
        trusted: it came from a comm whose peer is trusted, or was made here; an untrusted one is neither loaded nor forwarded.
    """

    __slots__ = ()
