"""Valid input to start from: what a stock peer wrote (tests/golden), and what two peers of ours say to each other."""

from __future__ import annotations

import datetime
import decimal
import functools
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trio_dcore.protocol import (
    EncodeContext,
    FrameParser,
    HandlerCancelled,
    LimitExceeded,
    RemoteProtocolError,
    Serialize,
    ServerClosing,
    UnknownOp,
    dumps,
    error_reply,
    error_value,
    local_handshake,
    pack_prelude,
)
from trio_dcore.protocol._envelope import CANCEL, END, ERROR, GOODBYE, ITEM, ITEMS, KEY, PING, PONG, REPLY, WINDOW

__all__ = ["conversations", "frames_in", "messages", "wire"]

Frames = list[bytes]

_GOLDEN = Path(__file__).parent.parent / "golden"
# The few golden files of hundreds of kilobytes test layouts of memory, which small ones have as well.
_LARGEST = 8 * 1024


def wire(frames: Frames) -> bytes:
    """The bytes of one message."""
    return b"".join((pack_prelude(frames), *frames))


def frames_in(data: bytes) -> Iterator[Frames]:
    """The messages of a byte stream that are whole and valid."""
    parser = FrameParser()
    parser.feed(data)
    try:
        while (frames := parser.next_message()) is not None:
            yield [bytes(frame) for frame in frames]
    except (RemoteProtocolError, LimitExceeded):
        return


