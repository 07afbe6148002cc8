"""Who is behind whom, among the tenants of an engine, and who gives way for it.

Who asks for little does not feel those who ask for much. A tenant is *behind* another who has at least two more
sequences running and was not served less (what a whole batch takes in QUANTUM steps is forgiven). Who is behind comes
in at once, if need be in the place of the newest of those ahead; and while a sequence of its own draws its first
QUANTUM tokens, those ahead pause where they are, but for what hardly makes a step longer. Later it shares steps as all
do, and who has come level in sequences or in service is not behind: equal backlogs lose nothing, nobody is held up for
good, and a tenant alone never notices. A better class gives way to nobody.

Source: the quantum is that of FastServe (arXiv 2305.05920), the counters are those of `admission.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from reference_backend.admission import OUTPUT_WEIGHT
from reference_backend.engine.request import Sequence

QUANTUM = 32  # tokens: as long as a short answer


class Standing:
    """How many sequences of each tenant run, beside what each `served` was."""

    def __init__(self, served: Callable[[str], float], slots: int) -> None:
        self.running: Counter[str] = Counter()
        self._served = served
        self._slots = slots
        self._allowance = slots * QUANTUM * OUTPUT_WEIGHT

    def is_behind(self, tenant: str) -> bool:
        """Whether a tenant is behind any of the others."""
        return any(self._is_behind(tenant, other, count) for other, count in self.running.items())

    def _is_behind(self, tenant: str, other: str, running: int) -> bool:
        """Whether it is behind one who has so many sequences running."""
        return self.running[tenant] + 2 <= running and self._served(tenant) <= self._served(other) + self._allowance

    def handicap(self, tenant: str) -> int:
        """How many run of a tenant; more than there can be, of one who was served too much."""
        served = self._served(tenant)
        is_ahead = any(served > self._served(other) + self._allowance for other in self.running)
        return self._slots if is_ahead else self.running[tenant]

    def pausing(self, running: list[Sequence]) -> list[Sequence]:
        """Those of no better class than one in its quantum whose tenant is behind theirs."""
        behind = {tenant for tenant in self.running if self.is_behind(tenant)}
        if not behind:
            return []
        hurried = {(s.tenant, s.priority) for s in running if s.tenant in behind and s.drawn < QUANTUM and s.uncomputed}
        return [
            each
            for each in running
            if any(
                priority <= each.priority and self._is_behind(tenant, each.tenant, self.running[each.tenant])
                for tenant, priority in hurried
            )
        ]

    def ahead_of(self, sequence: Sequence, running: list[Sequence]) -> Iterator[Sequence]:
        """Who would give way for a sequence, one after the other, until its tenant is not behind any more."""
        left = self.running.copy()
        for each in dispensable(running):
            if each.priority >= sequence.priority and self._is_behind(sequence.tenant, each.tenant, left[each.tenant]):
                yield each
            left[each.tenant] -= 1


def dispensable(running: Iterable[Sequence]) -> list[Sequence]:
    """In which order they give way: of the lowest class, of the tenant who then has most left, the newest first."""
    before: Counter[str] = Counter()
    places: dict[Sequence, int] = {}  # among its tenant's
    for each in sorted(running, key=lambda each: (each.priority, each.arrival)):
        places[each] = before[each.tenant]
        before[each.tenant] += 1
    return sorted(running, key=lambda each: (each.priority, places[each], each.arrival), reverse=True)
