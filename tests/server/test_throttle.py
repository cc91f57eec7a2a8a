"""Log lines that come at most once a second."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from trio_dcore.server._throttle import Throttle, shown


async def test_one_line_a_second_and_how_many_were_left_out(autojump_clock: Any) -> None:
    throttle = Throttle()
    assert throttle.due() == ""
    assert [throttle.due() for _ in range(7)] == [None] * 7
    await trio.sleep(0.999)
    assert throttle.due() is None
    await trio.sleep(0.001)
    assert throttle.due() == " (and 8 more like this before)"
    assert throttle.due() is None
    await trio.sleep(100)
    assert throttle.due() == " (and 1 more like this before)"
    await trio.sleep(1)
    assert throttle.due() == ""


async def test_another_interval(autojump_clock: Any) -> None:
    throttle = Throttle(0.25)
    told = 0
    for _ in range(20):
        told += throttle.due() is not None
        await trio.sleep(0.125)
    assert told == 10


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("add", "'add'"),
        ("a\nb", r"'a\nb'"),
        ("x" * 10**6, f"{'x' * 200!r}…"),
        (None, "a NoneType"),
        ({"a": 1}, "a dict"),
        (b"add", "a bytes"),
    ],
)
def test_what_is_shown_of_a_peers_value(value: Any, text: str) -> None:
    assert shown(value) == text
