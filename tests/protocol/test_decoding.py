"""Decoding: two phases, markers only where they mean something, and nothing but typed errors from hostile frames."""

from __future__ import annotations

import contextlib
import datetime as dt
import enum
import gc
import mmap
import pickle
import sys
import weakref
import zlib
from collections.abc import Callable
from typing import Any

import distributed.protocol as stock
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_dcore.protocol import (
    DecodeContext,
    EncodeContext,
    LimitExceeded,
    Pickled,
    RemoteProtocolError,
    SerializationError,
    Serialize,
    Serialized,
    ToPickle,
    UnsafePayload,
)
from trio_dcore.protocol._decoding import Decoder
from trio_dcore.protocol._errors import TooHeavy
from trio_dcore.protocol._messages import dumps, loads


def never() -> bool:
    return False


TRUSTED = DecodeContext()
STRANGE = DecodeContext(allow_pickle=never)
OPAQUE = DecodeContext(deserialize=False)


class Colour(enum.Enum):
    RED = 1


class Canary:
    """Flies when it is unpickled."""

    flown = 0

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _fly, ()


def _fly() -> str:
    Canary.flown += 1
    return "flown"


@pytest.fixture(autouse=True)
def _cage() -> None:
    Canary.flown = 0


def nested(depth: int, inner: bytes = b"\xc0") -> bytes:
    return b"\x91" * depth + inner


# -- frame 0 ---------------------------------------------------------------------------------------------------------------------

INVALID = [
    b"",
    b"\xc1",
    b"\x00\x00",
    b"\x81\xa1a",
    b"\x92\x01",
    b"\xa5abc",
    b"\xa1\xff",
    b"\xa3\xed\xb0\x80",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xdd\xff\xff\xff\xff" * 1000,
    nested(10**6),
    b"\x81" * 10**6,
    b"\x81\x80\x01",
    b"\x81\x91\x80\x01",
    b"\xd6\xff\x00",
    b"\xd5\xff\x00\x00",
    b"\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xc7\x00\xfe",
    b"\xc7\x00\xb1",
    b"\xd4\xb0\x00",
]


@pytest.mark.parametrize("extensions", [True, False])
@pytest.mark.parametrize("frame", INVALID, ids=lambda frame: frame[:8].hex() or "empty")
def test_an_invalid_frame_0(frame: bytes, extensions: bool) -> None:
    decoder = Decoder(STRANGE, extensions=extensions)
    with pytest.raises(RemoteProtocolError):
        decoder.head(frame)
    with pytest.raises(RemoteProtocolError):
        decoder.resolve([frame])


def test_a_message_without_frames() -> None:
    assert Decoder(TRUSTED).has_markers([])
    with pytest.raises(RemoteProtocolError, match="without frames"):
        Decoder(TRUSTED).resolve([])


def test_equal_keys_nested_deeper_than_some_pythons_compare() -> None:
    key = nested(1000)
    try:
        head = Decoder(STRANGE).head(b"\x82" + key + b"\x01" + key + b"\x02")
    except RemoteProtocolError:
        return
    assert list(head.values()) == [2]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, "mmap"])
def test_any_kind_of_buffer(kind: Any) -> None:
    for message, markers in (({"a": (1, {"b": b"c"})}, False), ({"a__": 1}, True)):
        packed = msgpack.packb(message)
        if kind == "mmap":
            frame: Any = mmap.mmap(-1, len(packed))
            frame[:] = packed
        else:
            frame = kind(packed)
        decoder = Decoder(TRUSTED)
        assert decoder.head(frame) == message
        assert decoder.has_markers([frame]) is markers
        assert decoder.resolve([frame]) == message


def test_arrays_are_tuples_and_keys_are_anything() -> None:
    frame = msgpack.packb([[1, []], {1: 2, None: 3, (4, (5,)): 6, b"x": 7, 1.5: 8}])
    want = ((1, ()), {1: 2, None: 3, (4, (5,)): 6, b"x": 7, 1.5: 8})
    assert Decoder(TRUSTED).head(frame) == want
    assert Decoder(TRUSTED).resolve([frame]) == want


def test_foreign_extension_values_pass() -> None:
    values = [msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2)]
    for extensions in (True, False):
        assert loads([msgpack.packb(values)], extensions=extensions) == tuple(values)
        assert Decoder(TRUSTED, extensions=extensions).head(msgpack.packb(values)) == tuple(values)


def test_ours_are_foreign_without_negotiation() -> None:
    (frame,) = dumps(dt.date(2024, 1, 1), EncodeContext(extensions=True))
    with pytest.raises(RemoteProtocolError):
        loads([frame])


