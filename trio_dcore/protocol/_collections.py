"""Lists, tuples, sets and dicts inside ``Serialize``: each element by its own family (wire document, section 5.4).

So a dict of arrays travels as the arrays' own memory, and a hop can pass it on unread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from ._collisions import Keys
from ._context import Buffer
from ._errors import RemoteProtocolError, SerializationError, UnsafePayload
from ._registry import find_for_class
from ._types import Serialize, Serialized

__all__ = ["COLLECTIONS", "dump", "is_iterated", "is_plain", "keys_fit", "load", "sub_headers"]

Header = dict[str, Any]

#: Exactly these; subclasses such as namedtuple or defaultdict would come back as their base.
COLLECTIONS = frozenset({list, tuple, set, dict})
_BY_NAME: dict[object, type] = {cls.__name__: cls for cls in COLLECTIONS}
_SCALARS = frozenset({type(None), bool, int, float})
# A text that is better sent in a frame of its own, which a receiver's limit on packed collections doesn't bound.
_LONG = 64 * 1024
_PLAIN_DEPTH = 64  # far from where msgpack ends, at 511


def is_iterated(value: Any, serializers: tuple[str, ...]) -> bool:
    """Whether a collection inside another one is sent element by element: Dask's rule."""
    if type(value) is list and "msgpack" in serializers:
        before = serializers[: serializers.index("msgpack")]
        if "pickle" not in before:  # msgpack would make a tuple of it
            return True
    return _first_leaf_has_writer(value)


def _first_leaf_has_writer(value: Any) -> bool:
    for _ in range(100):
        kind = type(value)
        if kind is Serialize or kind is Serialized:
            # Dask would pickle the wrapper itself here, which its own receiver doesn't open.
            return True
        if kind not in COLLECTIONS or not value:
            return find_for_class(kind) is not None
        value = next(iter(value.values() if kind is dict else value))
    return False  # contains itself, most likely: pickle knows how to deal with that


def keys_fit(value: dict[Any, Any]) -> bool:
    """Whether the keys of a dict can stand in a header.  (If not, all of the dict goes as one pickle.)"""
    try:
        msgpack.packb(list(value))
    except Exception:  # a key's type, an integer too large, nesting too deep
        return False
    return True


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether msgpack gives back exactly this: of the collections only tuples and dicts, and without long texts in them."""
    kind = type(value)
    if kind is str or kind is bytes:
        return depth == 0 or len(value) <= _LONG
    if kind in _SCALARS:
        return True
    if depth > _PLAIN_DEPTH:
        return False
    if kind is tuple:
        return all(is_plain(item, depth + 1) for item in value)
    if kind is dict:
        return all(is_plain(key, depth + 1) and is_plain(item, depth + 1) for key, item in value.items())
    return False


def dump(value: Any, element: Callable[[Any], tuple[Header, list[Buffer]]]) -> tuple[Header, list[Buffer]]:
    """Header and frames of a collection.

    Args:
        value: exactly a list, tuple, set or dict.
        element: serializes one element; its header is changed here.
    """
    kind = type(value)
    headers: list[Header] = []
    lengths: list[int] = []
    frames: list[Buffer] = []
    compression: list[Any] = []
    items = value.items() if kind is dict else enumerate(value)
    for key, item in items:
        try:
            header, own = element(item)
        except (SerializationError, UnsafePayload) as exc:
            _locate(exc, key)
            raise
        if kind is dict:
            header["key"] = key
        headers.append(header)
        lengths.append(len(own))
        frames.extend(own)
        compression.extend(header.get("compression") or [None] * len(own))
    header = {
        "sub-headers": headers,
        "is-collection": True,
        "frame-lengths": lengths,
        "type-serialized": kind.__name__,
    }
    if any(entry is not None for entry in compression):
        header["compression"] = compression
    return header, frames


def _locate(exc: SerializationError | UnsafePayload, key: object) -> None:
    """Put the place of the element before what the error knows of the place inside of it."""
    place = f"[{key!r:.100}]"
    if isinstance(exc, UnsafePayload):
        exc.field = place + exc.field
    else:
        exc.path = place + exc.path


def sub_headers(header: Header) -> list[Header]:
    """The headers of the elements, checked to be headers."""
    headers = header.get("sub-headers")
    if not isinstance(headers, (tuple, list)) or not all(isinstance(sub_header, dict) for sub_header in headers):
        raise RemoteProtocolError("the header of a collection has no proper 'sub-headers'")
    return list(headers)


def load(header: Header, frames: list[Buffer], element: Callable[[Header, list[Buffer]], Any], keys: Keys) -> Any:
    """The collection of a header and its frames, decompressed and joined.

    Args:
        header: with ``is-collection``.
        frames: those of all elements.
        element: deserializes one element.
        keys: those of the message it came in.
    """
    headers = sub_headers(header)
    lengths = header.get("frame-lengths")
    name = header.get("type-serialized")
    cls = _BY_NAME.get(name) if isinstance(name, str) else None
    if cls is None:
        raise RemoteProtocolError(f"the header of a collection tells of the type {name!r:.100}")
    if not isinstance(lengths, (tuple, list)) or len(lengths) != len(headers):
        raise RemoteProtocolError("the header of a collection has no proper 'frame-lengths'")
    if not all(type(length) is int and length >= 0 for length in lengths) or sum(lengths) != len(frames):
        raise RemoteProtocolError(f"the 'frame-lengths' of a collection don't add up to its {len(frames)} frames")
    if cls is dict and not all("key" in sub_header for sub_header in headers):
        raise RemoteProtocolError("the header of a dict lacks a key")
    values: list[Any] = []
    start = 0
    for index, (sub_header, length) in enumerate(zip(headers, lengths, strict=True)):
        try:
            values.append(element(sub_header, frames[start : start + length]))
        except (SerializationError, UnsafePayload) as exc:
            _locate(exc, sub_header["key"] if cls is dict else index)
            raise
        start += length
    try:
        if cls is dict:
            return keys.make_dict(list(zip([sub_header["key"] for sub_header in headers], values, strict=True)))
        return keys.make_set(values) if cls is set else cls(values)
    except TypeError as exc:
        raise RemoteProtocolError(f"a {cls.__name__} came that can't be one: {exc}") from exc
