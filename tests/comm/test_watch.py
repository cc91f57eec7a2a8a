"""The watch for the end of streams that have no socket."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore.comm import FramedComm, _ahead
from trio_dcore.comm._pumps import YIELD_BYTES
from trio_dcore.comm._watch import READ_AHEAD
from trio_dcore.errors import CommClosedError
from trio_dcore.protocol import dumps
from trio_dcore.protocol._frames import single_frame

PATIENCE = 10.0
settle = trio.testing.wait_all_tasks_blocked


class Told:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture(params=["stream", "memory", "tcp"])
async def watched(request: pytest.FixtureRequest, new_pair: Any, nursery: trio.Nursery) -> Any:
    """(the pair, what is told of the client's end, the nursery of the watching tasks)."""
    async with new_pair(request.param) as pair:
        told = Told()
        pair.server.watch_end(nursery, told)
        await settle(0.01)
        yield pair, told, nursery
        nursery.cancel_scope.cancel()


async def test_the_end_is_told_once(watched: Any) -> None:
    pair, told, _ = watched
    assert told.count == 0
    pair.client.abort()
    await settle(0.02)
    assert told.count == 1
    with pytest.raises(CommClosedError):
        await pair.server.read()
    await settle(0.01)
    assert told.count == 1


async def test_what_comes_meanwhile_is_kept(watched: Any) -> None:
    pair, told, _ = watched
    for n in range(5):
        await pair.client.write(n)
        await settle(0.01)
    pair.client.abort()
    await settle(0.02)
    assert told.count == 1
    assert [message async for message in pair.server] == list(range(5))


async def test_reading_comes_first_and_the_watch_goes_on_after_it(watched: Any) -> None:
    pair, told, nursery = watched
    found = []

    async def reader() -> None:
        found.append(await pair.server.read())

    for n in range(3):
        nursery.start_soon(reader)
        await settle(0.01)
        with pytest.raises(trio.BusyResourceError):
            await pair.server.read()
        await pair.client.write(n)
        await settle(0.01)
    assert found == [0, 1, 2]
    assert told.count == 0
    pair.client.abort()
    await settle(0.02)
    assert told.count == 1


async def test_two_that_want_to_read_at_once(watched: Any) -> None:
    pair, _, nursery = watched
    results: list[object] = []

    async def reader() -> None:
        try:
            results.append(await pair.server.read())
        except trio.BusyResourceError:
            results.append("busy")

    nursery.start_soon(reader)
    nursery.start_soon(reader)
    await settle(0.01)
    await pair.client.write("message")
    await settle(0.01)
    assert sorted(map(str, results)) == ["busy", "message"]


async def test_a_reader_that_is_cancelled_while_it_waits_for_the_watch(watched: Any) -> None:
    pair, told, _ = watched
    with trio.CancelScope() as scope:
        scope.cancel()
        await pair.server.next_head()
    assert scope.cancelled_caught
    await settle(0.01)
    assert not pair.server.closed()
    await pair.client.write("message")
    assert await pair.server.read() == "message"
    with trio.CancelScope() as scope:
        scope.cancel()
        await pair.server.next_head()
    await settle(0.01)
    pair.client.abort()
    await settle(0.02)
    assert told.count == 1


async def test_a_reader_that_is_cancelled_while_it_reads(watched: Any) -> None:
    pair, told, _ = watched
    with trio.move_on_after(0.02) as scope:
        await pair.server.read()
    assert scope.cancelled_caught
    await settle(0.01)
    pair.client.abort()
    await settle(0.02)
    assert told.count == 1


async def test_stopped_it_tells_nothing(watched: Any) -> None:
    pair, told, _ = watched
    pair.server.unwatch_end()
    pair.server.unwatch_end()
    pair.client.abort()
    await settle(0.02)
    assert told.count == 0
    pair.server.unwatch_end()
    with pytest.raises(CommClosedError):
        await pair.server.read()


async def test_stopped_it_leaves_the_comm_to_readers(watched: Any) -> None:
    pair, told, nursery = watched
    for n in range(3):
        pair.server.unwatch_end()
        await pair.client.write(n)
        assert await pair.server.read() == n
        pair.server.watch_end(nursery, told)
    pair.server.unwatch_end()


async def test_closing_here_is_not_told(watched: Any) -> None:
    pair, told, nursery = watched
    pair.server.abort()
    await settle(0.02)
    assert told.count == 0
    with pytest.raises(trio.ClosedResourceError):
        await pair.server.receive()
    await settle(0.01)
    assert told.count == 0
    assert not [task for task in nursery.child_tasks if "watching" in task.name]


async def test_a_reset_is_told_and_remembered(watched: Any) -> None:
    pair, told, _ = watched
    if pair.kind == "tcp":
        pair.client._pump.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01" + bytes(3) + bytes(4))
        pair.client._pump.socket.close()
    elif pair.kind == "memory":
        pair.streams[0].reset()
    else:
        pytest.skip("these streams know no reset")
    await settle(0.02)
    assert told.count == 1
    with pytest.raises(CommClosedError, match=r"^reading from .* failed: "):
        await pair.server.read()


async def test_an_end_inside_a_message(watched: Any) -> None:
    pair, told, _ = watched
    await pair.client._pump.send([single_frame(dumps("message")[0])[:-1]], 0)
    pair.client.abort()
    await settle(0.02)
    assert told.count == 1
    with pytest.raises(CommClosedError, match="in the middle of a message"):
        await pair.server.read()


async def test_no_more_is_read_ahead_than_so_much(watched: Any) -> None:
    """A peer that sends and sends while a handler runs waits, as it does for any reader."""
    pair, told, nursery = watched

    async def send() -> None:
        for _ in range(400):
            await pair.client.write(b"x" * 10_000)
        await pair.client.aclose()

    nursery.start_soon(send)
    await settle(0.05)
    assert READ_AHEAD <= pair.server.buffered < READ_AHEAD + 64 * 1024
    assert told.count == 0
    with trio.fail_after(PATIENCE):
        for _ in range(400):
            assert len(await pair.server.read()) == 10_000
    await settle(0.02)
    assert told.count == 1


async def test_whatever_a_stream_raises_is_an_end(over_stream: Any, nursery: trio.Nursery) -> None:
    class Broken(trio.abc.Stream):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.lowlevel.checkpoint()
            raise RuntimeError("what a stream must not raise")

        async def send_all(self, data: Any) -> None:
            raise NotImplementedError

        async def wait_send_all_might_not_block(self) -> None:
            raise NotImplementedError

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    comm: FramedComm = over_stream(Broken())
    told = Told()
    comm.watch_end(nursery, told)
    await settle()
    assert told.count == 1
    with pytest.raises(CommClosedError, match="what a stream must not raise"):
        await comm.read()
    nursery.cancel_scope.cancel()


async def test_a_nursery_that_is_cancelled(new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        told = Told()
        async with trio.open_nursery() as nursery:
            pair.server.watch_end(nursery, told)
            await settle()
            nursery.cancel_scope.cancel()
        assert told.count == 0
        await pair.client.write("message")
        pair.server.unwatch_end()
        assert await pair.server.read() == "message"


async def test_bytes_that_come_without_a_pause_do_not_keep_it(new_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that need not wait delivers no cancellation."""
    rounds = 0

    async def always_something(comm: FramedComm) -> bool:
        nonlocal rounds
        rounds += 1
        await trio.lowlevel.cancel_shielded_checkpoint()
        return rounds < 1000

    monkeypatch.setattr(FramedComm, "wait_incoming", always_something)
    async with new_pair("tcp") as pair, trio.open_nursery() as nursery:
        pair.server.watch_end(nursery, Told(), lambda: True)
        await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert rounds < 1000


async def test_what_is_read_on_meanwhile_does_not_change_the_size_of_a_message(
    new_pair: Any, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which credit is counted."""
    async with new_pair("tcp") as pair:
        comm = pair.server
        comm.watch_end(nursery, Told(), lambda: comm.read_ahead(5, 2**20, fill=False))
        await pair.client.write("small")
        await settle(0.01)

        async def others_run() -> None:
            await pair.client.write("x" * 1000)
            await settle(0.01)

        monkeypatch.setattr(_ahead, "cancel_shielded_checkpoint", others_run)
        comm._pump.unwaited = YIELD_BYTES
        assert await comm.next_head() == ("small", None)
        assert comm.last_message_size == len(single_frame(dumps("small")[0]))
        nursery.cancel_scope.cancel()
