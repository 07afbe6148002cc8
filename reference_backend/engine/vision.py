"""The eye of a model that takes pictures, and what it has seen lately.

A picture enters the model as `PICTURE_TOKENS` pieces in the places of as many tokens, and from there on is text like
any other: cached, cut into chunks and computed again with it. The weights lie in vision.safetensors beside those of the
text, so that whoever does not know of them can serve the text alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from reference_backend.engine.config import VISION_FILE, ModelError
from reference_backend.engine.request import PICTURE_SIDE, PICTURE_TOKENS

GRID = 4  # pieces in a row
CHANNELS = (3, 16, 32, 64)
REMEMBERED = 256  # pictures: 2 MB where a model has 512 numbers for a token


class Vision(nn.Module):
    """Four convolutions, and where a piece is, in two dimensions. Each piece stands for about 8 x 8 pixels.

    One matrix over the pixels of a piece (as Fuyu-8B has it) would need far more pictures to learn from: each shape
    anew for each place where it may lie.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        halving = [nn.Conv2d(few, more, 3, stride=2, padding=1) for few, more in pairwise(CHANNELS)]
        self.halving = nn.ModuleList(halving)
        self.piece = nn.Conv2d(CHANNELS[-1], hidden_size, 3, padding=1)
        self.row = nn.Parameter(torch.randn(GRID, hidden_size) * 0.1)
        self.column = nn.Parameter(torch.randn(GRID, hidden_size) * 0.1)

    def forward(self, pictures: Tensor) -> Tensor:
        """What stands for pictures, uint8 [pictures, 32, 32, 3], among the tokens: [pictures, 16, hidden]."""
        x = pictures.permute(0, 3, 1, 2).to(self.row.dtype) / 127.5 - 1.0
        for halving in self.halving:
            x = functional.gelu(halving(x))
        pieces = self.piece(x).flatten(2).transpose(1, 2)
        place = (self.row[:, None] + self.column).flatten(0, 1)
        return 0.15 * functional.rms_norm(pieces + place, pieces.shape[-1:])  # about as loud as a word


def load_vision(directory: Path, hidden_size: int) -> Vision | None:
    """The eye of a model directory, if it has one. Raises ModelError."""
    path = directory / VISION_FILE
    if not path.exists():
        return None
    vision = Vision(hidden_size)
    load_into(vision, path)
    return vision


def load_into(module: nn.Module, path: Path) -> None:
    """Give a module the weights of a file, in float32. Raises ModelError."""
    try:
        module.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be used: {error}") from error


def album(vision: Vision) -> Callable[[bytes], Tensor]:
    """Gives what stands for pixels, [PICTURE_TOKENS, hidden]; remembered: a conversation shows the same ones again."""

    @lru_cache(REMEMBERED)
    def look(pixels: bytes) -> Tensor:
        picture = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, PICTURE_SIDE, PICTURE_SIDE, 3)
        [pieces] = vision(picture.to(vision.row.device))
        assert len(pieces) == PICTURE_TOKENS  # noqa: S101  else it would overwrite text
        return cast("Tensor", pieces)

    return look
