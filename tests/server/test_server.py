"""A server's life: starting, listening, stopping, and being misused."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_dcore import (
    AddressError,
    CommClosedError,
    ConnectError,
    HandlerCancelled,
    Limits,
    LocalProtocolError,
    RemoteError,
    RPCClosed,
    Security,
    Server,
    ServerClosing,
    Status,
    UnknownOp,
    connect,
    current_request,
    rpc,
    send_recv,
)
from trio_dcore.abc import CommSettings
from trio_dcore.comm import get_transport
from trio_dcore.server import BaseServer
from trio_dcore.testing import no_leaks


def add(x: int, y: int = 1) -> int:
    return x + y


class Gate:
    """A handler that waits to be let through."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.go = trio.Event()
        self.outcome: BaseException | str | None = None

    async def __call__(self) -> str:
        self.started.set()
        try:
            await self.go.wait()
            self.outcome = "through"
        except BaseException as error:
            self.outcome = error
            raise
        return "through"


class TestConstruction:
    @pytest.mark.parametrize("name", ["grace", "drain_on_cancel"])
    @pytest.mark.parametrize("value", [-1, math.nan, True, "5", None])
    def test_seconds(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=name):
            Server(**{name: value})

    @pytest.mark.parametrize("limit", [0, "512", None])
    def test_connection_limit(self, limit: Any) -> None:
        with pytest.raises(ValueError, match=f"connection_limit={limit!r}"):
            Server(connection_limit=limit)

    @pytest.mark.parametrize(
        ("name", "value"), [("security", Limits()), ("limits", {"message": 1}), ("handlers", [add]), ("stream_handlers", "add")]
    )
    def test_arguments_of_another_kind(self, name: str, value: Any) -> None:
        with pytest.raises(TypeError, match=f"{name}="):
            Server(**{name: value})

    @pytest.mark.parametrize("timeout", [math.nan, True, "5s"])
    async def test_timeout(self, timeout: Any) -> None:
        for make in (lambda: Server(timeout=timeout), lambda: rpc("127.0.0.1:1", timeout=timeout)):
            with pytest.raises(ValueError, match=f"timeout={timeout!r}: must be a number of seconds"):
                make()
        with pytest.raises(ValueError, match=f"timeout={timeout!r}: must be a number of seconds"):
            await connect("127.0.0.1:1", timeout=timeout)

    @pytest.mark.parametrize("name", ["handlers", "stream_handlers"])
    def test_handlers(self, name: str) -> None:
        with pytest.raises(TypeError, match="the handler for 'add' is 5, which can't be called"):
            Server(**{name: {"add": 5}})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="the op 5 is not a str"):
            Server(**{name: {5: add}})  # type: ignore[arg-type]

    def test_blocked_handlers(self) -> None:
        with pytest.raises(TypeError, match=r"such as \['echo'\]"):
            Server(blocked_handlers="echo")
        assert Server(blocked_handlers=("echo",)).blocked_handlers == {"echo"}

    def test_blocked_handlers_of_a_class(self) -> None:
        class Careful(Server):
            default_blocked_handlers = ("echo", "dump_state")

        assert Careful().blocked_handlers == {"echo", "dump_state"}
        assert Careful(blocked_handlers=["identity"]).blocked_handlers == {"identity"}
        assert Careful(blocked_handlers=()).blocked_handlers == Server().blocked_handlers == set()
        Careful.default_blocked_handlers = "echo"
        with pytest.raises(TypeError, match=r"such as \['echo'\]"):
            Careful()

    def test_authorize(self) -> None:
        async def ask(peer: Any, op: str) -> bool:
            return True

        class Ask:
            async def __call__(self, peer: Any, op: str) -> bool:
                return True

        for authorize in (ask, Ask()):
            with pytest.raises(TypeError, match="authorize must be a plain function"):
                Server(authorize=authorize)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="authorize=3: must be a function"):
            Server(authorize=3)  # type: ignore[arg-type]

    def test_before_it_starts(self) -> None:
        server = Server({"add": add}, name="Adder")
        assert server.status is Status.init
        assert server.addresses == ()
        assert repr(server) == "<Server init at no address>"
        assert server.id.startswith("Adder-")
        assert server.statistics().connections == 0
        with pytest.raises(LocalProtocolError, match="no address before it listens"):
            _ = server.address
        with pytest.raises(LocalProtocolError, match="no port"):
            _ = server.port
        with pytest.raises(LocalProtocolError, match="no host"):
            _ = server.host
        assert server.listeners == ()


