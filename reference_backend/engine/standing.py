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
from collections.abc import Callable, Iterable, Iterator, Mapping

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

    def is_behind(self, tenant: str, others: Mapping[str, int] | None = None) -> bool:
        """Whether a tenant is behind any of the others, who have so many sequences running."""
        served, own = self._served(tenant), self.running[tenant]
        return any(
            own + 2 <= theirs and served <= self._served(other) + self._allowance
            for other, theirs in (self.running if others is None else others).items()
        )

    def handicap(self, tenant: str) -> int:
        """How many run of a tenant; more than there can be, of one who was served too much."""
        served = self._served(tenant)
        is_ahead = any(served > self._served(other) + self._allowance for other in self.running)
        return self._slots if is_ahead else self.running[tenant]

    def hurried(self, running: Iterable[Sequence]) -> dict[str, int]:
        """Tenants who are behind and have a sequence in its quantum, with the best class of those."""
        behind = {tenant for tenant in self.running if self.is_behind(tenant)}
        hurried: dict[str, int] = {}
        for each in running:
            if each.tenant in behind and each.drawn < QUANTUM and each.uncomputed:
                hurried[each.tenant] = min(each.priority, hurried.get(each.tenant, each.priority))
        return hurried

    def is_held(self, sequence: Sequence, hurried: Mapping[str, int]) -> bool:
        """Whether it pauses for one of those."""
        own = {sequence.tenant: self.running[sequence.tenant]}
        return any(
            priority <= sequence.priority and self.is_behind(tenant, own) for tenant, priority in hurried.items()
        )

    def ahead_of(self, sequence: Sequence, running: Iterable[Sequence]) -> Iterator[Sequence]:
        """Who would give way for a sequence, one after the other, until its tenant is not behind any more."""
        left, counts = list(running), self.running.copy()
        while candidates := [
            each
            for each in left
            if each.priority >= sequence.priority
            and self.is_behind(sequence.tenant, {each.tenant: counts[each.tenant]})
        ]:
            victim = max(candidates, key=lambda each: (each.priority, counts[each.tenant], each.arrival))
            left.remove(victim)
            counts[victim.tenant] -= 1
            yield victim
