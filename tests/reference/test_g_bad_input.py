"""Group G: bytes that nobody who means well would send."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgpack
import pytest
import trio
import trio.testing
from distributed.protocol.core import dumps as stock_dumps
from distributed.protocol.serialize import Serialize

from tests.reference.kit import Wire, reference, until
from tests.reference.memory import objects, resident
from trio_dcore import (
    CommClosedError,
    ConnectError,
    LimitExceeded,
    Limits,
    RemoteProtocolError,
    Server,
    UnknownOp,
)
from trio_dcore.protocol import GiB, KiB, MiB, exception_from_reply
from trio_dcore.protocol._envelope import ERROR, KEY
from trio_dcore.testing import FaultStream, ManualPeer

blocked = trio.testing.wait_all_tasks_blocked

# What a comm may answer to bytes that are not acceptable; and not another error, whatever they are.
TYPED = (RemoteProtocolError, LimitExceeded, CommClosedError, ConnectError)
# Memory is flat if it grows by less.
FLAT = 16 * MiB


class Target:
    """A server that is attacked.

    Attributes:
        server: the server.
        address: where it listens.
        calls: the arguments with which its handlers were called by others than the bystander.
    """

    def __init__(self, server: Server, address: str, calls: list[Any]) -> None:
        self.server = server
        self.address = address
        self.calls = calls


@asynccontextmanager
async def target(wire: Wire, **options: Any) -> AsyncIterator[Target]:
    """A server, with somebody who goes on using it; at the end its handlers have not been called, and it is whole."""
    calls: list[Any] = []

    def work(**kwargs: Any) -> str:
        calls.append(kwargs)
        return "done"

    async with wire.server({"work": work, "add": lambda x, y: x + y}, **options) as (server, address):
        async with wire.client(address) as bystander:
            comm = await wire.comm_of(bystander, server)
            yield Target(server, address, calls)
            await until(lambda: server.statistics().connections == 1)
            assert await bystander.add(x=1, y=2) == 3
            assert await wire.comm_of(bystander, server) == comm
        assert calls == []


async def ended(peer: ManualPeer) -> list[Any]:
    """Read to the end of a connection, in order or by a reset; returns the messages that came before it."""
    messages = []
    with trio.fail_after(60):
        try:
            while True:
                messages.append(await peer.receive())
        except CommClosedError:
            return messages


async def answer_with(peer: ManualPeer, data: bytes, *, instead_of_handshake: bool = False, end: bool = False) -> None:
    """A server's script: to a request it says these bytes, and no more."""
    if not instead_of_handshake:
        await peer.handshake()
    await peer.receive()
    await peer.send_bytes(data)
    if not end:
        await ended(peer)


# -- G01, G02: numbers ----------------------------------------------------------------------------------------------------------


ABSURD = {
    "outer length of 2**63": struct.pack("<QQQ", 2**63, 1, 2**63 - 16),
    "outer length of 2**64 - 1": struct.pack("<QQQ", 2**64 - 1, 1, 5),
    "2**40 frames": struct.pack("<QQ", 8 + 8 * 2**40, 2**40),
    "2**40 frames in 16 bytes": struct.pack("<QQ", 16, 2**40),
    "2**64 - 1 frames": struct.pack("<QQ", 2**64 - 8, 2**64 - 1),
    "a frame of 2**63": struct.pack("<QQQ", 16, 1, 2**63),
    "frames that add up to 2**64": struct.pack("<QQQQ", 24, 2, 2**63, 2**63),
}


@reference("G01", "m t u l")
async def test_g01_absurd_numbers_for_a_server(wire: Wire) -> None:
    for security in (wire.security, wire.distrustful()):
        with resident() as peak:
            async with target(wire, security=security) as this:
                for instead_of_handshake in (True, False):
                    for claim in ABSURD.values():
                        async with await wire.manual(this.address) as peer:
                            if instead_of_handshake:
                                await wire.secure(peer)
                            else:
                                await peer.handshake()
                            with wire.now():
                                await peer.send_bytes(claim)
                                assert await ended(peer) == []
                await until(lambda: this.server.statistics().connections == 1)
                assert this.server.statistics().errors == 2 * len(ABSURD)
        assert peak.bytes < FLAT, peak


@reference("G01", "m t u l")
async def test_g01_absurd_numbers_for_a_client(wire: Wire) -> None:
    with resident() as peak:
        for claim in ABSURD.values():
            async with wire.scripted(partial(answer_with, data=claim)) as address:
                async with await wire.connect(address) as comm:
                    await comm.write("a question")
                    with wire.now(), pytest.raises((RemoteProtocolError, LimitExceeded)):
                        await comm.read()
                    assert comm.closed()
                async with wire.client(address) as remote:
                    with wire.now(), pytest.raises((RemoteProtocolError, LimitExceeded)):
                        await remote.work()
                    assert (remote.pool.open, remote.pool.active) == (0, 0)
            async with wire.scripted(partial(answer_with, data=claim, instead_of_handshake=True)) as address:
                with wire.now(), pytest.raises(ConnectError):
                    await wire.connect(address)
    assert peak.bytes < FLAT, peak


