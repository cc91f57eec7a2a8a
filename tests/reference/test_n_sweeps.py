"""Group N: everything, cancelled at every step, and cut after every byte."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from tests.reference import kit
from tests.reference.kit import EXISTING, NAMES, Wire, covers, is_loud, reference, until
from tests.reference.test_d_calls_and_pool import counts_are_whole
from trio_dcore import (
    BatchedSend,
    CommClosedError,
    ConnectError,
    ConnectionPool,
    HandlerCancelled,
    Limits,
    RPCClosed,
    Server,
    ServerClosing,
    run_to_end,
    send_recv,
)
from trio_dcore.abc import Comm, CommSettings, Listener, Transport
from trio_dcore.comm import _registry, get_transport, register_transport
from trio_dcore.testing import FaultStream, MemoryNetwork, cancel_sweep, wire_sweep

blocked = trio.testing.wait_all_tasks_blocked

#: Two windows and more; but few bytes, since each is cut.
COUNT = 7
LIMITS = Limits(window=3)


class Subject:
    """Handlers that count who is inside, so that one that was left behind, or cut without its finally, is seen."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.inside = 0
        self.notified = 0
        self.worked: list[int] = []
        self.handlers = {
            "work": self.work,
            "log": run_to_end(self.log),
            "squares": self.squares,
            "sums": self.sums,
        }

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        self.inside += 1
        try:
            await trio.lowlevel.checkpoint()
            yield
        finally:
            self.inside -= 1

    async def work(self, x: int) -> int:
        """Wait a little."""
        self.worked.append(x)
        async with self.entered():
            return 2 * x

    async def log(self, line: str) -> None:
        """Want no answer."""
        async with self.entered():
            self.notified += 1

    async def squares(self, n: int) -> AsyncIterator[int]:
        """Give many answers."""
        async with self.entered():
            for i in range(n):
                yield i * i

    async def sums(self, comm: Any) -> None:
        """Take many, too."""
        async with self.entered():
            total = 0
            async for x in comm:
                total += x
                await comm.write(total)

    def worked_once(self) -> None:
        """No call was made twice: what a handler may have begun is the caller's to repeat."""
        assert len(set(self.worked)) == len(self.worked)
        self.worked.clear()

    async def is_whole(self, server: Server, address: str) -> None:
        """Nobody is inside, no connection is left, and the server serves, new clients and old."""
        await blocked()
        assert self.inside == 0
        assert server.statistics().in_flight == 0
        async with self._wire.client(address) as remote:
            assert await remote.work(x=21) == 42
            assert await remote.work(x=4) == 8
        await blocked()


# What clients do, with a remote that has whatever pool the test gives it.


async def a_call(remote: Any) -> None:
    assert await remote.work(x=1) == 2


async def two_calls(remote: Any) -> None:
    assert await remote.work(x=1) == 2
    assert await remote.work(x=3) == 6


async def a_notify(remote: Any) -> None:
    await remote.log.notify(line="x")


async def a_stream(remote: Any) -> None:
    async with remote.squares.stream(n=COUNT) as stream:
        assert [item async for item in stream] == [i * i for i in range(COUNT)]


async def half_a_stream(remote: Any) -> None:
    async with remote.squares.stream(n=COUNT) as stream:
        async for item in stream:
            if item > 8:  # of the second window
                break


async def both_ways(remote: Any) -> None:
    async with remote.sums.stream() as stream:
        for i in range(3):
            await stream.send(i)
            assert await stream.receive() == i * (i + 1) // 2
        await stream.send_eof()
        assert [item async for item in stream] == []


USES = [a_call, two_calls, a_notify, a_stream, half_a_stream, both_ways]
Use = Callable[[Any], Awaitable[None]]


def each_use(row: str, over: str) -> Callable[[Callable[[Wire, Use], Awaitable[None]]], Callable[..., None]]:
    """A test of a row for each thing that clients do, over each transport."""

    def decorate(body: Callable[[Wire, Use], Awaitable[None]]) -> Callable[..., None]:
        @pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
        @pytest.mark.parametrize("transport", [pytest.param(each, id=NAMES[each]) for each in over.split() if each in EXISTING])
        def test(transport: str, use: Use, caplog: pytest.LogCaptureFixture) -> None:
            caplog.set_level(logging.INFO)
            kit.run(lambda wire: body(wire, use), transport, caplog)
            assert not [record.getMessage() for record in caplog.records if is_loud(record)]

        test.__module__, test.__qualname__, test.__doc__ = body.__module__, body.__qualname__, body.__doc__
        return covers(row, over)(test)

    return decorate


