"""Comms: one body over every transport."""

from __future__ import annotations

import gc
import pickle
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import trio
import trio.testing

from trio_dcore import Limits, Security, ToPickle, to_serialize
from trio_dcore.comm import FramedComm, _comm
from trio_dcore.errors import (
    CommClosedError,
    LimitExceeded,
    RemoteProtocolError,
    SerializationError,
    UnsafePayload,
)
from trio_dcore.protocol import Serialized, dumps
from trio_dcore.protocol import _frames as frames_module
from trio_dcore.protocol._envelope import GOODBYE, WINDOW
from trio_dcore.protocol._frames import pack_prelude, single_frame
from trio_dcore.testing import memory_stream_pair

PATIENCE = 10.0
MiB = 2**20
# More than two kernels' buffers take, and than any capacity in these tests.
MUCH = bytes(24 * MiB)

ENDS = [
    pytest.param("read", CommClosedError, id="read"),
    pytest.param("receive", trio.EndOfChannel, id="receive"),
]


async def until_blocked(writer: Callable[[], Any], nursery: trio.Nursery) -> None:
    """Start a task that can't go on."""
    nursery.start_soon(writer)
    await trio.testing.wait_all_tasks_blocked(0.01)


class TestMessages:
    @pytest.mark.parametrize("side", ["client", "server"])
    async def test_there_and_back(self, pair: Any, side: str) -> None:
        ours, theirs = pair.of(side), pair.of("server" if side == "client" else "client")
        for message in ({"op": "add", "x": 1}, None, "text", b"\x00" * 30_000, (1, (2.5, True)), {"set": {1, 2}}):
            size = await ours.write(message)
            assert (size >= 25) if pair.framed else size == 1
            assert await theirs.read() == message
            await theirs.send(message)
            assert await ours.receive() == message

    async def test_lists_become_tuples_where_there_are_bytes(self, pair: Any) -> None:
        message = {"list": [1, [2]]}
        await pair.client.write(message)
        found = await pair.server.read()
        if pair.framed:
            assert found == {"list": (1, (2,))}
        else:
            assert found is message

    async def test_a_payload(self, pair: Any) -> None:
        import numpy

        array = numpy.arange(1000)
        await pair.client.write({"a": to_serialize(array), "b": ToPickle({"x"})})
        found = await pair.server.read()
        assert found["b"] == {"x"}
        assert (found["a"] == array).all()
        assert pair.framed != (found["a"] is array)

    async def test_iteration_ends_with_the_comm(self, pair: Any) -> None:
        async with pair.client:
            for n in range(3):
                await pair.client.send(n)
        assert [item async for item in pair.server] == [0, 1, 2]
        assert pair.server.closed()

    async def test_counters(self, pair: Any) -> None:
        before = pair.client.messages_written, pair.client.bytes_written, pair.server.messages_read, pair.server.bytes_read
        size = await pair.client.write("x" * 30_000)
        await pair.server.read()
        after = pair.client.messages_written, pair.client.bytes_written, pair.server.messages_read, pair.server.bytes_read
        changes = tuple(new - old for new, old in zip(after, before, strict=True))
        assert changes == ((1, size, 1, size) if pair.framed else (1, 0, 1, 0))
        assert pair.server.last_message_size == (size if pair.framed else 0)

    async def test_both_directions_at_once(self, pair: Any) -> None:
        """Neither side reads before it has written: the parser and the buffers of the system take it, or the tasks interleave."""

        async def talk(comm: Any) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen, comm)
                for n in range(20):
                    await comm.write((n, b"x" * 100_000))

        async def listen(comm: Any) -> None:
            assert [(await comm.read())[0] for _ in range(20)] == list(range(20))

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(talk, pair.client)
                nursery.start_soon(talk, pair.server)

    async def test_who_is_who(self, pair: Any) -> None:
        kind = {"stream": "memory", "memory": "memory", "tcp": "loopback", "tls": "tls", "inproc": "inproc"}[pair.kind]
        assert (pair.client.peer.kind, pair.server.peer.kind) == (kind, kind)
        assert pair.client.peer_address == pair.client.peer.address
        if pair.kind in ("tcp", "tls", "inproc"):
            assert pair.client.peer_address == pair.server.local_address
            assert pair.server.peer_address == pair.client.local_address
        assert pair.client.peer_address in repr(pair.client)
        assert " closed" not in repr(pair.client)
        await pair.client.aclose()
        assert " closed" in repr(pair.client)


