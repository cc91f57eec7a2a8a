"""Group I: streams, of items in both directions."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
import trio
import trio.testing

from tests.reference.kit import Wire, reference, until
from tests.reference.test_d_calls_and_pool import counts_are_whole
from trio_dcore import BatchedSend, Comm, CommClosedError, HandlerCancelled, Limits, RemoteError, current_request
from trio_dcore._util import leaves
from trio_dcore.protocol import error_reply
from trio_dcore.testing import ManualPeer

blocked = trio.testing.wait_all_tasks_blocked

#: ``Limits.window``, of both sides.
WINDOW = 16


class Producer:
    """A generator handler that writes down what becomes of it, and in which task."""

    def __init__(self, *, pause: Callable[[], Awaitable[object]] | None = None, count: float = math.inf) -> None:
        self.made = 0
        self.ended = trio.Event()
        self.began_in: trio.lowlevel.Task | None = None
        self.ended_in: trio.lowlevel.Task | None = None
        self.end: BaseException | None = None
        self.inner_ended = False
        self._pause = pause
        self._count = count

    async def items(self) -> AsyncIterator[int]:
        """Give numbers."""
        self.began_in = trio.lowlevel.current_task()
        try:
            async with aclosing(self._inner()) as inner:
                async for number in inner:
                    self.made += 1
                    yield number
        except BaseException as error:
            self.end = error
            raise
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await trio.lowlevel.checkpoint()  # it is awaited
            self.ended_in = trio.lowlevel.current_task()
            self.ended.set()

    async def _inner(self) -> AsyncIterator[int]:
        number = 0
        try:
            while number < self._count:
                yield number
                number += 1
                if self._pause is not None:
                    await self._pause()
        finally:
            self.inner_ended = True


async def leave(stream: Any) -> None:
    """By the end of the block."""


async def close(stream: Any) -> None:
    await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive()


async def fail(stream: Any) -> None:
    raise KeyError("the consumer's own")


async def be_cancelled(stream: Any) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await trio.lowlevel.checkpoint()
    trio.lowlevel.current_task().parent_nursery.cancel_scope.cancel()  # type: ignore[union-attr]
    await trio.lowlevel.checkpoint()


@reference("I01", "m i t u l")
async def test_i01_a_consumer_stops_early(wire: Wire) -> None:
    """However it leaves, and whatever the producer is doing: making items, waiting for the window, waiting for something else."""
    for stop in (leave, close, fail, be_cancelled):
        for pause in (None, trio.lowlevel.checkpoint, trio.sleep_forever):
            producer = Producer(pause=pause)
            async with wire.server({"items": producer.items}) as (server, address), wire.pool() as pool:
                found: list[int] = []

                async def consume() -> None:
                    async with pool(address).items.stream() as stream:  # it ends inside the loop
                        async for item in stream:
                            found.append(item)  # noqa: B023
                            if len(found) == (1 if pause is trio.sleep_forever else 3):  # noqa: B023
                                break
                        await blocked(0.01)
                        await stop(stream)  # noqa: B023

                with wire.now():
                    if stop is fail:
                        with pytest.raises(KeyError):
                            await consume()
                    else:
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(consume)
                    await producer.ended.wait()
                assert found == list(range(len(found)))
                assert producer.made <= len(found) + WINDOW + 1
                assert producer.ended_in is producer.began_in
                assert producer.inner_ended
                assert isinstance(producer.end, (trio.Cancelled, CommClosedError))
                counts_are_whole(pool, open=0)
                await blocked()
                assert server.statistics().in_flight == 0
                assert await pool(address).echo(data=1) == 1


@reference("I02", "m i t u l")
async def test_i02_a_server_returns_early(wire: Wire) -> None:
    """The sender, in whatever it does then, gets a typed end; the stream has its items, and ends."""

    async def some(comm: Comm) -> None:
        for _ in range(3):
            await comm.write(await comm.read())

    async def failing(comm: Comm) -> None:
        await some(comm)
        raise ValueError("enough")

    for handler in (some, failing):
        async with wire.server({"take": handler}) as (server, address), wire.client(address) as remote:
            with wire.now():
                async with remote.take.stream() as stream:
                    with pytest.raises(CommClosedError, match="ended the stream and takes no more items"):
                        for number in range(10_000):
                            await stream.send(number)
                    found = []
                    try:
                        async for item in stream:
                            found.append(item)
                    except ValueError as error:
                        assert (handler, isinstance(error, RemoteError)) == (failing, True)  # noqa: PT017  # it comes in the middle
                    assert found == [0, 1, 2]
                    with pytest.raises(CommClosedError):
                        await stream.send(0)
                    await stream.send_eof()  # there is nobody to tell
                assert await remote.echo(data=1) == 1
            assert server.statistics().in_flight == 0


@reference("I02", "m i t u l")
async def test_i02_a_sender_that_waits_for_the_window(wire: Wire) -> None:
    go = trio.Event()

    async def wait(comm: Comm) -> str:
        await go.wait()
        return "dropped"

    async with wire.server({"wait": wait}) as (_server, address), wire.client(address) as remote:
        sent = 0

        async def send(stream: Any) -> None:
            nonlocal sent
            with pytest.raises(CommClosedError, match="takes no more items"):
                while True:
                    await stream.send(sent)
                    sent += 1

        async with remote.wait.stream() as stream, trio.open_nursery() as nursery:
            nursery.start_soon(send, stream)
            nursery.start_soon(send, stream)  # that wait for their turn are told as well
            await blocked(0.01)
            assert sent == WINDOW
            with wire.now():
                go.set()
                assert [item async for item in stream] == []


@reference("I02", "m i t u l")
async def test_i02_both_ways_with_an_end_of_each(wire: Wire) -> None:
    """The control: with both ends said, nothing is cut, and the connection is used again."""

    async def sums(comm: Comm) -> None:
        total = 0
        async for item in comm:
            total += item
            await comm.write(total)
        await comm.write("end")

    async with wire.server({"sums": sums}) as (server, address), wire.client(address) as remote:
        for _ in range(2):
            async with remote.sums.stream() as stream, trio.open_nursery() as nursery:

                @nursery.start_soon
                async def send() -> None:
                    for number in range(100):
                        await stream.send(number)
                    await stream.send_eof()

                found = [item async for item in stream]
            assert found == [*(number * (number + 1) // 2 for number in range(100)), "end"]
        counts_are_whole(remote.pool, open=1)
        assert server.statistics().connections == 1


def limits(wire: Wire) -> Limits:
    """Every time that there is, far below the pauses of I03."""
    short = wire.seconds(1)
    return Limits(
        write_stall=short,
        progress_timeout=short,
        handshake_timeout=wire.seconds(50),
        pool_wait=short,
        idle=short,
        ping_interval=short,
        ping_timeout=short,
        tcp_user_timeout=max(short, 0.1),
        linger=short,
    )


@reference("I03", "m i t u l")
async def test_i03_a_slow_consumer(wire: Wire) -> None:
    for pause in (None, trio.lowlevel.checkpoint):
        producer = Producer(pause=pause, count=200)
        options = {"limits": limits(wire)}
        async with (
            wire.server({"items": producer.items}, **options) as (_server, address),
            wire.client(address, **options) as remote,
            remote.items.stream() as stream,
        ):
            found = []
            async for item in stream:
                found.append(item)
                assert producer.made <= len(found) + WINDOW + 1
                if len(found) in (1, 57):
                    await trio.sleep(wire.seconds(4))
                    await blocked(0.001)
                    # It stands still, and not for want of room.
                    assert min(200, len(found) + WINDOW // 2) <= producer.made <= len(found) + WINDOW + 1
            assert found == list(range(200))
            assert producer.end is None


@reference("I03", "m i t u l")
async def test_i03_large_items(wire: Wire) -> None:
    """Here the bytes bound it, and the system's buffers are full."""
    producer = Producer(count=12)

    async def large() -> AsyncIterator[bytes]:
        async with aclosing(producer.items()) as items:
            async for number in items:
                yield bytes([number]) * 3_000_000

    options = {"limits": limits(wire)}
    async with (
        wire.server({"large": large}, **options) as (_server, address),
        wire.client(address, **options) as remote,
        remote.large.stream() as stream,
    ):
        await trio.sleep(wire.seconds(4))
        if wire.transport != "i":  # which counts items only
            assert producer.made <= 3
        found = []
        async for item in stream:
            found.append((item[0], len(item)))
            if len(found) == 5:
                await trio.sleep(wire.seconds(4))
        assert found == [(number, 3_000_000) for number in range(12)]


