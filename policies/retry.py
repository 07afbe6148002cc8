"""Whether a failed attempt may be made again on another backend, and how soon.

Three things must hold: the route has attempts left, the failure leaves no doubt that nothing was started (or the route
says that a request may run twice), and the budget still has a retry. The budget is what keeps retries from turning a
partial outage into a whole one: retries are at most a share of the requests, not a multiple of them. After the first
byte to the client there is no retry at all; that question never comes here.
"""

from __future__ import annotations

from enum import Enum
from random import Random
from typing import Final

from policies.backoff import full_jitter
from policies.policy import RetryRule
from policies.window import Window


class Failure(Enum):
    """How an attempt ended without an answer to relay."""

    CONNECT_FAIL = "connect_fail"
    CONNECT_TIMEOUT = "connect_timeout"
    STALE = "stale"  # a reused connection died before any byte: retried once for free, by the caller, on a fresh one
    NOT_STARTED = "not_started"  # 503 with x-backend-not-started
    BUSY = "busy"  # 429
    RESET = "reset"  # a fresh connection was closed before any byte
    PROTOCOL = "protocol"  # what came was no HTTP
    SERVER_ERROR = "server_error"  # 5xx
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"


_NOTHING_STARTED: Final = frozenset(
    {Failure.CONNECT_FAIL, Failure.CONNECT_TIMEOUT, Failure.NOT_STARTED, Failure.BUSY},
)
# Never FIRST_BYTE_TIMEOUT: a prompt too long for one backend in time is too long for the next.
_RETRIED_IF_IDEMPOTENT: Final = frozenset({Failure.STALE, Failure.RESET, Failure.PROTOCOL, Failure.SERVER_ERROR})
_TOLD_TO_WAIT: Final = frozenset({Failure.NOT_STARTED, Failure.BUSY})

# Linkerd's budget is 20 % and 10 retries a second over 10 s. Its floor is made for requests of milliseconds; one of
# ours holds an accelerator for seconds, so the floor here is a tenth: 10 retries in the 10 s.
_FLOOR: Final = 10
_WINDOW_SECONDS: Final = 10.0

# Envoy's: base 25 ms, cap ten times that.
_BASE_DELAY: Final = 0.025
_LONGEST_DELAY: Final = 0.25


class RetryBudget:
    """Allows, in any `window`, `floor` retries and `fraction` of a retry for each request."""

    __slots__ = ("_floor", "_fraction", "_requests", "_retries")

    def __init__(self, fraction: float, floor: int = _FLOOR, window: float = _WINDOW_SECONDS) -> None:
        self._fraction = fraction
        self._floor = floor
        self._requests = Window(window)
        self._retries = Window(window)

    def deposit(self, now: float) -> None:
        """Count a request; its first attempt, not its retries."""
        self._requests.add(now)

    def withdraw(self, now: float) -> bool:
        """Take one retry if there is one."""
        allowed = self._floor + self._fraction * self._requests.count(now)
        if self._retries.count(now) + 1 > allowed:
            return False
        self._retries.add(now)
        return True

    def __repr__(self) -> str:
        return f"<RetryBudget {self._retries!r} of {self._floor} + {self._fraction:.0%} of {self._requests!r}>"


def may_retry(failure: Failure, rule: RetryRule, attempts_made: int, budget: RetryBudget, now: float) -> bool:
    """Whether to try another backend after `attempts_made`; a yes is taken out of the budget.

    A free retry after STALE is no attempt made. Where it was used up, STALE counts as RESET.
    """
    if attempts_made >= rule.attempts:
        return False
    if failure not in _NOTHING_STARTED and not (rule.idempotent and failure in _RETRIED_IF_IDEMPOTENT):
        return False
    return budget.withdraw(now)


def delay_before(failure: Failure, retries_made: int, rng: Random) -> float:
    """Return the seconds to wait before a retry: full jitter where backends said that they are full, else 0.0.

    `retries_made` does not count the one to come.
    """
    if failure not in _TOLD_TO_WAIT:
        return 0.0
    return full_jitter(retries_made, _BASE_DELAY, _LONGEST_DELAY, rng)
