"""What servers and clients use of every comm."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import trio
from trio.lowlevel import checkpoint_if_cancelled

from ..abc import Comm, CommSettings, Peer
from ..errors import CommClosedError
from ..protocol._context import Buffer
from ..protocol._handshake import Extension
from ..protocol._messages import Encoder

__all__ = ["BaseComm", "Unmade", "Unsent"]


class Unsent:
    """What is left to do for a message.

    Attributes:
        buffers: those of the message.
        size: of the message, in bytes.
        sent: how many of them have been sent.
        begun: whether more of them may have been sent, and then it failed; not known before :meth:`BaseComm.finish` has.
    """

    __slots__ = ("begun", "buffers", "sent", "size")

    def __init__(self, buffers: list[Buffer], size: int, sent: int) -> None:
        self.buffers: list[Buffer] = buffers
        self.size: int = size
        self.sent: int = sent
        self.begun: bool = sent > 0


class Unmade(Unsent):
    """A message that is still to be encoded, in a worker thread; until it is, nothing is known of its bytes.

    Attributes:
        encoder: for that.
        message: is not to be changed.
    """

    __slots__ = ("encoder", "message")

    def __init__(self, encoder: Encoder, message: object) -> None:
        super().__init__([], 0, 0)
        self.encoder = encoder
        self.message = message


class BaseComm(Comm):
    """What servers and clients use of every comm, beyond the public interface.

    Attributes:
        extension: what the peer's handshake said of the wire extension; None for a stock Dask peer.
        settings: what the comm was made with.
        serving: the comm is a server's: what its handlers write is bounded by ``Limits.stream_stall``, and all else by
            ``write_stall``.  What a client writes may wait for ever.
        asking: the comm is that of :func:`~trio_dcore.connect`, whose server waits for a request.
        fault: in what way the peer went over a limit or broke the protocol, so that the comm was closed; else empty.
        after_read: called, if not None, when a task has stopped reading the comm.
        last_id: of the last opted-in request that was made on the comm; ids grow.
        pings: both sides answer pings.
        bytes_written, messages_read, messages_written: counters.
    """

    __slots__ = (
        "__weakref__",
        "_local_address",
        "_peer",
        "after_read",
        "asking",
        "bytes_written",
        "extension",
        "fault",
        "last_id",
        "messages_read",
        "messages_written",
        "pings",
        "serving",
        "settings",
    )

    after_read: Callable[[], None] | None
    asking: bool
    bytes_written: int
    extension: Extension | None
    fault: str
    last_id: int
    messages_read: int
    messages_written: int
    pings: bool
    serving: bool
    settings: CommSettings
    #: Whether messages are the sender's own objects, which must not be changed.
    by_reference: ClassVar[bool] = False

    def __init__(self, *, local_address: str, peer: Peer, settings: CommSettings) -> None:
        self._local_address = local_address
        self._peer = peer
        self.settings = settings
        self.extension = None
        self.last_id = 0
        self.pings = self.serving = self.asking = False
        self.fault = ""
        self.after_read = None
        self.bytes_written = self.messages_read = self.messages_written = 0

    @property
    def local_address(self) -> str:
        return self._local_address

    @property
    def peer_address(self) -> str:
        return self._peer.address

    @property
    def peer(self) -> Peer:
        return self._peer

    @property
    def bytes_read(self) -> int:
        """Bytes received; 0 where objects are passed without bytes."""
        return 0

    @property
    @abstractmethod
    def heard(self) -> bool:
        """For a comm that has not finished its handshake: whether the peer has done its part, as far as it could.  Not a checkpoint.

        What has come and waits to be read may be that, and so may be the end; what has been read and was not enough is not.  Over
        TLS it is also to have made us answer.
        """

    @property
    def rest_since(self) -> float:
        """Since when a task waits for the rest of a message of which a part has come, by trio's clock; ``math.inf`` if none does."""
        return math.inf

    @property
    def last_message_size(self) -> int:
        """Bytes of the message that was read last, as its sender counted them; 0 where there are none."""
        return 0

    def allows_pickle(self) -> bool:
        """Whether a pickle may come from, or go to, the peer.  May do I/O the first time."""
        return self.settings.security.allows_pickle(self._peer)

    def why_no_pickle(self) -> str:
        """Why not, for an error's text."""
        if self.settings.security.pickle == "never":
            return "Security(pickle='never') is set"
        return f"why the peer is not trusted: {self._peer.reason}"

    @abstractmethod
    async def handshake(self) -> None:
        """Exchange handshakes.  The caller bounds the time and closes the comm if this fails."""

    @abstractmethod
    async def next_head(self, ahead: bool = False) -> tuple[object, list[Buffer] | None] | None:
        """Phase one of a read: (message with its payload markers in place, what :meth:`resolve` needs), None at a clean end.

        The second item is None where there is nothing to resolve: then the first is the whole message.  Delivers cancellation
        only where it waits; the caller sees to it otherwise.

        Args:
            ahead: nobody needs the message yet.  If the read is interrupted in the middle of it, the comm is not closed: what has
                come is kept for the next read.
        """

    @abstractmethod
    def start(self, message: Any, serializers: Sequence[str] | None = None, on_error: str | None = None) -> Unsent | None:
        """:meth:`write`, as far as it needs no wait; for servers and clients.  Here, ``on_error`` is "raise" by default.

        Returns None if the message is sent, which nearly every small one is then; else :meth:`finish` must be awaited with what
        is returned, at once: a large message is only encoded there, and may turn out to be one that can't be sent.

        Not a checkpoint.  A comm that was closed here raises trio.ClosedResourceError.
        """

    @abstractmethod
    async def finish(self, unsent: Unsent, stall: str = "") -> None:
        """Send the rest of a message, or let other tasks run where that is due.

        Cancellation: delivered before the first byte, or it closes the comm.

        Args:
            unsent: what :meth:`start` has left.
            stall: the field of :class:`Limits` that says for how long the peer may take nothing; empty is for ever.

        Raises:
            LimitExceeded: it has taken nothing for that time; the comm was closed.
            SerializationError, UnsafePayload, CommClosedError: as :meth:`start`.
        """

    async def put(self, message: Any, serializers: Sequence[str] | None = None, stall: str = "") -> int:
        """:meth:`start` and, where needed, :meth:`finish`; returns the size of the message in bytes.

        Delivers cancellation only where it waits; the caller sees to it otherwise.
        """
        before = self.bytes_written
        unsent = self.start(message, serializers)
        if unsent is None:
            return self.bytes_written - before
        await self.finish(unsent, stall)
        return unsent.size

    @abstractmethod
    def resolve(self, frames: list[Buffer], deserializers: Sequence[str] | None = None) -> Any:
        """Phase two: decode the whole message, payloads included; ``deserializers`` replaces the comm's own for this message."""

    async def unpack(self, frames: list[Buffer], deserializers: Sequence[str] | None = None) -> Any:
        """:meth:`resolve` the message that was read last, in a worker thread if that is much work.  Is a checkpoint only then.

        Meanwhile nobody else can read the comm.

        Cancellation: nothing is lost, the message is there for the next read.  The thread goes on; what it makes is dropped.
        """
        return self.resolve(frames, deserializers)

    @abstractmethod
    def write_nowait(self, message: Any) -> bool:
        """Send a message if that needs no wait at all; False if it would: then nothing was sent.

        Not a checkpoint.  Raises as :meth:`write` does.
        """

    @abstractmethod
    def write_soon(self, message: Any) -> bool:
        """Send a small message now, or else as soon as there is room for it; False if too much is waiting already.

        It goes behind the message that is being written, if any, and before all later ones.  Not a checkpoint.  Raises as
        :meth:`write` does.
        """

    @abstractmethod
    def give_up(self, error: Exception) -> None:
        """Close at once because of ``error``, which is the peer's doing and is noted as ``fault``.  Not a checkpoint."""

    def cut(self) -> None:
        """:meth:`abort`, for a client whose request was interrupted: the server learns of it also if it reads nothing."""
        self.abort()

    @abstractmethod
    def stale(self) -> bool:
        """Whether an idle comm must not be used again: closed, ended, or with something to read that nobody asked for."""

    @property
    @abstractmethod
    def reading(self) -> bool:
        """Whether a task is reading the comm, so that it will find the end by itself."""

    @abstractmethod
    def take_goodbye(self, before: int) -> bool:
        """Whether what is left to read is the server's goodbye, and names no request from ``before`` on as taken up.

        What is left is read for that, without waiting: the comm is of no further use.
        """

    def read_ahead(self, id: int, most: int, *, fill: bool = True) -> bool:
        """Answer the pings of a request whose handler runs; what else has come is kept, in order, for the next reads.

        Not a checkpoint.  Does nothing while a task reads the comm.

        Args:
            id: the request's.
            most: bytes that may be kept, but for the last message, which may be of any size.
            fill: read what can be had without waiting; else what comes has been read already.

        Returns:
            Whether it makes sense to go on when more has come.
        """
        return False

    def outstanding(self) -> tuple[int, int]:
        """(bytes that the system has taken of messages that had to wait, bytes that the peer's has not taken of ours).

        The first only grows; both are 0 where nobody can tell.
        """
        return 0, 0

    @abstractmethod
    def socket_fileno(self) -> int | None:
        """The descriptor whose hang-up means that the peer has gone, or None where there is none."""

    @abstractmethod
    def watch_end(self, nursery: trio.Nursery, on_end: Callable[[], None], look: Callable[[], bool] | None = None) -> None:
        """Have ``on_end`` called when the peer ends the comm, also while nobody reads; a task in ``nursery`` sees to it.

        For comms without a :meth:`socket_fileno`.  Bytes that come meanwhile are kept for the next read.

        Args:
            nursery: for the task.
            on_end: called once.
            look: called whenever bytes have come, returns whether there is room for more; None is a fixed number of bytes.
        """

    @abstractmethod
    def unwatch_end(self) -> None:
        """Stop that."""

    async def read(self, deserializers: Sequence[str] | None = None) -> Any:
        await checkpoint_if_cancelled()
        try:
            found = await self.next_head()
        except trio.ClosedResourceError as error:
            raise CommClosedError(str(error)) from error
        if found is None:
            raise CommClosedError(f"{self.peer_address} closed the comm")
        head, frames = found
        return head if frames is None else await self.unpack(frames, deserializers)

    async def receive(self) -> Any:
        await checkpoint_if_cancelled()
        found = await self.next_head()
        if found is None:
            raise trio.EndOfChannel(f"{self.peer_address} closed the comm")
        head, frames = found
        return head if frames is None else await self.unpack(frames)

    def __repr__(self) -> str:
        state = " closed" if self.closed() else ""
        return f"<{type(self).__name__}{state} local={self._local_address} remote={self.peer_address}>"
