"""numpy arrays: against stock in both directions, views and copies, dtypes read without unpickling, and headers that lie."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any
from unittest import mock

import msgpack
import numpy as np
import pytest
from distributed.protocol.serialize import Serialize as StockSerialize
from distributed.protocol.serialize import merge_and_deserialize, serialize_and_split
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trio_dcore.protocol import (
    DecodeContext,
    EncodeContext,
    RemoteProtocolError,
    SerializationError,
    UnsafePayload,
    _numpy_dtypes,
)
from trio_dcore.protocol._families import bare_numpy, deserialize, needs_pickle, serialize
from trio_dcore.protocol._numpy_dtypes import Unreadable, plain_dtype, read_dtype, read_scalar

# Stock makes its matrices by the constructor, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")

NESTED = np.dtype([("a", "<i4"), ("b", "<f8", (2, 3)), ("n", [("z", ">u2"), ("q", "<m8[3D]"), ("s", "S3"), ("u", "<U2")])])
ALIGNED = np.dtype([("a", "i1"), ("b", "<f8")], align=True)
TITLED = np.dtype([(("Title", "a"), "<i4"), ("b", "S3")])
GAPPED = np.dtype({"names": ["x"], "formats": ["<M8[ns]"], "offsets": [4], "itemsize": 20})
RECORD = np.dtype((np.record, [("a", "<i4"), ("b", "<f8")]))
WIDE = np.dtype([(f"field {i}", "u1") for i in range(300)])
STRUCTURED = {
    "nested": NESTED,
    "aligned": ALIGNED,
    "titled": TITLED,
    "gapped": GAPPED,
    "record": RECORD,
    "void": "V10",
    "wide": WIDE,
}

UNTRUSTED = DecodeContext(allow_pickle=lambda: False)
NO_PICKLE = EncodeContext(allow_pickle=lambda: False)


def read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


GRID = np.arange(12, dtype="i4").reshape(3, 4)
ARRAYS: dict[str, Any] = {
    "c order": GRID,
    "fortran order": np.asfortranarray(GRID),
    "transposed": GRID.T,
    "every second": GRID[::2, ::2],
    "reversed": GRID[::-1],
    "reversed axis of one": np.ones((1, 3))[::-1],
    "new axis": np.arange(3)[None, :],
    "0-d": np.array(5),
    "empty": np.empty(0),
    "empty rows": np.empty((0, 3)),
    "empty in the middle": np.empty((3, 0, 2)),
    "broadcast": np.broadcast_to(np.arange(3), (4, 3)),
    "broadcast scalar": np.broadcast_to(7, (4, 3)),
    "broadcast of strided": np.broadcast_to(np.arange(12).reshape(2, 1, 6)[:, :, ::2], (2, 5, 3)),
    "broadcast of transposed": np.broadcast_to(np.arange(6).reshape(2, 3)[:, ::-1].T[:, None], (3, 4, 2)),
    "read-only": read_only(np.arange(3)),
    "read-only strided": read_only(np.arange(6))[::2],
    "big-endian": np.arange(3, dtype=">i4"),
    "bool": np.array([True, False]),
    "half": np.ones(2, "f2"),
    "complex": np.array([1j, 2]),
    "long double": np.ones(2, "g"),
    "bytes": np.array([b"ab", b"c"]),
    "text": np.array(["ab", "c"]),
    "dates": np.array(["2020-01-01", "NaT"], "M8[D]"),
    "dates strided": np.arange(6).astype("M8[ns]")[::2],
    "dates without unit": np.array(["NaT"], "M8"),
    "hours": np.array([3], "m8[2h]"),
    "void 3": np.array([b"abc", b"def"], "V3"),
    "matrix": np.arange(4).reshape(2, 2).view(np.matrix),
    "matrix transposed": np.arange(6).reshape(2, 3).view(np.matrix).T,
    **{name: np.zeros(2, dtype) for name, dtype in STRUCTURED.items()},
    "structured strided": np.zeros(6, NESTED)[::2],
}
MASKED: dict[str, Any] = {
    "ints": np.ma.MaskedArray([1, 2], mask=[0, 1]),
    "no mask": np.ma.MaskedArray([1.5, 2]),
    "fill value": np.ma.MaskedArray([1.5, 2], mask=[1, 0], fill_value=7.0),
    "bools": np.ma.MaskedArray([True, False], mask=[1, 0]),
    "dates": np.ma.MaskedArray(np.array(["2020-01-01"], "M8[D]"), mask=[1]),
    "text": np.ma.MaskedArray(["a", "bb"], mask=[0, 1], fill_value="zz"),
    "complex": np.ma.MaskedArray([1j], mask=[True]),
    "structured": np.ma.MaskedArray(np.zeros(2, [("a", "i4"), ("b", "f8")]), mask=[(0, 1), (1, 0)]),
    "strided": np.ma.MaskedArray(np.arange(6), mask=np.arange(6) > 2)[::2],
}


def over_the_wire(header: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(header), use_list=False, strict_map_key=False)


def assert_same(expected: Any, got: Any) -> None:
    assert type(got) is (np.ndarray if isinstance(expected, np.recarray) else type(expected))
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


@pytest.mark.parametrize("shard", [None, 16], ids=["whole", "sharded"])
@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("name", ARRAYS)
class TestAgainstStock:
    def test_same_header_and_bytes(self, name: str, protocol: int, shard: int | None) -> None:
        array = ARRAYS[name]
        header, frames = serialize(array, EncodeContext(pickle_protocol=protocol, shard=shard))
        theirs, their_frames = serialize_and_split(StockSerialize(array), context={"pickle-protocol": protocol}, size=shard)
        theirs["num-sub-frames"] = len(their_frames)
        if shard is None or not isinstance(array, np.matrix):  # stock cuts two-dimensional memory into odd pieces
            assert msgpack.packb(header) == msgpack.packb(theirs)
            assert [bytes(frame) for frame in frames] == [bytes(frame) for frame in their_frames]
        assert b"".join(frames) == b"".join(bytes(frame) for frame in their_frames)

    def test_ours_is_read_by_stock(self, name: str, protocol: int, shard: int | None) -> None:
        array = ARRAYS[name]
        header, frames = serialize(array, EncodeContext(pickle_protocol=protocol, shard=shard))
        assert_same(array, merge_and_deserialize(over_the_wire(header), [memoryview(bytearray(frame)) for frame in frames]))

    def test_stock_is_read_by_ours_without_trust(self, name: str, protocol: int, shard: int | None) -> None:
        array = ARRAYS[name]
        header, frames = serialize_and_split(StockSerialize(array), context={"pickle-protocol": protocol}, size=shard)
        header = over_the_wire(header)
        assert not needs_pickle(header)
        theirs = merge_and_deserialize(header, [memoryview(bytearray(frame)) for frame in frames])
        for memory in (bytes, bytearray, lambda frame: memoryview(bytearray(frame))):
            got = deserialize(header, [memory(frame) for frame in frames], UNTRUSTED)
            assert_same(array, got)
            assert got.flags.writeable == theirs.flags.writeable
            assert all(
                mine == stock or length == 1 for mine, stock, length in zip(got.strides, theirs.strides, got.shape, strict=True)
            )

    def test_no_pickle_is_needed_to_send(self, name: str, protocol: int, shard: int | None) -> None:
        header, frames = serialize(ARRAYS[name], EncodeContext(pickle_protocol=protocol, shard=shard, allow_pickle=lambda: False))
        assert_same(ARRAYS[name], deserialize(header, frames, UNTRUSTED))


@pytest.mark.parametrize("name", MASKED)
class TestMasked:
    def test_same_header_and_bytes(self, name: str) -> None:
        header, frames = serialize(MASKED[name], EncodeContext())
        theirs, their_frames = serialize_and_split(StockSerialize(MASKED[name]), context={"pickle-protocol": 5})
        theirs["num-sub-frames"] = len(their_frames)
        assert msgpack.packb(header) == msgpack.packb(theirs)
        assert [bytes(frame) for frame in frames] == [bytes(frame) for frame in their_frames]

    def test_both_directions_without_trust(self, name: str) -> None:
        array = MASKED[name]
        header, frames = serialize(array, NO_PICKLE)
        header = over_the_wire(header)
        assert not needs_pickle(header)
        theirs = merge_and_deserialize(header, [memoryview(bytearray(frame)) for frame in frames])
        got = deserialize(header, [bytearray(frame) for frame in frames], UNTRUSTED)
        for copy in (theirs, got):
            assert type(copy) is np.ma.MaskedArray
            assert copy.dtype == array.dtype
            assert repr(copy.fill_value) == repr(array.fill_value)
            assert (copy.mask is np.ma.nomask) == (array.mask is np.ma.nomask)
            np.testing.assert_array_equal(copy.mask, array.mask)
            np.testing.assert_array_equal(copy.data, array.data)


def test_masked_constant() -> None:
    header, frames = serialize(np.ma.masked, NO_PICKLE)
    assert frames == []
    assert deserialize(over_the_wire(header), [], UNTRUSTED) is np.ma.masked
    assert merge_and_deserialize(header, []) is np.ma.masked
    assert not needs_pickle(header)


def test_subclasses_arrive_as_what_they_view(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "data", "i4", "w+", shape=(3,))
    records = np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
    for array in (mapped, records):
        header, frames = serialize(array, NO_PICKLE)
        theirs = serialize_and_split(StockSerialize(array), context={"pickle-protocol": 5})[0]
        assert header["type-serialized"] == theirs["type-serialized"]
        assert header["sub-header"] == theirs["sub-header"]
        got = deserialize(over_the_wire(header), frames, UNTRUSTED)
        assert type(got) is np.ndarray
        assert got.dtype == array.dtype
        assert got.tolist() == array.tolist()


class Celsius(np.ndarray):  # type: ignore[type-arg]
    """A subclass that is not registered by name."""


def test_unknown_subclass_takes_trust() -> None:
    header, frames = serialize(np.arange(3).view(Celsius), EncodeContext())
    assert needs_pickle(header)
    with pytest.raises(UnsafePayload, match="Celsius"):
        deserialize(header, frames, UNTRUSTED)
    assert deserialize(header, frames, DecodeContext()).tolist() == [0, 1, 2]


class TestMemory:
    @pytest.mark.parametrize(
        "name", ["c order", "fortran order", "transposed", "big-endian", "dates", "nested", "long double", "matrix"]
    )
    def test_sending_copies_nothing(self, name: str) -> None:
        array = ARRAYS[name]
        for shard in (None, 16):
            _, frames = serialize(array, EncodeContext(shard=shard))
            assert all(np.shares_memory(np.frombuffer(frame, "u1"), array) for frame in frames)
            assert all(memoryview(frame).format == "B" for frame in frames)

    def test_shards_of_one_array_have_one_owner(self) -> None:
        # framing tells by the owner which frames belong together (wire document, section 2)
        _, frames = serialize(np.arange(10), EncodeContext(shard=24))
        assert [len(frame) for frame in frames] == [24, 24, 24, 8]
        assert len({id(frame.obj) for frame in frames}) == 1

    def test_shards_are_cut_between_items(self) -> None:
        _, frames = serialize(np.arange(10), EncodeContext(shard=30))
        assert [len(frame) for frame in frames] == [24, 24, 24, 8]
        _, frames = serialize(np.arange(2), EncodeContext(shard=3))
        assert [len(frame) for frame in frames] == [8, 8]

    def test_writable_memory_is_used_as_it_is(self) -> None:
        header, frames = serialize(GRID, EncodeContext())
        memory = bytearray(frames[0])
        got = deserialize(header, [memory], DecodeContext())
        got[0, 0] = 77
        assert memory[0] == 77

    def test_read_only_memory_is_copied_for_a_writable_array(self) -> None:
        header, frames = serialize(GRID, EncodeContext())
        memory = bytes(frames[0])
        got = deserialize(header, [memory], DecodeContext())
        got[0, 0] = 77
        assert memory == bytes(frames[0])

    def test_read_only_array_over_any_memory(self) -> None:
        header, frames = serialize(read_only(np.arange(3)), EncodeContext())
        for memory in (bytes(frames[0]), bytearray(frames[0])):
            got = deserialize(header, [memory], DecodeContext())
            assert not got.flags.writeable
            assert np.shares_memory(got, np.frombuffer(memory, "u1"))

    def test_a_repeated_item_is_never_spelled_out(self) -> None:
        huge = np.lib.stride_tricks.as_strided(np.array([7]), (2**40,), (0,))
        header, frames = serialize(huge, EncodeContext())
        assert [len(frame) for frame in frames] == [8]
        assert header["sub-header"]["writeable"] == [True]
        for memory in (bytes, bytearray):
            got = deserialize(header, [memory(frames[0])], UNTRUSTED)
            assert got.shape == (2**40,)
            assert got[2**39] == 7
            assert got.flags.writeable

    def test_neighbouring_shards_are_joined_without_a_copy(self) -> None:
        header, frames = serialize(np.arange(10), EncodeContext(shard=24))
        whole = memoryview(bytearray(b"front" + b"".join(frames)))
        pieces, position = [], 5
        for frame in frames:
            pieces.append(whole[position : position + len(frame)])
            position += len(frame)
        got = deserialize(header, pieces, DecodeContext())
        assert got.tolist() == list(range(10))
        assert np.shares_memory(got, np.frombuffer(whole, "u1"))

    @pytest.mark.parametrize(
        "memory", [bytes, bytearray, lambda frame: memoryview(bytearray(frame)), lambda frame: memoryview(bytes(frame))]
    )
    def test_other_shards_are_joined_into_writable_memory(self, memory: Any) -> None:
        header, frames = serialize(np.arange(10), EncodeContext(shard=24))
        got = deserialize(header, [memory(frame) for frame in frames], DecodeContext())
        got += 1
        assert got.tolist() == list(range(1, 11))

    def test_shards_out_of_order_in_one_buffer(self) -> None:
        header, frames = serialize(np.arange(4), EncodeContext(shard=16))
        whole = memoryview(bytearray(bytes(frames[1]) + bytes(frames[0])))
        assert deserialize(header, [whole[16:], whole[:16]], DecodeContext()).tolist() == [0, 1, 2, 3]


class TestObjects:
    @pytest.mark.parametrize(
        "array",
        [
            np.array([1, "a", None], object),
            np.array([(1, [2])], [("a", "i4"), ("o", "O")]),
            np.array(["a", "longer text"], np.dtypes.StringDType()),
            np.zeros(3, np.dtype([])),
            np.zeros(2, "V0"),
        ],
        ids=["object", "object field", "string dtype", "no fields", "size 0"],
    )
    def test_travel_as_pickles_and_take_trust(self, array: Any) -> None:
        with pytest.raises(UnsafePayload, match="is not trusted"):
            serialize(array, NO_PICKLE)
        header, frames = serialize(array, EncodeContext())
        assert header["sub-header"] == {"pickle": True}
        assert needs_pickle(header)
        with pytest.raises(UnsafePayload, match="was not loaded"):
            deserialize(header, frames, UNTRUSTED)
        assert_same(array, deserialize(over_the_wire(header), frames, DecodeContext()))
        assert_same(array, merge_and_deserialize(over_the_wire(header), frames))

    def test_same_as_stock(self) -> None:
        array = np.array([1, "a", None], object)
        header, frames = serialize(array, EncodeContext())
        theirs, their_frames = serialize_and_split(StockSerialize(array), context={"pickle-protocol": 5})
        assert header["sub-header"] == theirs["sub-header"]
        assert [bytes(frame) for frame in frames] == [bytes(frame) for frame in their_frames]
        assert deserialize(theirs, their_frames, DecodeContext()).tolist() == array.tolist()

    def test_masked_objects(self) -> None:
        array = np.ma.MaskedArray(np.array([1, None], object), mask=[0, 1])
        header, frames = serialize(array, EncodeContext())
        assert needs_pickle(header)
        got = deserialize(over_the_wire(header), frames, DecodeContext())
        assert got.tolist() == [1, None]
        assert merge_and_deserialize(over_the_wire(header), frames).tolist() == [1, None]
        with pytest.raises(UnsafePayload):
            deserialize(header, frames, UNTRUSTED)

    def test_dtype_with_metadata_takes_trust(self) -> None:
        array = np.zeros(2, np.dtype([("a", "i4")], metadata={"unit": "m"}))
        with pytest.raises(UnsafePayload, match="metadata"):
            serialize(array, NO_PICKLE)
        header, frames = serialize(array, EncodeContext())
        assert needs_pickle(header)
        with pytest.raises(UnsafePayload, match="a numpy dtype came as a pickle"):
            deserialize(header, frames, UNTRUSTED)
        assert deserialize(header, frames, DecodeContext()).dtype.metadata == {"unit": "m"}

    def test_dtype_that_cannot_be_pickled(self) -> None:
        array = np.zeros(2, np.dtype([("a", "i4")], metadata={"f": lambda: 0}))
        with pytest.raises(SerializationError, match="can't be pickled"):
            serialize(array, EncodeContext())

    def test_fill_value_that_takes_trust(self) -> None:
        array = np.ma.MaskedArray(np.zeros(2, np.dtype([("a", "i4")])), mask=[1, 0])
        header, frames = serialize(array, NO_PICKLE)
        header["sub-header"]["fill-value"] = (True, pickle.dumps([1]))
        assert needs_pickle(header)
        with pytest.raises(UnsafePayload, match="fill value came as a pickle"):
            deserialize(header, frames, UNTRUSTED)

    def test_fill_value_cannot_be_sent_without_trust(self) -> None:
        # A long double is a pickle of its own kind; one of a dtype with metadata is not read without trust.
        array = np.ma.MaskedArray(np.zeros(2, np.dtype([("a", "i4")])), mask=[1, 0])
        array._fill_value = np.zeros((), np.dtype([("a", "i4")], metadata={"k": 1}))  # type: ignore[attr-defined]
        with pytest.raises(UnsafePayload, match="fill value"):
            serialize(array, NO_PICKLE)
        assert serialize(array, EncodeContext())[0]["sub-header"]["fill-value"][0] is True


class TestBare:
    @pytest.mark.parametrize(
        "value",
        [np.arange(3), np.zeros(2, NESTED), np.eye(2).view(np.matrix), np.ma.MaskedArray([1, 2], mask=[0, 1])],
        ids=["array", "structured", "matrix", "masked"],
    )
    def test_is_sent_as_dask_family(self, value: Any) -> None:
        assert bare_numpy(value)

    @pytest.mark.parametrize(
        "value",
        [
            None,
            5,
            np.float64(1),
            np.array([None]),
            np.array(["a"], np.dtypes.StringDType()),
            np.zeros(2, "V0"),
            np.arange(3).view(Celsius),
            np.rec.array([(1,)], dtype=[("a", "i4")]),
            np.ma.MaskedArray([1], hard_mask=True),
            np.ma.masked,
            type("MaskedArray", (), {})(),
        ],
        ids=repr,
    )
    def test_is_left_to_pickle(self, value: Any) -> None:
        assert not bare_numpy(value)

    def test_without_numpy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        array = np.arange(3)
        monkeypatch.delitem(sys.modules, "numpy")
        assert not bare_numpy(array)


def test_import_loads_nothing_optional() -> None:
    code = (
        "import sys, trio_dcore.protocol._families as families; families.bare_numpy(5); "
        "print(sorted({'numpy', 'lz4', 'snappy', 'zstandard', 'cloudpickle', 'ctypes', 'trio'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert output.stdout.strip() == "[]"


def test_without_numpy_an_array_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    header, frames = serialize(np.zeros(2, NESTED), EncodeContext())
    monkeypatch.setitem(sys.modules, "numpy", None)  # type: ignore[arg-type]
    with pytest.raises(SerializationError, match=r"numpy\.ndarray came, and numpy is needed"):
        deserialize(header, frames, UNTRUSTED)
    assert needs_pickle({**header, "sub-header": {**header["sub-header"], "dtype": (0, "<i4")}})


# -- dtypes ----------------------------------------------------------------------------------------------------------------------

SCALAR_DTYPES = ["?", "i1", ">i2", "<u8", "f2", ">f8", "g", "c8", "S5", "U3", ">U3", "V7", "M8[ns]", ">M8[25s]", "m8", "M8"]
FIELD_NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=5)


def structured(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    sub_arrays = st.tuples(children, st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple)).map(np.dtype)
    return st.tuples(
        st.lists(FIELD_NAMES, min_size=1, max_size=4, unique=True),
        st.lists(children | sub_arrays, min_size=4, max_size=4),
        st.booleans(),
    ).map(lambda parts: np.dtype(list(zip(parts[0], parts[1], strict=False)), align=parts[2]))


DTYPES = st.recursive(st.sampled_from(SCALAR_DTYPES).map(np.dtype), structured, max_leaves=12)


class TestReadingDtypes:
    @given(dtype=DTYPES, protocol=st.sampled_from([4, 5]))
    def test_reads_what_numpy_writes(self, dtype: np.dtype[Any], protocol: int) -> None:
        got = read_dtype(pickle.dumps(dtype, protocol))
        assert got == dtype
        assert got.isalignedstruct == dtype.isalignedstruct
        assert got.type is dtype.type
        assert pickle.dumps(got) == pickle.dumps(dtype)

    @pytest.mark.parametrize("dtype", STRUCTURED.values(), ids=STRUCTURED)
    def test_reads_special_ones(self, dtype: Any) -> None:
        dtype = np.dtype(dtype)
        got = read_dtype(memoryview(pickle.dumps(dtype)))
        assert (got, got.type, got.fields, got.isalignedstruct) == (dtype, dtype.type, dtype.fields, dtype.isalignedstruct)

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (np.dtype("O"), "no dtype"),
            (np.dtype([("a", "O")]), "no dtype"),
            (np.dtype([("a", "i4")], metadata={"a": 1}), "metadata"),
            (np.dtype("i4", metadata={"a": 1}), "metadata"),
            (np.dtype("M8[ns]", metadata={"a": 1}), "metadata"),
            (np.dtypes.StringDType(), "refers to"),
            ([np.dtype("i4")], "opcode"),
            ((np.dtype("i4"), 1), "no dtype"),
            ({}, "no dtype"),
            ("i4", "no dtype"),
            (np.ndarray, "refers to"),
            (os.getpid, "refers to"),
        ],
        ids=repr,
    )
    def test_refuses_all_else(self, value: object, reason: str) -> None:
        with pytest.raises(Unreadable, match=reason):
            read_dtype(pickle.dumps(value))

    def test_never_shows_what_has_no_end(self) -> None:
        """Tuples of the tuple before, twice: 60 of them take 240 bytes, and their repr() takes 2**60 steps."""
        nested = b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60))
        for code in (nested + b"\x8c\x05dtype\x93.", b"\x8c\x05numpy" + nested + b"\x93.", nested + b"."):
            with pytest.raises(Unreadable):
                read_dtype(b"\x80\x04" + code)

    def test_a_short_pickle_does_not_build_thousands_of_wide_ones(self) -> None:
        """A few bytes recall names and fields and build a dtype of them, again and again."""

        def text(value: str) -> bytes:
            return b"\x8c%c" % len(value) + value.encode()

        def build(kind: str, state: bytes) -> bytes:
            return b"h\0" + text(kind) + b"\x89\x88\x87R" + b"\x94" * (kind == "u1") + b"(K\3" + text("|") + state + b"K\0tb"

        names = [text(f"{i:x}") for i in range(1000)]
        start = text("numpy") + text("dtype") + b"\x93\x94" + build("u1", b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff")
        start += b"K\0\x86\x94" + b"(" + b"".join(names) + b"t\x94" + b"}\x94(" + b"".join(name + b"h\2" for name in names) + b"u"
        data = b"\x80\x04" + start + 500 * build("V1", b"Nh\3h\4K\1K\1") + b"."
        with (
            mock.patch.object(_numpy_dtypes, "_structure", wraps=_numpy_dtypes._structure) as built,
            pytest.raises(Unreadable, match="too many fields"),
        ):
            read_dtype(data)
        assert built.call_count == 11

    @pytest.mark.parametrize(
        ("dtype", "text", "changes"),
        [
            ("i8", None, {7: 1}),  # objects: an array of them over received bytes would be one of pointers
            ("V8", None, {7: 2}),
            ([("a", "i8")], None, {7: 4}),
            ([("a", "i8")], None, {7: -1}),
            ([("a", "i8")], None, {6: 0}),
            ([("a", "i8")], None, {6: 3}),
            ([("a", "i8")], None, {6: 2**40}),
            ([("a", "i8")], None, {6: None}),
            ([("a", "i8")], None, {5: -1}),
            ([("a", "i8")], "i8", {}),  # an i8 of another size, with fields behind its end
            ([("a", "i8")], "V4", {}),
            ([("a", "i8")], None, {4: {"a": (np.dtype("i8"), 0), "b": (np.dtype("i8"), 2**40)}}),
            ([("a", "i8")], None, {4: None}),
            ([(("t", "a"), "i8")], None, {4: {"a": (np.dtype("i8"), 0, "t"), "t": (np.dtype("i8"), 2**40, "t")}}),
            ([(("t", "a"), "i8")], None, {4: {"a": (np.dtype("i8"), 0, "t")}}),
            ("i8", None, {4: {"a": (np.dtype("i8"), 2**40)}}),
            ("V8", None, {5: -1}),
            ("S8", None, {5: -1}),
            (("i8", (2,)), None, {5: -1}),
            (("i8", (2,)), "i8", {}),
            (("i8", (2,)), None, {3: ("a",), 4: {"a": (np.dtype("i8"), 2**40)}}),
        ],
        ids=repr,
    )
    def test_refuses_what_numpy_would_take_for_another(self, dtype: Any, text: str | None, changes: dict[int, Any]) -> None:
        """What is read is passed on as it came; a peer that unpickles it gets all that the reader here doesn't use."""
        function, arguments, state = np.dtype(dtype).__reduce__()

        def written(text: str, state: tuple[Any, ...]) -> bytes:
            class Written:
                def __reduce__(self) -> Any:
                    return function, (text, *arguments[1:]), state

            return pickle.dumps(Written())

        read_dtype(written(arguments[0], state))
        lie = written(text or arguments[0], tuple(changes.get(index, part) for index, part in enumerate(state)))
        with pytest.raises(Unreadable):
            read_dtype(lie)

    @pytest.mark.parametrize("data", [None, 5, "i4", pickle.dumps(np.dtype("i4"), 2), b"", bytes(70_000)])
    def test_refuses_what_is_no_such_pickle(self, data: object) -> None:
        with pytest.raises(Unreadable):
            read_dtype(data)

    @given(data=st.data())
    def test_any_change_is_refused_or_a_harmless_dtype(self, data: st.DataObject) -> None:
        code = bytearray(pickle.dumps(data.draw(st.sampled_from([NESTED, ALIGNED, TITLED, RECORD, GAPPED])), 5))
        for _ in range(data.draw(st.integers(1, 3))):
            what = data.draw(st.sampled_from(["flip", "cut", "insert"]))
            index = data.draw(st.integers(0, len(code) - 1))
            if what == "flip":
                code[index] = data.draw(st.integers(0, 255))
            elif what == "cut":
                del code[index : index + data.draw(st.integers(1, 4))]
            else:
                code[index:index] = data.draw(st.binary(min_size=1, max_size=4))
            if not code:
                break
        try:
            dtype = read_dtype(bytes(code))
        except Unreadable:
            return
        assert not dtype.hasobject
        repr(dtype), hash(dtype)
        np.zeros(2, dtype).tolist()

    @given(st.binary(max_size=50))
    def test_any_bytes_are_refused(self, tail: bytes) -> None:
        for head in (b"\x80\x04", pickle.dumps(np.dtype("i4"), 5)[:60], pickle.dumps(NESTED, 5)[:120]):
            try:
                read_dtype(head + tail)
            except Unreadable:
                continue

    @staticmethod
    def machine(body: bytes) -> bytes:
        """A pickle: numpy.dtype is memo 0, a finished i4 is memo 1 and on the stack; then the body."""
        return (
            b"\x80\x05\x8c\x05numpy\x8c\x05dtype\x93\x94"
            b"\x8c\x02i4\x89\x88\x87R\x94(K\x03\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + body + b"."
        )

    @pytest.mark.parametrize(
        "body",
        [
            b"Nb",  # the state of a finished dtype is set again
            b"h\x07",  # memo that isn't there
            b"j\x07\x00\x00\x00",
            b"t",  # no mark
            b"\x85\x86\x87",  # stack too short
            b"N",  # two values
            b"K\x01h\x00R",
            b"h\x00)R",
            b"h\x00\x8c\x02i4\x88\x88\x87R",
            b"h\x00K\x01\x89\x88\x87R",
            b"h\x00h\x00\x89\x88\x87R",
            b"\x8c\x05numpy\x8c\x06record\x93)R",
            b"\x8c\x16numpy._core.multiarray\x8c\x06scalar\x93)R",
            b"\x8c\x16numpy._core.multiarray\x8c\x06scalar\x93K\x01C\x04abcd\x86R",
            b"h\x00\x8c\x05numpy\x8c\x06record\x93\x89\x88\x87R(K\x03\x8c\x01|NNNK\x08K\x01K\x00tb",  # without fields
            b"\x8c\x01a\x8c\x01b\x93",
            b"K\x01K\x02\x93",
            b"K\x01b",
            b"}K\x01K\x02s",
            b"K\x01K\x02K\x03s",
            b"}(K\x01u",
            b"X\xff\xff\xff\x7fabc",
            b"C\x02\xff",
            b"B\xff\xff\xff\xffx",
            b"\x8c\x02\xff\xff",
            b"i",
        ],
    )
    def test_code_that_numpy_does_not_write(self, body: bytes) -> None:
        with pytest.raises(Unreadable):
            read_dtype(self.machine(body))

    @staticmethod
    def dtype_code(text: bytes, state: bytes) -> bytes:
        return b"h\x00\x8c" + bytes([len(text)]) + text + b"\x89\x88\x87R" + state + b"b"

    @pytest.mark.parametrize(
        "state",
        [
            b"N",  # no tuple
            b"(K\x03t",  # too short
            b"(K\x04\x8c\x01|NNNK\x08K\x01K\x00t",  # wrong version
            b"(K\x03\x8c\x01xNNNK\x08K\x01K\x00t",  # byte order
            b"(K\x03\x8c\x01|NNNNK\x01K\x00t",  # item size
            b"(K\x03\x8c\x01|NNNK\x09K\x01K\x00t",  # item size of another
            b"(K\x03\x8c\x01|K\x01NNK\x08K\x01K\x00t",  # sub-array of a number
            b"(K\x03\x8c\x01|h\x00K\x01\x86NNK\x08K\x01K\x00t",  # of what is no dtype
            b"(K\x03\x8c\x01|h\x01\x8c\x01a\x85\x86NNK\x08K\x01K\x00t",  # shape of text
            b"(K\x03\x8c\x01|h\x01J\xff\xff\xff\xff\x85\x86NNK\x08K\x01K\x00t",  # negative
            b"(K\x03\x8c\x01|h\x01J\xff\xff\xff\x7f\x85\x86NNK\x08K\x01K\x00t",  # huge
            b"(K\x03\x8c\x01|h\x01(" + b"K\x01" * 33 + b"t\x86NNK\x08K\x01K\x00t",  # too many dimensions
            b"(K\x03\x8c\x01|NK\x01}K\x08K\x01K\x00t",  # names of a number
            b"(K\x03\x8c\x01|N\x8c\x01a\x85NK\x08K\x01K\x00t",  # no fields
            b"(K\x03\x8c\x01|N\x8c\x01a\x85}K\x08K\x01K\x00t",  # name without field
            b"(K\x03\x8c\x01|NK\x01\x85}K\x08K\x01K\x00t",  # name of a number
            b"(K\x03\x8c\x01|N\x8c\x01a\x85}\x8c\x01ah\x01\x85sK\x08K\x01K\x00t",  # field of one part
            b"(K\x03\x8c\x01|N\x8c\x01a\x85}\x8c\x01ah\x01K\x05\x86sK\x08K\x01K\x00t",  # field beyond the item
            b"(K\x03\x8c\x01|N\x8c\x01a\x85}\x8c\x01ah\x01J\xff\xff\xff\xff\x86sK\x08K\x01K\x00t",  # before it
            b"(K\x03\x8c\x01|N\x8c\x01a\x8c\x01a\x86}\x8c\x01ah\x01K\x00\x86sK\x08K\x01K\x00t",  # the same twice
            b"(K\x03\x8c\x01|N\x8c\x01a\x85}\x8c\x01ah\x01K\x01\x86sK\x08K\x01K\x80t",  # not aligned, says it is
            b"(K\x03\x8c\x01|N\x8c\x01a\x85}\x8c\x01ah\x01K\x00\x86sJ\xff\xff\xff\xffK\x01K\x00t",  # negative item size
        ],
    )
    def test_states_that_numpy_does_not_write(self, state: bytes) -> None:
        with pytest.raises(Unreadable) as caught:
            read_dtype(self.machine(self.dtype_code(b"V8", state)))
        assert "more in it than one value" not in str(caught.value)  # it got no further than the state

    def test_a_few_bytes_cannot_mean_millions_of_fields(self) -> None:
        # Each level has the one before twice: 2**40 fields in about 2 KiB.
        code = b""
        size = 4
        memo = 2
        for _ in range(40):
            field = b"\x8c\x01ah" + bytes([memo - 1]) + b"K\x00\x86\x8c\x01bh" + bytes([memo - 1]) + b"K\x00\x86"
            state = b"(K\x03\x8c\x01|N\x8c\x01a\x8c\x01b\x86}(" + field + b"u" + b"K" + bytes([size]) + b"K\x01K\x10t"
            code += b"h\x00\x8c\x02V4\x89\x88\x87R\x94" + state + b"b"
            memo += 1
        with pytest.raises(Unreadable, match="too many fields"):
            read_dtype(self.machine(code))

    def test_too_deep(self) -> None:
        dtype = np.dtype("i4")
        for _ in range(31):
            dtype = np.dtype([("a", dtype)])
        assert read_dtype(pickle.dumps(dtype)) == dtype
        with pytest.raises(Unreadable, match="too deeply"):
            read_dtype(pickle.dumps(np.dtype([("a", dtype)])))


