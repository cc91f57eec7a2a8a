"""The pool: comms for calls, and what becomes of them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_dcore import (
    CommClosedError,
    ConnectError,
    ConnectionPool,
    LimitExceeded,
    Limits,
    RemoteError,
    RPCClosed,
    Server,
    ServerClosing,
)
from trio_dcore.abc import CommSettings, Transport
from trio_dcore.client._pool_policy import PoolPolicy
from trio_dcore.comm import InprocComm, get_transport, register_transport
from trio_dcore.protocol._envelope import GOODBYE, KEY, REPLY
from trio_dcore.testing import cancel_sweep, no_leaks


async def echo(x: Any = None) -> Any:
    return x


class Gates:
    """Handlers that wait to be let through, one after the other."""

    def __init__(self) -> None:
        self.waiting: list[trio.Event] = []

    async def __call__(self, x: Any = None) -> Any:
        event = trio.Event()
        self.waiting.append(event)
        await event.wait()
        return x

    async def until(self, count: int) -> None:
        while len(self.waiting) < count:
            await trio.lowlevel.checkpoint()

    def let_go(self) -> None:
        for event in self.waiting:
            event.set()
        self.waiting.clear()


def balanced(pool: ConnectionPool) -> None:
    """P14: all that is open is idle, and nobody waits."""
    policy = pool._policy
    assert not policy.busy
    assert not policy.connecting
    assert not policy.waiters
    assert pool.active == 0
    assert pool.open == len(policy.idle_since) <= pool.limit
    assert not pool._removed
    assert not pool._dismissed


class TestConstruction:
    @pytest.mark.parametrize("limit", [0, -1, "512", 1.5])
    def test_limit(self, limit: Any) -> None:
        with pytest.raises(ValueError, match="at least 1 comm"):
            ConnectionPool(limit)

    def test_needs_no_trio(self) -> None:
        pool = ConnectionPool(7)
        assert (pool.limit, pool.open, pool.active, pool.closed) == (7, 0, 0, False)
        assert repr(pool) == "<ConnectionPool 0 active, 0 open of 7>"
        pool.close_now()
        assert pool.closed
        assert repr(pool) == "<ConnectionPool closed>"


class TestAddresses:
    async def test_host_and_port(self, serving: Any) -> None:
        async with serving({"echo": echo}, "tcp://127.0.0.1:0") as (server, _remote), ConnectionPool() as pool:
            for remote in (
                pool(ip="127.0.0.1", port=server.port),
                pool(ip="127.0.0.1", port=str(server.port)),
                pool(("127.0.0.1", server.port)),
                pool(["127.0.0.1", str(server.port)]),
                pool(f"127.0.0.1:{server.port}"),
            ):
                assert repr(remote) == f"<PooledRPC {server.address}>"
                assert await remote.echo(x=1) == 1
            assert pool.open == 1
            pool.remove(("127.0.0.1", str(server.port)))
            assert pool.open == 0

    def test_neither_or_both(self) -> None:
        pool = ConnectionPool()
        wrong: list[dict[str, Any]] = [{}, {"ip": "::1"}, {"port": 1}, {"address": "::1", "port": 1}, {"address": "x", "ip": "y"}]
        for arguments in wrong:
            with pytest.raises(TypeError, match="give an address, or ip= and port="):
                pool(**arguments)
        pool.close_now()

    async def test_what_is_being_connected_is_told_apart(self) -> None:
        async with ConnectionPool() as pool, trio.open_nursery() as nursery:
            nursery.start_soon(pool("inproc://nobody").echo)
            await wait_all_tasks_blocked()
            assert (pool.open, pool.active, pool.connecting) == (1, 1, 1)
            nursery.cancel_scope.cancel()
        assert pool.connecting == 0


class TestReuse:
    async def test_one_comm_for_calls_in_a_row(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, _remote), ConnectionPool() as pool:
            for i in range(5):
                assert await pool(server.address).echo(x=i) == i
            assert pool.open == 1
            assert server.statistics().connections == 1
            balanced(pool)

    async def test_one_comm_for_each_call_in_flight(self, where: str, serving: Any) -> None:
        gates = Gates()
        async with serving({"gate": gates}, where) as (server, _remote), ConnectionPool() as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(pool(server.address).gate)
                await gates.until(3)
                assert pool.open == pool.active == 3
                gates.let_go()
            assert pool.open == 3
            balanced(pool)
            assert pool.collect() == 3
            assert pool.open == 0
            assert pool.collect() == 0

    async def test_a_remote_error_keeps_the_comm(self, where: str, serving: Any) -> None:
        def fail() -> None:
            raise ValueError("no luck")

        async with serving({"fail": fail}, where) as (server, _remote), ConnectionPool(1) as pool:
            for _ in range(3):
                with pytest.raises(ValueError, match="no luck"):
                    await pool(server.address).fail()
            assert server.statistics().connections == 1
            balanced(pool)

    async def test_close_true_does_not(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, _remote), ConnectionPool() as pool:
            assert await pool(server.address).echo(x=1, close=True) == 1
            assert pool.open == 0
            await pool(server.address).echo.notify(x=1, close=True)
            assert pool.open == 0
            balanced(pool)

    async def test_a_comm_that_has_ended_is_replaced_silently(
        self, where: str, serving: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serving({"echo": echo}, where) as (server, _remote), ConnectionPool() as pool:
            for _ in range(3):
                assert await pool(server.address).echo(x=1) == 1
                for connection in server._connections:
                    connection.comm.abort()
                await wait_all_tasks_blocked(0.01)
            assert pool.open == 1
            assert server.statistics().requests == {"echo": 3}
            pool.collect()
            balanced(pool)
        assert caplog.records == []

    async def test_a_comm_with_a_message_that_nobody_asked_for_is_replaced(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            request = await comm.read()
            await comm.write((REPLY, request[KEY]["id"], number))
            await comm.write((REPLY, request[KEY]["id"], "stray"))
            with pytest.raises(CommClosedError):
                await comm.read()

        async with scripted(where, script) as address, ConnectionPool() as pool:
            for number in (1, 2, 3):
                assert await pool(address).anything() == number
                await wait_all_tasks_blocked(0.01)
            assert pool.open == 1

    async def test_the_server_restarts_on_the_same_address(self, serving: Any) -> None:
        async with no_leaks(), ConnectionPool() as pool:
            address = "inproc://restarted"
            for _ in range(3):
                async with Server({"echo": echo}) as server:
                    await server.listen(address)
                    assert await pool(address).echo(x=1) == 1
            pool.collect()
            balanced(pool)


class TestLimit:
    async def test_is_kept(self, where: str, serving: Any) -> None:
        gates = Gates()
        results: list[int] = []

        async def call(x: int) -> None:
            results.append(await pool(server.address).gate(x=x))

        async with serving({"gate": gates}, where) as (server, _remote), ConnectionPool(2) as pool:
            async with trio.open_nursery() as nursery:
                for x in range(6):
                    nursery.start_soon(call, x)
                for _ in range(3):
                    await gates.until(2)
                    await wait_all_tasks_blocked(0.01)
                    assert pool.open == pool.active == 2
                    assert len(gates.waiting) == 2
                    gates.let_go()
            assert sorted(results) == list(range(6))
            assert server.statistics().connections == 2  # handed over, not made anew
            balanced(pool)

    async def test_an_idle_comm_of_another_address_makes_room(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, _remote):
            other = await server.listen(where)
            async with ConnectionPool(1) as pool:
                for address in (server.address, other, server.address):
                    assert await pool(address).echo(x=1) == 1
                    assert pool.open == 1
                balanced(pool)

    async def test_a_busy_comm_of_another_address_gives_its_slot(self, where: str, serving: Any) -> None:
        gates = Gates()
        async with serving({"gate": gates, "echo": echo}, where) as (server, _remote):
            other = await server.listen(where)
            async with ConnectionPool(1) as pool, trio.open_nursery() as nursery:
                nursery.start_soon(pool(server.address).gate)
                await gates.until(1)
                nursery.start_soon(pool(other).echo)
                await wait_all_tasks_blocked(0.01)
                gates.let_go()
                while not pool._policy.idle.get(other):
                    await trio.lowlevel.checkpoint()
                balanced(pool)

    async def test_the_slot_of_a_failed_call_goes_to_the_next(self, where: str, serving: Any) -> None:
        gates = Gates()
        async with serving({"gate": gates, "echo": echo}, where) as (server, _remote), ConnectionPool(1) as pool:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pool(server.address).gate)
                    await gates.until(1)
                    scope.cancel()
            assert pool.open == 0
            assert await pool(server.address).echo(x=1) == 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool(server.address).gate)
                await gates.until(2)
                nursery.start_soon(pool(server.address).echo)
                await wait_all_tasks_blocked(0.01)
                gates.let_go()
            balanced(pool)

    async def test_a_connect_that_fails_gives_its_slot_to_the_next(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, _remote), ConnectionPool(1, timeout=0.05) as pool:

            async def fails() -> None:
                with pytest.raises(ConnectError):
                    await pool("inproc://nobody").echo()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(fails)
                await wait_all_tasks_blocked()
                assert pool.open == 1
                assert await pool(server.address).echo(x=1) == 1
            balanced(pool)

    @pytest.mark.parametrize("how", ["abort", "remove"])
    async def test_a_comm_that_ends_between_being_handed_over_and_used(
        self, how: str, where: str, serving: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        release = PoolPolicy.release

        def and_then(policy: PoolPolicy, comm: Any, now: float, **options: Any) -> Any:
            waits = bool(policy.waiters)
            refused = release(policy, comm, now, **options)
            if waits and refused is None:
                ended.append(comm)
                if how == "abort":
                    comm.abort()
                else:
                    pool.remove(server.address)  # so the slot goes to the next call, and this one waits again
            return refused

        gates = Gates()
        ended: list[Any] = []
        results: list[Any] = []

        async def call(x: int) -> None:
            results.append(await pool(server.address).echo(x=x))

        async with serving({"gate": gates, "echo": echo}, where) as (server, _remote), ConnectionPool(1) as pool:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool(server.address).gate)
                await gates.until(1)
                for x in (1, 2, 3):
                    nursery.start_soon(call, x)
                    await wait_all_tasks_blocked(0.01)
                monkeypatch.setattr(PoolPolicy, "release", and_then)
                gates.let_go()
            assert ended
            assert results == [1, 2, 3] if how == "abort" else sorted(results) == [1, 2, 3]
            balanced(pool)


class TestWaiting:
    async def test_says_so_once_and_gives_up_at_last(
        self, serving: Any, autojump_clock: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        gates = Gates()
        async with serving({"gate": gates, "echo": echo}, patience=10_000) as (server, _remote), ConnectionPool(2) as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(pool(server.address).gate)
                await gates.until(2)
                start = trio.current_time()
                with pytest.raises(LimitExceeded) as caught:
                    await pool(server.address).echo()
                assert trio.current_time() - start == pytest.approx(30)
                error = caught.value
                assert (error.limit, error.value, error.seen) == ("limit", 2, 3)
                assert "within 30.0 s (Limits.pool_wait)" in str(error)
                assert "held by gate (2)" in str(error)
                assert "rpc(limit=...)" in str(error)
                (record,) = caplog.records
                assert record.levelno == logging.WARNING
                assert "'echo' has waited 5.0 s for one of the pool's 2 comms" in record.getMessage()
                assert "gate (2)" in record.getMessage()
                gates.let_go()
            assert await pool(server.address).echo(x=1) == 1
            balanced(pool)

    @pytest.mark.parametrize(("patience", "lines"), [(3.0, 0), (None, 1)])
    async def test_shorter_and_for_ever(
        self, patience: float | None, lines: int, serving: Any, autojump_clock: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        gates = Gates()
        pool = ConnectionPool(1, limits=Limits(pool_wait=patience))
        async with (
            serving({"gate": gates, "echo": echo}, patience=1e6) as (server, _remote),
            pool,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(pool(server.address).gate)
            await gates.until(1)
            start = trio.current_time()
            if patience is None:
                nursery.start_soon(self.later, 1000, gates)
                assert await pool(server.address).echo(x=1) == 1
                assert trio.current_time() - start == pytest.approx(1000)
            else:
                with pytest.raises(LimitExceeded, match="within 3.0 s"):
                    await pool(server.address).echo(x=1)
                assert trio.current_time() - start == pytest.approx(3)
                gates.let_go()
        assert len(caplog.records) == lines
        balanced(pool)

    async def later(self, seconds: float, gates: Gates) -> None:
        await trio.sleep(seconds)
        gates.let_go()

    async def test_cancelled(self, where: str, serving: Any) -> None:
        """D02: the next one gets the slot."""
        gates = Gates()
        async with serving({"gate": gates, "echo": echo}, where) as (server, _remote), ConnectionPool(1) as pool:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool(server.address).gate)
                await gates.until(1)
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as waiting:
                        waiting.start_soon(pool(server.address).echo)
                        await wait_all_tasks_blocked(0.01)
                        assert len(pool._policy.waiters) == 1
                        scope.cancel()
                assert not pool._policy.waiters
                gates.let_go()
            assert await pool(server.address).echo(x=1) == 1
            balanced(pool)

    @pytest.mark.parametrize("gets", ["comm", "slot"])
    async def test_cancelled_in_the_moment_in_which_it_gets_one(self, gets: str, serving: Any) -> None:
        """In each order in which the scheduler may run the two tasks."""
        async with serving({"echo": echo}) as (server, _remote):
            other = await server.listen("inproc://")
            for _ in range(20):
                gates = Gates()
                server.handlers["gate"] = gates
                async with ConnectionPool(1) as pool, trio.open_nursery() as nursery:
                    nursery.start_soon(pool(server.address).gate)
                    await gates.until(1)
                    with trio.CancelScope() as scope:
                        async with trio.open_nursery() as waiting:
                            waiting.start_soon(pool(server.address if gets == "comm" else other).echo)
                            await wait_all_tasks_blocked()
                            (waiter,) = pool._policy.waiters
                            gates.let_go()
                            while not waiter.woken.is_set():
                                await trio.lowlevel.checkpoint()
                            scope.cancel()
                    assert await pool(server.address).echo(x=1) == 1
                balanced(pool)

    async def test_a_call_cancelled_at_every_step(self, where: str, serving: Any) -> None:
        """D03: alone, and behind another that holds the only slot."""
        gates = Gates()
        async with serving({"gate": gates, "echo": echo}, where) as (server, _remote), ConnectionPool(1) as pool:

            async def alone() -> None:
                assert await pool(server.address).echo(x=1) == 1

            async def behind() -> None:
                async def holder() -> None:
                    await pool(server.address).gate()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(holder)
                    await gates.until(1)
                    nursery.start_soon(alone)
                    await wait_all_tasks_blocked()
                    gates.let_go()

            async def check() -> None:
                gates.let_go()
                assert await pool(server.address).echo(x=1) == 1
                pool.collect()
                balanced(pool)
                gates.waiting.clear()

            assert await cancel_sweep(alone, check=check) > 3
            assert await cancel_sweep(behind, check=check) > 10

    async def test_calls_cancelled_at_random(self, where: str, serving: Any) -> None:
        """D07: the invariant holds all the while, and all slots come back."""
        choice = random.Random(1)
        async with serving({"echo": echo}, where) as (server, _remote), ConnectionPool(4) as pool:

            async def call() -> None:
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(pool(server.address).echo)
                        for _ in range(choice.randrange(30)):
                            await trio.lowlevel.checkpoint()
                            assert pool.open <= 4
                        scope.cancel()

            async with trio.open_nursery() as nursery:
                for _ in range(100):
                    nursery.start_soon(call)
            assert await pool(server.address).echo(x=1) == 1
            balanced(pool)


class TestIdle:
    async def test_comms_that_have_been_idle_too_long_are_closed(self, serving: Any, autojump_clock: Any) -> None:
        pool = ConnectionPool(limits=Limits(idle=10))
        async with serving({"echo": echo}, patience=1e6) as (server, _remote), pool:
            other = await server.listen("inproc://")
            await pool(server.address).echo()
            await trio.sleep(9)
            await pool(server.address).echo()
            assert server.statistics().connections == 1
            await pool(other).echo()
            assert pool.open == 2
            await trio.sleep(5)
            await pool(other).echo()
            await trio.sleep(6)  # 11 for the first, 6 for the second
            await pool(other).echo()
            assert pool.open == 1
            await trio.sleep(10)
            first = next(iter(pool._policy.idle_since))
            await pool(other).echo()  # its own is too old as well, and not used
            assert first.closed()
            assert pool.open == 1
            balanced(pool)


class TestRemove:
    async def test_idle_comms_are_closed(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, _remote), ConnectionPool() as pool:
            other = await server.listen(where)
            for address in (server.address, other):
                await pool(address).echo()
            pool.remove(server.address)
            assert list(pool._policy.idle) == [other]
            pool.remove("inproc://never-heard-of")
            assert await pool(server.address).echo(x=1) == 1
            balanced(pool)

    async def test_calls_in_flight_end(self, where: str, serving: Any) -> None:
        gates = Gates()
        async with serving({"gate": gates, "echo": echo}, where) as (server, _remote), ConnectionPool() as pool:

            async def call() -> None:
                with pytest.raises(CommClosedError, match="calling 'gate' at"):
                    await pool(server.address).gate()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await gates.until(1)
                pool.remove(server.address, reason="of the test")
                assert pool.open == 0
            assert await pool(server.address).echo(x=1) == 1
            balanced(pool)

    async def test_calls_that_connect_end(self, serving: Any) -> None:
        async with ConnectionPool() as pool, trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(CommClosedError, match="'echo' was connecting to inproc://nobody: of the test"):
                    await pool("inproc://nobody").echo()

            nursery.start_soon(call)
            await wait_all_tasks_blocked()
            pool.remove("inproc://nobody", reason="of the test")
        balanced(pool)

    async def test_a_call_that_is_cancelled_as_it_gets_its_slot(self, serving: Any) -> None:
        """It never connects, so nobody asks why its address was removed."""
        async with serving({"echo": echo}, "inproc://") as (server, _remote), ConnectionPool(1) as pool:
            comm, _ = await pool.acquire(server.address, "echo")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.acquire, "inproc://nobody", "echo")
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
                pool.discard(comm)
                pool.remove("inproc://nobody")
            balanced(pool)


class TestClosing:
    async def test_a_closed_pool_says_so(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, _remote):
            pool = ConnectionPool()
            await pool(server.address).echo()
            await pool.aclose()
            await pool.close()
            assert pool.open == 0
            remote = pool(server.address)
            for call in (remote.echo, remote.echo.notify, remote.echo.stream().__aenter__):
                with pytest.raises(RPCClosed, match="'echo' was called on a closed pool"):
                    await call()

    async def test_whoever_waits_connects_or_is_in_flight_gets_rpc_closed(self, where: str, serving: Any) -> None:
        """D08."""
        gates = Gates()

        async def call(address: str, text: str) -> None:
            with pytest.raises(RPCClosed, match=text):
                await pool(address).gate()
            seen.append(text)

        async def stream() -> None:
            async with pool(server.address).gate.stream() as items:
                with pytest.raises(RPCClosed, match="was streaming"):
                    await items.receive()
                seen.append("streaming")

        seen: list[str] = []
        async with serving({"gate": gates}, where) as (server, _remote), ConnectionPool(3) as pool:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call, server.address, "in flight")
                nursery.start_soon(stream)
                await gates.until(2)
                nursery.start_soon(call, "inproc://nobody", "connected")
                await wait_all_tasks_blocked()
                nursery.start_soon(call, server.address, "waited")
                await wait_all_tasks_blocked()
                pool.close_now()
                pool.close_now()
            assert sorted(seen) == ["connected", "in flight", "streaming", "waited"]
            balanced(pool)
            assert pool.open == 0

    async def test_while_it_hands_over(self, serving: Any) -> None:
        """The waiting call has been given a comm, or a slot, and has not run yet."""
        async with serving({"echo": echo}) as (server, _remote):
            other = await server.listen("inproc://")
            for address in (server.address, other):
                gates = Gates()
                server.handlers["gate"] = gates
                pool = ConnectionPool(1)

                async def waits(pool: ConnectionPool = pool, address: str = address) -> None:
                    with pytest.raises(RPCClosed):
                        await pool(address).echo()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pool(server.address).gate)
                    await gates.until(1)
                    nursery.start_soon(waits)
                    await wait_all_tasks_blocked()
                    (waiter,) = pool._policy.waiters
                    gates.let_go()
                    while not waiter.woken.is_set():
                        await trio.lowlevel.checkpoint()
                    pool.close_now()
                balanced(pool)
                assert pool.open == 0

    @pytest.mark.parametrize("how", ["close", "remove"])
    async def test_in_the_moment_in_which_a_connection_is_made(self, how: str, serving: Any) -> None:
        class Late(Transport):
            """Connects, and is told that nobody wants it any more before its handshake ends."""

            scheme = "late"

            async def connect(self, location: str, settings: CommSettings) -> Any:
                comm: Any = await get_transport("inproc").connect(location, settings)
                handshake = comm.handshake

                async def and_then() -> None:
                    await handshake()
                    then()

                comms.append(comm)
                return _Wrapped(comm, and_then)

            async def listen(self, location: str, settings: CommSettings) -> Any:
                raise NotImplementedError

        comms: list[Any] = []
        register_transport(Late(), replace=True)
        async with serving({"echo": echo}) as (server, _remote):
            address = server.address.replace("inproc", "late")
            pool = ConnectionPool()

            def then() -> None:
                if how == "close":
                    pool.close_now()
                else:
                    pool.remove(address)

            with pytest.raises(RPCClosed if how == "close" else CommClosedError):
                await pool(address).echo()
            assert comms[0].closed()
            balanced(pool)
            assert pool.open == 0


def _Wrapped(comm: Any, handshake: Callable[[], Any]) -> Any:
    """The comm with another handshake; its class has slots."""
    comm.__class__ = type("Wrapped", (type(comm),), {"handshake": lambda self: handshake(), "__slots__": ()})
    return comm


class TestGoodbye:
    """Architecture 3.3: what says goodbye never started, so it is called anew, once and at once."""

    async def test_found_on_an_idle_comm(self, where: str, serving: Any) -> None:
        async with ConnectionPool() as pool:
            async with Server({"echo": echo}) as server:
                address = await server.listen(where)
                assert await pool(address).echo(x=1) == 1
            async with Server({"echo": echo}) as server:
                await server.listen(address)
                assert await pool(address).echo(x=2) == 2
            start = trio.current_time()
            with pytest.raises(ServerClosing, match="is shutting down and did not start 'echo'"):
                await pool(address).echo(x=3)
            assert trio.current_time() - start < 1  # one attempt, no back-off
            balanced(pool)

    async def test_in_answer_to_a_call(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            request = await comm.read()
            id = request[KEY]["id"]
            if number == 1:
                await comm.write((REPLY, id, "first"))
                id = (await comm.read())[KEY]["id"]
                await comm.write((GOODBYE, id - 1, None))
            else:
                await comm.write((REPLY, id, f"from connection {number}"))
                await comm.read()

        async with scripted(where, script) as address, ConnectionPool() as pool:
            assert await pool(address).anything() == "first"
            assert await pool(address).anything() == "from connection 2"

    async def test_again_and_again(self, where: str, scripted: Any) -> None:
        connections: list[int] = []

        async def script(comm: Any, number: int) -> None:
            connections.append(number)
            await comm.read()
            await comm.write((GOODBYE, 0, None))

        async with scripted(where, script) as address, ConnectionPool() as pool:
            with pytest.raises(ServerClosing, match="did not start 'anything'"):
                await pool(address).anything()
            assert connections == [1, 2]
            balanced(pool)

    @pytest.mark.parametrize("kind", ["notify", "stream"])
    async def test_found_while_a_request_is_written(self, kind: str, serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The comm breaks under the request, and what it has left to read is a goodbye: once, and then again."""

        def broken(self: Any, message: Any, *args: Any) -> Any:
            if type(message) is dict and message.get("op") == "echo" and left:
                left.pop()
                raise CommClosedError("gone")
            return start(self, message, *args)

        def send(remote: Any) -> Any:
            return remote.echo.notify(x=1) if kind == "notify" else remote.echo.stream(x=1).__aenter__()

        start = InprocComm.start
        monkeypatch.setattr(InprocComm, "start", broken)
        monkeypatch.setattr(InprocComm, "take_goodbye", lambda self, before: True)
        async with serving({"echo": echo}) as (server, _remote), ConnectionPool() as pool:
            left = [1]
            sent = await send(pool(server.address))
            if sent is not None:
                await sent.aclose()
            assert not left
            left = [1, 2]
            with pytest.raises(ServerClosing, match="did not start 'echo'"):
                await send(pool(server.address))
            assert pool.active == 0

    async def test_and_cancelled_meanwhile(self) -> None:
        async def script() -> None:
            comm: Any = await listener.accept()
            await comm.handshake()
            await comm.read()
            await comm.write((GOODBYE, 0, None))
            comm.abort()

        (listener,) = await get_transport("tcp").listen("127.0.0.1:0", CommSettings())
        async with ConnectionPool() as pool, trio.open_nursery() as nursery:
            nursery.start_soon(script)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as calls:
                    calls.start_soon(pool(listener.contact_address).anything)
                    await wait_all_tasks_blocked(0.05)
                    assert pool.active == 1  # in a handshake that nobody answers
                    scope.cancel()
            balanced(pool)
            assert pool.open == 0
            nursery.cancel_scope.cancel()
        listener.close()

    async def test_naming_the_request_itself_is_an_error(self, where: str, scripted: Any) -> None:
        from trio_dcore import RemoteProtocolError

        async def script(comm: Any, number: int) -> None:
            request = await comm.read()
            await comm.write((GOODBYE, request[KEY]["id"], None))

        async with scripted(where, script) as address, ConnectionPool() as pool:
            with pytest.raises(RemoteProtocolError):
                await pool(address).anything()
            balanced(pool)

    async def test_and_nobody_there_any_more(self, serving: Any, autojump_clock: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            await comm.read()
            listener.close()
            await comm.write((GOODBYE, 0, None))

        (listener,) = await get_transport("inproc").listen("leaving", CommSettings())

        async def accept() -> None:
            comm: Any = await listener.accept()
            await comm.handshake()
            await script(comm, 1)
            comm.abort()

        async with ConnectionPool() as pool, trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            start = trio.current_time()
            with pytest.raises(ServerClosing) as caught:
                await pool("inproc://leaving").anything()
            assert trio.current_time() == start  # one attempt, no back-off
            assert isinstance(caught.value.__cause__, ConnectError)
            balanced(pool)

    @pytest.mark.parametrize("silent", ["listener", "handshake"])
    async def test_and_then_silence(self, silent: str, autojump_clock: Any) -> None:
        (listener,) = await get_transport("inproc").listen("silent", CommSettings())

        async def accept() -> None:
            comm: Any = await listener.accept()
            await comm.handshake()
            await comm.read()
            await comm.write((GOODBYE, 0, None))
            second: Any = await listener.accept()
            if silent == "handshake":
                second.abort()
            await trio.sleep_forever()

        class Silent(Transport):
            scheme = "silent"

            async def connect(self, location: str, settings: CommSettings) -> Any:
                nonlocal attempts
                attempts += 1
                comm: Any = await get_transport("inproc").connect(location, settings)
                if attempts == 2 and silent == "listener":
                    return _Wrapped(comm, trio.sleep_forever)
                if attempts == 2:
                    return _Wrapped(comm, self.fail)
                return comm

            async def fail(self) -> None:
                raise CommClosedError("it hung up")

            async def listen(self, location: str, settings: CommSettings) -> Any:
                raise NotImplementedError

        attempts = 0
        register_transport(Silent(), replace=True)
        async with ConnectionPool(timeout=20, limits=Limits(handshake_timeout=4)) as pool, trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            start = trio.current_time()
            with pytest.raises(ServerClosing):
                await pool("silent://silent").anything()
            assert trio.current_time() - start == pytest.approx(4 if silent == "listener" else 0)
            balanced(pool)
            nursery.cancel_scope.cancel()
        listener.close()


class TestNothingSent:
    async def test_a_comm_that_dies_before_the_first_byte_is_replaced(
        self, serving: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As when the reset comes between the look at the socket and the write."""
        async with serving({"echo": echo}, "tcp://127.0.0.1:0") as (server, _remote), ConnectionPool() as pool:
            assert await pool(server.address).echo(x=1) == 1
            for call in (pool(server.address).echo, pool(server.address).echo.notify):
                (comm,) = pool._policy.idle_since
                monkeypatch.setattr(type(comm), "stale", lambda self: False)
                self.reset(server)
                await wait_all_tasks_blocked(0.01)
                self.break_socket(comm)
                assert await call(x=2) in (2, None)
            (comm,) = pool._policy.idle_since
            self.break_socket(comm)
            async with pool(server.address).echo.stream(x=3) as stream:
                assert [item async for item in stream] == [3]

    def reset(self, server: Server) -> None:
        for connection in server._connections:
            connection.comm.abort()

    def break_socket(self, comm: Any) -> None:
        """Make the next send fail as one on a reset connection does."""
        import socket

        comm._pump.socket.shutdown(socket.SHUT_WR)

    async def test_a_fresh_one_is_not(self, where: str, serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from trio_dcore.comm import FramedComm, InprocComm

        def broken(self: Any, message: Any, serializers: Any = None) -> Any:
            error = CommClosedError("broken from the start")
            error.nothing_sent = True
            raise error

        async with serving({"echo": echo}, where) as (server, _remote), ConnectionPool() as pool:
            for cls in (FramedComm, InprocComm):
                monkeypatch.setattr(cls, "start", broken)
            remote = pool(server.address)
            for call in (remote.echo, remote.echo.notify, remote.echo.stream().__aenter__):
                with pytest.raises(CommClosedError, match="broken from the start"):
                    await call()
            balanced(pool)

    async def test_once_something_is_sent_it_is_never_retried(self, where: str, scripted: Any) -> None:
        requests = 0

        async def script(comm: Any, number: int) -> None:
            nonlocal requests
            request = await comm.read()
            requests += 1
            if number == 1 and requests == 1:
                await comm.write((REPLY, request[KEY]["id"], "first"))
                await comm.read()
                requests += 1

        async with scripted(where, script) as address, ConnectionPool() as pool:
            assert await pool(address).anything() == "first"
            with pytest.raises(CommClosedError, match=f"calling 'anything' at {address}: it closed the comm without an answer"):
                await pool(address).anything()
            assert requests == 2
            balanced(pool)


async def test_the_pool_of_a_server_is_closed_with_it(where: str) -> None:
    async with Server({"echo": echo}) as server:
        address = await server.listen(where)
        assert await server.rpc(address).echo(x=1) == 1
        pool = server.rpc
        assert pool.open == 1
        assert server.rpc is pool
    assert pool.closed
    assert pool.open == 0
    with pytest.raises(RPCClosed):
        await pool(address).echo()


async def test_a_remote_comm_closed_error_is_data(where: str, serving: Any) -> None:
    def fail() -> None:
        raise CommClosedError("over there")

    async with serving({"fail": fail}, where) as (server, _remote), ConnectionPool(1) as pool:
        for _ in range(2):
            with pytest.raises(RemoteError, match="over there"):
                await pool(server.address).fail()
        assert server.statistics().requests == {"fail": 2}
        assert server.statistics().connections == 1
        balanced(pool)
