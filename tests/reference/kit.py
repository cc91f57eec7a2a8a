"""How the reference tests of shutdown behaviour are run.

``@reference("A02", "m i t u l")`` runs one body over each transport: ``m`` (memory://) and ``i`` (inproc://) in virtual time, where
instants are exact; ``t`` (tcp://), ``u`` (unix://) and ``l`` (tls://) on the real clock with times scaled down and asserted with
slack.  Every run is inside ``no_leaks()`` and must be quiet: nothing above INFO is logged.

Whatever a body makes, server, client, pool or bare comm, it makes through its :class:`Wire`, which knows what the transport needs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import math
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
import trio.testing

from tests.reference.identities import ours
from tests.reference.relay import Relay
from trio_dcore import Comm, ConnectionPool, Security, Server, connect, current_request, rpc
from trio_dcore.abc import CommSettings
from trio_dcore.comm import get_transport, parse_address, parse_host_port, unparse_host_port
from trio_dcore.testing import ManualPeer, MemoryNetwork, memory_network, no_leaks

#: Rows of the table by id -> {transport: [test ids]}; filled as test modules are imported.
COVERED: dict[str, dict[str, list[str]]] = {}

#: The same rows -> {name of a test: the test}, of those that :func:`reference` made.
TESTS: dict[str, dict[str, Callable[..., None]]] = {}

NAMES = {"m": "memory", "i": "inproc", "t": "tcp", "u": "unix", "l": "tls"}
#: The transports that exist; the others join their rows when they do.
EXISTING = "mitul"
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
        transport: its letter; "6" is ``t`` over IPv6, for M01.
        virtual: whether time is virtual, and so exact.
        network: the memory network of ``m``.
        folder: where the sockets of ``u`` are.
        security: with which servers and clients are made; None for the default.
        log: what has been logged, if the test was told.
        sleep: how a handler waits,
        cancelled: what it meets when it is cancelled, and
        tell: how it calls into the test's own thread: handlers of a stock server live in another (test_stock_fails.py).
    """

    sleep: Callable[[float], Awaitable[None]] = staticmethod(trio.sleep)
    cancelled: type[BaseException] = trio.Cancelled

    def __init__(
        self,
        transport: str,
        network: MemoryNetwork | None,
        *,
        real: bool = False,
        log: pytest.LogCaptureFixture | None = None,
        folder: Path | None = None,
    ) -> None:
        self.transport = transport
        self.network = network
        self.virtual = transport in "mi" and not real
        self.log = log
        self.began = math.inf  # when a journal's handler last did
        self.folder = folder
        self._paths = itertools.count(1)
        # What every server and client is made with unless it says otherwise.
        self.security = self.secured() if transport == "l" else None

    @property
    def where(self) -> str:
        """A new address to listen on."""
        if self.transport == "u":
            assert self.folder is not None
            return f"unix://{self.folder}/{next(self._paths)}"
        return {"m": "memory://", "i": "inproc://", "t": "tcp://127.0.0.1:0", "l": "tls://127.0.0.1:0", "6": "tcp://[::1]:0"}[
            self.transport
        ]

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

    # -- what is ours ------------------------------------------------------------------------------------------------------------

    def make_server(self, handlers: dict[str, Any] | None = None, **options: Any) -> Server:
        """A server that has not begun."""
        return Server(handlers, **{"security": self.security, **options})

    @asynccontextmanager
    async def server(self, handlers: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[tuple[Server, str]]:
        """A running server and its address."""
        async with self.make_server(handlers, **options) as server:
            yield server, await server.listen(self.where)

    @asynccontextmanager
    async def serving(
        self, handlers: dict[str, Any] | None = None, **options: Any
    ) -> AsyncIterator[tuple[Server, str, trio.Event]]:
        """A server under ``serve()``, its address, and an event that says that ``serve()`` has returned; the block stops it."""
        server = self.make_server(handlers, **options)
        returned = trio.Event()

        async def serve(task_status: trio.TaskStatus[tuple[str, ...]]) -> None:
            await server.serve(self.where, task_status=task_status)
            returned.set()

        async with trio.open_nursery() as nursery:
            (address,) = await nursery.start(serve)
            yield server, address, returned

    def client(self, address: str, **options: Any) -> rpc:
        """Calls to one address."""
        return rpc(address, **{"security": self.security, **options})

    def pool(self, limit: int = 512, **options: Any) -> ConnectionPool:
        """A pool of connections."""
        return ConnectionPool(limit, **{"security": self.security, **options})

    async def connect(self, address: str, **options: Any) -> Comm:
        """A comm of its own."""
        return await connect(address, **{"security": self.security, **options})

    @asynccontextmanager
    async def calling(self, address: str, journal: Journal, op: str = "work") -> AsyncIterator[Outcome]:
        """A call whose handler, of that journal, has begun; it must have ended when the block is left."""
        outcome = Outcome()
        async with self.client(address) as remote, trio.open_nursery() as nursery:
            nursery.start_soon(outcome.of, remote[op])
            await journal.started()
            yield outcome
            await outcome.ended()

    def secured(self, **options: Any) -> Security:
        """A Security with these options, and what the transport needs."""
        return ours().security(**options) if self.transport == "l" else Security(**options)

    def distrustful(self) -> Security:
        """What a server or client is made with that takes those at the other end for strangers."""
        # Over unix nobody is a stranger but other users; memory is told by @reference(trusted=False).
        options: dict[str, Any] = {"l": {"trusted_subjects": ("somebody.invalid",)}, "u": {"pickle": "never"}}
        return self.secured(**options.get(self.transport, {"trust_loopback": False}))

    def settings(self) -> CommSettings:
        """For what is done with a transport itself."""
        return CommSettings.of(self.security, None, True, None, None)

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
            comm = await get_transport(scheme).connect(location, self.settings())
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        comm.abort()
        return False

    def loud(self) -> list[logging.LogRecord]:
        """What has been logged above INFO."""
        assert self.log is not None
        return [record for record in self.log.records if is_loud(record)]

    # -- what is done by hand ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def silent(self) -> AsyncIterator[str]:
        """Address of a listener that accepts nothing: who connects waits for a handshake (but over inproc, which has none)."""
        scheme, location = parse_address(self.where)
        (listener,) = await get_transport(scheme).listen(location, self.settings())
        async with listener:
            yield listener.contact_address

    async def listen_bytes(self) -> tuple[trio.abc.Listener[Any], str]:
        """A listener for bare streams, and the address that clients connect to (not over inproc, which has no bytes)."""
        if self.network is not None:
            streams = await self.network.listen_streams()
            return streams, streams.address
        where = self.where
        scheme, location = parse_address(where)
        if scheme == "unix":
            sock = trio.socket.socket(trio.socket.AF_UNIX)
            await sock.bind(location)
            sock.listen()
            return _UnixListener(sock, location), where
        (listener,) = await trio.open_tcp_listeners(0, host=parse_host_port(location)[0])
        host, port = listener.socket.getsockname()[:2]
        return listener, f"{scheme}://{unparse_host_port(host, port)}"

    async def connect_bytes(self, address: str) -> trio.abc.Stream:
        """A bare stream to an address, without TLS (not over inproc)."""
        return (await ManualPeer.connect(address, self.network)).stream

    async def manual(self, address: str, **options: Any) -> ManualPeer:
        """A client that speaks by hand, over TLS where that is the transport (not over inproc)."""
        context = ours().context("client") if self.transport == "l" else None
        return await ManualPeer.connect(address, self.network, **{"ssl_context": context, **options})

    @staticmethod
    async def secure(peer: ManualPeer) -> None:
        """Shake hands as TLS does, where that is the transport, and no further."""
        if isinstance(peer.stream, trio.SSLStream):
            await peer.stream.do_handshake()

    def accepted(self, stream: trio.abc.Stream) -> ManualPeer:
        """A server that speaks by hand, on a stream that a listener for bare ones has accepted."""
        if self.transport == "l":
            stream = trio.SSLStream(stream, ours().context("server"), server_side=True, https_compatible=True)
        return ManualPeer(stream)

    @asynccontextmanager
    async def scripted(self, script: Callable[[ManualPeer], Awaitable[object]]) -> AsyncIterator[str]:
        """The address of something that listens, and says what a script tells it to, to each who connects."""

        async def serve(stream: trio.abc.Stream) -> None:
            async with self.accepted(stream) as peer:
                await script(peer)

        listener, address = await self.listen_bytes()
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve, [listener])
            yield address
            nursery.cancel_scope.cancel()

    def relay(self, address: str) -> Relay:
        """Something in between that can stop passing bytes on: ``async with wire.relay(address) as relay`` (not over inproc)."""
        return Relay(self, address)


