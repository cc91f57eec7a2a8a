"""How the command line reads and prints values.

**Reading.** In ``key=value`` the value is JSON if it reads as JSON, and text otherwise: ``n=1`` is a number, ``name=joe`` a text,
``flag=true`` a bool, ``xs=[1,2]`` a list, ``n='"1"'`` the text ``1``.

**Printing.** A value is one line of JSON.  What JSON does not have is shown as an object with one key that begins with ``$``:

====================================  ==========================================
``{"$bytes": "aGVsbG8="}``            bytes and their like, in base64
``{"$set": [1, 2]}``                  set or frozenset, sorted by their JSON
``{"$dict": [[key, value], ...]}``    a dict whose keys are not all text
``{"$float": "nan"}``                 nan, inf and -inf
``{"$repr": "array([1, 2])"}``        anything else, as ``repr()`` shows it
====================================  ==========================================

Tuples are printed as lists, and numpy's scalars as the numbers they are.
"""

from __future__ import annotations

import base64
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from ._errors import USAGE, CliError

__all__ = ["OutputClosed", "parse_arguments", "print_line", "to_json"]


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
        return json.dumps({"$repr": repr(value)}, ensure_ascii=False)


def print_line(text: str) -> None:
    """Print one line at once.

    Raises:
        OutputClosed: nobody reads it any more.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        # The interpreter flushes stdout when it exits, and would complain once more.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        raise OutputClosed from None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
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
    return {"$repr": repr(value)}