# -- phase one -------------------------------------------------------------------------------------------------------------------


def test_the_head_leaves_markers_in_place() -> None:
    message = {"op": "x", "a": Serialize(Canary()), "b": ToPickle(Canary()), "s": {1}, "e": [Colour.RED]}
    frames = dumps(message)
    decoder = Decoder(TRUSTED)
    assert decoder.has_markers(frames)
    assert decoder.head(frames[0]) == {
        "op": "x",
        "a": {"__Serialized__": 1},
        "b": {"__Pickled__": 3},
        "s": {"__Set__": True, "as-list": (1,)},
        "e": ({"__Pickled__": 4},),
    }
    assert not Canary.flown


def test_the_head_of_messages_whose_keys_are_markers() -> None:
    message = {"op": "x", dt.date(2024, 1, 1): 1, ("a", Decimalish(2)): {"deep": {Decimalish(3): 4}}}
    frames = stock.dumps(message)
    head = Decoder(TRUSTED).head(frames[0])
    assert head["op"] == "x"
    assert len(head) == 3
    keys = list(head)
    assert dict(keys[1]) == {"__Pickled__": 1}
    assert Decoder(TRUSTED).resolve(frames) == message


class Decimalish:
    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decimalish) and other.value == self.value

    def __hash__(self) -> int:
        return self.value


def test_the_head_of_messages_with_frozensets() -> None:
    message = {"op": "x", "a": frozenset({1, (2, frozenset())}), frozenset({3}): 4, "c": frozenset({Colour.RED})}
    frames = dumps(message, EncodeContext(extensions=True))
    decoder = Decoder(TRUSTED, extensions=True)
    head = decoder.head(frames[0])
    assert (head["op"], head["a"], head[frozenset({3})]) == ("x", message["a"], 4)
    assert [dict(element) for element in head["c"]] == [{"__Pickled__": 1}]
    assert decoder.resolve(frames) == message


def test_a_message_without_markers_is_its_head() -> None:
    message = {"a": frozenset({1}), "b": dt.date(2024, 1, 1), "c": {"d": (None, 2**70)}}
    frames = dumps(message, EncodeContext(extensions=True))
    decoder = Decoder(STRANGE, extensions=True)
    assert not decoder.has_markers(frames)
    assert decoder.head(frames[0]) == decoder.resolve(frames) == message


FROZENSET, DICT = b"\xc7\x00\xb0", b"\xc7\x00\xaf"


@pytest.mark.parametrize(
    "frame",
    [
        FROZENSET,
        b"\x91" + FROZENSET,
        b"\x81\x01" + FROZENSET,
        b"\x82" + FROZENSET + b"\x90" + FROZENSET + b"\x90",
        b"\x82" + FROZENSET + b"\x90\x01\x02",
        b"\x82\xa7__Set__\xc3" + FROZENSET + b"\x90",
        b"\x82" + FROZENSET + b"\x90" + DICT + b"\x90",
        b"\x81" + FROZENSET + b"\x80",
        b"\x81" + FROZENSET + b"\x91\x80",
        b"\x81" + FROZENSET + b"\x91" + FROZENSET,
        b"\x81" + DICT + b"\x91\x01",
        b"\x81" + DICT + b"\x92\x80\x01",
        b"\x81\x91" + DICT + b"\x90",
    ],
    ids=lambda frame: frame.hex(),
)
def test_a_tag_where_none_may_stand(frame: bytes) -> None:
    decoder = Decoder(STRANGE, extensions=True)
    with pytest.raises(RemoteProtocolError):
        decoder.head(frame)
    with pytest.raises(RemoteProtocolError):
        decoder.resolve([frame])


def test_other_forms_of_a_tag_are_read_as_well() -> None:
    frame = b"\x81\xc8\x00\x00\xb0\x91\x07"
    assert Decoder(STRANGE, extensions=True).head(frame) == frozenset({7})


# -- markers ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [True, False, None, 0, -1, 1.0, "1", b"1", (1,), {"a": 1}, 2**63, 2**64 - 1, -(2**63), 9],
    ids=repr,
)
def test_a_serialized_marker_that_names_no_frame(value: object) -> None:
    frames = [msgpack.packb({"a": {"__Serialized__": value}}), *dumps(Serialize(b"x"))[1:]]
    for ctx in (TRUSTED, STRANGE, OPAQUE):
        with pytest.raises(RemoteProtocolError):
            loads(frames, ctx)


