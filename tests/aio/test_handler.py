"""trio_dcore.aio._handler: asyncio-flavoured handlers of a trio server."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import pytest
import trio
import trio.testing

from tests.aio.available import needs_trio_asyncio
from trio_dcore import (
    HandlerCancelled,
    LocalProtocolError,
    RemoteError,
    Server,
    connect,
    current_request,
    in_thread,
    rpc,
    run_to_end,
    send_recv,
)
from trio_dcore.aio import Comm, handler, open_loop, run_asyncio
from trio_dcore.aio import current_request as asyncio_request
from trio_dcore.testing import cancel_sweep, no_leaks

pytestmark = needs_trio_asyncio

variable: ContextVar[str] = ContextVar("variable", default="unset")


async def add(x: int, y: int = 0) -> int:
    await asyncio.sleep(0)
    return x + y


@asynccontextmanager
async def serving(
    handlers: dict[str, Any], where: str = "inproc://", *, redeliver: float = 1.0, **options: Any
) -> AsyncIterator[tuple[Server, rpc]]:
    """A server of asyncio-flavoured handlers, and an rpc to it; nothing may be left of them."""
    async with no_leaks(), open_loop(redeliver=redeliver):
        async with Server(handler(handlers), **options) as server:
            async with rpc(await server.listen(where)) as remote:
                yield server, remote
        async with no_leaks():
            pass  # no asyncio task of theirs either


def loud(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno > logging.INFO]


class Journal(list[str]):
    """What handlers did, in order."""

    async def work(self, seconds: float = 1e6, cleanup: float = 0.0) -> str:
        self.append("started")
        try:
            await asyncio.sleep(seconds)
            return "done"
        except asyncio.CancelledError:
            self.append("cancelled")
            raise
        finally:
            try:
                await asyncio.sleep(cleanup)
            finally:
                self.append("finally")

    async def ticks(self, n: int = 1000, interval: float = 0.0) -> AsyncIterator[int]:
        task = asyncio.current_task()
        try:
            for i in range(n):
                await asyncio.sleep(interval)
                yield i
        finally:
            assert asyncio.current_task() is task
            self.append("ticks ended")

    async def has(self, *entries: str) -> None:
        while not set(entries) <= set(self):  # noqa: ASYNC110  # asyncio code appends
            await trio.sleep(0.001)


# -- kinds of handlers -------------------------------------------------------------------------------------------------------------


async def test_coroutine_functions(where: str) -> None:
    class Adder:
        async def __call__(self, x: int) -> int:
            return await add(x, 1)

        async def method(self, x: int) -> int:
            return await add(x, 2)

    handlers = {"add": add, "partial": functools.partial(add, y=10), "object": Adder(), "method": Adder().method}
    async with serving(handlers, where) as (_, remote):
        assert await remote.add(x=1, y=2) == 3
        assert await remote.partial(x=1) == 11
        assert await remote.object(x=1) == 2
        assert await remote.method(x=1) == 3


async def test_plain_functions_and_what_they_return(where: str) -> None:
    async def ticks() -> AsyncIterator[int]:
        yield 1
        yield 2

    def future() -> asyncio.Future[str]:
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, "of a future")
        return future

    handlers = {"plain": lambda: "plain", "coroutine": lambda: add(1, 2), "future": future, "ticks": lambda: ticks()}
    async with serving(handlers, where) as (_, remote):
        assert await remote.plain() == "plain"
        assert await remote.coroutine() == 3
        assert await remote.future() == "of a future"
        async with remote.ticks.stream() as stream:
            assert [item async for item in stream] == [1, 2]


async def test_marked_functions(where: str) -> None:
    def thread() -> bool:
        return threading.current_thread() is threading.main_thread()

    journal = Journal()
    handlers = {
        "thread": in_thread(thread),
        "inside": run_to_end(journal.work),
        "outside": run_to_end(handler(journal.work)),
        "partial": functools.partial(run_to_end(journal.work), seconds=0.2),
    }
    async with serving(handlers, where) as (_, remote):
        assert await remote.thread() is False
        for op in "inside", "outside", "partial":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(functools.partial(remote[op], **({} if op == "partial" else {"seconds": 0.2})))
                await journal.has("started")
                nursery.cancel_scope.cancel()
            await journal.has("finally")
            assert journal == ["started", "finally"], op  # not cancelled
            journal.clear()


async def test_as_decorators_and_only_once(where: str) -> None:
    class Counter(Server):
        def __init__(self) -> None:
            self.n = 0
            super().__init__({"count": self.count, "talk": self.talk, "ticks": self.ticks})

        @handler
        async def count(self, by: int) -> int:
            await asyncio.sleep(0)
            self.n += by
            return self.n

        @handler
        async def talk(self, comm: Comm) -> None:
            await comm.write(await comm.read() + 1)

        @handler
        async def ticks(self, n: int) -> AsyncIterator[int]:
            for i in range(n):
                yield i

    async with no_leaks(), open_loop(), Counter() as server, rpc(await server.listen(where)) as remote:
        assert await remote.count(by=2) == 2
        async with remote.talk.stream() as stream:
            await stream.send(41)
            assert await stream.receive() == 42
        async with remote.ticks.stream(n=2) as stream:
            assert [item async for item in stream] == [0, 1]
        assert handler(server.count) == server.count
        assert await server.count(by=3) == 5  # a trio task may call it, too

    once = handler(add)
    assert handler(once) is once
    assert handler({"add": once}) == {"add": once}
    assert (once.__name__, inspect.signature(once)) == ("add", inspect.signature(add))


def test_what_is_no_handler() -> None:
    with pytest.raises(TypeError, match="neither a handler"):
        handler(3)  # type: ignore[type-var]


async def test_comm_handlers(where: str) -> None:
    journal = Journal()

    async def talk(comm: Comm, times: int) -> None:
        assert isinstance(comm, Comm)
        try:
            async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
                for n in range(times):
                    tasks.create_task(comm.write(n))  # any number of tasks may write
                await comm.write(await comm.read())
        finally:
            journal.append("ended")

    async with serving({"talk": talk}, where) as (server, remote):
        async with remote.talk.stream(times=3) as stream:
            await stream.send("hello")
            assert sorted([await stream.receive() for _ in range(4)], key=str) == [0, 1, 2, "hello"]
        async with remote.talk.stream(times=0):
            pass  # it waits for us, and is cancelled
        await journal.has("ended")
        # Dask's own way, on a bare comm.
        async with await connect(server.address) as comm:
            await comm.write({"op": "talk", "times": 1, "reply": False})
            await comm.write("hi")
            assert {await comm.read(), await comm.read()} == {0, "hi"}


async def test_stream_handlers() -> None:
    seen = []
    closed = trio.Event()

    async def note(x: int) -> None:
        await asyncio.sleep(0)
        seen.append(x)
        if x == 2:
            closed.set()

    async with no_leaks(), open_loop():
        async with (
            Server(stream_handlers=handler({"note": note})) as server,
            await connect(await server.listen("inproc://")) as comm,
        ):
            await comm.write({"op": "connection_stream"})
            await comm.write([{"op": "note", "x": 1}, {"op": "note", "x": 2}])
            await closed.wait()
    assert seen == [1, 2]


# -- what they see -----------------------------------------------------------------------------------------------------------------


async def test_the_request_and_context_variables(where: str) -> None:
    async def look() -> tuple[Any, ...]:
        before = variable.get()
        variable.set("of a request")
        await asyncio.sleep(0)
        request = asyncio_request()
        return before, current_request().op, request.op, request.running, request.shutdown_requested.is_set()

    async with serving({"look": look}, where) as (_, remote):
        for _ in range(2):
            assert tuple(await remote.look()) == ("unset", "look", "look", True, False)


async def test_shutdown_is_seen(where: str) -> None:
    async def until_shutdown() -> AsyncIterator[str]:
        yield "working"
        await asyncio_request().shutdown_requested.wait()
        yield "goodbye"

    async with serving({"until_shutdown": until_shutdown}, where) as (server, remote):
        async with remote.until_shutdown.stream() as stream:
            assert await stream.receive() == "working"
            server.stop(5)
            assert [item async for item in stream] == ["goodbye"]


async def test_asyncio_libraries_in_handlers(where: str) -> None:
    queue: asyncio.Queue[str] = asyncio.Queue()

    async def consume() -> list[str]:
        async with asyncio.timeout(20):
            return list(await asyncio.gather(queue.get(), queue.get()))

    async def produce(text: str) -> str:
        await queue.put(text)
        return await asyncio.get_running_loop().run_in_executor(None, str.upper, text)

    async with serving({"consume": consume, "produce": produce}, where) as (_, remote):
        found: list[Any] = []

        async def call() -> None:
            found.extend(await remote.consume())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            assert [await remote.produce(text="a"), await remote.produce(text="b")] == ["A", "B"]
        assert found == ["a", "b"]


async def test_calls_out_of_handlers(where: str) -> None:
    """A handler of asyncio's flavour calls a server with aio.rpc, in the same trio run."""
    from trio_dcore import aio

    async def through(address: str, x: int) -> int:
        async with aio.rpc(address) as remote:
            return await remote.add(x=x, y=1)

    async def later(address: str) -> None:
        async with aio.rpc(address) as remote:
            await remote.work()

    journal = Journal()
    async with serving({"add": add, "through": through, "later": later, "work": journal.work}, where) as (server, remote):
        assert await remote.through(address=server.address, x=1) == 2
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(remote.later, address=server.address))
            await journal.has("started")
            nursery.cancel_scope.cancel()
        await journal.has("finally")
        assert journal == ["started", "cancelled", "finally"]


