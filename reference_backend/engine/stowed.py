"""Weights while a model sleeps: in the memory of the host, pinned where they come from a GPU, to be back at its speed.

The tensors stay what they are. Only the memory under them goes and comes back, so that whatever shares it (a tied head,
a transposed matrix) shares it still, and nobody who holds a tensor has to hear of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Stowed:
    """What lay under these tensors, which must not be read until `bring_back`."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = {storage.data_ptr(): storage for storage in (each.untyped_storage() for each in tensors)}
        self._kept = [(storage, _copied(storage)) for storage in storages.values()]
        for storage, _ in self._kept:
            storage.resize_(0)

    def bring_back(self) -> None:
        """Raises RuntimeError where there is no room any more."""
        for storage, copy in self._kept:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)


def _copied(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    is_far = storage.device.type != "cpu"
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=is_far).untyped_storage()
    copy.copy_(storage)
    return copy
