"""Message streams with stock peers, both ways: ``BatchedSend`` at one end, ``stream_handlers`` at the other."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy
import pytest
import trio
import trio.testing
from distributed.batched import BatchedSend as StockBatchedSend
from distributed.comm import connect as stock_connect
from distributed.protocol import to_serialize as stock_to_serialize

from trio_dcore import BatchedSend, CommClosedError, SerializationError, connect, to_serialize


class Bell:
    """An event that is rung in the stock loop, or in trio, and waited for in trio."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._token = trio.lowlevel.current_trio_token()

    def ring(self) -> None:
        self._token.run_sync_soon(self._event.set)

    async def wait(self) -> None:
        with trio.fail_after(10):
            await self._event.wait()


async def test_into_stock_stream_handlers(stock: Any) -> None:
    """In order over many batches, with payloads and pickles; what can't be sent is told here, and the stream lives on there."""
    found: list[Any] = []
    complete = Bell()

    def note(x: Any) -> None:
        found.append(x)

    async def note_later(x: Any) -> None:
        await asyncio.sleep(0)
        found.append(x)

    handlers = {"note": note, "note_later": note_later, "last": complete.ring}
    async with stock.serve(stream_handlers=handlers) as server, await connect(server.address) as comm:
        await comm.write({"op": "connection_stream", "reply": False})
        async with BatchedSend(comm, "1ms") as stream:
            for i in range(2000):
                await stream.send_wait({"op": "note" if i % 3 else "note_later", "x": i})
            with pytest.raises(SerializationError):
                stream.send({"op": "note", "x": threading.Lock()})
            for i in range(5):
                stream.send({"op": "note", "x": to_serialize(numpy.full(3, i))})
            stream.send({"op": "note", "x": {"set": {1}, "complex": 1j, "big": 2**70}})
            stream.send({"op": "last"})
            await complete.wait()
            stream.send({"op": "close-stream"})
        assert stream.message_count == 2008
        with pytest.raises(CommClosedError):
            await comm.read()
    assert found[:2000] == list(range(2000))
    assert [x.tolist() for x in found[2000:2005]] == [[i] * 3 for i in range(5)]
    assert found[2005] == {"set": {1}, "complex": 1j, "big": 2**70}
    assert stream.batch_count > 1


async def test_the_batches_that_a_stock_reader_gets(stock: Any) -> None:
    """Tuples of messages, the first at once, and as many bytes as were counted."""
    batches: list[Any] = []
    complete = Bell()

    async def read(comm: Any) -> None:
        while not batches or batches[-1][-1] != "end":
            batches.append(await comm.read())
        complete.ring()

    async with stock.serve({"read": read}) as server, await connect(server.address) as comm:
        await comm.write({"op": "read", "reply": False})
        before = comm.bytes_written
        async with BatchedSend(comm, interval=10) as stream:
            stream.send(1, 2)
            await trio.testing.wait_all_tasks_blocked()
            stream.send(3)
            stream.send("end")
        await complete.wait()
        assert stream.byte_count == comm.bytes_written - before
    assert batches == [(1, 2), (3, "end")]


async def test_a_stock_server_that_ends_the_stream(stock: Any) -> None:
    """It does so for an unknown op.  The next send says so, and nothing of it is lost silently."""
    async with stock.serve(stream_handlers={}) as server, await connect(server.address) as comm:
        await comm.write({"op": "connection_stream", "reply": False})
        async with BatchedSend(comm) as stream:
            stream.send({"op": "nobody knows this"})
            with trio.fail_after(10):
                await trio.lowlevel.wait_readable(comm.socket_fileno())  # without reading it
            assert stream.closed()
            with pytest.raises(CommClosedError, match="nothing more can be sent"):
                stream.send({"op": "another"})
        assert stream.unsent == stream.maybe_sent == []
        assert stream.message_count == 1


async def test_a_stock_sender(stock: Any, ours: Any) -> None:
    """In order over many batches, plain and async handlers mixed; an item that fails costs no other."""
    found: list[Any] = []
    complete = trio.Event()

    def note(x: Any) -> None:
        found.append(x)

    async def note_later(x: Any) -> None:
        await trio.lowlevel.checkpoint()
        found.append(x)

    def fail() -> None:
        raise ValueError("this item only")

    async def send() -> int:
        comm = await stock_connect(server.address)
        await comm.write({"op": "connection_stream", "reply": False})
        batched = StockBatchedSend(interval="1ms")
        batched.start(comm)
        for i in range(2000):
            batched.send({"op": "note" if i % 3 else "note_later", "x": i})
            if i % 100 == 0:
                batched.send({"op": "fail"}, {"op": "nobody knows this"})
                await asyncio.sleep(0.001)
        batched.send({"op": "note", "x": stock_to_serialize(numpy.arange(3))}, {"op": "last"})
        await batched.close()
        return int(batched.batch_count)

    async with ours(stream_handlers={"note": note, "note_later": note_later, "fail": fail, "last": complete.set}) as server:
        batches = await stock.run(send)
        with trio.fail_after(10):
            await complete.wait()
    assert found[:2000] == list(range(2000))
    assert found[2000].tolist() == [0, 1, 2]
    assert batches > 1


async def test_both_ways_on_one_comm(stock: Any, ours: Any) -> None:
    """As scheduler and worker do: each reads the other's batches and sends its own."""

    async def pong(comm: Any) -> None:
        async with BatchedSend(comm, "1ms") as stream:
            while True:
                for message in await comm.read():
                    if message["op"] == "close-stream":
                        return
                    stream.send({"op": "pong", "x": message["x"]})

    async def talk() -> list[int]:
        comm = await stock_connect(server.address)
        await comm.write({"op": "pong", "reply": False})
        batched = StockBatchedSend(interval="1ms")
        batched.start(comm)
        found: list[int] = []
        for i in range(500):
            batched.send({"op": "ping", "x": i})
        while len(found) < 500:
            found += [message["x"] for message in await comm.read()]
        batched.send({"op": "close-stream"})
        await batched.close()
        return found

    async with ours({"pong": pong}) as server:
        assert await stock.run(talk) == list(range(500))
