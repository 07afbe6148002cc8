"""A few steps of the real training: it learns, goes on where it was stopped, and what it leaves can paint."""

import random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.flow import load_flow  # noqa: E402
from reference_backend.training import train_t2i  # noqa: E402
from reference_backend.training.pictures import Shape  # noqa: E402
from reference_backend.training.train_t2i import Run, schedule, told, train  # noqa: E402

SCENE = (Shape("small", "red", "circle", "at the top left"), Shape("big", "blue", "cross", "in the centre"))


@pytest.fixture
def small(monkeypatch):
    torch.set_num_threads(1)
    config = train_t2i.CONFIG | {"layers": 2, "heads": 2}
    for name, value in {"PICTURES": 16, "CONFIG": config, "CHECKPOINT_STEPS": 2}.items():
        monkeypatch.setattr(train_t2i, name, value)


@pytest.mark.slow
def test_thirty_steps_learn_and_leave_a_network(small, tmp_path):
    losses = train(tmp_path, 30).losses
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


def test_what_is_said_of_a_scene_is_what_it_is_but_for_traits_left_out():
    rng = random.Random(1)
    said = {told(SCENE, rng) for _ in range(300)}
    assert "small red circle at the top left and big blue cross in the centre" in said
    assert any(each.startswith(" red circle at") for each in said)
    assert any(each.startswith("small red circle  and") for each in said)
    assert all("red circle" in each and "blue cross" in each for each in said)


def test_all_that_is_said_of_a_scene_is_understood(small, tmp_path):
    config = Run(_written(tmp_path), 1).config
    words = config.understand(told(SCENE, random.Random(0)))
    assert words == ["small", "red", "circle", "top", "left", "and", "big", "blue", "cross", "centre"]
    assert len(config.understand("small red circle at the bottom right and big blue cross at the bottom left")) == 11


def _written(directory):
    train(directory, 0)
    return directory


def test_the_rate_rises_and_falls():
    rates = [schedule(step, 300) for step in range(300)]
    assert rates[0] < 0.1
    assert rates[150] == 1.0
    assert rates[-1] < 0.05
