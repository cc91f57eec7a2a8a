"""Calls with many answers, and many arguments."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import trio
from trio.lowlevel import checkpoint_if_cancelled

from ..comm import BaseComm, Substream
from ..errors import (
    CommClosedError,
    LocalProtocolError,
    RemoteProtocolError,
    RPCClosed,
    SerializationError,
    ServerClosing,
    UnsafePayload,
)
from ..protocol._envelope import END, ERROR, GOODBYE, KEY, REPLY, Credit
from ..protocol._remote_errors import exception_from_reply, exception_from_value
from ._call import closed_error, families, map_error

if TYPE_CHECKING:
    from ._pool import ConnectionPool

__all__ = ["RemoteStream"]


class RemoteStream:
    """The items of one streaming call; made by ``remote.op.stream(...)``.

    ``async with`` opens it, ``async for`` or :meth:`receive` takes items.  Leaving the block before the end closes the comm, which
    cancels the remote handler.  Between trio_dcore peers :meth:`send` gives the handler items, and both directions are bounded by
    ``Limits.window``: a slow consumer slows the producer down.
    """

    def __init__(self, pool: ConnectionPool, address: str, op: str, kwargs: dict[str, Any]) -> None:
        for name in ("reply", "close"):
            if name in kwargs:
                raise TypeError(f"{name!r} has no meaning for a stream")
        #: For the request and for what is sent behind it; accepted in what comes.  None for the comm's own.
        self._families = families(pool, kwargs)
        self._pool = pool
        self._address = address
        self._op = op
        self._kwargs = kwargs
        self._comm: BaseComm | None = None
        self._source: _Enveloped | _Plain | None = None
        self._closed = False
        self._said_goodbye = False  # the server has, once: it did not start the request
        self._reopening: trio.Event | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes received over the comm that the stream has now; 0 where it has none."""
        comm = self._comm
        return 0 if comm is None else comm.bytes_read

    async def __aenter__(self) -> Self:
        """Make the request.  Raises as a call does, but for what the handler raises: that comes with the items."""
        if self._comm is not None or self._closed:
            raise LocalProtocolError("a stream can be entered once; call .stream() again for another")
        await checkpoint_if_cancelled()
        await self._open()
        return self

    async def _open(self) -> None:
        pool = self._pool
        while True:
            said_goodbye = self._said_goodbye
            comm, fresh = await pool.acquire(self._address, self._op, anew=said_goodbye)
            try:
                make: type[_Enveloped | _Plain] = _Enveloped if _can_stream(comm) else _Plain
                source = make(comm, *self._families)
                await comm.put(source.request(self._op, self._kwargs), self._families[0])
            except (SerializationError, UnsafePayload):
                pool.release(comm)  # nothing was sent
                raise
            except (CommClosedError, trio.ClosedResourceError) as error:
                dismissed = comm.take_goodbye(comm.last_id)
                pool.discard(comm)
                if dismissed and said_goodbye:
                    raise self._never_started() from None
                self._said_goodbye = said_goodbye or dismissed
                if dismissed or (getattr(error, "nothing_sent", False) and not fresh):
                    continue
                raise self._ended(error) from error
            except trio.Cancelled:
                pool.release(comm)  # which discards it, unless nothing of the request has left
                raise
            except BaseException:
                pool.discard(comm)
                raise
            if self._closed:
                pool.discard(comm)
                raise trio.ClosedResourceError("this stream was closed")
            self._comm = comm
            self._source = source
            return

    async def _reopen(self, error: Exception) -> None:
        """Make the request anew, on a new connection, if the server has said goodbye instead of starting it; else raise ``error``."""
        comm = self._comm
        source = self._source
        if self._closed or comm is None or type(source) is not _Enveloped:
            raise self._ended(error) from error
        if not (source.dismissed or (source.fresh and not isinstance(error, ServerClosing) and comm.take_goodbye(comm.last_id))):
            raise self._ended(error) from error
        self._comm = None
        self._pool.discard(comm)
        if self._pool.closed:
            raise self._ended(error) from error
        if self._said_goodbye or not source.fresh:
            raise self._never_started() from None  # also where items of ours have gone with it
        self._said_goodbye = True
        self._reopening = trio.Event()
        try:
            await self._open()
        finally:
            self._reopening.set()
            self._reopening = None
        if source.sent_eof:
            anew = self._opened()
            try:
                await anew.send_eof()
            except BaseException:
                self._close()  # else its handler would wait for an end that was sent, as far as our user knows
                raise

    def _never_started(self) -> ServerClosing:
        return ServerClosing(f"{self._address} is shutting down and did not start {self._op!r}")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    async def aclose(self) -> None:
        """End the stream, as leaving the block does: if it had not ended, the remote handler is cancelled."""
        self._close()
        await trio.lowlevel.checkpoint()

    def _close(self) -> None:
        self._closed = True
        comm, self._comm = self._comm, None
        if comm is None:
            return
        assert self._source is not None
        if self._source.reusable:
            self._pool.release(comm)
        else:
            self._pool.discard(comm)

    def _opened(self) -> _Enveloped | _Plain:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._source is None:
            raise LocalProtocolError("open the stream first: `async with remote.op.stream(...) as stream:`")
        return self._source

    def _ended(self, error: Exception) -> Exception:
        if isinstance(error, ServerClosing):
            return error
        if self._pool.closed:
            return RPCClosed(f"the pool was closed while {self._op!r} was streaming from {self._address}")
        return closed_error(self._op, self._address, error)

    async def receive(self) -> Any:
        """The next item.

        If the server answers with a goodbye, since it shuts down and has not started the handler, the request is made once more,
        on a new connection, as calls are; unless items were sent behind it.

        Cancellation: no item is lost, unless the comm was in the middle of a message; then it is closed.

        Raises:
            trio.EndOfChannel: the stream has ended.
            RemoteError: what the handler raised, after the items from before.
            CommClosedError: the connection ended before the stream did.
            ServerClosing: the server shuts down and did not start the handler.
        """
        while True:
            source = self._source
            if source is None or self._closed:
                source = self._opened()
            try:
                return await source.receive()
            except (CommClosedError, trio.ClosedResourceError, ServerClosing) as error:
                await self._reopen(error)

    async def send(self, value: Any) -> None:
        """Give the handler an item; waits while more than ``Limits.window`` are on their way.

        Cancellation: delivered before the first byte, or it closes the comm.

        Raises:
            CommClosedError: the handler takes no more, or the connection ended.
            ServerClosing: the server shuts down and did not start the handler.
            LimitExceeded: the server has taken nothing for ``Limits.stream_stall``; the connection was closed.
            LocalProtocolError: the server is a stock Dask server, which has no such thing; or after :meth:`send_eof`.
        """
        await self._tell(lambda source: source.send(value))

    async def send_eof(self) -> None:
        """Say that no more items come from here; the other direction goes on."""
        await self._tell(lambda source: source.send_eof())

    async def _tell(self, say: Callable[[_Enveloped | _Plain], Awaitable[None]]) -> None:
        while self._reopening is not None:
            await self._reopening.wait()
        source = self._opened()
        try:
            await say(source)
        except (CommClosedError, trio.ClosedResourceError) as error:
            if source is not self._source:
                raise self._ended(error) from error
            if isinstance(source, _Enveloped):
                await source.hear_out()
                if source.dismissed:
                    raise self._never_started() from error
            raise self._ended(error) from error

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        # As receive(), which this would else be one more call of for each item.
        source = self._source
        if source is None or self._closed:
            source = self._opened()
        try:
            return await source.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        except (CommClosedError, trio.ClosedResourceError, ServerClosing) as error:
            await self._reopen(error)
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    def __repr__(self) -> str:
        return f"<stream of {self._op!r} at {self._address}>"


