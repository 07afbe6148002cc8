"""Carries a plan out on the device. The state of each running sequence lies there, in the row of its slot.

What a decoding step needs (its newest token, its length, its blocks, its settings) is already on the device: the
host sends which slots take part, and new block numbers when a sequence has grown into another block. The result of a
step is read when `Launched.results` is called, not before, so that the next step can be launched meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference_backend.engine.attention import Chunk, PagedCache, Step, attention_for
from reference_backend.engine.model import Llama, Seen
from reference_backend.engine.request import PICTURE_TOKENS, Logprobs, Sequence
from reference_backend.engine.sampler import Drawn, Rows, Sampler, told_logprobs
from reference_backend.engine.scheduler import Work
from reference_backend.engine.vision import Album


@dataclass(frozen=True, slots=True)
class Result:
    """The token that a sequence drew. Not `is_sound`: its scores were not numbers."""

    sequence: Sequence
    token: int
    is_sound: bool
    logprobs: Logprobs | None


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that runs, or has run."""

    sequences: list[Sequence]  # those that draw a token
    drawn: Drawn | None

    def results(self) -> list[Result]:
        """Waits for the step to end."""
        if self.drawn is None:
            return []
        logprobs = told_logprobs(self.drawn, [sequence.sampling for sequence in self.sequences])
        columns = (self.sequences, self.drawn.tokens.tolist(), self.drawn.best.isfinite().tolist(), logprobs)
        return [Result(*row) for row in zip(*columns, strict=True)]


class Runner:
    """A model, its cache, and the rows of its slots."""

    def __init__(self, model: Llama, *, slots: int, blocks: int, block_size: int, context: int) -> None:
        self.model = model
        device = self._device = model.device
        width = -(-context // block_size) + 1
        self._tables = torch.zeros(slots, width, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self._last_tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._sampler = Sampler(slots, model.config.vocab_size, device)
        self._cache = PagedCache(
            model.config.layers,
            model.kv_heads,
            model.config.head_dim,
            blocks=blocks,
            block_size=block_size,
            like=torch.empty(0, dtype=model.dtype, device=device),
        )
        self._attention = attention_for(model.operations)
        self._album = None if model.vision is None else Album(model.vision)
        self._written = [0] * slots  # blocks in each row's table
        self._rows: tuple[list[Sequence], Rows] | None = None  # of the last step, most often those of the next

    def clear(self, blocks: list[int]) -> None:
        """Wipe blocks whose content is no good."""
        self._cache.clear(blocks)

    @torch.inference_mode()
    def launch(self, plan: list[Work]) -> Launched:
        """Compute every work of the plan. One of a sequence stands behind those of older steps."""
        self._write_rows(plan)
        decodes = sorted((work for work in plan if work.is_decode), key=_table_length)
        chunks = [work for work in plan if not work.is_decode]
        sampling = [*decodes, *(work for work in chunks if work.samples)]
        sequences = [work.sequence for work in sampling]
        rows = self._sampling_rows(sequences)

        tokens, positions, slots, pieces = [], [], [], []
        if decodes:
            decoding = rows.slots[: len(decodes)]
            tokens.append(self._last_tokens.index_select(0, decoding))
            positions.append(self._lengths.index_select(0, decoding))
            slots.append(decoding)
        at = len(decodes)
        ends = list(range(at))
        for work in chunks:
            slot = _slot(work.sequence)
            known = work.sequence.tokens[work.start : work.start + work.tokens]
            where = torch.arange(work.start, work.start + work.tokens, device=self._device)
            tokens.append(torch.tensor(known, device=self._device))
            positions.append(where)
            slots.append(torch.full_like(where, slot))
            pieces.append(Chunk(at, work.tokens, slot, work.start))
            self._lengths[slot] = work.start + work.tokens
            at += work.tokens
            if work.samples:
                ends.append(at - 1)
        widths = [_table_length(work) for work in decodes]
        step = Step(_joined(slots), _joined(positions), widths, pieces)
        hidden = self._forward(_joined(tokens), step, self._seen(chunks, len(decodes)))
        if decodes:
            self._lengths.index_copy_(0, slots[0], positions[0] + 1)
        if not sequences:
            return Launched([], None)
        if chunks:
            hidden = hidden[torch.tensor(ends, device=self._device)]
        masks = b"".join(each.constraint.mask() for each in sequences if each.constraint is not None)
        drawn = self._sampler.sample(self.model.logits(hidden), rows, masks)
        self._last_tokens.index_copy_(0, rows.slots, drawn.tokens)
        return Launched(sequences, drawn)

    def _seen(self, chunks: list[Work], at: int) -> Seen | None:
        """The pieces of pictures among the tokens of prompts, the first of which is in row `at` of the step."""
        rows: list[int] = []
        pieces: list[Tensor] = []
        for work in chunks:
            for picture in work.sequence.pictures:
                first = max(work.start, picture.start)
                last = min(work.start + work.tokens, picture.start + PICTURE_TOKENS)
                if self._album is not None and first < last:
                    rows += range(at + first - work.start, at + last - work.start)
                    pieces.append(self._album.look(picture)[first - picture.start : last - picture.start])
            at += work.tokens
        return (torch.tensor(rows, device=self._device), torch.cat(pieces)) if rows else None

    def _forward(self, tokens: Tensor, step: Step, seen: Seen | None) -> Tensor:
        attend = self._attention(self._cache, self._tables, step, self.model.heads // self.model.kv_heads)
        return self.model.hidden(tokens, step.positions, attend, seen)

    def _sampling_rows(self, sequences: list[Sequence]) -> Rows:
        if self._rows is None or self._rows[0] != sequences:
            slots = torch.tensor([_slot(sequence) for sequence in sequences], dtype=torch.int64, device=self._device)
            self._rows = (sequences, self._sampler.rows(sequences, slots))
        return self._rows[1]

    def _write_rows(self, plan: list[Work]) -> None:
        """Bring the rows of newcomers, and the tables of those that have grown, to the device."""
        for work in plan:
            sequence, slot = work.sequence, _slot(work.sequence)
            if work.is_new:
                self._written[slot] = 0
                self._tables[slot] = 0
                self._rows = None
                self._sampler.load(slot, sequence)
            held, written = len(sequence.blocks), self._written[slot]
            if held > written:
                self._tables[slot, written:held] = torch.tensor(sequence.blocks[written:], device=self._device)
                self._written[slot] = held


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None  # noqa: S101  for the type checker: whoever is planned has one
    return sequence.slot


def _table_length(work: Work) -> int:
    return len(work.sequence.blocks)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
