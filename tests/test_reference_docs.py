"""The reference names everything that is public.  That it can be built is a step of CI: it needs Sphinx, which the tests do not."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
DIRECTIVE = re.compile(r"^\.\. (auto\w+|class|currentmodule):: *([\w.]+)", re.MULTILINE)


def documented() -> dict[str, str]:
    """The full name of what each directive shows: the page it is on."""
    found: dict[str, str] = {}
    for page in sorted(REFERENCE.glob("*.rst")):
        module = ""
        for directive, name in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            if directive == "currentmodule":
                module = name
                continue
            full = name if name.startswith("trio_dcore") else f"{module}.{name}"
            assert full not in found, f"{full} is on {page.name} and {found[full]}"
            found[full] = page.name
    return found


def resolve(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("package", ["trio_dcore", "trio_dcore.testing", "trio_dcore.errors", "trio_dcore.aio"])
def test_everything_public_is_shown(package: str) -> None:
    shown = [resolve(name) for name in documented()]
    public = importlib.import_module(package)
    names = [name for name in public.__all__ if not inspect.ismodule(getattr(public, name))]
    assert names
    assert not [name for name in names if not any(getattr(public, name) is thing for thing in shown)]


def test_what_is_shown_has_a_docstring() -> None:
    assert not [name for name in documented() if not inspect.getdoc(resolve(name))]


def test_every_page_is_in_the_index() -> None:
    index = (REFERENCE / "index.rst").read_text(encoding="utf-8").split()
    assert {page.stem for page in REFERENCE.glob("*.rst")} - {"index"} <= set(index)
