"""What the next step computes: one rule, no phases.

Every sequence has tokens that are known and a cache that lags behind them. A step lets sequences catch up, under one
budget of tokens: first those that generate (one token each), then those that still read their prompt, then newcomers
from the queue while slots, blocks and budget last. Chunked prefill, mixed batches, cached prefixes and recomputing
what was preempted all follow from that: they are sequences that have more or less to catch up.

When blocks run out, the newest sequence of the lowest class gives its own back and waits to be admitted again. Its
full blocks stay cached as long as nobody needs them, so that most of the recomputing is a lookup. The oldest of the
highest class is never preempted, and one sequence alone always fits: there is always progress.

Decides only: no clock, no torch. Invariants: `faults` lists what would be wrong.
"""

from __future__ import annotations

from typing import NamedTuple

from reference_backend.admission import FairQueue
from reference_backend.engine.kv_cache import BlockPool
from reference_backend.engine.request import Sequence


class Work(NamedTuple):
    """One sequence's part of a step: `tokens` of them from position `start` on.

    `is_new`: its row on the device must be written first. `is_decode`: the one token is in that row. `samples`: the
    step ends where the sequence ends, and draws the next token.
    """

    sequence: Sequence
    start: int
    tokens: int
    is_new: bool
    is_decode: bool
    samples: bool


