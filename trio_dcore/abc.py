"""The interfaces that layers meet at: :class:`Comm`, :class:`Listener`, :class:`Transport`, and :class:`Peer`."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from ._security import Security
from .protocol._compression import check_codec
from .protocol._limits import Limits, MiB

__all__ = ["OFFLOAD", "Comm", "CommSettings", "Listener", "Peer", "PeerKind", "Transport", "check_timeout", "family_names"]

#: Bytes from which on a message is encoded or decoded in a worker thread (``distributed.comm.offload``).
OFFLOAD = 10 * MiB

PeerKind = Literal["inproc", "unix", "loopback", "tls", "tcp", "memory"]


def _nobody() -> tuple[bool, str]:
    return False, "nothing is known about this peer"


@dataclass(frozen=True, eq=False)
class Peer:
    """Who is at the other end of a comm.

    Attributes:
        address: its address, as in ``comm.peer_address``.
        kind: how it is reached.
        uid: its user id where the system tells, else None.
        pid: its process id where the system tells, else None.
        certificate: its verified certificate as :meth:`ssl.SSLSocket.getpeercert` gives it, else None.
    """

    address: str
    kind: PeerKind
    uid: int | None = None
    pid: int | None = None
    certificate: dict[str, Any] | None = None
    #: Reaches the verdict about trust: (trusted, why).  Called at most once.
    verify: Callable[[], tuple[bool, str]] = field(default=_nobody, repr=False)
    _verdict: list[tuple[bool, str]] = field(default_factory=list, init=False, repr=False)

    def _judge(self) -> tuple[bool, str]:
        if not self._verdict:
            self._verdict.append(self.verify())
        return self._verdict[0]

    @property
    def trusted(self) -> bool:
        """Whether pickles from and to this peer are accepted.  The first reading may do I/O; later ones repeat its verdict."""
        return self._judge()[0]

    @property
    def reason(self) -> str:
        """Why the peer is trusted, or why not."""
        return self._judge()[1]


_DEFAULT_SECURITY = Security()


@functools.cache
def _default_limits() -> Limits:
    return Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class CommSettings:
    """What a comm is made with; see :func:`trio_dcore.connect` for the meaning of each."""

    security: Security = _DEFAULT_SECURITY
    limits: Limits = field(default_factory=_default_limits)
    deserialize: bool = True
    serializers: tuple[str, ...] | None = None
    deserializers: tuple[str, ...] | None = None
    compression: str | None = None
    offload: int | None = OFFLOAD
    #: The comm is a pool's: nothing but requests is sent on it.
    pooled: bool = False

    @classmethod
    def of(
        cls,
        security: Security | None,
        limits: Limits | None,
        deserialize: bool,
        serializers: Sequence[str] | None,
        deserializers: Sequence[str] | None,
        *,
        compression: str | None = None,
        offload: int | None = OFFLOAD,
        pooled: bool = False,
    ) -> CommSettings:
        """From the arguments of a public call, where None means the default.

        Raises:
            TypeError, ValueError: one of them is none of its kind; better now than when somebody connects.
        """
        for parameter, value, kind in (("security", security, Security), ("limits", limits, Limits)):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{parameter}={value!r}: must be a {kind.__name__}, or None")
        return cls(
            security=_DEFAULT_SECURITY if security is None else security,
            limits=_default_limits() if limits is None else limits,
            deserialize=deserialize,
            serializers=family_names("serializers", serializers),
            deserializers=family_names("deserializers", deserializers),
            compression=check_codec(compression),
            offload=_bytes("offload", offload),
            pooled=pooled,
        )


def family_names(parameter: str, names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Check the names of serialization families that a call was given."""
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError(f"{parameter}={names!r}: give a sequence of family names, such as ({names!r},)")
    return tuple(names)


def check_timeout(timeout: float | None) -> float | None:
    """Return what a ``timeout=`` was given, if it is a number of seconds; None is for ever, and below 0 is no time at all.

    Raises:
        ValueError: it is none.
    """
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout != timeout):
        raise ValueError(f"timeout={timeout!r}: must be a number of seconds, or None")
    return timeout


def _bytes(parameter: str, number: int | None) -> int | None:
    if number is not None and (type(number) is not int or number < 0):
        raise ValueError(f"{parameter}={number!r}: must be a number of bytes, or None")
    return number


