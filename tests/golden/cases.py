"""The values whose encoding by a stock peer is recorded in this directory.

Read by ``record.py``, which has the real ``distributed`` write them, and by the tests, which read and rewrite what it wrote.  So
nothing here may import either: what differs between the two is passed in as ``api``, with the names ``Serialize``, ``ToPickle``,
``Status`` and so on.

Pickles refer to the standard library and to numpy only, so that they can be loaded anywhere.
"""

from __future__ import annotations

import datetime
import decimal
import fractions
import pathlib
import uuid
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NESTED = np.dtype([("a", "<i4"), ("b", "<f8", (2,)), ("n", [("z", ">u2"), ("q", "<m8[3D]"), ("u", "<U2")])])
TEXT = b"Grace is a deadline on the handlers' nursery. " * 400  # 18 800 bytes: compression begins at 10 000
ARRAY = np.arange(12, dtype="<i4").reshape(3, 4)


def read_only(values: Any) -> Any:
    values.flags.writeable = False
    return values


@dataclass(frozen=True)
class Case:
    """One message.

    Args:
        name: also the file's name.
        description: what it shows.
        message: the message as it is sent.
        value: the message as it arrives, wrappers gone; the same as ``message`` if not given.
        context: what the two peers negotiated, and the shard size.
        exact: our encoder must write the same bytes: "yes", "versions" (if the versions of Python and numpy are those of the
            recording: there are pickles in it) or "no" (it is written differently on purpose, or depends on chance).
        trust: reading it takes a pickle.
    """

    name: str
    description: str
    message: Callable[[Any], Any]
    value: Callable[[], Any] | None = None
    context: dict[str, Any] = field(default_factory=dict)
    exact: str = "yes"
    trust: bool = False


def plain(name: str, description: str, value: Any, **more: Any) -> Case:
    return Case(name, description, lambda api: value, lambda: value, **more)


def wrapped(name: str, description: str, value: Any, **more: Any) -> Case:
    """``{"op": "put", "data": to_serialize(value), "reply": True}``"""
    return Case(
        name,
        description,
        lambda api: {"op": "put", "data": api.Serialize(value), "reply": True},
        lambda: {"op": "put", "data": value, "reply": True},
        **more,
    )


def pickled(name: str, description: str, value: Any, *, exact: str = "versions", **more: Any) -> Case:
    """A bare value, which stock pickles for want of another form."""
    return plain(name, description, {"value": value}, trust=True, exact=exact, **more)


