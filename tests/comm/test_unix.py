"""unix://: files that are taken, replaced and given back, and peers that are known."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore import (
    AddressError,
    CommClosedError,
    ConnectError,
    ConnectionPool,
    LocalProtocolError,
    Security,
    Server,
    connect,
    current_request,
    rpc,
)
from trio_dcore.abc import CommSettings
from trio_dcore.comm import FramedComm, HangupWatcher, _unix
from trio_dcore.comm._unix import UnixListener, UnixTransport

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no unix sockets")

PATIENCE = 10.0
SETTINGS = CommSettings()
LINUX = sys.platform == "linux"
LONGEST = 107 if LINUX else 103
ROOT = Path(__file__).parent.parent.parent
STRANGER = 12345  # not 65534, as which users of other namespaces appear

linux_only = pytest.mark.skipif(not LINUX, reason="only Linux has abstract names")
needs_root = pytest.mark.skipif(not LINUX or os.geteuid() != 0, reason="only root can become another user")
not_root = pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose path is short; pytest's own may be too long for a socket."""
    made = Path(tempfile.mkdtemp(prefix="u")).resolve()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def path(directory: Path) -> str:
    return str(directory / "s")


@pytest.fixture
def transport() -> UnixTransport:
    return UnixTransport()


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


async def listen(location: str, settings: CommSettings = SETTINGS) -> UnixListener:
    (listener,) = await UnixTransport().listen(location, settings)
    assert isinstance(listener, UnixListener)
    return listener


