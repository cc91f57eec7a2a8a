"""Group K: signals, processes, and several trio runs in one process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.reference.kit import Outcome, covers, short_folder
from trio_dcore import (
    CommClosedError,
    ConnectionPool,
    HandlerCancelled,
    LocalProtocolError,
    RPCClosed,
    Server,
    rpc,
    stop_on_signals,
)
from trio_dcore.testing import memory_network, no_leaks

signals = pytest.mark.skipif(os.name == "nt", reason="Windows can't send these signals to one process")

# A test that hangs ends then; nothing here waits for it otherwise.
PATIENCE = 60.0
GRACE = 5.0

HANDLERS = """
import sys
import trio
from trio_dcore import Server, current_request, stop_on_signals

def say(*what):
    print(*what, flush=True)

async def hold():
    "Work in flight, which ends soon after it has heard of the shutdown."
    say("began")
    await current_request().shutdown_requested.wait()
    say("asked")
    return "held"

async def hang():
    "Work that does not end by itself."
    try:
        say("began")
        await current_request().shutdown_requested.wait()
        say("asked")
        await trio.sleep_forever()
    finally:
        say("cleaned up")

handlers = {"hold": hold, "hang": hang}
"""

# What stands in the place of `...` decides how the program ends on signals.
PROGRAM = """
from handlers import *

async def main():
    {body}
    say("main has ended")

trio.run(main)
"""

BODIES = {
    # As the documentation shows it.
    "waiting": """
    async with Server(handlers, grace={grace}) as server:
        say("listening on", await server.listen("{where}"))
        await stop_on_signals(server)
""",
    # A task among others, in a nursery inside of the server's block.
    "task": """
    async with Server(handlers, grace={grace}) as server, trio.open_nursery() as nursery:
        await nursery.start(stop_on_signals, server)
        say("listening on", await server.listen("{where}"))
""",
    # A program that does nothing about signals.
    "without": """
    async with Server(handlers, grace={grace}) as server:
        say("listening on", await server.listen("{where}"))
        await server.finished()
""",
}


class Program:
    """A server in a process of its own.

    Attributes:
        address: where it listens.
    """

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._buffer = b""
        self.address = ""

    async def line(self) -> str:
        """The next line that it prints; empty at the end."""
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            data = await self._process.stdout.receive_some()
            if not data:
                break
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ended(self) -> tuple[int, str]:
        """Its exit code, negative where a signal ended it, and all that it wrote to stderr."""
        assert self._process.stderr is not None
        errors = b"".join([bytes(data) async for data in self._process.stderr])
        return await self._process.wait(), errors.decode()


@asynccontextmanager
async def running(folder: Path, body: str, grace: float = GRACE, where: str = "tcp://127.0.0.1:0") -> AsyncIterator[Program]:
    """Run one of the programs above, or ``trio-dcore serve``."""
    (folder / "handlers.py").write_text(HANDLERS, encoding="utf-8")
    command = [sys.executable, "-W", "error"]
    if body == "serve":
        command += ["-m", "trio_dcore.cli", "serve", "handlers:handlers", "--grace", str(grace), "--listen", where]
    else:
        (folder / "program.py").write_text(PROGRAM.format(body=BODIES[body].format(grace=grace, where=where)), encoding="utf-8")
        command += ["program.py"]
    path = os.pathsep.join(str(Path(each).resolve()) for each in sys.path if each)
    process = await trio.lowlevel.open_process(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    program = Program(process)
    try:
        with trio.fail_after(PATIENCE):
            line = await program.line()
            assert line.startswith("listening on "), await program.ended()
            program.address = line.removeprefix("listening on ")
            yield program
    finally:
        process.kill()
        with trio.CancelScope(shield=True), trio.move_on_after(PATIENCE):
            await process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            await trio.aclose_forcefully(stream)


async def call(program: Program, op: str, outcome: Outcome) -> None:
    """Call the program."""
    async with rpc(program.address) as remote:
        await outcome.of(remote[op])


def is_quiet(errors: str) -> bool:
    """Whether nothing was written to stderr but what an orderly run logs."""
    return not re.search(r"Traceback|Error|Exception|WARNING|ERROR", errors)


# -- K01: SIGTERM ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["tcp", "unix"])
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a program listens on; a path is not left behind."""
    if request.param == "tcp":
        yield "tcp://127.0.0.1:0"
    else:
        with short_folder() as folder:
            yield f"unix://{folder}/sock"


