"""A whole server and a whole client over memory, each facing a peer that sends whatever it is told to."""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import trio
import trio.testing

from trio_dcore import Server, connect, rpc, send_recv
from trio_dcore.errors import CommClosedError, DcoreError, LocalProtocolError
from trio_dcore.protocol import Limits, SerializationError, UnsafePayload
from trio_dcore.testing import MemoryNetwork, MemoryStream, memory_network
from trio_dcore.testing._leaks import Inventory

__all__ = ["ENDINGS", "USES", "attack_client", "attack_server", "no_errors_logged"]

_LIMITS = Limits(message=2**20, message_trusted=2**21, head=2**16, frames=64, error_text=500)
_LOG = logging.getLogger("trio_dcore")


class _Errors(logging.Handler):
    """Collects what is logged as an error, as text, and whatever can't be logged at all, at any level."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception as error:
            self.found.append(f"{record.msg!r} can't be logged: {error!r}")
        else:
            if record.levelno >= logging.ERROR:
                self.found.append(text)


@contextmanager
def no_errors_logged() -> Iterator[None]:
    handler = _Errors()
    _LOG.addHandler(handler)
    level, propagate = _LOG.level, _LOG.propagate
    _LOG.setLevel(logging.DEBUG)
    _LOG.propagate = False
    try:
        yield
    finally:
        _LOG.removeHandler(handler)
        _LOG.setLevel(level)
        _LOG.propagate = propagate
    assert not handler.found, "\n".join(handler.found)


def _run(main: Callable[[MemoryNetwork], Any], trusted: bool) -> None:
    async def run() -> None:
        with memory_network(trusted) as network:
            before = Inventory()
            with trio.fail_after(1_000_000):  # of virtual time: nothing may wait for ever
                await main(network)
            await before.settle()
            assert before.added() == []

    with no_errors_logged():
        trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


# -- the peer --------------------------------------------------------------------------------------------------------------------


async def _close(stream: MemoryStream) -> None:
    await stream.aclose()


async def _reset(stream: MemoryStream) -> None:
    stream.reset()
    await stream.aclose()


async def _half_close(stream: MemoryStream) -> None:
    try:
        await stream.send_eof()
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass
    await stream.aclose()


async def _fall_silent(stream: MemoryStream) -> None:
    """Until the other side has had enough; but a server waits for requests for ever."""
    await trio.sleep(100)
    await stream.aclose()


#: How a peer ends.
ENDINGS: tuple[Callable[[MemoryStream], Any], ...] = (_close, _reset, _half_close, _fall_silent)


async def _misbehave(stream: MemoryStream, data: bytes, sizes: Sequence[int], ending: int) -> None:
    """Send ``data`` in pieces, read whatever comes meanwhile, and end."""
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            try:
                while await stream.receive_some():
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        nursery.start_soon(read)
        position = number = 0
        try:
            while position < len(data):
                size = 1 + sizes[number % len(sizes)] % 2000 if sizes else len(data)
                number += 1
                await stream.send_all(data[position : position + size])
                position += size
                await trio.sleep(0.001 if number % 3 else 0)
        except trio.BrokenResourceError:
            pass
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await ENDINGS[ending % len(ENDINGS)](stream)


# -- a server --------------------------------------------------------------------------------------------------------------------


def _echo(**arguments: Any) -> Any:
    return arguments


async def _add(**arguments: Any) -> Any:
    await trio.lowlevel.checkpoint()
    x, y = arguments.get("x"), arguments.get("y")
    return x + y if type(x) is int and type(y) is int else None


async def _count(**arguments: Any) -> AsyncIterator[int]:
    for number in range(20):
        await trio.sleep(0.01)
        yield number


async def _talk(comm: Any, **arguments: Any) -> None:
    """Read and answer to the end of the stream or comm."""
    while True:
        try:
            message = await comm.read()
            await comm.write(message)
        except (SerializationError, UnsafePayload, TypeError):
            continue  # of this message only; stock's errors are TypeErrors
        except (CommClosedError, trio.EndOfChannel):
            return


_HANDLERS: dict[str, Any] = {"add": _add, "echo": _echo, "identity": _echo, "count": _count, "sums": _talk, "talk": _talk}
_STREAM_HANDLERS: dict[str, Any] = {"note": _echo, "inc": _add}


def attack_server(conversations: Sequence[tuple[bytes, Sequence[int], int]], *, trusted: bool, deserialize: bool = True) -> None:
    """Have a server meet peers that send these bytes, in pieces of these sizes, and end so; an honest call succeeds afterwards."""

    async def main(network: MemoryNetwork) -> None:
        async with Server(_HANDLERS, stream_handlers=_STREAM_HANDLERS, limits=_LIMITS, deserialize=deserialize) as server:
            address = await server.listen("memory://")
            async with trio.open_nursery() as nursery:
                for data, sizes, ending in conversations:
                    nursery.start_soon(_misbehave, await network.connect_stream(address), data, sizes, ending)
                await trio.testing.wait_all_tasks_blocked()
                async with rpc(address) as remote:
                    assert await remote.add(x=1, y=2) == 3
                    async with remote.count.stream() as stream:
                        assert await stream.receive() == 0
            async with rpc(address) as remote:
                assert await remote.echo(x=[b"1"]) == {"x": (b"1",)}
            await trio.testing.wait_all_tasks_blocked()
            assert server._statistics.in_flight == 0

    _run(main, trusted)


# -- a client --------------------------------------------------------------------------------------------------------------------


async def _call(address: str) -> None:
    async with rpc(address, limits=_LIMITS) as remote:
        for _ in range(2):
            await remote.add(x=1, y=2)


async def _stream(address: str) -> None:
    async with rpc(address, limits=_LIMITS) as remote, remote.count.stream() as stream:
        async for _ in stream:
            pass


async def _talk_to(address: str) -> None:
    async with rpc(address, limits=_LIMITS) as remote, remote.talk.stream() as stream:
        for number in range(5):
            try:
                await stream.send(number)
            except LocalProtocolError:
                pass  # the server took itself for a stock one, to which nothing can be sent
            try:
                await stream.receive()
            except trio.EndOfChannel:
                return


async def _plainly(address: str) -> None:
    async with await connect(address, limits=_LIMITS) as comm:
        await send_recv(comm, op="identity")
        await send_recv(comm, op="identity")


async def _opaquely(address: str) -> None:
    async with await connect(address, limits=_LIMITS, deserialize=False) as comm:
        async for message in comm:
            await comm.write(message)


#: What clients do.
USES: tuple[Callable[[str], Any], ...] = (_call, _stream, _talk_to, _plainly, _opaquely)


def attack_client(data: bytes, sizes: Sequence[int], ending: int, use: int, *, trusted: bool) -> None:
    """Have a client meet a server that sends these bytes; it ends, with one of our errors if any, and can call an honest server."""

    async def main(network: MemoryNetwork) -> None:
        async with await network.listen_streams("memory://bad") as listener, trio.open_nursery() as nursery:

            async def accept() -> None:
                while True:
                    nursery.start_soon(_misbehave, await listener.accept(), data, sizes, ending)

            nursery.start_soon(accept)
            with trio.move_on_after(1000):  # a server that says nothing more may be waited for
                await _expecting_our_errors(partial(USES[use % len(USES)], listener.address))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        for _, _, stream in network.open_ends():
            stream.close()  # what the server had when it was cancelled
        async with Server(_HANDLERS) as server, rpc(await server.listen("memory://")) as remote:
            assert await remote.add(x=1, y=2) == 3

    _run(main, trusted)


async def _expecting_our_errors(action: Callable[[], Any]) -> None:
    try:
        await action()
    except LocalProtocolError:
        raise
    except DcoreError as error:
        str(error), repr(error)
    except TypeError as error:
        if traceback.extract_tb(error.__traceback__)[-1].name != "_read_error":
            raise
