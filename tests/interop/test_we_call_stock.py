"""Our ``rpc``, ``ConnectionPool``, ``.stream()`` and ``connect`` as clients of a stock Server."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import struct
from typing import Any

import numpy
import pytest
import trio
from distributed.core import Status as StockStatus
from distributed.core import error_message
from distributed.protocol import Serialize as StockSerialize

from trio_dcore import CommClosedError, ConnectionPool, RemoteError, Serialized, connect, send_recv, to_serialize
from trio_dcore.protocol import exception_from_reply


class OddError(Exception):
    """An exception of the application, with data of its own."""

    def __init__(self, code: int, where: str) -> None:
        super().__init__(code, where)
        self.code = code


def add(x: int, y: int = 10) -> int:
    return x + y


async def add_later(x: int, y: int) -> int:
    await asyncio.sleep(0)
    return x + y


class Bell:
    """Lets stock code, in its own thread and loop, tell a trio task that something has happened."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._event = trio.Event()

    def ring(self) -> None:
        self._token.run_sync_soon(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()


async def take_all(stream: Any) -> list[Any]:
    return [item async for item in stream]


async def collect(request: Any, found: list[Any], after: Any = None) -> None:
    """Read a stream into ``found``, which also keeps what came before a failure."""
    async with request as stream:
        async for item in stream:
            found.append(item)
            if after is not None:
                await after()


# -- calls -----------------------------------------------------------------------------------------------------------------------


async def test_calls(stock: Any, connected: Any, kind: str) -> None:
    handlers = {"add": add, "add_later": add_later, "nothing": lambda: None}
    async with stock.serve(handlers) as server, connected(kind, server.address) as remote:
        assert await remote.add(x=1, y=2) == 3
        assert await remote.add(x=1) == 11
        assert await remote.add_later(x=3, y=4) == 7
        assert await remote.nothing() is None
        assert await remote.echo(data=[1, "x"]) == (1, "x")
        assert await remote["add"](x=2, y=2) == 4


async def test_identity(stock: Any, connected: Any, kind: str) -> None:
    async with stock.serve() as server, connected(kind, server.address) as remote:
        assert await remote.identity() == {"type": "Server", "id": server.id}


async def test_a_hundred_overlapping_calls(stock: Any, connected: Any, kind: str) -> None:
    present = 0
    complete = asyncio.Event()

    async def meet(i: int) -> int:
        nonlocal present
        present += 1
        if present == 100:
            complete.set()
        await complete.wait()
        return i

    results: dict[int, Any] = {}

    async def one(i: int) -> None:
        results[i] = await remote.meet(i=i)

    async with stock.serve({"meet": meet}) as server, connected(kind, server.address) as remote:
        async with trio.open_nursery() as nursery:
            for i in range(100):
                nursery.start_soon(one, i)
        assert server.incoming_comms_open == 100
    assert results == {i: i for i in range(100)}


async def test_calls_one_after_the_other_share_a_connection(stock: Any, connected: Any, kind: str) -> None:
    async with stock.serve({"add": add}) as server, connected(kind, server.address) as remote:
        for i in range(5):
            assert await remote.add(x=i) == i + 10
        assert server.incoming_comms_open == 1


async def test_a_full_pool_hands_its_connection_on(stock: Any) -> None:
    results: list[int] = []

    async def one(i: int) -> None:
        results.append(await pool(server.address).add_later(x=i, y=0))

    async with stock.serve({"add_later": add_later}) as server, ConnectionPool(limit=2) as pool:
        async with trio.open_nursery() as nursery:
            for i in range(20):
                nursery.start_soon(one, i)
        assert server.incoming_comms_open <= 2
    assert sorted(results) == list(range(20))


async def test_one_way_calls(stock: Any, connected: Any, kind: str) -> None:
    rung = Bell()
    lines: list[str] = []

    def note(line: str) -> str:
        lines.append(line)
        rung.ring()
        return "nobody reads this"

    async with stock.serve({"note": note, "add": add}) as server, connected(kind, server.address) as remote:
        assert await remote.note.notify(line="x") is None
        assert await remote.add(x=1, y=2) == 3
        await rung.wait()
    assert lines == ["x"]


async def test_close_after_the_call(stock: Any, connected: Any, kind: str) -> None:
    peers: list[str] = []

    def who(comm: Any) -> int:
        peers.append(comm.peer_address)
        return len(peers)

    async with stock.serve({"who": who}) as server, connected(kind, server.address) as remote:
        assert await remote.who(close=True) == 1
        assert await remote.who(close=True) == 2
    assert len(set(peers)) == 2


async def test_serializers_named_by_the_caller(stock: Any, connected: Any) -> None:
    seen = []

    def pack(x: Any, serializers: Any = None) -> Any:
        seen.append((x, serializers))
        return StockSerialize(x)

    async with stock.serve({"pack": pack}) as server, connected("rpc", server.address, serializers=["msgpack"]) as remote:
        back = await remote.pack(x=to_serialize({"a": (1, 2)}))
    assert back == {"a": (1, 2)}
    assert seen == [({"a": (1, 2)}, ("msgpack",))]


async def test_a_client_that_does_not_deserialize(stock: Any, connected: Any) -> None:
    handlers = {"make": lambda: StockSerialize(b"x" * 10), "add": add}
    async with stock.serve(handlers) as server, connected("rpc", server.address, deserialize=False) as remote:
        made = await remote.make()
        assert await remote.add(x=1, y=2) == 3
    assert isinstance(made, Serialized)
    assert [bytes(frame) for frame in made.frames] == [b"x" * 10]


async def test_a_connection_that_ended_while_idle_is_replaced(stock: Any, connected: Any, kind: str) -> None:
    async def drop() -> None:
        for comm in list(server._comms):
            comm.abort()

    async with stock.serve({"add": add}) as server, connected(kind, server.address) as remote:
        assert await remote.add(x=1) == 11
        await stock.run(drop)
        assert await remote.add(x=2) == 12


# -- errors ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no", 3),
        KeyError("k"),
        ZeroDivisionError("division by zero"),
        FileNotFoundError(2, "no such file", "name"),
        OddError(7, "here"),
        RuntimeError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_exception_arrives_with_its_class(stock: Any, connected: Any, kind: str, error: Exception) -> None:
    def fail() -> None:
        raise error

    async with stock.serve({"fail": fail, "add": add}) as server, connected(kind, server.address) as remote:
        with pytest.raises(type(error)) as caught:
            await remote.fail()
        assert await remote.add(x=1, y=2) == 3
        assert server.incoming_comms_open == 1  # stock's own rpc loses a connection to every failing call
    raised = caught.value
    assert isinstance(raised, RemoteError)
    assert raised.args == error.args
    assert str(raised) == str(error)
    assert getattr(raised, "code", None) == getattr(error, "code", None)
    assert raised.type_name.rpartition(".")[2] == type(error).__name__
    assert "in fail" in raised.remote_traceback
    assert type(raised.original) is type(error)


@pytest.mark.parametrize("error", [SystemExit(7), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration(1)], ids=repr)
async def test_an_error_reply_never_ends_the_caller(stock: Any, connected: Any, error: BaseException) -> None:
    """Stock clients raise whatever class the reply names."""

    def answer() -> Any:
        return {**error_message(error), "status": "uncaught-error"}

    async with stock.serve({"answer": answer, "add": add}) as server, connected("rpc", server.address) as remote:
        with pytest.raises(RemoteError) as caught:
            await remote.answer()
        assert not isinstance(caught.value, type(error))
        assert caught.value.type_name.rpartition(".")[2] == type(error).__name__
        assert await remote.add(x=1, y=2) == 3


async def test_a_group_of_exceptions_arrives_with_its_members(stock: Any, connected: Any) -> None:
    async def fail() -> None:
        raise ExceptionGroup("two", [ValueError("a"), OddError(1, "b")])

    async with stock.serve({"fail": fail}) as server, connected("rpc", server.address) as remote:
        with pytest.raises(ExceptionGroup) as caught:
            await remote.fail()
    assert isinstance(caught.value, RemoteError)
    first, second = caught.value.exceptions
    assert isinstance(first, ValueError)
    assert first.args == ("a",)
    assert isinstance(second, OddError)
    assert second.args == (1, "b")


async def test_wrong_arguments(stock: Any, connected: Any, kind: str) -> None:
    async with stock.serve({"add": add}) as server, connected(kind, server.address) as remote:
        with pytest.raises(TypeError, match="z"):
            await remote.add(x=1, z=2)
        with pytest.raises(TypeError, match="x"):
            await remote.add()
        assert await remote.add(x=1, y=2) == 3


async def test_a_blocked_op(stock: Any, connected: Any, kind: str) -> None:
    async with stock.serve({"add": add}, blocked_handlers=["add"]) as server, connected(kind, server.address) as remote:
        with pytest.raises(ValueError, match="disallowed") as caught:
            await remote.add(x=1)
    assert isinstance(caught.value, RemoteError)


async def test_an_unknown_op_is_none(stock: Any, connected: Any, kind: str) -> None:
    """A stock server answers None, which can't be told from a result."""
    async with stock.serve({"add": add}) as server, connected(kind, server.address) as remote:
        assert await remote.no_such_op(x=1) is None
        assert await remote.add(x=1, y=2) == 3


async def test_a_result_that_can_not_be_sent_closes_the_connection(stock: Any, connected: Any, kind: str) -> None:
    """Stock aborts the connection; the call says which op it was, and the next has a new connection."""
    async with (
        stock.serve({"bad": lambda: (i for i in range(3)), "add": add}) as server,
        connected(kind, server.address) as remote,
    ):
        with pytest.raises(CommClosedError, match="bad"):
            await remote.bad()
        assert await remote.add(x=1, y=2) == 3


async def test_a_data_dict_with_status_error_is_data(stock: Any, connected: Any) -> None:
    answer = {"status": "error", "exception": "not raised", "keys": ("a",)}
    async with stock.serve({"answer": lambda: answer}) as server, connected("rpc", server.address) as remote:
        assert await remote.answer() == answer


async def test_an_error_that_stock_returns_can_be_made_an_exception(stock: Any, connected: Any) -> None:
    """As Dask's ``run`` answers: a message that is data, for which Dask's users have ``clean_exception``."""

    def run() -> Any:
        try:
            raise OddError(5, "there")
        except OddError as error:
            return error_message(error)

    async with stock.serve({"run": run}) as server, connected("rpc", server.address) as remote:
        answer = await remote.run()
    assert answer["status"] == "error"
    found = exception_from_reply(answer, allow_pickle=lambda: True)
    assert isinstance(found, OddError)
    assert isinstance(found, RemoteError)
    assert found.code == 5
    assert "in run" in found.remote_traceback
    found = exception_from_reply(answer, allow_pickle=lambda: False)
    assert not isinstance(found, OddError)
    assert "OddError(5, 'there')" in str(found)


# -- streams ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "result", "expected"),
    [
        ([1, 2, 3], None, [1, 2, 3]),
        ([], None, []),
        ([1, None, 2], None, [1, None, 2]),
        ([None, None], None, [None, None]),
        ([1], StockStatus.dont_reply, [1]),
        ([{"status": "OK"}, "OK", ("x", b"y")], None, [{"status": "OK"}, "OK", ("x", b"y")]),
    ],
    ids=repr,
)
async def test_a_stream_that_ends(
    stock: Any, connected: Any, kind: str, items: list[Any], result: Any, expected: list[Any]
) -> None:
    """The handler's items and not the None that it returned, also where items are None."""

    async def write(comm: Any) -> Any:
        for item in items:
            await comm.write(item)
        return result

    async with stock.serve({"write": write, "add": add}) as server, connected(kind, server.address) as remote:
        async with remote.write.stream() as stream:
            assert await take_all(stream) == expected
        assert await remote.add(x=1, y=2) == 3


