"""The writing half of a comm with framing, and its end.

The message is encoded first, which may fail without harm.  Nearly always nobody else is in the middle of a write and the
kernel takes all of it at once: one system call and no lock.  Only if the kernel takes less does the writer become the owner of
the send lock, behind which others queue in order.  What code that can't wait has to say, such as the credit of a stream, is
*owed* if the kernel does not take it: whoever writes next sends it first, and if nobody does, a task of the system's.

A large message is encoded in a worker thread, by a writer who owns the send lock already, so that messages leave in the order in which
they were written.

A frame is atomic: whatever interrupts a write after its first byte closes the comm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import trio
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled

from ..abc import CommSettings, Peer
from ..errors import CommClosedError, LimitExceeded
from ..protocol._context import Buffer
from ..protocol._errors import TooHeavy
from ..protocol._frames import JOIN_BELOW, join_small, pack_prelude, single_frame
from ..protocol._limits import KiB
from ..protocol._messages import Encoder
from ._base import BaseComm, Unmade, Unsent
from ._greeting import GREETING_ENCODER
from ._offload import in_worker
from ._pace import acquire_within, stalled
from ._pumps import MESSAGE_WEIGHT, YIELD_BYTES, Pump

__all__ = ["WritingComm"]

# Bytes that may be owed: some credits and pongs.  A peer that makes us owe more isn't reading.
_MOST_OWED = 16 * KiB
_CLOSED_HERE = "this comm was closed here"
_NOTHING = Unsent([], 0, 0)  # nothing changes it


class WritingComm(BaseComm):
    """A comm over a pump, as far as it writes and closes; :class:`~trio_dcore.comm._comm.FramedComm` adds the rest."""

    __slots__ = (
        "_broken",
        "_closed",
        "_encoder",
        "_encoder_telling",
        "_items_owed",
        "_making",
        "_owed",
        "_pump",
        "_send_lock",
        "_sending",
    )

    def __init__(self, pump: Pump, *, local_address: str, peer: Peer, settings: CommSettings) -> None:
        super().__init__(local_address=local_address, peer=peer, settings=settings)
        self._pump = pump
        # Until the handshake is done: plain data only.
        self._encoder = GREETING_ENCODER
        self._encoder_telling: Encoder | None = None
        self._send_lock: trio.StrictFIFOLock | None = None
        self._sending = False  # somebody has the send lock, or something is owed, or nothing more can be sent
        self._owed: list[Buffer] = []  # what is to be sent before anything else
        self._items_owed = False  # among that are items of a stream
        self._making: trio.CancelScope | None = None  # round the wait for a thread that encodes for the owner of the send lock
        self._closed = ""  # why, once it is
        self._broken = ""  # why nothing can be written any more; what the peer wrote before can still be read

    async def write(self, message: Any, *, on_error: str | None = None, serializers: Sequence[str] | None = None) -> int:
        await checkpoint_if_cancelled()
        try:
            return await self._write(message, on_error or "message", serializers)
        except trio.ClosedResourceError as error:
            raise CommClosedError(str(error)) from error

    async def send(self, value: Any) -> None:
        await checkpoint_if_cancelled()
        await self._write(value, "message", None)

    async def _write(self, message: Any, on_error: str, serializers: Sequence[str] | None) -> int:
        before = self.bytes_written
        unsent = self.start(message, serializers, on_error)
        if unsent is None:
            return self.bytes_written - before
        await self.finish(unsent, self._own_stall())
        return unsent.size

    def _own_stall(self) -> str:
        return "stream_stall" if self.serving else ""

    def start(self, message: Any, serializers: Sequence[str] | None = None, on_error: str | None = None) -> Unsent | None:
        encoder = self._encoder
        if serializers is not None or on_error is not None:
            encoder = self._encoder_for(on_error or "raise", serializers)
        try:
            frames = encoder.encode(message)
        except TooHeavy:
            if self._closed:
                raise self._closed_error(nothing_sent=True) from None
            return Unmade(Encoder(replace(encoder.ctx, offload=None)), message)
        return self._start(frames)

    async def finish(self, unsent: Unsent, stall: str = "") -> None:
        if unsent.sent < unsent.size or type(unsent) is Unmade:
            await self._transmit_slowly(unsent, stall)
            self.messages_written += 1
            self.bytes_written += unsent.size
            self._pump.unwaited += MESSAGE_WEIGHT + unsent.size
        if self._pump.unwaited >= YIELD_BYTES:
            self._pump.unwaited = 0
            await cancel_shielded_checkpoint()

    def _encoder_for(self, on_error: str, serializers: Sequence[str] | None) -> Encoder:
        if on_error == "raise" and serializers is None:
            return self._encoder
        if on_error not in ("raise", "message"):
            raise ValueError(f"on_error={on_error!r}: must be 'message' or 'raise'")
        if serializers is None:
            if self._encoder_telling is None:
                self._encoder_telling = Encoder(replace(self._encoder.ctx, on_error="message"))
            return self._encoder_telling
        return Encoder(replace(self._encoder.ctx, on_error=on_error, serializers=tuple(serializers)))

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
                    return Unsent([data], size, sent)
                self.messages_written += 1
                self.bytes_written += size
                pump.unwaited += MESSAGE_WEIGHT + size
                return None if pump.unwaited < YIELD_BYTES else Unsent([], size, size)
            return Unsent([data], size, 0)
        buffers = join_small(pack_prelude(frames), frames)
        return Unsent(buffers, sum(map(len, buffers)), 0)

    async def _transmit(self, frames: list[Buffer], stall: str = "") -> int:
        before = self.bytes_written
        unsent = self._start(frames)
        if unsent is None:
            return self.bytes_written - before
        await self.finish(unsent, stall)
        return unsent.size

    async def _transmit_slowly(self, unsent: Unsent, stall: str) -> None:
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
            if type(unsent) is Unmade:
                if self._owed:
                    await self._send_behind_owed(_NOTHING, stall)
                await self._make(unsent)
            # A first part is only sent while nobody has the lock and nothing is owed, so nothing gets in front of its rest.
            await self._send_behind_owed(unsent, stall)
        finally:
            lock.release()
            self._sending = lock.locked() or bool(self._broken)
            if self._owed and not self._sending and not self._closed:
                self._send_owed_later()

    async def _make(self, unmade: Unmade) -> None:
        """Encode in a worker thread, for the owner of the send lock.  What others owe meanwhile is sent as far as it can be at once."""
        with trio.CancelScope() as scope:
            self._making = scope
            try:
                what = f"encoding a message for {self.peer_address}"
                frames = await in_worker(lambda: unmade.encoder.encode(unmade.message), what)
            finally:
                self._making = None
        if scope.cancelled_caught or self._closed or self._broken:
            raise self._closed_error(nothing_sent=True)
        unmade.buffers = join_small(pack_prelude(frames), frames)
        unmade.size = sum(map(len, unmade.buffers))

    async def _send_behind_owed(self, unsent: Unsent, stall: str) -> None:
        """Send what is owed, and then the rest of a message."""
        owed, self._owed = self._owed, []
        pump = self._pump
        if owed and self._items_owed:
            stall = "stream_stall"  # a stream's consumer may take its time
        seconds: float | None = getattr(self.settings.limits, stall) if stall else None
        try:
            if owed or unsent.buffers:
                try:
                    await pump.send(owed + unsent.buffers, unsent.sent, seconds)
                finally:
                    if unsent.buffers:
                        unsent.begun = pump.partial
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

    def _passed(self) -> float:
        # While a message is being made, it is not the peer who is slow.
        return self._pump.taken if self._making is None else trio.current_time()

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
            await self._transmit_slowly(_NOTHING, stall)
        await self.finish(_NOTHING)

    def _write_now(self, message: Any, most_owed: float) -> bool:
        """Send a message and owe what the kernel doesn't take; False if that is all of it and more than may be owed."""
        encoder = self._encoder
        try:
            frames = encoder.encode(message)
        except TooHeavy:  # who can't wait can't wait for a thread
            frames = Encoder(replace(encoder.ctx, offload=None)).encode(message)
        return self._send_now(
            single_frame(frames[0]) if len(frames) == 1 else b"".join((pack_prelude(frames), *frames)), most_owed
        )

    def _send_now(self, data: bytes, most_owed: float) -> bool:
        sent = 0
        sending = self._sending
        if not sending or (self._making is not None and not self._owed):
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
                await self._transmit_slowly(_NOTHING, "write_stall" if self.serving else "stream_stall")
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
        if self._making is not None:
            self._making.cancel(reason="the comm was closed")
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
                    await self._transmit_slowly(_NOTHING, "")
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
