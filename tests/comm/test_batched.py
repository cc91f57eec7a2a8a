"""BatchedSend: when batches leave, what becomes of every message, and how it ends."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore import (
    BatchedSend,
    Comm,
    CommClosedError,
    ConnectError,
    LimitExceeded,
    Limits,
    LocalProtocolError,
    SerializationError,
    Server,
    UnsafePayload,
    connect,
    rpc,
    to_serialize,
)
from trio_dcore.testing import MemoryNetwork, SweepError, cancel_sweep, memory_network, wire_sweep

blocked = trio.testing.wait_all_tasks_blocked


class Reader:
    """Reads a comm in a task and notes each list with the time at which it came."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.batches: list[tuple[float, Any]] = []
        self.ended = False

    @property
    def messages(self) -> list[Any]:
        return [message for _, batch in self.batches for message in batch]

    async def run(self) -> None:
        start = trio.current_time()
        try:
            async for batch in self._comm:
                self.batches.append((round(trio.current_time() - start, 9), batch))
        except (CommClosedError, trio.ClosedResourceError):
            pass
        self.ended = True


@asynccontextmanager
async def reading(comm: Any) -> AsyncIterator[Reader]:
    """A Reader for one block, which ends when all that was sent has been read."""
    reader = Reader(comm)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        yield reader
        await blocked()
        nursery.cancel_scope.cancel()


# More than is on its way in memory: the write of it waits in its middle.
BIG = "x" * 200_000


# -- when batches leave ----------------------------------------------------------------------------------------------------------


