"""Which transport serves which scheme."""

from __future__ import annotations

from ..abc import Transport
from ..errors import AddressError, LocalProtocolError
from ._inproc import InprocTransport
from ._tcp import TCPTransport

__all__ = ["get_transport", "register_transport"]

_transports: dict[str, Transport] = {}


def register_transport(transport: Transport, *, replace: bool = False) -> None:
    """Make ``transport.scheme://`` addresses usable in this process.

    Args:
        transport: serves connects and listens of its scheme.
        replace: whether one that is registered for the scheme already may be replaced.

    Raises:
        LocalProtocolError: the scheme is taken and ``replace`` is False.
    """
    if transport.scheme in _transports and not replace:
        raise LocalProtocolError(f"the scheme {transport.scheme!r} is taken; pass replace=True to replace it")
    _transports[transport.scheme] = transport


def get_transport(scheme: str) -> Transport:
    """The transport for a scheme; AddressError names the known ones where there is none."""
    transport = _transports.get(scheme)
    if transport is None:
        known = ", ".join(f"{name}://" for name in sorted(_transports))
        raise AddressError(f"unknown scheme {scheme!r}; known are {known}")
    return transport


register_transport(TCPTransport())
register_transport(InprocTransport())
