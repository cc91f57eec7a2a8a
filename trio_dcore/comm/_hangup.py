"""Noticing that a peer has gone, for nothing on the path of a call.

On Linux one epoll set per server holds every connection's socket, registered once for EPOLLRDHUP and nothing else.  It is itself
one descriptor that a single task waits for, so a peer that closes is noticed while its handler runs, without reading from the
socket, also behind a request that was pipelined.  While a handler runs for long, bytes that come are told as well, if asked for:
they may be a ping.  Elsewhere, and on streams without a socket, a task watches while a handler
waits (:class:`~trio_dcore.comm._watch.EndWatch`).
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable

import trio

__all__ = ["HangupWatcher"]


class HangupWatcher:
    """Calls back, once, when the other end of a socket has closed or reset it."""

    def __init__(self) -> None:
        if sys.platform != "linux":  # pragma: no cover
            raise RuntimeError("EPOLLRDHUP is Linux's")
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._on_bytes: dict[int, Callable[[], bool]] = {}

    def watch(self, fileno: int, callback: Callable[[], None]) -> None:
        """Start watching a connected socket."""
        self._epoll.register(fileno, select.EPOLLRDHUP | select.EPOLLONESHOT)
        self._callbacks[fileno] = callback

    def forget(self, fileno: int, callback: Callable[[], None]) -> None:
        """Stop watching.  The callback names the watch: by now the number may belong to another connection."""
        if self._callbacks.get(fileno) == callback:
            del self._callbacks[fileno]
            self._on_bytes.pop(fileno, None)
            try:
                self._epoll.unregister(fileno)
            except OSError:
                pass  # the socket was closed before, which took it out of the set

    def listen(self, fileno: int, on_bytes: Callable[[], bool]) -> None:
        """Have ``on_bytes`` called when there is something to read on a socket that is watched, until it returns False."""
        if fileno in self._callbacks and fileno not in self._on_bytes:
            self._on_bytes[fileno] = on_bytes
            self._arm(fileno, select.EPOLLIN)

    def _arm(self, fileno: int, also: int = 0) -> None:
        try:
            self._epoll.modify(fileno, select.EPOLLRDHUP | select.EPOLLONESHOT | also)
        except OSError:
            pass  # the socket was closed meanwhile, which took it out of the set

    async def run(self) -> None:
        """Deliver the callbacks, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fileno, _events in self._epoll.poll(0, 64):
                callback = self._callbacks.get(fileno)
                if callback is None:
                    continue
                on_bytes = self._on_bytes.get(fileno)
                if _hung_up(fileno):
                    self._on_bytes.pop(fileno, None)
                    callback()
                elif on_bytes is not None:
                    if on_bytes():
                        self._arm(fileno, select.EPOLLIN)
                    else:
                        del self._on_bytes[fileno]
                        self._arm(fileno)

    def close(self) -> None:
        """Free the epoll set."""
        trio.lowlevel.notify_closing(self._epoll.fileno())
        self._epoll.close()


def _hung_up(fileno: int) -> bool:
    """Whether that is so of the socket that has the number now.

    A socket that was closed while a forked child had a copy of it stays in the set, under a number that may be another's by now.
    """
    probe = select.poll()
    probe.register(fileno, select.POLLRDHUP)
    return bool(probe.poll(0))
