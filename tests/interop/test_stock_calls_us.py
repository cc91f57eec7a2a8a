"""Stock ``rpc``, ``ConnectionPool`` and ``connect`` as clients of our Server."""

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
from distributed.protocol import Serialized, to_serialize

from trio_dcore import Comm, Security


class OddError(Exception):
    """An exception of the application, with data of its own."""

    def __init__(self, code: int, where: str) -> None:
        super().__init__(code, where)
        self.code = code


def add(x: int, y: int = 10) -> int:
    return x + y


async def add_later(x: int, y: int) -> int:
    await trio.lowlevel.checkpoint()
    return x + y


class Meeting:
    """A handler that returns to nobody before everybody has called it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.present = 0
        self.complete = trio.Event()

    async def meet(self, i: int) -> int:
        self.present += 1
        if self.present == self.size:
            self.complete.set()
        await self.complete.wait()
        return i


async def read_all(comm: Any) -> list[Any]:
    """All messages up to the end of a stock comm."""
    found = []
    with contextlib.suppress(StockCommClosedError):
        while True:
            found.append(await comm.read())
    return found


# -- calls -----------------------------------------------------------------------------------------------------------------------


async def test_calls(stock: Any, ours: Any, kind: str) -> None:
    async def several(remote: Any) -> list[Any]:
        return [
            await remote.add(x=1, y=2),
            await remote.add(x=1),
            await remote.add_later(x=3, y=4),
            await remote.nothing(),
            await remote.echo(data=(1, "x")),
        ]

    async with ours({"add": add, "add_later": add_later, "nothing": lambda: None}) as server:
        assert await stock.call(kind, server.address, several) == [3, 11, 7, None, (1, "x")]


async def test_identity(stock: Any, ours: Any, kind: str) -> None:
    async with ours() as server:
        identity = await stock.call(kind, server.address, lambda remote: remote.identity())
    assert identity["type"] == "Server"
    assert isinstance(identity["id"], str)


async def test_a_hundred_overlapping_calls(stock: Any, ours: Any, kind: str) -> None:
    meeting = Meeting(100)

    async def all_at_once(remote: Any) -> Any:
        return await asyncio.gather(*[remote.meet(i=i) for i in range(100)])

    async with ours({"meet": meeting.meet}) as server:
        assert await stock.call(kind, server.address, all_at_once) == list(range(100))
    assert meeting.present == 100


async def test_a_pool_reuses_its_connection(stock: Any, ours: Any) -> None:
    peers = []

    def who(comm: Comm) -> None:
        peers.append(comm.peer_address)

    async def thrice() -> int:
        pool = await StockConnectionPool()
        try:
            for _ in range(3):
                await pool(server.address).who()
            return int(pool.open)
        finally:
            await pool.close()

    async with ours({"who": who}) as server:
        assert await stock.run(thrice) == 1
    assert len(peers) == 3
    assert len(set(peers)) == 1


async def test_one_way_calls(stock: Any, ours: Any, kind: str) -> None:
    """``reply=False``: nothing comes back, the handler runs on, and the connection serves the next call."""
    done = trio.Event()
    go_on = trio.Event()

    async def note(line: str) -> str:
        await go_on.wait()
        assert line == "x"
        done.set()
        return "nobody reads this"

    async def calls(remote: Any) -> Any:
        assert await remote.note(line="x", reply=False) is None

    async with ours({"note": note}) as server:
        await stock.call(kind, server.address, calls)  # the caller has gone when this returns
        go_on.set()
        await done.wait()


async def test_one_way_then_a_call_on_the_same_connection(stock: Any, ours: Any) -> None:
    lines = []

    def note(line: str) -> str:
        lines.append(line)
        return "nobody reads this"

    async def both() -> Any:
        comm = await stock_connect(server.address)
        assert await stock_send_recv(comm, op="note", line="x", reply=False) is None
        answer = await stock_send_recv(comm, op="add", x=1, y=2)
        await comm.close()
        return answer

    async with ours({"note": note, "add": add}) as server:
        assert await stock.run(both) == 3
    assert lines == ["x"]


async def test_close_after_the_call(stock: Any, ours: Any, kind: str) -> None:
    """``close=True``: the answer comes, the connection ends, the next call has a new one."""
    peers = []

    def who(comm: Comm) -> int:
        peers.append(comm.peer_address)
        return len(peers)

    async def twice(remote: Any) -> list[Any]:
        return [await remote.who(close=True), await remote.who(close=True)]

    async with ours({"who": who}) as server:
        assert await stock.call(kind, server.address, twice) == [1, 2]
    assert len(set(peers)) == 2


async def test_the_server_ends_a_connection_that_is_to_be_closed(stock: Any, ours: Any) -> None:
    async def ask() -> list[Any]:
        comm = await stock_connect(server.address)
        await comm.write({"op": "add", "x": 1, "y": 2, "reply": True, "close": True})
        found = await read_all(comm)
        await comm.close()
        return found

    async with ours({"add": add}) as server:
        assert await stock.run(ask) == [3]


async def test_the_op_close(stock: Any, ours: Any) -> None:
    async def ask() -> list[Any]:
        comm = await stock_connect(server.address)
        await comm.write({"op": "close", "reply": True})
        found = await read_all(comm)
        await comm.close()
        return found

    async with ours() as server:
        assert await stock.run(ask) == ["OK"]


async def test_serializers_named_by_the_client(stock: Any, ours: Any) -> None:
    """The client's families govern what is serialized for it; a handler that has the parameter is told of them."""
    seen = []

    def pack(x: Any, serializers: Any = None) -> Any:
        seen.append((x, serializers))
        return x

    async with ours({"pack": pack}) as server:
        back = await stock.call(
            "rpc", server.address, lambda remote: remote.pack(x=to_serialize({"a": (1, 2)})), serializers=["msgpack"]
        )
    assert back == {"a": (1, 2)}
    assert seen == [({"a": (1, 2)}, ("msgpack",))]


