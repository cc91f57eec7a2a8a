"""Intervals as numbers and as texts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trio_dcore.comm._interval import parse_interval


@pytest.mark.parametrize(
    ("interval", "seconds"),
    [
        ("2ms", 0.002),
        (" 10 ms ", 0.01),
        ("1.5s", 1.5),
        (".5s", 0.5),
        ("500us", 0.0005),
        ("500 µs", 0.0005),
        ("2m", 120),
        (0, 0),
        (2, 2),
    ],
)
def test_intervals(interval: Any, seconds: float) -> None:
    assert parse_interval(interval) == pytest.approx(seconds)


@pytest.mark.parametrize("interval", ["2", "ms", "", "-1ms", "2 weeks", "1..5s", "1e3s", -0.1, math.inf, math.nan])
def test_no_intervals(interval: Any) -> None:
    with pytest.raises(ValueError, match="interval="):
        parse_interval(interval)
