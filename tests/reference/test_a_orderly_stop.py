"""Group A: stopping in order."""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from tests.reference.kit import Journal, Outcome, Wire, quickest, reference
from trio_dcore import (
    HandlerCancelled,
    Server,
    ServerClosing,
    Status,
    current_request,
)
from trio_dcore.protocol import exception_from_reply, exception_from_value
from trio_dcore.protocol._envelope import ERROR, GOODBYE, KEY, REPLY
from trio_dcore.testing import ManualPeer


def add(x: int, y: int) -> int:
    return x + y


def no() -> bool:
    return False


@reference("A01", "m t u l", real=True)
async def test_a01_idle_server_closes_at_once(wire: Wire) -> None:
    async def stop_one() -> float:
        async with wire.serving({"add": add}) as (server, address, returned):
            assert not await wire.refuses(address)
            await trio.testing.wait_all_tasks_blocked()  # the connection of that has been accepted, and has ended
            assert server.statistics().connections == 0
            start = trio.current_time()
            await server.aclose()
            await returned.wait()
            took = trio.current_time() - start
            assert await wire.refuses(address)
            assert server.status is Status.closed
            return took

    assert await quickest(stop_one, 0.05) < 0.05


@reference("A02", "m i t u l")
async def test_a02_reply_delivered_within_grace(wire: Wire) -> None:
    journal = Journal()
    async with (
        wire.serving({"work": journal.handler(0.3, wire)}) as (server, address, returned),
        wire.calling(address, journal) as outcome,
    ):
        with wire.lasts(0.3):
            server.stop(grace=5)  # real seconds: on a real clock, too, waiting for all of it would be too long
            await returned.wait()
    assert outcome.value == "done"
    assert journal.entries == ["started", "ended", "finally"]


@reference("A02", "m i t u l")
async def test_a02_handlers_can_call_out_until_they_have_ended(wire: Wire) -> None:
    journal = Journal()
    outcome = Outcome()

    async def work() -> str:
        server = current_request().server
        assert isinstance(server, Server)
        await journal.handler(0.3, wire)()
        result: str = await server.rpc(other_address).help()
        return result

    async with wire.server({"help": lambda: "helped"}) as (other, other_address):
        async with wire.serving({"work": work}) as (server, address, returned), trio.open_nursery() as nursery:
            remote = wire.client(address)
            nursery.start_soon(outcome.of, remote.work)
            await journal.started()
            with wire.lasts(0.3):
                server.stop(grace=5)
                await returned.wait()
            # No connection of the server's own is left either, although nobody has closed it.
            assert (server.rpc.closed, server.rpc.open) == (True, 0)
            await outcome.ended()
            remote.close_comms()
        await trio.testing.wait_all_tasks_blocked()
        assert other.statistics().connections == 0
    assert outcome.value == "helped"


@reference("A03", "m i t u l")
async def test_a03_cancelled_when_grace_is_over(wire: Wire) -> None:
    journal = Journal()
    async with wire.server({"work": journal.handler(60, wire)}) as (server, address), wire.calling(address, journal) as outcome:
        with wire.takes(0.1):
            server.stop(grace=0.1)
            await server.finished()
    # Not a bare end of the connection.
    assert isinstance(outcome.error, HandlerCancelled)
    assert outcome.error.reason == "grace over"
    assert journal.entries == ["started", "cancelled", "finally"]


@reference("A04", "m i t u l", real=True)
async def test_a04_idle_connections_are_closed_at_once(wire: Wire) -> None:
    async def stop_one() -> float:
        present = 0
        complete = trio.Event()

        async def meet() -> None:
            nonlocal present
            present += 1
            if present == 10:
                complete.set()
            await complete.wait()

        async with wire.server({"meet": meet}) as (server, address), wire.pool(limit=10) as pool:
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(pool(address).meet)
            await trio.testing.wait_all_tasks_blocked()
            assert (pool.open, pool.active) == (10, 0)
            assert server.statistics().connections == 10
            start = trio.current_time()
            server.stop(grace=30)
            await server.finished()
            took = trio.current_time() - start
            assert server.statistics().connections == 0
            # None of them is of any use any more, and the pool knows.
            with pytest.raises(ServerClosing):
                await pool(address).meet()
            assert (pool.open, pool.active) == (0, 0)
            return took

    assert await quickest(stop_one, 0.05) < 0.05


