"""Clients: calls over pooled comms."""

from __future__ import annotations

from ._call import send_recv
from ._pinger import PINGER_NAME
from ._pool import ConnectionPool
from ._rpc import rpc
from ._rpc_call import PooledRPC, RemoteOp
from ._stream import RemoteStream

__all__ = ["PINGER_NAME", "ConnectionPool", "PooledRPC", "RemoteOp", "RemoteStream", "rpc", "send_recv"]
