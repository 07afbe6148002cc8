"""What each narrower form does to a small model: near the whole one, smaller, and the whole one untouched."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
pytest.importorskip("torchao", reason="torchao is not installed (pip install 'weir[backend]')")

from reference_backend.executors import quantize  # noqa: E402
from reference_backend.executors.bert import Bert, BertConfig  # noqa: E402
from reference_backend.executors.quantize import Pair  # noqa: E402

torch.set_num_threads(1)
PAIRS = [Pair("0", "2")]


@pytest.fixture
def model():
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    return layers.eval().requires_grad_(requires_grad=False)


@pytest.fixture
def samples():
    torch.manual_seed(2)
    return torch.randn(40, 32)


def near(model, form, samples):
    found = form(samples.to(next(form.parameters()).dtype)).float()
    return float(torch.cosine_similarity(model(samples), found, dim=-1).mean())


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (quantize.bfloat16, 0.9999),
        (quantize.int8_dynamic, 0.999),
        (quantize.fp8, 0.998),
        (quantize.two_of_four, 0.7),
    ],
)
def test_answers_stay_near_and_the_whole_model_as_it_is(model, samples, make, least):
    before = copy.deepcopy(model.state_dict())
    form = make(model)
    assert least < near(model, form, samples) < 1.0
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_static_scales_are_those_that_the_samples_reach(model, samples):
    form = quantize.int8_static(model, lambda each: each(samples))
    assert near(model, form, samples) > 0.999
    assert near(model, form, 20 * samples) < 0.9  # what is beyond them is cut
    assert near(model, quantize.int8_dynamic(model), 20 * samples) > 0.999


def test_two_of_four_are_zero_and_they_are_the_smaller_ones(model):
    groups = quantize.two_of_four(model)[0].weight.view(-1, 4)
    whole = model[0].weight.view(-1, 4).abs()
    assert ((groups == 0).sum(-1) == 2).all()
    kept = whole.where(groups != 0, torch.inf).min(-1).values
    assert (kept >= whole.where(groups == 0, 0.0).max(-1).values).all()


def test_pruning_takes_the_channels_that_do_least(model, samples):
    model[0].weight[8:24] = 0.0
    model[0].bias[8:24] = 0.0  # nothing comes out of these
    form = quantize.pruned(model, PAIRS, 0.75, lambda each: each(samples))
    assert (form[0].out_features, form[2].in_features, model[0].out_features) == (48, 48, 64)
    torch.testing.assert_close(form(samples), model(samples))
    half = quantize.pruned(model, PAIRS, 0.5, lambda each: each(samples))
    assert 0.5 < near(model, half, samples) < 0.9999


def test_distilling_brings_a_pruned_model_nearer(model, samples):
    def half():
        return quantize.pruned(model, PAIRS, 0.5, lambda each: each(samples))

    taught = quantize.distilled(half(), model, [(torch.randn(64, 32),) for _ in range(200)], rate=3e-3)
    assert near(model, taught, samples) > near(model, half(), samples)
    assert not any(weight.requires_grad for weight in taught.parameters())


def test_distilling_keeps_two_of_four_at_zero(model, samples):
    sparse = quantize.two_of_four(model)
    zeros = sparse[2].weight == 0
    taught = quantize.distilled(
        quantize.two_of_four(model), model, [(torch.randn(64, 32),) for _ in range(100)], rate=3e-3
    )
    assert torch.equal(taught[2].weight == 0, zeros)
    assert near(model, taught, samples) > near(model, sparse, samples)


def test_an_encoder_of_packed_texts_can_be_made_narrower():
    torch.manual_seed(1)
    bert = Bert(BertConfig(64, 32, 64, 2, 4, 32, 2, 1e-12)).eval().requires_grad_(requires_grad=False)
    tokens, lengths = torch.randint(0, 64, (20,)), [12, 8]
    channels = [Pair(f"layers.{index}.up", f"layers.{index}.down") for index in range(2)]
    heads = [Pair(f"layers.{index}.qkv", f"layers.{index}.out", width=8, parts=3) for index in range(2)]

    def run(model):
        model(tokens, lengths)

    for form in (
        quantize.bfloat16(bert), quantize.int8_dynamic(bert), quantize.int8_static(bert, run), quantize.fp8(bert),
        quantize.two_of_four(bert), quantize.pruned(bert, channels + heads, 0.75, run),
    ):  # fmt: skip
        assert torch.isfinite(form(tokens, lengths).float()).all()

    for layer, idle in zip(bert.layers, (1, 3), strict=True):
        layer.out.weight[:, 8 * idle : 8 * idle + 8] *= 1e-9  # this head says next to nothing
    fewer = quantize.pruned(bert, heads, 0.75, run)
    assert [(layer.qkv.out_features, layer.out.in_features) for layer in fewer.layers] == [(72, 24)] * 2
    torch.testing.assert_close(fewer(tokens, lengths), bert(tokens, lengths))
    assert torch.equal(fewer.layers[0].qkv.weight[24:32], bert.layers[0].qkv.weight[32:40])  # keys of the first head
