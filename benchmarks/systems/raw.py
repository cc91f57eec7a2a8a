"""The unit of every ratio: an echo as a careful hand-written trio program starts out.

``trio.SocketStream``, a 4-byte length prefix, header and payload in one send, no codec and no dispatch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from . import AsyncFn, Call

_CHUNK = 65536
# As long as the msgpack of a Dask request for add(x=1, y=2): {"op": "add", "x": 1, "y": 2, "reply": True}.
_PAYLOAD = bytes(21)
# First bytes of the one request that is no echo; the number of messages to write follows.
_EMIT = b"emit"


class _Frames:
    """Reads length-prefixed frames from a stream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def next(self) -> bytes | None:
        buffer = self._buffer
        while True:
            if len(buffer) >= 4:
                end = 4 + int.from_bytes(buffer[:4], "big")
                if len(buffer) >= end:
                    frame = bytes(buffer[4:end])
                    del buffer[:end]
                    return frame
            chunk = await self._stream.receive_some(_CHUNK)
            if not chunk:
                return None
            buffer += chunk


def _framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


async def _handle(stream: trio.SocketStream) -> None:
    frames = _Frames(stream)
    try:
        async with stream:
            while (frame := await frames.next()) is not None:
                if frame.startswith(_EMIT):
                    message = _framed(_PAYLOAD)
                    for _ in range(int(frame[len(_EMIT) :])):
                        await stream.send_all(message)
                else:
                    await stream.send_all(_framed(frame))
    except trio.BrokenResourceError:
        return  # the client left while we wrote


class _RawLink:
    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._frames = _Frames(stream)

    async def call(self) -> Any:
        await self._stream.send_all(_framed(_PAYLOAD))
        return await self._frames.next()

    async def aclose(self) -> None:
        await self._stream.aclose()


class RawSystem:
    """Raw trio echo."""

    def run(self, afn: AsyncFn, *args: Any) -> Any:
        return trio.run(afn, *args)

    async def gather(self, afns: list[Call]) -> None:
        async with trio.open_nursery() as nursery:
            for afn in afns:
                nursery.start_soon(afn)

    async def serve(self, announce: Callable[[str], None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=2048)
        announce(f"tcp://127.0.0.1:{listeners[0].socket.getsockname()[1]}")
        await trio.serve_listeners(_handle, listeners)

    async def open(self, address: str, how: str, op: str) -> _RawLink:
        return _RawLink(await self._stream(address))

    async def connect(self, address: str) -> None:
        stream = await self._stream(address)
        await stream.aclose()

    async def drain(self, address: str, count: int, start: Callable[[], None]) -> None:
        async with await self._stream(address) as stream:
            frames = _Frames(stream)
            await stream.send_all(_framed(_EMIT + str(count).encode()))
            await frames.next()
            start()
            for _ in range(count - 1):
                await frames.next()

    async def _stream(self, address: str) -> trio.SocketStream:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        return await trio.open_tcp_stream(host, int(port))


SYSTEM = RawSystem()
