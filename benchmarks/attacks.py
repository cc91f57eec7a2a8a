"""What attacks on memory and on the connection table cost a server: ``python -m benchmarks.attacks``.

The server is a process with the default limits that trusts nobody, so that these clients are strangers; only the two times are
shorter, so that nobody has to wait for half a minute.  Each attack is made with plain sockets.  For each, the table shows the
server's resident memory before, at its peak, and after the attacker has gone, and what became of the connection; after each the
server must answer an honest call.  ``--silent N`` shows how long honest clients wait meanwhile N silent connections hammer.
"""

from __future__ import annotations

import argparse
import resource
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import trio

from trio_dcore import Limits, Security, Server, connect, rpc, to_serialize

KIB, MIB, GIB = 2**10, 2**20, 2**30
PROGRESS = 1.0  # seconds, instead of 30
STALL = 1.0  # seconds, instead of 60
SILENT = 10_000
_HELLO = {"compression": None, "python": [3, 11, 7], "pickle-protocol": 5}


def serve(trusting: bool) -> None:
    """The server's process: says its address, and serves until its stdin ends."""

    async def main() -> None:
        security = None if trusting else Security(trust_loopback=False)
        limits = Limits(progress_timeout=PROGRESS, write_stall=STALL)
        reply = to_serialize(b"x" * (300 * MIB))  # passed to the kernel as it is, where bytes in a message are copied into it
        async with Server({"large": lambda: reply}, security=security, limits=limits) as server:
            print(await server.listen("tcp://127.0.0.1:0"), flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
            server.stop(0)

    trio.run(main)


class Victim:
    """A server in another process."""

    def __init__(self, *, trusting: bool = False) -> None:
        command = [sys.executable, "-m", "benchmarks.attacks", "--serve", str(int(trusting))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        self.target = host, int(port)
        self._proc = Path("/proc") / str(self._process.pid)

    def rss(self, field: str = "VmRSS") -> float:
        """MiB of resident memory; "VmHWM" is the peak since :meth:`forget_peak`."""
        for line in (self._proc / "status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / KIB
        raise KeyError(field)

    def forget_peak(self) -> None:
        """The peak is what is resident now."""
        (self._proc / "clear_refs").write_text("5")

    def open(self, *, handshake: bool = True) -> socket.socket:
        """A connection, with the handshakes exchanged."""
        sock = socket.create_connection(self.target)
        if handshake:
            sock.sendall(message(msgpack.packb(_HELLO)))
            sock.recv(4096)
        return sock

    def lives(self) -> bool:
        """Whether an honest call is answered."""

        async def call() -> Any:
            with trio.fail_after(5):
                async with rpc(self.address) as remote:
                    return await remote.echo(data=1)

        return bool(trio.run(call) == 1)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def message(*frames: bytes) -> bytes:
    """The bytes of a message."""
    lengths = [len(frame) for frame in frames]
    prelude = struct.pack(f"<{2 + len(frames)}Q", 8 + 8 * len(frames) + sum(lengths), len(frames), *lengths)
    return b"".join((prelude, *frames))


def outcome(sock: socket.socket, patience: float = 5.0) -> str:
    """What the server answers, and how long until it closes."""
    began = time.perf_counter()
    sock.settimeout(patience)
    received = b""
    try:
        while data := sock.recv(64 * KIB):
            received += data
        how = "closed"
    except TimeoutError:
        how = "kept open"
    except ConnectionError:
        how = "reset"
    after = f" after {time.perf_counter() - began:.1f} s" if how != "kept open" else ""
    said = "an error reply, " if b"uncaught-error" in received else ""
    return f"{said}{how}{after}"


# -- the attacks ------------------------------------------------------------------------------------------------------------------


def prefix(size: int) -> Callable[[Victim], str]:
    """The start of a message of that many bytes, and then nothing."""

    def attack(victim: Victim) -> str:
        with victim.open() as sock:
            sock.sendall(struct.pack("<QQQQ", size, 2, 8, size - 32) + b"12345678")
            return outcome(sock)

    return attack


def many_frames(victim: Victim) -> str:
    with victim.open() as sock:
        sock.sendall(struct.pack("<QQ", 2**62, 2**40))
        return outcome(sock)


def bomb(victim: Victim) -> str:
    """1 MiB that becomes 1 GiB."""
    packed = _bomb()
    payload = {"serializer": "dask", "type": "bytes", "type-serialized": b"", "sub-header": {}, "num-sub-frames": 1}
    header = payload | {"compression": ["zlib"], "split-num-sub-frames": [1], "split-offsets": [0]}
    request = {"op": "echo", "data": {"__Serialized__": 1}, "reply": True}
    with victim.open() as sock:
        sock.sendall(message(msgpack.packb(request), msgpack.packb(header), packed))
        return outcome(sock, 2.0)


def _bomb() -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(MIB)
    return b"".join([*(packer.compress(block) for _ in range(KIB)), packer.flush()])


def empty_maps(victim: Victim) -> str:
    size = MIB - 100
    head = msgpack.packb({"op": "echo", "reply": True})
    head = b"\x83" + head[1:] + msgpack.packb("data") + b"\xdd" + struct.pack(">I", size - 64) + b"\x80" * (size - 64)
    with victim.open() as sock:
        sock.sendall(message(head))
        sock.settimeout(10)
        received = 0
        while received < size - KIB and (data := sock.recv(64 * KIB)):
            received += len(data)
        return f"answered with {received / MIB:.1f} MiB, kept open"


def nesting(victim: Victim) -> str:
    depth = 10**6
    with victim.open() as sock:
        sock.sendall(message(b"\x91" * depth + b"\xc0"))
        return outcome(sock, 2.0)


def silent(victim: Victim) -> str:
    held = [victim.open(handshake=False) for _ in range(SILENT)]
    try:
        return f"{_still_open(held)} of {SILENT} still open when the last one had come"
    finally:
        for sock in held:
            sock.close()


def _still_open(socks: list[socket.socket]) -> int:
    """How many the server has not closed; it has said its handshake on those that it accepted."""
    still = 0
    for sock in socks:
        sock.setblocking(False)
        try:
            while data := sock.recv(4096):
                pass
            still += bool(data)
        except BlockingIOError:
            still += 1
        except ConnectionError:
            pass
    return still


def no_reader(victim: Victim) -> str:
    """Asks for 300 MiB and reads nothing."""
    with victim.open() as sock:
        sock.sendall(message(msgpack.packb({"op": "large", "reply": True})))
        probe = select.poll()
        probe.register(sock, select.POLLRDHUP)
        began = time.perf_counter()
        if not probe.poll(10_000):
            return "kept open"
        return f"reset after {time.perf_counter() - began:.1f} s"


STRANGERS: dict[str, Callable[[Victim], str]] = {
    "4 GiB announced, then silence": prefix(4 * GIB),
    "64 MiB less one byte announced, then silence": prefix(64 * MIB - 1),
    "2^40 frames announced": many_frames,
    "1 MiB compressed that becomes 1 GiB": bomb,
    "1 MiB of empty maps": empty_maps,
    "lists nested 10^6 deep": nesting,
    f"{SILENT:,} silent connections".replace(",", " "): silent,
    "a reply of 300 MiB that nobody reads": no_reader,
}
TRUSTED: dict[str, Callable[[Victim], str]] = {
    "trusted: 4 GiB announced, then silence": prefix(4 * GIB),
    "trusted: 2 GiB less one byte announced, then silence": prefix(2 * GIB - 1),
}


def table() -> bool:
    """Make every attack and print what it cost; False if the server didn't stand one."""
    print("| attack | resident before, MiB | peak | after | what became of it |")
    print("|---|---|---|---|---|")
    stood = True
    for trusting, attacks in ((False, STRANGERS), (True, TRUSTED)):
        victim = Victim(trusting=trusting)
        try:
            stood = victim.lives() and stood
            for name, attack in attacks.items():
                before = victim.rss()
                victim.forget_peak()
                became = attack(victim)
                peak = victim.rss("VmHWM")
                lives = victim.lives()
                stood = stood and lives
                gone = "" if lives else "; THE SERVER DOES NOT ANSWER"
                print(f"| {name} | {before:.1f} | {peak:.1f} | {victim.rss():.1f} | {became}{gone} |", flush=True)
        finally:
            victim.close()
    return stood


# -- the handshake queue ----------------------------------------------------------------------------------------------------------


def hammer(address: str, count: int) -> None:
    """A process that keeps up to ``count`` silent connections, and makes anew what the server closes, until its stdin ends."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    poll = select.poll()
    poll.register(sys.stdin, select.POLLIN)
    held: dict[int, socket.socket] = {}
    print("ready", flush=True)
    while True:
        for _ in range(min(64, count - len(held))):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((host, int(port)))
            held[sock.fileno()] = sock
            poll.register(sock, select.POLLRDHUP)
        for fileno, _event in poll.poll(10):
            if fileno == sys.stdin.fileno():
                return
            poll.unregister(fileno)
            held.pop(fileno).close()


def honest(count: int, calls: int) -> bool:
    """Print how long an honest client waits for its connection and its answer; True if never longer than 2 s."""
    victim = Victim()
    command = [sys.executable, "-m", "benchmarks.attacks", "--hammer", victim.address, str(count)]
    attacker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    took: list[float] = []

    async def call() -> None:
        with trio.move_on_after(30):
            async with await connect(victim.address) as comm:
                await comm.write({"op": "echo", "data": 1, "reply": True})
                await comm.read()

    try:
        assert attacker.stdout is not None
        attacker.stdout.readline()
        time.sleep(2.0)  # until the queue is as full as it gets
        for _ in range(calls):
            began = time.perf_counter()
            trio.run(call)
            took.append(time.perf_counter() - began)
        resident = victim.rss()
    finally:
        assert attacker.stdin is not None
        attacker.stdin.close()
        attacker.wait()
        assert attacker.stdout is not None
        attacker.stdout.close()
        victim.close()
    good = max(took) <= 2.0
    print(
        f"F01  {'met    ' if good else 'NOT MET'} {calls} honest clients while {count} silent connections hammer: median "
        f"{statistics.median(took) * 1000:.0f} ms, longest {max(took) * 1000:.0f} ms (at most 2000); server {resident:.1f} MiB"
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="attacks on a server's memory and connection table")
    parser.add_argument("--silent", type=int, metavar="N", help="only this: honest clients among N silent connections")
    parser.add_argument("--calls", type=int, default=20, help="how many honest clients, one after the other")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--hammer", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if options.serve is not None:
        # A server has what the system gives by default; the attackers have more.
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 4096), hard))
        serve(options.serve == "1")
        return 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.hammer:
        hammer(options.hammer[0], int(options.hammer[1]))
        return 0
    if options.silent is not None:
        return 0 if honest(options.silent, options.calls) else 1
    stood = table()
    return 0 if honest(SILENT, options.calls) and stood else 1


if __name__ == "__main__":
    sys.exit(main())
