"""Log lines that a stranger could cause at any rate, and gets at most one a second of."""

from __future__ import annotations

import math

import trio

__all__ = ["Throttle", "shortened", "shown"]

# Characters of a peer's text in a log line or an error.
_MOST_SHOWN = 200


class Throttle:
    """Says whether a line may be written now, and counts those that may not.

    Args:
        every: seconds between two lines.
    """

    __slots__ = ("_every", "_left_out", "_next")

    def __init__(self, every: float = 1.0) -> None:
        self._every = every
        self._next = -math.inf
        self._left_out = 0

    def due(self) -> str | None:
        """What to end the line with, which may be nothing; None if there is to be no line.  Not a checkpoint."""
        now = trio.current_time()
        if now < self._next:
            self._left_out += 1
            return None
        self._next = now + self._every
        left_out, self._left_out = self._left_out, 0
        return f" (and {left_out} more like this before)" if left_out else ""


def shown(value: object) -> str:
    """A peer's value for a log line or an error, whatever its size: a text shortened, anything else by its type."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]!r}…"
    return f"a {type(value).__name__}"


def shortened(text: str) -> str:
    """A text of ours that has something of a peer's in it, for a log line: short, and on one line."""
    text = repr(text)[1:-1] if not text.isprintable() else text
    return text if len(text) <= 2 * _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…{text[-_MOST_SHOWN:]}"
