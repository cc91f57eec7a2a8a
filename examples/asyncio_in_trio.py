"""asyncio inside a trio program: a trio server whose handlers are written for asyncio, and use its libraries.

Run with: python examples/asyncio_in_trio.py   (needs trio-asyncio: pip install 'trio_dcore[asyncio]')
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from trio_dcore import Server, aio, rpc


async def shout(line: str, host: str, port: int) -> str:
    """A coroutine of asyncio's, as its libraries are made of."""
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(f"{line}\n".encode())
            return (await reader.readline()).decode().strip()
        finally:
            writer.close()
            await writer.wait_closed()


async def digest(data: bytes) -> str:
    """In a thread of asyncio's executor."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(None, lambda: hashlib.sha256(data).hexdigest()[:8])


async def ticks(interval: float) -> AsyncIterator[int]:
    """A stream; it runs in one asyncio task, and ends with its consumer."""
    n = 0
    try:
        while True:
            yield n
            n += 1
            await asyncio.sleep(interval)
    finally:
        print("the ticks have ended")


async def wait() -> None:
    """Longer than anybody wants to."""
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        print("cancelled, as asyncio does it")
        raise


@asynccontextmanager
async def somebody_elses_server() -> AsyncIterator[tuple[str, int]]:
    """One that knows nothing of trio."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()


async def main() -> None:
    """Serve asyncio code from trio, and call it."""
    async with aio.open_loop(), aio.enter_asyncio(somebody_elses_server) as (host, port):
        handlers = aio.handler({"shout": partial(shout, host=host, port=port), "digest": digest, "ticks": ticks, "wait": wait})
        async with Server(handlers) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
            print(await remote.shout(line="hello"))
            print(await remote.digest(data=b"trio"))
            async with remote.ticks.stream(interval=0.01) as stream:
                async for n in stream:
                    print("tick", n)
                    if n == 2:
                        break
            with trio.move_on_after(0.1):
                await remote.wait()
            print(await aio.run_asyncio(shout, "a trio task calls it, too", host, port))


if __name__ == "__main__":
    trio.run(main)
