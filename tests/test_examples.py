"""Every example runs as a test: in this process on a free port, and server and client as two programs."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import trio

from trio_dcore.aio import open_loop

EXAMPLES = Path(__file__).parent.parent / "examples"

CLIENTS = {
    "client_comm": ["1 + 2 = 3"],
    "client_stream": ["read 1", "read 2", "read 3", "streamed 1", "streamed 2", "streamed 3"],
    "client_rpc": [
        "1 + 2 = 3",
        "doubled: [0, 2, 4, 6, 8]",
        "TypeError, remote: True",
        "gave up waiting for the next one: True",
    ],
}
PROGRAMS = {
    "stateful_server": ["watched: None", "watched: blue", "got: red", "KeyError: taste"],
    "numpy_echo": ["[[0.0, 10.0, 20.0], [30.0, 40.0, 50.0]] float32", "3000000 bytes, equal: True"],
    "batched": ["not sent: value", "fewer lists than messages: True", "10000 measurements, mean 2499.75"],
    "job_queue": [
        "anne lost job 3",
        "squares: [0, 1, 4, 9, 16, 25]",
        "failed: ValueError: math domain error",
        "the queue and its workers have ended",
    ],
    "asyncio_in_trio": [
        "HELLO",
        "163e4956",
        "tick 0",
        "tick 1",
        "tick 2",
        "the ticks have ended",
        "cancelled, as asyncio does it",
        "A TRIO TASK CALLS IT, TOO",
    ],
    "embedding": ["plausible: True", "server: closed"],
    "dask_from_trio": [
        "sum of 1000 squares: 332833500",
        "gave up waiting: True",
        "the cluster has time for others: 25",
        "scheduler: closed",
    ],
}

ASYNCIO = {
    "trio_in_asyncio": [
        "menu: ('soup', 'stew')",
        "served: ['hot soup', 'hot stew']",
        "too slow",
        "course 1",
        "course 2",
        "by hand: hot egg",
        "the kitchen has closed",
        "courses: cleared away",
        "roast: sent back",
    ],
    "asgi": ["added: 3", "counted: 0 1 2", "stopped"],
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def test_every_example_is_listed_here_and_in_the_readme() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"server", *CLIENTS, *PROGRAMS, *ASYNCIO}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert not [name for name in names if f"examples/{name}.py" not in readme]


@pytest.mark.parametrize("name", CLIENTS)
async def test_server_and_client(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {"interval": 0.0} if name == "client_stream" else {}
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(load("server").main, "tcp://127.0.0.1:0")
            await load(name).main(address, **arguments)
            nursery.cancel_scope.cancel()
    listening, *lines = capsys.readouterr().out.splitlines()
    assert listening == f"listening on {address}"
    if name == "client_rpc" and "streamed 1" in lines:  # on a slow machine it gives up before that
        lines.remove("streamed 1")
    assert lines == CLIENTS[name]


@pytest.mark.parametrize("name", PROGRAMS)
async def test_program(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "numpy_echo":
        pytest.importorskip("numpy")
    if name in ("asyncio_in_trio", "dask_from_trio"):
        try:
            open_loop()
        except ImportError as error:
            pytest.skip(str(error))
    if name == "dask_from_trio":
        pytest.importorskip("distributed")
    with trio.fail_after(30):
        await load(name).main()
    lines = capsys.readouterr().out.splitlines()
    # What two tasks print has no order between them.
    assert [line for line in PROGRAMS[name] if line not in lines] == []
    assert set(lines) - set(PROGRAMS[name]) <= {"watched: red"}


@pytest.mark.parametrize("name", ASYNCIO)
def test_asyncio_program(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "asgi":
        pytest.importorskip("uvicorn")
    # Not asyncio.run(): once trio_asyncio has been imported that makes one of its loops.
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(load(name).main())
    assert capsys.readouterr().out.splitlines() == ASYNCIO[name]


def test_the_job_queue_is_small() -> None:
    assert len((EXAMPLES / "job_queue.py").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.skipif(os.name == "nt", reason="Windows can't send SIGINT to one process")
def test_two_programs() -> None:
    server = subprocess.Popen(
        [sys.executable, "-W", "error", EXAMPLES / "server.py", "tcp://127.0.0.1:0"], stdout=subprocess.PIPE, text=True
    )
    with server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().removeprefix("listening on ").strip()
            client = subprocess.run(
                [sys.executable, "-W", "error", EXAMPLES / "client_comm.py", address],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert (client.stdout, client.stderr, client.returncode) == ("1 + 2 = 3\n", "", 0)
            server.send_signal(signal.SIGINT)
            assert server.stdout.read() == "stopped\n"
            assert server.wait(60) == 0
        finally:
            server.kill()
