"""Compressed payload frames: sampling on the way out, bounded on the way in (wire document, section 5.6).

A receiver obeys the header, whatever was negotiated, so everything here must stand input that was made to hurt: the size after
decompression is known, or bounded, before memory is taken for it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from ._buffers import flat, nbytes
from ._context import Buffer
from ._errors import DcoreError, LimitExceeded, LocalProtocolError, RemoteProtocolError, SerializationError, TooHeavy

__all__ = [
    "AUTO",
    "CODECS",
    "Budget",
    "check_codec",
    "codec_available",
    "compress_payload",
    "decompress",
    "default_codec",
    "maybe_compress",
]

# Dask's numbers (distributed.protocol.compression.maybe_compress).
_MIN_SIZE = 10_000
_MAX_SIZE = 2**31
_SAMPLE_SIZE = 10_000  # of each
_SAMPLES = 5
_MIN_RATIO = 0.7

# The most that one byte of input can become, by the formats: beyond it a claimed size is a lie, and no memory is taken for it.
_LZ4_RATIO = 255
_SNAPPY_RATIO = 64  # a three-byte element copies up to 64 bytes
_ZSTD_RATIO = 2**15  # four bytes are a block of one byte repeated, at most 128 KiB

# Input given to zlib at a time, and the most that it gives back at once.
_ZLIB_STEP = 64 * 2**10
_ZLIB_PIECE = 256 * 2**10

# Input given to zstd at a time where the frame doesn't say its size: one step gives at most this times the ratio.
_ZSTD_STEP = 256

#: Codec: (module, what to install); zlib is always there.
_MODULES = {
    "lz4": ("lz4.block", "lz4"),
    "snappy": ("snappy", "python-snappy"),
    "zstd": ("zstandard", "zstandard"),
}

#: Codecs whose names may stand in a header.
CODECS = ("lz4", "snappy", "zlib", "zstd")

#: As a setting: a codec that both ends have, towards other machines (``distributed.comm.compression: auto``).
AUTO = "auto"


class Budget:
    """How many bytes a message may still grow to.

    There is one for a whole message, so that many small payloads can't each take the limit.

    Args:
        limit: asked when the first compressed frame turns up: bytes a message may have after decompression, or None.
        used: bytes the message has as it came.
        most: bytes that it may become here; what becomes more is TooHeavy.  None is any number.
    """

    __slots__ = ("_asked", "_limit", "_value", "most", "used")

    def __init__(self, limit: Callable[[], int | None], used: int = 0, most: int | None = None) -> None:
        self._limit = limit
        self.most: int | None = most
        self._asked = False
        self._value: int | None = None
        self.used: int = used

    def room(self, replacing: int) -> int | None:
        """Bytes that what now takes ``replacing`` bytes may become; None: any number."""
        if not self._asked:
            self._value = self._limit()
            self._asked = True
        if self._value is None:
            return None
        return max(0, self._value - self.used + replacing)

    def grow(self, replacing: int, size: int) -> None:
        """Note that ``replacing`` bytes are to become ``size``; to be called before they do.

        Raises: as :meth:`check`.
        """
        self.check(replacing, size)
        self.used += size - replacing

    def check(self, replacing: int, size: int) -> None:
        """Whether ``replacing`` bytes may become so many, or more.

        Raises:
            LimitExceeded: that is too many.
            TooHeavy: that is too many to be made here.
        """
        room = self.room(replacing)
        if room is not None and size > room:
            raise self._exceeded(replacing, size)
        if self.most is not None and self.used - replacing + size > self.most:
            raise TooHeavy

    def _exceeded(self, replacing: int, size: int) -> LimitExceeded:
        """The error for growing beyond the limit."""
        seen = self.used - replacing + size
        return LimitExceeded(
            f"a message is at least {seen} bytes when decompressed, over the limit of {self._value}; "
            "change it with Limits(message=...), or message_trusted for trusted peers",
            limit="message",
            value=self._value,
            seen=seen,
        )


def check_codec(codec: str | None) -> str | None:
    """Return what a ``compression=`` was given, if it is a setting that can be had here.

    Raises:
        ValueError: it is no setting, or the package for it is not installed.
    """
    if codec is None or codec == AUTO:
        return codec
    if not isinstance(codec, str) or codec not in CODECS:
        raise ValueError(f"compression={codec!r}: must be one of {', '.join(CODECS)}, {AUTO!r}, or None")
    if not codec_available(codec):
        package = _MODULES[codec][1]
        raise ValueError(f"compression={codec!r} needs the package {package!r}: pip install {package}")
    return codec


@cache
def default_codec() -> str | None:
    """What ``auto`` stands for here: lz4 if it is installed, else snappy, else none (Dask's choice)."""
    return next(filter(codec_available, ("lz4", "snappy")), None)


def codec_available(codec: str) -> bool:
    """Whether payloads can be compressed with that codec here; False for unknown names too."""
    if codec == "zlib":
        return True
    if codec not in _MODULES:
        return False
    try:
        import_module(_MODULES[codec][0])
    except ImportError:
        return False
    return True


def _module(codec: str) -> Any:
    module, package = _MODULES[codec]
    try:
        return import_module(module)
    except ImportError as exc:
        raise SerializationError(
            f"a payload is compressed with {codec}, which needs the package {package!r}: pip install {package}"
        ) from exc


# -- sending -------------------------------------------------------------------------------------------------------------------


def _compressor(codec: str) -> Callable[[Buffer], bytes]:
    if codec == "zlib":
        return zlib.compress
    if codec not in _MODULES:
        raise LocalProtocolError(f"compression={codec!r} is not known; one of {', '.join(CODECS)}, or None")
    module = _module(codec)
    if codec == "zstd":
        compress: Callable[[Buffer], bytes] = module.ZstdCompressor(level=3, threads=0).compress
    else:
        compress = module.compress
    return compress


def maybe_compress(payload: Buffer, codec: str) -> tuple[str | None, Buffer]:
    """Compress a payload frame if that pays: a sample of it, then all of it, must shrink to 0.7.

    Dask's rule, except that the five places sampled, of 10 000 bytes each, are spread evenly, not at random, so that the same
    payload always gives the same bytes.

    Returns:
        The codec and the compressed bytes, or None and the payload itself.
    """
    compress = _compressor(codec)
    size = nbytes(payload)
    if not _MIN_SIZE <= size <= _MAX_SIZE:
        return None, payload
    view = memoryview(flat(payload))
    each = min(_SAMPLE_SIZE, size // _SAMPLES)  # they don't overlap
    starts = [(size - each) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
    sample = b"".join(view[start : start + each] for start in starts)
    if len(compress(sample)) > _MIN_RATIO * len(sample):
        return None, payload
    compressed = compress(view)
    if len(compressed) > _MIN_RATIO * size:
        return None, payload
    return codec, compressed


def compress_payload(
    frames: list[Buffer], codec: str | None, done: list[str | None] | None = None
) -> tuple[list[str | None], list[Buffer]]:
    """Compress the frames of one payload where it pays.

    Args:
        frames: as transmitted, that is, after sharding.
        codec: name of the codec, or None for no compression.
        done: what each frame is compressed with already; those are left alone.

    Returns:
        The entries for the header's ``compression``, and the frames.
    """
    names: list[str | None] = [None] * len(frames) if done is None else list(done)
    if codec is None:
        return names, frames
    out = list(frames)
    for index, frame in enumerate(frames):
        if names[index] is None:
            names[index], out[index] = maybe_compress(frame, codec)
    return names, out


# -- receiving -----------------------------------------------------------------------------------------------------------------


def decompress(codec: object, frame: Buffer, budget: Budget) -> Buffer:
    """Decompress a payload frame; None and False mean it is not compressed.

    Raises:
        SerializationError: the codec is not known here.
        LimitExceeded: the message would be too large; nothing was allocated for it.
        TooHeavy: it would be too large to be made here.
        RemoteProtocolError: the data is not what the codec makes.
    """
    if codec is None or codec is False:
        return frame
    if not isinstance(codec, str) or codec not in _DECOMPRESSORS:
        raise SerializationError(
            f"a payload is compressed with {codec!r:.100}, which is not known here; known are {', '.join(CODECS)}"
        )
    module = None if codec == "zlib" else _module(codec)
    try:
        return _DECOMPRESSORS[codec](module, frame, budget)
    except DcoreError:
        raise
    except Exception as exc:
        raise RemoteProtocolError(f"a payload frame of {nbytes(frame)} bytes is no valid {codec} data: {exc}") from exc


def _claim(size: int, frame: Buffer, ratio: int, budget: Budget) -> None:
    """Check the size that compressed data says it has, against the limit and against what is possible at all."""
    given = nbytes(frame)
    budget.grow(given, size)
    if size > ratio * given:
        raise RemoteProtocolError(
            f"a payload frame claims to be {size} bytes when decompressed, which its {given} bytes can't become"
        )


def _zlib(module: Any, frame: Buffer, budget: Budget) -> Buffer:
    given = nbytes(frame)
    decompressor = zlib.decompressobj()
    view = memoryview(frame)
    out = bytearray()
    # Bit by bit, since nothing tells how much it becomes: what is over the limit is then noticed at the limit, and not at twice that.
    for start in range(0, given, _ZLIB_STEP):
        piece: Any = view[start : start + _ZLIB_STEP]
        while piece:
            out += decompressor.decompress(piece, _ZLIB_PIECE)
            budget.check(given, len(out))
            piece = decompressor.unconsumed_tail
        if decompressor.eof:
            if start + _ZLIB_STEP < given or decompressor.unused_data:
                raise RemoteProtocolError("a payload frame has bytes behind its zlib data")
            break
    out += decompressor.flush()
    if not decompressor.eof:
        raise RemoteProtocolError("a payload frame of zlib data is cut off")
    budget.grow(given, len(out))
    return out


def _lz4(module: Any, frame: Buffer, budget: Budget) -> Buffer:
    # 4 bytes little-endian size, then one lz4 block.
    _claim(int.from_bytes(memoryview(frame)[:4], "little"), frame, _LZ4_RATIO, budget)
    # A bytearray, so that an array over it may be written to without another copy.
    return module.decompress(frame, return_bytearray=True)


def _snappy(module: Any, frame: Buffer, budget: Budget) -> Buffer:
    size = 0
    for index, byte in enumerate(bytes(memoryview(frame)[:5])):
        size |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            break
    else:
        raise RemoteProtocolError("a payload frame of snappy data doesn't begin with its size")
    _claim(size, frame, _SNAPPY_RATIO, budget)
    return module.decompress(frame)


def _zstd(module: Any, frame: Buffer, budget: Budget) -> Buffer:
    size = module.frame_content_size(frame)
    if size >= 0:
        _claim(size, frame, _ZSTD_RATIO, budget)
        return module.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    given = nbytes(frame)
    decompressor = module.ZstdDecompressor().decompressobj()
    view = memoryview(frame)
    out = bytearray()
    for start in range(0, given, _ZSTD_STEP):
        out += decompressor.decompress(view[start : start + _ZSTD_STEP])
        budget.check(given, len(out))
        if decompressor.eof:
            if start + _ZSTD_STEP < given or decompressor.unused_data:
                raise RemoteProtocolError("a payload frame has bytes behind its zstd data")
            budget.grow(given, len(out))
            return out
    raise RemoteProtocolError("a payload frame of zstd data is cut off")


_DECOMPRESSORS: dict[str, Callable[[Any, Buffer, Budget], Buffer]] = {
    "lz4": _lz4,
    "snappy": _snappy,
    "zlib": _zlib,
    "zstd": _zstd,
}
