"""Collections inside Serialize: Dask's rules for what is iterated, nested headers, and headers that lie."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import msgpack
import numpy as np
import pytest
from distributed.protocol.serialize import Serialize as StockSerialize
from distributed.protocol.serialize import Serialized as StockSerialized
from distributed.protocol.serialize import merge_and_deserialize, serialize_and_split
from hypothesis import given
from hypothesis import strategies as st

from trio_dcore.protocol import (
    DecodeContext,
    EncodeContext,
    RemoteProtocolError,
    SerializationError,
    Serialize,
    Serialized,
    UnsafePayload,
)
from trio_dcore.protocol._families import deserialize, needs_pickle, serialize

Point = namedtuple("Point", "x y")
ARRAY = np.arange(5)
UNTRUSTED = DecodeContext(allow_pickle=lambda: False)

VALUES: dict[str, Any] = {
    "empty list": [],
    "empty tuple": (),
    "empty set": set(),
    "empty dict": {},
    "numbers": [1, 2.5, None],
    "arrays": [ARRAY, ARRAY + 1],
    "tuple": (b"x", "y"),
    "set": {b"a"},
    "dict": {"a": ARRAY, "b": 1},
    "keys": {1: b"a", None: b"b", (1, "x"): b"c", b"k": b"d", 1.5: b"e"},
    "keys that don't fit": {frozenset(): b"a"},
    "huge integer key": {2**70: b"a"},
    "nested": [1, [ARRAY], {"a": b"x", "b": (b"1",)}],
    "first leaf decides": [[1, ARRAY], [ARRAY, 1]],
    "deep leaf": [{"a": ({"b": [b"x"]},)}],
    "empty inner": [b"x", [], {}],
    "subclasses": [Point(1, 2), OrderedDict(a=1), defaultdict(list)],
    "subclass at the top": Point(b"1", 2),
    "inner dict with odd keys": [{frozenset(): b"a"}],
    "same twice": [ARRAY, ARRAY],
}


def over_the_wire(header: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(header), use_list=False, strict_map_key=False)


def equal(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


@pytest.mark.parametrize(
    "serializers", [None, ("dask", "pickle"), ("pickle",), ("dask", "msgpack", "pickle"), ("dask", "pickle", "msgpack")]
)
@pytest.mark.parametrize("shard", [None, 16])
@pytest.mark.parametrize("name", VALUES)
class TestAgainstStock:
    def test_same_header_and_bytes(self, name: str, shard: int | None, serializers: Any) -> None:
        header, frames = serialize(VALUES[name], EncodeContext(serializers=serializers, shard=shard))
        theirs, their_frames = serialize_and_split(
            StockSerialize(VALUES[name]), serializers, "raise", {"pickle-protocol": 5}, shard
        )
        theirs["num-sub-frames"] = len(their_frames)
        assert msgpack.packb(header) == msgpack.packb(theirs)
        assert [bytes(frame) for frame in frames] == [bytes(frame) for frame in their_frames]

    def test_both_directions(self, name: str, shard: int | None, serializers: Any) -> None:
        header, frames = serialize(VALUES[name], EncodeContext(serializers=serializers, shard=shard))
        header = over_the_wire(header)
        kept = over_the_wire(header)
        got = deserialize(header, [bytearray(frame) for frame in frames], DecodeContext())
        if not (serializers == ("dask", "msgpack", "pickle") and "subclass" in name):  # which msgpack makes plain
            assert equal(got, VALUES[name])
        assert header == kept  # stock pops the keys of a dict out of its header
        assert equal(merge_and_deserialize(header, [memoryview(bytearray(frame)) for frame in frames]), got)


class TestWrappersInside:
    def test_serialize(self) -> None:
        value = [Serialize(ARRAY), {"a": Serialize([1, 2])}]
        header, frames = serialize(value, EncodeContext())
        assert equal(deserialize(over_the_wire(header), frames, DecodeContext()), [ARRAY, {"a": [1, 2]}])
        assert equal(merge_and_deserialize(over_the_wire(header), frames), [ARRAY, {"a": [1, 2]}])

    def test_inner_list_of_wrappers_is_iterated(self) -> None:
        # Stock pickles the wrapper there.
        header, frames = serialize([[Serialize(1)]], EncodeContext())
        assert deserialize(header, frames, DecodeContext()) == [[1]]

    def test_wrapper_in_wrapper(self) -> None:
        header, frames = serialize(Serialize(Serialize([1])), EncodeContext())
        assert deserialize(header, frames, DecodeContext()) == [1]

    def test_serialized_is_passed_on_and_not_changed(self) -> None:
        inner = Serialized(*serialize(ARRAY, EncodeContext(shard=16)))
        before = dict(inner.header)
        header, frames = serialize({"a": inner, "b": b"x"}, EncodeContext())
        assert inner.header == before
        assert equal(deserialize(over_the_wire(header), frames, DecodeContext()), {"a": ARRAY, "b": b"x"})

    def test_serialized_keeps_its_compression(self) -> None:
        text = b"abc" * 10_000
        inner = serialize(text, EncodeContext(compression="zlib"))
        header, frames = serialize([b"x", Serialized(*inner)], EncodeContext(compression="lz4", shard=10))
        assert header["compression"] == (None, "zlib")
        assert frames[1] is inner[1][0]
        assert deserialize(over_the_wire(header), frames, DecodeContext()) == [b"x", text]
        theirs, their_frames = serialize_and_split(StockSerialize([b"x", StockSerialized(*inner)]), size=10)
        assert theirs["compression"] == header["compression"]
        assert [bytes(frame) for frame in frames] == [bytes(frame) for frame in their_frames]
        assert deserialize(over_the_wire(theirs), their_frames, DecodeContext()) == [b"x", text]

    def test_alone(self) -> None:
        inner = Serialized(*serialize(ARRAY, EncodeContext(shard=16)))
        header, frames = serialize(inner, EncodeContext(compression="lz4"))
        assert (header, frames) == (inner.header, inner.frames)
        assert header is not inner.header
        assert equal(deserialize(header, frames, DecodeContext()), ARRAY)

    def test_strangers_pickle_is_not_passed_on(self) -> None:
        for value, ok in ((ARRAY, True), ({"a": [b"x"]}, True), (len, False), ([b"x", len], False)):
            stranger = Serialized(*serialize(value, EncodeContext()), trusted=False)
            assert needs_pickle(stranger.header) is not ok
            for outer in (stranger, [stranger], {"k": stranger}):
                if ok:
                    header, frames = serialize(outer, EncodeContext())
                    deserialize(header, frames, UNTRUSTED)
                else:
                    with pytest.raises(UnsafePayload, match="would be passed on"):
                        serialize(outer, EncodeContext())
                    serialize(outer, EncodeContext(forward_untrusted=True))

    def test_pickle_is_not_passed_on_to_a_stranger(self) -> None:
        ours = Serialized(*serialize(len, EncodeContext()))
        with pytest.raises(UnsafePayload, match="is not trusted with one"):
            serialize([ours], EncodeContext(allow_pickle=lambda: False))
        array = Serialized(*serialize(ARRAY, EncodeContext()))
        assert serialize([array], EncodeContext(allow_pickle=lambda: False))[0]["frame-lengths"] == [1]


class TestSelfContaining:
    def test_list(self) -> None:
        value: list[Any] = [b"x"]
        value += [value, value]
        header, frames = serialize(value, EncodeContext())
        got = deserialize(over_the_wire(header), frames, DecodeContext())
        assert got[0] == b"x"
        assert got[1][1] is got[1]

    def test_dict_behind_dicts(self) -> None:
        value: dict[str, Any] = {}
        value["a"] = value
        header, frames = serialize(value, EncodeContext())
        got = deserialize(over_the_wire(header), frames, DecodeContext())
        assert got["a"]["a"] is got["a"]

    def test_without_pickle(self) -> None:
        value: list[Any] = [b"x"]
        value += [value, value]
        with pytest.raises(UnsafePayload):
            serialize(value, EncodeContext(allow_pickle=lambda: False))
        mapping: dict[str, Any] = {}
        mapping |= {"a": mapping, "b": mapping}
        with pytest.raises(UnsafePayload):
            serialize(mapping, EncodeContext(allow_pickle=lambda: False))

    def test_wrapper(self) -> None:
        value = Serialize(None)
        value.data = value
        with pytest.raises(SerializationError, match="wrapped in itself"):
            serialize(value, EncodeContext())

    def test_deep(self) -> None:
        value: Any = b"x"
        for _ in range(200):
            value = [value]
        header, frames = serialize(value, EncodeContext())
        assert deserialize(over_the_wire(header), frames, DecodeContext()) == value
        assert merge_and_deserialize(over_the_wire(header), frames) == value


class TestPlaces:
    """An error says where in the payload it happened."""

    def test_sending(self) -> None:
        for value in ([b"x", {"k": (b"y", iter(""))}], [b"x", {"k": [b"y", iter("")]}]):
            with pytest.raises(SerializationError) as caught:
                serialize(value, EncodeContext(serializers=("dask",)))
            assert caught.value.path == "[1]['k'][1]"

    def test_sending_a_pickle_to_a_stranger(self) -> None:
        with pytest.raises(UnsafePayload) as caught:
            serialize({"x": [b"y", len]}, EncodeContext(allow_pickle=lambda: False))
        assert caught.value.field == "['x'][1]"

    def test_receiving(self) -> None:
        header, frames = serialize({"x": [b"y", len]}, EncodeContext())
        with pytest.raises(UnsafePayload) as caught:
            deserialize(header, frames, UNTRUSTED)
        assert caught.value.field == "['x'][1]"
        header, frames = serialize([b"y", len], EncodeContext())
        frames[1] = b"garbage"
        with pytest.raises(SerializationError) as failed:
            deserialize(header, frames, DecodeContext())
        assert failed.value.path == "[1]"


def changed(value: Any, **changes: Any) -> tuple[dict[str, Any], list[Any]]:
    header, frames = serialize(value, EncodeContext())
    for key, new in changes.items():
        header[key.replace("_", "-")] = new
    return header, frames


HEADER_KEYS = ["sub-headers", "frame-lengths", "type-serialized", "split-offsets", "split-num-sub-frames", "compression"]
ODD = st.one_of(
    st.none(),
    st.integers(-3, 5),
    st.text(max_size=5),
    st.sampled_from(["list", "set", "tuple", "dict"]),
    st.lists(st.integers(-1, 3) | st.none() | st.dictionaries(st.text(max_size=3), st.none(), max_size=2), max_size=4),
)


class TestLies:
    @pytest.mark.parametrize(
        "changes",
        [
            {"sub_headers": None},
            {"sub_headers": 5},
            {"sub_headers": [None, None]},
            {"sub_headers": []},
            {"frame_lengths": None},
            {"frame_lengths": [1]},
            {"frame_lengths": [1, 2]},
            {"frame_lengths": [2, 0, 0]},
            {"frame_lengths": [-1, 3]},
            {"frame_lengths": [1.0, 1]},
            {"frame_lengths": ["1", 1]},
            {"frame_lengths": [True, 1]},
            {"type_serialized": None},
            {"type_serialized": "frozenset"},
            {"type_serialized": b"list"},
            {"type_serialized": ["list"]},
            {"type_serialized": "dict"},
        ],
        ids=repr,
    )
    def test_is_refused(self, changes: dict[str, Any]) -> None:
        header, frames = changed([b"x", b"y"], **changes)
        with pytest.raises(RemoteProtocolError, match=r"collection|lacks a key"):
            deserialize(header, frames, UNTRUSTED)

    def test_elements_that_cannot_be_in_a_set(self) -> None:
        header, frames = changed([[b"x"]], type_serialized="set")
        with pytest.raises(RemoteProtocolError, match="a set came that can't be one"):
            deserialize(header, frames, UNTRUSTED)

    def test_key_that_cannot_be_one(self) -> None:
        header, frames = serialize({"k": b"x"}, EncodeContext())
        header["sub-headers"][0]["key"] = {}
        with pytest.raises(RemoteProtocolError, match="a dict came that can't be one"):
            deserialize(header, frames, UNTRUSTED)

    def test_endless_nesting(self) -> None:
        header: dict[str, Any] = {"sub-headers": [], "is-collection": True, "frame-lengths": [], "type-serialized": "list"}
        for _ in range(2000):
            header = {"sub-headers": [header], "is-collection": True, "frame-lengths": [0], "type-serialized": "list"}
        with pytest.raises(RemoteProtocolError, match="nested too deeply"):
            deserialize(header, [], UNTRUSTED)
        assert needs_pickle(header)

    @pytest.mark.parametrize("changes", [{"sub_headers": 5}, {"sub_headers": [5]}])
    def test_is_not_passed_on(self, changes: dict[str, Any]) -> None:
        assert needs_pickle(changed([b"x", b"y"], **changes)[0])

    def test_presence_of_the_key_counts_as_in_stock(self) -> None:
        header = changed([len], is_collection=False)[0]
        assert needs_pickle({**header, "serializer": "msgpack"})
        assert deserialize(*changed([b"x"], is_collection=False), UNTRUSTED) == [b"x"]

    @given(changes=st.dictionaries(st.sampled_from(HEADER_KEYS), ODD))
    def test_any_header(self, changes: dict[str, Any]) -> None:
        header, frames = serialize([b"x", [b"y", 2]], EncodeContext())
        try:
            deserialize({**header, **changes}, frames, UNTRUSTED)
        except (RemoteProtocolError, SerializationError, UnsafePayload):
            return


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(-5, 5), inner, max_size=4)
        | st.sets(st.integers(-5, 5) | st.text(max_size=3), max_size=3)
    ),
    max_leaves=15,
)


class TestWithoutPickle:
    """None, numbers, texts, bytes, lists, tuples, dicts and sets travel to every peer."""

    @given(PLAIN)
    def test_plain_data(self, value: Any) -> None:
        header, frames = serialize(value, EncodeContext(allow_pickle=lambda: False))
        header = over_the_wire(header)
        assert not needs_pickle(header)
        assert equal(deserialize(header, frames, UNTRUSTED), value)
        assert equal(merge_and_deserialize(header, [memoryview(frame) for frame in frames]), value)

    def test_tuples_and_dicts_of_plain_data_are_one_frame(self) -> None:
        _, frames = serialize(({"a": (1, "x", None)}, [{"b": (2,)}, 3]), EncodeContext(allow_pickle=lambda: False))
        assert len(frames) == 3

    def test_long_texts_get_frames_of_their_own(self) -> None:
        value = [("x" * 100_000, 1)]
        header, frames = serialize(value, EncodeContext(allow_pickle=lambda: False))
        assert len(frames) == 2
        # A stranger's packed collections are bounded as frame 0 is; a text is not.
        got = deserialize(header, frames, DecodeContext(allow_pickle=lambda: False, max_head=lambda: 1000))
        assert got == value

    @pytest.mark.parametrize(
        "value", [len, 2**64, [2**64], "\ud800", {frozenset()}, [1j], ("a", [object()]), {frozenset(): 1}], ids=repr
    )
    def test_all_else_is_refused(self, value: Any) -> None:
        with pytest.raises(UnsafePayload, match="is not trusted"):
            serialize(value, EncodeContext(allow_pickle=lambda: False))

    def test_families_asked_for_are_not_replaced(self) -> None:
        with pytest.raises(UnsafePayload):
            serialize(5, EncodeContext(allow_pickle=lambda: False, serializers=("dask", "pickle")))
        header, _ = serialize(5, EncodeContext(allow_pickle=lambda: False, serializers=("msgpack", "pickle")))
        assert header["serializer"] == "msgpack"

    def test_too_deep(self) -> None:
        value: Any = 5
        for _ in range(200):
            value = (value,)
        with pytest.raises(UnsafePayload):
            serialize(value, EncodeContext(allow_pickle=lambda: False))
