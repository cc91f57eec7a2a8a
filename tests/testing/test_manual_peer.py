from __future__ import annotations

import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.reference.identities import ours
from trio_dcore import CommClosedError, Server
from trio_dcore.testing import ManualPeer, MemoryNetwork, memory_network, no_leaks


@asynccontextmanager
async def serving(where: str) -> AsyncIterator[ManualPeer]:
    """A server that adds, and a peer that is connected to it."""
    network: MemoryNetwork | None
    with memory_network() as network:
        async with (
            no_leaks(),
            Server({"add": lambda x, y: x + y}) as server,
            await ManualPeer.connect(await server.listen(where), network) as peer,
        ):
            yield peer


@pytest.fixture(params=["memory://", "tcp://127.0.0.1:0"])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_a_stock_peer(where: str) -> None:
    async with serving(where) as peer:
        theirs = await peer.handshake()
        assert "trio-dcore" in theirs
        await peer.send({"op": "add", "x": 1, "y": 2})
        assert await peer.receive() == 3


async def test_a_peer_with_the_extension(where: str) -> None:
    async with serving(where) as peer:
        await peer.handshake(extension=True)
        await peer.send({"op": "add", "x": 1, "y": 2, "reply": True, "trio-dcore": {"id": 1}})
        assert await peer.receive() == (0, 1, 3)


async def test_over_unix_and_tls() -> None:
    with tempfile.TemporaryDirectory() as folder:
        places = [f"unix://{folder}/sock", "tls://127.0.0.1:0"]
        if sys.platform == "linux":
            places.append(f"unix://@{Path(folder).name}")
        for place in places:
            context = ours().context("client") if place.startswith("tls") else None
            async with no_leaks(), Server({"add": lambda x, y: x + y}, security=ours().security()) as server:
                address = await server.listen(place)
                async with await ManualPeer.connect(address, ssl_context=context) as peer:
                    await peer.handshake()
                    await peer.send({"op": "add", "x": 1, "y": 2})
                    assert await peer.receive() == 3
                await server.aclose()
                with pytest.raises(OSError, match="refused|No such file|failed"):
                    await ManualPeer.connect(address)


async def test_a_handshake_can_be_changed() -> None:
    with memory_network() as network:
        async with await network.listen_streams() as listener:
            a = await ManualPeer.connect(listener.address, network)
            b = ManualPeer(await listener.accept())
            received: dict[str, Any] = {}

            async def shake(peer: ManualPeer, name: str, **changes: Any) -> None:
                received[name] = await peer.handshake(**changes)

            async with a, b, trio.open_nursery() as nursery:
                nursery.start_soon(lambda: shake(a, "b's", extension=True))
                nursery.start_soon(lambda: shake(b, "a's", pickle_protocol=..., compression="lz4", something=None))
    from_a, from_b = received["a's"], received["b's"]
    assert "trio-dcore" in from_a
    assert "trio-dcore" not in from_b
    assert "pickle-protocol" in from_a
    assert "pickle-protocol" not in from_b
    assert from_b["compression"] == "lz4"
    assert from_b["something"] is None


async def test_bytes_as_they_are(where: str) -> None:
    async with serving(where) as peer:
        await peer.handshake()
        data = ManualPeer.encode({"op": "add", "x": 1, "y": 2})
        for index in range(len(data)):
            await peer.send_bytes(data[index : index + 1])
        assert await peer.receive() == 3
        await peer.send_bytes(2 * data)
        assert [await peer.receive(), await peer.receive()] == [3, 3]


async def test_frames(where: str) -> None:
    async with serving(where) as peer:
        await peer.handshake()
        await peer.send({"op": "add", "x": 1, "y": 2})
        (frame,) = await peer.receive_frames()
        assert bytes(frame) == b"\x03"
        await peer.send_frames([b"\xc1"])
        assert (await peer.receive())["status"] == "uncaught-error"
        assert await peer.expect_end()


async def test_the_end_is_told_from_a_reset(where: str) -> None:
    async with serving(where) as peer:
        await peer.handshake()
        await peer.send({"op": "add", "x": 1, "y": 2, "close": True})
        with pytest.raises(AssertionError, match="got 3"):
            await peer.expect_end()
        assert await peer.expect_end() is True
        with pytest.raises(CommClosedError, match="between messages"):
            await peer.receive()


async def test_a_reset(where: str) -> None:
    with memory_network() as network:
        if where == "memory://":
            listener: Any = await network.listen_streams()
            a = await ManualPeer.connect(listener.address, network)
        else:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            a = await ManualPeer.connect(f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}")
        async with listener, no_leaks():
            b = ManualPeer(await listener.accept())
            async with a, b:
                a.reset()
                assert await b.expect_end() is False


async def test_an_end_inside_a_message() -> None:
    with memory_network() as network:
        async with (
            await network.listen_streams() as listener,
            await ManualPeer.connect(listener.address, network) as a,
            ManualPeer(await listener.accept()) as b,
        ):
            await a.send_bytes(ManualPeer.encode("x" * 100)[:50])
            await a.aclose()
            with pytest.raises(CommClosedError, match="in the middle of a message"):
                await b.receive()


async def test_an_address_in_memory_needs_its_network() -> None:
    with pytest.raises(ValueError, match="network"):
        await ManualPeer.connect("memory://x")
