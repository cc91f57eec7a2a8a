"""Kinds of handler, and how the server tells."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio

from trio_dcore import RemoteError, connect, in_thread, run_to_end, send_recv
from trio_dcore.server._handlers import HandlerEntry, closest, wrong_arguments


def add(x: int, y: int = 1) -> int:
    return x + y


async def add_async(x: int, y: int = 1) -> int:
    await trio.lowlevel.checkpoint()
    return x + y


async def add_comm(comm: Any, x: int, y: int = 1) -> int:
    assert comm.peer_address
    return x + y


async def count(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


class Adder:
    """Handlers of every kind that objects and classes can be."""

    def __init__(self, x: int = 0) -> None:
        self.x = x

    def add(self, x: int, y: int = 1) -> int:
        return self.x + x + y

    async def add_async(self, x: int, y: int = 1) -> int:
        await trio.lowlevel.checkpoint()
        return self.x + x + y

    @in_thread
    def add_in_thread(self, x: int, y: int = 1) -> int:
        assert threading.current_thread() is not threading.main_thread()
        return self.x + x + y

    @run_to_end
    async def add_to_end(self, x: int, y: int = 1) -> int:
        return self.x + x + y

    @classmethod
    def add_class(cls, x: int, y: int = 1) -> int:
        return cls().x + x + y

    @staticmethod
    def add_static(x: int, y: int = 1) -> int:
        return x + y


class Plain:
    def __call__(self, x: int, y: int = 1) -> int:
        return x + y


class Async:
    async def __call__(self, x: int, y: int = 1) -> int:
        await trio.lowlevel.checkpoint()
        return x + y


class WithComm:
    async def __call__(self, comm: Any, x: int, y: int = 1) -> int:
        assert comm.peer_address
        return x + y


class Counting:
    async def __call__(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i


class Awaitable:
    """Neither a coroutine nor anything that inspect knows."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __await__(self) -> Any:
        yield from trio.lowlevel.checkpoint().__await__()
        return self.value


SUMS: dict[str, Callable[..., Any]] = {
    "function": add,
    "async function": add_async,
    "comm first": add_comm,
    "lambda": lambda x, y=1: x + y,
    "lambda giving a coroutine": lambda x, y=1: add_async(x, y),
    "awaitable": lambda x, y=1: Awaitable(x + y),
    "partial": functools.partial(add, y=1),
    "partial, positional": functools.partial(lambda one, x, y: one + x + y - 1, 1),
    "async partial": functools.partial(add_async, y=1),
    "partial of a partial": functools.partial(functools.partial(add_async, y=3), y=1),
    "partial with comm": functools.partial(add_comm, y=1),
    "bound method": Adder().add,
    "async bound method": Adder().add_async,
    "class method": Adder.add_class,
    "static method": Adder.add_static,
    "callable object": Plain(),
    "async callable object": Async(),
    "callable object with comm": WithComm(),
    "partial of an async callable object": functools.partial(Async(), y=1),
    "marked method": Adder().add_in_thread,
    "method marked run_to_end": Adder().add_to_end,
    "in_thread": in_thread(add),
    "in_thread of a method": in_thread(Adder().add),
    "in_thread of a callable object": in_thread(Plain()),
    "in_thread of a partial": in_thread(functools.partial(add, y=1)),
    "partial of in_thread": functools.partial(in_thread(add), y=1),
    "in_thread and comm": in_thread(lambda comm, x, y=1: x + y),
    "run_to_end": run_to_end(add_async),
    "run_to_end and comm": run_to_end(add_comm),
    "both marks": run_to_end(in_thread(add)),
    "both marks, turned round": in_thread(run_to_end(add)),
    "mark on a marked method": run_to_end(Adder().add_in_thread),
    "mark, partial, mark": run_to_end(functools.partial(in_thread(add), y=1)),
}


@pytest.mark.parametrize("kind", SUMS)
async def test_every_kind_of_handler_answers(kind: str, where: str, serving: Any) -> None:
    async with serving({"sum": SUMS[kind]}, where) as (server, remote):
        assert await remote.sum(x=1, y=2) == 3
        assert server.statistics().requests == {"sum": 1}


