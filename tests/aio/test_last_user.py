"""The trio run that nobody has opened ends with its last user, but not before those in flight were told what was closed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.aio.running import Runner
from tests.aio.scenarios import until
from trio_dcore import aio
from trio_dcore.aio import CommClosedError, RPCClosed


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server in another process, so that nothing but what the test uses needs trio in its event loop."""
    root = Path(__file__).parent.parent.parent
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-W", "error", Path(__file__).parent / "programs" / "serve_trio.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as program:
        try:
            assert program.stdin is not None
            assert program.stdout is not None
            yield program.stdout.readline().strip()
            program.stdin.close()
            assert program.wait(30) == 0
        finally:
            program.kill()


async def ended() -> None:
    """Wait until trio does not run here any more."""
    async with asyncio.timeout(10):
        await until(lambda: not trio.lowlevel.in_trio_run())


@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_comm_with_a_reader(run: Runner, address: str, how: str) -> None:
    async def main() -> None:
        comm = await aio.connect(address)
        reader = asyncio.create_task(comm.read())
        await asyncio.sleep(0.01)
        if how == "close":
            await comm.close()
        else:
            comm.abort()
        with pytest.raises(CommClosedError):
            await reader
        await ended()

    run(main)


@pytest.mark.parametrize("how", ["close_rpc", "close_comms"])
def test_calls(run: Runner, address: str, how: str) -> None:
    async def main() -> None:
        remote = aio.rpc(address)
        calls = [asyncio.create_task(remote.forever()) for _ in range(5)]
        await until(lambda: remote.pool.active == 5)
        await asyncio.sleep(0.01)
        if how == "close_rpc":
            await remote.close_rpc()
        else:
            remote.close_comms()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RPCClosed] * 5
        await ended()

    run(main)


def test_a_stream(run: Runner, address: str) -> None:
    async def main() -> None:
        remote = aio.rpc(address)
        async with remote.mirror.stream() as stream:
            await stream.send(1)
            assert await stream.receive() == 1
            remote.close_comms()
            with pytest.raises(RPCClosed) as caught:
                await stream.receive()
            assert caught.type is RPCClosed
        await ended()

    run(main)


def test_batches(run: Runner, address: str) -> None:
    """The comm is closed inside of the block; the stream's end is nothing but that."""

    async def main() -> None:
        comm = await aio.connect(address)
        async with aio.BatchedSend(comm) as stream:
            await comm.close()
            await stream.close()
            with pytest.raises(CommClosedError):
                stream.send(1)
        await ended()

    run(main)


def test_one_goes_and_another_comes(run: Runner, address: str) -> None:
    async def main() -> None:
        for _ in range(3):
            async with aio.rpc(address) as remote:
                assert (await remote.identity())["type"] == "Server"
        async with await aio.connect(address) as comm:
            await comm.write({"op": "mirror", "reply": False})
            await comm.write("x")
            assert await comm.read() == "x"
        assert not trio.lowlevel.in_trio_run()

    run(main)
