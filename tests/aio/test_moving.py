"""A program that was written for ``distributed.core`` runs over trio_dcore.aio when its import is changed; also one half of it alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trio_dcore.client
import trio_dcore.server
from trio_dcore import aio

PROGRAMS = Path(__file__).parent / "programs"
STOCK, OURS = "distributed.core", "trio_dcore.aio"

EXPECTED = """\
bolts: 12
put: 7
refused: only 7 nuts
puts: [8, 9]
waited: 9
gave up
by hand: 12
watched: {'name': 'bolts', 'count': 12} {'name': 'nuts', 'count': 9}
closed
streamed: 10
pooled: [12, 9, 10, None, 12, 9, 10, None, 12, 9, 10, None, 12, 9, 10, None, 12, 9, 10, None]
"""


def moved(folder: Path, program: str, core: str) -> Path:
    """The program, with that import."""
    text = (PROGRAMS / f"{program}.py").read_text(encoding="utf-8")
    assert text.count(f"from {STOCK} import ") == 1
    path = folder / f"{program}.py"
    path.write_text(text.replace(f"from {STOCK} import ", f"from {core} import "), encoding="utf-8")
    return path


@pytest.mark.parametrize(("server", "client"), [(STOCK, STOCK), (STOCK, OURS), (OURS, STOCK), (OURS, OURS)])
def test_only_the_import_changes(tmp_path: Path, server: str, client: str) -> None:
    pytest.importorskip("distributed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}

    def start(program: str, core: str, *args: str) -> subprocess.Popen[str]:
        warnings = ["-X", "dev", "-W", "error"] if core == OURS else []
        return subprocess.Popen(
            [sys.executable, *warnings, moved(tmp_path, program, core), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    inventory = start("inventory", server)
    try:
        assert inventory.stdout is not None
        address = inventory.stdout.readline().strip()
        if not address:
            pytest.fail(inventory.communicate(timeout=30)[1])
        clerk = start("clerk", client, address)
        try:
            out, err = clerk.communicate(timeout=60)
        finally:
            clerk.kill()
        assert (out, clerk.returncode) == (EXPECTED, 0), err
        if client == OURS:
            assert err == ""
        out, err = inventory.communicate(timeout=60)
        assert (out, inventory.returncode) == ("stopped\n", 0), err
        if server == OURS:
            assert err == ""
    finally:
        inventory.kill()
        inventory.wait()


def test_the_names_of_distributed_core_are_there() -> None:
    core = pytest.importorskip("distributed.core")
    names = ["Server", "rpc", "connect", "ConnectionPool", "send_recv", "Status", "CommClosedError", "RPCClosed", "Comm"]
    names += ["coerce_to_address", "get_address_host_port", "normalize_address", "unparse_host_port"]
    for name in names:
        assert hasattr(core, name)
        assert hasattr(aio, name)
    assert set(names) <= set(aio.__all__)
    for name in aio.__all__:
        assert getattr(aio, name) is not None


@pytest.mark.parametrize(
    ("ours", "native", "without"),
    [
        (aio.Server, trio_dcore.Server, {"serve"}),  # `await nursery.start(server.serve, ...)` is trio's way
        (aio.rpc, trio_dcore.rpc, set()),
        (aio.ConnectionPool, trio_dcore.ConnectionPool, {"acquire", "discard", "release", "reuse"}),  # those are for calls
        (aio.Comm, trio_dcore.Comm, set()),
        (aio.BatchedSend, trio_dcore.BatchedSend, {"run"}),
        (aio.RemoteStream, trio_dcore.client.RemoteStream, set()),
        (aio.Request, trio_dcore.server.Request, {"server"}),
    ],
)
def test_both_flavours_have_the_same_names(ours: type, native: type, without: set[str]) -> None:
    assert {name for name in dir(native) if not name.startswith("_")} - set(dir(ours)) == without