async def test_a_wrapper_round_a_marked_handler_is_not_passed_by(serving: Any) -> None:
    calls: list[tuple[str, bool]] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(("plain", threading.current_thread() is threading.main_thread()))
            return function(*args, **kwargs)

        return wrapper

    def noted_async(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(("async", threading.current_thread() is threading.main_thread()))
            return function(*args, **kwargs)

        return wrapper

    both = noted(run_to_end(in_thread(add)))
    assert HandlerEntry.of(both).run_to_end
    async with serving({"plain": noted(in_thread(add)), "async": noted_async(in_thread(add)), "both": both}) as (_server, remote):
        for op in ("plain", "async", "both"):
            assert await remote[op](x=1, y=2) == 3
    assert calls == [("plain", False), ("async", True), ("plain", False)]


async def test_a_handler_written_in_c_is_called_and_its_errors_are_its_own(where: str, serving: Any) -> None:
    async with serving({"int": int, "len": len}, where) as (_server, remote):
        with pytest.raises(TypeError, match=r"wrong arguments: .*len\(obj, /\)"):
            await remote.len(obj="abc")
        with pytest.raises(TypeError, match="wrong arguments for 'int'"):
            await remote.int(nonsense=1)
        assert await remote.int() == 0


async def test_a_class_is_a_handler_that_makes_instances(serving: Any) -> None:
    async with serving({"make": Adder, "counting": Counting}) as (_server, remote):
        assert (await remote.make(x=5)).x == 5
        # Its instances' __call__ is a generator; making one is not.
        assert isinstance(await remote.counting(), Counting)


GENERATORS: dict[str, Callable[..., Any]] = {
    "async generator function": count,
    "partial": functools.partial(count),
    "callable object": Counting(),
    "partial of a callable object": functools.partial(Counting()),
    "lambda": lambda n: count(n),
    "marked": run_to_end(count),
    "partial of a marked one": functools.partial(run_to_end(count)),
}


@pytest.mark.parametrize("kind", GENERATORS)
async def test_every_kind_of_generator_streams(kind: str, where: str, serving: Any) -> None:
    async with serving({"count": GENERATORS[kind]}, where) as (_server, remote), remote.count.stream(n=3) as stream:
        assert [item async for item in stream] == [0, 1, 2]


@pytest.mark.parametrize("kind", GENERATORS)
async def test_no_kind_of_generator_can_be_called_plainly(kind: str, where: str, serving: Any) -> None:
    async with serving({"count": GENERATORS[kind]}, where) as (_server, remote):
        for _ in range(2):
            with pytest.raises(TypeError, match=r"'count' streams; use \.stream\(\)") as caught:
                await remote.count(n=3)
            assert isinstance(caught.value, RemoteError)
        with trio.move_on_after(5), pytest.raises(TypeError, match=r"use \.stream"):
            await remote.count(n=3)  # with a deadline
        with pytest.raises(TypeError, match=r"use \.stream"):
            await remote.count(n=3, close=True)


async def test_a_coroutine_that_gives_a_generator_streams_too(where: str, serving: Any) -> None:
    async def choose(n: int) -> AsyncIterator[int]:
        return count(n)

    async with serving({"choose": choose}, where) as (_server, remote), remote.choose.stream(n=2) as stream:
        assert [item async for item in stream] == [0, 1]


async def test_a_wrong_call_names_the_signature(where: str, serving: Any) -> None:
    handlers = {"add": add, "add_async": add_async, "add_comm": add_comm, "threaded": in_thread(add), "count": count}
    async with serving(handlers, where) as (server, remote):
        for op in ("add", "add_async", "threaded"):
            with pytest.raises(TypeError) as caught:
                await remote[op](z=1)
            assert isinstance(caught.value, RemoteError)
            assert f"the handler is {op}(x: 'int', y: 'int' = 1) -> 'int'" in str(caught.value)
            assert "wrong arguments" in str(caught.value)
        with pytest.raises(TypeError, match=r"argument: 'x'; the handler is add_comm\(comm"):
            await remote.add_comm()
        async with remote.count.stream(m=1) as stream:
            with pytest.raises(TypeError, match="the handler is count"):
                await stream.receive()
        assert await remote.add(x=1) == 2
        assert server.statistics().connections == 1


async def test_a_type_error_inside_a_handler_is_left_alone(where: str, serving: Any) -> None:
    def inside(x: int) -> int:
        return add(x, "y")  # type: ignore[arg-type]

    def wrong_call_inside(x: int) -> int:
        return add(x, 1, 2, 3)  # type: ignore[call-arg]

    async def later(x: int) -> int:
        await trio.lowlevel.checkpoint()
        return add(x, 1, 2, 3)  # type: ignore[call-arg]

    def itself(x: int) -> None:
        raise TypeError("from the handler")

    handlers = {f.__name__: f for f in (inside, wrong_call_inside, later, itself)}
    handlers["threaded"] = in_thread(wrong_call_inside)
    async with serving(handlers, where) as (_server, remote):
        with pytest.raises(TypeError, match="unsupported operand"):
            await remote.inside(x=1)
        for op in ("wrong_call_inside", "later", "threaded"):
            with pytest.raises(TypeError, match=r"^add\(\) takes from 1 to 2 positional arguments but 4 were given$"):
                await remote[op](x=1)
        with pytest.raises(TypeError, match="^from the handler$"):
            await remote.itself(x=1)


async def test_keys_that_are_no_names_are_wrong_arguments(where: str, serving: Any) -> None:
    def take(**kwargs: Any) -> int:
        return len(kwargs)

    async with serving({"take": take, "threaded": in_thread(take)}, where) as (server, remote):
        comm = await connect(remote.address)
        async with comm:
            for op in ("take", "threaded"):
                await comm.write({"op": op, 1: 2, "reply": True})
                answer = await comm.read()
                assert answer["status"] == "uncaught-error"
                assert "keywords must be strings" in answer["exception_text"]
                assert await send_recv(comm, op=op, **{"any name": 1, "": 2}) == 2
        assert server.statistics().connections <= 2


async def test_blocking_handlers_share_their_limiter(serving: Any) -> None:
    limiter = trio.CapacityLimiter(1)
    alive = most = 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        threading.Event().wait(0.01)
        with lock:
            alive -= 1

    async with serving({"work": in_thread(work, limiter=limiter)}) as (_server, remote), trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(remote.work)
    assert most == 1
    assert limiter.borrowed_tokens == 0


async def test_context_variables_go_into_the_thread(serving: Any) -> None:
    from trio_dcore import current_request

    def op_in_thread() -> str:
        return current_request().op

    async with serving({"where": in_thread(op_in_thread)}) as (_server, remote):
        assert await remote.where() == "where"


class TestInThread:
    @pytest.mark.parametrize(
        "function",
        [
            add_async,
            count,
            functools.partial(add_async),
            Async(),
            Counting(),
            run_to_end(add_async),
            functools.partial(run_to_end(count)),
        ],
    )
    def test_refuses_async_functions(self, function: Any) -> None:
        with pytest.raises(TypeError, match="for blocking functions"):
            in_thread(function)

    def test_a_marked_function_can_still_be_called_and_looked_at(self) -> None:
        marked = run_to_end(in_thread(add))
        assert marked(1, 2) == 3
        assert marked.__name__ == "add"
        assert inspect.signature(marked) == inspect.signature(add)


class TestHandlerEntry:
    def test_plain(self) -> None:
        entry = HandlerEntry.of(add)
        assert entry.handler is entry.function is add
        assert not (entry.generator or entry.takes_comm or entry.streams or entry.takes_serializers)
        assert not (entry.in_thread or entry.run_to_end)
        assert entry.limiter is None

    def test_streams_if_it_is_a_generator_or_takes_the_comm(self) -> None:
        assert HandlerEntry.of(count).streams
        assert HandlerEntry.of(count).generator
        assert HandlerEntry.of(add_comm).streams
        assert HandlerEntry.of(add_comm).takes_comm
        assert HandlerEntry.of(Adder().add).takes_comm is False

    def test_comm_must_be_first(self) -> None:
        assert not HandlerEntry.of(lambda x, comm: None).takes_comm
        assert not HandlerEntry.of(functools.partial(add_comm, object())).takes_comm

    def test_serializers_by_name_only(self) -> None:
        assert HandlerEntry.of(lambda serializers=None: None).takes_serializers
        assert not HandlerEntry.of(lambda **kwargs: None).takes_serializers

    def test_marks_add_up(self) -> None:
        limiter, other = trio.CapacityLimiter(1), trio.CapacityLimiter(2)
        entry = HandlerEntry.of(functools.partial(run_to_end(in_thread(in_thread(add, limiter=limiter), limiter=other)), y=5))
        assert entry.in_thread
        assert entry.run_to_end
        assert entry.limiter is other
        assert isinstance(entry.function, functools.partial)
        assert entry.function.func is add
        assert entry.function(1) == 6

    def test_what_has_no_signature(self) -> None:
        entry = HandlerEntry.of(int)
        assert not entry.streams


class TestWrongArguments:
    def call(self, function: Any, **kwargs: Any) -> TypeError | None:
        try:
            function(**kwargs)
        except TypeError as error:
            return wrong_arguments("op", function, (), kwargs, error, TestWrongArguments.call.__code__)
        raise AssertionError("it was called")

    def test_by_the_caller(self) -> None:
        assert "the handler is op(x: 'int'" in str(self.call(add))

    def test_not_by_the_caller(self) -> None:
        assert self.call(lambda: add()) is None  # type: ignore[call-arg]

    def test_arguments_that_fit_a_function_written_in_c(self) -> None:
        # It raises a TypeError by itself, and there is no frame of it to tell.
        assert self.call(functools.partial(sorted, 1)) is None

    def test_without_a_traceback(self) -> None:
        assert wrong_arguments("op", add, (), {}, TypeError("made up"), add.__code__) is None


class TestClosest:
    def test_names_what_is_near(self) -> None:
        assert closest("adde", {"add": add, "adder": add, "zzz": add}) == "; did you mean 'adder' or 'add'?"

    def test_nothing_near(self) -> None:
        assert closest("add", {"zzz": add}) == ""

    def test_odd_handlers_and_long_names(self) -> None:
        assert closest("add", {1: add}) == ""  # type: ignore[dict-item]
        assert closest("a" * 65, {"a" * 65: add}) == ""
