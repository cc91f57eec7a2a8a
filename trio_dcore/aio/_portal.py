"""The portal: where calls of an asyncio program enter trio, and what has to be closed before that trio run may end."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

import trio

from ._carry import Crossing, run_in_trio
from ._errors import PortalClosed

__all__ = ["Lease", "Portal", "current_portal"]

T = TypeVar("T")


def _nothing() -> None:
    """What is under way belongs to who holds the lease, and ends with its trio task."""


#: The portal of the asyncio loop of a trio program; tasks that are started where it is set have it.
current_portal: ContextVar[Portal | None] = ContextVar("trio_dcore.aio.portal", default=None)


class Portal:
    """A way from the asyncio tasks of one event loop into a trio run in the same thread; made by :func:`open_trio`.

    Attributes:
        loop: the event loop.
        nursery: the trio nursery that the calls run in; None: they are system tasks of a trio run that is none of ours.
        thread: which both run in.  Context variables are inherited by other threads, too.
        crossings: the calls that are in trio at the moment.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, nursery: trio.Nursery | None) -> None:
        self.loop = loop
        self.nursery = nursery
        self.thread: int = threading.get_ident()
        self.crossings: set[Crossing] = set()
        #: Called when the last lease has been released, or the last call has ended after that; None where the portal is open as long
        #: as a block lasts.
        self.on_unused: Callable[[], None] | None = None
        #: Likewise, by who can wait for the end of the trio run, if that is what follows.
        self.end_unused: Callable[[], Awaitable[None]] | None = None
        self._leases: set[Lease] = set()
        self._closed = False
        self._empty: trio.Event | None = None  # somebody waits for that

    def settle(self) -> None:
        """Have asyncio-flavoured code that the calling trio task and its children call find the loop.  Not a checkpoint."""
        current_portal.set(self)
        trio_asyncio = sys.modules.get("trio_asyncio")
        if trio_asyncio is not None:
            # It has replaced asyncio.get_running_loop(), which in trio tasks now asks this variable.
            trio_asyncio.current_loop.set(self.loop)

    @property
    def closed(self) -> bool:
        """Whether no more calls are taken."""
        return self._closed

    @property
    def used(self) -> bool:
        """Whether somebody needs it, or is still to be told that what it needed was closed."""
        return bool(self._leases or self.crossings)

    async def run(self, fn: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run a trio coroutine function and return or raise what it does; see :func:`run_in_trio`."""
        return await run_in_trio(self, fn, *args)

    def start(self, fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Crossing:
        """Begin a call: :func:`run_in_trio` is the rest of it.  Not a checkpoint."""
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("this portal belongs to another event loop; each has its own")
        if self._closed:
            raise PortalClosed("the trio run of this event loop has ended; make a new rpc, pool, comm or portal")
        crossing = Crossing(self, fn, args)
        if self.nursery is not None:
            self.nursery.start_soon(crossing.run, name=fn)
        else:
            trio.lowlevel.spawn_system_task(crossing.run, name=fn, context=copy_context())
        self.crossings.add(crossing)
        return crossing

    def lease(self, close: Callable[[], object] = _nothing) -> Lease:
        """Keep the portal open until the lease is released.  Not a checkpoint.

        Args:
            close: closes what needs trio, at once and without waiting; called if the portal is closed before.  By default there is
                nothing to close.
        """
        if self._closed:
            raise PortalClosed("the trio run of this event loop has ended")
        lease = Lease(self, close)
        self._leases.add(lease)
        return lease

    def give_back(self, lease: Lease) -> None:
        """A lease has been released."""
        self._leases.discard(lease)
        if not self._leases and not self._closed and self.on_unused is not None:
            self.on_unused()

    def close_now(self, reason: str = "the portal was closed") -> None:
        """Take no more calls, cancel those in flight, and close what holds a lease.  Not a checkpoint; the nursery ends after it."""
        if self._closed:
            return
        self._closed = True
        try:
            while self._leases:
                self._leases.pop().close()
        finally:
            if self.nursery is not None:
                self.nursery.cancel_scope.cancel(reason=reason)
            else:
                for crossing in self.crossings:
                    crossing.scope.cancel(reason=reason)

    def left(self, crossing: Crossing) -> None:
        """A call has ended."""
        self.crossings.discard(crossing)
        if not self.crossings:
            if self._empty is not None:
                self._empty.set()
            if not self._leases and not self._closed and self.on_unused is not None:
                self.on_unused()

    async def wait_empty(self) -> None:
        """Wait until no call is in trio any more.  Of trio's flavour, for who closes the nursery."""
        while self.crossings:
            self._empty = trio.Event()
            await self._empty.wait()
        self._empty = None

    def ended(self) -> None:
        """The trio run is over: whatever is still in it will never end by itself."""
        self._closed = True
        self._leases.clear()
        for crossing in list(self.crossings):
            crossing.fail(PortalClosed("the trio run of this event loop has ended abnormally"))


class Lease:
    """Somebody who needs the portal."""

    __slots__ = ("_portal", "close")

    def __init__(self, portal: Portal, close: Callable[[], object]) -> None:
        self._portal = portal
        self.close: Callable[[], object] = close

    @property
    def released(self) -> bool:
        """Whether it is not needed any more, by either side."""
        return self not in self._portal._leases

    def release(self) -> None:
        """It is not needed any more.  May be called again."""
        if self in self._portal._leases:
            self._portal.give_back(self)

    async def aclose(self) -> None:
        """Likewise; where this was the last, and no call is in flight, wait until the trio run that is not needed any more has ended."""
        self.release()
        end = self._portal.end_unused
        if end is not None and not self._portal.used:
            await end()

    def drop(self) -> None:
        """Whoever has it is being deleted, in whatever thread: close what it is for, in the loop's."""
        loop = self._portal.loop
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._dropped)

    def _dropped(self) -> None:
        if not self.released:
            self.close()
            self.release()
