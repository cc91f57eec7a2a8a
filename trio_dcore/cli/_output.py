"""How the command line reads and prints values.

**Reading.** In ``key=value`` the value is JSON if it reads as JSON, and text otherwise: ``n=1`` is a number, ``name=joe`` a text,
``flag=true`` a bool, ``xs=[1,2]`` a list, ``n='"1"'`` the text ``1``.

**Printing.** A value is one line of JSON.  What JSON does not have is shown as an object with one key that begins with ``$``:

====================================  ==========================================
``{"$bytes": "aGVsbG8="}``            bytes and their like, in base64
``{"$set": [1, 2]}``                  set or frozenset, sorted by their JSON
``{"$dict": [[key, value], ...]}``    a dict whose keys are not all text
``{"$float": "nan"}``                 nan, inf and -inf
``{"$int": "0x1f..."}``               a whole number too long for Python to write in decimal
``{"$repr": "array([1, 2])"}``        anything else, as ``repr()`` shows it
====================================  ==========================================

Tuples are printed as lists, and numpy's scalars as the numbers they are.  Whatever could move the cursor or change the order of what
stands there, and what the encoding of the output does not have, is written as JSON's ``\\uXXXX``: it is the same to a program.

**Tables** (``--format table``) are for eyes.  A dict is a line for each key; a list of dicts is a line for each dict below a line of
the keys; any other list is a line for each member.  Text is shown as it is, and everything else as JSON.
"""

from __future__ import annotations

import base64
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from ._errors import FAILED, USAGE, CliError, one_line

__all__ = ["OutputClosed", "RowPrinter", "parse_arguments", "print_line", "print_value", "to_json"]


# Bits of the longest number that is printed in decimal.  Python refuses above 4300 digits, since the time it takes grows with their square.
_MOST_BITS = 14_000


class OutputClosed(Exception):
    """Whoever read our output has gone, as ``head`` does."""


def parse_arguments(words: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` words.

    Raises:
        CliError: a word that is none, or a key that was given before.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise CliError(f"{word!r}: arguments are written KEY=VALUE", USAGE)
        if key in arguments:
            raise CliError(f"argument {key!r} is given twice", USAGE)
        try:
            arguments[key] = json.loads(value)
        except (ValueError, RecursionError):
            arguments[key] = value
    return arguments


def to_json(value: Any) -> str:
    """Return a value as one line of JSON, by the rules above."""
    try:
        return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)
    except RecursionError:  # too deep, or it contains itself
        return json.dumps(_repr(value), ensure_ascii=False)


def print_value(value: Any, form: str) -> None:
    """Print a value that is complete.

    Args:
        value: what a handler returned.
        form: ``"json"`` or ``"table"``.

    Raises:
        OutputClosed: nobody reads it any more.
    """
    if form == "json":
        print_line(to_json(value))
    elif _is_record(value):
        _print_columns([[key, _cell(item)] for key, item in value.items()])
    elif isinstance(value, (list, tuple)) and value and all(map(_is_record, value)):
        keys = list(dict.fromkeys(key for record in value for key in record))
        _print_columns([keys, *([_cell(record[key]) if key in record else "" for key in keys] for record in value)])
    elif isinstance(value, (list, tuple)):
        for item in value:
            print_line(_cell(item))
    else:
        print_line(_cell(value))


class RowPrinter:
    """Print values one after the other, as they come.

    Args:
        form: ``"json"`` or ``"table"``.  In a table the columns are as wide as the first row needs; dicts with other keys than those
            before them begin a new table.
    """

    def __init__(self, form: str) -> None:
        self._form = form
        self._keys: list[str] | None = None
        self._widths: list[int] = []

    def print(self, value: Any) -> None:
        """Print one value.

        Raises:
            OutputClosed: nobody reads it any more.
        """
        if self._form == "json":
            print_line(to_json(value))
        elif not _is_record(value):
            self._keys = None
            print_line(_cell(value))
        else:
            cells = [_cell(item) for item in value.values()]
            if self._keys != list(value):
                self._keys = list(value)
                self._widths = [max(len(key), len(cell)) for key, cell in zip(self._keys, cells, strict=True)]
                print_line(_row(self._keys, self._widths))
            print_line(_row(cells, self._widths))


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(type(key) is str for key in value)


def _cell(value: Any) -> str:
    return one_line(value) if isinstance(value, str) else to_json(value)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(one_line(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print_line(_row(row, widths))


def print_line(text: str) -> None:
    """Print one line at once.

    Raises:
        OutputClosed: nobody reads it any more.
        CliError: there is nothing to write to, or no room.
    """
    if sys.stdout is None:
        raise CliError("there is no standard output to print to", FAILED)
    try:
        print(_shown(text, sys.stdout.encoding or "utf-8"), flush=True)
    except OSError as error:
        # The interpreter flushes stdout when it exits, and would complain once more.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        if isinstance(error, BrokenPipeError):
            raise OutputClosed from None
        raise CliError(f"the output can't be written: {error}", FAILED) from error


def _shown(text: str, encoding: str) -> str:
    strange = [c for c in set(text) if c != "\n" and not (c.isprintable() and _encodable(c, encoding))]
    return text.translate({ord(c): json.dumps(c)[1:-1] for c in strange}) if strange else text


def _encodable(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= _MOST_BITS else {"$int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        if all(type(key) is str for key in value):
            return {key: _plain(item) for key, item in value.items()}
        return {"$dict": [[_plain(key), _plain(item)] for key, item in value.items()]}
    if isinstance(value, (set, frozenset)):
        return {"$set": sorted(map(_plain, value), key=lambda item: json.dumps(item, sort_keys=True))}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"$bytes": base64.b64encode(value).decode()}
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        scalar = value.item()
        if type(scalar) is not type(value):
            return _plain(scalar)
    return _repr(value)


def _repr(value: Any) -> dict[str, str]:
    try:
        shown = repr(value)
    except Exception as error:
        shown = f"<{type(value).__qualname__}, whose repr() raised {type(error).__name__}>"
    return {"$repr": shown}
