"""How the reference tests of shutdown behaviour are run.

``@reference("A02", "m i t")`` runs one body over each transport: ``m`` (memory://) and ``i`` (inproc://) in virtual time, where
instants are exact, ``t`` (tcp://) on the real clock with times scaled down and asserted with slack.  Every run is inside
``no_leaks()`` and must be quiet: nothing above INFO is logged.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, Literal, Self, TypeVar

import pytest
import trio
import trio.testing

from trio_dcore import Server, current_request, rpc
from trio_dcore.abc import CommSettings
from trio_dcore.comm import get_transport, parse_address, parse_host_port
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
# Where the table gives a real bound such as 50 ms, a busy machine gets so many tries: what waits for something is slow each time.
TRIES = 5


class Wire:
    """One transport: where to listen, how long a second is, and how exact instants are.

    Attributes:
        transport: its letter.
        virtual: whether time is virtual, and so exact.
        network: the memory network of ``m``.
        log: what has been logged, if the test was told.
        sleep: how a handler waits,
        cancelled: what it meets when it is cancelled, and
        tell: how it calls into the test's own thread: handlers of a stock server live in another (test_stock_fails.py).
    """

    sleep: Callable[[float], Awaitable[None]] = staticmethod(trio.sleep)
    cancelled: type[BaseException] = trio.Cancelled

    def __init__(
        self, transport: str, network: MemoryNetwork | None, *, real: bool = False, log: pytest.LogCaptureFixture | None = None
    ) -> None:
        self.transport = transport
        self.network = network
        self.virtual = transport in "mi" and not real
        self.log = log
        self.began = math.inf  # when a journal's handler last did
        self.where = {"m": "memory://", "i": "inproc://", "t": "tcp://127.0.0.1:0"}[transport]

    def seconds(self, nominal: float) -> float:
        """What ``nominal`` seconds of the table last here."""
        return nominal if self.virtual else nominal * SCALE

    @contextmanager
    def lasts(self, nominal: float, *, at_most: float | None = None) -> Iterator[None]:
        """The block lasts exactly so long in virtual time; on a real clock at least that and at most SLACK times that + PROMPT.

        ``at_most`` (nominal) gives an upper bound of its own: for things that may be quicker.
        """
        with self.takes(self.seconds(nominal), at_most=None if at_most is None else self.seconds(at_most)):
            yield

    @contextmanager
    def takes(self, expected: float, *, at_most: float | None = None) -> Iterator[None]:
        """As :meth:`lasts`, in seconds that are not scaled: for those that are short enough in the table."""
        start = trio.current_time()
        yield
        took = trio.current_time() - start
        if at_most is not None:
            limit = at_most + (0 if self.virtual else PROMPT)
            assert took <= limit + 1e-6, f"took {took} s, at most {limit} s was allowed"
        elif self.virtual:
            assert took == pytest.approx(expected, abs=1e-6), f"took {took} s instead of {expected} s"
        else:
            # A handler that is waited for may have begun some time before this task was told.
            before = min(max(0.0, start - self.began), expected / 2)
            assert expected * 0.95 <= took + before, f"took {took} s instead of about {expected} s"
            assert took <= expected * SLACK + PROMPT, f"took {took} s instead of about {expected} s"

    def now(self) -> Any:
        """The block takes no time: exact in virtual time, PROMPT on a real clock."""
        return self.lasts(0)

    @asynccontextmanager
    async def server(self, handlers: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[tuple[Server, str]]:
        """A running server and its address."""
        async with Server(handlers, **options) as server:
            yield server, await server.listen(self.where)

    @asynccontextmanager
    async def serving(
        self, handlers: dict[str, Any] | None = None, **options: Any
    ) -> AsyncIterator[tuple[Server, str, trio.Event]]:
        """A server under ``serve()``, its address, and an event that says that ``serve()`` has returned; the block stops it."""
        server = Server(handlers, **options)
        returned = trio.Event()

        async def serve(task_status: trio.TaskStatus[tuple[str, ...]]) -> None:
            await server.serve(self.where, task_status=task_status)
            returned.set()

        async with trio.open_nursery() as nursery:
            (address,) = await nursery.start(serve)
            yield server, address, returned

    def client(self, address: str, **options: Any) -> rpc:
        return rpc(address, **options)

    async def comm_of(self, remote: rpc, server: Server) -> str:
        """Make a call, see that nothing is left over from those before, and say which comm it used: no two share a name."""
        server.handlers.setdefault("whoami", lambda: current_request().peer.address)
        name: str = await remote.whoami()
        assert (remote.pool.open, remote.pool.active) == (1, 0)
        assert server.statistics().connections == 1
        assert server.statistics().in_flight == 0
        return name

    def tell(self, what: Callable[[], object]) -> None:
        """Call something in the test's thread; here handlers run in it."""
        what()

    async def refuses(self, address: str) -> bool:
        """Whether nobody listens on the address."""
        scheme, location = parse_address(address)
        try:
            comm = await get_transport(scheme).connect(location, CommSettings.of(None, None, True, None, None))
        except ConnectionRefusedError:
            return True
        comm.abort()
        return False

    def loud(self) -> list[logging.LogRecord]:
        """What has been logged above INFO."""
        assert self.log is not None
        return [record for record in self.log.records if is_loud(record)]

    @asynccontextmanager
    async def silent(self) -> AsyncIterator[str]:
        """Address of a listener that accepts nothing: who connects waits for a handshake (but over inproc, which has none)."""
        scheme, location = parse_address(self.where)
        (listener,) = await get_transport(scheme).listen(location, CommSettings.of(None, None, True, None, None))
        async with listener:
            yield listener.contact_address

    def relay(self, address: str) -> Relay:
        """Something in between that can stop passing bytes on: ``async with wire.relay(address) as relay`` (not over inproc)."""
        return Relay(self, address)

    async def manual(self, address: str) -> ManualPeer:
        """A peer that speaks by hand (not over inproc, which has no bytes)."""
        return await ManualPeer.connect(address, self.network)


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
        if self._wire.network is not None:
            streams = await self._wire.network.listen_streams()
            listener: trio.abc.Listener[Any] = streams
            self.address = streams.address
        else:
            (sockets,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            listener = sockets
            self.address = f"tcp://127.0.0.1:{sockets.socket.getsockname()[1]}"
        nursery = await self._managers.enter_async_context(trio.open_nursery())
        await nursery.start(trio.serve_listeners, self._connected, [listener])
        self._nursery = nursery
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._nursery.cancel_scope.cancel()
        await self._managers.__aexit__(*error)

    async def _connected(self, client: trio.abc.Stream) -> None:
        if self._wire.network is not None:
            server: trio.abc.Stream = await self._wire.network.connect_stream(self._target)
        else:
            host, port = parse_host_port(parse_address(self._target)[1])
            server = await trio.open_tcp_stream(host, port)
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


Body = Callable[[Wire], Awaitable[None]]
_Test = TypeVar("_Test", bound=Callable[..., object])


def reference(
    row: str, over: str, *, existing: str = EXISTING, real: bool = False, quiet: bool = True
) -> Callable[[Body], Callable[..., None]]:
    """Make a test of a row of the table, over those of its transports that exist.

    Args:
        row: id in the table.
        over: letters of transports, as in the table's column.
        existing: the ones that exist now.
        real: on the real clock over every transport, where the table says R and threads or processes are in it.
        quiet: nothing above INFO may be logged (property P12); False where the row is about something that is worth a warning.
    """
    transports = [letter for letter in over.split() if letter in existing]

    def decorate(body: Body) -> Callable[..., None]:
        @pytest.mark.parametrize("transport", [pytest.param(letter, id=NAMES[letter]) for letter in transports])
        @functools.wraps(body)
        def test(transport: str, caplog: pytest.LogCaptureFixture) -> None:
            caplog.set_level(logging.DEBUG)
            run(body, transport, caplog, real=real)
            if quiet:
                loud = "\n".join(f"{each.levelname} {each.name}: {each.getMessage()}" for each in caplog.records if is_loud(each))
                assert not loud, f"an orderly run is quiet (if this isn't one: reference(..., quiet=False)):\n{loud}"

        # functools.wraps shows pytest the body's signature otherwise.
        del test.__wrapped__
        test.body = body  # type: ignore[attr-defined]  # for test_stock_fails.py
        for letter in transports:
            COVERED.setdefault(row, {}).setdefault(letter, []).append(f"{body.__module__}.{body.__qualname__}")
        return test

    return decorate


def covers(row: str, over: str) -> Callable[[_Test], _Test]:
    """Say that a test that is run in some other way shows a row over these transports."""

    def decorate(test: _Test) -> _Test:
        for letter in over.split():
            COVERED.setdefault(row, {}).setdefault(letter, []).append(f"{test.__module__}.{test.__qualname__}")
        return test

    return decorate


def is_loud(record: logging.LogRecord) -> bool:
    """Whether an orderly run should not have logged this."""
    return record.levelno > logging.INFO and record.name.startswith(("trio", "asyncio"))


async def quickest(operation: Callable[[], Awaitable[float]], bound: float) -> float:
    """The least number of seconds that an operation says it took in up to TRIES runs; ends with the first below the bound."""
    best = math.inf
    for _ in range(TRIES):
        best = min(best, await operation())
        if best < bound:
            break
    return best


def run(body: Body, transport: str, log: pytest.LogCaptureFixture | None = None, *, real: bool = False) -> None:
    """Run one body over one transport."""

    async def main() -> None:
        if transport == "m":
            with memory_network() as network:
                async with no_leaks():  # inside, since connections of the network can leak, too
                    await body(Wire(transport, network, real=real, log=log))
        else:
            async with no_leaks():
                await body(Wire(transport, None, real=real, log=log))

    _freeze()
    clock = trio.testing.MockClock(autojump_threshold=0) if transport in "mi" and not real else None
    with no_leaks(), _patience(transport):
        trio.run(main, clock=clock)


@functools.cache
def _freeze() -> None:
    """Once: what has been imported stays, so the collections of no_leaks() need not look at it (which is most of their time)."""
    gc.collect()
    gc.freeze()


@contextmanager
def _patience(transport: str) -> Iterator[None]:
    """A hang is a failure with a traceback, not a run that never ends."""
    import faulthandler

    faulthandler.dump_traceback_later(120, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Outcome:
    """How an operation ended that ran in a task of its own: ``nursery.start_soon(outcome.of, remote.work)``.

    Attributes:
        error: what it raised, None if it returned.
        at: the time at which it ended.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.at = math.nan
        self._values: list[Any] = []
        self._ended = trio.Event()

    async def of(self, operation: Callable[[], Awaitable[Any]]) -> None:
        """Run the operation and keep what comes of it."""
        try:
            self._values.append(await operation())
        except Exception as error:
            self.error = error
        self.at = trio.current_time()
        self._ended.set()

    async def ended(self) -> None:
        """Wait for its end."""
        await self._ended.wait()

    @property
    def value(self) -> Any:
        """What it returned; what it raised is raised."""
        if self.error is not None:
            raise self.error
        (value,) = self._values
        return value


class Journal:
    """What happened, in order, for asserts about order and about ``finally`` blocks that ran."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.entries: list[str] = []
        self._started = trio.Event()
        self._ended = trio.Event()

    def __call__(self, entry: str) -> None:
        self.entries.append(entry)

    def handler(self, nominal: float, wire: Wire, *, result: Any = "done") -> Callable[[], Awaitable[Any]]:
        """A handler that needs so long, and writes down start, end, cancellation and its finally."""

        def begin() -> None:
            wire.began = trio.current_time()
            self._started.set()

        async def work() -> Any:
            self("started")
            wire.tell(begin)
            try:
                await wire.sleep(wire.seconds(nominal))
                self("ended")
                return result
            except wire.cancelled:
                self("cancelled")
                raise
            finally:
                self("finally")
                wire.tell(self._ended.set)

        return work

    async def started(self) -> None:
        """Wait until the handler runs."""
        await self._started.wait()

    async def ended(self) -> None:
        """Wait until the handler has ended, in whatever way."""
        await self._ended.wait()
