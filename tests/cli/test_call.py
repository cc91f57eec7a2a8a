from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys

import pytest

from trio_dcore import __version__
from trio_dcore.cli import _parser, main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_call(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "call", address, "add", "x=1", "y=2") == (0, "3\n", "")
    assert run(capsys, "call", address.removeprefix("tcp://"), "add", "x=a", "y=b") == (0, '"ab"\n', "")


def test_call_prints_json_by_the_documented_rule(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "call", address, "describe")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "bytes": {"$bytes": "aGVsbG8="},
        "tuple": [1, 2],
        "set": {"$set": [1, 2]},
        "ratio": 0.5,
        "none": None,
    }


def test_call_takes_any_name(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "call", address, "odd-name")[0] == 0


def test_call_that_fails_over_there(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "call", address, "fail", "text=no such colour")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "ValueError: no such colour" in err


def test_call_shows_the_remote_traceback_if_asked(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "call", address, "fail", "text=x", "--traceback")
    assert code == 1
    assert "raise ValueError(text)" in err


def test_a_remote_traceback_moves_no_cursor(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "call", address, "fail_in_red", "--traceback")
    assert code == 1
    assert 'File "?[31m?2J", line 1' in err
    assert err.replace("\n", "").isprintable()


@pytest.mark.parametrize("command", ["call", "stream"])
def test_an_op_without_a_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, command, "tcp://127.0.0.1:1", "")
    assert (code, out) == (2, "")
    assert "OP is empty" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("argv", [("call", "{}", "add", "x=1", "y=2"), ("stream", "{}", "forever"), ("ping", "{}")])
def test_no_room_for_the_output(address: str, argv: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "trio_dcore.cli", *(word.format(address) for word in argv)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("trio-dcore: error: the output can't be written: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_with_stderr_closed(address: str) -> None:
    command = shlex.join([sys.executable, "-m", "trio_dcore.cli", "call", address, "add", "x=1", "y=2"])
    done = subprocess.run(f"{command} 2>&-", shell=True, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n")


def test_call_of_an_unknown_op_names_the_closest(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "call", address, "ad", "x=1", "y=2")
    assert code == 1
    assert err.count("\n") == 1
    assert "'add'" in err


def test_call_with_wrong_arguments(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "call", address, "add", "x=1")
    assert code == 1
    assert err.count("\n") == 1
    assert "add(x" in err  # the signature


def test_call_of_a_generator_advises_to_stream(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "call", address, "forever")
    assert code == 1
    assert "stream" in err


def test_call_that_takes_too_long(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "call", address, "hang", "--timeout", "0.05")
    assert (code, out) == (124, "")
    assert err == "trio-dcore: error: timed out; give more time with --timeout\n"


@pytest.mark.parametrize("command", ["call", "stream"])
@pytest.mark.parametrize("word", ["x", "=1", "op=add", "comm=1", "reply=false"])
def test_arguments_that_can_not_be_passed(command: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, command, "tcp://127.0.0.1:1", "add", word)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [("call", "{}", "add"), ("stream", "{}", "ticks"), ("ping", "{}")])
def test_addresses_that_are_none(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *(word.format("http://127.0.0.1:1") for word in argv))
    assert (code, out) == (2, "")
    assert "unknown scheme 'http'" in err


@pytest.mark.parametrize("argv", [("call", "{}", "add"), ("ping", "{}")])
def test_nobody_there(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    # bound but not listening: connecting is refused, and nobody else can get this port meanwhile
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        code, out, err = run(capsys, *(word.format(address) for word in argv), "--timeout", "0.3")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert address in err
    assert err.endswith("; is a server listening there?\n")


def test_stream(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "stream", address, "count", "n=3") == (0, "0\n1\n2\n", "")


def test_stream_stops_after_so_many_items(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "stream", address, "forever", "--count", "2") == (0, '{"n": 0}\n{"n": 1}\n', "")


def test_stream_that_fails(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "stream", address, "nosuch")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1


def test_stream_that_takes_too_long(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "stream", address, "hang", "--timeout", "0.05")
    assert (code, out) == (124, "")


def test_stream_into_a_pipe_that_closes(address: str) -> None:
    """As `| head -1` does: no complaint, and it ends."""
    with subprocess.Popen(
        [sys.executable, "-m", "trio_dcore.cli", "stream", address, "forever"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline() == '{"n": 0}\n'
        program.stdout.close()
        assert program.stderr.read() == ""
        assert program.wait(60) == 0


def test_ping(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "ping", address, "--count", "3")
    assert (code, err) == (0, "")
    who, connecting, echoes = out.splitlines()
    assert who.startswith(f"{address} is ")
    assert json.loads(who.removeprefix(f"{address} is "))["type"] == "Server"
    assert connecting.endswith(" ms")
    assert echoes.startswith("3 echoes: fastest ")


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("nosuch",),
        ("call",),
        ("call", "tcp://127.0.0.1:1"),
        ("call", "tcp://127.0.0.1:1", "add", "--timeout", "soon"),
        ("call", "tcp://127.0.0.1:1", "add", "--timeout", "-1"),
        ("call", "tcp://127.0.0.1:1", "add", "--timeout", "nan"),
        ("stream", "tcp://127.0.0.1:1", "add", "--count", "0"),
        ("ping", "tcp://127.0.0.1:1", "--count", "many"),
        ("demo", "loud"),
    ],
)
def test_wrong_usage(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: trio-dcore" in capsys.readouterr().err


@pytest.mark.parametrize("command", [(), ("serve",), ("call",), ("stream",), ("ping",), ("demo",)])
def test_help(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: trio-dcore" in capsys.readouterr().out


def test_an_interrupt_ends_it_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trio.run", interrupted)
    assert run(capsys, "call", "tcp://127.0.0.1:1", "add") == (130, "", "")


def test_tables(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "call", address, "describe", "--format", "table")
    assert code == 0
    assert "ratio  0.5" in out.splitlines()
    code, out, _ = run(capsys, "stream", address, "forever", "--count", "3", "--format", "table")
    assert (code, out) == (0, "n\n0\n1\n2\n")


def test_ping_as_json(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "ping", address, "--count", "3", "--format", "json")
    answer = json.loads(out)
    assert (code, answer["address"], answer["identity"]["type"]) == (0, address, "Server")
    assert len(answer["echo_seconds"]) == 3
    assert all(seconds > 0 for seconds in (answer["connect_seconds"], *answer["echo_seconds"]))


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"trio-dcore {__version__}\n"


def test_every_command_has_examples_that_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    """Each example is a line that the parser takes."""
    parser = _parser()
    shown = 0
    for command in ([], ["serve"], ["call"], ["stream"], ["ping"], ["demo"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        out = capsys.readouterr().out
        examples = [line.strip() for line in out.partition("\nexamples:\n")[2].splitlines() if line.startswith("  trio-dcore ")]
        assert examples
        for example in examples:
            words = shlex.split(example)[1:]
            assert not command or words[0] == command[0]
            parser.parse_args(words)
            shown += 1
    assert shown >= 10
