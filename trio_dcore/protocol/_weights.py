"""How much work it is to serialize a value, estimated; so that much of it can be done elsewhere (wire document, section 5.9).

What counts are bytes that are copied, pickled or compressed.  A contiguous array that isn't compressed is sent as it lies in memory,
and a payload that is passed on as it came: those weigh nothing, whatever their size.  Of a collection some elements stand for all.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable
from itertools import islice
from types import FunctionType
from typing import Any

from ._numpy import bare_numpy
from ._types import Pickled, Serialize, Serialized, ToPickle

__all__ = ["weight"]

# Elements of a collection that are looked at, and values in all.
_SAMPLE = 16
_MOST_VALUES = 1000
# Of an integer, a date and the like.
_SMALL = 8

_COLLECTIONS: tuple[type, ...] = (list, tuple, dict, set, frozenset)
_PASSED_ON = frozenset({Serialized, Pickled})
_WRAPPERS = frozenset({Serialize, ToPickle})
_BUFFERS = frozenset({bytes, bytearray, memoryview, array})


def weight(value: object, most: float, compressed: bool) -> int:
    """Bytes of work that a value is, about; once they are more than ``most`` it may be any number above that.

    Nothing of the value is run but what tells its size.

    Args:
        value: what is to be serialized; or a wrapper with it.
        most: where to stop counting.
        compressed: its payload frames are compressed, if that pays.
    """
    total = 0.0
    left = _MOST_VALUES
    stack: list[tuple[Any, float]] = [(value, 1.0)]  # and how many each stands for
    while stack and left and total <= most:
        left -= 1
        item, times = stack.pop()
        kind = type(item)
        if kind in _WRAPPERS:
            stack.append((item.data, times))
        elif isinstance(item, _COLLECTIONS):
            size, sample = _sampled(item)
            stack += [(each, times * size / len(sample)) for each in sample]
        elif kind in _BUFFERS:
            if compressed:
                total += times * memoryview(item).nbytes
        elif kind is str:
            total += times * len(item)
        elif kind not in _PASSED_ON:
            own, parts = _object(item, compressed)
            total += times * own
            stack += [(part, times) for part in parts]
    return int(total)


def _sampled(collection: Any) -> tuple[int, list[Any]]:
    """How many elements there are, and some of them; of a subclass, too, without running what it may have of its own."""
    base: Any = next(base for base in _COLLECTIONS if isinstance(collection, base))
    elements = dict.values(collection) if base is dict else base.__iter__(collection)
    return base.__len__(collection), list(islice(elements, _SAMPLE))


def _object(value: Any, compressed: bool) -> tuple[int, Iterable[Any]]:
    """Bytes of an object that is none of the above, and those of its parts that are still to be counted."""
    if bare_numpy(value):
        return (0 if value.flags.forc and not compressed else int(value.nbytes)), ()
    kind = type(value)
    if hasattr(kind, "nbytes"):  # arrays of all kinds have it
        return _asked(lambda: value.nbytes), ()
    if type(kind.__sizeof__) is FunctionType:  # pandas has one
        return _asked(lambda: sys.getsizeof(value)), ()
    attributes = getattr(value, "__dict__", None)
    return _SMALL, list(islice(attributes.values(), _SAMPLE)) if type(attributes) is dict else ()


def _asked(size: Callable[[], object]) -> int:
    # Whoever can't say how large he is fails, if at all, when he is serialized:
    # there is somebody then who can be told.
    try:
        found = size()
    except Exception:
        return _SMALL
    return found if type(found) is int and found > 0 else _SMALL
