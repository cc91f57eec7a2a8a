"""Encoding: the frames are Dask's, nothing goes out that a receiver would misread, and errors say where the fault lies."""

from __future__ import annotations

import array
import datetime as dt
import enum
import gc
import pickle
import socket
import threading
import weakref
from decimal import Decimal
from typing import Any

import distributed.protocol as stock
import msgpack
import numpy as np
import pytest
from distributed.core import Status
from distributed.protocol.serialize import ToPickle as StockToPickle

from trio_dcore.protocol import (
    DecodeContext,
    EncodeContext,
    LocalProtocolError,
    Pickled,
    SerializationError,
    Serialize,
    Serialized,
    ToPickle,
    UnsafePayload,
    _enums,
    _registry,
)
from trio_dcore.protocol._decoding import Decoder
from trio_dcore.protocol._encoding import Encoder, _diagnose
from trio_dcore.protocol._messages import dumps, loads
from trio_dcore.protocol._registry import register_serialization


def never() -> bool:
    return False


TRUSTED_STOCK = EncodeContext()
STRANGE_STOCK = EncodeContext(allow_pickle=never)
TRUSTED_OURS = EncodeContext(extensions=True)
STRANGE_OURS = EncodeContext(extensions=True, allow_pickle=never)
ALL = [TRUSTED_STOCK, STRANGE_STOCK, TRUSTED_OURS, STRANGE_OURS]


class Colour(enum.Enum):
    RED = 1


class Plain:
    """Picklable, and equal to its like."""

    def __eq__(self, other: object) -> bool:
        return type(other) is Plain

    __hash__ = None  # type: ignore[assignment]


# -- the bytes -------------------------------------------------------------------------------------------------------------------


def test_a_plain_message_is_one_msgpack_frame() -> None:
    (frame,) = dumps({"op": "add", "x": 1, "y": 2, "reply": True})
    assert bytes(frame).hex() == "84a26f70a3616464a17801a17902a57265706c79c3"


def test_a_pickle_a_set_and_an_integer_as_dask_writes_them() -> None:
    """Appendix A of the wire document."""
    frames = dumps({"d": ToPickle({"k": (1, 2)}), "s": {1}, "i": 2**40})
    head = (
        "83a16481ab"
        + b"__Pickled__".hex()
        + "01a17382a7"
        + b"__Set__".hex()
        + "c3a7"
        + b"as-list".hex()
        + "9101a169cf0000010000000000"
    )
    assert bytes(frames[0]).hex() == head
    assert [len(frame) for frame in frames] == [50, 69]
    assert frames == stock.dumps({"d": StockToPickle({"k": (1, 2)}), "s": {1}, "i": 2**40})


@pytest.mark.parametrize(
    "data",
    [np.arange(3), b"bytes", [np.arange(3), b"x"], {"a": np.zeros((2, 3)), "b": 1}, Plain(), 1, (), "text"],
    ids=lambda value: type(value).__name__,
)
def test_serialize_gives_dasks_frames(data: object) -> None:
    ours = dumps({"op": "x", "data": Serialize(data), "more": [Serialize(b"1"), 2]})
    theirs = stock.dumps({"op": "x", "data": stock.to_serialize(data), "more": [stock.to_serialize(b"1"), 2]})
    assert [bytes(frame) for frame in ours] == [bytes(memoryview(frame)) for frame in theirs]


def test_a_marker_names_the_frame_of_its_header() -> None:
    frames = dumps([Serialize([b"a", b"b"]), ToPickle(1), Serialize(b"c")])
    assert msgpack.unpackb(frames[0]) == [{"__Serialized__": 1}, {"__Pickled__": 4}, {"__Serialized__": 5}]
    assert frames[2:4] == [b"a", b"b"]
    assert frames[6] == b"c"


def test_payloads_are_the_messages_own_memory() -> None:
    data = np.arange(1000)
    frames = dumps({"x": Serialize(data)})
    assert np.shares_memory(np.frombuffer(frames[2], data.dtype), data)


