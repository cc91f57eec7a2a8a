"""M04: a server that restarts at the same address under load."""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import trio

from tests.reference.kit import Wire, covers, reference, until
from tests.reference.soak import ANSWERED, RESTARTS, Soak
from tests.reference.soak_faults import free_place
from trio_dcore import CommClosedError, ConnectError, HandlerCancelled, ServerClosing
from trio_dcore.testing import no_leaks

CLIENTS = 8
RESTARTED = 10
# How often the handler of a call has been started that ended so.
STARTS = {ServerClosing: {0}, ConnectError: {0}, HandlerCancelled: {1}, CommClosedError: {0, 1}}


class Load:
    """Clients that call without a pause, each with a number of its own, until told to stop."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._numbers = itertools.count()
        self.started: Counter[int] = Counter()
        self.outcomes: dict[int, object] = {}  # the answer, or the type of the error
        self.enough = False
        self.ended = trio.Event()

    async def work(self, number: int) -> int:
        """The handler."""
        self.started[number] += 1
        await trio.sleep(number % 5 * 0.002)
        return number

    @property
    def answered(self) -> int:
        return sum(type(outcome) is int for outcome in self.outcomes.values())

    async def run(self, address: str) -> None:
        async with self._wire.client(address) as remote, trio.open_nursery() as nursery:
            for _ in range(CLIENTS):
                nursery.start_soon(self._client, remote)
        self.ended.set()

    async def _client(self, remote: object) -> None:
        while not self.enough:
            number = next(self._numbers)
            try:
                self.outcomes[number] = await remote.work(number=number)  # type: ignore[attr-defined]
            except tuple(STARTS) as error:
                self.outcomes[number] = type(error)

    def check(self) -> None:
        for number, outcome in self.outcomes.items():
            allowed = STARTS[outcome] if isinstance(outcome, type) else {1}
            assert self.started[number] in allowed, f"call {number}: {outcome}, and started {self.started[number]} times"
            assert isinstance(outcome, type) or outcome == number
        assert self.started.keys() <= self.outcomes.keys()


async def restarts(wire: Wire, grace: float) -> Load:
    """A server that is stopped again and again under load; the last one serves until the clients have had enough."""
    load = Load(wire)
    scheme = {"t": "tcp", "u": "unix"}[wire.transport]
    address = free_place(scheme, wire.folder or Path(), "sock", random.Random())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run, address)
        for _ in range(RESTARTED):
            before = load.answered
            async with wire.make_server({"work": load.work}, grace=grace) as server:
                assert await server.listen(address) == address
                await until(lambda before=before: load.answered >= before + 3 * CLIENTS)  # type: ignore[misc]
        async with wire.make_server({"work": load.work}) as server:
            assert await server.listen(address) == address
            await until(lambda: load.answered >= before + 6 * CLIENTS)
            # Nobody stops any more, and nothing of before is in the way.
            async with wire.client(address) as remote:
                assert await remote.work(number=-1) == -1
            del load.started[-1]
            load.enough = True
            await load.ended.wait()
    load.check()
    return load


@reference("M04", "t u")
async def test_m04_restarted_in_order(wire: Wire) -> None:
    load = await restarts(wire, 5.0)
    # All that was started in the grace is answered; the others find the next server, or are told.
    assert not {HandlerCancelled, CommClosedError} & set(load.outcomes.values())


@reference("M04", "t u")
async def test_m04_restarted_at_once(wire: Wire) -> None:
    load = await restarts(wire, 0.0)
    assert HandlerCancelled in load.outcomes.values()


@pytest.mark.skipif(sys.platform != "linux", reason="signals, and /proc")
@covers("M04", "t u")
@pytest.mark.parametrize("transport", ["tcp", "unix"])
async def test_m04_killed_and_restarted(transport: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    try:
        async with no_leaks():
            summary = await Soak([transport], folder, seed=1, clients=CLIENTS, deeds=RESTARTS, pace=3).run(1.0)
    finally:
        shutil.rmtree(folder)
    assert not summary.problems, summary.markdown()
    assert summary.outcomes()[ANSWERED]
    assert all(summary.deeds[transport][deed] for deed in RESTARTS)
