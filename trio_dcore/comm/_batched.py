"""Message streams, the sending side: many small messages, sent as few lists (wire document, section 7).

``send`` encodes each message at once: one that can't be sent is told there and costs no other, and what is sent is what the
message was then.  A single task writes: it sleeps, without a timer, until there is a message, sends what there is, and from then
on lets at least ``interval`` pass between two batches.  Whoever ends the stream only requests it: the scope round all that the
task does gets a deadline.

A message is at each moment in one of three places: waiting (``unsent``), in the batch that is being written (``maybe_sent``), or
written.  That is how the loss rules are kept: whatever ends the stream leaves every message where it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self

import trio
from trio.lowlevel import ParkingLot, cancel_shielded_checkpoint, checkpoint_if_cancelled

from .._util import to_raise
from ..abc import Comm, family_names
from ..errors import CommClosedError, DcoreError, LimitExceeded, LocalProtocolError
from ._base import BaseComm
from ._interval import parse_interval
from ._outbox import Outbox

__all__ = ["BatchedSend"]

_log = logging.getLogger("trio_dcore.comm")

# send_wait lets other tasks run after so many messages that needed no wait, as a comm's writes do.
_YIELD_MESSAGES = 16
# Where a comm doesn't say (Limits.linger).
_LINGER = 1.0
_ONCE = "a BatchedSend runs once; make another one for the same comm"


class BatchedSend:
    """Sends messages over a comm, many in one list: for streams of small messages that nobody answers.

    The first message after a pause leaves at once, with all else that is sent before the task that writes gets its turn; after
    that there is at most one batch for each ``interval``.  On the other side are ``stream_handlers``, or a reader of lists::

        async with await connect(address) as comm:
            await comm.write({"op": "connection_stream", "reply": False})
            async with BatchedSend(comm) as stream:
                stream.send({"op": "log", "line": "hello"})

    It can also run in a nursery of yours: ``stream = await nursery.start(BatchedSend(comm).run)``, until :meth:`aclose`.

    Leaving the block, also by an exception, sends what waits, for ``Limits.linger`` seconds (1) at most.  If that was too short the
    block raises LimitExceeded; if the comm failed and nobody was told yet, CommClosedError; the block's own exception goes first.
    The comm stays open: it is its owner's, who may also read it, and write to it in between.

    Order is kept, nothing is sent twice, and nothing is lost silently: behind a failure each accepted message was written, or is
    in :attr:`unsent` or :attr:`maybe_sent`.  Written means that the system has taken it; only an answer can tell that it was read.

    Cancellation:
        Of the block, or of :meth:`run`: ends the stream now; what waits stays in :attr:`unsent`.  In the middle of a batch it also
        closes the comm, and the messages of that batch are in :attr:`maybe_sent`.

    Args:
        comm: a comm after its handshake: of :func:`~trio_dcore.connect`, or of a handler.
        interval: seconds, or a text with a unit, such as ``"2ms"``.
        max_buffered: messages that may be accepted and not yet written.
        serializers: families for ``Serialize`` payloads, instead of the comm's own.

    Attributes:
        batch_count: lists written; what is too much for one list (half a MiB of small messages) is several in one batch.
        byte_count: their bytes; on comms without bytes, their number.
    """

    def __init__(
        self,
        comm: Comm,
        interval: float | str = 0.002,
        max_buffered: int = 10_000,
        *,
        serializers: Sequence[str] | None = None,
    ) -> None:
        if max_buffered < 1:
            raise ValueError(f"max_buffered={max_buffered!r}: must be at least 1")
        self.batch_count: int = 0
        self.byte_count: int = 0
        self._written = 0
        self._interval = parse_interval(interval)
        self._max_buffered = max_buffered
        self._outbox = Outbox(comm, family_names("serializers", serializers))
        self._scope = trio.CancelScope()  # round all that the task does
        self._block: AbstractAsyncContextManager[trio.Nursery] | None = None
        self._started = False
        self._idle = False  # the task sleeps until there is a message
        self._closing = False  # no more messages; those that wait are sent
        self._ended = trio.Event()  # the task has ended
        self._failure: Exception | None = None  # why nothing can be sent any more
        self._told = False  # somebody knows
        self._wake = ParkingLot()  # the task sleeps there
        self._room = ParkingLot()  # the first of those who wait for room is there, the others are in the queue
        self._queue = trio.StrictFIFOLock()
        self._queued = 0
        self._unwaited = 0

    # -- sending ----------------------------------------------------------------------------------------------------------------

    def send(self, *msgs: Any) -> None:
        """Accept messages for sending.  Not a checkpoint.

        Before the block is entered they wait for that.  Arrays and other payloads that are sent without a copy must not be changed
        until they are written.

        Raises:
            LimitExceeded: there is no room for all of these messages, or others wait for room: none was accepted.
            SerializationError, UnsafePayload: a message can't be sent; the others of this call were accepted.  Several such errors
                are raised as a group.
            CommClosedError: nothing can be sent any more: none was accepted.
        """
        outbox = self._outbox
        if self._closing or self._failure is not None or not outbox.count or outbox.comm.closed():
            self._check_open()
        if outbox.count + len(msgs) > self._max_buffered or self._queued:
            raise self._full(len(msgs))
        self._accept(msgs)

    async def send_wait(self, *msgs: Any) -> None:
        """Accept messages for sending, as soon as there is room for all of them.  Those who wait get their turn in order.

        Cancellation: none of the messages was accepted.

        Raises:
            LimitExceeded: there would never be room.
            SerializationError, UnsafePayload, CommClosedError: as :meth:`send`; also if the stream ends while this waits.
        """
        await checkpoint_if_cancelled()
        outbox = self._outbox
        most = self._max_buffered - len(msgs)
        if most < 0:
            raise self._full(len(msgs))
        if self._closing or self._failure is not None or not outbox.count or outbox.comm.closed():
            self._check_open()
        if outbox.count <= most and not self._queued:
            self._accept(msgs)
            self._unwaited += 1
            if self._unwaited >= _YIELD_MESSAGES:
                self._unwaited = 0
                await cancel_shielded_checkpoint()
            return
        self._queued += 1
        try:
            async with self._queue:
                while outbox.count > most:
                    self._check_open()
                    await self._room.park()
                self._check_open()
                self._accept(msgs)
        finally:
            self._queued -= 1

    def _accept(self, msgs: tuple[Any, ...]) -> None:
        try:
            if len(msgs) == 1:
                self._outbox.put(msgs[0])
            else:
                self._put_each(msgs)
        finally:
            if self._idle and self._outbox.count:
                self._idle = False
                self._wake.unpark_all()

    def _put_each(self, msgs: tuple[Any, ...]) -> None:
        errors: list[Exception] = []
        for number, message in enumerate(msgs, 1):
            try:
                self._outbox.put(message)
            except DcoreError as error:
                error.add_note(f"Message {number} of {len(msgs)} in one call; the others that can be sent were accepted.")
                errors.append(error)
        failure = to_raise(f"{len(errors)} of {len(msgs)} messages can't be sent", *errors)
        if failure is not None:
            raise failure

    def _check_open(self) -> None:
        if self._failure is None and self._outbox.peer_gone():
            self._fail(CommClosedError(f"the comm to {self.comm.peer_address} was closed"))
        if self._failure is not None:
            self._told = True
            raise CommClosedError(f"nothing more can be sent to {self.comm.peer_address}: {self._failure}") from self._failure
        if self._closing:
            raise CommClosedError("this BatchedSend was closed")

    def _full(self, count: int) -> LimitExceeded:
        seen = self._outbox.count
        others = f", and {self._queued} calls wait for room" if self._queued else ""
        return LimitExceeded(
            f"no room for {count} messages: {seen} are not written to {self.comm.peer_address} yet{others}; send_wait() waits for room, "
            f"BatchedSend(max_buffered=...) is {self._max_buffered}",
            limit="max_buffered",
            value=self._max_buffered,
            seen=seen + count,
        )

    # -- what has become of it --------------------------------------------------------------------------------------------------

    @property
    def message_count(self) -> int:
        """How many messages were accepted."""
        return self._written + self._outbox.count

    @property
    def comm(self) -> Comm:
        """Where it sends to."""
        return self._outbox.comm

    @property
    def unsent(self) -> list[Any]:
        """The messages that were accepted and of which nothing has been written: behind a failure, those that never will be."""
        return self._outbox.unsent

    @property
    def maybe_sent(self) -> list[Any]:
        """The messages of the batch that is being written: behind a failure, of the one that was interrupted in its middle.

        A peer acts on nothing of a message of which it has got a part.  Over a socket it can't have got more, so these may be sent
        again, over another comm; a stream of another kind may have taken all of it before it failed.
        """
        return self._outbox.maybe_sent

    def closed(self) -> bool:
        """Whether nothing more can be sent: this was closed or has failed, or the comm was closed by either side."""
        return self._closing or self._failure is not None or self._outbox.peer_gone()

    def __repr__(self) -> str:
        state = "closed" if self.closed() else f"{self._outbox.count} in buffer"
        return f"<BatchedSend to {self.comm.peer_address}: {state}>"

    # -- life -------------------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start sending.  Not a checkpoint."""
        if self._started or self._block is not None:
            raise LocalProtocolError(_ONCE)
        self._block = trio.open_nursery()
        nursery = await self._block.__aenter__()
        nursery.start_soon(self.run)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Send what waits, and end; the class says what is raised."""
        assert self._block is not None
        self._close_soon()
        if error is not None and not isinstance(error, Exception):
            self._scope.cancel(reason="the block of the BatchedSend was cancelled, or the program ends")
        ours: BaseException | None = None
        try:
            await self._block.__aexit__(None, None, None)  # its task ends by itself, within the time to linger
        except BaseException as raised:
            ours = raised
        if error is None:
            ours = ours or self._loss()
        elif isinstance(error, Exception) and (loss := self._loss()) is not None:
            _log.warning("while another error ends the block of a BatchedSend: %s", loss)
        if ours is None:
            return False
        result = to_raise("the block of a BatchedSend failed", error, ours)
        if result is None or result is error:
            return False
        raise result from None

    async def run(self, *, task_status: trio.TaskStatus[BatchedSend] = trio.TASK_STATUS_IGNORED) -> None:
        """Send what is accepted until closed, aborted or cancelled, or until the comm fails, which is told to those who send.

        For ``stream = await nursery.start(BatchedSend(comm).run)``; a block does it by itself.

        Cancellation: ends the stream now; what waits stays in :attr:`unsent`.
        """
        if self._started:
            raise LocalProtocolError(_ONCE)
        self._started = True
        task_status.started(self)
        try:
            with self._scope:
                await self._send_batches()
        finally:
            if self._outbox.count:
                # If it is no failure of the comm's, which was noted before, it was interrupted.
                overdue = trio.current_time() >= self._scope.deadline
                self._fail(self._too_slow() if overdue else CommClosedError("sending was cancelled"))
            self._closing = True
            self._ended.set()

    async def aclose(self) -> None:
        """Send what waits, for ``Limits.linger`` seconds (1) at most, and end the stream.  The comm stays open.

        Cancellation: ends it at once; what waits stays in :attr:`unsent`.

        Raises:
            LimitExceeded: the peer did not take everything in that time.
            CommClosedError: not everything could be written, and nobody was told yet.
        """
        self._close_soon()
        if self._started or self._block is not None:
            try:
                await self._ended.wait()
            except BaseException:
                self._scope.cancel(reason="closing the BatchedSend was cancelled")
                raise
        else:
            await self.run()
        if (loss := self._loss()) is not None:
            raise loss

    async def close(self) -> None:
        """Dask's name for :meth:`aclose`."""
        await self.aclose()

    def abort(self) -> None:
        """End the stream and its comm at once.  What was not written stays in :attr:`unsent`.  Not a checkpoint."""
        self._told = True
        self._fail(CommClosedError("this BatchedSend was aborted"))
        self.comm.abort()

    def _close_soon(self) -> None:
        """No more messages; the task sends what waits and ends by itself, in time."""
        if not self._closing:
            self._closing = True
            self._scope.deadline = trio.current_time() + self._linger()
        self._wake.unpark_all()
        self._room.unpark_all()

    # -- the task ---------------------------------------------------------------------------------------------------------------

    async def _send_batches(self) -> None:
        outbox = self._outbox
        earliest = -math.inf
        while self._failure is None:
            now = trio.current_time()
            if not outbox:
                if self._closing:
                    return
                self._idle = True
                try:
                    await self._wake.park()
                finally:
                    self._idle = False
            elif now < earliest and not self._closing:
                with trio.move_on_at(earliest):
                    await self._wake.park()
            else:
                earliest = now + self._interval
                if not self._closing:  # then what waits goes as far as it needs no wait, also if there is no time for that
                    await checkpoint_if_cancelled()  # with no interval, and a peer that takes all at once, there is no other
                for _ in range(len(outbox)):
                    if not await self._sent_one():
                        return

    async def _sent_one(self) -> bool:
        """Write one list; False if the comm failed."""
        if self._outbox.peer_gone():
            self._fail(CommClosedError(f"the comm to {self.comm.peer_address} was closed"))
            return False
        try:
            count, size = await self._outbox.write_next()
        except Exception as error:  # whatever it is, it is told to those who send
            self._fail(error)
            return False
        self._written += count
        self.batch_count += 1
        self.byte_count += size
        self._room.unpark_all()
        return True

    def _fail(self, failure: Exception) -> None:
        """Nothing more can be sent: let everybody know who waits."""
        if self._failure is None:
            self._failure = failure
        self._wake.unpark_all()
        self._room.unpark_all()

    def _linger(self) -> float:
        return self.comm.settings.limits.linger if isinstance(self.comm, BaseComm) else _LINGER

    def _too_slow(self) -> LimitExceeded:
        linger = self._linger()
        what = f"{self.comm.peer_address} did not take the last {self._outbox.count} messages within {linger} s"
        return LimitExceeded(f"{what}; change that with Limits(linger=...)", limit="linger", value=linger)

    def _loss(self) -> Exception | None:
        """What to raise for messages that were accepted and not written, unless somebody knows already."""
        count = self._outbox.count
        if not count or self._told or self._failure is None:
            return None
        self._told = True
        if isinstance(self._failure, LimitExceeded):
            return self._failure
        error = CommClosedError(f"{count} messages were not sent to {self.comm.peer_address}: {self._failure}")
        error.__cause__ = self._failure
        return error
