"""Items and credit on one opted-in request, over both transports and a scripted peer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.lowlevel import cancel_shielded_checkpoint, checkpoint_if_cancelled
from trio.testing import wait_all_tasks_blocked

from trio_dcore import (
    CommClosedError,
    LimitExceeded,
    Limits,
    LocalProtocolError,
    RemoteProtocolError,
    SerializationError,
    to_serialize,
)
from trio_dcore.abc import CommSettings
from trio_dcore.comm import Substream, SubstreamComm, _substream, get_transport, parse_address
from trio_dcore.comm._substream import _while_reading
from trio_dcore.protocol._envelope import CANCEL, END, ERROR, GOODBYE, ITEM, ITEMS, PING, PONG, REPLY, WINDOW, Credit
from trio_dcore.protocol._frames import single_frame
from trio_dcore.testing import cancel_sweep, memory_network, no_leaks


@asynccontextmanager
async def comms(where: str) -> AsyncIterator[tuple[Any, Any]]:
    """Two connected comms behind their handshakes."""
    scheme, location = parse_address(where)
    transport = get_transport(scheme)
    with ExitStack() as stack:
        if scheme == "memory":
            stack.enter_context(memory_network())
        (listener,) = await transport.listen(location, CommSettings())
        stack.callback(listener.close)
        ours: Any = await transport.connect(parse_address(listener.contact_address)[1], CommSettings())
        stack.callback(ours.abort)
        theirs: Any = await listener.accept()
        stack.callback(theirs.abort)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.handshake)
            nursery.start_soon(theirs.handshake)
        with trio.fail_after(10):
            yield ours, theirs


def ended(kind: int, value: object) -> Exception | None:
    if kind in (CANCEL, ERROR):
        return CommClosedError("cancelled") if kind == CANCEL else ValueError(value)
    if kind == GOODBYE:
        raise RemoteProtocolError("no goodbye")
    return None


WIDE = Credit(16, 2**20)


def substream(comm: Any, id: int = 5, *, credit: Credit = WIDE, window: Credit = WIDE, **options: Any) -> Substream:
    return Substream(comm, id, credit=credit, window=window, on_end=ended, **options)


async def read(comm: Any) -> tuple[Any, ...]:
    return tuple(await comm.read())


class TestReceiving:
    async def test_item_and_items(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours)
            await theirs.write((ITEM, 5, "a"))
            await theirs.write((ITEMS, 5, ("b", "c")))
            await theirs.write((END, 5, None))
            assert [await stream.receive() for _ in range(3)] == ["a", "b", "c"]
            assert not stream.ended
            for _ in range(2):
                with pytest.raises(trio.EndOfChannel):
                    await stream.receive()
            assert stream.ended

    async def test_an_end_that_is_found_while_items_wait(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, credit=Credit(0, 1))
            await theirs.write((ITEM, 5, "a"))
            await theirs.write((ERROR, 5, "text"))
            with pytest.raises(CommClosedError, match="takes no more items"):
                await stream.send("x")  # reads both
            assert stream.ended
            assert await stream.receive() == "a"
            with pytest.raises(ValueError, match="text"):
                await stream.receive()

    async def test_what_is_left_over_and_what_was_never_made(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours)
            for kind in (ITEM, END, WINDOW, PING, REPLY, CANCEL):
                await theirs.write((kind, 4, None))
            await theirs.write((ITEM, 5, "a"))
            assert await stream.receive() == "a"
            await theirs.write((ITEM, 6, "b"))
            with pytest.raises(RemoteProtocolError, match="request 6 while 5 is the last"):
                await stream.receive()
            assert ours.closed()

    @pytest.mark.parametrize(
        "message",
        [
            (ITEMS, 5, ()),
            (ITEMS, 5, "text"),
            (WINDOW, 5, None),
            (GOODBYE, 5, None),
            (GOODBYE, 4, None),
            (77, 5, None),
            "text",
            {"op": "x"},
            (1,),
        ],
    )
    async def test_what_is_no_envelope_closes_the_comm(self, message: Any, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours)
            await theirs.write(message)
            with pytest.raises(RemoteProtocolError):
                await stream.receive()
            assert ours.closed()
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive()

    async def test_a_ping_is_answered(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours)
            await theirs.write((PING, 5, None))
            await theirs.write((PONG, 5, None))
            await theirs.write((ITEM, 5, "a"))
            assert await stream.receive() == "a"
            assert await read(theirs) == (PONG, 5, None)

    async def test_a_map_where_it_is_allowed(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, on_map=lambda message: LookupError(message["status"]))
            await theirs.write({"status": "broken"})
            for _ in range(2):
                with pytest.raises(LookupError, match="broken"):
                    await stream.receive()
            assert stream.ended
            assert stream.deaf

    async def test_the_peer_goes(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours)
            theirs.abort()
            with pytest.raises(CommClosedError, match="in the middle of a stream"):
                await stream.receive()

    async def test_cancelled_it_loses_nothing(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.receive)
                    await wait_all_tasks_blocked(0.01)
                    scope.cancel()
            with trio.CancelScope() as scope:
                scope.cancel()
                await theirs.write((ITEM, 5, "not written"))
            await theirs.write((ITEM, 5, "a"))
            assert await stream.receive() == "a"

    async def test_an_item_that_can_not_be_read(self) -> None:
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            stream = substream(ours, window=Credit(4, 2**20), credit=Credit(0, 1))
            bad = {"__Serialized__": 1}  # of the family "error": the sender's
            for _ in range(3):
                await theirs.write((ITEM, 5, to_serialize(lock)), serializers=["msgpack"])
                with pytest.raises(TypeError):
                    await stream.receive()
            assert bad
            await theirs.write((ITEM, 5, "good"))
            assert await stream.receive() == "good"
            # It counts as an item, and its credit comes back.
            assert (await read(theirs))[0] == WINDOW
            # Whoever finds it while it waits for credit isn't told: it is none of its business.
            await theirs.write((ITEM, 5, to_serialize(lock)), serializers=["msgpack"])
            await theirs.write((WINDOW, 5, (1, 0)))
            await stream.send("x")
            with pytest.raises(TypeError):
                await stream.receive()

    async def test_items_that_can_not_be_read(self) -> None:
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            stream = substream(ours)
            await theirs.write((ITEMS, 5, ("good", to_serialize(lock))), serializers=["msgpack"])
            await theirs.write((ITEM, 5, "next"))
            for _ in range(2):
                with pytest.raises(TypeError):
                    await stream.receive()
            assert await stream.receive() == "next"

    async def test_an_end_that_can_not_be_read(self) -> None:
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            stream = substream(ours)
            await theirs.write((REPLY, 5, to_serialize(lock)), serializers=["msgpack"])
            for _ in range(2):
                with pytest.raises(TypeError):
                    await stream.receive()
            assert stream.ended

    async def test_a_map_that_can_not_be_read(self) -> None:
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            stream = substream(ours, on_map=lambda message: LookupError())
            await theirs.write({"status": to_serialize(lock)}, serializers=["msgpack"])
            with pytest.raises(TypeError):
                await stream.receive()


lock = trio.Lock()  # what msgpack has no form for


class TestWindow:
    async def test_credit_comes_back_when_half_has_been_taken(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, window=Credit(4, 2**20))
            for i in range(4):
                await theirs.write((ITEM, 5, i))
            size = 0 if where.startswith("inproc") else 28
            assert await stream.receive() == 0
            assert await stream.receive() == 1
            assert await read(theirs) == (WINDOW, 5, (2, 2 * size))
            assert [await stream.receive() for _ in range(2)] == [2, 3]
            assert await read(theirs) == (WINDOW, 5, (2, 2 * size))

    async def test_by_bytes(self) -> None:
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            stream = substream(ours, window=Credit(100, 10_000))
            size = await theirs.write((ITEM, 5, bytes(6000)))
            assert await stream.receive() == bytes(6000)
            assert await read(theirs) == (WINDOW, 5, (1, size))

    async def test_the_size_is_that_of_the_whole_message(self) -> None:
        """Also where it has many frames: what the sender has counted is what the receiver gives back, to the byte."""
        import numpy

        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            window = Credit(2, 3_000_000)
            receiver, sender = substream(ours, window=window), substream(theirs, credit=window)
            sizes = (1, 1000, 100_000, 300_000)
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    for size in sizes:
                        await sender.send(numpy.zeros(size))

                nursery.start_soon(send)
                for size in sizes:
                    assert (await receiver.receive()).size == size
            await ours.write((END, 5, None))
            with pytest.raises(trio.EndOfChannel):
                await sender.receive()  # reads all that was granted
            assert (sender.credit_items, sender.credit_size) == (2, 3_000_000)

    async def test_none_is_given_behind_the_end(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, window=Credit(2, 2**20), credit=Credit(0, 1))
            await theirs.write((ITEM, 5, "a"))
            await theirs.write((END, 5, None))
            with pytest.raises(CommClosedError):
                await stream.send("x")
            assert await stream.receive() == "a"
            await ours.write("nothing before this")
            assert await theirs.read() == "nothing before this"

    async def test_too_much(self, where: str) -> None:
        for messages in (
            [(ITEM, 5, i) for i in range(5)],
            [(ITEMS, 5, tuple(range(5)))],
            [(ITEM, 5, 1), (ITEMS, 5, (2, 3, 4, 5))],
        ):
            async with comms(where) as (ours, theirs):
                stream = substream(ours, window=Credit(4, 2**20), credit=Credit(0, 1))
                for message in messages:
                    await theirs.write(message)
                with pytest.raises(RemoteProtocolError, match="more items than the stream's window"):
                    await stream.send("x")  # reads all of them, and takes none
                assert ours.closed()

    async def test_too_many_bytes(self) -> None:
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            stream = substream(ours, window=Credit(100, 1000), credit=Credit(0, 1))
            await theirs.write((ITEM, 5, bytes(5000)))  # the last may overdraw
            await theirs.write((ITEM, 5, b""))
            with pytest.raises(RemoteProtocolError, match="more items than the stream's window"):
                await stream.send("x")

    async def test_behind_the_end(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, credit=Credit(0, 1), half_close=True)
            await theirs.write((END, 5, None))
            await theirs.write((ITEM, 5, "a"))
            with pytest.raises(RemoteProtocolError, match="behind the end"):
                await stream.send("x")

    async def test_credit_that_can_not_be_given_now_is_given_later(self, where: str) -> None:
        """Somebody is in the middle of a large message, which the peer doesn't read yet."""
        async with comms(where) as (ours, theirs):
            stream = substream(ours, window=Credit(2, 2**20))
            for i in range(2):
                await theirs.write((ITEM, 5, i))
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(ours.write, bytes(1_000_000))
                await wait_all_tasks_blocked(0.01)
                assert [await stream.receive() for _ in range(2)] == [0, 1]
                found = 0
                messages = [await theirs.read() for _ in range(22)]
            for message in messages:
                if not isinstance(message, bytes):
                    kind, identity, (items, _size) = message
                    assert (kind, identity) == (WINDOW, 5)
                    found += items
            assert found == 2

    async def test_too_much_is_owed(self, where: str) -> None:
        """Then it is tried again with the next item; that the comm has gone is told by the next read."""
        async with comms(where) as (ours, theirs):
            stream = substream(ours, window=Credit(2, 2**20))
            for i in range(2):
                await theirs.write((ITEM, 5, i))
            cls = type(ours)
            original = cls.write_soon
            answers: list[Any] = [False, None]

            def write_soon(comm: Any, message: Any) -> Any:
                answer = answers.pop(0) if comm is ours and answers else None
                return original(comm, message) if answer is None else answer

            cls.write_soon = write_soon
            try:
                assert [await stream.receive() for _ in range(2)] == [0, 1]
            finally:
                cls.write_soon = original
            assert (await read(theirs))[2][0] == 2

    async def test_the_peer_has_gone_when_credit_is_given(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, window=Credit(2, 2**20))
            await theirs.write((ITEMS, 5, (1, 2)))
            assert await stream.receive() == 1
            ours.abort()
            assert await stream.receive() == 2
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive()


