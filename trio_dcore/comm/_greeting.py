"""The first message of a comm in each direction: the same from nearly everybody, so it is made and read once and remembered.

Also what stands in for a client's encoder until it has something to say (:class:`JudgingEncoder`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ..abc import CommSettings
from ..errors import AddressError
from ..protocol._compression import AUTO, default_codec
from ..protocol._context import Buffer, DecodeContext, EncodeContext
from ..protocol._handshake import PING_PATIENCE, Negotiated, local_handshake, negotiate
from ..protocol._limits import Limits
from ..protocol._messages import Decoder, Encoder
from ._addressing import get_address_host
from ._base import BaseComm

if TYPE_CHECKING:
    from ._comm import FramedComm

__all__ = ["GREETING_DECODER", "GREETING_ENCODER", "JudgingEncoder", "conclude", "greeting", "offered_codec"]

_ONE_HOST = frozenset({"inproc", "unix", "loopback", "memory"})

# Bytes of a peer's handshake that is worth remembering; ours has some 150.
_USUAL = 512

# What we say: items and bytes of the window, whether the comm is a pool's, the seconds for a ping, and the codec.
_Saying = tuple[int, int, bool, float | None, str | None]


def _no() -> bool:
    return False


class _Undecoded(Decoder):
    """Leaves a message as it came: :func:`conclude` reads it."""

    __slots__ = ()

    def head(self, frame0: Buffer) -> Any:
        return frame0


# A handshake is one map of plain values, whoever it goes to or comes from.
GREETING_ENCODER = Encoder(EncodeContext(allow_pickle=_no))
_DECODER = Decoder(DecodeContext(allow_pickle=_no))
#: For the first message of a comm, which is given to :func:`conclude`.
GREETING_DECODER: Decoder = _Undecoded(DecodeContext(allow_pickle=_no))


def offered_codec(comm: BaseComm) -> str | None:
    """The codec that our handshake names: Dask's choice, none where both ends are on one host, unless one was asked for by name."""
    codec = comm.settings.compression
    if codec != AUTO:
        return codec
    return None if comm.peer.kind in _ONE_HOST or _same_host(comm.local_address, comm.peer_address) else default_codec()


def _same_host(one: str, other: str) -> bool:
    try:
        return get_address_host(one) == get_address_host(other)
    except AddressError:  # the scheme of somebody's own transport, which knows no hosts
        return False


def greeting(settings: CommSettings, codec: str | None = None) -> list[Buffer]:
    """The frames of our handshake, which the caller doesn't change.

    Args:
        settings: those of the comm.
        codec: what it names.
    """
    return _made(_saying(settings, codec))[1]


def conclude(settings: CommSettings, frame0: bytes, codec: str | None = None) -> Negotiated:
    """What we make of a peer's handshake.

    Args:
        settings: those of the comm.
        frame0: the peer's.
        codec: what our handshake names.

    Raises:
        RemoteProtocolError: it is none.
    """
    saying = _saying(settings, codec)
    return _remembered(saying, frame0) if len(frame0) <= _USUAL else _concluded(saying, frame0)


def _saying(settings: CommSettings, codec: str | None) -> _Saying:
    limits = settings.limits
    return limits.window, limits.window_bytes, settings.pooled, _haste(limits) if settings.pooled else None, codec


def _haste(limits: Limits) -> float | None:
    """Seconds in which a client wants its pings answered, if a server has to hurry for that."""
    if limits.ping_interval is None or limits.ping_timeout is None:
        return None
    seconds = min(limits.ping_interval, limits.ping_timeout)
    return seconds if seconds < PING_PATIENCE else None


@functools.lru_cache(maxsize=16)
def _made(saying: _Saying) -> tuple[dict[str, Any], list[Buffer]]:
    window, window_bytes, pooled, ping, codec = saying
    local = local_handshake(compression=codec, window=(window, window_bytes), pooled=pooled, ping=ping)
    return local, GREETING_ENCODER.encode(local)


def _concluded(saying: _Saying, frame0: bytes) -> Negotiated:
    return negotiate(_made(saying)[0], _DECODER.head(frame0))


# Nothing that it holds is changed, and strangers who send others only make it useless.
_remembered = functools.lru_cache(maxsize=16)(_concluded)


class JudgingEncoder(Encoder):
    """Stands in for a client's encoder until its first message, which makes the comm judge its peer."""

    __slots__ = ("_comm",)

    def __init__(self, comm: FramedComm) -> None:
        self._comm = comm

    @property
    def ctx(self) -> EncodeContext:
        return self._comm.judge().ctx

    def encode(self, message: object) -> list[Buffer]:
        return self._comm.judge().encode(message)
