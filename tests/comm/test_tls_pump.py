"""The pump of tls://: bytes, records and what the kernel takes of them."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.comm.raw_tls import RawTLS
from tests.reference.identities import ours
from trio_dcore import CommClosedError, Limits, RemoteProtocolError
from trio_dcore.abc import CommSettings, Peer
from trio_dcore.comm import Pump, _tls_pump
from trio_dcore.comm._tls import TLSComm
from trio_dcore.comm._tls_context import tls_context
from trio_dcore.comm._tls_pump import TLSPump
from trio_dcore.protocol import dumps, local_handshake
from trio_dcore.protocol._frames import FrameParser, pack_prelude, single_frame

PATIENCE = 10.0
MUCH = 2**20


def socket_pair(buffer: int | None = None) -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.socket()
        if buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                client.setsockopt(socket.SOL_SOCKET, option, buffer)
        client.connect(listener.getsockname())
        server = listener.accept()[0]
        if buffer is not None:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        return client, server


def client_pump(sock: socket.socket) -> TLSPump:
    return TLSPump(sock, tls_context(ours().security(), "connect"), server_side=False, server_hostname="localhost")


def server_pump(sock: socket.socket) -> TLSPump:
    return TLSPump(sock, tls_context(ours().security(), "listen"), server_side=True)


def comm_over(pump: Pump, **settings: Any) -> TLSComm:
    assert isinstance(pump, TLSPump)
    peer = Peer("tls://127.0.0.1:1", "tls")
    return TLSComm(
        pump, local_address="tls://127.0.0.1:2", peer=peer, settings=CommSettings(security=ours().security(), **settings)
    )


@asynccontextmanager
async def against_raw(side: str = "client", buffer: int | None = None) -> AsyncIterator[tuple[TLSPump, RawTLS]]:
    """A pump that is the given side, and the raw other side, after the handshake of TLS."""
    a, b = socket_pair(buffer)
    pump = (client_pump if side == "client" else server_pump)(a)
    other = "server" if side == "client" else "client"
    raw = RawTLS(b, ours().context(other), server_side=other == "server")
    try:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump.handshake)
                nursery.start_soon(raw.handshake)
            yield pump, raw
    finally:
        pump.abort()
        raw.close()


@asynccontextmanager
async def two_comms(buffer: int | None = None, **settings: Any) -> AsyncIterator[tuple[TLSComm, TLSComm]]:
    a, b = socket_pair(buffer)
    client, server = comm_over(client_pump(a), **settings), comm_over(server_pump(b), **settings)
    try:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.handshake)
                nursery.start_soon(server.handshake)
            yield client, server
    finally:
        client.abort()
        server.abort()


def message(payload: bytes) -> bytes:
    """A whole message whose second frame is the payload."""
    frames = [b"\xc0", payload]
    return b"".join((pack_prelude(frames), *frames))


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110 - of the kernel's, which sets no event
        await trio.sleep(0.001)


# -- reading ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["client", "server"])
async def test_byte_by_byte(side: str) -> None:
    """The handshake, and then a message, in pieces of one byte."""
    a, b = socket_pair()
    pump = (client_pump if side == "client" else server_pump)(a)
    raw = RawTLS(b, ours().context("server" if side == "client" else "client"), server_side=side == "client")
    parser = FrameParser()

    async def slowly(data: bytes) -> None:
        for i in range(len(data)):
            await raw.send_bytes(data[i : i + 1])
            await trio.lowlevel.checkpoint()

    async def other() -> None:
        while True:
            try:
                raw.engine.do_handshake()
                break
            except ssl.SSLWantReadError:
                await slowly(raw.ciphertext())
                assert await raw.more()
        await slowly(raw.ciphertext())
        await slowly(raw.encrypt(message(b"x" * 300)))

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await pump.handshake()
            frames = await pump.pull(parser)
    assert frames == [b"\xc0", b"x" * 300]
    pump.abort()
    raw.close()


@pytest.mark.parametrize("size", [0, 1, 100, 2**14 - 40, 2**14, 2**16, 2**18 + 1, 5 * 2**20 + 3])
async def test_messages_of_all_sizes_arrive_as_they_were(size: int) -> None:
    payload = os.urandom(size)
    async with two_comms() as (client, server):
        for reader, writer in ((client, server), (server, client)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer.write, {"n": size, "payload": payload})
                found = await reader.read()
            assert found == {"n": size, "payload": payload}


async def test_many_messages_in_one_piece() -> None:
    """They come in one read, and in records of any size."""
    async with against_raw() as (pump, raw):
        parser = FrameParser()
        await raw.send(b"".join(message(bytes([i]) * i) for i in range(1, 200)))
        for i in range(1, 200):
            assert await pump.pull(parser) == [b"\xc0", bytes([i]) * i]
        assert not pump.readable()


@pytest.mark.parametrize("cut", [1, 16 * 2**10 + 700, 200_000])
async def test_a_large_frame_with_something_behind_it(cut: int) -> None:
    payload = os.urandom(300_000)
    async with against_raw() as (pump, raw):
        parser = FrameParser()
        data = raw.encrypt(message(payload) + message(b"next"))

        async def send() -> None:
            await raw.send_bytes(data[:cut])
            await until(lambda: not pump._ready(0))
            await raw.send_bytes(data[cut:])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            assert await pump.pull(parser) == [b"\xc0", payload]
            assert await pump.pull(parser) == [b"\xc0", b"next"]


async def test_it_lets_others_run_while_much_comes() -> None:
    async with against_raw() as (pump, raw):
        parser = FrameParser(Limits(message=None))
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            nursery.start_soon(raw.send, message(bytes(4 * MUCH)))
            await pump.pull(parser)
            nursery.cancel_scope.cancel()
        assert turns >= 10, turns


async def test_nothing_is_lost_if_a_read_is_cancelled() -> None:
    async with against_raw() as (pump, raw):
        parser = FrameParser()
        data = raw.encrypt(message(b"a" * 50_000))
        for start in range(0, len(data), 10_000):
            await raw.send_bytes(data[start : start + 10_000])
            if start + 10_000 < len(data):
                with trio.move_on_after(0.005):
                    assert await pump.pull(parser) is None
        assert await pump.pull(parser) == [b"\xc0", b"a" * 50_000]


# -- what is there to read -------------------------------------------------------------------------------------------------------


async def test_tickets_are_nothing_to_read() -> None:
    """A stock server of TLS 1.3 sends them behind the handshake: bytes come, and an idle comm in a pool is as good as before."""
    async with against_raw("client") as (pump, raw):
        assert pump._engine.version() == "TLSv1.3"
        await until(lambda: pump._ready(0))
        assert not pump.readable()
        assert not pump._ready(0)  # they have been taken
        assert not pump.readable()
        await raw.send(message(b"x"))
        await until(lambda: pump._ready(0))
        assert pump.readable()
        assert pump.readable()
        parser = FrameParser()
        assert await pump.pull(parser) == [b"\xc0", b"x"]  # what was looked at is not lost
        assert not pump.readable()


async def test_our_own_servers_send_no_tickets() -> None:
    async with against_raw("server") as (pump, raw):
        pump.try_send(message(b"x"))
        await raw.receive()
        assert raw.engine.session is None or not raw.engine.session.has_ticket


needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="the openssl command is not there, and Python can't ask for new keys"
)


@asynccontextmanager
async def against_openssl(path: Path) -> AsyncIterator[tuple[TLSPump, trio.Process]]:
    """A server's pump after the handshake, and OpenSSL's own client, which asks for new keys at a line "K"."""
    for name, text in (("ca", ours().authority), ("cert", ours().certificate), ("key", ours().key)):
        (path / name).write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [
            "openssl",
            "s_client",
            "-connect",
            f"127.0.0.1:{listener.getsockname()[1]}",
            "-tls1_3",
            "-quiet",
            "-no_ign_eof",
        ]
        files = ["-CAfile", str(path / "ca"), "-cert", str(path / "cert"), "-key", str(path / "key")]
        client = await trio.lowlevel.open_process(
            [*command, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert client.stdin is not None
        assert client.stdout is not None
        listener.setblocking(False)
        await trio.lowlevel.wait_readable(listener)
        pump = server_pump(listener.accept()[0])
    with trio.fail_after(PATIENCE):
        await pump.handshake()
        try:
            yield pump, client
        finally:
            await pump.aclose()
            client.kill()
            await client.wait()
            await client.stdin.aclose()
            await client.stdout.aclose()


@needs_openssl
@pytest.mark.parametrize("look", [True, False])
async def test_new_keys_are_nothing_to_read(look: bool, tmp_path: Path) -> None:
    """TLS 1.3: a peer may change its keys at any time, and ask for ours to be changed."""
    async with against_openssl(tmp_path) as (pump, client):
        assert client.stdin is not None
        assert client.stdout is not None
        received = b""
        for i in range(3):
            await client.stdin.send_all(b"K\n")  # new keys, and ours are to be new too
            await until(lambda: pump._ready(0))  # else it may take both for one command
            assert not look or not pump.readable()
            await client.stdin.send_all(b"%d\n" % i)
            parser = FrameParser()
            assert await pump.fill(parser)
            assert parser._buffer == b"%d\n" % i
            assert pump.try_send(b"answer %d\n" % i)
            while not received.endswith(b"answer %d\n" % i):
                received += await client.stdout.receive_some()


def takes_nothing(_data: object) -> int:
    raise BlockingIOError


@needs_openssl
@pytest.mark.parametrize("look", ["readable", "fill_nowait"])
async def test_answers_that_nobody_takes_are_bounded(look: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that asks for new keys again and again, and reads nothing, could make us keep any number of answers."""
    monkeypatch.setattr(_tls_pump, "_MOST_CONTROL", 100)
    async with against_openssl(tmp_path) as (pump, client):
        assert client.stdin is not None
        parser = FrameParser()

        async def ask() -> None:
            assert client.stdin is not None
            await client.stdin.send_all(b"K\n")
            await until(lambda: pump._ready(0))

        for _ in range(8):  # one that takes the answers may ask as often as it likes
            await ask()
            assert not pump.readable()
        send = pump._send
        pump._send = takes_nothing  # type: ignore[assignment]
        # What is encrypted of ours does not count.
        pump._encrypt(bytes(1000))
        for _ in range(3):
            await ask()
            assert not pump.readable()
        await ask()
        if look == "readable":
            assert pump.readable()
        else:
            assert not pump.fill_nowait(parser)
        for _ in range(2):
            with pytest.raises(RemoteProtocolError, match="keeps asking for answers of TLS's own, such as new keys"):
                await pump.pull(parser)
        pump._send = send


