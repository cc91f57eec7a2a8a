"""Who gets which comm: no I/O, so no comms either."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from trio_dcore.client._pool_policy import PoolPolicy, Waiter


class Comm:
    """Only ever a key."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def connect(policy: Any, address: str, name: str, op: str = "op") -> Any:
    slot, evicted = policy.reserve(address, op)
    assert slot is not None
    assert evicted is None
    comm = Comm(name)
    policy.connected(slot, comm)
    return comm


def wait(policy: PoolPolicy, address: str, op: str = "op") -> Waiter:
    assert policy.reserve(address, op) == (None, None)
    waiter = Waiter(address, op)
    policy.waiters.append(waiter)
    return waiter


def consistent(policy: PoolPolicy) -> None:
    assert 0 <= policy.open <= policy.limit
    idle = [comm for comms in policy.idle.values() for comm in comms]
    assert set(idle) == set(policy.idle_since)
    assert len(idle) == len(set(idle))
    assert not set(idle) & set(policy.busy)
    assert not (policy.waiters and policy.idle_since)
    assert not policy.waiters or policy.open == policy.limit


def test_nothing_to_reuse() -> None:
    policy = PoolPolicy(2)
    assert policy.reuse("a", "op") is None
    assert policy.open == 0
    assert policy.idle == {}


def test_a_comm_goes_round() -> None:
    policy: Any = PoolPolicy(2)
    comm = connect(policy, "a", "one", "first")
    assert policy.busy == {comm: ("a", "first")}
    assert policy.release(comm, 5.0) is None
    assert policy.idle_since == {comm: ("a", 5.0)}
    assert policy.reuse("b", "op") is None
    assert policy.reuse("a", "second") is comm
    assert policy.busy == {comm: ("a", "second")}
    consistent(policy)


def test_the_most_recent_is_used_first() -> None:
    policy: Any = PoolPolicy(4)
    comms = [connect(policy, "a", str(i)) for i in range(3)]
    for now, comm in enumerate((comms[1], comms[0], comms[2])):
        policy.release(comm, float(now))
    assert [policy.reuse("a", "op") for _ in range(4)] == [comms[2], comms[0], comms[1], None]
    consistent(policy)


def test_one_that_is_to_be_used_last() -> None:
    policy: Any = PoolPolicy(4)
    one, two, three = (connect(policy, "a", name) for name in ("one", "two", "three"))
    policy.release(one, 0.0)
    policy.release(two, 1.0, last=True)
    policy.release(three, 2.0)
    assert [policy.reuse("a", "op") for _ in range(3)] == [three, one, two]
    policy.release(one, 3.0, last=True)  # the only one
    assert policy.reuse("a", "op") is one


def test_the_longest_idle_is_evicted() -> None:
    policy: Any = PoolPolicy(3)
    one, two, three = (connect(policy, address, address) for address in ("a", "b", "c"))
    for now, comm in enumerate((two, one, three)):
        policy.release(comm, float(now))
    assert policy.open == 3
    slot, evicted = policy.reserve("d", "op")
    assert evicted is two
    assert slot.address == "d"
    assert policy.idle == {"a": [one], "c": [three]}
    consistent(policy)
    assert policy.reserve("d", "op")[1] is one
    assert policy.reserve("d", "op")[1] is three
    assert policy.reserve("d", "op") == (None, None)
    assert policy.open == 3


def test_a_slot_without_a_comm_is_free_again() -> None:
    policy = PoolPolicy(1)
    slot, _ = policy.reserve("a", "op")
    assert slot is not None
    assert policy.open == 1
    policy.cancel_connecting(slot)
    policy.cancel_connecting(slot)
    assert policy.open == 0
    consistent(policy)


def test_a_comm_that_is_discarded() -> None:
    policy: Any = PoolPolicy(1)
    comm = connect(policy, "a", "one")
    policy.discard(comm)
    policy.discard(comm)
    assert policy.open == 0
    assert policy.release(comm, 0.0) is comm  # it isn't ours any more: close it
    consistent(policy)


def test_addresses_are_forgotten() -> None:
    policy: Any = PoolPolicy(10)
    for address in ("a", "b", "c"):
        comm = connect(policy, address, address)
        policy.release(comm, 0.0)
        assert policy.reuse(address, "op") is comm
        if address == "a":
            policy.discard(comm)
        else:
            policy.release(comm, 1.0)
    policy.forget_idle(policy.idle["b"][0])
    assert list(policy.idle) == ["c"]


