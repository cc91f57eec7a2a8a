"""No stranger's bytes are unpickled, imported or run, whatever they stand in and whichever way they come.

Each test lets the same payload come from a trusted peer as well, where it goes off: so the payload is a live one.
"""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

from tests.attacks.canary import ATTACKS, attack, bomb, plain_error
from trio_dcore import (
    ConnectError,
    RemoteError,
    Security,
    Server,
    UnsafePayload,
    connect,
    rpc,
)
from trio_dcore.protocol import exception_from_reply
from trio_dcore.testing import ManualPeer, MemoryNetwork, memory_network, no_leaks

Way = Callable[[str, Path, bool], Awaitable[object]]


def take(x: Any = None) -> str:
    return "taken"


@asynccontextmanager
async def caller(network: MemoryNetwork, handlers: dict[str, Any], **options: Any) -> AsyncIterator[ManualPeer]:
    """A peer that speaks by hand to a server, which serves others afterwards, and a stranger on the same connection too."""
    async with Server(handlers, **options) as server:
        address = await server.listen("memory://")
        async with await ManualPeer.connect(address, network) as peer:
            await peer.handshake()
            yield peer
            if not network.trusted:
                await peer.send({"op": "echo", "data": 1})
                assert await peer.receive() == 1
        async with rpc(address) as remote:
            assert await remote.echo(data=2) == 2


def raised(reply: object) -> object:
    """The error of an error reply; else the reply itself."""
    return exception_from_reply(reply, allow_pickle=bool) if isinstance(reply, dict) and "status" in reply else reply


def is_refusal(error: object) -> bool:
    """Also as it gets to a stock peer, by name."""
    return isinstance(error, UnsafePayload) or (isinstance(error, RemoteError) and error.type_name == "UnsafePayload")


async def in_a_request(name: str, mark: Path, trusted: bool) -> object:
    with memory_network(trusted) as network:
        async with caller(network, {"take": take}) as peer:
            await peer.send_frames(attack(name, mark, {"op": "take"}))
            return raised(await peer.receive())


async def in_a_message_to_a_handler(name: str, mark: Path, trusted: bool) -> object:
    found: list[object] = []

    async def listens(comm: Any) -> None:
        try:
            found.append(await comm.read())
        except Exception as error:
            found.append(error)
        await comm.write("read")

    with memory_network(trusted) as network:
        async with caller(network, {"listens": listens}) as peer:
            await peer.send({"op": "listens", "reply": False})
            await peer.send_frames(attack(name, mark, {}))
            assert await peer.receive() == "read"
    return found[0]


async def in_a_reply(name: str, mark: Path, trusted: bool) -> object:
    """The server is the stranger."""
    return await replied(lambda: attack(name, mark, {}), trusted)


async def replied(frames: Callable[[], list[Any]], trusted: bool) -> object:
    async def serves() -> None:
        async with ManualPeer(await listener.accept()) as peer:
            await peer.handshake()
            await peer.receive()
            await peer.send_frames(frames())
            if not trusted:
                await peer.receive()
                await peer.send("next")

    with memory_network(trusted) as network:
        listener = await network.listen_streams()
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(serves)
            async with rpc(listener.address) as remote:
                result: object
                try:
                    result = await remote.take()
                except Exception as error:
                    result = error
                if not trusted:  # the comm is in order: the next call is answered on it
                    assert await remote.take() == "next"
    return result


async def through_a_hop(name: str, mark: Path, trusted: bool, where: str = "memory://") -> object:
    """A server that doesn't open payloads passes them on to one that trusts it."""

    async def passes(x: Any) -> Any:
        return await worker.take(x=x)

    with memory_network() as network:
        async with Server({"take": take}) as behind, rpc(await behind.listen(where), deserialize=False) as worker:
            assert await worker.take() == "taken"  # the connection exists, and is trusted at both ends
            network.trusted = trusted
            async with caller(network, {"passes": passes}, deserialize=False) as peer:
                await peer.send_frames(attack(name, mark, {"op": "passes"}))
                return raised(await peer.receive())


async def through_a_hop_here(name: str, mark: Path, trusted: bool) -> object:
    """To a server in the same process, which gets the hop's own object."""
    return await through_a_hop(name, mark, trusted, "inproc://")


WAYS: dict[str, Way] = {
    "in a request": in_a_request,
    "in a message to a handler": in_a_message_to_a_handler,
    "in a reply": in_a_reply,
    "through a hop": through_a_hop,
    "through a hop of this process": through_a_hop_here,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ATTACKS)
async def test_a_payload(name: str, way: str, tmp_path: Path, autojump_clock: object) -> None:
    async with no_leaks():
        error = await WAYS[way](name, tmp_path / "stranger", False)
    assert is_refusal(error), repr(error)
    assert re.search(r"(^|: )x\b", str(error)), str(error)  # where it stands
    assert list(tmp_path.iterdir()) == []
    await WAYS[way](name, tmp_path / "ours", True)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("settings", ["never", "always"])
async def test_the_settings_overrule_who_it_is(settings: Any, tmp_path: Path, autojump_clock: object) -> None:
    with memory_network(trusted=settings == "never") as network:
        async with caller(network, {"take": take}, security=Security(pickle=settings)) as peer:
            await peer.send_frames(attack("pickle family", tmp_path / "mark", {"op": "take"}))
            reply = raised(await peer.receive())
    assert is_refusal(reply) == (settings == "never")
    assert (tmp_path / "mark").exists() == (settings == "always")


