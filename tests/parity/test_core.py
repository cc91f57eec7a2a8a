"""What the tests of ``distributed.core`` assert, where no other test here does; each bears the name that it has there.

docs/parity.md says which tests are behind each of theirs.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import trio
import trio.testing

from tests.parity.conftest import Place, has_ipv6
from tests.reference.identities import ours
from tests.reference.kit import until
from trio_dcore import (
    AddressError,
    CommClosedError,
    ConnectError,
    ConnectionPool,
    HandlerCancelled,
    Limits,
    LocalProtocolError,
    NotAllowed,
    RPCClosed,
    SerializationError,
    Server,
    Status,
    connect,
    rpc,
    send_recv,
    to_serialize,
)
from trio_dcore.abc import CommSettings, Transport
from trio_dcore.comm import get_transport, register_transport
from trio_dcore.comm._hosts import get_ip, get_ipv6
from trio_dcore.protocol import _frames


def pingpong(comm: Any) -> bytes:
    return b"pong"


def echo(x: Any = None) -> Any:
    return x


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


# -- the server ------------------------------------------------------------------------------------------------------------------


async def test_server_status_is_always_enum() -> None:
    """Nobody assigns it, so no text gets there."""
    async with Server() as server:
        assert isinstance(server.status, Status)
        for value in ("running", Status.closed):
            with pytest.raises(AttributeError):
                server.status = value  # type: ignore[misc, assignment]
        assert server.status is Status.running


async def test_server() -> None:
    """One server, called by every spelling of its address, and by hand."""
    server = Server({"ping": pingpong})
    with pytest.raises(LocalProtocolError):
        _ = server.port
    async with server:
        with pytest.raises(LocalProtocolError):
            _ = server.port
        await server.listen(0)
        assert server.address == f"tcp://{get_ip()}:{server.port}"
        for address in (("127.0.0.1", server.port), f"127.0.0.1:{server.port}", f"tcp://127.0.0.1:{server.port}"):
            async with await connect(address) as comm:
                assert await comm.write({"op": "ping"}) > 0
                assert await comm.read() == b"pong"
                await comm.write({"op": "ping", "close": True})
                assert await comm.read() == b"pong"
                with pytest.raises(CommClosedError):
                    await comm.read()


async def test_server_raises_on_blocked_handlers(place: Place) -> None:
    async with Server({"ping": pingpong}, blocked_handlers=["ping"], **place.options) as server:
        address = await server.listen(place.address)
        async with await connect(address, **place.options) as comm:
            for _ in range(2):
                with pytest.raises(NotAllowed, match="the op 'ping' is blocked"):  # a stock client gets a ValueError
                    await send_recv(comm, op="ping")
            assert (await send_recv(comm, op="identity"))["id"] == server.id


# Argument of listen(), defaults of the class (ip, port), host that is bound (None: the forms differ), contact address;
# PORT stands for a free one.
PORT = -1
LISTEN = {
    "nothing": (None, ("", 0), "0.0.0.0", "{ip}"),
    "nothing, class port": (None, ("", PORT), "0.0.0.0", "{ip}"),
    "nothing, class host and port": (None, ("127.0.0.1", PORT), "127.0.0.1", "127.0.0.1"),
    "port": (PORT, ("", 0), "0.0.0.0", "{ip}"),
    "port 0": (0, ("", 0), "0.0.0.0", "{ip}"),
    "port, class host": (PORT, ("127.0.0.1", 0), "127.0.0.1", "127.0.0.1"),
    "pair": (("127.0.0.1", PORT), ("", 0), "127.0.0.1", "127.0.0.1"),
    "pair without a host": (("", PORT), ("", 0), "0.0.0.0", "{ip}"),
    "pair with text": (("127.0.0.1", "0"), ("", 0), "127.0.0.1", "127.0.0.1"),
    "list": (["127.0.0.1", 0], ("", 0), "127.0.0.1", "127.0.0.1"),
    "host": ("127.0.0.1", ("", 0), "127.0.0.1", "127.0.0.1"),
    "host, class port": ("127.0.0.1", ("", PORT), "127.0.0.1", "127.0.0.1"),
    "host and port": (f"127.0.0.1:{PORT}", ("", 0), "127.0.0.1", "127.0.0.1"),
    "port as text": (f":{PORT}", ("", 0), "0.0.0.0", "{ip}"),
    "a name": ("localhost:0", ("", 0), None, None),
    "URI": (f"tcp://127.0.0.1:{PORT}", ("", 0), "127.0.0.1", "127.0.0.1"),
    "URI without a host": (f"tcp://:{PORT}", ("", 0), "0.0.0.0", "{ip}"),
    "URI without a port": ("tcp://127.0.0.1", ("", PORT), "127.0.0.1", "127.0.0.1"),
    "URI with nothing": ("tcp://", ("127.0.0.1", PORT), "127.0.0.1", "127.0.0.1"),
    "v4 wildcard": ("tcp://0.0.0.0:0", ("", 0), "0.0.0.0", "{ip}"),
    "v6 wildcard": ("tcp://[::]:0", ("", 0), "[::]", "[{ipv6}]"),
    "v6": ("tcp://[::1]:0", ("", 0), "[::1]", "[::1]"),
    "v6 pair": (("::1", PORT), ("", 0), "[::1]", "[::1]"),
    "v6 host": ("[::1]", ("", PORT), "[::1]", "[::1]"),
}


@pytest.mark.parametrize("form", LISTEN)
async def test_server_listen(form: str) -> None:
    argument, (ip, port), bound, contact = LISTEN[form]
    if "v6" in form and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    chosen = free_port()

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(str(PORT), str(chosen))
        if isinstance(value, (tuple, list)):
            return type(value)(map(filled, value))
        return chosen if value == PORT else value

    class Mine(Server):
        default_ip = ip
        default_port = filled(port)

    server = Mine({"ping": pingpong})
    async with server:
        address = await server.listen(filled(argument))
        assert server.address == address
        assert address.endswith(f":{server.port}")
        assert server.port > 1024
        if PORT in (argument, port) or str(PORT) in str(argument):
            assert server.port == chosen
        if contact is not None:
            assert address == f"tcp://{contact.format(ip=get_ip(), ipv6=get_ipv6())}:{server.port}"
            assert server.host == contact.format(ip=get_ip(), ipv6=get_ipv6()).strip("[]")
            assert server.listeners[0].listen_address == f"tcp://{bound}:{server.port}"
            assert server.listeners[0].contact_address == address
        near = "[::1]" if "v6" in form else "127.0.0.1"
        for reachable in {address, f"tcp://{near}:{server.port}"}:
            async with rpc(reachable) as remote:
                assert await remote.ping() == b"pong"
        reachable = f"tcp://{near}:{server.port}"
        server.stop()
        await server.finished()
    with pytest.raises(ConnectError):
        await connect(reachable, timeout=0.05)


async def test_server_listen_elsewhere(tmp_path: Path) -> None:
    """Addresses that have no port, and those of TLS, which need certificates and no scheme where encryption is required."""
    path = str(tmp_path / "s")
    async with Server({"ping": pingpong}, security=ours().security()) as server:
        addresses = [
            await server.listen(where) for where in ("inproc://", "inproc://name", f"unix://{path}", "tls://127.0.0.1:0")
        ]
        assert addresses[1:3] == ["inproc://name", f"unix://{path}"]
        assert server.addresses == tuple(addresses)
        assert (server.host, server.port) == ("127.0.0.1", int(addresses[3].rpartition(":")[2]))
        for address in addresses:
            async with rpc(address, security=ours().security()) as remote:
                assert await remote.ping() == b"pong"
    encrypted = ours().security(require_encryption=True)
    async with Server({"ping": pingpong}, security=encrypted) as server:
        for where in (0, ("127.0.0.1", 0), "127.0.0.1", None):
            address = await server.listen(where)
            assert address.startswith("tls://")
            async with rpc(("tls://127.0.0.1:{}").format(address.rpartition(":")[2]), security=encrypted) as remote:
                assert await remote.ping() == b"pong"


async def test_ports() -> None:
    port = free_port()
    async with Server() as server:
        await server.listen(port)
        assert server.port == port
        async with Server() as other:
            with pytest.raises(OSError, match=str(port)) as caught:
                await other.listen(port)
            assert caught.value.errno == errno.EADDRINUSE
            await other.listen()
            assert other.port not in (port, 0)
            assert other.port > 1024


async def test_counters() -> None:
    """Requests are counted by op, those that fail too."""

    def div(x: float, y: float) -> float:
        return x / y

    async with Server({"div": div}) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
        for y in (1, 2, 3):
            await remote.div(x=1, y=y)
        with pytest.raises(ZeroDivisionError):
            await remote.div(x=1, y=0)
        await remote.identity()
        assert server.statistics().requests == {"div": 4, "identity": 1}


async def test_thread_id(place: Place) -> None:
    """Handlers run in the thread of the trio run in which the server was entered."""
    async with Server({"thread": threading.get_ident}, **place.options) as server:
        async with rpc(await server.listen(place.address), **place.options) as remote:
            assert await remote.thread() == threading.get_ident()


async def test_close_properly(place: Place) -> None:
    """A close ends handlers in flight, every listener and every connection; nothing of the server is left."""
    ended: list[str] = []

    async def sleep(name: str) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(name)

    async def call(remote: Any, name: str) -> None:
        with pytest.raises((CommClosedError, HandlerCancelled)):
            await remote.sleep(name=name)

    async with trio.open_nursery() as nursery, Server({"sleep": sleep}, **place.options) as server:
        addresses = [await server.listen(place.address)]
        if not place.address.startswith("unix"):
            addresses += [await server.listen(place.address) for _ in range(3)]
        for number, address in enumerate(addresses):
            remote = await nursery.start(opened, address, place.options)
            nursery.start_soon(call, remote, f"{number}")
        await until(lambda: server.statistics().in_flight == len(addresses))
        assert len(server.listeners) >= len(addresses)
        await server.close(timeout=0)
        assert sorted(ended) == [str(number) for number in range(len(addresses))]
        assert server.listeners == ()
        assert server.statistics().connections == server.statistics().in_flight == 0
        for address in addresses:
            with pytest.raises(ConnectError):
                await connect(address, timeout=0.05, **place.options)
        nursery.cancel_scope.cancel()


async def opened(address: str, options: dict[str, Any], task_status: trio.TaskStatus[Any]) -> None:
    """An rpc for as long as the task lives."""
    async with rpc(address, **options) as remote:
        task_status.started(remote)
        await trio.sleep_forever()


async def test_server_redundant_kwarg() -> None:
    with pytest.raises(TypeError, match="unexpected_kwarg"):
        Server({}, unexpected_kwarg="test")  # type: ignore[call-arg]


async def test_server_comms_mark_active_handlers(place: Place) -> None:
    """The four counts of connections, through calls in both directions."""
    go, started = trio.Event(), trio.Event()

    def counts(server: Server) -> tuple[int, ...]:
        counters = server.get_connection_counters()
        assert list(counters) == [
            "incoming_comms_open",
            "incoming_comms_active",
            "outgoing_comms_open",
            "outgoing_comms_active",
        ]
        return tuple(counters.values())

    async def long() -> str:
        started.set()
        await go.wait()
        return "done"

    async with Server({"wait": long}, **place.options) as server, Server(**place.options) as client:
        address = await server.listen(place.address)
        assert counts(server) == counts(client) == (0, 0, 0, 0)
        async with await connect(address, **place.options) as comm:
            await until(lambda: counts(server) == (1, 0, 0, 0))
            await comm.write({"op": "wait"})
            await started.wait()
            assert counts(server) == (1, 1, 0, 0)
            go.set()
            assert await comm.read() == "done"
            await until(lambda: counts(server) == (1, 0, 0, 0))
        await until(lambda: counts(server) == (0, 0, 0, 0))

        go, started = trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(client.rpc(address).wait)
            await until(lambda: server.statistics().in_flight == 3)
            assert counts(server) == (3, 3, 0, 0)
            assert counts(client) == (0, 0, 3, 3)
            go.set()
        assert counts(client) == (0, 0, 3, 0)
        await until(lambda: counts(server) == (3, 0, 0, 0))
        client.rpc.remove(address)
        assert counts(client) == (0, 0, 0, 0)


async def test_server_comms_that_connect_are_not_open_yet() -> None:
    """As Dask counts: what is being connected is no connection."""
    async with Server() as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.rpc("inproc://nobody-there").echo)
        await until(lambda: client.rpc.connecting == 1)
        assert (client.rpc.open, client.rpc.active) == (1, 1)
        assert set(client.get_connection_counters().values()) == {0}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["here", "by a call"])
async def test_close_fast_without_active_handlers(how: str, place: Place) -> None:
    """A server whose connections are idle is closed at once, whatever its grace.  (A04 of the reference tests says how fast.)"""

    def close() -> None:
        server.stop(reason="asked to")

    server = Server({"terminate": close, "ping": pingpong}, grace=60, **place.options)
    async with server:
        async with rpc(await server.listen(place.address), **place.options) as remote:
            await remote.ping()
            if how == "here":
                began = trio.current_time()
                await server.close()
            else:
                await remote.terminate(reply=False)
                began = trio.current_time()
                await server.finished()
            assert trio.current_time() - began < 5
    assert server.status is Status.closed


# -- calls -----------------------------------------------------------------------------------------------------------------------


async def test_rpc_default(place: Place) -> None:
    """A call, one that closes its comm, one over a new comm; and nothing is open behind the block."""
    async with Server({"ping": pingpong}, **place.options) as server:
        async with rpc(await server.listen(place.address), **place.options) as remote:
            assert await remote.ping() == b"pong"
            assert remote.pool.open == 1
            assert await remote.ping(close=True) == b"pong"
            assert remote.pool.open == 0
            assert await remote.ping() == b"pong"
            assert remote.pool.open == 1
        assert remote.pool.open == 0
        assert remote.pool.closed
        await until(lambda: server.statistics().connections == 0)


async def test_rpc_inputs() -> None:
    """All spellings of one address are one address, for rpc, pools and connect."""
    async with Server({"ping": pingpong}) as server:
        await server.listen("tcp://127.0.0.1:0")
        host, port = server.host, server.port
        spellings: list[Any] = [
            server.address,
            f"{host}:{port}",
            (host, port),
            [host, port],
            (host, str(port)),
            (host.encode().decode(), port),
        ]
        for spelling in spellings:
            async with rpc(spelling) as remote:
                assert remote.address == server.address
                assert repr(server.address)[1:-1] in repr(remote)
                assert await remote.ping() == b"pong"
            async with await connect(spelling) as comm:
                assert comm.peer_address == server.address
        async with ConnectionPool() as pool:
            for spelling in spellings:
                assert await pool(spelling).ping() == b"pong"
            for at in (port, str(port)):
                assert await pool(ip=host, port=at).ping() == b"pong"
            assert pool.open == 1
            pool.remove((host, port))
            assert pool.open == 0


async def test_rpc_inputs_that_are_none() -> None:
    pool = ConnectionPool()
    with pytest.raises(TypeError, match="an address, or ip= and port="):
        pool()
    with pytest.raises(TypeError, match="an address, or ip= and port="):
        pool(ip="127.0.0.1")
    with pytest.raises(TypeError, match="an address, or ip= and port="):
        pool("127.0.0.1:8786", port=8786)
    with pytest.raises(AddressError):
        pool(("127.0.0.1", "http"))
    pool.close_now()


class Memory(bytearray):
    """Memory for a large frame, of which one can know whether it is still there."""


async def test_rpc_message_lifetime_default(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither side keeps what was sent: arguments and results die with the last reference that their users have.

    And so does the memory that they were received into, while the connection is idle.
    """
    seen: list[weakref.ref[Any]] = []

    def allocate(size: int) -> memoryview:
        memory = Memory(size)
        seen.append(weakref.ref(memory))
        return memoryview(memory)

    monkeypatch.setattr(_frames, "allocate", allocate)

    def made() -> Any:
        array = numpy.arange(100_000)
        seen.append(weakref.ref(array))
        return array

    def taken(x: Any) -> Any:
        seen.append(weakref.ref(x))
        return made()

    async with Server({"taken": taken}, **place.options) as server:
        async with rpc(await server.listen(place.address), **place.options) as remote:
            argument = made()
            result = await remote.taken(x=argument)
            assert numpy.array_equal(result, argument)
            seen.append(weakref.ref(result))
            assert len(seen) == (4 if place.address.startswith("inproc") else 6)
            del argument, result
            await trio.testing.wait_all_tasks_blocked()
            gc.collect()
            assert [type(ref()) for ref in seen if ref() is not None] == []
            assert remote.pool.open == server.statistics().connections == 1