# -- N01: clients ----------------------------------------------------------------------------------------------------------------


@each_use("N01", "m i t u l")
async def test_n01_a_client_from_nothing(wire: Wire, use: Use) -> None:
    """Connection, handshake, request, answer and end, cancelled at each step of either side."""
    subject = Subject(wire)
    async with wire.server(subject.handlers, limits=LIMITS) as (server, address):

        async def scenario() -> None:
            async with wire.client(address, limits=LIMITS) as remote:
                await use(remote)

        async def check() -> None:
            await subject.is_whole(server, address)
            assert server.statistics().connections == 0

        assert await cancel_sweep(scenario, check=check) >= 5


@each_use("N01", "m i t u l")
async def test_n01_a_client_with_a_pool(wire: Wire, use: Use) -> None:
    """The same with comms that are there already; the pool's counts are whole after each run."""
    subject = Subject(wire)
    async with wire.server(subject.handlers, limits=LIMITS) as (server, address), wire.pool(limit=2, limits=LIMITS) as pool:

        async def scenario() -> None:
            await use(pool(address))

        async def check() -> None:
            counts_are_whole(pool)
            await subject.is_whole(server, address)
            assert await pool(address).work(x=5) == 10
            counts_are_whole(pool, open=1)
            await blocked()
            assert server.statistics().connections == 1

        await check()
        assert await cancel_sweep(scenario, check=check) >= 1


@reference("N01", "m i t u l")
async def test_n01_a_bare_comm(wire: Wire) -> None:
    subject = Subject(wire)
    async with wire.server(subject.handlers) as (server, address):

        async def scenario() -> None:
            async with await wire.connect(address) as comm:
                assert await send_recv(comm, op="work", x=1) == 2
                await comm.send({"op": "work", "x": 2, "reply": True})
                assert await comm.receive() == 4

        async def check() -> None:
            await subject.is_whole(server, address)
            assert server.statistics().connections == 0

        assert await cancel_sweep(scenario, check=check) > 10


@reference("N01", "m i t u l")
async def test_n01_a_call_through_another_server(wire: Wire) -> None:
    """A handler that calls on: its pool is whole, too."""
    subject = Subject(wire)
    async with wire.server(subject.handlers) as (server, address), wire.server() as (front, at_front):

        async def on(x: int) -> int:
            result: int = await front.rpc(address).work(x=x)
            return result

        front.handlers["on"] = on

        async def scenario() -> None:
            async with wire.client(at_front) as remote:
                assert await remote.on(x=3) == 6

        async def check() -> None:
            await subject.is_whole(server, address)
            counts_are_whole(front.rpc)
            front.rpc.collect()
            await blocked()
            assert (front.statistics().connections, front.statistics().in_flight) == (0, 0)

        assert await cancel_sweep(scenario, check=check) > 10


# -- N02: servers and pools ------------------------------------------------------------------------------------------------------


