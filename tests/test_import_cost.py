"""What an import costs: nobody pays for a package that is not used.

Each test asks a fresh interpreter, since this one has long imported everything.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "asyncio",
    "cloudpickle",
    "cramjam",
    "cryptography",
    "dask",
    "distributed",
    "lz4",
    "numpy",
    "snappy",
    "tblib",
    "tornado",
    "trio_asyncio",
    "zstandard",
}


def loaded_after(code: str) -> set[str]:
    """Run ``code`` in a fresh interpreter and return the names of all modules that it then has."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


def test_the_fresh_interpreter_shows_what_was_imported() -> None:
    assert "asyncio" in loaded_after("import asyncio")
    assert not loaded_after("pass") & (HEAVY | {"trio"})


def test_the_root_imports_nothing_heavy() -> None:
    assert not loaded_after("import trio_dcore") & HEAVY


def test_the_names_of_the_root_import_nothing_heavy() -> None:
    code = (
        "from trio_dcore import Comm, ConnectionPool, Limits, Security, Server, connect, in_thread, rpc, send_recv, to_serialize"
    )
    assert not loaded_after(code) & HEAVY


def test_the_command_line_imports_nothing_heavy() -> None:
    assert not loaded_after("import trio_dcore.cli") & HEAVY


def test_the_protocol_works_without_trio() -> None:
    loaded = loaded_after("import trio_dcore.protocol")
    assert not loaded & (HEAVY | {"trio", "trio_dcore.errors", "socket", "ssl"})


@pytest.mark.parametrize("name", ["ssl", "socket"])
def test_the_root_alone_imports_no_ssl(name: str) -> None:
    """trio imports ssl, so it is there as soon as a name is taken; the bare root takes none."""
    assert name not in loaded_after("import trio_dcore")
