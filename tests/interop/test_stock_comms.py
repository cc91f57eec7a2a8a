"""Stock comms with our Server: streams, bare reads and writes, and how connections end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator
from typing import Any

import numpy
import pytest
import trio
from distributed.batched import BatchedSend
from distributed.comm import CommClosedError as StockCommClosedError
from distributed.comm import connect as stock_connect
from distributed.core import ConnectionPool as StockConnectionPool
from distributed.core import rpc as stock_rpc
from distributed.core import send_recv as stock_send_recv
from distributed.protocol import to_serialize

from trio_dcore import Comm


def add(x: int, y: int = 10) -> int:
    return x + y


async def add_later(x: int, y: int) -> int:
    await trio.lowlevel.checkpoint()
    return x + y


async def read_all(comm: Any) -> list[Any]:
    """All messages up to the end of a stock comm."""
    found = []
    with contextlib.suppress(StockCommClosedError):
        while True:
            found.append(await comm.read())
    return found


# -- streams ---------------------------------------------------------------------------------------------------------------------


async def test_a_stream_that_a_handler_writes(stock: Any, ours: Any) -> None:
    """Items of a handler that takes the comm, and then the same connection for a call."""

    async def ticks(comm: Comm, n: int) -> None:
        for i in range(n):
            await comm.write({"tick": i, "data": numpy.full(3, i)})

    async def listen() -> Any:
        comm = await stock_connect(server.address)
        await comm.write({"op": "ticks", "n": 5, "reply": False})
        items = [await comm.read() for _ in range(5)]
        await comm.write({"op": "add", "x": 1, "y": 2, "reply": True})
        answer = await comm.read()
        await comm.close()
        return items, answer

    async with ours({"ticks": ticks, "add": add}) as server:
        items, answer = await stock.run(listen)
    assert [item["tick"] for item in items] == [0, 1, 2, 3, 4]
    assert [item["data"].tolist() for item in items] == [[i] * 3 for i in range(5)]
    assert answer == 3


async def test_a_generator_read_over_a_bare_comm(stock: Any, ours: Any) -> None:
    """Without ``reply`` a bare comm gets the items, then the return value: that of a generator is None."""

    async def count(n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    async def listen() -> list[Any]:
        comm = await stock_connect(server.address)
        await comm.write({"op": "count", "n": 3, "close": True})
        found = await read_all(comm)
        await comm.close()
        return found

    async with ours({"count": count}) as server:
        assert await stock.run(listen) == [0, 1, 2, None]


async def test_a_stream_that_fails(stock: Any, ours: Any) -> None:
    """The items before the failure, then Dask's error message."""

    async def ticks(comm: Comm) -> None:
        await comm.write(1)
        raise ValueError("no more")

    async def listen() -> list[Any]:
        comm = await stock_connect(server.address)
        await comm.write({"op": "ticks", "reply": True, "close": True})
        found = await read_all(comm)
        await comm.close()
        return found

    async with ours({"ticks": ticks}) as server:
        first, error = await stock.run(listen)
    assert first == 1
    assert error["status"] == "uncaught-error"
    assert error["exception_text"] == "ValueError('no more')"
    assert "ticks" in error["traceback_text"]


async def test_leaving_a_stream_ends_its_handler(stock: Any, ours: Any) -> None:
    ended = trio.Event()

    async def ticks(comm: Comm) -> None:
        try:
            for i in itertools.count():
                await comm.write(i)
                await trio.lowlevel.checkpoint()
        finally:
            ended.set()

    async def listen_a_little() -> list[Any]:
        comm = await stock_connect(server.address)
        await comm.write({"op": "ticks", "reply": False})
        found = [await comm.read() for _ in range(3)]
        comm.abort()
        return found

    async with ours({"ticks": ticks}) as server:
        assert await stock.run(listen_a_little) == [0, 1, 2]
        await ended.wait()


async def test_a_conversation(stock: Any, ours: Any) -> None:
    """A handler that reads what the client writes, until the client has said enough."""

    async def totals(comm: Comm, start: int) -> str:
        total = start
        while (number := await comm.read()) is not None:
            total += number
            await comm.write(total)
        return f"total {total}"

    async def talk() -> list[Any]:
        comm = await stock_connect(server.address)
        await comm.write({"op": "totals", "start": 100})
        found = []
        for number in (1, 2, 3):
            await comm.write(number)
            found.append(await comm.read())
        await comm.write(None)
        found.append(await comm.read())
        await comm.close()
        return found

    async with ours({"totals": totals}) as server:
        assert await stock.run(talk) == [101, 103, 106, "total 106"]


async def test_a_batched_stream(stock: Any, ours: Any) -> None:
    """Stock BatchedSend into our stream handlers; what one of them can't take costs the others nothing."""
    found: list[Any] = []
    complete = trio.Event()

    async def note(x: Any) -> None:
        await trio.lowlevel.checkpoint()
        found.append(x)

    def last() -> None:
        complete.set()

    def fail() -> None:
        raise ValueError("this item only")

    async def send() -> None:
        comm = await stock_connect(server.address)
        await comm.write({"op": "connection_stream", "reply": False})
        batched = BatchedSend(interval="1ms")
        batched.start(comm)
        batched.send({"op": "note", "x": 1}, {"op": "note", "x": to_serialize(numpy.arange(3))})
        batched.send({"op": "fail"}, {"op": "no such op"}, {"op": "note", "x": {"a": (1,)}})
        batched.send({"op": "last"})
        batched.send({"op": "close-stream"})
        await batched.close()

    async with ours(stream_handlers={"note": note, "fail": fail, "last": last}) as server:
        await stock.run(send)
        await complete.wait()
    assert found[0] == 1
    assert found[1].tolist() == [0, 1, 2]
    assert found[2] == {"a": (1,)}
    assert len(found) == 3


