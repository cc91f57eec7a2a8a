"""Each kind of leak is found where there is one, and nothing is found where there is none."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from trio_dcore import Server, rpc
from trio_dcore.testing import FaultStream, LeakError, memory_network, memory_stream_pair, no_leaks

posix = pytest.mark.skipif(os.name == "nt", reason="descriptors can't be listed there")


# -- nothing is there ------------------------------------------------------------------------------------------------------------


async def test_a_clean_block() -> None:
    async with no_leaks():
        async with Server({"add": lambda x: x + 1}) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
            assert await remote.add(x=1) == 2
        await trio.to_thread.run_sync(int)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.checkpoint)


def test_a_clean_run() -> None:
    with no_leaks():
        trio.run(test_a_clean_block)


async def test_what_was_there_before_may_stay() -> None:
    with socket.socket():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            async with no_leaks():
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


async def test_tasks_that_are_about_to_end_get_their_time() -> None:
    async with trio.open_nursery() as nursery, no_leaks():
        nursery.start_soon(trio.sleep_forever)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_the_kits_own_timers_do_not_count() -> None:
    async with no_leaks():
        stream = FaultStream(memory_stream_pair()[0], timeout=1000)
        stream.close()


@posix
async def test_a_descriptor_that_another_took_the_place_of(tmp_path: Path) -> None:
    files = [(tmp_path / "file").open("w")]
    sock = socket.socket()
    async with no_leaks():
        files.append((tmp_path / "file").open("w"))
        files.pop(0).close()
        sock.close()
        sock = socket.socket(type=socket.SOCK_DGRAM)
    files[0].close()
    sock.close()


async def test_what_is_there_again_is_no_leak() -> None:
    """A connection that was made anew, over memory and sockets, with the server's task for it."""
    with memory_network():
        for where in ("memory://", "tcp://127.0.0.1:0"):
            async with Server({"quick": int}) as server, rpc(await server.listen(where)) as remote:
                await remote.quick()
                async with no_leaks():
                    remote.pool.collect()
                    await remote.quick()


# -- something is ----------------------------------------------------------------------------------------------------------------


async def leaks(block: Callable[[], Awaitable[object]], what: str) -> None:
    with pytest.raises(LeakError, match=what):
        async with no_leaks():
            await block()


@pytest.mark.parametrize("name", ["own", "trio's"])
async def test_a_task(name: str) -> None:
    async def left_behind() -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:

        async def block() -> None:
            nursery.start_soon(left_behind if name == "own" else trio.sleep_forever)

        await leaks(block, "task .*left_behind" if name == "own" else "task trio.sleep_forever")
        nursery.cancel_scope.cancel()


async def test_two_tasks_of_one_name() -> None:
    async with trio.open_nursery() as nursery:

        async def block() -> None:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)

        nursery.start_soon(trio.sleep_forever)
        await leaks(block, "left behind: task trio.sleep_forever\nleft behind: task trio.sleep_forever$")
        nursery.cancel_scope.cancel()


async def test_a_system_task() -> None:
    scope = trio.CancelScope()

    async def stray() -> None:
        with scope:
            await trio.sleep_forever()

    async def block() -> None:
        trio.lowlevel.spawn_system_task(stray)

    await leaks(block, "task .*stray")
    scope.cancel()


@posix
async def test_a_listening_socket() -> None:
    found: list[socket.socket] = []

    async def listen() -> None:
        found.append(socket.create_server(("127.0.0.1", 0)))

    await leaks(listen, r"descriptor \d+, a listening socket at \('127.0.0.1', \d+\)")
    found[0].close()


@posix
async def test_a_connected_socket() -> None:
    found: list[socket.socket] = []

    async def connect() -> None:
        found.extend(socket.socketpair())

    await leaks(connect, "descriptor .* a socket")
    for sock in found:
        sock.close()


