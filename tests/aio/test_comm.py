"""trio_dcore.aio._comm: connect, Comm and send_recv in asyncio programs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

import trio_dcore
from tests.aio.running import Runner
from trio_dcore import aio
from trio_dcore.aio import CommClosedError, ConnectError, RemoteError
from trio_dcore.aio import _comm as module


def add(x: int, y: int) -> int:
    return x + y


async def count(comm: aio.Comm, n: int) -> None:
    for i in range(n):
        await comm.write(i)


async def mirror(comm: aio.Comm) -> None:
    while True:
        await comm.write(await comm.read())


async def broken() -> None:
    raise ValueError("deep")


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[str]:
    async with aio.Server({"add": add, "count": count, "mirror": mirror, "broken": broken}, **options) as server:
        yield await server.listen("tcp://127.0.0.1:0")


@asynccontextmanager
async def silent() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A listener that accepts and says nothing, and the event of a connection's end."""
    ended = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        while await reader.read(1000):
            pass
        ended.set()
        writer.close()

    accepted = asyncio.Event()
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"tcp://127.0.0.1:{port}", ended
    finally:
        server.close()
        if accepted.is_set():
            await ended.wait()
        await asyncio.sleep(0)


def test_requests(run: Runner) -> None:
    async def main() -> None:
        async with serving() as address, await aio.connect(address) as comm:
            assert await aio.send_recv(comm, op="add", x=1, y=2) == 3
            assert await comm.write({"op": "add", "x": 3, "y": 4, "reply": True}) > 0
            assert await comm.read() == 7
            await comm.send({"op": "add", "x": 3, "y": 5, "reply": True})
            assert await comm.receive() == 8
            with pytest.raises(ValueError, match="deep") as caught:
                await aio.send_recv(comm, op="broken")
            assert isinstance(caught.value, RemoteError)
            assert comm.peer_address == address
            assert comm.local_address.startswith("tcp://127.0.0.1:")
            assert comm.peer.kind == "loopback"
            assert not comm.closed()
            assert repr(comm).startswith("<aio <")
        assert comm.closed()

    run(main)


def test_reading_to_the_end(run: Runner) -> None:
    async def main() -> None:
        async with serving() as address:
            async with await aio.connect(address) as comm:
                await comm.write({"op": "count", "n": 3, "close": True, "reply": False})
                assert [item async for item in comm] == [0, 1, 2]
                with pytest.raises(trio.EndOfChannel):
                    await comm.receive()
                with pytest.raises(CommClosedError):
                    await comm.read()
            with pytest.raises(trio.ClosedResourceError):
                await comm.receive()
            with pytest.raises(CommClosedError):
                await comm.write(1)

    run(main)


def test_a_comm_survives_cancelled_reads(run: Runner) -> None:
    async def main() -> None:
        async with serving() as address, await aio.connect(address) as comm:
            await comm.write({"op": "mirror", "reply": False})
            for n in range(5):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await comm.read()
                await comm.write(n)
                assert await comm.read() == n

    run(main)


def test_a_message_is_not_lost_in_the_moment_of_a_cancellation(run: Runner) -> None:
    async def main() -> None:
        async with serving() as address, await aio.connect(address) as comm:
            await comm.write({"op": "mirror", "reply": False})
            loop = asyncio.get_running_loop()
            for n, read in enumerate((comm.read, comm.receive)):
                task = asyncio.create_task(read())
                await asyncio.sleep(0)
                # The cancellation comes when the trio side has the message, and the task has not seen it.
                (crossing,) = [each for each in comm.portal.crossings if each.fn in (comm.native.read, comm.native.receive)]

                class Ending(type(crossing)):  # type: ignore[misc]
                    __slots__ = ()

                    def end(self, task: asyncio.Task[Any] = task) -> None:
                        loop.call_soon(task.cancel)
                        super().end()

                crossing.__class__ = Ending
                await comm.write(n)
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await read() == n

    run(main)


def test_only_one_task_may_read(run: Runner) -> None:
    async def main() -> None:
        async with serving() as address, await aio.connect(address) as comm:
            await comm.write({"op": "mirror", "reply": False})
            reader = asyncio.create_task(comm.read())
            await asyncio.sleep(0.01)
            with pytest.raises(trio.BusyResourceError):
                await comm.read()
            await asyncio.gather(*[comm.write(n) for n in range(10)])
            assert sorted([await reader, *[await comm.read() for _ in range(9)]]) == list(range(10))

    run(main)


def test_abort_wakes_a_reader(run: Runner) -> None:
    async def main() -> None:
        async with serving() as address:
            comm = await aio.connect(address)
            reader = asyncio.create_task(comm.read())
            await asyncio.sleep(0.01)
            comm.abort()
            comm.abort()
            with pytest.raises(CommClosedError):
                await reader
            await comm.aclose()

    run(main)


def test_nobody_there(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(ConnectError) as caught:
            await aio.connect("tcp://127.0.0.1:1", timeout=0.05)
        assert isinstance(caught.value.__cause__, OSError)
        assert not trio.lowlevel.in_trio_run()
        with pytest.raises(aio.AddressError):
            await aio.connect("nonsense://x")

    run(main)


@pytest.mark.parametrize("how", ["cancel", "timeout", "wait_for"])
def test_cancelled_while_connecting(run: Runner, how: str) -> None:
    async def main() -> None:
        async with silent() as (address, ended):
            if how == "cancel":
                task = asyncio.create_task(aio.connect(address))
                await asyncio.sleep(0.02)
                task.cancel()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "timeout":
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await aio.connect(address)
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(aio.connect(address), 0.02)
            await ended.wait()
            assert not trio.lowlevel.in_trio_run()

    run(main)


def test_a_comm_that_arrives_in_the_moment_of_a_cancellation_is_closed(run: Runner) -> None:
    async def main() -> None:
        async with serving() as address:
            for passes in range(0, 60, 2):
                task = asyncio.create_task(aio.connect(address))
                for _ in range(passes):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    await (await task).close()

    run(main)


def test_a_comm_that_arrives_when_the_portal_closes_is_closed(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect_late(*args: Any, **kwargs: Any) -> Any:
        comm = await trio_dcore.connect(*args, **kwargs)
        portals[0].close_now()
        return comm

    portals: list[aio.Portal] = []

    async def main() -> None:
        async with aio.open_trio() as portal:
            portals.append(portal)
            server = await aio.Server()
            address = await server.listen("tcp://127.0.0.1:0")
            monkeypatch.setattr(module, "native_connect", connect_late)
            comm = await aio.connect(address)
            assert comm.closed()

    run(main)


def test_a_comm_that_nobody_closed_is_closed_when_it_is_deleted(run: Runner) -> None:
    async def main() -> None:
        async with serving() as address:
            comms = [await aio.connect(address)]
            native = comms[0].native
            with pytest.warns(ResourceWarning, match="unclosed comm"):
                comms.clear()
            await asyncio.sleep(0)
            assert native.closed()
            comms = [await aio.connect(address)]
            comms[0].abort()
            comms.clear()  # no warning

    run(main)


def test_sending_back_and_forth_in_many_tasks(run: Runner) -> None:
    async def main() -> None:
        async with serving() as address:

            async def talk(n: int) -> None:
                async with await aio.connect(address) as comm:
                    await comm.write({"op": "mirror", "reply": False})
                    for i in range(10):
                        await comm.write({"n": n, "i": i})
                        assert await comm.read() == {"n": n, "i": i}

            async with asyncio.TaskGroup() as group:
                for n in range(10):
                    group.create_task(talk(n))

    run(main)
