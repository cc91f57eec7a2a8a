"""What crosses the bridge: cancelled at every step of either side, and cut after every byte.

test_sweeps.py cancels whole programs; here a client or a handler is cancelled, and those around it must be whole afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from tests.aio.available import needs_trio_asyncio
from tests.aio.running import Runner
from tests.aio.scenarios import until
from trio_dcore import CommClosedError, ConnectError, HandlerCancelled, Limits, RPCClosed, Server, aio, rpc
from trio_dcore.testing import MemoryNetwork, cancel_sweep, no_leaks, wire_sweep

COUNT = 7
LIMITS = Limits(window=3)


class Subject:
    """Asyncio-flavoured handlers that count who is inside, so that one that was left behind, or cut without its finally, is seen."""

    def __init__(self) -> None:
        self.inside = 0

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        self.inside += 1
        try:
            await asyncio.sleep(0)
            yield
        finally:
            try:
                await asyncio.sleep(0)
            finally:
                self.inside -= 1

    async def work(self, x: int) -> int:
        async with self.entered():
            return 2 * x

    async def squares(self, n: int) -> AsyncIterator[int]:
        async with self.entered():
            for i in range(n):
                yield i * i

    async def sums(self, comm: aio.Comm) -> None:
        async with self.entered():
            total = 0
            async for x in comm:
                total += x
                await comm.write(total)

    @property
    def handlers(self) -> dict[str, Any]:
        return {"work": self.work, "squares": self.squares, "sums": self.sums}


# What clients do; the same text is a program of either flavour.


async def a_call(remote: Any) -> None:
    assert await remote.work(x=1) == 2


async def two_calls(remote: Any) -> None:
    assert await remote.work(x=1) == 2
    assert await remote.work(x=3) == 6


async def a_stream(remote: Any) -> None:
    async with remote.squares.stream(n=COUNT) as stream:
        assert [item async for item in stream] == [i * i for i in range(COUNT)]


async def half_a_stream(remote: Any) -> None:
    async with remote.squares.stream(n=COUNT) as stream:
        async for item in stream:
            if item > 8:  # of the second window
                break


async def both_ways(remote: Any) -> None:
    async with remote.sums.stream() as stream:
        for i in range(3):
            await stream.send(i)
            assert await stream.receive() == i * (i + 1) // 2
        await stream.send_eof()
        assert [item async for item in stream] == []


USES = [a_call, two_calls, a_stream, half_a_stream, both_ways]
Use = Callable[[Any], Coroutine[Any, Any, None]]
each_use = pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)


# -- an asyncio task, cancelled at each of its steps -----------------------------------------------------------------------------------


class CancelledAtStep:
    """Awaits a coroutine, whose task is cancelled as it begins to wait for the n-th time, or in the pass of the loop after that."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], step: int, later: bool) -> None:
        self._coroutine = coroutine
        self._left = step
        self._later = later
        self.fired = False

    def __await__(self) -> Generator[Any, None, Any]:
        task = asyncio.current_task()
        assert task is not None
        resume: Callable[[], Any] = lambda: self._coroutine.send(None)  # noqa: E731
        while True:
            try:
                waits_for = resume()
            except StopIteration as stop:
                return stop.value
            if self._left == 0:
                self.fired = True
                if self._later:
                    task.get_loop().call_soon(task.cancel)
                else:
                    task.cancel()
            self._left -= 1
            try:
                yield waits_for
            except BaseException as error:
                thrown = error
                resume = lambda: self._coroutine.throw(thrown)  # noqa: E731, B023
            else:
                resume = lambda: self._coroutine.send(None)  # noqa: E731


async def asyncio_cancel_sweep(
    scenario: Callable[[], Coroutine[Any, Any, None]], check: Callable[[], Awaitable[None]], later: bool
) -> int:
    """As :func:`cancel_sweep`, in asyncio: returns at how many steps the scenario's task was cancelled."""
    step = 0
    while True:
        cut = CancelledAtStep(scenario(), step, later)

        async def run(cut: CancelledAtStep = cut) -> None:
            await cut

        task = asyncio.create_task(run())
        await asyncio.wait([task], timeout=10)
        assert task.done(), f"cancelled at step {step}, it has not ended"
        if not task.cancelled():
            task.result()
            # What was cancelled after its end, or in its last pass, has ended by itself.
            if not cut.fired:
                return step
            assert later, f"the cancellation at step {step} was lost"
        await check()
        step += 1


