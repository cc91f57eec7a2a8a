"""Memory of a stream whose consumer pauses: ``python -m benchmarks.pausing``.

A generator handler gives a million items to a consumer in another process, which stops taking them three times.  What both processes
hold in memory is sampled meanwhile, drawn as text, and written as a picture to docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from trio_dcore import Limits, Server, rpc

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parent.parent
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MIB = 2**20
_EVERY = 0.05  # seconds from sample to sample
_WIDTH, _HEIGHT = 72, 12  # of the text, in characters


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment: seconds since the start, and MiB of resident memory."""

    at: float
    producer: float
    consumer: float


@dataclass(frozen=True, slots=True)
class Pause:
    """When the consumer took nothing, in seconds since the start; and how many items it had then."""

    begin: float
    end: float
    items: int


# -- the two processes -----------------------------------------------------------------------------------------------------------


async def _ticks(n: int) -> AsyncIterator[dict[str, Any]]:
    for i in range(n):
        yield {"op": "tick", "n": i}


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def _produce() -> None:
    async with Server({"ticks": _ticks}) as server:
        _say(address=await server.listen("tcp://127.0.0.1:0"))
        await server.finished()


async def _consume(address: str, count: int, pause: float, window: int) -> None:
    stops = {count // 4, count // 2, 3 * count // 4}
    async with rpc(address, limits=Limits(window=window)) as remote, remote.ticks.stream(n=count) as stream:
        expected = 0
        async for item in stream:
            if item["n"] != expected:
                raise AssertionError(f"item {item['n']} came instead of {expected}")
            expected += 1
            if expected in stops:
                begin = time.monotonic()
                await trio.sleep(pause)
                _say(begin=begin, end=time.monotonic(), items=expected)
    if expected != count:
        raise AssertionError(f"{expected} items came instead of {count}")


# -- measuring -------------------------------------------------------------------------------------------------------------------


def _memory(pid: int) -> float:
    """MiB of a process that are resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / _MIB


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.pausing", "--role", *arguments], stdout=subprocess.PIPE, cwd=_ROOT, text=True
    )


def measure(count: int, pause: float, window: int) -> tuple[list[Sample], list[Pause]]:
    """Run the two processes to the end of the stream."""
    samples: list[Sample] = []
    said: list[str] = []
    producer = _start("producer")
    assert producer.stdout is not None
    try:
        address = json.loads(producer.stdout.readline())["address"]
        with _start(
            "consumer", "--address", address, "--items", str(count), "--pause", str(pause), "--window", str(window)
        ) as consumer:
            assert consumer.stdout is not None
            listening = threading.Thread(target=lambda stream=consumer.stdout: said.extend(stream), daemon=True)
            listening.start()
            start = time.monotonic()
            while consumer.poll() is None:
                try:
                    samples.append(Sample(time.monotonic() - start, _memory(producer.pid), _memory(consumer.pid)))
                except (IndexError, FileNotFoundError):
                    break  # it has just ended
                time.sleep(_EVERY)
            listening.join()
        if consumer.returncode:
            raise SystemExit("the consumer failed; its traceback is above")
    finally:
        producer.kill()
        producer.wait()
        producer.stdout.close()
    pauses = [json.loads(line) for line in said]
    return samples, [Pause(each["begin"] - start, each["end"] - start, each["items"]) for each in pauses]


# -- showing ---------------------------------------------------------------------------------------------------------------------


def as_text(samples: Sequence[Sample], pauses: Sequence[Pause]) -> str:
    """A plot of characters: P is the producer, C the consumer, ``*`` both; dots stand under pauses."""
    length = samples[-1].at or 1.0
    top = 10 * (1 + max(max(each.producer, each.consumer) for each in samples) // 10)
    rows = [[" "] * _WIDTH for _ in range(_HEIGHT)]

    def column(at: float) -> int:
        return min(_WIDTH - 1, int(at / length * _WIDTH))

    for sample in samples:
        for mark, value in (("P", sample.producer), ("C", sample.consumer)):
            row = rows[_HEIGHT - 1 - min(_HEIGHT - 1, int(value / top * _HEIGHT))]
            there = row[column(sample.at)]
            row[column(sample.at)] = mark if there in (" ", mark) else "*"
    paused = [" "] * _WIDTH
    for pause in pauses:
        first, last = column(pause.begin), column(pause.end)
        paused[first : last + 1] = "." * (last + 1 - first)
    lines = [f"{top * (_HEIGHT - index) / _HEIGHT:5.0f} |{''.join(row)}" for index, row in enumerate(rows)]
    return "\n".join(
        [
            "MiB resident: P producer, C consumer, * both; dots: the consumer pauses",
            *lines,
            f"      +{''.join(paused)}",
            f"       0 s{f'{length:.0f} s':>{_WIDTH - 3}}",
        ]
    )


def as_svg(samples: Sequence[Sample], pauses: Sequence[Pause], title: str) -> str:
    """The same as a picture."""
    width, height, left, right, above, below = 720, 300, 50, 16, 40, 40
    length = samples[-1].at or 1.0
    top = 10 * (1 + max(max(each.producer, each.consumer) for each in samples) // 10)

    def x(at: float) -> float:
        return left + at / length * (width - left - right)

    def y(value: float) -> float:
        return height - below - value / top * (height - above - below)

    def line(which: str, color: str) -> str:
        points = " ".join(f"{x(each.at):.1f},{y(getattr(each, which)):.1f}" for each in samples)
        return f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{points}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20">{title}</text>',
    ]
    for pause in pauses:
        parts.append(
            f'<rect x="{x(pause.begin):.1f}" y="{above}" width="{x(pause.end) - x(pause.begin):.1f}" '
            f'height="{height - above - below}" fill="#eeeeee"/>'
        )
        parts.append(f'<text x="{x(pause.begin) + 4:.1f}" y="{above + 14}" fill="#777777">pause</text>')
    for step in range(5):
        value = top * step / 4
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#cccccc"/>')
        parts.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.0f}</text>')
        at = length * step / 4
        parts.append(f'<text x="{x(at):.1f}" y="{height - below + 16}" text-anchor="middle">{at:.0f} s</text>')
    parts.append(f'<text x="6" y="{above - 8}">MiB</text>')
    for index, (which, color) in enumerate((("producer", "#1b6ca8"), ("consumer", "#c0504d"))):
        parts.append(line(which, color))
        parts.append(f'<text x="{left + 90 * index}" y="{height - 6}" fill="{color}">{which}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def summary(samples: Sequence[Sample], pauses: Sequence[Pause], count: int) -> str:
    """What is to be seen in it, in words."""
    settled = [each for each in samples if each.at > 1] or list(samples)
    lines = []
    for which in ("producer", "consumer"):
        values = [getattr(each, which) for each in settled]
        lines.append(f"{which}: {min(values):.1f} to {max(values):.1f} MiB after the first second")
    asleep = sum(pause.end - pause.begin for pause in pauses)
    lines.append(f"{count} items in {samples[-1].at:.1f} s, of which the consumer paused {asleep:.1f} s")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, draw; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pausing", description="Plot the memory of a stream that pauses.")
    parser.add_argument("--items", type=int, default=1_000_000, help="of the stream (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds, three times (default: %(default)s)")
    parser.add_argument("--window", type=int, default=Limits().window, help="the consumer's (default: %(default)s)")
    parser.add_argument("--svg", type=Path, default=_ROOT / "docs" / "stream-memory.svg", help="where the picture goes")
    parser.add_argument("--role", choices=("producer", "consumer"), help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.role == "producer":
        trio.run(_produce)
    elif options.role == "consumer":
        trio.run(_consume, options.address, options.items, options.pause, options.window)
    else:
        samples, pauses = measure(options.items, options.pause, options.window)
        print(as_text(samples, pauses))
        print(summary(samples, pauses, options.items))
        title = f"A stream of {options.items:,} items to a consumer that pauses: resident memory, window of {options.window}"
        options.svg.write_text(as_svg(samples, pauses, title), encoding="utf-8")
        print(f"written: {options.svg}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