class TestSending:
    async def test_under_credit(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, credit=Credit(2, 2**20))
            sent: list[int] = []

            async def send() -> None:
                for i in range(5):
                    await stream.send(i)
                    sent.append(i)
                await stream.send_end()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await wait_all_tasks_blocked(0.01)
                assert sent == [0, 1]
                await theirs.write((WINDOW, 5, (1, 0)))
                await wait_all_tasks_blocked(0.01)
                assert sent == [0, 1, 2]
                await theirs.write((WINDOW, 5, (0, 100)))
                await theirs.write((WINDOW, 5, (100, 100)))
                assert [await read(theirs) for _ in range(6)] == [(ITEM, 5, i) for i in range(5)] + [(END, 5, None)]
            assert stream.items_sent == 5

    async def test_bytes_may_be_overdrawn_once(self) -> None:
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            stream = substream(ours, credit=Credit(100, 1000))
            size = await stream.send(bytes(5000))
            assert size > 5000
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send, b"")
                    await wait_all_tasks_blocked(0.01)
                    scope.cancel()
            assert scope.cancelled_caught
            await theirs.write((WINDOW, 5, (0, size - 1000)))
            await theirs.write((WINDOW, 5, (0, 1)))
            await stream.send(b"")
            assert [(await read(theirs))[2] for _ in range(2)] == [bytes(5000), b""]

    async def test_over_inproc_only_items_are_counted(self) -> None:
        async with comms("inproc://") as (ours, theirs):
            stream = substream(ours, credit=Credit(10, 1))
            for i in range(10):
                assert await stream.send(i) == 1
            assert [(await read(theirs))[2] for _ in range(10)] == list(range(10))

    async def test_what_can_not_be_sent_costs_nothing(self) -> None:
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            stream = substream(ours, credit=Credit(1, 2**20))
            for on_error in (None, "raise"):
                with pytest.raises(SerializationError):
                    await stream.send((i for i in ()), on_error=on_error)
            assert stream.items_sent == 0
            await stream.send("a")
            assert await read(theirs) == (ITEM, 5, "a")

    async def test_serializers_and_on_error(self) -> None:
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            stream = substream(ours)
            with pytest.raises(SerializationError):
                await stream.send(to_serialize(lock), serializers=["msgpack"])
            await stream.send(to_serialize(lock), serializers=["msgpack"], on_error="message")
            with pytest.raises(TypeError):
                await theirs.read()
            await stream.send(to_serialize((1, "a")), serializers=["msgpack"])
            assert await read(theirs) == (ITEM, 5, (1, "a"))

    @pytest.mark.parametrize(
        ("kind", "half_close", "deaf"), [(END, True, False), (END, False, True), (CANCEL, True, True), (REPLY, False, True)]
    )
    async def test_behind_the_peers_end(self, kind: int, half_close: bool, deaf: bool, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, half_close=half_close, credit=Credit(3, 2**20))
            await theirs.write((kind, 5, None))
            with pytest.raises((trio.EndOfChannel, CommClosedError)):
                await stream.receive()
            assert stream.deaf is deaf
            if deaf:
                with pytest.raises(CommClosedError, match="takes no more items"):
                    await stream.send("a")
                assert stream.items_sent == 0
            else:
                for i in range(3):
                    await stream.send(i)
                await theirs.write((WINDOW, 5, (1, 1)))
                await stream.send(3)
                assert [(await read(theirs))[2] for _ in range(4)] == [0, 1, 2, 3]
            await stream.send_end()
            assert await read(theirs) == (END, 5, None)

    async def test_who_waits_for_credit_hears_of_the_end(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, credit=Credit(0, 1))

            async def send() -> None:
                with pytest.raises(CommClosedError, match="takes no more items") as caught:
                    await stream.send("a")
                assert isinstance(caught.value.__cause__, ValueError)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await wait_all_tasks_blocked(0.01)
                await theirs.write((ERROR, 5, "why"))

    async def test_in_order_of_coming(self, where: str) -> None:
        """Tasks that wait for credit, and one that ends the stream behind them."""
        async with comms(where) as (ours, theirs):
            stream = substream(ours, credit=Credit(0, 1))
            async with trio.open_nursery() as nursery:
                for i in range(4):
                    nursery.start_soon(stream.send, i)
                    await wait_all_tasks_blocked(0.001)
                nursery.start_soon(stream.send_end)
                await wait_all_tasks_blocked(0.001)
                await theirs.write((WINDOW, 5, (100, 100)))
                assert [await read(theirs) for _ in range(5)] == [*((ITEM, 5, i) for i in range(4)), (END, 5, None)]

    async def test_the_turn_of_one_that_is_cancelled_goes_on(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, credit=Credit(0, 1))
            scopes = [trio.CancelScope() for _ in range(3)]

            async def send(i: int) -> None:
                with scopes[i]:
                    await stream.send(i)

            async with trio.open_nursery() as nursery:
                for i in range(3):
                    nursery.start_soon(send, i)
                    await wait_all_tasks_blocked(0.001)
                scopes[1].cancel()  # it waits for its turn
                await wait_all_tasks_blocked(0.001)
                scopes[0].cancel()  # it has it, and waits for credit
                await wait_all_tasks_blocked(0.001)
                await theirs.write((WINDOW, 5, (1, 1)))
                assert await read(theirs) == (ITEM, 5, 2)

    async def test_many_large_ones_keep_to_their_credit(self) -> None:
        """What one has cost is known only when it has left; so the next waits for that."""
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            stream = substream(ours, credit=Credit(16, 100_000))
            receiver = substream(theirs, window=Credit(16, 100_000))
            async with trio.open_nursery() as nursery:
                for i in range(8):
                    nursery.start_soon(stream.send, bytes([i]) * 5_000_000)
                assert sorted([(await receiver.receive())[0] for _ in range(8)]) == list(range(8))

    async def test_a_receiver_reads_for_a_sender_and_the_reverse(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, credit=Credit(0, 1))
            found: list[Any] = []

            async def receive() -> None:
                found.append(await stream.receive())

            for first, second in ((receive, lambda: stream.send("x")), (lambda: stream.send("x"), receive)):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(first)
                    await wait_all_tasks_blocked(0.001)
                    nursery.start_soon(second)
                    await wait_all_tasks_blocked(0.001)
                    await theirs.write((WINDOW, 5, (1, 100)))
                    await theirs.write((ITEM, 5, "y"))
                    while (await read(theirs))[0] != ITEM:
                        pass
            assert found == ["y", "y"]

    async def test_a_reader_that_is_cancelled_leaves_it_to_the_next(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, credit=Credit(0, 1))
            scope = trio.CancelScope()

            async def receive() -> None:
                with scope:
                    await stream.receive()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await wait_all_tasks_blocked(0.001)
                nursery.start_soon(stream.send, "x")
                await wait_all_tasks_blocked(0.001)
                scope.cancel()
                await wait_all_tasks_blocked(0.001)
                await theirs.write((WINDOW, 5, (1, 1)))
                assert await read(theirs) == (ITEM, 5, "x")

    @pytest.mark.parametrize("half_close", [True, False])
    async def test_an_end_that_has_to_wait(self, half_close: bool) -> None:
        """Behind a server's end comes the next request, which is not for the stream to read."""
        async with comms("inproc://") as (ours, theirs), trio.open_nursery() as nursery:
            stream = substream(ours, half_close=half_close)
            while ours.write_nowait("what fills it up"):
                pass
            nursery.start_soon(stream.send_end)
            await wait_all_tasks_blocked()
            assert ours.reading is not half_close
            if half_close:
                await theirs.write({"op": "the next"})
            while (message := await theirs.read()) == "what fills it up":
                pass
            assert message == (END, 5, None)
            if half_close:
                await wait_all_tasks_blocked()
                assert await ours.read() == {"op": "the next"}

    async def test_cancelled_at_every_step(self, where: str) -> None:
        async def scenario() -> None:
            async with comms(where) as (ours, theirs), trio.open_nursery() as nursery:
                a, b = substream(ours, credit=Credit(2, 2**20)), substream(theirs, window=Credit(2, 2**20))

                async def send() -> None:
                    for i in range(6):
                        await a.send(i)
                    await a.send_end()

                nursery.start_soon(send)
                for i in range(6):
                    assert await b.receive() == i
                with pytest.raises(trio.EndOfChannel):
                    await b.receive()

        assert await cancel_sweep(scenario) > 10