async def test_rpc_with_many_connections(place: Place) -> None:
    async with Server({"ping": pingpong}, grace=0, **place.options) as server:
        remote = rpc(await server.listen(place.address), **place.options)

        async def ping(count: int) -> None:
            for _ in range(count):
                assert await remote.ping() == b"pong"

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ping, 10)
        assert 1 <= remote.pool.open <= 10
        server.stop()
        await server.finished()
        remote.close_comms()
        assert remote.pool.open == 0
    assert server.statistics().requests == {"ping": 100}


@pytest.mark.parametrize("kind", ["tcp", "inproc"])
async def test_large_packets(kind: str) -> None:
    """200 MB there and back, as they are and as a payload.

    As they are they stand in the head of the message, for which there is a limit of its own.
    """
    data = bytes(200_000_000)
    limits = Limits(head_trusted=None)
    where = {"tcp": "tcp://127.0.0.1:0", "inproc": "inproc://"}[kind]
    async with Server({"echo": echo}, limits=limits) as server, rpc(await server.listen(where), limits=limits) as remote:
        assert await remote.echo(x={"x": data}) == {"x": data}
        assert await remote.echo(x=to_serialize(data)) == data


@pytest.mark.skipif("TRIO_DCORE_LARGE" not in os.environ, reason="takes 12 GB of memory; set TRIO_DCORE_LARGE=1")
async def test_large_payload() -> None:
    """More than 2 GiB, as bytes in a request and as a payload of a reply."""
    size = 2**31 + 10
    limits = Limits(head_trusted=None, message_trusted=None)
    async with Server({"measure": lambda x: len(x), "give": lambda size: to_serialize(bytes(size))}, limits=limits) as server:
        async with rpc(await server.listen("tcp://127.0.0.1:0"), limits=limits) as remote:
            assert await remote.measure(x=bytes(size)) == size
            assert len(await remote.give(size=size)) == size


