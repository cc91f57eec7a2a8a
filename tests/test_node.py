"""Server: the serving half and the calling half in one object."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from trio_dcore import Limits, RPCClosed, Security, Server, UnsafePayload, current_request
from trio_dcore.client import ConnectionPool
from trio_dcore.server import BaseServer
from trio_dcore.testing import no_leaks


def add(x: int, y: int = 1) -> int:
    return x + y


def test_the_halves() -> None:
    assert issubclass(Server, BaseServer)
    server = Server({"add": add})
    assert isinstance(server.rpc, ConnectionPool)
    assert server.rpc is server.rpc
    server.rpc.close_now()


def test_its_pool_has_its_settings() -> None:
    limits, security = Limits(idle=5), Security(pickle="never")
    server = Server(
        connection_limit=7,
        limits=limits,
        security=security,
        deserialize=False,
        serializers=["msgpack"],
        deserializers=["dask"],
        timeout=3,
    )
    pool = server.rpc
    assert pool.limit == 7
    assert pool.timeout == 3
    assert Server().rpc.timeout == 30
    assert pool.settings.limits is limits
    assert pool.settings.security is security
    assert pool.settings.deserialize is False
    assert pool.settings.serializers == ("msgpack",)
    assert pool.settings.deserializers == ("dask",)


async def test_a_handler_calls_on(where: str, serving: Any) -> None:
    async def forward(to: str, x: int) -> Any:
        server = current_request().server
        assert isinstance(server, Server)
        return await server.rpc(to).add(x=x)

    async with serving({"add": add}, where) as (target, _remote), Server({"forward": forward}) as hop:
        async with ConnectionPool() as pool:
            address = await hop.listen(where)
            for x in range(3):
                assert await pool(address).forward(to=target.address, x=x) == x + 1
        assert hop.rpc.open == 1


async def test_its_connections_are_counted(where: str, serving: Any) -> None:
    go = trio.Event()
    async with serving({"wait": go.wait}, where) as (server, remote), Server() as idle:
        assert idle.get_connection_counters() == dict.fromkeys(idle.get_connection_counters(), 0)
        assert idle._pool is None  # asking has made none
        async with trio.open_nursery() as nursery:
            nursery.start_soon(idle.rpc(server.address).wait)
            while not server.statistics().in_flight:
                await trio.lowlevel.checkpoint()
            await remote.echo()
            counts = {"incoming_comms_open": 2, "incoming_comms_active": 1, "outgoing_comms_open": 0, "outgoing_comms_active": 0}
            assert server.get_connection_counters() == counts
            counts = {"incoming_comms_open": 0, "incoming_comms_active": 0, "outgoing_comms_open": 1, "outgoing_comms_active": 1}
            assert idle.get_connection_counters() == counts
            go.set()


async def test_its_calls_end_with_it(where: str, serving: Any) -> None:
    async with serving({"forever": trio.sleep_forever}, where) as (target, _remote), trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(RPCClosed, match="in flight"):
                await server.rpc(target.address).forever()

        async with Server() as server:
            nursery.start_soon(call)
            while not target.statistics().in_flight:
                await trio.lowlevel.checkpoint()
        with pytest.raises(RPCClosed):
            await server.rpc(target.address).echo()


async def test_a_server_that_never_called_anybody_has_no_open_pool() -> None:
    async with Server() as server:
        await server.listen("inproc://")
    assert server.rpc.closed


async def test_its_trust_is_that_of_its_calls(serving: Any) -> None:
    async with (
        serving({"give": ValueError}, "tcp://127.0.0.1:0") as (target, _remote),
        Server(security=Security(pickle="never")) as server,
    ):
        with pytest.raises(UnsafePayload):
            await server.rpc(target.address).give()


async def test_the_pool_of_a_server_that_never_served() -> None:
    """Stopping it closes the pool, which had no server's end to close it."""
    async with no_leaks(), Server({"add": lambda x, y: x + y}) as server:
        address = await server.listen("tcp://127.0.0.1:0")
        other = Server()
        assert await other.rpc(address).add(x=1, y=2) == 3
        await other.aclose()
        with pytest.raises(RPCClosed):
            await other.rpc(address).add(x=1, y=2)