class TestClosing:
    @pytest.mark.parametrize("how", ["aclose", "close", "abort", "with"])
    async def test_what_was_written_is_still_read(self, pair: Any, how: str) -> None:
        await pair.client.write("last words")
        match how:
            case "abort":
                pair.client.abort()
            case "with":
                async with pair.client:
                    pass
            case _:
                await getattr(pair.client, how)()
        assert pair.client.closed()
        assert await pair.server.read() == "last words"
        for _ in range(2):
            with pytest.raises(CommClosedError, match="closed the comm"):
                await pair.server.read()
            with pytest.raises(trio.EndOfChannel):
                await pair.server.receive()
        assert pair.server.closed()

    async def test_a_comm_that_was_closed_here(self, pair: Any) -> None:
        await pair.client.aclose()
        for _ in range(2):
            with pytest.raises(CommClosedError, match="closed here"):
                await pair.client.write(1)
            with pytest.raises(CommClosedError, match="closed here"):
                await pair.client.read()
            with pytest.raises(trio.ClosedResourceError):
                await pair.client.send(1)
            with pytest.raises(trio.ClosedResourceError):
                await pair.client.receive()
            with pytest.raises(trio.ClosedResourceError):
                pair.client.write_nowait(1)
            with pytest.raises(trio.ClosedResourceError):
                pair.client.write_soon(1)
        assert pair.client.stale()

    async def test_closing_again_does_nothing_but_is_a_checkpoint(self, pair: Any) -> None:
        pair.client.abort()
        pair.client.abort()
        with trio.testing.assert_checkpoints():
            await pair.client.aclose()
        await pair.client.close()

    async def test_what_came_before_the_close_is_not_read_after_it(self, pair: Any) -> None:
        await pair.client.write("unread")
        await pair.server.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await pair.server.receive()

    async def test_unread_messages_do_not_cost_the_other_side_its_own(self, pair: Any) -> None:
        """On TCP a close over unread bytes is a reset, which may overtake what was sent."""
        await pair.client.write("unread")
        await trio.testing.wait_all_tasks_blocked(0.01)
        await pair.server.write("last words")
        await pair.server.aclose()
        assert await pair.client.receive() == "last words"
        with pytest.raises(trio.EndOfChannel):
            await pair.client.receive()

    @pytest.mark.parametrize("how", ["abort", "aclose"])
    @pytest.mark.parametrize("operation", ["read", "receive"])
    async def test_while_another_task_reads(self, pair: Any, how: str, operation: str) -> None:
        expected = CommClosedError if operation == "read" else trio.ClosedResourceError

        async def reader() -> None:
            with pytest.raises(expected, match="closed here"):
                await getattr(pair.client, operation)()

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                await until_blocked(reader, nursery)
                if how == "abort":
                    pair.client.abort()
                else:
                    await pair.client.aclose()

    @pytest.mark.parametrize("how", ["abort", "aclose"])
    @pytest.mark.parametrize("operation", ["write", "send"])
    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls", "inproc"])
    async def test_while_another_task_writes(self, new_pair: Any, kind: str, how: str, operation: str) -> None:
        expected = CommClosedError if operation == "write" else trio.ClosedResourceError
        async with new_pair(kind, limits=Limits(linger=0.05)) as pair:

            async def write() -> None:
                for _ in range(20):
                    await getattr(pair.client, operation)(MUCH)

            async def writer() -> None:
                with pytest.raises(expected, match="closed here"):
                    await write()

            with trio.fail_after(PATIENCE):
                async with trio.open_nursery() as nursery:
                    await until_blocked(writer, nursery)
                    if how == "abort":
                        pair.client.abort()
                    else:
                        await pair.client.aclose()

    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls"])
    async def test_what_is_being_written_gets_out_if_the_peer_reads(self, new_pair: Any, kind: str) -> None:
        """Closing lingers: the message under way, and those behind it, are read by a peer that reads."""
        async with new_pair(kind, limits=Limits(linger=PATIENCE)) as pair, trio.open_nursery() as nursery:
            await until_blocked(lambda: pair.client.write(("first", MUCH)), nursery)
            await until_blocked(lambda: pair.client.write(("second", MUCH)), nursery)
            await until_blocked(pair.client.aclose, nursery)
            # Behind the close there is nothing to wait for.
            late: list[BaseException] = []

            async def too_late() -> None:
                try:
                    await pair.client.write("third")
                except CommClosedError as error:
                    late.append(error)

            await until_blocked(too_late, nursery)
            with trio.fail_after(PATIENCE):
                found = [message async for message in pair.server]
            assert [name for name, _ in found] == ["first", "second"]
        assert "closed here" in str(late[0])

    async def test_a_linger_that_is_over(self, new_pair: Any, autojump_clock: trio.testing.MockClock) -> None:
        async with new_pair("memory", limits=Limits(linger=3)) as pair, trio.open_nursery() as nursery:

            async def writer() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await pair.client.send(MUCH)

            await until_blocked(writer, nursery)
            begun = trio.current_time()
            await pair.client.aclose()
            assert trio.current_time() - begun == pytest.approx(3)
            assert pair.streams[1]._incoming.ended  # the other side is told

    async def test_a_close_that_is_cancelled_closes(self, new_pair: Any, autojump_clock: trio.testing.MockClock) -> None:
        async with new_pair("memory") as pair, trio.open_nursery() as nursery:

            async def writer() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await pair.client.send(MUCH)

            await until_blocked(writer, nursery)
            with trio.move_on_after(0.25) as scope:
                await pair.client.aclose()
            assert scope.cancelled_caught
            assert pair.client.closed()
            assert pair.streams[1]._incoming.ended

    async def test_a_peer_that_resets(self, framed: Any) -> None:
        if framed.kind == "tcp":
            framed.server._pump.socket.setsockopt(
                trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
            )
            framed.server._pump.socket.close()
        elif framed.kind == "memory":
            framed.streams[1].reset()
        else:
            pytest.skip("these streams know no reset")
        with pytest.raises(CommClosedError, match=r"^reading from .* failed: ") as caught:
            await framed.client.receive()
        assert isinstance(caught.value.__cause__, (OSError, trio.BrokenResourceError))
        # What went wrong is told to all who come later.
        with pytest.raises(CommClosedError, match=r"^reading from .* failed: "):
            await framed.client.send(1)
        assert framed.client.closed()

    @pytest.mark.parametrize("operation", ["read", "receive"])
    async def test_its_last_words_are_read_and_its_end_is_no_clean_one(self, new_pair: Any, operation: str) -> None:
        """A reset is told once, and that may be to the writer; the reader must not take what is left for all there is."""
        async with new_pair("tcp") as pair:
            await pair.server.write("last words")
            await pair.client.write("never read, so the close is a reset")
            await trio.testing.wait_all_tasks_blocked(0.01)
            pair.server.abort()
            await trio.testing.wait_all_tasks_blocked(0.01)
            with pytest.raises(CommClosedError, match=r"^writing to"):
                await pair.client.write("x")
            assert pair.client.closed()
            assert await getattr(pair.client, operation)() == "last words"
            for _ in range(2):
                with pytest.raises(CommClosedError, match=r"^writing to"):
                    await getattr(pair.client, operation)()

    async def test_writing_to_a_peer_that_has_gone(self, pair: Any) -> None:
        pair.server.abort()

        async def write() -> None:
            while True:  # the first may still be taken by the kernel
                await pair.client.write(1)
                await trio.testing.wait_all_tasks_blocked(0.01)

        with pytest.raises(CommClosedError, match=pair.client.peer_address), trio.fail_after(PATIENCE):
            await write()
        with pytest.raises(CommClosedError):
            await pair.client.send(1)


