"""A real Dask cluster inside a trio program: stock scheduler, workers and client in one nursery, used by trio tasks and by our Server.

Nothing is mocked.  Beyond what the fixtures of this directory compare (threads, descriptors, tasks of ours), each cluster's event loop is
asked for tasks that are left when its nodes have closed.  The only thread of Dask's that outlives a cluster is "Dask-Offload": one for the
whole process, which handles large messages and is never shut down.
"""

from __future__ import annotations

import asyncio
import gc
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
from distributed import Client, LocalCluster, Scheduler, Worker, wait
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.security import Security as StockSecurity

from tests.reference.identities import ours
from trio_dcore import HandlerCancelled, Server, aio, rpc
from trio_dcore.errors import LocalProtocolError
from trio_dcore.testing import cancel_sweep

# Far above what any of these tests needs: it ends a test that hangs.
PATIENCE = 20.0
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


# -- a real cluster in one nursery -------------------------------------------------------------------------------------


@both
async def test_map_and_gather(making: Making, said: Any) -> None:
    """1 000 tasks; and an orderly end logs nothing."""
    async with making.cluster() as cluster:
        assert await cluster.run(square, range(1000)) == [n * n for n in range(1000)]
        await cluster.wait_forgotten()
    gc.collect()
    assert said() == []


@both
async def test_a_failing_task(making: Making) -> None:
    """Its error comes out of the trio call as itself, not in a group; the cluster goes on."""
    async with making.cluster() as cluster:
        with pytest.raises(LookupError, match="nothing about 3"):
            await cluster.run(refuse, [3])
        await cluster.wait_forgotten()
        assert await cluster.run(square, [3]) == [9]


@both
async def test_a_scope_cancelled_in_the_middle_of_a_computation(making: Making, gate: Gate, said: Any, request: Any) -> None:
    """The call ends at once, what has not begun on the workers never does, and the client is as good as new."""
    async with making.cluster() as cluster:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.run, held, range(100), request.node.name)
            await gate.wait_entered(2)
            before = trio.current_time()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - before < SOON
        await cluster.wait_forgotten()
        gate.open.set()
        assert await cluster.run(square, range(10)) == [n * n for n in range(10)]
        await cluster.wait_forgotten()
    assert gate.left <= 4  # those that run, and those that the workers had in store
    gc.collect()
    assert said() == []


@both
async def test_shutdown_with_work_in_flight(making: Making, gate: Gate, request: Any) -> None:
    """A function in a thread can't be interrupted: it is waited for, and its thread has ended when the cluster has."""
    async with making.cluster(grace=PATIENCE) as cluster:
        cluster.nursery.start_soon(cluster.run, held, range(100), request.node.name)
        await gate.wait_entered(2)

        async def open_it() -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.2)
                before.append(trio.current_time())
                gate.open.set()

        before: list[float] = []
        cluster.nursery.start_soon(open_it)
    assert trio.current_time() - before[0] < SOON
    assert gate.left == 2
    assert not [thread for thread in threading.enumerate() if "Dask-Default" in thread.name]


async def test_shutdown_with_work_that_does_not_end(making: Making, gate: Gate, said: Any, request: Any) -> None:
    """The grace is one for all: stock workers wait for their threads one after the other."""
    async with making.cluster(grace=1) as cluster:
        cluster.nursery.start_soon(cluster.run, held, range(100), request.node.name)
        await gate.wait_entered(2)
        before = trio.current_time()
    assert 1 <= trio.current_time() - before < 2
    left = [line for line in said() if "leaves a thread to itself" in line]
    assert len(left) == 2
    assert all("held-" in line and "gate.open.wait" in line for line in left)
    gate.open.set()  # and the fixture waits for the threads


