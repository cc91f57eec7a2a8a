"""inproc://: objects, not bytes, inside one run."""

from __future__ import annotations

import itertools
import os
import pickle
import threading
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import msgpack
import pytest
import trio
import trio.testing

from trio_dcore import Limits, Pickled, Security, Serialize, Serialized, Server, ToPickle, connect, rpc, to_serialize
from trio_dcore.abc import CommSettings, Listener
from trio_dcore.comm import InprocComm, get_transport
from trio_dcore.comm import _inproc as inproc
from trio_dcore.errors import (
    AddressError,
    CommClosedError,
    ConnectError,
    NotAllowed,
    RemoteError,
    SerializationError,
    UnknownOp,
    UnsafePayload,
)
from trio_dcore.protocol import DecodeContext, dumps, loads

PATIENCE = 10.0


def serialized(value: Any, *, trusted: bool = True) -> Serialized:
    """As it is when a comm with ``deserialize=False`` has read it."""
    found = loads(dumps(to_serialize(value)), DecodeContext(deserialize=False))
    assert isinstance(found, Serialized)
    found.trusted = trusted
    return found


def pickled(value: Any, *, trusted: bool = True) -> Pickled:
    from msgpack import unpackb

    _, header, *frames = dumps(ToPickle(value))
    return Pickled(unpackb(header), list(frames), trusted)


@pytest.fixture
async def listener() -> Any:
    (made,) = await get_transport("inproc").listen("", CommSettings())
    yield made
    made.close()


async def comms(listener: Listener, **settings: Any) -> tuple[InprocComm, InprocComm]:
    location = listener.contact_address.removeprefix("inproc://")
    client = await get_transport("inproc").connect(location, CommSettings(**settings))
    server = await listener.accept()
    assert isinstance(client, InprocComm)
    assert isinstance(server, InprocComm)
    return client, server


class TestListening:
    async def test_names(self) -> None:
        transport = get_transport("inproc")
        (named,) = await transport.listen("my-name", CommSettings())
        (new,) = await transport.listen("", CommSettings())
        assert named.listen_address == named.contact_address == "inproc://my-name"
        assert new.listen_address.startswith("inproc://")
        assert new.listen_address.split("/")[3] == str(os.getpid())
        with pytest.raises(AddressError, match="inproc://my-name is taken in this trio run"):
            await transport.listen("my-name", CommSettings())
        named.close()
        named.close()
        (again,) = await transport.listen("my-name", CommSettings())
        again.close()
        new.close()

    async def test_nobody_there(self) -> None:
        with pytest.raises(ConnectionRefusedError, match="nobody listens on inproc://nowhere in this trio run"):
            await get_transport("inproc").connect("nowhere", CommSettings())
        with pytest.raises(ConnectError, match="nobody listens"):
            await connect("inproc://nowhere", timeout=0.05)

    async def test_connections_are_accepted_in_order(self, listener: Any) -> None:
        location = listener.contact_address.removeprefix("inproc://")
        clients = [await get_transport("inproc").connect(location, CommSettings()) for _ in range(3)]
        servers = [await listener.accept() for _ in range(3)]
        assert [comm.peer_address for comm in servers] == [comm.local_address for comm in clients]
        assert len({comm.local_address for comm in clients}) == 3
        for comm in clients:
            comm.abort()

    async def test_accept_waits_and_may_be_cancelled(self, listener: Any) -> None:
        for _ in range(2):
            with trio.move_on_after(0.01) as scope:
                await listener.accept()
            assert scope.cancelled_caught
        location = listener.contact_address.removeprefix("inproc://")
        client = await get_transport("inproc").connect(location, CommSettings())
        with trio.CancelScope() as scope:
            scope.cancel()
            await listener.accept()
        assert scope.cancelled_caught
        assert (await listener.accept()).peer_address == client.local_address
        client.abort()

    async def test_two_that_accept(self, listener: Any) -> None:
        found = []

        async def accept() -> None:
            found.append(await listener.accept())

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept)
                nursery.start_soon(accept)
                await trio.testing.wait_all_tasks_blocked()
                location = listener.contact_address.removeprefix("inproc://")
                for _ in range(2):
                    await get_transport("inproc").connect(location, CommSettings())
        assert len(found) == 2

    async def test_closing_ends_those_who_wait(self, listener: Any) -> None:
        location = listener.contact_address.removeprefix("inproc://")
        client = await get_transport("inproc").connect(location, CommSettings())
        server = await listener.accept()

        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError, match="this listener was closed"):
                await listener.accept()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked()
            listener.close()
        await client.write("goes on")
        assert await server.read() == "goes on"

    async def test_closing_ends_connections_that_nobody_accepted(self, listener: Any) -> None:
        location = listener.contact_address.removeprefix("inproc://")
        unaccepted = await get_transport("inproc").connect(location, CommSettings())
        listener.close()
        with pytest.raises(trio.ClosedResourceError, match="this listener was closed"):
            await listener.accept()
        with pytest.raises(CommClosedError, match="closed the comm during the handshake"):
            await unaccepted.handshake()
        with pytest.raises(trio.EndOfChannel):
            await unaccepted.receive()
        with pytest.raises(ConnectionRefusedError):
            await get_transport("inproc").connect(location, CommSettings())
        await listener.aclose()

    async def test_a_backlog_has_an_end(self, listener: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inproc, "_BACKLOG", 3)
        location = listener.contact_address.removeprefix("inproc://")
        for _ in range(3):
            await get_transport("inproc").connect(location, CommSettings())
        with pytest.raises(ConnectionRefusedError, match="has 3 connections that it didn't accept"):
            await get_transport("inproc").connect(location, CommSettings())

    async def test_nothing_leaves_the_process(self, listener: Any) -> None:
        assert get_transport("inproc").encrypted

        async def accept() -> None:
            comm = await listener.accept()
            await comm.handshake()
            comm.abort()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            comm = await connect(listener.contact_address, security=Security(require_encryption=True))
        comm.abort()


