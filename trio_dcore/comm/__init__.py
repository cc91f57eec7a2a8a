"""Comms: messages over TCP, over TLS, over unix sockets or inside one process, and how they are made.

The only layer that opens sockets.  :func:`connect` makes comms, :func:`register_transport` adds schemes.
"""

from __future__ import annotations

from ..abc import Comm, CommSettings, Listener, Peer, Transport
from ._addressing import (
    AddressLike,
    address_from_user_args,
    coerce_to_address,
    get_address_host,
    get_address_host_port,
    get_local_address_for,
    listen_address,
    normalize_address,
    parse_address,
    parse_host_port,
    resolve_address,
    unparse_address,
    unparse_host_port,
    uri_from_host_port,
)
from ._base import BaseComm
from ._batched import BatchedSend
from ._comm import FramedComm
from ._connect import check_encryption, connect, connect_with
from ._gatherer import Gatherer
from ._hangup import HangupWatcher
from ._inproc import InprocComm, InprocTransport
from ._listener import BrokenConnection
from ._pumps import Pump, SocketPump, StreamPump
from ._registry import get_transport, register_transport
from ._silence import Silence, last_look
from ._substream import Substream
from ._substream_comm import SubstreamComm
from ._tcp import TCPTransport
from ._tls import TLSTransport
from ._unix import UnixTransport
from ._watch import READ_AHEAD

__all__ = [
    "READ_AHEAD",
    "AddressLike",
    "BaseComm",
    "BatchedSend",
    "BrokenConnection",
    "Comm",
    "CommSettings",
    "FramedComm",
    "Gatherer",
    "HangupWatcher",
    "InprocComm",
    "Listener",
    "Peer",
    "Pump",
    "Silence",
    "SocketPump",
    "StreamPump",
    "Substream",
    "SubstreamComm",
    "Transport",
    "address_from_user_args",
    "check_encryption",
    "coerce_to_address",
    "connect",
    "connect_with",
    "get_address_host",
    "get_address_host_port",
    "get_local_address_for",
    "get_transport",
    "last_look",
    "listen_address",
    "normalize_address",
    "parse_address",
    "parse_host_port",
    "register_transport",
    "resolve_address",
    "unparse_address",
    "unparse_host_port",
    "uri_from_host_port",
]

register_transport(TCPTransport())
register_transport(UnixTransport())
register_transport(TLSTransport())
register_transport(InprocTransport())
