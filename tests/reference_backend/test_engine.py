"""Turns of the engine, one by one: who runs, who waits, what comes out, and what is given back."""

import asyncio
import threading
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine import (  # noqa: E402
    PROMPT_CHUNK_TOKENS,
    Delta,
    Engine,
    EngineBusy,
    Load,
    Sampling,
    Sequence,
    choose,
)
from reference_backend.model import load_model  # noqa: E402

torch.set_num_threads(1)
MODEL = load_model(Path(__file__).parent / "golden" / "llama", torch.device("cpu"))


def engine(*, slots=2, max_waiting=2, context=64, end_tokens=frozenset()):
    return Engine(
        MODEL, end_tokens=end_tokens, slots=slots, max_waiting=max_waiting, context=context, clock=lambda: 0.0
    )


def sequence(prompt=(5, 9, 2), *, max_tokens=8, deadline=None, **sampling):
    settings = Sampling(max_tokens=max_tokens, **({"temperature": 0.0} | sampling))
    return Sequence(list(prompt), settings, deadline, lambda _delta: None)


def run(subject, *sequences):
    """Hand all in, take turns until nothing is left, give back everything that was published."""
    for each in sequences:
        subject.submit(each)
    published = []
    while subject.load().running or subject.load().waiting:
        published += subject.turn(0.0)
    return published


