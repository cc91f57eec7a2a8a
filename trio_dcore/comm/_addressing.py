"""Addresses: taking them apart, putting them together, and the many forms in which people write them.

An address is ``scheme://location``, as in Dask (wire document, section 1).  Location is ``host:port`` for ``tcp`` and ``tls``,
a path for ``unix`` and a free name for ``inproc``.  Peers are told apart by comparing addresses as text, so what is used as a key
goes through :func:`coerce_to_address` first.

Everything here is a plain function that does no I/O, but for :func:`resolve_address` and :func:`get_local_address_for`, which may
ask a name server.  Text that is no address is an :class:`~trio_dcore.AddressError` naming it; a value of the wrong type is a
TypeError.
"""

from __future__ import annotations

import functools
from typing import Protocol

import trio

from ..errors import AddressError
from ._hosts import get_ip, get_local_ip_towards, interface_ip, numeric_host
from ._inproc import new_location
from ._registry import find_transport, registered_schemes

__all__ = [
    "DEFAULT_SCHEME",
    "AddressLike",
    "address_from_user_args",
    "coerce_to_address",
    "get_address_host",
    "get_address_host_port",
    "get_local_address_for",
    "listen_address",
    "new_inproc_address",
    "normalize_address",
    "parse_address",
    "parse_host_port",
    "resolve_address",
    "unparse_address",
    "unparse_host_port",
    "uri_from_host_port",
]

#: What an address without a scheme is taken for (``distributed.comm.default-scheme``).
DEFAULT_SCHEME = "tcp"

#: The forms of an address to call: ``"host:port"``, ``(host, port)`` or an address; the port of a pair may be text.
AddressLike = str | tuple[str, int | str] | list[str | int]

# The project's own schemes are read also where their transport isn't there; others by what their transport says.
_HOST_PORT_SCHEMES = frozenset({"tcp", "tls"})
_SCHEMES = ("tcp", "tls", "unix", "inproc")


class _HasRequireEncryption(Protocol):
    @property
    def require_encryption(self) -> bool: ...


def parse_address(address: str, strict: bool = False) -> tuple[str, str]:
    """Split an address at its last ``://`` into scheme and location.

    >>> parse_address("tls://10.0.0.5:8786")
    ('tls', '10.0.0.5:8786')
    >>> parse_address("10.0.0.5:8786")
    ('tcp', '10.0.0.5:8786')

    Args:
        address: the address; the location may be empty, and is not looked into.
        strict: don't assume ``tcp`` where no scheme stands.

    Raises:
        AddressError: ``strict``, and it has no scheme.
        TypeError: ``address`` is no str.
    """
    if not isinstance(address, str):
        raise TypeError(f"an address is a str such as 'tcp://127.0.0.1:8786', not {address!r}")
    scheme, separator, location = address.rpartition("://")
    if separator:
        return scheme, location
    if strict:
        raise AddressError(f"address {address!r} has no scheme; write for example 'tcp://{address or '127.0.0.1:8786'}'")
    return DEFAULT_SCHEME, location


def unparse_address(scheme: str, location: str) -> str:
    """Join scheme and location: the opposite of :func:`parse_address`.

    >>> unparse_address("tcp", "127.0.0.1:8786")
    'tcp://127.0.0.1:8786'
    """
    return f"{scheme}://{location}"


def normalize_address(address: str) -> str:
    """Put the default scheme before an address that has none.

    >>> normalize_address("[::1]:8786")
    'tcp://[::1]:8786'
    """
    return unparse_address(*parse_address(address))


def parse_host_port(address: str | tuple[str, int | str], default_port: int | str | None = None) -> tuple[str, int]:
    """Split ``host:port``, ``[v6]:port``, ``host`` or ``[v6]``, with or without a scheme before it.

    >>> parse_host_port("tcp://[::1]:8786")
    ('::1', 8786)
    >>> parse_host_port("example.org", 80)
    ('example.org', 80)
    >>> parse_host_port(":8786")
    ('', 8786)

    Args:
        address: the text, or a (host, port) pair, which is only checked.
        default_port: the port where none stands; None means that one must stand.

    Raises:
        AddressError: a bare IPv6 address, no port, a port that is no number up to 65535, or a host that can't be one.
        TypeError: neither a str nor a pair.
    """
    if isinstance(address, str):
        return _parse_host_port(address, default_port)
    host, port = _checked_pair(address)
    return _checked_host(host, address), _checked_port(port, address)


