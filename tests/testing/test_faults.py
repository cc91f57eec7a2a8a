"""Each fault, with what it does to the user of the stream and to the other end, to the instant."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore.testing import FaultStream, MemoryStream, memory_stream_pair

Clock = trio.testing.MockClock


@contextmanager
def lasts(seconds: float) -> Iterator[None]:
    start = trio.current_time()
    yield
    assert trio.current_time() - start == pytest.approx(seconds)


def faulty(**faults: Any) -> tuple[FaultStream, MemoryStream]:
    """A stream with faults, and the other end."""
    a, b = memory_stream_pair()
    return FaultStream(a, **faults), b


async def take(stream: trio.abc.Stream, size: int) -> bytes:
    """Exactly so many bytes; fewer if the stream ends before."""
    data = bytearray()
    while len(data) < size and (more := await stream.receive_some(size - len(data))):
        data += more
    return bytes(data)


async def test_without_faults_it_is_a_stream_as_trio_wants_them(autojump_clock: Clock) -> None:
    async def pair() -> tuple[FaultStream, FaultStream]:
        a, b = memory_stream_pair()
        return FaultStream(a), FaultStream(FaultStream(b))

    async def clogged() -> tuple[FaultStream, FaultStream]:
        a, b = memory_stream_pair(capacity=1)
        a.send_nowait(b"x")
        b.send_nowait(b"x")
        return FaultStream(a), FaultStream(b)

    await trio.testing.check_two_way_stream(pair, clogged)


async def test_latency(autojump_clock: Clock) -> None:
    a, b = faulty(latency=2)
    with lasts(2):
        await a.send_all(b"there")
    assert await b.receive_some() == b"there"
    await b.send_all(b"back")
    with lasts(2):
        assert await a.receive_some() == b"back"


@pytest.mark.parametrize(("on", "there", "back"), [("send", 3, 0), ("receive", 0, 3), ("both", 3, 3)])
async def test_the_side_with_the_fault(on: Any, there: float, back: float, autojump_clock: Clock) -> None:
    a, b = faulty(latency=3, on=on)
    with lasts(there):
        await a.send_all(b"x")
    await b.send_all(b"y")
    with lasts(back):
        assert await a.receive_some() == b"y"


async def test_what_is_late_is_not_lost_when_its_receiver_gives_up(autojump_clock: Clock) -> None:
    a, b = faulty(latency=2)
    await b.send_all(b"late")
    with trio.move_on_after(1) as scope:
        await a.receive_some()
    assert scope.cancelled_caught
    with lasts(1):
        assert await a.receive_some(2) == b"la"
    with lasts(0):
        assert await a.receive_some() == b"te"


async def test_bandwidth(autojump_clock: Clock) -> None:
    a, b = faulty(bandwidth=100)
    with lasts(5):
        await a.send_all(b"x" * 500)
    await b.send_all(b"y" * 200)
    with lasts(2):
        assert await a.receive_some() == b"y" * 200


async def test_slicer(autojump_clock: Clock) -> None:
    a, b = faulty(slicer=3, latency=1)
    with lasts(3):
        await a.send_all(b"abcdefg")
    assert await b.receive_some() == b"abcdefg"
    await b.send_all(b"0123")
    with lasts(2):
        assert [await a.receive_some(), await a.receive_some()] == [b"012", b"3"]


async def test_faults_may_change(autojump_clock: Clock) -> None:
    a, _ = faulty()
    with lasts(0):
        await a.send_all(b"quick")
    a.latency, a.slicer = 1, 1
    with lasts(4):
        await a.send_all(b"slow")


async def test_slow_close(autojump_clock: Clock) -> None:
    a, b = faulty(slow_close=7)
    with lasts(7):
        await a.aclose()
    assert await b.receive_some() == b""
    with lasts(0):
        await a.aclose()


@pytest.mark.parametrize("give_up", [trio.move_on_after, None])
async def test_a_slow_close_can_be_cut_short(give_up: Any, autojump_clock: Clock) -> None:
    a, b = faulty(slow_close=7)
    with lasts(0 if give_up is None else 2):
        if give_up is None:
            a.close()
        else:
            with give_up(2):
                await a.aclose()
    assert await b.receive_some() == b""


async def test_timeout(autojump_clock: Clock) -> None:
    a, b = faulty(timeout=10)
    await b.send_all(b"never read")
    with lasts(0):
        await a.send_all(b"lost")
    with lasts(10):
        assert await a.receive_some() == b""
    assert a.was_cut
    assert await b.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await a.send_all(b"x")


async def test_a_timeout_cuts_also_where_nobody_waits_and_after_a_close(autojump_clock: Clock) -> None:
    a, b = faulty(timeout=10)
    a.close()
    with lasts(10):
        assert await b.receive_some() == b""
    with pytest.raises(trio.ClosedResourceError):
        await a.receive_some()


async def test_a_black_hole_takes_effect_on_what_is_waiting_and_takes_only_so_much(autojump_clock: Clock) -> None:
    a, b = faulty()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.receive_some)
        nursery.start_soon(a.send_all, b"x" * 100_000)
        await trio.testing.wait_all_tasks_blocked()
        a.black_hole()
        assert len(await b.receive_some()) == 64 * 1024  # was on its way
        await b.send_all(b"nobody gets this")
        with trio.move_on_after(1000) as scope:
            while await b.receive_some():
                pass
        assert scope.cancelled_caught
        nursery.cancel_scope.cancel()
    with lasts(0):
        while a.send_nowait(b"y" * 1000):
            pass
        with trio.move_on_after(0):
            await a.send_all(b"z")
    with trio.move_on_after(50) as scope:
        await a.wait_send_all_might_not_block()
    assert scope.cancelled_caught
    a.close()
    with trio.move_on_after(1000) as scope:
        await b.receive_some()
    assert scope.cancelled_caught, "the close got through"
    a.cut()
    assert await b.receive_some() == b""


async def test_a_close_wakes_those_who_wait_in_a_black_hole(autojump_clock: Clock) -> None:
    a, _ = faulty(timeout=math.inf)

    async def closed(operation: Any, *args: Any) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await operation(*args)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(closed, a.receive_some)
        nursery.start_soon(closed, a.send_all, b"x" * 100_000)
        await trio.testing.wait_all_tasks_blocked()
        a.close()


async def test_reset_peer(autojump_clock: Clock) -> None:
    a, b = faulty(reset_peer=4)
    await a.send_all(b"before")
    with lasts(4), pytest.raises(trio.BrokenResourceError):
        await a.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await b.receive_some()  # what was on its way is lost
    with pytest.raises(trio.BrokenResourceError):
        await a.send_all(b"x")


async def test_limit_data(autojump_clock: Clock) -> None:
    a, b = faulty(limit_data=5)
    with pytest.raises(trio.BrokenResourceError):
        await a.send_all(b"1234567")
    assert await take(b, 100) == b"12345"


async def test_limit_data_of_what_is_received(autojump_clock: Clock) -> None:
    a, b = faulty(limit_data=5, on="receive")
    await b.send_all(b"1234567")
    assert await take(a, 100) == b"12345"
    with pytest.raises(trio.BrokenResourceError):
        await b.send_all(b"x")


async def test_down(autojump_clock: Clock) -> None:
    a, b = faulty(down=True)
    with pytest.raises(trio.BrokenResourceError):
        await a.send_all(b"x")
    with pytest.raises(trio.BrokenResourceError):
        a.send_nowait(b"x")
    with pytest.raises(trio.BrokenResourceError):
        await a.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await a.wait_send_all_might_not_block()
    await a.aclose()
    assert await b.receive_some() == b""


@pytest.mark.parametrize("nowait", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
async def test_cut_after_within_what_is_sent(after: int, nowait: bool, autojump_clock: Clock) -> None:
    a, b = faulty(cut_after=after)
    if nowait and after:
        assert a.send_nowait(b"abcd") == after
    with pytest.raises(trio.BrokenResourceError):
        await a.send_all(b"abcd"[after if nowait else 0 :])
    assert a.was_cut
    assert a.cut_between == (after == 0)
    assert await take(b, 100) == b"abcd"[:after]
    assert await a.receive_some() == b""


async def test_cut_after_the_last_byte_or_before_the_next(autojump_clock: Clock) -> None:
    a, b = faulty(cut_after=4)
    await a.send_all(b"abcd")
    assert a.was_cut
    assert a.cut_between
    assert await take(b, 100) == b"abcd"

    a, b = faulty(cut_after=4, cut_when="next")
    await a.send_all(b"abcd")
    assert not a.was_cut
    assert a.send_nowait(b"e") == 0
    with pytest.raises(trio.BrokenResourceError):
        await a.send_all(b"e")
    assert a.was_cut
    assert await take(b, 100) == b"abcd"


@pytest.mark.parametrize("when", ["sent", "next"])
async def test_cut_by_a_reset(when: Any, autojump_clock: Clock) -> None:
    a, b = faulty(cut_after=2, cut="reset", cut_when=when)
    with pytest.raises(trio.BrokenResourceError):
        await a.send_all(b"abcd")
    for stream in (a, b):
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()


async def test_a_cut_is_seen_by_those_who_wait(autojump_clock: Clock) -> None:
    a, b = faulty()

    async def cut() -> None:
        await trio.sleep(5)
        a.cut()
        a.cut("reset")  # too late

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut)
        with lasts(5):
            assert await a.receive_some() == b""
    assert await b.receive_some() == b""


async def test_over_sockets() -> None:
    """A cut is an end or a reset there, too, also with something unread."""
    for how in ("eof", "reset"):
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        async with listener:
            client = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
            other = await listener.accept()
            faults = FaultStream(client, cut_after=3, cut=how)  # type: ignore[arg-type]
            assert faults.send_nowait(b"abc") == 0  # a SocketStream has no such thing
            with pytest.raises(trio.BrokenResourceError):
                await faults.send_all(b"abcdef")
            if how == "eof":
                assert await take(other, 100) == b"abc"
                assert await faults.receive_some() == b""
            else:
                with pytest.raises(trio.BrokenResourceError):
                    await take(other, 100)
                with pytest.raises(trio.BrokenResourceError):
                    await faults.receive_some()
            await faults.aclose()
            await other.aclose()


async def test_what_it_can_not_work_on(autojump_clock: Clock) -> None:
    class Own(trio.abc.Stream):
        """Has neither close() nor reset()."""

        async def send_all(self, data: object) -> None: ...
        async def wait_send_all_might_not_block(self) -> None: ...
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            return b""

        async def aclose(self) -> None: ...

    for how, said in (("eof", "no close"), ("reset", "no reset")):
        with pytest.raises(TypeError, match=said):
            FaultStream(Own()).cut(how)  # type: ignore[arg-type]


async def test_one_user_in_each_direction(autojump_clock: Clock) -> None:
    a, _ = faulty(timeout=math.inf)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.receive_some)
        nursery.start_soon(a.send_all, b"x" * 100_000)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await a.receive_some()
        with pytest.raises(trio.BusyResourceError):
            await a.send_all(b"x")
        with pytest.raises(trio.BusyResourceError):
            await a.wait_send_all_might_not_block()
        assert a.send_nowait(b"x") == 0
        nursery.cancel_scope.cancel()