async def test_a_scheduler_that_goes_takes_its_workers_along(making: Making, gate: Gate, request: Any) -> None:
    """``Client.shutdown()``: the workers close themselves, with what they would wait for; the tasks that serve them end."""
    with trio.fail_after(PATIENCE):
        async with aio.open_loop(), trio.open_nursery() as nursery:
            serve = partial(aio.serve_dask, grace=0.3)
            scheduler = await nursery.start(partial(serve, Scheduler, **making.of_scheduler))
            await nursery.start(partial(serve, Worker, scheduler.address, **making.of_worker))
            await nursery.start(partial(serve, Worker, scheduler.address, **making.of_worker))
            async with aio.open_dask(Client, scheduler.address) as client:
                futures = client.map(held, range(2), [request.node.name] * 2)
                await gate.wait_entered(2)
                before = trio.current_time()
                await aio.run_asyncio(client.shutdown)
                del futures
        assert trio.current_time() - before < 0.3 + SOON
    gate.open.set()


async def test_one_after_the_other_in_nested_blocks(making: Making, said: Any) -> None:
    """Clients first, the scheduler last; and a second cluster after the first, in a loop of its own."""
    for _ in range(2):
        async with (
            making.scheduler() as scheduler,
            aio.open_dask(Worker, scheduler.address, **making.of_worker) as worker,
            aio.open_dask(Client, scheduler.address) as client,
        ):
            assert await aio.run_asyncio(results, client, square, [1, 2, 3]) == [1, 4, 9]
        assert (scheduler.status.name, worker.status.name, client.status) == ("closed", "closed", "closed")
    assert said() == []


async def test_a_local_cluster(tmp_path: Path) -> None:
    """Dask's own way to start all of it."""
    options = {"processes": False, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with trio.fail_after(PATIENCE):
        async with aio.open_loop() as loop:
            async with (
                aio.open_dask(LocalCluster, local_directory=str(tmp_path), **options) as cluster,
                aio.open_dask(Client, cluster) as client,
            ):
                assert await aio.run_asyncio(results, client, square, range(10)) == [n * n for n in range(10)]
            await no_tasks(loop)


async def test_plain_calls_of_the_client(making: Making) -> None:
    """submit, map and a future's attributes from trio tasks; what is awaited, through run_asyncio."""
    async with making.cluster() as cluster:
        future = cluster.client.submit(square, 7)
        assert await aio.run_asyncio(future.result) == 49
        assert future.done()
        assert await aio.run_asyncio(cluster.client.gather, [future, cluster.client.submit(square, future)]) == [49, 2401]
        assert await aio.run_asyncio(partial(cluster.client.submit(square, 5).result, timeout=PATIENCE)) == 25


async def test_a_plain_gather_that_is_cancelled(making: Making, gate: Gate, request: Any) -> None:
    """Stock Dask forgets tasks of its own that fail then.  That is logged, as asyncio does, and harms nobody."""
    async with making.cluster() as cluster:
        futures = cluster.client.map(held, range(10), [request.node.name] * 10)
        with trio.move_on_after(0.05) as scope:
            await aio.run_asyncio(cluster.client.gather, futures)
        assert scope.cancelled_caught
        gate.open.set()
        assert await aio.run_asyncio(cluster.client.gather, futures) == list(range(10))
        del futures
    gc.collect()


async def test_debug_mode(making: Making, said: Any) -> None:
    """asyncio's: nothing is called from a wrong thread, nothing never awaited."""
    with trio.fail_after(PATIENCE):
        async with aio.open_loop() as loop:
            loop.set_debug(True)
            loop.slow_callback_duration = 5.0  # the machine may be busy
            async with (
                aio.open_dask(Scheduler, **making.of_scheduler) as scheduler,
                aio.open_dask(Worker, scheduler.address, **making.of_worker),
                aio.open_dask(Client, scheduler.address) as client,
            ):
                assert await aio.run_asyncio(results, client, square, range(20)) == [n * n for n in range(20)]
    gc.collect()
    assert said() == []


# -- a handler of our Server hands work to it --------------------------------------------------------------------------


@asynccontextmanager
async def front(cluster: Cluster, **options: Any) -> AsyncIterator[tuple[Server, Any]]:
    """Our Server before a cluster, in two flavours, and a client of it."""

    async def in_trio(kind: str, numbers: list[int]) -> list[int]:
        return await cluster.run(*work(kind, numbers))

    async def in_asyncio(kind: str, numbers: list[int]) -> list[int]:
        return await results(cluster.client, *work(kind, numbers))

    handlers = {"in_trio": in_trio, "in_asyncio": aio.handler(in_asyncio)}
    async with Server(handlers, **options) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
        yield server, remote


def work(kind: str, numbers: list[int]) -> tuple[Any, ...]:
    return (square, numbers) if kind == "square" else (refuse, numbers) if kind == "refuse" else (held, numbers, kind)


flavours = pytest.mark.parametrize("op", ["in_trio", "in_asyncio"])


@flavours
async def test_a_handler_computes(making: Making, op: str) -> None:
    async with making.cluster() as cluster, front(cluster) as (_, remote):
        assert list(await remote[op](kind="square", numbers=[1, 2, 3])) == [1, 4, 9]
        with pytest.raises(LookupError, match="nothing about 4"):
            await remote[op](kind="refuse", numbers=[4])


@flavours
async def test_a_call_that_is_cancelled_cancels_its_work(making: Making, gate: Gate, op: str, request: Any, said: Any) -> None:
    async with making.cluster() as cluster, front(cluster) as (server, remote):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(remote[op], kind=request.node.name, numbers=list(range(100))))
            await gate.wait_entered(2)
            nursery.cancel_scope.cancel()
        await cluster.wait_forgotten()
        gate.open.set()
        assert server.statistics().in_flight == 0
        assert list(await remote[op](kind="square", numbers=[5])) == [25]
        await cluster.wait_forgotten()
    assert gate.left <= 4
    gc.collect()
    assert said() == []