async def test_messages_of_tls_without_a_pause_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are nothing to read, and always there: others run all the same, and whoever reads can be cancelled."""
    looks = 0

    def something_of_its_own(_pump: TLSPump, size: int) -> int:
        nonlocal looks
        looks += 1
        assert looks < 1000
        return size

    async with against_raw("server") as (pump, _raw):
        monkeypatch.setattr(TLSPump, "_receive", something_of_its_own)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump.fill, FrameParser())
                await trio.lowlevel.checkpoint()
                scope.cancel()
        assert scope.cancelled_caught


async def test_part_of_a_record_is_nothing_to_read() -> None:
    async with against_raw("server") as (pump, raw):
        data = raw.encrypt(message(b"x"))
        await raw.send_bytes(data[:-1])
        await until(lambda: pump._ready(0))
        assert not pump.readable()
        assert pump.heard
        await raw.send_bytes(data[-1:])
        await until(lambda: pump._ready(0))
        parser = FrameParser()
        assert pump.fill_nowait(parser)
        assert parser.next_message() == [b"\xc0", b"x"]
        assert not pump.fill_nowait(parser)


async def test_looking_takes_nothing_from_a_task_that_reads() -> None:
    async with against_raw("server") as (pump, raw):
        parser = FrameParser()
        found = []

        async def read() -> None:
            found.append(await pump.pull(parser))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            assert not pump.readable()
            os.write(raw.socket.fileno(), raw.encrypt(message(b"x")))
            while not pump.readable():
                pass  # no other task runs until it is there
        assert found == [[b"\xc0", b"x"]]


async def test_heard() -> None:
    a, b = socket_pair()
    pump = server_pump(a)
    assert not pump.heard
    b.send(b"\x16")
    await until(lambda: pump._ready(0))
    assert pump.heard
    pump.abort()
    b.close()


async def test_heard_is_who_made_us_answer() -> None:
    """Part of a client's hello, once it was read, is nothing; all of it is, though nothing waits to be read then."""
    a, b = socket_pair()
    pump = server_pump(a)
    client = client_pump(b)
    with pytest.raises(ssl.SSLWantReadError):
        client._engine.do_handshake()
    hello = client._outgoing.read()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump.handshake)
        for piece in (hello[:1], hello[1:-1]):
            b.send(piece)
            await until(lambda: not pump._ready(0) and len(pump._first) > 0)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not pump.heard
        b.send(hello[-1:])
        await until(lambda: pump.heard)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not pump._ready(0)
        assert pump.heard
        nursery.cancel_scope.cancel()
    pump.abort()
    b.close()


