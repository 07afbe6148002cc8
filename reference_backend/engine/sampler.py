"""From scores to tokens, for a whole batch at once, and for each row as if it were alone.

A row's token follows from its scores, its settings, its seed and its position; neither its neighbours nor its place in
the batch matter. Chance is a function (a hash of seed, position and token), not a state that is handed on: a sequence
that was preempted and computed again draws the same tokens again, and so does every rank that shares a model.

Each token is as far from the best as its score is below it. Candidates are all up to some distance, so that what is
equally likely is in or out together (as in transformers). To every candidate's distance goes temperature times the
logarithm of an exponential variate, and the nearest is drawn (of equal ones the first): that is the Gumbel-max trick,
which needs no sum over candidates, and without temperature it is the best token.

`Sampler.draw` is that much: on a GPU one kernel (`sampler_kernels.py`), which reads all that it needs from rows on the
device and so is a part of the recorded step. What changes scores before (penalties, bias, grammars) or tells of them
(logprobs) is done by `Sampler.sample`, behind a recorded step: masks come from the host, and the others need tables of
slots times vocabulary that most servers never fill. It costs the batches in which somebody asks for it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from reference_backend.engine.graphs import sent
from reference_backend.engine.request import Logprobs, Sampling, Sequence

# Odd constants: the golden ratio's, and those of a two-round hash of 32 bits with low bias (Wellons, "Prospecting for
# Hash Functions", 2018).
SPREAD, MIX_1, MIX_2 = 0x9E3779B9, 0x7FEB352D, 0x846CA68B
FARTHEST = torch.finfo(torch.float32).max  # what has a score of -inf is farther


def signed(word: int) -> int:
    """The int32 with these bits."""
    return (word & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def log_waits(spread: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Logarithms of exponential variates, one for each token: a hash of `spread` with two int32 for each row.

    31 bits are a number in (0, 1) that is finest near 0, which is where the shortest of many waits comes from.
    """
    x = spread ^ first
    x = ((x >> 16 & 0xFFFF) ^ x).mul_(signed(MIX_1)).add_(second)
    x = ((x >> 15 & 0x1FFFF) ^ x).mul_(signed(MIX_2)).bitwise_and_(0x7FFFFFFF)
    # Never 0 nor 1: half a step up, and a little less than 2 ** -31 each.
    return x.float().mul_(-(2**-31) * (1 - 2**-24)).sub_(2**-32).log1p_().neg_().log_()


Some: TypeAlias = Tensor | slice | None  # row numbers in a batch; all of them; none of them
ALL = slice(None)
UNBOUNDED = 1 << 31
FEW = 128  # tokens among which nearly all of a distribution's weight is, most often


class Rows(NamedTuple):
    """A batch, sorted by kind. `slots` says where a row's settings lie."""

    slots: Tensor
    drawing: Some = None
    filtered: Some = ALL  # the general case, of which the others are simpler ones
    penalized: Some = None
    biased: Some = None
    constrained: Some = None  # those that keep to a grammar
    told: Some = None  # those that want logprobs
    alternatives: int = 0  # the most that any of them wants
    most_candidates: int = UNBOUNDED  # the largest top-k of those that have one

    @property
    def are_plain(self) -> bool:
        """Whether the scores decide as they are, and nothing is to be told of them."""
        return self.penalized is self.biased is self.constrained is self.told is None


class Drawn(NamedTuple):
    """One token for each row; -1 if the row's scores were no good."""

    tokens: Tensor
    chosen: Tensor | None = None  # logprobs of those rows that want them, and the likeliest tokens
    top: Tensor | None = None
    top_tokens: Tensor | None = None


