from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from trio_dcore import Server
from trio_dcore.cli import main
from trio_dcore.cli._errors import CliError
from trio_dcore.cli._serve import load_server

signals = pytest.mark.skipif(os.name == "nt", reason="Windows can't send these signals to one process")

MODULE = """
import os
import signal
import trio
from trio_dcore import Server, current_request

def add(x, y):
    return x + y

async def hold():
    print("began", flush=True)
    await current_request().shutdown_requested.wait()
    return "held"

async def hang():
    print("began", flush=True)
    await trio.sleep_forever()

handlers = {"add": add, "hold": hold, "hang": hang}

class Calculator(Server):
    def __init__(self):
        super().__init__({"add": add})

class Needy(Server):
    def __init__(self, what):
        super().__init__({})

class Slow(Server):
    async def listen(self, address=None):
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep_forever()

class namespace:
    handlers = handlers

server = Server(handlers)
def make_dict(): return handlers
def make_server(): return Server(handlers)
def make_nothing(): return None
def make_error(): raise RuntimeError("not today")
async def make_async(): return handlers
answer = 42
strange = {"echo": lambda data: [data]}
not_callable = {"add": 3}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module to serve, in the current directory."""
    name = "module_that_serves"
    (tmp_path / f"{name}.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken_inside.py").write_text("import no_such_module_at_all\n", encoding="utf-8")
    (tmp_path / "broken_syntax.py").write_text("x = 1\nx = = 2\n", encoding="utf-8")
    (tmp_path / "broken_run.py").write_text("\n\n1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield name
    for added in set(sys.modules) - before:
        if added.startswith(("module_that_serves", "broken_")):
            del sys.modules[added]


@pytest.mark.parametrize("what", ["handlers", "namespace.handlers", "Calculator", "server", "make_dict", "make_server"])
def test_what_can_be_served(module: str, what: str) -> None:
    server = load_server(f"{module}:{what}")
    assert isinstance(server, Server)
    assert "add" in server.handlers


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("{}", "MODULE:HANDLERS"),
        ("{}:", "MODULE:HANDLERS"),
        (":handlers", "MODULE:HANDLERS"),
        ("{}.py:handlers", "module_that_serves:handlers"),
        ("./{}.py:handlers", " module_that_serves:handlers"),
        ("{}:nosuch", "has no 'nosuch'"),
        ("{}:namespace.nosuch", "has no 'namespace.nosuch'"),
        ("{}:answer", "is 42; a dict of handlers"),
        ("{}:make_nothing", "is None; a dict of handlers"),
        ("{}:make_error", "RuntimeError: not today"),
        ("{}:make_async", "is an async function"),
        ("{}:Needy", "missing 1 required positional argument: 'what'"),
        ("no_such_module_at_all:x", "there is no module 'no_such_module_at_all'"),
        ("no_such_module_at_all.inner:x", "there is no module"),
        ("broken_inside:x", "No module named 'no_such_module_at_all'"),
        ("broken_syntax:x", "broken_syntax.py, line 2"),
        ("broken_run:x", "broken_run.py, line 3"),
    ],
)
def test_what_can_not_be_served_is_said_in_one_line(module: str, what: str, said: str) -> None:
    with pytest.raises(CliError) as caught:
        load_server(what.format(module))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.code == 2


@pytest.mark.parametrize("what", ["not_callable"])
def test_handlers_that_a_server_refuses(module: str, what: str) -> None:
    with pytest.raises(CliError, match="can't be served"):
        load_server(f"{module}:{what}")


def test_an_address_that_is_none(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", f"{module}:handlers", "--listen", "http://x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "unknown scheme 'http'" in err.splitlines()[-1]


def test_a_port_that_is_taken(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", f"{module}:handlers", "--listen", f"tcp://127.0.0.1:{port}"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert str(port) in err.splitlines()[-1]


@signals
def test_a_signal_before_it_listens_ends_it(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", f"{module}:Slow"]) == 0
    assert "listening" not in capsys.readouterr().out


@contextmanager
def serving(*argv: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run ``trio-dcore serve`` as a program of its own; yield it and the address that it printed."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "trio_dcore.cli", "serve", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The tests may run from a checkout that is not installed.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    ) as program:
        try:
            assert program.stdout is not None
            line = program.stdout.readline()
            assert line.startswith("listening on "), program.communicate(timeout=60)
            yield program, line.removeprefix("listening on ").strip()
        finally:
            program.kill()


def stderr_of(program: subprocess.Popen[str]) -> str:
    assert program.stderr is not None
    return program.stderr.read()


def line_from(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline()


@signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_order(module: str, number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        serving(f"{module}:handlers", "--listen", "tcp://127.0.0.1:0", "--grace", "30") as (program, address),
        ThreadPoolExecutor(1) as pool,
    ):
        assert main(["call", address, "add", "x=1", "y=2"]) == 0
        held = pool.submit(main, ["call", address, "hold"])
        assert line_from(program) == "began\n"
        program.send_signal(number)
        assert held.result(60) == 0
        assert program.wait(60) == 0
        assert f"{number.name}: stopping" in stderr_of(program)
        assert line_from(program) == ""
    assert capsys.readouterr().out == '3\n"held"\n'


@signals
def test_a_second_signal_stops_it_now(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(f"{module}:handlers", "--grace", "inf") as (program, address), ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(main, ["call", address, "hang", "--timeout", "inf"])
        assert line_from(program) == "began\n"
        program.send_signal(signal.SIGTERM)
        assert program.stderr is not None
        while "SIGTERM: stopping" not in (line := program.stderr.readline()):
            assert line, "it ended before it said that it is stopping"
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 130
        assert hanging.result(60) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1


@signals
def test_it_listens_at_several_addresses(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--listen", "tcp://127.0.0.1:0", "--listen", "127.0.0.1:0"]
    with serving(f"{module}:Calculator", *both) as (program, first):
        second = line_from(program).removeprefix("listening on ").strip()
        assert first != second
        assert main(["call", first, "add", "x=1", "y=1"]) == 0
        assert main(["call", second, "add", "x=2", "y=2"]) == 0
        program.send_signal(signal.SIGTERM)
        assert program.wait(60) == 0
    assert capsys.readouterr().out == "2\n4\n"


@signals
@pytest.mark.parametrize("closed", ["by us", "by its reader"])
def test_it_serves_though_nobody_reads_where(module: str, closed: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-W", "error", "-m", "trio_dcore.cli", "serve", f"{module}:handlers"]
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command] if closed == "by us" else command,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    ) as program:
        os.close(writer)
        try:
            assert program.stderr is not None
            found = re.search(r"tcp://127\.0\.0\.1:\d+", program.stderr.readline())
            assert found is not None
            assert main(["call", found[0], "add", "x=1", "y=2"]) == 0
            program.send_signal(signal.SIGTERM)
            assert program.wait(60) == 0
            assert "Traceback" not in program.stderr.read()
        finally:
            program.kill()
    assert capsys.readouterr().out == "3\n"


@signals
def test_ping_of_a_server_that_echoes_something_else(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(f"{module}:strange") as (_, address):
        assert main(["ping", address]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"trio-dcore: error: {address} answers an echo of 0 with [0]; is it a Dask server?\n"
