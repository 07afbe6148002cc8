"""Circuit breaker of one backend: stops sending to it while it fails, then tries it with a few requests.

CLOSED => OPEN when a request fails and, within `window`, at least `of_at_least` ended and the share `failures` of them
    failed, or the last `of_at_least` all failed: however much went well before, it is over. Everything passes. The trip
    waits for the next failure while the caller says that no more may be ejected.
OPEN => HALF_OPEN when its time is over and the next request comes: nothing passes before.
    The time is `open`, doubled with each trip that follows on another, at most 60 s (`open` itself where that is
    longer), and then up to 20 % more or less, so that the replicas of the gateway do not come back as one. A trip
    follows on another until the breaker has been closed for as long as the next rest would last: a backend that fails,
    recovers and fails again is tried less and less often.
HALF_OPEN => CLOSED when all `probes` succeeded, OPEN when one failed.
    At most `probes` requests pass in all, not at a time: what a weak backend has to bear is bounded however many wait.
    For the way back no leave to eject is asked: it is ejected already.

Each change of state begins a new generation. Whoever enters gets a ticket of the present one, and a ticket of an older
one changes nothing: requests that were sent before a trip cannot close or open what came after (sony/gobreaker).

A request that says nothing about the backend (the client left, 4xx, 429) is IGNORED, and a probe that was ignored gives
its place back. A request that is sent without a ticket leaves with REFUSED, which is of no generation.

The doubling and the cap are those of Envoy's outlier detection (base_ejection_time, max_ejection_time), with smaller
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from math import inf
from random import Random
from typing import Final

from policies.policy import BreakerRule
from policies.window import Window


class State(Enum):
    """Open means that nothing passes."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Outcome(Enum):
    """What a request that ended says about its backend."""

    SUCCESS = "success"
    FAILURE = "failure"
    IGNORED = "ignored"


REFUSED: Final = -1

_LONGEST_OPEN: Final = 60.0
_JITTER: Final = 0.2

# Looking a member up in its Enum costs as much as the rest of a call.
_CLOSED: Final = State.CLOSED
_OPEN: Final = State.OPEN
_HALF_OPEN: Final = State.HALF_OPEN
_FAILURE: Final = Outcome.FAILURE
_IGNORED: Final = Outcome.IGNORED


class Breaker:
    """A closed breaker. `on_change` hears each new state after it is in force."""

    __slots__ = (
        "_closed_at",
        "_ended",
        "_failed",
        "_generation",
        "_in_a_row",
        "_on_change",
        "_open_seconds",
        "_places",
        "_reopens_at",
        "_rng",
        "_rule",
        "_to_succeed",
        "is_closed",
        "state",
    )

    def __init__(self, rule: BreakerRule, rng: Random, on_change: Callable[[State], None]) -> None:
        self._rule = rule
        self._rng = rng
        self._on_change = on_change
        self._ended = Window(rule.window)
        self._failed = Window(rule.window)
        self._in_a_row = 0  # failures since the last success
        self._generation = 0
        self._open_seconds = rule.open  # of the next trip, before jitter
        self._closed_at = -inf
        self._reopens_at = 0.0
        self._places = 0  # probes that may still start
        self._to_succeed = 0  # probes that must still succeed
        self.state = _CLOSED
        self.is_closed = True

    def enter(self, now: float) -> int:
        """Return the ticket to `leave` with, or REFUSED. Whoever got a ticket must leave, whatever happens."""
        if self.is_closed:
            return self._generation
        if self.state is _OPEN:
            if now < self._reopens_at:
                return REFUSED
            self._half_open()
        if not self._places:
            return REFUSED
        self._places -= 1
        return self._generation

    def leave(self, ticket: int, outcome: Outcome, now: float, *, may_open: bool = True) -> None:
        """Tell how the request ended, once. `may_open`: one more backend may be ejected at this moment."""
        if ticket != self._generation:
            return
        if self.is_closed:
            self._count(outcome, now, may_open)
        else:
            self._judge_probe(outcome, now)

    def is_available(self, now: float) -> bool:
        """Whether `enter` would give a ticket. Does not modify."""
        if self.state is _OPEN:
            return now >= self._reopens_at
        return self.is_closed or self._places > 0

    def retry_after(self, now: float) -> float:
        """Return the seconds until it makes sense to come again; 0.0 if that is now.

        While the last probes are out nobody knows: then it is the time a first trip lasts.
        """
        if self.is_available(now):
            return 0.0
        return self._reopens_at - now if self.state is _OPEN else self._rule.open

    def _count(self, outcome: Outcome, now: float, may_open: bool) -> None:
        if outcome is _IGNORED:
            return
        self._ended.add(now)
        if outcome is not _FAILURE:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self._failed.add(now)
        if may_open and self._is_failing(now):
            self._open(now)

    def _is_failing(self, now: float) -> bool:
        ended, failed, enough = self._ended.count(now), self._failed.count(now), self._rule.of_at_least
        return ended >= enough and (
            failed / ended >= self._rule.failures or (failed >= enough and self._in_a_row >= enough)
        )

    def _judge_probe(self, outcome: Outcome, now: float) -> None:
        if outcome is _FAILURE:
            self._open(now)
        elif outcome is _IGNORED:
            self._places += 1
        else:
            self._to_succeed -= 1
            if not self._to_succeed:
                self._close(now)

    def _open(self, now: float) -> None:
        if self.is_closed and now - self._closed_at >= self._open_seconds:
            self._open_seconds = self._rule.open
        self._reopens_at = now + self._open_seconds * (1 + _JITTER * (2 * self._rng.random() - 1))
        self._open_seconds = min(2 * self._open_seconds, max(_LONGEST_OPEN, self._rule.open))
        self._become(_OPEN)

    def _half_open(self) -> None:
        self._places = self._to_succeed = self._rule.probes
        self._become(_HALF_OPEN)

    def _close(self, now: float) -> None:
        self._closed_at = now
        self._ended.clear()
        self._failed.clear()
        self._in_a_row = 0
        self._become(_CLOSED)

    def _become(self, state: State) -> None:
        """Change the state: the only place that does."""
        self._generation += 1
        self.state = state
        self.is_closed = state is _CLOSED
        self._on_change(state)

    def __repr__(self) -> str:
        return f"<Breaker {self._describe()}, generation {self._generation}>"

    def _describe(self) -> str:
        if self.state is _OPEN:
            return f"open until {self._reopens_at:g}"
        if self.state is _HALF_OPEN:
            return f"half open: {self._places} probes may start, {self._to_succeed} must succeed"
        return f"closed: {self._failed!r} failed of {self._ended!r}"


def may_eject(ejected: int, total: int, eject_at_most: float) -> bool:
    """Whether one more of `total` may be ejected: up to the share, but always one (as Envoy's max_ejection_percent).

    So a backend that is alone can be left alone too: failing fast is better than sending to what fails.
    """
    return ejected < total and (ejected == 0 or (ejected + 1) / total <= eject_at_most)
