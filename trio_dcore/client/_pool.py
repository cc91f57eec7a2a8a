"""The connection pool: comms that calls share, one call at a time.

No state change is followed by an await before it is complete, so a call can be cancelled anywhere without a slot being lost; and a
comm on which something was interrupted is closed, never used again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import trio
from trio.lowlevel import checkpoint_if_cancelled

from .._security import Security
from ..abc import OFFLOAD, CommSettings, check_timeout
from ..comm import AddressLike, BaseComm, check_encryption, coerce_to_address, connect_with, get_transport, parse_address
from ..errors import CommClosedError, ConnectError, LimitExceeded, RemoteProtocolError, RPCClosed, ServerClosing
from ..protocol._limits import Limits
from ._pinger import Pinger
from ._pool_policy import PoolPolicy, Slot, Waiter
from ._rpc_call import PooledRPC

__all__ = ["ConnectionPool"]

_log = logging.getLogger("trio_dcore.client")

# A call that has waited this long for a slot says so, once.
_LOG_WAIT_AFTER = 5.0


class ConnectionPool:
    """Comms to any number of addresses, kept for the next call.

    Args:
        limit: how many comms may be open at once: in use, idle, or being connected.
        security: whom to trust.
        limits: what is accepted of peers; ``pool_wait`` and ``idle`` are the pool's own.
        deserialize: False leaves ``Serialize`` payloads as ``Serialized`` objects.
        timeout: seconds for connecting and handshake together; None for ever.
        serializers: families for ``Serialize`` payloads.
        deserializers: families accepted in ``Serialize`` payloads.
        compression, offload: as for :func:`trio_dcore.connect`.

    Making one neither connects nor needs a nursery.  ``pool(address).op(...)`` makes a call::

        async with ConnectionPool() as pool:
            await pool("tcp://127.0.0.1:8786").add(x=1, y=2)
    """

    def __init__(
        self,
        limit: int = 512,
        *,
        security: Security | None = None,
        limits: Limits | None = None,
        deserialize: bool = True,
        timeout: float | None = 30.0,
        serializers: Sequence[str] | None = None,
        deserializers: Sequence[str] | None = None,
        compression: str | None = None,
        offload: int | None = OFFLOAD,
    ) -> None:
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(f"limit={limit!r}: a pool needs room for at least 1 comm")
        self.timeout = check_timeout(timeout)
        self.settings: CommSettings = CommSettings.of(
            security, limits, deserialize, serializers, deserializers, compression=compression, offload=offload, pooled=True
        )
        #: Families for the payloads of a call that names none: (its request, its answer); None for the comm's own.
        self.families: tuple[None, tuple[str, ...] | None] = (
            None,
            self.settings.serializers if self.settings.deserializers is None else self.settings.deserializers,
        )
        self._policy = PoolPolicy(limit)
        self._pinger = Pinger(self._policy, self.settings.limits)
        self._idle_limit = self.settings.limits.idle
        self._closed = False
        self._removed: dict[Slot, str] = {}  # connecting slots whose address was removed meanwhile, and why
        self._dismissed: set[str] = set()  # addresses whose server's goodbye was found by reuse(), for acquire() right after it

    # -- use ---------------------------------------------------------------------------------------------------------------------

    def __call__(self, address: AddressLike | None = None, *, ip: str | None = None, port: int | str | None = None) -> PooledRPC:
        """Calls to one address: ``pool(address).op(...)``.

        Args:
            address: also ``"host:port"`` and ``(host, port)``.
            ip: the host, in place of an address.
            port: its port.

        Raises:
            AddressError: it is no address to call.
            TypeError: neither an address nor ``ip`` and ``port``, or both.
        """
        if address is None and ip is not None and port is not None:
            address = (ip, port)
        elif address is None or ip is not None or port is not None:
            raise TypeError("give an address, or ip= and port=")
        return PooledRPC(self, coerce_to_address(address))

    @property
    def limit(self) -> int:
        """How many comms may be open at once."""
        return self._policy.limit

    @property
    def open(self) -> int:
        """How many comms are open, those being connected included."""
        return self._policy.open

    @property
    def active(self) -> int:
        """How many of them are in use or being connected."""
        return len(self._policy.busy) + len(self._policy.connecting)

    @property
    def connecting(self) -> int:
        """How many of them are being connected."""
        return len(self._policy.connecting)

    @property
    def bytes_read(self) -> int:
        """Bytes received so far over the comms that are in use."""
        return sum(comm.bytes_read for comm in self._policy.busy)

    @property
    def bytes_written(self) -> int:
        """Bytes sent so far over the comms that are in use; a message counts when all of it is with the system."""
        return sum(comm.bytes_written for comm in self._policy.busy)

    @property
    def closed(self) -> bool:
        """Whether the pool has been closed."""
        return self._closed

    def collect(self) -> int:
        """Close every idle comm and return how many there were.  Not a checkpoint."""
        return self._abort_idle(list(self._policy.idle_since))

    def remove(self, address: AddressLike, *, reason: str = "the address was removed") -> None:
        """Close all comms to an address.  Calls on them, and calls that are connecting to it, get CommClosedError.

        Not a checkpoint.  The address may be used again.
        """
        removed = coerce_to_address(address)
        policy = self._policy
        # Those of now: a call that waits, and gets the slot of one that ends here, connects anew.
        connecting = [slot for slot in policy.connecting if slot.address == removed]
        self._abort_idle(list(policy.idle.get(removed, ())))
        for comm, (used_for, _) in list(policy.busy.items()):
            if used_for == removed:
                policy.discard(comm)
                comm.abort()
        for slot in connecting:
            self._removed[slot] = reason
            slot.scope.cancel(reason=reason)

    def close_now(self) -> None:
        """Close every comm.  Calls that wait, connect or are in flight get RPCClosed.  Not a checkpoint; nothing is left to await."""
        if self._closed:
            return
        self._closed = True
        self._pinger.stop()
        policy = self._policy
        self._abort_idle(list(policy.idle_since))
        for comm in list(policy.busy):
            comm.abort()
        policy.busy.clear()
        for slot in policy.connecting:
            slot.scope.cancel(reason="the pool was closed")
        while policy.waiters:
            policy.waiters.popleft().woken.set()

    async def aclose(self) -> None:
        """Close every comm, as :meth:`close_now`."""
        self.close_now()
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        """Dask's name for :meth:`aclose`."""
        await self.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close_now()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.active} active, {self.open} open of {self.limit}"
        return f"<ConnectionPool {state}>"

    def _abort_idle(self, comms: Sequence[BaseComm]) -> int:
        for comm in comms:
            self._policy.forget_idle(comm)
            comm.abort()
        return len(comms)

    # -- for calls ---------------------------------------------------------------------------------------------------------------

    def reuse(self, address: str, op: str) -> BaseComm | None:
        """An idle comm that lives, or None.  Not a checkpoint."""
        if self._closed:
            raise RPCClosed(f"{op!r} was called on a closed pool")
        policy = self._policy
        if self._idle_limit is not None:
            self._abort_idle(policy.expired(trio.current_time() - self._idle_limit))
        dismissed = False
        while (comm := policy.reuse(address, op)) is not None:
            # Readable means ended, or a message that nobody asked for: either way not fit for the next call.
            if not comm.stale():
                if comm.pings and not self._pinger.awake:
                    self._pinger.wake()
                return comm
            dismissed = comm.take_goodbye(comm.last_id + 1) or dismissed
            policy.discard(comm)
            comm.abort()
        if dismissed:
            self._dismissed.add(address)
        return None

    async def acquire(self, address: str, op: str, *, anew: bool = False) -> tuple[BaseComm, bool]:
        """A comm for one call: (the comm, whether it is fresh).

        Args:
            address: of the server.
            op: what is called, for messages.
            anew: don't use an idle one, and make one attempt to connect, at once: the server has just said goodbye.  So it is
                also if its goodbye is found on an idle one.

        Cancellation: nothing is lost; a slot or comm that had been assigned goes to the next call.

        Raises:
            ConnectError, AddressError: no comm could be made.
            ServerClosing: nor could it at once, after a goodbye.
            CommClosedError: the address was removed meanwhile.
            RPCClosed: the pool is closed, or was meanwhile.
            LimitExceeded: no slot became free within ``Limits.pool_wait``.
        """
        comm = None if anew else self.reuse(address, op)
        if comm is not None:
            return comm, False
        if address in self._dismissed:
            self._dismissed.discard(address)
            anew = True
        policy = self._policy
        slot: Slot | None = None
        while slot is None:
            slot, evicted = policy.reserve(address, op)
            if evicted is not None:
                evicted.abort()
            if slot is not None:
                break
            waiter = await self._wait(address, op)
            slot, comm = waiter.slot, waiter.comm
            if comm is not None:
                if not comm.stale():
                    await self._still_wanted(comm)
                    return comm, False
                anew = comm.take_goodbye(comm.last_id + 1) or anew
                comm.abort()
                slot = policy.replace(comm)  # None if the address was removed meanwhile, and the slot is somebody else's
        comm = await self._connect(slot, once=anew)
        await self._still_wanted(comm)
        return comm, True

    async def _still_wanted(self, comm: BaseComm) -> None:
        """Deliver a cancellation that came in the moment in which the call got its comm: nothing is sent, the comm is kept."""
        try:
            await checkpoint_if_cancelled()
        except BaseException:
            self.release(comm)
            raise
        if comm.pings and not self._pinger.awake:
            self._pinger.wake()

    async def _connect(self, slot: Slot, *, once: bool) -> BaseComm:
        try:
            with slot.scope:
                if once:
                    comm = await _connect_once(slot.address, self.settings, self.timeout)
                else:
                    comm = await connect_with(slot.address, self.settings, self.timeout)
                if not slot.scope.cancel_called:
                    self._policy.connected(slot, comm)
                    return comm
                comm.abort()  # the connection was made in the very moment in which we were told that nobody wants it any more
        except ConnectError as error:
            if once:
                raise ServerClosing(f"{slot.address} is shutting down and did not start {slot.op!r}") from error
            raise
        finally:
            self._policy.cancel_connecting(slot)  # does nothing if it became a comm
            reason = self._removed.pop(slot, None)
        if self._closed:
            raise RPCClosed(f"the pool was closed while {slot.op!r} connected to {slot.address}")
        raise CommClosedError(f"{slot.op!r} was connecting to {slot.address}: {reason}")

    async def _wait(self, address: str, op: str) -> Waiter:
        policy = self._policy
        waiter = Waiter(address, op)
        policy.waiters.append(waiter)
        patience = self.settings.limits.pool_wait
        try:
            with trio.move_on_after(math.inf if patience is None else patience):
                with trio.move_on_after(_LOG_WAIT_AFTER):
                    await waiter.woken.wait()
                if not waiter.woken.is_set():
                    _log.warning(
                        "%r has waited %s s for one of the pool's %d comms, %s", op, _LOG_WAIT_AFTER, self.limit, self._held()
                    )
                    await waiter.woken.wait()
        except BaseException:
            if waiter.slot is not None:
                self._removed.pop(waiter.slot, None)
            comm = policy.give_up(waiter)
            if comm is not None:
                self.release(comm)
            raise
        if self._closed:
            policy.give_up(waiter)
            raise RPCClosed(f"the pool was closed while {op!r} waited for a comm")
        if not waiter.woken.is_set():
            policy.give_up(waiter)
            assert patience is not None
            raise LimitExceeded(
                f"{op!r} got none of the pool's {self.limit} comms within {patience} s (Limits.pool_wait): {self._held()}; "
                f"change it with ConnectionPool(limit=...) or rpc(limit=...)",
                limit="limit",
                value=self.limit,
                seen=self.limit + len(policy.waiters) + 1,
            )
        return waiter

    def _held(self) -> str:
        holders = sorted(self._policy.holders().items(), key=lambda item: -item[1])
        return "they are held by " + ", ".join(f"{op} ({count})" for op, count in holders[:10])

    def release(self, comm: BaseComm, *, last: bool = False) -> None:
        """A call is over and its comm may be used again.  Not a checkpoint."""
        if comm.closed():
            self.discard(comm)
            return
        now = 0.0 if self._idle_limit is None else trio.current_time()
        refused = self._policy.release(comm, now, last=last)
        if refused is not None:
            refused.abort()

    def discard(self, comm: BaseComm) -> None:
        """A call is over and its comm must not be used again.  Not a checkpoint."""
        self._policy.discard(comm)
        comm.cut()


async def _connect_once(address: str, settings: CommSettings, timeout: float | None) -> BaseComm:
    """Make one attempt to connect; any failure of it is a ConnectError."""
    scheme, location = parse_address(address)
    check_encryption(scheme, settings)
    patience = min(math.inf if limit is None else limit for limit in (timeout, settings.limits.handshake_timeout))
    comm = None
    try:
        with trio.fail_after(patience):
            comm = await get_transport(scheme).connect(location, settings)
            assert isinstance(comm, BaseComm)
            await comm.handshake()
    except BaseException as error:
        if comm is not None:
            comm.abort()
        if isinstance(error, (OSError, RemoteProtocolError, LimitExceeded, trio.TooSlowError)):
            raise ConnectError(f"could not connect to {address}: {str(error) or 'it took too long'}") from error
        raise
    return comm
