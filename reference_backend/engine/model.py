"""A decoder-only transformer of the Llama family, as it is served: plain tensors, few and large operations.

Three published architectures differ in two switches only: Qwen2 adds a bias to the query, key and value projections,
Qwen3 normalises queries and keys per head. On a CPU a small model spends its time in calling operations, not in
arithmetic; so what can be done to the weights once is not done to each token:

- queries, keys and values are one matrix, gate and up another;
- the weights of a norm are folded into the matrix behind it, and what is left of the norm is three operations;
- rows of the query and key projections are paired up, (i, i + half) beside each other, so that a rotary position is
  one complex multiplication, done in place; scores do not change, as both sides are paired alike;
- the residual is added by the matrix product itself.

Nor is anything kept twice: a tied head is the embedding, whose rows are picked out of what its product wants.

Sources: Llama 2 (arXiv 2307.09288) for the block, RoFormer (2104.09864) for rotary positions, GQA (2305.13245),
and the `llama3` frequency scaling as published with Llama 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from reference_backend.engine.attention import Attend
from reference_backend.engine.config import ModelConfig, ModelError, Narrow, read_config, read_json
from reference_backend.engine.operations import Linear, Operations, Rotary, operations_for
from reference_backend.engine.quant import narrowed
from reference_backend.engine.ranks import ALONE, Ranks
from reference_backend.engine.vision import Vision, load_vision

Weights = Mapping[str, Tensor]
Seen = tuple[Tensor, Tensor]  # which of the tokens are pieces of pictures, and what stands there: [pieces, hidden]


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


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Linear
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]
    out: Linear
    gate_up: Linear
    down: Linear


class Llama:
    """`hidden` gives the final states, `logits` turns those that matter into scores over the vocabulary."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        *,
        quantize: Narrow | None = None,
        ranks: Ranks = ALONE,
        operations: Operations | None = None,
    ) -> None:
        self.config = config
        self.device, self.dtype = device, dtype
        self.vision: Vision | None = None
        self.operations = operations or operations_for(config, device, dtype, ranks)
        self.heads, self.kv_heads = config.heads // ranks.size, config.kv_heads // ranks.size  # of this rank
        self._ranks, self._quantize = ranks, quantize
        # A norm's root of the sum of squares needs no mean: the root of the size is in the weights.
        self._head_epsilon = config.norm_eps * config.head_dim
        self._head_root = torch.tensor(math.sqrt(self._head_epsilon), device=device)
        self._embedding, head = self._ends(weights)
        self._head = Linear(head, None)
        self._final_norm = self._scale(weights["model.norm.weight"]).to(device, dtype)
        self._layers = [self._layer(weights, f"model.layers.{index}.") for index in range(config.layers)]
        positions = torch.arange(config.context, dtype=torch.float32)
        angles = positions[:, None] * rope_frequencies(config)
        self._turns = torch.polar(torch.ones_like(angles), angles).to(device)  # [context, head_dim / 2]

    @property
    def linears(self) -> list[Linear]:
        """The matrices of all layers."""
        return [each for layer in self._layers for each in (layer.qkv, layer.out, layer.gate_up, layer.down)]

    @property
    def weights(self) -> list[Tensor]:
        """What it has on its device, but for the smallest."""
        ends = [self._embedding, self._head.matrix, self._final_norm, self._turns]
        matrices = [each for linear in self.linears for each in (linear.matrix, linear.bias, linear.scale)]
        norms = [layer.qk_norm for layer in self._layers]
        vision = [] if self.vision is None else list(self.vision.parameters())
        return [each for each in (*ends, *matrices, *norms, *vision) if each is not None]

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend, seen: Seen | None = None) -> Tensor:
        """Hidden states [tokens, hidden] of tokens [tokens], which may belong to many sequences."""
        do, heads = self.operations, self.heads + 2 * self.kv_heads
        turns = self._turns.index_select(0, positions)[:, None]
        rotary = Rotary(self._turns, turns, positions, self.heads, self.kv_heads, self._head_epsilon, self._head_root)
        x = do.rows(self._embedding, tokens)
        if seen is not None:
            x.index_copy_(0, *seen)
        normed = do.norm(x)
        for index, layer in enumerate(self._layers):
            qkv = do.linear(normed, layer.qkv).view(-1, heads, self.config.head_dim)
            x, normed = do.onto(x, attend(index, qkv, layer.qk_norm, rotary), layer.out)
            x, normed = do.onto(x, do.silu_times(do.linear(normed, layer.gate_up)), layer.down)
        return normed * self._final_norm

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores in float32, whatever the weights are kept in."""
        return self._ranks.side_by_side(self.operations.linear(hidden, self._head).float())[:, : self.config.vocab_size]

    def _ends(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """The embedding and this rank's part of the head, as they are kept: the same, where they can be."""
        config, ranks = self.config, self._ranks
        rows = weights["model.embed_tokens.weight"].to(self.device, self.dtype)
        embedding = self.operations.kept(rows)
        if config.tied and ranks.size == 1:
            return embedding, embedding
        head = rows if config.tied else weights["lm_head.weight"].to(self.device, self.dtype)
        mine = head[ranks.share(config.vocab_size)]
        missing = -(-config.vocab_size // ranks.size) - mine.shape[0]
        return embedding, self.operations.kept(functional.pad(mine, (0, 0, 0, missing)) if missing else mine)

    def _layer(self, weights: Weights, prefix: str) -> Layer:
        config, ranks = self.config, self._ranks
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        before_attention = self._scale(weights[prefix + "input_layernorm.weight"])
        before_mlp = self._scale(weights[prefix + "post_attention_layernorm.weight"])
        inner = ranks.share(config.intermediate_size)

        def heads(name: str, kind: str, count: int) -> Tensor:
            """Rows of a projection that has so many heads in all: those of this rank."""
            return weights[f"{attention}{name}.{kind}"][ranks.share(count * config.head_dim)]

        def qkv(kind: str) -> Tensor:
            queries = _paired(heads("q_proj", kind, config.heads), self.heads)
            keys = _paired(heads("k_proj", kind, config.kv_heads), self.kv_heads)
            return torch.cat([queries, keys, heads("v_proj", kind, config.kv_heads)])

        def gate_up(kind: str) -> Tensor:
            return torch.cat([weights[f"{mlp}{name}.{kind}"][inner] for name in ("gate_proj", "up_proj")])

        qk_norm = None
        if config.qk_norm:
            q_norm, k_norm = (_paired(weights[f"{attention}{name}.weight"], 1) for name in ("q_norm", "k_norm"))
            both = torch.cat([q_norm.expand(self.heads, -1), k_norm.expand(self.kv_heads, -1)])
            qk_norm = (both.float() * math.sqrt(config.head_dim)).to(self.device, self.dtype)
        return Layer(
            qkv=self._linear(qkv("weight") * before_attention, qkv("bias") if config.qkv_bias else None),
            qk_norm=qk_norm,
            out=self._linear(
                weights[attention + "o_proj.weight"][:, ranks.share(config.heads * config.head_dim)],
                weights[attention + "o_proj.bias"] if config.output_bias else None,
            ),
            gate_up=self._linear(gate_up("weight") * before_mlp, gate_up("bias") if config.mlp_bias else None),
            down=self._linear(
                weights[mlp + "down_proj.weight"][:, inner],
                weights[mlp + "down_proj.bias"] if config.mlp_bias else None,
            ),
        )

    def _scale(self, norm: Tensor) -> Tensor:
        return norm.float() * math.sqrt(self.config.hidden_size)

    def _linear(self, matrix: Tensor, bias: Tensor | None) -> Linear:
        scale = None
        if self._quantize is None:
            matrix = matrix.to(self.device, self.dtype)
        else:
            matrix, scale = narrowed(matrix.to(self.device), self._quantize)
        return Linear(self.operations.kept(matrix), None if bias is None else bias.to(self.device, self.dtype), scale)


def _paired(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order 0, half, 1, half + 1, ..."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def weight_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The weights that a checkpoint of this configuration has, by name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tied:
        yield "lm_head.weight", (config.vocab_size, hidden)
    matrices = [
        ("self_attn.q_proj", queries, hidden, config.qkv_bias),
        ("self_attn.k_proj", keys, hidden, config.qkv_bias),
        ("self_attn.v_proj", keys, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, queries, config.output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ]
    norms = [("input_layernorm", hidden), ("post_attention_layernorm", hidden)]
    if config.qk_norm:
        norms += [("self_attn.q_norm", config.head_dim), ("self_attn.k_norm", config.head_dim)]
    for index in range(config.layers):  # lazily: a broken config.json may ask for a billion
        prefix = f"model.layers.{index}."
        yield from ((f"{prefix}{name}.weight", (size,)) for name, size in norms)
        yield from ((f"{prefix}{name}.weight", (rows, columns)) for name, rows, columns, _ in matrices)
        yield from ((f"{prefix}{name}.bias", (rows,)) for name, rows, _, has_bias in matrices if has_bias)


def parameters(config: ModelConfig) -> int:
    """How many numbers such a model has learnt."""
    return sum(math.prod(shape) for _, shape in weight_shapes(config))


class RandomWeights(Mapping[str, Tensor]):
    """Normal numbers with a deviation of 0.02, norms of 1; made when asked for, and the same on all ranks."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._shapes = dict(weight_shapes(config))
        self._device, self._dtype = device, dtype

    def __getitem__(self, name: str) -> Tensor:
        made = torch.empty(self._shapes[name], device=self._device, dtype=self._dtype)
        if name.endswith("norm.weight"):
            return made.fill_(1.0)
        return made.normal_(std=0.02, generator=torch.Generator(self._device).manual_seed(crc32(name.encode())))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def load_model(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    quantize: Narrow | None = None,
    ranks: Ranks = ALONE,
    dummy: bool = False,
) -> Llama:
    """The model of a directory, or this rank's part of it, ready to run. Raises ModelError.

    With `dummy` only config.json is read, and the weights are random: for measuring.
    """
    config = read_config(directory)
    for name in ("heads", "kv_heads", "intermediate_size"):
        if getattr(config, name) % ranks.size:
            raise ModelError(
                f"{directory}: {name} is {getattr(config, name)}, which {ranks.size} ranks cannot share evenly; "
                "choose another --tensor-parallel"
            )
    if dummy:
        return Llama(config, RandomWeights(config, device, dtype), device, dtype, quantize=quantize, ranks=ranks)
    weights = _read_weights(directory)
    for name, shape in weight_shapes(config):
        if name not in weights:
            raise ModelError(
                f"{directory}: weight {name} is missing; config.json and the weights do not belong together"
            )
        if weights[name].shape != shape:
            raise ModelError(f"{directory}: weight {name} is {[*weights[name].shape]}, config.json asks {[*shape]}")
        if not weights[name].is_floating_point():
            raise ModelError(
                f"{directory}: weight {name} is {weights[name].dtype}; only unquantized weights are served"
            )
    model = Llama(config, weights, device, dtype, quantize=quantize, ranks=ranks)
    vision = load_vision(directory, config.hidden_size)
    model.vision = None if vision is None else vision.to(device, dtype)
    return model


def _read_weights(directory: Path) -> Weights:
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