class TestWhoMayDoWhat:
    async def test_a_second_reader_is_refused(self, pair: Any) -> None:
        async with trio.open_nursery() as nursery:
            found: list[object] = []

            async def reader() -> None:
                found.append(await pair.client.read())

            await until_blocked(reader, nursery)
            with pytest.raises(trio.BusyResourceError, match="another task is reading this comm"):
                await pair.client.read()
            with pytest.raises(trio.BusyResourceError):
                await pair.client.receive()
            await pair.server.write("x")
        assert found == ["x"]

    @pytest.mark.parametrize("size", [10, 200_000, 3 * MiB])
    async def test_writers_queue_in_order(self, pair: Any, size: int) -> None:
        count = 30

        async def writer(n: int) -> None:
            await pair.client.write({"n": n, "data": b"x" * size})

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                for n in range(count):
                    nursery.start_soon(writer, n)
                    await trio.lowlevel.checkpoint()
                    await trio.testing.wait_all_tasks_blocked()
                for n in range(count):
                    message = await pair.server.read()
                    assert (message["n"], len(message["data"])) == (n, size)

    async def test_nobody_overtakes_those_who_wait(self, pair: Any) -> None:
        """A writer that comes when there is just room again must not take it from one that has waited for it."""
        order: list[int] = []

        async def writer(n: int) -> None:
            await pair.client.write((n, b"x" * 100_000))
            order.append(n)

        async with trio.open_nursery() as nursery:
            for n in range(40):
                nursery.start_soon(writer, n)
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked(0.01)
            with trio.fail_after(PATIENCE):
                for n in range(60):
                    assert (await pair.server.read())[0] == n
                    if n < 20:
                        nursery.start_soon(writer, 40 + n)
                        await trio.lowlevel.checkpoint()

    async def test_one_that_gives_up_waiting_leaves_no_gap(self, new_pair: Any) -> None:
        for kind in ("memory", "tcp", "inproc"):
            async with new_pair(kind) as pair, trio.open_nursery() as nursery:
                scopes = [trio.CancelScope() for _ in range(40)]

                async def writer(n: int, pair: Any = pair, scopes: list[trio.CancelScope] = scopes) -> None:
                    with scopes[n]:
                        await pair.client.write((n, b"x" * 1_000_000))

                for n in range(40):
                    nursery.start_soon(writer, n)
                    await trio.lowlevel.checkpoint()
                await trio.testing.wait_all_tasks_blocked(0.01)
                for n in (37, 35):
                    scopes[n].cancel()
                await trio.testing.wait_all_tasks_blocked(0.01)
                with trio.fail_after(PATIENCE):
                    found = [(await pair.server.read())[0] for _ in range(38)]
                assert found == [n for n in range(40) if n not in (35, 37)]


class TestBackPressure:
    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls", "inproc"])
    async def test_a_peer_that_reads_nothing_blocks_the_writer(self, new_pair: Any, kind: str) -> None:
        async with new_pair(kind) as pair:
            written = 0
            with trio.move_on_after(0.3) as scope:
                while True:
                    await pair.client.write(b"x" * 100_000)
                    written += 1
            assert scope.cancelled_caught
            assert written * 100_000 < 32 * MiB
            if kind == "inproc":
                assert written == 16
                assert not pair.client.closed()

    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls", "inproc"])
    async def test_nothing_is_lost_when_it_reads_again(self, new_pair: Any, kind: str) -> None:
        async with new_pair(kind) as pair, trio.open_nursery() as nursery:

            async def writer() -> None:
                for n in range(300):
                    await pair.client.write((n, b"x" * 100_000))
                await pair.client.aclose()

            await until_blocked(writer, nursery)
            with trio.fail_after(PATIENCE):
                assert [n async for n, _ in pair.server] == list(range(300))


class TestCancellation:
    @pytest.mark.parametrize("operation", ["write", "send"])
    async def test_a_write_in_a_cancelled_scope_sends_nothing(self, pair: Any, operation: str) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await getattr(pair.client, operation)("not sent")
        assert scope.cancelled_caught
        await pair.client.write("sent")
        assert await pair.server.read() == "sent"

    @pytest.mark.parametrize("operation", ["read", "receive"])
    async def test_a_read_in_a_cancelled_scope_takes_nothing(self, pair: Any, operation: str) -> None:
        await pair.server.write("there")
        with trio.CancelScope() as scope:
            scope.cancel()
            await getattr(pair.client, operation)()
        assert scope.cancelled_caught
        assert await pair.client.read() == "there"

    async def test_a_read_that_waits_may_be_cancelled(self, pair: Any) -> None:
        for n in range(3):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    await until_blocked(pair.client.read, nursery)
                    scope.cancel()
            assert scope.cancelled_caught
            await pair.server.write(n)
            assert await pair.client.read() == n

    @pytest.mark.parametrize("size", [1, 15, 16, 23, 24, 30, 5000, 60_000])
    async def test_a_read_inside_a_message_closes(self, framed: Any, size: int) -> None:
        data = single_frame(dumps(b"x" * 100_000)[0])
        await framed.server._pump.send([data[:size]], 0)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await until_blocked(framed.client.read, nursery)
                scope.cancel()
        assert scope.cancelled_caught
        assert framed.client.closed()
        with pytest.raises(CommClosedError, match="interrupted in the middle of a message"):
            await framed.client.write(1)
        with pytest.raises(CommClosedError, match="interrupted in the middle of a message"):
            await framed.client.receive()

    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls"])
    async def test_a_write_inside_a_message_closes(self, new_pair: Any, kind: str) -> None:
        async with new_pair(kind) as pair:
            late: list[BaseException] = []

            async def writer() -> None:
                try:
                    await pair.client.write(MUCH)
                except CommClosedError as error:
                    late.append(error)

            async with trio.open_nursery() as outer:
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        await until_blocked(lambda: pair.client.write(MUCH), nursery)
                        await until_blocked(writer, outer)
                        scope.cancel()
            assert scope.cancelled_caught
            assert pair.client.closed()
            assert "a write was interrupted in the middle of a message" in str(late[0])
            assert late[0].nothing_sent  # type: ignore[attr-defined]
            # The peer is told that it is over, and gets no message.
            with pytest.raises(CommClosedError, match="in the middle of a message|reset by peer"), trio.fail_after(PATIENCE):
                await pair.server.receive()
            assert pair.server.closed()

    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls"])
    async def test_a_write_that_waits_for_its_turn_may_be_cancelled(self, new_pair: Any, kind: str) -> None:
        async with new_pair(kind) as pair, trio.open_nursery() as outer:
            await until_blocked(lambda: pair.client.write(("first", MUCH)), outer)
            for _ in range(3):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        await until_blocked(lambda: pair.client.write("cancelled"), nursery)
                        scope.cancel()
                assert scope.cancelled_caught
            outer.start_soon(pair.client.write, "second")
            with trio.fail_after(PATIENCE):
                assert (await pair.server.read())[0] == "first"
                assert await pair.server.read() == "second"

    async def test_an_inproc_write_that_waits_may_be_cancelled(self, new_pair: Any) -> None:
        async with new_pair("inproc") as pair:
            for n in range(16):
                await pair.client.write(n)
            for _ in range(3):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        await until_blocked(lambda: pair.client.write("cancelled"), nursery)
                        scope.cancel()
            assert [await pair.server.read() for _ in range(16)] == list(range(16))
            await pair.client.write("next")
            assert await pair.server.read() == "next"

    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls"])
    @pytest.mark.parametrize("size", [100, 50_000, 200_000])
    async def test_a_write_that_returned_was_sent_whole(self, new_pair: Any, kind: str, size: int) -> None:
        """And one that did not was not, or the comm is closed; whenever the cancellation comes."""
        async with new_pair(kind) as pair, trio.open_nursery() as nursery:
            done = []
            found = []

            async def reader() -> None:
                try:
                    async for n, _ in pair.server:
                        found.append(n)
                except CommClosedError:
                    found.append("broken off")

            nursery.start_soon(reader)
            for n in range(200):
                with trio.CancelScope() as scope:
                    if n % 7 == 0:
                        trio.lowlevel.current_trio_token().run_sync_soon(scope.cancel)
                    try:
                        await pair.client.write((n, b"x" * size))
                    except CommClosedError:
                        break
                    done.append(n)
            await pair.client.aclose()
        assert [n for n in found if n != "broken off"] == done


