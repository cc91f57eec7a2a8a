"""The conversation in section 14 of docs/wire-extension.md: recorded anew, and spoken by either side to the other.

After a change of the bytes that is meant, run this file as a program: it prints what section 14 has to show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from struct import Struct
from typing import Any

import msgpack
import pytest
import trio

from trio_dcore import Server, rpc
from trio_dcore.protocol import _envelope, _extensions
from trio_dcore.protocol._context import EncodeContext
from trio_dcore.protocol._frames import single_frame
from trio_dcore.protocol._messages import Encoder

PAGE = Path(__file__).parent.parent / "docs" / "wire-extension.md"

_U64 = Struct("<Q")

Conversation = list[tuple[str, bytes]]

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


def packed(message: object) -> bytes:
    """Frame 0 of a message that has no others."""
    (frame,) = Encoder(EncodeContext(extensions=True, allow_pickle=lambda: False)).encode(message)
    return bytes(frame)


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
    return "\n".join(
        f"`{direction}` {title}: {len(message)} bytes\n\n```text\n{annotated(message)}\n```\n"
        for title, (direction, message) in zip(TITLES, conversation, strict=True)
    )


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
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index("`>` handshake") :]


def conversation() -> Conversation:
    """The conversation's bytes as a reader of the page would type them in."""
    found: Conversation = []
    for direction, block in re.findall(r"^`([<>])` [^\n]*\n\n```text\n(.*?)^```$", written(), re.MULTILINE | re.DOTALL):
        digits = re.findall(r"^((?:[0-9a-f]{2} )*[0-9a-f]{2})(?:  |$)", block, re.MULTILINE)
        found.append((direction, bytes.fromhex(" ".join(digits))))
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


def opted_in(value: object) -> dict[str, object]:
    return {"op": "echo", "data": 3, "trio-dcore": value}


@pytest.mark.parametrize(
    ("messages", "answers"),
    [
        ([opted_in({"id": 0})], ["error reply"]),
        ([opted_in([3])], ["error reply"]),
        ([opted_in({"id": 3}), opted_in({"id": 3})], ["reply", "error reply"]),
        ([opted_in({"id": 3}), opted_in({"id": 4, "deadline": "soon"})], ["reply", "error reply"]),
        ([opted_in({"id": 3}), (_envelope.WINDOW, 4, (1, 1))], ["reply"]),
        ([opted_in({"id": 3}), (10, 3, None)], ["reply"]),
        ([opted_in({"id": 3}), [3]], ["reply"]),
        ([opted_in({"id": 3}), {"op": "echo", "data": msgpack.ExtType(5, b"x")}, (_envelope.END, 3, None)], ["reply", "value"]),
    ],
)
async def test_what_closes_and_what_does_not(messages: list[object], answers: list[str]) -> None:
    """The table of mistakes, as far as it is about requests and envelopes; the last row is no mistake."""
    server = Server()
    is_mistake = answers[-1] != "value"

    def sort_of(message: bytes) -> str:
        if message == single_frame(packed((_envelope.REPLY, 3, 3))):
            return "reply"
        value = msgpack.unpackb(message[24:])
        return "error reply" if isinstance(value, dict) and value["status"] == "uncaught-error" else "value"

    async def body(_nursery: trio.Nursery) -> None:
        async with server:
            await server.listen("tcp://127.0.0.1:0")
            async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
                received = Messages(stream)
                await stream.send_all(conversation()[0][1] + b"".join(single_frame(packed(message)) for message in messages))
                assert await received.next()
                assert [sort_of(await received.next()) for _ in answers] == answers
                if is_mistake:
                    assert await received.next() == b""
                else:
                    await stream.send_all(single_frame(packed({"op": "echo", "data": "still there"})))
                    assert await received.next() == single_frame(packed("still there"))

    await watched(body)


if __name__ == "__main__":
    print(render(trio.run(record)), end="")
