"""Specs of tensors, and how an executor is found."""

import pytest

from reference_backend.engine.config import ModelError
from reference_backend.tensors import TensorSpec, executor


@pytest.mark.parametrize(
    ("spec", "shape", "fits"),
    [
        ([], [], True),
        ([-1, 3], [0, 3], True),
        ([-1, 3], [7, 3], True),
        ([-1, 3], [7, 4], False),
        ([-1, 3], [7], False),
        ([-1, 3], [7, 3, 1], False),
        ([-1], [-1], False),
    ],
)
def test_a_spec_takes_shapes(spec, shape, fits):
    assert TensorSpec("x", "FP32", tuple(spec)).takes(shape) is fits


@pytest.mark.parametrize(
    ("datatype", "shape", "message"), [("FLOAT", [1], "datatype 'FLOAT' is not one of BOOL,"), ("FP32", [-2], "-2")]
)
def test_a_spec_is_judged(datatype, shape, message):
    with pytest.raises(ValueError, match=message):
        TensorSpec("x", datatype, tuple(shape))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "executor 'nonsense' cannot be used: No module named"),
        ("json.decoder", "has no attribute 'opened'"),
        ("", "cannot be used"),
        ("..tensors", "cannot be used"),
    ],
)
def test_an_executor_that_is_none_is_told(name, message):
    with pytest.raises(ModelError, match=message):
        executor(name)


def test_an_executor_of_ones_own_is_found_by_its_full_name():
    assert executor("tests.support.adder").__name__ == "opened"
