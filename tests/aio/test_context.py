"""trio_dcore.aio._context: async context managers of asyncio's flavour in trio tasks."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.aio.available import needs_trio_asyncio
from trio_dcore import LocalProtocolError
from trio_dcore.aio import enter_asyncio, open_loop
from trio_dcore.testing import cancel_sweep, no_leaks

pytestmark = needs_trio_asyncio


class Manager:
    """Makes context managers, and keeps a journal."""

    def __init__(self) -> None:
        self.journal: list[str] = []

    @asynccontextmanager
    async def __call__(self, swallow: type[BaseException] | tuple[()] = (), *, entering: float = 0.0) -> AsyncIterator[int]:
        task = asyncio.current_task()
        assert task is not None
        await asyncio.sleep(entering)
        self.journal.append("entered")
        try:
            yield 7
        except swallow as error:
            self.journal.append(f"swallowed {type(error).__name__}")
        except BaseException as error:
            self.journal.append(type(error).__name__)
            raise
        finally:
            try:
                await asyncio.sleep(0.5)
            finally:
                assert asyncio.current_task() is task
                self.journal.append("left")


async def test_entered_and_left_in_one_task(autojump_clock: trio.testing.MockClock) -> None:
    manager = Manager()
    async with no_leaks(), open_loop():
        async with enter_asyncio(manager) as value:
            assert value == 7
            assert manager.journal == ["entered"]
            await trio.sleep(10)
        assert manager.journal == ["entered", "left"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError(1),
        ExceptionGroup("of the user's", [ValueError(1)]),
        StopIteration(1),
        StopAsyncIteration(1),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_of_the_block_pass_through_it(error: BaseException, autojump_clock: trio.testing.MockClock) -> None:
    manager = Manager()
    async with no_leaks(), open_loop():
        with pytest.raises(type(error)) as caught:
            async with enter_asyncio(manager):
                raise error
        assert caught.value is error
    assert manager.journal == ["entered", type(error).__name__, "left"]


async def test_errors_of_the_block_may_be_swallowed(autojump_clock: trio.testing.MockClock) -> None:
    manager = Manager()
    async with no_leaks(), open_loop():
        async with enter_asyncio(manager, ValueError):
            raise ValueError(1)
    assert manager.journal == ["entered", "swallowed ValueError", "left"]


async def test_errors_of_entering_and_leaving(autojump_clock: trio.testing.MockClock) -> None:
    @asynccontextmanager
    async def bad(when: str) -> AsyncIterator[None]:
        if when == "entering":
            raise OSError(when)
        try:
            yield
        finally:
            raise OSError(when)

    async with no_leaks(), open_loop():
        with pytest.raises(OSError, match="^entering$"):
            async with enter_asyncio(bad, "entering"):
                raise AssertionError("not reached")
        with pytest.raises(OSError, match="^leaving$"):
            async with enter_asyncio(bad, "leaving"):
                pass
        with pytest.raises(OSError, match="^leaving$") as caught:
            async with enter_asyncio(bad, "leaving"):
                raise ValueError(1)
        assert isinstance(caught.value.__context__, ValueError)


@pytest.mark.parametrize("swallow", [(), asyncio.CancelledError])
async def test_cancelled(swallow: type[BaseException] | tuple[()], autojump_clock: trio.testing.MockClock) -> None:
    manager = Manager()
    start = trio.current_time()
    async with no_leaks(), open_loop():
        with trio.move_on_after(1) as scope:
            async with enter_asyncio(manager, swallow):
                await trio.sleep(math.inf)
        assert trio.current_time() - start == pytest.approx(1.5)  # what it does to clean up is not cut
        assert scope.cancelled_caught is (not swallow)
    assert manager.journal == ["entered", "swallowed CancelledError" if swallow else "CancelledError", "left"]


async def test_cancelled_when_entering(autojump_clock: trio.testing.MockClock) -> None:
    manager = Manager()
    async with no_leaks(), open_loop():
        with trio.move_on_after(1) as scope:
            async with enter_asyncio(lambda: manager(entering=5)):
                raise AssertionError("not reached")
        assert scope.cancelled_caught
        assert manager.journal == []


async def test_cancelled_and_failed_together(autojump_clock: trio.testing.MockClock) -> None:
    manager = Manager()
    async with no_leaks(), open_loop():
        with pytest.RaisesGroup(ValueError):
            with trio.move_on_after(1):
                async with enter_asyncio(manager):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(trio.sleep, 100)
                        try:
                            await trio.sleep(100)
                        finally:
                            raise ValueError(1)
    assert manager.journal == ["entered", "ExceptionGroup", "left"]


async def test_an_error_in_a_cancelled_scope_is_seen_inside(autojump_clock: trio.testing.MockClock) -> None:
    manager = Manager()
    error = ValueError(1)
    async with no_leaks(), open_loop():
        with trio.move_on_after(1) as scope, pytest.raises(ValueError, match="^1$") as caught:
            async with enter_asyncio(manager):
                try:
                    await trio.sleep(100)
                finally:
                    raise error
        assert caught.value is error
        assert not scope.cancelled_caught
    assert manager.journal == ["entered", "ValueError", "left"]


async def test_one_that_ends_early_cancels_its_block(autojump_clock: trio.testing.MockClock) -> None:
    async def fail() -> None:
        await asyncio.sleep(1)
        raise KeyError(1)

    async with no_leaks(), open_loop():
        start = trio.current_time()
        with pytest.raises(TimeoutError):
            async with enter_asyncio(asyncio.timeout, 1):
                await trio.sleep(100)
        with pytest.raises(ExceptionGroup) as caught:
            async with enter_asyncio(asyncio.TaskGroup) as tasks:
                tasks.create_task(fail())
                await trio.sleep(100)
        assert [type(error) for error in caught.value.exceptions] == [KeyError]
        assert trio.current_time() - start == pytest.approx(2)


async def test_one_that_ends_early_and_a_block_that_fails(autojump_clock: trio.testing.MockClock) -> None:
    async with no_leaks(), open_loop():
        with pytest.RaisesGroup(ValueError, TimeoutError):
            async with enter_asyncio(asyncio.timeout, 1):
                try:
                    await trio.sleep(100)
                finally:
                    raise ValueError(1)


async def test_one_that_ends_early_in_a_block_with_a_nursery(autojump_clock: trio.testing.MockClock) -> None:
    async with no_leaks(), open_loop():
        with pytest.RaisesGroup(ValueError, TimeoutError):
            async with enter_asyncio(asyncio.timeout, 1), trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep, 100)
                try:
                    await trio.sleep(100)
                finally:
                    raise ValueError(1)


async def test_one_that_is_cancelled_in_asyncio(autojump_clock: trio.testing.MockClock) -> None:
    async with no_leaks(), open_loop():
        for swallow, message in (
            ((), "nobody on the other side"),
            (asyncio.CancelledError, "was cancelled in asyncio, and swallowed"),
        ):
            with pytest.raises(RuntimeError, match=message):
                async with enter_asyncio(Manager(), swallow):
                    (task,) = asyncio.all_tasks()
                    task.cancel()
                    await trio.sleep(100)


async def test_cancelled_when_it_has_just_been_entered(autojump_clock: trio.testing.MockClock) -> None:
    """Its block begins, and sees that."""
    journal = []

    @asynccontextmanager
    async def deaf() -> AsyncIterator[None]:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            pass
        try:
            yield
        finally:
            journal.append("left")

    async with no_leaks(), open_loop():
        with trio.move_on_after(1) as scope:
            async with enter_asyncio(deaf):
                journal.append("begun")
                await trio.sleep(100)
        assert scope.cancelled_caught
    assert journal == ["begun", "left"]


async def test_wrong_use(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(LocalProtocolError, match="open_loop"):
        async with enter_asyncio(Manager()):
            pass
    async with open_loop():
        block = enter_asyncio(Manager())
        async with block:
            with pytest.raises(LocalProtocolError, match="call it again"):
                await block.__aenter__()


async def test_cancelled_at_every_step(autojump_clock: trio.testing.MockClock) -> None:
    async def scenario() -> None:
        manager = Manager()
        try:
            async with open_loop(), enter_asyncio(lambda: manager(entering=0.1)):
                await trio.sleep(0.1)
        finally:
            assert manager.journal.count("entered") == manager.journal.count("left")

    assert await cancel_sweep(scenario) > 10
