"""The other side of a TLS connection, by the standard library alone, whose every byte a test has in its hands."""

from __future__ import annotations

import socket
import ssl

import trio

__all__ = ["RawTLS"]


class RawTLS:
    """TLS on one end of a connection.

    Args:
        sock: connected; it belongs to this from now on.
        context: of the standard library.
        server_side: whether it is the server's.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        sock.setblocking(False)
        self.socket = trio.socket.from_stdlib_socket(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.engine = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)

    @classmethod
    async def connect(cls, address: str, context: ssl.SSLContext) -> RawTLS:
        """A client of a ``tls://`` address."""
        host, _, port = address.removeprefix("tls://").rpartition(":")
        sock = trio.socket.socket()
        await sock.connect((host, int(port)))
        return cls(socket.socket(fileno=sock.detach()), context, server_side=False)

    def ciphertext(self) -> bytes:
        """What is to be sent."""
        return self._outgoing.read()

    async def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        while data:
            data = data[await self.socket.send(data) :]

    async def flush(self) -> None:
        await self.send_bytes(self.ciphertext())

    async def more(self) -> bool:
        """Wait for some bytes; False at the end of the connection."""
        data = await self.socket.recv(2**16)
        if data:
            self._incoming.write(data)
        return bool(data)

    async def handshake(self) -> None:
        while True:
            try:
                self.engine.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self.flush()
                assert await self.more()
            except ssl.SSLError:
                await self.flush()
                raise
        await self.flush()

    def encrypt(self, data: bytes) -> bytes:
        """What a message is on the wire."""
        self.engine.write(data)
        return self.ciphertext()

    async def send(self, data: bytes) -> None:
        await self.send_bytes(self.encrypt(data))

    async def receive(self) -> bytes:
        """Some plain text; b"" if TLS was ended as it should be.  EOFError: the connection was."""
        while True:
            try:
                return self.engine.read(2**16)
            except ssl.SSLWantReadError:
                if not await self.more():
                    raise EOFError from None

    async def receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await self.receive()
            assert more
            data += more
        assert len(data) == size
        return data

    def close(self) -> None:
        self.socket.close()