class TestPlainDtypes:
    @pytest.mark.parametrize("text", ["<i4", "|b1", ">f8", "|S3", "<U4", "|V8", "<M8[ns]", "<m8[25s]", "<M8", "=c16"])
    def test_known(self, text: str) -> None:
        assert plain_dtype(text) == np.dtype(text)

    @pytest.mark.parametrize(
        "text",
        [
            *(None, 5, b"<i4", ["<i4"], "", "int", "<i4 ", "<i4\n", "é4", "i4,i4", "(2,)i4", "<i4[ns]", "datetime64[ns]"),
            *("|O", "|O8", "O", "|T16", "<i3", "<f7", "|S0", "|V0", "<U0", "<U999999999", "<i99999999999"),
            *("<M8[xx]", "<M8[0s]", "<M4[s]"),
        ],
    )
    def test_refused(self, text: object) -> None:
        with pytest.raises(Unreadable):
            plain_dtype(text)


class TestReadingScalars:
    @pytest.mark.parametrize(
        "value",
        [
            *(np.datetime64("2020"), np.timedelta64(3, "s"), np.complex128(1j), np.float16(1), np.longdouble(2)),
            *(np.str_("ab"), np.str_(""), np.bytes_(b"a"), np.void(b"abc"), np.zeros(1, NESTED)[0], np.zeros(1, RECORD)[0]),
        ],
        ids=repr,
    )
    def test_reads_what_numpy_writes(self, value: Any) -> None:
        got = read_scalar(pickle.dumps(value, 5))
        assert type(got) is type(value)
        assert got.dtype == value.dtype
        assert got.tobytes() == value.tobytes()

    def test_long_ones(self) -> None:
        assert read_scalar(pickle.dumps(np.bytes_(b"x" * 300), 5)) == b"x" * 300

    @pytest.mark.parametrize("value", [5, np.dtype("i4"), [np.float16(1)], np.array([1])], ids=repr)
    def test_refuses_all_else(self, value: object) -> None:
        with pytest.raises(Unreadable):
            read_scalar(pickle.dumps(value, 5))

    @pytest.mark.parametrize("size", [1, 3])
    def test_bytes_must_fit(self, size: int) -> None:
        code = pickle.dumps(np.float16(1), 5).replace(b"C\x02\x00\x3c", b"C" + bytes([size]) + bytes(size))
        with pytest.raises(Unreadable, match="don't fit"):
            read_scalar(code)


