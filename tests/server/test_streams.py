"""Handlers that give many answers: async generators above all."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_dcore import CommClosedError, HandlerCancelled, LimitExceeded, Limits, RemoteError, SerializationError, Server, connect
from trio_dcore.protocol._envelope import END, KEY, PING, PONG, REPLY
from trio_dcore.server._streams import generate
from trio_dcore.testing import cancel_sweep, memory_network


async def echo(x: Any = None) -> Any:
    return x


class Sink:
    """Takes items, until told to fail."""

    def __init__(self, fail_at: int | None = None, error: Callable[[], BaseException] = lambda: CommClosedError("gone")) -> None:
        self.items: list[Any] = []
        self.fail_at = fail_at
        self.error = error

    async def __call__(self, item: Any) -> None:
        await trio.lowlevel.checkpoint()
        if self.fail_at is not None and len(self.items) >= self.fail_at:
            raise self.error()
        self.items.append(item)


class TestGenerate:
    """The rules of architecture, section 3.1, 'Generators'."""

    async def run(self, generator: Any, sink: Any) -> None:
        await generate(generator, copy_context(), sink, None)

    async def test_items_in_order(self) -> None:
        async def count() -> AsyncIterator[int]:
            for i in range(3):
                yield i

        sink = Sink()
        await self.run(count(), sink)
        assert sink.items == [0, 1, 2]

    async def test_nothing(self) -> None:
        async def nothing() -> AsyncIterator[int]:
            return
            yield

        sink = Sink()
        await self.run(nothing(), sink)
        assert sink.items == []

    async def test_what_ends_the_emitting_is_thrown_in_at_the_yield(self) -> None:
        seen: list[BaseException] = []

        async def count() -> AsyncIterator[int]:
            yield 0
            try:
                yield 1
            except BaseException as error:
                seen.append(error)
                raise

        with pytest.raises(CommClosedError, match="gone") as caught:
            await self.run(count(), Sink(1))
        assert seen == [caught.value]

    async def test_it_may_be_exchanged_for_another(self) -> None:
        async def count() -> AsyncIterator[int]:
            try:
                yield 0
            except CommClosedError as error:
                raise ValueError("exchanged") from error

        with pytest.raises(ValueError, match="exchanged"):
            await self.run(count(), Sink(0))

    async def test_it_may_be_swallowed_at_the_end(self) -> None:
        async def count() -> AsyncIterator[int]:
            try:
                yield 0
            except CommClosedError:
                pass

        await self.run(count(), Sink(0))

    async def test_who_yields_on_is_ended_with_its_finally(self) -> None:
        trace: list[str] = []

        async def stubborn() -> AsyncIterator[int]:
            try:
                while True:
                    try:
                        yield 0
                    except CommClosedError:
                        trace.append("swallowed")
            finally:
                await trio.lowlevel.checkpoint()
                trace.append("finally")

        sink = Sink(2)
        await self.run(stubborn(), sink)
        assert sink.items == [0, 0]
        assert trace == ["swallowed", "finally"]

    async def test_who_yields_even_then_is_wrong(self) -> None:
        async def hopeless() -> AsyncIterator[int]:
            for _ in range(3):
                try:
                    yield 0
                except BaseException:
                    pass
            yield 1  # where the garbage collector may end it

        with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
            await self.run(hopeless(), Sink(1))

    async def test_who_can_not_send_one_item_may_send_the_next(self) -> None:
        failed: list[int] = []

        async def try_on() -> AsyncIterator[int]:
            for i in range(4):
                try:
                    yield i
                except SerializationError:
                    failed.append(i)

        class Picky(Sink):
            async def __call__(self, item: Any) -> None:
                if item == 1:
                    raise SerializationError("not this one")
                await super().__call__(item)

        sink = Picky()
        await self.run(try_on(), sink)
        assert sink.items == [0, 2, 3]
        assert failed == [1]

    async def test_a_scope_of_its_own_that_is_over_while_it_is_at_the_yield(self, autojump_clock: Any) -> None:
        async def bounded() -> AsyncIterator[Any]:
            with trio.move_on_after(1) as scope:
                yield "first"
                yield "second"
                raise AssertionError("not reached")
            yield ("cancelled", scope.cancelled_caught)

        class Slow(Sink):
            async def __call__(self, item: Any) -> None:
                if item == "second":
                    await trio.sleep(5)
                self.items.append(item)

        sink = Slow()
        await self.run(bounded(), sink)
        assert sink.items == ["first", ("cancelled", True)]
        assert trio.current_time() == pytest.approx(1)

    async def test_a_nursery_of_its_own_whose_child_fails_while_it_is_at_the_yield(self) -> None:
        async def fail() -> None:
            await blocked.wait()
            raise ValueError("child")

        async def with_nursery() -> AsyncIterator[Any]:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(fail)
                    yield "first"
            except* ValueError as group:
                caught.append(group)
            yield "second"

        class Blocked(Sink):
            async def __call__(self, item: Any) -> None:
                if item == "first":
                    blocked.set()
                    await trio.sleep_forever()
                self.items.append(item)

        blocked = trio.Event()
        caught: list[Any] = []
        sink = Blocked()
        with trio.fail_after(10):
            await self.run(with_nursery(), sink)
        assert sink.items == ["second"]
        assert [str(error) for error in caught[0].exceptions] == ["child"]

    async def test_cancelled_at_the_yield(self) -> None:
        trace: list[str] = []

        async def count() -> AsyncIterator[int]:
            try:
                yield 0
            except trio.Cancelled:
                trace.append("cancelled")
                raise
            finally:
                with trio.CancelScope(shield=True):
                    await trio.lowlevel.checkpoint()
                trace.append("finally")

        async def blocked(item: Any) -> None:
            scope.cancel()
            await trio.sleep_forever()

        with trio.CancelScope() as scope:
            await self.run(count(), blocked)
        assert scope.cancelled_caught
        assert trace == ["cancelled", "finally"]

    @pytest.mark.parametrize("how", ["at the yield", "while it waits"])
    async def test_swallowed_cancelled(self, how: str) -> None:
        """It ends all the same, and the scope round it hears of it."""
        trace: list[str] = []

        async def stubborn() -> AsyncIterator[int]:
            try:
                while True:
                    try:
                        if how == "while it waits":
                            scope.cancel()
                            await trio.sleep_forever()
                        yield 0
                    except trio.Cancelled:
                        trace.append("swallowed")
                        if how == "while it waits":
                            yield 1
            finally:
                trace.append("finally")

        async def blocked(item: Any) -> None:
            scope.cancel()
            await trio.sleep_forever()

        with trio.CancelScope() as scope:
            await self.run(stubborn(), blocked)
        assert scope.cancelled_caught
        assert trace[-1] == "finally"
        assert 1 <= trace.count("swallowed") <= 2

    async def test_swallowed_cancelled_and_ended(self) -> None:
        async def ends() -> AsyncIterator[int]:
            try:
                yield 0
            except trio.Cancelled:
                return

        async def blocked(item: Any) -> None:
            scope.cancel()
            await trio.sleep_forever()

        with trio.CancelScope() as scope:
            await self.run(ends(), blocked)
        assert scope.cancelled_caught

    async def test_a_last_item_from_within_a_shield(self) -> None:
        async def parting() -> AsyncIterator[str]:
            try:
                yield "first"
            finally:
                with trio.CancelScope(shield=True):
                    yield "last words"

        class Cancelling(Sink):
            async def __call__(self, item: Any) -> None:
                if item == "first":
                    scope.cancel()
                await trio.lowlevel.checkpoint()
                self.items.append(item)

        sink = Cancelling()
        with trio.CancelScope() as scope:
            await self.run(parting(), sink)
        assert scope.cancelled_caught
        assert sink.items == ["last words"]

    async def test_raising_in_the_finally(self) -> None:
        async def count() -> AsyncIterator[int]:
            try:
                yield 0
            finally:
                raise ZeroDivisionError("in the finally")

        with pytest.raises(ZeroDivisionError) as caught:
            await self.run(count(), Sink(0))
        assert isinstance(caught.value.__context__, CommClosedError)

    async def test_cancelled_at_every_step(self) -> None:
        entered = left = 0

        async def full() -> AsyncIterator[int]:
            nonlocal entered, left
            entered += 1
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    for i in range(3):
                        await trio.lowlevel.checkpoint()
                        with trio.move_on_after(60):
                            yield i
                    nursery.cancel_scope.cancel()
            finally:
                left += 1

        async def scenario() -> None:
            await self.run(full(), Sink())

        async def check() -> None:
            assert entered == left

        assert await cancel_sweep(scenario, check=check) > 5


@asynccontextmanager
async def with_sibling(serving: Any, handlers: dict[str, Any], where: str, **options: Any) -> AsyncIterator[tuple[Any, Any]]:
    """A server on which another connection's handler runs all the while, and must still be there at the end."""
    started, go = trio.Event(), trio.Event()
    outcome: list[str] = []

    async def sibling() -> None:
        started.set()
        await go.wait()
        outcome.append("done")

    async with serving({**handlers, "sibling": sibling, "echo": echo}, where, **options) as (server, remote):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(remote.sibling))
            await started.wait()
            yield server, remote
            assert await remote.echo(x=1) == 1
            go.set()
    assert outcome == ["done"]


