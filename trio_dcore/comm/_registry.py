"""Which transport serves which scheme.

Nothing of this layer is imported here, so that everything in it may ask: addresses are read by what is registered.
"""

from __future__ import annotations

from ..abc import Transport
from ..errors import AddressError, LocalProtocolError

__all__ = ["ENTRY_POINTS", "find_transport", "get_transport", "register_transport", "registered_schemes"]

#: The group of entry points by which installed packages bring schemes: its names are schemes, what they lead to is called without
#: arguments for the transport (as ``distributed.comm.backends`` has it).
ENTRY_POINTS = "trio_dcore.transports"

_transports: dict[str, Transport] = {}
# Schemes that no installed package has: to look costs milliseconds.
_unknown: set[str] = set()
# So many are remembered; who asks for more of them looks each time.
_MOST_UNKNOWN = 1000


def register_transport(transport: Transport, *, replace: bool = False) -> None:
    """Make ``transport.scheme://`` addresses usable in this process: in ``connect``, ``rpc``, pools and ``Server.listen``.

    A package can do without this call: an entry point ``pigeon = "my_package:PigeonTransport"`` in the group
    ``trio_dcore.transports`` brings the scheme where it is installed, and is loaded when the first ``pigeon://`` address is used.

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
    transport = _transports.get(scheme)
    return _installed(scheme) if transport is None and scheme not in _unknown else transport


def get_transport(scheme: str) -> Transport:
    """The transport for a scheme; AddressError names the known ones where there is none."""
    transport = find_transport(scheme)
    if transport is None:
        known = ", ".join(f"{name}://" for name in sorted(_transports))
        raise AddressError(f"unknown scheme {scheme!r}; known are {known}")
    return transport


def registered_schemes() -> tuple[str, ...]:
    """The schemes that have a transport, in the order in which they got it."""
    return tuple(_transports)


def _installed(scheme: str) -> Transport | None:
    """The transport that an installed package has for a scheme, registered from now on."""
    from importlib.metadata import entry_points  # slow to import, and hardly ever needed

    for entry_point in entry_points(group=ENTRY_POINTS, name=scheme):
        transport = entry_point.load()()
        if getattr(transport, "scheme", None) != scheme:
            raise LocalProtocolError(f"the entry point {entry_point.value!r} is for {scheme}://, and gave {transport!r}")
        register_transport(transport)
        return _transports[scheme]
    if len(_unknown) < _MOST_UNKNOWN:
        _unknown.add(scheme)
    return None
