"""Attention over a paged cache: write what is new into its blocks, then look at all that came before.

Tokens of one step lie in one row of queries, sequence after sequence. They are looked at in groups of equally many
queries: sequences that generate (one query each) by rough length, so that a short one is not padded to a long one;
each chunk of a prompt by itself. Within a group the blocks of all sequences are gathered side by side, and one call
computes the lot; the query heads that share a key-value head are treated as further queries of that head, so that
keys are not repeated.

Padding is block 0, and what stands behind a position is masked: a token at position p sees the keys at positions <= p
of its own blocks, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from reference_backend.engine.config import ModelConfig

SHORT_BLOCKS = 16  # shorter tables are not told apart: another call costs more than their padding


class PagedCache:
    """Keys and values of all layers, in blocks: the first half of dimension 1 is keys, the second values."""

    def __init__(
        self, config: ModelConfig, blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.block_size = block_size
        shape = (config.layers, 2 * config.kv_heads, blocks, block_size, config.head_dim)
        # Zeroed rather than empty: masked garbage could be NaN, and zero times NaN is NaN. Pages are only
        # committed by the system once they are written.
        self._pages = torch.zeros(shape, device=device, dtype=dtype)
        self._layers = [layer.flatten(1, 2) for layer in self._pages]

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


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences with equally many queries each, one behind the other in the step from row `first` on."""

    first: int
    sequences: int
    queries: int
    table: Tensor  # [sequences * blocks]
    mask: Tensor  # [sequences, 1, queries * shared, keys], 0 or -inf

    @classmethod
    def of(
        cls, first: int, table: Tensor, positions: Tensor, block_size: int, shared: int, dtype: torch.dtype
    ) -> Group:
        """Sequences with tables [sequences, blocks] and queries at positions [sequences, queries].

        `shared` is the number of query heads to a key-value head.
        """
        sequences, queries = positions.shape
        keys = torch.arange(table.shape[1] * block_size, device=table.device)
        hidden = keys > positions[:, :, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=table.device).masked_fill_(hidden, -torch.inf)
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


def attend(
    cache: PagedCache, groups: list[Group], places: Tensor, layer: int, q: Tensor, keys_values: Tensor
) -> Tensor:
    """Write what is new, then look. [tokens, heads, head_dim] in, [tokens, heads * head_dim] out."""
    cache.write(layer, places, keys_values)
    results = [_look(cache, group, layer, q) for group in groups]
    return results[0] if len(results) == 1 else torch.cat(results)


def _look(cache: PagedCache, group: Group, layer: int, q: Tensor) -> Tensor:
    rows = q[group.first : group.first + group.sequences * group.queries]
    _, heads, head_dim = rows.shape
    pages = cache.gather(layer, group.table, group.sequences)
    keys, values = pages.chunk(2, dim=1)
    kv_heads = keys.shape[1]
    # [sequences, kv_heads, queries * shared, head_dim]
    grouped = rows.view(group.sequences, group.queries, kv_heads, -1, head_dim).transpose(1, 2).flatten(2, 3)
    seen = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask)
    shape = (group.sequences, kv_heads, group.queries, heads // kv_heads, head_dim)
    return seen.reshape(shape).transpose(1, 2).reshape(-1, heads * head_dim)
