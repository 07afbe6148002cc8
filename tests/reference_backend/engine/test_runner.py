"""Plans carried out by hand, without scheduler and engine: the rows on the device are what they should be."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from reference_backend.engine.model import load_model  # noqa: E402
from reference_backend.engine.request import Sampling, Sequence  # noqa: E402
from reference_backend.engine.runner import Runner  # noqa: E402
from reference_backend.engine.scheduler import Work  # noqa: E402
from tests.support.plain_model import greedy_reference, plain_logits  # noqa: E402

torch.set_num_threads(1)
MODEL = load_model(Path(__file__).parent.parent / "golden" / "llama", torch.device("cpu"))
TEXT = list(range(20, 31))


def runner(slots=2, **options):
    return Runner(MODEL, slots=slots, blocks=20, block_size=4, context=32, **options)


def placed(slot, blocks, tokens=TEXT, sampling=None):
    made = Sequence(list(tokens), Sampling(max_tokens=9, **(sampling or {"temperature": 0.0})))
    made.slot, made.blocks = slot, blocks
    return made


def works(sequence, start, count, *, is_new=False, is_decode=False, samples=True):
    return Work(sequence, start, count, is_new, is_decode, samples)


def tokens_of(launched):
    return [(sequence, token) for sequence, token, _ in launched.results()]


def test_a_piece_that_does_not_end_the_prompt_draws_nothing():
    subject, asked = runner(), placed(1, [7, 3, 9])
    launched = subject.launch([works(asked, 0, 6, is_new=True, samples=False)])
    assert launched.results() == []
    assert subject._lengths.tolist() == [0, 6, 0]
    [(_, token)] = tokens_of(subject.launch([works(asked, 6, 5)]))
    assert token == greedy_reference(MODEL, TEXT, 1)[0]
    assert subject._tables[1].tolist() == [7, 3, 9, 0, 0, 0, 0, 0, 0]


def test_decoding_reads_its_token_from_the_device():
    """Three steps are launched before any of them is read."""
    subject, asked = runner(), placed(0, [2, 1, 5, 4])
    steps = [subject.launch([works(asked, 0, 11, is_new=True)])]
    steps += [subject.launch([works(asked, 11 + n, 1, is_decode=True)]) for n in range(3)]
    assert [tokens_of(step)[0][1] for step in steps] == greedy_reference(MODEL, TEXT, 4)
    assert subject._lengths.tolist() == [14, 0, 0]


def test_a_step_mixes_who_generates_and_who_reads():
    subject, first, second = runner(), placed(0, [1, 2, 3, 4]), placed(1, [5, 6], TEXT[:6])
    subject.launch([works(first, 0, 11, is_new=True)])
    launched = subject.launch([works(first, 11, 1, is_decode=True), works(second, 0, 6, is_new=True)])
    expected = [greedy_reference(MODEL, TEXT, 2)[1], greedy_reference(MODEL, TEXT[:6], 1)[0]]
    assert tokens_of(launched) == list(zip([first, second], expected, strict=True))


def test_a_slot_forgets_who_was_there():
    subject, first = runner(slots=1), placed(0, [1, 2, 3])
    subject.launch([works(first, 0, 11, is_new=True)])
    second = placed(0, [4], TEXT[:3])
    launched = subject.launch([works(second, 0, 3, is_new=True)])
    assert subject._tables[0].tolist() == [4, *[0] * 8]
    assert tokens_of(launched) == [(second, int(plain_logits(MODEL, TEXT[:3])[-1].argmax()))]


def test_cleared_blocks_are_zero():
    subject, asked = runner(), placed(0, [1, 2, 3])
    subject.launch([works(asked, 0, 11, is_new=True)])
    subject.clear([2])
    kept = subject._cache.gather(0, torch.tensor([1, 2, 3]), 3).abs().sum((1, 2, 3)) > 0
    assert kept.tolist() == [True, False, True]


class Watched(TorchDispatchMode):
    """What torch is asked for outside of a prepared step."""

    def __init__(self):
        super().__init__()
        self.asked, self.is_inside = [], False

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        if not self.is_inside:
            self.asked.append(function.name())
        return function(*args, **kwargs or {})

    def prepare(self, step):
        def repeat():
            self.is_inside = True
            taken = step()
            self.is_inside = False
            return taken

        return repeat


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 9, "top_p": 0.8, "seed": 3}])
def test_who_goes_on_generating_needs_nothing_from_the_host(sampling):
    """Beside the recorded step, which draws, too, there is but a copy on the device of what it drew."""
    watched = Watched()
    subject, ordinary = runner(prepare=watched.prepare), runner()
    asked = [placed(0, [2, 1, 5, 4], sampling=sampling) for _ in range(2)]
    plans = [[works(asked[0], 11 + n, 1, is_decode=True)] for n in range(2)]
    subject.launch([works(asked[0], 0, 11, is_new=True)])
    subject.launch(plans[0])
    with watched:
        drawn = subject.launch(plans[1])
    assert watched.asked == ["aten::slice.Tensor", "aten::slice.Tensor", "aten::clone"]
    ordinary.launch([works(asked[1], 0, 11, is_new=True)])
    ordinary.launch([works(asked[1], 11, 1, is_decode=True)])
    [(_, expected)] = tokens_of(ordinary.launch([works(asked[1], 12, 1, is_decode=True)]))
    assert tokens_of(drawn) == [(asked[0], expected)]


def test_a_prepared_step_is_the_ordinary_one():
    """Three of five slots go on, filled up to four rows with nobody's; block 0 and the free slots stay as they are."""
    steps = []

    def prepare(step):
        def counted():
            steps.append(1)
            return step()

        return counted

    def run(subject):
        asked = [placed(slot, [1 + 3 * slot + n for n in range(3)], TEXT[: 3 + slot // 2]) for slot in (4, 0, 2)]
        subject.launch([works(each, 0, len(each.tokens), is_new=True) for each in asked])
        found = []
        for n in range(6):
            plan = [works(each, len(each.tokens) + n, 1, is_decode=True) for each in asked]
            found.append({each.slot: token for each, token in tokens_of(subject.launch(plan))})
        return found

    prepared, ordinary = runner(slots=5, prepare=prepare), runner(slots=5)
    assert run(prepared) == run(ordinary)
    assert len(steps) == 6
    assert prepared._lengths.tolist() == ordinary._lengths.tolist()
    assert prepared._last_tokens.tolist()[:5] == ordinary._last_tokens.tolist()[:5]
    kept, other = (each._cache.gather(1, torch.arange(20), 20) for each in (prepared, ordinary))
    torch.testing.assert_close(kept, other)
    assert kept[0].abs().sum() == 0
