"""A relay between clients and a server, which passes bytes on until it is told not to."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Literal, Self

import trio

if TYPE_CHECKING:
    from tests.reference.kit import Wire

__all__ = ["Relay"]


class Relay:
    """Passes on bytes between clients, who connect to :attr:`address`, and a server, until it is told not to.

    Attributes:
        address: where clients are to connect to.
        passed: bytes that went from clients to the server, and from the server to clients, for each connection made.
        limits: how many bytes each further connection passes in these two directions; beyond that it takes none.
        wrap: applied to its two ends of each further connection, with what sends through it: "client" or "server".
    """

    def __init__(self, wire: Wire, target: str) -> None:
        self._wire = wire
        self._target = target
        self._stalled = False
        self._managers = AsyncExitStack()
        self.passed: list[list[int]] = []
        self.limits = (math.inf, math.inf)
        self.wrap: Callable[[trio.abc.Stream, Literal["client", "server"]], trio.abc.Stream] = lambda stream, _: stream
        self.address = ""

    def stall(self) -> None:
        """From now on pass nothing on: no byte, no end, no reset."""
        self._stalled = True

    async def __aenter__(self) -> Self:
        listener, self.address = await self._wire.listen_bytes()
        nursery = await self._managers.enter_async_context(trio.open_nursery())
        await nursery.start(trio.serve_listeners, self._connected, [listener])
        self._nursery = nursery
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._nursery.cancel_scope.cancel()
        await self._managers.__aexit__(*error)

    async def _connected(self, client: trio.abc.Stream) -> None:
        server = await self._wire.connect_bytes(self._target)
        counts = [0, 0]
        self.passed.append(counts)
        there, back = self.limits
        # What the client sends goes out at the server's end.
        server, client = self.wrap(server, "client"), self.wrap(client, "server")
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, client, server, counts, 0, there, nursery)
            nursery.start_soon(self._pass_on, server, client, counts, 1, back, nursery)

    async def _pass_on(
        self, source: trio.abc.Stream, sink: trio.abc.Stream, counts: list[int], way: int, limit: float, nursery: trio.Nursery
    ) -> None:
        while True:
            left = limit - counts[way]
            if self._stalled or left <= 0:
                await trio.sleep_forever()
            try:
                data = await source.receive_some(int(min(left, 64 * 1024)))
                if self._stalled:
                    await trio.sleep_forever()
                await sink.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            counts[way] += len(data)
            if not data:
                nursery.cancel_scope.cancel()  # an end in one direction is the end of both
                return
