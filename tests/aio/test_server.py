"""trio_dcore.aio._server: servers in asyncio programs."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from typing import Any

import pytest
import trio

from tests.aio.running import Runner
from trio_dcore import aio
from trio_dcore.aio import (
    HandlerCancelled,
    LocalProtocolError,
    NotAllowed,
    Server,
    ServerClosing,
    Status,
    current_request,
    in_thread,
    rpc,
    run_to_end,
)

TCP = "tcp://127.0.0.1:0"
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


class Journal:
    """A handler that waits, and what becomes of it."""

    def __init__(self, cleanup: float = 0.0) -> None:
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.cleanup = cleanup
        self.log: list[str] = []

    async def __call__(self, seconds: float = 3600) -> str:
        try:
            self.begun.set()
            await asyncio.sleep(seconds)
            return "done"
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise
        finally:
            await asyncio.sleep(self.cleanup)
            self.log.append("finally")
            self.ended.set()


# -- handlers --------------------------------------------------------------------------------------------------------------------------


def test_kinds_of_handlers(run: Runner) -> None:
    async def coroutine(x: int) -> Any:
        await asyncio.sleep(0)
        return x, asyncio.current_task() is not None

    async def generator(n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    def later(x: int) -> Any:
        return asyncio.ensure_future(coroutine(x))

    def blocking() -> bool:
        return threading.current_thread() is threading.main_thread()

    class Callable_:
        async def __call__(self, x: int) -> int:
            await asyncio.sleep(0)
            return -x

        def method(self, x: int) -> int:
            return x * x

    async def main() -> None:
        handlers: dict[str, Callable[..., Any]] = {
            "plain": lambda x: x + 1,
            "coroutine": coroutine,
            "lambda_": lambda x: coroutine(x),
            "later": later,
            "instance": Callable_(),
            "method": Callable_().method,
            "partial": functools.partial(coroutine, 7),
            "generator": generator,
            "made": lambda n: generator(n),
            "in_thread": in_thread(blocking),
        }
        async with Server(handlers) as server, rpc(await server.listen(TCP)) as remote:
            assert await remote.plain(x=1) == 2
            assert await remote.coroutine(x=1) == (1, True)
            assert await remote.lambda_(x=2) == (2, True)
            assert await remote.later(x=3) == (3, True)
            assert await remote.instance(x=3) == -3
            assert await remote.method(x=3) == 9
            assert await remote.partial() == (7, True)
            assert await remote.in_thread() is False
            for op in ("generator", "made"):
                async with remote[op].stream(n=4) as stream:
                    assert [item async for item in stream] == [0, 1, 2, 3]
            with pytest.raises(TypeError, match="use .stream"):
                await remote.generator(n=1)
            assert await remote.identity() == {"type": "Server", "id": server.id}
            assert server.dump_state(exclude=["id"])["status"] == "running"

    run(main)


def test_plain_handlers_may_start_asyncio_tasks(run: Runner) -> None:
    done = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def work() -> None:
        await asyncio.sleep(0)
        done.set()

    def begin() -> bool:
        assert asyncio.get_running_loop().is_running()
        tasks.append(asyncio.create_task(work()))
        return True

    async def main() -> None:
        # The second time with trio_asyncio imported, which replaces some of asyncio's functions.
        for _ in range(2):
            async with Server({"begin": begin}) as server, rpc(await server.listen(TCP)) as remote:
                assert await remote.begin()
                await done.wait()
                await tasks.pop()
                done.clear()
            pytest.importorskip("trio_asyncio")

    run(main)


def test_errors_of_handlers(run: Runner) -> None:
    async def deep() -> None:
        raise ValueError("deep")

    async def group() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(deep())
            await asyncio.sleep(3600)

    async def cancels_itself() -> None:
        raise asyncio.CancelledError

    async def main() -> None:
        async with Server({"deep": deep, "group": group, "cancels_itself": cancels_itself}) as server:
            async with rpc(await server.listen(TCP)) as remote:
                with pytest.raises(ValueError, match="deep") as caught:
                    await remote.deep()
                assert 'raise ValueError("deep")' in str(caught.value.remote_traceback)
                with pytest.raises(ValueError, match="deep"):  # a group of one is that one
                    await remote.group()
                with pytest.raises(RuntimeError, match="nobody on the other side"):
                    await remote.cancels_itself()
                assert await remote.echo(data=1) == 1

    run(main)


def test_a_generator_is_driven_in_one_task(run: Runner) -> None:
    tasks: list[Any] = []
    values: list[str] = []
    done = asyncio.Event()

    async def generator() -> AsyncIterator[int]:
        try:
            variable.set("mine")
            async with asyncio.timeout(30), asyncio.TaskGroup():
                while True:
                    tasks.append(asyncio.current_task())
                    yield len(tasks)
        finally:
            tasks.append(asyncio.current_task())
            values.append(variable.get())
            done.set()

    async def main() -> None:
        async with Server({"generator": generator}) as server, rpc(await server.listen(TCP)) as remote:
            async with remote.generator.stream() as stream:
                for n in range(1, 40):
                    assert await stream.receive() == n
            await done.wait()

    run(main)
    assert len(tasks) > 39
    assert len(set(tasks)) == 1
    assert values == ["mine"]


def test_comm_handlers(run: Runner) -> None:
    async def double(comm: aio.Comm) -> None:
        assert isinstance(comm, aio.Comm)
        async for item in comm:
            await comm.write(item * 2)

    async def main() -> None:
        async with Server({"double": double}) as server, rpc(await server.listen(TCP)) as remote:
            async with remote.double.stream() as stream:
                for n in range(20):
                    await stream.send(n)
                    assert await stream.receive() == 2 * n
                await stream.send_eof()
                assert [item async for item in stream] == []

    run(main)


def test_the_request_and_its_context(run: Runner) -> None:
    waiting = asyncio.Event()

    async def about() -> Any:
        request = current_request()
        assert "about" in repr(request)
        left = request.deadline - asyncio.get_running_loop().time()
        value = variable.get()
        variable.set("handler's")
        child = asyncio.create_task(ask())
        return request.op, request.peer.kind, request.running, left, value, await child

    async def ask() -> str:
        return current_request().op

    async def until_shutdown() -> AsyncIterator[str]:
        requested = current_request().shutdown_requested
        assert not requested.is_set()
        waiting.set()
        yield "waiting"
        await requested.wait()
        assert requested.is_set()
        await requested.wait()
        yield "shutting down"

    async def main() -> None:
        variable.set("main's")
        async with Server({"about": about, "until_shutdown": until_shutdown}) as server, rpc(await server.listen(TCP)) as remote:
            for _ in range(2):
                assert await remote.about() == ("about", "loopback", True, float("inf"), "main's", "about")
            async with aio.open_trio() as portal:

                async def with_deadline() -> Any:
                    with trio.move_on_after(60):
                        return await remote.about._native()

                _, _, _, left, *_ = await portal.run(with_deadline)
                assert 50 < left < 61
            with pytest.raises(LocalProtocolError):
                current_request()
            async with remote.until_shutdown.stream() as stream:
                assert await stream.receive() == "waiting"
                server.stop()
                assert [item async for item in stream] == ["shutting down"]

    run(main)


def test_handlers_are_looked_up_for_each_request(run: Runner) -> None:
    async def main() -> None:
        async with Server() as server, rpc(await server.listen(TCP)) as remote:
            server.handlers["f"] = lambda: 1
            assert await remote.f() == 1
            server.handlers["f"] = lambda: 2
            assert await remote.f() == 2
            server.blocked_handlers.add("f")
            with pytest.raises(NotAllowed):
                await remote.f()
            server.blocked_handlers = set()
            del server.handlers["f"]
            with pytest.raises(aio.UnknownOp):
                await remote.f()
            server.handlers = {"f": lambda: 3}
            assert await remote.f() == 3
            assert server.statistics().requests["f"] == 3
            assert server.get_connection_counters()["incoming_comms_open"] == 1

    run(main)


def test_who_may_call(run: Runner) -> None:
    async def main() -> None:
        async with Server({"a": int, "b": int}, authorize=lambda peer, op: op == "a", blocked_handlers=["echo"]) as server:
            async with rpc(await server.listen(TCP)) as remote:
                assert await remote.a() == 0
                for op in ("b", "echo"):
                    with pytest.raises(NotAllowed):
                        await remote[op]()

    run(main)


# -- who waits for the answer ----------------------------------------------------------------------------------------------------------


def test_the_handler_ends_when_its_caller_goes(run: Runner) -> None:
    async def main() -> None:
        journal, stays = Journal(cleanup=0.01), Journal()
        async with Server({"wait": journal, "stays": run_to_end(stays)}) as server:
            address = await server.listen(TCP)
            comm = await aio.connect(address)
            await comm.write({"op": "wait", "reply": True})
            await journal.begun.wait()
            comm.abort()
            await journal.ended.wait()
            assert journal.log == ["cancelled", "finally"]
            comm = await aio.connect(address)
            await comm.write({"op": "stays", "seconds": 0.05, "reply": True})
            await stays.begun.wait()
            comm.abort()
            await stays.ended.wait()
            assert stays.log == ["finally"]

    run(main)


# -- life ------------------------------------------------------------------------------------------------------------------------------


def test_ways_to_begin_and_to_end(run: Runner) -> None:
    async def main() -> None:
        server = Server({"add": lambda x, y: x + y}, name="adder")
        assert (server.status, server.name, server.addresses) == (Status.init, "adder", ())
        assert await server is server
        assert await server.start() is server
        assert server.status is Status.running
        await server.listen(TCP)
        await server.listen(("127.0.0.1", 0))
        assert server.address == server.addresses[0]
        assert server.host == "127.0.0.1"
        assert f":{server.port}" in server.address
        assert len(server.listeners) == 2
        assert "adder" in server.id
        assert "running" in repr(server)
        await server.close()
        await server.close()
        await server.aclose()
        server.stop()
        await server.finished()
        assert server.status is Status.closed
        with pytest.raises(LocalProtocolError, match="make a new one"):
            await server.listen(TCP)
        assert not trio.lowlevel.in_trio_run()
        # listen() starts it, as Dask's.
        server = Server({"add": lambda x, y: x + y})
        await server.listen(0)
        async with rpc(("127.0.0.1", server.port)) as remote:
            assert await remote.add(x=1, y=2) == 3
        async with server:  # which it is already
            pass
        # Never started.
        server = Server()
        server.stop()
        await server.close()
        await server.finished()
        with pytest.raises(LocalProtocolError, match="serves once"):
            await server

    run(main)


def test_wrong_arguments_are_refused(run: Runner) -> None:
    async def main() -> None:
        for wrong in ({"grace": -1}, {"connection_limit": 0}):
            with pytest.raises(ValueError, match="must be"):
                Server(**wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            Server({"f": 1})  # type: ignore[dict-item]
        with pytest.raises(TypeError):
            Server(nonsense=1)  # type: ignore[call-arg]

    run(main)


def test_the_end_of_the_block_gives_handlers_their_grace(run: Runner) -> None:
    async def main() -> None:
        journal = Journal()
        async with Server({"wait": journal}, grace=20) as server:
            remote = rpc(await server.listen(TCP))
            call = asyncio.create_task(remote.wait(seconds=0.05))
            await journal.begun.wait()
            before = time.monotonic()
        assert 0.03 < time.monotonic() - before < 5
        assert await call == "done"
        assert journal.log == ["finally"]
        await remote.close_rpc()

    run(main)


def test_when_the_grace_is_over(run: Runner) -> None:
    async def main() -> None:
        journal = Journal(cleanup=0.02)
        async with Server({"wait": journal}, grace=0.05) as server:
            remote = rpc(await server.listen(TCP))
            call = asyncio.create_task(remote.wait())
            await journal.begun.wait()
        assert journal.log == ["cancelled", "finally"]
        with pytest.raises(HandlerCancelled, match="grace over"):
            await call
        await remote.close_rpc()

    run(main)


@pytest.mark.parametrize("how", ["error", "cancel"])
def test_an_error_in_the_block_stops_it_now(run: Runner, how: str) -> None:
    async def main() -> None:
        journal = Journal(cleanup=0.02)
        calls: list[asyncio.Task[Any]] = []
        remotes: list[rpc] = []

        async def block() -> None:
            async with Server({"wait": journal}, grace=1000) as server:
                remotes.append(rpc(await server.listen(TCP)))
                calls.append(asyncio.create_task(remotes[0].wait()))
                await journal.begun.wait()
                if how == "error":
                    raise KeyError
                task.cancel()
                await server.finished()

        task = asyncio.create_task(block())
        with pytest.raises(KeyError if how == "error" else asyncio.CancelledError):
            await task
        assert journal.log == ["cancelled", "finally"]
        with pytest.raises(HandlerCancelled, match="server cancelled"):
            await calls[0]
        await remotes[0].close_rpc()

    run(main)


def test_cancelled_while_it_closes(run: Runner) -> None:
    async def main() -> None:
        journal = Journal(cleanup=0.02)

        async def block() -> None:
            async with Server({"wait": journal}, grace=1000) as server:
                servers.append(server)
                address.set_result(await server.listen(TCP))
                await journal.begun.wait()

        servers: list[Server] = []
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(block())
        remote = rpc(await address)
        call = asyncio.create_task(remote.wait())
        while servers[0].status is Status.running:  # noqa: ASYNC110  # there is no event
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert servers[0].status is Status.closed
        assert journal.log == ["cancelled", "finally"]
        with pytest.raises((HandlerCancelled, aio.CommClosedError)):
            await call
        await remote.close_rpc()

    run(main)


def test_a_handler_closes_its_own_server(run: Runner) -> None:
    async def main() -> None:
        async def close() -> str:
            await server.close()
            return "closing"

        async with Server({"close": close}) as server:
            async with rpc(await server.listen(TCP)) as remote:
                assert await remote.close() == "closing"
                await server.finished()
                with pytest.raises((ServerClosing, aio.ConnectError)):
                    await remote.close()

    run(main)


def test_a_start_that_fails(run: Runner) -> None:
    class Broken(Server):
        async def start_unsafe(self) -> Server:
            await super().start_unsafe()
            await self.listen(TCP)
            raise KeyError("start")

    async def main() -> None:
        server = Broken()
        with pytest.raises(KeyError):
            async with server:
                raise AssertionError
        assert server.status is Status.closed
        async with Server() as first:
            await first.listen(TCP)
            async with Server() as second:
                with pytest.raises(OSError, match="in use"):
                    await second.listen(first.address)
                assert second.status is Status.running

    run(main)


def test_cancelled_while_it_starts(run: Runner) -> None:
    async def main() -> None:
        for passes in range(12):
            server = Server()
            task = asyncio.create_task(server.start())
            for _ in range(passes):
                await asyncio.sleep(0)
            if task.cancel():
                await asyncio.wait([task])
            if task.cancelled():
                assert server.status in (Status.init, Status.closed, Status.failed)
            else:
                await (await task).close()

    run(main)


def test_subclasses_as_dasks(run: Runner) -> None:
    class Counter(Server):
        default_port = 0

        def __init__(self) -> None:
            self.count = 0
            self.log: list[str] = []
            super().__init__({"increment": self.increment, "peek": self.peek}, stream_handlers={"add": self.add})
            self.handlers["late"] = self.late

        async def start_unsafe(self) -> Counter:
            await super().start_unsafe()
            await self.listen(TCP)
            self.log.append("started")
            return self

        async def increment(self, by: int = 1) -> int:
            await asyncio.sleep(0)
            self.count += by
            return self.count

        def peek(self) -> int:
            return self.count

        def late(self) -> str:
            return "late"

        def add(self, value: int) -> None:
            self.count += value

        async def close(self, timeout: float | None = None, reason: str = "") -> None:
            self.log.append("closing")
            await super().close(timeout, reason)

    async def main() -> None:
        async with Counter() as counter:
            async with rpc(counter.address) as remote:
                assert await remote.increment(by=3) == 3
                assert await remote.peek() == 3
                assert await remote.late() == "late"
                assert (await remote.identity())["type"] == "Counter"
            comm = await aio.connect(counter.address)
            await comm.write({"op": "connection_stream", "reply": False})
            await comm.write([{"op": "add", "value": 2}, {"op": "add", "value": 5}, {"op": "close-stream"}])
            while counter.count != 10:  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0.001)
            await comm.close()
        assert counter.log == ["started", "closing"]

    run(main)


class _StartsNothing(Server):
    async def start_unsafe(self) -> _StartsNothing:
        return self


class _ClosesNothing(Server):
    async def close(self, timeout: float | None = None, reason: str = "") -> None:
        pass


class _FailsToClose(Server):
    async def close(self, timeout: float | None = None, reason: str = "") -> None:
        raise KeyError("close")


@pytest.mark.parametrize("kind", [_StartsNothing, _ClosesNothing, _FailsToClose])
def test_subclasses_that_forget_super(run: Runner, kind: type[Server]) -> None:
    """The block starts and ends the server nevertheless."""

    async def main() -> None:
        for listening in (False, True):
            server = kind()
            with pytest.raises(KeyError, match="close") if kind is _FailsToClose else nullcontext():
                async with server:
                    if listening:
                        remote = rpc(await server.listen(TCP))
                        assert await remote.echo(data=1) == 1
                        remote.close_comms()
                    assert server.status is Status.running
            assert server.status is Status.closed
            await server.finished()

    run(main)


def test_a_stream_handler_of_ones_own(run: Runner) -> None:
    class Streaming(Server):
        def __init__(self) -> None:
            super().__init__({"feed": self.feed})
            self.stream_handlers.update({"item": self.item, "bad": self.bad})
            self.seen: list[Any] = []
            self.ended = asyncio.Event()

        async def feed(self, comm: aio.Comm, tag: str) -> None:
            await self.handle_stream(comm, extra={"tag": tag})
            self.ended.set()

        async def item(self, value: int, tag: str) -> None:
            await asyncio.sleep(0)
            self.seen.append((tag, value))

        async def bad(self, tag: str) -> None:
            raise ValueError(tag)

    run.loud = True

    async def main() -> None:
        async with Streaming() as server, await aio.connect(await server.listen(TCP)) as comm:
            await comm.write({"op": "feed", "tag": "t", "reply": False})
            async with aio.BatchedSend(comm) as stream:
                stream.send({"op": "item", "value": 1}, {"op": "bad"}, {"op": "item", "value": 2}, {"op": "close-stream"})
            await server.ended.wait()
            assert server.seen == [("t", 1), ("t", 2)]

    run(main)
    assert [r.getMessage().partition(" for a message")[0] for r in run.log.records if r.levelno > logging.INFO] == [
        "the stream handler 'bad' failed"
    ]


def test_servers_that_call_each_other(run: Runner) -> None:
    async def main() -> None:
        journal = Journal()
        async with Server({"wait": journal, "add": lambda x, y: x + y}) as inner:
            address = await inner.listen(TCP)

            async def forward(op: str, **kwargs: Any) -> Any:
                return await outer.rpc(address)[op](**kwargs)

            async def forward_add(x: int, y: int) -> Any:
                return await forward("add", x=x, y=y)

            async def forward_wait() -> Any:
                return await forward("wait")

            async with Server({"add": forward_add, "wait": forward_wait}) as outer, rpc(await outer.listen(TCP)) as remote:
                assert await remote.add(x=1, y=2) == 3
                assert outer.rpc.open == 1
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await remote.wait()
                await journal.ended.wait()  # the cancellation went all the way
            assert outer.rpc.closed

    run(main)


def test_the_pool_of_a_server(run: Runner) -> None:
    async def main() -> None:
        async with Server({"add": lambda x, y: x + y}) as inner:
            address = await inner.listen(TCP)
            # Of one that never serves, of one that is started later, and of one that runs.
            never = Server()
            assert await never.rpc(address).add(x=1, y=2) == 3
            await never.close()
            assert never.rpc.closed
            late = Server()
            assert await late.rpc(address).add(x=1, y=2) == 3
            async with late:
                assert await late.rpc(address).add(x=1, y=2) == 3
            assert late.rpc.closed
        assert not trio.lowlevel.in_trio_run()

    run(main)


def test_system_exit_in_a_handler_ends_the_program(run: Runner) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    log: list[str] = []

    async def main() -> None:
        try:
            async with Server({"leave": leave}) as server, rpc(await server.listen(TCP)) as remote:
                await asyncio.gather(remote.leave(), asyncio.sleep(3600), return_exceptions=True)
        finally:
            log.append("out")

    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 3
    assert log == ["out"]


def test_many_at_once(run: Runner) -> None:
    async def slow(n: int) -> int:
        await asyncio.sleep(0.001 * (n % 7))
        return n

    async def main() -> None:
        async with Server({"slow": slow}) as server, rpc(await server.listen(TCP)) as remote:
            assert await asyncio.gather(*[remote.slow(n=n) for n in range(200)]) == list(range(200))

    run(main)