def unparse_host_port(host: str, port: int | str | None = None) -> str:
    """Join host and port, with brackets round an IPv6 address: the opposite of :func:`parse_host_port`.

    >>> unparse_host_port("::1", 8786)
    '[::1]:8786'
    >>> unparse_host_port("127.0.0.1")
    '127.0.0.1'
    """
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return host if port is None else f"{host}:{port}"


def get_address_host_port(address: str, strict: bool = False) -> tuple[str, int]:
    """Return host and port of an address.

    >>> get_address_host_port("tls://[::1]:8786")
    ('::1', 8786)

    Raises:
        AddressError: its scheme knows no host and port, or they are malformed; ``strict``, and it has no scheme.
    """
    scheme, location = parse_address(address, strict)
    if _has_host_port(scheme):
        return parse_host_port(location)
    if _is_known(scheme):
        raise AddressError(f"address {address!r} has no host and port: it is {scheme}://, not one of tcp:// and tls://")
    raise _unknown_scheme(scheme, address)


def get_address_host(address: str) -> str:
    """Return the host on which an address lives: for ``unix`` and a bare ``inproc`` name the IP address of this machine.

    >>> get_address_host("tcp://10.0.0.5:8786")
    '10.0.0.5'
    >>> get_address_host("inproc://10.0.0.5/4711/1")
    '10.0.0.5'

    Raises:
        AddressError: malformed, of an unknown scheme, or of a registered one that knows no hosts.
    """
    scheme, location = parse_address(address)
    if _has_host_port(scheme):
        return parse_host_port(location)[0]
    if scheme == "inproc":
        # Dask's form is ip/pid/number; ours may be any name, and is always in this very process.
        return numeric_host(location.partition("/")[0]) or get_ip()
    if scheme == "unix":
        return get_ip()
    if _is_known(scheme):
        raise AddressError(f"address {address!r} has no host: {scheme}:// locations are not host:port")
    raise _unknown_scheme(scheme, address)


async def resolve_address(address: str) -> str:
    """Replace a host name in an address by its IP address, IPv4 before IPv6; an IP address gets its shortest spelling.

    ``await resolve_address("tcp://localhost:8786")`` is ``"tcp://127.0.0.1:8786"``.  Addresses without a host are left alone.

    Cancellation: nothing is left behind but, at worst, a worker thread that waits for the name server's answer and drops it.

    Raises:
        AddressError: malformed, or the name is unknown; ``__cause__`` then is the resolver's error.
    """
    scheme, location = parse_address(address)
    if not _is_known(scheme):
        raise _unknown_scheme(scheme, address)
    if not _has_host_port(scheme):
        await trio.lowlevel.checkpoint()
        return address
    host, port = parse_host_port(location)
    return unparse_address(scheme, unparse_host_port(await _resolve_host(host, address), port))


async def get_local_address_for(address: str) -> str:
    """Return an address to listen on, without a port, that the machine at ``address`` can reach.

    ``await get_local_address_for("tcp://127.0.0.1:8786")`` is ``"tcp://127.0.0.1"``; for ``inproc`` it is a new inproc address.

    Cancellation: as for :func:`resolve_address`.

    Raises:
        AddressError: malformed, an unknown name, no route to it, or ``unix``, where a path can't be thought up.
    """
    scheme, location = parse_address(address)
    if scheme == "inproc":
        await trio.lowlevel.checkpoint()
        return new_inproc_address()
    if not _has_host_port(scheme):
        if _is_known(scheme):
            raise AddressError(f"address {address!r}: which local path to use can't be told from it; choose one")
        raise _unknown_scheme(scheme, address)
    host = await _resolve_host(parse_host_port(location)[0], address)
    local = get_local_ip_towards(host)
    if local is None:
        raise AddressError(f"address {address!r}: this machine has no route to {host}")
    return unparse_address(scheme, unparse_host_port(local))


def new_inproc_address() -> str:
    """Return an ``inproc://`` address that this process has not used yet, in Dask's form ``inproc://ip/pid/number``."""
    return f"inproc://{new_location(get_ip())}"


def coerce_to_address(address: AddressLike) -> str:
    """Make the one spelling of an address to call from ``"host:port"``, ``(host, port)`` or an address.

    >>> coerce_to_address(("127.0.0.1", 8786)), coerce_to_address("127.0.0.1:8786")
    ('tcp://127.0.0.1:8786', 'tcp://127.0.0.1:8786')

    Names are not resolved: ``localhost`` and ``127.0.0.1`` stay two addresses, as in Dask; apply :func:`resolve_address` where
    that matters.

    Raises:
        AddressError: malformed, without a host or a port, or of an unknown scheme.
        TypeError: neither a str nor a pair.
    """
    if isinstance(address, (tuple, list)):
        host, port = parse_host_port(_checked_pair(address))
        scheme = DEFAULT_SCHEME
    else:
        scheme, location = parse_address(address)
        if not _has_host_port(scheme):
            if not _is_known(scheme):
                raise _unknown_scheme(scheme, address)
            return address
        host, port = parse_host_port(location)
    if not host:
        raise AddressError(f"address {address!r} names no host to connect to; write for example '127.0.0.1:{port}'")
    return unparse_address(scheme, unparse_host_port(numeric_host(host) or host, port))


