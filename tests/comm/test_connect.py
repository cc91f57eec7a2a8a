"""connect(): attempts, pauses, and the time that all of it may take.  Time is virtual but where there are sockets."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore import Comm, Limits, Security, connect
from trio_dcore.abc import CommSettings, Listener, Transport
from trio_dcore.comm import _connect, _registry, check_encryption, get_transport
from trio_dcore.errors import AddressError, ConnectError, LocalProtocolError, RemoteProtocolError
from trio_dcore.protocol import dumps
from trio_dcore.protocol._frames import single_frame
from trio_dcore.testing import MemoryStream, memory_stream_pair

PATIENCE = 10.0


class Scripted(Transport):
    """A transport whose attempts go as a test says: an error to raise, seconds to take first, or a stream's other end to play."""

    scheme = "scripted"

    def __init__(self, over_stream: Callable[..., Any]) -> None:
        self.over_stream = over_stream
        self.attempt: Callable[[int], Any] = lambda n: None
        self.begun: list[float] = []
        self.made: list[Any] = []
        self.others: list[MemoryStream] = []
        self.connected = trio.Event()

    async def connect(self, location: str, settings: CommSettings) -> Comm:
        self.begun.append(trio.current_time())
        step = self.attempt(len(self.begun))
        if isinstance(step, (int, float)):
            await trio.sleep(step)
        await trio.lowlevel.checkpoint()
        if isinstance(step, BaseException):
            raise step
        ours, theirs = memory_stream_pair()
        self.others.append(theirs)
        comm: Comm = self.over_stream(ours, limits=settings.limits, security=settings.security)
        self.made.append(comm)
        self.connected.set()
        return comm

    async def listen(self, location: str, settings: CommSettings) -> list[Listener]:
        raise NotImplementedError

    async def answer(self, message: Any = None) -> None:
        """As a peer that shakes hands."""
        from trio_dcore.protocol import local_handshake

        await self.connected.wait()
        message = local_handshake(compression=None, window=(16, 2**20)) if message is None else message
        await self.others[-1].send_all(single_frame(dumps(message)[0]))


@pytest.fixture
def scripted(over_stream: Any, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    transport = Scripted(over_stream)
    monkeypatch.setitem(_registry._transports, "scripted", transport)
    return transport


async def fails(**options: Any) -> ConnectError:
    with pytest.raises(ConnectError) as caught:
        await connect("scripted://x", **options)
    return caught.value


class TestTime:
    async def test_silence_at_the_first_attempt_takes_a_fifth(self, scripted: Scripted, autojump_clock: Any) -> None:
        """A lost packet must not use up all the time (distributed.comm.core.connect)."""
        scripted.attempt = lambda n: 1e6
        begun = trio.current_time()
        error = await fails(timeout=10)
        assert trio.current_time() - begun == pytest.approx(10)
        assert len(scripted.begun) == 2
        assert 2 <= scripted.begun[1] - begun <= 2.03
        assert "could not connect to scripted://x within 10 s (timeout): no answer within 2 s" in str(error)
        assert isinstance(error.__cause__, TimeoutError)

    async def test_pauses_grow_and_are_random(
        self, scripted: Scripted, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[float, float]] = []

        def longest(low: float, high: float) -> float:
            asked.append((low, high))
            return high

        monkeypatch.setattr(_connect.random, "uniform", longest)
        scripted.attempt = lambda n: ConnectionRefusedError("refused")
        begun = trio.current_time()
        error = await fails(timeout=30.0)
        assert trio.current_time() - begun == pytest.approx(30)
        assert asked == [(0, 0.01 * 2**n) for n in range(1, 11)] + [(0, 10.24)]
        assert len(scripted.begun) == len(asked)
        assert isinstance(error.__cause__, ConnectionRefusedError)
        assert "refused" in str(error)

    async def test_it_succeeds_when_somebody_is_there(self, scripted: Scripted, autojump_clock: Any) -> None:
        scripted.attempt = lambda n: OSError("not yet") if n < 5 else None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scripted.answer)
            comm = await connect("scripted://x")
        assert len(scripted.begun) == 5
        comm.abort()

    async def test_no_limit_is_no_limit(self, scripted: Scripted, autojump_clock: Any) -> None:
        scripted.attempt = lambda n: 1e6 if n == 1 else None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scripted.answer)
            comm = await connect("scripted://x", timeout=None, limits=Limits(handshake_timeout=None))
        assert trio.current_time() >= 1e6
        assert len(scripted.begun) == 1
        comm.abort()

    @pytest.mark.parametrize("timeout", [0, -5])
    async def test_no_time_at_all(self, scripted: Scripted, timeout: float) -> None:
        error = await fails(timeout=timeout)
        assert f"within {timeout} s (timeout)" in str(error)
        assert scripted.made == []

    async def test_the_handshake_is_in_it(self, scripted: Scripted, autojump_clock: Any) -> None:
        scripted.attempt = lambda n: 0.5
        begun = trio.current_time()
        error = await fails(timeout=3)
        assert trio.current_time() - begun == pytest.approx(3)
        assert "within 3 s (timeout): the peer accepted the connection and stayed silent" in str(error)
        assert scripted.made[0].closed()
        assert len(scripted.made) == 1

    @pytest.mark.parametrize("timeout", [None, 100.0])
    async def test_the_handshake_has_a_limit_of_its_own(
        self, scripted: Scripted, autojump_clock: Any, timeout: float | None
    ) -> None:
        begun = trio.current_time()
        error = await fails(timeout=timeout, limits=Limits(handshake_timeout=4))
        assert trio.current_time() - begun == pytest.approx(4)
        assert "within 4 s (Limits.handshake_timeout)" in str(error)
        assert isinstance(error.__cause__, TimeoutError)
        assert scripted.made[0].closed()

    async def test_a_slow_handshake_within_it(self, scripted: Scripted, autojump_clock: Any) -> None:
        async def slowly() -> None:
            await trio.sleep(0.4)
            await scripted.answer()

        scripted.attempt = lambda n: 0.4 if n == 1 else OSError()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slowly)
            comm = await connect("scripted://x", timeout=10.0, limits=Limits(handshake_timeout=0.5))
        comm.abort()


