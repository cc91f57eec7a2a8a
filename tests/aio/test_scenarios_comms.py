"""What the tests of ``distributed.comm`` assert, in asyncio programs; each bears the name that it has there."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy
import pytest
import trio

import trio_dcore
from tests.aio.running import Runner
from tests.aio.scenarios import at_once, free_port, ping, until
from tests.parity.conftest import Place, has_ipv6
from tests.reference.identities import ours, theirs
from trio_dcore import aio
from trio_dcore.abc import CommSettings
from trio_dcore.aio import (
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
    parse_address,
    rpc,
    send_recv,
    to_serialize,
)
from trio_dcore.comm import get_transport
from trio_dcore.comm._hosts import get_ip, get_ipv6


class Conversation:
    """A handler that answers what it reads with its double, and keeps the ends that it had."""

    def __init__(self) -> None:
        self.comms: list[Comm] = []

    async def __call__(self, comm: Comm) -> None:
        self.comms.append(comm)
        async for message in comm:
            await comm.write(message * 2)


async def converse(address: str, **options: Any) -> tuple[str, str, Any]:
    """Have a conversation: (our address, that of the other side, who that is)."""
    comm = await connect(address, **options)
    try:
        await comm.write({"op": "talk", "reply": False})
        for message in ("one", b"two", 3):
            await comm.write(message)
            assert await comm.read() == message * 2
        return comm.local_address, comm.peer_address, comm.peer
    finally:
        await comm.close()


def test_what_has_no_flavour_is_the_same() -> None:
    """Functions on addresses neither wait for anything nor belong to an event loop."""
    for name in (
        "coerce_to_address",
        "get_address_host",
        "get_address_host_port",
        "normalize_address",
        "parse_address",
        "parse_host_port",
        "unparse_address",
        "unparse_host_port",
        "uri_from_host_port",
    ):
        assert getattr(aio, name) is getattr(trio_dcore, name)


def test_what_asks_a_name_server(run: Runner) -> None:
    async def main() -> None:
        assert await aio.resolve_address("tcp://127.0.0.1:80") == "tcp://127.0.0.1:80"
        assert await aio.resolve_address("tcp://localhost:80") in ("tcp://127.0.0.1:80", "tcp://[::1]:80")
        assert await aio.get_local_address_for("tcp://127.0.0.1:80") == "tcp://127.0.0.1"
        with pytest.raises(aio.AddressError):
            await aio.resolve_address("nonsense://x")

    run(main)


# -- who is at which end ---------------------------------------------------------------------------------------------------------------

WHERE = {
    "default, every interface": ("", "tcp", None),
    "default": ("127.0.0.1", "tcp", "127.0.0.1"),
    "default v6": ("[::1]", "tcp", "::1"),
    "tcp, every interface": ("tcp://", "tcp", None),
    "tcp, v4 wildcard": ("tcp://0.0.0.0", "tcp", None),
    "tcp": ("tcp://127.0.0.1", "tcp", "127.0.0.1"),
    "tcp, v6 wildcard": ("tcp://[::]", "tcp", "ipv6"),
    "tcp v6": ("tcp://[::1]", "tcp", "::1"),
    "tls, v4 wildcard": ("tls://0.0.0.0", "tls", None),
    "tls": ("tls://127.0.0.1", "tls", "127.0.0.1"),
    "tls, v6 wildcard": ("tls://[::]", "tls", "ipv6"),
    "tls v6": ("tls://[::1]", "tls", "::1"),
    "inproc": ("inproc://", "inproc", None),
}


@pytest.mark.parametrize("form", WHERE)
def test_client_server(run: Runner, form: str) -> None:
    """What is told to others, and that both ends of a comm name each other."""
    where, scheme, host = WHERE[form]
    if "v6" in form and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    options = {"security": ours().security()} if scheme == "tls" else {}

    async def main() -> None:
        talk = Conversation()
        async with Server({"talk": talk}, **options) as server:
            address = await server.listen(where)
            assert parse_address(address)[0] == scheme
            if scheme != "inproc":
                found, port = get_address_host_port(address)
                assert port > 1024
                assert found == {"ipv6": get_ipv6(), None: get_ip()}.get(host, host)
            local, peer, who = await converse(address, **options)
            assert peer == address == who.address
            await until(lambda: server.statistics().connections == 0)
            (comm,) = talk.comms
            assert (comm.local_address, comm.peer_address) == (peer, local)
            assert (who.certificate is not None) is (scheme == "tls")

    run(main)


def test_tcp_specific(run: Runner, place: Place) -> None:
    """A hundred clients at once, each with an end of its own."""

    async def main() -> None:
        talk = Conversation()
        async with Server({"talk": talk}, limits=Limits(handshaking=200), **place.options) as server:
            address = await server.listen(place.address)
            ends = await asyncio.gather(*[converse(address, **place.options) for _ in range(100)])
            assert len(talk.comms) == 100
            assert len({id(comm) for comm in talk.comms}) == 100
            if not place.address.startswith("unix"):  # where clients have no address of their own
                seen = {(comm.peer_address, comm.local_address) for comm in talk.comms}
                assert seen == {(local, peer) for local, peer, _ in ends}
                assert len(seen) == 100

    run(main)


def test_repr(run: Runner, place: Place) -> None:
    """It names both ends, and says when it is closed; a closed comm still knows its addresses."""

    async def main() -> None:
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

    run(main)


@pytest.mark.parametrize("kind", ["tcp", "inproc"])
def test_many_listeners(run: Runner, kind: str) -> None:
    async def main() -> None:
        async with Server({"talk": Conversation()}, limits=Limits(handshaking=200)) as server:
            addresses = [await server.listen({"tcp": "tcp://127.0.0.1:0", "inproc": "inproc://"}[kind]) for _ in range(100)]
            assert len(set(addresses)) == len(server.listeners) == 100
            assert server.addresses == tuple(addresses)
            await asyncio.gather(*map(converse, addresses))

    run(main)


def test_tls_reject_certificate(run: Runner) -> None:
    """Of another authority: refused by either side; a good one works, before and after."""

    async def main() -> None:
        good, other = ours().security(), theirs().security()
        async with Server({"talk": Conversation()}, security=good) as server, Server(security=other) as foreign:
            address = await server.listen("tls://127.0.0.1:0")
            await converse(address, security=good)
            for where, security in ((address, other), (await foreign.listen("tls://127.0.0.1:0"), good)):
                with pytest.raises(OSError, match="connect"):
                    await connect(where, security=security, timeout=1)
            await converse(address, security=good)

    run.loud = True  # the servers say whom they have refused
    run(main)


# -- connecting and shaking hands ------------------------------------------------------------------------------------------------------


def test_comm_failure_threading(run: Runner) -> None:
    """Connects to numeric addresses that fail start no thread but the one in which trio waits for sockets."""
    addresses = [f"tcp://{host}:{free_port()}" for host in (("127.0.0.1", "[::1]") if has_ipv6() else ("127.0.0.1",))]

    async def main() -> None:
        before = threading.active_count()
        most = 0
        tries = [connect(address, timeout=0.2) for address in addresses for _ in range(10)]
        connects = asyncio.gather(*tries, return_exceptions=True)
        while not connects.done():
            most = max(most, threading.active_count())
            await asyncio.sleep(0)
        assert {type(outcome) for outcome in await connects} == {ConnectError}
        assert most <= before + 1

    run(main)


@asynccontextmanager
async def raw(address: str) -> AsyncIterator[asyncio.StreamReader]:
    """A connection that never says a word."""
    reader, writer = await asyncio.open_connection(*get_address_host_port(address))
    try:
        yield reader
    finally:
        writer.close()
        await at_once(writer.wait_closed())


def test_tcp_listener_does_not_call_handler_on_handshake_error(run: Runner) -> None:
    async def main() -> None:
        talk = Conversation()
        async with Server({"talk": talk}, limits=Limits(handshake_timeout=0.05)) as server:
            address = await server.listen("tcp://127.0.0.1:0")
            async with raw(address) as reader:
                await until(lambda: server.statistics().handshaking == 1)
                while await reader.read(1000):
                    pass  # its own handshake, then the end
            assert talk.comms == []
            assert server.statistics().connections == 0

    run.loud = True
    run(main)


@pytest.mark.parametrize("kind", ["tcp", "inproc"])
def test_continues_listening_after_handshake_error(run: Runner, kind: str) -> None:
    """Clients that go in the middle of their handshake cost nobody anything."""

    async def main() -> None:
        talk = Conversation()
        async with aio.open_trio() as portal, Server({"talk": talk}) as server:
            address = await server.listen({"tcp": "tcp://127.0.0.1:0", "inproc": "inproc://"}[kind])
            scheme, location = parse_address(address)
            for _ in range(3):
                comm: Any = await portal.run(get_transport(scheme).connect, location, CommSettings())
                comm.abort()
            await until(lambda: server.statistics().connections == 0)
            assert talk.comms == []
            await converse(address)
            assert len(talk.comms) == 1

    run(main)


@pytest.mark.parametrize("kind", ["tcp", "inproc"])
def test_handshakes_concurrently(run: Runner, kind: str) -> None:
    """One that takes its time does not hold up the next."""

    async def main() -> None:
        async with aio.open_trio() as portal, Server({"talk": Conversation()}) as server:
            address = await server.listen({"tcp": "tcp://127.0.0.1:0", "inproc": "inproc://"}[kind])
            scheme, location = parse_address(address)
            slow: Any = await portal.run(get_transport(scheme).connect, location, CommSettings())
            await until(lambda: server.statistics().handshaking == 1)
            await converse(address)
            assert server.statistics().handshaking == 1
            await portal.run(slow.handshake)
            slow.abort()

    run(main)


@pytest.mark.parametrize("kind", ["tcp", "inproc"])
def test_connect_timeout(run: Runner, kind: str) -> None:
    """A listener that accepts and stays silent: the time covers the handshake."""

    async def main() -> None:
        async with aio.open_trio() as portal:
            where = {"tcp": "127.0.0.1:0", "inproc": ""}[kind]
            (listener,) = await portal.run(get_transport(kind).listen, where, CommSettings())
            try:
                began = time.monotonic()
                with pytest.raises(ConnectError, match="within 0.15 s"):
                    await connect(listener.contact_address, timeout=0.15)
                assert 0.1 <= time.monotonic() - began < 1
            finally:
                listener.close()

    run(main)


def test_retry_connect(run: Runner) -> None:
    """Nobody is there for the first attempts."""

    async def main() -> None:
        port = free_port()
        connecting = asyncio.create_task(connect(f"tcp://127.0.0.1:{port}"))
        await asyncio.sleep(0.1)
        assert not connecting.done()
        async with Server() as server:
            await server.listen(f"tcp://127.0.0.1:{port}")
            async with await connecting as comm:
                assert (await send_recv(comm, op="identity"))["id"] == server.id

    run(main)


@pytest.mark.parametrize("timeout", [0.1, 5])
def test_handshake_slow_comm(run: Runner, timeout: float) -> None:
    """The timeout covers the handshake, which may take all of it."""

    async def main() -> None:
        async with Server() as server:
            target = get_address_host_port(await server.listen("tcp://127.0.0.1:0"))
            tasks: list[asyncio.Task[Any]] = []

            async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
                await asyncio.sleep(delay)
                while data := await reader.read(1000):
                    writer.write(data)
                writer.close()

            async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                there, back = await asyncio.open_connection(*target)
                tasks.append(asyncio.create_task(pass_on(there, writer, 0.3)))
                tasks.append(asyncio.create_task(pass_on(reader, back, 0)))

            between = await asyncio.start_server(relay, "127.0.0.1", 0)
            try:
                address = f"tcp://127.0.0.1:{between.sockets[0].getsockname()[1]}"
                if timeout < 0.3:
                    with pytest.raises(ConnectError):
                        await connect(address, timeout=timeout)
                else:
                    async with await connect(address, timeout=timeout) as comm:
                        assert (await send_recv(comm, op="identity"))["id"] == server.id
                await at_once(*tasks)  # type: ignore[arg-type]
            finally:
                between.close()
                await between.wait_closed()

    run(main)


def test_stop_listener_during_handle_stream(run: Runner) -> None:
    """A connection that is accepted and not handled yet is closed with the server."""

    async def main() -> None:
        async with Server() as server:
            async with raw(await server.listen("tcp://127.0.0.1:0")) as reader:
                await until(lambda: server.statistics().handshaking == 1)
                await server.close()
                while await reader.read(1000):
                    pass
            assert server.statistics().connections == 0

    run(main)


# -- payloads --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 5_000_000])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("kind", ["tcp", "inproc"])
def test_deserialize(run: Runner, kind: str, here: bool, there: bool, size: int) -> None:
    """Each side says for itself whether payloads are to stay as they are; pickles of the message itself are always loaded."""
    data = {"x": 1, "y": bytes(size)}
    taken: list[Any] = []

    async def take(payload: Any, pickled: Any) -> Any:
        taken.append((payload, pickled))
        return {"payload": to_serialize(data), "pickled": ToPickle(("p", size))}

    async def main() -> None:
        async with Server({"take": take}, deserialize=there) as server:
            address = await server.listen({"tcp": "tcp://127.0.0.1:0", "inproc": "inproc://"}[kind])
            async with rpc(address, deserialize=here) as remote:
                answer = await remote.take(payload=to_serialize(data), pickled=ToPickle(("p", size)))
            assert answer["pickled"] == ("p", size)
            ((payload, pickled),) = taken
            assert pickled == ("p", size)
            for value, opened in ((payload, there), (answer["payload"], here)):
                if opened:
                    assert value == data
                elif kind == "inproc":
                    assert value.data == data  # passed as it is, in its wrapper
                else:
                    assert isinstance(value, Serialized)

    run(main)


@pytest.mark.parametrize("deserialize", [True, False])
def test_deserialize_roundtrip(run: Runner, deserialize: bool, place: Place) -> None:
    """What a hop that opens nothing passes on is what was sent."""
    data = [1, b"two", {"three": numpy.arange(3)}]

    async def main() -> None:
        async with Server({"hop": lambda x: x}, deserialize=deserialize, **place.options) as hop:
            async with rpc(await hop.listen(place.address), **place.options) as remote:
                found = await remote.hop(x=to_serialize(data))
        assert list(found[:2]) == data[:2]
        assert numpy.array_equal(found[2]["three"], data[2]["three"])  # type: ignore[index]

    run(main)


def raise_eof() -> None:
    raise EOFError("not a message")


class Broken:
    """Loading its pickle fails with an EOFError."""

    def __reduce__(self) -> Any:
        return raise_eof, ()


@pytest.mark.parametrize("kind", ["tcp", "tls"])
def test_deserialize_eoferror(run: Runner, kind: str) -> None:
    """It is no end of the connection: the request is answered with an error, and the comm goes on."""
    options = {"security": ours().security()}

    async def main() -> None:
        async with Server({"take": lambda x: None, "give": lambda: ToPickle(Broken())}, **options) as server:
            async with rpc(await server.listen(f"{kind}://127.0.0.1:0"), **options) as remote:
                with pytest.raises(SerializationError, match="not a message"):
                    await remote.take(x=ToPickle(Broken()))
                with pytest.raises(SerializationError, match="not a message"):
                    await remote.give()
                assert (await remote.identity())["id"] == server.id
                assert server.statistics().connections == 1

    run(main)


def owner(array: Any) -> Any:
    """The object whose memory an array uses in the end."""
    while isinstance(array, numpy.ndarray) and array.base is not None:
        array = array.base
    while isinstance(array, memoryview):
        array = array.obj
    return array


@pytest.mark.parametrize("form", ["array", "serialized", "pickled"])
def test_do_not_share_buffers(run: Runner, form: str) -> None:
    """Two arrays of one message have memory of their own, and none of it is the head's."""
    arrays = [numpy.ones(250_000), numpy.zeros(250_000)]
    wrap = {"array": lambda x: x, "serialized": to_serialize, "pickled": lambda x: ToPickle({"x": x})}[form]

    async def main() -> None:
        async with Server({"give": lambda: [*map(wrap, arrays), bytes(3000)]}) as server:
            async with rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
                found = [each["x"] if isinstance(each, dict) else each for each in (await remote.give())[:2]]
        assert [numpy.array_equal(*pair) for pair in zip(found, arrays, strict=True)] == [True, True]
        assert owner(found[0]) is not owner(found[1])
        for array in found:
            assert len(memoryview(owner(array)).cast("B")) <= array.nbytes * 1.05

    run(main)


