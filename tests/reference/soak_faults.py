"""What goes wrong in the soak: servers that are killed, paused and stopped, and connections that are cut, held up and slowed down."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import trio

from tests.reference.identities import ours
from tests.reference.soak_server import GRACE

__all__ = ["Lag", "Nemesis", "Proxy", "ServerProcess", "free_place", "resident", "write_identity"]

_ROOT = Path(__file__).resolve().parents[2]
_ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)])}
_RESET = struct.pack("ii", 1, 0)  # struct linger: on, and no time for it
#: What the servers run.
SERVER = ["-m", "tests.reference.soak_server"]
# No server takes so long for anything, unless the machine is very busy.
PATIENCE = 60.0
# How late a server may be when it stops in order, beyond the seconds for which this process, too, had no time for its tasks.
LATE = 5.0
# Seconds between looks at the clock.
_BEAT = 0.02
# "op 'fail' from … failed after its caller had gone", with its traceback: that is worth a warning.
_LOUD = re.compile(r"^(?:ERROR|CRITICAL):.*|^Traceback.*|.*never (?:retrieved|awaited).*|.*ResourceWarning.*", re.MULTILINE)
_WARNING = re.compile(
    r"^WARNING:.*\n"
    r"(?:Traceback.*\n(?:[ \t|+].*\n)*(?:[\w.]+(?:Error|Exception|Group|Cancelled|Closed|Closing)\b.*\n)*)?",
    re.MULTILINE,
)


def resident(pid: int | str = "self") -> int:
    """Bytes of memory that a process has in use."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def free_place(scheme: str, folder: Path, name: str, rng: random.Random) -> str:
    """An address that nobody has, and that nobody gets while its server is away."""
    if scheme == "unix":
        return f"unix://{folder}/{name}"
    while True:
        # Below the ports that the system gives out by itself: a client might get that of the server that it connects to.
        port = rng.randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return f"{scheme}://127.0.0.1:{port}"


def _target(address: str) -> tuple[str, str, int]:
    scheme, _, location = address.partition("://")
    if scheme == "unix":
        return scheme, location, 0
    host, _, port = location.rpartition(":")
    return scheme, host, int(port)


class Lag:
    """Knows for how long this process had no time for its tasks: a busy machine is nobody's fault."""

    def __init__(self) -> None:
        self.total = 0.0  # seconds, since the beginning

    async def run(self) -> None:
        """Watch the clock, until cancelled."""
        due = trio.current_time()
        while True:
            due += _BEAT
            await trio.sleep_until(due)
            late = trio.current_time() - due
            if late > _BEAT:
                self.total += late
                due += late


class ServerProcess:
    """One server, which may be killed and started again any number of times, always at the same address.

    Attributes:
        starts: how often it was started.
        counts: what those that stopped in order have counted, added up.
    """

    def __init__(self, name: str, address: str, folder: Path, problems: Callable[[str], object], lag: Lag) -> None:
        self.name = name
        self.address = address
        self._folder = folder
        self._problem = problems
        self._lag = lag
        self._process: trio.Process | None = None
        self.starts = 0
        self.counts: Counter[str] = Counter()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it; returns when it listens."""
        command = [sys.executable, *SERVER, self.address, str(self._folder / "journal")]
        if self.address.startswith("tls"):
            command.append(str(self._folder / "identity"))
        with open(self._folder / f"{self.name}.log", "ab") as log:
            process = await trio.lowlevel.open_process(command, cwd=_ROOT, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=log)
        self._process = process
        self.starts += 1
        if not (await self._line()).get("listening"):
            raise RuntimeError(f"{self.name} did not start: {self.log()[-2000:]}")

    async def _line(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = b""
        with trio.move_on_after(PATIENCE):
            while not line.endswith(b"\n") and (data := await self._process.stdout.receive_some()):
                line += data
        return dict(json.loads(line)) if line else {}

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """End it where it stands."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            with trio.CancelScope(shield=True), trio.move_on_after(PATIENCE):
                await process.wait()
            assert process.stdout is not None
            await trio.aclose_forcefully(process.stdout)

    async def stop(self) -> None:
        """Stop it in order, and see that it was."""
        process = self._process
        assert process is not None
        began = time.monotonic()
        lag = self._lag.total
        self.send(signal.SIGTERM)
        with trio.move_on_after(PATIENCE):
            counted = await self._line()
            code = await process.wait()
            took = time.monotonic() - began - (self._lag.total - lag)
            if code != 0 or not counted:
                self._problem(f"{self.name} ended with {code}, counting {counted}: {self.log()[-2000:]}")
            elif counted["started"] != counted["finished"] or counted["left"]:
                self._problem(f"{self.name} has left something behind: {counted}")
            if took > GRACE + LATE:
                self._problem(f"{self.name} took {took:.2f} s to stop, with a grace of {GRACE} s")
            self.counts.update(started=counted.get("started", 0), finished=counted.get("finished", 0), stops=1)
            self.counts["slowest_stop"] = max(self.counts["slowest_stop"], round(1000 * took))
        if process.returncode is None:
            self._problem(f"{self.name} does not stop: {self.log()[-2000:]}")
        await self.kill()

    def log(self) -> str:
        """What its logging has said."""
        path = self._folder / f"{self.name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def loud(self) -> list[str]:
        """What of that nobody wants to read."""
        return _LOUD.findall(_WARNING.sub("", self.log()))