# -- the end -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goodbye", [True, False])
@pytest.mark.parametrize("look", [True, False])
async def test_a_clean_end(goodbye: bool, look: bool) -> None:
    """With close_notify, or without as Tornado, and so Dask, does it (shutdown document, F08)."""
    async with against_raw("server") as (pump, raw):
        await raw.send(message(b"last"))
        if goodbye:
            with pytest.raises(ssl.SSLWantReadError):
                raw.engine.unwrap()
            await raw.flush()
        raw.close()
        parser = FrameParser()
        assert await pump.pull(parser) == [b"\xc0", b"last"]
        if look:
            await until(pump.readable)
        assert await pump.pull(parser) is None
        assert pump.readable()
        assert await pump.pull(parser) is None
        assert not pump.fill_nowait(parser)


@pytest.mark.parametrize("payload", [100, 300_000])
async def test_an_end_in_the_middle(payload: int) -> None:
    a, b = socket_pair()
    comm = comm_over(server_pump(a))
    raw = RawTLS(b, ours().context("client"), server_side=False)
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(comm.handshake)
            await raw.handshake()
            await raw.send(single_frame(dumps(local_handshake(compression=None, window=(16, 2**20)))[0]))
        await raw.receive()  # our handshake: what is unread at a close makes it a reset
        await raw.send(message(bytes(payload))[:-1])
        raw.close()
        with pytest.raises(CommClosedError, match="closed the comm in the middle of a message"):
            await comm.read()