async def test_a_stream_takes_arguments_and_carries_arrays(stock: Any, connected: Any) -> None:
    async def arrays(comm: Any, n: int) -> None:
        for i in range(n):
            await comm.write({"i": i, "data": StockSerialize(numpy.full(10**5, i))})

    found: list[Any] = []
    async with stock.serve({"arrays": arrays}) as server, connected("rpc", server.address) as remote:
        await collect(remote.arrays.stream(n=4), found)
    assert [(item["i"], item["data"].sum()) for item in found] == [(i, i * 10**5) for i in range(4)]


async def test_a_stream_that_fails(stock: Any, connected: Any, kind: str) -> None:
    """The items before the failure, and then the failure: not a stream that merely looks short."""

    async def write(comm: Any) -> None:
        await comm.write(1)
        await comm.write(2)
        raise ValueError("no more")

    found: list[Any] = []
    async with stock.serve({"write": write, "add": add}) as server, connected(kind, server.address) as remote:
        with pytest.raises(ValueError, match="no more") as caught:
            await collect(remote.write.stream(), found)
        assert await remote.add(x=1, y=2) == 3
    assert found == [1, 2]
    assert isinstance(caught.value, RemoteError)


async def test_a_stream_that_fails_at_once(stock: Any, connected: Any) -> None:
    async def write(comm: Any, n: int) -> None:
        raise AssertionError("never called")

    async with stock.serve({"write": write}) as server, connected("rpc", server.address) as remote:
        with pytest.raises(TypeError, match="n"):
            await collect(remote.write.stream(m=1), [])


