"""How much memory something takes: of the process, or of Python's objects."""

from __future__ import annotations

import ctypes
import gc
import re
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trio_dcore.protocol import MiB

__all__ = ["Peak", "objects", "resident"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Peak:
    """The most that there was during a block, beyond what there was before it, in bytes; known behind the block."""

    def __init__(self) -> None:
        self.bytes = 0

    def __repr__(self) -> str:
        return f"{self.bytes / MiB:.1f} MiB"


@contextmanager
def resident() -> Iterator[Peak]:
    """Watch the memory that the process has in use, as the system counts it (Linux).

    Client and server are both in it, so what is bounded here is bounded at each of them.
    """
    _give_back()
    try:
        _CLEAR.write_text("5")  # man 5 proc: the peak is what there is now
    except OSError:
        pytest.skip("the system doesn't tell how much memory has been in use at most")
    before = _field("VmRSS")
    peak = Peak()
    yield peak
    peak.bytes = _field("VmHWM") - before


def _field(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _give_back() -> None:
    """What nobody uses goes back to the system, so that it is counted when it is used again."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


@contextmanager
def objects() -> Iterator[Peak]:
    """Watch what Python allocates, to the byte; what maps memory by itself is not in it."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        peak = Peak()
        yield peak
        peak.bytes = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
