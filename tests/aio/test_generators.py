"""trio_dcore.aio._generators: async generators of asyncio's flavour, stepped from trio."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, nullcontext
from contextvars import ContextVar
from typing import Any

import pytest
import trio
import trio.testing

from tests.aio.available import needs_trio_asyncio
from trio_dcore import CommClosedError
from trio_dcore.aio import handler, open_loop
from trio_dcore.testing import no_leaks

pytestmark = needs_trio_asyncio

variable: ContextVar[str] = ContextVar("variable", default="unset")

Generators = Callable[..., AsyncGenerator[Any, None]]


class Journal(list[str]):
    """What generators did, in order."""

    async def count(self, most: int = 1000, *, cleanup: float = 0.0) -> AsyncGenerator[int, None]:
        task = asyncio.current_task()
        try:
            for n in range(most):
                await asyncio.sleep(0.1)
                assert asyncio.current_task() is task
                yield n
        except BaseException as error:
            self.append(type(error).__name__)
            raise
        finally:
            assert asyncio.current_task() is task
            await asyncio.sleep(cleanup)
            self.append("finally")

    async def stubborn(self, times: int) -> AsyncGenerator[int, None]:
        for n in range(times):
            try:
                yield n
                await asyncio.sleep(1e6)
            except asyncio.CancelledError:
                self.append("swallowed")
        self.append("ended")


async def test_items_and_the_end(autojump_clock: trio.testing.MockClock) -> None:
    journal = Journal()
    async with no_leaks(), open_loop():
        assert [item async for item in handler(journal.count)(3)] == [0, 1, 2]
    assert journal == ["finally"]


async def test_an_error(autojump_clock: trio.testing.MockClock) -> None:
    async def fail() -> AsyncGenerator[int, None]:
        yield 1
        raise ValueError("nope")

    async with no_leaks(), open_loop():
        items = handler(fail)()
        assert await anext(items) == 1
        with pytest.raises(ValueError, match="nope"):
            await anext(items)
        with pytest.raises(StopAsyncIteration):
            await anext(items)


async def test_one_task_and_one_context(autojump_clock: trio.testing.MockClock) -> None:
    async def look() -> AsyncGenerator[Any, None]:
        variable.set(variable.get() + " inside")
        async with asyncio.timeout(60):
            yield variable.get(), asyncio.current_task()
            await asyncio.sleep(1)
            yield variable.get(), asyncio.current_task()

    variable.set("outside")
    async with no_leaks(), open_loop():
        found = [item async for item in handler(look)()]
    assert found[0] == found[1]
    assert found[0][0] == "outside inside"
    assert variable.get() == "outside"


async def test_its_own_timeout_is_seen_at_the_yield(autojump_clock: trio.testing.MockClock) -> None:
    async def limited() -> AsyncGenerator[str, None]:
        try:
            async with asyncio.timeout(1):
                yield "before"
                raise AssertionError("not reached")
        except TimeoutError:
            yield "timeout"
        yield "after"

    async with no_leaks(), open_loop():
        found = []
        async for item in handler(limited)():
            found.append(item)
            await trio.sleep(2)  # the consumer takes its time
    assert found == ["before", "timeout", "after"]


async def test_it_ends_while_its_item_is_consumed(autojump_clock: trio.testing.MockClock) -> None:
    async def limited() -> AsyncGenerator[str, None]:
        async with asyncio.timeout(1):
            yield "before"

    async with no_leaks(), open_loop():
        items = handler(limited)()
        assert await anext(items) == "before"
        await trio.sleep(2)
        with pytest.raises(TimeoutError):
            await anext(items)
        items = handler(limited)()
        assert await anext(items) == "before"
        await trio.sleep(2)
        with pytest.raises(TimeoutError):
            await items.athrow(OSError("too late"))


async def test_cancelled_after_something_of_its_own_while_its_item_is_consumed(autojump_clock: trio.testing.MockClock) -> None:
    journal = []

    async def limited(recovers: bool) -> AsyncGenerator[str, None]:
        try:
            async with asyncio.timeout(1):
                yield "before"
        except TimeoutError:
            if not recovers:
                raise
        try:
            yield "lost"
        except asyncio.CancelledError:
            journal.append("cancelled behind it")
            raise

    async with no_leaks(), open_loop():
        for recovers in True, False:
            with trio.move_on_after(2) as scope:
                items = handler(limited)(recovers)
                assert await anext(items) == "before"
                try:
                    await trio.sleep(10)
                except trio.Cancelled as cancelled:
                    if recovers:
                        await items.athrow(cancelled)
                    else:
                        with pytest.raises(TimeoutError):
                            await items.athrow(cancelled)
            assert scope.cancelled_caught is recovers
    assert journal == ["cancelled behind it"]


async def test_errors_are_thrown_in(autojump_clock: trio.testing.MockClock) -> None:
    async def recover() -> AsyncGenerator[Any, None]:
        try:
            yield 1
        except OSError as error:
            yield error
        yield "on"

    error = OSError("thrown in")
    async with no_leaks(), open_loop():
        items = handler(recover)()
        assert await anext(items) == 1
        assert await items.athrow(error) is error
        assert await anext(items) == "on"
        with pytest.raises(KeyError) as caught:
            await items.athrow(KeyError(1))
        assert type(caught.value) is KeyError
        with pytest.raises(StopAsyncIteration):
            await anext(items)


async def test_cancelled_while_it_works(autojump_clock: trio.testing.MockClock) -> None:
    journal = Journal()
    async with no_leaks(), open_loop():
        start = trio.current_time()
        with trio.move_on_after(0.25) as scope:
            async for _ in handler(journal.count)(cleanup=0.5):
                pass
        assert scope.cancelled_caught
        assert trio.current_time() - start == pytest.approx(0.75)
    assert journal == ["CancelledError", "finally"]


async def test_cancelled_while_its_item_is_consumed(autojump_clock: trio.testing.MockClock) -> None:
    """By a server that throws into it what ends its writing."""
    journal = Journal()

    async def counted() -> AsyncGenerator[int, None]:
        try:
            yield 0
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            journal.append(f"cancelled {task.cancelling()} times")
            raise
        finally:
            await asyncio.sleep(0.5)
            journal.append("finally")

    async with no_leaks(), open_loop():
        with trio.move_on_after(1) as scope:
            items = handler(counted)()
            assert await anext(items) == 0
            try:
                await trio.sleep(10)
            except trio.Cancelled as cancelled:
                await items.athrow(cancelled)
                raise AssertionError("not reached") from None
        assert scope.cancelled_caught
    assert journal == ["cancelled 1 times", "finally"]


async def test_one_that_swallows_its_cancellation(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal()
    async with no_leaks(), open_loop(redeliver=1):
        with trio.move_on_after(1) as scope:
            items = handler(journal.stubborn)(3)
            # Cancelled while it works it goes on to the next item, which is no loss; the consumer's next wait is cancelled.
            assert [await anext(items), await anext(items)] == [0, 1]
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        await items.aclose()
        with trio.move_on_after(1) as scope:
            items = handler(journal.stubborn)(3)
            assert await anext(items) == 0
            try:
                await trio.sleep(10)
            except trio.Cancelled as cancelled:
                found = [await items.athrow(cancelled), await items.athrow(cancelled)]
                with pytest.raises(StopAsyncIteration):
                    await items.athrow(cancelled)
                raise
        assert scope.cancelled_caught
        assert found == [1, 2]
    assert journal == ["swallowed"] * 4 + ["ended"]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_closed(autojump_clock: trio.testing.MockClock) -> None:
    journal = Journal()
    async with no_leaks(), open_loop():
        items = handler(journal.count)(cleanup=0.5)
        await items.aclose()  # not begun
        assert journal == []
        items = handler(journal.count)(cleanup=0.5)
        assert await anext(items) == 0
        await items.aclose()
        assert journal == ["GeneratorExit", "finally"]


@pytest.mark.parametrize("failing", [False, True])
async def test_closed_inside_of_a_task_group(failing: bool) -> None:
    """Which wraps the GeneratorExit."""
    log: list[str] = []

    async def sleep() -> None:
        try:
            await asyncio.sleep(1e6)
        finally:
            log.append("ended")
            if failing:
                raise KeyError("cleanup")

    async def source() -> AsyncIterator[int]:
        async with asyncio.TaskGroup() as group:
            group.create_task(sleep())
            while True:
                await asyncio.sleep(0)
                yield 1

    async with open_loop():
        with pytest.raises(ExceptionGroup) if failing else nullcontext() as caught:
            async with aclosing(handler(source)()) as items:
                async for _ in items:
                    break
    assert log == ["ended"]
    if caught is not None:
        assert [repr(leaf) for leaf in caught.value.exceptions] == ["KeyError('cleanup')"]


async def test_closed_in_a_cancelled_scope(autojump_clock: trio.testing.MockClock) -> None:
    journal = Journal()
    async with no_leaks(), open_loop(redeliver=1):
        start = trio.current_time()
        with trio.CancelScope() as scope:
            items = handler(journal.count)(cleanup=0.5)
            assert await anext(items) == 0
            scope.cancel()
            await items.aclose()
        assert trio.current_time() - start == pytest.approx(0.6)
    assert journal == ["GeneratorExit", "finally"]


async def test_one_that_ignores_its_end(autojump_clock: trio.testing.MockClock) -> None:
    async def deaf() -> AsyncGenerator[int, None]:
        try:
            yield 1
        except GeneratorExit:
            yield 2

    async with no_leaks(), open_loop():
        items = handler(deaf)()
        assert await anext(items) == 1
        with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
            await items.aclose()


async def test_a_cancelled_error_that_nobody_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    async def cancelled() -> AsyncGenerator[int, None]:
        yield 1
        raise asyncio.CancelledError("its own")

    async with no_leaks(), open_loop():
        items = handler(cancelled)()
        assert await anext(items) == 1
        with pytest.raises(RuntimeError, match="nobody on the other side") as caught:
            await anext(items)
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
async def test_exits(error: BaseException, autojump_clock: trio.testing.MockClock) -> None:
    async def leave() -> AsyncGenerator[int, None]:
        yield 1
        raise error

    async with no_leaks(), open_loop():
        items = handler(leave)()
        assert await anext(items) == 1
        with pytest.raises(type(error)) as caught:
            await anext(items)
        assert caught.value is error


async def test_cleaning_up_after_an_error_is_not_cut_short_by_the_cancellation_that_follows(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A consumer that goes is met twice: its connection can't be written to, and the handler is cancelled.  To asyncio that is one."""
    journal = Journal()
    async with no_leaks(), open_loop():
        items = handler(journal.count)(cleanup=0.5)
        assert await anext(items) == 0
        with trio.move_on_after(0.1) as scope:
            with pytest.raises(CommClosedError):
                await items.athrow(CommClosedError("gone"))
            assert journal == ["CommClosedError", "finally"]
        assert scope.cancel_called
        assert journal == ["CommClosedError", "finally"]


async def test_cleaning_up_without_end_after_an_error_is_cancelled(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal()
    async with no_leaks(), open_loop():
        items = handler(journal.count)(cleanup=1e6)
        assert await anext(items) == 0
        began = trio.current_time()
        with trio.move_on_after(0.1) as scope:
            await items.athrow(CommClosedError("gone"))
        assert scope.cancelled_caught
        assert trio.current_time() - began == pytest.approx(1.1)
        assert journal == ["CommClosedError"]
    assert "count" in caplog.text


async def test_after_any_other_error_the_cancellation_comes_at_once(autojump_clock: trio.testing.MockClock) -> None:
    journal = Journal()
    async with no_leaks(), open_loop():
        items = handler(journal.count)(cleanup=0.5)
        assert await anext(items) == 0
        with trio.move_on_after(0.1) as scope:
            await items.athrow(ValueError("this item could not be sent"))
        assert scope.cancelled_caught
        assert journal == ["ValueError"]
