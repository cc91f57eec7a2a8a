"""Dask's message streams: batches of small messages that nobody answers (wire document, section 7)."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import trio

from .._util import leaves
from ..abc import Comm
from ..comm import BaseComm
from ..errors import CommClosedError
from ._handlers import Handler
from ._throttle import Throttle, shown

__all__ = ["handle_stream"]

_log = logging.getLogger("trio_dcore.server")

_YIELD_MESSAGES = 16


async def handle_stream(
    comm: Comm,
    handlers: Mapping[str, Handler],
    extra: Mapping[str, Any] | None = None,
    draining: Callable[[], bool] = lambda: False,
) -> None:
    """Read messages and run the handler that each one's ``op`` names, one after the other, until the stream ends; then close the comm.

    A message is a dict or a list of dicts.  ``{"op": "close-stream"}`` ends the stream, the string ``"OK"`` drops the rest of its list, an
    empty ``op`` is skipped.  Where Dask would end the stream, a message with an unknown or missing ``op``, or whose handler raises, is
    logged and dropped, and the rest goes on.

    Args:
        comm: nobody else reads it.
        handlers: op -> callable, plain or async; results are discarded.
        extra: further keyword arguments for every handler; a key of the message wins over them.
        draining: whether the stream is to end as soon as all that has come is handled.

    Cancellation: closes the comm; a message that was being handled is not handled again.
    """
    handled = 0
    log = _Log(comm.peer_address)
    try:
        while not (draining() and isinstance(comm, BaseComm) and not comm.stale()):
            batch = await comm.read()
            if not isinstance(batch, (list, tuple)):
                batch = (batch,)
            for message in batch:
                if isinstance(message, str) and message == "OK":
                    break
                if isinstance(message, dict) and message.get("op") == "close-stream":
                    return
                await _handle(message, handlers, extra or {}, log)
                handled += 1
                if handled % _YIELD_MESSAGES == 0:
                    await trio.lowlevel.checkpoint()  # handlers that need no wait must not keep everybody else waiting
    except CommClosedError as error:
        _log.debug("a stream from %s ended: %s", comm.peer_address, error)
    finally:
        await comm.close()


class _Log:
    """Tells of messages that were dropped: of each kind at most one line a second, for a peer can send any number of them."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._dropped = Throttle()
        self._failed = Throttle()

    def dropped(self, what: str) -> None:
        if (more := self._dropped.due()) is not None:
            _log.warning("dropped from the stream of %s: %s%s", self._peer, what, more)

    def failed(self, op: str) -> None:
        if (more := self._failed.due()) is not None:
            _log.exception("the stream handler %r failed for a message from %s; the stream goes on%s", op, self._peer, more)


async def _handle(message: object, handlers: Mapping[str, Handler], extra: Mapping[str, Any], log: _Log) -> None:
    if not isinstance(message, dict) or "op" not in message:
        log.dropped("a message without an op" if isinstance(message, dict) else f"a {type(message).__name__} instead of a dict")
        return
    op = message["op"]
    if not op:
        return
    handler = handlers.get(op) if isinstance(op, str) else None
    if handler is None:
        log.dropped(f"a message with the unknown op {shown(op)}")
        return
    arguments = {**extra, **message}
    del arguments["op"]
    try:
        result = handler(**arguments)
        if inspect.isawaitable(result):
            await result
    except (KeyboardInterrupt, SystemExit, trio.Cancelled):
        raise
    except BaseException as error:
        if any(isinstance(leaf, (KeyboardInterrupt, SystemExit, trio.Cancelled)) for leaf in leaves(error)):
            raise
        log.failed(op)
