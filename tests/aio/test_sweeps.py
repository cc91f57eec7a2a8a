"""A whole asyncio program, cancelled at each pass of its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio

from tests.aio.running import Runner
from trio_dcore import aio
from trio_dcore.aio import open_trio

log: list[str] = []


async def add(x: int, y: int) -> int:
    await asyncio.sleep(0)
    return x + y


async def ticks() -> AsyncIterator[int]:
    log.append("begun")
    try:
        for n in range(1000):
            yield n
            await asyncio.sleep(0)
    finally:
        log.append("ended")


async def mirror(comm: aio.Comm) -> None:
    async for item in comm:
        await comm.write(item)


async def calls() -> None:
    async with aio.Server({"add": add}) as server:
        async with aio.rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
            assert await remote.add(x=1, y=2) == 3
            assert await asyncio.gather(remote.add(x=1, y=2), remote.add(x=3, y=4)) == [3, 7]


async def streams() -> None:
    async with aio.Server({"ticks": ticks}) as server:
        async with aio.rpc(await server.listen("tcp://127.0.0.1:0")) as remote, remote.ticks.stream() as stream:
            assert [await stream.receive() for _ in range(20)] == list(range(20))


async def comms() -> None:
    async with aio.Server({"mirror": mirror}) as server:
        async with await aio.connect(await server.listen("tcp://127.0.0.1:0")) as comm:
            await comm.write({"op": "mirror", "reply": False})
            async with aio.BatchedSend(comm) as batched:
                batched.send(1, 2)
            assert await comm.read() in ((1, 2), [1, 2])


async def portals() -> None:
    async def nested() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0)
            with trio.move_on_after(0.001, shield=True):
                await trio.sleep_forever()

    async with open_trio() as portal:
        await portal.run(nested)
        async with open_trio() as inner:
            await inner.run(nested)


@pytest.mark.parametrize("scenario", [calls, streams, comms, portals], ids=lambda scenario: scenario.__name__)
def test_cancelled_at_each_pass(run: Runner, scenario: Callable[[], Awaitable[None]]) -> None:
    """Whenever it is cancelled: it ends by that, and leaves no task and no trio run behind."""
    loop_passes = 0

    async def main() -> None:
        nonlocal loop_passes
        this = asyncio.current_task()
        cut = True
        while cut:
            log.clear()
            task = asyncio.ensure_future(scenario())
            for _ in range(loop_passes):
                await asyncio.sleep(0)
            cut = task.cancel()
            if cut:
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                await task
            assert log in ([], ["begun", "ended"])
            while trio.lowlevel.in_trio_run() or asyncio.all_tasks() != {this}:  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0)
            loop_passes += 1 if loop_passes < 60 else 7

    run(main)
    assert loop_passes > 20
