"""Text to image: a transformer that says where the noise flows to, and the words that it understands.

A picture x and noise z are joined by a straight line, x_t = (1 - t) x + t z. The network is asked for the direction
z - x at any point of it; walking from noise against that direction ends at a picture (rectified flow, arXiv
2209.03003). The network is a diffusion transformer (DiT, arXiv 2212.09748): pieces of the picture and words are
tokens of one sequence, and the time and the words together scale and shift each layer.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from reference_backend.engine.config import Size, as_told, read_json
from reference_backend.engine.vision import load_into

ARCHITECTURE = "RectifiedFlow"


class FlowConfig(msgspec.Struct, frozen=True):
    """Sizes of the network: pictures of `side` pixels cut into pieces of `patch`. Word 0 is no word."""

    side: Size
    patch: Size
    hidden_size: Size
    layers: Size
    heads: Size
    longest: Size  # words
    words: tuple[str, ...]
    synonyms: dict[str, str]

    def __post_init__(self) -> None:
        if self.side % self.patch or self.hidden_size % (2 * self.heads):
            raise ValueError("side must be a multiple of patch, hidden_size one of twice heads")

    @property
    def pieces(self) -> int:
        return (self.side // self.patch) ** 2

    def understand(self, prompt: str) -> list[str]:
        """Those of a prompt's words that the network knows, as far as there is room, by the names that it knows."""
        found = (self.synonyms.get(word, word) for word in re.findall(r"[a-z]+", prompt.lower()))
        return [word for word in found if word in self.words][: self.longest]

    def numbers(self, words: list[str]) -> list[int]:
        """As `Flow` wants them, filled up with 0 there."""
        return [self.words.index(word) + 1 for word in words]


def read_flow_config(path: Path) -> FlowConfig:
    """Raises ModelError for a config.json that does not describe such a network."""
    return as_told(path, read_json(path), FlowConfig)


class Layer(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(size, elementwise_affine=False)
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.up = nn.Linear(size, 4 * size)
        self.down = nn.Linear(4 * size, size)
        self.modulation = nn.Linear(size, 6 * size)

    def forward(self, x: Tensor, about: Tensor) -> Tensor:
        """Tokens [batch, tokens, size], seen in the light of time and words [batch, size]."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(about)[:, None].chunk(6, dim=-1)
        qkv = self.qkv(self.norm(x) * (1 + scale) + shift)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.out(seen)
        inner = functional.gelu(self.up(self.norm(x) * (1 + scale2) + shift2))
        result: Tensor = x + gate2 * self.down(inner)
        return result


class Flow(nn.Module):
    """Pictures [batch, 3, side, side] from -1 to 1, times [batch] and words [batch, longest] in; directions out."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        size, patch = config.hidden_size, config.patch
        self.config = config
        self.piece = nn.Conv2d(3, size, patch, stride=patch)
        self.place = nn.Parameter(torch.randn(config.pieces, size))  # as loud as a piece, or it is not heard
        self.word = nn.Embedding(len(config.words) + 1, size)
        self.order = nn.Parameter(torch.randn(config.longest, size) * 0.3)
        self.time = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.layers = nn.ModuleList(Layer(size, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, 3 * patch * patch)
        for layer in self.layers:  # as in the paper: at first, each layer changes nothing
            nn.init.zeros_(layer.modulation.weight)
            nn.init.zeros_(layer.modulation.bias)
        nn.init.zeros_(self.head.weight)

    def forward(self, pictures: Tensor, times: Tensor, words: Tensor) -> Tensor:
        config = self.config
        pieces = self.piece(pictures).flatten(2).transpose(1, 2) + self.place
        said = self.word(words) + self.order
        about = functional.silu(self.time(self._waves(times)) + said.mean(dim=1))
        x = torch.cat([pieces, said], dim=1)
        for layer in self.layers:
            x = layer(x, about)
        out = self.head(self.norm(x[:, : config.pieces])).transpose(1, 2)
        return functional.fold(out, config.side, config.patch, stride=config.patch)

    def _waves(self, times: Tensor) -> Tensor:
        half = self.config.hidden_size // 2
        rates = torch.exp(torch.arange(half, device=times.device) * (-math.log(1000.0) / half)) * 100.0
        angles = times[:, None] * rates
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def load_flow(directory: Path, device: torch.device) -> Flow:
    """The network of a directory, ready to paint. Raises ModelError."""
    network = Flow(read_flow_config(directory / "config.json"))
    load_into(network, directory / "model.safetensors")
    return network.to(device)


def guided(network: Flow, pictures: Tensor, times: Tensor, words: Tensor, guidance: float) -> Tensor:
    """The direction with the words, taken further away from the one without (classifier-free guidance, 2207.12598)."""
    both = network(pictures.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([words, torch.zeros_like(words)]))
    said, unsaid = both.chunk(2)
    return unsaid + guidance * (said - unsaid)
