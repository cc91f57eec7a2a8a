"""Group D: calls that are cancelled, and the pool behind them."""

from __future__ import annotations

import random
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.reference.kit import Journal, Outcome, Wire, reference
from trio_dcore import CommClosedError, ConnectionPool, RemoteError, RPCClosed, Server
from trio_dcore.comm import parse_address
from trio_dcore.testing import cancel_sweep

blocked = trio.testing.wait_all_tasks_blocked


class Held:
    """A handler that ends when it is told to."""

    def __init__(self, result: Any = "held") -> None:
        self.started = trio.Event()
        self.release = trio.Event()
        self._result = result

    async def __call__(self) -> Any:
        self.started.set()
        await self.release.wait()
        return self._result


class Cancellable:
    """A call in a task of its own that can be cancelled, and how it ended."""

    def __init__(
        self, nursery: trio.Nursery, operation: Callable[[], Awaitable[Any]], scope: trio.CancelScope | None = None
    ) -> None:
        self.scope = scope or trio.CancelScope()
        self.outcome = Outcome()
        self.ended = trio.Event()
        nursery.start_soon(self._run, operation)

    async def _run(self, operation: Callable[[], Awaitable[Any]]) -> None:
        with self.scope:
            await self.outcome.of(operation)
        self.ended.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled, in place of any outcome."""
        return self.scope.cancelled_caught


def counts_are_whole(pool: ConnectionPool, *, open: int | None = None) -> None:
    """Nothing is in use, and nothing waits; ``open`` comms are idle if a number is given."""
    policy = pool._policy
    assert not policy.busy
    assert not policy.connecting
    assert not policy.waiters
    assert pool.active == 0
    assert pool.open == len(policy.idle_since) == sum(map(len, policy.idle.values()))
    assert pool.open <= pool.limit
    assert not any(comm.closed() for comm in policy.idle_since)
    if open is not None:
        assert pool.open == open


# -- D01: cancelled while there is no connection yet -----------------------------------------------------------------------------


async def cancelled_while(pool: ConnectionPool, address: str, reached: Callable[[], Awaitable[object]]) -> None:
    """A call is cancelled when it has come to a point; its scope catches that, and the pool has nothing left of it."""
    async with trio.open_nursery() as nursery:
        call = Cancellable(nursery, pool(address).quick)
        await reached()
        await blocked()
        assert not call.ended.is_set()
        assert pool.active == 1
        call.scope.cancel()
        await call.ended.wait()
        assert call.cancelled
    counts_are_whole(pool, open=0)


@contextmanager
def resolver_that_hangs() -> Iterator[trio.Event]:
    """Names are looked up for ever; the event says that it has begun."""
    asked = trio.Event()

    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:
            asked.set()
            await trio.sleep_forever()

        async def getnameinfo(self, *args: Any) -> Any:
            raise AssertionError("nobody asks for this")

    old = trio.socket.set_custom_hostname_resolver(Resolver())
    try:
        yield asked
    finally:
        trio.socket.set_custom_hostname_resolver(old)


@contextmanager
def listener_that_does_not_answer(wire: Wire) -> Iterator[str]:
    """The queue of a listener that accepts nothing is full, so that the kernel leaves further connects without an answer."""
    where = wire.where
    scheme, location = parse_address(where)
    family, name = (socket.AF_UNIX, location) if scheme == "unix" else (socket.AF_INET, ("127.0.0.1", 0))
    with socket.socket(family) as listener, socket.socket(family) as first:
        listener.bind(name)
        listener.listen(0)
        first.connect(listener.getsockname())
        try:
            yield where if scheme == "unix" else f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            if scheme == "unix":
                Path(location).unlink()


async def has_hung_up(stream: trio.abc.Stream) -> None:
    """Read to the end, which is there."""
    with trio.fail_after(1):
        while await stream.receive_some():
            pass


@reference("D01", "t u l")
async def test_d01_cancelled_before_there_is_a_comm(wire: Wire) -> None:
    async with wire.server({"quick": lambda: "quick"}) as (_, address), wire.pool() as pool:
        if wire.transport != "u":
            with resolver_that_hangs() as asked:
                await cancelled_while(pool, f"{parse_address(address)[0]}://somewhere.invalid:1", asked.wait)

        with listener_that_does_not_answer(wire) as nowhere:
            await cancelled_while(pool, nowhere, partial(trio.sleep, 0.02))

        silent, there = await wire.listen_bytes()
        async with silent:
            accepted = Outcome()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accepted.of, silent.accept)
                await cancelled_while(pool, there, accepted.ended)
            # It had begun to shake hands, over TLS those of TLS, and has hung up.
            async with accepted.value as stream:
                await has_hung_up(stream)

            accepted = Outcome()

            async def shake_hands_halfway() -> trio.abc.Stream:
                peer = wire.accepted(await silent.accept())
                await peer.receive()
                return peer.stream

            async with trio.open_nursery() as nursery:
                nursery.start_soon(accepted.of, shake_hands_halfway)
                await cancelled_while(pool, there, accepted.ended)
            async with accepted.value as stream:
                await has_hung_up(stream)

        assert await pool(address).quick() == "quick"
        counts_are_whole(pool, open=1)


# -- D02, D03: slots -------------------------------------------------------------------------------------------------------------


@reference("D02", "m i t u l")
async def test_d02_a_cancelled_waiter_gives_up_its_place(wire: Wire) -> None:
    held = Held()
    async with wire.server({"hold": held, "quick": lambda: "quick"}) as (_, address), wire.pool(limit=1) as pool:
        remote = pool(address)
        async with trio.open_nursery() as nursery:
            holder, following = Outcome(), Outcome()
            nursery.start_soon(holder.of, remote.hold)
            await held.started.wait()
            waiter = Cancellable(nursery, remote.quick)
            await blocked()
            nursery.start_soon(following.of, remote.quick)
            await blocked()
            assert [each.op for each in pool._policy.waiters] == ["quick", "quick"]
            waiter.scope.cancel()
            await waiter.ended.wait()
            assert waiter.cancelled
            assert len(pool._policy.waiters) == 1
            assert (pool.open, pool.active) == (1, 1)
            held.release.set()
            with wire.now():
                await following.ended()
        assert (holder.value, following.value) == ("held", "quick")
        counts_are_whole(pool, open=1)


@reference("D02", "m i t u l")
async def test_d02_a_waiter_that_is_cancelled_when_it_is_its_turn_passes_it_on(wire: Wire) -> None:
    """The holder's end gives the waiter a comm, or with another address a slot, and in the same step it is cancelled."""
    handlers = {"quick": lambda: "quick"}
    async with wire.server(handlers) as (_, one), wire.server(handlers) as (_, other), wire.pool(limit=1) as pool:
        for address in (one, other):
            for cancelled_first in (False, True):
                comm, _ = await pool.acquire(one, "held")
                async with trio.open_nursery() as nursery:
                    waiter, following = Cancellable(nursery, pool(address).quick), Outcome()
                    await blocked()
                    nursery.start_soon(following.of, pool(address).quick)
                    await blocked()
                    assert len(pool._policy.waiters) == 2
                    if cancelled_first:
                        waiter.scope.cancel()
                    pool.release(comm)
                    assert len(pool._policy.waiters) == 1  # it has been given what we had
                    waiter.scope.cancel()
                    with wire.now():
                        await following.ended()
                assert waiter.cancelled
                assert following.value == "quick"
                counts_are_whole(pool, open=1)
                # Nothing was begun on the comm that the waiter had, so it is as good as before.
                assert (comm in pool._policy.idle_since) == (address == one)


