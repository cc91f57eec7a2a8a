"""Pings of both sides, at exact instants: whoever silently goes is noticed, whoever lives is left alone."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from trio_dcore import Comm, CommClosedError, Limits, Server, connect, rpc, run_to_end
from trio_dcore.comm import BaseComm
from trio_dcore.protocol._envelope import ITEM, KEY, PING, PONG, REPLY
from trio_dcore.testing import FaultStream, ManualPeer, memory_network, no_leaks

OFF = Limits(ping_interval=None)
blocked = trio.testing.wait_all_tasks_blocked


class Net:
    """A server over memory:// whose wires have faults."""

    def __init__(self, server: Server, address: str, faults: list[tuple[str, FaultStream]]) -> None:
        self.server = server
        self.address = address
        self._faults = faults

    def black_hole(self) -> None:
        for _, fault in self._faults:
            fault.black_hole()

    def sent(self, side: str) -> int:
        return sum(fault.sent for its, fault in self._faults if its == side)

    def cut(self) -> None:
        for _, fault in self._faults:
            fault.cut()


@asynccontextmanager
async def net(handlers: dict[str, Any], limits: Limits | None = None) -> AsyncIterator[Net]:
    faults: list[tuple[str, FaultStream]] = []

    def wrap(stream: trio.abc.Stream, side: str) -> trio.abc.Stream:
        faults.append((side, FaultStream(stream)))
        return faults[-1][1]

    with memory_network() as network:
        network.wrap = wrap
        async with Server(handlers, limits=limits) as server:
            made = Net(server, await server.listen("memory://"), faults)
            yield made
            made.cut()


class Work:
    """A handler that takes its time."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self.ended = trio.Event()
        self.ended_at = math.nan

    async def __call__(self) -> str:
        try:
            await trio.sleep(self.seconds)
            return "done"
        finally:
            self.ended_at = trio.current_time()
            self.ended.set()


async def test_a_server_that_has_gone(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """The first ping is sent after 10 s of silence, and the call is given up 30 s later."""
    async with net({"work": Work()}, OFF) as wire, rpc(wire.address) as remote:
        began = trio.current_time()
        nursery.start_soon(at, began + 5, wire.black_hole)
        with pytest.raises(CommClosedError, match=r"'work' at memory://server-1: .* 30\.0 s \(Limits\.ping_timeout\)"):
            await remote.work()
        assert trio.current_time() - began == pytest.approx(40)
        assert remote._pool.open == 0


async def at(time: float, what: Any) -> None:
    await trio.sleep_until(time)
    what()


async def test_after_an_answer_it_begins_anew(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async with net({"work": Work()}, OFF) as wire, rpc(wire.address) as remote:
        began = trio.current_time()
        nursery.start_soon(at, began + 25, wire.black_hole)  # pings at 10 and, since an answer is seen at the next look, 22.5 s
        with pytest.raises(CommClosedError, match="ping_timeout"):
            await remote.work()
        assert 25 + 30 < trio.current_time() - began <= 35 + 30


async def test_a_client_that_has_gone(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock) -> None:
    caplog.set_level(logging.INFO, "trio_dcore.server")
    work = Work()
    async with net({"work": work}) as wire:
        remote = rpc(wire.address, limits=OFF)
        began = trio.current_time()
        nursery.start_soon(at, began + 5, wire.black_hole)
        with trio.CancelScope() as scope:
            nursery.start_soon(at, began + 100, scope.cancel)
            await remote.work()
        assert work.ended_at - began == pytest.approx(40)
        assert wire.server.statistics().connections == 0
        assert [record.levelno for record in caplog.records if "ping_timeout" in record.getMessage()] == [logging.INFO]
        remote.close_comms()


@pytest.mark.parametrize("form", ["plain", "run_to_end", "stream", "deadline"])
async def test_who_takes_long_but_lives(form: str, autojump_clock: MockClock) -> None:
    work = Work(1000)
    handler: Any = run_to_end(work) if form == "run_to_end" else work
    async with net({"work": handler}) as wire, rpc(wire.address) as remote:
        began = trio.current_time()
        if form == "stream":
            async with remote.work.stream() as stream:
                assert [item async for item in stream] == ["done"]
        elif form == "deadline":
            with trio.fail_after(5000):
                assert await remote.work() == "done"
        else:
            assert await remote.work() == "done"
        assert trio.current_time() - began == 1000
        assert remote._pool.open == 1
        assert await remote.echo(data=1) == 1


async def test_nothing_is_sent_for_a_short_call(autojump_clock: MockClock) -> None:
    async with net({"work": Work(9.9)}) as wire, rpc(wire.address) as remote:
        await remote.echo(data=1)
        before = wire.sent("client"), wire.sent("server")
        await remote.work()
        first = wire.sent("client") - before[0], wire.sent("server") - before[1]
        await remote.echo(data=1)
        await trio.sleep(1000)
        assert wire.sent("client") < before[0] + 2 * first[0] + 100
        assert first[1] < 60  # a reply and nothing else


@pytest.mark.parametrize("limits", [Limits(ping_interval=None), Limits(ping_timeout=None)])
async def test_turned_off(limits: Limits, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    async with net({"work": Work()}, limits) as wire, rpc(wire.address, limits=limits) as remote:
        await remote.echo()
        wire.black_hole()
        with trio.move_on_after(10_000) as scope:
            await remote.work()
        assert scope.cancelled_caught


WITHOUT = {KEY: {"version": 1, "features": ["calls", "streams", "deadlines"], "window": [16, 2**20]}}


async def test_a_client_without_the_feature(autojump_clock: MockClock) -> None:
    """It is not pinged."""
    with memory_network() as network:
        async with Server({"work": Work(1000)}) as server:
            async with await ManualPeer.connect(await server.listen("memory://"), network) as peer:
                await peer.handshake(**WITHOUT)
                await peer.send({"op": "work", "reply": True, KEY: {"id": 1}})
                assert await peer.receive() == (REPLY, 1, "done")
                assert trio.current_time() >= 1000


async def test_a_server_without_the_feature(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Nor is such a server."""

    async def serve() -> None:
        async with ManualPeer(await listener.accept()) as peer:
            await peer.handshake(**WITHOUT)
            assert (await peer.receive())["op"] == "work"
            with trio.move_on_after(1000):
                raise AssertionError(await peer.receive())
            await peer.send((REPLY, 1, "done"))
            await peer.expect_end()

    with memory_network() as network:
        async with await network.listen_streams() as listener:
            nursery.start_soon(serve)
            async with rpc(listener.address) as remote:
                assert await remote.work() == "done"


