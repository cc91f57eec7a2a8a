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

__all__ = ["MemoryNetwork", "memory_network"]

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
        self._listeners: dict[str, _MemoryListener] = {}
        self._numbers = itertools.count(1)

    async def connect_stream(self, address: str) -> MemoryStream:
        """A bare stream to a listener, for tests that speak bytes."""
        await trio.lowlevel.checkpoint()
        return self._connect(address.removeprefix("memory://"))

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


class _MemoryListener(Listener):
    def __init__(self, network: MemoryNetwork, location: str, settings: CommSettings) -> None:
        self._network = network
        self._location = location
        self._settings = settings
        self._waiting: deque[MemoryStream] = deque()
        self._wake = trio.lowlevel.ParkingLot()
        self._closed = False

    @property
    def listen_address(self) -> str:
        return f"memory://{self._location}"

    @property
    def contact_address(self) -> str:
        return self.listen_address

    def deliver(self, stream: MemoryStream) -> None:
        self._waiting.append(stream)
        self._wake.unpark()

    async def accept(self) -> Comm:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._waiting:
            if self._closed:
                raise trio.ClosedResourceError("this listener was closed")
            await self._wake.park()
        network = self._network
        client = f"memory://client-{next(network._numbers)}"
        return network._comm(self._waiting.popleft(), "server", self.listen_address, client, self._settings)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._network._listeners.pop(self._location, None)
        while self._waiting:
            self._waiting.popleft().reset()  # as the kernel does with its backlog
        self._wake.unpark_all()


_current: trio.lowlevel.RunVar[MemoryNetwork | None] = trio.lowlevel.RunVar("trio_dcore.memory_network", None)


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
        location = location or f"server-{next(network._numbers)}"
        if location in network._listeners:
            raise AddressError(f"memory://{location} is taken")
        listener = network._listeners[location] = _MemoryListener(network, location, settings)
        return [listener]


register_transport(_MemoryTransport(), replace=True)


@contextmanager
def memory_network(trusted: bool = True, *, capacity: int = 64 * 1024) -> Iterator[MemoryNetwork]:
    """Make ``memory://`` addresses work in this trio run.

    Everything but the sockets is real: framing, handshake, pool, server.  With pytest-trio's ``autojump_clock`` time is virtual, so
    timeouts can be asserted to the instant::

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
