"""Accepting connections: when there are too many of them, no more descriptors, or listeners that misbehave."""

from __future__ import annotations

import errno
import itertools
import logging
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trio_dcore
from trio_dcore import ConnectError, Limits, Server, Status, connect, rpc
from trio_dcore.abc import CommSettings, Listener
from trio_dcore.comm import get_transport
from trio_dcore.testing import memory_network, no_leaks


def add(x: int, y: int = 1) -> int:
    return x + y


@pytest.fixture
def accepting(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace what listeners of inproc:// do: ``accepting(wrapper)``, which gets the original ``accept``."""

    def replace(wrapper: Any) -> None:
        transport = get_transport("inproc")
        original = transport.listen

        async def listen(location: str, settings: CommSettings) -> Any:
            (listener,) = await original(location, settings)
            accept = listener.accept
            monkeypatch.setattr(listener, "accept", lambda: wrapper(accept))
            return [listener]

        monkeypatch.setattr(transport, "listen", listen)

    return replace


class TestExhausted:
    @pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
    async def test_accepting_pauses(
        self, number: int, accepting: Any, caplog: pytest.LogCaptureFixture, autojump_clock: Any
    ) -> None:
        """H02: accepting goes on when some are free again, and the log is told once a second at most."""
        tries = 0
        until = trio.current_time() + 3

        async def scarce(accept: Any) -> Any:
            nonlocal tries
            if trio.current_time() < until:
                tries += 1
                await trio.lowlevel.checkpoint()
                raise OSError(number, "none left")
            return await accept()

        accepting(scarce)
        async with Server({"add": add}) as server, rpc(await server.listen("inproc://")) as remote:
            assert await remote.add(x=1) == 2
            assert until <= trio.current_time() <= until + 0.11
        assert tries <= 31
        assert len(caplog.records) == 3
        assert "pauses" in caplog.text
        assert "(and 9 more like this before)" in caplog.text

    async def test_a_connection_that_ends_lets_it_go_on(self, accepting: Any, autojump_clock: Any) -> None:
        free = 1

        async def scarce(accept: Any) -> Any:
            nonlocal free
            comm = await accept() if free else None
            if comm is None:
                await trio.lowlevel.checkpoint()
                raise OSError(errno.EMFILE, "none left")
            free -= 1
            return comm

        accepting(scarce)
        async with Server({"add": add}) as server:
            first = await connect(await server.listen("inproc://"))
            await trio.sleep(0.51)

            async def leave() -> None:
                nonlocal free
                await trio.sleep(0.05)
                free += 1
                await first.aclose()

            async with trio.open_nursery() as nursery, rpc(server.address) as remote:
                nursery.start_soon(leave)
                assert await remote.add(x=1) == 2
                assert trio.current_time() == pytest.approx(0.56)

    @pytest.mark.parametrize("grace", [0, 60])
    async def test_stopping_meanwhile(self, grace: float, accepting: Any, autojump_clock: Any) -> None:
        async def never(accept: Any) -> Any:
            await trio.lowlevel.checkpoint()
            raise OSError(errno.EMFILE, "none left")

        accepting(never)
        async with no_leaks(), Server() as server:
            await server.listen("inproc://")
            await trio.sleep(0.25)
            server.stop(grace)
            await server.finished()
            assert trio.current_time() == 0.25

    async def test_several_listeners_share_the_line(
        self, accepting: Any, caplog: pytest.LogCaptureFixture, autojump_clock: Any
    ) -> None:
        async def never(accept: Any) -> Any:
            await trio.lowlevel.checkpoint()
            raise OSError(errno.EMFILE, "none left")

        accepting(never)
        async with Server() as server:
            for _ in range(3):
                await server.listen("inproc://")
            await trio.sleep(1.95)
        assert len(caplog.records) == 2

    async def test_a_hang_up_watch_that_can_not_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The peer's end is then noticed in another way."""

        def no_watch(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "no watches left")

        ended = trio.Event()

        async def wait() -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        monkeypatch.setattr("trio_dcore.comm.HangupWatcher.watch", no_watch)
        async with no_leaks(), Server({"wait": wait, "add": add}) as server:
            address = await server.listen("tcp://127.0.0.1:0")
            async with rpc(address) as remote:
                assert await remote.add(x=1) == 2
                with trio.move_on_after(0.05):
                    await remote.wait()
                with trio.fail_after(5):
                    await ended.wait()

    async def test_no_socket_to_connect_with(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_socket(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.EMFILE, "none left")

        async with no_leaks(), Server({"add": add}) as server:
            address = await server.listen("tcp://127.0.0.1:0")
            async with rpc(address, timeout=0.1) as remote:
                with monkeypatch.context() as patch:
                    patch.setattr("trio_dcore.comm._tcp.socket.socket", no_socket)
                    with pytest.raises(ConnectError, match="none left"):
                        await remote.add(x=1)
                assert await remote.add(x=1) == 2


_SCRIPT = """
import logging, resource, sys
import trio
from trio_dcore import ConnectError, Limits, Server, connect

async def main():
    logging.basicConfig(level="INFO", stream=sys.stderr)
    server = Server({"dial": lambda: dial(server.address)}, limits=Limits(connections=None, handshake_timeout=None), grace=1)
    async with server:
        print(await server.listen("tcp://127.0.0.1:0"), flush=True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
        await trio.to_thread.run_sync(sys.stdin.read)

async def dial(address):
    try:
        comm = await connect(address, timeout=0.2)
    except ConnectError as error:
        return str(error)
    await comm.aclose()
    return "connected"

trio.run(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_NOFILE")
async def test_a_process_without_descriptors() -> None:
    """H02, for real: whom it serves it goes on to serve, the others get their turn later, and its log stays small."""
    process = await trio.to_thread.run_sync(
        lambda: subprocess.Popen(
            [sys.executable, "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(trio_dcore.__file__).parent.parent,
        )
    )
    sockets: list[socket.socket] = []
    try:
        assert process.stdout is not None
        address = (await trio.to_thread.run_sync(process.stdout.readline)).strip()
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        start = time.monotonic()
        async with rpc(address) as remote:
            assert await remote.dial() == "connected"
            sockets.extend(socket.create_connection((host, int(port))) for _ in range(60))
            await trio.sleep(0.3)
            assert "Too many open files" in await remote.dial()
            async with rpc(address, timeout=0.3) as other:
                with pytest.raises(ConnectError):
                    await other.echo(data=1)
            seconds = time.monotonic() - start
            for sock in sockets:
                sock.close()
            async with rpc(address) as other:
                assert await other.echo(data=1) == 1
            assert await remote.dial() == "connected"
        _, log = await trio.to_thread.run_sync(process.communicate)
        assert process.returncode == 0
        lines = log.splitlines()
        pauses = [line for line in lines if "accepting on" in line]
        assert 1 <= len(pauses) <= 1 + seconds
        assert "Too many open files" in pauses[0]
        assert "Traceback" not in log
        assert len(lines) <= len(pauses) + 70  # a line for each connection that ended without a handshake, at the very most
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


class TestListenersThatMisbehave:
    @pytest.mark.parametrize("number", [errno.EBADF, errno.ENOTSOCK])
    async def test_one_that_is_broken_ends_the_server(self, number: int, accepting: Any) -> None:
        async def fail(accept: Any) -> Any:
            await go.wait()
            raise OSError(number, "broken")

        accepting(fail)
        go = trio.Event()
        with pytest.raises(OSError, match="broken"):
            async with Server() as server:
                await server.listen("inproc://")
                go.set()
                await trio.sleep_forever()
        assert server.status is Status.closed

    @pytest.mark.parametrize("error", [OSError(errno.EIO, "who knows"), OSError("no number"), ssl.SSLError(1, "who knows")])
    async def test_whatever_else_fails_passes(
        self, error: OSError, accepting: Any, caplog: pytest.LogCaptureFixture, autojump_clock: Any
    ) -> None:
        """Accepting pauses for a moment, so that it can't turn in circles, and whoever is served goes on."""
        failing = 0

        async def fail(accept: Any) -> Any:
            nonlocal failing
            if failing:
                failing -= 1
                raise error
            return await accept()

        accepting(fail)
        async with no_leaks(), Server({"add": add}) as server, rpc(await server.listen("inproc://")) as old:
            assert await old.add(x=1) == 2
            failing = 3
            async with rpc(server.address) as first, rpc(server.address) as other:
                assert await first.add(x=1) == 2  # accept() was waiting for this one
                assert await other.add(x=1) == 2
            assert trio.current_time() == pytest.approx(0.2)  # the end of the first one's handshake ends a pause
            assert await old.add(x=1) == 2
        (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
        assert f"accepting on {server.address} pauses: {error}" in record.getMessage()

    @pytest.mark.parametrize("error", [OSError(errno.EIO, "who knows"), OSError(errno.ENOTSOCK, "its"), ssl.SSLError(1, "what")])
    async def test_a_connection_that_can_not_be_used(
        self, error: OSError, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is closed, and costs nobody else anything, not even time."""
        left = 100

        def fail(*args: Any) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                raise error

        async with no_leaks(), Server({"add": add}) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as old:
            assert await old.add(x=1) == 2
            sockets = [socket.socket() for _ in range(left)]
            with monkeypatch.context() as patch:
                patch.setattr("trio_dcore.comm._tcp.set_options", fail)
                start = trio.current_time()
                for sock in sockets:
                    sock.connect(("127.0.0.1", server.port))
                while left > 0:
                    await trio.lowlevel.checkpoint()
                assert trio.current_time() - start < 1  # a pause for each would be 10 s
            for sock in sockets:
                sock.settimeout(1)
                assert sock.recv(1) == b""
                sock.close()
            assert await old.add(x=1) == 2
            async with rpc(server.address) as remote:
                assert await remote.add(x=1) == 2
        (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
        assert "can't be used and was closed: " in record.getMessage()

    async def test_one_that_makes_no_comms_of_ours(
        self, accepting: Any, caplog: pytest.LogCaptureFixture, autojump_clock: Any
    ) -> None:
        """A mistake in somebody's transport costs its connections, and the log a line a second; the server goes on."""
        aborted: list[int] = []
        odd: list[Any] = [Odd(aborted), "no comm at all", Odd(aborted), None]

        async def wrong(accept: Any) -> Any:
            return odd.pop() if odd else await accept()

        accepting(wrong)
        async with no_leaks(), Server({"add": add}) as server, rpc(await server.listen("inproc://")) as remote:
            assert await remote.add(x=1) == 2
        assert len(aborted) == 2
        (record,) = caplog.records
        assert record.levelname == "ERROR"
        assert "its listener made None, which is no trio_dcore.comm.BaseComm" in record.getMessage()

    async def test_one_that_never_waits(self) -> None:
        """However many connections there are to accept, other tasks get their turn in between."""
        async with Server(limits=Limits(handshaking=None, connections=None)) as server:
            await server.listen("inproc://")
            (listener,) = server._listeners
            others = [listener.connect(CommSettings()) for _ in range(1000)]  # type: ignore[attr-defined]
            seen = [0]
            while seen[-1] < len(others):
                await trio.lowlevel.checkpoint()
                seen.append(server.statistics().connections)
            assert max(after - before for before, after in itertools.pairwise(seen)) <= 16
            for comm in others:
                comm.abort()


class Odd(trio_dcore.Comm):
    """A comm that lacks what servers need."""

    def __init__(self, aborted: list[int]) -> None:
        self._aborted = aborted

    def abort(self) -> None:
        self._aborted.append(1)

    async def write(self, message: Any, **options: Any) -> int:
        raise NotImplementedError

    async def send(self, value: Any) -> None:
        raise NotImplementedError

    async def read(self) -> Any:
        raise NotImplementedError

    async def receive(self) -> Any:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    def closed(self) -> bool:
        return False

    local_address = peer_address = "odd://"
    peer: Any = None


async def test_a_closed_listener_is_no_failure() -> None:
    async with no_leaks(), Server() as server:
        await server.listen("inproc://")
        first: Listener = server._listeners[0]
        await wait_all_tasks_blocked()
        first.close()
        await wait_all_tasks_blocked()
        assert server.status is Status.running


async def test_an_honest_client_while_silent_ones_hammer() -> None:
    """F01 over tcp: 200 silent connections, each made anew as soon as it is closed."""
    async with no_leaks(), Server({"add": add}, limits=Limits(handshaking=16)) as server:
        address = await server.listen("tcp://127.0.0.1:0")

        async def hammer() -> None:
            while True:
                stream = await trio.open_tcp_stream("127.0.0.1", server.port)
                async with stream:
                    try:
                        while await stream.receive_some():
                            pass
                    except trio.BrokenResourceError:
                        pass

        async with trio.open_nursery() as nursery, rpc(address) as working:
            assert await working.add(x=1) == 2
            for _ in range(200):
                nursery.start_soon(hammer)
            await trio.sleep(0.2)
            for _ in range(5):
                start = trio.current_time()
                async with rpc(address) as remote:
                    assert await remote.add(x=1) == 2
                assert trio.current_time() - start < 2
                start = trio.current_time()
                assert await working.add(x=2) == 3  # a connection that is there is not held up
                assert trio.current_time() - start < 0.5
            assert server.statistics().refused > 100
            nursery.cancel_scope.cancel()


async def test_stopping_under_a_flood_is_immediate(autojump_clock: Any) -> None:
    with memory_network() as network:
        async with no_leaks():
            async with Server(limits=Limits(handshaking=4)) as server:
                address = await server.listen("memory://")
                streams = [await network.connect_stream(address) for _ in range(50)]
                await wait_all_tasks_blocked()
                start = trio.current_time()
            assert trio.current_time() == start
            for stream in streams:
                await stream.aclose()
