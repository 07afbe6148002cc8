"""Train the text-to-image model: `python -m reference_backend.training.train_t2i`.

Everything follows from SEED and the number of steps; each step draws its pictures from a seed of its own, so that a
run that was stopped goes on from its checkpoint. Weights that are kept are the running mean of those of the last
steps, which draw cleaner edges than any of them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from reference_backend.engine.flow import ARCHITECTURE, Flow, read_flow_config
from reference_backend.training.muon import Muon
from reference_backend.training.pictures import COLOURS, KINDS, SIZES, Painter, Scene

SEED = 20_272
PICTURES = 48  # of a step
PEAK_RATE, PEAK_MUON_RATE, WARM_UP_STEPS = 2e-3, 0.01, 40
MEAN_OF = 60  # steps, about
UNTOLD, UNSAID = 0.1, 0.1  # how often nothing is said of a picture, or nothing of one trait
CHECKPOINT_STEPS = 50
CONFIG = {
    "architectures": [ARCHITECTURE],
    "side": 32,
    "patch": 4,
    "hidden_size": 96,
    "layers": 3,
    "heads": 3,
    "longest": 6,
    "words": [*SIZES, *COLOURS, *KINDS, "top", "bottom", "left", "right", "centre"],
    "synonyms": {
        "center": "centre", "middle": "centre", "large": "big", "huge": "big", "little": "small", "tiny": "small",
        "disc": "circle", "disk": "circle", "plus": "cross", "upper": "top", "lower": "bottom", "circles": "circle",
        "squares": "square", "triangles": "triangle", "crosses": "cross",
    },
}  # fmt: skip


class Run:
    """A training as far as it has come."""

    def __init__(self, directory: Path, steps: int) -> None:
        torch.manual_seed(SEED)
        self.directory, self.steps = directory, steps
        self.config = read_flow_config(directory / "config.json")
        self.network, self.mean = Flow(self.config), Flow(self.config)
        self.mean.load_state_dict(self.network.state_dict())
        self.losses: list[float] = []
        self.seconds = 0.0
        named = dict(self.network.named_parameters())
        matrices = [p for name, p in named.items() if p.dim() == 2 and "layers" in name and "modulation" not in name]
        others = [p for p in named.values() if all(p is not matrix for matrix in matrices)]
        adam = {"params": others, "peak": PEAK_RATE}
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, PEAK_MUON_RATE),
            torch.optim.AdamW([adam], lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self) -> float:
        """One step. Returns its loss: the mean squared error of the direction."""
        number = len(self.losses)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(number, self.steps)
        pictures, words = self._drawn(random.Random(f"{SEED} {number}"))  # noqa: S311
        chance = torch.Generator().manual_seed(SEED + number)
        noise = torch.randn(pictures.shape, generator=chance)
        times = torch.randn(PICTURES, generator=chance).sigmoid()  # the middle of the way is the hardest
        t = times[:, None, None, None]
        directions = self.network((1 - t) * pictures + t * noise, times, words)
        loss = (directions - (noise - pictures)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        kept = min(1 - 1 / MEAN_OF, (number + 1) / (number + 10))
        with torch.no_grad():
            for mean, now in zip(self.mean.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(now, 1 - kept)
        self.losses.append(loss.item())
        return self.losses[-1]

    def _drawn(self, rng: random.Random) -> tuple[Tensor, Tensor]:
        painter = Painter(rng, training=True)
        scenes = [painter.scene(1) for _ in range(PICTURES)]
        pixels = torch.stack([painter.picture(scene) for scene in scenes])
        said = ["" if rng.random() < UNTOLD else told(scene, rng) for scene in scenes]
        numbers = [self.config.numbers(self.config.understand(each)) for each in said]
        words = torch.tensor([each + [0] * (self.config.longest - len(each)) for each in numbers])
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0, words

    def save(self, checkpoint: Path) -> None:
        """All that the run needs to go on, and the weights as they are so far."""
        parts = [self.network.state_dict(), self.mean.state_dict(), *(o.state_dict() for o in self.optimizers)]
        torch.save([parts, self.losses, self.seconds], checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").rename(checkpoint)
        weights = {name: value.to(torch.bfloat16).contiguous() for name, value in self.mean.state_dict().items()}
        save_file(weights, self.directory / "model.safetensors", metadata={"format": "pt"})

    def resume(self, checkpoint: Path) -> None:
        parts, self.losses, self.seconds = torch.load(checkpoint)
        for part, state in zip([self.network, self.mean, *self.optimizers], parts, strict=True):
            part.load_state_dict(state)


def told(scene: Scene, rng: random.Random) -> str:
    """What is said of the shape; now and then its size or its place is left out, so that both may be."""
    (shape,) = scene
    size = "" if rng.random() < UNSAID else shape.size
    place = "" if rng.random() < UNSAID else shape.place
    return f"{size} {shape.colour} {shape.kind} {place}"


def schedule(step: int, steps: int) -> float:
    """The share of the peak rate: up, level, and down over the last third."""
    warm_up = min(WARM_UP_STEPS, steps // 4)
    if step < warm_up:
        return (step + 1) / warm_up
    return min(1.0, 0.02 + 3 * 0.98 * (1 - step / steps))


def train(out: Path, steps: int) -> Run:
    """Train, from the last checkpoint if there is one, and leave a complete model directory behind."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    run, checkpoint = Run(out, steps), out / "checkpoint.pt"
    if checkpoint.exists():
        run.resume(checkpoint)
    while len(run.losses) < steps:
        started = time.perf_counter()
        run.step()
        run.seconds += time.perf_counter() - started
        if len(run.losses) % CHECKPOINT_STEPS == 0 or len(run.losses) == steps:
            run.save(checkpoint)
        if len(run.losses) % 10 == 0:
            recent = sum(run.losses[-10:]) / 10
            print(f"step {len(run.losses)} loss {recent:.4f} seconds {run.seconds:.0f}", flush=True)  # noqa: T201
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the text-to-image model from nothing.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    train(options.out, options.steps)


if __name__ == "__main__":
    main()
