"""Enums on the wire: ``{"__Enum__": true, "name", "__module__", "__name__"}`` (wire document, section 5.1).

Stock Dask writes every enum like that, and its receiver imports the module if the root package is ``dask`` or ``distributed``.
Here a module is never imported because a peer named it, and a class is only ever asked for its members.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from ._errors import RemoteProtocolError

__all__ = ["enum_marker", "enum_member", "register_enum"]

_STOCK_ROOTS = frozenset({"dask", "distributed"})

_by_name: dict[tuple[str, str], type[Enum]] = {}
_by_class: dict[type[Enum], tuple[str, str]] = {}


def register_enum(module: str, qualname: str, cls: type[Enum]) -> None:
    """Let ``cls`` stand for the enum that is called ``module``.``qualname`` on the wire, in both directions.

    Registered enums are read whatever ``Security(enum_modules=...)`` says.

    Args:
        module: the module's name on the wire, e.g. ``"distributed.core"``.
        qualname: the class's name on the wire, e.g. ``"Status"``.
        cls: our class, whose members have the same names.

    Raises:
        ValueError: another class has that name on the wire, or this class has another name.
    """
    name = (module, qualname)
    if _by_name.get(name, cls) is not cls:
        raise ValueError(f"{module}.{qualname} is already read as {_by_name[name]!r}")
    if _by_class.get(cls, name) != name:
        raise ValueError(f"{cls!r} is already written as {'.'.join(_by_class[cls])}")
    _by_name[name] = cls
    _by_class[cls] = name


def enum_marker(member: Enum, *, everything: bool = False) -> dict[str, object] | None:
    """Return the marker map for ``member``, or None where the receiver could not be expected to read it.

    That is for enums that are neither registered nor Dask's own, for classes inside classes or functions (the wire has only the
    plain name), and for members without a name of their own, e.g. a combination of flags.

    Args:
        member: what is to be written.
        everything: write enums of any module; for headers, where there is no other way.
    """
    cls = type(member)
    if member.name not in cls.__members__:
        return None
    known = _by_class.get(cls)
    if known is None:
        if not everything and cls.__module__.partition(".")[0] not in _STOCK_ROOTS:
            return None
        if cls.__qualname__ != cls.__name__:
            return None
        known = (cls.__module__, cls.__name__)
    return {"__Enum__": True, "name": member.name, "__module__": known[0], "__name__": known[1]}


def enum_member(marker: Mapping[Any, Any], modules: Iterable[str]) -> Enum:
    """Return the member that a marker map names.

    Args:
        marker: the map, as a peer sent it.
        modules: root packages whose enums may be looked up, if they are imported already.

    Raises:
        RemoteProtocolError: the map is not well-formed, or its class may not be looked up, or has no such member.
    """
    module, name, member = marker.get("__module__"), marker.get("__name__"), marker.get("name")
    if not (type(module) is str and type(name) is str and type(member) is str):
        raise RemoteProtocolError("an __Enum__ marker lacks its __module__, __name__ or name")
    where = f"{module[:100]}.{name[:100]}"
    cls = _by_name.get((module, name))
    if cls is None:
        root = module.partition(".")[0]
        if root not in modules:
            raise RemoteProtocolError(
                f"the peer sent a member of the enum {where!r}; the package {root[:100]!r} is not in Security(enum_modules=...)"
            )
        loaded = sys.modules.get(module)
        if loaded is None:
            raise RemoteProtocolError(
                f"the peer sent a member of the enum {where!r}, whose module is not imported here; "
                "a peer's message never imports one, whatever Security(enum_modules=...) says"
            )
        # Not getattr: a module's __getattr__ may import things.
        found = vars(loaded).get(name)
        if not (isinstance(found, type) and issubclass(found, Enum)):
            raise RemoteProtocolError(f"the peer sent a member of the enum {where!r}, which is not an enum here")
        cls = found
    try:
        return cls.__members__[member]
    except KeyError:
        raise RemoteProtocolError(f"the enum {where!r} has no member {member[:100]!r} here") from None
