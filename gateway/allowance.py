"""Tokens of language models that a consumer may use under a plan: reserved for a request, settled at its end.

    trail.reservation = await account.reserve(call, trail)     # what it may come to; raises a Refusal
    ...                                                        # attempts at backends, the answer to its last byte
    trail.reservation.settle(trail)                            # what it has come to, whatever happened

The last line stands in the `finally` that ends each request: a `with` of its own would cost those without a limit, too.

Requests whose tokens nobody knows (tensors, pictures, sounds, gRPC) reserve nothing and are charged nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.attempts import had_work
from gateway.limit_headers import LimitHeaders, told
from gateway.meter import UNKNOWN
from gateway.peek import expected_tokens
from policies import errors
from policies.lease import Limit
from policies.quota import Estimate, cost

if TYPE_CHECKING:
    from gateway.call import Call
    from gateway.meter import LeasedMeter, LocalMeter
    from gateway.trail import Trail


class Allowance:
    """The tokens of one account."""

    __slots__ = ("_headers", "_limit", "_rule", "meter")

    def __init__(self, plan: str, limit: Limit, meter: LocalMeter | LeasedMeter) -> None:
        self.meter = meter
        self._limit = limit
        self._rule = f"plans.{plan}.tokens"
        self._headers = LimitHeaders(plan, "tokens", limit)

    async def reserve(self, call: Call, trail: Trail) -> Reservation | None:
        """Reserve what it may come to; None: nobody knows. Raises BodyTooLarge, RateLimited, StoreUnavailable."""
        expected = expected_tokens(call, self._limit.capacity)
        tokens = expected.prompt + expected.answer
        if not tokens:
            return None
        if tokens > self._limit.capacity:  # a 429 would ask it to come back for ever
            raise errors.BodyTooLarge(
                f"This request may use {tokens} tokens, and its plan allows {told(self._limit)}: "
                "ask for a shorter answer (`max_tokens`), or send less.",
                rule=self._rule,
            )
        seconds = self.meter.take_nowait(trail.mark, tokens)
        if seconds == UNKNOWN:
            seconds = await self.meter.take(tokens)
        if seconds:
            raise errors.RateLimited(
                f"The token limit of this plan is reached: {told(self._limit)}.", rule=self._rule, retry_after=seconds
            )
        return Reservation(self.meter, expected) if self.meter.hold(tokens) else None

    def lines(self, now: float) -> bytes:
        """The header lines that tell the limit."""
        return self._headers.lines(self.meter.remaining(now))

    def is_full(self, idle: float) -> bool:
        """Whether it is full again, whatever it owed when it was last used, so many seconds ago."""
        return idle >= 2 * self._limit.capacity / self._limit.rate.per_second

    def __repr__(self) -> str:
        return f"<Allowance {self._rule}, {self.meter!r}>"


class Reservation:
    """Tokens set aside for one request."""

    __slots__ = ("_expected", "_meter")

    def __init__(self, meter: LocalMeter | LeasedMeter, expected: Estimate) -> None:
        self._meter = meter
        self._expected = expected

    def settle(self, trail: Trail) -> None:
        """Charge what the request has come to, once it has ended: called in one place, the frame of a request."""
        self._meter.settle(
            trail.clock(), self._expected.prompt + self._expected.answer, used_tokens(trail, self._expected)
        )


def used_tokens(trail: Trail, expected: Estimate) -> int:
    """What a request that has ended has come to.

    Nothing, where no backend had work with it or what the client got was a failure. Who leaves without having got
    anything (it has no status then) has had the prompt read.
    """
    if not had_work(trail.attempts) or trail.status >= 400:
        return 0
    is_whole = trail.end_reason == "ok"
    return cost(expected, trail.tokens_in, trail.tokens_out, trail.events, is_whole=is_whole)
