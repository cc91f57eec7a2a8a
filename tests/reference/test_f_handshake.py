"""Group F: handshakes that are slow, that fail, or that never come."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from tests.reference.identities import Identity, ours, theirs
from tests.reference.kit import Journal, Outcome, Wire, quickest, reference, until
from trio_dcore import CommClosedError, ConnectError, Limits, Status
from trio_dcore.comm import BaseComm, get_transport, parse_address
from trio_dcore.protocol import local_handshake
from trio_dcore.testing import ManualPeer

blocked = trio.testing.wait_all_tasks_blocked

HANDSHAKE = ManualPeer.encode(local_handshake(compression=None, window=(16, 2**20)))
# The beginning of a ClientHello, as of any other record of TLS.
CLIENT_HELLO = bytes.fromhex("16 03 01 01 00 01 00 00")


def add(x: int, y: int) -> int:
    return x + y


async def ended(stream: trio.abc.Stream) -> None:
    """Read, whatever comes, until the other side has ended the connection, in order or by a reset."""
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass


@asynccontextmanager
async def half_shaken(wire: Wire, address: str) -> AsyncIterator[list[trio.abc.Stream]]:
    """Connections that have come to different points of their handshakes, and stay there."""
    async with (
        await wire.connect_bytes(address) as silent,
        await wire.connect_bytes(address) as begun,
        await wire.manual(address) as secure,
        await wire.manual(address) as nearly,
    ):
        await begun.send_all(CLIENT_HELLO if wire.transport == "l" else HANDSHAKE[:10])
        await wire.secure(secure)
        await nearly.send_bytes(HANDSHAKE[:-1])
        yield [silent, begun, secure.stream, nearly.stream]


# -- F01: clients that say nothing ----------------------------------------------------------------------------------------------


@reference("F01", "m t u l")
async def test_f01_silent_clients_are_closed_in_time(wire: Wire) -> None:
    limits = Limits(handshake_timeout=wire.seconds(4))
    async with wire.server({"add": add}, limits=limits) as (server, address), wire.client(address) as remote:
        assert await remote.add(x=1, y=2) == 3
        async with half_shaken(wire, address) as streams, trio.open_nursery() as nursery:
            with wire.lasts(4):
                async with trio.open_nursery() as all_of_them:
                    for stream in streams:
                        all_of_them.start_soon(ended, stream)
            await blocked()
            statistics = server.statistics()
            assert (statistics.refused, statistics.handshaking) == (len(streams), 0)
            assert statistics.connections == 1
            nursery.cancel_scope.cancel()
        # Who has shaken hands may stay silent.
        comm = await wire.comm_of(remote, server)
        await trio.sleep(wire.seconds(5))
        assert await wire.comm_of(remote, server) == comm


class Hammer:
    """Connects, says nothing, and connects again when it is thrown out.

    Attributes:
        thrown_out: how often that has happened.
    """

    def __init__(self) -> None:
        self.thrown_out = 0

    async def run(self, wire: Wire, address: str) -> None:
        while True:
            try:
                async with await wire.connect_bytes(address) as stream:
                    await ended(stream)
            except OSError:  # a system whose queue is full refuses
                await trio.sleep(0.01)
            self.thrown_out += 1


@reference("F01", "m t u l", quiet=False)  # the server says that it is at its limit
async def test_f01_silent_ones_do_not_keep_an_honest_client_out(wire: Wire) -> None:
    hammer = Hammer()
    limits = Limits(handshaking=16)
    async with wire.server({"add": add}, limits=limits) as (server, address), trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(hammer.run, wire, address)
        await until(lambda: hammer.thrown_out > 200)
        most = 0.0
        for _ in range(5):
            start = trio.current_time()
            async with wire.client(address) as remote:
                assert await remote.add(x=1, y=2) == 3
            most = max(most, trio.current_time() - start)
            assert server.statistics().handshaking <= 16
        assert most <= 2  # real seconds, as in the table
        nursery.cancel_scope.cancel()
    assert server.statistics().refused > 200
    # At most a line a second, whatever they do; virtual time has not gone on by as much.
    assert 1 <= len(wire.loud()) <= 10
    assert all("Limits(handshaking=16)" in record.getMessage() for record in wire.loud())


# -- F02, F03: servers and clients that are slow --------------------------------------------------------------------------------


async def never_shakes_hands(peer: ManualPeer) -> None:
    await peer.receive()  # over TLS, its own handshake first
    await trio.sleep_forever()


@reference("F02", "m t u l")
async def test_f02_connecting_to_a_silent_server_ends(wire: Wire) -> None:
    async def connects_in_vain(address: str) -> None:
        with wire.lasts(5), pytest.raises(ConnectError, match=r"\(timeout\)") as caught:
            await wire.connect(address, timeout=wire.seconds(5))
        assert address in str(caught.value)

    async def shakes_hands_in_vain(address: str) -> None:
        with wire.lasts(3), pytest.raises(ConnectError, match="Limits.handshake_timeout"):
            await wire.connect(address, limits=Limits(handshake_timeout=wire.seconds(3)), timeout=None)

    async def loses_patience(address: str) -> None:
        with wire.lasts(4), pytest.raises(trio.TooSlowError), trio.fail_after(wire.seconds(4)):
            await wire.connect(address)

    async def calls_in_vain(address: str) -> None:
        async with wire.client(address, timeout=wire.seconds(5)) as remote:
            with wire.lasts(5), pytest.raises(ConnectError):
                await remote.add(x=1, y=2)
            assert remote.pool.open == 0

    async with (
        wire.silent() as accepts_nobody,
        wire.scripted(never_shakes_hands) as listens_only,
        trio.open_nursery() as nursery,
    ):
        for address in (accepts_nobody, listens_only):
            for client in (connects_in_vain, shakes_hands_in_vain, loses_patience, calls_in_vain):
                nursery.start_soon(client, address)


@reference("F03", "m t u l")
async def test_f03_a_client_may_take_its_time(wire: Wire) -> None:
    limits = Limits(handshake_timeout=wire.seconds(5))
    async with wire.server({"add": add}, limits=limits) as (server, address):

        async def shakes_hands_slowly(secure_first: bool, pieces: int) -> None:
            async with await wire.manual(address) as peer:
                if secure_first:  # what then takes its time is Dask's handshake, else over TLS that of TLS
                    await wire.secure(peer)
                for index in range(pieces):
                    await trio.sleep(wire.seconds(4) / pieces)
                    await peer.send_bytes(HANDSHAKE[index * len(HANDSHAKE) // pieces : (index + 1) * len(HANDSHAKE) // pieces])
                await peer.receive()
                await peer.send({"op": "add", "x": 1, "y": 2})
                assert await peer.receive() == 3

        async with trio.open_nursery() as nursery:
            for secure_first in (False, True):
                for pieces in (1, 4):
                    nursery.start_soon(shakes_hands_slowly, secure_first, pieces)
        assert server.statistics().refused == 0


@reference("F03", "m t u l")
async def test_f03_a_server_may_take_its_time(wire: Wire) -> None:
    def script(nominal: float) -> Any:
        async def shakes_hands_slowly(peer: ManualPeer) -> None:
            await peer.receive()
            await trio.sleep(wire.seconds(nominal))
            await peer.send_bytes(HANDSHAKE)
            await peer.receive()
            await peer.send("the answer")

        return shakes_hands_slowly

    limits = Limits(handshake_timeout=wire.seconds(5))
    async with wire.scripted(script(4)) as slow, wire.scripted(script(6)) as too_slow:
        with wire.lasts(4):
            comm = await wire.connect(slow, limits=limits)
        async with comm:
            await comm.write("the question")
            assert await comm.read() == "the answer"
        with wire.lasts(5), pytest.raises(ConnectError):
            await wire.connect(too_slow, limits=limits)


# -- F04, F05: closing in the middle of a handshake -----------------------------------------------------------------------------


@reference("F04", "m t u l")
async def test_f04_handshakes_are_aborted_at_the_stop(wire: Wire) -> None:
    async with wire.server({"add": add}) as (server, address), half_shaken(wire, address) as streams:
        await until(lambda: server.statistics().handshaking == len(streams))
        with wire.now():
            server.stop(grace=30)
            await server.finished()
            for stream in streams:
                await ended(stream)
        assert server.statistics().connections == 0


@reference("F04", "m t u l")
async def test_f04_handshakes_do_not_hold_up_handlers(wire: Wire) -> None:
    """They end at once, while a handler has its grace."""
    journal = Journal()
    async with (
        wire.server({"work": journal.handler(1, wire)}) as (server, address),
        wire.calling(address, journal) as outcome,
        half_shaken(wire, address) as streams,
    ):
        await until(lambda: server.statistics().handshaking == len(streams))
        server.stop(grace=30)
        with wire.now():
            for stream in streams:
                await ended(stream)
        assert journal.entries == ["started"]
        await server.finished()
    assert outcome.value == "done"


@reference("F05", "l", real=True)
async def test_f05_closing_does_not_wait_for_a_client_hello(wire: Wire) -> None:
    async def stop_one() -> float:
        async with wire.server({"add": add}) as (server, address), await wire.connect_bytes(address) as stream:
            await until(lambda: server.statistics().handshaking)
            start = trio.current_time()
            await server.aclose()
            took = trio.current_time() - start
            await ended(stream)
            return took

    assert await quickest(stop_one, 0.05) < 0.05


@reference("F05", "l", real=True)
async def test_f05_closing_a_comm_does_not_shake_hands_first(wire: Wire) -> None:
    async def close_one(how: str) -> float:
        listener, address = await wire.listen_bytes()
        async with listener:
            comm = await get_transport("tls").connect(parse_address(address)[1], wire.settings())
            assert isinstance(comm, BaseComm)
            async with await listener.accept() as stream, trio.open_nursery() as nursery:
                if how == "handshaking":
                    nursery.start_soon(Outcome().of, comm.handshake)
                    await stream.receive_some()
                start = trio.current_time()
                await comm.aclose()
                took = trio.current_time() - start
                await ended(stream)
            return took

    for how in ("untouched", "handshaking"):
        assert await quickest(partial(close_one, how), 0.05) < 0.05


# -- F07: certificates that are not right ---------------------------------------------------------------------------------------


async def refused(wire: Wire, server: Identity, client: Identity, **options: Any) -> str:
    """A client that connects to a server fails at once, after one attempt; returns what it is told."""
    calls: list[int] = []
    handlers = {"add": lambda x, y: calls.append(x)}
    async with wire.server(handlers, security=server.security()) as (running, address), wire.relay(address) as relay:
        security = client.security(**options)
        for operation in (
            partial(wire.connect, relay.address, security=security),
            wire.client(relay.address, security=security).add,
        ):
            relay.passed.clear()
            with wire.now(), pytest.raises(ConnectError) as caught:  # the timeout is 30 s, and nothing is tried again until then
                await operation()
            assert len(relay.passed) == 1
            assert not isinstance(caught.value, ssl.SSLError)
            cause = caught.value.__cause__
            assert not isinstance(cause, ssl.SSLError)
        await until(lambda: not running.statistics().connections)
        assert calls == []
        assert running.status is Status.running
        assert running.statistics().errors == 2
    return str(caught.value)


@reference("F07", "l", real=True)
async def test_f07_a_server_of_another_authority(wire: Wire) -> None:
    assert "CA" in await refused(wire, server=theirs(), client=ours())


@reference("F07", "l", real=True)
async def test_f07_a_client_of_another_authority(wire: Wire) -> None:
    # It believes the server, whose CA it knows; the server does not believe it.
    stranger = Identity(ours().authority, theirs().certificate, theirs().key)
    assert await refused(wire, server=ours(), client=stranger)


@reference("F07", "l", real=True)
async def test_f07_certificates_that_have_expired(wire: Wire) -> None:
    assert "expired" in await refused(wire, server=ours(expired=True), client=ours())
    assert "expired" in await refused(wire, server=ours(), client=ours(expired=True))


@reference("F07", "l", real=True)
async def test_f07_a_certificate_for_another_host(wire: Wire) -> None:
    elsewhere = ours("elsewhere.invalid")
    said = await refused(wire, server=elsewhere, client=ours(), check_hostname=True)
    assert "127.0.0.1" in said
    # As in Dask nobody asks for the host, unless told to; then the name to ask for may be given.
    for options in ({}, {"check_hostname": True, "extra_conn_args": {"server_hostname": "elsewhere.invalid"}}):
        async with (
            wire.server({"add": add}, security=elsewhere.security()) as (_, address),
            wire.client(address, security=ours().security(**options)) as remote,
        ):
            assert await remote.add(x=1, y=2) == 3


@reference("F07", "l", real=True)
async def test_f07_a_client_without_a_certificate(wire: Wire) -> None:
    async with wire.server({"add": add}) as (server, address), wire.client(address) as remote:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = ours().context("client", certificate=False)
            context.maximum_version = version
            with wire.now(), pytest.raises((CommClosedError, trio.BrokenResourceError)):
                async with await wire.manual(address, ssl_context=context) as peer:
                    await peer.handshake()
        await blocked()
        assert server.statistics().requests == {}
        assert await remote.add(x=1, y=2) == 3


# -- F08: the end of a connection -----------------------------------------------------------------------------------------------


async def hangs_up(peer: ManualPeer) -> None:
    """Answer one question and close without a word, as Tornado does."""
    await peer.handshake()
    await peer.receive()
    await peer.send("the answer")
    assert isinstance(peer.stream, trio.SSLStream)
    await peer.stream.transport_stream.aclose()


async def hangs_up_in_a_message(peer: ManualPeer) -> None:
    await peer.handshake()
    await peer.receive()
    await peer.send_bytes(ManualPeer.encode("the answer")[:-1])
    assert isinstance(peer.stream, trio.SSLStream)
    await peer.stream.transport_stream.aclose()


@reference("F08", "l", real=True)
async def test_f08_a_server_that_closes_without_close_notify(wire: Wire) -> None:
    async with wire.scripted(hangs_up) as address:
        async with await wire.connect(address) as comm:
            await comm.write("the question")
            assert await comm.receive() == "the answer"
            with wire.now(), pytest.raises(trio.EndOfChannel):
                await comm.receive()
        async with wire.pool() as pool:
            for _ in range(3):  # each time the connection of before has ended, which costs nothing
                assert await pool(address).question() == "the answer"
                await blocked(0.01)
    async with wire.scripted(hangs_up_in_a_message) as address, await wire.connect(address) as comm:
        await comm.write("the question")
        with wire.now(), pytest.raises(CommClosedError, match="in the middle of a message"):
            await comm.receive()


@reference("F08", "l", real=True)
async def test_f08_a_client_that_closes_without_close_notify(wire: Wire) -> None:
    journal = Journal()
    async with wire.server({"work": journal.handler(60, wire), "add": add}) as (server, address):
        for op in ("add", "work"):
            peer = await wire.manual(address)
            await peer.handshake()
            assert isinstance(peer.stream, trio.SSLStream)
            if op == "add":
                await peer.send({"op": "add", "x": 1, "y": 2, "reply": True})
                assert await peer.receive() == 3
            else:
                await peer.send({"op": "work", "reply": True})
                await journal.started()
            await peer.stream.transport_stream.aclose()
            with wire.now():
                await until(lambda: not server.statistics().connections)
        assert journal.entries == ["started", "cancelled", "finally"]
        assert server.statistics().errors == 0
