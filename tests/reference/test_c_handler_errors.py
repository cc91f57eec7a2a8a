"""Group C: handlers that fail, in all the ways that handlers do."""

from __future__ import annotations

import pickle
import threading
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from distributed.core import error_message
from distributed.protocol.core import dumps as stock_dumps

from tests.reference.kit import Journal, Outcome, Wire, reference
from trio_dcore import (
    Comm,
    CommClosedError,
    HandlerCancelled,
    RemoteError,
    SerializationError,
    Server,
    Status,
    UnknownOp,
    rpc,
)
from trio_dcore.protocol import exception_from_reply
from trio_dcore.protocol._envelope import ERROR, KEY
from trio_dcore.testing import ManualPeer


def add(x: int, y: int) -> int:
    return x + y


def no() -> bool:
    return False


@reference("C01", "m i t u l")
async def test_c01_a_handler_raises(wire: Wire) -> None:
    async def fail_later() -> None:
        await wire.sleep(0)
        raise ValueError("nope")

    def fail() -> None:
        raise ValueError("nope")

    async with (
        wire.server({"fail": fail, "fail_later": fail_later}) as (server, address),
        wire.client(address) as remote,
    ):
        comm = await wire.comm_of(remote, server)
        for op in ("fail", "fail_later"):
            with pytest.raises(RemoteError) as caught:
                await remote[op]()
            error = caught.value
            assert isinstance(error, ValueError)
            assert (error.type_name, str(error), error.args) == ("builtins.ValueError", "nope", ("nope",))
            # Where it was raised over there, and that is shown with it.
            assert f"in {op}" in error.remote_traceback
            assert 'raise ValueError("nope")' in error.remote_traceback
            assert f"in {op}" in str(error.__cause__)
            assert await wire.comm_of(remote, server) == comm


@reference("C01", "m t u l")
async def test_c01_a_stock_peer_gets_dasks_reply(wire: Wire) -> None:
    def fail() -> None:
        raise ValueError("nope")

    async with wire.server({"fail": fail, "add": add}) as (_, address), await wire.manual(address) as peer:
        await peer.handshake()
        await peer.send({"op": "fail", "reply": True})
        reply = await peer.receive()
        assert reply["status"] == "uncaught-error"
        error = pickle.loads(reply["exception"])
        assert (type(error), error.args) == (ValueError, ("nope",))
        assert "in fail" in reply["traceback_text"]
        await peer.send({"op": "add", "x": 1, "y": 2, "reply": True})
        assert await peer.receive() == 3


@reference("C02", "m i t u l")
async def test_c02_no_such_op(wire: Wire) -> None:
    async with wire.server({"add": add}) as (server, address), wire.client(address) as remote:
        comm = await wire.comm_of(remote, server)
        with pytest.raises(UnknownOp, match="unknown op 'ad'; did you mean 'add'"):
            await remote.ad(x=1, y=2)
        assert await wire.comm_of(remote, server) == comm


@reference("C02", "m t u l")
async def test_c02_no_such_op_for_a_stock_peer(wire: Wire) -> None:
    async with wire.server({"add": add}) as (_, address), await wire.manual(address) as peer:
        await peer.handshake()
        await peer.send({"op": "ad", "x": 1, "y": 2, "reply": True})
        error = pickle.loads((await peer.receive())["exception"])
        assert type(error) is AttributeError  # and not None, which could be a result
        await peer.send({"op": "add", "x": 1, "y": 2, "reply": True})
        assert await peer.receive() == 3


@reference("C03", "m i t u l")
async def test_c03_wrong_arguments(wire: Wire) -> None:
    async with wire.server({"add": add}) as (server, address), wire.client(address) as remote:
        comm = await wire.comm_of(remote, server)
        for arguments, what in (
            ({"x": 1}, "missing 1 required positional argument: 'y'"),
            ({"x": 1, "y": 2, "z": 3}, "unexpected keyword argument 'z'"),
            ({}, "missing 2 required positional arguments"),
        ):
            with pytest.raises(RemoteError, match="wrong arguments: ") as caught:
                await remote.add(**arguments)
            assert isinstance(caught.value, TypeError)
            assert what in str(caught.value)
            assert "the handler is add(x: 'int', y: 'int') -> 'int'" in str(caught.value)
            assert await wire.comm_of(remote, server) == comm


@reference("C03", "m i t u l")
async def test_c03_keys_that_are_no_names(wire: Wire) -> None:
    keys: tuple[Any, ...] = (1, b"x", None, (1, 2))
    async with wire.server({"add": add}) as (_, address), await wire.connect(address) as comm:
        for key in keys:
            await comm.write({"op": "add", "x": 1, key: 2, "reply": True})
            reply = await comm.read()
            assert reply["status"] == "uncaught-error"
            error = exception_from_reply(reply, allow_pickle=no)
            assert isinstance(error, TypeError)
            await comm.write({"op": "add", "x": 1, "y": 2, "reply": True})
            assert await comm.read() == 3


