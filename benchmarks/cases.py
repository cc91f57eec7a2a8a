"""What is measured and what it is held against: performance.md, section 2, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CASES", "Case", "Group", "Probe", "Target"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One row: a piece of work for one system.

    Args:
        label: name of the row.
        system: whose client does the work.
        work: what is done, of ``work.py``.
        params: its arguments.
        server: whose server it is done with, if that is another system.
    """

    label: str
    system: str
    work: str
    params: Mapping[str, Any]
    server: str = ""

    @property
    def pair(self) -> tuple[str, str]:
        """(system of the server, system of the client)."""
        return self.server or self.system, self.system


@dataclass(frozen=True, slots=True)
class Group:
    """Probes that take turns, round by round, so that all of them see the same machine.

    Args:
        name: key of the group's measurements.
        same_cpu: server and client share one CPU, as the target of the group asks for.
        warm_up: measure everything once before it counts.  A virtual machine gets much of its memory from its host only when that
            is first touched, at a fifth of the speed, and the first probe that needs so much of it would pay for all.
        fresh: each measurement has processes of its own, for memory that a process has freed and uses again is not seen.
    """

    name: str
    probes: tuple[Probe, ...]
    same_cpu: bool = False
    warm_up: bool = False
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on one number, or on the ratio of two.

    Args:
        metric: key in the measured numbers.
        over: label of the probe whose number it is.
        under: label of the probe it is divided by; None for the number itself.
        at_most: upper bound; exclusive with ``at_least``.
        at_least: lower bound.
    """

    metric: str
    over: str
    under: str | None = None
    at_most: float | None = None
    at_least: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One target of the design: which measurements it needs, which numbers it shows, what they must be."""

    name: str
    title: str
    group: Group
    metrics: Mapping[str, str]
    targets: tuple[Target, ...] = field(default=())


def _rows(work: str, rows: Mapping[str, tuple[str, Mapping[str, Any]]], **params: Any) -> tuple[Probe, ...]:
    return tuple(Probe(label, system, work, {**params, **extra}) for label, (system, extra) in rows.items())


_RPC: Mapping[str, Any] = {"how": "rpc"}
_COMM: Mapping[str, Any] = {"how": "comm"}

_SMALL = Group(
    "small calls",
    _rows(
        "small_call",
        {
            "raw": ("raw", _COMM),
            "ours, rpc": ("ours", _RPC),
            "ours, comm": ("ours", _COMM),
            "stock, rpc": ("stock", _RPC),
            "stock, comm": ("stock", _COMM),
        },
        count=1500,
    ),
    same_cpu=True,
)

_WATCHED = Group(
    "watched calls",
    _rows(
        "small_call",
        {
            "sync, unwatched": ("ours", {"op": "add_unwatched"}),
            "sync": ("ours", {"op": "add"}),
            "checkpoint, unwatched": ("ours", {"op": "add_checkpoint_unwatched"}),
            "checkpoint": ("ours", {"op": "add_checkpoint"}),
            "stock, checkpoint": ("stock", {"op": "add_checkpoint"}),
        },
        how="rpc",
        count=1500,
    ),
    same_cpu=True,
)


_UNIX = Group(
    "unix",
    _rows(
        "small_call",
        {
            "tcp, rpc": ("ours", _RPC),
            "unix, rpc": ("ours_unix", _RPC),
            "tcp, comm": ("ours", _COMM),
            "unix, comm": ("ours_unix", _COMM),
        },
        count=1500,
    ),
    same_cpu=True,
)


def _bridge(work: str, rows: Mapping[str, tuple[str, str, str]], **params: Any) -> tuple[Probe, ...]:
    """Rows as (the client's system, the server's, the op)."""
    return tuple(Probe(label, client, work, {**_RPC, "op": op, **params}, server) for label, (client, server, op) in rows.items())


_BRIDGE = Group(
    "bridge",
    _bridge(
        "small_call",
        {
            "ours": ("ours", "ours", "add"),
            "ours, async": ("ours", "ours", "add_async"),
            "stock": ("stock", "stock", "add"),
            "stock, async": ("stock", "stock", "add_async"),
            "aio.rpc": ("aio", "ours", "add"),
            "aio.Server, async": ("ours", "aio", "add_async"),
            "aio, both ends": ("aio", "aio", "add"),
            "open_loop, async": ("ours", "ours_loop", "add_async"),
        },
        count=1500,
    ),
    same_cpu=True,
)


def _in_flight(width: int) -> Case:
    group = Group(
        f"{width} in flight",
        _rows(
            "in_flight",
            {
                "raw": ("raw", _COMM),
                "ours, rpc": ("ours", _RPC),
                "ours, comm": ("ours", _COMM),
                "stock, rpc": ("stock", _RPC),
                "stock, comm": ("stock", _COMM),
            },
            width=width,
            seconds=0.4,
        ),
    )
    targets = tuple(
        Target("rate", ours, other, at_least=bound)
        for ours, stock in (("ours, rpc", "stock, rpc"), ("ours, comm", "stock, comm"))
        for other, bound in (("raw", 1.2), (stock, 4.0))
    )
    return Case("T2", f"{width} calls in flight, one per connection", group, {"rate": "calls/s"}, targets)


_PLAIN: dict[str, tuple[str, Mapping[str, Any]]] = {"raw": ("raw", {}), "ours": ("ours", {}), "stock": ("stock", {})}
_BULK: dict[str, tuple[str, Mapping[str, Any]]] = {"ours": ("ours", {}), "stock": ("stock", {})}


