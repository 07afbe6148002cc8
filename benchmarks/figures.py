"""What is measured and how it is told: figures, their values over the rounds, medians and spreads. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Round = Mapping[str, float]
"""What one round of one gateway gave: figure by name."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that a workload gives in each round. `added` is told beside it as the difference to `direct`."""

    name: str
    unit: str
    title: str
    digits: int = 1
    added: bool = False

    @property
    def heading(self) -> str:
        return f"{self.title} {self.unit}".strip()


def told(figures: Sequence[Figure], measured: Round) -> str:
    """One round in one line."""
    parts = (
        f"{each.title} {measured[each.name]:.{each.digits}f} {each.unit}" for each in figures if each.name in measured
    )
    return ", ".join(part.strip() for part in parts)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over all rounds."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), tuple(values))


def spreads(rounds: Sequence[Round]) -> dict[str, Spread]:
    """Each figure over these rounds; one that a round lacks is taken from the others."""
    names = dict.fromkeys(name for each in rounds for name in each)
    return {name: Spread.of([each[name] for each in rounds if name in each]) for name in names}


def percentile(values: Iterable[float], share: float) -> float:
    """The nearest-rank percentile: the smallest value that at least `share` of all do not exceed. 0 of nothing."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    rank = -(-len(ordered) * share // 1)  # ceil
    return ordered[max(0, int(rank) - 1)]


def micros_each(cpu_seconds: float, count: float) -> float:
    """CPU for each of them in microseconds; nothing done costs nothing."""
    return cpu_seconds * 1e6 / count if count else 0.0


def admitted_share(admitted: float, *, rate: float, burst: float, seconds: float) -> float:
    """What got through of what a full bucket allows in this time: above 1 the limit was broken."""
    return admitted / (rate * seconds + burst)