@reference("C04", "m i t u l")
async def test_c04_a_result_that_can_not_travel(wire: Wire) -> None:
    results: dict[str, Any] = {}

    def generator() -> Any:
        return keep("generator", (n for n in range(3)))

    def file() -> Any:
        return keep("file", Path(__file__).open("rb"))

    def lock() -> Any:
        return keep("lock", {"nested": [threading.Lock()]})

    def keep(name: str, result: Any) -> Any:
        results[name] = result
        return result

    handlers = {"generator": generator, "file": file, "lock": lock}
    async with wire.server(handlers) as (server, address), wire.client(address) as remote:
        comm = await wire.comm_of(remote, server)
        for op in ("generator", "file", "lock"):
            if wire.transport == "i":  # which passes objects, whatever they are
                assert await remote[op]() is results[op]
            else:
                with pytest.raises(SerializationError):
                    await remote[op]()
            assert await wire.comm_of(remote, server) == comm
    results["file"].close()


@reference("C04", "m t u l")
async def test_c04_a_result_that_can_not_travel_to_a_stock_peer(wire: Wire) -> None:
    async with wire.server({"lock": threading.Lock, "add": add}) as (_, address), await wire.manual(address) as peer:
        await peer.handshake()
        await peer.send({"op": "lock", "reply": True})
        error = pickle.loads((await peer.receive())["exception"])
        assert type(error) is TypeError
        await peer.send({"op": "add", "x": 1, "y": 2, "reply": True})
        assert await peer.receive() == 3


@reference("C04", "m i t u l")
async def test_c04_large_numbers_do_travel(wire: Wire) -> None:
    async with wire.server({"large": lambda: 2**70}) as (server, address), wire.client(address) as remote:
        comm = await wire.comm_of(remote, server)
        assert await remote.large() == 2**70
        assert await wire.comm_of(remote, server) == comm


@reference("C05", "m i t u l")
async def test_c05_a_group_of_two(wire: Wire) -> None:
    async def fail(error: Exception, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await wait.wait()
        raise error

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(fail, ValueError("one"))
            await nursery.start(fail, KeyError("two"))
            await trio.testing.wait_all_tasks_blocked()
            wait.set()

    async def one() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, ValueError("one"))

    wait = trio.Event()
    async with (
        wire.server({"both": both, "one": one}) as (server, address),
        wire.client(address) as remote,
    ):
        comm = await wire.comm_of(remote, server)
        with pytest.raises(RemoteError) as caught:
            await remote.both()
        group = caught.value
        assert isinstance(group, ExceptionGroup)
        leaves = sorted(group.exceptions, key=str)
        assert [(isinstance(leaf, RemoteError), leaf.args) for leaf in leaves] == [(True, ("two",)), (True, ("one",))]
        assert isinstance(leaves[0], KeyError)
        assert isinstance(leaves[1], ValueError)
        assert all("in fail" in leaf.remote_traceback for leaf in leaves if isinstance(leaf, RemoteError))
        assert await wire.comm_of(remote, server) == comm
        # As everywhere: a group of one says no more than the one.
        with pytest.raises(ValueError, match=r"^one$") as single:
            await remote.one()
        assert isinstance(single.value, RemoteError)
        assert await wire.comm_of(remote, server) == comm


@reference("C06", "m i t u l")
async def test_c06_exits_end_the_server(wire: Wire) -> None:
    for leave in (SystemExit(7), KeyboardInterrupt()):
        for grouped in (False, True):
            journal = Journal()
            other, caller = Outcome(), Outcome()

            async def leave_now(leave: BaseException = leave, grouped: bool = grouped) -> None:
                if grouped:
                    raise BaseExceptionGroup("with company", [ValueError("lost"), leave])
                raise leave

            server = wire.make_server({"leave": leave_now, "work": journal.handler(60, wire)})
            async with trio.open_nursery() as clients:
                remotes: list[rpc] = []

                async def call(
                    address: str,
                    journal: Journal = journal,
                    remotes: list[rpc] = remotes,
                    clients: trio.Nursery = clients,
                    other: Outcome = other,
                    caller: Outcome = caller,
                ) -> None:
                    remote = wire.client(address)
                    remotes.append(remote)
                    clients.start_soon(other.of, remote.work)
                    await journal.started()
                    await caller.of(remote.leave)

                async def serve(server: Server = server, clients: trio.Nursery = clients, call: Any = call) -> None:
                    async with trio.open_nursery() as nursery:
                        (address,) = await nursery.start(server.serve, wire.where)
                        clients.start_soon(call, address)

                # trio puts what leaves a task into groups; nothing but the exit is in them.
                with wire.now(), pytest.raises(BaseExceptionGroup) as caught:
                    await serve()
                assert caught.value.exceptions == (leave,)
                assert server.status is Status.closed
                await other.ended()
                await caller.ended()
                remotes[0].close_comms()
            assert journal.entries == ["started", "cancelled", "finally"]
            # The client lives: it has lost its connection, or been told that its handler was cut.
            assert isinstance(caller.error, CommClosedError)
            assert isinstance(other.error, HandlerCancelled)
            assert other.error.reason == "server cancelled"


