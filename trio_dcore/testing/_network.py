"""``memory://``: the whole stack over in-memory streams, so that trio's autojump clock works."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import trio

from ..abc import Comm, CommSettings, Listener, Peer, Transport
from ..comm import FramedComm, StreamPump, register_transport
from ..errors import AddressError, LocalProtocolError
from ._memory import MemoryStream, memory_stream_pair

__all__ = ["MemoryNetwork", "MemoryStreamListener", "current_network", "memory_network"]

Side = Literal["client", "server"]
Wrap = Callable[[trio.abc.Stream, Side], trio.abc.Stream]


class MemoryNetwork:
    """What ``memory://`` addresses reach in this trio run, while the block of :func:`memory_network` lasts.

    Attributes:
        trusted: whether peers are trusted.
        connections: (client end, server end) of every connection made so far, bare: to cut or reset them.
        wrap: applied to each new end, with "client" or "server": return the stream that the comm is to use, for example a
            :class:`FaultStream` round it.
    """

    def __init__(self, *, trusted: bool, capacity: int) -> None:
        self.trusted = trusted
        self.capacity = capacity
        self.connections: list[tuple[MemoryStream, MemoryStream]] = []
        self.wrap: Wrap | None = None
        self._listeners: dict[str, MemoryStreamListener] = {}
        self._numbers = itertools.count(1)

    def open_ends(self) -> list[tuple[int, Side, MemoryStream]]:
        """The ends of connections that were not closed: number of the connection, from 1, side and stream."""
        sides: tuple[Side, Side] = ("client", "server")
        return [
            (number, side, stream)
            for number, pair in enumerate(self.connections, 1)
            for side, stream in zip(sides, pair, strict=True)
            if not stream.closed
        ]

    async def connect_stream(self, address: str) -> MemoryStream:
        """A bare stream to a listener, for tests that speak bytes."""
        await trio.lowlevel.checkpoint()
        return self._connect(address.removeprefix("memory://"))

    async def listen_streams(self, address: str = "memory://") -> MemoryStreamListener:
        """Accept bare streams at an address, for tests that are a server by hand; ``listener.address`` is the one it got."""
        await trio.lowlevel.checkpoint()
        return self._listen(address.removeprefix("memory://"))

    def _listen(self, location: str) -> MemoryStreamListener:
        location = location or f"server-{next(self._numbers)}"
        if location in self._listeners:
            raise AddressError(f"memory://{location} is taken")
        listener = self._listeners[location] = MemoryStreamListener(self, location)
        return listener

    def _connect(self, location: str) -> MemoryStream:
        listener = self._listeners.get(location)
        if listener is None:
            raise ConnectionRefusedError(f"nobody listens on memory://{location}")
        pair = memory_stream_pair(self.capacity)
        self.connections.append(pair)
        listener.deliver(pair[1])
        return pair[0]

    def _comm(self, stream: trio.abc.Stream, side: Side, local: str, remote: str, settings: CommSettings) -> FramedComm:
        if self.wrap is not None:
            stream = self.wrap(stream, side)
        peer = Peer(remote, "memory", verify=lambda: (self.trusted, "memory_network(trusted=...) says so"))
        return FramedComm(StreamPump(stream), local_address=local, peer=peer, settings=settings)


class MemoryStreamListener(trio.abc.Listener[MemoryStream]):
    """Accepts bare streams at a ``memory://`` address; made by :meth:`MemoryNetwork.listen_streams`."""

    def __init__(self, network: MemoryNetwork, location: str) -> None:
        self._network = network
        self._location = location
        self._waiting: deque[MemoryStream] = deque()
        self._wake = trio.lowlevel.ParkingLot()
        self._closed = False

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"memory://{self._location}"

    def deliver(self, stream: MemoryStream) -> None:
        """A connection was made."""
        self._waiting.append(stream)
        self._wake.unpark()

    async def accept(self) -> MemoryStream:
        """Wait for a connection.  Cancellation: none is lost."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._waiting:
            if self._closed:
                raise trio.ClosedResourceError("this listener was closed")
            await self._wake.park()
        stream = self._waiting.popleft()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return stream

    def close(self) -> None:
        """Stop listening; connections that nobody accepted are reset, as the kernel does with its backlog.  Not a checkpoint."""
        if self._closed:
            return
        self._closed = True
        self._network._listeners.pop(self._location, None)
        while self._waiting:
            stream = self._waiting.popleft()
            stream.reset()
            stream.close()
        self._wake.unpark_all()

    async def aclose(self) -> None:
        """Stop listening, as :meth:`close`."""
        self.close()
        await trio.lowlevel.checkpoint()


class _MemoryListener(Listener):
    """Makes comms of what a MemoryStreamListener accepts."""

    def __init__(self, network: MemoryNetwork, streams: MemoryStreamListener, settings: CommSettings) -> None:
        self._network = network
        self._streams = streams
        self._settings = settings

    @property
    def listen_address(self) -> str:
        return self._streams.address

    @property
    def contact_address(self) -> str:
        return self._streams.address

    async def accept(self) -> Comm:
        stream = await self._streams.accept()
        client = f"memory://client-{next(self._network._numbers)}"
        return self._network._comm(stream, "server", self._streams.address, client, self._settings)

    def close(self) -> None:
        self._streams.close()


_current: trio.lowlevel.RunVar[MemoryNetwork | None] = trio.lowlevel.RunVar("trio_dcore.memory_network", None)


def current_network() -> MemoryNetwork | None:
    """The one of this trio run, if any."""
    try:
        return _current.get()
    except RuntimeError:
        return None  # trio doesn't run here


class _MemoryTransport(Transport):
    scheme = "memory"
    encrypted = True  # nothing leaves the process

    def _network(self) -> MemoryNetwork:
        network = _current.get()
        if network is None:
            raise LocalProtocolError("memory:// addresses work inside `with memory_network():`")
        return network

    async def connect(self, location: str, settings: CommSettings) -> Comm:
        network = self._network()
        await trio.lowlevel.checkpoint()
        stream = network._connect(location)
        local = f"memory://client-{next(network._numbers)}"
        return network._comm(stream, "client", local, f"memory://{location}", settings)

    async def listen(self, location: str, settings: CommSettings) -> list[Listener]:
        network = self._network()
        await trio.lowlevel.checkpoint()
        return [_MemoryListener(network, network._listen(location), settings)]


register_transport(_MemoryTransport(), replace=True)


@contextmanager
def memory_network(trusted: bool = True, *, capacity: int = 64 * 1024) -> Iterator[MemoryNetwork]:
    """Make ``memory://`` addresses work in this trio run.

    Everything but the sockets is real: framing, handshake, pool, server.  With pytest-trio's ``autojump_clock`` time is virtual,
    so timeouts can be asserted to the instant::

        with memory_network():
            async with Server({"add": add}) as server:
                address = await server.listen("memory://")
                async with rpc(address) as remote:
                    assert await remote.add(x=1, y=2) == 3

    Args:
        trusted: False makes every peer a stranger, whose pickles are refused.
        capacity: bytes that may be on their way in each direction before a writer waits.
    """
    if _current.get() is not None:
        raise LocalProtocolError("there is a memory_network() in this trio run already")
    network = MemoryNetwork(trusted=trusted, capacity=capacity)
    _current.set(network)
    try:
        yield network
    finally:
        _current.set(None)
