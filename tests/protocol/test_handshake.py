"""Handshakes: what is sent, what two of them come to, and what is none."""

from __future__ import annotations

import sys
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trio_dcore.protocol._errors import RemoteProtocolError
from trio_dcore.protocol._handshake import FEATURES, Extension, local_handshake, negotiate

# The same examples in every run, and no verdict on how busy the machine is.
SOBER = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

LOCAL = local_handshake(compression=None, window=(16, 2**20))

#: What a stock peer sends, as the wire document has it in appendix A.
STOCK = {"compression": None, "python": (3, 11, 7), "pickle-protocol": 5}


def over_the_wire(message: object) -> Any:
    return msgpack.unpackb(msgpack.packb(message, use_bin_type=True), use_list=False, strict_map_key=False)


def with_extension(**changes: object) -> dict[str, Any]:
    ours = {"version": 1, "features": ("calls", "streams"), "window": (16, 2**20)}
    ours.update(changes)
    return {**STOCK, "trio-dcore": {key: value for key, value in ours.items() if value is not ...}}


def test_the_local_handshake_is_dasks_with_one_more_key() -> None:
    assert list(LOCAL) == ["compression", "python", "pickle-protocol", "trio-dcore"]
    assert {
        "compression": None,
        "python": list(sys.version_info[:3]),
        "pickle-protocol": 5,
        "trio-dcore": {"version": 1, "features": list(FEATURES), "window": [16, 2**20]},
    } == LOCAL


def test_the_first_three_keys_have_the_bytes_of_a_stock_peer() -> None:
    ours = {key: value for key, value in LOCAL.items() if key != "trio-dcore"} | {"python": [3, 11, 7]}
    captured = "83ab636f6d7072657373696f6ec0a6707974686f6e93030b07af7069636b6c652d70726f746f636f6c05"  # wire document, appendix A
    assert msgpack.packb(ours).hex() == captured


def test_two_of_ours() -> None:
    remote = over_the_wire(local_handshake(compression="lz4", window=(4, 1000)))
    result = negotiate(local_handshake(compression="lz4", window=(16, 2**20)), remote)
    assert result.compression == "lz4"
    assert result.pickle_protocol == 5
    assert result.python == sys.version_info[:3]
    # The peer's window, not ours: it is what the peer lets us send.
    assert result.extension == Extension(1, frozenset(FEATURES), (4, 1000))
    assert result.remote is remote


def test_a_stock_peer() -> None:
    result = negotiate(LOCAL, STOCK)
    assert (result.compression, result.pickle_protocol, result.python, result.extension) == (None, 5, (3, 11, 7), None)


def test_stock_code_accepts_ours() -> None:
    """By the function that a stock peer calls."""
    from distributed.comm.core import Comm

    stock = {"compression": "lz4", "python": (3, 11, 7), "pickle-protocol": 4}
    ours = over_the_wire(local_handshake(compression="lz4", window=(16, 2**20)))
    assert Comm.handshake_configuration(stock, ours) == {"pickle-protocol": 4, "compression": "lz4"}


def test_the_extension_can_be_off_here() -> None:
    local = {key: value for key, value in LOCAL.items() if key != "trio-dcore"}
    assert negotiate(local, over_the_wire(LOCAL)).extension is None


@pytest.mark.parametrize(
    ("ours", "theirs", "both"),
    [("lz4", "lz4", "lz4"), ("lz4", None, None), (None, "lz4", None), ("lz4", "zlib", None), (None, "no such codec", None)],
)
def test_compression_is_what_both_say(ours: str | None, theirs: str | None, both: str | None) -> None:
    local = local_handshake(compression=ours, window=(1, 1))
    assert negotiate(local, {**STOCK, "compression": theirs}).compression == both


@pytest.mark.parametrize(("theirs", "both"), [(4, 4), (5, 5), (6, 5), (0, 0)])
def test_the_pickle_protocol_is_the_lower_one(theirs: int, both: int) -> None:
    assert negotiate(LOCAL, {**STOCK, "pickle-protocol": theirs}).pickle_protocol == both


def test_python_may_be_missing() -> None:
    assert negotiate(LOCAL, {"compression": None, "pickle-protocol": 5}).python == ()


def test_unknown_keys_are_kept() -> None:
    remote = {**STOCK, "address": "tcp://1.2.3.4:5", "future": {"nested": (1, 2)}, 7: None}
    assert negotiate(LOCAL, remote).remote == remote
    extension = negotiate(LOCAL, with_extension(future=1)).extension
    assert extension is not None


def test_a_later_version_contains_this_one() -> None:
    remote = with_extension(version=7, features=("calls", "streams", "teleport"))
    assert negotiate(LOCAL, remote).extension == Extension(1, frozenset({"calls", "streams"}), (16, 2**20))


def test_a_feature_is_there_only_if_both_have_it() -> None:
    extension = negotiate(LOCAL, with_extension(features=["streams", "types"])).extension
    assert extension is not None
    assert extension.features == {"streams", "types"}


