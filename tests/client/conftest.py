"""Servers that follow a script: ours by hand, and stock ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio

from trio_dcore.abc import CommSettings
from trio_dcore.comm import get_transport, parse_address
from trio_dcore.errors import CommClosedError
from trio_dcore.testing import ManualPeer

Script = Callable[[Any, int], Awaitable[None]]
Scripted = Callable[..., AbstractAsyncContextManager[str]]


async def _too_slow(patience: float) -> None:
    await trio.sleep(patience)
    raise trio.TooSlowError(f"the test has not ended within {patience} s")


@pytest.fixture
def scripted() -> Scripted:
    """A server that speaks the extension as a script tells it to: ``async with scripted(where, script) as address``.

    For every connection, after its handshake, ``script(comm, number)`` is run, numbers counting from 1; then the comm is closed.
    """

    @asynccontextmanager
    async def serve(where: str, script: Script, *, patience: float = 10.0) -> AsyncIterator[str]:
        scheme, location = parse_address(where)
        (listener,) = await get_transport(scheme).listen(location, CommSettings())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_too_slow, patience)

                async def accept() -> None:
                    number = 0
                    while True:
                        comm = await listener.accept()
                        number += 1
                        nursery.start_soon(run, comm, number)

                async def run(comm: Any, number: int) -> None:
                    try:
                        await comm.handshake()
                        await script(comm, number)
                    except CommClosedError:
                        pass  # the client has gone
                    finally:
                        comm.abort()

                nursery.start_soon(accept)
                yield listener.contact_address
                nursery.cancel_scope.cancel()
        finally:
            listener.close()

    return serve


@pytest.fixture
def stock_like() -> Scripted:
    """A server that speaks plain Dask messages as a script tells it to: ``async with stock_like(script) as address``.

    For every connection, after its handshake, ``script(peer, number)`` is run with a ManualPeer; then the connection is closed.
    """

    @asynccontextmanager
    async def serve(script: Script, *, patience: float = 10.0) -> AsyncIterator[str]:
        number = 0

        async def run(stream: trio.SocketStream) -> None:
            nonlocal number
            number += 1
            mine = number
            async with ManualPeer(stream) as peer:
                try:
                    await peer.handshake()
                    await script(peer, mine)
                except (CommClosedError, trio.BrokenResourceError):
                    pass  # the client has gone

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_too_slow, patience)
            (listener,) = await nursery.start(partial(trio.serve_tcp, run, 0, host="127.0.0.1"))
            yield f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}"
            nursery.cancel_scope.cancel()

    return serve
