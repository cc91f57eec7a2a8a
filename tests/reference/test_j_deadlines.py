"""Group J: deadlines, which travel with calls."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.reference.kit import Journal, Outcome, Wire, covers, reference
from tests.reference.test_d_calls_and_pool import Cancellable, Held, counts_are_whole
from trio_dcore import HandlerCancelled, current_request, rpc
from trio_dcore.protocol._envelope import PONG
from trio_dcore.protocol._remote_errors import error_value
from trio_dcore.testing import ManualPeer, MemoryStreamListener

blocked = trio.testing.wait_all_tasks_blocked


@reference("J01", "m i t u l")
async def test_j01_a_scope_round_a_call(wire: Wire) -> None:
    journal = Journal()
    async with wire.server({"work": journal.handler(1, wire)}) as (server, address), wire.pool() as pool:
        with wire.lasts(0.5):
            with trio.move_on_after(wire.seconds(0.5)) as scope:
                await pool(address).work()
            assert scope.cancelled_caught
            await journal.ended()
        assert journal.entries == ["started", "cancelled", "finally"]
        counts_are_whole(pool, open=0)
        assert await pool(address).echo(data=1) == 1
        await blocked()
        assert server.statistics().in_flight == 0


@reference("J01", "m i t u l")
async def test_j01_a_deadline_that_has_passed_starts_nothing(wire: Wire) -> None:
    """A request whose deadline is over when it arrives; what is on its way longer than its caller waits."""
    journal = Journal()
    async with wire.server({"work": journal.handler(1, wire)}) as (server, address), wire.pool() as pool:
        await pool(address).echo()
        comm = pool.reuse(address, "work")
        assert comm is not None
        for seconds in (-1.0, 0.0, -math.inf):
            comm.last_id += 1
            header = {"id": comm.last_id, "deadline": seconds}
            await comm.put({"op": "work", "reply": True, "trio-dcore": header})
            kind, identity, error = await comm.read()
            assert (kind, identity) == (1, comm.last_id)
            assert "deadline" in str(error)
        pool.release(comm)
        assert await pool(address).echo(data=2) == 2
        assert journal.entries == []
        assert server.statistics().connections == 1


@reference("J01", "t u l")
async def test_j01_a_server_that_talks_without_a_pause(wire: Wire) -> None:
    """What comes is no answer, or items without end, and always there; the caller is free in time all the same."""

    async def items(remote: rpc) -> None:
        async with remote.anything.stream() as stream:
            async for _ in stream:
                pass

    async def send(remote: rpc) -> None:
        async with remote.anything.stream() as stream:
            await stream.send(bytes(30_000_000))

    async def call(remote: rpc) -> None:
        await remote.anything()

    for use, message in ((call, (PONG, 1, None)), (items, (PONG, 1, None)), (send, (PONG, 1, None)), (items, "item")):

        async def talk(peer: ManualPeer) -> None:
            await peer.handshake(extension=message != "item")  # noqa: B023
            await peer.receive()
            data = peer.encode(message) * 500  # noqa: B023
            with trio.move_on_after(5):
                while True:
                    try:
                        await peer.send_bytes(data)
                    except trio.BrokenResourceError:
                        break
                    await trio.lowlevel.checkpoint()

        async with wire.scripted(talk) as address, wire.client(address) as remote:
            with wire.lasts(0.5):
                with trio.move_on_after(wire.seconds(0.5)) as scope:
                    await use(remote)
                assert scope.cancelled_caught
            assert remote.pool.open == 0


@reference("J02", "m t")
async def test_j02_the_deadline_holds_where_the_cancellation_is_lost(wire: Wire) -> None:
    journal = Journal()
    async with (
        wire.server({"work": journal.handler(60, wire)}) as (server, address),
        wire.relay(address) as relay,
        wire.pool() as pool,
    ):
        async with trio.open_nursery() as nursery:
            with wire.lasts(1):
                caller = Cancellable(nursery, pool(relay.address).work)
                caller.scope.deadline = trio.current_time() + wire.seconds(1)
                await journal.started()
                relay.stall()
                await caller.ended.wait()
                await journal.ended()
        assert caller.cancelled
        assert journal.entries == ["started", "cancelled", "finally"]
        await blocked()
        assert server.statistics().in_flight == 0
        assert server.statistics().connections == 1  # nothing of the client's end has got through
        counts_are_whole(pool, open=0)


@reference("J02", "m t")
async def test_j02_the_control_without_a_deadline_nobody_is_told(wire: Wire) -> None:
    """The relay really keeps back that the call was cancelled."""
    journal = Journal()
    async with (
        wire.server({"work": journal.handler(60, wire)}) as (server, address),
        wire.relay(address) as relay,
        wire.pool() as pool,
    ):
        async with trio.open_nursery() as nursery:
            caller = Cancellable(nursery, pool(relay.address).work)
            await journal.started()
            relay.stall()
            caller.scope.cancel()
            await caller.ended.wait()
        await trio.sleep(wire.seconds(3))
        assert journal.entries == ["started"]
        assert server.statistics().in_flight == 1
        server.stop(0)


@reference("J03", "m i t")
async def test_j03_nested_calls_share_what_is_left(wire: Wire) -> None:
    journals = {name: Journal() for name in "ABC"}
    remaining: dict[str, float] = {}
    told: dict[str, float] = {}
    ended: dict[str, float] = {}

    def handler(name: str, call: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
        async def work() -> Any:
            remaining[name] = trio.current_effective_deadline() - trio.current_time()
            told[name] = current_request().deadline
            journals[name]("started")
            try:
                await trio.sleep(wire.seconds(0.2))
                return await call()
            except trio.Cancelled:
                journals[name]("cancelled")
                raise
            finally:
                ended[name] = trio.current_time()
                journals[name]("finally")

        return work

    async with (
        wire.server({"work": handler("C", trio.sleep_forever)}) as (_, c),
        wire.server() as (server_b, b),
        wire.server() as (server_a, a),
        wire.client(a) as remote,
    ):
        server_b.handlers["work"] = handler("B", lambda: server_b.rpc(c).work())
        server_a.handlers["work"] = handler("A", lambda: server_a.rpc(b).work())
        start = trio.current_time()
        with wire.lasts(1):
            with trio.move_on_after(wire.seconds(1)) as scope:
                await remote.work()
            assert scope.cancelled_caught
            await blocked()
        for journal in journals.values():
            assert journal.entries == ["started", "cancelled", "finally"]
        assert remaining["C"] <= remaining["B"] <= remaining["A"] <= wire.seconds(1)
        if wire.virtual:
            assert remaining == pytest.approx({"A": 1.0, "B": 0.8, "C": 0.6})
            assert told == pytest.approx(dict.fromkeys("ABC", start + 1))
            assert ended == pytest.approx(dict.fromkeys("ABC", start + 1))
        counts_are_whole(server_a.rpc, open=0)
        counts_are_whole(server_b.rpc, open=0)


@reference("J03", "m i t")
async def test_j03_a_handler_may_only_shorten(wire: Wire) -> None:
    """A shorter scope in the handler's own call counts there; the caller gets the handler's answer."""
    left: list[float] = []

    async def innermost() -> None:
        left.append(trio.current_effective_deadline() - trio.current_time())
        await trio.sleep_forever()

    async def middle(scale: float) -> str:
        with trio.move_on_after(wire.seconds(scale)) as scope:
            await outer.rpc(inner_address).innermost()
        return f"moved on: {scope.cancelled_caught}"

    async with (
        wire.server({"innermost": innermost}) as (_, inner_address),
        wire.server({"middle": middle}) as (outer, address),
        wire.client(address) as remote,
    ):
        with trio.fail_after(wire.seconds(100) + 5), wire.lasts(0.5):
            assert await remote.middle(scale=0.5) == "moved on: True"
        with wire.lasts(0.5):
            with trio.move_on_after(wire.seconds(0.5)) as scope:
                await remote.middle(scale=100)
            assert scope.cancelled_caught
    assert max(left) <= wire.seconds(0.5)


@covers("J04", "t")
def test_j04_a_stock_server_is_told_no_deadline(tmp_path: Path) -> None:
    """With a deadline a call to a stock server is a plain call: one key more, and its handler would not take it."""
    from tests.interop.conftest import Stock

    seen: list[list[str]] = []

    def add(x: int, y: int) -> int:
        return x + y

    def spy(**kwargs: Any) -> None:
        seen.append(sorted(kwargs))

    async def main() -> None:
        async with side.serve({"add": add, "spy": spy}) as server, rpc(server.address) as remote:
            with trio.fail_after(60):
                assert await remote.add(x=1, y=2) == 3
                await remote.spy(x=1)
                await remote.spy.notify(y=1)
                async with remote.spy.stream(z=1) as stream:
                    assert [item async for item in stream] == []
                with pytest.raises(TypeError, match="deadline"):
                    await remote.add(x=1, y=2, deadline=60)  # the control
        assert sorted(seen) == [["x"], ["y"], ["z"]]

    with Stock(tmp_path) as side:
        trio.run(main)


@reference("J05", "m i t u l")
async def test_j05_a_scope_that_is_cancelled_already(wire: Wire) -> None:
    journal = Journal()
    async with wire.server({"work": journal.handler(0, wire)}) as (server, address), wire.pool() as pool:
        for warm in (False, True):
            if warm:
                await pool(address).echo()
            requests = sum(server.statistics().requests.values())
            for operation in (pool(address).work, pool(address).work.notify, pool(address).work.stream().__aenter__):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await operation()
                assert scope.cancelled_caught
                counts_are_whole(pool, open=int(warm))
            await blocked()
            assert sum(server.statistics().requests.values()) == requests
        assert journal.entries == []
        await pool(address).work()
        counts_are_whole(pool, open=1)


@reference("J05", "m i t u l")
async def test_j05_reply_and_cancellation_in_the_same_tick(wire: Wire) -> None:
    """The handler ends so many steps before, or after, its call is cancelled; either the one or the other comes of it."""
    held = Held("the reply")
    cancelled = answered = 0
    async with wire.server({"hold": held}) as (server, address), wire.pool() as pool:
        for ahead in range(-10, 25):
            held.started, held.release = trio.Event(), trio.Event()
            async with trio.open_nursery() as nursery:
                call = Cancellable(nursery, pool(address).hold)
                await held.started.wait()
                await blocked()
                (comm,) = pool._policy.busy
                first, second = (held.release.set, call.scope.cancel) if ahead >= 0 else (call.scope.cancel, held.release.set)
                first()
                for _ in range(abs(ahead)):
                    await trio.lowlevel.checkpoint()
                second()
                await call.ended.wait()
            if call.cancelled:
                cancelled += 1
                assert math.isnan(call.outcome.at)  # it did not return as well
                assert comm.closed()
                counts_are_whole(pool, open=0)
            else:
                answered += 1
                assert call.outcome.value == "the reply"
                assert not comm.closed()
                counts_are_whole(pool, open=1)
            assert await pool(address).echo(data=ahead) == ahead  # and not some answer from before
            counts_are_whole(pool, open=1)
        await blocked()
        assert server.statistics().in_flight == 0
        assert server.statistics().connections == 1
    assert cancelled >= 10
    assert answered >= 5


@reference("J05", "m i")
async def test_j05_reply_and_deadline_at_the_same_instant(wire: Wire) -> None:
    """Virtual time makes the handler's end, its deadline and its caller's one instant."""

    async def work() -> None:
        await trio.sleep(1)

    async with wire.server({"work": work}) as (_, address), wire.pool() as pool:
        for _ in range(20):
            outcomes = []
            with wire.lasts(1):
                with trio.move_on_after(1) as scope:
                    try:
                        await pool(address).work()
                        outcomes.append("returned")
                    except HandlerCancelled as error:
                        outcomes.append(f"handler cancelled: {error.reason}")
                if scope.cancelled_caught:
                    outcomes.append("cancelled")
            assert len(outcomes) == 1
            # Where the server notices first that the deadline is over, our scope has it nevertheless, and the comm lives.
            assert outcomes[0] in ("returned", "cancelled")
            counts_are_whole(pool)
            assert await pool(address).echo(data=1) == 1
            await blocked()


@reference("J05", "m")
async def test_j05_the_server_notices_the_deadline_first(wire: Wire) -> None:
    """Its answer is there when our deadline has passed as well and has not been noticed: still it is our scope's."""
    assert wire.network is not None
    over = HandlerCancelled("the handler was cancelled: deadline")
    over.reason = "deadline"

    async def serve(listener: MemoryStreamListener) -> None:
        async with ManualPeer(await listener.accept()) as peer:
            await peer.handshake(extension=True)
            for seconds_late in (0.0, -0.5):
                request = await peer.receive()
                clock = trio.lowlevel.current_clock()
                assert isinstance(clock, trio.testing.MockClock)
                value = error_value(over, trusted=True, limit=1000)
                await peer.send([1, request["trio-dcore"]["id"], value])
                clock.jump(1 + seconds_late)  # between that step and the client's next

    async with (
        await wire.network.listen_streams() as listener,
        wire.pool(limit=1) as pool,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(serve, listener)
        with trio.move_on_after(1) as scope:
            await pool(listener.address).work()
        assert scope.cancelled_caught
        counts_are_whole(pool, open=1)
        # While there is time left it is news: some deadline of the handler's own.
        with trio.move_on_after(1) as scope, pytest.raises(HandlerCancelled):
            await pool(listener.address).work()
        assert not scope.cancelled_caught


@reference("J05", "m i t u l")
async def test_j05_the_handlers_own_deadline_is_told_from_a_bug(wire: Wire) -> None:
    """A deadline that only the handler's side has noticed yet: HandlerCancelled says so, and the comm goes on."""
    journal = Journal()
    async with wire.server({"work": journal.handler(60, wire)}) as (_, address), wire.pool() as pool:
        await pool(address).echo()
        comm = pool.reuse(address, "work")
        assert comm is not None
        comm.last_id += 1
        with wire.lasts(1):
            header = {"id": comm.last_id, "deadline": wire.seconds(1)}
            await comm.put({"op": "work", "reply": True, "trio-dcore": header})
            outcome = Outcome()
            await outcome.of(comm.read)
        kind, _, error = outcome.value
        assert kind == 1
        assert "deadline" in str(error)
        assert journal.entries == ["started", "cancelled", "finally"]
        pool.release(comm)
        assert await pool(address).echo(data=3) == 3
        counts_are_whole(pool, open=1)
