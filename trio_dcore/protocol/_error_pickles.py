"""Pickles of exceptions: made within a size, checked, and read without tblib.

Dask pickles exceptions by way of tblib, which carries tracebacks and causes.  Here its names are mapped to stand-ins that keep
the exceptions and drop the frames, so that such pickles load whether tblib is there or not, and no code object of a peer is made.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

from ._error_text import attempt
from ._remote_classes import args_of, fields_of, new_exception

__all__ = ["MAX_PICKLE", "dump", "load"]

#: Bytes of one error's pickle.  An exception that holds more is sent as its text.
MAX_PICKLE = 256 * 1024

_NEWOBJ: Any = vars(copyreg)["__newobj__"]  # what object.__reduce_ex__ names for "make it with __new__ alone"
_PROTOCOL = 4  # nothing of 5 is needed, and every Dask peer has it


class _TooLarge(Exception):
    pass


class _Sink(io.BytesIO):
    """A file that refuses to grow: the pickler stops there, instead of copying a gigabyte first."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._room = limit

    def write(self, data: Any) -> int:
        with memoryview(data) as view:
            self._room -= view.nbytes
        if self._room < 0:
            raise _TooLarge
        return super().write(data)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, BaseException):
            return NotImplemented
        kind = type(obj)
        if _is_called_differently(kind):
            # Made without __init__; then BaseException.__setstate__ puts args, fields and __dict__ in place, which has the notes.
            # It needs neither tblib nor us at the other end.
            return _NEWOBJ, (kind, *args_of(obj)), {**obj.__dict__, **fields_of(obj), "args": args_of(obj)}
        reducer = copyreg.dispatch_table.get(kind)
        if reducer is not None and _is_tblib(reducer.__module__):
            # distributed, in the same process, registers tblib for each exception class that it meets, builtin ones included.
            return obj.__reduce_ex__(_PROTOCOL)
        return NotImplemented


def _is_called_differently(kind: type[BaseException]) -> bool:
    """Whether the class has an ``__init__`` of its own, and nothing by which it says how its instances are pickled.

    Such an ``__init__`` mostly takes other arguments than it passes on, and Python's pickles, which call the class with ``args``,
    then fail to load, or load as something else.
    """
    return (
        hasattr(kind.__init__, "__code__")  # written in Python
        and kind.__reduce__ in (BaseException.__reduce__, OSError.__reduce__)
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__setstate__ is BaseException.__setstate__
        and not issubclass(kind, BaseExceptionGroup)
    )


def dump(value: object, limit: int = MAX_PICKLE) -> bytes | None:
    """The pickle of ``value``, or None if there is none, or it is larger than ``limit`` bytes."""

    def attempted() -> bytes:
        sink = _Sink(limit)
        _Pickler(sink, protocol=_PROTOCOL).dump(value)
        return sink.getvalue()

    return attempt(attempted, None)


def load(data: bytes) -> object:
    """Unpickle what a trusted peer sent; None if that fails in any way.

    What fails is another program's class that is not here, or does not take its own arguments; and a SystemExit is no reason to
    end *this* program.  A KeyboardInterrupt passes, since it may be the user's.
    """
    return attempt(lambda: _Unpickler(io.BytesIO(data)).load(), None)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if _is_tblib(module):
            return _STAND_INS.get(name, _Ignored)
        return super().find_class(module, name)


def _is_tblib(module: object) -> bool:
    return isinstance(module, str) and (module == "tblib" or module.startswith("tblib."))


class _Ignored:
    """In the place of tblib's Frame, Code and Traceback."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _no_traceback(*args: object) -> None:
    return None


def _exception(
    kind: Callable[..., BaseException],
    args: tuple[Any, ...],
    cause: BaseException | None,
    tb: object,
    context: BaseException | None = None,
    suppress_context: bool = False,
    notes: list[str] | None = None,
) -> BaseException:
    """An exception that its class's own ``__reduce__`` described.  (Older versions of tblib send fewer arguments.)"""
    return _chained(kind(*args), cause, context, suppress_context, notes)


def _exception_with_attrs(
    kind: type[BaseException],
    attrs: dict[str, Any],
    cause: BaseException | None,
    tb: object,
    context: BaseException | None,
    suppress_context: bool,
    notes: list[str] | None,
    args: tuple[Any, ...] = (),
) -> BaseException:
    """An exception whose class has an ``__init__`` of its own: that is not run, its results are put in place."""
    made = new_exception(kind, args)
    for base in (SyntaxError, UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError):
        if issubclass(kind, base):
            # Their own __init__ is in C and sets what str() is made of; tblib takes it for one of the class and leaves that out.
            initialise: Callable[..., None] = base.__init__
            attempt(partial(initialise, made, *attrs.get("args", ())), None)
    for name, value in attrs.items():
        BaseException.__setattr__(made, name, value)
    return _chained(made, cause, context, suppress_context, notes)


def _chained(
    made: BaseException,
    cause: BaseException | None,
    context: BaseException | None,
    suppress_context: bool,
    notes: list[str] | None,
) -> BaseException:
    # Set past the class's own __setattr__: a frozen one would refuse.
    BaseException.__setattr__(made, "__cause__", cause)
    BaseException.__setattr__(made, "__context__", context)
    BaseException.__setattr__(made, "__suppress_context__", suppress_context)
    if notes is not None:
        BaseException.__setattr__(made, "__notes__", notes)
    return made


_STAND_INS: dict[str, Callable[..., object]] = {
    "unpickle_exception": _exception,
    "unpickle_exception_with_attrs": _exception_with_attrs,
    "unpickle_traceback": _no_traceback,
}