@pytest.mark.parametrize("ctx", ALL)
@pytest.mark.parametrize(
    "data", [np.arange(6).reshape(2, 3), np.array(["a"]), np.zeros(2, [("a", "i4")])], ids=lambda a: a.dtype.kind
)
def test_bare_arrays_go_to_everybody_as_the_dask_family(ctx: EncodeContext, data: Any) -> None:
    frames = dumps({"x": data}, ctx)
    assert msgpack.unpackb(frames[0]) == {"x": {"__Serialized__": 1}}
    assert msgpack.unpackb(frames[1])["serializer"] == "dask"
    assert (stock.loads(frames)["x"] == data).all()


def test_serializers_are_about_serialize_only() -> None:
    ctx = EncodeContext(serializers=("msgpack",))
    frames = dumps([np.arange(2), Serialize(1), Plain()], ctx)
    assert [msgpack.unpackb(frames[k]).get("serializer") for k in (1, 3, 5)] == ["dask", "msgpack", None]
    with pytest.raises(SerializationError, match="nonsense") as caught:
        dumps([Serialize(1)], EncodeContext(serializers=("nonsense",)))
    assert caught.value.path == "[0]"


def test_compression_and_shards() -> None:
    data = np.zeros(50_000, "u1")
    frames = dumps({"x": Serialize(data), "y": data}, EncodeContext(compression="zlib", shard=20_000))
    for k in (1, 5):
        header = msgpack.unpackb(frames[k])
        assert (header["num-sub-frames"], header["compression"]) == (3, ["zlib"] * 3)
    assert (stock.loads(frames)["y"] == data).all()


def test_an_unknown_codec_is_the_callers_error() -> None:
    with pytest.raises(LocalProtocolError, match="'nonsense'"):
        dumps(np.zeros(50_000), EncodeContext(compression="nonsense"))


def test_an_object_dtype_is_no_array_for_strangers() -> None:
    with pytest.raises(UnsafePayload) as caught:
        dumps({"x": np.array([object()])}, STRANGE_OURS)
    assert caught.value.field == "x"


# -- enums -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ctx", ALL)
def test_status_is_written_as_dasks(ctx: EncodeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = enum.Enum("Status", {"running": "running", "closed": "closed"})
    monkeypatch.setattr(_enums, "_by_name", {})
    monkeypatch.setattr(_enums, "_by_class", {})
    _enums.register_enum("distributed.core", "Status", ours)
    frames = dumps({"status": ours["running"], ours["closed"]: 1}, ctx)
    assert len(frames) == 1
    assert stock.loads(frames) == {"status": Status.running, Status.closed: 1}
    assert loads(frames) == {"status": ours["running"], ours["closed"]: 1}
    assert loads(dumps(Status.running, ctx)) is ours["running"]


def test_other_enums_are_pickled_where_that_is_allowed() -> None:
    for ctx in (TRUSTED_STOCK, TRUSTED_OURS):
        frames = dumps(Colour.RED, ctx)
        assert len(frames) == 2
        assert loads(frames, extensions=ctx.extensions) is Colour.RED
    with pytest.raises(UnsafePayload, match="Colour"):
        dumps(Colour.RED, STRANGE_STOCK)
    assert msgpack.unpackb(*dumps(Colour.RED, STRANGE_OURS)) == {
        "__Enum__": True,
        "name": "RED",
        "__module__": __name__,
        "__name__": "Colour",
    }


# -- what needs a pickle, and safe types -----------------------------------------------------------------------------------------

SAFE = [2**64, -(2**63) - 1, 1j, Decimal("1.5"), dt.datetime(2024, 1, 1), np.int64(1), np.float32(1), frozenset({1})]


@pytest.mark.parametrize("value", SAFE, ids=lambda value: type(value).__name__)
def test_safe_types_need_no_pickle_between_ours(value: Any) -> None:
    for ctx in (TRUSTED_OURS, STRANGE_OURS):
        frames = dumps({"x": [value], value: 1}, ctx)
        assert len(frames) == 1
        assert Decoder(DecodeContext(allow_pickle=never), extensions=True).resolve(frames) == {"x": (value,), value: 1}


@pytest.mark.parametrize("value", SAFE, ids=lambda value: type(value).__name__)
def test_safe_types_are_pickled_to_a_trusted_stock_peer(value: Any) -> None:
    frames = dumps({"x": [value], value: 1}, TRUSTED_STOCK)
    assert len(frames) == 3
    assert stock.loads(frames) == {"x": (value,), value: 1}


@pytest.mark.parametrize("value", SAFE[2:], ids=lambda value: type(value).__name__)
def test_safe_types_are_refused_to_a_strange_stock_peer(value: Any) -> None:
    with pytest.raises(UnsafePayload, match=r"data\['x'\]\[3\]: .*Security\(pickle=") as caught:
        dumps({"data": {"x": [0, 1, 2, value]}}, STRANGE_STOCK)
    assert caught.value.field == "data['x'][3]"


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 10**5000], ids=["above", "below", "unprintable"])
def test_an_integer_without_a_form_is_no_matter_of_trust(value: int) -> None:
    with pytest.raises(SerializationError, match=r"n\[0\]: an integer outside") as caught:
        dumps({"n": [value]}, STRANGE_STOCK)
    assert caught.value.path == "n[0]"


