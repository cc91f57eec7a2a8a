"""Child processes of the benchmark: starting, talking to, pinning and measuring them.  Linux, as the targets are."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["ChildFailed", "MemoryWatch", "Peer", "cpu_seconds", "raise_file_limit", "resident"]

_ROOT = Path(__file__).resolve().parent.parent


class ChildFailed(RuntimeError):
    """A child process ended, or answered with an error; its own message went to stderr."""


def raise_file_limit() -> tuple[int, int]:
    """Raise the soft limit on open files to the hard one; return the limit before and after."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, hard


def cpu_seconds(pid: int = 0) -> float:
    """User and system time that a process has used: what getrusage counts, to the nanosecond, also for another process."""
    if pid == 0:
        return time.process_time()
    # clock_getcpuclockid(3) on Linux: the clock of a process is its complemented pid, shifted, with CPUCLOCK_SCHED (2).
    return time.clock_gettime((~pid << 3) | 2)


def resident(pid: int) -> int:
    """Bytes of memory that a process has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


class MemoryWatch:
    """How much resident memory a process needed beyond what it had when this was made."""

    def __init__(self, pid: int = 0) -> None:
        self._directory = Path("/proc") / (str(pid) if pid else "self")
        (self._directory / "clear_refs").write_text("5")  # resets the peak, VmHWM, to the present size
        self._before = self._read("VmRSS")

    def extra(self) -> int:
        """Bytes at the peak above the bytes at the start."""
        return self._read("VmHWM") - self._before

    def _read(self, field: str) -> int:
        for line in (self._directory / "status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise KeyError(field)


class Peer:
    """A child process that says something first and then answers one JSON line for each it is sent."""

    def __init__(self, role: str, system: str, *, environ: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.child", role, system],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env={**os.environ, **environ},
            text=True,
        )
        self.pid = self._process.pid
        self._name = f"{role} of {system}"
        self._home = os.sched_getaffinity(self.pid)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # A child ends when its stdin does; one that hangs is not waited for.
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def hear(self) -> Any:
        """The next line that the child has written."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildFailed(f"the {self._name} ended; its traceback is above")
        answer = json.loads(line)
        if "error" in answer:
            raise ChildFailed(f"the {self._name}: {answer['error']}")
        return answer

    def ask(self, **question: Any) -> Any:
        """Send a line and wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self.hear()

    @contextlib.contextmanager
    def on_cpu(self, cpu: int | None) -> Iterator[None]:
        """Keep all threads of the child on one CPU inside the block; None leaves them where they are."""
        if cpu is None:
            yield
            return
        self._pin({cpu})
        try:
            yield
        finally:
            self._pin(self._home)

    def _pin(self, cpus: set[int]) -> None:
        for thread in os.listdir(f"/proc/{self.pid}/task"):
            os.sched_setaffinity(int(thread), cpus)