class TestHandshake:
    @pytest.mark.parametrize(
        ("data", "cause", "text"),
        [
            (single_frame(dumps(5)[0]), RemoteProtocolError, "the handshake failed: "),
            (single_frame(dumps({"compression": None})[0]), RemoteProtocolError, "pickle-protocol"),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", RemoteProtocolError, "the handshake failed: what came looks like HTTP"),
            (b"\x15\x03\x03\x00\x02\x02\x28", RemoteProtocolError, "looks like TLS"),
            (bytes(16), RemoteProtocolError, "zero frames"),
            (b"", OSError, "closed the comm during the handshake"),
            (b"\x11\0\0\0\0", OSError, "in the middle of a message"),
        ],
    )
    async def test_one_that_fails_is_not_repeated(
        self, scripted: Scripted, autojump_clock: Any, data: bytes, cause: type[Exception], text: str
    ) -> None:
        async def answer() -> None:
            await scripted.connected.wait()
            await scripted.others[0].send_all(data)
            await scripted.others[0].send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            error = await fails()
        assert isinstance(error.__cause__, cause)
        assert text in str(error)
        assert len(scripted.begun) == 1
        assert scripted.made[0].closed()

    async def test_a_stock_peer(self, scripted: Scripted, autojump_clock: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scripted.answer, {"compression": None, "python": (3, 11, 0), "pickle-protocol": 5})
            comm: Any = await connect("scripted://x")
        assert comm.extension is None
        comm.abort()


