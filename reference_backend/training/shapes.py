"""Makes the example models for tensors: two that tell which shape a picture of 32 x 32 pixels shows.

    python -m reference_backend.training.shapes --out examples/models

`shapes-mlp` becomes a torch.export program (for executor "torch_export"), `shapes-cnn` an ONNX file (for "onnx"), each
with its model.toml and a MODEL_CARD.md with its share of right answers on pictures whose like it has not seen. The
pictures are those for the model that sees (pictures.py), one shape each. Both take bytes and do the scaling inside, so
that nobody can forget it.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_backend.training.pictures import KINDS, SIDE, Painter

SEED = 1
PICTURES, EXAMINED = 6000, 1000
EPOCHS, BATCH = 12, 100
MOST_ROWS = 64  # of one run
TOML = """\
# Made by `python -m reference_backend.training.shapes`; MODEL_CARD.md says what it can.
kind = "tensor"
executor = "{executor}"
file = "{file}"
max_batch = {rows}

[[inputs]]
name = "pixels"  # RGB, row by row
datatype = "UINT8"
shape = [-1, {side}, {side}, 3]

[[outputs]]
name = "scores"  # of {kinds}
datatype = "FP32"
shape = [-1, {count}]
"""
CARD = """\
# {name}

Which shape a picture of {side} x {side} pixels shows: {kinds}. {parameters} parameters, trained in seconds by
`python -m reference_backend.training.shapes` (seed {seed}, {pictures} pictures, {epochs} epochs, torch {torch}).

Right on {right:.1%} of {examined} pictures with combinations of size, colour, shape and place that none of the
training has.
"""


class Mlp(nn.Module):
    """Sees a quarter of the pixels, in grey."""

    def __init__(self, inner: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(SIDE * SIDE // 4, inner),
            nn.ReLU(),
            nn.Linear(inner, inner // 2),
            nn.ReLU(),
            nn.Linear(inner // 2, len(KINDS)),
        )

    def features(self, pixels: Tensor) -> Tensor:
        grey = pixels.float().mean(-1)[:, None] / 255.0
        return functional.avg_pool2d(grey, 2).flatten(1)

    def forward(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.layers(self.features(pixels))
        return scores


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 16, len(KINDS)),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.layers(pixels.float().permute(0, 3, 1, 2) / 255.0)
        return scores


def pictures(count: int, *, training: bool) -> tuple[Tensor, Tensor]:
    """uint8 [count, 32, 32, 3], and the number of each one's shape in KINDS."""
    painter = Painter(random.Random(SEED), training=training)  # noqa: S311  no secret
    scenes = [painter.scene(1) for _ in range(count)]
    kinds = torch.tensor([KINDS.index(shape.kind) for [shape] in scenes])
    return torch.stack([painter.picture(scene) for scene in scenes]), kinds


def train(model: nn.Module, pixels: Tensor, kinds: Tensor, epochs: int = EPOCHS) -> None:
    """In place, from nothing or from where it is."""
    torch.manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    steps = epochs * len(pixels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(pixels[rows]), kinds[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def right(model: nn.Module, pixels: Tensor, kinds: Tensor) -> float:
    """The share of right answers."""
    with torch.inference_mode():
        return float((model(pixels).argmax(-1) == kinds).float().mean())


def export(model: nn.Module, path: Path) -> None:
    """A torch.export program or an ONNX file, by the suffix. Takes 1 to MOST_ROWS rows."""
    example = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("rows", min=1, max=MOST_ROWS)},)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:  # where in whose files it was made is nobody's business
        node.meta.pop("stack_trace", None)
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        return
    made = torch.onnx.export(program, (), input_names=["pixels"], output_names=["scores"], verbose=False)
    for node in made.model.graph:
        node.metadata_props.clear()
    made.save(path, external_data=False)


def write(name: str, executor: str, file: str, model: nn.Module, examined: tuple[Tensor, Tensor], out: Path) -> None:
    """One model as version 1 in a repository."""
    directory = out / name / "1"
    directory.mkdir(parents=True, exist_ok=True)
    export(model, directory / file)
    said = {
        "name": name, "executor": executor, "file": file, "rows": MOST_ROWS, "side": SIDE, "kinds": ", ".join(KINDS),
        "count": len(KINDS), "seed": SEED, "pictures": PICTURES, "epochs": EPOCHS, "torch": torch.__version__,
        "examined": len(examined[1]), "right": right(model, *examined),
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }  # fmt: skip
    (directory / "model.toml").write_text(TOML.format_map(said), encoding="utf-8")
    (directory / "MODEL_CARD.md").write_text(CARD.format_map(said), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the example models for tensors, examine and export them.")
    parser.add_argument("--out", type=Path, required=True, help="a model repository")
    options = parser.parse_args()
    torch.set_num_threads(1)
    learnt, examined = pictures(PICTURES, training=True), pictures(EXAMINED, training=False)
    for name, executor, file, kind in (
        ("shapes-mlp", "torch_export", "model.pt2", Mlp),
        ("shapes-cnn", "onnx", "model.onnx", Cnn),
    ):
        torch.manual_seed(SEED)
        model = kind()
        train(model, *learnt)
        write(name, executor, file, model, examined, options.out)


if __name__ == "__main__":
    main()
