"""The soak: clients, servers and a nemesis, for as long as you like, and what must be so afterwards.

There are two servers for each transport, each a process of its own (:mod:`.soak_server`) behind a proxy.  One of them is killed, stopped
and started again, at the same address; both are paused, and the way to them is cut, held up and slowed down (:mod:`.soak_faults`).
Meanwhile clients make calls of all kinds, directly or through the proxies.  What each of them does follows from the seed; what
comes of it depends on the clock.

Every call must have exactly one outcome, in time, and the journal that all servers write must agree: what was answered was started
once, what was refused was not, and nothing was started twice.  At the end everything works again, and nothing is left.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from tests.reference.identities import ours
from tests.reference.soak_faults import Lag, Nemesis, Proxy, ServerProcess, free_place, resident, write_identity
from tests.reference.soak_server import ID
from trio_dcore import (
    CommClosedError,
    ConnectError,
    ConnectionPool,
    HandlerCancelled,
    RemoteError,
    Security,
    ServerClosing,
)

__all__ = ["HARMLESS", "KINDS", "RESTARTS", "Soak", "Summary"]

#: The kinds of calls.
KINDS = ("add", "slow", "fail", "tidy", "array", "note", "stream", "echo")

#: What is done to both servers of a transport, and what only to one: the other one's memory is watched.
HARMLESS = ("pause", "partition", "slow", "cut")
RESTARTS = ("kill", "kill, paused", "stop")

# What comes of a call.
ANSWERED = "answered"
SENT = "sent"  # by notify: nobody says whether it was read
DEADLINE = "deadline"
CANCELLED = "cancelled"
WRONG = "wrong"
#: The errors that a call may end with, and whether its handler was started then: never, once, or that can't be known.
ERRORS: dict[type[Exception], tuple[int, int]] = {
    ConnectError: (0, 0),
    ServerClosing: (0, 0),
    HandlerCancelled: (1, 1),
    CommClosedError: (0, 1),
}
_STARTS = {ANSWERED: (1, 1), SENT: (0, 1), DEADLINE: (0, 1), CANCELLED: (0, 1), WRONG: (0, 255)} | {
    kind.__name__: starts for kind, starts in ERRORS.items()
}
# Seconds by which a call may be later than its deadline, beyond those for which this process had no time for its tasks.
_LATE = 1.0
# Within so many seconds, and again those beyond, a call without a deadline ends: nothing that the nemesis does lasts longer.
_ENDS = 30.0
# A run lasts for longer than it is told, until everything was done to everybody and each kind of call has been answered so often: the
# machine may be busy.  But there is an end to that.
_ENOUGH = 3
_PATIENCE = 120.0
# Memory is watched from here on (part of the whole): before, pools and caches fill.
_WARM = 0.2
# MiB by which it may grow then, in a run of some minutes: a process does not give back all that it has freed.
_GROWTH = 16.0
_LONG = 120.0


class Violation(AssertionError):
    """A call had an answer that is not its own."""


@dataclass
class Summary:
    """What a soak has found.

    Attributes:
        seconds: how long clients called.
        seed: what they and the nemesis did follows from it.
        calls: (transport, kind of call) -> outcome -> how many.
        deeds: transport -> what the nemesis did -> how often.
        problems: what should not have been; empty is good.
        latest: transport -> by how many seconds the latest call was later than its deadline.
        servers: what the servers that were stopped in order have counted.
        memory: process -> (MiB after the warm-up, MiB at the end, MiB an hour by a line through all in between).
    """

    seconds: float = 0.0
    seed: int = 0
    calls: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    deeds: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    problems: list[str] = field(default_factory=list)
    latest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    servers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    memory: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many calls there were."""
        return sum(sum(outcomes.values()) for outcomes in self.calls.values())

    def outcomes(self, transport: str = "") -> Counter[str]:
        """Outcome -> how many, over one transport or all."""
        total: Counter[str] = Counter()
        for (scheme, _), outcomes in self.calls.items():
            if transport in ("", scheme):
                total += outcomes
        return total

    def markdown(self) -> str:
        """Tables for people."""
        names = [name for name in _STARTS if self.outcomes()[name]]
        lines = [f"{self.total} calls in {self.seconds:.0f} s, seed {self.seed}; {len(self.problems)} problems.", ""]
        lines += [f"| transport | call | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
        for (scheme, kind), outcomes in sorted(self.calls.items()):
            lines.append(f"| {scheme} | {kind} | {' | '.join(str(outcomes[name]) for name in names)} |")
        lines.append(f"| all | | {' | '.join(str(self.outcomes()[name]) for name in names)} |")
        deeds = sorted({deed for each in self.deeds.values() for deed in each})
        lines += ["", f"| transport | {' | '.join(deeds)} |", "|---|" + "---|" * len(deeds)]
        for scheme, done in sorted(self.deeds.items()):
            lines.append(f"| {scheme} | {' | '.join(str(done[deed]) for deed in deeds)} |")
        lines += [
            "",
            "| transport | starts | stopped in order | slowest stop | handlers in these: started | finished | latest call |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        for scheme, counts in sorted(self.servers.items()):
            lines.append(
                f"| {scheme} | {counts['starts']} | {counts['stops']} | {counts['slowest_stop']} ms | {counts['started']} | "
                f"{counts['finished']} | {1000 * self.latest[scheme]:.0f} ms after its deadline |"
            )
        lines += ["", "| process | MiB when warm | MiB at the end | slope |", "|---|---|---|---|"]
        for name, (first, last, slope) in self.memory.items():
            lines.append(f"| {name} | {first:.1f} | {last:.1f} | {slope:+.1f} MiB/h |")
        if self.problems:
            lines += ["", *(f"- {problem}" for problem in self.problems[:50])]
        return "\n".join(lines)


class Client:
    """Makes one call after the other, and writes down what comes of each."""

    def __init__(self, number: int, soak: Soak, pool: ConnectionPool, rng: random.Random) -> None:
        self.number = number
        self.outcomes = bytearray()  # of each request, as an index into _STARTS
        self._soak = soak
        self._pool = pool
        self._rng = rng
        self._kinds: list[Callable[[Any, tuple[int, int]], Awaitable[None]]] = [
            *(self._add,) * 4,
            *(self._slow,) * 2,
            *(self._fail, self._tidy, self._array, self._note, self._stream, self._echo),
        ]

    async def run(self) -> None:
        """Until the soak says that it is enough."""
        while not self._soak.enough:
            scheme, address = self._rng.choice(self._soak.places)
            await self.call(scheme, address, self._rng.choice(self._kinds), deadline=self._deadline())
            if self._rng.random() < 0.3:
                await trio.sleep(self._rng.uniform(0, 0.02))

    def _deadline(self) -> float:
        return math.inf if self._rng.random() < 0.05 else self._rng.uniform(0.1, 1.5)

    async def call(
        self, scheme: str, address: str, kind: Callable[[Any, tuple[int, int]], Awaitable[None]], *, deadline: float
    ) -> str:
        """One call; returns what came of it."""
        id = self.number, len(self.outcomes)
        name = kind.__name__.strip("_")
        summary = self._soak.summary
        outcome, problem = ANSWERED, ""
        began = trio.current_time()
        lag = self._soak.lag.total
        cancels = name == "slow" and self._rng.random() < 0.3
        with trio.move_on_after(min(deadline, _ENDS)) as scope:
            with trio.CancelScope() as own:
                if cancels:  # as a client does that has changed its mind
                    self._soak.later(self._rng.uniform(0, 0.2), own)
                try:
                    await kind(self._pool(address), id)
                except Violation as error:
                    problem = str(error)
                except tuple(ERRORS) as error:
                    outcome = next(each.__name__ for each in ERRORS if isinstance(error, each))
                except Exception as error:
                    problem = f"ended with {error!r}"
        if scope.cancelled_caught:
            outcome = DEADLINE
            if deadline == math.inf and self._soak.lag.total - lag < _ENDS / 2:
                problem = f"did not end within {_ENDS} s"
        elif own.cancelled_caught:
            outcome = CANCELLED
        elif outcome == ANSWERED and name == "note":
            outcome = SENT
        late = trio.current_time() - began - deadline - (self._soak.lag.total - lag)
        summary.latest[scheme] = max(summary.latest[scheme], late)
        if late > _LATE:
            problem = problem or f"ended {late:.2f} s after its deadline"
        if problem:
            outcome = WRONG
            summary.problems.append(f"{name} {id} at {address} {problem}")
        self.outcomes.append(list(_STARTS).index(outcome))
        summary.calls[scheme, name][outcome] += 1
        return outcome

    # -- kinds of calls ----------------------------------------------------------------------------------------------------------

    @staticmethod
    def _same(got: Any, expected: Any) -> None:
        if got != expected:
            raise Violation(f"answered {got!r} instead of {expected!r}")

    async def _add(self, remote: Any, id: tuple[int, int]) -> None:
        self._same(await remote.add(id=id, x=id[0], y=id[1]), sum(id))

    async def _slow(self, remote: Any, id: tuple[int, int]) -> None:
        self._same(await remote.slow(id=id, seconds=self._rng.uniform(0, 0.3), value=id[1]), id[1])

    async def _fail(self, remote: Any, id: tuple[int, int]) -> None:
        try:
            raise Violation(f"{await remote.fail(id=id, value=id[1])!r} from a handler that raises")
        except ValueError as error:
            self._same((isinstance(error, RemoteError), str(error)), (True, f"as asked: {id[1]}"))

    async def _tidy(self, remote: Any, id: tuple[int, int]) -> None:
        self._same(await remote.tidy(id=id, seconds=self._rng.choice([0, 0.1, 0.9])), "done")

    async def _array(self, remote: Any, id: tuple[int, int]) -> None:
        import numpy

        data = numpy.full(self._rng.choice([10, 10_000, 200_000]), id[1], dtype="int64")
        got = await remote.array(id=id, data=data)
        self._same((got.shape, str(got.dtype), bool((got == id[1] + 1).all())), (data.shape, "int64", True))

    async def _note(self, remote: Any, id: tuple[int, int]) -> None:
        await remote.note.notify(id=id)

    async def _stream(self, remote: Any, id: tuple[int, int]) -> None:
        upto, enough = self._rng.randrange(1, 50), self._rng.randrange(1, 80)
        expected = 0
        async with remote.count.stream(id=id, upto=upto, pause=self._rng.choice([0, 0, 0.005])) as stream:
            async for number in stream:
                self._same(number, expected)
                expected += 1
                if expected == enough:
                    return
        # A server that stops lets its streams end early, and they do so in order.

    async def _echo(self, remote: Any, id: tuple[int, int]) -> None:
        count = self._rng.randrange(1, 40)
        async with remote.echo_all.stream(id=id) as stream:
            received = 0
            failure: Exception | None = None
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    try:
                        for number in range(count):
                            await stream.send((id[1], number))
                        await stream.send_eof()
                    except (CommClosedError, trio.ClosedResourceError):
                        pass  # who receives meets the same, and tells it

                nursery.start_soon(send)
                try:
                    async for item in stream:
                        self._same(tuple(item), (id[1], received))
                        received += 1
                except Exception as error:
                    failure = error
                nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure
            self._same(received, count)


class Soak:
    """One run.

    Args:
        transports: "tcp", "unix", "tls".
        folder: for sockets, logs and the journal; with a short name.
        seed: what clients and nemesis do follows from it.
        clients: how many, over all transports.
        deeds: what the nemesis does.
        pace: how quickly, where 1 is about one deed in a second for each server.
    """

    def __init__(
        self,
        transports: Sequence[str],
        folder: Path,
        *,
        seed: int = 0,
        clients: int = 20,
        deeds: Collection[str] = (*HARMLESS, *RESTARTS),
        pace: float = 1.0,
    ) -> None:
        self.summary = Summary(seed=seed)
        self.enough = False
        self.places: list[tuple[str, str]] = []
        self._folder = folder
        self._rng = random.Random(seed)
        self._servers: list[tuple[str, ServerProcess, Nemesis, Proxy]] = []
        self._security: dict[str, Security | None] = {}
        self.lag = Lag()
        turns = trio.Semaphore(1)
        for scheme in transports:
            for number in range(2):
                name = f"{scheme}{number}"
                direct, proxied = (free_place(scheme, folder, f"{name}{end}", self._rng) for end in "sp")
                server = ServerProcess(name, direct, folder, self.summary.problems.append, self.lag)
                proxy = Proxy(proxied, direct)
                rng = random.Random(self._rng.random())
                only = [deed for deed in deeds if number == 1 or deed in HARMLESS]
                nemesis = Nemesis(server, proxy, rng, only=only, turns=turns, pace=pace)
                self._servers.append((scheme, server, nemesis, proxy))
                self.places += [(scheme, direct), (scheme, proxied)]
        security = ours().security() if "tls" in transports else None
        if security is not None:
            write_identity(folder)
        # Some clients share a pool, and some pools are small.
        self.pools = [ConnectionPool(limit, security=security, timeout=3.0) for limit in (4, 8, 512)]
        self._clients = [
            Client(number, self, self.pools[number % len(self.pools)], random.Random(self._rng.random()))
            for number in range(clients)
        ]
        self._nursery: trio.Nursery | None = None
        self._samples: dict[str, list[tuple[float, int]]] = defaultdict(list)

    async def run(self, seconds: float) -> Summary:
        """Start everything, let clients call for so long, put everything right, and look at what is left."""
        summary = self.summary
        async with AsyncExitStack() as stack:
            for pool in self.pools:
                await stack.enter_async_context(pool)
            try:
                for _, server, _, _ in self._servers:
                    await server.start()
                await self._call_and_look(seconds)
                for _, server, _, _ in self._servers:
                    await server.stop()
            finally:
                with trio.CancelScope(shield=True):  # each has a limit of its own
                    for _, server, _, _ in self._servers:
                        await server.kill()
        kept = {"journal", "identity", *(f"{server.name}.log" for _, server, _, _ in self._servers)}
        summary.problems += [f"left behind: {each}" for each in self._folder.iterdir() if each.name not in kept]
        self._sum_up()
        self._compare_with_journal()
        return summary

    async def _call_and_look(self, seconds: float) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.lag.run)
            for _, _, _, proxy in self._servers:
                await nursery.start(proxy.run)
            began = trio.current_time()
            await self._call(seconds)
            self.summary.seconds = trio.current_time() - began
            await self._everything_works()
            self._look_at_pools()
            for pool in self.pools:
                await pool.aclose()
            nursery.cancel_scope.cancel()

    async def _call(self, seconds: float) -> None:
        async with trio.open_nursery() as helpers:
            self._nursery = helpers
            for _, _, nemesis, _ in self._servers:
                if not nemesis.idle:
                    helpers.start_soon(nemesis.run)
            helpers.start_soon(self._watch_memory, max(0.2, seconds / 600))
            async with trio.open_nursery() as clients:
                for client in self._clients:
                    clients.start_soon(client.run)
                await trio.sleep(seconds)
                with trio.move_on_after(_PATIENCE) as scope:
                    while self._missing():  # noqa: ASYNC110
                        await trio.sleep(0.05)
                if scope.cancelled_caught:
                    self.summary.problems.append(f"in {seconds + _PATIENCE} s there was too little of {self._missing()}")
                self.enough = True
            helpers.cancel_scope.cancel()

    def _missing(self) -> list[str]:
        """Deeds that were not done yet, and kinds of calls that were not answered often enough."""
        deeds = [f"{nemesis.server.name}: {deed}" for _, _, nemesis, _ in self._servers for deed in nemesis.undone]
        if not self._clients:
            return deeds
        calls = [(scheme, name) for scheme in sorted({scheme for scheme, *_ in self._servers}) for name in KINDS]
        return deeds + [
            f"{scheme}: {name}"
            for scheme, name in calls
            if sum(self.summary.calls[scheme, name][outcome] for outcome in (ANSWERED, SENT, WRONG)) < _ENOUGH
        ]

    def later(self, seconds: float, scope: trio.CancelScope) -> None:
        """Have somebody else cancel a scope after a while."""

        async def cancel() -> None:
            await trio.sleep(seconds)
            scope.cancel()

        assert self._nursery is not None
        self._nursery.start_soon(cancel)

    async def _watch_memory(self, every: float) -> None:
        while True:
            now = trio.current_time()
            self._samples["clients"].append((now, resident()))
            for scheme, server, _, _ in self._servers:
                if server.name.endswith("0"):
                    self._samples[f"server, {scheme}"].append((now, resident(server.pid)))
            await trio.sleep(every)

    async def _everything_works(self) -> None:
        """Nobody does harm any more: so each client can call each server, at once."""
        for client in self._clients[:3]:
            for scheme, address in self.places:
                outcome = await client.call(scheme, address, client._add, deadline=20.0)
                if outcome != ANSWERED:
                    self.summary.problems.append(f"afterwards a call to {address} ends with {outcome}")

    def _look_at_pools(self) -> None:
        for pool in self.pools:
            if pool.active or pool.open > pool.limit:
                self.summary.problems.append(f"of a pool of {pool.limit}, {pool.active} slots are in use and {pool.open} open")

    def _sum_up(self) -> None:
        summary = self.summary
        for scheme, server, nemesis, _ in self._servers:
            counts = summary.servers[scheme]
            slowest = max(counts["slowest_stop"], server.counts["slowest_stop"])
            counts.update(server.counts)
            counts["slowest_stop"] = slowest
            counts["starts"] += server.starts
            summary.deeds[scheme].update(nemesis.deeds)
            summary.problems += [f"{server.name} has logged: {line}" for line in server.loud()[:5]]
        for name, samples in self._samples.items():
            samples = samples[int(len(samples) * _WARM) :]
            if len(samples) > 2:
                times, sizes = zip(*samples, strict=True)
                slope = statistics.linear_regression(times, sizes).slope
                first, last = (
                    statistics.median(part) / 2**20 for part in (sizes[: len(sizes) // 10 + 1], sizes[-len(sizes) // 10 :])
                )
                summary.memory[name] = first, last, slope * 3600 / 2**20
                if summary.seconds >= _LONG and last - first > _GROWTH:
                    summary.problems.append(f"the memory of {name} has grown from {first:.1f} to {last:.1f} MiB")

    def _compare_with_journal(self) -> None:
        """Each request was started as often as its outcome says."""
        started = [bytearray(len(client.outcomes)) for client in self._clients]
        for number, request in ID.iter_unpack((self._folder / "journal").read_bytes()):
            started[number][request] = min(255, started[number][request] + 1)
        names = list(_STARTS)
        for client in self._clients:
            for request, (outcome, starts) in enumerate(zip(client.outcomes, started[client.number], strict=True)):
                least, most = _STARTS[names[outcome]]
                if not least <= starts <= most:
                    self.summary.problems.append(
                        f"request {client.number, request}: {names[outcome]}, and started {starts} times"
                    )