SMALL_WINDOW = Limits(window=2)


class TestThroughTheServer:
    """The same over real connections: siblings live, errors are named."""

    async def test_items_then_an_error(self, where: str, serving: Any) -> None:
        async def fail() -> AsyncIterator[int]:
            for i in range(5):
                yield i
            raise ValueError("after five")

        async with with_sibling(serving, {"fail": fail}, where) as (_server, remote), remote.fail.stream() as stream:
            assert [await stream.receive() for _ in range(5)] == [0, 1, 2, 3, 4]
            for _ in range(2):
                with pytest.raises(ValueError, match="after five") as caught:
                    await stream.receive()
                assert isinstance(caught.value, RemoteError)

    async def test_a_scope_at_the_yield_while_nobody_reads(self, serving: Any, autojump_clock: Any) -> None:
        async def bounded() -> AsyncIterator[Any]:
            with trio.move_on_after(7) as scope:
                while True:
                    yield "item"
            yield ("cancelled", scope.cancelled_caught)

        options = {"patience": 10_000, "client": {"limits": SMALL_WINDOW}}
        async with with_sibling(serving, {"bounded": bounded}, "inproc://", **options) as (_server, remote):
            async with remote.bounded.stream() as stream:
                await trio.sleep(60)
                assert [item async for item in stream] == ["item", "item", ("cancelled", True)]

    async def test_a_nursery_at_the_yield_while_nobody_reads(self, where: str, serving: Any) -> None:
        go = trio.Event()

        async def fail() -> None:
            await go.wait()
            raise ValueError("child")

        async def with_nursery() -> AsyncIterator[Any]:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                while True:
                    yield "item"

        options = {"client": {"limits": SMALL_WINDOW}}
        async with with_sibling(serving, {"with_nursery": with_nursery}, where, **options) as (_server, remote):
            async with remote.with_nursery.stream() as stream:
                await wait_all_tasks_blocked(0.01)
                go.set()
                await wait_all_tasks_blocked(0.01)
                assert [await stream.receive() for _ in range(2)] == ["item", "item"]
                with pytest.raises(ValueError, match="child"):
                    await stream.receive()

    async def test_the_consumer_leaves(self, where: str, serving: Any) -> None:
        """I01: the producer's finally runs in its own task, and what ended the stream is thrown in at the yield."""
        ended = trio.Event()
        trace: list[Any] = []

        async def forever() -> AsyncIterator[int]:
            task = trio.lowlevel.current_task()
            i = 0
            try:
                while True:
                    yield i
                    i += 1
            except BaseException as error:
                trace.append(type(error))
                raise
            finally:
                trace.append(trio.lowlevel.current_task() is task)
                ended.set()

        async with with_sibling(serving, {"forever": forever}, where) as (server, remote):
            async with remote.forever.stream() as stream:
                assert [await stream.receive() for _ in range(3)] == [0, 1, 2]
            await ended.wait()
            assert trace[1] is True
            assert issubclass(trace[0], (trio.Cancelled, CommClosedError))
            while server.statistics().in_flight > 1:
                await trio.lowlevel.checkpoint()

    @pytest.mark.parametrize("how", ["swallows", "swallows all", "raises"])
    async def test_the_consumer_leaves_one_that_behaves_badly(self, how: str, where: str, serving: Any) -> None:
        ended = trio.Event()

        async def bad() -> AsyncIterator[int]:
            try:
                while True:
                    try:
                        yield 0
                    except CommClosedError:
                        if how != "swallows":
                            raise
                    except trio.Cancelled:
                        if how != "swallows all":
                            raise
            finally:
                ended.set()
                if how == "raises":
                    raise ZeroDivisionError("in the finally")

        async with with_sibling(serving, {"bad": bad}, where) as (server, remote):
            async with remote.bad.stream() as stream:
                assert await stream.receive() == 0
            await ended.wait()
            while server.statistics().in_flight > 1:
                await trio.lowlevel.checkpoint()

    async def test_the_consumer_of_bare_messages_leaves(self, where: str, serving: Any) -> None:
        ended = trio.Event()

        async def forever() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield bytes(10_000)
            finally:
                ended.set()

        async with with_sibling(serving, {"forever": forever}, where) as (server, _remote):
            async with await connect(server.address) as comm:
                await comm.write({"op": "forever", "reply": False})
                assert await comm.read() == bytes(10_000)
            await ended.wait()

    async def test_the_server_is_stopped(self, where: str, serving: Any) -> None:
        async def forever() -> AsyncIterator[int]:
            while True:
                yield 0

        options = {"client": {"limits": SMALL_WINDOW}}
        async with serving({"forever": forever}, where, **options) as (server, remote), remote.forever.stream() as stream:
            assert await stream.receive() == 0
            server.stop(0)
            await server.finished()
            with pytest.raises((HandlerCancelled, CommClosedError)):
                while True:
                    await stream.receive()

    async def test_an_item_that_can_not_be_sent(self, serving: Any) -> None:
        async def mixed() -> AsyncIterator[Any]:
            yield 1
            try:
                yield (i for i in ())
            except SerializationError:
                yield "refused"

        async with with_sibling(serving, {"mixed": mixed}, "tcp://127.0.0.1:0") as (server, remote):
            async with remote.mixed.stream() as stream:
                assert [item async for item in stream] == [1, "refused"]
            async with await connect(server.address) as comm:
                await comm.write({"op": "mixed"})
                assert [await comm.read() for _ in range(3)] == [1, "refused", None]

    async def test_a_comm_handler_on_a_stream(self, where: str, serving: Any) -> None:
        async def upper(comm: Any) -> str:
            async for word in comm:
                await comm.send(word.upper())
            await comm.write("end")
            return "dropped"

        async with with_sibling(serving, {"upper": upper}, where) as (server, remote):
            for _ in range(2):
                async with remote.upper.stream() as stream:
                    for word in ("a", "b"):
                        await stream.send(word)
                        assert await stream.receive() == word.upper()
                    await stream.send_eof()
                    assert [item async for item in stream] == ["end"]
            assert server.statistics().connections == 2

    async def test_the_client_ends_its_side_and_takes_more_than_a_window(self, where: str, serving: Any) -> None:
        async def answer(comm: Any) -> None:
            total = 0
            async for n in comm:
                total += n
            for i in range(50):
                await comm.write((total, i))

        async with with_sibling(serving, {"answer": answer}, where) as (_server, remote), remote.answer.stream() as stream:
            for n in range(40):
                await stream.send(n)
            await stream.send_eof()
            await wait_all_tasks_blocked(0.01)
            assert [item async for item in stream] == [(780, i) for i in range(50)]

    async def test_cancelled_at_every_step(self, where: str, serving: Any) -> None:
        alive = 0

        async def full() -> AsyncIterator[int]:
            nonlocal alive
            alive += 1
            try:
                for i in range(4):
                    with trio.move_on_after(60):
                        yield i
            finally:
                alive -= 1

        async with with_sibling(serving, {"full": full}, where, client={"limits": SMALL_WINDOW}) as (_server, remote):

            async def scenario() -> None:
                async with remote.full.stream() as stream:
                    assert [item async for item in stream] == [0, 1, 2, 3]

            async def check() -> None:
                assert await remote.echo(x=5) == 5
                assert remote.pool.active == 1  # the sibling's
                remote.pool.collect()
                for _ in range(100):
                    if not alive:
                        break
                    await trio.lowlevel.checkpoint()
                assert alive == 0

            assert await cancel_sweep(scenario, check=check) > 3


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The levels of what was logged of connections."""
    return [record.levelname for record in caplog.records if "listens on" not in record.getMessage()]


class TestStalls:
    """``Limits.stream_stall`` bounds what a handler writes, ``write_stall`` what the server writes for it; time is virtual."""

    LIMITS = Limits(stream_stall=20, write_stall=60, window=4)

    @asynccontextmanager
    async def stopped(self, handler: Any, serving: Any, *, stream: bool, **kwargs: Any) -> AsyncIterator[tuple[Any, float]]:
        """A server whose client has made one request and reads nothing after it."""
        with memory_network(capacity=2000):
            async with serving({"op": handler}, "memory://", patience=10_000, limits=self.LIMITS) as (server, remote):
                start = trio.current_time()
                if stream:
                    async with remote.op.stream(**kwargs):
                        yield server, start
                else:
                    async with await connect(server.address) as comm:
                        await comm.write({"op": "op", **kwargs})
                        yield server, start

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("size", [1, 10_000])
    async def test_it_is_thrown_into_the_generator(
        self, stream: bool, size: int, serving: Any, autojump_clock: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Both where no credit comes and where the item itself doesn't get through."""
        caplog.set_level(logging.INFO, "trio_dcore.server")
        told: list[tuple[float, str]] = []
        async with contextlib.AsyncExitStack() as stack:

            async def generate() -> AsyncIterator[bytes]:
                try:
                    with trio.move_on_after(1000):
                        while True:
                            yield bytes(size)
                except LimitExceeded as error:
                    told.append((trio.current_time(), error.limit))
                    raise

            server, start = await stack.enter_async_context(self.stopped(generate, serving, stream=stream))
            await trio.sleep(2000)
            assert told == [(start + 20, "stream_stall")]
            assert lines(caplog) == ["INFO"]
            assert "Limits(stream_stall=...)" in caplog.text
            assert server.statistics().errors == 1
            assert server.statistics().connections == 0

    @pytest.mark.parametrize("how", ["return", "yield on"])
    async def test_a_generator_that_does_not_pass_it_on(
        self, how: str, serving: Any, autojump_clock: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is ended all the same, and the log tells once why the connection was closed."""
        caplog.set_level(logging.INFO, "trio_dcore.server")
        trace: list[str] = []

        async def generate() -> AsyncIterator[bytes]:
            try:
                while True:
                    try:
                        yield bytes(1000)
                    except LimitExceeded as error:
                        trace.append(error.limit)
                        if how == "return":
                            return
            finally:
                trace.append("finally")

        async with self.stopped(generate, serving, stream=True) as (server, _):
            await trio.sleep(100)
            assert trace == ["stream_stall", "finally"]
            assert lines(caplog) == ["INFO"]
            assert "Limits(stream_stall=...)" in caplog.text
            assert server.statistics().connections == 0

    @pytest.mark.parametrize("stream", [True, False])
    async def test_a_handlers_own_writes(self, stream: bool, serving: Any, autojump_clock: Any) -> None:
        ends: list[tuple[float, str]] = []

        async def write(comm: Any) -> None:
            try:
                while True:
                    await comm.write(bytes(500))
            except LimitExceeded as error:
                ends.append((trio.current_time(), error.limit))
                raise

        async with self.stopped(write, serving, stream=stream) as (_, start):
            await trio.sleep(100)
            assert ends == [(start + 20, "stream_stall")]

    @pytest.mark.parametrize("failing", [False, True])
    async def test_a_reply(self, failing: bool, serving: Any, autojump_clock: Any, caplog: pytest.LogCaptureFixture) -> None:
        """Row H03."""
        caplog.set_level(logging.INFO, "trio_dcore.server")

        async def reply() -> bytes:
            if failing:
                raise ValueError("x" * 9000)
            return bytes(300_000)

        async with self.stopped(reply, serving, stream=False) as (server, _):
            await trio.sleep(59.9)
            assert server.statistics().connections == 1
            await trio.sleep(0.2)
            assert server.statistics().connections == 0
            assert lines(caplog) == ["INFO"]
            assert "Limits(write_stall=...)" in caplog.text

    async def test_a_slow_consumer_is_no_fault_by_default(self, serving: Any, autojump_clock: Any) -> None:
        async def count() -> AsyncIterator[int]:
            for n in range(40):
                yield n

        with memory_network(capacity=2000):
            async with serving({"count": count}, "memory://", patience=10**6) as (_, remote), remote.count.stream() as stream:
                await trio.sleep(100_000)
                assert [item async for item in stream] == list(range(40))

    async def test_the_clients_sends(self, serving: Any, autojump_clock: Any) -> None:
        async def deaf(comm: Any) -> None:
            await trio.sleep(5000)

        client = {"limits": Limits(stream_stall=20)}
        with memory_network(capacity=2000):
            async with serving({"deaf": deaf}, "memory://", patience=10**6, client=client) as (_, remote):
                async with remote.deaf.stream() as stream:
                    start = trio.current_time()
                    with pytest.raises(LimitExceeded, match=r"Limits\(stream_stall=...\)"):
                        while True:
                            await stream.send("item")
                    assert trio.current_time() == start + 20
                    with pytest.raises(CommClosedError):
                        await stream.receive()


class TestLeftBehind:
    """Tasks that a handler leaves behind, and that still use its stream: the connection's next request is none of theirs."""

    @pytest.mark.parametrize("how", ["write", "read", "several"])
    async def test_the_next_request(self, how: str, where: str, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        ended: list[BaseException] = []

        async def use(comm: Any) -> None:
            try:
                for i in range(100):
                    await (comm.write(i) if how != "read" else comm.read())
            except CommClosedError as error:
                ended.append(error)

        async def leave(comm: Any) -> None:
            for _ in range(3 if how == "several" else 1):
                behind.start_soon(use, comm)
            await wait_all_tasks_blocked(0.01)
            left.set()

        options = {"limits": Limits(linger=0)}
        async with trio.open_nursery() as behind, serving({"leave": leave, "echo": echo}, where, **options) as (server, remote):
            for _ in range(3):
                left = trio.Event()
                async with remote.leave.stream() as stream:
                    await left.wait()  # what is taken before gives credit
                    await wait_all_tasks_blocked(0.01)
                    assert len([item async for item in stream]) == (0 if how == "read" else 16)
                assert await remote.echo(x=1) == 1
                await wait_all_tasks_blocked(0.01)
            assert server.statistics().connections == 1
        assert len(ended) == (9 if how == "several" else 3)
        assert all("has ended" in str(error) for error in ended)
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []

    async def test_in_the_middle_of_a_message(self, where: str, serving: Any) -> None:
        """It is sent: what it has begun is an item of its stream, and in front of the stream's end."""
        blocked = trio.Event()

        async def use(comm: Any) -> None:
            await comm.write("first")
            with contextlib.suppress(CommClosedError):
                for _ in range(10):
                    await comm.write(b"x" * 20_000_000)

        async def leave(comm: Any) -> None:
            behind.start_soon(use, comm)
            await wait_all_tasks_blocked(0.01)
            blocked.set()

        async with trio.open_nursery() as behind, serving({"leave": leave, "echo": echo}, where) as (server, remote):
            async with remote.leave.stream() as stream:
                await blocked.wait()
                items = [item async for item in stream]
            assert items[0] == "first"
            assert {len(item) for item in items[1:]} <= {20_000_000}
            assert await remote.echo(x=1) == 1
            assert server.statistics().connections == 1

    async def test_one_that_reads_something_in_the_moment_of_the_end(self, where: str) -> None:
        """Which of the two tasks is first is left to chance, and a ping has its answer in both cases."""
        go = trio.Event()

        async def use(comm: Any) -> None:
            with pytest.raises(CommClosedError, match="has ended"):
                await comm.read()

        async def leave(comm: Any) -> None:
            behind.start_soon(use, comm)
            await go.wait()

        async with trio.open_nursery() as behind, Server({"leave": leave, "echo": echo}) as server:
            address = await server.listen(where)
            async with await connect(address) as comm:
                for i in range(1, 60, 2):
                    go = trio.Event()
                    await comm.write({"op": "leave", "reply": True, KEY: {"id": i, "stream": True}})
                    await wait_all_tasks_blocked(0.001)
                    go.set()
                    await comm.write((PING, i, None))
                    assert {kind for kind, *_ in [await comm.read(), await comm.read()]} == {PONG, END}
                    await comm.write({"op": "echo", "x": i, "reply": True, KEY: {"id": i + 1}})
                    assert tuple(await comm.read()) == (REPLY, i + 1, i)


class TestGathering:
    """Items that a quick generator makes while its consumer is busy leave together, and none is held back while it waits."""

    async def test_they_leave_before_it_waits(self, where: str, serving: Any) -> None:
        async def burst() -> AsyncIterator[int]:
            for i in range(12):
                yield i
            await go.wait()
            yield 12

        async with serving({"burst": burst}, where) as (_server, remote):
            for _ in range(3):
                go = trio.Event()
                async with remote.burst.stream() as stream:
                    await wait_all_tasks_blocked(0.01)
                    assert [await stream.receive() for _ in range(12)] == list(range(12))
                    go.set()
                    assert [item async for item in stream] == [12]

    @pytest.mark.parametrize("how", ["stop", "own scope", "close"])
    async def test_what_was_yielded_comes_before_the_end(self, how: str, where: str, serving: Any) -> None:
        async def burst() -> AsyncIterator[int]:
            with trio.CancelScope() as scope:
                for i in range(12):
                    yield i
                if how == "stop":
                    server.stop(0)
                else:
                    scope.cancel()
                yield 12
            if how == "close":
                raise ValueError("behind its scope")

        async with serving({"burst": burst}, where) as (server, remote), remote.burst.stream() as stream:
            assert [await stream.receive() for _ in range(12)] == list(range(12))
            with pytest.raises({"stop": HandlerCancelled, "own scope": trio.EndOfChannel, "close": ValueError}[how]):
                await stream.receive()

    async def test_a_handler_that_writes_as_well(self, where: str, serving: Any) -> None:
        """In the order in which it did."""

        async def both(comm: Any) -> AsyncIterator[int]:
            for i in range(0, 40, 2):
                yield i
                await comm.write(i + 1)

        async with serving({"both": both}, where) as (_server, remote), remote.both.stream() as stream:
            assert [item async for item in stream] == list(range(40))

    async def test_not_of_plain_requests(self, where: str) -> None:
        """Their items are bare messages."""

        async def burst() -> AsyncIterator[int]:
            for i in range(40):
                yield i

        async with Server({"burst": burst}) as server, await connect(await server.listen(where)) as comm:
            await comm.write({"op": "burst"})
            assert [await comm.read() for _ in range(41)] == [*range(40), None]
