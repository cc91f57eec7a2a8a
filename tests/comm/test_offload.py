"""Large messages are encoded and decoded in worker threads, in order, and whoever waits for one can be cancelled."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import trio
import trio.testing

from trio_dcore import Serialize, Serialized, ToPickle
from trio_dcore.abc import OFFLOAD, CommSettings
from trio_dcore.comm._offload import in_worker
from trio_dcore.errors import CommClosedError, LimitExceeded, SerializationError
from trio_dcore.protocol import Limits

PATIENCE = 10.0
settle = trio.testing.wait_all_tasks_blocked


class Gate:
    """Where a thread waits until it may go on."""

    def __init__(self) -> None:
        self.arrived = trio.Event()
        self.threads: list[str] = []
        self._held: list[threading.Thread] = []
        self._open = threading.Event()

    def __enter__(self) -> Gate:
        _gates.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        _gates.remove(self)
        # A thread that was left to itself is given back to trio when it is done.
        until = time.monotonic() + PATIENCE
        while not all(thread.name.startswith("Trio thread") for thread in self._held) and time.monotonic() < until:
            time.sleep(0.001)

    def open(self) -> None:
        self._open.set()

    def wait(self) -> None:
        self.threads.append(threading.current_thread().name)
        if threading.current_thread() is not threading.main_thread():
            self._held.append(threading.current_thread())
            trio.from_thread.run_sync(self.arrived.set)
            self._open.wait(PATIENCE)


_gates: list[Gate] = []


def pass_gate(data: object = None) -> str:
    """What a :class:`Gated` becomes."""
    _gates[-1].wait()
    return "made"


class Gated:
    """Waits at the gate when it is pickled."""

    nbytes = OFFLOAD + 1

    def __reduce__(self) -> Any:
        _gates[-1].wait()
        return str, ("made",)


class Bulky:
    """Has a large pickle."""

    nbytes = OFFLOAD + 1

    def __reduce__(self) -> Any:
        _gates[-1].wait()
        return bytes, (bytes(self.nbytes),)


class Arriving:
    """Waits at the gate when it is unpickled; its pickle is large."""

    def __reduce__(self) -> Any:
        return pass_gate, (bytes(OFFLOAD + 1),)


class Small:
    """Notes in which thread it is pickled."""

    def __reduce__(self) -> Any:
        _gates[-1].wait()
        return str, ("small",)


def main_thread() -> str:
    return threading.main_thread().name


# -- threads -------------------------------------------------------------------------------------------------------------------


async def test_a_function_runs_in_a_thread() -> None:
    assert await in_worker(lambda: threading.current_thread() is threading.main_thread(), "x") is False


@pytest.mark.parametrize("fails", [False, True])
async def test_what_a_thread_has_made_is_not_kept_until_a_collection(fails: bool) -> None:
    """By the error either, whose traceback knows what the function was about."""
    made: list[weakref.ref[Any]] = []

    def make() -> Any:
        array = numpy.arange(10)
        made.append(weakref.ref(array))
        if fails:
            raise LookupError
        return array

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(LookupError):
            await in_worker(make, "x")
        assert made[0]() is None
    finally:
        gc.enable()

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await in_worker(fail, "x")


async def test_cancelling_does_not_wait_for_the_thread_and_the_log_tells_of_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trio_dcore.comm")
    with Gate() as gate:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_worker, gate.wait, "waiting at the gate")
            await gate.arrived.wait()
            assert not caplog.records
            nursery.cancel_scope.cancel()
    assert [record.message for record in caplog.records] == [
        "waiting at the gate was cancelled; the thread that does it goes on, and its result will be dropped"
    ]


async def test_a_thread_that_goes_on_keeps_its_place_and_the_others_have_theirs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trio_dcore.comm._offload._THREADS", 2)
    monkeypatch.setattr("trio_dcore.comm._offload._limiter", trio.lowlevel.RunVar("a limiter for this test"))
    caplog.set_level(logging.INFO, "trio_dcore.comm")
    with Gate() as gate:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_worker, gate.wait, "x")
            await gate.arrived.wait()
            nursery.cancel_scope.cancel()
        caplog.clear()
        assert await in_worker(lambda: 1, "x") == 1
        with Gate() as other:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(in_worker, other.wait, "x")
                await other.arrived.wait()
                called: list[int] = []
                with trio.move_on_after(0.01) as scope:
                    await in_worker(lambda: called.append(1), "y")
                assert scope.cancelled_caught
                assert not called
                assert not caplog.records  # no thread had begun
                gate.open()
                await in_worker(lambda: called.append(2), "z")
                assert called == [2]
                other.open()


async def test_threads_of_handlers_do_not_count() -> None:
    """Else handlers in threads that wait for a large message could fill all of them."""
    limiter = trio.to_thread.current_default_thread_limiter()
    before, limiter.total_tokens = limiter.total_tokens, 1
    try:
        async with limiter:
            with trio.fail_after(PATIENCE):
                assert await in_worker(lambda: 1, "x") == 1
    finally:
        limiter.total_tokens = before


# -- what is offloaded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda value: value, ToPickle, Serialize, lambda value: Serialize([1, value])])
async def test_a_large_value_is_encoded_in_a_thread(new_pair: Any, wrap: Callable[[Any], Any]) -> None:
    async with new_pair("tcp") as pair:
        with Gate() as gate:
            gate.open()
            await pair.client.write([wrap(Small())])
            assert gate.threads == [main_thread()] * len(gate.threads)
            gate.threads.clear()
            size = await pair.client.write([wrap(Gated())])
            assert gate.threads
            assert main_thread() not in gate.threads
        await pair.server.read()
        await pair.server.read()
        assert size == pair.server.last_message_size


async def test_never(new_pair: Any) -> None:
    async with new_pair("tcp", offload=None) as pair:
        with Gate() as gate:
            await pair.client.write(Gated())
            assert await pair.server.read() == "made"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.client.write, ToPickle(Arriving()))
                assert await pair.server.read() == "made"
        assert set(gate.threads) == {main_thread()}


async def test_a_number_of_bytes(new_pair: Any) -> None:
    async with new_pair("tcp", offload=OFFLOAD + 1) as pair:
        with Gate() as gate:
            await pair.client.write(Gated())
            assert set(gate.threads) == {main_thread()}
    with pytest.raises(ValueError, match="offload=-1"):
        CommSettings.of(None, None, True, None, None, offload=-1)
    with pytest.raises(ValueError, match="offload=True"):
        CommSettings.of(None, None, True, None, None, offload=True)


async def test_what_is_sent_as_it_lies_takes_no_thread(new_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a thread was asked for")

    monkeypatch.setattr("trio_dcore.comm._writing.in_worker", refuse)
    monkeypatch.setattr("trio_dcore.comm._comm.in_worker", refuse)
    array = numpy.arange(1000, dtype="u1")
    data = bytes(1000)
    async with new_pair("tcp", offload=100) as pair:
        await pair.client.write({"a": array, "b": [Serialize(array)], "c": Serialize(data), "d": data, "e": [0] * 1000})
        message = await pair.server.read()
        assert (message["a"] == array).all()
        assert message["c"] == data


async def test_what_is_compressed_takes_one(new_pair: Any) -> None:
    """On both ends, also where the message has few bytes before it is decompressed."""
    threads: list[str] = []

    async def note(function: Callable[[], Any], what: str) -> Any:
        threads.append(what.split()[0])
        return await in_worker(function, what)

    array = numpy.zeros(OFFLOAD // 8 + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trio_dcore.comm._writing.in_worker", note)
        patch.setattr("trio_dcore.comm._comm.in_worker", note)
        for codec in ("lz4", "snappy", "zlib", "zstd"):
            async with new_pair("memory", compression=codec, capacity=2**20) as pair:
                assert await pair.client.write(array) < array.nbytes // 10
                assert ((await pair.server.read()) == array).all()
                assert threads == ["encoding", "decoding"]
                threads.clear()
                await pair.client.write(array[:20_000])
                await pair.server.read()
                assert not threads


async def test_what_is_passed_on_takes_none(new_pair: Any) -> None:
    async with new_pair("tcp", deserialize=False) as pair:
        with Gate() as gate:
            gate.open()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.client.write, [Serialize(Arriving())])
                (payload,) = await pair.server.read()
                assert type(payload) is Serialized
                nursery.start_soon(pair.server.write, payload)
                assert await pair.client.read() == payload
        assert not gate.threads


async def test_who_cannot_wait_does_not_wait_for_a_thread(new_pair: Any) -> None:
    async with new_pair("tcp") as pair:
        with Gate() as gate:
            assert pair.client.write_nowait(Gated())
            assert pair.client.write_soon(Gated())
            assert set(gate.threads) == {main_thread()}
        assert [await pair.server.read() for _ in range(2)] == ["made", "made"]


# -- writing -------------------------------------------------------------------------------------------------------------------


async def test_messages_leave_in_the_order_in_which_they_were_written(framed: Any) -> None:
    read: list[Any] = []

    async def reader() -> None:
        for _ in range(4):
            read.append(await framed.server.read())

    with Gate() as gate:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            nursery.start_soon(framed.client.write, [1, Gated()])
            await gate.arrived.wait()
            for message in (2, [3, Gated()], 4):
                nursery.start_soon(framed.client.write, message)
                await settle(0.005)
            assert not framed.client.write_nowait(5)
            assert not read
            gate.open()
    assert read == [(1, "made"), 2, (3, "made"), 4]


async def test_cancelled_while_it_is_encoded_nothing_was_sent(framed: Any) -> None:
    with Gate() as gate:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(framed.client.write, Gated())
            await gate.arrived.wait()
            nursery.cancel_scope.cancel()
        assert not framed.client.closed()
        with trio.fail_after(PATIENCE):
            await framed.client.write("next")
            assert await framed.server.read() == "next"


async def test_cancelled_while_another_is_encoded(framed: Any) -> None:
    with Gate() as gate:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(framed.client.write, Gated())
            await gate.arrived.wait()
            with trio.move_on_after(0.01) as scope:
                await framed.client.write("never")
            assert scope.cancelled_caught
            nursery.start_soon(framed.client.write, "last")
            await settle(0.005)
            gate.open()
            assert [await framed.server.read() for _ in range(2)] == ["made", "last"]


async def test_what_can_not_be_encoded(framed: Any) -> None:
    class Bad:
        nbytes = OFFLOAD + 1

        def __reduce__(self) -> Any:
            raise ValueError("not me")

    with pytest.raises(SerializationError, match="not me") as caught:
        await framed.client.write({"a": [0, Bad()]})
    assert caught.value.path == "a[1]"
    await framed.client.write(1)
    assert await framed.server.read() == 1


@pytest.mark.parametrize("kind", ["memory", "tcp"])
async def test_small_words_get_through_meanwhile(new_pair: Any, kind: str) -> None:
    """A pong must not wait until somebody's large message is ready."""
    async with new_pair(kind) as pair:
        with Gate() as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.client.write, Gated())
                await gate.arrived.wait()
                assert pair.client.write_soon("pong")
                with trio.fail_after(PATIENCE):
                    assert await pair.server.read() == "pong"
                gate.open()
                assert await pair.server.read() == "made"