def _echo(mib: int, count: int) -> Case:
    group = Group(f"echo {mib} MiB", _rows("echo", _BULK, mib=mib, count=count), warm_up=True)
    return Case("T6", f"numpy echo, {mib} MiB", group, {"rate": "MB/s"}, (Target("rate", "ours", "stock", at_least=1.0),))


#: All cases, in the order in which they are run and shown.
CASES: tuple[Case, ...] = (
    Case(
        "T1",
        "sequential small call",
        _SMALL,
        {"p50": "µs"},
        (
            Target("p50", "ours, rpc", "raw", at_most=0.75),
            Target("p50", "stock, rpc", "ours, rpc", at_least=3.5),
            Target("p50", "ours, comm", "raw", at_most=0.75),
            Target("p50", "stock, comm", "ours, comm", at_least=3.5),
        ),
    ),
    Case(
        "T13",
        "processor time of a small call, both ends",
        _SMALL,
        {"cpu": "µs"},
        (
            Target("cpu", "ours, rpc", "stock, rpc", at_most=0.5),
            Target("cpu", "ours, comm", "stock, comm", at_most=0.5),
        ),
    ),
    Case(
        "T9",
        "watching for the caller's departure",
        _WATCHED,
        {"p50": "µs"},
        (
            Target("p50", "sync", "sync, unwatched", at_most=1.05),
            Target("p50", "checkpoint", "checkpoint, unwatched", at_most=1.05),
        ),
    ),
    _in_flight(64),
    _in_flight(512),
    Case(
        "T4",
        "a generator's items through .stream(), against a comm.write loop",
        Group(
            "stream",
            _rows(
                "stream",
                {
                    "ours": ("ours", {}),
                    "ours, window of 256": ("ours", {"window": 256}),
                    "ours, window of 1024": ("ours", {"window": 1024}),
                    "stock": ("stock", {}),
                },
                count=40_000,
            ),
        ),
        {"rate": "items/s"},
        (
            # A window of 16 items is no more than 16 for a round trip: for ten times the rate the consumer has to allow more.
            Target("rate", "ours", "stock", at_least=2.0),
            Target("rate", "ours, window of 1024", "stock", at_least=10.0),
        ),
    ),
    Case(
        "T5",
        "comm.write / comm.read loop, small messages",
        Group("messages", _rows("messages", _PLAIN, count=10_000)),
        {"rate": "msgs/s"},
        (Target("rate", "ours", "stock", at_least=1.5),),
    ),
    _echo(1, 60),
    _echo(64, 3),
    Case(
        "T6",
        "numpy one way, 512 MiB",
        Group("one way", _rows("one_way", _BULK, mib=512), warm_up=True),
        {"rate": "MB/s", "receiver": "of the payload, extra memory", "sender": "of the payload, extra memory"},
        (
            Target("rate", "ours", "stock", at_least=1.5),
            Target("receiver", "ours", at_most=1.1),
            Target("sender", "ours", at_most=0.05),
        ),
    ),
    Case(
        "T7",
        "connect, handshake, close",
        Group("connecting", _rows("connecting", _PLAIN, count=150)),
        {"p50": "µs"},
        (Target("p50", "ours", "stock", at_most=0.6),),
    ),
    Case(
        "T8",
        "2 000 idle connections",
        Group("idle", _rows("idle", _PLAIN, connections=2000, count=400), same_cpu=True, fresh=True),
        {"memory": "KiB of the server for each", "slower": "times the latency of a call"},
        (Target("memory", "ours", at_most=12.0), Target("slower", "ours", at_most=1.1)),
    ),
    Case(
        "T11",
        "sequential small call, unix against tcp",
        _UNIX,
        {"p50": "µs"},
        (
            Target("p50", "unix, rpc", "tcp, rpc", at_most=0.8),
            Target("p50", "unix, comm", "tcp, comm", at_most=0.8),
        ),
    ),
    Case(
        "T14",
        "sequential small call through the asyncio bridge",
        _BRIDGE,
        {"p50": "µs"},
        (
            Target("p50", "aio.rpc", "stock", at_most=1.5),
            Target("p50", "aio, both ends", "stock", at_most=1.5),
            Target("p50", "aio.Server, async", "stock, async", at_most=1.5),
            Target("p50", "open_loop, async", "stock, async", at_most=1.5),
        ),
    ),
    Case(
        "T14",
        "64 calls in flight through the asyncio bridge, one per connection",
        Group(
            "bridge, in flight",
            _bridge(
                "in_flight",
                {
                    "ours": ("ours", "ours", "add"),
                    "stock": ("stock", "stock", "add"),
                    "aio.rpc": ("aio", "ours", "add"),
                    "aio, both ends": ("aio", "aio", "add"),
                    "open_loop, async": ("ours", "ours_loop", "add_async"),
                },
                width=64,
                seconds=0.4,
            ),
        ),
        {"rate": "calls/s"},
        (Target("rate", "aio.rpc", "stock", at_least=1.0), Target("rate", "aio, both ends", "stock", at_least=1.0)),
    ),
    Case(
        "T12",
        "import, interpreter start subtracted",
        Group("imports", tuple(Probe(name, "", "import", {}) for name in ("trio, msgpack", "ours", "ours, used", "stock"))),
        {"import": "ms"},
        (
            Target("import", "ours", "trio, msgpack", at_most=1.3),
            Target("import", "ours, used", "trio, msgpack", at_most=1.3),
        ),
    ),
)