@flavours
async def test_a_server_that_drains(making: Making, gate: Gate, op: str, request: Any) -> None:
    """What is in flight may end within the grace, and the answer arrives."""
    async with making.cluster() as cluster, front(cluster) as (server, remote):
        async with trio.open_nursery() as nursery:
            found: list[int] = []

            async def call() -> None:
                found.extend(await remote[op](kind=request.node.name, numbers=[8]))

            nursery.start_soon(call)
            await gate.wait_entered(1)
            server.stop(PATIENCE)
            gate.open.set()
        assert found == [8]
        await server.finished()


@flavours
async def test_a_server_whose_grace_is_over(making: Making, gate: Gate, op: str, request: Any) -> None:
    async with making.cluster() as cluster, front(cluster) as (server, remote):
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(HandlerCancelled):
                    await remote[op](kind=request.node.name, numbers=list(range(100)))

            nursery.start_soon(call)
            await gate.wait_entered(2)
            before = trio.current_time()
            server.stop(0.1)
            await server.finished()
            assert trio.current_time() - before < SOON
        gate.open.set()
        await cluster.wait_forgotten()


# -- starting and closing ----------------------------------------------------------------------------------------------


async def test_a_start_that_fails(making: Making) -> None:
    """Its error is raised as it is, and nothing is left."""
    async with making.scheduler() as scheduler:
        nowhere = scheduler.address
    with trio.fail_after(PATIENCE):
        async with aio.open_loop() as loop:
            with pytest.raises(OSError, match="127.0.0.1"):
                async with aio.open_dask(Client, nowhere, timeout=0.1):
                    raise AssertionError("there is no scheduler")
            with pytest.raises((RuntimeError, TimeoutError)):
                async with aio.open_dask(Worker, nowhere, death_timeout=0.1, **making.of_worker):
                    raise AssertionError("there is no scheduler")
            with pytest.raises(TypeError, match="no_such_argument"):
                async with aio.open_dask(Making, no_such_argument=1):
                    raise AssertionError("it can't be made")
            await no_tasks(loop)


