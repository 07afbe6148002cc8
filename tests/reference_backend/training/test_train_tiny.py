"""A few steps of the real training: it learns, it repeats itself, and what it leaves can be served."""

import json
from functools import cache

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.model import load_model  # noqa: E402
from reference_backend.tokenizer import Message, Tokenizer  # noqa: E402
from reference_backend.training import train_tiny  # noqa: E402
from reference_backend.training.train_tiny import CONFIG, schedule, train, train_tokenizer, write_card  # noqa: E402
from tests.support.tiny_model import DIRECTORY  # noqa: E402


@pytest.fixture(scope="module")
def small():
    """A network of one narrow layer and short rows: a step takes a tenth of a second."""
    torch.set_num_threads(1)
    narrow = {"num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 128}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny, "CONFIG", CONFIG | narrow)
        patch.setattr(train_tiny, "ROW_TOKENS", 256)
        patch.setattr(train_tiny, "train_tokenizer", cache(train_tokenizer))  # a second each time
        yield


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    return directory, train(directory, steps=30, rows=2)


@pytest.mark.slow
def test_the_loss_falls(trained):
    _, losses = trained
    assert losses[0] > 6.5  # about ln 1024: it knows nothing
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(small, tmp_path):
    once, again = (train(tmp_path / name, steps=3, rows=1) for name in ("once", "again"))
    assert once == again
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "again")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_what_is_left_is_a_model_directory_with_a_card(trained, monkeypatch):
    directory, losses = trained
    monkeypatch.setattr(train_tiny, "EXAMINED", 1)
    write_card(directory, steps=30, loss=losses[-1], seconds=1.0, threads=1)
    model, tokenizer = load_model(directory, torch.device("cpu")), Tokenizer(directory)
    assert model.config.vocab_size == CONFIG["vocab_size"]
    assert tokenizer.encode_chat([Message("user", "Hi")])
    assert "30 steps of 8 rows" in (directory / "MODEL_CARD.md").read_text()


def test_the_committed_tokenizer_and_settings_are_those_of_the_script():
    assert train_tokenizer().to_str() == json.dumps(
        json.loads((DIRECTORY / "tokenizer.json").read_text()), ensure_ascii=False, separators=(",", ":")
    )
    assert json.loads((DIRECTORY / "config.json").read_text()) == CONFIG


def test_the_rate_rises_and_falls():
    rates = [schedule(step, 200, 30) for step in range(200)]
    assert rates.index(max(rates)) == 29
    assert rates[0] < 0.1
    assert rates[-1] < 0.03
    assert schedule(1, 8, 30) == 1.0  # a quarter of a short run