@pytest.mark.parametrize("value", [True, None, 1.0, "1", (1,), 2**64 - 1, 9], ids=repr)
def test_a_pickled_marker_that_names_no_frame(value: object) -> None:
    frames = [msgpack.packb({"a": {"__Pickled__": value}}), *dumps(ToPickle(1))[1:]]
    with pytest.raises(RemoteProtocolError):
        loads(frames, TRUSTED)


def test_a_pickled_marker_of_0_is_a_dict_as_it_is_for_dask() -> None:
    frames = [msgpack.packb([{"__Pickled__": 0, "a": 1}, {"__Pickled__": -5}])]
    assert loads(frames) == stock.loads(frames) == ({"__Pickled__": 0, "a": 1}, {"__Pickled__": -5})


def test_dasks_order_of_looking_at_the_keys() -> None:
    frames = dumps(Serialize(b"x"))
    for extra in ({"__Pickled__": 1}, {"__Set__": True}, {"__Enum__": True}, {"other": 1}):
        mixed = [msgpack.packb({**extra, "__Serialized__": 1}), *frames[1:]]
        assert loads(mixed) == stock.loads(mixed) == b"x"
    mixed = [msgpack.packb({"__Set__": True, "__Pickled__": 1}), *dumps(ToPickle(5))[1:]]
    assert loads(mixed) == stock.loads(mixed) == 5
    mixed = [msgpack.packb({"__Pickled__": 0, "__Set__": False, "as-list": [1]})]
    assert loads(mixed) == stock.loads(mixed) == {1}
    with pytest.raises(RemoteProtocolError, match="__Enum__"):
        loads([msgpack.packb({"__Enum__": 1, "__Set__": True, "as-list": []})])


@pytest.mark.parametrize(
    "marker",
    [
        {"__Set__": True},
        {"__Set__": True, "as-list": None},
        {"__Set__": True, "as-list": "abc"},
        {"__Set__": True, "as-list": b"abc"},
        {"__Set__": True, "as-list": {"a": 1}},
        {"__Set__": True, "as-list": [{}]},
        {"__Set__": True, "as-list": [[{}]]},
        {"__Set__": True, "as-list": [{"__Set__": True, "as-list": []}]},
        {"__Enum__": True},
        {"__Enum__": True, "name": "RED", "__module__": 1, "__name__": "Colour"},
        {"__Enum__": True, "name": [], "__module__": [{}], "__name__": {}},
    ],
    ids=str,
)
def test_a_malformed_set_or_enum(marker: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        loads([msgpack.packb({"a": marker})])


def test_enums_by_the_settings() -> None:
    frame = msgpack.packb({"__Enum__": True, "name": "RED", "__module__": __name__, "__name__": "Colour"})
    root = __name__.partition(".")[0]
    assert loads([frame], DecodeContext(enum_modules=(root,))) is Colour.RED
    with pytest.raises(RemoteProtocolError, match=rf"'{root}' is not in Security\(enum_modules="):
        loads([frame])
    sys.modules.pop("this", None)
    frame = msgpack.packb({"__Enum__": True, "name": "RED", "__module__": "this", "__name__": "Colour"})
    with pytest.raises(RemoteProtocolError, match="not imported here"):
        loads([frame], DecodeContext(enum_modules=("this",)))
    assert "this" not in sys.modules


def header(**changes: object) -> bytes:
    fields = {"serializer": "msgpack", "num-sub-frames": 1, **changes}
    return msgpack.packb({key: value for key, value in fields.items() if value != "absent"})


@pytest.mark.parametrize("count", ["absent", None, True, -1, 1.0, "1", 2, 2**63, [1]], ids=repr)
def test_a_count_of_frames_that_is_none(count: object) -> None:
    for key, ctx in (("__Serialized__", TRUSTED), ("__Serialized__", OPAQUE), ("__Pickled__", TRUSTED)):
        with pytest.raises(RemoteProtocolError, match="tells of"):
            loads([msgpack.packb({key: 1}), header(**{"num-sub-frames": count}), b"\x05"], ctx)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x80\x80",
        b"\x90",
        b"\x01",
        b"\xc0",
        nested(10**5),
        b"\x81\xa1\xff\x01",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\x80\x01",
    ],
    ids=lambda frame: frame[:8].hex() or "empty",
)
def test_a_header_that_is_none(frame: bytes) -> None:
    for key, ctx in (("__Serialized__", TRUSTED), ("__Serialized__", OPAQUE), ("__Pickled__", TRUSTED)):
        with pytest.raises(RemoteProtocolError, match="header in frame 1"):
            loads([msgpack.packb({"a": {key: 1}}), frame], ctx)


