"""Messages that were encoded one by one are, joined, what the list of them would be."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from trio_dcore.protocol import to_serialize
from trio_dcore.protocol._batches import Batch
from trio_dcore.protocol._context import EncodeContext
from trio_dcore.protocol._encoding import Encoder
from trio_dcore.protocol._messages import dumps


def joined(messages: list[Any]) -> tuple[list[bytes], Batch]:
    encoder = Encoder(EncodeContext())
    batch = Batch()
    for message in messages:
        encoder.payloads_before = batch.payloads
        assert batch.take(encoder.encode(message))
    return [bytes(frame) for frame in batch.frames()], batch


@pytest.mark.parametrize("count", [0, 1, 15, 16, 2**16 - 1, 2**16])
def test_every_length_of_list(count: int) -> None:
    (frame,), batch = joined([7] * count)
    assert frame == msgpack.packb([7] * count)
    assert batch.payloads == 0


def test_the_same_bytes_as_one_encoding_of_the_list() -> None:
    messages = [
        {"op": "a", "x": [1, None, "ü"]},
        {"data": to_serialize(b"1"), "more": to_serialize([b"2", {"three": b"3"}])},
        {"__Set__": True, "as-list": ()},  # no marker, but it looks like one
        {1, 2},
        2**70,
        to_serialize(bytearray(5)),
    ]
    frames, batch = joined(messages)
    assert frames == [bytes(frame) for frame in dumps(messages)]
    assert batch.payloads == len(frames) - 1


def test_an_encoder_forgets_what_stood_before() -> None:
    encoder = Encoder(EncodeContext())
    alone = encoder.encode({"data": to_serialize(b"1")})
    encoder.payloads_before = 3
    assert msgpack.unpackb(encoder.encode({"data": to_serialize(b"1")})[0]) == {"data": {"__Serialized__": 4}}
    encoder.payloads_before = 0
    assert encoder.encode({"data": to_serialize(b"1")}) == alone


@pytest.mark.parametrize(
    ("frames", "room"),
    [([b"x" * 2**17], 4), ([b"x", *[b"y"] * 100], 2), ([b"x", b"y" * 2**24], 1), ([b"x" * 2**20], 1), ([b"x", b"y" * 2**26], 1)],
)
def test_a_batch_is_full_before_a_stranger_refuses_it(frames: list[Any], room: int) -> None:
    """Twice the room is the limit: 1 MiB of head, 64 MiB in all; of frames four times.  The first message is always taken."""
    batch = Batch()
    for _ in range(room):
        assert batch.take(frames)
    before = batch.frames()
    assert not batch.take(frames)
    assert batch.frames() == before
    assert batch.payloads == room * (len(frames) - 1)


def test_counting_without_keeping() -> None:
    batch = Batch()
    for _ in range(4):
        assert batch.take([b"x" * 2**17], keep=False)
    assert not batch.take([b"x" * 2**17], keep=False)
    assert batch.frames() == [b"\x90"]