async def test_nothing_gets_into_the_middle_of_it(new_pair: Any) -> None:
    """Also in the moment in which there is room again."""
    async with new_pair("tcp") as pair:
        with Gate() as gate:
            gate.open()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.client.write, Bulky())
                await gate.arrived.wait()
                await settle(0.1)
                for _ in range(100):
                    pair.server._pump.fill_nowait(pair.server._parser)
                assert pair.client.write_soon("behind")
                assert [await pair.server.read() for _ in range(2)] == [bytes(Bulky.nbytes), "behind"]


async def test_what_is_owed_goes_first(new_pair: Any) -> None:
    async with new_pair("memory", capacity=1000) as pair:
        with Gate() as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.client.write, bytes(3000))
                await settle()
                assert pair.client.write_soon("owed")
                nursery.start_soon(pair.client.write, Gated())
                await settle()
                assert await pair.server.read() == bytes(3000)
                with trio.fail_after(PATIENCE):
                    assert await pair.server.read() == "owed"
                await gate.arrived.wait()
                # There is no room for all of it now, and the next is behind it.
                assert pair.client.write_soon(bytes(1500))
                assert pair.client.write_soon("small")
                gate.open()
                found = [await pair.server.read() for _ in range(3)]
        assert found == [bytes(1500), "small", "made"]


