"""What a layer is made of, in three ways: torch's own operations, and those that each do the work of several.

`Plain` runs anywhere and is what the others are compared with. `Fused` runs on a GPU that Triton can write for,
`OnCpu` on a CPU that there is a C compiler for. Which of them a model gets is decided once, by
`operations_for`.

Matrices that are kept in eight bits have a scale for each output: y = (x W) * scale. With few rows of x a kernel widens
them on the way. With many, those in fp8 meet x in fp8, if the device multiplies that. Otherwise they are widened for
each product, which costs more time than it saves: on a CPU they save memory alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from reference_backend.engine.config import ModelConfig
from reference_backend.engine.native import Native, NativeError, in_panels, native
from reference_backend.engine.quant import narrow_product
from reference_backend.engine.ranks import Ranks

log = logging.getLogger(__name__)
MOST_ROWS = 128  # of x, for the kernel to take a product of eight bits: beyond, arithmetic is what costs


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W + b. The matrix is as `Operations.kept` gives it; one of eight bits has a scale [out]."""

    matrix: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rotary:
    """The positions of a step's tokens, and what they do to queries and keys."""

    table: Tensor  # [context, head_dim / 2], complex: the turn of each pair of dimensions
    turns: Tensor  # [tokens, 1, head_dim / 2]: of these tokens
    positions: Tensor  # [tokens]
    heads: int
    kv_heads: int
    epsilon: float
    root: Tensor  # of epsilon, where the positions are

    def split(self, qkv: Tensor, gains: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries, and keys with values, of [tokens, heads + 2 * kv_heads, head_dim]; turned in place.

        Heads that have gains [heads + kv_heads, head_dim] are normalised before.
        """
        rotated = qkv[:, : self.heads + self.kv_heads]
        if gains is not None:
            rotated.copy_(_over_norm(rotated, self.root) * gains)
        pairs = rotated.unflatten(-1, (-1, 2))
        if qkv.dtype == torch.float32:
            torch.view_as_complex(pairs).mul_(self.turns)
        else:
            pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * self.turns))
        return qkv[:, : self.heads], qkv[:, self.heads :]


class Operations(Protocol):
    """Rows are tokens; epsilons are those of the model."""

    ranks: Ranks

    def kept(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] as its products want it: [in, out], or in panels."""

    def rows(self, matrix: Tensor, ids: Tensor) -> Tensor:
        """Rows [ids, in] of a matrix that is kept so."""

    def norm(self, x: Tensor) -> Tensor:
        """X over its length; the root of the width is in the weights behind."""

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        """The product."""

    def onto(self, residual: Tensor, x: Tensor, linear: Linear) -> tuple[Tensor, Tensor]:
        """The residual plus the product, summed over all ranks; and its norm."""

    def silu_times(self, gate_up: Tensor) -> Tensor:
        """Gate and up side by side: silu of the gate, times up."""


class Plain:
    def __init__(self, config: ModelConfig, device: torch.device, ranks: Ranks) -> None:
        self.ranks = ranks
        self._root = torch.tensor(math.sqrt(config.norm_eps * config.hidden_size), device=device)

    def kept(self, matrix: Tensor) -> Tensor:
        return matrix.t().contiguous()  # torch is faster so with few rows

    def rows(self, matrix: Tensor, ids: Tensor) -> Tensor:
        return matrix.index_select(1, ids).t().contiguous()

    def norm(self, x: Tensor) -> Tensor:
        return _over_norm(x, self._root)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        if linear.scale is not None:
            y = (x @ linear.matrix.to(x.dtype)).mul_(linear.scale)
            return y if linear.bias is None else y.add_(linear.bias)
        return x @ linear.matrix if linear.bias is None else torch.addmm(linear.bias, x, linear.matrix)

    def onto(self, residual: Tensor, x: Tensor, linear: Linear) -> tuple[Tensor, Tensor]:
        if self.ranks.rank:  # the first one adds what must be added once
            total = self.linear(x, Linear(linear.matrix, None, linear.scale))
        else:
            total = self.added(residual, x, linear)
        self.ranks.add_up(total)
        return total, self.norm(total)

    def added(self, residual: Tensor, x: Tensor, linear: Linear) -> Tensor:
        """The product added to the residual."""
        if linear.scale is not None:
            return self.linear(x, linear).add_(residual)
        total = torch.addmm(residual, x, linear.matrix)
        return total if linear.bias is None else total.add_(linear.bias)

    def silu_times(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)


def _over_norm(x: Tensor, root: Tensor) -> Tensor:
    if x.dtype == torch.float32:  # to say so again costs a third more
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(root)
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x / norms.hypot_(root)).to(x.dtype)


