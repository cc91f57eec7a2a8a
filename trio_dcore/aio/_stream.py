"""Streams as an asyncio program uses them.

A trio task lives as long as the stream does: it opens it, takes a few items ahead, and closes it.  So an ``async for`` has to wait for
trio only when there is nothing to be had, and the stream is opened and closed by one and the same task.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import trio

from .. import client
from ..errors import LocalProtocolError
from ._carry import Crossing, run_in_trio
from ._errors import PortalClosed
from ._portal import Portal

__all__ = ["RemoteStream"]

# Items that are taken from trio before the consumer asks, and how many bytes of messages until there are no more than that; they come on
# top of Limits.window and Limits.window_bytes.
_AHEAD = 16
_AHEAD_BYTES = 2**20


class RemoteStream:
    """The items of one streaming call, for asyncio tasks; made by ``remote.op.stream(...)``.

    ``async with`` opens it, ``async for`` or :meth:`receive` takes items.  Leaving the block before the end closes the comm, which
    cancels the remote handler.  Between trio_dcore peers :meth:`send` gives the handler items.  Without a block,
    ``async for item in remote.op.stream(...)`` opens the stream and closes it at the end of the loop, however that ends; after a
    ``break`` it is Python that closes it, so where it matters when, use the block.
    """

    def __init__(self, bind: Callable[[], Awaitable[Portal]], native: client.RemoteStream) -> None:
        self._bind = bind
        self._native = native
        self._crossing: Crossing | None = None
        self._items: deque[Any] = deque()
        self._end: BaseException | None = None  # what comes behind the items
        self._opened = False
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None  # who opens it, or waits for an item
        self._room = trio.Event()

    # -- the trio side -------------------------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        try:
            async with self._native as native:
                self._opened = True
                self._wake()
                try:
                    await self._take(native)
                except Exception as error:
                    self._end = error
                    self._wake()
                    # Open for items of ours, until it is closed.
                    await trio.sleep_forever()
        except trio.Cancelled:
            self._end = self._end or PortalClosed("the trio run of this event loop ends")
            raise
        except BaseException as error:
            self._end = error  # it was not opened
            if not isinstance(error, Exception):
                raise
        finally:
            self._wake()

    async def _take(self, native: client.RemoteStream) -> None:
        items = self._items
        before = native.bytes_read  # when there was room
        while True:
            item = await native.receive()
            items.append(item)
            if self._waiter is not None:
                self._wake()
            if len(items) >= _AHEAD or native.bytes_read - before >= _AHEAD_BYTES:
                self._room = trio.Event()
                await self._room.wait()
                before = native.bytes_read

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- the asyncio side ----------------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Make the request.  Raises as a call does, but for what the handler raises: that comes with the items."""
        if self._crossing is not None or self._closed:
            raise LocalProtocolError("a stream can be entered once; call .stream() again for another")
        portal = await self._bind()
        self._crossing = portal.start(self._live, ())
        try:
            await self._wait()
        except BaseException:
            await self.aclose()
            raise
        if not self._opened:
            await self.aclose()
            assert self._end is not None
            raise self._end
        return self

    async def _wait(self) -> None:
        """Wait until there is something new."""
        if self._waiter is not None:
            raise trio.BusyResourceError("another task is taking items from this stream")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the stream, as leaving the block does: if it had not ended, the remote handler is cancelled."""
        self._closed = True
        crossing = self._crossing
        self._wake()
        if crossing is not None and not crossing.done:
            cancelled = await crossing.wait_cancelled()
            if cancelled is not None:
                raise cancelled

    @property
    def bytes_read(self) -> int:
        """Bytes received over the comm that the stream has now; 0 where it has none."""
        return self._native.bytes_read

    async def receive(self) -> Any:
        """The next item; see :meth:`trio_dcore.client.RemoteStream.receive`.

        Cancellation: no item is lost.
        """
        items = self._items
        while not items or self._closed:
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed")
            if self._end is not None:
                raise trio.EndOfChannel if isinstance(self._end, trio.EndOfChannel) else self._end
            if not self._opened:
                raise LocalProtocolError("open the stream first: `async with remote.op.stream(...) as stream:`")
            await self._wait()
        item = items.popleft()
        if not items or len(items) == _AHEAD // 2:
            self._room.set()
        return item

    async def send(self, value: Any) -> None:
        """Give the handler an item; see :meth:`trio_dcore.client.RemoteStream.send`."""
        await run_in_trio(self._portal(), self._native.send, value)

    async def send_eof(self) -> None:
        """Say that no more items come from here; the other direction goes on."""
        await run_in_trio(self._portal(), self._native.send_eof)

    def _portal(self) -> Portal:
        if self._crossing is None:
            raise LocalProtocolError("open the stream first: `async with remote.op.stream(...) as stream:`")
        return self._crossing.portal

    def __aiter__(self) -> AsyncIterator[Any]:
        return self if self._crossing is not None else self._all()

    async def _all(self) -> AsyncGenerator[Any, None]:
        async with self:
            async for item in self:
                yield item

    async def __anext__(self) -> Any:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    def __repr__(self) -> str:
        return f"<aio {self._native!r}>"
