"""Many sequences, one model: turn after turn, each of which gives every sequence that generates its next token.

A turn is: drop what is late, plan a step, launch it, and tell what came of it. With `overlap` a step
is launched before the one before it is read, so that a device that computes on its own never waits for the host; a
sequence that turns out to have ended has then computed one token for nothing, which is thrown away.

Invariants:
- What a sequence holds (slot, blocks) is free no later than one turn after it finished or was aborted.
- Every sequence that was submitted is published with a finish exactly once, unless it was aborted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from random import Random

from reference_backend.admission import FairQueue
from reference_backend.engine.grammar import Grammars
from reference_backend.engine.graphs import Prepare
from reference_backend.engine.kv_cache import BlockPool
from reference_backend.engine.model import Llama
from reference_backend.engine.pace import NEW, Pace, predicted_reading_end
from reference_backend.engine.request import Delta, Load, Logprobs, Published, Sequence
from reference_backend.engine.runner import Launched, Runner
from reference_backend.engine.scheduler import Scheduler, Work

SEEDS = 1 << 62  # for a request without a `seed`, one below this is drawn
STEP_SECONDS = 0.1  # of a step that reads prompts beside those who generate
AGE_SECONDS = 10.0  # a request that waits rises by a class each time
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of an engine.

    `cache_tokens` is the room for keys and values, shared by all sequences; at least one of `context` tokens fits.
    `step_tokens` bounds a step, and with it the time that a long prompt holds up the others; where so many take longer
    than STEP_SECONDS, fewer are read beside those who generate.
    """

    slots: int
    context: int
    cache_tokens: int
    block_size: int = 16
    step_tokens: int = 256

    @property
    def blocks(self) -> int:
        """Blocks of the cache, the one that is padding included."""
        return max(self.cache_tokens, self.context) // self.block_size + 2


