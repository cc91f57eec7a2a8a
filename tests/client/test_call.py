"""One call: request out, answer in; by rpc and by send_recv."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_dcore import (
    Comm,
    CommClosedError,
    ConnectError,
    ConnectionPool,
    HandlerCancelled,
    LimitExceeded,
    Limits,
    LocalProtocolError,
    RemoteError,
    RemoteProtocolError,
    RPCClosed,
    Security,
    SerializationError,
    Serialized,
    UnsafePayload,
    connect,
    rpc,
    send_recv,
    to_serialize,
)
from trio_dcore.protocol import error_reply, error_value
from trio_dcore.protocol._envelope import CANCEL, END, ERROR, ITEM, KEY, PING, PONG, REPLY, WINDOW
from trio_dcore.testing import cancel_sweep


def echo(x: Any = None) -> Any:
    return x


class Opaque:
    """What no codec can send."""

    def __reduce__(self) -> Any:
        raise TypeError("not me")


class TestAnswers:
    @pytest.mark.parametrize("value", [None, 0, "text", b"bytes", (1, 2), {"a": 1}, 2**70, 1.5, {1, 2}, frozenset({1})])
    async def test_values(self, value: Any, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (_server, remote):
            assert await remote.echo(x=value) == value
            assert type(await remote.echo(x=value)) is type(value)

    async def test_lists_come_back_as_tuples_but_over_inproc(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (_server, remote):
            assert await remote.echo(x=[1, [2]]) == ([1, [2]] if where.startswith("inproc") else (1, (2,)))

    async def test_large_ones(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, remote):
            for size in (10_000, 100_000, 3_000_000):
                data = bytes(range(256)) * (size // 256)
                assert await remote.echo(x=data) == data
                assert await remote.echo(x=to_serialize(data)) == data
            assert server.statistics().connections == 1

    async def test_the_keywords_of_the_protocol(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (_server, remote):
            assert await remote.echo(x=1, reply=True) == 1
            assert await remote.echo(x=1, reply=False) is None
            assert await remote.echo(x=1, close=False) == 1
            assert await remote.echo(x=to_serialize((1, "a")), serializers=["msgpack"], deserializers=["msgpack"]) == (1, "a")

    async def test_arguments_of_other_names_that_look_like_ours(self, where: str, serving: Any) -> None:
        def take(id: int, deadline: int, stream: int, address: str, pool: str, timeout: float) -> tuple[Any, ...]:
            return id, deadline, stream, address, pool, timeout

        async with serving({"take": take}, where) as (_server, remote):
            assert await remote.take(id=1, deadline=2, stream=3, address="a", pool="p", timeout=4) == (1, 2, 3, "a", "p", 4)

    @pytest.mark.parametrize("name", ["op", "comm", KEY])
    async def test_arguments_that_have_a_meaning_of_their_own(self, name: str, serving: Any) -> None:
        async with serving({"echo": echo}) as (server, remote):
            for call in (remote.echo, remote.echo.stream):
                with pytest.raises(TypeError, match="can't be arguments of a call"):
                    call(**{name: 1})
            with pytest.raises(TypeError, match="can't be arguments of a call"):
                await remote.echo.notify(**{name: 1})
            assert server.statistics().connections == 0

    async def test_deserialize_false_leaves_payloads(self, serving: Any) -> None:
        options = {"deserialize": False}
        async with serving({"echo": echo}, "tcp://127.0.0.1:0", client=options) as (_server, remote):
            found = await remote.echo(x=to_serialize(5), serializers=["pickle"])
            assert found == 5  # the server has read it, and sent it bare
        async with serving({"give": lambda: to_serialize(5)}, "tcp://127.0.0.1:0", client=options) as (_server, remote):
            assert isinstance(await remote.give(), Serialized)


class TestWhatCanNotTravel:
    async def test_an_argument(self, serving: Any) -> None:
        async with serving({"echo": echo}, "tcp://127.0.0.1:0") as (server, remote):
            await remote.echo()
            for _ in range(2):
                with pytest.raises(SerializationError, match="^x: ") as caught:
                    await remote.echo(x=Opaque())
                assert not isinstance(caught.value, RemoteError)
                with pytest.raises(SerializationError):
                    await remote.echo.notify(x=Opaque())
                with pytest.raises(SerializationError):
                    async with remote.echo.stream(x=Opaque()):
                        raise AssertionError("not reached")
            assert await remote.echo(x=1) == 1
            assert server.statistics().connections == 1
            assert server.statistics().requests == {"echo": 2}
            assert remote.pool.active == 0

    async def test_a_pickle_to_a_stranger(self, serving: Any) -> None:
        async with serving({"echo": echo}, "tcp://127.0.0.1:0", client={"security": Security(pickle="never")}) as (
            server,
            remote,
        ):
            for _ in range(2):
                with pytest.raises(UnsafePayload):
                    await remote.echo(x=ValueError())
            assert await remote.echo(x=1) == 1
            assert server.statistics().connections == 1

    async def test_a_pickle_from_a_stranger(self, serving: Any) -> None:
        async with serving(
            {"give": ValueError, "echo": echo}, "tcp://127.0.0.1:0", client={"security": Security(pickle="never")}
        ) as (
            server,
            remote,
        ):
            for _ in range(2):
                with pytest.raises(UnsafePayload):
                    await remote.give()
            assert await remote.echo(x=1) == 1
            assert server.statistics().connections == 1
            async with await connect(server.address, security=Security(pickle="never")) as comm:
                with pytest.raises(UnsafePayload):
                    await send_recv(comm, op="give")
                assert await send_recv(comm, op="echo", x=1) == 1

    async def test_an_answer_that_is_too_large(self, serving: Any) -> None:
        limits = Limits(message=10_000, message_trusted=10_000, head=10_000, head_trusted=10_000)
        async with serving({"big": lambda: bytes(20_000), "echo": echo}, "tcp://127.0.0.1:0", client={"limits": limits}) as (
            _server,
            remote,
        ):
            with pytest.raises(LimitExceeded, match="message_trusted"):
                await remote.big()
            assert await remote.echo(x=1) == 1
            assert remote.pool.active == 0

    async def test_a_family_that_is_not_accepted(self, serving: Any) -> None:
        async with serving({"give": lambda: to_serialize(b"data" * 5), "echo": echo}, "tcp://127.0.0.1:0") as (server, remote):
            async with await connect(server.address) as comm:
                await comm.write({"op": "give", "serializers": ["pickle"]})
                assert await comm.read() == b"data" * 5
            assert await remote.give(deserializers=["dask"]) == b"data" * 5
            assert remote.pool.active == 0


class TestOddAnswers:
    """What a server of ours must not send, or only sometimes."""

    async def test_pings_are_answered(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            id = (await comm.read())[KEY]["id"]
            await comm.write((PING, id, None))
            assert tuple(await comm.read()) == (PONG, id, None)
            await comm.write((PONG, id, None))
            await comm.write((REPLY, id, "reply"))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            assert await remote.anything() == "reply"

    async def test_what_is_left_over_is_passed_by(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            id = (await comm.read())[KEY]["id"]
            await comm.write((REPLY, id, "first"))
            id = (await comm.read())[KEY]["id"]
            for kind in (REPLY, ERROR, ITEM, END, WINDOW, PING, PONG):
                await comm.write((kind, id - 1, None))
            await comm.write((REPLY, id, "second"))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            assert await remote.anything() == "first"
            assert await remote.anything() == "second"

    async def test_many_of_them_do_not_keep_the_caller_from_being_cancelled(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            id = (await comm.read())[KEY]["id"]
            for _ in range(1000):
                assert comm.write_soon((PONG, id, None))
            comm.write_soon((REPLY, id, "too late"))
            flooded.set()
            await comm.read()

        flooded = trio.Event()
        found = []
        async with scripted(where, script) as address, rpc(address) as remote:

            async def call() -> None:
                found.append(await remote.anything())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(call)
                await flooded.wait()
                await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert found == []
            assert remote.pool.open == 0

    @pytest.mark.parametrize(
        "answer",
        [
            (REPLY, 2, None),
            (ITEM, 1, None),
            (END, 1, None),
            (WINDOW, 1, (1, 1)),
            (CANCEL, 1, None),
            (99, 1, None),
            (REPLY, 1),
            "OK",
            None,
        ]
        + [{"status": "OK"}, {}, (REPLY, -1, None)],
    )
    async def test_what_is_no_answer(self, answer: Any, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            await comm.read()
            await comm.write(answer if number == 1 else (REPLY, 1, "reply"))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            with pytest.raises(RemoteProtocolError):
                await remote.anything()
            assert remote.pool.open == 0
            assert await remote.anything() == "reply"

    async def test_a_map_that_is_an_error(self, where: str, scripted: Any) -> None:
        """The server could not read the request, so it does not know its id; and it closes."""

        async def script(comm: Any, number: int) -> None:
            await comm.read()
            await comm.write(error_reply(ValueError("unreadable"), trusted=True, extension=True))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            with pytest.raises(ValueError, match="unreadable") as caught:
                await remote.anything()
            assert isinstance(caught.value, RemoteError)
            assert remote.pool.open == 0

    async def test_an_error_value_that_is_none(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            await comm.read()
            await comm.write((ERROR, 1, None))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            with pytest.raises((RemoteError, RemoteProtocolError)):
                await remote.anything()

    async def test_none_at_all(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            with pytest.raises(CommClosedError, match="calling 'anything'.*without an answer"):
                await remote.anything()
            assert remote.pool.open == 0


class TestStock:
    """Towards a server that speaks plain Dask messages."""

    async def test_a_call(self, stock_like: Any) -> None:
        seen: list[Any] = []

        async def script(peer: Any, number: int) -> None:
            while True:
                seen.append(await peer.receive())
                await peer.send("answer")

        async with stock_like(script) as address, rpc(address) as remote:
            with trio.fail_after(60):  # a deadline, of which a stock server must hear nothing
                assert await remote.add(x=1) == "answer"
            assert await remote.add(close=True) == "answer"
            await remote.add.notify(x=2)
            while len(seen) < 3:
                await trio.lowlevel.checkpoint()
        assert seen == [
            {"op": "add", "x": 1, "reply": True},
            {"op": "add", "close": True, "reply": True},
            {"op": "add", "x": 2, "reply": False},
        ]

    @pytest.mark.parametrize("answer", [None, "OK", {"status": "OK"}, {"status": "error"}, {"status": None}, (0, 1, 2), []])
    async def test_what_is_data(self, answer: Any, stock_like: Any) -> None:
        async def script(peer: Any, number: int) -> None:
            await peer.receive()
            await peer.send(answer)
            await peer.receive()

        async with stock_like(script) as address, rpc(address) as remote:
            assert await remote.anything() == (tuple(answer) if isinstance(answer, list) else answer)

    async def test_an_error(self, stock_like: Any) -> None:
        async def script(peer: Any, number: int) -> None:
            for _ in range(2):
                await peer.receive()
                await peer.send(error_reply(KeyError("k"), trusted=True, extension=False))
            await peer.receive()

        async with stock_like(script) as address, rpc(address) as remote:
            for _ in range(2):
                with pytest.raises(KeyError, match="k") as caught:
                    await remote.anything()
                assert isinstance(caught.value, RemoteError)
            assert remote.pool.open == 1
            async with await connect(address) as comm:
                with pytest.raises(KeyError):
                    await send_recv(comm, op="anything")
                with pytest.raises(KeyError):
                    await send_recv(comm, op="anything")

    @pytest.mark.parametrize("how", ["between", "inside", "reset"])
    async def test_the_end(self, how: str, stock_like: Any) -> None:
        async def script(peer: Any, number: int) -> None:
            await peer.receive()
            if how == "inside":
                await peer.send_bytes(peer.encode("answer")[:-1])
            elif how == "reset":
                peer.reset()

        async with stock_like(script) as address, rpc(address) as remote:
            with pytest.raises(CommClosedError, match=f"calling 'anything' at {address}"):
                await remote.anything()
            assert remote.pool.open == 0


class TestNotify:
    async def test_returns_before_the_handler_has_ended(self, where: str, serving: Any) -> None:
        go, done = trio.Event(), trio.Event()

        async def slow() -> None:
            await go.wait()
            done.set()

        async with serving({"slow": slow, "echo": echo}, where) as (server, remote):
            assert await remote.slow.notify() is None
            await remote.slow.notify()
            go.set()
            await done.wait()
            assert await remote.echo(x=1) == 1
            assert server.statistics().requests == {"slow": 2, "echo": 1}

    async def test_its_comm_is_used_last(self, where: str, serving: Any) -> None:
        go = trio.Event()

        async with serving({"slow": go.wait, "echo": echo}, where) as (server, remote):
            async with trio.open_nursery() as nursery:  # two comms
                nursery.start_soon(remote.echo)
                nursery.start_soon(remote.echo)
            assert server.statistics().connections == 2
            await remote.slow.notify()
            for i in range(3):
                assert await remote.echo(x=i) == i  # on the other one
            go.set()

    async def test_runs_on_when_the_client_goes(self, where: str, serving: Any) -> None:
        """D10."""
        started, go, done = trio.Event(), trio.Event(), trio.Event()

        async def slow() -> None:
            started.set()
            await go.wait()
            done.set()

        async with serving({"slow": slow}, where) as (_server, remote):
            await remote.slow.notify()
            remote.close_comms()
            await started.wait()
            await wait_all_tasks_blocked(0.01)
            go.set()
            await done.wait()

    async def test_has_no_deserializers(self, serving: Any) -> None:
        async with serving({"echo": echo}) as (_server, remote):
            with pytest.raises(TypeError, match="deserializers= has no meaning"):
                await remote.echo.notify(deserializers=["msgpack"])
            with pytest.raises(TypeError, match="deserializers= has no meaning"):
                await remote.echo(reply=False, deserializers=["msgpack"])

    async def test_nobody_there(self) -> None:
        async with rpc("inproc://nobody", timeout=0.05) as remote:
            with pytest.raises(ConnectError):
                await remote.echo.notify()

    async def test_cancelled_at_every_step(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (_server, remote):

            async def check() -> None:
                assert await remote.echo(x=1) == 1
                assert remote.pool.active == 0
                remote.pool.collect()

            assert await cancel_sweep(remote.echo.notify, check=check) > 2

    async def test_to_a_generator(self, where: str, serving: Any) -> None:
        """Its items come on a comm that nobody reads; the next call doesn't get to see them."""

        async def ticks() -> Any:
            yield 1
            yield 2

        async with serving({"ticks": ticks, "echo": echo}, where) as (_server, remote):
            await remote.ticks.notify()
            await wait_all_tasks_blocked(0.01)
            assert await remote.echo(x="mine") == "mine"

    @pytest.mark.parametrize("goodbye", [True, False])
    async def test_the_comm_breaks(self, goodbye: bool, serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from trio_dcore.comm import InprocComm

        async with serving({"echo": echo}) as (server, _remote), ConnectionPool(1) as pool:
            await pool(server.address).echo()

            def broken(self: Any, message: Any, serializers: Any = None) -> Any:
                if pool_closes:
                    pool.close_now()
                raise CommClosedError("gone")

            monkeypatch.setattr(InprocComm, "start", broken)
            pool_closes = goodbye
            with pytest.raises(RPCClosed if pool_closes else CommClosedError, match="'echo'"):
                await pool(server.address).echo.notify()

    async def test_any_other_error_costs_the_comm(self, serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from trio_dcore.comm import InprocComm

        def broken(self: Any, message: Any, serializers: Any = None) -> Any:
            raise ZeroDivisionError

        async with serving({"echo": echo}) as (_server, remote):
            await remote.echo()
            monkeypatch.setattr(InprocComm, "start", broken)
            for call in (remote.echo, remote.echo.notify, remote.echo.stream().__aenter__):
                with pytest.raises(ZeroDivisionError):
                    await call()
                assert remote.pool.open == 0


class TestCancelled:
    async def test_at_every_step(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (_server, remote):

            async def call() -> None:
                assert await remote.echo(x=5) == 5

            async def check() -> None:
                assert await remote.echo(x=6) == 6
                assert remote.pool.active == 0
                remote.pool.collect()

            assert await cancel_sweep(call, check=check) > 3
            assert await cancel_sweep(call, check=check, steps="own") > 1

    async def test_before_it_begins(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, remote):
            await remote.echo()
            with trio.CancelScope() as scope:
                scope.cancel()
                for call in (remote.echo, remote.echo.notify):
                    await call()
            assert scope.cancelled_caught
            assert server.statistics().requests == {"echo": 1}
            assert remote.pool.open == 1

    async def test_a_call_that_needs_no_wait_lets_others_run(self, serving: Any) -> None:
        others = 0

        async def other() -> None:
            nonlocal others
            while True:
                await trio.lowlevel.checkpoint()
                others += 1

        async with serving({"echo": echo}) as (_server, remote), trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(20):
                await remote.echo.notify()
            assert others > 0
            nursery.cancel_scope.cancel()

    async def test_a_deadline_that_passes(self, serving: Any, autojump_clock: Any) -> None:
        """J01."""
        ended: list[float] = []

        async def forever() -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.append(trio.current_time())

        async with serving({"forever": forever, "echo": echo}, patience=1000) as (_server, remote):
            start = trio.current_time()
            with trio.move_on_after(5) as scope:
                await remote.forever()
            assert scope.cancelled_caught
            assert trio.current_time() - start == pytest.approx(5)
            await wait_all_tasks_blocked()
            assert ended == [pytest.approx(start + 5)]
            assert await remote.echo(x=1) == 1

    async def test_one_that_the_server_notices_first(self, where: str, scripted: Any) -> None:
        """Then it is our own scope's all the same; and if it wasn't ours the caller is told."""

        async def script(comm: Any, number: int) -> None:
            while True:
                id = (await comm.read())[KEY]["id"]
                error = HandlerCancelled("over")
                error.reason = "deadline"
                if id == 1:
                    scope.cancel()
                await comm.write((ERROR, id, error_value(error, trusted=True)))

        async with scripted(where, script) as address, rpc(address) as remote:
            with trio.CancelScope() as scope:
                await remote.anything()
                raise AssertionError("not reached")
            assert scope.cancelled_caught
            with pytest.raises(HandlerCancelled) as caught:
                await remote.anything()
                await remote.anything()
            assert caught.value.reason == "deadline"


class TestSendRecv:
    async def test_a_call(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, _remote), await connect(server.address) as comm:
            assert await send_recv(comm, op="echo", x=1) == 1
            assert await send_recv(comm, op="echo", x=1, reply=False) is None
            assert await send_recv(comm, op="echo", x=to_serialize((1, "a")), serializers=["msgpack"]) == (1, "a")
            assert await send_recv(comm, op="echo", x=1, deserializers=["msgpack"]) == 1
            assert not comm.closed()
            assert await send_recv(comm, op="echo", x=2, close=True) == 2
            assert comm.closed()
            with pytest.raises(CommClosedError, match="calling 'echo'"):
                await send_recv(comm, op="echo")

    async def test_errors(self, where: str, serving: Any) -> None:
        def fail() -> None:
            raise ValueError("no luck")

        async with serving({"fail": fail, "echo": echo}, where) as (server, _remote), await connect(server.address) as comm:
            with pytest.raises(ValueError, match="no luck") as caught:
                await send_recv(comm, op="fail")
            assert isinstance(caught.value, RemoteError)
            assert await send_recv(comm, op="echo", x=1) == 1
            with pytest.raises(ValueError, match="no luck"):
                await send_recv(comm, op="fail", close=True)
            assert comm.closed()

    async def test_what_can_not_be_sent(self, serving: Any) -> None:
        async with serving({"echo": echo}, "tcp://127.0.0.1:0") as (server, _remote), await connect(server.address) as comm:
            with pytest.raises(SerializationError):
                await send_recv(comm, op="echo", x=Opaque())
            assert await send_recv(comm, op="echo", x=1) == 1

    async def test_the_server_closes(self, where: str, serving: Any) -> None:
        async def close(comm: Comm) -> None:
            comm.abort()

        async with serving({"close": close}, where) as (server, _remote), await connect(server.address) as comm:
            with pytest.raises(CommClosedError, match="calling 'close' at .*without an answer"):
                await send_recv(comm, op="close")
            assert comm.closed()

    async def test_cancelled_at_every_step(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (server, remote):

            async def call() -> None:
                async with await connect(server.address) as comm:
                    try:
                        assert await send_recv(comm, op="echo", x=5) == 5
                    except trio.Cancelled:
                        assert comm.closed()
                        raise

            async def check() -> None:
                assert await remote.echo(x=6) == 6
                remote.pool.collect()

            assert await cancel_sweep(call, check=check) > 3

    async def test_needs_a_comm_of_ours(self) -> None:
        with pytest.raises(LocalProtocolError, match=r"a comm from connect\(\)"):
            await send_recv(object(), op="echo")  # type: ignore[arg-type]


async def test_no_deadline_no_header(where: str, scripted: Any) -> None:
    headers: list[Any] = []

    async def script(comm: Any, number: int) -> None:
        for _ in range(3):
            header = (await comm.read())[KEY]
            headers.append(header)
            await comm.write((REPLY, header["id"], None))
        await comm.read()

    async with scripted(where, script) as address, rpc(address) as remote:
        await remote.anything()
        with trio.CancelScope(deadline=trio.current_time() + 50):
            await remote.anything()
        with trio.CancelScope(deadline=math.inf):
            await remote.anything()
    assert headers[0] == {"id": 1}
    assert headers[1]["id"] == 2
    assert 0 < headers[1]["deadline"] <= 50
    assert headers[2] == {"id": 3}
