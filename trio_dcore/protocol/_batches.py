"""Several messages in one: a list, as Dask's message streams send them (wire document, section 7).

Every message is encoded once, and by itself, so that one that can't be sent costs no other.  A msgpack array is a header and
then its items, so frame 0 of the list is that header and the frames 0 of the messages, joined.  The payload frames follow in
the same order; markers count them from the front of the list, which is what ``Encoder.payloads_before`` is for.
"""

from __future__ import annotations

from struct import Struct

from ._context import Buffer
from ._limits import KiB, MiB

__all__ = ["Batch", "array_header"]

# What a stranger accepts of one message by default is twice as much, or four times (Limits: head, frames, message), and what it
# allows is not known here.  A list this long gains nothing by being longer.
_MOST_HEAD = 512 * KiB
_MOST_PAYLOADS = 256
_MOST_BYTES = 32 * MiB

_array16 = Struct(">BH").pack
_array32 = Struct(">BI").pack


def array_header(count: int) -> bytes:
    """What stands in msgpack in front of so many values that make an array."""
    if count < 16:
        return bytes((0x90 | count,))
    return _array16(0xDC, count) if count < 2**16 else _array32(0xDD, count)


class Batch:
    """Encoded messages that will be one list message.

    Attributes:
        payloads: how many payload frames it has.
    """

    __slots__ = ("_bytes", "_head_bytes", "_heads", "_payload_frames", "payloads")

    def __init__(self) -> None:
        self._heads: list[bytes | bytearray | memoryview] = []
        self._payload_frames: list[Buffer] = []
        self._head_bytes = self._bytes = self.payloads = 0

    def take(self, frames: list[Buffer], keep: bool = True) -> bool:
        """Append a message, given its frames; False if it is too much for this batch, but an empty one takes any.

        Its payload frames are views of the message's own memory, so that must not change until they are sent.

        Args:
            frames: made by an encoder whose ``payloads_before`` was this batch's ``payloads``.
            keep: False if it is only counted, and will be sent in another way.
        """
        head = frames[0]
        head_bytes = self._head_bytes + len(head)
        if len(frames) == 1:
            # Nearly every message: nothing but a head.
            if head_bytes > _MOST_HEAD and self._bytes:
                return False
            self._bytes += len(head)
        else:
            size = self._bytes + sum(memoryview(frame).nbytes for frame in frames)
            payloads = self.payloads + len(frames) - 1
            if self._bytes and (head_bytes > _MOST_HEAD or payloads > _MOST_PAYLOADS or size > _MOST_BYTES):
                return False
            self._bytes = size
            self.payloads = payloads
            if keep:
                self._payload_frames += frames[1:]
        self._head_bytes = head_bytes
        if keep:
            self._heads.append(head)
        return True

    def frames(self) -> list[Buffer]:
        """The frames of the list."""
        return [b"".join((array_header(len(self._heads)), *self._heads)), *self._payload_frames]
