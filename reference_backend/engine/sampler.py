"""From scores to tokens, for a whole batch at once, and for each row as if it were alone.

A row's result follows from its scores, its settings, its seed and how many tokens it has drawn before; neither its
neighbours nor its place in the batch matter. Chance is a function of seed and count (a counter-based generator), not a
state that is handed on: a sequence that was preempted and computed again draws the same tokens again.

Rows are sorted by what they ask for, and each kind takes its own path: greedy rows one maximum; drawing rows one
inverse of the cumulative distribution; rows with top-k, top-p or min-p the same over sorted candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reference_backend.engine.request import GREEDY_BELOW, Logprobs, Sampling, Sequence

_LOW_32 = (1 << 32) - 1
# Odd constants of splitmix64 and of the golden ratio, as signed 64-bit integers.
_GOLDEN, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def uniform(seed: Tensor, count: Tensor) -> Tensor:
    """A number in [0, 1), float64, for each pair of int64: splitmix64 of the seed's hash, `count` steps on.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014).
    """
    state = _mix(_mix(seed + _GOLDEN) + count * _GOLDEN)
    return _shifted(state, 11).double() / (1 << 53)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted right with zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch, sorted by kind. `slots` says where a row's settings lie; the rest are row numbers in the batch."""

    slots: Tensor
    drawing: Tensor | None
    filtered: Tensor | None
    penalized: Tensor | None
    biased: Tensor | None
    constrained: Tensor | None  # those that keep to a grammar
    told: Tensor | None  # those that want logprobs
    alternatives: int  # the most that any of them wants


class Drawn(NamedTuple):
    """One token for each row, and the largest score of each: not finite if the row's scores were no good."""

    tokens: Tensor
    best: Tensor
    chosen: Tensor | None  # logprobs of those rows that want them, and the likeliest tokens
    top: Tensor | None
    top_tokens: Tensor | None


