"""Reading numpy dtypes and scalars that came as pickles, without unpickling (wire document, section 5.5).

Dask sends a structured dtype as ``pickle(dtype)``, and the fill value of some masked arrays as ``pickle(scalar)``.  So that
such arrays travel without trust, the pickles are read by a machine that knows just the opcodes and names that numpy emits, and
that builds the dtype through numpy's public constructor from checked parts; ``dtype.__setstate__`` never sees what a stranger
wrote.

What the machine doesn't know is :class:`Unreadable`: dtypes with metadata, with Python objects, from other packages.  Those
take a real pickle, and so trust.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Unreadable", "plain_dtype", "read_dtype", "read_scalar"]

# A dtype of a few hundred fields is below 64 KiB.
_MAX_PICKLE = 64 * 1024
# Fields and sub-arrays counted as often as they occur: the memo lets a short pickle describe a dtype of 2**n fields, over which
# numpy's own functions (repr, hash, ==) would walk for ever.
_MAX_WEIGHT = 10_000
_MAX_DEPTH = 32
_MAX_ITEMSIZE = 2**31 - 1  # numpy's own limit for what a constructor takes
_MAX_SUBARRAY_DIMENSIONS = 32

# bool, integers, floats, complex, bytes, str, void, datetime, timedelta; never O (pointers) or T.  numpy would take a unit of 0
# seconds, and divide by it.
_DTYPE = re.compile(r"[<>|=]?([biufcSUVMm])(\d{1,9})(\[([1-9]\d{0,8})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?")
_ALIGNED = 0x80  # the flag bit of a dtype made with align=True
# The bits for items that are Python objects or pointers (NPY_ITEM_HASOBJECT, NPY_LIST_PICKLE, NPY_ITEM_IS_POINTER).
_NOT_RAW = 0x01 | 0x02 | 0x04
_ALIGNMENTS = frozenset({-1, 1, 2, 4, 8, 16, 32, 64})


class Unreadable(Exception):
    """The pickle holds something that this reader doesn't know.  Internal: the callers turn it into a typed error."""


def plain_dtype(text: object) -> np.dtype[Any]:
    """The dtype of a typestring such as ``"<i8"`` or ``"<M8[ns]"``; no objects, nothing of size 0.

    Raises:
        Unreadable: it is no such string, or this numpy doesn't know it.
    """
    return _typestring(text, empty=False)


def _typestring(text: object, *, empty: bool) -> np.dtype[Any]:
    import numpy as np

    match = _DTYPE.fullmatch(text) if isinstance(text, str) else None
    if match is None or (match[3] and match[1] not in "Mm"):
        raise Unreadable(f"{text!r:.100} is no dtype that can be read")
    try:
        dtype = np.dtype(match[0])
    except (TypeError, ValueError) as exc:
        raise Unreadable(f"{text!r:.100} is no dtype that can be read: {exc}") from exc
    if dtype.itemsize == 0 and not empty:
        raise Unreadable(f"{text!r:.100} is a dtype of size 0")
    return dtype


@dataclass(slots=True)
class _Global:
    name: str


_GLOBALS = {
    ("numpy", "dtype"): _Global("dtype"),
    ("numpy", "record"): _Global("record"),
    ("numpy.core.multiarray", "scalar"): _Global("scalar"),  # numpy 1
    ("numpy._core.multiarray", "scalar"): _Global("scalar"),
}


@dataclass(slots=True)
class _Node:
    """A dtype under construction: made by REDUCE, finished by BUILD."""

    text: str | _Global
    dtype: np.dtype[Any] | None = None
    weight: int = 1
    depth: int = 1


_MARK = object()


def read_dtype(data: object) -> np.dtype[Any]:
    """Read ``pickle(dtype)``.

    Raises:
        Unreadable: it is anything else than the pickle of a dtype without objects and metadata.
    """
    value = _run(data)
    if not isinstance(value, _Node):
        raise Unreadable("the pickle holds no dtype")
    return _finished(value)


