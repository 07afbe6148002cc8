"""Which of several equal backends gets the next request.

A `Chooser` is made for one tuple of candidates, and made anew when membership, a weight or a `max_concurrency` changes.
What changes from request to request (in flight, load, latency, age) is read from the candidates; they are never written
to. One at its `max_concurrency`, of weight 0 or among the refused is no choice; with none left the answer is None.

round_robin  Everyone in turn, as often as its weight, the turns of a heavy one spread out.
least_load   The less loaded of two drawn at random: "the power of two choices" (Mitzenmacher, 2001; tower's p2c).
             Two are almost as good as all, and replicas that look at all of them run after the same one together.
             Load is what this gateway has in flight there and what the backend says of others, per weight.
peak_ewma    The same draw, by latency times load (Finagle's and Linkerd's Peak EWMA).
prefix       Who has seen most of the prompt's beginning (policies/prefix.py), unless it has more than a few requests
             and is a quarter above the mean ("consistent hashing with bounded loads", Mirrokni et al., 2018: a prompt
             that everybody sends is as a popular key is there). Else as least_load.
hash         A ring (Karger et al., 1997; ketama): a key stays where it was unless its backend comes or goes.

Slow start: a candidate that came into service less than 10 s ago counts with a part of its weight that grows from 10 %
(Envoy's slow_start_config, aggression 1), in every kind but hash, whose point is that keys do not wander.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Collection
from hashlib import blake2b
from math import exp, gcd
from random import Random
from struct import Struct
from typing import Final, Generic, TypeVar

from policies.policy import Balance, BalanceKind
from policies.prefix import Chain, PrefixIndex

_SLOW_START_SECONDS: Final = 10.0
_SLOW_START_LEAST: Final = 0.1
_DRAWS: Final = 8  # with nearly all candidates young, thinning out more would not change much
_ROTATION_LENGTH: Final = 1024  # where weights add up to more, shares are rounded to one of so many turns
_POINTS_OF_LIGHTEST: Final = 128  # a backend's share of the ring is then right to about 1 / sqrt(128) = 9 %
_MOST_POINTS: Final = 32_768
_AHEAD_OF_MEAN: Final = 1.25
_FEW: Final = 3.0  # requests per weight: a batch of so few is hardly slower than one alone
_PANIC_BELOW: Final = 0.5  # Envoy's healthy_panic_threshold
_UNKNOWN_LATENCY_PENALTY: Final = 1e9

_ROUND_ROBIN: Final = BalanceKind.ROUND_ROBIN  # looking a member up in its Enum costs as much as drawing one of two
_LEAST_LOAD: Final = BalanceKind.LEAST_LOAD
_PEAK_EWMA: Final = BalanceKind.PEAK_EWMA
_PREFIX: Final = BalanceKind.PREFIX
_EIGHT_POINTS: Final = Struct("<8Q")


class PeakEwma:
    """A latency in seconds that jumps to each new peak, sinks towards what follows, and to 0 while nothing is heard.

    Sinking without news is what makes a backend be tried again after it was slow once. `decay` is the time constant.
    """

    __slots__ = ("_at", "_decay", "_seconds")

    def __init__(self, decay: float = 10.0) -> None:
        self._decay = decay  # seconds; Finagle's and tower's default
        self._seconds = 0.0
        self._at = 0.0

    def observe(self, seconds: float, now: float) -> None:
        """Take in the latency of a request that has just been answered."""
        if seconds >= self._seconds:
            self._seconds = seconds
        else:
            kept = exp(-max(0.0, now - self._at) / self._decay)
            self._seconds = self._seconds * kept + seconds * (1.0 - kept)
        self._at = max(self._at, now)

    def value(self, now: float) -> float:
        """Return the latency to reckon with; 0.0 if nothing was ever heard. Does not modify."""
        if not self._seconds:
            return 0.0
        return self._seconds * exp(-max(0.0, now - self._at) / self._decay)

    def __repr__(self) -> str:
        return f"<PeakEwma {self._seconds:g} s at {self._at:g}>"


class Candidate:
    """What a chooser reads of a backend, and never writes. A base class, so that reading it costs next to nothing."""

    __slots__ = ("ewma", "inflight", "key", "max_concurrency", "prefixes", "reported", "since", "weight")

    def __init__(self, key: str, weight: int, max_concurrency: int | None, since: float) -> None:
        self.key = key  # its name: the same in every replica, never another's
        self.weight = weight
        self.max_concurrency = max_concurrency
        self.since = since  # when it came into service, or came back: slow start counts from here
        self.inflight = 0  # requests that this gateway has there
        self.reported = 0.0  # requests that others have there, as far as it has told
        self.ewma = PeakEwma()
        self.prefixes: PrefixIndex | None = None  # of prompts that were sent there; none while no route asks for it


C = TypeVar("C", bound=Candidate)


class Chooser(Generic[C]):
    """Chooses among `candidates`. Keeps nothing between calls but whose turn it is."""

    __slots__ = ("_candidates", "_has_limits", "_ring", "_rotation", "_turn")

    def __init__(self, candidates: tuple[C, ...]) -> None:
        self._candidates = tuple(candidate for candidate in candidates if candidate.weight > 0)
        self._has_limits = any(candidate.max_concurrency is not None for candidate in candidates)
        self._rotation = _rotation(self._candidates)
        self._ring: _Ring[C] | None = None  # made when first asked for: few routes hash
        self._turn = -1

    def choose(
        self,
        balance: Balance,
        rng: Random,
        now: float,
        hash_key: str = "",
        refused: Collection[C] = (),
        chain: Chain = (),
    ) -> C | None:
        """Return who gets the request, None when nobody can. `hash_key` is for hash alone, `chain` for prefix."""
        candidates = self._candidates
        if len(candidates) < 2:
            return candidates[0] if candidates and _is_usable(candidates[0], refused) else None
        kind = balance.kind
        if kind is _LEAST_LOAD:
            if len(candidates) == 2 and not refused and not self._has_limits:
                return self._less_loaded(*candidates, rng, now)
            return self._cheaper_of_two(_load, rng, now, refused)
        if kind is _PEAK_EWMA:
            return self._cheaper_of_two(_peak_cost, rng, now, refused)
        if kind is _ROUND_ROBIN:
            return self._next_in_turn(rng, now, refused)
        if kind is _PREFIX:
            return self._acquainted(chain, rng, refused) or self._cheaper_of_two(_load, rng, now, refused)
        return self._owner(hash_key, refused)

    def _acquainted(self, chain: Chain, rng: Random, refused: Collection[C]) -> C | None:
        """Who knows most of the chain among those that are not too loaded; of equals the less loaded."""
        candidates = self._candidates
        weights = sum([candidate.weight for candidate in candidates])
        total = sum([candidate.inflight + candidate.reported for candidate in candidates])
        ceiling = max(_FEW, _AHEAD_OF_MEAN * (total + 1.0) / weights)
        best, most, least = None, 1, 0.0
        start = int(rng.random() * len(candidates))  # so that equals who are idle take turns
        for i in range(start, start + len(candidates)):
            candidate = candidates[i % len(candidates)]
            index = candidate.prefixes
            load = (candidate.inflight + candidate.reported) / candidate.weight
            if index is None or load > ceiling or not _is_usable(candidate, refused):
                continue
            matched = index.matched(chain)
            if matched > most or (matched == most and (best is None or load < least)):
                best, most, least = candidate, matched, load
        return best

    def _less_loaded(self, a: C, b: C, rng: Random, now: float) -> C | None:
        """`_cheaper_of_two` of the two that there are, for the commonest case: a fifth of its price."""
        if now - a.since < _SLOW_START_SECONDS or now - b.since < _SLOW_START_SECONDS:
            return self._cheaper_of_two(_load, rng, now, ())
        load_a, load_b = (a.inflight + a.reported) * b.weight, (b.inflight + b.reported) * a.weight
        if load_a == load_b:
            return a if rng.random() * (a.weight + b.weight) < a.weight else b
        return a if load_a < load_b else b

    def _cheaper_of_two(
        self, cost: Callable[[C, float], float], rng: Random, now: float, refused: Collection[C]
    ) -> C | None:
        rotation = self._rotation
        at = int(rng.random() * len(rotation))
        if now - rotation[at].since < _SLOW_START_SECONDS:
            at = self._thin_out(at, rng, now)
        first, second = rotation[at], self._other(at, rng)
        if (refused or self._has_limits) and not (_is_usable(first, refused) and _is_usable(second, refused)):
            return self._cheapest_usable(cost, rng, now, refused)
        return second if cost(second, now) < cost(first, now) else first

    def _thin_out(self, at: int, rng: Random, now: float) -> int:
        """Pass over a young candidate now and then, as slow start asks. Between equals it is the draw that decides."""
        rotation = self._rotation
        for _ in range(_DRAWS):
            if rng.random() < _warmth(now - rotation[at].since):
                break
            at = int(rng.random() * len(rotation))
        return at

    def _other(self, at: int, rng: Random) -> C:
        rotation = self._rotation
        if len(self._candidates) == 2:
            first, second = self._candidates
            return second if rotation[at] is first else first
        return rotation[(at + 1 + int(rng.random() * (len(rotation) - 1))) % len(rotation)]

    def _cheapest_usable(
        self, cost: Callable[[C, float], float], rng: Random, now: float, refused: Collection[C]
    ) -> C | None:
        """One of the two drawn is no choice: look at all."""
        usable = [candidate for candidate in self._candidates if _is_usable(candidate, refused)]
        if not usable:
            return None
        two = rng.choices(usable, [_weight(candidate, now) for candidate in usable], k=2)
        return min(two, key=lambda candidate: cost(candidate, now))

    def _next_in_turn(self, rng: Random, now: float, refused: Collection[C]) -> C | None:
        rotation = self._rotation
        if self._turn < 0:
            self._turn = int(rng.random() * len(rotation))  # choosers made together do not start together
        skipped, after = None, 0
        for _ in rotation:
            candidate = rotation[self._turn]
            self._turn = (self._turn + 1) % len(rotation)
            if not _is_usable(candidate, refused):
                continue
            if now - candidate.since >= _SLOW_START_SECONDS or rng.random() < _warmth(now - candidate.since):
                return candidate
            if skipped is None:
                skipped, after = candidate, self._turn
        if skipped is not None:
            self._turn = after  # all are young: it is the turn of the first, and the next request's of the second
        return skipped

    def _owner(self, hash_key: str, refused: Collection[C]) -> C | None:
        if self._ring is None:
            self._ring = _Ring(self._candidates)
        return self._ring.owner(hash_key, refused)

    def __repr__(self) -> str:
        return f"<Chooser of {len(self._candidates)}, rotation of {len(self._rotation)}>"


class _Ring(Generic[C]):
    """Many points of each candidate on a circle of 2^64; a key belongs to the first point after its own.

    How many points a unit of weight gets depends on the lightest candidate and on the sum (as in Envoy's ring_hash).
    While those stand, coming and going moves the keys of who comes or goes and no others.
    """

    __slots__ = ("_owners", "_points")

    def __init__(self, candidates: tuple[C, ...]) -> None:
        weights = [candidate.weight for candidate in candidates]
        scale = min(_POINTS_OF_LIGHTEST / min(weights), _MOST_POINTS / sum(weights))
        owners = {
            point: candidate
            for candidate in candidates
            for point in _points(candidate.key, max(1, round(candidate.weight * scale)))
        }
        self._points = sorted(owners)
        self._owners = [owners[point] for point in self._points]

    def owner(self, hash_key: str, refused: Collection[C]) -> C | None:
        owners = self._owners
        start = bisect(self._points, _hash(hash_key))
        for i in range(start, start + len(owners)):
            candidate = owners[i % len(owners)]
            if _is_usable(candidate, refused):
                return candidate
        return None


def panic(healthy: int, total: int) -> bool:
    """Whether so few of the backends are healthy that it is better to send to all of them."""
    return healthy < _PANIC_BELOW * total


def _is_usable(candidate: C, refused: Collection[C]) -> bool:
    limit = candidate.max_concurrency
    return (limit is None or candidate.inflight < limit) and candidate not in refused


def _load(candidate: Candidate, now: float) -> float:
    load = candidate.inflight + candidate.reported
    return load / _weight(candidate, now) if load else 0.0


def _peak_cost(candidate: Candidate, now: float) -> float:
    """Latency times the requests there with ours. What others have there counts: a 429 is quick, and is told as load.

    One that was never heard of gets one request and then, until that is answered, what nobody else will take (Finagle).
    """
    seconds = candidate.ewma.value(now)
    if not seconds:
        return candidate.inflight * _UNKNOWN_LATENCY_PENALTY
    return seconds * (candidate.inflight + candidate.reported + 1.0) / _weight(candidate, now)


def _weight(candidate: Candidate, now: float) -> float:
    age = now - candidate.since
    return candidate.weight if age >= _SLOW_START_SECONDS else candidate.weight * _warmth(age)


def _warmth(age: float) -> float:
    return min(1.0, max(_SLOW_START_LEAST, age / _SLOW_START_SECONDS))


def _rotation(candidates: tuple[C, ...]) -> tuple[C, ...]:
    """Each candidate as often as its weight, spread out: of w turns, number j comes at (j + 1/2) / w of the round."""
    weights = [candidate.weight for candidate in candidates]
    if len(set(weights)) < 2:
        return candidates
    scale = min(1 / gcd(*weights), _ROTATION_LENGTH / sum(weights))
    turns = [max(1, round(weight * scale)) for weight in weights]
    order = sorted(((turn + 0.5) / count, i) for i, count in enumerate(turns) for turn in range(count))
    return tuple(candidates[i] for _, i in order)


def _points(key: str, count: int) -> list[int]:
    digests = (blake2b(f"{key}#{i}".encode()).digest() for i in range((count + 7) // 8))
    return [point for digest in digests for point in _EIGHT_POINTS.unpack(digest)][:count]


def _hash(text: str) -> int:
    # surrogatepass: header values hold bytes that are no UTF-8 as lone surrogates
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
