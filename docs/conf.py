"""How the documentation is built: ``python -m sphinx -W --keep-going docs docs/_build``.

The pages are Markdown, so that they can be read where the source is; the reference is made from the docstrings.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import trio_dcore

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "trio_dcore"
author = "trio_dcore contributors"
copyright = f"the {author}"
version = release = trio_dcore.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib_trio",  # says of a method that it is async, and of a function that it is a context manager
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"trio_dcore {version}"

myst_heading_anchors = 3  # pages link to headings

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Two pages are files that stand beside the README; other links that lead out of this folder are to files, which are only named here.
_ROOT = Path(__file__).parent.parent
_PAGES = {"changelog": "CHANGELOG.md", "security": "SECURITY.md"}
_LINK = re.compile(r"\[([^\]]*)\]\(([\w./-]+)(#[\w-]+)?\)")


def _lead_inside(app: Sphinx, document: str, source: list[str]) -> None:
    folder = _ROOT / "docs"
    if document in _PAGES:
        folder = _ROOT
        source[0] = (_ROOT / _PAGES[document]).read_text(encoding="utf-8")

    def link(match: re.Match[str]) -> str:
        text, target, heading = match.groups()
        file = Path(os.path.normpath(folder / target))
        for page, name in _PAGES.items():
            if file == _ROOT / name:
                return f"[{text}]({page}.md)"
        if file.is_relative_to(_ROOT / "docs"):
            return f"[{text}]({file.relative_to(_ROOT / 'docs')}{heading or ''})"
        return f"{text} (`{file.relative_to(_ROOT)}`)" if file.exists() else match[0]

    source[0] = _LINK.sub(link, source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", _lead_inside)
