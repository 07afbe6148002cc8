"""The network that paints: what it understands, what shape it has, what it refuses to be loaded from."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from safetensors.torch import save_file  # noqa: E402

from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.engine.flow import Flow, guided, load_flow, read_flow_config  # noqa: E402
from tests.support.random_flow import CONFIG, random_flow  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("prompt", "understood"),
    [
        ("a big red circle", ["big", "red", "circle"]),
        ("Please draw a RED circle, in the center!", ["red", "circle", "centre"]),
        ("a large disc and a circle", ["big", "circle", "circle"]),
        ("an elephant", []),
        ("", []),
        ("red " * 9, ["red"] * 6),
    ],
)
def test_what_is_understood_of_a_prompt(tmp_path, prompt, understood):
    config = random_flow(tmp_path).config
    assert config.understand(prompt) == understood
    assert config.numbers(understood) == [CONFIG["words"].index(word) + 1 for word in understood]


def test_a_direction_has_the_shape_of_the_picture_and_depends_on_all_that_is_given(tmp_path):
    network = random_flow(tmp_path)
    pictures, times = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    words = torch.tensor([[1, 2, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0]])
    with torch.inference_mode():
        plain = network(pictures, times, words)
        assert plain.shape == pictures.shape
        for other in (
            network(pictures + 1, times, words),
            network(pictures, times + 0.1, words),
            network(pictures, times, words + 1),
        ):
            assert not torch.allclose(plain, other)
        torch.testing.assert_close(network(pictures[1:], times[1:], words[1:]), plain[1:])


def test_guidance_goes_from_what_is_drawn_without_words_beyond_what_is_drawn_with_them(tmp_path):
    network = random_flow(tmp_path)
    pictures, times, words = torch.randn(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([[1, 2, 3, 0, 0, 0]])
    with torch.inference_mode():
        said, unsaid = network(pictures, times, words), network(pictures, times, torch.zeros_like(words))
        for guidance in (0.0, 1.0, 3.0):
            expected = unsaid + guidance * (said - unsaid)
            torch.testing.assert_close(
                guided(network, pictures, times, words, guidance), expected, atol=1e-5, rtol=1e-4
            )


def test_an_untrained_network_says_nothing(tmp_path):
    random_flow(tmp_path)
    network = Flow(read_flow_config(tmp_path / "config.json"))
    with torch.inference_mode():
        direction = network(torch.randn(1, 3, 8, 8), torch.tensor([0.5]), torch.zeros(1, 6, dtype=torch.int64))
    pieces = direction.unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3)
    assert pieces.std(dim=2).max() < 1e-6  # all are the head's bias


def test_what_was_saved_is_loaded(tmp_path):
    network = random_flow(tmp_path)
    loaded = load_flow(tmp_path, CPU)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize(
    "change",
    [{"side": 9}, {"heads": 3}, {"layers": 0}, {"patch": "x"}, {"words": None}, {"synonyms": []}, {"longest": None}],
)
def test_a_config_that_describes_no_network_is_told_with_its_file(tmp_path, change):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ModelError, match=r"config\.json"):
        read_flow_config(tmp_path / "config.json")


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", "other"])
def test_broken_weights_are_told_with_their_file(tmp_path, content):
    random_flow(tmp_path)
    path = tmp_path / "model.safetensors"
    if content is None:
        path.unlink()
    elif content == "other":
        save_file({"place": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be used"):
        load_flow(tmp_path, CPU)
