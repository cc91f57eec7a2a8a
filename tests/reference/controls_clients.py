"""Broken clients, and broken deadlines; see controls.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import trio

from tests.reference.controls import by, control, wrap
from tests.reference.test_n_sweeps import a_call, two_calls
from trio_dcore import BatchedSend, CommClosedError, ConnectionPool
from trio_dcore.client import _call as client_call
from trio_dcore.client._pool_policy import PoolPolicy, Waiter
from trio_dcore.comm import BaseComm, FramedComm
from trio_dcore.comm import _connect as connecting
from trio_dcore.server._connection import Connection

# -- calls and the pool ----------------------------------------------------------------------------------------------------------


@control("A client raises the SystemExit that a server names.", by("c07_an_opted_in_reply_is_an_exit", "m", "SystemExit: 7"))
def believes_in_exits(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, client_call, "exception_from_value")
    def exception_from_value(original: Any, value: Any, **kwargs: Any) -> BaseException:
        return SystemExit(7) if value["type"] == "builtins.SystemExit" else original(value, **kwargs)


@control("A call whose connection ends goes on waiting for its answer.", by("c06_exits_end_the_server", "i", "hang: "))
def waits_for_an_answer_for_ever(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, client_call, "_enveloped_answer")
    async def enveloped_answer(original: Any, comm: Any, op: str, deserializers: Any, found: Any) -> Any:
        if found is None:
            await trio.sleep_forever()
        return await original(comm, op, deserializers, found)


@control(
    "A call of which the server may have started the handler is made again.",
    by("n03_cut_after_every_byte", "", "SweepError: .*worked", use=two_calls),
)
def calls_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CommClosedError, "nothing_sent", True, raising=False)


@control(
    "A call that is cancelled while it connects never gives its slot back.",
    by("d03_cancelled_between_the_slot_and_the_first_byte", "i", "SweepError: .*connecting"),
)
def loses_a_connecting_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolPolicy, "cancel_connecting", lambda policy, slot: None)


@control(
    "A call that is cancelled with a comm in use never gives its slot back.",
    by("d05_cancelled_while_waiting_for_the_reply", "m", "busy"),
)
def loses_a_busy_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolPolicy, "discard", lambda policy, comm: None)


@control(
    "A waiting call that is cancelled keeps its place.",
    by("d02_a_cancelled_waiter_gives_up_its_place", "i", "assert 2 == 1"),
)
def keeps_cancelled_waiters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolPolicy, "give_up", lambda policy, waiter: None)


@control(
    "What is given to a waiting call that has just been cancelled is lost.",
    by("d02_a_waiter_that_is_cancelled_when_it_is_its_turn_passes_it_on", "i", "instead of 0 s"),
)
def loses_what_waiters_are_given(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, PoolPolicy, "give_up")
    def give_up(original: Any, policy: PoolPolicy, waiter: Waiter) -> Any:
        return original(policy, waiter) if waiter in policy.waiters else None


@control(
    "What a call has got when it is cancelled before it could use it is lost.",
    by("d02_a_waiter_that_is_cancelled_when_it_is_its_turn_passes_it_on", "i", "instead of 0 s"),
)
def loses_what_is_not_wanted(patch: pytest.MonkeyPatch) -> None:
    async def still_wanted(pool: ConnectionPool, comm: BaseComm) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()

    patch.setattr(ConnectionPool, "_still_wanted", still_wanted)


@control("A call that waits for a slot is not woken.", by("d02_a_cancelled_waiter_gives_up_its_place", "i", "instead of 0 s"))
def wakes_nobody(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, PoolPolicy, "_next_waiter")
    def next_waiter(original: Any, policy: PoolPolicy) -> Any:
        waiter = original(policy)
        waiter.woken = trio.Event()
        return waiter


@control("Closing a pool leaves waiting calls waiting.", by("d08_closing_a_pool_ends_all_kinds_of_calls", "i", "instead of 0 s"))
def leaves_waiters(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, ConnectionPool, "close_now")
    def close_now(original: Any, pool: ConnectionPool) -> None:
        pool._policy.waiters.clear()
        original(pool)


@control("Closing a pool leaves calls in flight.", by("d08_closing_a_pool_ends_all_kinds_of_calls", "i", "instead of 0 s"))
def leaves_calls_in_flight(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, ConnectionPool, "close_now")
    def close_now(original: Any, pool: ConnectionPool) -> None:
        busy = dict(pool._policy.busy)
        pool._policy.busy.clear()
        original(pool)
        pool._policy.busy.update(busy)


@control("A pool opens more comms than its limit.", by("d07_five_hundred_calls_cancelled_at_random", "i", "assert 5 <= 4"))
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
    by("d05_cancelled_while_waiting_for_the_reply", "m", "instead of 0 s"),
    by("j05_reply_and_cancellation_in_the_same_tick", "i", r"False = closed\(\)"),
)
def uses_dirty_comms_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ConnectionPool, "discard", ConnectionPool.release)


@control(
    "A comm stays open after a write or read that was cut off in the middle of a message.",
    by("d04_of_a_raw_comm", "m", r"False = closed\(\)"),
    by("d06_of_a_raw_comm", "m", r"False = closed\(\)"),
)
def keeps_half_messages(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, FramedComm, "_doom")
    def doom(original: Any, comm: FramedComm, why: str, **options: Any) -> None:
        if "interrupted" not in why:
            original(comm, why, **options)


@control(
    "A comm stays open when its handshake was cancelled.",
    by("d01_cancelled_before_there_is_a_comm", "t", "TooSlowError"),
    by("n01_a_client_from_nothing", "m", "SweepError: .*connections=1", use=a_call),
    by("n03_connecting", "u", "LeakError: "),
)
def leaks_handshakes(patch: pytest.MonkeyPatch) -> None:
    async def handshake(comm: BaseComm, address: str) -> None:
        await comm.handshake()

    patch.setattr(connecting, "_handshake", handshake)


@control(
    "Messages of a batched stream that were not sent are not told.",
    by("n02_batches", "m", "SweepError: cancelled at step"),
)
def tells_no_loss(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BatchedSend, "unsent", [])


# -- deadlines -------------------------------------------------------------------------------------------------------------------


class OtherTrio:
    """trio as one module sees it, with some functions replaced."""

    def __init__(self, **functions: Any) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


@control(
    "The deadline of a call is not sent.",
    by("j02_the_deadline_holds_where_the_cancellation_is_lost", "m", "instead of 1 s"),
    by("j03_nested_calls_share_what_is_left", "i", "assert inf <= 1"),
)
def sends_no_deadline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(client_call, "trio", OtherTrio(current_effective_deadline=lambda: math.inf))


@control(
    "The deadline is sent as an instant of the caller's clock, not as what is left.",
    by("j03_nested_calls_share_what_is_left", "i", r"assert 1\.2\d* <= 1"),
)
def sends_an_instant(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(client_call, "trio", OtherTrio(current_time=lambda: 0.0))


@control(
    "The server does not enforce the deadline that it is told.",
    by("j02_the_deadline_holds_where_the_cancellation_is_lost", "m", "instead of 1 s"),
    by("j01_a_deadline_that_has_passed_starts_nothing", "m", r"\(0, \d\) == \(1, \d\)"),
    by("j05_the_handlers_own_deadline_is_told_from_a_bug", "i", "instead of 1 s"),
)
def enforces_no_deadline(patch: pytest.MonkeyPatch) -> None:
    @wrap(patch, Connection, "_opted_in")
    def opted_in(original: Any, connection: Connection, value: object) -> Any:
        return replace(original(connection, value), deadline=None)
