"""A job queue: clients submit jobs and wait for results, workers take them, and a worker that dies loses none."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from trio_dcore import Comm, CommClosedError, Server, current_request, rpc


@dataclass(eq=False)
class Job:
    """One piece of work, and what became of it."""

    number: int
    task: str
    argument: Any
    result: Any = None
    failure: str | None = None
    done: trio.Event = field(default_factory=trio.Event)


class JobQueue(Server):
    """Keeps jobs until a worker has done them.  Everything runs in one thread, so no locks are needed."""

    def __init__(self, **kwargs: Any) -> None:
        handlers: dict[str, Callable[..., Any]] = {
            "submit": self.submit,
            "result": self.result,
            "work": self.work,
            "events": self.events,
        }
        super().__init__(handlers, **kwargs)
        self.numbers = itertools.count(1)
        self.jobs: dict[int, Job] = {}
        self.waiting: deque[Job] = deque()
        self.news: list[str] = []
        self.changed = trio.Event()

    def tell(self, text: str) -> None:
        """Note what happened, and wake everybody who waits for something to happen.  Not async, so nothing can cut it short."""
        self.news.append(text)
        self.changed.set()
        self.changed = trio.Event()

    def submit(self, task: str, argument: Any) -> int:
        """Add a job and return its number."""
        job = Job(next(self.numbers), task, argument)
        self.jobs[job.number] = job
        self.waiting.append(job)
        self.tell(f"job {job.number} submitted")
        return job.number

    async def result(self, number: int) -> Any:
        """Wait for a job's result; an unknown number is a KeyError at the caller, a failed job a RuntimeError."""
        job = self.jobs[number]
        await job.done.wait()
        if job.failure is not None:
            raise RuntimeError(job.failure)
        return job.result

    async def work(self, comm: Comm, name: str) -> None:
        """Serve one worker: send it a job, take the result, and so on until the server stops or the worker goes."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.stop_idle, nursery.cancel_scope, current_request().shutdown_requested)
            while True:
                while not self.waiting:
                    await self.changed.wait()
                job = self.waiting.popleft()
                try:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 60):  # a job that was begun is finished
                        await comm.write({"number": job.number, "task": job.task, "argument": job.argument})
                        answer = await comm.read()
                except CommClosedError:
                    pass
                else:
                    job.result, job.failure = answer["result"], answer["failure"]
                    job.done.set()
                finally:
                    if not job.done.is_set():  # the worker has gone, whatever the reason: somebody else will do it
                        self.waiting.appendleft(job)
                        self.tell(f"{name} lost job {job.number}")
                if not job.done.is_set():
                    break
                self.tell(f"{name} did job {job.number}")
            nursery.cancel_scope.cancel()

    async def stop_idle(self, scope: trio.CancelScope, shutdown_requested: trio.Event) -> None:
        """A worker that waits for a job need not wait for the end of the grace period."""
        await shutdown_requested.wait()
        scope.cancel()

    async def events(self) -> AsyncIterator[str]:
        """Stream what happens, from the beginning on."""
        for seen in itertools.count():
            while seen >= len(self.news):
                await self.changed.wait()
            yield self.news[seen]


async def worker(address: str, name: str, tasks: dict[str, Callable[[Any], Any]], *, jobs: float = math.inf) -> None:
    """Do jobs for as long as the queue has some to give; ``jobs`` says after how many this one falls over."""
    async with rpc(address) as queue, queue.work.stream(name=name) as stream:
        async for job in stream:
            if jobs <= 0:
                return  # without an answer: for the queue this worker has died
            jobs -= 1
            try:
                answer = {"result": tasks[job["task"]](job["argument"]), "failure": None}
            except Exception as exc:
                answer = {"result": None, "failure": f"{type(exc).__name__}: {exc}"}
            await stream.send(answer)


async def main(address: str = "tcp://127.0.0.1:0") -> None:
    """A queue, two workers of which one falls over, and a client."""
    tasks = {"square": lambda x: x * x, "root": math.sqrt}
    async with trio.open_nursery() as workers, JobQueue(grace=10) as server:
        contact = await server.listen(address)
        workers.start_soon(lambda: worker(contact, "anne", tasks, jobs=2))
        async with rpc(contact) as queue:
            numbers = [await queue.submit(task="square", argument=n) for n in range(6)]
            async with queue.events.stream() as events:
                async for event in events:
                    if "lost" in event:
                        print(event)
                        workers.start_soon(worker, contact, "bob", tasks)  # takes over
                        break
            print("squares:", [await queue.result(number=number) for number in numbers])
            try:
                await queue.result(number=await queue.submit(task="root", argument=-1))
            except RuntimeError as exc:
                print("failed:", exc)
    print("the queue and its workers have ended")


if __name__ == "__main__":
    trio.run(main)
