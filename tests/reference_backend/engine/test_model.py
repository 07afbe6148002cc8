"""The forward pass against logits of Hugging Face transformers, and against broken directories."""

import copy
import json
import struct
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from safetensors.torch import load_file, save_file  # noqa: E402

import reference_backend  # noqa: E402
from reference_backend.engine.config import ModelError, read_config  # noqa: E402
from reference_backend.engine.model import load_model, parameters, rope_frequencies, weight_shapes  # noqa: E402
from reference_backend.engine.stowed import Stowed  # noqa: E402
from tests.support.plain_model import plain_logits  # noqa: E402

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent.parent / "golden"
SEEING = Path(reference_backend.__file__).parent / "models" / "tiny-vlm" / "2"
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_transformers(name):
    model = load_model(GOLDEN / name, CPU)
    golden = load_file(GOLDEN / name / "golden.safetensors")
    for tokens, expected in zip(golden["tokens"].tolist(), golden["logits"], strict=True):
        torch.testing.assert_close(plain_logits(model, tokens)[::6], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_half_precision_stays_near(name):
    """The path of weights in bfloat16, which GPUs take: most of the likeliest tokens are the same."""
    exact = load_model(GOLDEN / name, CPU)
    half = load_model(GOLDEN / name, CPU, torch.bfloat16)
    tokens = load_file(GOLDEN / name / "golden.safetensors")["tokens"][0].tolist()
    expected, found = plain_logits(exact, tokens), plain_logits(half, tokens)
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(expected, found, dim=-1).min() > 0.99
    assert (expected.argmax(-1) == found.argmax(-1)).float().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_is_kept_once(dtype):
    model = load_model(GOLDEN / "llama", CPU, dtype)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.weights}
    turns = 8 * model.config.context * model.config.head_dim // 2
    assert sum(storages.values()) <= parameters(model.config) * dtype.itemsize + turns


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_checkpoint_has_the_weights_that_are_asked_for(name):
    files = [path for path in (GOLDEN / name).glob("*.safetensors") if path.name != "golden.safetensors"]
    kept = {key: tuple(value.shape) for path in files for key, value in load_file(path).items()}
    assert dict(weight_shapes(read_config(GOLDEN / name))) == kept
    assert parameters(read_config(GOLDEN / name)) == sum(torch.Size(shape).numel() for shape in kept.values())


def tensors_in(thing):
    """All that something of ours is made of."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for each in thing:
            yield from tensors_in(each)
    elif isinstance(thing, torch.nn.Module):
        yield from thing.parameters()
    elif type(thing).__module__.startswith("reference_backend"):
        names = getattr(type(thing), "__slots__", ()) or vars(thing)
        for name in names:
            yield from tensors_in(getattr(thing, name))


@pytest.mark.parametrize(
    ("directory", "quantize"), [(GOLDEN / "llama", None), (GOLDEN / "qwen2", "int8"), (GOLDEN / "qwen3", None), (SEEING, None)]
)  # fmt: skip
def test_its_weights_are_all_that_it_has(directory, quantize):
    """What is put away when it sleeps: nothing of size is left behind, and it computes the same with it back."""
    model = copy.deepcopy(load_model(directory, CPU, quantize=quantize))  # out of the file, which cannot shrink
    sizes = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors_in(model)}
    named = {each.untyped_storage().data_ptr() for each in model.weights}
    assert max((size for place, size in sizes.items() if place not in named), default=0) < 64
    before = plain_logits(model, [5, 9, 2])
    stowed = Stowed(model.weights)
    assert sum(each.untyped_storage().nbytes() for each in tensors_in(model)) < 64 * len(sizes)
    stowed.bring_back()
    assert torch.equal(plain_logits(model, [5, 9, 2]), before)


def changed(tmp_path, changes, source="llama"):
    config = json.loads((GOLDEN / source / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / source / "model.safetensors").read_bytes())
    return tmp_path


def test_frequencies_are_plain_without_scaling(tmp_path):
    config = read_config(changed(tmp_path, {"rope_parameters": None, "rope_theta": 100.0}))
    torch.testing.assert_close(rope_frequencies(config), 100.0 ** -(torch.arange(0, 8, 2) / 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "config.json asks"),
        ({"num_hidden_layers": 3}, "is missing; config.json and the weights do not belong together"),
        ({"vocab_size": 10**18}, "config.json asks"),
        ({"num_hidden_layers": 10**9}, "is missing"),
    ],
)
def test_weights_of_another_model_are_named(tmp_path, changes, message):
    with pytest.raises(ModelError) as refusal:
        load_model(changed(tmp_path, changes), CPU)
    assert message in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


def test_random_weights_need_no_file_but_the_config(tmp_path):
    """Always the same, neither zeros nor too large to compute with."""
    (tmp_path / "config.json").write_bytes((GOLDEN / "qwen3" / "config.json").read_bytes())
    first, second = (plain_logits(load_model(tmp_path, CPU, dummy=True), [1, 2, 3]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert first.std() > 0


WHOLE = (GOLDEN / "llama" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither model.safetensors nor"),
        ({"model.safetensors": b""}, "model.safetensors: cannot be read as safetensors"),
        ({"model.safetensors": b"junk"}, "model.safetensors: cannot be read as safetensors"),
        ({"model.safetensors": WHOLE[:-1]}, "model.safetensors: cannot be read as safetensors"),
        ({"model.safetensors": WHOLE[:100]}, "model.safetensors: cannot be read as safetensors"),
        ({"model.safetensors": struct.pack("<Q", 1 << 62) + WHOLE[8:]}, "model.safetensors: cannot be read as"),
        ({"model.safetensors.index.json": b"{}"}, "weight_map is missing"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"x": "../../secret"}}'},
            "../../secret is not a file name in the same directory",
        ),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"x": "gone.safetensors"}}'},
            "gone.safetensors: cannot be read",
        ),
    ],
)
def test_a_broken_directory_is_told_in_one_line(tmp_path, files, message):
    changed(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as refusal:
        load_model(tmp_path, CPU)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.embed_tokens.weight", None, "embed_tokens.weight is missing"),
        ("model.norm.weight", lambda w: w.to(torch.int32), "is torch.int32; only unquantized weights"),
        ("model.norm.weight", lambda w: w[None], "is [1, 32], config.json asks [32]"),
    ],
)
def test_a_weight_that_is_no_good_is_named(tmp_path, name, change, message):
    weights = load_file(GOLDEN / "llama" / "model.safetensors")
    original = weights.pop(name)
    if change is not None:
        weights[name] = change(original)
    save_file(weights, changed(tmp_path, {}) / "model.safetensors")
    with pytest.raises(ModelError) as refusal:
        load_model(tmp_path, CPU)
    assert message in str(refusal.value)
