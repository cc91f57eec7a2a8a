"""trio_dcore with handlers of asyncio's flavour, in an event loop that runs on trio."""

from __future__ import annotations

from collections.abc import Callable

from trio_dcore import Limits, Server
from trio_dcore.aio import handler, open_loop

from .aio import HANDLERS
from .ours import OurSystem


class LoopSystem(OurSystem):
    """Only the server differs: an asyncio program would call through the system ``aio``."""

    async def serve(self, announce: Callable[[str], None]) -> None:
        async with open_loop(), Server(handler(HANDLERS), limits=Limits(connections=None)) as server:
            announce(await server.listen(self._where))
            await server.finished()


SYSTEM = LoopSystem()
