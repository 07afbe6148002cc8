"""The eye, and how what it sees enters the engine: the same with and without cache, chunks, neighbours, preemption."""

from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
from safetensors.torch import save_file  # noqa: E402

from reference_backend.engine import vision as eye  # noqa: E402
from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.engine.engine import Engine, Settings  # noqa: E402
from reference_backend.engine.model import load_model  # noqa: E402
from reference_backend.engine.request import PICTURE_TOKENS, Picture, Sampling, Sequence  # noqa: E402
from reference_backend.engine.vision import Vision, album, load_vision  # noqa: E402
from tests.support.integrity import faults  # noqa: E402
from tests.support.plain_model import dense  # noqa: E402

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent.parent / "golden" / "llama"
PAD = 7


def pixels(seed):
    return Random(seed).randbytes(32 * 32 * 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model that sees."""
    directory = tmp_path_factory.mktemp("sees")
    for path in GOLDEN.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    torch.manual_seed(1)
    save_file(
        Vision(load_model(GOLDEN, torch.device("cpu")).config.hidden_size).state_dict(),
        directory / "vision.safetensors",
    )
    return load_model(directory, torch.device("cpu"))


def engine(model, **sizes):
    settings = Settings(**({"slots": 4, "context": 64, "cache_tokens": 256, "block_size": 4} | sizes))
    return Engine(model, settings, end_tokens=frozenset(), rng=Random(1))


def shown(seed, *, before=(1, 2, 3, 4, 5), after=(9, 8), max_tokens=6):
    prompt = [*before, *[PAD] * PICTURE_TOKENS, *after]
    return Sequence(
        prompt, Sampling(max_tokens=max_tokens, temperature=0.0), pictures=[Picture(len(before), pixels(seed))]
    )


def run(subject, *sequences):
    for each in sequences:
        subject.submit(each)
    while subject.is_busy:
        subject.turn(0.0)
        assert faults(subject.scheduler) == []
    return [each.generated for each in sequences]


@torch.inference_mode()
def reference(model, sequence):
    """Each token from a pass over the whole text, without engine."""
    tokens, (picture,) = list(sequence.prompt), sequence.pictures
    rows = torch.arange(picture.start, picture.start + PICTURE_TOKENS)
    seen = rows, album(model.vision)(picture.pixels)
    for _ in range(sequence.sampling.max_tokens):
        hidden = model.hidden(torch.tensor(tokens), torch.arange(len(tokens)), dense, seen)
        tokens.append(int(model.logits(hidden[-1:]).argmax()))
    return tokens[len(sequence.prompt) :]


def test_the_answer_is_that_of_the_plain_model_and_depends_on_the_picture(model):
    answers = {tuple(reference(model, shown(seed))) for seed in range(6)}
    assert len(answers) > 1
    for seed in range(6):
        assert run(engine(model), shown(seed)) == [reference(model, shown(seed))]


@pytest.mark.parametrize("step_tokens", [4, 5, 7, 64])
def test_chunks_and_neighbours_change_nothing(model, step_tokens):
    asked = [shown(seed, before=range(1, 2 + seed)) for seed in range(5)]
    expected = [reference(model, each) for each in asked]
    assert run(engine(model, step_tokens=step_tokens), *asked) == expected


def test_preemption_changes_nothing(model):
    subject = engine(model, cache_tokens=64)
    asked = [shown(seed, max_tokens=20) for seed in range(4)]
    expected = [reference(model, each) for each in asked]
    assert run(subject, *asked) == expected
    assert subject.load().preemptions > 0


def test_equal_text_with_another_picture_shares_only_what_is_before_it(model):
    subject = engine(model)
    run(subject, shown(1))
    again, other = shown(1), shown(2)
    assert run(subject, again, other) == [reference(model, shown(1)), reference(model, shown(2))]
    assert again.cached_tokens == 20  # of 23: all whole blocks but the one with the last token
    assert other.cached_tokens == 4  # the block before the picture


def test_two_pictures_in_one_prompt(model):
    def asked(*seeds):
        prompt = [1, *[PAD] * PICTURE_TOKENS, 2, *[PAD] * PICTURE_TOKENS, 3]
        pictures = [Picture(1, pixels(seeds[0])), Picture(18, pixels(seeds[1]))]
        return Sequence(prompt, Sampling(max_tokens=4, temperature=0.0), pictures=pictures)

    whole, chunked = run(engine(model), asked(1, 2)), run(engine(model, step_tokens=5), asked(1, 2))
    assert whole == chunked
    names = [engine(model).scheduler.pool._names(asked(*seeds), 9) for seeds in ((1, 2), (2, 1), (1, 1))]
    assert len({each[-1] for each in names}) == 3


def test_a_picture_is_looked_at_once_while_it_is_remembered(model, monkeypatch):
    looked = []
    monkeypatch.setattr(eye, "REMEMBERED", 2)

    def vision(shown):
        looked.append(shown)
        return torch.zeros(1, PICTURE_TOKENS, 8)

    vision.row = torch.zeros(1)
    look = album(vision)
    for seed in (1, 1, 2, 1, 3, 1):
        look(pixels(seed))
    assert len(looked) == 3
    look(pixels(2))  # forgotten: 1 and 3 came later
    assert len(looked) == 4


def test_a_model_without_an_eye_has_none():
    assert load_vision(GOLDEN, 64) is None


@pytest.mark.parametrize("content", [b"", b"no safetensors", "other"])
def test_a_broken_eye_is_told_with_its_file(tmp_path, content):
    path = tmp_path / "vision.safetensors"
    if content == "other":
        save_file(Vision(32).state_dict(), path)
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"vision\.safetensors: cannot be used"):
        load_vision(tmp_path, 64)
