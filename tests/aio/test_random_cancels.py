"""Two hundred asyncio tasks that call through one rpc, and are cancelled at random."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest

from tests.aio.running import Runner
from tests.aio.scenarios import until
from tests.parity.conftest import Place
from trio_dcore import aio

TASKS, LIMIT = 200, 8


class Work:
    """Handlers that write down what becomes of them."""

    def __init__(self) -> None:
        self.started: Counter[int] = Counter()
        self.ended: Counter[int] = Counter()
        self.returned: set[int] = set()

    async def work(self, n: int, passes: int, seconds: float) -> int:
        self.started[n] += 1
        try:
            for _ in range(passes):
                await asyncio.sleep(0)
            await asyncio.sleep(seconds)
            self.returned.add(n)
            return n * n
        finally:
            try:
                await asyncio.sleep(0)
            finally:
                self.ended[n] += 1

    async def fail(self, n: int, passes: int, seconds: float) -> None:
        await self.work(n, passes, seconds)
        raise LookupError(n)

    async def ticks(self, n: int, passes: int, seconds: float) -> AsyncIterator[int]:
        self.started[n] += 1
        try:
            for _ in range(passes):
                yield n
            await asyncio.sleep(seconds)
            self.returned.add(n)
        finally:
            self.ended[n] += 1


async def use(remote: Any, op: str, n: int, passes: int, seconds: float) -> str:
    """One call; returns how it ended, or is cancelled."""
    arguments = {"n": n, "passes": passes, "seconds": seconds}
    if op == "ticks":
        async with remote.ticks.stream(**arguments) as stream:
            assert [item async for item in stream] == [n] * passes
    elif op == "work":
        assert await remote.work(**arguments) == n * n
    else:
        with pytest.raises(LookupError) as caught:
            await remote.fail(**arguments)
        assert caught.value.args == (n,)
        return "failed"
    return "returned"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_cancels(run: Runner, seed: int, place: Place) -> None:
    """Each call has one outcome, which fits what its handler did; no handler runs twice, and nothing is left of those that were cut."""
    random = Random(seed)
    work = Work()
    outcomes: dict[int, list[str]] = {n: [] for n in range(TASKS)}
    most = 0

    async def call(remote: aio.rpc, n: int) -> None:
        nonlocal most
        op = random.choice(["work", "work", "fail", "ticks"])
        arguments = (random.randrange(30), random.choice([0.0, 0.0, random.random() * 0.05, 3600]))
        how = random.choice(["timeout", "wait_for", "cancel", "cancel"])
        limit = random.random() * 0.3
        try:
            if how == "timeout":
                async with asyncio.timeout(limit):
                    outcomes[n].append(await use(remote, op, n, *arguments))
            elif how == "wait_for":
                outcomes[n].append(await asyncio.wait_for(use(remote, op, n, *arguments), limit))
            else:
                outcomes[n].append(await use(remote, op, n, *arguments))
        except TimeoutError:
            outcomes[n].append("timed out")
        except asyncio.CancelledError:
            outcomes[n].append("cancelled")
            raise
        finally:
            most = max(most, remote.pool.open)

    async def main() -> None:
        async with aio.Server({"work": work.work, "fail": work.fail, "ticks": work.ticks}, **place.options) as server:
            async with aio.rpc(await server.listen(place.address), limit=LIMIT, **place.options) as remote:
                tasks = [asyncio.create_task(call(remote, n)) for n in range(TASKS)]
                victims = random.sample(tasks, TASKS)
                while not all(task.done() for task in tasks):
                    for task in [victims.pop() for _ in range(min(5, len(victims)))]:
                        task.cancel()
                        if random.random() < 0.2:
                            await asyncio.sleep(0)
                            task.cancel()  # while it waits for the first one to be carried out
                    await asyncio.sleep(random.choice([0, 0, 0.003, 0.01]))
                # Each task ended as it says.
                for n, task in enumerate(tasks):
                    assert len(outcomes[n]) <= 1, n
                    if not outcomes[n]:
                        outcomes[n].append("never began")
                        assert task.cancelled()
                    assert task.cancelled() == (outcomes[n] in (["cancelled"], ["never began"]))
                    if not task.cancelled():
                        task.result()
                # The pool is whole, and so is the server.
                pool = remote.pool
                assert most <= LIMIT
                assert pool.open <= LIMIT
                assert pool.active == 0
                await until(lambda: server.statistics().in_flight == 0)
                assert work.started == work.ended
                assert set(work.started.values()) == {1}
                for n, (outcome,) in outcomes.items():
                    if outcome in ("returned", "failed"):
                        assert n in work.returned
                    if outcome == "never began":
                        assert n not in work.started
                again = await asyncio.gather(*[remote.work(n=n, passes=0, seconds=0) for n in range(1000, 1000 + 2 * LIMIT)])
                assert again == [n * n for n in range(1000, 1000 + 2 * LIMIT)]
                assert pool.open == LIMIT
                # All kinds of ends were among them.
                seen = Counter(outcome for (outcome,) in outcomes.values())
                assert {"returned", "timed out", "cancelled"} <= set(seen), seen

    run.loud = True  # of a handler that fails when its caller has gone, only the log can tell
    run(main)
    loud = [record.getMessage() for record in run.log.records if record.levelno > logging.INFO]
    assert [line for line in loud if "failed after its caller had gone" not in line] == []
