"""Describing exceptions within bounds."""

from __future__ import annotations

from typing import Any

import pytest

from trio_dcore.protocol._error_text import (
    NotPlain,
    Room,
    attempt,
    clean,
    display_name,
    leaves_of,
    plain,
    repr_of,
    text_of,
    traceback_of,
)
from trio_dcore.protocol._errors import RemoteError, RemoteTraceback


class Text(str):
    pass


class Number(int):
    pass


def test_attempt() -> None:
    assert attempt(lambda: 1, 2) == 1
    assert attempt(lambda: [][0], 2) == 2

    def exits() -> int:
        raise SystemExit

    assert attempt(exits, 2) == 2

    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupted, 2)


def test_clean() -> None:
    assert clean("text", 10) == "text"
    assert clean("text", 4) == "text"
    assert clean("text", 3) == "te…"
    assert clean("text", 1) == "…"
    assert clean("\udcff", 10) == "\\udcff"
    assert clean("\udcff", 3) == "\\u…"
    assert type(clean(Text("text"), 10)) is str


@pytest.mark.parametrize(
    "value",
    [None, True, 1, -(2**63), 2**64 - 1, 1.5, "text", b"bytes", [1, [2]], (1, (2,)), {"a": {"b": 1}}, [], {}],
    ids=repr,
)
def test_plain_values(value: object) -> None:
    assert plain(value, Room(100)) == value
    assert type(plain(value, Room(100))) is type(value)


def test_a_str_subclass_becomes_a_str() -> None:
    assert type(plain(Text("x"), Room(10))) is str


@pytest.mark.parametrize(
    "value",
    [
        2**64,
        -(2**63) - 1,
        1j,
        {1},
        frozenset(),
        bytearray(),
        Number(1),
        object(),
        ValueError,
        "\udcff",
        {1: 2},
        {"__Set__": True},
        {Text("a"): 1},
        ["x" * 101],
        list(range(101)),
        {str(n): n for n in range(101)},
        [[[[[[[[[1]]]]]]]]],
    ],
    ids=lambda value: repr(value)[:30],
)
def test_values_that_are_not_plain(value: object) -> None:
    room = Room(100)
    with pytest.raises(NotPlain):
        plain(value, room)
    assert room.left == 100


def test_room_is_shared() -> None:
    room = Room(10)
    plain("abcd", room)
    assert room.left == 5
    with pytest.raises(NotPlain):
        plain("abcde", room)
    plain("abcd", room)
    assert room.left == 0


def test_leaves() -> None:
    a, b, c = ValueError(1), KeyError(2), IndexError(3)
    group = ExceptionGroup("g", [a, ExceptionGroup("h", [b]), c])
    assert leaves_of(group, 10) == ([a, b, c], 3)
    assert leaves_of(group, 2) == ([a, b], 3)
    assert leaves_of(a, 2) == ([a], 1)


def test_counting_ends() -> None:
    doubled: Exception = ValueError(0)
    for _ in range(50):
        doubled = ExceptionGroup("g", [doubled, doubled])
    leaves, count = leaves_of(doubled, 3)
    assert len(leaves) == 3
    assert 3 < count < 20_000
    deep: Exception = ValueError(0)
    for _ in range(30_000):
        deep = ExceptionGroup("g", [deep])
    assert leaves_of(deep, 3) == ([], 0)
    while isinstance(deep, ExceptionGroup):  # not all at once: freeing is recursive too
        deep = deep.exceptions[0]


def test_texts() -> None:
    assert text_of(ValueError("v"), 10) == "v"
    assert text_of(ValueError(1, "b"), 10) == "(1, 'b')"
    assert text_of(ValueError(), 10) == ""
    assert text_of(KeyError("k"), 10) == "'k'"
    assert text_of(ValueError("x" * 30_000), 30_000) == "x" * 30_000
    assert text_of(KeyError("x" * 30_000), 300).startswith("'xxx")
    assert text_of(ValueError("x" * 30_000, 2), 300).startswith("('xxx")
    assert text_of(ValueError(bytearray(30_000)), 3000).startswith("b'\\x00")
    remote = RemoteError("ignored")
    remote.type_name, remote.message = "there.Error", "said"
    assert text_of(remote, 10) == "said"
    assert display_name(remote) == "there.Error"
    assert display_name(ValueError()) == "ValueError"


def test_reprs() -> None:
    assert repr_of(ValueError("v", 1), 100) == "ValueError('v', 1)"
    assert repr_of(ValueError(ValueError(ValueError("v"))), 100) == "ValueError(ValueError(ValueError('v')))"
    assert repr_of(ValueError([0] * 100_000), 100) == "ValueError('[0, 0, 0, 0, 0, 0, ...]')"
    assert repr_of(ValueError(ValueError([0] * 100_000)), 100).startswith("ValueError('")
    assert repr_of(ExceptionGroup("g", [ValueError(1)]), 100) == "ExceptionGroup('g (1 sub-exception)')"

    class Silent(Exception):
        def __repr__(self) -> str:
            return ""

    assert repr_of(Silent("s"), 100).endswith("Silent('s')")


def raised(exc: Exception) -> Exception:
    try:
        raise exc
    except Exception as caught:
        return caught


def test_a_traceback_without_frames_is_one_line() -> None:
    assert traceback_of(ValueError("v"), 100) == "ValueError: v\n"
    assert traceback_of(ValueError(), 100) == "ValueError\n"


def test_a_traceback_is_what_python_prints() -> None:
    import traceback

    exc = raised(ValueError("v"))
    exc.add_note("a note")
    exc.__cause__ = raised(KeyError("cause"))
    exc.__cause__.__context__ = raised(IndexError("context"))
    assert traceback_of(exc, 10_000) == "".join(traceback.format_exception(exc))


def test_chains_end() -> None:
    exc: Any = ValueError(0)
    for n in range(1, 100):
        later = ValueError(n)
        later.__context__ = exc
        exc = later
    text = traceback_of(exc, 10_000)
    assert text.startswith("… earlier exceptions left out …\n")
    assert text.count("ValueError") == 8
    loop, other = ValueError("a"), ValueError("b")
    loop.__cause__, other.__cause__ = other, loop
    assert traceback_of(loop, 10_000).count("ValueError") == 2


def test_a_deep_traceback_keeps_the_innermost_frames() -> None:
    def deep(levels: int) -> None:
        if levels % 2:
            deep(levels - 1)
        deep(levels - 1) if levels else None
        raise ValueError("deep")

    with pytest.raises(ValueError, match="deep") as caught:
        deep(300)
    text = traceback_of(caught.value, 100_000)
    assert text.count("in deep") == 64
    assert 'raise ValueError("deep")' in text


def test_a_group_names_its_members() -> None:
    text = traceback_of(ExceptionGroup("g", [ValueError(n) for n in range(20)]), 10_000)
    assert "  - ValueError: 0\n" in text
    assert text.endswith("  - ValueError: 14\n  - and 5 more\n")


def test_a_remote_traceback_is_shown_as_it_came() -> None:
    exc = ValueError("v")
    exc.__cause__ = RemoteTraceback("Traceback over there\nKeyError: 1\n")
    text = traceback_of(exc, 10_000)
    assert text.startswith("Traceback over there\nKeyError: 1\n\nThe above exception was the direct cause")
