"""Safe types: their bytes are those of the table, they come back as they were, and hostile payloads only give typed errors."""

from __future__ import annotations

import datetime as dt
import decimal
import io
import struct
import sys
import uuid
import zoneinfo
from decimal import Decimal
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_dcore.protocol import RemoteProtocolError
from trio_dcore.protocol._extensions import DICT, FROZENSET, TagSeen, decode_ext, encode_ext, tagged_dict, untag

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
HOUR = dt.timedelta(hours=1)
CODES = [*range(-72, -63), -80, -81]


def over_the_wire(value: object) -> Any:
    packed = msgpack.packb(encode_ext(value), default=encode_ext)
    return msgpack.unpackb(packed, ext_hook=decode_ext, use_list=False, object_hook=untag, strict_map_key=False)


def same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other) and repr(value) == repr(other)


GOLDEN = [
    (2**64, -64, "000000000000000001"),
    (-(2**63) - 1, -64, "ffffffffffffff7fff"),
    (1.5 - 2j, -65, "3ff8000000000000c000000000000000"),
    (Decimal("-12.50"), -66, b"-12.50".hex()),
    (Decimal("1E+6"), -66, b"1E+6".hex()),
    (uuid.UUID(int=1), -67, "00000000000000000000000000000001"),
    (dt.date(2024, 2, 29), -68, "07e8021d"),
    (dt.time(1, 2, 3, 4), -69, "0102030000000004"),
    (dt.time(1, 2, 3, 4, dt.UTC, fold=1), -69, "01020303000000040000000000000000"),
    (dt.datetime(2024, 2, 29, 23, 59), -70, "07e8021d173b000000000000"),
    (
        dt.datetime(2024, 2, 29, tzinfo=dt.timezone(-HOUR, "X")),
        -70,
        "07e8021d0000000400000000" + struct.pack(">q", -3_600_000_000).hex() + b"X".hex(),
    ),
    (dt.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN), -70, "07e80a1b021e000700000000" + b"Europe/Berlin".hex()),
    (dt.timedelta(-1, 2, 3), -71, "ffffffff0000000200000003"),
    (np.int16(-2), -72, "03" + b"<i2".hex() + "feff"),
    (np.datetime64(1, "ns"), -72, "07" + b"<M8[ns]".hex() + "0100000000000000"),
]


@pytest.mark.parametrize(("value", "code", "payload"), GOLDEN)
def test_the_bytes_are_those_of_the_table(value: object, code: int, payload: str) -> None:
    ext = encode_ext(value)
    assert type(ext) is msgpack.ExtType
    assert (ext.code, ext.data.hex()) == (code, payload)
    assert same(decode_ext(code, bytes.fromhex(payload)), value)


def test_the_containers_are_maps_with_a_tag() -> None:
    assert msgpack.packb(encode_ext(frozenset({7}))).hex() == "81c700b09107"
    assert msgpack.packb(tagged_dict(["__Set__", 1])).hex() == "81c700af92a7" + b"__Set__".hex() + "01"
    assert decode_ext(-80, b"") is FROZENSET
    assert decode_ext(-81, b"") is DICT


EXACT = [
    0,
    2**70_000,
    complex("nan+infj"),
    Decimal("-0"),
    Decimal("0E-20"),
    Decimal("-Infinity"),
    Decimal("sNaN123"),
    Decimal("1E+1000000"),
    Decimal(1).scaleb(-1_000_026, decimal.Context(prec=40, Emin=decimal.MIN_EMIN)),
    dt.datetime.max,
    dt.datetime.min.replace(tzinfo=dt.UTC),
    dt.datetime(2024, 1, 1, tzinfo=dt.timezone(dt.timedelta(microseconds=-1))),
    dt.datetime(2024, 1, 1, tzinfo=dt.timezone(HOUR, "")),
    dt.datetime(2024, 1, 1, tzinfo=dt.timezone(HOUR, "Ünïcode")),
    dt.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("America/Argentina/Buenos_Aires")),
    dt.time(23, 59, 59, 999_999, BERLIN),
    dt.timedelta.max,
    dt.timedelta.min,
    np.True_,
    np.False_,
    np.float16(1.5),
    np.complex64(1 + 2j),
    np.uint64(2**64 - 1),
    np.timedelta64(5, "D"),
    np.datetime64("NaT", "s"),
    np.datetime64(7, "25s"),
    frozenset(),
    frozenset({frozenset({1}), (2, frozenset())}),
]


@pytest.mark.parametrize("value", EXACT, ids=lambda value: type(value).__name__)
def test_what_is_written_comes_back_as_it_was(value: object) -> None:
    back = over_the_wire(value)
    assert type(back) is type(value)
    if isinstance(value, (int, frozenset)):
        assert back == value
    else:
        assert repr(back) == repr(value)


def test_a_zone_is_the_zone_and_not_only_its_offset() -> None:
    moment = over_the_wire(dt.datetime(2024, 7, 1, tzinfo=BERLIN))
    assert moment.tzinfo is BERLIN
    assert (moment + dt.timedelta(days=180)).utcoffset() == HOUR