@pytest.mark.parametrize("look", [True, False])
async def test_garbage_behind_the_handshake(look: bool) -> None:
    async with against_raw("server") as (pump, raw):
        await raw.send_bytes(b"\x17\x03\x03\x00\x20" + b"garbage!" * 4)
        if look:
            await until(pump.readable)
        with pytest.raises(RemoteProtocolError, match="TLS failed: what came has been changed on its way"):
            await pump.pull(FrameParser())
        # It has been told.
        with pytest.raises(ssl.SSLError, match="(?i)bad.record.mac"):
            await raw.receive()


async def test_garbage_in_a_large_frame() -> None:
    async with against_raw("server") as (pump, raw):
        data = bytearray(raw.encrypt(message(bytes(300_000))))
        data[200_000] ^= 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raw.send_bytes, bytes(data))
            with pytest.raises(RemoteProtocolError, match="TLS failed"):
                await pump.pull(FrameParser())
            await pump.aclose()
            with pytest.raises(OSError, match="."):  # it says nothing more
                pump.try_send(b"xx")


async def test_closing_says_goodbye_and_waits_for_none() -> None:
    async with against_raw("server") as (pump, raw):
        pump.try_send(message(b"last"))
        began = trio.current_time()
        await pump.aclose()
        assert trio.current_time() - began < 1
        assert await raw.receive() == message(b"last")
        assert await raw.receive() == b""
        await pump.aclose()  # once more does nothing


