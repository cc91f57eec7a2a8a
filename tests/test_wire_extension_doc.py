"""docs/wire-extension.md says what the code does: its tables, its examples, and its conversation, which is recorded anew.

After a change of the bytes that is meant, ``python tests/test_wire_extension_doc.py`` prints the conversation for section 14.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import fields
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from struct import Struct
from typing import Any
from uuid import UUID

import msgpack
import numpy
import pytest
import trio

from trio_dcore import RemoteError, RemoteProtocolError, Server, rpc
from trio_dcore.protocol import _envelope, _error_decoding, _error_pickles, _error_text, _extensions, _remote_errors
from trio_dcore.protocol._context import EncodeContext
from trio_dcore.protocol._envelope import Credit, RequestHeader, parse_credit, parse_envelope, parse_request_header
from trio_dcore.protocol._errors import (
    HandlerCancelled,
    LimitExceeded,
    NotAllowed,
    Overloaded,
    SerializationError,
    ServerClosing,
    UnknownOp,
    UnsafePayload,
)
from trio_dcore.protocol._frames import FrameParser, pack_prelude, single_frame
from trio_dcore.protocol._handshake import FEATURES, VERSION, local_handshake, negotiate
from trio_dcore.protocol._limits import Limits
from trio_dcore.protocol._messages import Encoder, loads
from trio_dcore.protocol._remote_errors import error_reply, error_value, exception_from_value

PAGE = Path(__file__).parent.parent / "docs" / "wire-extension.md"

HANDSHAKE = local_handshake(compression=None, window=(16, 2**20))
_U64 = Struct("<Q")

Conversation = list[tuple[str, bytes]]


# -- the page --------------------------------------------------------------------------------------------------------------------


@cache
def sections() -> dict[int, tuple[str, str]]:
    """Number -> (title, text)."""
    parts = re.split(r"^## (\d+)\. (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {int(parts[i]): (parts[i + 1], parts[i + 2]) for i in range(1, len(parts), 3)}


def table(section: int, first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column is called ``first``."""
    lines = [line for line in sections()[section][1].splitlines() if line.startswith("|")]
    found: list[dict[str, str]] = []
    head: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if following.startswith("|---"):
            head = cells
        elif head and head[0] == first and not line.startswith("|---"):
            found.append(dict(zip(head, cells, strict=True)))
    assert found, f"section {section} has no table that begins with {first!r}"
    return found


def names(cell: str) -> list[str]:
    return re.findall(r"`\"?([^`\"]+)\"?`", cell)


def from_hex(cell: str) -> bytes:
    return bytes.fromhex(cell.strip("`"))


def number(text: str) -> int:
    """``2^63 - 1``, ``10 000`` or ``10 000 (a remark)``."""
    power = re.fullmatch(r"2\^(\d+)( - 1)?", text)
    return 2 ** int(power[1]) - bool(power[2]) if power else int(re.sub(r"\s+|\(.*", "", text))


def packed(message: object) -> bytes:
    """Frame 0 of a message that has no others."""
    (frame,) = Encoder(EncodeContext(extensions=True, allow_pickle=lambda: False)).encode(message)
    return bytes(frame)


def test_sections_have_the_numbers_by_which_the_code_names_them() -> None:
    assert [title for title, _ in sections().values()][3:6] == ["Kinds", "Streams", "Windows"]
    assert list(sections()) == list(range(1, 15))


def test_links_inside_the_page_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


# -- 1 and 2: negotiation, requests ----------------------------------------------------------------------------------------------


def test_the_handshake() -> None:
    assert [names(row["key"]) for row in table(1, "key")] == [[key] for key in HANDSHAKE["trio-dcore"]]
    assert "here 1 |" in sections()[1][1]
    assert VERSION == 1


def test_the_features() -> None:
    assert tuple(names(row["feature"])[0] for row in table(1, "feature")) == FEATURES
    assert "multiplex" not in FEATURES


