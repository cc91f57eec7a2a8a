"""Rows L: the asyncio bridge."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import trio

from tests.aio.available import needs_trio_asyncio
from tests.aio.running import Runner
from tests.reference.kit import Outcome, Wire, covers, reference, until
from trio_dcore import HandlerCancelled, LocalProtocolError, RemoteError, Server, aio, rpc
from trio_dcore.aio import handler, open_loop, open_trio, run_asyncio


class Journal(list[str]):
    """What asyncio code did, in order."""

    async def work(self, cleanup: float = 0.0) -> None:
        """Wait until cancelled, then clean up for so long."""
        self.append("started")
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            self.append("cancelled")
            raise
        finally:
            await asyncio.sleep(cleanup)
            self.append("finally")

    async def has(self, entry: str) -> None:
        await until(lambda: entry in self)


WHOLE = ["started", "cancelled", "finally"]


# -- L01 -------------------------------------------------------------------------------------------------------------------------------


@needs_trio_asyncio
@reference("L01", "t")
async def test_l01_a_scope_cancels_a_coroutine(wire: Wire) -> None:
    for cleanup in 0, wire.seconds(0.5):
        journal = Journal()
        async with open_loop():
            with wire.takes(wire.seconds(1) + cleanup):
                with trio.move_on_after(wire.seconds(1)) as scope:
                    await run_asyncio(journal.work, cleanup)
            assert scope.cancelled_caught
            assert journal == WHOLE
            assert await run_asyncio(asyncio.sleep, 0, "the next one") == "the next one"


@needs_trio_asyncio
@reference("L01", "t")
async def test_l01_a_scope_round_the_loop(wire: Wire) -> None:
    journal = Journal()
    with trio.CancelScope() as scope:
        async with open_loop(), trio.open_nursery() as nursery:
            nursery.start_soon(run_asyncio, journal.work, wire.seconds(0.5))
            await journal.has("started")
            scope.cancel()
    assert scope.cancelled_caught
    assert journal == WHOLE


@needs_trio_asyncio
@reference("L01", "t")
async def test_l01_what_cancels_a_handler_cancels_its_coroutine(wire: Wire) -> None:
    cleanup = wire.seconds(0.5)
    for what in "the caller goes", "grace over", "server cancelled":
        journal = Journal()
        outcome = Outcome()
        async with open_loop():
            with trio.CancelScope() as scope:
                async with wire.server(handler({"work": journal.work})) as (server, address), wire.client(address) as remote:
                    async with trio.open_nursery() as calling:
                        calling.start_soon(outcome.of, partial(remote.work, cleanup=cleanup))
                        await journal.has("started")
                        if what == "the caller goes":
                            calling.cancel_scope.cancel()
                        elif what == "grace over":
                            server.stop(wire.seconds(0.1))
                            await server.finished()
                        else:
                            scope.cancel()
                    await journal.has("finally")
        assert journal == WHOLE, what
        assert scope.cancelled_caught is (what == "server cancelled")
        if what == "grace over":
            assert isinstance(outcome.error, HandlerCancelled)
            assert outcome.error.reason == what


@needs_trio_asyncio
@reference("L01", "t", quiet=False)
async def test_l01_a_coroutine_that_swallows_is_cancelled_again_and_named(wire: Wire) -> None:
    cancelled = []

    async def stubborn() -> None:
        for _ in range(3):
            try:
                await asyncio.sleep(wire.seconds(20))
            except asyncio.CancelledError:
                cancelled.append(trio.current_time())

    async with open_loop(redeliver=wire.seconds(2)):
        with wire.lasts(5):
            with trio.move_on_after(wire.seconds(1)):
                await run_asyncio(stubborn)
    assert len(cancelled) == 3
    named = [record.getMessage() for record in wire.loud()]
    assert len(named) == 2
    assert all("stubborn" in line.splitlines()[0] and "in stubborn" in line for line in named)


# -- L02 -------------------------------------------------------------------------------------------------------------------------------


class Lock:
    """Something over there that must be given back, by a call that a cancellation must not cut."""

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.handlers = {"acquire": self.acquire, "work": self.work, "release": self.release}

    def acquire(self) -> None:
        self.journal.append("acquired")

    async def work(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.journal.append("work ended")

    async def release(self) -> None:
        await trio.sleep(0.02)
        self.journal.append("released")


async def careful(address: str, begun: asyncio.Event, bound: float, log: list[str]) -> None:
    """A trio function as one would write it: whatever happens, the lock is given back, and that takes no longer than ``bound``."""
    async with rpc(address) as remote:
        await remote.acquire()
        try:
            begun.set()
            await remote.work()
        except trio.Cancelled:
            log.append("cancelled")
            raise
        finally:
            with trio.move_on_after(bound, shield=True) as scope:
                await remote.release()
            log.append("cleanup cut" if scope.cancelled_caught else "cleanup whole")


async def _serve(lock: Lock, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
    async with Server(lock.handlers) as server:
        address = await server.listen("tcp://127.0.0.1:0")
        task_status.started(address)
        await trio.sleep_forever()


CANCELS: dict[str, tuple[type[BaseException], float]] = {
    "cancel": (asyncio.CancelledError, 5),
    "cancel, again and again": (asyncio.CancelledError, 5),
    "cancel, and the cleanup takes too long": (asyncio.CancelledError, 0.001),
    "timeout": (TimeoutError, 5),
    "wait_for": (TimeoutError, 5),
    "task group": (ExceptionGroup, 5),
}


@covers("L02", "t")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("how", CANCELS)
def test_l02_cancellation_lets_bounded_cleanup_run(how: str, loop: str, caplog: pytest.LogCaptureFixture) -> None:
    expected, bound = CANCELS[how]
    lock = Lock()
    log: list[str] = []

    async def main() -> None:
        async with open_trio() as portal:
            nursery = portal.nursery
            assert nursery is not None
            address = await portal.run(partial(nursery.start, _serve, lock))
            begun = asyncio.Event()
            call = partial(portal.run, careful, address, begun, bound, log)
            with pytest.raises(expected) as caught:
                if how == "timeout":
                    async with asyncio.timeout(0.1):
                        await call()
                elif how == "wait_for":
                    await asyncio.wait_for(call(), 0.1)
                elif how == "task group":
                    async with asyncio.TaskGroup() as group:
                        group.create_task(call())
                        await begun.wait()
                        raise KeyError
                else:
                    task = asyncio.create_task(call())
                    await begun.wait()
                    task.cancel()
                    while "again" in how and not task.done():
                        await asyncio.sleep(0.001)
                        task.cancel()
                    await task
            # When it was raised all of it was over.
            assert log == ["cancelled", "cleanup whole" if bound > 1 else "cleanup cut"]
            assert lock.journal[0] == "acquired"
            assert bound < 1 or "released" in lock.journal
            if isinstance(caught.value, ExceptionGroup):
                assert [type(leaf) for leaf in caught.value.exceptions] == [KeyError]
            this = asyncio.current_task()
            assert this is not None
            assert this.cancelling() == 0
            while "work ended" not in lock.journal:  # noqa: ASYNC110  # there is no event
                await asyncio.sleep(0)

    Runner(loop, caplog)(main)


@covers("L02", "t")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_l02_calls_of_an_asyncio_program(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """The same with what aio brings: the handler over there has ended its cleanup, and the exceptions are asyncio's."""
    journal = Journal()

    async def main() -> None:
        async with aio.Server({"work": journal.work}) as server, aio.rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
            for n in range(1, 4):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await remote.work(cleanup=0.01)
                while len(journal) < 3 * n:  # noqa: ASYNC110  # likewise
                    await asyncio.sleep(0)
            assert journal == WHOLE * 3
            task = asyncio.create_task(remote.work())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    Runner(loop, caplog)(main)


