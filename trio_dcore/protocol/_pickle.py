"""Pickles: making them as Dask does, loading them, and reading references to classes without loading anything.

Whether a pickle may be loaded at all is decided by the callers; :func:`pickle_loads` runs what it is given.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

from ._buffers import flat
from ._context import Buffer
from ._errors import SerializationError
from ._registry import find_for_class, has_custom

__all__ = ["class_pickle", "class_reference", "dump", "pickle_dumps", "pickle_loads"]

# In a long pickle of a large array or text "__main__" is more likely data than a reference (Dask's number).
_SHORT = 1000
# A reference to a class is two short strings; anything longer is something else.
_LONGEST_REFERENCE = 11 + 2 * (2 + 255 + 1) + 3


def pickle_dumps(obj: object, *, protocol: int = 5) -> tuple[bytes, list[Buffer]]:
    """Pickle with the standard pickle, or with cloudpickle where that fails or would refer to ``__main__``, as Dask does.

    Args:
        obj: any object.
        protocol: pickle protocol; below 5 all is in the pickle itself.

    Returns:
        The pickle, and its out-of-band buffers as flat views of the objects' own memory, in callback order.

    Raises:
        SerializationError: no pickle can be made of it.
    """
    data, buffers = dump(obj, protocol)
    return data, [flat(buffer) for buffer in buffers]


def dump(obj: object, protocol: int) -> tuple[bytes, list[memoryview]]:
    """:func:`pickle_dumps`, with the buffers as views that still know their item size."""
    buffers: list[pickle.PickleBuffer] = []
    callback = buffers.append if protocol >= 5 else None
    data: bytes | None
    try:
        try:
            data = pickle.dumps(obj, protocol, buffer_callback=callback)
        except Exception:
            if not has_custom():
                raise
            buffers.clear()
            data = _dump_registered(obj, protocol, callback)
        if _by_value(obj, data):
            data = None
    except Exception:  # whatever pickle says, cloudpickle may do better; if it doesn't, its error is the one reported
        data = None
    if data is None:
        buffers.clear()
        try:
            data = import_module("cloudpickle").dumps(obj, protocol, callback)
        except Exception as exc:
            raise SerializationError(f"an object of type {type(obj).__qualname__} can't be pickled: {exc}") from exc
    return data, [memoryview(buffer) for buffer in buffers]


def _by_value(obj: object, data: bytes) -> bool:
    """Whether the pickle refers to modules that the receiver won't have."""
    if b"__main__" in data and (len(data) < _SHORT or not _is_bulk(obj)):
        return True
    cloudpickle = sys.modules.get("cloudpickle")
    if cloudpickle is None:
        return False
    registered = cloudpickle.list_registry_pickle_by_value()
    return bool(registered) and getattr(obj, "__module__", None) in registered and not _is_bulk(obj)


def _is_bulk(obj: object) -> bool:
    if isinstance(obj, (str, bytes)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(obj, numpy.ndarray)


class _RegisteredPickler(pickle.Pickler):
    """Writes instances of classes registered with ``register_serialization`` by the functions registered for them."""

    def reducer_override(self, obj: Any) -> Any:
        handler = find_for_class(type(obj))
        if handler is None or handler.custom is None:
            return NotImplemented
        serialize, deserialize = handler.custom
        header, frames = serialize(obj)
        return deserialize, (header, [frame if isinstance(frame, (bytes, bytearray)) else bytes(flat(frame)) for frame in frames])


def _dump_registered(obj: object, protocol: int, callback: Callable[[pickle.PickleBuffer], None] | None) -> bytes:
    stream = io.BytesIO()
    _RegisteredPickler(stream, protocol, buffer_callback=callback).dump(obj)
    return stream.getvalue()


class _HookedUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes, buffers: Sequence[Buffer], hook: Callable[[str, str], Any]) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._hook = hook

    def find_class(self, module: str, name: str) -> Any:
        found = self._hook(module, name)
        return super().find_class(module, name) if found is NotImplemented else found


def pickle_loads(data: Buffer, buffers: Sequence[Buffer] = (), *, find_class: Callable[[str, str], Any] | None = None) -> Any:
    """Load a pickle.  The caller has made sure that its sender may run code here.

    Args:
        data: the pickle.
        buffers: its out-of-band buffers.
        find_class: called with module and name for each global; returns what to take for it, or NotImplemented for the usual
            look-up.

    Raises:
        SerializationError: it can't be loaded; the cause says why.
    """
    try:
        if find_class is None:
            return pickle.loads(data, buffers=buffers)
        return _HookedUnpickler(bytes(data), buffers, find_class).load()
    except Exception as exc:
        raise SerializationError(f"a pickle can't be loaded: {type(exc).__name__}: {exc}") from exc


# -- references to classes -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _plain_class_pickle(cls: type) -> bytes | None:
    try:
        data = pickle.dumps(cls, 5)  # protocol 5 whatever was negotiated (wire document, section 3)
    except Exception:  # a local class; what comes out of a metaclass is anybody's guess
        return None
    return None if b"__main__" in data else data


def class_pickle(cls: type) -> tuple[bytes, bool]:
    """The header's ``type-serialized`` of a class, and whether it is a mere reference, or the class itself by value."""
    data = _plain_class_pickle(cls)
    if data is not None:
        return data, class_reference(data) is not None
    return dump(cls, 5)[0], False


def class_reference(data: object) -> str | None:
    """The dotted name in the pickle of a class, if it is exactly what pickle writes in protocol 4 or 5; nothing is loaded.

    Anything else, a byte too many included, is None.
    """
    if not isinstance(data, bytes) or not 10 <= len(data) <= _LONGEST_REFERENCE:
        return None
    return _class_reference(data)


@lru_cache(maxsize=64)
def _class_reference(data: bytes) -> str | None:
    if data[:2] not in (b"\x80\x04", b"\x80\x05"):
        return None
    position = 2
    if data[2:3] == b"\x95":  # FRAME, u64 length of the rest
        if int.from_bytes(data[3:11], "little") != len(data) - 11:
            return None
        position = 11
    parts = []
    for _ in range(2):
        if data[position : position + 1] != b"\x8c":  # SHORT_BINUNICODE, u8 length
            return None
        end = position + 2 + int.from_bytes(data[position + 1 : position + 2], "little")
        try:
            parts.append(data[position + 2 : end].decode("utf-8"))
        except UnicodeDecodeError:
            return None
        position = end + (data[end : end + 1] == b"\x94")  # MEMOIZE
    if data[position:] not in (b"\x93.", b"\x93\x94."):  # STACK_GLOBAL, STOP
        return None
    return ".".join(parts)
