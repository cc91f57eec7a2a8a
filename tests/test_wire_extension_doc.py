"""docs/wire-extension.md says what the code does: its tables and its examples.

Its conversation is the business of ``test_wire_extension_conversation.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any
from uuid import UUID

import msgpack
import numpy
import pytest

from trio_dcore import RemoteError, RemoteProtocolError
from trio_dcore.protocol import _envelope, _error_decoding, _error_pickles, _error_text, _extensions, _remote_errors
from trio_dcore.protocol._context import EncodeContext
from trio_dcore.protocol._envelope import Credit, RequestHeader, parse_credit, parse_envelope, parse_request_header
from trio_dcore.protocol._errors import (
    HandlerCancelled,
    LimitExceeded,
    NotAllowed,
    Overloaded,
    SerializationError,
    ServerClosing,
    UnknownOp,
    UnsafePayload,
)
from trio_dcore.protocol._frames import FrameParser, pack_prelude, single_frame
from trio_dcore.protocol._handshake import FEATURES, VERSION, Extension, local_handshake, negotiate
from trio_dcore.protocol._limits import Limits
from trio_dcore.protocol._messages import Encoder, loads
from trio_dcore.protocol._remote_errors import error_reply, error_value, exception_from_value

PAGE = Path(__file__).parent.parent / "docs" / "wire-extension.md"

HANDSHAKE = local_handshake(compression=None, window=(16, 2**20))
_U64 = Struct("<Q")


# -- the page --------------------------------------------------------------------------------------------------------------------


@cache
def sections() -> dict[int, tuple[str, str]]:
    """Number -> (title, text)."""
    parts = re.split(r"^## (\d+)\. (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {int(parts[i]): (parts[i + 1], parts[i + 2]) for i in range(1, len(parts), 3)}


def table(section: int, first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column is called ``first``."""
    lines = [line for line in sections()[section][1].splitlines() if line.startswith("|")]
    found: list[dict[str, str]] = []
    head: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if following.startswith("|---"):
            head = cells
        elif head and head[0] == first and not line.startswith("|---"):
            found.append(dict(zip(head, cells, strict=True)))
    assert found, f"section {section} has no table that begins with {first!r}"
    return found


def names(cell: str) -> list[str]:
    return re.findall(r"`\"?([^`\"]+)\"?`", cell)


def from_hex(cell: str) -> bytes:
    return bytes.fromhex(cell.strip("`"))


def number(text: str) -> int:
    """``2^63 - 1``, ``10 000`` or ``10 000 (a remark)``."""
    power = re.fullmatch(r"2\^(\d+)( - 1)?", text)
    return 2 ** int(power[1]) - bool(power[2]) if power else int(re.sub(r"\s+|\(.*", "", text))


def packed(message: object) -> bytes:
    """Frame 0 of a message that has no others."""
    (frame,) = Encoder(EncodeContext(extensions=True, allow_pickle=lambda: False)).encode(message)
    return bytes(frame)


def test_sections_have_the_numbers_by_which_the_code_names_them() -> None:
    assert [title for title, _ in sections().values()][3:6] == ["Kinds", "Streams", "Windows"]
    assert list(sections()) == list(range(1, 15))


def test_links_inside_the_page_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


# -- 1 and 2: negotiation, requests ----------------------------------------------------------------------------------------------


def test_the_handshake() -> None:
    longest = local_handshake(compression=None, window=(16, 2**20), pooled=True, ping=0.5)["trio-dcore"]
    assert [names(row["key"]) for row in table(1, "key")] == [[key] for key in longest]
    for key in longest:
        shorter = {**HANDSHAKE, "trio-dcore": {other: longest[other] for other in longest if other != key}}
        if key in ("pooled", "ping"):
            assert negotiate(HANDSHAKE, shorter).extension is not None
        else:
            with pytest.raises(RemoteProtocolError):
                negotiate(HANDSHAKE, shorter)
    assert "here 1 |" in sections()[1][1]
    assert VERSION == 1


def test_the_features() -> None:
    assert tuple(names(row["feature"])[0] for row in table(1, "feature")) == FEATURES
    assert "multiplex" not in FEATURES


def test_the_keys_of_a_request() -> None:
    keys = [names(row["key"])[0] for row in table(2, "key")]
    assert keys == [field.name for field in fields(RequestHeader)]
    full = {"id": 7, "deadline": 1.5, "stream": True, "window": (4, 100), "more": "ignored"}
    assert parse_request_header(full) == RequestHeader(7, 1.5, True, Credit(4, 100))
    for absent in ({"id": 7}, {"id": 7, "deadline": None}, {"id": 7, "deadline": float("inf"), "window": None}):
        assert parse_request_header(absent) == RequestHeader(7, None, False, None)
    with pytest.raises(RemoteProtocolError):
        parse_request_header({"id": 7, "deadline": float("nan")})


