"""The pointwise kernels and the matrix product of few rows, in Triton. Imported only where they run.

On a GPU a step of few tokens reads every weight once and computes next to nothing, so what counts is how many bytes
are read and how many kernels are launched for it. Each function here is one launch for what the torch twin in
`operations.py` says in several; the twins are what the tests compare with.

Weights are kept as [out, in] with the inner dimension contiguous: a program of the product owns some rows of the weight
and reads them from end to end. Quantized weights are widened in registers, so that a product reads half the bytes.
Where there are fewer rows than the device has room for programs, the inner dimension is cut into splits, whose sums
are added by the kernel that follows anyway (the one that adds the residual and normalises).

The number of rows of x is never a constant of a kernel: nothing is compiled anew because a batch has another size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264  # two for each multiprocessor of an H200: fewer leave a part of its bandwidth unused
MOST_SPLITS = 8
BLOCK_N = 16  # rows of the weight to a program while there are few rows of x


@triton.jit
def _add_and_norm(
    residual, parts, bias, total, normed, rows, epsilon, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(residual + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    for part in range(PARTS):
        x += tl.load(parts + (part * rows + row) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS:
        tl.store(total + row * WIDTH + column, x.to(total.dtype.element_ty), mask=inside)
        x = x.to(total.dtype.element_ty).to(tl.float32)
    y = x / tl.sqrt(tl.sum(x * x, 0) + epsilon)
    tl.store(normed + row * WIDTH + column, y.to(normed.dtype.element_ty), mask=inside)


def norm(x: Tensor, epsilon: float) -> Tensor:
    """Rows of x [rows, width] over the root of their sum of squares plus epsilon."""
    normed = torch.empty_like(x)
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _add_and_norm[rows,](x, x, x, x, normed, rows, epsilon, width, 0, False, block)
    return normed


def add_and_norm(residual: Tensor, parts: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """The residual [rows, width] plus the sum of parts [splits, rows, width] plus the bias, and the norm of that."""
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    (rows, width), splits = residual.shape, parts.shape[0]
    given = residual if bias is None else bias
    block = triton.next_power_of_2(width)
    _add_and_norm[rows,](
        residual, parts, given, total, normed, rows, epsilon, width, splits, bias is not None, block
    )  # fmt: skip
    return total, normed


@triton.jit
def _rotate_and_store(
    qkv, gains, turns, positions, places, pages, head_stride, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HAS_GAINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    inside = pair < HALF
    row = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF
    even = tl.load(row + 2 * pair, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(row + 2 * pair + 1, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if HAS_GAINS:
            size = tl.sqrt(tl.sum(even * even + odd * odd, 0) + epsilon)
            gain = gains + head * 2 * HALF + 2 * pair
            even = even / size * tl.load(gain, mask=inside, other=0.0).to(tl.float32)
            odd = odd / size * tl.load(gain + 1, mask=inside, other=0.0).to(tl.float32)
        turn = turns + (tl.load(positions + token) * HALF + pair) * 2
        cosine = tl.load(turn, mask=inside, other=0.0)
        sine = tl.load(turn + 1, mask=inside, other=0.0)
        turned = even * cosine - odd * sine
        odd = even * sine + odd * cosine
        even = turned
    element = qkv.dtype.element_ty
    if head < HEADS:
        tl.store(row + 2 * pair, even.to(element), mask=inside)
        tl.store(row + 2 * pair + 1, odd.to(element), mask=inside)
    else:
        kept = pages + (head - HEADS).to(tl.int64) * head_stride + tl.load(places + token) * 2 * HALF
        tl.store(kept + 2 * pair, even.to(element), mask=inside)
        tl.store(kept + 2 * pair + 1, odd.to(element), mask=inside)


def rotate_and_store(
    qkv: Tensor, gains: Tensor | None, turns: Tensor, positions: Tensor, places: Tensor, pages: Tensor, epsilon: float
) -> None:
    """Normalise heads if they have gains [heads + kv_heads, head_dim], rotate queries in place, keep keys and values.

    qkv is [tokens, heads + 2 * kv_heads, head_dim], turns [context, head_dim / 2] complex, pages the layer's
    [2 * kv_heads, blocks, block_size, head_dim]; `places` are block * block_size + offset, one for each token.
    """
    tokens, all_heads, head_dim = qkv.shape
    kv_heads, half = pages.shape[0] // 2, head_dim // 2
    heads = all_heads - 2 * kv_heads
    _rotate_and_store[tokens, all_heads](
        qkv, qkv if gains is None else gains, torch.view_as_real(turns), positions, places, pages, pages.stride(0),
        epsilon, heads, kv_heads, half, gains is not None, triton.next_power_of_2(half),
    )  # fmt: skip


@triton.jit
def _silu_times(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


def silu_times(gate_up: Tensor) -> Tensor:
    """Gate and up side by side in [rows, 2 * width]: silu of the gate, times up."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    block = min(1024, triton.next_power_of_2(width))
    _silu_times[rows, triton.cdiv(width, block)](gate_up, out, width, block)
    return out