async def test_connect_raises() -> None:
    with pytest.raises(OSError, match="could not connect to tcp://127.0.0.1:"):
        await connect(f"127.0.0.1:{free_port()}", timeout=0.05)


async def test_rpc_serialization(place: Place) -> None:
    """Families that are named are those that are used."""
    if place.address.startswith("inproc"):
        pytest.skip("objects are passed as they are")
    async with Server({"echo": echo}, **place.options) as server:
        address = await server.listen(place.address)
        async with rpc(address, serializers=["msgpack"], **place.options) as remote:
            with pytest.raises(SerializationError, match=r"type function .* none of the families \['msgpack'\] takes it"):
                await remote.echo(x=to_serialize(echo))
        async with rpc(address, serializers=["msgpack", "pickle"], **place.options) as remote:
            assert await remote.echo(x=to_serialize(len)) is len
            assert remote.pool.open == 1


async def test_deserialize_error(place: Place) -> None:
    """A client that leaves payloads as they are still raises what the handler did."""

    def fail() -> None:
        raise ValueError("no luck")

    async with Server({"fail": fail}, **place.options) as server:
        async with rpc(await server.listen(place.address), deserialize=False, **place.options) as remote:
            with pytest.raises(ValueError, match="no luck"):
                await remote.fail()


async def test_rpc_closed_exception(place: Place) -> None:
    async with Server(**place.options) as server:
        async with rpc(await server.listen(place.address), **place.options) as remote:
            await remote.identity()
        with pytest.raises(RPCClosed, match="'identity' was called on a closed pool"):
            await remote.identity()


