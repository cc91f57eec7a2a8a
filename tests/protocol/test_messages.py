"""Messages both ways, between ours and with stock Dask: every row of the wire document's table (section 5.1), and random ones."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import uuid
from collections import OrderedDict, defaultdict, namedtuple
from decimal import Decimal
from typing import Any

import distributed.protocol as stock
import msgpack
import numpy as np
import pytest
from distributed.core import Status, error_message
from distributed.protocol.serialize import Serialized as StockSerialized
from distributed.protocol.serialize import ToPickle as StockToPickle
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_dcore.protocol import DecodeContext, EncodeContext, Pickled, Serialize, Serialized, ToPickle
from trio_dcore.protocol._markers import RESERVED
from trio_dcore.protocol._messages import Decoder, Encoder, dumps, loads

OURS = EncodeContext(extensions=True, allow_pickle=lambda: False)
STRANGE = DecodeContext(allow_pickle=lambda: False)

Point = namedtuple("Point", "x y")


class Number(enum.IntEnum):
    ONE = 1


class Word(enum.StrEnum):
    YES = "yes"


class Colour(enum.Enum):
    RED = 1


def function(x: int) -> int:
    return x + 1


#: (what is sent, what arrives from stock and at stock)
NATIVE = [
    (None, None),
    (True, True),
    (0, 0),
    (2**64 - 1, 2**64 - 1),
    (-(2**63), -(2**63)),
    (1.5, 1.5),
    (float("inf"), float("inf")),
    ("", ""),
    ("Ünïcödé \U0001f600", "Ünïcödé \U0001f600"),
    (b"\x00\xff", b"\x00\xff"),
    (bytearray(b"x"), b"x"),
    (memoryview(b"x"), b"x"),
    ([1, [2]], (1, (2,))),
    ((1, (2,)), (1, (2,))),
    (Point(1, 2), (1, 2)),
    ({}, {}),
    ({"a": 1, 2: "b", None: 3, 1.5: 4, b"c": 5, (1, ("d",)): 6}, {"a": 1, 2: "b", None: 3, 1.5: 4, b"c": 5, (1, ("d",)): 6}),
    (OrderedDict(a=1), {"a": 1}),
    (defaultdict(list, a=[1]), {"a": (1,)}),
    ({1, "a", (2, 3)}, {1, "a", (2, 3)}),
    (set(), set()),
    (Number.ONE, 1),
    (Word.YES, "yes"),
    (np.float64(1.5), 1.5),
    (np.str_("x"), "x"),
    (np.bytes_(b"x"), b"x"),
]
PICKLED = [
    frozenset({1, 2}),
    dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
    Decimal("1.50"),
    1 + 2j,
    np.int64(1),
    np.bool_(True),
    uuid.UUID(int=5),
    function,
    dt.timedelta(1),
    range(3),
]


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize(("value", "want"), NATIVE, ids=lambda value: type(value).__name__)
def test_native_values(value: Any, want: Any) -> None:
    message = {"op": "x", "data": [value]}
    for ctx in (EncodeContext(), EncodeContext(allow_pickle=lambda: False), OURS):
        frames = dumps(message, ctx)
        assert frames == stock.dumps(message)
        assert same(stock.loads(frames)["data"][0], want)
        for extensions in (True, False):
            assert same(loads(frames, STRANGE, extensions=extensions)["data"][0], want)
            decoder = Decoder(STRANGE, extensions=extensions)
            if not decoder.has_markers(frames):
                assert same(decoder.head(frames[0])["data"][0], want)


@pytest.mark.parametrize("value", PICKLED, ids=lambda value: type(value).__name__)
def test_objects(value: Any) -> None:
    message = {"op": "x", "data": [value], "more": value}
    ours = dumps(message)
    theirs = stock.dumps(message)
    assert [bytes(frame) for frame in ours] == [bytes(memoryview(frame)) for frame in theirs]
    for frames in (ours, theirs):
        for read in (stock.loads, loads):
            back = read(frames)
            assert same(back["data"][0], value)
            assert same(back["more"], value)


@pytest.mark.parametrize("value", [dt.date(2024, 1, 1), ("a", np.int64(3)), Status.running, frozenset({1})], ids=str)
def test_objects_as_keys(value: Any) -> None:
    message = {"op": "x", "data": {value: 1}}
    for frames in (dumps(message), stock.dumps(message)):
        for read in (stock.loads, loads):
            assert [str(key) for key in read(frames)["data"]] == [str(value)]
        assert Decoder(STRANGE).head(frames[0])["op"] == "x"


def test_an_enum_of_ones_own() -> None:
    """Stock writes it as a marker that its own receiver refuses; ours arrives everywhere."""
    frames = dumps({"data": Colour.RED})
    assert stock.loads(frames) == loads(frames) == {"data": Colour.RED}


def test_bare_arrays() -> None:
    message = {"data": [np.arange(6).reshape(2, 3)]}
    for frames in (dumps(message), stock.dumps(message)):
        for read in (stock.loads, loads):
            assert (read(frames)["data"][0] == np.arange(6).reshape(2, 3)).all()


def test_status() -> None:
    (frame,) = dumps({"status": Status.closed})
    assert [frame] == stock.dumps({"status": Status.closed})
    assert stock.loads([frame]) == {"status": Status.closed}
    assert loads([frame])["status"].name == "closed"


@pytest.mark.parametrize(
    "data", [b"x", np.arange(3), [1, b"x"], {"a": np.arange(2)}, Colour.RED, 2**80], ids=lambda v: type(v).__name__
)
def test_wrappers(data: Any) -> None:
    ours = dumps([Serialize(data), {"k": ToPickle(data)}])
    theirs = stock.dumps([stock.to_serialize(data), {"k": StockToPickle(data)}])
    assert [bytes(memoryview(frame)) for frame in ours] == [bytes(memoryview(frame)) for frame in theirs]
    for read in (stock.loads, loads):
        serialized, pickled = read(theirs)
        assert repr(serialized) == repr(pickled["k"]) == repr(data)


def test_parts_pass_untouched_both_ways() -> None:
    theirs = stock.dumps({"a": stock.to_serialize([np.arange(3), Colour.RED])})
    opaque = loads(theirs, DecodeContext(deserialize=False))
    assert type(opaque["a"]) is Serialized
    assert [bytes(memoryview(frame)) for frame in dumps(opaque)] == [bytes(memoryview(frame)) for frame in theirs]
    stock_opaque = stock.loads(dumps({"a": Serialize([np.arange(3), Colour.RED])}), deserialize=False)
    assert type(stock_opaque["a"]) is StockSerialized
    assert loads(stock.dumps(stock_opaque))["a"][1] is Colour.RED


def test_a_pickle_with_buffers_out_of_band() -> None:
    data = {"array": np.arange(1000)}
    for frames in (dumps(ToPickle(data)), stock.dumps(StockToPickle(data))):
        assert len(frames) == 3
        for read in (stock.loads, loads):
            assert (read(frames)["array"] == data["array"]).all()
    again = dumps(Pickled(*_pickled_parts(data)))
    assert (stock.loads(again)["array"] == data["array"]).all()


def _pickled_parts(data: object) -> tuple[dict[str, Any], list[Any]]:
    _, header, *frames = dumps(ToPickle(data))
    return msgpack.unpackb(header), frames


def test_an_error_reply_of_stock() -> None:
    try:
        raise ValueError("over there")
    except ValueError as exc:
        frames = stock.dumps(error_message(exc))
    reply = loads(frames, STRANGE)
    assert reply["status"] == "error"
    assert type(reply["exception"]) is bytes
    assert reply["exception_text"] == "ValueError('over there')"


# -- random messages -------------------------------------------------------------------------------------------------------------

KEYS = st.text(max_size=3) | st.sampled_from(sorted(RESERVED)) | st.integers() | st.none() | st.binary(max_size=3)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
SAFE = (
    st.integers()
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.dates()
    | st.times(timezones=st.none() | st.just(dt.UTC))
    | st.datetimes(timezones=st.none() | st.timezones(), allow_imaginary=False)
    | st.timedeltas()
    | st.integers(-128, 127).map(np.int8)
    | st.floats(width=32, allow_nan=False).map(np.float32)
)
HASHABLE = st.recursive(
    PLAIN | SAFE,
    lambda inner: st.lists(inner, max_size=2).map(tuple) | st.frozensets(inner, max_size=2),
    max_leaves=4,
)


def messages(
    leaves: st.SearchStrategy[Any], hashable: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]
) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=3)
            | st.sets(hashable, max_size=3)
        ),
        max_leaves=12,
    )


def arrived(value: Any) -> Any:
    """What a message is after a journey: its lists are tuples."""
    if isinstance(value, dict):
        return {key: arrived(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(arrived, value))
    return value


@settings(max_examples=300)
@given(messages(PLAIN | SAFE | HASHABLE, HASHABLE, KEYS | HASHABLE))
def test_between_ours_without_a_pickle(message: Any) -> None:
    with decimal.localcontext() as context:
        context.traps[decimal.FloatOperation] = False
        frames = dumps(message, OURS)
        assert len(frames) == 1
        decoder = Decoder(STRANGE, extensions=True)
        back = decoder.resolve(frames)
        assert back == arrived(message)
        head = decoder.head(frames[0])
        if not decoder.has_markers(frames):
            assert head == back


@settings(max_examples=150)
@given(messages(PLAIN | SAFE, HASHABLE, KEYS | HASHABLE))
def test_to_stock_with_pickles(message: Any) -> None:
    frames = dumps(message)
    back = stock.loads(frames)
    assert arrived(back) == arrived(message)
    assert arrived(loads(frames)) == arrived(message)
    Decoder(STRANGE).head(frames[0])


@settings(max_examples=150)
@given(messages(PLAIN, PLAIN, PLAIN.filter(lambda key: key not in RESERVED)))
def test_plain_messages_are_stocks_bytes(message: Any) -> None:
    frames = dumps(message, OURS)
    assert frames == dumps(message) == stock.dumps(message)
    assert loads(frames, STRANGE) == stock.loads(frames) == arrived(message)


@settings(max_examples=50)
@given(messages(PLAIN | st.binary(max_size=50).map(Serialize) | st.integers().map(ToPickle), PLAIN, st.text(max_size=3)))
def test_one_encoder_serves_many_messages(message: Any) -> None:
    encoder = Encoder(EncodeContext())
    first = encoder.encode(message)
    assert encoder.encode(message) == first == dumps(message)