class Engine:
    """Hand in with `submit`, take back with `abort`, and take a `turn` while it is busy.

    How many may wait is the business of whoever hands in.
    """

    def __init__(
        self,
        model: Llama,
        settings: Settings,
        *,
        end_tokens: frozenset[int],
        rng: Random,
        overlap: bool = False,
        grammars: Grammars | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        self.settings = settings
        self.end_tokens = end_tokens
        self._rng = rng
        self._overlap = overlap
        self._grammars = grammars
        self.runner = Runner(
            model,
            slots=settings.slots,
            blocks=settings.blocks,
            block_size=settings.block_size,
            context=settings.context,
            prepare=prepare,
        )
        self.scheduler = Scheduler(
            BlockPool(settings.blocks, settings.block_size),
            FairQueue(AGE_SECONDS),
            slots=settings.slots,
            step_tokens=settings.step_tokens,
        )
        self._pace = Pace(STEP_SECONDS)
        self._plan: list[Work] = []  # of the last step
        self._queue_seconds = 0.0  # before a request is admitted: an average in which a new one counts NEW
        self._unread: Launched | None = None
        self._arrived: list[Sequence] = []
        self._arrivals = 0

    def __repr__(self) -> str:
        load = self.load()
        return f"<Engine {load.running} running of {self.settings.slots}, {load.waiting} waiting>"

    @property
    def is_busy(self) -> bool:
        """Whether there is a turn to take."""
        return bool(self._arrived) or not self.scheduler.is_idle

    def load(self) -> Load:
        """The current counts."""
        scheduler = self.scheduler
        waiting = [*self._arrived, *scheduler.queue]
        generating = sum(sequence.is_primed for sequence in scheduler.running)
        pool, step_seconds = scheduler.pool, self._pace.step_seconds
        return Load(
            running=len(scheduler.running),
            waiting=len(waiting),
            kv_usage=pool.held / (pool.blocks - 1),
            prompt_tokens=pool.asked_tokens,
            cached_tokens=pool.found_tokens,
            generated_tokens=scheduler.generated_tokens,
            preemptions=scheduler.preemptions,
            slots=self.settings.slots,
            kv_used=pool.held,
            kv_blocks=pool.blocks - 1,
            block_size=pool.block_size,
            cached_blocks=pool.named,
            waiting_tokens=sum(len(sequence.prompt) for sequence in waiting),
            backlog_tokens=sum(s.uncomputed for s in scheduler.running if not s.is_primed),
            step_seconds=step_seconds,
            longest_step_seconds=self._pace.longest_step_seconds(self.settings.step_tokens),
            prefill_rate=self._pace.reading_rate,
            decode_rate=generating / step_seconds if step_seconds else 0.0,
            queue_seconds=self._queue_seconds,
        )

    def submit(self, sequence: Sequence) -> None:
        """Hand in a sequence whose prompt and `max_tokens` fit the context."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        seed = sequence.sampling.seed
        sequence.seed = self._rng.randrange(SEEDS) if seed is None else seed
        if sequence.sampling.grammar is not None and self._grammars is not None:
            sequence.constraint = self._grammars.begin(sequence.sampling.grammar)
        self._arrived.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Stop a sequence before the next token. Harmless for one that has finished."""
        if sequence in self._arrived:
            self._arrived.remove(sequence)
        elif not sequence.is_over:
            self._end(sequence)

    def sleep(self) -> None:
        """Give the device back, while nothing is under way. What was cached is forgotten."""
        self._unread = None
        self.scheduler.pool.forget(list(range(1, self.settings.blocks)))
        self.runner.sleep()

    def wake(self) -> None:
        """Be as before `sleep`. Raises RuntimeError where the device has no room any more."""
        self.runner.wake()

    def turn(self, now: float) -> Published:
        """Take one step: every sequence that generates gets one token, and a piece of a prompt is read."""
        published = self._take_in(now) + self._drop(now)
        plan = self._plan = self.scheduler.schedule(now, self._pace.readable(), self._pace.beside())
        admitted = [work.sequence for work in plan if work.is_new and not work.sequence.generated]
        for sequence in admitted:
            self._queue_seconds += NEW * (now - sequence.arrived_at - self._queue_seconds)
        self._pace.gave_slots(now, len(admitted), len(self.scheduler.queue))
        launched = self.runner.launch(plan, lambda: self._read(published)) if plan else None
        if self._overlap:
            self._read(published)
        self._unread = launched
        if not self._overlap:
            self._read(published)
        return published

    def _read(self, published: Published) -> None:
        """Take note of what the step that is not read yet has drawn, if there is one."""
        unread, self._unread = self._unread, None
        for sequence, token, logprobs in unread.results() if unread is not None else []:
            if not sequence.is_over:  # it may have ended meanwhile
                delta = self._commit(sequence, token, logprobs)
                if delta.finish is not None:
                    self._end(sequence)
                published.append((sequence, delta))

    def took(self, seconds: float) -> None:
        """The time of the last turn, from which the size of the next ones follows."""
        read = sum(work.tokens for work in self._plan if not work.is_decode)
        self._pace.took(seconds, read, sum(work.is_decode for work in self._plan))

    def _take_in(self, now: float) -> Published:
        """Those that have come wait from now on, but for those that would certainly be late: they are told so."""
        hopeless: Published = []
        for sequence in self._arrived:
            sequence.arrived_at = now
            if sequence.deadline is not None and sequence.deadline < self._earliest(sequence, now):
                sequence.is_over = True
                hopeless.append((sequence, Delta(None, "deadline")))
            else:
                self.scheduler.queue.push(sequence)
        self._arrived.clear()
        return hopeless

    def _earliest(self, sequence: Sequence, now: float) -> float:
        """When its first token can be expected at best."""
        ahead = self.scheduler.ahead(sequence)
        return predicted_reading_end(now, ahead, self._pace.reading_rate, self._pace.slot_seconds)

    def _drop(self, now: float) -> Published:
        """Take out who is late, running or waiting."""
        late = [sequence for sequence in self.scheduler.everyone() if sequence.is_late(now)]
        for sequence in late:
            self._end(sequence)
        return [(sequence, Delta(None, "deadline")) for sequence in late]

    def _commit(self, sequence: Sequence, token: int, logprobs: Logprobs | None) -> Delta:
        """Take note of a token. What is told of it, and whether its sequence ends with it."""
        constraint, cached = sequence.constraint, sequence.cached_tokens
        if constraint is not None and constraint.is_broken:
            return Delta(None, "grammar")
        if token < 0:  # its scores were no numbers
            # Whatever it has put into the cache may be no number either, and must not be met by others.
            self.runner.clear(self.scheduler.pool.forget(sequence.blocks))
            log.error("a sequence of %d tokens led to scores that are not finite", len(sequence.tokens))
            return Delta(None, "failed")
        self.scheduler.commit(sequence, token)
        if token in self.end_tokens and not sequence.sampling.ignore_eos:
            return Delta(None, "stop", cached_tokens=cached)
        if constraint is not None and constraint.take(token):
            return Delta(token, "stop", logprobs, cached)
        is_last = len(sequence.tokens) - len(sequence.prompt) >= sequence.sampling.max_tokens
        return Delta(token, "length" if is_last else None, logprobs, cached)

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.drop(sequence)
        sequence.is_over = True