@reference("I03", "m i t u l")
async def test_i03_a_slow_handler(wire: Wire) -> None:
    """The other way: the client is the producer."""
    taken: list[int] = []
    go = trio.Event()

    async def take(comm: Comm) -> AsyncIterator[int]:
        async for item in comm:
            taken.append(item)
            if item == 20:
                await go.wait()
        yield len(taken)

    options = {"limits": limits(wire)}
    async with (
        wire.server({"take": take}, **options) as (_server, address),
        wire.client(address, **options) as remote,
        remote.take.stream() as stream,
        trio.open_nursery() as nursery,
    ):
        sent = 0

        @nursery.start_soon
        async def send() -> None:
            nonlocal sent
            for number in range(100):
                await stream.send(number)
                sent += 1
            await stream.send_eof()

        await trio.sleep(wire.seconds(4))
        await blocked(0.01)
        assert taken == list(range(21))
        assert 21 + WINDOW // 2 <= sent <= 21 + WINDOW
        go.set()
        assert [item async for item in stream] == [100]
        assert taken == list(range(100))


@reference("I04", "m i t u l")
async def test_i04_a_producer_raises_after_five_items(wire: Wire) -> None:
    async def five(how: str) -> AsyncIterator[int]:
        for number in range(5):
            yield number
            if how == "waiting":
                await trio.lowlevel.checkpoint()
        raise ValueError("after five")

    async def written(comm: Comm, how: str) -> None:
        for number in range(5):
            await comm.write(number)
        raise ValueError("after five")

    async with wire.server({"five": five, "written": written}) as (server, address), wire.client(address) as remote:
        for op in ("five", "written"):
            for how in ("quick", "waiting"):
                async with remote[op].stream(how=how) as stream:
                    await blocked(0.001)  # the error is here as well, behind the items
                    assert [await stream.receive() for _ in range(5)] == list(range(5))
                    for _ in range(2):
                        with pytest.raises(ValueError, match="after five") as caught:
                            await stream.receive()
                        assert isinstance(caught.value, RemoteError)
        assert server.statistics().connections == 1  # that goes on


