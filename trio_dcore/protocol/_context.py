"""What the codec must know about the peer and the settings in order to encode or decode one message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Buffer", "DecodeContext", "EncodeContext"]

# bytes, bytearray, a contiguous memoryview of bytes, mmap: what a frame may be.
Buffer = Any

#: ``distributed.comm.shard``: payload frames made by Serialize are cut into pieces of at most this many bytes
#: (wire document, section 2).
SHARD = 64 * 2**20


def _always() -> bool:
    return True


def _unsaid() -> str:
    return ""


@dataclass(slots=True, kw_only=True)
class EncodeContext:
    """How to encode towards one peer.

    Args:
        allow_pickle: asked (once per payload, lazily) whether a pickle may be sent to this peer.
        why: asked, for errors, why it may not.
        pickle_protocol: the negotiated protocol: for the pickle *family* and numpy object/void dtypes only.
        compression: codec name for payload frames, or None.
        serializers: families to try for ``Serialize`` payloads, in order; None means Dask's default ``("dask", "pickle")``.
        extensions: the peer speaks the wire extension, so the safe msgpack extension types may be used.
        shard: size in bytes at which ``Serialize`` payload frames are split; None never splits.
        on_error: what an unserialisable ``Serialize`` payload does: "raise" SerializationError, or "message": send the *error*
            family, which makes the receiver raise TypeError (Dask's ``on_error``).
        offload: bytes of work that one message may take; for one that takes more, encoding raises TooHeavy, before it does any of it
            that is worth a mention.  None is any number.
        forward_untrusted: pass on ``Serialized`` and ``Pickled`` payloads that came from an untrusted peer, also those that take
            a pickle to read; what ``Security(pickle="always")`` means for a sender (security document, section 1).
    """

    allow_pickle: Callable[[], bool] = _always
    why: Callable[[], str] = _unsaid
    pickle_protocol: int = 5
    compression: str | None = None
    serializers: tuple[str, ...] | None = None
    extensions: bool = False
    shard: int | None = SHARD
    on_error: str = "raise"
    offload: int | None = None
    forward_untrusted: bool = False


@dataclass(slots=True, kw_only=True)
class DecodeContext:
    """How to decode what came from one peer.

    The defaults load pickles, which runs whatever code the sender chose, and limit nothing: they are for what this program made
    itself.  For a payload that came from a peer there is :func:`~trio_dcore.protocol.open_serialized`, which knows whom it came from.

    Args:
        allow_pickle: asked (lazily) whether a pickle from this peer may be loaded; by default it may.
        why: asked, for errors, why it may not.
        deserializers: families accepted for ``Serialize`` payloads; None accepts all that are known.
        deserialize: False leaves ``Serialize`` payloads as ``Serialized`` objects (``__Pickled__`` ones are still loaded).
        enum_modules: root packages whose enums may be looked up; a module is never imported for it.
        max_message: bytes that one message may have after decompression; None is no limit.  Asked lazily, like trust.
        max_head: bytes that one header frame may have (same limit as for frame 0).
    """

    allow_pickle: Callable[[], bool] = _always
    why: Callable[[], str] = _unsaid
    deserializers: tuple[str, ...] | None = None
    deserialize: bool = True
    enum_modules: tuple[str, ...] = ("dask", "distributed")
    max_message: Callable[[], int | None] = lambda: None
    max_head: Callable[[], int | None] = lambda: None
