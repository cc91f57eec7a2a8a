"""Real strangers on this machine: processes of another user that send a pickle to a server of ours, or from one to our client.

What they send is never loaded, it gets UnsafePayload, and the server lives on.  The same from a process of our own user is loaded.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.attacks.canary import FLAT, attack
from trio_dcore import Server, UnsafePayload, rpc
from trio_dcore.abc import Peer
from trio_dcore.protocol import FrameParser, Limits, exception_from_reply, loads, local_handshake
from trio_dcore.testing import ManualPeer, no_leaks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose a loopback connection is")

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root can start a process of another user")
STRANGER = 54321
PATIENCE = 20.0
HANDSHAKE = ManualPeer.encode(local_handshake(compression=None, window=(16, 2**20)))

# What the other process does, as whichever user; it prints what it got, in hexadecimal.
PROGRAM = """
import os, select, socket, sys
uid, what, family, host, port, data = sys.argv[1:]
address = "\\0" + host[1:] if host[0] == "@" else (host, int(port))

def become():
    if int(uid) >= 0:
        os.setgroups([])
        os.setgid(int(uid))
        os.setuid(int(uid))

if what != "change":
    become()
data = bytes.fromhex(data)
size = int.from_bytes(data[:4], "little")
handshake, message = data[4:4 + size], data[4 + size:]
got = b""
sock = socket.socket(getattr(socket, family))

def say(text):
    print(text, flush=True)

def rest():
    global got
    while piece := sock.recv(65536):
        got += piece

if what == "ask":  # and wait for all that comes
    sock.connect(address)
    sock.sendall(handshake + message)
    say("sent")
    rest()
elif what == "change":  # who it is, between connecting and sending
    sock.connect(address)
    become()
    say("changed")
    sock.sendall(handshake + message)
    rest()
elif what == "throw":  # everything at once, and away
    sock.connect(address)
    sock.sendall(handshake + message)
    sock.close()
elif what == "leave":  # as soon as the server has accepted and said something
    sock.connect(address)
    sock.sendall(handshake)
    sock.recv(1)
    sock.sendall(message)
    sock.close()
elif what in ("serve", "forward"):
    sock.bind((host, 0))
    sock.listen()
    say(sock.getsockname()[1])
    listener, (sock, _) = sock, sock.accept()
    if what == "serve":
        sock.sendall(handshake)
        while b"take" not in got:
            got += sock.recv(65536)
        sock.sendall(message)
        rest()
    else:
        other = socket.socket()  # not create_connection(), whose codec this user may not load
        other.connect(("127.0.0.1", int(port)))
        ends = {sock: other, other: sock}
        while ends:
            for end in select.select(list(ends), [], [])[0]:
                piece = end.recv(65536)
                if piece:
                    ends[end].sendall(piece)
                else:
                    ends = {}
                    break
say("got " + got.hex())
"""


@contextmanager
def process(uid: int | None, what: str, *, host: str = "127.0.0.1", port: int = 0, message: bytes = b"") -> Iterator[Any]:
    """Another process that does ``what``; it has ended when the block has."""
    family = "AF_INET6" if ":" in host else "AF_UNIX" if host.startswith("@") else "AF_INET"
    data = len(HANDSHAKE).to_bytes(4, "little") + HANDSHAKE + message
    arguments = [str(-1 if uid is None else uid), what, family, host, str(port), data.hex()]
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
            assert child.wait(PATIENCE) == 0
        finally:
            child.kill()


async def all_of(child: Any) -> str:
    """What is left of a process's output, when it has ended."""
    text: str = await trio.to_thread.run_sync(child.stdout.read, abandon_on_cancel=True)
    return text


def answers(output: str) -> list[Any]:
    """The messages that a process got, after the handshake."""
    (line,) = [line for line in output.splitlines() if line.startswith("got")]
    parser = FrameParser(Limits())
    parser.feed(bytes.fromhex(line.partition(" ")[2]))
    found: list[Any] = []
    while (frames := parser.next_message()) is not None:
        found.append(loads(frames))
    return found[1:]


def take(x: Any = None) -> str:
    return "taken"


