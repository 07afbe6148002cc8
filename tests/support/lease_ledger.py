"""The shared bucket of `gateway/store.py`'s script, once more in Python with time as an argument: its oracle.

Numbers are those of the script: microtokens, microseconds. `policies/lease.py` says what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, floor

from policies.lease import LEASE_SECONDS, Ask, Grant, Limit

MICRO = 1_000_000
LEASE = int(LEASE_SECONDS * MICRO)


@dataclass
class Lease:
    number: int
    held: int
    pending: int
    ends: int


@dataclass
class Bucket:
    level: float
    at: int
    leases: dict[str, Lease] = field(default_factory=dict)


class Ledger:
    """All buckets of one store."""

    def __init__(self) -> None:
        self.buckets: dict[bytes, Bucket] = {}

    def flush(self) -> None:
        self.buckets.clear()

    def lease(self, key: bytes, limit: Limit, replica: str, number: int, ask: Ask, now: int) -> Grant:
        """What the script answers at `now`, and what it writes."""
        capacity = float(limit.capacity * MICRO)
        count, period = round(limit.rate.count * MICRO), round(limit.rate.seconds * MICRO)
        found = self.buckets.get(key) or Bucket(capacity, now)
        write = found.at > now or any(each.ends > now + LEASE for each in found.leases.values())
        leases = {
            name: Lease(each.number, each.held, each.pending, min(each.ends, now + LEASE))
            for name, each in found.leases.items()
        }
        mine = leases.pop(replica, None)
        if mine is not None and mine.number >= number:
            return Grant(number, 0, 0.0, 0.0)

        released = [(each.ends, each.held) for each in leases.values() if each.ends <= now]
        outstanding = sum(each.held for each in leases.values())
        back = ask.back
        if mine is not None:
            outstanding += mine.held
            spent = max(0, mine.held - ask.held - ask.back) if ask.ack >= mine.number else 0
            released.append((min(mine.ends, now - floor(ask.quiet * MICRO)), spent))
            if mine.ends <= now:
                released.append((mine.ends, mine.held - spent))
            elif ask.ack < mine.number:
                back += mine.pending

        level, at = found.level, min(found.at, now)
        for when, tokens in [*sorted(released), (now, 0)]:
            if when > at:
                level = min(capacity - outstanding * MICRO, level + (when - at) * count / period)
                at = when
            outstanding -= tokens

        others = sum(each.held for each in leases.values() if each.ends > now)
        level = min(capacity - (others + ask.held) * MICRO, level + back * MICRO)
        level = max(0.0, level - ask.debt * MICRO)
        tokens = min(ask.need + ask.spare, floor(level / MICRO))
        level -= tokens * MICRO
        held = ask.held + max(0, tokens - ask.need)

        wait = 0
        if level < MICRO:
            wait = ceil((MICRO - level) * period / count)
            ends = [each.ends for each in leases.values() if each.held and each.ends > now]
            if ends and capacity - (others + held) * MICRO < MICRO:
                wait = max(wait, min(ends) - now)
        if write or tokens or back or ask.debt:
            kept = {name: each for name, each in leases.items() if each.ends > now}
            kept[replica] = Lease(number, held, tokens, now + LEASE)
            self.buckets[key] = Bucket(float(floor(level)), now, kept)
        return Grant(number, tokens, floor(level) / MICRO, wait / MICRO)
