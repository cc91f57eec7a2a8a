"""trio_dcore: servers, comms and remote calls on trio, speaking Dask's wire protocol.

Layers, each importing only what stands below it::

                     cli
        aio    testing    dask    status            edges
             server      client                     handlers and requests; calls and pools
                   comm                             byte streams to messages
         _util  errors  abc                         base
                 protocol                           sans-IO: framing, messages, serialization

Everything here is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._node import Server as Server
    from ._security import Security as Security
    from .abc import Comm as Comm
    from .client import ConnectionPool as ConnectionPool
    from .client import rpc as rpc
    from .client import send_recv as send_recv
    from .comm import BatchedSend as BatchedSend
    from .comm import address_from_user_args as address_from_user_args
    from .comm import coerce_to_address as coerce_to_address
    from .comm import connect as connect
    from .comm import get_address_host as get_address_host
    from .comm import get_address_host_port as get_address_host_port
    from .comm import get_local_address_for as get_local_address_for
    from .comm import normalize_address as normalize_address
    from .comm import parse_address as parse_address
    from .comm import parse_host_port as parse_host_port
    from .comm import resolve_address as resolve_address
    from .comm import unparse_address as unparse_address
    from .comm import unparse_host_port as unparse_host_port
    from .comm import uri_from_host_port as uri_from_host_port
    from .errors import AddressError as AddressError
    from .errors import CommClosedError as CommClosedError
    from .errors import ConnectError as ConnectError
    from .errors import DcoreError as DcoreError
    from .errors import HandlerCancelled as HandlerCancelled
    from .errors import LimitExceeded as LimitExceeded
    from .errors import LocalProtocolError as LocalProtocolError
    from .errors import NotAllowed as NotAllowed
    from .errors import Overloaded as Overloaded
    from .errors import ProtocolError as ProtocolError
    from .errors import RemoteError as RemoteError
    from .errors import RemoteProtocolError as RemoteProtocolError
    from .errors import RPCClosed as RPCClosed
    from .errors import SerializationError as SerializationError
    from .errors import ServerClosing as ServerClosing
    from .errors import UnknownOp as UnknownOp
    from .errors import UnsafePayload as UnsafePayload
    from .protocol import Limits as Limits
    from .protocol import Pickled as Pickled
    from .protocol import Serialize as Serialize
    from .protocol import Serialized as Serialized
    from .protocol import ToPickle as ToPickle
    from .protocol import register_serialization as register_serialization
    from .protocol import to_serialize as to_serialize
    from .server import Status as Status
    from .server import current_request as current_request
    from .server import in_thread as in_thread
    from .server import run_to_end as run_to_end
    from .server import stop_on_signals as stop_on_signals

__version__ = "0.1.0"

_WHERE = {
    "._node": ("Server",),
    "._security": ("Security",),
    ".abc": ("Comm",),
    ".client": ("ConnectionPool", "rpc", "send_recv"),
    ".comm": (
        "BatchedSend",
        "address_from_user_args",
        "coerce_to_address",
        "connect",
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
    ".errors": (
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
        "RPCClosed",
        "RemoteError",
        "RemoteProtocolError",
        "SerializationError",
        "ServerClosing",
        "UnknownOp",
        "UnsafePayload",
    ),
    ".protocol": ("Limits", "Pickled", "Serialize", "Serialized", "ToPickle", "register_serialization", "to_serialize"),
    ".server": ("Status", "current_request", "in_thread", "run_to_end", "stop_on_signals"),
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
