"""Many sequences, one model: a thread that gives every running sequence one token per turn.

A turn is: drop what was aborted or is late, admit from the queue while slots are free, read one chunk of one prompt,
and take one decoding step for all sequences whose prompt is read, in a single batch. Sequences therefore join and
leave between any two tokens, and a long prompt delays the others by one chunk at most.

Invariants:
- A sequence holds one cache slot from admission until it finishes or is aborted, and no turn later than that.
- At most `slots` sequences run and `max_waiting` wait; whoever comes on top of that is refused at once.
- Only the thread touches the model and `running`; the other side hands sequences in, marks them aborted and reads
  counts. Everything that becomes known in a turn goes out in one call of `publish`.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from reference_backend.model import KeyValueCache, Llama, Step

PROMPT_CHUNK_TOKENS = 256
GREEDY_BELOW = 1e-5  # a smaller temperature divides by what float32 cannot hold

Finish = Literal["stop", "length", "deadline", "failed"]
log = logging.getLogger(__name__)


class EngineBusy(Exception):  # noqa: N818  an answer, not a fault
    """As many sequences run and wait as may; nothing was started."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, and how many. Equal seeds give equal text, whoever else is in the batch."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """One token, or the end, or both. No token with finish `stop` means that the model ended its answer itself."""

    token: int | None
    finish: Finish | None


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine. `deadline` is in the seconds of the engine's clock."""

    prompt: list[int]
    sampling: Sampling
    deadline: float | None
    deliver: Callable[[Delta], None]
    aborted: bool = False
    slot: int = -1
    cached_tokens: int = 0
    generated: list[int] = field(default_factory=list)
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.sampling.seed)  # noqa: S311  it draws words

    @property
    def is_prompt_read(self) -> bool:
        return self.cached_tokens >= len(self.prompt)

    def is_late(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline


@dataclass(frozen=True, slots=True)
class Load:
    """What the backend reports about itself. `kv_usage` is the used share of the cache, 0 to 1."""

    running: int
    waiting: int
    kv_usage: float


Published = list[tuple[Sequence, Delta]]


class Engine:
    """Start it once with `start`, hand in with `submit`, take back with `abort`."""

    def __init__(
        self,
        model: Llama,
        *,
        end_tokens: frozenset[int],
        slots: int,
        max_waiting: int,
        context: int,
        clock: Callable[[], float],
    ) -> None:
        self.model = model
        self.end_tokens = end_tokens
        self.slots = slots
        self.max_waiting = max_waiting
        self.context = context
        self.clock = clock
        self.has_failed = False
        weight = model.lm_head.weight
        self._cache = KeyValueCache(model.config, slots, context, weight.device, weight.dtype)
        self._free = list(range(slots))
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        load = self.load()
        return f"<Engine {load.running} running of {self.slots}, {load.waiting} waiting of {self.max_waiting}>"

    def load(self) -> Load:
        """The current counts. Safe to call from any thread."""
        running = self._running
        used = sum(sequence.cached_tokens for sequence in running)
        return Load(len(running), len(self._waiting), used / (self.slots * self.context))

    def submit(self, sequence: Sequence) -> None:
        """Hand in a sequence whose prompt and `max_tokens` fit the context.

        Raises EngineBusy at the bound, or after a failure.
        """
        with self._changed:
            is_full = len(self._running) + len(self._waiting) >= self.slots + self.max_waiting
            if is_full or self.has_failed:
                raise EngineBusy
            self._waiting.append(sequence)
            self._changed.notify()

    def abort(self, sequence: Sequence) -> None:
        """Stop a sequence before the next token. Harmless for one that has finished."""
        sequence.aborted = True

    def start(self, publish: Callable[[Published], object]) -> None:
        """Run turns in a thread of its own. `publish` is called from that thread."""
        self._thread = threading.Thread(target=self._run, args=(publish,), name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after the current turn, whatever is still running."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self, publish: Callable[[Published], object]) -> None:
        while self._wait_for_work():
            try:
                published = self.turn(self.clock())
            except Exception:  # a broken model must not leave its clients waiting for ever
                log.exception("the engine failed and takes no more work")
                with self._changed:
                    self.has_failed = True  # nobody comes in behind those who are told now
                publish([(sequence, Delta(None, "failed")) for sequence in (*self._running, *self._waiting)])
                return
            if published:
                publish(published)

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._running or self._waiting)
            return not self._is_closing

    @torch.inference_mode()
    def turn(self, now: float) -> Published:
        """Advance every running sequence by one token, or one prompt by one chunk."""
        published = self._drop(now)
        self._admit()
        decoding = [sequence for sequence in self._running if sequence.is_prompt_read]
        published += self._read_prompt()
        published += self._decode(decoding)
        self._release([sequence for sequence, delta in published if delta.finish])
        return published

    def _drop(self, now: float) -> Published:
        """Take out what was aborted or is late, running or waiting. Only the late ones are told."""
        with self._changed:
            everyone = (*self._running, *self._waiting)
            gone = {sequence for sequence in everyone if sequence.aborted or sequence.is_late(now)}
            self._waiting = deque(sequence for sequence in self._waiting if sequence not in gone)
        self._release([sequence for sequence in self._running if sequence in gone])
        return [
            (sequence, Delta(None, "deadline")) for sequence in everyone if sequence in gone and not sequence.aborted
        ]

    def _admit(self) -> None:
        with self._changed:
            while self._free and self._waiting:
                sequence = self._waiting.popleft()
                sequence.slot = self._free.pop()
                self._running = [*self._running, sequence]

    def _release(self, finished: list[Sequence]) -> None:
        with self._changed:
            self._free += [sequence.slot for sequence in finished if sequence in self._running]
            self._running = [sequence for sequence in self._running if sequence not in finished]

    def _read_prompt(self) -> Published:
        """Read a chunk of the oldest unread prompt; at its end the first token is known."""
        sequence = next((s for s in self._running if not s.is_prompt_read), None)
        if sequence is None:
            return []
        start = sequence.cached_tokens
        chunk = sequence.prompt[start : start + PROMPT_CHUNK_TOKENS]
        logits = self._forward([chunk], [sequence.slot], [start])
        sequence.cached_tokens += len(chunk)
        return [(sequence, self._choose(sequence, logits[0]))] if sequence.is_prompt_read else []

    def _decode(self, decoding: list[Sequence]) -> Published:
        if not decoding:
            return []
        logits = self._forward(
            [[sequence.generated[-1]] for sequence in decoding],
            [sequence.slot for sequence in decoding],
            [sequence.cached_tokens for sequence in decoding],
        )
        for sequence in decoding:
            sequence.cached_tokens += 1
        return [(sequence, self._choose(sequence, row)) for sequence, row in zip(decoding, logits, strict=True)]

    def _forward(self, tokens: list[list[int]], slots: list[int], starts: list[int]) -> Tensor:
        """Logits after the last token of each row; rows are equally long."""
        device = self._cache.keys.device
        positions = torch.tensor(starts)[:, None] + torch.arange(len(tokens[0]))
        step = Step.at(self._cache, torch.tensor(slots, device=device), positions.to(device))
        hidden = self.model(torch.tensor(tokens, device=device), step)
        return self.model.logits(hidden[:, -1])

    def _choose(self, sequence: Sequence, logits: Tensor) -> Delta:
        token = choose(logits, sequence.sampling, sequence.rng)
        sequence.generated.append(token)
        if token in self.end_tokens and not sequence.sampling.ignore_eos:
            return Delta(None, "stop")
        is_last = len(sequence.generated) >= sequence.sampling.max_tokens
        return Delta(token, "length" if is_last else None)


def choose(logits: Tensor, sampling: Sampling, rng: random.Random) -> int:
    """The likeliest token at temperature 0, else one drawn from the nucleus (top-p, arXiv 1904.09751)."""
    if sampling.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / sampling.temperature
    probabilities, order = scaled.softmax(dim=-1).sort(descending=True, stable=True)
    cumulative = probabilities.cumsum(dim=-1)
    nucleus = max(1, int((cumulative - probabilities < sampling.top_p).sum()))
    drawn = rng.random() * float(cumulative[nucleus - 1])
    index = int(torch.searchsorted(cumulative[:nucleus], drawn, right=True))
    return int(order[min(index, nucleus - 1)])
