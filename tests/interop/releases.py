"""Repeat the tests with stock peers against other releases of ``distributed``: ``python -m tests.interop.releases``.

Each release gets a virtual environment of its own, made in ``--work`` and kept there for the next run.  With ``--write`` the table in
``docs/dask-releases.md`` is made anew.  Takes about a minute and a half for each release.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "dask-releases.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
RELEASES = ("2024.1.0", "2024.5.2", "2024.11.2", "2025.3.0", "2025.7.0", "2025.12.0", "2026.3.0", "2026.8.0")
TESTS = ("tests/interop", "tests/reference/test_m_elsewhere.py::test_m03_dask_both_ways")
# Releases warn about what Pythons and libraries younger than they deprecate; that is nothing of ours.
WARNINGS = ("-W", "default")


@dataclass
class Result:
    """What came of one release."""

    release: str
    python: str
    passed: int = 0
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def prepare(folder: Path, release: str) -> Path:
    """Make an environment with that release, if it is not there yet; returns its Python."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        # The extra `test` asks for the newest release, so its other parts are named here.
        parts = ["-e", f"{ROOT}[all]", "pytest>=8.2", "pytest-trio>=0.8", "hypothesis>=6.100", "trustme>=1.1"]
        subprocess.run([python, "-m", "pip", "install", "-q", *parts, f"distributed=={release}"], check=True)
        (folder / "ready").touch()
    return python


def run(python: Path, release: str, folder: Path, pattern: str | None) -> Result:
    """Run the tests and read what they report."""
    version = subprocess.run([python, "-c", "import platform; print(platform.python_version())"], capture_output=True, text=True)
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    chosen = [] if pattern is None else ["-k", pattern]
    subprocess.run(
        [python, "-m", "pytest", "-q", "--no-header", "-rfE", *WARNINGS, f"--junitxml={report}", *chosen, *TESTS],
        cwd=ROOT,
        check=False,
    )
    result = Result(release, version.stdout.strip())
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            result.skipped.append(f"{name}: {skip.get('message', '')}")
        else:
            result.passed += 1
    return result


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    lines = ["| distributed | Python | passed | failed | not there in that release |", "|---|---|---|---|---|"]
    for result in results:
        lacking = "; ".join(sorted({text.partition(": ")[2] for text in result.skipped})) or "nothing"
        lines.append(f"| {result.release} | {result.python} | {result.passed} | {len(result.failed)} | {lacking} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests with stock peers against other releases of distributed.")
    parser.add_argument("releases", nargs="*", default=RELEASES, metavar="RELEASE", help=f"default: {' '.join(RELEASES)}")
    parser.add_argument("--work", type=Path, help="where the environments are made and kept (default: a temporary folder)")
    parser.add_argument("-k", dest="pattern", metavar="EXPRESSION", help="only these tests, as pytest has it")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work: Path = (args.work or Path(temporary)).absolute()
        results = []
        for release in args.releases:
            print(f"== distributed {release}", flush=True)
            folder = work / release
            results.append(run(prepare(folder, release), release, folder, args.pattern))
    print(table(results))
    for result in results:
        for name in result.failed:
            print(f"{result.release}: {name}")
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        new = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table(results)}\n{END}", text, flags=re.DOTALL)
        PAGE.write_text(new, encoding="utf-8")
    return 1 if any(result.failed for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
