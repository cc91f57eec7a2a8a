"""What waits to be sent: batches that are encoded piece by piece and read back as one list."""

from __future__ import annotations

from typing import Any

import pytest

from trio_dcore import SerializationError, to_serialize
from trio_dcore.comm._outbox import Outbox


async def test_payloads_are_numbered_through_the_batch(framed: Any) -> None:
    outbox = Outbox(framed.client, None)
    sent = [b"plain", {"a": to_serialize(b"1"), "b": to_serialize([b"2", b"3"])}, {4}, {"c": 2**70}, to_serialize(b"5")]
    for message in sent:
        outbox.put(message)
    assert (outbox.count, len(outbox)) == (5, 1)
    assert outbox.unsent == sent
    before = framed.client.bytes_written
    count, size = await outbox.write_next()
    assert size == framed.client.bytes_written - before
    assert (count, outbox.count, len(outbox), outbox.unsent, outbox.maybe_sent) == (5, 0, 0, [], [])
    assert await framed.server.read() == (b"plain", {"a": b"1", "b": [b"2", b"3"]}, {4}, {"c": 2**70}, b"5")


async def test_a_message_that_is_put_while_another_is_encoded(framed: Any) -> None:
    """The other's payloads keep their numbers, those in front of the message put and those behind."""
    outbox = Outbox(framed.client, None)

    class Chatty:
        def __reduce__(self) -> Any:
            outbox.put({"inner": to_serialize(b"inner")})
            return str, ("outer",)

    outbox.put({"first": to_serialize(b"first")})
    outbox.put({"in front": to_serialize(b"in front"), "outer": Chatty(), "behind": to_serialize(b"behind")})
    outbox.put({"last": to_serialize(b"last")})
    found: list[Any] = []
    while outbox:
        await outbox.write_next()
        found += await framed.server.read()
    inner = {"inner": b"inner"}
    assert [message for message in found if message != inner] == [
        {"first": b"first"},
        {"in front": b"in front", "outer": "outer", "behind": b"behind"},
        {"last": b"last"},
    ]
    assert inner in found


async def test_a_failed_message_leaves_all_as_it_was(framed: Any) -> None:
    outbox = Outbox(framed.client, None)
    for message in (1, to_serialize(b"2")):
        outbox.put(message)
        with pytest.raises(SerializationError):
            outbox.put({"data": to_serialize(b"payload"), "bad": "\ud800"})
    outbox.put(to_serialize(b"3"))
    assert (outbox.count, len(outbox)) == (3, 1)
    await outbox.write_next()
    assert await framed.server.read() == (1, b"2", b"3")
