"""trio_dcore.aio._portal and _guest: the trio run of an event loop, how it begins and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import trio

from tests.aio.running import Runner, new_loop, run_plainly
from trio_dcore import aio
from trio_dcore.aio import PortalClosed, open_trio
from trio_dcore.aio._guest import HOLDER_NAME, acquire_portal
from trio_dcore.testing import no_leaks


async def double(x: int) -> int:
    await trio.lowlevel.checkpoint()
    return 2 * x


def holders() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name() == HOLDER_NAME]


def trio_runs() -> bool:
    return trio.lowlevel.in_trio_run()


async def run_ended() -> None:
    """Wait until a run that nobody needs any more has ended, and its task."""
    while trio_runs() or holders():  # noqa: ASYNC110  # there is no event
        await asyncio.sleep(0)


# -- open_trio -------------------------------------------------------------------------------------------------------------------------


def test_the_run_lasts_as_long_as_the_block(run: Runner) -> None:
    async def main() -> None:
        for _ in range(3):
            assert not trio_runs()
            async with open_trio() as portal:
                assert trio_runs()
                assert await portal.run(double, 1) == 2
                assert holders() == []
                assert not portal.closed
            assert not trio_runs()
            assert portal.closed

    run(main)


def test_an_error_of_the_block_goes_on(run: Runner) -> None:
    async def main() -> None:
        with pytest.raises(KeyError):
            async with open_trio():
                raise KeyError
        assert not trio_runs()

    run(main)


def test_asyncio_code_may_call_trios_synchronous_functions(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:
            event = trio.Event()
            waiting = asyncio.create_task(portal.run(event.wait))
            for _ in range(10):
                await asyncio.sleep(0)
            assert not waiting.done()
            event.set()
            await waiting
            before = trio.current_time()
            await portal.run(trio.sleep, 0.02)
            assert trio.current_time() - before >= 0.02

    run(main)


def test_blocks_inside_of_blocks_have_their_own_nursery(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as outer:
            left = asyncio.create_task(outer.run(trio.sleep_forever))
            async with open_trio() as inner:
                assert inner is not outer
                assert await inner.run(double, 2) == 4
                cut = asyncio.create_task(inner.run(trio.sleep_forever))
                await asyncio.sleep(0)
            with pytest.raises(PortalClosed):
                await cut
            with pytest.raises(PortalClosed):
                await inner.run(double, 1)
            assert not left.done()
            assert await outer.run(double, 3) == 6
        with pytest.raises(PortalClosed):
            await left
        # The inner one may outlive the outer one; then it is closed.
        stack = [open_trio(), open_trio()]
        outer, inner = [await each.__aenter__() for each in stack]
        await stack[0].__aexit__(None, None, None)
        with pytest.raises(PortalClosed):
            await inner.run(double, 1)
        await stack[1].__aexit__(None, None, None)
        assert not trio_runs()

    run(main)


def test_blocks_of_tasks_of_their_own_end_in_any_order(run: Runner) -> None:
    async def block(begun: asyncio.Event, leave: asyncio.Event) -> None:
        async with open_trio() as portal, aio.Server() as server, aio.rpc(await server.listen("inproc://")) as remote:
            waiting = asyncio.create_task(portal.run(trio.sleep_forever))
            begun.set()
            await leave.wait()
            assert await portal.run(double, 1) == 2
            assert await remote.echo(data=1) == 1
            assert not waiting.done()
        with pytest.raises(PortalClosed):
            await waiting

    async def main() -> None:
        for order in ((0, 1, 2), (2, 0, 1)):
            events = [(asyncio.Event(), asyncio.Event()) for _ in range(3)]
            tasks = [asyncio.create_task(block(*each)) for each in events]
            for begun, _ in events:
                await begun.wait()
            assert holders() == []
            for n in order:
                assert trio_runs()
                events[n][1].set()
                await tasks[n]
            assert not trio_runs()

    run(main)


def test_what_others_use_goes_on_after_the_block(run: Runner) -> None:
    async def others(may_begin: asyncio.Event, begun: asyncio.Event, left: asyncio.Event) -> None:
        await may_begin.wait()
        async with aio.Server() as server, aio.rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
            assert await remote.echo(data=1) == 1
            begun.set()
            await left.wait()
            assert await remote.echo(data=2) == 2
        assert not trio_runs()

    async def main() -> None:
        events = [asyncio.Event() for _ in range(3)]
        task = asyncio.create_task(others(*events))
        async with open_trio():
            events[0].set()
            await events[1].wait()
        events[2].set()
        await task

    run(main)


def test_a_pool_belongs_to_where_it_was_made(run: Runner) -> None:
    async def main() -> None:
        async with aio.Server() as server:
            address = await server.listen("inproc://")
            shared = aio.rpc(address)
            async with open_trio():
                assert await shared.echo(data=1) == 1
                own = aio.rpc(address)
            async with open_trio():
                assert await shared.echo(data=2) == 2
            assert await own.echo(data=3) == 3  # that block had no use for it
            await own.close_rpc()
            await shared.close_rpc()

    run(main)


def test_a_block_in_a_run_that_asyncio_run_ends(run: Runner) -> None:
    """Its task is cancelled as the one that stands for the run, and is waited for."""
    log: list[object] = []

    async def block(portal_there: asyncio.Event) -> None:
        async with open_trio() as portal:
            portal_there.set()
            try:
                await portal.run(trio.sleep_forever)
            finally:
                log.append(await portal.run(double, 1))

    async def main() -> None:
        await aio.Server()
        portal_there = asyncio.Event()
        log.append(asyncio.create_task(block(portal_there)))
        await portal_there.wait()

    run(main)
    assert log[1:] == [2]
    assert not trio_runs()


def test_cancelled_while_the_block_is_left(run: Runner) -> None:
    log: list[str] = []
    cleaning = asyncio.Event()

    async def slow() -> None:
        try:
            await trio.sleep_forever()
        finally:
            cleaning.set()
            with trio.move_on_after(0.05, shield=True):
                await trio.sleep_forever()
            log.append("clean")

    async def main() -> None:
        async def block() -> None:
            async with open_trio() as portal:
                calls.append(asyncio.create_task(portal.run(slow)))
                await asyncio.sleep(0.01)

        calls: list[asyncio.Task[None]] = []
        task = asyncio.create_task(block())
        await cleaning.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["clean"]
        assert not trio_runs()
        with pytest.raises(PortalClosed):
            await calls[0]

    run(main)


def test_cancelled_while_an_inner_block_is_entered(run: Runner) -> None:
    async def main() -> None:
        async with open_trio() as portal:

            async def enter() -> None:
                async with open_trio():
                    raise AssertionError

            task = asyncio.create_task(enter())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not portal.used

    run(main)


def test_a_portal_is_for_one_loop(run: Runner) -> None:
    async def elsewhere(portal: aio.Portal) -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await portal.run(double, 1)

    async def main() -> None:
        async with open_trio() as portal:
            await asyncio.to_thread(run_plainly, elsewhere(portal))
            await asyncio.get_running_loop().shutdown_default_executor()

    run(main)


def test_a_trio_run_that_breaks_down_is_told(run: Runner) -> None:
    async def crash() -> None:
        raise KeyError("system task")

    async def start_crash() -> None:
        trio.lowlevel.spawn_system_task(crash)

    async def main() -> None:
        with pytest.raises(trio.TrioInternalError):
            async with open_trio() as portal:
                server = await aio.Server()
                comm = await aio.connect(await server.listen("tcp://127.0.0.1:0"))
                calls = [asyncio.create_task(portal.run(trio.sleep_forever)) for _ in range(2)]
                await portal.run(start_crash)
                for call in calls:
                    with pytest.raises(PortalClosed):
                        await call
                with pytest.raises(PortalClosed):
                    await portal.run(double, 1)
        assert not trio_runs()
        assert comm.closed()
        await server.finished()
        async with open_trio() as portal:
            assert await portal.run(double, 1) == 2

    run(main)


def test_blocks_in_a_run_that_breaks_down_end(run: Runner) -> None:
    async def crash() -> None:
        raise KeyError("system task")

    async def start_crash() -> None:
        trio.lowlevel.spawn_system_task(crash)

    async def block(begun: asyncio.Event) -> None:
        async with open_trio() as outer, open_trio() as inner:
            calls = [asyncio.create_task(portal.run(trio.sleep_forever)) for portal in (outer, inner)]
            begun.set()
            for call in calls:
                with pytest.raises(PortalClosed):
                    await call

    async def main() -> None:
        begun = [asyncio.Event() for _ in range(2)]
        blocks = [asyncio.create_task(block(event)) for event in begun]
        for event in begun:
            await event.wait()
        with pytest.raises(trio.TrioInternalError):
            async with open_trio() as portal:
                with pytest.raises(PortalClosed):
                    await portal.run(start_crash)
                    await portal.run(trio.sleep_forever)
        for each in blocks:
            with pytest.raises(trio.TrioInternalError):
                await each
        assert not trio_runs()

    run(main)


def test_what_was_made_outside_of_blocks_is_closed_when_the_run_breaks_down(run: Runner) -> None:
    async def crash() -> None:
        raise KeyError("system task")

    async def start_crash() -> None:
        trio.lowlevel.spawn_system_task(crash)

    async def main() -> None:
        server = await aio.Server()
        comm = await aio.connect(await server.listen("tcp://127.0.0.1:0"))
        (holder,) = [task for task in asyncio.all_tasks() if task.get_name() == HOLDER_NAME]
        await comm.portal.run(start_crash)
        with pytest.raises(trio.TrioInternalError):
            await holder
        assert comm.closed()
        await server.finished()

    run(main)


# -- without a block -------------------------------------------------------------------------------------------------------------------


def test_the_run_lasts_as_long_as_somebody_needs_it(run: Runner) -> None:
    async def main() -> None:
        async with aio.Server() as server:
            assert holders() == [HOLDER_NAME]
            address = await server.listen("inproc://")
            async with aio.rpc(address) as remote:
                assert await remote.echo(data=1) == 1
            comm = await aio.connect(address)
            assert holders() == [HOLDER_NAME]
        assert holders() == [HOLDER_NAME]
        await comm.close()
        assert holders() == []
        assert not trio_runs()
        async with aio.Server() as server:  # another one
            assert trio_runs()
        assert not trio_runs()

    run(main)


def test_what_is_closed_synchronously_ends_it_soon(run: Runner) -> None:
    async def main() -> None:
        async with aio.Server() as server:
            address = await server.listen("tcp://127.0.0.1:0")
            remote = aio.rpc(address)
            assert await remote.echo(data=1) == 1
        remote.close_comms()
        assert trio_runs()
        # Another use, before it has ended, and while it ends.
        for n in range(12):
            for _ in range(n):
                await asyncio.sleep(0)
            async with aio.Server() as server:
                comm = await aio.connect(await server.listen("inproc://"))
            comm.abort()
        await run_ended()

    run(main)


def test_a_block_where_there_is_a_run_already(run: Runner) -> None:
    async def main() -> None:
        async with aio.Server() as server:
            async with open_trio() as portal:
                assert await portal.run(double, 1) == 2
            assert await server.rpc(await server.listen("inproc://")).echo(data=3) == 3
        assert not trio_runs()

    run(main)


def test_the_end_of_the_block_closes_what_was_made_inside(run: Runner) -> None:
    async def main() -> None:
        async with open_trio():
            server = await aio.Server({"wait": wait})
            address = await server.listen("tcp://127.0.0.1:0")
            comm = await aio.connect(address)
            remote = aio.rpc(address)
            call = asyncio.create_task(remote.wait())
            await begun.wait()
        with pytest.raises((PortalClosed, aio.RPCClosed, aio.CommClosedError)):
            await call
        assert comm.closed()
        assert server.status is aio.Status.closed
        await server.finished()
        await server.close()
        await comm.close()
        with pytest.raises(aio.RPCClosed):
            await remote.echo()
        await remote.close_rpc()
        remote.close_comms()

    async def wait() -> None:
        begun.set()
        await asyncio.sleep(3600)

    begun = asyncio.Event()
    run(main)


def test_asyncio_run_ends_what_nobody_closed(run: Runner, recwarn: pytest.WarningsRecorder) -> None:
    kept: list[Any] = []
    log: list[str] = []

    async def last_words(remote: aio.rpc) -> None:
        try:
            begun.set()
            await asyncio.sleep(3600)
        finally:
            log.append(await remote.echo(data="good bye"))

    async def main() -> None:
        server = await aio.Server()
        address = await server.listen("tcp://127.0.0.1:0")
        remote = aio.rpc(address)
        kept.extend([server, remote, await aio.connect(address), asyncio.create_task(last_words(remote))])
        await begun.wait()

    begun = asyncio.Event()
    run(main)
    assert log == ["good bye"]
    assert kept[0].status is aio.Status.closed
    assert not trio_runs()
    assert [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)] == []


def test_asyncio_run_does_not_wait_long_for_those_that_do_not_end(run: Runner) -> None:
    async def main() -> None:
        server = await aio.Server()
        holder = next(task for task in asyncio.all_tasks() if task.get_name() == HOLDER_NAME)

        async def waits_for_it() -> None:
            await asyncio.wait([holder])

        task = asyncio.create_task(waits_for_it())
        await asyncio.sleep(0)
        before = time.monotonic()
        holder.cancel()
        await task
        assert time.monotonic() - before < 5
        assert server.status is aio.Status.closed

    run(main)


def test_cancelled_while_waiting_for_the_end(run: Runner) -> None:
    async def main() -> None:
        server = await aio.Server()
        task = asyncio.create_task(server.close())
        await server.finished()
        task.cancel()
        await asyncio.wait([task])
        await run_ended()

    run(main)


def test_several_tasks_begin_at_once_while_another_run_ends(run: Runner) -> None:
    async def main() -> None:
        (await acquire_portal()).lease(lambda: None).release()
        await asyncio.sleep(0)
        assert trio_runs()  # it ends
        remote = aio.rpc("tcp://127.0.0.1:1")
        first, second = await asyncio.gather(remote._bound.bind(), remote._bound.bind())
        assert first is second
        remote.close_comms()
        await run_ended()

    run(main)


def test_several_tasks_begin_at_once(run: Runner) -> None:
    async def main() -> None:
        portals = await asyncio.gather(*[acquire_portal() for _ in range(20)])
        assert len(set(portals)) == 1
        (lease := portals[0].lease(lambda: None)).release()
        lease.release()
        await run_ended()

    run(main)


# -- other ways of running loops -------------------------------------------------------------------------------------------------------


def test_a_loop_that_is_run_again_and_again() -> None:
    async def begin() -> tuple[aio.Server, aio.rpc]:
        server = await aio.Server({"add": lambda x, y: x + y})
        return server, aio.rpc(await server.listen("tcp://127.0.0.1:0"))

    async def end(server: aio.Server, remote: aio.rpc) -> None:
        await remote.close_rpc()
        await server.close()

    with no_leaks():
        loop = new_loop()
        try:
            for _ in range(2):
                server, remote = loop.run_until_complete(begin())
                for n in range(3):
                    assert loop.run_until_complete(remote.add(x=n, y=1)) == n + 1
                loop.run_until_complete(end(server, remote))
                assert not trio_runs()
        finally:
            loop.close()


def test_several_loops_in_several_threads() -> None:
    results: list[Any] = []

    async def main(n: int) -> None:
        async with aio.Server({"add": lambda x, y: x + y}) as server, aio.rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
            results.append([await remote.add(x=n, y=m) for m in range(20)])

    with no_leaks():
        threads = [threading.Thread(target=lambda n=n: run_plainly(main(n))) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == [[n + m for m in range(20)] for n in range(4)]


def test_a_pool_of_another_loop_says_so() -> None:
    async def use(remote: aio.rpc, address: str) -> None:
        await remote.echo()

    async def first() -> tuple[aio.rpc, str]:
        server = await aio.Server()
        remote = aio.rpc(await server.listen("inproc://"))
        await remote.echo()
        return remote, server.address

    remote, address = run_plainly(first())
    with pytest.raises(RuntimeError, match="event loop"):
        run_plainly(use(remote, address))


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_eager_tasks(run: Runner) -> None:
    if run.name == "uvloop":
        pytest.skip("it passes eager_start= to factories that don't take it")

    async def wait() -> None:
        begun.set()
        await asyncio.sleep(3600)

    async def at_once() -> str:
        return "at once"

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        async with aio.Server({"wait": wait, "at_once": at_once}) as server:
            async with aio.rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
                assert await asyncio.gather(remote.echo(data=1), remote.echo(data=2)) == [1, 2]
                assert await remote.at_once() == "at once"
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await remote.wait()

    begun = asyncio.Event()
    run(main)


def program(text: str, *, interrupt: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program; it gets so many Ctrl-C, one after each line that it prints."""
    flags = subprocess.CREATE_NEW_PROCESS_GROUP if os.name == "nt" else 0
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        creationflags=flags,
        cwd=os.getcwd(),
    )
    with process:
        try:
            first = ""
            assert process.stdout is not None
            for _ in range(interrupt):
                first += process.stdout.readline()
                process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, first + out, err)