async def test_the_first_message_leaves_at_once_and_then_one_batch_in_each_interval(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair, reading(pair.server) as reader:
        async with BatchedSend(pair.client, interval=0.01) as stream:
            stream.send("a")
            stream.send("b", "c")
            await trio.sleep(0.004)
            stream.send("d")
            await trio.sleep(0.005)
            stream.send("e")
            await trio.sleep(0.016)  # 0.025: the interval of the batch at 0.01 is over
            stream.send("f")
            await trio.sleep(1)
            stream.send("g")
    assert reader.batches == [(0, ("a", "b", "c")), (0.01, ("d", "e")), (0.025, ("f",)), (1.025, ("g",))]
    assert (stream.message_count, stream.batch_count) == (7, 4)


async def test_messages_of_before_the_start_leave_with_it(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair, reading(pair.server) as reader:
        stream = BatchedSend(pair.client)
        stream.send(1)
        stream.send(2)
        async with stream:
            stream.send(3)
    assert reader.batches == [(0, (1, 2, 3))]


async def test_the_rest_leaves_with_the_block_and_not_with_the_interval(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair, reading(pair.server) as reader:
        start = trio.current_time()
        async with BatchedSend(pair.client, interval="10 s") as stream:
            stream.send(1)
            await blocked()
            stream.send(2)
        assert trio.current_time() == start
    assert reader.batches == [(0, (1,)), (0, (2,))]


async def test_without_an_interval_every_turn_is_a_batch(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair, reading(pair.server) as reader:
        async with BatchedSend(pair.client, interval=0) as stream:
            for i in range(3):
                stream.send(i)
                await blocked()
    assert [batch for _, batch in reader.batches] == [(0,), (1,), (2,)]


class _Steps(trio.abc.Instrument):
    def __init__(self) -> None:
        self.of: list[str] = []

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.of.append(task.name)


async def test_an_idle_stream_has_no_timer_and_makes_no_step(mock_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair, reading(pair.server):
        async with BatchedSend(pair.client) as stream:
            stream.send(1)
            await blocked()
            steps = _Steps()
            trio.lowlevel.add_instrument(steps)
            mock_clock.jump(3600)
            await blocked()
            trio.lowlevel.remove_instrument(steps)
            assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf
            assert not [name for name in steps.of if "BatchedSend" in name]


async def test_what_it_is_made_with(new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        with pytest.raises(ValueError, match="interval='2'"):
            BatchedSend(pair.client, "2")
        with pytest.raises(ValueError, match="max_buffered=0"):
            BatchedSend(pair.client, max_buffered=0)


# -- what is sent ----------------------------------------------------------------------------------------------------------------


async def test_every_kind_of_message_over_every_kind_of_comm(pair: Any) -> None:
    sent = [1, "two", {"op": "three", "x": [1, {2}]}, None, [], {"data": to_serialize(b"four")}, (5, to_serialize([6, b"7"]))]
    before = pair.server.bytes_read
    async with reading(pair.server) as reader:
        async with BatchedSend(pair.client) as stream:
            for message in sent:
                stream.send(message)
    (batch,) = [batch for _, batch in reader.batches]
    if pair.kind == "inproc":
        assert batch == [*sent[:5], {"data": b"four"}, (5, [6, b"7"])]
    else:
        assert batch == (1, "two", {"op": "three", "x": (1, {2})}, None, (), {"data": b"four"}, (5, [6, b"7"]))
    assert (stream.message_count, stream.batch_count) == (7, 1)
    assert stream.byte_count == (1 if pair.kind == "inproc" else pair.server.bytes_read - before)


async def test_what_is_sent_is_what_the_message_was_then(framed: Any) -> None:
    async with reading(framed.server) as reader:
        async with BatchedSend(framed.client) as stream:
            message = {"x": 1}
            stream.send(message)
            message["x"] = 2
            stream.send(message)
    assert reader.messages == [{"x": 1}, {"x": 2}]


async def test_a_message_that_cant_be_sent_costs_no_other(framed: Any) -> None:
    async with reading(framed.server) as reader:
        async with BatchedSend(framed.client) as stream:
            stream.send(1)
            with pytest.raises(SerializationError) as caught:
                stream.send({"lock": [threading.Lock()]})
            assert caught.value.path == "lock[0]"
            with pytest.raises(SerializationError, match="Lock|lock") as caught:
                stream.send(2, to_serialize(threading.Lock()), 3)
            assert "Message 2 of 3" in caught.value.__notes__[0]
            with pytest.raises(ExceptionGroup, match="2 of 3 messages can't be sent") as group:
                await stream.send_wait(threading.Lock(), 4, "\ud800")
            assert [type(error) for error in group.value.exceptions] == [SerializationError, SerializationError]
            stream.send(5)
    assert reader.messages == [1, 2, 3, 4, 5]
    assert stream.message_count == 5
    assert stream.unsent == stream.maybe_sent == []


async def test_no_pickle_for_a_stranger(new_pair: Any) -> None:
    async with new_pair("memory", trusted=False) as pair, reading(pair.server) as reader:
        async with BatchedSend(pair.client) as stream:
            stream.send(1)
            with pytest.raises(UnsafePayload):
                stream.send({"f": math.sqrt})
            stream.send(2)
    assert reader.messages == [1, 2]


async def test_serializers_of_its_own(framed: Any) -> None:
    async with BatchedSend(framed.client, serializers=["msgpack"]) as stream:
        with pytest.raises(SerializationError):
            stream.send(to_serialize(object()))
        with pytest.raises(TypeError, match="serializers="):
            BatchedSend(framed.client, serializers="msgpack")


async def test_a_large_batch_is_several_lists_that_a_stranger_accepts(autojump_clock: Any, new_pair: Any) -> None:
    """A stranger's limits are 1 MiB for the head and 1024 frames (security document, section 2)."""
    sent: list[Any] = [{"i": i, "text": "x" * 1000} for i in range(3000)]
    sent += [{"i": i, "data": to_serialize(bytes([i % 256]))} for i in range(3000, 4000)]
    sent += [{"i": 4000, "data": to_serialize(b"y" * 40_000_000)}, {"i": 4001, "data": to_serialize(b"z" * 40_000_000)}]
    async with new_pair("memory", trusted=False) as pair, reading(pair.server) as reader:
        async with BatchedSend(pair.client, interval=3600) as stream:
            stream.send(*sent)
            await blocked()
            assert stream.batch_count >= 6 + 7 + 2
            assert {when for when, _ in reader.batches} == {0}
    assert [message["i"] for message in reader.messages] == list(range(4002))
    assert all(message["data"] == bytes([message["i"] % 256]) for message in reader.messages[3000:4000])
    assert reader.messages[4001]["data"][:1] == b"z"


async def test_sending_while_something_is_being_encoded(framed: Any) -> None:
    """Encoding runs code of other people's, down to a ``__del__`` that sends a last message."""

    class Chatty:
        def __reduce__(self) -> Any:
            stream.send({"inner": to_serialize(b"inner")})
            return str, ("outer",)

    async with reading(framed.server) as reader:
        async with BatchedSend(framed.client) as stream:
            stream.send({"first": to_serialize(b"first")})
            stream.send({"outer": Chatty(), "data": to_serialize(b"data")})
            stream.send({"last": to_serialize(b"last")})
    assert [message for message in reader.messages if "inner" not in message] == [
        {"first": b"first"},
        {"outer": "outer", "data": b"data"},
        {"last": b"last"},
    ]
    assert {"inner": b"inner"} in reader.messages


async def test_many_senders_and_others_who_write(pair: Any) -> None:
    """Each one's messages stay in order, and none gets into another's."""

    async def send(stream: BatchedSend, who: int) -> None:
        for i in range(100):
            await stream.send_wait((who, i))

    async def write() -> None:
        for i in range(20):
            await pair.client.write([("written", i)])

    async with reading(pair.server) as reader:
        async with BatchedSend(pair.client, interval=0, max_buffered=7) as stream:
            async with trio.open_nursery() as nursery:
                for who in range(5):
                    nursery.start_soon(send, stream, who)
                nursery.start_soon(write)
    for who in (*range(5), "written"):
        assert [i for sender, i in reader.messages if sender == who] == list(range(20 if who == "written" else 100))


# -- no room ---------------------------------------------------------------------------------------------------------------------


async def test_a_slow_peer_fills_the_buffer_and_then_senders_wait(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory", capacity=1000) as pair:
        async with BatchedSend(pair.client, max_buffered=3) as stream:
            stream.send("x" * 5000)
            await blocked()
            stream.send(1, 2)
            assert stream.maybe_sent == ["x" * 5000]
            assert stream.unsent == [1, 2]
            with pytest.raises(LimitExceeded, match="no room for 1 messages: 3 are not written") as caught:
                stream.send(3)
            assert (caught.value.limit, caught.value.value, caught.value.seen) == ("max_buffered", 3, 4)
            with pytest.raises(LimitExceeded):
                await stream.send_wait(1, 2, 3, 4)  # never
            done: list[Any] = []

            async def wait(*msgs: Any) -> None:
                await stream.send_wait(*msgs)
                done.append(msgs)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, 3, 4, 5)
                await blocked()
                nursery.start_soon(wait, 6)
                await blocked()
                with trio.move_on_after(10) as scope:
                    await stream.send_wait("not this")
                assert scope.cancelled_caught
                assert done == []
                reader = Reader(pair.server)
                nursery.start_soon(reader.run)
                while not done:
                    await trio.lowlevel.checkpoint()
                    if not done:
                        with pytest.raises(LimitExceeded, match="calls wait for room"):
                            stream.send("not before those who wait")
                await trio.sleep(1)
                stream.send(7)
                await trio.sleep(1)
                nursery.cancel_scope.cancel()
        assert done == [(3, 4, 5), (6,)]
    assert reader.messages == ["x" * 5000, 1, 2, 3, 4, 5, 6, 7]


async def test_a_loop_of_send_wait_lets_others_run(new_pair: Any) -> None:
    async with new_pair("memory") as pair, reading(pair.server) as reader:
        async with BatchedSend(pair.client) as stream:
            for i in range(100):
                await stream.send_wait(i)
            assert stream.batch_count
            with trio.CancelScope() as scope:
                scope.cancel()
                await stream.send_wait("not this")
    assert reader.messages == list(range(100))


async def test_those_who_wait_are_told_of_a_failure(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory", capacity=1000) as pair:
        told = 0

        async def wait(stream: BatchedSend) -> None:
            nonlocal told
            with pytest.raises(CommClosedError, match="nothing more can be sent"):
                await stream.send_wait(2)
            told += 1

        async with BatchedSend(pair.client, max_buffered=1) as stream:
            stream.send(BIG)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, stream)
                nursery.start_soon(wait, stream)
                await blocked()
                pair.server.abort()
        assert told == 2
        assert stream.maybe_sent == [BIG]
        assert stream.unsent == []


# -- ends ------------------------------------------------------------------------------------------------------------------------


async def test_the_comm_stays_open(pair: Any) -> None:
    async with BatchedSend(pair.client) as stream:
        stream.send(1)
    assert stream.closed()
    assert "closed" in repr(stream)
    with pytest.raises(CommClosedError, match="was closed"):
        stream.send(2)
    with pytest.raises(CommClosedError, match="was closed"):
        await stream.send_wait(2)
    async with BatchedSend(pair.client) as stream:
        assert not stream.closed()
        stream.send(3)
        assert repr(stream) == f"<BatchedSend to {pair.client.peer_address}: 1 in buffer>"
    await pair.client.write(4)
    assert [list(await pair.server.read()), list(await pair.server.read()), await pair.server.read()] == [[1], [3], 4]


async def test_it_runs_once(new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        async with BatchedSend(pair.client) as stream:
            with pytest.raises(LocalProtocolError, match="another one"):
                await stream.__aenter__()
            await blocked()
            with pytest.raises(LocalProtocolError, match="another one"):
                await stream.run()


async def test_in_a_nursery_of_ones_own(autojump_clock: Any, pair: Any) -> None:
    if pair.kind == "tcp":
        return  # virtual time
    async with reading(pair.server) as reader, trio.open_nursery() as nursery:
        stream: BatchedSend = await nursery.start(BatchedSend(pair.client, 3600).run)
        stream.send(1)
        await blocked()
        stream.send(2)
        await stream.close()
        assert not nursery.child_tasks
        await stream.aclose()  # again does nothing
    assert reader.messages == [1, 2]


async def test_close_before_the_start_sends_what_waits(new_pair: Any) -> None:
    async with new_pair("memory") as pair, reading(pair.server) as reader:
        stream = BatchedSend(pair.client)
        stream.send(1)
        await stream.aclose()
        await BatchedSend(pair.client).aclose()
    assert reader.messages == [1]


async def test_an_exception_leaves_alone_and_after_what_waits(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair, reading(pair.server) as reader:
        with pytest.raises(KeyError) as caught:
            async with BatchedSend(pair.client, 3600) as stream:
                stream.send(1)
                await blocked()
                stream.send(2)
                raise KeyError("x")
        assert caught.value.__context__ is None
    assert reader.messages == [1, 2]


async def test_a_peer_that_is_too_slow_for_the_last_batches(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        start = trio.current_time()
        with pytest.raises(LimitExceeded, match=r"did not take the last 2 messages within 1.0 s.*Limits\(linger") as caught:
            async with BatchedSend(pair.client) as stream:
                stream.send(BIG)
                await blocked()
                stream.send(2)
        assert caught.value.limit == "linger"
        assert trio.current_time() == start + 1
        assert (stream.maybe_sent, stream.unsent) == ([BIG], [2])
        assert pair.client.closed()
        with pytest.raises(CommClosedError, match="did not take"):
            stream.send(3)


async def test_the_time_for_the_last_batches_is_the_comms(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory", limits=Limits(linger=5)) as pair:
        start = trio.current_time()
        stream = BatchedSend(pair.client)
        stream.send(BIG)
        with pytest.raises(LimitExceeded, match="5 s"):
            await stream.aclose()
        assert trio.current_time() == start + 5


@pytest.mark.parametrize("where", ["body", "flush"])
async def test_cancellation_ends_it_now(autojump_clock: Any, new_pair: Any, where: str) -> None:
    async with new_pair("memory") as pair:
        start = trio.current_time()
        with trio.move_on_after(0.5) as scope:
            async with BatchedSend(pair.client, 3600) as stream:
                stream.send(1)
                await blocked()
                stream.send(BIG, 2)
                if where == "body":
                    await trio.sleep_forever()
        assert scope.cancelled_caught
        assert trio.current_time() == start + 0.5
        if where == "body":
            assert (stream.maybe_sent, stream.unsent) == ([], [BIG, 2])
            assert not pair.client.closed()
        else:
            assert (stream.maybe_sent, stream.unsent) == ([BIG, 2], [])
            assert pair.client.closed()


async def test_cancelled_in_the_middle_of_a_batch(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        with trio.move_on_after(0.5):
            async with BatchedSend(pair.client) as stream:
                stream.send(BIG)
                await blocked()
                stream.send(2)
                await trio.sleep_forever()
        assert (stream.maybe_sent, stream.unsent) == ([BIG], [2])
        assert pair.client.closed()


async def test_cancelled_while_others_write(autojump_clock: Any, new_pair: Any) -> None:
    """Nothing of the batch has gone, and the comm goes on."""
    async with new_pair("memory") as pair, trio.open_nursery() as nursery:
        nursery.start_soon(pair.client.write, BIG)
        await blocked()
        with trio.move_on_after(0.5):
            async with BatchedSend(pair.client) as stream:
                stream.send(1)
                await trio.sleep_forever()
        assert (stream.maybe_sent, stream.unsent) == ([], [1])
        assert await pair.server.read() == BIG
        assert not pair.client.closed()


async def test_closing_that_is_cancelled_ends_it_now(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair, trio.open_nursery() as nursery:
        stream = await nursery.start(BatchedSend(pair.client).run)
        stream.send(BIG)
        with trio.move_on_after(0.5):
            await stream.aclose()
        await blocked()
        assert not nursery.child_tasks
        assert stream.maybe_sent == [BIG]


async def test_run_that_is_cancelled_tells_the_next_sender(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        async with trio.open_nursery() as nursery:
            stream = await nursery.start(BatchedSend(pair.client, 3600).run)
            stream.send(1)
            await blocked()
            stream.send(2)
            nursery.cancel_scope.cancel()
        with pytest.raises(CommClosedError, match="sending was cancelled"):
            stream.send(3)
        assert stream.unsent == [2]
        await stream.aclose()  # it has been told


async def test_run_that_is_cancelled_while_nothing_waits(new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        async with trio.open_nursery() as nursery:
            stream = await nursery.start(BatchedSend(pair.client).run)
            nursery.cancel_scope.cancel()
        assert stream.closed()
        with pytest.raises(CommClosedError, match="was closed"):
            stream.send(1)


async def test_a_program_that_ends_does_not_wait_for_the_last_batches(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        start = trio.current_time()
        with pytest.raises(KeyboardInterrupt):
            async with BatchedSend(pair.client) as stream:
                stream.send(BIG)
                await blocked()
                raise KeyboardInterrupt
        assert trio.current_time() == start


async def test_closing_tells_those_who_wait_for_room_at_once(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        start = trio.current_time()

        async def wait() -> None:
            with pytest.raises(CommClosedError, match="was closed"):
                await stream.send_wait(2)
            assert trio.current_time() == start

        async with trio.open_nursery() as nursery:
            stream = await nursery.start(BatchedSend(pair.client, max_buffered=1).run)
            stream.send(BIG)
            nursery.start_soon(wait)
            await blocked()
            with pytest.raises(LimitExceeded):
                await stream.aclose()


async def test_abort_is_no_loss_to_be_told(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        async with BatchedSend(pair.client, 3600) as stream:
            stream.send(1)
            await blocked()
            stream.send(2)
            stream.abort()
        assert stream.unsent == [2]


async def test_abort_ends_an_idle_task(new_pair: Any) -> None:
    async with new_pair("memory") as pair, trio.open_nursery() as nursery:
        stream = await nursery.start(BatchedSend(pair.client).run)
        await blocked()
        stream.abort()
        await blocked()
        assert not nursery.child_tasks


async def test_abort(autojump_clock: Any, new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        async with BatchedSend(pair.client, 3600) as stream:
            stream.send(1)
            await blocked()
            stream.send(2)
            stream.abort()
            assert stream.closed()
            with pytest.raises(CommClosedError, match="aborted"):
                stream.send(3)
        assert stream.unsent == [2]
        assert pair.client.closed()


# -- failures of the comm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_an_idle_stream_notices_that_the_peer_has_gone(new_pair: Any, how: str) -> None:
    """Over a socket with the next send at the latest, though nobody reads the comm."""
    async with new_pair("tcp") as pair:
        async with BatchedSend(pair.client) as stream:
            stream.send(1)
            await blocked()
            assert not stream.closed()
            if how == "close":
                await pair.server.read()
                await pair.server.close()
            else:
                pair.server.abort()
            assert stream.closed()
            with pytest.raises(CommClosedError, match="nothing more can be sent"):
                stream.send(2)
            with pytest.raises(CommClosedError, match="nothing more can be sent"):
                await stream.send_wait(2)
    assert stream.message_count == 1
    assert stream.unsent == stream.maybe_sent == []


async def test_what_waits_while_the_peer_goes_is_unsent(new_pair: Any) -> None:
    async with new_pair("tcp") as pair:
        with pytest.raises(CommClosedError, match="1 messages were not sent to .* was closed"):
            async with BatchedSend(pair.client, 3600) as stream:
                stream.send(1)
                await blocked()
                stream.send(2)
                await pair.server.read()
                await pair.server.close()
    assert stream.unsent == [2]


async def test_a_failure_is_told_once(pair: Any) -> None:
    with pytest.raises(CommClosedError, match="2 messages were not sent"):
        async with BatchedSend(pair.client) as stream:
            stream.send(1, 2)
            pair.server.abort()
    # Of trio's streams only those of the kit tell that nothing has gone.
    assert (stream.maybe_sent if pair.kind == "stream" else stream.unsent) == [1, 2]
    assert len(stream.unsent + stream.maybe_sent) == 2
    with pytest.raises(CommClosedError):
        stream.send(3)
    await stream.aclose()


async def test_a_loss_behind_another_error_is_logged(new_pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with new_pair("tcp") as pair:
        with pytest.raises(KeyError):
            async with BatchedSend(pair.client, 3600) as stream:
                stream.send(1)
                await blocked()
                stream.send(2)
                pair.server.abort()
                raise KeyError
    assert "1 messages were not sent" in caplog.text


async def test_the_comm_is_closed_here(pair: Any) -> None:
    async with BatchedSend(pair.client) as stream:
        pair.client.abort()
        with pytest.raises(CommClosedError):
            stream.send(1)


async def test_a_batch_that_had_to_wait_for_its_turn_is_unsent(new_pair: Any) -> None:
    """Also when it is here that the comm is closed: nothing of it has gone."""
    async with new_pair("tcp") as pair, trio.open_nursery() as nursery:
        stream = await nursery.start(BatchedSend(pair.client).run)

        async def write() -> None:
            with pytest.raises(CommClosedError):
                await pair.client.write(bytes(30_000_000))

        nursery.start_soon(write)
        await blocked(0.01)
        stream.send(1)
        await blocked(0.01)
        assert (stream.unsent, stream.maybe_sent) == ([], [1])
        stream.send(2)
        stream.abort()
        await blocked(0.01)
        assert (stream.unsent, stream.maybe_sent) == ([1, 2], [])


async def test_a_batch_of_which_the_system_took_nothing_is_unsent(new_pair: Any) -> None:
    async with new_pair("tcp") as pair, trio.open_nursery() as nursery:
        while pair.client.write_nowait("x" * 10_000):
            pass
        while pair.client._sending:  # what is owed has been sent
            await pair.server.read()
            await blocked(0.01)
        while pair.client._pump.try_send(b"x"):
            pass
        stream = await nursery.start(BatchedSend(pair.client).run)
        stream.send(1)
        await blocked(0.01)
        assert stream.maybe_sent == [1]
        stream.abort()
        await blocked(0.01)
        assert (stream.unsent, stream.maybe_sent) == ([1], [])


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "inproc://"])
async def test_what_waits_for_credit_when_its_request_ends_is_unsent(address: str) -> None:
    """A handler has gone and left its BatchedSend behind."""
    found: list[BatchedSend] = []

    async def many(comm: Any) -> None:
        stream = await others.start(BatchedSend(comm, interval=0).run)
        found.append(stream)
        for i in range(20):
            stream.send(i)
            await blocked(0.01)

    async with Server({"many": many}) as server, trio.open_nursery() as others:
        async with rpc(await server.listen(address)) as remote, remote.many.stream() as items:
            await blocked(0.5)
            got = [message async for batch in items for message in batch]
    (stream,) = found
    assert stream.maybe_sent == []
    assert got + stream.unsent == list(range(20))
    assert len(stream.unsent) == 20 - Limits().window


async def test_without_time_to_linger_goes_what_needs_no_wait(new_pair: Any) -> None:
    async with new_pair("tcp", limits=Limits(linger=0)) as pair:
        async with BatchedSend(pair.client, interval=3600) as stream:
            stream.send(1)
            await blocked(0.01)
            stream.send(2)
        assert stream.unsent == []
        assert [list(await pair.server.read()) for _ in range(2)] == [[1], [2]]


async def test_batches_without_an_interval_do_not_put_off_a_cancellation() -> None:
    class Quick(Comm):
        """Takes all at once, and has something new to say whenever others get their turn."""

        peer = local_address = peer_address = None  # type: ignore[assignment]
        count = 0

        async def write(self, message: Any, *, on_error: Any = None, serializers: Any = None) -> int:
            self.count += 1
            if self.count == 3:
                scope.cancel()
            if self.count < 100:
                stream.send(self.count)
            await trio.lowlevel.cancel_shielded_checkpoint()
            return 1

        read = receive = send = aclose = abort = None  # type: ignore[assignment]

        def closed(self) -> bool:
            return False

    comm = Quick()
    stream = BatchedSend(comm, interval=0)
    stream.send(0)
    with trio.CancelScope() as scope:
        await stream.run()
    assert comm.count == 3
    assert stream.unsent == [3]


async def test_whatever_a_comm_of_ones_own_raises_is_told_to_who_sends() -> None:
    class Broken(Comm):
        """Fails in its own way, and never says that it is closed."""

        peer = local_address = peer_address = None  # type: ignore[assignment]

        async def write(self, message: Any, *, on_error: Any = None, serializers: Any = None) -> int:
            await trio.lowlevel.checkpoint()
            raise KeyError("the line is cut")

        read = receive = send = aclose = abort = None  # type: ignore[assignment]

        def closed(self) -> bool:
            return False

    stream = BatchedSend(Broken(), interval=0)
    stream.send(0)
    with trio.fail_after(5):
        await stream.run()
    with pytest.raises(CommClosedError) as caught:
        stream.send(1)
    assert isinstance(caught.value.__cause__, KeyError)


# -- with servers ----------------------------------------------------------------------------------------------------------------


class Log:
    """Stream handlers that note what they got."""

    def __init__(self) -> None:
        self.lines: list[Any] = []

    def server(self) -> Server:
        async def note(line: Any) -> None:
            await trio.lowlevel.checkpoint()
            self.lines.append(line)

        return Server(stream_handlers={"note": note})


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "inproc://"])
async def test_into_stream_handlers(address: str) -> None:
    log = Log()
    async with log.server() as server:
        async with await connect(await server.listen(address)) as comm:
            await comm.write({"op": "connection_stream", "reply": False})
            async with BatchedSend(comm) as stream:
                for i in range(1000):
                    stream.send({"op": "note", "line": i})
                stream.send({"op": "close-stream"})
            with pytest.raises(CommClosedError):
                await comm.read()
    assert log.lines == list(range(1000))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "inproc://"])
async def test_from_a_handler(address: str) -> None:
    """Whose comm is, for a caller that speaks the wire extension, a view of the connection."""

    async def squares(comm: Any) -> None:
        async with BatchedSend(comm, interval=0) as stream:
            for i in range(20):
                await stream.send_wait({"square": i * i, "data": to_serialize(b"%d" % i)})
            if not address.startswith("inproc"):
                with pytest.raises(SerializationError):
                    stream.send(threading.Lock())

    async with Server({"squares": squares}) as server:
        async with rpc(await server.listen(address)) as remote, remote.squares.stream() as items:
            found = [message async for batch in items for message in batch]
    assert found == [{"square": i * i, "data": b"%d" % i} for i in range(20)]


# -- sweeps ----------------------------------------------------------------------------------------------------------------------

# Few bytes, since each is cut.
LINES = [1, "two", {"three": 3}, b"x" * 30, 5, 6]


class Sweep:
    """A client that streams lines to a server, with what it knows of them afterwards."""

    def __init__(self) -> None:
        self.log = Log()
        self.stream: BatchedSend | None = None
        self.accepted: list[Any] = []

    async def stream_to(self, address: str) -> None:
        self.log.lines.clear()
        self.accepted.clear()
        self.stream = None
        async with await connect(address) as comm:
            await comm.write({"op": "connection_stream", "reply": False})
            async with BatchedSend(comm, interval=0.001, max_buffered=4) as self.stream:
                messages = [{"op": "note", "line": to_serialize(line) if line == 5 else line} for line in LINES]
                self.stream.send(*messages[:2])
                self.accepted += messages[:2]
                await trio.sleep(0.0005)
                for message in messages[2:]:
                    await self.stream.send_wait(message)
                    self.accepted.append(message)
                await trio.sleep(0.005)

    async def nothing_is_lost_silently_or_twice(self, *, cut: bool) -> None:
        """Accepted is written, maybe sent, or unsent, in this order; and what was handled is the front of that.

        Unless the wire was cut, which may lose what is on its way, everything that is neither of the latter has been handled.
        """
        await blocked()
        stream = self.stream
        if stream is None:
            assert self.log.lines == []
            return
        rest = stream.maybe_sent + stream.unsent
        assert rest == self.accepted[stream.message_count - len(rest) :]
        assert len(self.accepted) == stream.message_count
        assert self.log.lines == LINES[: len(self.log.lines)]
        assert len(self.log.lines) <= stream.message_count - len(stream.unsent)
        assert cut or len(self.log.lines) >= stream.message_count - len(rest)

    async def cancel(self) -> int:
        """Cancel it at every step."""
        with memory_network():
            async with self.log.server() as server:
                address = await server.listen("memory://")

                async def check() -> None:
                    await self.nothing_is_lost_silently_or_twice(cut=False)
                    await self.stream_to(address)
                    await blocked()
                    assert self.log.lines == LINES

                return await cancel_sweep(lambda: self.stream_to(address), check=check)

    async def cut(self) -> int:
        """Cut its wire after every byte."""

        async def scenario(network: MemoryNetwork) -> None:
            async with self.log.server() as server:
                await self.stream_to(await server.listen("memory://"))

        async def check(network: MemoryNetwork) -> None:
            await self.nothing_is_lost_silently_or_twice(cut=True)

        return await wire_sweep(scenario, check=check, allowed=(CommClosedError, OSError))


async def test_cancelled_at_every_step(autojump_clock: Any) -> None:
    assert await Sweep().cancel() > 20


async def test_cut_at_every_byte(autojump_clock: Any) -> None:
    assert await Sweep().cut() > 4 * 154 + 2 * 300  # of two handshakes, and of what is streamed


async def test_a_loss_that_is_not_told_is_found(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls of both sweeps."""
    with monkeypatch.context() as patch, pytest.raises(SweepError, match="cancelled at step"):
        patch.setattr(BatchedSend, "unsent", [])
        await Sweep().cancel()
    with monkeypatch.context() as patch, pytest.raises(SweepError, match="WireCut"):
        patch.setattr(BatchedSend, "maybe_sent", LINES)
        await Sweep().cut()


class Answers:
    """A handler that streams batches to its caller, over and over cancelled or cut."""

    def __init__(self) -> None:
        self.inside = 0
        self.found: list[Any] = []

    async def lines(self, comm: Any) -> None:
        self.inside += 1
        try:
            async with BatchedSend(comm, interval=0.001) as stream:
                for line in LINES[:4]:
                    await stream.send_wait(line)
        finally:
            self.inside -= 1

    async def take(self, address: str) -> None:
        self.found = []
        async with rpc(address) as remote, remote.lines.stream() as items:
            async for batch in items:
                self.found += batch

    def check(self) -> None:
        assert self.inside == 0
        assert self.found == LINES[: len(self.found)]


async def test_from_a_handler_cancelled_at_every_step(autojump_clock: Any) -> None:
    answers = Answers()
    with memory_network():
        async with Server({"lines": answers.lines}) as server:
            address = await server.listen("memory://")

            async def check() -> None:
                await blocked()
                answers.check()
                await answers.take(address)
                assert answers.found == LINES[:4]
                await blocked()
                assert server.statistics().connections == 0

            assert await cancel_sweep(lambda: answers.take(address), check=check) > 10


async def test_from_a_handler_cut_at_every_byte(autojump_clock: Any) -> None:
    """A stream that was cut is never taken for one that has ended."""
    answers = Answers()

    async def scenario(network: MemoryNetwork) -> None:
        async with Server({"lines": answers.lines}) as server:
            try:
                await answers.take(await server.listen("memory://"))
            except (CommClosedError, ConnectError):
                await blocked()
                answers.check()
            else:
                assert answers.found == LINES[:4]

    assert await wire_sweep(scenario, first=154) > 4 * 40  # the handshake is that of the sweep above