def test_frames_that_nothing_refers_to_are_ignored() -> None:
    assert loads([msgpack.packb({"a": 1}), b"what", b"ever"]) == {"a": 1}
    frames = dumps({"a": Serialize(b"x")})
    assert loads([*frames, b"\xc1", b""]) == {"a": b"x"}
    frames[0] = msgpack.packb({"a": {"__Serialized__": 3}})
    assert loads([frames[0], b"", b"\xc1", *frames[1:]]) == {"a": b"x"}


def test_headers_may_stand_in_any_order() -> None:
    one, two = dumps(Serialize(b"1"))[1:], dumps(Serialize(b"2"))[1:]
    assert loads([msgpack.packb([{"__Serialized__": 3}, {"__Serialized__": 1}]), *one, *two]) == (b"2", b"1")


@pytest.mark.parametrize(
    "markers",
    [
        [{"__Serialized__": 1}, {"__Serialized__": 1}],
        [{"__Serialized__": 1}, {"__Pickled__": 1}],
        [{"__Serialized__": 1}, {"__Serialized__": 2}],
        [{"__Serialized__": 2}, {"__Serialized__": 1}],
    ],
    ids=str,
)
@pytest.mark.parametrize("ctx", [TRUSTED, OPAQUE], ids=["deserialize", "opaque"])
def test_each_frame_belongs_to_one_marker(markers: list[dict[str, int]], ctx: DecodeContext) -> None:
    """Else a megabyte of markers would have one payload decompressed sixty thousand times."""
    inner = header(**{"num-sub-frames": 0})
    frames = [msgpack.packb(markers), header(), inner, b"\x05"]
    with pytest.raises(RemoteProtocolError):
        loads(frames, ctx)
    with pytest.raises(RemoteProtocolError, match="two markers name frame"):
        loads(frames, OPAQUE)


# -- trust -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dump", [dumps, stock.dumps], ids=["ours", "stock"])
def test_a_strangers_pickle_is_not_loaded_and_its_place_is_named(dump: Callable[[object], list[Any]]) -> None:
    frames = dump({"op": "x", "data": {"x": [0, Canary()]}})
    with pytest.raises(UnsafePayload, match=r"^data\['x'\]\[1\]: .*Security\(pickle=") as caught:
        loads(frames, STRANGE)
    assert caught.value.field == "data['x'][1]"
    assert not Canary.flown
    assert loads(frames)["data"]["x"] == (0, "flown")
    assert Canary.flown == 1


def test_a_strangers_payload_that_takes_a_pickle_is_not_loaded_and_its_place_is_named() -> None:
    frames = dumps({"op": "x", "data": [b"a", Serialize({"k": [b"b", Canary()]})]})
    with pytest.raises(UnsafePayload, match=r"Security\(pickle=") as caught:
        loads(frames, STRANGE)
    assert caught.value.field.startswith("data[1]['k']")
    assert not Canary.flown


def test_a_fault_behind_very_many_values_is_not_looked_for() -> None:
    """The place is a courtesy; looking for it must not take longer than decoding does."""
    for size, field in ((1000, "[1000]"), (100_000, "")):
        with pytest.raises(UnsafePayload) as caught:
            loads(dumps([*range(size), Canary()]), STRANGE)
        assert caught.value.field == field


def test_a_pickle_as_key() -> None:
    frames = stock.dumps({"a": {dt.date(2024, 1, 1): 2}})
    with pytest.raises(UnsafePayload) as caught:
        loads(frames, STRANGE)
    assert caught.value.field == "a<key {'__Pickled__': 1}>"


def test_a_message_that_is_one_pickle() -> None:
    with pytest.raises(UnsafePayload, match=r"^a pickle") as caught:
        loads(dumps(ToPickle(1)), STRANGE)
    assert caught.value.field == ""


def test_garbage_behind_a_strangers_pickle_is_garbage() -> None:
    frames = [b"\x92" + msgpack.packb({"__Pickled__": 1}) + b"\xc1", header(), b"\x05"]
    with pytest.raises(RemoteProtocolError):
        loads(frames, STRANGE)


def test_a_pickle_that_can_not_be_loaded_leaves_the_rest_readable() -> None:
    frames = dumps({"data": [ToPickle(1)]})
    frames[1] = msgpack.packb({"pickled-obj": b"garbage", "num-sub-frames": 0})
    with pytest.raises(SerializationError, match=r"^data\[0\]: ") as caught:
        loads(frames)
    assert caught.value.path == "data[0]"