def test_the_keys_of_a_request() -> None:
    keys = [names(row["key"])[0] for row in table(2, "key")]
    assert keys == [field.name for field in fields(RequestHeader)]
    full = {"id": 7, "deadline": 1.5, "stream": True, "window": (4, 100), "more": "ignored"}
    assert parse_request_header(full) == RequestHeader(7, 1.5, True, Credit(4, 100))
    for absent in ({"id": 7}, {"id": 7, "deadline": None}, {"id": 7, "deadline": float("inf"), "window": None}):
        assert parse_request_header(absent) == RequestHeader(7, None, False, None)
    with pytest.raises(RemoteProtocolError):
        parse_request_header({"id": 7, "deadline": float("nan")})


# -- 3 and 4: envelopes ----------------------------------------------------------------------------------------------------------


def test_the_kinds() -> None:
    rows = table(4, "kind")
    assert [int(row["kind"]) for row in rows] == list(range(10))
    for row in rows:
        assert getattr(_envelope, names(row["name"])[0].upper()) == int(row["kind"])
    with pytest.raises(RemoteProtocolError):
        parse_envelope((len(rows), 1, None))


def test_the_examples_of_the_kinds() -> None:
    values = {0: 3, 2: 3, 3: (3, 4), 6: (8, 224)}
    for row in table(4, "kind"):
        kind = int(row["kind"])
        if kind == _envelope.ERROR:
            continue
        value = values.get(kind)
        assert from_hex(row["frame 0, for id 1"]) == packed((kind, 1, value))
        assert parse_envelope(loads([packed((kind, 1, value))])) == (kind, 1, value)
        assert ("nil" in row["value"]) == (value is None)


# -- 6: windows ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[4], [5, 300, 0], [10, 200_000]])
@pytest.mark.parametrize("padding", [0, 7])
def test_the_size_of_a_message(lengths: list[int], padding: int) -> None:
    frames = [bytes(length) for length in lengths]
    prelude = pack_prelude(frames)
    outer = _U64.unpack_from(prelude)[0] + padding
    data = b"".join((_U64.pack(outer), prelude[8:], *frames, bytes(padding)))
    parser = FrameParser(Limits(message=None, head=None))
    parser.feed(data)
    assert parser.next_message() is not None
    assert parser.last_size == len(data) == 16 + 8 * len(frames) + sum(lengths) + padding


def test_the_example_of_a_window() -> None:
    window = HANDSHAKE["trio-dcore"]["window"]
    size = len(single_frame(packed((_envelope.ITEM, 3, 0))))
    text = " ".join(sections()[6][1].split())

    def grouped(count: int) -> str:
        return f"{count:,}".replace(",", " ")

    assert f"a window of {window[0]} items and {grouped(window[1])} bytes" in text
    left = f"{window[0] - 2} items and {grouped(window[1] - 2 * size)} bytes"
    assert f"so its size is {size}. After two of them the credit is {left}" in text
    assert f"a grant of `[2, {2 * size}]`" in text


# -- 11: extension types ---------------------------------------------------------------------------------------------------------

EXAMPLES = {
    "Decimal": Decimal,
    "UUID": UUID,
    "date": date,
    "datetime": datetime,
    "frozenset": frozenset,
    "numpy": numpy,
    "time": time,
    "timedelta": timedelta,
    "timezone": timezone,
}


def test_the_extension_types_are_all_there() -> None:
    rows = table(11, "code")
    assert sorted(int(row["code"]) for row in rows) == sorted(_extensions._READERS)
    for row in rows:
        assert from_hex(row["byte"]) == (int(row["code"]) % 256).to_bytes()


@pytest.mark.parametrize("row", table(11, "code"), ids=lambda row: row["code"])
def test_the_example_of_an_extension_type(row: dict[str, str]) -> None:
    value = eval(row["example"].strip("`"), EXAMPLES.copy())
    data = from_hex(row["bytes"])
    assert packed(value) == data
    assert from_hex(row["byte"]) in data
    decoded = loads([data], extensions=True)
    assert (type(decoded), decoded) == (type(value), value)


def test_other_codes() -> None:
    assert loads([b"\xd4\x05x"], extensions=True) == msgpack.ExtType(5, b"x")
    assert loads([b"\xd6\xff\0\0\0\1"], extensions=True) == msgpack.Timestamp(1)
    with pytest.raises(RemoteProtocolError):
        loads([b"\xd4\x80x"], extensions=True)


