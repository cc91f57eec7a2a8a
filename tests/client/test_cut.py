"""A client that gives up while the server reads nothing: the news must not wait behind what nobody reads."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from tests.reference.identities import ours
from trio_dcore import Comm, LimitExceeded, Limits, Server, connect, rpc, send_recv

DROP = bytes(256 * 1024)


async def pour_into_stream(remote: rpc) -> None:
    async with remote.ignore.stream() as stream:
        while True:
            await stream.send(DROP)


async def write_on_a_comm(remote: rpc) -> None:
    async with await connect(remote.address, security=remote.pool.settings.security) as comm:
        await comm.write({"op": "ignore", "reply": True})
        await comm.write(bytes(60 * 2**20))


async def ask_in_vain(remote: rpc) -> None:
    """The server is still busy with the request before."""
    async with await connect(remote.address, security=remote.pool.settings.security) as comm:
        await comm.write({"op": "ignore", "reply": True})
        await send_recv(comm, op="echo", data=bytes(60 * 2**20))


@pytest.mark.parametrize("scheme", ["tcp", "tls", "unix"])
@pytest.mark.parametrize("work", [pour_into_stream, write_on_a_comm, ask_in_vain])
async def test_the_handler_is_told(
    scheme: str, work: Callable[[rpc], Awaitable[None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    cancelled = trio.Event()

    async def ignore(comm: Comm) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    security = ours().security()
    where = f"unix://{tmp_path_factory.mktemp('s')}/s" if scheme == "unix" else f"{scheme}://127.0.0.1:0"
    async with Server({"ignore": ignore}, security=security, grace=0) as server:
        async with rpc(await server.listen(where), security=security) as remote:
            with trio.move_on_after(0.3) as scope:
                await work(remote)
            assert scope.cancelled_caught
            with trio.fail_after(5):
                await cancelled.wait()


async def test_a_stall_ends_for_the_peer_too() -> None:
    """A stream that stalled is closed; its handler learns of it although it reads nothing."""
    cancelled = trio.Event()

    async def ignore(comm: Comm) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    async with Server({"ignore": ignore}, grace=0, limits=Limits(window=1000, window_bytes=2**40)) as server:
        async with rpc(await server.listen("tcp://127.0.0.1:0"), limits=Limits(stream_stall=0.2)) as remote:
            with pytest.raises(LimitExceeded, match="stream_stall"):
                await pour_into_stream(remote)
            with trio.fail_after(5):
                await cancelled.wait()
