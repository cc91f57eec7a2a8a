"""The server: its life, and the nurseries that its connections live in.

How it is built
---------------
::

    __aenter__/serve
      └─ outer nursery              (in the user's task)
           └─ _main                 the serving task: the only one that closes anything
                └─ guard nursery
                     ├─ _hold_connections      a cancel scope, shielded only with drain_on_cancel, round
                     │    └─ connections nursery: one task for each connection
                     ├─ the hang-up watcher, and the pinger
                     └─ accepting nursery: one task for each listener, and one that closes idle connections if Limits.idle is set

``stop()`` only requests: it marks the server as draining, sets the deadline of the scope round the connections and wakes the serving
task, which closes listeners and idle comms.  Outside cancellation reaches the accepting nursery first; what has to happen then is
synchronous and stands in one ``finally``.
"""

from __future__ import annotations

import logging
import math
import sys
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Self

import trio
from trio.lowlevel import checkpoint_if_cancelled

from .._security import Security
from .._util import to_raise
from ..abc import OFFLOAD, Comm, CommSettings, Listener, Peer, check_timeout
from ..comm import (
    AddressLike,
    BaseComm,
    HangupWatcher,
    InprocComm,
    check_encryption,
    get_address_host_port,
    get_transport,
    listen_address,
    parse_address,
)
from ..errors import LocalProtocolError
from ..protocol._limits import Limits
from ._accepting import Acceptor, close_idle
from ._admission import permitted
from ._announcing import announce
from ._arguments import check_arguments, check_seconds
from ._connection import Connection
from ._handlers import Handler, HandlerEntry, run_to_end
from ._pinger import Pinger
from ._request import request_variable
from ._room import Room
from ._statistics import Counters, ServerStatistics
from ._status import Life, Status
from ._stragglers import report_stragglers
from ._stream_handlers import StreamLog, handle_stream
from ._throttle import Throttle

__all__ = ["BaseServer"]

_log = logging.getLogger("trio_dcore.server")


