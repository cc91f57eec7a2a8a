"""One side of an opted-in request whose items travel as envelopes, under credit (docs/wire-extension.md, sections 5 and 6).

Both ends use this class.  There is no task behind it: whoever needs something of the peer, the next item or credit to send, reads
the comm, and hands what it finds to whoever waits for that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import trio
from trio.lowlevel import ParkingLot, checkpoint_if_cancelled

from ..abc import Comm, Peer
from ..errors import CommClosedError, LocalProtocolError, RemoteProtocolError
from ..protocol._envelope import (
    CANCEL,
    END,
    ERROR,
    GOODBYE,
    ITEM,
    ITEMS,
    PING,
    PONG,
    REPLY,
    WINDOW,
    Credit,
    parse_credit,
    parse_envelope,
)
from ._comm import BaseComm

__all__ = ["Substream", "SubstreamComm"]


class Substream:
    """Items in and out on one request.

    Args:
        comm: carries the envelopes; nobody else may read it meanwhile.
        id: the request's.
        credit: what the peer lets us send at first.
        window: what we let the peer send before it needs more.
        on_end: given the kind and value of the envelope that ended the peer's side (REPLY, ERROR, END, CANCEL or GOODBYE),
            returns the exception that further receives raise, or None for a plain end.
    """

    __slots__ = (
        "_comm",
        "_credit_items",
        "_credit_size",
        "_ended",
        "_failure",
        "_inbox",
        "_on_end",
        "_outstanding_items",
        "_outstanding_size",
        "_reading",
        "_turn",
        "_used_items",
        "_used_size",
        "_window",
        "id",
        "items_sent",
    )

    def __init__(
        self, comm: BaseComm, id: int, *, credit: Credit, window: Credit, on_end: Callable[[int, object], Exception | None]
    ) -> None:
        self._comm = comm
        self.id = id
        self._credit_items = credit.items
        self._credit_size = credit.size
        self._window = window
        self._on_end = on_end
        self._inbox: deque[tuple[Any, int]] = deque()
        self._ended = False
        self._failure: Exception | None = None
        self._outstanding_items = self._outstanding_size = 0  # received, credit not yet given back
        self._used_items = self._used_size = 0  # of these, taken by our user
        self._reading = False
        self._turn = ParkingLot()
        self.items_sent = 0

    @property
    def ended(self) -> bool:
        """Whether the peer has said that nothing more comes."""
        return self._ended

    @property
    def drained(self) -> bool:
        """Whether it has, and all that came was taken."""
        return self._ended and not self._inbox

    async def receive(self) -> Any:
        """The next item.

        Cancellation: no item is lost, unless the comm was in the middle of a message; then it is closed.

        Raises:
            trio.EndOfChannel: the peer ended its side.
            CommClosedError: the comm ended or broke.
        """
        await checkpoint_if_cancelled()
        while not self._inbox:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise trio.EndOfChannel
            await self._read_one()
        value, size = self._inbox.popleft()
        self._used_items += 1
        self._used_size += size
        window = self._window
        if not self._ended and (2 * self._used_items >= window.items or 2 * self._used_size >= window.size):
            self._grant()
        return value

    def _grant(self) -> None:
        """Give the peer back the credit for what was taken; tried again with the next item if there is no room now."""
        try:
            sent = self._comm.write_soon((WINDOW, self.id, (self._used_items, self._used_size)))
        except (CommClosedError, trio.ClosedResourceError):
            return  # the next read says so
        if sent:
            self._outstanding_items -= self._used_items
            self._outstanding_size -= self._used_size
            self._used_items = self._used_size = 0

    async def send(self, value: Any) -> int:
        """Send an item, waiting for credit; returns its size in bytes.

        Cancellation: delivered before the first byte, or it closes the comm.

        Raises:
            CommClosedError: the peer takes no more, or the comm ended.
            SerializationError, UnsafePayload: the item can't be sent; the stream is as it was.
        """
        await checkpoint_if_cancelled()
        while self._credit_items <= 0 or self._credit_size <= 0:
            if self._failure is not None and not isinstance(self._failure, trio.EndOfChannel):
                raise CommClosedError("the other side has ended the stream and takes no more items") from self._failure
            if self._ended:
                raise CommClosedError("the other side has ended the stream and takes no more items")
            await self._read_one()
        self._credit_items -= 1
        try:
            size = await self._comm.put((ITEM, self.id, value))
        except BaseException:
            self._credit_items += 1
            raise
        self._credit_size -= size
        self.items_sent += 1
        return size

    async def send_end(self) -> None:
        """Say that nothing more comes from this side."""
        await checkpoint_if_cancelled()
        await self._comm.put((END, self.id, None))

    async def _read_one(self) -> None:
        """Read one envelope, or wait until another task has."""
        if self._reading:
            await self._turn.park()
            return
        self._reading = True
        try:
            found = await self._comm.next_head()
            if found is None:
                raise CommClosedError(f"{self._comm.peer_address} closed the comm in the middle of a stream")
            head, frames = found
            self._take(*parse_envelope(head if frames is None else self._comm.resolve(frames)))
        except RemoteProtocolError:
            self._comm.abort()
            raise
        finally:
            self._reading = False
            self._turn.unpark_all()

    def _take(self, kind: int, identity: int, value: object) -> None:
        if identity != self.id and kind != GOODBYE:
            if identity < self.id:
                return  # left over from an earlier request on this comm, e.g. credit that crossed its end
            raise RemoteProtocolError(f"an envelope for request {identity} while {self.id} is the last")
        if kind == ITEM:
            self._arrived((value,))
        elif kind == ITEMS:
            if type(value) is not tuple or not value:
                raise RemoteProtocolError("an items envelope must hold a list of at least one item")
            self._arrived(value)
        elif kind == WINDOW:
            credit = parse_credit(value)
            self._credit_items += credit.items
            self._credit_size += credit.size
        elif kind == PING:
            # If there's no room for the answer then bytes of ours are waiting, and they will show that we live.
            self._comm.write_soon((PONG, self.id, None))
        elif kind in (REPLY, ERROR, END, CANCEL, GOODBYE):
            self._ended = True
            self._failure = self._on_end(kind, value)
        # a PONG needs nothing: that it came is the news

    def _arrived(self, values: tuple[Any, ...]) -> None:
        window = self._window
        size = self._comm.last_message_size
        if self._ended:
            raise RemoteProtocolError("an item behind the end of its stream")
        if self._outstanding_items + len(values) > window.items or self._outstanding_size >= window.size:
            raise RemoteProtocolError("more items than the stream's window allows")
        self._outstanding_items += len(values)
        self._outstanding_size += size
        last = len(values) - 1
        for index, value in enumerate(values):
            self._inbox.append((value, size if index == last else 0))


class SubstreamComm(Comm):
    """What a handler gets as ``comm`` on an opted-in request: its writes are items, its reads the client's items.

    Args:
        substream: carries the items.
        comm: the connection underneath.
        refusal: why nothing can be written, where the caller waits for one reply; else empty.
    """

    __slots__ = ("_closed", "_comm", "_refusal", "_substream")

    def __init__(self, substream: Substream, comm: BaseComm, refusal: str = "") -> None:
        self._substream = substream
        self._comm = comm
        self._refusal = refusal
        self._closed = False

    async def write(self, message: Any, *, on_error: str | None = None, serializers: object = None) -> int:
        if self._closed:
            raise CommClosedError("this comm was closed here")
        if self._refusal:
            raise LocalProtocolError(self._refusal)
        return await self._substream.send(message)

    async def send(self, value: Any) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this comm was closed here")
        await self.write(value)

    async def read(self) -> Any:
        if self._closed:
            raise CommClosedError("this comm was closed here")
        try:
            return await self._substream.receive()
        except trio.EndOfChannel:
            raise CommClosedError("the client has ended its side of the stream") from None
        except trio.ClosedResourceError as error:
            raise CommClosedError(str(error)) from error

    async def receive(self) -> Any:
        if self._closed:
            raise trio.ClosedResourceError("this comm was closed here")
        return await self._substream.receive()

    def abort(self) -> None:
        self._closed = True
        self._comm.abort()

    async def aclose(self) -> None:
        """Take and send no more items on this request.  The connection itself goes on: it is the server's."""
        self._closed = True
        await trio.lowlevel.checkpoint()

    def closed(self) -> bool:
        return self._closed or self._comm.closed()

    @property
    def local_address(self) -> str:
        return self._comm.local_address

    @property
    def peer_address(self) -> str:
        return self._comm.peer_address

    @property
    def peer(self) -> Peer:
        return self._comm.peer

    def __repr__(self) -> str:
        return f"<stream {self._substream.id} on {self._comm!r}>"
