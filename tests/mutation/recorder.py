"""A pytest plugin of ``mutate.py``: runs the tests that it is told to, in that order, and says what it is at.

By environment variables:

- ``MUTATION_PROGRESS``: a file that gets a line of JSON when a test begins, and one when it has ended.
- ``MUTATION_TESTS``: a file with the ids of the tests to run, one a line; without it all are run.
- ``MUTATION_COVERAGE``: a file for which lines each test has run, as coverage.py writes it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import trio_dcore

_coverage: Any = None


def pytest_configure(config: pytest.Config) -> None:
    # Else something installed would be tested, and every mutant survive.
    assert Path(trio_dcore.__file__).is_relative_to(config.rootpath), trio_dcore.__file__
    global _coverage
    if where := os.environ.get("MUTATION_COVERAGE"):
        import coverage

        _coverage = coverage.Coverage(data_file=where, source_pkgs=["trio_dcore"], config_file=False)
        _coverage.start()


def pytest_unconfigure() -> None:
    if _coverage is not None:
        _coverage.stop()
        _coverage.save()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wanted := os.environ.get("MUTATION_TESTS"):
        place = {nodeid: number for number, nodeid in enumerate(Path(wanted).read_text().splitlines())}
        dropped = [item for item in items if item.nodeid not in place]
        items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])
        config.hook.pytest_deselected(items=dropped)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if _coverage is not None:
        _coverage.switch_context(item.nodeid)
    _say(begins=item.nodeid)
    began = time.monotonic()
    result = yield
    _say(ended=item.nodeid, seconds=time.monotonic() - began)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.passed:
        _say(**{report.outcome: report.nodeid})


def _say(**what: object) -> None:
    if where := os.environ.get("MUTATION_PROGRESS"):
        with open(where, "a", encoding="utf-8") as file:
            print(json.dumps(what), file=file)
