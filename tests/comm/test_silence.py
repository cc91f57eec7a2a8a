"""When a peer is asked whether it is still there, and when it is taken for dead: at exact instants, without a wire."""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore import CommClosedError
from trio_dcore.comm import Silence, last_look
from trio_dcore.protocol._envelope import PING

INTERVAL, TIMEOUT = 10.0, 30.0


class FakeComm:
    """What of a comm a Silence looks at."""

    def __init__(self) -> None:
        self.bytes_read = 100
        self.taken = self.untaken = 0
        self.sent: list[object] = []
        self.takes = True
        self.error: Exception | None = None

    def write_soon(self, message: object) -> bool:
        if self.error is not None:
            raise self.error
        if self.takes:
            self.sent.append(message)
        return self.takes

    def outstanding(self) -> tuple[int, int]:
        return self.taken, self.untaken


class Watched:
    """A silence that began at the instant 0."""

    def __init__(self) -> None:
        self.comm: Any = FakeComm()
        self.silence = Silence(self.comm, 7, 0.0)

    def look(self, now: float) -> float:
        return self.silence.look(now, INTERVAL, TIMEOUT)

    def pings(self) -> int:
        assert all(message == (PING, 7, None) for message in self.comm.sent)
        return len(self.comm.sent)


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_nothing_is_asked_before_the_interval_is_over(watched: Watched) -> None:
    assert [watched.look(now) for now in (0.0, 5.0, 9.999)] == [10.0] * 3
    assert watched.pings() == 0


def test_one_ping_and_then_the_timeout(watched: Watched) -> None:
    assert watched.look(10.0) == 40.0
    assert [watched.look(now) for now in (12.5, 39.999)] == [40.0, 40.0]
    assert watched.pings() == 1
    assert watched.look(40.0) == -math.inf
    assert watched.pings() == 1


def test_the_timeout_counts_from_when_the_ping_was_sent(watched: Watched) -> None:
    assert watched.look(25.0) == 55.0  # this process had no time before


def test_any_byte_is_a_sign_of_life(watched: Watched) -> None:
    watched.comm.bytes_read += 1
    assert watched.look(8.0) == 18.0
    assert watched.look(18.0) == 48.0
    watched.comm.bytes_read += 1
    assert watched.look(47.0) == 57.0  # the answer, or anything else
    assert watched.pings() == 1
    assert watched.look(57.0) == 87.0
    assert watched.pings() == 2


def test_a_byte_that_came_in_the_last_moment_counts(watched: Watched) -> None:
    watched.look(10.0)
    watched.comm.bytes_read += 1
    assert watched.look(1000.0) == 1010.0


def test_a_ping_that_can_not_be_sent_yet(watched: Watched) -> None:
    watched.comm.takes = False
    assert watched.look(10.0) == 20.0
    assert watched.look(20.0) == 30.0
    assert watched.look(1000.0) == 1010.0  # nobody is dead who was not asked
    watched.comm.takes = True
    assert watched.look(1010.0) == 1040.0


@pytest.mark.parametrize("error", [CommClosedError("gone"), trio.ClosedResourceError("closed here")])
def test_a_comm_that_is_closed_is_left_to_who_reads_it(watched: Watched, error: Exception) -> None:
    watched.comm.error = error
    assert watched.look(10.0) == math.inf


def test_while_the_other_system_takes_bytes_there_is_somebody(watched: Watched) -> None:
    """The ping waits behind a large message."""
    watched.comm.taken, watched.comm.untaken = 0, 3_000_000
    assert watched.look(10.0) == 40.0
    watched.comm.taken += 65536  # from us by our system
    assert watched.look(39.0) == 69.0
    watched.comm.untaken -= 1000  # from our system by the other
    assert watched.look(68.0) == 98.0
    assert watched.look(97.0) == 98.0
    assert watched.look(98.0) == -math.inf
    assert watched.pings() == 1


def test_what_waits_to_be_taken_is_no_sign_of_life(watched: Watched) -> None:
    watched.look(10.0)
    watched.comm.untaken += 50_000  # of what we have sent since
    assert watched.look(39.0) == 40.0
    assert watched.look(40.0) == -math.inf


def test_begun_anew(watched: Watched) -> None:
    watched.look(10.0)
    watched.silence.restart(35.0)
    assert watched.look(36.0) == 45.0
    assert watched.look(45.0) == 75.0
    assert watched.pings() == 2


async def test_the_last_look_lets_readers_read() -> None:
    """In whatever order the tasks of one pass run, which is left to chance: so, many times."""

    async def read() -> None:
        await came.wait()
        read_by.append(number)

    read_by: list[int] = []
    for number in range(50):
        came = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            came.set()
            await last_look()
            assert read_by == list(range(number + 1))