class BaseServer:
    """All of a server but its outgoing calls; use :class:`trio_dcore.Server`."""

    #: What :meth:`listen` takes where no host and no port are given; for subclasses.
    default_ip: ClassVar[str] = ""
    default_port: ClassVar[int] = 0
    #: The ``blocked_handlers`` of a server that is made without; for subclasses.
    default_blocked_handlers: ClassVar[Collection[str]] = ()

    def __init__(
        self,
        handlers: Mapping[str, Handler] | None = None,
        *,
        stream_handlers: Mapping[str, Handler] | None = None,
        blocked_handlers: Collection[str] | None = None,
        connection_limit: int = 512,
        deserialize: bool = True,
        security: Security | None = None,
        limits: Limits | None = None,
        grace: float = 5.0,
        drain_on_cancel: float = 0.0,
        authorize: Callable[[Peer, str], bool] | None = None,
        name: str | None = None,
        serializers: Sequence[str] | None = None,
        deserializers: Sequence[str] | None = None,
        timeout: float | None = 30.0,
        compression: str | None = None,
        offload: int | None = OFFLOAD,
    ) -> None:
        for parameter, seconds in (("grace", grace), ("drain_on_cancel", drain_on_cancel)):
            check_seconds(parameter, seconds)
        blocked_handlers = self.default_blocked_handlers if blocked_handlers is None else blocked_handlers
        check_arguments(handlers or {}, stream_handlers or {}, blocked_handlers, authorize, connection_limit)
        built_in = {"identity": self.identity, "echo": self.echo}
        self.handlers: dict[str, Handler] = {**built_in, **(handlers or {})}
        self.stream_handlers: dict[str, Handler] = dict(stream_handlers or {})
        if self.stream_handlers:
            # What its peer has sent is handled, also if the peer has gone since: the stream ends where its last message does.
            self.handlers.setdefault("connection_stream", run_to_end(self.connection_stream))
        self.blocked_handlers: set[str] = set(blocked_handlers)
        self.connection_limit = connection_limit
        self.timeout = check_timeout(timeout)
        self.settings: CommSettings = CommSettings.of(
            security, limits, deserialize, serializers, deserializers, compression=compression, offload=offload
        )
        self.grace = grace
        self.drain_on_cancel = drain_on_cancel
        self.authorize = authorize
        self.id: str = f"{name or type(self).__name__}-{uuid.uuid4()}"
        self.name: str = name or type(self).__name__
        #: Set when the server starts to shut down.
        self.shutdown_requested: trio.Event = trio.Event()
        #: Read on every request, so a plain attribute: the server has been asked to stop.
        self.draining: bool = False
        #: Likewise: ``Limits.requests``.
        self.most_requests: float = math.inf if self.settings.limits.requests is None else self.settings.limits.requests
        self._life = Life.NEW
        self._failed = False
        self._finished = trio.Event()
        self._deadline = math.inf  # of the drain
        self._cancelled_from_outside = False
        self._outer: trio.abc.AsyncResource | Any = None
        self._accepting: trio.Nursery | None = None
        self._connection_tasks: trio.Nursery | None = None
        self._accepting_more = False  # listeners, to their nursery
        self._admitting = False  # connections, to theirs
        self._scope = trio.CancelScope()  # round all connections
        # Round what outlives a cancellation as the connections may; the last of these ends it.
        self._reporting = trio.CancelScope(shield=True)
        self._watching = trio.CancelScope(shield=True)
        self._pinging = trio.CancelScope(shield=True)
        self._connections_ended = trio.Event()
        self._listeners: list[Listener] = []
        self._addresses: list[str] = []
        self._entries: dict[str, HandlerEntry] = {}
        self._statistics = Counters()
        self._room = Room(self.name, self.settings.limits, self._statistics)
        self._connections = self._room.connections
        self._acceptor = Acceptor(self, self._room)
        self._hangups: HangupWatcher | None = None
        self._pinger = Pinger(self._connections, self.settings.limits)
        self._stream_log = StreamLog(self._statistics)
        self.overloads: Throttle = Throttle()
        self.failed_authorizations: Throttle = Throttle()

    # -- built-in ops ------------------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Who this is, as ``distributed.core.Server.identity``."""
        return {"type": type(self).__name__, "id": self.id}

    def echo(self, data: Any = None) -> Any:
        """Return ``data``."""
        return data

    def dump_state(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """What can be told of this server, for people to read, but for the keys in ``exclude``.

        Dask's servers answer an op of that name; here it is one only if you make it a handler, since it tells strangers what goes on.
        """
        facts = {"addresses": self.addresses, "status": self.status.name, "statistics": self.statistics().as_dict()}
        return {key: value for key, value in {**self.identity(), **facts}.items() if key not in exclude}

    async def connection_stream(self, comm: Comm) -> None:
        """Serve ``stream_handlers`` to the caller, as ``distributed.core.Server.connection_stream``; reachable only if there are any."""
        await self.handle_stream(comm)

    async def handle_stream(self, comm: Comm, extra: Mapping[str, Any] | None = None) -> None:
        """Run ``stream_handlers`` for the messages of a comm until its stream ends; then close it.

        A message with an unknown op, one that is blocked or that ``authorize`` refuses to the peer, or whose handler raises, is logged
        and dropped.

        When the server drains, the stream ends behind the messages that have come.  One that is idle then ends at once if it is
        :meth:`connection_stream`'s.  A handler of your own may still have something to say on its comm, so its stream goes on until
        the next message, or until the handler ends it (``current_request().shutdown_requested`` tells when), or the grace is over.

        Args:
            comm: nobody else reads it.
            extra: further keyword arguments for every handler; a key of the message wins over them.
        """
        admits = partial(permitted, self, comm.peer)
        await handle_stream(comm, self.stream_handlers, extra, lambda: self.draining, self._stream_log, admits)

    # -- what it is --------------------------------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        """Where the server is in its life: init, running, closing_gracefully, closing, closed; failed after a failed start."""
        return Status.failed if self._failed else self._life.value

    @property
    def addresses(self) -> tuple[str, ...]:
        """A contact address for each call of :meth:`listen`, in order."""
        return tuple(self._addresses)

    @property
    def address(self) -> str:
        """The first contact address."""
        if not self._addresses:
            raise LocalProtocolError("the server has no address before it listens; call `await server.listen(...)` first")
        return self._addresses[0]

    @property
    def listeners(self) -> tuple[Listener, ...]:
        """What the server listens with, one for each bound address; closing one ends listening there and nothing else."""
        return tuple(self._listeners)

    @property
    def host(self) -> str:
        """The host of the first address that has one."""
        return self._host_port("host")[0]

    @property
    def port(self) -> int:
        """The port of the first address that has one."""
        return self._host_port("port")[1]

    def _host_port(self, what: str) -> tuple[str, int]:
        for address in self._addresses:
            if get_transport(parse_address(address)[0]).host_port:  # a path may end like a port
                return get_address_host_port(address)
        raise LocalProtocolError(f"the server has no {what}: it listens on no address that has one")

    def statistics(self) -> ServerStatistics:
        """Counts since the start and of this moment.  Not a checkpoint."""
        return self._statistics.snapshot(self._connections)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.status.name} at {', '.join(self._addresses) or 'no address'}>"

    # -- starting ----------------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start; :meth:`listen` makes it reachable."""
        self._begin()
        self._outer = trio.open_nursery()
        nursery = await self._outer.__aenter__()
        try:
            await nursery.start(self._main)
        except BaseException as error:
            self._failed = True
            failure = to_raise("the server failed to start", await self._leave(error))
            assert failure is not None
            raise failure from None
        self._nursery: trio.Nursery = nursery
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Stop: after a normal end of the block with the server's grace, after an exception at once.

        Raises the block's exception alone unless the server has one of its own to add.  A KeyboardInterrupt or SystemExit wins over
        everything else, also over the group in which a nursery of the block hands it on.
        """
        if error is None:
            self.stop()
        else:
            self._nursery.cancel_scope.cancel(reason="the block of the server raised")
        result = await self._leave(error)
        if result is error and isinstance(error, BaseExceptionGroup) and not isinstance(error, ExceptionGroup):
            exits = to_raise("", error)
            if not isinstance(exits, (Exception, trio.Cancelled)):
                result = exits
        if result is None or result is error:
            return False
        raise result from None

    async def _leave(self, error: BaseException | None) -> BaseException | None:
        """Wait for the serving task; return what is to be raised."""
        try:
            await self._outer.__aexit__(None, None, None)
        except BaseException as ours:
            return to_raise("the server failed", error, ours)
        return error

    async def serve(
        self,
        *addresses: AddressLike | int,
        task_status: trio.TaskStatus[tuple[str, ...]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen on the addresses and serve until stopped or cancelled.

        For ``await nursery.start(server.serve, "tcp://:8786")``, which returns the tuple of contact addresses.

        Cancellation: closes the server at once, or after up to ``drain_on_cancel`` seconds.

        Raises:
            LocalProtocolError: no address was given, or the server was used before.
            AddressError, OSError: an address can't be listened on; none is then.
        """
        if not addresses:
            raise LocalProtocolError("serve() needs at least one address, e.g. 'tcp://127.0.0.1:0'")
        async with self:
            try:
                for address in addresses:
                    await self.listen(address)
            except BaseException:
                self._failed = True
                raise
            task_status.started(self.addresses)
            await self._finished.wait()

    async def listen(self, address: AddressLike | int | None = None) -> str:
        """Listen on one more address.

        Args:
            address: Dask's forms: a port, ``(host, port)``, ``"host"``, ``"host:port"``, ``"tcp://host:port"``,
                ``"inproc://name"``; None is the default port.  Without a scheme it is ``tcp://``, or with
                ``Security(require_encryption=True)`` ``tls://``; without a host or port it is the class's :attr:`default_ip` and
                :attr:`default_port`, which are a free port on every interface.

        Returns:
            The contact address, in which a wildcard or port 0 has been replaced.

        Raises:
            AddressError, OSError: it can't be listened on; the server is as it was.
            LocalProtocolError: outside of ``async with server`` or ``serve``, or the server is stopping.
        """
        self._check_serving()
        # What requires encryption gets it, unless an address says otherwise, which is then refused.
        default_scheme = "tls" if self.settings.security.require_encryption else "tcp"
        where = listen_address(
            address, default_host=self.default_ip, default_port=self.default_port, default_scheme=default_scheme
        )
        scheme, location = parse_address(where)
        check_encryption(scheme, self.settings)
        listeners = await get_transport(scheme).listen(location, self.settings)
        try:
            if self.draining or not self._accepting_more:
                await checkpoint_if_cancelled()  # most likely the caller is in the scope that was cancelled
                self._check_serving()
                raise LocalProtocolError("listen() on a server that is being cancelled; make a new one")
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        assert self._accepting is not None
        for listener in listeners:
            self._listeners.append(listener)
            self._accepting.start_soon(self._acceptor.run, listener, name=f"accepting on {listener.listen_address}")
        contact = listeners[0].contact_address
        self._addresses.append(contact)
        announce(self, listeners)
        return contact

    def _check_serving(self) -> None:
        if self._life is Life.NEW:
            raise LocalProtocolError("listen() needs a running server: use it inside `async with server:`, or call serve()")
        if self._life is not Life.SERVING:
            raise LocalProtocolError(f"listen() on a server that is {self.status.name}; make a new one")

    def _begin(self) -> None:
        if self._life is not Life.NEW:
            raise LocalProtocolError(f"a server serves once, and this one is {self.status.name}; make a new one")
        self._life = self._life.move(Life.SERVING)

    # -- the serving task --------------------------------------------------------------------------------------------------------

    async def _main(self, task_status: trio.TaskStatus[None]) -> None:
        try:
            async with trio.open_nursery() as guard:
                await guard.start(self._hold_connections, guard)
                # No checkpoint from here to the `try`, for it is its `finally` that gives the shield a deadline.
                self._scope.shield = self.drain_on_cancel > 0
                if sys.platform == "linux":
                    self._hangups = HangupWatcher()
                    guard.start_soon(self._watch_hangups, self._hangups)
                guard.start_soon(self._ping)
                guard.start_soon(self._report_stragglers)
                try:
                    try:
                        async with trio.open_nursery() as accepting:
                            self._accepting = accepting
                            self._accepting_more = True
                            if self.settings.limits.idle is not None:
                                accepting.start_soon(close_idle, self._room, self.settings.limits.idle)
                            task_status.started()
                            try:
                                await self.shutdown_requested.wait()
                            finally:
                                self._accepting_more = False  # also for who calls listen() when we have just been cancelled
                            accepting.cancel_scope.cancel(reason="the server is shutting down")
                    finally:
                        self._wind_down()
                    await self._connections_ended.wait()
                finally:
                    if not self._connections_ended.is_set():
                        self._cut_from_outside()
        finally:
            self._finish()

    async def _hold_connections(self, guard: trio.Nursery, task_status: trio.TaskStatus[None]) -> None:
        """Keep the nursery of all connections open until shutdown has begun and the last of them has ended."""
        try:
            with self._scope:
                async with trio.open_nursery() as self._connection_tasks:
                    self._admitting = True
                    task_status.started()
                    try:
                        await self.shutdown_requested.wait()
                    finally:
                        self._admitting = False  # also for who is accepted in this very moment, when we have just been cancelled
        finally:
            self._connection_tasks = None
            self._connections_ended.set()
            for scope in (self._reporting, self._watching, self._pinging):
                scope.cancel(reason="all connections have ended")
        guard.cancel_scope.cancel(reason="all connections have ended")

    async def _watch_hangups(self, watcher: HangupWatcher) -> None:
        # Shielded as what it watches for may be: with drain_on_cancel, connections outlive the cancellation of the server.
        with self._watching:
            await watcher.run()

    async def _ping(self) -> None:
        # Likewise.
        with self._pinging:
            await self._pinger.run()

    async def _report_stragglers(self) -> None:
        # Shielded, for it must outlive the cancellation that it reports on; _hold_connections ends it with the last connection.
        with self._reporting:
            await report_stragglers(self)

    def _wind_down(self) -> None:
        """Close what needs no waiting.  Synchronous, for it also runs when the serving task has been cancelled."""
        if not self.draining:  # cancelled from outside, or a listener failed
            self._cut_from_outside()
        while self._listeners:
            self._listeners.pop().close()
        for connection in list(self._connections):
            connection.retire()

    def _cut_from_outside(self) -> None:
        """The serving task has been cancelled, at whatever point of the server's life; what still runs gets ``drain_on_cancel``."""
        self._cancelled_from_outside = True
        if self.draining:
            self._shorten(self.drain_on_cancel)
        else:
            self._request_stop(self.drain_on_cancel)

    def _finish(self) -> None:
        if not self.draining:
            self._request_stop(0)
        while self._listeners:
            self._listeners.pop().close()
        if self._hangups is not None:
            self._hangups.close()
        self._close_outgoing()
        if self._life is Life.DRAINING:
            self._life = self._life.move(Life.CLOSING)
        self._life = self._life.move(Life.CLOSED)
        self._finished.set()

    def _close_outgoing(self) -> None:
        """Close the pool of outgoing comms, where there is one."""

    def _admit(self, comm: BaseComm, now: float) -> bool:
        """Serve a comm that was accepted; False if it is too late for that."""
        if self.draining or not self._admitting:
            return False
        assert self._connection_tasks is not None
        connection = Connection(self, comm)
        self._room.enter(connection, now)
        self._connection_tasks.start_soon(self._serve_connection, connection, name=f"connection from {comm.peer_address}")
        return True

    async def _serve_connection(self, connection: Connection) -> None:
        try:
            await connection.run()
        finally:
            self._room.leave(connection)

    # -- stopping ----------------------------------------------------------------------------------------------------------------

    def stop(self, grace: float | None = None, reason: str = "") -> None:
        """Ask the server to shut down.  Not a checkpoint; may be called from a handler, a signal task, and again.

        Args:
            grace: seconds that handlers in flight get; None is the server's own grace, 0 is now, ``math.inf`` is allowed.  A later
                call only ever shortens.
            reason: for the log.
        """
        grace = self.grace if grace is None else grace
        check_seconds("grace", grace)
        if self._life is Life.NEW:
            self._life = self._life.move(Life.CLOSED)
            self.shutdown_requested.set()
            self._close_outgoing()
            self._finished.set()
        elif self._life is Life.SERVING:
            _log.info("%s stops with a grace of %s s%s", self.name, grace, f": {reason}" if reason else "")
            self._request_stop(grace)
        elif self._life is not Life.CLOSED:
            self._shorten(grace)

    def _request_stop(self, grace: float) -> None:
        self.draining = True
        self.shutdown_requested.set()
        self._life = self._life.move(Life.DRAINING if grace > 0 else Life.CLOSING)
        self._shorten(grace)

    def _shorten(self, grace: float) -> None:
        if grace <= 0:
            self._deadline = min(self._deadline, trio.current_time())
            if self._life is Life.DRAINING:
                self._life = self._life.move(Life.CLOSING)
            self._scope.cancel(reason=self._cut_reason())
        else:
            self._deadline = min(self._deadline, trio.current_time() + grace)
            self._scope.deadline = self._deadline

    def _cut_reason(self) -> str:
        """Why handlers are being cancelled now: for HandlerCancelled and for the Cancelled itself."""
        # Without a shield the handlers are cancelled in the same instant as the serving task, which may not have noticed yet.
        early = not self.draining or trio.current_time() < self._deadline
        return "server cancelled" if self._cancelled_from_outside or early else "grace over"

    async def finished(self) -> None:
        """Wait until the server has closed, whoever asked for it."""
        await self._finished.wait()

    async def aclose(self, grace: float | None = None) -> None:
        """Stop and wait until the server has closed.

        From inside a running request of this server it only requests, since waiting would be for itself.

        Cancellation: becomes ``stop(0)`` and is raised at once; the serving task closes the server, and :meth:`finished` waits
        for that.
        """
        self.stop(grace)
        request = request_variable.get(None)
        if request is not None and request.server is self and request.running:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._finished.wait()
        except trio.Cancelled:
            self.stop(0)
            raise

    async def close(self, timeout: float | None = None, reason: str = "") -> None:
        """Dask's name for :meth:`aclose`; its ``timeout`` is the grace."""
        self.stop(timeout, reason)
        await self.aclose(timeout)

    # -- for connections ---------------------------------------------------------------------------------------------------------

    def _watch(self, connection: Connection) -> None:
        """Have the connection told when its peer hangs up, and looked after while it takes its time."""
        self._pinger.enter(connection)
        comm = connection.comm
        if isinstance(comm, InprocComm):
            comm.on_hangup = connection.hung_up
            return
        fileno = comm.socket_fileno()
        if self._hangups is None or fileno is None:
            connection.on_wait = connection.handler_waits
            return
        try:
            self._hangups.watch(fileno, connection.hung_up)
        except OSError as error:  # ENOSPC: this user's watches (/proc/sys/fs/epoll/max_user_watches) are used up; or ENOMEM
            _log.debug("no hang-up watch for %s: %s", comm.peer_address, error)
            connection.on_wait = connection.handler_waits
        else:
            connection.watched = fileno

    def _unwatch(self, connection: Connection) -> None:
        self._pinger.leave(connection)
        if self._hangups is not None and connection.watched is not None:
            self._hangups.forget(connection.watched, connection.hung_up)