def listen_address(
    where: int | str | tuple[str, int | str] | list[str | int] | None = None,
    *,
    default_host: str = "",
    default_port: int = 0,
    default_scheme: str = DEFAULT_SCHEME,
) -> str:
    """Make an address to listen on from any of the forms that ``Server.listen`` takes, which are Dask's.

    >>> listen_address(8786), listen_address("127.0.0.1"), listen_address(("::1", 0))
    ('tcp://:8786', 'tcp://127.0.0.1:0', 'tcp://[::1]:0')

    Args:
        where: a port, ``(host, port)``, ``"host"``, ``"host:port"``, ``":port"``, an address, or None for the defaults.
        default_host: the host where none is given; ``""`` is every interface.
        default_port: the port where none is given; 0 lets the system choose.
        default_scheme: the scheme where none is given; ``"tls"`` for a server with certificates.

    Returns:
        An address with a scheme and, for tcp and tls, a port.  Its host may be empty or a wildcard.

    Raises:
        AddressError: malformed, or of an unknown scheme.
        TypeError: none of these forms.
    """
    if where is None:
        return unparse_address(default_scheme, unparse_host_port(default_host, _checked_port(default_port, default_port)))
    if isinstance(where, int) and not isinstance(where, bool):
        return unparse_address(default_scheme, unparse_host_port(default_host, _checked_port(where, where)))
    if isinstance(where, (tuple, list)):
        return unparse_address(default_scheme, unparse_host_port(*parse_host_port(_checked_pair(where))))
    if not isinstance(where, str):
        raise TypeError(f"can't listen on {where!r}: give a port, (host, port), 'host:port' or an address")
    scheme, location = parse_address(where) if "://" in where else (default_scheme, where)
    if not _has_host_port(scheme):
        if not _is_known(scheme):
            raise _unknown_scheme(scheme, where)
        return unparse_address(scheme, location)
    if location.isdecimal():
        # As a host this is an IPv4 address in a notation hardly anyone knows: listening there is never what was meant.
        raise AddressError(f"can't listen on {where!r}: for a port alone write {location} as a number, or ':{location}'")
    if not location:
        return unparse_address(scheme, unparse_host_port(default_host, default_port))
    return unparse_address(scheme, unparse_host_port(*parse_host_port(location, default_port)))


def uri_from_host_port(host: str | None, port: int | str | None, default_port: int) -> str:
    """Make an address from the ``--host`` and ``--port`` options of a program.

    >>> uri_from_host_port("tls://10.0.0.5", None, 8786)
    'tls://10.0.0.5:8786'

    Raises:
        AddressError: malformed, or the port is given in both and differs.
    """
    scheme, location = parse_address(host or "")
    fallback = default_port if port is None else _checked_port(port, port)
    found_host, found_port = parse_host_port(location, fallback) if location else ("", fallback)
    # 0 means "any", so it contradicts nothing.
    if port is not None and found_port != 0 and fallback != 0 and found_port != fallback:
        raise AddressError(f"port number given twice: host {host!r} and port {port!r}")
    return unparse_address(scheme, unparse_host_port(found_host, found_port))