async def test_what_is_owed_is_sent_though_the_large_message_is_given_up(new_pair: Any) -> None:
    async with new_pair("memory", capacity=1000) as pair:
        with Gate() as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.client.write, Gated())
                await gate.arrived.wait()
                assert pair.client.write_soon(bytes(1500))
                nursery.cancel_scope.cancel()
        with trio.fail_after(PATIENCE):
            assert await pair.server.read() == bytes(1500)


async def test_closing_does_not_wait_for_the_thread(framed: Any) -> None:
    with Gate() as gate, trio.fail_after(PATIENCE / 2):
        async with trio.open_nursery() as nursery:

            async def write() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await framed.client.send(Gated())

            nursery.start_soon(write)
            await gate.arrived.wait()
            framed.client.abort()
        with pytest.raises(CommClosedError):
            await framed.client.write(1)


async def test_a_polite_close_gives_it_the_time_to_linger(new_pair: Any) -> None:
    async with new_pair("memory", limits=Limits(linger=0.02)) as pair:
        with Gate() as gate:
            async with trio.open_nursery() as nursery:

                async def write() -> None:
                    with pytest.raises(CommClosedError):
                        await pair.client.write(Gated())

                nursery.start_soon(write)
                await gate.arrived.wait()
                await pair.client.aclose()
    async with new_pair("memory") as pair:
        with Gate() as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.client.write, Gated())
                await gate.arrived.wait()
                nursery.start_soon(pair.client.aclose)
                await settle(0.005)
                gate.open()
            assert await pair.server.read() == "made"


