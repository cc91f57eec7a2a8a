"""numpy arrays in the ``dask`` family (wire document, section 5.5).

An array travels as a small header and one frame: its own memory on sending, an array over the received memory on receiving.
Every number of a header is checked against the size of the frame, in Python's integers, before numpy sees it.

numpy is imported when the first array is written or read.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from ._buffers import flat, nbytes
from ._context import Buffer, DecodeContext, EncodeContext
from ._errors import RemoteProtocolError, SerializationError, UnsafePayload
from ._numpy_dtypes import Unreadable, plain_dtype, read_dtype, read_scalar
from ._pickle import dump, pickle_loads
from ._registry import Handler, add_builtin

if TYPE_CHECKING:
    import numpy as np

__all__ = ["bare_numpy"]

Header = dict[str, Any]

# numpy.dtype.flags: items that are, or point to, Python objects or memory outside of the array (NPY_ITEM_HASOBJECT,
# NPY_LIST_PICKLE, NPY_ITEM_IS_POINTER).  The raw bytes of such arrays mean nothing elsewhere, and would be pointers here.
_NOT_RAW = 0x01 | 0x02 | 0x04
_RAW_KINDS = frozenset("biufcSUVMm")
_MAX_DIMENSIONS = 64
_MAX_SIZE = 2**63 - 1
_MAX_EMPTY_ITEM = 2**20


def bare_numpy(obj: object) -> bool:
    """Whether a bare value in a message is a numpy array that is sent as the ``dask`` family, where stock Dask would pickle it.

    Exact classes only: a subclass that this package doesn't know would arrive as a plain array.  Never imports numpy.
    """
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return False
    kind = type(obj)
    if kind is numpy.ndarray or kind is numpy.matrix:
        return _is_raw(obj.dtype)  # type: ignore[attr-defined]
    if kind.__name__ == "MaskedArray" and kind is numpy.ma.MaskedArray:
        # The dask family doesn't carry a hard mask.
        return _is_raw(obj.dtype) and not obj.hardmask  # type: ignore[attr-defined]
    return False


def _is_raw(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in _RAW_KINDS and not dtype.flags & _NOT_RAW and dtype.itemsize > 0


# -- sending -------------------------------------------------------------------------------------------------------------------


def _dump_array(
    array: np.ndarray[Any, Any], ctx: EncodeContext, dtype_protocol: int | None = None
) -> tuple[Header, list[Buffer]]:
    import numpy as np

    dtype = array.dtype
    if not _is_raw(dtype):
        if not ctx.allow_pickle():
            raise UnsafePayload(f"a numpy array of dtype {dtype} travels as a pickle, and this peer is not trusted with one")
        pickled, buffers = dump(array, ctx.pickle_protocol)
        return {"pickle": True}, [pickled, *buffers]
    what = (1, _dtype_pickle(dtype, ctx, dtype_protocol or ctx.pickle_protocol)) if dtype.kind == "V" else (0, dtype.str)

    base: np.ndarray[Any, Any] = np.asarray(array)
    strides: tuple[int, ...] = base.strides
    broadcast_to = None
    writeable = base.flags.writeable
    if 0 in strides:
        # Of an axis that repeats one item, one item is sent.
        broadcast_to = base.shape
        base = base[tuple(slice(None) if stride else slice(1) for stride in strides)]
    if base.flags.c_contiguous or base.flags.f_contiguous:
        strides = base.strides
        data: np.ndarray[Any, Any] = base.ravel(order="K")
    else:
        base = np.ascontiguousarray(base)
        if broadcast_to is None:
            # Dask has it so: what was copied may be written to.
            strides = base.strides
            writeable = True
        else:
            strides = tuple(new if old else 0 for old, new in zip(strides, base.strides, strict=True))
        data = base.ravel()
    header: Header = {"dtype": what, "shape": base.shape, "strides": strides, "writeable": [writeable]}
    if broadcast_to is not None:
        header["broadcast_to"] = broadcast_to
    if dtype.fields or dtype.itemsize > 8 or dtype.kind in "Mm":
        # Items without a buffer format, or larger than a shard should be aligned to.
        data = data.view(f"u{math.gcd(dtype.itemsize, 8)}")
    return header, [data.data]


def _dtype_pickle(dtype: np.dtype[Any], ctx: EncodeContext, protocol: int) -> bytes:
    import pickle

    try:
        # Only the standard pickle: cloudpickle takes long to fail, and dtypes don't gain by it.
        data = pickle.dumps(dtype, protocol)
    except Exception as exc:
        raise SerializationError(f"the numpy dtype {dtype} can't be pickled: {exc}") from exc
    if not ctx.allow_pickle():
        try:
            read_dtype(data)
        except Unreadable as exc:
            raise UnsafePayload(
                f"the numpy dtype {dtype} travels as a pickle, and this peer is not trusted with one: {exc}"
            ) from exc
    return data


def _dump_matrix(matrix: np.ndarray[Any, Any], ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    header, frames = _dump_array(matrix, ctx)
    header["matrix"] = True
    return header, frames


def _dump_masked(array: np.ma.MaskedArray[Any, Any], ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    import numpy as np

    # Stock doesn't pass the negotiated protocol on here, and pickle's default is 4.
    data_header, frames = _dump_array(array.data, ctx, dtype_protocol=4)
    header: Header = {"data-header": data_header, "nframes": len(frames)}
    if array.mask is not np.ma.nomask:
        mask = np.asarray(array.mask)
        if mask.dtype.names is not None:
            mask = np.ascontiguousarray(mask).reshape(mask.shape)  # see _load_masked
        header["mask-header"], mask_frames = _dump_array(mask, ctx, dtype_protocol=4)
        frames += mask_frames
    fill: Any = array.fill_value
    if isinstance(fill, (np.integer, np.floating, np.bool_)) and type(fill.item()) in (int, float, bool):
        header["fill-value"] = (False, fill.item())
    else:
        pickled = dump(fill, ctx.pickle_protocol)[0]
        if not ctx.allow_pickle():
            try:
                read_scalar(pickled)
            except Unreadable as exc:
                raise UnsafePayload(
                    f"a masked array's fill value travels as a pickle, and this peer is not trusted with one: {exc}"
                ) from exc
        header["fill-value"] = (True, pickled)
    return header, frames


def _dump_masked_constant(value: object, ctx: EncodeContext) -> tuple[Header, list[Buffer]]:
    return {}, []


# -- receiving -----------------------------------------------------------------------------------------------------------------


def _wrong(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"the header of a numpy array {what}")


def _integers(header: Header, key: str, *, negative: bool = False) -> list[int]:
    value = header.get(key)
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMENSIONS:
        raise _wrong(f"has no proper {key!r}")
    for number in value:
        if type(number) is not int or not -_MAX_SIZE <= number <= _MAX_SIZE or (number < 0 and not negative):
            raise _wrong(f"has {number!r:.100} in {key!r}")
    return list(value)


def _load_array(header: Header, frames: list[Buffer], ctx: DecodeContext) -> Any:
    import numpy as np

    # Truth counts, not identity with True: that is how stock reads it, and a check for trust must not read a header otherwise.
    if header.get("pickle"):
        if not frames:
            raise _wrong("comes without a frame")
        return _unpickle(frames[0], frames[1:], ctx, "a numpy array of Python objects")
    if len(frames) != 1:
        raise _wrong(f"comes with {len(frames)} frames, not one")
    writeable = header.get("writeable")
    if not isinstance(writeable, (tuple, list)) or len(writeable) != 1:
        raise _wrong("has no proper 'writeable'")
    dtype = _load_dtype(header, ctx)
    frame = flat(frames[0])
    shape, strides = _layout(header, dtype.itemsize, len(frame))
    if writeable[0] and memoryview(frame).readonly:
        # The payload is copied, not the array, so that an array that repeats its items stays small.
        frame = np.frombuffer(frame, np.uint8).copy() if len(frame) else bytearray()
    try:
        array = np.ndarray(shape, dtype, buffer=frame, strides=strides)
    except (ValueError, TypeError) as exc:
        raise _wrong(f"can't be used: {exc}") from exc
    if not writeable[0]:
        array.flags.writeable = False
    if header.get("matrix"):
        if array.ndim != 2:
            raise _wrong(f"tells of a matrix of {array.ndim} dimensions")
        # A view, since the constructor warns against its own class.
        return array.view(np.matrix)
    return array


def _load_dtype(header: Header, ctx: DecodeContext) -> np.dtype[Any]:
    import numpy as np

    what = header.get("dtype")
    if not isinstance(what, (tuple, list)) or len(what) != 2:
        raise _wrong("has no proper 'dtype'")
    pickled, text = what
    if not pickled:
        try:
            return plain_dtype(text)
        except Unreadable as exc:
            raise _wrong(f"has a bad dtype: {exc}") from exc
    dtype: Any
    try:
        dtype = read_dtype(text)
    except Unreadable as exc:
        dtype = _unpickle(text, (), ctx, "a numpy dtype", exc)
    if (
        not isinstance(dtype, np.dtype)
        or dtype.hasobject
        or dtype.flags & _NOT_RAW
        or dtype.itemsize == 0
        or dtype.subdtype is not None
    ):
        raise _wrong("has a dtype that an array of raw bytes can't have")
    return dtype


def _layout(header: Header, itemsize: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides, checked against the ``size`` bytes that there are."""
    # As stock does it: an empty broadcast_to counts as none.
    shape = _integers(header, "broadcast_to" if header.get("broadcast_to") else "shape")
    strides = _integers(header, "strides", negative=True)
    if len(shape) != len(strides):
        raise _wrong(f"has {len(shape)} dimensions and {len(strides)} strides")
    if math.prod(max(1, length) for length in shape) * itemsize > _MAX_SIZE:
        raise _wrong("has a shape too large for any memory")
    if 0 in shape:
        return tuple(shape), (0,) * len(shape)
    end = itemsize
    for index, (length, stride) in enumerate(zip(shape, strides, strict=True)):
        if length == 1:
            # Never used, and numpy leaves odd values there: a reversed axis of one item has a negative one.
            if stride < 0:
                strides[index] = itemsize
        elif stride < 0:
            raise _wrong("has a negative stride")
        else:
            end += (length - 1) * stride
    if end > size:
        raise _wrong(f"needs {end} bytes where {size} came")
    # Axes that repeat one item are sent as such; items that overlap otherwise are no peer's doing, and would let a few bytes become
    # any number in whoever copies the array.
    if itemsize * math.prod(length for length, stride in zip(shape, strides, strict=True) if stride) > size:
        raise _wrong("has items that overlap")
    return tuple(shape), tuple(strides)


