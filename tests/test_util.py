"""Small things that every layer uses."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from trio_dcore._util import leaves, to_raise

ONE, TWO, THREE = ValueError("one"), KeyError("two"), OSError("three")


@pytest.fixture
def cancelled() -> trio.Cancelled:
    """One of trio's, which can't be made by hand."""

    async def main() -> trio.Cancelled:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as error:
                return error
        raise AssertionError

    return trio.run(main)


class TestLeaves:
    def test_of_a_single_one(self) -> None:
        assert list(leaves(ONE)) == [ONE]

    def test_of_a_group_in_order(self) -> None:
        group = ExceptionGroup("outer", [ONE, ExceptionGroup("inner", [TWO, ExceptionGroup("innermost", [THREE])]), ONE])
        assert list(leaves(group)) == [ONE, TWO, THREE, ONE]

    def test_of_a_very_deep_one(self) -> None:
        group: Any = ExceptionGroup("", [ONE])
        for _ in range(10_000):
            group = ExceptionGroup("", [group])
        assert list(leaves(group)) == [ONE]


class TestToRaise:
    def test_nothing(self) -> None:
        assert to_raise("text") is None
        assert to_raise("text", None, None) is None

    def test_one_alone(self) -> None:
        assert to_raise("text", ONE) is ONE
        assert to_raise("text", None, ExceptionGroup("", [ONE])) is ONE
        assert to_raise("text", ONE, ExceptionGroup("", [ONE])) is ONE

    def test_several(self) -> None:
        group = to_raise("text", ONE, None, ExceptionGroup("", [TWO, ExceptionGroup("", [ONE, THREE])]))
        assert isinstance(group, ExceptionGroup)
        assert group.message == "text"
        assert group.exceptions == (ONE, TWO, THREE)

    def test_equal_errors_are_not_the_same(self) -> None:
        class Equal(Exception):
            def __eq__(self, other: object) -> bool:
                return True

            __hash__ = None  # type: ignore[assignment]

        first, second = Equal(), Equal()
        group = to_raise("text", first, second)
        assert isinstance(group, ExceptionGroup)
        assert len(group.exceptions) == 2

    @pytest.mark.parametrize("exit", [KeyboardInterrupt(), SystemExit(1)])
    def test_exits_win(self, exit: BaseException, cancelled: trio.Cancelled) -> None:
        assert to_raise("text", ONE, BaseExceptionGroup("", [TWO, cancelled, exit])) is exit
        assert to_raise("text", exit) is exit

    def test_cancelled_is_what_remains(self, cancelled: trio.Cancelled) -> None:
        assert to_raise("text", cancelled) is cancelled
        assert to_raise("text", BaseExceptionGroup("", [cancelled, cancelled])) is cancelled
        assert to_raise("text", BaseExceptionGroup("", [cancelled, ONE])) is ONE