class Steps(trio.abc.Instrument):
    """How often each task got its turn."""

    def __init__(self) -> None:
        self.turns: Counter[str] = Counter()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.turns[task.name] += 1


async def turns_of(work: Callable[[], Any]) -> int:
    """How often the work let other tasks run."""
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, name="work")
    finally:
        trio.lowlevel.remove_instrument(steps)
    return steps.turns["work"] - 1


class TestFairness:
    """The architecture document, section 3.2: every 16 messages or 64 KiB."""

    @pytest.mark.parametrize("kind", ["tcp", "tls", "inproc", "memory"])
    async def test_reading_what_is_there(self, new_pair: Any, kind: str) -> None:
        async with new_pair(kind) as pair:
            count = 160 if pair.framed else 16
            await pair.client.write("first")
            assert await pair.server.read() == "first"
            for n in range(count):
                await pair.client.write(n)

            async def work() -> None:
                for n in range(count):
                    assert await pair.server.read() == n

            turns = await turns_of(work)
            assert count // 16 <= turns <= count // 16 + 2

    @pytest.mark.parametrize("kind", ["tcp", "tls", "memory"])
    async def test_writing_what_is_taken(self, new_pair: Any, kind: str) -> None:
        async with new_pair(kind) as pair:

            async def work() -> None:
                for n in range(160):
                    await pair.client.write(n)

            assert 10 <= await turns_of(work) <= 11

    @pytest.mark.parametrize("message", [b"x" * 30_000, [to_serialize(b"x" * 30_000)]], ids=["one frame", "several"])
    async def test_writing_bytes(self, new_pair: Any, message: Any) -> None:
        async with new_pair("tcp") as pair:

            async def work() -> None:
                for _ in range(20):
                    await pair.client.write(message)

            assert 9 <= await turns_of(work) <= 11  # two of them are 60 000 bytes, and count for two messages

    async def test_messages_of_several_frames(self, new_pair: Any) -> None:
        async with new_pair("tcp") as pair:
            message = [to_serialize(b"x" * 100)]

            async def work() -> None:
                for _ in range(160):
                    await pair.client.write(message)

            assert 10 <= await turns_of(work) <= 20

    async def test_reading_bytes(self, new_pair: Any) -> None:
        """A large message that lies in the kernel is read without a wait, but not without letting others run."""
        async with new_pair("tcp") as pair, trio.open_nursery() as nursery:
            nursery.start_soon(pair.client.write, b"x" * 2 * MiB)
            await trio.testing.wait_all_tasks_blocked(0.02)
            # The rest comes while it is read, so this is at least what was there.
            assert await turns_of(pair.server.read) >= 2

    async def test_large_writes(self, new_pair: Any) -> None:
        async with new_pair("tcp") as pair:
            assert await turns_of(lambda: pair.client.write(b"x" * 100_000)) >= 1


class TestEncoding:
    async def test_what_can_not_be_sent_costs_nothing(self, framed: Any) -> None:
        with pytest.raises(SerializationError) as caught:
            await framed.client.write({"a": [1, (n for n in ())]})
        assert caught.value.path == "a[1]"
        with pytest.raises(SerializationError):
            await framed.client.send(n for n in ())
        await framed.client.write("next")
        assert await framed.server.read() == "next"

    async def test_a_stranger_is_sent_no_pickle(self, new_pair: Any) -> None:
        async with new_pair("memory", trusted=False) as pair:
            with pytest.raises(UnsafePayload):
                await pair.client.write(ToPickle({1}))
            await pair.client.write("next")
            assert await pair.server.read() == "next"

    async def test_a_strangers_pickle_is_not_read(self, new_pair: Any) -> None:
        async with new_pair("memory", security=Security(pickle="never")) as pair:
            frames = dumps({"x": ToPickle({1})})
            await pair.server._transmit(frames)
            with pytest.raises(UnsafePayload):
                await pair.client.read()
            await pair.server.write("next")
            assert await pair.client.read() == "next"

    async def test_what_an_unserialisable_payload_does(self, framed: Any) -> None:
        payload = to_serialize(n for n in ())
        with pytest.raises(SerializationError):
            await framed.client.write(payload, on_error="raise")
        for _ in range(2):
            await framed.client.write(payload)  # as Dask: the receiver is told
            with pytest.raises(TypeError, match="generator"):
                await framed.server.read()
        await framed.client.write(payload, on_error="message")
        with pytest.raises(TypeError, match="generator"):
            await framed.server.receive()
        with pytest.raises(ValueError, match="on_error='ignore': must be 'message' or 'raise'"):
            await framed.client.write(payload, on_error="ignore")

    async def test_families_for_one_message(self, framed: Any) -> None:
        framed.server.settings = framed.client.settings
        await framed.client.write(to_serialize({"x": 1}), serializers=["msgpack"])
        assert await framed.server.read() == {"x": 1}
        with pytest.raises(SerializationError):
            await framed.client.put(to_serialize(object()), serializers=["msgpack"])
        await framed.client.put("next")
        assert await framed.server.read() == "next"

    async def test_deserializers_for_one_message(self, framed: Any) -> None:
        await framed.client.write([to_serialize(frozenset({1}))])
        found = await framed.server.next_head()
        assert found is not None
        head, frames = found
        assert head == ({"__Serialized__": 1},)
        with pytest.raises(TypeError):
            framed.server.resolve(frames, deserializers=("msgpack",))
        assert framed.server.resolve(frames) == (frozenset({1}),)

    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls"])
    async def test_payloads_may_stay_as_they_are(self, new_pair: Any, kind: str) -> None:
        async with new_pair(kind, deserialize=False) as pair:
            await pair.client.write({"x": to_serialize(b"data"), "y": ToPickle(5)})
            found = await pair.server.read()
            assert isinstance(found["x"], Serialized)
            assert found["y"] == 5


