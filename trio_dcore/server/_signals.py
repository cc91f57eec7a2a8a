"""Signals: the first stops a server in order, the second now."""

from __future__ import annotations

import signal
from typing import NoReturn

import trio

from ._server import BaseServer

__all__ = ["stop_on_signals"]


async def stop_on_signals(server: BaseServer, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Stop a server when SIGINT or SIGTERM comes, and wait until it has closed::

        async with Server(handlers) as server:
            await server.listen("tcp://:8786")
            await stop_on_signals(server)

    or, beside other tasks, ``await nursery.start(stop_on_signals, server)``.

    The first signal stops with the server's grace.  The second, of either kind, cancels what still runs, and when the server has
    closed raises KeyboardInterrupt (SIGINT) or ``SystemExit(143)`` (SIGTERM).  Returns when the server has closed otherwise, so
    that a program that does nothing else ends normally.  A server's block raises that exception alone; a nursery round the server
    puts it into a group, as any exception of a task.

    Only in the main thread.  While it waits, trio's own handling of Ctrl-C is off; without this task Ctrl-C cancels everything at
    once.

    Cancellation: the signals have their former handlers again; the server is as it was.

    Raises:
        KeyboardInterrupt, SystemExit: a second signal came.
        RuntimeError: this is not the main thread.
    """
    second: signal.Signals | None = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
        task_status.started()
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                nonlocal second
                first = True
                async for number in received:
                    which = signal.Signals(number)
                    if first:
                        server.stop(reason=which.name)
                        first = False
                    elif second is None:
                        second = which
                        server.stop(0, reason=f"a second signal, {which.name}")

            nursery.start_soon(watch)
            await server.finished()
            nursery.cancel_scope.cancel(reason="the server has closed")
    if second is not None:
        _exit_by(second)


def _exit_by(which: signal.Signals) -> NoReturn:
    if which is signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + which)  # as shells say it