async def test_closing_while_the_peer_still_sends() -> None:
    async with against_raw("server") as (pump, raw):
        pump.try_send(message(b"last"))
        await raw.send(message(b"unread"))
        await until(lambda: pump._ready(0))
        await pump.aclose()
        assert await raw.receive() == message(b"last")
        assert await raw.receive() == b""


async def test_abort_says_nothing() -> None:
    async with against_raw("server") as (pump, raw):
        pump.abort()
        pump.abort()
        with pytest.raises(EOFError):
            await raw.receive()


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01"])
async def test_closing_before_the_handshake_does_not_run_it(first: bytes) -> None:
    """Shutdown document, F05: a client that never says hello can't keep a server from stopping."""
    a, b = socket_pair()
    pump = server_pump(a)
    b.send(first)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump.handshake)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    began = trio.current_time()
    await pump.aclose()
    assert trio.current_time() - began < 0.05
    b.setblocking(True)
    assert b.recv(100) == b""
    b.close()


async def test_a_peer_that_speaks_no_tls_is_told_so() -> None:
    a, b = socket_pair()
    pump = server_pump(a)
    b.send(b"x" * 200_000)
    with pytest.raises(RemoteProtocolError, match="what came is no TLS, and looks like text"):
        await pump.handshake()
    await pump.aclose()
    assert b.recv(100) == b"\x15\x03\x01\x00\x02\x02\x46"
    assert b.recv(100) == b""
    b.close()


@pytest.mark.parametrize("how", ["abort", "give_up"])
async def test_closed_during_the_handshake(how: str) -> None:
    a, b = socket_pair()
    comm = comm_over(server_pump(a))
    expected: Any = trio.ClosedResourceError if how == "abort" else CommClosedError
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:

            async def shake() -> None:
                with pytest.raises(expected, match="closed here" if how == "abort" else "too many"):
                    await comm.handshake()

            nursery.start_soon(shake)
            await trio.testing.wait_all_tasks_blocked()
            if how == "abort":
                comm.abort()
            else:
                comm.give_up(CommClosedError("too many"))
    b.close()


# -- writing ---------------------------------------------------------------------------------------------------------------------


