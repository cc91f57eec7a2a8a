"""Negative controls: servers and clients that are broken, each in one way, so that the reference tests must fail.

The controls themselves are in controls_servers.py, controls_clients.py, controls_limits.py and controls_bridge.py.  Each replaces
functions of the library for as long as a ``MonkeyPatch`` lasts, and names the reference tests that must notice, with what their failure
says: a test that fails for another reason does not count.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

#: Where the tests of a group are, or those of a row that are elsewhere.
MODULES = {
    "a": "test_a_orderly_stop",
    "b": "test_b_cancelled",
    "c": "test_c_handler_errors",
    "d": "test_d_calls_and_pool",
    "f": "test_f_handshake",
    "g": "test_g_bad_input",
    **dict.fromkeys(("g08", "g09", "g11"), "test_g_payloads"),
    "h": "test_h_resources",
    "j": "test_j_deadlines",
    "k": "test_k_signals_and_runs",
    "l": "test_l_bridge",
    "m": "test_m_elsewhere",
    "n": "test_n_sweeps",
}

Install = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Catch:
    """A reference test that must fail.

    Attributes:
        name: of the test, without "test_".
        transport: the letter of the one that it is run over; empty if it does not ask.
        says: a regular expression that matches what its failure says.
        arguments: further ones of a parametrized test.
    """

    name: str
    transport: str
    says: str
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def module(self) -> str:
        """Where the test is."""
        return MODULES.get(self.name[:3]) or MODULES[self.name[0]]

    @property
    def test(self) -> str:
        """Which test it is, as docs/shutdown-tests.md has it."""
        return f"{self.module}::test_{self.name}"

    @property
    def function(self) -> Callable[..., None]:
        """The test itself."""
        function: Callable[..., None] = getattr(importlib.import_module(f"tests.reference.{self.module}"), f"test_{self.name}")
        return function


@dataclass(frozen=True)
class Control:
    """One way to be broken.

    Attributes:
        name: what to call it.
        broken: what is broken, for docs/shutdown-controls.md.
        catches: what must notice.
        install: breaks it.
    """

    name: str
    broken: str
    catches: tuple[Catch, ...]
    install: Install


#: By name; filled as the modules with the controls are imported.
CONTROLS: dict[str, Control] = {}


def control(broken: str, *catches: Catch) -> Callable[[Install], Install]:
    """Make a control of a function that breaks something."""

    def decorate(install: Install) -> Install:
        CONTROLS[install.__name__] = Control(install.__name__, broken, catches, install)
        return install

    return decorate


def by(name: str, transport: str, says: str, **arguments: Any) -> Catch:
    """Say which test catches it, over which transport, and what it says then."""
    return Catch(name, transport, says, tuple(arguments.items()))


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Replace a function by the decorated one, which is given the original before its arguments."""
    original = getattr(owner, name)

    def decorate(broken: Callable[..., Any]) -> None:
        patch.setattr(owner, name, lambda *args, **kwargs: broken(original, *args, **kwargs))

    return decorate
