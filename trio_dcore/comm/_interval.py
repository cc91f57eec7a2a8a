"""Intervals of time as Dask's users write them."""

from __future__ import annotations

import math
import re

__all__ = ["parse_interval"]

_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_TEXT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-zµ]+)\s*")


def parse_interval(interval: float | str) -> float:
    """Seconds, from a number of them or a text with a unit, such as "2ms"."""
    seconds: float
    if isinstance(interval, str):
        found = _TEXT.fullmatch(interval)
        if found is None or found[2] not in _UNITS:
            # Dask takes a bare number for milliseconds, everything here takes one for seconds: no guess is made.
            raise ValueError(f"interval={interval!r}: give seconds as a number, or a text with a unit, such as '2ms'")
        seconds = float(found[1]) * _UNITS[found[2]]
    else:
        seconds = interval
    if not 0 <= seconds < math.inf:
        raise ValueError(f"interval={interval!r}: must be finite and not negative")
    return seconds
