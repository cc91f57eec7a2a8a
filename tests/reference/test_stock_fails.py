"""A reference test shows something only if it can fail: where stock Dask fails today, the same test meets a stock Server.

The bodies are those of groups A to D and J.  Their handlers run in the stock server's asyncio loop, in a thread of its own;
client and assertions are the same.  Where the test itself would end the loop, a program shows what stock Dask does instead.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dask
import pytest
import trio
from distributed.comm import listen as stock_listen
from distributed.core import Server as StockServer
from distributed.core import error_message
from distributed.core import rpc as stock_rpc

from tests.interop.conftest import Stock
from tests.reference import (
    test_a_orderly_stop,
    test_b_cancelled,
    test_c_handler_errors,
    test_d_calls_and_pool,
    test_j_deadlines,
)
from tests.reference.kit import Wire
from trio_dcore import CommClosedError
from trio_dcore._util import leaves

# Above everything that a stock server needs to fail.
PATIENCE = 20


class Stopping:
    """What the bodies use of a Server, of a stock one."""

    def __init__(self, stock: Stock, server: StockServer, nursery: trio.Nursery) -> None:
        self._stock = stock
        self._server = server
        self._nursery = nursery
        self._closing = False
        self._finished = trio.Event()

    def stop(self, grace: float | None = None) -> None:
        if not self._closing:
            self._closing = True
            self._nursery.start_soon(self._close, grace)

    async def _close(self, grace: float | None) -> None:
        async def close() -> None:
            await self._server.close(timeout=grace)

        await self._stock.run(close)
        self._finished.set()

    async def finished(self) -> None:
        await self._finished.wait()


class StockWire(Wire):
    """tcp:// to a stock server."""

    sleep = staticmethod(asyncio.sleep)
    cancelled = asyncio.CancelledError

    def __init__(self, stock: Stock) -> None:
        super().__init__("t", None)
        self._stock = stock
        self._token = trio.lowlevel.current_trio_token()

    async def comm_of(self, remote: Any, server: Any) -> str:
        """That a call works is all that can be seen of a stock server."""
        await remote.identity()
        return ""

    def tell(self, what: Callable[[], object]) -> None:
        self._token.run_sync_soon(what)

    @asynccontextmanager
    async def server(self, handlers: Any = None, **options: Any) -> AsyncIterator[Any]:
        async with self._stock.serve(handlers, **options) as server, trio.open_nursery() as nursery:
            yield Stopping(self._stock, server, nursery), server.address

    @asynccontextmanager
    async def serving(self, handlers: Any = None, **options: Any) -> AsyncIterator[Any]:
        async with self.server(handlers, **options) as (server, address):
            yield server, address, server._finished


def failures(body: Callable[[Wire], Any], scratch: Path) -> list[BaseException]:
    """What a body raises when a stock server is at the other end."""

    async def main() -> None:
        with trio.fail_after(PATIENCE):
            await body(StockWire(stock))

    with dask.config.set({"distributed.comm.timeouts.connect": "10s"}), Stock(scratch) as stock:
        try:
            trio.run(main)
        except BaseException as error:
            return list(leaves(error))
    return []


def test_a02_the_reply_is_lost(tmp_path: Path) -> None:
    (failure,) = failures(test_a_orderly_stop.test_a02_reply_delivered_within_grace.body, tmp_path)
    assert isinstance(failure, AssertionError)
    # It does not wait for the handler at all.
    assert "s instead of about 0.03 s" in str(failure)


def test_a03_the_grace_is_never_read(tmp_path: Path) -> None:
    (failure,) = failures(test_a_orderly_stop.test_a03_cancelled_when_grace_is_over.body, tmp_path)
    assert isinstance(failure, AssertionError)
    assert "s instead of about 0.1 s" in str(failure)


def test_b08_swallowing_delays_the_close(tmp_path: Path) -> None:
    (failure,) = failures(test_b_cancelled.test_b08_a_handler_that_swallows_cancelled.body, tmp_path)
    assert isinstance(failure, AssertionError)
    took = float(str(failure).partition("took ")[2].partition(" s")[0])
    assert took > 1.9  # two more awaits of a second each: cancellation is an event there


def test_c01_holds_there_too(tmp_path: Path) -> None:
    # The other way round: a test passes there as far as Dask has the property, so it is no accident if another one fails.
    assert failures(test_c_handler_errors.test_c01_a_handler_raises.body, tmp_path) == []


def test_c02_an_unknown_op_is_none(tmp_path: Path) -> None:
    (failure,) = failures(test_c_handler_errors.test_c02_no_such_op.body, tmp_path)
    assert isinstance(failure, pytest.fail.Exception)
    assert "DID NOT RAISE" in str(failure)


def test_c04_the_connection_is_lost(tmp_path: Path) -> None:
    (failure,) = failures(test_c_handler_errors.test_c04_a_result_that_can_not_travel.body, tmp_path)
    assert isinstance(failure, CommClosedError)


C06 = """
import asyncio, sys
from distributed.core import Server, rpc

async def work():
    try:
        await asyncio.sleep(60)
    finally:
        print("the other handler:", sys.exc_info()[0].__name__)

async def leave():
    raise SystemExit(7)

async def main():
    server = await Server({"work": work, "leave": leave}, local_directory=sys.argv[1])
    await server.listen("tcp://127.0.0.1:0")
    try:
        async with rpc(server.address) as remote:
            other = asyncio.ensure_future(remote.work())
            await asyncio.sleep(0.1)
            await remote.leave()
    except BaseException as error:
        print("who runs the server:", type(error).__name__)
        raise

asyncio.run(main())
"""


def test_c06_an_exit_ends_the_loop(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", C06, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert run.returncode == 7
    # Nobody in the program can catch it: everything in the loop, whoever's it is, is cancelled.
    assert "who runs the server: CancelledError\n" in run.stdout
    assert "SystemExit\n" not in run.stdout


def test_c07_a_client_raises_what_the_server_names(tmp_path: Path) -> None:
    async def answer(comm: Any) -> None:
        await comm.read()
        await comm.write(error_message(SystemExit(7), status="uncaught-error"))

    async def call() -> tuple[type[BaseException], object]:
        async with stock_listen("tcp://127.0.0.1:0", answer) as listener:
            remote = stock_rpc(listener.contact_address)
            try:
                await remote.leave()
            except BaseException as error:
                return type(error), error.args
            finally:
                await remote.close_rpc()
        raise AssertionError("nothing was raised")

    async def main() -> Any:
        return await stock.run(call)

    with dask.config.set({"distributed.comm.timeouts.connect": "10s"}), Stock(tmp_path) as stock:
        assert trio.run(main) == (SystemExit, (7,))


def test_d05_the_handler_runs_to_its_end(tmp_path: Path) -> None:
    (failure,) = failures(test_d_calls_and_pool.test_d05_cancelled_while_waiting_for_the_reply.body, tmp_path)
    assert isinstance(failure, AssertionError)
    took = float(str(failure).partition("took ")[2].partition(" s")[0])
    assert took >= 1.9  # all that it needs


def test_j01_the_handler_runs_to_its_end(tmp_path: Path) -> None:
    (failure,) = failures(test_j_deadlines.test_j01_a_scope_round_a_call.body, tmp_path)
    assert isinstance(failure, AssertionError)
    assert "'ended'" in str(failure)
