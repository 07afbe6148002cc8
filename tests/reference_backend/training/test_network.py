"""What is trained is what is served."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from safetensors.torch import load_file, save_file  # noqa: E402

from reference_backend.engine.config import read_config  # noqa: E402
from reference_backend.engine.model import load_model  # noqa: E402
from reference_backend.training.network import Llama  # noqa: E402
from tests.support.plain_model import plain_logits  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_are_those_of_transformers(name):
    network = Llama(read_config(GOLDEN / name))
    network.load_state_dict(load_file(GOLDEN / name / "model.safetensors"), strict=name != "llama")  # tied: no lm_head
    golden = load_file(GOLDEN / name / "golden.safetensors")
    with torch.inference_mode():
        logits = network.logits(network(golden["tokens"]))[:, ::6]
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-4, atol=1e-4)


def test_what_is_trained_can_be_served(tmp_path):
    config = read_config(GOLDEN / "qwen2")
    network = Llama(config)
    (tmp_path / "config.json").write_bytes((GOLDEN / "qwen2" / "config.json").read_bytes())
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    with torch.inference_mode():
        trained = network.logits(network(torch.tensor([[1, 2, 3]])))[0]
    torch.testing.assert_close(plain_logits(load_model(tmp_path, torch.device("cpu")), [1, 2, 3]), trained)


def test_tied_weights_are_kept_once():
    network = Llama(read_config(GOLDEN / "llama"))
    assert network.lm_head.weight is network.model.embed_tokens.weight


def test_pieces_of_pictures_stand_in_for_their_tokens():
    network = Llama(read_config(GOLDEN / "llama"))
    tokens = torch.tensor([[1] + [2] * 16 + [3]])
    is_piece = tokens == 2
    dark, light = torch.randn(2, 16, network.config.hidden_size)
    with torch.inference_mode():
        one, two = (network(tokens, (is_piece, pieces)) for pieces in (dark, light))
        other = network(torch.where(is_piece, 5, tokens), (is_piece, dark))
    assert torch.equal(one, other)  # whatever token is there
    assert torch.equal(one[:, 0], two[:, 0])
    assert not torch.allclose(one[:, 1:], two[:, 1:])
