"""Group H: what there is only so much of: connections, descriptors, memory."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from tests.reference.kit import Journal, Outcome, Wire, reference, until
from tests.reference.memory import resident
from trio_dcore import Comm, LimitExceeded, Limits, rpc, to_serialize
from trio_dcore.comm import parse_address, parse_host_port
from trio_dcore.protocol import MiB, local_handshake
from trio_dcore.protocol._envelope import KEY
from trio_dcore.server import _room
from trio_dcore.testing import ManualPeer

blocked = trio.testing.wait_all_tasks_blocked

# Memory is flat if it grows by less, whatever is poured: the kernel's own buffers are not in it, and ours are bounded.
FLAT = 24 * MiB
POURED = 300
DROP = bytes(MiB)


def add(x: int, y: int) -> int:
    return x + y


@contextmanager
def idle_for_long_after(seconds: float) -> Iterator[None]:
    """Connections may have to make room after so many seconds instead of ten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_room, "_IDLE", seconds)
        yield


def large() -> Any:
    """A payload, which is sent as it is.  Zeros that nobody has written take no memory."""
    return to_serialize(bytes(POURED * MiB))


# -- H01: connections -----------------------------------------------------------------------------------------------------------


@reference("H01", "t u l", quiet=False)  # the server says that it is at its limit
async def test_h01_idle_connections_make_room(wire: Wire) -> None:
    journal = Journal()
    with idle_for_long_after(0.3), contextlib.ExitStack() as stack:
        handlers = {"add": add, "work": journal.handler(7, wire)}
        async with wire.server(handlers, limits=Limits(connections=4)) as (server, address):

            def client() -> rpc:
                remote = wire.client(address)
                stack.callback(remote.close_comms)
                return remote

            async with wire.calling(address, journal) as outcome:  # is at work, and so never has to go
                first, second, third = (client() for _ in range(3))
                for remote in (first, second, third):
                    assert await remote.add(x=1, y=2) == 3
                await trio.sleep(0.2)
                assert await first.add(x=1, y=2) == 3  # so the second is the one that has been idle longest
                with wire.takes(0.1):
                    assert await client().add(x=1, y=2) == 3
                assert (server.statistics().connections, server.statistics().expired) == (4, 1)
                (comm,) = first.pool._policy.idle_since
                assert not comm.stale()
                (comm,) = second.pool._policy.idle_since
                assert comm.stale()
                # It can't tell, but that it may have to wait for its turn as others do.
                assert await second.add(x=1, y=2) == 3
                assert server.statistics().connections == 4
                assert not outcome.at > 0
            assert outcome.value == "done"
    assert all("Limits(connections=4)" in record.getMessage() for record in wire.loud())


@reference("H01", "t u l", quiet=False)
async def test_h01_or_accepting_pauses(wire: Wire) -> None:
    release = trio.Event()
    busy = 0

    async def hold() -> str:
        nonlocal busy
        busy += 1
        await release.wait()
        return "done"

    with idle_for_long_after(0.2):
        async with (
            wire.server({"hold": hold, "add": add}, limits=Limits(connections=3)) as (server, address),
            wire.pool() as pool,
            wire.client(address) as newcomer,
            trio.open_nursery() as nursery,
        ):
            outcomes = [Outcome() for _ in range(3)]
            for outcome in outcomes:
                nursery.start_soon(outcome.of, pool(address).hold)
            await until(lambda: busy == 3)
            waiting = Outcome()
            nursery.start_soon(waiting.of, lambda: newcomer.add(x=1, y=2))
            await trio.sleep(0.5)
            # Nobody has to go, and nobody is let in.
            assert server.statistics().connections == 3
            assert [outcome.at > 0 for outcome in [*outcomes, waiting]] == [False] * 4
            release.set()
            for outcome in outcomes:
                await outcome.ended()
                assert outcome.value == "done"
            with wire.takes(0.2):
                await waiting.ended()
            assert waiting.value == 3
            assert server.statistics().connections == 3
    (record,) = (record for record in wire.loud() if "accepting pauses" in record.getMessage())
    assert record.levelno == logging.WARNING


# -- H02: descriptors -----------------------------------------------------------------------------------------------------------