class TestBuiltIns:
    async def test_identity_and_echo(self, where: str, serving: Any) -> None:
        async with serving({"add": add}, where) as (server, remote):
            assert await remote.identity() == {"type": "Server", "id": server.id}
            assert await remote.echo(data=[1]) in ([1], (1,))
            assert await remote.echo() is None

    async def test_dump_state(self, where: str, serving: Any) -> None:
        handlers: dict[str, Any] = {"add": add}
        async with serving(handlers, where) as (server, remote):
            with pytest.raises(UnknownOp):  # it tells strangers what goes on, so it is no op by itself
                await remote.dump_state()
            server.handlers["dump_state"] = server.dump_state
            await remote.add(x=1)
            state = await remote.dump_state()
            assert list(state) == ["type", "id", "addresses", "status", "statistics"]
            assert (state["type"], state["id"], state["status"]) == ("Server", server.id, "running")
            assert tuple(state["addresses"]) == server.addresses
            assert state["statistics"]["requests"] == {"add": 1, "dump_state": 1}
            assert state["statistics"]["connections"] == state["statistics"]["in_flight"] == 1
            assert list(await remote.dump_state(exclude=["statistics", "id"])) == ["type", "addresses", "status"]
            with pytest.raises(TypeError):
                await remote.dump_state(exclude=5)

    async def test_may_be_replaced(self, serving: Any) -> None:
        async with serving({"echo": lambda: "mine"}) as (_server, remote):
            assert await remote.echo() == "mine"

    async def test_a_subclass_as_in_dask(self, where: str, serving: Any) -> None:
        class Counter(Server):
            def __init__(self, **options: Any) -> None:
                self.n = 0
                super().__init__({"increment": self.increment}, **options)

            async def increment(self, by: int = 1) -> int:
                self.n += by
                return self.n

        async with serving(None, where, server_type=lambda handlers, **options: Counter(**options)) as (_server, remote):
            assert await remote.increment() == 1
            assert await remote.increment(by=4) == 5
            assert (await remote.identity())["type"] == "Counter"


