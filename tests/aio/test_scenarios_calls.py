"""What the tests of ``distributed.core`` assert of calls and pools, in asyncio programs; each bears the name that it has there."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest

from tests.aio.running import Runner
from tests.aio.scenarios import at_once, echo, free_port, ping, until
from tests.parity.conftest import Place, make_place
from tests.reference.identities import ours
from trio_dcore.aio import (
    AddressError,
    CommClosedError,
    ConnectionPool,
    Limits,
    LocalProtocolError,
    RPCClosed,
    SerializationError,
    Server,
    coerce_to_address,
    connect,
    rpc,
    send_recv,
    to_serialize,
)

# -- calls -----------------------------------------------------------------------------------------------------------------------------


def test_rpc_default(run: Runner, place: Place) -> None:
    """A call, one that closes its comm, one over a new comm; and nothing is open behind the block."""

    async def main() -> None:
        async with Server({"ping": ping}, **place.options) as server:
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

    run(main)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "tcp://0.0.0.0:0"])
def test_rpc_without_a_scheme_and_to_every_interface(run: Runner, listen: str) -> None:
    async def main() -> None:
        async with Server({"ping": ping}) as server:
            await server.listen(listen)
            for address in (server.address, f"127.0.0.1:{server.port}"):
                async with rpc(address) as remote:
                    assert await remote.ping() == b"pong"

    run(main)


def test_rpc_inputs(run: Runner) -> None:
    """All spellings of one address are one address, for rpc, pools and connect."""

    async def main() -> None:
        async with Server({"ping": ping}) as server:
            await server.listen("tcp://127.0.0.1:0")
            host, port = server.host, server.port
            spellings: list[Any] = [server.address, f"{host}:{port}", (host, port), [host, port], (host, str(port))]
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
                for arguments in ({}, {"ip": host}, {"address": server.address, "port": port}):
                    with pytest.raises(TypeError, match="an address, or ip= and port="):
                        pool(**arguments)
                with pytest.raises(AddressError):
                    pool((host, "http"))

    run(main)


def test_coerce_to_address() -> None:
    for given in ("127.0.0.1:8786", ("127.0.0.1", 8786), ["127.0.0.1", 8786], ("127.0.0.1", "8786"), "tcp://127.0.0.1:8786"):
        assert coerce_to_address(given) == "tcp://127.0.0.1:8786"  # type: ignore[arg-type]


def test_rpc_message_lifetime(run: Runner, place: Place) -> None:
    """Arguments and results die with the last reference that their users have; the bridge keeps none."""
    seen: list[weakref.ref[Any]] = []

    def made() -> Any:
        array = numpy.arange(100_000)
        seen.append(weakref.ref(array))
        return array

    async def taken(x: Any) -> Any:
        seen.append(weakref.ref(x))
        await asyncio.sleep(0)
        return made()

    async def main() -> None:
        async with Server({"taken": taken}, **place.options) as server:
            async with rpc(await server.listen(place.address), **place.options) as remote:
                argument = made()
                result = await remote.taken(x=argument)
                assert numpy.array_equal(result, argument)
                seen.append(weakref.ref(result))
                assert len(seen) == 4
                del argument, result
                await asyncio.sleep(0.01)
                gc.collect()
                assert [type(ref()) for ref in seen if ref() is not None] == []
                assert remote.pool.open == server.statistics().connections == 1

    run(main)


def test_rpc_with_many_connections(run: Runner, place: Place) -> None:
    async def main() -> None:
        async with Server({"ping": ping}, grace=0, **place.options) as server:
            remote = rpc(await server.listen(place.address), **place.options)

            async def pings(count: int) -> None:
                for _ in range(count):
                    assert await remote.ping() == b"pong"

            async with asyncio.TaskGroup() as group:
                for _ in range(10):
                    group.create_task(pings(10))
            assert 1 <= remote.pool.open <= 10
            server.stop()
            remote.close_comms()
            assert remote.pool.open == 0
            await server.finished()
        assert server.statistics().requests == {"ping": 100}

    run(main)


@pytest.mark.parametrize("kind", ["tcp", "inproc"])
def test_large_packets(run: Runner, kind: str) -> None:
    """200 MB there and back, in the head of the message and as a payload; over uvloop a tenth of it."""
    data = bytes(200_000_000 if run.name == "asyncio" else 20_000_000)
    limits = Limits(head_trusted=None)

    async def main() -> None:
        async with Server({"echo": echo}, limits=limits) as server:
            address = await server.listen({"tcp": "tcp://127.0.0.1:0", "inproc": "inproc://"}[kind])
            async with rpc(address, limits=limits) as remote:
                assert await remote.echo(x={"x": data}) == {"x": data}
                assert await remote.echo(x=to_serialize(data)) == data

    run(main)


@pytest.mark.skipif("TRIO_DCORE_LARGE" not in os.environ, reason="takes 12 GB of memory; set TRIO_DCORE_LARGE=1")
def test_large_payload(run: Runner) -> None:
    """More than 2 GiB, as bytes in a request and as a payload of a reply."""
    size = 2**31 + 10
    limits = Limits(head_trusted=None, message_trusted=None)

    async def main() -> None:
        handlers = {"measure": lambda x: len(x), "give": lambda size: to_serialize(bytes(size))}
        async with Server(handlers, limits=limits) as server:
            async with rpc(await server.listen("tcp://127.0.0.1:0"), limits=limits) as remote:
                assert await remote.measure(x=bytes(size)) == size
                assert len(await remote.give(size=size)) == size

    run(main)


def test_connect_raises(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match="could not connect to tcp://127.0.0.1:"):
            await connect(f"127.0.0.1:{free_port()}", timeout=0.05)

    run(main)


def test_send_recv_args(run: Runner, place: Place) -> None:
    async def main() -> None:
        async with Server({"echo": echo}, **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                assert await send_recv(comm, op="echo", x=b"1") == b"1"
                assert await send_recv(comm, op="echo", x=b"1", reply=False) is None
                assert await send_recv(comm, op="echo", x=b"2") == b"2"
                assert not comm.closed()
                assert await send_recv(comm, op="echo", x=b"3", close=True) == b"3"
                assert comm.closed()

    run(main)


@pytest.mark.parametrize("how", ["timeout", "wait_for", "cancel"])
def test_send_recv_cancelled(run: Runner, how: str, place: Place) -> None:
    """An exchange that times out closes the comm here, and there, where its handler ends."""

    async def main() -> None:
        ended = asyncio.Event()

        async def forever() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.set()

        async with Server({"forever": forever}, **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                exchange = send_recv(comm, op="forever")
                if how == "timeout":
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.05):
                            await exchange
                elif how == "wait_for":
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(exchange, 0.05)
                else:
                    task = asyncio.create_task(exchange)
                    await until(lambda: server.statistics().in_flight)
                    task.cancel()
                    assert [type(outcome) for outcome in await at_once(task)] == [asyncio.CancelledError]  # type: ignore[arg-type]
                assert comm.closed()
                await until(lambda: server.statistics().connections == 0)
                if how == "cancel":
                    await ended.wait()

    run(main)


@pytest.mark.parametrize("codec", ["auto", "lz4", "snappy", "zlib", "zstd", None])
def test_compression(run: Runner, codec: str | None) -> None:
    """With each codec that a sender may ask for, as a payload and bare."""
    options = {} if codec == "auto" else {"compression": codec}
    data = b"123456789" * 20_000

    async def main() -> None:
        async with Server({"echo": echo}, **options) as server:
            async with rpc(await server.listen("tcp://127.0.0.1:0"), **options) as remote:
                assert await remote.echo(x=to_serialize(data)) == data
                assert await remote.echo(x=data) == data

    run(main)


def test_rpc_serialization(run: Runner) -> None:
    """Families that are named are those that are used."""

    async def main() -> None:
        async with Server({"echo": echo}) as server:
            address = await server.listen("tcp://127.0.0.1:0")
            async with rpc(address, serializers=["msgpack"]) as remote:
                with pytest.raises(SerializationError, match=r"none of the families \['msgpack'\] takes it"):
                    await remote.echo(x=to_serialize(echo))
            async with rpc(address, serializers=["msgpack", "pickle"]) as remote:
                assert await remote.echo(x=to_serialize(len)) is len
                assert remote.pool.open == 1

    run(main)


def test_rpc_closed_exception(run: Runner, place: Place) -> None:
    async def main() -> None:
        async with Server(**place.options) as server:
            async with rpc(await server.listen(place.address), **place.options) as remote:
                await remote.identity()
            with pytest.raises(RPCClosed, match="closed"):
                await remote.identity()

    run(main)


def test_deserialize_error(run: Runner, place: Place) -> None:
    """A client that leaves payloads as they are still raises what the handler did."""

    async def fail() -> None:
        raise ValueError("no luck")

    async def main() -> None:
        async with Server({"fail": fail}, **place.options) as server:
            async with rpc(await server.listen(place.address), deserialize=False, **place.options) as remote:
                with pytest.raises(ValueError, match="no luck"):
                    await remote.fail()

    run(main)


# -- the pool --------------------------------------------------------------------------------------------------------------------------


def test_connection_pool(run: Runner) -> None:
    """Reuse, the limit, eviction of what is idle, and the end, with several servers."""

    async def slow_ping(delay: float = 0) -> str:
        await asyncio.sleep(delay)
        return "pong"

    async def main() -> None:
        servers = [await Server({"ping": slow_ping}) for _ in range(10)]
        for server in servers:
            await server.listen("tcp://127.0.0.1:0")
        pool = await ConnectionPool(limit=5)

        await pool(servers[0].address).ping()
        await pool((servers[0].host, servers[0].port)).ping()
        await pool(f"{servers[0].host}:{servers[0].port}").ping()
        assert (pool.open, pool.active, servers[0].statistics().connections) == (1, 0, 1)

        await asyncio.gather(*[pool(servers[0].address).ping(delay=0.01) for _ in range(3)])
        assert (pool.open, pool.active) == (3, 0)

        for server in servers:  # one after the other: what is idle makes room
            await pool(server.address).ping()
            assert pool.open <= 5
        assert (pool.open, pool.active) == (5, 0)

        calls = asyncio.gather(*[pool(server.address).ping(delay=0.01) for server in servers * 2])
        await until(lambda: pool.active == 5)
        assert await calls == ["pong"] * 20
        assert (pool.open, pool.active) == (5, 0)

        await pool.close()
        assert pool.open == 0
        with pytest.raises(RPCClosed):
            await pool(servers[0].address).ping()
        for server in servers:
            await until(lambda server=server: server.statistics().connections == 0)
            await server.close()

    run(main)


@contextmanager
def silent() -> Iterator[str]:
    """The address of somebody to whom one can connect, and who says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"tcp://127.0.0.1:{listening.getsockname()[1]}"


