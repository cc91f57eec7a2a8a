"""Broken servers; see controls.py."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import trio

from tests.reference.controls import by, control, wrap
from trio_dcore import SerializationError, Server, UnknownOp
from trio_dcore.client import _call
from trio_dcore.comm import FramedComm, _substream
from trio_dcore.server import _connection
from trio_dcore.server._connection import Connection
from trio_dcore.server._handlers import HandlerEntry
from trio_dcore.server._request import Request
from trio_dcore.server._server import BaseServer
from trio_dcore.server._status import Life

# -- stopping --------------------------------------------------------------------------------------------------------------------


@control(
    "A task of the server's is left behind when it has closed.",
    by("a02_reply_delivered_within_grace", "m", "left behind: task left behind"),
)
def leaks_a_task(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_finish")
    def finish(original: Any, server: Any) -> None:
        original(server)
        trio.lowlevel.spawn_system_task(trio.sleep, 3600, name="left behind")


@control(
    "The connection of a handler that has run to its end while the server drained is not closed.",
    by("a02_reply_delivered_within_grace", "t", "unclosed <socket|left behind: descriptor"),
    by("a02_reply_delivered_within_grace", "m", "left behind: the server end of memory connection"),
)
def leaks_a_descriptor(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, FramedComm, "aclose")
    async def aclose(original: Any, comm: FramedComm) -> None:
        await trio.lowlevel.checkpoint()


@control(
    "Idle connections are not closed at the stop: closing waits for their clients.",
    by("a04_idle_connections_are_closed_at_once", "i", "hang: "),
    by("a05_no_request_is_started_while_draining", "i", "ServerClosing: "),
    by("a05_stock_peer_sees_the_end_of_its_idle_connection", "m", "instead of 0 s"),
)
def waits_for_idle_connections(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "retire", lambda connection: None)


@control(
    "Closing a connection waits for its client.",
    by("a02_reply_delivered_within_grace", "m", r"took 5\.0 s instead of 0\.3 s"),
)
def hangs_on_close(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, FramedComm, "aclose")
    async def aclose(original: Any, comm: FramedComm) -> None:
        await trio.sleep_forever()


@control(
    "The server waits until the grace is over, though nothing is in flight any more.",
    by("a02_reply_delivered_within_grace", "m", r"took 5\.0 s instead of 0\.3 s"),
)
def waits_out_the_grace(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_serve_connection")
    async def serve_connection(original: Any, server: Any, connection: Connection) -> None:
        await original(server, connection)
        if server.draining:
            await trio.sleep_until(server._deadline)


@control(
    "All connections are closed at the stop, so replies within the grace are lost.",
    by("a02_reply_delivered_within_grace", "m", "CommClosedError: calling 'work'"),
)
def drops_replies_in_the_grace(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "retire", lambda connection: connection.comm.abort())


@control(
    "The grace is ignored: the stop cancels handlers at once.",
    by("a02_reply_delivered_within_grace", "m", r"took 0\.0 s instead of 0\.3 s"),
    by("a06_pipelined_on_a_raw_comm", "m", "HandlerCancelled"),
)
def ignores_the_grace(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_request_stop")
    def request_stop(original: Any, server: Any, grace: float) -> None:
        original(server, 0)


@control(
    "The grace never ends: handlers are not cancelled when it is over.",
    by("a03_cancelled_when_grace_is_over", "m", r"instead of 0\.1 s"),
    by("b03_drain_on_cancel_has_an_end", "m", r"instead of 0\.05 s"),
)
def never_ends_the_grace(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_shorten")
    def shorten(original: Any, server: Any, grace: float) -> None:
        if grace <= 0:
            original(server, grace)


@control("A later stop() makes the grace longer.", by("a08_a_later_stop_only_shortens", "m", r"instead of 0\.05 s"))
def lets_a_later_stop_lengthen(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_shorten")
    def shorten(original: Any, server: Any, grace: float) -> None:
        server._deadline = math.inf
        original(server, grace)


@control(
    "stop() and aclose() raise if the server has closed already.",
    by("a07_closing_again_and_at_once", "m", "LocalProtocolError: a server can't go from CLOSED"),
)
def closes_only_once(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "stop")
    def stop(original: Any, server: Any, *args: Any, **kwargs: Any) -> None:
        if server._life is Life.CLOSED:
            server._life.move(Life.CLOSING)
        original(server, *args, **kwargs)


@control(
    "aclose() in a handler waits for its own handler.",
    by("a09_a_handler_stops_its_own_server", "m", "HandlerCancelled: .*grace over"),
)
def waits_for_itself(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "running", False)


@control(
    "finished(), and aclose() with it, returns when the stop has been asked for.",
    by("a07_closing_again_and_at_once", "m", "closing_gracefully"),
    by("a03_cancelled_when_grace_is_over", "m", r"took 0\.0 s instead of 0\.1 s"),
)
def says_finished_too_early(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_request_stop")
    def request_stop(original: Any, server: Any, grace: float) -> None:
        original(server, grace)
        server._finished.set()


@control(
    "A handler's caller is told nothing when it is cut: it sees the bare end of its connection.",
    by("a03_cancelled_when_grace_is_over", "m", r"isinstance\(CommClosedError\(.*, HandlerCancelled\)"),
)
def cuts_without_a_word(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "_last_words", lambda connection, header: None)


@control(
    "Requests that are pipelined behind the running one are dropped at the stop.",
    by("a06_pipelined_on_a_raw_comm", "m", "CommClosedError: .* closed the comm"),
    by("a06_pipelined_opted_in_requests_are_answered_in_order", "m", "ended the connection"),
    by("a06_pipelined_stock_requests_are_answered_in_order", "m", "ended the connection"),
)
def drops_pipelined_requests(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Connection, "_answer")
    async def answer(original: Any, connection: Connection, *args: Any) -> bool:
        return await original(connection, *args) and not connection.server.draining


@control(
    "Requests are started while the server drains.",
    by("a05_no_request_is_started_while_draining", "i", "DID NOT RAISE ServerClosing"),
    by("a06_pipelined_on_a_raw_comm", "m", "RemoteError"),
)
def starts_requests_while_draining(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _connection, "find_handler")
    def find_handler(original: Any, server: Any, peer: Any, op: object) -> Any:
        draining, server.draining = server.draining, False
        try:
            return original(server, peer, op)
        finally:
            server.draining = draining


@control(
    "No goodbye is said: clients can't know that nothing was started.",
    by("a05_no_request_is_started_while_draining", "m", "ConnectError: could not connect"),
    by("a06_pipelined_opted_in_requests_are_answered_in_order", "m", "ended the connection"),
)
def says_no_goodbye(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "_say_goodbye", lambda connection: None)


@control("Listeners stay open while the server drains.", by("a05_no_request_is_started_while_draining", "i", "instead of 0 s"))
def listens_while_draining(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_wind_down")
    def wind_down(original: Any, server: Any) -> None:
        listeners, server._listeners = server._listeners, []
        original(server)
        server._listeners = listeners  # for _finish


@control(
    "A start that fails leaves its first listener open.",
    by("a10_second_listener_is_taken", "t", "unclosed <socket|left behind: descriptor|assert False"),
)
def leaves_a_listener_open(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_wind_down")
    def wind_down(original: Any, server: Any) -> None:
        if server._failed:
            server._listeners.clear()
        original(server)


@control(
    "The server's own outgoing connections stay open when it has closed.",
    by("a02_handlers_can_call_out_until_they_have_ended", "m", r"\(False, 1\) == \(True, 0\)"),
)
def leaves_the_outgoing_pool_open(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Server, "_close_outgoing", lambda server: None)


@control("An orderly stop logs a warning.", by("a02_reply_delivered_within_grace", "m", "an orderly run is quiet"))
def warns_in_an_orderly_stop(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_wind_down")
    def wind_down(original: Any, server: Any) -> None:
        original(server)
        logging.getLogger("trio_dcore.server").warning("closing %d connections", len(server._connections))


@control("Streams are not told of the shutdown.", by("a12_draining_under_load_is_quiet", "i", "hang: "))
def hides_the_shutdown_from_streams(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "shutdown_requested", property(lambda request: trio.Event()))


@control(
    "A server serves again after it has closed.", by("k05_a_server_serves_once", "", "closed epoll|Regex pattern did not match")
)
def serves_twice(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_begin")
    def begin(original: Any, server: Any) -> None:
        if server._life is Life.CLOSED:
            server._life = Life.NEW
        original(server)


# -- cancelled -------------------------------------------------------------------------------------------------------------------


@control(
    "Cancelled is swallowed in the connection's task: a handler that is cut has the result None.",
    by("a03_cancelled_when_grace_is_over", "m", r"isinstance\(None, HandlerCancelled\)"),
)
def swallows_cancelled(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _connection, "drive")
    async def drive(original: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await original(*args, **kwargs)
        except trio.Cancelled:
            return None


@control(
    "What reads delivers no cancellation while there is something to read: a peer that talks without a pause is listened to for ever.",
    by("b01_a_peer_that_talks_without_a_pause", "t", "hang: "),
    by("j01_a_server_that_talks_without_a_pause", "u", "hang: "),
)
def listens_for_ever(patch: pytest.MonkeyPatch) -> None:
    async def go_on() -> None:
        pass

    for module in (_substream, _call):
        patch.setattr(module, "checkpoint_if_cancelled", go_on)


@control(
    "A handler that swallows Cancelled gets its result sent although it was cut.",
    by("b08_a_handler_that_swallows_cancelled", "m", r"False = cut\("),
)
def sends_results_of_the_cut(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _connection, "drive")
    def drive(original: Any, context: Any, awaitable: Any, on_wait: Any = None) -> Any:
        return original(context, awaitable, on_wait, whole=False)


@control(
    "Cancelling the caller of aclose() does not end the grace.",
    by("b04_the_caller_of_aclose_is_cancelled", "m", "closing_gracefully"),
)
def keeps_the_grace_of_a_cancelled_aclose(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "stop")
    def stop(original: Any, server: Any, grace: float | None = None, reason: str = "") -> None:
        if not (server.draining and grace == 0):
            original(server, grace, reason)


@control(
    "aclose() is shielded: cancelling its caller has to wait for the grace.",
    by("b04_the_caller_of_aclose_is_cancelled", "m", r"took 30\.0 s instead of 1 s"),
)
def shields_aclose(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "aclose")
    async def aclose(original: Any, server: Any, grace: float | None = None) -> None:
        with trio.CancelScope(shield=True):
            await original(server, grace)


@control("drain_on_cancel is ignored.", by("b02_drain_on_cancel_delivers_the_reply", "m", r"took 0\.0 s instead of 0\.3 s"))
def ignores_drain_on_cancel(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_hold_connections")
    async def hold_connections(original: Any, server: Any, *args: Any, **kwargs: Any) -> None:
        server.drain_on_cancel = 0
        await original(server, *args, **kwargs)


@control(
    "Cancelling a server that drains leaves it the rest of its grace, where drain_on_cancel is set.",
    by("b02_a_stop_does_not_make_the_drain_longer", "m", r"took 30\.0 s instead of 0\.1 s"),
)
def drains_on_after_cancel(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_shorten")
    def shorten(original: Any, server: Any, grace: float) -> None:
        if not server._cancelled_from_outside or server._deadline == math.inf:
            original(server, grace)


@control(
    "What the block of a server raises comes out in a group.",
    by("b05_the_block_of_the_server_fails", "m", "ExceptionGroup: the server failed"),
)
def groups_what_the_block_raises(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_leave")
    async def leave(original: Any, server: Any, error: Any) -> Any:
        raised = await original(server, error)
        return ExceptionGroup("the server failed", [raised]) if isinstance(raised, Exception) else raised


@control(
    "A handler is not cancelled when its caller goes away.",
    by("d05_cancelled_while_waiting_for_the_reply", "m", "instead of 0 s"),
    by("d05_cancelled_while_waiting_for_the_reply", "i", "instead of 0 s"),
)
def works_for_those_who_have_gone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "hung_up", lambda connection: None)


@control(
    "A handler that nobody waits for is cancelled as well when its caller goes away.",
    by("d10_without_a_reply_the_handler_outlives_its_caller", "i", r"took 0\.0 s instead of 0\.5 s"),
)
def cancels_what_nobody_waits_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "hung_up", lambda connection: connection.scope.cancel())


# -- handlers and their answers --------------------------------------------------------------------------------------------------


@control(
    "Each reply is sent twice.",
    by("a06_pipelined_stock_requests_are_answered_in_order", "m", "'done'"),
)
def answers_twice(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, FramedComm, "start")
    def start(original: Any, comm: FramedComm, message: Any, *args: Any) -> Any:
        if not (type(message) is dict and "op" in message):
            original(comm, message, *args)
        return original(comm, message, *args)


@control(
    "An error reply ends the connection.",
    by("c01_a_handler_raises", "m", "memory://client-.* == .*memory://client-"),
    by("c01_a_stock_peer_gets_dasks_reply", "m", "BrokenResourceError: the other end was closed"),
)
def hangs_up_on_errors(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Connection, "_send_failure")
    async def send_failure(original: Any, connection: Connection, *args: Any, **kwargs: Any) -> None:
        await original(connection, *args, **kwargs)
        connection.comm.abort()


@control(
    "A result that can't be serialized ends the connection instead of an answer.",
    by("c04_a_result_that_can_not_travel", "m", "CommClosedError: .* without an answer"),
)
def hangs_up_on_bad_results(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Connection, "_send_failure")
    async def send_failure(original: Any, connection: Connection, header: Any, error: Exception, **kwargs: Any) -> None:
        if isinstance(error, SerializationError):
            connection.comm.abort()
        else:
            await original(connection, header, error, **kwargs)


@control("An unknown op is answered with None.", by("c02_no_such_op", "m", "DID NOT RAISE UnknownOp"))
def answers_unknown_ops(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _connection, "find_handler")
    def find_handler(original: Any, *args: Any) -> Any:
        try:
            return original(*args)
        except UnknownOp:
            return HandlerEntry.of(lambda **kwargs: None)


@control(
    "A handler's SystemExit or KeyboardInterrupt is swallowed.",
    by("c06_exits_end_the_server", "i", "hang: "),
    by("c06_an_exit_out_of_serve_is_bare", "i", "hang: "),
)
def swallows_exits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_connection, "_ends_the_server", lambda error: False)


@control(
    "What goes wrong on one connection takes the server down.",
    by("c09_one_connection_dies_and_nine_go_on", "i", "Cancel scope stack corrupted"),
)
def crashes_with_a_connection(patch: pytest.MonkeyPatch) -> None:
    def logged(*args: object) -> None:
        raise  # what is being handled there: the last thing that a connection does with an error of its own

    patch.setattr(_connection._log, "exception", logged)