@pytest.mark.parametrize("kind", [Client, Worker])
async def test_a_start_that_does_not_end(making: Making, kind: Any) -> None:
    """A scheduler that accepts and says nothing; the start is cancelled, and gets its second."""
    silent = trio.socket.socket()
    await silent.bind(("127.0.0.1", 0))
    silent.listen(5)
    options = making.of_worker if kind is Worker else {}
    with silent, trio.fail_after(PATIENCE):
        async with aio.open_loop():
            before = trio.current_time()
            with trio.move_on_after(0.05) as scope:
                async with aio.open_dask(kind, f"tcp://127.0.0.1:{silent.getsockname()[1]}", **options):
                    raise AssertionError("there is no scheduler")
            assert scope.cancelled_caught
            assert trio.current_time() - before < 1 + SOON


class CancelAt(trio.abc.Instrument):
    """Cancels a scope before the n-th step that any task makes."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self.scope = scope
        self.left = steps

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.left -= 1
        if self.left == 0:
            self.scope.cancel()


async def test_cancelled_at_every_step_of_a_scheduler(making: Making) -> None:
    async def scenario() -> None:
        async with aio.open_dask(Scheduler, **making.of_scheduler):
            pass

    async with aio.open_loop():
        assert await cancel_sweep(scenario) > 20


async def test_cancelled_at_many_steps_of_a_cluster(making: Making) -> None:
    """At every eleventh step of starting, using and closing one, until it comes to its end; nothing is left any time."""
    steps, completed = 0, False
    with trio.fail_after(2 * PATIENCE):
        async with aio.open_loop() as loop:
            while not completed:
                steps += 11
                with trio.CancelScope() as scope:
                    instrument = CancelAt(scope, steps)
                    trio.lowlevel.add_instrument(instrument)
                    try:
                        async with (
                            aio.open_dask(Scheduler, **making.of_scheduler) as scheduler,
                            aio.open_dask(Worker, scheduler.address, **making.of_worker) as worker,
                            aio.open_dask(Client, scheduler.address) as client,
                        ):
                            assert await aio.run_asyncio(results, client, square, [steps]) == [steps**2]
                        completed = not scope.cancel_called
                        assert worker.status.name == "closed"
                    finally:
                        trio.lowlevel.remove_instrument(instrument)
                await no_tasks(loop)
    assert steps > 100


async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    async for some in source:
        await sink.send_all(some)


@both
@pytest.mark.parametrize("whose", ["a call", "a timer"])
async def test_closed_while_a_connection_is_made(making: Making, watch: Any, whose: str) -> None:
    """A worker's first heartbeat makes one.  Stock Dask leaves its socket open then."""
    steps, completed = 0, False
    with trio.fail_after(3 * PATIENCE):
        while not completed:
            steps += 6
            leftovers = watch()
            async with making.cluster() as cluster:
                instrument = CancelAt(cluster.nursery.cancel_scope, steps)
                trio.lowlevel.add_instrument(instrument)
                try:
                    if whose == "a call":
                        await aio.run_asyncio(cluster.workers[0].heartbeat)
                    else:
                        beat = asyncio.get_running_loop().create_task(cluster.workers[0].heartbeat())
                        while not beat.done():  # noqa: ASYNC110
                            await trio.sleep(0.001)
                    completed = not cluster.nursery.cancel_scope.cancel_called
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            assert leftovers.found() == [], steps
    assert steps > 30


async def test_cancelled_while_a_connection_is_made(making: Making) -> None:
    """It is completed, and serves the next call; so no slot of Dask's pool is lost."""
    steps, completed = 0, False
    async with making.cluster() as cluster:
        pool = cluster.client.rpc
        while not completed:
            steps += 1
            pool.remove(cluster.scheduler.address)
            with trio.CancelScope() as scope:
                instrument = CancelAt(scope, steps)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await aio.run_asyncio(cluster.client.scheduler.ncores)
                    completed = not scope.cancel_called
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            with trio.fail_after(SOON):
                while "active=0, connecting=0" not in repr(pool):  # noqa: ASYNC110  # it tells nobody
                    await trio.sleep(0.001)
    assert steps > 20


