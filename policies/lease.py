"""A replica's lease of a shared token bucket: what to ask the store for, and what may be spent until the next answer.

Theory. The bucket (`capacity` tokens, `rate`) lives in a store that is too far away to ask for each request. A replica
asks for a few whole tokens at once and spends them alone. Let P be the tokens in the bucket plus all that replicas hold
unspent. P never exceeds the capacity, grows no faster than the rate, and each admitted request takes one from it; hence

    in every window, all replicas together admit at most  capacity + rate * window.

The store keeps P within the capacity by stopping the refill at `capacity - held by replicas`. So whatever a replica
holds must be known there:

- Tokens for requests that wait for the answer (`need`) are spent the moment the store grants them.
- Tokens beyond (`spare`) count as held until the replica says they are spent (`held` is what is left, `quiet` how long
  ago the newest spend was, so that the refill is not stopped for longer than they were really held) or until the lease
  ends: `LEASE_SECONDS` after the store wrote it, and a little earlier here, counted from before the question was sent.
- Tokens that come back (`back`: unspent, or of a request that did no work) go into the bucket, never above that stop.
  Until then they count as admitted.
- `ack` names the last answer that arrived. If the store wrote a later one, that one was lost on its way: what it
  granted was spent by nobody and goes back into the bucket.
- `debt` is what was admitted without the store while it was away. It is taken off the level, not below zero.

A grant smaller than asked means that the bucket is empty: until `closed_until` requests are refused without asking.
That is never longer than `BELIEVED_SECONDS`, however long the next token takes: another replica may give some back, and
a store may forget. What a refused request is told is the time to the next token all the same (`refusal`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf

from policies.policy import Rate

LEASE_SECONDS = 0.5
"""How long spare tokens may be held. Short, because the refill waits for tokens that a dead replica took with it."""

SPENDABLE_SECONDS = LEASE_SECONDS * 0.98
"""As LEASE_SECONDS on a clock that may run slower than the store's; counted from before the question was sent."""

KEEP_SECONDS = 0.15
"""Spare tokens that outlast this are more than the traffic needs: they go back."""

DEMAND_SECONDS = 0.1
"""Spare tokens are asked for as many as were needed in about this time."""

MOST_CLOSED_SECONDS = 0.05
LEAST_CLOSED_SECONDS = 0.002
"""A replica asks an empty bucket again after a quarter of the time it takes to fill, within these bounds: seldom enough
to be cheap, often enough that the bucket does not run full unused."""

BELIEVED_SECONDS = 1.0
"""How long a replica takes it from the store that a bucket is empty."""

OPEN = -inf
"""`closed_until` of a bucket that may be asked: before every reading of the clock, also one older than the answer."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A bucket's size and speed: at most `capacity` tokens, refilled at `rate`."""

    capacity: int
    rate: Rate


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to the store; the module's head says what each number means. It was put together at `sent_at`."""

    need: int
    spare: int
    held: int
    back: int
    debt: int
    quiet: float
    ack: int
    sent_at: float


@dataclass(frozen=True, slots=True)
class Grant:
    """The store's answer: whole tokens, the level left, and when that is below one, the seconds until it is not."""

    number: int
    tokens: int
    level: float
    wait: float


