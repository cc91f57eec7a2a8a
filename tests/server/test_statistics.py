"""What a server counts."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import trio

from trio_dcore import RemoteError, UnknownOp
from trio_dcore.server import ServerStatistics
from trio_dcore.testing import ManualPeer


async def test_requests_by_op(where: str, serving: Any) -> None:
    def fail() -> None:
        raise ValueError("counted all the same")

    async with serving({"fail": fail}, where) as (server, remote):
        assert server.statistics() == ServerStatistics(
            connections=0, handshaking=0, requests={}, in_flight=0, bytes_read=0, bytes_written=0, errors=0, refused=0, expired=0
        )
        for _ in range(2):
            await remote.echo(data=1)
        with pytest.raises(RemoteError):
            await remote.fail()
        with pytest.raises(UnknownOp):
            await remote.xyzzy()
        statistics = server.statistics()
        assert statistics.requests == {"echo": 2, "fail": 1}
        assert statistics.connections == 1
        assert statistics.handshaking == statistics.in_flight == statistics.errors == statistics.refused == 0


async def test_a_snapshot_stays_as_it_is(serving: Any) -> None:
    async with serving({}) as (server, remote):
        await remote.echo(data=1)
        before = server.statistics()
        await remote.echo(data=1)
        assert before.requests == {"echo": 1}
        assert server.statistics().requests == {"echo": 2}
        with pytest.raises(dataclasses.FrozenInstanceError):
            before.errors = 5
        with pytest.raises(TypeError):
            before.requests["echo"] = 5


async def test_as_a_dict(serving: Any) -> None:
    async with serving({}) as (server, remote):
        await remote.echo(data=1)
        found = server.statistics().as_dict()
        assert list(found) == [each.name for each in dataclasses.fields(ServerStatistics)]
        assert found["requests"] == {"echo": 1}
        assert type(found["requests"]) is dict
        assert found["connections"] == 1


async def test_bytes_are_those_of_the_connections_and_outlive_them(serving: Any) -> None:
    async with serving({}, "tcp://127.0.0.1:0") as (server, remote):
        await remote.echo(data=bytes(1000))
        open_ = server.statistics()
        assert open_.bytes_read > 1000
        assert open_.bytes_written > 1000
        remote.pool.collect()
        while server.statistics().connections:
            await trio.lowlevel.checkpoint()
        closed = server.statistics()
        assert (closed.bytes_read, closed.bytes_written) == (open_.bytes_read, open_.bytes_written)


async def test_inproc_has_no_bytes(serving: Any) -> None:
    async with serving({}) as (server, remote):
        await remote.echo(data=bytes(1000))
        assert server.statistics().bytes_read == 0


async def test_errors_are_connections_that_failed(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trio_dcore.server")
    async with serving({}, "tcp://127.0.0.1:0") as (server, _remote):
        for count in (1, 2):
            async with await ManualPeer.connect(server.address) as peer:
                await peer.handshake()
                assert server.statistics().connections == 1
                await peer.send_bytes(b"\xff" * 64)
                await peer.expect_end()
            assert server.statistics().errors == count
        async with await ManualPeer.connect(server.address) as peer:
            await peer.handshake()
        while server.statistics().connections:
            await trio.lowlevel.checkpoint()
        assert server.statistics().errors == 2
    assert sum("closing the connection" in record.getMessage() for record in caplog.records) == 2