async def test_a_paused_consumer_and_a_paused_producer(autojump_clock: MockClock) -> None:
    """Neither who doesn't ask for the next item nor who doesn't give one is dead."""
    trace = []

    async def slow(comm: Comm) -> None:
        await comm.write("first")
        await trio.sleep(500)
        async for item in comm:
            trace.append(item)
        await comm.write("last")

    async with net({"slow": slow}) as wire, rpc(wire.address) as remote, remote.slow.stream() as stream:
        assert await stream.receive() == "first"
        await trio.sleep(300)
        for number in range(16):  # all of the window, and more bytes than are read ahead for a call
            await stream.send((number, bytes(60_000)))
        await stream.send_eof()
        assert await stream.receive() == "last"  # pings stand behind all these items
        assert [number for number, _ in trace] == list(range(16))
        assert trio.current_time() >= 500


async def test_what_is_read_ahead_keeps_its_order(autojump_clock: MockClock) -> None:
    """Pings are answered at once, while requests that stand in front of them and behind them wait for their turn."""
    began: list[int] = []

    async def work(number: int, seconds: float) -> int:
        began.append(number)
        await trio.sleep(seconds)
        return number

    async with net({"work": work}, OFF) as wire, await connect(wire.address) as comm:
        await comm.write({"op": "work", "number": 1, "seconds": 100, "reply": True, KEY: {"id": 1}})
        await blocked()
        await comm.write((PING, 1, None))
        assert await comm.read() == (PONG, 1, None)
        await comm.write({"op": "work", "number": 2, "seconds": 0, "reply": True, KEY: {"id": 2}})
        await comm.write({"op": "work", "number": 3, "seconds": 0, "reply": True, KEY: {"id": 3}})
        await comm.write((PING, 1, None))
        assert await comm.read() == (PONG, 1, None)
        await comm.write({"op": "echo", "data": 4, "reply": True, KEY: {"id": 4}})
        await trio.sleep(50)
        assert began == [1]
        for _ in range(3):
            await comm.write((PING, 1, None))
        answers = []
        while len(answers) < 4:
            if (answer := await comm.read()) != (PONG, 1, None):
                answers.append(answer)
        assert answers == [(REPLY, 1, 1), (REPLY, 2, 2), (REPLY, 3, 3), (REPLY, 4, 4)]
        assert began == [1, 2, 3]