def _files(kind: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted((_GOLDEN / kind).glob("*.bin")):
        data = path.read_bytes()
        if len(data) <= _LARGEST:
            yield path.stem, data


_STRANGER = EncodeContext(extensions=True, allow_pickle=lambda: False)
_FRIEND = EncodeContext(extensions=True, compression="zlib", shard=1000)

_SAFE_TYPES: dict[str, Any] = {
    "int": 2**70,
    "huge": 1 << 14_400,  # repr() of it raises
    "complex": 1 + 2j,
    "decimal": decimal.Decimal("-12.50"),
    "uuid": uuid.UUID(int=5),
    "date": datetime.date(2024, 2, 29),
    "time": datetime.time(1, 2, 3, 4, tzinfo=datetime.UTC),
    "datetime": datetime.datetime(2024, 2, 29, 1, 2, 3, 4, datetime.timezone(datetime.timedelta(hours=1), "CET"), fold=1),
    "timedelta": datetime.timedelta(-1, 2, 3),
    "numpy": np.float32(1.5),
    "numpy time": np.datetime64("2024-02-29", "ns"),
    "frozenset": frozenset({5}),
    "dict": {"__Set__": [1, 2]},
    "keys": {frozenset({1}): 1, (1, (2, b"3")): 2, None: 3, 2**70: 4},
    "array": np.arange(6, dtype="<i2").reshape(2, 3),
}


def _errors() -> Iterator[Exception]:
    yield ValueError("too small", 5)
    yield FileNotFoundError(2, "No such file", "x.txt")
    yield UnicodeDecodeError("utf-8", b"abc", 0, 1, "bad")
    yield ExceptionGroup("two", [KeyError("a"), ExceptionGroup("inner", [TypeError("b")])])
    yield UnknownOp("no op 'x'")
    yield ServerClosing("closing")
    yield LimitExceeded.of("message", 5, 7, "a message")
    cancelled = HandlerCancelled("the handler was cancelled: grace over")
    cancelled.reason = "grace over"
    yield cancelled
    noted = RuntimeError("noted")
    noted.add_note("a note")
    noted.extra = (1, "two")  # type: ignore[attr-defined]
    yield noted


def _huge(handshake: Any, header: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """An integer whose repr() raises, everywhere."""
    huge = _SAFE_TYPES["huge"]
    yield (
        "ours-huge",
        [
            handshake,
            *({"op": huge}, {"op": huge, KEY: {"id": 1}}, {"op": "echo", "reply": huge, KEY: {"id": huge}}, huge, {huge: huge}),
            *({"op": "echo", "serializers": [huge]}, {"op": "echo", "serializers": huge}, {"op": "add", huge: 5, (huge, "x"): 7}),
            {"op": "echo", KEY: {"id": 5, "deadline": huge, "window": [huge, huge]}},
            *({"op": "count", KEY: {**header, "id": 6}}, [WINDOW, 6, huge], [WINDOW, huge, [huge, 1]], [huge, 6, huge]),
        ],
    )
    yield (
        "ours-huge-stream",
        [handshake, {"op": "connection_stream", "reply": False}, [huge, {"op": huge}, {huge: 1}], {"op": huge}],
    )
    value = {"type": "builtins.OSError", "message": "m", "args": [huge, huge], "attributes": {"errno": huge, "a": [huge]}}
    replies: tuple[Any, ...] = (
        {"status": "uncaught-error", "exception": huge, "exception_text": huge},
        {"status": "uncaught-error", KEY: {**value, "code": huge, "type": huge}},
        {"status": "uncaught-error", KEY: value},
        {"status": huge, huge: huge},
        [REPLY, huge, huge],
        [huge, 1, huge],
        [ERROR, 1, {**value, "code": "limit", "limit": huge, "value": huge, "seen": huge}],
        [ERROR, 1, {**value, "type": "builtins.KeyError", "message": ""}],
        [ERROR, 1, huge],
    )
    for number, reply in enumerate(replies):
        yield f"ours-huge-reply-{number}", [handshake, reply, reply]


def _ours() -> Iterator[tuple[str, list[Any]]]:
    """What peers of ours send, as values: the name of each and the messages in order."""
    handshake = local_handshake(compression=None, window=(16, 2**20), pooled=True)
    yield "ours-handshake", [handshake]
    yield "ours-types", [_SAFE_TYPES]
    for name, value in _SAFE_TYPES.items():
        yield f"ours-type-{name.replace(' ', '-')}", [{"op": "echo", "x": value, "reply": True}]
    yield "ours-call", [handshake, {"op": "add", "x": 1, "y": 2, "reply": True, KEY: {"id": 1}}]
    header = {"id": 1, "deadline": 5.0, "stream": True, "window": [4, 2**16]}
    yield (
        "ours-stream",
        [handshake, {"op": "count", "n": 6, "reply": True, KEY: header}, [WINDOW, 1, [4, 1000]], [CANCEL, 1, None]],
    )
    yield (
        "ours-both-ways",
        [
            handshake,
            {"op": "sums", "reply": True, KEY: header},
            *([ITEM, 1, 5], [ITEMS, 1, [5, 6]], [PING, 1, None], [WINDOW, 1, [1, 1]], [END, 1, None]),
            {"op": "identity", "reply": True, KEY: {"id": 2, "deadline": -1.0}},
        ],
    )
    yield from _huge(handshake, header)
    yield (
        "ours-plain",
        [handshake, {"op": "echo", "x": [Serialize([b"1", {"a": np.arange(3)}]), {1, 2}], "serializers": ["dask"]}],
    )
    yield (
        "ours-connection-stream",
        [
            handshake,
            {"op": "connection_stream", "reply": False},
            [{"op": "note", "x": 1}, {"op": "note", "x": 2}],
            [{"op": "close-stream"}],
        ],
    )
    yield (
        "ours-replies",
        [
            handshake,
            *([REPLY, 1, 3], [REPLY, 2, {"status": "OK"}], [PONG, 2, None], [ITEM, 3, 1], [ITEMS, 3, [1, 2]], [END, 3, None]),
            [GOODBYE, 3, None],
        ],
    )
    for number, error in enumerate(_errors()):
        for trusted in (False, True):
            yield (
                f"ours-error-{number}-{trusted}",
                [
                    handshake,
                    error_reply(error, trusted=trusted, extension=trusted),
                    [ERROR, 1, error_value(error, trusted=trusted)],
                ],
            )


@functools.cache
def conversations() -> dict[str, bytes]:
    """What one side of a connection sends, from its handshake on; by name."""
    found = dict(_files("conversations"))
    stock = next(frames_in(next(iter(found.values()))))
    for name, values in _ours():
        if len(values) > 1:
            found[name] = b"".join(wire([bytes(frame) for frame in dumps(value, _STRANGER)]) for value in values)
    for name, data in _files("messages"):
        # Each golden message once as the argument of a request would be too long to tell apart: it is sent as it is.
        found[f"golden-{name}"] = wire(stock) + data
    return found


@functools.cache
def messages() -> dict[str, Frames]:
    """Single messages as frames, by name."""
    found = {name: next(frames_in(data)) for name, data in _files("messages")}
    for name, data in _files("conversations"):
        for number, frames in enumerate(frames_in(data)):
            found[f"{name}-{number}"] = frames
    for name, values in _ours():
        for number, value in enumerate(values):
            for kind, context in (("stranger", _STRANGER), ("friend", _FRIEND)):
                found[f"{name}-{number}-{kind}"] = [bytes(frame) for frame in dumps(value, context)]
    seen: set[tuple[bytes, ...]] = set()
    for name, frames in list(found.items()):
        if tuple(frames) in seen:
            del found[name]
        seen.add(tuple(frames))
    return found
