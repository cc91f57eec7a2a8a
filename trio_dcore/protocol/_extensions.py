"""Safe types: values that travel between trio_dcore peers without a pickle (security document, section 1).

They are msgpack extension values, used only on comms where both sides negotiated the wire extension.  The codes are negative,
which msgpack reserves for itself, for one reason: a :class:`msgpack.ExtType` of the user's can only have a code from 0 to 127, so
what a program sends, or passes on, as an ExtType is never taken for one of these.

Numbers are big-endian, as everywhere in msgpack, save where said.

====  =====================  ========================================================================================
code  type                   payload
====  =====================  ========================================================================================
-64   int                    beyond msgpack's range: two's complement, little-endian, one byte or more
-65   complex                f64 real, f64 imag
-66   decimal.Decimal        ASCII: ``-12.50``, ``1E+6``, ``Infinity``, ``sNaN7``; exponents up to about 10**6
-67   uuid.UUID              the 16 bytes of ``UUID.bytes`` (``is_safe`` is not sent)
-68   datetime.date          u16 year, u8 month, u8 day
-69   datetime.time          u8 hour, u8 minute, u8 second, u8 flags, u32 microsecond, zone
-70   datetime.datetime      payload of date, payload of time
-71   datetime.timedelta     i32 days, u32 seconds (below 86 400), u32 microseconds (below 10**6)
-72   numpy scalar           u8 n, n bytes of ASCII ``dtype.str`` such as ``<i8`` or ``<M8[ns]``, the item's memory
-80   frozenset              empty; the key of a map of one pair, whose value is the array of elements
-81   dict                   empty; the key of a map of one pair, whose value is the array key, value, key, value, ...
====  =====================  ========================================================================================

flags: bit 0 is ``fold``; bits 1 and 2 are the kind of zone; the others are 0.  zone, by kind:

- 0: no zone, a naive time; empty;
- 1: ``datetime.timezone`` without a name: i64 microseconds east of UTC;
- 2: the same with a name: i64, then the name in UTF-8;
- 3: ``zoneinfo.ZoneInfo``: its key in ASCII, and nothing else, as a pickle has it.  A receiver whose time zone database lacks
  that key refuses the message: a fixed offset would be right today and silently wrong after the next change of the clocks.

The last two types are written as maps and not as extension values with a payload of their own, since then their elements are part
of the message like all others (they may be anything that a message may hold), and nesting them nests nothing but msgpack's own
containers.  A frozenset is hashable once decoded, so it can be a map's key.  A dict is only written like that if it holds a key
that means something else on the wire, such as ``"__Set__"`` (wire document, section 5.1).

Only exact types are written: an instance of a subclass is pickled, or refused.  So are what would not arrive as it was: decimals
with larger exponents, which no arithmetic in Python's default context gives and which take the memory of whoever calls ``int()``
on one; ``numpy.longdouble``, whose format differs between platforms; other tzinfo classes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from struct import Struct
from struct import error as StructError
from typing import TYPE_CHECKING, Any

from msgpack import ExtType

from ._collisions import Keys
from ._errors import RemoteProtocolError

if TYPE_CHECKING:
    from datetime import date, datetime, time, timedelta, tzinfo
    from decimal import Context, Decimal
    from uuid import UUID

__all__ = ["DICT", "FROZENSET", "Tag", "TagSeen", "decode_ext", "encode_ext", "tagged_dict", "untag"]

_INT, _COMPLEX, _DECIMAL, _UUID, _DATE, _TIME, _DATETIME, _TIMEDELTA, _NUMPY = range(-64, -73, -1)
_FROZENSET, _DICT = -80, -81

_COMPLEX_PARTS = Struct(">dd")
_DATE_PARTS = Struct(">HBB")
_TIME_PARTS = Struct(">BBBBI")
_TIMEDELTA_PARTS = Struct(">iII")
_OFFSET = Struct(">q")

# Emax and Etiny of Python's default context, rounded up: 999 999 and -1 000 026.
_MAX_EXPONENT = 1_000_100
_DECIMAL_TEXT = re.compile(rb"-?(?:\d+(?:\.\d+)?(?:E[+-]\d{1,7})?|Infinity|s?NaN\d*)")
# Bools, integers, floats, complex numbers of the sizes that are the same everywhere; times with a unit.
_NUMPY_TYPE = re.compile(r"[<>|](?:b1|[iu][1248]|f[248]|c(?:8|16)|[mM]8\[\d{0,9}(?:[YMWDhms]|ms|us|ns|ps|fs|as)\])")
# No dots: the tz database has none, and a dot would let a peer name any package inside tzdata, or a file outside the database.
_ZONE_KEY = re.compile(r"[A-Za-z0-9_+-]{1,100}(?:/[A-Za-z0-9_+-]{1,100}){0,4}")


class Tag:
    """What a frozenset's or a dict's extension value decodes to: the sole key of a map that stands for something else."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class TagSeen(Exception):
    """A decoder that has no hook for maps met a tag, and has to start again with one."""


