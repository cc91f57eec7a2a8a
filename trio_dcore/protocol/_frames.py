"""Framing: frames to bytes and back (wire document, section 2).

One message on a byte stream::

    u64 outer | u64 n | n x u64 length | frame 0 | frame 1 | ... | frame n-1

``outer`` counts what follows it up to the end of some leading frame; it is a hint about memory, not the length of the message.  A
peer may count all frames, some, or none, and anything inside ``outer`` behind the last frame is ignored.  All numbers are
little-endian.

How the parser works
--------------------
It is a pull parser.  The owner asks :meth:`FrameParser.next_message`; on None it reads more, either any bytes that come and hands
them to :meth:`~FrameParser.feed`, or, where :meth:`~FrameParser.want` offers a buffer, straight into that buffer, so that a large
payload is written to its final place by the kernel and never copied.  Nothing is allocated from a peer's number before that
number has been compared with the limits; buffers above 1 MiB are anonymous mappings, which take memory only as bytes arrive.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from struct import Struct

from ._context import Buffer
from ._errors import LimitExceeded, RemoteProtocolError
from ._limits import KiB, Limits, MiB

__all__ = ["HANDSHAKE", "FrameParser", "allocate", "join_small", "looks_like", "pack_prelude", "single_frame"]

_U64 = Struct("<Q")
_HEAD = Struct("<QQ")
_SINGLE = Struct("<QQQ")
_pack_single = _SINGLE.pack
_unpack_single = _SINGLE.unpack_from

# A frame or prelude of at least this size that is not all here yet is gathered in a buffer of its own, so that many small chunks
# don't have what came before them copied again and again.
_GATHER = 4 * KiB
# While this much of it is missing, the transport is asked to fill the buffer in place.
_DIRECT = 64 * KiB
# Above this a buffer is an anonymous mapping, which takes memory only as bytes arrive, and which costs no zeroing ahead of time.
_LAZY = 1 * MiB
# Frames of at least this size that ``outer`` counts, one behind the other, lie in one buffer: they are pieces of one array, and need no
# copying to be that again.
_PIECE = 1 * MiB
# From here huge pages pay: they cut the page faults that otherwise bound the rate (measured, see docs/performance notes).
_HUGE = 4 * MiB
# Windows has no flags.  Elsewhere the default is a mapping that is shared with forked children, who would change our memory by
# writing to theirs, and whose pages come from the file cache, at a tenth of the rate (measured: 700 against 8000 MB/s at 64 MiB).
_FLAGS = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
# Shorter than this, all of a message's buffers are joined and sent at once; a copy is cheaper than a longer iovec.
JOIN_BELOW = 128 * KiB
#: Bytes that the first message of a comm may have.  A stock handshake has some 50 and ours 200; one with as many and as long names of
#: features as may be has 4 KiB.  It is also less than any number that starts like a TLS record, or like three letters.
HANDSHAKE = 64 * KiB

# The preface of HTTP/2 is the method PRI.
_HTTP = (b"GET ", b"POST ", b"PUT ", b"HEAD ", b"OPTIONS ", b"DELETE ", b"PATCH ", b"CONNECT ", b"TRACE ", b"PRI ", b"HTTP/")
_TEXT = frozenset(b"\t\r\n").union(range(32, 127))


def allocate(size: int) -> memoryview:
    """Return ``size`` writable bytes; above 1 MiB they take memory only as they are written."""
    if size <= _LAZY:
        return memoryview(bytearray(size))
    mapping = mmap.mmap(-1, size, **_FLAGS)
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # pragma: no cover - kernels built without huge pages; they are only ever an optimisation
            pass
    return memoryview(mapping)


def _allocated(size: int) -> memoryview:
    try:
        return allocate(size)
    except (OverflowError, OSError, MemoryError) as exc:  # only without limits, or with too high ones
        raise RemoteProtocolError(f"no memory can be had for a frame of {size} bytes: {exc}") from exc


def _nbytes(frame: Buffer) -> int:
    if type(frame) is bytes or type(frame) is bytearray:
        return len(frame)
    return memoryview(frame).nbytes


def single_frame(frame: bytes) -> bytes:
    """The bytes of a message that has only frame 0: the hot path of small calls."""
    size = len(frame)
    return _pack_single(size + 16, 1, size) + frame


def pack_prelude(frames: Sequence[Buffer]) -> bytes:
    """What goes on the wire before the frames themselves.

    ``outer`` follows the rule of a stock sender (``distributed.comm.tcp.TCP.write``), so that a stock receiver lays its memory
    out as it does for its own kind: frames that are ``bytes`` are counted; the first other buffer only if what stands before it
    is at most max(2 KiB, 5 % of it), with the following pieces of that same buffer; a second distinct buffer ends the count.
    """
    lengths = [_nbytes(frame) for frame in frames]
    count = len(lengths)
    counted = 0
    shared: object = None
    for frame, length in zip(frames, lengths, strict=True):
        owner = frame.obj if type(frame) is memoryview else frame
        if not isinstance(owner, bytes):
            if shared is None:
                if counted > max(2 * KiB, length // 20):
                    break
                shared = owner
            elif shared is not owner:
                break
        counted += length
    return Struct(f"<{count + 2}Q").pack(8 + 8 * count + counted, count, *lengths)


def join_small(prelude: bytes, frames: Sequence[Buffer]) -> list[Buffer]:
    """The buffers to send, joined to one where that is cheaper; large payloads pass through untouched."""
    total = sum(map(_nbytes, frames))
    if total < JOIN_BELOW or (total < 32 * MiB and total // len(frames) < 32 * KiB):
        return [b"".join((prelude, *frames))]
    joined: list[Buffer] = []
    pending: list[Buffer] = [prelude]
    for frame in frames:
        size = _nbytes(frame)
        if size < 32 * KiB:
            if size:
                pending.append(frame)
            continue
        if pending:
            joined.append(b"".join(pending))
            pending = []
        joined.append(memoryview(frame).cast("B"))
    if pending:
        joined.append(b"".join(pending))
    return joined


def looks_like(data: bytes) -> str | None:
    """What the first bytes of a connection look like, if they aren't ours: "TLS", "HTTP", "SSH" or "text"; None if like nothing known.

    Three bytes are enough for an answer, more make it a better one.
    """
    if len(data) < 3:
        return None
    if data[0] in (0x15, 0x16) and data[1] == 3 and data[2] <= 4:  # a record: an alert or a handshake, SSL 3 to TLS 1.3
        return "TLS"
    if any(data.startswith(word) or word.startswith(data) for word in _HTTP):
        return "HTTP"
    if data.startswith(b"SSH-") or data == b"SSH":
        return "SSH"
    return "text" if _TEXT.issuperset(data[:64]) else None


def _never() -> bool:
    return False


class FrameParser:
    """Bytes in, lists of frames out.

    Frame 0 is ``bytes``; the others are writable memory of their own (``bytearray`` or ``memoryview``), so that arrays made over
    them may be changed and none keeps another alive.  Only large frames that their sender counts in ``outer`` lie in one buffer, as they do
    at a stock receiver: Dask sends an array above 64 MiB in such pieces.

    Args:
        limits: what is accepted; ``message``, ``head`` and ``frames`` are used here.
        trusted: asked once, and only if a message is larger than a stranger's may be, whether the ``*_trusted`` limits hold.
        first: bytes that the first message may have, whatever the limits are; None if it is like any other.  With a number, what can't
            be a first message is refused as soon as enough of it has come, and the error says what it looks like.

    Raises (from :meth:`next_message`):
        RemoteProtocolError: the numbers contradict each other, or no memory can be had for them.
        LimitExceeded: a number is over its limit; nothing was allocated for it.

    After either the stream position is lost: close the connection.
    """

    __slots__ = (
        "_buffer",
        "_count",
        "_counted",
        "_filled",
        "_first",
        "_frames",
        "_frames_limit",
        "_gathered",
        "_head_limit",
        "_lengths",
        "_limits",
        "_message_limit",
        "_missing",
        "_pending",
        "_position",
        "_region",
        "_region_end",
        "_skip",
        "_small",
        "_trusted",
        "_verdict",
        "last_size",
        "received",
        "total",
    )

    def __init__(self, limits: Limits | None = None, trusted: Callable[[], bool] = _never, *, first: int | None = None) -> None:
        self._limits = limits = limits if limits is not None else Limits()
        self._trusted = trusted
        self._verdict: bool | None = None
        self._small = 0.0
        self._first = first  # None again after the first message
        self._adopt(limits.message, limits.head, limits.frames)
        self._buffer = b""  # received, not yet used: from _position on
        self._position = 0
        self._gathered = bytearray()  # a long prelude of which _missing bytes are still to come
        self._missing = 0
        self._count = -1  # frames of the message under way; -1 between messages
        self._lengths: tuple[int, ...] = ()
        self._frames: list[Buffer] = []
        self._counted = 0  # of the frames, those within outer
        self._region: memoryview | None = None  # where the next pieces go, up to but without the frame _region_end
        self._region_end = 0
        self._pending: memoryview | None = None  # the frame being filled in place
        self._filled = 0
        self._skip = 0  # bytes to drop behind the last frame (extra bytes inside outer)
        self.received: int = 0  # bytes of the message under way seen so far; for progress rules
        self.total: int = 0  # bytes taken in since the start
        self.last_size: int = 0  # bytes of the last whole message

    @property
    def mid_message(self) -> bool:
        """Whether some bytes of a message have come, but not all."""
        return self._count >= 0 or self._position < len(self._buffer)

    @property
    def buffered(self) -> int:
        """Bytes received and not yet used."""
        return max(len(self._buffer) - self._position, len(self._gathered))

    def feed(self, data: bytes) -> None:
        """Take bytes that came.  Never raises; mistakes show in :meth:`next_message`."""
        self.total += len(data)
        if self._position >= len(self._buffer):
            self._buffer = data
        elif self._missing > 0:
            self._gathered.extend(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            self._buffer = bytes(self._gathered)
            self._gathered = bytearray()
        else:
            self._buffer = self._buffer[self._position :] + data
        self._position = 0

    def receive(self, data: bytes) -> list[Buffer] | None:
        """:meth:`feed`, then :meth:`next_message`: for the small message that comes alone and whole, in one step."""
        size = len(data)
        if size >= 24 and not self._buffer and self._count < 0:
            outer, count, length = _unpack_single(data)
            if count == 1 and length + 24 == size and 0 < length <= self._small and (outer == length + 16 or outer == 16):
                self.total += size
                self.last_size = size
                return [data[24:]]
        self.feed(data)
        return self.next_message()

    def discard(self) -> None:
        """Let go of what has come: nothing more of it will be asked for."""
        self._buffer = b""
        self._position = 0
        self._gathered = bytearray()
        self._missing = 0
        self._frames = []
        self._pending = self._region = None

    def want(self) -> memoryview | None:
        """The part of a large frame still to be filled, or None where :meth:`feed` is the way in."""
        pending = self._pending
        if pending is None or len(pending) - self._filled < _DIRECT:
            return None
        return pending[self._filled :]

    def filled(self, size: int) -> None:
        """Say that ``size`` bytes have been written to the buffer that :meth:`want` gave."""
        self._filled += size
        self.received += size
        self.total += size

    def next_message(self) -> list[Buffer] | None:
        """Return the frames of the next whole message, or None if more bytes are needed."""
        if self._count < 0:
            buffer, position = self._buffer, self._position
            available = len(buffer) - position
            if available < 16:
                if available and self._first is not None:
                    self._check_first(0)
                return None
            if available >= 24:
                # The message that nearly all are: one frame, wholly here, counted wholly or not at all.
                outer, count, length = _unpack_single(buffer, position)
                end = position + 24 + length
                if count == 1 and end <= len(buffer) and (outer == length + 16 or outer == 16):
                    if length > self._small:
                        if self._first is not None:
                            self._check_first(length + 16)
                            self._end_first()
                        self._check_message(length + 16)
                        self._check_head(length)
                    if length == 0:
                        raise RemoteProtocolError("frame 0 of a message is empty")
                    frame = buffer[position + 24 : end]
                    self.last_size = end - position
                    if end == len(buffer):
                        self._buffer = b""
                        self._position = 0
                    else:
                        self._position = end
                    return [frame]
            if not self._begin(buffer, position, available):
                return None
        return self._frames_or_none()

    # -- the general path ------------------------------------------------------------------------------------------------------

    def _begin(self, buffer: bytes, position: int, available: int) -> bool:
        """Read the prelude, if it is all here, and check every number in it."""
        if self._missing > 0:
            return False
        if self._first is not None:
            self._check_first(0)
        outer, count = _HEAD.unpack_from(buffer, position)
        if count == 0:
            raise RemoteProtocolError("a message of zero frames")
        limit = self._frames_limit
        if limit is not None and count > limit:
            self._escalate()
            limit = self._frames_limit
            if limit is not None and count > limit:
                raise LimitExceeded.of(self._name("frames"), limit, count, "the number of frames of a message")
        prelude = 8 + 8 * count
        if outer < prelude:
            raise RemoteProtocolError(f"the outer length of a message, {outer}, is less than its prelude of {prelude} bytes")
        self._check_message(outer)
        if available < 8 + prelude:
            if prelude >= _GATHER:
                self._gathered.extend(memoryview(buffer)[position:])
                self._missing = 8 + prelude - available
            return False
        lengths = Struct(f"<{count}Q").unpack_from(buffer, position + 16)
        total = prelude + sum(lengths)
        if self._first is not None:
            self._check_first(total)
        self._check_message(total)
        if lengths[0] == 0:
            raise RemoteProtocolError("frame 0 of a message is empty")
        self._check_head(lengths[0])
        self._counted = count
        if outer < total:
            end = prelude
            self._counted = 0
            for length in lengths:
                if end >= outer:
                    break
                end += length
                self._counted += 1
            if end != outer:
                raise RemoteProtocolError(f"the outer length of a message, {outer}, ends inside a frame")
        self._skip = max(0, outer - total)
        self._count = count
        self._lengths = lengths
        self._position = position + 8 + prelude
        self.received = 8 + prelude
        return True

    def _frames_or_none(self) -> list[Buffer] | None:
        frames = self._frames
        while len(frames) < self._count:
            length = self._lengths[len(frames)]
            buffer, position = self._buffer, self._position
            available = len(buffer) - position
            pending = self._pending
            if pending is None:
                if self._region is None and length >= _PIECE:
                    self._find_region(len(frames))
                if self._region is None and available >= length:
                    end = position + length
                    frames.append(bytearray(memoryview(buffer)[position:end]) if frames else buffer[position:end])
                    self._use(length)
                    continue
                if self._region is not None:
                    pending = self._pending = self._region[:length]
                    self._region = self._region[length:] if len(frames) + 1 < self._region_end else None
                elif length < _GATHER:
                    return None
                else:
                    pending = self._pending = _allocated(length)
                self._filled = 0
            if available:
                take = min(available, length - self._filled)
                pending[self._filled : self._filled + take] = memoryview(buffer)[position : position + take]
                self._filled += take
                self._use(take)
            if self._filled < length:
                return None
            # Frame 0 is searched and hashed as bytes; large heads are rare, and the limit on them is small.
            frames.append(pending if frames else bytes(pending))
            self._pending = None
        if self._skip:
            take = min(self._skip, len(self._buffer) - self._position)
            self._skip -= take
            self._use(take)
            if self._skip:
                return None
        if self._first is not None:
            self._end_first()
        self._frames = []
        self._count = -1
        self._lengths = ()
        self.last_size = self.received
        self.received = 0
        return frames

    def _find_region(self, first: int) -> None:
        """Make room for a frame and those behind it that are pieces of the same array; the last piece may be of any size."""
        lengths = self._lengths
        end = first + 1
        while first > 0 and end < self._counted and lengths[end - 1] >= _PIECE and lengths[end]:
            end += 1
        if end > first + 1:
            self._region = _allocated(sum(lengths[first:end]))
            self._region_end = end

    def _use(self, size: int) -> None:
        self.received += size
        self._position += size
        if self._position >= len(self._buffer):
            self._buffer = b""
            self._position = 0

    # -- limits ----------------------------------------------------------------------------------------------------------------

    def _check_first(self, size: int) -> None:
        """Check what there is of the first message, of which ``size`` bytes are known so far; three bytes may be enough."""
        start = self._buffer[self._position : self._position + 64]
        outer = int.from_bytes(start[:8], "little")  # or less than it, if not all of it is here
        seen = max(size, outer)
        if self._first is not None and seen > self._first:
            kind = looks_like(start)
            what = "the first message" if kind is None else f"what came looks like {kind}; taken for the first message, it"
            raise RemoteProtocolError(f"{what} tells of {seen} bytes, and a handshake has at most {self._first}")
        if 8 <= len(start) < 16 and outer < 16:
            raise RemoteProtocolError(f"the outer length of a message, {outer}, is less than any prelude")

    def _end_first(self) -> None:
        self._first = None
        self._adopt(self._message_limit, self._head_limit, self._frames_limit)

    def _check_message(self, size: int) -> None:
        if self._message_limit is not None and size > self._message_limit:
            self._escalate()
            if self._message_limit is not None and size > self._message_limit:
                raise LimitExceeded.of(self._name("message"), self._message_limit, size, "a message, in bytes,")

    def _check_head(self, size: int) -> None:
        if self._head_limit is not None and size > self._head_limit:
            self._escalate()
            if self._head_limit is not None and size > self._head_limit:
                raise LimitExceeded.of(self._name("head"), self._head_limit, size, "frame 0 of a message, in bytes,")

    def _name(self, field: str) -> str:
        return field + "_trusted" if self._verdict else field

    def _escalate(self) -> None:
        """Something is larger than a stranger's may be: find out, once, who the peer is."""
        if self._verdict is None:
            self._verdict = self._trusted()
            if self._verdict:
                limits = self._limits
                self._adopt(limits.message_trusted, limits.head_trusted, limits.frames_trusted)

    def _adopt(self, message: int | None, head: int | None, frames: int | None) -> None:
        self._message_limit = message
        self._head_limit = head
        self._frames_limit = frames
        # One comparison on the hot path: below this, neither limit can be hit.
        self._small = min(float("inf") if message is None else message - 16, float("inf") if head is None else head)
        if self._first is not None:
            self._small = -1.0  # the first message always goes the longer way
