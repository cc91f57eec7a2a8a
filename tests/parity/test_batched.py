"""What the tests of ``distributed.batched`` assert, where no other test here does; each bears the name that it has there."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import trio
import trio.testing

from tests.parity.conftest import Place
from trio_dcore import BatchedSend, Comm, CommClosedError, Server, connect, to_serialize


class Echo:
    """A handler that sends back what it reads, in batches of its own."""

    def __init__(self) -> None:
        self.read = 0
        self.sent: BatchedSend | None = None

    async def __call__(self, comm: Comm) -> None:
        async with BatchedSend(comm, interval=0.01) as self.sent:
            async for batch in comm:
                for message in batch:
                    self.read += 1
                    await self.sent.send_wait(message)
                if "end" in [message for message in batch if isinstance(message, str)]:
                    break


async def test_BatchedSend(place: Place) -> None:
    """What is sent in one go arrives as one tuple; the repr says how many messages wait; bytes are counted."""
    async with Server({"echo": Echo()}, **place.options) as server:
        async with await connect(await server.listen(place.address), **place.options) as comm:
            await comm.write({"op": "echo", "reply": False})
            async with BatchedSend(comm, interval=0.01) as stream:
                assert "0 in buffer" in repr(stream)
                stream.send("hello", "hello")
                stream.send("world")
                assert "3 in buffer" in repr(stream)
                assert tuple(await comm.read()) == ("hello", "hello", "world")
                assert "0 in buffer" in repr(stream)
            assert (stream.message_count, stream.batch_count) == (3, 1)
            assert stream.byte_count > 0


async def test_send_before_close(place: Place) -> None:
    """What waits leaves with the end, after which nothing can be sent; closing again, or a closed comm's, is fine."""
    async with Server({"echo": Echo()}, **place.options) as server:
        address = await server.listen(place.address)
        async with await connect(address, **place.options) as comm:
            await comm.write({"op": "echo", "reply": False})
            async with BatchedSend(comm, interval=3600) as stream:
                stream.send("first")
                await trio.testing.wait_all_tasks_blocked()
                stream.send("second")
                for _ in range(2):
                    await stream.aclose()
                assert stream.closed()
                with pytest.raises(CommClosedError):
                    stream.send("third")
            await stream.aclose()
            assert [message for _ in range(2) for message in await comm.read()] == ["first", "second"]
            async with BatchedSend(comm) as stream:
                await comm.close()
                await stream.aclose()


async def test_stress(place: Place) -> None:
    """Ten thousand messages, there and back, in order."""
    count = 10_000
    echo = Echo()
    found: list[Any] = []
    async with Server({"echo": echo}, **place.options) as server:
        async with await connect(await server.listen(place.address), **place.options) as comm:
            await comm.write({"op": "echo", "reply": False})

            async def receive() -> None:
                while "end" not in found:
                    found.extend(await comm.read())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                async with BatchedSend(comm, interval=0.01) as stream:
                    for number in range(count):
                        await stream.send_wait(number)
                    await stream.send_wait("end")
    assert found == [*range(count), "end"]
    assert stream.message_count == count + 1
    assert stream.batch_count < count / 10


@pytest.mark.parametrize(("count", "size"), [(50, 300_000), (200, 1_500_000)], ids=["jam", "large jam"])
async def test_sending_traffic_jam(count: int, size: int, place: Place) -> None:
    """More than the connection holds, both ways: nothing is lost, and the counters of both ends agree."""
    echo = Echo()
    found = 0
    data = numpy.arange(size // 8)
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

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                async with BatchedSend(comm, interval=0.01, max_buffered=10) as stream:
                    for number in range(count):
                        await stream.send_wait({"number": number, "data": to_serialize(data)})
            assert echo.sent is not None
            assert stream.message_count == echo.read == echo.sent.message_count == found == count
            if not place.address.startswith("inproc"):
                assert stream.byte_count > count * data.nbytes
                assert echo.sent.byte_count > count * data.nbytes