# -- 12: error values ------------------------------------------------------------------------------------------------------------


class Odd(Exception):
    """Not plain: a pickle is needed to tell what it holds."""


def samples() -> list[dict[str, Any]]:
    noted = ValueError("x")
    noted.add_note("n")
    noted.more = 1  # type: ignore[attr-defined]
    limit = LimitExceeded("x", limit="message", value=1, seen=2)
    cancelled = HandlerCancelled("x")
    cancelled.reason = "deadline"
    errors = [
        *(noted, limit, cancelled, ServerClosing("x"), Overloaded("x"), NotAllowed("x"), UnknownOp("x")),
        *(UnsafePayload("x", field="y"), SerializationError("x", path="y"), Odd({1, 2})),
        ExceptionGroup("x", [ValueError("y"), KeyError("z")]),
    ]
    return [error_value(error, trusted=True) for error in errors]


def test_the_keys_of_an_error_value() -> None:
    rows = table(12, "key")
    assert {key for row in rows for key in names(row["key"])} == {key for value in samples() for key in value}
    always = {names(row["key"])[0] for row in rows if row["present"] == "always"}
    assert all(always <= set(value) for value in samples())


def test_the_codes_of_an_error_value() -> None:
    assert {names(row["code"])[0] for row in table(12, "code")} == {value["code"] for value in samples()}


def test_codes_that_promise_that_nothing_was_started() -> None:
    promised = {names(row["code"])[0] for row in table(12, "code") if row["the handler"] == "never started"}
    assert promised == _remote_errors._NOT_STARTED
    for error in (ServerClosing("x"), Overloaded("x"), NotAllowed("x"), UnknownOp("x")):
        assert error_value(error, trusted=False, started=True)["code"] == "error"


def test_an_unknown_code_is_an_error() -> None:
    assert type(exception_from_value({"code": "new", "message": "x"}, allow_pickle=lambda: False)) is RemoteError


def test_the_key_of_a_plain_error_reply() -> None:
    shown = re.search(r"^    (\{\"status\".*\})$", sections()[12][1], re.MULTILINE)
    assert shown is not None
    assert re.findall(r"\"([\w-]+)\":", shown[1]) == list(error_reply(ValueError("x"), trusted=False, extension=True))


def test_the_limits_of_error_values() -> None:
    def value(cell: str) -> int | None:
        return number(cell) if cell[0].isdigit() else None

    text = Limits().error_text
    rows = table(12, "what")
    assert {row["what"]: (value(row["a trio_dcore peer writes at most"]), value(row["and reads at most"])) for row in rows} == {
        "characters of `message`, of `traceback`": (text, _error_decoding._MAX_TEXT),
        "characters of a note": (text, _error_decoding._MAX_TEXT),
        "characters of `type` and the names in `mro`": (_error_text._MAX_NAME, _error_decoding._MAX_NAME),
        "names in `mro`": (_remote_errors._BASES, _error_decoding._MAX_NOTES),
        "`notes`": (_remote_errors._NOTES, _error_decoding._MAX_NOTES),
        "`args`": (text, _error_decoding._MAX_ARGS),
        "`attributes`": (_remote_errors._ATTRIBUTES, _error_decoding._MAX_ATTRIBUTES),
        "members in `errors`": (_remote_errors._LEAVES, _error_decoding._MAX_LEAVES),
        "bytes of `pickle`, over all members": (_error_pickles.MAX_PICKLE, None),
    }


# -- 13: limits ------------------------------------------------------------------------------------------------------------------


def accepted_version(value: int) -> object:
    return negotiate(HANDSHAKE, {**HANDSHAKE, "trio-dcore": {**HANDSHAKE["trio-dcore"], "version": value}})


def accepted_count(value: int) -> object:
    return negotiate(HANDSHAKE, {**HANDSHAKE, "trio-dcore": {**HANDSHAKE["trio-dcore"], "features": ["x"] * value}})


def accepted_name(value: int) -> object:
    return negotiate(HANDSHAKE, {**HANDSHAKE, "trio-dcore": {**HANDSHAKE["trio-dcore"], "features": ["x" * value]}})