class TestListening:
    async def test_several_times(self) -> None:
        async with Server({"add": add}) as server:
            assert server.status is Status.running
            addresses = [
                await server.listen("inproc://"),
                await server.listen("tcp://127.0.0.1:0"),
                await server.listen(("127.0.0.1", 0)),
            ]
            assert server.addresses == tuple(addresses)
            assert server.address == addresses[0]
            assert addresses[1] == f"tcp://127.0.0.1:{server.port}"
            assert repr(server) == f"<Server running at {', '.join(addresses)}>"
            for address in addresses:
                async with rpc(address) as remote:
                    assert await remote.add(x=1) == 2
        assert server.status is Status.closed
        assert server.addresses == tuple(addresses)

    async def test_a_listener_may_be_closed_by_itself(self, where: str) -> None:
        async with no_leaks(), Server({"add": add}) as server:
            first, second = [await server.listen(where) for _ in range(2)]
            assert [listener.contact_address for listener in server.listeners] == [first, second]
            server.listeners[0].close()
            with pytest.raises(ConnectError):
                await connect(first, timeout=0.05)
            async with rpc(second) as remote:
                assert await remote.add(x=1) == 2
            assert server.status is Status.running
        assert server.listeners == ()

    async def test_the_defaults_of_a_class(self) -> None:
        class Mine(Server):
            default_ip = "127.0.0.1"

        async with Mine() as server:
            for argument in (None, 0, "", "tcp://"):
                assert (await server.listen(argument)).startswith("tcp://127.0.0.1:")
            assert server.host == "127.0.0.1"
            assert server.port == int(server.address.rpartition(":")[2])

    async def test_an_address_that_is_taken(self, where: str) -> None:
        async with no_leaks(), Server() as first, Server() as second:
            address = await first.listen(where)
            with pytest.raises((OSError, AddressError)):
                await second.listen(address)
            assert second.status is Status.running
            assert second.addresses == ()
            await second.listen(where)

    async def test_encryption_is_required(self) -> None:
        async with Server(security=Security(require_encryption=True)) as server:
            with pytest.raises(LocalProtocolError, match="isn't encrypted"):
                await server.listen("tcp://127.0.0.1:0")
            await server.listen("inproc://")

    async def test_misuse(self) -> None:
        server = Server()
        with pytest.raises(LocalProtocolError, match="inside `async with server:`, or call serve"):
            await server.listen("inproc://")
        async with server:
            server.stop()
            with pytest.raises(LocalProtocolError, match="listen\\(\\) on a server that is closing_gracefully"):
                await server.listen("inproc://")
        with pytest.raises(LocalProtocolError, match="that is closed; make a new one"):
            await server.listen("inproc://")
        with pytest.raises(LocalProtocolError, match="a server serves once, and this one is closed"):
            async with server:
                pass
        with pytest.raises(LocalProtocolError, match="a server serves once"):
            await server.serve("inproc://")
        with pytest.raises(LocalProtocolError, match="at least one address"):
            await Server().serve()

    async def test_entering_twice(self) -> None:
        async with Server() as server:
            with pytest.raises(LocalProtocolError, match="a server serves once, and this one is running"):
                await server.serve("inproc://")
            assert server.status is Status.running

    async def test_stopped_while_it_begins_to_listen(self) -> None:
        class Stopping(Server):
            def _check_serving(self) -> None:
                super()._check_serving()
                if self.checked:
                    return
                self.checked = True
                self.stop()

            checked = False

        async with no_leaks(), Stopping() as server:
            with pytest.raises(LocalProtocolError, match="listen"):
                await server.listen("inproc://one-name")
            assert server.addresses == ()
        async with Server() as other:
            assert await other.listen("inproc://one-name") == "inproc://one-name"  # the name is free again


class TestServe:
    async def test_start_gives_the_addresses(self, where: str) -> None:
        async with no_leaks(), trio.open_nursery() as nursery:
            server = Server({"add": add})
            addresses = await nursery.start(server.serve, where, "inproc://")
            assert addresses == server.addresses
            assert len(addresses) == 2
            async with rpc(addresses[0]) as remote:
                assert await remote.add(x=1) == 2
            server.stop()
        assert server.status is Status.closed

    async def test_without_start(self) -> None:
        server = Server()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, "inproc://")
            await wait_all_tasks_blocked()
            async with rpc(server.address) as remote:
                assert await remote.echo(data=1) == 1
            nursery.cancel_scope.cancel()
        assert server.status is Status.closed

    async def test_an_address_that_can_not_be_had(self, where: str) -> None:
        async with no_leaks(), Server() as other:
            taken = await other.listen(where)
            server = Server()
            with pytest.raises((OSError, AddressError)):
                await server.serve("inproc://free", taken)
            assert server.status is Status.failed
            await server.finished()
            with pytest.raises(ConnectError):
                await connect("inproc://free", timeout=0.05)
            again = Server()
            with pytest.raises(AddressError):
                await again.serve("nonsense://x")
            assert again.status is Status.failed

    async def test_cancelled(self, where: str) -> None:
        gate = Gate()
        async with no_leaks(), trio.open_nursery() as nursery:
            server = Server({"gate": gate})
            (address,) = await nursery.start(server.serve, where)
            async with rpc(address) as remote:
                nursery.start_soon(self.expect, remote)
                await gate.started.wait()
                nursery.cancel_scope.cancel()
        assert isinstance(gate.outcome, trio.Cancelled)
        assert server.status is Status.closed

    async def expect(self, remote: Any) -> None:
        await remote.gate()

    async def test_a_start_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_epoll(*args: Any) -> None:
            raise OSError(errno.EMFILE, "no epoll set")

        monkeypatch.setattr("trio_dcore.server._server.HangupWatcher", no_epoll)
        server = Server()
        with pytest.raises(OSError, match="no epoll set"):
            async with server:
                raise AssertionError("not reached")
        assert server.status is Status.failed
        await server.finished()

    async def test_a_start_that_is_cancelled(self) -> None:
        server = Server()
        async with no_leaks():
            with trio.CancelScope() as scope:
                scope.cancel()
                async with server:
                    await server.listen("inproc://")
            assert scope.cancelled_caught
        assert server.status in (Status.failed, Status.closed)