def test_all_of_a_large_window_is_used() -> None:
    """Else the peer, which grants more when half of it has been taken, and who sends would wait for each other."""
    extension = negotiate(LOCAL, with_extension(window=(2**63, 2**63))).extension
    assert extension is not None
    assert extension.window == (2**63, 2**63)


@pytest.mark.parametrize(
    ("remote", "key"),
    [
        (None, "map"),
        ("HTTP/1.1 400", "HTTP"),
        ([("compression", None)], "map"),
        ({}, "'compression'"),
        ({"compression": None}, "'pickle-protocol'"),
        ({"pickle-protocol": 5}, "'compression'"),
        ({**STOCK, "compression": 5}, "'compression'"),
        ({**STOCK, "compression": b"lz4"}, "'compression'"),
        ({**STOCK, "compression": "x" * 65}, "'compression'"),
        ({**STOCK, "compression": {"a": 1}}, "'compression'"),
        ({**STOCK, "pickle-protocol": None}, "'pickle-protocol'"),
        ({**STOCK, "pickle-protocol": "5"}, "'pickle-protocol'"),
        ({**STOCK, "pickle-protocol": True}, "'pickle-protocol'"),
        ({**STOCK, "pickle-protocol": 5.0}, "'pickle-protocol'"),
        ({**STOCK, "pickle-protocol": -1}, "'pickle-protocol'"),
        ({**STOCK, "pickle-protocol": 101}, "'pickle-protocol'"),
        ({**STOCK, "pickle-protocol": 2**63}, "'pickle-protocol'"),
        ({**STOCK, "python": None}, "'python'"),
        ({**STOCK, "python": "3.11"}, "'python'"),
        ({**STOCK, "python": (3, "11")}, "'python'"),
        ({**STOCK, "python": (3,) * 9}, "'python'"),
        ({**STOCK, "python": (-3, 11)}, "'python'"),
        ({**STOCK, "trio-dcore": None}, "'trio-dcore'"),
        ({**STOCK, "trio-dcore": 1}, "'trio-dcore'"),
        (with_extension(version=...), "'trio-dcore.version'"),
        (with_extension(version=0), "'trio-dcore.version'"),
        (with_extension(version=True), "'trio-dcore.version'"),
        (with_extension(version="1"), "'trio-dcore.version'"),
        (with_extension(version=2**40), "'trio-dcore.version'"),
        (with_extension(features=...), "'trio-dcore.features'"),
        (with_extension(features="calls"), "'trio-dcore.features'"),
        (with_extension(features=(1,)), "'trio-dcore.features'"),
        (with_extension(features=("x" * 65,)), "'trio-dcore.features'"),
        (with_extension(features=("x",) * 65), "'trio-dcore.features'"),
        (with_extension(window=...), "'trio-dcore.window'"),
        (with_extension(window=None), "'trio-dcore.window'"),
        (with_extension(window=(1,)), "'trio-dcore.window'"),
        (with_extension(window=(1, 2, 3)), "'trio-dcore.window'"),
        (with_extension(window=(0, 1)), "'trio-dcore.window'"),
        (with_extension(window=(1, 0)), "'trio-dcore.window'"),
        (with_extension(window=(1, -5)), "'trio-dcore.window'"),
        (with_extension(window=(True, 1)), "'trio-dcore.window'"),
        (with_extension(window=(1, 1.5)), "'trio-dcore.window'"),
        (with_extension(window=(1, 2**65)), "'trio-dcore.window'"),
    ],
)
def test_what_is_no_handshake(remote: object, key: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        negotiate(LOCAL, remote)
    assert key in str(caught.value)


def test_the_text_says_what_was_there_in_few_words() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        negotiate(LOCAL, {**STOCK, "pickle-protocol": "five"})
    assert "'five'" in str(caught.value)
    with pytest.raises(RemoteProtocolError) as caught:
        negotiate(LOCAL, {**STOCK, "python": [["x" * 10_000] * 10_000] * 1000})
    assert len(str(caught.value)) < 400
    with pytest.raises(RemoteProtocolError, match="has a list as 'python'"):
        negotiate(LOCAL, {**STOCK, "python": [1 << 20_000]})  # repr() of which raises


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
extensions = st.fixed_dictionaries({}, optional={"version": values, "features": values, "window": values})
handshakes = st.fixed_dictionaries(
    {},
    optional={
        "compression": values | st.just(None),
        "python": values,
        "pickle-protocol": values | st.just(5),
        "trio-dcore": values | extensions,
    },
)


@settings(SOBER, max_examples=200)
@given(values | handshakes)
def test_anything_is_a_handshake_or_a_protocol_error(remote: object) -> None:
    try:
        result = negotiate(LOCAL, remote)
    except RemoteProtocolError as exc:
        assert len(str(exc)) < 500  # noqa: PT017 - either outcome is right, this is about one of them
    else:
        assert result.compression is None
        assert 0 <= result.pickle_protocol <= 5
        assert result.remote is remote
