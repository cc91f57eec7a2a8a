"""What bad input gets: the table of the security document, section 3, line by line, over memory and tcp."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
import trio

from trio_dcore import CommClosedError, Limits, Security, Server, connect, in_thread
from trio_dcore.testing import ManualPeer, memory_network, no_leaks

PLACES = ["memory://", "tcp://127.0.0.1:0"]


class Canary:
    """Marks when it is unpickled."""

    sung = 0

    def __reduce__(self) -> Any:
        return (_sing, ())


def _sing() -> str:
    Canary.sung += 1
    return "sung"


class Scene:
    """A server, and peers that speak by hand."""

    def __init__(self, server: Server, network: Any, caplog: pytest.LogCaptureFixture) -> None:
        self.server = server
        self._network = network
        self._caplog = caplog

    async def peer(self, *, handshake: bool = True) -> ManualPeer:
        peer = await ManualPeer.connect(self.server.address, self._network)
        if handshake:
            await peer.handshake()
        return peer

    @property
    def lines(self) -> list[str]:
        """What the log was told, at INFO and above, since the server began to listen."""
        return [f"{record.levelname} {record.getMessage()}" for record in self._caplog.records if record.levelno >= logging.INFO]

    async def goes_on(self) -> None:
        """The server serves somebody else."""
        async with await self.peer() as other:
            await other.send({"op": "echo", "data": 7, "reply": True})
            assert await other.receive() == 7


@pytest.fixture(params=PLACES)
def scene(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Any:
    """``async with scene(handlers, **options) as found``: over each transport; must be quick, quiet and leave nothing behind."""

    @asynccontextmanager
    async def make(handlers: dict[str, Any] | None = None, *, trusted: bool = True, **options: Any) -> AsyncIterator[Scene]:
        caplog.set_level(logging.DEBUG, "trio_dcore")
        if not trusted:
            options.setdefault("security", Security(trust_loopback=False))
        with memory_network(trusted=trusted) as network, trio.fail_after(10):
            async with no_leaks(), Server(handlers, **options) as server:
                await server.listen(request.param)
                caplog.clear()
                yield Scene(server, network, caplog)
                server.stop(0)
                await server.finished()

    return make


async def refusal(peer: ManualPeer) -> dict[str, Any]:
    """The next answer, which must be an error's."""
    answer = await peer.receive()
    assert answer["status"] == "uncaught-error"
    return answer  # type: ignore[no-any-return]


async def until_closed(peer: ManualPeer) -> None:
    """All that comes is the server's handshake, if it speaks first."""
    with contextlib.suppress(CommClosedError):
        await peer.receive()
        await peer.expect_end()


async def still_there(peer: ManualPeer) -> None:
    """The connection was kept."""
    await peer.send({"op": "echo", "data": 8, "reply": True})
    assert await peer.receive() == 8


# -- garbage, HTTP, TLS bytes on a plain port: closed within 1 s, one INFO line with a hint of what it looked like -----------------


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "looks like HTTP"),
        (b"POST /api HTTP/1.0\r\n", "looks like HTTP"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)), "looks like TLS"),
        (b"\x15\x03\x03\x00\x02\x02\x28", "looks like TLS"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "looks like SSH"),
        (b"hello, is there anybody?\r\n", "looks like text"),
        (b"\xff" * 64, "tells of"),
        (bytes(16), "a message of zero frames"),
        (b"\x05" + bytes(7), "less than any prelude"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "tells of"),
    ],
)
async def test_another_protocol(data: bytes, hint: str, scene: Any) -> None:
    async with scene() as found:
        async with await found.peer(handshake=False) as peer:
            await peer.send_bytes(data)
            with trio.fail_after(1):
                await until_closed(peer)
        (line,) = found.lines
        assert line.startswith("INFO closing the connection from ")
        assert hint in line
        assert len(line) < 400
        assert found.server.statistics().errors == 1
        await found.goes_on()


async def test_another_protocol_in_small_pieces(scene: Any) -> None:
    async with scene() as found:
        async with await found.peer(handshake=False) as peer:
            for byte in b"GET / ":
                try:
                    await peer.send_bytes(bytes([byte]))
                    await trio.sleep(0.01)
                except trio.BrokenResourceError:
                    break
            with trio.fail_after(1):
                await until_closed(peer)
        (line,) = found.lines
        assert "looks like HTTP" in line