def test_connection_pool_close_while_connecting(run: Runner) -> None:
    """With more calls than the limit, closing tells every one of them, and nothing stays open."""

    async def main() -> None:
        with silent() as address:
            pool = await ConnectionPool(limit=2)
            calls = [asyncio.create_task(pool(address).identity()) for _ in range(5)]
            await until(lambda: pool.open == 2)
            await pool.close()
            assert [type(outcome) for outcome in await asyncio.gather(*calls, return_exceptions=True)] == [RPCClosed] * 5
            assert pool.open == 0

    run(main)


def test_connection_pool_outside_cancellation(run: Runner) -> None:
    """Calls that are cancelled from outside while they connect, or wait for that, end cancelled."""

    async def main() -> None:
        with silent() as address:
            pool = await ConnectionPool(limit=2)
            calls = [asyncio.create_task(pool(address).identity()) for _ in range(5)]
            await until(lambda: pool.open == 2)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            assert [call.cancelled() for call in calls] == [True] * 5
            assert (pool.open, pool.active) == (0, 0)
            await pool.close()

    run(main)


def test_connection_pool_catch_all_cancellederrors(run: Runner) -> None:
    """One who resists does not hold up closing the pool, and may still be told."""

    async def main() -> None:
        with silent() as address:
            pool = await ConnectionPool(limit=1)
            told: list[str] = []

            async def resist() -> None:
                for _ in range(2):
                    try:
                        await pool(address).identity()
                    except (asyncio.CancelledError, RPCClosed) as error:
                        told.append(type(error).__name__)

            task = asyncio.create_task(resist())
            await until(lambda: pool.open == 1)
            task.cancel()
            await until(lambda: pool.open == 1 and told)
            began = time.monotonic()
            await pool.close()
            await task
            assert time.monotonic() - began < 1
            assert told == ["CancelledError", "RPCClosed"]
            assert pool.open == 0

    run(main)