# -- headers that lie ------------------------------------------------------------------------------------------------------------


def header_of(array: Any, **changes: Any) -> tuple[dict[str, Any], list[Any]]:
    header, frames = serialize(array, EncodeContext())
    header["sub-header"] = {**header["sub-header"], **changes}
    return header, [bytearray(frame) for frame in frames]


class TestLies:
    @pytest.mark.parametrize(
        "changes",
        [
            {"dtype": None},
            {"dtype": (0,)},
            {"dtype": (0, "|O")},
            {"dtype": (0, "|S0")},
            {"dtype": (0, (("a", "<i4"),))},
            {"dtype": "<i4"},
            {"shape": None},
            {"shape": (-3, 4)},
            {"shape": (3.0, 4)},
            {"shape": (True, 4)},
            {"shape": (2**70, 0)},
            {"shape": (2**62, 2**62)},
            {"shape": (2**62, 0), "strides": (1, 1)},
            {"shape": (3,)},
            {"shape": (1,) * 65, "strides": (0,) * 65},
            {"shape": (3, 5)},
            {"shape": (4, 4)},
            {"strides": None},
            {"strides": (16,)},
            {"strides": (-16, 4)},
            {"strides": (17, 4)},
            {"strides": (16, 2**62)},
            {"strides": (2**70, 4)},
            {"strides": ("16", 4)},
            {"broadcast_to": (4, 4)},
            {"broadcast_to": "12"},
            {"writeable": None},
            {"writeable": ()},
            {"writeable": [True, True]},
            {"shape": (), "strides": (), "dtype": (0, "|S49")},
            {"shape": (12,), "strides": (4,), "matrix": True},
        ],
        ids=repr,
    )
    def test_is_refused(self, changes: dict[str, Any]) -> None:
        header, frames = header_of(GRID, **changes)
        with pytest.raises(RemoteProtocolError, match="the header of a numpy array"):
            deserialize(header, frames, DecodeContext())

    def test_more_dimensions_than_numpy_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # As with numpy 1, which takes 32.
        monkeypatch.setattr("trio_dcore.protocol._numpy._MAX_DIMENSIONS", 100)
        header, frames = header_of(GRID, shape=(1,) * 65, strides=(0,) * 65)
        with pytest.raises(RemoteProtocolError, match="can't be used"):
            deserialize(header, frames, DecodeContext())

    def test_missing_keys(self) -> None:
        for key in ("dtype", "shape", "strides", "writeable"):
            header, frames = header_of(GRID)
            del header["sub-header"][key]
            with pytest.raises(RemoteProtocolError, match=key):
                deserialize(header, frames, DecodeContext())

    def test_number_of_frames(self) -> None:
        header, frames = header_of(GRID)
        for count in (0, 2):
            changed = {"sub-header": header["sub-header"], "type-serialized": header["type-serialized"], "serializer": "dask"}
            with pytest.raises(RemoteProtocolError, match=f"{count} frames"):
                deserialize(changed, frames * count, DecodeContext())
        changed["sub-header"] = {"pickle": True}
        with pytest.raises(RemoteProtocolError, match="without a frame"):
            deserialize(changed, [], DecodeContext())

    @pytest.mark.parametrize(
        "dtype", [np.dtype("O"), np.dtype([("a", "O")]), np.dtypes.StringDType(), np.dtype([]), np.dtype(("i4", 3)), 5]
    )
    def test_a_trusted_peer_may_not_send_pointers_either(self, dtype: Any) -> None:
        header, frames = header_of(np.arange(12), dtype=(1, pickle.dumps(dtype)))
        with pytest.raises(RemoteProtocolError, match="raw bytes"):
            deserialize(header, frames, DecodeContext())

    @pytest.mark.parametrize("data", [None, 5, "x"])
    def test_pickled_dtype_that_is_no_pickle(self, data: object) -> None:
        header, frames = header_of(np.arange(12), dtype=(1, data))
        with pytest.raises(RemoteProtocolError, match="no pickle"):
            deserialize(header, frames, DecodeContext())

    def test_truth_counts_as_in_stock(self) -> None:
        # A header that our check took for plain, and stock behind us for a pickle, would carry code past the check.
        header, _ = header_of(GRID, dtype=(2, pickle.dumps(os.getpid)))
        assert needs_pickle(header)
        header, _ = header_of(GRID, pickle=1)
        assert needs_pickle(header)
        header, _ = header_of(GRID, dtype=None)
        assert needs_pickle(header)

    def test_strides_of_an_empty_array_do_not_matter(self) -> None:
        header, frames = header_of(np.empty((0, 3)), strides=(-5, 2**60))
        assert deserialize(header, frames, DecodeContext()).shape == (0, 3)

    @pytest.mark.parametrize(
        "changes",
        [
            {"nframes": None},
            {"nframes": 3},
            {"nframes": -1},
            {"data-header": None},
            {"mask-header": None},
            {"mask-header": {}},
            {"fill-value": None},
            {"fill-value": (False,)},
            {"fill-value": (False, "text")},
            {"fill-value": (True, 5)},
            {"mask-header": {"dtype": (0, "|b1"), "shape": (1,), "strides": (1,), "writeable": [True]}},
        ],
        ids=repr,
    )
    def test_masked(self, changes: dict[str, Any]) -> None:
        header, frames = header_of(MASKED["ints"], **changes)
        with pytest.raises(RemoteProtocolError, match="the header of a numpy array"):
            deserialize(header, frames, DecodeContext())

    @pytest.mark.parametrize(
        "changes", [{"data-header": None}, {"mask-header": 5}, {"fill-value": 5}, {"data-header": {"pickle": 1}}]
    )
    def test_masked_is_not_passed_on(self, changes: dict[str, Any]) -> None:
        assert needs_pickle(header_of(MASKED["ints"], **changes)[0])

    @pytest.mark.parametrize("dtype", [(0, "|u1"), (0, "<f8"), (1, pickle.dumps(np.dtype([("a", "?")])))], ids=repr)
    def test_a_mask_of_another_type(self, dtype: Any) -> None:
        """numpy would make a mask of it, with a byte for every item that the header tells of."""
        mask = {"dtype": dtype, "shape": (1,), "strides": (0, 0), "broadcast_to": (2**20, 2**20), "writeable": [True]}
        data = {**mask, "dtype": (0, "|u1")}
        header, _ = header_of(MASKED["ints"], **{"data-header": data, "mask-header": mask})
        with pytest.raises(RemoteProtocolError, match="isn't one of its data's type"):
            deserialize(header, [bytearray(8), bytearray(8)], UNTRUSTED)

    def test_a_mask_of_records_that_repeats_its_items(self) -> None:
        """numpy copies it, so its size counts; one of bools it doesn't copy."""
        what = (1, pickle.dumps(np.dtype([("a", "?")])))
        mask = {"dtype": what, "shape": (1,), "strides": (0, 0), "broadcast_to": (2**20, 2**20), "writeable": [True]}
        header, _ = header_of(MASKED["ints"], **{"data-header": mask, "mask-header": mask})
        with pytest.raises(RemoteProtocolError, match="repeats its items"):
            deserialize(header, [bytearray(8), bytearray(8)], UNTRUSTED)
        plain = {**mask, "dtype": (0, "|b1")}
        header, _ = header_of(MASKED["ints"], **{"data-header": plain, "mask-header": plain})
        assert deserialize(header, [bytearray(8), bytearray(8)], UNTRUSTED).shape == (2**20, 2**20)

    def test_a_mask_that_we_send_repeats_no_records(self) -> None:
        array = np.ma.MaskedArray(np.zeros(1, [("a", "i4")]), mask=[(True,)])
        repeated = np.broadcast_to(array, (3, 2), subok=True)
        repeated.mask = np.broadcast_to(array.mask, (3, 2))
        got = deserialize(*serialize(repeated, NO_PICKLE), UNTRUSTED)
        assert got.shape == (3, 2)
        assert got.mask["a"].all()

    def test_items_that_did_not_come(self) -> None:
        """An empty masked array has a fill value, which is as large as an item says it is."""
        data = {"dtype": (0, "<U100000000"), "shape": (0,), "strides": (1,), "writeable": [True]}
        header, _ = header_of(MASKED["no mask"], **{"data-header": data, "fill-value": (False, "x")})
        with pytest.raises(RemoteProtocolError, match="400000000 bytes, and has none"):
            deserialize(header, [b""], UNTRUSTED)

    @pytest.mark.parametrize(("shape", "strides"), [((4, 4), (1, 1)), ((2, 7), (1, 1)), ((9, 3, 4), (0, 2, 1))], ids=repr)
    def test_items_that_overlap(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        """Whoever copies such an array has more than came."""
        header, frames = header_of(np.zeros(8, "u1"), shape=shape, strides=strides)
        with pytest.raises(RemoteProtocolError, match="overlap"):
            deserialize(header, frames, UNTRUSTED)

    @pytest.mark.parametrize(("shape", "strides"), [((4, 2, 2), (0, 3, 1)), ((5, 2**40), (1, 0)), ((1, 8), (1, 1))], ids=repr)
    def test_axes_that_repeat_one_item(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        """They have a stride of 0, and so a handler can tell them."""
        header, frames = header_of(np.zeros(8, "u1"), shape=shape, strides=strides)
        assert deserialize(header, frames, UNTRUSTED).shape == shape

    def test_masked_with_data_that_is_no_array(self) -> None:
        header, frames = header_of(MASKED["ints"], **{"data-header": {"pickle": True}})
        frames[0] = pickle.dumps("no array")
        with pytest.raises(RemoteProtocolError, match="another shape"):
            deserialize(header, frames, DecodeContext())


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**64), 2**64), st.floats(), st.text(max_size=4), st.binary(max_size=4),
    st.lists(st.integers(-10, 100), max_size=4).map(tuple),
)  # fmt: skip


