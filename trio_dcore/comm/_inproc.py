"""``inproc://``: comms inside one trio run.  Objects are passed, not bytes; lists stay lists.

Only the wrappers ``Serialize``, ``ToPickle`` and the like are taken off, as Dask does; with ``deserialize=False`` only those that
say pickle, which is what that means on every comm.  What may be in them is looked at in the second phase of a read, as everywhere.
Back-pressure is a count of messages.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import trio
from trio.lowlevel import ParkingLot, cancel_shielded_checkpoint, checkpoint_if_cancelled

from ..abc import CommSettings, Listener, Peer, Transport
from ..errors import AddressError, CommClosedError, SerializationError, UnsafePayload
from ..protocol._buffers import nbytes
from ..protocol._collisions import Keys
from ..protocol._compression import Budget
from ..protocol._context import Buffer, DecodeContext
from ..protocol._envelope import GOODBYE
from ..protocol._families import deserialize, unpickle_parts
from ..protocol._handshake import FEATURES, Extension
from ..protocol._markers import at, find_path
from ..protocol._types import Pickled, Serialize, Serialized, ToPickle
from ._base import BaseComm, Unsent
from ._pace import acquire_within, stalled

__all__ = ["InprocComm", "InprocTransport", "new_location"]

# Messages that may be on their way in one direction; a further write waits.
_CAPACITY = 16
_YIELD_MESSAGES = 16
_BACKLOG = 2048

_CONTAINERS = frozenset({dict, list, tuple})
_PICKLES = frozenset({ToPickle, Pickled})
_WRAPPERS = _PICKLES | {Serialize, Serialized}
_OF_INTEREST = _CONTAINERS | _WRAPPERS

# Addresses are names within one run: two runs, in two threads or one after the other, don't see each other.
_listeners: trio.lowlevel.RunVar[dict[str, InprocListener]] = trio.lowlevel.RunVar("trio_dcore.inproc")
_numbers = itertools.count(1)


def _registry() -> dict[str, InprocListener]:
    try:
        return _listeners.get()
    except LookupError:
        fresh: dict[str, InprocListener] = {}
        _listeners.set(fresh)
        return fresh


def new_location(host: str = "127.0.0.1") -> str:
    """A location that this process has not used yet, in Dask's form ``ip/pid/number``.  Not a checkpoint."""
    return f"{host}/{os.getpid()}/{next(_numbers)}"


def _same_process() -> tuple[bool, str]:
    return True, "it is in this process"