async def test_a_closed_comm_begins_no_thread(framed: Any) -> None:
    framed.client.abort()
    with Gate() as gate, pytest.raises(trio.ClosedResourceError):
        await framed.client.send(Gated())
    assert not gate.threads


async def test_a_peer_that_has_gone_meanwhile(new_pair: Any) -> None:
    async with new_pair("memory") as pair:
        with Gate() as gate:
            async with trio.open_nursery() as nursery:

                async def write() -> None:
                    with pytest.raises(CommClosedError) as caught:
                        await pair.client.write(Gated())
                    assert caught.value.nothing_sent

                nursery.start_soon(write)
                await gate.arrived.wait()
                pair.server.abort()
                with pytest.raises(CommClosedError):
                    pair.client.write_soon(1)
                gate.open()


async def test_a_reply_behind_it_is_not_given_up(autojump_clock: Any, new_pair: Any) -> None:
    """It is not the peer that is slow."""
    async with new_pair("memory", limits=Limits(write_stall=1)) as pair:
        with Gate() as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.server.write, Gated())
                await gate.arrived.wait()
                nursery.start_soon(pair.server.put, "reply", None, "write_stall")
                await trio.sleep(100)
                gate.open()
                assert [await pair.client.read() for _ in range(2)] == ["made", "reply"]


# -- reading -------------------------------------------------------------------------------------------------------------------


async def test_a_large_message_is_decoded_in_a_thread_and_nobody_reads_meanwhile(framed: Any) -> None:
    read: list[Any] = []

    async def reader() -> None:
        read.append(await framed.server.read())

    async def writer() -> None:
        await framed.client.write(ToPickle(Arriving()))
        await framed.client.write("next")

    with Gate() as gate:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer)
            nursery.start_soon(reader)
            await gate.arrived.wait()
            assert not framed.server.reading  # he would not notice a pong, nor the end
            with pytest.raises(trio.BusyResourceError):
                await framed.server.read()
            await framed.server.write("the other direction")
            assert await framed.client.read() == "the other direction"
            gate.open()
        assert main_thread() not in gate.threads
        await reader()
    assert read == ["made", "next"]
    assert not framed.server.reading
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        await settle(0.005)
        assert framed.server.reading
        nursery.cancel_scope.cancel()