# -- the pool --------------------------------------------------------------------------------------------------------------------


async def test_connection_pool() -> None:
    """Reuse, the limit, eviction of what is idle, and the end, with several servers."""

    async def ping(delay: float = 0) -> str:
        await trio.sleep(delay)
        return "pong"

    async with trio.open_nursery() as nursery:
        servers = [Server({"ping": ping}) for _ in range(10)]
        for server in servers:
            await nursery.start(server.serve, "tcp://127.0.0.1:0")
        pool = ConnectionPool(limit=5)

        await pool(servers[0].address).ping()
        await pool((servers[0].host, servers[0].port)).ping()
        await pool(f"{servers[0].host}:{servers[0].port}").ping()
        assert (pool.open, pool.active, servers[0].statistics().connections) == (1, 0, 1)

        async with trio.open_nursery() as calls:  # as many as it takes, at once
            for _ in range(3):
                calls.start_soon(lambda: pool(servers[0].address).ping(delay=0.01))
        assert (pool.open, pool.active) == (3, 0)

        for server in servers:  # one after the other: what is idle makes room
            await pool(server.address).ping()
            assert pool.open <= 5
        assert (pool.open, pool.active) == (5, 0)

        async with trio.open_nursery() as calls:  # more at once than the limit allows
            for server in servers * 2:
                calls.start_soon(lambda server=server: pool(server.address).ping(delay=0.01))
            await until(lambda: pool.active == 5)
        assert (pool.open, pool.active) == (5, 0)

        await pool.close()
        assert pool.open == 0
        with pytest.raises(RPCClosed):
            await pool(servers[0].address).ping()
        for server in servers:
            await until(lambda server=server: server.statistics().connections == 0)
            server.stop()


