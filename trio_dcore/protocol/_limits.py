"""Limits: how much of anything a peer may make us hold, and how long it may take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

KiB = 2**10
MiB = 2**20
GiB = 2**30

__all__ = ["GiB", "KiB", "Limits", "MiB"]

# Fields where None ("off") has no meaning: something must be there for the code to work at all.
_NEVER_OFF = frozenset({"linger", "window", "window_bytes", "error_text"})
# Fields whose twin, with this default, holds for trusted peers.
_TWINS = {"message": 2 * GiB, "head": 64 * MiB, "frames": 4096}


def _default_connections() -> int:
    """min(1024, soft NOFILE - 64): leave the program room for its own files."""
    try:
        import resource  # absent on Windows
    except ImportError:
        return 1024
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1024
    return max(1, min(1024, soft - 64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes in bytes and counts are whole numbers, times are seconds.  None turns a limit off.

    A limit that is hit is a typed error naming the limit and its field, and is refused before the memory is committed.  Where a
    field has a ``*_trusted`` twin, the twin holds for peers that are trusted (see :class:`~trio_dcore.Security`), and can't be the
    smaller one: to raise the field raises a twin that is at its default, any other must be given.

    Args:
        message: a whole message, decompressed size included.  64 MiB is one Dask shard.
        message_trusted: the same from a trusted peer.
        head: frame 0 of a message.  Decoding empty containers costs up to 78 bytes of memory for a byte received.
        head_trusted: the same from a trusted peer.
        frames: frames in one message.
        frames_trusted: the same from a trusted peer.
        connections: open connections of a server; by default min(1024, soft NOFILE - 64).
        handshaking: connections of a server that have not finished their handshake.
        handshake_timeout: seconds for TLS and comm handshake together.
        progress_timeout: seconds of silence allowed inside a message, while somebody reads; without it there is no progress_rate
            either.
        progress_rate: bytes a second; a message must be complete by ``progress_timeout + received / progress_rate``, counted from when
            somebody began to read it, and anew from when the latest ``progress_timeout`` seconds' worth of it had come in time.
        write_stall: seconds for which a peer may take nothing of a handshake, reply or error.
        stream_stall: the same for a handler's own writes, generator items and ``.stream()`` sends, which also may wait so long for
            the other side's window.
        idle: seconds after which an idle comm is closed.
        linger: seconds for the orderly flush when a comm is closed.
        ping_interval: seconds of silence after which one side of a call that takes its time pings the other, where both are trio_dcore.
        ping_timeout: seconds without an answer after which the peer is taken for dead.  So is a process whose event loop a handler
            blocks for that long: mark such a handler with :func:`~trio_dcore.in_thread`.  None for either: no pings from here.
        pool_wait: seconds that a call waits for a free slot of a full pool.
        tcp_user_timeout: seconds for which the peer's system may leave unacknowledged what was sent.  Towards stock Dask peers it is the
            socket option, which ends connections to peers that merely don't read as well; between trio_dcore peers a write that waits
            looks for a sign of life instead (Linux).
        window: items of a stream that may be on their way or unread.
        window_bytes: bytes of a stream that may be on their way or unread.
        requests: handlers alive at once in a server, those still cleaning up included.
        error_text: characters of an error's message or traceback that are sent.
    """

    message: int | None = 64 * MiB
    message_trusted: int | None = _TWINS["message"]
    head: int | None = 1 * MiB
    head_trusted: int | None = _TWINS["head"]
    frames: int | None = 1024
    frames_trusted: int | None = _TWINS["frames"]
    connections: int | None = field(default_factory=_default_connections)
    handshaking: int | None = 64
    handshake_timeout: float | None = 10.0
    progress_timeout: float | None = 30.0
    progress_rate: float | None = 1 * KiB
    write_stall: float | None = 60.0
    stream_stall: float | None = None
    idle: float | None = None
    linger: float = 1.0
    ping_interval: float | None = 10.0
    ping_timeout: float | None = 30.0
    pool_wait: float | None = 30.0
    tcp_user_timeout: float | None = 30.0
    window: int = 16
    window_bytes: int = 1 * MiB
    requests: int | None = None
    error_text: int = 10_000

    def __post_init__(self) -> None:
        for each in fields(self):
            name, value = each.name, getattr(self, each.name)
            if value is None:
                if name in _NEVER_OFF:
                    raise ValueError(f"Limits({name}=None): this limit can't be turned off; give a number")
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Limits({name}={value!r}): must be a number or None")
            if value != value or value < 0 or (value == 0 and name != "linger"):
                raise ValueError(f"Limits({name}={value!r}): must be above 0, or None for no limit")
            if value == math.inf and name in _NEVER_OFF:
                raise ValueError(f"Limits({name}={value!r}): this limit can't be turned off; give a number")
            if isinstance(value, float) and str(each.type).startswith("int"):
                # 1e9 is a fine way to write a size; what is sliced or counted with needs an int all the same.
                if not value.is_integer():
                    raise ValueError(f"Limits({name}={value!r}): must be a whole number, or None for no limit")
                object.__setattr__(self, name, int(value))
        for name, default in _TWINS.items():
            self._check_twin(name, default)

    def _check_twin(self, name: str, default: int) -> None:
        """What a stranger may do, a trusted peer may do as well."""
        twin = f"{name}_trusted"
        value, trusted = getattr(self, name), getattr(self, twin)
        if trusted is None or (value is not None and value <= trusted):
            return
        if trusted != default:
            raise ValueError(f"Limits({name}={value}, {twin}={trusted}): a trusted peer can't be allowed less than a stranger")
        object.__setattr__(self, twin, value)
