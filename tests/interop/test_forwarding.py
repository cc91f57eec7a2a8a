"""A ``deserialize=False`` hop of ours between a stock client and a stock server: the payload bytes come out as they went in.

What passes on both sides of the hop is recorded on the wire and compared.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy
import pytest
import trio
from distributed.comm import connect as stock_connect
from distributed.protocol import Serialized as StockSerialized
from distributed.protocol import to_serialize as stock_to_serialize
from distributed.protocol.compression import maybe_compress
from distributed.protocol.serialize import serialize_and_split

from trio_dcore import Comm, RemoteError, Serialized, connect, rpc


class Tap:
    """What passed through one recording proxy, connection by connection."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.connections: list[tuple[bytearray, bytearray]] = []

    def messages(self, connection: int, direction: int) -> list[list[bytes]]:
        """The messages of one connection, handshake left out, each a list of its frames.  Direction 0 is towards the server."""
        data = bytes(self.connections[connection][direction])
        found = []
        at = 0
        while at < len(data):
            # wire document, section 2: outer, number of frames, their lengths, the frames
            _outer, count = struct.unpack_from("<QQ", data, at)
            lengths = struct.unpack_from(f"<{count}Q", data, at + 16)
            at += 16 + 8 * count
            frames = []
            for length in lengths:
                frames.append(data[at : at + length])
                at += length
            found.append(frames)
        assert at == len(data)
        return found[1:]


