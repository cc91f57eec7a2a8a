"""``tcp://``: comms over TCP on bare sockets."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Sequence
from functools import partial

import trio
from trio.lowlevel import checkpoint_if_cancelled, wait_writable

from ..abc import CommSettings, Listener, Peer, Transport
from ..errors import AddressError
from ..protocol._limits import Limits
from ._addressing import parse_host_port, unparse_host_port
from ._comm import FramedComm
from ._credentials import Name, Verdict, loopback_verdict
from ._hosts import get_ip, get_ipv6
from ._listener import BACKLOG, SocketListener
from ._pumps import SocketPump

__all__ = ["TCPTransport"]

# Tries to find one port that is free on all of a name's addresses (as many as Dask's listener makes).
_PORT_TRIES = 5
# What connect() says of a socket that doesn't block, the first time and later.
_UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK})
_DONE = frozenset({0, errno.EISCONN})
# An interface's number is a C unsigned int.
_LARGEST_ZONE = 2**32 - 1


class TCPTransport(Transport):
    """TCP over IPv4 and IPv6."""

    scheme = "tcp"
    host_port = True

    async def connect(self, location: str, settings: CommSettings) -> FramedComm:
        host, port = parse_host_port(location)
        await checkpoint_if_cancelled()
        return make_comm(await open_socket(host, port), settings)

    async def listen(self, location: str, settings: CommSettings) -> Sequence[Listener]:
        host, port = parse_host_port(location, 0)
        sockets = await bind(host, port)
        return [TCPListener(sock, settings) for sock in sockets]


async def open_socket(host: str, port: int) -> socket.socket:
    """One attempt to connect.  Cancellation: the socket is closed."""
    family = _family_of_literal(host)
    if family is None:
        # A name: trio's happy eyeballs find the address that works first.
        try:
            stream = await trio.open_tcp_stream(host, port)
        except UnicodeError as error:
            raise AddressError(f"{host!r} can't be the name of a host: {error}") from error
        sock = socket.socket(fileno=stream.socket.detach())
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # trio's streams set it; for messages that costs a quarter of the rate (performance document, section 3).  0: default.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 0)
        return sock
    # A literal address needs none of that, which costs four times the connect itself (measured: 221 against 49 µs).
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        target = (host, port) if family == socket.AF_INET else _scoped(host, port)
        code = sock.connect_ex(target)
        if code in _UNDER_WAY:
            # On this machine that took no time, and asking again costs less than a wait.
            code = sock.connect_ex(target)
        if code in _UNDER_WAY:
            await wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code not in _DONE:
            raise OSError(code, f"connecting to {unparse_host_port(host, port)}: {errno.errorcode.get(code, code)}")
    except BaseException:
        sock.close()
        raise
    return sock


def _family_of_literal(host: str) -> socket.AddressFamily | None:
    """AF_INET or AF_INET6 for a numeric address, None for a name."""
    for family, literal in ((socket.AF_INET, host), (socket.AF_INET6, host.partition("%")[0])):
        try:
            socket.inet_pton(family, literal)
        except (OSError, ValueError):  # ValueError: a character that no address has
            continue
        return family
    return None


def _scoped(host: str, port: int) -> tuple[str, int, int, int]:
    """An IPv6 literal with its zone resolved (``fe80::1%eth0``)."""
    name, _, zone = host.partition("%")
    if not zone:
        return (name, port, 0, 0)
    number = int(zone) if zone.isascii() and zone.isdecimal() else socket.if_nametoindex(zone)
    if number > _LARGEST_ZONE:
        raise AddressError(f"{host!r}: there is no interface {zone}")
    return (name, port, 0, number)


def make_comm(sock: socket.socket, settings: CommSettings) -> FramedComm:
    """Wrap a connected socket, which the comm then owns; if this fails the socket is closed."""
    try:
        local, remote = sock.getsockname(), sock.getpeername()
        if local == remote:
            # TCP may connect a socket to itself where nobody listens on a port that the system also gives to clients.
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on {socket_address(remote)}")
        set_options(sock, settings.limits)
        loopback = is_loopback(local[0]) and is_loopback(remote[0])
        peer = Peer(
            socket_address(remote),
            "loopback" if loopback else "tcp",
            verify=partial(_verdict, sock, loopback, settings.security.trust_loopback, (local, remote)),
        )
        return FramedComm(SocketPump(sock), local_address=socket_address(local), peer=peer, settings=settings)
    except BaseException:
        sock.close()
        raise


def _verdict(sock: socket.socket, loopback: bool, trust_loopback: bool, names: tuple[Name, Name] | None = None) -> Verdict:
    if not loopback:
        return False, "it is not on this machine's loopback interface, and tcp:// tells nothing about who it is"
    if not trust_loopback:
        return False, "Security(trust_loopback=False) is set"
    return loopback_verdict(sock, names)


def socket_address(sockname: Name, scheme: str = "tcp") -> str:
    """``tcp://host:port`` of what getsockname() returned."""
    return f"{scheme}://{unparse_host_port(sockname[0], sockname[1])}"


