"""Where CPU time goes, by sampling: each millisecond of CPU a signal looks at what runs.

A tracing profiler (cProfile) charges each call for being watched, and so makes small functions look dear. A sample
costs the same wherever it falls. Time inside C is charged to the line of Python that called it, because Python takes
signals between two of its instructions; the kernel's own time is not seen apart.
"""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TypeVar

PERIOD_SECONDS = 0.001
ROOT = Path(__file__).parent.parent

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """A function, and the part of the program that it belongs to."""

    part: str
    function: str


@dataclass(slots=True)
class Samples:
    """How often each place was seen at work."""

    seen: Counter[Place] = field(default_factory=Counter)

    def by_part(self) -> list[tuple[str, float]]:
        """Shares of all samples, the largest first."""
        parts: Counter[str] = Counter()
        for place, count in self.seen.items():
            parts[place.part] += count
        return shares(parts)

    def by_function(self) -> list[tuple[Place, float]]:
        return shares(self.seen)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Samples what this thread runs meanwhile; it has to be the main one, which gets the signals."""
        before = signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, PERIOD_SECONDS, PERIOD_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    def _look(self, _: int, frame: FrameType | None) -> None:
        if frame is not None:
            self.seen[Place(part_of(frame.f_code.co_filename), frame.f_code.co_qualname)] += 1


def shares(counts: Mapping[T, int]) -> list[tuple[T, float]]:
    total = sum(counts.values()) or 1
    return sorted(((name, count / total) for name, count in counts.items()), key=lambda each: -each[1])


def part_of(path: str) -> str:
    """`gateway/relay.py` of ours, `aiohttp/web_protocol.py` of a library, `asyncio/queues.py` of Python."""
    file = Path(path)
    parts = file.parts
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    if file.is_relative_to(ROOT):
        return file.relative_to(ROOT).as_posix()
    return "/".join(parts[-2:])
