"""Objects that travel attribute by attribute: :func:`register_generic`, in Dask's format.

The sub-header holds small attributes as they are (``simple``); every other one (``complex``) has a header and frames of its own among
those of the object, and a dict that isn't plain is taken apart like an object (``nested-dict``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgpack

from . import _collections
from ._collisions import Keys
from ._context import Buffer, DecodeContext, EncodeContext
from ._errors import RemoteProtocolError, SerializationError, UnsafePayload
from ._families import dump_value, load_value
from ._pickle import class_pickle, class_reference, pickle_loads
from ._registry import Handler, add_class, dotted_name
from ._types import Pickled, Serialized

__all__ = ["register_generic"]

Header = dict[str, Any]


def register_generic(cls: type) -> None:
    """Have the instances of a class, and of its subclasses, travel inside ``Serialize`` attribute by attribute.

    For classes whose bytes are mostly in attributes that travel well by themselves, such as arrays, and that need no constructor: the
    receiver makes an object with ``object.__new__`` and gives it the attributes.  Both sides register the class, which a stock Dask peer
    does with ``distributed.protocol.register_generic``.  Where all attributes do, an object travels without a pickle, also to and from
    peers that are not trusted: the class must then stand whatever attributes a stranger gives it.

    Args:
        cls: a class whose instances have a ``__dict__``.

    Raises:
        TypeError: ``cls`` is no class.
    """
    if not isinstance(cls, type):
        raise TypeError(f"register_generic({cls!r}): give a class")
    add_class(cls, Handler(_dump, partial(_load, cls)))


def _dump(value: Any, ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is not dict:
        raise SerializationError(
            f"an object of type {dotted_name(type(value))} has no __dict__, which register_generic() is about"
        )
    return _dump_dict(type(value), attributes, ctx)


def _dump_dict(cls: type, attributes: dict[Any, Any], ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    simple: Header = {}
    others: Header = {}
    frames: list[Buffer] = []
    for name, value in attributes.items():
        if _is_simple(value):
            simple[name] = value
            continue
        if isinstance(value, (Serialized, Pickled)):
            raise SerializationError(
                f"the attribute {name!r} is a {type(value).__name__}, which can't be part of another payload"
            )
        if type(value) is dict and _collections.keys_fit(value):
            inner, own = _dump_dict(dict, value, ctx)
            inner = {"nested-dict": inner}
        else:
            inner, own = dump_value(value, ctx)
        others[name] = {"header": inner, "start": len(frames), "stop": len(frames) + len(own)}
        frames += own
    return {"serializer": "dask", "type-serialized": class_pickle(cls)[0], "simple": simple, "complex": others}, frames


def _is_simple(value: object) -> bool:
    if not _collections.is_plain(value):
        return False
    try:
        msgpack.packb(value)
    except Exception:  # an integer of more than 64 bits, or a lone surrogate: for another family
        return False
    return True


def _load(cls: type, header: Header, frames: list[Buffer], ctx: DecodeContext) -> Any:
    reference = header.get("type-serialized")
    if class_reference(reference) != dotted_name(cls):
        if not ctx.allow_pickle():
            raise UnsafePayload(f"an object of a class like {dotted_name(cls)} came, and finding out which takes unpickling")
        found = pickle_loads(reference) if isinstance(reference, bytes) else None
        if not isinstance(found, type) or not issubclass(found, cls):
            raise RemoteProtocolError(f"the header of an object names no class that is a {dotted_name(cls)}")
        cls = found
    attributes = _load_dict(header, frames, ctx)
    try:
        value: Any = object.__new__(cls)
        vars(value).update(attributes)
    except Exception as exc:
        raise SerializationError(f"an object of type {dotted_name(cls)} can't be made: {type(exc).__name__}: {exc}") from exc
    return value


def _load_dict(header: Header, frames: list[Buffer], ctx: DecodeContext) -> dict[Any, Any]:
    simple, others = header.get("simple"), header.get("complex")
    if not isinstance(simple, dict) or not isinstance(others, dict):
        raise RemoteProtocolError("the header of an object has no proper 'simple' and 'complex'")
    attributes = dict(simple)
    position = 0
    for name, part in others.items():
        inner, stop = (part.get("header"), part.get("stop")) if isinstance(part, dict) else (None, None)
        # Parts that overlap are no peer's doing, and would let a few frames become many.
        if not isinstance(inner, dict) or part.get("start") != position or type(stop) is not int:
            raise RemoteProtocolError("the header of an object has a part that is none")
        if not position <= stop <= len(frames):
            raise RemoteProtocolError(f"the header of an object of {len(frames)} frames tells of {stop}")
        own = frames[position:stop]
        nested = inner.get("nested-dict")
        if nested is None:
            attributes[name] = load_value(inner, own, ctx, Keys())
        elif isinstance(nested, dict):
            attributes[name] = _load_dict(nested, own, ctx)
        else:
            raise RemoteProtocolError("the header of an object has a 'nested-dict' that is none")
        position = stop
    return attributes
