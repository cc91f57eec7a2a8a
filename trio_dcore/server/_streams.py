"""Handlers that give many answers: async generators, and handlers that take the comm."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextvars import Context
from types import AsyncGeneratorType
from typing import Any

import trio
from trio.lowlevel import checkpoint_if_cancelled, current_task

from ..abc import Comm
from ..comm import BaseComm, Gatherer, Substream, SubstreamComm
from ..errors import CommClosedError, LimitExceeded, RemoteProtocolError
from ..protocol._envelope import CANCEL, END, Credit, RequestHeader
from ._drive import drive, resume

__all__ = ["StreamAnswer", "generate"]


async def generate(
    generator: AsyncGenerator[Any, None],
    context: Context,
    emit: Callable[[Any], Awaitable[None]],
    on_wait: Callable[[], None] | None,
) -> None:
    """Run an async generator to its end and emit each item.

    While it is suspended at a ``yield``, whatever ends the emitting is thrown into it at that ``yield``, in the same task, so that
    scopes and nurseries that it has open there see their own exceptions; it never passes the generator by.  For the same reason
    nothing here enters a scope before a step of the generator and leaves it after.

    Cancellation: delivered inside the generator, wherever it is, and its ``finally`` is awaited.
    """
    # The first part of a step is done in place: for one that needs no wait that is all.
    plain = type(generator) is AsyncGeneratorType
    run = context.run
    step: Any = generator.__anext__()
    told: BaseException | None = None  # what was thrown in at the last yield
    while True:
        try:
            if plain:
                trap = run(step.send, None)
                item = await resume(context, step, trap, on_wait)
            else:
                item = await drive(context, step, on_wait, whole=False)
        except StopIteration as stop:
            item = stop.value
        except StopAsyncIteration:
            break
        if told is not None and _is_final(told):
            # It was told that nobody takes its items any more, and yields on: end it, where its finally blocks still run.
            await drive(context, generator.aclose(), on_wait, whole=False)
            break
        try:
            await emit(item)
        except BaseException as error:
            told = error
            step = generator.athrow(error)
        else:
            told = None
            step = generator.__anext__()
    # It may have swallowed a Cancelled on its way here.
    await checkpoint_if_cancelled()


def _is_final(error: BaseException) -> bool:
    """Whether a further item would meet the same fate as the one that met ``error``."""
    if isinstance(error, (CommClosedError, trio.ClosedResourceError, LimitExceeded)):
        return True
    # A scope of the generator's own may have been the one, and may have been left since.
    return isinstance(error, trio.Cancelled) and trio.current_effective_deadline() == -math.inf


class StreamAnswer:
    """Where the items of one request go, and what its handler gets as ``comm``.

    Made by the connection's task.

    Args:
        comm: the connection's.
        header: that of an opted-in request; None for a plain one, whose items are bare messages on the bare comm.
        serializers: families for the payloads of items; None for the comm's own.
    """

    __slots__ = ("_bare", "_gatherer", "_serializers", "_substream", "_view", "comm", "streaming")

    def __init__(self, comm: BaseComm, header: RequestHeader | None, serializers: tuple[str, ...] | None = None) -> None:
        self._bare = comm
        self._serializers = serializers
        self._substream: Substream | None = None
        self._gatherer: Gatherer | None = None
        self._view: SubstreamComm | None = None
        self.comm: Comm = comm
        self.streaming = header is not None and header.stream
        if header is not None:
            extension = comm.extension
            assert extension is not None
            limits = comm.settings.limits
            self._substream = Substream(
                comm,
                header.id,
                credit=header.window or Credit(*extension.window),
                # Where the caller waits for one reply no items may come.
                window=Credit(limits.window, limits.window_bytes) if header.stream else Credit(0, 0),
                on_end=_client_ended,
                half_close=True,
                owner=current_task(),
            )
            refusal = "" if header.stream else "the caller waits for one reply, so nothing can be written; it must use .stream()"
            self.comm = self._view = SubstreamComm(self._substream, comm, refusal)

    async def run(self, generator: AsyncGenerator[Any, None], context: Context, on_wait: Callable[[], None] | None) -> None:
        """Send what an async generator yields; see :func:`generate`."""
        stream = self._substream
        comm = self._bare
        if stream is None or self._serializers is not None or not Gatherer.is_for(comm):
            await generate(generator, context, self.emit, on_wait)
            return
        gatherer = self._gatherer = Gatherer(stream, comm)
        flush = gatherer.flush

        def waits() -> None:
            flush()
            if on_wait is not None:
                on_wait()

        try:
            await generate(generator, context, gatherer.emit, waits)
        except Exception:
            await self._settle()
            raise
        finally:
            flush()
            stream.before_sending = None
        await stream.settle()

    async def _settle(self) -> None:
        """What answers a failure does not wait as long as items may."""
        assert self._gatherer is not None
        assert self._substream is not None
        self._gatherer.flush()
        try:
            await self._substream.settle()
        except (CommClosedError, trio.ClosedResourceError, LimitExceeded):
            pass  # the failure is what counts, and nobody is left to be told of it

    async def emit(self, item: Any) -> None:
        """Send one item."""
        if self._substream is None:
            await self._bare.write(item, on_error="raise", serializers=self._serializers)
        else:
            await self._substream.send(item, serializers=self._serializers)

    async def end(self) -> None:
        """Say that there are no more."""
        assert self._substream is not None
        await self._substream.send_end()

    def close(self) -> bool:
        """The handler has ended.  Tasks that it left behind must not go on to use the connection: the next request is its own.

        Returns whether :meth:`released` has to be awaited before the caller is told of the end.  Not a checkpoint.
        """
        stream = self._substream
        if stream is None:
            return False
        assert self._view is not None
        self._view.detach()
        return stream.held

    async def released(self) -> None:
        """Wait until nobody else reads the connection any more: a step or two."""
        assert self._substream is not None
        await self._substream.wait_free()


def _client_ended(kind: int, value: object) -> Exception | None:
    if kind == END:
        return None
    if kind == CANCEL:
        return CommClosedError("the client has cancelled the request")
    raise RemoteProtocolError(f"an envelope of kind {kind}, which only servers may send")
