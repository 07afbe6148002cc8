"""What config.json says of a model, judged before any weight is read. Nothing here needs torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

VISION_FILE = "vision.safetensors"  # beside the weights of a model that takes pictures, too
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

Narrow = Literal["int8", "fp8"]  # what weights can be narrowed to, once they are read
NARROW: tuple[Narrow, ...] = get_args(Narrow)

Size = Annotated[int, Meta(ge=1, le=2**63 - 1)]  # as torch may be told
Positive = Annotated[float, Meta(gt=0, lt=2.0**63)]
C = TypeVar("C", bound=msgspec.Struct)


class ModelError(Exception):
    """A model directory that cannot be served. The message says which file, what is wrong and what to do."""


class RopeScaling(msgspec.Struct, frozen=True, rename={"original_context": "original_max_position_embeddings"}):
    """The `llama3` scaling: long wavelengths are stretched by `factor`, short ones kept, the band between blended."""

    factor: Positive
    low_freq_factor: Annotated[float, Meta(ge=0)]
    high_freq_factor: Positive
    original_context: Size

    def __post_init__(self) -> None:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor must be below high_freq_factor")


NAMES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "output_bias": "attention_bias",
    "tied": "tie_word_embeddings",
}


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, rename=NAMES):
    """What config.json says, reduced to what the forward pass needs."""

    architecture: str
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    layers: Size
    heads: Size
    kv_heads: Size = 0  # if it is not told: one for each head
    head_dim: Size = 0  # likewise: all heads together are as wide as the hidden states
    context: Size
    norm_eps: Annotated[float, Meta(ge=0, lt=1)] = 1e-6
    rope_theta: Positive
    rope_scaling: RopeScaling | None
    qkv_bias: bool
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool
    tied: bool = False

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "kv_heads", self.kv_heads or self.heads)
        msgspec.structs.force_setattr(self, "head_dim", self.head_dim or self.hidden_size // self.heads)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key-value heads")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")


def read_config(directory: Path) -> ModelConfig:
    """Read config.json. Raises ModelError for what this server cannot run, before any weight is read."""
    path = directory / "config.json"
    raw = read_json(path)
    try:
        told = _judged(raw)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: {error}") from error
    return as_told(path, {name: value for name, value in raw.items() if value is not None} | told, ModelConfig)


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


def as_told(path: Path, raw: dict[str, Any], kind: type[C]) -> C:
    """What a file says, as it should be. Raises ModelError, with the place where it is not."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path}: {error}") from error


def _judged(raw: dict[str, Any]) -> dict[str, Any]:
    """What follows from the architecture, and rope settings written either way. Raises for what is not served."""
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
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope scaling {kind} is not supported; supported: default, llama3")
    return {
        "architecture": architecture,
        "rope_theta": rope.get("rope_theta") or raw.get("rope_theta", 10_000.0),
        "rope_scaling": rope if kind == "llama3" else None,
        "qkv_bias": raw.get("attention_bias") or architecture == "Qwen2ForCausalLM",
        "qk_norm": architecture == "Qwen3ForCausalLM",
    }