def greedy_reference(prompt, count):
    """The same without cache and without engine."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(MODEL.logits(MODEL(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_text_is_that_of_the_plain_model():
    asked = sequence()
    published = run(engine(), asked)
    assert asked.generated == greedy_reference([5, 9, 2], 8)
    assert published == [(asked, Delta(token, None)) for token in asked.generated[:-1]] + [
        (asked, Delta(asked.generated[-1], "length"))
    ]


def test_neighbours_change_nothing():
    """Sequences of different lengths that come and go in the same batch; greedy and sampled."""
    rng = Random(4)
    cases = [
        ([rng.randrange(64) for _ in range(rng.randrange(1, 30))], rng.randrange(1, 20), rng.choice([0.0, 1.0]), seed)
        for seed in range(12)
    ]
    together = [sequence(p, max_tokens=n, temperature=t, seed=s, top_p=0.9) for p, n, t, s in cases]
    run(engine(slots=4, max_waiting=12), *together)
    for (p, n, t, s), each in zip(cases, together, strict=True):
        alone = sequence(p, max_tokens=n, temperature=t, seed=s, top_p=0.9)
        run(engine(), alone)
        assert alone.generated == each.generated


def test_a_prompt_is_read_in_chunks_while_others_go_on():
    subject = engine(context=1024)
    long = sequence([7] * (2 * PROMPT_CHUNK_TOKENS + 3), max_tokens=2)
    short = sequence(max_tokens=10)
    subject.submit(short)
    subject.turn(0.0)
    subject.submit(long)
    turns = [[each for each, _ in subject.turn(0.0)] for _ in range(4)]
    # Two chunks pass in silence; with the third the first token is there, and from then on both decode together.
    assert turns == [[short], [short], [long, short], [short, long]]
    assert long.generated == greedy_reference(long.prompt, 2)


def test_equal_seeds_give_equal_text_and_others_do_not():
    def text(seed):
        asked = sequence(max_tokens=16, temperature=1.0, seed=seed)
        run(engine(), asked)
        return asked.generated

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_the_end_token_ends_and_is_not_sent():
    first, second = greedy_reference([5, 9, 2], 2)
    asked = sequence()
    published = run(engine(end_tokens=frozenset([second])), asked)
    assert [delta for _, delta in published] == [Delta(first, None), Delta(None, "stop")]


def test_the_end_token_is_a_token_like_others_when_it_is_to_be_ignored():
    asked = sequence(ignore_eos=True)
    run(engine(end_tokens=frozenset(range(64))), asked)
    assert len(asked.generated) == 8


def test_the_bound_refuses_at_once_and_a_finished_sequence_makes_room():
    subject = engine(slots=1, max_waiting=1)
    first, second, third = sequence(max_tokens=1), sequence(max_tokens=1), sequence(max_tokens=1)
    subject.submit(first)
    subject.submit(second)
    with pytest.raises(EngineBusy):
        subject.submit(third)
    subject.turn(0.0)
    subject.submit(third)
    run(subject)
    assert all(len(each.generated) == 1 for each in (first, second, third))


def test_load_is_what_runs_waits_and_is_cached():
    subject = engine(slots=2, context=64)
    for _ in range(3):
        subject.submit(sequence())
    assert subject.load() == Load(0, 3, 0.0)
    subject.turn(0.0)
    assert subject.load() == Load(2, 1, 3 / 128)
    assert repr(subject) == "<Engine 2 running of 2, 1 waiting of 2>"
    run(subject)
    assert subject.load() == Load(0, 0, 0.0)


def test_an_aborted_sequence_stops_within_a_turn_and_is_not_heard_of_again():
    subject = engine(slots=1)
    running, waiting, other = sequence(max_tokens=50), sequence(), sequence(max_tokens=2)
    for each in (running, waiting, other):
        subject.submit(each)
    subject.turn(0.0)
    subject.abort(running)
    subject.abort(waiting)
    published = subject.turn(0.0)
    assert [each for each, _ in published] == [other]
    assert (len(running.generated), len(waiting.generated)) == (1, 0)
    run(subject)
    subject.abort(other)  # too late, and harmless
    assert subject.turn(0.0) == []


@pytest.mark.parametrize(("now", "generated"), [(9.9, 2), (10.0, 1)])
def test_a_deadline_ends_a_running_sequence(now, generated):
    subject = engine()
    asked = sequence(deadline=10.0)
    subject.submit(asked)
    subject.turn(0.0)
    published = subject.turn(now)
    assert len(asked.generated) == generated
    assert ((asked, Delta(None, "deadline")) in published) is (now >= 10)


def test_a_deadline_that_passes_in_the_queue_costs_no_work():
    subject = engine(slots=1)
    running, late = sequence(max_tokens=2), sequence(deadline=1.0)
    subject.submit(running)
    subject.submit(late)
    assert [delta.finish for each, delta in subject.turn(1.0) if each is late] == ["deadline"]
    assert late.cached_tokens == 0
    assert subject.load().waiting == 0


def test_slots_are_given_back_whatever_happens():
    """Many sequences with every kind of end, in a drawn order: at the end both slots are free, once each."""
    rng = Random(8)
    subject = engine(slots=2, max_waiting=6, end_tokens=frozenset([3, 4]))
    alive = []
    for turn in range(300):
        if rng.random() < 0.5:
            deadline = turn + rng.randrange(9) if rng.random() < 0.3 else None
            each = sequence([rng.randrange(64)], max_tokens=rng.randrange(1, 9), temperature=1.0, deadline=deadline)
            try:
                subject.submit(each)
                alive.append(each)
            except EngineBusy:
                assert subject.load().running + subject.load().waiting == 8
        if alive and rng.random() < 0.2:
            subject.abort(rng.choice(alive))
        subject.turn(float(turn))
        slots = [each.slot for each in subject._running]
        assert sorted(slots + subject._free) == [0, 1]
    run(subject)
    assert sorted(subject._free) == [0, 1]


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({"temperature": 0.0}, {0}),
        ({"temperature": 1e-9}, {0}),
        ({"temperature": 1.0, "top_p": 0.3}, {0}),
        ({"temperature": 1.0, "top_p": 0.6}, {0, 1}),
        ({"temperature": 1.0, "top_p": 1.0}, {0, 1, 2, 3}),
        ({"temperature": 0.05}, {0}),
    ],
)
def test_the_nucleus_holds_what_it_should(sampling, allowed):
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    rng = Random(1)
    drawn = {choose(logits, Sampling(max_tokens=1, **sampling), rng) for _ in range(400)}
    assert drawn == allowed


def test_draws_follow_the_probabilities():
    probabilities = [0.1, 0.5, 0.15, 0.25]
    rng = Random(2)
    draws = [choose(torch.tensor(probabilities).log(), Sampling(max_tokens=1), rng) for _ in range(4000)]
    chi_square = sum((draws.count(i) - 4000 * p) ** 2 / (4000 * p) for i, p in enumerate(probabilities))
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


async def test_the_thread_publishes_on_its_own_and_ends_when_told():
    subject = engine()
    arrived = asyncio.Queue()
    loop = asyncio.get_running_loop()
    subject.start(lambda published: loop.call_soon_threadsafe(arrived.put_nowait, published))
    subject.submit(sequence(max_tokens=3))
    async with asyncio.timeout(5):
        finishes = [(await arrived.get())[0][1].finish for _ in range(3)]
    subject.close()
    assert finishes == [None, None, "length"]
    assert "engine" not in {thread.name for thread in threading.enumerate() if thread.is_alive()}


async def test_a_model_that_breaks_fails_everybody_and_takes_no_more(monkeypatch):
    subject = engine(slots=1)
    waiting = [sequence(), sequence()]
    for each in waiting:
        subject.submit(each)
    monkeypatch.setattr(subject, "model", None)
    arrived = asyncio.Queue()
    loop = asyncio.get_running_loop()
    subject.start(lambda published: loop.call_soon_threadsafe(arrived.put_nowait, published))
    async with asyncio.timeout(5):
        published = await arrived.get()
    subject.close()
    assert {each: delta.finish for each, delta in published} == dict.fromkeys(waiting, "failed")
    assert subject.has_failed
    with pytest.raises(EngineBusy):
        subject.submit(sequence())