@reference("A05", "m i t u l")
async def test_a05_no_request_is_started_while_draining(wire: Wire) -> None:
    journal = Journal()
    calls: list[object] = []
    outcome = Outcome()
    handlers = {"work": journal.handler(1, wire), "late": lambda object: calls.append(object), "add": add}
    async with wire.server(handlers) as (server, address), trio.open_nursery() as nursery:
        busy, waiting, patient = (wire.client(address) for _ in range(3))
        for remote in (waiting, patient):
            assert await remote.add(x=1, y=2) == 3  # leaves an idle connection
        nursery.start_soon(outcome.of, busy.work)
        await journal.started()
        server.stop(grace=30)
        # In the very moment, before the server has done anything about it, and after it has said goodbye.
        for _ in range(2):
            with wire.now(), pytest.raises(ServerClosing):
                await waiting.late(object="never")
        # The same address may be another server's by now: then the call goes there, although the connection has ended.
        async with wire.make_server({"late": lambda: "the other one"}) as other:
            await other.listen(address)
            assert await patient.late() == "the other one"
        await outcome.ended()
        await server.finished()
        for remote in (busy, waiting, patient):
            remote.close_comms()
    assert outcome.value == "done"
    assert calls == []


async def insist(peer: ManualPeer) -> None:
    for _ in range(10):  # the first may still be taken by the system
        await peer.send({"op": "late", "reply": True})
        await trio.testing.wait_all_tasks_blocked()


@reference("A05", "m t u l")
async def test_a05_stock_peer_sees_the_end_of_its_idle_connection(wire: Wire) -> None:
    calls: list[object] = []
    journal = Journal()
    handlers = {"work": journal.handler(1, wire), "late": lambda: calls.append(1)}
    async with wire.server(handlers) as (server, address), await wire.manual(address) as busy, await wire.manual(address) as idle:
        await busy.handshake()
        await busy.send({"op": "work", "reply": True})
        await journal.started()
        await idle.handshake()
        await idle.send({"op": "echo", "data": 1, "reply": True})
        assert await idle.receive() == 1
        server.stop(grace=30)
        with wire.now():
            assert await idle.expect_end()  # nothing that it would have to understand, and no reset
        with pytest.raises(trio.BrokenResourceError):
            await insist(idle)
        assert await busy.receive() == "done"
        assert await busy.expect_end()
        await server.finished()
    assert calls == []


@reference("A05", "i")
async def test_a05_raw_comm_sees_its_end(wire: Wire) -> None:
    async with wire.server() as (server, address), await wire.connect(address) as comm:
        await comm.write({"op": "echo", "data": 1, "reply": True})
        assert await comm.read() == 1
        server.stop(grace=30)
        with pytest.raises(trio.EndOfChannel):
            await comm.receive()


def pipelined_handlers(journal: Journal, wire: Wire) -> dict[str, Any]:
    return {"work": journal.handler(1, wire), "late": lambda: journal("late"), "later": lambda: journal("later")}


def refuses(error: Exception, op: str, kind: type[Exception] = ServerClosing) -> bool:
    """Whether it is the answer to the request for that op, and to no other."""
    return isinstance(error, kind) and f"{op!r} was not started" in str(error)


@reference("A06", "m t u l")
async def test_a06_pipelined_stock_requests_are_answered_in_order(wire: Wire) -> None:
    journal = Journal()
    async with wire.server(pipelined_handlers(journal, wire)) as (server, address), await wire.manual(address) as peer:
        await peer.handshake()
        # In one piece: all three are there when the first is begun.
        await peer.send_bytes(b"".join(peer.encode({"op": op, "reply": True}) for op in ("work", "late", "later")))
        await journal.started()
        with wire.lasts(1):
            server.stop(grace=30)
            assert await peer.receive() == "done"
        for op in ("late", "later"):
            # What a stock client can be told: a builtin that says the same.
            refusal = exception_from_reply(await peer.receive(), allow_pickle=lambda: True)
            assert refuses(refusal, op, ConnectionAbortedError)
        assert await peer.expect_end()
        await server.finished()
    assert journal.entries == ["started", "ended", "finally"]


