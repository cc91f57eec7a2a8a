"""What a server says in the log when it begins to listen: where, to whom, and what they may do."""

from __future__ import annotations

import ipaddress
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .._security import Security
from ..abc import Listener
from ..comm import get_transport, parse_address, parse_host_port

if TYPE_CHECKING:
    from ._server import BaseServer

__all__ = ["announce"]

_log = logging.getLogger("trio_dcore.server")


def announce(server: BaseServer, listeners: Sequence[Listener]) -> None:
    """Write one INFO line, and one WARNING if whoever reaches the address may run code here."""
    addresses = [listener.listen_address for listener in listeners]
    security = server.settings.security
    scheme, _ = parse_address(addresses[0])
    _log.info(
        "%s listens on %s: %s; pickles are accepted from %s; ops%s: %s%s",
        server.name,
        ", ".join(addresses),
        _encryption(scheme),
        _trusted(addresses, security),
        "" if server.authorize is None else ", as far as authorize() allows them",
        _ops(server, server.handlers),
        f"; ops of streams: {_ops(server, server.stream_handlers)}" if server.stream_handlers else "",
    )
    if security.pickle == "always" and any(_reaches(address) != "this machine" for address in addresses):
        _log.warning(
            "%s unpickles what anyone sends to %s, and to unpickle is to run the sender's code: Security(pickle='always') is for "
            "closed networks only",
            server.name,
            ", ".join(addresses),
        )


def _ops(server: BaseServer, handlers: Iterable[str]) -> str:
    return ", ".join(sorted(op for op in handlers if op not in server.blocked_handlers)) or "none"


def _encryption(scheme: str) -> str:
    if scheme == "tls":
        return "encrypted"
    return "on this machine only" if get_transport(scheme).encrypted else "not encrypted"


def _reaches(address: str) -> str:
    """Who can reach an address: "this machine", "others" or, with a wildcard, "both"."""
    scheme, location = parse_address(address)
    if not get_transport(scheme).host_port:
        return "this machine"
    host, _ = parse_host_port(location, 0)
    try:
        numeric = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "others" if host else "both"
    if isinstance(numeric, ipaddress.IPv6Address) and numeric.ipv4_mapped is not None:
        numeric = numeric.ipv4_mapped
    if numeric.is_unspecified:
        return "both"
    return "this machine" if numeric.is_loopback else "others"


def _trusted(addresses: Sequence[str], security: Security) -> str:
    """Whose pickles are accepted at the addresses of one scheme (security document, section 1)."""
    if security.pickle != "trusted":
        return "nobody" if security.pickle == "never" else "everybody"
    scheme, _ = parse_address(addresses[0])
    if scheme == "inproc":
        return "this process"
    if scheme == "unix":
        return _processes_of_ours()
    if scheme == "tcp":
        # Elsewhere the system doesn't tell whose connection it is.
        told = sys.platform == "linux" and security.trust_loopback and any(_reaches(each) != "others" for each in addresses)
        return _processes_of_ours() if told else "nobody"
    if scheme == "tls":
        if security.trusted_subjects == ():
            return "nobody"
        authority = str(security.tls_ca_file)
        where = "the CA that was given as text" if "\n" in authority else f"the CA in {authority}"
        names = security.trusted_subjects
        which = "" if names is None else f" and a name like {' or '.join(names)}"
        return f"whoever has a certificate of {where}{which}"
    return f"whom {scheme}:// vouches for"


def _processes_of_ours() -> str:
    return f"local processes of uid {os.geteuid()}" if hasattr(os, "geteuid") else "local processes of this user"
