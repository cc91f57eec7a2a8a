"""What the scenarios share that asyncio programs run; each bears the name that it has among the tests of distributed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

__all__ = ["at_once", "echo", "free_port", "ping", "until"]


def ping(comm: Any) -> bytes:
    return b"pong"


def echo(x: Any = None) -> Any:
    return x


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that nobody tells of."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def at_once(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """Await all of them together; what each returned or raised."""
    return await asyncio.gather(*calls, return_exceptions=True)