FROZENSET = Tag("frozenset")
DICT = Tag("dict")


def _ext(code: int, payload: bytes) -> ExtType:
    # The constructor allows codes from 0 to 127 only, which is the point of ours.
    return ExtType._make((code, payload))


_FROZENSET_KEY = _ext(_FROZENSET, b"")
_DICT_KEY = _ext(_DICT, b"")


# -- writing ---------------------------------------------------------------------------------------------------------------------


def encode_ext(obj: object) -> Any:
    """Return what msgpack should pack for ``obj``, or None if it is not of a safe type."""
    cls = type(obj)
    if cls is frozenset:
        return {_FROZENSET_KEY: list(obj)}  # type: ignore[call-overload]
    found = _writers.get(cls) or _find_writer(cls)
    if found is None:
        return None
    code, write = found
    payload = write(obj)
    return None if payload is None else _ext(code, payload)


def tagged_dict(items: list[Any]) -> dict[Any, list[Any]]:
    """Return what msgpack should pack for a dict that holds a reserved key; ``items`` are its keys and values in turn."""
    return {_DICT_KEY: items}


def _write_int(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)


def _write_complex(value: complex) -> bytes:
    return _COMPLEX_PARTS.pack(value.real, value.imag)


def _write_decimal(value: Decimal) -> bytes | None:
    if value.is_finite() and abs(value.adjusted()) > _MAX_EXPONENT:
        return None
    # Not str(): the current context may say capitals=0.
    return _decimal_context().to_sci_string(value).encode("ascii")


def _write_uuid(value: UUID) -> bytes:
    return value.bytes


def _write_date(value: date) -> bytes:
    return _DATE_PARTS.pack(value.year, value.month, value.day)


def _write_time(value: time | datetime) -> bytes | None:
    zone = _write_zone(value.tzinfo)
    if zone is None:
        return None
    kind, rest = zone
    return _TIME_PARTS.pack(value.hour, value.minute, value.second, value.fold | kind << 1, value.microsecond) + rest


def _write_datetime(value: datetime) -> bytes | None:
    rest = _write_time(value)
    return None if rest is None else _write_date(value) + rest