def test_the_largest_integers_are_native() -> None:
    assert dumps([2**64 - 1, -(2**63)], STRANGE_STOCK) == [bytes.fromhex("92cfffffffffffffffffd38000000000000000")]


@pytest.mark.parametrize(
    "value",
    [Plain(), ValueError("x"), len, array.array("i", [1]), Colour.RED, {Colour.RED}, range(3), Ellipsis],
    ids=lambda value: type(value).__name__,
)
def test_any_object_is_pickled_if_allowed_and_else_refused(value: Any) -> None:
    for ctx in (TRUSTED_STOCK, TRUSTED_OURS):
        back = loads(dumps({"x": value}, ctx), extensions=ctx.extensions)["x"]
        assert back == value or repr(back) == repr(value)
    with pytest.raises(UnsafePayload) as caught:
        dumps({"x": value}, STRANGE_STOCK)
    assert caught.value.field.startswith("x")


def test_trust_is_not_asked_without_need() -> None:
    def ask() -> bool:
        raise AssertionError("asked")

    for extensions in (True, False):
        ctx = EncodeContext(allow_pickle=ask, extensions=extensions)
        dumps({"a": [1, "x", b"y", {1}, np.arange(3)], "b": Serialize([b"x", np.arange(2)]), 3: np.float64(1)}, ctx)
    dumps([*SAFE, {"__Set__": 1}], EncodeContext(allow_pickle=ask, extensions=True))


# -- dicts that look like markers ------------------------------------------------------------------------------------------------

LOOKALIKES: list[dict[Any, Any]] = [
    {"__Set__": 1},
    {"__Set__": True, "as-list": [1, 2]},
    {"__Enum__": True, "name": "x"},
    {"__Serialized__": 1},
    {"__Pickled__": 0},
    {"__Pickled__": 1, "a": {"__Pickled__": {"__Set__": None}}},
    {"a": {1, 2}, "__Serialized__": [1.5, {2}]},
]


def _as_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_tuples(item) for key, item in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("value", LOOKALIKES, ids=str)
def test_a_dict_that_looks_like_a_marker_arrives_as_a_dict(value: dict[Any, Any]) -> None:
    message = {"op": "x", "args": [value, {"deeper": (value,)}]}
    frames = dumps(message, STRANGE_OURS)
    decoder = Decoder(DecodeContext(allow_pickle=never), extensions=True)
    assert decoder.has_markers(frames)
    assert decoder.resolve(frames) == _as_tuples(message)
    assert decoder.head(frames[0])["op"] == "x"
    frames = dumps(message, TRUSTED_STOCK)
    back = stock.loads(frames)
    assert _as_tuples(back) == _as_tuples(message)
    with pytest.raises(SerializationError, match="means something else on the wire") as caught:
        dumps(message, STRANGE_STOCK)
    assert caught.value.path == "args[0]"


