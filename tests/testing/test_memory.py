from __future__ import annotations

import pytest
import trio
import trio.testing

from trio_dcore.testing import MemoryStream, memory_stream_pair


async def make_pair() -> tuple[MemoryStream, MemoryStream]:
    return memory_stream_pair()


async def make_clogged_pair() -> tuple[MemoryStream, MemoryStream]:
    """Both directions are full already."""
    pair = memory_stream_pair(capacity=100)
    for stream in pair:
        assert stream.send_nowait(b"x" * 200) == 100
    return pair


async def test_it_is_a_stream_as_trio_wants_them() -> None:
    await trio.testing.check_half_closeable_stream(make_pair, make_clogged_pair)


async def test_a_sender_waits_for_room() -> None:
    a, b = memory_stream_pair(capacity=10)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send_all, b"0123456789abcde")
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        assert await b.receive_some(3) == b"012"
        await trio.testing.wait_all_tasks_blocked()
        assert await b.receive_some() == b"3456789abc"
        await trio.testing.wait_all_tasks_blocked()
        assert not nursery.child_tasks
    assert await b.receive_some() == b"de"


async def test_send_nowait_sends_what_there_is_room_for() -> None:
    a, b = memory_stream_pair(capacity=4)
    assert a.send_nowait(b"abcdef") == 4
    assert a.send_nowait(b"ef") == 0
    assert await b.receive_some() == b"abcd"
    assert a.send_nowait(b"") == 0
    b.close()
    with pytest.raises(trio.BrokenResourceError):
        a.send_nowait(b"x")
    a.close()
    with pytest.raises(trio.ClosedResourceError):
        a.send_nowait(b"x")


async def test_send_nowait_does_not_get_in_between_the_bytes_of_a_sender() -> None:
    a, b = memory_stream_pair(capacity=4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send_all, b"abcdef")
        await trio.testing.wait_all_tasks_blocked()
        assert await b.receive_some() == b"abcd"
        assert a.send_nowait(b"XY") == 0
        await trio.testing.wait_all_tasks_blocked()
    assert await b.receive_some() == b"ef"


async def test_a_close_lets_the_other_end_read_what_was_sent() -> None:
    a, b = memory_stream_pair()
    await a.send_all(b"last words")
    assert not a.closed
    a.close()
    assert a.closed
    assert not b.closed
    assert await b.receive_some() == b"last words"
    assert await b.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await b.send_all(b"x")


async def test_a_reset_loses_what_is_on_its_way_and_wakes_everybody() -> None:
    a, b = memory_stream_pair(capacity=10)
    await b.send_all(b"0123456789")

    async def broken(operation: object, *args: object) -> None:
        with pytest.raises(trio.BrokenResourceError):
            await operation(*args)  # type: ignore[operator]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(broken, b.send_all, b"more")
        nursery.start_soon(broken, b.receive_some)
        await trio.testing.wait_all_tasks_blocked()
        a.reset()
        nursery.start_soon(broken, a.receive_some)
        nursery.start_soon(broken, a.send_all, b"x")
    assert not a.closed


@pytest.mark.parametrize("size", [0, -1])
async def test_receiving_nothing_is_refused(size: int) -> None:
    a, _ = memory_stream_pair()
    with pytest.raises(ValueError, match="at least 1"):
        await a.receive_some(size)
