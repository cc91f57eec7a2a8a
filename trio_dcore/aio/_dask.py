"""A stock Dask scheduler, worker or client as part of a trio program: started in a scope, and closed when it is left.

Dask's nodes are asyncio programs that end well if everybody has patience with them, and closes them in order.  A trio scope that is
cancelled has neither, which is what this module makes up for:

- A node whose ``close()`` is cancelled half-way stays half closed, and a second call waits for ever for the end of the first; a start that
  is cancelled leaves open what it has opened.  So both run behind a shield, with a deadline.
- A worker joins its threads while it closes, for up to 30 seconds and under a lock that the whole process shares: two workers take 60.  So
  that is done here, without the lock.
- A connection whose making is cancelled leaves its socket open (at 6 of 48 steps, over TLS at 15 of 70), because somebody cancels a call or
  the node closes, say during a worker's first heartbeat.  So it is completed, and goes to the pool.
- Of a whole cluster that is cancelled at once, clients close first, and the scheduler last.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import trio

from ._carry import run_in_asyncio
from ._loop import running_loop

if TYPE_CHECKING:
    from distributed import Worker
    from distributed.comm.core import Comm
    from distributed.core import ConnectionPool

__all__ = ["open_dask", "serve_dask"]

_log = logging.getLogger("trio_dcore.aio")

T = TypeVar("T")

# Closing takes some 50 ms by itself, of which most is Client's wait for the scheduler's farewell.
_TO_CLOSE = 1.0
# A start that is cancelled may still end by itself for so long, in seconds; it takes some 10 ms where there is a scheduler.
_TO_START = 1.0
# A shorter timeout than that, in seconds, Dask reports as a failure even where there is nothing to wait for.
_LEAST = 0.1
# How long, in seconds, a node waits before it closes: for other nodes, and connections that are being made.  Each takes milliseconds.
_TURN = 0.5
# How often, in seconds, to look whether something of Dask's has changed.
_LOOK = 0.005

# The nodes of each loop that are closing.
_closing: WeakKeyDictionary[asyncio.AbstractEventLoop, set[_Node[Any]]] = WeakKeyDictionary()


@asynccontextmanager
async def open_dask(make: Callable[..., T], /, *args: Any, grace: float = 5.0, **options: Any) -> AsyncIterator[T]:
    """Start a stock Dask node for a block of a trio program, inside :func:`open_loop`: ``async with open_dask(Scheduler) as scheduler:``.

    The node is an ordinary one.  Its plain methods and attributes may be used from trio tasks; what has to be awaited goes through
    :func:`run_asyncio`, such as ``await run_asyncio(client.gather, futures)``.

    Leaving the block closes the node, in a cancelled scope too, within ``grace`` seconds and two more; usually in some hundredths of
    one.  A function that a worker runs in a thread can't be interrupted: it is waited for during the grace, then named in the log and
    left to itself, and its thread ends with it.  Whatever else of the node has not closed by then is cut off.

    Cancellation: a start gets a second to complete, since what has started can be closed; then the node is closed as said, and
    ``Cancelled`` raised.

    Args:
        make: ``distributed.Scheduler``, ``Worker``, ``Client``, ``Nanny``, ``LocalCluster``, a subclass, or what makes one.  It is called
            in the event loop.  A client or cluster is made with ``asynchronous=True``.
        *args: its arguments.
        grace: seconds.
        **options: its keyword arguments.
    """
    if not 0 <= grace < math.inf:
        raise ValueError(f"grace={grace!r}: must be a finite number of seconds")
    node: _Node[T] = _Node(make, args, options, grace)
    try:
        yield await run_in_asyncio(running_loop(), node.start, redeliver=2 * _TO_START)
    finally:
        await node.close()


async def serve_dask(
    make: Callable[..., T],
    /,
    *args: Any,
    grace: float = 5.0,
    task_status: trio.TaskStatus[T] = trio.TASK_STATUS_IGNORED,
    **options: Any,
) -> None:
    """Run a stock Dask node as a task of a nursery: ``worker = await nursery.start(partial(serve_dask, Worker, address, nthreads=1))``.

    It runs until it is cancelled, or the node has closed by itself, as a worker does when its scheduler goes.

    Cancellation: as of :func:`open_dask`.

    Args:
        make: see :func:`open_dask`.
        *args: its arguments.
        grace: see :func:`open_dask`.
        task_status: started with the node when it runs.
        **options: its keyword arguments.
    """
    async with open_dask(make, *args, grace=grace, **options) as node:
        task_status.started(node)
        finished = getattr(node, "finished", None)
        if finished is not None:
            await run_in_asyncio(running_loop(), finished)
        else:  # a client
            await trio.sleep_forever()


class _Node(Generic[T]):
    def __init__(self, make: Callable[..., T], args: tuple[Any, ...], options: dict[str, Any], grace: float) -> None:
        self._make = make
        self._args = args
        self._options = options
        self._grace = grace
        self._node: Any = None
        self._worker: Worker | None = None
        self._joins: list[Callable[..., object]] = []
        self._making: set[asyncio.Future[Comm]] = set()  # connections

    # -- starting, in asyncio ------------------------------------------------------------------------------------------------------------

    async def start(self) -> T:
        from distributed import Client, Worker
        from distributed.deploy.cluster import Cluster

        if isinstance(self._make, type) and issubclass(self._make, (Client, Cluster)):
            self._options.setdefault("asynchronous", True)  # they would start a loop of their own in a thread, and block this one
        self._node = self._make(*self._args, **self._options)
        if hasattr(self._node, "rpc"):
            _connects_whole(self._node.rpc, self._making)
        if isinstance(self._node, Worker):
            self._worker = self._node
            self._joins_later(self._node)
        started = asyncio.ensure_future(_awaited(self._node))
        try:
            await asyncio.shield(started)
        except asyncio.CancelledError:
            try:
                await asyncio.wait([started], timeout=_TO_START)
            finally:
                started.cancel()
                await asyncio.wait([started])
            raise
        return self._node  # type: ignore[no-any-return]  # Dask has no types

    def _joins_later(self, worker: Worker) -> None:
        """Have the worker's close() leave its threads to us, also where the scheduler or a lost connection is what closes it."""
        from distributed.threadpoolexecutor import ThreadPoolExecutor

        executor: Any  # of which a method is replaced
        for executor in worker.executors.values():
            if executor is not worker.executors["offload"]:  # shared by all of the process; a worker leaves it alone
                if isinstance(executor, ThreadPoolExecutor):  # Dask's own, whose shutdown() has a timeout
                    self._joins.append(executor.shutdown)
                executor.shutdown = partial(_shutdown_soon, executor.shutdown)

    # -- closing, in trio ----------------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        if self._node is None:
            return
        loop = running_loop()
        others = _closing.setdefault(loop, set())
        others.add(self)
        closed = False
        over = trio.current_time() + self._grace
        try:
            with trio.CancelScope(deadline=trio.current_time() + _TURN, shield=True):
                await self._wait_turn(others)
            with trio.CancelScope(deadline=max(over, trio.current_time()) + _TO_CLOSE, shield=True):
                await run_in_asyncio(loop, self._end)
                closed = True
        finally:
            others.discard(self)
            if not closed:
                _log.warning("%r does not close, and is cut off", self._node)
                _cut(self._node)
            if self._worker is not None:
                await self._end_threads(self._worker, over)

    async def _wait_turn(self, others: Collection[_Node[Any]]) -> None:
        """Wait for those that have to close before, and for connections that are being made."""
        await trio.lowlevel.checkpoint()  # those that were cancelled with us have begun then
        rank = self._rank()
        while any(other._rank() < rank for other in others):  # noqa: ASYNC110  # once in its life
            await trio.sleep(_LOOK)
        for callback in getattr(self._node, "periodic_callbacks", {}).values():
            callback.stop()  # a heartbeat makes one
        # A worker's heartbeat may also wait for its answer, and would complain.
        while self._making or (self._worker is not None and self._worker.rpc.active):  # noqa: ASYNC110  # Dask tells nobody
            await trio.sleep(_LOOK)

    def _rank(self) -> int:
        from distributed import Client, Nanny, Worker

        return 0 if isinstance(self._node, Client) else 1 if isinstance(self._node, (Worker, Nanny)) else 2

    async def _end(self) -> None:
        if self._worker is not None:
            # What may take that long is to end tasks that are coroutines, and to say goodbye to the scheduler.
            await self._worker.close(timeout=max(self._grace, _LEAST))
        else:
            await self._node.close()

    async def _end_threads(self, worker: Worker, over: float) -> None:
        with trio.CancelScope(deadline=over, shield=True):
            while worker.active_threads:  # noqa: ASYNC110  # threads of Dask's change it, and tell nobody
                await trio.sleep(_LOOK)
        if not worker.active_threads:
            with trio.CancelScope(shield=True):  # each has a timeout, and nothing to wait for
                for join in self._joins:
                    await trio.to_thread.run_sync(partial(join, timeout=_TO_CLOSE))
        for key, stack in worker.get_call_stack().items():
            _log.warning(
                "%s has closed, and leaves a thread to itself that still runs %s\n%s", worker.address_safe, key, "".join(stack)
            )