@each_use
@pytest.mark.parametrize("later", [False, True], ids=["at once", "in the next pass"])
@pytest.mark.parametrize("where", ["tcp://127.0.0.1:0", "inproc://"])
def test_an_asyncio_client_cancelled_at_each_of_its_steps(run: Runner, use: Use, later: bool, where: str) -> None:
    async def main() -> None:
        subject = Subject()
        async with aio.Server(subject.handlers, limits=LIMITS) as server:
            async with aio.rpc(await server.listen(where), limit=2, limits=LIMITS) as remote:

                async def check() -> None:
                    assert remote.pool.active == 0
                    assert remote.pool.open <= 2
                    await until(lambda: server.statistics().in_flight == 0)
                    assert subject.inside == 0
                    assert await asyncio.gather(remote.work(x=4), remote.work(x=21)) == [8, 42]
                    remote.pool.collect()  # so that the next run connects, too

                assert await asyncio_cancel_sweep(lambda: use(remote), check, later) >= 1
                await check()

    run(main)


def test_a_sweep_cancels_where_it_says(run: Runner) -> None:
    async def main() -> None:
        waited: list[int] = []

        async def waits() -> None:
            n = 0
            try:
                for n in range(5):  # noqa: B007
                    await asyncio.sleep(0)
            finally:
                waited.append(n)

        async def check() -> None:
            pass

        assert await asyncio_cancel_sweep(waits, check, False) == 5
        assert waited == [0, 1, 2, 3, 4, 4]

        async def resists() -> None:
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                pass

        with pytest.raises(AssertionError, match="the cancellation at step 0 was lost"):
            await asyncio_cancel_sweep(resists, check, False)

    run(main)


# -- trio's side: its clients, and the wire --------------------------------------------------------------------------------------------


@needs_trio_asyncio
@each_use
@pytest.mark.parametrize("where", ["tcp://127.0.0.1:0", "inproc://"])
async def test_a_trio_client_of_asyncio_handlers_cancelled_at_every_step(use: Use, where: str) -> None:
    """At the steps of the server's tasks and of the event loop, too."""
    subject = Subject()
    async with no_leaks(), aio.open_loop(), Server(aio.handler(subject.handlers), limits=LIMITS) as server:
        address = await server.listen(where)

        async def scenario() -> None:
            async with rpc(address, limits=LIMITS) as remote:
                await use(remote)

        async def check() -> None:
            while subject.inside or server.statistics().connections:
                await trio.lowlevel.checkpoint()
            async with rpc(address) as remote:
                assert await remote.work(x=21) == 42
            while server.statistics().connections:
                await trio.lowlevel.checkpoint()

        assert await cancel_sweep(scenario, check=check, limit=5000) > 4


@needs_trio_asyncio
@each_use
async def test_asyncio_code_in_trio_that_calls_cancelled_at_every_step(use: Use) -> None:
    """trio, into asyncio, and into trio again: the bridge both ways in one call."""
    subject = Subject()
    async with no_leaks(), aio.open_loop(), Server(aio.handler(subject.handlers), limits=LIMITS) as server:
        address = await server.listen("inproc://")

        async def inner() -> None:
            async with aio.rpc(address, limits=LIMITS) as remote:
                await use(remote)

        async def check() -> None:
            while subject.inside or server.statistics().connections:
                await trio.lowlevel.checkpoint()
            await aio.run_asyncio(inner)

        assert await cancel_sweep(lambda: aio.run_asyncio(inner), check=check, limit=5000) > 4


def every(use: Use) -> int:
    """Cut after so many bytes each time: after every one for one call, with which all begin."""
    return 1 if use is a_call else 3


ALLOWED = (CommClosedError, ConnectError, HandlerCancelled, RPCClosed)


@needs_trio_asyncio
@each_use
async def test_the_wire_of_asyncio_handlers_is_cut(use: Use, autojump_clock: trio.abc.Clock) -> None:
    """Their tasks end, and the server is whole."""
    async with aio.open_loop():

        async def scenario(network: MemoryNetwork) -> None:
            subject = Subject()
            async with Server(aio.handler(subject.handlers), limits=LIMITS, grace=0) as server:
                try:
                    async with rpc(await server.listen("memory://"), limits=LIMITS, timeout=1) as remote:
                        await use(remote)
                finally:
                    with trio.CancelScope(shield=True):
                        await server.aclose(0)
            assert subject.inside == 0

        assert await wire_sweep(scenario, allowed=ALLOWED, every=every(use)) > 50


@needs_trio_asyncio
@each_use
async def test_the_wire_of_an_asyncio_client_is_cut(use: Use, autojump_clock: trio.abc.Clock) -> None:
    """The client is asyncio's, in an event loop on trio, over a wire in memory."""
    async with aio.open_loop():

        async def scenario(network: MemoryNetwork) -> None:
            async with Server(aio.handler(Subject().handlers), limits=LIMITS, grace=0) as server:
                address = await server.listen("memory://")

                async def inner() -> None:
                    async with aio.rpc(address, limits=LIMITS, timeout=1) as remote:
                        await use(remote)

                await aio.run_asyncio(inner)

        assert await wire_sweep(scenario, allowed=ALLOWED, every=every(use)) > 50
