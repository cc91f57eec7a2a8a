"""ManualPeer: speak the protocol by hand, rightly or wrongly."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import trio

from ..comm import parse_address, parse_host_port
from ..errors import CommClosedError
from ..protocol import Buffer, DecodeContext, Decoder, FrameParser, Limits, dumps, local_handshake, pack_prelude
from ._faults import reset_stream
from ._network import MemoryNetwork

__all__ = ["ManualPeer"]

# A test's peer takes whatever comes.
_NO_LIMITS = Limits(message=None, head=None, frames=None)


class ManualPeer:
    """A peer that says exactly what a test tells it to, over any trio stream.

    Nothing is sent or answered by itself, not even the handshake::

        peer = await ManualPeer.connect(address)
        await peer.handshake()
        await peer.send({"op": "add", "x": 1, "y": 2})
        assert await peer.receive() == 3

    Args:
        stream: where the bytes go; closed with the peer.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._parser = FrameParser(_NO_LIMITS)
        self._decoder = Decoder(DecodeContext(), extensions=True)

    @classmethod
    async def connect(
        cls, address: str, network: MemoryNetwork | None = None, *, ssl_context: ssl.SSLContext | None = None
    ) -> Self:
        """Connect to an address, without a handshake.

        Args:
            address: one of ``tcp://``, ``unix://``, ``tls://``, or ``memory://`` in a network.
            network: that network.
            ssl_context: of a client, for TLS, whose own handshake comes with the first bytes that are sent or received.  A
                ``tls://`` address without one is connected to in plain text.
        """
        scheme, location = parse_address(address)
        stream: trio.abc.Stream
        if scheme == "memory":
            if network is None:
                raise ValueError("a memory:// address needs the network that it is in")
            stream = await network.connect_stream(address)
        elif scheme == "unix":
            stream = await _open_unix_stream(location)
        else:
            host, port = parse_host_port(location)
            stream = await trio.open_tcp_stream(host, port)
        if ssl_context is not None:
            # As Dask's peers, who close without a close_notify.
            stream = trio.SSLStream(stream, ssl_context, https_compatible=True)
        return cls(stream)

    async def handshake(self, *, extension: bool = False, **changes: Any) -> dict[str, Any]:
        """Send a handshake and return the other side's.

        Args:
            extension: whether to speak the wire extension; False is a stock Dask peer.
            **changes: keys to set, underscores for hyphens; None as a value is sent, ``...`` removes the key.
        """
        message = local_handshake(compression=None, window=(16, 2**20))
        if not extension:
            del message["trio-dcore"]
        for name, value in changes.items():
            key = name.replace("_", "-")
            if value is ...:
                message.pop(key, None)
            else:
                message[key] = value
        await self.send(message)
        answer: dict[str, Any] = await self.receive()
        return answer

    async def send(self, message: Any) -> None:
        """Send one message."""
        await self.send_frames(dumps(message))

    async def send_frames(self, frames: Sequence[Buffer]) -> None:
        """Send frames as one message."""
        await self.send_bytes(self.encode_frames(frames))

    async def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        await self.stream.send_all(data)

    @staticmethod
    def encode(message: Any) -> bytes:
        """The bytes of one message."""
        return ManualPeer.encode_frames(dumps(message))

    @staticmethod
    def encode_frames(frames: Sequence[Buffer]) -> bytes:
        """The bytes of frames as one message."""
        return b"".join((pack_prelude(frames), *frames))

    async def receive_frames(self) -> list[Buffer]:
        """The frames of the next message.

        Raises:
            CommClosedError: the other side ended or reset the connection.
        """
        while (frames := self._parser.next_message()) is None:
            try:
                data = await self.stream.receive_some()
            except trio.BrokenResourceError as error:
                raise CommClosedError("the other side has reset the connection") from error
            if not data:
                where = "in the middle of a message" if self._parser.mid_message else "between messages"
                raise CommClosedError(f"the other side has ended the connection {where}")
            self._parser.feed(bytes(data))
        return frames

    async def receive(self) -> Any:
        """The next message."""
        return self._decoder.resolve(await self.receive_frames())

    async def expect_end(self) -> bool:
        """Wait for the end of the connection: True if it was orderly, False if it was reset.  A message is an AssertionError."""
        try:
            message = await self.receive()
        except CommClosedError as error:
            return not isinstance(error.__cause__, trio.BrokenResourceError)
        raise AssertionError(f"expected the end of the connection, got {message!r}")

    def reset(self) -> None:
        """End the connection as a process that is killed does on TCP: with an RST.  Not a checkpoint."""
        reset_stream(self.stream)

    async def aclose(self) -> None:
        """Close the connection."""
        await self.stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await trio.aclose_forcefully(self.stream)


async def _open_unix_stream(location: str) -> trio.SocketStream:
    # trio.open_unix_socket knows nothing of abstract names.
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    try:
        await sock.connect("\0" + location[1:] if location.startswith("@") else location)
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)
