"""What the tests of ``distributed.comm`` assert, where no other test here does; each bears the name that it has there."""

from __future__ import annotations

import socket
import threading
from typing import Any

import numpy
import pytest
import trio
import trio.testing

from tests.parity.conftest import Place, has_ipv6
from tests.reference.identities import ours
from tests.reference.kit import until
from trio_dcore import (
    Comm,
    CommClosedError,
    ConnectError,
    Limits,
    SerializationError,
    Serialized,
    Server,
    ToPickle,
    connect,
    get_address_host_port,
    rpc,
    send_recv,
    to_serialize,
)
from trio_dcore.abc import CommSettings, Peer
from trio_dcore.comm import get_transport, parse_address
from trio_dcore.comm._hosts import get_ip, get_ipv6
from trio_dcore.protocol import FrameParser, dumps, loads, pack_prelude
from trio_dcore.testing import ManualPeer


class Conversation:
    """A handler that answers what it reads with its double, and keeps the ends that it had."""

    def __init__(self) -> None:
        self.comms: list[Comm] = []

    async def __call__(self, comm: Comm) -> None:
        self.comms.append(comm)
        async for message in comm:
            await comm.send(message * 2)


async def converse(address: str, **options: Any) -> tuple[str, str, Peer]:
    """Have a conversation: (our address, that of the other side, who that is)."""
    async with await connect(address, **options) as comm:
        await comm.write({"op": "talk", "reply": False})
        for message in ("one", b"two", 3):
            await comm.send(message)
            assert await comm.receive() == message * 2
        return comm.local_address, comm.peer_address, comm.peer


# -- who is at which end ---------------------------------------------------------------------------------------------------------

WHERE = {
    "default, every interface": ("", "tcp", None),
    "default": ("127.0.0.1", "tcp", "127.0.0.1"),
    "default v6": ("[::1]", "tcp", "::1"),
    "tcp, every interface": ("tcp://", "tcp", None),
    "tcp, v4 wildcard": ("tcp://0.0.0.0", "tcp", None),
    "tcp": ("tcp://127.0.0.1", "tcp", "127.0.0.1"),
    "tcp, name": ("tcp://localhost", "tcp", None),
    "tcp, v6 wildcard": ("tcp://[::]", "tcp", "ipv6"),
    "tcp v6": ("tcp://[::1]", "tcp", "::1"),
    "tls, v4 wildcard": ("tls://0.0.0.0", "tls", None),
    "tls": ("tls://127.0.0.1", "tls", "127.0.0.1"),
    "tls, v6 wildcard": ("tls://[::]", "tls", "ipv6"),
    "tls v6": ("tls://[::1]", "tls", "::1"),
    "inproc": ("inproc://", "inproc", None),
}


@pytest.mark.parametrize("form", WHERE)
async def test_client_server(form: str) -> None:
    """What is bound, what is told to others, and that both ends of a comm name each other."""
    where, scheme, host = WHERE[form]
    if "v6" in form and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    options = {"security": ours().security()} if scheme == "tls" else {}
    talk = Conversation()
    async with Server({"talk": talk}, **options) as server:
        address = await server.listen(where)
        assert parse_address(address)[0] == scheme
        assert server.listeners[0].contact_address == address
        if scheme != "inproc":
            found, port = get_address_host_port(address)
            assert port > 1024
            if host is not None:
                assert found == {"ipv6": get_ipv6()}.get(host, host)
            elif "localhost" not in where:
                assert found == get_ip()
        local, peer, who = await converse(address, **options)
        assert peer == address
        await until(lambda: server.statistics().connections == 0)
        (comm,) = talk.comms
        assert (comm.local_address, comm.peer_address) == (peer, local)
        assert who.address == peer
        assert who.kind == {"tcp": "loopback", "tls": "tls", "inproc": "inproc"}[scheme] or not address.endswith("127.0.0.1")
        assert (who.certificate is not None) is (scheme == "tls")


async def test_tcp_specific(place: Place) -> None:
    """A hundred clients at once, each with an end of its own."""
    talk = Conversation()
    ends: list[tuple[str, str]] = []

    async def client(address: str) -> None:
        local, peer, _ = await converse(address, **place.options)
        ends.append((local, peer))

    async with Server({"talk": talk}, **place.options) as server:
        address = await server.listen(place.address)
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(client, address)
        assert len(talk.comms) == len(ends) == 100
        if not place.address.startswith("unix"):  # where clients have no address of their own
            assert {(comm.peer_address, comm.local_address) for comm in talk.comms} == set(ends)
            assert len(set(ends)) == 100


async def test_repr(place: Place) -> None:
    """It names both ends, and says when it is closed; a closed comm still knows its addresses."""
    async with Server(**place.options) as server:
        comm = await connect(await server.listen(place.address), **place.options)
        local, peer = comm.local_address, comm.peer_address
        assert local in repr(comm)
        assert peer in repr(comm)
        assert "closed" not in repr(comm)
        await comm.close()
        assert comm.closed()
        assert "closed" in repr(comm)
        assert (comm.local_address, comm.peer_address, comm.peer.address) == (local, peer, peer)


