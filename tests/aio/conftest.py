"""What the tests of the bridge share."""

from __future__ import annotations

import pytest

from tests.aio.running import Runner


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Runner:
    """Runs an asyncio program, over asyncio's own loop and over uvloop."""
    return Runner(request.param, caplog)