async def test_a_kernel_that_takes_only_part_loses_and_doubles_nothing() -> None:
    """Writers that wait and such as can't, at the same time, over buffers of a few KiB."""
    async with two_comms(buffer=4096, limits=Limits(message=None)) as (client, server):
        pump = client._pump
        partly = 0
        real = pump.try_send

        class Counting(TLSPump):
            __slots__ = ()

            def try_send(self, data: bytes) -> int:
                nonlocal partly
                sent = real(data)
                partly += 0 < sent < len(data)
                return sent

        pump.__class__ = Counting
        writers, rounds = 4, 60
        sent: dict[int, int] = dict.fromkeys(range(writers + 2), 0)

        async def write(who: int) -> None:
            for i in range(rounds):
                await client.write((who, i, os.urandom(3000 * (i % 7) ** 2)))
                sent[who] += 1

        async def now(who: int, operation: Any) -> None:
            for _ in range(20 * rounds):
                if operation((who, sent[who], b"x" * 30_000)):
                    sent[who] += 1
                await trio.lowlevel.checkpoint()

        async def writing() -> None:
            async with trio.open_nursery() as nursery:
                for who in range(writers):
                    nursery.start_soon(write, who)
                for _ in range(2):
                    nursery.start_soon(now, writers, client.write_nowait)
                    nursery.start_soon(now, writers + 1, client.write_soon)
            while not (sent[writers] and sent[writers + 1]):
                # Before, somebody may have been writing all the time.
                await now(writers, client.write_nowait)
                await now(writers + 1, client.write_soon)
            await client.write("end")

        found: dict[int, int] = dict.fromkeys(range(writers + 2), 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writing)
            while (item := await server.read()) != "end":
                who, i, _ = item
                assert i == found[who]
                found[who] += 1
        assert found == sent
        assert [sent[who] for who in range(writers)] == [rounds] * writers
        assert partly > 10


async def test_the_last_byte_is_reported_later_and_goes_only_once() -> None:
    async with against_raw(buffer=4096) as (pump, raw):
        data = os.urandom(100_000)
        assert pump.try_send(data) == len(data) - 1
        assert pump.try_send(b"not now") == 0
        received = b""

        async def receive() -> None:
            nonlocal received
            received = await raw.receive_exactly(len(data) + 4)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await pump.send([data, b"next"], len(data) - 1)
        assert received == data + b"next"


async def test_what_is_owed_stays_owed_if_sending_it_is_cancelled() -> None:
    """The comm puts it back and sends it again; in between nothing has got lost or doubled."""
    async with against_raw(buffer=4096) as (pump, raw):
        data = os.urandom(100_000)
        sent = pump.try_send(data)
        owed = data[sent:]
        for _ in range(2):
            with trio.move_on_after(0.01) as scope:
                await pump.send([owed, b"next"], 0)
            assert scope.cancelled_caught
            assert not pump.partial
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.send, [owed, b"next"], 0)
            assert await raw.receive_exactly(len(data) + 4) == data + b"next"


@pytest.mark.parametrize("more", [True, False])
async def test_the_last_byte_goes_once_though_the_wait_for_room_is_cancelled(more: bool) -> None:
    """The kernel has taken all that was encrypted, and has no room for more; where there is no more, there is no wait."""
    async with against_raw(buffer=4096) as (pump, raw):
        data = os.urandom(100_000)
        assert pump.try_send(data) == len(data) - 1
        received = b""

        async def receive() -> None:
            nonlocal received
            received = await raw.receive_exactly(len(data) + 4)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await until(pump._flush_now)
            roomy, pump._roomy = pump._roomy, lambda _: False
            with trio.CancelScope() as scope:
                scope.cancel()
                await pump.send([data[-1:], b"next"] if more else [data[-1:]], 0)
            assert scope.cancelled_caught is more
            assert not pump.partial or not more
            pump._roomy = roomy
            await pump.send([data[-1:], b"next"] if more else [b"next"], 0)
        assert received == data + b"next"


async def test_nothing_is_encrypted_while_the_kernel_takes_nothing() -> None:
    """So a write that is cancelled before its first byte leaves the comm usable."""
    async with against_raw(buffer=4096) as (pump, raw):
        filler = bytes(1000)
        count = 0
        while (sent := pump.try_send(filler)) == len(filler):
            count += 1
        if sent:  # the rest of it
            with trio.move_on_after(0.01):
                await pump.send([filler], sent)
        while pump._unsent or not count:  # read until the kernel has all
            count -= len(await raw.receive()) // len(filler)
            pump._flush_now()
        while pump._roomy(0):
            assert pump.try_send(filler)
        # Whether some of the last is kept here or not: there is no room.
        pending = len(pump._unsent)
        assert pump.try_send(b"xx") == 0
        with trio.move_on_after(0.01):
            await pump.send([b"other"], 0)
        assert not pump.partial
        assert (len(pump._unsent), pump._outgoing.pending) == (pending, 0)


