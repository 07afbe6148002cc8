"""What the engine takes and gives: a request with its state inside, and the tokens that come of it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b
from typing import Literal, Protocol

import msgspec

PICTURE_SIDE, PICTURE_TOKENS = 32, 16  # pixels of a picture, and tokens that stand for it
GREEDY_BELOW = 1e-5  # a smaller temperature divides by what float32 cannot hold

# `failed`: this request met scores that are no numbers. `grammar`: its grammar cannot be followed any further.
# `lost`: the worker that had it is gone.
Finish = Literal["stop", "length", "deadline", "failed", "grammar", "lost"]


class Priority(IntEnum):
    """Classes of requests: a lower number goes first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, and how many. Equal seeds give equal text, whoever else is in the batch.

    The candidates are the `top_k` likeliest (0: all), of those the likeliest that together have `top_p` of their
    probability, and of those the ones at least `min_p` times as likely as the likeliest. Who is as likely as a
    candidate is one, too, but a `top_k` of 1 takes the first. Penalties come before all that: `presence` and
    `frequency` are subtracted from the logits of what was generated (once, and each time), `repetition` divides the
    logits of what was generated or asked. `bias` is added to the logits of tokens. Where there is a `grammar`, only
    tokens that keep to it are candidates, and the answer is over when it is complete. `logprobs` is the number of
    alternatives to tell with each token; None tells nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def is_filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def is_penalized(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


class Logprobs(msgspec.Struct, array_like=True, frozen=True):
    """Natural logarithms of probabilities, before temperature and penalties: the token's, and the likeliest ones."""

    chosen: float
    top: tuple[tuple[int, float], ...]


class Delta(msgspec.Struct, array_like=True, frozen=True):
    """One token, or the end, or both. No token with finish `stop` means that the model ended its answer itself."""

    token: int | None
    finish: Finish | None
    logprobs: Logprobs | None = None
    cached_tokens: int = 0  # of the prompt, that were found in the cache


class Picture(msgspec.Struct, array_like=True, frozen=True):
    """What is to be seen from the token `start` of a prompt on: RGB, a byte each, row by row."""

    start: int
    pixels: bytes

    @property
    def digest(self) -> bytes:
        return blake2b(self.pixels, digest_size=16).digest()


class Constraint(Protocol):
    """The grammar of one answer, as far as the answer has come. `is_broken`: it cannot be followed any further."""

    @property
    def is_broken(self) -> bool: ...

    def mask(self) -> bytes:
        """A bit for each token that may come next, the first in the lowest, in whole words of 32. None when broken."""

    def take(self, token: int) -> bool:
        """Go on by a token. Returns whether the answer is complete, and nothing can follow."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine. `deadline` is in the seconds of the engine's clock.

    What stands below `ticket` belongs to the engine. A token is *known* once the host has seen it, *pending* from the
    launch of the step that draws it until then, and *computed* once its keys and values are in the cache (or the step
    that writes them is launched, which is as good: steps run in order).
    """

    prompt: list[int]
    sampling: Sampling
    deadline: float | None = None
    priority: int = Priority.NORMAL
    tenant: str = ""  # who shares fairly with others
    salt: bytes = b""  # requests with different salts never share cached blocks
    pictures: list[Picture] = field(default_factory=list)  # each in the place of PICTURE_TOKENS tokens of the prompt
    ticket: int = 0  # the server's number for it

    seed: int = 0
    constraint: Constraint | None = None
    arrival: int = 0
    arrived_at: float = 0.0
    is_over: bool = False  # ended, aborted or late: nothing more comes of it
    is_known: bool = False  # it was admitted once, and is counted
    tokens: list[int] = field(init=False)
    pending: int = 0
    computed: int = 0
    cached_tokens: int = 0  # of the prompt: found in the cache at the first admission
    is_written: bool = False  # its row on the device is
    is_primed: bool = False  # and its newest token lies there
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as anyone has asked
    indexed: int = 0  # leading blocks that the prefix cache knows

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def drawn(self) -> int:
        """Tokens generated, the pending one included."""
        return len(self.tokens) + self.pending - len(self.prompt)

    @property
    def uncomputed(self) -> int:
        """Tokens that a step could work on; none when the last token that may be generated is on its way."""
        reached = len(self.tokens) + self.pending  # each sequence is asked in each step: `drawn` would take longer
        return 0 if reached - len(self.prompt) >= self.sampling.max_tokens else reached - self.computed

    def shown(self, start: int, end: int) -> bytes:
        """What distinguishes the tokens from `start` to `end` beside their numbers: the pictures behind them."""
        overlapping = (p for p in self.pictures if start < p.start + PICTURE_TOKENS and p.start < end)
        return b"".join(picture.digest for picture in overlapping)

    def is_late(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline


class Load(msgspec.Struct, array_like=True, frozen=True):
    """What the engine reports about itself. `kv_usage` is the used share of the cache, 0 to 1."""

    running: int
    waiting: int
    kv_usage: float
    prompt_tokens: int = 0  # this and the next three since its start
    cached_tokens: int = 0  # of those tokens, found in the cache
    generated_tokens: int = 0
    preemptions: int = 0
    slots: int = 0
    kv_used: int = 0  # blocks
    kv_blocks: int = 0
    block_size: int = 0
    cached_blocks: int = 0
    waiting_tokens: int = 0  # of the prompts of those that wait
    backlog_tokens: int = 0  # of the prompts of those that run, not read yet
    step_seconds: float = 0.0  # this and what follows are averages of late; rates are tokens/s
    longest_step_seconds: float = 0.0  # of one that reads as much as a step may
    prefill_rate: float = 0.0
    decode_rate: float = 0.0
    queue_seconds: float = 0.0


Published = list[tuple[Sequence, Delta]]