class TestBadInput:
    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (bytes(16), RemoteProtocolError),
            (b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", LimitExceeded),
            ((2**40).to_bytes(8, "little") + bytes(8) + b"\x01", RemoteProtocolError),
            ((2**62).to_bytes(8, "little") + b"\x01" + bytes(7), LimitExceeded),
        ],
    )
    async def test_lost_framing_closes(self, framed: Any, data: bytes, expected: type[Exception]) -> None:
        await framed.server._pump.send([data], 0)
        with pytest.raises(expected):
            await framed.client.read()
        assert framed.client.closed()
        with pytest.raises(CommClosedError, match="is not acceptable"):
            await framed.client.receive()
        with pytest.raises(CommClosedError, match="is not acceptable"):
            await framed.client.write(1)

    @pytest.mark.parametrize("data", [b"\xc1", b"\x81", b"\x00\x00"])
    async def test_an_unreadable_message_does_not(self, framed: Any, data: bytes) -> None:
        await framed.server._pump.send([single_frame(data)], 0)
        with pytest.raises(RemoteProtocolError):
            await framed.client.read()
        assert not framed.client.closed()
        await framed.server.write("next")
        assert await framed.client.read() == "next"

    @pytest.mark.parametrize("size", [1, 16, 24, 50])
    @pytest.mark.parametrize(("operation", "expected"), ENDS)
    async def test_an_end_inside_a_message(self, framed: Any, size: int, operation: str, expected: type[Exception]) -> None:
        await framed.server.write("whole")
        await framed.server._pump.send([single_frame(dumps("x" * 100)[0])[:size]], 0)
        framed.server.abort()
        assert await getattr(framed.client, operation)() == "whole"
        for _ in range(2):
            with pytest.raises(CommClosedError, match="closed the comm in the middle of a message"):
                await getattr(framed.client, operation)()

    async def test_a_limit_for_strangers(self, new_pair: Any) -> None:
        limits = Limits(message=1000, message_trusted=100_000)
        for trusted in (True, False):
            async with new_pair("memory", trusted=trusted, limits=limits) as pair:
                await pair.server.write(b"x" * 5000)
                if trusted:
                    assert len(await pair.client.read()) == 5000
                else:
                    with pytest.raises(LimitExceeded, match=r"Limits\(message=...\)"):
                        await pair.client.read()

    async def test_a_payload_that_grows_too_large(self, new_pair: Any) -> None:
        """What it is when decompressed counts, and that is refused before the memory is taken."""
        limits = Limits(message=10_000, message_trusted=100_000)
        for trusted, field, size in ((False, "message", 50_000), (True, "message_trusted", 500_000), (True, None, 50_000)):
            async with new_pair("memory", trusted=trusted, limits=limits, deserialize=True) as pair:
                header = {"serializer": "msgpack", "num-sub-frames": 1, "compression": ["zlib"]}
                payload = zlib.compress(msgpack.packb(bytes(size)))
                frames = [msgpack.packb({"__Serialized__": 1}), msgpack.packb(header), payload]
                await pair.server._transmit(frames)
                if field is None:
                    assert await pair.client.read() == bytes(size)
                else:
                    with pytest.raises(LimitExceeded, match=str(getattr(limits, field))):
                        await pair.client.read()

    async def test_a_header_that_is_too_large(self, new_pair: Any) -> None:
        for trusted, field in ((False, "head"), (True, "head_trusted")):
            limits = Limits(head=200, head_trusted=400)
            async with new_pair("memory", trusted=trusted, limits=limits, deserialize=False) as pair:
                size = 300 if not trusted else 500
                header = {"serializer": "msgpack", "num-sub-frames": 0, "x": "y" * size}
                await pair.server._transmit([msgpack.packb({"__Serialized__": 1}), msgpack.packb(header)])
                with pytest.raises(LimitExceeded, match=str(getattr(limits, field))):
                    await pair.client.read()


class TestHandshake:
    async def test_what_both_say(self, framed: Any) -> None:
        assert framed.client.extension == framed.server.extension
        assert framed.client.extension.version == 1

    async def test_a_peer_that_closes(self, over_stream: Any) -> None:
        ours, theirs = memory_stream_pair()
        comm = over_stream(ours)
        theirs.close()
        with pytest.raises(CommClosedError):
            await comm.handshake()
        comm.abort()

    async def test_a_peer_that_reads_and_closes(self, over_stream: Any) -> None:
        ours, theirs = memory_stream_pair()
        comm = over_stream(ours)
        await theirs.send_eof()
        with pytest.raises(CommClosedError, match="closed the comm during the handshake"):
            await comm.handshake()
        comm.abort()
        theirs.close()

    @pytest.mark.parametrize("message", [5, {"compression": None}, {"pickle-protocol": "five", "compression": None}])
    async def test_a_bad_one_closes(self, over_stream: Any, message: Any) -> None:
        ours, theirs = memory_stream_pair()
        comm = over_stream(ours)
        await theirs.send_all(single_frame(dumps(message)[0]))
        with pytest.raises(RemoteProtocolError):
            await comm.handshake()
        assert comm.closed()
        theirs.close()

    async def test_a_payload_in_it_is_not_touched(self, over_stream: Any) -> None:
        """A stock peer unpickles whatever stands in a handshake."""

        class Canary:
            def __reduce__(self) -> tuple[Any, ...]:
                return pytest.fail, ("was unpickled",)

        ours, theirs = memory_stream_pair()
        comm = over_stream(ours)
        header = dumps({"pickled-obj": pickle.dumps(Canary()), "compression": (), "num-sub-frames": 0})[0]
        head = dumps({"compression": None, "pickle-protocol": 5, "python": (3, 11, 0)})[0]
        marked = b"\x84" + head[1:] + b"\xa1x\x81\xab__Pickled__\x01"
        await theirs.send_all(b"".join((pack_prelude([marked, header]), marked, header)))
        await comm.handshake()
        assert comm.extension is None
        comm.abort()
        theirs.close()

    async def test_nothing_but_plain_data_before_it(self, over_stream: Any) -> None:
        ours, theirs = memory_stream_pair()
        comm = over_stream(ours)
        with pytest.raises(UnsafePayload):
            await comm.write(ToPickle(1))
        comm.abort()
        theirs.close()


