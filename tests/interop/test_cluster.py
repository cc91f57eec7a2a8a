"""A real Scheduler and a real Worker: called by our clients, and calling our Server."""

from __future__ import annotations

import pickle
from typing import Any

import numpy
import pytest
from distributed import Client as StockClient
from distributed import get_worker
from distributed.core import rpc as stock_rpc
from distributed.utils import sync

from trio_dcore import Comm, RemoteError, connect, to_serialize


async def test_scheduler_identity(stock: Any, connected: Any, kind: str) -> None:
    async with stock.cluster() as (scheduler, worker), connected(kind, scheduler.address) as remote:
        identity = await remote.identity()
    assert identity["type"] == "Scheduler"
    assert identity["id"] == scheduler.id
    assert identity["address"] == scheduler.address
    assert identity["workers"][worker.address]["nthreads"] == 1


async def test_scheduler_ncores(stock: Any, connected: Any, kind: str) -> None:
    async with stock.cluster() as (scheduler, worker), connected(kind, scheduler.address) as remote:
        assert await remote.ncores() == {worker.address: 1}
        assert await remote.ncores(workers=[worker.address]) == {worker.address: 1}
        assert await remote.ncores_running() == {worker.address: 1}


async def test_scheduler_scatter_and_gather(stock: Any, connected: Any, kind: str, same: Any) -> None:
    """Our data through the scheduler, which does not open it, to the worker, and back by another way."""
    data = {
        "number": 5,
        "array": numpy.arange(10**6, dtype="f8")[::2],
        "tuple": (1, "x", b"y"),
        "nested": {"a": numpy.arange(3), "b": [1, 2]},
        ("tuple", 1): "a key that is a tuple",
    }
    packed = {key: to_serialize(value) for key, value in data.items()}
    async with stock.cluster() as (scheduler, worker), connected(kind, scheduler.address) as remote:
        assert await remote.who_has(keys=list(data)) == dict.fromkeys(data, ())
        keys = await remote.scatter(data=packed, workers=None, client="us", broadcast=False)
        assert set(keys) == set(data)
        assert await remote.who_has(keys=list(data)) == dict.fromkeys(data, (worker.address,))
        (held,) = (await remote.has_what(workers=[worker.address])).values()
        assert set(held) == set(worker.data) == set(data)
        same(worker.data["array"], data["array"])
        found = await remote.gather(keys=list(data))
    assert found["status"] == "OK"
    assert set(found["data"]) == set(data)
    for key in ("number", "array", "tuple", ("tuple", 1)):
        same(found["data"][key], data[key])
    same(found["data"]["nested"]["a"], numpy.arange(3))
    assert found["data"]["nested"]["b"] == [1, 2]


async def test_scheduler_gathers_what_is_not_there(stock: Any, connected: Any) -> None:
    async with stock.cluster() as (scheduler, _), connected("rpc", scheduler.address) as remote:
        found = await remote.gather(keys=["no such key"])
    assert found == {"status": "error", "keys": ("no such key",)}


async def test_scheduler_errors(stock: Any, connected: Any) -> None:
    async with stock.cluster() as (scheduler, worker), connected("rpc", scheduler.address) as remote:
        with pytest.raises((TypeError, AssertionError)) as caught:  # it depends on the release
            await remote.scatter()
        assert isinstance(caught.value, RemoteError)
        assert await remote.ncores() == {worker.address: 1}


async def test_scheduler_passes_a_message_on(stock: Any, connected: Any) -> None:
    """``broadcast``: the scheduler as a hop to its workers."""
    async with stock.cluster() as (scheduler, worker), connected("rpc", scheduler.address) as remote:
        found = await remote.broadcast(msg={"op": "echo", "data": [1, "x"]})
    assert found == {worker.address: (1, "x")}


async def test_the_stream_of_a_client(stock: Any, connected: Any) -> None:
    """Register as Dask's clients do, be told of a key, and leave."""
    async with (
        stock.cluster() as (scheduler, _),
        connected("rpc", scheduler.address) as remote,
        await connect(scheduler.address) as comm,
    ):
        await comm.write({"op": "register-client", "client": "us", "reply": False, "versions": {}})
        (start,) = await comm.read()
        assert start["op"] == "stream-start"
        await remote.scatter(data={"k": to_serialize(1)}, workers=None, client="us")
        await comm.write([{"op": "heartbeat-client"}, {"op": "client-desires-keys", "keys": ["k"], "client": "us"}])
        reports: list[Any] = []
        while "key-in-memory" not in [report["op"] for report in reports]:
            reports += await comm.read()
        assert {report["key"] for report in reports if report["op"] == "key-in-memory"} == {"k"}
        await comm.write([{"op": "close-client"}, {"op": "close-stream"}])
        rest = [item["op"] for batch in [batch async for batch in comm] for item in batch]
    assert set(rest) <= {"key-in-memory", "stream-closed"}


