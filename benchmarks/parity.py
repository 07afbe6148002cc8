"""How far our logits are from those of Hugging Face transformers, for one model of random weights.

    python -m benchmarks.parity                # Qwen3-0.6B's shape in float32: 6 GB of memory, a minute
    python -m benchmarks.parity --dtype bfloat16 --tokens 256

Both have the same weights: transformers makes and saves them, we load the directory. Norms and biases are drawn, too:
ones and zeros would hide a wrong use of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from reference_backend.engine.model import Llama, load_model
from reference_backend.engine.operations import Rotary

QWEN3_0_6B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class Differences:
    """Between the logits of one text. `same_choice` is the share of tokens with the same likeliest next one."""

    largest: float
    same_choice: float
    cosine: float


def differences(config: Any, directory: Path, *, tokens: int, seed: int, dtype: torch.dtype) -> Differences:
    """Compare for a config of transformers, on the CPU, with weights that go into `directory`."""
    torch.manual_seed(seed)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.inference_mode():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        theirs.save_pretrained(directory)
        text = torch.randint(0, config.vocab_size, (tokens,))
        expected = theirs(text[None]).logits[0].float()
    del theirs  # at a real size both would not fit
    found = logits(load_model(directory, torch.device("cpu"), dtype), text)
    return Differences(
        largest=(found - expected).abs().max().item(),
        same_choice=(found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        cosine=functional.cosine_similarity(found, expected, dim=-1).min().item(),
    )


@torch.inference_mode()
def logits(model: Llama, text: Tensor) -> Tensor:
    """Scores [tokens, vocabulary] of one text, without a cache."""
    return model.logits(model.hidden(text, torch.arange(len(text)), dense))


def dense(_layer: int, qkv: Tensor, gains: Tensor | None, rotary: Rotary) -> Tensor:
    """Causal attention of a text to itself."""
    q, keys_values = rotary.split(qkv, gains)
    q, keys_values = q.transpose(0, 1)[None], keys_values.transpose(0, 1)[None]
    keys, values = keys_values.chunk(2, dim=1)
    seen = functional.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    return seen[0].transpose(0, 1).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    config = transformers.Qwen3Config(**QWEN3_0_6B)
    with tempfile.TemporaryDirectory(prefix="weir-parity-") as folder:
        found = differences(config, Path(folder), tokens=given.tokens, seed=1, dtype=getattr(torch, given.dtype))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(
        json.dumps({"shape": "Qwen3-0.6B", "dtype": given.dtype, "tokens": given.tokens, **asdict(found), **versions})
    )


if __name__ == "__main__":
    main()