# -- length prefix absurd or inconsistent, truncated frame, zero frames: RemoteProtocolError, closed, no handler started -----------


def _frame(outer: int, count: int, *lengths: int, body: bytes = b"") -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in (outer, count, *lengths)) + body


@pytest.mark.parametrize(
    "data",
    [
        _frame(2**63, 1, 10),
        _frame(40, 2**40),
        _frame(16, 0),
        _frame(8, 1, 10),
        _frame(26, 1, 0, body=bytes(10)),
        _frame(30, 2, 5, 5, body=bytes(10)),
        _frame(2**40, 1, 2**40 - 16),
    ],
)
async def test_numbers_that_make_no_sense(data: bytes, scene: Any) -> None:
    async with scene() as found:
        async with await found.peer() as peer:
            await peer.send_bytes(data)
            assert await peer.expect_end() in (True, False)
        (line,) = found.lines
        assert line.startswith("INFO closing the connection from ")
        assert found.server.statistics().requests == {}
        await found.goes_on()


async def test_a_truncated_frame(scene: Any) -> None:
    async with scene() as found:
        async with await found.peer() as peer:
            await peer.send_bytes(ManualPeer.encode({"op": "echo", "data": 1})[:-3])
        while found.server.statistics().connections:
            await trio.lowlevel.checkpoint()
        assert found.lines == []  # somebody went away
        assert found.server.statistics().requests == {}
        await found.goes_on()


# -- frame 0 unreadable, framing intact: error reply, then closed ------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        b"\xc1",
        b"\x81",
        b"\x80\x80",
        b"\xa4\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 2000 + b"\x90",
        b"\x81\x80\x01",
    ],
)
async def test_frame_0_that_can_not_be_read(frame: bytes, scene: Any) -> None:
    async with scene() as found:
        async with await found.peer() as peer:
            await peer.send_frames([frame])
            answer = await refusal(peer)
            assert answer["exception_text"]
            assert await peer.expect_end()
        (line,) = found.lines
        assert line.startswith("INFO closing the connection from ")
        assert found.server.statistics().requests == {}
        await found.goes_on()


# -- message not a dict, no op, bad op type, non-string keys: error reply, connection kept; none if it says reply: False -----------


async def test_a_message_that_is_no_dict(scene: Any) -> None:
    async with scene() as found, await found.peer() as peer:
        for message in (None, 5, 1.5, True, "echo", b"echo", [], ["echo"], [{"op": "echo"}], 2**63):
            await peer.send(message)
            assert "a request must be a dict with an 'op'" in (await refusal(peer))["exception_text"]
        await still_there(peer)
        assert found.lines == []


async def test_a_message_without_an_op(scene: Any) -> None:
    async with scene() as found, await found.peer() as peer:
        ops = (None, 1, 1.5, True, b"echo", [], ["echo"], {"op": "echo"})
        for message in [{}, {"data": 1}, *({"op": op} for op in ops)]:
            for reply in ({}, {"reply": True}):
                await peer.send({**message, **reply})
                assert "the request has " in (await refusal(peer))["exception_text"]
            await peer.send({**message, "reply": False})
        await still_there(peer)  # so there was no answer to those
        assert len(found.lines) == 1
        assert "refused, and nobody waits for the answer: the request has " in found.lines[0]


async def test_keys_that_are_no_strings(scene: Any) -> None:
    started: list[Any] = []

    def plain(**arguments: Any) -> None:
        started.append(arguments)

    async def later(**arguments: Any) -> None:
        started.append(arguments)

    async def ticks(**arguments: Any) -> AsyncIterator[int]:
        started.append(arguments)
        yield 1

    async def with_comm(comm: Any, **arguments: Any) -> None:
        started.append(arguments)

    handlers = {"plain": plain, "keyed": dict, "later": later, "ticks": ticks, "comm": with_comm, "threaded": in_thread(plain)}
    async with scene(handlers) as found, await found.peer() as peer:
        for op in ("echo", *handlers):
            for key in (1, -1, 1.5, b"data", (1, 2), None, True, 2**60):
                request = {"op": op, key: 1}
                await peer.send_frames([msgpack.packb(request)])
                assert "keywords must be strings" in (await refusal(peer))["exception_text"]
                await peer.send_frames([msgpack.packb({**request, "reply": False})])
        await still_there(peer)
        assert started == []
        assert [line.split(" from ")[0] for line in found.lines] == ["INFO op 'echo'"]


