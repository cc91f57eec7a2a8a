"""``trio-dcore demo``: a server with handlers of every kind, called in every way, and shut down while a handler runs.

Everything goes over real sockets, and every line that is printed has been checked: if something is not as promised, the demo says
what, and ends with exit code 1.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import trio

from .. import Comm, CommClosedError, ConnectError, RemoteError, Server, ServerClosing, Status, connect, rpc
from ._errors import FAILED, CliError, explained
from ._output import print_line

__all__ = ["run_demo"]

# Nothing here waits for a clock but the last step's connection attempt, so this only ends a demo that hangs.
_AT_MOST = 30.0
_OVERLAPPING = 10
_GRACE = 5.0


class _Handlers:
    """What the example server does.  The events let the demo see, and hold, what happens inside."""

    def __init__(self) -> None:
        self.guests = 0
        self.all_here = trio.Event()
        self.countdown_ended = trio.Event()
        self.work_began = trio.Event()
        self.work_may_end = trio.Event()

    def add(self, x: int, y: int) -> int:
        """A plain function."""
        return x + y

    def divide(self, x: int, y: int) -> float:
        """A plain function that fails if y is 0."""
        return x / y

    async def meet(self, number: int) -> int:
        """An async function, which returns only when as many calls as were announced are in here at once."""
        self.guests += 1
        if self.guests == _OVERLAPPING:
            self.all_here.set()
        await self.all_here.wait()
        return number

    async def spell(self, comm: Comm, word: str) -> None:
        """A handler in Dask's manner, which writes to the comm by itself."""
        for letter in word:
            await comm.write(letter)

    async def countdown(self, start: int) -> AsyncIterator[int]:
        """An async generator: each item that it yields is sent."""
        try:
            for n in range(start, 0, -1):
                yield n
        finally:
            self.countdown_ended.set()

    async def work(self) -> str:
        """Something that is still running when the server is told to stop."""
        self.work_began.set()
        await self.work_may_end.wait()
        return "done"

    def by_name(self) -> dict[str, Callable[..., Any]]:
        """The dict that a Server takes."""
        return {
            "add": self.add,
            "divide": self.divide,
            "meet": self.meet,
            "spell": self.spell,
            "countdown": self.countdown,
            "work": self.work,
        }


def run_demo(args: argparse.Namespace) -> int:
    """Run the demo and say how it went."""
    print_line("trio-dcore demo: a server and its clients in this process, over real sockets\n")

    async def bounded() -> float:
        began = trio.current_time()
        with trio.move_on_after(_AT_MOST) as scope:
            await _demo()
        if scope.cancelled_caught:
            raise CliError(f"not as promised: the demo was not through after {_AT_MOST:.0f} s", FAILED)
        return trio.current_time() - began

    with explained():
        took = trio.run(bounded)
    print_line(f"\nAll of it was as promised, in {took:.2f} s.")
    return 0


async def _step(what: str, action: Callable[[], Awaitable[str]]) -> None:
    """Run one part of the demo and print what it reports, and how long it took."""
    began = trio.current_time()
    report = await action()
    print_line(f"  {what:<9} {report:<88} {(trio.current_time() - began) * 1e3:8.2f} ms")


def _promise(kept: bool, promised: str, seen: object) -> None:
    if not kept:
        raise CliError(f"not as promised: {promised}; instead there was {seen!r}", FAILED)


async def _demo() -> None:
    handlers = _Handlers()
    async with Server(handlers.by_name()) as server:

        async def listen() -> str:
            return f"listens on {await server.listen('tcp://127.0.0.1:0')}"

        await _step("server", listen)
        address = server.address
        await _step("connect", lambda: _one_comm(address))
        async with rpc(address) as remote:
            await _step("rpc", lambda: _overlapping_calls(remote, handlers))
            await _step("errors", lambda: _remote_error(remote))
            await _step("stream", lambda: _written_items(remote))
            await _step("stream", lambda: _left_early(remote, handlers))
            await _step("shutdown", lambda: _stopped_during_a_call(server, remote, handlers))


async def _one_comm(address: str) -> str:
    async with await connect(address) as comm:
        await comm.write({"op": "add", "x": 1, "y": 2})
        answer = await comm.read()
    _promise(answer == 3, "add(1, 2) over a comm is 3", answer)
    return "one comm, a request written and its reply read: add(x=1, y=2) = 3"


async def _overlapping_calls(remote: Any, handlers: _Handlers) -> str:
    answers: set[int] = set()

    async def call(number: int) -> None:
        answers.add(await remote.meet(number=number))

    async with trio.open_nursery() as nursery:
        for number in range(_OVERLAPPING):
            nursery.start_soon(call, number)
    _promise(answers == set(range(_OVERLAPPING)), "every call gets its own answer", answers)
    return f"{_OVERLAPPING} client tasks call at once; all were in their handlers at the same time"


async def _remote_error(remote: Any) -> str:
    try:
        answer = await remote.divide(x=1, y=0)
    except ZeroDivisionError as exc:
        _promise(isinstance(exc, RemoteError), "a remote error is a RemoteError as well", exc)
    else:
        _promise(False, "divide(1, 0) raises ZeroDivisionError here", answer)
    answer = await remote.divide(x=1, y=2)
    _promise(answer == 0.5, "the next call works", answer)
    return "divide(x=1, y=0) raised ZeroDivisionError here, and the next call works"


async def _written_items(remote: Any) -> str:
    async with remote.spell.stream(word="trio") as stream:
        letters = [letter async for letter in stream]
    _promise(letters == list("trio"), "a handler's writes arrive in order", letters)
    return f"a handler that writes to its comm: {' '.join(letters)}"


async def _left_early(remote: Any, handlers: _Handlers) -> str:
    seen = []
    async with remote.countdown.stream(start=1_000_000) as stream:
        async for item in stream:
            seen.append(item)
            if len(seen) == 3:
                break
    _promise(seen == [1_000_000, 999_999, 999_998], "a generator's items arrive in order", seen)
    await handlers.countdown_ended.wait()
    return "a long generator: took 3 items and left; the generator over there was ended"


async def _stopped_during_a_call(server: Server, remote: Any, handlers: _Handlers) -> str:
    replies = []

    async def call() -> None:
        replies.append(await remote.work())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await handlers.work_began.wait()
        address = server.address
        server.stop(grace=_GRACE)
        _promise(server.status is Status.closing_gracefully, "the server is draining", server.status)
        try:
            async with rpc(address, timeout=0.2) as newcomer:
                answer = await newcomer.add(x=1, y=2)
        except (ConnectError, CommClosedError, ServerClosing):
            _promise(not replies, "the handler is still running", replies)
        else:
            _promise(False, "newcomers are refused", answer)
        handlers.work_may_end.set()
    _promise(replies == ["done"], "the reply of the running handler arrives", replies)
    await server.finished()
    _promise(server.status is Status.closed, "the server is closed", server.status)
    return "stopped while a handler ran: newcomers refused, its reply still arrived, then closed"
