"""The command line, and the order in which everything is measured."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import imports
from .cases import CASES, Case, Group, Probe
from .processes import Peer, raise_file_limit
from .report import Result, Round, as_json, as_table, judge
from .systems import NAMES

__all__ = ["main"]

_NAMES = sorted({case.name for case in CASES}, key=lambda name: int(name[1:]))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure trio_dcore against its speed targets.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"what to measure: {' '.join(_NAMES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds (default: %(default)s)")
    parser.add_argument(
        "--pin",
        choices=("target", "all", "none"),
        nargs="?",
        const="all",
        default="target",
        help="which cases keep server and client on one CPU: those whose target says so (default), all (--pin alone), none",
    )
    parser.add_argument("--systems", metavar="NAMES", help=f"only these systems, comma separated, of {','.join(NAMES)}")
    parser.add_argument(
        "--json", metavar="FILE", help="write the results there as JSON as well; - writes JSON to stdout, no table"
    )
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is not met")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.cases) - set(_NAMES))
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known are {' '.join(_NAMES)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


class _Bench:
    """The processes of all systems, alive for the whole run, and what was measured with them."""

    def __init__(self, stack: contextlib.ExitStack, pairs: Sequence[tuple[str, str]], pin: str, environ: dict[str, str]) -> None:
        self._pin = pin
        self._environ = environ
        self._cpu = max(os.sched_getaffinity(0))
        self._servers = {name: self._serve(stack, name) for name in sorted({server for server, _ in pairs})}
        self._clients = {name: self._client(stack, name) for name in sorted({client for _, client in pairs})}

    def _serve(self, stack: contextlib.ExitStack, system: str) -> tuple[Peer, str]:
        server = stack.enter_context(Peer("server", system, environ=self._environ))
        return server, server.hear()["address"]

    def _client(self, stack: contextlib.ExitStack, system: str) -> Peer:
        return stack.enter_context(Peer("client", system, environ=self._environ))

    def rounds(self, group: Group, probes: Sequence[Probe], count: int) -> list[Round]:
        """Measure a group's probes in turns."""
        found: list[Round] = []
        if group.warm_up:
            for probe in probes:
                self._measure(group, probe)
        for number in range(count):
            # Every round starts with another probe, so that none always runs after the same neighbour.
            turn = number % len(probes)
            order = [*probes[turn:], *probes[:turn]]
            found.append({probe.label: self._measure(group, probe) for probe in order})
        return found

    def _measure(self, group: Group, probe: Probe) -> dict[str, float]:
        if probe.work == "import":
            return {"import": imports.seconds(probe.label) - imports.seconds("interpreter")}
        with contextlib.ExitStack() as stack:
            there, here = probe.pair
            server, address = self._serve(stack, there) if group.fresh else self._servers[there]
            client = self._client(stack, here) if group.fresh else self._clients[here]
            return self._ask(group, probe, server, address, client)

    def _ask(self, group: Group, probe: Probe, server: Peer, address: str, client: Peer) -> dict[str, float]:
        one_cpu = self._pin == "all" or (self._pin == "target" and group.same_cpu)
        cpu = self._cpu if one_cpu else None
        with server.on_cpu(cpu), client.on_cpu(cpu):
            answer: dict[str, float] = client.ask(work=probe.work, params=dict(probe.params), address=address, server=server.pid)
        return answer


def _select(options: argparse.Namespace) -> tuple[list[Case], list[str] | None]:
    cases = [case for case in CASES if not options.cases or case.name in options.cases]
    return cases, options.systems.split(",") if options.systems else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = _parse(arguments)
    cases, only = _select(options)
    quiet = options.json == "-"
    started = time.monotonic()
    soft, hard = raise_file_limit()
    setting = {
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "open files": f"soft limit raised from {soft} to {hard}",
        "rounds": options.rounds,
        "pin": options.pin,
    }
    if not quiet:
        print("  ".join(f"{key}: {value}" for key, value in setting.items()), flush=True)
    results: list[Result] = []
    measured: dict[str, list[Round]] = {}
    needed = sorted({probe.pair for case in cases for probe in case.group.probes if probe.system})
    if only is not None:
        needed = [pair for pair in needed if set(pair) <= set(only)]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        # distributed keeps a scratch directory under TMPDIR, which goes with this one.
        bench = _Bench(stack, needed, options.pin, {"TMPDIR": scratch})
        for case in cases:
            probes = [probe for probe in case.group.probes if only is None or probe.pair in needed]
            if not probes:
                continue
            if case.group.name not in measured:
                measured[case.group.name] = bench.rounds(case.group, probes, options.rounds)
            result = judge(case, measured[case.group.name])
            results.append(result)
            if not quiet:
                print(f"\n{as_table(result)}", flush=True)
    foreign: list[str] = []
    if only is None and any(case.name == "T12" for case in cases):
        foreign = imports.check_what_is_loaded()
        if not quiet:
            print(f"  {'NOT MET' if foreign else 'met    '} nothing foreign is loaded by it: {', '.join(foreign) or 'nothing'}")
    verdicts = [verdict.met for result in results for verdict in result.verdicts]
    missed = verdicts.count(False) + bool(foreign)
    if not quiet:
        print(f"\n{verdicts.count(True)} of {len(verdicts)} targets met; {time.monotonic() - started:.0f} s")
    if options.json:
        _write(options.json, {"setting": setting, "results": as_json(results), "loaded by the import": foreign, "missed": missed})
    return 1 if options.check and missed else 0


def _write(where: str, data: Any) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    if where == "-":
        sys.stdout.write(text)
    else:
        Path(where).write_text(text)