class Proxy:
    """Stands between clients and a server, and does harm when told to.

    Attributes:
        address: where clients connect to.
        delay: seconds for which each piece is held up.
        rate: bytes a second that pass.
    """

    def __init__(self, address: str, target: str) -> None:
        self.address = address
        self._target = target
        self._open = trio.Event()
        self._open.set()
        self._pairs: set[tuple[trio.SocketStream, trio.SocketStream, trio.CancelScope]] = set()
        self.delay = 0.0
        self.rate = float("inf")

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Pass on what comes, until cancelled."""
        scheme, host, port = _target(self.address)
        if scheme == "unix":
            sock = trio.socket.socket(trio.socket.AF_UNIX)
            await sock.bind(host)
            sock.listen(128)
            listeners = [trio.SocketListener(sock)]
        else:
            listeners = await trio.open_tcp_listeners(port, host=host)
        try:
            await trio.serve_listeners(self._pass_between, listeners, task_status=task_status)
        finally:
            if scheme == "unix":
                Path(host).unlink()

    def partition(self) -> None:
        """Pass on nothing; what comes waits."""
        self._open = trio.Event()

    def heal(self) -> None:
        """Pass on everything as it comes."""
        self._open.set()
        self.delay, self.rate = 0.0, float("inf")

    def cut(self) -> None:
        """Reset every connection, at both ends."""
        for client, server, scope in self._pairs:
            for stream in (client, server):
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            scope.cancel()

    async def _pass_between(self, client: trio.SocketStream) -> None:
        scheme, host, port = _target(self._target)
        try:
            server = await (trio.open_unix_socket(host) if scheme == "unix" else trio.open_tcp_stream(host, port))
        except OSError:
            client.socket.close()
            return
        scope = trio.CancelScope()
        pair = client, server, scope
        self._pairs.add(pair)
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pass_on, client, server, scope)
                    nursery.start_soon(self._pass_on, server, client, scope)
        finally:
            self._pairs.discard(pair)
            for stream in (client, server):
                stream.socket.close()  # also where this has been cancelled

    async def _pass_on(self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            while data := await source.receive_some(64 * 1024):
                if self.delay or self.rate != float("inf"):
                    await trio.sleep(self.delay + len(data) / self.rate)
                await self._open.wait()
                await sink.send_all(data)
            await self._open.wait()
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            scope.cancel()  # the end of one direction by an error is the end of both


class Nemesis:
    """Harms one server, and the way to it, at random.

    Args:
        server: the one.
        proxy: the way to it.
        rng: decides.
        only: what may be done, of "pause", "partition", "slow", "cut", "kill", "kill, paused" and "stop".
        turns: to start servers, of which it needs one.
        pace: of its own doing, where 1 is about one deed in a second.

    Attributes:
        deeds: what it has done, and how often.
    """

    def __init__(
        self,
        server: ServerProcess,
        proxy: Proxy,
        rng: random.Random,
        *,
        only: Collection[str],
        turns: trio.Semaphore,
        pace: float,
    ) -> None:
        self.server = server
        self.proxy = proxy
        self._rng = rng
        self._turns = turns
        self._pace = pace
        ways = {
            "pause": self._pause,
            "partition": self._partition,
            "slow": self._slow,
            "cut": self._cut,
            "kill": self._kill,
            "kill, paused": self._kill_paused,
            "stop": self._stop,
        }
        self._ways = {name: ways[name] for name in only}
        self.deeds: Counter[str] = Counter()

    @property
    def idle(self) -> bool:
        """Whether there is nothing that it may do."""
        return not self._ways

    @property
    def undone(self) -> list[str]:
        """What it has not done yet."""
        return [name for name in self._ways if not self.deeds[name]]

    async def run(self) -> None:
        """Do harm, until cancelled; then all is well again."""
        waiting: list[str] = []
        while True:
            if not waiting:  # each of them once, then each of them again: so a short run has all of them, too
                waiting = self._rng.sample(list(self._ways), len(self._ways))
            way = waiting.pop()
            await self._sleep(0.02, 0.4)
            await self._ways[way]()
            self.deeds[way] += 1

    async def _sleep(self, least: float, most: float) -> None:
        await trio.sleep(self._rng.uniform(least, most) / self._pace)

    async def _pause(self) -> None:
        self.server.send(signal.SIGSTOP)
        try:
            await self._sleep(0.05, 0.8)
        finally:
            self.server.send(signal.SIGCONT)

    async def _partition(self) -> None:
        self.proxy.partition()
        try:
            await self._sleep(0.05, 0.8)
            if self._rng.random() < 0.5:
                self.proxy.cut()
        finally:
            self.proxy.heal()

    async def _slow(self) -> None:
        self.proxy.delay = self._rng.uniform(0.001, 0.05)
        self.proxy.rate = self._rng.choice([64e3, 1e6, 1e7])
        try:
            await self._sleep(0.1, 1.0)
        finally:
            self.proxy.heal()

    async def _cut(self) -> None:
        self.proxy.cut()
        await trio.lowlevel.checkpoint()

    async def _kill(self) -> None:
        await self._restart(self.server.kill)

    async def _kill_paused(self) -> None:
        async def end() -> None:
            self.server.send(signal.SIGSTOP)
            await self._sleep(0.05, 0.5)
            await self.server.kill()

        await self._restart(end)

    async def _stop(self) -> None:
        await self._restart(self.server.stop)

    async def _restart(self, end: Callable[[], Any]) -> None:
        # To start one takes a processor's time, of which the others need some.  And what has begun is brought to its end: afterwards
        # each server is there.
        async with self._turns:
            with trio.CancelScope(shield=True), trio.move_on_after(3 * PATIENCE):
                await end()
                await self._sleep(0, 0.2)
                await self.server.start()


def write_identity(folder: Path) -> None:
    """For servers over TLS."""
    identity = ours()
    path = folder / "identity"
    path.touch(mode=0o600)
    values = {"tls_ca_file": identity.authority, "tls_cert": identity.certificate, "tls_key": identity.key}
    path.write_text(json.dumps(values), encoding="utf-8")