# -- errors and cancellation -------------------------------------------------------------------------------------------------------


async def test_errors(where: str) -> None:
    async def fail(error: type[Exception]) -> None:
        raise error("nope")

    async def group(n: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(n):
                tasks.create_task(fail(ValueError))

    async def own_cancel() -> None:
        raise asyncio.CancelledError

    async def ticks() -> AsyncIterator[int]:
        yield 1
        raise ValueError("nope")

    handlers = {"value": lambda: fail(ValueError), "group": group, "own_cancel": own_cancel, "ticks": ticks, "add": add}
    async with serving(handlers, where) as (_, remote):
        with pytest.raises(ValueError, match="^nope$") as caught:
            await remote.value()
        assert isinstance(caught.value, RemoteError)
        assert "in fail" in caught.value.remote_traceback
        with pytest.raises(ValueError, match="^nope$"):
            await remote.group(n=1)
        with pytest.raises(ExceptionGroup) as several:
            await remote.group(n=2)
        assert [str(error) for error in several.value.exceptions] == ["nope", "nope"]
        with pytest.raises(RuntimeError, match="asyncio.CancelledError that nobody"):
            await remote.own_cancel()
        async with remote.ticks.stream() as stream:
            assert await stream.receive() == 1
            with pytest.raises(ValueError, match="^nope$"):
                await stream.receive()
        assert await remote.add(x=1) == 1


async def test_wrong_arguments(where: str) -> None:
    async def ticks(n: int) -> AsyncIterator[int]:
        yield n

    def plain(n: int) -> int:
        return n

    async def fits(n: int) -> None:
        raise TypeError("of its own")

    async with serving({"add": add, "ticks": ticks, "plain": plain, "fits": fits}, where) as (_, remote):
        for op, arguments in ("add", {"x": 1}), ("plain", {"n": 1}):
            with pytest.raises(
                TypeError, match=r"^wrong arguments: .* unexpected keyword argument 'nonsense'; the handler is .*\("
            ):
                await remote[op](**arguments, nonsense=2)
        with pytest.raises(TypeError, match="wrong arguments: missing a required argument: 'n'"):
            async with remote.ticks.stream() as stream:
                await stream.receive()
        with pytest.raises(TypeError, match="^of its own$"):
            await remote.fits(n=1)
        with pytest.raises(TypeError, match="use .stream"):
            await remote.ticks(n=1)


async def test_a_missing_loop_is_a_clear_error(where: str) -> None:
    async def ticks() -> AsyncIterator[int]:
        yield 1

    async with no_leaks(), Server(handler({"add": add, "plain": lambda: 1, "ticks": ticks})) as server:
        async with rpc(await server.listen(where)) as remote:
            for op in "add", "plain":
                with pytest.raises(
                    RemoteError, match=r"put `async with trio_dcore\.aio\.open_loop\(\):` round this, and round the"
                ):
                    await remote[op]()
            async with remote.ticks.stream() as stream:
                with pytest.raises(RemoteError, match="open_loop"):
                    await stream.receive()


async def test_a_call_that_is_cancelled_cancels_the_handler(where: str) -> None:
    journal = Journal()
    async with serving({"work": journal.work, "add": add}, where) as (server, remote):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(remote.work, cleanup=0.05))
            await journal.has("started")
            nursery.cancel_scope.cancel()
        await journal.has("finally")
        assert journal == ["started", "cancelled", "finally"]
        assert await remote.add(x=1) == 1
        assert server.statistics().in_flight == 0


