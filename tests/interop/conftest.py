"""Stock Dask as the other side: real ``distributed`` servers, clients and clusters, in an asyncio loop in a thread of its own.

Nothing is mocked.  ``stock`` runs stock code and waits for it from trio; ``ours`` and ``stock.serve`` are servers for one block.
Around every test stands ``leaves_nothing``: when both sides are closed no task, thread or file descriptor may be left.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import dask
import numpy
import pytest
import trio
from distributed import Scheduler, Worker
from distributed.core import ConnectionPool as StockConnectionPool
from distributed.core import Server as StockServer
from distributed.core import rpc as stock_rpc

import trio_dcore
from tests.interop.dask_nodes import gate, making, protocol, said  # noqa: F401  # fixtures
from trio_dcore import ConnectionPool, Server, rpc

_PACKAGE = str(Path(trio_dcore.__file__).parent)

# Far above what any of these tests needs: it ends a test that hangs.
_PATIENCE = 10.0

# Kept by those who started them: trio's cache of idle worker threads, stock Dask's thread for large messages, and its profiler,
# which notices some milliseconds later that its loop has been closed (stock Dask does without it on Python 3.11).
_LASTING_THREADS = ("Trio thread", "Dask-Offload", "Profile")

Handlers = dict[str, Callable[..., Any]]


class Stock:
    """An asyncio loop in a thread, for stock code.

    Args:
        scratch: where stock servers may keep their files.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stock loop", daemon=True)

    def __enter__(self) -> Stock:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            raise RuntimeError(f"the stock loop does not end: {asyncio.all_tasks(self._loop)}")

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._ready.set()
        await self._stop.wait()

    async def run(self, afn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Run an asyncio function in the stock loop and wait for its result.

        Cancellation: cancels it there and waits until it has ended.
        """
        assert self._loop is not None
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()

        async def main() -> Any:
            return await afn(*args)

        future = asyncio.run_coroutine_threadsafe(main(), self._loop)
        future.add_done_callback(lambda _: token.run_sync_soon(done.set))
        try:
            with trio.fail_after(_PATIENCE):
                await done.wait()
        except BaseException:
            future.cancel()
            with trio.CancelScope(shield=True), trio.move_on_after(_PATIENCE):
                await done.wait()
            raise
        return future.result()

    async def call(self, kind: str, address: str, afn: Callable[[Any], Awaitable[Any]], **options: Any) -> Any:
        """Call ``afn`` in the stock loop with a stock ``rpc`` or a proxy of a stock ``ConnectionPool`` towards ``address``."""

        async def through_rpc() -> Any:
            async with stock_rpc(address, **options) as remote:
                return await afn(remote)

        async def through_pool() -> Any:
            pool = await StockConnectionPool(**options)
            try:
                return await afn(pool(address))
            finally:
                await pool.close()

        return await self.run({"rpc": through_rpc, "pool": through_pool}[kind])

    @asynccontextmanager
    async def serve(self, handlers: Handlers | None = None, **options: Any) -> AsyncIterator[StockServer]:
        """A stock Server for one block."""

        async def start() -> StockServer:
            server: StockServer = await StockServer(handlers or {}, local_directory=str(self._scratch), **options)
            await server.listen("tcp://127.0.0.1:0")
            return server

        server = await self.run(start)
        with trio.fail_after(_PATIENCE):
            try:
                yield server
            finally:
                await self._finally(server.close)

    @asynccontextmanager
    async def cluster(self) -> AsyncIterator[tuple[Scheduler, Worker]]:
        """A real Scheduler with one real Worker for one block."""

        async def start_scheduler() -> Scheduler:
            # dashboard=False leaves out bokeh; the plain HTTP server that stays needs a port of its own.
            started: Scheduler = await Scheduler(
                host="127.0.0.1", port=0, dashboard=False, dashboard_address="127.0.0.1:0", local_directory=str(self._scratch)
            )
            return started

        async def start_worker() -> Worker:
            started: Worker = await Worker(
                scheduler.address,
                nthreads=1,
                host="127.0.0.1",
                dashboard=False,
                dashboard_address="127.0.0.1:0",
                local_directory=str(self._scratch),
                memory_limit=0,
            )
            return started

        with trio.fail_after(_PATIENCE):
            scheduler = await self.run(start_scheduler)
            try:
                worker = await self.run(start_worker)
                try:
                    yield scheduler, worker
                finally:
                    await self._finally(worker.close)
            finally:
                await self._finally(scheduler.close)

    async def _finally(self, afn: Callable[[], Awaitable[Any]]) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(_PATIENCE):
            await self.run(afn)


def _descriptors() -> set[tuple[str, str]]:
    """Sockets, pipes and polls that the process has open, with what they are; nothing where the system can't tell."""
    directory = Path("/proc/self/fd")
    found = set()
    for entry in os.listdir(directory) if directory.exists() else ():
        try:
            target = os.readlink(directory / entry)
        except FileNotFoundError:
            continue  # the descriptor of this very listing
        if not target.startswith("/"):
            found.add((entry, target))
    return found


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.name.startswith(_LASTING_THREADS)}