def claim(size: int) -> bytes:
    """The beginning of a message of so many bytes, with a little of its payload."""
    head = msgpack.packb({"op": "work", "data": {"__Serialized__": 1}})
    lengths = [len(head), size - len(head) - 32]
    return struct.pack("<QQQQ", 24 + sum(lengths), 2, *lengths) + head + bytes(100 * KiB)


@reference("G02", "m t u l", real=True)
async def test_g02_a_claim_and_then_silence(wire: Wire) -> None:
    limits = Limits(progress_timeout=0.3)
    trusting = wire.security
    with resident() as peak:
        for security, most in ((trusting, 2 * GiB), (wire.distrustful(), 64 * MiB)):
            async with target(wire, security=security, limits=limits) as this, trio.open_nursery() as nursery:

                async def promise(size: int, seconds: float, address: str = this.address) -> None:
                    async with await wire.manual(address) as peer:
                        await peer.handshake()
                        with wire.takes(seconds):
                            try:
                                await peer.send_bytes(claim(size))
                            except trio.BrokenResourceError:
                                pass  # it was told before all of it had gone
                            assert await ended(peer) == []

                for _ in range(8):  # together more than there is
                    nursery.start_soon(promise, most - MiB, 0.3)
                nursery.start_soon(promise, 4 * GiB, 0)
    assert peak.bytes < 2 * FLAT, peak


@reference("G02", "m t u l", real=True)
async def test_g02_a_server_that_promises_and_is_silent(wire: Wire) -> None:
    with resident() as peak:
        async with (
            wire.scripted(partial(answer_with, data=claim(2 * GiB - MiB))) as address,
            wire.client(address, limits=Limits(progress_timeout=0.3)) as remote,
        ):
            with wire.takes(0.3), pytest.raises(LimitExceeded) as caught:
                await remote.work()
            assert caught.value.limit == "progress_timeout"
            assert remote.pool.open == 0
    assert peak.bytes < FLAT, peak


# -- G03, G04: pieces -----------------------------------------------------------------------------------------------------------


REQUEST = ManualPeer.encode({"op": "work", "reply": True})
# With a payload frame of its own.
PAYLOAD = ManualPeer.encode_frames(stock_dumps({"op": "work", "x": Serialize(b"x" * 50), "reply": True}))


def is_short(wire: Wire) -> bool:
    return wire.transport == "m"


@reference("G03", "m t u l")
async def test_g03_requests_that_are_cut_short(wire: Wire) -> None:
    async with target(wire) as this:
        for whole in (REQUEST, PAYLOAD):
            for size in range(1, len(whole), 1 if is_short(wire) else 17):
                async with await wire.manual(this.address) as peer:
                    await peer.handshake()
                    await peer.send_bytes(whole[:size])
        await blocked()


@reference("G03", "m t u l")
async def test_g03_answers_that_are_cut_short(wire: Wire) -> None:
    whole = ManualPeer.encode(["an", "answer"])
    for size in range(1, len(whole), 1 if is_short(wire) else 7):
        async with (
            wire.scripted(partial(answer_with, data=whole[:size], end=True)) as address,
            await wire.connect(address) as comm,
        ):
            await comm.write("a question")
            with wire.now(), pytest.raises(CommClosedError, match="in the middle of a message"):
                await comm.read()


WRONG = {
    "zero frames": struct.pack("<QQ", 8, 0),
    "outer less than its prelude": struct.pack("<QQQ", 15, 1, len(REQUEST) - 24) + REQUEST[24:],
    "outer of zero": struct.pack("<QQQ", 0, 1, 5),
    "an empty head": struct.pack("<QQQ", 16, 1, 0),
    "an empty head before a frame": struct.pack("<QQQQ", 24 + 5, 2, 0, 5) + b"abcde",
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "text": b"hello there, is anybody at home?\n",
}


@reference("G03", "m t u l")
async def test_g03_frames_that_contradict_each_other(wire: Wire) -> None:
    async with target(wire) as this:
        for data in WRONG.values():
            async with await wire.manual(this.address) as peer:
                await peer.handshake()
                with wire.now():
                    await peer.send_bytes(data)
                    assert await ended(peer) == []
        await until(lambda: this.server.statistics().connections == 1)
        assert this.server.statistics().errors == len(WRONG)
    for data in WRONG.values():
        async with wire.scripted(partial(answer_with, data=data)) as address, await wire.connect(address) as comm:
            await comm.write("a question")
            with wire.now(), pytest.raises((RemoteProtocolError, LimitExceeded)):
                await comm.read()
            assert comm.closed()