class Making:
    """Servers that a sweep makes; what must hold of each when its run is over."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.subject = Subject(wire)
        self.made: list[Server] = []

    def server(self, **options: Any) -> Server:
        self.made.append(self._wire.make_server(self.subject.handlers, **options))
        return self.made[-1]

    async def check(self) -> None:
        """It is closed, whoever closed it, and leaves nothing: no handler, no connection, no port."""
        while self.made:
            server = self.made.pop()
            if server.status.name == "init":
                continue  # cancelled before it began
            with self._wire.lasts(0):
                await server.finished()
            assert server.status.name in ("closed", "failed")
            assert server.statistics().connections == 0
            assert server.statistics().in_flight == 0
            for address in server.addresses:
                assert await self._wire.refuses(address)
        assert self.subject.inside == 0


@reference("N02", "m i t u l")
async def test_n02_starting(wire: Wire) -> None:
    making = Making(wire)

    async def block() -> None:
        async with making.server() as server:
            await server.listen(wire.where)
            await server.listen(wire.where)

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            server = making.server()
            await nursery.start(server.serve, wire.where, wire.where)
            server.stop()

    for scenario in 3 * (block, serve):  # in which order two tasks go on is left to chance
        assert await cancel_sweep(scenario, check=making.check) > 5


@reference("N02", "i")
async def test_n02_listening_in_the_moment_of_the_cancellation(wire: Wire) -> None:
    """The address is bound when the scope round the server is cancelled, and the server is so far gone by then, or so far."""
    scope = trio.CancelScope()
    inproc = get_transport("inproc")
    bound: list[Listener] = []
    steps = 0

    class Slow(Transport):
        scheme = "slow"

        async def listen(self, location: str, settings: CommSettings) -> Sequence[Listener]:
            bound[:] = await inproc.listen(location, settings)
            scope.cancel()
            for _ in range(steps):
                await trio.lowlevel.cancel_shielded_checkpoint()
            return bound

        async def connect(self, location: str, settings: CommSettings) -> Comm:
            raise AssertionError("nobody connects")

    register_transport(Slow())
    try:
        for steps in 10 * list(range(7)):  # noqa: B007 - Slow reads it
            scope = trio.CancelScope()
            with scope:
                async with wire.make_server() as server:
                    for _ in range(3):  # whose tasks are cancelled in an order that is left to chance
                        await server.listen(wire.where)
                    await server.listen("slow://")
            assert scope.cancelled_caught
            with pytest.raises(trio.ClosedResourceError):
                await bound[0].accept()
    finally:
        del _registry._transports["slow"]


def endings(wire: Wire) -> dict[str, Callable[[Server], Awaitable[object]]]:
    """Ways to end a server that has work in flight."""

    async def stop(server: Server) -> None:
        server.stop(wire.seconds(1))
        await server.finished()

    async def stop_and_shorten(server: Server) -> None:
        server.stop()
        await trio.lowlevel.checkpoint()
        server.stop(0)
        await server.finished()

    return {
        "stop": stop,
        "stop and shorten": stop_and_shorten,
        "aclose": lambda server: server.aclose(wire.seconds(1)),
        "aclose now": lambda server: server.aclose(0),
    }


@reference("N02", "m i t u l")
async def test_n02_stopping(wire: Wire) -> None:
    """With an idle client, one whose handler ends soon, and a stream that does not end by itself."""
    making = Making(wire)

    for end in endings(wire).values():

        async def scenario(end: Callable[[Server], Awaitable[object]] = end) -> None:
            async with making.server(grace=wire.seconds(1)) as server:
                address = await server.listen(wire.where)
                async with wire.pool() as pool, trio.open_nursery() as nursery:
                    await pool(address).work(x=1)
                    nursery.start_soon(ignoring_the_end, pool(address).work, 2)
                    nursery.start_soon(endless, pool(address))
                    await trio.lowlevel.checkpoint()
                    await end(server)
                    nursery.cancel_scope.cancel()

        assert await cancel_sweep(scenario, check=making.check) > 10


async def ignoring_the_end(call: Callable[..., Awaitable[int]], x: int) -> None:
    try:
        assert await call(x=x) == 2 * x
    except (HandlerCancelled, ServerClosing, CommClosedError, ConnectError, RPCClosed):
        pass


async def endless(remote: Any) -> None:
    try:
        async with remote.squares.stream(n=10**9) as stream:
            async for item in stream:
                if item > 100:
                    await trio.sleep_forever()
    except (HandlerCancelled, ServerClosing, CommClosedError, ConnectError, RPCClosed):
        pass


@reference("N02", "m i t u l")
async def test_n02_waiting_for_a_slot(wire: Wire) -> None:
    """A full pool: the holder's end hands its comm on, or its slot, in the middle of the sweep."""
    subject = Subject(wire)
    async with (
        wire.server(subject.handlers) as (one, here),
        wire.server(subject.handlers) as (other, there),
        wire.pool(limit=1) as pool,
    ):
        for holders, ours in ((here, here), (there, here)):

            async def scenario(holders: str = holders, ours: str = ours) -> None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(a_call, pool(holders))
                    nursery.start_soon(a_call, pool(ours))
                    await a_call(pool(ours))

            async def check(ours: str = ours) -> None:
                counts_are_whole(pool)
                await subject.is_whole(one, here)
                await subject.is_whole(other, there)
                await a_call(pool(ours))
                counts_are_whole(pool, open=1)
                await blocked()
                assert one.statistics().connections + other.statistics().connections == 1

            await check()
            assert await cancel_sweep(scenario, check=check) > 10


