"""Which transport serves which scheme.

Nothing of this layer is imported here, so that everything in it may ask: addresses are read by what is registered.
"""

from __future__ import annotations

from ..abc import Transport
from ..errors import AddressError, LocalProtocolError

__all__ = ["find_transport", "get_transport", "register_transport", "registered_schemes"]

_transports: dict[str, Transport] = {}


def register_transport(transport: Transport, *, replace: bool = False) -> None:
    """Make ``transport.scheme://`` addresses usable in this process: in ``connect``, ``rpc``, pools and ``Server.listen``.

    Args:
        transport: serves connects and listens of its scheme.
        replace: whether one that is registered for the scheme already may be replaced.

    Raises:
        LocalProtocolError: the scheme is taken and ``replace`` is False, or can't stand before ``://``.
        TypeError: ``transport`` is no :class:`~trio_dcore.abc.Transport`; a class of them, perhaps.
    """
    if not isinstance(transport, Transport):
        raise TypeError(f"register_transport() takes an instance of trio_dcore.abc.Transport, not {transport!r}")
    scheme = transport.scheme
    if not isinstance(scheme, str) or not scheme or "://" in scheme or not scheme.isprintable() or " " in scheme:
        raise LocalProtocolError(f"{scheme!r} can't be the scheme of an address; use a short name such as 'tcp'")
    if scheme in _transports and not replace:
        raise LocalProtocolError(f"the scheme {scheme!r} is taken; pass replace=True to replace it")
    _transports[scheme] = transport


def find_transport(scheme: str) -> Transport | None:
    """The transport for a scheme, or None where there is none."""
    return _transports.get(scheme)


def get_transport(scheme: str) -> Transport:
    """The transport for a scheme; AddressError names the known ones where there is none."""
    transport = _transports.get(scheme)
    if transport is None:
        known = ", ".join(f"{name}://" for name in sorted(_transports))
        raise AddressError(f"unknown scheme {scheme!r}; known are {known}")
    return transport


def registered_schemes() -> tuple[str, ...]:
    """The schemes that have a transport, in the order in which they got it."""
    return tuple(_transports)
