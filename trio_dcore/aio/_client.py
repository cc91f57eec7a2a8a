"""rpc and ConnectionPool as an asyncio program uses them."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from .. import client
from ..comm import AddressLike, coerce_to_address
from ..errors import RPCClosed
from ._carry import run_in_trio
from ._guest import portal_of
from ._options import CommOptions
from ._portal import Lease, Portal, current_portal
from ._stream import RemoteStream

__all__ = ["Bound", "ConnectionPool", "PooledRPC", "RemoteOp", "rpc"]


class Bound:
    """A native pool, and the portal that its calls go through, once there was one."""

    __slots__ = ("__weakref__", "_block", "lease", "pool", "portal")

    def __init__(self, pool: client.ConnectionPool) -> None:
        self.pool: client.ConnectionPool = pool
        self._block = current_portal.get()  # one that tasks share does not end with the block of whoever is the first to use it
        self.portal: Portal | None = None
        self.lease: Lease | None = None

    async def bind(self) -> Portal:
        """The portal of the running loop, from the first use on."""
        if self.portal is None:
            if self.pool.closed:
                raise RPCClosed("this rpc or pool is closed")
            portal = await portal_of(self._block)
            if self.portal is None:  # else another task was faster
                self.lease = portal.lease(self.pool.close_now)
                self.portal = portal
        return self.portal

    def close_now(self) -> None:
        """Close every comm."""
        self.pool.close_now()
        if self.lease is not None:
            self.lease.release()

    async def aclose(self) -> None:
        """Close every comm, and wait until the trio run has ended if nobody else needs it."""
        self.pool.close_now()
        if self.lease is not None:
            await self.lease.aclose()

    def __del__(self, warn: Any = warnings.warn) -> None:
        lease = self.lease
        if lease is not None and not lease.released:
            if self.pool.open:
                warn(f"unclosed rpc or pool with {self.pool.open} comms", ResourceWarning, source=self)
            lease.drop()


class RemoteOp:
    """One op at one address: ``await remote.add(x=1)``, ``remote.ticks.stream()``, ``await remote.log.notify()``."""

    __slots__ = ("_bound", "_native")

    def __init__(self, bound: Bound, native: client.RemoteOp) -> None:
        self._bound = bound
        self._native = native

    async def __call__(self, **kwargs: Any) -> Any:
        """Call it and return its result; arguments and errors are those of :class:`trio_dcore.rpc`.

        There is no timeout: use ``asyncio.timeout`` or ``asyncio.wait_for``.

        Cancellation: the remote handler is cancelled, the comm closed, its slot free; then CancelledError is raised.
        """
        bound = self._bound
        portal = bound.portal
        if portal is None:
            portal = await bound.bind()
        return await run_in_trio(portal, partial(self._native, **kwargs))

    async def notify(self, **kwargs: Any) -> None:
        """Have it run without an answer; it runs on when we go.  Returns when the request is with the kernel."""
        await run_in_trio(await self._bound.bind(), partial(self._native.notify, **kwargs))

    def stream(self, **kwargs: Any) -> RemoteStream:
        """Call it for many answers: ``async with remote.op.stream(...) as stream: async for item in stream: ...``."""
        return RemoteStream(self._bound.bind, self._native.stream(**kwargs))

    def __repr__(self) -> str:
        return repr(self._native)


class PooledRPC:
    """Calls to one address through a pool.  Attributes, and items for odd names, are ops."""

    def __init__(self, bound: Bound, address: str) -> None:
        self._bound = bound
        self._address = address
        self._native = bound.pool(address)

    @property
    def address(self) -> str:
        """The server's address."""
        return self._address

    def __getattr__(self, op: str) -> RemoteOp:
        if op.startswith("_"):
            raise AttributeError(
                f"{type(self).__name__} has no attribute {op!r}; for an op of that name write remote[{op!r}](...)"
            )
        remote_op = self[op]
        # The next look-up finds it without coming here.
        self.__dict__[op] = remote_op
        return remote_op

    def __getitem__(self, op: str) -> RemoteOp:
        return RemoteOp(self._bound, self._native[op])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The comms are the pool's."""

    def __repr__(self) -> str:
        return f"<aio {self._native!r}>"


