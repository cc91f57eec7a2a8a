"""trio_dcore.aio._carry: calls across the bridge, with trio as the guest of asyncio."""

from __future__ import annotations

import asyncio
import gc
import traceback
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import outcome
import pytest
import trio

from tests.aio.running import Runner, new_loop
from trio_dcore.aio import Portal, PortalClosed, open_trio, run_in_asyncio, run_in_trio
from trio_dcore.aio import _carry as carry

variable: ContextVar[str] = ContextVar("variable", default="unset")


async def double(x: int) -> int:
    await trio.lowlevel.checkpoint()
    return 2 * x


async def fail(error: BaseException) -> None:
    await trio.lowlevel.checkpoint()
    raise error


async def settled(portal: Portal) -> None:
    """Wait until no call is in trio."""
    while portal.crossings:  # noqa: ASYNC110  # there is no event for asyncio
        await asyncio.sleep(0)


class Patient:
    """A trio function that waits, and takes its time to clean up."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.cleaning = asyncio.Event()
        self.may_end = trio.Event()
        self.log: list[str] = []

    async def __call__(self) -> None:
        try:
            self.begun.set()
            await trio.sleep_forever()
        except trio.Cancelled:
            self.log.append("cancelled")
            raise
        finally:
            with trio.move_on_after(5, shield=True) as scope:
                self.cleaning.set()
                await self.may_end.wait()
            self.log.append("late" if scope.cancelled_caught else "clean")


class Quick(Patient):
    """Likewise, but quick."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end.set()


# -- from asyncio into trio ------------------------------------------------------------------------------------------------------------


