"""The request that is being answered, for asyncio-flavoured handlers."""

from __future__ import annotations

import asyncio
import math

import trio

from ..abc import Peer
from ..server import Request as NativeRequest
from ..server import current_request as native_current_request
from ._carry import run_in_trio
from ._guest import acquire_portal

__all__ = ["Request", "current_request"]


class ShutdownRequested:
    """An event: the server starts to shut down."""

    __slots__ = ("_event",)

    def __init__(self, event: trio.Event) -> None:
        self._event = event

    def is_set(self) -> bool:
        """Whether it does."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Wait until it does."""
        if not self._event.is_set():
            await run_in_trio(await acquire_portal(), self._event.wait)


class Request:
    """What an asyncio-flavoured handler may know of its request; see :func:`current_request`."""

    __slots__ = ("_native",)

    def __init__(self, native: NativeRequest) -> None:
        self._native = native

    @property
    def op(self) -> str:
        """The name it was called by."""
        return self._native.op

    @property
    def peer(self) -> Peer:
        """Who called."""
        return self._native.peer

    @property
    def deadline(self) -> float:
        """The time, by the event loop's clock, at which the caller stops waiting; ``math.inf`` if it told none."""
        deadline = self._native.deadline
        if deadline == math.inf:
            return deadline
        return asyncio.get_running_loop().time() + deadline - trio.current_time()

    @property
    def serializers(self) -> tuple[str, ...] | None:
        """Families for ``Serialize`` payloads that the caller asked for; None where it named none."""
        return self._native.serializers

    @property
    def running(self) -> bool:
        """Whether the handler still runs; tasks that it left behind may ask."""
        return self._native.running

    @property
    def shutdown_requested(self) -> ShutdownRequested:
        """Set when the server starts to shut down: a stream may then end cleanly within the grace.  ``is_set()``, ``await wait()``."""
        return ShutdownRequested(self._native.shutdown_requested)

    def __repr__(self) -> str:
        return repr(self._native)


def current_request() -> Request:
    """The request that this task, or the task that started it, is answering.

    Raises:
        LocalProtocolError: called outside of a handler.
    """
    return Request(native_current_request())
