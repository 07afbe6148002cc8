"""The mean of the weights of several states of one training.

`python -m reference_backend.training.mean OUT DIR=SHARE ...` writes one; shares add up to 1. States along one way
differ by what their last steps happened to be about; their mean has forgotten less than any of them ("model soups",
arXiv 2203.05482).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from reference_backend.engine.config import VISION_FILE


def mean(out: Path, shares: dict[Path, float]) -> None:
    """Write a model directory with the mean of those of `shares`, which add up to 1; all else is the first one's."""
    shutil.copytree(next(iter(shares)), out, ignore=shutil.ignore_patterns("*.pt", "*.md"), dirs_exist_ok=True)
    for name in ("model.safetensors", VISION_FILE):
        states = [(load_file(directory / name), share) for directory, share in shares.items()]
        weights = {
            key: torch.stack([state[key].float() * share for state, share in states]).sum(dim=0).to(torch.bfloat16)
            for key in states[0][0]
        }
        save_file(weights, out / name, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="The mean of several states of one training.")
    parser.add_argument("out", type=Path)
    parser.add_argument("shares", nargs="+", metavar="DIR=SHARE")
    options = parser.parse_args()
    pairs = (each.rpartition("=") for each in options.shares)
    mean(options.out, {Path(directory): float(share) for directory, _, share in pairs})


if __name__ == "__main__":
    main()
