"""The tables of docs/shutdown-tests.md and docs/shutdown.md say what is so."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.reference import kit
from trio_dcore import LocalProtocolError, Status
from trio_dcore.server._status import Life

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
NAMES = [path.stem for path in HERE.glob("test_*.py") if path != Path(__file__)]
MODULES = {name: importlib.import_module(f"tests.reference.{name}") for name in NAMES}


@dataclass(frozen=True)
class Row:
    """One row of a table of five columns."""

    id: str
    what: str
    tests: tuple[str, ...]
    transports: tuple[str, ...]
    status: str

    @classmethod
    def parse(cls, line: str) -> Row:
        row, what, tests, transports, status = (cell.strip() for cell in line.strip().strip("|").split("|"))
        return cls(row, what, tuple(tests.replace("`", "").split()), tuple(transports.split()), status)


def rows() -> list[Row]:
    text = (DOCS / "shutdown-tests.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if re.match(r"\| [A-Z]\d\d \|", line) and line.count("|") == 6]
    return [Row.parse(line) for line in lines]


ROWS = rows()


def covering(row: str) -> set[str]:
    """The tests that bear an id, as module::name."""
    tests = {test for tests in kit.COVERED.get(row, {}).values() for test in tests}
    return {"{}::{}".format(*test.rpartition(".")[::2]).removeprefix("tests.reference.") for test in tests}


def problems(row: Row) -> list[str]:
    """What of a row is not so."""
    found = []
    covered = kit.COVERED.get(row.id, {})
    if row.status not in ("shown", "later"):
        found.append(f"the status is {row.status!r}")
    if not row.transports or not set(row.transports) <= set(kit.NAMES):
        found.append(f"the transports are {row.transports}")
    if row.status == "later":
        if row.tests != ("later",) or covered:
            found.append(f"it is to come later, and has tests: {' '.join(sorted(covering(row.id)) or row.tests)}")
        return found
    for transport in row.transports:
        if transport in kit.EXISTING and not covered.get(transport):
            found.append(f"no test runs over {kit.NAMES[transport]}")
    for transport in covered:
        if transport not in row.transports:
            found.append(f"a test runs over {kit.NAMES[transport]}, which the row does not have")
    for test in row.tests:
        module, _, name = test.partition("::")
        if not hasattr(MODULES.get(module), name):
            found.append(f"there is no {test}")
    if set(row.tests) != covering(row.id):
        found.append(f"its tests are {' '.join(sorted(covering(row.id)))}")
    return found


def test_the_table_is_there() -> None:
    assert len(ROWS) > 90
    assert len({row.id for row in ROWS}) == len(ROWS)
    assert [row.id for row in ROWS] == sorted(row.id for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_row_is_shown(row: Row) -> None:
    assert problems(row) == []


def test_every_test_has_its_row() -> None:
    assert set(kit.COVERED) <= {row.id for row in ROWS}
    for row, covered in kit.COVERED.items():
        for tests in covered.values():
            assert len(set(tests)) == len(tests), f"{row} is registered twice"
            assert all(f".test_{row.lower()}_" in test for test in tests), f"a test of {row} does not bear its id"


def test_a_wrong_row_is_noticed() -> None:
    good = next(row for row in ROWS if row.id == "A02")
    assert problems(good) == []
    tests = " ".join(good.tests)
    wrong = {
        f"| A02 | x | {tests} | m i t u l | done |": "the status is 'done'",
        f"| A02 | x | {tests} | m i t x | shown |": "the transports are",
        f"| A02 | x | {tests} | m i | shown |": "a test runs over tcp",
        f"| A02 | x | {tests}x | m i t u l | shown |": f"there is no {good.tests[-1]}x",
        f"| A02 | x | {tests} {tests}_too | m i t u l | shown |": "its tests are",
        "| A02 | x | later | m i t u l | later |": "it is to come later, and has tests",
        f"| A10 | x | {tests} | m t u | shown |": "no test runs over memory",
        f"| Z01 | x | {tests} | t | shown |": "no test runs over tcp",
    }
    for line, what in wrong.items():
        assert any(problem.startswith(what) for problem in problems(Row.parse(line))), line


def allowed(life: Life, to: Life) -> bool:
    try:
        return life.move(to) is to
    except LocalProtocolError:
        return False


def test_the_life_cycle_is_as_documented() -> None:
    text = (DOCS / "shutdown.md").read_text(encoding="utf-8")
    documented: dict[str, set[str]] = {}
    shown: dict[str, str] = {}
    for line in text.splitlines():
        cells = [cell.strip(" `") for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4 and cells[0] in Life.__members__:
            shown[cells[0]] = cells[1]
            documented[cells[0]] = set(re.findall(r"[A-Z]{3,}", cells[2]))
    assert documented == {life.name: {to.name for to in Life if allowed(life, to)} for life in Life}
    assert shown == {life.name: life.value.name for life in Life}
    assert all(isinstance(life.value, Status) for life in Life)