def bound(path: str, backlog: int | None = None, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A socket of somebody else's."""
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(path)
    if backlog is not None:
        sock.listen(backlog)
    return sock


def make_stale(path: str) -> None:
    bound(path, 1).close()


def fill_queue(path: str) -> list[socket.socket]:
    """Connect until nobody else can."""
    waiting = []
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            sock.connect(path)
        except BlockingIOError:
            sock.close()
            return waiting
        waiting.append(sock)


def close_all(*things: Any) -> None:
    for thing in things:
        getattr(thing, "abort", thing.close)()


def in_a_process(code: str, *arguments: str) -> Any:
    """Run a program and return the JSON that it prints."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=PATIENCE * 2,
    )
    return json.loads(found.stdout)


def add(x: int, y: int) -> int:
    return x + y


async def numbers(count: int) -> Any:
    for number in range(count):
        yield number


class TestUse:
    @pytest.mark.parametrize(
        "name", ["s", "with spaces", "sökät ☃", "port:8080", "#1.2", "a%20b", pytest.param("@" + "a" * 20, marks=linux_only)]
    )
    async def test_servers_and_clients(self, directory: Path, name: str) -> None:
        where = f"unix://{name}" if name.startswith("@") else f"unix://{directory / name}"
        with trio.fail_after(PATIENCE):
            async with Server({"add": add, "numbers": numbers}, grace=0) as server:
                address = await server.listen(where)
                assert address == where == server.address
                with pytest.raises(LocalProtocolError, match="the server has no port"):
                    _ = server.port
                async with rpc(address) as remote:
                    assert await remote.add(x=1, y=2) == 3
                    async with remote.numbers.stream(count=50) as stream:
                        assert [number async for number in stream] == list(range(50))
                    data = bytes(8 * 2**20)
                    assert await remote.echo(data=data) == data
                async with ConnectionPool() as pool:
                    assert await pool(address).add(x=3, y=4) == 7
                async with await connect(address, security=Security(require_encryption=True)) as comm:
                    assert comm.peer_address == address
                    await comm.write({"op": "add", "x": 5, "y": 6})
                    assert await comm.read() == 11
        assert os.listdir(directory) == []

    async def test_the_port_is_that_of_an_address_that_has_one(self, directory: Path) -> None:
        async with Server(grace=0) as server:
            await server.listen(f"unix://{directory}/s:8080")
            address = await server.listen("tcp://127.0.0.1:0")
            assert server.port == int(address.rpartition(":")[2])

    async def test_a_server_that_encrypts(self, path: str) -> None:
        """Nothing leaves the machine, so that is no contradiction."""
        async with Server({"add": add}, security=Security(require_encryption=True), grace=0) as server:
            async with rpc(await server.listen(f"unix://{path}")) as remote:
                assert await remote.add(x=1, y=2) == 3

    async def test_both_ends_know_each_other(self, path: str, transport: UnixTransport) -> None:
        with socket.socket(socket.AF_UNIX) as plain:
            before = plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        listener = await listen(path)
        assert listener.listen_address == listener.contact_address == f"unix://{path}"
        comms = []
        for _ in range(2):
            client = await transport.connect(path, SETTINGS)
            server = await listener.accept()
            comms += [client, server]
            assert (client.peer_address, server.local_address) == (f"unix://{path}",) * 2
            for comm in (client, server):
                assert isinstance(comm, FramedComm)
                assert not comm._pump.socket.getblocking()  # type: ignore[attr-defined]
                assert comm.peer.kind == "unix"
                assert comm.peer.uid == os.geteuid()
                assert comm.peer.trusted, comm.peer.reason
                assert comm._pump.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > before  # type: ignore[attr-defined]
                if LINUX:
                    assert comm.peer.pid == os.getpid()
            assert client.local_address.startswith(f"unix://{path}#{os.getpid()}.")
            if LINUX:
                assert server.peer_address.startswith(f"unix://{path}#{os.getpid()}.")
        # A client has no address of its own: it is told from all others by a number.
        assert len({comms[0].local_address, comms[1].peer_address, comms[2].local_address, comms[3].peer_address}) == 4
        close_all(*comms, listener)

    async def test_objects_travel_between_processes_of_one_user(self, path: str) -> None:
        async with Server(grace=0) as server:
            async with rpc(await server.listen(f"unix://{path}")) as remote:
                assert await remote.echo(data=slice(1, 2)) == slice(1, 2)  # only a pickle can say that

    @pytest.mark.parametrize("step", ["unix_peer", "SocketPump", "FramedComm"])
    def test_a_failure_closes_the_socket(self, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise MemoryError

        monkeypatch.setattr(_unix, step, fail)
        ours, theirs = socket.socketpair()
        with pytest.raises(MemoryError):
            _unix._make_comm(ours, SETTINGS, "unix://x", None)
        assert ours.fileno() == -1
        theirs.close()


class TestNames:
    @pytest.mark.parametrize(
        ("location", "why"),
        [
            ("", "names no path; write for example 'unix:///run/"),
            pytest.param("@", "names no path", marks=linux_only),
            ("/tmp/a\0b", "a zero byte can't be part of a path"),
            ("\0abstract", "a zero byte can't be part of a path"),
            ("@a\0b", "a zero byte can't be part of a path"),
            ("/tmp/\ud800", "can't be encoded as a path"),
            ("/" + "x" * LONGEST, rf"its path has {LONGEST + 1} bytes, and a unix socket's may have {LONGEST}"),
            ("/" + "ö" * 60, rf"its path has 121 bytes, and a unix socket's may have {LONGEST}"),
            pytest.param("@" + "x" * 108, r"its name has 108 bytes, and a unix socket's may have 107", marks=linux_only),
        ],
    )
    async def test_what_is_no_location(self, transport: UnixTransport, location: str, why: str) -> None:
        with pytest.raises(AddressError, match=why):
            await listen(location)
        with pytest.raises(AddressError, match=why):
            await transport.connect(location, SETTINGS)
        with pytest.raises(AddressError, match=why):
            await connect(f"unix://{location}")  # at once

    async def test_the_longest(self, directory: Path, transport: UnixTransport) -> None:
        names = [str(directory / "x") + "y" * (LONGEST - len(str(directory)) - 2)]
        if LINUX:
            names.append("@" + "x" * LONGEST)
        for name in names:
            assert len(name.removeprefix("@")) == LONGEST
            listener = await listen(name)
            close_all(await transport.connect(name, SETTINGS), await listener.accept(), listener)

    async def test_a_relative_path(self, directory: Path, transport: UnixTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        """Others may have another current directory, and this process may get one."""
        monkeypatch.chdir(directory)
        listener = await listen("s")
        assert listener.contact_address == f"unix://{directory}/s"
        close_all(await transport.connect("s", SETTINGS), await listener.accept())
        monkeypatch.chdir("/")
        close_all(await transport.connect(f"{directory}/s", SETTINGS), await listener.accept(), listener)
        assert not (directory / "s").exists()

    async def test_a_relative_path_in_a_deep_directory(
        self, directory: Path, transport: UnixTransport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deep = directory / ("d" * 120)
        deep.mkdir()
        monkeypatch.chdir(deep)
        make_stale("s")
        listener = await listen("s")
        assert listener.contact_address == "unix://s"
        close_all(await transport.connect("s", SETTINGS), await listener.accept())
        monkeypatch.chdir("/")
        listener.close()
        assert os.listdir(deep) == []

    async def test_a_current_directory_that_is_gone(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (directory / "gone").mkdir()
        monkeypatch.chdir(directory / "gone")
        (directory / "gone").rmdir()
        with pytest.raises(FileNotFoundError, match="listening on unix://s: "):
            await listen("s")

    @linux_only
    async def test_an_abstract_name(self, directory: Path, transport: UnixTransport, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(directory)
        name = f"@{directory.name}"
        listener = await listen(name)
        assert os.listdir(directory) == []
        with pytest.raises(OSError, match=f"listening on unix://{name}: Address already in use") as caught:
            await listen(name)
        assert caught.value.errno == errno.EADDRINUSE
        close_all(await transport.connect(name, SETTINGS), await listener.accept(), listener)
        with pytest.raises(ConnectionRefusedError, match=f"connecting to unix://{name}: Connection refused"):
            await transport.connect(name, SETTINGS)
        # A file of such a name has another spelling.
        listener = await listen(f"./{name}")
        assert os.listdir(directory) == [name]
        listener.close()


class TestConnecting:
    async def test_nobody_there(self, path: str, transport: UnixTransport) -> None:
        with pytest.raises(FileNotFoundError, match=f"connecting to unix://{path}: No such file"):
            await transport.connect(path, SETTINGS)
        make_stale(path)
        with pytest.raises(ConnectionRefusedError, match=f"connecting to unix://{path}: Connection refused"):
            await transport.connect(path, SETTINGS)
        Path(path).unlink()
        Path(path).touch()
        with pytest.raises(ConnectionRefusedError, match=f"connecting to unix://{path}: "):
            await transport.connect(path, SETTINGS)

    @pytest.mark.parametrize("stale", [False, True])
    async def test_a_server_that_is_starting(self, path: str, stale: bool, autojump_clock: trio.testing.MockClock) -> None:
        if stale:
            make_stale(path)
        async with Server(grace=0) as server, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                async with await connect(f"unix://{path}", timeout=10) as comm:
                    assert trio.current_time() - begin >= 1
                    assert comm.peer_address == f"unix://{path}"

            begin = trio.current_time()
            await trio.sleep(1)
            await server.listen(f"unix://{path}")

    async def test_a_server_that_never_starts(self, path: str, autojump_clock: trio.testing.MockClock) -> None:
        with pytest.raises(ConnectError, match=rf"could not connect to unix://{path} within 5 s .*No such file") as caught:
            await connect(f"unix://{path}", timeout=5)
        assert isinstance(caught.value.__cause__, FileNotFoundError)

    async def test_a_full_queue(self, path: str, transport: UnixTransport) -> None:
        """It says so at once, where TCP would wait: the attempt goes on when there is room."""
        listener = bound(path, 0)
        waiting = fill_queue(path)
        assert waiting
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                comm = await transport.connect(path, SETTINGS)
                assert taken
                comm.abort()

            taken = False
            await trio.testing.wait_all_tasks_blocked()
            for _ in waiting:
                listener.accept()[0].close()
            taken = True
        close_all(listener, *waiting)

    async def test_a_queue_that_stays_full(self, path: str, autojump_clock: trio.testing.MockClock) -> None:
        listener = bound(path, 0)
        waiting = fill_queue(path)
        begin = trio.current_time()
        with pytest.raises(
            BlockingIOError, match=f"connecting to unix://{path}: the server accepts nobody and its queue is full"
        ):
            await UnixTransport().connect(path, SETTINGS)
        assert 1 <= trio.current_time() - begin < 1.1
        with pytest.raises(ConnectError, match="within 10 s .*its queue is full"):
            await connect(f"unix://{path}", timeout=10)
        with trio.move_on_after(0.5) as scope:
            await UnixTransport().connect(path, SETTINGS)
        assert scope.cancelled_caught
        close_all(listener, *waiting)

    async def test_it_is_a_checkpoint(self, path: str, transport: UnixTransport) -> None:
        listener = await listen(path)
        for call in (lambda: transport.connect(path, SETTINGS), lambda: transport.listen(path + "2", SETTINGS)):
            with trio.testing.assert_checkpoints():
                made: Any = await call()
            close_all(*(made if isinstance(made, list) else [made]))
            with trio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
        (await listener.accept()).abort()
        listener.close()


class TestFiles:
    @pytest.mark.parametrize("mask", [0, 0o022, 0o077, 0o777])
    async def test_the_mode(self, path: str, mask: int, umask: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        bind = _unix._bind_private

        def watched(sock: socket.socket, name: bytes) -> None:
            bind(sock, name)
            seen.append(stat.S_IMODE(os.lstat(path).st_mode))

        monkeypatch.setattr(_unix, "_bind_private", watched)
        umask(mask)
        listener = await listen(path)
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
        assert [mode & ~0o600 for mode in seen] == [0]  # never more, also before it listens
        assert os.umask(mask) == mask
        listener.close()

    async def test_the_mode_where_a_socket_has_none(
        self, path: str, umask: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Elsewhere:
            platform = "darwin"

        monkeypatch.setattr(_unix, "sys", Elsewhere)
        umask(0o002)
        sock = socket.socket(socket.AF_UNIX)
        _unix._bind_private(sock, os.fsencode(path))
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
        assert os.umask(0o002) == 0o002
        with pytest.raises(OSError, match="Invalid argument|already in use"):
            _unix._bind_private(sock, os.fsencode(path))
        assert os.umask(0o002) == 0o002
        sock.close()

    async def test_a_stale_one_is_replaced(self, directory: Path, path: str, transport: UnixTransport) -> None:
        make_stale(path)
        os.chmod(path, 0o666)
        listener = await listen(path)
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
        assert os.listdir(directory) == ["s"]
        close_all(await transport.connect(path, SETTINGS), await listener.accept(), listener)
        assert os.listdir(directory) == []

    async def test_a_server_that_was_killed_leaves_a_stale_one(self, path: str) -> None:
        code = """
            import os, sys, trio, trio_dcore
            async def main():
                async with trio_dcore.Server() as server:
                    await server.listen(f"unix://{sys.argv[1]}")
                    print("1", flush=True)
                    os._exit(0)
            trio.run(main)
        """
        assert in_a_process(code, path) == 1
        assert Path(path).is_socket()
        async with Server({"add": add}, grace=0) as server:
            async with rpc(await server.listen(f"unix://{path}")) as remote:
                assert await remote.add(x=1, y=2) == 3

    async def test_a_live_one_is_not(self, directory: Path, path: str, transport: UnixTransport) -> None:
        listener = await listen(path)
        for _ in range(2):
            with pytest.raises(OSError, match=f"listening on unix://{path}: another server listens on it") as caught:
                await listen(path)
            assert caught.value.errno == errno.EADDRINUSE
        client = await transport.connect(path, SETTINGS)
        comms = [await listener.accept() for _ in range(3)]  # two came to look
        assert os.listdir(directory) == ["s"]
        close_all(*comms, client, listener)

    async def test_nor_is_one_whose_queue_is_full(self, path: str) -> None:
        listener = bound(path, 0)
        waiting = fill_queue(path)
        with pytest.raises(OSError, match="another server listens on it"):
            await listen(path)
        assert Path(path).is_socket()
        close_all(listener, *waiting)

    async def test_nor_is_what_is_no_stream(self, path: str) -> None:
        other = bound(path, None, socket.SOCK_DGRAM)
        with pytest.raises(
            OSError, match="there is a socket of that name, and whether it is in use can't be told: .*rong type"
        ) as caught:
            await listen(path)
        assert caught.value.errno == errno.EADDRINUSE
        assert Path(path).is_socket()
        other.close()

    @pytest.mark.parametrize(
        ("kind", "what"),
        [
            ("file", "a file"),
            ("directory", "a directory"),
            ("pipe", "a pipe"),
            ("link", "a symbolic link"),
            ("dead link", "a symbolic link"),
        ],
    )
    async def test_other_files_are_left_alone(self, directory: Path, path: str, kind: str, what: str) -> None:
        match kind:
            case "file":
                Path(path).write_text("precious")
            case "directory":
                Path(path).mkdir()
            case "pipe":
                os.mkfifo(path)
            case "link":
                make_stale(str(directory / "t"))
                os.symlink("t", path)
            case _:
                os.symlink("nowhere", path)
        before = os.lstat(path)
        names = os.listdir(directory)
        with pytest.raises(
            OSError, match=f"listening on unix://{path}: there is {what} of that name, which is no socket"
        ) as caught:
            await listen(path)
        assert caught.value.errno == errno.EADDRINUSE
        assert os.lstat(path) == before
        assert os.listdir(directory) == names

    async def test_a_directory_that_is_not_there(self, directory: Path) -> None:
        with pytest.raises(FileNotFoundError, match=f"listening on unix://{directory}/no/s: .*No such file"):
            await listen(f"{directory}/no/s")

    @not_root
    async def test_a_directory_of_others(self, directory: Path, path: str) -> None:
        directory.chmod(0o500)
        with pytest.raises(PermissionError, match=f"listening on unix://{path}: .*Permission denied"):
            await listen(path)
        directory.chmod(0o700)

    async def test_given_back_and_taken_again(self, path: str) -> None:
        for _ in range(3):
            listener = await listen(path)
            await listener.aclose()
            listener.close()
            assert not Path(path).exists()

    @pytest.mark.parametrize("other", ["nothing", "file", "server"])
    async def test_only_what_is_ours_is_removed(self, path: str, other: str) -> None:
        listener = await listen(path)
        os.unlink(path)
        theirs = None
        match other:
            case "file":
                Path(path).write_text("precious")
            case "server":
                theirs = await listen(path)
        listener.close()
        assert Path(path).exists() == (other != "nothing")
        if theirs is not None:
            close_all(await UnixTransport().connect(path, SETTINGS), await theirs.accept(), theirs)

    async def test_what_can_not_be_removed(
        self, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def forbidden(path: str) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        listener = await listen(path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", forbidden)
            listener.close()
        assert f"the socket {path} could not be removed: [Errno 1] Operation not permitted" in caplog.text
        (await listen(path)).close()

    async def test_a_failure_after_the_file_was_made(self, directory: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        real = _unix._new_socket

        def unlucky() -> Any:
            class Socket(socket.socket):
                def listen(self, backlog: int = 0) -> None:
                    raise OSError(errno.ENOBUFS, "No buffer space available")

            sock = real()
            return Socket(fileno=sock.detach())

        monkeypatch.setattr(_unix, "_new_socket", unlucky)
        for location in (path, *(["@" + directory.name] if LINUX else [])):
            with pytest.raises(OSError, match=f"listening on unix://{location}: No buffer space"):
                await listen(location)
        assert os.listdir(directory) == []

    async def test_a_path_that_is_taken_again_and_again(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """By somebody who doesn't know of the lock."""
        make_stale(path)
        clear = _unix._clear

        def unlucky(name: bytes, path: str) -> None:
            clear(name, path)
            make_stale(path)

        monkeypatch.setattr(_unix, "_clear", unlucky)
        with pytest.raises(OSError, match=f"listening on unix://{path}: Address already in use"):
            await listen(path)

    async def test_a_path_that_is_given_back_meanwhile(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between a bind that fails and the look, and between the look and the probe."""
        clear, lstat = _unix._clear, os.lstat
        gone: list[Any] = []

        def early(name: bytes, path: str) -> None:
            os.unlink(path)
            clear(name, path)

        def late(path: Any) -> os.stat_result:
            found = lstat(path)
            if not gone:
                gone.append(path)
                os.unlink(path)
            return found

        for owner, name, replacement in ((_unix, "_clear", early), (os, "lstat", late)):
            other = bound(path, 1)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, replacement)
                listener = await listen(path)
            close_all(other, listener)

    async def test_after_the_end_of_trio(self, path: str) -> None:
        code = """
            import os, sys, trio
            from trio_dcore.abc import CommSettings
            from trio_dcore.comm import get_transport
            (listener,) = trio.run(get_transport("unix").listen, sys.argv[1], CommSettings())
            listener.close()
            print(int(os.path.exists(sys.argv[1])))
        """
        assert in_a_process(code, path) == 0


class TestServers:
    """The file goes with its server, however that ends."""

    async def test_a_failed_start(self, directory: Path, path: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            server = Server(grace=0)
            with pytest.raises(OSError, match="already in use"):
                await server.serve(f"unix://{path}", f"tcp://127.0.0.1:{taken.getsockname()[1]}")
            assert server.status.name == "failed"
            assert os.listdir(directory) == []
            other = await listen(path)
            with pytest.raises(OSError, match="another server listens on it"):
                await Server(grace=0).serve(f"unix://{path}2", f"unix://{path}")
            assert os.listdir(directory) == ["s"]
            other.close()

    @pytest.mark.parametrize("how", ["aclose", "cancelled", "error", "cancelled early"])
    async def test_an_end(self, directory: Path, path: str, how: str) -> None:
        async def end(server: Server, scope: trio.CancelScope) -> None:
            match how:
                case "aclose":
                    await server.aclose()
                case "error":
                    raise RuntimeError("for the test")
                case "cancelled":
                    scope.cancel()
                    await trio.sleep_forever()

        with trio.CancelScope() as scope:
            try:
                async with Server(grace=0) as server:
                    if how == "cancelled early":
                        scope.cancel()
                    address = await server.listen(f"unix://{path}")
                    assert os.listdir(directory) == ["s"]
                    async with await connect(address):
                        await end(server, scope)
            except RuntimeError:
                assert how == "error"
        assert os.listdir(directory) == []
        with pytest.raises(ConnectError, match="No such file"):
            await connect(f"unix://{path}", timeout=0.01)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
    async def test_a_forked_child_takes_nothing_away(self, path: str) -> None:
        """It closes its copy; the parent's accepting goes on, also in trio's set of what is waited for."""
        code = """
            import json, os, sys, trio
            from trio_dcore.abc import CommSettings
            from trio_dcore.comm import get_transport

            async def main():
                unix = get_transport("unix")
                (listener,) = await unix.listen(sys.argv[1], CommSettings())
                accepted = []
                async def accept():
                    accepted.append(await listener.accept())
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(accept)
                    await trio.testing.wait_all_tasks_blocked()
                    child = os.fork()
                    if not child:
                        listener.close()
                        os._exit(0)
                    os.waitpid(child, 0)
                    there = os.path.exists(sys.argv[1])
                    with trio.move_on_after(5):
                        client = await unix.connect(sys.argv[1], CommSettings())
                        while not accepted:
                            await trio.sleep(0.001)
                    nursery.cancel_scope.cancel()
                for comm in [client, *accepted]:
                    comm.abort()
                listener.close()
                print(json.dumps([there, len(accepted), os.path.exists(sys.argv[1])]))

            import trio.testing
            trio.run(main)
        """
        assert in_a_process(code, path) == [True, 1, False]


class TestRaces:
    """Two servers that take a path at once: one gets it, and keeps it."""

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
    @pytest.mark.parametrize("stale", [True, False])
    async def test_processes_that_start_at_once(self, path: str, stale: bool) -> None:
        code = """
            import errno, json, os, socket, sys, trio
            from trio_dcore.abc import CommSettings
            from trio_dcore.comm import get_transport

            path, stale = sys.argv[1], sys.argv[2] == "True"

            async def compete(go, answers, done):
                os.read(go, 1)  # all at once: its end
                try:
                    (listener,) = await get_transport("unix").listen(path, CommSettings())
                except OSError as error:
                    os.write(answers, b"l" if error.errno == errno.EADDRINUSE else b"?")
                    os.read(done, 1)
                    return
                os.write(answers, b"w")
                os.read(done, 1)
                listener.close()

            def round_of(count):
                if stale:
                    with socket.socket(socket.AF_UNIX) as sock:
                        sock.bind(path)
                go, start = os.pipe()
                read, answers = os.pipe()
                done, finish = os.pipe()
                children = []
                for _ in range(count):
                    child = os.fork()
                    if not child:
                        os.close(start), os.close(finish), os.close(read)
                        trio.run(compete, go, answers, done)
                        os._exit(0)
                    children.append(child)
                os.close(start)
                found = b""
                while len(found) < count:
                    found += os.read(read, count)
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(path)  # whoever has it is there
                os.close(finish)
                for child in children:
                    os.waitpid(child, 0)
                for descriptor in (go, read, answers, done):
                    os.close(descriptor)
                return "".join(sorted(found.decode())), os.listdir(os.path.dirname(path))

            print(json.dumps([round_of(6) for _ in range(15)]))
        """
        assert in_a_process(code, path, str(stale)) == [["lllllw", []]] * 15

    async def test_one_that_is_about_to_listen_is_waited_for(
        self, directory: Path, path: str, autojump_clock: trio.testing.MockClock
    ) -> None:
        """Until then it looks stale."""
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                with pytest.raises(OSError, match="another server listens on it"):
                    await listen(path)
                assert trio.current_time() - begin >= 1

            begin = trio.current_time()
            async with _unix._locked(path):
                half = bound(path)
                await trio.testing.wait_all_tasks_blocked()
                await trio.sleep(1)
                half.listen(5)
        half.close()
        assert os.listdir(directory) == ["s"]

    async def test_a_holder_that_never_ends(self, directory: Path, path: str, autojump_clock: trio.testing.MockClock) -> None:
        begin = trio.current_time()
        async with _unix._locked(path):
            with pytest.raises(
                OSError, match=f"listening on unix://{path}: another process has held {directory}/.s.lock for 5 s"
            ) as caught:
                await listen(path)
            assert caught.value.errno == errno.EADDRINUSE
            assert 5 <= trio.current_time() - begin < 5.1
            with trio.move_on_after(1) as scope:
                await listen(path)
            assert scope.cancelled_caught
        assert os.listdir(directory) == []

    async def test_a_holder_that_died(self, directory: Path, path: str) -> None:
        (directory / ".s.lock").touch()
        listener = await listen(path)
        assert os.listdir(directory) == ["s"]
        listener.close()

    async def test_a_lock_that_was_removed_while_it_was_opened(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its last holder removes it: whoever has it then has locked nobody out."""
        real = os.open
        opened = 0

        def slow(name: Any, *args: Any, **kwargs: Any) -> int:
            nonlocal opened
            descriptor = real(name, *args, **kwargs)
            opened += str(name).endswith(".lock")
            if opened == 1:
                os.unlink(name)
            return descriptor

        monkeypatch.setattr(os, "open", slow)
        (await listen(path)).close()
        assert opened == 2

    async def test_a_lock_of_somebody_elses(self, directory: Path, path: str) -> None:
        """In a directory for everybody it may be a trap."""
        lock = directory / ".s.lock"
        target = directory / "target"
        target.write_text("precious")
        lock.symlink_to(target)
        with pytest.raises(OSError, match=f"listening on unix://{path}: its lock {lock} can't be opened: .*symbolic links"):
            await listen(path)
        assert target.read_text() == "precious"
        lock.unlink()
        os.mkfifo(lock)
        (await listen(path)).close()  # it may be a pipe: that neither blocks nor harms

    async def test_systems_without_locks(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(_unix.fcntl, "flock", none)
        with pytest.raises(OSError, match=f"listening on unix://{path}: No locks available"):
            await listen(path)
        assert not Path(path).exists()

    async def test_a_lock_that_stays(
        self, directory: Path, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def forbidden(path: str) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", forbidden)
            listener = await listen(path)
        assert "could not be removed: [Errno 1]" in caplog.text
        listener.close()
        (await listen(path)).close()
        assert os.listdir(directory) == []


class TestEnds:
    """What a comm over SocketPump relies on holds of these sockets too."""

    @pytest.mark.skipif(not LINUX, reason="EPOLLRDHUP is Linux's")
    @pytest.mark.parametrize("how", ["close", "half-close", "unread bytes"])
    async def test_hang_ups_are_noticed(self, how: str, nursery: trio.Nursery) -> None:
        watcher = HangupWatcher()
        nursery.start_soon(watcher.run)
        told = []
        server, client = socket.socketpair()
        watcher.watch(server.fileno(), lambda: told.append(1))
        client.send(b"a request")
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not told
        match how:
            case "half-close":
                client.shutdown(socket.SHUT_WR)
            case "unread bytes":
                server.send(b"never read")
                client.close()
            case _:
                client.close()
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert told == [1]
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
        watcher.close()
        close_all(client, server)

    async def test_a_caller_that_goes_ends_its_handler(self, path: str) -> None:
        ended = trio.Event()

        async def wait() -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        with trio.fail_after(PATIENCE):
            async with Server({"wait": wait}, grace=0) as server:
                comm = await connect(await server.listen(f"unix://{path}"))
                await comm.write({"op": "wait"})
                await trio.testing.wait_all_tasks_blocked(0.01)
                comm.abort()
                await ended.wait()

    @pytest.mark.parametrize("end", ["aclose", "abort"])
    async def test_the_last_reply_is_read_although_more_was_sent(
        self, path: str, end: str, two_ends: Callable[..., Awaitable[Any]], handshakes: Callable[..., Awaitable[None]]
    ) -> None:
        """A close with unread data is an error for the peer, but behind what it was sent before, unlike TCP's reset."""
        client, server = await two_ends(f"unix://{path}", SETTINGS, SETTINGS)
        await handshakes(client, server)
        await client.write("a request")
        await client.write(bytes(100_000))  # more than is read ahead
        assert await server.read() == "a request"
        await server.write("the reply")
        if end == "aclose":
            await server.aclose()
        else:
            server.abort()
        assert client.stale()
        assert await client.read() == "the reply"
        if end == "aclose":
            with pytest.raises(trio.EndOfChannel):
                await client.receive()
        else:
            with pytest.raises(CommClosedError, match="reset by peer"):
                await client.receive()
        client.abort()

    async def test_closing_wakes_who_waits(
        self, path: str, two_ends: Callable[..., Awaitable[Any]], handshakes: Callable[..., Awaitable[None]]
    ) -> None:
        """Readers and writers, at both ends."""
        client, server = await two_ends(f"unix://{path}", SETTINGS, SETTINGS)
        await handshakes(client, server)

        async def fails(call: Callable[[], Awaitable[object]]) -> None:
            with pytest.raises(CommClosedError):
                await call()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, client.read)
            nursery.start_soon(fails, lambda: client.write(bytes(2**24)))
            await trio.testing.wait_all_tasks_blocked(0.01)
            client.abort()
        await fails(server.read)
        server.abort()

    async def test_accepting_ends_with_the_listener(self, path: str) -> None:
        listener = await listen(path)
        waiting = await UnixTransport().connect(path, SETTINGS)

        async def accept() -> None:
            (await listener.accept()).abort()
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            await trio.testing.wait_all_tasks_blocked(0.01)
            unaccepted = socket.socket(socket.AF_UNIX)
            listener.close()
            with pytest.raises(FileNotFoundError):
                unaccepted.connect(path)
        close_all(waiting, unaccepted)


@needs_root
class TestOtherUsers:
    """With a real second user id."""

    CALL = """
        import json, os, sys, trio
        from trio_dcore import Security, connect, rpc
        address = sys.argv[1]
        patience = float(sys.argv[4])

        class Canary:
            def __reduce__(self):
                return open, (sys.argv[2], "w")

        async def main():
            async def outcome(call):
                try:
                    return await call()
                except Exception as error:
                    return f"{type(error).__name__}: {error}"
            async with rpc(address, security=Security(pickle=sys.argv[3]), timeout=patience) as remote:
                found = [await outcome(lambda: remote.whoami()), await outcome(lambda: remote.echo(data=Canary()))]
            try:
                async with await connect(address, timeout=patience) as comm:
                    found += [comm.peer.trusted, comm.peer.uid]
            except OSError:
                found += [None, None]
            print(json.dumps(found))

        os.setgroups([]), os.setgid(12345), os.setuid(12345)
        trio.run(main)
    """

    @pytest.fixture
    def public(self, directory: Path) -> Path:
        directory.chmod(0o777)
        return directory

    async def call(self, address: str, public: Path, pickle: str = "always", patience: float = 5) -> Any:
        return await trio.to_thread.run_sync(in_a_process, self.CALL, address, str(public / "canary"), pickle, str(patience))

    def server(self, **options: Any) -> Server:
        def whoami() -> Any:
            peer = current_request().peer
            return [peer.uid, peer.trusted, peer.kind]

        return Server({"whoami": whoami}, grace=0, **options)

    async def test_the_mode_keeps_them_out(self, public: Path, path: str) -> None:
        async with self.server() as server:
            call, echo, trusted, uid = await self.call(await server.listen(f"unix://{path}"), public, patience=0.1)
        assert "Permission denied" in call
        assert "Permission denied" in echo
        assert (trusted, uid) == (None, None)

    @pytest.mark.parametrize("abstract", [False, True])
    async def test_who_gets_in_is_not_trusted(self, public: Path, path: str, abstract: bool) -> None:
        async with self.server() as server:
            address = await server.listen(f"unix://@{public.name}" if abstract else f"unix://{path}")
            if not abstract:
                os.chmod(path, 0o666)
            call, echo, trusted, uid = await self.call(address, public)
            assert call == [STRANGER, False, "unix"]
            assert echo.startswith(("UnsafePayload: ", "RemoteError")), echo
            assert "pickle" in echo
            assert (trusted, uid) == (False, os.geteuid())  # and neither are we, by them
            # With the default they don't even send it.
            _, echo, *_ = await self.call(address, public, "trusted")
            assert echo.startswith("UnsafePayload: "), echo
        assert not (public / "canary").exists()

    async def test_authorize(self, public: Path, path: str) -> None:
        async with self.server(authorize=lambda peer, op: peer.trusted) as server:
            address = await server.listen(f"unix://{path}")
            os.chmod(path, 0o666)
            call, echo, *_ = await self.call(address, public)
            assert call.startswith("NotAllowed: ")
            assert echo.startswith("NotAllowed: ")
            async with rpc(address) as remote:
                assert await remote.whoami() == (os.geteuid(), True, "unix")