async def test_a_write_that_is_cancelled_while_another_is_under_way_is_untouched() -> None:
    async with two_comms() as (client, server):
        big = bytes(20 * MUCH)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.write, ("big", big))
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.01) as scope:
                await client.write("never")
            assert scope.cancelled_caught
            assert (await server.read())[0] == "big"
            await client.write("next")
            assert await server.read() == "next"


async def test_a_write_that_is_cancelled_in_the_middle_closes_the_comm() -> None:
    async with two_comms() as (client, server):
        with trio.move_on_after(0.05) as scope:
            await client.write(bytes(20 * MUCH))
        assert scope.cancelled_caught
        assert client.closed()
        with pytest.raises(CommClosedError, match="in the middle of a message|reset by peer"):
            await server.read()


async def test_a_read_that_is_cancelled_in_the_middle_closes_the_comm() -> None:
    async with two_comms() as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.read)
            await trio.testing.wait_all_tasks_blocked()
            client._pump.try_send(message(bytes(1000))[:-1])
            await until(lambda: server._parser.mid_message)
            nursery.cancel_scope.cancel()
        assert server.closed()
        with pytest.raises(CommClosedError):
            await client.read()


async def test_large_messages_in_both_directions_at_the_same_time() -> None:
    async with two_comms() as (client, server):
        here, there = os.urandom(10 * MUCH), os.urandom(10 * MUCH)

        async def write(comm: TLSComm, payload: bytes) -> None:
            for _ in range(3):
                await comm.write(payload)

        async def read(comm: TLSComm, payload: bytes) -> None:
            for _ in range(3):
                assert await comm.read() == payload

        async with trio.open_nursery() as nursery:
            for comm, own, other in ((client, here, there), (server, there, here)):
                nursery.start_soon(write, comm, own)
                nursery.start_soon(read, comm, other)


@pytest.mark.parametrize("pieces", [1, 2000])
async def test_what_is_encrypted_ahead_is_bounded(pieces: int) -> None:
    """However large the message and however slow its reader."""
    async with against_raw() as (pump, _raw):
        buffers = [memoryview(bytes(40 * MUCH // pieces))] * pieces
        with trio.move_on_after(0.05) as scope:
            await pump.send(buffers, 0)
        assert scope.cancelled_caught
        assert pump.partial
        assert 0 < len(pump._unsent) + pump._outgoing.pending < 2**19 + 2**14


async def test_a_reader_that_stalls_is_told_by_the_clock() -> None:
    async with against_raw() as (pump, raw):
        with pytest.raises(trio.TooSlowError):
            await pump.send([bytes(40 * MUCH)], 0, 0.02)
        assert pump.partial

    async with against_raw() as (pump, raw):
        # One that reads, slowly, has all the time: the stall is a pause of that length in which nothing goes.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.send, [bytes(3 * MUCH)], 0, 0.5)
            received = 0
            while received < 3 * MUCH:
                received += len(await raw.receive())


async def test_a_peer_that_is_gone() -> None:
    async with against_raw() as (pump, raw):
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        raw.close()
        await until(lambda: pump._ready(0))
        with pytest.raises(OSError, match="."):
            await pump.send([b"xx"], 0)
        assert not pump.partial
        assert pump.last_words() is None
        await pump.aclose()


async def test_tls_that_has_failed_writes_nothing_more() -> None:
    async with against_raw("server") as (pump, raw):
        await raw.send_bytes(b"\x17\x03\x03\x00\x20" + b"garbage!" * 4)
        with pytest.raises(RemoteProtocolError):
            await pump.pull(FrameParser())
        with pytest.raises(ConnectionAbortedError, match="TLS can't write any more"):
            await pump.send([b"xx"], 0)
