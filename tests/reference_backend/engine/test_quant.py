"""Eight bits: how near they stay, and what the model of this repository still knows with them."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.config import NARROW  # noqa: E402
from reference_backend.engine.model import load_model  # noqa: E402
from reference_backend.engine.quant import narrowed  # noqa: E402
from tests.support.plain_model import plain_logits  # noqa: E402
from tests.support.tiny_model import DIRECTORY, tiny  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "worst"), [("int8", 0.5 / 127), ("fp8", 1 / 16)])
def test_each_number_stays_near(kind, worst):
    """int8: within half a step of its row. fp8: three bits of mantissa, within a sixteenth of itself."""
    matrix = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 3, 40)[:, None]
    kept, scale = narrowed(matrix, kind)
    assert kept.element_size() == 1
    error = (kept.float() * scale[:, None] - matrix).abs()
    reference = matrix.abs().amax(1, keepdim=True) if kind == "int8" else matrix.abs()
    smallest = scale[:, None] * 2**-10 if kind == "fp8" else 0.0  # below that fp8 has but steps, too
    assert (error <= worst * 1.0001 * reference + smallest).all()


@pytest.mark.parametrize("kind", NARROW)
def test_rows_of_zeros_and_the_largest_numbers_survive(kind):
    matrix = torch.tensor([[0.0, 0.0], [-3e38, 1e38], [0.0, 1e-30]])
    kept, scale = narrowed(matrix, kind)
    torch.testing.assert_close(kept.float() * scale[:, None], matrix, rtol=0.07, atol=0.0)


@pytest.mark.parametrize(("kind", "least_agreement", "most_distance"), [("int8", 0.95, 0.003), ("fp8", 0.85, 0.05)])
def test_the_tiny_model_hardly_notices(kind, least_agreement, most_distance):
    """Over a text of its own kind: how often the likeliest token is the same, and the mean divergence in nats."""
    exact, tokenizer = tiny()
    ids = tokenizer.encode("user: What is a circuit breaker?\nassistant: A circuit breaker stops calls to a backend.")
    narrow = load_model(DIRECTORY, CPU, quantize=kind)
    expected, found = plain_logits(exact, ids), plain_logits(narrow, ids)
    agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean().item()
    distance = (expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean().item()
    assert agreement >= least_agreement
    assert 0 < distance <= most_distance
