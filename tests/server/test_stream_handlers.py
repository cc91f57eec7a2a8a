"""Dask's message streams (wire document, section 7), with the one difference: a bad message costs nobody else anything."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy
import pytest
import trio
import trio.testing

from trio_dcore import CommClosedError, Server, connect, in_thread, run_to_end
from trio_dcore.protocol import Serialize, ToPickle
from trio_dcore.testing import memory_network, no_leaks


class Noted:
    """Stream handlers that write down what they are given."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.done = trio.Event()
        self.handlers = {"note": self.note, "later": self.later, "fail": self.fail, "odd": self.odd, "done": self.done.set}

    def note(self, **arguments: Any) -> None:
        self.found.append(arguments)

    async def later(self, x: int) -> None:
        await trio.lowlevel.checkpoint()
        self.found.append(x)

    def fail(self) -> None:
        raise ValueError("this message only")

    def odd(self) -> None:
        raise GeneratorExit


async def send(*batches: Any, where: str = "tcp://127.0.0.1:0") -> Noted:
    """Send batches down a stream to a server and return what its handlers noted."""
    noted = Noted()
    async with no_leaks(), Server(stream_handlers=noted.handlers) as server:
        async with await connect(await server.listen(where)) as comm:
            await comm.write({"op": "connection_stream", "reply": False})
            for batch in batches:
                await comm.write(batch)
            await comm.write([{"op": "done"}])
            await noted.done.wait()
    return noted


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:0", "inproc://"])
async def test_messages_are_handled_in_order(where: str) -> None:
    """A list of messages or a single one, plain or async handlers."""
    batches = [[{"op": "later", "x": 1}, {"op": "note", "y": 2}], {"op": "later", "x": 3}, [{"op": "note", "z": (4,)}]]
    assert (await send(*batches, where=where)).found == [1, {"y": 2}, 3, {"z": (4,)}]


async def test_a_bad_message_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """An unknown or missing op, an op of another type, a handler that raises, wrong arguments, and no message at all."""
    bad = [{"op": "unknown"}, {"x": 1}, {"op": 5}, {"op": "fail"}, {"op": "odd"}, {"op": "later", "wrong": 1}, 7, "text", None]
    noted = await send([*bad, {"op": "note", "x": 1}], *bad, {"op": "note", "x": 2})
    assert noted.found == [{"x": 1}, {"x": 2}]
    # A line for those that are no request, one for those whose arguments are wrong, and one for each handler that fails; and no more within
    # this second.
    dropped = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.levelname for record in dropped] == ["WARNING", "ERROR", "ERROR", "WARNING"]
    assert [bool(record.exc_info) for record in dropped] == [False, True, True, False]
    assert "'fail'" in dropped[1].getMessage()
    assert "'odd'" in dropped[2].getMessage()
    assert "a message for 'later': wrong arguments: " in dropped[3].getMessage()


