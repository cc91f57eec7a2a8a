"""Group E: peers that are killed, that half-close, that fall silent, and wires with every fault."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.reference.kit import Journal, Outcome, Wire, quickest, reference
from trio_dcore import CommClosedError, ConnectError, Limits, run_to_end
from trio_dcore.testing import FaultStream, ManualPeer

#: For times that are asserted: pings after 0.1 s of silence, and 0.3 s more.
SOON = Limits(ping_interval=0.1, ping_timeout=0.3)


async def connected(wire: Wire, address: str) -> ManualPeer:
    peer = await wire.manual(address)
    await peer.handshake()
    return peer


@reference("E01", "t u l")
async def test_e01_peer_killed_in_the_middle_of_a_call(wire: Wire) -> None:
    journal = Journal()

    async def once() -> float:
        journal.clear()
        async with wire.server({"work": journal.handler(60, wire)}) as (_, address):
            peer = await connected(wire, address)
            await peer.send({"op": "work", "reply": True})
            await journal.started()
            reset_at = trio.current_time()
            peer.reset()
            await journal.ended()
            assert journal.entries == ["started", "cancelled", "finally"]
            await peer.aclose()
            return trio.current_time() - reset_at

    assert await quickest(once, 0.1) < 0.1


@reference("E02", "t u l")
async def test_e02_a_client_that_half_closes(wire: Wire) -> None:
    plain, to_end = Journal(), Journal()
    handlers = {"plain": plain.handler(60, wire), "to_end": run_to_end(to_end.handler(0.3, wire))}
    async with wire.server(handlers) as (_, address):
        for op, journal in (("plain", plain), ("to_end", to_end)):
            async with await connected(wire, address) as peer:
                await peer.send({"op": op, "reply": True})
                await journal.started()
                stream: Any = peer.stream
                await getattr(stream, "transport_stream", stream).send_eof()
                if journal is to_end:
                    assert await peer.receive() == "done"
                await journal.ended()
    assert plain.entries == ["started", "cancelled", "finally"]
    assert to_end.entries == ["started", "ended", "finally"]


@reference("E03", "t u l")
async def test_e03_server_killed_in_the_middle_of_a_call(wire: Wire) -> None:
    async def once() -> float:
        killed_at = 0.0

        async def script(peer: ManualPeer) -> None:
            nonlocal killed_at
            await peer.handshake(extension=True)
            assert (await peer.receive())["op"] == "work"
            killed_at = trio.current_time()
            peer.reset()

        async with wire.scripted(script) as address, wire.client(address) as remote:
            with pytest.raises(CommClosedError, match=f"'work' at {address}"):
                await remote.work()
            assert remote.pool.open == 0
            return trio.current_time() - killed_at

    assert await quickest(once, 0.1) < 0.1


@reference("E04", "m t u l")
async def test_e04_a_black_hole_is_noticed_by_both_sides(wire: Wire) -> None:
    journal = Journal()
    async with wire.server({"work": journal.handler(600, wire)}, limits=SOON) as (_, address), wire.relay(address) as relay:
        async with wire.client(relay.address, limits=SOON) as remote, trio.open_nursery() as nursery:
            outcome = Outcome()
            nursery.start_soon(outcome.of, remote.work)
            await journal.started()
            began = trio.current_time()
            relay.stall()
            await outcome.ended()
            await journal.ended()
            assert isinstance(outcome.error, CommClosedError)
            assert f"'work' at {relay.address}" in str(outcome.error)
            assert "Limits.ping_timeout" in str(outcome.error)
            for ended in (outcome.at, trio.current_time()):
                assert 0.29 < ended - began < (0.6 if wire.transport == "m" else 2.5)
    assert journal.entries == ["started", "cancelled", "finally"]


@reference("E04", "m t u l")
async def test_e04_who_only_takes_long_is_not_taken_for_dead(wire: Wire) -> None:
    journal = Journal()
    async with wire.server({"work": journal.handler(2, wire)}, limits=SOON) as (_, address):
        async with wire.client(address, limits=SOON) as remote:
            assert await remote.work() == "done"
            assert remote.pool.open == 1


#: What is between client and server, and whether the call gets through.
TOXICS: list[tuple[dict[str, Any], bool]] = [
    ({"latency": 0.02}, True),
    ({"bandwidth": 50_000.0}, True),
    ({"slow_close": 0.2}, True),
    ({"slicer": 1}, True),
    ({"timeout": 0.2}, False),
    ({"reset_peer": 0.2}, False),
    ({"limit_data": 50}, False),
    ({"limit_data": 350}, False),
    ({"down": True}, False),
]


@reference("E06", "m t")
async def test_e06_each_toxic_has_its_outcome(wire: Wire) -> None:
    async def work(data: bytes) -> int:
        await trio.sleep(0.4)
        return len(data)

    for toxic, through in TOXICS:
        async with wire.server({"work": work}) as (server, address), wire.relay(address) as relay:
            relay.wrap = lambda stream, side, toxic=toxic: FaultStream(stream, **toxic) if side == "server" else stream
            async with wire.client(relay.address, timeout=1.0) as remote:
                with trio.fail_after(20):
                    if through:
                        assert await remote.work(data=bytes(1000)) == 1000, toxic
                    else:
                        with pytest.raises((CommClosedError, ConnectError)):
                            await remote.work(data=bytes(1000))
                        assert remote.pool.open == 0, toxic
            # The server is none the worse for it.
            async with wire.client(address) as remote:
                assert await remote.echo(data=1) == 1, toxic
                assert server.statistics().in_flight <= 1