@contextmanager
def no_descriptor_left() -> Iterator[Callable[[], None]]:
    """All the descriptors that the process may have are taken, until what is yielded is called."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, limits[0]), limits[1]))
    taken: list[int] = []

    def give_back() -> None:
        while taken:
            os.close(taken.pop())

    try:
        while True:
            try:
                taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                break
        yield give_back
    finally:
        give_back()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are not limited there")
@reference("H02", "t u", quiet=False)
async def test_h02_out_of_descriptors(wire: Wire) -> None:
    async with wire.server({"add": add}) as (server, address), await wire.manual(address) as old:
        await old.handshake()
        scheme, location = parse_address(address)
        # Connecting takes a descriptor as well, so they are there before.
        sockets = [socket.socket(socket.AF_UNIX if scheme == "unix" else socket.AF_INET) for _ in range(3)]
        try:
            with no_descriptor_left() as give_back:
                for sock in sockets:
                    sock.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        sock.connect(location if scheme == "unix" else parse_host_port(location))
                for _ in range(7):  # more often than it looks whether there are some again
                    await trio.sleep(0.1)
                    # Existing work goes on.
                    await old.send({"op": "add", "x": 1, "y": 2})
                    assert await old.receive() == 3
                assert server.statistics().connections == 1
                loud = [record.getMessage() for record in wire.loud()]
                assert len(loud) == 1, loud  # a second has not gone by yet
                assert all("accepting on" in text and "Too many open files" in text for text in loud)
                give_back()
                with wire.now():
                    for sock in sockets:
                        async with ManualPeer(trio.SocketStream(trio.socket.from_stdlib_socket(sock))) as peer:
                            await peer.handshake()
                            await peer.send({"op": "add", "x": 1, "y": 2})
                            assert await peer.receive() == 3
        finally:
            for sock in sockets:
                sock.close()
        async with wire.client(address) as remote:
            assert await remote.add(x=1, y=2) == 3


# -- H03, H04: nobody reads -----------------------------------------------------------------------------------------------------


class Pouring:
    """Handlers that say more than their caller reads.

    Attributes:
        poured: how many MiB have gone.
        ends: how handlers have ended.
    """

    def __init__(self) -> None:
        self.poured = 0
        self.ends: list[type[BaseException] | None] = []
        self.limits: list[str] = []
        self.handlers: dict[str, Any] = {"write": self.write, "generate": self.generate, "reply": self.reply, "add": add}

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except LimitExceeded as error:
            self.limits.append(error.limit)
            raise
        finally:
            self.ends.append(sys.exc_info()[0])

    async def write(self, comm: Comm) -> None:
        with self._watched():
            for _ in range(POURED):
                await comm.write(DROP)
                self.poured += 1

    async def generate(self) -> AsyncIterator[bytes]:
        with self._watched():
            for _ in range(POURED):
                yield DROP
                self.poured += 1

    def reply(self) -> Any:
        return large()


@reference("H03", "t u l", real=True)
async def test_h03_a_client_that_reads_nothing(wire: Wire) -> None:
    """A handler's own writes block, for as long as it takes; with Limits.stream_stall the connection is closed."""
    for op in ("write", "generate"):
        for stall in (None, 0.25):
            pouring = Pouring()
            async with (
                wire.server(pouring.handlers, limits=Limits(stream_stall=stall)) as (server, address),
                wire.client(address) as bystander,
                await wire.manual(address) as peer,
            ):
                assert await bystander.add(x=1, y=2) == 3
                await peer.handshake()
                with resident() as peak:
                    await peer.send({"op": op})
                    await until(lambda server=server: server.statistics().in_flight)
                    if stall is None:
                        await trio.sleep(0.25)
                        assert server.statistics().in_flight == 1
                        server.stop(0)
                    else:
                        with wire.takes(stall):
                            await until(lambda server=server: server.statistics().connections == 1)
                        assert await bystander.add(x=1, y=2) == 3
                        assert server.statistics().errors == 1
                assert peak.bytes < FLAT, peak
                assert pouring.poured < POURED / 4
                if stall is not None:
                    assert pouring.ends == [LimitExceeded]
                    assert pouring.limits == ["stream_stall"]


