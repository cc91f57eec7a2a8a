"""Group M: everything again elsewhere: over other transports, between users, against Dask."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import dask
import pytest
import trio
import trio.testing
from distributed.comm import connect as stock_connect
from distributed.core import Server as StockServer
from distributed.core import rpc as stock_rpc
from distributed.security import Security as StockSecurity

from tests.interop.conftest import Leftovers, Stock
from tests.reference import kit
from tests.reference.identities import ours
from tests.reference.kit import NAMES, Journal, Wire, covers, reference
from trio_dcore import Comm, RemoteError, current_request
from trio_dcore.abc import Peer
from trio_dcore.comm import parse_address
from trio_dcore.testing import FaultStream, memory_stream_pair, no_leaks

GROUPS = {
    "A": "test_a_orderly_stop",
    "B": "test_b_cancelled",
    "C": "test_c_handler_errors",
    "D": "test_d_calls_and_pool",
    "F": "test_f_handshake",
    "G": "test_g_bad_input",
    "H": "test_h_resources",
    "J": "test_j_deadlines",
    "N": "test_n_sweeps",
}
for _module in (*GROUPS.values(), "test_g_payloads"):
    importlib.import_module(f"tests.reference.{_module}")

# What has nothing to do with how connections are made need not be run once more.
OVER_IPV6 = {name: test for row in sorted(kit.TESTS) if row[0] in "ABCDJ" for name, test in sorted(kit.TESTS[row].items())}


# -- M01: transports ------------------------------------------------------------------------------------------------------------


@covers("M01", "m i t u l")
@pytest.mark.parametrize("transport", kit.EXISTING)
@pytest.mark.parametrize("group", GROUPS)
def test_m01_each_group_is_run_over_each_transport(group: str, transport: str) -> None:
    """Which of its rows are, is what docs/shutdown-tests.md says; there inproc, which has no bytes and no descriptors, is left out."""
    rows = [row for row in kit.COVERED if row.startswith(group)]
    over = [row for row in rows if transport in kit.COVERED[row]]
    if group in "FGH" and transport == "i":
        assert not over
    elif group == "H":
        assert bool(over) == (transport in "tul")
    else:
        assert len(over) >= max(1, len(rows) // 2), f"over {NAMES[transport]} only {over}"


@contextmanager
def ipv6() -> Iterator[None]:
    """Skip where this machine has no such loopback interface."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        pytest.skip("there is no IPv6 here")
    yield


