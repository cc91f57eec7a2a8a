"""What the documentation shows works: its programs run, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

# What a program prints, where the page promises it; the others only have to run.  What client and server print has no order.
OUTPUTS = {
    "README.md:1": "3\n0\n1\n2\n3\n",
    "payloads.md:1": "[0. 2. 4.]\n",
    "payloads.md:2": "{'day': 23}\ndata\n2026-11-23\n",
    "payloads.md:3": "sky: (480, 640)\n",
    "payloads.md:4": "None: not less than a tenth of 8000000 bytes\nzlib: less than a tenth of 8000000 bytes\n",
    "payloads.md:6": "pickled in the thread of trio: False\n('a table', 1)\n",
    "payloads.md:5": "[1. 1. 1.]\nSerialized [1. 1. 1.]\n",
    "aio-in-trio.md:1": "127.0.0.1\n0\n1\n2\n",
    "aio-in-trio.md:2": "slept\n45\ncancelled: True\nof a group\n",
    "aio-in-trio.md:3": "hello you, this is chat\ngoodbye\n",
    "aio-in-trio.md:4": "cancelled: True\nmany steps: True\n",
    "tutorial.md:4": "25\n36\n49\n64\nnobody listens any more\n",
    "tutorial.md:5": "[1, 3, 6]\n",
    "tutorial.md:6": "cancelled over there, too\nand here we are\n",
    "tutorial.md:7": "working\ndone\nStatus.closed\n",
}


def programs() -> dict[str, str]:
    found = {}
    for page in PAGES:
        blocks = [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language == "python"]
        for number, text in enumerate(blocks, 1):
            found[f"{page.name}:{number}"] = text
    return found


def test_the_outputs_belong_to_programs() -> None:
    assert set(OUTPUTS) <= set(programs())


@pytest.mark.parametrize("name", programs())
def test_programs_run(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-"], input=programs()[name], capture_output=True, text=True, check=False, timeout=60
    )
    assert (run.stderr, run.returncode) == ("", 0)
    assert run.stdout
    if name in OUTPUTS:
        assert sorted(run.stdout.splitlines()) == sorted(OUTPUTS[name].splitlines())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not installed")
def test_the_commands_that_make_certificates(tmp_path: Path) -> None:
    """As the page says: make them, serve with them, and ping."""
    blocks = [
        text for language, text in FENCE.findall((ROOT / "docs" / "securing.md").read_text(encoding="utf-8")) if language == "sh"
    ]
    making, using = blocks
    subprocess.run(["sh", "-euc", making], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    serve, ping = (shlex.split(line) for line in using.splitlines())
    (tmp_path / "my_module.py").write_text("handlers = {}\n", encoding="utf-8")
    command = [sys.executable, "-m", "trio_dcore.cli"]
    serve[serve.index("tls://:8786")] = "tls://127.0.0.1:0"
    server = subprocess.Popen([*command, *serve[1:]], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        ping[ping.index("tls://node1.example.org:8786")] = address
        answer = subprocess.run([*command, *ping[1:]], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        assert (answer.returncode, answer.stderr) == (0, "")
        assert address in answer.stdout
    finally:
        server.terminate()
        _, log = server.communicate(timeout=30)
    assert server.returncode == 0
    assert "certificate" in log  # who is trusted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`(?!\])", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    targets = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    assert not [target for target in targets if target and not (page.parent / target).exists()]


def test_the_readme_has_the_two_commands_that_ci_runs() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line.startswith("    python3 -m venv ")]
    assert [command.endswith(("trio-dcore demo", "python -m pytest")) for command in commands] == [True, True]


def test_the_thirty_lines_are_thirty() -> None:
    assert len(programs()["README.md:1"].splitlines()) <= 32


def test_the_version_is_in_the_changelog() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{version}]" in changelog or "## [Unreleased]" in changelog
