"""The bridge between trio and asyncio, both ways.

Trio inside an asyncio program (docs/trio-in-asyncio.md): :func:`rpc`, :func:`connect`, :class:`ConnectionPool`, :class:`Server` and
what belongs to them, with coroutines of asyncio's flavour; :func:`open_trio` for trio code of your own.  They have the names of
``distributed.core``, so that a program which imports from there moves over by changing the import.

asyncio inside a trio program (docs/aio-in-trio.md): :func:`open_loop`, :func:`handler`, :func:`run_asyncio`, :func:`enter_asyncio`.
These need the extra ``trio_dcore[asyncio]``.  :func:`open_dask` and :func:`serve_dask` run stock Dask nodes there
(docs/dask-from-trio.md).

Errors, addresses, limits and everything else that has no flavour are those of :mod:`trio_dcore`.  All of it is loaded when it is first
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .._security import Security as Security
    from ..comm import address_from_user_args as address_from_user_args
    from ..comm import coerce_to_address as coerce_to_address
    from ..comm import get_address_host as get_address_host
    from ..comm import get_address_host_port as get_address_host_port
    from ..comm import get_local_address_for as get_local_address_for
    from ..comm import normalize_address as normalize_address
    from ..comm import parse_address as parse_address
    from ..comm import parse_host_port as parse_host_port
    from ..comm import resolve_address as resolve_address
    from ..comm import unparse_address as unparse_address
    from ..comm import unparse_host_port as unparse_host_port
    from ..comm import uri_from_host_port as uri_from_host_port
    from ..errors import AddressError as AddressError
    from ..errors import CommClosedError as CommClosedError
    from ..errors import ConnectError as ConnectError
    from ..errors import DcoreError as DcoreError
    from ..errors import HandlerCancelled as HandlerCancelled
    from ..errors import LimitExceeded as LimitExceeded
    from ..errors import LocalProtocolError as LocalProtocolError
    from ..errors import NotAllowed as NotAllowed
    from ..errors import Overloaded as Overloaded
    from ..errors import ProtocolError as ProtocolError
    from ..errors import RemoteError as RemoteError
    from ..errors import RemoteProtocolError as RemoteProtocolError
    from ..errors import RPCClosed as RPCClosed
    from ..errors import SerializationError as SerializationError
    from ..errors import ServerClosing as ServerClosing
    from ..errors import UnknownOp as UnknownOp
    from ..errors import UnsafePayload as UnsafePayload
    from ..protocol import Limits as Limits
    from ..protocol import Pickled as Pickled
    from ..protocol import Serialize as Serialize
    from ..protocol import Serialized as Serialized
    from ..protocol import ToPickle as ToPickle
    from ..protocol import register_serialization as register_serialization
    from ..protocol import to_serialize as to_serialize
    from ..server import Status as Status
    from ..server import in_thread as in_thread
    from ..server import run_to_end as run_to_end
    from ._batched import BatchedSend as BatchedSend
    from ._carry import run_in_asyncio as run_in_asyncio
    from ._carry import run_in_trio as run_in_trio
    from ._client import ConnectionPool as ConnectionPool
    from ._client import rpc as rpc
    from ._comm import Comm as Comm
    from ._comm import connect as connect
    from ._comm import send_recv as send_recv
    from ._context import enter_asyncio as enter_asyncio
    from ._dask import open_dask as open_dask
    from ._dask import serve_dask as serve_dask
    from ._errors import PortalClosed as PortalClosed
    from ._guest import open_trio as open_trio
    from ._handler import handler as handler
    from ._handler import run_asyncio as run_asyncio
    from ._loop import open_loop as open_loop
    from ._portal import Portal as Portal
    from ._request import Request as Request
    from ._request import current_request as current_request
    from ._server import Server as Server
    from ._stream import RemoteStream as RemoteStream

_WHERE = {
    ".._security": ("Security",),
    "..comm": (
        "address_from_user_args",
        "coerce_to_address",
        "get_address_host",
        "get_address_host_port",
        "get_local_address_for",
        "normalize_address",
        "parse_address",
        "parse_host_port",
        "resolve_address",
        "unparse_address",
        "unparse_host_port",
        "uri_from_host_port",
    ),
    "..errors": (
        "AddressError",
        "CommClosedError",
        "ConnectError",
        "DcoreError",
        "HandlerCancelled",
        "LimitExceeded",
        "LocalProtocolError",
        "NotAllowed",
        "Overloaded",
        "ProtocolError",
        "RemoteError",
        "RemoteProtocolError",
        "RPCClosed",
        "SerializationError",
        "ServerClosing",
        "UnknownOp",
        "UnsafePayload",
    ),
    "..protocol": (
        "Limits",
        "Pickled",
        "register_serialization",
        "Serialize",
        "Serialized",
        "to_serialize",
        "ToPickle",
    ),
    "..server": (
        "in_thread",
        "run_to_end",
        "Status",
    ),
    "._batched": ("BatchedSend",),
    "._carry": (
        "run_in_asyncio",
        "run_in_trio",
    ),
    "._client": (
        "ConnectionPool",
        "rpc",
    ),
    "._comm": (
        "Comm",
        "connect",
        "send_recv",
    ),
    "._dask": (
        "open_dask",
        "serve_dask",
    ),
    "._context": ("enter_asyncio",),
    "._errors": ("PortalClosed",),
    "._guest": ("open_trio",),
    "._handler": (
        "handler",
        "run_asyncio",
    ),
    "._loop": ("open_loop",),
    "._portal": ("Portal",),
    "._request": (
        "current_request",
        "Request",
    ),
    "._server": ("Server",),
    "._stream": ("RemoteStream",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [*sorted(_MODULE_OF)]  # a list of str


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
