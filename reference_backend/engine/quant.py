"""Weights in eight bits: each row of a matrix on a scale of its own, activations left as they are.

Where weights are what is read (a few tokens at a time), half the bytes is nearly half the time, if a kernel widens them
on the way. Where arithmetic is what costs (prompts), fp8 multiplies twice as fast, if activations are in eight bits as
well: each row of them gets a scale of its own, at each product. Only the matrices of the layers are narrowed:
embeddings and the head decide between tokens that are nearly as likely, and cost one part in a dozen of a large model.

Source: LLM.int8() (arXiv 2208.07339) for scales per row; FP8 formats (2209.05433) for e4m3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from reference_backend.engine.config import Narrow

_LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}

ROWS = ScalingType.RowWise  # of each factor, that is: a scale for each row of x and for each output


def narrow_product(x: Tensor, scales: Tensor, matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """X [rows, in] times a matrix [in, out], both in fp8, with scales [rows] and [out]: sums are wider."""
    return scaled_mm(x, matrix, scales[:, None], ROWS, scale[None], ROWS, output_dtype=dtype, use_fast_accum=True)


def narrowed(matrix: Tensor, kind: Narrow) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] in eight bits, and the scales [out] in float32 that give it back."""
    matrix = matrix.float()
    scale = matrix.abs().amax(dim=1) / _LARGEST[kind]
    scale = scale.clamp_min_(torch.finfo(torch.float32).tiny)  # a row of zeros stays one
    scaled = matrix / scale[:, None]
    if kind == "int8":
        return scaled.round_().to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn), scale
