"""Which comms compress what they send."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from trio_dcore import ConnectionPool, Server, connect, rpc, to_serialize
from trio_dcore.abc import CommSettings, Peer
from trio_dcore.comm import FramedComm, StreamPump, _greeting
from trio_dcore.testing import memory_stream_pair

_DEFAULTS: Any = (None, None, True, None, None)
HERE, THERE = "tcp://10.0.0.1:1", "tcp://10.0.0.2:2"


@asynccontextmanager
async def peers(local: str, remote: str, **settings: Any) -> AsyncIterator[tuple[FramedComm, FramedComm]]:
    """Two ends at those addresses, after the handshake."""
    made = []
    for stream, here, there in zip(memory_stream_pair(), (local, remote), (remote, local), strict=True):
        peer = Peer(there, "memory" if there.startswith("memory") else "tcp", verify=lambda: (True, "for the test"))
        made.append(
            FramedComm(StreamPump(stream), local_address=here, peer=peer, settings=CommSettings.of(*_DEFAULTS, **settings))
        )
    try:
        async with trio.open_nursery() as nursery:
            for comm in made:
                nursery.start_soon(comm.handshake)
        yield made[0], made[1]
    finally:
        for comm in made:
            comm.abort()


async def written(comm: FramedComm) -> int:
    """Bytes of a message with 20 000 zeros in a payload."""
    return await comm.write(to_serialize(bytes(20_000)))


async def test_compression_is_off_by_default() -> None:
    async with peers(HERE, THERE) as (client, server):
        assert (await written(client), await written(server)) > (20_000, 20_000)


@pytest.mark.parametrize("codec", ["lz4", "snappy", "zlib", "zstd"])
@pytest.mark.parametrize("place", [THERE, "tcp://10.0.0.1:2", "memory://x"])
async def test_a_codec_asked_for_by_name_is_used_everywhere(codec: str, place: str) -> None:
    async with peers(HERE, place, compression=codec) as (client, server):
        for one, other in ((client, server), (server, client)):
            assert await written(one) < 3000
            assert await other.read() == bytes(20_000)


async def test_auto_is_negotiated_and_not_for_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for local, remote in ((HERE, THERE), ("odd://a", "odd://b")):
        async with peers(local, remote, compression="auto") as (client, server):
            assert max(await written(client), await written(server)) < 3000
    for local, remote in ((HERE, "tcp://10.0.0.1:2"), ("memory://a", "memory://b")):
        async with peers(local, remote, compression="auto") as (client, _):
            assert await written(client) > 20_000
    choice = iter(["lz4", "snappy"])
    monkeypatch.setattr(_greeting, "default_codec", lambda: next(choice))
    async with peers(HERE, THERE, compression="auto") as (client, server):
        assert min(await written(client), await written(server)) > 20_000


@pytest.mark.parametrize("made", [connect, rpc, ConnectionPool, Server])
async def test_a_setting_that_is_none(made: Any) -> None:
    arguments = ("tcp://127.0.0.1:9",) if made in (connect, rpc) else ()
    for setting in ({"compression": "brotli"}, {"offload": -1}):
        with pytest.raises(ValueError, match="must be"):
            found = made(*arguments, **setting)
            await found  # connect()