# -- bare comms ------------------------------------------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_order(stock: Any, ours: Any) -> None:
    async def ask() -> list[Any]:
        comm = await stock_connect(server.address)
        for i in range(20):
            await comm.write({"op": "add_later" if i % 3 else "add", "x": i, "y": 1, "reply": True})
        found = [await comm.read() for _ in range(20)]
        await comm.close()
        return found

    async with ours({"add": add, "add_later": add_later}) as server:
        assert await stock.run(ask) == [i + 1 for i in range(20)]


@pytest.mark.parametrize("message", [[1, 2], "text", {"x": 1}, {"op": 5}, {"op": ["add"]}, {1: 2, "op": "add"}], ids=repr)
async def test_a_message_that_is_no_request_gets_an_error(stock: Any, ours: Any, message: Any) -> None:
    """A stock server drops the connection here; ours answers and goes on."""

    async def ask() -> Any:
        comm = await stock_connect(server.address)
        await comm.write(message)
        error = await comm.read()
        await comm.write({"op": "add", "x": 1, "y": 2, "reply": True})
        answer = await comm.read()
        await comm.close()
        return error, answer

    async with ours({"add": add}) as server:
        error, answer = await stock.run(ask)
    assert error["status"] == "uncaught-error"
    assert answer == 3


# -- endings ---------------------------------------------------------------------------------------------------------------------


async def test_a_cancelled_call_cancels_its_handler(stock: Any, ours: Any, kind: str) -> None:
    """Stock cancellation closes the connection: with a stock server the handler would run to its end."""
    started, cancelled = trio.Event(), trio.Event()

    async def wait() -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with ours({"wait": wait}) as server, trio.open_nursery() as nursery:
        nursery.start_soon(stock.call, kind, server.address, lambda remote: remote.wait())
        await started.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await cancelled.wait()
    assert cancelled.is_set()


async def test_a_stopping_server_delivers_the_reply_in_flight(stock: Any, ours: Any, kind: str) -> None:
    started, go_on = trio.Event(), trio.Event()

    async def wait() -> str:
        started.set()
        await go_on.wait()
        return "done"

    results = []

    async def client() -> None:
        results.append(await stock.call(kind, server.address, lambda remote: remote.wait()))

    async with trio.open_nursery() as nursery, ours({"wait": wait}) as server:
        nursery.start_soon(client)
        await started.wait()
        server.stop(grace=math.inf)
        go_on.set()
        await server.finished()
    assert results == ["done"]


async def test_a_handler_cut_by_the_shutdown_answers(stock: Any, ours: Any, kind: str) -> None:
    """Not a bare end of the connection, which could mean anything, but an error that says what happened."""
    started = trio.Event()

    async def wait() -> None:
        started.set()
        await trio.sleep_forever()

    async def cut(remote: Any) -> None:
        with pytest.raises(RuntimeError):
            await remote.wait()

    async with trio.open_nursery() as nursery, ours({"wait": wait}) as server:
        nursery.start_soon(stock.call, kind, server.address, cut)
        await started.wait()
        server.stop(grace=0)
        await server.finished()


async def test_a_request_behind_a_running_one_is_refused_by_a_stopping_server(stock: Any, ours: Any) -> None:
    started, go_on = trio.Event(), trio.Event()

    async def wait() -> str:
        started.set()
        await go_on.wait()
        return "done"

    async def ask() -> Any:
        comm = await stock_connect(server.address)
        await comm.write({"op": "wait", "reply": True})
        await comm.write({"op": "add", "x": 1, "reply": True})
        return comm

    async def rest(comm: Any) -> list[Any]:
        found = await read_all(comm)
        await comm.close()
        return found

    async with ours({"wait": wait, "add": add}) as server:
        comm = await stock.run(ask)
        await started.wait()
        server.stop(grace=math.inf)
        go_on.set()
        await server.finished()
    answers = await stock.run(rest, comm)
    assert answers[0] == "done"
    assert answers[1]["status"] == "uncaught-error"
    assert answers[1]["exception_text"].startswith("ServerClosing")
    assert len(answers) == 2


async def test_idle_connections_end_with_the_server(stock: Any, ours: Any) -> None:
    async def hold() -> Any:
        comm = await stock_connect(server.address)
        assert await stock_send_recv(comm, op="add", x=1, y=2) == 3
        return comm

    async def end(comm: Any) -> None:
        with pytest.raises(StockCommClosedError):
            await comm.read()
        await comm.close()

    async with ours({"add": add}) as server:
        comm = await stock.run(hold)
    await stock.run(end, comm)


async def test_a_pool_finds_a_server_again_that_was_restarted(stock: Any, ours: Any) -> None:
    """The pooled connection has ended with the first server; the next call opens one to the second."""

    async def make() -> Any:
        return await StockConnectionPool()

    async def ask(pool: Any, address: str) -> Any:
        return await pool(address).add(x=1, y=2)

    pool = await stock.run(make)
    async with ours({"add": add}) as first:
        address = first.address
        assert await stock.run(ask, pool, address) == 3
    async with ours({"add": lambda x, y: x * 100 + y}) as second:
        assert await stock.run(ask, pool, second.address) == 102
    await stock.run(pool.close)


async def test_a_stock_rpc_that_is_only_forgotten(stock: Any, ours: Any) -> None:
    """``close_comms`` and no more: the op ``close`` that it sends ends the connections of our server."""

    async def ask() -> Any:
        remote = stock_rpc(server.address)
        answer = await remote.add(x=1, y=2)
        await asyncio.gather(*remote.close_comms())
        await remote.close_rpc()
        return answer

    async with ours({"add": add}) as server:
        assert await stock.run(ask) == 3
