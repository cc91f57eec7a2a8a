"""trio_dcore.aio._executors: run_in_executor() as asyncio has it, in a loop on trio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import multiprocessing
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio

from tests.aio.available import needs_trio_asyncio
from trio_dcore.aio import open_loop, run_asyncio
from trio_dcore.testing import no_leaks

pytestmark = needs_trio_asyncio


async def run_in(executor: concurrent.futures.Executor | None, function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(executor, function, *args)


def thread_name() -> str:
    return threading.current_thread().name


async def test_the_default_executor() -> None:
    async with no_leaks(), open_loop():
        assert (await run_asyncio(run_in, None, thread_name)).startswith("asyncio_")
        assert await run_asyncio(asyncio.to_thread, pow, 2, 5) == 32
        with pytest.raises(ZeroDivisionError):
            await run_asyncio(run_in, None, divmod, 1, 0)


async def test_an_executor_of_ones_own() -> None:
    async with no_leaks():
        with concurrent.futures.ThreadPoolExecutor(thread_name_prefix="own") as executor:
            async with open_loop():
                assert (await run_asyncio(run_in, executor, thread_name)).startswith("own")
            # It isn't the loop's to shut down.
            assert executor.submit(pow, 2, 5).result() == 32


async def test_trio_asyncios_executor() -> None:
    async with no_leaks(), open_loop() as loop:
        import trio_asyncio  # as open_loop() imports it: not at the top, where it warns, and changes asyncio for everybody

        executor = trio_asyncio.TrioExecutor(max_workers=1)
        assert await run_asyncio(run_in, executor, pow, 2, 5) == 32
        loop.set_default_executor(executor)
        assert not (await run_asyncio(run_in, None, thread_name)).startswith("asyncio_")


async def test_another_default_executor_is_shut_down_with_the_loop() -> None:
    async with no_leaks():
        executor = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="own")
        async with open_loop() as loop:
            assert (await run_asyncio(run_in, None, thread_name)).startswith("asyncio_")
            loop.set_default_executor(executor)
            assert (await run_asyncio(run_in, None, thread_name)).startswith("own")
        with pytest.raises(RuntimeError, match="shutdown"):
            executor.submit(pow, 2, 5)


async def test_wrong_default_executors() -> None:
    async with open_loop() as loop:
        with pytest.raises(TypeError, match="must be a ThreadPoolExecutor"):
            loop.set_default_executor(None)  # type: ignore[arg-type]


async def test_processes() -> None:
    # The first of a process starts a helper of multiprocessing's, which stays.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as warm:
        warm.submit(pow, 2, 5).result()
    async with no_leaks(), open_loop():
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            assert await run_asyncio(run_in, executor, pow, 2, 5) == 32
            with pytest.raises(ZeroDivisionError):
                await run_asyncio(run_in, executor, divmod, 1, 0)


async def test_names_are_resolved() -> None:
    async def resolve() -> bool:
        return bool(await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM))

    async with no_leaks(), open_loop():
        assert await run_asyncio(resolve)


async def test_a_timeout_does_not_wait_for_the_thread() -> None:
    """With trio-asyncio's executor it does, and then is lost."""
    may_end = threading.Event()

    async def impatient() -> None:
        async with asyncio.timeout(0.01):
            await run_in(None, may_end.wait, 20)

    async with no_leaks(), open_loop():
        with pytest.raises(TimeoutError):
            await run_asyncio(impatient)
        assert not may_end.is_set()
        may_end.set()


async def test_threads_are_waited_for_and_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("trio_dcore.aio._executors._EVERY", 0.01)
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        while not caplog.records:
            ended.wait(0.001)
        ended.set()

    async with no_leaks():
        async with open_loop(), trio.open_nursery() as nursery:
            nursery.start_soon(run_asyncio, run_in, None, work)
            while not begun.is_set():  # noqa: ASYNC110  # a thread's
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        assert ended.is_set()
    warnings = {record.getMessage() for record in caplog.records if record.levelno > logging.INFO}
    assert warnings == {
        "open_loop() waits for a function that runs in its default executor: test_threads_are_waited_for_and_named.<locals>.work"
    }


async def test_what_waits_for_a_thread_of_a_pool_is_dropped_when_cancelled() -> None:
    ran = []
    begun, may_end = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        may_end.wait(20)

    async def queue() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
        running = loop.run_in_executor(None, first)
        queued = loop.run_in_executor(None, ran.append, "queued")
        while not begun.is_set():  # noqa: ASYNC110  # a thread's
            await asyncio.sleep(0.001)
        queued.cancel()
        await asyncio.sleep(0)  # it tells the pool by a callback
        may_end.set()
        await running

    async with no_leaks():
        async with open_loop():
            await run_asyncio(queue)
    assert ran == []


async def test_the_default_executor_can_be_shut_down_before() -> None:
    async def shut_down() -> None:
        loop = asyncio.get_running_loop()
        await run_in(None, pow, 2, 5)
        await loop.shutdown_default_executor()
        with pytest.raises(RuntimeError, match="has been shut down"):
            await run_in(None, pow, 2, 5)

    async with no_leaks(), open_loop():
        await run_asyncio(shut_down)


async def test_a_closed_loop() -> None:
    async with open_loop() as loop:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        loop.run_in_executor(None, pow, 2, 5)