class TestSubstreamComm:
    """What a handler gets as ``comm``."""

    async def test_is_a_comm(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            view = SubstreamComm(substream(ours, half_close=True), ours)
            assert (view.local_address, view.peer_address, view.peer) == (ours.local_address, ours.peer_address, ours.peer)
            assert repr(view) == f"<stream 5 on {ours!r}>"
            assert not view.closed()
            await view.write("a")
            await view.send("b")
            assert [await read(theirs) for _ in range(2)] == [(ITEM, 5, "a"), (ITEM, 5, "b")]
            for item in ("c", "d", "e"):
                await theirs.write((ITEM, 5, item))
            await theirs.write((END, 5, None))
            assert await view.read() == "c"
            assert await view.receive() == "d"
            assert [item async for item in view] == ["e"]
            with pytest.raises(CommClosedError, match="the client has ended its side"):
                await view.read()
            with pytest.raises(trio.EndOfChannel):
                await view.receive()
            await view.write("f")
            assert await read(theirs) == (ITEM, 5, "f")

    async def test_writes_as_a_comm_does(self) -> None:
        async with comms("tcp://127.0.0.1:0") as (ours, theirs):
            view = SubstreamComm(substream(ours), ours)
            assert await view.write(b"a" * 100) > 100
            assert (await read(theirs))[2] == b"a" * 100
            with pytest.raises(SerializationError):
                await view.write(to_serialize(lock), serializers=["msgpack"], on_error="raise")
            with pytest.raises(ValueError, match="on_error"):
                await view.write("a", on_error="nonsense")
            await view.write(to_serialize(lock), serializers=["msgpack"])
            with pytest.raises(TypeError):
                await theirs.read()

    async def test_closed(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            view = SubstreamComm(substream(ours), ours)
            await view.aclose()
            await view.close()
            assert view.closed()
            for operation in (view.read, lambda: view.write(1)):
                with pytest.raises(CommClosedError, match="closed here"):
                    await operation()
            for operation in (view.receive, lambda: view.send(1)):
                with pytest.raises(trio.ClosedResourceError, match="closed here"):
                    await operation()
            view.detach()
            assert not ours.closed()
            await ours.write("the connection lives")
            assert await theirs.read() == "the connection lives"

    async def test_detached(self, where: str) -> None:
        async with comms(where) as (ours, _theirs):
            view = SubstreamComm(substream(ours), ours)
            view.detach()
            assert view.closed()
            with pytest.raises(CommClosedError, match="the request that this comm belonged to has ended"):
                await view.read()
            await view.aclose()
            with pytest.raises(trio.ClosedResourceError, match="has ended"):
                await view.receive()

    async def test_aborted(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            view = SubstreamComm(substream(ours), ours)
            view.abort()
            assert view.closed()
            assert ours.closed()
            with pytest.raises(CommClosedError):
                await theirs.read()

    async def test_the_connection_is_closed_here(self, where: str) -> None:
        async with comms(where) as (ours, _theirs):
            view = SubstreamComm(substream(ours), ours)
            ours.abort()
            assert view.closed()
            for operation in (view.read, lambda: view.write(1)):
                with pytest.raises(CommClosedError):
                    await operation()
            for operation in (view.receive, lambda: view.send(1)):
                with pytest.raises(trio.ClosedResourceError):
                    await operation()

    async def test_where_one_reply_is_awaited(self, where: str) -> None:
        async with comms(where) as (ours, _theirs):
            view = SubstreamComm(substream(ours), ours, "nothing can be written")
            for operation in (lambda: view.write(1), lambda: view.send(1)):
                with pytest.raises(LocalProtocolError, match="nothing can be written"):
                    await operation()

    async def test_a_second_reader(self, where: str) -> None:
        async with no_leaks(), comms(where) as (ours, _theirs), trio.open_nursery() as nursery:
            view = SubstreamComm(substream(ours), ours)
            nursery.start_soon(view.read)
            await wait_all_tasks_blocked(0.01)
            with pytest.raises(trio.BusyResourceError):
                await view.read()
            nursery.cancel_scope.cancel()


EVERYWHERE = ["memory://", "tcp://127.0.0.1:0", "inproc://"]
BYTES = EVERYWHERE[:2]
LARGE = Credit(64, 2**20)


@asynccontextmanager
async def unread(where: str, **options: Any) -> AsyncIterator[tuple[Any, Any, Substream, Any]]:
    """(ours, theirs, a stream on ours, an item): the other side reads nothing yet, and can't take the item before it does."""
    async with comms(where) as (ours, theirs):
        if where.startswith("inproc"):
            while ours.write_nowait((PONG, 5, None)):
                pass
        yield ours, theirs, substream(ours, **options), bytes(20_000_000 if where.startswith("tcp") else 200_000)


async def read_item(comm: Any) -> Any:
    while (message := await comm.read())[0] != ITEM:
        pass
    return message[2]


class TestSendingMeanwhile:
    """A send that has to wait for the peer to read: the peer may itself wait in a send."""

    @pytest.mark.parametrize("how", ["many", "large"])
    @pytest.mark.parametrize("where", EVERYWHERE)
    async def test_both_send_before_they_receive(self, where: str, how: str) -> None:
        if where.startswith("inproc"):
            count, item = 40, b""
        else:
            count, item = (1, bytes(8_000_000)) if how == "large" else (16, bytes(60_000))
        results: list[list[int]] = []

        async def talk(comm: Any) -> None:
            stream = substream(comm, credit=LARGE, window=LARGE)
            for _ in range(count):
                await stream.send(item)
            results.append([len(await stream.receive()) for _ in range(count)])
            await stream.send_end()

        async with comms(where) as pair, trio.open_nursery() as nursery:
            for comm in pair:
                nursery.start_soon(talk, comm)
        assert results == [[len(item)] * count] * 2

    @pytest.mark.parametrize("where", EVERYWHERE)
    async def test_another_task_receives(self, where: str) -> None:
        async with unread(where) as (_ours, theirs, stream, item), trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, item)
            await wait_all_tasks_blocked(0.01)
            for i in range(3):
                await theirs.write((ITEM, 5, i))
            await wait_all_tasks_blocked(0.01)
            await theirs.write((ITEM, 5, 3))
            assert [await stream.receive() for _ in range(4)] == [0, 1, 2, 3]
            found: list[Any] = []

            async def receive() -> None:
                for _ in range(2):
                    found.append(await stream.receive())

            nursery.start_soon(receive)
            await wait_all_tasks_blocked(0.01)
            await theirs.write((ITEM, 5, 4))
            assert await read_item(theirs) == item  # the write is done, and the one who still waits reads on
            await wait_all_tasks_blocked(0.01)
            await theirs.write((ITEM, 5, 5))
            await wait_all_tasks_blocked(0.01)
            assert found == [4, 5]

    @pytest.mark.parametrize("where", EVERYWHERE)
    async def test_one_that_receives_already(self, where: str) -> None:
        async with unread(where) as (_ours, theirs, stream, item), trio.open_nursery() as nursery:
            found: list[Any] = []

            async def receive() -> None:
                found.append(await stream.receive())

            nursery.start_soon(receive)
            await wait_all_tasks_blocked(0.01)
            nursery.start_soon(stream.send, item)
            await wait_all_tasks_blocked(0.01)
            for i in range(3):
                await theirs.write((ITEM, 5, i))
            assert await read_item(theirs) == item
            await wait_all_tasks_blocked(0.01)
            assert found == [0]
            assert [await stream.receive() for _ in range(2)] == [1, 2]

    @pytest.mark.parametrize("where", EVERYWHERE)
    async def test_credit_that_comes_meanwhile_counts(self, where: str) -> None:
        async with unread(where, credit=Credit(1, 2**20)) as (_ours, theirs, stream, item), trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, item)
            await wait_all_tasks_blocked(0.01)
            await theirs.write((WINDOW, 5, (1, 2**30)))
            assert await read_item(theirs) == item
            await stream.send("more")
            assert await read_item(theirs) == "more"

    @pytest.mark.parametrize("where", BYTES)
    async def test_a_message_that_has_come_in_part_is_kept(self, where: str) -> None:
        async with unread(where) as (ours, theirs, stream, item):
            data = single_frame(theirs._encoder.encode((ITEM, 5, "in two parts"))[0])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send, item)
                await wait_all_tasks_blocked(0.01)
                assert theirs._pump.try_send(data[:20]) == 20
                await wait_all_tasks_blocked(0.01)
                assert await read_item(theirs) == item
            assert not ours.closed()
            theirs._pump.try_send(data[20:])
            assert await stream.receive() == "in two parts"

    @pytest.mark.parametrize("where", EVERYWHERE)
    async def test_cancelled(self, where: str) -> None:
        """Where a part of it has left, the comm is closed; over inproc nothing leaves in part."""
        async with unread(where) as (ours, theirs, stream, item):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send, item)
                    await wait_all_tasks_blocked(0.01)
                    scope.cancel()
            assert scope.cancelled_caught
            assert stream.items_sent == 0
            assert ours.closed() is not where.startswith("inproc")
            if not ours.closed():
                await theirs.write((ITEM, 5, "a"))
                assert await stream.receive() == "a"

    @pytest.mark.parametrize("where", BYTES)
    async def test_cancelled_before_the_first_byte(self, where: str) -> None:
        """Another message is in front; half a message has come: the comm goes on, in both directions."""
        async with unread(where) as (ours, theirs, stream, item):
            data = single_frame(theirs._encoder.encode((ITEM, 5, "in two parts"))[0])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.write, (ITEM, 4, item))
                await wait_all_tasks_blocked(0.01)
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as inner:
                        inner.start_soon(stream.send, "never sent")
                        await wait_all_tasks_blocked(0.01)
                        theirs._pump.try_send(data[:20])
                        await wait_all_tasks_blocked(0.01)
                        scope.cancel()
                assert scope.cancelled_caught
                assert not ours.closed()
                assert await read_item(theirs) == item
            theirs._pump.try_send(data[20:])
            assert await stream.receive() == "in two parts"
            await stream.send("next")
            assert await read_item(theirs) == "next"

    @pytest.mark.parametrize("where", EVERYWHERE)
    async def test_what_came_is_not_acceptable(self, where: str) -> None:
        async with unread(where) as (ours, theirs, stream, item), trio.open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises(RemoteProtocolError, match="request 6 while 5 is the last"):
                    await stream.send(item)

            nursery.start_soon(send)
            await wait_all_tasks_blocked(0.01)
            await theirs.write((ITEM, 6, "b"))
            await wait_all_tasks_blocked(0.01)
            assert ours.closed()

    @pytest.mark.parametrize("side", ["here", "there"])
    @pytest.mark.parametrize("where", EVERYWHERE)
    async def test_the_comm_is_closed(self, where: str, side: str) -> None:
        async with unread(where) as (ours, theirs, stream, item), trio.open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises(trio.ClosedResourceError if side == "here" else CommClosedError):
                    await stream.send(item)

            nursery.start_soon(send)
            await wait_all_tasks_blocked(0.01)
            (ours if side == "here" else theirs).abort()

    @pytest.mark.parametrize("where", EVERYWHERE)
    async def test_the_peer_takes_no_more(self, where: str) -> None:
        """What stands behind its end is not for the stream; what is being sent is sent all the same."""
        async with unread(where) as (ours, theirs, stream, item), trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, item)
            await wait_all_tasks_blocked(0.01)
            await theirs.write((ITEM, 5, "last"))
            await theirs.write((ERROR, 5, "why"))
            await theirs.write("for somebody else")
            await wait_all_tasks_blocked(0.01)
            assert stream.deaf
            assert not ours.reading
            assert await ours.read() == "for somebody else"
            assert await stream.receive() == "last"
            with pytest.raises(ValueError, match="why"):
                await stream.receive()
            assert await read_item(theirs) == item

    async def test_an_item_that_can_not_be_read_is_for_its_receiver(self) -> None:
        async with unread("tcp://127.0.0.1:0") as (_ours, theirs, stream, item), trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, item)
            await wait_all_tasks_blocked(0.01)
            await theirs.write((ITEM, 5, to_serialize(lock)), serializers=["msgpack"])
            assert await read_item(theirs) == item
            with pytest.raises(TypeError):
                await stream.receive()

    @pytest.mark.parametrize("where", ["memory://", "inproc://"])
    async def test_cancelled_at_every_step(self, where: str) -> None:
        async def talk(comm: Any) -> None:
            stream = substream(comm, credit=LARGE, window=LARGE)
            for _ in range(20):
                await stream.send(bytes(10_000))
            for _ in range(20):
                assert await stream.receive() == bytes(10_000)
            await stream.send_end()

        async def scenario() -> None:
            async with comms(where) as pair, trio.open_nursery() as nursery:
                for comm in pair:
                    nursery.start_soon(talk_on, comm)

        async def talk_on(comm: Any) -> None:
            try:
                await talk(comm)
            except CommClosedError:
                await checkpoint_if_cancelled()  # the other was cancelled as well, and was faster
                raise

        assert await cancel_sweep(scenario) > 20