class TestNowaitAndSoon:
    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls", "inproc"])
    async def test_now(self, new_pair: Any, kind: str) -> None:
        async with new_pair(kind) as pair:
            assert pair.client.write_nowait("now")
            assert pair.client.write_soon(["soon", to_serialize(b"x")])
            assert await pair.server.read() == "now"
            assert tuple(await pair.server.read()) == ("soon", b"x")

    async def test_a_stream_that_can_not_send_without_waiting(self, new_pair: Any) -> None:
        async with new_pair("stream") as pair:
            before = pair.client.messages_written
            assert not pair.client.write_nowait("now")
            assert pair.client.messages_written == before
            assert pair.client.write_soon("soon")
            assert pair.client.messages_written == before + 1
            with trio.fail_after(PATIENCE):
                assert await pair.server.read() == "soon"

    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls"])
    async def test_behind_the_message_that_is_being_written(self, new_pair: Any, kind: str) -> None:
        async with new_pair(kind) as pair, trio.open_nursery() as nursery:
            await until_blocked(lambda: pair.client.write(("first", MUCH)), nursery)
            nursery.start_soon(pair.client.write, ("queued", MUCH))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not pair.client.write_nowait("now")
            assert pair.client.write_soon("soon")
            assert pair.client.write_soon("and this")
            with trio.fail_after(PATIENCE):
                assert (await pair.server.read())[0] == "first"
                assert await pair.server.read() == "soon"
                assert await pair.server.read() == "and this"
                assert (await pair.server.read())[0] == "queued"

    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls"])
    async def test_when_nobody_writes_any_more(self, new_pair: Any, kind: str) -> None:
        """The buffers are full of whole messages: what is owed gets out when the peer reads, and nobody else has to help."""
        async with new_pair(kind) as pair:
            count = 0
            while pair.client.write_nowait(b"x" * 10_000):
                count += 1
            assert pair.client.write_soon("soon") or count
            with trio.fail_after(PATIENCE):
                found = []
                while "soon" not in found:
                    found.append(await pair.server.read())
            assert set(map(len, found[:-1])) == {10_000}

    async def test_a_part_that_was_taken(self, new_pair: Any) -> None:
        """The kernel may take a part of the smallest message; its rest goes before everything else."""
        async with new_pair("memory", capacity=40_000) as pair:
            assert pair.client.write_nowait(b"x" * 39_000)
            assert pair.client.write_nowait(b"y" * 30_000)
            assert not pair.client.write_nowait("refused")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.client.write, "later")
                await trio.testing.wait_all_tasks_blocked()
                with trio.fail_after(PATIENCE):
                    assert await pair.server.read() == b"x" * 39_000
                    assert await pair.server.read() == b"y" * 30_000
                    assert await pair.server.read() == "later"

    async def test_there_is_a_limit_to_what_is_owed(self, new_pair: Any) -> None:
        async with new_pair("memory") as pair, trio.open_nursery() as nursery:
            await until_blocked(lambda: pair.client.write(MUCH), nursery)
            count = 0
            while pair.client.write_soon(b"x" * 1000):
                count += 1
            assert count == 16
            with trio.fail_after(PATIENCE):
                assert await pair.server.read() == MUCH
                for _ in range(count):
                    assert await pair.server.read() == b"x" * 1000
            assert pair.client.write_soon("again")
            assert await pair.server.read() == "again"

    @pytest.mark.parametrize("how", ["abort", "reset"])
    async def test_what_is_owed_when_the_comm_ends_is_dropped(self, new_pair: Any, how: str) -> None:
        async with new_pair("memory", capacity=10_000) as pair:
            assert pair.client.write_nowait(b"x" * 9_900)
            assert pair.client.write_soon(b"y" * 9_900)
            await trio.testing.wait_all_tasks_blocked()
            if how == "abort":
                pair.client.abort()
            else:
                pair.streams[0].reset()
            await trio.testing.wait_all_tasks_blocked()
            assert pair.client.closed()
            with pytest.raises((CommClosedError, trio.ClosedResourceError)):
                pair.client.write_soon("x")

    async def test_closing_lets_out_what_is_owed(self, new_pair: Any) -> None:
        async with new_pair("memory", capacity=10_000) as pair, trio.open_nursery() as nursery:
            assert pair.client.write_nowait(b"x" * 9_900)
            assert pair.client.write_soon(b"y" * 9_900)
            nursery.start_soon(pair.client.aclose)
            with trio.fail_after(PATIENCE):
                assert [message async for message in pair.server] == [b"x" * 9_900, b"y" * 9_900]

    async def test_a_failure_of_any_kind_is_the_comms(self, over_stream: Any) -> None:
        """What is owed is sent by a task of the system's, whose errors would end the run."""

        class Broken(trio.abc.Stream):
            async def send_all(self, data: Any) -> None:
                await trio.lowlevel.checkpoint()
                raise RuntimeError("what a stream must not raise")

            async def receive_some(self, max_bytes: int | None = None) -> bytes:
                raise NotImplementedError

            async def wait_send_all_might_not_block(self) -> None:
                raise NotImplementedError

            async def aclose(self) -> None:
                await trio.lowlevel.checkpoint()

        comm = over_stream(Broken())
        assert comm.write_soon("x")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(CommClosedError, match=r"interrupted|what a stream must not raise"):
            await comm.write("y")

    @pytest.mark.parametrize("call", ["write_nowait", "write_soon"])
    async def test_a_peer_that_has_gone(self, new_pair: Any, call: str) -> None:
        for kind in ("memory", "inproc"):
            async with new_pair(kind) as pair:
                pair.server.abort()
                with pytest.raises(CommClosedError):
                    getattr(pair.client, call)("x")