class Comm(trio.abc.Channel[Any]):
    """A message channel: arbitrary Python objects in both directions.

    ``send``/``receive``/``aclose``, ``async for`` and ``async with`` are trio's; ``write``/``read``/``close`` are the same
    operations under Dask's names.  Any number of tasks may write, their messages are queued in order; only one may read.

    Cancellation:
        Of a write: it is delivered before the first byte (the message is untouched, the comm usable) or it closes the comm.  A
        write that returned was sent whole.  Of a read: the comm stays usable unless part of a message had come; then it is
        closed, never used again.  While a worker thread encodes or decodes a large message (``offload=``) nothing is lost either:
        the message is still to be written, or is there for the next read.  The thread itself can't be stopped: it goes on, may look
        at the message for as long, what it makes is dropped, and a line in the log says so.

        The one deviation from trio's "every call is a checkpoint": a read or write that needs no I/O delivers cancellation, but lets
        other tasks run only every 16 messages or 64 KiB.
    """

    __slots__ = ()

    @abstractmethod
    async def write(self, message: Any, *, on_error: str | None = None, serializers: Sequence[str] | None = None) -> int:
        """Send one message and return the number of bytes it took.

        Args:
            message: any value that can be encoded; see SerializationError and UnsafePayload.
            on_error: what an unserialisable ``Serialize`` payload does: "message" (default) sends an error that the receiver
                raises as TypeError, as Dask does; "raise" raises SerializationError here.
            serializers: families for ``Serialize`` payloads of this message, instead of the comm's own.

        Returns when the message is with the kernel, so a slow peer slows its writers down.

        Raises:
            SerializationError: the value can't be sent; nothing was written and the comm is usable.
            UnsafePayload: it needs a pickle and the peer isn't trusted; nothing was written and the comm is usable.
            CommClosedError: the comm is closed, by either side, or broke.
            LimitExceeded: in a handler: the client has taken nothing for ``Limits.stream_stall``; the comm was closed.
        """

    @abstractmethod
    async def read(self, deserializers: Sequence[str] | None = None) -> Any:
        """Receive one message.

        Args:
            deserializers: families accepted in its ``Serialize`` payloads, instead of the comm's own.  Not on a stream's comm, whose items
                are read when they come: it has those of its server.

        Raises:
            CommClosedError: the comm ended or broke, in whatever way.
            trio.BusyResourceError: another task is reading.
            RemoteProtocolError, LimitExceeded: what came is not acceptable; where framing was lost the comm is closed.
            UnsafePayload, SerializationError: a payload was refused or is broken; the comm is usable.
        """

    @abstractmethod
    async def send(self, value: Any) -> None:
        """Send one message.  As :meth:`write`, but a comm that was closed here raises trio.ClosedResourceError."""

    @abstractmethod
    async def receive(self) -> Any:
        """Receive one message.  As :meth:`read`, but a clean end raises trio.EndOfChannel and a comm that was closed here
        trio.ClosedResourceError."""

    @abstractmethod
    def abort(self) -> None:
        """Close at once; what was not sent is lost.  Does nothing on a closed comm."""

    @abstractmethod
    def closed(self) -> bool:
        """Whether the comm was closed here, or has been found broken or ended."""

    async def close(self) -> None:
        """Dask's name for ``aclose``."""
        await self.aclose()

    @property
    @abstractmethod
    def local_address(self) -> str:
        """The address of this end."""

    @property
    @abstractmethod
    def peer_address(self) -> str:
        """The address of the other end."""

    @property
    @abstractmethod
    def peer(self) -> Peer:
        """Who is at the other end."""


class Listener(trio.abc.AsyncResource):
    """Accepts comms on one address."""

    @property
    @abstractmethod
    def listen_address(self) -> str:
        """The address that is bound, e.g. ``tcp://0.0.0.0:8786``."""

    @property
    @abstractmethod
    def contact_address(self) -> str:
        """An address that others can use; differs from the bound one for wildcards."""

    @abstractmethod
    async def accept(self) -> Comm:
        """Wait for a connection and return its comm, before any handshake.

        Cancellation: no connection is lost; it stays in the queue for the next call.

        Raises:
            trio.ClosedResourceError: the listener was closed.
            OSError: this connection could not be accepted, e.g. EMFILE; the listener is usable.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop listening at once.  Connections that nobody accepted are refused."""

    async def aclose(self) -> None:
        """Stop listening."""
        self.close()
        await trio.lowlevel.checkpoint()


class Transport(ABC):
    """How comms of one scheme are made; see :func:`trio_dcore.comm.register_transport`.

    Its comms are of :class:`trio_dcore.comm.BaseComm`, which has more than users of a comm see.  Over any trio stream that is::

        FramedComm(StreamPump(stream), local_address=..., peer=Peer(address, "tcp", verify=...), settings=settings)
    """

    #: What stands before ``://``.
    scheme: str
    #: Whether its locations are ``host:port``, which then are checked and spelled in one way; else they are any text.
    host_port: bool = False
    #: Whether nobody on the way can read or change what is sent.
    encrypted: bool = False

    @abstractmethod
    async def connect(self, location: str, settings: CommSettings) -> Comm:
        """Make one attempt to connect; the caller bounds its time, tries again and does the handshake.

        Raises:
            OSError: nobody answered; another attempt may succeed.
            AddressError, LocalProtocolError: it never will.
        """

    @abstractmethod
    async def listen(self, location: str, settings: CommSettings) -> Sequence[Listener]:
        """Bind the location; a name may stand for several addresses, all or none of which are bound."""