@reference("A06", "m t u l")
async def test_a06_requests_that_come_while_the_first_runs(wire: Wire) -> None:
    journal = Journal()
    async with wire.server(pipelined_handlers(journal, wire)) as (server, address), await wire.manual(address) as peer:
        await peer.handshake()
        await peer.send({"op": "work", "reply": True})
        await journal.started()
        await peer.send({"op": "late", "reply": True})
        server.stop(grace=30)
        await peer.send({"op": "later", "reply": True})
        assert await peer.receive() == "done"
        for op in ("late", "later"):
            refusal = exception_from_reply(await peer.receive(), allow_pickle=lambda: True)
            assert refuses(refusal, op, ConnectionAbortedError)
        assert await peer.expect_end()
        await server.finished()
    assert journal.entries == ["started", "ended", "finally"]


@reference("A06", "m t u l")
async def test_a06_pipelined_opted_in_requests_are_answered_in_order(wire: Wire) -> None:
    journal = Journal()
    async with wire.server(pipelined_handlers(journal, wire)) as (server, address), await wire.manual(address) as peer:
        await peer.handshake(extension=True)
        for identity, op in enumerate(("work", "late", "later"), 1):
            await peer.send({"op": op, "reply": True, KEY: {"id": identity}})
        await journal.started()
        server.stop(grace=30)
        assert await peer.receive() == (REPLY, 1, "done")
        for identity, op in ((2, "late"), (3, "later")):
            kind, of, value = await peer.receive()
            assert (kind, of) == (ERROR, identity)
            assert refuses(exception_from_value(value, allow_pickle=no), op)
        assert await peer.receive() == (GOODBYE, 3, None)
        assert await peer.expect_end()
        await server.finished()
    assert journal.entries == ["started", "ended", "finally"]


@reference("A06", "m i t u l")
async def test_a06_pipelined_on_a_raw_comm(wire: Wire) -> None:
    journal = Journal()
    async with wire.server(pipelined_handlers(journal, wire)) as (server, address), await wire.connect(address) as comm:
        for op in ("work", "late", "later"):
            await comm.write({"op": op, "reply": True})
        await journal.started()
        server.stop(grace=30)
        assert await comm.read() == "done"
        for op in ("late", "later"):
            assert refuses(exception_from_reply(await comm.read(), allow_pickle=no), op)
        with pytest.raises(trio.EndOfChannel):
            await comm.receive()
        await server.finished()
    assert journal.entries == ["started", "ended", "finally"]


@reference("A07", "m i t u l")
async def test_a07_closing_again_and_at_once(wire: Wire) -> None:
    journal = Journal()
    async with wire.server({"work": journal.handler(1, wire)}) as (server, address), wire.calling(address, journal) as outcome:

        async def close() -> None:
            await server.aclose(grace=30)
            # All of them return after the full close.
            assert server.status is Status.closed
            assert journal.entries == ["started", "ended", "finally"]

        with wire.lasts(1):
            async with trio.open_nursery() as closers:
                closers.start_soon(close)
                closers.start_soon(close)
        with wire.now():
            await close()
            await close()
            server.stop()
            await server.finished()
    assert outcome.value == "done"


@reference("A08", "m i t u l")
async def test_a08_a_later_stop_only_shortens(wire: Wire) -> None:
    journal = Journal()
    async with wire.server({"work": journal.handler(60, wire)}) as (server, address), wire.calling(address, journal) as outcome:
        with wire.takes(0.05):
            server.stop(5)
            server.stop(0.05)
            server.stop(9)
            server.stop()
            server.stop(math.inf)
            await server.finished()
        server.stop(1)
    assert isinstance(outcome.error, HandlerCancelled)
    assert journal.entries == ["started", "cancelled", "finally"]


@reference("A09", "m i t u l")
async def test_a09_a_handler_stops_its_own_server(wire: Wire) -> None:
    async def stop() -> str:
        current_request().server.stop()
        return "stopped by its handler"

    async def aclose() -> str:
        await current_request().server.aclose()  # only requests: it would wait for itself
        return "stopped by its handler"

    async def close() -> str:
        await current_request().server.close()  # Dask's name
        return "stopped by its handler"

    async def stop_twice() -> str:
        server = current_request().server
        server.stop()
        await server.aclose()
        server.stop(30)
        return "stopped by its handler"

    for terminate in (stop, aclose, close, stop_twice):
        async with wire.serving({"terminate": terminate}) as (_, address, returned), wire.client(address) as remote:
            with wire.now():
                assert await remote.terminate() == "stopped by its handler"
                await returned.wait()
            assert await wire.refuses(address)


