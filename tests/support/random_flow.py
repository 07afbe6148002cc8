"""A text-to-image network of random weights, small enough for a test to paint with. Needs torch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from reference_backend.engine.flow import ARCHITECTURE, Flow, read_flow_config

CONFIG = {
    "architectures": [ARCHITECTURE],
    "side": 8,
    "patch": 2,
    "hidden_size": 16,
    "layers": 2,
    "heads": 2,
    "longest": 6,
    "words": ["big", "red", "circle", "centre"],
    "synonyms": {"large": "big", "center": "centre", "disc": "circle"},
}


def random_flow(directory: Path) -> Flow:
    """Writes a whole model directory, and gives its network."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    network = Flow(read_flow_config(directory / "config.json"))
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    save_file(network.state_dict(), directory / "model.safetensors")
    return network