class _UnixListener(trio.abc.Listener[trio.SocketStream]):
    """Removes its path, which must be left behind by nobody."""

    def __init__(self, sock: trio.socket.SocketType, path: str) -> None:
        self._listener = trio.SocketListener(sock)
        self._path = Path(path)

    async def accept(self) -> trio.SocketStream:
        return await self._listener.accept()

    async def aclose(self) -> None:
        self._path.unlink(missing_ok=True)
        await self._listener.aclose()


Body = Callable[[Wire], Awaitable[None]]
_Test = TypeVar("_Test", bound=Callable[..., object])


def reference(
    row: str, over: str, *, existing: str = EXISTING, real: bool = False, quiet: bool = True, trusted: bool = True
) -> Callable[[Body], Callable[..., None]]:
    """Make a test of a row of the table, over those of its transports that exist.

    Args:
        row: id in the table.
        over: letters of transports, as in the table's column.
        existing: the ones that exist now.
        real: on the real clock over every transport, where the table says R and threads or processes are in it.
        quiet: nothing above INFO may be logged (property P12); False where the row is about something that is worth a warning.
        trusted: False makes peers over memory strangers; for the others see :meth:`Wire.distrustful`.
    """
    transports = [letter for letter in over.split() if letter in existing]

    def decorate(body: Body) -> Callable[..., None]:
        @pytest.mark.parametrize("transport", [pytest.param(letter, id=NAMES[letter]) for letter in transports])
        @functools.wraps(body)
        def test(transport: str, caplog: pytest.LogCaptureFixture) -> None:
            caplog.set_level(logging.DEBUG)
            run(body, transport, caplog, real=real, trusted=trusted)
            if quiet:
                loud = "\n".join(f"{each.levelname} {each.name}: {each.getMessage()}" for each in caplog.records if is_loud(each))
                assert not loud, f"an orderly run is quiet (if this isn't one: reference(..., quiet=False)):\n{loud}"

        # functools.wraps shows pytest the body's signature otherwise.
        del test.__wrapped__
        test.body = body  # type: ignore[attr-defined]  # for test_stock_fails.py
        test.transports = transports  # type: ignore[attr-defined]  # for test_m_elsewhere.py
        for letter in transports:
            COVERED.setdefault(row, {}).setdefault(letter, []).append(f"{body.__module__}.{body.__qualname__}")
        TESTS.setdefault(row, {})[body.__qualname__] = test
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


