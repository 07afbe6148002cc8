"""The mean of the weights of two directories."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from safetensors.torch import load_file, save_file  # noqa: E402

from reference_backend.training.mean import mean  # noqa: E402


def test_weights_are_taken_by_their_shares_and_all_else_from_the_first(tmp_path):
    for name, value in (("one", 1.0), ("two", 5.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        (tmp_path / name / "checkpoint.pt").write_text("large")
        for file in ("model.safetensors", "vision.safetensors"):
            save_file({"a": torch.full((2,), value)}, tmp_path / name / file)
    mean(tmp_path / "out", {tmp_path / "one": 0.75, tmp_path / "two": 0.25})
    for file in ("model.safetensors", "vision.safetensors"):
        assert load_file(tmp_path / "out" / file)["a"].tolist() == [2.0, 2.0]
    assert (tmp_path / "out" / "config.json").read_text() == "one"
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
