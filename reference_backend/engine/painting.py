"""Many pictures and one network: each turn takes one step of all that are being painted, however far each has come.

It is asked and told as `Engine` is: a sequence's prompt is the words, by number, and its seed is the noise to begin
with. What comes of it is one `Delta` with the pixels. Who waits goes next as there: by class, fairness, arrival.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from reference_backend.admission import FairQueue
from reference_backend.engine.engine import SEEDS
from reference_backend.engine.flow import Flow, guided
from reference_backend.engine.request import Delta, Load, Published, Sequence

STEPS = 20  # of Euler's method, from noise to picture
GUIDANCE = 2.0
AGE_SECONDS = 10.0  # a request that waits rises by a class each time


@dataclass(slots=True, eq=False)
class Painting:
    sequence: Sequence
    picture: Tensor  # [3, side, side], from -1 to 1 at the end
    steps: int = 0


class Studio:
    """Hand in with `submit`, take back with `abort`, and take a `turn` while it is busy."""

    def __init__(self, network: Flow, *, slots: int, rng: Random) -> None:
        self.context = network.config.longest
        self._network, self._slots, self._rng = network, slots, rng
        self._device = network.place.device
        self._queue: FairQueue[Sequence] = FairQueue(AGE_SECONDS)
        self._arrived: list[Sequence] = []
        self._painted: list[Painting] = []
        self._arrivals = 0

    def __repr__(self) -> str:
        return f"<Studio {len(self._painted)} of {self._slots} being painted, {len(self._queue)} waiting>"

    @property
    def is_busy(self) -> bool:
        return bool(self._arrived or self._painted or len(self._queue))

    def load(self) -> Load:
        """The current counts. There is no cache to fill."""
        return Load(running=len(self._painted), waiting=len(self._arrived) + len(self._queue), kv_usage=0.0)

    def submit(self, sequence: Sequence) -> None:
        """Hand in words, at most `context` of them."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        seed = sequence.sampling.seed
        sequence.seed = self._rng.randrange(SEEDS) if seed is None else seed
        self._arrived.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Stop before the next step. Harmless for one that has finished."""
        sequence.aborted = True

    def took(self, seconds: float) -> None:
        """All turns take about as long."""

    @torch.inference_mode()
    def turn(self, now: float) -> Published:
        """Take one step of every picture."""
        for sequence in self._arrived:
            sequence.arrived_at = now
            self._queue.push(sequence)
        self._arrived.clear()
        late = self._drop(now)
        while len(self._painted) < self._slots and (head := self._queue.head(now)) is not None:
            self._queue.remove(head)
            self._queue.charge(head.tenant, generated=STEPS)
            self._painted.append(Painting(head, self._noise(head.seed)))
        if not self._painted:
            return late
        self._step()
        done = [painting for painting in self._painted if painting.steps == STEPS]
        self._painted = [painting for painting in self._painted if painting.steps < STEPS]
        return late + [(painting.sequence, _finished(painting.picture)) for painting in done]

    def _drop(self, now: float) -> Published:
        """Take out what was aborted or is late. Only the late ones are told."""

        def is_dropped(sequence: Sequence) -> bool:
            return sequence.aborted or sequence.is_late(now)

        waiting = [sequence for sequence in self._queue if is_dropped(sequence)]
        for sequence in waiting:
            self._queue.remove(sequence)
        running = [painting.sequence for painting in self._painted if is_dropped(painting.sequence)]
        self._painted = [painting for painting in self._painted if not is_dropped(painting.sequence)]
        return [(sequence, Delta(None, "deadline")) for sequence in waiting + running if not sequence.aborted]

    def _noise(self, seed: int) -> Tensor:
        side = self._network.config.side
        return torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed)).to(self._device)

    def _step(self) -> None:
        """One step of Euler's method, of each picture from where it is."""
        config = self._network.config
        words = [each.sequence.prompt + [0] * (config.longest - len(each.sequence.prompt)) for each in self._painted]
        times = torch.tensor([1 - each.steps / STEPS for each in self._painted], device=self._device)
        pictures = torch.stack([each.picture for each in self._painted])
        moved = (
            pictures
            - guided(self._network, pictures, times, torch.tensor(words, device=self._device), GUIDANCE) / STEPS
        )
        for painting, picture in zip(self._painted, moved, strict=True):
            painting.picture = picture
            painting.steps += 1


def _finished(picture: Tensor) -> Delta:
    """A picture as pixels, or the news that it is none."""
    if not picture.isfinite().all():
        return Delta(None, "failed")
    pixels = ((picture.permute(1, 2, 0) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Delta(None, "stop", pixels=bytes(pixels.flatten().tolist()))