@reference("I04", "m t u l")
async def test_i04_from_a_stock_server(wire: Wire) -> None:
    """Which writes bare messages, then its error reply, and closes."""

    async def script(peer: ManualPeer) -> None:
        await peer.handshake()
        request = await peer.receive()
        assert (request["reply"], request["close"]) == (True, True)
        for number in range(5):
            await peer.send(number)
        await peer.send(error_reply(ValueError("after five"), trusted=False, extension=False, limit=1000))

    async with wire.scripted(script) as address, wire.client(address) as remote:
        async with remote.anything.stream() as stream:
            assert [await stream.receive() for _ in range(5)] == list(range(5))
            with pytest.raises(RemoteError, match="after five"):
                await stream.receive()
        counts_are_whole(remote.pool, open=0)


@reference("I05", "m i t u l")
async def test_i05_a_stream_is_told_of_the_shutdown(wire: Wire) -> None:
    async def polite() -> AsyncIterator[str]:
        told = current_request().shutdown_requested
        try:
            while not told.is_set():
                yield "item"
                with trio.move_on_after(wire.seconds(0.1)):
                    await told.wait()
            yield "last words"
        finally:
            ended.set()

    ended = trio.Event()
    async with wire.serving({"polite": polite}) as (server, address, returned), wire.client(address) as remote:
        async with remote.polite.stream() as stream:
            found = [await stream.receive() for _ in range(3)]
            with wire.now():
                server.stop(wire.seconds(30))
                found += [item async for item in stream]
                await ended.wait()
        with wire.now():
            await returned.wait()
        assert found == ["item"] * (len(found) - 1) + ["last words"]


@reference("I05", "m i t u l")
async def test_i05_one_that_goes_on_is_cut_when_the_grace_is_over(wire: Wire) -> None:
    for pause in (None, lambda: trio.sleep(wire.seconds(0.05))):
        producer = Producer(pause=pause)
        async with wire.serving({"items": producer.items}) as (server, address, returned), wire.client(address) as remote:
            async with remote.items.stream() as stream, trio.open_nursery() as nursery:
                found = [await stream.receive()]
                reasons: list[str] = []

                @nursery.start_soon
                async def consume() -> None:
                    try:
                        async for item in stream:  # it ends inside the loop
                            found.append(item)  # noqa: B023
                            await trio.sleep(wire.seconds(0.01))
                    except HandlerCancelled as error:
                        reasons.append(error.reason)  # noqa: B023

                with wire.lasts(0.5):
                    server.stop(wire.seconds(0.5))
                    await producer.ended.wait()
            assert reasons == ["grace over"]
            assert found == list(range(len(found)))
            assert len(found) > 5
            assert isinstance(producer.end, trio.Cancelled)
            assert producer.ended_in is producer.began_in
            with wire.now():
                await returned.wait()


