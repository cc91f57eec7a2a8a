"""What all listeners on sockets share: accepting, and what may go wrong with it."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from abc import abstractmethod

import trio
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled, wait_readable

from ..abc import CommSettings, Listener
from ._comm import FramedComm

__all__ = ["BACKLOG", "BrokenConnection", "SocketListener"]

#: Connections that the system keeps until they are accepted (``distributed.comm.socket-backlog``).
BACKLOG = 2048
# Connections accepted in a row before other tasks get their turn.
_ACCEPT_RUN = 16
# accept() reports errors of a connection that died in the queue as its own; the next one may be fine (man 2 accept).
_DEAD_IN_QUEUE = {
    getattr(errno, name)
    for name in (
        "ECONNABORTED",
        "EPERM",
        "EPROTO",
        "ENETDOWN",
        "ENOPROTOOPT",
        "EHOSTDOWN",
        "ENONET",
        "EHOSTUNREACH",
        "EOPNOTSUPP",
        "ENETUNREACH",
    )
    if hasattr(errno, name)
}
# The peer was gone before its address was asked for, or, on macOS, before its options were set.
_DEAD_SINCE = {*_DEAD_IN_QUEUE, errno.ENOTCONN, errno.EINVAL, errno.ECONNRESET}


class BrokenConnection(OSError):
    """A connection was accepted and could not be made a comm; it was closed, and the listener is as good as before."""


class SocketListener(Listener):
    """Accepts on one bound socket that listens and doesn't block, which it owns.  Subclasses say what a connection becomes."""

    def __init__(self, sock: socket.socket, settings: CommSettings) -> None:
        self._socket = sock
        self._settings = settings
        self._accepted = 0
        self._process = os.getpid()

    @abstractmethod
    def _make_comm(self, sock: socket.socket) -> FramedComm:
        """Wrap a connection, which the comm then owns; close it if this fails.  Not a checkpoint."""

    async def accept(self) -> FramedComm:
        await checkpoint_if_cancelled()
        while True:
            if self._accepted >= _ACCEPT_RUN:
                self._accepted = 0
                await cancel_shielded_checkpoint()
            if self._socket.fileno() == -1:
                raise trio.ClosedResourceError("this listener was closed")
            self._accepted += 1
            try:
                sock = self._socket.accept()[0]
            except BlockingIOError:
                self._accepted = 0
                await wait_readable(self._socket)
                continue
            except OSError as error:
                if error.errno not in _DEAD_IN_QUEUE:
                    raise
                continue
            try:
                return self._make_comm(sock)
            except OSError as error:
                if error.errno not in _DEAD_SINCE or isinstance(error, ssl.SSLError):  # whose numbers are others
                    raise BrokenConnection(*error.args) from error

    def close(self) -> None:
        if self._socket.fileno() == -1:
            return
        # A forked child closes its copy of the descriptor and nothing else: trio's set of what is waited for is its parent's as well.
        if os.getpid() == self._process:
            self._retract()
            try:
                trio.lowlevel.notify_closing(self._socket)
            except RuntimeError:
                pass  # trio has ended: nobody waits for the socket, which is to be closed all the same
        self._socket.close()

    def _retract(self) -> None:
        """Take back what was made for the address, while the socket still listens.  Must not fail."""
