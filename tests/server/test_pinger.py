"""Pings over real sockets: processes that are stopped, and not killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from trio_dcore import CommClosedError, Limits, Server, rpc

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGSTOP")

SOON = Limits(ping_interval=0.1, ping_timeout=0.5)

SERVER = """
import trio
from trio_dcore import Server

async def main():
    async with Server({"work": trio.sleep_forever}) as server:
        print(await server.listen("tcp://127.0.0.1:0"), flush=True)
        await server.finished()

trio.run(main)
"""

CLIENT = """
import sys
import trio
from trio_dcore import Limits, rpc

async def main():
    async with rpc(sys.argv[1], limits=Limits(ping_interval=None)) as remote:
        await remote.work()

trio.run(main)
"""


@asynccontextmanager
async def program(source: str, *args: str) -> AsyncIterator[trio.Process]:
    command = [sys.executable, "-c", source, *args]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        with trio.fail_after(30):
            yield process
    finally:
        process.kill()
        await process.wait()
        if process.stdout is not None:
            await process.stdout.aclose()


async def test_a_stopped_server() -> None:
    async with program(SERVER) as process:
        assert process.stdout is not None
        address = bytes(await process.stdout.receive_some()).decode().strip()
        async with rpc(address, limits=SOON) as remote:
            with trio.move_on_after(1.2) as alive:  # two timeouts
                await remote.work()
            assert alive.cancelled_caught  # it answers
            process.send_signal(signal.SIGSTOP)
            began = trio.current_time()
            async with rpc(address, limits=SOON, timeout=5.0) as other:
                process.send_signal(signal.SIGCONT)
                await other.echo()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stop_soon, process)
                    with pytest.raises(CommClosedError, match="ping_timeout"):
                        await other.work()
            assert trio.current_time() - began < 10
            process.send_signal(signal.SIGCONT)
            assert await remote.echo(data=1) == 1


async def stop_soon(process: trio.Process) -> None:
    await trio.sleep(0.3)
    process.send_signal(signal.SIGSTOP)


async def test_a_stopped_client() -> None:
    started, ended = trio.Event(), trio.Event()

    async def work() -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with Server({"work": work}, limits=SOON) as server:
        address = await server.listen("tcp://127.0.0.1:0")
        async with program(CLIENT, address) as process:
            await started.wait()
            await trio.sleep(1.5)
            assert not ended.is_set()  # it answers
            process.send_signal(signal.SIGSTOP)
            await ended.wait()
            assert server.statistics().in_flight == 0


async def test_who_was_stopped_itself_blames_nobody() -> None:
    """A process that had no time for its tasks looks first for the answers that have come meanwhile."""
    async with program(SERVER) as process:
        assert process.stdout is not None
        address = bytes(await process.stdout.receive_some()).decode().strip()
        async with rpc(address, limits=SOON) as remote, trio.open_nursery() as nursery:
            nursery.start_soon(remote.work)
            for _ in range(2):
                await trio.sleep(0.15)
                subprocess.run(["sleep", "0.7"], check=True)  # blocks the loop, as is meant
            await trio.sleep(0.3)
            assert remote.pool.active == 1
            nursery.cancel_scope.cancel()
