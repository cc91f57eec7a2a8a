"""Server: the serving half and the calling half in one object."""

from __future__ import annotations

from .client import ConnectionPool
from .server import BaseServer

__all__ = ["Server"]


class Server(BaseServer):
    """A dict of handlers behind addresses, and a pool for calls to others.

    Args:
        handlers: op -> callable.  Its arguments are the message's keys; a first parameter named ``comm`` gets the comm.  Plain
            functions, ``async def`` and async generators all serve; see :func:`in_thread` and :func:`run_to_end`.
        stream_handlers: op -> callable for the items of a ``connection_stream``, as Dask has it.
        blocked_handlers: ops that nobody may call; None is those of the class, ``default_blocked_handlers``.
        connection_limit: comms that :attr:`rpc` may have open at once.
        deserialize: False leaves ``Serialize`` payloads as ``Serialized`` objects.
        security: whom to trust.
        limits: what is accepted of peers, and how long things may take.
        grace: seconds that handlers in flight get when the server stops.
        drain_on_cancel: seconds that they get when the scope round the server is cancelled; 0 is none: cancelled means now.
        authorize: ``authorize(peer, op) -> bool``, asked before any payload of the message is deserialized.
        name: for logs and the server's id; the class's name by default.
        serializers: families for ``Serialize`` payloads, in order of preference.
        deserializers: families accepted in ``Serialize`` payloads.
        compression, offload: as for :func:`trio_dcore.connect`.
        timeout: seconds that :attr:`rpc` takes for connecting and handshake together; None for ever.

    Either::

        async with Server({"add": add}) as server:      # leaving the block stops with `grace`, an exception cancels now
            address = await server.listen("tcp://127.0.0.1:0")
            await server.finished()

    or ``addresses = await nursery.start(server.serve, "tcp://:8888")``.
    """

    _pool: ConnectionPool | None = None

    @property
    def rpc(self) -> ConnectionPool:
        """The pool of outgoing comms: ``await server.rpc(address).op(...)``.  Closed with the server."""
        if self._pool is None:
            settings = self.settings
            self._pool = ConnectionPool(
                self.connection_limit,
                security=settings.security,
                limits=settings.limits,
                deserialize=settings.deserialize,
                timeout=self.timeout,
                serializers=settings.serializers,
                deserializers=settings.deserializers,
                compression=settings.compression,
                offload=settings.offload,
            )
        return self._pool

    def get_connection_counters(self) -> dict[str, int]:
        """How many connections there are now, as ``distributed.core.Server.get_connection_counters``.

        Returns:
            ``incoming_comms_open``: connections of clients that have shaken hands; ``incoming_comms_active``: those of them on which
            a handler runs; ``outgoing_comms_open`` and ``outgoing_comms_active``: comms of :attr:`rpc`, and those of them that a
            call uses.
        """
        incoming = [connection for connection in self._connections if not connection.handshaking]
        # Asked of the attribute, for to ask must not make a pool.
        pool = self._pool
        connecting = 0 if pool is None else pool.connecting
        return {
            "incoming_comms_open": len(incoming),
            "incoming_comms_active": sum(connection.request is not None for connection in incoming),
            "outgoing_comms_open": 0 if pool is None else pool.open - connecting,
            "outgoing_comms_active": 0 if pool is None else pool.active - connecting,
        }

    def _close_outgoing(self) -> None:
        self.rpc.close_now()