def test_what_needs_no_pickle_comes_from_strangers() -> None:
    message = {"a": Serialize(b"x"), "b": np.arange(3), "c": {1}, "d": [Serialize([np.zeros(2), b""])]}
    back = loads(dumps(message), STRANGE)
    assert back["a"] == b"x"
    assert (back["b"] == np.arange(3)).all()
    assert back["c"] == {1}


def test_trust_is_not_asked_without_need() -> None:
    def ask() -> bool:
        raise AssertionError("asked")

    ctx = DecodeContext(allow_pickle=ask, max_message=ask)
    frames = dumps({"a": Serialize([b"x"]), "b": {1}, "c": {"__Set__": 2}}, EncodeContext(extensions=True))
    assert loads(frames, ctx, extensions=True) == {"a": [b"x"], "b": {1}, "c": {"__Set__": 2}}


# -- deserialize=False -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "lz4", "zlib"])
@pytest.mark.parametrize("shard", [None, 30_000])
def test_a_hop_passes_payloads_on_byte_for_byte(compression: str | None, shard: int | None) -> None:
    message = {
        "op": "x",
        "a": stock.to_serialize(np.zeros(20_000)),
        "b": [stock.to_serialize({"k": [np.arange(5), b"x"], "l": Canary()})],
        "c": stock.to_serialize(Canary()),
    }
    theirs = stock.dumps(message, context={"compression": compression}, frame_split_size=shard)
    received = loads(theirs, OPAQUE)
    assert received["op"] == "x"
    for part in (received["a"], *received["b"], received["c"]):
        assert type(part) is Serialized
        assert part.trusted
    again = dumps(received)
    assert [bytes(frame) for frame in again] == [bytes(memoryview(frame)) for frame in theirs]
    assert not Canary.flown
    assert (stock.loads(again)["a"] == np.zeros(20_000)).all()


def test_the_frames_are_the_received_memory() -> None:
    frames = [memoryview(frame) for frame in dumps({"a": Serialize(b"x" * 100)})]
    assert loads(frames, OPAQUE)["a"].frames[0] is frames[2]


def test_what_a_hop_has_from_a_stranger_says_so() -> None:
    ctx = DecodeContext(deserialize=False, allow_pickle=never)
    received = loads(dumps({"a": Serialize(Canary()), "b": Serialize(b"x")}), ctx)
    assert not received["a"].trusted
    assert not received["b"].trusted
    assert len(dumps(received["b"])) == 3
    with pytest.raises(UnsafePayload):
        dumps(received)


def test_a_hop_still_loads_pickles_as_dask_does() -> None:
    assert loads(dumps({"a": ToPickle([1])}), OPAQUE) == {"a": [1]}


def test_a_hop_needs_not_know_the_enums_in_headers() -> None:
    inside = {
        "known": {"__Set__": True, "as-list": [1]},
        "unknown": {"__Enum__": True, "name": "A", "__module__": "nowhere.at_all", "__name__": "B"},
        "num-sub-frames": 0,
        "serializer": "dask",
    }
    frames = [msgpack.packb({"__Serialized__": 1}), msgpack.packb(inside)]
    received = loads(frames, OPAQUE)
    assert received.header["known"] == {1}
    assert received.header["unknown"] == inside["unknown"]
    assert dumps(received) == frames
    with pytest.raises(RemoteProtocolError, match="enum_modules"):
        loads(frames)


def test_inline_payloads_in_headers() -> None:
    inline = {"__Serialized__": True, "data": [{"serializer": "msgpack"}, [b"\x05"]]}
    frames = [msgpack.packb({"__Serialized__": 1}), header(x=inline, y={"plain": 1}), b"\x05"]
    received = loads(frames, DecodeContext(deserialize=False, allow_pickle=never))
    assert received.header["y"] == {"plain": 1}
    assert received.header["x"] == Serialized({"serializer": "msgpack"}, [b"\x05"])
    assert not received.header["x"].trusted
    assert dumps(received) == frames


@pytest.mark.parametrize("data", ["absent", None, [], [{}], [{}, "x"], [{}, ["x"]], [[], [b"x"]], [{}, [b"x"], 1]], ids=repr)
def test_a_malformed_inline_payload(data: object) -> None:
    inline = {"__Serialized__": True} if data == "absent" else {"__Serialized__": True, "data": data}
    for ctx in (TRUSTED, OPAQUE):
        with pytest.raises(RemoteProtocolError, match="inline payload"):
            loads([msgpack.packb({"__Serialized__": 1}), header(x=inline), b"\x05"], ctx)


# -- limits ----------------------------------------------------------------------------------------------------------------------


