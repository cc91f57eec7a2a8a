"""Calls with many answers, and many arguments."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_dcore import (
    Comm,
    CommClosedError,
    ConnectionPool,
    Limits,
    LocalProtocolError,
    RemoteError,
    RemoteProtocolError,
    RPCClosed,
    Security,
    SerializationError,
    ServerClosing,
    UnknownOp,
    UnsafePayload,
    rpc,
)
from trio_dcore.protocol import error_reply, error_value
from trio_dcore.protocol._envelope import CANCEL, END, ERROR, GOODBYE, ITEM, ITEMS, KEY, PING, PONG, REPLY, WINDOW
from trio_dcore.testing import cancel_sweep, memory_network


def echo(x: Any = None) -> Any:
    return x


async def count(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


async def upper(comm: Comm) -> None:
    async for word in comm:
        await comm.write(word.upper())


async def collect(comm: Comm) -> None:
    items = []
    async for item in comm:
        items.append(item)
    await comm.write(len(items))
    for item in items:
        await comm.write(item)


async def all_of(stream: Any) -> list[Any]:
    return [item async for item in stream]


class TestFromTheServer:
    @pytest.mark.parametrize("n", [0, 1, 16, 17, 1000])
    async def test_all_items_in_order(self, n: int, where: str, serving: Any) -> None:
        async with serving({"count": count}, where) as (server, remote):
            for _ in range(2):
                async with remote.count.stream(n=n) as stream:
                    assert await all_of(stream) == list(range(n))
                    for _ in range(2):
                        with pytest.raises(trio.EndOfChannel):
                            await stream.receive()
            assert server.statistics().connections == 1  # a stream that ended gives its comm back
            assert remote.pool.active == 0

    async def test_items_that_look_like_protocol(self, where: str, serving: Any) -> None:
        values = [None, "OK", {"status": "uncaught-error"}, (0, 1, 2), (4, 1, None), {}, (), None]

        async def give() -> AsyncIterator[Any]:
            for value in values:
                yield value

        async with serving({"give": give}, where) as (_server, remote), remote.give.stream() as stream:
            assert await all_of(stream) == values

    async def test_large_items(self, where: str, serving: Any) -> None:
        async def give() -> AsyncIterator[Any]:
            for i in range(8):
                yield numpy.full(100_000, i)

        async with serving({"give": give}, where) as (_server, remote), remote.give.stream() as stream:
            found = await all_of(stream)
            assert [array[0] for array in found] == list(range(8))
            assert all(array.size == 100_000 for array in found)

    async def test_a_plain_handler_gives_one_item_or_none(self, where: str, serving: Any) -> None:
        async with serving({"echo": echo}, where) as (_server, remote):
            for x, items in ((5, [5]), (None, []), ((1, 2), [(1, 2)])):
                async with remote.echo.stream(x=x) as stream:
                    assert await all_of(stream) == items

    async def test_errors_come_with_the_items(self, where: str, serving: Any) -> None:
        async with serving({"count": count}, where) as (server, remote):
            async with remote.xyzzy.stream() as stream:
                with pytest.raises(UnknownOp):
                    await stream.receive()
            async with remote.count.stream() as stream:
                with pytest.raises(TypeError, match="the handler is count"):
                    await stream.receive()
            assert server.statistics().connections == 1

    async def test_a_slow_consumer_slows_the_producer_down(self, where: str, serving: Any) -> None:
        """I03: nothing lost, order kept, and no more than the window is on its way."""
        produced = 0

        async def produce() -> AsyncIterator[int]:
            nonlocal produced
            while produced < 100:
                yield produced
                produced += 1

        async with serving({"produce": produce}, where, client={"limits": Limits(window=4)}) as (_server, remote):
            async with remote.produce.stream() as stream:
                await wait_all_tasks_blocked(0.01)
                assert produced == 4
                for i in range(20):
                    assert await stream.receive() == i
                    await wait_all_tasks_blocked(0.001)
                    assert i + 1 < produced <= i + 5
                assert await all_of(stream) == list(range(20, 100))

    async def test_the_window_counts_bytes_too(self, serving: Any) -> None:
        produced = 0

        async def produce() -> AsyncIterator[bytes]:
            nonlocal produced
            while produced < 20:
                yield bytes(10_000)
                produced += 1

        limits = Limits(window=100, window_bytes=30_000)
        async with serving({"produce": produce}, "tcp://127.0.0.1:0", client={"limits": limits}) as (_server, remote):
            async with remote.produce.stream() as stream:
                await wait_all_tasks_blocked(0.01)
                assert produced == 3
                assert len(await all_of(stream)) == 20

    async def test_more_items_than_bytes_in_the_window_over_inproc(self, serving: Any) -> None:
        """Objects have no size there, so only items are counted."""
        limits = Limits(window=4, window_bytes=10)
        async with serving({"count": count}, client={"limits": limits}) as (_server, remote), remote.count.stream(n=50) as stream:
            assert await all_of(stream) == list(range(50))

    async def test_a_pause_longer_than_every_timeout(self, serving: Any, autojump_clock: Any) -> None:
        async with serving({"count": count}, patience=1e9) as (_server, remote), remote.count.stream(n=40) as stream:
            assert await stream.receive() == 0
            await trio.sleep(80_000)
            assert await all_of(stream) == list(range(1, 40))

    async def test_an_item_that_can_not_be_read(self, serving: Any) -> None:
        """It is an error in its place; the stream goes on."""

        async def give() -> AsyncIterator[Any]:
            for i in range(40):
                yield ValueError(i) if i % 2 else i

        security = Security(pickle="never")
        async with serving({"give": give}, "tcp://127.0.0.1:0", client={"security": security, "limits": Limits(window=4)}) as (
            _server,
            remote,
        ):
            async with remote.give.stream() as stream:
                for i in range(40):
                    if i % 2:
                        with pytest.raises(UnsafePayload):
                            await stream.receive()
                    else:
                        assert await stream.receive() == i
                assert await all_of(stream) == []

    async def test_one_receiver_at_a_time(self, where: str, serving: Any) -> None:
        async def wait() -> AsyncIterator[int]:
            await trio.sleep_forever()
            yield 1

        async with (
            serving({"wait": wait}, where) as (_server, remote),
            remote.wait.stream() as stream,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(stream.receive)
            await wait_all_tasks_blocked(0.01)
            with pytest.raises(trio.BusyResourceError):
                await stream.receive()
            nursery.cancel_scope.cancel()


class TestToTheServer:
    async def test_both_directions(self, where: str, serving: Any) -> None:
        async with serving({"upper": upper}, where) as (server, remote):
            for _ in range(2):
                async with remote.upper.stream() as stream:
                    for word in ("a", "b", "c"):
                        await stream.send(word)
                        assert await stream.receive() == word.upper()
                    await stream.send_eof()
                    await stream.send_eof()
                    assert await all_of(stream) == []
            assert server.statistics().connections == 1

    async def test_items_that_look_like_protocol(self, where: str, serving: Any) -> None:
        values = [None, "OK", {"op": "close"}, {"op": "echo", KEY: {"id": 1}}, (2, 1, None), {}, None]
        async with serving({"collect": collect}, where) as (_server, remote), remote.collect.stream() as stream:
            for value in values:
                await stream.send(value)
            await stream.send_eof()
            assert await all_of(stream) == [len(values), *values]

    async def test_a_slow_handler_slows_the_sender_down(self, where: str, serving: Any) -> None:
        go = trio.Event()
        sent = 0

        async def slow(comm: Comm) -> None:
            await go.wait()
            async for item in comm:
                await comm.write(item)

        async with serving({"slow": slow}, where, limits=Limits(window=4)) as (_server, remote), remote.slow.stream() as stream:

            async def send() -> None:
                nonlocal sent
                while sent < 50:
                    await stream.send(sent)
                    sent += 1
                await stream.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await wait_all_tasks_blocked(0.01)
                assert sent == 4
                go.set()
                assert await all_of(stream) == list(range(50))

    async def test_both_directions_full(self, where: str, serving: Any) -> None:
        """Each side sends much more than a window while it receives as much; nobody waits for the other for ever."""

        async def both(comm: Comm) -> None:
            async def give() -> None:
                for i in range(300):
                    await comm.write(bytes([i % 256]) * 3000)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(give)
                total = 0
                async for item in comm:
                    total += len(item)
                totals.append(total)

        totals: list[int] = []
        options = {"limits": Limits(window_bytes=20_000), "client": {"limits": Limits(window_bytes=20_000)}}
        async with serving({"both": both}, where, **options) as (_server, remote), remote.both.stream() as stream:

            async def send() -> None:
                for _ in range(300):
                    await stream.send(bytes(3000))
                await stream.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                assert [item[0] for item in await all_of(stream)] == [i % 256 for i in range(300)]
        assert totals == [900_000]

    async def test_many_senders(self, where: str, serving: Any) -> None:
        """Their items are queued, one after the other, each under its credit."""
        options = {"limits": Limits(window_bytes=50_000)}
        async with serving({"collect": collect}, where, **options) as (_server, remote), remote.collect.stream() as stream:
            async with trio.open_nursery() as nursery:
                for i in range(20):
                    nursery.start_soon(stream.send, bytes([i]) * (200_000 if i % 5 == 0 else 10))
            await stream.send_eof()
            n, *items = await all_of(stream)
            assert n == 20
            assert sorted(item[0] for item in items) == list(range(20))

    async def test_the_handler_returns_early(self, where: str, serving: Any) -> None:
        """I02: the sender gets a typed end, not a hang."""

        async def take(comm: Comm, n: int) -> None:
            for _ in range(n):
                await comm.read()

        async with serving({"take": take, "echo": echo}, where) as (server, remote):
            async with remote.take.stream(n=3) as stream:
                with pytest.raises(CommClosedError, match=r"takes no more items"):
                    for i in range(1000):
                        await stream.send(i)
                with pytest.raises(trio.EndOfChannel):
                    await stream.receive()
                with pytest.raises(CommClosedError, match=r"takes no more items"):
                    await stream.send("more")
                await stream.send_eof()
            assert await remote.echo(x=1) == 1
            assert server.statistics().errors == 0

    async def test_the_handler_fails_early(self, where: str, serving: Any) -> None:
        async def fail(comm: Comm) -> None:
            raise ValueError(await comm.read())

        async with serving({"fail": fail}, where) as (_server, remote), remote.fail.stream() as stream:
            with pytest.raises(CommClosedError) as caught:
                for _ in range(1000):
                    await stream.send("no luck")
            assert isinstance(caught.value.__cause__.__cause__, ValueError)
            with pytest.raises(ValueError, match="no luck"):
                await stream.receive()

    async def test_an_end_that_is_seen_is_minded(self, where: str, serving: Any) -> None:
        """With credit left, too: nothing is sent into the void once it is known."""
        async with serving({"echo": echo}, where) as (_server, remote), remote.echo.stream(x=1) as stream:
            assert await all_of(stream) == [1]
            with pytest.raises(CommClosedError):
                await stream.send("more")

    async def test_after_send_eof(self, where: str, serving: Any) -> None:
        async with serving({"upper": upper}, where) as (_server, remote), remote.upper.stream() as stream:
            await stream.send_eof()
            with pytest.raises(LocalProtocolError, match=r"after send_eof"):
                await stream.send("a")
            assert await all_of(stream) == []

    async def test_send_eof_that_is_cancelled_can_be_tried_again(self, where: str, serving: Any) -> None:
        async with serving({"upper": upper}, where) as (_server, remote), remote.upper.stream() as stream:
            with trio.CancelScope() as scope:
                scope.cancel()
                await stream.send_eof()
            assert scope.cancelled_caught
            await stream.send("a")
            await stream.send_eof()
            assert await all_of(stream) == ["A"]

    async def test_an_item_that_can_not_be_sent(self, serving: Any) -> None:
        async with serving({"upper": upper}, "tcp://127.0.0.1:0") as (_server, remote), remote.upper.stream() as stream:
            for _ in range(40):
                with pytest.raises(SerializationError):
                    await stream.send(i for i in ())
            await stream.send("a")
            assert await stream.receive() == "A"

    async def test_an_item_that_can_not_be_read(self, serving: Any) -> None:
        seen: list[str] = []

        async def take(comm: Comm) -> None:
            while True:
                try:
                    seen.append(type(await comm.receive()).__name__)
                except UnsafePayload as error:
                    seen.append(type(error).__name__)
                except trio.EndOfChannel:
                    return

        async with serving({"take": take}, "tcp://127.0.0.1:0", security=Security(pickle="never")) as (_server, remote):
            async with remote.take.stream() as stream:
                for item in (1, ValueError(), "a"):
                    await stream.send(item)
                await stream.send_eof()
                assert await all_of(stream) == []
        assert seen == ["int", "UnsafePayload", "str"]


class TestLeaving:
    async def test_cancels_the_handler(self, where: str, serving: Any) -> None:
        ended = trio.Event()

        async def forever(comm: Comm) -> None:
            try:
                await comm.write("item")
                await trio.sleep_forever()
            finally:
                ended.set()

        async with serving({"forever": forever, "echo": echo}, where) as (_server, remote):
            for how in ("block", "aclose", "raise", "cancel"):
                ended = trio.Event()
                with trio.CancelScope() as scope:
                    try:
                        async with remote.forever.stream() as stream:
                            assert await stream.receive() == "item"
                            if how == "aclose":
                                await stream.aclose()
                                await stream.aclose()
                            elif how == "raise":
                                raise ZeroDivisionError
                            elif how == "cancel":
                                scope.cancel()
                                await trio.sleep_forever()
                    except ZeroDivisionError:
                        pass
                await ended.wait()
                for operation in (stream.receive, stream.send_eof, lambda stream=stream: stream.send(1)):
                    with pytest.raises(trio.ClosedResourceError):
                        await operation()
                assert await remote.echo(x=1) == 1
                assert remote.pool.active == 0

    async def test_with_items_unread(self, where: str, serving: Any) -> None:
        async with serving({"count": count, "echo": echo}, where) as (_server, remote):
            async with remote.count.stream(n=5) as stream:
                assert await stream.receive() == 0
                await wait_all_tasks_blocked(0.01)
            assert await remote.echo(x=1) == 1
            assert remote.pool.active == 0

    async def test_after_items_were_sent_and_no_end(self, where: str, serving: Any) -> None:
        async def take_one(comm: Comm) -> None:
            await comm.write(await comm.read())

        async with serving({"take_one": take_one, "echo": echo}, where) as (_server, remote):
            async with remote.take_one.stream() as stream:
                await stream.send("a")
                assert await all_of(stream) == ["a"]
            assert remote.pool.open == 0
            assert await remote.echo(x=1) == 1

    async def test_while_another_task_still_sends(self, serving: Any) -> None:
        """What it sends would stand in the way of the next request, and what ends it would end that."""

        async def early(comm: Comm) -> None:
            await comm.write("early")

        async with serving({"early": early, "echo": echo}, "tcp://127.0.0.1:0") as (_server, remote):
            ended = trio.Event()

            async def send(stream: Any) -> None:
                with pytest.raises(CommClosedError):
                    await stream.send(bytes(30_000_000))
                ended.set()

            async with trio.open_nursery() as nursery:
                async with remote.early.stream() as stream:
                    nursery.start_soon(send, stream)
                    assert await all_of(stream) == ["early"]
                    assert not ended.is_set()
                assert remote.pool.open == 0
            assert await remote.echo(x=1) == 1

    async def test_what_was_left_over_does_not_disturb_the_next_request(self, where: str, serving: Any) -> None:
        async def one(comm: Comm) -> None:
            await comm.write("one")

        async with serving({"one": one, "echo": echo}, where) as (server, remote):
            for i in range(5):
                async with remote.one.stream() as stream:
                    for item in range(5):
                        await stream.send(item)
                    await stream.send_eof()
                    assert await all_of(stream) == ["one"]
                assert await remote.echo(x=i) == i
            assert server.statistics().errors == 0

    async def test_never_entered(self, serving: Any) -> None:
        async with serving({"count": count}) as (server, remote):
            stream = remote.count.stream(n=1)
            assert repr(stream) == f"<stream of 'count' at {server.address}>"
            with pytest.raises(LocalProtocolError, match="open the stream first"):
                await stream.receive()
            await stream.aclose()
            with pytest.raises(LocalProtocolError, match="can be entered once"):
                await stream.__aenter__()
            assert server.statistics().connections == 0

    async def test_entered_twice(self, serving: Any) -> None:
        async with serving({"count": count}) as (_server, remote), remote.count.stream(n=1) as stream:
            with pytest.raises(LocalProtocolError, match=r"call \.stream\(\) again"):
                await stream.__aenter__()
            assert await all_of(stream) == [0]

    @pytest.mark.parametrize("name", ["reply", "close"])
    async def test_keywords_without_a_meaning(self, name: str, serving: Any) -> None:
        async with serving({}) as (_server, remote):
            with pytest.raises(TypeError, match=f"'{name}' has no meaning for a stream"):
                remote.echo.stream(**{name: True})

    async def test_cancelled_at_every_step(self, where: str, serving: Any) -> None:
        async with serving({"upper": upper, "echo": echo}, where) as (_server, remote):

            async def scenario() -> None:
                async with remote.upper.stream() as stream:
                    for word in ("a", "b"):
                        await stream.send(word)
                    assert [await stream.receive() for _ in range(2)] == ["A", "B"]
                    await stream.send_eof()
                    assert await all_of(stream) == []

            async def check() -> None:
                assert await remote.echo(x=1) == 1
                assert remote.pool.active == 0
                remote.pool.collect()

            assert await cancel_sweep(scenario, check=check) > 5

    async def test_a_receive_that_is_cancelled_loses_nothing(self, where: str, serving: Any) -> None:
        go = trio.Event()

        async def later() -> AsyncIterator[int]:
            await go.wait()
            yield 1
            yield 2

        async with serving({"later": later}, where) as (_server, remote), remote.later.stream() as stream:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.receive)
                    await wait_all_tasks_blocked(0.01)
                    scope.cancel()
            go.set()
            assert await all_of(stream) == [1, 2]


class TestTheConnectionEnds:
    @pytest.mark.parametrize("operation", ["receive", "send", "send_eof"])
    async def test_under_a_stream(self, operation: str, where: str, serving: Any) -> None:
        async def close(comm: Comm) -> None:
            go.set()
            comm.abort()

        go = trio.Event()
        async with serving({"close": close}, where) as (server, remote), remote.close.stream() as stream:
            await go.wait()
            await wait_all_tasks_blocked(0.01)
            with pytest.raises(CommClosedError, match=f"calling 'close' at {server.address}"):
                for _ in range(100):
                    if operation == "receive":
                        await stream.receive()
                    elif operation == "send":
                        await stream.send(1)
                    else:
                        await stream.send_eof()
                        stream._source.sent_eof = False

    async def test_the_pool_is_closed(self, where: str, serving: Any) -> None:
        async def wait(comm: Comm) -> None:
            await comm.read()

        async with serving({"wait": wait}, where) as (server, _remote), ConnectionPool() as pool:
            async with pool(server.address).wait.stream() as stream:
                pool.close_now()
                for operation in (stream.receive, lambda stream=stream: stream.send(1), stream.send_eof):
                    with pytest.raises(RPCClosed, match="was streaming"):
                        await operation()

    @pytest.mark.parametrize("eof", [False, True])
    async def test_goodbye_before_it_starts(self, eof: bool, where: str, scripted: Any) -> None:
        """The request is made once more, on a new connection, as that of a call is."""
        requests = []

        async def script(comm: Any, number: int) -> None:
            request = await comm.read()
            requests.append(request)
            if eof:
                assert next(iter(await comm.read())) == END
            if number == 1:
                await comm.write((GOODBYE, request[KEY]["id"] - 1, None))
                return
            await comm.write((ITEMS, 1, (1, 2)))
            await comm.write((END, 1, None))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            async with remote.anything.stream(x=1) as stream:
                if eof:
                    await stream.send_eof()
                assert await all_of(stream) == [1, 2]
            assert remote.pool.open == 1
        assert requests == 2 * [{"op": "anything", "x": 1, "reply": True, KEY: {"id": 1, "stream": True}}]

    @pytest.mark.parametrize("again", [False, True])
    async def test_goodbye_twice(self, again: bool, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            if number == 2 and not again:
                return  # nor is there a connection
            request = await comm.read()
            await comm.write((GOODBYE, request[KEY]["id"] - 1, None))

        async with scripted(where, script) as address, rpc(address) as remote:
            async with remote.anything.stream() as stream:
                with pytest.raises(ServerClosing if again else CommClosedError):
                    await stream.receive()
            assert remote.pool.open == 0

    async def test_goodbye_when_items_were_sent(self, where: str, scripted: Any) -> None:
        """They went with the request, and nobody but the user can send them again."""

        async def script(comm: Any, number: int) -> None:
            assert number == 1
            request = await comm.read()
            await comm.read()
            await comm.write((GOODBYE, request[KEY]["id"] - 1, None))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            async with remote.anything.stream() as stream:
                await stream.send(1)
                with pytest.raises(ServerClosing, match="did not start 'anything'"):
                    await stream.receive()
                with pytest.raises(ServerClosing):
                    await stream.receive()
            assert remote.pool.open == 0

    async def test_goodbye_while_it_sends(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            request = await comm.read()
            for _ in range(16):
                await comm.read()
            await comm.write((GOODBYE, request[KEY]["id"] - 1, None))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            async with remote.anything.stream() as stream:
                with pytest.raises(ServerClosing, match="did not start 'anything'"):
                    for i in range(17):
                        await stream.send(i)
            assert remote.pool.open == 0

    async def test_goodbye_to_who_only_sends(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            request = await comm.read()
            await comm.write((GOODBYE, request[KEY]["id"] - 1, None))

        async with scripted(where, script) as address, rpc(address) as remote:
            async with remote.anything.stream() as stream:
                with pytest.raises(ServerClosing, match="did not start 'anything'"):
                    for i in range(16):
                        await wait_all_tasks_blocked(0.01)
                        await stream.send(i)
            assert remote.pool.open == 0

    async def test_what_the_server_said_before_it_went_is_kept(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            await comm.read()
            await comm.write((ITEM, 1, "item"))
            await comm.write((ERROR, 1, error_value(ValueError("no luck"), trusted=True)))

        async with scripted(where, script) as address, rpc(address) as remote:
            async with remote.anything.stream() as stream:
                with pytest.raises(CommClosedError):
                    for i in range(16):
                        await wait_all_tasks_blocked(0.01)
                        await stream.send(i)
                assert await stream.receive() == "item"
                with pytest.raises(ValueError, match="no luck"):
                    await stream.receive()

    async def test_what_is_sent_while_it_connects_anew(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            request = await comm.read()
            if number == 1:
                await comm.write((GOODBYE, request[KEY]["id"] - 1, None))
                return
            item = tuple(await comm.read())
            await comm.write((ITEM, 1, item[2]))
            await comm.write((END, 1, None))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote, remote.anything.stream() as stream:
            found = []
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def receive() -> None:
                    found.extend([item async for item in stream])

                while stream._reopening is None:
                    await trio.lowlevel.checkpoint()
                await stream.send("x")
            assert found == ["x"]

    async def test_closed_while_it_connects_anew(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            request = await comm.read()
            await comm.write((GOODBYE, request[KEY]["id"] - 1, None))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            async with remote.anything.stream() as stream, trio.open_nursery() as nursery:

                @nursery.start_soon
                async def receive() -> None:
                    with pytest.raises(trio.ClosedResourceError):
                        await stream.receive()

                while stream._reopening is None:
                    await trio.lowlevel.checkpoint()
                await stream.aclose()
            assert remote.pool.open == 0

    async def test_a_server_that_has_gone_is_found_at_checkout(self, where: str, serving: Any) -> None:
        async with serving({"count": count}, where) as (server, remote):
            async with remote.count.stream(n=1) as stream:
                assert await all_of(stream) == [0]
            for connection in server._connections:
                connection.comm.abort()
            await wait_all_tasks_blocked(0.01)
            async with remote.count.stream(n=2) as stream:
                assert await all_of(stream) == [0, 1]


class TestOddServers:
    """Servers that speak the extension in odd ways, or wrongly."""

    async def test_what_is_allowed(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            request = await comm.read()
            assert request == {"op": "anything", "x": 1, "reply": True, KEY: {"id": 1, "stream": True}}
            await comm.write((ITEMS, 1, (1, 2, 3)))
            await comm.write((PING, 1, None))
            await comm.write((PONG, 1, None))
            await comm.write((WINDOW, 1, (0, 0)))
            await comm.write((ITEM, 1, 4))
            assert tuple(await comm.read()) == (PONG, 1, None)
            await comm.write((REPLY, 1, "dropped"))
            request = await comm.read()
            assert request[KEY] == {"id": 2, "stream": True}
            await comm.write((ITEM, 1, "left over"))
            await comm.write((END, 2, None))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            async with remote.anything.stream(x=1) as stream:
                assert await all_of(stream) == [1, 2, 3, 4]
            async with remote.anything.stream() as stream:
                assert await all_of(stream) == []
            assert remote.pool.open == 1

    @pytest.mark.parametrize(
        "envelope",
        [
            (ITEM, 2, None),
            (99, 1, None),
            (ITEMS, 1, ()),
            (ITEMS, 1, None),
            (WINDOW, 1, 5),
            (CANCEL, 1, None),
            (GOODBYE, 1, None),
            "OK",
            1,
        ]
        + [(GOODBYE, 5, None), {"status": "OK"}, {}, (ITEMS, 1, tuple(range(17))), (1, 2), None],
    )
    async def test_what_is_not(self, envelope: Any, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            await comm.read()
            await comm.write((ITEM, 1, "item"))
            await comm.write(envelope)
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            async with remote.anything.stream() as stream:
                assert await stream.receive() == "item"
                with pytest.raises(RemoteProtocolError):
                    await stream.receive()
                with pytest.raises((RemoteProtocolError, CommClosedError)):
                    await stream.receive()
            assert remote.pool.open == 0

    async def test_a_map_that_is_an_error(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            await comm.read()
            await comm.write((ITEM, 1, "item"))
            await comm.write(error_reply(ValueError("unreadable"), trusted=True, extension=True))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote:
            async with remote.anything.stream() as stream:
                assert await stream.receive() == "item"
                for _ in range(2):
                    with pytest.raises(ValueError, match="unreadable") as caught:
                        await stream.receive()
                    assert isinstance(caught.value, RemoteError)
                with pytest.raises(CommClosedError):
                    await stream.send(1)
            assert remote.pool.open == 0

    async def test_an_error_behind_items_that_were_not_taken_yet(self, where: str, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            await comm.read()
            for i in range(5):
                await comm.write((ITEM, 1, i))
            await comm.write((ERROR, 1, error_value(ValueError("behind"), trusted=True)))
            await comm.read()

        async with scripted(where, script) as address, rpc(address) as remote, remote.anything.stream() as stream:
            await wait_all_tasks_blocked(0.01)
            assert [await stream.receive() for _ in range(5)] == list(range(5))
            with pytest.raises(ValueError, match="behind"):
                await stream.receive()

    async def test_an_end_whose_payload_can_not_be_read(self, scripted: Any) -> None:
        async def script(comm: Any, number: int) -> None:
            await comm.read()
            await comm.write((REPLY, 1, ValueError("a pickle")))
            await comm.read()

        async with scripted("tcp://127.0.0.1:0", script) as address, rpc(address, security=Security(pickle="never")) as remote:
            async with remote.anything.stream() as stream:
                with pytest.raises(UnsafePayload):
                    await stream.receive()


class TestStock:
    """Streams from a server that speaks plain Dask messages (architecture, section 3.3)."""

    async def run(self, stock_like: Any, messages: list[Any], end: str = "close") -> list[Any]:
        async def script(peer: Any, number: int) -> None:
            requests.append(await peer.receive())
            for message in messages:
                await peer.send(message)
            if end == "inside":
                await peer.send_bytes(peer.encode("cut")[:-1])
            elif end == "reset":
                peer.reset()

        requests: list[Any] = []
        found: list[Any] = []
        async with stock_like(script) as address, rpc(address) as remote:
            async with remote.ticks.stream(interval=1) as stream:
                while True:
                    try:
                        found.append(await stream.receive())
                    except (trio.EndOfChannel, RemoteError, CommClosedError) as error:
                        found.append(error)
                        with pytest.raises(type(error).__mro__[0]):
                            await stream.receive()
                        break
            assert remote.pool.open == 0
        assert requests == [{"op": "ticks", "interval": 1, "reply": True, "close": True}]
        return found

    @pytest.mark.parametrize(
        ("messages", "items"),
        [
            ([], []),
            ([None], []),
            ([1, 2, None], [1, 2]),
            ([1, 2], [1, 2]),
            ([None, 1, None], [None, 1]),
            ([None, None], [None]),
            ([1, None, None, None], [1, None, None]),
            ([{"status": "OK"}, "OK", {"status": "error"}, (1, 2), None], [{"status": "OK"}, "OK", {"status": "error"}, (1, 2)]),
        ],
    )
    async def test_items(self, messages: list[Any], items: list[Any], stock_like: Any) -> None:
        *found, end = await self.run(stock_like, messages)
        assert found == items
        assert isinstance(end, trio.EndOfChannel)

    async def test_a_none_is_held_back_and_all_else_is_not(self, stock_like: Any) -> None:
        go = trio.Event()

        async def script(peer: Any, number: int) -> None:
            await peer.receive()
            await peer.send(1)
            await peer.send(None)
            await go.wait()
            await peer.send(2)

        async with stock_like(script) as address, rpc(address) as remote, remote.ticks.stream() as stream:
            assert await stream.receive() == 1
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.receive)
                    await wait_all_tasks_blocked(0.01)
                    scope.cancel()
            assert scope.cancelled_caught
            go.set()
            assert await all_of(stream) == [None, 2]

    async def test_items_that_come_without_a_pause_do_not_put_off_a_cancellation(self, stock_like: Any) -> None:
        async def script(peer: Any, number: int) -> None:
            await peer.receive()
            await peer.send_bytes(b"".join(peer.encode(n) for n in range(1000)))

        async with stock_like(script) as address, rpc(address) as remote, remote.ticks.stream() as stream:
            found = []
            with trio.CancelScope() as scope:
                async for item in stream:
                    found.append(item)
                    if item == 9:
                        scope.cancel()
            assert found == list(range(10))
            assert await stream.receive() == 10

    @pytest.mark.parametrize("before", [[], [1, 2], [1, None]])
    async def test_an_error(self, before: list[Any], stock_like: Any) -> None:
        error = error_reply(ValueError("no luck"), trusted=True, extension=False)
        *found, end = await self.run(stock_like, [*before, error])
        assert found == before
        assert isinstance(end, ValueError)
        assert isinstance(end, RemoteError)

    @pytest.mark.parametrize("end", ["inside", "reset"])
    async def test_a_connection_that_breaks(self, end: str, stock_like: Any) -> None:
        *_, error = await self.run(stock_like, [1], end)
        assert isinstance(error, CommClosedError)

    async def test_it_takes_no_items(self, stock_like: Any) -> None:
        async def script(peer: Any, number: int) -> None:
            await peer.receive()
            await peer.send(1)

        async with stock_like(script) as address, rpc(address) as remote, remote.ticks.stream() as stream:
            for operation in (lambda: stream.send(1), stream.send_eof):
                with pytest.raises(LocalProtocolError, match="a stock Dask server takes no items"):
                    await operation()
            assert await all_of(stream) == [1]

    async def test_leaving_closes_the_connection(self, stock_like: Any) -> None:
        closed = trio.Event()

        async def script(peer: Any, number: int) -> None:
            await peer.receive()
            await peer.send(1)
            await peer.expect_end()
            closed.set()

        async with stock_like(script) as address, rpc(address) as remote:
            async with remote.ticks.stream() as stream:
                assert await stream.receive() == 1
            await closed.wait()


class TestBothSendFirst:
    """Traffic that the windows allow goes on, also while neither side receives."""

    @pytest.mark.parametrize(
        ("where", "count", "size", "limits"),
        [
            ("memory://", 8, 60_000, Limits()),
            ("memory://", 1, 300_000, Limits()),
            ("tcp://127.0.0.1:0", 16, 60_000, Limits()),
            ("tcp://127.0.0.1:0", 1, 8_000_000, Limits()),
            ("inproc://", 40, 1, Limits(window=64)),
        ],
    )
    @pytest.mark.parametrize("kind", ["function", "generator"])
    async def test_the_handler_and_the_client(
        self, where: str, count: int, size: int, limits: Limits, kind: str, serving: Any
    ) -> None:
        taken: list[int] = []

        async def function(comm: Comm) -> None:
            for _ in range(count):
                await comm.write(bytes(size))
            async for item in comm:
                taken.append(len(item))

        async def generator(comm: Comm) -> AsyncIterator[bytes]:
            async with trio.open_nursery() as nursery:  # a scope of its own, open at each yield
                nursery.start_soon(trio.sleep_forever)
                for _ in range(count):
                    yield bytes(size)
                nursery.cancel_scope.cancel()
            async for item in comm:
                taken.append(len(item))

        handlers = {"talk": function if kind == "function" else generator, "echo": echo}
        with memory_network():
            async with serving(handlers, where, limits=limits, client={"limits": limits}) as (server, remote):
                async with remote.talk.stream() as stream:
                    for _ in range(count):
                        await stream.send(bytes(size))
                    await stream.send_eof()
                    assert [len(item) for item in await all_of(stream)] == [size] * count
                assert await remote.echo(x=1) == 1
                assert server.statistics().errors == 0
        assert taken == [size] * count

    @pytest.mark.parametrize("where", ["memory://", "tcp://127.0.0.1:0"])
    async def test_a_generators_own_scope_ends_while_its_item_is_half_sent(self, where: str, serving: Any) -> None:
        """The Cancelled comes at its yield, its own scope takes it; the connection, with half a frame on it, is closed."""
        trace: list[Any] = []
        go = trio.Event()
        ended = trio.Event()

        async def generate() -> AsyncIterator[bytes]:
            try:
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:

                        async def cancel() -> None:
                            await go.wait()
                            scope.cancel()

                        nursery.start_soon(cancel)
                        yield bytes(20_000_000)
                trace.append(scope.cancelled_caught)
                try:
                    yield b"more"
                except CommClosedError as error:
                    trace.append(type(error))
                    raise
            finally:
                ended.set()

        with memory_network():
            async with serving({"generate": generate, "echo": echo}, where) as (_server, remote):
                async with remote.generate.stream() as stream:
                    await wait_all_tasks_blocked(0.01)
                    go.set()
                    await ended.wait()
                    with pytest.raises(CommClosedError):
                        await stream.receive()
                assert trace == [True, CommClosedError]
                assert await remote.echo(x=1) == 1

    @pytest.mark.parametrize("where", ["memory://", "tcp://127.0.0.1:0", "inproc://"])
    async def test_cancelled_at_every_step(self, where: str, serving: Any) -> None:
        limits = Limits(window=64, window_bytes=2**25)

        async def talk(comm: Comm) -> None:
            for _ in range(20):
                await comm.write(item)
            async for _ in comm:
                pass

        item = bytes(600_000 if where.startswith("tcp") else 10_000)

        with memory_network():
            async with serving({"talk": talk, "echo": echo}, where, limits=limits, patience=60.0) as (server, _remote):

                async def scenario() -> None:
                    async with rpc(server.address, limits=limits) as remote, remote.talk.stream() as stream:
                        for _ in range(20):
                            await stream.send(item)
                        await stream.send_eof()
                        assert len(await all_of(stream)) == 20

                async def check() -> None:
                    async with rpc(server.address) as remote:
                        assert await remote.echo(x=1) == 1

                assert await cancel_sweep(scenario, check=check, steps="own") > 5
