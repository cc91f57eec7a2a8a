from __future__ import annotations

import io
import sys

import pytest
import trio
import trio.testing

from trio_dcore import rpc
from trio_dcore.cli import _call, main
from trio_dcore.cli._progress import shown_progress, size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called by the test itself: pytest sets stderr anew between a fixture and the test."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    return terminal


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**20 // 2, "2.5 MiB"), (2**30, "1.0 GiB"), (2**41, "2048.0 GiB")],
)
def test_sizes(count: int, shown: str) -> None:
    assert size(count) == shown


async def test_it_is_written_over_and_removed(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    terminal = at_a_terminal(monkeypatch)
    async with shown_progress(lambda waited: f"waited {waited:.1f}", wanted=True):
        await trio.sleep(1.5)
    assert terminal.getvalue().split("\r\x1b[K") == ["", "waited 1.0", "waited 1.2", "waited 1.4", ""]


async def test_what_is_over_soon_shows_nothing(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    terminal = at_a_terminal(monkeypatch)
    async with shown_progress(lambda waited: "x", wanted=True):
        await trio.sleep(0.9)
    assert terminal.getvalue() == ""


async def test_it_is_removed_when_the_block_fails(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    terminal = at_a_terminal(monkeypatch)
    with pytest.RaisesGroup(ValueError):
        async with shown_progress(lambda waited: "x", wanted=True):
            await trio.sleep(1.1)
            raise ValueError
    assert terminal.getvalue() == "\r\x1b[Kx\r\x1b[K"


async def test_it_fits_into_a_line(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    terminal = at_a_terminal(monkeypatch)
    async with shown_progress(lambda waited: "x" * 200, wanted=True):
        await trio.sleep(1.1)
    assert terminal.getvalue() == f"\r\x1b[K{'x' * 79}\r\x1b[K"


async def test_not_on_a_terminal_that_can_not_remove_it(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    terminal = at_a_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    async with shown_progress(lambda waited: "x", wanted=True):
        await trio.sleep(2)
    assert terminal.getvalue() == ""


async def test_not_where_nobody_looks(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    terminal = at_a_terminal(monkeypatch)
    async with shown_progress(lambda waited: "x", wanted=False):
        await trio.sleep(3)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    async with shown_progress(lambda waited: "x", wanted=True):
        await trio.sleep(3)
    assert (terminal.getvalue(), pipe.getvalue()) == ("", "")


def test_of_a_call(address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the call shows at the end of its time; the result and the error are as without a terminal."""
    terminal = at_a_terminal(monkeypatch)
    monkeypatch.setattr("trio_dcore.cli._progress._PATIENCE", 0.0)
    monkeypatch.setattr("trio_dcore.cli._progress._INTERVAL", 0.01)
    seen: list[str] = []
    traffic = _call._traffic

    def look(remote: object, waited: float) -> str:
        seen.append(traffic(remote, waited))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(_call, "_traffic", look)
    assert main(["call", address, "hang", "--timeout", "0.5"]) == 124
    assert traffic(rpc("tcp://127.0.0.1:1"), 7.2) == "7 s: connecting to tcp://127.0.0.1:1"
    assert seen[-1].startswith("0 s: sent ")
    assert "received" in seen[-1]
    assert terminal.getvalue().endswith("\r\x1b[Ktrio-dcore: error: timed out; give more time with --timeout\n")
    assert capsys.readouterr().out == ""


def test_of_a_stream_into_a_pipe(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_a_terminal(monkeypatch)
    monkeypatch.setattr("trio_dcore.cli._progress._PATIENCE", 0.0)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    assert main(["stream", address, "hang", "--timeout", "0.5"]) == 124
    assert pipe.getvalue() == ""
    assert "0 s: 0 items" in terminal.getvalue()
