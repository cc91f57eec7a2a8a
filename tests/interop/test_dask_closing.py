"""Dask's nodes inside a trio program: how they start and close, whatever goes wrong and whenever they are cancelled."""

from __future__ import annotations

import asyncio
import gc
from functools import partial
from typing import Any

import pytest
import trio
from distributed import Client, Scheduler, Worker
from distributed.diagnostics.plugin import SchedulerPlugin

from tests.interop.dask_nodes import PATIENCE, SOON, Gate, Making, both, no_tasks, results, square, stubborn
from trio_dcore import aio
from trio_dcore.errors import LocalProtocolError
from trio_dcore.testing import cancel_sweep


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
        await scenario()  # the first node of a loop starts Dask's profiler, where it has one, which ends with the loop
        assert await cancel_sweep(scenario) > 5


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
    assert steps > 50


async def pump(source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
    async for some in source:
        await sink.send_all(some)
    scope.cancel()


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
    assert steps > 12


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
    assert steps > 10


@pytest.mark.parametrize("protocol", ["tls"])
async def test_closed_during_a_slow_tls_handshake(making: Making, watch: Any) -> None:
    """With a peer that is far away: it is waited for, since stock Dask may leave the socket open where it gives up then."""
    async with making.scheduler() as scheduler, trio.open_nursery() as nursery:
        accepted = trio.Event()

        async def relay(stream: trio.SocketStream) -> None:
            accepted.set()
            await trio.sleep(0.25)  # longer than the client needs to close
            async with (
                stream,
                await trio.open_tcp_stream("127.0.0.1", scheduler.port) as further,
                trio.open_nursery() as both_ways,
            ):
                both_ways.start_soon(pump, stream, further, both_ways.cancel_scope)
                both_ways.start_soon(pump, further, stream, both_ways.cancel_scope)

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
        assert "ConnectionPool closing" not in str(call.exception())  # so it ends where its connection is given up
        nursery.cancel_scope.cancel()


async def test_all_at_once_close_in_order(making: Making, said: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with making.cluster():
        pass
    words = ("Remove client", "Stopping worker", "Closing scheduler")
    said_in_order = [record.getMessage().replace("Scheduler closing", "Closing scheduler") for record in caplog.records]
    order = [word for message in said_in_order for word in words if message.startswith(word)]
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
