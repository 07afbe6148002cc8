"""An ONNX file: the one of the examples, ones made here, and files that are none."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'weir[backend]')")
onnx = pytest.importorskip("onnx", reason="onnx is not installed (pip install onnx)")

from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.executors.onnx import load_session, opened  # noqa: E402
from reference_backend.repository import Card, Entry  # noqa: E402
from reference_backend.tensors import BadTensor, TensorSpec, executor  # noqa: E402
from reference_backend.training.shapes import pictures  # noqa: E402
from tests.support.example_models import EXAMPLES  # noqa: E402

DIRECTORY = EXAMPLES / "shapes-cnn" / "1"


def card(**fields):
    return Card(kind="tensor", executor="onnx", file="model.onnx", **fields)


def save(directory, operator, dtype, shape=("rows", 2)):
    """A model of one operator, from `x` to `y`."""
    x, y = (onnx.helper.make_tensor_value_info(name, dtype, shape) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node(operator, ["x"], ["y"])], "one", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (directory / "model.onnx").write_bytes(model.SerializeToString())


async def test_the_example_answers_as_the_file_does_alone_and_among_others():
    pixels, kinds = pictures(200, training=False)
    entry = Entry("shapes-cnn", "1", DIRECTORY)
    async with executor("onnx")(DIRECTORY, entry.card()) as model:
        together = [await model.infer({"pixels": part.numpy()}) for part in pixels.split(50)]
        alone = [await model.infer({"pixels": each[None].numpy()}) for each in pixels[:50]]
    scores = np.concatenate([each["scores"] for each in together])
    np.testing.assert_allclose(scores[:50], np.concatenate([each["scores"] for each in alone]), rtol=1e-4, atol=1e-4)
    assert (scores.argmax(-1) == kinds.numpy()).mean() > 0.9


async def test_threads_are_those_that_were_asked_for():
    options = load_session(DIRECTORY / "model.onnx", 2).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


async def test_texts_go_in_and_out_as_bytes(tmp_path):
    save(tmp_path, "Identity", onnx.TensorProto.STRING)
    async with opened(tmp_path, card(max_batch=4)) as model:
        assert model.inputs == (TensorSpec("x", "BYTES", (-1, 2)),)
        words = np.array([["zwölf".encode(), b"a"]], dtype=np.object_)
        assert (await model.infer({"x": words}))["y"].tolist() == words.tolist()
        with pytest.raises(BadTensor, match="x has bytes that are no UTF-8 text"):
            await model.infer({"x": np.array([[b"\xff", b""]], dtype=np.object_)})


async def test_names_may_be_others_than_the_file_s(tmp_path):
    save(tmp_path, "Neg", onnx.TensorProto.FLOAT)
    named = {"inputs": (TensorSpec("in", "FP32", (-1, 2)),), "outputs": (TensorSpec("out", "FP32", (-1, 2)),)}
    async with opened(tmp_path, card(**named)) as model:
        assert (await model.infer({"in": np.ones((1, 2), np.float32)}))["out"].tolist() == [[-1, -1]]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"",
        lambda _: b"nonsense",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"Conv", b"Coil"),
    ],
    ids=["empty", "nonsense", "cut off", "an operator that is none"],
)
async def test_a_broken_file_is_told_in_a_line(tmp_path, spoil):
    (tmp_path / "model.onnx").write_bytes(spoil((DIRECTORY / "model.onnx").read_bytes()))
    with pytest.raises(ModelError, match=r"model.onnx: cannot be read as an ONNX model: .+") as told:
        async with opened(tmp_path, card()):
            raise AssertionError("it is broken")
    assert "\n" not in str(told.value)


async def test_a_type_that_has_no_name_here_is_refused(tmp_path):
    save(tmp_path, "Neg", onnx.TensorProto.BFLOAT16)
    with pytest.raises(ModelError, match="cannot be read as|tensor x is of a type"):
        async with opened(tmp_path, card()):
            raise AssertionError("it takes bfloat16")
