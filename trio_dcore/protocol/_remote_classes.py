"""The classes that are a RemoteError and the remote exception's own type at once, and how their instances are built.

``except ValueError:`` shall catch a remote ValueError and ``except RemoteError:`` every remote error, so for a type T there is a
subclass of both (architecture, section 3.4).  Its instances are never made by calling T: an ``__init__`` that takes other
arguments than it passes on is the rule, not the exception.  Instead the state is put together again: ``args``, ``__dict__`` and
the fields that a few builtins keep in C.

Not every type is fit for that.  Some mean something to whoever catches them *here* (StopIteration, trio's and our own errors: a
pool must not take a remote handler's CommClosedError for the end of its own comm); others can't be subclassed so.  For these
:func:`adapted` answers None and the error is a plain RemoteError.
"""

from __future__ import annotations

import builtins
from abc import ABCMeta
from functools import lru_cache
from typing import Any, ClassVar, cast

from ._errors import DcoreError, LimitExceeded, RemoteError, SerializationError, UnsafePayload

__all__ = [
    "BUILTINS",
    "adapted",
    "args_of",
    "build",
    "class_name",
    "fields_of",
    "group_message",
    "new_exception",
    "restore",
    "stood_for",
]

# Errors of ours that a remote error may be an instance of as well: none of them says anything about the local comm.
_MIXABLE = frozenset({DcoreError, LimitExceeded, SerializationError, UnsafePayload})

#: Builtin exceptions by qualified name, aliases included, that a remote error may be an instance of.  A peer's text chooses
#: from these and from nothing else.  Groups are built from their leaves instead, and Exception itself adds nothing.
BUILTINS: dict[str, type[Exception]] = {
    f"builtins.{name}": cls
    for name, cls in vars(builtins).items()
    if isinstance(cls, type)
    and issubclass(cls, Exception)
    and cls is not Exception
    and not issubclass(cls, (StopIteration, StopAsyncIteration, BaseExceptionGroup))
}

# What these keep outside of ``args`` and ``__dict__``.  (AttributeError and NameError have such fields too, but pickle does not
# keep them on every supported Python, and the interpreter would search *our* names for suggestions when it prints them.)
_UNICODE = ("encoding", "object", "start", "end", "reason")
_FIELDS: dict[type[BaseException], tuple[str, ...]] = {
    OSError: ("errno", "strerror", "filename", "filename2"),
    ImportError: ("msg", "name", "path"),
    SyntaxError: ("msg", "filename", "lineno", "offset", "text", "end_lineno", "end_offset"),
    UnicodeDecodeError: _UNICODE,
    UnicodeEncodeError: _UNICODE,
    UnicodeTranslateError: _UNICODE[1:],
}

_HEAPTYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made at run time, so not one of the types that lay out memory in C


class _Adapted(RemoteError):
    """First base of every class that is also a T: what T does its own way, but must not here, is decided before T is asked."""

    adapts: ClassVar[type[Exception]] = Exception

    def __init_subclass__(cls, **kwargs: object) -> None:
        # T's own hook may keep a registry of its subclasses by code or name; ours is none of them and must not replace T there.
        pass

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(_shown, args_of(self)))})"

    def __setattr__(self, name: str, value: object) -> None:
        # A frozen T would refuse even __traceback__, which contextlib and others set.
        BaseException.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is not importable by name, and T may be picky about arguments: send T and the state.
        state = {name: value for name, value in self.__dict__.items() if name != "original"}
        return (restore, (self.adapts, args_of(self), fields_of(self)), state)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return self.__reduce__()


