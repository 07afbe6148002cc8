"""Text to image by a rectified flow (engine/flow.py): takes `prompt` and `seed`, gives `image`.

Pictures are batched by step, as tokens of language models are: each turn takes one step of Euler's method of all that
are being painted (`max_batch` of model.toml), however far each has come. Whoever comes joins at the next turn, and
nobody waits for a batch to end. Where more wait than have room, their order is that of admission.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reference_backend.admission import FairQueue
from reference_backend.batcher import AGE_SECONDS
from reference_backend.engine.config import ModelError
from reference_backend.engine.flow import Flow, guided, load_flow
from reference_backend.repository import Card
from reference_backend.tensors import ANYHOW, Array, BadTensor, Tensors, TensorSpec, Terms

STEPS = 20  # from noise to picture
GUIDANCE = 2.0
LONGEST_PROMPT = 1000  # bytes
CPU_THREADS = 1  # the network is so small that a second one costs more in waiting than it gives in arithmetic


@dataclass(slots=True, eq=False)
class Painting:
    words: list[int]
    picture: Tensor  # [3, side, side], from -1 to 1 at the end
    tenant: str
    priority: int
    arrival: int
    arrived_at: float
    steps: int = 0
    done: asyncio.Future[Array] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Studio:
    """Paintings that wait and those that are being painted."""

    inputs: Sequence[TensorSpec] = (TensorSpec("prompt", "BYTES", (-1,)), TensorSpec("seed", "INT64", (-1,)))

    def __init__(self, network: Flow, at_once: int) -> None:
        side = network.config.side
        self.outputs: Sequence[TensorSpec] = (TensorSpec("image", "UINT8", (-1, side, side, 3)),)
        self.painted: list[Painting] = []
        self._network = network
        self._at_once = at_once
        self._waiting: FairQueue[Painting] = FairQueue(AGE_SECONDS)
        self._arrivals = itertools.count()
        self._wanted = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Studio {len(self.painted)} of {self._at_once} being painted, {len(self._waiting)} waiting>"

    async def infer(self, inputs: Tensors, terms: Terms = ANYHOW) -> Tensors:
        """A picture for each prompt and seed. Raises BadTensor."""
        prompts, seeds = inputs["prompt"].tolist(), inputs["seed"].tolist()
        if len(prompts) != len(seeds):
            raise BadTensor(f"there are {len(prompts)} of `prompt` and {len(seeds)} of `seed`; each needs its own")
        whose = terms.tenant, terms.priority
        now = asyncio.get_running_loop().time()
        asked = [
            Painting(self._words(prompt), self._noise(seed), *whose, next(self._arrivals), now)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        for painting in asked:
            self._waiting.push(painting)
        self._wanted.set()
        try:
            painted = [await painting.done for painting in asked]
        finally:
            for painting in asked:
                painting.done.cancel()
                if painting in self._waiting:
                    self._waiting.remove(painting)
        return {"image": np.stack(painted) if painted else np.zeros((0, *self.outputs[0].shape[1:]), np.uint8)}

    async def paint(self) -> None:
        """Take turns for ever."""
        while True:
            self._begin()
            if self.painted:
                await asyncio.to_thread(self._turn)
                self._hand_out()
            else:
                self._wanted.clear()
                await self._wanted.wait()

    def _begin(self) -> None:
        """Have as many painted as there is room for, of those whose turn it is."""
        now = asyncio.get_running_loop().time()
        while len(self.painted) < self._at_once and (painting := self._waiting.head(now)) is not None:
            self._waiting.remove(painting)
            self._waiting.charge(painting.tenant, read=1)
            self.painted.append(painting)

    def _words(self, prompt: bytes) -> list[int]:
        config = self._network.config
        try:
            words = config.understand(prompt.decode()) if len(prompt) <= LONGEST_PROMPT else None
        except UnicodeDecodeError as error:
            raise BadTensor("`prompt` is not UTF-8") from error
        if words is None:
            raise BadTensor(f"`prompt` has more than {LONGEST_PROMPT} bytes")
        if not words:
            raise BadTensor(f"`prompt` has no word that this model knows; it knows {', '.join(config.words)}")
        return config.numbers(words) + [0] * (config.longest - len(words))

    def _noise(self, seed: int) -> Tensor:
        side = self._network.config.side
        return torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))

    @torch.inference_mode()
    def _turn(self) -> None:
        """One step of each picture, from where it is."""
        device = self._network.place.device
        times = torch.tensor([1 - painting.steps / STEPS for painting in self.painted], device=device)
        words = torch.tensor([painting.words for painting in self.painted], device=device)
        pictures = torch.stack([painting.picture.to(device) for painting in self.painted])
        moved = pictures - guided(self._network, pictures, times, words, GUIDANCE) / STEPS
        for painting, picture in zip(self.painted, moved, strict=True):
            painting.picture = picture
            painting.steps += 1

    def _hand_out(self) -> None:
        for painting in self.painted:
            if painting.steps == STEPS and not painting.done.done():
                pixels = ((painting.picture.permute(1, 2, 0) + 1.0) * 127.5).round().clamp(0, 255)
                painting.done.set_result(pixels.to("cpu", torch.uint8).numpy())
        self.painted = [painting for painting in self.painted if not painting.done.done()]


@contextlib.asynccontextmanager
async def opened(directory: Path, card: Card) -> AsyncIterator[Studio]:
    """The studio of a model directory, when it has painted once. Raises ModelError."""
    torch.set_num_threads(CPU_THREADS)
    network = load_flow(directory, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    studio = Studio(network, card.max_batch)
    if not all(parameter.isfinite().all() for parameter in network.parameters()):
        raise ModelError(f"{directory}: its weights are not finite")
    painting = asyncio.ensure_future(studio.paint())
    try:
        warm = {"prompt": np.array([network.config.words[0].encode()], object), "seed": np.array([0])}
        await studio.infer(warm)
        yield studio
    finally:
        painting.cancel()
        await asyncio.wait([painting])