@pytest.mark.parametrize("name", plain_error(Path()))
async def test_an_error_reply(name: str, tmp_path: Path, autojump_clock: object) -> None:
    """A stranger's error arrives in text."""
    async with no_leaks():
        error = await replied(plain_error(tmp_path / "stranger")[name], False)
    assert isinstance(error, Exception)
    assert list(tmp_path.iterdir()) == []
    await replied(plain_error(tmp_path / "ours")[name], True)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", ["pickled", "pickle family", "type-serialized"])
@pytest.mark.parametrize("side", ["server", "client"])
async def test_in_the_handshake(side: str, name: str, trusted: bool, tmp_path: Path, autojump_clock: object) -> None:
    """A handshake is plain data; what else it holds is never looked into, whoever sent it."""
    mark = tmp_path / "mark"
    frames = attack(name, mark, {"compression": None, "python": (3, 11), "pickle-protocol": 5})
    whole = [msgpack.packb({"__Pickled__": 1}), *frames[1:]]
    with memory_network(trusted) as network:
        if side == "server":
            async with Server({"take": take}) as server:
                for sent, accepted in ((frames, True), (whole, False)):
                    async with await ManualPeer.connect(await server.listen("memory://"), network) as peer:
                        await peer.send_frames(sent)
                        if accepted:
                            await peer.receive()
                            await peer.send({"op": "take"})
                            assert await peer.receive() == "taken"
                        else:
                            await peer.expect_end()
        else:
            listener = await network.listen_streams()

            async with listener:
                for sent, accepted in ((frames, True), (whole, False)):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_answers, listener, sent)
                        if accepted:
                            await (await connect(listener.address)).aclose()
                        else:
                            with pytest.raises(ConnectError, match="handshake lacks"):
                                await connect(listener.address)
    assert not mark.exists()
    pickle.loads(bomb(mark))
    assert mark.exists()  # it was a live one


async def _answers(listener: Any, frames: list[Any]) -> None:
    async with ManualPeer(await listener.accept()) as peer:
        await peer.send_frames(frames)
        await peer.receive()
        await peer.expect_end()


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("place", ["in frame 0", "in a header", "in an inline payload", "in a msgpack payload"])
async def test_an_enum(
    place: str, trusted: bool, tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module is never imported because somebody names it, although its package is among those that may be named."""
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "mark"
    (tmp_path / "planted_module.py").write_text(f"open({str(mark)!r}, 'a').close()")
    marker = {"__Enum__": True, "name": "A", "__module__": "planted_module", "__name__": "Planted"}
    message: dict[str, Any] = {"op": "take", "x": {"__Serialized__": 1}}
    frames: list[bytes] = []
    header: dict[str, Any] = {"serializer": "msgpack", "num-sub-frames": 1}
    if place == "in frame 0":
        message["x"] = marker
    elif place == "in a header":
        header = {"is-collection": True, "type-serialized": "dict", "frame-lengths": (1,), "num-sub-frames": 1}
        header["sub-headers"] = ({"serializer": "msgpack", "key": marker},)
        frames = [msgpack.packb(header), msgpack.packb(1)]
    elif place == "in an inline payload":
        inline = {"__Serialized__": True, "data": ({"serializer": "pickle", "writeable": (), "extra": marker}, (bomb(mark),))}
        frames = [msgpack.packb({**header, "extra": inline}), msgpack.packb(1)]
    else:
        frames = [msgpack.packb(header), msgpack.packb(marker)]
    with memory_network(trusted) as network:
        async with Server({"take": take}, security=Security(enum_modules=("planted_module",))) as server:
            async with await ManualPeer.connect(await server.listen("memory://"), network) as peer:
                await peer.handshake()
                await peer.send_frames([msgpack.packb(message), *frames])
                answer = raised(await peer.receive())
    assert (answer == "taken") == (place == "in a msgpack payload"), answer  # where it is only a dict
    assert "planted_module" not in sys.modules
    assert not mark.exists()
    importlib.import_module("planted_module")
    del sys.modules["planted_module"]
    assert mark.exists()


@pytest.mark.parametrize("trusted", [False, True])
async def test_inside_of_a_header(trusted: bool, tmp_path: Path, autojump_clock: object) -> None:
    """A payload in a header stays what it is, whoever sent it."""
    mark = tmp_path / "mark"
    found: list[Any] = []

    def look(x: Any) -> str:
        found.append(x)
        return "looked"

    inline = {"__Serialized__": True, "data": ({"serializer": "pickle", "writeable": ()}, (bomb(mark),))}
    header = {"serializer": "msgpack", "num-sub-frames": 1, "extra": inline}
    frames = [msgpack.packb({"op": "look", "x": {"__Serialized__": 1}}), msgpack.packb(header), msgpack.packb(inline)]
    with memory_network(trusted) as network:
        async with caller(network, {"look": look}) as peer:
            await peer.send_frames(frames)
            assert await peer.receive() == "looked"
    assert found == [inline]  # plain data
    assert not mark.exists()
    pickle.loads(found[0]["data"][1][0])
    assert mark.exists()
