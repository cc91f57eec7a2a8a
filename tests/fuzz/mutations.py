"""Ways to make valid input invalid, each a small step that can be told from a few numbers: so what fails can be shrunk.

Every function takes numbers without a range and reduces them to one that fits, so that whoever chooses them, hypothesis or a
coverage-guided fuzzer, needs to know nothing of the input.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

__all__ = ["BYTE_STEPS", "FRAME_STEPS", "WEIRD", "mutate_bytes", "mutate_frames"]

Frames = list[bytes]
Step = tuple[int, int, int]  # which one, where, with what

_NUMBERS = (
    0,
    1,
    7,
    8,
    15,
    16,
    17,
    24,
    255,
    2**16,
    2**20 + 1,
    2**26 + 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


#: Values to stand where another one stood: the ends of ranges, wrong types, the names that mean something, extension values.
WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, -2, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 10_000, 70_000),
    *(0.0, -0.0, 1.5, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "x", "x" * 300, "\0", "\x1b[31m", "é€😀", b"", b"x", b"\xff" * 300),
    *([], {}, [1], [[]], {"a": 1}, {1: 2}, {None: None}, [None] * 20, list(range(40)), _nested(60), _nested(400)),
    *("lz4", "zlib", "snappy", "zstd", "dask", "pickle", "msgpack", "error", "cuda", "list", "dict", "set", "tuple"),
    *("<i8", "<i0", "|O", "|V8", "<U1", "<M8[ns]", "<M8[0s]", "<f16", "|S2147483647", ">c16", "|T16", "<i8,<i8"),
    *(
        "d",
        "u",
        "w",
        "q",
        "@i",
        "P",
        "e",
        "builtins.KeyError",
        "builtins.UnicodeDecodeError",
        "builtins.SyntaxError",
        "uncaught-error",
    ),
    *({"__Serialized__": 1}, {"__Pickled__": 1}, {"__Serialized__": 0}, {"__Pickled__": 0}, {"__Set__": True, "as-list": [1, 1]}),
    *(
        {"__Set__": True, "as-list": [[], {}]},
        {"__Set__": True, "as-list": [{"a": 1}]},
        {"__Serialized__": True, "data": [{}, [b""]]},
    ),
    {"__Enum__": True, "name": "running", "__module__": "distributed.core", "__name__": "Status"},
    {"__Enum__": True, "name": "mro", "__module__": "dask", "__name__": "__class__"},
    *(msgpack.ExtType(code, b"") for code in (0, 5, 127)),
    *(msgpack.ExtType(5, b"\0" * 16), msgpack.Timestamp(2**62, 5)),
    b"\x80\x05\x95\x0b\0\0\0\0\0\0\0\x8c\x05numpy\x8c\x07ndarray\x93.",
    b"\x80\x04\x95\x14\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94\x8c\x03set\x94\x93\x94.",
    b"\x80\x04K\x01.",
    b"\x80\x04].",
)
# Packed by hand: their codes are not for users.
_EXTENSIONS = tuple(
    msgpack.packb(msgpack.ExtType._make((code, payload)))
    for code in (*range(-73, -63), -80, -81, -1, -2, -128)
    for payload in (b"", b"\0", b"\1" * 4, b"\xff" * 12, b"1E+999999", b"\x03<i8" + b"\1" * 8, b"\x07<m8[0s]" + b"\0" * 8)
)
_PACKED = tuple(msgpack.packb(value) for value in WEIRD) + _EXTENSIONS


# -- byte streams ----------------------------------------------------------------------------------------------------------------


def _flip(data: bytearray, where: int, what: int) -> None:
    data[where] ^= 1 << what % 8


def _set(data: bytearray, where: int, what: int) -> None:
    data[where] = what % 256


def _cut(data: bytearray, where: int, what: int) -> None:
    del data[where:]


def _remove(data: bytearray, where: int, what: int) -> None:
    del data[where : where + 1 + what % 64]


def _double(data: bytearray, where: int, what: int) -> None:
    piece = data[where : where + 1 + what % 200]
    data[where:where] = piece * (1 + what % 3)


def _insert(data: bytearray, where: int, what: int) -> None:
    data[where:where] = _PACKED[what % len(_PACKED)]


def _number(data: bytearray, where: int, what: int) -> None:
    """A length prefix, if it stands where one does; all of them stand at multiples of 8 from the start of a message."""
    where -= where % 8
    old = int.from_bytes(data[where : where + 8], "little")
    new = (*_NUMBERS, old + 1, old - 1, old + 8, old * 2)[what % (len(_NUMBERS) + 4)] % 2**64
    data[where : where + 8] = struct.pack("<Q", new)


def _move(data: bytearray, where: int, what: int) -> None:
    piece = data[where : where + 1 + what % 100]
    del data[where : where + len(piece)]
    target = what % (len(data) + 1)
    data[target:target] = piece


BYTE_STEPS: tuple[Callable[[bytearray, int, int], None], ...] = (_flip, _set, _cut, _remove, _double, _insert, _number, _move)


def mutate_bytes(data: bytes, steps: Sequence[Step], start: int = 0) -> bytes:
    """Apply steps to a byte stream from ``start`` on."""
    out = bytearray(data)
    for kind, where, what in steps:
        if len(out) > start:
            BYTE_STEPS[kind % len(BYTE_STEPS)](out, start + where % (len(out) - start), what)
    return bytes(out)


# -- messages --------------------------------------------------------------------------------------------------------------------


def _frame(frames: Frames, where: int, what: int) -> None:
    """A step inside one frame."""
    index = where % len(frames)
    frames[index] = mutate_bytes(frames[index], [(what, where // len(frames), what // len(BYTE_STEPS))])


def _drop(frames: Frames, where: int, what: int) -> None:
    del frames[where % len(frames)]


def _again(frames: Frames, where: int, what: int) -> None:
    frames.insert(what % (len(frames) + 1), frames[where % len(frames)])


def _swap(frames: Frames, where: int, what: int) -> None:
    a, b = where % len(frames), what % len(frames)
    frames[a], frames[b] = frames[b], frames[a]


def _replace_value(frames: Frames, where: int, what: int) -> None:
    """Another value in the place of one in a frame that is msgpack; where it is none, another frame."""
    index = where % len(frames)
    packed = _PACKED[what % len(_PACKED)]
    spans = _spans(frames[index])
    if not spans:
        frames[index] = packed
        return
    start, end = spans[where // len(frames) % len(spans)]
    frames[index] = frames[index][:start] + packed + frames[index][end:]


def _replace_by_own(frames: Frames, where: int, what: int) -> None:
    """A value of one of the frames in the place of another one."""
    source = frames[what % len(frames)]
    spans = _spans(source)
    index = where % len(frames)
    places = _spans(frames[index])
    if spans and places:
        start, end = spans[what // len(frames) % len(spans)]
        first, last = places[where // len(frames) % len(places)]
        frames[index] = frames[index][:first] + source[start:end] + frames[index][last:]


FRAME_STEPS: tuple[Callable[[Frames, int, int], None], ...] = (
    _replace_value,
    _replace_value,
    _replace_value,
    _replace_by_own,
    _frame,
    _drop,
    _again,
    _swap,
)


def mutate_frames(frames: Frames, steps: Sequence[Step]) -> Frames:
    """Apply steps to the frames of a message; one frame at least is left."""
    out = list(frames)
    for kind, where, what in steps:
        FRAME_STEPS[kind % len(FRAME_STEPS)](out, where, what)
        if not out:
            out = [b"\xc0"]
    return out


def _spans(data: bytes) -> list[tuple[int, int]]:
    """Where each value in packed data starts and ends, containers included; empty if it isn't one valid value."""
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(data)), strict_map_key=False)
    unpacker.feed(data)
    spans: list[tuple[int, int]] = []
    # For each open container the values that are still to come and its place in spans.
    open_ones: list[list[int]] = []
    try:
        while len(spans) < 5000:
            start = unpacker.tell()
            kind = data[start]
            count = 0
            if 0x90 <= kind <= 0x9F or kind in (0xDC, 0xDD):
                count = unpacker.read_array_header()
            elif 0x80 <= kind <= 0x8F or kind in (0xDE, 0xDF):
                count = 2 * unpacker.read_map_header()
            else:
                unpacker.skip()
            spans.append((start, unpacker.tell()))
            open_ones.append([count, len(spans) - 1])
            while open_ones and open_ones[-1][0] == 0:
                _, number = open_ones.pop()
                spans[number] = spans[number][0], unpacker.tell()
            if not open_ones:
                return spans if unpacker.tell() == len(data) else []
            open_ones[-1][0] -= 1
    except (ValueError, IndexError, msgpack.OutOfData):
        pass
    return []