# -- 3 and 4: envelopes ----------------------------------------------------------------------------------------------------------


def test_the_kinds() -> None:
    rows = table(4, "kind")
    assert [int(row["kind"]) for row in rows] == list(range(10))
    for row in rows:
        assert getattr(_envelope, names(row["name"])[0].upper()) == int(row["kind"])
    with pytest.raises(RemoteProtocolError):
        parse_envelope((len(rows), 1, None))


def test_the_examples_of_the_kinds() -> None:
    values = {0: 3, 2: 3, 3: (3, 4), 6: (8, 224)}
    for row in table(4, "kind"):
        kind = int(row["kind"])
        if kind == _envelope.ERROR:
            continue
        value = values.get(kind)
        assert from_hex(row["frame 0, for id 1"]) == packed((kind, 1, value))
        assert parse_envelope(loads([packed((kind, 1, value))])) == (kind, 1, value)
        assert ("nil" in row["value"]) == (value is None)


# -- 6: windows ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[4], [5, 300, 0], [10, 200_000]])
@pytest.mark.parametrize("padding", [0, 7])
def test_the_size_of_a_message(lengths: list[int], padding: int) -> None:
    frames = [bytes(length) for length in lengths]
    prelude = pack_prelude(frames)
    outer = _U64.unpack_from(prelude)[0] + padding
    data = b"".join((_U64.pack(outer), prelude[8:], *frames, bytes(padding)))
    parser = FrameParser(Limits(message=None, head=None))
    parser.feed(data)
    assert parser.next_message() is not None
    assert parser.last_size == len(data) == 16 + 8 * len(frames) + sum(lengths) + padding


def test_the_example_of_a_window() -> None:
    window = HANDSHAKE["trio-dcore"]["window"]
    size = len(single_frame(packed((_envelope.ITEM, 3, 0))))
    text = " ".join(sections()[6][1].split())

    def grouped(count: int) -> str:
        return f"{count:,}".replace(",", " ")

    assert f"a window of {window[0]} items and {grouped(window[1])} bytes" in text
    left = f"{window[0] - 2} items and {grouped(window[1] - 2 * size)} bytes"
    assert f"so its size is {size}. After two of them the credit is {left}" in text
    assert f"a grant of `[2, {2 * size}]`" in text


# -- 11: extension types ---------------------------------------------------------------------------------------------------------

EXAMPLES = {
    "Decimal": Decimal,
    "UUID": UUID,
    "date": date,
    "datetime": datetime,
    "frozenset": frozenset,
    "numpy": numpy,
    "time": time,
    "timedelta": timedelta,
    "timezone": timezone,
}


def test_the_extension_types_are_all_there() -> None:
    rows = table(11, "code")
    assert sorted(int(row["code"]) for row in rows) == sorted(_extensions._READERS)
    for row in rows:
        assert from_hex(row["byte"]) == (int(row["code"]) % 256).to_bytes()


@pytest.mark.parametrize("row", table(11, "code"), ids=lambda row: row["code"])
def test_the_example_of_an_extension_type(row: dict[str, str]) -> None:
    value = eval(row["example"].strip("`"), EXAMPLES.copy())
    data = from_hex(row["bytes"])
    assert packed(value) == data
    assert from_hex(row["byte"]) in data
    decoded = loads([data], extensions=True)
    assert (type(decoded), decoded) == (type(value), value)


def test_other_codes() -> None:
    assert loads([b"\xd4\x05x"], extensions=True) == msgpack.ExtType(5, b"x")
    assert loads([b"\xd6\xff\0\0\0\1"], extensions=True) == msgpack.Timestamp(1)
    with pytest.raises(RemoteProtocolError):
        loads([b"\xd4\x80x"], extensions=True)


# -- 12: error values ------------------------------------------------------------------------------------------------------------


class Odd(Exception):
    """Not plain: a pickle is needed to tell what it holds."""


def samples() -> list[dict[str, Any]]:
    noted = ValueError("x")
    noted.add_note("n")
    noted.more = 1  # type: ignore[attr-defined]
    limit = LimitExceeded("x", limit="message", value=1, seen=2)
    cancelled = HandlerCancelled("x")
    cancelled.reason = "deadline"
    errors = [
        *(noted, limit, cancelled, ServerClosing("x"), Overloaded("x"), NotAllowed("x"), UnknownOp("x")),
        *(UnsafePayload("x", field="y"), SerializationError("x", path="y"), Odd({1, 2})),
        ExceptionGroup("x", [ValueError("y"), KeyError("z")]),
    ]
    return [error_value(error, trusted=True) for error in errors]


