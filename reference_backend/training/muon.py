"""Muon: momentum whose update to a matrix is made orthogonal, so that every direction is learnt at the same pace.

torch.optim.Muon does the same in bfloat16, which processors without such instructions emulate at a thirtieth of the
speed: half of a training step went there. In float32 it costs next to nothing at these sizes.
Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the same constants.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM, WEIGHT_DECAY = 0.95, 0.01
COEFFICIENTS, ROUNDS = (3.4445, -4.775, 2.0315), 5


class Muon(torch.optim.Optimizer):
    """For matrices only. A parameter group's `lr` is how far a step goes."""

    def __init__(self, matrices: Iterable[Tensor], rate: float) -> None:
        super().__init__([{"params": list(matrices), "peak": rate}], {"lr": rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move each matrix by its orthogonal update."""
        del closure
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
                rows, columns = matrix.shape
                matrix.mul_(1 - group["lr"] * WEIGHT_DECAY)
                matrix.sub_(update, alpha=group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V of the matrix's U S V, by a Newton-Schulz iteration: singular values end between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x
