"""The forward pass against logits of Hugging Face transformers, against itself, and against broken directories."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from safetensors.torch import load_file, save_file  # noqa: E402

from reference_backend.model import (  # noqa: E402
    KeyValueCache,
    ModelError,
    Step,
    load_model,
    read_config,
    rope_frequencies,
)

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_transformers(name):
    model = load_model(GOLDEN / name, CPU)
    golden = load_file(GOLDEN / name / "golden.safetensors")
    logits = model.logits(model(golden["tokens"]))[:, ::6]
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_cached_run_is_the_whole_run(name):
    model = load_model(GOLDEN / name, CPU)
    tokens = torch.randint(0, 64, (3, 40), generator=torch.Generator().manual_seed(3))
    whole = model.logits(model(tokens))
    cache = KeyValueCache(model.config, slots=5, context=64, device=CPU, dtype=torch.float32)
    cache.keys.normal_()  # what an earlier sequence left behind must not be seen
    cache.values.normal_()
    slots = [4, 0, 2]
    for row, (slot, chunk) in enumerate(zip(slots, (7, 16, 1), strict=True)):  # prompts, read in chunks
        for start in range(0, 20, chunk):
            positions = torch.arange(start, min(start + chunk, 20))[None]
            step = Step.at(cache, torch.tensor([slot]), positions)
            logits = model.logits(model(tokens[row, positions], step))
        torch.testing.assert_close(logits[0, -1], whole[row, 19], rtol=1e-4, atol=1e-4)
    lengths = torch.tensor([20, 12, 16])  # then all at once, from different positions
    for _ in range(10):
        step = Step.at(cache, torch.tensor(slots), lengths[:, None])
        now = tokens[torch.arange(3), lengths][:, None]
        logits = model.logits(model(now, step))[:, 0]
        torch.testing.assert_close(logits, whole[torch.arange(3), lengths], rtol=1e-4, atol=1e-4)
        lengths = lengths + 1


def changed(tmp_path, changes, source="llama"):
    config = json.loads((GOLDEN / source / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_both_ways_of_writing_rope_settings_are_read(tmp_path):
    scaling = json.loads((GOLDEN / "llama" / "config.json").read_text())["rope_parameters"]
    theta = scaling.pop("rope_theta")
    older = {"rope_parameters": None, "rope_scaling": scaling, "rope_theta": theta}
    assert read_config(changed(tmp_path, older)) == read_config(GOLDEN / "llama")


def test_frequencies_are_plain_without_scaling(tmp_path):
    config = read_config(changed(tmp_path, {"rope_parameters": None, "rope_theta": 100.0}))
    torch.testing.assert_close(rope_frequencies(config), 100.0 ** -(torch.arange(0, 8, 2) / 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported; supported: Llama"),
        ({"architectures": []}, "architecture none named is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling yarn"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "factor is missing"),
        ({"vocab_size": "many"}, "invalid literal"),
        ({"num_attention_heads": None}, "int()"),
        ({"num_attention_heads": 0}, "heads must be at least 1"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"hidden_size": 64}, "config.json asks"),
        ({"num_hidden_layers": 3}, "is missing; config.json and the weights do not belong together"),
    ],
)
def test_a_model_that_cannot_be_served_is_named(tmp_path, changes, message):
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / "llama" / "model.safetensors").read_bytes())
    with pytest.raises(ModelError) as refusal:
        load_model(changed(tmp_path, changes), CPU)
    assert message in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json: no such file"),
        ({"config.json": b"{"}, "config.json: cannot be read"),
        ({"config.json": b"\xff"}, "config.json: cannot be read"),
        ({"config.json": b"[]"}, "config.json: a JSON object is expected"),
        ({"config.json": b"{}"}, "architecture none named"),
        ({"config.json": None}, "neither model.safetensors nor"),
        ({"config.json": None, "model.safetensors": b"junk"}, "model.safetensors: cannot be read as safetensors"),
        ({"config.json": None, "model.safetensors.index.json": b"{}"}, "weight_map is missing"),
        (
            {"config.json": None, "model.safetensors.index.json": b'{"weight_map": {"x": "../../secret"}}'},
            "../../secret is not a file name in the same directory",
        ),
        (
            {"config.json": None, "model.safetensors.index.json": b'{"weight_map": {"x": "gone.safetensors"}}'},
            "gone.safetensors: cannot be read",
        ),
    ],
)
def test_a_broken_directory_is_told_in_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes((GOLDEN / "llama" / name).read_bytes() if content is None else content)
    with pytest.raises(ModelError) as refusal:
        load_model(tmp_path, CPU)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_tied_weights_are_kept_once():
    model = load_model(GOLDEN / "llama", CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_missing_embedding_of_a_tied_model_is_told(tmp_path):
    weights = load_file(GOLDEN / "llama" / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, changed(tmp_path, {}) / "model.safetensors")
    with pytest.raises(ModelError, match="embed_tokens"):
        load_model(tmp_path, CPU)