# -- unknown op: UnknownOp error reply with the closest names, connection kept -----------------------------------------------------


async def test_an_unknown_op(scene: Any) -> None:
    async with scene({"multiply": lambda: 1, "_divide": lambda: 1}) as found, await found.peer() as peer:
        for op, text in (
            ("multipyl", "unknown op 'multipyl'; did you mean 'multiply'?"),
            ("xyzzy", "unknown op 'xyzzy'"),
            ("", "unknown op ''"),
            ("__class__", "unknown op '__class__'"),
            ("x" * 10**5, f"unknown op {'x' * 200!r}…"),
        ):
            await peer.send({"op": op, "reply": True})
            answer = await refusal(peer)
            assert answer["exception_text"].endswith(f"({text!r})") or text in answer["exception_text"]
            assert type(pickle.loads(answer["exception"])) is AttributeError
        await still_there(peer)
        assert found.lines == []


# -- wrong arguments: error reply naming the handler's signature, connection kept --------------------------------------------------


async def test_wrong_arguments(scene: Any) -> None:
    def add(x: int, y: int) -> int:
        return x + y

    async with scene({"add": add}) as found, await found.peer() as peer:
        for arguments in ({}, {"x": 1}, {"x": 1, "y": 2, "z": 3}, {"self": 1, "x": 1, "y": 2}):
            await peer.send({"op": "add", **arguments, "reply": True})
            answer = await refusal(peer)
            assert "wrong arguments" in answer["exception_text"]
            assert "add(x: 'int', y: 'int')" in answer["exception_text"]
            assert type(pickle.loads(answer["exception"])) is TypeError
        await still_there(peer)
        assert found.lines == []


# -- op blocked, or refused by authorize: NotAllowed reply, no payload deserialized, connection kept -------------------------------


@pytest.mark.parametrize("how", ["blocked", "refused", "raises"])
async def test_who_is_not_allowed(how: str, scene: Any) -> None:
    asked: list[Any] = []

    def authorize(peer: Any, op: str) -> bool:
        asked.append((peer.trusted, op))
        if how == "raises":
            raise ZeroDivisionError
        return op == "echo"

    options: dict[str, Any] = {"blocked_handlers": ["take"]} if how == "blocked" else {"authorize": authorize}
    Canary.sung = 0
    started: list[Any] = []
    async with scene({"take": lambda data: started.append(data)}, **options) as found, await found.peer() as peer:
        for _ in range(3):
            await peer.send({"op": "take", "data": Canary(), "reply": True})
            answer = await refusal(peer)
            assert type(pickle.loads(answer["exception"])) is ValueError
            assert "'take'" in answer["exception_text"]
            await peer.send({"op": "take", "data": Canary(), "reply": False})
        if how == "raises":
            assert len([line for line in found.lines if line.startswith("ERROR authorize")]) == 1
        else:
            await still_there(peer)
        if how != "blocked":
            assert asked[:5] == [(True, "take")] * 5
        assert Canary.sung == 0
        assert started == []
        assert sum("nobody waits" in line for line in found.lines) == 1
        assert found.server.statistics().refused >= 5


# -- unserialisable result: SerializationError reply, connection kept --------------------------------------------------------------


async def test_a_result_that_can_not_be_sent(scene: Any) -> None:
    class Stubborn:
        def __reduce__(self) -> Any:
            raise RuntimeError("not me")

    results = {"stubborn": Stubborn, "generator": lambda: (x for x in ()), "within": lambda: {"a": [Stubborn()]}}
    async with scene(results) as found, await found.peer() as peer:
        for op in results:
            await peer.send({"op": op, "reply": True})
            answer = await refusal(peer)
            assert type(pickle.loads(answer["exception"])) is TypeError
            await peer.send({"op": op, "reply": False})  # a result that nobody takes is none that can't be sent
        await still_there(peer)
        assert found.lines == []


# -- pickle from an untrusted peer: UnsafePayload reply, the canary never runs -----------------------------------------------------