@reference("D03", "m i t u l")
async def test_d03_cancelled_between_the_slot_and_the_first_byte(wire: Wire) -> None:
    """Cancelled at every step of a first call, of which some have a slot, or even a comm, and have not sent anything."""
    started = 0

    async def quick() -> str:
        nonlocal started
        started += 1
        return "quick"

    kept = unsent = 0
    async with wire.server({"quick": quick}) as (_, address), wire.pool(limit=1) as pool:

        async def first_call() -> None:
            nonlocal started
            pool.collect()
            started = 0
            assert await pool(address).quick() == "quick"

        async def check() -> None:
            nonlocal kept, unsent
            unsent += started == 0
            kept += pool.open
            counts_are_whole(pool)
            with wire.now():
                assert await pool(address).quick() == "quick"
            counts_are_whole(pool, open=1)

        await pool(address).quick()
        runs = await cancel_sweep(first_call, check=check)
    assert runs > 5
    assert unsent > 2
    assert kept >= 1


# -- D04, D05, D06: on the wire --------------------------------------------------------------------------------------------------


# More than all the buffers on the way take, so that a writer is still at it, and how much of it has come through by then.
LARGE = 48 * 2**20
BEGUN = 2**20


@reference("D04", "m t u l")
async def test_d04_cancelled_half_way_through_writing(wire: Wire) -> None:
    async with (
        wire.server({"take": lambda data: len(data)}) as (server, address),
        wire.relay(address) as relay,
        wire.pool(limit=1) as pool,
    ):
        relay.limits = (BEGUN, LARGE)
        async with trio.open_nursery() as nursery:
            call = Cancellable(nursery, partial(pool(relay.address).take, data=bytes(LARGE)))
            while not relay.passed or relay.passed[0][0] < BEGUN:
                await blocked(0.001)
            (comm,) = pool._policy.busy
            assert comm._sending
            call.scope.cancel()
            with wire.now():
                await call.ended.wait()
        assert call.cancelled
        assert comm.closed()
        counts_are_whole(pool, open=0)
        with pytest.raises(CommClosedError):
            await comm.write("more")
        relay.limits = (2 * LARGE, LARGE)
        assert await pool(relay.address).take(data=bytes(BEGUN)) == BEGUN
        assert len(relay.passed) == 2
        assert server.statistics().requests == {"take": 1}
        counts_are_whole(pool, open=1)


