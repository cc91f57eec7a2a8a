"""Payloads that leave a mark, a file, where something unpickles or imports them."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lz4.block
import msgpack
import numpy as np
import snappy
import zstandard

from trio_dcore.protocol import ToPickle, dumps

__all__ = ["ATTACKS", "FLAT", "attack", "bomb", "plain_error"]

#: Marker, header and payload frames, given the pickle that leaves the mark.
Payload = tuple[str, dict[str, Any], list[bytes]]


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.code = f"open({str(mark)!r}, 'a').close()"

    def __reduce__(self) -> Any:
        return exec, (self.code, {})


def bomb(mark: Path) -> bytes:
    """A pickle that makes the file ``mark`` when it is loaded.  It needs nothing of this package, so it works in any process."""
    return pickle.dumps(_Bomb(mark))


def _family(frames: list[bytes], **more: Any) -> Payload:
    header = {"serializer": "pickle", "writeable": (), **more}
    return "__Serialized__", {"num-sub-frames": len(frames), **header}, frames


def _dask(cls: type | bytes, sub_header: dict[str, Any], frames: list[bytes]) -> Payload:
    name = cls if isinstance(cls, bytes) else pickle.dumps(cls)
    header = {"serializer": "dask", "type": "some.Class", "type-serialized": name, "sub-header": sub_header}
    return "__Serialized__", {**header, "num-sub-frames": len(frames)}, frames


def _array(dtype: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": (1,), "strides": (8,), "writeable": (True,)}


def _collection(kind: str, elements: list[dict[str, Any]], frames: list[bytes]) -> Payload:
    header = {"is-collection": True, "type-serialized": kind, "sub-headers": elements, "frame-lengths": (1,) * len(frames)}
    return "__Serialized__", {**header, "num-sub-frames": len(frames)}, frames


_PICKLE = {"serializer": "pickle", "writeable": ()}
_MASKED = {"data-header": _array((0, "<i8")), "nframes": 1}

#: Every place of a payload where stock Dask calls pickle.loads.
ATTACKS: dict[str, Callable[[bytes], Payload]] = {
    "pickled": lambda p: ("__Pickled__", {"pickled-obj": p, "compression": (), "num-sub-frames": 0}, []),
    "pickle family": lambda p: _family([p]),
    "pickle family with a buffer": lambda p: _family([p, b"x"], writeable=(None,)),
    "in two pieces": lambda p: _family([p[:9], p[9:]], **{"split-num-sub-frames": (2,), "split-offsets": (0,)}),
    "zlib": lambda p: _family([zlib.compress(p)], compression=("zlib",)),
    "lz4": lambda p: _family([lz4.block.compress(p)], compression=("lz4",)),
    "snappy": lambda p: _family([snappy.compress(p)], compression=("snappy",)),
    "zstd": lambda p: _family([zstandard.compress(p)], compression=("zstd",)),
    "in a list": lambda p: _collection("list", [_PICKLE], [p]),
    "in a dict": lambda p: _collection("dict", [{**_PICKLE, "key": "k"}], [p]),
    "in a list in a list": lambda p: _collection("list", [_collection("list", [_PICKLE], [p])[1]], [p]),
    "type-serialized": lambda p: _dask(p, {}, [b""]),
    "type-serialized behind a known one": lambda p: _dask(pickle.dumps(bytes)[:-1] + b"0" + p[2:], {}, [b""]),
    "array of objects": lambda p: _dask(np.ndarray, {"pickle": True}, [p]),
    "array of objects, by a number": lambda p: _dask(np.ndarray, {"pickle": 5, **_array((0, "<i8"))}, [p]),
    "dtype": lambda p: _dask(np.ndarray, _array((1, p)), [b"12345678"]),
    "dtype behind a good one": lambda p: _dask(
        np.ndarray, _array((1, pickle.dumps(np.dtype([("a", "<i8")]))[:-1] + b"0" + p[2:])), [b"12345678"]
    ),
    "dtype of a matrix": lambda p: _dask(np.matrix, _array((1, p)), [b"12345678"]),
    "fill value": lambda p: _dask(np.ma.MaskedArray, {**_MASKED, "fill-value": (True, p)}, [b"12345678"]),
    "dtype of a mask": lambda p: _dask(
        np.ma.MaskedArray, {**_MASKED, "mask-header": _array((1, p)), "fill-value": (False, 0)}, [b"12345678"] * 2
    ),
    "dtype of masked data": lambda p: _dask(
        np.ma.MaskedArray, {"data-header": _array((1, p)), "nframes": 1, "fill-value": (False, 0)}, [b"12345678"]
    ),
}


def attack(name: str, mark: Path, message: dict[str, Any]) -> list[bytes]:
    """The frames of a message in which the attack's payload stands as ``x``."""
    marker, header, frames = ATTACKS[name](bomb(mark))
    return [msgpack.packb({**message, "x": {marker: 1}}), msgpack.packb(header), *frames]


def plain_error(mark: Path) -> dict[str, Callable[[], list[Any]]]:
    """Error replies that hold the pickle, by the three ways in which one can."""
    text = {"status": "uncaught-error", "text": "x", "exception_text": "ValueError('x')", "traceback_text": ""}
    pickled = bomb(mark)
    own = {"code": "error", "type": "some.Error", "message": "x", "pickle": pickled}
    return {
        "exception": lambda: dumps({**text, "exception": pickled, "traceback": pickled}),
        "exception, pickled once more": lambda: dumps({**text, "exception": ToPickle(_Bomb(mark)), "traceback": None}),
        "the extension's": lambda: dumps({**text, "trio-dcore": own}),
    }


#: Enough of them where every one takes a process.
FLAT = ("pickled", "pickle family", "type-serialized", "dtype")