def _unpickle(data: Any, buffers: Any, ctx: DecodeContext, what: str, cause: Exception | None = None) -> Any:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise _wrong(f"holds {what} that is no pickle")
    if not ctx.allow_pickle():
        raise UnsafePayload(f"{what} came as a pickle from a peer that is not trusted; it was not loaded") from cause
    return pickle_loads(data, buffers)


def _load_masked(header: Header, frames: list[Buffer], ctx: DecodeContext) -> Any:
    import numpy as np

    count = header.get("nframes")
    data_header = header.get("data-header")
    fill = header.get("fill-value")
    if type(count) is not int or not 0 <= count <= len(frames) or not isinstance(data_header, dict):
        raise _wrong("has no proper 'data-header' and 'nframes'")
    if not isinstance(fill, (tuple, list)) or len(fill) != 2:
        raise _wrong("has no proper 'fill-value'")
    data = _load_array(data_header, frames[:count], ctx)
    mask: Any = np.ma.nomask
    if "mask-header" in header:
        mask_header = header["mask-header"]
        if not isinstance(mask_header, dict):
            raise _wrong("has no proper 'mask-header'")
        mask = _load_array(mask_header, frames[count:], ctx)
        if not isinstance(data, np.ndarray) or not isinstance(mask, np.ndarray) or mask.shape != data.shape:
            raise _wrong("has a mask of another shape than its data")
        if mask.dtype != np.ma.make_mask_descr(data.dtype):
            raise _wrong("has a mask that isn't one of its data's type")
        if mask.dtype.names is not None and mask.nbytes > sum(map(nbytes, frames[count:])):
            # numpy copies such a mask item by item, and a header may tell of any number that repeat one.
            raise _wrong("has a mask of records that repeats its items")
    if isinstance(data, np.ndarray) and not data.size and data.dtype.itemsize > _MAX_EMPTY_ITEM:
        # No such item came, and yet one would be made as the fill value.
        raise _wrong(f"tells of items of {data.dtype.itemsize} bytes, and has none")
    pickled, value = fill
    if pickled:
        try:
            value = read_scalar(value)
        except Unreadable as exc:
            value = _unpickle(value, (), ctx, "a masked array's fill value", exc)
    try:
        return np.ma.MaskedArray(data, mask=mask, fill_value=value)
    except Exception as exc:  # MaskError, and whatever a fill value of the wrong kind leads to
        raise _wrong(f"of a masked array can't be used: {exc}") from exc