def slow_limits(wire: Wire) -> Limits:
    """The default ones in virtual time; else with less silence."""
    return Limits() if wire.virtual else Limits(progress_timeout=0.5)


@reference("G04", "m t")
async def test_g04_a_byte_now_and_then_is_too_slow(wire: Wire) -> None:
    limits = slow_limits(wire)
    assert limits.progress_timeout is not None
    async with target(wire, limits=limits) as this, trio.open_nursery() as nursery:

        async def drip(every: float, data: bytes) -> None:
            async with await wire.manual(this.address) as peer, trio.open_nursery() as both:
                await peer.handshake()

                async def send() -> None:
                    for index in range(len(data)):
                        try:
                            await peer.send_bytes(data[index : index + 1])
                        except trio.BrokenResourceError:
                            return
                        await trio.sleep(every)

                start = trio.current_time()
                both.start_soon(send)
                assert await ended(peer) == []
                took = trio.current_time() - start
                assert limits.progress_timeout <= took <= limits.progress_timeout * 31 / 30 + (0 if wire.virtual else 1)
                both.cancel_scope.cancel()

        # A byte a second, in the head or in a payload; and one that stops.
        nursery.start_soon(drip, 1 if wire.virtual else 0.02, PAYLOAD)
        nursery.start_soon(drip, 1 if wire.virtual else 0.02, claim(10 * MiB))
        nursery.start_soon(drip, 0, PAYLOAD[:-1])


@reference("G04", "m t")
async def test_g04_slow_but_steady_is_not(wire: Wire) -> None:
    data = bytes(range(256)) * 4 * (40 * 10 if wire.virtual else 15)
    async with wire.server({"size": lambda data: len(data)}, limits=slow_limits(wire)) as (_, address):

        async def send_slowly() -> None:
            """10 KiB a second, for longer than any silence may last."""
            async with await wire.manual(address) as peer:
                await peer.handshake()
                whole = ManualPeer.encode({"op": "size", "data": data, "reply": True})
                start = trio.current_time()
                for index in range(0, len(whole), KiB):
                    await peer.send_bytes(whole[index : index + KiB])
                    await trio.sleep(0.1)
                assert await peer.receive() == len(data)
                assert trio.current_time() - start > (39 if wire.virtual else 1)

        async def send_in_single_bytes() -> None:
            stream = FaultStream(await wire.connect_bytes(address), on="send", slicer=1)
            async with ManualPeer(stream) as peer:
                await peer.handshake()
                await peer.send({"op": "size", "data": bytes(4 * KiB), "reply": True})
                assert await peer.receive() == 4 * KiB

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_slowly)
            nursery.start_soon(send_in_single_bytes)


# -- G05, G06, G07: what a frame says -------------------------------------------------------------------------------------------


@reference("G05", "m t u l")
async def test_g05_a_head_of_empty_maps(wire: Wire) -> None:
    """They are what takes most memory for a byte; 256 KiB of them here, so that it does not take as much time."""
    size = 256 * KiB
    limits = Limits(head=size, head_trusted=size)
    head = struct.pack(">BI", 0xDD, size - 5) + b"\x80" * (size - 5)
    async with target(wire, limits=limits) as this:
        async with await wire.manual(this.address) as peer:
            await peer.handshake()
            with objects() as peak:
                await peer.send_bytes(ManualPeer.encode_frames([head]))
                assert "must be a dict" in (await peer.receive())["exception_text"]
            assert 20 * size < peak.bytes <= 100 * size, peak
            await peer.send({"op": "add", "x": 1, "y": 2})  # nobody has done anything forbidden
            assert await peer.receive() == 3
            with objects() as peak, wire.now():
                try:
                    await peer.send_bytes(ManualPeer.encode_frames([head + b"\x80"]))
                except trio.BrokenResourceError:
                    pass  # it was told before all of it had gone
                assert await ended(peer) == []
            assert peak.bytes < 5 * size, peak


def nested(levels: int) -> bytes:
    return b"\x91" * levels + b"\x90"


BROKEN = {
    "1100 levels of lists": nested(1100),
    "10**6 levels of lists": nested(10**6),
    "1100 levels of maps": b"\x81\xa1x" * 1100 + b"\x80",
    "a list of 2**32 - 1": b"\xdd\xff\xff\xff\xff",
    "a map of 2**32 - 1": b"\xdf\xff\xff\xff\xff",
    "a text of 2**32 - 1": b"\xdb\xff\xff\xff\xffabc",
    "bad UTF-8": b"\x82\xa2op\xa4work\xa1x\xa2\xff\xfe",
    "0xc1": b"\x82\xa2op\xa4work\xa1x\xc1",
    "trailing bytes": msgpack.packb({"op": "work"}) + b"\x00",
    "two messages": 2 * msgpack.packb({"op": "work"}),
    "an unhashable key": b"\x82\xa2op\xa4work\x91\x80\x01",
    "a map as a key": b"\x82\xa2op\xa4work\x80\x01",
    "cut short": msgpack.packb({"op": "work", "x": 1})[:-1],
}


