"""The encoder, by torch and in C, with one thread and with two, against transformers' BertModel, packed against alone, and broken directories."""

import json
import os
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from safetensors.torch import load_file, save_file  # noqa: E402

from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.engine.native import native  # noqa: E402
from reference_backend.executors.bert import InC, in_c, load_bert, mean_of_each  # noqa: E402

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent.parent / "golden" / "bert"


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=["by torch", "in C"])
def model(request):
    if request.param == "by torch":
        return load_bert(GOLDEN)
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler is installed")
    made = in_c(load_bert(GOLDEN))
    assert products(made) == [InC, InC, torch.nn.Linear, InC] * 2  # one has 48 columns, which are no whole panels
    return made


def products(model):
    return [type(each) for each in model.modules() if isinstance(each, InC | torch.nn.Linear)]


@pytest.mark.usefixtures("threads")
def test_states_are_those_of_transformers(model):
    golden = load_file(GOLDEN / "golden.safetensors")
    with torch.inference_mode():
        states = model(golden["tokens"].flatten(), [len(row) for row in golden["tokens"]])
    torch.testing.assert_close(states.view_as(golden["states"]), golden["states"], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("threads")
def test_a_text_is_the_same_alone_and_packed_among_others(model):
    lengths = [5, 1, 30, 9]
    texts = [torch.randint(0, 64, (length,)) for length in lengths]
    with torch.inference_mode():
        together = mean_of_each(model(torch.cat(texts), lengths), lengths)
        for text, length, found in zip(texts, lengths, together, strict=True):
            torch.testing.assert_close(mean_of_each(model(text, [length]), [length])[0], found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4))


def test_without_a_compiler_torch_does_it_all(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.cache_clear()
    with caplog.at_level("INFO"):
        assert set(products(in_c(load_bert(GOLDEN)))) == {torch.nn.Linear}
    native.cache_clear()
    assert "torch's own products are used: [Errno 2]" in caplog.text


def broken(tmp_path, config=None, weights=None):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    if config is not None:
        changed = json.loads((GOLDEN / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(
            json.dumps({k: v for k, v in changed.items() if v is not ...}, default=str)
        )
    if weights is not None:
        save_file(weights(load_file(GOLDEN / "model.safetensors")), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["RobertaModel"]}, "a BertModel with hidden_act gelu is expected"),
        ({"hidden_act": "relu"}, "a BertModel with hidden_act gelu is expected"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": 48}, "give no model: "),
        ({"hidden_size": "many"}, "give no model: "),
        ({"num_hidden_layers": 3}, r"encoder.layer.2.attention.self.query.weight is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads must divide"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide"),
    ],
)
def test_a_config_that_fits_nothing_is_told(tmp_path, config, message):
    with pytest.raises(ModelError, match=message):
        load_bert(broken(tmp_path, config))


def test_weights_that_are_missing_cut_or_no_numbers_are_told(tmp_path):
    with pytest.raises(ModelError, match="encoder.layer.1.output.dense.bias is missing"):
        load_bert(
            broken(tmp_path, weights=lambda all_: {k: v for k, v in all_.items() if "1.output.dense.bias" not in k})
        )
    with pytest.raises(ModelError, match="position_embeddings.weight has weights that are no numbers"):
        load_bert(broken(tmp_path, weights=lambda all_: {k: v / 0 if "position" in k else v for k, v in all_.items()}))
    path = broken(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="model.safetensors: cannot be read"):
        load_bert(tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match="model.safetensors: cannot be read"):
        load_bert(tmp_path)
