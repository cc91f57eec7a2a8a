"""The families: both directions against stock, trust, users' classes, shards and compression, and headers that lie."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from array import array, typecodes
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from distributed.protocol import dumps as stock_dumps
from distributed.protocol import loads as stock_loads
from distributed.protocol.serialize import Serialize as StockSerialize
from distributed.protocol.serialize import ToPickle as StockToPickle
from distributed.protocol.serialize import dask_deserialize, dask_serialize, merge_and_deserialize, serialize_and_split
from hypothesis import given
from hypothesis import strategies as st

from trio_dcore.protocol import (
    DecodeContext,
    EncodeContext,
    LimitExceeded,
    Limits,
    Pickled,
    RemoteProtocolError,
    SerializationError,
    Serialized,
    UnsafePayload,
)
from trio_dcore.protocol import _registry as registry
from trio_dcore.protocol._compression import CODECS, Budget
from trio_dcore.protocol._families import (
    deserialize,
    needs_pickle,
    open_serialized,
    pickled_parts,
    register_serialization,
    serialize,
    unpickle_parts,
)

UNTRUSTED = DecodeContext(allow_pickle=lambda: False)
NO_PICKLE = EncodeContext(allow_pickle=lambda: False)
TEXT = b"Grace is a deadline on the handlers' nursery. " * 1000


def over_the_wire(header: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(header), use_list=False, strict_map_key=False)


def stock_parts(value: Any, **context: Any) -> tuple[dict[str, Any], list[Any]]:
    """Header and frames as a stock peer transmits them."""
    shard = context.pop("shard", None)
    context = {"pickle-protocol": 5, "compression": None, **context}
    frames = stock_dumps([StockSerialize(value)], on_error="raise", context=context, frame_split_size=shard)
    return msgpack.unpackb(frames[1], use_list=False, strict_map_key=False), frames[2:]


def to_stock(header: dict[str, Any], frames: list[Any]) -> Any:
    """What a stock peer makes of a header and its frames."""
    return stock_loads([msgpack.packb([{"__Serialized__": 1}]), msgpack.packb(header), *map(memoryview, frames)])[0]


BYTES_LIKE: dict[str, Any] = {
    "bytes": b"abc",
    "empty": b"",
    "bytearray": bytearray(b"abc"),
    "memoryview": memoryview(b"abcd"),
    "memoryview of ints": memoryview(b"abcdefgh").cast("i"),
    "memoryview, two-dimensional": memoryview(np.arange(6, dtype="i4").reshape(2, 3)),
    "memoryview, 0-d": memoryview(np.array(5)),
    "memoryview, strided": memoryview(b"abcdef")[::2],
    "memoryview, empty": memoryview(b""),
    "array of doubles": array("d", [1, 2]),
    "array, empty": array("i"),
    **{f"array {code}": array(code, [1, 2]) for code in typecodes if code not in "uw"},
    "array of text": array("w" if "w" in typecodes else "u", "hé"),
}


@pytest.mark.parametrize("shard", [None, 8])
@pytest.mark.parametrize("name", BYTES_LIKE)
class TestBytesLikes:
    def test_same_as_stock(self, name: str, shard: int | None) -> None:
        header, frames = serialize(BYTES_LIKE[name], EncodeContext(shard=shard))
        theirs, their_frames = stock_parts(BYTES_LIKE[name], shard=shard)
        assert over_the_wire(header) == theirs
        assert list(header) == list(theirs)
        if "two-d" in name:  # which stock cuts into odd pieces
            frames, their_frames = [b"".join(frames)], [b"".join(map(bytes, their_frames))]
        assert [bytes(frame) for frame in frames] == [bytes(frame) for frame in their_frames]

    def test_both_directions_without_trust(self, name: str, shard: int | None) -> None:
        value = BYTES_LIKE[name]
        header, frames = serialize(value, EncodeContext(shard=shard, allow_pickle=lambda: False))
        assert not needs_pickle(header)
        for memory in (bytes, bytearray, lambda frame: memoryview(bytearray(frame))):
            got = deserialize(over_the_wire(header), [memory(frame) for frame in frames], UNTRUSTED)
            assert type(got) is type(value)
            assert bytes(got) == bytes(value)
            if isinstance(got, memoryview):
                assert (got.format, got.shape) == (value.format, value.shape)
            if isinstance(got, array):
                assert got.typecode == value.typecode
        if "text" not in name:  # stock can't: its frame has the format "w"
            assert bytes(to_stock(header, frames)) == bytes(value)


class TestMemory:
    @pytest.mark.parametrize("kind", [bytes, bytearray])
    def test_received_memory_of_the_right_class_is_the_value(self, kind: Any) -> None:
        header, _ = serialize(kind(b"abc"), EncodeContext())
        memory = kind(b"abc")
        assert deserialize(header, [memory], UNTRUSTED) is memory

    def test_bytes_are_sent_as_they_are(self) -> None:
        # framing counts frames that are bytes (wire document, section 2), so no view is put round them
        assert serialize(TEXT, EncodeContext())[1][0] is TEXT

    def test_views_are_made_over_received_memory(self) -> None:
        header, frames = serialize(memoryview(b"abcdefgh").cast("i"), EncodeContext())
        memory = bytearray(frames[0])
        deserialize(header, [memory], UNTRUSTED)[0] = 0
        assert bytes(memory) == b"\0\0\0\0efgh"

    def test_large_payload_is_not_copied(self) -> None:
        value = bytearray(2**20)
        _, frames = serialize({"a": value}, EncodeContext(shard=2**18))
        assert len(frames) == 4
        assert all(
            frame.obj is value or np.shares_memory(np.frombuffer(frame, "u1"), np.frombuffer(value, "u1")) for frame in frames
        )


class TestMemoryviewsThatCannotTravel:
    @pytest.mark.parametrize(
        "view",
        [
            memoryview(np.zeros(2, ">i4")),
            memoryview(np.zeros(2, "c16")),
            memoryview(np.zeros(2, "f2")),
            memoryview(np.zeros((0, 3), "i4")),
            memoryview(np.array([None])),
        ],
        ids=["big-endian", "complex", "half", "empty of two dimensions", "objects"],
    )
    def test_say_so_before_they_are_sent(self, view: memoryview) -> None:
        with pytest.raises(SerializationError, match="can't be rebuilt by the receiver"):
            serialize(view, EncodeContext())

    def test_fortran_order_keeps_its_meaning(self) -> None:
        # Stock sends the memory as it lies, and its receiver reads the transposed.
        grid = np.asfortranarray(np.arange(6, dtype="i4").reshape(2, 3))
        header, frames = serialize(memoryview(grid), EncodeContext())
        assert deserialize(header, frames, UNTRUSTED).tolist() == grid.tolist()
        assert to_stock(header, frames).tolist() == grid.tolist()


class TestPickleFamily:
    @pytest.mark.parametrize("protocol", [4, 5])
    @pytest.mark.parametrize("value", [5, None, "x", len, Path("x"), frozenset({1}), {"z": 1, "a": [np.arange(3)]}, 1j], ids=repr)
    def test_same_as_stock_and_back(self, value: Any, protocol: int) -> None:
        for shard in (None, 24):
            context = EncodeContext(pickle_protocol=protocol, shard=shard, serializers=("pickle",))
            header, frames = serialize(value, context)
            theirs, their_frames = serialize_and_split(
                StockSerialize(value), ("pickle",), "raise", {"pickle-protocol": protocol}, shard
            )
            theirs["num-sub-frames"] = len(their_frames)
            assert msgpack.packb(header) == msgpack.packb(theirs)
            assert [bytes(frame) for frame in frames] == [bytes(frame) for frame in their_frames]
            assert repr(deserialize(over_the_wire(header), frames, DecodeContext())) == repr(value)
            assert repr(merge_and_deserialize(over_the_wire(header), frames)) == repr(value)

    def test_writeable(self) -> None:
        locked = np.arange(3)
        locked.flags.writeable = False
        header, frames = serialize((5, np.arange(3), locked), EncodeContext(serializers=("pickle",)))
        header = header["sub-headers"][1] if "is-collection" in header else header
        # Each element of a tuple has a header of its own; one object that holds both has one.
        header, frames = serialize(Holder(np.arange(3), locked), EncodeContext())
        assert header["writeable"] == (True, False)
        for memory in (bytes, bytearray):
            got = deserialize(header, [memory(frame) for frame in frames], DecodeContext())
            assert (got.first.flags.writeable, got.second.flags.writeable) == (True, False)
            stock = merge_and_deserialize(header, [memory(frame) for frame in frames])
            assert (stock.first.flags.writeable, stock.second.flags.writeable) == (True, False)

    def test_writable_memory_is_not_copied(self) -> None:
        header, frames = serialize(Holder(np.arange(3), None), EncodeContext())
        memory = [bytearray(frame) for frame in frames]
        got = deserialize(header, memory, DecodeContext())
        assert np.shares_memory(got.first, np.frombuffer(memory[1], "u1"))

    def test_takes_trust(self) -> None:
        header, frames = serialize(Canary("never"), EncodeContext())
        Canary.ran.clear()
        assert needs_pickle(header)
        with pytest.raises(UnsafePayload, match="it was not loaded"):
            deserialize(header, frames, UNTRUSTED)
        assert Canary.ran == []
        with pytest.raises(UnsafePayload, match=r"tests\.protocol\.test_families\.Canary|Canary"):
            serialize(Canary("never"), NO_PICKLE)

    @pytest.mark.parametrize("writeable", [None, (True,), [[]], 5])
    def test_bad_writeable(self, writeable: Any) -> None:
        header, frames = serialize(5, EncodeContext())
        with pytest.raises(RemoteProtocolError, match="writeable"):
            deserialize({**header, "writeable": writeable}, frames, DecodeContext())

    def test_no_frame(self) -> None:
        with pytest.raises(RemoteProtocolError, match="writeable"):
            deserialize({"serializer": "pickle", "writeable": ()}, [], DecodeContext())

    def test_garbage(self) -> None:
        header, _ = serialize(5, EncodeContext())
        with pytest.raises(SerializationError, match="can't be loaded"):
            deserialize(header, [b"garbage"], DecodeContext())


class Holder:
    def __init__(self, first: Any, second: Any) -> None:
        self.first = first
        self.second = second


class Canary:
    """Unpickling it leaves a trace."""

    ran: list[str] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, song: str) -> None:
        self.song = song

    def __reduce__(self) -> Any:
        return _sing, (self.song,)


def _sing(song: str) -> None:
    Canary.ran.append(song)


class TestMsgpackFamily:
    def test_both_directions(self) -> None:
        for value in (5, {"a": 1, "b": (1, 2)}, [1, (2, 3)], None, "x"):
            header, frames = serialize(value, EncodeContext(serializers=("msgpack",), allow_pickle=lambda: False))
            theirs, their_frames = serialize_and_split(StockSerialize(value), ("msgpack",), "raise")
            theirs["num-sub-frames"] = len(their_frames)
            assert msgpack.packb(header) == msgpack.packb(theirs)
            assert [bytes(frame) for frame in frames] == [bytes(frame) for frame in their_frames]
            assert deserialize(over_the_wire(header), frames, UNTRUSTED) == value
            assert not needs_pickle(header)

    @pytest.mark.parametrize("data", [b"", b"\xc1", b"\x92\x01", b"\x01\x02", b"\xa1\xff"])
    def test_damaged(self, data: bytes) -> None:
        with pytest.raises(RemoteProtocolError, match="msgpack family can't be read"):
            deserialize({"serializer": "msgpack"}, [data], UNTRUSTED)

    def test_packed_collections_are_bounded_as_heads_are(self) -> None:
        context = DecodeContext(max_head=lambda: 1000)
        with pytest.raises(LimitExceeded, match=r"Limits\(head=") as caught:
            deserialize({"serializer": "msgpack"}, [msgpack.packb([[]] * 1001)], context)
        assert (caught.value.limit, caught.value.value) == ("head", 1000)
        assert deserialize({"serializer": "msgpack"}, [msgpack.packb(b"x" * 2000)], context) == b"x" * 2000
        assert deserialize({"serializer": "msgpack"}, [msgpack.packb([[]] * 900)], context) == ((),) * 900


class TestErrorFamily:
    def test_of_stock_is_raised(self) -> None:
        header, frames = serialize_and_split(StockSerialize(threading.Lock()))
        assert header["serializer"] == "error"
        with pytest.raises(TypeError, match="Could not serialize object of type lock\n"):
            deserialize(over_the_wire(header), frames, UNTRUSTED)

    def test_of_ours_is_raised_by_stock(self) -> None:
        header, frames = serialize(threading.Lock(), EncodeContext(on_error="message"))
        assert not needs_pickle(header)
        with pytest.raises(TypeError, match=r"(?s)Could not serialize object of type lock\n.*Traceback.*cannot pickle"):
            to_stock(header, frames)

    def test_inside_a_collection(self) -> None:
        header, frames = serialize([b"x", threading.Lock()], EncodeContext(on_error="message"))
        with pytest.raises(TypeError, match="of type lock"):
            deserialize(over_the_wire(header), frames, UNTRUSTED)

    def test_a_stranger_gets_no_traceback(self) -> None:
        context = EncodeContext(on_error="message", serializers=("dask",), allow_pickle=lambda: False)
        _, frames = serialize(threading.Lock(), context)
        assert b"Traceback" not in b"".join(frames)

    def test_text_is_bounded(self) -> None:
        class Talker:
            def __reduce__(self) -> Any:
                raise ValueError("x" * 1_000_000)

        _, frames = serialize(Talker(), EncodeContext(on_error="message"))
        assert sum(map(len, frames)) < 11_000
        with pytest.raises(TypeError) as caught:
            deserialize({"serializer": "error"}, [b"x" * 1_000_000], UNTRUSTED)
        assert len(str(caught.value)) == 100_000

    def test_bad_text(self) -> None:
        with pytest.raises(TypeError, match="�"):
            deserialize({"serializer": "error"}, [b"\xff"], UNTRUSTED)


class TestFamilyOrder:
    def test_first_that_takes_it(self) -> None:
        assert serialize(b"x", EncodeContext(serializers=("pickle", "dask")))[0]["serializer"] == "pickle"
        assert serialize({1, 2}, EncodeContext(serializers=("msgpack", "pickle")))[0]["type-serialized"] == "set"
        assert serialize(5, EncodeContext(serializers=("dask", "cuda", "msgpack", "pickle")))[0]["serializer"] == "msgpack"

    def test_none_takes_it(self) -> None:
        with pytest.raises(
            SerializationError, match=r"none of the families \['dask', 'cuda'\] takes it; known are \['dask', 'pick"
        ):
            serialize(5, EncodeContext(serializers=("dask", "cuda")))

    def test_pickle_fails(self) -> None:
        with pytest.raises(SerializationError, match="lock") as caught:
            serialize(threading.Lock(), EncodeContext())
        assert isinstance(caught.value.__cause__, TypeError)

    def test_refused_by_the_receiver(self) -> None:
        header, frames = serialize(5, EncodeContext())
        with pytest.raises(
            TypeError, match=r"Data serialized with 'pickle' but only able to deserialize data with \['msgpack'\]"
        ):
            deserialize(header, frames, DecodeContext(deserializers=("msgpack",)))
        header, frames = serialize([5], EncodeContext())
        with pytest.raises(TypeError, match="pickle"):
            deserialize(header, frames, DecodeContext(deserializers=("dask",)))
        assert deserialize(*serialize([b"5"], EncodeContext()), DecodeContext(deserializers=("dask",))) == [b"5"]

    @pytest.mark.parametrize("name", ["cuda", "", None, 5, ["dask"], b"dask"])
    def test_unknown_family(self, name: Any) -> None:
        with pytest.raises(SerializationError, match="is not known here"):
            deserialize({"serializer": name}, [b"x"], DecodeContext())
        assert needs_pickle({"serializer": name})

    def test_trust_is_asked_for_only_if_needed(self) -> None:
        def ask() -> bool:
            pytest.fail("no pickle is needed for this")

        header, frames = serialize({"a": b"x", "b": [np.zeros(2, [("a", "i4")])]}, EncodeContext())
        deserialize(header, frames, DecodeContext(allow_pickle=ask))
        serialize({"a": b"x", "b": [np.arange(3)]}, EncodeContext(allow_pickle=ask))


# -- classes registered by users -------------------------------------------------------------------------------------------------


class Human:
    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.name == self.name  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]


class Child(Human):
    pass


def write_human(human: Human) -> tuple[dict[str, Any], list[Any]]:
    return {"kind": "human"}, [human.name.encode()]


def read_human(header: dict[str, Any], frames: list[Any]) -> Human:
    assert header == {"kind": "human"}
    return Human(bytes(frames[0]).decode())


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of the test are undone after it, here and in stock."""
    for table in ("_classes", "_names", "_references"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    monkeypatch.setattr(registry, "_custom", False)
    for dispatch in (dask_serialize, dask_deserialize):
        monkeypatch.setattr(dispatch, "_lookup", dict(dispatch._lookup))


@pytest.mark.usefixtures("_registered")
class TestRegistration:
    def test_by_class_in_both_directions_without_trust(self) -> None:
        register_serialization(Human, write_human, read_human)
        dask_serialize.register(Human)(write_human)
        dask_deserialize.register(Human)(read_human)
        header, frames = serialize(Human("Ada"), NO_PICKLE)
        theirs, their_frames = stock_parts(Human("Ada"))
        assert over_the_wire(header) == theirs
        assert [bytes(frame) for frame in frames] == [bytes(frame) for frame in their_frames]
        assert deserialize(theirs, their_frames, UNTRUSTED) == Human("Ada")
        assert to_stock(header, frames) == Human("Ada")

    def test_what_a_stranger_sent_is_not_passed_on(self) -> None:
        register_serialization(Human, write_human, read_human)
        assert needs_pickle(serialize(Human("Ada"), EncodeContext())[0])

    def test_by_name(self) -> None:
        register_serialization(f"{__name__}.Human", write_human, read_human)
        header, frames = serialize([Human("Ada")], NO_PICKLE)
        assert deserialize(over_the_wire(header), frames, UNTRUSTED) == [Human("Ada")]

    def test_by_name_of_a_module_that_is_not_there(self) -> None:
        register_serialization("no_such_module.Human", write_human, read_human)
        reference = b"\x80\x05\x8c\x0eno_such_module\x94\x8c\x05Human\x94\x93\x94."
        header = {"sub-header": {"kind": "human"}, "type-serialized": reference, "serializer": "dask"}
        assert deserialize(header, [b"Ada"], UNTRUSTED) == Human("Ada")
        assert "no_such_module" not in sys.modules

    def test_subclasses_are_written_as_their_base(self) -> None:
        register_serialization(Human, write_human, read_human)
        header, frames = serialize(Child("Bob"), EncodeContext())
        assert header["type"] == f"{__name__}.Child"
        # The reader is found by the base classes, and for that the class itself is needed.
        assert deserialize(header, frames, DecodeContext()) == Human("Bob")
        with pytest.raises(UnsafePayload, match=r"Child came from a peer that is not trusted.*register_serialization"):
            deserialize(header, frames, UNTRUSTED)

    def test_over_a_built_in_one(self) -> None:
        register_serialization(
            bytearray, lambda value: ({}, [bytes(value)[::-1]]), lambda header, frames: bytearray(frames[0][::-1])
        )
        header, frames = serialize(bytearray(b"abc"), EncodeContext())
        assert frames == [b"cba"]
        assert deserialize(header, frames, UNTRUSTED) == bytearray(b"abc")
        assert needs_pickle(header)

    def test_context_is_passed_if_asked_for(self) -> None:
        seen = []

        def write(human: Human, context: Any = None) -> Any:
            seen.append(context)
            return write_human(human)

        register_serialization(Human, write, read_human)
        serialize(Human("Ada"), EncodeContext(compression="lz4", pickle_protocol=4))
        assert seen == [{"compression": "lz4", "pickle-protocol": 4}]

    def test_mistake_in_a_built_in_reader_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(header: Any, frames: Any, ctx: Any) -> Any:
            raise ZeroDivisionError

        handler = registry.Handler(lambda value, ctx: ({}, []), load, lambda header: False)
        registry.add_builtin(handler, "builtins.bytes")
        with pytest.raises(ZeroDivisionError):
            deserialize(*serialize(b"x", EncodeContext()), UNTRUSTED)

    def test_writer_may_decline(self) -> None:
        def write(human: Human) -> Any:
            raise NotImplementedError

        register_serialization(Human, write, read_human)
        assert serialize(Human("Ada"), EncodeContext())[0]["serializer"] == "pickle"

    def test_writer_fails(self) -> None:
        register_serialization(Human, lambda human: ({}, [human.age]), read_human)
        with pytest.raises(SerializationError, match=r"Human can't be serialized: AttributeError: .*age") as caught:
            serialize(Human("Ada"), EncodeContext())
        assert isinstance(caught.value.__cause__, AttributeError)

    @pytest.mark.parametrize("error", [KeyError("x"), ImportError("no", name="dependency")])
    def test_reader_fails(self, error: Exception) -> None:
        def read(header: Any, frames: Any) -> Any:
            raise error

        register_serialization(Human, write_human, read)
        with pytest.raises(SerializationError, match=r"Human.* (failed: KeyError|dependency is needed)") as caught:
            deserialize(*serialize(Human("Ada"), EncodeContext()), UNTRUSTED)
        assert caught.value.__cause__ is error

    def test_reader_may_raise_our_errors(self) -> None:
        def read(header: Any, frames: Any) -> Any:
            raise RemoteProtocolError("not a human")

        register_serialization(Human, write_human, read)
        with pytest.raises(RemoteProtocolError, match="not a human"):
            deserialize(*serialize(Human("Ada"), EncodeContext()), UNTRUSTED)

    def test_odd_frames_of_a_writer(self) -> None:
        frames = (np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), memoryview(b"abcdef")[::2])
        register_serialization(Human, lambda human: ({}, frames), lambda header, got: [bytes(frame) for frame in got])
        header, sent = serialize(Human("Ada"), EncodeContext(shard=20))
        assert [len(frame) for frame in sent] == [16, 16, 16] * 2 + [3]
        memory_order = [frames[0].tobytes(), frames[1].tobytes("A"), b"ace"]
        assert deserialize(header, sent, UNTRUSTED) == memory_order

    @pytest.mark.parametrize("name", [5, "Human", None])
    def test_neither_class_nor_dotted_name(self, name: Any) -> None:
        with pytest.raises(TypeError, match=r"give a class, or its dotted name"):
            register_serialization(name, write_human, read_human)

    def test_functions_must_be_callable(self) -> None:
        with pytest.raises(TypeError, match="must be functions"):
            register_serialization(Human, write_human, None)  # type: ignore[arg-type]

    def test_function_without_a_signature(self) -> None:
        register_serialization(Human, dict, read_human)  # type: ignore[arg-type]
        with pytest.raises(SerializationError):
            serialize(Human("Ada"), EncodeContext())

    def test_local_class_takes_trust(self) -> None:
        class Local(Human):
            pass

        register_serialization(Local, write_human, read_human)
        with pytest.raises(UnsafePayload, match="can't be named to the peer"):
            serialize(Local("Ada"), NO_PICKLE)
        header, frames = serialize(Local("Ada"), EncodeContext())
        with pytest.raises(UnsafePayload):
            deserialize(header, frames, UNTRUSTED)