def test_a_header_frame_has_the_limit_of_heads() -> None:
    frames = dumps({"a": Serialize(b"x")})
    size = len(frames[1])
    assert loads(frames, DecodeContext(max_head=lambda: size)) == {"a": b"x"}
    for deserialize in (True, False):
        with pytest.raises(LimitExceeded, match=r"Limits\(head=") as caught:
            loads(frames, DecodeContext(max_head=lambda: size - 1, deserialize=deserialize))
        assert (caught.value.limit, caught.value.value, caught.value.seen) == ("head", size - 1, size)


def test_many_payloads_share_the_limit_of_the_message() -> None:
    packed = zlib.compress(bytes(100_000))
    sub = msgpack.unpackb(dumps(Serialize(b""))[1]) | {"compression": ["zlib"]}
    frames = [msgpack.packb([{"__Serialized__": 2 * i + 1} for i in range(10)])]
    for _ in range(10):
        frames += [msgpack.packb(sub), packed]
    assert loads(frames, DecodeContext(max_message=lambda: 1_100_000)) == (bytes(100_000),) * 10
    with pytest.raises(LimitExceeded, match="message"):
        loads(frames, DecodeContext(max_message=lambda: 900_000))


# -- errors of families ----------------------------------------------------------------------------------------------------------


def test_a_senders_failure_is_a_type_error() -> None:
    frames = stock.dumps({"a": stock.to_serialize(_unpicklable())})
    with pytest.raises(TypeError, match="Could not serialize"):
        loads(frames)


def _unpicklable() -> Any:
    yield 1


def test_a_refused_family_is_a_type_error() -> None:
    frames = dumps({"a": Serialize(b"x")})
    with pytest.raises(TypeError, match="'dask'"):
        loads(frames, DecodeContext(deserializers=("msgpack",)))
    assert loads(dumps({"a": ToPickle(1)}), DecodeContext(deserializers=("msgpack",))) == {"a": 1}


def test_an_unknown_family_is_named_with_its_place() -> None:
    frames = [msgpack.packb({"a": {"__Serialized__": 1}}), header(serializer="zebra"), b"\x05"]
    with pytest.raises(SerializationError, match=r"^a: .*'zebra'") as caught:
        loads(frames)
    assert caught.value.path == "a"


def test_errors_that_are_nobodys_fault_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = dumps({"a": Serialize(b"x")})
    for error in (MemoryError, KeyboardInterrupt, ZeroDivisionError):

        def fail(*args: object, error: type[BaseException] = error, **kwargs: object) -> Any:
            raise error

        monkeypatch.setattr("trio_dcore.protocol._decoding.deserialize", fail)
        with pytest.raises(error):
            loads(frames)


@pytest.mark.parametrize("phase", ["head", "resolve", "header"])
def test_running_out_of_memory_is_no_fault_of_the_peer(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = dumps({"a": Serialize(b"x")})
    real = msgpack.unpackb
    left = [1 if phase == "header" else 0]

    def unpackb(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr("trio_dcore.protocol._decoding.unpackb", unpackb)
    with pytest.raises(MemoryError):
        Decoder(TRUSTED).head(frames[0]) if phase == "head" else loads(frames)


# -- anything at all -------------------------------------------------------------------------------------------------------------

EXAMPLES = [
    dumps({"op": "add", "x": 1, "reply": True, "text": "some text", "keys": [("a", 1), None, 1.5]}),
    dumps({"op": "x", "data": Serialize([np.arange(3), b"x"]), "s": {1, (2,)}, "e": Colour.RED}),
    dumps({"op": "x", "data": np.zeros((2, 2)), "z": Serialize(b"y" * 20_000)}, EncodeContext(compression="lz4")),
    dumps(
        {
            "s": frozenset({1, dt.date(2024, 1, 1)}),
            "d": {"__Set__": {2}},
            "t": dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
            "n": 2**80,
        },
        EncodeContext(extensions=True),
    ),
    dumps({"p": ToPickle({"a": 1}), "n": np.int64(1)}),
]
MUTATION = st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.binary(max_size=3), st.integers(0, 3))


@settings(max_examples=400)
@given(st.sampled_from(EXAMPLES), st.lists(MUTATION, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_a_mutated_message_is_a_message_or_a_typed_error(
    frames: list[Any], mutations: list[tuple[int, int, bytes, int]], extensions: bool, deserialize: bool
) -> None:
    mutated = [bytes(frame) for frame in frames]
    for which, place, new, cut in mutations:
        which %= len(mutated)
        frame = mutated[which]
        place %= len(frame) + 1
        mutated[which] = frame[:place] + new + frame[place + cut :]
    decoder = Decoder(
        DecodeContext(allow_pickle=never, deserialize=deserialize, max_message=lambda: 10**6), extensions=extensions
    )
    try:
        decoder.head(mutated[0])
    except RemoteProtocolError:
        with pytest.raises(RemoteProtocolError):
            decoder.resolve(mutated)
        return
    try:
        decoder.resolve(mutated)
    except (RemoteProtocolError, UnsafePayload, SerializationError, LimitExceeded):
        pass


@settings(max_examples=400)
@given(st.lists(st.binary(max_size=60), min_size=1, max_size=3), st.booleans())
def test_random_frames_are_a_message_or_a_typed_error(frames: list[bytes], extensions: bool) -> None:
    decoder = Decoder(STRANGE, extensions=extensions)
    for decode in (lambda: decoder.head(frames[0]), lambda: decoder.resolve(frames)):
        try:
            decode()
        except (RemoteProtocolError, UnsafePayload, SerializationError):
            pass


MARKER_KEYS = ["__Set__", "__Enum__", "__Serialized__", "__Pickled__", "as-list", "name", "__module__", "__name__", "data"]
HEADER_KEYS = ["num-sub-frames", "serializer", "compression", "pickled-obj", "sub-header", "type-serialized", "is-collection"]
SPLIT_KEYS = ["sub-headers", "frame-lengths", "split-num-sub-frames", "split-offsets", "key", "writeable"]
WORDS = ["RED", __name__, "Colour", "dask", "msgpack", "pickle", "list", "dict"]
MARKERISH = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 4) | st.sampled_from(WORDS) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*MARKER_KEYS, *HEADER_KEYS, *SPLIT_KEYS]), inner, max_size=4)
    ),
    max_leaves=15,
)