class OnCpu(Plain):
    """Plain, but for what is written in C."""

    def __init__(self, config: ModelConfig, ranks: Ranks, native: Native) -> None:
        super().__init__(config, torch.device("cpu"), ranks)
        self.native = native
        self._epsilon = config.norm_eps * config.hidden_size

    def kept(self, matrix: Tensor) -> Tensor:
        panels = in_panels(matrix)
        return super().kept(matrix) if panels is None else panels

    def rows(self, matrix: Tensor, ids: Tensor) -> Tensor:
        return super().rows(matrix, ids) if matrix.dim() == 2 else self.native.rows(matrix, ids)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        if linear.matrix.dim() == 2:
            return super().linear(x, linear)
        return self.native.product(x, linear.matrix, linear.bias)

    def added(self, residual: Tensor, x: Tensor, linear: Linear) -> Tensor:
        if linear.matrix.dim() == 2:
            return super().added(residual, x, linear)
        total = self.native.product(x, linear.matrix, residual)
        return total if linear.bias is None else total.add_(linear.bias)

    def norm(self, x: Tensor) -> Tensor:
        return self.native.norm(x, self._epsilon)

    def silu_times(self, gate_up: Tensor) -> Tensor:
        return self.native.silu_times(gate_up)


class Fused:
    """The kernels. `few_rows` says up to how many rows theirs is the faster product of a matrix [in, out]."""

    def __init__(self, config: ModelConfig, ranks: Ranks) -> None:
        from reference_backend.engine import kernels  # noqa: PLC0415  Triton is only there where it is used

        self.ranks = ranks
        self.few_rows: dict[tuple[int, ...], int] = {}
        self._kernels = kernels
        self._epsilon = config.norm_eps * config.hidden_size
        self._has_fp8 = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)

    def kept(self, matrix: Tensor) -> Tensor:
        return matrix.contiguous().t()

    def rows(self, matrix: Tensor, ids: Tensor) -> Tensor:
        return matrix.t().index_select(0, ids)

    def norm(self, x: Tensor) -> Tensor:
        return self._kernels.norm(x, self._epsilon)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        if self._is_skinny(x, linear):
            return self._kernels.product(x, linear.matrix.t(), linear.scale, linear.bias)
        matrix = linear.matrix
        if linear.scale is not None and self._is_multiplied_narrow(matrix):
            y = narrow_product(*self._kernels.narrow(x), matrix, linear.scale, x.dtype)
            return y if linear.bias is None else y.add_(linear.bias)
        if linear.scale is not None:
            matrix = (matrix.to(x.dtype) * linear.scale).to(x.dtype)
        return x @ matrix if linear.bias is None else torch.addmm(linear.bias, x, matrix)

    def onto(self, residual: Tensor, x: Tensor, linear: Linear) -> tuple[Tensor, Tensor]:
        splits = 1
        if self.ranks.size == 1 and self._is_skinny(x, linear):
            splits = self._kernels.splits_for(linear.matrix.shape[1], linear.matrix.shape[0])
        if splits > 1:
            parts = self._kernels.product(x, linear.matrix.t(), linear.scale, None, splits=splits)
        else:
            parts = self.linear(x, Linear(linear.matrix, None, linear.scale))[None]
            self.ranks.add_up(parts)
        return self._kernels.add_and_norm(residual, parts, linear.bias, self._epsilon)

    def silu_times(self, gate_up: Tensor) -> Tensor:
        return self._kernels.silu_times(gate_up)

    def _is_skinny(self, x: Tensor, linear: Linear) -> bool:
        most = MOST_ROWS if linear.scale is not None else self.few_rows.get(tuple(linear.matrix.shape), 0)
        return x.shape[0] <= most

    def _is_multiplied_narrow(self, matrix: Tensor) -> bool:
        """What the device has products of eight bits for, and cuBLAS takes."""
        return self._has_fp8 and matrix.dtype == torch.float8_e4m3fn and not any(side % 16 for side in matrix.shape)

    def choose(self, linears: list[Linear], seconds: Callable[[Callable[[], Tensor]], float]) -> None:
        """Time both products of each shape with as many rows as there may be, and remember who won.

        `seconds` tells how long a call takes on the device.
        """
        for linear in {tuple(each.matrix.shape): each for each in linears if each.scale is None}.values():
            shape = tuple(linear.matrix.shape)
            for rows in (1, 4, 16, 64):
                x = torch.randn(rows, shape[0], dtype=linear.matrix.dtype, device=linear.matrix.device)
                ours = seconds(partial(self._kernels.product, x, linear.matrix.t(), None, None))
                if ours >= seconds(partial(torch.mm, x, linear.matrix)):
                    break
                self.few_rows[shape] = rows


def operations_for(config: ModelConfig, device: torch.device, dtype: torch.dtype, ranks: Ranks) -> Operations:
    """The faster ones that this device can run."""
    try:
        if device.type == "cuda":
            return Fused(config, ranks)
        if dtype == torch.float32:
            return OnCpu(config, ranks, native())
    except ImportError:
        pass  # a torch without Triton
    except NativeError as error:
        log.info("torch's own operations are used: %s", error)
    return Plain(config, device, ranks)