class TestWaiting:
    def test_the_comm_is_handed_over(self) -> None:
        policy: Any = PoolPolicy(1)
        comm = connect(policy, "a", "one")
        waiter = wait(policy, "a", "waiting")
        assert policy.release(comm, 0.0) is None
        assert waiter.woken.is_set()
        assert waiter.comm is comm
        assert policy.busy == {comm: ("a", "waiting")}
        consistent(policy)

    def test_the_slot_is_handed_over_to_another_address(self) -> None:
        policy: Any = PoolPolicy(1)
        comm = connect(policy, "a", "one")
        waiter = wait(policy, "b", "waiting")
        assert policy.release(comm, 0.0) is comm  # to be closed
        assert waiter.slot is not None
        assert (waiter.slot.address, waiter.slot.op) == ("b", "waiting")
        assert policy.open == 1
        assert policy.holders() == {"waiting": 1}
        consistent(policy)

    @pytest.mark.parametrize("how", ["discard", "cancel_connecting"])
    def test_the_slot_of_what_has_died(self, how: str) -> None:
        policy: Any = PoolPolicy(1)
        if how == "discard":
            comm = connect(policy, "a", "one")
            waiter = wait(policy, "a")
            policy.discard(comm)
        else:
            slot, _ = policy.reserve("a", "op")
            waiter = wait(policy, "a")
            policy.cancel_connecting(slot)
        assert waiter.slot is not None
        assert policy.open == 1
        consistent(policy)

    def test_in_order(self) -> None:
        policy: Any = PoolPolicy(1)
        comm = connect(policy, "a", "one")
        waiters = [wait(policy, "a") for _ in range(3)]
        for waiter in waiters:
            assert not waiter.woken.is_set()
            policy.release(comm, 0.0)
            assert waiter.comm is comm
        policy.release(comm, 0.0)
        assert policy.idle_since

    def test_giving_up_before(self) -> None:
        policy: Any = PoolPolicy(1)
        comm = connect(policy, "a", "one")
        first, second = wait(policy, "a"), wait(policy, "a")
        assert policy.give_up(first) is None
        policy.release(comm, 0.0)
        assert not first.woken.is_set()
        assert second.comm is comm

    def test_giving_up_a_comm(self) -> None:
        policy: Any = PoolPolicy(1)
        comm = connect(policy, "a", "one")
        first, second = wait(policy, "a"), wait(policy, "a")
        policy.release(comm, 0.0)
        assert policy.give_up(first) is comm
        assert policy.release(comm, 0.0) is None
        assert second.comm is comm
        consistent(policy)

    def test_giving_up_a_slot(self) -> None:
        policy: Any = PoolPolicy(1)
        comm = connect(policy, "a", "one")
        first, second = wait(policy, "b"), wait(policy, "c")
        policy.release(comm, 0.0)
        assert policy.give_up(first) is None
        assert second.slot is not None
        assert second.slot.address == "c"
        consistent(policy)

    def test_giving_up_with_nothing(self) -> None:
        policy = PoolPolicy(1)
        assert policy.give_up(Waiter("a", "op", trio.Event())) is None

    def test_a_comm_that_had_died_when_it_was_handed_over(self) -> None:
        policy: Any = PoolPolicy(1)
        comm = connect(policy, "a", "one")
        first, second = wait(policy, "a", "first"), wait(policy, "a", "second")
        policy.release(comm, 0.0)
        slot = policy.replace(first.comm)
        assert (slot.address, slot.op) == ("a", "first")
        assert policy.open == 1
        assert not second.woken.is_set()
        assert policy.replace(comm) is None
        consistent(policy)


def test_expired() -> None:
    policy: Any = PoolPolicy(5)
    comms = [connect(policy, "ab"[i % 2], str(i)) for i in range(4)]
    for i, comm in enumerate(comms):
        policy.release(comm, float(i))
    assert policy.expired(-1.0) == []
    assert policy.expired(1.0) == comms[:2]
    assert policy.expired(9.0) == comms


def test_holders() -> None:
    policy: Any = PoolPolicy(5)
    for op in ("add", "add", "echo"):
        connect(policy, "a", op, op)
    policy.reserve("a", "echo")
    idle = connect(policy, "a", "idle", "idle")
    policy.release(idle, 0.0)
    assert policy.holders() == {"add": 2, "echo": 2}
