"""Walking messages, naming places in them, and finding the dicts that a receiver would take for markers."""

from __future__ import annotations

import enum
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_dcore.protocol._markers import RESERVED, Escaped, at, escape, find_path, is_reserved, render, walk

HERE = object()


def is_here(value: object) -> bool:
    return value is HERE


class Named(str): ...


class NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (HERE, ""),
        ({"data": HERE}, "data"),
        ({"data": {"x": [0, 1, 2, HERE]}}, "data['x'][3]"),
        ({"kwargs": {"when": (HERE,)}}, "kwargs['when'][0]"),
        ([{"data": HERE}], "[0]['data']"),
        ({"odd-name": HERE}, "['odd-name']"),
        ({1: HERE}, "[1]"),
        ({(1, "a"): HERE}, "[(1, 'a')]"),
        ({"s": {HERE}}, "s{...}"),
        ({"s": frozenset({("a", HERE)})}, "s{...}[1]"),
        ({HERE: 1}, f"<key {HERE!r}>"),
        ({"d": {("a", HERE): 1}}, f"d<key ('a', {HERE!r})>[1]"),
        ({"x" * 500: HERE}, "x" * 60),
        ({"a": {"y" * 500: HERE}}, "a['" + "y" * 60 + "']"),
        ({"a": {NoRepr(): HERE}}, "a[a NoRepr]"),
        ({"a": {10**5000: HERE}}, "a[a int]"),
        ({"a": {tuple(range(100)): HERE}}, "a[" + repr(tuple(range(100)))[:60] + "...]"),
        ({Named("x"): HERE}, "['x']"),
    ],
)
def test_the_path_to_a_value(message: object, path: str) -> None:
    assert find_path(message, is_here) == path


def test_a_long_path_is_cut() -> None:
    message: Any = HERE
    for _ in range(5000):
        message = [message]
    assert find_path(message, is_here) == "[0]" * 12 + "..."


def test_what_is_not_there_has_no_path() -> None:
    assert find_path({"a": [1, {2}]}, is_here) is None
    assert find_path(1, is_here) is None


def test_an_exttype_is_no_container() -> None:
    assert find_path([msgpack.ExtType(1, b"x")], lambda value: value == 1) is None


def test_a_message_that_changes_meanwhile_has_no_path() -> None:
    message: dict[str, object] = {"a": 1, "b": 2}

    def change(value: object) -> bool:
        message[f"new {len(message)}"] = 1
        return False

    assert find_path(message, change) is None


def test_walking_visits_in_order_and_what_is_shared_once() -> None:
    shared = [1]
    message = {"a": shared, "b": (shared, {"c": 2})}
    seen = [(render(steps), value) for steps, value, _ in walk(message) if not isinstance(value, str)]
    assert seen == [
        ("", message),
        ("a", shared),
        ("a[0]", 1),
        ("b", (shared, {"c": 2})),
        ("b[0]", shared),
        ("b[1]", {"c": 2}),
        ("b[1]['c']", 2),
    ]


def test_walking_finds_what_contains_itself() -> None:
    loop: list[Any] = [1]
    loop.append({"x": loop})
    assert [render(steps) for steps, _, again in walk({"a": loop}) if again] == ["a[1]['x']"]


def test_walking_something_shared_a_thousandfold_is_quick() -> None:
    message: Any = ()
    for _ in range(200):
        message = (message, message)
    assert sum(1 for _ in walk(message)) == 401


def test_at() -> None:
    assert at("a[0]", "no") == "a[0]: no"
    assert at("", "no") == "no"


class Strange(str):
    """Equal to nothing, but its text is what msgpack packs."""

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 1

    def __str__(self) -> str:
        return "something else"


class Key(enum.StrEnum):
    SET = "__Set__"


@pytest.mark.parametrize("key", [*RESERVED, Strange("__Enum__"), Key.SET])
def test_reserved(key: str) -> None:
    assert is_reserved({"a": 1, key: None})


@pytest.mark.parametrize("key", ["__set__", "__Set__ ", "Set", b"__Set__", ("__Set__",), None, 1])
def test_not_reserved(key: object) -> None:
    assert not is_reserved({key: "__Set__"})


def plain(value: Any) -> Any:
    """A message with its escapes undone and all its arrays as tuples."""
    if isinstance(value, Escaped):
        return dict(zip(map(plain, value.items[::2]), map(plain, value.items[1::2]), strict=True))
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    if isinstance(value, (set, frozenset)):
        return type(value)(map(plain, value))
    return value


def dicts(value: Any) -> list[dict[Any, Any]]:
    """The dicts in a message that are not escaped."""
    if isinstance(value, Escaped):
        return [found for item in value.items for found in dicts(item)]
    if isinstance(value, dict):
        return [value, *(found for item in value.values() for found in dicts(item))]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [found for item in value for found in dicts(item)]
    return []


def test_a_message_without_reserved_keys_stays_itself() -> None:
    for message in (None, "__Set__", [], {"a": ["__Set__", {"b": ({1}, frozenset({2}))}]}, msgpack.ExtType(1, b"")):
        assert escape(message) is message


def test_only_what_leads_to_an_escaped_dict_is_copied() -> None:
    bad = {"__Set__": 1}
    untouched = {"x": [1]}
    message = {"a": [untouched, (bad,)], "b": untouched}
    escaped = escape(message)
    assert message == {"a": [{"x": [1]}, ({"__Set__": 1},)], "b": {"x": [1]}}
    assert escaped["b"] is untouched
    assert escaped["a"][0] is untouched
    found = escaped["a"][1][0]
    assert type(found) is Escaped
    assert found.original is bad
    assert found.items == ["__Set__", 1]


def test_a_message_that_is_such_a_dict() -> None:
    inner = {"__Pickled__": 1}
    escaped = escape({"__Set__": [inner]})
    assert type(escaped) is Escaped
    assert escaped.items[1][0].original is inner


class Hashable(dict[Any, Any]):
    def __hash__(self) -> int:  # type: ignore[override]
        return 1


def test_dicts_in_sets_and_keys() -> None:
    bad = Hashable({"__Enum__": 1})
    for message in ({bad}, frozenset({bad}), {bad: 1}, {(bad, 2): 1}):
        escaped = escape(message)
        assert type(escaped) is type(message)
        assert find_path(escaped, lambda value: isinstance(value, Escaped)) is not None


@given(
    st.recursive(
        st.none() | st.integers(0, 3) | st.sampled_from(sorted(RESERVED)),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.sampled_from(["a", "b", *RESERVED]), inner, max_size=3)
            | st.sets(st.integers(0, 3) | st.tuples(st.text(max_size=2)), max_size=3)
        ),
        max_leaves=20,
    )
)
def test_escaping_leaves_no_reserved_key_and_loses_nothing(message: Any) -> None:
    escaped = escape(message)
    assert not any(map(is_reserved, dicts(escaped)))
    assert plain(escaped) == plain(message)
    assert (escaped is message) == (not any(map(is_reserved, dicts(message))))


def test_deep_messages_need_no_stack() -> None:
    message: Any = {"__Set__": 1}
    for _ in range(5000):
        message = [message]
    escaped = escape(message)
    for _ in range(5000):
        (escaped,) = escaped
    assert type(escaped) is Escaped
