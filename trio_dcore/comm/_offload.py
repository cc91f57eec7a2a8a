"""Work on large messages in worker threads, so that everybody else's go on meanwhile (wire document, section 5.9).

Stock Dask has one thread for all of a process, so that a slow serializer holds up everybody's large messages.  Here there are a few, apart
from those for handlers, of which one may itself wait for a large message.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

import trio

__all__ = ["in_worker"]

_log = logging.getLogger("trio_dcore.comm")

_Result = TypeVar("_Result")

# One that doesn't end must not hold up the others; more of them than this share a processor, and the memory.
_THREADS = min(32, (os.cpu_count() or 1) + 4)

_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("trio_dcore offload limiter")


async def in_worker(function: Callable[[], _Result], what: str) -> _Result:
    """Call a function in a worker thread and return what it returns, or raise what it raises.

    Cancellation: is delivered at once.  Python has no way to stop a thread: it goes on, counts as one of the few until it ends, and its
    result is dropped; a line in the log says so.  It does not hold up the end of the program.

    Args:
        function: called once.
        what: it does, for the log.
    """
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_THREADS)
        _limiter.set(limiter)
    running = False
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        # An error is put down, neither raised nor returned: what it passed through in trio would refer to it, as its traceback does to
        # that, and the message that could not be decoded would stay until a collection.
        nonlocal running
        running = True
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        finally:
            running = False

    try:
        await trio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=limiter)
    except trio.Cancelled:
        if running:
            _log.info("%s was cancelled; the thread that does it goes on, and its result will be dropped", what)
        raise
    if errors:
        raise errors.pop()
    return results.pop()
