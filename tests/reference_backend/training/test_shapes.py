"""The example models for tensors: what they learn, and that what is written is what was trained."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.executors.torch_export import load_program  # noqa: E402
from reference_backend.repository import Entry, names  # noqa: E402
from reference_backend.training.shapes import Mlp, pictures, right, train, write  # noqa: E402
from tests.support.example_models import EXAMPLES  # noqa: E402


def test_a_few_steps_teach_more_than_chance_and_what_is_written_is_the_same(tmp_path):
    learnt, examined = pictures(600, training=True), pictures(100, training=False)
    torch.manual_seed(1)
    model = Mlp(32)
    train(model, *learnt, epochs=40)
    share = right(model, *examined)
    assert share > 0.4
    write("shapes", "torch_export", "model.pt2", model, examined, tmp_path)
    written, some = load_program(tmp_path / "shapes" / "1" / "model.pt2").module(), [part[:64] for part in examined]
    assert right(written, *some) == right(model, *some)
    assert f"Right on {share:.1%} of 100" in (tmp_path / "shapes" / "1" / "MODEL_CARD.md").read_text()
    assert Entry("shapes", "1", tmp_path / "shapes" / "1").card().max_batch == 64


def test_the_examples_are_a_repository_without_a_path_of_whoever_made_them():
    assert {"shapes-cnn", "shapes-mlp"} <= set(names(EXAMPLES))
    for path in EXAMPLES.rglob("model.onnx"):
        assert b"site-packages" not in path.read_bytes()
    [path] = EXAMPLES.rglob("model.pt2")
    assert all("stack_trace" not in node.meta for node in load_program(path).graph.nodes)
