"""What a handler gets as ``comm`` on an opted-in request (docs/wire-extension.md, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import trio

from ..abc import Comm, Peer
from ..errors import CommClosedError, LocalProtocolError
from ._base import BaseComm, Unsent
from ._substream import Substream

__all__ = ["SubstreamComm"]

_CLOSED_HERE = "this comm was closed here"


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
        self._closed = ""  # why, once it is

    async def write(self, message: Any, *, on_error: str | None = None, serializers: Sequence[str] | None = None) -> int:
        try:
            return await self._write(message, on_error, serializers)
        except trio.ClosedResourceError as error:
            raise CommClosedError(str(error)) from error

    async def send(self, value: Any) -> None:
        await self._write(value, None, None)

    async def write_batch(
        self, messages: list[Any], serializers: Sequence[str] | None, on_start: Callable[[Unsent | None], None]
    ) -> int:
        """:meth:`write` for a BatchedSend; ``on_start`` as for :meth:`Substream.send`."""
        try:
            return await self._write(messages, "raise", serializers, on_start)
        except trio.ClosedResourceError as error:
            raise CommClosedError(str(error)) from error

    async def _write(
        self,
        message: Any,
        on_error: str | None,
        serializers: Sequence[str] | None,
        on_start: Callable[[Unsent | None], None] | None = None,
    ) -> int:
        self._check_open()
        if self._refusal:
            raise LocalProtocolError(self._refusal)
        return await self._substream.send(message, on_error=on_error or "message", serializers=serializers, on_start=on_start)

    async def read(self, deserializers: Sequence[str] | None = None) -> Any:
        if deserializers is not None:
            raise LocalProtocolError(
                "read(deserializers=...) on a stream, whose items are read when they come; use Server(deserializers=...)"
            )
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise CommClosedError("the client has ended its side of the stream") from None
        except trio.ClosedResourceError as error:
            raise CommClosedError(str(error)) from error

    async def receive(self) -> Any:
        self._check_open()
        return await self._substream.receive()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(self._closed)

    def abort(self) -> None:
        self._closed = self._closed or _CLOSED_HERE
        self._comm.abort()

    async def aclose(self) -> None:
        """Take and send no more items on this request.  The connection itself goes on: it is the server's."""
        self._closed = self._closed or _CLOSED_HERE
        await trio.lowlevel.checkpoint()

    def detach(self) -> None:
        """The request has ended, and with it this view of the connection.  Not a checkpoint."""
        why = "the request that this comm belonged to has ended"
        self._closed = self._closed or why
        self._substream.detach(why)

    def closed(self) -> bool:
        return bool(self._closed) or self._comm.closed()

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