class Sampler:
    """Settings of every slot, on the device."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._vocabulary = vocabulary
        self._device = device
        self._temperature = torch.ones(slots, 1, device=device)
        self._top_p = torch.ones(slots, 1, device=device, dtype=torch.float64)
        self._min_p = torch.zeros(slots, 1, device=device)
        self._top_k = torch.zeros(slots, 1, device=device, dtype=torch.int64)
        self._penalties = torch.zeros(slots, 3, 1, device=device)
        self._seed = torch.zeros(slots, 1, device=device, dtype=torch.int64)
        self._drawn = torch.zeros(slots, 1, device=device, dtype=torch.int64)
        # How often each token was generated, and whether it has occurred at all: only if somebody asks for penalties.
        self._counts: Tensor | None = None
        self._occurred: Tensor | None = None
        self._bias: Tensor | None = None  # likewise
        self._slots = slots

    def load(self, slot: int, sequence: Sequence) -> None:
        """Take over the settings of a sequence that begins, or begins again, in this slot."""
        settings, generated = sequence.sampling, sequence.generated
        self._temperature[slot] = max(settings.temperature, GREEDY_BELOW)
        self._top_p[slot] = settings.top_p
        self._min_p[slot] = settings.min_p
        self._top_k[slot] = settings.top_k if 0 < settings.top_k < self._vocabulary else self._vocabulary
        self._seed[slot] = sequence.seed
        self._drawn[slot] = len(generated)
        if settings.is_penalized:
            penalties = (settings.presence_penalty, settings.frequency_penalty, settings.repetition_penalty)
            self._penalties[slot] = torch.tensor(penalties, device=self._device)[:, None]
            if self._counts is None or self._occurred is None:
                shape = (self._slots, self._vocabulary)
                self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
                self._occurred = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._counts[slot] = torch.bincount(self._ids(generated), minlength=self._vocabulary)
            self._occurred[slot] = False
            self._occurred[slot, self._ids(sequence.tokens)] = True
        if settings.bias:
            if self._bias is None:
                self._bias = torch.zeros(self._slots, self._vocabulary, device=self._device)
            tokens, biases = zip(*settings.bias, strict=True)
            self._bias[slot] = 0.0
            self._bias[slot, self._ids(list(tokens))] = torch.tensor(biases, device=self._device)

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
        )

    def sample(self, scores: Tensor, rows: Rows, masks: bytes = b"") -> Drawn:
        """One token for each row of scores [rows, vocabulary] in float32, which may be overwritten.

        `masks` says what the constrained rows may draw, one after the other: a bit for each token, the first in the
        lowest, in whole words of 32.
        """
        chosen = top = top_tokens = None
        told = None if rows.told is None else scores[rows.told].log_softmax(dim=-1)
        if rows.penalized is not None:
            self._penalize(scores, rows.penalized, rows.slots[rows.penalized])
        if rows.biased is not None and self._bias is not None:
            scores[rows.biased] += self._bias[rows.slots[rows.biased]]
        if rows.constrained is not None:
            scores[rows.constrained] = scores[rows.constrained].masked_fill(~self._allowed(masks), -torch.inf)
        best, tokens = scores.max(dim=-1)
        for kind, draw in ((rows.drawing, self._draw), (rows.filtered, self._draw_filtered)):
            if kind is not None:
                slots = rows.slots[kind]
                scaled = (scores[kind] - best[kind, None]) / self._temperature[slots]
                tokens[kind] = draw(scaled.softmax(dim=-1), uniform(self._seed[slots], self._drawn[slots]), slots)
        if rows.drawing is not None or rows.filtered is not None:
            self._drawn[rows.slots] += 1
        if rows.penalized is not None:
            self._remember(rows.slots[rows.penalized], tokens[rows.penalized])
        if told is not None and rows.told is not None:
            chosen = told.gather(1, tokens[rows.told, None])[:, 0]
            top, top_tokens = told.topk(min(rows.alternatives, self._vocabulary), dim=-1)
        return Drawn(tokens, best, chosen, top, top_tokens)

    def _draw(self, probabilities: Tensor, chance: Tensor, _slots: Tensor) -> Tensor:
        cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
        return _inverse(cumulative, chance * cumulative[:, -1:], self._vocabulary - 1)

    def _draw_filtered(self, probabilities: Tensor, chance: Tensor, slots: Tensor) -> Tensor:
        """Candidates are a head of the sorted distribution, whatever the filter."""
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
        top_k = self._top_k[slots]
        nucleus = self._top_p[slots] * cumulative.gather(1, top_k - 1)
        kept = (
            (cumulative - probabilities < nucleus)
            & (torch.arange(self._vocabulary, device=self._device) < top_k)
            & (probabilities >= self._min_p[slots] * probabilities[:, :1])
        )
        last = kept.sum(dim=-1, keepdim=True).clamp_(min=1) - 1
        place = _inverse(cumulative, chance * cumulative.gather(1, last), last[:, 0])
        return order.gather(1, place[:, None])[:, 0]

    def _penalize(self, scores: Tensor, rows: Tensor, slots: Tensor) -> None:
        assert self._counts is not None  # noqa: S101  for the type checker: whoever is penalized was loaded
        assert self._occurred is not None  # noqa: S101
        presence, frequency, repetition = self._penalties[slots].unbind(1)
        counts, found = self._counts[slots], scores[rows]
        repeated = torch.where(found > 0, found / repetition, found * repetition)
        found = torch.where(self._occurred[slots], repeated, found)
        scores[rows] = found - frequency * counts - presence * (counts > 0)

    def _remember(self, slots: Tensor, tokens: Tensor) -> None:
        assert self._counts is not None  # noqa: S101  as above
        assert self._occurred is not None  # noqa: S101
        self._counts[slots, tokens] += 1
        self._occurred[slots, tokens] = True

    def _allowed(self, masks: bytes) -> Tensor:
        """The masks as truth values [constrained rows, vocabulary]."""
        words = torch.frombuffer(bytearray(masks), dtype=torch.int32).to(self._device)
        words = words.view(-1, -(-self._vocabulary // 32), 1)
        bits = (words >> torch.arange(32, device=self._device)) & 1
        return bits.flatten(1)[:, : self._vocabulary].bool()

    def _where(self, wanted: list[bool]) -> Tensor | None:
        found = [row for row, is_wanted in enumerate(wanted) if is_wanted]
        return self._ids(found) if found else None

    def _ids(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def _inverse(cumulative: Tensor, value: Tensor, last: Tensor | int) -> Tensor:
    """The first place where the cumulative distribution exceeds the value, at most `last`."""
    place = torch.searchsorted(cumulative, value, right=True)[:, 0]
    return place.clamp_max(last) if isinstance(last, int) else torch.minimum(place, last)


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
