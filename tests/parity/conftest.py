"""Places to listen on, as the tests of distributed.core have them, and the rule that nothing is left behind."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.reference.identities import ours
from trio_dcore import Security
from trio_dcore.testing import no_leaks

PATIENCE = 60.0


@dataclass(frozen=True)
class Place:
    """Where to listen, and with which security on both sides."""

    address: str
    security: Security = field(default_factory=Security)

    @property
    def options(self) -> dict[str, Any]:
        return {"security": self.security}


@pytest.fixture(params=["default", "tcp", "tcp6", "tls", "unix", "inproc"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Every kind of address."""
    return make_place(request.param, tmp_path)


def make_place(kind: str, tmp_path: Path) -> Place:
    """One kind of address; "default" has no scheme."""
    if kind == "tls":
        return Place("tls://127.0.0.1:0", ours().security())
    if kind == "tcp6" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    if kind == "unix" and not hasattr(socket, "AF_UNIX"):
        pytest.skip("this system has no unix sockets")
    addresses = {
        "default": "127.0.0.1:0",
        "tcp": "tcp://127.0.0.1:0",
        "tcp6": "tcp://[::1]:0",
        "unix": f"unix://{tmp_path}/s",
        "inproc": "inproc://",
    }
    return Place(addresses[kind])


def has_ipv6() -> bool:
    """Whether the loopback interface has an IPv6 address."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.fixture(autouse=True)
async def leaves_nothing() -> AsyncIterator[None]:
    """No task, descriptor or thread is left, and no exception that nobody could see.  (So every test here is async.)"""
    async with no_leaks():
        yield


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """A test that hangs fails."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def hang(number: int, frame: object) -> None:
        raise TimeoutError(f"the test has not ended within {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
