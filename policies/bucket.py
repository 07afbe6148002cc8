"""Token bucket: `capacity` tokens at most, refilled at `per_second`; a request takes what it costs or is told when.

Time is an argument, as in Go's x/time/rate, and the level is computed when asked for, so an idle bucket costs nothing.
Two numbers are the whole state: the level, and the moment it was true.

Invariants:
- 0 <= level <= capacity, to within the rounding of a float; below zero, by `capacity` at most, only after a `charge`.
- From any moment on, tokens granted <= level then + per_second * elapsed (+ tokens given back).
- A refusal changes nothing.
- A reading of the clock that is older than the newest one counts as that newest one: it refuses nothing that is there
  and refills nothing twice. (`now` is monotonic: readings come out of order, the clock itself does not go back.)
"""

from __future__ import annotations

from math import inf


class Bucket:
    """A full bucket at `now`. `per_second` and `capacity` are above 0."""

    __slots__ = ("_at", "_level", "capacity", "per_second")

    def __init__(self, per_second: float, capacity: float, now: float) -> None:
        _check(per_second, capacity)
        self.per_second = per_second
        self.capacity = capacity
        self._level = capacity
        self._at = now

    def take(self, now: float, n: float = 1.0) -> float:
        """Take `n` tokens and return 0.0; or take nothing and return the seconds until `n` will be there.

        That is `inf` for more than the bucket can ever hold.
        """
        level = self._level
        if now > self._at:
            level += (now - self._at) * self.per_second
            if level > self.capacity:  # noqa: PLR1730  min() costs as much as all the rest
                level = self.capacity
        else:
            now = self._at
        if level < n:
            return (n - level) / self.per_second if n <= self.capacity else inf
        self._level = level - n
        self._at = now
        return 0.0

    def tokens_at(self, now: float) -> float:
        """Return the level at `now`. Does not modify."""
        return min(self.capacity, self._level + max(0.0, now - self._at) * self.per_second)

    def give(self, n: float) -> None:
        """Give back tokens that were taken and not used. What does not fit is lost."""
        self._level = min(self.capacity, self._level + n)

    def charge(self, now: float, n: float) -> None:
        """Take `n` tokens that are used already, whether they are there or not. What is owed is `capacity` at most."""
        self._level = max(-self.capacity, self.tokens_at(now) - n)
        self._at = max(self._at, now)

    def reconfigure(self, per_second: float, capacity: float, now: float) -> None:
        """Go on with another rate and capacity; full stays full, half full half full, empty empty."""
        _check(per_second, capacity)
        self._level = self.tokens_at(now) / self.capacity * capacity
        self._at = max(self._at, now)
        self.per_second = per_second
        self.capacity = capacity

    def __repr__(self) -> str:
        return f"<Bucket {self._level:g} of {self.capacity:g} at {self._at:g}, {self.per_second:g}/s>"


def _check(per_second: float, capacity: float) -> None:
    if not (0.0 < per_second < inf and 0.0 < capacity < inf):
        raise ValueError(f"a bucket needs a rate and a capacity above 0, not {per_second:g}/s and {capacity:g}")