@covers("M01", "t")
@pytest.mark.parametrize("name", [name for name, test in OVER_IPV6.items() if "t" in test.transports])  # type: ignore[attr-defined]
def test_m01_over_ipv6(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with ipv6():
        OVER_IPV6[name]("6", caplog)


Pair = tuple[trio.abc.Stream, trio.abc.Stream]


def bare(one: trio.abc.Stream, other: trio.abc.Stream) -> Pair:
    return one, other


def faulty(one: trio.abc.Stream, other: trio.abc.Stream) -> Pair:
    return FaultStream(one), FaultStream(FaultStream(other))


@covers("M01", "m")
@pytest.mark.parametrize("wrap", [bare, faulty])
def test_m01_our_streams_pass_trios_check(wrap: Callable[[trio.abc.Stream, trio.abc.Stream], Pair]) -> None:
    async def pair() -> Pair:
        return wrap(*memory_stream_pair())

    async def clogged() -> Pair:
        """Both directions are full already."""
        ends = memory_stream_pair(capacity=100)
        for stream in ends:
            assert stream.send_nowait(b"x" * 200) == 100
        return wrap(*ends)

    check = trio.testing.check_half_closeable_stream if wrap is bare else trio.testing.check_two_way_stream
    with no_leaks():
        trio.run(check, pair, clogged)


# -- M02: unix paths ------------------------------------------------------------------------------------------------------------


def add(x: int, y: int) -> int:
    return x + y


def path_of(address: str) -> Path:
    return Path(parse_address(address)[1])


def left_behind(path: Path) -> None:
    """What a server leaves that was killed."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()


async def serves(wire: Wire, address: str) -> bool:
    async with wire.client(address) as remote:
        return bool(await remote.add(x=1, y=2) == 3)


@reference("M02", "u", real=True)
async def test_m02_a_stale_path_is_replaced(wire: Wire) -> None:
    where = wire.where
    left_behind(path_of(where))
    async with wire.make_server({"add": add}) as server:
        assert await server.listen(where) == where
        assert await serves(wire, where)
    assert not path_of(where).exists()


@reference("M02", "u", real=True)
async def test_m02_what_is_not_ours_is_left_alone(wire: Wire) -> None:
    for make in (lambda path: path.write_text("a file"), Path.mkdir, lambda path: path.symlink_to("nowhere")):
        where = wire.where
        path = path_of(where)
        make(path)
        before = path.lstat()
        async with wire.make_server() as server:
            with pytest.raises(OSError, match="was left alone|in use"):
                await server.listen(where)
        after = path.lstat()
        assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)
        path.rmdir() if path.is_dir() else path.unlink()


@reference("M02", "u", real=True)
async def test_m02_only_we_may_connect_from_the_start(wire: Wire) -> None:
    for umask in (0, 0o077, 0o777):
        old = os.umask(umask)
        try:
            async with wire.make_server({"add": add}) as server:
                address = await server.listen(wire.where)
                mode = path_of(address).stat().st_mode
                assert stat.S_ISSOCK(mode)
                assert stat.S_IMODE(mode) == 0o600
                assert await serves(wire, address)
        finally:
            os.umask(old)


@reference("M02", "u", real=True)
async def test_m02_only_our_own_file_is_removed(wire: Wire) -> None:
    where = wire.where
    path = path_of(where)
    async with wire.make_server({"add": add}) as first:
        await first.listen(where)
        path.unlink()  # somebody has removed it, and another one has taken its place
        async with wire.make_server({"add": add}) as second:
            await second.listen(where)
            await first.aclose()
            assert path.exists()
            assert await serves(wire, where)
        assert not path.exists()


@reference("M02", "u", real=True)
async def test_m02_a_path_is_given_back_whatever_ends_the_server(wire: Wire) -> None:
    where = wire.where
    for end in ("stop", "cancel", "raise", "second address"):
        with contextlib.suppress(ZeroDivisionError, OSError), trio.CancelScope() as scope:
            async with wire.make_server({"add": add}) as server:
                await server.listen(where)
                assert path_of(where).exists()
                if end == "stop":
                    server.stop(0)
                elif end == "cancel":
                    scope.cancel()
                    await trio.sleep_forever()
                elif end == "raise":
                    raise ZeroDivisionError
                else:
                    await server.listen(where)
        assert list(path_of(where).parent.iterdir()) == []


OTHER_USER = """
import json, os, sys, trio
from distributed.protocol.core import dumps
from trio_dcore import NotAllowed, RemoteError, UnsafePayload, rpc
from trio_dcore.testing import ManualPeer

class Canary:
    def __reduce__(self):
        return print, ("sung",)

async def outcome(call, **kwargs):
    try:
        return await call(**kwargs)
    except (NotAllowed, UnsafePayload, RemoteError) as error:
        return type(error).__name__

async def main():
    async with rpc(sys.argv[1]) as remote:
        who = await remote.who()
        # The server is a stranger to us as well, so what we send is made by hand.
        async with await ManualPeer.connect(sys.argv[1]) as peer:
            await peer.handshake(extension=True)
            await peer.send_frames(dumps({"op": "who", "x": Canary(), "trio-dcore": {"id": 1}}))
            kind, _, error = await peer.receive()
        print(json.dumps({
            "who": who,
            "sent": error["code"],
            "received": await outcome(remote.canary),
            "forbidden": await outcome(remote.forbidden),
        }))

# All that is needed has been read, as far as that goes: this user may not be able to.
rpc("unix:///nowhere").pool.close_now()
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
trio.run(main)
"""


class Canary:
    """Pickled by the server, for another user."""

    def __reduce__(self) -> Any:
        return print, ("sung",)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be another user")
@reference("M02", "u", real=True)
async def test_m02_another_user_is_a_stranger(wire: Wire) -> None:
    assert wire.folder is not None
    calls: list[str] = []

    def who(x: Any = None) -> list[Any]:
        peer = current_request().peer
        return [peer.kind, peer.uid, peer.trusted, peer.reason]

    def authorize(peer: Peer, op: str) -> bool:
        return op != "forbidden" or peer.uid == os.geteuid()

    handlers = {"who": who, "canary": Canary, "forbidden": lambda: calls.append("forbidden")}
    nobody = 65534
    async with wire.server(handlers, authorize=authorize) as (_, address), wire.client(address) as remote:
        wire.folder.chmod(0o755)
        path_of(address).chmod(0o666)
        path = os.pathsep.join(str(Path(each).resolve()) for each in sys.path if each)
        run = await trio.run_process(
            [sys.executable, "-c", OTHER_USER, address],
            env={**os.environ, "PYTHONPATH": path},
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr.decode()
        found = json.loads(run.stdout)  # and nothing has sung
        kind, uid, trusted, reason = found["who"]
        assert (kind, uid, trusted) == ("unix", nobody, False)
        assert str(nobody) in reason
        assert found["sent"] == "unsafe"
        assert "UnsafePayload" in found["received"]
        assert found["forbidden"] == "NotAllowed"
        assert calls == []
        # We, by the same path, are no stranger.
        assert list(await remote.who())[:3] == ["unix", os.geteuid(), True]
        await remote.forbidden()
        assert calls == ["forbidden"]


# -- M03: Dask ------------------------------------------------------------------------------------------------------------------


def stock_security(scheme: str) -> StockSecurity | None:
    if scheme == "tcp":
        return None
    identity = ours()
    files = {f"tls_{role}_cert": identity.certificate for role in ("client", "scheduler", "worker")}
    keys = {f"tls_{role}_key": identity.key for role in ("client", "scheduler", "worker")}
    return StockSecurity(tls_ca_file=identity.authority, require_encryption=True, **files, **keys)


class Dask:
    """Stock code in its own loop, over one scheme."""

    def __init__(self, side: Stock, scheme: str) -> None:
        self.side = side
        self.scheme = scheme
        self._security = stock_security(scheme)
        self._connecting = {} if self._security is None else self._security.get_connection_args("client")
        self._listening = {} if self._security is None else self._security.get_listen_args("worker")

    @asynccontextmanager
    async def server(self, handlers: dict[str, Any], scratch: Path) -> AsyncIterator[str]:
        async def start() -> StockServer:
            server: StockServer = await StockServer(handlers, local_directory=str(scratch), connection_args=self._connecting)
            await server.listen(f"{self.scheme}://127.0.0.1:0", **self._listening)
            return server

        server = await self.side.run(start)
        try:
            yield server.address
        finally:
            with trio.CancelScope(shield=True):
                await self.side.run(server.close)

    def rpc(self, address: str) -> Any:
        return stock_rpc(address, connection_args=self._connecting)

    async def connect(self, address: str) -> Any:
        return await stock_connect(address, **self._connecting)

    async def tasks(self) -> list[str]:
        """Tasks that are left in the loop, once those that are about to end have had a moment for that."""

        async def look() -> list[str]:
            for _ in range(100):
                left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
                if len(left) <= 1:  # the one that holds the loop open
                    return []
                await asyncio.sleep(0.01)
            return left

        found: list[str] = await self.side.run(look)
        return found


Scenario = Callable[[Dask, str, Path], Awaitable[None]]


async def we_call_stock(dask_side: Dask, wire: Wire, scratch: Path) -> None:
    events: list[str] = []

    def fail() -> None:
        raise ValueError("nope")

    async def count(comm: Any, n: int) -> str:
        for i in range(n):
            await comm.write(i)
        return "dont-reply"

    async def hang() -> None:
        events.append("began")
        try:
            await asyncio.sleep(3600)
        finally:
            events.append("ended")

    handlers = {"add": add, "fail": fail, "count": count, "hang": hang}
    async with dask_side.server(handlers, scratch) as address, wire.client(address) as remote:
        assert (await remote.identity())["type"] == "Server"
        assert await remote.add(x=1, y=2) == 3
        with pytest.raises(ValueError, match="nope") as caught:
            await remote.fail()
        assert isinstance(caught.value, RemoteError)
        async with remote.count.stream(n=5) as stream:
            assert await some(stream, 5) == list(range(5))
        with trio.move_on_after(0.1) as scope:
            await remote.hang()
        assert scope.cancelled_caught
        assert events[:1] == ["began"]
        assert await remote.add(x=3, y=4) == 7
        async with await wire.connect(address) as comm:
            await comm.write({"op": "close", "reply": True})
            assert await comm.read() == "OK"
            with pytest.raises(trio.EndOfChannel):
                await comm.receive()
    assert events == ["began", "ended"]


async def some(stream: AsyncIterator[Any], count: int) -> list[Any]:
    found = []
    async for item in stream:
        found.append(item)
        if len(found) == count:
            break
    return found


async def stock_calls_us(dask_side: Dask, wire: Wire, scratch: Path) -> None:
    journal = Journal()

    def fail() -> None:
        raise ValueError("nope")

    async def count(comm: Comm, n: int) -> None:
        for i in range(n):
            await comm.write(i)

    handlers = {"add": add, "fail": fail, "count": count, "hang": journal.handler(3600, wire)}
    async with wire.server(handlers) as (server, address):

        async def calls() -> None:
            async with dask_side.rpc(address) as remote:
                assert (await remote.identity())["type"] == "Server"
                assert await remote.add(x=1, y=2) == 3
                with pytest.raises(ValueError, match="nope"):
                    await remote.fail()
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(remote.hang(), 0.1)
                assert await remote.add(x=3, y=4) == 7
            comm = await dask_side.connect(address)
            await comm.write({"op": "count", "n": 5, "reply": False})
            assert [await comm.read() for _ in range(5)] == list(range(5))
            await comm.write({"op": "close", "reply": True})
            assert await comm.read() == "OK"
            await comm.close()

        await dask_side.side.run(calls)
        await journal.ended()
        assert journal.entries == ["started", "cancelled", "finally"]
        await kit.until(lambda: not server.statistics().connections)
        assert server.statistics().errors == 0


@covers("M03", "t l")
@pytest.mark.parametrize("scenario", [we_call_stock, stock_calls_us])
@pytest.mark.parametrize("transport", [pytest.param(letter, id=NAMES[letter]) for letter in "tl"])
def test_m03_dask_both_ways(
    transport: str, scenario: Callable[[Dask, Wire, Path], Awaitable[None]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(wire: Wire) -> None:
        dask_side = Dask(side, {"t": "tcp", "l": "tls"}[transport])
        await scenario(dask_side, wire, tmp_path)
        assert await dask_side.tasks() == []

    async def main() -> None:
        await body(Wire(transport, None))

    caplog.set_level(logging.INFO)
    leftovers = Leftovers()
    with dask.config.set({"distributed.comm.timeouts.connect": "10s"}), Stock(tmp_path) as side:
        trio.run(main)
    assert leftovers.found() == []
    loud = [record.getMessage() for record in caplog.records if kit.is_loud(record)]
    assert not loud