@reference("D04", "m t u l")
async def test_d04_of_a_raw_comm(wire: Wire) -> None:
    """Nobody but the comm itself can close it there."""
    async with wire.server({"take": lambda data: len(data)}) as (server, address), wire.relay(address) as relay:
        relay.limits = (BEGUN, LARGE)
        async with await wire.connect(relay.address) as comm:
            async with trio.open_nursery() as nursery:
                writing = Cancellable(nursery, partial(comm.write, {"op": "take", "data": bytes(LARGE)}))
                while not relay.passed or relay.passed[0][0] < BEGUN:
                    await blocked(0.001)
                writing.scope.cancel()
                with wire.now():
                    await writing.ended.wait()
            assert writing.cancelled
            assert comm.closed()
            with pytest.raises(CommClosedError, match="interrupted in the middle of a message"):
                await comm.write("more")
        await blocked()
        assert server.statistics().requests == {}


@reference("D05", "m i t u l")
async def test_d05_cancelled_while_waiting_for_the_reply(wire: Wire) -> None:
    journal = Journal()
    async with (
        wire.server({"work": journal.handler(20, wire), "quick": lambda: "quick"}) as (server, address),
        wire.pool(limit=1) as pool,
    ):
        async with trio.open_nursery() as nursery:
            call = Cancellable(nursery, pool(address).work)
            await journal.started()
            (comm,) = pool._policy.busy
            with wire.now():
                call.scope.cancel()
                await call.ended.wait()
                assert call.cancelled
                await journal.ended()
        assert journal.entries == ["started", "cancelled", "finally"]
        assert comm.closed()
        counts_are_whole(pool, open=0)
        assert await pool(address).quick() == "quick"
        assert server.statistics().in_flight == 0


