"""What config.json says of a model, judged before any weight is read. Nothing here needs torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

VISION_FILE = "vision.safetensors"  # beside the weights of a model that takes pictures, too
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

Narrow = Literal["int8", "fp8"]  # what weights can be narrowed to, once they are read
NARROW: tuple[Narrow, ...] = get_args(Narrow)


TOO_LARGE = 2**63  # for any size that torch is told


class ModelError(Exception):
    """A model directory that cannot be served. The message says which file, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The `llama3` scaling: long wavelengths are stretched by `factor`, short ones kept, the band between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        sizes = (self.factor, self.high_freq_factor, self.original_context)
        if not all(0 < size < TOO_LARGE for size in sizes) or not 0 <= self.low_freq_factor < self.high_freq_factor:
            raise ValueError("rope scaling needs positive numbers, and low_freq_factor below high_freq_factor")


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
            if getattr(self, name) >= TOO_LARGE:
                raise ValueError(f"{name} is too large")
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"rms_norm_eps is {self.norm_eps}; a small positive number is needed")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta is {self.rope_theta}; a positive number is needed")
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
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelError(f"{directory / 'config.json'}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelError with the file's name for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; --model takes a directory as Hugging Face lays it out") from error
    except (OSError, ValueError, RecursionError) as error:
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
    # Mistral has no switch beside the size: null is none, and nothing is 4096.
    if raw.get("use_sliding_window") or (architecture == "MistralForCausalLM" and raw.get("sliding_window", 4096)):
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
