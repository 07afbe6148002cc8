"""The served model without cache, blocks, batch or engine: what all of them must be equal to. Needs torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from reference_backend.engine.model import Llama
from reference_backend.engine.operations import Rotary


def dense(_layer: int, qkv: Tensor, gains: Tensor | None, rotary: Rotary) -> Tensor:
    """Causal attention of one whole text to itself."""
    q, keys_values = rotary.split(qkv, gains)
    q, keys_values = q.transpose(0, 1)[None], keys_values.transpose(0, 1)[None]
    keys, values = keys_values.chunk(2, dim=1)
    seen = functional.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    return seen[0].transpose(0, 1).flatten(1)


@torch.inference_mode()
def plain_logits(model: Llama, tokens: list[int]) -> Tensor:
    """Scores [tokens, vocabulary] of one text."""
    ids = torch.tensor(tokens)
    return model.logits(model.hidden(ids, torch.arange(len(tokens)), dense))


def greedy_reference(model: Llama, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, each token from a pass over the whole text."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(plain_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]
