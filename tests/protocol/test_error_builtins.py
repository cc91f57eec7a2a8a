"""Builtin exceptions from a stranger's text and data."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trio_dcore.protocol._error_builtins import builtin_bases, from_parts, literals, qualified, template

# The same examples in every run, and no verdict on how busy the machine is.
SOBER = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(
    "args",
    [
        (),
        (1,),
        (1, -2, 3.5, 1e300, -1e-07),
        ("text", b"bytes", None, True, False),
        ("it's", 'a "quote"', "both ' and \"", "\n\t\\ \x00 \x7f \u20ac \U0001f600 \udcff"),
        (b"\x00\xff'\"\\",),
        ((1, (2, (3,))), [4, [5]], {"k": {6}}, ()),
        (10**300,),
        ("x" * 15_000,),
    ],
    ids=lambda args: repr(args)[:40],
)
def test_literals_are_read_back(args: tuple[Any, ...]) -> None:
    text = repr(args)[1:-1]
    assert literals(text) == args


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "f()",
        "1 + 2",
        "(1+2j)",
        "'a' % 1",
        "[x for x in (1,)]",
        "lambda: 0",
        "*(1,)",
        "**{}",
        "a=1",
        "f'{1}'",
        "'unclosed",
        "'bad \\d escape'",
        "'new\nline'",
        "u'x'",
        "r'x'",
        "0777",
        "1_000",
        "0x10",
        "1if",
        "1.2.3",
        "--1",
        "((((((((((1))))))))))",
        ")(",
        "(1",
        "1)",
        "1,,2",
        ",",
        "1:2",
        "{[]: 1}",
        "{{}}",
        "9" * 5000,
        "'''x'''",
        "'''a',''' + 1 + '''b','''",
        '"""x"""',
        "# comment",
        "...",
        "-" * 10_000 + "1",
        "(" * 10_000,
        "[" * 10_000 + "]" * 10_000,
        "1," * 20_000,
        "'a' " * 20_000,
        "nan",
        "inf",
        "<object>",
        "\0",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_literal_is_refused(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert literals(text) is None


@settings(SOBER, max_examples=200)
@given(st.text(st.sampled_from("()[]{},:'\"\\bx019.-eE+ NoneTrue\n"), max_size=30))
def test_literals_of_anything(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = literals(text)
    assert found is None or type(found) is tuple


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.binary(),
    lambda inner: st.tuples(inner) | st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(SOBER, max_examples=200)
@given(st.lists(plain, max_size=3).map(tuple))
def test_literals_of_any_plain_arguments(args: tuple[Any, ...]) -> None:
    inner = repr(args)[1:-1]
    found = literals(inner)
    assert found == args or "}}}" in inner or inner.count("(") + inner.count("[") + inner.count("{") > 8


def test_qualified_names() -> None:
    assert qualified("ValueError") == "builtins.ValueError"
    assert qualified("SystemExit") == "builtins.SystemExit"
    assert qualified("eval") == "eval"
    assert qualified("int") == "int"
    assert qualified("MyError") == "MyError"


def test_bases() -> None:
    assert list(builtin_bases(FileNotFoundError)) == [FileNotFoundError, OSError]
    assert list(builtin_bases(StopIteration)) == []


def test_a_template() -> None:
    assert template(KeyError, ("k",)) == ("'k'", {})
    assert template(OSError, (2, "no")) == ("[Errno 2] no", {"errno": 2, "strerror": "no"})
    assert template(SyntaxError, ("bad", 5)) is None
    assert template(UnicodeDecodeError, ("utf-8", b"x", -9, -8, "bad")) is None
    assert template(UnicodeError, ("general",)) == ("general", {})


def test_from_parts() -> None:
    error = from_parts([UnicodeEncodeError, UnicodeError], ("ascii", "x", 0, 1, "bad"), {"code": 1, "args": 2})
    assert isinstance(error, UnicodeEncodeError)
    assert (error.end, error.code) == (1, 1)  # type: ignore[attr-defined]
    assert from_parts([], (), {}) is None
    assert from_parts([StopIteration], (), {}) is None
    huge = {"errno": 2**100}
    assert isinstance(from_parts([OSError], (), huge), OSError)
    assert from_parts([UnicodeTranslateError], ("x", 0, 1, "bad"), {}) is not None
    assert from_parts([UnicodeTranslateError], (b"x", 0, 1, "bad"), {}) is None
    assert from_parts([ImportError], ("m",), {"name": "n", "path": 3}).name == "n"  # type: ignore[union-attr]
