"""Carries a plan out on the device. The state of each running sequence lies there, in the row of its slot.

What a decoding step needs (its newest token, its length, its blocks, its settings) is already on the device: the
host sends which slots take part, and new block numbers when a sequence has grown into another block. The result of a
step is read when `Launched.results` is called, not before, so that the next step can be launched meanwhile. On a GPU a
stream of its own brings it to the host as soon as it is there, while the next step runs.

There is one row more than slots: that of nobody, with which prepared steps (`graphs.py`) are filled up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from reference_backend.engine.attention import Chunk, PagedCache, Step, attention_for
from reference_backend.engine.graphs import Prepare, Prepared, Taken, sent
from reference_backend.engine.model import Llama, Seen
from reference_backend.engine.operations import Fused
from reference_backend.engine.request import PICTURE_TOKENS, Logprobs, Sequence
from reference_backend.engine.sampler import Drawn, Rows, Sampler, told_logprobs
from reference_backend.engine.scheduler import Work
from reference_backend.engine.stowed import Stowed
from reference_backend.engine.vision import album


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that runs, or has run."""

    sequences: list[Sequence]  # those that draw a token
    drawn: Drawn | None
    arrived: torch.cuda.Event | None = None  # when what was drawn is on the host

    def results(self) -> list[tuple[Sequence, int, Logprobs | None]]:
        """Who drew which token; -1 where the scores were no numbers. Waits for the step to end."""
        if self.drawn is None:
            return []
        if self.arrived is not None:
            self.arrived.synchronize()
        logprobs = told_logprobs(self.drawn, [sequence.sampling for sequence in self.sequences])
        return list(zip(self.sequences, self.drawn.tokens.tolist(), logprobs, strict=True))