@reference("I05", "m i t u l")
async def test_i05_the_streams_of_clients_too(wire: Wire) -> None:
    """A handler that takes items is told, says its last word, and the client's further ones are refused."""

    async def take(comm: Comm) -> None:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def until_told() -> None:
                await current_request().shutdown_requested.wait()
                nursery.cancel_scope.cancel()

            async for item in comm:
                await comm.write(item)
        await comm.write("last words")

    async with wire.serving({"take": take}) as (server, address, returned), wire.client(address) as remote:
        async with remote.take.stream() as stream:
            await stream.send(1)
            assert await stream.receive() == 1
            with wire.now():
                server.stop(wire.seconds(30))
                assert [item async for item in stream] == ["last words"]
                with pytest.raises(CommClosedError):
                    await stream.send(2)
        with wire.now():
            await returned.wait()


@reference("I07", "t", quiet=False)
async def test_i07_message_streams(wire: Wire) -> None:
    """Batches and single messages, in order; what is wrong with one costs that one."""
    handled: list[Any] = []
    ended = trio.Event()

    async def note(n: int) -> None:
        if n % 3 == 0:
            await trio.lowlevel.checkpoint()
        handled.append(n)

    def boom(n: int) -> None:
        handled.append(f"boom {n}")
        raise ValueError("boom")

    async with wire.server(stream_handlers={"note": note, "boom": boom}) as (server, address):
        async with await wire.connect(address) as comm, await wire.connect(address) as sibling:
            for each in (comm, sibling):
                await each.write({"op": "connection_stream", "reply": False})
            await sibling.write({"op": "note", "n": 1000})
            await until(lambda: handled == [1000])
            await comm.write([{"op": "note", "n": 1}, {"op": "note", "n": 2}, {"op": "note", "n": 3}])
            await comm.write({"op": "note", "n": 4})
            await comm.write(
                [{"op": "xyzzy"}, {"op": "boom", "n": 5}, {"n": 6}, {"op": "note", "x": 6}, 7, {"op": "note", "n": 7}]
            )
            await comm.write([{"op": ""}, {"op": "note", "n": 8}, "OK", {"op": "note", "n": "dropped"}])
            await comm.write([{"op": "note", "n": 9}])
            await until(lambda: 9 in handled)
            assert handled == [1000, 1, 2, 3, 4, "boom 5", 7, 8, 9]
            # The end of the stream crosses messages that are on their way: they are dropped, and the connection is closed.
            await comm.write([{"op": "note", "n": 10}, {"op": "close-stream"}, {"op": "note", "n": 11}])
            await comm.write([{"op": "note", "n": 12}])
            with pytest.raises(CommClosedError):
                await comm.read()
            assert handled[-1] == 10
            await sibling.write({"op": "note", "n": 1001})
            await until(lambda: handled[-1] == 1001)
            ended.set()
        assert server.statistics().errors == 0
    said = [record.getMessage() for record in wire.loud()]
    assert any("xyzzy" in text for text in said)
    assert any("'boom' failed" in text for text in said)


@reference("I07", "t")
async def test_i07_batches_both_ways(wire: Wire) -> None:
    """The server of one stream is the client of the other, as a scheduler and its clients are."""
    here: list[int] = []
    there: list[int] = []

    async def answering(n: int) -> None:
        there.append(n)
        replies.send({"op": "back", "n": -n})

    async with (
        wire.server(stream_handlers={"ask": answering}) as (_server, address),
        wire.server(stream_handlers={"back": lambda n: here.append(n)}) as (_other, back),
        await wire.connect(address) as comm,
        await wire.connect(back) as back_comm,
    ):
        for each in (comm, back_comm):
            await each.write({"op": "connection_stream", "reply": False})
        async with BatchedSend(back_comm) as replies:
            async with BatchedSend(comm) as asks:
                for number in range(1000):
                    await asks.send_wait({"op": "ask", "n": number})
            await until(lambda: len(there) == 1000)
            replies.send({"op": "close-stream"})
        await until(lambda: len(here) == 1000)
        assert there == list(range(1000))
        assert here == [-number for number in range(1000)]


