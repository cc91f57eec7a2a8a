from __future__ import annotations

import io
import json
import sys
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_dcore.cli._errors import CliError
from trio_dcore.cli._output import RowPrinter, parse_arguments, print_line, print_value, to_json


def test_arguments_are_json_or_else_text() -> None:
    words = [
        "n=1",
        "x=-2.5",
        "name=joe",
        "flag=true",
        "nothing=null",
        "xs=[1, 2]",
        'quoted="1"',
        "empty=",
        "eq=a=b",
        "d={'a': 1}",
    ]
    assert parse_arguments(words) == {
        "n": 1,
        "x": -2.5,
        "name": "joe",
        "flag": True,
        "nothing": None,
        "xs": [1, 2],
        "quoted": "1",
        "empty": "",
        "eq": "a=b",
        "d": "{'a': 1}",
    }


def test_an_argument_too_deep_for_json_is_text() -> None:
    deep = "[" * 100_000
    assert parse_arguments([f"x={deep}"]) == {"x": deep}


@pytest.mark.parametrize(("words", "said"), [(["x"], "KEY=VALUE"), (["=1"], "KEY=VALUE"), (["x=1", "x=2"], "'x' is given twice")])
def test_wrong_arguments(words: list[str], said: str) -> None:
    with pytest.raises(CliError, match=said) as caught:
        parse_arguments(words)
    assert caught.value.code == 2


class Opaque:
    def __repr__(self) -> str:
        return "<opaque>"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        (2**70, "1180591620717411303424"),
        (0.1, "0.1"),
        ("grün", '"grün"'),
        ((1, [2, ()]), "[1, [2, []]]"),
        ({"a": {"b": None}}, '{"a": {"b": null}}'),
        ({1: "x"}, '{"$dict": [[1, "x"]]}'),
        ({(1, 2): 3, "a": 4}, '{"$dict": [[[1, 2], 3], ["a", 4]]}'),
        ({3, 1, 2}, '{"$set": [1, 2, 3]}'),
        (frozenset({"b", 1}), '{"$set": ["b", 1]}'),
        (b"hello", '{"$bytes": "aGVsbG8="}'),
        (bytearray(b"hello"), '{"$bytes": "aGVsbG8="}'),
        (memoryview(b"hello"), '{"$bytes": "aGVsbG8="}'),
        (float("nan"), '{"$float": "nan"}'),
        ([float("-inf")], '[{"$float": "-inf"}]'),
        (Opaque(), '{"$repr": "<opaque>"}'),
        ({"x": Decimal("1.5")}, '{"x": {"$repr": "Decimal(\'1.5\')"}}'),
    ],
)
def test_values_as_json(value: Any, shown: str) -> None:
    assert to_json(value) == shown
    json.loads(shown)


def test_numpy_values() -> None:
    import numpy as np

    assert to_json([np.int64(3), np.float32(0.5), np.float64(1.5), np.bool_(True)]) == "[3, 0.5, 1.5, true]"
    assert to_json(np.float64("nan")) == '{"$float": "nan"}'
    assert to_json(np.array([1, 2])) == '{"$repr": "array([1, 2])"}'
    assert to_json(np.array(7)) == "7"
    assert "$repr" in to_json(np.longdouble(1))


def test_a_value_that_contains_itself() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert to_json(loop) == '{"$repr": "[1, [...]]"}'


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_what_json_knows_is_printed_as_it_is(value: Any) -> None:
    shown = to_json(value)
    assert json.loads(shown) == value
    assert "\n" not in shown


def test_text_that_the_terminal_can_not_show(capsys: pytest.CaptureFixture[str]) -> None:
    print_line("lone \ud800 surrogate")
    assert capsys.readouterr().out == "lone \\ud800 surrogate\n"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("value", ["\x1b[2J", "\x9b2J \x7f", "\u202etxt", {"\x85": ["\u2028"]}, "é 中 😀", "lone \ud800"])
def test_json_says_the_same_in_every_encoding_and_moves_no_cursor(
    value: Any, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    print_value(value, "json")
    assert isinstance(output.buffer, io.BytesIO)
    shown = output.buffer.getvalue().decode(encoding)
    assert json.loads(shown) == value
    assert shown.removesuffix("\n").isprintable()


def test_tables_move_no_cursor_from_inside_a_cell(capsys: pytest.CaptureFixture[str]) -> None:
    print_value([["\x9b2J"], "\x9b2J"], "table")
    assert capsys.readouterr().out == '["\\u009b2J"]\n?2J\n'


def test_a_number_too_long_for_decimal() -> None:
    assert to_json(10**4000) == "1" + "0" * 4000
    assert to_json([-(2**20_000)]) == json.dumps([{"$int": hex(-(2**20_000))}])


def test_an_object_whose_repr_fails() -> None:
    class Sulking:
        def __repr__(self) -> str:
            raise LookupError

    assert "Sulking, whose repr() raised LookupError" in to_json([Sulking()])


def test_without_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(CliError, match="no standard output"):
        print_line("x")


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        ("text\nof two lines", ["text of two lines"]),
        (1, ["1"]),
        (None, ["null"]),
        ({}, ["{}"]),
        ({"name": "joe", "n": 12, "tags": ["a"]}, ["name  joe", "n     12", 'tags  ["a"]']),
        ({1: 2}, ['{"$dict": [[1, 2]]}']),
        ([1, "b", [2]], ["1", "b", "[2]"]),
        ([], []),
        ([{"a": 1, "b": "x"}, {"a": 1000}, {"c": None}], ["a     b  c", "1     x", "1000", "         null"]),
        ([{"a": 1}, 2], ['{"a": 1}', "2"]),
        ({"\x1b[31m": "\x1b[0m"}, ["?[31m  ?[0m"]),
    ],
)
def test_tables(value: Any, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    print_value(value, "table")
    assert capsys.readouterr().out.splitlines() == lines


def test_values_as_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_value([{"a": 1}], "json")
    RowPrinter("json").print("x")
    assert capsys.readouterr().out == '[{"a": 1}]\n"x"\n'


def test_rows_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    rows = RowPrinter("table")
    for value in ({"n": 1, "name": "joe"}, {"n": 1000, "name": "al"}, "between", {"n": 2, "name": "x"}, {"other": 3}):
        rows.print(value)
    assert capsys.readouterr().out.splitlines() == [
        "n  name",
        "1  joe",
        "1000  al",
        "between",
        "n  name",
        "2  x",
        "other",
        "3",
    ]
