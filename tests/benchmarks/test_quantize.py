"""The tables of narrower forms: every form has its row, and sizes are those of what is kept."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
pytest.importorskip("torchao", reason="torchao is not installed (pip install 'weir[backend]')")

from benchmarks import quantize as subject  # noqa: E402
from reference_backend.executors.quantize import Pair  # noqa: E402

SAMPLES = torch.ones(3, 64)
FORMS = [
    "float32", "bfloat16", "int8 dynamic", "int8 static", "fp8 weights", "2:4", "2:4, distilled",
    "channels pruned to 75%", "channels pruned to 75%, distilled",
]  # fmt: skip


def small():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)).requires_grad_(False)


def test_each_form_has_its_row_and_its_size():
    prunings = {"channels": [Pair("0", "2")]}
    made = subject.forms(small(), prunings, lambda model: model(SAMPLES), lambda student: student)
    assert list(made) == FORMS
    size = {name: subject.megabytes(form) / subject.megabytes(made["float32"]) for name, form in made.items()}
    assert size["bfloat16"] == 0.5
    assert 0.25 < size["int8 dynamic"] < 0.32
    assert 0.25 < size["fp8 weights"] < 0.32
    assert 0.74 < size["channels pruned to 75%"] < 0.77
    assert size["2:4"] == 1.0


def test_times_are_ratios_of_float32():
    made = {"float32": small(), "again": small()}
    head, line, first, second = subject.times_table("small", made, {"once": lambda model: model(SAMPLES)})
    assert (head, line) == ("| small | once |", "| --- | ---: |")
    assert first.endswith("(1.00 x) |")
    assert second.startswith("| again | ")
