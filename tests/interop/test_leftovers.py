"""The watch over every test of this folder must see what is left behind, or it proves nothing."""

from __future__ import annotations

import socket
import threading
from typing import Any

import trio
import trio.testing

from trio_dcore import connect


async def test_a_socket_is_seen(watch: Any) -> None:
    leftovers = watch()
    with socket.socket():
        (target,) = leftovers.found()
        assert "socket" in target
    assert leftovers.found() == []


async def test_a_thread_is_seen(watch: Any) -> None:
    leftovers = watch()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")
    thread.start()
    try:
        assert leftovers.found() == ["forgotten"]
    finally:
        end.set()
        thread.join()
    assert leftovers.found() == []


async def test_a_server_and_its_connection_are_seen(ours: Any, watch: Any, tasks_of_ours: Any) -> None:
    leftovers = watch()
    async with ours() as server:
        listening = leftovers.found()
        tasks = tasks_of_ours()
        assert listening != []
        assert tasks != []
        async with await connect(server.address):
            await trio.testing.wait_all_tasks_blocked()
            assert len(leftovers.found()) == len(listening) + 2  # both ends
            assert len(tasks_of_ours()) > len(tasks)
    assert leftovers.found() == []
    assert tasks_of_ours() == []


async def test_a_stock_server_is_seen(stock: Any, watch: Any) -> None:
    leftovers = watch()
    async with stock.serve():
        assert leftovers.found() != []
    assert leftovers.found() == []
