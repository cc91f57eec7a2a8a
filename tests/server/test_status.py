"""The server's life."""

from __future__ import annotations

import enum

import pytest

from trio_dcore import LocalProtocolError, Status
from trio_dcore.protocol import dumps, loads
from trio_dcore.server._status import Life

MOVES = {
    (Life.NEW, Life.SERVING),
    (Life.NEW, Life.CLOSED),
    (Life.SERVING, Life.DRAINING),
    (Life.SERVING, Life.CLOSING),
    (Life.DRAINING, Life.CLOSING),
    (Life.CLOSING, Life.CLOSED),
}


@pytest.mark.parametrize("start", Life)
@pytest.mark.parametrize("end", Life)
def test_no_other_moves(start: Life, end: Life) -> None:
    if (start, end) in MOVES:
        assert start.move(end) is end
    else:
        with pytest.raises(LocalProtocolError, match=f"from {start.name} to {end.name}"):
            start.move(end)


def test_what_it_shows() -> None:
    assert [life.value.name for life in Life] == ["init", "running", "closing_gracefully", "closing", "closed"]


def test_the_names_are_dasks() -> None:
    from distributed.core import Status as Stock

    assert {member.name: member.value for member in Status} == {member.name: member.value for member in Stock}


@pytest.mark.parametrize("status", Status)
def test_it_travels_as_dasks(status: Status) -> None:
    frames = dumps({"status": status})
    assert b"distributed.core" in frames[0]
    assert loads(frames)["status"] is status


def test_it_is_an_enum_of_its_own() -> None:
    assert issubclass(Status, enum.Enum)
    assert Status("running") is Status.running
    assert not isinstance(Status.running, str)
