"""When a peer is judged: a server's client at its handshake, a client's server when there is something to say or to hear."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
import trio
import trio.testing

from trio_dcore import Limits, Server, connect, rpc
from trio_dcore.abc import CommSettings
from trio_dcore.comm import _credentials, _greeting, _tcp, get_transport
from trio_dcore.errors import ConnectError, RemoteProtocolError
from trio_dcore.protocol._frames import single_frame
from trio_dcore.protocol._handshake import local_handshake

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose a loopback connection is")


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The local ports of the sockets whose peers have been judged."""
    found: list[int] = []
    real = _credentials.loopback_verdict

    def noted(sock: Any, names: Any) -> tuple[bool, str]:
        found.append(sock.getsockname()[1])
        return real(sock, names)

    monkeypatch.setattr(_tcp, "loopback_verdict", noted)
    return found


def port(comm: Any) -> int:
    return int(comm.local_address.rpartition(":")[2])


class Opaque:
    """Needs a pickle."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque)

    __hash__ = None  # type: ignore[assignment]


@asynccontextmanager
async def both_ends() -> AsyncIterator[tuple[Any, Any]]:
    """A client of connect(), and what a bare listener has made of it."""
    (listener,) = await get_transport("tcp").listen("127.0.0.1:0", CommSettings())
    made: list[Any] = []

    async def accept() -> None:
        comm: Any = await listener.accept()
        made.append(comm)
        await comm.handshake()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        client = await connect(listener.contact_address)
    yield client, made[0]
    client.abort()
    made[0].abort()
    listener.close()


async def test_a_comm_that_is_never_used_is_judged_by_its_server_only(judged: list[int]) -> None:
    async with Server({}) as server:
        comm = await connect(await server.listen("tcp://127.0.0.1:0"))
        await comm.aclose()
        assert judged == [server.port]


@pytest.mark.parametrize("how", ["write", "send", "families", "start", "write_nowait"])
async def test_a_server_is_judged_before_the_first_message_goes_to_it(how: str, judged: list[int]) -> None:
    async with both_ends() as (client, server):
        assert judged == [port(server)]
        message = {"op": "add", "x": 1}
        if how == "families":
            await client.write(message, serializers=("pickle",))
        elif how in ("start", "write_nowait"):
            getattr(client, how)(message)
        else:
            await getattr(client, how)(message)
        assert judged == [port(server), port(client)]
        assert await server.read() == message
        await client.write("more")
        await server.write("answer")
        assert await client.read() == "answer"
        assert judged == [port(server), port(client)]


async def test_a_client_that_only_reads_judges_when_it_begins_to(judged: list[int]) -> None:
    """So a server that says something at some time, and leaves at once, was known by then."""
    async with both_ends() as (client, server), trio.open_nursery() as nursery:

        async def read() -> None:
            got.append(await client.read())

        got: list[Any] = []
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        assert judged == [port(server), port(client)]
        with pytest.raises(trio.BusyResourceError):
            await client.read()
        await server.write(Opaque())
        server.abort()
        await trio.testing.wait_all_tasks_blocked()
        assert got == [Opaque()]


async def test_a_server_that_goes_on_talking_is_judged_at_once(judged: list[int]) -> None:
    """It doesn't wait for us, and may be about to leave."""
    with socket.create_server(("127.0.0.1", 0)) as bare:

        def talk() -> None:
            sock, _ = bare.accept()
            with sock:
                (frame,) = _greeting.greeting(CommSettings())
                sock.sendall(single_frame(frame) + single_frame(msgpack.packb("and more")))
                sock.recv(1 << 16)
                sock.recv(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, talk)
            client: Any = await connect("tcp://{}:{}".format(*bare.getsockname()))
            assert judged == [port(client)]
            assert await client.read() == "and more"
            client.abort()


async def test_pickles_travel_in_the_first_call() -> None:
    async with Server({"same": lambda data: data}) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
        assert await remote.same(data=Opaque()) == Opaque()


async def test_a_comm_that_was_never_used_takes_a_goodbye(judged: list[int]) -> None:
    """Also without judging: there is nothing in one that needs it."""
    async with both_ends() as (client, _server):
        assert not client.take_goodbye(1)
        assert not client.reading
        assert len(judged) == 1


def test_a_handshake_is_read_once_for_all_that_are_the_same() -> None:
    settings = CommSettings()
    (frame,) = _greeting.greeting(settings)
    assert _greeting.greeting(settings)[0] is frame
    found = _greeting.conclude(settings, bytes(frame))
    assert found.extension is not None
    assert _greeting.conclude(settings, bytes(frame)) is found
    others = CommSettings(limits=Limits(window=3))
    assert _greeting.greeting(others) != [frame]
    assert _greeting.conclude(others, bytes(frame)) == found


def test_a_large_handshake_is_not_kept() -> None:
    settings = CommSettings()
    local = {**local_handshake(compression=None, window=(1, 2)), "more": "x" * 1000}
    (frame,) = _greeting.GREETING_ENCODER.encode(local)
    before = _greeting._remembered.cache_info()
    found = _greeting.conclude(settings, bytes(frame))
    assert found.remote["more"] == "x" * 1000
    assert _greeting._remembered.cache_info() == before


@pytest.mark.parametrize("frame", [b"\x01", b"\xc1", b"\x80", b""])
def test_what_is_no_handshake(frame: bytes) -> None:
    for _ in range(2):
        with pytest.raises(RemoteProtocolError):
            _greeting.conclude(CommSettings(), frame)


async def test_nobody_who_says_hello_wrongly_is_talked_to() -> None:
    (listener,) = await get_transport("tcp").listen("127.0.0.1:0", CommSettings())

    async def accept() -> None:
        comm: Any = await listener.accept()
        await comm.write("hello")
        await comm.read()
        comm.abort()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        with pytest.raises(ConnectError, match="handshake"):
            await connect(listener.contact_address)
    listener.close()
