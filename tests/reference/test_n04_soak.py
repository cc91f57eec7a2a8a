"""N04: random faults against clients that call; a soak of some seconds.

For ten minutes: ``python -m benchmarks.soak --minutes 10 --transport tcp unix tls``.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.reference.kit import covers
from tests.reference.soak import ANSWERED, HARMLESS, KINDS, RESTARTS, SENT, WRONG, Client, Soak
from tests.reference.soak_faults import Lag, ServerProcess, free_place
from tests.reference.soak_server import ID
from trio_dcore import ConnectionPool, Server, rpc
from trio_dcore.client._call import call
from trio_dcore.testing import no_leaks

linux = pytest.mark.skipif(sys.platform != "linux", reason="signals, and /proc")


@pytest.fixture
def folder() -> Iterator[Path]:
    """For sockets, so it has a short name."""
    path = Path(tempfile.mkdtemp(prefix="soak"))
    yield path
    shutil.rmtree(path)


@linux
@covers("N04", "t u l")
@pytest.mark.parametrize("transport", ["tcp", "unix", "tls"])
async def test_n04_random_faults(transport: str, folder: Path) -> None:
    async with no_leaks():
        summary = await Soak([transport], folder, seed=4, clients=8, pace=3).run(3.0)
    assert not summary.problems, summary.markdown()
    # How many of the calls are answered in time depends on what else the machine does; that there are some of each kind does not.
    assert all(summary.deeds[transport][deed] for deed in (*HARMLESS, *RESTARTS))
    assert all(summary.calls[transport, kind][SENT if kind == "note" else ANSWERED] for kind in KINDS)
    assert summary.servers[transport]["stops"] >= 3  # both at the end, and one before
    assert f"{summary.total} calls in" in summary.markdown()


@linux
async def test_a_call_that_is_made_twice_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def twice(pool: ConnectionPool, address: str, op: str, kwargs: dict[str, Any]) -> Any:
        if op == "add":
            await call(pool, address, op, dict(kwargs))
        return await call(pool, address, op, kwargs)

    monkeypatch.setattr("trio_dcore.client._rpc_call.call", twice)
    summary = await Soak(["tcp"], folder, seed=5, clients=4, deeds=()).run(0.3)
    assert any(problem.endswith(": answered, and started 2 times") for problem in summary.problems)
    assert all(re.fullmatch(r"request \(\d, \d+\): \w+, and started 2 times", problem) for problem in summary.problems)


@linux
async def test_an_answer_that_is_wrong_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wrong(pool: ConnectionPool, address: str, op: str, kwargs: dict[str, Any]) -> Any:
        return 1 + await call(pool, address, op, kwargs)

    monkeypatch.setattr("trio_dcore.client._rpc_call.call", wrong)
    summary = await Soak(["tcp"], folder, seed=5, clients=4, deeds=()).run(0.3)
    assert any(re.fullmatch(r"add .* answered \d+ instead of \d+", problem) for problem in summary.problems)
    assert summary.outcomes()[WRONG]


async def test_a_slot_that_is_lost_is_noticed(folder: Path) -> None:
    soak = Soak(["tcp"], folder, deeds=())
    async with Server() as server:
        await soak.pools[0].acquire(await server.listen("tcp://127.0.0.1:0"), "identity")
        soak._look_at_pools()
        soak.pools[0].close_now()
    assert soak.summary.problems == ["of a pool of 4, 1 slots are in use and 1 open"]


@linux
async def test_a_server_that_does_not_start_ends_it(folder: Path) -> None:
    (folder / "journal").mkdir()  # so none can be opened
    with pytest.raises(RuntimeError, match=r"(?s)tcp0 did not start: .*IsADirectoryError"):
        await Soak(["tcp"], folder, deeds=()).run(0)


@linux
@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("Handlers.__init__ = spoilt(Handlers.__init__, finished=-1)", "has left something behind: {'started': 6, 'finished': 5"),
        ("module.stop_on_signals = crashes", "ended with 1"),
        (
            "module.os = SimpleNamespace(**{**vars(os), 'close': lambda number: None})",
            "{'started': 6, 'finished': 6, 'left': {'descriptors': 1}}",
        ),
    ],
)
async def test_a_server_that_does_not_end_in_order_is_noticed(
    broken: str, problem: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.py").write_text(BROKEN.format(broken=broken), encoding="utf-8")
    found: list[str] = []
    process = ServerProcess("tcp0", free_place("tcp", folder, "x", random.Random()), folder, found.append, Lag())
    monkeypatch.setattr("tests.reference.soak_faults.SERVER", [str(folder / "broken.py")])
    await process.start()
    try:
        async with rpc(process.address) as remote:
            for number in range(6):
                assert await remote.add(id=(0, number), x=1, y=2) == 3
        await process.stop()
    finally:
        await process.kill()
    assert [each for each in found if problem in each], found


BROKEN = """
import os
from types import SimpleNamespace
import tests.reference.soak_server as module
from tests.reference.soak_server import Handlers

