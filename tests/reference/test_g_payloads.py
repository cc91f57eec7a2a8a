"""Group G, the rest: payloads that run code, or grow."""

from __future__ import annotations

import functools
import pickle
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import msgpack
import pytest
import trio
import trio.testing
from distributed.protocol.core import dumps as stock_dumps
from distributed.protocol.serialize import Serialize

from tests.reference.kit import Outcome, Wire, reference
from tests.reference.memory import resident
from tests.reference.test_g_bad_input import FLAT, answer_with, ended, target
from trio_dcore import (
    LimitExceeded,
    Limits,
    RemoteProtocolError,
    SerializationError,
    UnsafePayload,
)
from trio_dcore.protocol import MiB, exception_from_reply
from trio_dcore.protocol._envelope import ERROR, KEY
from trio_dcore.testing import ManualPeer

# -- G08, G09: pickles ----------------------------------------------------------------------------------------------------------


SUNG: list[str] = []


def sing(song: str) -> str:
    SUNG.append(song)
    return song


class Canary:
    """Sings when it is unpickled."""

    def __init__(self, song: str) -> None:
        self.song = song

    def __reduce__(self) -> Any:
        return sing, (self.song,)


def pickled(message: Callable[[Any], Any]) -> dict[str, bytes]:
    """Messages with a canary in them, in each of the ways that Dask has for that."""
    bare = message(Canary("bare"))
    nested_in = message({"deep": [Canary("nested")]})
    wrapped = message(Serialize(Canary("wrapped")))
    return {"bare": frames(bare), "nested": frames(nested_in), "wrapped": frames(wrapped)}


def frames(message: Any) -> bytes:
    return ManualPeer.encode_frames(stock_dumps(message))


@reference("G08", "m t u l", trusted=False)
async def test_g08_a_strangers_pickles_are_not_run(wire: Wire) -> None:
    SUNG.clear()
    async with target(wire, security=wire.distrustful()) as this:
        for op in ("work", "no such op", "add"):
            for data in pickled(lambda canary, op=op: {"op": op, "x": canary, "y": 1, "reply": True}).values():
                async with await wire.manual(this.address) as peer:
                    await peer.handshake()
                    await peer.send_bytes(data)
                    answer = await peer.receive()
                    assert answer["status"] == "uncaught-error"
                    error = exception_from_reply(answer, allow_pickle=lambda: True)
                    assert isinstance(error, AttributeError if op == "no such op" else ValueError)
                    if op != "no such op":
                        assert "pickle" in str(error)
                    await peer.send({"op": "add", "x": 1, "y": 2})
                    assert await peer.receive() == 3
        # Who speaks our extension is told what it is.
        async with await wire.manual(this.address) as peer:
            await peer.handshake(extension=True)
            await peer.send_bytes(frames({"op": "work", "x": Canary("opted in"), KEY: {"id": 1}}))
            kind, _, value = await peer.receive()
            assert (kind, value["code"]) == (ERROR, "unsafe")
        # In the handshake.
        handshake = {"compression": None, "python": (3, 11), "pickle-protocol": 5, "extra": Canary("handshake")}
        async with await wire.manual(this.address) as peer:
            await peer.send_bytes(frames(handshake))
            await peer.receive()
            with trio.move_on_after(wire.seconds(1)):
                await ended(peer)
        # To a stream.
        async with await wire.manual(this.address) as peer:
            await peer.handshake()
            await peer.send_bytes(frames([Canary("no request"), {"op": "work"}]))
            assert (await peer.receive())["status"] == "uncaught-error"
    assert SUNG == []


@reference("G08", "m t u l", trusted=False)
async def test_g08_the_control_with_trust_they_are_run(wire: Wire) -> None:
    SUNG.clear()
    async with (
        wire.server({"take": lambda x: None}, security=wire.secured(pickle="always")) as (_, address),
        await wire.manual(address) as peer,
    ):
        await peer.handshake()
        for data in pickled(lambda canary: {"op": "take", "x": canary, "reply": True}).values():
            await peer.send_bytes(data)
            assert await peer.receive() is None
    assert SUNG == ["bare", "nested", "wrapped"]


