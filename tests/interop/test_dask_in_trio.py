"""A real Dask cluster inside a trio program: stock scheduler, workers and client in one nursery, used by trio tasks and by our Server.

Nothing is mocked.  Beyond what the fixtures of this directory compare (threads, descriptors, tasks of ours), each cluster's event loop is
asked for tasks that are left when its nodes have closed.  The only thread of Dask's that outlives a cluster is "Dask-Offload": one for the
whole process, which handles large messages and is never shut down.
"""

from __future__ import annotations

import gc
import multiprocessing.resource_tracker
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from distributed import Client, LocalCluster, Nanny, Scheduler, Worker

from tests.interop.dask_nodes import PATIENCE, SOON, Cluster, Gate, Making, both, held, no_tasks, refuse, results, square
from trio_dcore import HandlerCancelled, Server, aio, rpc

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


@pytest.fixture(scope="module")
def resource_tracker() -> None:
    """multiprocessing's: a process and a pipe that stay once something has been started through it."""
    multiprocessing.resource_tracker.ensure_running()


@pytest.mark.usefixtures("resource_tracker")
async def test_a_worker_in_a_process_of_its_own(making: Making) -> None:
    """That a Nanny looks after; it has ended when the block has."""
    async with (
        making.scheduler() as scheduler,
        aio.open_dask(Nanny, scheduler.address, nthreads=1, local_directory=making.of_worker["local_directory"]) as nanny,
        aio.open_dask(Client, scheduler.address) as client,
    ):
        assert await aio.run_asyncio(results, client, partial(divmod, 7), range(1, 10)) == [divmod(7, n) for n in range(1, 10)]
        process = psutil.Process(nanny.pid)
    assert not process.is_running()
    for thread in threading.enumerate():
        if thread.name.startswith("AsyncProcess"):  # it has watched the process, and is about to end
            thread.join(PATIENCE)


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
