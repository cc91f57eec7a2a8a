"""Comms: messages over a pump.

How a :class:`FramedComm` works
-------------------------------
Reading: ``next_head`` asks the parser for a whole message and the pump for more bytes until there is one.  Decoding has two
phases: the *head* (frame 0 with its markers in place) is read first, so that a server can settle op, limits and trust before
``resolve`` touches a payload.

Writing: the message is encoded first, which may fail without harm.  Nearly always nobody else is in the middle of a write and the
kernel takes all of it at once: one system call and no lock.  Only if the kernel takes less does the writer become the owner of
the send lock, behind which others queue in order.  What code that can't wait has to say, such as the credit of a stream, is
*owed* if the kernel does not take it: whoever writes next sends it first, and if nobody does, a task of the system's.

A frame is atomic: whatever interrupts a write after its first byte, or a read inside a message, closes the comm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import trio
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled

from ..abc import CommSettings, Peer
from ..errors import CommClosedError, LimitExceeded, RemoteProtocolError
from ..protocol._context import Buffer, DecodeContext, EncodeContext
from ..protocol._envelope import PONG
from ..protocol._frames import HANDSHAKE, JOIN_BELOW, FrameParser, join_small, pack_prelude, single_frame
from ..protocol._limits import KiB
from ..protocol._messages import Decoder, Encoder
from ._ahead import ReadAhead, find_goodbye
from ._base import BaseComm, Unsent
from ._greeting import GREETING_DECODER, GREETING_ENCODER, JudgingEncoder, conclude, greeting
from ._pace import acquire_within, stalled
from ._pumps import MESSAGE_WEIGHT, YIELD_BYTES, Pump
from ._watch import EndWatch

__all__ = ["FramedComm"]

# Bytes that may be owed: some credits and pongs.  A peer that makes us owe more isn't reading.
_MOST_OWED = 16 * KiB


class FramedComm(BaseComm):
    """A comm that speaks Dask's framing over a pump."""

    __slots__ = (
        "_ahead",
        "_broken",
        "_closed",
        "_decoder",
        "_encoder",
        "_encoder_telling",
        "_ended",
        "_items_owed",
        "_owed",
        "_parser",
        "_pump",
        "_reading",
        "_send_lock",
        "_sending",
        "_unjudged",
        "_watch",
    )

    def __init__(self, pump: Pump, *, local_address: str, peer: Peer, settings: CommSettings) -> None:
        super().__init__(local_address=local_address, peer=peer, settings=settings)
        self._pump = pump
        pump.progress = settings.limits.progress_timeout, settings.limits.progress_rate
        self._parser = FrameParser(settings.limits, self._is_trusted, first=HANDSHAKE)
        # Until the handshake is done: plain data only.
        self._encoder = GREETING_ENCODER
        self._encoder_telling: Encoder | None = None
        self._decoder = GREETING_DECODER
        self._send_lock: trio.StrictFIFOLock | None = None
        self._sending = False  # somebody has the send lock, or something is owed, or nothing more can be sent
        self._owed: list[Buffer] = []  # what is to be sent before anything else
        self._items_owed = False  # among that are items of a stream
        self._reading = False
        self._ahead: ReadAhead | None = None
        self._unjudged: Encoder | None = None  # the encoder of a client that has not asked yet who the server is
        self._watch: EndWatch | None = None
        self._closed = ""  # why, once it is
        self._broken = ""  # why nothing can be written any more; what the peer wrote before can still be read
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
        frames = greeting(self.settings)
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
            negotiated = conclude(self.settings, found[0])  # type: ignore[arg-type]  # its frame as it came
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
                compression=negotiated.compression,
                serializers=self.settings.serializers,
                extensions=extensions,
                on_error="raise",
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
        if extension is None and limits.tcp_user_timeout is not None:
            # It would kill a live peer that merely isn't reading, so between trio_dcore peers a ping finds the dead ones.
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
        decoder = self._decoder
        if deserializers is not None:
            context = replace(self._decode_context(), deserializers=tuple(deserializers))
            decoder = Decoder(context, extensions=self._encoder.ctx.extensions)
        return decoder.resolve(frames)

    async def next_head(self, ahead: bool = False) -> tuple[object, list[Buffer] | None] | None:
        if self._reading:
            if self._unjudged is not None:
                self.judge()
            else:
                watch = self._watch
                if watch is None or not watch.reading:
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
                self._watch.resume()
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
        return self._reading and self._unjudged is None and (self._watch is None or not self._watch.reading)

    @property
    def buffered(self) -> int:
        """Bytes that have been read and not been used yet."""
        return self._parser.buffered if self._ahead is None else self._ahead.size

    def reserve_reading(self, reserved: bool) -> None:
        """For the watch: from now on, or no longer, it is the one that reads."""
        self._reading = reserved

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

    # -- writing ----------------------------------------------------------------------------------------------------------------

    async def write(self, message: Any, *, on_error: str | None = None, serializers: Sequence[str] | None = None) -> int:
        await checkpoint_if_cancelled()
        try:
            return await self._transmit(self._encode(message, on_error or "message", serializers), self._own_stall())
        except trio.ClosedResourceError as error:
            raise CommClosedError(str(error)) from error

    async def send(self, value: Any) -> None:
        await checkpoint_if_cancelled()
        await self._transmit(self._encode(value, "message", None), self._own_stall())

    def _own_stall(self) -> str:
        return "stream_stall" if self.serving else ""

    def start(self, message: Any, serializers: Sequence[str] | None = None, on_error: str | None = None) -> Unsent | None:
        if serializers is None and on_error is None:
            return self._start(self._encoder.encode(message))
        return self._start(self._encode(message, on_error or "raise", serializers))

    async def finish(self, unsent: Unsent, stall: str = "") -> None:
        buffers, size, sent = unsent
        if sent < size:
            await self._transmit_slowly(buffers, sent, stall)
            self.messages_written += 1
            self.bytes_written += size
            self._pump.unwaited += MESSAGE_WEIGHT + size
        if self._pump.unwaited >= YIELD_BYTES:
            self._pump.unwaited = 0
            await cancel_shielded_checkpoint()

    def _encode(self, message: Any, on_error: str, serializers: Sequence[str] | None) -> list[Buffer]:
        if on_error == "raise" and serializers is None:
            return self._encoder.encode(message)
        if on_error not in ("raise", "message"):
            raise ValueError(f"on_error={on_error!r}: must be 'message' or 'raise'")
        if serializers is None:
            if self._encoder_telling is None:
                self._encoder_telling = Encoder(replace(self._encoder.ctx, on_error="message"))
            return self._encoder_telling.encode(message)
        return Encoder(replace(self._encoder.ctx, on_error=on_error, serializers=tuple(serializers))).encode(message)

    def _start(self, frames: list[Buffer]) -> Unsent | None:
        """Send frames as far as that needs no wait: None if that was all, else what :meth:`finish` has to do."""
        if self._closed:
            raise self._closed_error(nothing_sent=True)
        if len(frames) == 1 and len(frames[0]) < JOIN_BELOW:
            data = single_frame(frames[0])
            size = len(data)
            if not self._sending:
                pump = self._pump
                try:
                    sent = pump.try_send(data)
                except OSError as error:
                    raise self._write_failed(error, nothing_sent=True) from error
                if sent < size:
                    return [data], size, sent
                self.messages_written += 1
                self.bytes_written += size
                pump.unwaited += MESSAGE_WEIGHT + size
                return None if pump.unwaited < YIELD_BYTES else ([], size, size)
            return [data], size, 0
        buffers = join_small(pack_prelude(frames), frames)
        return buffers, sum(map(len, buffers)), 0

    async def _transmit(self, frames: list[Buffer], stall: str = "") -> int:
        before = self.bytes_written
        unsent = self._start(frames)
        if unsent is None:
            return self.bytes_written - before
        await self.finish(unsent, stall)
        return unsent[1]

    async def _transmit_slowly(self, buffers: list[Buffer], sent: int, stall: str) -> None:
        """Send the rest of a message in turn: behind the messages of those who came before, and behind what is owed."""
        seconds: float | None = getattr(self.settings.limits, stall) if stall else None
        lock = self._send_lock
        if lock is None:
            lock = self._send_lock = trio.StrictFIFOLock()
        if not lock.locked():
            lock.acquire_nowait()
        elif seconds is not None and stall == "write_stall":
            # A reply behind what a task that its handler has left behind writes, which may wait for ever.
            try:
                await acquire_within(lock, seconds, self._passed)
            except trio.TooSlowError:
                raise self._stalled(stall, seconds) from None
        else:
            await lock.acquire()
        self._sending = True
        try:
            if self._closed or self._broken:
                raise self._closed_error(nothing_sent=True)
            # A first part is only sent while nobody has the lock and nothing is owed, so nothing gets in front of its rest.
            owed, self._owed = self._owed, []
            pump = self._pump
            if owed and self._items_owed:
                stall, seconds = "stream_stall", self.settings.limits.stream_stall  # a stream's consumer may take its time
            try:
                if owed or buffers:
                    await pump.send(owed + buffers, sent, seconds)
                self._items_owed = self._items_owed and bool(self._owed)
            except trio.ClosedResourceError:
                self.abort()
                raise self._closed_error() from None
            except (OSError, trio.BrokenResourceError) as error:
                raise self._write_failed(error, nothing_sent=not pump.partial) from error
            except BaseException as error:
                if seconds is not None and isinstance(error, trio.TooSlowError):
                    raise self._stalled(stall, seconds) from None
                if pump.partial:
                    # A server that doesn't read is to learn of it all the same: what it works for has been cancelled.
                    self._doom("a write was interrupted in the middle of a message", reset=not self.serving)
                else:
                    self._owed[:0] = owed
                raise
        finally:
            lock.release()
            self._sending = lock.locked() or bool(self._broken)
            if self._owed and not self._sending and not self._closed:
                self._send_owed_later()

    def _passed(self) -> int:
        return self._pump.taken

    def _stalled(self, field: str, seconds: float) -> LimitExceeded:
        error = stalled(self.peer_address, field, seconds)
        self.give_up(error)
        return error

    def write_nowait(self, message: Any) -> bool:
        if self._closed or self._broken:
            raise self._closed_error(nothing_sent=True)
        return not self._sending and self._write_now(message, 0)

    def write_soon(self, message: Any) -> bool:
        if self._closed or self._broken:
            raise self._closed_error(nothing_sent=True)
        return self._write_now(message, _MOST_OWED)

    def push(self, head: bytes, items: int) -> int:
        """Send an encoded message of one frame, that holds so many items of a stream; return its size.  Not a checkpoint.

        What the kernel doesn't take is owed, however much it is; :meth:`settle` waits for that.
        """
        if self._closed or self._broken:
            raise self._closed_error(nothing_sent=True)
        data = single_frame(head)
        size = len(data)
        self._send_now(data, math.inf)
        self._items_owed = bool(self._owed)
        self._pump.unwaited += MESSAGE_WEIGHT * items + size
        return size

    async def settle(self, stall: str) -> None:
        """Wait until all that is owed has been sent, and let other tasks run where that is due.

        Cancellation: nothing is lost, unless a message was in its middle; then the comm is closed.
        """
        if self._sending:
            await self._transmit_slowly([], 0, stall)
        await self.finish(([], 0, 0))

    def _write_now(self, message: Any, most_owed: float) -> bool:
        """Send a message and owe what the kernel doesn't take; False if that is all of it and more than may be owed."""
        frames = self._encoder.encode(message)
        return self._send_now(
            single_frame(frames[0]) if len(frames) == 1 else b"".join((pack_prelude(frames), *frames)), most_owed
        )

    def _send_now(self, data: bytes, most_owed: float) -> bool:
        sent = 0
        sending = self._sending
        if not sending:
            try:
                sent = self._pump.try_send(data)
            except OSError as error:
                raise self._write_failed(error, nothing_sent=True) from error
        if sent < len(data):
            # The first may be the rest of a large message, which is no reason to refuse a small one.
            if not sent and sum(map(len, self._owed[1:])) + len(data) > most_owed:
                return False
            self._owed.append(data[sent:])
            if not sending:
                self._send_owed_later()
        self.messages_written += 1
        self.bytes_written += len(data)
        return True

    def _send_owed_later(self) -> None:
        # Nobody else may ever write again, and the peer may wait for what is owed.  The task ends with the comm at the latest.
        self._sending = True
        trio.lowlevel.spawn_system_task(self._send_owed, name=f"sending what is owed to {self.peer_address}")

    async def _send_owed(self) -> None:
        try:
            if self._owed:
                await self._transmit_slowly([], 0, "write_stall" if self.serving else "stream_stall")
        except (CommClosedError, trio.ClosedResourceError):
            pass  # it isn't owed any more
        except Exception as error:
            # A system task that raises would take the whole run down; whoever uses the comm next is told.
            self._doom(f"writing to {self.peer_address} failed: {error}")

    def _write_failed(self, error: BaseException, *, nothing_sent: bool) -> Exception:
        # The peer has gone, and maybe not without a last word: the answer, or the end of a stream, that it wrote before it
        # closed.  So the reading side stays, until that has been read or the comm is closed.
        self._broken = self._broken or f"writing to {self.peer_address} failed: {error}"
        self._sending = True
        self._owed.clear()
        return self._closed_error(nothing_sent=nothing_sent)

    # -- closing ----------------------------------------------------------------------------------------------------------------

    def _doom(self, why: str, *, reset: bool = False) -> None:
        """Close at once because the comm can't be used any more."""
        self._closed = self._closed or why
        self._owed.clear()
        self._parser.discard()  # now, and not when the cycle that it is in is collected
        self._pump.abort(reset=reset)

    def give_up(self, error: Exception) -> None:
        self.fault = self.fault or str(error)
        self._doom(str(error), reset=True)

    def cut(self) -> None:
        self._doom(_CLOSED_HERE, reset=True)

    def _closed_error(self, *, nothing_sent: bool = False) -> Exception:
        why = self._closed or self._broken
        if why in ("", _CLOSED_HERE):
            return trio.ClosedResourceError(_CLOSED_HERE)
        error = CommClosedError(why)
        error.nothing_sent = nothing_sent
        return error

    def abort(self) -> None:
        self._doom(_CLOSED_HERE)

    async def aclose(self) -> None:
        if self._sending and not self._closed and not self._broken:
            # Messages are on their way, or wait for their turn: let them out, for a while.
            try:
                with trio.move_on_after(self.settings.limits.linger):
                    await self._transmit_slowly([], 0, "")
            except (CommClosedError, trio.ClosedResourceError):
                pass
            except BaseException:
                self.abort()
                raise
            if self._sending:
                self.abort()
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = _CLOSED_HERE
        await self._pump.close_within(self.settings.limits.linger)

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


_CLOSED_HERE = "this comm was closed here"