@signals
@covers("K01", "t u")
@pytest.mark.parametrize("body", ["serve", "waiting", "task"])
async def test_k01_sigterm_lets_work_in_flight_end(body: str, where: str, tmp_path: Path) -> None:
    async with no_leaks(), running(tmp_path, body, where=where) as program, trio.open_nursery() as nursery:
        outcome = Outcome()
        nursery.start_soon(call, program, "hold", outcome)
        assert await program.line() == "began"
        start = trio.current_time()
        program.send(signal.SIGTERM)
        assert await program.line() == "asked"
        await outcome.ended()
        code, errors = await program.ended()
        assert trio.current_time() - start < GRACE  # it ended when its work had, and not when the grace was over
        assert outcome.value == "held"
        assert code == 0
        assert is_quiet(errors)
        assert await program.line() == ("" if body == "serve" else "main has ended")


@signals
@covers("K01", "t u")
@pytest.mark.parametrize("body", ["serve", "waiting"])
async def test_k01_sigterm_cuts_what_takes_longer_than_the_grace(body: str, where: str, tmp_path: Path) -> None:
    async with no_leaks(), running(tmp_path, body, grace=0.2, where=where) as program, trio.open_nursery() as nursery:
        outcome = Outcome()
        nursery.start_soon(call, program, "hang", outcome)
        assert await program.line() == "began"
        start = trio.current_time()
        program.send(signal.SIGTERM)
        assert await program.line() == "asked"
        assert await program.line() == "cleaned up"
        code, errors = await program.ended()
        assert 0.2 <= trio.current_time() - start < 0.2 + 1
        await outcome.ended()
        with pytest.raises(HandlerCancelled) as caught:
            _ = outcome.value
        assert caught.value.reason == "grace over"
        assert code == 0
        assert is_quiet(errors)


# -- K02: Ctrl-C -----------------------------------------------------------------------------------------------------------------


@signals
@covers("K02", "t")
@pytest.mark.parametrize("body", ["serve", "waiting", "task"])
async def test_k02_one_ctrl_c_drains(body: str, tmp_path: Path) -> None:
    async with no_leaks(), running(tmp_path, body) as program, trio.open_nursery() as nursery:
        outcome = Outcome()
        nursery.start_soon(call, program, "hold", outcome)
        assert await program.line() == "began"
        program.send(signal.SIGINT)
        assert await program.line() == "asked"
        await outcome.ended()
        code, errors = await program.ended()
        assert outcome.value == "held"
        assert code == 0
        assert is_quiet(errors)


@signals
@covers("K02", "t")
@pytest.mark.parametrize("body", ["serve", "waiting", "task"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)],
    ids=["int-int", "term-int", "int-term"],
)
async def test_k02_the_second_signal_is_hard(first: signal.Signals, second: signal.Signals, body: str, tmp_path: Path) -> None:
    async with no_leaks(), running(tmp_path, body, grace=PATIENCE) as program, trio.open_nursery() as nursery:
        outcome = Outcome()
        nursery.start_soon(call, program, "hang", outcome)
        assert await program.line() == "began"
        program.send(first)
        assert await program.line() == "asked"
        start = trio.current_time()
        program.send(second)
        assert await program.line() == "cleaned up"
        code, errors = await program.ended()
        assert trio.current_time() - start < 2
        await outcome.ended()
        assert isinstance(outcome.error, HandlerCancelled)
        assert await program.line() == ""  # nothing behind the server's block has run
        assert "Group" not in errors
        assert "sub-exception" not in errors
        if second is signal.SIGTERM:
            assert code == 128 + signal.SIGTERM
            assert is_quiet(errors)
        elif body == "serve":
            assert code == 130
            assert is_quiet(errors)
        else:
            assert code == -signal.SIGINT  # as Python ends by an uncaught KeyboardInterrupt
            assert errors.rstrip().endswith("KeyboardInterrupt")
            assert errors.count("Traceback (most recent call last)") == 1


@signals
@covers("K02", "t")
async def test_k02_without_the_helper_the_first_is_hard(tmp_path: Path) -> None:
    async with no_leaks(), running(tmp_path, "without", grace=PATIENCE) as program, trio.open_nursery() as nursery:
        outcome = Outcome()
        nursery.start_soon(call, program, "hang", outcome)
        assert await program.line() == "began"
        start = trio.current_time()
        program.send(signal.SIGINT)
        lines = [await program.line(), await program.line()]
        assert "cleaned up" in lines
        code, errors = await program.ended()
        assert trio.current_time() - start < 2
        await outcome.ended()
        # Python may raise the KeyboardInterrupt in the handler's own code; then nobody is left to tell the caller.
        assert isinstance(outcome.error, (HandlerCancelled, CommClosedError))
        assert code == -signal.SIGINT
        assert "Group" not in errors
        assert errors.rstrip().endswith("KeyboardInterrupt")