def test_utc_is_utc() -> None:
    assert over_the_wire(dt.datetime(2024, 7, 1, tzinfo=dt.UTC)).tzinfo is dt.UTC


def test_the_programs_decimal_context_has_no_say() -> None:
    with decimal.localcontext() as context:
        context.capitals = 0
        context.traps[decimal.InvalidOperation] = False
        context.prec = 2
        assert encode_ext(Decimal("1.2345E+9")).data == b"1.2345E+9"
        assert decode_ext(-66, b"1.2345E+9") == Decimal("1.2345E+9")
        with pytest.raises(RemoteProtocolError):
            decode_ext(-66, b"hello")


@given(
    st.integers()
    | st.complex_numbers()
    | st.decimals()
    | st.uuids()
    | st.dates()
    | st.times(timezones=st.none() | st.timezones())
    | st.datetimes(timezones=st.none() | st.timezones(), allow_imaginary=False)
    | st.timedeltas()
    | st.frozensets(st.integers(0, 9) | st.text(max_size=3))
)
def test_round_trip(value: object) -> None:
    back = over_the_wire(value)
    assert type(back) is type(value)
    assert repr(back) == repr(value) or back == value


class MyInt(int): ...


class MyDate(dt.date): ...


class MyFrozenset(frozenset[int]): ...


class MyZone(zoneinfo.ZoneInfo): ...


class Decimaloid:
    """Calls itself decimal.Decimal."""


Decimaloid.__module__ = "decimal"
Decimaloid.__qualname__ = "Decimal"


class Liar:
    """Calls itself a part of numpy."""


Liar.__module__ = "numpy"


class OtherZone(dt.tzinfo):
    def utcoffset(self, moment: object) -> dt.timedelta:
        return HOUR


