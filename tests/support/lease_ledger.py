"""The shared bucket of `gateway/store.py`'s script, once more in Python with time as an argument: its oracle.

Numbers are those of the script: microtokens, microseconds. `policies/lease.py` says what they mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, floor, inf

from policies.lease import LEASE_SECONDS, RESERVED_SECONDS, Ask, Grant, Limit

MICRO = 1_000_000
LEASE = int(LEASE_SECONDS * MICRO)
RESERVED = int(RESERVED_SECONDS * MICRO)


@dataclass
class Lease:
    number: int
    held: int
    pending: int
    ends: int
    reserved: int = 0
    expires: int = 0


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
        latest = inf if (ask.least, ask.reserved, ask.told) == (1, 0, 0) else now + RESERVED
        write = found.at > now or any(
            each.ends > now + LEASE or each.expires > latest for each in found.leases.values()
        )
        leases = {
            name: replace(each, ends=min(each.ends, now + LEASE), expires=min(each.expires, latest))
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
            spent = max(0, mine.held - ask.held - max(0, ask.back)) if ask.ack >= mine.number else 0
            released.append((min(mine.ends, now - floor(ask.quiet * MICRO)), spent))
            if mine.ends <= now:
                released.append((mine.ends, mine.held - spent))
            elif ask.ack < mine.number:
                back += mine.pending

        everybody = [*leases.values(), *([mine] if mine is not None else [])]
        expired = [each for each in everybody if each.reserved and each.expires <= now]
        back += sum(each.reserved for each in expired)
        was_reserved = 0 if mine is None else mine.reserved
        if mine is None or mine in expired:
            back -= ask.told
            write |= ask.told > 0
        write |= bool(expired) or ask.reserved != was_reserved
        write |= mine is not None and ask.reserved > 0 and mine.expires < now + RESERVED / 2

        level, at = found.level, min(found.at, now)
        for when, tokens in [*sorted(released), (now, 0)]:
            if when > at:
                level = min(capacity - outstanding * MICRO, level + (when - at) * count / period)
                at = when
            outstanding -= tokens

        others = sum(each.held for each in leases.values() if each.ends > now)
        level = min(capacity - (others + ask.held) * MICRO, level + max(0, back) * MICRO)
        level = max(min(0.0, level), level - ask.debt * MICRO)
        level = max(-capacity, level + min(0, back) * MICRO)
        tokens = min(ask.need + ask.spare, floor(level / MICRO)) if level >= ask.least * MICRO else 0
        level -= tokens * MICRO
        held = ask.held + max(0, tokens - ask.need)

        wait = 0
        if level < ask.least * MICRO:
            wait = ceil((ask.least * MICRO - level) * period / count)
            ends = [each.ends for each in leases.values() if each.held and each.ends > now]
            if ends and capacity - (others + held) * MICRO < ask.least * MICRO:
                wait = max(wait, min(ends) - now)
        if write or tokens or back or ask.debt:
            kept = {name: each for name, each in leases.items() if each.ends > now or each.expires > now}
            kept[replica] = Lease(
                number, held, tokens, now + LEASE, ask.reserved, now + RESERVED if ask.reserved else 0
            )
            self.buckets[key] = Bucket(float(floor(level)), now, kept)
        return Grant(number, tokens, floor(level) / MICRO, wait / MICRO)