async def test_worker(stock: Any, connected: Any, kind: str, same: Any) -> None:
    array = numpy.arange(100_000).reshape(100, 1000)[:, ::3]
    async with stock.cluster() as (scheduler, worker), connected(kind, worker.address) as remote:
        identity = await remote.identity()
        assert identity["type"] == "Worker"
        assert identity["id"] == worker.id
        assert identity["scheduler"] == scheduler.address
        answer = await remote.update_data(data={"a": to_serialize(array), "n": to_serialize(7)})
        assert answer["status"] == "OK"
        assert set(answer["nbytes"]) == {"a", "n"}
        assert set(await remote.keys()) == {"a", "n"}
        same(worker.data["a"], array)


async def test_worker_data(stock: Any, connected: Any, same: Any) -> None:
    """``get_data`` answers and then waits for the message "OK" on the same connection."""
    array = numpy.arange(10**6, dtype="f8")
    async with stock.cluster() as (_, worker), connected("rpc", worker.address) as remote:
        await remote.update_data(data={"a": to_serialize(array)})
        async with await connect(worker.address) as comm:
            for _ in range(2):
                await comm.write({"op": "get_data", "keys": ["a"], "who": None, "reply": True})
                answer = await comm.read()
                assert answer["status"] == "OK"
                same(answer["data"]["a"], array)
                await comm.write("OK")


async def test_worker_runs_a_function(stock: Any, connected: Any) -> None:
    function = pickle.dumps(divmod)
    async with stock.cluster() as (_, worker), connected("rpc", worker.address) as remote:
        assert await remote.run(function=function, args=pickle.dumps((7, 2)), kwargs={}) == {"status": "OK", "result": (3, 1)}
        failed = await remote.run(function=function, args=pickle.dumps((1, 0)), kwargs={})
    # An answer with status "error" is data, as Dask's own clients have it.
    assert failed["status"] == "error"
    assert "ZeroDivisionError" in failed["exception_text"]


# -- tasks that call us ----------------------------------------------------------------------------------------------------------


async def ask_on_the_loop(address: str, values: list[Any]) -> list[Any]:
    """A task that is a coroutine: Dask runs it on the worker's event loop."""
    async with stock_rpc(address) as remote:
        return [await remote.double(x=value) for value in values]


def ask_in_a_thread(address: str, values: list[Any]) -> list[Any]:
    """A plain task, in a thread of the worker."""
    return list(sync(get_worker().loop, ask_on_the_loop, address, values))


def fail_through(address: str) -> str:
    """A task whose call to us fails, and that handles it by its class."""

    async def call() -> None:
        async with stock_rpc(address) as remote:
            await remote.double(x=None)

    try:
        sync(get_worker().loop, call)
    except TypeError as error:
        return f"handled {error}"
    raise AssertionError("no error")


@pytest.mark.parametrize("task", [ask_on_the_loop, ask_in_a_thread])
async def test_a_task_on_a_worker_calls_our_server(stock: Any, ours: Any, task: Any) -> None:
    peers = set()

    def double(comm: Comm, x: Any) -> Any:
        peers.add(comm.peer_address)
        return x * 2

    async def submit() -> Any:
        async with StockClient(scheduler.address, asynchronous=True) as client:
            return await client.submit(task, server.address, [1, "ab", numpy.arange(4)])

    async with ours({"double": double}) as server, stock.cluster() as (scheduler, _):
        number, text, array = await stock.run(submit)
    assert (number, text) == (2, "abab")
    assert array.tolist() == [0, 2, 4, 6]
    assert len(peers) == 1


async def test_an_error_of_ours_inside_a_task(stock: Any, ours: Any) -> None:
    async def submit() -> Any:
        async with StockClient(scheduler.address, asynchronous=True) as client:
            return await client.submit(fail_through, server.address)

    async with ours({"double": lambda x: x * 2}) as server, stock.cluster() as (scheduler, _):
        assert (await stock.run(submit)).startswith("handled unsupported operand")
