"""What the next step computes: one rule, no phases.

Every sequence has tokens that are known and a cache that lags behind them. A step lets sequences catch up, under one
budget of tokens: first those that generate (one token each), then those that still read their prompt, then newcomers
from the queue while slots, blocks and budget last. Chunked prefill, mixed batches, cached prefixes and recomputing
what was preempted all follow from that: they are sequences that have more or less to catch up.

Beside those who generate no other prompt is begun once enough is read (`pace.py`). Of a burst the first are answered
while the last wait; so they end, and ask again, one after the other, and do not wait for each other any more.

When blocks run out, the newest sequence of the lowest class, of the tenant who has most, gives its own back and waits
again in its place. Its full blocks stay cached as long as nobody needs them, so that most of the recomputing is a
lookup. The oldest of the highest class is never preempted, and one sequence alone always fits: there is always
progress.

Tenants share the steps, and who asks for little does not feel those who ask for much: `standing.py` says who pauses,
and who comes in instead of whom.

Decides only: no clock, no torch. Invariants: `tests/support/integrity.py` lists what would be wrong.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from reference_backend.admission import FairQueue
from reference_backend.engine.kv_cache import BlockPool
from reference_backend.engine.pace import NOTHING_KNOWN, Ahead, Beside, Readable
from reference_backend.engine.request import Sequence
from reference_backend.engine.standing import Standing, dispensable


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


@dataclass(slots=True)
class _Room:
    """What a step has room for yet: `tokens` in all; prompts are begun until `enough` more tokens of them are read."""

    tokens: int
    enough: int


class Scheduler:
    """Sequences that run, in order of admission, and those that wait."""

    def __init__(self, pool: BlockPool, queue: FairQueue[Sequence], *, slots: int, step_tokens: int) -> None:
        self.pool = pool
        self.queue = queue
        self.slots = slots
        self.step_tokens = max(step_tokens, slots)  # everyone who generates goes on in every step
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.generated_tokens = 0
        self._free_slots = list(range(slots))
        self._standing = Standing(queue.served, slots)

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.running)} running, {len(self.queue)} waiting>"

    @property
    def is_idle(self) -> bool:
        return not (self.running or len(self.queue))

    def everyone(self) -> list[Sequence]:
        return [*self.running, *self.queue]

    def schedule(self, now: float, readable: Readable | None = None, beside: Beside = NOTHING_KNOWN) -> list[Work]:
        """Plan one step, and take what it needs. Every planned token counts as computed from here on.

        While somebody generates, what is `readable` of prompts is read beside (None: as the budget allows).
        `beside` says what there is room for beside those who hurry.
        """
        while (first := self._next(now)) is not None and self._standing.is_behind(first.tenant) and self._enter(first):
            pass
        pausing = self._standing.pausing(self.running)
        company = [each for each in pausing if each.is_primed and each.uncomputed][: beside.generating]
        going = sorted([*(each for each in self.running if each not in pausing), *company], key=_is_reading)
        generating = sum(sequence.is_primed for sequence in going)
        room = _Room(self.step_tokens, self.step_tokens)
        if generating and readable is not None:
            room = _Room(min(self.step_tokens, generating + readable.most), readable.enough)
        preemptions = self.preemptions
        plan: list[Work] = []
        for each in going:
            self._plan(each, plan, room)
        if pausing:
            room.tokens = min(room.tokens, beside.reading)
            for each in pausing:
                if not each.is_primed:
                    self._plan(each, plan, room)
        if preemptions == self.preemptions:
            self._admit(plan, room, now, even_unread=bool(pausing))
        else:  # there is no room; and who was preempted after it was planned does not take part
            plan = [work for work in plan if work.sequence.slot is not None]
        for work in plan:
            self._launch(work)
        return plan

    def _plan(self, sequence: Sequence, plan: list[Work], room: _Room) -> None:
        """Plan what one has to do, as far as there is room, unless it had to give way."""
        is_new, is_decode, uncomputed = not sequence.is_written, sequence.is_primed, sequence.uncomputed
        count = min(uncomputed, room.tokens) if is_decode or room.enough > 0 else 0
        if not count or sequence.slot is None or not self._make_room(sequence, count):
            return
        plan.append(Work(sequence, sequence.computed, count, is_new, is_decode, samples=count == uncomputed))
        room.tokens -= count
        if not is_decode:
            room.enough -= count

    def ahead(self, sequence: Sequence) -> Ahead:
        """What certainly goes before a sequence that comes now: its tenant's own, of no worse class."""
        mine = [each for each in self.everyone() if each.tenant == sequence.tenant]
        waiting = [each for each in mine if each.slot is None and each.priority <= sequence.priority]
        has_slot = not waiting and (self._free_slots or self._standing.is_behind(sequence.tenant))
        return Ahead(
            requests=0 if has_slot else len(waiting) + 1,
            tokens=sum(map(self.pool.unknown_tokens, waiting))
            + sum(each.uncomputed for each in mine if each.slot is not None and not each.is_primed),
            own_tokens=self.pool.unknown_tokens(sequence),
        )

    def commit(self, sequence: Sequence, token: int) -> None:
        """The token that was pending is known."""
        sequence.pending -= 1
        sequence.tokens.append(token)
        self.generated_tokens += 1
        self.queue.charge(sequence.tenant, generated=1)

    def drop(self, sequence: Sequence) -> None:
        """It is over, wherever it stands. What it held is free at once: steps run in the order of their launch."""
        if sequence.slot is None:
            self.queue.remove(sequence)
        else:
            self._vacate(sequence)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Take the blocks that `count` more tokens need, from others if need be; False when it must give way itself."""
        needed = self.pool.blocks_for(sequence.computed + count) - len(sequence.blocks)
        if needed <= 0:
            return True
        while (taken := self.pool.take(needed)) is None:
            victim = dispensable(self.running)[0]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += taken
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._vacate(victim)
        self.preemptions += 1
        self.queue.push(victim)

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.slot is not None  # noqa: S101  for the type checker
        self.pool.release(sequence.blocks)
        self._free_slots.append(sequence.slot)
        self.running.remove(sequence)
        self._standing.running -= Counter([sequence.tenant])  # those with none are forgotten
        sequence.slot, sequence.blocks, sequence.computed, sequence.indexed = None, [], 0, 0
        sequence.is_primed = sequence.is_written = False

    def _admit(self, plan: list[Work], room: _Room, now: float, *, even_unread: bool) -> None:
        """Let newcomers in while there is room, in their order: nobody overtakes one for whom there is none."""
        while (
            (even_unread or (room.tokens and room.enough > 0))
            and self._free_slots
            and (sequence := self._next(now)) is not None
        ):
            if self._standing.is_behind(sequence.tenant) or not self._enter(sequence):
                return
            self._plan(sequence, plan, room)

    def _next(self, now: float) -> Sequence | None:
        """Of the best class: who has fewest running, then the least served."""
        return self.queue.head(now, handicap=self._standing.handicap)

    def _enter(self, sequence: Sequence) -> bool:
        """Give it a slot and blocks, also those of tenants it is behind. Changes nothing when there are too few."""
        found = self.pool.match(sequence)
        # One block more than it has text for: who comes in must not be thrown out by its first token.
        needed = self.pool.blocks_for(len(sequence.tokens) + 1) - len(found)
        ahead, victims = self._standing.ahead_of(sequence, self.running), list[Sequence]()
        while not (self._free_slots or victims) or self.pool.free_without(v.blocks for v in victims) < needed:
            if (victim := next(ahead, None)) is None:
                self.pool.release(found)
                return False
            victims.append(victim)
        for victim in victims:
            self._preempt(victim)
        self.queue.remove(sequence)
        self._start(sequence, found, needed)
        return True

    def _start(self, sequence: Sequence, found: list[int], needed: int) -> None:
        fresh = self.pool.take(needed)
        assert fresh is not None  # noqa: S101  for the type checker: it was counted
        cached = len(found) * self.pool.block_size
        if not sequence.is_known:
            sequence.is_known, sequence.cached_tokens = True, cached
            self.pool.asked_tokens += len(sequence.prompt)
            self.pool.found_tokens += cached
            self.queue.charge(sequence.tenant, read=len(sequence.prompt) - cached)
        sequence.slot, sequence.blocks = self._free_slots.pop(), found + fresh
        sequence.computed, sequence.indexed = cached, len(found)
        self.running.append(sequence)
        self._standing.running[sequence.tenant] += 1

    def _launch(self, work: Work) -> None:
        sequence = work.sequence
        sequence.computed += work.tokens
        sequence.pending += work.samples
        sequence.is_primed = work.samples
        sequence.is_written = True
        self.pool.index(sequence)


def _is_reading(sequence: Sequence) -> bool:
    return not sequence.is_primed