class TestStop:
    async def test_before_it_starts(self) -> None:
        server = Server()
        server.stop()
        assert server.status is Status.closed
        assert server.shutdown_requested.is_set()
        await server.finished()
        await server.aclose()
        with pytest.raises(LocalProtocolError, match="this one is closed"):
            await server.serve("inproc://")

    @pytest.mark.parametrize("grace", [-1, math.nan, True, "1"])
    async def test_a_grace_that_is_none(self, grace: Any) -> None:
        async with Server() as server:
            with pytest.raises(ValueError, match="grace"):
                server.stop(grace)
            assert server.status is Status.running

    async def test_the_states(self, where: str, serving: Any) -> None:
        gate = Gate()
        async with serving({"gate": gate}, where) as (server, remote), trio.open_nursery() as nursery:
            nursery.start_soon(remote.gate)
            await gate.started.wait()
            server.stop(5, reason="of the test")
            assert server.status is Status.closing_gracefully
            await wait_all_tasks_blocked(0.01)
            assert server.status is Status.closing_gracefully
            gate.go.set()
            await server.finished()
            assert server.status is Status.closed
            server.stop()
            assert server.status is Status.closed
        assert gate.outcome == "through"

    async def test_with_no_grace_it_closes_at_once(self) -> None:
        async with Server() as server:
            server.stop(0)
            assert server.status is Status.closing
            await server.finished()

    async def test_a_grace_that_ends(self, serving: Any, autojump_clock: Any) -> None:
        gate = Gate()
        async with serving({"gate": gate}, patience=1000) as (server, remote), trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(HandlerCancelled) as caught:
                    await remote.gate()
                assert caught.value.reason == "grace over"

            nursery.start_soon(call)
            await gate.started.wait()
            start = trio.current_time()
            server.stop(20)
            server.stop(30)  # only ever shortens
            await trio.sleep(1)
            server.stop(3)
            server.stop(math.inf)
            await server.finished()
            assert trio.current_time() - start == pytest.approx(4)
        assert isinstance(gate.outcome, trio.Cancelled)

    async def test_from_grace_to_none(self, serving: Any) -> None:
        gate = Gate()
        async with serving({"gate": gate}) as (server, remote), trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(HandlerCancelled):
                    await remote.gate()

            nursery.start_soon(call)
            await gate.started.wait()
            server.stop(math.inf)
            server.stop(0)
            assert server.status is Status.closing
            await server.finished()

    async def test_the_block_ends_with_the_servers_grace(self, autojump_clock: Any) -> None:
        gate = Gate()
        async with trio.open_nursery() as nursery:
            async with Server({"gate": gate}, grace=7) as server:
                remote = rpc(await server.listen("inproc://"))

                async def call() -> None:
                    with pytest.raises(HandlerCancelled):
                        await remote.gate()

                nursery.start_soon(call)
                await gate.started.wait()
                start = trio.current_time()
            assert trio.current_time() - start == pytest.approx(7)
        remote.close_comms()

    async def test_by_a_handler(self, where: str, serving: Any) -> None:
        """A09: no deadlock, and its own reply is delivered."""

        async def end(how: str) -> str:
            server = current_request().server
            if how == "stop":
                server.stop()
            else:
                await server.aclose()
            assert server.status is Status.closing_gracefully
            return "stopping"

        for how in ("stop", "aclose"):
            async with serving({"end": end}, where) as (server, remote):
                assert await remote.end(how=how) == "stopping"
                await server.finished()

    async def test_by_a_task_that_a_request_left_behind(self, where: str, serving: Any) -> None:
        """It inherited the request's context, but the request is over: so it waits."""
        closed: list[Status] = []

        async def close() -> None:
            await go.wait()
            await server.aclose()
            closed.append(server.status)

        async def leave() -> None:
            nursery.start_soon(close)

        go = trio.Event()
        async with trio.open_nursery() as nursery, serving({"leave": leave}, where) as (server, remote):
            await remote.leave()
            await wait_all_tasks_blocked(0.01)
            go.set()
        assert closed == [Status.closed]

    async def test_a_request_of_another_server_waits(self, serving: Any) -> None:
        async def close_other() -> str:
            await other.aclose()
            return other.status.name

        async with serving({"close_other": close_other}) as (_server, remote), Server() as other:
            assert await remote.close_other() == "closed"

    async def test_aclose_twice_and_by_two(self, where: str, serving: Any) -> None:
        async with serving({"add": add}, where) as (server, remote):
            assert await remote.add(x=1) == 2
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.aclose)
                nursery.start_soon(server.close)
            assert server.status is Status.closed
            await server.aclose()
            await server.close(timeout=1, reason="again")
            await server.finished()

    async def test_aclose_cancelled(self, where: str, serving: Any) -> None:
        gate = Gate()
        async with serving({"gate": gate}, where) as (server, remote), trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(HandlerCancelled):
                    await remote.gate()

            nursery.start_soon(call)
            await gate.started.wait()
            with trio.CancelScope() as scope:
                nursery.start_soon(self.cancel_soon, scope)
                await server.aclose(math.inf)
            assert scope.cancelled_caught
            assert server.status is Status.closing
            await server.finished()
        assert isinstance(gate.outcome, trio.Cancelled)

    async def cancel_soon(self, scope: trio.CancelScope) -> None:
        await wait_all_tasks_blocked(0.01)
        scope.cancel()

    async def test_idle_connections_are_closed_at_once(self, where: str, serving: Any) -> None:
        async with serving({"add": add}, where) as (server, remote), await connect(server.address) as comm:
            assert await send_recv(comm, op="add", x=1) == 2
            await remote.add(x=1)
            server.stop(math.inf)
            await server.finished()
            with pytest.raises(CommClosedError):
                await comm.read()

    async def test_nobody_connects_any_more(self, where: str, serving: Any) -> None:
        gate = Gate()
        async with serving({"gate": gate}, where) as (server, remote), trio.open_nursery() as nursery:
            nursery.start_soon(remote.gate)
            await gate.started.wait()
            server.stop(60)
            await wait_all_tasks_blocked(0.01)
            with pytest.raises(ConnectError):
                await connect(server.address, timeout=0.05)
            gate.go.set()

    @pytest.mark.parametrize("how", ["stop", "cancel"])
    async def test_a_connection_that_is_accepted_in_that_very_moment(self, how: str) -> None:
        """The scheduler decides who goes first, so it is tried often."""
        for _ in range(20):
            with trio.CancelScope() as scope:
                async with Server() as server:
                    address = await server.listen("inproc://")
                    await wait_all_tasks_blocked()
                    comm = await get_transport("inproc").connect(address.removeprefix("inproc://"), CommSettings())
                    if how == "stop":
                        server.stop()
                        await server.finished()
                    else:
                        scope.cancel()
                        await trio.sleep_forever()
            assert server.status is Status.closed
            comm.abort()


