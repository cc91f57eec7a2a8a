"""How much work it is to serialize a value, estimated."""

from __future__ import annotations

import datetime
import math
import sys
from array import array
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest

from trio_dcore.protocol import EncodeContext, Encoder, Pickled, Serialize, Serialized, ToPickle
from trio_dcore.protocol._errors import TooHeavy
from trio_dcore.protocol._weights import weight

MB = 1_000_000


class Sized:
    def __init__(self, nbytes: Any) -> None:
        self.nbytes = nbytes


class SizedByClass:
    nbytes: Any = MB


class Asked:
    @property
    def nbytes(self) -> Any:
        raise RuntimeError("it doesn't know")


class Telling:
    def __sizeof__(self) -> int:
        return MB


class Holder:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


Point = namedtuple("Point", "x y")
HEAVY = SizedByClass()


def weigh(value: object, *, compressed: bool = False) -> int:
    return weight(value, math.inf, compressed)


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(MB),
        np.asfortranarray(np.zeros((1000, 1000))),
        np.ma.masked_array(np.zeros(MB)),
        bytes(MB),
        bytearray(MB),
        memoryview(bytes(MB)),
        array("d", bytes(MB)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_memory_weighs_if_it_is_compressed(value: Any) -> None:
    size = memoryview(value).nbytes
    for wrapped in (value, Serialize(value), Serialize([value]), ToPickle({"a": value}), Holder(a=value)):
        assert weigh(wrapped) < 100
        assert size <= weigh(wrapped, compressed=True) <= 2 * size + 100


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((2000, 1000))[:, ::2],  # is copied
        np.array(["x"] * (MB // 8), dtype=object),  # is pickled
        HEAVY,
        Serialize(HEAVY),
        ToPickle(Serialize(HEAVY)),
        [HEAVY],
        (1, (2, [HEAVY])),
        {"a": {"b": HEAVY}},
        frozenset([HEAVY]),
        {HEAVY},
        OrderedDict(a=HEAVY),
        defaultdict(list, a=[HEAVY]),
        Point(1, HEAVY),
        Holder(a=Holder(b=[HEAVY])),
        Telling(),
        "x" * MB,
        [HEAVY, *[0] * 15],
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_weighs(value: Any) -> None:
    assert MB <= weigh(value) <= 8 * MB + 1000


@pytest.mark.parametrize(
    "value",
    [
        1,
        None,
        datetime.datetime(2026, 1, 1),
        Serialized({"serializer": "pickle"}, [bytes(MB)]),
        Pickled({}, [bytes(MB)]),
        Serialize(Serialized({}, [bytes(MB)])),
        Asked(),
        Sized(MB),  # an attribute of the instance is no array's
        [],
        {},
        object,
        sys,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_does_not(value: Any) -> None:
    assert weigh(value) < 10_000


def test_some_elements_stand_for_all() -> None:
    assert weigh([SizedByClass()] * 1000) == 1000 * MB
    assert weigh({n: [SizedByClass()] * 10 for n in range(100)}) == 1000 * MB


def test_it_stops_where_that_is_enough_and_where_it_has_looked_at_enough() -> None:
    looked: list[int] = []

    class Looked:
        @property
        def nbytes(self) -> int:
            looked.append(1)
            return 10

    assert weight([Looked() for _ in range(16)], 25, False) > 25
    assert len(looked) == 3
    looked.clear()
    tree: Any = Looked()
    for _ in range(5):
        tree = [tree] * 16
    weigh(tree)
    assert 0 < len(looked) <= 1000


def test_what_contains_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert weigh(loop) < 1000
    holder = Holder()
    holder.me = holder
    weigh(holder)


def test_a_size_that_is_none() -> None:
    for nbytes in (None, "x", -1, 1.5, True):
        SizedByClass.nbytes = nbytes
        try:
            assert weigh(SizedByClass()) < 100
        finally:
            SizedByClass.nbytes = MB


def test_subclasses_are_not_run() -> None:
    class Strange(dict[Any, Any]):
        def values(self) -> Any:
            raise AssertionError

        def __len__(self) -> int:
            raise AssertionError

    assert weigh(Strange(a=HEAVY)) == MB


class TestEncoder:
    def test_the_values_of_a_message_add_up(self) -> None:
        encoder = Encoder(EncodeContext(offload=2 * MB))
        message = {"a": ToPickle(Holder(a="x" * MB)), "b": [ToPickle("y" * (MB - 1000))]}
        assert len(encoder.encode(message)) == 3
        with pytest.raises(TooHeavy):
            encoder.encode({**message, "c": ToPickle("x" * 2000)})
        assert len(encoder.encode(message)) == 3

    def test_plain_values_do_not_count(self) -> None:
        encoder = Encoder(EncodeContext(offload=0))
        message = {"a": bytes(MB), "b": ["x" * MB], "c": [0] * MB}
        assert len(encoder.encode(message)) == 1
        with pytest.raises(TooHeavy):
            encoder.encode({**message, "d": 2**70})

    def test_without_a_number_nothing_is_too_much(self) -> None:
        assert len(Encoder(EncodeContext()).encode(ToPickle("x" * MB))) == 2