@reference("C06", "m i t u l")
async def test_c06_an_exit_out_of_serve_is_bare(wire: Wire) -> None:
    def leave() -> None:
        raise SystemExit(7)

    async def call(task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await ready.wait()
        async with wire.client(addresses[0]) as remote:
            await outcome.of(remote.leave)

    class Told(trio.TaskStatus[tuple[str, ...]]):
        """What serve() is started by, without a nursery that would group what it raises."""

        def started(self, value: Any = None) -> None:
            addresses.extend(value)
            ready.set()

    outcome = Outcome()
    ready = trio.Event()
    addresses: list[str] = []
    async with trio.open_nursery() as clients:
        await clients.start(call)
        with pytest.raises(SystemExit) as caught:
            await wire.make_server({"leave": leave}).serve(wire.where, task_status=Told())
        assert caught.value.code == 7
        await outcome.ended()
    assert isinstance(outcome.error, CommClosedError)


class GroupOfExits:
    """Unpickles to a group.  (Where distributed is imported exceptions pickle by tblib, which fails with groups.)"""

    def __reduce__(self) -> Any:
        return BaseExceptionGroup, ("g", [SystemExit(7), KeyboardInterrupt("now")])


def is_harmless(error: Exception | None, name: str) -> bool:
    """Whether it is a RemoteError that tells of that exit, and neither is one nor has one in it."""
    if isinstance(error, ExceptionGroup):
        names = [leaf.type_name for leaf in error.exceptions if type(leaf) is RemoteError]
        return names == ["builtins.SystemExit", "builtins.KeyboardInterrupt"] and name == "builtins.BaseExceptionGroup"
    return type(error) is RemoteError and error.type_name == name


@reference("C07", "m t u l")
async def test_c07_a_stock_servers_reply_is_an_exit(wire: Wire) -> None:
    # What stock servers write when their handler has raised these, and pickles that no stock server would write.
    exits = (SystemExit(7), KeyboardInterrupt("now"), GeneratorExit())
    replies: list[tuple[Any, str]] = [(error_message(each, status="uncaught-error"), type(each).__name__) for each in exits]
    group = {"exception": pickle.dumps(GroupOfExits()), "exception_text": "g", "traceback_text": ""}
    replies.append(({"status": "uncaught-error", "traceback": None, **group}, "BaseExceptionGroup"))

    for reply, name in replies:

        async def script(peer: ManualPeer, reply: Any = reply) -> None:
            await peer.handshake()
            request = await peer.receive()
            assert KEY not in request  # a stock server
            await peer.send_frames(stock_dumps(reply))
            await peer.receive()
            await peer.send("goes on")

        async with wire.scripted(script) as address, wire.client(address) as remote:
            outcome = Outcome()
            await outcome.of(remote.leave)
            assert is_harmless(outcome.error, f"builtins.{name}"), outcome.error
            # The client lives, and so does its connection.
            assert await remote.go_on() == "goes on"


@reference("C07", "m t u l")
async def test_c07_an_opted_in_reply_is_an_exit(wire: Wire) -> None:
    values: list[dict[str, Any]] = [
        {"code": "error", "type": f"builtins.{name}", "message": "7", "traceback": "", "args": [7], "mro": [f"builtins.{name}"]}
        for name in ("SystemExit", "KeyboardInterrupt", "GeneratorExit")
    ]
    values.append({**values[0], "pickle": pickle.dumps(SystemExit(7))})

    for value in values:

        async def script(peer: ManualPeer, value: dict[str, Any] = value) -> None:
            await peer.handshake(extension=True)
            request = await peer.receive()
            await peer.send((ERROR, request[KEY]["id"], value))
            request = await peer.receive()
            await peer.send((0, request[KEY]["id"], "goes on"))

        async with wire.scripted(script) as address, wire.client(address) as remote:
            outcome = Outcome()
            await outcome.of(remote.leave)
            assert is_harmless(outcome.error, value["type"]), outcome.error
            assert await remote.go_on() == "goes on"


SPRUNG: list[str] = []


def spring(how: str) -> SystemExit:
    SPRUNG.append(how)
    return SystemExit(7)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return spring, (self.how,)


@reference("C07", "m t u l")
async def test_c07_a_strangers_pickle_is_not_run(wire: Wire) -> None:
    async def script(peer: ManualPeer) -> None:
        await peer.handshake()
        await peer.receive()
        texts = {"traceback": None, "exception_text": "SystemExit(7)", "traceback_text": ""}
        await peer.send({"status": "uncaught-error", "exception": pickle.dumps(Trap("plain")), **texts})

    async def script_opted_in(peer: ManualPeer) -> None:
        await peer.handshake(extension=True)
        request = await peer.receive()
        value = {
            "code": "error",
            "type": "builtins.SystemExit",
            "message": "7",
            "traceback": "",
            "pickle": pickle.dumps(Trap("ours")),
        }
        await peer.send((ERROR, request[KEY]["id"], value))

    for each in (script, script_opted_in):
        for pickles, runs in (("never", False), ("always", True)):
            security = wire.secured(pickle=pickles)
            SPRUNG.clear()
            async with wire.scripted(each) as address, wire.client(address, security=security) as remote:
                outcome = Outcome()
                await outcome.of(remote.leave)
                # Once it is allowed the trap works, so that it proves something where it does not.
                assert bool(SPRUNG) == runs
                assert type(outcome.error) is RemoteError


@reference("C07", "m i t u l")
async def test_c07_a_handler_writes_the_reply_itself(wire: Wire) -> None:
    async def leave(comm: Comm) -> Status:
        await comm.write({"status": "uncaught-error", "exception": pickle.dumps(SystemExit(7)), "traceback": None})
        return Status.dont_reply

    async with wire.server({"leave": leave, "add": add}) as (_, address), await wire.connect(address) as comm:
        await comm.write({"op": "leave", "reply": True})
        error = exception_from_reply(await comm.read(), allow_pickle=lambda: True)
        assert is_harmless(error, "builtins.SystemExit")
        await comm.write({"op": "add", "x": 1, "y": 2, "reply": True})
        assert await comm.read() == 3


@types.coroutine
def yield_to_trio(what: object) -> Generator[object, object, None]:
    """As a library made for another event loop does."""
    yield what


async def foreign() -> None:
    await yield_to_trio("this is for asyncio")


async def unbalanced_scope() -> str:
    trio.CancelScope().__enter__()
    return "left a scope open"


async def closes_its_comm(comm: Comm) -> str:
    comm.abort()
    return "cut off"


class Unspeakable:
    """Fails in every way while it is being serialized."""

    def __reduce__(self) -> str:
        raise ZeroDivisionError("in __reduce__")


class UnspeakableError(Exception):
    """Likewise while it is being described."""

    def __str__(self) -> str:
        raise ZeroDivisionError("in __str__")

    __repr__ = __str__


def raises_unspeakable() -> None:
    raise UnspeakableError


@reference("C09", "m i t u l", quiet=False)
async def test_c09_one_connection_dies_and_nine_go_on(wire: Wire) -> None:
    for crash in (foreign, unbalanced_scope, closes_its_comm, Unspeakable, raises_unspeakable):
        journal = Journal()
        go_on = trio.Event()

        async def work(journal: Journal = journal, go_on: trio.Event = go_on) -> str:
            journal("started")
            await go_on.wait()
            return "done"

        async with wire.server({"crash": crash, "work": work, "add": add}) as (server, address):
            remotes = [wire.client(address) for _ in range(10)]
            outcomes = [Outcome() for _ in range(10)]
            async with trio.open_nursery() as nursery:
                for remote, outcome in zip(remotes[1:], outcomes[1:], strict=True):
                    nursery.start_soon(outcome.of, remote.work)
                while len(journal.entries) < 9:
                    await trio.lowlevel.checkpoint()
                await outcomes[0].of(remotes[0].crash)
                # It has failed, or not, but nobody else has noticed.
                assert server.status is Status.running
                assert server.statistics().in_flight == 9
                async with wire.client(address) as newcomer:
                    assert await newcomer.add(x=1, y=2) == 3
                go_on.set()
            assert [outcome.value for outcome in outcomes[1:]] == ["done"] * 9
            for remote in remotes[1:]:
                assert await remote.add(x=1, y=2) == 3
            assert await remotes[0].add(x=1, y=2) == 3  # its connection is made anew if need be
            for remote in remotes:
                remote.close_comms()
