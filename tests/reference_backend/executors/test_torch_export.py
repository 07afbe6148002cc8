"""A torch.export program: the one of the examples, ones made here, and files that are none."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.executors.torch_export import load_program, opened  # noqa: E402
from reference_backend.repository import Card, Entry  # noqa: E402
from reference_backend.tensors import TensorSpec, executor  # noqa: E402
from reference_backend.training.shapes import pictures, right  # noqa: E402
from tests.support.example_models import EXAMPLES  # noqa: E402

DIRECTORY = EXAMPLES / "shapes-mlp" / "1"


def card(**fields):
    return Card(kind="tensor", executor="torch_export", file="model.pt2", **fields)


class Pair(torch.nn.Module):
    def forward(self, left, right):
        return left + right, (left * right).long()


def save(directory, module, *example, rows=8):
    shapes = tuple({0: torch.export.Dim("rows", min=1, max=rows)} for _ in example)
    torch.export.save(torch.export.export(module, example, dynamic_shapes=shapes), directory / "model.pt2")


async def test_the_example_answers_as_its_program_does_alone_and_among_others():
    pixels, kinds = pictures(24, training=False)
    entry = Entry("shapes-mlp", "1", DIRECTORY)
    async with executor("torch_export")(DIRECTORY, entry.card()) as model:
        assert (model.inputs[0].name, model.inputs[0].shape) == ("pixels", (-1, 32, 32, 3))
        together = (await model.infer({"pixels": pixels.numpy()}))["scores"]
        alone = [(await model.infer({"pixels": each[None].numpy()}))["scores"] for each in pixels]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-4)
    expected = right(load_program(DIRECTORY / "model.pt2").module(), pixels, kinds)
    assert (together.argmax(-1) == kinds.numpy()).mean() == pytest.approx(expected)


async def test_names_and_types_come_from_the_program_or_from_model_toml(tmp_path):
    save(tmp_path, Pair(), torch.zeros(2, 3), torch.zeros(2, 3))
    async with opened(tmp_path, card(max_batch=8)) as model:
        assert model.inputs == (TensorSpec("left", "FP32", (-1, 3)), TensorSpec("right", "FP32", (-1, 3)))
        assert model.outputs == (TensorSpec("output_0", "FP32", (-1, 3)), TensorSpec("output_1", "INT64", (-1, 3)))
        ones = np.ones((1, 3), np.float32)
        ones.flags.writeable = False  # as what has come over a socket is
        found = await model.infer({"left": ones, "right": 2 * ones})
        assert (found["output_0"].tolist(), found["output_1"].tolist()) == ([[3, 3, 3]], [[2, 2, 2]])
    named = tuple(TensorSpec(name, "FP32", (-1, 3)) for name in "ab")
    async with opened(tmp_path, card(inputs=named)) as model:
        assert (await model.infer({"a": ones, "b": -ones}))["output_0"].tolist() == [[0, 0, 0]]


async def test_a_batch_that_the_program_was_not_exported_for_is_refused_at_the_start(tmp_path):
    save(tmp_path, Pair(), torch.zeros(2, 3), torch.zeros(2, 3), rows=4)
    with pytest.raises(ModelError, match=r"a first run of 8 row\(s\) fails: .*4"):
        async with opened(tmp_path, card(max_batch=8)):
            raise AssertionError("it takes four")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"",
        lambda _: b"nonsense",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"graph_module", b"graph_modulo"),
    ],
    ids=["empty", "nonsense", "cut off", "spoilt inside"],
)
async def test_a_broken_file_is_told_in_a_line(tmp_path, spoil):
    (tmp_path / "model.pt2").write_bytes(spoil((DIRECTORY / "model.pt2").read_bytes()))
    with pytest.raises(ModelError, match=r"model.pt2: cannot be read as a torch.export program: .+") as told:
        async with opened(tmp_path, card()):
            raise AssertionError("it is broken")
    assert "\n" not in str(told.value)


async def test_what_is_no_tensor_and_what_has_no_name_here_is_refused(tmp_path):
    class Half(torch.nn.Module):
        def forward(self, x):
            return x.to(torch.bfloat16)

    save(tmp_path, Half(), torch.zeros(2, 3))
    with pytest.raises(ModelError, match="output_0 is of a type that the Open Inference Protocol has no name for"):
        async with opened(tmp_path, card()):
            raise AssertionError("it gives bfloat16")
