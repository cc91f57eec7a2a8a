"""Comms: messages over a pump.

How a :class:`FramedComm` works
-------------------------------
Reading: ``next_head`` asks the parser for a whole message and the pump for more bytes until there is one.  Decoding has two
phases: the *head* (frame 0 with its markers in place) is read first, so that a server can settle op, limits and trust before
``resolve`` touches a payload; or ``unpack``, which lets a worker thread do it where that is much work.

Writing is the other half, :mod:`._writing`.

A frame is atomic: whatever interrupts a write after its first byte, or a read inside a message, closes the comm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import trio
from trio.lowlevel import cancel_shielded_checkpoint

from ..abc import CommSettings, Peer
from ..errors import CommClosedError, LimitExceeded, RemoteProtocolError
from ..protocol._compression import AUTO
from ..protocol._context import Buffer, DecodeContext, EncodeContext
from ..protocol._envelope import PONG
from ..protocol._errors import TooHeavy
from ..protocol._frames import HANDSHAKE, FrameParser
from ..protocol._messages import Decoder, Encoder
from ._ahead import ReadAhead, find_goodbye
from ._greeting import GREETING_DECODER, JudgingEncoder, conclude, greeting, offered_codec
from ._offload import in_worker
from ._pumps import MESSAGE_WEIGHT, YIELD_BYTES, Pump
from ._watch import EndWatch
from ._writing import WritingComm

__all__ = ["FramedComm"]


class FramedComm(WritingComm):
    """A comm that speaks Dask's framing over a pump."""

    __slots__ = ("_ahead", "_decoder", "_ended", "_parser", "_reading", "_unjudged", "_unpacking", "_watch")

    def __init__(self, pump: Pump, *, local_address: str, peer: Peer, settings: CommSettings) -> None:
        super().__init__(pump, local_address=local_address, peer=peer, settings=settings)
        pump.progress = settings.limits.progress_timeout, settings.limits.progress_rate
        self._parser = FrameParser(settings.limits, self._is_trusted, first=HANDSHAKE)
        # Until the handshake is done: a plain map only.
        self._decoder = GREETING_DECODER
        self._reading = False
        self._unpacking = False  # a thread decodes a message; until that is done nobody else may read, and nobody does
        self._ahead: ReadAhead | None = None
        self._unjudged: Encoder | None = None  # the encoder of a client that has not asked yet who the server is
        self._watch: EndWatch | None = None
        self._ended = False  # the peer has ended its side cleanly

    @property
    def bytes_read(self) -> int:
        return self._parser.total

    @property
    def heard(self) -> bool:
        return not self._closed and self._pump.heard

    @property
    def rest_since(self) -> float:
        return self._pump.rest_since

    @property
    def last_message_size(self) -> int:
        return self._parser.last_size

    def socket_fileno(self) -> int | None:
        return self._pump.fileno()

    # -- trust ------------------------------------------------------------------------------------------------------------------

    def _is_trusted(self) -> bool:
        return self._peer.trusted

    def _max_message(self) -> int | None:
        limits = self.settings.limits
        return limits.message_trusted if self._peer.trusted else limits.message

    def _max_head(self) -> int | None:
        limits = self.settings.limits
        return limits.head_trusted if self._peer.trusted else limits.head

    def _decode_context(self) -> DecodeContext:
        settings = self.settings
        return DecodeContext(
            allow_pickle=self.allows_pickle,
            why=self.why_no_pickle,
            deserializers=settings.deserializers,
            deserialize=settings.deserialize,
            enum_modules=settings.security.enum_modules,
            max_message=self._max_message,
            max_head=self._max_head,
        )

    # -- handshake --------------------------------------------------------------------------------------------------------------

    async def handshake(self) -> None:
        limits = self.settings.limits
        codec = offered_codec(self)
        frames = greeting(self.settings, codec)
        # Either order will do (wire document, section 3).  A server reads first: so the peer still waits for an answer when it is asked
        # who it is, before it can have sent all that it wanted and left; and who says nothing costs next to nothing.
        if not self.serving:
            await self._transmit(frames, "write_stall")
        found = await self.next_head()
        if found is None:
            raise CommClosedError(f"{self.peer_address} closed the comm during the handshake")
        if not self.asking:
            _ = self._peer.trusted
        try:
            # Phase one only: a payload in a handshake is never touched, whoever sent it.
            negotiated = conclude(self.settings, found[0], codec)  # type: ignore[arg-type]  # its frame as it came
        except RemoteProtocolError:
            self._doom("bad handshake")
            raise
        if self.serving:
            await self._transmit(frames, "write_stall")
        extension = negotiated.extension
        features: frozenset[str] = frozenset() if extension is None else extension.features
        self.extension = extension if "calls" in features else None
        self.pings = self.extension is not None and "pings" in features
        extensions = "types" in features
        self._encoder = Encoder(
            EncodeContext(
                allow_pickle=self.allows_pickle,
                why=self.why_no_pickle,
                pickle_protocol=negotiated.pickle_protocol,
                # A receiver obeys the header, whatever was negotiated: a codec that was asked for by name is used.
                compression=negotiated.compression if self.settings.compression == AUTO else codec,
                serializers=self.settings.serializers,
                extensions=extensions,
                on_error="raise",
                offload=self.settings.offload,
                # Receivers need no shards; without them a payload is one buffer at both ends, and is never joined by copying.
                shard=None,
                forward_untrusted=self.settings.security.pickle == "always",
            )
        )
        self._decoder = Decoder(self._decode_context(), extensions=extensions)
        if self.asking:
            self._unjudged = self._encoder
            if self._parser.buffered:
                self.judge()  # the server doesn't wait for us: it has gone on to say something, and may be about to leave
            else:
                # Else it waits for a request, so it is asked who it is when there is one: a comm that is never used needs no answer.
                # Whoever writes or reads first comes by here, and nobody after that.
                self._encoder = JudgingEncoder(self)
                self._reading = True
        if extension is not None:
            self._pump.silence = limits.tcp_user_timeout
        elif limits.tcp_user_timeout is not None:
            # It kills a live peer that merely isn't reading, as Dask does it.  Between trio_dcore peers that is none of its business:
            # a ping finds the dead ones where a call waits, and a write that waits looks for a sign of life by itself.
            self._pump.set_user_timeout(limits.tcp_user_timeout)

    def judge(self) -> Encoder:
        """A client asks who the server is: not before it has accepted, and not after it may have left.  Returns the encoder."""
        encoder = self._unjudged
        if encoder is not None:
            if self._encoder is not encoder:
                self._encoder = encoder
                self._reading = False
            self._unjudged = None
            _ = self._peer.trusted
        return self._encoder

    # -- reading ----------------------------------------------------------------------------------------------------------------

    def resolve(self, frames: list[Buffer], deserializers: Sequence[str] | None = None) -> Any:
        return self._decoder_for(deserializers).resolve(frames)

    def _decoder_for(self, deserializers: Sequence[str] | None) -> Decoder:
        if deserializers is None:
            return self._decoder
        context = replace(self._decode_context(), deserializers=tuple(deserializers))
        return Decoder(context, extensions=self._encoder.ctx.extensions)

    async def unpack(self, frames: list[Buffer], deserializers: Sequence[str] | None = None) -> Any:
        decoder = self._decoder_for(deserializers)
        most = self.settings.offload
        # Without payloads there is only msgpack, which lets no other thread run, and so gains nothing in one.
        if most is None or len(frames) == 1:
            return decoder.resolve(frames)
        try:
            return decoder.resolve(frames, most)
        except TooHeavy as heavy:
            rest = heavy.rest
        self._reading = self._unpacking = True
        size = self._parser.last_size
        try:
            return await in_worker(rest, f"decoding a message from {self.peer_address}")
        except trio.Cancelled:
            if not self._closed:
                self._ahead = self._ahead or ReadAhead(self._parser, self._decoder)
                self._ahead.put_back(frames, size)
                self.messages_read -= 1
            raise
        finally:
            self._parser.last_size = size  # in the meantime a watch may have read on
            self._unpacking = False
            self._reading = self._watch is not None and self._watch.reading

    async def next_head(self, ahead: bool = False) -> tuple[object, list[Buffer] | None] | None:
        if self._reading:
            if self._unjudged is not None:
                self.judge()
            else:
                watch = self._watch
                if watch is None or not watch.reading or self._unpacking:
                    raise trio.BusyResourceError("another task is reading this comm")
                if watch.goes_on and self._ahead is not None and self._ahead.ready:
                    self.messages_read += 1
                    return await self._ahead.next_head(self._pump)  # the watch reads on
                await watch.pause()
                if self._reading:
                    raise trio.BusyResourceError("another task is reading this comm")
        if self._closed:
            raise self._closed_error()
        parser = self._parser
        pump = self._pump
        self._reading = True
        frames = None
        try:
            if self._ahead is not None and self._ahead.kept:
                frames = self._ahead.take()  # in front of what else has come
            else:
                frames = parser.next_message() if self._ended else await pump.pull(parser)
            if frames is None:
                self._ended = True
                if parser.mid_message:
                    raise CommClosedError(f"{self.peer_address} closed the comm in the middle of a message")
                if self._broken:
                    raise self._closed_error()  # a reset is told once, and it was the writer that was told
                return None
            pump.unwaited += MESSAGE_WEIGHT
            if pump.unwaited >= YIELD_BYTES:
                pump.unwaited = 0
                await cancel_shielded_checkpoint()
        except (RemoteProtocolError, LimitExceeded) as error:
            self.fault = self.fault or str(error)
            self._doom(f"what came from {self.peer_address} is not acceptable: {error}")
            raise
        except trio.ClosedResourceError:
            self.abort()  # nothing new, unless it is the stream underneath that was closed
            raise self._closed_error() from None
        except (OSError, trio.BrokenResourceError) as error:
            if isinstance(error, CommClosedError):
                self._doom(str(error))
                raise
            self._doom(f"reading from {self.peer_address} failed: {error}")
            raise self._closed_error() from error
        except BaseException:
            if frames is not None or (parser.mid_message and not ahead):
                self._doom("a read was interrupted in the middle of a message")
            raise
        finally:
            self._reading = False
            if self._watch is not None:
                size = parser.last_size
                self._watch.resume()  # which may look at what has come behind it
                parser.last_size = size
            if self.after_read is not None:
                self.after_read()
        self.messages_read += 1
        frame0 = frames[0]
        # As Decoder.has_markers, which says why.
        marked = len(frames) > 1 or frame0.partition(b"__")[1]
        return self._decoder.head(frame0), frames if marked else None

    def read_ahead(self, id: int, most: int, *, fill: bool = True) -> bool:
        if self._closed or self._ended or (fill and self._reading):
            return False
        ahead = self._ahead = self._ahead or ReadAhead(self._parser, self._decoder)
        pinged, room = ahead.read(id, most, self._pump if fill else None)
        if pinged:
            with suppress(CommClosedError, trio.ClosedResourceError):  # it has gone by itself
                self.write_soon((PONG, id, None))  # one answer does for many: the peer wants to know whether we live
        return room

    def outstanding(self) -> tuple[int, int]:
        return self._pump.taken, 0 if self._closed else self._pump.untaken()

    def watch_end(self, nursery: trio.Nursery, on_end: Callable[[], None], look: Callable[[], bool] | None = None) -> None:
        self.judge()
        self._watch = EndWatch(self, nursery, on_end, look)

    def unwatch_end(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            if not self._watch.reading:
                self._watch = None  # else the next read waits for it to let go

    @property
    def reading(self) -> bool:
        watching = self._watch is not None and self._watch.reading
        return self._reading and not watching and not self._unpacking and self._unjudged is None

    @property
    def buffered(self) -> int:
        """Bytes that have been read and not been used yet."""
        return self._parser.buffered if self._ahead is None else self._ahead.size

    def reserve_reading(self, reserved: bool) -> None:
        """For the watch: from now on, or no longer, it is the one that reads."""
        self._reading = reserved or self._unpacking

    async def wait_incoming(self) -> bool:
        """For the watch: wait until something more has come; True if it was bytes, False if the peer ended or broke the stream.

        Raises trio.ClosedResourceError if it is the comm that was closed.
        """
        try:
            self._ended = not await self._pump.fill(self._parser)
        except trio.ClosedResourceError:
            raise
        except Exception as error:  # whatever a stream raises, nobody but the next read can be told
            if self._closed:
                raise trio.ClosedResourceError(self._closed) from error
            self._doom(f"reading from {self.peer_address} failed: {error}")
            return False
        return not self._ended

    # -- closing ----------------------------------------------------------------------------------------------------------------

    def _doom(self, why: str, *, reset: bool = False) -> None:
        super()._doom(why, reset=reset)
        self._parser.discard()  # now, and not when the cycle that it is in is collected

    def closed(self) -> bool:
        return bool(self._closed) or self._ended or bool(self._broken)

    def stale(self) -> bool:
        if self._closed or self._ended or self._broken or self._parser.mid_message:
            return True
        return (self._ahead is not None and bool(self._ahead.kept)) or self._pump.readable()

    def take_goodbye(self, before: int) -> bool:
        if self._closed or self.extension is None or (self._reading and self._unjudged is None):
            return False
        return find_goodbye(self._parser, self._pump, self._decoder) < before
