"""A decoder-only transformer of the Llama family, read from a local Hugging Face directory.

One class covers three published architectures, because they differ in two switches only: Qwen2 adds a bias to the
query, key and value projections, Qwen3 normalises queries and keys per head. Modules carry the names that the
checkpoints use, so that loading is `load_state_dict` and nothing else.

Invariants:
- A cached run gives the logits of a run over the whole text: a token at position p sees the keys at positions <= p
  of its own slot, and nothing else, however many other sequences share the step.
- Rows of a `KeyValueCache` are never cleared: a slot is reused by writing from position 0 on, and what lies behind
  the current position is masked.

Sources: Llama 2 (arXiv 2307.09288) for the block, RoFormer (2104.09864) for rotary positions, GQA (2305.13245),
and the `llama3` frequency scaling as published with Llama 3.1.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class ModelError(Exception):
    """A model directory that cannot be served. The message says which file, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The `llama3` scaling: long wavelengths are stretched by `factor`, short ones kept, the band between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What config.json says, reduced to what the forward pass needs."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key-value heads")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")


def read_config(directory: Path) -> ModelConfig:
    """Read config.json. Raises ModelError for what this server cannot run, before any weight is read."""
    raw = read_json(directory / "config.json")
    try:
        return _config(raw)
    except KeyError as error:
        raise ModelError(f"{directory / 'config.json'}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"{directory / 'config.json'}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelError with the file's name for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; --model takes a directory as Hugging Face lays it out") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is expected")
    return value


def _config(raw: dict[str, Any]) -> ModelConfig:
    architecture = (raw.get("architectures") or ["none named"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if raw.get("quantization_config"):
        raise ValueError("quantized weights are not supported; use the unquantized checkpoint")
    if raw.get("use_sliding_window"):
        raise ValueError("sliding-window attention is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']} is not supported; supported: silu")
    # Newer files keep theta and scaling together under rope_parameters.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(raw["intermediate_size"]),
        layers=int(raw["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // max(heads, 1)),
        context=int(raw["max_position_embeddings"]),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(rope),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied=bool(raw.get("tie_word_embeddings", False)),
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind} is not supported; supported: default, llama3")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_context=int(rope["original_max_position_embeddings"]),
    )


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position for each pair of dimensions."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = blend.clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


class KeyValueCache:
    """Keys and values of up to `slots` sequences of up to `context` tokens, one row per slot and layer."""

    def __init__(self, config: ModelConfig, slots: int, context: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.layers, slots, context, config.kv_heads, config.head_dim)
        # Zeroed rather than empty: masked garbage could be NaN, and zero times NaN is NaN. Pages are only
        # committed by the system once they are written.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass over a cache: where its tokens stand, and what each of them may see."""

    cache: KeyValueCache
    slots: Tensor  # [batch]
    positions: Tensor  # [batch, tokens]
    span: int  # keys to look at: the longest sequence of the batch
    mask: Tensor  # [batch, 1, tokens, span]

    @classmethod
    def at(cls, cache: KeyValueCache, slots: Tensor, positions: Tensor) -> Step:
        """Plan a pass that writes at `positions` of `slots`."""
        span = int(positions.max()) + 1
        mask = torch.arange(span, device=positions.device) <= positions[:, None, :, None]
        return cls(cache, slots, positions, span, mask)

    def exchange(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write this pass's keys and values, and give back all that the pass may see."""
        rows = self.slots[:, None]
        self.cache.keys[layer, rows, self.positions] = keys
        self.cache.values[layer, rows, self.positions] = values
        return self.cache.keys[layer, self.slots, : self.span], self.cache.values[layer, self.slots, : self.span]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of each head by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm: nn.Module = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm: nn.Module = RMSNorm(config.head_dim, config.norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step | None) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, tokens, -1, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(batch, tokens, -1, self.head_dim))
        v = self.v_proj(x).view(batch, tokens, -1, self.head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if step is not None:
            k, v = step.exchange(self.layer, k, v)
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if step is None else step.mask,
            is_causal=step is None,
            enable_gqa=True,
        )
        result: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
        return result


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, step: Step | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, step)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Llama(nn.Module):
    """`forward` gives the final hidden states, `logits` turns those that matter into scores over the vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.frequencies = rope_frequencies(config)

    def forward(self, tokens: Tensor, step: Step | None = None) -> Tensor:
        """Hidden states [batch, tokens, hidden]; without a step, a plain causal pass from position 0."""
        x = self.model.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None] if step is None else step.positions
        angles = positions[:, :, None, None].float() * self.frequencies.to(tokens.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin, step)
        result: Tensor = self.model.norm(x)
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores in float32, whatever the weights are kept in."""
        result: Tensor = self.lm_head(hidden).float()
        return result


def load_model(directory: Path, device: torch.device) -> Llama:
    """The model of a directory, ready to run: float32 on a CPU, bfloat16 elsewhere. Raises ModelError."""
    config = read_config(directory)
    with torch.device("meta"):
        model = Llama(config)
    weights = _read_weights(directory)
    if config.tied:
        weights["lm_head.weight"] = weights.get("model.embed_tokens.weight", torch.empty(0))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in weights:
            raise ModelError(
                f"{directory}: weight {name} is missing; config.json and the weights do not belong together"
            )
        if weights[name].shape != shape:
            raise ModelError(f"{directory}: weight {name} is {[*weights[name].shape]}, config.json asks {[*shape]}")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model.load_state_dict({name: weights[name].to(device, dtype) for name in expected}, assign=True)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(requires_grad=False)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in _weight_files(directory):
        try:
            weights.update(load_file(path))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error
    return weights


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ModelError(f"{directory}: neither model.safetensors nor model.safetensors.index.json is there")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{index}: weight_map is missing or is not a map from weight to file name")
    names = sorted(set(shards.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{index}: {outside[0]} is not a file name in the same directory")
    return [directory / name for name in names]
