"""One connection of a server: read a request, run its handler, answer, again.

All of it happens on the connection's own task: a handler needs no task, scope or event of its own.  The connection's cancel scope is
cancelled when its caller goes away while a handler runs whose answer somebody awaits; the server's scope, further out, when the
grace is over or the server is cancelled.

Nothing that a peer sends or a handler raises gets out of here, but for KeyboardInterrupt and SystemExit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextvars import Context, copy_context
from types import AsyncGeneratorType, CoroutineType
from typing import TYPE_CHECKING, Any

import trio
from trio import current_time
from trio.lowlevel import checkpoint_if_cancelled

from .._util import leaves
from ..comm import READ_AHEAD, BaseComm
from ..errors import (
    CommClosedError,
    LimitExceeded,
    LocalProtocolError,
    RemoteProtocolError,
    SerializationError,
    UnsafePayload,
)
from ..protocol._context import Buffer
from ..protocol._envelope import ERROR, GOODBYE, KEY, REPLY, RequestHeader, parse_envelope, parse_request_header
from ..protocol._markers import RESERVED
from ..protocol._remote_errors import error_reply, error_value
from ._admission import find_handler
from ._drive import drive
from ._failures import ENDS, cancelled_because, it_streams, the_peers_doing
from ._handlers import HandlerEntry, wrong_arguments
from ._request import Request, checked_families, request_variable
from ._status import Status
from ._streams import StreamAnswer
from ._throttle import shown

if TYPE_CHECKING:
    from ._server import BaseServer

__all__ = ["Connection"]

_log = logging.getLogger("trio_dcore.server")
_ABSENT: Any = object()


class Connection:
    """Serves one comm until it ends.

    Attributes:
        scope: cancelled when the connection is of no use any more.
        idle_since: the time from which on nothing has been in flight, by trio's clock; ``math.inf`` while something is.
        request: the one whose handler runs, or None.
    """

    __slots__ = (
        "_awaited",
        "_gone",
        "_header",
        "_last_id",
        "_misfit",
        "_told",
        "_watching",
        "comm",
        "handshaking",
        "idle_since",
        "on_wait",
        "request",
        "scope",
        "server",
        "watched",
    )

    def __init__(self, server: BaseServer, comm: BaseComm) -> None:
        self.server: BaseServer = server
        self.comm: BaseComm = comm
        comm.serving = True
        self.scope: trio.CancelScope = trio.CancelScope()
        self.handshaking: bool = True
        self.watched: int | None = None  # the descriptor that the hang-up watcher has for it
        self.idle_since: float = math.inf
        self.request: Request | None = None
        self._awaited = False  # somebody waits for the answer of the handler that runs
        self._watching = False
        #: For handlers' first wait; None where the hang-up watcher or the comm itself tells of the peer's end.
        self.on_wait: Callable[[], None] | None = None
        self._gone = False  # the peer has hung up
        self._header: RequestHeader | None = None  # of the request
        self._last_id = 0  # of the last opted-in request
        self._misfit: TypeError | None = None  # the failure of a request whose arguments are not its handler's
        self._told = False  # the log knows that there are requests on it that are refused and don't want an answer

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
            self._tell_fault()
        except CommClosedError as error:
            _log.debug("connection from %s ended: %s", comm.peer_address, error)
            self._tell_fault()
        except (RemoteProtocolError, LimitExceeded) as error:
            self.server._statistics.errors += 1
            _log.info("closing the connection from %s: %s", comm.peer_address, error)
        except Exception:
            self.server._statistics.errors += 1
            _log.exception("the connection from %s failed", comm.peer_address)
        finally:
            self.server._unwatch(self)
            await comm.aclose()

    def _tell_fault(self) -> None:
        """Log why the comm was closed, where a handler was told of it that has not passed it on."""
        if self.comm.fault:
            self.server._statistics.errors += 1
            _log.info("closing the connection from %s: %s", self.comm.peer_address, self.comm.fault)

    @property
    def op(self) -> str | None:
        """The op in flight, or None."""
        return None if self.request is None else self.request.op

    async def _handshake(self) -> bool:
        patience = self.comm.settings.limits.handshake_timeout
        with trio.CancelScope(deadline=math.inf if patience is None else trio.current_time() + patience) as limit:
            try:
                await self.comm.handshake()
            except trio.ClosedResourceError:
                return False  # it gave way
        self.handshaking = False
        self.server._room.shaken(self)
        if limit.cancelled_caught:
            self.server._statistics.refused += 1
            _log.info("closing the connection from %s: no handshake within %s s", self.comm.peer_address, patience)
        return not limit.cancelled_caught

    # -- what others tell the connection -----------------------------------------------------------------------------------------

    def hung_up(self) -> None:
        """The peer has closed its end; it may be that requests from before are still unread."""
        self._gone = True
        self._gone_meanwhile()

    def _gone_meanwhile(self) -> None:
        """The caller has gone while its handler runs: cancel it, unless it is reading, for then it finds the end by itself."""
        if not self._awaited:
            return
        if self.comm.reading:
            self.comm.after_read = self._look_again
        else:
            self.scope.cancel(reason="the caller has gone")

    def _look_again(self) -> None:
        # What a handler does next with what it has read shows when its step is over: it reads on, or it waits for something else.
        trio.lowlevel.current_trio_token().run_sync_soon(self._gone_meanwhile)

    def handler_waits(self) -> None:
        """A handler whose answer is awaited has to wait, and nothing else tells when the peer hangs up or what it sends."""
        if self._watching:
            return  # a generator waits for the first time in each of its steps
        pinged = self.pinged is not None
        if self._awaited or pinged:
            nursery = self.server._connection_tasks
            assert nursery is not None
            self.comm.watch_end(nursery, self.hung_up, (lambda: self._look_ahead(fill=False)) if pinged else None)
            self._watching = True

    @property
    def pinged(self) -> Request | None:
        """The request whose handler runs, if pings may come on it; else None."""
        return self.request if self._header is not None and self.comm.pings else None

    @property
    def asked_about(self) -> int | None:
        """The id of the request that runs, if its caller waits for one reply, and so can answer pings; else None."""
        header = self._header
        return header.id if header is not None and not header.stream and self._awaited else None

    def attend(self) -> bool:
        """See to pings while a handler takes its time; False if what comes can't be seen.  May be called again."""
        if self.comm.reading:
            return True  # a handler, which answers them
        if self.watched is None:
            return self._watching and self._look_ahead(fill=False)
        room = self._look_ahead()
        if room and self.server._hangups is not None:
            self.server._hangups.listen(self.watched, self._look_ahead)
        return room

    def _look_ahead(self, *, fill: bool = True) -> bool:
        """Answer pings; whether it makes sense to go on when more has come."""
        header = self._header
        if self.request is None or header is None:
            return False  # its answer was faster
        return self.comm.read_ahead(header.id, self.comm.settings.limits.window_bytes if header.stream else READ_AHEAD, fill=fill)

    def caller_is_dead(self, seconds: float) -> None:
        """The caller waits for a reply, and has not answered a ping for so long."""
        self._gone = True
        self.comm.give_up(CommClosedError(f"it has not answered a ping for {seconds} s (Limits.ping_timeout)"))
        self.scope.cancel(reason="the caller does not answer pings")

    def give_way(self) -> None:
        """Close in the middle of the handshake, at once: somebody else needs the place."""
        self.scope.cancel(reason="the connection gives way to another one")
        self.comm.abort()

    def close_idle(self) -> bool:
        """Close if nothing is in flight; False if something is, or has just come."""
        if self.idle_since == math.inf or self.comm.stale():
            return False
        self._say_goodbye()
        self.comm.abort()
        return True

    def close_unfinished(self) -> bool:
        """Close if nothing is in flight but a request of which the rest has not come; False if something is."""
        if self.idle_since == math.inf or self.comm.rest_since == math.inf:
            return False
        self._say_goodbye()
        self.comm.abort()
        return True

    def retire(self) -> None:
        """The server is draining: close if nothing is in flight."""
        comm = self.comm
        if self.handshaking:
            self.scope.cancel(reason="the server is shutting down")
        elif self.close_idle():
            pass
        elif self.idle_since < math.inf:
            self._hurry()
        elif self.op == "connection_stream" and self.server.stream_handlers and comm.reading and not comm.stale():
            comm.abort()  # all that has come is handled, and nobody waits for an answer: the stream ends here
        # Else a request is running, and the connection ends by itself after it.

    def _hurry(self) -> None:
        """Something has come that may be a request, which deserves its ServerClosing; half a one does not hold up the shutdown."""
        self.scope.deadline = min(self.scope.deadline, trio.current_time() + self.comm.settings.limits.linger)

    def _say_goodbye(self) -> None:
        """Tell a peer that makes opted-in requests that nothing after its last one was started."""
        extension = self.comm.extension
        if extension is not None and (self._last_id or extension.pooled):
            try:
                self.comm.write_nowait((GOODBYE, self._last_id, None))
            except (CommClosedError, trio.ClosedResourceError):
                pass  # it has gone by itself

    # -- requests ----------------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        comm = self.comm
        server = self.server
        turns = 0
        while True:
            if server.draining:
                if not comm.stale():
                    self._say_goodbye()
                    return
                self._hurry()
            self.idle_since = current_time()
            try:
                # Every wait delivers cancellation; requests that need none must not put it off for long.
                turns += 1
                if turns % 16 == 0:
                    await checkpoint_if_cancelled()
                found = await comm.next_head()
            except trio.ClosedResourceError:
                return
            except (RemoteProtocolError, LimitExceeded) as error:
                if not comm.closed():
                    # Framing is intact, but whether an answer was wanted is unknown: one is given, then the comm is closed.
                    await self._send_failure(None, error)
                raise
            finally:
                self.idle_since = math.inf
            if found is None:
                return
            head, frames = found
            if type(head) is not dict:
                if type(head) is tuple and comm.extension is not None and self._last_id:
                    self._left_over(head)
                    continue
                await self._send_failure(None, ValueError(f"a request must be a dict with an 'op', not a {type(head).__name__}"))
            elif not await self._answer(head, frames):
                return
            found = head = frames = None  # an idle connection keeps no payload alive

    def _left_over(self, message: tuple[object, ...]) -> None:
        """An envelope behind the end of its request, such as credit that crossed it.

        A ping is answered by that end; a pong behind it would be an answer that the pool finds on an idle comm.
        """
        _, identity, _ = parse_envelope(message)
        if identity > self._last_id:
            raise RemoteProtocolError(f"an envelope for request {identity}, which was never made")

    async def _answer(self, head: dict[Any, Any], frames: list[Buffer] | None) -> bool:
        """Answer one request; False if the connection is to end after it."""
        comm = self.comm
        header: RequestHeader | None = None
        reply = head.get("reply", _ABSENT)
        wanted = True
        close = False
        failure: BaseException
        request: Request | None = None
        written = comm.messages_written
        op = head.get("op")
        try:
            wanted = reply is _ABSENT or bool(reply)  # by reference it may be anything, an array for example
            close = bool(head.get("close"))
            if KEY in head and comm.extension is not None:
                header = self._opted_in(head[KEY])
            entry = find_handler(self.server, comm.peer, op)
            if entry is None:  # the pseudo-op "close"
                result: Any = "OK"
                serializers = None
                close = True
            else:
                if frames is not None:
                    if not RESERVED.isdisjoint(head):
                        raise ValueError("a request can't be a marker: its op and arguments stand in frame 0")
                    message: dict[Any, Any] = await comm.unpack(frames)
                    if self.server.draining or self.server._statistics.in_flight >= self.server.most_requests:
                        find_handler(self.server, comm.peer, op)  # it may have taken its time, in which that has come
                else:
                    message = dict(head) if comm.by_reference else head
                del message["op"]
                message.pop("reply", None)
                message.pop("close", None)
                serializers = message.pop("serializers", None)
                if serializers is not None:
                    serializers = checked_families(serializers)
                    if entry.takes_serializers:
                        message["serializers"] = serializers
                if header is not None:
                    del message[KEY]
                request = self.request = Request(self, op, comm.peer)  # type: ignore[arg-type]  # there is a handler of that name
                request.serializers = serializers
                self._header = header
                if header is not None and comm.pings and self.server._pinger.asleep:
                    self.server._pinger.wake()
                counters = self.server._statistics
                counters.in_flight += 1
                counters.requests[request.op] = counters.requests.get(request.op, 0) + 1
                self._awaited = (wanted or entry.streams) and not entry.run_to_end
                if self._gone and self._awaited:
                    self.scope.cancel(reason="the caller has gone")
                if not entry.streams and (header is None or (not header.stream and header.deadline is None)):
                    context, result = self._begin(entry, (), message, request)
                    if type(result) is CoroutineType or hasattr(result, "__await__"):
                        result = await drive(context, result, self.on_wait)
                    if type(result) is AsyncGeneratorType:  # of a plain function or a lambda
                        one_reply = header is not None or (wanted and reply is not _ABSENT and not close)
                        result = await self._finish(
                            entry, result, request, StreamAnswer(comm, header, serializers), one_reply=one_reply
                        )
                else:
                    one_reply = not header.stream if header is not None else wanted and reply is not _ABSENT and not close
                    result = await self._run(entry, message, request, header, one_reply=one_reply)
            if not wanted or result is Status.dont_reply:
                if header is not None and not header.stream and wanted:
                    raise LocalProtocolError(f"{op!r} returned Status.dont_reply, and its caller waits for a reply")
                return not close
            try:
                unsent = comm.start(result if header is None else (REPLY, header.id, result), serializers)
                if unsent is not None:
                    await comm.finish(unsent, "write_stall")
            except (SerializationError, UnsafePayload) as error:
                await self._send_failure(header, error, started=True)
            return not close and not self._said_too_much(header, reply, written)
        except Exception as error:
            if comm.closed():
                if (fault := the_peers_doing(error)) is not None:
                    raise fault from None
                if request is not None and not _is_of_no_news(error):
                    self._log_failure(logging.WARNING, request.op, "failed after its caller had gone", error)
                return False
            failure = error.stop if type(error) is _Stopped else error
        except BaseException as error:
            if _ends_the_server(error):
                raise
            if not _has_cancelled(error):
                failure = error  # asyncio's CancelledError, GeneratorExit and the like are failures of the handler
            elif trio.current_effective_deadline() == -math.inf:
                if wanted and not self._gone and request is not None:
                    self._last_words(header)
                raise self._only_cancelled(error) from None
            else:
                failure = RuntimeError("the handler let a trio.Cancelled escape that belongs to no cancel scope around it")
                failure.__cause__ = error
                close = True
                _log.error("op %r from %s: %s", self.op, comm.peer_address, failure, exc_info=error)
        finally:
            if request is not None:
                self.server._statistics.in_flight -= 1
                self._awaited = False
                comm.after_read = None
                self.request = None
                if self._watching:
                    self._watching = False
                    comm.unwatch_end()
        started = request is not None
        try:
            if wanted:
                await self._send_failure(header, failure, started=started)
            elif request is not None and failure is not self._misfit:
                self._log_failure(logging.ERROR, request.op, "failed and nobody waits for the answer", failure)
            else:
                # The first of a connection is for who looks for a mistake; all of them would be a way to fill the disk.
                level = logging.DEBUG if self._told else logging.INFO
                self._told = True
                what = "op %s from %s was refused, and nobody waits for the answer: %.1000s"
                _log.log(level, what, shown(op), comm.peer_address, failure)
            self._misfit = None
            if not started and isinstance(failure, (RemoteProtocolError, LimitExceeded)):
                raise failure
        finally:
            del failure  # its traceback refers to this frame: the two would keep the request alive until a collection
        return not close and not self._said_too_much(header, reply, written)

    def _log_failure(self, level: int, op: str, what: str, error: BaseException) -> None:
        # Whoever may call the op can make it fail as often as he likes.
        if (more := self.server._entries[op].failures.due()) is not None:
            _log.log(level, "op %r from %s %s%s", op, self.comm.peer_address, what, more, exc_info=error)

    def _opted_in(self, value: object) -> RequestHeader:
        header = parse_request_header(value)
        if header.id <= self._last_id:
            raise RemoteProtocolError(f"request id {header.id} after {self._last_id}: ids must grow")
        self._last_id = header.id
        return header

    def _said_too_much(self, header: RequestHeader | None, reply: object, written: int) -> bool:
        """Whether a handler wrote on the bare comm and then was answered for, which is more than its caller will read."""
        return header is None and self.comm.messages_written - written > 1 and reply is not _ABSENT

    def _only_cancelled(self, error: BaseException) -> BaseException:
        """What of an error that passed while we are cancelled goes on; what else the handler raised ends here."""
        if not isinstance(error, BaseExceptionGroup):
            return error
        cancelled, rest = error.split(trio.Cancelled)
        if rest is not None and not (self.comm.closed() and _is_of_no_news(rest)):
            _log.error("op %r from %s failed while it was being cancelled", self.op, self.comm.peer_address, exc_info=rest)
        assert cancelled is not None
        return cancelled

    # -- handlers ----------------------------------------------------------------------------------------------------------------

    def _begin(self, entry: HandlerEntry, args: tuple[Any, ...], kwargs: dict[str, Any], request: Request) -> tuple[Context, Any]:
        """Call a handler in a context of its own: (the context, what it returned, which may be something to await)."""
        request_variable.set(request)
        context = copy_context()
        if entry.in_thread:
            return context, self._in_thread(entry, args, kwargs, request)
        try:
            return context, context.run(entry.function, *args, **kwargs)
        except TypeError as error:
            mismatch = wrong_arguments(request.op, entry.function, args, kwargs, error, Connection._begin.__code__)
            if mismatch is None:
                raise
            self._misfit = mismatch
            raise mismatch from None
        except StopIteration as stop:
            raise _Stopped(stop) from None

    async def _in_thread(self, entry: HandlerEntry, args: tuple[Any, ...], kwargs: dict[str, Any], request: Request) -> Any:
        try:
            return await trio.to_thread.run_sync(_in_worker, entry.function, args, kwargs, limiter=entry.limiter)
        except TypeError as error:
            mismatch = wrong_arguments(request.op, entry.function, args, kwargs, error, _in_worker.__code__)
            if mismatch is None:
                raise
            self._misfit = mismatch
            raise mismatch from None

    async def _call(self, entry: HandlerEntry, args: tuple[Any, ...], kwargs: dict[str, Any], request: Request) -> Any:
        """Run a handler and return its result; an async generator is returned, not run."""
        context, result = self._begin(entry, args, kwargs, request)
        if type(result) is CoroutineType or hasattr(result, "__await__"):
            return await drive(context, result, self.on_wait)
        return result

    async def _run(
        self, entry: HandlerEntry, kwargs: dict[str, Any], request: Request, header: RequestHeader | None, *, one_reply: bool
    ) -> Any:
        """Run a handler that is given a comm, streams, or has a deadline."""
        if entry.generator and one_reply:
            self._misfit = misfit = it_streams(request.op)
            raise misfit
        answer = StreamAnswer(self.comm, header, request.serializers)
        args = (answer.comm,) if entry.takes_comm else ()
        try:
            if header is None or header.deadline is None or header.stream:
                result = await self._call(entry, args, kwargs, request)
                return await self._finish(entry, result, request, answer, one_reply=one_reply)
            request.deadline = trio.current_time() + header.deadline
            if header.deadline > 0:
                with trio.CancelScope(deadline=request.deadline) as scope:
                    result = await self._call(entry, args, kwargs, request)
                    result = await self._finish(entry, result, request, answer, one_reply=one_reply)
                if not scope.cancelled_caught:
                    return result
            raise cancelled_because("deadline")
        finally:
            if answer.close():
                await answer.released()

    async def _finish(self, entry: HandlerEntry, result: Any, request: Request, answer: StreamAnswer, *, one_reply: bool) -> Any:
        """Emit what a handler's result is made of; returns what there is to reply."""
        if isinstance(result, AsyncGenerator):
            if one_reply:
                self._misfit = misfit = it_streams(request.op)
                raise misfit  # not a step of it has run
            context: Context = copy_context()
            await answer.run(result, context, self.on_wait)
            result = None
        if not answer.streaming:
            return result
        if not entry.takes_comm and result is not None and result is not Status.dont_reply:
            await answer.emit(result)  # a plain handler's only item, as towards a stock server
        if answer.close():  # behind the end may come the next request
            await answer.released()
        await answer.end()
        return Status.dont_reply  # the stream's end was its answer

    # -- answers -----------------------------------------------------------------------------------------------------------------

    async def _send_failure(self, header: RequestHeader | None, error: BaseException, *, started: bool = False) -> None:
        await self.comm.put(self._failure_message(header, error, started=started), stall="write_stall")

    def _failure_message(self, header: RequestHeader | None, error: BaseException, *, started: bool) -> Any:
        """The answer to a request that failed; ``started`` is whether it is the handler's failure, or we refused it."""
        comm = self.comm
        trusted = comm.allows_pickle()
        limit = comm.settings.limits.error_text
        if header is not None:
            return (ERROR, header.id, error_value(error, trusted=trusted, limit=limit, started=started))
        ours = comm.extension is not None and "errors" in comm.extension.features
        return error_reply(error, trusted=trusted, extension=ours, limit=limit, started=started)

    def _last_words(self, header: RequestHeader | None) -> None:
        """Tell a caller, without waiting, that its handler was cancelled."""
        try:
            error = cancelled_because(self.server._cut_reason())
            self.comm.write_nowait(self._failure_message(header, error, started=False))
        except (CommClosedError, trio.ClosedResourceError):
            pass  # it has gone by itself


class _Stopped(Exception):
    """Carries a handler's StopIteration, which can't leave a coroutine as itself."""

    def __init__(self, stop: StopIteration) -> None:
        self.stop = stop


def _in_worker(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return function(*args, **kwargs)
    except StopIteration as stop:
        raise _Stopped(stop) from None


def _ends_the_server(error: BaseException) -> bool:
    """Whether there is a KeyboardInterrupt or SystemExit in it."""
    return any(isinstance(leaf, (KeyboardInterrupt, SystemExit)) for leaf in leaves(error))


def _is_of_no_news(error: BaseException) -> bool:
    """Whether all that an error says, or each in a group of a handler's own nursery, is that somebody has gone."""
    return all(isinstance(leaf, ENDS) for leaf in leaves(error))


def _has_cancelled(error: BaseException) -> bool:
    return any(isinstance(leaf, trio.Cancelled) for leaf in leaves(error))
