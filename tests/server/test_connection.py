"""One connection: requests, answers, and everything that may go wrong between them."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import math
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy
import pytest
import trio
from msgpack import packb, unpackb
from trio.testing import wait_all_tasks_blocked

from trio_dcore import (
    Comm,
    CommClosedError,
    HandlerCancelled,
    LimitExceeded,
    Limits,
    NotAllowed,
    Overloaded,
    RemoteError,
    RemoteProtocolError,
    SerializationError,
    Server,
    ServerClosing,
    Status,
    ToPickle,
    UnknownOp,
    connect,
    current_request,
    in_thread,
    rpc,
    run_to_end,
    send_recv,
    to_serialize,
)
from trio_dcore.comm import FramedComm, InprocComm
from trio_dcore.protocol import dumps, exception_from_reply
from trio_dcore.protocol._envelope import CANCEL, END, ERROR, ITEM, ITEMS, PING, PONG, REPLY, WINDOW
from trio_dcore.testing import ManualPeer, memory_network

KEY = "trio-dcore"

_sung: list[str] = []


def _sing(song: str) -> str:
    _sung.append(song)
    return song


class Canary:
    """Sings when it is unpickled."""

    def __reduce__(self) -> Any:
        return _sing, ("tweet",)


@pytest.fixture(autouse=True)
def silence() -> None:
    _sung.clear()


async def add(x: int, y: int = 1) -> int:
    return x + y


def echo(x: Any = None) -> Any:
    return x


async def forever() -> None:
    await trio.sleep_forever()


class Watched:
    """A handler that waits for ever, and tells how it went."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.ended = trio.Event()
        self.go = trio.Event()
        self.outcome: BaseException | str | None = None

    async def __call__(self) -> str:
        self.started.set()
        try:
            await self.go.wait()
            self.outcome = "done"
        except BaseException as error:
            self.outcome = error
            raise
        finally:
            self.ended.set()
        return self.outcome