async def test_a_deadline_reaches_the_handler(autojump_clock: trio.testing.MockClock) -> None:
    journal = Journal()
    async with serving({"work": journal.work}) as (_, remote):
        with trio.move_on_after(1) as scope:
            await remote.work()
        assert scope.cancelled_caught
        await journal.has("finally")
    assert journal == ["started", "cancelled", "finally"]


async def test_a_stop_gives_its_grace_and_then_cancels(autojump_clock: trio.testing.MockClock) -> None:
    journal = Journal()
    ended: list[object] = []
    async with serving({"work": journal.work}, grace=5) as (server, remote):

        async def call(seconds: float) -> None:
            try:
                ended.append(await remote.work(seconds=seconds))
            except HandlerCancelled as error:
                ended.append(error.reason)

        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, 2)
            nursery.start_soon(call, 20)
            await journal.has("started")
            server.stop()
        await server.finished()
        assert trio.current_time() - start == pytest.approx(5, abs=0.1)
    assert ended == ["done", "grace over"]
    assert journal == ["started", "started", "finally", "cancelled", "finally"]


async def test_a_handler_that_swallows_its_cancellation(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is cancelled again, and named; its result is not sent."""
    cancelled = []

    async def stubborn() -> str:
        for _ in range(3):
            try:
                await asyncio.sleep(1e6)
            except asyncio.CancelledError:
                cancelled.append(trio.current_time() - start)
        return "a result"

    async with serving({"stubborn": stubborn}, redeliver=2) as (server, remote):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def call() -> None:
                with pytest.raises(HandlerCancelled, match="grace over"):
                    await remote.stubborn()

            await trio.sleep(1)
            start = trio.current_time()
            server.stop(0.5)
        await server.finished()
    assert cancelled == pytest.approx([0.5, 2.5, 4.5])
    of_the_bridge = [line for line in loud(caplog) if line.startswith("the bridge waits for an asyncio task that does not end")]
    assert len(of_the_bridge) == 2
    assert all("stubborn" in line.splitlines()[0] and "in stubborn" in line for line in of_the_bridge)


async def test_a_stream_that_is_left_ends_its_generator(where: str) -> None:
    journal = Journal()
    async with serving({"ticks": journal.ticks}, where) as (_, remote):
        async with remote.ticks.stream() as stream:
            async for item in stream:
                if item == 3:
                    break
        await journal.has("ticks ended")
        assert journal == ["ticks ended"]


async def test_the_bridge_closes_under_a_server(autojump_clock: trio.testing.MockClock) -> None:
    """The server outlives the loop: its handlers are cancelled, their callers told."""
    journal = Journal()
    errors = []
    async with no_leaks():
        async with open_loop():
            loop = asyncio.get_running_loop()
            server = Server(handler({"work": journal.work}))
            await server.__aenter__()
            address = await server.listen("inproc://")
            async with rpc(address) as remote, trio.open_nursery() as nursery:

                @nursery.start_soon
                async def call() -> None:
                    try:
                        await remote.work()
                    except RemoteError as error:
                        errors.append(str(error))

                await journal.has("started")
                for task in asyncio.all_tasks(loop):
                    task.cancel("by somebody else")
            await server.__aexit__(None, None, None)
    assert len(errors) == 1
    assert "asyncio.CancelledError that nobody" in errors[0]


# -- plain trio-asyncio, sweeps ----------------------------------------------------------------------------------------------------


async def test_in_a_loop_of_trio_asyncios_own() -> None:
    open_loop()  # imports it, as it has to be
    import trio_asyncio

    async def talk(comm: Comm) -> None:
        await comm.write(await comm.read() + 1)

    async def wait(awaitable: Awaitable[None]) -> None:
        await awaitable

    async with no_leaks(), trio_asyncio.open_loop():
        assert await run_asyncio(add, 1, 2) == 3
        async with Server(handler({"add": add, "talk": talk})) as server, rpc(await server.listen("inproc://")) as remote:
            assert await remote.add(x=1, y=2) == 3
            async with remote.talk.stream() as stream:
                await stream.send(41)
                assert await stream.receive() == 42


async def test_calls_cancelled_at_every_step(autojump_clock: trio.testing.MockClock) -> None:
    journal = Journal()

    async def talk(comm: Comm) -> None:
        journal.append("talk started")
        try:
            while True:
                await comm.write(await comm.read())
        finally:
            journal.append("talk ended")

    async with open_loop(), Server(handler({"work": journal.work, "ticks": journal.ticks, "talk": talk, "add": add})) as server:
        address = await server.listen("inproc://")

        async def scenario() -> None:
            async with rpc(address) as remote:
                assert await remote.add(x=1, y=2) == 3
                assert await remote.work(seconds=0.1, cleanup=0.1) == "done"
                async with remote.ticks.stream(n=2, interval=0.1) as stream:
                    assert [item async for item in stream] == [0, 1]
                async with remote.talk.stream() as stream:
                    await stream.send(1)
                    assert await stream.receive() == 1

        async def works() -> None:
            async with rpc(address) as remote:
                assert await remote.add(x=1, y=2) == 3
            with trio.fail_after(60):
                while server.statistics().in_flight:  # noqa: ASYNC110  # nobody tells of that
                    await trio.sleep(0.01)
            assert journal.count("started") == journal.count("finally")
            assert journal.count("talk started") == journal.count("talk ended")
            assert asyncio.all_tasks() == set()
            journal.clear()

        assert await cancel_sweep(scenario, check=works) > 30


async def test_what_is_for_trio_says_so_in_asyncio_code() -> None:
    async def mixed_up() -> None:
        await run_asyncio(add, 1, 2)

    async with no_leaks(), open_loop():
        with pytest.raises(LocalProtocolError, match="called from asyncio code: .* here add can be awaited itself"):
            await run_asyncio(mixed_up)


async def test_send_recv_from_a_bare_comm(where: str) -> None:
    async with serving({"add": add}, where) as (server, _), await connect(server.address) as comm:
        assert await send_recv(comm, op="add", x=1, y=2) == 3