async def test_a_stream_cut_by_a_reset(stock: Any, connected: Any, kind: str) -> None:
    """A connection that breaks is no end of a stream."""
    go_on = asyncio.Event()

    async def write(comm: Any) -> None:
        await comm.write(1)
        await go_on.wait()
        raw = comm.stream.socket
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        comm.abort()

    async def release() -> None:
        go_on.set()

    found: list[Any] = []
    async with stock.serve({"write": write}) as server, connected(kind, server.address) as remote:
        with pytest.raises(CommClosedError):
            await collect(remote.write.stream(), found, lambda: stock.run(release))
    assert found == [1]


async def test_leaving_a_stream_early_closes_its_connection(stock: Any, connected: Any, kind: str) -> None:
    """The stock handler learns of it at a write; what it wrote in between reaches no later call."""
    ended = Bell()

    async def ticks(comm: Any) -> None:
        try:
            for i in itertools.count():
                await comm.write(i)
                await asyncio.sleep(0)
        finally:
            ended.ring()

    async with stock.serve({"ticks": ticks, "add": add}) as server, connected(kind, server.address) as remote:
        async with remote.ticks.stream() as stream:
            found = []
            async for item in stream:
                found.append(item)
                if item == 2:
                    break
        assert found == [0, 1, 2]
        assert await remote.add(x=1, y=2) == 3
        await ended.wait()


