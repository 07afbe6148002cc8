"""What is particular to ONNX files: threads, and texts. The rest: test_programs.py."""

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'weir[backend]')")
onnx = pytest.importorskip("onnx", reason="onnx is not installed (pip install onnx)")

from reference_backend.executors.onnx import load_session, opened  # noqa: E402
from reference_backend.repository import Card  # noqa: E402
from reference_backend.tensors import BadTensor, TensorSpec  # noqa: E402
from tests.support.example_models import EXAMPLES  # noqa: E402


async def test_threads_are_those_that_were_asked_for():
    options = load_session(EXAMPLES / "shapes-cnn" / "1" / "model.onnx", 2).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


async def test_texts_go_in_and_out_as_bytes(tmp_path):
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.STRING, ("rows", 2)) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "one", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    async with opened(tmp_path, Card(kind="tensor", executor="onnx", file="model.onnx", max_batch=4)) as model:
        assert model.inputs == (TensorSpec("x", "BYTES", (-1, 2)),)
        words = np.array([["zwölf".encode(), b"a"]], dtype=np.object_)
        assert (await model.infer({"x": words}))["y"].tolist() == words.tolist()
        with pytest.raises(BadTensor, match="x has bytes that are no UTF-8 text"):
            await model.infer({"x": np.array([[b"\xff", b""]], dtype=np.object_)})