class Runner:
    """A model, its cache, and the rows of its slots."""

    def __init__(
        self, model: Llama, *, slots: int, blocks: int, block_size: int, context: int, prepare: Prepare | None = None
    ) -> None:
        self.model = model
        device = self._device = model.device
        width = -(-context // block_size) + 1
        self._tables = torch.zeros(slots + 1, width, dtype=torch.int64, device=device)
        self._tables[slots] = blocks  # nobody's
        self._lengths = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._last_tokens = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        has_kernel = isinstance(model.operations, Fused)
        self._sampler = Sampler(model.config.vocab_size, self._lengths, has_kernel=has_kernel)
        self._cache = PagedCache(
            model.config.layers,
            model.kv_heads,
            model.config.head_dim,
            blocks=blocks + 1,
            block_size=block_size,
            like=torch.empty(0, dtype=model.dtype, device=device),
        )
        self._attention = attention_for(model.operations)
        self._look = None if model.vision is None else album(model.vision)
        self._written = [0] * slots  # blocks in each row's table
        self._rows: tuple[list[Sequence], Rows] | None = None  # of the last step, most often those of the next
        self._slots, self._prepare = slots, prepare
        self._prepared = self._prepare_steps()
        self._stowed: Stowed | None = None
        self._homewards = torch.cuda.Stream() if device.type == "cuda" else None

    @torch.inference_mode()
    def _prepare_steps(self) -> Prepared | None:
        if self._prepare is None:
            return None
        return Prepared(self._decode, slots=self._slots, device=self._device, prepare=self._prepare)

    def sleep(self) -> None:
        """Free what lies on the device, but for the small. Weights on a CPU are where they would go already."""
        self._prepared = self._rows = None
        self._cache.free()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            self._stowed = Stowed(self.model.weights)
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Have it all again, as it was; the cache is empty."""
        if self._stowed is not None:
            self._stowed.bring_back()
            self._stowed = None
        self._cache.take()
        self._prepared = self._prepare_steps()

    @property
    def cache_bytes(self) -> int:
        """What keys and values take now."""
        return self._cache.bytes

    def clear(self, blocks: list[int]) -> None:
        """Wipe blocks whose content is no good."""
        self._cache.clear(blocks)

    @torch.inference_mode()
    def launch(self, plan: list[Work], catch_up: Callable[[], None] = lambda: None) -> Launched:
        """Compute every work of the plan. One of a sequence stands behind those of older steps.

        What a grammar allows depends on the token before. `catch_up` is to take note of those of older steps; it is
        called, if anybody needs it, while the device computes this one's scores.
        """
        self._write_rows(plan)
        decodes = sorted((work for work in plan if work.is_decode), key=_table_length)
        chunks = [work for work in plan if not work.is_decode]
        sequences = [work.sequence for work in (*decodes, *(work for work in chunks if work.samples))]
        rows = self._sampling_rows(sequences)
        if self._prepared is not None and not chunks:
            scores, tokens = self._prepared.take(rows.slots)
            drawn = Drawn(tokens.clone()) if rows.are_plain else None  # a clone: the next step writes over it
        else:
            hidden = self._step(decodes, chunks, rows.slots[: len(decodes)])
            if not sequences:
                return Launched([], None)
            scores, drawn = self.model.logits(hidden), None
        if drawn is None:
            if rows.constrained is not None:
                catch_up()
            masks = b"".join(each.constraint.mask() for each in sequences if each.constraint is not None)
            drawn = self._sampler.sample(scores, rows, masks)
            self._note(rows.slots, drawn.tokens)
        if self._homewards is None:
            return Launched(sequences, drawn)
        return Launched(sequences, *brought(drawn, self._homewards))

    def _decode(self, slots: Tensor) -> Taken:
        """Scores and the next token of each slot, computed from what lies on the device alone."""
        positions = self._lengths.index_select(0, slots)
        step = Step(slots, positions, [self._tables.shape[1]] * len(slots), [])
        hidden = self._forward(self._last_tokens.index_select(0, slots), step, None)
        self._lengths.index_copy_(0, slots, positions + 1)
        self._lengths[-1] = 0
        scores = self.model.logits(hidden)
        tokens = self._sampler.draw(scores, Rows(slots))
        self._note(slots, tokens)
        return scores, tokens

    def _note(self, slots: Tensor, tokens: Tensor) -> None:
        """The newest tokens. In place of none, for a sequence that will be told that it failed, stands any."""
        self._last_tokens.index_copy_(0, slots, tokens.clamp_min(0))

    def _step(self, decodes: list[Work], chunks: list[Work], decoding: Tensor) -> Tensor:
        """Hidden states of those that draw a token: first who generates, in the slots `decoding`, then prompts."""
        tokens = [self._last_tokens.index_select(0, decoding)]
        positions = [self._lengths.index_select(0, decoding)]
        slots, pieces = [decoding], []
        at = len(decodes)
        ends = list(range(at))
        for work in chunks:
            slot = _slot(work.sequence)
            known = work.sequence.tokens[work.start : work.start + work.tokens]
            where = torch.arange(work.start, work.start + work.tokens, device=self._device)
            tokens.append(self._ids(known))
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
        self._lengths.index_copy_(0, decoding, positions[0] + 1)
        return hidden[self._ids(ends)] if chunks else hidden

    def _seen(self, chunks: list[Work], at: int) -> Seen | None:
        """The pieces of pictures among the tokens of prompts, the first of which is in row `at` of the step."""
        rows: list[int] = []
        pieces: list[Tensor] = []
        for work in chunks:
            for picture in work.sequence.pictures:
                first = max(work.start, picture.start)
                last = min(work.start + work.tokens, picture.start + PICTURE_TOKENS)
                if self._look is not None and first < last:
                    rows += range(at + first - work.start, at + last - work.start)
                    pieces.append(self._look(picture.pixels)[first - picture.start : last - picture.start])
            at += work.tokens
        return (self._ids(rows), torch.cat(pieces)) if rows else None

    def _forward(self, tokens: Tensor, step: Step, seen: Seen | None) -> Tensor:
        attend = self._attention(self._cache, self._tables, step, self.model.heads // self.model.kv_heads)
        return self.model.hidden(tokens, step.positions, attend, seen)

    def _sampling_rows(self, sequences: list[Sequence]) -> Rows:
        if self._rows is None or self._rows[0] != sequences:
            slots = self._ids(_slot(sequence) for sequence in sequences)
            self._rows = (sequences, self._sampler.rows(sequences, slots))
        return self._rows[1]

    def _write_rows(self, plan: list[Work]) -> None:
        """Bring the rows of newcomers, and the tables of those that have grown, to the device."""
        grown: list[tuple[int, int, int]] = []
        for work in plan:
            sequence, slot = work.sequence, _slot(work.sequence)
            if work.is_new:
                self._written[slot] = 0
                self._tables[slot] = 0
                self._rows = None
                self._sampler.load(slot, sequence)
            written = self._written[slot]
            grown += ((slot, column, block) for column, block in enumerate(sequence.blocks[written:], start=written))
            self._written[slot] = len(sequence.blocks)
        if grown:
            slots, columns, blocks = (self._ids(column) for column in zip(*grown, strict=True))
            self._tables[slots, columns] = blocks

    def _ids(self, numbers: Iterable[int]) -> Tensor:
        return sent(numbers, torch.int64, self._device)


def brought(drawn: Drawn, stream: torch.cuda.Stream) -> tuple[Drawn, torch.cuda.Event]:
    """What was drawn, on its way to the host beside whatever runs next; and when it is there."""
    stream.wait_stream(torch.cuda.current_stream())
    arrived = torch.cuda.Event()
    with torch.cuda.stream(stream):
        for each in drawn:
            if each is not None:
                each.record_stream(stream)
        home = Drawn(*(None if each is None else each.to("cpu", non_blocking=True) for each in drawn))
        arrived.record(stream)
    return home, arrived


def _slot(sequence: Sequence) -> int:
    assert sequence.slot is not None  # noqa: S101  for the type checker: whoever is planned has one
    return sequence.slot


def _table_length(work: Work) -> int:
    return len(work.sequence.blocks)


def _joined(parts: list[Tensor]) -> Tensor:
    parts = [part for part in parts if len(part)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
