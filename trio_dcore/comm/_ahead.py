"""Reading ahead: a ping wants its answer while a handler runs, whatever stands in front of it.

While a handler runs nobody needs what its caller sends, but for pings.  So what comes is read all the same, pings are taken out, and
everything else is kept, in order, for the next reads.  What may be kept is what the caller may have sent without waiting for the
handler: nothing much behind a call, and behind the request of a stream its window, which the last item may overdraw.
"""

from __future__ import annotations

import math
from collections import deque

from trio.lowlevel import cancel_shielded_checkpoint

from ..errors import LimitExceeded, RemoteProtocolError
from ..protocol._context import Buffer
from ..protocol._envelope import GOODBYE, PING, PONG, parse_envelope
from ..protocol._frames import FrameParser
from ..protocol._messages import Decoder
from ._pumps import MESSAGE_WEIGHT, YIELD_BYTES, Pump
from ._watch import READ_AHEAD

__all__ = ["ReadAhead", "find_goodbye"]

# Reads in a row of what nobody waits for.
_MOST_READS = 4
# Messages that are looked at in search of a goodbye: credits and pongs may stand in front of it.
_MOST_BEHIND = 64
# Bytes of frame 0; that of a ping has 12 at most.
_SHORT = 16


class ReadAhead:
    """What was read of one comm before anybody asked for it.

    Args:
        parser: that of the comm.
        decoder: that of the comm.

    Attributes:
        kept: the frames and the size of each message; what comes after an error can't be read.
    """

    __slots__ = ("_behind", "_decoder", "_parser", "_size", "kept")

    def __init__(self, parser: FrameParser, decoder: Decoder) -> None:
        self._parser = parser
        self._decoder = decoder
        self.kept: deque[tuple[list[Buffer], int] | RemoteProtocolError | LimitExceeded] = deque()
        self._size = 0  # of what is kept
        self._behind = 0  # of that, what came when all was kept that may be of any size

    def read(self, id: int, most: int, pump: Pump | None = None) -> tuple[bool, bool]:
        """Keep what has come, but for the pings and pongs of one request.

        Args:
            id: the request's.
            most: bytes that may be kept.  The message that makes it more may be of any size, behind it there is room for small ones.
            pump: where to read more; None is what the parser has.

        Returns (whether there was a ping, whether there is room for more).
        """
        pinged, room = self._sort(id, most)
        for _ in range(_MOST_READS):
            if pump is None or not room or not pump.fill_nowait(self._parser):
                break
            more, room = self._sort(id, most)
            pinged = pinged or more
        return pinged, room

    def _sort(self, id: int, most: int) -> tuple[bool, bool]:
        """Keep the whole messages that the parser has."""
        pinged = False
        parser = self._parser
        try:
            while self._room(most):
                frames = parser.next_message()
                if frames is None:
                    return pinged, self._room(most)
                kind = self._kind(frames, id)
                if kind is None:
                    size = parser.last_size
                    if self._size >= most:
                        self._behind += size
                    self._size += size
                    self.kept.append((frames, size))
                pinged = pinged or kind == PING
        except (RemoteProtocolError, LimitExceeded) as error:
            self.kept.append(error)  # for whoever gets there
        return pinged, False

    def take(self) -> list[Buffer]:
        """The frames of the next message; raises the error that stands in its place."""
        found = self.kept[0]
        if isinstance(found, Exception):
            raise found
        self.kept.popleft()
        frames, self._parser.last_size = found
        self._size -= self._parser.last_size
        self._behind = min(self._behind, self._size)
        return frames

    def put_back(self, frames: list[Buffer], size: int) -> None:
        """Keep a message that was taken, in front of all others."""
        self.kept.appendleft((frames, size))
        self._size += size

    @property
    def ready(self) -> bool:
        """Whether there is a message, and no error in its place."""
        return bool(self.kept) and not isinstance(self.kept[0], Exception)

    async def next_head(self, pump: Pump) -> tuple[object, list[Buffer] | None]:
        """What ``next_head`` of the comm returns, for the next message; there is one."""
        frames = self.take()
        size = self._parser.last_size
        pump.unwaited += MESSAGE_WEIGHT
        if pump.unwaited >= YIELD_BYTES:
            pump.unwaited = 0
            await cancel_shielded_checkpoint()
            self._parser.last_size = size  # meanwhile the watch may have read on
        return self._decoder.head(bytes(frames[0])), frames if len(frames) > 1 or b"__" in bytes(frames[0]) else None

    @property
    def size(self) -> int:
        """Bytes of what is kept, and of what the parser has."""
        return self._size + self._parser.buffered

    def _room(self, most: int) -> bool:
        if self.kept and isinstance(self.kept[-1], Exception):
            return False
        return self._size < most or self._behind + self._parser.buffered + self._parser.received < READ_AHEAD

    def _kind(self, frames: list[Buffer], id: int) -> int | None:
        """PING or PONG if a message is that, for the request; else None."""
        head = frames[0]
        if len(frames) > 1 or len(head) > _SHORT:
            return None
        try:
            message = self._decoder.head(bytes(head))
        except (RemoteProtocolError, LimitExceeded):
            return None  # whoever reads it is told
        if type(message) is tuple and len(message) == 3 and type(message[0]) is type(message[1]) is int and message[1] == id:
            kind: int = message[0]
            return kind if kind in (PING, PONG) else None
        return None


def find_goodbye(parser: FrameParser, pump: Pump, decoder: Decoder) -> float:
    """The id that a goodbye names, if there is one in what is left to read, which is read for that without waiting; else infinity."""
    try:
        for _ in range(_MOST_BEHIND):
            frames = parser.next_message()
            if frames is not None:
                kind, identity, _ = parse_envelope(decoder.head(bytes(frames[0])))
                if kind == GOODBYE:
                    return identity
            elif not pump.fill_nowait(parser):
                break
    except (RemoteProtocolError, LimitExceeded):
        pass  # whatever it is, it is no goodbye
    return math.inf
