"""What the tests of ``distributed.batched`` assert, in asyncio programs; each bears the name that it has there."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy
import pytest

from tests.aio.running import Runner
from tests.aio.scenarios import until
from tests.parity.conftest import Place
from trio_dcore.aio import BatchedSend, Comm, CommClosedError, SerializationError, Server, connect, to_serialize


class Echo:
    """A handler that sends back what it reads, in batches of its own."""

    def __init__(self) -> None:
        self.read = 0
        self.sent: BatchedSend | None = None

    async def __call__(self, comm: Comm) -> None:
        async with BatchedSend(comm, interval=0.01) as self.sent:
            async for batch in comm:
                self.read += len(batch)
                await self.sent.send_wait(*batch)
                if "end" in [message for message in batch if isinstance(message, str)]:
                    break


def test_BatchedSend(run: Runner, place: Place) -> None:
    """What is sent in one go arrives as one tuple; the repr says how many messages wait; bytes are counted."""

    async def main() -> None:
        async with Server({"echo": Echo()}, **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                await comm.write({"op": "echo", "reply": False})
                async with BatchedSend(comm, interval="10 ms") as stream:
                    assert "0 in buffer" in repr(stream)
                    stream.send("hello", "hello")
                    stream.send("world")
                    assert "3 in buffer" in repr(stream)
                    assert tuple(await comm.read()) == ("hello", "hello", "world")
                    assert "0 in buffer" in repr(stream)
                assert (stream.message_count, stream.batch_count) == (3, 1)
                assert stream.byte_count > 0

    run(main)


def test_send_before_start(run: Runner, place: Place) -> None:
    """It waits for the start, and leaves with it; what follows comes behind."""

    async def main() -> None:
        async with Server({"echo": Echo()}, **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                await comm.write({"op": "echo", "reply": False})
                stream = BatchedSend(comm, interval=0.01)
                stream.send("hello")
                stream.send("world")
                async with stream:
                    found: list[Any] = []
                    while len(found) < 2:
                        found += await comm.read()
                    stream.send("again")
                    found += await comm.read()
                assert found == ["hello", "world", "again"]

    run(main)


def test_send_before_close(run: Runner, place: Place) -> None:
    """What waits leaves with the end, after which nothing can be sent; closing again, or a closed comm's, is fine."""

    async def main() -> None:
        async with Server({"echo": Echo()}, **place.options) as server:
            address = await server.listen(place.address)
            async with await connect(address, **place.options) as comm:
                await comm.write({"op": "echo", "reply": False})
                async with BatchedSend(comm, interval=3600) as stream:
                    stream.send("first")
                    await until(lambda: stream.batch_count == 1)
                    stream.send("second")
                    for _ in range(2):
                        await stream.close()
                    assert stream.closed()
                    with pytest.raises(CommClosedError):
                        stream.send("third")
                await stream.close()
                assert [message for _ in range(2) for message in await comm.read()] == ["first", "second"]

    run(main)


def test_close_closed(run: Runner, place: Place) -> None:
    async def main() -> None:
        async with Server({"echo": Echo()}, **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                async with BatchedSend(comm) as stream:
                    await comm.close()
                    await stream.close()
                    with pytest.raises(CommClosedError):
                        stream.send("late")

    run(main)


def test_close_not_started_and_twice(run: Runner, place: Place) -> None:
    async def main() -> None:
        async with Server({"echo": Echo()}, **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                stream = BatchedSend(comm)
                for _ in range(2):
                    await stream.close()
                    assert stream.closed()
                assert not comm.closed()

    run(main)


def test_stress(run: Runner, place: Place) -> None:
    """Ten thousand messages, there and back, in order."""
    count = 10_000
    found: list[Any] = []

    async def main() -> None:
        async with Server({"echo": Echo()}, **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                await comm.write({"op": "echo", "reply": False})

                async def receive() -> None:
                    while "end" not in found[-1:]:
                        found.extend(await comm.read())

                async with asyncio.TaskGroup() as group:
                    group.create_task(receive())
                    async with BatchedSend(comm, interval=0.01) as stream:
                        for number in range(0, count, 100):
                            stream.send(*range(number, number + 99))
                            await stream.send_wait(number + 99)
                        await stream.send_wait("end")
                assert stream.message_count == count + 1
                assert stream.batch_count < count / 10
        assert found == [*range(count), "end"]

    run(main)


@pytest.mark.parametrize(("count", "size"), [(50, 300_000), (100, 1_500_000)], ids=["jam", "large jam"])
def test_sending_traffic_jam(run: Runner, count: int, size: int, place: Place) -> None:
    """More than the connection holds, both ways: nothing is lost, and the counters of both ends agree."""
    echo = Echo()
    data = numpy.arange(size // 8)

    async def main() -> None:
        found = 0
        async with Server({"echo": echo}, **place.options) as server:
            async with await connect(await server.listen(place.address), **place.options) as comm:
                await comm.write({"op": "echo", "reply": False})

                async def receive() -> None:
                    nonlocal found
                    while found < count:
                        for message in await comm.read():
                            assert message["number"] == found
                            assert message["data"].nbytes == data.nbytes
                            found += 1

                async with asyncio.TaskGroup() as group:
                    group.create_task(receive())
                    async with BatchedSend(comm, interval=0.01, max_buffered=10) as stream:
                        for number in range(count):
                            await stream.send_wait({"number": number, "data": to_serialize(data)})
                assert echo.sent is not None
                assert stream.message_count == echo.read == echo.sent.message_count == found == count
                if not place.address.startswith("inproc"):
                    assert stream.byte_count > count * data.nbytes
                    assert echo.sent.byte_count > count * data.nbytes

    run(main)


def test_serializers(run: Runner) -> None:
    """What can't be serialized is refused, and costs nothing else."""

    async def main() -> None:
        async with Server({"echo": Echo()}) as server:
            async with await connect(await server.listen("tcp://127.0.0.1:0")) as comm:
                await comm.write({"op": "echo", "reply": False})
                async with BatchedSend(comm, interval=0.001, serializers=["msgpack"]) as stream:
                    stream.send("before")
                    with pytest.raises(SerializationError):
                        stream.send({"x": to_serialize(print)})
                    stream.send("after")
                    found: list[Any] = []
                    while len(found) < 2:
                        found += await comm.read()
                assert found == ["before", "after"]

    run(main)