class TestRuns:
    def test_a_run_does_not_see_the_listeners_of_another(self) -> None:
        async def listen() -> None:
            await get_transport("inproc").listen("shared", CommSettings())

        async def nothing_there() -> None:
            with pytest.raises(ConnectionRefusedError):
                await get_transport("inproc").connect("shared", CommSettings())
            await listen()

        trio.run(listen)
        trio.run(nothing_there)

    def test_nor_of_another_thread(self) -> None:
        async def listen() -> None:
            await get_transport("inproc").listen("shared", CommSettings())
            await trio.to_thread.run_sync(other)

        def other() -> None:
            thread = threading.Thread(target=trio.run, args=(nothing_there,))
            thread.start()
            thread.join()

        async def nothing_there() -> None:
            try:
                await get_transport("inproc").connect("shared", CommSettings())
            except ConnectionRefusedError as error:
                refused.append(error)

        refused: list[Exception] = []
        trio.run(listen)
        assert len(refused) == 1


class TestComms:
    async def test_who_is_there(self, listener: Any) -> None:
        client, server = await comms(listener)
        for comm in (client, server):
            assert comm.peer.kind == "inproc"
            assert comm.peer.pid == os.getpid()
            assert comm.peer.uid == (os.getuid() if hasattr(os, "getuid") else None)
            assert (comm.peer.trusted, comm.peer.reason) == (True, "it is in this process")
            assert comm.socket_fileno() is None
        client.abort()

    async def test_the_handshake_tells_what_the_other_side_takes(self) -> None:
        (listener,) = await get_transport("inproc").listen("", CommSettings(limits=Limits(window=3, window_bytes=70_000)))
        client, server = await comms(listener, limits=Limits(window=5))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.handshake)
            nursery.start_soon(server.handshake)
        assert client.extension is not None
        assert server.extension is not None
        assert client.extension.window == (3, 70_000)
        assert server.extension.window == (5, 2**20)
        client.abort()
        listener.close()

    async def test_a_handshake_takes_two(self, listener: Any) -> None:
        client, server = await comms(listener)
        with trio.move_on_after(0.01) as scope:
            await client.handshake()
        assert scope.cancelled_caught

        async def closed_here() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await client.handshake()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(closed_here)
            await trio.testing.wait_all_tasks_blocked()
            client.abort()
        assert server.extension is None

    async def test_sixteen_messages_may_be_on_their_way(self, listener: Any) -> None:
        client, server = await comms(listener)
        for n in range(16):
            assert client.write_nowait(n)
        assert not client.write_nowait(16)
        assert await server.read() == 0
        assert client.write_nowait(16)
        assert client.write_soon(17)  # a credit must get through
        assert [await server.read() for _ in range(17)] == list(range(1, 18))
        client.abort()

    async def test_a_writer_that_comes_late_does_not_pass(self, listener: Any) -> None:
        client, server = await comms(listener)
        for n in range(16):
            assert client.write_nowait(n)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.write, 16)
            await trio.testing.wait_all_tasks_blocked()
            assert await server.read() == 0  # there is room, and it is not ours
            assert not client.write_nowait("late")
            for n in range(1, 17):
                assert await server.read() == n
        client.abort()

    async def test_writers_learn_of_the_end(self, listener: Any) -> None:
        for end in (0, 1):
            pair = await comms(listener)
            client = pair[0]
            for n in range(16):
                client.write_nowait(n)
            expected = trio.ClosedResourceError if end == 0 else CommClosedError

            async def writer(client: InprocComm = client, expected: type[Exception] = expected) -> None:
                with pytest.raises(expected):
                    await client.send("never")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer)
                nursery.start_soon(writer)
                await trio.testing.wait_all_tasks_blocked()
                pair[end].abort()

    async def test_what_was_read_is_unread_no_more_when_closed(self, listener: Any) -> None:
        client, server = await comms(listener)
        client.write_nowait("x")
        client.abort()
        assert not server.closed()  # there is something to read
        assert server.stale()
        assert await server.read() == "x"
        assert server.closed()

    async def test_a_hang_up_is_told(self, listener: Any) -> None:
        for way in ("assigned", "watched"):
            client, server = await comms(listener)
            told = []
            if way == "assigned":
                server.on_hangup = lambda told=told: told.append(1)  # type: ignore[misc]
            else:
                async with trio.open_nursery() as nursery:
                    server.watch_end(nursery, lambda told=told: told.append(1))  # type: ignore[misc]
            client.write_nowait("x")
            assert told == []
            client.abort()
            client.abort()
            assert told == [1]
            server.abort()
            assert told == [1]

    async def test_one_that_was_before_is_told_at_once(self, listener: Any) -> None:
        client, server = await comms(listener)
        client.abort()
        told: list[int] = []
        server.on_hangup = lambda: told.append(1)
        assert told == [1]
        assert server.on_hangup is not None
        server.on_hangup = None

    async def test_nobody_is_told_who_does_not_watch_any_more(self, listener: Any) -> None:
        client, server = await comms(listener)
        told: list[int] = []
        async with trio.open_nursery() as nursery:
            server.watch_end(nursery, lambda: told.append(1))
        server.unwatch_end()
        client.abort()
        assert told == []