@pytest.mark.parametrize("kind", ["tcp", "inproc"])
async def test_many_listeners(kind: str) -> None:
    async with Server({"talk": Conversation()}) as server:
        addresses = [await server.listen({"tcp": "tcp://127.0.0.1:0", "inproc": "inproc://"}[kind]) for _ in range(100)]
        assert len(set(addresses)) == len(server.listeners) == 100
        assert server.addresses == tuple(addresses)
        for address in addresses:
            await converse(address)
        for listener in server.listeners[:99]:
            listener.close()
        await converse(addresses[-1])
        with pytest.raises(ConnectError):
            await connect(addresses[0], timeout=0.05)


# -- connecting and shaking hands ------------------------------------------------------------------------------------------------


async def test_comm_failure_threading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connects to numeric addresses that fail start no thread and ask no resolver, however often they try."""

    def resolve(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a numeric address was looked up")

    monkeypatch.setattr(trio.socket, "getaddrinfo", resolve)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    before = threading.active_count()
    most = 0
    with trio.move_on_after(0.3):
        async with trio.open_nursery() as nursery:
            for host in ("127.0.0.1", "[::1]") if has_ipv6() else ("127.0.0.1",):
                for _ in range(10):
                    nursery.start_soon(failing, f"tcp://{host}:{port}")
            while True:
                most = max(most, threading.active_count())
                await trio.lowlevel.checkpoint()
    assert most == before


async def failing(address: str) -> None:
    with pytest.raises(ConnectError):
        await connect(address, timeout=0.1)


@pytest.mark.parametrize("kind", ["tcp", "inproc"])
async def test_continues_listening_after_handshake_error(kind: str) -> None:
    """Clients that go, or that say nonsense, in their handshake cost nobody anything."""
    talk = Conversation()
    async with Server({"talk": talk}) as server:
        address = await server.listen({"tcp": "tcp://127.0.0.1:0", "inproc": "inproc://"}[kind])
        scheme, location = parse_address(address)
        for _ in range(3):
            comm: Any = await get_transport(scheme).connect(location, CommSettings())
            comm.abort()
            if kind == "tcp":
                async with await ManualPeer.connect(address) as peer:
                    await peer.send(["no", "handshake"])
                    await peer.expect_end()
        await until(lambda: server.statistics().connections == 0)
        assert talk.comms == []
        await converse(address)
        assert len(talk.comms) == 1


@pytest.mark.parametrize("kind", ["tcp", "inproc"])
async def test_handshakes_concurrently(kind: str) -> None:
    """One that takes its time does not hold up the next."""
    async with Server({"talk": Conversation()}) as server:
        address = await server.listen({"tcp": "tcp://127.0.0.1:0", "inproc": "inproc://"}[kind])
        scheme, location = parse_address(address)
        slow: Any = await get_transport(scheme).connect(location, CommSettings())
        try:
            await until(lambda: server.statistics().handshaking == 1)
            await converse(address)
            assert server.statistics().handshaking == 1
            await slow.handshake()
            assert (await send_recv(slow, op="identity"))["id"] == server.id
        finally:
            slow.abort()


async def test_inproc_connect_timeout() -> None:
    """A listener that accepts nobody: the time covers the handshake."""
    (listener,) = await get_transport("inproc").listen("", CommSettings())
    try:
        began = trio.current_time()
        with pytest.raises(ConnectError, match="within 0.15 s"):
            await connect(listener.contact_address, timeout=0.15)
        assert 0.1 <= trio.current_time() - began < 1
    finally:
        listener.close()


# -- payloads --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 5_000_000])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("here", [True, False])
async def test_deserialize(here: bool, there: bool, size: int, place: Place) -> None:
    """Each side says for itself whether payloads are to stay as they are; pickles of the message itself are always loaded."""
    data = {"x": 1, "y": bytes(size)}
    taken: list[Any] = []

    def take(payload: Any, pickled: Any) -> Any:
        taken.append((payload, pickled))
        return {"payload": to_serialize(data), "pickled": ToPickle(("p", size))}

    async with Server({"take": take}, deserialize=there, **place.options) as server:
        async with rpc(await server.listen(place.address), deserialize=here, **place.options) as remote:
            for _ in range(2):
                answer = await remote.take(payload=to_serialize(data), pickled=ToPickle(("p", size)))
            assert answer["pickled"] == ("p", size)
            (payload, pickled), _ = taken
            assert pickled == ("p", size)
            if place.address.startswith("inproc"):
                # Objects are passed as they are: what is to stay is left in its wrapper.
                assert (payload == data) if there else (payload.data == data)
                assert (answer["payload"] == data) if here else (answer["payload"].data == data)
            else:
                assert (payload == data) if there else isinstance(payload, Serialized)
                assert (answer["payload"] == data) if here else isinstance(answer["payload"], Serialized)


@pytest.mark.parametrize("deserialize", [True, False])
async def test_deserialize_roundtrip(deserialize: bool, place: Place) -> None:
    """What a hop that opens nothing passes on is what was sent."""
    data = [1, b"two", {"three": numpy.arange(3)}]
    async with Server({"hop": lambda x: x}, deserialize=deserialize, **place.options) as hop:
        async with rpc(await hop.listen(place.address), **place.options) as remote:
            found = await remote.hop(x=to_serialize(data))
    assert list(found[:2]) == data[:2]
    assert numpy.array_equal(found[2]["three"], data[2]["three"])  # type: ignore[index]


def raise_eof() -> None:
    raise EOFError("not a message")


class Broken:
    """Loading its pickle fails with an EOFError."""

    def __reduce__(self) -> Any:
        return raise_eof, ()


async def test_deserialize_eoferror(place: Place) -> None:
    """It is no end of the connection: the request is answered with an error, and the comm goes on."""
    if place.address.startswith("inproc"):
        pytest.skip("objects are passed as they are")
    async with Server({"take": lambda x: None, "give": lambda: ToPickle(Broken())}, **place.options) as server:
        async with rpc(await server.listen(place.address), **place.options) as remote:
            with pytest.raises(SerializationError, match="not a message"):
                await remote.take(x=ToPickle(Broken()))
            with pytest.raises(SerializationError, match="not a message"):
                await remote.give()
            assert (await remote.identity())["id"] == server.id
            assert server.statistics().connections == 1


def received(message: Any, piece: int) -> Any:
    """The message as it comes out of a connection that delivers so many bytes at a time."""
    frames = dumps(message)
    data = pack_prelude(frames) + b"".join(frames)
    parser = FrameParser(Limits(message=None))
    found = None
    for start in range(0, len(data), piece):
        assert found is None
        rest = memoryview(data)[start : start + piece]
        while rest:
            if (room := parser.want()) is not None:
                count = min(len(room), len(rest))
                room[:count] = rest[:count]
                parser.filled(count)
            else:
                count = len(rest)
                parser.feed(bytes(rest))
            rest = rest[count:]
        found = parser.next_message()
    assert found is not None
    return loads(found)


def owner(array: Any) -> Any:
    """The object whose memory an array uses in the end."""
    while isinstance(array, numpy.ndarray) and array.base is not None:
        array = array.base
    while isinstance(array, memoryview):
        array = array.obj
    return array


@pytest.mark.parametrize("form", ["array", "serialized", "pickled"])
async def test_do_not_share_buffers(form: str) -> None:
    """Two arrays of one message have memory of their own: who keeps one does not keep the other."""
    arrays = [numpy.ones(250_000), numpy.zeros(250_000)]
    wrap = {"array": lambda x: x, "serialized": to_serialize, "pickled": lambda x: ToPickle({"x": x})}[form]
    found = received([wrap(array) for array in arrays], 64 * 1024)
    if form == "pickled":
        found = [each["x"] for each in found]
    assert [numpy.array_equal(*pair) for pair in zip(found, arrays, strict=True)] == [True, True]
    assert owner(found[0]) is not owner(found[1])


@pytest.mark.parametrize("size", [4_000_000, 200 * 2**20])
async def test_share_buffer_with_header(size: int) -> None:
    """An array's memory is its own also towards the head of its message, and in one piece though it came in shards."""
    array = numpy.zeros(size, dtype="u1")
    array[-1] = 7
    found = received({"x": to_serialize(array), "head": bytes(3000)}, 2**20)
    assert found["x"].nbytes == size
    assert found["x"][-1] == 7
    assert len(memoryview(owner(found["x"]))) <= size * 1.05


# -- the end ---------------------------------------------------------------------------------------------------------------------


async def test_comm_closed(place: Place) -> None:
    """An end here or there ends both directions of both ends, for what waits and for what comes later."""
    got: list[Comm] = []
    seen = trio.Event()

    async def keep(comm: Comm) -> None:
        got.append(comm)
        await seen.wait()

    async with Server({"keep": keep}, grace=0, **place.options) as server:
        address = await server.listen(place.address)
        for closer in ("client", "server"):
            seen = trio.Event()
            async with await connect(address, **place.options) as comm:
                await comm.write({"op": "keep", "reply": False})
                await until(lambda: got)
                other = got.pop()

                async def read(comm: Comm) -> None:
                    with pytest.raises(CommClosedError):
                        await comm.read()

                async with trio.open_nursery() as nursery:
                    if closer == "server":
                        nursery.start_soon(read, comm)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    (comm if closer == "client" else other).abort()
                for end in (comm, other):
                    with pytest.raises(CommClosedError):
                        while True:  # what is written to a peer that has just gone may get to the system
                            await end.write("too late")
                    with pytest.raises(CommClosedError):
                        await end.read()
                    assert end.closed()
                    await end.close()
            seen.set()
            await until(lambda: server.statistics().connections == 0)
