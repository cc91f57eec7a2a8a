"""``tls://``: comms over TLS, as Dask's (wire document, section 9), on bare sockets.

The same messages as over ``tcp://``.  Both sides show a certificate and verify the other's, always; see
:class:`~trio_dcore.Security`.
"""

from __future__ import annotations

import errno
import functools
import socket
import ssl
from collections.abc import Sequence

import trio

from ..abc import CommSettings, Listener, Peer, Transport
from ..errors import AddressError, CommClosedError
from ._addressing import parse_host_port
from ._comm import FramedComm
from ._tcp import TCPListener, bind, open_socket, set_options, socket_address
from ._tls_context import judge, tls_context
from ._tls_pump import TLSPump

__all__ = ["TLSComm", "TLSTransport"]


class TLSComm(FramedComm):
    """A comm over TLS.  Its peer is nobody until the handshake is done."""

    __slots__ = ()
    _pump: TLSPump

    async def handshake(self) -> None:
        # That of TLS stands in front of Dask's, within the same limits of time.
        try:
            await self._pump.handshake()
        except (trio.ClosedResourceError, CommClosedError):
            if self._closed:
                raise self._closed_error() from None  # it was closed here
            raise
        certificate = self._pump.certificate()
        verify = functools.partial(judge, self.settings.security, certificate)
        self._peer = Peer(self._peer.address, "tls", certificate=certificate, verify=verify)
        try:
            await super().handshake()
        except CommClosedError:
            failure = self._pump.last_words()
            if failure is None:
                raise
            raise failure from failure.__cause__


class TLSTransport(Transport):
    """TLS over TCP."""

    scheme = "tls"
    host_port = True
    encrypted = True

    async def connect(self, location: str, settings: CommSettings) -> TLSComm:
        host, port = parse_host_port(location)
        context = tls_context(settings.security, "connect")
        # Without a zone: it says something about this machine only.
        name = settings.security.extra_conn_args.get("server_hostname") or host.partition("%")[0]
        return make_comm(await open_socket(host, port), context, settings, server_hostname=name)

    async def listen(self, location: str, settings: CommSettings) -> Sequence[Listener]:
        host, port = parse_host_port(location, 0)
        context = tls_context(settings.security, "listen")
        return [TLSListener(sock, settings, context) for sock in await bind(host, port)]


class TLSListener(TCPListener):
    """Accepts on one bound socket, which it owns."""

    scheme = "tls"

    def __init__(self, sock: socket.socket, settings: CommSettings, context: ssl.SSLContext) -> None:
        super().__init__(sock, settings)
        self._context = context

    def _make_comm(self, sock: socket.socket) -> TLSComm:
        return make_comm(sock, self._context, self._settings, server_hostname=None)


def make_comm(sock: socket.socket, context: ssl.SSLContext, settings: CommSettings, *, server_hostname: str | None) -> TLSComm:
    """Wrap a connected socket, which the comm then owns; if this fails the socket is closed.

    Args:
        sock: the socket.
        context: of this side.
        settings: what the comm is made with.
        server_hostname: the server's name where this is the client; None makes it the server.
    """
    try:
        local, remote = sock.getsockname(), sock.getpeername()
        if local == remote:
            # TCP may connect a socket to itself where nobody listens on a port that the system also gives to clients.
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on {socket_address(remote, 'tls')}")
        set_options(sock, settings.limits)
        try:
            pump = TLSPump(sock, context, server_side=server_hostname is None, server_hostname=server_hostname)
        except (ValueError, TypeError) as error:  # TypeError: a NUL in it
            raise AddressError(f"{server_hostname!r} can't be the name of a server: {error}") from error
        peer = Peer(socket_address(remote, "tls"), "tls", verify=_nobody_yet)
        return TLSComm(pump, local_address=socket_address(local, "tls"), peer=peer, settings=settings)
    except BaseException:
        sock.close()
        raise


def _nobody_yet() -> tuple[bool, str]:
    return False, "it has not shown its certificate yet"
