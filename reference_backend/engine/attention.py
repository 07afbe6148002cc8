"""Attention over a paged cache: write what is new into its blocks, then look at all that came before.

Tokens of one step lie in one row of queries, sequence after sequence: first those of sequences that generate, one each,
then chunks of prompts. There are three ways to look, which give the same:

- `gathered`, in torch's own operations, and what the other is compared with. Sequences that generate are grouped by
  rough length, so that a short one is not padded to a long one; each chunk of a prompt is a group. Within a group the
  blocks of all sequences are gathered side by side, and one call computes the lot; the query heads that share a
  key-value head are treated as further queries of that head, so that keys are not repeated.
- `in_c`, in which those that generate follow their tables by themselves (`native.c`), as short pieces of prompts do.
- `fused`, in the kernels of `paged_kernels.py`, which follow the tables themselves.

Padding is block 0, and what stands behind a position is masked: a token at position p sees the keys at positions <= p
of its own blocks, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from mmap import MAP_PRIVATE, mmap
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from reference_backend.engine.graphs import sent
from reference_backend.engine.native import Native
from reference_backend.engine.operations import Fused, OnCpu, Operations, Rotary

# Layer, what its projection gives as [tokens, heads + 2 * kv_heads, head_dim] (and may be overwritten), the gains of
# its heads, positions; what was seen comes back as [tokens, heads * head_dim].
Attend = Callable[[int, Tensor, Tensor | None, Rotary], Tensor]
SHORT_BLOCKS = 16  # shorter tables are not told apart: another call costs more than their padding
LITTLE_WORK = 1 << 21  # multiplications for a piece of a prompt: then C is done before a group is gathered
ROWS = 64  # queries and the heads that share a key, to a program that reads prompts
PROGRAMS, MOST_SPLITS, KEYS_EACH = 264, 32, 128  # two for each multiprocessor of an H200; keys worth a split


class Chunk(NamedTuple):
    """A piece of a prompt: rows from `first` on, positions from `start` on."""

    first: int
    tokens: int
    slot: int
    start: int


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens of a step: where each belongs, and what the host knows of it."""

    slots: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    widths: list[int]  # blocks of each sequence that generates, ascending
    chunks: list[Chunk]