def _can_stream(comm: BaseComm) -> bool:
    return comm.extension is not None and "streams" in comm.extension.features


class _Enveloped:
    """A stream from a trio_dcore server."""

    def __init__(self, comm: BaseComm, serializers: Sequence[str] | None, deserializers: Sequence[str] | None) -> None:
        extension = comm.extension
        assert extension is not None
        limits = comm.settings.limits
        comm.last_id += 1
        self._allow_pickle = comm.allows_pickle
        self.sent_eof = False
        self.dismissed = False  # the server has not started the request, and closes the comm
        self._lost = False  # the server closes the comm for another reason
        self._substream = Substream(
            comm,
            comm.last_id,
            credit=Credit(*extension.window),
            window=Credit(limits.window, limits.window_bytes),
            on_end=self._server_ended,
            on_map=self._server_lost_track,
            deserializers=deserializers,
        )
        self._serializers = serializers
        self.receive = self._substream.receive  # called for each item

    def request(self, op: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"op": op, **kwargs, "reply": True, KEY: {"id": self._substream.id, "stream": True}}

    def _server_ended(self, kind: int, value: object) -> Exception | None:
        if kind in (END, REPLY):
            return None
        if kind == ERROR:
            return exception_from_value(value, allow_pickle=self._allow_pickle)
        if kind == GOODBYE:
            self.dismissed = True
            return ServerClosing("the server is shutting down and did not start the stream")
        raise RemoteProtocolError(f"an envelope of kind {kind}, which only clients may send")

    def _server_lost_track(self, message: dict[Any, Any]) -> Exception:
        self._lost = True
        return map_error(message, self._allow_pickle)

    async def hear_out(self) -> None:
        """Nothing can be sent any more: find out what the server said before it went, if that is here; it may be why.

        What is found is there for who receives.
        """
        await self._substream.read_what_is_here()

    @property
    def fresh(self) -> bool:
        """Whether nothing of the stream has come or gone, but for the request and maybe our end of it."""
        return self._substream.items_sent == self._substream.items_received == 0

    async def send(self, value: Any) -> None:
        if self.sent_eof:
            raise LocalProtocolError("send() after send_eof()")
        await self._substream.send(value, serializers=self._serializers)

    async def send_eof(self) -> None:
        if self.sent_eof:
            return
        self.sent_eof = True
        if self._substream.deaf:
            return  # there is nobody to tell
        try:
            await self._substream.send_end()
        except BaseException:
            self.sent_eof = False
            raise

    @property
    def reusable(self) -> bool:
        """Whether the next request may follow: all was said, by both sides."""
        substream = self._substream
        if substream.sending:
            return False  # a task goes on with an item that nobody takes, or with the end
        return substream.ended and not (self.dismissed or self._lost) and (substream.items_sent == 0 or self.sent_eof)


