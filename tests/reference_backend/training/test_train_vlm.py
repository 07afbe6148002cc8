"""A few steps of the real training: it learns, goes on where it was stopped, and what it leaves can be served."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from tokenizers import Tokenizer  # noqa: E402

from reference_backend.engine.model import load_model  # noqa: E402
from reference_backend.engine.vision import Vision  # noqa: E402
from reference_backend.tokenizer import PICTURE_TOKEN  # noqa: E402
from reference_backend.training import train_vlm  # noqa: E402
from reference_backend.training.pictures import Shape  # noqa: E402
from reference_backend.training.train_vlm import Rows, Run, open_eyes, train, with_image_token  # noqa: E402
from tests.support.tiny_model import DIRECTORY  # noqa: E402

TOKENIZER = with_image_token(Tokenizer.from_file(str(DIRECTORY / "tokenizer.json")))
IMAGE = TOKENIZER.token_to_id(PICTURE_TOKEN)


@pytest.fixture
def small(monkeypatch):
    """Few rows, so that a step takes a tenth of a second."""
    torch.set_num_threads(1)
    sizes = {"TALKS": (1, 96), "VIEWS": (6, 76), "EYE_STEPS": 2, "EYE_PICTURES": 8, "CHECKPOINT_STEPS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(train_vlm, name, value)


@pytest.mark.slow
def test_thirty_steps_learn_and_leave_a_model_that_sees(small, tmp_path):
    run = train(tmp_path, DIRECTORY, layers=2, steps=30)
    views = [views for _, views in run.losses]
    assert sum(views[-5:]) < 0.6 * sum(views[:5])
    model = load_model(tmp_path, torch.device("cpu"))
    assert model.config.layers == 2
    assert model.vision is not None


def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_been(small, tmp_path):
    whole = train(tmp_path / "whole", DIRECTORY, layers=1, steps=4)
    again = train(tmp_path / "stopped", DIRECTORY, layers=1, steps=4)
    half = Run(tmp_path / "stopped", 4, TOKENIZER)
    half.begin_with(DIRECTORY)
    half.step()
    half.step()
    half.save(tmp_path / "stopped" / "checkpoint.pt")
    resumed = train(tmp_path / "stopped", DIRECTORY, layers=1, steps=4)
    assert whole.losses == again.losses == resumed.losses
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_an_eye_learns_what_is_where(small):
    torch.manual_seed(1)
    before, after = open_eyes(Vision(32), 1), open_eyes(Vision(32), 100)
    assert after < 0.9 * before


def test_what_lies_in_the_pieces():
    shapes = (
        Shape("small", "red", "square", "at the top left"),
        Shape("big", "blue", "cross", "in the centre"),
    )
    square, cross, nothing, unclear = [0, 0, 0, 0], [1, 2, 2, 2], [-100, -100, -100, 5], [-100] * 4
    assert train_vlm._truth(shapes) == [
        square, square, nothing, nothing,
        square, unclear, cross, nothing,
        nothing, cross, cross, nothing,
        nothing, nothing, nothing, nothing,
    ]  # fmt: skip


def test_rows_show_as_many_pictures_as_they_have_tokens_for():
    for seed in range(4):
        rows = Rows(TOKENIZER, seed)
        for batch in (rows.talks(), rows.views()):
            assert batch.ids.shape == batch.targets.shape
            assert int((batch.ids == IMAGE).sum()) == 16 * len(batch.pictures)
            assert not (batch.targets == IMAGE).any()
            assert (batch.targets != -100).sum() > 50


def test_rows_of_a_seed_are_always_the_same():
    one, two = (Rows(TOKENIZER, 3).views() for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.pictures, two.pictures)


def test_the_token_for_pictures_takes_the_place_of_the_one_learnt_last():
    plain = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    assert TOKENIZER.get_vocab_size() == plain.get_vocab_size()
    assert plain.get_vocab_size() - 1 == IMAGE
    assert with_image_token(TOKENIZER) is TOKENIZER
    text = "What is a KV cache?"
    assert TOKENIZER.encode(text).ids == plain.encode(text).ids
    assert TOKENIZER.encode(f"{PICTURE_TOKEN}{PICTURE_TOKEN}").ids == [IMAGE, IMAGE]


def test_fewer_layers_are_taken_evenly(tmp_path, small):
    four = train(tmp_path / "four", DIRECTORY, layers=4, steps=0)
    two = train(tmp_path / "two", DIRECTORY, layers=2, steps=0)
    theirs, ours = four.model.state_dict(), two.model.state_dict()
    for layer, source in ((0, 0), (1, 3)):
        name = "self_attn.q_proj.weight"
        assert torch.equal(ours[f"model.layers.{layer}.{name}"], theirs[f"model.layers.{source}.{name}"])