def test_values_and_errors(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:
            assert await portal.run(double, 21) == 42
            assert await run_in_trio(portal, double, 4) == 8
            with pytest.raises(ValueError, match="deep") as caught:
                await portal.run(fail, ValueError("deep"))
            assert "fail" in [frame.name for frame in traceback.extract_tb(caught.tb)]
            with pytest.raises(StopAsyncIteration):
                await portal.run(fail, StopAsyncIteration())
            with pytest.raises(trio.EndOfChannel):
                await portal.run(fail, trio.EndOfChannel())

    run(main)


def test_many_at_once(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:
            assert await asyncio.gather(*[portal.run(double, n) for n in range(200)]) == [2 * n for n in range(200)]
            assert not portal.crossings

    run(main)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_exits_are_raised_where_the_call_is(run: Runner, error: type[BaseException]) -> None:
    async def main() -> None:
        async with open_trio() as portal:
            with pytest.raises(error):
                await portal.run(fail, error())
            assert await portal.run(double, 1) == 2

    run(main)


def test_groups_of_the_users_stay(run: Runner) -> None:
    async def nursery() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, KeyError("a"))

    async def main() -> None:
        async with open_trio() as portal:
            with pytest.raises(ExceptionGroup) as caught:
                await portal.run(nursery)
            assert [type(leaf) for leaf in caught.value.exceptions] == [KeyError]

    run(main)


def test_timeout_waits_for_the_cleanup(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:
            patient = Quick()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await portal.run(patient)
            assert patient.log == ["cancelled", "clean"]
            patient = Quick()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(portal.run(patient), 0.02)
            assert patient.log == ["cancelled", "clean"]
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0

    run(main)


def test_a_task_group_ends_its_calls(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:
            patients = [Quick(), Quick()]

            async def failing() -> None:
                for patient in patients:
                    await patient.begun.wait()
                await portal.run(fail, ValueError("one"))

            with pytest.raises(ExceptionGroup) as caught:
                async with asyncio.TaskGroup() as group:
                    for patient in patients:
                        group.create_task(portal.run(patient))
                    group.create_task(failing())
            assert [str(leaf) for leaf in caught.value.exceptions] == ["one"]
            assert [patient.log for patient in patients] == [["cancelled", "clean"]] * 2

    run(main)


def test_gather_that_is_cancelled(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:
            patients = [Quick(), Quick()]
            gathered = asyncio.gather(*[portal.run(patient) for patient in patients])
            for patient in patients:
                await patient.begun.wait()
            gathered.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gathered
            await settled(portal)
            assert [patient.log for patient in patients] == [["cancelled", "clean"]] * 2

    run(main)


def test_cancelled_again_while_cleaning_up(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:
            patient = Patient()
            task = asyncio.create_task(portal.run(patient))
            await patient.begun.wait()
            for n in range(3):
                task.cancel(f"number {n}")
                await patient.cleaning.wait()
                for _ in range(10):
                    await asyncio.sleep(0)
                assert not task.done()
            patient.may_end.set()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert patient.log == ["cancelled", "clean"]
            assert task.cancelling() == 3
            assert caught.value.args in ((), ("number 2",))

    run(main)


def test_a_cancellation_that_is_taken_back(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:

            async def stubborn() -> int:
                patient = Quick()
                ready.set_result(patient)
                try:
                    await portal.run(patient)
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    assert task is not None
                    task.uncancel()
                return await portal.run(double, 3)

            ready: asyncio.Future[Quick] = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(stubborn())
            await (await ready).begun.wait()
            task.cancel()
            assert await task == 6

    run(main)


def test_a_value_in_the_same_moment_is_disposed_of(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:
            lost: list[str] = []
            begun = asyncio.Event()

            async def deaf() -> str:
                begun.set()
                with trio.CancelScope(shield=True):
                    await go.wait()
                # For one of them, between the moment in which there is a value, and the task's next step.
                portal.loop.call_soon(*at_end)
                return "a resource"

            for seen in (False, True):
                go = trio.Event()
                begun.clear()
                task = asyncio.create_task(run_in_trio(portal, deaf, dispose=lost.append))
                await begun.wait()
                at_end: tuple[Any, ...] = (task.cancel,) if seen else (int,)
                if not seen:
                    task.cancel()
                go.set()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert lost == ["a resource"] * 2

    run(main)


def test_an_error_of_the_cleanup_is_raised(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:
            begun = asyncio.Event()

            async def clumsy() -> None:
                try:
                    begun.set()
                    await trio.sleep_forever()
                finally:
                    raise KeyError("cleanup")

            task = asyncio.create_task(portal.run(clumsy))
            await begun.wait()
            task.cancel()
            with pytest.raises(KeyError) as caught:
                await task
            assert isinstance(caught.value.__context__, asyncio.CancelledError)

    run(main)


def test_an_error_in_the_same_moment_does_not_hide_a_cancellation(run: Runner) -> None:
    """As with asyncio's futures: who tries again after each error would never end."""

    async def main() -> None:
        async with open_trio() as portal:

            async def on_its_way() -> None:
                begun.set()
                try:
                    await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)
                finally:
                    for _ in range(3):
                        await trio.lowlevel.cancel_shielded_checkpoint()

            begun = asyncio.Event()
            task = asyncio.create_task(portal.run(on_its_way))
            await begun.wait()
            (crossing,) = portal.crossings
            assert crossing.task is not None
            trio.lowlevel.reschedule(crossing.task, outcome.Error(OSError("the wire broke")))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

            async def arrived() -> None:
                try:
                    with trio.fail_after(0):  # an error that comes of another cancellation
                        await trio.sleep_forever()
                finally:
                    portal.loop.call_soon(task.cancel)

            task = asyncio.create_task(portal.run(arrived))
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main)


def test_a_portal_that_closes_ends_its_calls(run: Runner) -> None:
    async def main() -> None:
        patient = Quick()
        async with open_trio() as portal:
            task = asyncio.create_task(portal.run(patient))
            await patient.begun.wait()
        with pytest.raises(PortalClosed, match="ends") as caught:
            await task
        assert isinstance(caught.value, OSError)
        assert isinstance(caught.value, RuntimeError)
        assert patient.log == ["cancelled", "clean"]
        assert not task.cancelled()
        with pytest.raises(PortalClosed, match="has ended"):
            await portal.run(double, 1)

    run(main)


def test_what_fails_when_the_portal_closes_is_told(run: Runner) -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def clumsy() -> None:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    begun.set()
                    await trio.sleep_forever()
            finally:
                raise KeyError("cleanup")

        async def group() -> None:
            try:
                begun.set()
                await trio.sleep_forever()
            except trio.Cancelled as error:
                raise BaseExceptionGroup("both", [error, KeyError("leaf")]) from None

        for fn, expected in ((clumsy, KeyError), (group, ExceptionGroup)):
            async with open_trio() as portal:
                task = asyncio.create_task(portal.run(fn))
                await begun.wait()
                begun.clear()
            with pytest.raises(expected):
                await task

    run(main)


def test_exceptions_by_which_one_side_cancels_stay_there(run: Runner) -> None:
    async def keep_one() -> trio.Cancelled:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as error:
                return error
        raise AssertionError

    async def main() -> None:
        async with open_trio() as portal:
            stray = await portal.run(keep_one)
            with pytest.raises(RuntimeError, match="belongs to no cancel scope") as caught:
                await portal.run(fail, stray)
            assert caught.value.__cause__ is stray
            with pytest.raises(RuntimeError, match="nobody on the other side") as caught:
                await portal.run(fail, asyncio.CancelledError())
            assert isinstance(caught.value.__cause__, asyncio.CancelledError)
            with pytest.raises(ExceptionGroup) as group:
                await portal.run(fail, BaseExceptionGroup("", [asyncio.CancelledError(), KeyError()]))
            assert [type(leaf) for leaf in group.value.exceptions] == [KeyError]
            assert await portal.run(double, 1) == 2

    run(main)


def test_context_variables_go_into_trio(run: Runner) -> None:
    async def look() -> str:
        value = variable.get()
        variable.set("trio's")
        await trio.lowlevel.checkpoint()
        return value

    async def main() -> None:
        async with open_trio() as portal:
            variable.set("asyncio's")
            assert await portal.run(look) == "asyncio's"
            assert variable.get() == "asyncio's"

    run(main)


def test_a_coroutine_that_is_closed_cancels_its_call(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:
            patient = Quick()
            coroutine = portal.run(patient)
            coroutine.send(None)
            await patient.begun.wait()
            coroutine.close()
            await settled(portal)
            assert patient.log == ["cancelled", "clean"]

    run(main)


def test_a_trio_task_that_does_not_end_is_named(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "_REPORT_EVERY", 0.02)
    run.loud = True

    async def main() -> None:
        async with open_trio() as portal:
            patient = Patient()

            async def parent() -> None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(patient, name="the child")

            task = asyncio.create_task(portal.run(parent))
            await patient.begun.wait()
            task.cancel()
            while len(run.log.records) < 4:  # noqa: ASYNC110  # the log has no event
                await asyncio.sleep(0.01)
            patient.may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main)
    first, second, *_ = [record.getMessage() for record in run.log.records]
    assert "waits for a trio task that does not end: " in first
    assert "parent" in first
    assert "does not end: the child" in second
    assert "self.may_end.wait()" in second


# -- from trio into asyncio ------------------------------------------------------------------------------------------------------------


def test_asyncio_functions_in_trio_tasks(run: Runner) -> None:
    async def triple(x: int) -> int:
        await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        assert "triple" in task.get_name()
        return 3 * x

    async def broken() -> None:
        raise ValueError("deep")

    async def look() -> str:
        value = variable.get()
        variable.set("asyncio's")
        return value

    async def in_trio(loop: asyncio.AbstractEventLoop) -> None:
        assert await run_in_asyncio(loop, triple, 4) == 12
        with pytest.raises(ValueError, match="deep"):
            await run_in_asyncio(loop, broken)
        variable.set("trio's")
        assert await run_in_asyncio(loop, look) == "trio's"
        assert variable.get() == "trio's"
        for error in (KeyboardInterrupt, SystemExit):
            with pytest.raises(error):
                await run_in_asyncio(loop, broken_by, error)

    async def broken_by(error: type[BaseException]) -> None:
        raise error

    async def main() -> None:
        async with open_trio() as portal:
            await portal.run(in_trio, asyncio.get_running_loop())

    run(main)


def test_a_scope_cancels_the_asyncio_task_and_waits(run: Runner) -> None:
    log: list[str] = []

    async def tidy(begun: trio.Event, gate: asyncio.Event) -> None:
        try:
            begun.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            log.append("cancelled")
            raise
        finally:
            await gate.wait()
            log.append("finally")

    async def in_trio(loop: asyncio.AbstractEventLoop) -> None:
        begun, gate = trio.Event(), asyncio.Event()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_in_asyncio, loop, tidy, begun, gate)
                await begun.wait()
                scope.cancel()
                gate.set()
        assert scope.cancelled_caught
        assert log == ["cancelled", "finally"]

    async def main() -> None:
        async with open_trio() as portal:
            await portal.run(in_trio, asyncio.get_running_loop())

    run(main)


def test_a_cancellation_that_is_swallowed_comes_again(run: Runner) -> None:
    run.loud = True
    log: list[str] = []

    async def stubborn() -> None:
        for _ in range(2):
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                log.append("swallowed")
        await asyncio.sleep(3600)

    async def in_trio(loop: asyncio.AbstractEventLoop) -> None:
        with trio.move_on_after(0.02) as scope:
            await run_in_asyncio(loop, stubborn, redeliver=0.02)
        assert scope.cancelled_caught
        assert log == ["swallowed"] * 2

    async def main() -> None:
        async with open_trio() as portal:
            await portal.run(in_trio, asyncio.get_running_loop())

    run(main)
    messages = [record.getMessage() for record in run.log.records]
    assert len(messages) == 2
    assert "waits for an asyncio task that does not end: " in messages[0]
    assert "stubborn" in messages[0]
    assert "await asyncio.sleep(3600)" in messages[0]


def test_cleanup_within_the_pause_is_not_cut(run: Runner) -> None:
    log: list[str] = []

    async def tidy() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)
            log.append("clean")

    async def in_trio(loop: asyncio.AbstractEventLoop) -> None:
        with trio.move_on_after(0.01) as scope:
            await run_in_asyncio(loop, tidy)
        assert scope.cancelled_caught
        with trio.move_on_after(0.01) as scope:
            await run_in_asyncio(loop, tidy, redeliver=float("inf"))
        assert scope.cancelled_caught

    async def main() -> None:
        async with open_trio() as portal:
            await portal.run(in_trio, asyncio.get_running_loop())

    run(main)
    assert log == ["clean"] * 2


def test_what_it_does_instead_of_being_cancelled_counts(run: Runner) -> None:
    async def done_anyway() -> str:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return "done"
        return "late"

    async def fails() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            raise KeyError("instead") from None

    async def in_trio(loop: asyncio.AbstractEventLoop) -> None:
        with trio.CancelScope(deadline=trio.current_time() + 0.01) as scope:
            assert await run_in_asyncio(loop, done_anyway) == "done"
        assert not scope.cancelled_caught
        with pytest.raises(KeyError), trio.CancelScope(deadline=trio.current_time() + 0.01):
            await run_in_asyncio(loop, fails)
        with trio.CancelScope() as scope:
            scope.cancel()
            await run_in_asyncio(loop, done_anyway)  # not even started
        assert scope.cancelled_caught

    async def main() -> None:
        async with open_trio() as portal:
            await portal.run(in_trio, asyncio.get_running_loop())

    run(main)


def test_a_cancelled_error_that_nobody_asked_for(run: Runner) -> None:
    async def cancels_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    async def in_a_group() -> None:
        raise BaseExceptionGroup("", [asyncio.CancelledError(), KeyError("leaf")])

    async def in_trio(loop: asyncio.AbstractEventLoop) -> None:
        with pytest.raises(RuntimeError, match="cancels_itself ended by an asyncio.CancelledError") as caught:
            await run_in_asyncio(loop, cancels_itself)
        assert isinstance(caught.value.__cause__, asyncio.CancelledError)
        with pytest.raises(ExceptionGroup) as group:
            await run_in_asyncio(loop, in_a_group)
        assert [type(leaf) for leaf in group.value.exceptions] == [KeyError]

    async def main() -> None:
        async with open_trio() as portal:
            await portal.run(in_trio, asyncio.get_running_loop())

    run(main)


def test_a_loop_that_is_closed_takes_no_call(run: Runner) -> None:
    async def in_trio(loop: asyncio.AbstractEventLoop) -> None:
        with pytest.raises(RuntimeError, match="closed"):
            await run_in_asyncio(loop, asyncio.sleep, 0)

    async def main() -> None:
        other = new_loop()
        other.close()
        async with open_trio() as portal:
            await portal.run(in_trio, other)

    run(main)


def test_through_several_layers(run: Runner) -> None:
    log: list[str] = []

    @contextmanager
    def logged(name: str, cancelled: type[BaseException]) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            log.append(f"{name} {type(error) is cancelled}")
            raise

    async def main() -> None:
        async with open_trio() as portal:
            loop = asyncio.get_running_loop()
            begun = asyncio.Event()

            async def outer() -> None:
                with logged("outer", asyncio.CancelledError):
                    await portal.run(middle)

            async def middle() -> None:
                with logged("middle", trio.Cancelled):
                    await run_in_asyncio(loop, inner)

            async def inner() -> None:
                with logged("inner", asyncio.CancelledError):
                    await portal.run(innermost)

            async def innermost() -> None:
                with logged("innermost", trio.Cancelled):
                    begun.set()
                    await trio.sleep_forever()

            task = asyncio.create_task(outer())
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main)
    assert log == ["innermost True", "inner True", "middle True", "outer True"]


# -- garbage ---------------------------------------------------------------------------------------------------------------------------


class Thing:
    """Something that can be watched."""


async def hold(thing: Thing, how: str) -> Any:
    await trio.lowlevel.checkpoint()
    if how == "error":
        raise ValueError(how)
    if how == "cancel":
        await trio.sleep_forever()
    return None


@pytest.mark.parametrize("how", ["value", "error", "cancel"])
def test_a_call_leaves_no_garbage(run: Runner, how: str) -> None:
    async def main() -> None:
        async with open_trio() as portal:

            async def once() -> weakref.ref[Thing]:
                thing = Thing()
                try:
                    async with asyncio.timeout(0.02 if how == "cancel" else 10):
                        await portal.run(hold, thing, how)
                except (ValueError, TimeoutError):
                    pass
                return weakref.ref(thing)

            await once()
            await asyncio.sleep(0.01)
            gc.collect()
            gc.disable()
            try:
                reference = await once()
                await asyncio.sleep(0.01)
                assert reference() is None
            finally:
                gc.enable()

    run(main)


# -- async generators ------------------------------------------------------------------------------------------------------------------


def test_a_trio_generator_can_be_stepped_from_asyncio(run: Runner) -> None:
    async def count() -> AsyncIterator[int]:
        for n in range(3):
            await trio.lowlevel.checkpoint()
            yield n

    async def main() -> None:
        async with open_trio() as portal:
            generator = count()
            assert [await portal.run(anext, generator) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(StopAsyncIteration):
                await portal.run(anext, generator)

    run(main)