class Slice:
    """What one replica holds of one bucket. At most one question is under way at a time."""

    __slots__ = (
        "_ack", "_capacity", "_credit", "_debt", "_demand", "_demand_at", "_expires_at", "_leased", "_level",
        "_level_at", "_next_at", "_per_second", "_renewed_at", "_spent_at", "closed_until", "limit", "low_water",
        "tokens",
    )  # fmt: skip

    def __init__(self, limit: Limit, now: float) -> None:
        self.tokens = 0  # spare tokens in hand
        self.low_water = -1  # at or below this many it is time to ask for more; -1: do not
        self.closed_until = OPEN  # the bucket is known to be empty until then
        self._expires_at = now
        self._renewed_at = now
        self._spent_at = now
        self._leased = 0  # tokens that the store counts as held here
        self._level = float(limit.capacity)  # of the store's bucket, when last told
        self._level_at = now
        self._next_at = now  # when the store's bucket will have a token, when last told
        self._demand = 0.0  # tokens needed, fading with DEMAND_SECONDS
        self._demand_at = now
        self._ack = 0
        self._credit = 0
        self._debt = 0
        self.reconfigure(limit)

    def reconfigure(self, limit: Limit) -> None:
        """Go on under another limit. The store learns of it with the next question."""
        self.limit = limit
        self._per_second = limit.rate.per_second
        self._capacity = float(limit.capacity)
        self.tokens = min(self.tokens, limit.capacity)
        self.closed_until = OPEN

    def take(self, now: float) -> bool:
        """Spend a token of the lease, if there is one."""
        if self.tokens <= 0 or now >= self._expires_at:
            return False
        self.tokens -= 1
        self._spent_at = now
        return True

    def put_back(self, now: float, tokens: int = 1) -> None:
        """Requests that were granted did no work: their tokens may be spent again, by this replica or by another."""
        if now < self._expires_at and self.tokens + tokens <= self._leased:
            self.tokens += tokens  # the store still counts them as held here
            return
        self._credit = min(self._credit + tokens, self.limit.capacity)
        self.closed_until = OPEN

    def spend_alone(self) -> None:
        """A request was granted without the store, which is told when it is back."""
        self._debt = min(self._debt + 1, self.limit.capacity)

    def forgive(self) -> bool:
        """A request that was granted alone did no work: takes it off the debt, if there is one."""
        if not self._debt:
            return False
        self._debt -= 1
        return True

    def ask(self, now: float, need: int, replicas: int) -> Ask:
        """The question to send now, for `need` requests that wait and as much to spare as will soon be needed."""
        demand = self._note_demand(now, need)
        self._drop_expired(now)
        most = self.limit.capacity // (4 * max(1, replicas))
        spare = max(0, min(int(demand), most) - self.tokens)
        return self._asked(now, need, spare)

    def give_back(self, now: float, need: int) -> Ask:
        """The question that returns every spare token, for `need` requests that wait."""
        self._note_demand(now, need)
        self._drop_expired(now)
        self._credit += self.tokens
        self.tokens = 0
        return self._asked(now, need, 0)

    def answered(self, ask: Ask, grant: Grant, now: float) -> int:
        """Take over what was granted; returns how many of those who waited may go."""
        going = min(ask.need, grant.tokens)
        self._debt -= min(self._debt, ask.debt)
        self._ack = grant.number
        self._level, self._level_at = grant.level, now
        if grant.tokens:
            spare = grant.tokens - going
            self.tokens += spare
            self._leased = ask.held + spare
            self._expires_at = ask.sent_at + SPENDABLE_SECONDS
            self._renewed_at = now
        if grant.tokens < ask.need + ask.spare:
            self.low_water = -1
            self._next_at = now + grant.wait
            self.closed_until = now + max(min(grant.wait, BELIEVED_SECONDS), self._patience())
        else:
            self.low_water = self.tokens // 2 if self.tokens else -1
            self.closed_until = OPEN
        return going

    def refusal(self, now: float) -> float:
        """Seconds until there may be a token, for a request that comes before `closed_until`."""
        return max(self.closed_until, self._next_at) - now

    def lost(self) -> None:
        """No answer came. What is in hand stays good until it expires."""
        self.low_water = -1

    def to_return(self) -> int:
        """Tokens that the store does not count as spent although they are not: in hand, or given back by requests."""
        return self.tokens + self._credit

    def outlasts_need(self, now: float) -> float:
        """Seconds until what is unspent should go back; 0.0: now. Never so few that no clock can count them."""
        seconds = self._renewed_at + KEEP_SECONDS - now
        return seconds if seconds > 0.001 else 0.0

    def bucket_level(self, now: float) -> float:
        """The level of the store's bucket as far as it is known here: others may have taken from it since."""
        level = self._level
        if now > self._level_at:
            level += (now - self._level_at) * self._per_second
        return min(self._capacity, level)

    def owed(self) -> int:
        """Tokens that were spent alone and the store has not heard of, less those that go back to it."""
        return self._debt - self._credit

    def remaining(self, now: float) -> float:
        """Tokens that a consumer can still count on."""
        if now < self.closed_until:
            return float(self.tokens)
        tokens = self.bucket_level(now) + self.tokens
        return min(self._capacity, tokens)

    def _asked(self, now: float, need: int, spare: int) -> Ask:
        # A credit is sent once, a debt until an answer comes: a lost question makes the bucket poorer, never richer.
        back, self._credit = self._credit, 0
        quiet = max(0.0, now - self._spent_at)
        self._leased = self.tokens
        return Ask(need, spare, self.tokens, back, self._debt, quiet, self._ack, now)

    def _drop_expired(self, now: float) -> None:
        if now >= self._expires_at:
            self.tokens = 0

    def _note_demand(self, now: float, need: int) -> float:
        """The demand of late, without the requests that wait now: one alone is no reason to hold tokens."""
        spent = max(0, self._leased - self.tokens)
        demand = self._demand * exp((self._demand_at - now) / DEMAND_SECONDS) + spent
        self._demand = demand + need
        self._demand_at = now
        return demand

    def _patience(self) -> float:
        quarter = self.limit.capacity / (4 * self._per_second)
        return max(LEAST_CLOSED_SECONDS, min(MOST_CLOSED_SECONDS, quarter))

    def __repr__(self) -> str:
        return (
            f"<Slice {self.tokens} in hand until {self._expires_at:g}, bucket {self._level:g} of {self.limit.capacity} "
            f"at {self._level_at:g}, closed until {self.closed_until:g}, debt {self._debt}>"
        )