class TestWhileReading:
    """Of two that go on at the same time one error is raised."""

    async def run(self, write: Any, read: Any) -> None:
        with no_leaks():
            await _while_reading(write, read)

    async def test_the_write_ends_the_read(self) -> None:
        ended: list[str] = []

        async def read() -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.append("read")

        await self.run(wait_all_tasks_blocked, read)
        assert ended == ["read"]

    async def test_the_read_does_not_end_the_write(self) -> None:
        done: list[str] = []

        async def write() -> None:
            await wait_all_tasks_blocked()
            done.append("written")

        await self.run(write, trio.lowlevel.checkpoint)
        assert done == ["written"]

    @pytest.mark.parametrize("other", [None, OSError("a consequence"), KeyboardInterrupt()])
    @pytest.mark.parametrize("first", ["write", "read"])
    async def test_the_first_error_is_raised_alone(self, first: str, other: BaseException | None) -> None:
        async def fails() -> None:
            await wait_all_tasks_blocked()
            raise LookupError("the cause")

        async def follows() -> None:
            try:
                await trio.sleep_forever()
            finally:
                if other is not None:
                    raise other

        expected = KeyboardInterrupt if isinstance(other, KeyboardInterrupt) else LookupError
        with pytest.raises(expected):
            await self.run(*((fails, follows) if first == "write" else (follows, fails)))

    @pytest.mark.parametrize("consequence", [False, True])
    async def test_cancelled(self, consequence: bool) -> None:
        """Also where the cancelled write closes what the other reads."""
        closed = trio.Event()

        async def write() -> None:
            try:
                await trio.sleep_forever()
            finally:
                if consequence:
                    closed.set()

        async def read() -> None:
            await closed.wait()
            raise OSError("closed")

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.run, write, read)
                await wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught

    async def test_a_write_that_is_done_is_not_cancelled(self) -> None:
        with trio.CancelScope() as scope:

            async def write() -> None:
                await wait_all_tasks_blocked()
                scope.cancel()
                await cancel_shielded_checkpoint()  # where the read would be cancelled if it could be

            await self.run(write, trio.sleep_forever)
            reached = True
        assert reached
        assert not scope.cancelled_caught


