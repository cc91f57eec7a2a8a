"""Noticing that a peer has gone on streams whose hang-up no socket tells.

While a handler waits, a task reads ahead: bytes are kept for the next read, the end of the stream is reported.  Whoever reads the
comm meanwhile takes precedence: two tasks can't wait for one stream, so the watch pauses until that read is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import checkpoint_if_cancelled

if TYPE_CHECKING:
    from ._comm import FramedComm

__all__ = ["READ_AHEAD", "EndWatch"]

# What is read ahead at most; behind it the end is noticed only when all that has been read.
READ_AHEAD = 64 * 1024


class EndWatch:
    """Watches one comm until it is stopped.

    Args:
        comm: while somebody else reads it, the watch waits for that reader, who resumes it when done.
        nursery: the watching tasks live here.
        on_end: called, once, when the peer has ended or broken the stream; not when the comm is closed here.
        look: called whenever something has come, returns whether there is room for more; None is READ_AHEAD.
    """

    def __init__(
        self, comm: FramedComm, nursery: trio.Nursery, on_end: Callable[[], None], look: Callable[[], bool] | None = None
    ) -> None:
        self._comm = comm
        self._nursery = nursery
        self._on_end: Callable[[], None] | None = on_end
        self._look = look
        self._scope = trio.CancelScope()
        self._paused = trio.Event()
        self._paused.set()
        self._wanted = comm.reading  # somebody else reads the comm, or is about to
        if not self._wanted:
            self.resume()

    @property
    def reading(self) -> bool:
        """Whether its task is reading the comm now."""
        return not self._paused.is_set()

    @property
    def goes_on(self) -> bool:
        """Whether nobody has stopped it, and nothing has been reported."""
        return self._on_end is not None

    def resume(self) -> None:
        """Go on watching, unless the end has been reported or there is no more room to read ahead."""
        self._wanted = False
        if self._on_end is None or self.reading or not self._has_room():
            return
        self._scope = trio.CancelScope()
        self._paused = trio.Event()
        self._comm.reserve_reading(True)
        self._nursery.start_soon(self._watch, name="watching for the end of a comm")

    def _has_room(self) -> bool:
        return self._comm.buffered < READ_AHEAD if self._look is None else self._look()

    async def pause(self) -> None:
        """Stop reading; returns when the comm is free for another reader, who resumes the watch when done.

        Cancellation: the watch goes on.
        """
        self._wanted = True
        self._scope.cancel(reason="somebody reads the comm")
        try:
            await self._paused.wait()
        except BaseException:
            self.resume()
            raise

    def stop(self) -> None:
        """Stop watching for good.  The comm is free when :meth:`pause` returns, or when the next read has seen to that."""
        self._on_end = None
        self._scope.cancel(reason="the watch is over")

    async def _watch(self) -> None:
        ended = False
        try:
            with self._scope:
                while True:
                    if not await self._comm.wait_incoming():
                        ended = True
                        break
                    if not self._has_room():
                        break
                    await checkpoint_if_cancelled()  # a read that need not wait delivers no cancellation
        except trio.ClosedResourceError:
            self._on_end = None  # closed here: there is nothing to watch
        finally:
            self._comm.reserve_reading(False)
            self._paused.set()
        if ended and self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end()
        elif self._scope.cancel_called and not self._wanted:
            self.resume()  # whoever wanted to read has been cancelled meanwhile
