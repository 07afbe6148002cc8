"""Attention over a paged cache in Triton: prompts and decoding, one kernel and a small one that joins splits.

A program owns a run of queries of one sequence, at consecutive positions, for one key-value head and all query heads
that share it; so every key is read once for all of them. It walks the keys through the sequence's table, with the
softmax kept as running maximum and sum. Where its queries and keys are follows from what lies on the device (slot and
position of each token, the tables), nothing from the host: a captured launch is right whatever the lengths are by then.

With few sequences the keys are cut into splits, each a program of its own, so that the whole device reads; `_join`
weighs their results. Splits that have no keys return at once.

Sources: FlashAttention-2 (arXiv 2307.08691) for the online softmax, Flash-Decoding (Dao et al., 2023) for the splits,
PagedAttention (2309.06180) for the tables.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _look(
    q, pages, tables, slots, positions, firsts, counts, out, sizes, q_stride, head_stride, table_stride, tokens, scale,
    PAGE: tl.constexpr, SHARED: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    kv_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first, count = tl.load(firsts + tl.program_id(0)), tl.load(counts + tl.program_id(0))
    table = tables + tl.load(slots + first) * table_stride
    position = tl.load(positions + first)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query, is_dim = m // SHARED, d < HEAD_DIM
    row = (first + query) * (KV_HEADS * SHARED) + kv_head * SHARED + m % SHARED  # of [tokens * heads]
    is_row = query < count
    from_q = (first + query)[:, None] * q_stride + (kv_head * SHARED + m % SHARED)[:, None] * HEAD_DIM + d[None]
    queries = tl.load(q + from_q, mask=is_row[:, None] & is_dim[None], other=0.0)

    keys = position + count  # the last query sees that many
    share = tl.cdiv(tl.cdiv(keys, BLOCK_N), SPLITS) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, keys)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    seen = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_key = n < end
        place = (tl.load(table + n // PAGE, mask=is_key, other=0) * PAGE + n % PAGE) * HEAD_DIM
        key_page = pages + kv_head * head_stride
        key = tl.load(key_page + place[None] + d[:, None], mask=is_key[None] & is_dim[:, None], other=0.0)
        scores = tl.dot(queries, key, input_precision="ieee") * scale
        scores = tl.where(is_key[None] & (n[None] <= position + query[:, None]), scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(larger == -float("inf"), 0.0, larger)  # a row that has seen no key yet
        likely, fading = tl.exp2(scores - base[:, None]), tl.exp2(largest - base)
        value_page = pages + (KV_HEADS + kv_head) * head_stride
        value = tl.load(value_page + place[:, None] + d[None], mask=is_key[:, None] & is_dim[None], other=0.0)
        seen = seen * fading[:, None] + tl.dot(likely.to(value.dtype), value, input_precision="ieee")
        weight = weight * fading + tl.sum(likely, 1)
        largest = larger
    weight = tl.where(weight == 0.0, 1.0, weight)  # a split without keys: its share will be 2 ** -inf
    seen = seen / weight[:, None]
    place = (split * tokens * KV_HEADS * SHARED + row).to(tl.int64)
    stored = out + place[:, None] * HEAD_DIM + d[None]
    tl.store(stored, seen.to(out.dtype.element_ty), mask=is_row[:, None] & is_dim[None])
    if SPLITS > 1:
        tl.store(sizes + place, largest + tl.log2(weight), mask=is_row)


@triton.jit
def _join(parts, sizes, out, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    size = tl.load(sizes + split * rows + row)
    share = tl.exp2(size - tl.max(size, 0))
    share = share / tl.sum(share, 0)
    place = (split[:, None] * rows + row) * HEAD_DIM + d[None]
    # A split without keys has nothing written that could be weighed: its share is 0, and 0 times anything must be 0.
    part = tl.load(parts + place, mask=(share > 0.0)[:, None] & (d < HEAD_DIM)[None], other=0.0)
    seen = tl.sum(part * share[:, None], 0)
    tl.store(out + row * HEAD_DIM + d, seen.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def paged_attention(
    q: Tensor, pages: Tensor, tables: Tensor, slots: Tensor, positions: Tensor, firsts: Tensor, counts: Tensor,
    out: Tensor, *, most_queries: int, splits: int = 1,
) -> None:  # fmt: skip
    """Queries q [tokens, heads, head_dim] (rows may lie apart) look at the keys of their own sequence, into `out`.

    `pages` is one layer's [2 * kv_heads, blocks, block_size, head_dim]: keys, then values. `tables` [slots, blocks]
    says which blocks a slot has; `slots` and `positions` [tokens] where each token belongs. Runs of up to
    `most_queries` tokens at consecutive positions begin at rows `firsts`, each with `counts` of them; all other rows of
    out [tokens, heads * head_dim] are left alone. `splits` is a power of two; with more than one, every row has a run.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, _, page, _ = pages.shape
    kv_heads //= 2
    shared = heads // kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m = max(16, triton.next_power_of_2(most_queries * shared))
    block_n = 32 if block_d > 128 else 64
    parts, sizes = out, out
    if splits > 1:
        parts = torch.empty(splits, tokens, heads, head_dim, dtype=torch.float32, device=q.device)
        sizes = torch.empty(splits, tokens, heads, dtype=torch.float32, device=q.device)
    _look[firsts.shape[0], kv_heads, splits](
        q, pages, tables, slots, positions, firsts, counts, parts, sizes, q.stride(0), pages.stride(0),
        tables.stride(0), tokens, math.log2(math.e) / math.sqrt(head_dim), page, shared, kv_heads, head_dim, block_d,
        block_m, block_n, splits,
    )  # fmt: skip
    if splits > 1:
        _join[tokens * heads,](parts, sizes, out, tokens * heads, head_dim, block_d, splits)
