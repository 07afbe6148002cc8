"""Who is there: one writer, many readers, whole snapshots swapped at once.

A snapshot never changes, and an endpoint that did not change is the same object in the next one, so readers may keep
what they hang on it. The store decides when news takes force:

- Damping: a backend's state changes at most once in 2 s; what comes sooner waits, and the newest wins. The first
  appearance waits for nothing.
- Mass loss: when more than half of the serving backends would vanish within 15 s, the deletes that go beyond are held
  while the backend's health check passes, for 15 s at most: an etcd that was wiped, or that lost all leases at once,
  is no reason to drop backends that work. A backend that said `draining` first leaves at once, as does one whose
  registration became unreadable or forbidden.

- Pace: snapshots come 0.1 s apart at least, the first of a burst at once: with 10,000 backends each costs 3 ms.

Synchronous, and time is an argument: whoever owns the store calls `advance` when `next_due` has come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from discovery.endpoint import Endpoint

DAMPING_SECONDS: Final = 2.0
GRACE_SECONDS: Final = 15.0
PACE_SECONDS: Final = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everybody at one moment: by key, and by service."""

    version: int = 0
    endpoints: Mapping[str, Endpoint] = field(default_factory=lambda: MappingProxyType({}))
    services: Mapping[str, tuple[Endpoint, ...]] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Statistics:
    endpoints: int
    held: int  # deleted, and kept for their grace
    damped: int  # changed too often, waiting


Subscriber = Callable[[Snapshot], None]


class Store:
    """`is_passing(key)` says whether a backend's health check passes now."""

    def __init__(self, is_passing: Callable[[str], bool]) -> None:
        self._is_passing = is_passing
        self._subscribers: list[Subscriber] = []
        self._services: dict[str, dict[str, Endpoint]] = {}
        self._touched: set[str] = set()  # services that differ from the snapshot
        self._wanted: dict[str, Endpoint | None] = {}  # damped
        self._held: dict[str, float] = {}  # key -> when its grace ends
        # Both in order of time, so that what is over stands in front.
        self._changed_at: dict[str, float] = {}
        self._vanished_at: dict[str, float] = {}
        self._current: dict[str, Endpoint] = {}
        self._published_at = float("-inf")
        self.snapshot = Snapshot()

    def __repr__(self) -> str:
        counts = self.statistics()
        numbers = f"{counts.endpoints} endpoints, {counts.held} held, {counts.damped} damped"
        return f"<Store v{self.snapshot.version}: {numbers}>"

    @property
    def is_behind(self) -> bool:
        """Whether what is in force has not been told yet, because snapshots keep their pace."""
        return bool(self._touched)

    def statistics(self) -> Statistics:
        return Statistics(len(self._current), len(self._held), len(self._wanted))

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Calls it with each new snapshot from now on. Returns what ends that."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    def apply(self, puts: Iterable[Endpoint], deletes: Iterable[str], rejected: Iterable[str], now: float) -> None:
        """Takes news: who is there, who is gone, and whose registration may no longer be used."""
        self._forget_old(now)
        for key in rejected:
            self._drop(key, now)
        for endpoint in puts:
            self._held.pop(endpoint.key, None)
            self._vanished_at.pop(endpoint.key, None)
            self._want(endpoint.key, endpoint, now)
        self._delete(deletes, now)
        self._publish(now)

    def advance(self, now: float) -> None:
        """Puts into force what has waited long enough, and lets go of the held whose health check fails."""
        self._forget_old(now)
        for key in [key for key, until in self._held.items() if now >= until or not self._is_passing(key)]:
            del self._held[key]
            self._want(key, None, now)
        for key in [key for key in self._wanted if now >= self._free_at(key)]:
            self._set(key, self._wanted.pop(key), now)
        self._publish(now)

    def next_due(self) -> float | None:
        """When `advance` will have something to do, unless health changes before."""
        held = next(iter(self._held.values()), None)
        damped = min(map(self._free_at, self._wanted), default=None)
        unpublished = self._published_at + PACE_SECONDS if self._touched else None
        return min((each for each in (held, damped, unpublished) if each is not None), default=None)

    def _delete(self, deletes: Iterable[str], now: float) -> None:
        sudden = []
        for key in deletes:
            endpoint = self._current.get(key)
            if endpoint is None or endpoint.draining:
                self._want(key, None, now)
            elif key not in self._held:
                sudden.append(key)
        if not sudden:
            return
        self._vanished_at.update(dict.fromkeys(sudden, now))
        is_mass_loss = self._is_mass_loss()
        for key in sudden:
            if is_mass_loss and self._is_passing(key):
                self._held[key] = now + GRACE_SECONDS
                self._wanted.pop(key, None)
            else:
                self._want(key, None, now)

    def _is_mass_loss(self) -> bool:
        remaining = sum(not each.draining for key, each in self._current.items() if key not in self._vanished_at)
        return len(self._vanished_at) > remaining

    def _drop(self, key: str, now: float) -> None:
        """At once, whatever else is waiting."""
        self._held.pop(key, None)
        self._wanted.pop(key, None)
        if key in self._current:
            self._set(key, None, now)

    def _want(self, key: str, endpoint: Endpoint | None, now: float) -> None:
        if endpoint == self._current.get(key):
            self._wanted.pop(key, None)
        elif now < self._free_at(key):
            self._wanted[key] = endpoint
        else:
            self._wanted.pop(key, None)
            self._set(key, endpoint, now)

    def _free_at(self, key: str) -> float:
        return self._changed_at.get(key, float("-inf")) + DAMPING_SECONDS

    def _set(self, key: str, endpoint: Endpoint | None, now: float) -> None:
        """The one door by which `_current` changes."""
        before = self._current.pop(key, None)
        if before is not None:
            members = self._services[before.service]
            del members[key]
            self._touched.add(before.service)
        if endpoint is not None:
            self._current[key] = endpoint
            self._services.setdefault(endpoint.service, {})[key] = endpoint
            self._touched.add(endpoint.service)
        self._changed_at.pop(key, None)
        self._changed_at[key] = now

    def _forget_old(self, now: float) -> None:
        for times, seconds in ((self._changed_at, DAMPING_SECONDS), (self._vanished_at, GRACE_SECONDS)):
            while times and next(iter(times.values())) + seconds <= now:
                del times[next(iter(times))]

    def _publish(self, now: float) -> None:
        if not self._touched or now < self._published_at + PACE_SECONDS:
            return
        self._published_at = now
        services = dict(self.snapshot.services)
        for service in self._touched:
            members = tuple(self._services[service].values())
            if members:
                services[service] = members
            else:
                del self._services[service]
                services.pop(service, None)
        self._touched.clear()
        endpoints = MappingProxyType(dict(self._current))
        self.snapshot = Snapshot(self.snapshot.version + 1, endpoints, MappingProxyType(services))
        for subscriber in tuple(self._subscribers):
            try:
                subscriber(self.snapshot)
            except Exception:  # noqa: BLE001  one subscriber's bug must not keep the news from all the others
                _log.exception("a subscriber of discovery failed")