def accepted_window(value: int) -> object:
    return negotiate(HANDSHAKE, {**HANDSHAKE, "trio-dcore": {**HANDSHAKE["trio-dcore"], "window": [value, value]}})


def accepted_grant(value: int) -> object:
    assert parse_request_header({"id": 1, "window": (value, value)}).window == parse_credit((value, value))
    return None


LIMITS: dict[str, Callable[[int], object]] = {
    "`version`": accepted_version,
    "features in a handshake": accepted_count,
    "characters of a feature's name": accepted_name,
    "each number of a handshake's `window`": accepted_window,
    "id of a request": lambda value: parse_request_header({"id": value}),
    "id of an envelope": lambda value: parse_envelope((0, value, None)),
    "each number of a grant, or of a request's `window`": accepted_grant,
}


@pytest.mark.parametrize("row", table(13, "what"), ids=lambda row: row["what"])
def test_a_limit(row: dict[str, str]) -> None:
    accept = LIMITS[row["what"]]
    low, high = number(row["from"]), number(row["to"])
    for value in (low, high):
        accept(value)
    for value in (low - 1, high + 1):
        # Id 0 is refused by the server, because ids grow; and msgpack's integers end at 2^64.
        if 0 <= value < 2**64 and (row["what"], value) != ("id of a request", 0):
            with pytest.raises(RemoteProtocolError):
                accept(value)


def test_how_much_of_a_window_is_used() -> None:
    text = " ".join(sections()[13][1].split())
    assert "uses at most 2^20 items and 2^32 bytes" in text
    assert "Its own windows are 16 items and 1 MiB" in text
    huge = {**HANDSHAKE, "trio-dcore": {**HANDSHAKE["trio-dcore"], "window": [2**60, 2**60]}}
    extension = negotiate(HANDSHAKE, huge).extension
    assert extension is not None
    assert extension.window == (2**20, 2**32)
    assert (Limits().window, Limits().window_bytes) == (16, 2**20)


# -- 14: the conversation --------------------------------------------------------------------------------------------------------

TITLES = [
    "handshake",
    "handshake",
    "call of `add(x=1, y=2)`",
    "reply",
    "call of `fail()`",
    "error",
    "stream of `ticks(n=2)`",
    "item",
    "item",
    "end",
    "goodbye; then the server closes",
]


def add(x: int, y: int) -> int:
    return x + y


def fail() -> None:
    raise ValueError("no luck")


async def ticks(n: int) -> Any:
    for number in range(n):
        yield number


async def use(remote: Any) -> None:
    """What the client does, up to the goodbye."""
    with trio.fail_after(2.5):
        assert await remote.add(x=1, y=2) == 3
    with pytest.raises(ValueError, match="no luck"):
        await remote.fail()
    async with remote.ticks.stream(n=2) as stream:
        assert [item async for item in stream] == [0, 1]


def normalised(message: bytes) -> bytes:
    """The message with what differs from run to run replaced by what the page has there."""
    value = msgpack.unpackb(message[24:], ext_hook=_extensions.decode_ext)
    if isinstance(value, dict) and "python" in value:
        value["python"] = [3, 11, 7]
    elif isinstance(value, dict) and "deadline" in value["trio-dcore"]:
        assert 0 < value["trio-dcore"]["deadline"] <= 2.5
        value["trio-dcore"]["deadline"] = 2.5
    elif isinstance(value, list) and value[0] == _envelope.ERROR:
        value[2]["traceback"] = value[2]["traceback"].splitlines(keepends=True)[-1]
    else:
        return message
    return single_frame(packed(value))