CASES = [
    # -- frame 0 (wire document, section 5.1) --
    plain("none", "the shortest message: a reply of None", None),
    plain(
        "scalars",
        "numbers, texts, bytes",
        {
            "none": None,
            "true": True,
            "int": 5,
            "negative": -(2**63),
            "large": 2**64 - 1,
            "float": 1.5,
            "inf": float("inf"),
            "str": "Grüße",
            "bytes": b"\x00\xff",
            "empty": "",
        },
    ),
    Case(
        "bytes-likes",
        "bytearray and memoryview arrive as bytes",
        lambda api: [bytearray(b"abc"), memoryview(b"def")],
        lambda: (b"abc", b"def"),
    ),
    Case("lists", "lists arrive as tuples", lambda api: [[1, [2, []]], (3,)], lambda: ((1, (2, ())), (3,))),
    plain("keys", "dict keys of every kind that msgpack has", {"s": 1, 2: 2, 1.5: 3, None: 4, b"b": 5, (1, "x"): 6, True: 7}),
    plain("set", "a set of one, whose order is no question", {"s": {"a"}, "empty": set()}),
    Case("enum", "an enum member", lambda api: {"status": api.Status.running}),
    Case("numpy-float", "np.float64 is a float", lambda api: {"x": np.float64(0.5)}, lambda: {"x": 0.5}),
    Case(
        "request",
        "a request",
        lambda api: {"op": "add", "x": 1, "y": 2, "reply": True},
        lambda: {"op": "add", "x": 1, "y": 2, "reply": True},
    ),
    # -- bare objects (section 5.3) --
    pickled("frozenset", "a frozenset of one", frozenset({"a"})),
    pickled("datetime", "date and time", datetime.datetime(2020, 1, 2, 3, 4, 5, 6, datetime.UTC)),
    pickled("decimal", "Decimal", decimal.Decimal("1.50")),
    pickled("fraction", "Fraction", fractions.Fraction(1, 3)),
    pickled("complex", "complex", 1 + 2j),
    pickled("uuid", "UUID", uuid.UUID(int=5)),
    pickled("path", "a path", pathlib.PurePosixPath("/a/b")),
    pickled("function", "a function by reference", len),
    pickled("numpy-int", "np.int64", np.int64(5)),
    # Ours go as the dask family, which stock reads as well and which needs no trust.
    pickled("bare-array", "a bare array: pickled, with an out-of-band buffer", np.arange(5), exact="no"),
    Case(
        "to-pickle",
        "ToPickle, with two buffers",
        lambda api: {"d": api.ToPickle({"k": (1, 2), "a": [np.arange(3), np.ones(2)]}), "s": {1}},
        lambda: {"d": {"k": (1, 2), "a": [np.arange(3), np.ones(2)]}, "s": {1}},
        exact="versions",
        trust=True,
    ),
    # -- Serialize: bytes and relatives (section 5.4) --
    wrapped("bytes", "bytes", b"abc"),
    wrapped("bytearray", "bytearray", bytearray(b"abc")),
    wrapped("memoryview", "a memoryview of ints, two-dimensional", memoryview(b"abcdefgh").cast("i", (2, 1))),
    wrapped("array", "array.array", array("d", [1, 2])),
    wrapped("pickle-family", "a value by the pickle family", decimal.Decimal("1.50"), exact="versions", trust=True),
    wrapped(
        "pickle-buffers",
        "arrays inside an object: out-of-band, one of them read-only",
        {"z": 1, "a": [1, np.arange(3), read_only(np.arange(2))]},
        exact="versions",
        trust=True,
    ),
    wrapped(
        "pickle-protocol-4",
        "the same with protocol 4 negotiated: all in one frame",
        {"z": 1, "a": [1, np.arange(3)]},
        context={"pickle-protocol": 4},
        exact="versions",
        trust=True,
    ),
    # -- numpy (section 5.5) --
    wrapped("numpy", "an array in C order", np.arange(3)),
    wrapped("numpy-fortran", "Fortran order", np.asfortranarray(ARRAY)),
    wrapped("numpy-strided", "a view that is not contiguous", ARRAY[::2, ::2]),
    wrapped("numpy-broadcast", "axes that repeat one item", np.broadcast_to(np.arange(3), (4, 3))),
    wrapped("numpy-0d", "no dimensions", np.array(5)),
    wrapped("numpy-empty", "no items", np.empty((0, 3))),
    wrapped("numpy-read-only", "not writeable", read_only(np.arange(3))),
    wrapped("numpy-big-endian", "the other byte order", np.arange(3, dtype=">i4")),
    wrapped("numpy-dates", "datetime64", np.array(["2020-01-01", "NaT"], "M8[D]")),
    wrapped("numpy-text", "fixed-width text", np.array(["ab", "c"])),
    wrapped(
        "numpy-structured",
        "a structured dtype, which travels as a pickle and is read without unpickling",
        np.zeros(2, NESTED),
        exact="versions",
    ),
    wrapped(
        "numpy-structured-4",
        "the same with protocol 4 negotiated",
        np.zeros(2, NESTED),
        context={"pickle-protocol": 4},
        exact="versions",
    ),
    wrapped("numpy-void", "void items", np.array([b"abcdefghij"], "V10"), exact="versions"),
    wrapped("numpy-objects", "Python objects", np.array([1, "a", None], object), exact="versions", trust=True),
    wrapped("numpy-matrix", "a matrix", np.arange(4).reshape(2, 2).view(np.matrix)),
    wrapped("numpy-masked", "a masked array", np.ma.MaskedArray([1, 2], mask=[0, 1])),
    wrapped(
        "numpy-masked-dates",
        "a masked array with a pickled fill value",
        np.ma.MaskedArray(np.array(["2020-01-01"], "M8[D]"), mask=[1]),
        exact="versions",
    ),
    wrapped("numpy-masked-constant", "np.ma.masked", np.ma.masked),
    # -- collections --
    wrapped("collection", "a dict of arrays and others", {"a": ARRAY, 1: b"x", (1, 2): {"t": (b"y",)}}),
    wrapped(
        "collection-pickles", "a list whose elements are pickled one by one", [1, None, [2, ARRAY]], exact="versions", trust=True
    ),
    wrapped("collection-empty", "collections without elements", [], exact="yes"),
    wrapped("collection-set", "a set", {b"a"}),
    # -- shards --
    wrapped("sharded", "an array in four pieces of at most 30 bytes, cut between items", np.arange(10), context={"shard": 30}),
    wrapped("sharded-collection", "several values, some of them cut", [np.arange(10), b"x" * 50, b"y"], context={"shard": 24}),
    # -- compression (section 5.6) --
    *(
        wrapped(
            f"compressed-{codec}",
            f"a text and an array by {codec}; what is short stays as it is",
            [TEXT, np.zeros(2000), b"short"],
            context={"compression": codec},
            exact="no",
        )
        for codec in ("lz4", "snappy", "zlib", "zstd")
    ),
    wrapped("compressed-shards", "cut first, then compressed", TEXT, context={"compression": "lz4", "shard": 12_000}, exact="no"),
    Case(
        "compressed-pickle",
        "the buffer of a pickled array, compressed",
        lambda api: {"d": api.ToPickle(np.zeros(2000))},
        lambda: {"d": np.zeros(2000)},
        context={"compression": "zlib"},
        exact="no",
        trust=True,
    ),
    # -- several payloads --
    Case(
        "two-payloads",
        "two arrays in one message: the second is not counted in outer (section 2)",
        lambda api: {"a": api.Serialize(np.arange(1000)), "b": api.Serialize(np.arange(1000.0))},
        lambda: {"a": np.arange(1000), "b": np.arange(1000.0)},
    ),
]


# -- handlers of the server in the recorded conversations (here, since their names stand in the tracebacks that are recorded) --


def add(x: Any, y: Any) -> Any:
    return x + y


def fail(x: int) -> None:
    try:
        {}[x]
    except KeyError as exc:
        raise ValueError("no such thing") from exc
