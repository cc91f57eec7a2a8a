"""trio_dcore.aio._loop: an asyncio event loop in a trio program."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator
from contextvars import Context, ContextVar
from functools import partial
from typing import Any

import pytest
import sniffio
import trio
import trio.testing

from tests.aio.available import needs_trio_asyncio
from tests.aio.running import Runner
from trio_dcore import LocalProtocolError
from trio_dcore.aio import _loop as module
from trio_dcore.aio import open_loop, open_trio, run_asyncio, run_in_asyncio
from trio_dcore.testing import LeakError, cancel_sweep, no_leaks

pytestmark = needs_trio_asyncio

variable: ContextVar[str] = ContextVar("variable", default="unset")


class Journal(list[str]):
    """What asyncio code did, in order."""

    async def sleep(self, seconds: float = math.inf, *, cleanup: float = 0.0) -> str:
        """Wait; cancelled, clean up for so long."""
        try:
            await asyncio.sleep(min(seconds, 1e6))
            return "slept"
        except asyncio.CancelledError:
            self.append("cancelled")
            raise
        finally:
            if cleanup:
                await asyncio.sleep(cleanup)
            self.append("finally")


def loud(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno > logging.INFO]


def fresh(code: str, *arguments: str) -> str:
    """What a program prints."""
    run = subprocess.run(
        [sys.executable, "-W", "error", *arguments, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


# -- using it ----------------------------------------------------------------------------------------------------------------------


async def test_asyncio_functions_are_called_in_it(autojump_clock: trio.testing.MockClock) -> None:
    async def look(a: int) -> tuple[Any, ...]:
        await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        return a, asyncio.get_running_loop(), variable.get(), sniffio.current_async_library(), task.get_name().rpartition(".")[2]

    async with no_leaks(), open_loop() as loop:
        variable.set("here")
        assert await run_asyncio(look, 1) == (1, loop, "here", "asyncio", "look")
        assert asyncio.get_running_loop() is loop
        assert sniffio.current_async_library() == "trio"
        with pytest.raises(ZeroDivisionError):
            await run_asyncio(look, 1 // 0)


async def test_time_is_trios(autojump_clock: trio.testing.MockClock) -> None:
    """With the autojump clock asyncio's time is virtual as well."""
    async with open_loop() as loop:
        start = trio.current_time()
        assert loop.time() == start
        assert await run_asyncio(asyncio.sleep, 3600, "slept") == "slept"
        assert trio.current_time() - start == pytest.approx(3600)

        async def late() -> None:
            async with asyncio.timeout(60):
                await asyncio.sleep(3600)

        with pytest.raises(TimeoutError):
            await run_asyncio(late)
        assert trio.current_time() - start == pytest.approx(3660)


async def test_many_calls_at_once(autojump_clock: trio.testing.MockClock) -> None:
    found = []

    async def call(n: int) -> None:
        found.append(await run_asyncio(asyncio.sleep, n % 7, n))

    async with no_leaks(), open_loop(), trio.open_nursery() as nursery:
        for n in range(200):
            nursery.start_soon(call, n)
    assert sorted(found) == list(range(200))


async def test_asyncio_streams_and_subprocesses() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def talk() -> bytes:
        async with asyncio.timeout(20), await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"hello\n")
            line = await reader.readline()
            writer.close()
            await writer.wait_closed()
            return line

    async def spawn() -> tuple[bytes, int | None]:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(6 * 7)", stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        return out, process.returncode

    async with no_leaks(), open_loop():
        assert await run_asyncio(talk) == b"HELLO\n"
        assert await run_asyncio(spawn) == (b"42\n", 0)


async def test_busy_asyncio_code_lets_trio_tasks_run() -> None:
    spins = 0

    async def spin() -> None:
        nonlocal spins
        while True:
            spins += 1
            await asyncio.sleep(0)

    async with no_leaks(), open_loop() as loop:
        loop.create_task(spin())
        for _ in range(100):
            before = spins
            await trio.lowlevel.checkpoint()
            assert spins - before <= 2 * module._CALLBACKS
    assert spins > 100


async def test_one_loop_in_another_and_after_another(autojump_clock: trio.testing.MockClock) -> None:
    async def which() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async with no_leaks():
        async with open_loop() as outer:
            async with open_loop() as inner:
                assert await run_asyncio(which) is inner is not outer
                assert await run_in_asyncio(outer, which) is outer
            assert await run_asyncio(which) is outer
            assert inner.is_closed()
        async with open_loop() as next_one:
            assert await run_asyncio(which) is next_one