def test_remove_cancels_connect_attempts(run: Runner) -> None:
    async def main() -> None:
        with silent() as address:
            pool = await ConnectionPool()
            call = asyncio.create_task(at_once(pool(address).identity()))
            await until(lambda: pool.open == 1)
            pool.remove(address, reason="the reason")
            (error,) = await call
            assert isinstance(error, CommClosedError)
            assert "the reason" in str(error)
            assert pool.open == 0
            await pool.close()

    run(main)


@pytest.mark.parametrize("steps", range(8))
def test_remove_cancels_connect_before_task_running(run: Runner, steps: int) -> None:
    """Removed within the first steps of the call: it has an end, whichever it is."""

    async def main() -> None:
        address = f"tcp://127.0.0.1:{free_port()}"
        async with ConnectionPool(timeout=0.05) as pool:
            call = asyncio.create_task(at_once(pool(address).identity()))
            for _ in range(steps):
                await asyncio.sleep(0)
            pool.remove(address, reason="the reason")
            (error,) = await call
            assert isinstance(error, OSError)
            assert (pool.open, pool.active) == (0, 0)

    run(main)


def test_connection_pool_respects_limit(run: Runner, place: Place) -> None:
    limit, most = 5, 0

    async def main() -> None:
        async def measure() -> None:
            nonlocal most
            most = max(most, server.statistics().connections)
            assert pool.open <= limit
            await asyncio.sleep(0)

        async with Server({"measure": measure}, **place.options) as server, ConnectionPool(limit, **place.options) as pool:
            address = await server.listen(place.address)
            await asyncio.gather(*[pool(address).measure() for _ in range(50)])
            assert 1 < most <= limit
            assert pool.open <= limit

    run(main)