@asynccontextmanager
async def tapped(address: str) -> AsyncIterator[Tap]:
    """A proxy in front of ``address`` that records both directions."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")

    async def pump(source: trio.SocketStream, sink: trio.SocketStream, record: bytearray) -> None:
        # Bytes first, record second: a peer may have them before they are looked at, and what is looked at has been delivered.
        try:
            async for chunk in source:
                record += chunk
                await sink.send_all(chunk)
            await sink.send_eof()
        except trio.BrokenResourceError:
            return  # one end has gone; the other pump sees it too

    async def through(client: trio.SocketStream) -> None:
        records = (bytearray(), bytearray())
        tap.connections.append(records)
        async with client, await trio.open_tcp_stream(host, int(port)) as server, trio.open_nursery() as nursery:
            nursery.start_soon(pump, client, server, records[0])
            nursery.start_soon(pump, server, client, records[1])

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    tap = Tap(f"tcp://127.0.0.1:{listeners[0].socket.getsockname()[1]}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, through, listeners)
        yield tap
        nursery.cancel_scope.cancel()


def compressed(value: Any) -> StockSerialized:
    """A payload that stock Dask has compressed, as it does between machines."""
    header, frames = serialize_and_split(value)
    names, packed = zip(*[maybe_compress(frame, compression="zlib") for frame in frames], strict=True)
    assert set(names) == {"zlib"}
    return StockSerialized({**header, "compression": names}, list(packed))


def sharded(value: Any, size: int) -> StockSerialized:
    """A payload in many frames, as Dask cuts a large one."""
    header, frames = serialize_and_split(value, size=size)
    assert len(frames) > 2
    return StockSerialized(header, frames)


_PAYLOADS: dict[str, Any] = {
    "array": lambda: stock_to_serialize(numpy.arange(10)),
    "array, 8 MB": lambda: stock_to_serialize(numpy.arange(10**6, dtype="f8")),
    "array, strided": lambda: stock_to_serialize(numpy.arange(10**5)[::3]),
    "arrays": lambda: stock_to_serialize([numpy.arange(5), {"b": numpy.ones(10**5)}]),
    "pickle": lambda: stock_to_serialize({1, 2, 3}),
    "object with an array": lambda: stock_to_serialize(slice(numpy.arange(10**5), None)),
    "bytes": lambda: stock_to_serialize(b"x" * 100_000),
    "compressed": lambda: compressed(numpy.zeros(10**5)),
    "sharded": lambda: sharded(numpy.arange(10**5), 100_000),
    "unknown family": lambda: StockSerialized(
        {"serializer": "from the future", "num-sub-frames": 2, "other": [1, {"k": b"v"}]}, [b"abc", b""]
    ),
}


@pytest.fixture(params=list(_PAYLOADS))
def payload(request: pytest.FixtureRequest) -> Any:
    return _PAYLOADS[request.param]()


async def test_messages_copied_from_comm_to_comm(stock: Any, ours: Any, payload: Any) -> None:
    """Whole messages, in both directions, byte by byte."""

    async def forward(comm: Comm) -> None:
        async with await connect(behind.address, deserialize=False) as further:
            await further.write({"op": "mirror", "reply": False})
            while (message := await comm.read()) != "done":
                await further.write(message)
                await comm.write(await further.read())

    async def mirror(comm: Any) -> None:
        while True:
            await comm.write(await comm.read())

    async def ask() -> None:
        comm = await stock_connect(before.address, deserialize=False)
        await comm.write({"op": "forward", "reply": False})
        for message in ({"x": payload, "y": [1, "z"]}, [payload, payload]):
            await comm.write(message)
            await comm.read()
        await comm.write("done")
        await comm.close()

    async with (
        stock.serve({"mirror": mirror}, deserialize=False) as server,
        tapped(server.address) as behind,
        ours({"forward": forward}, deserialize=False) as hop,
        tapped(hop.address) as before,
    ):
        await stock.run(ask)
    sent, received = before.messages(0, 0), before.messages(0, 1)
    assert len(sent) == 4  # the request, two messages, "done"
    assert behind.messages(0, 0)[1:] == sent[1:3]
    assert behind.messages(0, 1) == received == sent[1:3]


async def test_calls_passed_on(stock: Any, ours: Any, payload: Any) -> None:
    """A handler that hands its arguments to an rpc and its result back: every header and payload frame stays what it was."""

    seen = []

    async def hand_on(**arguments: Any) -> Any:
        seen.append(arguments["x"])
        async with rpc(behind.address, deserialize=False) as remote:
            return await remote.same(**arguments)

    async with (
        stock.serve({"same": lambda x, y: {"x": x, "y": y}}, deserialize=False) as server,
        tapped(server.address) as behind,
        ours({"same": hand_on}, deserialize=False) as hop,
        tapped(hop.address) as before,
    ):
        back = await stock.call("rpc", before.address, lambda remote: remote.same(x=payload, y=[1]), deserialize=False)
    assert isinstance(seen[0], Serialized)
    assert isinstance(back["x"], StockSerialized)
    assert back["y"] == (1,)
    for direction in (0, 1):
        outside, inside = before.messages(0, direction)[0], behind.messages(0, direction)[0]
        assert outside[1:] == inside[1:]
        assert len(outside) > 2


async def test_the_far_end_can_open_what_was_passed_on(stock: Any, ours: Any, same: Any) -> None:
    """The same hop, with ends that deserialize."""
    array = numpy.arange(10**6, dtype="f8")[::2]
    seen = []

    def double(x: Any) -> Any:
        seen.append(x)
        return stock_to_serialize(x * 2)

    async def hand_on(**arguments: Any) -> Any:
        async with rpc(server.address, deserialize=False) as remote:
            return await remote.double(**arguments)

    async with stock.serve({"double": double}) as server, ours({"double": hand_on}, deserialize=False) as hop:
        back = await stock.call("rpc", hop.address, lambda remote: remote.double(x=stock_to_serialize(array)))
    same(seen[0], array)
    same(back, array * 2)


async def test_an_error_passed_on(stock: Any, ours: Any) -> None:
    """An error of the stock server behind the hop reaches the stock client before it."""

    def fail() -> None:
        raise ValueError("no")

    async def hand_on() -> Any:
        async with rpc(server.address, deserialize=False) as remote:
            with pytest.raises(RemoteError):
                await remote.fail()
            return await remote.fail()

    async def failing(remote: Any) -> str:
        with pytest.raises(Exception, match="no") as caught:
            await remote.fail()
        return str(caught.value)

    async with stock.serve({"fail": fail}) as server, ours({"fail": hand_on}, deserialize=False) as hop:
        assert await stock.call("rpc", hop.address, failing) == "no"
