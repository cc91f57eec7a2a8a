"""How the reference tests of shutdown behaviour are run.

``@reference("A02", "m i t")`` runs one body over each transport: ``m`` (memory://) and ``i`` (inproc://) in virtual time, where instants are
exact, ``t`` (tcp://) on the real clock with times scaled down and asserted with slack.  Every run is inside ``no_leaks()``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore import Server, rpc
from trio_dcore.testing import ManualPeer, MemoryNetwork, memory_network, no_leaks

#: Rows of the table by id -> {transport: [test ids]}; filled as test modules are imported.
COVERED: dict[str, dict[str, list[str]]] = {}

NAMES = {"m": "memory", "i": "inproc", "t": "tcp", "u": "unix", "l": "tls"}
#: The transports that exist; the others join their rows when they do.
EXISTING = "mit"
# A scaled second on a real clock, and how much later than exact something may be there.
SCALE = 0.1
SLACK = 3.0
# Above this nothing has waited for what it should not have waited for, whatever the machine is doing.
PROMPT = 1.0


class Wire:
    """One transport: where to listen, how long a second is, and how exact instants are.

    Attributes:
        transport: its letter.
        virtual: whether time is virtual, and so exact.
        network: the memory network of ``m``.
    """

    def __init__(self, transport: str, network: MemoryNetwork | None) -> None:
        self.transport = transport
        self.network = network
        self.virtual = transport in "mi"
        self.where = {"m": "memory://", "i": "inproc://", "t": "tcp://127.0.0.1:0"}[transport]

    def seconds(self, nominal: float) -> float:
        """What ``nominal`` seconds of the table last here."""
        return nominal if self.virtual else nominal * SCALE

    @contextmanager
    def lasts(self, nominal: float, *, at_most: float | None = None) -> Iterator[None]:
        """The block lasts exactly so long in virtual time; on a real clock at least that and less than SLACK times that (+ PROMPT).

        ``at_most`` (nominal) gives an upper bound of its own: for things that may be quicker.
        """
        start = trio.current_time()
        yield
        took = trio.current_time() - start
        expected = self.seconds(nominal)
        if at_most is not None:
            limit = self.seconds(at_most) + (0 if self.virtual else PROMPT)
            assert took <= limit + 1e-6, f"took {took} s, at most {limit} s was allowed"
        elif self.virtual:
            assert took == pytest.approx(expected, abs=1e-6), f"took {took} s instead of {expected} s"
        else:
            assert expected * 0.95 <= took <= expected * SLACK + PROMPT, f"took {took} s instead of about {expected} s"

    def now(self) -> Any:
        """The block takes no time: exact in virtual time, PROMPT on a real clock."""
        return self.lasts(0)

    @asynccontextmanager
    async def server(self, handlers: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[tuple[Server, str]]:
        """A running server and its address."""
        async with Server(handlers, **options) as server:
            yield server, await server.listen(self.where)

    def client(self, address: str, **options: Any) -> rpc:
        return rpc(address, **options)

    async def manual(self, address: str) -> ManualPeer:
        """A peer that speaks by hand (not over inproc, which has no bytes)."""
        return await ManualPeer.connect(address, self.network)


Body = Callable[[Wire], Awaitable[None]]


def reference(row: str, over: str, *, existing: str = EXISTING) -> Callable[[Body], Callable[..., None]]:
    """Make a test of a row of the table, over those of its transports that exist.

    Args:
        row: id in the table.
        over: letters of transports, as in the table's column.
        existing: the ones that exist now.
    """
    transports = [letter for letter in over.split() if letter in existing]

    def decorate(body: Body) -> Callable[..., None]:
        @pytest.mark.parametrize("transport", [pytest.param(letter, id=NAMES[letter]) for letter in transports])
        @functools.wraps(body)
        def test(transport: str, caplog: pytest.LogCaptureFixture) -> None:
            caplog.set_level(logging.DEBUG)
            run(body, transport)

        # functools.wraps shows pytest the body's signature otherwise.
        del test.__wrapped__
        for letter in transports:
            COVERED.setdefault(row, {}).setdefault(letter, []).append(f"{body.__module__}.{body.__qualname__}")
        return test

    return decorate


def run(body: Body, transport: str) -> None:
    """Run one body over one transport."""

    async def main() -> None:
        async with no_leaks():
            if transport == "m":
                with memory_network() as network:
                    await body(Wire(transport, network))
            else:
                await body(Wire(transport, None))

    clock = trio.testing.MockClock(autojump_threshold=0) if transport in "mi" else None
    with no_leaks(), _patience(transport):
        trio.run(main, clock=clock)


@contextmanager
def _patience(transport: str) -> Iterator[None]:
    """A hang is a failure with a traceback, not a run that never ends."""
    import faulthandler

    faulthandler.dump_traceback_later(120, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Journal:
    """What happened, in order, for asserts about order and about ``finally`` blocks that ran."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self._started = trio.Event()

    def __call__(self, entry: str) -> None:
        self.entries.append(entry)

    def handler(self, nominal: float, wire: Wire, *, result: Any = "done") -> Callable[[], Awaitable[Any]]:
        """A handler that needs so long, and writes down start, end, cancellation and its finally."""

        async def work() -> Any:
            self("started")
            self._started.set()
            try:
                await trio.sleep(wire.seconds(nominal))
                self("ended")
                return result
            except trio.Cancelled:
                self("cancelled")
                raise
            finally:
                self("finally")

        return work

    async def started(self) -> None:
        """Wait until the handler runs."""
        await self._started.wait()
