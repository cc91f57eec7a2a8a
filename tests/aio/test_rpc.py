"""trio_dcore.aio._client and _stream: rpc, ConnectionPool and streams in asyncio programs."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.aio.running import Runner
from trio_dcore import aio
from trio_dcore.aio import (
    CommClosedError,
    ConnectError,
    LimitExceeded,
    Limits,
    LocalProtocolError,
    RemoteError,
    RPCClosed,
    UnknownOp,
)


class Work:
    """Handlers that say what becomes of them."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.log: list[str] = []
        self.sent = 0

    def add(self, x: int, y: int) -> int:
        return x + y

    async def slow(self, n: int = 0) -> int:
        await asyncio.sleep(random.random() * 0.01)
        return n

    async def wait(self) -> None:
        try:
            self.begun.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise
        finally:
            self.ended.set()

    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    async def endless(self) -> AsyncIterator[int]:
        try:
            while True:
                self.sent += 1
                yield self.sent
                await asyncio.sleep(0)
        finally:
            self.log.append("closed")
            self.ended.set()

    async def breaks(self) -> AsyncIterator[int]:
        yield 1
        raise KeyError("deep")

    async def mirror(self, comm: aio.Comm) -> None:
        async for item in comm:
            await comm.write(item)

    def note(self, line: str) -> None:
        self.log.append(line)
        self.ended.set()

    @property
    def handlers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in vars(Work) if not name.startswith("_") and name != "handlers"}


@asynccontextmanager
async def serving(where: str = "tcp://127.0.0.1:0") -> AsyncIterator[tuple[Work, str]]:
    work = Work()
    async with aio.Server(work.handlers) as server:
        yield work, await server.listen(where)


# -- calls -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:0", "inproc://"])
def test_calls(run: Runner, where: str) -> None:
    async def main() -> None:
        async with serving(where) as (_, address):
            remote = aio.rpc(address)
            async with remote as same:
                assert same is remote
                assert remote.address == address
                assert await remote.add(x=1, y=2) == 3
                assert await remote["add"](x=1, y=3) == 4
                assert await asyncio.gather(*[remote.slow(n=n) for n in range(50)]) == list(range(50))
                with pytest.raises(UnknownOp):
                    await remote.nothing()
                with pytest.raises(TypeError, match="can't be arguments"):
                    await remote.add(op=1)
                with pytest.raises(TypeError, match="wrong arguments"):
                    await remote.add(x=1)
                with pytest.raises(AttributeError, match="write remote"):
                    _ = remote._private
                assert remote.add is remote.add
                assert "add" in repr(remote.add)
                assert address in repr(remote)
            with pytest.raises(RPCClosed):
                await remote.add(x=1, y=2)
            with pytest.raises(RPCClosed):
                await aio_closed().add()

    def aio_closed() -> aio.rpc:
        remote = aio.rpc("tcp://127.0.0.1:1")
        remote.close_comms()
        return remote

    run(main)


