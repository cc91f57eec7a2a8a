"""Compressed payloads to and from stock Dask, forced on either side, both ways, and through a hop that negotiated none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import dask
import numpy
import pytest
import trio
from distributed.comm.core import Comm as StockComm
from distributed.comm.core import connect as stock_connect
from distributed.protocol import Serialized as StockSerialized
from distributed.protocol import to_serialize as stock_to_serialize

from trio_dcore import Serialized, Server, connect, rpc, to_serialize

CODECS = ["lz4", "snappy", "zlib", "zstd"]
ZEROS = numpy.zeros(100_000)
NOISE = numpy.random.default_rng(1).bytes(200_000)


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def forced(codec: str) -> Iterator[None]:
    """Stock Dask compresses as if the peer were on another machine."""
    with (
        dask.config.set({"distributed.comm.compression": codec}),
        mock.patch.object(StockComm, "same_host", new_callable=mock.PropertyMock, return_value=False),
    ):
        yield


@asynccontextmanager
async def measured(server: Server) -> AsyncIterator[list[int]]:
    """How many bytes a server of ours has read and written in a block."""
    before = server.statistics()
    found: list[int] = []
    yield found
    after = server.statistics()
    found += [after.bytes_read - before.bytes_read, after.bytes_written - before.bytes_written]


def same(x: Any) -> Any:
    return x


@pytest.mark.usefixtures("forced")
async def test_stock_calls_us(stock: Any, ours: Any, codec: str) -> None:
    """Both ask for the same codec: compressed both ways."""

    async def call(remote: Any) -> None:
        found = await remote.same(x=stock_to_serialize(ZEROS))
        assert (found == ZEROS).all()

    async with ours({"same": lambda x: to_serialize(same(x))}, compression=codec) as server:
        async with measured(server) as counted:
            await stock.call("rpc", server.address, call)
    assert max(counted) < ZEROS.nbytes // 10


@pytest.mark.usefixtures("forced")
async def test_we_call_stock(stock: Any, codec: str) -> None:
    async with stock.serve({"same": lambda x: stock_to_serialize(x)}) as server, rpc(server.address, compression=codec) as remote:
        found = await remote.same(x=to_serialize(ZEROS))
        assert (found == ZEROS).all()
        (comm,) = remote.pool._policy.idle_since
        assert max(comm.bytes_read, comm.bytes_written) < ZEROS.nbytes // 10
        for value in (NOISE, {"a": [ZEROS, NOISE]}):
            found = await remote.same(x=to_serialize(value))
            assert str(found) == str(value)


@pytest.mark.usefixtures("forced")
async def test_stock_compresses_only_if_we_ask_for_the_same(stock: Any, ours: Any, codec: str) -> None:
    async def call(remote: Any) -> None:
        assert ((await remote.same(x=stock_to_serialize(ZEROS))) == ZEROS).all()

    other = CODECS[CODECS.index(codec) - 1]
    for setting in (None, other):
        async with ours({"same": lambda x: to_serialize(x)}, compression=setting) as server:
            async with measured(server) as counted:
                await stock.call("rpc", server.address, call)
            assert counted[0] > ZEROS.nbytes
            assert (counted[1] > ZEROS.nbytes) is (setting is None)


async def test_forced_here_and_off_there(stock: Any, ours: Any, codec: str) -> None:
    """What stock peers have not negotiated they read all the same, on one host too."""

    async def call(remote: Any) -> None:
        assert ((await remote.same(x=stock_to_serialize(ZEROS))) == ZEROS).all()

    async with ours({"same": lambda x: to_serialize(x)}, compression=codec) as server:
        async with measured(server) as counted:
            await stock.call("rpc", server.address, call)
        assert counted[0] > ZEROS.nbytes > 10 * counted[1]
    async with stock.serve({"same": lambda x: x.sum()}) as stock_server, rpc(stock_server.address, compression=codec) as remote:
        assert await remote.same(x=to_serialize(ZEROS)) == 0
        (comm,) = remote.pool._policy.idle_since
        assert comm.bytes_written < ZEROS.nbytes // 10


@pytest.mark.usefixtures("forced")
async def test_through_a_hop_of_ours_that_negotiated_none(stock: Any, ours: Any, codec: str) -> None:
    """Stock, compressed, to a hop with ``deserialize=False``, and on to a stock server and one of ours that get what came."""
    sizes: list[int] = []

    async def pass_on(**message: Any) -> Any:
        payload = message["x"]
        assert type(payload) is Serialized
        assert payload.header["compression"] == (codec,)
        sizes.append(sum(len(memoryview(frame).cast("B")) for frame in payload.frames))
        async with rpc(message.pop("to"), deserialize=False) as remote:
            return await remote.double(**message)

    def double(x: Any) -> Any:
        assert (x == 1).all()
        return x * 2

    ones = numpy.ones(100_000)

    async def call(remote: Any) -> None:
        for to in (stock_server.address, last.address):
            found = await remote.pass_on(x=stock_to_serialize(ones), to=to)
            assert (found == 2).all()

    async with (
        stock.serve({"double": lambda x: stock_to_serialize(double(x))}) as stock_server,
        ours({"double": lambda x: to_serialize(double(x))}) as last,
        # It asks for the same codec only so that the stock client compresses; towards the servers behind it nothing is negotiated.
        ours({"pass_on": pass_on}, deserialize=False, compression=codec) as hop,
    ):
        await stock.call("rpc", hop.address, call)
    assert max(sizes) < ones.nbytes // 10


async def test_through_a_stock_hop(stock: Any, ours: Any, codec: str) -> None:
    """Compressed by us, passed on by stock that negotiated none, and read by us."""

    async def pass_on(comm: Any, x: Any, to: str) -> Any:
        assert type(x) is StockSerialized
        assert x.header["compression"] == (codec,)
        further = await stock_connect(to, deserialize=False)
        try:
            await further.write({"op": "double", "x": x, "reply": True})
            return await further.read()
        finally:
            await further.close()

    def double(x: Any) -> Any:
        return to_serialize(x + x)

    async with (
        ours({"double": double}, compression=codec) as last,
        stock.serve({"pass_on": pass_on}, deserialize=False) as hop,
        rpc(hop.address, compression=codec) as remote,
    ):
        found = await remote.pass_on(x=to_serialize(numpy.ones(100_000)), to=last.address)
        assert (found == 2).all()


async def test_pickles_with_buffers(stock: Any, ours: Any, codec: str) -> None:
    """Out-of-band buffers of objects are compressed as well, here and there."""
    value = slice(numpy.zeros(100_000), "x")

    def check(x: Any) -> Any:
        assert (x.start == 0).all()
        assert x.stop == "x"
        return x

    async with stock.serve({"check": check}) as server, rpc(server.address, compression=codec) as remote:
        check(await remote.check(x=value))
        (comm,) = remote.pool._policy.idle_since
        assert comm.bytes_written < 100_000 < comm.bytes_read


@pytest.mark.parametrize("wrapped", [True, False])
async def test_echo(stock: Any, ours: Any, codec: str, wrapped: bool) -> None:
    """As upstream's test_compression."""
    data = b"1" * 1_000_000

    async def call(remote: Any) -> Any:
        return await remote.echo(data=stock_to_serialize(data) if wrapped else data)

    async with ours(compression=codec) as server:
        assert await stock.call("rpc", server.address, call) == data
        async with rpc(server.address, compression=codec) as remote:
            assert await remote.echo(data=to_serialize(data) if wrapped else data) == data


