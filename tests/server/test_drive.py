"""Stepping a handler's code in a context of its own."""

from __future__ import annotations

import gc
import types
from collections.abc import AsyncIterator
from contextvars import ContextVar, copy_context
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_dcore.server._drive import drive, frames_of

variable: ContextVar[str] = ContextVar("variable", default="outside")


async def test_steps_run_in_the_context() -> None:
    async def steps() -> list[str]:
        seen = [variable.get()]
        variable.set("changed")
        for _ in range(2):
            await trio.lowlevel.checkpoint()
            seen.append(variable.get())
        return seen

    context = copy_context()
    context.run(variable.set, "inside")
    assert await drive(context, steps()) == ["inside", "changed", "changed"]
    assert variable.get() == "outside"
    assert context[variable] == "changed"


async def test_on_wait_is_called_once_and_only_if_there_is_a_wait() -> None:
    waits: list[str] = []

    async def never() -> str:
        return "at once"

    async def twice() -> str:
        waits.append("begin")
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        return "later"

    assert await drive(copy_context(), never(), lambda: waits.append("wait")) == "at once"
    assert waits == []
    assert await drive(copy_context(), twice(), lambda: waits.append("wait")) == "later"
    assert waits == ["begin", "wait"]


async def test_any_awaitable() -> None:
    class Awaitable:
        def __await__(self) -> Any:
            yield from trio.lowlevel.checkpoint().__await__()
            return variable.get()

    context = copy_context()
    context.run(variable.set, "inside")
    assert await drive(context, Awaitable()) == "inside"

    async def items() -> AsyncIterator[str]:
        yield variable.get()

    generator = items()
    assert await drive(context, generator.__anext__()) == "inside"  # type: ignore[arg-type]
    with pytest.raises(StopAsyncIteration):
        await drive(context, generator.__anext__())  # type: ignore[arg-type]


@pytest.mark.parametrize("waits", [0, 1, 2])
async def test_errors_pass(waits: int) -> None:
    async def fail() -> None:
        for _ in range(waits):
            await trio.lowlevel.checkpoint()
        raise ValueError("from within")

    with pytest.raises(ValueError, match="from within"):
        await drive(copy_context(), fail())


async def test_an_error_from_outside_can_be_caught_within() -> None:
    """trio throws this one in, where it sends others as values."""

    async def steps() -> str:
        try:
            await misuse()
        except TypeError as error:
            return str(error)
        return "nothing"

    @types.coroutine
    def misuse() -> Any:
        yield "no trap of trio's"

    assert "unrecognized yield message" in await drive(copy_context(), steps())


async def test_cancellation_is_delivered_within() -> None:
    seen: list[BaseException] = []

    async def steps() -> None:
        try:
            await trio.sleep_forever()
        except BaseException as error:
            seen.append(error)
            raise

    with trio.CancelScope() as scope:
        scope.cancel()
        await drive(copy_context(), steps())
    assert scope.cancelled_caught
    assert isinstance(seen[0], trio.Cancelled)


class TestSwallowed:
    """What comes of a Cancelled that the code swallowed."""

    async def swallow(self, shield_end: bool = False) -> str:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            pass
        with trio.CancelScope(shield=shield_end):
            if shield_end:
                await trio.lowlevel.checkpoint()
        return "result"

    @pytest.mark.parametrize("shield_end", [False, True])
    async def test_of_a_scope_round_it(self, shield_end: bool) -> None:
        result = None
        with trio.CancelScope() as scope:
            scope.cancel()
            result = await drive(copy_context(), self.swallow(shield_end))
        assert scope.cancelled_caught
        assert result is None

    async def test_of_a_step_is_left_for_later(self) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            assert await drive(copy_context(), self.swallow(), whole=False) == "result"
        assert not scope.cancelled_caught

    async def test_of_a_scope_of_its_own(self) -> None:
        async def own() -> str:
            with trio.CancelScope() as scope:
                scope.cancel()
                await self.swallow()
            return "result"

        assert await drive(copy_context(), own()) == "result"

    async def test_a_result_that_was_there_before_is_kept(self) -> None:
        async def in_time() -> str:
            with trio.CancelScope(shield=True):
                scope.cancel()
                await trio.lowlevel.checkpoint()
            return "result"

        with trio.CancelScope() as scope:
            assert await drive(copy_context(), in_time()) == "result"


class TestFramesOf:
    """Where a task waits, also in what it drives: for the log line about tasks that do not end."""

    def names(self, task: trio.lowlevel.Task) -> list[str]:
        return [frame.f_code.co_name for frame, _line in frames_of(task)]

    async def test_a_coroutine(self) -> None:
        async def inner() -> None:
            await trio.sleep_forever()

        async def outer() -> None:
            await inner()

        async def drives() -> None:
            await drive(copy_context(), outer())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drives)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            names = self.names(task)
            assert names[0] == "drives"
            assert names.index("outer") < names.index("inner") < names.index("sleep_forever")
            nursery.cancel_scope.cancel()

    async def test_a_step_of_a_generator(self) -> None:
        async def items() -> AsyncIterator[int]:
            await trio.sleep_forever()
            yield 1

        async def drives() -> None:
            generator = items()
            await drive(copy_context(), generator.__anext__())  # type: ignore[arg-type]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drives)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            assert self.names(task).index("items") < self.names(task).index("sleep_forever")
            nursery.cancel_scope.cancel()

    async def test_what_drives_nothing(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            assert self.names(task)[0] == "sleep_forever"
            nursery.cancel_scope.cancel()

    async def test_what_can_not_be_looked_into(self) -> None:
        class Opaque:
            def __await__(self) -> Any:
                return iter(trio.sleep_forever().__await__())

        async def drives() -> None:
            await drive(copy_context(), Opaque())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drives)
            await wait_all_tasks_blocked()
            (task,) = nursery.child_tasks
            assert "drives" in self.names(task)
            nursery.cancel_scope.cancel()


async def test_closing_it_closes_the_code() -> None:
    closed: list[str] = []

    async def steps() -> None:
        try:
            await trio.sleep_forever()
        finally:
            closed.append("closed")

    driven: Any = drive(copy_context(), steps())
    driven.send(None)  # a first step, outside of trio's loop
    driven.close()
    assert closed == ["closed"]
    gc.collect()
