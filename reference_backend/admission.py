"""Who comes in, and who of those that wait goes next.

A bound on requests is no consumer's alone: `has_room` says who is taken although it is reached.

Who goes next is found by class, then the tenant that got least so far, then in order of arrival.

Each tenant has a counter of what it was served, in tokens of equal cost: a generated one counts OUTPUT_WEIGHT times one
that was read. The next request is that of the tenant with the smallest counter, so that tenants who always have
something waiting get equal shares, however many requests each sends. Who comes back after a pause is lifted to the
smallest counter of those who wait: nobody saves up.

A request rises one class for every `age_seconds` that it has waited, so that no class starves.

Source: Virtual Token Counter, "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588).
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from typing import Generic, Protocol, TypeVar

RESERVE = 4  # one place for so many, behind the bound: for consumers that have less than others
OUTPUT_WEIGHT = 4.0  # what a generated token costs, in tokens read
REMEMBERED = 4096  # tenants whose counter is kept while they have nothing waiting


def has_room(consumer: str, in_flight: Collection[str], bound: int) -> bool:
    """Whether a consumer's request is taken beside those in flight, of which the consumers are given.

    Up to `bound` everybody's is. Behind that there is a reserve for those who have less than their even share: `bound`
    divided by the consumers that have something in flight, this one included. So who fills the bound is refused until
    it has no more than the others. Nothing is remembered, and nobody gets past the reserve: one who makes up a
    consumer for each request fills it, too, and others are then refused as if there were none.
    """
    if len(in_flight) < bound:
        return True
    if len(in_flight) >= bound + -(-bound // RESERVE):
        return False
    held = Counter(in_flight)
    return held[consumer] * len(held.keys() | {consumer}) < bound


class Waiting(Protocol):
    """What the queue must know of a request. `arrival` is its number, `arrived_at` when that was, in seconds."""

    tenant: str
    priority: int
    arrival: int
    arrived_at: float


Item = TypeVar("Item", bound=Waiting)


class FairQueue(Generic[Item]):
    """Requests that wait. Bounds are the business of whoever fills it."""

    def __init__(self, age_seconds: float) -> None:
        self.age_seconds = age_seconds
        self._lines: dict[tuple[str, int], deque[Item]] = {}  # by tenant and class
        self._served: dict[str, float] = {}
        self._last_left = ""  # the tenant who was the last to have nothing waiting any more

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        for line in self._lines.values():
            yield from line

    def served(self, tenant: str) -> float:
        """The tenant's counter."""
        return self._served.get(tenant, 0.0)

    def push(self, request: Item) -> None:
        """Let one wait, or wait again: before those of its tenant and class that came later."""
        if not self._has_waiting(request.tenant):
            floor = min((self.served(tenant) for tenant, _ in self._lines), default=self.served(self._last_left))
            self._served[request.tenant] = max(self.served(request.tenant), floor)
            self._forget_some()
        insort(self._lines.setdefault((request.tenant, request.priority), deque()), request, key=_arrival)

    def head(
        self,
        now: float,
        may_go: Callable[[Item], bool] = lambda _: True,
        handicap: Callable[[str], int] = lambda _: 0,
    ) -> Item | None:
        """The one that goes next, of those that may and have nobody of their tenant and class before them.

        Of a class, tenants with a smaller handicap come before others. Does not take it.
        """

        def rank(request: Item) -> tuple[float, int, float, int]:
            tenant = request.tenant
            return self.risen_class(request, now), handicap(tenant), self.served(tenant), request.arrival

        return min((line[0] for line in self._lines.values() if may_go(line[0])), key=rank, default=None)

    def risen_class(self, request: Item, now: float) -> float:
        """The class of a request after the time that it has waited; smaller goes first."""
        return request.priority - (now - request.arrived_at) // self.age_seconds

    def remove(self, request: Item) -> None:
        """Take one out: it goes on, or is not wanted any more."""
        key = (request.tenant, request.priority)
        self._lines[key].remove(request)
        if not self._lines[key]:
            del self._lines[key]
        if not self._has_waiting(request.tenant):
            self._last_left = request.tenant

    def charge(self, tenant: str, *, read: int = 0, generated: int = 0) -> None:
        """Count what a tenant was served, in tokens."""
        self._served[tenant] = self.served(tenant) + read + OUTPUT_WEIGHT * generated

    def _has_waiting(self, tenant: str) -> bool:
        return any(name == tenant for name, _ in self._lines)

    def _forget_some(self) -> None:
        """Drop the least served of those who have nothing waiting: they would be lifted if they came back."""
        if len(self._served) <= REMEMBERED:
            return
        needed = {self._last_left, *(tenant for tenant, _ in self._lines)}
        idle = sorted(self._served.keys() - needed, key=self.served)
        for tenant in idle[: REMEMBERED // 2]:
            del self._served[tenant]


def _arrival(request: Waiting) -> int:
    return request.arrival
