"""Pairs of comms over every transport, and the rule that a test leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing

from tests.reference.identities import ours
from trio_dcore.abc import CommSettings, Peer
from trio_dcore.comm import BaseComm, FramedComm, StreamPump, get_transport, parse_address
from trio_dcore.testing import memory_stream_pair

PATIENCE = 30.0
KINDS = ["stream", "memory", "tcp", "tls", "inproc"]


def _inventory() -> Counter[str]:
    found = Counter(f"thread {thread.name}" for thread in threading.enumerate() if not thread.name.startswith("Trio thread"))
    if sys.platform == "linux":
        for name in os.listdir("/proc/self/fd"):
            try:
                found[os.readlink(f"/proc/self/fd/{name}").partition(":[")[0]] += 1
            except OSError:
                pass  # the listing's own
    return found


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """No thread and no descriptor is left; a socket that was left to the garbage collector is a ResourceWarning, so an error."""
    before = _inventory()
    yield
    if _inventory() - before:
        gc.collect()
    left = _inventory() - before
    assert not left, f"left behind: {dict(left)}"


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """A test that hangs fails."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def hang(number: int, frame: object) -> None:
        raise TimeoutError(f"the test has not ended within {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@dataclass
class Pair:
    """Two ends of a connection, after the handshake."""

    client: Any
    server: Any
    kind: str
    #: What is underneath, where there are streams: (the client's, the server's).
    streams: tuple[Any, Any] | None = None

    @property
    def framed(self) -> bool:
        return self.kind != "inproc"

    def of(self, side: str) -> Any:
        return self.client if side == "client" else self.server


def stream_comm(stream: trio.abc.Stream, *, trusted: bool = True, **settings: Any) -> FramedComm:
    """A comm over any stream."""
    peer = Peer("memory://peer", "memory", verify=lambda: (trusted, "for the test"))
    return FramedComm(StreamPump(stream), local_address="memory://here", peer=peer, settings=CommSettings(**settings))


async def connected(address: str, client: CommSettings, server: CommSettings) -> tuple[BaseComm, BaseComm]:
    """Both ends of a connection over a transport, before the handshake."""
    scheme, location = parse_address(address)
    transport = get_transport(scheme)
    (listener,) = await transport.listen(location, server)
    try:
        ours = await transport.connect(parse_address(listener.contact_address)[1], client)
        theirs = await listener.accept()
    finally:
        await listener.aclose()
    assert isinstance(ours, BaseComm)
    assert isinstance(theirs, BaseComm)
    return ours, theirs


async def shake_hands(*comms: BaseComm) -> None:
    """As both sides do at the same time."""
    async with trio.open_nursery() as nursery:
        for comm in comms:
            nursery.start_soon(comm.handshake)


@asynccontextmanager
async def make_pair(kind: str, *, trusted: bool = True, capacity: int = 64 * 1024, **settings: Any) -> AsyncIterator[Pair]:
    """A pair of one kind: "stream" (any trio stream), "memory" (one that can also send without waiting), "tcp", "tls" or "inproc"."""
    streams = None
    client: BaseComm
    server: BaseComm
    if kind in ("stream", "memory"):
        streams = trio.testing.memory_stream_pair() if kind == "stream" else memory_stream_pair(capacity)
        client, server = (stream_comm(stream, trusted=trusted, **settings) for stream in streams)
    else:
        if kind == "tls" and "security" not in settings:
            settings["security"] = ours().security()
        address = {"tcp": "tcp://127.0.0.1:0", "tcp6": "tcp://[::1]:0", "tls": "tls://127.0.0.1:0", "inproc": "inproc://"}[kind]
        client, server = await connected(address, CommSettings(**settings), CommSettings(**settings))
    try:
        await shake_hands(client, server)
        yield Pair(client, server, kind, streams)
    finally:
        client.abort()
        server.abort()


@pytest.fixture(params=KINDS)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """A pair of every kind."""
    async with make_pair(request.param) as made:
        yield made


@pytest.fixture(params=[kind for kind in KINDS if kind != "inproc"])
async def framed(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """A pair of every kind that has bytes."""
    async with make_pair(request.param) as made:
        yield made


@pytest.fixture
def new_pair() -> Callable[..., Any]:
    """:func:`make_pair`, for pairs of a kind and with settings of the test's own."""
    return make_pair


@pytest.fixture
def over_stream() -> Callable[..., FramedComm]:
    """:func:`stream_comm`."""
    return stream_comm


@pytest.fixture
def two_ends() -> Callable[..., Awaitable[tuple[BaseComm, BaseComm]]]:
    """:func:`connected`."""
    return connected


@pytest.fixture
def handshakes() -> Callable[..., Awaitable[None]]:
    """:func:`shake_hands`."""
    return shake_hands