@pytest.mark.parametrize(
    "value",
    [
        MyInt(2**70),
        MyDate(2024, 1, 1),
        MyFrozenset({1}),
        Decimaloid(),
        Liar(),
        object(),
        Decimal("1E+1000101"),
        Decimal("0E-1000101"),
        dt.datetime(2024, 1, 1, tzinfo=OtherZone()),
        dt.time(1, tzinfo=OtherZone()),
        dt.datetime(2024, 1, 1, tzinfo=MyZone("Europe/Berlin")),
        dt.datetime(2024, 1, 1, tzinfo=dt.timezone(HOUR, "\udc00")),
        np.longdouble(1),
        np.clongdouble(1),
        np.void(b"x"),
        np.datetime64("NaT"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_would_not_come_back_as_it_was_is_left_to_others(value: object) -> None:
    assert encode_ext(value) is None


def test_a_zone_read_from_a_file_has_no_key() -> None:
    # A TZif file of version 1 with a single type of local time.
    header = b"TZif" + b"\0" * 16 + struct.pack(">6L", 0, 0, 0, 0, 1, 4)
    zone = zoneinfo.ZoneInfo.from_file(io.BytesIO(header + struct.pack(">lBB", 3600, 0, 0) + b"ABC\0"))
    assert encode_ext(dt.datetime(2024, 1, 1, tzinfo=zone)) is None


BAD = [
    (-64, b""),
    (-65, b"\0" * 15),
    (-65, b"\0" * 17),
    (-66, b""),
    (-66, b" 1"),
    (-66, b"1_0"),
    (-66, "٣".encode()),
    (-66, b"1E+1000101"),
    (-66, b"1E-1000101"),
    (-66, b"0E+1000101"),
    (-66, b"1E+99999999999999999999"),
    (-66, b"1E+9999999999999999999"),
    (-66, b"NaN" + b"9" * 100 + b"x"),
    (-66, b"\xff"),
    (-67, b"\0" * 15),
    (-68, b"\0\0\1\1"),
    (-68, b"\7\xe8\2\x1e"),
    (-68, b"\7\xe8\2"),
    (-69, b"\x18\0\0\0\0\0\0\0"),
    (-69, b"\0\0\0\0\0\x0f\x42\x40"),
    (-69, b"\0\0\0\x08\0\0\0\0"),
    (-69, b"\0\0\0\0\0\0\0"),
    (-69, b"\0\0\0\0\0\0\0\0\0"),
    (-69, b"\0\0\0\2\0\0\0\0"),
    (-69, b"\0\0\0\2\0\0\0\0" + b"\0" * 9),
    (-69, b"\0\0\0\4\0\0\0\0" + b"\0" * 7),
    (-69, b"\0\0\0\4\0\0\0\0" + b"\0" * 8 + b"\xff"),
    (-69, b"\0\0\0\2\0\0\0\0" + struct.pack(">q", 86_400_000_000)),
    (-69, b"\0\0\0\2\0\0\0\0" + struct.pack(">q", -(2**63))),
    (-69, b"\0\0\0\6\0\0\0\0"),
    (-69, b"\0\0\0\6\0\0\0\0" + b"Europe/Nowhere"),
    (-69, b"\0\0\0\6\0\0\0\0" + b"Europe"),
    (-69, b"\0\0\0\6\0\0\0\0" + b"/etc/localtime"),
    (-69, b"\0\0\0\6\0\0\0\0" + b"../../../etc/passwd"),
    (-69, b"\0\0\0\6\0\0\0\0" + b"tzdata.zi"),
    (-69, b"\0\0\0\6\0\0\0\0" + b"A/" * 5 + b"B"),
    (-69, b"\0\0\0\6\0\0\0\0" + b"\xff"),
    (-69, b"\0\0\0\6\0\0\0\0" + b"x" * 1000),
    (-70, b"\7\xe8\2\x1d\0\0\0\0\0\0\0"),
    (-70, b"\7\xe8\2\x1e\0\0\0\0\0\0\0\0"),
    (-71, struct.pack(">iII", 0, 86_400, 0)),
    (-71, struct.pack(">iII", 0, 0, 1_000_000)),
    (-71, struct.pack(">iII", 10**9, 0, 0)),
    (-71, b""),
    (-72, b""),
    (-72, b"\3<i8"),
    (-72, b"\3<i8" + b"\0" * 7),
    (-72, b"\3<i8" + b"\0" * 9),
    (-72, b"\2|O" + b"\0" * 8),
    (-72, b"\4|V99"),
    (-72, b"\4<f16" + b"\0" * 16),
    (-72, b"\3<U1\0\0\0\0"),
    (-72, b"\6<M8[X]" + b"\0" * 8),
    (-72, b"\3<M8" + b"\0" * 8),
    (-72, b"\1\xff"),
    (-72, b"\xff<i8" + b"\0" * 8),
    (-80, b"x"),
    (-81, b"x"),
    (-2, b""),
    (-128, b"x"),
]


@pytest.mark.parametrize(("code", "payload"), BAD)
def test_a_bad_payload_is_the_peers_error(code: int, payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="extension value"):
        decode_ext(code, payload)


@given(st.sampled_from(CODES) | st.integers(-128, 127), st.binary(max_size=40))
def test_any_payload_is_a_value_or_the_peers_error(code: int, payload: bytes) -> None:
    try:
        value = decode_ext(code, payload)
    except RemoteProtocolError:
        return
    if isinstance(value, Decimal) and value.is_snan():
        return  # the one value that can't be hashed, and so was no key at its sender's either
    hash(value)


def test_an_unknown_zone_is_named_with_the_remedy() -> None:
    with pytest.raises(RemoteProtocolError, match=r"'Mars/Olympus' is not in this machine's.*tzdata"):
        decode_ext(-69, b"\0\0\0\6\0\0\0\0Mars/Olympus")


def test_a_zone_is_looked_for_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = b"\0\0\0\6\0\0\0\0Pacific/Chatham"
    decode_ext(-69, payload)
    monkeypatch.setattr(zoneinfo, "ZoneInfo", None)
    assert decode_ext(-69, payload) == dt.time(tzinfo=decode_ext(-69, payload).tzinfo)  # type: ignore[attr-defined]


def test_without_numpy_a_scalar_of_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(RemoteProtocolError, match="numpy scalar"):
        decode_ext(-72, b"\3<i8" + b"\0" * 8)
    assert encode_ext(Liar()) is None


def test_a_large_integer_is_read_in_linear_time() -> None:
    value = 1 << 8_000_000
    assert decode_ext(-64, encode_ext(value).data) == value


def test_foreign_codes_pass() -> None:
    assert decode_ext(5, b"x") == msgpack.ExtType(5, b"x")
    assert decode_ext(127, b"") == msgpack.ExtType(127, b"")


@pytest.mark.parametrize("code", CODES)
def test_a_users_exttype_is_never_ours(code: int) -> None:
    with pytest.raises(ValueError, match="code must be"):
        msgpack.ExtType(code, b"")


def test_untag() -> None:
    assert untag({FROZENSET: (1, 2)}) == frozenset({1, 2})
    assert untag({DICT: ("__Set__", 1, (2,), 3)}) == {"__Set__": 1, (2,): 3}
    assert untag({DICT: ()}) == {}


@pytest.mark.parametrize(
    "bad",
    [
        {FROZENSET: [1]},
        {FROZENSET: "ab"},
        {FROZENSET: None},
        {FROZENSET: (1,), "x": 1},
        {"x": 1, DICT: ()},
        {"x": (), FROZENSET: ()},
        {DICT: (1,)},
        {DICT: {1: 2}},
    ],
)
def test_a_bad_tagged_map_is_the_peers_error(bad: dict[Any, Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="extension value"):
        untag(bad)


@pytest.mark.parametrize("bad", [{FROZENSET: ({},)}, {DICT: ({}, 1)}])
def test_an_element_that_can_not_be_hashed_is_left_to_the_caller(bad: dict[Any, Any]) -> None:
    with pytest.raises(TypeError, match="unhashable"):
        untag(bad)


def test_tag_seen_is_no_error_of_the_peer() -> None:
    assert not issubclass(TagSeen, RemoteProtocolError)
