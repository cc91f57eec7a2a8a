"""The systems that are compared, one module each, all with the interface of :class:`System`."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

__all__ = ["NAMES", "AsyncFn", "BulkSystem", "Call", "Link", "StreamSystem", "System", "load"]

#: Module names below this package.
NAMES = ("aio", "ours", "ours_loop", "ours_unix", "raw", "stock")

Call = Callable[[], Awaitable[Any]]
AsyncFn = Callable[..., Coroutine[Any, Any, Any]]


class Link(Protocol):
    """What a client holds open towards its server: one connection, or an rpc object that opens them as needed."""

    async def call(self) -> Any:
        """One small request and its reply."""

    async def aclose(self) -> None:
        """Give back all that the link holds."""


class System(Protocol):
    """One system under test.  Server and client sides run in processes of their own, which share nothing but this module."""

    def run(self, afn: AsyncFn, *args: Any) -> Any:
        """Run ``afn`` in the system's own event loop."""

    async def gather(self, afns: list[Call]) -> None:
        """Run all of ``afns`` at once."""

    async def serve(self, announce: Callable[[str], None]) -> None:
        """Serve until the process ends; ``announce`` is called once with the address."""

    async def open(self, address: str, how: str, op: str) -> Link:
        """Open a link; ``how`` is ``"rpc"`` or ``"comm"``, ``op`` is the handler that ``call`` asks for."""

    async def connect(self, address: str) -> None:
        """Open one connection, handshake included, and close it."""

    async def drain(self, address: str, count: int, start: Callable[[], None]) -> None:
        """Have the server write ``count`` small messages and read them; ``start`` is called at the first one."""


class BulkSystem(System, Protocol):
    """A system that carries arrays."""

    async def echo(self, address: str, size: int, count: int, lap: Callable[[], None]) -> None:
        """Send an array of ``size`` bytes there and back ``count`` times; ``lap`` is called after each."""

    async def sink(self, address: str, size: int, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """Send one array of ``size`` bytes one way; ``begin`` and ``end`` are called right before and after."""


class StreamSystem(System, Protocol):
    """A system that streams."""

    async def stream(self, address: str, count: int, window: int | None, start: Callable[[], None]) -> None:
        """Have a handler send ``count`` small items and take them; ``start`` is called at the first one.

        Args:
            address: the server's.
            count: how many items.
            window: items that may be on their way or unread, where the system has such a thing; None is its default.
            start: see above.
        """


def load(name: str) -> System:
    """Import one system; only the processes that run it pay for its imports."""
    if name not in NAMES:
        raise ValueError(f"unknown system {name!r}; known are {', '.join(NAMES)}")
    system: System = importlib.import_module(f"{__name__}.{name}").SYSTEM
    return system