def test_the_keys_of_an_error_value() -> None:
    rows = table(12, "key")
    assert {key for row in rows for key in names(row["key"])} == {key for value in samples() for key in value}
    always = {names(row["key"])[0] for row in rows if row["present"] == "always"}
    assert all(always <= set(value) for value in samples())


def test_the_codes_of_an_error_value() -> None:
    assert {names(row["code"])[0] for row in table(12, "code")} == {value["code"] for value in samples()}


def test_codes_that_promise_that_nothing_was_started() -> None:
    promised = {names(row["code"])[0] for row in table(12, "code") if row["the handler"] == "never started"}
    assert promised == _remote_errors._NOT_STARTED
    for error in (ServerClosing("x"), Overloaded("x"), NotAllowed("x"), UnknownOp("x")):
        assert error_value(error, trusted=False, started=True)["code"] == "error"


def test_an_unknown_code_is_an_error() -> None:
    assert type(exception_from_value({"code": "new", "message": "x"}, allow_pickle=lambda: False)) is RemoteError


def test_the_key_of_a_plain_error_reply() -> None:
    shown = re.search(r"^    (\{\"status\".*\})$", sections()[12][1], re.MULTILINE)
    assert shown is not None
    assert re.findall(r"\"([\w-]+)\":", shown[1]) == list(error_reply(ValueError("x"), trusted=False, extension=True))


def test_the_limits_of_error_values() -> None:
    def value(cell: str) -> int | None:
        return number(cell) if cell[0].isdigit() else None

    text = Limits().error_text
    rows = table(12, "what")
    assert {row["what"]: (value(row["a trio_dcore peer writes at most"]), value(row["and reads at most"])) for row in rows} == {
        "characters of `message`, of `traceback`": (text, _error_decoding._MAX_TEXT),
        "characters of a note": (text, _error_decoding._MAX_TEXT),
        "characters of `type` and the names in `mro`": (_error_text._MAX_NAME, _error_decoding._MAX_NAME),
        "names in `mro`": (_remote_errors._BASES, _error_decoding._MAX_NOTES),
        "`notes`": (_remote_errors._NOTES, _error_decoding._MAX_NOTES),
        "`args`": (text, _error_decoding._MAX_ARGS),
        "`attributes`": (_remote_errors._ATTRIBUTES, _error_decoding._MAX_ATTRIBUTES),
        "members in `errors`": (_remote_errors._LEAVES, _error_decoding._MAX_LEAVES),
        "bytes of `pickle`, over all members": (_error_pickles.MAX_PICKLE, None),
    }


# -- 13: limits ------------------------------------------------------------------------------------------------------------------


def meet(**changes: object) -> object:
    """Negotiate with a peer that says something else in the map of the extension."""
    return negotiate(HANDSHAKE, {**HANDSHAKE, "trio-dcore": {**HANDSHAKE["trio-dcore"], **changes}}).extension


LIMITS: dict[str, Callable[[int], object]] = {
    "`version`": lambda value: meet(version=value),
    "features in a handshake": lambda value: meet(features=["x"] * value),
    "characters of a feature's name": lambda value: meet(features=["x" * value]),
    "each number of a handshake's `window`": lambda value: meet(window=[value, value]),
    "id of a request": lambda value: parse_request_header({"id": value}),
    "id of an envelope": lambda value: parse_envelope((0, value, None)),
    "each number of a grant": lambda value: parse_credit((value, value)),
    "each number of a request's `window`": lambda value: parse_request_header({"id": 1, "window": (value, value)}),
}


@pytest.mark.parametrize("row", table(13, "what"), ids=lambda row: row["what"])
def test_a_limit(row: dict[str, str]) -> None:
    accept = LIMITS[row["what"]]
    low, high = number(row["from"]), number(row["to"])
    for value in (low, high):
        accept(value)
    for value in (low - 1, high + 1):
        if 0 <= value < 2**64:  # all that msgpack has
            with pytest.raises(RemoteProtocolError):
                accept(value)


def test_how_much_of_a_window_is_used() -> None:
    text = " ".join(sections()[13][1].split())
    assert "uses all of the handshake's window" in text
    assert "Its own windows are 16 items and 1 MiB" in text
    extension = meet(window=[2**60, 2**60])
    assert isinstance(extension, Extension)
    assert extension.window == (2**60, 2**60)
    assert (Limits().window, Limits().window_bytes) == (16, 2**20)
