"""A BERT encoder over packed texts: the tokens of a batch lie behind each other in one row, and nothing is padded.

All that mixes tokens is attention, which goes text by text; everything else is one matrix product for the whole batch.
So a batch of long and short texts costs what its tokens cost, and a text's embedding does not depend on who is beside
it (but for the order of sums).

Sources: BERT (arXiv 1810.04805); names of weights as Hugging Face's BertModel has them. Mean pooling and a length of
one as sentence-transformers/all-MiniLM-L6-v2 wants them (Sentence-BERT, arXiv 1908.10084).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from reference_backend.engine.config import ModelError, read_json
from reference_backend.engine.native import Native, NativeError, in_panels, native

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BertConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    def __post_init__(self) -> None:
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide hidden_size")


class Layer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_size = size // config.num_attention_heads
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.attention_norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.up = nn.Linear(size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, size)
        self.norm = nn.LayerNorm(size, config.layer_norm_eps)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        qkv = self.qkv(x).view(x.shape[0], 3, -1, self.head_size)
        x = self.attention_norm(x + self.out(torch.cat([_attend(text) for text in qkv.split(lengths)])))
        found: Tensor = self.norm(x + self.down(functional.gelu(self.up(x))))
        return found


def _attend(qkv: Tensor) -> Tensor:
    """Of one text: [tokens, 3, heads, size] to [tokens, heads * size]."""
    q, k, v = qkv.permute(1, 2, 0, 3)
    seen = functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    return seen.transpose(0, 1).flatten(1)


class Bert(nn.Module):
    """`forward` gives the hidden states of packed texts."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """States [tokens, hidden] of tokens [tokens], which are texts of so many tokens behind each other."""
        positions = torch.cat([torch.arange(length, device=tokens.device) for length in lengths])
        x = self.embedding_norm(self.words(tokens) + self.positions(positions) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, lengths)
        return x


class InC(nn.Module):
    """A linear layer whose product is written in C."""

    def __init__(self, panels: Tensor, bias: Tensor, native: Native) -> None:
        super().__init__()
        self.panels, self.bias, self.native = panels, bias, native

    def forward(self, x: Tensor) -> Tensor:
        return self.native.product(x, self.panels, self.bias)


def in_c(model: Bert) -> Bert:
    """The model, changed in place: what can be is computed in C where that can be had, and by torch elsewhere."""
    try:
        operations = native()
    except NativeError as error:
        log.info("torch's own products are used: %s", error)
        return model
    for layer in model.layers:
        for name, linear in layer.named_children():
            if isinstance(linear, nn.Linear) and (panels := in_panels(linear.weight)) is not None:
                setattr(layer, name, InC(panels, linear.bias, operations))
    return model


def mean_of_each(states: Tensor, lengths: list[int]) -> Tensor:
    """The mean state of each text, at a length of one: float32 [texts, hidden]."""
    means = torch.stack([text.mean(0) for text in states.float().split(lengths)])
    return functional.normalize(means, dim=-1)


def load_bert(directory: Path) -> Bert:
    """The encoder of a Hugging Face directory. Raises ModelError."""
    raw = read_json(directory / "config.json")
    if "BertModel" not in (raw.get("architectures") or []) or raw.get("hidden_act") != "gelu":
        raise ModelError(f"{directory / 'config.json'}: a BertModel with hidden_act gelu is expected")
    try:
        config = BertConfig(**{name: raw[name] for name in BertConfig.__dataclass_fields__})
        with torch.device("meta"):  # no weight is made twice
            model = Bert(config)
        weights = _renamed(read_weights(directory / "model.safetensors"), config.num_hidden_layers)
        model.load_state_dict(weights, assign=True)
    except KeyError as error:
        raise ModelError(f"{directory}: {error.args[0]} is missing in config.json or model.safetensors") from error
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{directory}: config.json and model.safetensors give no model: {reason}") from error
    return model.requires_grad_(requires_grad=False).eval()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in float32. Raises ModelError, also when some are no numbers."""
    try:
        weights = {name: weight.float() for name, weight in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    broken = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
    if broken:
        raise ModelError(f"{path}: {broken[0]} has weights that are no numbers")
    return weights


def _renamed(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Hugging Face's weights under the names above, queries, keys and values as one matrix. Raises KeyError."""
    embeddings = "embeddings."
    found = {
        "words.weight": weights[embeddings + "word_embeddings.weight"],
        "positions.weight": weights[embeddings + "position_embeddings.weight"],
        "types.weight": weights[embeddings + "token_type_embeddings.weight"],
    }
    parts = {
        "out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    }
    for kind in ("weight", "bias"):
        found[f"embedding_norm.{kind}"] = weights[f"{embeddings}LayerNorm.{kind}"]
        for index in range(layers):
            theirs = f"encoder.layer.{index}."
            qkv = [weights[f"{theirs}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            found[f"layers.{index}.qkv.{kind}"] = torch.cat(qkv)
            for ours, name in parts.items():
                found[f"layers.{index}.{ours}.{kind}"] = weights[f"{theirs}{name}.{kind}"]
    return found