INTERRUPTED = """
import asyncio, sys
from trio_dcore import aio

async def wait():
    print("waiting", flush=True)
    try:
        await asyncio.sleep(3600)
    finally:
        print("finally", flush=True)

async def main():
    async with aio.Server({"wait": wait}) as server, aio.rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
        try:
            await remote.wait()
        except BaseException as error:
            print(type(error).__name__, flush=True)
            raise

%s
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows can't send SIGINT to one process")
@pytest.mark.parametrize("kind", ["asyncio.run", "uvloop.run", "run_until_complete"])
def test_ctrl_c(kind: str) -> None:
    how = {
        "asyncio.run": "asyncio.run(main())",
        "uvloop.run": "import uvloop; uvloop.run(main())",
        "run_until_complete": "loop = asyncio.new_event_loop()\ntry: loop.run_until_complete(main())\nfinally: print('out', flush=True)",
    }[kind]
    if "uvloop" in how:
        pytest.importorskip("uvloop")
    ended = program(INTERRUPTED % how, interrupt=1)
    lines = ended.stdout.splitlines()
    assert lines[0] == "waiting"
    assert "KeyboardInterrupt" in ended.stderr.splitlines()[-1] or kind == "run_until_complete", ended.stderr
    assert ended.returncode in (130, -signal.SIGINT)
    if kind == "run_until_complete":
        # As without trio: nobody ends the tasks, but trio's, whose run ends by it.
        assert lines[-1] == "out"
        assert "KeyboardInterrupt" in ended.stderr
    else:
        assert lines[1:] == ["CancelledError", "finally"] or lines[1:] == ["finally", "CancelledError"]
        assert "Traceback" in ended.stderr
        assert "Warning" not in ended.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows can't send SIGINT to one process")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_second_ctrl_c_is_hard(loop: str) -> None:
    """Where the cleanup hangs."""
    pytest.importorskip(loop)
    ended = program(
        f"""
