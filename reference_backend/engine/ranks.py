"""Several processes that hold a part of one model each, and what they say to each other within a layer.

Every rank runs the same engine on the same requests and draws the same tokens: only sums and scores cross between
them. A rank that is gone makes the next sum fail on the others, which ends them, too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed

PATIENCE = timedelta(seconds=60)  # for a sum that another rank has not come to


@dataclass(frozen=True, slots=True)
class Ranks:
    """The place of this process among `size` of them."""

    rank: int = 0
    size: int = 1

    def share(self, whole: int) -> slice:
        """Which part of a dimension is this rank's."""
        part = -(-whole // self.size)
        return slice(self.rank * part, (self.rank + 1) * part)

    def add_up(self, part: Tensor) -> None:
        """Make it the sum over all ranks, in place; the same to the last bit on each."""
        if self.size > 1:
            distributed.all_reduce(part)

    def side_by_side(self, part: Tensor) -> Tensor:
        """The last dimensions of all ranks, which are equal, one behind the other."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        distributed.all_gather(parts, part)
        return torch.cat(parts, dim=-1)

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of all ranks' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor(number, device=device)
        distributed.all_reduce(found, distributed.ReduceOp.MIN)
        return int(found)


ALONE = Ranks()


def joined(rank: int, size: int, meeting: Path, device: torch.device) -> Ranks:
    """Meet the others at a file that all can see and nobody has used before. Waits for the last of them.

    Raises RuntimeError when they do not come.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine, whatever its name resolves to
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, f"file://{meeting}", timeout=PATIENCE, rank=rank, world_size=size)
    return Ranks(rank, size)
