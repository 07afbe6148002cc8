"""How long to wait before trying again, so that those who failed together do not come back together.

Exponential backoff with full jitter: the n-th delay is uniform in [0, min(cap, base * 2^n)). Of the jitters compared
in Marc Brooker's "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015) it does the work with the fewest calls.
"""

from __future__ import annotations

from random import Random

_MAX_DOUBLINGS = 64  # any cap is reached long before; 2.0 ** 1024 would overflow


def full_jitter(failures: int, base: float, cap: float, rng: Random) -> float:
    """Seconds to wait after `failures` failures in a row (0 counts as the first)."""
    return rng.random() * min(cap, base * 2.0 ** min(failures, _MAX_DOUBLINGS))


class Backoff:
    """The delays of one thing that is tried again and again: they grow until `reset`."""

    __slots__ = ("_base", "_cap", "_failures", "_rng")

    def __init__(self, base: float, cap: float, rng: Random) -> None:
        self._base = base
        self._cap = cap
        self._rng = rng
        self._failures = 0

    def next_delay(self) -> float:
        """Seconds to wait after one more failure."""
        delay = full_jitter(self._failures, self._base, self._cap, self._rng)
        self._failures += 1
        return delay

    def reset(self) -> None:
        """Start again with short delays, because it worked."""
        self._failures = 0

    def __repr__(self) -> str:
        return f"<Backoff {self._failures} failures, {self._base:g}..{self._cap:g} s>"