import asyncio
import {loop} as loop
from trio_dcore import aio

async def wait():
    print("waiting", flush=True)
    try:
        await asyncio.sleep(3600)
    finally:
        print("cleaning up", flush=True)
        await asyncio.sleep(3600)

async def main():
    async with aio.Server({{"wait": wait}}) as server, aio.rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
        await remote.wait()

loop.run(main())
""",
        interrupt=2,
    )
    assert ended.stdout.splitlines() == ["waiting", "cleaning up"]
    assert ended.returncode in (130, -signal.SIGINT)
    assert "KeyboardInterrupt" in ended.stderr


def test_a_loop_that_is_closed_too_early_is_told_to_the_next() -> None:
    ended = program("""
import asyncio, warnings
warnings.simplefilter("ignore")
from trio_dcore import aio
loop = asyncio.new_event_loop()
server = aio.Server()
loop.run_until_complete(server.start())
loop.close()
try:
    asyncio.run(aio.Server().start())
except RuntimeError as error:
    print(error)
import os
os._exit(0)
""")
    assert "trio still runs in this thread for an event loop that was closed, or stopped, too early" in ended.stdout


# -- loops of trio's -------------------------------------------------------------------------------------------------------------------


def test_somebody_elses_guest(run: Runner) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        stop = trio.Event()
        trio.lowlevel.start_guest_run(
            stop.wait,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=ended.set_result,
            host_uses_signal_set_wakeup_fd=True,
        )
        async with open_trio() as portal:
            assert await portal.run(double, 1) == 2
        assert holders() == []
        async with aio.Server({"wait": wait}) as server:
            remote = aio.rpc(await server.listen("tcp://127.0.0.1:0"))
            assert await remote.echo(data=1) == 1
            call = asyncio.create_task(remote.wait())
            await begun.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await remote.close_rpc()
        assert trio_runs()
        stop.set()
        await ended
        assert not trio_runs()

    async def wait() -> None:
        begun.set()
        await asyncio.sleep(3600)

    begun = asyncio.Event()
    run(main)


async def test_in_a_loop_of_trio_asyncio() -> None:
    trio_asyncio = pytest.importorskip("trio_asyncio")

    async def wait() -> None:
        begun.set()
        await asyncio.sleep(3600)

    async def main() -> None:
        async with aio.Server({"wait": wait, "add": lambda x, y: x + y}) as server:
            address = await server.listen("tcp://127.0.0.1:0")
            async with aio.rpc(address) as remote:
                assert await remote.add(x=1, y=2) == 3
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await remote.wait()
                assert begun.is_set()
            async with await aio.connect(address) as comm:
                assert await aio.send_recv(comm, op="add", x=1, y=2) == 3
        async with open_trio() as portal:
            assert await portal.run(double, 2) == 4

    begun = asyncio.Event()
    async with no_leaks():
        async with trio_asyncio.open_loop():
            await trio_asyncio.aio_as_trio(main)()


def test_asyncio_run_in_a_trio_task_says_that_trio_stands_still() -> None:
    """Where nobody has imported trio_asyncio, which makes this a plain `no running event loop`."""
    ended = program("""
import asyncio, trio
from trio_dcore import aio

async def begin():
    for use in (aio.Server().start, aio.open_trio().__aenter__, aio.rpc("inproc://nobody").echo):
        try:
            await use()
        except aio.LocalProtocolError as error:
            print(error)

async def main():
    asyncio.run(begin())

trio.run(main)
""")
    assert ended.stdout.count("runs inside of a trio task, which stands still") == 3, ended.stderr
    assert ended.stderr == ""


async def test_in_our_open_loop() -> None:
    pytest.importorskip("trio_asyncio")

    async def main() -> int:
        async with aio.Server({"add": lambda x, y: x + y}) as server:
            async with aio.rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
                return await remote.add(x=1, y=2)

    async with no_leaks():
        async with aio.open_loop():
            assert await aio.run_asyncio(main) == 3
