"""The error classes that need no trio.

They live below everything else so that the sans-IO layer can raise them; :mod:`trio_dcore.errors` re-exports them together with
the ones that are also trio errors.  Every class says whether the comm survives and whether trying again is safe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = [
    "DcoreError",
    "HandlerCancelled",
    "LimitExceeded",
    "LocalProtocolError",
    "NotAllowed",
    "Overloaded",
    "ProtocolError",
    "RemoteError",
    "RemoteProtocolError",
    "RemoteTraceback",
    "SerializationError",
    "ServerClosing",
    "TooHeavy",
    "UnknownOp",
    "UnsafePayload",
]


class DcoreError(Exception):
    """Root of every error that trio_dcore defines."""


class TooHeavy(DcoreError):
    """A message takes more work than may be done where it is being encoded or decoded: a worker thread is to do it.

    For the layers above, which catch it; only who asked for it, by a number of bytes, ever meets it.

    Attributes:
        rest: where a message was being decoded: does what is left of that, and returns the message.
    """

    rest: Callable[[], Any]


class ProtocolError(DcoreError):
    """Somebody broke the rules of the protocol; the two subclasses say who."""


class LocalProtocolError(ProtocolError):
    """You used the library in a way that it does not allow.

    Raised before anything is sent, so the comm, pool or server is as it was.  The message says what to do instead.
    """


class RemoteProtocolError(ProtocolError):
    """The peer sent something that is not the protocol.

    The comm it came from has been closed, or is about to be: after this its stream position can't be relied upon.
    """


class LimitExceeded(DcoreError):
    """A size, count or time went over its limit.

    Attributes:
        limit: name of the :class:`~trio_dcore.Limits` field (or constructor argument) to change.
        value: what that limit is set to.
        seen: what was asked for, as far as it is known; None where there is no number.
    """

    def __init__(self, message: str, *, limit: str = "", value: float | None = None, seen: float | None = None) -> None:
        super().__init__(message)
        self.limit = limit
        self.value = value
        self.seen = seen

    @classmethod
    def of(cls, limit: str, value: float, seen: float, what: str) -> LimitExceeded:
        """Build the error for ``what`` being ``seen`` where ``Limits(limit=value)`` stands."""
        return cls(
            f"{what} is {seen}, over the limit of {value}; change it with Limits({limit}=...)",
            limit=limit,
            value=value,
            seen=seen,
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, self.__dict__)


class UnsafePayload(DcoreError):
    """A pickle came from, or was to go to, a peer that is not trusted; nothing was unpickled, imported or run.

    The comm survives.  Attributes:
        field: where in the message it stood, e.g. ``"data['x']"``; empty where unknown.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, self.__dict__)


class SerializationError(DcoreError):
    """This value can't be sent.

    Raised before a byte is written, so the comm survives.  Attributes:
        path: where in the message the value stands, e.g. ``"kwargs['when'][3]"``; empty where unknown.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), self.args, self.__dict__)


class ServerClosing(DcoreError):
    """The server is shutting down and did not start the handler.  Safe to retry elsewhere."""


class Overloaded(DcoreError):
    """The server has too many requests and did not start the handler.  Safe to retry, here later or elsewhere."""


class NotAllowed(DcoreError):
    """The server refuses this op to this peer and did not start the handler.  Retrying won't help."""


class RemoteError(DcoreError):
    """The handler failed over there.

    What a remote handler raised is always an instance of this class; where its type is known it is an instance of that type as
    well (a subclass of both is made and cached), so ``except ValueError:`` works.  The comm survives.

    Attributes:
        type_name: qualified name of the exception's class over there, e.g. ``"builtins.ValueError"``.
        message: ``str()`` of the exception over there.
        remote_traceback: the traceback's text from over there; empty where none was sent.
        original: the unpickled exception itself where there is one, else None.
    """

    type_name: str = ""
    message: str = ""
    remote_traceback: str = ""
    original: BaseException | None = None

    def __str__(self) -> str:
        return self.message or super().__str__()

    def __reduce__(self) -> tuple[Any, ...]:
        # The original may be of a class that does not pickle; all that is shown of it stands in the other attributes.
        return (type(self), self.args, {name: value for name, value in self.__dict__.items() if name != "original"})

    def __setstate__(self, state: dict[str, Any] | None) -> None:
        # A pickle does not keep causes, and the text over there is shown as one.
        self.__dict__.update(state or {})
        if self.remote_traceback and self.__cause__ is None:
            self.__cause__ = RemoteTraceback(self.remote_traceback)


class RemoteTraceback(Exception):
    """The traceback's text from over there, as the ``__cause__`` of an error, so that printing the error shows it.

    It is never raised.
    """

    def __str__(self) -> str:
        return f'\n"""\n{"".join(map(str, self.args)).rstrip()}\n"""'


class UnknownOp(RemoteError):
    """The server has no handler of that name.  (A stock server answers None instead, which can't be told from a result.)"""


class HandlerCancelled(RemoteError):
    """The handler had started and was cancelled; whether its work took effect is unknown.

    Attributes:
        reason: ``"grace over"``, ``"deadline"`` or ``"server cancelled"``.
    """

    reason: str = ""