@posix
async def test_a_pipe_and_a_file(tmp_path: Path) -> None:
    found: list[int] = []

    async def pipe() -> None:
        found.extend(os.pipe())

    async def file() -> None:
        found.append(os.open(tmp_path / "some.txt", os.O_CREAT))

    await leaks(pipe, r"left behind: descriptor \d+.*\n.*left behind: descriptor \d+")
    await leaks(file, "some.txt" if sys.platform == "linux" else "descriptor")
    for number in found:
        os.close(number)


async def test_a_connection_in_memory() -> None:
    with memory_network() as network:
        async with await network.listen_streams() as listener:

            async def block() -> None:
                await network.connect_stream(listener.address)

            await leaks(block, "the client end of memory connection 1\n.*the server end of memory connection 1")


async def test_a_thread() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")

    async def block() -> None:
        thread.start()

    try:
        await leaks(block, "thread forgotten")
    finally:
        end.set()
        thread.join()


def test_an_asyncio_task() -> None:
    async def main() -> None:
        with pytest.raises(LeakError, match="asyncio task forgotten"), no_leaks():
            task = asyncio.create_task(asyncio.sleep(1000), name="forgotten")
        task.cancel()
        await asyncio.wait([task])
        with no_leaks():
            await asyncio.create_task(asyncio.sleep(0))

    asyncio.run(main())


async def test_a_resource_warning() -> None:
    async def block() -> None:
        socket.socket()  # closed by the garbage collector, which warns

    await leaks(block, "ResourceWarning: unclosed <socket")


class Bad:
    def __del__(self) -> None:
        raise ValueError("in a finalizer")


async def test_an_exception_that_nobody_could_see() -> None:
    async def block() -> None:
        cycle = [Bad()]
        cycle.append(cycle)  # type: ignore[arg-type]  # found by no_leaks' own collection

    await leaks(block, "nobody could see: ValueError.'in a finalizer'.")


async def test_other_warnings_are_what_they_would_be_without_it() -> None:
    async def block() -> None:
        async with no_leaks():
            warnings.warn("something else", DeprecationWarning, stacklevel=1)

    with pytest.raises(DeprecationWarning):  # as an error, which is what these tests are run with
        await block()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await block()
    assert [str(warning.message) for warning in caught] == ["something else"]


async def test_all_leaks_are_listed() -> None:
    pair: list[socket.socket] = []
    async with trio.open_nursery() as nursery:

        async def block() -> None:
            nursery.start_soon(trio.sleep_forever, name="stays")
            pair.extend(socket.socketpair())
            socket.socket()

        with pytest.raises(LeakError) as caught:
            async with no_leaks():
                await block()
        nursery.cancel_scope.cancel()
    for sock in pair:
        sock.close()
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 if os.name != "nt" else 2
    assert lines[0] == "left behind: task stays"
    assert lines[-1].startswith("ResourceWarning")


# -- with errors -----------------------------------------------------------------------------------------------------------------


async def test_an_error_goes_on_with_a_note_of_what_nobody_could_see() -> None:
    async with trio.open_nursery() as nursery:

        async def block() -> None:
            async with no_leaks():
                nursery.start_soon(trio.sleep_forever)
                Bad()
                raise KeyError("first")

        with pytest.raises(KeyError) as caught:
            await block()
        nursery.cancel_scope.cancel()
    (note,) = caught.value.__notes__
    assert "in a finalizer" in note
    assert "sleep_forever" not in note


async def test_everything_is_as_before_afterwards() -> None:
    hook, filters = sys.unraisablehook, list(warnings.filters)
    async with no_leaks():
        assert sys.unraisablehook is not hook
    assert sys.unraisablehook is hook
    assert warnings.filters == filters
    error = KeyError("x")
    with pytest.raises(KeyError) as caught:
        async with no_leaks():
            raise error
    assert caught.value is error
    assert sys.unraisablehook is hook
    assert warnings.filters == filters
