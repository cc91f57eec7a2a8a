"""Items of a generator, several in one message while their consumer is busy.

An item leaves at once, unless all of this is so: at least half of the window is not acknowledged, so that the consumer has not
caught up and would not take it yet; the generator made it quickly; and the system takes what is sent.  Such items are encoded where
they are made, and gathered, until they leave in one message: when the generator waits for anything, or ends; when its credit is
used up; when they are many, or the oldest of them is a tenth of a millisecond old.  Behind each such message other tasks get their
turn.

So while an item is held back no other task runs, and the generator itself does not wait: there is nobody who could cancel it, or
close the comm, or send something else.  All that can hold it back is the generator, by computing: an item that it made in a quick
burst stays here for as long as the step behind it takes, which is time in which the whole server does nothing else, and at most half
a window of items can.  A generator that computes for long should do so in a thread; waiting for that lets them go.
"""

from __future__ import annotations

from time import perf_counter

import trio
from msgpack import packb
from trio.lowlevel import checkpoint_if_cancelled

from ..errors import CommClosedError
from ..protocol._batches import array_header
from ..protocol._context import Buffer
from ..protocol._envelope import ITEM, ITEMS
from ..protocol._errors import TooHeavy
from ._base import BaseComm
from ._comm import FramedComm
from ._substream import Substream

__all__ = ["Gatherer"]

# About as many as can be made while none of them is old.
_MOST_ITEMS = 64
# Bytes that are gathered, and of one item that is; larger ones gain little by it.
_MOST_BYTES = 8 * 1024
_SMALL = 2 * 1024
# Seconds: some times what it takes to make and send an item for nothing but itself.
_QUICK = 100e-6


class Gatherer:
    """Sends the items of one generator.

    Whoever runs it calls :meth:`emit` with each item, :meth:`flush` before it passes on that the generator waits, and at its end.

    Args:
        stream: where they go; nothing else may be sent there but by way of it.
        comm: what carries that.
    """

    __slots__ = (
        "_bytes",
        "_comm",
        "_half_bytes",
        "_half_items",
        "_heads",
        "_item",
        "_items",
        "_last",
        "_most",
        "_since",
        "_stream",
    )

    def __init__(self, stream: Substream, comm: BaseComm) -> None:
        assert isinstance(comm, FramedComm)
        self._stream = stream
        self._comm = comm
        stream.before_sending = self.flush
        self._half_items = stream.credit_items // 2
        self._half_bytes = stream.credit_size // 2
        identity: bytes = packb(stream.id)
        # [kind, id, value] without its value.
        self._item = array_header(3) + packb(ITEM) + identity
        self._items = array_header(3) + packb(ITEMS) + identity
        self._heads: list[Buffer] = []  # what was gathered: frame 0 of each
        self._bytes = 0  # their size
        self._most = 0  # how many there may be
        self._since = 0.0  # when the first was made
        self._last = 0.0  # when the generator began to make the next

    async def emit(self, value: object) -> None:
        """Send an item, or keep it until :meth:`flush`.

        Cancellation: this item is not sent.  Those from before are, and what is left of them is sent before anything else.

        Raises: as :meth:`Substream.send`.
        """
        now = perf_counter()
        slow = now - self._last > _QUICK
        self._last = now
        await checkpoint_if_cancelled()
        heads = self._heads
        if not heads:
            stream = self._stream
            if stream.credit_items <= 0 or stream.credit_size <= 0:
                await stream.wait_for_credit()
                self._since = self._last = perf_counter()
            else:
                self._since = now
            most = self._most = min(stream.credit_items, _MOST_ITEMS)
            comm = self._comm
            busy = stream.credit_items <= self._half_items or stream.credit_size <= self._half_bytes
            large = type(value) is bytes and len(value) > _SMALL  # as others are as well: then their head is copied once more
            if slow or not busy or most == 1 or large or comm._sending or comm._closed or stream.sending or stream.deaf:
                await stream.send(value)
                self._last = perf_counter()
                return
        try:
            frames = self._comm._encoder.encode(value)
        except TooHeavy:
            await self._stream.send(value)  # which has it encoded elsewhere
            self._last = perf_counter()
            return
        head = frames[0]
        size = len(head)
        if len(frames) > 1 or size > _SMALL:
            frames[0] = b"".join((self._item, head))
            await self._stream.send_encoded(frames)
            self._last = perf_counter()
            return
        heads.append(head)
        size = self._bytes = self._bytes + size
        if (
            slow
            or len(heads) >= self._most
            or size >= _MOST_BYTES
            or size >= self._stream.credit_size
            or now - self._since > _QUICK
        ):
            self._push()
            await self._stream.settle()
            self._last = perf_counter()

    @staticmethod
    def is_for(comm: BaseComm) -> bool:
        """Whether joining makes sense there: messages are bytes, and can be sent without a wait while there is room for them."""
        return isinstance(comm, FramedComm) and comm._pump.sends_at_once

    def flush(self) -> None:
        """Send what was gathered.  Not a checkpoint.  What can't be sent any more is lost with the comm; the next item is told."""
        if self._heads:
            try:
                self._push()
            except (CommClosedError, trio.ClosedResourceError):
                pass

    def _push(self) -> None:
        heads = self._heads
        self._heads = []
        self._bytes = 0
        stream = self._stream
        count = len(heads)
        begin = (self._item,) if count == 1 else (self._items, array_header(count))
        head = b"".join((*begin, *heads))
        stream.credit_items -= count
        stream.items_sent += count
        stream.credit_size -= self._comm.push(head, count)
