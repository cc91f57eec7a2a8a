"""What is going on, for somebody who waits at a terminal: one line on stderr that is written over and removed at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

__all__ = ["shown_progress", "size"]

# What is over sooner needs no line, and nobody reads faster than this.
_PATIENCE = 1.0
_INTERVAL = 0.2


def size(count: int) -> str:
    """Return a number of bytes as people read it: ``"12.3 MiB"``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


@asynccontextmanager
async def shown_progress(describe: Callable[[float], str], *, wanted: bool) -> AsyncIterator[None]:
    """While the block runs, show what ``describe`` says.

    Args:
        describe: given the seconds since the beginning, says in a few words what is going on.
        wanted: whether the output leaves room for it; it is also not shown where stderr is no terminal, or one that can't remove a line.
    """
    if not (wanted and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"):
        yield
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_show, describe)
        yield
        nursery.cancel_scope.cancel()


def _width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


async def _show(describe: Callable[[float], str]) -> None:
    began = trio.current_time()
    await trio.sleep(_PATIENCE)
    try:
        while True:
            # Return to the beginning of the line, and remove what stood behind.
            # A line that goes on in the next one could not be written over.
            sys.stderr.write(f"\r\x1b[K{describe(trio.current_time() - began)[: _width() - 1]}")
            sys.stderr.flush()
            await trio.sleep(_INTERVAL)
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