@reference("A10", "t u", real=True)
async def test_a10_second_listener_is_taken(wire: Wire) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with wire.server() as (_, others):
            for second in (f"tcp://127.0.0.1:{taken.getsockname()[1]}", others):
                server = wire.make_server()
                with pytest.raises(OSError, match="listening on ") as caught:
                    await server.serve(wire.where, second)
                assert caught.value.errno == errno.EADDRINUSE
                (first,) = server.addresses
                assert await wire.refuses(first)
                assert server.status is Status.failed
                await server.finished()


@reference("A10", "t u", real=True)
async def test_a10_a_running_server_lives_on_without_the_second_listener(wire: Wire) -> None:
    async with wire.server({"add": add}) as (server, first), wire.client(first) as remote:
        with pytest.raises(OSError, match="listening on ") as caught:
            await server.listen(first)
        assert caught.value.errno == errno.EADDRINUSE
        assert server.addresses == (first,)
        assert await remote.add(x=1, y=2) == 3
        async with wire.client(first) as newcomer:
            assert await newcomer.add(x=1, y=2) == 3


async def ticks() -> AsyncIterator[int]:
    number = 0
    stop = current_request().shutdown_requested
    while not stop.is_set():
        yield number
        number += 1
        await trio.lowlevel.checkpoint()


@reference("A12", "m i t u l", real=True)
async def test_a12_draining_under_load_is_quiet(wire: Wire) -> None:
    started = finished = answered = 0
    streamed: list[int] = []
    callers = 20
    enough = trio.Event()

    async def work(pause: float) -> float:
        nonlocal started, finished
        started += 1
        await trio.sleep(pause)
        finished += 1
        return pause

    async def call_again_and_again(remote: Any, pause: float) -> None:
        nonlocal answered
        while True:
            assert await remote.work(pause=pause) == pause
            answered += 1
            if answered >= 50 * callers:
                enough.set()

    async def caller(remote: Any, number: int) -> None:
        # Nothing else: not a call whose fate is unknown.
        with pytest.raises(ServerClosing):
            await call_again_and_again(remote, pause=(number % 4) * 0.01)

    async def consumer(remote: Any) -> None:
        async with remote.ticks.stream() as stream:
            async for number in stream:
                streamed.append(number)

    async with (
        wire.serving({"work": work, "ticks": ticks}) as (server, address, returned),
        wire.client(address) as shared,
        trio.open_nursery() as clients,
    ):
        # Half of them over one pool, half with one of their own.
        own = [wire.client(address) for _ in range(callers // 2)]
        for number in range(callers):
            clients.start_soon(caller, own[number // 2] if number % 2 else shared, number)
        clients.start_soon(consumer, shared)
        await enough.wait()
        server.stop(grace=30)
        await returned.wait()
    # Every request that was started was answered, and every answer has come.
    assert started == finished == answered
    assert streamed == list(range(len(streamed)))
    assert server.statistics().errors == 0
    for remote in own:
        remote.close_comms()


@reference("A12", "m t u l", real=True)
async def test_a12_draining_with_stock_peers_under_load(wire: Wire) -> None:
    started = answered = 0
    enough = trio.Event()

    async def work() -> str:
        nonlocal started
        started += 1
        await trio.sleep(0.001)
        return "done"

    async def caller(address: str) -> None:
        nonlocal answered
        async with await wire.manual(address) as peer:
            await peer.handshake()
            while True:
                try:
                    await peer.send({"op": "work", "reply": True})
                    answer = await peer.receive()
                except trio.BrokenResourceError:
                    return  # the end of its connection
                if answer != "done":
                    assert isinstance(exception_from_reply(answer, allow_pickle=lambda: True), ConnectionAbortedError)
                    assert await peer.expect_end()
                    return
                answered += 1
                if answered == 200:
                    enough.set()

    async with wire.serving({"work": work}) as (server, address, returned), trio.open_nursery() as clients:
        for _ in range(10):
            clients.start_soon(caller, address)
        await enough.wait()
        server.stop(grace=30)
        await returned.wait()
    assert started == answered
    assert server.statistics().errors == 0
