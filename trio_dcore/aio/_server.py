"""Server as an asyncio program uses it.

Behind it is a server of trio's flavour, which runs in one trio task of the portal and has all of the serving to do.  Here are its
handlers, as the user's dicts have them at each moment, and its life as asyncio sees it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Self, Unpack

from .._node import Server as NativeServer
from ..abc import Listener
from ..comm import AddressLike
from ..errors import LocalProtocolError
from ..server import Handler, ServerStatistics, Status, run_to_end
from ._carry import Crossing, run_in_trio
from ._client import Bound, ConnectionPool
from ._comm import Comm
from ._errors import PortalClosed
from ._guest import acquire_portal
from ._handler import handler
from ._options import ServerOptions
from ._portal import Lease, Portal

__all__ = ["Server"]


class _Adapted(dict[str, Handler]):
    """The handlers of the native server: those that the user's dict has at the moment, made to be served by it.

    Args:
        users: gives the user's dict.
        own: what there is besides, unless the user has one of that name.
    """

    def __init__(
        self, users: Callable[[], Mapping[str, Handler]], own: Callable[[str], Handler | None] = lambda op: None
    ) -> None:
        super().__init__()
        self._users = users
        self._own = own
        self._made: dict[str, tuple[Handler, Handler]] = {}

    def get(self, op: str, default: Any = None) -> Any:
        function = self._users().get(op)
        if function is None:
            own = self._own(op)
            return default if own is None else own
        made = self._made.get(op)
        if made is None or made[0] is not function:
            made = self._made[op] = (function, handler(function))
        return made[1]

    def __getitem__(self, op: str) -> Handler:
        function = self.get(op)
        if function is None:
            raise KeyError(op)
        return function  # type: ignore[no-any-return]

    def __contains__(self, op: object) -> bool:
        return isinstance(op, str) and self.get(op) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._users())

    def __len__(self) -> int:
        return len(self._users())


class Server:
    """A :class:`trio_dcore.Server` for asyncio programs.

    Its handlers are plain functions, ``async def`` functions and async generators of asyncio's flavour; each request runs in an asyncio
    task of its own, which is cancelled when the caller goes or the server's grace is over.  A first parameter ``comm`` gets the comm, an
    :class:`aio.Comm <Comm>`.  Dicts, marks (``in_thread``, ``run_to_end``) and arguments are those of :class:`trio_dcore.Server`.

    ::

        async with Server({"add": add}) as server:      # leaving the block stops with `grace`, an exception cancels now
            address = await server.listen("tcp://127.0.0.1:0")
            await server.finished()

    As Dask's it may also be started by ``await server``, or by its first ``await server.listen(...)``, and is then to be closed by
    ``await server.close()``; and it may be subclassed: the dicts ``handlers`` and ``stream_handlers`` are looked at for each request,
    ``start_unsafe`` is called when it starts, and ``close`` when its block is left.

    Cancellation: of the task that is in the block: closes the server at once, or after up to ``drain_on_cancel`` seconds.
    """

    default_ip: ClassVar[str] = ""
    default_port: ClassVar[int] = 0
    default_blocked_handlers: ClassVar[Collection[str]] = ()

    def __init__(
        self,
        handlers: Mapping[str, Handler] | None = None,
        *,
        stream_handlers: Mapping[str, Handler] | None = None,
        blocked_handlers: Collection[str] | None = None,
        name: str | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        native = NativeServer(
            handlers,
            stream_handlers=stream_handlers,
            blocked_handlers=self.default_blocked_handlers if blocked_handlers is None else blocked_handlers,
            name=name or type(self).__name__,
            **options,
        )
        # Of this one instance, for it is this class that users derive from.
        vars(native).update(default_ip=self.default_ip, default_port=self.default_port)
        built_in = {"identity": self.identity, "echo": self.echo}
        self.handlers: dict[str, Handler] = {**built_in, **(handlers or {})}
        self.stream_handlers: dict[str, Handler] = dict(stream_handlers or {})
        streaming = handler(run_to_end(self.connection_stream))
        native.handlers = _Adapted(
            lambda: self.handlers, lambda op: streaming if op == "connection_stream" and self.stream_handlers else None
        )
        native.stream_handlers = _Adapted(lambda: self.stream_handlers)
        self._native = native
        self._bound = Bound(native.rpc)
        self._rpc = ConnectionPool.of(self._bound)
        self._started = False
        self._starting = asyncio.Lock()
        self._crossing: Crossing | None = None
        self._lease: Lease | None = None
        self._ended = asyncio.Event()

    # -- what it is ----------------------------------------------------------------------------------------------------------------------

    @property
    def native(self) -> NativeServer:
        """The server of trio's flavour."""
        return self._native

    @property
    def id(self) -> str:
        """Its name, and what makes it unique."""
        return self._native.id

    @property
    def name(self) -> str:
        """For logs."""
        return self._native.name

    @property
    def rpc(self) -> ConnectionPool:
        """The pool of outgoing comms: ``await server.rpc(address).op(...)``.  Closed with the server."""
        return self._rpc

    @property
    def blocked_handlers(self) -> set[str]:
        """Ops that nobody may call."""
        return self._native.blocked_handlers

    @blocked_handlers.setter
    def blocked_handlers(self, ops: Collection[str]) -> None:
        self._native.blocked_handlers = set(ops)

    @property
    def status(self) -> Status:
        """Where the server is in its life: init, running, closing_gracefully, closing, closed; failed after a failed start."""
        return self._native.status

    @property
    def addresses(self) -> tuple[str, ...]:
        """A contact address for each call of :meth:`listen`, in order."""
        return self._native.addresses

    @property
    def address(self) -> str:
        """The first contact address."""
        return self._native.address

    @property
    def host(self) -> str:
        """The host of the first address that has one."""
        return self._native.host

    @property
    def port(self) -> int:
        """The port of the first address that has one."""
        return self._native.port

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """What the server listens with, one for each bound address."""
        return self._native.listeners

    def statistics(self) -> ServerStatistics:
        """Counts since the start and of this moment."""
        return self._native.statistics()

    def get_connection_counters(self) -> dict[str, int]:
        """How many connections there are now; see :meth:`trio_dcore.Server.get_connection_counters`."""
        return self._native.get_connection_counters()

    def identity(self) -> dict[str, Any]:
        """Who this is, as ``distributed.core.Server.identity``."""
        return {"type": type(self).__name__, "id": self.id}

    def echo(self, data: Any = None) -> Any:
        """Return ``data``."""
        return data

    def dump_state(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """What can be told of this server, for people to read; as Dask's op of that name."""
        facts = {**self._native.dump_state(), **self.identity()}
        return {key: value for key, value in facts.items() if key not in exclude}

    def __repr__(self) -> str:
        return f"<aio {self._native!r}>"

    # -- life ----------------------------------------------------------------------------------------------------------------------------

    async def start(self) -> Self:
        """Start, unless it has been; :meth:`listen` makes it reachable.  The same as ``await server``.

        Raises:
            LocalProtocolError: it has been closed; make a new one.
        """
        if self._started:
            await self._begin()
            return self
        self._started = True
        try:
            await self.start_unsafe()
            await self._begin()  # if that of a subclass did not
        except BaseException:
            if self._crossing is not None and not self._crossing.done:
                await self._crossing.wait_cancelled()
            raise
        return self

    async def start_unsafe(self) -> Self:
        """What starting does, for subclasses, which call it first; as Dask's.  If it raises, the server is closed."""
        await self._begin()
        return self

    def __await__(self) -> Generator[Any, Any, Self]:
        return self.start().__await__()

    async def _begin(self) -> None:
        async with self._starting:
            if self._crossing is not None:
                return
            if self._ended.is_set():
                raise LocalProtocolError(f"a server serves once, and this one is {self.status.name}; make a new one")
            portal = await acquire_portal()
            self._lease = portal.lease(partial(self._native.stop, 0))
            begun = portal.loop.create_future()
            crossing = self._crossing = portal.start(self._serve, (portal, begun))
            try:
                await asyncio.wait([begun, crossing.waiter], return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                await crossing.wait_cancelled()
                raise
            if not begun.done():
                await crossing.join()

    async def _serve(self, portal: Portal, begun: asyncio.Future[None]) -> None:
        """The trio side."""
        portal.settle()
        self._bound.portal = portal
        try:
            async with self._native:
                if not begun.done():
                    begun.set_result(None)
                await self._native.finished()
        except (KeyboardInterrupt, SystemExit) as error:
            # Of a handler.  It goes through the event loop, as it would from any asyncio task.
            portal.loop.call_soon(_raise, error)
        finally:
            assert self._lease is not None
            self._lease.release()
            self._bound.close_now()
            self._ended.set()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop: after a normal end of the block with the server's grace, after an exception at once."""
        crossing = self._crossing
        assert crossing is not None
        if error is not None:
            crossing.scope.cancel(reason="the block of the server raised")
        try:
            await self.close()
        except BaseException:
            crossing.scope.cancel(reason="close() of the server raised")
            raise
        finally:
            self._native.stop()  # if that of a subclass did not
            if not crossing.done or crossing.error is not None:
                try:
                    await crossing.join()
                except PortalClosed:
                    pass  # which has closed the server as well

    async def listen(self, address: AddressLike | int | None = None) -> str:
        """Listen on one more address and return its contact address; see :meth:`trio_dcore.Server.listen`.

        A server that has not been started is started.
        """
        if self._ended.is_set():
            raise LocalProtocolError(f"listen() on a server that is {self.status.name}; make a new one")
        await self.start()
        assert self._crossing is not None
        return await run_in_trio(self._crossing.portal, self._listen, self._crossing.portal, address)

    async def _listen(self, portal: Portal, address: AddressLike | int | None) -> str:
        """The trio side.  The connections' tasks inherit the context of this one, and their handlers find the loop by it."""
        portal.settle()
        return await self._native.listen(address)

    def stop(self, grace: float | None = None, reason: str = "") -> None:
        """Ask the server to shut down; see :meth:`trio_dcore.Server.stop`.  In the event loop's thread."""
        self._native.stop(grace, reason)
        if self._crossing is None:
            self._bound.close_now()
            self._ended.set()

    async def aclose(self, grace: float | None = None) -> None:
        """Stop and wait until the server has closed.  From inside a running request of this server it only requests.

        Cancellation: becomes ``stop(0)`` and is raised at once; :meth:`finished` waits for the end.
        """
        self.stop(grace)
        crossing = self._crossing
        if crossing is None:
            return
        if not self._ended.is_set():
            try:
                await run_in_trio(crossing.portal, self._native.aclose, grace)
            except PortalClosed:
                pass  # which closes the server as well
            else:
                if self.status is not Status.closed:
                    return  # called from inside one of its requests
            await self._ended.wait()
        assert self._lease is not None
        await self._lease.aclose()

    async def close(self, timeout: float | None = None, reason: str = "") -> None:
        """Dask's name for :meth:`aclose`; its ``timeout`` is the grace."""
        self.stop(timeout, reason)
        await Server.aclose(self, timeout)

    async def finished(self) -> None:
        """Wait until the server has closed, whoever asked for it.

        Raises:
            Exception: why it failed, if it did.
        """
        await self._ended.wait()
        error = None if self._crossing is None else self._crossing.error
        try:
            if error is not None and not isinstance(error, PortalClosed):
                raise error
        finally:
            del error

    # -- streams -------------------------------------------------------------------------------------------------------------------------

    async def connection_stream(self, comm: Comm) -> None:
        """Serve ``stream_handlers`` to the caller; reachable under that name only if there are any."""
        await self.handle_stream(comm)

    async def handle_stream(self, comm: Comm, extra: Mapping[str, Any] | None = None) -> None:
        """Run ``stream_handlers`` for the messages of a comm until its stream ends; see :meth:`trio_dcore.Server.handle_stream`."""
        await run_in_trio(comm.portal, self._native.handle_stream, comm.native, extra)


def _raise(error: BaseException) -> None:
    raise error