def spoilt(original, **values):
    def init(self, journal):
        original(self, journal)
        vars(self).update(values)
    return init

async def crashes(server, stop=module.stop_on_signals):
    await stop(server)
    raise RuntimeError("as asked")

{broken}
module.main()
"""


async def test_a_call_that_is_late_is_noticed_unless_everything_was(folder: Path, autojump_clock: trio.testing.MockClock) -> None:
    """The first of these comes too late by itself; during the second this process had no time for its tasks."""
    soak = Soak(["unix"], folder, clients=1, deeds=())
    client = Client(0, soak, ConnectionPool(), random.Random(0))

    async def late(remote: object, id: tuple[int, int]) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(4)
        if id[1] == 1:
            soak.lag.total += 3

    for _ in range(2):
        await client.call("unix", soak.places[0][1], late, deadline=1)
    (problem,) = soak.summary.problems
    assert problem.startswith("late (0, 0) at ")
    assert problem.endswith("ended 3.00 s after its deadline")


async def test_the_lag_of_a_process() -> None:
    lag = Lag()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lag.run)
        await trio.testing.wait_all_tasks_blocked()
        time.sleep(0.3)  # noqa: ASYNC251  # as is meant
        while lag.total < 0.25:  # noqa: ASYNC110
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


class TestJournal:
    """What the servers have written is compared with what came of the calls."""

    async def problems(self, folder: Path, outcome: Any, *started: tuple[int, int]) -> list[str]:
        """Of one client that has made one call."""
        soak = Soak(["unix"], folder, clients=1, deeds=())

        async def kind(remote: object, id: tuple[int, int]) -> None:
            if isinstance(outcome, Exception):
                raise outcome

        client = Client(0, soak, ConnectionPool(), random.Random(0))
        await client.call("unix", soak.places[0][1], kind, deadline=1)
        soak._clients = [client]
        (folder / "journal").write_bytes(b"".join(ID.pack(*id) for id in started))
        soak._compare_with_journal()
        return soak.summary.problems

    async def test_answered(self, folder: Path) -> None:
        assert await self.problems(folder, None, (0, 0)) == []
        assert await self.problems(folder, None) == ["request (0, 0): answered, and started 0 times"]
        assert await self.problems(folder, None, (0, 0), (0, 0)) == ["request (0, 0): answered, and started 2 times"]

    async def test_errors(self, folder: Path) -> None:
        from trio_dcore import CommClosedError, ConnectError, HandlerCancelled, LimitExceeded, ServerClosing

        for error, allowed in [
            (ConnectError("x"), {0}),
            (ServerClosing("x"), {0}),
            (HandlerCancelled("x"), {1}),
            (CommClosedError("x"), {0, 1}),
        ]:
            found = {times for times in range(3) if not await self.problems(folder, error, *[(0, 0)] * times)}
            assert found == allowed, error
        (problem, *_) = await self.problems(folder, LimitExceeded("x"))
        assert problem.startswith("kind (0, 0) at unix://")
        assert problem.endswith("ended with LimitExceeded('x')")


async def test_a_place_that_is_taken_is_not_free(folder: Path) -> None:
    rng = random.Random(1)
    place = free_place("tcp", folder, "x", random.Random(1))
    async with Server() as server:
        await server.listen(place)
        assert free_place("tcp", folder, "x", rng) != place
    assert free_place("unix", folder, "x", rng) == f"unix://{folder}{os.sep}x"
