"""Remote calls that look like method calls."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from ._call import call, checked, notify
from ._stream import RemoteStream

if TYPE_CHECKING:
    from ._pool import ConnectionPool

__all__ = ["PooledRPC", "RemoteOp"]


class RemoteOp:
    """One op at one address: ``await remote.add(x=1)``, ``remote.ticks.stream()``, ``await remote.log.notify()``."""

    __slots__ = ("_address", "_op", "_pool")

    def __init__(self, pool: ConnectionPool, address: str, op: str) -> None:
        self._pool = pool
        self._address = address
        self._op = op

    def __call__(self, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        """Call it and return its result.

        Args:
            **kwargs: the handler's arguments.  ``reply``, ``close``, ``serializers`` and ``deserializers`` mean what they do in
                Dask.

        There is no timeout: put a cancel scope round the call.  Its deadline goes with the call to a trio_dcore server.

        Cancellation: the remote handler is cancelled; the comm is closed, its slot is free.  A request of which nothing was sent yet is
            not sent, and its comm is kept.

        Raises:
            RemoteError: what the handler raised.
            ServerClosing, Overloaded, NotAllowed: the handler was not started.
            CommClosedError: the connection ended before the answer; whether the handler ran is unknown.
            ConnectError: there was no connection.
            RPCClosed: the rpc or pool is closed, or was closed meanwhile.
            LimitExceeded: no comm of the pool became free in time, or the answer is too large.
            SerializationError, UnsafePayload: an argument or the answer can't travel.
        """
        return call(self._pool, self._address, self._op, checked(self._op, kwargs))

    async def notify(self, **kwargs: Any) -> None:
        """Have it run without an answer; it runs on when we go.  Returns when the request is with the kernel."""
        await notify(self._pool, self._address, self._op, checked(self._op, kwargs))

    def stream(self, **kwargs: Any) -> RemoteStream:
        """Call it for many answers: ``async with remote.op.stream(...) as stream: async for item in stream: ...``.

        Args:
            **kwargs: the handler's arguments.  ``serializers`` are families for them and for what is sent to the handler,
                ``deserializers`` those accepted for its items, which a trio_dcore server is told.
        """
        return RemoteStream(self._pool, self._address, self._op, checked(self._op, kwargs))

    def __repr__(self) -> str:
        return f"<remote op {self._op!r} at {self._address}>"


class PooledRPC:
    """Calls to one address through a pool.  Attributes, and items for odd names, are ops."""

    def __init__(self, pool: ConnectionPool, address: str) -> None:
        self._pool = pool
        self._address = address

    def __getattr__(self, op: str) -> RemoteOp:
        if op.startswith("_"):
            raise AttributeError(
                f"{type(self).__name__} has no attribute {op!r}; for an op of that name write remote[{op!r}](...)"
            )
        remote_op = RemoteOp(self._pool, self._address, op)
        # The next look-up finds it without coming here.
        self.__dict__[op] = remote_op
        return remote_op

    def __getitem__(self, op: str) -> RemoteOp:
        return RemoteOp(self._pool, self._address, op)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._address}>"
