"""What one small call costs, counted: the guard of the path that is measured in benchmarks/.

A figure that grows here is a slower call everywhere.  Client and server share one trio run, so each number is of both ends together::

    client                                   server
    poll: is the idle comm stale?
    send: the request
    poll: is the answer there?  no: wait
                                             recv: the request
                                             send: the answer
                                             poll: is another request there?  no: wait
    recv: the answer

Every wait is one ``epoll_ctl`` and one step of a task.  A call with a deadline adds one cancel scope, at the server.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import trio
import trio.testing

from trio_dcore import Server, connect, rpc

CALLS = 64
#: Calls into the kernel that are made for one small call, both ends together.
SYSTEM_CALLS = {"send": 2, "recv": 2, "poll of one socket": 3, "epoll_ctl": 2}


class Steps(trio.abc.Instrument):
    """Counts the steps of tasks, and the tasks that are started."""

    def __init__(self) -> None:
        self.steps = 0
        self.spawned = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self.spawned += 1


class Profile:
    """Counts calls of functions written in C that go to the kernel."""

    NAMES = {  # noqa: RUF012  # never changed
        ("socket", "send"): "send",
        ("socket", "sendmsg"): "sendmsg",
        ("socket", "recv"): "recv",
        ("socket", "recv_into"): "recv_into",
        ("poll", "poll"): "poll of one socket",
        ("epoll", "modify"): "epoll_ctl",
        ("epoll", "register"): "epoll_ctl",
        ("epoll", "unregister"): "epoll_ctl",
    }

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, frame: object, event: str, function: Any) -> None:
        if event == "c_call":
            owner = type(getattr(function, "__self__", None)).__name__
            name = self.NAMES.get((owner, function.__name__))
            if name is not None:
                self.counts[name] += 1

    def __enter__(self) -> Profile:
        sys.setprofile(self)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)


class Scopes:
    """Counts cancel scopes that are entered, nurseries that are opened and events that are waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        for owner, method, what in (
            (trio.CancelScope, "__enter__", "scope"),
            (trio.Event, "wait", "event"),
            (trio.lowlevel.ParkingLot, "park", "park"),
        ):
            self._count(monkeypatch, owner, method, what)

    def _count(self, monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, what: str) -> None:
        original = getattr(owner, method)

        def counted(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.counts[what] += 1
            return original(this, *args, **kwargs)

        monkeypatch.setattr(owner, method, counted)


async def add(x: int, y: int) -> int:
    return x + y


async def nothing_else_runs() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def test_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per call: the system calls above, two steps (one at each end), and no task, scope, event or checkpoint."""
    async with Server({"add": add}) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
        await remote.add(x=1, y=2)
        await nothing_else_runs()
        scopes = Scopes(monkeypatch)
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        try:
            with Profile() as profile:
                for number in range(CALLS):
                    assert await remote.add(x=number, y=1) == number + 1
        finally:
            trio.lowlevel.remove_instrument(steps)
        assert dict(profile.counts) == {name: count * CALLS for name, count in SYSTEM_CALLS.items()}
        # One step when the answer is there, one when the request is: an extra checkpoint would show as a third.
        assert steps.steps == 2 * CALLS
        assert steps.spawned == 0
        assert not scopes.counts


async def test_a_deadline_adds_one_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Server({"add": add}) as server, rpc(await server.listen("tcp://127.0.0.1:0")) as remote:
        await remote.add(x=1, y=2)
        await nothing_else_runs()
        with trio.move_on_after(1000):
            scopes = Scopes(monkeypatch)
            with Profile() as profile:
                for number in range(CALLS):
                    await remote.add(x=number, y=1)
        assert scopes.counts == {"scope": CALLS}
        assert dict(profile.counts) == {name: count * CALLS for name, count in SYSTEM_CALLS.items()}


async def test_a_request_on_a_bare_comm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a call, but nobody asks whether the comm is stale."""
    async with Server({"add": add}) as server:
        comm = await connect(await server.listen("tcp://127.0.0.1:0"))
        async with comm:
            await nothing_else_runs()
            scopes = Scopes(monkeypatch)
            steps = Steps()
            trio.lowlevel.add_instrument(steps)
            try:
                with Profile() as profile:
                    for number in range(CALLS):
                        await comm.write({"op": "add", "x": number, "y": 1})
                        assert await comm.read() == number + 1
            finally:
                trio.lowlevel.remove_instrument(steps)
            assert dict(profile.counts) == {
                "send": 2 * CALLS,
                "recv": 2 * CALLS,
                "poll of one socket": 2 * CALLS,
                "epoll_ctl": 2 * CALLS,
            }
            assert steps.steps == 2 * CALLS
            assert steps.spawned == 0
            assert not scopes.counts
