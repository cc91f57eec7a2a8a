"""Group A: stopping in order."""

from __future__ import annotations

import trio

from tests.reference.kit import Journal, Wire, reference
from trio_dcore import HandlerCancelled


@reference("A02", "m i t u l")
async def test_a02_reply_delivered_within_grace(wire: Wire) -> None:
    journal = Journal()
    results = []
    async with wire.server({"work": journal.handler(0.3, wire)}) as (server, address):

        async def call() -> None:
            async with wire.client(address) as remote:
                results.append(await remote.work())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await journal.started()
            with wire.lasts(0.3):
                server.stop(grace=wire.seconds(5))
                await server.finished()
    assert results == ["done"]
    assert journal.entries == ["started", "ended", "finally"]


@reference("A03", "m i t u l")
async def test_a03_cancelled_when_grace_is_over(wire: Wire) -> None:
    journal = Journal()
    reasons = []
    async with wire.server({"work": journal.handler(60, wire)}) as (server, address):

        async def call() -> None:
            async with wire.client(address) as remote:
                try:
                    await remote.work()
                except HandlerCancelled as error:
                    reasons.append(error.reason)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await journal.started()
            with wire.lasts(1):
                server.stop(grace=wire.seconds(1))
                await server.finished()
    assert reasons == ["grace over"]
    assert journal.entries == ["started", "cancelled", "finally"]