def read_scalar(data: object) -> Any:
    """Read ``pickle(numpy scalar)``.

    Raises:
        Unreadable: it is anything else than the pickle of a numpy scalar without objects.
    """
    import numpy as np

    value = _run(data)
    if not isinstance(value, np.generic):
        raise Unreadable("the pickle holds no numpy scalar")
    return value


def _finished(node: object) -> np.dtype[Any]:
    if not isinstance(node, _Node) or node.dtype is None:
        raise Unreadable("a dtype is used before it is complete")
    return node.dtype


def _run(data: object) -> Any:
    """Run a pickle on a machine that has the opcodes of numpy's own dtype and scalar pickles, protocols 4 and 5."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise Unreadable("no bytes")
    code = bytes(data)
    if len(code) > _MAX_PICKLE:
        raise Unreadable(f"a pickle of {len(code)} bytes is too long for a dtype")
    try:
        return _Machine(code).run()
    except (IndexError, UnicodeDecodeError, ValueError, TypeError, OverflowError) as exc:
        # Cut off, stack too short, bad text, or numpy's constructor says no.
        raise Unreadable(f"the pickle is damaged: {exc}") from exc


class _Machine:
    __slots__ = ("code", "fields", "memo", "position", "stack")

    def __init__(self, code: bytes) -> None:
        self.code = code
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.fields = 0

    def take(self, size: int) -> bytes:
        piece = self.code[self.position : self.position + size]
        if len(piece) != size:
            raise Unreadable("the pickle is cut off")
        self.position += size
        return piece

    def number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def marked(self) -> list[Any]:
        """Pop what was pushed since the last mark."""
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise Unreadable("the pickle has no mark where one is needed")

    def tuple_of(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError("stack too short")
        items = tuple(self.stack[len(self.stack) - size :])
        del self.stack[len(self.stack) - size :]
        self.stack.append(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise Unreadable("the pickle sets items of something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise Unreadable("the pickle has a dict key that is no text")
            target[key] = value

    def run(self) -> Any:
        code, stack, memo = self.code, self.stack, self.memo
        if code[:2] not in (b"\x80\x04", b"\x80\x05"):
            raise Unreadable("not a pickle of protocol 4 or 5")
        self.position = 2
        while True:
            match self.take(1):
                case b"\x95":  # FRAME
                    self.take(8)
                case b"\x8c":  # SHORT_BINUNICODE
                    stack.append(self.take(self.number(1)).decode("utf-8"))
                case b"X":  # BINUNICODE
                    stack.append(self.take(self.number(4)).decode("utf-8"))
                case b"C":  # SHORT_BINBYTES
                    stack.append(self.take(self.number(1)))
                case b"B":  # BINBYTES
                    stack.append(self.take(self.number(4)))
                case b"\x94":  # MEMOIZE
                    memo[len(memo)] = stack[-1]
                case b"h":  # BINGET
                    stack.append(self.recall(self.number(1)))
                case b"j":  # LONG_BINGET
                    stack.append(self.recall(self.number(4)))
                case b"\x93":  # STACK_GLOBAL
                    name, module = stack.pop(), stack.pop()
                    if type(name) is not str or type(module) is not str:
                        # Not shown: a short pickle describes a tuple whose repr() has no end.
                        raise Unreadable("the pickle refers to something that has no name")
                    if (module, name) not in _GLOBALS:
                        raise Unreadable(f"the pickle refers to {module!r:.100}, {name!r:.100}")
                    stack.append(_GLOBALS[module, name])
                case b"(":  # MARK
                    stack.append(_MARK)
                case b")":  # EMPTY_TUPLE
                    stack.append(())
                case b"\x85":  # TUPLE1
                    self.tuple_of(1)
                case b"\x86":  # TUPLE2
                    self.tuple_of(2)
                case b"\x87":  # TUPLE3
                    self.tuple_of(3)
                case b"t":  # TUPLE
                    stack.append(tuple(self.marked()))
                case b"}":  # EMPTY_DICT
                    stack.append({})
                case b"s":  # SETITEM
                    value, key = stack.pop(), stack.pop()
                    self.set_items([key, value])
                case b"u":  # SETITEMS
                    self.set_items(self.marked())
                case b"N":  # NONE
                    stack.append(None)
                case b"\x88":  # NEWTRUE
                    stack.append(True)
                case b"\x89":  # NEWFALSE
                    stack.append(False)
                case b"J":  # BININT
                    stack.append(self.number(4, signed=True))
                case b"K":  # BININT1
                    stack.append(self.number(1))
                case b"M":  # BININT2
                    stack.append(self.number(2))
                case b"R":  # REDUCE
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(_reduce(function, arguments))
                case b"b":  # BUILD
                    state = stack.pop()
                    self.count(_build(stack[-1], state))
                case b".":  # STOP
                    if len(stack) != 1 or self.position != len(code):
                        raise Unreadable("the pickle has more in it than one value")
                    return stack[0]
                case other:
                    raise Unreadable(f"the pickle has an opcode, {other!r}, that numpy doesn't write for a dtype")

    def count(self, dtype: np.dtype[Any]) -> None:
        """Of all dtypes that are built: a few bytes recall the fields of another one, so a short pickle could build thousands."""
        self.fields += len(dtype.names or ())
        if self.fields > _MAX_WEIGHT:
            raise Unreadable("the pickle's dtypes have too many fields")

    def recall(self, index: int) -> Any:
        if index not in self.memo:
            raise Unreadable("the pickle recalls what it didn't memorize")
        return self.memo[index]


def _reduce(function: object, arguments: object) -> Any:
    if not isinstance(function, _Global) or type(arguments) is not tuple:
        raise Unreadable("the pickle calls something else than numpy's constructors")
    if function.name == "dtype":
        if len(arguments) != 3 or arguments[1] is not False or arguments[2] is not True:
            raise Unreadable("the pickle calls numpy.dtype in an unknown way")
        text = arguments[0]
        if type(text) is not str and not (isinstance(text, _Global) and text.name == "record"):
            raise Unreadable("the pickle calls numpy.dtype in an unknown way")
        return _Node(text)
    if function.name == "scalar" and len(arguments) == 2:
        return _scalar(*arguments)
    raise Unreadable("the pickle calls something else than numpy's constructors")


def _scalar(node: object, data: object) -> Any:
    import numpy as np

    dtype = _finished(node)
    if type(data) is not bytes or len(data) != dtype.itemsize or dtype.subdtype is not None:
        raise Unreadable("a scalar's bytes don't fit its dtype")
    if not data:
        return np.zeros((), dtype)[()]
    return np.ndarray((), dtype, buffer=bytearray(data))[()]


def _build(node: object, state: object) -> np.dtype[Any]:
    """What ``dtype.__setstate__`` does, by way of numpy's public constructor."""
    if not isinstance(node, _Node) or node.dtype is not None:
        raise Unreadable("the pickle sets the state of something else than a new dtype")
    if type(state) is not tuple or len(state) not in (8, 9) or state[0] != len(state) - 5:
        raise Unreadable("the pickle has a dtype state of an unknown version")
    order, subarray, names, fields, itemsize, alignment, flags = state[1:8]
    unit = state[8] if len(state) == 9 else None
    if order not in ("<", ">", "|", "=") or type(itemsize) is not int or type(flags) is not int:
        raise Unreadable("the pickle has a dtype state of an unknown kind")
    # What is read here may be passed on as it is to a peer that unpickles it: so all of it must be true, also what isn't used.
    if (names is None) != (fields is None) or (subarray is not None and names is not None):
        raise Unreadable("the pickle has a dtype state of an unknown kind")
    if subarray is not None:
        dtype = _subarray(node, subarray)
    elif names is not None:
        dtype = _structure(node, names, fields, itemsize, aligned=bool(flags & _ALIGNED))
    else:
        dtype = _simple(node, order, unit)
        unit = None
    if unit is not None:
        raise Unreadable("the dtype has metadata")
    if flags & _NOT_RAW or type(alignment) is not int or alignment not in _ALIGNMENTS:
        raise Unreadable("the pickle's flags or alignment are none that such a dtype has")
    if itemsize != dtype.itemsize and (itemsize != -1 or dtype.kind in "SUV" or subarray is not None):
        raise Unreadable("the pickle's item size is not that of its dtype")
    if (
        (subarray is not None or names is not None)
        and node.text != f"V{itemsize}"
        and (isinstance(node.text, str) or names is None)
    ):
        raise Unreadable("the pickle's dtype is made of another one than numpy takes for it")
    node.dtype = dtype
    return dtype


