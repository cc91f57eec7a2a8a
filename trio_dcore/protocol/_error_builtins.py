"""Builtin exceptions rebuilt from data that a stranger sent, without unpickling anything.

So ``except ValueError:`` works for errors of peers that are not trusted.  The classes are a fixed table; the data are checked
where the interpreter itself would take it at its word later, when the error is printed or its text is asked for.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from ._error_text import attempt
from ._errors import RemoteError
from ._remote_classes import BUILTINS, adapted, build, fields_of

__all__ = ["builtin_bases", "from_parts", "literals", "qualified", "template"]

_CLASSES = frozenset(BUILTINS.values())

# What repr() makes of strings, bytes, numbers and containers of these: no operator, no name, no escape that Python warns of.
_ESCAPE = r"""\\(?:[\\'"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"""
# (No quote follows: what opens with three of them would be read otherwise by the parser than here.)
_STRING = rf"""b?(?:'(?:[^'\\\n]|{_ESCAPE})*'|"(?:[^"\\\n]|{_ESCAPE})*")(?!['"])"""
_NUMBER = r"-?\d[\d.]{0,400}(?:e[+-]\d{1,3})?(?![\w.])"
_TOKEN = re.compile(rf"\s*(?:{_STRING}|{_NUMBER}|(?:None|True|False)\b|([(\[{{])|([)\]}}])|[,:])\s*")
_MAX_TOKENS = 1000
_MAX_NESTING = 8

_UNICODE = ("encoding", "object", "start", "end", "reason")
_FIELDS: dict[type[Exception], dict[str, tuple[type, ...]]] = {
    OSError: {"errno": (int,), "strerror": (str,), "filename": (str, bytes, int), "filename2": (str, bytes, int)},
    ImportError: {"msg": (str,), "name": (str,), "path": (str,)},
}


def qualified(name: str) -> str:
    """The qualified name of a class that ``repr()`` calls ``name``: builtin exceptions are taken for the builtin ones."""
    known = vars(builtins).get(name)
    return f"builtins.{name}" if isinstance(known, type) and issubclass(known, BaseException) else name


def builtin_bases(kind: type[Exception]) -> Iterator[type[Exception]]:
    """``kind`` and its bases, as far as a remote error may be an instance of them."""
    return (base for base in kind.__mro__ if base in _CLASSES and issubclass(base, Exception))


def literals(text: str) -> tuple[Any, ...] | None:
    """The values in ``text``, which are those of a call's arguments; None unless they are all plain literals.

    Python's parser gets the text only after a look at every token: nothing in it can nest deep, recurse, name anything or warn.
    """
    position = tokens = nesting = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        tokens += 1
        if token is None or tokens > _MAX_TOKENS:
            return None
        nesting += (token[1] is not None) - (token[2] is not None)
        if not 0 <= nesting <= _MAX_NESTING:
            return None
        position = token.end()
    if not text.strip():
        return ()
    try:
        found = ast.literal_eval(f"({text.strip().removesuffix(',')},)")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, tuple) else None


def template(kind: type[Exception], args: tuple[Any, ...]) -> tuple[str, dict[str, Any]] | None:
    """What ``str(kind(*args))`` and the fields of that are, ``args`` being :func:`literals`; None if it can't be made."""
    if issubclass(kind, UnicodeError) and kind is not UnicodeError and _unicode_fields(kind, args) is None:
        return None

    def made() -> tuple[str, dict[str, Any]]:
        exc = kind(*args)
        return str(exc), fields_of(exc)

    return attempt(made, None)


def from_parts(kinds: Iterable[type[Exception]], args: tuple[Any, ...], attributes: dict[Any, Any]) -> RemoteError | None:
    """An instance of RemoteError and of the first of ``kinds`` for which that is possible; None if it is for none.

    Args:
        kinds: classes from the table of builtin ones.
        args: the exception's arguments.
        attributes: its fields and the content of its ``__dict__``; what does not fit is left out.
    """
    for kind in kinds:
        cls = adapted(kind)
        fields = _checked(kind, args, attributes)
        if cls is None or fields is None:
            continue
        state = {
            name: item
            for name, item in attributes.items()
            # Not what the class itself means by a name: __notes__, a method, the fields checked above.
            if isinstance(name, str) and name.isidentifier() and not name.startswith("_") and not hasattr(cls, name)
        }
        made = attempt(partial(build, cls, args, fields, state), None)
        if isinstance(made, RemoteError):
            return made
    return None


def _checked(kind: type[Exception], args: tuple[Any, ...], attributes: dict[Any, Any]) -> dict[str, Any] | None:
    """The fields in C that an instance of ``kind`` may safely have; None if there can't be one without some that are missing."""
    if issubclass(kind, UnicodeError):
        return {} if kind is UnicodeError else _unicode_fields(kind, args)
    if issubclass(kind, SyntaxError):
        return _syntax_fields(attributes)
    for base, wanted in _FIELDS.items():
        if issubclass(kind, base):
            return {name: attributes[name] for name, types in wanted.items() if type(attributes.get(name)) in types}
    return {}


def _unicode_fields(kind: type[Exception], args: tuple[Any, ...]) -> dict[str, Any] | None:
    # The text of such an error is made in C from the object and the positions, which some versions of Python read unchecked.
    names = _UNICODE[1:] if issubclass(kind, UnicodeTranslateError) else _UNICODE
    if len(args) != len(names):
        return None
    fields = dict(zip(names, args, strict=True))
    data, start, end = fields["object"], fields["start"], fields["end"]
    good = (
        type(fields.get("encoding", "")) is str
        and type(data) is (bytes if issubclass(kind, UnicodeDecodeError) else str)
        and type(start) is int
        and type(end) is int
        and 0 <= start <= end <= len(data)
        and type(fields["reason"]) is str
    )
    return fields if good else None


def _syntax_fields(attributes: dict[Any, Any]) -> dict[str, Any]:
    # Printed with the source line and a row of carets as long as the offsets say.
    fields = {name: attributes[name] for name in ("msg", "filename", "text") if type(attributes.get(name)) is str}
    width = len(fields.get("text", "")) + 1
    for name, most in (("lineno", 2**31), ("end_lineno", 2**31), ("offset", width), ("end_offset", width)):
        value = attributes.get(name)
        if type(value) is int and -1 <= value <= most:
            fields[name] = value
    return fields
