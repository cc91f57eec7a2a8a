"""K04: a server that is killed -9 in the middle of calls."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.reference.kit import Outcome, covers, quickest
from tests.reference.test_k_signals_and_runs import Program, running
from trio_dcore import CommClosedError, ConnectError, connect, rpc
from trio_dcore.testing import no_leaks

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")

# The bound of the table, in seconds.
AT_ONCE = 0.2
CALLS = 10


@pytest.fixture(params=["tcp", "unix"])
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a program listens on."""
    if request.param == "tcp":
        yield "tcp://127.0.0.1:0"
    else:
        # Who was killed leaves its path behind.
        with tempfile.TemporaryDirectory(prefix="dcore") as folder:
            yield f"unix://{folder}/sock"


def zombies() -> list[str]:
    """This process's children that have ended and that nobody has waited for."""
    children = [child for path in Path("/proc/self/task").glob("*/children") for child in path.read_text().split()]
    return [child for child in children if " Z " in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2][:4]]


async def until_begun(program: Program, count: int) -> None:
    for _ in range(count):
        assert await program.line() == "began"


async def killed(program: Program, outcomes: list[Outcome]) -> float:
    """Kill the program; returns after how many seconds the last of the calls had ended."""
    start = trio.current_time()
    program.send(signal.SIGKILL)
    for outcome in outcomes:
        await outcome.ended()
    assert (await program.ended())[0] == -signal.SIGKILL
    assert zombies() == []
    return max(outcome.at for outcome in outcomes) - start


@covers("K04", "t u")
async def test_k04_calls_in_flight(where: str, tmp_path: Path) -> None:
    async def once() -> float:
        outcomes = [Outcome() for _ in range(CALLS)]
        async with no_leaks(), running(tmp_path, "waiting", where=where) as program, rpc(program.address, timeout=0.1) as remote:
            async with trio.open_nursery() as nursery:
                for outcome in outcomes:
                    nursery.start_soon(outcome.of, remote.hang)
                await until_begun(program, CALLS)
                took = await killed(program, outcomes)
            for outcome in outcomes:
                assert type(outcome.error) is CommClosedError
                assert str(outcome.error).startswith(f"calling 'hang' at {program.address}: ")
            assert (remote.pool.open, remote.pool.active) == (0, 0)
            with pytest.raises(ConnectError):  # and not a hang, or something of before
                await remote.hang()
        return took

    assert await quickest(once, AT_ONCE) <= AT_ONCE


@covers("K04", "t u")
async def test_k04_an_idle_connection_is_not_mistaken_for_a_server(where: str, tmp_path: Path) -> None:
    async with no_leaks(), running(tmp_path, "waiting", where=where) as program, rpc(program.address, timeout=0.1) as remote:
        await remote.identity()
        assert (remote.pool.open, remote.pool.active) == (1, 0)
        program.send(signal.SIGKILL)
        assert (await program.ended())[0] == -signal.SIGKILL
        with pytest.raises(ConnectError):
            await remote.identity()
        assert remote.pool.open == 0


@covers("K04", "t u")
@pytest.mark.parametrize("kind", ["stream", "comm"])
async def test_k04_streams_and_comms(kind: str, where: str, tmp_path: Path) -> None:
    async def stream(remote: Any) -> Any:
        async with remote.hang.stream() as items:
            return await items.receive()

    async def comm(address: str) -> Any:
        async with await connect(address) as bare:
            await bare.write({"op": "hang", "reply": True})
            return await bare.read()

    async def once() -> float:
        outcome = Outcome()
        async with no_leaks(), running(tmp_path, "waiting", where=where) as program, rpc(program.address) as remote:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outcome.of, lambda: stream(remote) if kind == "stream" else comm(program.address))
                await until_begun(program, 1)
                took = await killed(program, [outcome])
            assert isinstance(outcome.error, CommClosedError)
            assert remote.pool.open == 0
        return took

    assert await quickest(once, AT_ONCE) <= AT_ONCE
