"""What tests of whole servers share: a server and a client in one block, over every transport that is meant to be the same."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import trio_dcore
from trio_dcore import Server, rpc

_PACKAGE = str(Path(trio_dcore.__file__).parent)
_PLACES = {"inproc": "inproc://", "tcp": "tcp://127.0.0.1:0"}

Serving = Callable[..., AbstractAsyncContextManager[tuple[Server, Any]]]


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: no_leaks() collects twice a block, and would look at all of that each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=_PLACES)
def where(request: pytest.FixtureRequest) -> str:
    """What to listen on: once for each transport."""
    return _PLACES[request.param]


@pytest.fixture
def tasks_of_ours() -> Callable[[], list[str]]:
    """Names of the living trio tasks that run code of the package."""
    return _tasks_of_ours


def _tasks_of_ours() -> list[str]:
    def below(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
        yield task
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                yield from below(child)

    root = trio.lowlevel.current_root_task()
    assert root is not None
    codes = [(task.name, getattr(task.coro, "cr_code", None)) for task in below(root)]
    return [name for name, code in codes if code is not None and code.co_filename.startswith(_PACKAGE)]


def _descriptors() -> set[tuple[str, str]]:
    directory = Path("/proc/self/fd")
    found = set()
    for entry in os.listdir(directory) if directory.exists() else ():
        try:
            target = os.readlink(directory / entry)
        except FileNotFoundError:
            continue  # the descriptor of this very listing
        if not target.startswith("/"):
            found.add((entry, target))
    return found


async def _too_slow(patience: float) -> None:
    await trio.sleep(patience)
    raise trio.TooSlowError(f"the test has not ended within {patience} s")


@pytest.fixture
def serving() -> Serving:
    """A server and an rpc to it for one block: ``async with serving(handlers, where) as (server, remote)``.

    Both must be gone behind the block, tasks and descriptors; nothing is collected or waited for.  ``patience`` ends a test that
    hangs; with the autojump clock it must be more than the test's own (virtual) times.
    """

    @asynccontextmanager
    async def serve(
        handlers: dict[str, Any] | None = None,
        where: str = "inproc://",
        *,
        client: dict[str, Any] | None = None,
        patience: float = 10.0,
        server_type: type[Server] = Server,
        **options: Any,
    ) -> AsyncIterator[tuple[Server, Any]]:
        before = _descriptors()
        assert _tasks_of_ours() == []
        # Not a cancel scope with a deadline: that would travel with every call.
        async with trio.open_nursery() as watch:
            watch.start_soon(_too_slow, patience)
            async with server_type(handlers, **options) as server:
                address = await server.listen(where)
                async with rpc(address, **client or {}) as remote:
                    yield server, remote
            watch.cancel_scope.cancel()
        assert _tasks_of_ours() == []
        assert _descriptors() - before == set()

    return serve
