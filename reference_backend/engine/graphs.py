"""Steps in which everybody generates, prepared once for each size of batch: on a GPU as CUDA graphs.

Such a step reads all that it needs from rows on the device: which slots take part (the one thing the host writes, and
only when others do), their newest tokens, their lengths, their blocks, how they draw. So it can be recorded once and
replayed for any sequences of any lengths, as one launch instead of hundreds, which ends with the tokens drawn. A batch
is filled up to the next prepared size with a slot that is nobody's, which has a block of its own to write into.

Without a GPU nothing is prepared, but the same step can be run as it is: that is how it is tested.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

# Scores [rows, vocabulary], and the token of each row.
Taken = tuple[Tensor, Tensor]
# Makes of a step that fills a batch something that repeats it.
Prepare = Callable[[Callable[[], Taken]], Callable[[], Taken]]
WARM_UPS = 2  # runs before recording: kernels are compiled and workspaces taken in them


def sizes_up_to(slots: int) -> list[int]:
    """Sizes of batches to prepare: each twice the one before, from 16 on by 16."""
    return sorted({size for size in (1, 2, 4, 8, *range(16, slots, 16)) if size < slots} | {slots})


class Prepared:
    """The steps of all sizes. `step` computes one for the slots that it is given."""

    def __init__(self, step: Callable[[Tensor], Taken], *, slots: int, device: torch.device, prepare: Prepare) -> None:
        self.nobody = slots  # the number of the slot that fills up
        self._slots = torch.full((slots,), self.nobody, dtype=torch.int64, device=device)
        self._written: Tensor | None = None
        self._sizes = sizes_up_to(slots)
        # The largest first: what it takes of the memory is enough for the others.
        self._steps = {size: prepare(partial(step, self._slots[:size])) for size in reversed(self._sizes)}

    def take(self, slots: Tensor) -> Taken:
        """Take the step for these slots. What it gives is good until the next one."""
        if self._written is not slots:  # most often the same sequences go on
            self._slots[: len(slots)] = slots
            self._slots[len(slots) :] = self.nobody
            self._written = slots
        size = self._sizes[bisect_left(self._sizes, len(slots))]
        scores, tokens = self._steps[size]()
        return scores[: len(slots)], tokens[: len(slots)]


def sent(numbers: Iterable[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on their way to the device. Nobody waits for a GPU to come to them."""
    is_gpu = device.type == "cuda"
    return torch.tensor([*numbers], dtype=dtype, pin_memory=is_gpu).to(device, non_blocking=is_gpu)


def recording() -> Prepare:
    """Prepares steps as CUDA graphs that share their memory: one at a time is replayed, in one stream."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()

    def prepare(step: Callable[[], Taken]) -> Callable[[], Taken]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            taken = step()

        def replay() -> Taken:
            graph.replay()
            return taken

        return replay

    return prepare