def _shown(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # a repr() of the user's, or a peer's integer with more digits than Python prints
        return f"<{type(value).__name__}>"


def class_name(cls: type) -> str:
    """The qualified name as it is sent; what lives in our private modules goes by the package's name."""
    module: object = cls.__module__
    name: object = cls.__qualname__
    if not isinstance(module, str):
        return f"?.{name}"  # a type made by hand, outside of any module
    return f"trio_dcore.{name}" if module.startswith("trio_dcore.") else f"{module}.{name}"


def adapted(kind: type[BaseException]) -> type[RemoteError] | None:
    """The subclass of RemoteError and ``kind``, or None where there can be none, or should be none.  Never raises."""
    if issubclass(kind, _Adapted):
        return kind
    if type(kind) not in (type, ABCMeta):
        return None  # a metaclass is code of its own, and may even make the type unhashable
    return _adapted(cast(Any, kind))


# Bounded: programs that make exception classes at run time must not grow this for ever.  An evicted class is simply made again.
@lru_cache(maxsize=256)
def _adapted(kind: Any) -> type[RemoteError] | None:
    if not issubclass(kind, Exception) or issubclass(kind, (StopIteration, StopAsyncIteration)) or kind is Exception:
        return None
    for base in kind.__mro__:
        root = class_name(base).partition(".")[0]
        # trio's errors, too, are about the task, channel or stream at hand.
        if root == "trio" or (root == "trio_dcore" and base not in _MIXABLE):
            return None
        if base.__flags__ & _HEAPTYPE and base.__dict__.get("__slots__"):
            return None  # neither pickle nor we carry what stands in slots
    name = class_name(kind).removeprefix("builtins.")
    namespace = {"adapts": kind, "__module__": "trio_dcore", "__doc__": f"A remote {name}."}
    try:
        return cast("type[RemoteError]", type(kind)(f"RemoteError[{name}]", (_Adapted, kind), namespace))
    except Exception:  # incompatible layouts, orders of bases, and whatever else a type may have against it
        return None


def new_exception(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """An instance of ``cls`` with these ``args``, of whose own ``__new__`` and ``__init__`` neither has run.

    Raises:
        TypeError, ValueError: ``args`` won't do for a group, which checks them itself.
    """
    if issubclass(cls, BaseExceptionGroup):
        made: BaseException = BaseExceptionGroup.__new__(cls, *args)
    else:
        # The type whose memory layout it is.  (MemoryError adds none, and its __new__ refuses a class that starts otherwise.)
        solid: Any = cls
        while solid.__flags__ & _HEAPTYPE:
            solid = solid.__base__
        made = solid.__new__(cls)
    _member(BaseException, "args").__set__(made, tuple(args))
    return made


def build(
    cls: type[BaseException], args: tuple[Any, ...], fields: dict[str, Any], state: dict[str, Any] | None = None
) -> BaseException:
    """An instance of ``cls`` from its parts: ``args``, :func:`fields_of` and ``__dict__``.

    Raises:
        TypeError, ValueError, OverflowError: a field is not of the type that the C code wants.
    """
    made = new_exception(cls, args)
    for base, names in _FIELDS.items():
        if issubclass(cls, base):
            for name in names:
                # None is what is there already; setting it would make OSError's str() print it.
                if fields.get(name) is not None:
                    _member(base, name).__set__(made, fields[name])
    if state:
        made.__dict__.update(state)
    return made


def args_of(exc: BaseException) -> tuple[Any, ...]:
    """``exc.args``, whatever the class has made of that name."""
    return cast("tuple[Any, ...]", _member(BaseException, "args").__get__(exc))


def fields_of(exc: BaseException) -> dict[str, Any]:
    """What ``exc`` keeps outside of ``args`` and ``__dict__``, as far as it is there."""
    found: dict[str, Any] = {}
    for base, names in _FIELDS.items():
        if isinstance(exc, base):
            for name in names:
                value = _member(base, name).__get__(exc)
                if value is not None:
                    found[name] = value
    return found


def group_message(exc: BaseException) -> str:
    """The message of a group as it was given, without the number of its members."""
    return str(_member(BaseExceptionGroup, "message").__get__(exc))


def stood_for(exc: RemoteError) -> BaseException:
    """What a remote error stands for, as far as that is here: the exception that was unpickled, or one like it; else ``exc``.

    Raises:
        TypeError, ValueError, OverflowError: somebody has changed its args or fields to what the class can't have.
    """
    if exc.original is not None:
        return exc.original
    if not isinstance(exc, _Adapted):
        return exc
    state = {name: value for name, value in exc.__dict__.items() if name not in RemoteError.__annotations__}
    return build(exc.adapts, args_of(exc), fields_of(exc), state)


def restore(kind: type[Exception], args: tuple[Any, ...], fields: dict[str, Any]) -> RemoteError:
    """Make the instance for an unpickled or copied error again; its ``__dict__`` follows with ``__setstate__``."""
    cls = adapted(kind)
    if cls is None:
        return RemoteError(*args)  # the type has changed since it was pickled
    return cast(RemoteError, build(cls, args, fields))


def _member(cls: type[BaseException], name: str) -> Any:
    """The descriptor by which ``cls`` itself keeps ``name``: a subclass may have a property of that name."""
    return cls.__dict__[name]
