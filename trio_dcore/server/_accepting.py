"""Accepting connections: one task for each listener, which all share the server's limits; and closing those that are idle.

A connection is accepted first, and then waits for its place (:mod:`._room`): only so it is known that somebody wants one, and nobody
gives way for nothing.  So each listener holds at most one connection more than the limits say, on which nothing is read, written or
spent; the others stay in the system's queue.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import trio

from ..abc import Comm, Listener
from ..comm import BaseComm, BrokenConnection
from ._room import Room
from ._throttle import Throttle

if TYPE_CHECKING:
    from ._server import BaseServer

__all__ = ["Acceptor", "close_idle"]

_log = logging.getLogger("trio_dcore.server")

# The listener itself is broken.  All else passes, most of it when the process or the system has descriptors or memory again, and must not
# cost those who are being served.
_BROKEN = {errno.EBADF, errno.ENOTSOCK}
_PAUSE = 0.1
# Connections accepted in a row before other tasks get their turn, whatever the listener does.
_ACCEPT_RUN = 8


class Acceptor:
    """Accepts for one server, from any number of listeners."""

    def __init__(self, server: BaseServer, room: Room) -> None:
        self._server = server
        self._room = room
        self._turn = trio.StrictFIFOLock()  # of listeners that wait for room
        self._pauses = Throttle()
        self._unusable = Throttle()
        self._misfits = Throttle()

    async def run(self, listener: Listener) -> None:
        """Accept until the listener is closed or the server stops.

        Cancellation: the connection that waits for its place, if any, is closed.

        Raises:
            OSError: the listener's socket is none any more.
        """
        accepted = 0
        while True:
            try:
                comm: Comm = await listener.accept()
            except trio.ClosedResourceError:
                return
            except BrokenConnection as error:
                if (more := self._unusable.due()) is not None:
                    _log.warning("a connection to %s can't be used and was closed: %s%s", listener.listen_address, error, more)
            except OSError as error:
                if error.errno in _BROKEN:
                    raise
                if (more := self._pauses.due()) is not None:
                    _log.warning("accepting on %s pauses: %s%s", listener.listen_address, error, more)
                # It may be others of this process, or of this machine, who have taken them all, and they don't tell.
                with trio.move_on_after(_PAUSE):
                    await self._room.changed.park()
                continue
            else:
                if not isinstance(comm, BaseComm):
                    self._refuse_misfit(listener, comm)
                elif not await self._admit(comm):
                    return
            accepted += 1
            if accepted % _ACCEPT_RUN == 0:
                await trio.lowlevel.checkpoint()

    async def _admit(self, comm: BaseComm) -> bool:
        """Serve a comm as soon as there is room; False if the server doesn't take any more."""
        try:
            if self._turn.locked():
                await self._turn.acquire()
            else:
                self._turn.acquire_nowait()  # nearly always; the other is a checkpoint
            try:
                now = trio.current_time()
                while (again := self._room.make(now)) > now:
                    with trio.move_on_at(again):
                        await self._room.changed.park()
                    now = trio.current_time()
                admitted = self._server._admit(comm, now)
            finally:
                self._turn.release()
        except BaseException:
            comm.abort()
            raise
        if not admitted:
            comm.abort()
        return admitted

    def _refuse_misfit(self, listener: Listener, comm: object) -> None:
        # A mistake in somebody's transport, which shows here first; it costs that connection, and not the server.
        if isinstance(comm, Comm):
            comm.abort()
        if (more := self._misfits.due()) is not None:
            error = TypeError(f"its listener made {comm!r}, which is no trio_dcore.comm.BaseComm")
            _log.error("a connection to %s can't be served: %s%s", listener.listen_address, error, more)


async def close_idle(room: Room, patience: float) -> None:
    """Close connections when they have been idle for ``patience`` seconds (``Limits.idle``), until cancelled."""
    while True:  # noqa: ASYNC110  # nothing is polled: it sleeps until one may be due
        await trio.sleep_until(room.expire(trio.current_time(), patience))