class TestClassesNotKnown:
    @staticmethod
    def header(reference: Any, **more: Any) -> dict[str, Any]:
        return {"sub-header": {}, "type": "some.Class", "type-serialized": reference, "serializer": "dask", **more}

    def test_stranger(self) -> None:
        with pytest.raises(UnsafePayload, match=r"class some\.Class came from a peer that is not trusted"):
            deserialize(self.header(pickle.dumps(Path)), [], UNTRUSTED)

    def test_nothing_is_run_for_a_stranger(self) -> None:
        Canary.ran.clear()
        with pytest.raises(UnsafePayload):
            deserialize(self.header(pickle.dumps(Canary("x"))), [], UNTRUSTED)
        assert Canary.ran == []

    @pytest.mark.parametrize("value", [Path, 5, "some.Class"])
    def test_trusted_but_no_reader(self, value: Any) -> None:
        with pytest.raises(SerializationError, match=r"no reader is registered for it; see register_serialization"):
            deserialize(self.header(pickle.dumps(value)), [], DecodeContext())

    @pytest.mark.parametrize("reference", [None, "numpy.ndarray", 5])
    def test_no_pickle(self, reference: Any) -> None:
        with pytest.raises(RemoteProtocolError, match="type-serialized"):
            deserialize(self.header(reference, type=None), [], DecodeContext())

    @pytest.mark.parametrize("sub_header", [None, [], "x"])
    def test_sub_header(self, sub_header: Any) -> None:
        header = {"type-serialized": pickle.dumps(bytes), "serializer": "dask", "sub-header": sub_header}
        with pytest.raises(RemoteProtocolError, match="sub-header"):
            deserialize(header, [], UNTRUSTED)
        assert needs_pickle(header)

    def test_every_known_class_in_both_protocols(self) -> None:
        for cls in (bytes, bytearray, memoryview, array, np.ndarray, np.matrix, np.ma.MaskedArray, type(np.ma.masked)):
            for protocol in (4, 5):
                header = self.header(pickle.dumps(cls, protocol))
                with pytest.raises(RemoteProtocolError) if cls not in (bytes, bytearray, type(np.ma.masked)) else nothing():
                    deserialize(header, [], UNTRUSTED)


class nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


# -- shards and compression ------------------------------------------------------------------------------------------------------


class TestTransmitted:
    def test_the_header_of_the_wire_document(self) -> None:
        header, frames = serialize(np.arange(3), EncodeContext())
        packed = msgpack.packb(header)
        assert len(packed) == 209
        assert list(header) == ["sub-header", "type", "type-serialized", "serializer", "split-num-sub-frames", "split-offsets",
                                "compression", "num-sub-frames"]  # fmt: skip
        assert [len(frame) for frame in frames] == [24]

    @pytest.mark.parametrize("codec", CODECS)
    @pytest.mark.parametrize("shard", [None, 15_000])
    def test_compressed_in_both_directions(self, codec: str, shard: int | None) -> None:
        noise = os.urandom(20_000)
        value = {"text": TEXT, "zeros": np.zeros(5_000), "small": b"x", "noise": noise}
        header, frames = serialize(value, EncodeContext(compression=codec, shard=shard))
        assert set(header["compression"]) == {codec, None}
        assert sum(map(len, frames)) < 30_000
        theirs, their_frames = stock_parts(value, compression=codec, shard=shard)
        assert header["compression"] == theirs["compression"]
        assert header["split-num-sub-frames"] == theirs["split-num-sub-frames"]
        for parts in ((over_the_wire(header), frames), (theirs, their_frames)):
            for reader in (lambda header, frames: deserialize(header, frames, UNTRUSTED), to_stock):
                got = reader(*parts)
                assert (got["text"], got["small"], got["noise"]) == (TEXT, b"x", noise)
                assert got["zeros"].tolist() == [0.0] * 5_000
                got["zeros"][0] = 1  # writable, whatever it came out of

    def test_other_fields_stay_off_the_compressor(self) -> None:
        header, _ = serialize(TEXT, EncodeContext(compression="lz4"))
        assert header["compression"] == ("lz4",)
        assert header["num-sub-frames"] == 1

    def test_headers_may_lack_what_stock_does_not_require(self) -> None:
        header, frames = serialize(np.arange(10), EncodeContext())
        for keys in (["compression"], ["split-num-sub-frames", "split-offsets"], ["num-sub-frames"], ["type"]):
            for key in keys:
                del header[key]
            assert deserialize(header, frames, UNTRUSTED).tolist() == list(range(10))

    def test_false_is_no_compression(self) -> None:
        header, frames = serialize(b"abc", EncodeContext())
        assert deserialize({**header, "compression": [False]}, frames, UNTRUSTED) == b"abc"

    def test_unknown_codec(self) -> None:
        header, frames = serialize(b"abc", EncodeContext())
        with pytest.raises(SerializationError, match="'brotli', which is not known here"):
            deserialize({**header, "compression": ("brotli",)}, frames, UNTRUSTED)

    def test_limit_of_one_payload(self) -> None:
        header, frames = serialize(bytes(100_000), EncodeContext(compression="zlib"))
        with pytest.raises(LimitExceeded):
            deserialize(header, frames, DecodeContext(max_message=lambda: 99_999))
        assert len(deserialize(header, frames, DecodeContext(max_message=lambda: 100_000))) == 100_000

    def test_limit_of_a_message(self) -> None:
        header, frames = serialize(bytes(100_000), EncodeContext(compression="zlib"))
        budget = Budget(lambda: 250_000)
        context = DecodeContext(max_message=lambda: 10**9)
        deserialize(header, frames, context, budget=budget)
        deserialize(header, frames, context, budget=budget)
        with pytest.raises(LimitExceeded):
            deserialize(header, frames, context, budget=budget)

    def test_the_limit_is_asked_for_only_if_needed(self) -> None:
        def ask() -> int:
            pytest.fail("nothing is compressed")

        header, frames = serialize(b"abc", EncodeContext())
        assert deserialize(header, frames, DecodeContext(max_message=ask)) == b"abc"

    @pytest.mark.parametrize(
        "changes",
        [
            {"compression": 5},
            {"compression": ()},
            {"compression": (None, None, None)},
            {"num-sub-frames": 1},
            {"num-sub-frames": "2"},
            {"split-num-sub-frames": None},
            {"split-num-sub-frames": (2, 2)},
            {"split-num-sub-frames": (1,)},
            {"split-num-sub-frames": (3,)},
            {"split-num-sub-frames": (0,)},
            {"split-num-sub-frames": (2.0,)},
            {"split-num-sub-frames": (-1,)},
            {"split-offsets": None},
            {"split-offsets": (1,)},
            {"split-offsets": (0, 2)},
            {"split-offsets": ("0",)},
            {"split-num-sub-frames": (2, 2, 2), "split-offsets": (0, 0, 0)},
            {"split-num-sub-frames": (), "split-offsets": ()},
        ],
        ids=repr,
    )
    def test_lists_that_lie(self, changes: dict[str, Any]) -> None:
        header, frames = serialize(b"abcdef", EncodeContext(shard=3))
        assert header["split-num-sub-frames"] == (2,)
        with pytest.raises(RemoteProtocolError):
            deserialize({**header, **changes}, frames, UNTRUSTED)

    def test_missing_offsets(self) -> None:
        header, frames = serialize(b"abcdef", EncodeContext(shard=3))
        del header["split-offsets"]
        with pytest.raises(RemoteProtocolError, match="split-offsets"):
            deserialize(header, frames, UNTRUSTED)

    @pytest.mark.parametrize("header", [None, [], "x", 5])
    def test_no_map(self, header: Any) -> None:
        for function in (deserialize, unpickle_parts):
            with pytest.raises(RemoteProtocolError, match="no map"):
                function(header, [], DecodeContext())
        assert needs_pickle(header)


