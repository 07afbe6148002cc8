"""Directories of models: what is found, which versions are wanted, what a model.toml may say."""

import pytest

from reference_backend.engine.config import ModelError
from reference_backend.repository import Card, Entry, names, split_id, versions, wanted
from reference_backend.tensors import TensorSpec

TOML = """
kind = "tensor"
executor = "torch_export"
file = "model.pt2"
max_batch = 32

[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 64]

[settings]
threads = 2
"""


@pytest.fixture
def root(tmp_path):
    for place in ("tiny/1", "tiny/2", "tiny/10", "tiny/old", "tiny/03", "mlp/7", "empty", "bad name/1"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "tiny" / "4").write_text("no directory")
    return tmp_path


def test_versions_are_numbers_and_in_their_order(root):
    assert [entry.version for entry in versions(root, "tiny")] == ["1", "2", "10"]
    assert versions(root, "mlp") == [Entry("mlp", "7", root / "mlp" / "7")]
    assert names(root) == ["mlp", "tiny"]


@pytest.mark.parametrize("name", ["gone", "bad name", "", "..", "../tiny", "tiny/1", "a" * 5000, "\0"])
def test_what_is_no_model_has_no_versions(root, name):
    assert versions(root, name) == []


def test_a_root_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ModelError, match="--repository takes a directory"):
        names(tmp_path / "gone")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("latest", ["10"]),
        ("latest-2", ["2", "10"]),
        ("latest-9", ["1", "2", "10"]),
        ("all", ["1", "2", "10"]),
        ("1,3,10", ["1", "10"]),
    ],
)
def test_a_policy_chooses_versions(root, policy, expected):
    assert [entry.version for entry in wanted(policy, versions(root, "tiny"))] == expected


@pytest.mark.parametrize("policy", ["", "newest", "latest-0", "latest-", "1,", "1;2", "-1"])
def test_a_policy_that_is_none_is_told(policy):
    with pytest.raises(ValueError, match="is none of: all, latest"):
        wanted(policy, [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("tiny", ("tiny", None)), ("tiny@2", ("tiny", "2")), ("a@b@c", ("a", "b@c")), ("@", ("", ""))],
)
def test_an_id_has_a_version_or_none(text, expected):
    assert split_id(text) == expected


def test_a_model_toml_is_read(tmp_path):
    (tmp_path / "model.toml").write_text(TOML)
    card = Entry("mlp", "1", tmp_path).card()
    assert (card.kind, card.executor, card.max_batch, card.settings) == ("tensor", "torch_export", 32, {"threads": 2})
    assert card.inputs == (TensorSpec("x", "FP32", (-1, 64)),)


def test_without_a_model_toml_it_is_a_language_model(tmp_path):
    assert Entry("tiny", "", tmp_path).card() == Card(kind="language")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"tensor"', '"sound"'), "kind"),
        (('executor = "torch_export"', ""), "needs an executor"),
        (('"tensor"', '"language"'), "language has none"),
        (("max_batch = 32", "max_batch = 0"), "max_batch"),
        (("max_batch", "max_batches"), "max_batches"),
        (('"FP32"', '"FP99"'), "FP99"),
        (("-1, 64", "-2, 64"), "sizes are 0 or more"),
        (('"model.pt2"', '"../model.pt2"'), "name of a file"),
        (("[settings]", "[settings"), "model.toml"),
        (("threads", "\udcff"), "model.toml"),
    ],
)
def test_a_model_toml_that_is_wrong_says_where(tmp_path, change, message):
    (tmp_path / "model.toml").write_bytes(TOML.replace(*change).encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=message):
        Entry("mlp", "1", tmp_path).card()
