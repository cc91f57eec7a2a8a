"""BatchedSend as an asyncio program uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import trio

from ..comm import BatchedSend as NativeBatchedSend
from ..errors import LocalProtocolError
from ._carry import Crossing, run_in_trio
from ._comm import Comm

__all__ = ["BatchedSend"]


class _BlockFailed(Exception):
    """The asyncio block has raised: what was not sent is logged, not raised."""


class BatchedSend:
    """Sends messages over a comm, many in one list, for asyncio tasks; see :class:`trio_dcore.BatchedSend`.

    ::

        async with await connect(address) as comm:
            await comm.write({"op": "connection_stream", "reply": False})
            async with BatchedSend(comm) as stream:
                stream.send({"op": "log", "line": "hello"})

    Arguments and errors are the same.

    Cancellation: of the block: ends the stream now; what waits stays in :attr:`unsent`.
    """

    def __init__(
        self,
        comm: Comm,
        interval: float | str = 0.002,
        max_buffered: int = 10_000,
        *,
        serializers: Sequence[str] | None = None,
    ) -> None:
        self._comm = comm
        self._native = NativeBatchedSend(comm.native, interval, max_buffered, serializers=serializers)
        self._crossing: Crossing | None = None
        self._started: asyncio.Future[None] | None = None
        self._leave = trio.Event()
        self._failing = False

    async def _live(self, started: asyncio.Future[None]) -> None:
        try:
            async with self._native:
                if not started.done():
                    started.set_result(None)
                await self._leave.wait()
                if self._failing:
                    raise _BlockFailed
        except _BlockFailed:
            pass

    async def __aenter__(self) -> Self:
        if self._crossing is not None:
            raise LocalProtocolError("a BatchedSend runs once; make another one for the same comm")
        started = asyncio.get_running_loop().create_future()
        self._crossing = self._comm.portal.start(partial(self._live, started), ())
        try:
            await asyncio.wait([started, self._crossing.waiter], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._crossing.wait_cancelled()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Send what waits, and end."""
        crossing = self._crossing
        assert crossing is not None
        if error is not None and not isinstance(error, Exception):
            crossing.scope.cancel(reason="the block of the BatchedSend was cancelled, or the program ends")
        self._failing = error is not None
        if not crossing.scope.cancel_called:
            self._leave.set()
        await crossing.join(failures=error is None)

    def send(self, *msgs: Any) -> None:
        """Accept messages for sending; see :meth:`trio_dcore.BatchedSend.send`."""
        self._native.send(*msgs)

    async def send_wait(self, *msgs: Any) -> None:
        """Accept messages, and wait for room where there is none."""
        await run_in_trio(self._comm.portal, self._native.send_wait, *msgs)

    async def aclose(self) -> None:
        """Send what waits, for ``Limits.linger`` seconds (1) at most, and end the stream.  The comm stays open."""
        await run_in_trio(self._comm.portal, self._native.aclose)

    async def close(self) -> None:
        """Dask's name for :meth:`aclose`."""
        await self.aclose()

    def abort(self) -> None:
        """End the stream and its comm at once.  What was not written stays in :attr:`unsent`."""
        self._native.abort()
        self._comm.abort()

    def closed(self) -> bool:
        """Whether nothing more can be sent."""
        return self._native.closed()

    @property
    def comm(self) -> Comm:
        """Where it sends to."""
        return self._comm

    @property
    def message_count(self) -> int:
        """How many messages were accepted."""
        return self._native.message_count

    @property
    def batch_count(self) -> int:
        """Lists written."""
        return self._native.batch_count

    @property
    def byte_count(self) -> int:
        """Their bytes; on comms without bytes, their number."""
        return self._native.byte_count

    @property
    def unsent(self) -> list[Any]:
        """The messages that were accepted and of which nothing has been written."""
        return self._native.unsent

    @property
    def maybe_sent(self) -> list[Any]:
        """The messages of the batch that is being written."""
        return self._native.maybe_sent

    def __repr__(self) -> str:
        return f"<aio {self._native!r}>"
