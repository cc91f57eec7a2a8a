"""Which of this machine's addresses others should use.

Nothing here sends a packet or asks a name server: connecting a UDP socket only makes the kernel look up the route, and the
socket's own name is then the address that such packets would leave from.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import struct
import sys

from ..errors import AddressError

__all__ = ["concrete_host", "get_ip", "get_ipv6", "get_local_ip_towards", "interface_ip", "numeric_host"]

# Somewhere out there, for the default route: addresses reserved for documentation (RFC 5737, RFC 3849).  Port 9 is "discard".
_OUTSIDE_V4 = "192.0.2.1"
_OUTSIDE_V6 = "2001:db8::1"
_DISCARD = 9

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_IFNAMSIZ = 16  # linux/if.h


@functools.lru_cache(maxsize=256)
def numeric_host(host: str) -> str | None:
    """Return ``host`` in its shortest spelling if it is an IP address (``[0:0::1]`` as ``::1``), else None.  Not a checkpoint."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def get_local_ip_towards(host: str) -> str | None:
    """Return this machine's address on the route to ``host``, a numeric IP address; None without a route.  Not a checkpoint."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, _DISCARD))
            found = str(probe.getsockname()[0])
    except OSError:  # no route, or this machine has no such family: an answer, no failure
        return None
    return None if ipaddress.ip_address(found).is_unspecified else found


def get_ip() -> str:
    """Return the IPv4 address under which others reach this machine, ``127.0.0.1`` if it has no network.  Not a checkpoint."""
    return get_local_ip_towards(_OUTSIDE_V4) or "127.0.0.1"


def get_ipv6() -> str:
    """Return the IPv6 address under which others reach this machine, ``::1`` if it has none.  Not a checkpoint."""
    return get_local_ip_towards(_OUTSIDE_V6) or "::1"


def concrete_host(host: str) -> str:
    """Replace a host that means "every interface" by one that a peer can connect to; leave others alone.

    ``""`` and ``0.0.0.0`` become :func:`get_ip`, ``::`` becomes :func:`get_ipv6` (wire document, section 1: contact address).
    Not a checkpoint.
    """
    if not host:
        return get_ip()
    numeric = numeric_host(host)
    if numeric == "0.0.0.0":
        return get_ip()
    if numeric == "::":
        return get_ipv6()
    return host


def interface_ip(name: str) -> str:
    """Return the IPv4 address of a network interface, e.g. ``127.0.0.1`` for ``lo``.  Linux only; not a checkpoint.

    Raises:
        AddressError: there is no such interface, it has no IPv4 address, or this system can't be asked.
    """
    if sys.platform != "linux":
        raise AddressError(f"interface {name!r}: looking up an interface's address works on Linux only; give host= instead")
    import fcntl  # does not exist on Windows

    raw = name.encode(errors="surrogateescape")
    if raw and len(raw) < _IFNAMSIZ and b"\0" not in raw:
        request = struct.pack(f"{_IFNAMSIZ}s240x", raw)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # ENODEV or EADDRNOTAVAIL: said below, with the names that would do
                pass
            else:
                # struct ifreq: the name, then a sockaddr_in: family (2), port (2), address (4)
                return socket.inet_ntoa(answer[_IFNAMSIZ + 4 : _IFNAMSIZ + 8])
    known = ", ".join(interface for _index, interface in socket.if_nameindex())
    raise AddressError(f"interface {name!r} does not exist or has no IPv4 address; this machine has: {known}")