def _tasks_of_ours() -> list[str]:
    """Names of the living trio tasks that run code of the package."""

    def below(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
        yield task
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                yield from below(child)

    root = trio.lowlevel.current_root_task()
    assert root is not None
    found = []
    for task in below(root):
        code = getattr(task.coro, "cr_code", None)
        if code is not None and code.co_filename.startswith(_PACKAGE):
            found.append(task.name)
    return found


class Leftovers:
    """What has come since this was made and is still there."""

    def __init__(self) -> None:
        self._threads, self._descriptors = _threads(), _descriptors()

    def found(self) -> list[str]:
        """Names of threads, and targets of file descriptors."""
        threads = [thread.name for thread in _threads() - self._threads]
        return threads + [f"{number} -> {target}" for number, target in _descriptors() - self._descriptors]


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """The same threads and file descriptors after a test as before it, once both sides are closed.

    Nothing is collected or waited for: what is left here, somebody has not closed.
    """
    leftovers = Leftovers()
    yield
    assert leftovers.found() == []


@pytest.fixture(autouse=True)
async def leaves_no_task() -> AsyncIterator[None]:
    """No task of the package outlives the block that started it."""
    assert _tasks_of_ours() == []
    yield
    assert _tasks_of_ours() == []


@pytest.fixture
def watch() -> type[Leftovers]:
    """For the test of ``leaves_nothing`` itself."""
    return Leftovers


@pytest.fixture
def tasks_of_ours() -> Callable[[], list[str]]:
    """For the test of ``leaves_no_task`` itself."""
    return _tasks_of_ours


@pytest.fixture
def stock(leaves_nothing: None, tmp_path: Path) -> Iterator[Stock]:
    """The stock side."""
    with dask.config.set({"distributed.comm.timeouts.connect": "10s"}), Stock(tmp_path) as side:
        yield side


@pytest.fixture
def ours() -> Callable[..., AbstractAsyncContextManager[Server]]:
    """A trio_dcore Server that listens on loopback for one block: ``async with ours(handlers) as server``."""

    @asynccontextmanager
    async def serve(handlers: Handlers | None = None, **options: Any) -> AsyncIterator[Server]:
        with trio.fail_after(_PATIENCE):
            async with Server(handlers, **options) as server:
                await server.listen("tcp://127.0.0.1:0")
                yield server

    return serve


@pytest.fixture
def connected() -> Callable[..., AbstractAsyncContextManager[Any]]:
    """Our ``rpc``, or a proxy of our ``ConnectionPool``, for one block: ``async with connected(kind, address) as remote``."""

    @asynccontextmanager
    async def connect(kind: str, address: str, **options: Any) -> AsyncIterator[Any]:
        if kind == "rpc":
            async with rpc(address, **options) as remote:
                yield remote
        else:
            async with ConnectionPool(**options) as pool:
                yield pool(address)

    return connect


@pytest.fixture(params=["rpc", "pool"])
def kind(request: pytest.FixtureRequest) -> str:
    """Both ways that a client has to call."""
    return str(request.param)


@pytest.fixture
def same() -> Callable[[Any, Any], None]:
    """Assert that two values are equal and of one type, arrays in dtype, shape and content."""

    def check(found: Any, expected: Any) -> None:
        assert type(found) is type(expected)
        if isinstance(expected, numpy.ndarray):
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            numpy.testing.assert_array_equal(found, expected)
        else:
            assert found == expected

    return check
