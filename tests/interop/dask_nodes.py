"""What the tests of Dask inside a trio program share: nodes to start, tasks to run on them, and what must not be left.

The fixtures are known to the tests by way of conftest.py.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from distributed import Client, Scheduler, Worker, wait
from distributed.security import Security as StockSecurity

from tests.reference.identities import ours
from trio_dcore import aio

# Far above what any of these tests needs: it ends a test that hangs.
PATIENCE = 60.0
# Much more than closing takes (some 50 ms), and much less than Dask's own timeouts (30 s).
SOON = 2.0


# -- what runs on the workers ------------------------------------------------------------------------------------------


class Gate:
    """Holds tasks on workers, which are threads of this process."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.left = 0

    async def wait_entered(self, tasks: int) -> None:
        for _ in range(tasks):
            assert await trio.to_thread.run_sync(partial(self.entered.acquire, timeout=PATIENCE))


GATES: dict[str, Gate] = {}


def square(n: int) -> int:
    return n * n


def refuse(n: int) -> int:
    raise LookupError(f"nothing about {n}")


def held(n: int, name: str) -> int:
    gate = GATES[name]
    gate.entered.release()
    gate.open.wait(PATIENCE)
    gate.left += 1
    return n


async def stubborn(n: int, name: str) -> int:
    """A task that runs in the worker's event loop, and swallows cancellations."""
    gate = GATES[name]
    gate.entered.release()
    while not gate.open.is_set():
        try:
            await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            pass
    return n


@pytest.fixture
def gate(request: pytest.FixtureRequest) -> Iterator[Gate]:
    """One for this test, under its name; open when the test is over, and its threads have ended."""
    GATES[request.node.name] = gate = Gate()
    yield gate
    gate.open.set()
    for thread in threading.enumerate():
        if "Dask-Default-Threads" in thread.name:
            thread.join(PATIENCE)
    del GATES[request.node.name]


# -- the cluster -------------------------------------------------------------------------------------------------------


async def results(client: Client, function: Callable[..., Any], numbers: Any, *args: Any) -> list[Any]:
    """asyncio's flavour: map and gather, with nothing left in the cluster however it ends.  (docs/dask-from-trio.md has it.)"""
    futures = client.map(function, numbers, *([arg] * len(numbers) for arg in args), pure=False)
    try:
        await wait(futures)
        return list(await client.gather(futures))
    finally:
        for future in futures:
            future.release()


@dataclass
class Cluster:
    """Everything of one that tests look at."""

    nursery: trio.Nursery
    scheduler: Scheduler
    workers: list[Worker]
    client: Client

    async def run(self, function: Callable[..., Any], numbers: Any, *args: Any) -> list[Any]:
        return await aio.run_asyncio(results, self.client, function, numbers, *args)

    async def wait_forgotten(self) -> None:
        """Until the scheduler knows of no task any more."""
        with trio.fail_after(PATIENCE):
            while self.scheduler.tasks:  # noqa: ASYNC110  # it tells nobody
                await trio.sleep(0.005)


class Making:
    """Makes clusters, and nodes like theirs."""

    def __init__(self, folder: Path, protocol: str) -> None:
        self.security = {} if protocol == "tcp" else {"security": stock_security()}
        # The workers' and the scheduler's HTTP server has a port as well.
        here = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0", "local_directory": str(folder)}
        self.of_scheduler: dict[str, Any] = {"port": 0, "protocol": protocol, **here, **self.security}
        self.of_worker: dict[str, Any] = {"protocol": protocol, "nthreads": 1, "memory_limit": 0, **here, **self.security}

    @asynccontextmanager
    async def cluster(self, *, grace: float = 5.0) -> AsyncIterator[Cluster]:
        """A scheduler, two workers and a client in one nursery, which is cancelled at the end of the block: all of them at once."""
        with trio.fail_after(PATIENCE):
            async with aio.open_loop() as loop:
                async with trio.open_nursery() as nursery:
                    serve = partial(aio.serve_dask, grace=grace)
                    scheduler = await nursery.start(partial(serve, Scheduler, **self.of_scheduler))
                    workers = [await nursery.start(partial(serve, Worker, scheduler.address, **self.of_worker)) for _ in range(2)]
                    client = await nursery.start(partial(serve, Client, scheduler.address, **self.security))
                    yield Cluster(nursery, scheduler, workers, client)
                    nursery.cancel_scope.cancel()
                await no_tasks(loop)
                assert {scheduler.status.name, client.status, *(worker.status.name for worker in workers)} == {"closed"}

    @asynccontextmanager
    async def scheduler(self, **options: Any) -> AsyncIterator[Scheduler]:
        """One in a loop of its own."""
        with trio.fail_after(PATIENCE):
            async with aio.open_loop() as loop:
                async with aio.open_dask(Scheduler, **{**self.of_scheduler, **options}) as scheduler:
                    yield scheduler
                await no_tasks(loop)


async def no_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """No asyncio task is left; those that are about to end get a moment."""
    with trio.move_on_after(SOON):
        while asyncio.all_tasks(loop):  # noqa: ASYNC110  # it tells nobody
            await trio.sleep(0.005)
    assert [repr(task) for task in asyncio.all_tasks(loop)] == []


def stock_security() -> StockSecurity:
    identity = ours()
    parts = {"cert": identity.certificate, "key": identity.key}
    roles = {f"tls_{role}_{part}": text for role in ("client", "scheduler", "worker") for part, text in parts.items()}
    return StockSecurity(tls_ca_file=identity.authority, require_encryption=True, **roles)


both = pytest.mark.parametrize("protocol", ["tcp", "tls"])


@pytest.fixture
def protocol() -> str:
    return "tcp"


@pytest.fixture
def making(tmp_path: Path, protocol: str) -> Making:
    return Making(tmp_path, protocol)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What has been logged as a warning or worse.  Dask's own loggers tell pytest nothing by themselves."""
    logger = logging.getLogger("distributed")
    logger.addHandler(caplog.handler)
    yield lambda: [f"{r.name}: {r.getMessage()}" for r in caplog.records if r.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)
