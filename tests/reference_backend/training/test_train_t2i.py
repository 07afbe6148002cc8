"""A few steps of the real training: it learns, goes on where it was stopped, and what it leaves can paint."""

import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.flow import load_flow  # noqa: E402
from reference_backend.training import train_t2i  # noqa: E402
from reference_backend.training.pictures import Shape  # noqa: E402
from reference_backend.training.train_t2i import Run, schedule, told, train  # noqa: E402

SCENE = (Shape("small", "red", "circle", "at the top left"),)


@pytest.fixture
def small(monkeypatch):
    torch.set_num_threads(1)
    for name, value in {"PICTURES": 16, "CHECKPOINT_STEPS": 2}.items():
        monkeypatch.setattr(train_t2i, name, value)


@pytest.mark.slow
def test_fifty_steps_learn_and_leave_a_network(small, tmp_path):
    losses = train(tmp_path, 50).losses
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    assert load_flow(tmp_path, torch.device("cpu")).config.words[:2] == ("small", "big")


def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_been(small, tmp_path):
    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "stopped", 0)
    half = Run(tmp_path / "stopped", 4)
    half.step()
    half.step()
    half.save(tmp_path / "stopped" / "checkpoint.pt")
    assert train(tmp_path / "stopped", 4).losses == whole.losses
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_what_is_said_of_a_shape_is_what_it_is_but_for_what_is_left_out():
    rng = random.Random(1)
    said = {told(SCENE, rng) for _ in range(300)}
    assert said == {
        "small red circle at the top left", " red circle at the top left", "small red circle ", " red circle ",
    }  # fmt: skip


def test_all_that_is_said_of_a_shape_is_understood(tmp_path):
    config = Run(_written(tmp_path), 1).config
    assert config.understand(told(SCENE, random.Random(0))) == ["small", "red", "circle", "top", "left"]
    assert config.understand("a large white plus in the middle") == ["big", "white", "cross", "centre"]


def _written(directory):
    train(directory, 0)
    return directory


def test_the_rate_rises_and_falls():
    rates = [schedule(step, 300) for step in range(300)]
    assert rates[0] < 0.1
    assert rates[150] == 1.0
    assert rates[-1] < 0.05
