"""Items of a generator that are joined: when they leave, in which order, and what becomes of them."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.comm.test_substream import comms, read, substream
from trio_dcore import CommClosedError, Limits, SerializationError, Server, rpc, to_serialize
from trio_dcore.comm import Gatherer
from trio_dcore.protocol._envelope import CANCEL, END, ITEM, ITEMS, WINDOW, Credit
from trio_dcore.testing import memory_network, no_leaks

MIB = 2**20


class Clock:
    """What the generator's steps take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("trio_dcore.comm._gatherer.perf_counter", clock)
    return clock


@pytest.fixture(params=["tcp://127.0.0.1:0", "memory://"])
def bytes_where(request: pytest.FixtureRequest) -> str:
    where: str = request.param
    return where


def gatherer(comm: Any, items: int = 16, size: int = MIB, **options: Any) -> tuple[Gatherer, Any]:
    stream = substream(comm, credit=Credit(items, size), half_close=True, **options)
    return Gatherer(stream, comm), stream


async def messages(comm: Any, count: int) -> list[Any]:
    return [(await read(comm))[0::2] for _ in range(count)]


class TestWhenTheyLeave:
    async def test_the_first_half_of_a_window_leaves_item_by_item(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, stream = gatherer(ours)
            for i in range(16):
                await gathered.emit(i)
            expected = [(ITEM, i) for i in range(8)] + [(ITEMS, tuple(range(8, 16)))]
            assert await messages(theirs, 9) == expected
            assert stream.items_sent == 16
            assert stream.credit_items == 0
            assert ours.bytes_written - 16 * 28 < stream.credit_size + ours.bytes_written

    async def test_the_credit_is_that_of_the_messages(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, stream = gatherer(ours, 100)
            before = ours.bytes_written
            for i in range(100):
                await gathered.emit(i)
            assert stream.credit_items == 0
            assert MIB - stream.credit_size == ours.bytes_written - before
            receiver = substream(theirs, window=Credit(100, MIB))
            assert [await receiver.receive() for _ in range(100)] == list(range(100))
            await theirs.write((END, 5, None))
            with pytest.raises(trio.EndOfChannel):
                await stream.receive()  # reads what was granted
            assert (stream.credit_items, stream.credit_size) == (100, MIB)

    async def test_when_the_generator_waits_or_ends(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, _stream = gatherer(ours)
            for i in range(11):
                await gathered.emit(i)
            assert await messages(theirs, 8) == [(ITEM, i) for i in range(8)]
            gathered.flush()
            assert await read(theirs) == (ITEMS, 5, (8, 9, 10))
            gathered.flush()
            await gathered.emit(11)
            gathered.flush()
            assert await read(theirs) == (ITEM, 5, 11)

    async def test_a_slow_step_leaves_at_once(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, _stream = gatherer(ours)
            clock.step = 0.001
            for i in range(16):
                await gathered.emit(i)
                assert await read(theirs) == (ITEM, 5, i)

    async def test_a_slow_step_takes_along_what_was_gathered(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, _stream = gatherer(ours)
            for i in range(10):
                await gathered.emit(i)
            clock.now += 0.001
            await gathered.emit(10)
            assert (await messages(theirs, 9))[-1] == (ITEMS, (8, 9, 10))

    async def test_what_is_old_leaves_though_every_step_is_quick(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, _stream = gatherer(ours, 64)
            clock.step = 0.00003
            for i in range(64):
                await gathered.emit(i)
            found = await messages(theirs, 32)
            assert found == [(ITEM, i) for i in range(32)]
            longest = 0
            left = 32
            while left:
                kind, value = (await messages(theirs, 1))[0]
                count = len(value) if kind == ITEMS else 1
                longest = max(longest, count)
                left -= count
            assert 1 < longest <= 5

    async def test_no_more_at_once_than_other_tasks_can_bear(self, clock: Clock, bytes_where: str) -> None:
        """Nor more bytes than some KiB."""
        async with comms(bytes_where) as (ours, theirs):
            gathered, _stream = gatherer(ours, 1000)
            for i in range(692):
                await gathered.emit(i)
            found = await messages(theirs, 503)
            assert [len(value) for kind, value in found if kind == ITEMS] == [64] * 3
            assert [kind for kind, _ in found].count(ITEM) == 500
            for _ in range(25):
                await gathered.emit("x" * 1000)
            gathered.flush()
            left = 25
            while left:
                kind, value = (await messages(theirs, 1))[0]
                count = len(value) if kind == ITEMS else 1
                assert count <= 9
                left -= count

    async def test_others_run_meanwhile(self, clock: Clock) -> None:
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            gathered, _stream = gatherer(ours, 10_000)
            turns = []

            async def other() -> None:
                while True:
                    turns.append(_stream.items_sent)
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                nursery.start_soon(_discard, theirs)
                for i in range(6000):
                    await gathered.emit(i)
                nursery.cancel_scope.cancel()
            assert max(b - a for a, b in itertools.pairwise(turns)) <= 160

    async def test_a_window_of_one(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, _stream = gatherer(ours, 1)
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def emit() -> None:
                    for i in range(5):
                        await gathered.emit(i)

                for i in range(5):
                    assert await read(theirs) == (ITEM, 5, i)
                    await theirs.write((WINDOW, 5, (1, 100)))

    async def test_behind_a_wait_for_credit(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, _stream = gatherer(ours, 4)
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def emit() -> None:
                    for i in range(8):
                        await gathered.emit(i)
                    gathered.flush()

                await wait_all_tasks_blocked(0.01)
                await theirs.write((WINDOW, 5, (2, 1000)))
                await wait_all_tasks_blocked(0.01)
                await theirs.write((WINDOW, 5, (2, 1000)))
                expected = [(ITEM, 0), (ITEM, 1), (ITEMS, (2, 3)), (ITEMS, (4, 5)), (ITEMS, (6, 7))]
                assert await messages(theirs, 5) == expected


async def _discard(comm: Any) -> None:
    while True:
        await comm.read()


class TestOneByOne:
    """Each item is still an item of its own."""

    async def test_one_that_can_not_be_sent(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, stream = gatherer(ours)
            for i in range(12):
                await gathered.emit(i)
                with pytest.raises(SerializationError):
                    await gathered.emit({"x": [(i for i in ())]})
            gathered.flush()
            assert [value for _, value in await messages(theirs, 9)] == [*range(8), (8, 9, 10, 11)]
            assert stream.items_sent == 12

    async def test_what_was_changed_since(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, _stream = gatherer(ours)
            item = {"n": 0}
            for i in range(16):
                item["n"] = i
                await gathered.emit(item)
            assert (await messages(theirs, 9))[-1][1] == tuple({"n": i} for i in range(8, 16))

    async def test_payloads_and_large_items_go_alone_and_in_order(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            values = [
                *range(9),
                b"x" * 5000,
                9,
                "y" * 5000,
                10,
                to_serialize((1, 2)),
                11,
                {"__Set__": 1},
                {3},
                None,
                (ITEM, 5, 0),
            ]
            gathered, stream = gatherer(ours, 18)
            receiver = substream(theirs, window=Credit(100, MIB))
            for value in values[:18]:
                await gathered.emit(value)
            gathered.flush()
            found = [await receiver.receive() for _ in range(18)]
            expected = [(1, 2) if type(value) is type(to_serialize(0)) else value for value in values[:18]]
            assert found == expected
            assert stream.items_sent == 18


class TestWhatBecomesOfThem:
    async def test_cancelled_they_are_sent_before_anything_else(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, stream = gatherer(ours)
            with trio.CancelScope() as scope:
                for i in range(12):
                    await gathered.emit(i)
                scope.cancel()
                await gathered.emit("not this one")
            assert scope.cancelled_caught
            await stream.send_end()
            found = await messages(theirs, 10)
            assert found == [(ITEM, i) for i in range(8)] + [(ITEMS, (8, 9, 10, 11)), (END, None)]

    async def test_a_send_and_the_end_come_behind_them(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, stream = gatherer(ours)
            for i in range(10):
                await gathered.emit(i)
            await stream.send("by hand")
            await gathered.emit(10)
            await gathered.emit(11)
            await stream.send_end()
            found = await messages(theirs, 12)
            assert found[8:] == [(ITEMS, (8, 9)), (ITEM, "by hand"), (ITEMS, (10, 11)), (END, None)]

    async def test_lost_with_the_comm(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, _theirs):
            gathered, _stream = gatherer(ours)
            for i in range(10):
                await gathered.emit(i)
            ours.abort()
            gathered.flush()
            with pytest.raises((CommClosedError, trio.ClosedResourceError)):
                await gathered.emit(10)

    async def test_the_consumer_goes_while_they_wait(self, clock: Clock, bytes_where: str) -> None:
        async with comms(bytes_where) as (ours, theirs):
            gathered, stream = gatherer(ours)
            for i in range(16):
                await gathered.emit(i)
            await theirs.write((CANCEL, 5, None))
            with pytest.raises(CommClosedError, match="takes no more items"):
                await gathered.emit(16)
            assert stream.deaf

    @pytest.mark.parametrize("waits", [False, True])
    async def test_what_the_system_does_not_take_is_owed(self, waits: bool, clock: Clock, bytes_where: str) -> None:
        async with no_leaks(), comms(bytes_where) as (ours, theirs):
            gathered, stream = gatherer(ours, 20_000, 2**30)
            receiver = substream(theirs, window=Credit(20_000, 2**30))
            count = 12_000 if bytes_where.startswith("tcp") else 500
            done = []
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def emit() -> None:
                    for i in range(count):
                        await gathered.emit((i, "x" * 1000))
                        if waits and i % 5 == 0:
                            gathered.flush()
                            await trio.lowlevel.checkpoint()
                    gathered.flush()
                    await stream.settle()
                    done.append(True)

                await wait_all_tasks_blocked(0.05)
                assert not done  # it waits for the consumer
                for i in range(count):
                    assert (await receiver.receive())[0] == i
            assert done

    async def test_cancelled_while_they_are_owed(self, clock: Clock, bytes_where: str) -> None:
        """The generator's own scope ends while the system takes nothing: no item is lost, none comes twice."""
        async with comms(bytes_where) as (ours, theirs):
            gathered, stream = gatherer(ours, 20_000, 2**30)
            receiver = substream(theirs, window=Credit(20_000, 2**30))
            accepted: list[int] = []
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def emit() -> None:
                        for i in range(12_000):
                            accepted.append(i)
                            try:
                                await gathered.emit((i, "x" * 1000))
                            except trio.Cancelled:
                                accepted.append(-1)
                                raise

                    await wait_all_tasks_blocked(0.05)
                    scope.cancel()
            assert accepted[-1] == -1
            assert accepted[-2] > 20
            if ours.closed():
                return  # it was cut in the middle of a message
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send, ("end", ""))
                found = []
                while (item := (await receiver.receive())[0]) != "end":
                    found.append(item)
            assert found == list(range(len(found)))
            assert accepted[-2] - 1 <= len(found) <= accepted[-2] + 1


class TestPatience:
    @pytest.mark.parametrize("failing", [False, True])
    async def test_a_consumer_may_pause_for_longer_than_a_reply_waits(
        self, failing: bool, clock: Clock, autojump_clock: trio.testing.MockClock
    ) -> None:
        """Also where the system's buffers are full and the handler has ended: its last items wait as those before them would."""

        async def give(n: int) -> AsyncIterator[str]:
            for i in range(n):
                yield f"{i:1500}"
                if i % 7 == 0:
                    await trio.lowlevel.checkpoint()
            if failing:
                raise ValueError("at the end")

        limits = Limits(window=1000, window_bytes=2**30, write_stall=1)
        with memory_network():
            async with Server({"give": give}, limits=limits) as server:
                address = await server.listen("memory://")
                for n in (43, 44, 45, 46, 100):
                    async with rpc(address, limits=limits) as remote, remote.give.stream(n=n) as stream:
                        await trio.sleep(1000)
                        found = []
                        try:
                            async for item in stream:
                                found.append(int(item))
                        except ValueError as error:
                            assert (failing, str(error)) == (True, "at the end")  # noqa: PT017  # it comes in the middle
                        assert found == list(range(n))