class TestWrappers:
    async def send(self, listener: Any, message: Any, **settings: Any) -> Any:
        client, server = await comms(listener, **settings)
        try:
            await server.write(message)
            return await client.read()
        finally:
            client.abort()

    async def test_objects_are_passed_as_they_are(self, listener: Any) -> None:
        for message in (object(), [1, [2]], {"a": {1: object()}}, (1, [2]), 5, None, {"x": []}):
            assert await self.send(listener, message) is message

    async def test_wrappers_are_taken_off(self, listener: Any) -> None:
        value = object()
        assert await self.send(listener, to_serialize(value)) is value
        assert await self.send(listener, ToPickle(value)) is value
        assert await self.send(listener, serialized({"x": 1})) == {"x": 1}
        assert await self.send(listener, pickled({1})) == {1}
        message = {"op": "x", "data": Serialize(value), "more": [1, (2, {"z": ToPickle(value)}), serialized(b"bytes")]}
        assert await self.send(listener, message) == {"op": "x", "data": value, "more": [1, (2, {"z": value}), b"bytes"]}
        assert type(message["data"]) is Serialize  # the sender's message is the sender's

    async def test_what_is_inside_a_wrapper_is_the_users(self, listener: Any) -> None:
        inner = [Serialize(1)]
        assert await self.send(listener, [Serialize(inner)]) == [inner]

    async def test_only_pickles_are_undone_where_payloads_stay(self, listener: Any) -> None:
        one, two = Serialize(1), serialized(2)
        found = await self.send(listener, [one, two, ToPickle(3), pickled(4)], deserialize=False)
        assert found == [one, two, 3, 4]
        assert found[0] is one
        assert found[1] is two

    async def test_objects_that_contain_themselves(self, listener: Any) -> None:
        loop: list[Any] = [1]
        loop.append(loop)
        assert await self.send(listener, loop) is loop
        mapping: dict[str, Any] = {"list": loop}
        mapping["self"] = mapping
        assert await self.send(listener, mapping) is mapping
        loop.append(Serialize("x"))
        found = await self.send(listener, loop)
        assert (found[0], found[2]) == (1, "x")

    async def test_objects_that_are_there_many_times(self, listener: Any) -> None:
        value: Any = [Serialize("x")]
        for _ in range(100):
            value = [value, value]
        found = await self.send(listener, value)
        for _ in range(100):
            assert found[0] is found[1]
            found = found[0]
        assert found == ["x"]

    async def test_however_deep(self, listener: Any) -> None:
        value: Any = []
        for _ in range(100_000):
            value = [value]
        assert await self.send(listener, value) is value
        value = [ToPickle("x")]
        for _ in range(100_000):
            value = {"a": [(value,)]}
        found = await self.send(listener, value)
        for _ in range(100_000):
            ((found,),) = found["a"]
        assert found == ["x"]

    @pytest.mark.parametrize("make", [serialized, pickled])
    async def test_what_a_stranger_sent_to_a_hop(self, listener: Any, make: Any) -> None:
        with pytest.raises(UnsafePayload):
            await self.send(listener, make({frozenset({1})}, trusted=False))
        with pytest.raises(UnsafePayload):
            await self.send(listener, make({frozenset({1})}), security=Security(pickle="never"))
        security = Security(pickle="always")
        assert await self.send(listener, make({frozenset({1})}, trusted=False), security=security) == {frozenset({1})}

    async def test_a_payload_is_read_once(self, listener: Any) -> None:
        """However often it is there."""
        wrapper = serialized({"x": [1]})
        one, two, (three,) = await self.send(listener, [wrapper, wrapper, (wrapper,)])
        assert one == {"x": (1,)} or one == {"x": [1]}
        assert one is two is three

    async def test_families_that_are_accepted(self, listener: Any) -> None:
        message = {"data": serialized({1})}
        with pytest.raises(TypeError, match="only able to deserialize data with"):
            await self.send(listener, message, deserializers=("msgpack",))
        client, server = await comms(listener)
        await server.write(message)
        found = await client.next_head()
        assert found is not None
        head, frames = found
        assert head is message
        assert frames is not None
        with pytest.raises(TypeError, match="only able to deserialize data with"):
            client.resolve(frames, ["msgpack"])
        assert client.resolve(frames) == {"data": {1}}
        client.abort()

    async def test_what_is_to_stay_needs_no_second_phase(self, listener: Any) -> None:
        client, server = await comms(listener, deserialize=False)
        message = {"data": [Serialize(1), serialized(2)]}
        await server.write(message)
        assert await client.next_head() == (message, None)
        await server.write({"data": [ToPickle(1)]})
        found = await client.next_head()
        assert found is not None
        assert found[1] is not None
        client.abort()


