"""One side of an opted-in request whose items travel as envelopes, under credit (docs/wire-extension.md, sections 5 and 6).

Both ends use this class.  There is no task behind it: whoever needs something of the peer, the next item or credit to send, reads
the comm, and hands what it finds to whoever waits for that.  A send that has to wait until the peer reads more needs something of
it as well: the peer may itself wait in a send.  So both read meanwhile, what they find is kept, and the windows bound it; else
traffic that the windows allow would stop for ever when both directions are full.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from trio.lowlevel import ParkingLot, cancel_shielded_checkpoint, checkpoint_if_cancelled, current_task

from ..errors import (
    CommClosedError,
    DcoreError,
    LimitExceeded,
    RemoteProtocolError,
    SerializationError,
    UnsafePayload,
)
from ..protocol._context import Buffer
from ..protocol._envelope import (
    END,
    GOODBYE,
    ITEM,
    ITEMS,
    PING,
    PONG,
    WINDOW,
    Credit,
    parse_credit,
    parse_envelope,
)
from ._base import BaseComm, Unmade, Unsent
from ._comm import FramedComm
from ._pace import stalled

__all__ = ["Substream"]

# Items that came in one message with others let other tasks run after so many, as messages do (architecture document, section 3.2).
_YIELD_ITEMS = 16
# Messages behind which something may stand that has come in time, when this process had none to look; it is not looked for further.
_MOST_BEHIND = 64
# Of a very large window credit comes back before half of it is used: a grant may not be larger than twice this.
_MOST_GRANTED = 2**39
# Seconds that a task gets to let go of the comm: it only has to have its turn.
_LET_GO = 10.0


class _Unreadable:
    """Stands in the place of an item whose payload can't be read; taking it raises."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