async def test_two_at_once(autojump_clock: trio.testing.MockClock) -> None:
    found = []

    async def use(seconds: float) -> None:
        async with open_loop() as loop:
            assert await run_asyncio(asyncio.sleep, seconds, loop) is loop
            found.append((trio.current_time(), loop))

    start = trio.current_time()
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(use, 1)
        nursery.start_soon(use, 2)
    assert [at - start for at, _ in found] == pytest.approx([1, 2])
    assert found[0][1] is not found[1][1]


async def test_tasks_that_were_there_before_do_not_have_it() -> None:
    ready, may_try = trio.Event(), trio.Event()
    errors = []

    async def before() -> None:
        ready.set()
        await may_try.wait()
        try:
            await run_asyncio(asyncio.sleep, 0)
        except LocalProtocolError as error:
            errors.append(str(error))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(before)
        await ready.wait()
        async with open_loop():
            may_try.set()
            await trio.testing.wait_all_tasks_blocked()
    assert len(errors) == 1
    assert "open_loop()" in errors[0]


async def test_a_missing_loop_is_a_clear_error() -> None:
    with pytest.raises(LocalProtocolError, match=r"no asyncio event loop here: put `async with trio_dcore\.aio\.open_loop\(\):`"):
        await run_asyncio(asyncio.sleep, 0)


async def test_the_loop_of_another_thread_is_a_clear_error() -> None:
    """A thread inherits the context variables of who has started it."""

    async def elsewhere() -> None:
        with pytest.raises(LocalProtocolError, match="belongs to another thread"):
            await run_asyncio(asyncio.sleep, 0)
        async with open_loop():
            await run_asyncio(asyncio.sleep, 0)

    async with open_loop():
        await trio.to_thread.run_sync(trio.run, elsewhere)
        await run_asyncio(asyncio.sleep, 0)


async def test_a_closed_loop_is_a_clear_error() -> None:
    async def late(task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await left.wait()
        with pytest.raises(LocalProtocolError, match="has been left"):
            await run_asyncio(asyncio.sleep, 0)

    left = trio.Event()
    async with trio.open_nursery() as nursery:
        async with open_loop():
            await nursery.start(late)
        left.set()


async def test_wrong_use() -> None:
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match="redeliver"):
            open_loop(redeliver=wrong)
    block = open_loop()
    async with block:
        with pytest.raises(LocalProtocolError, match="call it again"):
            await block.__aenter__()


async def test_entered_in_a_cancelled_scope() -> None:
    async with no_leaks():
        with trio.CancelScope() as scope:
            scope.cancel()
            async with open_loop():
                raise AssertionError("not reached")
        assert scope.cancelled_caught


async def test_not_in_asyncio_code() -> None:
    async def open_another() -> None:
        async with open_loop():
            raise AssertionError("not reached")

    async with no_leaks(), open_loop():
        with pytest.raises(LocalProtocolError, match="called from asyncio code"):
            await run_asyncio(open_another)


def test_not_where_trio_is_a_guest(run: Runner) -> None:
    """asyncio's C code would take the outer loop for the running one.  But that one can be used from trio tasks."""

    async def which() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def in_trio() -> asyncio.AbstractEventLoop:
        with pytest.raises(LocalProtocolError, match="open_loop\\(\\) is for programs that begin with trio.run"):
            open_loop()
        return await run_asyncio(which)

    async def main() -> None:
        with pytest.raises(LocalProtocolError, match="open_loop\\(\\) is for programs that begin with trio.run"):
            open_loop()
        async with open_trio() as portal:
            assert await portal.run(in_trio) is asyncio.get_running_loop()

    run(main)


