"""What a policy.yaml means once compiled: frozen values, ready for the data path.

`document.py` makes these from text and is the only place that does. Durations are seconds, shares are fractions
of 1, rates are tokens per second. One `Policy` is swapped for the next whole; a request keeps the one it began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from re import Pattern
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` tokens each `seconds`, e.g. 60/minute is Rate(60, 60.0)."""

    count: float
    seconds: float

    @property
    def per_second(self) -> float:
        return self.count / self.seconds


@dataclass(frozen=True, slots=True)
class Claims:
    """Which claims of a token name the consumer and its groups."""

    consumer: str = "sub"
    groups: str = "groups"


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who may sign tokens. `jwks` is an http(s) URL or an absolute file path."""

    issuer: str
    audience: tuple[str, ...]
    algorithms: tuple[str, ...]
    jwks: str
    claims: Claims = Claims()


class WhenStoreIsDown(Enum):
    """What a plan's limits do while Redis is away."""

    SHARE = "share"  # limit / live gateways, enforced locally
    OPEN = "open"  # no limit
    CLOSED = "closed"  # refuse with 503


@dataclass(frozen=True, slots=True)
class Plan:
    """How much one consumer may send. `burst` and `token_burst` are what its two buckets hold."""

    name: str
    requests: Rate | None = None
    burst: int = 1
    tokens: Rate | None = None  # of language models, in prompts and answers
    token_burst: int = 1
    concurrency: int | None = None
    priority: str | None = None  # told to backends: high, normal, low
    when_store_is_down: WhenStoreIsDown = WhenStoreIsDown.SHARE


@dataclass(frozen=True, slots=True)
class ConsumerRule:
    """First match wins: the plan of a consumer. Exactly one of the three is set."""

    plan: str
    group: str | None = None
    consumer: str | None = None
    any: bool = False


@dataclass(frozen=True, slots=True)
class Match:
    """What a route matches. None matches everything; patterns are compiled globs, anchored at both ends."""

    path: Pattern[str] | None = None
    model: Pattern[str] | None = None
    headers: tuple[tuple[str, str], ...] = ()  # lower-case name, exact value


@dataclass(frozen=True, slots=True)
class Allow:
    """Who may use a route: any of the subjects (none given: everybody), for any of the models (none given: all)."""

    groups: frozenset[str] = frozenset()
    consumers: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    models: tuple[Pattern[str], ...] = ()


EVERYBODY = Allow()


@dataclass(frozen=True, slots=True)
class Target:
    """Where a route may send: a service, perhaps one version of it, with a share of the weight."""

    service: str
    version: str | None = None
    weight: int = 1


class BalanceKind(Enum):
    """How one backend of a target is chosen."""

    ROUND_ROBIN = "round_robin"
    LEAST_LOAD = "least_load"
    PEAK_EWMA = "peak_ewma"
    HASH = "hash"
    PREFIX = "prefix"


@dataclass(frozen=True, slots=True)
class Balance:
    """`hash_header` (lower case) is set for `hash:header:NAME`; `hash:consumer` leaves it None."""

    kind: BalanceKind = BalanceKind.LEAST_LOAD
    hash_header: str | None = None


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; each its own. `idle` is between two pieces of an answer."""

    connect: float = 1.0
    first_byte: float = 30.0
    idle: float = 60.0
    total: float = 600.0


@dataclass(frozen=True, slots=True)
class RetryRule:
    """`attempts` counts the first one. `idempotent`: a request may run twice, so resets and 5xx are retried too."""

    attempts: int = 2
    budget: float = 0.2
    idempotent: bool = False


@dataclass(frozen=True, slots=True)
class BreakerRule:
    """Opens at `failures` (share) of `of_at_least` outcomes in `window`; `probes` requests try it after `open`."""

    failures: float = 0.5
    of_at_least: int = 20
    window: float = 10.0
    open: float = 5.0
    probes: int = 3
    eject_at_most: float = 0.5
    key: str = ""  # equal rules have equal keys: what a backend's breaker is found by across reloads


@dataclass(frozen=True, slots=True)
class Route:
    """One way through the gateway."""

    name: str
    match: Match
    to: tuple[Target, ...]
    allow: Allow = EVERYBODY
    stick: bool = False  # `stick: consumer`
    balance: Balance = Balance()
    timeout: Timeouts = Timeouts()
    retry: RetryRule = RetryRule()
    breaker: BreakerRule = BreakerRule()


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything operators decide. `version` is the first 12 hex digits of the SHA-256 of the text."""

    version: str
    issuers: tuple[Issuer, ...] = ()
    anonymous: bool = False  # callers without a token are served as consumer "anonymous"
    plans: Mapping[str, Plan] = field(default_factory=lambda: MappingProxyType({}))
    consumers: tuple[ConsumerRule, ...] = ()
    routes: tuple[Route, ...] = ()


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling, as a verified token (or `anonymous`) says. `expires_at` is Unix seconds."""

    consumer: str
    groups: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    issuer: str = ""
    expires_at: float = float("inf")


ANONYMOUS = Principal("anonymous")