class TestNothingSent:
    """Whether a request may be made again on another comm."""

    @pytest.mark.parametrize(
        "message", ["small", [to_serialize(b"payload")], b"x" * 300_000], ids=["one frame", "several", "large"]
    )
    async def test_a_peer_that_had_gone(self, new_pair: Any, message: Any) -> None:
        async with new_pair("tcp") as pair:
            pair.server._pump.socket.setsockopt(
                trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
            )
            pair.server._pump.socket.close()
            with pytest.raises(CommClosedError) as caught:
                await pair.client.write(message)
            assert caught.value.nothing_sent
            with pytest.raises(CommClosedError) as caught:
                await pair.client.write(message)
            assert caught.value.nothing_sent

    async def test_a_peer_that_goes_meanwhile(self, new_pair: Any) -> None:
        async with new_pair("tcp") as pair, trio.open_nursery() as nursery:

            async def writer() -> None:
                with pytest.raises(CommClosedError) as caught:
                    await pair.client.write(MUCH)
                assert not caught.value.nothing_sent

            await until_blocked(writer, nursery)
            pair.server.abort()


class TestStale:
    async def test_an_idle_comm_is_fit_for_use(self, pair: Any) -> None:
        assert not pair.client.stale()

    @pytest.mark.parametrize("kind", ["tcp", "tls", "inproc"])
    async def test_one_with_something_to_read_is_not(self, new_pair: Any, kind: str) -> None:
        async with new_pair(kind) as pair:
            await pair.server.write("unasked")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert pair.client.stale()
            await pair.client.read()
            assert not pair.client.stale()

    @pytest.mark.parametrize("kind", ["tcp", "tls", "inproc"])
    async def test_one_that_has_ended_is_not(self, new_pair: Any, kind: str) -> None:
        async with new_pair(kind) as pair:
            pair.server.abort()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert pair.client.stale()
            with pytest.raises(CommClosedError):
                await pair.client.read()
            assert pair.client.stale()

    async def test_one_that_was_reset_is_not(self, new_pair: Any) -> None:
        async with new_pair("tcp") as pair:
            pair.server._pump.socket.setsockopt(
                trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
            )
            pair.server._pump.socket.close()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert pair.client.stale()

    async def test_one_with_a_second_message_in_its_buffer_is_not(self, framed: Any) -> None:
        data = single_frame(dumps("first")[0]) + single_frame(dumps("second")[0])
        await framed.server._pump.send([data], 0)
        assert await framed.client.read() == "first"
        assert framed.client.stale()
        assert await framed.client.read() == "second"
        assert not framed.client.stale()


class TestGoodbye:
    """What a server that shuts down said last, on a comm that is of no further use."""

    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls", "inproc"])
    @pytest.mark.parametrize("before", [0, 3])
    async def test_it_is_found_behind_what_nobody_read(self, new_pair: Any, kind: str, before: int) -> None:
        async with new_pair(kind) as pair:
            for _ in range(before):
                await pair.server.write((WINDOW, 1, (5, 5)))
            assert pair.server.write_nowait((GOODBYE, 4, None))
            pair.server.abort()
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert pair.client.take_goodbye(5)

    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls", "inproc"])
    async def test_one_that_names_the_request(self, new_pair: Any, kind: str) -> None:
        """It was taken up: whether it took effect is unknown."""
        async with new_pair(kind) as pair:
            assert pair.server.write_nowait((GOODBYE, 5, None))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not pair.client.take_goodbye(5)

    @pytest.mark.parametrize("kind", ["memory", "tcp", "tls", "inproc", "stream"])
    @pytest.mark.parametrize("message", [None, (), (GOODBYE,), "text", {"op": "x"}, (GOODBYE, "x", None), ([1], [2], 3)])
    async def test_what_is_none(self, new_pair: Any, kind: str, message: Any) -> None:
        async with new_pair(kind) as pair:
            assert not pair.client.take_goodbye(5)
            await pair.server.write(message)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not pair.client.take_goodbye(5)

    async def test_garbage(self, new_pair: Any) -> None:
        async with new_pair("tcp") as pair:
            await pair.server._pump.send([b"\xff" * 100], 0)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not pair.client.take_goodbye(5)

    async def test_a_peer_that_goes_on_sending_does_not_keep_us(self, new_pair: Any) -> None:
        async with new_pair("tcp") as pair:
            for _ in range(100):
                await pair.server.write((WINDOW, 1, (5, 5)))
            assert pair.server.write_nowait((GOODBYE, 4, None))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not pair.client.take_goodbye(5)

    async def test_not_while_somebody_reads_nor_on_a_closed_comm(self, framed: Any) -> None:
        async with trio.open_nursery() as nursery:
            await until_blocked(framed.client.read, nursery)
            assert not framed.client.take_goodbye(5)
            nursery.cancel_scope.cancel()
        framed.client.abort()
        assert not framed.client.take_goodbye(5)


class TestReading:
    async def test_whether_somebody_reads(self, pair: Any) -> None:
        assert not pair.client.reading
        async with trio.open_nursery() as nursery:
            await until_blocked(pair.client.read, nursery)
            assert pair.client.reading
            nursery.cancel_scope.cancel()
        assert not pair.client.reading

    async def test_the_watch_is_no_reader(self, framed: Any) -> None:
        async with trio.open_nursery() as nursery:
            framed.client.watch_end(nursery, lambda: None)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not framed.client.reading
            await until_blocked(framed.client.read, nursery)
            assert framed.client.reading
            nursery.cancel_scope.cancel()