class Scheduler:
    """Sequences that run, in order of admission, and those that wait."""

    def __init__(self, pool: BlockPool, queue: FairQueue[Sequence], *, slots: int, step_tokens: int) -> None:
        self.pool = pool
        self.queue = queue
        self.slots = slots
        self.step_tokens = max(step_tokens, slots)  # everyone who generates goes on in every step
        self.running: list[Sequence] = []
        self.preempted: list[Sequence] = []  # in order of class and arrival
        self.preemptions = 0
        self.generated_tokens = 0
        self._free_slots = list(range(slots))

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.running)} running, {len(self.preempted)} preempted, {len(self.queue)} waiting>"

    @property
    def is_idle(self) -> bool:
        return not (self.running or self.preempted or len(self.queue))

    def everyone(self) -> list[Sequence]:
        return [*self.running, *self.preempted, *self.queue]

    def schedule(self, now: float, readable: int | None = None) -> list[Work]:
        """Plan one step, and take what it needs. Every planned token counts as computed from here on.

        While somebody generates, at most `readable` tokens of prompts are read beside (None: as the budget allows).
        """
        plan: dict[Sequence, Work] = {}
        budget = self.step_tokens
        generating = sum(sequence.is_primed for sequence in self.running)
        if generating and readable is not None:
            budget = min(budget, generating + readable)
        preemptions = self.preemptions
        for sequence in sorted(self.running, key=_is_reading):
            count = min(sequence.uncomputed, budget)
            if sequence.slot is None or not count:  # preempted for one before it, or has nothing to do
                continue
            budget += sum(plan.pop(victim).tokens for victim in self._make_room(sequence, count) if victim in plan)
            if sequence.slot is not None:
                plan[sequence] = _work(sequence, count, is_new=False)
                budget -= count
        if preemptions == self.preemptions:  # else there is no room, and who was preempted may have a pending token
            self._admit(plan, budget, now)
        for work in plan.values():
            self._launch(work)
        return list(plan.values())

    def commit(self, sequence: Sequence, token: int) -> None:
        """The token that was pending is known. Harmless for a sequence that is gone."""
        sequence.pending -= 1
        sequence.tokens.append(token)
        self.generated_tokens += 1
        self.queue.charge(sequence.tenant, generated=1)
        if sequence.slot is not None:
            self.pool.index(sequence)

    def drop(self, sequence: Sequence) -> None:
        """It is over, wherever it stands. What it held is free at once: steps run in the order of their launch."""
        if sequence.slot is not None:
            self._vacate(sequence)
        elif sequence in self.preempted:
            self.preempted.remove(sequence)
        else:
            self.queue.remove(sequence)

    def _make_room(self, sequence: Sequence, count: int) -> list[Sequence]:
        """Take the blocks that `count` more tokens need. Returns who was preempted for it; it may be the sequence."""
        needed = self.pool.blocks_for(sequence.computed + count) - len(sequence.blocks)
        if needed <= 0:
            return []
        victims: list[Sequence] = []
        while (taken := self.pool.take(needed)) is None:
            victim = max(self.running, key=_seniority)
            self._preempt(victim)
            victims.append(victim)
            if victim is sequence:
                return victims
        sequence.blocks += taken
        return victims

    def _preempt(self, victim: Sequence) -> None:
        self._vacate(victim)
        self.preemptions += 1
        self.preempted.append(victim)
        self.preempted.sort(key=_seniority)

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.slot is not None  # noqa: S101  for the type checker
        self.pool.release(sequence.blocks)
        self._free_slots.append(sequence.slot)
        self.running.remove(sequence)
        sequence.slot, sequence.blocks, sequence.computed, sequence.indexed = None, [], 0, 0
        sequence.is_primed = False

    def _admit(self, plan: dict[Sequence, Work], budget: int, now: float) -> None:
        while budget and self._free_slots and (sequence := self._next(now)) is not None:
            found = self.pool.match(sequence)
            # One block more than it has text for: who comes in must not be thrown out by its first token.
            needed = self.pool.blocks_for(len(sequence.tokens) + 1) - len(found)
            fresh = self.pool.take(needed)
            if fresh is None:
                self.pool.release(found)
                return
            self._start(sequence, found, fresh)
            count = min(sequence.uncomputed, budget)
            plan[sequence] = _work(sequence, count, is_new=True)
            budget -= count

    def _next(self, now: float) -> Sequence | None:
        """Who was preempted was there first, unless a better class waits."""
        head = self.queue.head(now)
        if self.preempted and (head is None or self.preempted[0].priority <= self.queue.risen_class(head, now)):
            return self.preempted[0]
        return head

    def _start(self, sequence: Sequence, found: list[int], fresh: list[int]) -> None:
        cached = len(found) * self.pool.block_size
        if sequence in self.preempted:
            self.preempted.remove(sequence)
        else:
            self.queue.remove(sequence)
            sequence.cached_tokens = cached
            self.pool.asked_tokens += len(sequence.prompt)
            self.pool.found_tokens += cached
            self.queue.charge(sequence.tenant, read=len(sequence.prompt) - cached)
        sequence.slot = self._free_slots.pop()
        sequence.blocks = found + fresh
        sequence.computed, sequence.indexed = cached, len(found)
        self.running.append(sequence)

    def _launch(self, work: Work) -> None:
        sequence = work.sequence
        sequence.computed += work.tokens
        sequence.pending += work.samples
        sequence.is_primed = work.samples
        self.pool.index(sequence)

    def faults(self) -> list[str]:
        """What is wrong with slots, blocks and tables. Empty when all is well, between any two steps."""
        size = self.pool.block_size
        slots = [*self._free_slots, *(s.slot for s in self.running if s.slot is not None)]
        faults = self.pool.faults(sequence.blocks for sequence in self.running)
        if sorted(slots) != list(range(self.slots)):
            faults.append(f"slots are {sorted(slots)}")
        for sequence in self.running:
            if sequence.computed > len(sequence.blocks) * size or len(set(sequence.blocks)) != len(sequence.blocks):
                faults.append(f"{sequence.computed} tokens in blocks {sequence.blocks}")
        faults += [
            f"{s.blocks} held by one who waits"
            for s in (*self.preempted, *self.queue)
            if s.blocks or s.slot is not None
        ]
        return faults


def _is_reading(sequence: Sequence) -> bool:
    return not sequence.is_primed


def _seniority(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival


def _work(sequence: Sequence, count: int, *, is_new: bool) -> Work:
    return Work(
        sequence,
        start=sequence.computed,
        tokens=count,
        is_new=is_new,
        is_decode=sequence.is_primed,
        samples=count == sequence.uncomputed,
    )