async def test_a_flood_of_pings_is_bounded(autojump_clock: MockClock) -> None:
    async with net({"work": Work(100)}, OFF) as wire, await connect(wire.address) as comm:
        await comm.write({"op": "work", "reply": True, KEY: {"id": 1}})
        for _ in range(5000):
            await comm.write((PING, 1, None))
        await blocked()
        (connection,) = wire.server._connections
        assert connection.comm.buffered == 0  # type: ignore[attr-defined]
        answers = 0
        while (await comm.read())[0] == PONG:
            answers += 1
        assert 1 <= answers <= 5000


async def test_more_than_may_wait_is_not_read_ahead(autojump_clock: MockClock) -> None:
    async with net({"work": Work(100), "echo": lambda x: len(x)}, OFF) as wire, await connect(wire.address) as comm:
        async with trio.open_nursery() as nursery:
            await comm.write({"op": "work", "reply": True, KEY: {"id": 1}})

            async def pipeline() -> None:
                for number in range(2, 12):
                    await comm.write({"op": "echo", "x": bytes(100_000), "reply": True, KEY: {"id": number}})

            nursery.start_soon(pipeline)
            await trio.sleep(50)
            (connection,) = wire.server._connections
            assert connection.comm.buffered < 400_000  # type: ignore[attr-defined]
            assert await comm.read() == (REPLY, 1, "done")
            assert [(await comm.read())[2] for _ in range(10)] == [100_000] * 10


async def test_what_is_wrong_behind_a_request_waits_for_its_turn(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    caplog.set_level(logging.INFO, "trio_dcore.server")
    async with net({"work": Work(100)}, OFF) as wire, await connect(wire.address) as comm:
        await comm.write({"op": "work", "reply": True, KEY: {"id": 1}})
        assert isinstance(comm, BaseComm)
        await comm._pump.send([bytes(16)], 0)  # type: ignore[attr-defined]  # a message of no frames
        await comm.write((PING, 1, None))
        assert await comm.read() == (REPLY, 1, "done")
        assert trio.current_time() >= 100
        with pytest.raises(CommClosedError):
            await comm.read()


async def test_the_pool_leaves_no_task(autojump_clock: MockClock) -> None:
    async with net({"work": Work(50)}) as wire:
        async with no_leaks(), rpc(wire.address) as remote:
            await remote.work()
        async with no_leaks():
            remote = rpc(wire.address)
            with trio.move_on_after(30):
                await remote.work()
            assert remote._pool._pinger.awake
            await trio.sleep(10)
            assert not remote._pool._pinger.awake  # nothing to look after
            await remote.echo()
            assert remote._pool._pinger.awake
            remote.close_comms()


async def test_the_reply_crosses_a_ping(autojump_clock: MockClock) -> None:
    """The server's pong would come behind its reply: it is left out, and the comm goes on."""
    async with net({"work": Work(10)}) as wire, rpc(wire.address) as remote:
        for _ in range(5):
            assert await remote.work() == "done"
        await trio.sleep(1)
        assert await remote.echo(data=1) == 1
        assert remote._pool.open == 1


async def test_items_in_front_of_a_ping_on_a_stream_by_hand(autojump_clock: MockClock) -> None:
    got = []

    async def take(comm: Comm) -> None:
        await trio.sleep(100)
        async for item in comm:
            got.append(item)

    async with net({"take": take}, OFF) as wire, await connect(wire.address) as comm:
        await comm.write({"op": "take", "reply": True, KEY: {"id": 1, "stream": True}})
        for number in range(4):
            await comm.write((ITEM, 1, number))
            await comm.write((PING, 1, None))
            assert await comm.read() == (PONG, 1, None)
        await comm.write((4, 1, None))
        while (await comm.read())[0] not in (4, REPLY):
            pass
        assert got == [0, 1, 2, 3]
