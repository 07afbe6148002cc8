"""The drawing kernel beside its twin in torch: the same tokens from the same settings, seeds and positions."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernels import DEVICE, torch

from reference_backend.engine.request import Sampling, Sequence  # noqa: E402  isort:skip
from reference_backend.engine.sampler import Rows, Sampler  # noqa: E402  isort:skip

KINDS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 0, 1, 2, 7, 1000]),
        "top_p": st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.9, 0.999]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
        "seed": st.integers(-(2**63), 2**63 - 1),
    }
)


def samplers(vocabulary, kinds, positions):
    """The kernel's and the twin's, with these settings in slots 0, 1, 2, ..."""
    both = [Sampler(vocabulary, torch.tensor(positions, device=DEVICE), has_kernel=which) for which in (True, False)]
    for slot, kind in enumerate(kinds):
        made = Sequence([0], Sampling(max_tokens=1, **kind))
        made.seed = kind["seed"]
        for each in both:
            each.load(slot, made)
    return both


def scores_of(rows, vocabulary, shape, seed):
    scores = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    if shape == "ties":
        scores = scores.round()
    if shape == "masked":  # as by a grammar
        scores[:, 1::2] = -torch.inf
    if shape == "nearly all masked":
        scores[:, 3:] = -torch.inf
    if shape == "broken":
        scores[0, 1], scores[-1] = torch.nan, -torch.inf
    if shape == "infinite":
        scores[0, vocabulary // 2] = torch.inf
    return scores.to(DEVICE)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(KINDS, min_size=1, max_size=3),
    st.sampled_from([4, 67, 9000]),
    st.sampled_from(["plain", "ties", "masked", "nearly all masked", "broken", "infinite"]),
    st.integers(0, 2**16),
    st.data(),
)
def test_they_draw_the_same(kinds, vocabulary, shape, position, data):
    slots = data.draw(st.permutations(range(len(kinds))))
    kernel, twin = samplers(vocabulary, kinds, [position + n for n in range(len(kinds))])
    rows = Rows(torch.tensor(slots, device=DEVICE))
    scores = scores_of(len(kinds), vocabulary, shape, position)
    assert kernel.draw(scores, rows).tolist() == twin.draw(scores, rows).tolist()