class TestOutsideCancellation:
    async def run(self, server: Server, where: str, cancel: Any, gate: Gate, **expect: Any) -> float:
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def serve(task_status: Any) -> None:
                with scope:
                    await server.serve(where, task_status=task_status)

            (address,) = await nursery.start(serve)
            async with rpc(address) as remote:

                async def call() -> None:
                    if expect.get("answer"):
                        assert await remote.gate() == expect["answer"]
                    else:
                        with pytest.raises(HandlerCancelled) as caught:
                            await remote.gate()
                        assert caught.value.reason == "server cancelled"

                nursery.start_soon(call)
                await gate.started.wait()
                start = trio.current_time()
                scope.cancel()
                await cancel()
                await server.finished()
        return trio.current_time() - start

    async def nothing(self) -> None:
        await trio.lowlevel.checkpoint()

    async def test_means_now(self, where: str) -> None:
        gate = Gate()
        with trio.fail_after(10):
            await self.run(Server({"gate": gate}, grace=60), where, self.nothing, gate)
        assert isinstance(gate.outcome, trio.Cancelled)

    async def test_drains_if_asked_to(self, autojump_clock: Any) -> None:
        gate = Gate()

        async def let_go() -> None:
            await trio.sleep(0.3)
            gate.go.set()

        took = await self.run(Server({"gate": gate}, drain_on_cancel=1), "inproc://", let_go, gate, answer="through")
        assert took == pytest.approx(0.3)

    async def test_drains_no_longer_than_asked_to(self, autojump_clock: Any) -> None:
        gate = Gate()
        took = await self.run(Server({"gate": gate}, drain_on_cancel=0.05), "inproc://", self.nothing, gate)
        assert took == pytest.approx(0.05)

    async def test_during_a_grace(self, autojump_clock: Any) -> None:
        gate = Gate()
        server = Server({"gate": gate})
        async with trio.open_nursery() as nursery:
            (address,) = await nursery.start(server.serve, "inproc://")
            async with rpc(address) as remote:

                async def call() -> None:
                    await remote.gate()

                nursery.start_soon(call)
                await gate.started.wait()
                server.stop(60)
                await trio.sleep(1)
                nursery.cancel_scope.cancel()
        assert trio.current_time() == pytest.approx(1)
        assert isinstance(gate.outcome, trio.Cancelled)
        assert server.status is Status.closed

    async def test_an_exception_in_the_block(self, where: str) -> None:
        """B05: handlers are cancelled, and that one exception comes out, in no group."""
        gate = Gate()

        async def call(remote: Any) -> None:
            with pytest.raises((HandlerCancelled, CommClosedError)):
                await remote.gate()

        async with no_leaks(), trio.open_nursery() as nursery:
            remote = None
            with pytest.raises(ValueError, match="in the block") as caught:
                async with Server({"gate": gate}) as server:
                    remote = rpc(await server.listen(where))
                    nursery.start_soon(call, remote)
                    await gate.started.wait()
                    error = ValueError("in the block")
                    raise error
            assert caught.value is error
            assert server.status is Status.closed
            await wait_all_tasks_blocked(0.01)
            remote.close_comms()
        assert isinstance(gate.outcome, trio.Cancelled)

    @pytest.mark.parametrize("exit", [KeyboardInterrupt(), SystemExit(3)])
    async def test_an_exit_in_a_nursery_of_the_block_comes_out_alone(self, exit: BaseException) -> None:
        async def leave() -> None:
            raise exit

        with pytest.raises(type(exit)) as caught:
            async with Server():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(leave)
        assert caught.value is exit

    async def test_a_group_of_the_block_stays_as_it_is(self) -> None:
        group = ExceptionGroup("of the block", [ValueError(), KeyError()])
        with pytest.raises(ExceptionGroup) as caught:
            async with Server():
                raise group
        assert caught.value is group

    async def test_listening_in_the_moment_of_it(self) -> None:
        """Whoever calls listen() then gets an error or is cancelled, and the address is free again."""
        for _ in range(20):
            with trio.CancelScope() as scope:
                async with Server() as server, trio.open_nursery() as nursery:

                    async def listen(server: Server = server) -> None:
                        with trio.CancelScope(shield=True):
                            try:
                                await server.listen("inproc://shielded")
                            except LocalProtocolError:
                                pass

                    nursery.start_soon(listen)
                    await trio.lowlevel.checkpoint()
                    scope.cancel()
            async with Server() as other:
                await other.listen("inproc://shielded")

    async def test_the_block_and_the_server_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(self: Any) -> None:
            raise ZeroDivisionError("in the server")

        monkeypatch.setattr(BaseServer, "_wind_down", broken)
        with pytest.raises(ExceptionGroup) as caught:
            async with Server():
                raise ValueError("in the block")
        assert {type(error) for error in caught.value.exceptions} == {ValueError, ZeroDivisionError}