@signals
async def test_the_handlers_of_before_are_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with Server() as server:
        async with trio.open_nursery() as nursery:
            await nursery.start(stop_on_signals, server)
            assert signal.getsignal(signal.SIGTERM) != before[1]
            nursery.cancel_scope.cancel()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        assert server.status.name == "running"
        async with trio.open_nursery() as nursery:
            await nursery.start(stop_on_signals, server)
            server.stop()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@signals
@pytest.mark.parametrize("started", [False, True])
async def test_stop_on_signals_where_there_is_nothing_to_stop(started: bool) -> None:
    """A server that has closed already; and one that was told to stop before it began."""
    server = Server()
    if started:
        async with server:
            pass
    async with trio.open_nursery() as nursery:
        if not started:
            await nursery.start(stop_on_signals, server)
            signal.raise_signal(signal.SIGTERM)
        else:
            await nursery.start(stop_on_signals, server)
    assert server.status.name == "closed"


async def test_stop_on_signals_is_for_the_main_thread() -> None:
    async def elsewhere() -> None:
        async with Server() as server:
            await stop_on_signals(server)

    with pytest.raises(RuntimeError, match="main thread"):
        await trio.to_thread.run_sync(trio.run, elsewhere)


# -- K05: several runs -----------------------------------------------------------------------------------------------------------

WHERE = ["tcp://127.0.0.1:0", "inproc://the-same-name", "memory://the-same-name"]


async def serve_and_call(where: str, meet: Any = None) -> int:
    """A server and a call to it; ``meet`` is called in the middle, in a worker thread."""
    with memory_network():
        async with Server({"add": lambda x, y: x + y}) as server, rpc(await server.listen(where)) as remote:
            result: int = await remote.add(x=1, y=2)
            if meet is not None:
                await trio.to_thread.run_sync(meet)
            return result + await remote.add(x=3, y=4) - 7


@covers("K05", "t")
@pytest.mark.parametrize("where", WHERE)
def test_k05_one_run_after_the_other(where: str) -> None:
    with no_leaks():
        for _ in range(3):
            assert trio.run(serve_and_call, where) == 3


@covers("K05", "t")
@pytest.mark.parametrize("where", WHERE)
def test_k05_two_runs_at_once_in_two_threads(where: str) -> None:
    """They are in the middle at the same time, and inproc and memory names belong to each of them."""
    both = threading.Barrier(2, timeout=PATIENCE)
    results: list[int] = []

    def run() -> None:
        results.append(trio.run(serve_and_call, where, both.wait))

    threads = [threading.Thread(target=run) for _ in range(2)]
    with no_leaks():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert results == [3, 3]


@covers("K05", "t")
def test_k05_a_server_serves_once() -> None:
    server = Server({"add": lambda x, y: x + y})

    async def first() -> None:
        async with server:
            address = await server.listen("tcp://127.0.0.1:0")
            with pytest.raises(LocalProtocolError, match="serves once, and this one is running; make a new one"):
                await server.serve("tcp://127.0.0.1:0")
            async with rpc(address) as remote:
                assert await remote.add(x=1, y=1) == 2  # that did it no harm
        await again()

    async def again() -> None:
        with pytest.raises(LocalProtocolError, match="serves once, and this one is closed; make a new one"):
            async with server:
                pass
        with pytest.raises(LocalProtocolError, match="make a new one"):
            await server.serve("tcp://127.0.0.1:0")
        with pytest.raises(LocalProtocolError, match="make a new one"):
            await server.listen("tcp://127.0.0.1:0")
        server.stop()
        await server.aclose()
        await server.finished()
        with pytest.raises(RPCClosed):
            await server.rpc("tcp://127.0.0.1:1").add()

    for main in (first, again):
        with no_leaks():
            trio.run(main)


@covers("K05", "t")
def test_k05_what_is_made_outside_of_a_run_works_inside() -> None:
    server = Server({"add": lambda x, y: x + y})
    pool = ConnectionPool()

    async def main() -> None:
        async with server, pool:
            assert await pool(await server.listen("tcp://127.0.0.1:0")).add(x=1, y=2) == 3

    with no_leaks():
        trio.run(main)


@covers("K05", "t")
def test_k05_a_pool_that_was_left_open_by_a_run_that_has_ended() -> None:
    """Its comms died with that run: the next one, where it is used again, has to make its own."""
    pool = ConnectionPool()

    async def main(first: bool) -> None:
        async with Server({"add": lambda x, y: x + y}) as server:
            address = await server.listen("tcp://127.0.0.1:0" if first else f"tcp://127.0.0.1:{port}")
            assert await pool(address).add(x=1, y=2) == 3
            ports.append(server.port)

    ports: list[int] = []
    with no_leaks():
        trio.run(main, True)
        port = ports[0]
        trio.run(main, False)
        pool.close_now()