def is_loopback(host: str) -> bool:
    """Whether a literal address is on this machine's loopback interface; IPv4-mapped ones are unmapped first."""
    if host == "127.0.0.1":
        return True  # nearly always; what follows takes 7 µs
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def set_options(sock: socket.socket, limits: Limits) -> None:
    """The options of Dask's TCP comms (wire document, section 8), but for the user timeout.

    The latter kills a live peer that merely isn't reading; a server or client sets it towards stock peers only.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # distributed.comm.timeouts.tcp = 30 s: idle = T // 4 rounded up to fill T together with ten probes at (T - idle) // 10.
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 10)):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def bind(host: str, port: int) -> list[socket.socket]:
    """Bind and listen on every address of a host; "" is all interfaces.  All or none."""
    try:
        found = await trio.socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a label that is empty or too long for IDNA
        raise AddressError(f"the host {host!r} to listen on can't be resolved: {error}") from error
    # IPv4 first: where both are bound, its address is the one to hand out.
    addresses = sorted({(family, sockaddr) for family, _, _, _, sockaddr in found}, key=lambda item: item[0] != socket.AF_INET)
    if not addresses:
        raise AddressError(f"the host {host!r} has no address to listen on")
    for attempt in range(_PORT_TRIES):
        try:
            return _bind_all(addresses, port)
        except OSError as error:
            # Only a port that the system chose for the first address can be chosen again.
            if port or error.errno != errno.EADDRINUSE or attempt == _PORT_TRIES - 1:
                raise OSError(error.errno, f"listening on {unparse_host_port(host, port)}: {error.strerror}") from error
    raise AssertionError("unreachable")  # pragma: no cover


def _bind_all(addresses: Sequence[tuple[int, tuple[object, ...]]], port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        for family, sockaddr in addresses:
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT and len(addresses) > 1:
                    continue  # this family isn't built into the kernel; the others will do
                raise
            sockets.append(sock)
            sock.setblocking(False)
            if sys.platform != "win32":  # there it would let others take the port away
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            chosen = port or (sockets[0].getsockname()[1] if len(sockets) > 1 else 0)
            try:
                sock.bind((sockaddr[0], chosen, *sockaddr[2:]))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL and len(addresses) > 1:
                    sockets.pop().close()
                    continue
                raise
            sock.listen(BACKLOG)
        if not sockets:
            raise OSError(errno.EADDRNOTAVAIL, "none of the host's addresses is available here")
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


class TCPListener(SocketListener):
    """Accepts on one bound TCP socket, which it owns."""

    scheme = "tcp"

    def __init__(self, sock: socket.socket, settings: CommSettings) -> None:
        super().__init__(sock, settings)
        self._name = sock.getsockname()

    @property
    def listen_address(self) -> str:
        return socket_address(self._name, self.scheme)

    @property
    def contact_address(self) -> str:
        host, port = self._name[:2]
        if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
            host = get_ip() if self._socket.family == socket.AF_INET else get_ipv6()
        return socket_address((host, port), self.scheme)

    def _make_comm(self, sock: socket.socket) -> FramedComm:
        return make_comm(sock, self._settings)