def _simple(node: _Node, order: str, unit: object) -> np.dtype[Any]:
    text = node.text
    if not isinstance(text, str):
        raise Unreadable("a record without fields")
    if unit is None:
        return _typestring(order + text, empty=True)
    match unit:
        case (None, (bytes(name), int(count), 1, 1)) if text in ("M8", "m8") and 0 < count < 2**31:
            if name == b"generic":
                return _typestring(order + text, empty=False)
            return _typestring(f"{order}{text}[{count}{name.decode('ascii')}]", empty=False)
    raise Unreadable("the dtype has metadata")


def _weigh(node: _Node, parts: list[_Node]) -> None:
    node.weight = 1 + sum(part.weight for part in parts)
    node.depth = 1 + max((part.depth for part in parts), default=0)
    if node.weight > _MAX_WEIGHT or node.depth > _MAX_DEPTH:
        raise Unreadable("the dtype has too many fields, or they are nested too deeply")


def _subarray(node: _Node, subarray: object) -> np.dtype[Any]:
    import numpy as np

    match subarray:
        case (_Node() as part, tuple(shape)) if len(shape) <= _MAX_SUBARRAY_DIMENSIONS:
            pass
        case _:
            raise Unreadable("the dtype has a sub-array of an unknown kind")
    base = _finished(part)
    _weigh(node, [part])
    size = base.itemsize
    for length in shape:
        if type(length) is not int or length < 0:
            raise Unreadable("the dtype has a sub-array of a bad shape")
        size *= max(length, 1)
    if size > _MAX_ITEMSIZE:
        raise Unreadable("the dtype has a sub-array that is too large")
    return np.dtype((base, shape))