def test_a_lookalike_beside_real_markers() -> None:
    message = {"s": {1}, "d": {"__Set__": 5}, "z": Serialize(b"data"), "e": [{2}]}
    want = {"s": {1}, "d": {"__Set__": 5}, "z": b"data", "e": ({2},)}
    for ctx in (TRUSTED_STOCK, TRUSTED_OURS, STRANGE_OURS):
        assert loads(dumps(message, ctx), extensions=ctx.extensions) == want
    assert stock.loads(dumps(message)) == want


def test_payloads_inside_a_lookalike_arrive_between_ours_and_are_refused_to_stock() -> None:
    message = {"d": {"__Set__": [Serialize(b"x"), np.arange(2), {3}, Plain()]}}
    back = loads(dumps(message, TRUSTED_OURS), extensions=True)["d"]["__Set__"]
    assert back[0] == b"x"
    assert back[2:] == ({3}, Plain())
    with pytest.raises(SerializationError, match="can't hold Serialize") as caught:
        dumps(message, TRUSTED_STOCK)
    assert caught.value.path == "d"


@pytest.mark.parametrize("ctx", ALL)
def test_the_reserved_texts_elsewhere_are_harmless(ctx: EncodeContext) -> None:
    message = {"a": "__Set__", "b": b"\xab__Pickled__", "c": {"my__Enum__": 1}, "d": ("__Serialized__",), ("__Set__",): {1}}
    frames = dumps(message, ctx)
    assert len(frames) == 1
    assert stock.loads(frames) == message
    assert loads(frames, extensions=ctx.extensions) == message


def test_a_large_message_is_searched_too() -> None:
    message = {"text": "x_" * 100_000, "d": {"__Set__": 1}}
    assert loads(dumps(message)) == message
    assert loads(dumps({"text": "x_" * 100_000})) == {"text": "x_" * 100_000}


class HashableSet(set[int]):
    def __hash__(self) -> int:  # type: ignore[override]
        return 1


class PlainSet(set[int]): ...


def test_subclasses_of_set() -> None:
    assert loads(dumps(PlainSet({1}))) == {1}
    assert type(loads(dumps(PlainSet({1})))) is set
    # It may be a key, which a set can't.
    frames = dumps({HashableSet({1}): 2})
    assert type(next(iter(stock.loads(frames)))) is HashableSet


# -- forwarding ------------------------------------------------------------------------------------------------------------------


def parts(data: object) -> tuple[dict[str, Any], list[Any]]:
    frames = dumps(Serialize(data))
    return msgpack.unpackb(frames[1], use_list=False), frames[2:]


@pytest.mark.parametrize("ctx", ALL)
@pytest.mark.parametrize("data", [b"x", np.arange(3), [b"x", np.arange(3)]], ids=lambda value: type(value).__name__)
def test_what_needs_no_pickle_is_passed_on_for_anybody(ctx: EncodeContext, data: object) -> None:
    header, frames = parts(data)
    for wrapped in (Serialized(header, frames, False), Serialize(Serialized(header, frames, False))):
        assert dumps([wrapped], ctx)[2:] == frames


def test_a_strangers_pickle_is_not_passed_on_to_a_peer_that_trusts_us() -> None:
    header, frames = parts(Plain())
    pickled = msgpack.unpackb(dumps(ToPickle(1))[1])
    for ctx in ALL:
        for obj in (
            Serialized(header, frames, False),
            Serialize(Serialized(header, frames, False)),
            Pickled(pickled, [], False),
        ):
            with pytest.raises(UnsafePayload, match=r'is not passed on unless Security\(pickle="always"\)') as caught:
                dumps({"x": [obj]}, ctx)
            assert caught.value.field == "x[0]"


