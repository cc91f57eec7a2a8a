"""An ASGI application under uvicorn: its lifespan runs an aio.Server, its requests call a server through aio.rpc."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.aio.scenarios import free_port
from trio_dcore import Server, rpc
from trio_dcore.testing import no_leaks

pytest.importorskip("uvicorn")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows can't send SIGTERM to one process")

ROOT = Path(__file__).parent.parent.parent
APPLICATION = ROOT / "examples" / "asgi.py"
PROGRAM = Path(__file__).parent / "programs" / "serve_asgi.py"


def get(port: int, path: str) -> tuple[int, list[Any]]:
    """The status, and what the lines of the answer say."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as response:
            return response.status, [json.loads(line) for line in response.read().splitlines()]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, [json.loads(line) for line in error.read().splitlines()]


@contextmanager
def started(*command: Any, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A program that is gone behind the block."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    program = subprocess.Popen(
        [sys.executable, "-X", "dev", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    try:
        with program:
            yield program
            program.kill()
    finally:
        program.kill()


def ended(program: subprocess.Popen[str]) -> tuple[str, str, int]:
    """What it says until its end."""
    out, err = program.communicate(timeout=30)
    return out, err, program.returncode


class Sums:
    """A server of trio's flavour, which the application calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.started = trio.Event()
        self.ended: list[str] = []

    async def add(self, x: int, y: int, seconds: float = 0) -> int:
        self.calls += 1
        self.started.set()
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.ended.append("cancelled")
            raise
        self.ended.append("returned")
        return 100 + x + y

    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield 100 + i


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_an_application(loop: str) -> None:
    """Requests call a server of another program, and others its own; it stops at a signal, with a request in flight, and leaves nothing."""
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    sums = Sums()
    async with no_leaks(), Server({"add": sums.add, "count": sums.count}) as server:
        address = await server.listen("tcp://127.0.0.1:0")
        with trio.fail_after(60), started(PROGRAM, APPLICATION, loop, CALL=address) as program:
            assert program.stdout is not None
            port = await trio.to_thread.run_sync(program.stdout.readline)
            ask: Callable[[str], Any] = partial(trio.to_thread.run_sync, get, int(port))

            assert await ask("/add?x=1&y=2") == (200, [103])
            assert await ask("/count?n=40") == (200, [100 + i for i in range(40)])
            assert await ask("/nothing") == (404, [])
            status, (text,) = await ask("/add?x=1")
            assert (status, "wrong arguments" in text) == (500, True)

            # Many at once, and one that gives up, which cancels the handler here.
            async with trio.open_nursery() as nursery:
                answers: list[Any] = []

                async def one(n: int) -> None:
                    answers.append(await ask(f"/add?x={n}&y=0&seconds=0.01"))

                for n in range(20):
                    nursery.start_soon(one, n)
            assert sorted(answers) == [(200, [100 + n]) for n in range(20)]
            assert await ask("/add?x=1&y=2&seconds=3600&timeout=0.1") == (504, ["too slow"])
            assert sums.ended.count("cancelled") == 1

            # The server that its lifespan runs can be called from here.
            _, (inside,) = await ask("/address")
            async with rpc(inside) as remote:
                assert await remote.add(x=1, y=2) == 3
                async with remote.count.stream(n=3) as stream:
                    assert [item async for item in stream] == [0, 1, 2]

            # SIGTERM, while a request waits for its call.
            sums.started = trio.Event()
            async with trio.open_nursery() as nursery:
                answers.clear()
                nursery.start_soon(lambda: one(7000))
                await sums.started.wait()
                program.send_signal(signal.SIGTERM)
            assert answers == [(200, [7100])]
            out, err, status = await trio.to_thread.run_sync(ended, program)
            assert (out, err, status) == ("terminated\nserved\nnothing is left\n", "", 0)
        while server.statistics().connections:  # noqa: ASYNC110
            await trio.sleep(0.001)
        assert sums.calls == 23


def test_the_command() -> None:
    """``uvicorn asgi:app``, as a user starts it."""
    port = free_port()
    with started("-W", "error", "-m", "uvicorn", "--app-dir", APPLICATION.parent, "--port", f"{port}", "asgi:app") as program:
        assert program.stderr is not None
        said = ""
        while "Uvicorn running" not in said:
            line = program.stderr.readline()
            assert line, said
            said += line
        assert get(port, "/add?x=1&y=2") == (200, [3])
        program.send_signal(signal.SIGTERM)
        _, err, status = ended(program)
    assert "Application shutdown complete." in err
    assert not re.search("Traceback|Warning|ERROR", err), err
    # uvicorn hands the signal on when it has stopped.
    assert status in (0, -signal.SIGTERM)
