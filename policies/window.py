"""How often something happened of late: a count over a rolling window, kept in fixed slices of it.

A thing is forgotten when its slice leaves the window, so the count covers the last `seconds` less at most one slice.
Counting costs the same however many things happen; memory is one number per slice. Time is an argument, and a reading
older than the newest one is counted as of that newest one.
"""

from __future__ import annotations

_SLICES = 10


class Window:
    """An empty window of `seconds`."""

    __slots__ = ("_counts", "_ends", "_slice", "_slice_seconds", "_total")

    def __init__(self, seconds: float) -> None:
        self._slice_seconds = seconds / _SLICES
        self._counts = [0] * _SLICES
        self._total = 0
        self._slice = 0  # number of the newest slice, counted from time zero
        self._ends = 0.0

    def add(self, now: float) -> None:
        """Count one thing that happened at `now`."""
        if now >= self._ends:
            self._advance(now)
        self._counts[self._slice % _SLICES] += 1
        self._total += 1

    def count(self, now: float) -> int:
        """Return how many happened in the window that ends at `now`."""
        if now >= self._ends:
            self._advance(now)
        return self._total

    def clear(self) -> None:
        """Forget everything."""
        self._counts = [0] * _SLICES
        self._total = 0

    def _advance(self, now: float) -> None:
        newest = int(now / self._slice_seconds)
        for number in range(max(self._slice, newest - _SLICES) + 1, newest + 1):
            self._total -= self._counts[number % _SLICES]
            self._counts[number % _SLICES] = 0
        self._slice = newest
        self._ends = (newest + 1) * self._slice_seconds

    def __repr__(self) -> str:
        return f"<Window {self._total} in {self._slice_seconds * _SLICES:g} s>"