@triton.jit
def _narrow(x, out, scales, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    wide = tl.load(x + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), 0) / 448.0, 1e-30)  # e4m3's largest number; a row of zeros stays one
    tl.store(out + row * WIDTH + column, (wide / scale).to(out.dtype.element_ty), mask=column < WIDTH)
    tl.store(scales + row, scale)


def narrow(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [rows, width] in float8_e4m3fn, and the scales [rows] in float32 that give them back."""
    rows, width = x.shape
    out, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(rows, dtype=torch.float32)
    _narrow[rows,](x, out, scales, width, triton.next_power_of_2(width))
    return out, scales


@triton.jit
def _product(
    x, weight, scale, bias, out, rows, COLUMNS: tl.constexpr, INNER: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    SHARE: tl.constexpr = ((INNER + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)) * BLOCK_K
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, SHARE, BLOCK_K):
        k = split * SHARE + start + tl.arange(0, BLOCK_K)
        wide = tl.load(
            x + m[:, None].to(tl.int64) * INNER + k[None], mask=(m[:, None] < rows) & (k[None] < INNER), other=0.0
        )
        kept = tl.load(
            weight + n[None].to(tl.int64) * INNER + k[:, None],
            mask=(n[None] < COLUMNS) & (k[:, None] < INNER), other=0.0,
        )  # fmt: skip
        total = tl.dot(wide, kept.to(wide.dtype), total, input_precision="ieee")
    if HAS_SCALE:
        total *= tl.load(scale + n, mask=n < COLUMNS, other=0.0)[None]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < COLUMNS, other=0.0)[None].to(tl.float32)
    place = out + (split * rows + m[:, None].to(tl.int64)) * COLUMNS + n[None]
    tl.store(place, total.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None] < COLUMNS))


def splits_for(columns: int, inner: int) -> int:
    """How many splits of the inner dimension give the device enough programs, each with something to do."""
    splits = 1
    while splits < MOST_SPLITS and splits * triton.cdiv(columns, BLOCK_N) < PROGRAMS and inner >= 512 * splits:
        splits *= 2
    return splits


def product(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, *, splits: int = 1
) -> Tensor:  # fmt: skip
    """[rows, out] = x [rows, in] times the weight [out, in] transposed, times the scale [out], plus the bias.

    The weight is of x's type, int8 or float8_e4m3fn. With splits (and no bias) the sums of each split come back as
    [splits, rows, out] in float32.
    """
    (rows, inner), columns = x.shape, weight.shape[0]
    out = x.new_empty(rows, columns) if splits == 1 else x.new_empty(splits, rows, columns, dtype=torch.float32)
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    # With more rows of x each is read by fewer programs, and the tiles stay within the shared memory.
    block_n = max(BLOCK_N, block_m // 2)
    block_k = min(256 if block_m == 16 else 128, max(16, triton.next_power_of_2(inner)))
    grid = (triton.cdiv(columns, block_n), triton.cdiv(rows, block_m), splits)
    _product[grid](
        x, weight, x if scale is None else scale, x if bias is None else bias, out, rows, columns, inner,
        scale is not None, bias is not None, splits, block_m, block_n, block_k, num_stages=4 if block_m == 16 else 3,
    )  # fmt: skip
    return out