class Messages:
    """Takes messages, of a single frame each, out of a stream."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._data = b""

    async def next(self) -> bytes:
        """The next message; empty at the end."""
        while True:
            size = 8 + _U64.unpack_from(self._data)[0] if len(self._data) >= 8 else 8
            if len(self._data) >= size > 8:
                message, self._data = self._data[:size], self._data[size:]
                return message
            more = await self._stream.receive_some()
            if not more:
                assert not self._data
                return b""
            self._data += bytes(more)


async def watched(body: Callable[[trio.Nursery], Awaitable[None]]) -> None:
    """Run the body; fail if it takes long.  Not by a deadline, since clients tell servers about those."""

    async def watch() -> None:
        await trio.sleep(20)
        raise TimeoutError("the conversation hangs")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await body(nursery)
        nursery.cancel_scope.cancel()


async def listen(nursery: trio.Nursery, handler: Callable[[trio.SocketStream], Awaitable[None]]) -> str:
    (listener,) = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
    return f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}"


async def record() -> Conversation:
    """Have a client and a server talk through a relay, and return what they wrote."""
    heard: Conversation = []
    server = Server({"add": add, "fail": fail, "ticks": ticks})
    over = trio.Event()

    async def relay(client: trio.SocketStream) -> None:
        async def pass_on(direction: str, source: trio.SocketStream, target: trio.SocketStream) -> None:
            messages = Messages(source)
            while message := await messages.next():
                heard.append((direction, message))
                await target.send_all(message)
            nursery.cancel_scope.cancel()

        async with await trio.open_tcp_stream("127.0.0.1", server.port) as upstream, trio.open_nursery() as nursery:
            nursery.start_soon(pass_on, ">", client, upstream)
            nursery.start_soon(pass_on, "<", upstream, client)
        over.set()

    async def body(nursery: trio.Nursery) -> None:
        async with server:
            await server.listen("tcp://127.0.0.1:0")
            async with rpc(await listen(nursery, relay)) as remote:
                await use(remote)
                server.stop()
                await over.wait()

    await watched(body)
    # Neither side waits with its handshake for the other's.
    heard[:2] = sorted(heard[:2], key=lambda item: item[0], reverse=True)
    return [(direction, normalised(message)) for direction, message in heard]


def render(conversation: Conversation) -> str:
    """The conversation as it stands in section 14."""
    parts = []
    before = b""
    for title, (direction, message) in zip(TITLES, conversation, strict=True):
        if message == before:
            parts.append(f"`{direction}` {title}: the same {len(message)} bytes\n")
        else:
            parts.append(f"`{direction}` {title}: {len(message)} bytes\n\n```hex\n{annotated(message)}\n```\n")
        before = message
    return "\n".join(parts)


def annotated(message: bytes) -> str:
    outer, count, length = Struct("<3Q").unpack_from(message)
    assert count == 1
    lines = [
        (message[:8], f"outer = {outer}"),
        (message[8:16], f"n = {count}"),
        (message[16:24], f"length of frame 0 = {length}"),
    ]
    assert _annotate(message[24:], 0, 0, lines, b"", "") == length
    return "\n".join(f"{data.hex(' '):<47}  {text}".rstrip() for data, text in lines)


def _token(data: bytes, at: int) -> tuple[str, int, str, int]:
    """What begins at a place: its kind, the number of its parts, its text, and where it ends."""
    code = data[at]
    if code >> 4 == 8:
        return "map", code & 15, f"map of {code & 15}", at + 1
    if code >> 4 == 9:
        return "array", code & 15, f"array of {code & 15}", at + 1
    unpacker = msgpack.Unpacker()
    unpacker.feed(data[at:])
    value = unpacker.unpack()
    return "plain", 0, "nil" if value is None else json.dumps(value), at + unpacker.tell()


def _annotate(data: bytes, at: int, depth: int, lines: list[tuple[bytes, str]], key: bytes, prefix: str) -> int:
    """Add the lines for a value, whose key, if it has one, goes before it; returns where it ends."""
    kind, parts, text, end = _token(data, at)
    if kind == "array":
        place, texts = end, []
        for _ in range(parts):
            inner, _, shown, place = _token(data, place)
            texts.append(shown if inner == "plain" else "")
        if all(texts) and len(key) + place - at <= 16:
            lines.append((key + data[at:place], "  " * depth + f"{prefix}[{', '.join(texts)}]"))
            return place
    raw = data[at:end]
    if key and len(key + raw) > 20:
        lines.append((key, "  " * depth + prefix.rstrip()))
        key, prefix, depth = b"", "", depth + 1
    raw = key + raw
    lines.append((raw[:16], "  " * depth + prefix + text))
    lines.extend((raw[start : start + 16], "") for start in range(16, len(raw), 16))
    for _ in range(parts):
        if kind == "map":
            _, _, name, value = _token(data, end)
            end = _annotate(data, value, depth + 1, lines, data[end:value], name + ": ")
        else:
            end = _annotate(data, end, depth + 1, lines, b"", "")
    return end


def written() -> str:
    """The conversation as it stands in section 14, with the text before it taken off."""
    text = sections()[14][1]
    return text[text.index("`>` handshake") :]


def conversation() -> Conversation:
    """The conversation's bytes as a reader of the page would type them in."""
    found: Conversation = []
    for direction, rest in re.findall(r"^`([<>])` .*?\n(.*?)(?=^`[<>]`|\Z)", written(), re.MULTILINE | re.DOTALL):
        digits = re.findall(r"^((?:[0-9a-f]{2} )*[0-9a-f]{2})(?:  |$)", rest, re.MULTILINE)
        found.append((direction, bytes.fromhex(" ".join(digits)) if digits else found[-1][1]))
    return found


