"""Group B: cancelled from outside."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import trio

from tests.reference.kit import Journal, Outcome, Wire, quickest, reference
from trio_dcore import Comm, HandlerCancelled, Server, Status, in_thread, rpc
from trio_dcore.protocol._envelope import KEY, PING, PONG, WINDOW
from trio_dcore.testing import ManualPeer, cancel_sweep


class Scoped:
    """A server whose task, and nothing else, is in a cancel scope.

    Attributes:
        scope: the scope.
        server: the server.
        address: where it listens.
        ended: set when the server is no more.
    """

    def __init__(self, server: Server) -> None:
        self.scope = trio.CancelScope()
        self.server = server
        self.address = ""
        self.ended = trio.Event()

    async def serve(self, wire: Wire, task_status: trio.TaskStatus[None]) -> None:
        """With ``serve()``."""

        async def tell() -> None:
            (self.address,) = await nursery.start(self.server.serve, wire.where)
            task_status.started()

        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tell)
        self.ended.set()

    async def block(self, wire: Wire, task_status: trio.TaskStatus[None]) -> None:
        """With ``async with``."""
        with self.scope:
            async with self.server:
                self.address = await self.server.listen(wire.where)
                task_status.started()
                await trio.sleep_forever()
        self.ended.set()


WAYS: list[Callable[[Scoped, Wire, Any], Any]] = [Scoped.serve, Scoped.block]


@asynccontextmanager
async def scoped(
    way: Callable[[Scoped, Wire, Any], Any], wire: Wire, handlers: dict[str, Any], **options: Any
) -> AsyncIterator[Scoped]:
    this = Scoped(wire.make_server(handlers, **options))
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[None]) -> None:
            await way(this, wire, task_status)

        await nursery.start(run)
        yield this


def cut(outcome: Outcome, reason: str = "server cancelled") -> bool:
    return isinstance(outcome.error, HandlerCancelled) and outcome.error.reason == reason


@reference("B01", "m i t u l")
async def test_b01_cancelled_means_now(wire: Wire) -> None:
    for way in WAYS:
        journal = Journal()
        async with (
            scoped(way, wire, {"work": journal.handler(60, wire)}) as this,
            wire.calling(this.address, journal) as outcome,
        ):
            with wire.now():
                this.scope.cancel()
                await this.ended.wait()
        assert this.scope.cancelled_caught
        assert this.server.status is Status.closed
        assert cut(outcome)
        assert journal.entries == ["started", "cancelled", "finally"]


@reference("B01", "m t u l")
async def test_b01_a_peer_that_talks_without_a_pause(wire: Wire) -> None:
    """What it sends is no news, and always there: a read that need not wait must not keep its handler from being cancelled."""

    async def items() -> AsyncIterator[int]:
        started.set()
        yield 1  # there is no credit for it

    async def reads(comm: Comm) -> None:
        started.set()
        await comm.read()

    async def writes(comm: Comm) -> None:
        started.set()
        while True:  # until nothing goes any more
            await comm.write(bytes(500_000))

    async def talk(peer: ManualPeer, message: tuple[Any, ...]) -> None:
        with trio.move_on_after(5):
            while True:
                try:
                    await peer.send_bytes(peer.encode(message) * 500)
                except trio.BrokenResourceError:
                    break
                await trio.lowlevel.checkpoint()

    for op, window in (("items", (0, 2**30)), ("reads", (1, 1)), ("writes", (1000, 2**30))):
        for message in ((PONG, 1, None), (PING, 1, None), (WINDOW, 1, (0, 0))):
            started = trio.Event()
            async with (
                scoped(Scoped.serve, wire, {"items": items, "reads": reads, "writes": writes}) as this,
                await wire.manual(this.address) as peer,
                trio.open_nursery() as nursery,
            ):
                await peer.handshake(extension=True)
                await peer.send({"op": op, "reply": True, KEY: {"id": 1, "stream": True, "window": window}})
                await started.wait()
                nursery.start_soon(talk, peer, message)
                for _ in range(20):
                    await trio.lowlevel.checkpoint()
                with wire.now():
                    this.scope.cancel()
                    await this.ended.wait()
                nursery.cancel_scope.cancel()
            assert this.scope.cancelled_caught


@reference("B02", "m i t u l")
async def test_b02_drain_on_cancel_delivers_the_reply(wire: Wire) -> None:
    for way in WAYS:
        journal = Journal()
        async with (
            scoped(way, wire, {"work": journal.handler(0.3, wire)}, drain_on_cancel=5) as this,
            wire.calling(this.address, journal) as outcome,
        ):
            with wire.lasts(0.3):
                this.scope.cancel()
                await this.ended.wait()
        assert this.scope.cancelled_caught
        assert outcome.value == "done"
        assert journal.entries == ["started", "ended", "finally"]


@reference("B02", "m i t u l")
async def test_b02_a_stop_does_not_make_the_drain_longer(wire: Wire) -> None:
    # Stopped with much grace, then cancelled: the drain that cancelling allows is all that is left.
    for way in WAYS:
        journal = Journal()
        async with (
            scoped(way, wire, {"work": journal.handler(60, wire)}, drain_on_cancel=0.1) as this,
            wire.calling(this.address, journal) as outcome,
        ):
            this.server.stop(30)
            with wire.takes(0.1):
                this.scope.cancel()
                await this.ended.wait()
        assert cut(outcome)


@reference("B03", "m i t u l")
async def test_b03_drain_on_cancel_has_an_end(wire: Wire) -> None:
    for way in WAYS:
        journal = Journal()
        async with (
            scoped(way, wire, {"work": journal.handler(60, wire)}, drain_on_cancel=0.05) as this,
            wire.calling(this.address, journal) as outcome,
        ):
            with wire.takes(0.05):
                this.scope.cancel()
                await this.ended.wait()
        assert this.scope.cancelled_caught
        assert cut(outcome)
        assert journal.entries == ["started", "cancelled", "finally"]


@reference("B04", "m i t u l")
async def test_b04_the_caller_of_aclose_is_cancelled(wire: Wire) -> None:
    async def close_and_cancel_that() -> float:
        journal = Journal()
        async with (
            wire.server({"work": journal.handler(60, wire)}) as (server, address),
            wire.calling(address, journal) as outcome,
        ):
            with trio.move_on_after(wire.seconds(1)) as scope, wire.lasts(1):
                # The grace is being waited for, and is not over for long.
                await server.aclose(grace=30)
            start = trio.current_time()
            status = server.status
            assert scope.cancelled_caught
            # Raised at once: closing is the serving task's business.
            assert status is Status.closing
            await server.finished()
            took = trio.current_time() - start
        assert server.status is Status.closed
        assert cut(outcome, "grace over")
        assert journal.entries == ["started", "cancelled", "finally"]
        return took

    assert await quickest(close_and_cancel_that, 0.05) < 0.05


@reference("B05", "m i t u l")
async def test_b05_a_sibling_fails(wire: Wire) -> None:
    journal = Journal()
    outcome = Outcome()
    failure = ValueError("a sibling")

    async def client(address: str) -> None:
        async with wire.calling(address, journal) as call:
            pass
        outcome.error = call.error
        done.set()

    async def fail() -> None:
        raise failure

    done = trio.Event()
    server = wire.make_server({"work": journal.handler(60, wire)})

    async def serve_beside_failure() -> None:
        async with trio.open_nursery() as nursery:
            (address,) = await nursery.start(server.serve, wire.where)
            outside.start_soon(client, address)
            await journal.started()
            nursery.start_soon(fail)

    async with trio.open_nursery() as outside:
        with wire.now(), pytest.raises(ExceptionGroup) as caught:
            await serve_beside_failure()
        assert caught.value.exceptions == (failure,)
        assert server.status is Status.closed
        await done.wait()
    assert cut(outcome)
    assert journal.entries == ["started", "cancelled", "finally"]


@reference("B05", "m i t u l")
async def test_b05_the_block_of_the_server_fails(wire: Wire) -> None:
    journal = Journal()
    failure = ValueError("in the block")
    outcome = Outcome()

    async def in_block(server: Server) -> None:
        async with server:
            address = await server.listen(wire.where)
            remote = wire.client(address)
            nursery.start_soon(outcome.of, remote.work)
            await journal.started()
            remotes.append(remote)
            raise failure

    remotes: list[rpc] = []
    async with trio.open_nursery() as nursery:
        with wire.now(), pytest.raises(ValueError, match="in the block") as caught:
            await in_block(wire.make_server({"work": journal.handler(60, wire)}))
        # The very one, and no group of one.
        assert caught.value is failure
        await outcome.ended()
        remotes[0].close_comms()
    assert cut(outcome)
    assert journal.entries == ["started", "cancelled", "finally"]


@reference("B06", "m i t u l")
async def test_b06_bounded_cleanup_is_waited_for(wire: Wire) -> None:
    for needs, ends in ((0.1, "cleaned up"), (60, "left it")):
        journal = Journal()
        work = journal.handler(60, wire)

        async def tidy(work: Any = work, journal: Journal = journal, needs: float = needs) -> None:
            try:
                await work()
            finally:
                with trio.move_on_after(0.2, shield=True) as shield:
                    await trio.sleep(needs)
                journal("left it" if shield.cancelled_caught else "cleaned up")

        async with (
            scoped(Scoped.serve, wire, {"work": tidy}) as this,
            wire.calling(this.address, journal) as outcome,
        ):
            with wire.takes(min(needs, 0.2)):
                this.scope.cancel()
                await this.ended.wait()
                assert journal.entries == ["started", "cancelled", "finally", ends]
        assert cut(outcome)


@reference("B07", "m", real=True, quiet=False)
async def test_b07_what_does_not_end_is_named_every_second(wire: Wire) -> None:
    journal = Journal()

    async def stubborn() -> None:
        with trio.CancelScope(shield=True):
            await journal.handler(30, wire)()  # three seconds

    async def busy_below() -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stubborn)
        return "done at last"

    async with (
        wire.server({"work": busy_below}, name="a server") as (server, address),
        wire.calling(address, journal) as outcome,
    ):
        with wire.takes(3):
            server.stop(0)
            await server.finished()
    # Waited for, never abandoned.  What is shielded to its end has not been cut, so its answer stands.
    assert journal.entries == ["started", "ended", "finally"]
    assert outcome.value == "done at last"
    loud = wire.loud()
    assert {record.levelno for record in loud} == {logging.WARNING}
    texts = [record.getMessage() for record in loud]
    for what in ("stubborn", "connection from memory://"):
        about = [record.created for record, text in zip(loud, texts, strict=True) if what in text.partition("\n")[0]]
        assert 2 <= len(about) <= 3
        assert all(later - earlier >= 0.95 for earlier, later in pairwise(about))
    # Whose it is, what it is, and the line where it waits, in the handler's own code.
    assert all(text.startswith("a server waits for a task that does not end: ") for text in texts)
    assert any("in busy_below" in text and __file__ in text for text in texts)
    assert any("await journal.handler(30, wire)()" in text for text in texts)


@reference("B08", "m i t u l")
async def test_b08_a_handler_that_swallows_cancelled(wire: Wire) -> None:
    journal = Journal()

    async def swallow() -> str:
        for _ in range(3):
            try:
                await journal.handler(10, wire)()
            except wire.cancelled:
                journal("swallowed")
        return "a result of nothing"

    async with wire.server({"work": swallow}) as (server, address), wire.calling(address, journal) as outcome:
        # Cancellation is a state, not an event: the second and the third await meet it as well.
        with wire.now():
            server.stop(0)
            await server.finished()
    assert cut(outcome, "grace over")
    assert journal.entries == ["started", "cancelled", "finally", "swallowed"] * 3


@reference("B09", "m", real=True)
async def test_b09_a_thread_is_waited_for(wire: Wire) -> None:
    def block() -> str:
        trio.from_thread.run_sync(journal, "started")
        trio.from_thread.run_sync(started.set)
        time.sleep(0.5)
        return "done"

    async def work() -> str:
        try:
            return await trio.to_thread.run_sync(block)
        finally:
            journal("finally")

    for handler, entries in ((work, ["started", "finally"]), (in_thread(block), ["started"])):
        journal = Journal()
        started = trio.Event()
        outcome = Outcome()
        async with (
            wire.server({"work": handler}) as (server, address),
            wire.client(address) as remote,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(outcome.of, remote.work)
            await started.wait()
            with wire.takes(0.5):
                server.stop(0)
                await server.finished()
            await outcome.ended()
        assert journal.entries == entries
        assert outcome.value == "done"  # nothing has cut it


@reference("B02", "m i t u l")
async def test_b02_cancelled_while_it_drains_already(wire: Wire) -> None:
    """Outside cancellation counts whenever it comes: drain_on_cancel replaces what is left of a longer grace, even an endless one."""
    journal = Journal()
    async with trio.open_nursery() as nursery:
        server = wire.make_server({"work": journal.handler(1000, wire)}, drain_on_cancel=wire.seconds(0.5))
        with trio.CancelScope() as scope:
            reasons: list[str] = []

            async def call(address: str) -> None:
                async with wire.client(address) as remote:
                    try:
                        await remote.work()
                    except HandlerCancelled as error:
                        reasons.append(error.reason)

            async with server:
                nursery.start_soon(call, await server.listen(wire.where))
                await journal.started()
                server.stop(math.inf)
                await trio.sleep(wire.seconds(1))
                scope.cancel()
                with wire.lasts(0.5):
                    with trio.CancelScope(shield=True):
                        await server.finished()
        assert scope.cancelled_caught
    assert reasons == ["server cancelled"]
    assert journal.entries == ["started", "cancelled", "finally"]


@reference("B01", "m i t u l")
async def test_b01_cancelled_in_its_grace(wire: Wire) -> None:
    """Without drain_on_cancel it means now, also in a long grace, and the caller is told the truth about why."""
    journal = Journal()
    reasons: list[str] = []
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with wire.make_server({"work": journal.handler(1000, wire)}) as server:

                async def call(address: str) -> None:
                    async with wire.client(address) as remote:
                        try:
                            await remote.work()
                        except HandlerCancelled as error:
                            reasons.append(error.reason)

                nursery.start_soon(call, await server.listen(wire.where))
                await journal.started()
                server.stop(wire.seconds(600))
                with wire.now():
                    scope.cancel()
                    with trio.CancelScope(shield=True):
                        await server.finished()
        assert scope.cancelled_caught
    assert reasons == ["server cancelled"]
    assert journal.entries == ["started", "cancelled", "finally"]


@reference("B03", "m i t u l")
async def test_b03_started_in_a_cancelled_scope(wire: Wire) -> None:
    """The shield of drain_on_cancel never stands without a deadline, so a server that is cancelled while it starts ends at once."""
    for _ in range(2):
        with wire.now(), trio.CancelScope() as scope:
            scope.cancel()
            async with wire.make_server(drain_on_cancel=wire.seconds(60)) as server:
                await server.listen(wire.where)
        assert scope.cancelled_caught

    async def life() -> None:
        async with wire.make_server({"echo": lambda data: data}, drain_on_cancel=wire.seconds(60)) as server:
            address = await server.listen(wire.where)
            async with wire.client(address) as remote:
                assert await remote.echo(data=1) == 1

    assert await cancel_sweep(life) > 3


@reference("B02", "m i t u l")
async def test_b02_a_caller_that_leaves_meanwhile_is_noticed(wire: Wire) -> None:
    """Rule 6 holds during drain_on_cancel, too: the server ends when the last caller has gone."""
    journal = Journal()
    async with trio.open_nursery() as nursery:
        leave = trio.CancelScope()

        async def call(address: str) -> None:
            with leave:
                async with wire.client(address) as remote:
                    await remote.work()

        with trio.CancelScope() as scope:
            async with wire.make_server({"work": journal.handler(1000, wire)}, drain_on_cancel=wire.seconds(600)) as server:
                nursery.start_soon(call, await server.listen(wire.where))
                await journal.started()
                scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.sleep(wire.seconds(1))
                    leave.cancel()
                    with wire.now():
                        await server.finished()
    assert journal.entries == ["started", "cancelled", "finally"]