@pytest.mark.parametrize("protocol", ["tls"])
async def test_closed_during_a_slow_tls_handshake(making: Making, watch: Any) -> None:
    """With a peer that is far away: it is waited for, since stock Dask leaves the socket open where it gives up then."""
    async with making.scheduler() as scheduler, trio.open_nursery() as nursery:
        accepted = trio.Event()

        async def relay(stream: trio.SocketStream) -> None:
            accepted.set()
            await trio.sleep(0.1)
            async with (
                stream,
                await trio.open_tcp_stream("127.0.0.1", scheduler.port) as further,
                trio.open_nursery() as both_ways,
            ):
                both_ways.start_soon(pump, stream, further)
                await pump(further, stream)
                both_ways.cancel_scope.cancel()

        (listener,) = await nursery.start(partial(trio.serve_tcp, relay, 0, host="127.0.0.1"))
        leftovers = watch()
        async with aio.open_dask(Client, scheduler.address, **making.security) as client:
            far = client.rpc(f"tls://127.0.0.1:{listener.socket.getsockname()[1]}")
            call = asyncio.get_running_loop().create_task(far.identity())
            await accepted.wait()
        with trio.move_on_after(SOON):
            while leftovers.found():  # noqa: ASYNC110  # the relay and the scheduler need a moment to notice
                await trio.sleep(0.005)
        assert leftovers.found() == []
        assert call.done()
        assert call.exception() is None
        nursery.cancel_scope.cancel()


async def test_all_at_once_close_in_order(making: Making, said: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with making.cluster():
        pass
    words = ("Remove client", "Stopping worker", "Closing scheduler")
    order = [word for record in caplog.records for word in words if record.getMessage().startswith(word)]
    assert order == sorted(order, key=words.index)
    assert set(order) == set(words)


class Hanging(SchedulerPlugin):  # type: ignore[misc]  # a class of Dask's
    async def close(self) -> None:
        await asyncio.sleep(PATIENCE)


class HangingClient(Client):  # type: ignore[misc]  # a class of Dask's
    async def _close(self, fast: bool = False) -> None:
        await asyncio.sleep(PATIENCE)


@pytest.mark.parametrize("who", ["scheduler", "client", "task"])
async def test_a_close_that_does_not_end(making: Making, gate: Gate, who: str, said: Any, request: Any) -> None:
    """It is cut off a second after the grace, and its connections and listeners are closed."""
    with trio.fail_after(PATIENCE):
        async with aio.open_loop(redeliver=0.2):
            options = {**making.of_scheduler, "plugins": [Hanging()]} if who == "scheduler" else making.of_scheduler
            async with trio.open_nursery() as nursery:
                serve = partial(aio.serve_dask, grace=0.1)
                scheduler = await nursery.start(partial(serve, Scheduler, **options))
                await nursery.start(partial(serve, Worker, scheduler.address, **making.of_worker))
                client = await nursery.start(partial(serve, HangingClient if who == "client" else Client, scheduler.address))
                if who == "task":
                    futures = [client.submit(stubborn, 1, request.node.name)]
                    await gate.wait_entered(1)
                    del futures
                before = trio.current_time()
                nursery.cancel_scope.cancel()
            assert trio.current_time() - before < 1.1 + SOON
            gate.open.set()
            del client
    gc.collect()
    assert ["is cut off" in line for line in said()].count(True) == (0 if who == "task" else 1)


async def test_without_a_loop() -> None:
    with pytest.raises(LocalProtocolError, match="open_loop"):
        async with aio.open_dask(Scheduler):
            raise AssertionError("no loop")


@pytest.mark.parametrize("grace", [-1, float("inf"), float("nan")])
async def test_a_grace_that_is_none(grace: float) -> None:
    with pytest.raises(ValueError, match="grace"):
        async with aio.open_dask(Scheduler, grace=grace):
            raise AssertionError("no such grace")