class PagedCache:
    """Keys and values of all layers, in blocks: the first half of dimension 1 is keys, the second values."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, *, blocks: int, block_size: int, like: Tensor
    ) -> None:
        self.block_size = block_size
        self._shape = (layers, 2 * kv_heads, blocks, block_size, head_dim)
        self._pages = like
        self._numbers = torch.arange(0, device=like.device)
        self._shown, self._hidden = like.new_tensor(0.0), like.new_tensor(-torch.inf)
        self.take()

    def take(self) -> None:
        """Take the memory that it needs."""
        # Zeroed rather than empty: masked garbage could be NaN, and zero times NaN is NaN.
        self._pages = _zeros(self._shape, self._pages)
        self._layers = [layer.flatten(1, 2) for layer in self._pages]

    def free(self) -> None:
        """Give the memory back, with all that is in it, until `take`."""
        self._pages, self._layers = self._pages.new_empty(0), []

    @property
    def row(self) -> int:
        """Numbers in the keys of a token, in one layer."""
        return self._shape[1] // 2 * self._shape[-1]

    @property
    def bytes(self) -> int:
        """What it takes now, once all of it has been used."""
        return self._pages.untyped_storage().nbytes()

    def layer(self, layer: int) -> Tensor:
        """[2 * kv_heads, blocks, block_size, head_dim]: a head's part of a block is in one piece."""
        return self._pages[layer]

    def places(self, tables: Tensor, step: Step) -> Tensor:
        """Where the keys and values of a step's tokens belong: block * block_size + offset."""
        size = self.block_size
        return (step.positions % size).add_(tables[step.slots, step.positions // size], alpha=size)

    def mask(self, positions: Tensor, keys: int) -> Tensor:
        """[*positions, keys]: 0 for the keys up to each position, -inf for others."""
        if len(self._numbers) < keys:
            self._numbers = torch.arange(keys, device=positions.device)
        return torch.where(self._numbers[:keys] > positions[..., None], self._hidden, self._shown)

    def write(self, layer: int, places: Tensor, keys_values: Tensor) -> None:
        """Put [tokens, 2 * kv_heads, head_dim] where the tokens belong: block * block_size + offset."""
        self._layers[layer].index_copy_(1, places, keys_values.transpose(0, 1))

    def gather(self, layer: int, table: Tensor, sequences: int) -> Tensor:
        """[sequences, 2 * kv_heads, tokens, head_dim] of blocks [sequences * blocks]."""
        pages = self._pages[layer].index_select(1, table)
        return pages.view(pages.shape[0], sequences, -1, pages.shape[-1]).transpose(0, 1)

    def clear(self, blocks: list[int]) -> None:
        """Make zero again what must not be met by whoever gets these blocks next."""
        self._pages[:, :, blocks] = 0


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """On a CPU each page takes memory when it is first written: torch would write them all. Raises MemoryError."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    try:
        memory = mmap(-1, math.prod(shape) * like.itemsize, flags=MAP_PRIVATE)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no {math.prod(shape) * like.itemsize:,} bytes for keys and values: {error}") from error
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences with equally many queries each, one behind the other in the step from row `first` on."""

    first: int
    sequences: int
    queries: int
    table: Tensor  # [sequences * blocks]
    mask: Tensor  # [sequences, 1, queries * shared, keys], 0 or -inf

    @classmethod
    def of(cls, cache: PagedCache, first: int, table: Tensor, positions: Tensor, shared: int) -> Group:
        """Sequences with tables [sequences, blocks] and queries at positions [sequences, queries].

        `shared` is the number of query heads to a key-value head.
        """
        sequences, queries = positions.shape
        mask = cache.mask(positions, table.shape[1] * cache.block_size)
        if queries > 1:
            mask = mask[:, :, None].expand(-1, -1, shared, -1).flatten(1, 2)
        return cls(first, sequences, queries, table.flatten(), mask[:, None])


def by_length(blocks: list[int]) -> list[tuple[int, int]]:
    """Cut tables of ascending length into runs [start, end) in which none is padded to more than twice its length."""
    runs: list[tuple[int, int]] = []
    start = 0
    for place, length in enumerate(blocks):
        if length > max(SHORT_BLOCKS, 2 * blocks[start]):
            runs.append((start, place))
            start = place
    return [*runs, (start, len(blocks))] if blocks else []


def gathered(cache: PagedCache, tables: Tensor, step: Step, shared: int) -> Attend:
    """Attention for one step, over tables [slots, blocks]. `shared` is the query heads to a key-value head."""
    places = cache.places(tables, step)
    groups = [
        Group.of(
            cache,
            start,
            tables[:, : step.widths[end - 1]].index_select(0, step.slots[start:end]),
            step.positions[start:end, None],
            shared,
        )
        for start, end in by_length(step.widths)
    ]
    groups += _prompts(cache, tables, step, shared)

    def attend(layer: int, qkv: Tensor, gains: Tensor | None, rotary: Rotary) -> Tensor:
        q, keys_values = rotary.split(qkv, gains)
        cache.write(layer, places, keys_values)
        results = [_look(cache, group, layer, q) for group in groups]
        return results[0] if len(results) == 1 else torch.cat(results)

    return attend


def _prompts(cache: PagedCache, tables: Tensor, step: Step, shared: int) -> list[Group]:
    """Each piece of a prompt as a group."""
    return [
        Group.of(
            cache,
            first,
            tables[slot : slot + 1, : -(-(start + tokens) // cache.block_size)],
            step.positions[None, first : first + tokens],
            shared,
        )
        for first, tokens, slot, start in step.chunks
    ]


def in_c(native: Native, cache: PagedCache, tables: Tensor, step: Step, shared: int) -> Attend:
    """The same, where only long pieces of prompts are gathered."""
    work = max((chunk.tokens * (chunk.start + chunk.tokens) for chunk in step.chunks), default=0)
    is_little = work * shared * cache.row <= LITTLE_WORK
    groups = [] if is_little else _prompts(cache, tables, step, shared)
    looking = len(step.slots) if is_little else len(step.widths)

    def attend(layer: int, qkv: Tensor, gains: Tensor | None, rotary: Rotary) -> Tensor:
        seen = native.attend(
            qkv, gains, rotary.table, rotary.positions, cache.layer(layer), tables, step.slots,
            generating=looking, heads=rotary.heads, epsilon=rotary.epsilon,
        )  # fmt: skip
        for group in groups:
            seen[group.first : group.first + group.queries] = _look(cache, group, layer, qkv[:, : rotary.heads])
        return seen

    return attend


def fused(cache: PagedCache, tables: Tensor, step: Step, shared: int) -> Attend:
    """The same by kernels. What it takes from the host while a step is captured does not change with lengths."""
    from reference_backend.engine import kernels, paged_kernels  # noqa: PLC0415  Triton is only there where it is used

    places = cache.places(tables, step)
    kv_heads, device = cache.layer(0).shape[0] // 2, step.slots.device
    generating = len(step.widths)
    firsts = torch.arange(generating, device=device)
    ones = torch.ones_like(firsts)
    splits = _splits(generating * kv_heads, tables.shape[1] * cache.block_size)
    most = max(1, ROWS // shared)  # queries to a program
    runs = [
        (chunk.first + at, min(most, chunk.tokens - at)) for chunk in step.chunks for at in range(0, chunk.tokens, most)
    ]
    run_firsts, run_counts = (
        (sent(column, torch.int64, device) for column in zip(*runs, strict=True)) if runs else (None, None)
    )

    def attend(layer: int, qkv: Tensor, gains: Tensor | None, rotary: Rotary) -> Tensor:
        pages = cache.layer(layer)
        kernels.rotate_and_store(qkv, gains, rotary.table, rotary.positions, places, pages, rotary.epsilon)
        q = qkv[:, : rotary.heads]
        seen = q.new_empty(q.shape[0], rotary.heads * q.shape[2])
        where = (pages, tables, step.slots, step.positions)
        if generating:
            mine = slice(0, generating)
            paged_kernels.paged_attention(q[mine], *where, firsts, ones, seen[mine], most_queries=1, splits=splits)
        if runs:
            paged_kernels.paged_attention(q, *where, run_firsts, run_counts, seen, most_queries=most)
        return seen

    return attend


def _splits(programs: int, keys: int) -> int:
    """A power of two that gives the device enough programs, as far as there are keys for them."""
    splits = 1
    while splits < MOST_SPLITS and splits * programs < PROGRAMS and splits * KEYS_EACH < keys:
        splits *= 2
    return splits


def attention_for(operations: Operations) -> Callable[[PagedCache, Tensor, Step, int], Attend]:
    """The way to look that goes with the other operations."""
    if isinstance(operations, OnCpu):
        return partial(in_c, operations.native)
    return fused if isinstance(operations, Fused) else gathered


def _look(cache: PagedCache, group: Group, layer: int, q: Tensor) -> Tensor:
    rows = q[group.first : group.first + group.sequences * group.queries]
    _, heads, head_dim = rows.shape
    keys, values = cache.gather(layer, group.table, group.sequences).chunk(2, dim=1)
    shape = (group.sequences, group.queries, keys.shape[1], -1, head_dim)
    # [sequences, kv_heads, queries * shared, head_dim]
    one_each = group.queries == 1  # then nothing has to change places
    grouped = rows.view(shape[0], *shape[2:]) if one_each else rows.view(shape).transpose(1, 2).flatten(2, 3)
    seen = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask)
    if not one_each:
        seen = seen.reshape(shape[0], shape[2], shape[1], -1, head_dim).transpose(1, 2)
    return seen.reshape(-1, heads * head_dim)
