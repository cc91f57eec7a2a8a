"""Dask's message streams: batches of small messages that nobody answers (wire document, section 7)."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import trio
from trio.lowlevel import checkpoint_if_cancelled

from .._util import leaves
from ..abc import Comm
from ..comm import BaseComm
from ..errors import CommClosedError
from ..protocol._markers import RESERVED
from ._handlers import Handler, thread_of, wrong_arguments
from ._statistics import Counters
from ._throttle import Throttle, shortened, shown

__all__ = ["StreamLog", "handle_stream"]

_log = logging.getLogger("trio_dcore.server")

_YIELD_MESSAGES = 16
# Of these it can be told whether they are empty: an array has no truth value.
_PLAIN = frozenset({type(None), bool, int, float, bytes, tuple, list, dict, set, frozenset})


async def handle_stream(
    comm: Comm,
    handlers: Mapping[str, Handler],
    extra: Mapping[str, Any] | None = None,
    draining: Callable[[], bool] = lambda: False,
    log: StreamLog | None = None,
    admits: Callable[[str], bool] = lambda op: True,
) -> None:
    """Read messages and run the handler that each one's ``op`` names, one after the other, until the stream ends; then close the comm.

    A message is a dict or a list of dicts.  ``{"op": "close-stream"}`` ends the stream, the string ``"OK"`` drops the rest of its list, an
    empty ``op`` is skipped.  Where Dask would end the stream, a message with an unknown or missing ``op``, or whose handler raises, is
    logged and dropped, and the rest goes on.  So is one whose op the peer may not have handled.  On a bare comm the payloads of a batch
    are not touched if nothing in it is to be handled.

    Args:
        comm: nobody else reads it.
        handlers: op -> callable, plain, async or marked with ``in_thread``; results are discarded.
        extra: further keyword arguments for every handler; a key of the message wins over them.
        draining: whether the stream is to end as soon as all that has come is handled.
        log: of the server, for all its streams; by default the stream has its own.
        admits: whether the peer may have a message with that op handled; asked right before, each time, and maybe when it has come.

    Cancellation: closes the comm; a message that was being handled is not handled again.
    """
    handled = 0
    log = log or StreamLog()
    try:
        while not (draining() and isinstance(comm, BaseComm) and not comm.stale()):
            batch = await _read(comm, handlers, admits)
            if not isinstance(batch, (list, tuple)):
                batch = (batch,)
            for message in batch:
                if isinstance(message, str) and message == "OK":
                    break
                if isinstance(message, dict) and isinstance(op := message.get("op"), str) and op == "close-stream":
                    return
                await _handle(message, handlers, extra or {}, log, admits, comm.peer_address)
                handled += 1
                if handled % _YIELD_MESSAGES == 0:
                    await trio.lowlevel.checkpoint()  # handlers that need no wait must not keep everybody else waiting
    except CommClosedError as error:
        _log.debug("a stream from %s ended: %s", comm.peer_address, error)
    finally:
        await comm.close()


async def _read(comm: Comm, handlers: Mapping[str, Handler], admits: Callable[[str], bool]) -> Any:
    """The next message; with its markers in place if nothing in it is to be handled."""
    if not isinstance(comm, BaseComm):
        return await comm.read()
    await checkpoint_if_cancelled()
    try:
        found = await comm.next_head()
    except trio.ClosedResourceError as error:
        raise CommClosedError(str(error)) from error
    if found is None:
        raise CommClosedError(f"{comm.peer_address} closed the comm")
    head, frames = found
    return head if frames is None or not _to_be_handled(head, handlers, admits) else await comm.unpack(frames)


def _to_be_handled(head: object, handlers: Mapping[str, Handler], admits: Callable[[str], bool]) -> bool:
    """Whether a handler may have to run for anything in a batch whose markers are in place."""
    for message in head if isinstance(head, (list, tuple)) else (head,):
        if isinstance(message, str) and message == "OK":
            break
        if not isinstance(message, dict) or not RESERVED.isdisjoint(message):
            return True  # it may become anything
        op = message.get("op")
        if not isinstance(op, str):
            if op is not None:
                return True  # likewise
        elif op == "close-stream":
            break
        elif op in handlers and admits(op):
            return True
    return False


class StreamLog:
    """Tells of messages that were dropped, in all streams of a server.

    A peer can send any number of them, and come back any number of times.  So there is at most one line a second for messages that are
    for no handler, and for each handler one for those with the wrong arguments, one for those of peers that may not call it, and one for
    those that it fails for.

    Args:
        statistics: of the server; what is refused is counted there.
    """

    def __init__(self, statistics: Counters | None = None) -> None:
        self._statistics = statistics
        self._dropped = Throttle()
        # By op; there is a handler for each.
        self._misfits: defaultdict[str, Throttle] = defaultdict(Throttle)
        self._refused: defaultdict[str, Throttle] = defaultdict(Throttle)
        self._failed: defaultdict[str, Throttle] = defaultdict(Throttle)

    def dropped(self, what: str, peer: str) -> None:
        """The message is for no handler."""
        if (more := self._dropped.due()) is not None:
            _log.warning("dropped from the stream of %s: %s%s", peer, what, more)

    def misfit(self, op: str, error: TypeError, peer: str) -> None:
        """The arguments are not the handler's, so it was not called."""
        if (more := self._misfits[op].due()) is not None:
            _log.warning("dropped from the stream of %s: a message for %r: %s%s", peer, op, shortened(str(error)), more)

    def refused(self, op: str, peer: str) -> None:
        """The peer may not have it handled."""
        if self._statistics is not None:
            self._statistics.refused += 1
        if (more := self._refused[op].due()) is not None:
            _log.info("dropped from the stream of %s: a message for %r, which it may not call%s", peer, op, more)

    def failed(self, op: str, peer: str) -> None:
        """The handler has raised what is being handled."""
        if (more := self._failed[op].due()) is not None:
            _log.exception("the stream handler %r failed for a message from %s; the stream goes on%s", op, peer, more)


async def _handle(
    message: object,
    handlers: Mapping[str, Handler],
    extra: Mapping[str, Any],
    log: StreamLog,
    admits: Callable[[str], bool],
    peer: str,
) -> None:
    if not isinstance(message, dict) or "op" not in message:
        log.dropped(
            "a message without an op" if isinstance(message, dict) else f"a {type(message).__name__} instead of a dict", peer
        )
        return
    op = message["op"]
    if (isinstance(op, str) or type(op) in _PLAIN) and not op:
        return
    handler = handlers.get(op) if isinstance(op, str) else None
    if handler is None:
        log.dropped(f"a message with the unknown op {shown(op)}", peer)
        return
    if not admits(op):
        log.refused(op, peer)
        return
    arguments = {**extra, **message}
    del arguments["op"]
    called, takes_thread, limiter = thread_of(handler)
    try:
        if takes_thread:
            await trio.to_thread.run_sync(_in_worker, called, arguments, limiter=limiter)
        else:
            result = called(**arguments)
            if inspect.isawaitable(result):
                await result
    except (KeyboardInterrupt, SystemExit, trio.Cancelled):
        raise
    except BaseException as error:
        if any(isinstance(leaf, (KeyboardInterrupt, SystemExit, trio.Cancelled)) for leaf in leaves(error)):
            raise
        if isinstance(error, TypeError):
            caller = _in_worker if takes_thread else _handle
            misfit = wrong_arguments(op, called, (), arguments, error, caller.__code__)
            if misfit is not None:
                log.misfit(op, misfit, peer)
                return
        log.failed(op, peer)


def _in_worker(function: Handler, arguments: dict[str, Any]) -> None:
    function(**arguments)