@reference("N02", "m i t u l")
async def test_n02_closing_a_pool(wire: Wire) -> None:
    """Calls in flight, connecting and waiting while their pool is closed, and then cancelled."""
    subject = Subject(wire)
    async with wire.server(subject.handlers) as (server, address):

        async def scenario() -> None:
            pool = wire.pool(limit=2)
            async with trio.open_nursery() as nursery:
                for x in range(4):
                    nursery.start_soon(ignoring_the_end, pool(address).work, x)
                await trio.lowlevel.checkpoint()
                await pool.aclose()
            counts_are_whole(pool, open=0)

        async def check() -> None:
            await subject.is_whole(server, address)
            assert server.statistics().connections == 0

        assert await cancel_sweep(scenario, check=check) >= 3


@reference("N02", "m i t u l")
async def test_n02_streaming_with_a_full_window(wire: Wire) -> None:
    """Sender and receiver wait for each other: for credit, and for items."""
    subject = Subject(wire)
    count = 40  # some windows
    async with wire.server(subject.handlers) as (server, address), wire.pool(limit=1) as pool:

        async def scenario() -> None:
            async with pool(address).sums.stream() as stream, trio.open_nursery() as nursery:

                async def send() -> None:
                    for _ in range(count):
                        await stream.send(1)
                    await stream.send_eof()

                nursery.start_soon(send)
                assert [item async for item in stream] == list(range(1, count + 1))

        async def check() -> None:
            counts_are_whole(pool)
            await subject.is_whole(server, address)
            await a_call(pool(address))
            counts_are_whole(pool, open=1)
            await blocked()
            assert server.statistics().connections == 1

        await check()
        assert await cancel_sweep(scenario, check=check) > 10


@reference("N02", "m i t u l")
async def test_n02_batches(wire: Wire) -> None:
    """BatchedSend, into stream handlers: each message was handled, in order, or is told as not sent or maybe not."""
    handled: list[int] = []
    streams: list[BatchedSend] = []

    async with wire.make_server(stream_handlers={"note": lambda x: handled.append(x)}) as server:
        address = await server.listen(wire.where)

        async def scenario() -> None:
            async with await wire.connect(address) as comm:
                await comm.write({"op": "connection_stream", "reply": False})
                async with BatchedSend(comm, wire.seconds(0.002)) as stream:
                    streams.append(stream)
                    for x in range(6):
                        await stream.send_wait({"op": "note", "x": x})
                        await trio.lowlevel.checkpoint()

        async def check() -> None:
            await until(lambda: server.statistics().connections == 0)
            assert handled == list(range(len(handled)))
            for stream in streams:
                told = stream.maybe_sent + stream.unsent
                assert [message["x"] for message in told] == list(range(stream.message_count - len(told), stream.message_count))
                assert len(handled) >= stream.message_count - len(told)
            streams.clear()
            handled.clear()
            await scenario()
            await until(lambda: server.statistics().connections == 0)
            assert handled == list(range(6))
            streams.clear()
            handled.clear()

        assert await cancel_sweep(scenario, check=check) > 10


# -- N03: the wire ---------------------------------------------------------------------------------------------------------------


BROKEN = (ConnectError, CommClosedError)


async def works_again(pool: ConnectionPool, address: str, fault: FaultStream) -> None:
    """The next call succeeds, also where what the pool has is a comm that was cut while it was idle."""
    if not fault.was_cut:
        pool.collect()
    assert await pool(address).work(x=5) == 10
    counts_are_whole(pool, open=1)


