"""The mutants that there are."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

import trio_dcore
from tests.mutation.mutants import MODULES, OPERATORS, mutants_in, mutants_of
from tests.mutation.mutate import explained, sample

PACKAGE = Path(trio_dcore.__file__).parent
MUTANTS = mutants_of(PACKAGE)

# A function's body, and what its mutants are then.
EXAMPLES = {
    "cancel": ("scope.cancel(reason='x')", ["pass"]),
    "deadline": ("with trio.move_on_after(5) as scope:\n    x()", ['with trio.move_on_after(float("inf")) as scope:\n    x()']),
    "shield": ("with trio.CancelScope(shield=True):\n    x()", ["with trio.CancelScope(shield=False):\n    x()"]),
    "close": ("await comm.aclose()", ["pass"]),
    "release": ("self.slots.discard(1)", ["pass"]),
    "finally": ("try:\n    x()\nfinally:\n    self.y = 1", ["try:\n    x()\nfinally:\n    pass"]),
    "cleanup": (
        "try:\n    x()\nexcept BaseException:\n    y()\n    raise",
        ["try:\n    x()\nexcept BaseException:\n    pass\n    raise"],
    ),
    "order": ("self.x = 1\nawait y()", ["await y()\nself.x = 1"]),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_each_rule(operator: str) -> None:
    body, expected = EXAMPLES[operator]

    def function(text: str) -> str:
        return "async def f(self):\n" + textwrap.indent(text, "    ") + "\n"

    found = mutants_in(function(body).encode(), "package/_module.py")
    assert [(mutant.id, mutant.source.decode()) for mutant in found if mutant.operator == operator] == [
        (f"_module.f/{operator}/{number}", function(text)) for number, text in enumerate(expected, 1)
    ]


def test_what_nobody_can_see_is_no_mutant() -> None:
    for body in ("x = 1\n    await y()", "x = await y()\n    await x()"):
        assert mutants_in(f"async def f(self):\n    {body}\n".encode(), "m.py") == []


def test_each_is_a_change_that_python_can_read() -> None:
    assert len({mutant.id for mutant in MUTANTS}) == len(MUTANTS) > 400
    for mutant in sample(MUTANTS, 60, seed=1):
        original = (PACKAGE / mutant.module).read_bytes()
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(original)), mutant.id


def test_a_sample_is_of_everything() -> None:
    found = sample(MUTANTS, 100, seed=1)
    assert len({mutant.id for mutant in found}) == 100
    assert {mutant.module for mutant in found} == set(MODULES)
    assert {mutant.operator for mutant in found} == set(OPERATORS)
    assert found == sample(MUTANTS, 100, seed=1) != sample(MUTANTS, 100, seed=2)


def test_what_is_explained_exists() -> None:
    assert explained() <= {mutant.id for mutant in MUTANTS}