@reference("H03", "t u l", real=True)
async def test_h03_replies_that_nobody_reads(wire: Wire) -> None:
    """One large reply, and many: what a server owes is bounded, and Limits.write_stall ends it."""
    for count in (1, POURED):
        pouring = Pouring()
        handlers = {**pouring.handlers, "drop": lambda: DROP}
        async with (
            wire.server(handlers, limits=Limits(write_stall=0.25)) as (server, address),
            wire.client(address) as bystander,
            await wire.manual(address) as peer,
        ):
            assert await bystander.add(x=1, y=2) == 3
            await peer.handshake()
            with resident() as peak, wire.takes(0.25):
                await peer.send_bytes(count * ManualPeer.encode({"op": "reply" if count == 1 else "drop", "reply": True}))
                await until(lambda server=server: server.statistics().connections == 1)
            assert peak.bytes < FLAT, peak
            assert server.statistics().requests.get("drop", 0) < POURED / 4
            assert server.statistics().errors == 1
            assert await bystander.add(x=1, y=2) == 3


@reference("H03", "t u l", real=True)
async def test_h03_a_client_that_reads_slowly_is_none_of_them(wire: Wire) -> None:
    size = 12 * MiB
    async with (
        wire.server({"give": lambda: bytes(size)}, limits=Limits(write_stall=0.2)) as (_, address),
        await wire.manual(address) as peer,
    ):
        await peer.handshake()
        await peer.send({"op": "give", "reply": True})
        received = 0
        start = trio.current_time()
        while received < size:
            size_of_piece = len(await peer.stream.receive_some(MiB // 8))
            received += size_of_piece
            await trio.sleep(size_of_piece / (16 * MiB))
        assert trio.current_time() - start > 0.5


@reference("H04", "t u l", real=True)
async def test_h04_a_server_that_reads_nothing(wire: Wire) -> None:
    """A client's writes block: on a bare comm, in a stream, and as the arguments of calls."""

    async def ignore(comm: Comm) -> None:
        await trio.sleep_forever()

    async def by_hand(peer: ManualPeer) -> None:
        await peer.handshake()
        await trio.sleep_forever()

    poured = 0

    async def pour(comm: Comm) -> None:
        nonlocal poured
        await comm.write({"op": "ignore", "reply": False})
        for _ in range(POURED):
            await comm.write(DROP)
            poured += 1

    async def pour_into_stream(remote: rpc) -> None:
        nonlocal poured
        async with remote.ignore.stream() as stream:
            for _ in range(POURED):
                await stream.send(DROP)
                poured += 1

    async def call(remote: rpc) -> None:
        await remote.ignore(data=large())

    async with wire.server({"ignore": ignore}) as (server, ours), wire.scripted(by_hand) as others:
        for address in (ours, others):
            poured = 0
            with resident() as peak, trio.move_on_after(0.25) as scope:
                async with await wire.connect(address) as comm:
                    await pour(comm)
            assert scope.cancelled_caught
            assert peak.bytes < FLAT, peak
            assert poured < POURED / 4
        poured = 0
        with resident() as peak, trio.move_on_after(0.25) as scope:
            async with wire.client(ours) as remote:
                await pour_into_stream(remote)
        assert scope.cancelled_caught
        assert peak.bytes < FLAT, peak
        assert poured < POURED / 4
        with resident() as peak, trio.move_on_after(0.25) as scope:
            async with wire.client(others) as remote:
                await call(remote)
        assert scope.cancelled_caught
        assert peak.bytes < FLAT, peak
        if wire.transport == "u":
            await until(lambda: server.statistics().connections == 0)
        # Over TCP the end of a connection stands behind what was sent before it, which these handlers never read.
        server.stop(0)


@reference("H04", "t u l", real=True)
async def test_h04_a_stream_that_stalls_is_a_typed_error(wire: Wire) -> None:
    """With Limits.stream_stall, which is off by default: a slow consumer is no fault."""

    async def by_hand(peer: ManualPeer) -> None:
        # With so much credit that it is the kernel who takes nothing more, not we who may not send.
        extension = local_handshake(compression=None, window=(1000, 2**40))[KEY]
        await peer.handshake(extension=True, trio_dcore=extension)
        await trio.sleep_forever()

    async def ignore(comm: Comm) -> None:
        await trio.sleep_forever()

    async with wire.server({"ignore": ignore}, grace=0) as (_, ours), wire.scripted(by_hand) as others:
        for address in (ours, others):
            with wire.takes(0.3), pytest.raises(LimitExceeded) as caught:
                async with wire.client(address, limits=Limits(stream_stall=0.3)) as remote, remote.ignore.stream() as stream:
                    for _ in range(POURED):
                        await stream.send(DROP)
            assert caught.value.limit == "stream_stall"
