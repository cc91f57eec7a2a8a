"""One connection of a server: read a request, run its handler, answer, again.

All of it happens on the connection's own task: a handler needs no task, scope or event of its own.  The connection's cancel scope is
cancelled when its caller goes away while a handler runs whose answer somebody awaits; the server's scope, further out, when the
grace is over or the server is cancelled.

Nothing that a peer sends or a handler raises gets out of here, but for KeyboardInterrupt and SystemExit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from types import CoroutineType
from typing import TYPE_CHECKING, Any

import trio
from trio.lowlevel import checkpoint_if_cancelled

from ..comm import BaseComm
from ..errors import (
    CommClosedError,
    DcoreError,
    HandlerCancelled,
    LimitExceeded,
    NotAllowed,
    RemoteProtocolError,
    SerializationError,
    ServerClosing,
    UnknownOp,
    UnsafePayload,
)
from ..protocol._context import Buffer
from ..protocol._envelope import ERROR, GOODBYE, KEY, PING, PONG, REPLY, RequestHeader, parse_envelope, parse_request_header
from ..protocol._remote_errors import error_reply, error_value
from ._drive import drive
from ._handlers import HandlerEntry, closest, wrong_arguments
from ._request import Request, request_variable
from ._status import Status
from ._streams import StreamAnswer, generate

if TYPE_CHECKING:
    from ._server import Server

__all__ = ["Connection"]

_log = logging.getLogger("trio_dcore.server")
_ABSENT: Any = object()


class Connection:
    """Serves one comm until it ends.

    Attributes:
        scope: cancelled when the connection is of no use any more.
        idle: nothing is in flight: it waits for the next request.
        op: the op in flight, or None.
    """

    __slots__ = ("_awaited", "_gone", "_last_id", "_watching", "on_wait", "comm", "idle", "op", "scope", "server", "handshaking", "watched")

    def __init__(self, server: Server, comm: BaseComm) -> None:
        self.server = server
        self.comm = comm
        self.scope = trio.CancelScope()
        self.handshaking = True
        self.watched: int | None = None  # the descriptor that the hang-up watcher has for it
        self.idle = False
        self.op: str | None = None
        self._awaited = False  # somebody waits for the answer of the handler that runs
        self._watching = False
        #: For handlers' first wait; None where the hang-up watcher or the comm itself tells of the peer's end.
        self.on_wait: Callable[[], None] | None = None
        self._gone = False  # the peer has hung up
        self._last_id = 0  # of the last opted-in request

    async def run(self) -> None:
        """Serve until the peer, the server or an error ends it.

        Cancellation: the handler is cancelled, its ``finally`` awaited, a caller that waits gets one last non-blocking answer, and
        the comm is closed.
        """
        comm = self.comm
        try:
            with self.scope:
                if await self._handshake():
                    self.server._watch(self)
                    await self._serve()
        except CommClosedError as error:
            _log.debug("connection from %s ended: %s", comm.peer_address, error)
        except (RemoteProtocolError, LimitExceeded) as error:
            self.server._statistics.errors += 1
            _log.info("closing the connection from %s: %s", comm.peer_address, error)
        except Exception:
            self.server._statistics.errors += 1
            _log.exception("the connection from %s failed", comm.peer_address)
        finally:
            self.server._unwatch(self)
            await comm.aclose()

    async def _handshake(self) -> bool:
        patience = self.comm.settings.limits.handshake_timeout
        with trio.CancelScope(deadline=math.inf if patience is None else trio.current_time() + patience) as limit:
            await self.comm.handshake()
        self.handshaking = False
        if limit.cancelled_caught:
            self.server._statistics.refused += 1
            _log.info("closing the connection from %s: no handshake within %s s", self.comm.peer_address, patience)
        return not limit.cancelled_caught

    # -- what others tell the connection -----------------------------------------------------------------------------------------

    def hung_up(self) -> None:
        """The peer has closed its end; it may be that requests from before are still unread."""
        self._gone = True
        if self._awaited:
            self.scope.cancel(reason="the caller has gone")

    def handler_waits(self) -> None:
        """A handler whose answer is awaited has to wait, and nothing else tells when the peer hangs up."""
        if self._awaited:
            nursery = self.server._connection_tasks
            assert nursery is not None
            self.comm.watch_end(nursery, self.hung_up)
            self._watching = True

    def retire(self) -> None:
        """The server is draining: close if nothing is in flight."""
        if self.handshaking:
            self.scope.cancel(reason="the server is shutting down")
        elif self.idle and not self.comm.stale():
            self._say_goodbye()
            self.comm.abort()
        # Else a request is running, or one has come that deserves its ServerClosing; the connection ends by itself after it.

    def _say_goodbye(self) -> None:
        """Tell a peer that uses the extension that nothing after its last request was started."""
        if self._last_id:
            try:
                self.comm.write_nowait((GOODBYE, self._last_id, None))
            except (CommClosedError, trio.ClosedResourceError):
                pass  # it has gone by itself

    # -- requests ----------------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        comm = self.comm
        server = self.server
        while True:
            if server.draining and not comm.stale():
                self._say_goodbye()
                return
            self.idle = True
            try:
                await checkpoint_if_cancelled()
                found = await comm.next_head()
            except trio.ClosedResourceError:
                return
            except RemoteProtocolError as error:
                if not comm.closed():
                    # Framing is intact, but whether an answer was wanted is unknown: one is given, then the comm is closed.
                    await self._send_failure(None, error)
                raise
            finally:
                self.idle = False
            if found is None:
                return
            head, frames = found
            if type(head) is not dict:
                if type(head) is tuple and comm.extension is not None and self._last_id:
                    self._left_over(head)
                    continue
                error = ValueError(f"a request must be a dict with an 'op', not a {type(head).__name__}")
                await self._send_failure(None, error)
            elif not await self._answer(head, frames):
                return

    def _left_over(self, message: tuple[object, ...]) -> None:
        """An envelope behind the end of its request, such as credit that crossed it; a ping wants its answer."""
        kind, identity, _ = parse_envelope(message)
        if identity > self._last_id:
            raise RemoteProtocolError(f"an envelope for request {identity}, which was never made")
        if kind == PING:
            self.comm.write_nowait((PONG, identity, None))

    async def _answer(self, head: dict[Any, Any], frames: list[Buffer] | None) -> bool:
        """Answer one request; False if the connection is to end after it."""
        comm = self.comm
        server = self.server
        header: RequestHeader | None = None
        reply = head.get("reply", _ABSENT)
        wanted = reply is _ABSENT or bool(reply)
        close = bool(head.get("close"))
        failure: Exception
        request: Request | None = None
        written = comm.messages_written
        try:
            op = head.get("op")
            if KEY in head and comm.extension is not None:
                header = parse_request_header(head[KEY])
                if header.id <= self._last_id:
                    raise RemoteProtocolError(f"request id {header.id} after {self._last_id}: ids must grow")
                self._last_id = header.id
            entry = self._find(op)
            if frames is not None:
                message: dict[Any, Any] = comm.resolve(frames)  # type: ignore[assignment]  # phase one found a dict
            else:
                message = dict(head) if comm.by_reference else head
            del message["op"]
            message.pop("reply", None)
            message.pop("close", None)
            serializers = message.pop("serializers", None)
            if header is not None:
                del message[KEY]
            if entry is None:  # the pseudo-op "close"
                result: Any = "OK"
                close = True
            else:
                if serializers is not None and entry.takes_serializers:
                    message["serializers"] = serializers
                request = Request(server, op, comm.peer)
                self.op = op
                counters = server._statistics
                counters.in_flight += 1
                counters.requests[op] = counters.requests.get(op, 0) + 1
                streaming = header is not None and header.stream
                self._awaited = (wanted or entry.streams) and not entry.run_to_end
                if self._gone and self._awaited:
                    self.scope.cancel(reason="the caller has gone")
                if not entry.streams and (header is None or not header.stream and header.deadline is None):
                    result = await self._call(entry, (), message, request)
                else:
                    result = await self._run(entry, message, request, header, plain_call=reply is True and not close)
                if streaming:
                    result = Status.dont_reply  # the stream's end was its answer
            if not wanted or result is Status.dont_reply:
                return not close
            await self._send_result(header, result, serializers)
            # A handler that wrote on the bare comm and then was answered for has said more than the caller will read.
            return not close and not (header is None and comm.messages_written - written > 1 and reply is not _ABSENT)
        except RemoteProtocolError:
            raise
        except Exception as error:
            if comm.closed():
                if not isinstance(error, (CommClosedError, trio.ClosedResourceError)):
                    _log.warning("op %r from %s failed after its caller had gone", self.op, comm.peer_address, exc_info=error)
                return False
            failure = error
        except BaseException as error:
            if trio.current_effective_deadline() == -math.inf:
                if wanted and not self._gone and request is not None:
                    self._last_words(header)
                raise
            if _ends_the_server(error):
                raise
            failure = RuntimeError("the handler let a trio.Cancelled escape that belongs to no cancel scope around it")
            failure.__cause__ = error
            close = True
            _log.error("op %r from %s: %s", self.op, comm.peer_address, failure, exc_info=error)
        finally:
            if request is not None:
                server._statistics.in_flight -= 1
                self._awaited = False
                self.op = None
                if self._watching:
                    self._watching = False
                    comm.unwatch_end()
        if wanted:
            await self._send_failure(header, failure)
        elif not isinstance(failure, DcoreError):
            _log.error("op %r from %s failed and nobody waits for the answer", head.get("op"), comm.peer_address, exc_info=failure)
        return not close

    def _find(self, op: object) -> HandlerEntry | None:
        """The handler for an op that this peer may call; None for the pseudo-op "close"."""
        server = self.server
        if type(op) is not str:
            what = "has no 'op'" if op is None else f"has an 'op' that is a {type(op).__name__}, not a str"
            raise ValueError(f"the request {what}")
        if server.draining:
            server._statistics.refused += 1
            raise ServerClosing(f"the server is shutting down; {op!r} was not started")
        entry = server._entries.get(op)
        if entry is None or entry.handler is not server.handlers.get(op):
            if op in server.handlers:
                entry = server._entries[op] = HandlerEntry.of(server.handlers[op])
            elif op == "close":
                return None
            else:
                raise UnknownOp(f"unknown op {op!r}{closest(op, server.handlers)}")
        if op in server.blocked_handlers:
            server._statistics.refused += 1
            raise NotAllowed(f"the op {op!r} is blocked on this server")
        if server.authorize is not None and not self._authorized(op):
            server._statistics.refused += 1
            raise NotAllowed(f"{self.comm.peer_address} may not call {op!r}")
        return entry

    def _authorized(self, op: str) -> bool:
        peer = self.comm.peer
        assert self.server.authorize is not None
        try:
            _ = peer.trusted  # reaches its verdict now, so that the callback finds it settled
            return bool(self.server.authorize(peer, op))
        except Exception:
            _log.exception("authorize(%r, %r) failed, which refuses the request", peer, op)
            return False

    # -- handlers ----------------------------------------------------------------------------------------------------------------

    async def _call(self, entry: HandlerEntry, args: tuple[Any, ...], kwargs: dict[str, Any], request: Request) -> Any:
        """Run a handler and return its result; an async generator is returned, not run."""
        request_variable.set(request)
        context = copy_context()
        function = entry.function
        if entry.in_thread:
            if self.on_wait is not None:
                self.on_wait()
            return await trio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=entry.limiter)
        try:
            result = context.run(function, *args, **kwargs)
        except TypeError as error:
            mismatch = wrong_arguments(request.op, function, args, kwargs, error, Connection._call.__code__)
            if mismatch is None:
                raise
            raise mismatch from None
        if type(result) is CoroutineType or hasattr(result, "__await__"):
            return await drive(context, result, self.on_wait)
        return result

    async def _run(
        self, entry: HandlerEntry, kwargs: dict[str, Any], request: Request, header: RequestHeader | None, *, plain_call: bool
    ) -> Any:
        """Run a handler that is given a comm, streams, or has a deadline."""
        comm = self.comm
        answer = StreamAnswer(comm, header)
        if entry.generator and (plain_call if header is None else not header.stream):
            raise TypeError(f"{request.op!r} streams; use .stream()")
        args = (answer.comm,) if entry.takes_comm else ()
        if header is None or header.deadline is None or header.stream:
            return await self._finish(entry, args, kwargs, request, answer)
        request.deadline = trio.current_time() + header.deadline
        if header.deadline > 0:
            with trio.CancelScope(deadline=request.deadline) as scope:
                result = await self._finish(entry, args, kwargs, request, answer)
            if not scope.cancelled_caught:
                return result
        raise _cancelled_because("deadline")

    async def _finish(
        self, entry: HandlerEntry, args: tuple[Any, ...], kwargs: dict[str, Any], request: Request, answer: StreamAnswer
    ) -> Any:
        result = await self._call(entry, args, kwargs, request)
        if hasattr(result, "__anext__") and hasattr(result, "athrow"):
            context: Context = copy_context()
            await generate(result, context, answer.emit, self.on_wait)
            result = None
        elif answer.streaming and not entry.takes_comm and result is not None:
            await answer.emit(result)  # a plain handler's only item, as towards a stock server
        if answer.streaming:
            await answer.end()
        return result

    # -- answers -----------------------------------------------------------------------------------------------------------------

    async def _send_result(self, header: RequestHeader | None, result: Any, serializers: Any) -> None:
        message = result if header is None else (REPLY, header.id, result)
        try:
            await self.comm.put(message, serializers)
        except (SerializationError, UnsafePayload) as error:
            await self._send_failure(header, error)

    async def _send_failure(self, header: RequestHeader | None, error: Exception) -> None:
        await self.comm.put(self._failure_message(header, error))

    def _failure_message(self, header: RequestHeader | None, error: BaseException) -> Any:
        comm = self.comm
        trusted = comm.allows_pickle()
        limit = comm.settings.limits.error_text
        if header is not None:
            return (ERROR, header.id, error_value(error, trusted=trusted, limit=limit))
        return error_reply(error, trusted=trusted, extension=comm.extension is not None, limit=limit)

    def _last_words(self, header: RequestHeader | None) -> None:
        """Tell a caller, without waiting, that its handler was cancelled."""
        try:
            self.comm.write_nowait(self._failure_message(header, _cancelled_because(self.server._cut_reason())))
        except (CommClosedError, trio.ClosedResourceError):
            pass  # it has gone by itself


def _cancelled_because(reason: str) -> HandlerCancelled:
    error = HandlerCancelled(f"the handler was cancelled: {reason}")
    error.reason = reason
    return error


def _ends_the_server(error: BaseException) -> bool:
    """Whether there is anything in it that is neither an Exception nor a Cancelled: KeyboardInterrupt, SystemExit."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(_ends_the_server, error.exceptions))
    return not isinstance(error, (Exception, trio.Cancelled))