class Watched(Server):
    """A server that notes whose requests came."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.asked = trio.Event()
        super().__init__({"take": take}, authorize=self._note)

    def _note(self, peer: Peer, op: str) -> bool:
        if op == "take":
            self.peers.append(peer)
            self.asked.set()
        return True


@asynccontextmanager
async def serving(listen: str = "tcp://127.0.0.1:0") -> AsyncIterator[tuple[Watched, int]]:
    """A server and its port; behind the block it must be well, and leave nothing."""
    async with no_leaks():
        with trio.fail_after(PATIENCE):
            async with Watched() as server:
                address = await server.listen(listen)
                yield server, int(address.rpartition(":")[2])
                async with rpc(address) as remote:
                    assert await remote.echo(data=1) == 1


def request(name: str, mark: Path) -> bytes:
    """A request that holds the pickle; the server closes the connection behind its answer."""
    return ManualPeer.encode_frames(attack(name, mark, {"op": "take", "close": True}))


def refused(answer: Any) -> str:
    """The text of an UnsafePayload that came as an error reply."""
    error = exception_from_reply(answer, allow_pickle=lambda: False)
    assert isinstance(error, UnsafePayload), repr(error)
    return str(error)


USERS = [pytest.param(STRANGER, marks=needs_root, id="stranger"), pytest.param(None, id="ours")]


@pytest.mark.parametrize("uid", USERS)
@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("host", ["127.0.0.1", "::ffff:127.0.0.1"])
async def test_who_asks_and_waits(name: str, host: str, uid: int | None, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    async with serving() as (server, port):
        with process(uid, "ask", host=host, port=port, message=request(name, mark)) as child:
            (answer,) = answers(await all_of(child))
        (peer,) = server.peers
    assert peer.trusted == (uid is None)
    assert peer.kind == "loopback"
    if uid is None:
        assert mark.exists()
        assert f"it is process {child.pid} on this machine" in peer.reason
    else:
        assert refused(answer)
        assert not mark.exists()
        assert peer.reason == f"it is of uid {uid}, and this process of uid {os.geteuid()}"


@pytest.mark.parametrize("uid", USERS)
async def test_who_leaves_at_once(uid: int | None, tmp_path: Path) -> None:
    """A closed end is listed as root's.  Who it was has been settled before."""
    mark = tmp_path / "mark"
    async with serving() as (server, port):
        with process(uid, "leave", port=port, message=request("pickle family", mark)) as child:
            await all_of(child)
        await server.asked.wait()
        await trio.testing.wait_all_tasks_blocked()
        (peer,) = server.peers
    assert peer.trusted == (uid is None)
    assert mark.exists() == (uid is None)


@pytest.mark.parametrize("what", ["throw", "ask"])
@pytest.mark.parametrize("uid", USERS)
async def test_who_calls_from_the_backlog(uid: int | None, what: str, tmp_path: Path) -> None:
    """It has connected and sent, and maybe left, before the server accepts.  Whoever has left by then can't be told from others."""
    mark = tmp_path / "mark"
    trusted = uid is None and what == "ask"
    async with serving() as (server, port):
        with process(uid, what, port=port, message=request("pickle family", mark)) as child:
            # Nothing else of this program runs meanwhile, and so nobody accepts.
            assert child.stdout.readline().split()[0] == ("got" if what == "throw" else "sent")
            assert server.peers == []
            output = await all_of(child)
            await server.asked.wait()
            await trio.testing.wait_all_tasks_blocked()
        (peer,) = server.peers
    assert peer.trusted is trusted, peer.reason
    assert mark.exists() is trusted
    if what == "throw":
        assert "closed its end" in peer.reason
    elif not trusted:
        (answer,) = answers(output)
        assert refused(answer)


