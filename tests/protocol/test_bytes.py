"""One value to bytes and back, with stock Dask at the other end."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import numpy as np
import pytest
from distributed.protocol import deserialize_bytes as stock_deserialize_bytes
from distributed.protocol import serialize_bytes as stock_serialize_bytes
from hypothesis import given
from hypothesis import strategies as st

from trio_dcore.protocol import (
    DcoreError,
    LimitExceeded,
    RemoteProtocolError,
    UnsafePayload,
    deserialize_bytes,
    serialize_bytelist,
    serialize_bytes,
)

VALUES: list[Any] = [1, "text", [1, 2], {"a": np.arange(5)}, np.zeros(100_000), b"", slice(1, 2), np.zeros(0), None]


def same(found: Any, value: Any) -> None:
    if isinstance(value, dict):
        assert found.keys() == value.keys()
        for key in value:
            same(found[key], value[key])
    elif isinstance(value, np.ndarray):
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)
    else:
        assert found == value


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("codec", ["auto", "zlib", None])
def test_both_ways(value: Any, codec: str | None) -> None:
    data = serialize_bytes(value, compression=codec)
    for form in (data, bytearray(data), memoryview(data)):
        same(deserialize_bytes(form), value)
    same(stock_deserialize_bytes(data), value)
    if codec != "zlib":  # there stock has lz4
        same(deserialize_bytes(stock_serialize_bytes(value, compression=codec)), value)


def test_it_is_compressed_if_that_pays() -> None:
    zeros = np.zeros(100_000)
    assert len(serialize_bytes(zeros)) < 10_000
    assert len(serialize_bytes(zeros, compression=None)) > 800_000
    with pytest.raises(ValueError, match="brotli"):
        serialize_bytes(zeros, compression="brotli")


def test_nothing_large_is_copied() -> None:
    array = np.arange(100_000)
    pieces = serialize_bytelist(array, compression=None)
    assert b"".join(pieces) == serialize_bytes(array, compression=None)
    assert np.shares_memory(np.frombuffer(pieces[-1], array.dtype), array)


def test_families() -> None:
    with pytest.raises(TypeError):
        deserialize_bytes(serialize_bytes(1, serializers=["pickle"]), deserializers=["msgpack"])
    assert deserialize_bytes(serialize_bytes(1, serializers=["msgpack"]), deserializers=["msgpack"]) == 1


def test_strangers() -> None:
    with pytest.raises(UnsafePayload):
        deserialize_bytes(serialize_bytes(object), trusted=False)
    same(deserialize_bytes(serialize_bytes(np.arange(3)), trusted=False), np.arange(3))
    with pytest.raises(LimitExceeded):
        deserialize_bytes(serialize_bytes(np.zeros(100_000)), most=100_000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        bytes(8),
        struct.pack("<Q", 1),
        struct.pack("<QQ", 1, 0),
        struct.pack("<QQ", 1, 1) + b"\xc1",
        struct.pack("<QQ", 1, 1) + b"\x01",
        struct.pack("<QQ", 1, 1) + b"\x80\x80",
        struct.pack("<Q", 2**63) + bytes(16),
        struct.pack("<QQ", 1, 2**63) + b"\x80",
        struct.pack("<QQQ", 2, 2**64 - 1, 2) + b"\x80",
    ],
    ids=repr,
)
def test_what_is_none(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        deserialize_bytes(data)


@given(st.data())
def test_anything_is_a_value_or_a_typed_error(drawn: Any) -> None:
    data = bytearray(serialize_bytes(np.arange(3)))
    for _ in range(drawn.draw(st.integers(1, 3))):
        data[drawn.draw(st.integers(0, len(data) - 1))] = drawn.draw(st.integers(0, 255))
    try:
        deserialize_bytes(data, trusted=False)
    except (DcoreError, TypeError):
        pass


def test_the_header_says_how_many_frames() -> None:
    pieces = serialize_bytelist([np.ones(2), np.ones(3)])
    assert msgpack.unpackb(pieces[1])["count"] == 2
