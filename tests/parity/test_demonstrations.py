"""What was seen of stock Dask, done here; docs/demonstrations.md says what it is and what happens there.

Each test bears the id of its row.  Rows that other tests show have none here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import trio
import trio.testing

from tests.parity.conftest import Place
from tests.reference.kit import until
from trio_dcore import ConnectionPool, LimitExceeded, Limits, Server, in_thread, rpc, to_serialize
from trio_dcore.protocol import dumps
from trio_dcore.testing import ManualPeer


class Sleeper:
    """A handler that takes its time, and counts how it ends."""

    def __init__(self) -> None:
        self.started = self.done = self.cancelled = self.most = 0

    @property
    def running(self) -> int:
        return self.started - self.done - self.cancelled

    async def __call__(self, seconds: float = 60) -> str:
        self.started += 1
        self.most = max(self.most, self.running)
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        self.done += 1
        return "done"


async def test_d02_cancelled_calls_stop_their_handlers(place: Place) -> None:
    sleep = Sleeper()
    async with Server({"sleep": sleep}, **place.options) as server:
        async with rpc(await server.listen(place.address), **place.options) as remote:
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(remote.sleep)
                await until(lambda: sleep.running == 50)
                nursery.cancel_scope.cancel()
            await until(lambda: sleep.running == 0)
            assert (sleep.started, sleep.done, sleep.cancelled) == (50, 0, 50)


async def test_d06_failing_calls_keep_their_comm(place: Place) -> None:
    def fail() -> None:
        raise ValueError("no luck")

    async with Server({"fail": fail}, **place.options) as server:
        async with rpc(await server.listen(place.address), **place.options) as remote:
            for _ in range(100):
                with pytest.raises(ValueError, match="no luck"):
                    await remote.fail()
            assert remote.pool.open == server.statistics().connections == 1


async def test_d13_a_call_inside_a_full_pool_ends(place: Place) -> None:
    """The inner call needs the only slot, which the outer one holds: it is told who holds it, and both end."""
    pool = ConnectionPool(1, limits=Limits(pool_wait=0.1), **place.options)

    async def outer() -> str:
        result: str = await pool(server.address).inner()
        return result

    async with pool, Server({"outer": outer, "inner": lambda: "inner"}, **place.options) as server:
        await server.listen(place.address)
        with pytest.raises(LimitExceeded, match=r"within 0.1 s \(Limits.pool_wait\): they are held by outer \(1\)"):
            await pool(server.address).outer()
        assert await pool(server.address).inner() == "inner"


async def test_d15_what_can_not_be_read_is_answered_only_if_somebody_waits(caplog: pytest.LogCaptureFixture) -> None:
    """So nobody ever reads the answer of another request."""
    async with Server() as server, await ManualPeer.connect(await server.listen("tcp://127.0.0.1:0")) as peer:
        await peer.handshake()
        broken = {"op": "echo", "data": to_serialize(5)}
        for reply in (False, True):
            head, header, *_ = dumps({**broken, "reply": reply})
            await peer.send_frames([head, header, b"not a pickle"])
        await peer.send({"op": "echo", "data": 7, "reply": True})
        assert (await peer.receive())["status"] == "uncaught-error"  # of the second one
        assert await peer.receive() == 7
        assert server.statistics().connections == 1


async def test_d16_more_calls_than_comms_take_turns(autojump_clock: trio.testing.MockClock) -> None:
    sleep = Sleeper()
    async with Server({"sleep": sleep}) as server, rpc(await server.listen("inproc://")) as remote:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(600):
                nursery.start_soon(lambda: remote.sleep(seconds=0.3))
        assert trio.current_time() - began == pytest.approx(0.6)
        assert (sleep.done, sleep.most, server.statistics().connections) == (600, 512, 512)


async def test_d22_making_a_server_has_no_side_effects(tmp_path: Path) -> None:
    """No directory, no entry of sys.path, no thread, and no event loop is needed."""
    program = """
import sys, threading
path, threads = list(sys.path), threading.active_count()
from trio_dcore import Server
server = Server({"add": lambda x, y: x + y})
assert sys.path == path and threading.active_count() == threads
server.stop()
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, env=environment, timeout=60, check=False)
    assert run.returncode == 0
    assert list(tmp_path.iterdir()) == []
    before, threads, files = list(sys.path), threading.active_count(), set(os.listdir(tempfile.gettempdir()))
    async with Server() as server:
        await server.listen("tcp://127.0.0.1:0")
        assert sys.path == before
        assert threading.active_count() == threads or all("Trio" in thread.name for thread in threading.enumerate()[threads:])
        assert not [name for name in set(os.listdir(tempfile.gettempdir())) - files if "trio" in name or "dask" in name]


