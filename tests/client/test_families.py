"""The families of serialization that a call or stream names, and those of a pool and of a server."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from typing import Any

import pytest

from trio_dcore import (
    Comm,
    ConnectionPool,
    RemoteError,
    SerializationError,
    Serialized,
    Server,
    connect,
    rpc,
    send_recv,
    to_serialize,
)
from trio_dcore.testing import no_leaks

DATE = datetime.date(2026, 11, 23)
MSGPACK = ["msgpack"]


def family_of(x: Any) -> Any:
    """How an argument came, to a server that does not deserialize."""
    return x.header["serializer"]


async def families(comm: Comm) -> None:
    async for item in comm:
        await comm.write(family_of(item))


async def items() -> AsyncIterator[Any]:
    yield to_serialize(1)
    yield to_serialize("x")


async def dates() -> AsyncIterator[Any]:
    yield to_serialize(DATE)


def told(serializers: Any = None) -> Any:
    return serializers


HANDLERS: Any = {
    "family_of": family_of,
    "families": families,
    "items": items,
    "dates": dates,
    "told": told,
    "one": lambda: to_serialize(1),
}


@pytest.fixture(params=["tcp", "stock"])
async def remote(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """An rpc that does not deserialize, to a server that doesn't; once as if that were a stock one."""
    async with no_leaks(), Server(HANDLERS, deserialize=False) as server:
        async with rpc(await server.listen("tcp://127.0.0.1:0"), deserialize=False) as made:
            if request.param == "stock":
                comm = await made.pool.acquire(made.address, "told")
                comm[0].extension = None
                made.pool.release(comm[0])
            yield made


async def test_a_call(remote: Any) -> None:
    assert await remote.family_of(x=to_serialize(1)) == "pickle"
    assert await remote.family_of(x=to_serialize(1), serializers=MSGPACK) == "msgpack"
    assert await remote.told() is None
    assert await remote.told(serializers=MSGPACK) == ("msgpack",)
    assert await remote.told(serializers=MSGPACK, deserializers=["pickle"]) == ("pickle",)
    with pytest.raises(SerializationError):
        await remote.family_of(x=to_serialize(DATE), serializers=MSGPACK)
    found = await remote.one(deserializers=MSGPACK)
    assert type(found) is Serialized
    assert found.header["serializer"] == "msgpack"


async def test_a_stream(remote: Any) -> None:
    """What its items are made of is what the request says, also where they travel one by one."""
    async with remote.items.stream() as stream:
        assert [item.header["serializer"] async for item in stream] == ["pickle", "pickle"]
    async with remote.items.stream(deserializers=MSGPACK) as stream:
        assert [item.header["serializer"] async for item in stream] == ["msgpack", "msgpack"]
    async with remote.dates.stream(serializers=MSGPACK) as stream:
        with pytest.raises(RemoteError, match="none of the families"):
            await stream.receive()
    with pytest.raises(TypeError, match="serializers='msgpack'"):
        remote.items.stream(serializers="msgpack")


async def test_what_a_stream_sends() -> None:
    async with Server(HANDLERS, deserialize=False) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
        async with remote.families.stream(serializers=MSGPACK) as stream:
            await stream.send(to_serialize(1))
            assert await stream.receive() == "msgpack"
            with pytest.raises(SerializationError):
                await stream.send(to_serialize(DATE))
            await stream.send_eof()
            assert [item async for item in stream] == []


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:0", "tcp stock"])
async def test_what_a_stream_accepts(where: str) -> None:
    """A server that does not do as it is told."""
    async with Server({"items": items}) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
        if where.endswith("stock"):
            comm, _ = await remote.pool.acquire(remote.address, "items")
            comm.extension = None
            remote.pool.release(comm)
        async with remote.items.stream(deserializers=["dask"]) as stream:
            with pytest.raises((TypeError, RemoteError)):
                await stream.receive()


async def test_one_read() -> None:
    async def send(comm: Comm) -> None:
        for _ in range(2):
            await comm.write([to_serialize(1)])
        await comm.read()

    async def refuse(comm: Comm) -> None:
        await comm.read(deserializers=MSGPACK)

    async with (
        Server({"send": send, "refuse": refuse}) as server,
        await connect(await server.listen("tcp://127.0.0.1:0")) as comm,
    ):
        await comm.write({"op": "send", "reply": False})
        with pytest.raises(TypeError, match="only able to deserialize data with"):
            await comm.read(deserializers=MSGPACK)
        assert await comm.read(deserializers=["pickle"]) in ((1,), [1])
        async with rpc(server.address) as remote, remote.refuse.stream() as stream:
            with pytest.raises(RemoteError, match=r"use Server\(deserializers="):
                await stream.receive()


async def test_those_of_a_pool_and_of_a_server() -> None:
    async with Server(HANDLERS, deserialize=False, serializers=MSGPACK) as server:
        address = await server.listen("tcp://127.0.0.1:0")
        async with ConnectionPool(serializers=MSGPACK) as pool:
            remote = pool(address)
            assert await remote.family_of(x=to_serialize(1)) == "msgpack"
            assert await remote.told() == ("msgpack",)
            async with remote.items.stream() as stream:
                assert [item async for item in stream] == [1, "x"]
        async with rpc(address, deserialize=False) as remote:
            assert (await remote.one()).header["serializer"] == "msgpack"
        async with rpc(address, deserializers=["pickle"]) as remote:
            assert await remote.told() == ("pickle",)
        async with await connect(address, deserialize=False) as comm:
            assert (await send_recv(comm, op="one")).header["serializer"] == "msgpack"
            found = await send_recv(comm, op="one", deserializers=["pickle"])
            assert found.header["serializer"] == "pickle"
            assert await send_recv(comm, op="family_of", x=to_serialize(1), serializers=["pickle"]) == "pickle"


async def test_what_a_call_sends_does_not_widen_what_its_pool_accepts() -> None:
    """Dask's order: the call's, the pool's, and only then what the call sends."""
    wide = ["dask", "pickle", "msgpack"]
    async with Server(HANDLERS, deserialize=False) as server:
        address = await server.listen("tcp://127.0.0.1:0")
        for own, told in (
            ({"deserializers": MSGPACK}, ("msgpack",)),
            ({"serializers": MSGPACK}, ("msgpack",)),
            ({}, tuple(wide)),
        ):
            async with rpc(address, **own) as remote:
                assert await remote.told(serializers=wide) == told
                assert await remote.told(serializers=wide, deserializers=["pickle"]) == ("pickle",)
        async with rpc(address, deserializers=[]) as remote:
            assert await remote.told(serializers=wide) == ()
        for own, told in (({"deserializers": MSGPACK}, ("msgpack",)), ({}, tuple(wide))):
            async with await connect(address, **own) as comm:
                assert await send_recv(comm, op="told", serializers=wide) == told


async def test_a_server_that_does_not_do_as_its_client_says() -> None:
    """What a call sends is no reason to open what its comm or pool does not accept."""

    async def one(comm: Comm) -> None:
        await comm.write(to_serialize(DATE), serializers=["pickle"])

    async with Server({"one": one}) as server:
        address = await server.listen("tcp://127.0.0.1:0")
        async with await connect(address, deserializers=["dask"]) as comm:
            with pytest.raises(TypeError, match="only able to deserialize data with"):
                await send_recv(comm, op="one", serializers=["dask", "pickle"])