class rpc(PooledRPC):  # Dask's name
    """Calls to one server that look like method calls, from asyncio tasks::

        async with rpc("tcp://127.0.0.1:8786") as remote:
            await remote.add(x=1, y=2)
            async with remote.ticks.stream(interval=1) as stream:
                async for item in stream:
                    ...

    Arguments are those of :class:`trio_dcore.rpc`.  Making one does nothing yet; it belongs to the event loop of its first call.
    Leaving ``async with``, :meth:`close_comms` or :meth:`close_rpc` closes its comms.
    """

    def __init__(
        self,
        address: AddressLike,
        *,
        limit: int = 512,
        **options: Unpack[CommOptions],
    ) -> None:
        pool = client.ConnectionPool(limit, **options)
        super().__init__(Bound(pool), coerce_to_address(address))

    @property
    def pool(self) -> ConnectionPool:
        """The comms behind the calls."""
        return ConnectionPool.of(self._bound)

    def close_comms(self) -> None:
        """Close every comm; calls in flight get RPCClosed.  Nothing is left to await."""
        self._bound.close_now()

    async def close_rpc(self) -> None:
        """Dask's name for :meth:`aclose`."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close every comm; calls in flight get RPCClosed."""
        await self._bound.aclose()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._bound.aclose()


class ConnectionPool:
    """Comms to any number of addresses, kept for the next call, for asyncio tasks: ``await pool(address).add(x=1, y=2)``.

    Arguments are those of :class:`trio_dcore.ConnectionPool`.  Making one does nothing yet; it belongs to the event loop of its first
    call.  ``async with`` closes it; ``await ConnectionPool()`` gives the pool itself, as Dask's does.
    """

    def __init__(
        self,
        limit: int = 512,
        **options: Unpack[CommOptions],
    ) -> None:
        pool = client.ConnectionPool(limit, **options)
        self._bound = Bound(pool)

    @classmethod
    def of(cls, bound: Bound) -> Self:
        """The same for a pool that there is already."""
        self = cls.__new__(cls)
        self._bound = bound
        return self

    def __call__(self, address: AddressLike | None = None, *, ip: str | None = None, port: int | str | None = None) -> PooledRPC:
        """Calls to one address: ``pool(address).op(...)``; see :meth:`trio_dcore.ConnectionPool.__call__`."""
        if address is None and ip is not None and port is not None:
            address = (ip, port)
        elif address is None or ip is not None or port is not None:
            raise TypeError("give an address, or ip= and port=")
        return PooledRPC(self._bound, coerce_to_address(address))

    @property
    def limit(self) -> int:
        """How many comms may be open at once."""
        return self._bound.pool.limit

    @property
    def open(self) -> int:
        """How many comms are open, those being connected included."""
        return self._bound.pool.open

    @property
    def active(self) -> int:
        """How many of them are in use or being connected."""
        return self._bound.pool.active

    @property
    def connecting(self) -> int:
        """How many of those are being connected."""
        return self._bound.pool.connecting

    @property
    def bytes_read(self) -> int:
        """Bytes received so far over the comms that are in use."""
        return self._bound.pool.bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes sent so far over the comms that are in use."""
        return self._bound.pool.bytes_written

    @property
    def closed(self) -> bool:
        """Whether the pool has been closed."""
        return self._bound.pool.closed

    def collect(self) -> int:
        """Close every idle comm and return how many there were."""
        return self._bound.pool.collect()

    def remove(self, address: AddressLike, *, reason: str = "the address was removed") -> None:
        """Close all comms to an address.  Calls on them get CommClosedError; the address may be used again."""
        self._bound.pool.remove(address, reason=reason)

    def close_now(self) -> None:
        """Close every comm.  Calls that wait, connect or are in flight get RPCClosed."""
        self._bound.close_now()

    async def aclose(self) -> None:
        """Close every comm, as :meth:`close_now`."""
        await self._bound.aclose()

    async def close(self) -> None:
        """Dask's name for :meth:`aclose`."""
        await self.aclose()

    async def start(self) -> None:
        """Does nothing; Dask's pools have it."""

    def __await__(self) -> Generator[Any, Any, Self]:
        return self._started().__await__()

    async def _started(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<aio {self._bound.pool!r}>"