def _load_masked_constant(header: Header, frames: list[Buffer], ctx: DecodeContext) -> Any:
    import numpy as np

    return np.ma.masked


# -- would a pickle be loaded? -------------------------------------------------------------------------------------------------


def _array_needs_pickle(header: Header) -> bool:
    if header.get("pickle"):
        return True
    what = header.get("dtype")
    if not isinstance(what, (tuple, list)) or len(what) != 2:
        return True
    try:
        (read_dtype if what[0] else plain_dtype)(what[1])
    except (Unreadable, ImportError):
        return True
    return False


def _masked_needs_pickle(header: Header) -> bool:
    parts = [header.get("data-header")]
    if "mask-header" in header:
        parts.append(header["mask-header"])
    if not all(isinstance(part, dict) and not _array_needs_pickle(part) for part in parts):
        return True
    fill = header.get("fill-value")
    if not isinstance(fill, (tuple, list)) or len(fill) != 2:
        return True
    if not fill[0]:
        return False
    try:
        read_scalar(fill[1])
    except (Unreadable, ImportError):
        return True
    return False


def _never(header: Header) -> bool:
    return False


_ARRAY = Handler(_dump_array, _load_array, _array_needs_pickle)

add_builtin(
    _ARRAY,
    "numpy.ndarray",
    # Subclasses that stock sends as what they view (its dispatch looks at base classes), under their names in numpy 1 and 2.
    "numpy.memmap",
    "numpy.rec.recarray",
    "numpy.recarray",
)
add_builtin(Handler(_dump_matrix, _load_array, _array_needs_pickle), "numpy.matrix")
add_builtin(Handler(_dump_masked, _load_masked, _masked_needs_pickle), "numpy.ma.MaskedArray", "numpy.ma.core.MaskedArray")
add_builtin(
    Handler(_dump_masked_constant, _load_masked_constant, _never), "numpy.ma.MaskedConstant", "numpy.ma.core.MaskedConstant"
)
