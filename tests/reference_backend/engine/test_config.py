"""config.json, read and judged. Needs no torch."""

import json
from pathlib import Path

import pytest

from reference_backend.engine.config import ModelError, read_config, read_json

GOLDEN = Path(__file__).parent.parent / "golden"
SCALING = json.loads((GOLDEN / "llama" / "config.json").read_text())["rope_parameters"]


def changed(tmp_path, changes, source="llama"):
    config = json.loads((GOLDEN / source / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_both_ways_of_writing_rope_settings_are_read(tmp_path):
    scaling = json.loads((GOLDEN / "llama" / "config.json").read_text())["rope_parameters"]
    theta = scaling.pop("rope_theta")
    older = {"rope_parameters": None, "rope_scaling": scaling, "rope_theta": theta}
    assert read_config(changed(tmp_path, older)) == read_config(GOLDEN / "llama")


@pytest.mark.parametrize(
    ("name", "switches"),
    [("llama", (False, False, True)), ("qwen2", (True, False, False)), ("qwen3", (False, True, False))],
)
def test_architectures_differ_in_switches(name, switches):
    config = read_config(GOLDEN / name)
    assert (config.qkv_bias, config.qk_norm, config.tied) == switches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported; supported: Llama"),
        ({"architectures": []}, "architecture none named is not supported"),
        ({"architectures": 7}, "not subscriptable"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding-window"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling yarn"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "missing required field `factor` - at `$.rope_scaling`"),
        ({"rope_parameters": "llama3"}, "has no attribute"),
        ({"vocab_size": "many"}, "Expected `int`, got `str` - at `$.vocab_size`"),
        ({"vocab_size": 1e999}, "Expected `int`, got `float` - at `$.vocab_size`"),
        ({"num_attention_heads": None}, "missing required field `num_attention_heads`"),
        ({"num_attention_heads": 0}, "Expected `int` >= 1 - at `$.num_attention_heads`"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"max_position_embeddings": 10**30}, "Expected `int` <= 9223372036854775807 - at `$.max_pos"),
        ({"max_position_embeddings": 1e308}, "Expected `int`, got `float` - at `$.max_position_em"),
        ({"rms_norm_eps": -1}, "Expected `float` >= 0.0 - at `$.rms_norm_eps`"),
        ({"rms_norm_eps": float("nan")}, "Expected `float` >= 0.0 - at `$.rms_norm_eps`"),
        ({"rope_parameters": {"rope_theta": -1}}, "Expected `float` > 0.0 - at `$.rope_theta`"),
        ({"rope_parameters": {"rope_theta": 1e999}}, "Expected `float` < 9.223372036854776e+18 - at `$.rope_theta`"),
        ({"rope_parameters": SCALING | {"factor": 0}}, "Expected `float` > 0.0 - at `$.rope_scaling.factor`"),
        ({"rope_parameters": SCALING | {"low_freq_factor": 4}}, "low_freq_factor must be below high_freq_factor"),
        (
            {"rope_parameters": SCALING | {"original_max_position_embeddings": 10**400}},
            "- at `$.rope_scaling.original_max",
        ),
    ],
)
def test_a_model_that_cannot_be_served_is_named(tmp_path, changes, message):
    with pytest.raises(ModelError) as refusal:
        read_config(changed(tmp_path, changes))
    assert message in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: no such file"),
        (b"{", "config.json: cannot be read"),
        (b"\xff", "config.json: cannot be read"),
        (b"[" * 100_000, "config.json: cannot be read"),
        (b"[]", "config.json: a JSON object is expected"),
    ],
)
def test_a_file_that_is_no_object_is_told_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError) as refusal:
        read_json(tmp_path / "config.json")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
