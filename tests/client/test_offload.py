"""Calls and streams with large messages, whose work is done in worker threads."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore import Comm, CommClosedError, Limits, SerializationError, Server, ToPickle, connect, rpc
from trio_dcore.abc import OFFLOAD
from trio_dcore.testing import no_leaks

PATIENCE = 10.0
settle = trio.testing.wait_all_tasks_blocked


class Gate:
    """Where threads wait until they may go on; made anew for each test."""

    def __init__(self) -> None:
        self.arrived = trio.Event()
        self.held: list[threading.Thread] = []
        self.open = threading.Event()

    def end(self) -> None:
        """Let all of them go on, and wait until they have ended: then trio has them back."""
        self.open.set()
        until = time.monotonic() + PATIENCE
        while not all(thread.name.startswith("Trio thread") for thread in self.held) and time.monotonic() < until:
            time.sleep(0.001)

    def wait(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.held.append(threading.current_thread())
            trio.from_thread.run_sync(self.arrived.set)
            self.open.wait(PATIENCE)


_gates: list[Gate] = []


@pytest.fixture
def gate() -> Iterator[Gate]:
    _gates.append(Gate())
    yield _gates[-1]
    _gates.pop().end()


def pass_gate(what: str, data: object) -> str:
    _gates[-1].wait()
    return what


class Sent:
    """Waits at the gate when it is pickled."""

    nbytes = OFFLOAD + 1

    def __init__(self, what: str = "sent") -> None:
        self.what = what

    def __reduce__(self) -> Any:
        _gates[-1].wait()
        return str, (self.what,)


class Received:
    """Waits at the gate when it is unpickled."""

    def __init__(self, what: str = "received") -> None:
        self.what = what

    def __reduce__(self) -> Any:
        return pass_gate, (self.what, bytes(OFFLOAD + 1))


@pytest.fixture
async def serving(gate: Gate) -> AsyncIterator[tuple[Server, Any]]:
    ended: list[str] = []

    def make(kind: str) -> Any:
        return {"sent": Sent, "received": Received}[kind]()

    async def items(kind: str) -> AsyncIterator[Any]:
        try:
            yield 1
            yield make(kind)
            yield 3
        finally:
            ended.append(kind)

    async def collect(comm: Comm) -> None:
        await comm.write([item async for item in comm])

    handlers: Any = {"same": lambda x: x, "make": make, "items": items, "collect": collect, "ended": lambda: ended}
    async with (
        no_leaks(),
        Server(handlers) as server,
        rpc(await server.listen("tcp://127.0.0.1:0")) as remote,
    ):
        with trio.fail_after(PATIENCE):
            yield server, remote
        gate.end()


async def soon(condition: Callable[[], bool]) -> None:
    while not condition():
        await settle(0.001)


async def test_a_call_that_is_cancelled_before_its_first_byte_costs_no_connection(serving: Any, gate: Gate) -> None:
    server, remote = serving
    await remote.same(x=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: remote.same(x=Sent()))
        await gate.arrived.wait()
        assert remote.pool.active == 1
        nursery.cancel_scope.cancel()
    assert (remote.pool.active, remote.pool.open) == (0, 1)
    assert await remote.same(x=2) == 2
    assert server.statistics().connections == 1
    assert server.statistics().requests["same"] == 2


async def test_a_notice_that_is_cancelled_before_its_first_byte(serving: Any, gate: Gate) -> None:
    _, remote = serving
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: remote.same.notify(x=Sent()))
        await gate.arrived.wait()
        nursery.cancel_scope.cancel()
    assert remote.pool.active == 0
    assert await remote.same(x=2) == 2


async def test_a_call_whose_request_can_not_be_encoded(serving: Any) -> None:
    class Bad:
        nbytes = OFFLOAD + 1

        def __reduce__(self) -> Any:
            raise ValueError("not me")

    _, remote = serving
    with pytest.raises(SerializationError, match="not me"):
        await remote.same(x=Bad())
    assert (remote.pool.active, remote.pool.open) == (0, 1)


async def test_a_result_that_can_not_be_encoded(serving: Any) -> None:
    class Bad:
        nbytes = OFFLOAD + 1

        def __reduce__(self) -> Any:
            raise ValueError("not me")

    server, remote = serving
    server.handlers["bad"] = Bad
    with pytest.raises(SerializationError, match="not me"):
        await remote.bad()
    assert remote.pool.open == 1


@pytest.mark.parametrize("kind", ["sent", "received"])
async def test_a_call_whose_answer_is_being_made_or_read(serving: Any, gate: Gate, kind: str) -> None:
    """Others on the same server go on; cancelled, the connection is of no use any more."""
    server, remote = serving
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: remote.make(kind=kind))
        await gate.arrived.wait()
        assert await remote.same(x=1) == 1
        nursery.cancel_scope.cancel()
    assert (remote.pool.active, remote.pool.open) == (0, 1)
    gate.open.set()
    assert await remote.make(kind=kind) == kind
    await soon(lambda: server.statistics().connections == 1)


async def test_a_handler_with_large_arguments_is_not_called_for_a_caller_who_has_left(serving: Any, gate: Gate) -> None:
    server, remote = serving
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: remote.same(x=ToPickle(Received())))
        await gate.arrived.wait()
        assert server.statistics().in_flight == 0
        nursery.cancel_scope.cancel()
    gate.open.set()
    await soon(lambda: server.statistics().connections == 0)


@pytest.mark.parametrize("where", ["request", "answer", "reading the answer", "item", "reading an item"])
async def test_nobody_is_taken_for_dead_while_a_thread_works(gate: Gate, where: str) -> None:
    """Nor is anybody asked about a request that was not made yet."""
    limits = Limits(ping_interval=0.02, ping_timeout=0.02)

    async def items(kind: str) -> AsyncIterator[Any]:
        yield make(kind)

    def make(kind: str) -> Any:
        return Received("x") if kind.startswith("reading") else Sent("x")

    async with Server({"same": lambda x: x, "items": items, "make": make}, limits=limits) as server:
        async with rpc(await server.listen("tcp://127.0.0.1:0"), limits=limits) as remote, trio.open_nursery() as nursery:

            async def open_later() -> None:
                await gate.arrived.wait()
                await trio.sleep(0.2)
                gate.open.set()

            nursery.start_soon(open_later)
            if where == "request":
                assert await remote.same(x=Sent("x")) == "x"
            elif where.endswith("answer"):
                assert await remote.make(kind=where) == "x"
            else:
                async with remote.items.stream(kind=where) as stream:
                    assert [item async for item in stream] == ["x"]
        assert gate.held
        assert server.statistics().errors == 0


async def test_a_server_that_stops_now_does_not_wait_for_threads(gate: Gate) -> None:
    async with Server({"same": lambda x: x}, grace=0) as server:
        async with rpc(await server.listen("tcp://127.0.0.1:0")) as remote, trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(CommClosedError):
                    await remote.same(x=ToPickle(Received()))

            nursery.start_soon(call)
            await gate.arrived.wait()
            with trio.fail_after(PATIENCE):
                await server.aclose()


class TestStreams:
    @pytest.mark.parametrize("kind", ["sent", "received"])
    async def test_items_stay_in_order(self, serving: Any, gate: Gate, kind: str) -> None:
        _, remote = serving
        gate.open.set()
        async with remote.items.stream(kind=kind) as stream:
            assert [item async for item in stream] == [1, kind, 3]
        assert gate.held

    @pytest.mark.parametrize("kind", ["sent", "received"])
    async def test_leaving_one_cancels_its_handler(self, serving: Any, gate: Gate, kind: str) -> None:
        server, remote = serving
        async with remote.items.stream(kind=kind) as stream:
            assert await stream.receive() == 1
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.receive)
                    await gate.arrived.wait()
                    scope.cancel()
        await soon(lambda: server.handlers["ended"]() == [kind])

    async def test_a_receive_that_is_cancelled_loses_no_item(self, serving: Any, gate: Gate) -> None:
        _, remote = serving
        async with remote.items.stream(kind="received") as stream:
            assert await stream.receive() == 1
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.receive)
                await gate.arrived.wait()
                nursery.cancel_scope.cancel()
            gate.open.set()
            assert [item async for item in stream] == ["received", 3]

    async def test_sending(self, serving: Any, gate: Gate) -> None:
        """One that is cancelled is not sent, and the stream goes on."""
        _, remote = serving
        async with remote.collect.stream() as stream:
            await stream.send(1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send, Sent("never"))
                await gate.arrived.wait()
                nursery.cancel_scope.cancel()
            gate.open.set()
            await stream.send(Sent("a"))
            await stream.send(Received("b"))
            await stream.send(2)
            await stream.send_eof()
            assert await stream.receive() == (1, "a", "b", 2)

    async def test_a_task_that_a_handler_left_behind_lets_go(self, serving: Any, gate: Gate) -> None:
        """It reads an item that is being decoded when the request ends; the next request has the connection to itself."""
        server, remote = serving

        async def leave(comm: Comm) -> str:
            async def read() -> None:
                with pytest.raises(CommClosedError):
                    await comm.read()

            left.start_soon(read)
            await gate.arrived.wait()
            return "left"

        server.handlers["leave"] = leave
        async with trio.open_nursery() as left:
            async with remote.leave.stream() as stream:
                await stream.send(Received())
                assert [item async for item in stream] == []
                await stream.send_eof()
            assert await remote.same(x=1) == 1
        assert server.statistics().errors == 0


async def test_a_bare_conversation(serving: Any, gate: Gate) -> None:
    server, _ = serving
    gate.open.set()

    async def mirror(comm: Comm) -> None:
        while (message := await comm.read()) != "done":
            await comm.write(message)

    server.handlers["mirror"] = mirror
    async with await connect(server.address) as comm:
        await comm.write({"op": "mirror", "reply": False})
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                for message in (1, ToPickle(Received("a")), Sent("b"), 2, "done"):
                    await comm.write(message)

            nursery.start_soon(write)
            assert [await comm.read() for _ in range(4)] == [1, "a", "b", 2]
