"""A server in a thread of its own: the command line starts trio by itself, so the tests are plain functions."""

from __future__ import annotations

import queue
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import trio

from trio_dcore import Comm, Server


class Opaque:
    """Something that JSON does not know."""

    def __repr__(self) -> str:
        return "<opaque>"


def add(x: Any, y: Any) -> Any:
    return x + y


def fail(text: str) -> None:
    raise ValueError(text)


def describe() -> dict[str, Any]:
    return {"bytes": b"hello", "tuple": (1, 2), "set": {2, 1}, "ratio": 0.5, "none": None}


async def count(comm: Comm, n: int) -> None:
    for i in range(n):
        await comm.write(i)


async def forever() -> AsyncIterator[dict[str, int]]:
    n = 0
    while True:
        yield {"n": n}
        n += 1


async def hang() -> None:
    await trio.sleep_forever()


def fail_in_red() -> None:
    exec(compile("raise ValueError('red')", "\x1b[31m\x9b2J", "exec"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a running server."""
    answers: queue.Queue[Any] = queue.Queue()
    handlers = {
        "add": add,
        "fail": fail,
        "fail_in_red": fail_in_red,
        "describe": describe,
        "count": count,
        "forever": forever,
        "hang": hang,
        "odd-name": describe,
    }

    async def serve() -> None:
        async with Server(handlers, grace=0) as server:
            answers.put((await server.listen("tcp://127.0.0.1:0"), trio.lowlevel.current_trio_token(), server))
            await server.finished()

    def run() -> None:
        try:
            trio.run(serve)
        except BaseException as exc:
            answers.put(exc)
            raise
        answers.put(None)

    thread = threading.Thread(target=run, name="server for the tests of the command line")
    thread.start()
    started = answers.get(timeout=30)
    if isinstance(started, BaseException):
        raise started
    where, token, server = started
    yield where
    token.run_sync_soon(server.stop, 0)
    thread.join(30)
    assert answers.get(timeout=30) is None
