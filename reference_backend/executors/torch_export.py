"""Runs a program that `torch.export.save` wrote (model.pt2): the model's graph and weights, without its Python code.

Names of inputs are those of the exported forward's arguments; outputs are `output_0` and on. model.toml may give other
names, in the same order. The rows that one run may have are what the program was exported for (`torch.export.Dim`):
`max_batch` may not be more.

A program is of the torch that wrote it: an older one may refuse a newer one's. Export again then (training/shapes.py
shows how).
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from reference_backend.engine.config import ModelError
from reference_backend.executors import stacked
from reference_backend.executors.stacked import Program, first_line, spec_of
from reference_backend.tensors import DTYPES, Array, TensorSpec

DATATYPES = {getattr(torch, dtype.name): name for name, dtype in DTYPES.items() if hasattr(torch, dtype.name)}


def load(path: Path, threads: int) -> Program:
    """What the file of a program gives. Raises ModelError."""
    torch.set_num_threads(threads)
    program = load_program(path)
    nodes = list(program.graph.nodes)
    taken = [node for node in nodes if node.name in program.graph_signature.user_inputs]
    [given] = [node.args[0] for node in nodes if node.op == "output"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = program.module().to(device)

    def compute(arrays: Sequence[Array]) -> list[Array]:
        with torch.inference_mode():
            found = module(*(torch.tensor(array, device=device) for array in arrays))
        return [tensor.cpu().numpy() for tensor in ((found,) if isinstance(found, torch.Tensor) else found)]

    return Program(_specs(taken, path), _specs(given, path, "output"), compute)


opened = functools.partial(stacked.opened, load)


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
