"""The bridge between trio and asyncio, both ways.

Trio inside an asyncio program (docs/trio-in-asyncio.md): :func:`rpc`, :func:`connect`, :class:`ConnectionPool`, :class:`Server` and
what belongs to them, with coroutines of asyncio's flavour; :func:`open_trio` for trio code of your own.  They have the names of
``distributed.core``, so that a program which imports from there moves over by changing the import.

asyncio inside a trio program (docs/aio-in-trio.md): :func:`open_loop`, :func:`handler`, :func:`run_asyncio`, :func:`enter_asyncio`.
These need the extra ``trio_dcore[asyncio]``.  :func:`open_dask` and :func:`serve_dask` run stock Dask nodes there
(docs/dask-from-trio.md).

Errors, addresses, limits and everything else that has no flavour are those of :mod:`trio_dcore`.  Unlike there, all of it is loaded at
once, but for trio-asyncio: to import when something is first used would hold up the event loop.
"""

from __future__ import annotations

from .._security import Security
from ..comm import (
    address_from_user_args,
    coerce_to_address,
    get_address_host,
    get_address_host_port,
    normalize_address,
    parse_address,
    parse_host_port,
    unparse_address,
    unparse_host_port,
    uri_from_host_port,
)
from ..errors import (
    AddressError,
    CommClosedError,
    ConnectError,
    DcoreError,
    HandlerCancelled,
    LimitExceeded,
    LocalProtocolError,
    NotAllowed,
    Overloaded,
    ProtocolError,
    RemoteError,
    RemoteProtocolError,
    RPCClosed,
    SerializationError,
    ServerClosing,
    UnknownOp,
    UnsafePayload,
)
from ..protocol import Limits, Pickled, Serialize, Serialized, ToPickle, register_serialization, to_serialize
from ..server import Status, in_thread, run_to_end
from ._addressing import get_local_address_for, resolve_address
from ._batched import BatchedSend
from ._carry import run_in_asyncio, run_in_trio
from ._client import ConnectionPool, rpc
from ._comm import Comm, connect, send_recv
from ._context import enter_asyncio
from ._dask import open_dask, serve_dask
from ._errors import PortalClosed
from ._guest import open_trio
from ._handler import handler, run_asyncio
from ._loop import open_loop
from ._portal import Portal
from ._request import Request, current_request
from ._server import Server
from ._stream import RemoteStream

__all__ = [
    "AddressError",
    "BatchedSend",
    "Comm",
    "CommClosedError",
    "ConnectError",
    "ConnectionPool",
    "DcoreError",
    "HandlerCancelled",
    "LimitExceeded",
    "Limits",
    "LocalProtocolError",
    "NotAllowed",
    "Overloaded",
    "Pickled",
    "Portal",
    "PortalClosed",
    "ProtocolError",
    "RPCClosed",
    "RemoteError",
    "RemoteProtocolError",
    "RemoteStream",
    "Request",
    "Security",
    "SerializationError",
    "Serialize",
    "Serialized",
    "Server",
    "ServerClosing",
    "Status",
    "ToPickle",
    "UnknownOp",
    "UnsafePayload",
    "address_from_user_args",
    "coerce_to_address",
    "connect",
    "current_request",
    "enter_asyncio",
    "get_address_host",
    "get_address_host_port",
    "get_local_address_for",
    "handler",
    "in_thread",
    "normalize_address",
    "open_dask",
    "open_loop",
    "open_trio",
    "parse_address",
    "parse_host_port",
    "register_serialization",
    "resolve_address",
    "rpc",
    "run_asyncio",
    "run_in_asyncio",
    "run_in_trio",
    "run_to_end",
    "send_recv",
    "serve_dask",
    "to_serialize",
    "unparse_address",
    "unparse_host_port",
    "uri_from_host_port",
]
