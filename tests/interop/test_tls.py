"""Stock Dask and us over TLS, both ways, with one CA for both and with another on one side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy
import pytest
import trio
from distributed.comm import connect as stock_connect
from distributed.core import Server as StockServer
from distributed.core import rpc as stock_rpc
from distributed.protocol import to_serialize as stock_to_serialize
from distributed.security import Security as StockSecurity

from tests.reference.identities import Identity, ours, theirs
from trio_dcore import ConnectError, RemoteProtocolError, Security, Server, connect, rpc, to_serialize

PATIENCE = 10.0
BIG = numpy.arange(1_000_000, dtype="f8").reshape(1000, 1000)

versions = pytest.mark.parametrize("version", [1.2, 1.3])


def stock_security(identity: Identity, **options: Any) -> StockSecurity:
    roles = {f"tls_{role}_{part}": text for role in ("client", "scheduler", "worker") for part, text in parts(identity).items()}
    return StockSecurity(tls_ca_file=identity.authority, require_encryption=True, **roles, **options)


def parts(identity: Identity) -> dict[str, str]:
    return {"cert": identity.certificate, "key": identity.key}


def calling(identity: Identity) -> dict[str, Any]:
    """What stock clients are given."""
    return {"connection_args": stock_security(identity).get_connection_args("client")}


@asynccontextmanager
async def our_server(handlers: dict[str, Any], security: Security | None = None) -> AsyncIterator[str]:
    with trio.fail_after(PATIENCE):
        async with Server(handlers, security=security or ours().security()) as server:
            yield await server.listen("tls://127.0.0.1:0")


@asynccontextmanager
async def stock_server(stock: Any, handlers: dict[str, Any], identity: Identity, tmp_path: Any) -> AsyncIterator[str]:
    async def start() -> StockServer:
        server: StockServer = await StockServer(handlers, local_directory=str(tmp_path))
        await server.listen("tls://127.0.0.1:0", **stock_security(identity).get_listen_args("scheduler"))
        return server

    server = await stock.run(start)
    try:
        with trio.fail_after(PATIENCE):
            yield server.address
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(PATIENCE):
            await stock.run(server.close)


def add(x: Any, y: Any) -> Any:
    return x + y


def fail() -> None:
    raise ValueError("nope")


async def ticks(comm: Any, n: int) -> None:
    for i in range(n):
        await comm.write({"tick": i, "data": numpy.full(3, i)})


# -- stock Dask calls us ---------------------------------------------------------------------------------------------------------


@versions
async def test_stock_calls_us(stock: Any, kind: str, version: float) -> None:
    async def talk(remote: Any) -> Any:
        error = None
        try:
            await remote.fail()
        except ValueError as caught:
            error = str(caught)
        total = await remote.add(x=BIG, y=1.0)
        return await remote.add(x=1, y=2), error, total

    async with our_server({"add": add, "fail": fail}, ours().security(tls_max_version=version)) as address:
        small, error, total = await stock.call(kind, address, talk, **calling(ours()))
    assert (small, error) == (3, "nope")
    numpy.testing.assert_array_equal(total, BIG + 1)


async def test_what_stock_pickles_is_trusted(stock: Any) -> None:
    """Its certificate says that it belongs to us: any object goes."""

    async def talk(remote: Any) -> Any:
        return await remote.add(x=complex(1, 2), y=1)

    async with our_server({"add": add}) as address:
        assert await stock.call("rpc", address, talk, **calling(ours())) == complex(2, 2)


async def test_a_stream_of_ours(stock: Any) -> None:
    async def listen() -> Any:
        comm = await stock_connect(address, **stock_security(ours()).get_connection_args("client"))
        await comm.write({"op": "ticks", "n": 5, "reply": False})
        items = [await comm.read() for _ in range(5)]
        await comm.write({"op": "add", "x": 1, "y": 2, "reply": True})
        answer = await comm.read()
        await comm.close()
        return items, answer

    async with our_server({"ticks": ticks, "add": add}) as address:
        items, answer = await stock.run(listen)
    assert [item["data"].tolist() for item in items] == [[i] * 3 for i in range(5)]
    assert answer == 3


async def test_stock_closes_without_a_word_and_nothing_is_logged(stock: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Shutdown document, F08: Tornado sends no close_notify."""
    caplog.set_level("INFO", logger="trio_dcore")

    async def talk(remote: Any) -> Any:
        return await remote.add(x=1, y=2)

    async with our_server({"add": add}) as address:
        await stock.call("rpc", address, talk, **calling(ours()))
        await stock.call("pool", address, talk, **calling(ours()))
    assert not [record for record in caplog.records if "closing" in record.getMessage() or record.levelname != "INFO"]


@pytest.mark.parametrize(
    ("identity", "hint"),
    [
        (theirs(), "the peer refused our certificate: it was not signed by a CA that the peer knows"),
        (
            Identity(ours().authority, theirs().certificate, theirs().key),
            "the peer's certificate is not accepted: it was not signed by the CA",
        ),
    ],
    ids=["its CA", "its certificate"],
)
async def test_stock_of_another_ca(stock: Any, caplog: pytest.LogCaptureFixture, identity: Identity, hint: str) -> None:
    caplog.set_level("INFO", logger="trio_dcore")

    async def talk() -> Any:
        async with asyncio.timeout(PATIENCE), stock_rpc(address, timeout=1, **calling(identity)) as remote:
            await remote.add(x=1, y=2)

    async with our_server({"add": add}) as address:
        with pytest.raises(OSError):  # noqa: PT011  # which one depends on the release
            await stock.run(talk)
        while hint not in caplog.text:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize("scheme", ["tcp", "tls"])
