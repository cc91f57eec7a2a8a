"""rpc: one server, many overlapping calls."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import trio

from .._security import Security
from ..abc import OFFLOAD
from ..comm import AddressLike, coerce_to_address
from ..protocol._limits import Limits
from ._pool import ConnectionPool
from ._rpc_call import PooledRPC

__all__ = ["rpc"]


class rpc(PooledRPC):  # Dask's name
    """Calls to one server that look like method calls::

        async with rpc("tcp://127.0.0.1:8786") as remote:
            await remote.add(x=1, y=2)
            async with remote.ticks.stream(interval=1) as stream:
                async for item in stream:
                    ...

    Each call in flight has a comm of its own, so overlapping calls are safe; comms are kept for the next call.

    Args:
        address: of the server; also ``"host:port"``, ``(host, port)`` and ``[host, port]``, where the port may be text.
        limit: how many comms may be open at once.
        security, limits, deserialize, timeout, serializers, deserializers, compression, offload: as for
            :func:`trio_dcore.connect`.

    Making one neither connects nor needs a nursery.  Leaving ``async with``, or :meth:`close_comms`, closes its comms.
    """

    def __init__(
        self,
        address: AddressLike,
        *,
        limit: int = 512,
        security: Security | None = None,
        limits: Limits | None = None,
        deserialize: bool = True,
        timeout: float | None = 30.0,
        serializers: Sequence[str] | None = None,
        deserializers: Sequence[str] | None = None,
        compression: str | None = None,
        offload: int | None = OFFLOAD,
    ) -> None:
        pool = ConnectionPool(
            limit,
            security=security,
            limits=limits,
            deserialize=deserialize,
            timeout=timeout,
            serializers=serializers,
            deserializers=deserializers,
            compression=compression,
            offload=offload,
        )
        super().__init__(pool, coerce_to_address(address))

    @property
    def address(self) -> str:
        """The server's address."""
        return self._address

    @property
    def pool(self) -> ConnectionPool:
        """The comms behind the calls."""
        return self._pool

    def close_comms(self) -> None:
        """Close every comm; calls in flight get RPCClosed.  Not a checkpoint; nothing is left to await."""
        self._pool.close_now()

    async def close_rpc(self) -> None:
        """Dask's name for :meth:`aclose`."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close every comm; calls in flight get RPCClosed."""
        self.close_comms()
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close_comms()