async def _awaited(node: Awaitable[object]) -> object:
    return await node


def _connects_whole(pool: ConnectionPool, all_making: set[asyncio.Future[Comm]]) -> None:
    """Have a stock pool complete the connections that it makes, also where who asks for one is cancelled, and show them."""
    connect = pool.connect

    async def whole(addr: str, timeout: float | None = None) -> Comm:
        if pool.available.get(addr):
            return await connect(addr, timeout)  # no need to make one
        making = asyncio.ensure_future(connect(addr, timeout))
        all_making.add(making)
        making.add_done_callback(all_making.discard)
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(partial(_give_back, pool, addr))
            raise

    pool.connect = whole  # type: ignore[method-assign]  # of this pool alone, whose connects are not to be cut


def _give_back(pool: ConnectionPool, addr: str, made: asyncio.Future[Comm]) -> None:
    if not made.cancelled() and made.exception() is None:
        pool.reuse(addr, made.result())  # which closes it if the pool has closed meanwhile


def _shutdown_soon(shutdown: Callable[..., object], wait: bool = True, **options: object) -> None:
    shutdown(wait=False)


def _cut(node: Any) -> None:
    """Close what may be closed at once, after a close() that was cancelled.  Tasks that are left, and what they hold, end with the loop."""
    from distributed import Client
    from distributed.core import Server

    if isinstance(node, Server):
        node.stop()
        for part in (*node.periodic_callbacks.values(), *getattr(node, "services", {}).values()):
            part.stop()
    elif isinstance(node, Client):
        if node.scheduler_comm is not None:
            node.scheduler_comm.abort()
        node.status = "closed"  # else it would try once more when it is collected