class TestPickledParts:
    """``__Pickled__``, wire document section 5.3."""

    @pytest.mark.parametrize("compression", [None, "zlib", "lz4"])
    def test_both_directions(self, compression: str | None) -> None:
        value = {"zeros": np.zeros(5_000), "small": np.arange(3), "f": len}
        header, frames = pickled_parts(value, EncodeContext(compression=compression, pickle_protocol=4, shard=100))
        theirs = stock_dumps([StockToPickle(value)], context={"compression": compression})
        their_header = msgpack.unpackb(theirs[1], use_list=False)
        assert list(header) == list(their_header)
        assert over_the_wire(header) == their_header
        if compression != "zlib" or len(frames[0]) == len(theirs[2]):
            assert [bytes(frame) for frame in frames] == [bytes(frame) for frame in theirs[2:]]
        stock = stock_loads([msgpack.packb([{"__Pickled__": 1}]), msgpack.packb(header), *frames])[0]
        for got in (unpickle_parts(their_header, theirs[2:], DecodeContext()), stock):
            assert got["zeros"].tolist() == [0.0] * 5_000
            assert got["small"].tolist() == [0, 1, 2]
            assert got["f"] is len

    def test_buffers_are_not_copied(self) -> None:
        value = np.arange(5)
        header, frames = pickled_parts(value, EncodeContext())
        assert np.shares_memory(np.frombuffer(frames[0], "u1"), value)
        memory = [bytearray(frame) for frame in frames]
        assert np.shares_memory(unpickle_parts(header, memory, DecodeContext()), np.frombuffer(memory[0], "u1"))

    def test_takes_trust(self) -> None:
        with pytest.raises(UnsafePayload, match=r"builtin_function_or_method travels as a pickle.*is not trusted with one"):
            pickled_parts(len, NO_PICKLE)
        Canary.ran.clear()
        header, frames = pickled_parts(Canary("x"), EncodeContext())
        with pytest.raises(UnsafePayload, match="it was not loaded"):
            unpickle_parts(header, frames, UNTRUSTED)
        assert Canary.ran == []

    def test_cannot_be_pickled(self) -> None:
        with pytest.raises(SerializationError, match="lock"):
            pickled_parts(threading.Lock(), EncodeContext())

    def test_limits(self) -> None:
        header, frames = pickled_parts(np.zeros(50_000), EncodeContext(compression="zlib"))
        with pytest.raises(LimitExceeded):
            unpickle_parts(header, frames, DecodeContext(max_message=lambda: 100_000))
        with pytest.raises(LimitExceeded):
            unpickle_parts(header, frames, DecodeContext(), budget=Budget(lambda: 100_000))

    @pytest.mark.parametrize("changes", [{"pickled-obj": None}, {"pickled-obj": "x"}, {"compression": ()}, {"num-sub-frames": 7}])
    def test_headers_that_lie(self, changes: dict[str, Any]) -> None:
        header, frames = pickled_parts(np.zeros(5), EncodeContext())
        with pytest.raises(RemoteProtocolError):
            unpickle_parts({**header, **changes}, frames, DecodeContext())

    def test_compression_may_be_absent(self) -> None:
        header, frames = pickled_parts([1], EncodeContext())
        del header["compression"]
        assert unpickle_parts(header, frames, DecodeContext()) == [1]