class TestStalls:
    """``Limits.stream_stall``: to the instant, in both directions of a stream."""

    @asynccontextmanager
    async def pair(self, where: str, seconds: float | None = 20.0) -> AsyncIterator[tuple[Any, Any]]:
        # No timeout round it: the clock is a virtual one.
        settings = CommSettings(limits=Limits(stream_stall=seconds, write_stall=3))
        scheme, location = parse_address(where)
        transport = get_transport(scheme)
        with ExitStack() as stack:
            stack.enter_context(memory_network(capacity=2000))
            (listener,) = await transport.listen(location, settings)
            stack.callback(listener.close)
            ours: Any = await transport.connect(parse_address(listener.contact_address)[1], settings)
            stack.callback(ours.abort)
            theirs: Any = await listener.accept()
            stack.callback(theirs.abort)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.handshake)
                nursery.start_soon(theirs.handshake)
            yield ours, theirs

    @pytest.mark.parametrize("where", ["memory://", "inproc://"])
    async def test_no_credit(self, where: str, autojump_clock: Any) -> None:
        async with self.pair(where) as (ours, _theirs):
            stream = substream(ours, credit=Credit(2, 2**20))
            for n in range(2):
                await stream.send(n)
            start = trio.current_time()
            with pytest.raises(LimitExceeded) as caught:
                await stream.send(2)
            assert trio.current_time() == start + 20
            assert (caught.value.limit, caught.value.value) == ("stream_stall", 20)
            assert ours.fault == str(caught.value)
            assert ours.closed()
            with pytest.raises(CommClosedError):
                await SubstreamComm(stream, ours).write(3)

    async def test_credit_is_progress_and_nothing_else_is(self, autojump_clock: Any, nursery: trio.Nursery) -> None:
        async with self.pair("memory://") as (ours, theirs):
            stream = substream(ours, credit=Credit(1, 2**20))

            async def peer() -> None:
                for _ in range(5):
                    await trio.sleep(15)
                    await theirs.write((WINDOW, 5, (0, 100)))
                while True:
                    await trio.sleep(6)
                    await theirs.write((ITEM, 5, "not what we wait for"))

            nursery.start_soon(peer)
            await stream.send(0)
            start = trio.current_time()
            with pytest.raises(LimitExceeded, match=r"Limits\(stream_stall=...\)"):
                await stream.send(1)
            assert trio.current_time() == start + 5 * 15 + 20

    async def test_credit_in_time(self, autojump_clock: Any, nursery: trio.Nursery) -> None:
        async with self.pair("memory://") as (ours, theirs):
            stream = substream(ours, credit=Credit(1, 2**20))

            async def peer() -> None:
                while True:
                    await trio.sleep(19)
                    await theirs.write((WINDOW, 5, (1, 100)))

            nursery.start_soon(peer)
            start = trio.current_time()
            for n in range(6):
                await stream.send(n)
            assert trio.current_time() == start + 5 * 19

    @pytest.mark.parametrize("first", ["receive", "send"])
    async def test_a_receiver_is_told(self, first: str, autojump_clock: Any, nursery: trio.Nursery) -> None:
        """It waits for items while another task waits for credit: who reads for both is the one or the other."""
        async with self.pair("memory://") as (ours, _theirs):
            stream = substream(ours, credit=Credit(1, 2**20))
            await stream.send(0)
            told: list[BaseException] = []

            async def receive() -> None:
                try:
                    await stream.receive()
                except CommClosedError as error:
                    told.append(error)

            async def send() -> None:
                try:
                    await stream.send(1)
                except LimitExceeded as error:
                    told.append(error)

            for task in (receive, send) if first == "receive" else (send, receive):
                nursery.start_soon(task)
                await wait_all_tasks_blocked()
            await trio.sleep(20)
            await wait_all_tasks_blocked()
            assert {type(error) for error in told} == {LimitExceeded, CommClosedError}
            assert all("Limits(stream_stall=...)" in str(error) for error in told)

    async def test_an_item_that_is_not_taken(self, autojump_clock: Any) -> None:
        async with self.pair("memory://") as (ours, _theirs):
            stream = substream(ours)
            start = trio.current_time()
            with pytest.raises(LimitExceeded, match=r"Limits\(stream_stall=...\)"):
                await stream.send(b"x" * 10_000)
            assert trio.current_time() == start + 20

    @pytest.mark.parametrize(("half_close", "limit", "seconds"), [(True, "write_stall", 3), (False, "stream_stall", 20)])
    async def test_the_end(self, half_close: bool, limit: str, seconds: float, autojump_clock: Any) -> None:
        """A server's is its final word, as a reply is; a client's belongs to its items."""
        async with self.pair("memory://") as (ours, _theirs):
            stream = substream(ours, half_close=half_close)
            while ours._pump.try_send(bytes(100)):
                pass
            start = trio.current_time()
            with pytest.raises(LimitExceeded) as caught:
                await stream.send_end()
            assert (caught.value.limit, trio.current_time()) == (limit, start + seconds)

    async def test_by_default_a_slow_consumer_is_no_fault(self, autojump_clock: Any) -> None:
        async with self.pair("memory://", None) as (ours, _theirs):
            for item in ("x", b"x" * 10_000):
                stream = substream(ours, credit=Credit(1, 2**20))
                with trio.move_on_after(100_000) as scope:
                    for _ in range(2):
                        await stream.send(item)
                assert scope.cancelled_caught
            assert not ours.fault