def test_connection_pool_tls(run: Runner) -> None:
    """Over TLS with the pool's certificates, and not without them."""
    security = ours().security()

    async def main() -> None:
        async with Server({"ping": ping}, security=security) as server:
            address = await server.listen("tls://127.0.0.1:0")
            async with ConnectionPool(limit=5, security=security) as pool:
                assert await asyncio.gather(*[pool(address).ping() for _ in range(10)]) == [b"pong"] * 10
                assert pool.open <= 5
            async with ConnectionPool(timeout=1) as pool:
                with pytest.raises(LocalProtocolError, match="tls_ca_file"):
                    await pool(address).ping()

    run(main)


def test_connection_pool_remove(run: Runner, place: Place) -> None:
    """Idle comms and those in use go; what is given back later does no harm."""

    async def main() -> None:
        go = asyncio.Event()

        async def wait() -> None:
            await go.wait()

        async with Server({"wait": wait, "ping": ping}, **place.options) as server:
            address = await server.listen(place.address)
            async with ConnectionPool(limit=5, **place.options) as pool:
                call = asyncio.create_task(at_once(pool(address).wait()))
                await until(lambda: server.statistics().in_flight)
                await pool(address).ping()
                assert (pool.open, pool.active) == (2, 1)
                for _ in range(2):
                    pool.remove(address)
                    assert (pool.open, pool.active) == (0, 0)
                assert [type(outcome) for outcome in await call] == [CommClosedError]
                assert (pool.open, pool.active) == (0, 0)
                await pool(address).ping()
                assert (pool.open, pool.active) == (1, 0)
            await until(lambda: server.statistics().connections == 0)

    run(main)


@pytest.mark.parametrize("kind", ["tcp", "tls", "inproc"])
def test_connection_pool_detects_remote_close(run: Runner, kind: str, tmp_path: Any) -> None:
    """An idle comm that the server has closed is not handed out, and no slot is lost."""
    place = make_place(kind, tmp_path)

    async def main() -> None:
        async with ConnectionPool(limit=1, **place.options) as pool:
            for _ in range(3):
                async with Server({"ping": ping}, **place.options) as server:
                    address = await server.listen(place.address)
                    for _ in range(2):
                        assert await pool(address).ping() == b"pong"
                    # From its side, with ours idle.
                    server.stop(0)
                    await server.finished()
                if kind == "tcp":
                    async with Server({"ping": ping}) as server:
                        assert await server.listen(address) == address
                        assert await pool(address).ping() == b"pong"
                        assert (pool.open, pool.active) == (1, 0)

    run(main)