def test_a_trusted_peers_pickle_is_passed_on_to_trusted_peers() -> None:
    header, frames = parts(Plain())
    pickled = msgpack.unpackb(dumps(ToPickle(7))[1])
    for ctx in (TRUSTED_STOCK, TRUSTED_OURS):
        assert loads(dumps([Serialized(header, frames), Pickled(pickled, [])], ctx)) == (Plain(), 7)
    for ctx in (STRANGE_STOCK, STRANGE_OURS):
        for obj in (Serialized(header, frames), Pickled(pickled, [])):
            with pytest.raises(UnsafePayload, match=r"this peer can't be sent any; see Security\(pickle="):
                dumps(obj, ctx)


def test_forward_untrusted_passes_everything_on() -> None:
    header, frames = parts(Plain())
    pickled = msgpack.unpackb(dumps(ToPickle(7))[1])
    message = [Serialized(header, frames, False), Pickled(pickled, [], False)]
    assert loads(dumps(message, EncodeContext(forward_untrusted=True))) == (Plain(), 7)


def test_a_header_with_a_wrong_count_is_corrected_in_a_copy() -> None:
    header: dict[str, object] = {"serializer": "msgpack"}
    frames = dumps(Serialized(header, [msgpack.packb(5)]))
    assert header == {"serializer": "msgpack"}
    assert loads(frames) == 5


# -- headers of users' own -------------------------------------------------------------------------------------------------------


class Custom:
    pass


class Bits(enum.Flag):
    A = 1
    B = 2


