"""What a :class:`~trio_dcore.BatchedSend` has still to send, encoded, and how one batch of it is written.

Each message is encoded when it is put in, and by itself; the results are joined to one list message when the batch leaves, so
nothing is encoded twice.  Two kinds of comm are different: one without bytes is given a list of the objects, and a handler's view
of an opted-in request, whose items it encodes itself; for that one, encoding here is only a check.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..abc import Comm
from ..protocol._batches import Batch
from ..protocol._encoding import Encoder
from ._base import BaseComm, Unsent
from ._comm import FramedComm
from ._substream_comm import SubstreamComm

__all__ = ["Outbox"]


class _Messages:
    """Messages that will be one list message."""

    __slots__ = ("encoded", "objects")

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.encoded = Batch()


class Outbox:
    """Messages for one comm, in order.

    Attributes:
        comm: where they go.
        count: messages that were put in and not written yet.
    """

    __slots__ = ("_encoder", "_framed", "_hung_up", "_keep", "_serializers", "_unsent", "_waiting", "_writing", "comm", "count")

    def __init__(self, comm: Comm, serializers: tuple[str, ...] | None) -> None:
        self.comm = comm
        self.count = 0
        self._serializers = serializers
        self._framed = comm if isinstance(comm, FramedComm) else None
        self._keep = self._framed is not None
        self._encoder = _encoder_for(comm, serializers)
        self._hung_up = _hang_up_probe(comm)
        self._waiting: deque[_Messages] = deque()  # only to the last something is added
        self._writing: _Messages | None = None
        self._unsent: Unsent | None = None  # what the system has not taken at once of the batch that is being written

    def __len__(self) -> int:
        """How many batches wait."""
        return len(self._waiting)

    @property
    def unsent(self) -> list[Any]:
        """Messages of which nothing has been written."""
        return [message for batch in self._waiting for message in batch.objects]

    @property
    def maybe_sent(self) -> list[Any]:
        """Messages of the batch that is being written, or whose writing was interrupted in its middle."""
        return [] if self._writing is None else list(self._writing.objects)

    def peer_gone(self) -> bool:
        """Whether nothing can be written any more, as far as that can be told."""
        return self.comm.closed() or (self._hung_up is not None and bool(self._hung_up(0)))

    def put(self, message: Any) -> None:
        """Add a message.

        Raises:
            SerializationError, UnsafePayload: it can't be sent; all is as it was.
        """
        waiting = self._waiting
        encoder = self._encoder
        if encoder is None:
            if not waiting:
                waiting.append(_Messages())
            batch = waiting[-1]
        else:
            # Doing this may run anything, also a __del__ that puts another message while this one is being encoded.
            outer = encoder.payloads_before
            before = waiting[-1].encoded.payloads if waiting else 0
            try:
                if before != outer:
                    encoder.payloads_before = before
                batch = self._taken(encoder, message, before)
            finally:
                if before != outer:
                    encoder.payloads_before = outer
        batch.objects.append(message)
        self.count += 1

    def _taken(self, encoder: Encoder, message: Any, before: int) -> _Messages:
        """Encode a message and add it to a batch, which is returned."""
        waiting = self._waiting
        frames = encoder.encode(message)
        if waiting:
            last = waiting[-1]
            if (len(frames) == 1 or last.encoded.payloads == before) and last.encoded.take(frames, self._keep):
                return last
        if len(frames) > 1 and before:
            encoder.payloads_before = 0
            try:
                frames = encoder.encode(message)
            finally:
                encoder.payloads_before = before
        last = _Messages()
        last.encoded.take(frames, self._keep)  # an empty one takes any
        waiting.append(last)
        return last

    async def write_next(self) -> tuple[int, int]:
        """Write the first batch; return how many messages it had, and its size.

        If this raises, also by cancellation, the messages are in :attr:`unsent` if nothing of them has gone, else, and in doubt, in
        :attr:`maybe_sent`.
        """
        batch = self._writing = self._waiting.popleft()
        self._unsent = None
        try:
            size = await self._write(batch)
        except BaseException as error:
            if self._nothing_sent(error):
                self._waiting.appendleft(batch)
                self._writing = None
            raise
        self._writing = None
        count = len(batch.objects)
        self.count -= count
        return count, size

    async def _write(self, batch: _Messages) -> int:
        framed = self._framed
        if framed is not None:
            before = framed.bytes_written
            unsent = self._unsent = framed._start(batch.encoded.frames())
            if unsent is None:
                return framed.bytes_written - before
            await framed.finish(unsent, framed._own_stall())
            return unsent.size
        messages = list(batch.objects)
        if isinstance(self.comm, SubstreamComm):
            return await self.comm.write_batch(messages, self._serializers, self._note)
        return await self.comm.write(messages, on_error="raise", serializers=self._serializers)

    def _note(self, unsent: Unsent | None) -> None:
        self._unsent = unsent

    def _nothing_sent(self, error: BaseException) -> bool:
        if isinstance(self.comm, (BaseComm, SubstreamComm)):
            # It failed before the first of its bytes; or, by reference, where a message is passed whole or not at all.
            return self._unsent is None or not self._unsent.begun
        return getattr(error, "nothing_sent", False) or not self.comm.closed()  # what is interrupted in its middle closes a comm


def _encoder_for(comm: Comm, serializers: tuple[str, ...] | None) -> Encoder | None:
    """An encoder of the outbox's own, since it numbers payloads as they stand in a batch; None for comms that encode nothing."""
    below = comm._comm if isinstance(comm, SubstreamComm) else comm
    if not isinstance(below, FramedComm):
        return None
    context = below._encoder.ctx
    # No thread does it: whoever puts in a message that can't be sent is to be told at once.
    return Encoder(replace(context, offload=None, serializers=context.serializers if serializers is None else serializers))


def _hang_up_probe(comm: Comm) -> Callable[[int], object] | None:
    """A question of one system call: has the peer of an open comm closed it?  None where the system can't tell."""
    fileno = comm.socket_fileno() if isinstance(comm, FramedComm) else None
    if fileno is None or fileno < 0 or not hasattr(select, "POLLRDHUP"):  # Linux has it
        return None
    probe = select.poll()
    probe.register(fileno, select.POLLRDHUP)
    return probe.poll