async def test_a_peer_that_comes_again_does_not_flood_the_log(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """At most a line a second of each kind, for all streams of a server together."""
    noted = Noted()
    bad = [{"op": "unknown"}, {"op": "fail"}, {"op": "later", "x" * 10_000 + "\n": 1}, {"op": "close-stream"}]
    with memory_network():
        async with Server(stream_handlers=noted.handlers) as server:
            address = await server.listen("memory://")
            for number in range(25):
                async with await connect(address) as comm:
                    await comm.write({"op": "connection_stream", "reply": False})
                    await comm.write(bad)
                    with pytest.raises(CommClosedError):
                        await comm.read()
                if number < 24:
                    await trio.sleep(0.125)
            assert trio.current_time() == 3
    loud = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(loud) == 4 * 3
    assert all("(and 7 more like this before)" in line for line in loud[3:])
    assert max(map(len, loud)) < 700
    assert not any("\n" in line for line in loud)


async def test_an_empty_op_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    noted = await send([{"op": ""}, {"op": None}, {"op": "note", "x": 1}])
    assert noted.found == [{"x": 1}]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_ok_drops_the_rest_of_its_batch() -> None:
    noted = await send([{"op": "note", "x": 1}, "OK", {"op": "note", "x": 2}], [{"op": "note", "x": 3}])
    assert noted.found == [{"x": 1}, {"x": 3}]


async def test_close_stream_ends_it() -> None:
    """The rest of the batch is dropped and the comm is closed."""
    noted = Noted()
    async with no_leaks(), Server(stream_handlers=noted.handlers) as server:
        async with await connect(await server.listen("tcp://127.0.0.1:0")) as comm:
            await comm.write({"op": "connection_stream", "reply": False})
            await comm.write([{"op": "note", "x": 1}, {"op": "close-stream"}, {"op": "note", "x": 2}])
            with pytest.raises(CommClosedError):
                await comm.read()
    assert noted.found == [{"x": 1}]


async def test_what_was_sent_is_handled_though_the_sender_has_gone() -> None:
    noted = Noted()
    async with no_leaks(), Server(stream_handlers=noted.handlers) as server:
        comm = await connect(await server.listen("tcp://127.0.0.1:0"))
        await comm.write({"op": "connection_stream", "reply": False})
        for number in range(50):
            await comm.write([{"op": "later", "x": number}])
        await comm.write([{"op": "done"}])
        await comm.close()
        await noted.done.wait()
    assert noted.found == list(range(50))


async def test_many_messages_let_others_run(autojump_clock: trio.testing.MockClock) -> None:
    """A batch whose handlers need no wait does not keep everybody else waiting, and can be cut."""
    noted = Noted()
    turns = 0

    async def others() -> None:
        nonlocal turns
        while not noted.done.is_set():
            await trio.lowlevel.checkpoint()
            turns += 1

    with memory_network():
        async with Server(stream_handlers=noted.handlers) as server, trio.open_nursery() as nursery:
            async with await connect(await server.listen("memory://")) as comm:
                await comm.write({"op": "connection_stream", "reply": False})
                await trio.testing.wait_all_tasks_blocked()
                await comm.write([{"op": "note", "x": number} for number in range(320)] + [{"op": "done"}])
                nursery.start_soon(others)
                await noted.done.wait()
    assert len(noted.found) == 320
    assert turns >= 320 // 16


async def test_extra_arguments_yield_to_the_message_s_own() -> None:
    noted = Noted()

    class Extra(Server):
        async def connection_stream(self, comm: Any) -> None:
            await self.handle_stream(comm, extra={"who": "us", "x": 0})

    async with Extra(stream_handlers=noted.handlers) as server:
        async with await connect(await server.listen("tcp://127.0.0.1:0")) as comm:
            await comm.write({"op": "connection_stream", "reply": False})
            await comm.write([{"op": "note", "x": 1}, {"op": "note"}, {"op": "done", "who": "us"}, {"op": "note", "x": 2}])
            await comm.write({"op": "close-stream"})
            with pytest.raises(CommClosedError):
                await comm.read()
    # `done` takes no arguments, and so none of these: its message is dropped.
    assert noted.found == [{"who": "us", "x": 1}, {"who": "us", "x": 0}, {"who": "us", "x": 2}]


async def test_there_is_no_such_op_without_stream_handlers() -> None:
    assert "connection_stream" not in Server().handlers
    assert "connection_stream" in Server(stream_handlers={"x": print}).handlers


@pytest.mark.parametrize("where", ["memory://", "inproc://"])
async def test_an_idle_stream_does_not_hold_up_a_shutdown(where: str, autojump_clock: trio.testing.MockClock) -> None:
    """All that has come is handled and nobody waits for an answer: the stream ends when the server begins to stop."""
    noted = Noted()
    with memory_network():
        async with Server(stream_handlers=noted.handlers) as server:
            async with await connect(await server.listen(where)) as comm:
                await comm.write({"op": "connection_stream", "reply": False})
                await comm.write([{"op": "note", "x": 1}])
                await trio.testing.wait_all_tasks_blocked()
                start = trio.current_time()
                server.stop(600)
                await server.finished()
                assert trio.current_time() == start
    assert noted.found == [{"x": 1}]


async def refused(
    where: str, *batches: Any, caplog: pytest.LogCaptureFixture, **options: Any
) -> tuple[list[Any], list[str], int]:
    """What the handlers noted, the lines of the log about refusals, and how many were counted."""
    caplog.set_level(logging.INFO, "trio_dcore.server")
    noted = Noted()
    async with no_leaks(), Server(stream_handlers=noted.handlers, **options) as server:
        async with await connect(await server.listen(where)) as comm:
            await comm.write({"op": "connection_stream", "reply": False})
            for batch in batches:
                await comm.write(batch)
            await comm.write([{"op": "done"}])
            with trio.fail_after(5):
                await noted.done.wait()
        count = server.statistics().refused
    return noted.found, [record.getMessage() for record in caplog.records if "may not call" in record.getMessage()], count


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:0", "inproc://"])
async def test_blocked_ops_are_blocked_in_streams(where: str, caplog: pytest.LogCaptureFixture) -> None:
    batch = [{"op": "note", "x": 1}, {"op": "later", "x": 2}, {"op": "note", "x": 3}]
    found, lines, count = await refused(where, batch, {"op": "note"}, caplog=caplog, blocked_handlers=["note"])
    assert found == [2]
    assert count == 3
    (line,) = lines  # and no more within this second
    assert "a message for 'note', which it may not call" in line


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:0", "inproc://"])
async def test_authorize_is_asked_for_the_ops_of_a_stream(where: str, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[tuple[str, str]] = []

    def authorize(peer: Any, op: str) -> bool:
        asked.append((peer.kind, op))
        return op != "note"

    batch = [{"op": "note", "x": 1}, {"op": "later", "x": 2}]
    found, lines, count = await refused(where, batch, caplog=caplog, authorize=authorize)
    assert found == [2]
    assert count == 1
    assert len(lines) == 1
    assert [op for _, op in asked] == ["connection_stream", "note", "later", "done"]
    assert {kind for kind, _ in asked} == {"inproc" if where == "inproc://" else "loopback"}


async def test_authorize_may_change_its_mind_within_a_batch(caplog: pytest.LogCaptureFixture) -> None:
    """It is asked right before each handler; with payloads, also when the batch has come."""
    answers = iter([True, True, False])
    batch = [{"op": "note", "x": Serialize(b"1")}, {"op": "note", "x": Serialize(b"2")}]
    found, lines, count = await refused(
        "tcp://127.0.0.1:0", batch, caplog=caplog, authorize=lambda peer, op: op != "note" or next(answers)
    )
    assert found == [{"x": b"1"}]
    assert (len(lines), count) == (1, 1)


class Canary:
    """Unpickling it leaves a trace."""

    ran: list[str] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, song: str) -> None:
        self.song = song

    def __reduce__(self) -> Any:
        return _sing, (self.song,)


def _sing(song: str) -> None:
    Canary.ran.append(song)


@pytest.mark.parametrize("wrapper", [Serialize, ToPickle])
async def test_payloads_of_a_batch_that_is_refused_are_not_touched(wrapper: Any, caplog: pytest.LogCaptureFixture) -> None:
    Canary.ran.clear()
    batch = [
        {"op": "note", "x": wrapper(Canary("a"))},
        {"op": "nobody", "x": wrapper(Canary("b"))},
        {"op": ""},
        "OK",
        {"op": "later"},
    ]
    found, _, count = await refused(
        "tcp://127.0.0.1:0",
        batch,
        [{"op": "note", "x": wrapper(Canary("c"))}, {"op": "later", "x": 1}],
        caplog=caplog,
        blocked_handlers=["note"],
    )
    assert found == [1]
    assert count == 2
    assert Canary.ran == ["c"]  # the batch's other message was for a handler that may be called


@pytest.mark.parametrize("batch", [Serialize([{"op": "note", "x": 1}]), [Serialize({"op": "note", "x": 1})]])
async def test_an_op_inside_a_payload_is_refused_all_the_same(batch: Any, caplog: pytest.LogCaptureFixture) -> None:
    found, lines, _ = await refused("tcp://127.0.0.1:0", batch, caplog=caplog, blocked_handlers=["note"])
    assert found == []
    assert len(lines) == 1
    found, lines, _ = await refused("tcp://127.0.0.1:0", batch, caplog=caplog)
    assert found == [{"x": 1}]


class Odd:
    """Has no truth value, and is equal to nothing in particular, as an array."""

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")

    def __eq__(self, other: object) -> Any:
        return self

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(("where", "op"), [("tcp://127.0.0.1:0", Serialize(numpy.arange(3))), ("inproc://", Odd())])
async def test_an_op_without_a_truth_value_is_unknown(where: str, op: Any, caplog: pytest.LogCaptureFixture) -> None:
    batch = [{"op": "note", "x": 1}, {"op": op, "x": 2}, {"op": "note", "x": 3}]
    assert (await send(batch, [{"op": "note", "x": 4}], where=where)).found == [{"x": 1}, {"x": 3}, {"x": 4}]
    assert "the unknown op a" in caplog.text


async def test_a_handler_in_a_thread(caplog: pytest.LogCaptureFixture) -> None:
    """In order with the others, and what it raises costs no other message."""
    found: list[Any] = []
    done = trio.Event()

    def blocking(x: int) -> None:
        found.append((x, threading.current_thread() is threading.main_thread()))
        if x == 2:
            raise ValueError("in the thread")

    handlers = {"blocking": in_thread(blocking), "plain": run_to_end(blocking), "done": done.set}
    async with no_leaks(), Server(stream_handlers=handlers) as server:
        async with await connect(await server.listen("tcp://127.0.0.1:0")) as comm:
            await comm.write({"op": "connection_stream", "reply": False})
            messages = [("blocking", {"x": 1}), ("plain", {"x": 3}), ("blocking", {"x": 2}), ("blocking", {"y": 0}), ("done", {})]
            await comm.write([{"op": op, **arguments} for op, arguments in messages])
            await done.wait()
    assert found == [(1, False), (3, True), (2, False)]
    assert "the stream handler 'blocking' failed" in caplog.text
    assert "a message for 'blocking': wrong arguments: " in caplog.text
