"""Which class is written and read by which functions: the registry of the ``dask`` family.

A class is found on sending by walking its MRO, as Dask's dispatch does, and on receiving by the dotted name that the header's
class reference holds; nothing is imported for either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ._context import Buffer, DecodeContext, EncodeContext

__all__ = [
    "Handler",
    "add_builtin",
    "add_class",
    "dotted_name",
    "find_for_class",
    "find_for_name",
    "has_custom",
    "register_serialization",
]

Parts = tuple[dict[str, Any], list[Buffer]]


@dataclass(frozen=True, slots=True)
class Handler:
    """How one class travels in the ``dask`` family.

    Args:
        dump: value and context to sub-header and frames; NotImplementedError hands the value to the next family.
        load: sub-header, frames and context back to the value.
        needs_pickle: tells from a sub-header whether ``load`` would unpickle anything, which decides whether what a stranger
            sent may be passed on.  None: a user's own handler, of which that isn't known.
        custom: the user's two functions as registered.
    """

    dump: Callable[[Any, EncodeContext], Parts]
    load: Callable[[dict[str, Any], list[Buffer], DecodeContext], Any]
    needs_pickle: Callable[[dict[str, Any]], bool] | None = None
    custom: tuple[Callable[..., Parts], Callable[..., Any]] | None = None


_classes: dict[type, Handler] = {}
#: Registered by dotted name, for classes whose module may never be imported; the built-in ones are here.
_names: dict[str, Handler] = {}
#: Dotted names of the registered classes, for receiving.
_references: dict[str, Handler] = {}
_custom = False


def dotted_name(cls: type) -> str:
    """Where a class is to be found."""
    return f"{cls.__module__}.{cls.__qualname__}"


def add_builtin(handler: Handler, *names: str) -> None:
    """Register a handler of this package under the dotted names of its classes."""
    for name in names:
        _names[name] = handler


def add_class(cls: type, handler: Handler) -> None:
    """Register a handler of a user's class."""
    _classes[cls] = handler
    _references[dotted_name(cls)] = handler


def find_for_class(cls: type) -> Handler | None:
    """The handler of a class or of its nearest registered base."""
    for base in cls.__mro__:
        handler = _classes.get(base) or _names.get(dotted_name(base))
        if handler is not None:
            return handler
    return None


def find_for_name(name: str) -> Handler | None:
    """The handler of the class of that dotted name, without looking at base classes."""
    return _references.get(name) or _names.get(name)


def has_custom() -> bool:
    """Whether anything was registered by a user."""
    return _custom


def register_serialization(
    cls: type | str,
    serialize: Callable[..., tuple[dict[str, Any], list[Buffer]]],
    deserialize: Callable[[dict[str, Any], list[Buffer]], Any],
) -> None:
    """Say how the instances of a class, and of its subclasses, travel inside ``Serialize``.

    Both sides register the same class.  What the two functions do needs no pickle, so such values also travel between peers
    that do not trust each other: ``deserialize`` must then stand whatever header and frames a stranger sends.

    Args:
        cls: the class, or its dotted name (``"package.module.Class"``), which imports nothing and holds as soon as such a class
            turns up.
        serialize: called with the value; returns a header of msgpack-able values and a list of bytes-like frames.  If it has a
            parameter named ``context`` it also gets a dict with what was negotiated, as in Dask.  NotImplementedError leaves
            the value to the next family.
        deserialize: called with that header and those frames (as bytes, bytearray or memoryview); returns the value.

    Raises:
        TypeError: ``cls`` is neither a class nor a dotted name, or a function can't be called.
    """
    global _custom
    functions: tuple[object, ...] = (serialize, deserialize)
    if not all(map(callable, functions)):
        raise TypeError("register_serialization(cls, serialize, deserialize): the last two must be functions")
    with_context = _has_context(serialize)

    def dump(value: Any, ctx: EncodeContext) -> Parts:
        if with_context:
            header, frames = serialize(value, context={"compression": ctx.compression, "pickle-protocol": ctx.pickle_protocol})
        else:
            header, frames = serialize(value)
        return header, list(frames)

    def load(header: dict[str, Any], frames: list[Buffer], ctx: DecodeContext) -> Any:
        return deserialize(header, frames)

    handler = Handler(dump, load, custom=(serialize, deserialize))
    which: object = cls
    if isinstance(which, type):
        add_class(which, handler)
    elif isinstance(which, str) and "." in which:
        _names[which] = handler
        _references[which] = handler
    else:
        raise TypeError(f"register_serialization({cls!r}, ...): give a class, or its dotted name as 'module.Class'")
    _custom = True


def _has_context(function: Callable[..., Any]) -> bool:
    try:
        return "context" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return False