class Own(Exception):
    """A failure of the generator's own."""


async def in_a_scope(wire: Wire, seen: list[str]) -> AsyncIterator[bytes]:
    """Yields in a scope of its own, which ends while nobody reads."""
    with trio.move_on_after(wire.seconds(0.5)) as scope:
        while True:
            try:
                yield bytes(100_000)
            except BaseException as error:
                seen.append(type(error).__name__)
                raise
    assert scope.cancelled_caught
    seen.append("left")
    raise Own("after its scope")


async def in_a_nursery(wire: Wire, seen: list[str]) -> AsyncIterator[bytes]:
    """Yields in a nursery of its own, whose child fails while nobody reads."""

    async def child() -> None:
        await trio.sleep(wire.seconds(0.5))
        raise Own("of its child")

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
            while True:
                try:
                    yield bytes(100_000)
                except BaseException as error:
                    seen.append(type(error).__name__)
                    raise
    except BaseExceptionGroup as group:
        seen.append("left" if group.subgroup(Own) else "?")
        raise


async def small_in_a_scope(wire: Wire, seen: list[str]) -> AsyncIterator[int]:
    """The same with items so small that it is the window that is full."""
    with trio.move_on_after(wire.seconds(0.5)):
        try:
            for number in range(10_000):
                yield number
        except BaseException as error:
            seen.append(type(error).__name__)
            raise
    seen.append("left")
    raise Own("after its scope")


@reference("I08", "m i t u l", quiet=False)
async def test_i08_generators_that_yield_in_scopes_of_their_own(wire: Wire) -> None:
    for generator in (in_a_scope, in_a_nursery, small_in_a_scope):
        seen: list[str] = []
        journal: list[str] = []

        async def sibling() -> AsyncIterator[int]:
            for number in range(20):
                yield number
                await trio.sleep(wire.seconds(0.1))
            journal.append("ended")  # noqa: B023  # it ends inside the loop

        handlers = {"own": lambda: generator(wire, seen), "sibling": sibling}  # noqa: B023
        async with wire.server(handlers) as (server, address), wire.client(address) as remote:
            async with remote.sibling.stream() as other, remote.own.stream() as stream:
                with wire.lasts(0.5, at_most=1.5):
                    await until(lambda: seen[-1:] == ["left"], every=0.01)  # noqa: B023
                assert seen == ["Cancelled", "left"]
                found = 0
                with pytest.raises((RemoteError, CommClosedError)) as caught:
                    async for _ in stream:
                        found += 1
                assert (generator is small_in_a_scope) <= found <= WINDOW + 1
                if isinstance(caught.value, RemoteError):
                    assert re.search("after its scope|of its child", str(caught.value))
                else:
                    # What was cut was an item in its middle, and so the comm: then it is the log that tells of the error.
                    assert generator is not small_in_a_scope
                    assert "middle of a message" in str(caught.value.__cause__)
                    (said,) = wire.loud()
                    assert "'own'" in said.getMessage()
                    assert said.exc_info
                    assert any(isinstance(leaf, Own) for leaf in leaves(said.exc_info[1]))  # type: ignore[arg-type]
                    wire.log.clear()  # type: ignore[union-attr]
                assert [item async for item in other] == list(range(20))
            assert journal == ["ended"]
            assert await remote.echo(data=1) == 1
            await blocked()
            assert server.statistics().in_flight == 0
            assert wire.loud() == []


@reference("I08", "m i t u l")
async def test_i08_one_that_goes_on_behind_its_scope(wire: Wire) -> None:
    """It is not at its end: what it had given before is there, what was cut is not, and what comes then is."""

    async def go_on() -> AsyncIterator[int]:
        number = 0
        with trio.move_on_after(wire.seconds(0.5)):
            while True:
                yield number
                number += 1
        last.append(number)
        yield -1
        yield -2

    last: list[int] = []
    async with wire.server({"go_on": go_on}) as (_server, address), wire.client(address) as remote:
        async with remote.go_on.stream() as stream:
            await trio.sleep(wire.seconds(1))
            found = [item async for item in stream]
        # The one that was being sent then is the one that was cut.
        assert found == [*range(last[0]), -1, -2]
        assert last[0] == WINDOW
        counts_are_whole(remote.pool, open=1)