async def test_a_client_that_does_not_deserialize(stock: Any, ours: Any) -> None:
    async def ask(remote: Any) -> Any:
        return await remote.make(), await remote.add(x=1, y=2)

    async with ours({"make": lambda: numpy.arange(4), "add": add}) as server:
        made, added = await stock.call("rpc", server.address, ask, deserialize=False)
    assert isinstance(made, Serialized)
    assert made.header["type"] == "numpy.ndarray"
    assert b"".join(bytes(frame) for frame in made.frames) == numpy.arange(4).tobytes()
    assert added == 3


# -- errors ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no", 3),
        KeyError("k"),
        ZeroDivisionError("division by zero"),
        FileNotFoundError(2, "no such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        OddError(7, "here"),
        RuntimeError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_exception_arrives_with_its_class(stock: Any, ours: Any, kind: str, error: Exception) -> None:
    def fail() -> None:
        raise error

    async def failing_then_fine(remote: Any) -> Any:
        with pytest.raises(type(error)) as caught:
            await remote.fail()
        return caught.value, await remote.add(x=1, y=2)

    async with ours({"fail": fail, "add": add}) as server:
        raised, after = await stock.call(kind, server.address, failing_then_fine)
    assert type(raised) is type(error)
    assert raised.args == error.args
    assert str(raised) == str(error)
    assert getattr(raised, "code", None) == getattr(error, "code", None)
    assert after == 3


async def test_a_group_of_exceptions_arrives_with_its_members(stock: Any, ours: Any) -> None:
    async def fail() -> None:
        raise ExceptionGroup("two", [ValueError("a"), OddError(1, "b")])

    async def failing(remote: Any) -> ExceptionGroup[Exception]:
        with pytest.raises(ExceptionGroup) as caught:
            await remote.fail()
        return caught.value

    async with ours({"fail": fail}) as server:
        group = await stock.call("rpc", server.address, failing)
    assert [(type(error), error.args) for error in group.exceptions] == [(ValueError, ("a",)), (OddError, (1, "b"))]


async def test_an_exception_to_a_client_that_does_not_deserialize(stock: Any, ours: Any) -> None:
    def fail() -> None:
        raise ValueError("no")

    async def failing(remote: Any) -> str:
        with pytest.raises(Exception, match="no") as caught:
            await remote.fail()
        return str(caught.value)

    async with ours({"fail": fail}) as server:
        assert await stock.call("rpc", server.address, failing, deserialize=False) == "ValueError('no')"


@pytest.mark.parametrize(
    ("op", "arguments", "error", "text"),
    [
        ("ad", {"x": 1}, AttributeError, "'add'"),
        ("add", {}, TypeError, "x"),
        ("add", {"x": 1, "z": 2}, TypeError, "z"),
        ("blocked", {}, ValueError, "blocked"),
        ("refused", {}, ValueError, "refused"),
        ("generator", {}, TypeError, "generator"),
        ("streams", {}, TypeError, "streams"),
    ],
)
async def test_refusals_are_builtin_exceptions(
    stock: Any, ours: Any, kind: str, op: str, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    """A stock client has none of our classes; it gets the builtin that says it best, and the connection serves the next call."""

    async def streams() -> AsyncIterator[int]:
        yield 1

    handlers = {
        "add": add,
        "blocked": add,
        "refused": add,
        "generator": lambda: (i for i in range(3)),  # a result that can't be sent
        "streams": streams,
    }

    async def refused_then_fine(remote: Any) -> Any:
        with pytest.raises(error, match=text) as caught:
            await getattr(remote, op)(**arguments)
        return type(caught.value), await remote.add(x=1, y=2)

    options = {"blocked_handlers": ["blocked"], "authorize": lambda peer, op: op != "refused"}
    async with ours(handlers, **options) as server:
        assert await stock.call(kind, server.address, refused_then_fine) == (error, 3)


async def test_a_pickle_that_is_not_allowed(stock: Any, ours: Any) -> None:
    """Nothing of it is run; the client learns why, and the connection serves the next call."""
    ran = []

    async def refused_then_fine(remote: Any) -> Any:
        with pytest.raises(ValueError, match="pickle"):
            await remote.add(x=OddError(1, "x"), y=2)
        return await remote.add(x=1, y=2)

    def count(x: Any, y: Any) -> Any:
        ran.append(x)
        return x + y

    async with ours({"add": count}, security=Security(pickle="never")) as server:
        assert await stock.call("pool", server.address, refused_then_fine) == 3
    assert ran == [1]


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
