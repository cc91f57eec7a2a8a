"""Negative controls: servers and clients that are broken, each in one way, so that the reference tests must fail.

Each control replaces one method or function of the library, for as long as a ``MonkeyPatch`` lasts.  It names the reference tests that
must notice and, for each, what their failure says, so that a test that fails for another reason does not count.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio

from tests.reference.test_n_sweeps import a_call, two_calls
from trio_dcore import CommClosedError, ConnectionPool, SerializationError, Server, UnknownOp
from trio_dcore.client import _call as client_call
from trio_dcore.client._pool_policy import PoolPolicy, Waiter
from trio_dcore.comm import BaseComm, FramedComm
from trio_dcore.comm import _connect as connecting
from trio_dcore.server import _connection
from trio_dcore.server._connection import Connection
from trio_dcore.server._handlers import HandlerEntry
from trio_dcore.server._request import Request
from trio_dcore.server._server import BaseServer
from trio_dcore.server._status import Life

Install = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Catch:
    """A reference test that must fail.

    Attributes:
        test: as in docs/shutdown-tests.md: module::name.
        transport: the letter of the one that it is run over.
        says: matches what its failure says.
        arguments: further ones of a parametrized test.
    """

    test: str
    transport: str
    says: str
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def function(self) -> Callable[..., None]:
        """The test."""
        module, _, name = self.test.partition("::")
        function: Callable[..., None] = getattr(importlib.import_module(f"tests.reference.{module}"), name)
        return function


@dataclass(frozen=True)
class Control:
    """One way to be broken.

    Attributes:
        name: what to call it.
        broken: what is broken, for the table in docs/shutdown-controls.md.
        catches: what must notice.
        install: breaks it.
    """

    name: str
    broken: str
    catches: tuple[Catch, ...]
    install: Install


CONTROLS: dict[str, Control] = {}


def control(broken: str, *catches: Catch) -> Callable[[Install], Install]:
    def decorate(install: Install) -> Install:
        CONTROLS[install.__name__] = Control(install.__name__, broken, catches, install)
        return install

    return decorate


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Replace a function by the decorated one, which is given the original before its arguments."""
    original = getattr(owner, name)

    def decorate(broken: Callable[..., Any]) -> None:
        patch.setattr(owner, name, lambda *args, **kwargs: broken(original, *args, **kwargs))

    return decorate


def a(name: str, transport: str, says: str) -> Catch:
    return Catch(f"test_a_orderly_stop::test_{name}", transport, says)


def b(name: str, transport: str, says: str) -> Catch:
    return Catch(f"test_b_cancelled::test_{name}", transport, says)


def c(name: str, transport: str, says: str) -> Catch:
    return Catch(f"test_c_handler_errors::test_{name}", transport, says)


def d(name: str, transport: str, says: str) -> Catch:
    return Catch(f"test_d_calls_and_pool::test_{name}", transport, says)


def j(name: str, transport: str, says: str) -> Catch:
    return Catch(f"test_j_deadlines::test_{name}", transport, says)


def k(name: str, transport: str, says: str) -> Catch:
    return Catch(f"test_k_signals_and_runs::test_{name}", transport, says)


def n(name: str, transport: str, says: str, **arguments: Any) -> Catch:
    return Catch(f"test_n_sweeps::test_{name}", transport, says, tuple(arguments.items()))


# -- stopping --------------------------------------------------------------------------------------------------------------------