class _Plain:
    """A stream from a stock Dask server: bare messages until it closes the connection.

    The request says ``reply: True, close: True``, so that a failed handler is told from one that ended, and the handler's return
    value is the last message: None nearly always, and then not an item.
    """

    reusable = False

    def __init__(self, comm: BaseComm, serializers: Sequence[str] | None, deserializers: Sequence[str] | None) -> None:
        self._comm = comm
        self._deserializers = deserializers
        self._held = False  # a None that is an item if something follows it
        self._ready: deque[Any] = deque()
        self._end: Exception | None = None

    def request(self, op: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"op": op, **kwargs, "reply": True, "close": True}

    async def receive(self) -> Any:
        await checkpoint_if_cancelled()  # a read that need not wait delivers no cancellation
        while not self._ready:
            if self._end is not None:
                raise self._end
            await self._read_one()
        return self._ready.popleft()

    async def _read_one(self) -> None:
        comm = self._comm
        found = await comm.next_head()
        if found is None:
            self._end = trio.EndOfChannel()
            return
        head, frames = found
        message = head if frames is None else await comm.unpack(frames, self._deserializers)
        if self._held:
            self._held = False
            self._ready.append(None)
        if type(message) is dict and message.get("status") == "uncaught-error":
            self._end = exception_from_reply(message, allow_pickle=comm.allows_pickle)
        elif message is None:
            self._held = True
        else:
            self._ready.append(message)

    async def send(self, value: Any) -> None:
        raise LocalProtocolError("a stock Dask server takes no items on a stream; use a raw comm from connect()")

    async def send_eof(self) -> None:
        await self.send(None)
