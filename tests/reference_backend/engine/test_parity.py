"""Logits beside those of Hugging Face transformers, computed here and now, for models of drawn shapes.

test_model.py compares with kept ones, which need no transformers. `benchmarks/parity.py` does the same at a real size.
"""

import warnings
from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip, group tests)")

from benchmarks.parity import differences  # noqa: E402

torch.set_num_threads(1)
ROPES = [
    {"rope_type": "default", "rope_theta": 10_000.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]


def drawn(seed, architecture):
    """A config of this architecture: shared heads or not, a head size of its own, tied or not, scaled positions or not."""
    rng = Random(seed)
    kv_heads, head_dim = rng.choice([1, 2, 3]), rng.choice([8, 16, 32])
    heads = kv_heads * rng.choice([1, 2, 4])
    shape = {
        "vocab_size": rng.randrange(50, 120),
        "hidden_size": heads * head_dim if architecture == "Qwen2" else rng.choice([24, 40, 64]),
        "intermediate_size": rng.randrange(16, 90),
        "num_hidden_layers": rng.choice([1, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.5,
        "rope_parameters": rng.choice(ROPES),
    }
    if architecture == "Llama":
        shape |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    if architecture == "Mistral":
        shape["sliding_window"] = None
    return getattr(transformers, f"{architecture}Config")(**shape)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("seed", range(3))
def test_logits_are_those_of_transformers(seed, architecture, tmp_path):
    found = differences(drawn(seed, architecture), tmp_path, tokens=40, seed=seed, dtype=torch.float32)
    assert found.largest < 1e-4
    assert found.same_choice == 1.0


def test_a_real_shape_scaled_down_stays_near_in_bfloat16(tmp_path):
    """Qwen3-0.6B's proportions, an eighth as wide: as far from float32 as transformers itself is, and no further."""
    config = transformers.Qwen3Config(
        vocab_size=2000, hidden_size=128, intermediate_size=384, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=128, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    found = differences(config, tmp_path, tokens=64, seed=1, dtype=torch.bfloat16)
    assert found.cosine > 0.99