async def test_large_payloads_both_ways(stock: Any, ours: Any) -> None:
    """200 MB, which is offloaded where it takes work, and comes in pieces from stock Dask."""
    array = numpy.arange(25_000_000.0)

    async def call(remote: Any, wrap: Any = stock_to_serialize) -> None:
        found = await remote.half(x=wrap(array))
        assert found.nbytes == array.nbytes // 2
        assert found[-1] == array[-2]

    def half(x: Any) -> Any:
        return to_serialize(x[::2])

    with trio.fail_after(30):
        async with ours({"half": half}) as server:
            await stock.call("rpc", server.address, call)
        async with stock.serve({"half": lambda x: stock_to_serialize(x[::2])}) as server, rpc(server.address) as remote:
            await call(remote, to_serialize)


async def test_200_mb_compressed_through_a_hop(stock: Any, ours: Any) -> None:
    data = numpy.repeat(numpy.arange(2_500_000.0), 10)

    async def pass_on(x: Any) -> Any:
        assert type(x) is Serialized
        async with await connect(last.address, deserialize=False) as comm:
            await comm.write({"op": "total", "x": x})
            return await comm.read()

    with trio.fail_after(30):
        async with (
            stock.serve({"total": lambda x: float(x.sum())}) as last,
            ours({"pass_on": pass_on}, deserialize=False) as hop,
            rpc(hop.address, compression="lz4") as remote,
        ):
            assert await remote.pass_on(x=to_serialize(data)) == data.sum()
            (comm,) = remote.pool._policy.idle_since
            assert comm.bytes_written < data.nbytes // 2
