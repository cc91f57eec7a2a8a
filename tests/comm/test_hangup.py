"""The hang-up watcher: told once, for the right connection, without a busy loop."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from trio_dcore.comm import HangupWatcher

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="EPOLLRDHUP is Linux's")

RST = b"\x01\x00\x00\x00\x00\x00\x00\x00"


class Told:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def watcher() -> Iterator[HangupWatcher]:
    made = HangupWatcher()
    yield made
    made._epoll.close()


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked(0.02)


@pytest.mark.parametrize("how", ["close", "half-close", "reset", "unread bytes"])
async def test_who_hangs_up_is_noticed_once(watcher: HangupWatcher, nursery: trio.Nursery, how: str) -> None:
    nursery.start_soon(watcher.run)
    client, server = connected()
    told = Told()
    watcher.watch(server.fileno(), told)
    client.send(b"a request")
    await settle()
    assert told.count == 0  # bytes alone are none of its business
    match how:
        case "half-close":
            client.shutdown(socket.SHUT_WR)
        case "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
            client.close()
        case "unread bytes":
            server.send(b"never read")
            client.close()
        case _:
            client.close()
    await settle()
    await settle()
    assert told.count == 1
    watcher.forget(server.fileno(), told)
    client.close()
    server.close()
    await settle()
    assert told.count == 1
    nursery.cancel_scope.cancel()


async def test_many_at_once(watcher: HangupWatcher, nursery: trio.Nursery) -> None:
    nursery.start_soon(watcher.run)
    pairs = [connected() for _ in range(150)]
    tolds = [Told() for _ in pairs]
    for (_, server), told in zip(pairs, tolds, strict=True):
        watcher.watch(server.fileno(), told)
    for client, _ in pairs:
        client.close()
    await settle()
    assert [told.count for told in tolds] == [1] * 150
    for _, server in pairs:
        server.close()
    nursery.cancel_scope.cancel()


async def test_a_forgotten_one_is_not_told(watcher: HangupWatcher, nursery: trio.Nursery) -> None:
    nursery.start_soon(watcher.run)
    client, server = connected()
    told = Told()
    watcher.watch(server.fileno(), told)
    watcher.forget(server.fileno(), told)
    watcher.forget(server.fileno(), told)
    client.close()
    await settle()
    assert told.count == 0
    server.close()
    nursery.cancel_scope.cancel()


async def test_forgotten_between_the_event_and_its_delivery(watcher: HangupWatcher, nursery: trio.Nursery) -> None:
    client, server = connected()
    told = Told()
    watcher.watch(server.fileno(), told)
    client.close()
    watcher.forget(server.fileno(), told)
    nursery.start_soon(watcher.run)
    await settle()
    assert told.count == 0
    server.close()
    nursery.cancel_scope.cancel()


async def test_a_number_that_belongs_to_another_connection_by_now(watcher: HangupWatcher, nursery: trio.Nursery) -> None:
    nursery.start_soon(watcher.run)
    old_client, old_server = connected()
    client, server = connected()
    old, new = Told(), Told()
    number = old_server.fileno()
    watcher.watch(number, old)
    old_server.close()  # without a word to the watcher
    os.dup2(server.fileno(), number)
    watcher.watch(number, new)
    watcher.forget(number, old)
    old_client.close()
    await settle()
    assert (old.count, new.count) == (0, 0)
    client.close()
    await settle()
    assert (old.count, new.count) == (0, 1)
    watcher.forget(number, new)
    os.close(number)
    server.close()
    nursery.cancel_scope.cancel()


async def test_a_copy_that_a_forked_child_has(watcher: HangupWatcher, nursery: trio.Nursery) -> None:
    """The kernel goes on telling of a socket that we have closed, under a number that is another connection's by now."""
    nursery.start_soon(watcher.run)
    old_client, old_server = connected()
    client, server = connected()
    old, new = Told(), Told()
    number = old_server.fileno()
    watcher.watch(number, old)
    copy = old_server.dup()
    old_server.close()
    os.dup2(server.fileno(), number)
    watcher.watch(number, new)
    old_client.close()
    await settle()
    assert (old.count, new.count) == (0, 0)
    client.close()
    await settle()
    assert (old.count, new.count) == (0, 1)
    os.close(number)
    server.close()
    copy.close()
    nursery.cancel_scope.cancel()


async def test_closed_before_it_is_forgotten(watcher: HangupWatcher) -> None:
    client, server = connected()
    told = Told()
    number = server.fileno()
    watcher.watch(number, told)
    server.close()
    watcher.forget(number, told)
    client.close()


async def test_an_event_that_nobody_wants_does_not_spin(watcher: HangupWatcher, nursery: trio.Nursery) -> None:
    """Between the closing of a socket and its being forgotten the set may still have it: a forked child has a copy."""
    steps = 0

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            nonlocal steps
            steps += task.name == "watcher"

    nursery.start_soon(watcher.run, name="watcher")
    client, server = connected()
    told = Told()
    watcher.watch(server.fileno(), told)
    del watcher._callbacks[server.fileno()]
    await settle()
    trio.lowlevel.add_instrument(Steps())
    client.close()
    await settle()
    await settle()
    assert steps <= 2
    server.close()
    nursery.cancel_scope.cancel()


async def test_closing_frees_the_set_and_ends_the_task() -> None:
    watcher = HangupWatcher()

    async def run() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await watcher.run()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await settle()
        watcher.close()
