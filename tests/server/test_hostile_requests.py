"""Requests and handlers that try to get more out of a server than it should give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest
import trio
import trio.testing

from trio_dcore import CommClosedError, RemoteError, Server, connect, rpc, to_serialize
from trio_dcore.testing import ManualPeer, memory_network, no_leaks


class Canary:
    """Marks when it is unpickled."""

    sung = 0

    def __reduce__(self) -> Any:
        return (_sing, ())


def _sing() -> str:
    Canary.sung += 1
    return "sung"


@asynccontextmanager
async def manual(handlers: dict[str, Any], **options: Any) -> AsyncIterator[tuple[Server, ManualPeer]]:
    """A server over memory, and a peer that speaks by hand."""
    with memory_network() as network:
        async with Server(handlers, **options) as server:
            async with await ManualPeer.connect(await server.listen("memory://"), network) as peer:
                await peer.handshake()
                yield server, peer


def echo(**arguments: Any) -> dict[str, Any]:
    return arguments


@pytest.mark.parametrize("marker", ["__Serialized__", "__Pickled__", "__Set__", "__Enum__"])
async def test_a_request_is_no_marker(marker: str, autojump_clock: Any) -> None:
    """The op and the arguments stand in frame 0: a marker there can't bring others in from elsewhere."""
    async with manual({"echo": echo}) as (_server, peer):
        await peer.send_frames([msgpack.packb({"op": "echo", marker: 1, "reply": True}), b"\x80"])
        answer = await peer.receive()
        assert answer["status"] == "uncaught-error"
        assert "can't be a marker" in answer["exception_text"]
        await peer.send({"op": "echo", "x": 1, "reply": True})
        assert await peer.receive() == {"x": 1}


@pytest.mark.parametrize("names", [5, "dask", [1], {"dask": 1}])
async def test_serializers_that_are_none(names: Any, autojump_clock: Any) -> None:
    async with manual({"echo": echo}) as (_server, peer):
        await peer.send({"op": "echo", "serializers": names, "reply": True})
        answer = await peer.receive()
        assert "must be a list of family names" in answer["exception_text"]
        await peer.send({"op": "echo", "x": to_serialize(b"1"), "serializers": ["dask"], "reply": True})
        assert await peer.receive() == {"x": b"1"}


async def test_closing_resolves_nothing(autojump_clock: Any) -> None:
    """The pseudo-op `close` needs no permission, and so touches no payload."""
    Canary.sung = 0
    async with manual({"echo": echo}, authorize=lambda peer, op: False) as (_server, peer):
        await peer.send({"op": "close", "data": Canary(), "reply": True})
        assert await peer.receive() == "OK"
        assert await peer.expect_end()
    assert Canary.sung == 0


class Private(BaseException):
    """Neither an Exception nor a reason to end the process."""


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit, Private])
@pytest.mark.parametrize("kind", ["plain", "async", "generator"])
async def test_base_exceptions_of_handlers_are_theirs(error: type[BaseException], kind: str) -> None:
    """Only KeyboardInterrupt and SystemExit go through the server."""

    def plain() -> None:
        raise error("x")

    async def waits() -> None:
        await trio.lowlevel.checkpoint()
        raise error("x")

    async def generator() -> AsyncIterator[int]:
        yield 1
        raise error("x")

    handler = {"plain": plain, "async": waits, "generator": generator}[kind]
    async with no_leaks(), Server({"fail": handler, "echo": echo}) as server:
        async with rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
            with pytest.raises(RemoteError) as caught:
                if kind == "generator":
                    async with remote.fail.stream() as stream:
                        async for item in stream:
                            assert item == 1
                else:
                    await remote.fail()
            assert type(caught.value) is RemoteError
            assert caught.value.type_name.endswith(error.__name__)
            assert await remote.echo(x=1) == {"x": 1}


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:0", "inproc://", "memory://"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_leaves_a_reading_handler(where: str, stream: bool) -> None:
    """The handler was reading when its caller left: it is cancelled as soon as it waits for something else."""
    ended = trio.Event()
    found: list[Any] = []

    async def handler(comm: Any) -> None:
        try:
            found.append(await comm.read())
            await trio.sleep_forever()
        except trio.Cancelled:
            found.append("cancelled")
            raise
        finally:
            ended.set()

    with memory_network():
        async with no_leaks(), Server({"handler": handler}) as server:
            address = await server.listen(where)
            if stream:
                async with rpc(address) as remote, remote.handler.stream() as items:
                    await trio.testing.wait_all_tasks_blocked()
                    await items.send(5)
            else:
                comm = await connect(address)
                await comm.write({"op": "handler"})
                await trio.testing.wait_all_tasks_blocked()
                await comm.write(5)
                await comm.aclose()
            await ended.wait()
    assert found == [5, "cancelled"]


async def test_a_handler_that_reads_to_the_end_may(autojump_clock: Any) -> None:
    """It reads all that its caller sent before it left, and ends by itself."""
    found: list[Any] = []
    ended = trio.Event()

    async def handler(comm: Any) -> None:
        try:
            while True:
                found.append(await comm.read())
        except CommClosedError:
            found.append("end")
            ended.set()

    with memory_network():
        async with Server({"handler": handler}) as server:
            comm = await connect(await server.listen("memory://"))
            await comm.write({"op": "handler", "reply": False})
            for number in range(40):
                await comm.write(number)
            await comm.aclose()
            await ended.wait()
    assert found == [*range(40), "end"]


@pytest.mark.parametrize("rest", [b"\x10", ManualPeer.encode({"op": "echo"})[:-1]])
async def test_half_a_request_does_not_hold_up_a_shutdown(rest: bytes, autojump_clock: Any) -> None:
    """What may become a request is waited for during `Limits.linger`, not for all of the grace."""
    async with manual({"echo": echo}) as (server, peer):
        await trio.testing.wait_all_tasks_blocked()
        await peer.send_bytes(rest)
        start = trio.current_time()
        server.stop(600)
        await server.finished()
        assert trio.current_time() - start == pytest.approx(server.settings.limits.linger)