@pytest.fixture
def custom_header(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Custom travels with this header, and what its reader returns is the header that it got."""
    monkeypatch.setattr(_registry, "_custom", False)
    monkeypatch.setattr(_registry, "_classes", {})
    monkeypatch.setattr(_registry, "_references", {})
    header: dict[str, Any] = {}
    register_serialization(Custom, lambda obj: (dict(header), [b"frame"]), lambda got, frames: got)
    return header


def test_sets_enums_and_payloads_in_headers(custom_header: dict[str, Any]) -> None:
    inner = Serialized({"serializer": "msgpack", "num-sub-frames": 1}, [b"\x05"])
    custom_header.update(s={1, 2}, e=Status.closed, data=Serialize(b"inline"), more=inner)
    back = loads(dumps(Serialize(Custom()), EncodeContext(compression="zlib", shard=1)))
    assert back["s"] == {1, 2}
    assert (type(back["e"]).__name__, back["e"].name) == ("Status", "closed")
    assert back["more"] == inner
    assert back["data"].frames == [b"inline"]
    assert isinstance(back["data"], Serialized)


def test_a_header_that_can_not_be_written(custom_header: dict[str, Any]) -> None:
    custom_header["x"] = object()
    with pytest.raises(SerializationError, match=r"a\[0\]: a serialization header can't hold an object of type object") as caught:
        dumps({"a": [Serialize(Custom())]})
    assert caught.value.path == "a[0]"
    custom_header["x"] = Bits.A | Bits.B
    with pytest.raises(SerializationError, match="can't hold"):
        dumps(Serialize(Custom()))
    custom_header["x"] = 2**64
    with pytest.raises(SerializationError, match=r"can't hold an object of type int"):
        dumps({"a": [Serialize(Custom())]})
    custom_header["x"] = "\udc00"
    with pytest.raises(SerializationError, match=r"a\[0\]: .* can't be serialized: UnicodeEncodeError"):
        dumps({"a": [Serialize(Custom())]})


# -- errors ----------------------------------------------------------------------------------------------------------------------


def _generator() -> Any:
    yield 1


@pytest.mark.parametrize(
    ("value", "name"),
    [(_generator(), "generator"), (threading.Lock(), "lock"), (socket.socket, None), (memoryview(b"abc")[::2], "contiguous")],
    ids=["generator", "lock", "class", "memoryview"],
)
def test_what_can_not_be_sent_is_named_with_its_place(value: object, name: str | None) -> None:
    for ctx in (TRUSTED_STOCK, TRUSTED_OURS):
        encoder = Encoder(ctx)
        if name is None:
            assert loads(encoder.encode({"a": value}))["a"] is value
            continue
        with pytest.raises(SerializationError, match=name) as caught:
            encoder.encode({"data": {"x": [1, {2: value}]}})
        assert caught.value.path == "data['x'][1][2]"
        assert str(caught.value).startswith("data['x'][1][2]: ")
        assert encoder.encode({"op": "x"}) == [msgpack.packb({"op": "x"})]


def test_an_unserializable_payload_raises_or_is_reported() -> None:
    message = {"data": [1, Serialize({"k": [_generator()]})]}
    with pytest.raises(SerializationError, match="generator") as caught:
        dumps(message)
    assert caught.value.path.startswith("data[1]['k']")
    frames = dumps(message, EncodeContext(on_error="message"))
    for read in (stock.loads, loads):
        with pytest.raises(TypeError, match="Could not serialize"):
            read(frames)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\udc00", "surrogate"),
        (memoryview(b"abcdef")[::2], "contiguous"),
        (memoryview(np.arange(6).reshape(2, 3).T), "contiguous"),
    ],
)
def test_what_msgpack_itself_refuses(value: object, text: str) -> None:
    for ctx in ALL:
        for message, path in (
            (value, ""),
            ({"a": {"b": value}}, "a['b']"),
            ([(value,)], "[0][0]"),
            ({"s": {1: [{value}] if isinstance(value, str) else value}}, "s[1]" + ("[0]{...}" if isinstance(value, str) else "")),
        ):
            with pytest.raises(SerializationError, match=text) as caught:
                dumps(message, ctx)
            assert caught.value.path == path
    if isinstance(value, str):
        with pytest.raises(SerializationError, match="surrogate") as caught:
            dumps({"d": {value: 1}})
        assert caught.value.path == "d<key 'a\\udc00'>"


def test_a_released_memoryview() -> None:
    view = memoryview(b"abc")
    view.release()
    with pytest.raises(SerializationError, match="released") as caught:
        dumps({"v": view})
    assert caught.value.path == "v"


@pytest.mark.parametrize("data", [array.array("i", [1, 2]), np.arange(6).reshape(2, 3), bytearray(b"x")])
def test_a_contiguous_memoryview_is_its_bytes(data: Any) -> None:
    assert loads(dumps([memoryview(data), bytearray(b"y")])) == (memoryview(data).tobytes(), b"y")


def test_a_message_that_contains_itself() -> None:
    loop: dict[str, Any] = {"a": [1]}
    loop["a"].append(loop)
    with pytest.raises(SerializationError, match="contains itself") as caught:
        dumps({"x": loop})
    assert caught.value.path == "x['a'][1]"


def test_a_message_that_is_nested_too_deep() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(SerializationError, match="nested too deep") as caught:
        dumps({"x": deep})
    assert caught.value.path == "x" + "[0]" * 11 + "..."


def test_too_large_for_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_dcore.protocol._encoding._ITEM_LIMIT", 10)
    for value in ("x" * 10, b"x" * 10, [0] * 10, dict.fromkeys(range(10)), memoryview(b"x" * 10)):
        text, path = _diagnose({"a": [value]}, ValueError("too large"))
        assert "too large for msgpack" in text
        assert path == "a[0]"


class Hostile(dict[str, Any]):
    def items(self) -> Any:
        raise KeyError("no items for you")


def test_whatever_a_class_does_is_a_serialization_error() -> None:
    encoder = Encoder(EncodeContext())
    with pytest.raises(SerializationError, match="KeyError") as caught:
        encoder.encode({"a": Hostile(x=1)})
    assert isinstance(caught.value.__cause__, KeyError)
    assert encoder.encode(1) == [b"\x01"]


class Reentrant:
    """Encodes another message with the same encoder while it is pickled."""

    encoder: Encoder
    seen: list[Any]

    def __reduce__(self) -> tuple[Any, ...]:
        self.seen.append(Reentrant.encoder.encode({"inner": [{1}, ToPickle(2)]}))
        return list, ()


class Interrupting:
    def __reduce__(self) -> tuple[Any, ...]:
        raise KeyboardInterrupt


def test_an_encoding_inside_an_encoding() -> None:
    Reentrant.encoder = encoder = Encoder(EncodeContext())
    Reentrant.seen = []
    frames = encoder.encode({"a": {5}, "b": Reentrant(), "c": ToPickle(6)})
    assert loads(frames) == {"a": {5}, "b": [], "c": 6}
    assert loads(Reentrant.seen[0]) == {"inner": ({1}, 2)}


def test_an_interrupt_passes_and_leaves_the_encoder_clean() -> None:
    encoder = Encoder(EncodeContext())
    with pytest.raises(KeyboardInterrupt):
        encoder.encode({"a": {1}, "b": Serialize(b"x"), "c": Interrupting()})
    assert loads(encoder.encode({"a": Serialize(b"y")})) == {"a": b"y"}


def test_an_error_in_the_middle_leaves_the_encoder_clean() -> None:
    encoder = Encoder(EncodeContext())
    for _ in range(3):
        with pytest.raises(SerializationError):
            encoder.encode({"a": {1}, "b": Serialize(b"x"), "c": _generator()})
        frames = encoder.encode({"a": Serialize(b"y"), "s": {2}})
        assert len(frames) == 3
        assert loads(frames) == {"a": b"y", "s": {2}}


def test_memory_errors_are_not_turned_into_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(obj: object, ctx: object) -> Any:
        raise MemoryError

    monkeypatch.setattr("trio_dcore.protocol._encoding.serialize", fail)
    with pytest.raises(MemoryError):
        dumps(Serialize(1))


def test_threads_may_share_an_encoder() -> None:
    encoder = Encoder(EncodeContext(extensions=True))
    wrong: list[object] = []

    def work(number: int) -> None:
        for i in range(300):
            message = {"n": number, "i": i, "s": {number}, "p": ToPickle([number] * 50), "d": dt.date(2024, 1, 1 + number)}
            back = loads(encoder.encode(message), extensions=True)
            if back != {**message, "p": [number] * 50}:
                wrong.append(back)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Tracked:
    pass


@pytest.mark.parametrize("bad", [False, True])
def test_an_encoder_keeps_nothing_of_a_message(bad: bool) -> None:
    encoder = Encoder(EncodeContext())
    obj = Tracked()
    gone = weakref.ref(obj)
    message = [obj, Serialize([obj]), {"__Set__": obj}, _generator() if bad else None]
    try:
        encoder.encode(message)
    except SerializationError:
        assert bad
    del message, obj
    gc.collect()
    assert gone() is None


def test_an_encoder_is_no_reference_cycle() -> None:
    gc.collect()
    encoder = Encoder(EncodeContext())
    encoder.encode({"a": {1}, "b": Serialize(b"x"), "c": np.arange(2)})
    del encoder
    assert gc.collect() == 0


def test_a_large_message_leaves_no_large_buffer() -> None:
    encoder = Encoder(TRUSTED_STOCK)
    assert encoder.ctx is TRUSTED_STOCK
    before = encoder._idle[0]
    encoder.encode(b"x" * 100)
    assert encoder._idle == [before]
    encoder.encode(b"x" * 1_000_000)
    assert len(encoder._idle) == 1
    assert encoder._idle[0] is not before


def test_unpicklable_is_not_loaded_by_accident() -> None:
    """The pickles that are sent are protocol 5, whatever was negotiated for the pickle family (wire document, section 3)."""
    frames = dumps(Plain(), EncodeContext(pickle_protocol=4))
    data = msgpack.unpackb(frames[1])["pickled-obj"]
    assert data[:2] == b"\x80\x05"
    assert pickle.loads(data) == Plain()