class Substream:
    """Items in and out on one request.

    Args:
        comm: carries the envelopes; nobody else may read it meanwhile.
        id: the request's.
        credit: what the peer lets us send at first.
        window: what we let the peer send before it needs more.
        on_end: given the kind and value of the envelope that ended the peer's side (REPLY, ERROR, END, CANCEL or GOODBYE),
            returns the exception that further receives raise, or None for a plain end; raises RemoteProtocolError if the peer may
            not send that.
        half_close: an END from the peer ends its items only: it still takes ours.  A client's does; a server's ends the request.
        on_map: given a message that is a map, where the peer may answer with one, returns what on_end returns.
        deserializers: families accepted in payloads; None for the comm's own.
        owner: the task that reads the comm again when the request has ended; others may still use the stream then, and are told by
            :meth:`detach`.
    """

    __slots__ = (
        "_check_at",
        "_comm",
        "_deaf",
        "_deserializers",
        "_detached",
        "_ended",
        "_ends",
        "_failure",
        "_freed",
        "_half_close",
        "_half_items",
        "_half_size",
        "_inbox",
        "_on_end",
        "_on_map",
        "_outstanding_items",
        "_outstanding_size",
        "_owner",
        "_reading",
        "_receiving",
        "_senders",
        "_strays",
        "_taken",
        "_turn",
        "_unyielded",
        "_used_items",
        "_used_size",
        "_window",
        "before_sending",
        "credit_items",
        "credit_size",
        "id",
        "items_sent",
        "sending",
    )

    def __init__(
        self,
        comm: BaseComm,
        id: int,
        *,
        credit: Credit,
        window: Credit,
        on_end: Callable[[int, object], Exception | None],
        half_close: bool = False,
        on_map: Callable[[dict[Any, Any]], Exception | None] | None = None,
        owner: trio.lowlevel.Task | None = None,
        deserializers: Sequence[str] | None = None,
    ) -> None:
        self._comm = comm
        self._deserializers = deserializers
        self.id: int = id
        self._owner = owner
        self._detached = ""  # why nothing goes in or out any more
        self._strays: set[trio.CancelScope] = set()  # round what tasks other than the owner read
        self._freed = ParkingLot()  # the owner waits there until they have let go
        #: Called, if not None, before anything is sent.
        self.before_sending: Callable[[], None] | None = None
        self.credit_items: int = credit.items
        self.credit_size: int = credit.size
        self._window = window
        self._on_end = on_end
        self._half_close = half_close
        self._on_map = on_map
        self._inbox: deque[Any] = deque()
        self._ends: deque[tuple[int, int]] = deque()  # of each message in it: how many have come up to its last item; its size
        self._ended = False  # the peer sends no more items
        self._deaf = False  # the peer takes no more items
        self._failure: Exception | None = None
        self._outstanding_items = self._outstanding_size = 0  # received, credit not yet given back
        self._used_items = self._used_size = 0  # of these, taken by our user
        self._half_items = min((window.items + 1) // 2, _MOST_GRANTED)
        self._half_size = min((window.size + 1) // 2, _MOST_GRANTED)
        self._taken = 0  # items, since the beginning
        self._check_at = math.inf  # when so many are taken there is credit to account for
        self._unyielded = 0
        self._receiving = False  # a receive waits
        self._reading = False  # a receive or a send reads the comm
        self._turn = ParkingLot()  # those who wait for what the reader finds
        self.sending: bool = False
        self._senders = ParkingLot()  # those who wait for their turn to send
        self.items_sent: int = 0

    def detach(self, why: str) -> None:
        """The request has ended: nothing more goes in or out, and whoever reads the comm lets go of it.  Not a checkpoint.

        Tasks that its handler left behind get CommClosedError, but for one in the middle of a message: that is sent.
        """
        self._detached = why
        self._ended = self._deaf = True
        self._failure = CommClosedError(why)
        for stray in self._strays:
            stray.cancel(reason=why)
        self._turn.unpark_all()

    @property
    def held(self) -> bool:
        """Whether a task that :meth:`detach` has told to let go of the comm has still to do so."""
        return bool(self._strays)

    async def wait_free(self) -> None:
        """Wait until nobody reads the comm any more: a step or two of the tasks that were told."""
        # Their reads can be interrupted at any time, so this ends by itself; the deadline is for a foreign stream that does not.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _LET_GO):
            while self._strays:
                await self._freed.park()
        if self._strays:
            self._comm.abort()

    @property
    def items_received(self) -> int:
        """How many have come."""
        return self._taken + len(self._inbox)

    @property
    def ended(self) -> bool:
        """Whether the peer has said that nothing more comes."""
        return self._ended

    @property
    def deaf(self) -> bool:
        """Whether the peer takes no more items."""
        return self._deaf

    async def receive(self) -> Any:
        """The next item.

        Cancellation: no item is lost, unless the comm was in the middle of a message; then it is closed.

        Raises:
            trio.EndOfChannel: the peer ended its side.
            trio.BusyResourceError: another task waits for an item.
            CommClosedError: the comm ended or broke.
            SerializationError, UnsafePayload, TypeError: this item can't be read; the next one can.
        """
        if not self._inbox:
            await self._wait_for_item()
        else:
            await checkpoint_if_cancelled()
            self._unyielded += 1
        value = self._inbox.popleft()
        taken = self._taken = self._taken + 1
        if taken >= self._check_at:
            self._account()
        if self._unyielded >= _YIELD_ITEMS:
            self._unyielded = 0
            await cancel_shielded_checkpoint()
        if type(value) is _Unreadable:
            raise value.error
        return value

    async def _wait_for_item(self) -> None:
        await checkpoint_if_cancelled()
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this stream")
        self._receiving = True
        try:
            while not self._inbox:
                if self._failure is not None:
                    raise self._failure
                if self._ended:
                    raise trio.EndOfChannel
                await self._read_one()
                if not self._inbox and not self._ended:
                    await checkpoint_if_cancelled()  # a read that need not wait delivers no cancellation, and more may be here
        finally:
            self._receiving = False

    def _account(self) -> None:
        """Credit comes back message by message: a message counts for its bytes when its last item was taken."""
        taken = self._taken
        ends = self._ends
        while ends and ends[0][0] <= taken:
            self._used_size += ends.popleft()[1]
        used = self._used_items = self._outstanding_items - len(self._inbox)
        if not self._ended and (used >= self._half_items or self._used_size >= self._half_size):
            self._grant()
        self._check_later()

    def _check_later(self) -> None:
        # At the end of a message, and as soon as half of the window is used; if a grant is still owed, that is with the next item.
        half = self._taken + max(1, self._half_items - (self._outstanding_items - len(self._inbox)))
        self._check_at = min(half, self._ends[0][0]) if self._ends else half

    def _grant(self) -> None:
        """Give the peer back the credit for what was taken; tried again with the next item if far too much waits to be sent."""
        try:
            sent = self._comm.write_soon((WINDOW, self.id, (self._used_items, self._used_size)))
        except (CommClosedError, trio.ClosedResourceError):
            return  # the next read says so
        if sent:
            self._outstanding_items -= self._used_items
            self._outstanding_size -= self._used_size
            self._used_items = self._used_size = 0

    async def send(
        self,
        value: Any,
        *,
        on_error: str | None = None,
        serializers: Sequence[str] | None = None,
        on_start: Callable[[Unsent | None], None] | None = None,
    ) -> int:
        """Send an item, waiting for credit; returns its size in bytes.

        Args:
            value: the item.
            on_error: as for :meth:`Comm.write`; None is "raise".
            serializers: likewise.
            on_start: called, synchronously, when there was credit, with what is left to do for the item.

        Cancellation: delivered before the first byte, or it closes the comm.

        Raises:
            CommClosedError: the peer takes no more, or the comm ended.
            LimitExceeded: the peer has taken nothing, or given no credit, for ``Limits.stream_stall``; the comm was closed.
            SerializationError, UnsafePayload: the item can't be sent; the stream is as it was.
        """
        comm = self._comm

        def start() -> Unsent | None:
            unsent = comm.start((ITEM, self.id, value), serializers, on_error)
            if on_start is not None:
                on_start(unsent)
            return unsent

        return await self._send(start)

    async def send_encoded(self, frames: list[Buffer]) -> int:
        """:meth:`send` an item, given the frames of its envelope."""
        comm = self._comm
        assert isinstance(comm, FramedComm)
        return await self._send(lambda: comm._start(frames))

    async def _send(self, start: Callable[[], Unsent | None]) -> int:
        await checkpoint_if_cancelled()
        await self._begin_sending()
        try:
            if not self._has_credit:
                await self._wait_for_credit()
            self._check_heard()
            self.credit_items -= 1
            comm = self._comm
            before = comm.bytes_written
            try:
                unsent = start()
                if unsent is not None:
                    await self._finish(unsent, "stream_stall")
            except BaseException:
                self.credit_items += 1
                raise
            if comm.by_reference:  # there, only items are counted
                size = 1
            else:
                size = comm.bytes_written - before if unsent is None else unsent.size
                self.credit_size -= size
        finally:
            self._end_sending()
        self.items_sent += 1
        return size

    def _check_heard(self) -> None:
        if self._detached:
            raise CommClosedError(self._detached)
        if self._deaf:
            raise CommClosedError("the other side has ended the stream and takes no more items") from self._failure

    @property
    def _has_credit(self) -> bool:
        return self.credit_items > 0 and self.credit_size > 0

    async def wait_for_credit(self) -> None:
        """Wait until an item may be sent.  Raises as :meth:`send` does."""
        await self._begin_sending()
        try:
            await self._wait_for_credit()
            self._check_heard()
        finally:
            self._end_sending()

    async def settle(self) -> None:
        """Wait until all that was pushed behind the stream's back is sent, and let others run where that is due.

        Cancellation, and what this raises: as :meth:`send`, but no item is lost unless the comm is.
        """
        comm = self._comm
        assert isinstance(comm, FramedComm)
        await self._begin_sending()
        try:
            if comm._sending and not self._deaf:
                await _while_reading(lambda: comm.settle("stream_stall"), self._read_ahead)
            else:
                await comm.settle("stream_stall")
        finally:
            self._end_sending()

    async def _wait_for_credit(self) -> None:
        """Wait until there is enough, or no use for it; any credit is progress, and nothing else that comes."""
        seconds = self._comm.settings.limits.stream_stall
        due = math.inf if seconds is None else trio.current_time() + seconds
        late = 0
        while not (self._has_credit or self._deaf):
            await checkpoint_if_cancelled()  # as in _wait_for_item
            if seconds is None:
                await self._read_one()
                continue
            before = self.credit_items, self.credit_size
            with trio.CancelScope(deadline=due) as scope:
                await self._read_one()
            if before != (self.credit_items, self.credit_size):
                due = trio.current_time() + seconds
                late = 0
            elif trio.current_time() >= due:
                late += 1
            if scope.cancelled_caught or late > _MOST_BEHIND:
                error = stalled(self._comm.peer_address, "stream_stall", seconds)
                self._comm.give_up(error)
                raise error

    async def send_end(self) -> None:
        """Say that nothing more comes from this side, behind the items that are being sent."""
        await checkpoint_if_cancelled()
        await self._begin_sending()
        try:
            unsent = self._comm.start((END, self.id, None))
            if unsent is not None and self._half_close:
                # A server's is the final word: what comes behind it belongs to the next request, and is not for us to read.
                await self._comm.finish(unsent, "write_stall")
            elif unsent is not None:
                await self._finish(unsent, "stream_stall")
        finally:
            self._end_sending()

    async def _finish(self, unsent: Unsent, stall: str) -> None:
        """Send the rest of a message, and read until it is sent."""
        if (unsent.sent == unsent.size and type(unsent) is not Unmade) or self._deaf:  # then it is for the peer to read
            await self._comm.finish(unsent, stall)
        else:
            await _while_reading(lambda: self._comm.finish(unsent, stall), self._read_ahead)

    async def _read_ahead(self) -> None:
        while not self._deaf:  # behind that may stand what belongs to another request
            await checkpoint_if_cancelled()  # as in _wait_for_item
            await self._read_one(ahead=True)

    async def read_what_is_here(self) -> None:
        """Read without waiting; what is found is kept, also if it is the end.  Does nothing while another task reads."""
        with trio.CancelScope() as scope:
            scope.cancel(reason="nothing more is here")
            try:
                for _ in range(_MOST_BEHIND):
                    if self._deaf or self._reading:
                        break
                    await self._read_one(ahead=True)
            except (DcoreError, trio.ClosedResourceError, TypeError):
                pass  # whoever receives next is told

    async def _begin_sending(self) -> None:
        """Wait for our turn: only when one item has left is it known what credit there is for the next."""
        if self.sending:
            await self._senders.park()  # woken by whoever has the turn, and then it is ours
        self.sending = True
        if self.before_sending is not None:
            self.before_sending()

    def _end_sending(self) -> None:
        if self._senders:
            self._senders.unpark()
        else:
            self.sending = False

    async def _read_one(self, ahead: bool = False) -> None:
        """Read one envelope, or wait until another task has; ``ahead`` as for ``next_head``."""
        if self._reading:
            await self._turn.park()
            return
        if self._detached:
            raise CommClosedError(self._detached)
        self._reading = True
        try:
            if self._owner is None or current_task() is self._owner:
                found = await self._comm.next_head(ahead)
                if found is not None:
                    message, frames = found
                    if frames is not None:
                        message = await self._resolve(message, frames)
            else:
                # It may outlive the request, and must then let go of the comm at once, wherever it is.
                with trio.CancelScope() as stray:
                    self._strays.add(stray)
                    try:
                        found = await self._comm.next_head(ahead=True)
                        if found is not None:
                            message, frames = found
                            if frames is not None:
                                message = await self._resolve(message, frames)
                    finally:
                        self._strays.discard(stray)
                        if self._detached and not self._strays:
                            self._freed.unpark_all()
                if self._detached and (stray.cancelled_caught or found is None):
                    return
            if found is None:
                raise CommClosedError(f"{self._comm.peer_address} closed the comm in the middle of a stream")
            if type(message) is dict and self._on_map is not None:
                self._failure = self._on_map(message)
                self._ended = self._deaf = True
            else:
                self._take(*parse_envelope(message))
        except (RemoteProtocolError, LimitExceeded):
            self._comm.abort()
            raise
        finally:
            self._reading = False
            self._turn.unpark_all()

    async def _resolve(self, head: object, frames: list[Buffer]) -> object:
        """The message with its payloads; one that can't be read is an error for whoever takes it, not for whoever finds it."""
        try:
            return await self._comm.unpack(frames, self._deserializers)
        except (SerializationError, UnsafePayload, TypeError) as error:
            if type(head) is dict:
                raise
            kind, identity, value = parse_envelope(head)
            unreadable = _Unreadable(error)
            if kind == ITEMS and type(value) is tuple:
                return kind, identity, (unreadable,) * len(value)
            return kind, identity, unreadable

    def _take(self, kind: int, identity: int, value: object) -> None:
        if identity > self.id:
            raise RemoteProtocolError(f"an envelope for request {identity} while {self.id} is the last")
        if identity < self.id and kind != GOODBYE:
            return  # left over from an earlier request on this comm, e.g. credit that crossed its end
        if kind == ITEM:
            self._arrived((value,))
        elif kind == ITEMS:
            if type(value) is not tuple or not value:
                raise RemoteProtocolError("an items envelope must hold a list of at least one item")
            self._arrived(value)
        elif kind == WINDOW:
            credit = parse_credit(value)
            self.credit_items += credit.items
            self.credit_size += credit.size
        elif kind == PING:
            self._comm.write_soon((PONG, self.id, None))
        elif kind != PONG:  # which needs nothing: that it came is the news
            if kind == GOODBYE and identity == self.id:
                raise RemoteProtocolError("a goodbye in answer to the request that it names as taken up")
            failure = self._on_end(kind, value)
            self._ended = True
            self._deaf = self._deaf or kind != END or not self._half_close
            self._failure = value.error if type(value) is _Unreadable else failure

    def _arrived(self, values: tuple[Any, ...]) -> None:
        window = self._window
        size = self._comm.last_message_size
        if self._ended:
            raise RemoteProtocolError("an item behind the end of its stream")
        if self._outstanding_items + len(values) > window.items or self._outstanding_size >= window.size:
            raise RemoteProtocolError("more items than the stream's window allows")
        self._outstanding_items += len(values)
        self._outstanding_size += size
        self._inbox.extend(values)
        self._ends.append((self._taken + len(self._inbox), size))
        self._check_later()


async def _while_reading(write: Callable[[], Awaitable[None]], read: Callable[[], Awaitable[None]]) -> None:
    """Write, and read until that is done.

    Cancellation: is the write's.  The read must be one that may be interrupted at any time.

    Raises what the first of the two raised; the other, whose failure would only be a consequence, is cancelled.
    """
    failure: BaseException | None = None
    writing = trio.CancelScope()
    reading = trio.CancelScope(shield=True)  # what cancels us is for the write alone: one that is done was not cancelled

    def note(error: BaseException) -> None:
        nonlocal failure
        if failure is None or not isinstance(error, (Exception, trio.Cancelled)):  # KeyboardInterrupt wins
            failure = error

    async def read_on() -> None:
        try:
            with reading:
                await read()
        except BaseException as error:
            note(error)
            writing.cancel(reason="reading meanwhile has failed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_on)
        # Not a task of its own: nothing may come between the part of the message that is sent and its rest.
        try:
            with writing:
                await write()
        except BaseException as error:
            note(error)
        reading.cancel(reason="the message is sent")
        # That ends at once.  A cancellation that comes meanwhile must not unsay that the message is sent.
        nursery.cancel_scope.shield = True
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None  # it refers to this frame