class OptedIn:
    """A client that speaks the extension by hand, over any transport."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    async def request(self, op: str, id: int = 1, *, header: dict[str, Any] | None = None, **arguments: Any) -> None:
        await self.comm.write({"op": op, "reply": True, KEY: {"id": id, **(header or {})}, **arguments})

    async def send(self, kind: Any, id: Any = 1, value: Any = None) -> None:
        await self.comm.write((kind, id, value))

    async def read(self) -> Any:
        return await self.comm.read()

    async def until_closed(self) -> list[Any]:
        """All that still comes, up to the end of the connection."""
        found = []
        while True:
            try:
                found.append(await self.comm.read())
            except CommClosedError:
                return found


@asynccontextmanager
async def opted_in(address: str) -> AsyncIterator[OptedIn]:
    async with await connect(address) as comm:
        yield OptedIn(comm)


async def closed_by_server(comm: Comm) -> bool:
    """Whether the next thing that comes is the end."""
    with pytest.raises(CommClosedError):
        await comm.read()
    return True


class TestKeys:
    async def test_reply_false_has_no_answer(self, where: str, serving: Any) -> None:
        async with serving({"add": add}, where) as (server, _remote), await connect(server.address) as comm:
            await comm.write({"op": "add", "x": 1, "reply": False})
            await comm.write({"op": "add", "x": 5, "reply": True})
            assert await comm.read() == 6
            assert server.statistics().requests == {"add": 2}

    async def test_reply_absent_and_odd_truths_want_an_answer(self, where: str, serving: Any) -> None:
        async with serving({"add": add}, where) as (server, _remote), await connect(server.address) as comm:
            for reply in ({}, {"reply": 1}, {"reply": "yes"}):
                await comm.write({"op": "add", "x": 5, **reply})
                assert await comm.read() == 6
            await comm.write({"op": "add", "x": 1, "reply": None})
            await comm.write({"op": "add", "x": 2, "reply": True})
            assert await comm.read() == 3

    async def test_close_ends_the_connection_behind_the_answer(self, where: str, serving: Any) -> None:
        async with serving({"add": add}, where) as (server, _remote):
            for fails in (False, True):
                async with await connect(server.address) as comm:
                    await comm.write({"op": "add", "x": "1" if fails else 1, "reply": True, "close": True})
                    answer = await comm.read()
                    assert answer["status"] == "uncaught-error" if fails else answer == 2
                    assert await closed_by_server(comm)

    async def test_close_without_reply(self, where: str, serving: Any) -> None:
        async with serving({"add": add}, where) as (server, _remote), await connect(server.address) as comm:
            await comm.write({"op": "add", "x": 1, "reply": False, "close": True})
            assert await closed_by_server(comm)

    async def test_the_op_close(self, where: str, serving: Any) -> None:
        async with serving({}, where) as (server, remote):
            async with await connect(server.address) as comm:
                await comm.write({"op": "close", "reply": True})
                assert await comm.read() == "OK"
                assert await closed_by_server(comm)
            async with await connect(server.address) as comm:
                await comm.write({"op": "close", "reply": False})
                assert await closed_by_server(comm)
            assert await remote.close() == "OK"
            assert await remote.echo(data=1) == 1

    async def test_a_handler_may_be_called_close(self, serving: Any) -> None:
        async with serving({"close": add}) as (_server, remote):
            assert await remote.close(x=1) == 2

    async def test_serializers_go_to_the_answer_and_to_a_handler_that_wants_them(self, where: str, serving: Any) -> None:
        def both(serializers: Any = "none") -> Any:
            return {"got": serializers, "data": to_serialize({"x": 1})}

        def neither() -> Any:
            return to_serialize({"x": 1})

        async with serving({"both": both, "neither": neither}, where) as (_server, remote):
            assert (await remote.both())["got"] == "none"
            assert tuple((await remote.both(serializers=("msgpack",)))["got"]) == ("msgpack",)
            assert await remote.neither(serializers=("msgpack",)) == {"x": 1}

    async def test_serializers_that_can_not_do_it(self, serving: Any) -> None:
        def unpackable() -> Any:
            return to_serialize(object())

        async with serving({"unpackable": unpackable, "add": add}, "tcp://127.0.0.1:0") as (server, remote):
            with pytest.raises(SerializationError) as caught:
                await remote.unpackable(serializers=("msgpack",))
            assert isinstance(caught.value, RemoteError)
            assert await remote.add(x=1) == 2
            assert server.statistics().connections == 1

    async def test_dont_reply(self, where: str, serving: Any) -> None:
        async def by_itself(comm: Comm) -> Status:
            await comm.write("by itself")
            return Status.dont_reply

        async with (
            serving({"by_itself": by_itself, "add": add}, where) as (server, _remote),
            await connect(server.address) as comm,
        ):
            for _ in range(2):
                assert await send_recv(comm, op="by_itself") == "by itself"
            assert await send_recv(comm, op="add", x=1) == 2

    async def test_dont_reply_to_a_caller_who_waits_for_an_envelope(self, where: str, serving: Any) -> None:
        async with serving({"silent": lambda: Status.dont_reply}, where) as (_server, remote):
            with pytest.raises(RemoteError, match="returned Status.dont_reply, and its caller waits"):
                await remote.silent()
            async with remote.silent.stream() as stream:
                assert [item async for item in stream] == []

    async def test_a_reserved_key_without_negotiation_is_an_argument(self, serving: Any) -> None:
        def take(**kwargs: Any) -> Any:
            return kwargs

        async with serving({"take": take}, "tcp://127.0.0.1:0") as (server, _remote):
            async with await ManualPeer.connect(server.address) as peer:
                await peer.handshake()
                await peer.send({"op": "take", "reply": True, KEY: {"id": 1}})
                assert await peer.receive() == {KEY: {"id": 1}}


class TestBadRequests:
    @pytest.mark.parametrize("message", [None, 1, "OK", (), (1, 2, 3), {1, 2}, True])
    async def test_what_is_no_dict(self, message: Any, where: str, serving: Any) -> None:
        async with serving({"add": add}, where) as (server, _remote), await connect(server.address) as comm:
            await comm.write(message)
            answer = await comm.read()
            assert answer["status"] == "uncaught-error"
            assert f"a request must be a dict with an 'op', not a {type(message).__name__}" in answer["exception_text"] or (
                isinstance(message, set) and where.startswith("tcp")
            )
            assert await send_recv(comm, op="add", x=1) == 2

    @pytest.mark.parametrize(
        ("op", "text"),
        [
            ({}, "the request has no 'op'"),
            ({"op": None}, "the request has no 'op'"),
            ({"op": 1}, "has an 'op' that is a int, not a str"),
            ({"op": b"add"}, "has an 'op' that is a bytes, not a str"),
            ({"op": {"add": 1}}, "has an 'op' that is a dict, not a str"),
            ({"op": ()}, "has an 'op' that is a tuple, not a str"),
        ],
    )
    async def test_what_has_no_op(self, op: dict[str, Any], text: str, where: str, serving: Any) -> None:
        async with serving({"add": add}, where) as (server, _remote), await connect(server.address) as comm:
            await comm.write({**op, "x": 1})
            answer = await comm.read()
            assert answer["status"] == "uncaught-error"
            assert text in answer["exception_text"]
            await comm.write({**op, "reply": False})
            assert await send_recv(comm, op="add", x=1) == 2

    async def test_an_unknown_op_has_suggestions(self, where: str, serving: Any) -> None:
        async with serving({"add": add, "added": add}, where) as (server, remote):
            with pytest.raises(UnknownOp, match="unknown op 'ad'; did you mean 'add'") as caught:
                await remote.ad()
            assert isinstance(caught.value, RemoteError)
            with pytest.raises(UnknownOp, match="unknown op 'xyzzy'$"):
                await remote.xyzzy()
            with pytest.raises(UnknownOp):
                await remote[""[:0] + "a" * 1000]()
            assert await remote.add(x=1) == 2
            assert server.statistics().connections == 1

    async def test_an_unknown_op_that_nobody_waits_for(self, where: str, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "trio_dcore.server")
        async with serving({"add": add}, where) as (_server, remote):
            await remote.xyzzy.notify()
            assert await remote.add(x=1) == 2
            while "unknown op 'xyzzy'" not in caplog.text:
                await trio.lowlevel.checkpoint()
        assert "nobody waits for the answer" in caplog.text
        assert not [record for record in caplog.records if record.levelno > logging.INFO]

    async def test_a_handler_that_is_taken_away_or_exchanged(self, where: str, serving: Any) -> None:
        async with serving({"add": add}, where) as (server, remote):
            assert await remote.add(x=1) == 2
            server.handlers["add"] = lambda x: -x
            assert await remote.add(x=1) == -1
            del server.handlers["add"]
            with pytest.raises(UnknownOp):
                await remote.add(x=1)

    async def test_frame_0_that_can_not_be_read(self, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "trio_dcore.server")
        async with serving({"add": add}, "tcp://127.0.0.1:0") as (server, remote):
            assert await remote.add(x=1) == 2
            async with await ManualPeer.connect(server.address) as peer:
                await peer.handshake()
                await peer.send_frames([b"\xc1"])
                assert (await peer.receive())["status"] == "uncaught-error"
                assert await peer.expect_end()
            assert await remote.add(x=1) == 2
            assert server.statistics().errors == 1
        assert "closing the connection from" in caplog.text

    async def test_a_payload_that_is_not_there(self, serving: Any) -> None:
        async with serving({"echo": echo}, "tcp://127.0.0.1:0") as (server, remote):
            assert await remote.echo(x=1) == 1
            async with await ManualPeer.connect(server.address) as peer:
                await peer.handshake()
                await peer.send({"op": "echo", "x": to_serialize(1)})
                assert await peer.receive() == 1
                await peer.send_frames([packb({"op": "echo", "x": {"__Serialized__": 7}})])
                assert (await peer.receive())["status"] == "uncaught-error"
                assert await peer.expect_end()
            assert await remote.echo(x=1) == 1
            assert server.statistics().requests == {"echo": 3}

    async def test_a_request_that_is_a_marker(self, serving: Any) -> None:
        """Its payload could be anything, also a request for another op than the one that was admitted."""
        async with serving({"echo": echo}, "tcp://127.0.0.1:0") as (server, remote):
            async with await ManualPeer.connect(server.address) as peer:
                await peer.handshake()
                head, *payload = dumps(to_serialize({"op": "echo", "x": 1}))
                await peer.send_frames([packb({"op": "echo", "reply": True, **unpackb(head)}), *payload])
                assert "a request can't be a marker" in (await peer.receive())["exception_text"]
            assert await remote.echo(x={"__Serialized__": 1}) == {"__Serialized__": 1}

    @pytest.mark.parametrize("serializers", ["msgpack", 5, {"msgpack": 1}, ("msgpack", 5)])
    async def test_serializers_that_are_none(self, serializers: Any, where: str, serving: Any) -> None:
        async with serving({"add": add}, where) as (server, _remote), await connect(server.address) as comm:
            await comm.write({"op": "add", "x": 1, "serializers": serializers, "reply": True})
            assert "'serializers' must be a list of family names" in (await comm.read())["exception_text"]
            assert await send_recv(comm, op="add", x=1) == 2

    @pytest.mark.parametrize(
        "data",
        [b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", bytes(64), b"\x01" + bytes(7) + b"\x01" + bytes(23), b"\xff" * 64],
        ids=repr,
    )
    async def test_bytes_that_are_no_message(self, data: bytes, serving: Any) -> None:
        async with serving({"echo": echo}, "tcp://127.0.0.1:0") as (server, remote):
            assert await remote.echo(x=1) == 1
            async with await ManualPeer.connect(server.address) as peer:
                await peer.handshake()
                await peer.send_bytes(data)
                await peer.expect_end()
            assert await remote.echo(x=1) == 1
            assert server.statistics().errors == 1


class TestRefusals:
    async def test_blocked_handlers(self, where: str, serving: Any) -> None:
        async with serving({"add": add, "echo": echo}, where, blocked_handlers=["echo"]) as (server, remote):
            with pytest.raises(NotAllowed, match="the op 'echo' is blocked"):
                await remote.echo(x=Canary() if where.startswith("tcp") else 1)
            assert await remote.add(x=1) == 2
            server.blocked_handlers.remove("echo")
            assert await remote.echo(x=1) == 1
            statistics = server.statistics()
            assert statistics.refused == 1
            assert statistics.connections == 1
        assert _sung == []

    async def test_authorize_is_asked_about_peer_and_op(self, where: str, serving: Any) -> None:
        asked: list[Any] = []

        def authorize(peer: Any, op: str) -> bool:
            asked.append((peer.kind, peer.trusted, op))
            return op != "echo"

        async with serving({"add": add, "echo": echo}, where, authorize=authorize) as (server, remote):
            assert await remote.add(x=1) == 2
            with pytest.raises(NotAllowed, match="may not call 'echo'"):
                await remote.echo(x=1)
            with pytest.raises(UnknownOp):
                await remote.xyzzy()  # not asked: there is nothing to allow
            assert await remote.add(x=1) == 2
            assert server.statistics().refused == 1
        kind = "inproc" if where.startswith("inproc") else "loopback"
        assert asked == [(kind, True, "add"), (kind, True, "echo"), (kind, True, "add")]

    @pytest.mark.parametrize("payload", ["bare", "pickled", "serialized"])
    async def test_authorize_is_asked_before_any_payload_is_read(self, payload: str, serving: Any) -> None:
        value = {"bare": Canary(), "pickled": ToPickle(Canary()), "serialized": to_serialize(Canary())}[payload]
        heard: list[list[str]] = []

        def authorize(peer: Any, op: str) -> bool:
            heard.append(list(_sung))
            return op == "echo"

        async with serving({"echo": echo, "refused": echo}, "tcp://127.0.0.1:0", authorize=authorize) as (_server, remote):
            with pytest.raises(NotAllowed):
                await remote.refused(x=value)
            with pytest.raises(UnknownOp):
                await remote.xyzzy(x=value)
            assert _sung == []
            assert await remote.echo(x=value) == "tweet"
            assert _sung == ["tweet"]
        assert heard == [[], []]

    async def test_authorize_that_raises_refuses(self, where: str, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        def authorize(peer: Any, op: str) -> bool:
            raise ZeroDivisionError("in authorize")

        async with serving({"add": add}, where, authorize=authorize) as (server, remote):
            for _ in range(2):
                with pytest.raises(NotAllowed):
                    await remote.add(x=1)
            assert server.statistics().requests == {}
            assert server.statistics().connections == 1
        assert "ZeroDivisionError: in authorize" in caplog.text

    async def test_authorize_that_gives_a_coroutine_refuses(self, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        async def ask() -> bool:
            return True

        class Later:
            def __await__(self) -> Any:
                yield

        for verdict in (ask, Later):
            async with serving({"add": add}, authorize=lambda peer, op, verdict=verdict: verdict()) as (_server, remote):
                with pytest.raises(NotAllowed):
                    await remote.add(x=1)
            assert "authorize must be a plain function" in caplog.text

    async def test_who_may_not_call_and_does_not_wait(self, where: str, serving: Any) -> None:
        async with serving({"add": add, "echo": echo}, where, authorize=lambda peer, op: op == "add") as (server, _remote):
            async with await connect(server.address) as comm:
                await comm.write({"op": "echo", "reply": False})
                assert await send_recv(comm, op="add", x=1) == 2
                assert server.statistics().requests == {"add": 1}

    async def test_an_error_of_that_name_from_a_handler_is_a_failure(self, where: str, serving: Any) -> None:
        def refuse() -> None:
            raise NotAllowed("not on Sundays")

        async with serving({"refuse": refuse}, where) as (_server, remote):
            with pytest.raises(RemoteError, match="not on Sundays") as caught:
                await remote.refuse()
            assert caught.value.type_name.endswith("NotAllowed")


class TestResults:
    @pytest.mark.parametrize(
        "value",
        [
            None,
            "OK",
            {"status": "uncaught-error"},
            {"status": "uncaught-error", "exception": b"no pickle", "traceback": None},
            {"status": "error"},
            (0, 1, 2),
            (1, 1, {"code": "error"}),
            (9, 1, None),
            {"op": "close"},
            {"op": "add", KEY: {"id": 1}},
            {KEY: 1},
            (),
            {},
            {"__Serialized__": 1},
            {"__Pickled__": 1},
            {"__Set__": True, "as-list": (1,)},
        ],
    )
    async def test_what_looks_like_protocol_is_data(self, value: Any, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, remote):
            for _ in range(2):
                assert await remote.echo(x=value) == value
            async with remote.echo.stream(x=value) as stream:
                assert [item async for item in stream] == ([] if value is None else [value])
            assert server.statistics().connections == 1

    async def test_status_is_read_back_as_ours(self, where: str, serving: Any) -> None:
        async with serving({"status": lambda: {"status": Status.running}}, where) as (_server, remote):
            assert (await remote.status())["status"] is Status.running

    @pytest.mark.parametrize("size", [0, 1, 3])
    async def test_numpy_arrays(self, size: int, where: str, serving: Any) -> None:
        array = numpy.arange(size)
        async with serving({"echo": echo}, where) as (server, remote):
            found = await remote.echo(x=array)
            assert isinstance(found, numpy.ndarray)
            numpy.testing.assert_array_equal(found, array)
            async with remote.echo.stream(x=array) as stream:
                (found,) = [item async for item in stream]
                numpy.testing.assert_array_equal(found, array)
            async with await connect(server.address) as comm:
                numpy.testing.assert_array_equal(await send_recv(comm, op="echo", x=array), array)

    @pytest.mark.parametrize("kind", ["generator", "lock", "frame"])
    async def test_a_result_that_can_not_be_sent(self, kind: str, serving: Any) -> None:
        def make() -> Any:
            if kind == "generator":
                return {"deep": [(i for i in range(3))]}
            return {"deep": [threading.Lock() if kind == "lock" else object.__new__(type("X", (), {"__reduce__": None}))]}

        async with serving({"make": make, "add": add}, "tcp://127.0.0.1:0") as (server, remote):
            with pytest.raises(SerializationError, match=r"\['deep'\]\[0\]") as caught:
                await remote.make()
            assert isinstance(caught.value, RemoteError)
            async with remote.make.stream() as stream:
                with pytest.raises(SerializationError):
                    await stream.receive()
            assert await remote.add(x=1) == 2
            async with await connect(server.address) as comm:
                with pytest.raises(RemoteError):
                    await send_recv(comm, op="make")
                assert await send_recv(comm, op="add", x=1) == 2
            assert server.statistics().connections <= 2

    async def test_over_inproc_the_object_itself_comes(self, serving: Any) -> None:
        thing = object()
        async with serving({"echo": echo}) as (_server, remote):
            assert await remote.echo(x=thing) is thing

    async def test_a_request_over_inproc_is_not_changed(self, serving: Any) -> None:
        request = {"op": "echo", "x": [1], "reply": True, "close": False}
        async with serving({"echo": echo}) as (server, _remote), await connect(server.address) as comm:
            await comm.write(request)
            assert await comm.read() == [1]
        assert request == {"op": "echo", "x": [1], "reply": True, "close": False}


class TestErrors:
    async def test_of_a_handler(self, where: str, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        def fail(how: str) -> None:
            raise {"value": ValueError, "key": KeyError, "closed": CommClosedError, "os": OSError}[how](f"{how} it is")

        async with serving({"fail": fail, "add": add}, where) as (server, remote):
            for how, kind in (("value", ValueError), ("key", KeyError), ("os", OSError)):
                with pytest.raises(kind, match=f"{how} it is") as caught:
                    await remote.fail(how=how)
                assert isinstance(caught.value, RemoteError)
                assert "in fail" in caught.value.remote_traceback
            with pytest.raises(RemoteError, match="closed it is"):
                await remote.fail(how="closed")
            assert await remote.add(x=1) == 2
            assert server.statistics().connections == 1
        assert caplog.records == []

    async def test_a_protocol_error_of_a_handler_is_an_answer(self, where: str, serving: Any) -> None:
        """It may have come from a third server, and says nothing about this connection."""

        def fail(kind: str) -> None:
            raise {"protocol": RemoteProtocolError, "limit": LimitExceeded}[kind]("of somebody else")

        async with serving({"fail": fail, "add": add}, where) as (server, remote):
            for kind in ("protocol", "limit"):
                with pytest.raises(RemoteError, match="of somebody else"):
                    await remote.fail(kind=kind)
            assert await remote.add(x=1) == 2
            assert server.statistics().errors == 0
            assert server.statistics().connections == 1

    async def test_stop_iteration(self, where: str, serving: Any) -> None:
        def stop() -> Any:
            return next(iter(()))

        async def stop_async() -> None:
            raise StopAsyncIteration("later")

        async with serving({"stop": stop, "threaded": in_thread(stop), "stop_async": stop_async}, where) as (_server, remote):
            for op in ("stop", "threaded"):
                with pytest.raises(RemoteError) as caught:
                    await remote[op]()
                assert caught.value.type_name == "builtins.StopIteration"
                assert not isinstance(caught.value, (StopIteration, RuntimeError))
            with pytest.raises(RemoteError, match="later") as caught:
                await remote.stop_async()
            assert caught.value.type_name == "builtins.StopAsyncIteration"

    async def test_a_group_keeps_its_leaves(self, where: str, serving: Any) -> None:
        async def fail(error: type[Exception]) -> None:
            raise error("leaf")

        async def group(count: int) -> None:
            async with trio.open_nursery() as nursery:
                for error in (ValueError, KeyError)[:count]:
                    nursery.start_soon(fail, error)

        async with serving({"group": group, "add": add}, where) as (_server, remote):
            with pytest.raises(ValueError, match="leaf"):
                await remote.group(count=1)
            with pytest.raises(ExceptionGroup) as caught:
                await remote.group(count=2)
            assert {leaf.type_name for leaf in caught.value.exceptions} == {"builtins.ValueError", "builtins.KeyError"}
            assert await remote.add(x=1) == 2

    async def test_that_nobody_waits_for_is_logged(self, where: str, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        ended = trio.Event()

        async def relay() -> None:
            try:
                raise RemoteError("of somebody else")
            finally:
                ended.set()

        async with serving({"relay": relay}, where) as (_server, remote):
            await remote.relay.notify()
            await ended.wait()
            await wait_all_tasks_blocked()
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert "'relay'" in record.getMessage()
        assert record.exc_info

    async def test_after_the_caller_has_gone_is_logged(self, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        handler = Watched()

        async def fail() -> None:
            try:
                await handler()
            finally:
                raise ZeroDivisionError("in the finally")

        for where in ("inproc://", "tcp://127.0.0.1:0"):
            handler = Watched()
            caplog.clear()
            async with serving({"fail": fail, "add": add}, where) as (_server, remote):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(remote.fail)
                        await handler.started.wait()
                        scope.cancel()
                await handler.ended.wait()
                await wait_all_tasks_blocked(0.01)
                assert await remote.add(x=1) == 2
            if where.startswith("inproc"):  # TCP can't tell yet that nobody reads what is written
                assert "ZeroDivisionError: in the finally" in caplog.text

    @pytest.mark.parametrize(
        "error", [SystemExit(3), KeyboardInterrupt("stop"), BaseExceptionGroup("g", [SystemExit(3), ValueError()])]
    )
    async def test_that_end_the_program_come_out_of_the_server(self, error: BaseException, where: str) -> None:
        """C06."""
        other = Watched()
        seen: list[BaseException] = []
        kind = SystemExit if isinstance(error, BaseExceptionGroup) else type(error)

        async def end() -> None:
            raise error

        async def call(remote: Any, op: str) -> None:
            try:
                await remote[op]()
            except BaseException as failure:
                seen.append(failure)
                raise

        with pytest.raises(kind) as caught:
            async with Server({"end": end, "other": other}) as server:
                async with rpc(await server.listen(where)) as remote, trio.open_nursery() as nursery:
                    nursery.start_soon(call, remote, "other")
                    await other.started.wait()
                    nursery.start_soon(call, remote, "end")
        assert not isinstance(caught.value, BaseExceptionGroup)
        assert isinstance(other.outcome, trio.Cancelled)
        assert server.status is Status.closed
        assert not any(isinstance(failure, kind) for failure in seen)

    async def test_of_other_event_loops_are_failures_of_the_handler(self, where: str, serving: Any) -> None:
        """They are no Exception, but no reason to end the server either."""

        def fail(kind: str) -> None:
            raise {"asyncio": asyncio.CancelledError, "exit": GeneratorExit}[kind]("from elsewhere")

        async with serving({"fail": fail, "add": add}, where) as (server, remote):
            for kind, name in (("asyncio", "CancelledError"), ("exit", "GeneratorExit")):
                with pytest.raises(RemoteError, match="from elsewhere") as caught:
                    await remote.fail(kind=kind)
                assert caught.value.type_name.endswith(name)
                assert isinstance(caught.value, Exception)
            assert await remote.add(x=1) == 2
            assert server.statistics().connections == 1

    async def test_a_cancelled_from_nowhere_ends_that_connection_alone(
        self, where: str, serving: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def stray() -> None:
            kept: trio.Cancelled | None = None
            with trio.CancelScope() as scope:
                scope.cancel()
                try:
                    await trio.lowlevel.checkpoint()
                except trio.Cancelled as cancelled:
                    kept = cancelled
                    raise
            assert kept is not None
            raise kept

        sibling = Watched()
        async with serving({"stray": stray, "sibling": sibling, "add": add}, where) as (_server, remote):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(remote.sibling)
                await sibling.started.wait()
                with pytest.raises(RemoteError, match="Cancelled escape that belongs to no cancel scope") as caught:
                    await remote.stray()
                assert caught.value.type_name == "builtins.RuntimeError"
                assert await remote.add(x=1) == 2
                sibling.go.set()
            await wait_all_tasks_blocked(0.01)
            assert sibling.outcome == "done"
        assert "no cancel scope" in caplog.text


class TestIsolation:
    async def test_context_variables_do_not_pass_from_request_to_request(self, where: str, serving: Any) -> None:
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="untouched")

        def set_sync() -> str:
            before = variable.get()
            variable.set("sync")
            return before

        async def set_async() -> str:
            before = variable.get()
            variable.set("async")
            await trio.lowlevel.checkpoint()
            assert variable.get() == "async"
            return before

        async def set_streaming() -> AsyncIterator[str]:
            yield variable.get()
            variable.set("streaming")
            yield variable.get()

        handlers = {"sync": set_sync, "async": set_async, "streaming": set_streaming}
        async with serving(handlers, where) as (server, remote):
            for _ in range(2):
                assert await remote.sync() == "untouched"
                assert await remote["async"]() == "untouched"
                async with remote.streaming.stream() as stream:
                    assert [item async for item in stream] == ["untouched", "streaming"]
            assert server.statistics().connections == 1
        assert variable.get() == "untouched"

    async def test_pipelined_requests_are_answered_in_order(self, where: str, serving: Any) -> None:
        running = 0

        async def slow(n: int) -> int:
            nonlocal running
            running += 1
            assert running == 1
            for _ in range(3 if n % 2 else 1):
                await trio.lowlevel.checkpoint()
            running -= 1
            if n == 3:
                raise ValueError(n)
            return n

        async with serving({"slow": slow}, where) as (server, _remote), await connect(server.address) as comm:
            for n in range(6):
                await comm.write({"op": "slow", "n": n, "reply": n != 2})
            answers = [await comm.read() for _ in range(5)]
            assert [answer if isinstance(answer, int) else answer["status"] for answer in answers] == [
                0,
                1,
                "uncaught-error",
                4,
                5,
            ]

    async def test_statistics_while_a_handler_runs(self, where: str, serving: Any) -> None:
        handler = Watched()
        async with serving({"handler": handler}, where) as (server, remote), trio.open_nursery() as nursery:
            nursery.start_soon(remote.handler)
            await handler.started.wait()
            assert server.statistics().in_flight == 1
            handler.go.set()
            await handler.ended.wait()
            await wait_all_tasks_blocked(0.01)
            assert server.statistics().in_flight == 0


class TestDisconnect:
    async def test_cancels_a_handler_whose_answer_is_awaited(self, where: str, serving: Any) -> None:
        async def streaming() -> AsyncIterator[int]:
            yield await handler()  # type: ignore[misc]

        async def with_comm(comm: Comm) -> None:
            await handler()

        for op in ("handler", "streaming", "with_comm"):
            handler = Watched()
            handlers = {"handler": handler, "streaming": streaming, "with_comm": with_comm, "add": add}
            async with serving(handlers, where) as (server, remote):
                async with await connect(server.address) as comm:
                    # Who takes the comm or is a generator streams, whether a reply is awaited or not.
                    await comm.write({"op": op, "reply": True} if op == "handler" else {"op": op, "reply": False})
                    await handler.started.wait()
                await handler.ended.wait()
                assert isinstance(handler.outcome, trio.Cancelled)
                assert await remote.add(x=1) == 2

    async def test_of_a_stream_without_a_socket(self, serving: Any) -> None:
        """There a task watches while the handler waits, and lets go for whoever reads."""

        async def wait() -> str:
            return await handler()

        async def generator() -> AsyncIterator[str]:
            await trio.lowlevel.checkpoint()
            yield "first"
            yield await handler()

        async def reads(comm: Comm) -> None:
            await comm.write(await comm.read())

        with memory_network():
            handler = Watched()
            async with serving({"wait": wait, "generator": generator, "reads": reads, "add": add}, "memory://") as (
                server,
                remote,
            ):
                async with await connect(server.address) as comm:
                    await comm.write({"op": "wait", "reply": True})
                    await handler.started.wait()
                await handler.ended.wait()
                assert isinstance(handler.outcome, trio.Cancelled)
                handler = Watched()
                async with remote.generator.stream() as stream:
                    assert await stream.receive() == "first"
                    handler.go.set()
                    assert [item async for item in stream] == ["done"]
                async with remote.reads.stream() as stream:
                    await stream.send("x")
                    assert [item async for item in stream] == ["x"]
                assert await remote.add(x=1) == 2

    async def test_does_not_cancel_what_nobody_waits_for(self, where: str, serving: Any) -> None:
        handler = Watched()
        async with serving({"handler": handler, "add": add}, where) as (server, remote):
            async with await connect(server.address) as comm:
                await comm.write({"op": "handler", "reply": False})
                await handler.started.wait()
            await wait_all_tasks_blocked(0.01)
            assert handler.outcome is None
            assert await remote.add(x=1) == 2
            handler.go.set()
            await handler.ended.wait()
            assert handler.outcome == "done"

    async def test_does_not_cancel_what_is_to_run_to_its_end(self, where: str, serving: Any) -> None:
        handler = Watched()
        async with serving({"handler": run_to_end(handler), "add": add}, where) as (server, remote):
            async with await connect(server.address) as comm:
                await comm.write({"op": "handler", "reply": True})
                await handler.started.wait()
            await wait_all_tasks_blocked(0.01)
            assert await remote.add(x=1) == 2
            handler.go.set()
            await handler.ended.wait()
            assert handler.outcome == "done"

    async def test_before_the_handler_starts(self, where: str, serving: Any) -> None:
        """Of two pipelined requests the second is read when the client has gone: its handler starts under a cancelled scope."""
        first, second = Watched(), Watched()
        async with serving({"first": run_to_end(first), "second": second, "add": add}, where) as (server, remote):
            async with await connect(server.address) as comm:
                await comm.write({"op": "first", "reply": False})
                await comm.write({"op": "second", "reply": True})
                await first.started.wait()
            await wait_all_tasks_blocked(0.01)
            first.go.set()
            await first.ended.wait()
            await wait_all_tasks_blocked(0.01)
            assert second.outcome is None or isinstance(second.outcome, trio.Cancelled)
            assert await remote.add(x=1) == 2

    async def test_of_a_caller_that_is_cancelled(self, where: str, serving: Any) -> None:
        handler = Watched()
        async with serving({"handler": handler, "add": add}, where) as (_server, remote):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(remote.handler)
                    await handler.started.wait()
                    scope.cancel()
            await handler.ended.wait()
            assert isinstance(handler.outcome, trio.Cancelled)
            assert await remote.add(x=1) == 2
            assert remote.pool.open == 1


class TestBeingCancelled:
    @pytest.mark.parametrize("how", ["grace over", "server cancelled"])
    async def test_the_caller_is_told_why(self, how: str, where: str) -> None:
        handler = Watched()
        seen: list[Exception] = []
        comms: list[Any] = []

        async def call(remote: Any) -> None:
            with pytest.raises(HandlerCancelled) as caught:
                await remote.handler()
            seen.append(caught.value)

        async def call_plainly(comm: Comm) -> None:
            with pytest.raises(HandlerCancelled) as caught:
                await send_recv(comm, op="handler")
            seen.append(caught.value)

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                server = Server({"handler": handler})
                scope = trio.CancelScope()

                async def serve(task_status: Any) -> None:
                    with scope:
                        await server.serve(where, task_status=task_status)

                await nursery.start(serve)
                async with rpc(server.address) as remote, await connect(server.address) as comm:
                    comms.append(comm)
                    async with trio.open_nursery() as calls:
                        calls.start_soon(call, remote)
                        calls.start_soon(call_plainly, comm)
                        while server.statistics().in_flight < 2:
                            await trio.lowlevel.checkpoint()
                        if how == "grace over":
                            server.stop(0)
                        else:
                            scope.cancel()
        assert [error.reason for error in seen] == [how, how]  # type: ignore[attr-defined]

    async def test_a_handler_that_swallows_it_has_no_result(self, where: str, serving: Any) -> None:
        started = trio.Event()
        swallowed = 0

        async def stubborn() -> str:
            nonlocal swallowed
            started.set()
            for _ in range(3):
                try:
                    await trio.sleep_forever()
                except trio.Cancelled:
                    swallowed += 1
            return "a result"

        async with serving({"stubborn": stubborn}, where) as (server, remote), trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(HandlerCancelled):
                    await remote.stubborn()

            nursery.start_soon(call)
            await started.wait()
            server.stop(0)
        assert swallowed == 3

    async def test_a_scope_of_the_handlers_own_is_its_own_business(self, where: str, serving: Any) -> None:
        async def patient() -> str:
            with trio.CancelScope() as scope:
                scope.cancel()
                await trio.sleep_forever()
            return "patient" if scope.cancelled_caught else "?"

        async with serving({"patient": patient}, where) as (_server, remote):
            assert await remote.patient() == "patient"

    async def test_what_a_handler_raises_meanwhile_does_not_end_the_server(
        self, where: str, serving: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        started = trio.Event()

        async def fail() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("in the finally")

        async def nursery_fails() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                nursery.start_soon(forever)
                started.set()

        async with serving({"nursery_fails": nursery_fails}, where) as (server, remote), trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises((HandlerCancelled, ValueError)):
                    await remote.nursery_fails()

            nursery.start_soon(call)
            await started.wait()
            await wait_all_tasks_blocked(0.01)
            server.stop(0)
            await server.finished()
        assert server.status is Status.closed
        assert "ValueError: in the finally" in caplog.text

    async def test_a_failure_in_its_place_is_told(self, where: str, serving: Any) -> None:
        started = trio.Event()

        async def fail() -> None:
            started.set()
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("in the finally")

        async with serving({"fail": fail}, where) as (server, remote), trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(ValueError, match="in the finally"):
                    await remote.fail()

            nursery.start_soon(call)
            await started.wait()
            server.stop(0)


class TestRawComm:
    """Handlers that take the comm, called on a comm of connect(), as in Dask's documents."""

    async def test_reply_absent_items_then_the_return_value(self, where: str, serving: Any) -> None:
        async def ticks(comm: Comm, n: int) -> str:
            for i in range(n):
                await comm.write(i)
            return "end"

        async def count(n: int) -> AsyncIterator[int]:
            for i in range(n):
                yield i

        handlers = {"ticks": ticks, "count": count, "lambda": lambda n: count(n)}
        async with serving(handlers, where) as (server, _remote), await connect(server.address) as comm:
            for op, last in (("ticks", "end"), ("count", None), ("lambda", None)):
                await comm.write({"op": op, "n": 3})
                assert [await comm.read() for _ in range(4)] == [0, 1, 2, last]
            assert server.statistics().connections == 1

    async def test_reply_false_items_only(self, where: str, serving: Any) -> None:
        async def count(n: int) -> AsyncIterator[int]:
            for i in range(n):
                yield i

        handlers = {"count": count, "lambda": lambda n: count(n), "add": add}
        async with serving(handlers, where) as (server, _remote), await connect(server.address) as comm:
            for op in ("count", "lambda"):
                await comm.write({"op": op, "n": 2, "reply": False})
                await comm.write({"op": "add", "x": 1})
                assert [await comm.read() for _ in range(3)] == [0, 1, 2]

    async def test_reply_and_close_items_then_the_end(self, where: str, serving: Any) -> None:
        async def count(n: int) -> AsyncIterator[int]:
            for i in range(n):
                yield i

        handlers = {"count": count, "lambda": lambda n: count(n)}
        async with serving(handlers, where) as (server, _remote):
            for op in handlers:
                async with await connect(server.address) as comm:
                    await comm.write({"op": op, "n": 2, "reply": True, "close": True})
                    assert [await comm.read() for _ in range(3)] == [0, 1, None]
                    assert await closed_by_server(comm)

    async def test_a_generator_is_not_started_for_one_reply(self, where: str, serving: Any) -> None:
        async def count() -> AsyncIterator[int]:
            raise AssertionError("started")
            yield

        async with (
            serving({"count": count, "lambda": lambda: count()}, where) as (server, _remote),
            await connect(server.address) as comm,
        ):
            for op in ("count", "lambda"):
                for reply in (True, 1):
                    with pytest.raises(TypeError, match="use .stream"):
                        await comm.write({"op": op, "reply": reply})
                        raise exception_from_reply(await comm.read(), allow_pickle=lambda: True)

    async def test_wrote_and_then_replied(self, where: str, serving: Any) -> None:
        async def both(comm: Comm) -> str:
            await comm.write("written")
            return "returned"

        async with serving({"both": both, "add": add}, where) as (server, remote), await connect(server.address) as comm:
            await comm.write({"op": "both", "reply": True})
            assert [await comm.read() for _ in range(2)] == ["written", "returned"]
            assert await closed_by_server(comm)
            assert await remote.add(x=1) == 2

    async def test_wrote_and_then_failed(self, where: str, serving: Any) -> None:
        async def both(comm: Comm) -> None:
            await comm.write("written")
            raise ValueError("failed")

        async with serving({"both": both}, where) as (server, _remote):
            async with await connect(server.address) as comm:
                await comm.write({"op": "both", "reply": True})
                assert await comm.read() == "written"
                assert (await comm.read())["status"] == "uncaught-error"
                assert await closed_by_server(comm)
            async with await connect(server.address) as comm:
                for _ in range(2):
                    await comm.write({"op": "both"})  # reply absent: it is known to have several answers
                    assert await comm.read() == "written"
                    assert (await comm.read())["status"] == "uncaught-error"

    async def test_a_conversation(self, where: str, serving: Any) -> None:
        async def converse(comm: Comm) -> Status:
            await comm.write("name?")
            await comm.write(f"hello {await comm.read()}")
            return Status.dont_reply

        async with serving({"converse": converse, "add": add}, where) as (server, _remote), await connect(server.address) as comm:
            await comm.write({"op": "converse"})
            assert await comm.read() == "name?"
            await comm.write("Ada")
            assert await comm.read() == "hello Ada"
            assert await send_recv(comm, op="add", x=1) == 2

    async def test_closed_by_the_handler(self, where: str, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        async def close(comm: Comm, how: str) -> None:
            if how == "abort":
                comm.abort()
            else:
                await comm.close()

        async with serving({"close": close, "add": add}, where) as (server, remote):
            for how in ("abort", "close"):
                async with await connect(server.address) as comm:
                    await comm.write({"op": "close", "how": how, "reply": True})
                    assert await closed_by_server(comm)
            assert await remote.add(x=1) == 2
            assert server.statistics().errors == 0
        assert caplog.records == []


class TestOptedIn:
    async def test_a_call(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, _remote), opted_in(server.address) as client:
            await client.request("echo", 1, x="one")
            assert await client.read() == (REPLY, 1, "one")
            await client.request("echo", 7, x="seven")
            assert await client.read() == (REPLY, 7, "seven")
            await client.comm.write({"op": "echo", "x": "plain", "reply": True})
            assert await client.read() == "plain"
            await client.request("xyzzy", 8)
            kind, identity, value = await client.read()
            assert (kind, identity, value["code"]) == (ERROR, 8, "unknown-op")

    async def test_reply_false_gives_nothing(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, _remote), opted_in(server.address) as client:
            await client.comm.write({"op": "echo", "x": 1, "reply": False, KEY: {"id": 1}})
            await client.comm.write({"op": "xyzzy", "reply": False, KEY: {"id": 2}})
            await client.request("echo", 3, x=3)
            assert await client.read() == (REPLY, 3, 3)

    async def test_a_stream(self, where: str, serving: Any) -> None:
        async def count(n: int) -> AsyncIterator[int]:
            for i in range(n):
                yield i

        async with serving({"count": count, "echo": echo}, where) as (server, _remote), opted_in(server.address) as client:
            await client.request("count", 1, n=2, header={"stream": True})
            assert [await client.read() for _ in range(3)] == [(ITEM, 1, 0), (ITEM, 1, 1), (END, 1, None)]
            await client.request("echo", 2, x="plain", header={"stream": True})
            assert [await client.read() for _ in range(2)] == [(ITEM, 2, "plain"), (END, 2, None)]

    async def test_the_window_of_the_request(self, where: str, serving: Any) -> None:
        async def count(n: int) -> AsyncIterator[int]:
            for i in range(n):
                yield i

        async with serving({"count": count}, where) as (server, _remote), opted_in(server.address) as client:
            await client.request("count", 1, n=3, header={"stream": True, "window": (0, 0)})
            await client.send(PING)
            assert await client.read() == (PONG, 1, None)  # and no item
            await client.send(WINDOW, 1, (2, 2**20))
            assert [await client.read() for _ in range(2)] == [(ITEM, 1, 0), (ITEM, 1, 1)]
            await client.send(PING)
            assert await client.read() == (PONG, 1, None)
            await client.send(WINDOW, 1, (5, 0))
            assert [await client.read() for _ in range(2)] == [(ITEM, 1, 2), (END, 1, None)]

    async def test_what_is_left_over_from_a_request(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, _remote), opted_in(server.address) as client:
            await client.request("echo", 3, x=1)
            assert await client.read() == (REPLY, 3, 1)
            for kind in (ITEM, END, CANCEL, WINDOW, PONG, REPLY):
                await client.send(kind, 2)
            await client.send(ITEMS, 3, (1, 2))
            await client.send(PING, 3)  # the reply was its answer
            await client.request("echo", 4, x=2)
            assert await client.read() == (REPLY, 4, 2)

    @pytest.mark.parametrize(
        "header",
        [None, 1, (), {}, {"id": 0}, {"id": -1}, {"id": "1"}, {"id": True}, {"id": 1.0}, {"id": 2**63}]
        + [{"id": 1, "deadline": "soon"}, {"id": 1, "deadline": float("nan")}, {"id": 1, "stream": 1}]
        + [{"id": 1, "window": 1}, {"id": 1, "window": (1, -1)}, {"id": 1, "window": (1, 2**41)}],
    )
    async def test_a_header_that_is_none(self, header: Any, where: str, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "trio_dcore.server")
        sibling = Watched()
        async with serving({"echo": echo, "sibling": sibling}, where) as (server, remote), trio.open_nursery() as nursery:
            nursery.start_soon(remote.sibling)
            await sibling.started.wait()
            async with opted_in(server.address) as client:
                await client.comm.write({"op": "echo", "reply": True, KEY: header})
                answers = await client.until_closed()
                assert [answer["status"] for answer in answers] == ["uncaught-error"]
            assert server.statistics().errors == 1
            assert "echo" not in server.statistics().requests
            sibling.go.set()
        assert sibling.outcome == "done"
        assert "closing the connection from" in caplog.text

    async def test_ids_must_grow(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, _remote):
            for second in (5, 4, 1):
                async with opted_in(server.address) as client:
                    await client.request("echo", 5, x=1)
                    assert await client.read() == (REPLY, 5, 1)
                    await client.request("echo", second, x=1)
                    (answer,) = await client.until_closed()
                    assert "ids must grow" in answer["exception_text"]
            assert server.statistics().errors == 3

    @pytest.mark.parametrize("reply", [True, False])
    async def test_an_envelope_between_requests_that_is_none(self, reply: bool, where: str, serving: Any) -> None:
        for message in (
            (99, 1, None),
            (ITEM, 1),
            (ITEM, "1", None),
            (ITEM, 2, None),
            ("op", 1, None),
            (ITEM, -1, None),
            (-1, 1, None),
        ):
            async with serving({"echo": echo}, where) as (server, remote), opted_in(server.address) as client:
                await client.request("echo", 1, x=1)
                assert await client.read() == (REPLY, 1, 1)
                await client.comm.write(message)
                assert await client.until_closed() == []
                assert server.statistics().errors == 1
                assert await remote.echo(x=1) == 1

    @pytest.mark.parametrize(
        "envelope",
        [
            (ITEM, 2, None),
            (99, 1, None),
            (ITEMS, 1, ()),
            (ITEMS, 1, "ab"),
            (WINDOW, 1, None),
            (WINDOW, 1, (-1, 1)),
            (WINDOW, 1, (2**41, 1)),
        ]
        + [(REPLY, 1, None), (ERROR, 1, {}), (9, 1, None), (9, 0, None), "OK", {"op": "echo"}, (1, 2), None],
    )
    async def test_an_envelope_on_a_stream_that_is_none(self, envelope: Any, where: str, serving: Any) -> None:
        sibling = Watched()
        seen: list[BaseException] = []

        async def listen(comm: Comm) -> None:
            try:
                await comm.read()
            except BaseException as error:
                seen.append(error)
                raise

        async with serving({"listen": listen, "sibling": sibling}, where) as (server, remote), trio.open_nursery() as nursery:
            nursery.start_soon(remote.sibling)
            await sibling.started.wait()
            async with opted_in(server.address) as client:
                await client.request("listen", 1, header={"stream": True})
                await client.comm.write(envelope)
                assert await client.until_closed() == []
            (error,) = seen
            assert type(error).__name__ == "RemoteProtocolError"
            assert server.statistics().errors == 1
            sibling.go.set()
        assert sibling.outcome == "done"

    async def test_items_behind_the_window(self, where: str, serving: Any) -> None:
        async def listen(comm: Comm) -> None:
            await comm.read()

        async with serving({"listen": listen, "echo": echo}, where) as (server, remote), opted_in(server.address) as client:
            await client.request("listen", 1, header={"stream": True})
            await client.send(ITEMS, 1, tuple(range(17)))
            assert await client.until_closed() == []
            assert server.statistics().errors == 1
            assert await remote.echo(x=1) == 1

    async def test_items_where_one_reply_is_awaited(self, where: str, serving: Any) -> None:
        async def listen(comm: Comm) -> Any:
            return await comm.read()

        async with serving({"listen": listen, "echo": echo}, where) as (server, remote), opted_in(server.address) as client:
            await client.request("listen", 1)
            await client.send(ITEM)
            assert await client.until_closed() == []
            assert await remote.echo(x=1) == 1

    async def test_a_cancel_envelope(self, where: str, serving: Any) -> None:
        seen: list[BaseException] = []

        async def listen(comm: Comm) -> None:
            for _ in range(2):
                with pytest.raises(CommClosedError, match="cancelled the request"):
                    await comm.read()
            with pytest.raises(CommClosedError, match="takes no more"):
                await comm.write("too late")
            seen.append(ValueError())

        async with serving({"listen": listen, "echo": echo}, where) as (server, _remote), opted_in(server.address) as client:
            await client.request("listen", 1, header={"stream": True})
            await client.send(CANCEL)
            assert await client.read() == (END, 1, None)
            await client.request("echo", 2, x=2)
            assert await client.read() == (REPLY, 2, 2)
        assert len(seen) == 1

    async def test_a_comm_handler_that_is_called_for_one_reply(self, where: str, serving: Any) -> None:
        async def writes(comm: Comm) -> None:
            await comm.write("item")

        async def returns(comm: Comm) -> str:
            return f"{comm.peer.kind} {comm.closed()}"

        async with serving({"writes": writes, "returns": returns}, where) as (server, remote):
            kind = "inproc" if where.startswith("inproc") else "loopback"
            assert await remote.returns() == f"{kind} False"
            with pytest.raises(RemoteError, match=r"nothing can be written; it must use \.stream\(\)") as caught:
                await remote.writes()
            assert caught.value.type_name.endswith("LocalProtocolError")
            assert await remote.returns() == f"{kind} False"
            assert server.statistics().connections == 1

    async def test_the_comm_of_a_request_that_has_ended(self, where: str, serving: Any) -> None:
        kept: list[Comm] = []

        async def keep(comm: Comm) -> None:
            kept.append(comm)

        async with serving({"keep": keep, "echo": echo}, where) as (_server, remote):
            async with remote.keep.stream() as stream:
                assert [item async for item in stream] == []
            await remote.keep()
            for comm in kept:
                assert comm.closed()
                for operation in (comm.read, lambda comm=comm: comm.write(1)):
                    with pytest.raises(CommClosedError, match="the request that this comm belonged to has ended"):
                        await operation()
                with pytest.raises(trio.ClosedResourceError):
                    await comm.send(1)
            assert await remote.echo(x=1) == 1


class TestDeadline:
    async def test_bounds_the_handler(self, serving: Any, autojump_clock: Any) -> None:
        handler = Watched()
        async with serving({"handler": handler}, patience=1000) as (server, _remote), opted_in(server.address) as client:
            start = trio.current_time()
            await client.request("handler", 1, header={"deadline": 7})
            kind, identity, value = await client.read()
            assert trio.current_time() - start == pytest.approx(7)
            assert (kind, identity, value["code"], value["reason"]) == (ERROR, 1, "cancelled", "deadline")
            assert isinstance(handler.outcome, trio.Cancelled)
            await client.request("echo", 2, data=3, header={"deadline": 7})
            assert await client.read() == (REPLY, 2, 3)

    @pytest.mark.parametrize("deadline", [0, -1, -1e300, float("-inf"), 0.0])
    async def test_that_has_passed_on_arrival(self, deadline: float, where: str, serving: Any) -> None:
        handler = Watched()
        async with serving({"handler": handler}, where) as (server, _remote), opted_in(server.address) as client:
            await client.request("handler", 1, header={"deadline": deadline})
            kind, identity, value = await client.read()
            assert (kind, identity, value["code"], value["reason"]) == (ERROR, 1, "cancelled", "deadline")
            assert not handler.started.is_set()

    @pytest.mark.parametrize("deadline", [None, float("inf")])
    async def test_that_is_none(self, deadline: Any, where: str, serving: Any) -> None:
        def ask() -> float:
            return current_request().deadline

        async with serving({"ask": ask}, where) as (server, _remote), opted_in(server.address) as client:
            await client.request("ask", 1, header={"deadline": deadline})
            assert await client.read() == (REPLY, 1, float("inf"))

    async def test_comes_from_the_callers_scope(self, serving: Any, autojump_clock: Any) -> None:
        def ask() -> float:
            return current_request().deadline - trio.current_time()

        async def ask_streaming() -> AsyncIterator[float]:
            yield ask()

        async with serving({"ask": ask, "ask_streaming": ask_streaming}, patience=1e9) as (_server, remote):
            with trio.move_on_after(3):
                assert await remote.ask() == pytest.approx(3)
                async with remote.ask_streaming.stream() as stream:
                    assert await stream.receive() == float("inf")

    async def test_goes_through_nested_calls(self, autojump_clock: Any) -> None:
        left: dict[str, float] = {}

        async def hop(name: str, path: list[str]) -> None:
            left[name] = current_request().deadline - trio.current_time()
            await trio.sleep(1)
            if path:
                await servers[name].rpc(path[0]).hop(name=path[0], path=path[1:])
            else:
                try:
                    await trio.sleep_forever()
                finally:
                    left["end"] = trio.current_time()

        servers: dict[str, Server] = {}
        with trio.fail_after(1000):
            async with (
                Server({"hop": hop}) as a,
                Server({"hop": hop}) as b,
                Server({"hop": hop}) as c,
                rpc(await a.listen("inproc://")) as remote,
            ):
                for server, address in ((a, a.address), (b, await b.listen("inproc://")), (c, await c.listen("inproc://"))):
                    servers[address] = server
                start = trio.current_time()
                with trio.move_on_after(5) as scope:
                    await remote.hop(name=a.address, path=[b.address, c.address])
                assert scope.cancelled_caught
                assert trio.current_time() - start == pytest.approx(5)
                await wait_all_tasks_blocked()
                assert [left[server.address] for server in (a, b, c)] == pytest.approx([5, 4, 3])
                assert left["end"] == pytest.approx(start + 5)

    async def test_a_result_in_time_is_a_result(self, serving: Any, autojump_clock: Any) -> None:
        async def sleep(seconds: float) -> str:
            await trio.sleep(seconds)
            return "slept"

        async with serving({"sleep": sleep}, patience=1000) as (_server, remote):
            with trio.fail_after(5):
                assert await remote.sleep(seconds=4) == "slept"


class TestShutdown:
    async def test_requests_behind_a_running_one_are_refused_in_order(self, where: str, serving: Any) -> None:
        handler = Watched()
        async with serving({"handler": handler, "echo": echo}, where) as (server, _remote), await connect(server.address) as comm:
            await comm.write({"op": "handler", "reply": True})
            await handler.started.wait()
            await comm.write({"op": "echo", "x": 1, "reply": True})
            await comm.write({"op": "echo", "x": 1, "reply": False})
            await comm.write({"op": "echo", "x": 2, "reply": True})
            await wait_all_tasks_blocked(0.01)
            server.stop(5)
            handler.go.set()
            assert await comm.read() == "done"
            for _ in range(2):
                assert "the server is shutting down; 'echo' was not started" in (await comm.read())["exception_text"]
            assert await closed_by_server(comm)
            assert server.statistics().requests == {"handler": 1}
            assert server.statistics().refused == 3

    async def test_goodbye_to_who_has_made_opted_in_requests(self, where: str, serving: Any) -> None:
        async with (
            serving({"echo": echo}, where) as (server, _remote),
            opted_in(server.address) as client,
            await connect(server.address) as plain,
        ):
            await client.request("echo", 4, x=1)
            assert await client.read() == (REPLY, 4, 1)
            assert await send_recv(plain, op="echo", x=1) == 1
            await wait_all_tasks_blocked(0.01)
            server.stop()
            assert await client.until_closed() == [(9, 4, None)]
            assert await closed_by_server(plain)

    async def test_half_a_request_does_not_hold_it_up(self, serving: Any) -> None:
        async with serving({"echo": echo}, "tcp://127.0.0.1:0", limits=Limits(linger=0.05)) as (server, _remote):
            async with await ManualPeer.connect(server.address) as peer:
                await peer.handshake()
                await peer.send_bytes(peer.encode({"op": "echo"})[:-1])
                await wait_all_tasks_blocked(0.01)
                server.stop(math.inf)
                await server.finished()

    async def test_a_client_that_has_gone_gets_no_goodbye_and_no_last_words(
        self, where: str, serving: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It goes in the very moment in which they are written."""

        def gone(self: Any, message: Any) -> bool:
            raise CommClosedError("gone")

        handler = Watched()
        async with serving({"handler": handler, "echo": echo}, where) as (server, remote), opted_in(server.address) as client:
            await remote.echo()  # its comm stays, and would get a goodbye
            await client.request("handler")
            await handler.started.wait()
            for cls in (FramedComm, InprocComm):
                monkeypatch.setattr(cls, "write_nowait", gone)
            server.stop(60)  # the goodbye
            await wait_all_tasks_blocked(0.01)
            server.stop(0)  # the last words
            await server.finished()
            assert await client.until_closed() == []
        assert caplog.records == []

    async def test_goodbye_behind_the_last_answer(self, where: str, serving: Any) -> None:
        handler = Watched()
        async with serving({"handler": handler}, where) as (server, _remote), opted_in(server.address) as client:
            await client.request("handler", 2)
            await handler.started.wait()
            server.stop()
            handler.go.set()
            assert await client.until_closed() == [(REPLY, 2, "done"), (9, 2, None)]

    async def test_a_handshake_that_never_comes(self, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "trio_dcore.server")
        async with serving({"echo": echo}, "tcp://127.0.0.1:0", limits=Limits(handshake_timeout=0.05)) as (server, remote):
            async with await ManualPeer.connect(server.address) as peer:
                assert await peer.expect_end()
            assert server.statistics().refused == 1
            assert await remote.echo(x=1) == 1
        assert "no handshake within 0.05 s" in caplog.text

    async def test_a_handshake_that_is_none(self, serving: Any) -> None:
        async with serving({"echo": echo}, "tcp://127.0.0.1:0") as (server, remote):
            async with await ManualPeer.connect(server.address) as peer:
                with pytest.raises(CommClosedError, match="has ended the connection"):
                    await peer.handshake(pickle_protocol=...)
            assert server.statistics().errors == 1
            assert await remote.echo(x=1) == 1

    async def test_a_handshake_under_way(self, serving: Any) -> None:
        async with (
            serving({"echo": echo}, "tcp://127.0.0.1:0") as (server, _remote),
            await ManualPeer.connect(server.address) as peer,
        ):
            while server.statistics().handshaking == 0:
                await trio.lowlevel.checkpoint()
            server.stop(60)
            assert await peer.expect_end()


async def test_a_connection_that_breaks_in_an_unexpected_way_is_logged_and_counted(
    serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that leaves a task behind which reads the comm: the server can't read the next request."""

    async def leave(comm: Comm) -> Status:
        nursery.start_soon(comm.read)
        await wait_all_tasks_blocked()
        return Status.dont_reply

    async with serving({"leave": leave, "echo": echo}, "tcp://127.0.0.1:0") as (server, remote):
        with pytest.raises(ExceptionGroup):  # the task's
            async with trio.open_nursery() as nursery, await connect(server.address) as comm:
                await comm.write({"op": "leave"})
                assert await closed_by_server(comm)
        assert server.statistics().errors == 1
        assert await remote.echo(x=1) == 1
    assert "BusyResourceError" in caplog.text


@pytest.mark.parametrize("meanwhile", ["stop", "full"])
async def test_what_came_while_a_request_was_decoded_counts(
    meanwhile: str, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a thread does that may take its time: what refuses a request then refuses it all the same."""
    started = []

    async def work(x: Any = None) -> None:
        started.append(x)
        await trio.sleep_forever()

    async with serving({"work": work}, "tcp://127.0.0.1:0", limits=Limits(requests=1)) as (server, remote):
        unpack = FramedComm.unpack

        async def slowly(comm: Any, frames: Any, deserializers: Any = None) -> Any:
            if comm.serving:
                if meanwhile == "stop":
                    server.stop(1)
                else:
                    nursery.start_soon(remote.work)
                await wait_all_tasks_blocked(0.02)
            return await unpack(comm, frames, deserializers)

        monkeypatch.setattr(FramedComm, "unpack", slowly)
        async with trio.open_nursery() as nursery:
            with pytest.raises(ServerClosing if meanwhile == "stop" else Overloaded):
                await remote.work(x=to_serialize(b"x"))
            assert started == ([] if meanwhile == "stop" else [None])
            nursery.cancel_scope.cancel()


class TestHandlersThatMeetAnEnd:
    """What they raise then is nobody's failure, also in the group that a nursery of theirs makes of it."""

    @asynccontextmanager
    async def serving(self, handler: Any, caplog: pytest.LogCaptureFixture) -> AsyncIterator[tuple[Server, Any]]:
        caplog.set_level(logging.INFO)
        async with Server({"handler": handler}) as server:
            async with await ManualPeer.connect(await server.listen("tcp://127.0.0.1:0")) as peer:
                await peer.handshake(extension=True)
                yield server, peer
            while server.statistics().connections:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert [record for record in caplog.records if record.levelno > logging.INFO] == []

    async def test_a_mistake_of_the_peers(self, caplog: pytest.LogCaptureFixture) -> None:
        async def handler(comm: Comm) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(comm.read)
                await comm.write("go on")

        async with self.serving(handler, caplog) as (server, peer):
            await peer.send({"op": "handler", "reply": True, KEY: {"id": 1, "stream": True}})
            assert await peer.receive() == (ITEM, 1, "go on")
            await peer.send("no envelope")
            await peer.expect_end()
        assert "expected an envelope" in caplog.text
        assert server.statistics().errors == 1

    async def test_the_end_of_a_bare_comm(self, caplog: pytest.LogCaptureFixture) -> None:
        async def handler(comm: Comm) -> None:
            await comm.write("go on")
            await comm.receive()

        async with self.serving(handler, caplog) as (server, peer):
            await peer.send({"op": "handler", "reply": False})
            assert await peer.receive() == "go on"
        assert server.statistics().errors == 0


async def test_a_generator_for_which_nobody_waits_is_refused_quietly(caplog: pytest.LogCaptureFixture) -> None:
    async def many() -> AsyncIterator[int]:
        yield 1

    caplog.set_level(logging.INFO)
    async with Server({"many": many}) as server:
        async with await ManualPeer.connect(await server.listen("tcp://127.0.0.1:0")) as peer:
            await peer.handshake(extension=True)
            await peer.send({"op": "many", "reply": False, KEY: {"id": 1}})
            await peer.send({"op": "echo", "data": 1, "reply": True})
            assert await peer.receive() == 1
    assert "was refused, and nobody waits for the answer: 'many' streams; use .stream()" in caplog.text
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.parametrize("how", ["sync", "async"])
async def test_what_a_handler_that_fails_was_given_is_not_kept_until_a_collection(how: str) -> None:
    given: list[weakref.ref[Any]] = []

    def fail(x: Any) -> None:
        given.append(weakref.ref(x))
        raise ValueError("no luck")

    async def fail_later(x: Any) -> None:
        await trio.lowlevel.checkpoint()
        fail(x)

    handler = fail if how == "sync" else fail_later
    async with Server({"fail": handler}) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
        gc.collect()
        gc.disable()
        try:
            for x in (numpy.arange(10), numpy.arange(20)):
                with suppress(ValueError):
                    await remote.fail(x=x)
            await wait_all_tasks_blocked()
            assert [ref() is None for ref in given] == [True, True]
        finally:
            gc.enable()