@reference("G09", "m t u l", trusted=False)
async def test_g09_a_strange_servers_pickles_are_not_run(wire: Wire) -> None:
    SUNG.clear()
    stranger = {"security": wire.distrustful()}
    texts = {"traceback": None, "exception_text": "", "traceback_text": ""}
    replies = [
        *pickled(lambda canary: canary).values(),
        *pickled(lambda canary: {"result": canary}).values(),
        *pickled(lambda canary: [0, 1, canary]).values(),
        frames({"status": "uncaught-error", "exception": pickle.dumps(Canary("an error")), **texts}),
    ]
    for data in replies:
        async with wire.scripted(partial(answer_with, data=data)) as address:
            async with wire.client(address, **stranger) as remote:
                outcome = Outcome()
                await outcome.of(remote.work)
                assert outcome.error is not None
            async with await wire.connect(address, **stranger) as comm:
                await comm.write("a question")
                await outcome.of(comm.read)
    for data in replies[:6]:
        async with wire.scripted(partial(answer_with, data=data)) as address, await wire.connect(address, **stranger) as comm:
            await comm.write("a question")
            with pytest.raises(UnsafePayload, match="pickle"):
                await comm.read()
            assert not comm.closed()
    assert SUNG == []
    for data in replies[:3]:
        async with (
            wire.scripted(partial(answer_with, data=data)) as address,
            wire.client(address, security=wire.secured(pickle="always")) as remote,
        ):
            await remote.work()
    assert SUNG == ["bare", "nested", "wrapped"]  # the control


# -- G11: compression -----------------------------------------------------------------------------------------------------------


def compressed(codec: str, payload: bytes, **message: Any) -> bytes:
    """A message with a compressed payload, which Dask would not make."""
    head = msgpack.packb({**message, "data": {"__Serialized__": 1}})
    header = msgpack.packb(
        {
            "serializer": "dask",
            "type": "builtins.bytes",
            "type-serialized": pickle.dumps(bytes),
            "compression": [codec],
            "num-sub-frames": 1,
            "split-num-sub-frames": [1],
            "split-offsets": [0],
        }
    )
    return ManualPeer.encode_frames([head, header, payload])


@functools.cache
def bomb(size: int) -> bytes:
    """So many zeros, in a thousandth of that."""
    return zlib.compress(bytes(size), 1)


@reference("G11", "m t u l", real=True)
async def test_g11_a_bomb_is_not_blown_up(wire: Wire) -> None:
    limits = Limits(message=2 * MiB, message_trusted=2 * MiB)
    payload = bomb(256 * MiB)
    assert len(payload) < 1.5 * MiB
    async with target(wire, limits=limits) as this:
        for extension in (False, True):
            async with await wire.manual(this.address) as peer:
                await peer.handshake(extension=extension)
                with resident() as peak:
                    await peer.send_bytes(compressed("zlib", payload, op="work", reply=True))
                    answers = await ended(peer)
                assert peak.bytes < FLAT, peak
                assert [answer["status"] for answer in answers] == ["uncaught-error"]
                assert "message" in answers[0]["exception_text"]
    async with (
        wire.scripted(partial(answer_with, data=compressed("zlib", payload))) as address,
        wire.client(address, limits=limits) as remote,
    ):
        with resident() as peak, pytest.raises(LimitExceeded) as caught:
            await remote.work()
        assert caught.value.limit in ("message", "message_trusted")
        assert peak.bytes < FLAT, peak


@reference("G11", "m t u l", real=True)
async def test_g11_codecs_that_are_none(wire: Wire) -> None:
    async with target(wire) as this:
        for codec, payload in (("lz5", b"x" * 100), ("zlib", b"x" * 100), ("zlib", zlib.compress(b"x" * 100)[:-5]), ("", b"x")):
            data = compressed(codec, payload, op="work", reply=True)
            async with await wire.manual(this.address) as peer:
                await peer.handshake()
                await peer.send_bytes(data)
                answer = await peer.receive()
                assert answer["status"] == "uncaught-error"
                assert repr(codec) in answer["exception_text"] or codec in answer["exception_text"]
            async with (
                wire.scripted(partial(answer_with, data=data)) as address,
                wire.client(address) as remote,
            ):
                with pytest.raises((RemoteProtocolError, SerializationError)):
                    await remote.work()