def _structure(node: _Node, names: object, fields: object, itemsize: int, *, aligned: bool) -> np.dtype[Any]:
    import numpy as np

    if type(names) is not tuple or type(fields) is not dict or not 0 <= itemsize <= _MAX_ITEMSIZE:
        raise Unreadable("the dtype has fields of an unknown kind")
    parts: list[_Node] = []
    formats: list[np.dtype[Any]] = []
    offsets: list[int] = []
    titles: list[str | None] = []
    for name in names:
        title: str | None = None
        match fields.get(name) if type(name) is str else None:
            case (_Node() as part, int(offset)):
                pass
            case (_Node() as part, int(offset), str(text)):
                title = text
            case _:
                raise Unreadable("the dtype has a field of an unknown kind")
        dtype = _finished(part)
        if offset < 0 or offset + dtype.itemsize > itemsize:
            raise Unreadable("the dtype has a field outside of its item")
        if title is not None and fields.get(title) is not fields[name] and fields.get(title) != fields[name]:
            raise Unreadable("the dtype has a title of another field")
        parts.append(part)
        formats.append(dtype)
        offsets.append(offset)
        titles.append(title)
    if fields.keys() != {*names, *titles} - {None}:
        raise Unreadable("the dtype has fields without a name")
    _weigh(node, parts)
    layout: dict[str, Any] = {"names": list(names), "formats": formats, "offsets": offsets, "itemsize": itemsize}
    if any(title is not None for title in titles):
        layout["titles"] = titles
    dtype = np.dtype(layout, align=aligned)  # type: ignore[call-overload]
    return dtype if isinstance(node.text, str) else np.dtype((np.record, dtype))
