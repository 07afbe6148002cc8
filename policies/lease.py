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

A request may need many tokens, and is then known to have used fewer or more only when it has ended:

- It waits for all that it needs. A grant is none when not even the first of those who wait could go (`least`).
- What it did not use comes back. What it used beyond is a `back` below zero: it takes the level below zero, by the
  capacity at most, and is asked for again until an answer comes.
- What is set aside for requests under way is told (`reserved`), though it is spent already, and is lost with a replica
  that dies. So the store keeps it for `RESERVED_SECONDS` after it was last told, and then puts it back. `told` is the
  most that the store may think; where it has put that back already, or has forgotten it, it is taken anew.

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

RESERVED_SECONDS = 5.0
"""How long after it last told of them what a replica has set aside for its requests is kept for it."""

RENEW_SECONDS = RESERVED_SECONDS / 3
"""It tells so often: two questions may be lost."""

TELL_SECONDS = 0.1
"""And this soon when there is more: the longest that a reservation may be lost by a crash."""

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
    least: int = 1
    reserved: int = 0
    told: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """The store's answer: whole tokens, the level left, and when that is below `least`, the seconds until it is not."""

    number: int
    tokens: int
    level: float
    wait: float


class Slice:
    """What one replica holds of one bucket. At most one question is under way at a time."""

    __slots__ = (
        "_ack", "_capacity", "_credit", "_debt", "_demand", "_demand_at", "_expires_at", "_leased", "_level",
        "_level_at", "_next_at", "_next_for", "_overdrawn", "_per_second", "_renewed_at", "_spent_at", "_told",
        "closed_for", "closed_until", "limit", "low_water", "reserved", "tokens",
    )  # fmt: skip

    def __init__(self, limit: Limit, now: float) -> None:
        self.tokens = 0  # spare tokens in hand
        self.low_water = -1  # at or below this many it is time to ask for more; -1: do not
        self.closed_until = OPEN  # the bucket is known to be too empty until then
        self.closed_for = 1  # for requests that need at least so many
        self.reserved = 0  # tokens set aside for requests under way
        self._expires_at = now
        self._renewed_at = now
        self._spent_at = now
        self._leased = 0  # tokens that the store counts as held here
        self._level = float(limit.capacity)  # of the store's bucket, when last told
        self._level_at = now
        self._next_at = now  # when the store's bucket will have so many tokens, when last told
        self._next_for = 1
        self._demand = 0.0  # tokens needed, fading with DEMAND_SECONDS
        self._demand_at = now
        self._ack = 0
        self._credit = 0  # tokens that go back to the store; below zero: used beyond what it granted
        self._overdrawn = 0  # of the question under way: what was used beyond
        self._debt = 0
        self._told = 0
        self.reconfigure(limit)

    def reconfigure(self, limit: Limit) -> None:
        """Go on under another limit. The store learns of it with the next question."""
        self.limit = limit
        self._per_second = limit.rate.per_second
        self._capacity = float(limit.capacity)
        self.tokens = min(self.tokens, limit.capacity)
        self.closed_until = OPEN

    def take(self, now: float, n: int = 1) -> bool:
        """Spend `n` tokens of the lease, if they are there."""
        if self.tokens < n or now >= self._expires_at:
            return False
        self.tokens -= n
        self._spent_at = now
        return True

    def is_closed(self, now: float, n: int) -> bool:
        """Whether the store need not be asked for `n` tokens now."""
        return now < self.closed_until and n >= self.closed_for

    def put_back(self, now: float, tokens: int = 1) -> None:
        """Requests that were granted did no work: their tokens may be spent again, by this replica or by another."""
        if now < self._expires_at and self.tokens + tokens <= self._leased:
            self.tokens += tokens  # the store still counts them as held here
            return
        self._credit = min(self._credit + tokens, self.limit.capacity)
        self.closed_until = OPEN

    def charge(self, now: float, tokens: int) -> None:
        """A request has used more than it was granted: from what is in hand, else it is owed to the store."""
        in_hand = min(self.tokens, tokens) if now < self._expires_at else 0
        if in_hand:
            self.take(now, in_hand)
        self._credit = max(self._credit - (tokens - in_hand), -self.limit.capacity)

    def spend_alone(self, tokens: int = 1) -> None:
        """A request was granted without the store, which is told when it is back."""
        self._debt = min(self._debt + tokens, self.limit.capacity)

    def forgive(self, tokens: int = 1) -> int:
        """A request that was granted alone did less work: takes it off the debt, as far as there is one."""
        forgiven = min(self._debt, tokens)
        self._debt -= forgiven
        return forgiven

    def ask(self, now: float, need: int, replicas: int, least: int = 1) -> Ask:
        """The question to send now, for `need` tokens that are waited for and as many to spare as will soon be needed.

        Who waits first needs `least`.
        """
        demand = self._note_demand(now, need)
        self._drop_expired(now)
        most = self.limit.capacity // (4 * max(1, replicas))
        spare = min(int(demand), most) - self.tokens
        return self._asked(now, need, spare if spare >= least else 0, least)  # fewer would be of no use here

    def give_back(self, now: float, need: int, least: int = 1) -> Ask:
        """The question that returns every spare token, and asks for those that are waited for."""
        self._note_demand(now, need)
        self._drop_expired(now)
        self._credit += self.tokens
        self.tokens = 0
        return self._asked(now, need, 0, least)

    def tell(self, now: float, need: int, least: int) -> Ask:
        """The question that only tells how things are, and asks for those that are waited for."""
        self._note_demand(now, need)
        self._drop_expired(now)
        return self._asked(now, need, 0, least)

    def answered(self, ask: Ask, grant: Grant, now: float) -> int:
        """Take over what was granted; returns how many of the tokens that were waited for are there."""
        going = min(ask.need, grant.tokens)
        self._overdrawn = 0
        self._told = ask.reserved
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
            self._next_at, self._next_for = now + grant.wait, ask.least
            self.closed_for = max(1, int(grant.level) + 1)
            self.closed_until = now + max(min(grant.wait, BELIEVED_SECONDS), self._patience())
        else:
            self.low_water = self.tokens // 2 if self.tokens else -1
            self.closed_until = OPEN
        return going

    def refusal(self, now: float, n: int = 1) -> float:
        """Seconds until there may be `n` tokens, for a request that comes before `closed_until`."""
        return max(self.closed_until, self._next_at + (n - self._next_for) / self._per_second) - now

    def lost(self) -> None:
        """No answer came. What is in hand stays good until it expires."""
        self.low_water = -1
        self._credit -= self._overdrawn
        self._overdrawn = 0

    def to_return(self) -> int:
        """Tokens that the store does not count as spent although they are not: in hand, or given back by requests."""
        return self.tokens + self._credit

    def has_news(self) -> bool:
        """Whether the store counts otherwise than it would if it knew all: it should be told, asked or not."""
        return self.tokens > 0 or self._credit != 0

    def is_reserved(self) -> bool:
        """Whether the store thinks, or should think, that tokens are set aside here."""
        return self.reserved > 0 or self._told > 0

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
            return float(self.tokens + self.closed_for - 1)
        tokens = self.bucket_level(now) + self.tokens
        return min(self._capacity, tokens)

    def _asked(self, now: float, need: int, spare: int, least: int) -> Ask:
        # A credit is sent once, a debt until an answer comes: a lost question makes the bucket poorer, never richer.
        back, self._credit = self._credit, 0
        self._overdrawn = max(0, -back)
        told, self._told = self._told, max(self._told, self.reserved)
        quiet = max(0.0, now - self._spent_at)
        self._leased = self.tokens
        return Ask(
            need, spare, self.tokens, back, self._debt, quiet, self._ack, now, least, self.reserved, told
        )  # fmt: skip

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
