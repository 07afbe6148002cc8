"""Runs a program that `torch.export.save` wrote (model.pt2): the model's graph and weights, without its Python code.

Names of inputs are those of the exported forward's arguments; outputs are `output_0` and on. model.toml may give other
names, in the same order. The rows that one run may have are what the program was exported for (`torch.export.Dim`):
`max_batch` may not be more.

A program is of the torch that wrote it: an older one may refuse a newer one's. Export again then (training/shapes.py
shows how).
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import torch

from reference_backend.engine.config import ModelError
from reference_backend.executors.stacked import (
    Compute,
    Settings,
    Stacked,
    checked_specs,
    file_of,
    first_line,
    read_settings,
    spec_of,
)
from reference_backend.repository import Card
from reference_backend.tensors import TensorSpec

DATATYPES = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}


@contextlib.asynccontextmanager
async def opened(directory: Path, card: Card) -> AsyncIterator[Stacked]:
    """The model in the card's file. Raises ModelError."""
    settings = read_settings(directory, card, Settings)
    path = file_of(directory, card)
    program = load_program(path)
    torch.set_num_threads(settings.threads)
    nodes = list(program.graph.nodes)
    taken = [node for node in nodes if node.name in program.graph_signature.user_inputs]
    inputs = checked_specs(card.inputs, _specs(taken, path), "inputs", path)
    [given] = [node.args[0] for node in nodes if node.op == "output"]
    outputs = checked_specs(card.outputs, _specs(given, path, "output"), "outputs", path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = program.module().to(device)
    async with Stacked(_compute(module, inputs, outputs, device), inputs, outputs, card, settings).running() as model:
        yield model


def load_program(path: Path) -> Any:
    """The program in a file. Raises ModelError."""
    if not zipfile.is_zipfile(path):  # torch would tell in pages
        raise ModelError(f"{path}: cannot be read as a torch.export program: it is no archive, or cut off")
    try:
        return torch.export.load(path)
    except Exception as error:  # broken files raise whatever the part that trips over them raises
        raise ModelError(f"{path}: cannot be read as a torch.export program: {first_line(error)}") from error


def _specs(nodes: Iterable[Any], path: Path, prefix: str = "") -> list[TensorSpec]:
    specs = []
    for index, node in enumerate(nodes):
        value = getattr(node, "meta", {}).get("val")
        if not isinstance(value, torch.Tensor):
            raise ModelError(f"{path}: the program takes or gives something that is no tensor")
        name = f"{prefix}_{index}" if prefix else node.name
        specs.append(spec_of(name, DATATYPES.get(value.dtype), value.shape, path))
    return specs


def _compute(
    module: torch.nn.Module, inputs: list[TensorSpec], outputs: list[TensorSpec], device: torch.device
) -> Compute:
    def compute(tensors: Any) -> dict[str, Any]:
        with torch.inference_mode():
            found = module(*(torch.tensor(tensors[spec.name], device=device) for spec in inputs))
        found = (found,) if isinstance(found, torch.Tensor) else found
        return {spec.name: tensor.cpu().numpy() for spec, tensor in zip(outputs, found, strict=True)}

    return compute