class InprocComm(BaseComm):
    """One end of a pair."""

    __slots__ = (
        "_closed",
        "_inbox",
        "_on_hangup",
        "_other",
        "_peer_closed",
        "_reading",
        "_shaken",
        "_turn",
        "_unwaited",
        "_wake_reader",
        "_wake_writer",
        "_wrappers",
    )

    by_reference = True

    def __init__(self, local: str, remote: str, settings: CommSettings) -> None:
        peer = Peer(remote, "inproc", uid=_uid(), pid=os.getpid(), verify=_same_process)
        super().__init__(local_address=local, peer=peer, settings=settings)
        self._other: InprocComm = self
        self._inbox: deque[Any] = deque()
        self._wake_reader = ParkingLot()
        self._wake_writer = ParkingLot()
        self._turn: trio.StrictFIFOLock | None = None  # of those who wait for room, in order
        self._reading = False
        self._shaken = False  # this end has begun its handshake
        self._closed = False
        self._peer_closed = False
        self._unwaited = 0
        self._on_hangup: Callable[[], None] | None = None
        self._wrappers = _WRAPPERS if settings.deserialize else _PICKLES  # those that are taken off

    @property
    def on_hangup(self) -> Callable[[], None] | None:
        """Called when the other end is closed, or at once if it is already."""
        return self._on_hangup

    @on_hangup.setter
    def on_hangup(self, callback: Callable[[], None] | None) -> None:
        self._on_hangup = callback
        if callback is not None and self._peer_closed:
            callback()

    @property
    def heard(self) -> bool:
        return self._other._shaken or self._peer_closed

    async def handshake(self) -> None:
        # There is nothing to tell, but somebody must be there: a comm that is never accepted is no connection.
        self._shaken = True
        self._other._wake_reader.unpark_all()
        while not self._other._shaken:
            if self._closed:
                raise trio.ClosedResourceError("this comm was closed here")
            if self._peer_closed:
                raise CommClosedError(f"{self.peer_address} closed the comm during the handshake")
            await self._wake_reader.park()
        limits = self._other.settings.limits
        window = limits.window, limits.window_bytes
        pooled = self._other.settings.pooled
        self.extension = Extension(version=1, features=frozenset(FEATURES), window=window, pooled=pooled)
        await trio.lowlevel.checkpoint()

    async def next_head(self, ahead: bool = False) -> tuple[object, list[Buffer] | None] | None:
        if self._reading:
            raise trio.BusyResourceError("another task is reading this comm")
        self._reading = True
        try:
            while not self._inbox:
                if self._closed:
                    raise trio.ClosedResourceError("this comm was closed here")
                if self._peer_closed:
                    return None
                self._unwaited = 0
                await self._wake_reader.park()
        finally:
            self._reading = False
            if self.after_read is not None:
                self.after_read()
        message = self._inbox.popleft()
        self._other._wake_writer.unpark()
        self.messages_read += 1
        await self._yield_sometimes()
        return message, [message] if _holds(message, self._wrappers) else None

    def resolve(self, frames: list[Buffer], deserializers: Sequence[str] | None = None) -> Any:
        (message,) = frames
        found, containers = _survey(message, self._wrappers)
        budget = Budget(
            lambda: self.settings.limits.message_trusted,
            sum(nbytes(frame) for wrapper in found if isinstance(wrapper, (Serialized, Pickled)) for frame in wrapper.frames),
        )
        keys = Keys()
        new: dict[int, Any] = {}
        for wrapper in found:
            try:
                new[id(wrapper)] = self._payload(wrapper, budget, keys, deserializers)
            except UnsafePayload as error:
                path = _path(message, wrapper) + error.field
                raise UnsafePayload(at(path, f"{error}; see Security(pickle=...)"), field=path) from error
            except SerializationError as error:
                path = _path(message, wrapper) + error.path
                raise SerializationError(at(path, str(error)), path=path) from error
        for container in containers:
            _rebuild(container, new)
        return new.get(id(message), message)

    def watch_end(self, nursery: trio.Nursery, on_end: Callable[[], None], look: Callable[[], bool] | None = None) -> None:
        self.on_hangup = on_end

    def unwatch_end(self) -> None:
        self.on_hangup = None

    async def write(self, message: Any, *, on_error: str | None = None, serializers: Sequence[str] | None = None) -> int:
        await checkpoint_if_cancelled()
        try:
            return await self.put(message, stall=self._own_stall())
        except trio.ClosedResourceError as error:
            raise CommClosedError(str(error)) from error

    async def send(self, value: Any) -> None:
        await checkpoint_if_cancelled()
        await self.put(value, stall=self._own_stall())

    def _own_stall(self) -> str:
        return "stream_stall" if self.serving else ""

    def start(self, message: Any, serializers: Sequence[str] | None = None, on_error: str | None = None) -> Unsent | None:
        if not self.write_nowait(message):
            return Unsent([message], 1, 0)
        self._unwaited += 1
        return None if self._unwaited < _YIELD_MESSAGES else Unsent([], 1, 1)

    async def finish(self, unsent: Unsent, stall: str = "") -> None:
        messages = unsent.buffers
        if messages:
            seconds: float | None = getattr(self.settings.limits, stall) if stall else None
            try:
                await self._pass_on_in_turn(messages[0], math.inf if seconds is None else seconds, stall)
            except trio.TooSlowError:
                error = stalled(self.peer_address, stall, seconds or 0)
                self.give_up(error)
                raise error from None
        await self._yield_sometimes()

    async def _pass_on_in_turn(self, message: Any, seconds: float, stall: str) -> None:
        if self._turn is None:
            self._turn = trio.StrictFIFOLock()
        turn = self._turn
        if stall == "write_stall":  # see FramedComm
            await acquire_within(turn, seconds, self._passed)
        else:
            await turn.acquire()
        try:
            while True:
                self._check_writable()
                if len(self._other._inbox) < _CAPACITY:
                    break
                self._unwaited = 0
                with trio.fail_after(seconds):  # one message was taken whenever this is over
                    await self._wake_writer.park()
            self._pass_on(message)
        finally:
            turn.release()

    def _passed(self) -> int:
        return self._other.messages_read

    async def put(self, message: Any, serializers: Sequence[str] | None = None, stall: str = "") -> int:
        await super().put(message, serializers, stall)
        return 1  # as Dask: there are no bytes to count

    def write_nowait(self, message: Any) -> bool:
        self._check_writable()
        if len(self._other._inbox) >= _CAPACITY or (self._turn is not None and self._turn.locked()):
            return False
        self._pass_on(message)
        return True

    def write_soon(self, message: Any) -> bool:
        self._check_writable()
        self._pass_on(message)
        return True

    def _check_writable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this comm was closed here")
        if self._peer_closed:
            error = CommClosedError(f"{self.peer_address} closed the comm")
            error.nothing_sent = True
            raise error

    def _pass_on(self, message: Any) -> None:
        self._other._inbox.append(message)
        self._other._wake_reader.unpark_all()
        self.messages_written += 1

    async def _yield_sometimes(self) -> None:
        self._unwaited += 1
        if self._unwaited >= _YIELD_MESSAGES:
            self._unwaited = 0
            await cancel_shielded_checkpoint()

    def _payload(self, wrapper: Any, budget: Budget, keys: Keys, deserializers: Sequence[str] | None) -> Any:
        """What is in a wrapper that doesn't stay."""
        kind = type(wrapper)
        if kind is ToPickle or kind is Serialize:
            return wrapper.data
        settings = self.settings
        context = DecodeContext(
            allow_pickle=lambda: settings.security.allows_pickle(wrapper),
            deserializers=settings.deserializers if deserializers is None else tuple(deserializers),
            enum_modules=settings.security.enum_modules,
            max_message=lambda: settings.limits.message_trusted,
            max_head=lambda: settings.limits.head_trusted,
        )
        if kind is Pickled:
            return unpickle_parts(wrapper.header, wrapper.frames, context, budget=budget)
        return deserialize(wrapper.header, wrapper.frames, context, budget=budget, keys=keys)

    def give_up(self, error: Exception) -> None:
        self.fault = self.fault or str(error)
        self.abort()

    def abort(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.clear()
        other = self._other
        other._peer_closed = True
        for comm in (self, other):
            comm._wake_reader.unpark_all()
            comm._wake_writer.unpark_all()
        if other._on_hangup is not None:
            other._on_hangup()

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    def closed(self) -> bool:
        return self._closed or (self._peer_closed and not self._inbox)

    def stale(self) -> bool:
        return self._closed or self._peer_closed or bool(self._inbox)

    @property
    def reading(self) -> bool:
        return self._reading

    def take_goodbye(self, before: int) -> bool:
        for message in self._inbox:
            if type(message) is not tuple or len(message) != 3:
                continue
            kind, identity, _ = message
            if type(kind) is type(identity) is int and kind == GOODBYE:
                return identity < before
        return False

    def socket_fileno(self) -> int | None:
        return None


def _items(container: Any) -> Iterable[Any]:
    return container.values() if type(container) is dict else container


def _holds(message: object, wrappers: frozenset[type]) -> bool:
    """Whether there is a wrapper in a message."""
    kind = type(message)
    if kind not in _CONTAINERS:
        return kind in wrappers
    if _OF_INTEREST.isdisjoint(map(type, _items(message))):
        return False  # nearly always
    seen = {id(message)}
    stack: list[Any] = [message]
    while stack:
        for item in _items(stack.pop()):
            kind = type(item)
            if kind in wrappers:
                return True
            if kind in _CONTAINERS and id(item) not in seen:
                seen.add(id(item))
                if not _OF_INTEREST.isdisjoint(map(type, _items(item))):
                    stack.append(item)
    return False


def _survey(message: object, wrappers: frozenset[type]) -> tuple[list[Any], list[Any]]:
    """The wrappers in a message, and its containers, each behind those in it but for those that it is itself in; each once."""
    found: list[Any] = []
    containers: list[Any] = []
    seen: set[int] = set()
    stack = [(message, False)]
    while stack:
        value, left = stack.pop()
        if left:
            containers.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            if type(value) in wrappers:
                found.append(value)
            else:
                stack.append((value, True))
                of_interest = [item for item in _items(value) if type(item) in wrappers or type(item) in _CONTAINERS]
                stack += [(item, False) for item in reversed(of_interest)]
    return found, containers


def _path(message: object, wrapper: object) -> str:
    return find_path(message, lambda value: value is wrapper) or ""


def _rebuild(container: Any, new: dict[int, Any]) -> None:
    """Note what stands for a container, if anything in it changes: the sender's own is left alone.

    Inside of itself a container stands for itself.
    """
    items = _items(container)
    if new.keys().isdisjoint(map(id, items)):
        return
    changed = [new.get(id(item), item) for item in items]
    kind = type(container)
    new[id(container)] = dict(zip(container, changed, strict=True)) if kind is dict else kind(changed)


def _uid() -> int | None:
    return os.getuid() if hasattr(os, "getuid") else None


class InprocListener(Listener):
    """Listens on a name."""

    def __init__(self, location: str, settings: CommSettings) -> None:
        self._location = location
        self._settings = settings
        self._waiting: deque[InprocComm] = deque()
        self._wake = ParkingLot()
        self._closed = False

    @property
    def listen_address(self) -> str:
        return f"inproc://{self._location}"

    @property
    def contact_address(self) -> str:
        return self.listen_address

    async def accept(self) -> InprocComm:
        await checkpoint_if_cancelled()
        while not self._waiting:
            if self._closed:
                raise trio.ClosedResourceError("this listener was closed")
            await self._wake.park()
        return self._waiting.popleft()

    def connect(self, settings: CommSettings) -> InprocComm:
        if len(self._waiting) >= _BACKLOG:
            raise ConnectionRefusedError(f"{self.listen_address} has {_BACKLOG} connections that it didn't accept")
        client_address = f"inproc://{new_location()}"
        client = InprocComm(client_address, self.listen_address, settings)
        server = InprocComm(self.listen_address, client_address, self._settings)
        client._other, server._other = server, client
        self._waiting.append(server)
        self._wake.unpark()
        return client

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        del _registry()[self._location]
        self._wake.unpark_all()
        while self._waiting:
            self._waiting.popleft().abort()


class InprocTransport(Transport):
    """Within one trio run.  ``inproc://`` alone makes a new name."""

    scheme = "inproc"
    encrypted = True  # nothing leaves the process

    async def connect(self, location: str, settings: CommSettings) -> InprocComm:
        await trio.lowlevel.checkpoint()
        listener = _registry().get(location)
        if listener is None:
            raise ConnectionRefusedError(f"nobody listens on inproc://{location} in this trio run")
        return listener.connect(settings)

    async def listen(self, location: str, settings: CommSettings) -> list[Listener]:
        await trio.lowlevel.checkpoint()
        location = location or new_location()
        registry = _registry()
        if location in registry:
            raise AddressError(f"inproc://{location} is taken in this trio run")
        listener = registry[location] = InprocListener(location, settings)
        return [listener]
