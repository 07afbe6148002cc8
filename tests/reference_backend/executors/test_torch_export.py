"""What is particular to torch.export programs: several tensors by their names, and rows that were fixed at the export.

The rest: test_programs.py.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.executors.torch_export import opened  # noqa: E402
from reference_backend.repository import Card  # noqa: E402
from reference_backend.tensors import TensorSpec  # noqa: E402

CARD = Card(kind="tensor", executor="torch_export", file="model.pt2", max_batch=8)


class Pair(torch.nn.Module):
    def forward(self, left, right):
        return left + right, (left * right).long()


def save(directory, rows):
    shapes = ({0: torch.export.Dim("rows", min=1, max=rows)},) * 2
    example = torch.zeros(2, 3), torch.zeros(2, 3)
    torch.export.save(torch.export.export(Pair(), example, dynamic_shapes=shapes), directory / "model.pt2")


async def test_names_and_types_come_from_the_program(tmp_path):
    save(tmp_path, rows=8)
    async with opened(tmp_path, CARD) as model:
        assert model.inputs == (TensorSpec("left", "FP32", (-1, 3)), TensorSpec("right", "FP32", (-1, 3)))
        assert model.outputs == (TensorSpec("output_0", "FP32", (-1, 3)), TensorSpec("output_1", "INT64", (-1, 3)))
        ones = np.ones((1, 3), np.float32)
        found = await model.infer({"left": ones, "right": 2 * ones})
    assert (found["output_0"].tolist(), found["output_1"].tolist()) == ([[3, 3, 3]], [[2, 2, 2]])


async def test_a_batch_that_the_program_was_not_exported_for_is_refused_at_the_start(tmp_path):
    save(tmp_path, rows=4)
    with pytest.raises(ModelError, match=r"a first run of 8 row\(s\) fails: .*4"):
        async with opened(tmp_path, CARD):
            raise AssertionError("it takes four")