class TestPassedOn:
    """``deserialize=False``: what a hop received is sent again as it was."""

    def test_identical(self) -> None:
        header, frames = stock_parts({"a": TEXT, "b": np.arange(100)}, compression="lz4", shard=1000)
        again = serialize(Serialized(header, frames), EncodeContext(compression="zlib", shard=10))
        assert again == (header, frames)


class TestOpened:
    """open_serialized: what came under ``deserialize=False`` keeps the trust it came with."""

    @staticmethod
    def wrapped(value: Any, trusted: bool) -> Serialized:
        header, frames = serialize(value, EncodeContext())
        return Serialized(over_the_wire(header), frames, trusted)

    @pytest.mark.parametrize("value", [{"a": np.arange(3.0)}, b"abc", [1, (2, b"x")]], ids=["array", "bytes", "collection"])
    @pytest.mark.parametrize("trusted", [True, False])
    def test_what_needs_no_pickle(self, value: Any, trusted: bool) -> None:
        header, frames = serialize(value, NO_PICKLE)
        got = open_serialized(Serialized(over_the_wire(header), frames, trusted))
        if isinstance(value, dict):
            np.testing.assert_array_equal(got["a"], value["a"])
        else:
            assert got == value

    def test_a_stranger_s_pickle_is_not_loaded(self) -> None:
        Canary.ran.clear()
        for value in (Canary("a"), {"a": [Canary("b")]}):
            with pytest.raises(UnsafePayload, match="not trusted"):
                open_serialized(self.wrapped(value, False))
        header, frames = pickled_parts(Canary("c"), EncodeContext())
        with pytest.raises(UnsafePayload, match="not trusted"):
            open_serialized(Pickled(header, frames, False))
        assert Canary.ran == []

    def test_a_friend_s_is(self) -> None:
        assert open_serialized(self.wrapped({1, 2}, True)) == {1, 2}
        header, frames = pickled_parts({1, 2}, EncodeContext())
        assert open_serialized(Pickled(header, frames)) == {1, 2}

    def test_families(self) -> None:
        with pytest.raises(TypeError, match="only able to deserialize data with"):
            open_serialized(self.wrapped(b"abc", True), deserializers=["msgpack"])
        assert open_serialized(self.wrapped(b"abc", True), deserializers=["dask"]) == b"abc"

    @pytest.mark.parametrize("trusted", [True, False])
    def test_it_grows_no_further_than_it_may(self, trusted: bool) -> None:
        header, frames = serialize(bytes(2**20), EncodeContext(compression="zlib"))
        assert header["compression"] == ("zlib",)
        wrapper = Serialized(over_the_wire(header), frames, trusted)
        small = Limits(message=2**16, message_trusted=2**21)
        if trusted:
            assert len(open_serialized(wrapper, limits=small)) == 2**20
        else:
            with pytest.raises(LimitExceeded, match="message"):
                open_serialized(wrapper, limits=small)
        header, frames = serialize(bytes(2**26 + 1), EncodeContext(compression="zlib"))
        wrapper = Serialized(over_the_wire(header), frames, trusted)
        if trusted:
            assert len(open_serialized(wrapper)) == 2**26 + 1
        else:
            with pytest.raises(LimitExceeded, match="message"):
                open_serialized(wrapper)

    def test_anything_else(self) -> None:
        wrong: Any = b"abc"
        with pytest.raises(TypeError, match="takes a Serialized or Pickled, not a bytes"):
            open_serialized(wrong)


