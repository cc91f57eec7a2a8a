"""What the tests of the bridge share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.aio.running import Runner
from tests.parity.conftest import Place, make_place


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Runner:
    """Runs an asyncio program, over asyncio's own loop and over uvloop."""
    return Runner(request.param, caplog)


@pytest.fixture(params=["tcp", "tls", "unix", "inproc"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Every kind of address that a server may listen on."""
    return make_place(request.param, tmp_path)
