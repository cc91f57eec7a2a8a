"""Payload memory: seen as plain bytes, cut into shards and joined again, copied only where it can't be helped."""

from __future__ import annotations

from collections.abc import Sequence
from pickle import PickleBuffer

from ._context import Buffer
from ._frames import allocate

__all__ = ["flat", "join", "nbytes", "shards"]


def nbytes(buffer: Buffer) -> int:
    """Size of a buffer in bytes, whatever its shape and format."""
    if type(buffer) is bytes or type(buffer) is bytearray:
        return len(buffer)
    return memoryview(buffer).nbytes


def flat(buffer: Buffer) -> Buffer:
    """The buffer's own memory as one-dimensional bytes; a copy only if it is contiguous in neither C nor Fortran order."""
    if type(buffer) is bytes or type(buffer) is bytearray:
        return buffer
    view = memoryview(buffer)
    if view.nbytes == 0:
        return b""  # a view with a zero in its shape can't be cast
    if not view.contiguous:
        return view.tobytes()
    if view.ndim == 1 and view.format == "B":
        return view
    if view.c_contiguous:
        try:
            return view.cast("B")
        except TypeError:
            pass  # a format such as ">i" can't be cast
    # A PickleBuffer takes whatever is contiguous.  But not of a memoryview: CPython 3.11's collector crashes on a cycle that holds a
    # view and PickleBuffer(view).raw(), so it is made of the object behind the view, where the view is of all of it.
    owner = view.obj
    if not isinstance(owner, memoryview) and memoryview(owner).nbytes == view.nbytes:
        return PickleBuffer(owner).raw()
    return view.tobytes(order="A")


def shards(buffer: Buffer, limit: int | None) -> list[Buffer]:
    """Cut a buffer into pieces of at most ``limit`` bytes, between items, without copying (wire document, section 2).

    A single item larger than the limit stays whole.
    """
    data = flat(buffer)
    size = len(data)
    if limit is None or size <= limit:
        return [data]
    itemsize = max(1, memoryview(buffer).itemsize)
    step = max(1, limit // itemsize) * itemsize
    view = memoryview(data)
    return [view[start : start + step] for start in range(0, size, step)]


def join(pieces: Sequence[Buffer]) -> Buffer:
    """Join shards: no copy of a single piece, nor of pieces that lie in one buffer one behind the other."""
    if len(pieces) == 1:
        return pieces[0]
    found = _adjacent(pieces)
    if found is not None:
        return found
    out = allocate(sum(map(nbytes, pieces)))
    position = 0
    for piece in pieces:
        size = nbytes(piece)
        out[position : position + size] = flat(piece)
        position += size
    return out


def _adjacent(pieces: Sequence[Buffer]) -> memoryview | None:
    """One view over all pieces if they are neighbours in the same writable buffer, as a stock receiver lays out its shards."""
    views = [piece for piece in pieces if type(piece) is memoryview and not piece.readonly and piece.nbytes]
    if not views or len(views) != len(pieces) or any(view.obj is not views[0].obj or not view.contiguous for view in views):
        return None
    # Only here: a memoryview doesn't tell where in its buffer it stands, so addresses are compared.
    from ctypes import addressof, c_char

    start = end = addressof(c_char.from_buffer(views[0]))
    for view in views:
        if addressof(c_char.from_buffer(view)) != end:
            return None
        end += view.nbytes
    whole = memoryview(flat(views[0].obj))
    offset = start - addressof(c_char.from_buffer(whole))
    return whole[offset : offset + end - start]
