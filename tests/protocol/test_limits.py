from __future__ import annotations

import dataclasses
import math
import pickle
import sys
from typing import Any

import pytest

from trio_dcore.protocol import _limits
from trio_dcore.protocol._limits import GiB, KiB, Limits, MiB

NAMES = [field.name for field in dataclasses.fields(Limits)]
COUNTED = [field.name for field in dataclasses.fields(Limits) if str(field.type).startswith("int")]
TIMED = sorted(set(NAMES) - set(COUNTED))
NEEDED = ["linger", "window", "window_bytes", "error_text"]


def test_the_defaults_of_the_security_document() -> None:
    assert Limits(connections=7) == Limits(
        message=64 * MiB,
        message_trusted=2 * GiB,
        head=1 * MiB,
        head_trusted=64 * MiB,
        frames=1024,
        frames_trusted=4096,
        connections=7,
        handshaking=64,
        handshake_timeout=10,
        progress_timeout=30,
        progress_rate=1 * KiB,
        write_stall=60,
        stream_stall=None,
        idle=None,
        linger=1,
        ping_interval=10,
        ping_timeout=30,
        pool_wait=30,
        tcp_user_timeout=30,
        window=16,
        window_bytes=1 * MiB,
        requests=None,
        error_text=10_000,
    )


def test_every_field_is_explained() -> None:
    assert Limits.__doc__ is not None
    for name in NAMES:
        assert f"        {name}: " in Limits.__doc__


class TestConnections:
    """min(1024, soft NOFILE - 64): room for the program's own files."""

    @pytest.mark.parametrize(("soft", "expected"), [(10_000, 1024), (1024, 960), (256, 192), (65, 1), (20, 1), (-1, 1024)])
    def test_by_the_files_that_may_be_open(self, soft: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
        resource = pytest.importorskip("resource")
        monkeypatch.setattr(resource, "RLIM_INFINITY", -1)
        monkeypatch.setattr(resource, "getrlimit", lambda which: {resource.RLIMIT_NOFILE: (soft, 10**6)}[which])
        assert Limits().connections == expected

    def test_where_the_system_does_not_tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "resource", None)
        assert _limits.Limits().connections == 1024

    def test_as_given(self) -> None:
        assert Limits(connections=5).connections == 5
        assert Limits(connections=None).connections is None


class TestValues:
    @pytest.mark.parametrize("name", sorted(set(NAMES) - set(NEEDED)))
    def test_none_is_off(self, name: str) -> None:
        assert getattr(Limits(**{name: None}), name) is None

    @pytest.mark.parametrize("name", NEEDED)
    def test_what_can_not_be_off(self, name: str) -> None:
        with pytest.raises(ValueError, match=rf"^Limits\({name}=None\): this limit can't be turned off"):
            Limits(**{name: None})

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", [-1, -0.5, math.nan, -math.inf])
    def test_numbers_that_mean_nothing(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=rf"^Limits\({name}="):
            Limits(**{name: value})

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", [True, "10", [1], b"1"])
    def test_what_is_no_number(self, name: str, value: Any) -> None:
        with pytest.raises(TypeError, match=rf"^Limits\({name}=.*: must be a number or None$"):
            Limits(**{name: value})

    @pytest.mark.parametrize("name", sorted(set(NAMES) - {"linger"}))
    def test_zero_is_not_a_limit(self, name: str) -> None:
        with pytest.raises(ValueError, match="must be above 0, or None for no limit"):
            Limits(**{name: 0})

    def test_no_linger_is_fine(self) -> None:
        assert Limits(linger=0).linger == 0

    @pytest.mark.parametrize("name", COUNTED)
    def test_sizes_and_counts_are_whole(self, name: str) -> None:
        stranger = {name.removesuffix("_trusted"): 1} if name.endswith("_trusted") else {}
        value = getattr(Limits(**{name: 1e6}, **stranger), name)
        assert (value, type(value)) == (1_000_000, int)
        for wrong in (0.5, 10.5):
            with pytest.raises(ValueError, match=rf"^Limits\({name}=.*: must be a whole number, or None"):
                Limits(**{name: wrong})
        with pytest.raises(ValueError, match=rf"^Limits\({name}=inf"):
            Limits(**{name: math.inf})

    @pytest.mark.parametrize("name", TIMED)
    def test_times_are_any_number(self, name: str) -> None:
        for value in (1, 0.25, 1e9):
            assert getattr(Limits(**{name: value}), name) == value

    def test_an_endless_time_is_as_good_as_none(self) -> None:
        assert Limits(handshake_timeout=math.inf).handshake_timeout == math.inf
        with pytest.raises(ValueError, match="can't be turned off"):
            Limits(linger=math.inf)


class TestTwins:
    """What a stranger may do, a trusted peer may do as well."""

    @pytest.mark.parametrize("name", ["message", "head", "frames"])
    @pytest.mark.parametrize("value", [2**40, None])
    def test_raising_one_raises_the_other(self, name: str, value: int | None) -> None:
        limits = Limits(**{name: value})  # type: ignore[arg-type]
        assert getattr(limits, name) == getattr(limits, f"{name}_trusted") == value

    @pytest.mark.parametrize("name", ["message", "head", "frames"])
    def test_lowering_one_leaves_the_other(self, name: str) -> None:
        assert getattr(Limits(**{name: 10}), f"{name}_trusted") == getattr(Limits(), f"{name}_trusted")

    @pytest.mark.parametrize("name", ["message", "head", "frames"])
    @pytest.mark.parametrize(("value", "trusted"), [(200, 100), (None, 100)])
    def test_a_twin_that_was_given_is_not_changed(self, name: str, value: int | None, trusted: int) -> None:
        with pytest.raises(ValueError, match=rf"^Limits\({name}={value}, {name}_trusted={trusted}\): a trusted peer can't be"):
            Limits(**{name: value, f"{name}_trusted": trusted})  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["message", "head", "frames"])
    def test_any_other_pair_is_as_given(self, name: str) -> None:
        for value, trusted in ((100, 100), (100, 200), (100, None), (None, None)):
            limits = Limits(**{name: value, f"{name}_trusted": trusted})  # type: ignore[arg-type]
            assert (getattr(limits, name), getattr(limits, f"{name}_trusted")) == (value, trusted)

    def test_a_twin_alone_below_the_field(self) -> None:
        with pytest.raises(ValueError, match=r"^Limits\(message=67108864, message_trusted=1000\)"):
            Limits(message_trusted=1000)


def test_limits_are_values() -> None:
    limits = Limits(head=5)
    assert limits == Limits(head=5)
    assert hash(limits) == hash(Limits(head=5))
    assert limits != Limits(head=6)
    assert pickle.loads(pickle.dumps(limits)) == limits
    assert dataclasses.replace(limits, frames=7) == Limits(head=5, frames=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        limits.head = 6  # type: ignore[misc]
    with pytest.raises(TypeError):
        Limits(5)  # type: ignore[call-arg]
