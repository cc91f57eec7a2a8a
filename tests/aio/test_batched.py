"""trio_dcore.aio._batched: BatchedSend in asyncio programs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.aio.running import Runner
from trio_dcore import aio
from trio_dcore.aio import BatchedSend, CommClosedError, LimitExceeded, LocalProtocolError, SerializationError


class Log(aio.Server):
    """A server that keeps what comes on its streams."""

    def __init__(self) -> None:
        super().__init__(stream_handlers={"line": self.line, "slow": self.slow})
        self.lines: list[Any] = []
        self.came = asyncio.Event()

    async def line(self, text: str) -> None:
        await asyncio.sleep(0)
        self.lines.append(text)
        if text == "last":
            self.came.set()

    def slow(self, text: str) -> None:
        self.lines.append(text)


def test_a_stream_of_messages(run: Runner) -> None:
    async def main() -> None:
        async with Log() as log, await aio.connect(await log.listen("tcp://127.0.0.1:0")) as comm:
            await comm.write({"op": "connection_stream", "reply": False})
            async with BatchedSend(comm) as stream:
                for n in range(100):
                    stream.send({"op": "line", "text": n})
                await stream.send_wait({"op": "line", "text": "last"})
                assert stream.comm is comm
                with pytest.raises(SerializationError):
                    stream.send({"op": "line", "text": (n for n in ())})
            assert stream.closed()
            assert (stream.unsent, stream.maybe_sent) == ([], [])
            assert stream.message_count == 101
            assert 1 <= stream.batch_count < 50
            assert stream.byte_count > 0
            await log.came.wait()
            assert log.lines == [*range(100), "last"]
            with pytest.raises(LocalProtocolError):
                await stream.__aenter__()

    run(main)


def test_closing_without_a_block_and_aborting(run: Runner) -> None:
    async def main() -> None:
        async with Log() as log:
            address = await log.listen("tcp://127.0.0.1:0")
            async with await aio.connect(address) as comm:
                await comm.write({"op": "connection_stream", "reply": False})
                stream = BatchedSend(comm, interval="1ms")
                stream.send({"op": "line", "text": "last"})
                await stream.close()
                await log.came.wait()
            comm = await aio.connect(address)
            stream = BatchedSend(comm)
            stream.abort()
            assert comm.closed()
            with pytest.raises(CommClosedError):
                stream.send(1)
            assert "BatchedSend" in repr(stream)

    run(main)


def test_what_was_not_sent_is_told(run: Runner) -> None:
    run.loud = True

    async def lose(stream: BatchedSend, comm: aio.Comm) -> None:
        stream.send(1)
        while stream.batch_count == 0:  # noqa: ASYNC110  # it has no event
            await asyncio.sleep(0)
        stream.send(2)
        comm.abort()

    async def main() -> None:
        async with Log() as log:
            address = await log.listen("tcp://127.0.0.1:0")
            comm = await aio.connect(address)
            with pytest.raises(CommClosedError, match="not sent"):
                async with BatchedSend(comm, interval=3600) as stream:
                    await lose(stream, comm)
            assert stream.unsent == [2]
            comm = await aio.connect(address)
            with pytest.raises(KeyError):  # the loss is logged then
                async with BatchedSend(comm, interval=3600) as stream:
                    await lose(stream, comm)
                    raise KeyError
            async with await aio.connect(address) as comm:
                with pytest.raises(LimitExceeded):
                    BatchedSend(comm, max_buffered=1).send(1, 2)

    run(main)
    assert ["not sent" in record.getMessage() for record in run.log.records if record.levelname == "WARNING"] == [True]


def test_cancelled_inside_the_block(run: Runner) -> None:
    async def main() -> None:
        async with Log() as log, await aio.connect(await log.listen("tcp://127.0.0.1:0")) as comm:
            begun = asyncio.Event()

            async def sending() -> None:
                async with BatchedSend(comm, interval=3600) as stream:
                    streams.append(stream)
                    begun.set()
                    await asyncio.sleep(3600)

            streams: list[BatchedSend] = []
            task = asyncio.create_task(sending())
            await begun.wait()
            streams[0].send(1)
            while streams[0].batch_count == 0:  # noqa: ASYNC110  # it has no event
                await asyncio.sleep(0)
            streams[0].send(2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert streams[0].closed()
            assert streams[0].unsent == [2]  # it ended at once
            assert not comm.closed()

    run(main)
