"""T10: how long a server takes to stop: hard with 500 handlers in flight, and with 2 000 idle connections.

Run as ``python -m benchmarks.stopping [--rounds N]``.  The connections are held by another process, on plain sockets.
"""

from __future__ import annotations

import argparse
import math
import resource
import socket
import statistics
import struct
import subprocess
import sys
import time

import msgpack
import trio

from trio_dcore import Limits, Server

HANDLERS = 500
IDLE = 2000


def hold(address: str, count: int, call: bool) -> None:
    """The other process: open connections, make a request on each if asked, and keep them until told."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")

    def frame(message: object) -> bytes:
        head = msgpack.packb(message)
        return struct.pack("<QQQ", len(head) + 16, 1, len(head)) + head

    hello = frame({"compression": None, "python": [3, 11, 7], "pickle-protocol": 5})
    held = []
    for _ in range(count):
        sock = socket.create_connection((host, int(port)))
        sock.sendall(hello)
        held.append(sock)
    for sock in held:
        sock.recv(4096)
        sock.sendall(frame({"op": "wait", "reply": True}) if call else frame({"op": "identity"}))
        if not call:
            sock.recv(4096)
    print("ready", flush=True)
    sys.stdin.read()


class Handlers:
    """Counts the handlers that run and the ``finally`` blocks that ran."""

    def __init__(self, count: int) -> None:
        self.running = self.finished = 0
        self.count = count
        self.all_run = trio.Event()

    async def wait(self) -> None:
        self.running += 1
        if self.running == self.count:
            self.all_run.set()
        try:
            await trio.sleep_forever()
        finally:
            self.finished += 1


async def measure(count: int, *, call: bool) -> float:
    """Seconds from stop() to finished."""
    handlers = Handlers(count)
    async with Server({"wait": handlers.wait}, limits=Limits(connections=None)) as server:
        address = await server.listen("tcp://127.0.0.1:0")
        command = [sys.executable, "-m", "benchmarks.stopping", "--hold", address, str(count), str(int(call))]
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            await process.stdout.receive_some()
            if call:
                await handlers.all_run.wait()
            start = time.perf_counter()
            server.stop(0 if call else 5)
            await server.finished()
            took = time.perf_counter() - start
        finally:
            if process.stdin is not None:
                await process.stdin.aclose()
            await process.wait()
            if process.stdout is not None:
                await process.stdout.aclose()
    assert handlers.finished == handlers.running == (count if call else 0)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description="T10: how long a server takes to stop")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hold", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hold:
        raise_limit()
        hold(options.hold[0], int(options.hold[1]), options.hold[2] == "1")
        return
    raise_limit()
    for text, count, call, target in (
        (f"hard, {HANDLERS} handlers in flight", HANDLERS, True, 100.0),
        (f"{IDLE} idle connections", IDLE, False, 500.0),
    ):
        found = sorted(1000 * trio.run(lambda c=count, k=call: measure(c, call=k)) for _ in range(options.rounds))  # type: ignore[misc]
        median = statistics.median(found)
        met = "met    " if median <= target else "NOT MET"
        print(f"T10  {met} {text}: {median:.1f} ms (at most {target:.0f}; {found[0]:.1f} … {found[-1]:.1f})")


def raise_limit() -> None:
    """Both processes need a descriptor for each connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = IDLE + 200
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard if hard != resource.RLIM_INFINITY else math.inf), hard))


if __name__ == "__main__":
    main()
