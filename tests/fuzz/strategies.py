"""What hypothesis chooses from, and the settings under which it always chooses the same."""

from __future__ import annotations

import os
from typing import Any

import msgpack
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import WEIRD, Step
from tests.fuzz.seeds import conversations, messages

__all__ = ["SIZES", "conversation", "frames", "some", "values"]

# FUZZ_EXAMPLES=100 takes a hundred times as many examples as the normal run, and others each time.
_MORE = int(os.environ.get("FUZZ_EXAMPLES", "1"))


def some(number: int) -> settings:
    """So many examples: the same ones in every run, without a time limit for each, and without a database."""
    return settings(
        max_examples=number * _MORE,
        derandomize=_MORE == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


_number = st.one_of(st.integers(0, 40), st.integers(0, 2**20))
_steps = st.lists(st.tuples(_number, _number, _number), max_size=5)

#: In which pieces bytes come.
SIZES = st.lists(st.integers(0, 2000), max_size=4)


def frames() -> st.SearchStrategy[tuple[list[bytes], list[Step]]]:
    """The frames of a valid message, and what to do to them."""
    return st.tuples(st.sampled_from(list(messages().values())), _steps)


def conversation() -> st.SearchStrategy[tuple[bytes, list[Step], bool]]:
    """What one side of a valid conversation sends, what to do to it, and whether to leave its first message alone."""
    return st.tuples(st.sampled_from(list(conversations().values())), _steps, st.booleans())


# The keys that mean something to somebody who reads a message.
_KEYS = (
    *("op", "reply", "close", "serializers", "trio-dcore", "id", "deadline", "stream", "window", "version", "features", "pooled"),
    *("compression", "python", "pickle-protocol", "__Set__", "as-list", "__Enum__", "name", "__module__", "__name__"),
    *(
        "__Serialized__",
        "__Pickled__",
        "data",
        "serializer",
        "num-sub-frames",
        "split-num-sub-frames",
        "split-offsets",
        "writeable",
    ),
    *("type", "type-serialized", "sub-header", "sub-headers", "is-collection", "frame-lengths", "key", "pickled-obj", "header"),
    *("dtype", "shape", "strides", "broadcast_to", "pickle", "matrix", "nframes", "data-header", "mask-header", "fill-value"),
    *("format", "typecode", "status", "exception", "traceback", "exception_text", "traceback_text"),
    *("code", "message", "mro", "notes", "args", "attributes", "errors", "reason", "limit", "value", "seen", "field", "path"),
)
_CODES = ("error", "unknown-op", "cancelled", "closing", "overloaded", "not-allowed", "limit", "unsafe", "serialization")
_NAMES = (
    "builtins.OSError",
    "builtins.UnicodeDecodeError",
    "builtins.SyntaxError",
    "builtins.KeyError",
    "builtins.ImportError",
    "x.Y",
)
_REPRS = (
    "ValueError('x')",
    "OSError(2, 'No such file')",
    "KeyError(",
    "X(1, [2], {'a': b'b'})",
    "UnicodeDecodeError('a', b'', 9, -9, '')",
)


def values() -> st.SearchStrategy[Any]:
    """Values as they may come from msgpack, with the names that mean something in all the wrong places."""
    leaves = st.one_of(
        st.sampled_from(WEIRD),
        st.sampled_from((*_KEYS, *_CODES, *_NAMES, *_REPRS, "uncaught-error")),
        st.integers(-3, 12),
        st.integers(-(2**63), 2**64 - 1),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        st.binary(max_size=20),
        st.floats(),
    )
    keys = st.one_of(st.sampled_from(_KEYS), st.integers(-2, 300), st.tuples(st.integers(-2, 0), st.integers(-2, 0)))

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(keys, inner, max_size=6),
            st.dictionaries(st.sampled_from(_KEYS), inner, max_size=8),
            # More keys than are taken on trust, of a kind that can be made to collide.
            st.lists(inner, min_size=17, max_size=24),
            st.builds(
                lambda base, step: {base + step * n: n for n in range(20)}, st.integers(0, 9), st.sampled_from((1, 2**20, 2**40))
            ),
        )

    return st.recursive(leaves, containers, max_leaves=30)


def packed(value: Any) -> bytes:
    """The msgpack of a value, or of its repr() if it has none."""
    try:
        return bytes(msgpack.packb(value))
    except (ValueError, TypeError, OverflowError):  # nested too deeply
        return bytes(msgpack.packb(repr(value)))