def address_from_user_args(
    host: str | None = None,
    port: int | str | None = None,
    interface: str | None = None,
    protocol: str | None = None,
    peer: str | None = None,
    security: _HasRequireEncryption | None = None,
    default_port: int = 0,
) -> str:
    """Make an address to listen on from the options that Dask's programs have.

    >>> address_from_user_args(host="10.0.0.5", protocol="tls", default_port=8786)
    'tls://10.0.0.5:8786'

    Args:
        host: host, ``host:port`` or an address; one that has no host and port, such as ``unix:///run/my.sock``, stands alone.
        port: port, a number or its digits.
        interface: network interface whose IPv4 address to use in place of a host (Linux).
        protocol: scheme, with or without ``://``.
        peer: accepted because Dask has it; nothing depends on it, there or here.
        security: if it requires encryption and no protocol is given, that is ``tls``.
        default_port: the port where none is given.

    Returns:
        The address; ``""``, which stands for the listener's defaults, if nothing was given.

    Raises:
        AddressError: malformed, or the arguments contradict each other.
    """
    if protocol:
        protocol = protocol.removesuffix("://")
    if host and "://" in host:
        scheme = parse_address(host)[0]
        if _is_known(scheme) and not _has_host_port(scheme):
            if port is not None or interface or protocol not in (None, "", scheme):
                raise AddressError(f"{host!r} goes with neither port nor interface nor another protocol")
            return host
    if security is not None and security.require_encryption and not protocol:
        protocol = "tls"
    if protocol == "inproc":
        if host or port or interface:
            raise AddressError("protocol 'inproc' goes with neither host nor port nor interface")
        return "inproc://"
    if interface:
        if host:
            raise AddressError(f"give interface {interface!r} or host {host!r}, not both")
        host = interface_ip(interface)
    if not host and port is None:
        return f"{protocol}://" if protocol else ""
    address = uri_from_host_port(host, port, default_port)
    if not protocol:
        return address
    return unparse_address(protocol, parse_address(address)[1])


def _split_host_port(location: str, whole: str) -> tuple[str, str | None]:
    if location.startswith("["):
        host, bracket, tail = location[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise AddressError(f"invalid address {whole!r}: IPv6 addresses are written like [::1]:8786")
        if ":" not in host or numeric_host(host) is None:
            raise AddressError(f"invalid address {whole!r}: {host!r} is no IPv6 address")
        return host, tail[1:] if tail else None
    host, colon, port = location.rpartition(":")
    if not colon:
        return location, None
    if ":" in host:
        raise AddressError(f"invalid address {whole!r}: IPv6 addresses need brackets, like [::1]:8786")
    return host, port


@functools.lru_cache(maxsize=256, typed=True)
def _parse_host_port(address: str, default_port: int | str | None) -> tuple[str, int]:
    """:func:`parse_host_port` for a text: who connects often does so to few addresses, and asks more than once each time."""
    host, port = _split_host_port(parse_address(address)[1], address)
    found: int | str | None = port
    if found is None:
        found = default_port
    if found is None:
        raise AddressError(f"missing port number in address {address!r}")
    return _checked_host(host, address), _checked_port(found, address)


def _checked_pair(pair: object) -> tuple[str, int | str]:
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        host, port = pair
        if isinstance(host, str) and isinstance(port, (int, str)):
            return host.removeprefix("[").removesuffix("]") if ":" in host else host, port
    raise TypeError(f"expected an address, 'host:port' or (host, port), not {pair!r}")


def _checked_host(host: str, whole: object) -> str:
    # Whatever else stands in a name is for the resolver to refuse; these would only make its error hard to understand.
    if not host.isprintable() or any(c in " /@[]" for c in host) or (":" in host and numeric_host(host) is None):
        raise AddressError(f"invalid address {whole!r}: {host!r} is no host")
    return host


def _checked_port(port: int | str, whole: object) -> int:
    if isinstance(port, str):
        # int() would also take "+1", " 1", "1_0" and digits of other scripts; and no port has more than five digits.
        if not (port.isascii() and port.isdecimal() and len(port.lstrip("0")) <= 5):
            raise AddressError(f"invalid address {whole!r}: {port!r} is no port number")
        port = int(port[-5:])
    if isinstance(port, bool) or not 0 <= port <= 65535:
        raise AddressError(f"invalid address {whole!r}: {port!r} is no port number (0 to 65535)")
    return port


def _has_host_port(scheme: str) -> bool:
    if scheme in _HOST_PORT_SCHEMES:
        return True
    transport = find_transport(scheme)
    return transport is not None and transport.host_port


def _is_known(scheme: str) -> bool:
    return scheme in _SCHEMES or find_transport(scheme) is not None


def _unknown_scheme(scheme: str, address: str) -> AddressError:
    known = ", ".join(f"{name}://" for name in dict.fromkeys((*_SCHEMES, *registered_schemes())))
    return AddressError(f"address {address!r}: unknown scheme {scheme!r}; known are {known}")


async def _resolve_host(host: str, address: str) -> str:
    numeric = numeric_host(host)
    if numeric is not None:
        await trio.lowlevel.checkpoint()
        return numeric
    try:
        answers = await trio.socket.getaddrinfo(host, None, type=trio.socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:  # UnicodeError: a label that is empty or too long for IDNA
        raise AddressError(f"address {address!r}: the host name {host!r} can't be resolved: {exc}") from exc
    # IPv4 first, as Dask: half-configured IPv6 is common.
    answers.sort(key=lambda answer: answer[0] != trio.socket.AF_INET)
    return str(answers[0][4][0])
