"""Mutation of the code that shuts down and cancels: is each part of it there for a reason that a test knows?

::

    python -m tests.mutation.mutate                            # all of them: half an hour on two cores
    python -m tests.mutation.mutate --list                     # what they are
    python -m tests.mutation.mutate --sample 40 --seed 1       # some, from all modules and rules alike
    python -m tests.mutation.mutate --only _watch. /shield/    # those with one of these texts in their id
    python -m tests.mutation.mutate --survivors                # those that survived the last time, with all tests

``mutants.py`` lists the mutants: each ``cancel()``, deadline, shield, ``finally``, closing and releasing, taken away one at a time,
and awaits that change places with their neighbours.  Nothing is changed in the tree itself: there is a copy of it for each process
that runs tests.

Before that the tests run once with coverage.py, which tells what lines each of them runs; those that pass are given to a mutant if
they run a line of it, quickest first, and those first that have caught others.  It is caught as soon as one of them fails, or takes
ten times as long as it did and some seconds.  A hang, and a failure of a test with a real clock, is seen twice before it counts, for
the machine may be busy.  The reference tests about other tests (negative controls, stock servers, tables), and those that are soaks
themselves, interop and fuzzing are not among them.

What survives is explained in docs/shutdown-mutants.md, or it lacks a test.  The exit code is 1 if one survives that the page does not
have.  Results are kept in a file next to the copies, so that a run that was interrupted goes on where it was; ``--fresh`` begins anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.mutation.mutants import MODULES, OPERATORS, Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "shutdown-mutants.md"
COPIED = ("trio_dcore", "tests", "benchmarks", "docs", "examples", "pyproject.toml", "README.md", "SECURITY.md", "CHANGELOG.md")
TESTS = ("tests/server", "tests/comm", "tests/client", "tests/testing", "tests/mutation", "tests/test_node.py", "tests/reference")
LEFT_OUT = (
    "test_negative_controls.py",
    "test_stock_fails.py",
    "test_table.py",
    "test_m_elsewhere.py",
    "test_n04_soak.py",
    "test_mutants.py",
)
# Seconds: what the tests of a first round take together, those of the second, and what a test may always take.
QUICK = 25.0
ALL = 150.0
PATIENCE = 3.0
# Seconds in which a test without a mutant ends: some sweeps are long, more so with coverage.py, and the machine may be busy.
LONGEST = 600.0
# Mutants may loop and append; a process of the tests has 1 GiB or so.
MEMORY = 12 * 2**30


@dataclass(frozen=True)
class Result:
    """What became of a mutant: ``by`` is the test that caught it, ``tests`` the number of those that ran a line of it."""

    id: str
    operator: str
    what: str
    caught: bool
    how: str
    by: str
    tests: int
    ran: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Of one run of pytest: the test that failed or hung, or none."""

    how: str
    by: str
    ran: int