@settings(max_examples=400)
@given(st.lists(MARKERISH, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_any_markers_and_headers_are_a_message_or_a_typed_error(values: list[Any], deserialize: bool, trusted: bool) -> None:
    frames = [msgpack.packb(value) for value in values]
    ctx = DecodeContext(allow_pickle=lambda: trusted, deserialize=deserialize, enum_modules=(__name__.partition(".")[0],))
    try:
        loads(frames, ctx)
    except (RemoteProtocolError, UnsafePayload, SerializationError):
        pass


def test_pickled_is_never_left_as_it_came() -> None:
    """Pickled is for sending only: a receiver gets the object or an error."""
    assert loads(dumps(Pickled({"pickled-obj": pickle.dumps(5)}, [])), OPAQUE) == 5


# -- work ----------------------------------------------------------------------------------------------------------------------

MB = 1_000_000
_loaded: list[int] = []


def load(number: int, data: object = None) -> int:
    _loaded.append(number)
    return number


class Loading:
    """Notes that it was unpickled; its pickle has so many bytes."""

    def __init__(self, number: int, size: int = 0) -> None:
        self.number = number
        self.size = size

    def __reduce__(self) -> Any:
        return load, (self.number, bytes(self.size))


@pytest.fixture
def loaded() -> list[int]:
    _loaded.clear()
    return _loaded


def heavy(frames: list[Any], most: int, **context: Any) -> Any:
    """What a message is, that takes more work than so many bytes."""
    with pytest.raises(TooHeavy) as caught:
        Decoder(DecodeContext(**context)).resolve(frames, most)
    return caught.value.rest()


class TestWork:
    @pytest.mark.parametrize("wrap", [ToPickle, Serialize, lambda value: Serialize([value, 1])])
    def test_pickles(self, wrap: Callable[[Any], Any], loaded: list[int]) -> None:
        frames = dumps({"a": wrap(Loading(1, MB))})
        assert Decoder(TRUSTED).resolve(frames, 2 * MB) == Decoder(TRUSTED).resolve(frames)
        loaded.clear()
        found = heavy(frames, MB)
        assert found["a"] in (1, (1, 1), [1, 1])
        assert loaded == [1]

    def test_they_add_up_and_none_is_loaded_twice(self, loaded: list[int]) -> None:
        frames = dumps([ToPickle(Loading(number, MB // 2)) for number in range(4)] + [ToPickle(Loading(4))])
        with pytest.raises(TooHeavy) as caught:
            Decoder(TRUSTED).resolve(frames, MB + 1000)
        assert loaded == [0, 1]
        assert caught.value.rest() == (0, 1, 2, 3, 4)
        assert loaded == [0, 1, 2, 3, 4]

    def test_memory_that_is_looked_at_where_it_lies(self) -> None:
        array = np.arange(MB)
        frames = dumps({"a": array, "b": Serialize([array, b"x" * MB]), "c": ToPickle({"a": array})})
        found = Decoder(TRUSTED).resolve(frames, 1000)
        assert (found["c"]["a"] == array).all()

    def test_what_nobody_knows_how_to_read(self) -> None:
        frames = dumps(Serialized({"serializer": "from the future"}, [bytes(MB)]))
        with pytest.raises(SerializationError):
            heavy(frames, MB - 1)
        with pytest.raises(SerializationError):
            Decoder(TRUSTED).resolve(frames, 2 * MB)

    def test_pieces_that_are_joined(self) -> None:
        array = np.arange(MB // 8)
        frames = [bytes(frame) for frame in dumps(Serialize(array), EncodeContext(shard=MB // 4))]
        assert (heavy(frames, MB // 2) == array).all()
        assert (Decoder(TRUSTED).resolve(frames, 2 * MB) == array).all()

    def test_compressed_ones_count_for_what_they_become(self) -> None:
        array = np.zeros(MB // 8)
        frames = dumps([Serialize(array), Serialize(array)], EncodeContext(compression="lz4"))
        assert sum(map(len, frames)) < 20_000
        assert (heavy(frames, MB)[1] == array).all()
        assert (Decoder(TRUSTED).resolve(frames, 3 * MB)[1] == array).all()

    def test_what_was_decompressed_in_vain_does_not_count_against_the_limit(self) -> None:
        """A collection of which the first array was decompressed before the second was too much."""
        arrays = [np.zeros(MB // 8), np.zeros(MB // 8)]
        frames = dumps(Serialize(arrays), EncodeContext(compression="lz4"))
        limit = 2 * MB + 20_000
        assert len(heavy(frames, MB + 100_000, max_message=lambda: limit)) == 2
        with pytest.raises(LimitExceeded):
            heavy(frames, MB + 100_000, max_message=lambda: 2 * MB)

    def test_an_error_behind_it_still_says_where(self) -> None:
        frames = dumps({"a": ToPickle(Loading(1, MB)), "b": [Serialized({"serializer": "?"}, [])]})
        with pytest.raises(SerializationError) as caught:
            heavy(frames, MB)
        assert caught.value.path == "b[0]"

    def test_two_markers_of_one_payload_are_refused_the_second_time_as_well(self, loaded: list[int]) -> None:
        frames = dumps([ToPickle(Loading(1)), ToPickle(Loading(2, MB))])
        head = msgpack.packb([{"__Pickled__": 1}, {"__Pickled__": 2}, {"__Pickled__": 1}])
        with pytest.raises(RemoteProtocolError, match="two markers name frame 1"):
            heavy([head, *frames[1:]], MB)

    def test_what_is_left_as_it_came_takes_none(self) -> None:
        frames = dumps(Serialize(Loading(1, MB)))
        assert type(Decoder(OPAQUE).resolve(frames, 0)) is Serialized

    @pytest.mark.parametrize("header", [{"pickled-obj": 5}, {"split-num-sub-frames": 5}, {"serializer": "pickle"}, {}])
    def test_any_header(self, header: Any) -> None:
        for key in ("__Pickled__", "__Serialized__"):
            frames = [msgpack.packb({key: 1}), msgpack.packb({**header, "num-sub-frames": 1}), bytes(MB)]
            with pytest.raises((RemoteProtocolError, SerializationError, TooHeavy)) as caught:
                Decoder(TRUSTED).resolve(frames, 0)
            if type(caught.value) is TooHeavy:
                with pytest.raises((RemoteProtocolError, SerializationError)):
                    caught.value.rest()


@pytest.mark.parametrize("most", [None, 0])
def test_what_can_not_be_decoded_is_not_kept_until_a_collection(most: int | None) -> None:
    """Else a few bombs, each as large as a message may become, would be there at once."""

    class Memory(bytearray):
        """Memory that can be referred to weakly."""

    memory = Memory(zlib.compress(bytes(MB)))
    ref = weakref.ref(memory)
    head, header, _ = dumps({"x": Serialize(b"")})
    frames = [head, msgpack.packb({**msgpack.unpackb(header), "compression": ["zlib"]}), memoryview(memory)]
    decoder = Decoder(DecodeContext(max_message=lambda: MB // 2))
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(LimitExceeded if most is None else TooHeavy):
            decoder.resolve(frames, most)
            pytest.fail("it was decoded")
        del frames, memory
        assert ref() is None
    finally:
        gc.enable()