async def test_d23_clients_that_vanish_take_their_handlers_with_them() -> None:
    sleep = Sleeper()
    async with Server({"sleep": sleep}) as server:
        address = await server.listen("tcp://127.0.0.1:0")
        peers = [await ManualPeer.connect(address) for _ in range(20)]
        for peer in peers:
            await peer.handshake()
            await peer.send({"op": "sleep", "reply": True})
        await until(lambda: sleep.running == 20)
        for peer in peers:
            await peer.aclose()
        with trio.fail_after(5):
            await until(lambda: server.statistics().connections == 0)
        assert (sleep.cancelled, sleep.running) == (20, 0)


async def test_d25_a_blocking_handler_in_a_thread_holds_up_nobody(place: Place) -> None:
    go = threading.Event()
    async with Server({"block": in_thread(lambda: go.wait(10))}, **place.options) as server:
        async with rpc(await server.listen(place.address), **place.options) as remote, trio.open_nursery() as nursery:
            nursery.start_soon(remote.block)
            await until(lambda: server.statistics().in_flight == 1)
            began = time.perf_counter()
            for _ in range(10):
                await remote.echo(data=1)
            assert time.perf_counter() - began < 5
            assert server.statistics().in_flight == 1
            go.set()


async def test_d36_arrays_of_any_size_are_results(place: Place) -> None:
    async with Server(**place.options) as server, rpc(await server.listen(place.address), **place.options) as remote:
        for size in (0, 1, 3):
            assert numpy.array_equal(await remote.echo(data=numpy.arange(size)), numpy.arange(size))
        assert remote.pool.open == 1


async def test_d36_names_that_stand_for_something_can_be_called_all_the_same(place: Place) -> None:
    names = ["address", "status", "timeout", "comms", "active", "pool", "close_comms", "_private", "reply"]
    async with Server({name: lambda name=name: name for name in names}, **place.options) as server:
        async with rpc(await server.listen(place.address), **place.options) as remote:
            for name in names:
                assert await remote[name]() == name
            for reserved in ("op", "comm"):
                with pytest.raises(TypeError, match="can't be arguments of a call"):
                    await remote.status(**{reserved: 1})


async def test_d37_calls_that_time_out_leave_nothing_running(place: Place) -> None:
    """Twenty calls, one after the other, each with 20 ms."""
    sleep = Sleeper()
    async with Server({"sleep": sleep}, **place.options) as server:
        async with rpc(await server.listen(place.address), **place.options) as remote:
            for _ in range(20):
                with trio.move_on_after(0.02) as scope:
                    await remote.sleep()
                assert scope.cancelled_caught
            await until(lambda: sleep.running == 0)
            # On a busy machine the time of some may be over before they get there: those are not started.
            assert 0 < sleep.started == sleep.cancelled <= 20
            assert sleep.done == 0
            assert sleep.most < 9  # so many ran at once there


async def test_d40_a_duty_ends_with_its_scope(autojump_clock: trio.testing.MockClock) -> None:
    """What is done now and then is a task beside the server: it has ended when the block has, in the middle of its work or not."""
    ticks: list[float] = []
    ended: list[float] = []

    async def duty() -> None:
        try:
            while True:
                ticks.append(trio.current_time())
                await trio.sleep(1)  # the work
        finally:
            ended.append(trio.current_time())

    async with Server() as server, trio.open_nursery() as duties:
        duties.start_soon(duty)
        await server.listen("inproc://")
        began = trio.current_time()
        await trio.sleep(2.5)
        duties.cancel_scope.cancel()
    assert ticks == [began, began + 1, began + 2]
    assert ended == [began + 2.5]


async def test_d41_a_request_that_nobody_reads_does_not_hold_up_the_end() -> None:
    """An outgoing request of 50 MB is half written when its server is closed."""
    failed: list[str] = []

    async def send() -> None:
        try:
            await server.rpc(silent.contact).take(x=to_serialize(bytes(50_000_000)))
        except Exception as error:
            failed.append(type(error).__name__)

    silent = await Silent.listen()
    async with silent.listening, trio.open_nursery() as nursery, Server() as server:
        await server.listen("tcp://127.0.0.1:0")
        nursery.start_soon(send)
        peer = await silent.accept()
        await until(lambda: server.rpc.active == 1 and server.rpc.connecting == 0)
        await trio.testing.wait_all_tasks_blocked(0.05)
        began = trio.current_time()
        await server.close(timeout=60)
        assert trio.current_time() - began < 5
        await until(lambda: failed)
        await peer.aclose()
    assert failed == ["RPCClosed"]


class Silent:
    """A peer that shakes hands and then reads nothing."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self.listening = listener
        self.contact = f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}"

    @classmethod
    async def listen(cls) -> Silent:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        return cls(listener)

    async def accept(self) -> Any:
        peer = ManualPeer(await self.listening.accept())
        await peer.handshake()
        return peer
