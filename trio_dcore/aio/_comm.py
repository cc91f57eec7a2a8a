"""Comms as an asyncio program uses them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

import trio

from .. import abc
from ..client import send_recv as native_send_recv
from ..comm import AddressLike
from ..comm import connect as native_connect
from ._carry import run_in_trio
from ._guest import acquire_portal
from ._options import CommOptions
from ._portal import Lease, Portal

__all__ = ["Comm", "connect", "send_recv"]


class Comm:
    """A :class:`trio_dcore.Comm` for asyncio tasks: its methods are asyncio coroutines, and otherwise the same.

    ``write``/``read``/``close`` are Dask's names; ``send``/``receive``/``aclose`` are the same operations, but that ``receive`` raises
    ``trio.EndOfChannel`` at a clean end, at which ``async for message in comm`` ends.  Any number of tasks may write, one may read.

    Cancellation: of a write: it is delivered before the first byte, or closes the comm.  Of a read: the comm stays usable unless part of
    a message had come; a message that had come whole in that very moment is kept for the next read.

    Made by :func:`connect`, and for handlers with a parameter ``comm``.
    """

    __slots__ = ("__weakref__", "_comm", "_kept", "_lease", "_portal")

    def __init__(self, comm: abc.Comm, portal: Portal, lease: Lease | None = None) -> None:
        self._comm = comm
        self._portal = portal
        self._lease = lease
        self._kept: list[Any] = []  # read by who was cancelled in that very moment

    async def write(self, message: Any, serializers: Sequence[str] | None = None, on_error: str | None = None) -> int:
        """Send one message and return its size in bytes; see :meth:`trio_dcore.Comm.write`."""
        return await run_in_trio(self._portal, partial(self._comm.write, message, on_error=on_error, serializers=serializers))

    async def read(self, deserializers: Sequence[str] | None = None) -> Any:
        """Receive one message; all ends are CommClosedError; see :meth:`trio_dcore.Comm.read`."""
        if self._kept:
            return self._kept.pop()
        return await run_in_trio(self._portal, self._comm.read, deserializers, dispose=self._kept.append)

    async def send(self, value: Any) -> None:
        """Send one message.  As :meth:`write`, but a comm that was closed here raises ``trio.ClosedResourceError``."""
        await run_in_trio(self._portal, self._comm.send, value)

    async def receive(self) -> Any:
        """Receive one message.  As :meth:`read`, but a clean end raises ``trio.EndOfChannel``, and a comm that was closed here
        ``trio.ClosedResourceError``."""
        if self._kept:
            return self._kept.pop()
        return await run_in_trio(self._portal, self._comm.receive, dispose=self._kept.append)

    async def aclose(self) -> None:
        """Close the comm.  Cancelled, it is closed at once."""
        try:
            if not self._comm.closed():
                await run_in_trio(self._portal, self._comm.aclose)
        finally:
            self._comm.abort()
            if self._lease is not None:
                await self._lease.aclose()

    async def close(self) -> None:
        """Dask's name for :meth:`aclose`."""
        await self.aclose()

    def abort(self) -> None:
        """Close at once; what was not sent is lost."""
        self._comm.abort()
        if self._lease is not None:
            self._lease.release()

    def closed(self) -> bool:
        """Whether the comm was closed here, or has been found broken or ended."""
        return self._comm.closed()

    @property
    def local_address(self) -> str:
        """The address of this end."""
        return self._comm.local_address

    @property
    def peer_address(self) -> str:
        """The address of the other end."""
        return self._comm.peer_address

    @property
    def peer(self) -> abc.Peer:
        """Who is at the other end."""
        return self._comm.peer

    @property
    def native(self) -> abc.Comm:
        """The comm of trio's flavour."""
        return self._comm

    @property
    def portal(self) -> Portal:
        """Where it runs."""
        return self._portal

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self, warn: Any = warnings.warn) -> None:
        lease = getattr(self, "_lease", None)
        if lease is not None and not lease.released:
            if not self._comm.closed():
                warn(f"unclosed comm {self!r}", ResourceWarning, source=self)
            lease.drop()

    def __repr__(self) -> str:
        return f"<aio {self._comm!r}>"


async def connect(address: AddressLike, **options: Unpack[CommOptions]) -> Comm:
    """Connect to an address and exchange handshakes; see :func:`trio_dcore.connect`.

    Cancellation: leaves nothing behind.
    """
    portal = await acquire_portal()
    # Held while connecting, too: nobody else may need the portal.
    lease = portal.lease()
    try:
        comm = await run_in_trio(
            portal,
            partial(native_connect, address, **options),
            dispose=lambda comm: comm.abort(),
        )
    except BaseException:
        await lease.aclose()
        raise
    if lease.released:  # the portal was closed in this very moment
        comm.abort()
    lease.close = comm.abort
    return Comm(comm, portal, lease)


async def send_recv(
    comm: Comm,
    *,
    op: str,
    reply: bool = True,
    close: bool = False,
    serializers: Sequence[str] | None = None,
    deserializers: Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Make one request on a comm and return its answer; see :func:`trio_dcore.send_recv`.

    Cancellation: closes the comm, which cancels the handler at a trio_dcore server.
    """
    call = partial(
        native_send_recv,
        comm.native,
        op=op,
        reply=reply,
        close=close,
        serializers=serializers,
        deserializers=deserializers,
        **kwargs,
    )
    return await run_in_trio(comm.portal, call)