class TestFlood:
    """A read that need not wait delivers no cancellation, so who sends what is no news, without a pause, must not keep anybody."""

    COUNT = 1000

    async def cut(self, operation: Any) -> None:
        """Cancel it after some steps."""
        with trio.fail_after(5), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(operation)
                for _ in range(4):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

    def flood(self, comm: Any, kind: int = PONG, value: Any = None) -> None:
        for _ in range(self.COUNT):
            assert comm.write_soon((kind, 5, value))

    @pytest.mark.parametrize(("kind", "value"), [(PONG, None), (WINDOW, (0, 0)), (ITEM, "left over")])
    async def test_who_receives(self, kind: int, value: Any, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, 6 if kind == ITEM else 5)
            self.flood(theirs, kind, value)
            theirs.write_soon((ITEM, stream.id, "at last"))
            found = []

            async def receive() -> None:
                found.append(await stream.receive())

            await self.cut(receive)
            assert found == []
            assert ours.messages_read < self.COUNT
            assert await stream.receive() == "at last"

    async def test_who_waits_for_credit(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours, credit=Credit(0, 2**20))
            self.flood(theirs)
            theirs.write_soon((WINDOW, 5, (1, 0)))
            await self.cut(lambda: stream.send("item"))
            assert ours.messages_read < self.COUNT
            assert stream.items_sent == 0
            await stream.send("item")
            assert await read(theirs) == (ITEM, 5, "item")

    async def test_who_writes(self, where: str) -> None:
        async with unread(where) as (ours, theirs, stream, item):
            self.flood(theirs)
            await self.cut(lambda: stream.send(item))
            assert ours.messages_read < self.COUNT

    async def test_that_is_no_credit(self) -> None:
        async with comms("inproc://") as (ours, theirs):
            ours.settings = replace(ours.settings, limits=Limits(stream_stall=1e-9))
            stream = substream(ours, credit=Credit(0, 2**20))
            self.flood(theirs)
            with pytest.raises(LimitExceeded):
                await stream.send("item")
            assert ours.messages_read < self.COUNT

    async def test_credit_that_came_in_time_behind_others(self) -> None:
        """This process had no time to look; that is not the peer's fault."""
        async with comms("inproc://") as (ours, theirs):
            ours.settings = replace(ours.settings, limits=Limits(stream_stall=1e-9))
            stream = substream(ours, credit=Credit(0, 2**20))
            for _ in range(20):
                theirs.write_soon((PONG, 5, None))
            theirs.write_soon((WINDOW, 5, (1, 0)))
            await stream.send("item")
            assert await read(theirs) == (ITEM, 5, "item")