@control("A task of the server's is left behind when it has closed.", a("a02_reply_delivered_within_grace", "m", ""))
def leaks_a_task(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_finish")
    def finish(original: Any, server: Any) -> None:
        original(server)
        trio.lowlevel.spawn_system_task(trio.sleep, 3600, name="left behind")


@control(
    "The connection of a handler that has run to its end while the server drained is not closed.",
    a("a02_reply_delivered_within_grace", "t", ""),
    a("a02_reply_delivered_within_grace", "m", ""),
)
def leaks_a_descriptor(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, FramedComm, "aclose")
    async def aclose(original: Any, comm: FramedComm) -> None:
        await trio.lowlevel.checkpoint()


@control(
    "Idle connections are not closed at the stop: closing waits for their clients.",
    a("a04_idle_connections_are_closed_at_once", "i", ""),
    a("a05_no_request_is_started_while_draining", "i", ""),
    a("a05_stock_peer_sees_the_end_of_its_idle_connection", "m", ""),
)
def waits_for_idle_connections(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "retire", lambda connection: None)


@control("Closing a connection waits for its client.", a("a02_reply_delivered_within_grace", "m", ""))
def hangs_on_close(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, FramedComm, "aclose")
    async def aclose(original: Any, comm: FramedComm) -> None:
        await trio.sleep_forever()


@control("The server waits until the grace is over, though nothing is in flight any more.", a("a02_reply_delivered_within_grace", "m", ""))
def waits_out_the_grace(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_serve_connection")
    async def serve_connection(original: Any, server: Any, connection: Connection) -> None:
        await original(server, connection)
        if server.draining:
            await trio.sleep_until(server._deadline)


@control(
    "All connections are closed at the stop, so replies within the grace are lost.",
    a("a02_reply_delivered_within_grace", "m", ""),
)
def drops_replies_in_the_grace(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "retire", lambda connection: connection.comm.abort())


@control(
    "The grace is ignored: the stop cancels handlers at once.",
    a("a02_reply_delivered_within_grace", "m", ""),
    a("a06_pipelined_on_a_raw_comm", "m", ""),
)
def ignores_the_grace(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_request_stop")
    def request_stop(original: Any, server: Any, grace: float) -> None:
        original(server, 0)


@control(
    "The grace never ends: handlers are not cancelled when it is over.",
    a("a03_cancelled_when_grace_is_over", "m", ""),
    b("b03_drain_on_cancel_has_an_end", "m", ""),
)
def never_ends_the_grace(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_shorten")
    def shorten(original: Any, server: Any, grace: float) -> None:
        if grace <= 0:
            original(server, grace)


@control("A later stop() makes the grace longer.", a("a08_a_later_stop_only_shortens", "m", ""))
def lets_a_later_stop_lengthen(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_shorten")
    def shorten(original: Any, server: Any, grace: float) -> None:
        server._deadline = float("inf")
        original(server, grace)


@control(
    "stop() and aclose() raise if the server has closed already.",
    a("a07_closing_again_and_at_once", "m", ""),
)
def closes_only_once(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "stop")
    def stop(original: Any, server: Any, *args: Any, **kwargs: Any) -> None:
        if server._life is Life.CLOSED:
            server._life.move(Life.CLOSING)
        original(server, *args, **kwargs)


@control("aclose() in a handler waits for its own handler.", a("a09_a_handler_stops_its_own_server", "m", ""))
def waits_for_itself(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "running", False)


@control(
    "finished(), and aclose() with it, returns when the stop has been asked for.",
    a("a07_closing_again_and_at_once", "m", ""),
    a("a03_cancelled_when_grace_is_over", "m", ""),
)
def says_finished_too_early(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_request_stop")
    def request_stop(original: Any, server: Any, grace: float) -> None:
        original(server, grace)
        server._finished.set()


@control(
    "A handler's caller is told nothing when it is cut: it sees the bare end of its connection.",
    a("a03_cancelled_when_grace_is_over", "m", ""),
    b("b01_cancelled_means_now", "i", ""),
)
def cuts_without_a_word(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "_last_words", lambda connection, header: None)


@control(
    "Requests that are pipelined behind the running one are dropped at the stop.",
    a("a06_pipelined_on_a_raw_comm", "m", ""),
    a("a06_pipelined_opted_in_requests_are_answered_in_order", "m", ""),
    a("a06_pipelined_stock_requests_are_answered_in_order", "m", ""),
)
def drops_pipelined_requests(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Connection, "_answer")
    async def answer(original: Any, connection: Connection, *args: Any) -> bool:
        return await original(connection, *args) and not connection.server.draining


@control(
    "Requests are started while the server drains.",
    a("a05_no_request_is_started_while_draining", "i", ""),
    a("a06_pipelined_on_a_raw_comm", "m", ""),
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
    a("a05_no_request_is_started_while_draining", "m", ""),
    a("a06_pipelined_opted_in_requests_are_answered_in_order", "m", ""),
)
def says_no_goodbye(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "_say_goodbye", lambda connection: None)


@control("Listeners stay open while the server drains.", a("a05_no_request_is_started_while_draining", "i", ""))
def listens_while_draining(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_wind_down")
    def wind_down(original: Any, server: Any) -> None:
        listeners, server._listeners = server._listeners, []
        original(server)
        server._listeners = listeners  # for _finish


@control("A start that fails leaves its first listener open.", a("a10_second_listener_is_taken", "t", ""))
def leaves_a_listener_open(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_wind_down")
    def wind_down(original: Any, server: Any) -> None:
        if server._failed:
            server._listeners.clear()
        original(server)


@control(
    "The server's own outgoing connections stay open when it has closed.",
    a("a02_handlers_can_call_out_until_they_have_ended", "m", ""),
)
def leaves_the_outgoing_pool_open(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Server, "_close_outgoing", lambda server: None)


@control("An orderly stop logs a warning.", a("a02_reply_delivered_within_grace", "m", ""))
def warns_in_an_orderly_stop(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_wind_down")
    def wind_down(original: Any, server: Any) -> None:
        original(server)
        logging.getLogger("trio_dcore.server").warning("closing %d connections", len(server._connections))


@control("Streams are not told of the shutdown.", a("a12_draining_under_load_is_quiet", "i", ""))
def hides_the_shutdown_from_streams(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "shutdown_requested", property(lambda request: trio.Event()))


@control("A server serves again after it has closed.", k("k05_a_server_serves_once", "", ""))
def serves_twice(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_begin")
    def begin(original: Any, server: Any) -> None:
        if server._life is Life.CLOSED:
            server._life = Life.NEW
        original(server)


# -- cancelled -------------------------------------------------------------------------------------------------------------------


@control(
    "Cancelled is swallowed in the connection's task: a handler that is cut has the result None.",
    a("a03_cancelled_when_grace_is_over", "m", ""),
    b("b01_cancelled_means_now", "m", ""),
)
def swallows_cancelled(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _connection, "drive")
    async def drive(original: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await original(*args, **kwargs)
        except trio.Cancelled:
            return None


@control(
    "A handler that swallows Cancelled gets its result sent although it was cut.",
    b("b08_a_handler_that_swallows_cancelled", "m", ""),
)
def sends_results_of_the_cut(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _connection, "drive")
    def drive(original: Any, context: Any, awaitable: Any, on_wait: Any = None) -> Any:
        return original(context, awaitable, on_wait, whole=False)


@control(
    "Cancelling the caller of aclose() does not end the grace.",
    b("b04_the_caller_of_aclose_is_cancelled", "m", ""),
)
def keeps_the_grace_of_a_cancelled_aclose(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "stop")
    def stop(original: Any, server: Any, grace: float | None = None, reason: str = "") -> None:
        if not (server.draining and grace == 0):
            original(server, grace, reason)


@control("aclose() is shielded: cancelling its caller has to wait for the grace.", b("b04_the_caller_of_aclose_is_cancelled", "m", ""))
def shields_aclose(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "aclose")
    async def aclose(original: Any, server: Any, grace: float | None = None) -> None:
        with trio.CancelScope(shield=True):
            await original(server, grace)


@control("drain_on_cancel is ignored.", b("b02_drain_on_cancel_delivers_the_reply", "m", ""))
def ignores_drain_on_cancel(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_hold_connections")
    async def hold_connections(original: Any, server: Any, *args: Any, **kwargs: Any) -> None:
        server.drain_on_cancel = 0
        await original(server, *args, **kwargs)


@control(
    "Cancelling a server that drains leaves it the rest of its grace, where drain_on_cancel is set.",
    b("b02_a_stop_does_not_make_the_drain_longer", "m", ""),
)
def drains_on_after_cancel(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_shorten")
    def shorten(original: Any, server: Any, grace: float) -> None:
        if not server._cancelled_from_outside or server._deadline == float("inf"):
            original(server, grace)


@control(
    "What the block of a server raises comes out in a group.",
    b("b05_the_block_of_the_server_fails", "m", ""),
)
def groups_what_the_block_raises(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, BaseServer, "_leave")
    async def leave(original: Any, server: Any, error: Any) -> Any:
        raised = await original(server, error)
        return ExceptionGroup("the server failed", [raised]) if isinstance(raised, Exception) else raised


@control(
    "A handler is not cancelled when its caller goes away.",
    d("d05_cancelled_while_waiting_for_the_reply", "m", ""),
    d("d05_cancelled_while_waiting_for_the_reply", "i", ""),
)
def works_for_those_who_have_gone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "hung_up", lambda connection: None)


@control(
    "A handler that nobody waits for is cancelled as well when its caller goes away.",
    d("d10_without_a_reply_the_handler_outlives_its_caller", "i", ""),
)
def cancels_what_nobody_waits_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "hung_up", lambda connection: connection.scope.cancel())


# -- handlers and their answers --------------------------------------------------------------------------------------------------


@control(
    "Each reply is sent twice.",
    a("a06_pipelined_stock_requests_are_answered_in_order", "m", ""),
    c("c02_no_such_op_for_a_stock_peer", "m", ""),
)
def answers_twice(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, FramedComm, "start")
    def start(original: Any, comm: FramedComm, message: Any, *args: Any) -> Any:
        if not (type(message) is dict and "op" in message):
            original(comm, message, *args)
        return original(comm, message, *args)


@control(
    "An error reply ends the connection.",
    c("c01_a_handler_raises", "m", ""),
    c("c01_a_stock_peer_gets_dasks_reply", "m", ""),
)
def hangs_up_on_errors(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Connection, "_send_failure")
    async def send_failure(original: Any, connection: Connection, *args: Any, **kwargs: Any) -> None:
        await original(connection, *args, **kwargs)
        connection.comm.abort()


@control(
    "A result that can't be serialized ends the connection instead of an answer.",
    c("c04_a_result_that_can_not_travel", "m", ""),
)
def hangs_up_on_bad_results(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Connection, "_send_failure")
    async def send_failure(original: Any, connection: Connection, header: Any, error: Exception, **kwargs: Any) -> None:
        if isinstance(error, SerializationError):
            connection.comm.abort()
        else:
            await original(connection, header, error, **kwargs)


@control("An unknown op is answered with None.", c("c02_no_such_op", "m", ""))
def answers_unknown_ops(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, _connection, "find_handler")
    def find_handler(original: Any, *args: Any) -> Any:
        try:
            return original(*args)
        except UnknownOp:
            return HandlerEntry.of(lambda **kwargs: None)


@control(
    "A handler's SystemExit or KeyboardInterrupt is swallowed.",
    c("c06_exits_end_the_server", "i", ""),
    c("c06_an_exit_out_of_serve_is_bare", "i", ""),
)
def swallows_exits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_connection, "_ends_the_server", lambda error: False)


@control("What goes wrong on one connection takes the server down.", c("c09_one_connection_dies_and_nine_go_on", "i", ""))
def crashes_with_a_connection(patch: pytest.MonkeyPatch) -> None:
    def logged(*args: object) -> None:
        raise  # noqa: PLE0704  # what is being handled there: the last resort of a connection does not catch it

    patch.setattr(_connection._log, "exception", logged)


@control("A client raises the SystemExit that a server names.", c("c07_an_opted_in_reply_is_an_exit", "m", ""))
def believes_in_exits(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, client_call, "exception_from_value")
    def exception_from_value(original: Any, value: Any, **kwargs: Any) -> BaseException:
        return SystemExit(7) if value["type"] == "builtins.SystemExit" else original(value, **kwargs)


# -- calls and the pool ----------------------------------------------------------------------------------------------------------


@control("A call whose connection ends goes on waiting for its answer.", c("c06_exits_end_the_server", "i", ""))
def waits_for_an_answer_for_ever(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, client_call, "_enveloped_answer")
    async def enveloped_answer(original: Any, comm: Any, op: str, deserializers: Any, found: Any) -> Any:
        if found is None:
            await trio.sleep_forever()
        return await original(comm, op, deserializers, found)


@control(
    "A call of which the server may have started the handler is made again.",
    n("n03_cut_after_every_byte", "", "", use=two_calls),
)
def calls_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CommClosedError, "nothing_sent", True, raising=False)


@control(
    "A call that is cancelled while it connects never gives its slot back.",
    d("d03_cancelled_between_the_slot_and_the_first_byte", "i", ""),
)
def loses_a_connecting_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolPolicy, "cancel_connecting", lambda policy, slot: None)


@control(
    "A call that is cancelled with a comm in use never gives its slot back.",
    d("d05_cancelled_while_waiting_for_the_reply", "m", ""),
)
def loses_a_busy_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolPolicy, "discard", lambda policy, comm: None)


@control(
    "A waiting call that is cancelled keeps its place.",
    d("d02_a_cancelled_waiter_gives_up_its_place", "i", ""),
)
def keeps_cancelled_waiters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolPolicy, "give_up", lambda policy, waiter: None)


@control(
    "What is given to a waiting call that has just been cancelled is lost.",
    d("d02_a_waiter_that_is_cancelled_when_it_is_its_turn_passes_it_on", "i", ""),
)
def loses_what_waiters_are_given(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, PoolPolicy, "give_up")
    def give_up(original: Any, policy: PoolPolicy, waiter: Waiter) -> Any:
        return original(policy, waiter) if waiter in policy.waiters else None


@control(
    "What a call has got when it is cancelled before it could use it is lost.",
    d("d02_a_waiter_that_is_cancelled_when_it_is_its_turn_passes_it_on", "i", ""),
    d("d03_cancelled_between_the_slot_and_the_first_byte", "i", ""),
)
def loses_what_is_not_wanted(patch: pytest.MonkeyPatch) -> None:
    async def still_wanted(pool: ConnectionPool, comm: BaseComm) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()

    patch.setattr(ConnectionPool, "_still_wanted", still_wanted)


@control("A call that waits for a slot is not woken.", d("d02_a_cancelled_waiter_gives_up_its_place", "i", ""))
def wakes_nobody(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, PoolPolicy, "_next_waiter")
    def next_waiter(original: Any, policy: PoolPolicy) -> Any:
        waiter = original(policy)
        waiter.woken = trio.Event()
        return waiter


@control("Closing a pool leaves waiting calls waiting.", d("d08_closing_a_pool_ends_all_kinds_of_calls", "i", ""))
def leaves_waiters(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, ConnectionPool, "close_now")
    def close_now(original: Any, pool: ConnectionPool) -> None:
        pool._policy.waiters.clear()
        original(pool)


@control("Closing a pool leaves calls in flight.", d("d08_closing_a_pool_ends_all_kinds_of_calls", "i", ""))
def leaves_calls_in_flight(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, ConnectionPool, "close_now")
    def close_now(original: Any, pool: ConnectionPool) -> None:
        busy = dict(pool._policy.busy)
        pool._policy.busy.clear()
        original(pool)
        pool._policy.busy.update(busy)


@control("A pool opens more comms than its limit.", d("d07_five_hundred_calls_cancelled_at_random", "i", ""))
def exceeds_the_limit(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, PoolPolicy, "reserve")
    def reserve(original: Any, policy: PoolPolicy, *args: Any) -> Any:
        policy.limit += 1
        try:
            return original(policy, *args)
        finally:
            policy.limit -= 1


@control(
    "A comm whose call was cancelled is used again.",
    d("d05_cancelled_while_waiting_for_the_reply", "m", ""),
    j("j05_reply_and_cancellation_in_the_same_tick", "i", ""),
)
def uses_dirty_comms_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ConnectionPool, "discard", ConnectionPool.release)


@control(
    "A comm stays open after a write or read that was cut off in the middle of a message.",
    d("d04_of_a_raw_comm", "m", ""),
    d("d06_of_a_raw_comm", "m", ""),
)
def keeps_half_messages(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, FramedComm, "_doom")
    def doom(original: Any, comm: FramedComm, why: str) -> None:
        if "interrupted" not in why:
            original(comm, why)


@control(
    "A comm stays open when its handshake was cancelled.",
    d("d01_cancelled_before_there_is_a_comm", "t", ""),
    n("n01_a_client_from_nothing", "m", "", use=a_call),
)
def leaks_handshakes(patch: pytest.MonkeyPatch) -> None:
    async def handshake(comm: BaseComm, address: str) -> None:
        await comm.handshake()

    patch.setattr(connecting, "_handshake", handshake)


# -- deadlines -------------------------------------------------------------------------------------------------------------------


class OtherTrio:
    """trio as one module sees it, with some functions replaced."""

    def __init__(self, **functions: Any) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


@control(
    "The deadline of a call is not sent.",
    j("j02_the_deadline_holds_where_the_cancellation_is_lost", "m", ""),
    j("j03_nested_calls_share_what_is_left", "i", ""),
)
def sends_no_deadline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(client_call, "trio", OtherTrio(current_effective_deadline=lambda: float("inf")))


@control(
    "The deadline is sent as an instant of the caller's clock, not as what is left.",
    j("j03_nested_calls_share_what_is_left", "i", ""),
)
def sends_an_instant(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(client_call, "trio", OtherTrio(current_time=lambda: 0.0))


@control(
    "The server does not enforce the deadline that it is told.",
    j("j02_the_deadline_holds_where_the_cancellation_is_lost", "m", ""),
    j("j01_a_deadline_that_has_passed_starts_nothing", "m", ""),
    j("j05_the_handlers_own_deadline_is_told_from_a_bug", "i", ""),
)
def enforces_no_deadline(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Connection, "_opted_in")
    def opted_in(original: Any, connection: Connection, value: object) -> Any:
        return replace(original(connection, value), deadline=None)