# -- bare comms ------------------------------------------------------------------------------------------------------------------


async def test_a_bare_comm(stock: Any) -> None:
    """Raw writes and reads, and then ``send_recv``, over one connection."""

    async def totals(comm: Any, start: int) -> str:
        total = start
        while (number := await comm.read()) is not None:
            total += number
            await comm.write([total])
        return f"total {total}"

    async with stock.serve({"totals": totals, "add": add}) as server, await connect(server.address) as comm:
        assert await comm.write({"op": "totals", "start": 100}) > 0
        for number, total in ((1, 101), (2, 103)):
            await comm.write(number)
            assert await comm.read() == (total,)
        await comm.send(None)
        assert await comm.receive() == "total 103"
        assert await send_recv(comm, op="add", x=1, y=2) == 3


async def test_pipelined_requests(stock: Any) -> None:
    async with stock.serve({"add": add, "add_later": add_later}) as server, await connect(server.address) as comm:
        for i in range(20):
            await comm.write({"op": "add_later" if i % 3 else "add", "x": i, "y": 1, "reply": True})
        assert [await comm.read() for _ in range(20)] == [i + 1 for i in range(20)]


async def test_the_end_of_a_bare_comm(stock: Any) -> None:
    async with stock.serve({"add": add}) as server:
        async with await connect(server.address) as comm:
            await comm.write({"op": "add", "x": 1, "close": True})
            assert await comm.read() == 11
            with pytest.raises(CommClosedError):
                await comm.read()
        async with await connect(server.address) as comm:
            await comm.write({"op": "add", "x": 1, "close": True})
            assert [message async for message in comm] == [11]


