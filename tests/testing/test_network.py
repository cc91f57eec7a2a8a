from __future__ import annotations

import functools

import pytest
import trio
import trio.testing

from trio_dcore import AddressError, ConnectError, LocalProtocolError, Server, UnsafePayload, connect, rpc
from trio_dcore.testing import FaultStream, ManualPeer, MemoryStream, memory_network


class Opaque:
    """Takes a pickle to send."""


def identity(x: object) -> object:
    return x


async def test_calls_over_memory() -> None:
    with memory_network() as network:
        async with Server({"identity": identity}) as server:
            address = await server.listen("memory://")
            assert address == server.address == "memory://server-1"
            async with rpc(address) as remote:
                assert await remote.identity(x=[1, b"2"]) == (1, b"2")
                assert isinstance(await remote.identity(x=Opaque()), Opaque)
                (connection,) = server._connections
                assert connection.comm.peer.kind == "memory"
                assert [each[:2] for each in network.open_ends()] == [(1, "client"), (1, "server")]
        assert network.open_ends() == []
        assert len(network.connections) == 1


async def test_strangers() -> None:
    with memory_network(trusted=False):
        async with Server({"identity": identity}) as server, rpc(await server.listen("memory://")) as remote:
            with pytest.raises(UnsafePayload):
                await remote.identity(x=Opaque())
            assert await remote.identity(x=1) == 1


async def test_a_timeout_takes_no_time(autojump_clock: trio.testing.MockClock) -> None:
    with memory_network():
        async with Server({"slow": functools.partial(trio.sleep, 10_000)}) as server:
            start = trio.current_time()
            async with rpc(await server.listen("memory://named")) as remote:
                with trio.move_on_after(5000):
                    await remote.slow()
            assert trio.current_time() - start == 5000


async def test_capacity_is_what_a_writer_need_not_wait_for() -> None:
    with memory_network(capacity=100) as network:
        async with await network.listen_streams() as listener:
            stream = await network.connect_stream(listener.address)
            assert stream.send_nowait(b"x" * 1000) == 100
            stream.close()


async def test_bare_streams_both_ways() -> None:
    with memory_network() as network:
        async with await network.listen_streams("memory://by-hand") as listener, trio.open_nursery() as nursery:
            served: list[ManualPeer] = []

            async def serve() -> None:
                peer = ManualPeer(await listener.accept())
                await peer.handshake()
                served.append(peer)

            nursery.start_soon(serve)
            comm = await connect("memory://by-hand")
            await trio.testing.wait_all_tasks_blocked()
            await comm.write("hello")
            assert await served[0].receive() == "hello"
            await served[0].send({"it": "is by hand"})
            assert await comm.read() == {"it": "is by hand"}
            comm.abort()
            assert await served[0].expect_end()
            await served[0].aclose()
        with pytest.raises(ConnectionRefusedError):
            await network.connect_stream("memory://by-hand")
        with pytest.raises(trio.ClosedResourceError):
            await listener.accept()


async def test_accepting_can_be_cancelled_without_loss() -> None:
    with memory_network() as network:
        async with await network.listen_streams() as listener:
            accepted: list[MemoryStream] = []

            async def accept() -> None:
                accepted.append(await listener.accept())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept)
                await trio.testing.wait_all_tasks_blocked()
                client = await network.connect_stream(listener.address)
                nursery.cancel_scope.cancel()  # in the moment in which it is to be accepted
            if not accepted:
                await accept()
            await client.send_all(b"still there")
            assert await accepted[0].receive_some() == b"still there"
            for stream in (*accepted, client):
                stream.close()


async def test_a_listener_that_closes_resets_its_backlog() -> None:
    with memory_network() as network:
        listener = await network.listen_streams()
        client = await network.connect_stream(listener.address)
        await listener.aclose()
        await listener.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        client.close()
        assert network.open_ends() == []


async def test_every_new_end_can_be_wrapped() -> None:
    wrapped: list[tuple[str, FaultStream]] = []

    def wrap(stream: trio.abc.Stream, side: str) -> trio.abc.Stream:
        wrapped.append((side, FaultStream(stream)))
        return wrapped[-1][1]

    with memory_network() as network:
        network.wrap = wrap
        async with Server() as server, rpc(await server.listen("memory://")) as remote:
            assert await remote.echo(data=b"x" * 100_000) == b"x" * 100_000
        assert [side for side, _ in wrapped] == ["client", "server"]
        (_, client), (_, server_end) = wrapped
        assert client.sent == server_end.received > 100_000


async def test_what_does_not_work() -> None:
    with pytest.raises(LocalProtocolError, match="inside `with memory_network"):
        await connect("memory://x", timeout=1)
    with memory_network():
        with pytest.raises(LocalProtocolError, match="already"), memory_network():
            pass
        async with Server() as server:
            await server.listen("memory://here")
            with pytest.raises(AddressError, match="taken"):
                await server.listen("memory://here")
        with pytest.raises(ConnectError, match="nobody listens"):
            await connect("memory://here", timeout=0.01)