class Stubborn(trio.abc.Stream):
    """A stream whose every operation does what a test says."""

    def __init__(self, **steps: Callable[[], Any]) -> None:
        self.steps = steps
        self.closes = 0

    async def _do(self, name: str) -> Any:
        await trio.lowlevel.checkpoint()
        if name in self.steps:
            return await self.steps[name]()
        return await trio.sleep_forever()

    async def send_all(self, data: Any) -> None:
        await self._do("send_all")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        found: bytes = await self._do("receive_some")
        return found

    async def wait_send_all_might_not_block(self) -> None:
        await self._do("wait")

    async def aclose(self) -> None:
        self.closes += 1
        await self._do("aclose")


def raising(error: BaseException) -> Callable[[], Any]:
    async def step() -> None:
        raise error

    return step


class TestOddStreams:
    async def test_a_close_that_fails_has_closed(self, over_stream: Any) -> None:
        for error in (trio.BrokenResourceError("gone"), trio.ClosedResourceError(), OSError("no")):
            comm = over_stream(Stubborn(aclose=raising(error)))
            await comm.aclose()
            assert comm.closed()

    async def test_a_close_that_takes_for_ever(self, over_stream: Any, autojump_clock: Any) -> None:
        """TLS tells the peer, and the peer may not be reading."""
        stream = Stubborn()
        comm = over_stream(stream, limits=Limits(linger=7))
        begun = trio.current_time()
        await comm.aclose()
        assert trio.current_time() - begun == pytest.approx(7)
        assert stream.closes == 1

    @pytest.mark.parametrize("operation", ["read", "write"])
    async def test_a_stream_that_was_closed_behind_our_back(self, over_stream: Any, operation: str) -> None:
        stream = Stubborn(send_all=raising(trio.ClosedResourceError()), receive_some=raising(trio.ClosedResourceError()))
        comm = over_stream(stream)
        with pytest.raises(CommClosedError, match="closed here"):
            await (comm.read() if operation == "read" else comm.write("x"))
        assert comm.closed()
        await trio.testing.wait_all_tasks_blocked()

    async def test_errors_that_are_none_of_a_streams(self, over_stream: Any) -> None:
        """A bug, somewhere: it is raised as it is, and the comm is closed if it may be in the middle of a message."""
        stream = Stubborn(send_all=raising(ValueError("bug")), receive_some=raising(ValueError("bug")))
        comm = over_stream(stream)
        with pytest.raises(ValueError, match="bug"):
            await comm.read()
        assert not comm.closed()
        with pytest.raises(ValueError, match="bug"):
            await comm.write("x")
        assert comm.closed()
        await trio.testing.wait_all_tasks_blocked()

    async def test_an_interrupt_loses_no_message_unseen(self, new_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """KeyboardInterrupt may come where other tasks run between a message's arrival and its return."""

        async def interrupt() -> None:
            await trio.lowlevel.checkpoint()
            raise KeyboardInterrupt

        async with new_pair("memory") as pair:
            await pair.server.write("lost")
            monkeypatch.setattr(_comm, "cancel_shielded_checkpoint", interrupt)
            with pytest.raises(KeyboardInterrupt):
                await _read_without_waiting(pair.client)
            assert pair.client.closed()

    async def test_what_is_owed_outlives_a_writer_that_gave_up(self, new_pair: Any) -> None:
        """One that is cancelled before a byte of what is owed, or of its own, has gone."""
        async with new_pair("tcp") as pair:
            while pair.client.write_nowait(b"x" * 50_000):
                pass
            assert pair.client.write_soon("owed")
            with trio.move_on_after(0.05) as scope:
                await pair.client.write("given up")
            assert scope.cancelled_caught
            assert not pair.client.closed()
            with trio.fail_after(PATIENCE):
                while (message := await pair.server.read()) != "owed":
                    assert len(message) == 50_000
                await pair.client.write("next")
                assert await pair.server.read() == "next"


async def _read_without_waiting(comm: Any) -> None:
    """Have the bytes in the parser first, so that the read itself needs no wait."""
    await comm._pump.fill(comm._parser)
    comm._pump.unwaited = 10**6
    await comm.read()


class TestMemory:
    async def test_large_payloads_are_not_copied(self, new_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """64 MiB there and back: nothing but one buffer a message at the receiver."""
        import numpy

        allocated: list[int] = []
        allocate = frames_module.allocate
        monkeypatch.setattr(frames_module, "allocate", lambda size: (allocated.append(size), allocate(size))[1])
        size = 64 * MiB
        payload = numpy.zeros(size, dtype="u1")
        payload[-5:] = 7
        async with new_pair("tcp") as pair:

            async def echo() -> None:
                # What was received is sent again from the buffer it lies in.
                await pair.server.write({"data": to_serialize((await pair.server.read())["data"])})

            gc.collect()
            tracemalloc.start()  # sees bytes and bytearrays, and not the mappings that large frames are received in
            try:
                with trio.fail_after(6 * PATIENCE):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(echo)
                        await pair.client.write({"data": to_serialize(payload)})
                        found = (await pair.client.read())["data"]
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert (found == payload).all()
            found[0] = 1  # it is the receiver's own
            assert peak < 0.05 * size
            assert sum(allocated) <= 2.05 * size

    async def test_a_large_message_of_one_frame_is_sent_from_where_it_is(self, new_pair: Any) -> None:
        async with new_pair("tcp") as pair, trio.open_nursery() as nursery:
            frame = dumps(bytes(16 * MiB))[0]
            nursery.start_soon(pair.server.read)
            tracemalloc.start()
            try:
                await pair.client._transmit([frame])
                # The peer's is in here as well: one frame to read into and one to hold it as bytes, and the value.
                assert tracemalloc.get_traced_memory()[1] < 3.3 * 16 * MiB
            finally:
                tracemalloc.stop()

    async def test_a_closed_comm_keeps_nothing(self, new_pair: Any) -> None:
        async with new_pair("memory") as pair:
            assert isinstance(pair.client, FramedComm)
            await pair.server._pump.send([single_frame(dumps(b"x" * 30_000)[0])[:20_000]], 0)
            with trio.move_on_after(0.01):
                await pair.client.read()
            assert pair.client.closed()


async def test_a_raw_comm_has_the_messages_of_the_extension(framed: Any) -> None:
    """Extension types belong to the comm (architecture document, section 3.6)."""
    await framed.client.write({1: frozenset({2**70, complex(1, 2)})})
    assert await framed.server.read() == {1: frozenset({2**70, complex(1, 2)})}