@reference("G06", "m t u l")
async def test_g06_requests_that_are_no_msgpack(wire: Wire) -> None:
    async with target(wire) as this:
        for name, head in BROKEN.items():
            for extension in (False, True):
                async with await wire.manual(this.address) as peer:
                    await peer.handshake(extension=extension)
                    with wire.now():
                        await peer.send_frames([head])
                        # Framing is whole, so it can be told, if it asked anything.
                        (answer,) = await ended(peer)
                    assert answer["status"] == "uncaught-error", name
                    assert isinstance(exception_from_reply(answer, allow_pickle=lambda: True), Exception)
        await until(lambda: this.server.statistics().connections == 1)
        assert this.server.statistics().errors == 2 * len(BROKEN)
        for head in BROKEN.values():  # in place of a handshake
            async with await wire.manual(this.address) as peer:
                await wire.secure(peer)
                with wire.now():
                    try:
                        await peer.send_frames([head])
                    except trio.BrokenResourceError:
                        pass  # a megabyte is too much at once
                    assert await ended(peer) == []


@reference("G06", "m t u l")
async def test_g06_answers_that_are_no_msgpack(wire: Wire) -> None:
    for head in BROKEN.values():
        data = ManualPeer.encode_frames([head])
        async with wire.scripted(partial(answer_with, data=data)) as address:
            async with await wire.connect(address) as comm:
                await comm.write("a question")
                with wire.now(), pytest.raises(RemoteProtocolError):
                    await comm.read()
            async with wire.client(address) as remote:
                with wire.now(), pytest.raises(RemoteProtocolError):
                    await remote.work()
                assert (remote.pool.open, remote.pool.active) == (0, 0)
        async with wire.scripted(partial(answer_with, data=data, instead_of_handshake=True)) as address:
            with wire.now(), pytest.raises(ConnectError):
                await wire.connect(address)


NO_REQUESTS: list[Any] = [
    [],
    ["work"],
    5,
    None,
    "work",
    b"work",
    True,
    {},
    {"reply": True},
    {"operation": "work"},
    {"op": 5},
    {"op": None},
    {"op": []},
    {"op": ["work"]},
    {"op": {"op": "work"}},
    {"op": b"work"},
    {"op": ""},
    {"op": "no such op"},
    {"op": "__class__"},
    {"op": "work", 5: 1},
    {"op": "work", None: 1},
    {"op": "work", b"x": 1},
    {"op": "work", "serializers": 5},
]


@reference("G07", "m t u l")
async def test_g07_messages_that_are_no_requests(wire: Wire) -> None:
    async with target(wire) as this:
        for extension in (False, True):
            async with await wire.manual(this.address) as peer:
                await peer.handshake(extension=extension)
                for message in NO_REQUESTS:
                    with wire.now():
                        await peer.send(message)
                        answer = await peer.receive()
                    assert answer["status"] == "uncaught-error", message
                    error = exception_from_reply(answer, allow_pickle=lambda: True)
                    assert isinstance(error, (ValueError, TypeError, AttributeError, UnknownOp)), message
                    if isinstance(message, dict):
                        # Who wants no answer gets none.
                        await peer.send({**message, "reply": False})
                    await peer.send({"op": "add", "x": 1, "y": 2, "reply": True})
                    assert await peer.receive() == 3


@reference("G07", "m t u l")
async def test_g07_headers_of_ours_that_are_none(wire: Wire) -> None:
    """What stands under the extension's key must be right: who speaks it says so in its handshake."""
    async with target(wire) as this:
        for header in (None, 5, [], {}, {"id": None}, {"id": -1}, {"id": "1"}, {"id": 1, "deadline": "soon"}, {"id": 2**70}):
            async with await wire.manual(this.address) as peer:
                await peer.handshake(extension=True)
                with wire.now():
                    await peer.send({"op": "work", KEY: header, "reply": True})
                    (answer,) = await ended(peer)
                assert answer["status"] == "uncaught-error" if isinstance(answer, dict) else answer[0] == ERROR
            # To others it is an argument as any other.
            async with await wire.manual(this.address) as peer:
                await peer.handshake()
                await peer.send({"op": "add", KEY: 5, "reply": True})
                assert "unexpected keyword argument" in (await peer.receive())["exception_text"]