@pytest.mark.parametrize("op", ["echo", "identity", "xyzzy", "blocked"])
async def test_a_pickle_of_a_stranger(op: str, scene: Any) -> None:
    Canary.sung = 0
    async with scene({"blocked": print}, trusted=False, blocked_handlers=["blocked"]) as found, await found.peer() as peer:
        for _ in range(3):
            await peer.send({"op": op, "data": Canary(), "reply": True})
            answer = await refusal(peer)
            if op in ("echo", "identity"):
                assert "data" in answer["exception_text"]
                assert "pickle" in answer["exception_text"]
            await peer.send({"op": op, "data": [{"x": Canary()}], "reply": False})
        await still_there(peer)
        assert Canary.sung == 0
        assert found.server.statistics().requests == {"echo": 1}
        assert len(found.lines) == 1
    async with scene() as found, await found.peer() as peer:
        await peer.send({"op": "echo", "data": Canary(), "reply": True})
        assert await peer.receive() == "sung"
        assert Canary.sung == 1


async def test_authorize_knows_before_a_payload_is_touched(scene: Any) -> None:
    Canary.sung = 0
    order: list[Any] = []

    def authorize(peer: Any, op: str) -> bool:
        order.append((op, peer.trusted, Canary.sung))
        return True

    def take(data: Any) -> None:
        order.append(Canary.sung)

    async with scene({"take": take}, authorize=authorize) as found, await found.peer() as peer:
        await peer.send({"op": "take", "data": Canary(), "reply": True})
        assert await peer.receive() is None
    assert order == [("take", True, 0), 1]


# -- the log ----------------------------------------------------------------------------------------------------------------------


async def test_a_stranger_gets_one_line_a_connection(scene: Any) -> None:
    """Whatever it sends that nobody is to answer."""
    started: list[Any] = []
    bad: list[dict[str, Any]] = [{"op": "x" * 10**4}, {"op": ["echo"] * 100}, {"op": "take", "y" * 10**4: 1}, {"op": "take"}, {}]
    async with scene({"take": lambda data: started.append(data)}, limits=Limits(requests=100)) as found:
        async with await found.peer() as peer:
            for _ in range(20):
                for message in bad:
                    await peer.send({**message, "reply": False})
            await still_there(peer)
        (line,) = found.lines
        assert line.startswith("INFO op ")
        assert len(line) < 2000
        assert started == []


async def test_a_handler_that_fails_for_nobody(scene: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is an error of the program's and so told, but not more than once a second."""

    def fail(number: int) -> None:
        raise ZeroDivisionError(f"number {number}")

    async with scene({"fail": fail, "other": fail}) as found, await found.peer() as peer:
        for number in range(50):
            await peer.send({"op": "fail", "number": number, "reply": False})
            await peer.send({"op": "other", "number": number, "reply": False})
        await still_there(peer)
        lines = found.lines
        assert {line.split(" from ")[0] for line in lines} == {"ERROR op 'fail'", "ERROR op 'other'"}
        assert len(lines) <= 4
        assert "ZeroDivisionError: number 0" in caplog.text


async def test_a_stream_of_nonsense(scene: Any) -> None:
    async with scene(stream_handlers={"note": lambda: None}) as found, await found.peer() as peer:
        await peer.send({"op": "connection_stream", "reply": False})
        for _ in range(30):
            await peer.send([{"op": "unknown"}, {"op": 5}, 7, None, {"op": "note", "wrong": 1}])
        await peer.send([{"op": "close-stream"}])
        assert await peer.expect_end()
        lines = found.lines
        assert 2 <= len(lines) <= 4
        assert sum("the stream handler 'note' failed" in line for line in lines) <= 2


async def test_reply_and_close_by_reference_that_are_no_bools(caplog: pytest.LogCaptureFixture) -> None:
    """Over inproc they may be objects of any kind."""

    class Odd:
        def __bool__(self) -> bool:
            raise ValueError("neither")

    async with Server() as server, await connect(await server.listen("inproc://")) as comm:
        for name in ("reply", "close"):
            await comm.write({"op": "echo", "data": 1, name: Odd()})
            answer = await comm.read()
            assert "neither" in str(answer)
            await comm.write({"op": "echo", "data": 1})
            assert await comm.read() == 1
    assert caplog.records == []