class Sampler:
    """Settings of every slot, on the device. `lengths` [slots] are those of the sequences there."""

    def __init__(self, vocabulary: int, lengths: Tensor, *, has_kernel: bool = False) -> None:
        self._vocabulary = vocabulary
        self._lengths = lengths
        self._slots, self._device = len(lengths), lengths.device
        self._floats = torch.zeros(self._slots, 3, device=self._device)  # temperature, farthest by min-p, top-p
        self._ints = torch.ones(self._slots, 3, device=self._device, dtype=torch.int32)  # top-k, two words of the seed
        self._spread = (torch.arange(vocabulary, device=self._device) * SPREAD).to(torch.int32)
        self._penalties = torch.zeros(self._slots, 3, 1, device=self._device)
        # How often each token was generated, and how often it stands anywhere: only if somebody asks for penalties.
        self._said: Tensor | None = None
        self._bias: Tensor | None = None  # likewise
        self._kernel: Callable[..., Tensor] | None = None
        if has_kernel:
            from reference_backend.engine.sampler_kernels import draw  # noqa: PLC0415  Triton is only there where it is used

            self._kernel = draw

    def load(self, slot: int, sequence: Sequence) -> None:
        """Take over the settings of a sequence that begins, or begins again, in this slot."""
        settings = sequence.sampling
        temperature = 0.0 if settings.is_greedy else settings.temperature
        farthest = min(-temperature * math.log(settings.min_p), FARTHEST) if settings.min_p > 0 else FARTHEST
        top_k = settings.top_k if 0 < settings.top_k < self._vocabulary else self._vocabulary
        words = struct.unpack("<ii", blake2b(struct.pack("<q", sequence.seed), digest_size=8).digest())
        self._floats[slot] = sent([temperature, farthest, settings.top_p], torch.float32, self._device)
        self._ints[slot] = sent([top_k, *words], torch.int32, self._device)
        if settings.is_penalized:
            penalties = [settings.presence_penalty, settings.frequency_penalty, settings.repetition_penalty]
            self._penalties[slot] = sent(penalties, torch.float32, self._device)[:, None]
            if self._said is None:
                shape = (self._slots, 2, self._vocabulary)
                self._said = torch.zeros(shape, dtype=torch.int32, device=self._device)
            for place, tokens in enumerate((sequence.generated, sequence.tokens)):
                self._said[slot, place] = torch.bincount(self._ids(tokens), minlength=self._vocabulary)
        if settings.bias:
            if self._bias is None:
                self._bias = torch.zeros(self._slots, self._vocabulary, device=self._device)
            biased, biases = zip(*settings.bias, strict=True)
            self._bias[slot] = 0.0
            self._bias[slot, self._ids(biased)] = sent(biases, torch.float32, self._device)

    def rows(self, sequences: list[Sequence], slots: Tensor) -> Rows:
        """Sort a batch by kind. Good for as long as the same sequences stand in the same slots."""
        asked = [sequence.sampling for sequence in sequences]
        return Rows(
            slots,
            drawing=self._where([not (each.is_greedy or each.is_filtered) for each in asked]),
            filtered=self._where([each.is_filtered and not each.is_greedy for each in asked]),
            penalized=self._where([each.is_penalized for each in asked]),
            biased=self._where([bool(each.bias) for each in asked]),
            constrained=self._where([sequence.constraint is not None for sequence in sequences]),
            told=self._where([each.logprobs is not None for each in asked]),
            alternatives=max((each.logprobs or 0 for each in asked), default=0),
            most_candidates=max((each.top_k for each in asked), default=0),
        )

    def sample(self, scores: Tensor, rows: Rows, masks: bytes = b"") -> Drawn:
        """One token for each row of scores [rows, vocabulary] in float32, which may be overwritten.

        `masks` says what the constrained rows may draw, one after the other: a bit for each token, the first in the
        lowest, in whole words of 32.
        """
        told = None if rows.told is None else scores[rows.told].log_softmax(dim=-1)
        if rows.penalized is not None:
            self._penalize(scores, rows.penalized, rows.slots[rows.penalized])
        if rows.biased is not None and self._bias is not None:
            scores[rows.biased] += self._bias[rows.slots[rows.biased]]
        if rows.constrained is not None:
            scores[rows.constrained] = scores[rows.constrained].masked_fill(~self._allowed(masks), -torch.inf)
        tokens = self.draw(scores, rows)
        if rows.penalized is not None and self._said is not None:
            self._said[rows.slots[rows.penalized], :, tokens[rows.penalized]] += 1
        if told is None or rows.told is None:
            return Drawn(tokens)
        chosen = told.gather(1, tokens[rows.told, None].clamp_min(0))[:, 0]
        return Drawn(tokens, chosen, *told.topk(min(rows.alternatives, self._vocabulary), dim=-1))

    def draw(self, scores: Tensor, rows: Rows) -> Tensor:
        """The token of each row, -1 for one whose best score is no finite number."""
        if self._kernel is not None:
            return self._kernel(scores, rows.slots, self._lengths, self._floats, self._ints)
        best, tokens = scores.max(dim=-1, keepdim=True)
        for kind, most in ((rows.drawing, None), (rows.filtered, rows.most_candidates)):
            if kind is not None:
                tokens[kind] = self._nearest(best[kind] - scores[kind], rows.slots[kind], most)
        return tokens.masked_fill_(best - best != 0, -1)[:, 0]  # infinities and NaN, in half the calls of `isfinite`

    def _nearest(self, distances: Tensor, slots: Tensor, most: int | None) -> Tensor:
        temperature, farthest, top_p = self._floats[slots].split(1, dim=1)
        top_k, first, second = self._ints[slots].split(1, dim=1)
        positions = self._lengths[slots, None].int()
        waits = log_waits(self._spread, first + positions, second + positions * signed(SPREAD))
        drawn = torch.addcmul(distances, waits, temperature)
        if most is not None:
            limit = torch.minimum(farthest, _reach(distances, temperature, top_k, top_p, most))
            drawn.masked_fill_(distances > limit, torch.inf)
        return drawn.argmin(dim=-1, keepdim=True)

    def _penalize(self, scores: Tensor, rows: Tensor | slice, slots: Tensor) -> None:
        assert self._said is not None  # noqa: S101  for the type checker: whoever is penalized was loaded
        presence, frequency, repetition = self._penalties[slots].unbind(1)
        (generated, anywhere), found = self._said[slots].unbind(1), scores[rows]
        repeated = torch.where(found > 0, found / repetition, found * repetition)
        found = torch.where(anywhere > 0, repeated, found)
        scores[rows] = found - frequency * generated - presence * (generated > 0)

    def _allowed(self, masks: bytes) -> Tensor:
        """The masks as truth values [constrained rows, vocabulary]."""
        words = torch.frombuffer(bytearray(masks), dtype=torch.int32).to(self._device)
        words = words.view(-1, -(-self._vocabulary // 32), 1)
        bits = (words >> torch.arange(32, device=self._device)) & 1
        return bits.flatten(1)[:, : self._vocabulary].bool()

    def _where(self, wanted: list[bool]) -> Some:
        found = [row for row, is_wanted in enumerate(wanted) if is_wanted]
        return ALL if all(wanted) else self._ids(found) if found else None

    def _ids(self, numbers: Iterable[int]) -> Tensor:
        return sent(numbers, torch.int64, self._device)


def _reach(distances: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, most: int) -> Tensor:
    """How far the `top_k` nearest go, and of those the nearest that have `top_p` of what all of those weigh.

    Those few who are nearest are found sooner than all are sorted, and they nearly always tell. `most` is the largest
    top-k of any row that has one.
    """
    every = distances.shape[1]
    few = max(most, FEW)
    near = distances.topk(few, largest=False).values if few < every else distances.sort(dim=-1).values
    bounded = near.gather(1, top_k.long().clamp_max(near.shape[1]) - 1)
    reach = torch.where(top_k < every, bounded, torch.inf)
    whole = torch.exp(distances / -temperature).masked_fill_(distances > reach, 0.0).sum(-1, True, dtype=torch.float64)
    weights = torch.exp(near / -temperature).cumsum(dim=-1, dtype=torch.float64)
    fewer = (weights < top_p * whole).sum(dim=-1, keepdim=True)
    is_open = top_p < 1.0
    if few < every and (is_open & (top_k == every) & (fewer == few)).any():
        return _reach(distances, temperature, top_k, top_p, every)
    return torch.where(is_open, near.gather(1, fewer.clamp_max(near.shape[1] - 1)).minimum(reach), reach)


def told_logprobs(drawn: Drawn, settings: list[Sampling]) -> list[Logprobs | None]:
    """The logprobs of each row that wants any, for `settings` of all rows."""
    told: list[Logprobs | None] = [None] * len(settings)
    if drawn.chosen is None or drawn.top is None or drawn.top_tokens is None:
        return told
    wanting = [row for row, each in enumerate(settings) if each.logprobs is not None]
    columns = (drawn.chosen.tolist(), drawn.top_tokens.tolist(), drawn.top.tolist())
    for row, chosen, tokens, values in zip(wanting, *columns, strict=True):
        count = settings[row].logprobs
        told[row] = Logprobs(chosen, tuple(zip(tokens[:count], values[:count], strict=True)))
    return told