async def test_a_read_that_is_cancelled_meanwhile_loses_nothing(framed: Any) -> None:
    async def writer() -> None:
        await framed.client.write(ToPickle(Arriving()))
        await framed.client.write("next")

    before = framed.server.messages_read
    with Gate() as gate:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer)
            async with trio.open_nursery() as reading:
                reading.start_soon(framed.server.read)
                await gate.arrived.wait()
                reading.cancel_scope.cancel()
            assert not framed.server.closed()
            assert framed.server.messages_read == before
            gate.open()
            assert [await framed.server.read() for _ in range(2)] == ["made", "next"]
            assert framed.server.messages_read == before + 2
    assert len(gate.threads) == 2


async def test_a_read_of_a_closed_comm_is_cancelled(framed: Any) -> None:
    with Gate() as gate:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(framed.client.write, ToPickle(Arriving()))
            nursery.start_soon(framed.server.read)
            await gate.arrived.wait()
            framed.server.abort()
            nursery.cancel_scope.cancel()
    with pytest.raises(CommClosedError):
        await framed.server.read()


@pytest.mark.parametrize("codec", ["lz4", "snappy", "zlib", "zstd"])
async def test_what_a_stranger_compressed_is_bounded_there_too(new_pair: Any, codec: str) -> None:
    """Some codecs tell what they become, of others that shows in the thread."""
    limits = Limits(message=1_000_000)
    async with new_pair("memory", trusted=False, capacity=2**20, limits=limits, offload=1000, compression=codec) as pair:
        await pair.client.write(Serialize(bytes(500_000)))
        assert await pair.server.read() == bytes(500_000)
        await pair.client.write({"a": Serialize(bytes(500_000)), "b": Serialize(bytes(2_000_000))})
        await pair.client.write("next")
        with pytest.raises(LimitExceeded):
            await pair.server.read()
        assert await pair.server.read() == "next"


@pytest.mark.parametrize("kind", ["stream", "memory"])
async def test_a_watch_reads_on_meanwhile(new_pair: Any, nursery: trio.Nursery, kind: str) -> None:
    """The end is noticed, what comes is kept behind the large message, and its size is not mistaken for that of another."""
    async with new_pair(kind, offload=1000) as pair:
        told: list[int] = []
        with Gate() as gate:
            async with trio.open_nursery() as reading:

                async def reader() -> None:
                    assert await pair.server.read() == "made"
                    assert pair.server.last_message_size > OFFLOAD

                async def writer() -> None:
                    await pair.client.write(ToPickle(Arriving()))
                    await pair.client.write("next")

                pair.server.watch_end(nursery, lambda: told.append(1), lambda: pair.server.read_ahead(1, 1000, fill=False))
                reading.start_soon(writer)
                reading.start_soon(reader)
                await gate.arrived.wait()
                await settle(0.005)
                with pytest.raises(trio.BusyResourceError):
                    await pair.server.read()
                pair.client.abort()
                await settle(0.005)
                assert told == [1]
                gate.open()
        assert await pair.server.read() == "next"
        with pytest.raises(CommClosedError):
            await pair.server.read()


async def test_no_payload_is_loaded_twice(new_pair: Any) -> None:
    """Those in front of the one that is too much have been loaded where the message was read."""

    async with new_pair("tcp") as pair:
        with Gate() as gate:
            gate.open()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.client.write, [ToPickle(Noted()), ToPickle(Arriving()), ToPickle(Noted())])
                assert await pair.server.read() == ("noted", "made", "noted")
        assert len(gate.threads) == 3
        assert [name == main_thread() for name in gate.threads] == [True, False, False]


def note_it() -> str:
    _gates[-1].wait()
    return "noted"


class Noted:
    """Notes in which thread it is unpickled."""

    def __reduce__(self) -> Any:
        return note_it, ()