class TestFuzz:
    @given(
        shape=st.lists(st.integers(-1, 6) | st.integers(-(2**65), 2**65), max_size=4).map(tuple),
        strides=st.lists(st.integers(-8, 40) | st.integers(-(2**65), 2**65), max_size=4).map(tuple),
        dtype=st.sampled_from(["|u1", "<i4", "<f8", "|S3", "<U1", "<M8[s]", "|O", "|V0"]),
        broadcast=st.none() | st.lists(st.integers(0, 6), max_size=4).map(tuple),
        size=st.integers(0, 100),
        writeable=st.booleans(),
        matrix=st.booleans(),
    )
    @settings(max_examples=300)
    def test_layouts(
        self, shape: Any, strides: Any, dtype: str, broadcast: Any, size: int, writeable: bool, matrix: bool
    ) -> None:
        sub_header = {
            "dtype": (0, dtype),
            "shape": shape,
            "strides": strides,
            "writeable": [writeable],
            "broadcast_to": broadcast,
        }
        header = {**header_of(GRID)[0], "sub-header": {**sub_header, "matrix": matrix}}
        memory = bytearray(size)
        try:
            array = deserialize(header, [memory], UNTRUSTED)
        except RemoteProtocolError:
            return
        low, high = np.lib.array_utils.byte_bounds(array)
        start = np.frombuffer(memory, "u1").__array_interface__["data"][0] if size else low
        assert array.size == 0 or start <= low <= high <= start + size

    @given(
        changes=st.dictionaries(
            st.sampled_from(["dtype", "shape", "strides", "writeable", "broadcast_to", "pickle", "matrix"]), ODD
        )
    )
    def test_any_sub_header(self, changes: dict[str, Any]) -> None:
        for value in (GRID, np.zeros(2, NESTED)):
            header, frames = header_of(value, **changes)
            try:
                deserialize(header, frames, UNTRUSTED)
            except (RemoteProtocolError, UnsafePayload):
                continue

    @given(
        changes=st.dictionaries(
            st.sampled_from(["data-header", "nframes", "mask-header", "fill-value"]), ODD | st.tuples(st.booleans(), ODD)
        )
    )
    def test_any_masked_header(self, changes: dict[str, Any]) -> None:
        header, frames = header_of(MASKED["fill value"], **changes)
        try:
            deserialize(header, frames, UNTRUSTED)
        except (RemoteProtocolError, UnsafePayload):
            return

    @given(
        array=hnp.arrays(hnp.scalar_dtypes() | st.just(NESTED), hnp.array_shapes(max_dims=3, max_side=4, min_side=0)),
        data=st.data(),
    )
    @settings(max_examples=50)
    def test_round_trip(self, array: Any, data: st.DataObject) -> None:
        if array.ndim:
            array = array[data.draw(hnp.basic_indices(array.shape, allow_newaxis=True))]
        if not isinstance(array, np.ndarray) or array.dtype.itemsize == 0:
            return
        shard = data.draw(st.none() | st.integers(1, 40))
        header, frames = serialize(array, EncodeContext(shard=shard, allow_pickle=lambda: False))
        got = deserialize(over_the_wire(header), [bytearray(frame) for frame in frames], UNTRUSTED)
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert repr(got) == repr(array)  # not a number, nor a date, equals itself
