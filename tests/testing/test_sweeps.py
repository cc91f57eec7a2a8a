"""The sweeps go through every step and byte, and find planted bugs at exactly the right one."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import pytest
import trio
import trio.testing

from trio_dcore import CommClosedError, ConnectError, Server, rpc
from trio_dcore.testing import (
    FaultStream,
    ManualPeer,
    MemoryNetwork,
    SweepError,
    cancel_sweep,
    memory_network,
    memory_stream_pair,
    wire_sweep,
)

Clock = trio.testing.MockClock
Side = Literal["client", "server"]


# -- cancel_sweep ----------------------------------------------------------------------------------------------------------------


async def test_every_step_of_the_scenario_is_cancelled_once() -> None:
    reached = []

    async def scenario() -> None:
        reached.append(0)
        for i in range(1, 5):
            await trio.lowlevel.checkpoint()
            reached.append(i)

    # Before it begins, and in each of its four checkpoints.
    assert await cancel_sweep(scenario, steps="own") == 5
    assert reached == [0, 0, 0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]


async def test_by_default_the_steps_of_others_count() -> None:
    """Cancelled while another task is halfway through what it does for the scenario."""
    cut_at: set[int] = set()
    progress = 0

    async def helper(done: trio.Event) -> None:
        nonlocal progress
        for _ in range(5):
            progress += 1
            await trio.lowlevel.checkpoint()
        done.set()

    async def scenario() -> None:
        nonlocal progress
        progress = 0
        done = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(helper, done)
                await done.wait()
        finally:
            cut_at.add(progress)

    assert await cancel_sweep(scenario, steps="own") == 3  # before it begins, in its wait, and behind the block
    assert len(cut_at) == 2  # soon, and when it was done
    cut_at.clear()
    assert await cancel_sweep(scenario) >= 6
    assert len(cut_at) > 2


async def test_a_step_at_which_something_goes_wrong_is_named() -> None:
    async def scenario() -> None:
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            raise RuntimeError("planted") from None

    with pytest.raises(SweepError, match=r"cancelled at step 3: RuntimeError\('planted'\)"):
        await cancel_sweep(scenario, steps="own")


async def test_a_step_after_which_the_check_fails_is_named() -> None:
    taken = 0

    async def scenario() -> None:
        nonlocal taken
        await trio.lowlevel.checkpoint()
        taken += 1
        await trio.lowlevel.checkpoint()  # planted: a cancellation here loses what was taken
        taken -= 1

    async def check() -> None:
        assert taken == 0, "lost"

    with pytest.raises(SweepError, match=r"cancelled at step 2: .*lost"):
        await cancel_sweep(scenario, check=check, steps="own")


async def test_what_is_left_behind_is_found_at_the_step() -> None:
    left: list[socket.socket] = []

    async def scenario() -> None:
        await trio.lowlevel.checkpoint()
        sock = socket.socket()
        left.append(sock)  # else the garbage collector closes it
        await trio.lowlevel.checkpoint()  # planted: no try/finally
        sock.close()

    with pytest.raises(SweepError, match=r"cancelled at step 2: left behind: descriptor .* a socket"):
        await cancel_sweep(scenario, steps="own")
    for sock in left:
        sock.close()


async def test_a_task_that_is_left_behind_is_found() -> None:
    async with trio.open_nursery() as outer:

        async def scenario() -> None:
            scope = trio.CancelScope()

            async def work() -> None:
                with scope:
                    await trio.sleep_forever()

            outer.start_soon(work, name="planted")
            await trio.lowlevel.checkpoint()
            scope.cancel()

        with pytest.raises(SweepError, match="cancelled at step 0: left behind: task planted"):
            await cancel_sweep(scenario, steps="own")
        outer.cancel_scope.cancel()


async def test_a_swallowed_cancellation_is_found_where_it_hangs(autojump_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True) as scope:  # planted: a shield without a deadline
            scope.deadline = trio.current_time() + 1000  # (so that this test ends)
            if trio.current_effective_deadline() == scope.deadline:
                await trio.sleep(0 if not wait else 1000)
        await trio.lowlevel.checkpoint()

    wait = True
    with pytest.raises(SweepError, match=r"(?s)cancelled at step 2: it hung for 60.0 s at.*scenario"):
        await cancel_sweep(scenario, steps="own")
    assert "the scenario has not ended for 60.0 s" in caplog.text
    wait = False
    assert await cancel_sweep(scenario, steps="own") == 4


async def test_a_check_that_hangs(autojump_clock: Clock) -> None:
    with pytest.raises(SweepError, match=r"cancelled at step 0: the check hung for 5 s"):
        await cancel_sweep(trio.lowlevel.checkpoint, check=trio.sleep_forever, patience=5)


async def test_a_scenario_that_never_ends(autojump_clock: Clock) -> None:
    async def forever() -> None:
        while True:
            await trio.lowlevel.checkpoint()

    with pytest.raises(SweepError, match="did not end within 10 steps"):
        await cancel_sweep(forever, limit=10)


async def test_the_sweep_itself_can_be_cancelled() -> None:
    with trio.CancelScope() as scope:

        async def scenario() -> None:
            scope.cancel()
            await trio.sleep_forever()

        await cancel_sweep(scenario)
    assert scope.cancelled_caught


async def test_an_exit_is_no_finding() -> None:
    async def scenario() -> None:
        raise KeyboardInterrupt

    with pytest.raises(BaseExceptionGroup) as caught:
        await cancel_sweep(scenario)
    assert isinstance(caught.value.exceptions[0], KeyboardInterrupt)


# -- wire_sweep ------------------------------------------------------------------------------------------------------------------


async def exchange(network: MemoryNetwork) -> None:
    """Five bytes there, three back."""
    async with await network.listen_streams("memory://x") as listener:
        client = network.wrap(await network.connect_stream("memory://x"), "client") if network.wrap else None
        server = network.wrap(await listener.accept(), "server") if network.wrap else None
        assert client is not None
        assert server is not None
        try:
            await client.send_all(b"hello")
            data = b""
            while len(data) < 5:
                data += (more := bytes(await server.receive_some()))
                if not more:
                    raise EOFError
            await server.send_all(b"you")
            data = b""
            while len(data) < 3:
                data += (more := bytes(await client.receive_some()))
                if not more:
                    raise EOFError
        finally:
            client.close()  # type: ignore[attr-defined]
            server.close()  # type: ignore[attr-defined]


def note_ends(network: MemoryNetwork) -> list[tuple[str, FaultStream]]:
    """The ends with a cut, which appear in the list when they are made."""
    wrap = network.wrap
    assert wrap is not None
    ends: list[tuple[str, FaultStream]] = []

    def noting(stream: trio.abc.Stream, side: Side) -> trio.abc.Stream:
        wrapped = wrap(stream, side)
        if isinstance(wrapped, FaultStream):
            ends.append((side, wrapped))
        return wrapped

    network.wrap = noting
    return ends


async def test_every_byte_is_cut_both_ways_and_in_both_ways(autojump_clock: Clock) -> None:
    cuts: set[tuple[str, int]] = set()
    checks = 0

    async def scenario(network: MemoryNetwork) -> None:
        ends = note_ends(network)
        try:
            await exchange(network)
        finally:
            cuts.update((side, end.sent) for side, end in ends if end.was_cut)

    async def check(network: MemoryNetwork) -> None:
        nonlocal checks
        checks += 1

    count = await wire_sweep(scenario, check=check, allowed=(EOFError, trio.BrokenResourceError))
    assert cuts == {("client", n) for n in range(6)} | {("server", n) for n in range(4)}
    # 0 to 5 and 0 to 3 bytes, each by EOF and by RST; and before the first byte, instead of at once: nothing follows the last.
    assert count == 2 * (6 + 4) + 2 * 2
    assert checks == count + 2 * 4  # nor is there a cut in the runs that end a series


async def test_every_few_bytes(autojump_clock: Clock) -> None:
    all_of_them = await wire_sweep(exchange, allowed=(EOFError, trio.BrokenResourceError))
    some = await wire_sweep(exchange, allowed=(EOFError, trio.BrokenResourceError), every=3)
    assert 0 < some < all_of_them


async def test_from_some_byte_on(autojump_clock: Clock) -> None:
    cuts: set[tuple[str, int]] = set()

    async def scenario(network: MemoryNetwork) -> None:
        ends = note_ends(network)
        try:
            await exchange(network)
        finally:
            cuts.update((side, end.sent) for side, end in ends if end.was_cut)

    # Nothing follows behind the last byte of either side, so there "next" makes no difference.
    assert await wire_sweep(scenario, allowed=(EOFError, trio.BrokenResourceError), first=2) == 2 * (4 + 2)
    assert cuts == {("client", n) for n in range(2, 6)} | {("server", n) for n in range(2, 4)}


async def test_an_error_that_is_not_allowed_is_found_at_its_byte(autojump_clock: Clock) -> None:
    async def scenario(network: MemoryNetwork) -> None:
        ends = note_ends(network)
        try:
            await exchange(network)
        except trio.BrokenResourceError:
            if [end.sent for side, end in ends if side == "client"] == [3]:
                raise ValueError("planted") from None
            raise

    with pytest.raises(SweepError, match=r"WireCut\(side='client', after=0, how='eof', when='sent'\): BrokenResourceError"):
        await wire_sweep(scenario, allowed=EOFError)
    with pytest.raises(SweepError, match=r"WireCut\(side='client', after=3, how='eof', when='sent'\): ValueError\('planted'\)"):
        await wire_sweep(scenario, allowed=(EOFError, trio.BrokenResourceError))


@asynccontextmanager
async def adding(network: MemoryNetwork) -> AsyncIterator[str]:
    async with Server({"add": lambda x, y: x + y}) as server:
        yield await server.listen("memory://adding")


async def test_a_hang_is_found_at_its_byte(autojump_clock: Clock) -> None:
    """Planted: a client that waits for an answer on a connection whose end it does not look for."""

    async def scenario(network: MemoryNetwork) -> None:
        async with adding(network) as address, rpc(address) as remote:
            try:
                await remote.add(x=1, y=2)
            except CommClosedError as error:
                if "without an answer" in str(error):
                    await trio.sleep_forever()

    with pytest.raises(SweepError, match=r"WireCut\(side='client', after=\d+, how='eof', when='sent'\): it hung for 60.0 s"):
        await wire_sweep(scenario, allowed=ConnectError)


async def test_a_connection_that_is_left_open_is_found(autojump_clock: Clock) -> None:
    async def scenario(network: MemoryNetwork) -> None:
        async with adding(network) as address:
            peer = await ManualPeer.connect(address, network)
            await peer.handshake()
            await peer.aclose()  # planted: not if the handshake fails

    with pytest.raises(SweepError, match=r"'server', after=0, .*left behind: the client end of memory connection 1"):
        await wire_sweep(scenario, allowed=trio.BrokenResourceError)  # as a CommClosedError is, too


async def test_the_check_has_whole_wires(autojump_clock: Clock) -> None:
    good = 0

    async def scenario(network: MemoryNetwork) -> None:
        async with adding(network) as address, rpc(address) as remote:
            await remote.add(x=1, y=2)

    async def check(network: MemoryNetwork) -> None:
        nonlocal good
        async with adding(network) as address, rpc(address) as remote:
            assert await remote.add(x=1, y=2) == 3
            good += 1

    assert await wire_sweep(scenario, check=check, allowed=(ConnectError, CommClosedError), every=25) < good

    async def failing(network: MemoryNetwork) -> None:
        assert good == 0, "planted"

    with pytest.raises(SweepError, match=r"after=0, how='eof', when='sent'.*planted"):
        await wire_sweep(scenario, check=failing, allowed=(ConnectError, CommClosedError))


def test_the_kit_is_quick() -> None:
    """Some hundred cuts of a whole server are a matter of seconds: nothing in them waits for real."""

    async def main() -> int:
        async def scenario(network: MemoryNetwork) -> None:
            async with adding(network) as address, rpc(address) as remote:
                await remote.add(x=1, y=2)

        return await wire_sweep(scenario, allowed=(ConnectError, CommClosedError), every=5)

    assert trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0)) > 100


async def test_a_stream_wrapped_by_hand_is_cut_where_it_says() -> None:
    a, b = memory_stream_pair()
    fault = FaultStream(a, cut_after=2)
    with pytest.raises(trio.BrokenResourceError):
        await fault.send_all(b"abc")
    assert await b.receive_some() == b"ab"


async def test_within_a_memory_network_a_cancel_sweep_sees_its_connections() -> None:
    with memory_network() as network:
        async with await network.listen_streams() as listener:

            async def scenario() -> None:
                stream = await network.connect_stream(listener.address)
                await trio.lowlevel.checkpoint()
                stream.close()
                (await listener.accept()).close()

            with pytest.raises(SweepError, match=r"(?s)cancelled at step 2: left behind: the client end.*the server end"):
                await cancel_sweep(scenario, steps="own")