async def test_credit_for_a_very_large_window_comes_back_long_before_half_of_it(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_substream, "_MOST_GRANTED", 2)
    async with comms(where) as (ours, theirs):
        stream = substream(ours, window=Credit(2**60, 2**60))
        for n in range(2):
            await theirs.write((ITEM, 5, n))
            assert await stream.receive() == n
        kind, _, credit = await read(theirs)
        assert kind == WINDOW
        assert 1 <= credit[0] <= 2


class TestReadingWhatIsHere:
    async def test_it_is_kept(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours)
            await theirs.write((ITEM, 5, "item"))
            await theirs.write((END, 5, None))
            await wait_all_tasks_blocked(0.01)
            await stream.read_what_is_here()
            assert stream.ended
            assert await stream.receive() == "item"
            with pytest.raises(trio.EndOfChannel):
                await stream.receive()

    async def test_it_does_not_wait(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours)
            await stream.read_what_is_here()
            assert not ours.reading
            await theirs.write((ITEM, 5, "item"))
            assert await stream.receive() == "item"

    async def test_not_for_ever(self, where: str) -> None:
        async with comms(where) as (ours, theirs):
            for _ in range(200):
                theirs.write_soon((PONG, 5, None))
            await wait_all_tasks_blocked(0.01)
            await substream(ours).read_what_is_here()
            assert 0 < ours.messages_read < 100

    @pytest.mark.parametrize("how", ["gone", "mistaken"])
    async def test_an_error_is_for_who_receives(self, how: str, where: str) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours)
            if how == "gone":
                theirs.abort()
            else:
                await theirs.write("no envelope")
            await wait_all_tasks_blocked(0.01)
            await stream.read_what_is_here()
            with pytest.raises((CommClosedError, trio.ClosedResourceError)):
                await stream.receive()

    async def test_not_while_another_task_reads(self, where: str, nursery: trio.Nursery) -> None:
        async with comms(where) as (ours, theirs):
            stream = substream(ours)
            found = []

            async def receive() -> None:
                found.append(await stream.receive())

            nursery.start_soon(receive)
            await wait_all_tasks_blocked(0.01)
            await stream.read_what_is_here()
            await theirs.write((ITEM, 5, "item"))
            await wait_all_tasks_blocked(0.01)
            assert found == ["item"]