async def test_the_conversation_is_what_client_and_server_say() -> None:
    recorded = await record()
    assert conversation() == recorded
    assert written() == render(recorded)


async def test_a_server_answers_the_pages_client() -> None:
    server = Server({"add": add, "fail": fail, "ticks": ticks})

    async def body(_nursery: trio.Nursery) -> None:
        async with server:
            await server.listen("tcp://127.0.0.1:0")
            async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
                messages = Messages(stream)
                for title, (direction, message) in zip(TITLES, conversation(), strict=True):
                    if title.startswith("goodbye"):
                        server.stop()
                    if direction == ">":
                        await stream.send_all(message)
                    else:
                        assert normalised(await messages.next()) == message
                assert await messages.next() == b""

    await watched(body)


async def test_a_client_understands_the_pages_server() -> None:
    connections = 0
    said_goodbye = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        messages = Messages(stream)
        for direction, message in conversation() if connections == 1 else conversation()[:4]:
            if direction == "<":
                await stream.send_all(message)
            else:
                assert normalised(await messages.next()) == message
        if connections == 1:
            await stream.aclose()
            said_goodbye.set()
        else:
            assert await messages.next() == b""

    async def body(nursery: trio.Nursery) -> None:
        async with rpc(await listen(nursery, serve)) as remote:
            await use(remote)
            await said_goodbye.wait()
            # Nothing behind the goodbye was started, so the next call is made on a comm of its own.
            with trio.fail_after(2.5):
                assert await remote.add(x=1, y=2) == 3
        assert connections == 2

    await watched(body)


@pytest.mark.parametrize(
    ("messages", "answers"),
    [
        ([{"op": "echo", "trio-dcore": {"id": 0}}], 0),
        ([{"op": "echo", "trio-dcore": {"id": 3}}, {"op": "echo", "trio-dcore": {"id": 3}}], 1),
        ([{"op": "echo", "trio-dcore": {"id": 3}}, {"op": "echo", "trio-dcore": {"id": 4, "deadline": "soon"}}], 1),
        ([{"op": "echo", "trio-dcore": {"id": 3}}, (_envelope.WINDOW, 4, (1, 1))], 1),
        ([{"op": "echo", "trio-dcore": {"id": 3}}, (10, 3, None)], 1),
        ([{"op": "echo", "trio-dcore": [3]}], 0),
    ],
)
async def test_a_mistake_that_closes(messages: list[object], answers: int) -> None:
    server = Server()

    async def body(_nursery: trio.Nursery) -> None:
        async with server:
            await server.listen("tcp://127.0.0.1:0")
            async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
                received = Messages(stream)
                await stream.send_all(conversation()[0][1] + b"".join(single_frame(packed(message)) for message in messages))
                assert await received.next()
                for _ in range(answers):
                    assert await received.next() == single_frame(packed((_envelope.REPLY, 3, None)))
                assert await received.next() == b""

    await watched(body)


if __name__ == "__main__":
    print(render(trio.run(record)), end="")
