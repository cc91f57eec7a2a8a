"""The trio run that nobody has opened ends with its last user, but not before those in flight were told what was closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from tests.aio.running import Runner
from tests.aio.scenarios import until
from trio_dcore import Comm, Server, aio
from trio_dcore.aio import CommClosedError, RPCClosed


async def forever() -> None:
    await trio.sleep_forever()


async def mirror(comm: Comm) -> None:
    async for message in comm:
        await comm.write(message)


@pytest.fixture
def address() -> Iterator[str]:
    """Of a server in a thread of its own, so that nothing but what the test uses needs trio in its event loop."""
    started = threading.Event()
    found: list[Any] = []

    async def serve() -> None:
        async with Server({"forever": forever, "mirror": mirror}, grace=0) as server:
            found.append(await server.listen("tcp://127.0.0.1:0"))
            found.append((server, trio.lowlevel.current_trio_token()))
            started.set()
            await server.finished()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    try:
        assert started.wait(30)
        yield found[0]
    finally:
        server, token = found[1]
        token.run_sync_soon(server.stop, 0)
        thread.join(30)


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