async def until(condition: Callable[[], object], *, every: float = 0.001) -> None:
    """Wait for something that nobody tells of."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(every)


async def quickest(operation: Callable[[], Awaitable[float]], bound: float) -> float:
    """The least number of seconds that an operation says it took in up to TRIES runs; ends with the first below the bound."""
    best = math.inf
    for _ in range(TRIES):
        best = min(best, await operation())
        if best < bound:
            break
    return best


def run(
    body: Body, transport: str, log: pytest.LogCaptureFixture | None = None, *, real: bool = False, trusted: bool = True
) -> None:
    """Run one body over one transport."""

    async def main() -> None:
        with contextlib.ExitStack() as stack:
            network = stack.enter_context(memory_network(trusted)) if transport == "m" else None
            folder = stack.enter_context(short_folder()) if transport == "u" else None
            async with no_leaks():  # inside, since connections of the network can leak, too
                await body(Wire(transport, network, real=real, log=log, folder=folder))

    _freeze()
    clock = trio.testing.MockClock(autojump_threshold=0) if transport in "mi" and not real else None
    with no_leaks(), _patience(transport):
        trio.run(main, clock=clock)


@contextmanager
def short_folder() -> Iterator[Path]:
    """For sockets, with a short name; none of them, and no lock of theirs, may be left."""
    folder = Path(tempfile.mkdtemp(prefix="dcore"))
    try:
        yield folder
        left = sorted(each.name for each in folder.iterdir())
        assert not left, f"left behind: the files {left}"
    finally:
        shutil.rmtree(folder)


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