class Copy:
    """A copy of the tree, in which one mutant lives at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "venv", "*.orig"))
            elif source.exists():
                shutil.copy(source, folder / name)

    def digest(self) -> str:
        """What is in it, but for this."""
        digest = hashlib.sha256()
        paths = (path for part in ("trio_dcore", "tests") for path in (self.folder / part).rglob("*.py"))
        for each in sorted(path for path in paths if path.parent.name != "mutation"):
            digest.update(each.read_bytes())
        return digest.hexdigest()[:16]

    def module(self, mutant: Mutant) -> Path:
        return self.folder / "trio_dcore" / mutant.module

    def put(self, mutant: Mutant, source: bytes) -> None:
        module = self.module(mutant)
        module.write_bytes(source)
        # A bytecode file is told from an outdated one by a time in seconds and a size.
        for each in (module.parent / "__pycache__").glob(f"{module.stem}.*.pyc"):
            each.unlink()

    def run(self, tests: Sequence[str], durations: dict[str, float], *, first: bool = True) -> Outcome:
        """Run tests until one fails, or hangs."""
        (self.folder / "tests.txt").write_text("\n".join(tests), encoding="utf-8")
        progress = self.folder / "progress.jsonl"
        progress.write_text("")
        process = self.pytest(
            [*dict.fromkeys(test.partition("::")[0] for test in tests), *(["-x"] if first else [])],
            MUTATION_TESTS=str(self.folder / "tests.txt"),
            MUTATION_PROGRESS=str(progress),
            PYTHONDONTWRITEBYTECODE="1",
        )
        began = time.monotonic()
        current, since, size = "", began, 0
        while process.poll() is None:
            time.sleep(0.05)
            now = time.monotonic()
            if progress.stat().st_size != size:
                size = progress.stat().st_size
                lines = _lines(progress)
                current, since = (lines[-1].get("begins", "") if lines else ""), now
            if now - since > PATIENCE + 10 * durations.get(current, PATIENCE):
                _end(process)
                return Outcome("hangs", current, len(tests))
        _end(process)
        failed = [line["failed"] for line in _lines(progress) if "failed" in line]
        ran = sum("ended" in line for line in _lines(progress))
        if process.returncode == 0:
            return Outcome("", "", ran)
        return Outcome("fails" if failed else "breaks", failed[0] if failed else current or "collection", ran)

    def pytest(self, arguments: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MUTATION"))}
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "tests.mutation.recorder"]
        with open(self.folder / "output.txt", "wb") as output:
            process = subprocess.Popen(
                [*command, *arguments],
                cwd=self.folder,
                env={**plain, "PYTHONPATH": str(self.folder), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # tests start processes, too
            )
        resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nobody is left
    process.wait()


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class Baseline:
    """Which tests there are, how long they take, and which lines they run.

    Attributes:
        durations: seconds, of those that pass.
        lines: module -> line -> tests.
    """

    def __init__(self) -> None:
        self.durations: dict[str, float] = {}
        self.lines: dict[str, dict[int, set[str]]] = {}

    @classmethod
    def measure(cls, copies: Sequence[Copy]) -> Baseline:
        """Run all tests, shared by the copies."""
        files = [
            str(path.relative_to(ROOT))
            for each in TESTS
            for path in ([ROOT / each] if each.endswith(".py") else sorted((ROOT / each).glob("test_*.py")))
            if path.name not in LEFT_OUT
        ]
        self = cls()
        running = []
        for number, copy in enumerate(copies):
            environment = {
                "MUTATION_PROGRESS": str(copy.folder / "baseline.jsonl"),
                "MUTATION_COVERAGE": str(copy.folder / "coverage"),
            }
            running.append((copy, copy.pytest(files[number :: len(copies)], **environment)))
        for copy, process in running:
            progress, since, size = copy.folder / "baseline.jsonl", time.monotonic(), -1
            while process.poll() is None:
                time.sleep(0.5)
                found = progress.stat().st_size if progress.exists() else 0
                if found != size:
                    size, since = found, time.monotonic()
                elif time.monotonic() - since > LONGEST:
                    for _, each in running:
                        _end(each)
                    raise SystemExit(f"without a mutant a test hangs: {_lines(progress)[-1]}")
            self._add(copy)
        # What is compiled from here on is not written down, so that no mutant finds the bytecode of another one.
        return self

    def _add(self, copy: Copy) -> None:
        import coverage

        lines = _lines(copy.folder / "baseline.jsonl")
        bad = {line[how] for line in lines for how in ("failed", "skipped") if how in line}
        for line in lines:
            if "ended" in line and line["ended"] not in bad:
                self.durations[line["ended"]] = line["seconds"]
        for test in sorted({line["failed"] for line in lines if "failed" in line}):
            print(f"not used, since it fails without a mutant: {test}")
        data = coverage.CoverageData(str(copy.folder / "coverage"))
        data.read()
        for module in MODULES:
            found = self.lines.setdefault(module, defaultdict(set))
            for line, tests in data.contexts_by_lineno(str(copy.folder / "trio_dcore" / module)).items():
                found[line].update(tests)

    def of(self, mutant: Mutant) -> list[str]:
        """The tests that run a line of a mutant, quickest first."""
        first, last = mutant.lines
        tests = {test for line in range(first, last + 1) for test in self.lines[mutant.module].get(line, ())}
        return sorted((test for test in tests if test in self.durations), key=lambda test: self.durations[test])

    def save(self, path: Path) -> None:
        lines = {module: {line: sorted(tests) for line, tests in found.items()} for module, found in self.lines.items()}
        path.write_text(json.dumps({"durations": self.durations, "lines": lines}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Baseline:
        self = cls()
        loaded = json.loads(path.read_text(encoding="utf-8"))
        self.durations = loaded["durations"]
        self.lines = {m: {int(line): set(tests) for line, tests in found.items()} for m, found in loaded["lines"].items()}
        return self


class Run:
    """Tries mutants in some copies at once."""

    def __init__(
        self, copies: Sequence[Copy], baseline: Baseline, results: Path, *, thorough: bool, known: Iterable[tuple[str, str]] = ()
    ) -> None:
        self._copies = copies
        self._baseline = baseline
        self._results = results
        self._thorough = thorough
        self._lock = threading.Lock()
        # module -> tests that have caught others of it
        self._killers: dict[str, Counter[str]] = defaultdict(Counter)
        for module, test in known:
            self._killers[module][test] += 1

    def of(self, mutants: Iterable[Mutant]) -> None:
        waiting = list(mutants)[::-1]
        total = len(waiting)

        def work(copy: Copy) -> None:
            while True:
                with self._lock:
                    if not waiting:
                        return
                    mutant = waiting.pop()
                    number = total - len(waiting)
                result = self._try(copy, mutant)
                with self._lock:
                    with open(self._results, "a", encoding="utf-8") as file:
                        print(json.dumps(asdict(result)), file=file)
                    verdict = result.how if result.caught else "SURVIVES"
                    print(
                        f"{number}/{total} {verdict:8} {result.seconds:5.1f} s  {mutant.id}  {mutant.what}  {result.by}",
                        flush=True,
                    )

        threads = [threading.Thread(target=work, args=(copy,)) for copy in self._copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _try(self, copy: Copy, mutant: Mutant) -> Result:
        began = time.monotonic()
        durations = self._baseline.durations
        tests = self._baseline.of(mutant)
        killers = self._killers[mutant.module]
        tests.sort(key=lambda test: -killers[test])  # stable
        original = copy.module(mutant).read_bytes()
        outcome, ran = Outcome("", "", 0), 0
        try:
            copy.put(mutant, mutant.source)
            quick = _within(tests, durations, QUICK)
            rest = _within([test for test in tests if test not in set(quick)], durations, ALL if self._thorough else 0)
            for each in (quick, rest):
                while each and not outcome.by:
                    outcome = copy.run(each, durations)
                    ran += outcome.ran
                    if not outcome.by or self._is_so(copy, outcome):
                        break
                    each = each[each.index(outcome.by) + 1 :]  # it was by chance
                    outcome = Outcome("", "", 0)
        finally:
            copy.put(mutant, original)
        if outcome.how == "fails":
            killers[outcome.by] += 1
        seconds = time.monotonic() - began
        how = outcome.how or ("survives" if tests else "not run")
        return Result(mutant.id, mutant.operator, mutant.what, bool(outcome.by), how, outcome.by, len(tests), ran, seconds)

    def _is_so(self, copy: Copy, outcome: Outcome) -> bool:
        """Whether a failure comes again, where the clock was a real one, or the machine busy."""
        if outcome.by not in self._baseline.durations or (outcome.how == "fails" and re.search(r"memory|inproc", outcome.by)):
            return True
        return bool(copy.run([outcome.by], self._baseline.durations).by)


def _within(tests: list[str], durations: dict[str, float], seconds: float) -> list[str]:
    found = []
    for test in tests:
        seconds -= durations[test]
        if seconds < 0:
            break
        found.append(test)
    return found


def sample(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Some, of all modules and operators in turn."""
    by_kind: dict[tuple[str, str], list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        by_kind[mutant.module, mutant.operator].append(mutant)
    rng = random.Random(seed)
    kinds = sorted(by_kind)
    rng.shuffle(kinds)
    for kind in kinds:
        rng.shuffle(by_kind[kind])
    found: list[Mutant] = []
    while kinds and len(found) < count:
        kinds = [kind for kind in kinds if by_kind[kind]]
        found += [by_kind[kind].pop() for kind in kinds][: count - len(found)]
    return found


def explained() -> set[str]:
    """The ids of the survivors that the page has."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return {mutant for line in text.splitlines() for mutant in re.findall(r"^\| `([^`]+/\d+)`", line)}


def report(results: Sequence[Result]) -> bool:
    """Print the tables; whether all survivors are explained."""
    known = explained()
    print("\n| rule | what it does | mutants | caught | of these by a hang |\n|---|---|---|---|---|")
    for operator, what in OPERATORS.items():
        these = [result for result in results if result.operator == operator]
        caught = [result for result in these if result.caught]
        print(f"| {operator} | {what} | {len(these)} | {len(caught)} | {sum(r.how == 'hangs' for r in caught)} |")
    caught = [result for result in results if result.caught]
    survivors = [result for result in results if not result.caught]
    share = 100 * len(caught) / max(1, len(results))
    print(f"| all | | {len(results)} | {len(caught)} ({share:.1f} %) | {sum(r.how == 'hangs' for r in caught)} |")
    print(f"\n{len(survivors)} survive, {sum(result.id in known for result in survivors)} of them explained in {PAGE.name}:\n")
    for result in sorted(survivors, key=lambda result: result.id):
        mark = "explained" if result.id in known else "?"
        print(f"| `{result.id}` | {result.what} | {result.how}, {result.ran} of {result.tests} tests | {mark} |")
    return all(result.id in known for result in survivors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say what there is, and try nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="those with one of these texts in their id")
    parser.add_argument("--not", nargs="+", default=[], metavar="TEXT", dest="without", help="none of those")
    parser.add_argument("--sample", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", action="store_true", help="those that survived the last time")
    parser.add_argument("--parallel", type=int, default=2, metavar="N")
    parser.add_argument("--quick", action="store_true", help=f"at most {QUICK:.0f} seconds of tests for each")
    parser.add_argument("--fresh", action="store_true", help="forget what is known of them, and of the tests")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "trio_dcore-mutation", help="where the copies are"
    )
    options = parser.parse_args()

    mutants = mutants_of(ROOT / "trio_dcore")
    if options.only:
        mutants = [each for each in mutants if any(text in each.id for text in options.only)]
    mutants = [each for each in mutants if not any(text in each.id for text in options.without)]
    if options.sample is not None:
        mutants = sample(mutants, options.sample, options.seed)
    if options.list:
        for mutant in mutants:
            print(f"{mutant.id}  {mutant.module}:{mutant.lines[0]}  {mutant.what}")
        print(f"{len(mutants)} mutants")
        return 0

    work: Path = options.work
    if options.fresh:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)
    results = work / "results.jsonl"
    print(f"{len(mutants)} mutants, in copies below {work}", flush=True)
    copies = []
    for number in range(options.parallel):
        shutil.rmtree(work / str(number), ignore_errors=True)
        copies.append(Copy(work / str(number)))
    saved = work / f"baseline-{copies[0].digest()}.json"
    if saved.exists():
        baseline = Baseline.load(saved)
    else:
        began = time.monotonic()
        baseline = Baseline.measure(copies)
        baseline.save(saved)
        print(f"{len(baseline.durations)} tests pass, within {time.monotonic() - began:.0f} s", flush=True)
    before = {line["id"]: Result(**line) for line in _lines(results)} if results.exists() else {}
    if options.survivors:
        todo = [each for each in mutants if each.id in before and not before[each.id].caught]
    else:
        todo = [each for each in mutants if each.id not in before]
    modules = {each.id: each.module for each in mutants}
    known = [(modules[id], result.by) for id, result in before.items() if result.how == "fails" and id in modules]
    Run(copies, baseline, results, thorough=not options.quick, known=known).of(todo)
    after = {line["id"]: Result(**line) for line in _lines(results)} if results.exists() else {}
    return 0 if report([after[each.id] for each in mutants if each.id in after]) else 1


if __name__ == "__main__":
    sys.exit(main())