async def test_stock_with_the_other_scheme(stock: Any, caplog: pytest.LogCaptureFixture, scheme: str) -> None:
    """Plain to TLS and TLS to plain: an error there, and a line with a hint here."""
    caplog.set_level("INFO", logger="trio_dcore")
    args = calling(ours()) if scheme == "tls" else {}

    async def talk() -> Any:
        async with asyncio.timeout(PATIENCE), stock_rpc(address, timeout=0.5, **args) as remote:
            await remote.add(x=1, y=2)

    with trio.fail_after(PATIENCE):
        async with Server({"add": add}, security=ours().security()) as server:
            bound = await server.listen("tls://127.0.0.1:0" if scheme == "tcp" else "tcp://127.0.0.1:0")
            address = f"{scheme}://{bound.partition('://')[2]}"
            with pytest.raises(OSError, match="."):
                await stock.run(talk)
    assert ("the peer uses tcp://" if scheme == "tcp" else "looks like TLS") in caplog.text


# -- we call stock Dask -----------------------------------------------------------------------------------------------------------


@versions
async def test_we_call_stock(stock: Any, tmp_path: Any, connected: Any, kind: str, version: float) -> None:
    async def stock_ticks(comm: Any, n: int) -> None:
        for i in range(n):
            await comm.write({"tick": i})

    def double(data: Any) -> Any:
        return stock_to_serialize(data * 2)  # a bare array breaks a stock server

    handlers = {"add": add, "fail": fail, "ticks": stock_ticks, "double": double}
    security = ours().security(tls_max_version=version)
    async with stock_server(stock, handlers, ours(), tmp_path) as address, connected(kind, address, security=security) as remote:
        assert await remote.add(x=1, y=2) == 3
        with pytest.raises(ValueError, match="nope"):
            await remote.fail()
        numpy.testing.assert_array_equal(await remote.double(data=to_serialize(BIG)), BIG * 2)
        assert await remote.add(x=1 + 2j, y=1) == 2 + 2j
        async with remote.ticks.stream(n=5) as stream:
            assert [item["tick"] async for item in stream] == [0, 1, 2, 3, 4]


async def test_an_idle_comm_to_stock_is_used_again(stock: Any, tmp_path: Any) -> None:
    """The tickets that its TLS sends behind the handshake are no stray messages."""

    async def who(comm: Any) -> str:
        return str(comm.peer_address)

    security = ours().security(tls_min_version=1.3)
    async with stock_server(stock, {"who": who}, ours(), tmp_path) as address, rpc(address, security=security) as remote:
        callers = set()
        for _ in range(5):
            callers.add(await remote.who())
            await trio.sleep(0.01)
        assert len(callers) == 1


@pytest.mark.parametrize(
    ("identity", "hint"),
    [
        (theirs(), "the peer's certificate is not accepted: it was not signed by the CA"),
        (Identity(ours().authority, theirs().certificate, theirs().key), "the peer refused our certificate"),
    ],
    ids=["its certificate", "our certificate"],
)
@versions
async def test_a_stock_server_of_another_ca(stock: Any, tmp_path: Any, identity: Identity, hint: str, version: float) -> None:
    server = theirs() if "not accepted" in hint else ours()
    security = ours().security(tls_max_version=version) if "not accepted" in hint else identity.security(tls_max_version=version)
    async with stock_server(stock, {"add": add}, server, tmp_path) as address:
        began = trio.current_time()
        with pytest.raises(ConnectError, match=hint) as caught:
            await connect(address, security=security)
        assert type(caught.value.__cause__) is RemoteProtocolError
        assert trio.current_time() - began < 1


async def test_tls_to_a_plain_stock_server(stock: Any) -> None:
    async with stock.serve({"add": add}) as server:
        began = trio.current_time()
        with pytest.raises(ConnectError, match="the peer uses tcp://, and this side tls://"):
            await connect(server.address.replace("tcp://", "tls://"), security=ours().security())
        assert trio.current_time() - began < 1


async def test_plain_to_a_stock_server_with_tls(stock: Any, tmp_path: Any) -> None:
    async with stock_server(stock, {"add": add}, ours(), tmp_path) as address:
        began = trio.current_time()
        with pytest.raises(ConnectError, match="the handshake failed"):
            await connect(address.replace("tls://", "tcp://"))
        assert trio.current_time() - began < 1


# -- what is shared ---------------------------------------------------------------------------------------------------------------


async def test_dasks_temporary_security_works_here(stock: Any) -> None:
    """Its one certificate is its own CA, and its fields have the same names here."""
    made = StockSecurity.temporary()
    fields = ("tls_ca_file", *(f"tls_{role}_{part}" for role in ("client", "scheduler", "worker") for part in ("cert", "key")))
    security = Security(require_encryption=True, **{field: getattr(made, field) for field in fields})

    async def talk(remote: Any) -> Any:
        return await remote.add(x=1, y=2)

    async with our_server({"add": add}, security) as address:
        assert await stock.call("rpc", address, talk, connection_args=made.get_connection_args("client")) == 3
        async with rpc(address, security=security) as remote:
            assert await remote.add(x=1, y=2) == 3


async def test_our_temporary_security_works_there(stock: Any) -> None:
    security = Security.temporary()
    assert isinstance(security.tls_ca_file, str)
    identity = Identity(security.tls_ca_file, str(security.tls_cert), str(security.tls_key))

    async def talk(remote: Any) -> Any:
        return await remote.add(x=1, y=2)

    async with our_server({"add": add}, security) as address:
        assert await stock.call("rpc", address, talk, **calling(identity)) == 3


async def test_the_names_of_dasks_fields_are_known() -> None:
    fields = {name: None for name in StockSecurity.__slots__ if name.startswith("tls_")}
    assert Security(require_encryption=False, extra_conn_args={}, **fields) == Security()