class Stubborn(Transport):
    """Connects to inproc addresses, and is not to be interrupted in it."""

    scheme = "stubborn"

    def __init__(self) -> None:
        self.go = trio.Event()
        self.comms: list[Any] = []

    async def connect(self, location: str, settings: CommSettings) -> Any:
        with trio.CancelScope(shield=True):
            await self.go.wait()
        self.comms.append(await get_transport("inproc").connect(location, settings))
        return self.comms[-1]

    async def listen(self, location: str, settings: CommSettings) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("how", ["close", "remove", "cancel"])
async def test_connection_pool_catch_all_cancellederrors(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connect that will not be cancelled does not hold up closing the pool, and nobody gets its comm."""
    from trio_dcore.comm import _registry

    monkeypatch.setattr(_registry, "_transports", dict(_registry._transports))
    transport = Stubborn()
    register_transport(transport)
    async with Server() as server:
        address = (await server.listen("inproc://")).replace("inproc", "stubborn")
        pool = ConnectionPool()
        outcomes: list[str] = []

        async def call() -> None:
            try:
                await pool(address).identity()
            except (RPCClosed, CommClosedError) as error:
                outcomes.append(type(error).__name__)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await until(lambda: pool.connecting)
            if how == "close":
                await pool.close()
            elif how == "remove":
                pool.remove(address)
            else:
                nursery.cancel_scope.cancel()
            transport.go.set()
        assert outcomes == {"close": ["RPCClosed"], "remove": ["CommClosedError"], "cancel": []}[how]
        assert [comm.closed() for comm in transport.comms] in ([True], [])
        assert pool.open == pool.connecting == 0
        pool.close_now()


async def test_remove_cancels_connect_before_task_running() -> None:
    """An address that is removed in the very step in which its call begins to connect."""
    async with ConnectionPool() as pool:

        async def call() -> None:
            with pytest.raises(CommClosedError, match="the reason"):
                await pool("tcp://127.0.0.1:1").identity()

        class Begins(trio.abc.Instrument):
            """Removes the address as soon as there is a slot, so before the call waits for anything."""

            def before_task_step(self, task: Any) -> None:
                if pool.connecting:
                    pool.remove("tcp://127.0.0.1:1", reason="the reason")

        instrument = Begins()
        trio.lowlevel.add_instrument(instrument)
        try:
            await call()
        finally:
            trio.lowlevel.remove_instrument(instrument)
        assert pool.open == 0


async def test_connection_pool_respects_limit(place: Place) -> None:
    limit, most = 5, 0

    async def measure() -> None:
        nonlocal most
        most = max(most, server.statistics().connections)
        assert pool.open <= limit
        await trio.lowlevel.checkpoint()

    async with Server({"measure": measure}, **place.options) as server, ConnectionPool(limit, **place.options) as pool:
        address = await server.listen(place.address)
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(pool(address).measure)
        assert 1 < most <= limit
        assert pool.open <= limit


async def test_connection_pool_tls() -> None:
    """Over TLS with the pool's certificates, and not without them."""
    security = ours().security()
    async with Server({"ping": pingpong}, security=security) as server:
        address = await server.listen("tls://127.0.0.1:0")
        async with ConnectionPool(limit=5, security=security) as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(pool(address).ping)
            assert pool.open <= 5
        async with ConnectionPool(timeout=1) as pool:
            with pytest.raises(LocalProtocolError, match="tls_ca_file"):
                await pool(address).ping()


async def test_connection_pool_remove(place: Place) -> None:
    """Idle comms and those in use go; what is given back later does no harm."""
    go = trio.Event()

    async def wait() -> None:
        await go.wait()

    async with Server({"wait": wait, "ping": pingpong}, **place.options) as server:
        address = await server.listen(place.address)
        async with ConnectionPool(limit=5, **place.options) as pool:

            async def call() -> None:
                with pytest.raises(CommClosedError, match="'wait'"):
                    await pool(address).wait()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await until(lambda: server.statistics().in_flight)
                await pool(address).ping()
                assert (pool.open, pool.active) == (2, 1)
                pool.remove(address)
                assert (pool.open, pool.active) == (0, 0)
                pool.remove(address)
            assert (pool.open, pool.active) == (0, 0)
            await pool(address).ping()
            assert (pool.open, pool.active) == (1, 0)
        await until(lambda: server.statistics().connections == 0)
