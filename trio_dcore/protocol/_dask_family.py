"""The ``dask`` family: values whose class has a reader and a writer (wire document, section 5.4).

Its header names the class by a pickle of it, ``type-serialized``.  Stock unpickles that to find the reader; here it is compared
with what a pickle of a known class looks like, and unpickled only if it is something else and the sender may run code here.
"""

from __future__ import annotations

import math
from array import array, typecodes
from struct import calcsize
from typing import Any

from . import _numpy as _numpy  # registers numpy's classes, and loads no numpy
from ._buffers import flat, join, nbytes
from ._context import Buffer, DecodeContext, EncodeContext
from ._errors import DcoreError, RemoteProtocolError, SerializationError, UnsafePayload
from ._pickle import class_pickle, class_reference, pickle_loads
from ._registry import Handler, add_builtin, find_for_class, find_for_name

__all__ = ["dump", "load", "needs_pickle"]

Header = dict[str, Any]

# What memoryview.cast takes in every Python (the half-precision "e" came later), without the pointer type.
_FORMATS = frozenset("?bBchHiIlLqQnNfd")


def dump(value: object, ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    """Header and frames of a value.

    Raises:
        NotImplementedError: no class of its MRO is registered, or its writer declined; the next family is to try.
    """
    cls = type(value)
    handler = find_for_class(cls)
    if handler is None:
        raise NotImplementedError
    sub_header, frames = handler.dump(value, ctx)
    reference, by_name = class_pickle(cls)
    if not by_name and not ctx.allow_pickle():
        raise UnsafePayload(
            f"{_type_name(cls)} can't be named to the peer, since its module isn't importable there; "
            "it would travel as a pickle, and this peer is not trusted with one"
        )
    return {"sub-header": sub_header, "type": _type_name(cls), "type-serialized": reference, "serializer": "dask"}, frames


def _type_name(cls: type) -> str:
    """Dask's ``typename``: informational."""
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"


def load(header: Header, frames: list[Buffer], ctx: DecodeContext) -> Any:
    """The value of a header and its frames, decompressed and joined."""
    sub_header = header.get("sub-header")
    if not isinstance(sub_header, dict):
        raise RemoteProtocolError("a payload of the dask family has no proper 'sub-header'")
    handler = _handler(header, ctx)
    try:
        return handler.load(sub_header, frames, ctx)
    except DcoreError:
        raise
    except ImportError as exc:
        raise SerializationError(f"a value of {_named(header)} came, and {exc.name} is needed to read it") from exc
    except Exception as exc:
        if handler.custom is None:
            raise
        raise SerializationError(f"the registered reader of {_named(header)} failed: {type(exc).__name__}: {exc}") from exc


def _named(header: Header) -> str:
    name = header.get("type")
    return f"class {name:.200}" if isinstance(name, str) else "an unnamed class"


def _handler(header: Header, ctx: DecodeContext) -> Handler:
    reference = header.get("type-serialized")
    name = class_reference(reference)
    handler = find_for_name(name) if name is not None else None
    if handler is not None:
        return handler
    if not isinstance(reference, (bytes, bytearray, memoryview)):
        raise RemoteProtocolError("a payload of the dask family has no proper 'type-serialized'")
    if not ctx.allow_pickle():
        raise UnsafePayload(
            f"a value of {_named(header)} came from a peer that is not trusted; finding its reader would take unpickling. "
            "Register the class by name: register_serialization('module.Class', ...)"
        )
    cls = pickle_loads(reference)
    handler = find_for_class(cls) if isinstance(cls, type) else None
    if handler is None:
        raise SerializationError(
            f"a value of {_named(header)} came, and no reader is registered for it; see register_serialization"
        )
    return handler


def needs_pickle(header: Header) -> bool:
    """Whether anyone, a stock peer included, would unpickle more than a reference to a known class to read this."""
    sub_header = header.get("sub-header")
    name = class_reference(header.get("type-serialized"))
    handler = find_for_name(name) if name is not None else None
    if handler is None or handler.needs_pickle is None or not isinstance(sub_header, dict):
        return True
    return handler.needs_pickle(sub_header)


# -- bytes and their relatives -------------------------------------------------------------------------------------------------


def _dump_bytes(value: Any, ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    return {}, [value]


def _load_bytes(header: Header, frames: list[Buffer], ctx: DecodeContext) -> bytes:
    if len(frames) == 1 and type(frames[0]) is bytes:
        return frames[0]
    return b"".join(frames)


def _load_bytearray(header: Header, frames: list[Buffer], ctx: DecodeContext) -> bytearray:
    if len(frames) == 1 and type(frames[0]) is bytearray:
        return frames[0]
    return bytearray().join(frames)


def _dump_memoryview(value: memoryview, ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    if value.format.lstrip("@") not in _FORMATS:
        raise SerializationError(f"a memoryview of format {value.format!r} can't be rebuilt by the receiver")
    if value.nbytes == 0 and value.ndim > 1:
        raise SerializationError("an empty memoryview of more than one dimension can't be rebuilt by the receiver")
    header = {"format": value.format.lstrip("@"), "shape": value.shape}
    # The receiver casts from C order; stock sends the memory of a Fortran-ordered view as it is, which transposes it.
    return header, [value if value.c_contiguous else value.tobytes()]


def _load_memoryview(header: Header, frames: list[Buffer], ctx: DecodeContext) -> Any:
    code, shape = header.get("format"), header.get("shape")
    if not isinstance(code, str) or code not in _FORMATS:
        raise RemoteProtocolError(f"the header of a memoryview has the format {code!r:.100}")
    if (
        not isinstance(shape, (tuple, list))
        or not all(type(length) is int and length >= 0 for length in shape)
        or len(shape) > 64
    ):
        raise RemoteProtocolError("the header of a memoryview has no proper 'shape'")
    # An empty payload may come as no frame at all.
    view: Any = memoryview(flat(join(frames) if frames else b""))
    size = math.prod(shape) * calcsize(code)
    if size != view.nbytes:
        raise RemoteProtocolError(f"the header of a memoryview tells of {size} bytes where {view.nbytes} came")
    if size:
        return view.cast(code, list(shape))
    if len(shape) != 1:
        raise RemoteProtocolError("the header of a memoryview tells of an empty one of more than one dimension")
    return view.cast(code)


def _dump_array(value: array[Any], ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    return {"typecode": value.typecode, "writeable": (None,)}, [memoryview(value)]


def _load_array(header: Header, frames: list[Buffer], ctx: DecodeContext) -> array[Any]:
    code = header.get("typecode")
    if not isinstance(code, str) or len(code) != 1 or code not in typecodes:
        raise RemoteProtocolError(f"the header of an array has the typecode {code!r:.100}")
    value: array[Any] = array(code)
    size = sum(map(nbytes, frames))
    if size % value.itemsize:
        raise RemoteProtocolError(f"an array of items of {value.itemsize} bytes came with {size} bytes")
    value.frombytes(flat(join(frames)) if frames else b"")
    return value


def _never(header: Header) -> bool:
    return False


add_builtin(Handler(_dump_bytes, _load_bytes, _never), "builtins.bytes")
add_builtin(Handler(_dump_bytes, _load_bytearray, _never), "builtins.bytearray")
add_builtin(Handler(_dump_memoryview, _load_memoryview, _never), "builtins.memoryview")
add_builtin(Handler(_dump_array, _load_array, _never), "array.array")
