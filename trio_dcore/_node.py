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
        blocked_handlers: ops that nobody may call.
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
                serializers=settings.serializers,
                deserializers=settings.deserializers,
            )
        return self._pool

    def _close_outgoing(self) -> None:
        self.rpc.close_now()