@reference("D06", "m t u l")
async def test_d06_cancelled_half_way_through_reading(wire: Wire) -> None:
    size = 8 * 2**20
    async with (
        wire.server({"give": lambda letter: letter * size, "quick": lambda: "quick"}) as (_, address),
        wire.relay(address) as relay,
        wire.pool(limit=1) as pool,
    ):
        relay.limits = (size, size // 2)
        async with trio.open_nursery() as nursery:
            call = Cancellable(nursery, partial(pool(relay.address).give, letter=b"A"))
            while not relay.passed or relay.passed[0][1] < size // 2:
                await blocked(0.001)
            await blocked()
            (comm,) = pool._policy.busy
            assert comm._parser.mid_message
            call.scope.cancel()
            with wire.now():
                await call.ended.wait()
        assert call.cancelled
        assert comm.closed()
        counts_are_whole(pool, open=0)
        relay.limits = (size, 2 * size)
        assert await pool(relay.address).quick() == "quick"
        assert await pool(relay.address).give(letter=b"B") == b"B" * size
        with pytest.raises(CommClosedError):
            await comm.read()
        assert len(relay.passed) == 2
        counts_are_whole(pool, open=1)


@reference("D06", "m t u l")
async def test_d06_of_a_raw_comm(wire: Wire) -> None:
    size = 8 * 2**20
    async with wire.server({"give": lambda: bytes(size)}) as (_, address), wire.relay(address) as relay:
        relay.limits = (size, size // 2)
        async with await wire.connect(relay.address) as comm:
            await comm.write({"op": "give", "reply": True})
            async with trio.open_nursery() as nursery:
                reading = Cancellable(nursery, comm.read)
                while not relay.passed or relay.passed[0][1] < size // 2:
                    await blocked(0.001)
                await blocked()
                reading.scope.cancel()
                with wire.now():
                    await reading.ended.wait()
            assert reading.cancelled
            assert comm.closed()
            with pytest.raises(CommClosedError, match="interrupted in the middle of a message"):
                await comm.read()


# -- D07: the pool's invariant ---------------------------------------------------------------------------------------------------


class Invariant(trio.abc.Instrument):
    """Between any two steps of any task: no more comms than allowed are open, and no slot is free while a call waits."""

    def __init__(self, pool: ConnectionPool, wire: Wire) -> None:
        self._pool = pool
        self._wire = wire
        self._ends: list[Any] = []
        self._seen = 0
        self.most = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        policy = self._pool._policy
        idle, busy, connecting = len(policy.idle_since), len(policy.busy), len(policy.connecting)
        assert idle + busy + connecting == self._pool.open <= self._pool.limit
        assert sum(map(len, policy.idle.values())) == idle
        assert not policy.waiters or busy + connecting == self._pool.limit
        if self._wire.network is not None:
            made = self._wire.network.connections
            self._ends = [end for end in self._ends if not end.closed] + [client for client, _ in made[self._seen :]]
            self._seen = len(made)
            assert sum(not end.closed for end in self._ends) <= self._pool.limit
        self.most = max(self.most, self._pool.open)


@reference("D07", "m i t u l", quiet=False)  # a handler that fails after its caller has gone is worth a warning
async def test_d07_five_hundred_calls_cancelled_at_random(wire: Wire) -> None:
    chance = random.Random(4711)
    pause = 0.001 if wire.virtual else 0.0005
    ended = {"cancelled": 0, "answered": 0, "failed": 0}
    at_once: list[trio.Event] = []
    everybody = trio.Event()

    async def slow(seconds: float) -> str:
        await trio.sleep(seconds)
        return "slow"

    def fail() -> None:
        raise ValueError("nope")

    async def meet() -> None:
        at_once.append(everybody)
        if len(at_once) == 4:
            everybody.set()
        await everybody.wait()

    async def count() -> Any:
        for i in range(1000):
            yield i

    async def stream(remote: Any) -> None:
        async with remote.count.stream() as items:
            async for i in items:
                if i == 20:
                    break

    def any_call(remote: Any) -> Callable[[], Awaitable[Any]]:
        calls: list[Callable[[], Awaitable[Any]]] = [
            remote.echo,
            partial(remote.echo, data=b"x" * 300_000),
            partial(remote.slow, seconds=chance.uniform(0, 5 * pause)),
            partial(remote.slow.notify, seconds=chance.uniform(0, 5 * pause)),
            remote.fail,
            partial(stream, remote),
        ]
        return chance.choice(calls)

    async def caller(remotes: list[Any]) -> None:
        for _ in range(25):
            how = "answered"
            with trio.CancelScope() as scope:
                kind = chance.random()
                if kind < 0.4:
                    scope.deadline = trio.current_time() + chance.uniform(0, 5 * pause)
                try:
                    if kind > 0.8:
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(cancel_soon, scope, chance.randrange(8))
                            await any_call(chance.choice(remotes))()
                    else:
                        await any_call(chance.choice(remotes))()
                except* RemoteError:
                    how = "failed"
            ended["cancelled" if scope.cancelled_caught else how] += 1

    async def cancel_soon(scope: trio.CancelScope, steps: int) -> None:
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    handlers = {"slow": slow, "fail": fail, "meet": meet, "count": count}
    async with wire.server(handlers) as (one, here), wire.server(handlers) as (_, there), wire.pool(limit=4) as pool:
        invariant = Invariant(pool, wire)
        trio.lowlevel.add_instrument(invariant)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(caller, [pool(here), pool(there)])
        assert sum(ended.values()) == 500
        assert min(ended.values()) > 20
        assert invariant.most == 4
        counts_are_whole(pool)
        # All four slots are there: four calls at once get one each.
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(pool(here).meet)
        counts_are_whole(pool, open=4)
        trio.lowlevel.remove_instrument(invariant)  # it would have raised if an assert in it had not switched it off
        with trio.fail_after(10 + 100 * pause):
            # What was asked for without a reply goes on; nothing tells of its end but the count.
            while one.statistics().in_flight:  # noqa: ASYNC110
                await trio.sleep(pause)
        await blocked()
        assert one.statistics().connections <= 4


# -- D08, D10 --------------------------------------------------------------------------------------------------------------------


@reference("D08", "m i t u l")
async def test_d08_closing_a_pool_ends_all_kinds_of_calls(wire: Wire) -> None:
    journal = Journal()
    async with wire.server({"work": journal.handler(60, wire)}) as (server, address), wire.silent() as silent:
        for how in ("aclose", "close_now", "block"):
            journal.clear()
            outcomes = {name: Outcome() for name in ("in flight", "connecting", "waiting")}
            pool = wire.pool(limit=2)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outcomes["in flight"].of, pool(address).work)
                await journal.started()
                nursery.start_soon(outcomes["connecting"].of, pool(silent).work)
                nursery.start_soon(outcomes["waiting"].of, pool(address).work)
                while not pool._policy.waiters:
                    await trio.lowlevel.checkpoint()
                assert (len(pool._policy.busy), len(pool._policy.connecting)) == (1, 1)
                with wire.now():
                    if how == "aclose":
                        await pool.aclose()
                    elif how == "close_now":
                        pool.close_now()
                    else:
                        async with pool:
                            pass
                    for outcome in outcomes.values():
                        await outcome.ended()
                    await journal.ended()
            assert {name: type(outcome.error) for name, outcome in outcomes.items()} == dict.fromkeys(outcomes, RPCClosed)
            assert journal.entries == ["started", "cancelled", "finally"]
            assert pool.closed
            counts_are_whole(pool, open=0)
            with pytest.raises(RPCClosed):
                await pool(address).work()
            await pool.aclose()
        assert server.statistics().in_flight == 0


@reference("D10", "m i t u l")
async def test_d10_without_a_reply_the_handler_outlives_its_caller(wire: Wire) -> None:
    for close in (False, True):
        journal = Journal()
        async with wire.server({"work": journal.handler(0.5, wire)}) as (server, address):
            async with wire.pool() as pool:
                with wire.now():
                    await pool(address).work.notify(**({"close": True} if close else {}))
            assert pool.open == 0
            await journal.started()
            with wire.lasts(0.5):
                await journal.ended()
            assert journal.entries == ["started", "ended", "finally"]
            await blocked()
            assert server.statistics().connections == 0


@reference("D10", "m i t u l")
async def test_d10_through_a_raw_comm(wire: Wire) -> None:
    journal = Journal()
    async with wire.server({"work": journal.handler(0.5, wire)}) as (_, address):
        comm = await wire.connect(address)
        await comm.write({"op": "work", "reply": False})
        comm.abort()
        await journal.started()
        await journal.ended()
        assert journal.entries == ["started", "ended", "finally"]


# -- the controls: what these tests find in a server or a pool that does it wrong ------------------------------------------------


async def test_the_invariant_finds_a_slot_that_is_lost() -> None:
    async with Server({"quick": lambda: 1}) as server, ConnectionPool(limit=1) as pool:
        address = await server.listen("inproc://")
        slot, _ = pool._policy.reserve(address, "quick")  # planted: taken and never given back
        assert slot is not None
        with pytest.raises(AssertionError):
            counts_are_whole(pool)
        invariant = Invariant(pool, Wire("i", None))
        invariant.after_task_step(trio.lowlevel.current_task())
        pool._policy.limit = 0  # planted: more are open than may be
        with pytest.raises(AssertionError):
            invariant.after_task_step(trio.lowlevel.current_task())