class TestErrors:
    async def test_what_will_never_work_is_raised_at_once(self, scripted: Scripted) -> None:
        for error in (AddressError("no such place"), LocalProtocolError("not like this"), ValueError("a bug")):
            scripted.attempt = lambda n, error=error: error  # type: ignore[misc]
            with pytest.raises(type(error), match=str(error)):
                await connect("scripted://x")
        assert len(scripted.begun) == 3

    @pytest.mark.parametrize(
        "address", ["", ":8786", "tcp://:8786", "127.0.0.1", "tcp://::1:5", "nowhere://x", "ws://127.0.0.1:1"]
    )
    async def test_what_is_no_address(self, address: str) -> None:
        with pytest.raises(AddressError):
            await connect(address)

    async def test_what_is_no_text(self) -> None:
        with pytest.raises(TypeError):
            await connect(5)  # type: ignore[arg-type]

    async def test_plain_text_where_encryption_is_required(self, scripted: Scripted) -> None:
        with pytest.raises(LocalProtocolError, match=r"scripted:// isn't encrypted, and Security\(require_encryption=True\)"):
            await connect("scripted://x", security=Security(require_encryption=True))
        assert scripted.begun == []
        scripted.encrypted = True
        check_encryption("scripted", CommSettings(security=Security(require_encryption=True)))

    async def test_a_transport_that_makes_something_else(self, scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
        class Something:
            aborted = False

            def abort(self) -> None:
                self.aborted = True

        made = Something()

        async def other(location: str, settings: CommSettings) -> Any:
            await trio.lowlevel.checkpoint()
            return made

        monkeypatch.setattr(scripted, "connect", other)
        with pytest.raises(TypeError, match=r"the transport for scripted:// made .*, which is no trio_dcore\.comm\.BaseComm"):
            await connect("scripted://x")
        assert made.aborted

    async def test_families_are_sequences(self, scripted: Scripted) -> None:
        with pytest.raises(TypeError, match="serializers='pickle'"):
            await connect("scripted://x", serializers="pickle")


class TestCancellation:
    @pytest.mark.parametrize("where", ["connecting", "pausing", "shaking hands"])
    async def test_nothing_is_left(self, scripted: Scripted, autojump_clock: Any, where: str) -> None:
        scripted.attempt = {
            "connecting": lambda n: 1e6,
            "pausing": lambda n: OSError("no"),
            "shaking hands": lambda n: None,
        }[where]
        with trio.move_on_after(0.015 if where == "pausing" else 1) as scope:
            await connect("scripted://x", timeout=None)
        assert scope.cancelled_caught
        assert all(comm.closed() for comm in scripted.made)
        assert len(scripted.made) == (where == "shaking hands")

    async def test_before_it_begins(self, scripted: Scripted) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await connect("scripted://x")
        assert scope.cancelled_caught
        assert scripted.made == []

    @pytest.mark.parametrize("kind", ["tcp", "inproc"])
    async def test_at_every_step(self, kind: str) -> None:
        """On a real socket: after the n-th step of its task, for every n (leaves_nothing looks at the descriptors)."""
        (listener,) = await get_transport(kind).listen("127.0.0.1:0" if kind == "tcp" else "", CommSettings())

        async def serve() -> None:
            async with trio.open_nursery() as nursery:
                while True:
                    comm: Any = await listener.accept()
                    nursery.start_soon(shake, comm)

        async def shake(comm: Any) -> None:
            try:
                await comm.handshake()
            except OSError:
                pass
            finally:
                comm.abort()

        class CancelAt(trio.abc.Instrument):
            def __init__(self, step: int) -> None:
                self.left = step
                self.scope = trio.CancelScope()

            def before_task_step(self, task: trio.lowlevel.Task) -> None:
                if task.name == "connecting":
                    self.left -= 1
                    if self.left == 0:
                        self.scope.cancel()

        async def one(instrument: CancelAt, done: list[bool]) -> None:
            with instrument.scope:
                comm = await connect(listener.contact_address)
                comm.abort()
                done.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            for step in range(1, 50):
                instrument = CancelAt(step)
                done: list[bool] = []
                trio.lowlevel.add_instrument(instrument)
                async with trio.open_nursery() as inner:
                    inner.start_soon(one, instrument, done, name="connecting")
                trio.lowlevel.remove_instrument(instrument)
                if instrument.left > 0:
                    break
            assert done
            assert step > 2
            nursery.cancel_scope.cancel()
        listener.close()


class TestSockets:
    async def test_somebody_who_accepts_and_stays_silent(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = "{}:{}".format(*silent.getsockname())
            with pytest.raises(ConnectError, match=r"could not connect to tcp://127\.0\.0\.1:\d+ within 0\.05 s"):
                await connect(address, timeout=0.05)

    async def test_nobody_there(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            address = "tcp://{}:{}".format(*gone.getsockname())
        with pytest.raises(ConnectError) as caught:
            await connect(address, timeout=0.1)
        assert isinstance(caught.value.__cause__, ConnectionRefusedError)

    async def test_somebody_who_comes_late(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            location = "{}:{}".format(*gone.getsockname())

        async def late() -> None:
            await trio.sleep(0.05)
            (listener,) = await get_transport("tcp").listen(location, CommSettings())
            comm: Any = await listener.accept()
            listener.close()
            await comm.handshake()
            assert await comm.read() == "hello"
            comm.abort()

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(late)
                async with await connect(location) as comm:
                    await comm.write("hello")

    async def test_many_at_once(self) -> None:
        (listener,) = await get_transport("tcp").listen("127.0.0.1:0", CommSettings())

        async def serve() -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(echo, await listener.accept())

        async def echo(comm: Any) -> None:
            await comm.handshake()
            async with comm:
                async for message in comm:
                    await comm.send(message)

        async def call(n: int) -> None:
            async with await connect(listener.contact_address) as comm:
                await comm.send(n)
                assert await comm.receive() == n

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                for n in range(50):
                    nursery.start_soon(call, n)
        listener.close()
