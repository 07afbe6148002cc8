"""What holds of each executor that reads a program from a file: the example's answers, names, and files that are none."""

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'weir[backend]')")
onnx = pytest.importorskip("onnx", reason="onnx is not installed (pip install onnx)")

from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.repository import Card, Entry  # noqa: E402
from reference_backend.tensors import TensorSpec, executor  # noqa: E402
from reference_backend.training.shapes import pictures  # noqa: E402
from tests.support.example_models import EXAMPLES  # noqa: E402

TYPES = {"FP32": (torch.float32, onnx.TensorProto.FLOAT), "BF16": (torch.bfloat16, onnx.TensorProto.BFLOAT16)}


@dataclass(frozen=True)
class Reader:
    """An executor, the example that it runs, what of the example's bytes makes no sense when it is another word."""

    name: str
    file: str
    example: str
    word: bytes

    @property
    def directory(self):
        return EXAMPLES / self.example / "1"

    def opened(self, directory, **card):
        return executor(self.name)(directory, Card(kind="tensor", executor=self.name, file=self.file, **card))


READERS = (
    Reader("torch_export", "model.pt2", "shapes-mlp", b"graph_module"),
    Reader("onnx", "model.onnx", "shapes-cnn", b"Conv"),
)


@pytest.fixture(params=READERS, ids=lambda reader: reader.name)
def reader(request):
    return request.param


class Negative(torch.nn.Module):
    def forward(self, x):
        return -x


def save(reader, directory, datatype="FP32"):
    """A program that takes [rows, 2] and gives the negative."""
    of_torch, of_onnx = TYPES[datatype]
    path = directory / reader.file
    if reader.name == "torch_export":
        rows = torch.export.Dim("rows", min=1, max=8)
        example = torch.zeros(2, 2, dtype=of_torch)
        torch.export.save(torch.export.export(Negative(), (example,), dynamic_shapes=({0: rows},)), path)
    else:
        x, y = (onnx.helper.make_tensor_value_info(name, of_onnx, ("rows", 2)) for name in "xy")
        graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "one", [x], [y])
        opset = onnx.helper.make_opsetid("", 20)
        path.write_bytes(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString())


async def test_the_example_answers_well_and_the_same_alone_and_among_others(reader):
    pixels, kinds = pictures(100, training=False)
    card = Entry(reader.example, "1", reader.directory).card()
    async with executor(reader.name)(reader.directory, card) as model:
        assert (model.inputs[0].name, model.inputs[0].shape) == ("pixels", (-1, 32, 32, 3))
        together = [(await model.infer({"pixels": part.numpy()}))["scores"] for part in pixels.split(20)]
        alone = [(await model.infer({"pixels": each[None].numpy()}))["scores"] for each in pixels[:20]]
    np.testing.assert_allclose(together[0], np.concatenate(alone), rtol=1e-4, atol=1e-4)
    assert (np.concatenate(together).argmax(-1) == kinds.numpy()).mean() > 0.85


async def test_names_may_be_others_than_the_file_s(reader, tmp_path):
    save(reader, tmp_path)
    ones = np.ones((1, 2), np.float32)
    ones.flags.writeable = False  # as what has come with a request is
    async with reader.opened(tmp_path) as model:
        assert model.inputs == (TensorSpec("x", "FP32", (-1, 2)),)
        assert [array.tolist() for array in (await model.infer({"x": ones})).values()] == [[[-1, -1]]]
    named = {"inputs": (TensorSpec("in", "FP32", (-1, 2)),), "outputs": (TensorSpec("out", "FP32", (-1, 2)),)}
    async with reader.opened(tmp_path, max_batch=8, **named) as model:
        assert (await model.infer({"in": ones}))["out"].tolist() == [[-1, -1]]


@pytest.mark.parametrize("fault", ["empty", "nonsense", "cut off", "spoilt inside"])
async def test_a_broken_file_is_told_in_a_line(reader, fault, tmp_path):
    whole = (reader.directory / reader.file).read_bytes()
    spoilt = {
        "empty": b"",
        "nonsense": b"nonsense",
        "cut off": whole[: len(whole) // 2],
        "spoilt inside": whole.replace(reader.word, reader.word[::-1]),
    }
    (tmp_path / reader.file).write_bytes(spoilt[fault])
    with pytest.raises(ModelError, match=rf"{reader.file}: cannot be read as an? .+: .+") as told:
        async with reader.opened(tmp_path):
            raise AssertionError("it is broken")
    assert "\n" not in str(told.value)


async def test_a_type_that_has_no_name_here_is_refused(reader, tmp_path):
    save(reader, tmp_path, "BF16")
    with pytest.raises(ModelError, match="cannot be read as|x is of a type that the Open Inference Protocol has no"):
        async with reader.opened(tmp_path):
            raise AssertionError("it takes bfloat16")
