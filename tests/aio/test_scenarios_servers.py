"""What the tests of ``distributed.core`` assert of servers, in asyncio programs; each bears the name that it has there."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.aio.running import Runner
from tests.aio.scenarios import at_once, free_port, ping, until
from tests.parity.conftest import Place, has_ipv6
from trio_dcore.aio import (
    BatchedSend,
    Comm,
    CommClosedError,
    ConnectError,
    HandlerCancelled,
    LocalProtocolError,
    NotAllowed,
    Server,
    Status,
    connect,
    rpc,
    send_recv,
)
from trio_dcore.comm._hosts import get_ip, get_ipv6


def test_server_status_is_always_enum(run: Runner) -> None:
    async def main() -> None:
        async with Server() as server:
            assert isinstance(server.status, Status)
            for value in ("running", Status.closed):
                with pytest.raises(AttributeError):
                    server.status = value  # type: ignore[misc, assignment]
            assert server.status is Status.running

    run(main)


def test_server_status_compare_enum_is_quiet(run: Runner) -> None:
    """In each state that there is; warnings are errors."""

    async def main() -> None:
        server = Server()
        assert server.status == Status.init
        await server.listen("inproc://")
        assert server.status == Status.running
        assert server.status in (Status.running, Status.closing)
        await server.close()
        assert server.status == Status.closed
        assert server.status != Status.failed

    run(main)


def test_server(run: Runner) -> None:
    """One server, called by every spelling of its address, and by hand."""

    async def main() -> None:
        server = Server({"ping": ping})
        with pytest.raises(LocalProtocolError):
            _ = server.port
        async with server:
            with pytest.raises(LocalProtocolError):
                _ = server.port
            await server.listen(0)
            assert server.address == f"tcp://{get_ip()}:{server.port}"
            for address in (("127.0.0.1", server.port), f"127.0.0.1:{server.port}", f"tcp://127.0.0.1:{server.port}"):
                comm = await connect(address)
                assert await comm.write({"op": "ping"}) > 0
                assert await comm.read() == b"pong"
                await comm.write({"op": "ping", "close": True})
                assert await comm.read() == b"pong"
                with pytest.raises(CommClosedError):
                    await comm.read()
                await comm.close()

    run(main)


def test_server_raises_on_blocked_handlers(run: Runner, place: Place) -> None:
    async def main() -> None:
        async with Server({"ping": ping}, blocked_handlers=["ping"], **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                for _ in range(2):
                    with pytest.raises(NotAllowed, match="the op 'ping' is blocked"):
                        await send_recv(comm, op="ping")
                assert (await send_recv(comm, op="identity"))["id"] == server.id

    run(main)


# What listen() is given; where PORT stands in it, a free one.  Then what the host of the contact address is.
PORT = -1
LISTEN = {
    "nothing": (None, "{ip}"),
    "port": (PORT, "{ip}"),
    "port 0": (0, "{ip}"),
    "pair": (("127.0.0.1", PORT), "127.0.0.1"),
    "pair without a host": (("", PORT), "{ip}"),
    "pair with text": (("127.0.0.1", "0"), "127.0.0.1"),
    "list": (["127.0.0.1", 0], "127.0.0.1"),
    "host": ("127.0.0.1", "127.0.0.1"),
    "host and port": (f"127.0.0.1:{PORT}", "127.0.0.1"),
    "port as text": (f":{PORT}", "{ip}"),
    "URI": (f"tcp://127.0.0.1:{PORT}", "127.0.0.1"),
    "URI without a host": (f"tcp://:{PORT}", "{ip}"),
    "URI without a port": ("tcp://127.0.0.1", "127.0.0.1"),
    "v4 wildcard": ("tcp://0.0.0.0:0", "{ip}"),
    "v6 wildcard": ("tcp://[::]:0", "[{ipv6}]"),
    "v6": ("tcp://[::1]:0", "[::1]"),
    "v6 pair": (("::1", PORT), "[::1]"),
}


@pytest.mark.parametrize("form", LISTEN)
def test_server_listen(run: Runner, form: str) -> None:
    argument, host = LISTEN[form]
    if "v6" in form and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    chosen = free_port()

    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(str(PORT), str(chosen))
        if isinstance(value, (tuple, list)):
            return type(value)(map(filled, value))
        return chosen if value == PORT else value

    async def main() -> None:
        async with Server({"ping": ping}) as server:
            address = await server.listen(filled(argument))
            assert server.address == address == server.listeners[0].contact_address
            assert server.port > 1024
            assert (server.port == chosen) is (str(PORT) in str(argument))
            assert address == f"tcp://{host.format(ip=get_ip(), ipv6=get_ipv6())}:{server.port}"
            near = f"tcp://{'[::1]' if 'v6' in form else '127.0.0.1'}:{server.port}"
            for reachable in {address, near}:
                async with rpc(reachable) as remote:
                    assert await remote.ping() == b"pong"
            server.stop()
            await server.finished()
        with pytest.raises(ConnectError):
            await connect(near, timeout=0.05)

    run(main)


def test_server_listen_on_several_and_by_the_class(run: Runner, place: Place) -> None:
    """Without a port, over TLS, by the defaults of a class, and several at once."""

    class Mine(Server):
        default_ip = "127.0.0.1"
        default_port = free_port()

    async def main() -> None:
        async with Mine({"ping": ping}, **place.options) as server:
            addresses = [await server.listen(place.address), await server.listen(None)]
            assert addresses == [*server.addresses]
            expected = "tls" if place.address.startswith("tls") else "tcp"
            if expected == "tcp":
                assert addresses[1] == f"tcp://127.0.0.1:{Mine.default_port}"
            for address in addresses:
                async with rpc(address, **place.options) as remote:
                    assert await remote.ping() == b"pong"

    run(main)


def test_ports(run: Runner) -> None:
    async def main() -> None:
        port = free_port()
        async with Server() as server, Server() as other:
            await server.listen(port)
            assert server.port == port
            with pytest.raises(OSError, match=str(port)) as caught:
                await other.listen(port)
            assert caught.value.errno == errno.EADDRINUSE
            await other.listen()
            assert other.port not in (port, 0)
            assert other.port > 1024

    run(main)


def test_identity(run: Runner, place: Place) -> None:
    class Mine(Server):
        """Whose name is told."""

    async def main() -> None:
        for kind in (Server, Mine):
            async with kind(**place.options) as server:
                async with rpc(await server.listen(place.address), **place.options) as remote:
                    assert await remote.identity() == await remote.identity() == {"type": kind.__name__, "id": server.id}

    run(main)


def test_errors(run: Runner, place: Place) -> None:
    def div(x: float, y: float) -> float:
        return x / y

    async def div_async(x: float, y: float) -> float:
        await asyncio.sleep(0)
        return x / y

    async def main() -> None:
        async with Server({"div": div, "div_async": div_async}, **place.options) as server:
            async with rpc(await server.listen(place.address), **place.options) as remote:
                for op in ("div", "div_async"):
                    assert await remote[op](x=1, y=2) == 0.5
                    with pytest.raises(ZeroDivisionError):
                        await remote[op](x=1, y=0)
                    with pytest.raises(TypeError, match="wrong arguments"):
                        await remote[op](x=1)
                assert remote.pool.open == 1

    run(main)


def test_counters(run: Runner) -> None:
    async def div(x: float, y: float) -> float:
        return x / y

    async def main() -> None:
        async with Server({"div": div}) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
            for y in (1, 2, 3):
                await remote.div(x=1, y=y)
            with pytest.raises(ZeroDivisionError):
                await remote.div(x=1, y=0)
            await remote.identity()
            assert server.statistics().requests == {"div": 4, "identity": 1}

    run(main)


def test_thread_id(run: Runner, place: Place) -> None:
    """Handlers run in the thread of the event loop, of either kind."""

    async def thread() -> int:
        return threading.get_ident()

    async def main() -> None:
        async with Server({"thread": thread, "plain": threading.get_ident}, **place.options) as server:
            async with rpc(await server.listen(place.address), **place.options) as remote:
                assert await remote.thread() == await remote.plain() == threading.get_ident()

    run(main)


def test_close_properly(run: Runner, place: Place) -> None:
    """A close ends handlers in flight, every listener and every connection; nothing of the server is left."""
    ended: list[int] = []

    async def sleep(number: int) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(number)

    async def main() -> None:
        async with Server({"sleep": sleep}, **place.options) as server:
            addresses = [await server.listen(place.address)]
            if not place.address.startswith("unix"):
                addresses += [await server.listen(place.address) for _ in range(3)]
            remotes = [rpc(address, **place.options) for address in addresses]
            calls = asyncio.create_task(at_once(*[remote.sleep(number=number) for number, remote in enumerate(remotes)]))
            await until(lambda: server.statistics().in_flight == len(addresses))
            await server.close(timeout=0)
            assert sorted(ended) == [*range(len(addresses))]
            for outcome in await calls:
                assert isinstance(outcome, (CommClosedError, HandlerCancelled))
            assert server.listeners == ()
            assert server.statistics().connections == server.statistics().in_flight == 0
            for remote in remotes:
                await remote.close_rpc()
            for address in addresses:
                with pytest.raises(ConnectError):
                    await connect(address, timeout=0.05, **place.options)

    run(main)


def test_server_redundant_kwarg(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="unexpected_kwarg"):
            Server({}, unexpected_kwarg="test")  # type: ignore[call-arg]

    run(main)


def test_server_comms_mark_active_handlers(run: Runner, place: Place) -> None:
    """The four counts of connections, through calls in both directions."""

    def counts(server: Server) -> tuple[int, ...]:
        counters = server.get_connection_counters()
        names = ["incoming_comms_open", "incoming_comms_active", "outgoing_comms_open", "outgoing_comms_active"]
        assert list(counters) == names
        return tuple(counters.values())

    async def main() -> None:
        go, started = asyncio.Event(), asyncio.Event()

        async def long() -> str:
            started.set()
            await go.wait()
            return "done"

        async with Server({"wait": long}, **place.options) as server, Server(**place.options) as client:
            address = await server.listen(place.address)
            assert counts(server) == counts(client) == (0, 0, 0, 0)
            async with await connect(address, **place.options) as comm:
                await until(lambda: counts(server) == (1, 0, 0, 0))
                await comm.write({"op": "wait"})
                await started.wait()
                assert counts(server) == (1, 1, 0, 0)
                go.set()
                assert await comm.read() == "done"
                await until(lambda: counts(server) == (1, 0, 0, 0))
            await until(lambda: counts(server) == (0, 0, 0, 0))

            go.clear()
            calls = asyncio.gather(*[client.rpc(address).wait() for _ in range(3)])
            await until(lambda: server.statistics().in_flight == 3)
            assert counts(server) == (3, 3, 0, 0)
            assert counts(client) == (0, 0, 3, 3)
            go.set()
            assert await calls == ["done"] * 3
            assert counts(client) == (0, 0, 3, 0)
            await until(lambda: counts(server) == (3, 0, 0, 0))
            client.rpc.remove(address)
            assert counts(client) == (0, 0, 0, 0)

    run(main)


@pytest.mark.parametrize("how", ["here", "by a call"])
def test_close_fast_without_active_handlers(run: Runner, how: str, place: Place) -> None:
    """A server whose connections are idle is closed at once, whatever its grace."""

    async def main() -> None:
        async def terminate() -> None:
            await server.close(reason="asked to")

        server = Server({"terminate": terminate, "ping": ping}, grace=60, **place.options)
        async with server, rpc(await server.listen(place.address), **place.options) as remote:
            await remote.ping()
            began = time.monotonic()
            if how == "here":
                await server.close()
            else:
                await remote.terminate(reply=False)
                await server.finished()
            assert time.monotonic() - began < 0.5
            assert server.status is Status.closed

    run(main)


def test_close_grace_period_for_handlers(run: Runner, place: Place) -> None:
    """A handler in flight may end, and its answer is delivered; nobody new is let in meanwhile."""

    async def main() -> None:
        go, started = asyncio.Event(), asyncio.Event()

        async def work() -> str:
            started.set()
            await go.wait()
            return "done"

        async with Server({"work": work}, grace=60, **place.options) as server:
            address = await server.listen(place.address)
            async with rpc(address, **place.options) as remote:
                call = asyncio.create_task(remote.work())
                await started.wait()
                closing = asyncio.create_task(server.close())
                await until(lambda: server.status is Status.closing_gracefully)
                with pytest.raises(ConnectError):
                    await connect(address, timeout=0.05, **place.options)
                go.set()
                assert await call == "done"
                await closing
                assert server.status is Status.closed

    run(main)


# Handlers, and whether they are given the comm.
def plain(x: int) -> Any:
    return type(x).__name__


def only(comm: Comm) -> Any:
    return type(comm).__name__


def first(comm: Comm, x: int) -> Any:
    return type(comm).__name__, x


async def first_async(comm: Comm, x: int = 0) -> Any:
    await asyncio.sleep(0)
    return type(comm).__name__, x


def other(stream: int) -> Any:
    return type(stream).__name__


def more(comm: Comm, *args: Any, x: int, **kwargs: Any) -> Any:
    return type(comm).__name__, x, args, kwargs


class Bound:
    """With methods."""

    def method(self, comm: Comm) -> Any:
        return type(comm).__name__

    @classmethod
    async def of_class(cls, comm: Comm, x: int) -> Any:
        return type(comm).__name__, x

    @staticmethod
    def static(comm: Comm) -> Any:
        return type(comm).__name__

    async def __call__(self, comm: Comm, x: int) -> Any:
        return type(comm).__name__, x


EXPECTS: dict[str, tuple[Callable[..., Any], dict[str, Any], Any]] = {
    "plain": (plain, {"x": 1}, "int"),
    "only": (only, {}, "Comm"),
    "first": (first, {"x": 1}, ("Comm", 1)),
    "first_async": (first_async, {"x": 1}, ("Comm", 1)),
    "other": (other, {"stream": 1}, "int"),
    "more": (more, {"x": 1, "y": 2}, ("Comm", 1, (), {"y": 2})),
    "method": (Bound().method, {}, "Comm"),
    "of class": (Bound.of_class, {"x": 1}, ("Comm", 1)),
    "static": (Bound.static, {}, "Comm"),
    "object": (Bound(), {"x": 1}, ("Comm", 1)),
}


def test_expects_comm(run: Runner, place: Place) -> None:
    """A first parameter ``comm`` is given the comm, of asyncio's flavour, whatever kind of callable it is of."""

    async def main() -> None:
        handlers = {op: function for op, (function, _, _) in EXPECTS.items()}
        async with Server(handlers, **place.options) as server:
            async with rpc(await server.listen(place.address), **place.options) as remote:
                for op, (_, arguments, expected) in EXPECTS.items():
                    assert await remote[op](**arguments) == expected

    run(main)


class Ordered(Server):
    """Whose stream handlers keep what comes, in order."""

    def __init__(self, **options: Any) -> None:
        super().__init__({"took": self.took}, stream_handlers={"sync": self.sync, "async": self.slow}, **options)
        self.numbers: list[int] = []

    def sync(self, n: int) -> None:
        self.numbers.append(n)

    async def slow(self, n: int) -> None:
        for _ in range(n % 3):
            await asyncio.sleep(0)
        self.numbers.append(n)

    def took(self) -> list[int]:
        return self.numbers


@pytest.mark.parametrize("how", ["batched", "raw"])
def test_messages_are_ordered(run: Runner, how: str, place: Place) -> None:
    """Those of one stream, whether their handlers wait or not."""
    count = 300
    messages = [{"op": ("sync", "async")[n % 2], "n": n} for n in range(count)]

    async def main() -> None:
        async with Ordered(**place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                await comm.write({"op": "connection_stream", "reply": False})
                if how == "batched":
                    async with BatchedSend(comm, interval="2ms") as stream:
                        for message in messages:
                            stream.send(message)
                else:
                    for message in messages:
                        await comm.write(message)
                await until(lambda: len(server.numbers) == count)
                assert server.numbers == [*range(count)]

    run(main)
