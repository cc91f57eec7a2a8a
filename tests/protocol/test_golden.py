"""What a real stock peer wrote (tests/golden): read by ours, and written again, to the byte.

The files are made by tests/golden/record.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from distributed.core import Status as StockStatus

from trio_dcore.protocol import DecodeContext, EncodeContext, Limits, Serialize, Serialized, ToPickle, UnsafePayload
from trio_dcore.protocol._buffers import flat
from trio_dcore.protocol._error_decoding import exception_from_reply
from trio_dcore.protocol._frames import FrameParser, pack_prelude
from trio_dcore.protocol._messages import Decoder, Encoder

GOLDEN = Path(__file__).parent.parent / "golden"
INDEX = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))
SAME_VERSIONS = INDEX["versions"]["numpy"].split(".")[0] == np.__version__.split(".")[0] and INDEX["versions"]["python"].split(
    "."
)[:2] == [str(part) for part in sys.version_info[:2]]
API = SimpleNamespace(Serialize=Serialize, ToPickle=ToPickle, Status=StockStatus)
UNTRUSTED = DecodeContext(allow_pickle=lambda: False)

# Stock's matrix, and ours on making the cases' values equal to it.
pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")


def load_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_cases", GOLDEN / "cases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_cases"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CASES = {case.name: case for case in load_cases().CASES}


def recorded(name: str) -> bytes:
    return (GOLDEN / "messages" / f"{name}.bin").read_bytes()


def parse(data: bytes, step: int | None = None) -> list[list[Any]]:
    """All messages of a byte stream, fed at once or in steps."""
    parser = FrameParser(Limits())
    messages = []
    for start in range(0, len(data), step or len(data)):
        parser.feed(data[start : start + (step or len(data))])
        while (frames := parser.next_message()) is not None:
            messages.append(frames)
    assert not parser.mid_message
    return messages


def frames_of(name: str) -> list[Any]:
    (frames,) = parse(recorded(name))
    return frames


def encode_context(case: Any) -> EncodeContext:
    return EncodeContext(
        compression=case.context.get("compression"),
        pickle_protocol=case.context.get("pickle-protocol", 5),
        shard=case.context.get("shard"),
    )


def wire(frames: list[Any]) -> bytes:
    return b"".join([pack_prelude(frames), *map(flat, frames)])


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Enum):
        return isinstance(right, Enum) and (type(left).__name__, left.name) == (type(right).__name__, right.name)
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ma.MaskedArray):
        return left is right or repr(left) == repr(right)
    if isinstance(left, np.ndarray):
        same = left.dtype == right.dtype and left.shape == right.shape and left.flags.writeable == right.flags.writeable
        return same and repr(left) == repr(right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def expected(case: Any) -> Any:
    return case.message(API) if case.value is None else case.value()


def test_index_and_cases_agree() -> None:
    assert [entry["name"] for entry in INDEX["messages"]] == list(CASES)
    assert {path.stem for path in (GOLDEN / "messages").iterdir()} == set(CASES)
    for entry in INDEX["messages"]:
        assert entry["description"] == CASES[entry["name"]].description, "record.py was not run after cases.py was changed"
        assert entry["bytes"] == len(recorded(entry["name"]))


@pytest.mark.parametrize("name", CASES)
class TestMessages:
    def test_framing_in_any_steps(self, name: str) -> None:
        data = recorded(name)
        whole = parse(data + data)
        assert len(whole) == 2
        for step in (1, 7, 4096) if len(data) < 2000 else (4096,):
            assert [list(map(bytes, frames)) for frames in parse(data, step)] == [list(map(bytes, whole[0]))]

    def test_is_read(self, name: str) -> None:
        case = CASES[name]
        assert equal(Decoder(DecodeContext()).resolve(frames_of(name)), expected(case))

    def test_is_read_without_trust_if_it_needs_none(self, name: str) -> None:
        case = CASES[name]
        if case.trust:
            with pytest.raises(UnsafePayload):
                Decoder(UNTRUSTED).resolve(frames_of(name))
        else:
            assert equal(Decoder(UNTRUSTED).resolve(frames_of(name)), expected(case))

    def test_is_read_from_memory_that_cannot_be_written_to(self, name: str) -> None:
        frames = [bytes(frame) for frame in frames_of(name)]
        assert equal(Decoder(DecodeContext()).resolve(frames), expected(CASES[name]))

    def test_is_written_the_same(self, name: str) -> None:
        case = CASES[name]
        frames = Encoder(encode_context(case)).encode(case.message(API))
        if case.exact == "yes" or (case.exact == "versions" and SAME_VERSIONS):
            assert [bytes(flat(frame)) for frame in frames] == [bytes(frame) for frame in frames_of(name)]
            # The outer length, a hint about memory, counts the pieces of a cut bytes object differently.
            start = 8 if name == "sharded-collection" else 0
            assert wire(frames)[start:] == recorded(name)[start:]
        assert equal(Decoder(DecodeContext()).resolve(parse(wire(frames))[0]), expected(case))


@pytest.mark.parametrize("name", [name for name in CASES if b"__Serialized__" in recorded(name)])
def test_payload_is_passed_on_as_it_came(name: str) -> None:
    frames = frames_of(name)
    message = Decoder(DecodeContext(deserialize=False)).resolve(frames)
    assert any(isinstance(value, Serialized) for value in message.values())
    again = Encoder(EncodeContext(compression="zlib", shard=5)).encode(message)
    assert [bytes(flat(frame)) for frame in again] == [bytes(frame) for frame in frames]


def test_only_what_needs_it_is_said_to_need_trust() -> None:
    assert {name for name, case in CASES.items() if case.trust} == {
        *("frozenset", "datetime", "decimal", "fraction", "complex", "uuid", "path", "function", "numpy-int", "bare-array"),
        *("to-pickle", "pickle-family", "pickle-buffers", "pickle-protocol-4", "numpy-objects", "collection-pickles"),
        "compressed-pickle",
    }


def test_compressed_files_are_compressed() -> None:
    for name, case in CASES.items():
        codec = case.context.get("compression")
        if codec is not None:
            assert len(recorded(name)) < 10_000
            assert codec.encode() in recorded(name)


# -- conversations ---------------------------------------------------------------------------------------------------------------


def spoken(name: str, side: str) -> list[Any]:
    """The messages of one side, decoded."""
    decoder = Decoder(DecodeContext())
    data = (GOLDEN / "conversations" / f"{name}.{side}.bin").read_bytes()
    messages = parse(data)
    if len(data) < 4000:
        assert [list(map(bytes, frames)) for frames in parse(data, 1)] == [list(map(bytes, frames)) for frames in messages]
    return [decoder.resolve(frames) for frames in messages]


HELLO = {"compression": None, "python": tuple(map(int, INDEX["versions"]["python"].split("."))), "pickle-protocol": 5}
CLOSE = {"op": "close", "reply": False}


class TestConversations:
    @pytest.mark.parametrize("entry", INDEX["conversations"], ids=lambda entry: entry["name"])
    def test_index(self, entry: dict[str, Any]) -> None:
        for side in ("client", "server"):
            path = GOLDEN / "conversations" / f"{entry['name']}.{side}.bin"
            assert path.stat().st_size == sum(size for who, size in entry["turns"] if who == side)

    @pytest.mark.parametrize("entry", INDEX["conversations"], ids=lambda entry: entry["name"])
    def test_handshake(self, entry: dict[str, Any]) -> None:
        for side in ("client", "server"):
            data = (GOLDEN / "conversations" / f"{entry['name']}.{side}.bin").read_bytes()
            assert Decoder(UNTRUSTED).resolve(parse(data)[0]) == HELLO
            assert data.startswith(wire(Encoder(EncodeContext()).encode(HELLO)))

    @pytest.mark.parametrize(
        ("name", "client", "server"),
        [
            (
                "add",
                [{"op": "add", "x": 1, "y": 2, "reply": True}, {"op": "add", "x": -1, "y": 0.5, "reply": True}, CLOSE],
                [3, -0.5],
            ),
            ("unknown-op", [{"op": "no_such_op", "x": 1, "reply": True}, CLOSE], [None]),
            (
                "stream",
                [
                    {"op": "connection_stream", "reply": False},
                    ({"op": "inc", "x": 1}, {"op": "inc", "x": 2}),
                    ({"op": "inc", "x": 3},),
                    ({"op": "close-stream"},),
                ],
                [],
            ),
        ],
    )
    def test_plain_ones_both_ways(self, name: str, client: list[Any], server: list[Any]) -> None:
        encoder = Encoder(EncodeContext())
        for side, messages in (("client", client), ("server", server)):
            assert spoken(name, side)[1:] == messages
            data = (GOLDEN / "conversations" / f"{name}.{side}.bin").read_bytes()
            assert data == b"".join(wire(encoder.encode(message)) for message in [HELLO, *messages])

    def test_two_arrays(self) -> None:
        first, second = np.arange(5_000), np.arange(6_000.0)
        request, reply = spoken("two-arrays", "client")[1], spoken("two-arrays", "server")[1]
        assert equal(request, {"op": "swap", "a": first, "b": second, "reply": True})
        assert equal(reply, {"a": second, "b": first})
        for side, message in (
            ("client", {"op": "swap", "a": Serialize(first), "b": Serialize(second), "reply": True}),
            ("server", {"a": Serialize(second), "b": Serialize(first)}),
        ):
            data = (GOLDEN / "conversations" / f"two-arrays.{side}.bin").read_bytes()
            frames = Encoder(EncodeContext()).encode(message)
            assert wire(frames) in data
            # All but the second array is counted in outer.
            outer = int.from_bytes(pack_prelude(frames)[:8], "little")
            assert outer == len(wire(frames)) - 8 - len(frames[-1])

    @pytest.mark.parametrize(
        ("name", "kind", "text"),
        [("error", ValueError, "no such thing"), ("wrong-arguments", TypeError, "add() got an unexpected keyword argument 'z'")],
    )
    def test_errors(self, name: str, kind: type[Exception], text: str) -> None:
        reply = spoken(name, "server")[1]
        assert set(reply) == {"status", "exception", "traceback", "exception_text", "traceback_text"}
        assert reply["status"] == "uncaught-error"
        assert type(reply["exception"]) is bytes
        assert type(reply["traceback"]) is bytes
        assert reply["exception_text"] == repr(kind(text))
        for trusted in (True, False):
            error = exception_from_reply(reply, allow_pickle=lambda trusted=trusted: trusted)
            assert isinstance(error, kind)
            assert str(error) == text

    def test_value_that_could_not_be_sent(self) -> None:
        data = (GOLDEN / "conversations" / "unserializable.server.bin").read_bytes()
        reply = parse(data)[1]
        with pytest.raises(
            TypeError, match=r"Could not serialize object of type lock\n(?s:.*)cannot pickle '_thread\.lock' object"
        ):
            Decoder(UNTRUSTED).resolve(reply)
        left = Decoder(DecodeContext(deserialize=False)).resolve(reply)
        assert left.header["serializer"] == "error"
        assert [bytes(flat(frame)) for frame in Encoder(EncodeContext()).encode(left)] == [bytes(frame) for frame in reply]
