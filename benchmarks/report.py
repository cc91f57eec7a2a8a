"""From the rounds to the table: medians, medians of per-round ratios, met or not met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from .cases import Case, Probe, Target

__all__ = ["Result", "Verdict", "as_json", "as_table", "judge"]

#: One round: what each probe measured, by the probe's label.
Round = dict[str, dict[str, float]]

# Shown in microseconds or milliseconds where seconds were measured.
_SCALE = {"µs": 1e6, "ms": 1e3}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target and what was found.

    Args:
        text: the target in words.
        value: median of the rounds' ratios, or of their numbers.
        low: the lowest of the rounds.
        high: the highest.
        met: whether the median keeps the bound.
    """

    text: str
    value: float
    low: float
    high: float
    met: bool


@dataclass(frozen=True, slots=True)
class Result:
    """All that is known about one case."""

    case: Case
    rounds: Sequence[Round]
    verdicts: tuple[Verdict, ...]

    def probes(self) -> list[Probe]:
        """Those of the case's probes that were run."""
        return [probe for probe in self.case.group.probes if probe.label in self.rounds[0]]

    def number(self, label: str, metric: str) -> float:
        """Median over the rounds, in the unit that is shown."""
        return median(one[label][metric] for one in self.rounds) * _SCALE.get(self.case.metrics[metric], 1.0)


def judge(case: Case, rounds: Sequence[Round]) -> Result:
    """Hold the measurements of a case against those of its targets whose probes were run."""
    known = rounds[0].keys()
    targets = [target for target in case.targets if {target.over, target.under or target.over} <= known]
    return Result(case, rounds, tuple(_verdict(case, target, rounds) for target in targets))


def _verdict(case: Case, target: Target, rounds: Sequence[Round]) -> Verdict:
    # The ratio is taken within each round and its median afterwards: a disturbance that hits both sides of a round cancels out.
    values = []
    for one in rounds:
        value = one[target.over][target.metric]
        values.append(value if target.under is None else value / one[target.under][target.metric])
    what = target.over if target.under is None else f"{target.over} / {target.under}"
    if len(case.metrics) > 1:
        what = f"{target.metric}: {what}"
    found = median(values)
    if target.at_most is not None:
        return Verdict(f"{what} ≤ {target.at_most:.3g}", found, min(values), max(values), found <= target.at_most)
    assert target.at_least is not None
    return Verdict(f"{what} ≥ {target.at_least:.3g}", found, min(values), max(values), found >= target.at_least)


def as_table(result: Result) -> str:
    """The lines to print for one case."""
    case = result.case
    lines = [f"{case.name}  {case.title}" + ("  [one CPU]" if case.group.same_cpu else "")]
    for probe in result.probes():
        numbers = "   ".join(f"{_short(result.number(probe.label, metric))} {unit}" for metric, unit in case.metrics.items())
        lines.append(f"    {probe.label:<24}{numbers}")
    for verdict in result.verdicts:
        span = f"{verdict.value:.3f}  ({verdict.low:.3f} … {verdict.high:.3f})"
        lines.append(f"  {'met    ' if verdict.met else 'NOT MET'} {verdict.text:<44}{span}")
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:>10,.0f}" if abs(number) >= 1000 else f"{number:>10.3g}" if abs(number) < 10 else f"{number:>10.1f}"


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The same as plain data, the single rounds included."""
    return [
        {
            "case": result.case.name,
            "title": result.case.title,
            "units": dict(result.case.metrics),
            "medians": {
                probe.label: {metric: result.number(probe.label, metric) for metric in result.case.metrics}
                for probe in result.probes()
            },
            "targets": [asdict(verdict) for verdict in result.verdicts],
            "rounds": list(result.rounds),
        }
        for result in results
    ]
