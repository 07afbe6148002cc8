"""Eight bits: how near they stay, and what the model of this repository still knows with them."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from safetensors.torch import load_file  # noqa: E402

from reference_backend.engine.config import NARROW  # noqa: E402
from reference_backend.engine.model import Llama, load_model  # noqa: E402
from reference_backend.engine.operations import Plain  # noqa: E402
from reference_backend.engine.quant import narrow_product, narrowed  # noqa: E402
from reference_backend.engine.ranks import ALONE  # noqa: E402
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_eight_bits_is_that_of_what_they_mean(dtype):
    """What is lost is lost in narrowing, not in multiplying; what that loses stays within a few hundredths."""
    generator = torch.Generator().manual_seed(1)
    x, matrix = (torch.randn(shape, generator=generator) for shape in [(130, 64), (48, 64)])
    x *= torch.logspace(-3, 3, 130)[:, None]
    (rows, scales), (kept, scale) = narrowed(x, "fp8"), narrowed(matrix, "fp8")
    found = narrow_product(rows, scales, kept.t(), scale, dtype)
    meant = (rows.float() * scales[:, None]) @ (kept.float() * scale[:, None]).t()
    assert found.dtype == dtype
    torch.testing.assert_close(found, meant.to(dtype), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)
    widened = x @ (kept.float() * scale[:, None]).t()
    assert torch.nn.functional.cosine_similarity(found.float(), widened, dim=1).min() > 0.998


class Narrow(Plain):
    """Prompts on a GPU that multiplies eight bits, on this CPU."""

    def linear(self, x, linear):
        if linear.scale is None:  # the head
            return super().linear(x, linear)
        return narrow_product(*narrowed(x, "fp8"), linear.matrix, linear.scale, x.dtype)


def test_the_tiny_model_hardly_notices_activations_in_eight_bits():
    """Beside the same weights with wide activations, over a text of its own kind."""
    wide, tokenizer = tiny()
    ids = tokenizer.encode("user: What is a circuit breaker?\nassistant: A circuit breaker stops calls to a backend.")
    operations = Narrow(wide.config, CPU, ALONE)
    weights = load_file(DIRECTORY / "model.safetensors")
    narrow = Llama(wide.config, weights, CPU, torch.float32, quantize="fp8", operations=operations)
    expected = plain_logits(load_model(DIRECTORY, CPU, quantize="fp8"), ids)
    distance = divergence(expected, found := plain_logits(narrow, ids))
    assert (expected.argmax(-1) == found.argmax(-1)).float().mean() >= 0.85
    assert 0 < distance <= 0.08


def divergence(expected, found):
    """The mean over tokens, in nats."""
    return (expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean().item()


@pytest.mark.parametrize(("kind", "least_agreement", "most_distance"), [("int8", 0.95, 0.003), ("fp8", 0.85, 0.05)])
def test_the_tiny_model_hardly_notices(kind, least_agreement, most_distance):
    """Over a text of its own kind: how often the likeliest token is the same, and the mean divergence in nats."""
    exact, tokenizer = tiny()
    ids = tokenizer.encode("user: What is a circuit breaker?\nassistant: A circuit breaker stops calls to a backend.")
    narrow = load_model(DIRECTORY, CPU, quantize=kind)
    expected, found = plain_logits(exact, ids), plain_logits(narrow, ids)
    agreement = (expected.argmax(-1) == found.argmax(-1)).float().mean().item()
    distance = divergence(expected, found)
    assert agreement >= least_agreement
    assert 0 < distance <= most_distance