def _write_zone(zone: tzinfo | None) -> tuple[int, bytes] | None:
    """Kind and payload of a zone, or None if it is not of the two classes whose meaning the receiver is sure to share."""
    if zone is None:
        return 0, b""
    from datetime import timedelta, timezone

    if type(zone) is timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]  # typeshed doesn't have it; its pickles rely on it
        payload = _OFFSET.pack(offset // timedelta(microseconds=1))
        if not name:
            return 1, payload
        try:
            return 2, payload + name[0].encode()
        except UnicodeEncodeError:
            return None
    zoneinfo = sys.modules.get("zoneinfo")
    key = getattr(zone, "key", None)
    if zoneinfo is not None and type(zone) is zoneinfo.ZoneInfo and key is not None and _ZONE_KEY.fullmatch(key):
        return 3, key.encode("ascii")
    return None


def _write_timedelta(value: timedelta) -> bytes:
    return _TIMEDELTA_PARTS.pack(value.days, value.seconds, value.microseconds)


def _write_numpy(value: Any) -> bytes | None:
    name: str = value.dtype.str
    if not _NUMPY_TYPE.fullmatch(name):
        return None
    return bytes((len(name),)) + name.encode("ascii") + bytes(value.tobytes())


Writer = tuple[int, Callable[[Any], bytes | None]]

# By name, so that nothing is imported until a value of that type turns up, whose module then is imported already.
_WRITERS_BY_NAME: dict[tuple[str, str], Writer] = {
    ("builtins", "int"): (_INT, _write_int),
    ("builtins", "complex"): (_COMPLEX, _write_complex),
    ("decimal", "Decimal"): (_DECIMAL, _write_decimal),
    ("uuid", "UUID"): (_UUID, _write_uuid),
    ("datetime", "date"): (_DATE, _write_date),
    ("datetime", "time"): (_TIME, _write_time),
    ("datetime", "datetime"): (_DATETIME, _write_datetime),
    ("datetime", "timedelta"): (_TIMEDELTA, _write_timedelta),
}
_writers: dict[type, Writer] = {}


def _find_writer(cls: type) -> Writer | None:
    module, name = cls.__module__, cls.__qualname__
    if module == "numpy":
        numpy = sys.modules.get("numpy")
        writer: Writer | None = (_NUMPY, _write_numpy) if numpy is not None and issubclass(cls, numpy.generic) else None
    else:
        writer = _WRITERS_BY_NAME.get((module, name))
    # A class can call itself anything: it must be the one that is found under that name.
    if writer is None or getattr(sys.modules.get(module), name, None) is not cls:
        return None
    _writers[cls] = writer
    return writer


# -- reading ---------------------------------------------------------------------------------------------------------------------


def decode_ext(code: int, payload: bytes) -> object:
    """Return the value of an extension: ours, or an ExtType for a foreign code.

    Raises:
        RemoteProtocolError: the payload is not what the table above says, or can't be represented here.
    """
    found = _READERS.get(code)
    if found is None:
        if code < 0:
            raise RemoteProtocolError(f"unknown extension value, code {code}")
        return ExtType(code, payload)
    name, read = found
    try:
        return read(payload)
    except (ValueError, TypeError, OverflowError, ArithmeticError, LookupError, OSError, StructError, ImportError) as exc:
        raise RemoteProtocolError(f"bad extension value of type {name}: {exc}") from exc


def untag(marker: dict[Any, Any], keys: Keys | None = None) -> frozenset[Any] | dict[Any, Any]:
    """Return what a map whose key is a :class:`Tag` stands for.

    Args:
        marker: the map.
        keys: those of the message it came in.

    Raises:
        RemoteProtocolError: the map is not one pair of a tag and an array, or its elements were chosen to collide.
        TypeError: an element can't be hashed.
    """
    ((tag, items), *more) = marker.items()
    if more or type(tag) is not Tag or type(items) is not tuple:
        raise RemoteProtocolError("bad extension value: a frozenset or dict is a map of one pair, its tag and an array")
    keys = Keys() if keys is None else keys
    if tag is FROZENSET:
        return keys.make_frozenset(items)
    if len(items) % 2:
        raise RemoteProtocolError("bad extension value of type dict: a key without a value")
    return keys.make_dict(list(zip(items[::2], items[1::2], strict=True)))


def _read_int(payload: bytes) -> int:
    if not payload:
        raise ValueError("no bytes")
    return int.from_bytes(payload, "little", signed=True)


def _read_complex(payload: bytes) -> complex:
    return complex(*_COMPLEX_PARTS.unpack(payload))


@lru_cache(maxsize=1)
def _decimal_context() -> Context:
    from decimal import Context, InvalidOperation

    # Our own, since the program's may have InvalidOperation untrapped: garbage would then be read as NaN.
    return Context(capitals=1, traps=[InvalidOperation])


def _read_decimal(payload: bytes) -> Decimal:
    from decimal import Decimal

    if not _DECIMAL_TEXT.fullmatch(payload):
        raise ValueError("not a decimal number")
    value = Decimal(payload.decode("ascii"), _decimal_context())
    if value.is_finite() and abs(value.adjusted()) > _MAX_EXPONENT:
        raise ValueError("its exponent is too large")
    return value


def _read_uuid(payload: bytes) -> UUID:
    from uuid import UUID

    return UUID(bytes=payload)


def _read_date(payload: bytes) -> date:
    from datetime import date

    return date(*_DATE_PARTS.unpack(payload))


def _read_clock(payload: bytes, start: int) -> tuple[int, int, int, int, tzinfo | None, int]:
    """Hour, minute, second, microsecond, zone and fold of a time's payload."""
    hour, minute, second, flags, microsecond = _TIME_PARTS.unpack_from(payload, start)
    if flags > 7:
        raise ValueError("unknown flags")
    return hour, minute, second, microsecond, _read_zone(flags >> 1, payload[start + _TIME_PARTS.size :]), flags & 1


def _read_time(payload: bytes) -> time:
    from datetime import time

    hour, minute, second, microsecond, zone, fold = _read_clock(payload, 0)
    return time(hour, minute, second, microsecond, zone, fold=fold)


def _read_datetime(payload: bytes) -> datetime:
    from datetime import datetime

    year, month, day = _DATE_PARTS.unpack_from(payload, 0)
    hour, minute, second, microsecond, zone, fold = _read_clock(payload, _DATE_PARTS.size)
    return datetime(year, month, day, hour, minute, second, microsecond, zone, fold=fold)


def _read_zone(kind: int, payload: bytes) -> tzinfo | None:
    from datetime import timedelta, timezone

    if kind == 3:
        return _zone(payload)
    if len(payload) < (_OFFSET.size if kind else 0) or (kind != 2 and len(payload) > (_OFFSET.size if kind else 0)):
        raise ValueError("its zone is of the wrong length")
    if kind == 0:
        return None
    offset = timedelta(microseconds=_OFFSET.unpack_from(payload)[0])
    return timezone(offset) if kind == 1 else timezone(offset, payload[_OFFSET.size :].decode())


# Zones are read from files.  The cache bounds what a peer can make us read to the size of the database, some 600 files.
@lru_cache(maxsize=1024)
def _zone(key: bytes) -> tzinfo:
    from zoneinfo import ZoneInfo

    name = key.decode("ascii")
    if not _ZONE_KEY.fullmatch(name):
        raise ValueError("not the key of a time zone")
    try:
        return ZoneInfo(name)
    except (LookupError, OSError, ValueError) as exc:
        raise LookupError(
            f"the time zone {name!r} is not in this machine's time zone database; the package tzdata brings a current one"
        ) from exc


def _read_timedelta(payload: bytes) -> timedelta:
    from datetime import timedelta

    days, seconds, microseconds = _TIMEDELTA_PARTS.unpack(payload)
    if seconds >= 86_400 or microseconds >= 1_000_000:
        raise ValueError("seconds or microseconds out of range")
    return timedelta(days, seconds, microseconds)


def _read_numpy(payload: bytes) -> object:
    size = payload[0]
    name = payload[1 : 1 + size].decode("ascii")
    if not _NUMPY_TYPE.fullmatch(name):
        raise ValueError("not the name of a scalar type")
    # The module is this one, whatever a peer says; it is only imported later than usual.
    import numpy

    dtype = numpy.dtype(name)
    if len(payload) != 1 + size + dtype.itemsize:
        raise ValueError("its memory is of the wrong size")
    scalar: object = numpy.frombuffer(payload, dtype, 1, 1 + size)[0]
    return scalar


def _read_tag(tag: Tag, payload: bytes) -> Tag:
    if payload:
        raise ValueError("it has a payload")
    return tag


_READERS: dict[int, tuple[str, Callable[[bytes], object]]] = {
    _INT: ("int", _read_int),
    _COMPLEX: ("complex", _read_complex),
    _DECIMAL: ("Decimal", _read_decimal),
    _UUID: ("UUID", _read_uuid),
    _DATE: ("date", _read_date),
    _TIME: ("time", _read_time),
    _DATETIME: ("datetime", _read_datetime),
    _TIMEDELTA: ("timedelta", _read_timedelta),
    _NUMPY: ("numpy scalar", _read_numpy),
    _FROZENSET: ("frozenset", partial(_read_tag, FROZENSET)),
    _DICT: ("dict", partial(_read_tag, DICT)),
}
