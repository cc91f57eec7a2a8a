"""Stock ``rpc`` and ``ConnectionPool`` as clients of our Server: calls and errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy
import pytest
import trio
from distributed.comm import CommClosedError as StockCommClosedError
from distributed.comm import connect as stock_connect
from distributed.core import ConnectionPool as StockConnectionPool
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
