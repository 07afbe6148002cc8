"""Which tokens may be drawn, how often, and that a row's draw is its own."""

from collections import Counter

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.request import Sampling, Sequence  # noqa: E402
from reference_backend.engine.sampler import SPREAD, Sampler, log_waits, signed, told_logprobs  # noqa: E402

torch.set_num_threads(1)
CPU = torch.device("cpu")
ROWS, STEPS = 200, 20
DRAWS = ROWS * STEPS


def sequence(seed=1, prompt=(0,), generated=(), constraint=None, **sampling):
    made = Sequence(list(prompt), Sampling(max_tokens=10**6, **sampling))
    made.seed = seed
    made.tokens += generated
    made.constraint = constraint
    return made


class Only:
    """A grammar that never moves on."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def mask(self):
        words = -(-max(self.tokens, default=0) // 32) or 1
        return sum(1 << token for token in self.tokens).to_bytes(words * 4, "little")


class Bench:
    """A sampler with these sequences in slots 0, 1, 2, ..."""

    def __init__(self, *sequences, vocabulary=4):
        self.sequences = sequences
        self.lengths = torch.tensor([len(each.tokens) for each in sequences])
        self.sampler = Sampler(vocabulary, self.lengths)
        for slot, each in enumerate(sequences):
            self.sampler.load(slot, each)

    def drawn(self, scores, slots=None):
        slots = list(range(len(self.sequences))) if slots is None else slots
        present = [self.sequences[slot] for slot in slots]
        masks = b"".join(each.constraint.mask() for each in present if each.constraint is not None)
        drawn = self.sampler.sample(scores.clone(), self.sampler.rows(present, torch.tensor(slots)), masks)
        self.lengths[slots] += 1
        return drawn

    def draw(self, scores, slots=None):
        return self.drawn(scores, slots).tokens.tolist()


def tally(probabilities, **sampling):
    """How often each token comes, in STEPS draws of ROWS sequences with seeds of their own."""
    bench = Bench(*(sequence(seed, **sampling) for seed in range(ROWS)), vocabulary=len(probabilities))
    scores = torch.tensor([probabilities] * ROWS).log()
    return Counter(token for _ in range(STEPS) for token in bench.draw(scores))


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({"temperature": 0.0}, {1}),
        ({"temperature": 1e-9}, {1}),
        ({"temperature": 0.0, "top_k": 3, "min_p": 0.1}, {1}),
        ({"temperature": 0.02}, {1}),
        ({}, {0, 1, 2, 3}),
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.4}, {1}),
        ({"top_p": 0.6}, {1, 2}),
        ({"top_p": 0.75}, {1, 2, 0}),
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 50}, {0, 1, 2, 3}),
        ({"min_p": 0.6}, {1, 2}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "min_p": 0.6}, {1, 2}),
        ({"top_k": 3, "top_p": 0.5}, {1, 2}),  # of what top-k has left: 0.44 + 0.33 >= 0.5
        ({"top_p": 0.5}, {1, 2}),
        ({"top_k": 2, "top_p": 0.55}, {1}),  # 0.57 of what is left
    ],
)
def test_candidates_are_those_that_the_settings_leave(sampling, allowed):
    assert set(tally([0.2, 0.4, 0.3, 0.1], **sampling)) == allowed


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.1, 0.5, 0.15, 0.25]),
        ({"temperature": 2.0}, [0.168, 0.375, 0.205, 0.265]),
        ({"top_k": 3}, [0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9]),
        ({"top_p": 0.7}, [0, 2 / 3, 0, 1 / 3]),
        ({"min_p": 0.4}, [0, 2 / 3, 0, 1 / 3]),
    ],
)
def test_draws_follow_the_probabilities(sampling, expected):
    if sampling.get("temperature"):
        roots = [p**0.5 for p in (0.1, 0.5, 0.15, 0.25)]
        expected = [root / sum(roots) for root in roots]
    found = tally([0.1, 0.5, 0.15, 0.25], **sampling)
    chi_square = sum((found[i] - DRAWS * p) ** 2 / (DRAWS * p) for i, p in enumerate(expected) if p)
    assert chi_square < 16.3  # at most 3 degrees of freedom, p = 0.001
    assert sum(found[i] for i, p in enumerate(expected) if not p) == 0


def test_ties_are_broken_by_place_and_shared_by_chance():
    assert set(tally([0.25, 0.25, 0.25, 0.25], temperature=0.0)) == {0}
    assert set(tally([0.25, 0.25, 0.25, 0.25], top_k=1)) == {0}
    assert set(tally([0.25, 0.25, 0.25, 0.25], top_k=2)) == {0, 1, 2, 3}  # who is as likely as a candidate is one
    assert set(tally([0.3, 0.2, 0.3, 0.2], top_p=0.1)) == {0, 2}
    assert set(tally([0.3, 0.2, 0.3, 0.2], min_p=1.0)) == {0, 2}
    assert set(tally([0.25, 0.25, 0.25, 0.25])) == {0, 1, 2, 3}


def test_a_token_without_probability_is_never_drawn():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, -torch.inf]])
    for settings in ({}, {"top_p": 0.9}, {"top_k": 4}):
        bench = Bench(sequence(**settings))
        assert {bench.draw(scores)[0] for _ in range(200)} == {1}


@pytest.mark.parametrize("settings", [{"top_p": 0.9}, {"top_p": 0.01}, {"top_k": 300, "top_p": 0.999}, {"min_p": 0.5}])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_candidates_that_are_not_few_are_found_too(settings, spread):
    """Flat and steep distributions over more tokens than are looked at first."""
    scores = torch.randn(1, 700, generator=torch.Generator().manual_seed(1)) * spread
    probabilities, order = scores[0].softmax(-1).sort(descending=True)
    kept = probabilities[: settings.get("top_k", 700)]
    before = kept.cumsum(-1) - kept
    kept = kept[(before < settings.get("top_p", 1.0) * kept.sum()) & (kept >= settings.get("min_p", 0.0) * kept[0])]
    rows = 1 + 4 * len(kept)
    bench = Bench(*(sequence(seed, **settings) for seed in range(rows)), vocabulary=700)
    drawn = {token for _ in range(4) for token in bench.draw(scores.expand(rows, -1))}
    allowed = set(order[: len(kept)].tolist())
    assert drawn <= allowed
    assert len(drawn) > 0.5 * (1 / kept.square().sum() * kept.sum().square()).item()  # as many as weigh something


def test_a_row_draws_the_same_wherever_it_stands_and_whoever_is_there():
    """Every kind of row, alone and in batches of drawn companions: the same tokens."""
    generator = torch.Generator().manual_seed(5)
    kinds = [
        {"temperature": 0.0},
        {},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_k": 9, "top_p": 0.7},
        {"top_k": 1000, "top_p": 0.9, "min_p": 0.01},
        {"min_p": 0.1, "temperature": 1.3},
        {"frequency_penalty": 0.7, "presence_penalty": -0.3},
        {"repetition_penalty": 1.3, "top_p": 0.9},
        {"logprobs": 3},
        {"bias": ((3, 2.5), (39, -100.0)), "temperature": 1.2},
        {"constraint": Only(1, 31, 32, 39)},
        {"constraint": Only(0, 2, 38), "temperature": 0.0},
        {"constraint": Only(*range(30, 40)), "top_p": 0.7},
    ]
    scores = torch.randn(len(kinds), 30, 40, generator=generator) * 2

    def bench():
        return Bench(*(sequence(seed, **kind) for seed, kind in enumerate(kinds)), vocabulary=40)

    alone = bench()
    expected = [[alone.draw(scores[kind, step][None], [kind])[0] for step in range(30)] for kind in range(len(kinds))]
    together, found = bench(), [[] for _ in kinds]
    while any(len(row) < 30 for row in found):
        order = torch.randperm(len(kinds), generator=generator).tolist()
        present = [
            kind
            for kind in order[: 1 + int(torch.randint(len(kinds), (), generator=generator))]
            if len(found[kind]) < 30
        ]
        if present:
            batch = torch.stack([scores[kind, len(found[kind])] for kind in present])
            for kind, token in zip(present, together.draw(batch, present), strict=True):
                found[kind].append(token)
    assert found == expected


def test_a_sequence_that_begins_again_goes_on_as_if_it_had_not_left():
    scores = torch.randn(20, 1, 40, generator=torch.Generator().manual_seed(2))
    settings = {"top_p": 0.95, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    whole = Bench(sequence(**settings), vocabulary=40)
    tokens = [whole.draw(each)[0] for each in scores]
    resumed = Bench(sequence(generated=tokens[:9], **settings), vocabulary=40)
    assert [resumed.draw(each)[0] for each in scores[9:]] == tokens[9:]


def test_the_settings_of_the_one_before_are_gone():
    bench = Bench(sequence(prompt=[1], generated=[1, 1], frequency_penalty=1.0, repetition_penalty=2.0, top_k=1))
    for settings in ({"presence_penalty": 0.1}, {}):
        bench.sequences = [sequence(**settings)]
        bench.sampler.load(0, bench.sequences[0])
        drawn = {bench.draw(torch.tensor([[1.0, 1.0, 1.0, 1.0]]))[0] for _ in range(100)}
        assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"presence_penalty": 0.5}, [2.0, 1.5, -0.5, -1.0]),
        ({"frequency_penalty": 0.5}, [2.0, 1.0, -0.5, -1.0]),
        ({"repetition_penalty": 2.0}, [1.0, 1.0, 0.0, -1.0]),
        ({"repetition_penalty": 2.0, "presence_penalty": 0.5}, [1.0, 0.5, -0.5, -1.0]),
        ({"presence_penalty": -0.5}, [2.0, 2.5, 0.5, -1.0]),
    ],
)
def test_penalties_change_the_scores_of_what_was_said(settings, expected):
    """Token 0 was asked, 1 generated twice, 2 once."""
    bench = Bench(sequence(prompt=[0], generated=[1, 2, 1], temperature=0.0, **settings))
    scores = torch.tensor([[2.0, 2.0, 0.0, -1.0]])
    bench.sampler._penalize(scores, torch.tensor([0]), torch.tensor([0]))
    torch.testing.assert_close(scores, torch.tensor([expected]))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.9}])
def test_only_what_a_grammar_allows_is_drawn_and_bias_counts_among_that(settings):
    """The likeliest tokens are out of the question, and the next ones, of even chance, are told apart by bias."""
    scores = torch.tensor([[9.0, 1.0, 1.0, 8.0]])
    constrained = Bench(sequence(constraint=Only(1, 2), **settings))
    assert {constrained.draw(scores)[0] for _ in range(60)} == ({1} if settings == {"temperature": 0.0} else {1, 2})
    biased = Bench(sequence(constraint=Only(1, 2), bias=((2, 50.0), (0, 100.0)), **settings))
    assert {biased.draw(scores)[0] for _ in range(60)} == {2}


def test_what_may_draw_nothing_says_so():
    drawn = Bench(sequence(constraint=Only()), sequence(seed=2)).drawn(torch.zeros(2, 4))
    assert [token >= 0 for token in drawn.tokens.tolist()] == [False, True]


@pytest.mark.parametrize(("bias", "expected"), [(((1, -100.0),), 0), (((3, 4.5), (0, -1.0)), 3), ((), 1)])
def test_bias_is_added_to_the_scores(bias, expected):
    bench = Bench(sequence(temperature=0.0, bias=bias))
    assert bench.draw(torch.tensor([[2.0, 2.5, 0.0, -1.0]])) == [expected]


def test_what_is_drawn_is_counted():
    bench = Bench(sequence(temperature=0.0, frequency_penalty=1.0))
    scores = torch.tensor([[2.5, 1.4, 0.0, -9.0]])
    assert [bench.draw(scores)[0] for _ in range(5)] == [0, 0, 1, 0, 1]


def test_logprobs_are_those_of_the_model_before_all_settings():
    told, silent = sequence(temperature=0.0, logprobs=2, frequency_penalty=2.0, generated=[1]), sequence(logprobs=None)
    none = sequence(logprobs=0, temperature=0.0)
    scores = torch.tensor([[0.2, 0.4, 0.3, 0.1]] * 3).log()
    drawn = Bench(told, silent, none).drawn(scores)
    first, second, third = told_logprobs(drawn, [each.sampling for each in (told, silent, none)])
    assert drawn.tokens[0] == 2
    assert first.chosen == pytest.approx(torch.tensor(0.3).log().item())
    assert [token for token, _ in first.top] == [1, 2]
    assert [value for _, value in first.top] == pytest.approx(torch.tensor([0.4, 0.3]).log().tolist())
    assert second is None
    assert (third.chosen, third.top) == (pytest.approx(torch.tensor(0.4).log().item()), ())


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"presence_penalty": 1.0}])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_told_and_touch_nobody_else(settings, bad):
    scores = torch.tensor([[0.2, 0.4, 0.3, 0.1]] * 2).log()
    expected = Bench(sequence(**settings), sequence(seed=2, **settings)).draw(scores)
    scores[0, 2] = bad
    drawn = Bench(sequence(**settings), sequence(seed=2, **settings)).drawn(scores)
    assert drawn.tokens.tolist() == [-1, expected[1]]


def test_chance_is_even_and_independent():
    """Over seeds, positions and tokens: the waits are exponential, and none is like its neighbours in any direction."""
    tokens, seeds, positions = torch.arange(400), torch.arange(-20, 20), torch.arange(50)
    spread = (tokens * SPREAD).to(torch.int32)[None, None]
    keys = (seeds * 0x5851F42D4C957F2D).to(torch.int32)[:, None, None]
    at = positions.int()[None, :, None]
    waits = log_waits(spread, keys + at, (keys >> 7) + at * signed(SPREAD)).double().exp()
    assert ((waits > 0) & waits.isfinite()).all()
    chances = 1 - (-waits).exp()
    counts = torch.histc(chances, bins=100, min=0, max=1)
    assert ((counts - 8000) ** 2 / 8000).sum() < 149  # 99 degrees of freedom, p = 0.001
    rare = (waits < 1e-3).sum().item()
    assert abs(rare - 800) < 3.3 * 800**0.5  # the shortest are as frequent as they should be, too
    for axis in range(3):
        pair = torch.stack(
            [
                each.flatten()
                for each in (
                    chances.narrow(axis, 0, chances.shape[axis] - 1),
                    chances.narrow(axis, 1, chances.shape[axis] - 1),
                )
            ]
        )
        assert abs(torch.corrcoef(pair)[0, 1]) < 3.3 / pair.shape[1] ** 0.5