async def test_a_batched_stream(stock: Any) -> None:
    """A list of messages, as BatchedSend makes them, into stock stream handlers."""
    found: list[Any] = []
    complete = Bell()

    def note(x: Any) -> None:
        found.append(x)

    handlers = {"note": note, "last": complete.ring}
    async with stock.serve(stream_handlers=handlers) as server, await connect(server.address) as comm:
        await comm.write({"op": "connection_stream", "reply": False})
        await comm.write([{"op": "note", "x": 1}, {"op": "note", "x": [2]}])
        await comm.write([{"op": "last"}, {"op": "close-stream"}])
        await complete.wait()
        with pytest.raises(CommClosedError):
            await comm.read()
    assert found == [1, (2,)]


# -- endings ---------------------------------------------------------------------------------------------------------------------


async def test_a_cancelled_call_leaves_no_poisoned_connection(stock: Any, connected: Any, kind: str) -> None:
    """Its connection is closed, since the answer may still come; the next call has one of its own."""
    started = Bell()
    go_on = asyncio.Event()

    async def wait() -> str:
        started.ring()
        await go_on.wait()
        return "late"

    async def release() -> None:
        go_on.set()

    async with stock.serve({"wait": wait, "add": add}) as server, connected(kind, server.address) as remote:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(remote.wait)
            await started.wait()
            nursery.cancel_scope.cancel()
        for _ in range(3):
            assert await remote.add(x=1, y=2) == 3
        await stock.run(release)
        assert await remote.add(x=2, y=2) == 4


async def test_a_server_that_goes_in_the_middle_of_a_call(stock: Any, connected: Any, kind: str) -> None:
    started = Bell()

    async def wait() -> None:
        started.ring()
        await asyncio.Event().wait()

    errors: list[CommClosedError] = []

    async def call() -> None:
        with pytest.raises(CommClosedError, match="wait") as caught:
            await remote.wait()
        errors.append(caught.value)

    async with (
        stock.serve({"wait": wait}) as server,
        connected(kind, server.address) as remote,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(call)
        await started.wait()
        await stock.run(server.close)
    assert len(errors) == 1


async def test_quiet(stock: Any, connected: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Calls, a stream and a cancelled call log nothing above INFO on our side."""
    started = Bell()

    async def wait() -> None:
        started.ring()
        await asyncio.Event().wait()

    async def write(comm: Any) -> None:
        await comm.write(1)

    with caplog.at_level(logging.INFO, logger="trio_dcore"):
        async with stock.serve({"wait": wait, "write": write, "add": add}) as server, connected(kind, server.address) as remote:
            assert await remote.add(x=1, y=2) == 3
            async with remote.write.stream() as stream:
                assert await take_all(stream) == [1]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(remote.wait)
                await started.wait()
                nursery.cancel_scope.cancel()
    assert [record for record in caplog.records if record.name.startswith("trio_dcore") and record.levelno > logging.INFO] == []