# -- headers that lie ------------------------------------------------------------------------------------------------------------


def dask_header(cls: type, **sub_header: Any) -> dict[str, Any]:
    return {"serializer": "dask", "type-serialized": pickle.dumps(cls), "sub-header": sub_header}


class TestLies:
    @pytest.mark.parametrize(
        "sub_header",
        [
            {"format": "i"},
            {"format": None, "shape": (2,)},
            {"format": "P", "shape": (1,)},
            {"format": "O", "shape": (1,)},
            {"format": "2i", "shape": (1,)},
            {"format": "", "shape": (8,)},
            {"format": "i", "shape": (3,)},
            {"format": "i", "shape": (-2,)},
            {"format": "i", "shape": (-2, -1)},
            {"format": "i", "shape": (2**70,)},
            {"format": "i", "shape": ("2",)},
            {"format": "i", "shape": 2},
            {"format": "B", "shape": (8,) + (1,) * 64},
            {"format": "d", "shape": (0, 1)},
        ],
        ids=repr,
    )
    def test_memoryview(self, sub_header: dict[str, Any]) -> None:
        with pytest.raises(RemoteProtocolError, match="memoryview"):
            deserialize(dask_header(memoryview, **sub_header), [b"abcdefgh"], UNTRUSTED)

    def test_empty_memoryview(self) -> None:
        for frames in ([], [b""]):
            assert deserialize(dask_header(memoryview, format="i", shape=(0,)), frames, UNTRUSTED).format == "i"
        with pytest.raises(RemoteProtocolError, match="empty one"):
            deserialize(dask_header(memoryview, format="i", shape=(0, 3)), [b""], UNTRUSTED)

    @pytest.mark.parametrize("code", [None, "", "dd", "O", "x", 5])
    def test_array(self, code: Any) -> None:
        with pytest.raises(RemoteProtocolError, match="typecode"):
            deserialize(dask_header(array, typecode=code), [b"abcdefgh"], UNTRUSTED)

    def test_array_of_parts_of_items(self) -> None:
        with pytest.raises(RemoteProtocolError, match="items of 8 bytes came with 7 bytes"):
            deserialize(dask_header(array, typecode="d"), [b"abcdefg"], UNTRUSTED)
        assert deserialize(dask_header(array, typecode="h"), [b"a", b"b"], UNTRUSTED) == array("h", b"ab")
        assert deserialize(dask_header(array, typecode="h"), [], UNTRUSTED) == array("h")


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(allow_nan=False),
    st.sampled_from(
        ["dask", "pickle", "msgpack", "error", "list", "dict", "lz4", "zlib", "snappy", "zstd", "i", "d", "<i4", "|O"]
    ),
    st.binary(max_size=8),
    st.sampled_from([pickle.dumps(cls) for cls in (bytes, bytearray, memoryview, array, np.ndarray, np.ma.MaskedArray, Path)]),
)
KEYS = st.sampled_from(
    [
        *("serializer", "type-serialized", "sub-header", "is-collection", "sub-headers", "frame-lengths", "key", "compression"),
        *(
            "num-sub-frames",
            "split-num-sub-frames",
            "split-offsets",
            "writeable",
            "format",
            "shape",
            "strides",
            "dtype",
            "typecode",
        ),
        *("pickle", "broadcast_to", "matrix", "data-header", "mask-header", "nframes", "fill-value"),
    ]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
TYPED = (RemoteProtocolError, SerializationError, UnsafePayload, LimitExceeded)


class TestFuzz:
    @given(header=st.dictionaries(KEYS, VALUES, max_size=8), frames=st.lists(st.binary(max_size=40), max_size=3))
    def test_any_header(self, header: dict[str, Any], frames: list[bytes]) -> None:
        context = DecodeContext(allow_pickle=lambda: False, max_message=lambda: 10_000, max_head=lambda: 1_000)
        for function in (deserialize, unpickle_parts):
            try:
                function(header, list(frames), context)
            except TYPED:
                continue
            except TypeError:
                if "error" not in repr(header):  # only the error family may raise that
                    raise
        needs_pickle(header)

    @given(data=st.data())
    def test_any_change_of_a_good_one(self, data: st.DataObject) -> None:
        value = data.draw(
            st.sampled_from([b"abc", np.arange(6).reshape(2, 3), [b"x", {"k": array("d", [1])}], memoryview(b"abcd"), TEXT])
        )
        header, frames = serialize(value, EncodeContext(shard=30_000, compression="lz4"))
        header = over_the_wire(header)
        place: Any = header
        while True:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
                break
            place = place[key]
        if data.draw(st.booleans()):
            place[key] = data.draw(VALUES)
        else:
            del place[key]
        context = DecodeContext(allow_pickle=lambda: False, max_message=lambda: 100_000)
        try:
            deserialize(header, [bytearray(frame) for frame in frames], context)
        except TYPED:
            return
        except TypeError:
            if "error" not in repr(header):
                raise