def faults_of(network: MemoryNetwork) -> list[FaultStream]:
    """The end that a wire_sweep cuts, as soon as there is one."""
    found: list[FaultStream] = []
    wrap = network.wrap
    assert wrap is not None

    def noting(stream: trio.abc.Stream, side: Any) -> trio.abc.Stream:
        stream = wrap(stream, side)
        if isinstance(stream, FaultStream):
            found.append(stream)
        return stream

    network.wrap = noting
    return found


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@covers("N03", "m")
def test_n03_cut_after_every_byte(use: Use) -> None:
    """Both ways, by an end and by a reset: a typed error or a result, no hang; afterwards server and pool are whole."""

    async def body(wire: Wire) -> None:
        async def scenario(network: MemoryNetwork) -> None:
            subject = Subject(wire)
            faults = faults_of(network)
            async with wire.make_server(subject.handlers, limits=LIMITS) as server, wire.pool(limit=1, limits=LIMITS) as pool:
                address = await server.listen("memory://")
                try:
                    await use(pool(address))
                except BROKEN:
                    pass
                counts_are_whole(pool)
                await subject.is_whole(server, address)
                await works_again(pool, address, faults[0])
                subject.worked_once()
                await blocked()
                assert server.statistics().connections == 1

        # The handshake is the same for all: 154 bytes in each direction.  Each byte is cut by an end and by a reset.
        if use is a_call:
            assert await wire_sweep(scenario) > 4 * (154 + 20)
        else:
            assert await wire_sweep(scenario, first=154) > 4 * 20

    # In a run of its own, without the network of kit.run: the sweep makes one for each cut.
    trio.run(body, Wire("i", None), clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("how", ["eof", "reset"])
@pytest.mark.parametrize("side", ["client", "server"])
@covers("N03", "t")
def test_n03_cut_over_tcp(use: Use, side: str, how: Any) -> None:
    """The same with real sockets; of the longer ones after every few bytes, as they have been cut everywhere above."""
    step = 1 if use is a_call else 13

    async def body(wire: Wire) -> None:
        subject = Subject(wire)
        async with wire.server(subject.handlers, limits=LIMITS) as (server, address):
            after = 0
            while True:
                async with wire.relay(address) as relay, wire.pool(limit=1, limits=LIMITS) as pool:
                    faults: list[FaultStream] = []

                    def cut(stream: trio.abc.Stream, which: str, after: int = after, faults: Any = faults) -> trio.abc.Stream:
                        if which != side or faults:
                            return stream
                        faults.append(FaultStream(stream, cut_after=after, cut=how))
                        return faults[0]

                    relay.wrap = cut
                    with trio.fail_after(10):
                        try:
                            await use(pool(relay.address))
                        except BROKEN:
                            pass
                    counts_are_whole(pool)
                    await subject.is_whole(server, address)
                    await works_again(pool, relay.address, faults[0])
                    subject.worked_once()
                    was_cut = faults[0].was_cut
                await blocked()
                assert server.statistics().connections == 0
                if not was_cut:
                    break
                after += step
        assert after > 154

    kit.run(body, "t")


@reference("N03", "t u l")
async def test_n03_connecting(wire: Wire) -> None:
    """The handshakes of TLS and of the comm, cut after every byte of either side: a comm that works, or a typed error; no hang."""
    subject = Subject(wire)
    cuts = 0
    async with wire.server(subject.handlers) as (server, address), wire.client(address) as other:

        async def is_cut(side: str, after: int, how: Any) -> bool:
            was_cut = await is_cut_while_connecting(wire, address, side, after, how)
            await until(lambda: server.statistics().connections <= 1)
            assert (server.statistics().in_flight, subject.inside) == (0, 0)
            # The one call was made at most once, and others are not disturbed.
            assert await other.work(x=2) == 4
            assert subject.worked in ([2], [1, 2])
            subject.worked.clear()
            return was_cut

        for side in ("client", "server"):
            # The handshake of TLS is thousands of bytes: there each is cut once, by an end or by a reset in turn.
            for ways in (("eof", "reset"),) if wire.transport == "l" else (("eof",), ("reset",)):
                after = 0
                while await is_cut(side, after, ways[after % len(ways)]):
                    after += 1
                cuts += after
        await subject.is_whole(server, address)
    assert cuts > (3000 if wire.transport == "l" else 4 * 154)


async def is_cut_while_connecting(wire: Wire, address: str, side: str, after: int, how: Any) -> bool:
    """Connect and make a call while what one side sends is cut after so many bytes; whether it was."""
    faults: list[FaultStream] = []

    def cut(stream: trio.abc.Stream, which: str) -> trio.abc.Stream:
        if which != side or faults:
            return stream
        faults.append(FaultStream(stream, cut_after=after, cut=how))
        return faults[0]

    async with wire.relay(address) as relay:
        relay.wrap = cut
        with trio.fail_after(10):
            try:
                async with await wire.connect(relay.address) as comm:
                    assert await send_recv(comm, op="work", x=1) == 2
            except BROKEN:
                assert faults[0].was_cut
    return faults[0].was_cut
