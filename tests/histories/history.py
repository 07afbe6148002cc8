"""What happened in one run, as plain records that `checks.py` judges.

All times are seconds of `time.perf_counter`, which on Linux is one clock for all processes of a machine. A key is
"service/id". Each registration carries a number that only grows, so that an older one is told from a newer one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf


@dataclass(frozen=True, slots=True)
class Registration:
    number: int
    address: str  # host:port


@dataclass(frozen=True, slots=True)
class Change:
    """Something the run did in etcd. It was in force at `at` at the latest. `registration` None: a delete."""

    at: float
    revision: int
    key: str
    registration: Registration | None


@dataclass(frozen=True, slots=True)
class Seen:
    """A backend in a view. `life` names the gateway's own object: another one has no past."""

    registration: Registration
    life: int


@dataclass(frozen=True, slots=True)
class View:
    """Who is in service for a gateway from `at` on, which knows etcd up to `revision`."""

    at: float
    gateway: str
    revision: int
    backends: Mapping[str, Seen]


@dataclass(frozen=True, slots=True)
class Answered:
    """A request as its client knows it. `status` 0: the client left, or the answer was cut."""

    request: str
    gateway: str
    consumer: str
    sent: float
    ended: float
    status: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at one backend, as the gateway knows it."""

    request: str
    gateway: str
    key: str
    began: float
    ended: float
    outcome: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A request as its gateway knows it."""

    request: str
    gateway: str
    consumer: str
    status: int
    code: str
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class BreakerChange:
    at: float
    gateway: str
    key: str
    life: int
    state: str  # closed | open | half_open


@dataclass(frozen=True, slots=True)
class Trouble:
    """From `begin` to `end` the gateways named could not count on etcd or Redis. Lost: what it held was lost, too."""

    what: str  # etcd | redis
    gateways: frozenset[str]
    begin: float
    end: float = inf
    lost: bool = False


@dataclass(slots=True)
class History:
    """Each list in order of time."""

    gateways: tuple[str, ...] = ()
    changes: list[Change] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    answered: list[Answered] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    breakers: list[BreakerChange] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    arrivals: dict[str, int] = field(default_factory=dict)  # request -> how often backends saw it
    registered: dict[str, Registration] = field(default_factory=dict)  # what etcd has at the end
    charged: dict[str, int] = field(default_factory=dict)  # consumer -> tokens that its bucket in Redis lacks
    noticed: set[tuple[str, str]] = field(default_factory=set)  # (gateway, what it knew to be away: etcd | redis)
    stall: float = 0.0  # the longest that a gateway did not get to run, because the machine was busy

    @property
    def attempts(self) -> list[Attempt]:
        return [attempt for request in self.ended for attempt in request.attempts]