# -- L04 -------------------------------------------------------------------------------------------------------------------------------


@needs_trio_asyncio
@reference("L04", "t")
async def test_l04_stray_tasks_are_cancelled_and_awaited(wire: Wire) -> None:
    journal = Journal()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Of an asyncio server that nobody closes: it, its connection and its task are strays."""
        try:
            await journal.work(wire.seconds(0.5))
        except asyncio.CancelledError:
            pass  # asyncio's streams log a handler that was cancelled as failed, up to Python 3.11
        finally:
            writer.close()
            await writer.wait_closed()

    async def listen() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        try:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            try:
                await asyncio.sleep(1e6)
            finally:
                writer.close()
        finally:
            server.close()

    with trio.CancelScope() as scope:
        async with open_loop() as loop:
            task = loop.create_task(listen())
            await journal.has("started")
            scope.cancel()  # also in a cancelled scope
    assert task.cancelled()
    assert journal == WHOLE
    assert loop.is_closed()


@needs_trio_asyncio
@reference("L04", "t", quiet=False)
async def test_l04_one_that_does_not_end_is_named_and_not_abandoned(wire: Wire) -> None:
    journal = Journal()

    async def stubborn() -> None:
        for _ in range(3):
            try:
                await asyncio.sleep(wire.seconds(20))
            except asyncio.CancelledError:
                journal.append("swallowed")
        journal.append("ended")

    async with open_loop(redeliver=wire.seconds(1)) as loop:
        loop.create_task(stubborn(), name="the stubborn one")
        await trio.sleep(0.01)
        start = trio.current_time()
    assert trio.current_time() - start >= wire.seconds(2)
    assert journal == ["swallowed"] * 3 + ["ended"]
    named = [record.getMessage() for record in wire.loud()]
    assert len(named) == 2
    assert all("the stubborn one" in line.splitlines()[0] and "in stubborn" in line for line in named)


@needs_trio_asyncio
@reference("L04", "t")
async def test_l04_a_missing_loop_is_a_clear_error(wire: Wire) -> None:
    journal = Journal()
    with pytest.raises(LocalProtocolError, match=r"put `async with trio_dcore\.aio\.open_loop\(\):` round this"):
        await run_asyncio(journal.work)
    async with wire.server(handler({"work": journal.work})) as (_, address), wire.client(address) as remote:
        with pytest.raises(
            RemoteError, match=r"put `async with trio_dcore\.aio\.open_loop\(\):` round this, and round the server"
        ):
            await remote.work()
    assert journal == []


# -- L05 -------------------------------------------------------------------------------------------------------------------------------

# Run first, in a fresh interpreter: what is not installed, and a Python that trio-asyncio doesn't support.
WITHOUT = {
    "not installed": """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name == "trio_asyncio":
                    raise ModuleNotFoundError("No module named 'trio_asyncio'", name=name)

        sys.meta_path.insert(0, Blocker())
        says = "needs trio-asyncio: pip install 'trio_dcore[asyncio]'"
    """,
    "Python 3.14": """
        import sys, types
        import trio_dcore.aio._loop

        # Everybody else is to see the Python that it is.
        trio_dcore.aio._loop.sys = types.SimpleNamespace(version_info=(3, 14, 0), modules=sys.modules)
        says = "don't support Python 3.14"
    """,
}

# The asyncio side: L02, through an rpc and a server of this process, and the error.
PROGRAM = """
    import asyncio
    import sys

    import trio
    import trio_dcore.aio as aio
    from trio_dcore.testing import no_leaks

    journal = []

    async def work():
        try:
            await asyncio.sleep(1e6)
        finally:
            await asyncio.sleep(0.01)
            journal.append("handler")

    async def careful():
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(5, shield=True):
                await trio.sleep(0.01)
                journal.append("trio")

    async def main():
        asyncio.get_running_loop().slow_callback_duration = 20  # what is imported late counts
        async with aio.Server({"work": work}) as server:
            address = await server.listen("tcp://127.0.0.1:0")
            async with aio.rpc(address) as remote:
                try:
                    async with asyncio.timeout(0.05):
                        await remote.work()
                except TimeoutError:
                    journal.append("timeout")
            async with aio.open_trio() as portal:
                task = asyncio.create_task(portal.run(careful))
                await asyncio.sleep(0.01)
                task.cancel()
                try:
                    await task
                except asyncio.CancelledError:
                    journal.append("cancelled")

    with no_leaks():
        asyncio.run(main(), debug=True)

    async def open_loop():
        try:
            aio.open_loop()
        except ImportError as error:
            assert says in str(error) and "aio.open_trio()" in str(error), error
            journal.append("one clear error")

    trio.run(open_loop)
    assert "trio_asyncio" not in sys.modules
    print(sorted(journal))
"""


@covers("L05", "t")
@pytest.mark.parametrize("why", WITHOUT)
def test_l05_the_other_direction_works_without_trio_asyncio(why: str) -> None:
    program = textwrap.dedent(WITHOUT[why]) + textwrap.dedent(PROGRAM)
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.strip() == str(sorted(["timeout", "handler", "trio", "cancelled", "one clear error"]))
