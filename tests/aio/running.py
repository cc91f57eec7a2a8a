"""Running the asyncio programs of the tests: in asyncio's debug mode, inside no_leaks(), and quietly."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from trio_dcore.testing import no_leaks

T = TypeVar("T")
Main = Callable[[], Coroutine[Any, Any, T]]

# No test waits so long for anything.
PATIENCE = 20.0


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop of asyncio's own, also where trio_asyncio has been imported, which changes what asyncio's functions make."""
    return asyncio.SelectorEventLoop() if sys.platform != "win32" else asyncio.ProactorEventLoop()


def run_plainly(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run(main)``, in such a loop."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(main)


async def _warm() -> None:
    await asyncio.sleep(0)


class Runner:
    """``run(main)``: runs an asyncio program to its end.

    Attributes:
        name: of the loop's kind.
        log: what has been logged.
        loud: set by a test that expects something above INFO.
    """

    def __init__(self, name: str, log: pytest.LogCaptureFixture) -> None:
        self.name = name
        self.log = log
        self.loud = False
        self.factory: Callable[[], asyncio.AbstractEventLoop] = new_loop
        if name == "uvloop":
            self.factory = pytest.importorskip("uvloop").new_event_loop
            with asyncio.Runner(loop_factory=self.factory) as runner:
                runner.run(_warm())  # it has a pipe for the whole process

    def __call__(self, main: Main[T]) -> T:
        unseen: list[dict[str, Any]] = []

        async def watched() -> T:
            loop = asyncio.get_running_loop()
            loop.slow_callback_duration = PATIENCE
            loop.set_exception_handler(lambda _, context: unseen.append(context))
            async with asyncio.timeout(PATIENCE):
                return await main()

        with no_leaks(), asyncio.Runner(loop_factory=self.factory, debug=True) as runner:
            result = runner.run(watched())
        assert not unseen
        if not self.loud:
            assert [record.getMessage() for record in self.log.records if record.levelno > logging.INFO] == []
        return result