@pytest.mark.parametrize("uid", USERS)
async def test_through_a_forwarder(uid: int | None, tmp_path: Path) -> None:
    """Whoever calls, it is the forwarder's user that counts, at both ends.  (One of our own makes its far end us: SECURITY.md.)"""
    mark = tmp_path / "mark"
    async with serving() as (server, port):
        with process(uid, "forward", port=port) as child:
            address = f"tcp://127.0.0.1:{await trio.to_thread.run_sync(child.stdout.readline)}".strip()
            async with await ManualPeer.connect(address) as peer:
                await peer.handshake(extension=True)
                await peer.send_bytes(request("pickle family", mark))
                answer = await peer.receive()
            await all_of(child)
        (seen,) = server.peers
    assert seen.trusted == mark.exists() == (uid is None)
    if uid is not None:
        assert refused(answer)


@pytest.mark.parametrize("uid", USERS)
async def test_what_we_send_through_a_forwarder(uid: int | None) -> None:
    """Our client gives its pickles to nobody else either."""
    async with serving() as (server, port):
        with process(uid, "forward", port=port) as child:
            address = f"tcp://127.0.0.1:{await trio.to_thread.run_sync(child.stdout.readline)}".strip()
            async with rpc(address) as remote:
                assert await remote.take(x=1) == "taken"
                if uid is None:
                    assert await remote.take(x=object()) == "taken"
                else:
                    with pytest.raises(UnsafePayload):
                        await remote.take(x=object())
            await all_of(child)
    assert server.peers[0].trusted == (uid is None)


@pytest.mark.parametrize("uid", USERS)
@pytest.mark.parametrize("name", FLAT)
async def test_a_server_that_answers_with_one(name: str, uid: int | None, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    message = ManualPeer.encode_frames(attack(name, mark, {}))
    async with no_leaks():
        with trio.fail_after(PATIENCE), process(uid, "serve", message=message) as child:
            address = f"tcp://127.0.0.1:{await trio.to_thread.run_sync(child.stdout.readline)}".strip()
            async with rpc(address) as remote:
                error: object = None
                try:
                    await remote.take()
                except Exception as caught:
                    error = caught
            await all_of(child)
    assert mark.exists() == (uid is None)
    assert isinstance(error, UnsafePayload) == (uid is not None), error


@needs_root
async def test_who_connects_as_us_and_becomes_another(tmp_path: Path) -> None:
    """The socket is listed as ours for ever; but the process that holds it is not."""
    mark = tmp_path / "mark"
    async with serving() as (server, port):
        with process(STRANGER, "change", port=port, message=request("pickle family", mark)) as child:
            assert child.stdout.readline() == "changed\n"  # before anything is accepted
            (answer,) = answers(await all_of(child))
        (peer,) = server.peers
    assert "held by no process of that user" in peer.reason
    assert refused(answer)
    assert not mark.exists()


@pytest.mark.parametrize("uid", USERS)
async def test_over_a_unix_socket(uid: int | None, tmp_path: Path) -> None:
    """By a name that every user may connect to."""
    mark, name = tmp_path / "mark", f"@trio_dcore-test-{os.getpid()}"
    async with no_leaks():
        with trio.fail_after(PATIENCE):
            async with Watched() as server:
                await server.listen(f"unix://{name}")
                with process(uid, "ask", host=name, message=request("pickle family", mark)) as child:
                    (answer,) = answers(await all_of(child))
            (peer,) = server.peers
    assert (peer.kind, peer.uid, peer.pid) == ("unix", os.geteuid() if uid is None else uid, child.pid)
    assert peer.trusted == mark.exists() == (uid is None)
    if uid is not None:
        assert refused(answer)


def own_address() -> str:
    """An address of this machine that is not loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        host: str = sock.getsockname()[0]
        return host


@pytest.mark.parametrize("uid", USERS)
async def test_from_another_address_than_loopback(uid: int | None, tmp_path: Path) -> None:
    """Over plain TCP nobody is trusted elsewhere, also not those who are on this machine in fact."""
    mark, host = tmp_path / "mark", own_address()
    async with serving(f"tcp://{host}:0") as (server, port):
        with process(uid, "ask", host=host, port=port, message=request("pickle family", mark)) as child:
            (answer,) = answers(await all_of(child))
        (peer,) = server.peers
    assert (peer.kind, peer.trusted) == ("tcp", False)
    assert "not on this machine's loopback interface" in peer.reason
    assert refused(answer)
    assert not mark.exists()