def test_in_two_threads() -> None:
    found = []

    async def use() -> None:
        async with open_loop() as loop, trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(run_asyncio, asyncio.sleep, 0.001)
        found.append(loop)

    with no_leaks():
        threads = [threading.Thread(target=trio.run, args=(use,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(found)) == 2


@pytest.fixture
async def loop_of_a_fixture() -> AsyncIterator[asyncio.AbstractEventLoop]:
    async with open_loop() as loop:
        yield loop


async def test_as_a_fixture(loop_of_a_fixture: asyncio.AbstractEventLoop) -> None:
    async def which() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert await run_asyncio(which) is loop_of_a_fixture


async def test_tornado() -> None:
    """A library of asyncio's that does not know of anything here."""
    names = ("web", "httpserver", "httpclient", "netutil")
    web, httpserver, httpclient, netutil = (pytest.importorskip(f"tornado.{name}") for name in names)

    class Upper(web.RequestHandler):  # type: ignore[misc, name-defined]  # no base known
        async def get(self, text: str) -> None:
            await asyncio.sleep(0)
            self.write(await asyncio.to_thread(text.upper))

    async def serve() -> tuple[Any, int]:
        server = httpserver.HTTPServer(web.Application([("/(.*)", Upper)]))
        sockets = netutil.bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        return server, sockets[0].getsockname()[1]

    async def fetch(port: int, text: str) -> str:
        response = await httpclient.AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/{text}")
        return response.body.decode()  # type: ignore[no-any-return]

    async def close(server: Any) -> None:
        server.stop()
        await server.close_all_connections()

    async with no_leaks(), open_loop():
        server, port = await run_asyncio(serve)
        found = []

        async def use(text: str) -> None:
            found.append(await run_asyncio(fetch, port, text))

        async with trio.open_nursery() as nursery:
            for text in "abc":
                nursery.start_soon(use, text)
        assert sorted(found) == ["A", "B", "C"]
        await run_asyncio(close, server)


# -- the block ---------------------------------------------------------------------------------------------------------------------


async def test_scopes_around_are_seen_in_the_block(autojump_clock: trio.testing.MockClock) -> None:
    journal = Journal()
    async with no_leaks():
        with trio.CancelScope(deadline=trio.current_time() + 5) as scope:
            async with open_loop():
                assert trio.current_effective_deadline() == scope.deadline
                await run_asyncio(partial(journal.sleep, cleanup=0.5))
        assert scope.cancelled_caught
    assert trio.current_time() - scope.deadline == pytest.approx(0.5)
    assert journal == ["cancelled", "finally"]


async def test_cleanup_of_a_cancelled_block_may_use_the_loop(autojump_clock: trio.testing.MockClock) -> None:
    async with no_leaks():
        with trio.move_on_after(1) as scope:
            async with open_loop():
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                        assert await run_asyncio(asyncio.sleep, 1, "slept") == "slept"
        assert scope.cancelled_caught


@pytest.mark.parametrize(
    "error", [ValueError(1), ExceptionGroup("of the user's", [ValueError(1)]), KeyboardInterrupt(), StopIteration(1)]
)
async def test_what_the_block_raises_goes_on_as_it_is(error: BaseException) -> None:
    async with no_leaks():
        with pytest.raises(type(error)) as caught:
            async with open_loop():
                raise error
        assert caught.value is error


async def test_groups_of_asyncio_code_stay_and_are_not_wrapped() -> None:
    async def fail(error: Exception) -> None:
        raise error

    async def group() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail(ValueError(1)))
            tasks.create_task(fail(KeyError(2)))

    async with no_leaks(), open_loop():
        with pytest.raises(ExceptionGroup) as caught:
            await run_asyncio(group)
        assert [type(each) for each in caught.value.exceptions] == [ValueError, KeyError]
        with pytest.raises(ValueError, match="^1$"):
            await run_asyncio(fail, ValueError(1))


# -- what is left when it closes ---------------------------------------------------------------------------------------------------


async def test_stray_tasks_are_cancelled_and_awaited(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal()

    async def has_child() -> None:
        try:
            await asyncio.sleep(1e6)
        finally:
            asyncio.get_running_loop().create_task(journal.sleep())

    async with no_leaks():
        async with open_loop() as loop:
            tasks = [loop.create_task(journal.sleep(cleanup=0.5)), loop.create_task(has_child())]
            await trio.sleep(1)
            start = trio.current_time()
        assert trio.current_time() - start == pytest.approx(0.5)
        assert all(task.cancelled() for task in tasks)
    assert journal == ["cancelled", "finally"] * 2
    assert loud(caplog) == []


async def test_a_stray_task_that_swallows_is_cancelled_again_and_named(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    cancelled = []

    async def stubborn(times: int) -> None:
        for _ in range(times):
            try:
                await asyncio.sleep(1e6)
            except asyncio.CancelledError:
                cancelled.append(trio.current_time() - start)

    async with no_leaks():
        async with open_loop(redeliver=2) as loop:
            loop.create_task(stubborn(3), name="the stubborn one")
            await trio.sleep(1)
            start = trio.current_time()
        assert trio.current_time() - start == pytest.approx(4)
    assert cancelled == pytest.approx([0, 2, 4])
    assert len(loud(caplog)) == 2
    for line in loud(caplog):
        assert line.startswith("open_loop() waits for an asyncio task that does not end: the stubborn one\n")
        assert "in stubborn" in line


async def test_a_stray_task_that_is_not_cancelled_again_is_named_every_second(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal()
    async with no_leaks():
        async with open_loop(redeliver=math.inf) as loop:
            loop.create_task(journal.sleep(cleanup=3.5))
            await trio.sleep(1)
            start = trio.current_time()
        assert trio.current_time() - start == pytest.approx(3.5)
    assert journal == ["cancelled", "finally"]
    assert len(loud(caplog)) == 3


async def test_what_is_started_again_and_again_comes_to_an_end(caplog: pytest.LogCaptureFixture) -> None:
    """By a callback that restarts what has ended, whyever."""
    started = 0

    def restart(_: object) -> None:
        nonlocal started
        started += 1
        loop.create_task(asyncio.sleep(1e6)).add_done_callback(restart)

    async def source() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            await asyncio.create_task(asyncio.sleep(0))
            journal.append("closed")

    async def begin() -> int:
        restart(None)
        generators.append(source())
        return await anext(generators[0])

    generators: list[AsyncIterator[int]] = []
    journal = Journal()
    async with no_leaks():
        async with open_loop() as loop:
            assert await run_asyncio(begin) == 1
    assert started > 100
    assert journal == ["closed"]
    assert [str(record.exc_info and record.exc_info[1]) for record in caplog.records if record.levelno > logging.INFO] == [
        "this asyncio loop closes, and tasks are started in it again and again: it takes no more"
    ]


async def test_strays_may_use_trio_in_their_cleanup(autojump_clock: trio.testing.MockClock) -> None:
    from trio_dcore.aio import run_in_trio
    from trio_dcore.aio._portal import current_portal

    journal = []

    async def clean_up() -> None:
        portal = current_portal.get()
        assert portal is not None
        try:
            await asyncio.sleep(1e6)
        finally:
            await run_in_trio(portal, trio.sleep, 0.5)
            journal.append("cleaned up")

    async with no_leaks():
        async with open_loop() as loop:
            loop.create_task(clean_up())
            await trio.sleep(1)
    assert journal == ["cleaned up"]


async def test_what_strays_have_open_is_closed() -> None:
    """Also where the task has none of the context of the block, as those that another thread starts."""
    from trio_dcore import Server, aio

    begun = trio.Event()
    remotes = []

    async def call(address: str) -> None:
        remote = aio.rpc(address)
        remotes.append(remote)
        assert await remote.echo(data=1) == 1
        begun.set()
        await asyncio.sleep(1e6)

    def start(loop: asyncio.AbstractEventLoop, address: str) -> None:
        loop.call_soon_threadsafe(lambda: loop.create_task(call(address)), context=Context())

    async with no_leaks(), Server() as server:
        address = await server.listen("tcp://127.0.0.1:0")
        async with open_loop() as loop:
            await trio.to_thread.run_sync(start, loop, address)
            await begun.wait()
        with trio.fail_after(10):
            while server.statistics().connections:  # noqa: ASYNC110  # nobody tells of that
                await trio.sleep(0.001)
    assert len(remotes) == 1


async def test_what_does_not_end_in_trio_is_named(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def stubborn() -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(4.5)

    async def call() -> None:
        async with open_trio() as portal:
            await portal.run(stubborn)

    async with no_leaks():
        async with open_loop() as loop:
            loop.create_task(call())
            await trio.sleep(1)
            start = trio.current_time()
        assert trio.current_time() - start == pytest.approx(3.5)
    lines = [line.splitlines() for line in loud(caplog)]
    assert lines
    assert all("does not end: " in first for first, *_ in lines)
    assert any(first.startswith("open_loop() waits for a trio task") for first, *_ in lines)
    assert any("in stubborn" in line for _, *stack in lines for line in stack)


async def test_the_failure_of_a_stray_task_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def fail_when_cancelled() -> None:
        try:
            await asyncio.sleep(1e6)
        finally:
            raise ValueError("in cleanup")

    async with no_leaks():
        async with open_loop() as loop:
            loop.create_task(fail_when_cancelled())
            await trio.testing.wait_all_tasks_blocked()
    assert len(loud(caplog)) == 1
    assert loud(caplog)[0].startswith("an asyncio task that was cancelled because its loop closes has failed\n")
    caplog.clear()


async def test_errors_that_nobody_looks_at_are_logged_and_end_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """trio-asyncio's loops crash by them, and the whole program with them."""

    async def fail() -> None:
        raise ValueError("nobody asks")

    seen: list[dict[str, Any]] = []
    async with no_leaks(), open_loop() as loop:
        loop.create_task(fail())
        loop.call_soon(partial(int, "x"))
        await trio.testing.wait_all_tasks_blocked()
        gc.collect()  # that is when asyncio finds out
        loop.set_exception_handler(lambda _, context: seen.append(context))
        loop.call_soon(partial(int, "y"))
        assert await run_asyncio(asyncio.sleep, 0, "on it goes") == "on it goes"
    assert sorted(line[:24] for line in loud(caplog)) == ["Exception in callback in", "Task exception was never"]
    assert [str(context["exception"]) for context in seen] == ["invalid literal for int() with base 10: 'y'"]
    caplog.clear()


async def test_async_generators_are_closed(autojump_clock: trio.testing.MockClock) -> None:
    journal = []
    kept = []

    async def generator() -> Any:
        try:
            yield 1
        finally:
            await asyncio.sleep(0.5)
            journal.append("closed")

    async def begin() -> None:
        kept.append(generator())
        await anext(kept[0])

    async with no_leaks():
        async with open_loop():
            await run_asyncio(begin)
    assert journal == ["closed"]


async def test_async_generators_that_do_not_close_are_cancelled_and_named(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    kept = []

    async def generator() -> Any:
        try:
            yield 1
        finally:
            await asyncio.sleep(1e6)

    async def begin() -> None:
        kept.append(generator())
        await anext(kept[0])

    async with no_leaks():
        async with open_loop(redeliver=1):
            await run_asyncio(begin)
            start = trio.current_time()
        assert trio.current_time() - start == pytest.approx(1)
    assert loud(caplog) == []  # it ended by the first


async def test_async_generators_are_closed_when_nobody_runs_them(autojump_clock: trio.testing.MockClock) -> None:
    """So after the calls from outside have ended, too."""

    async def generator() -> Any:
        try:
            await asyncio.sleep(1e6)
            yield 1
        finally:
            await asyncio.sleep(0.5)

    async def use() -> None:
        async for _ in generator():
            pass

    async def call(task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        with pytest.raises(RuntimeError, match="nobody on the other side"):
            await run_asyncio(use)

    unseen: list[dict[str, Any]] = []
    async with no_leaks(), trio.open_nursery() as nursery:
        async with open_loop() as loop:
            loop.set_exception_handler(lambda _, context: unseen.append(context))
            await nursery.start(call)
            await trio.sleep(1)
    assert unseen == []


async def test_what_asyncio_code_runs_in_trio_ends(autojump_clock: trio.testing.MockClock) -> None:
    """By trio-asyncio's own functions."""
    open_loop()  # imports it, as it has to be
    import trio_asyncio

    journal = []

    async def in_trio() -> None:
        try:
            await trio.sleep_forever()
        finally:
            journal.append("ended")

    async def start() -> None:
        trio_asyncio.run_trio_task(in_trio)
        asyncio.ensure_future(trio_asyncio.trio_as_aio(in_trio)())  # noqa: RUF006  # a stray
        await asyncio.sleep(1)

    async with no_leaks():
        async with open_loop():
            await run_asyncio(start)
    assert journal == ["ended", "ended"]


async def test_calls_from_trio_tasks_that_outlive_the_block(autojump_clock: trio.testing.MockClock) -> None:
    """They come last, and are told."""
    journal = Journal()
    errors = []

    async def call(task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        try:
            await run_asyncio(journal.sleep)
        except RuntimeError as error:
            errors.append(repr(error.__cause__))

    async with no_leaks(), trio.open_nursery() as nursery:
        async with open_loop():
            await nursery.start(call)
            await trio.sleep(1)
    assert journal == ["cancelled", "finally"]
    assert errors == ["CancelledError('the asyncio loop closes')"]


# -- exits -------------------------------------------------------------------------------------------------------------------------


async def test_a_loop_that_is_stopped_ends_the_block() -> None:
    """As asyncio.run() fails by it: whoever waits would wait for ever."""
    journal = Journal()
    async with no_leaks():
        with pytest.raises(RuntimeError, match="loop.stop"):
            async with open_loop() as loop:
                loop.call_soon(loop.stop)
                await run_asyncio(partial(journal.sleep, cleanup=0.01))
    assert journal == ["cancelled", "finally"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_exits_in_stray_tasks_end_the_block(error: BaseException) -> None:
    journal = Journal()

    async def leave() -> None:
        await asyncio.sleep(1)
        raise error

    async def main() -> None:
        async with open_loop() as loop:
            loop.create_task(journal.sleep(cleanup=1))
            task = loop.create_task(leave())
            try:
                await run_asyncio(partial(journal.sleep, cleanup=0.5))
            finally:
                journal.append("block left")
                assert task.exception() is error  # else asyncio logs that nobody asked

    with no_leaks(), pytest.raises(type(error)) as caught:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert caught.value is error
    assert journal == ["cancelled", "finally", "block left", "cancelled", "finally"]


class _InterruptedAt(trio.abc.Instrument):
    """Ctrl-C before the n-th step of a trio task."""

    def __init__(self, n: int) -> None:
        self.left = n

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_at_every_step() -> None:
    """Also while the loop is being opened, and closed."""

    async def main() -> None:
        async with open_loop():
            await run_asyncio(asyncio.sleep, 0)

    steps = 0
    while True:
        steps += 1
        interrupted = _InterruptedAt(steps)
        with no_leaks():
            try:
                trio.run(main, instruments=[interrupted])
            except KeyboardInterrupt:
                pass
        if interrupted.left > 0:
            break
    assert steps > 20


@pytest.mark.parametrize("part", ["_make_self_pipe", "_main_loop_init", "_main_loop"])
def test_ctrl_c_while_the_loop_is_made(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trio_asyncio = pytest.importorskip("trio_asyncio")
    made = getattr(trio_asyncio.TrioEventLoop, part)

    def interrupted(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return made(*args, **options)

    async def main() -> None:
        async with open_loop():
            await trio.sleep_forever()

    monkeypatch.setattr(trio_asyncio.TrioEventLoop, part, interrupted)
    with no_leaks(), pytest.raises(KeyboardInterrupt):
        trio.run(main)


def test_an_exit_in_the_very_first_callback() -> None:
    async def main() -> None:
        async with open_loop() as loop:
            loop.call_soon(sys.exit, 3)
            loop.create_task(asyncio.sleep(1e6))
            await trio.sleep_forever()

    with no_leaks(), pytest.raises(SystemExit, match="3"):
        trio.run(main)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_exits_in_trio_tasks_of_asyncio_code_end_the_block(error: BaseException) -> None:
    """They are started by trio-asyncio's own functions."""
    journal = Journal()

    async def leave() -> None:
        await trio.sleep(1)
        raise error

    async def main() -> None:
        async with open_loop() as loop:
            import trio_asyncio

            loop.create_task(journal.sleep(cleanup=1))
            trio_asyncio.run_trio_task(leave)
            try:
                await run_asyncio(partial(journal.sleep, cleanup=0.5))
            finally:
                journal.append("block left")

    with no_leaks(), pytest.raises(type(error)) as caught:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert caught.value is error
    assert journal == ["cancelled", "finally", "block left", "cancelled", "finally"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_exits_in_calls_are_raised_by_them(error: BaseException) -> None:
    async def leave() -> None:
        await asyncio.sleep(1)
        raise error

    async def main() -> None:
        async with open_loop():
            with pytest.raises(type(error)) as caught:
                await run_asyncio(leave)
            assert caught.value is error
            assert await run_asyncio(asyncio.sleep, 1, "on it goes") == "on it goes"

    with no_leaks():
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.skipif(os.name == "nt", reason="Windows can't send SIGINT to one process")
def test_ctrl_c_interrupts_what_a_call_computes() -> None:
    journal = []

    async def compute() -> None:
        end = time.monotonic() + 5
        os.kill(os.getpid(), signal.SIGINT)
        while time.monotonic() < end:
            pass
        journal.append("not interrupted")

    async def main() -> None:
        async with open_loop():
            await run_asyncio(compute)

    with no_leaks(), pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert journal == []


@pytest.mark.skipif(os.name == "nt", reason="Windows can't send SIGINT to one process")
def test_ctrl_c_while_the_loop_is_busy_goes_to_the_main_task() -> None:
    """And to none of the callbacks: one that is lost is a task that never ends."""
    journal = Journal()

    async def interrupt() -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        journal.append("not interrupted")

    async def main() -> None:
        async with open_loop() as loop:
            loop.create_task(journal.sleep())
            loop.create_task(interrupt())
            await trio.sleep_forever()

    with no_leaks(), pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert sorted(journal) == ["cancelled", "finally", "not interrupted"]


# -- sweeps, leaks and debugging ---------------------------------------------------------------------------------------------------


async def test_cancelled_at_every_step(autojump_clock: trio.testing.MockClock) -> None:
    async def scenario() -> None:
        journal = Journal()
        try:
            async with open_loop() as loop:
                loop.create_task(journal.sleep(cleanup=0.1))
                await run_asyncio(asyncio.sleep, 0.1)
                await run_asyncio(asyncio.sleep, 0)
                await run_asyncio(partial(journal.sleep, 0.1, cleanup=0.1))
                journal.append("end")
        finally:
            entries = [entry for entry in journal if entry != "end"]
            assert entries.count("finally") == entries.count("cancelled") + ("end" in journal)

    async def works() -> None:
        async with open_loop():
            assert await run_asyncio(asyncio.sleep, 0, "works") == "works"

    assert await cancel_sweep(scenario, check=works) > 20
    # The steps of everybody, so also those of the loop while the block waits.
    assert await cancel_sweep(scenario, steps="own") > 5


async def test_no_leaks_counts_asyncio_tasks() -> None:
    async with open_loop() as loop:
        with pytest.raises(LeakError, match="asyncio task the forgotten one"):
            async with no_leaks():
                loop.create_task(asyncio.sleep(1e6), name="the forgotten one")
        async with no_leaks():
            await run_asyncio(asyncio.sleep, 0)


async def test_debug_mode_is_clean(caplog: pytest.LogCaptureFixture) -> None:
    async with no_leaks():
        async with open_loop() as loop:
            loop.set_debug(True)
            await trio.testing.wait_all_tasks_blocked()
            await run_asyncio(asyncio.sleep, 0)
            assert sys.get_coroutine_origin_tracking_depth() > 0
            loop.create_task(asyncio.sleep(1e6))
    assert sys.get_coroutine_origin_tracking_depth() == 0
    assert loud(caplog) == []


def test_asyncio_elsewhere_is_left_alone() -> None:
    """trio-asyncio makes every new event loop of the process one on trio."""
    printed = fresh("""
        import asyncio, threading, trio
        from trio_dcore.aio import open_loop

        async def kind():
            return type(asyncio.get_running_loop()).__name__

        def run():
            print(asyncio.run(kind()))

        expected = asyncio.run(kind())
        async def main():
            async with open_loop():
                await trio.to_thread.run_sync(run)
        trio.run(main)
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        print(expected)
    """)
    assert len(set(printed.split())) == 1
    assert "Trio" not in printed


# -- where there is no trio-asyncio ------------------------------------------------------------------------------------------------

MISSING = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name == "trio_asyncio":
                raise ModuleNotFoundError("No module named 'trio_asyncio'", name=name)

    sys.meta_path.insert(0, Blocker())
"""


def test_without_trio_asyncio() -> None:
    printed = fresh(
        textwrap.dedent(MISSING)
        + textwrap.dedent("""
            import trio_dcore.aio as aio

            try:
                aio.open_loop()
            except ImportError as error:
                print(error.name, error)
        """)
    )
    assert printed.startswith("trio_asyncio aio.open_loop() needs trio-asyncio: pip install 'trio_dcore[asyncio]'")


@pytest.mark.parametrize(
    ("version", "refused"), [("0.15.0", True), ("0.16.0", True), ("0.16.1", True), ("0.17.0", False), ("1.0", False)]
)
def test_python_3_14(version: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    monkeypatch.setattr("importlib.metadata.version", {"trio_asyncio": version}.__getitem__)
    if refused:
        with pytest.raises(ImportError, match=r"don't support Python 3\.14.*aio\.open_trio\(\)"):
            open_loop()
    else:
        assert isinstance(open_loop(), module.open_loop)