class Canary:
    """Tells when it is unpickled."""

    hatched: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return _hatch, (self.name,)


def _hatch(name: str) -> str:
    Canary.hatched.append(name)
    return name


def parts(data: bytes, kind: type = Serialized) -> Any:
    if kind is Pickled:
        return Pickled({"pickled-obj": data, "num-sub-frames": 0}, [])
    return Serialized({"serializer": "pickle", "writeable": (), "num-sub-frames": 1}, [data])


class TestPayloadsOfRequests:
    """As over bytes: op, authorize and trust are settled before a payload is looked at, and a bad one is one request's failure."""

    @pytest.fixture(autouse=True)
    def no_canary(self) -> None:
        Canary.hatched.clear()

    @pytest.mark.parametrize("kind", [Serialized, Pickled])
    async def test_what_is_refused_is_not_deserialized(self, kind: type) -> None:
        asked: list[str] = []

        def authorize(peer: Any, op: str) -> bool:
            asked.append(op)
            return op != "forbidden"

        handlers = {"forbidden": lambda x: x, "blocked": lambda x: x, "fine": lambda x: x}
        async with Server(handlers, authorize=authorize, blocked_handlers=["blocked"]) as server:
            async with rpc(await server.listen("inproc://")) as remote:
                for op, error in (("forbidden", NotAllowed), ("blocked", NotAllowed), ("unheard-of", UnknownOp)):
                    with pytest.raises(error):
                        await remote[op](x=[parts(pickle.dumps(Canary(op)), kind)])
                assert Canary.hatched == []
                assert await remote.fine(x=[parts(pickle.dumps(Canary("fine")), kind)]) == ["fine"]
                assert Canary.hatched == ["fine"]
                assert server.statistics().connections == 1
        assert asked == ["forbidden", "fine"]

    @pytest.mark.parametrize("kind", [Serialized, Pickled])
    @pytest.mark.parametrize("where", ["inproc://", "tcp://127.0.0.1:0"])
    async def test_what_can_not_be_read_is_answered(self, where: str, kind: type) -> None:
        async with Server({"f": lambda x: x}) as server, rpc(await server.listen(where)) as remote:
            with pytest.raises(SerializationError, match=r"^x(\[0\])?: a pickle can't be loaded") as caught:
                await remote.f(x=[parts(b"garbage", kind)])
            assert isinstance(caught.value, RemoteError)
            assert await remote.f(x=1) == 1
            assert server.statistics().connections == 1
            assert server.statistics().errors == 0

    @pytest.mark.parametrize("kind", [Serialized, Pickled])
    @pytest.mark.parametrize("where", ["inproc://", "tcp://127.0.0.1:0"])
    async def test_a_server_that_loads_no_pickles(self, where: str, kind: type) -> None:
        async with Server({"f": lambda x: x}, security=Security(pickle="never")) as server:
            async with rpc(await server.listen(where)) as remote:
                with pytest.raises(UnsafePayload, match=r"^x\[0\]: .* was not loaded; see Security\(pickle="):
                    await remote.f(x=[parts(pickle.dumps(Canary("x")), kind)])
                assert await remote.f(x=1) == 1
                assert server.statistics().connections == 1
        assert Canary.hatched == []

    async def test_a_bad_answer(self) -> None:
        """It is the caller's failure, and its comm goes on."""
        async with Server({"bad": lambda: {"x": parts(b"garbage")}, "f": lambda: 1}) as server:
            async with rpc(await server.listen("inproc://")) as remote:
                with pytest.raises(SerializationError, match=r"\['x'\]: a pickle can't be loaded") as caught:
                    await remote.bad()
                assert not isinstance(caught.value, RemoteError)
                assert await remote.f() == 1
                assert server.statistics().connections == 1

    async def test_a_bad_item_of_a_stream(self) -> None:
        async def items() -> AsyncIterator[Any]:
            yield 1
            yield [parts(b"garbage")]
            yield 3

        async with Server({"items": items}) as server, rpc(await server.listen("inproc://")) as remote:
            async with remote.items.stream() as stream:
                assert await stream.receive() == 1
                with pytest.raises(SerializationError, match="a pickle can't be loaded"):
                    await stream.receive()
                assert [item async for item in stream] == [3]

    async def test_the_request_is_the_callers(self) -> None:
        """What the server takes out of a request it takes out of a copy."""
        async with Server({"f": lambda x: x}, deserialize=False) as server:
            comm = await connect(await server.listen("inproc://"))
            for value in (Serialize(1), [Serialize(1)], [ToPickle(1)], 1):
                request = {"op": "f", "x": value, "reply": True}
                before = dict(request)
                await comm.write(request)
                await comm.read()
                assert request == before
                assert request["x"] is value
            await comm.aclose()

    async def test_keys_that_collide_are_counted_over_the_whole_message(self) -> None:
        """As over bytes: each payload alone could be read, and together they take too long."""
        keys = {key: None for key in itertools.product((-1, -2), repeat=7)}
        payload = Serialized({"serializer": "msgpack", "num-sub-frames": 1}, [msgpack.packb(keys)])
        handlers = {"count": lambda x: len(x)}
        async with Server(handlers) as server, rpc(await server.listen("inproc://")) as remote:
            assert await remote.count(x=[payload]) == 1
            copies = [Serialized(payload.header, payload.frames) for _ in range(8)]
            with pytest.raises(RemoteError, match="chosen so that their hashes collide"):
                await remote.count(x=copies)
            assert await remote.count(x=[payload, None]) == 2