def test_over_tls_and_unix(run: Runner, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")

    async def main() -> None:
        security = aio.Security.temporary()
        places = {"tls://127.0.0.1:0": security}
        if sys.platform != "win32":
            places[f"unix://{tmp_path}/s"] = aio.Security()
        for where, trust in places.items():
            async with aio.Server(Work().handlers, security=trust) as server:
                address = await server.listen(where)
                async with aio.rpc(address, security=trust) as remote:
                    assert await remote.add(x=1, y=2) == 3
                    assert [item async for item in remote.count.stream(n=3)] == [0, 1, 2]
                async with await aio.connect(address, security=trust) as comm:
                    assert comm.peer.kind == where.partition(":")[0]
                    assert await aio.send_recv(comm, op="add", x=1, y=2) == 3

    run(main)


def test_notify(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (work, address), aio.rpc(address) as remote:
            await remote.note.notify(line="hello")
            await work.ended.wait()
            assert work.log == ["hello"]
            assert await remote.note(line="again", reply=False) is None

    run(main)


@pytest.mark.parametrize("how", ["timeout", "wait_for", "cancel", "group"])
def test_what_cancels_a_call_cancels_its_handler(run: Runner, how: str) -> None:
    async def main() -> None:
        async with serving() as (work, address), aio.rpc(address) as remote:
            if how == "timeout":
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await remote.wait()
            elif how == "wait_for":
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(remote.wait(), 0.05)
            elif how == "cancel":
                task = asyncio.create_task(remote.wait())
                await work.begun.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with pytest.raises(ExceptionGroup) as caught:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(remote.wait())
                        await work.begun.wait()
                        await remote.nothing()
                assert [type(leaf) for leaf in caught.value.exceptions] == [UnknownOp]
            await work.ended.wait()
            assert work.log == ["cancelled"]
            assert await remote.add(x=1, y=1) == 2

    run(main)


def test_many_calls_with_random_cancellations(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (_, address), aio.rpc(address, limit=4) as remote:

            async def call(n: int) -> None:
                try:
                    async with asyncio.timeout(random.random() * 0.05):
                        assert await remote.slow(n=n) == n
                except TimeoutError:
                    pass

            async with asyncio.TaskGroup() as group:
                for n in range(100):
                    group.create_task(call(n))
            assert await remote.add(x=1, y=2) == 3

    run(main)


def test_closing_ends_calls_in_flight(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (work, address):
            remote = aio.rpc(address)
            call = asyncio.create_task(remote.wait())
            await work.begun.wait()
            remote.close_comms()
            with pytest.raises(RPCClosed):
                await call
            remote.close_comms()
            await remote.close_rpc()

    run(main)


def test_a_server_that_goes_away(run: Runner) -> None:
    async def main() -> None:
        work = Work()
        server = await aio.Server(work.handlers)
        address = await server.listen("tcp://127.0.0.1:0")
        async with aio.rpc(address, timeout=0.05) as remote:
            call = asyncio.create_task(remote.wait())
            await work.begun.wait()
            await server.close(0)
            with pytest.raises((CommClosedError, aio.HandlerCancelled)):
                await call
            with pytest.raises((ConnectError, aio.ServerClosing)):
                await remote.add(x=1, y=2)

    run(main)


def test_an_rpc_that_nobody_closed_is_closed_when_it_is_deleted(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (_, address):
            remotes = [aio.rpc(address), aio.rpc(address)]
            await remotes[0].add(x=1, y=2)
            native = remotes[0]._bound.pool
            with pytest.warns(ResourceWarning, match="unclosed rpc or pool with 1 comm"):
                remotes.clear()
            await asyncio.sleep(0)
            assert native.closed
            assert native.open == 0
            pool = aio.ConnectionPool()
            await pool(address).add(x=1, y=2)
            await pool.close()
            del pool

    run(main)


# -- pools -----------------------------------------------------------------------------------------------------------------------------


def test_a_pool(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (work, address), serving() as (_, other):
            pool = await aio.ConnectionPool(limit=2)
            await pool.start()
            assert (pool.limit, pool.open, pool.active, pool.closed) == (2, 0, 0, False)
            assert await pool(address).add(x=1, y=2) == 3
            assert await pool(other).add(x=1, y=2) == 3
            assert (pool.open, pool.active) == (2, 0)
            assert pool.collect() == 2
            call = asyncio.create_task(pool(address).wait())
            await work.begun.wait()
            assert pool.active == 1
            pool.remove(address)
            with pytest.raises(CommClosedError):
                await call
            async with pool(address) as remote:
                assert remote.address == address
                assert await remote.add(x=2, y=2) == 4
            host, _, port = address.removeprefix("tcp://").partition(":")
            assert pool(ip=host, port=port).address == address
            assert await pool(ip=host, port=int(port)).add(x=2, y=3) == 5
            with pytest.raises(TypeError, match="give an address"):
                pool()
            assert (pool.connecting, pool.bytes_read, pool.bytes_written) == (0, 0, 0)
            assert "ConnectionPool" in repr(pool)
            pool.close_now()
            assert pool.closed
            async with aio.ConnectionPool(limits=Limits(pool_wait=0.02), limit=1) as pool:
                work.begun.clear()
                call = asyncio.create_task(pool(address).wait())
                await work.begun.wait()
                with pytest.raises(LimitExceeded):
                    await pool(address).add(x=1, y=2)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert await pool(address).add(x=1, y=2) == 3

    run(main)


# -- streams ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:0", "inproc://"])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100])
def test_a_stream_in_a_block(run: Runner, where: str, count: int) -> None:
    async def main() -> None:
        async with serving(where) as (_, address), aio.rpc(address) as remote:
            for _ in range(2):
                async with remote.count.stream(n=count) as stream:
                    assert [item async for item in stream] == list(range(count))
                    with pytest.raises(trio.EndOfChannel):
                        await stream.receive()
                with pytest.raises(trio.ClosedResourceError):
                    await stream.receive()
                with pytest.raises(LocalProtocolError):
                    await stream.__aenter__()
            assert remote.pool.open == 1

    run(main)


def test_leaving_a_stream_ends_its_handler(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (work, address), aio.rpc(address) as remote:
            async with remote.endless.stream() as stream:
                assert [await stream.receive() for _ in range(3)] == [1, 2, 3]
            await work.ended.wait()
            assert work.log == ["closed"]
            await stream.aclose()

    run(main)


def test_a_stream_without_a_block(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (work, address), aio.rpc(address) as remote:
            assert [item async for item in remote.count.stream(n=20)] == list(range(20))
            async for item in remote.endless.stream():
                if item == 3:
                    break
            await work.ended.wait()
            async with aclosing(aiter(remote.endless.stream())) as items:  # type: ignore[type-var]
                assert await anext(items) > 3
            with pytest.raises(KeyError):
                async for _ in remote.breaks.stream():
                    pass

    run(main)


def test_a_slow_consumer_slows_the_producer(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (work, address), aio.rpc(address, limits=Limits(window=16)) as remote:
            async with remote.endless.stream() as stream:
                assert await stream.receive() == 1
                await asyncio.sleep(0.1)
                assert work.sent <= 1 + 2 * 16 + 16
                assert [await stream.receive() for _ in range(100)] == list(range(2, 102))

    run(main)


def test_large_items_are_not_taken_ahead_by_the_dozen(run: Runner) -> None:
    made: list[int] = []

    async def large() -> AsyncIterator[bytes]:
        for n in range(12):
            made.append(n)
            yield bytes(2**20)

    async def main() -> None:
        async with aio.Server({"large": large}) as server, aio.rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
            async with remote.large.stream() as stream:
                assert len(await stream.receive()) == 2**20
                await asyncio.sleep(0.1)
                assert len(made) <= 6
                assert [len(item) async for item in stream] == [2**20] * 11
                assert stream.bytes_read > 12 * 2**20
            assert stream.bytes_read == 0

    run(main)


def test_an_error_comes_behind_the_items(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (_, address), aio.rpc(address) as remote:
            items = []
            with pytest.raises(KeyError) as caught:
                async with remote.breaks.stream() as stream:
                    async for item in stream:
                        items.append(item)
            assert items == [1]
            assert isinstance(caught.value, RemoteError)
            async with remote.breaks.stream() as stream:
                assert await stream.receive() == 1
                for _ in range(2):
                    with pytest.raises(KeyError):
                        await stream.receive()
            with pytest.raises(UnknownOp):
                async with remote.nothing.stream() as stream:
                    await stream.receive()

    run(main)


def test_both_directions(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (_, address), aio.rpc(address) as remote:
            async with remote.mirror.stream() as stream:
                for n in range(30):
                    await stream.send(n)
                    assert await stream.receive() == n
                await stream.send_eof()
                assert [item async for item in stream] == []
            stream = remote.mirror.stream()
            for use in (stream.send(1), stream.send_eof(), stream.receive()):
                with pytest.raises(LocalProtocolError, match="open the stream first"):
                    await use

    run(main)


def test_cancelled_while_waiting_for_an_item(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (_, address), aio.rpc(address) as remote, remote.mirror.stream() as stream:
            for n in range(5):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.005):
                        await stream.receive()
                reader = asyncio.create_task(stream.receive())
                await asyncio.sleep(0)
                with pytest.raises(trio.BusyResourceError):
                    await stream.receive()
                await stream.send(n)
                assert await reader == n

    run(main)


def test_cancelled_while_opening_and_while_closing(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (_, address), aio.rpc(address) as remote:

            async def use() -> None:
                async with remote.endless.stream() as stream:
                    await stream.receive()

            for passes in range(30):
                task = asyncio.create_task(use())
                for _ in range(passes):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or task.exception() is None
            assert await remote.add(x=1, y=1) == 2
            assert remote.pool.active == 0

    run(main)


def test_no_connection_for_a_stream(run: Runner) -> None:
    async def main() -> None:
        async with aio.rpc("tcp://127.0.0.1:1", timeout=0.05) as remote:
            with pytest.raises(ConnectError):
                async with remote.count.stream(n=1):
                    raise AssertionError
            with pytest.raises(TypeError):
                remote.count.stream(reply=False)

    run(main)


def test_the_pool_closes_under_a_stream(run: Runner) -> None:
    async def main() -> None:
        async with serving() as (_, address):
            remote = aio.rpc(address)
            with pytest.raises(RPCClosed):
                async with remote.mirror.stream() as stream:
                    remote.close_comms()
                    await stream.receive()

    run(main)
