"""Opted-in requests and envelopes: what is one, and what is not (docs/wire-extension.md, sections 2 to 4)."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_dcore.protocol import RemoteProtocolError
from trio_dcore.protocol._envelope import (
    CANCEL,
    END,
    ERROR,
    GOODBYE,
    ITEM,
    ITEMS,
    KEY,
    PING,
    PONG,
    REPLY,
    WINDOW,
    Credit,
    RequestHeader,
    parse_credit,
    parse_envelope,
    parse_request_header,
)

LARGEST_ID = 2**63 - 1
LARGEST_CREDIT = 2**40
HUGE = 10**5000  # str() of it raises

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50) | st.binary(max_size=50),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=8,
)


def test_the_numbers_are_the_wires() -> None:
    kinds = [REPLY, ERROR, ITEM, ITEMS, END, CANCEL, WINDOW, PING, PONG, GOODBYE]
    assert kinds == list(range(10))
    assert KEY == "trio-dcore"


class TestEnvelope:
    @pytest.mark.parametrize("kind", range(10))
    @pytest.mark.parametrize("identity", [0, 1, LARGEST_ID])
    def test_what_is_one(self, kind: int, identity: int) -> None:
        value = object()
        assert parse_envelope((kind, identity, value)) == (kind, identity, value)

    @pytest.mark.parametrize(
        "message",
        [None, 1, "OK", b"", {}, {"op": "x"}, [0, 1, None], (), (0,), (0, 1), (0, 1, 2, 3)]
        + [(-1, 1, None), (10, 1, None), (True, 1, None), (0.0, 1, None), ("0", 1, None), (None, 1, None)]
        + [
            (0, -1, None),
            (0, 2**63, None),
            (0, True, None),
            (0, 1.0, None),
            (0, "1", None),
            (0, None, None),
            (0, HUGE, None),
            (HUGE, 1, None),
        ]
        + [namedtuple("Envelope", "kind id value")(0, 1, None)],
    )
    def test_what_is_none(self, message: Any) -> None:
        with pytest.raises(RemoteProtocolError, match=r"expected an envelope \[kind, id, value\], got"):
            parse_envelope(message)

    @given(anything)
    def test_anything(self, message: Any) -> None:
        try:
            kind, identity, _ = parse_envelope(message)
        except RemoteProtocolError:
            return
        assert 0 <= kind <= 9
        assert 0 <= identity <= LARGEST_ID


class TestCredit:
    @pytest.mark.parametrize("items", [0, 1, LARGEST_CREDIT])
    @pytest.mark.parametrize("size", [0, 1, LARGEST_CREDIT])
    def test_what_is_one(self, items: int, size: int) -> None:
        assert parse_credit((items, size)) == Credit(items, size)

    @pytest.mark.parametrize(
        "value",
        [None, 5, "12", {}, [1, 1], (), (1,), (1, 1, 1), (-1, 1), (1, -1), (LARGEST_CREDIT + 1, 1), (1, LARGEST_CREDIT + 1)]
        + [(True, 1), (1, False), (1.0, 1), ("1", 1), (None, None), (HUGE, 1)],
    )
    def test_what_is_none(self, value: Any) -> None:
        with pytest.raises(RemoteProtocolError, match=r"a window is .*, not \[items, bytes\]"):
            parse_credit(value)

    @given(anything)
    def test_anything(self, value: Any) -> None:
        try:
            credit = parse_credit(value)
        except RemoteProtocolError:
            return
        assert 0 <= credit.items <= LARGEST_CREDIT


class TestRequestHeader:
    def test_the_least(self) -> None:
        assert parse_request_header({"id": 1}) == RequestHeader(1, None, False, None)
        assert parse_request_header({"id": LARGEST_ID}).id == LARGEST_ID

    def test_all_of_it(self) -> None:
        header = parse_request_header({"id": 7, "deadline": 2.5, "stream": True, "window": (3, 4)})
        assert header == RequestHeader(7, 2.5, True, Credit(3, 4))

    @pytest.mark.parametrize(
        ("deadline", "seconds"),
        [(None, None), (math.inf, None), (5, 5.0), (0, 0.0), (-0.5, -0.5), (-7, -1.0), (1e300, None), (-math.inf, -1.0)],
    )
    def test_deadlines(self, deadline: Any, seconds: float | None) -> None:
        found = parse_request_header({"id": 1, "deadline": deadline}).deadline
        assert found == seconds
        assert found is None or type(found) is float

    def test_what_is_not_known_is_ignored(self) -> None:
        assert parse_request_header({"id": 1, "colour": "green", 5: None}) == RequestHeader(1)

    def test_an_absent_window(self) -> None:
        assert parse_request_header({"id": 1, "window": None, "stream": False}) == RequestHeader(1)

    @pytest.mark.parametrize("value", [None, 1, "id", [], (("id", 1),), True])
    def test_what_is_no_map(self, value: Any) -> None:
        with pytest.raises(RemoteProtocolError, match="the request's 'trio-dcore' is .*, not a map"):
            parse_request_header(value)

    @pytest.mark.parametrize("identity", [None, 0, -1, LARGEST_ID + 1, True, 1.0, "1", b"1", (), pytest.param(HUGE, id="huge")])
    def test_what_is_no_id(self, identity: Any) -> None:
        with pytest.raises(RemoteProtocolError, match="the request's id is .*, not an integer from 1"):
            parse_request_header({"id": identity})
        with pytest.raises(RemoteProtocolError, match="id is None"):
            parse_request_header({"stream": True})

    @pytest.mark.parametrize("deadline", ["soon", math.nan, True, (), {}, b"1"])
    def test_what_is_no_deadline(self, deadline: Any) -> None:
        with pytest.raises(RemoteProtocolError, match="the request's deadline is .*, not a number of seconds"):
            parse_request_header({"id": 1, "deadline": deadline})

    @pytest.mark.parametrize("deadline", [10**400, -(10**400)], ids=["far", "long ago"])
    def test_a_deadline_that_no_float_holds(self, deadline: int) -> None:
        """Such integers are among the extension types."""
        found = parse_request_header({"id": 1, "deadline": deadline}).deadline
        assert found == (None if deadline > 0 else -1.0)

    @pytest.mark.parametrize("stream", [None, 0, 1, "yes", ()])
    def test_what_is_no_stream_flag(self, stream: Any) -> None:
        with pytest.raises(RemoteProtocolError, match="the request's stream flag is .*, not a bool"):
            parse_request_header({"id": 1, "stream": stream})

    @pytest.mark.parametrize("window", [5, (), (1, -1), [1, 1], "wide"])
    def test_what_is_no_window(self, window: Any) -> None:
        with pytest.raises(RemoteProtocolError, match="a window is"):
            parse_request_header({"id": 1, "window": window})

    @given(
        anything
        | st.fixed_dictionaries(
            {"id": st.integers(1, 9)}, optional={"deadline": anything, "stream": anything, "window": anything}
        )
    )
    def test_anything(self, value: Any) -> None:
        try:
            header = parse_request_header(value)
        except RemoteProtocolError:
            return
        assert 1 <= header.id <= LARGEST_ID
        assert header.deadline is None or (type(header.deadline) is float and header.deadline < math.inf)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 1000, "x" * 40),
        (b"x" * 1000, "x" * 40),
        ([1] * 1000, "a list"),
        pytest.param(HUGE, "bits", id="huge"),
        (None, "None"),
    ],
)
def test_what_is_shown_of_a_peers_value_is_short(value: Any, shown: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_envelope(value)
    assert shown in str(caught.value)
    assert len(str(caught.value)) < 150