# -- the end ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closer", ["client", "server"])
@pytest.mark.parametrize("how", ["close", "abort"])
def test_comm_closed(run: Runner, closer: str, how: str, place: Place) -> None:
    """An end here or there ends both directions of both ends, for what waits and for what comes later."""

    async def main() -> None:
        got: list[Comm] = []
        seen = asyncio.Event()

        async def keep(comm: Comm) -> None:
            got.append(comm)
            await seen.wait()

        async with Server({"keep": keep}, grace=0, **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                await comm.write({"op": "keep", "reply": False})
                await until(lambda: got)
                (other,) = got
                reader = asyncio.create_task(at_once(comm.read()))
                await asyncio.sleep(0.01)
                end = comm if closer == "client" else other
                if how == "close":
                    await end.close()
                else:
                    end.abort()
                assert [type(outcome) for outcome in await reader] == [CommClosedError]
                for end in (comm, other):
                    with pytest.raises(CommClosedError):
                        while True:  # what is written to a peer that has just gone may get to the system
                            await end.write("too late")
                    with pytest.raises(CommClosedError):
                        await end.read()
                    with pytest.raises((trio.ClosedResourceError, trio.BrokenResourceError, trio.EndOfChannel)):
                        await end.receive()
                    assert end.closed()
                    await end.close()
            seen.set()
            await until(lambda: server.statistics().connections == 0)

    run(main)


def test_comm_closed_explicit_2(run: Runner, place: Place) -> None:
    """A message, and then the end: the message is still read; closing twice is fine."""

    async def main() -> None:
        async def last_words(comm: Comm) -> None:
            await comm.write("last words")
            await comm.close()
            await comm.close()

        async with Server({"last_words": last_words}, **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                await comm.write({"op": "last_words", "reply": False})
                await until(lambda: server.statistics().connections == 0)
                assert [message async for message in comm] == ["last words"]
                assert comm.closed()
                await comm.close()

    run(main)


def test_comm_closed_on_read_error(run: Runner, place: Place) -> None:
    """A read that times out between two messages costs nothing; one inside of a message closes the comm."""

    async def main() -> None:
        async with Server({"talk": Conversation()}, **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                await comm.write({"op": "talk", "reply": False})
                for n in range(3):
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(comm.read(), 0.01)
                    await comm.write(n)
                    assert await comm.read() == 2 * n

    run(main)


def test_comm_closed_on_read_error_inside_of_a_message(run: Runner) -> None:
    async def main() -> None:
        async with Server({"ping": ping}) as server:
            await server.listen("tcp://127.0.0.1:0")
            with socket.create_server(("127.0.0.1", 0)) as listening:
                listening.setblocking(False)
                loop = asyncio.get_running_loop()
                connecting = asyncio.create_task(connect(f"tcp://127.0.0.1:{listening.getsockname()[1]}"))
                peer, _ = await loop.sock_accept(listening)
                # The server's handshake, passed on by somebody who then stops in the middle of a message.
                with peer, socket.create_connection((server.host, server.port)) as there:
                    there.setblocking(False)
                    await loop.sock_sendall(there, await loop.sock_recv(peer, 10_000))
                    await loop.sock_sendall(peer, await loop.sock_recv(there, 10_000))
                    async with await connecting as comm:
                        await loop.sock_sendall(peer, (100).to_bytes(8, "little") + b"\1")
                        with pytest.raises(TimeoutError):
                            await asyncio.wait_for(comm.read(), 0.1)
                        assert comm.closed()
                        with pytest.raises(CommClosedError):
                            await comm.read()

    run(main)