class TestStragglers:
    async def test_what_does_not_end_is_waited_for_and_named(
        self, serving: Any, caplog: pytest.LogCaptureFixture, autojump_clock: Any
    ) -> None:
        started = trio.Event()

        async def shielded() -> None:
            started.set()
            with trio.CancelScope(shield=True):
                await trio.sleep(3.5)

        async with serving({"shielded": shielded}, patience=1000) as (server, remote), trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(HandlerCancelled):
                    await remote.shielded()

            nursery.start_soon(call)
            await started.wait()
            start = trio.current_time()
            server.stop(0)
            await server.finished()
            assert trio.current_time() - start == pytest.approx(3.5)
        assert len(caplog.records) == 3
        assert "in shielded" in caplog.text

    async def test_a_grace_is_not_reported(self, serving: Any, caplog: pytest.LogCaptureFixture, autojump_clock: Any) -> None:
        gate = Gate()
        async with serving({"gate": gate}, patience=1000) as (server, remote), trio.open_nursery() as nursery:
            nursery.start_soon(remote.gate)
            await gate.started.wait()
            server.stop(60)
            await trio.sleep(30)
            gate.go.set()
        assert caplog.records == []


class TestQuiet:
    async def test_an_orderly_end_under_load(self, where: str, serving: Any, caplog: pytest.LogCaptureFixture) -> None:
        """A12: nothing above INFO, and every call is either answered or refused with a name."""
        outcomes: list[str] = []

        async def slow(x: int) -> int:
            await trio.lowlevel.checkpoint()
            return x

        async def ticks() -> AsyncIterator[int]:
            for i in range(1000):
                yield i
                if current_request().shutdown_requested.is_set():
                    return

        async def caller(remote: Any) -> None:
            while True:
                try:
                    await remote.slow(x=1)
                    outcomes.append("answered")
                except (ServerClosing, CommClosedError, ConnectError, RPCClosed) as error:
                    outcomes.append(type(error).__name__)
                    return

        async def streamer(remote: Any) -> None:
            async with remote.ticks.stream() as stream:
                async for _ in stream:
                    await trio.lowlevel.checkpoint()

        async with serving({"slow": slow, "ticks": ticks}, where, client={"timeout": 0.2}) as (server, remote):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(caller, remote)
                nursery.start_soon(streamer, remote)
                while outcomes.count("answered") < 50:
                    await trio.lowlevel.checkpoint()
                server.stop(5)
                await server.finished()
        assert not [record for record in caplog.records if record.levelno > logging.INFO]
        assert set(outcomes) <= {"answered", "ServerClosing", "CommClosedError", "ConnectError"}


async def test_a_server_that_calls_itself_and_others(where: str, serving: Any) -> None:
    async def forward(name: str, **arguments: Any) -> Any:
        server = current_request().server
        assert isinstance(server, Server)
        return await server.rpc(server.address)[name](**arguments)

    async with serving({"forward": forward, "add": add}, where) as (server, remote):
        assert await remote.forward(name="add", x=3) == 4
        with pytest.raises(RemoteError, match="unknown op 'xyzzy'") as caught:
            await remote.forward(name="xyzzy")
        assert server.rpc.open == 1
        assert caught.value.type_name.endswith("UnknownOp")
    with pytest.raises(RPCClosed):
        await server.rpc(server.address).add(x=1)
