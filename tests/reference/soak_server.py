"""A server for the soak, in a process of its own: ``python -m tests.reference.soak_server ADDRESS JOURNAL [IDENTITY]``.

It writes the id of each request that it starts to the journal, behind those of all other servers, so that the soak can tell
afterwards how often each was started, also by servers that were killed.  When it has stopped in order it says in a line of JSON what it
has counted.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from trio_dcore import Comm, Security, Server, current_request, stop_on_signals

__all__ = ["GRACE", "ID"]

#: How long handlers in flight get when the server is stopped in order.
GRACE = 0.5
#: An id in the journal: number of the client, number of its request.
ID = struct.Struct("<II")


class Handlers:
    """What clients may call; each request has the ``id`` of its journal entry.

    Attributes:
        started: how many requests were.
        finished: how many handlers have come to their end, in whatever way.
    """

    def __init__(self, journal: int) -> None:
        self._journal = journal
        self.started = self.finished = 0

    def table(self) -> dict[str, Any]:
        """All of them by op."""
        plain = (self.add, self.slow, self.fail, self.tidy, self.array, self.note)
        handlers: dict[str, Any] = {each.__name__: self._counted(each) for each in plain}
        return {**handlers, "count": self.count, "echo_all": self.echo_all}

    def _begin(self, id: tuple[int, int]) -> None:
        os.write(self._journal, ID.pack(*id))
        self.started += 1

    def _counted(self, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(handler)
        async def counted(id: tuple[int, int], **kwargs: Any) -> Any:
            self._begin(id)
            try:
                return await handler(**kwargs)
            finally:
                self.finished += 1

        # The library looks at parameters to tell what a handler takes.
        del counted.__wrapped__  # type: ignore[attr-defined]
        return counted

    async def add(self, x: int, y: int) -> int:
        return x + y

    async def slow(self, seconds: float, value: int) -> int:
        await trio.sleep(seconds)
        return value

    async def fail(self, value: int) -> None:
        raise ValueError(f"as asked: {value}")

    async def tidy(self, seconds: float) -> str:
        """Cleans up for a while whatever happens to it."""
        try:
            await trio.sleep(seconds)
            return "done"
        finally:
            with trio.move_on_after(0.1, shield=True):
                await trio.sleep(0.02)

    async def array(self, data: Any) -> Any:
        return data + 1

    async def note(self) -> None:
        await trio.sleep(0.01)

    async def count(self, id: tuple[int, int], upto: int, pause: float) -> AsyncIterator[int]:
        self._begin(id)
        try:
            for number in range(upto):
                if current_request().shutdown_requested.is_set():
                    return
                yield number
                await trio.sleep(pause)
        finally:
            self.finished += 1

    async def echo_all(self, comm: Comm, id: tuple[int, int]) -> None:
        self._begin(id)
        try:
            async for item in comm:
                await comm.send(item)
        finally:
            self.finished += 1


def _inventory() -> dict[str, int]:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    tasks = sum(len(nursery.child_tasks) for nursery in root.child_nurseries)
    return {"descriptors": len(os.listdir("/proc/self/fd")), "tasks": tasks}


async def serve(address: str, journal: Path, security: Security | None) -> None:
    """Serve until a signal comes."""
    # What the first of each opens for the whole process is no leak.
    async with Server(security=security):
        pass
    before = _inventory()
    entries = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    handlers = Handlers(entries)
    async with Server(handlers.table(), grace=GRACE, security=security) as server:
        await server.listen(address)
        print(json.dumps({"listening": address}), flush=True)
        await stop_on_signals(server)
    os.close(entries)
    after = _inventory()
    left = {name: count - before[name] for name, count in after.items() if count != before[name]}
    statistics = server.statistics()
    if statistics.in_flight or statistics.connections:
        left.update(in_flight=statistics.in_flight, connections=statistics.connections)
    print(json.dumps({"started": handlers.started, "finished": handlers.finished, "left": left}), flush=True)


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    address, journal, *identity = sys.argv[1:]
    security = Security(**json.loads(Path(identity[0]).read_text())) if identity else None
    trio.run(serve, address, Path(journal), security)


if __name__ == "__main__":
    main()
