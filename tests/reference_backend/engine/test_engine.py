"""Turns of the engine, one by one: who runs, who waits, what comes out, and what is given back.

Every test ends with the integrity check of slots and block tables.
"""

from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend.engine.engine import Engine, Settings  # noqa: E402
from reference_backend.engine.model import load_model  # noqa: E402
from reference_backend.engine.request import Delta, Load, Priority, Sampling, Sequence  # noqa: E402
from tests.support.integrity import faults  # noqa: E402
from tests.support.plain_model import greedy_reference, plain_logits  # noqa: E402

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent.parent / "golden"
MODELS = {name: load_model(GOLDEN / name, torch.device("cpu")) for name in ("llama", "qwen2", "qwen3")}
MODEL = MODELS["llama"]


@pytest.fixture
def engine():
    """Makes engines, and checks each of them at the end."""
    made = []

    def make(*, model=MODEL, end_tokens=(), overlap=False, prepare=None, cache_tokens=None, **sizes):
        sizes = {"slots": 2, "context": 64, "block_size": 4} | sizes
        settings = Settings(cache_tokens=cache_tokens or sizes["slots"] * sizes["context"], **sizes)
        made.append(
            Engine(
                model,
                settings,
                end_tokens=frozenset(end_tokens),
                rng=Random(1),
                overlap=overlap,
                prepare=prepare,
            )
        )
        return made[-1]

    yield make
    for each in made:
        assert faults(each.scheduler) == []


def sequence(prompt=(5, 9, 2), *, max_tokens=8, deadline=None, salt=b"", tenant="", **sampling):
    settings = Sampling(max_tokens=max_tokens, **({"temperature": 0.0} | sampling))
    return Sequence(list(prompt), settings, deadline, Priority.NORMAL, tenant, salt)


def run(subject, *sequences):
    """Hand all in, take turns until nothing is left, give back everything that was published."""
    for each in sequences:
        subject.submit(each)
    published = []
    while subject.is_busy:
        published += subject.turn(0.0)
        assert faults(subject.scheduler) == []
    assert subject.scheduler.pool.held == 0
    return published


def crowd(seed, count=12, longest=30):
    """Sequences of every kind of sampling; a second call gives the same again."""
    rng = Random(seed)
    return [
        sequence(
            [rng.randrange(64) for _ in range(rng.randrange(1, longest))],
            max_tokens=rng.randrange(1, 20),
            seed=number,
            **rng.choice(
                [
                    {},
                    {"temperature": 1.0},
                    {"temperature": 0.8, "top_p": 0.9},
                    {"temperature": 1.2, "top_k": 8},
                    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
                    {"frequency_penalty": 0.4, "presence_penalty": 0.2},
                    {"logprobs": 2},
                ]
            ),
        )
        for number in range(count)
    ]


class Rhythm:
    """A grammar: which remainder by five a token must have follows from those before it; it is over after so many."""

    def __init__(self, count):
        self.left, self.state, self.is_broken = count, 2, False

    def mask(self):
        return sum(1 << token for token in range(64) if token % 5 == self.state and not self.is_broken).to_bytes(
            8, "little"
        )

    def take(self, token):
        assert token % 5 == self.state
        self.left, self.state = self.left - 1, (3 * self.state + token // 5 + 1) % 5
        return self.left == 0


def constrained_crowd(seed):
    """Half of a crowd under grammars, some of which are over before the tokens are."""
    crowded = crowd(seed)
    for number, each in enumerate(crowded[::2]):
        each.constraint = Rhythm(4 + number)
    return crowded


def texts(sequences):
    return [each.generated for each in sequences]


def alone(make, sequences, model=MODEL):
    """What each generates in an engine of its own."""
    for each in sequences:
        run(make(model=model), each)
    return texts(sequences)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_greedy_text_is_that_of_the_plain_model(engine, name):
    asked = sequence()
    published = run(engine(model=MODELS[name]), asked)
    assert asked.generated == greedy_reference(MODELS[name], [5, 9, 2], 8)
    assert published == [(asked, Delta(token, None)) for token in asked.generated[:-1]] + [
        (asked, Delta(asked.generated[-1], "length"))
    ]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_neighbours_change_nothing(engine, name):
    """Sequences of different lengths and kinds that come and go in the same batch."""
    together = crowd(4)
    run(engine(model=MODELS[name], slots=4), *together)
    assert texts(together) == alone(engine, crowd(4), MODELS[name])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_prepared_steps_change_nothing(engine, name):
    """What a GPU records and replays, run as it is: sizes of batches that are filled up, rows read from the device."""
    together = crowd(8)
    run(engine(model=MODELS[name], slots=5, overlap=True, prepare=lambda step: step), *together)
    assert texts(together) == alone(engine, crowd(8), MODELS[name])


@pytest.mark.parametrize("overlap", [False, True])
def test_preemption_changes_nothing(engine, overlap):
    """A cache with room for one long sequence, shared by six shorter ones."""
    together = crowd(6, count=20)
    subject = engine(slots=6, cache_tokens=80, overlap=overlap)
    run(subject, *together)
    assert subject.scheduler.preemptions >= 5
    assert texts(together) == alone(engine, crowd(6, count=20))


def test_overlap_changes_nothing(engine):
    """Steps launched before the one before them is read, with answers that end where nobody could know."""
    ends = (3, 11, 40)
    together = crowd(7)
    run(engine(slots=4, overlap=True, end_tokens=ends), *together)
    expected = crowd(7)
    for each in expected:
        run(engine(end_tokens=ends), each)
    assert texts(together) == texts(expected)


@pytest.mark.parametrize("step_tokens", [2, 3, 7, 64])
def test_a_prompt_in_pieces_is_the_whole_prompt(engine, step_tokens):
    together = crowd(8, count=4)
    run(engine(step_tokens=step_tokens), *together)
    assert texts(together) == alone(engine, crowd(8, count=4))


def test_a_known_beginning_changes_nothing(engine):
    """The same conversation, turn after turn: cached blocks, and the tokens of a cold cache."""
    subject, warm, cold = engine(slots=1), [], []
    prompt = [5, 9, 2, 7, 1]
    for turn in range(4):
        asked, fresh = (sequence(prompt, max_tokens=5, temperature=1.0, seed=turn) for _ in range(2))
        run(subject, asked)
        run(engine(slots=1), fresh)
        warm.append(asked)
        cold.append(fresh)
        prompt = [*prompt, *asked.generated, turn]
    assert texts(warm) == texts(cold)
    assert [each.cached_tokens for each in warm] == [0, 8, 12, 20]
    assert [each.cached_tokens for each in cold] == [0] * 4
    other = sequence(prompt, salt=b"another tenant")
    run(subject, other)
    assert other.cached_tokens == 0


def test_many_who_begin_alike_share_while_they_run(engine):
    subject = engine(slots=5)
    beginning = list(range(1, 18))
    first = sequence(beginning, max_tokens=20)
    subject.submit(first)
    subject.turn(0.0)
    others = [sequence([*beginning, 30 + n]) for n in range(4)]
    for each in others:
        subject.submit(each)
    subject.turn(0.0)
    assert [each.blocks[:4] for each in others] == [first.blocks[:4]] * 4
    run(subject)
    assert texts(others) == alone(engine, [sequence([*beginning, 30 + n]) for n in range(4)])


def test_a_prompt_is_read_in_pieces_while_others_go_on(engine):
    subject = engine(context=128, step_tokens=16)
    long, short = sequence([7] * 40, max_tokens=2), sequence(max_tokens=10)
    subject.submit(short)
    subject.turn(0.0)
    subject.submit(long)
    turns = [[each for each, _ in subject.turn(0.0)] for _ in range(4)]
    # Two pieces pass in silence; with the third the first token is there, and from then on both decode together.
    assert turns == [[short], [short], [short, long], [short, long]]
    assert long.generated == greedy_reference(MODEL, long.prompt, 2)
    run(subject)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sizes", [{"slots": 4}, {"slots": 6, "cache_tokens": 80}])
def test_answers_under_a_grammar_are_those_of_each_alone(engine, sizes, overlap):
    """Among others, with steps launched before the last one is read, and preempted: the grammar sees each token once."""
    together = constrained_crowd(9)
    subject = engine(overlap=overlap, **sizes)
    published = run(subject, *together)
    assert subject.scheduler.preemptions >= ("cache_tokens" in sizes)
    assert texts(together) == alone(engine, constrained_crowd(9))
    complete = {each for each in together if each.constraint is not None and not each.constraint.left}
    assert complete == {each for each, delta in published if delta.finish == "stop"} != set()


@pytest.mark.parametrize("overlap", [False, True])
def test_an_answer_under_a_grammar_gets_a_token_with_each_step_as_others_do(engine, overlap):
    constrained, free = sequence(max_tokens=30), sequence([7], max_tokens=30)
    constrained.constraint = Rhythm(100)
    subject = engine(overlap=overlap)
    for each in (constrained, free):
        subject.submit(each)
    subject.turn(0.0)
    counts = []
    for _ in range(5):
        subject.turn(0.0)
        counts.append((len(constrained.generated), len(free.generated)))
    first = 1 if overlap else 2
    # Its token of the step before had to be known, and with it those of all.
    assert [each for each, _ in counts] == [each for _, each in counts] == list(range(first, first + 5))
    run(subject)


def test_a_grammar_that_breaks_ends_its_answer_alone(engine):
    asked, other = sequence(max_tokens=20), sequence([7], max_tokens=20)
    asked.constraint = Rhythm(100)
    subject = engine(overlap=True)
    for each in (asked, other):
        subject.submit(each)
    for _ in range(6):
        subject.turn(0.0)
    asked.constraint.is_broken = True
    published = run(subject)
    assert [delta for each, delta in published if each is asked] == [Delta(None, "grammar")]
    assert other.generated == greedy_reference(MODEL, [7], 20)


def test_slow_steps_make_the_next_pieces_small(engine):
    """On a machine that needs a second for 16 tokens, a long prompt is read in the smallest pieces beside an answer."""
    subject = engine(slots=2, context=256, step_tokens=64)
    first, long = sequence(max_tokens=40), sequence([7] * 64, max_tokens=2)
    subject.submit(first)
    subject.turn(0.0)
    subject.took(0.2)
    subject.submit(long)
    computed = []
    while long.computed < 64:
        subject.turn(0.0)
        subject.took(1.0)
        computed.append(long.computed)
    assert computed == [16, 32, 48, 64]
    run(subject)
    assert long.generated == greedy_reference(MODEL, long.prompt, 2)


def test_equal_seeds_give_equal_text_and_others_do_not(engine):
    first, second, other = (sequence(max_tokens=16, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert alone(engine, [first, second, other])[0] == second.generated != other.generated
    unseeded = [sequence(max_tokens=16, temperature=1.0) for _ in range(2)]
    run(engine(), *unseeded)
    assert unseeded[0].generated != unseeded[1].generated


def test_a_seed_gives_the_same_text_alone_and_among_sixteen(engine):
    def asked():
        prompts = [[number % 5, *range(number)] for number in range(1, 17)]
        return [sequence(each, max_tokens=16, temperature=1.0, top_p=0.95, seed=7) for each in prompts]

    together = asked()
    run(engine(slots=16), *together)
    assert texts(together) == alone(engine, asked())
    assert len({tuple(each.generated) for each in together}) == 16


def test_logprobs_are_those_of_the_plain_model(engine):
    asked = sequence(logprobs=3, temperature=1.0, seed=5)
    published = run(engine(), asked)
    scores = plain_logits(MODEL, asked.tokens).log_softmax(-1)
    for place, (_, delta) in enumerate(published, start=len(asked.prompt) - 1):
        assert delta.logprobs.chosen == pytest.approx(scores[place, delta.token].item(), abs=1e-4)
        values, tokens = scores[place].topk(3)
        assert [token for token, _ in delta.logprobs.top] == tokens.tolist()
        assert [value for _, value in delta.logprobs.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_the_end_token_ends_and_is_not_sent(engine):
    first, second = greedy_reference(MODEL, [5, 9, 2], 2)
    published = run(engine(end_tokens=[second]), sequence())
    assert [delta for _, delta in published] == [Delta(first, None), Delta(None, "stop")]


def test_the_end_token_is_a_token_like_others_when_it_is_to_be_ignored(engine):
    asked = sequence(ignore_eos=True)
    run(engine(end_tokens=range(64)), asked)
    assert len(asked.generated) == 8


def test_tenants_take_turns(engine):
    """One floods the queue, another sends one request: it is served next, not last."""
    subject = engine(slots=1)
    flood, light = [sequence([n], max_tokens=2, tenant="flood") for n in range(6)], sequence(tenant="light")
    published = run(subject, *flood, light)
    order = list(dict.fromkeys(each for each, _ in published))
    assert order == [flood[0], light, *flood[1:]]


def test_load_is_what_runs_waits_and_is_held(engine):
    subject = engine(slots=2, context=64)
    for _ in range(3):
        subject.submit(sequence())
    sizes = {"slots": 2, "kv_blocks": 33, "block_size": subject.settings.block_size}
    assert subject.load() == Load(0, 3, 0.0, **sizes, waiting_tokens=9)
    subject.turn(0.0)
    assert subject.load() == Load(
        2, 1, 2 / 33, **sizes, prompt_tokens=6, generated_tokens=2, kv_used=2, waiting_tokens=3
    )
    assert repr(subject) == "<Engine 2 running of 2, 1 waiting>"
    run(subject)
    assert subject.load() == Load(0, 0, 0.0, **sizes, prompt_tokens=9, generated_tokens=24, cached_blocks=2)


def test_load_tells_how_fast_it_goes_and_what_is_left_to_do(engine):
    subject = engine(slots=2, context=256, step_tokens=16)
    subject.submit(sequence(list(range(40)), max_tokens=4))
    subject.turn(2.0)  # waits for nothing, reads 16 of 40
    subject.took(0.5)
    assert subject.load().backlog_tokens == 24
    assert subject.load().prefill_rate == pytest.approx(32)
    assert subject.load().cached_blocks == 16 // subject.settings.block_size
    subject.turn(3.0)
    subject.turn(4.0)
    subject.turn(5.0)
    subject.took(0.25)
    assert (subject.load().step_seconds, subject.load().decode_rate) == (0.25, 4.0)
    assert (subject.load().backlog_tokens, subject.load().queue_seconds) == (0, 0.0)


def at_speed(subject):
    """Have it read 16 tokens in 1.6 s."""
    subject.submit(sequence(range(16), max_tokens=1))
    subject.turn(0.0)
    subject.took(1.6)


def test_one_whose_prompt_cannot_be_read_in_time_is_told_at_once(engine):
    subject = engine(context=128, step_tokens=16)
    hopeless, possible = (sequence(range(20, 40), max_tokens=2, deadline=10.0 + left) for left in (1.9, 2.1))
    subject.submit(sequence(range(16), max_tokens=1, deadline=0.1))
    subject.turn(0.0)  # at first nothing is known, and nobody is refused
    subject.took(1.6)
    subject.submit(hopeless)
    subject.submit(possible)
    told = subject.turn(10.0)
    assert told == [(hopeless, Delta(None, "deadline"))]
    assert (hopeless.computed, possible.computed) == (0, 16)
    assert len(run(subject)) == 2


def test_what_is_cached_or_of_another_tenant_does_not_count_against_a_deadline(engine):
    subject = engine(slots=2, context=128, step_tokens=16)
    at_speed(subject)
    flood = [sequence(range(40, 60), max_tokens=1, tenant="flood") for _ in range(6)]
    known = sequence(range(17), max_tokens=1, deadline=10.5, tenant="light")
    for each in (*flood, known, late := sequence(range(40, 60), max_tokens=1, deadline=12.0, tenant="flood")):
        subject.submit(each)
    told = subject.turn(10.0)
    assert [each for each, delta in told if delta.finish == "deadline"] == [late]
    subject.turn(10.1)
    assert known.generated


def test_who_must_wait_for_slots_longer_than_its_deadline_is_told_at_once(engine):
    subject = engine(slots=1, context=128)
    for number in range(4):
        subject.submit(sequence([number], max_tokens=1))
    for second in range(3):
        subject.turn(float(second))
    hopeless, possible = (sequence([9], max_tokens=1, deadline=3.0 + left) for left in (0.9, 2.1))
    subject.submit(hopeless)
    subject.submit(possible)
    assert (hopeless, Delta(None, "deadline")) in subject.turn(3.0)
    assert not possible.is_over
    run(subject)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_aborted_sequence_stops_within_a_turn_and_is_not_heard_of_again(engine, overlap):
    subject = engine(slots=1, overlap=overlap)
    running, waiting, other = sequence(max_tokens=50), sequence(), sequence(max_tokens=2)
    for each in (running, waiting, other):
        subject.submit(each)
    subject.turn(0.0)
    subject.abort(running)
    subject.abort(waiting)
    published = subject.turn(0.0)
    assert [each for each, _ in published] == ([] if overlap else [other])
    assert subject.scheduler.running == [other]
    assert (len(running.generated), len(waiting.generated)) == (0 if overlap else 1, 0)
    run(subject)
    subject.abort(other)  # too late, and harmless
    assert subject.turn(0.0) == []


@pytest.mark.parametrize(("now", "generated"), [(9.9, 2), (10.0, 1)])
def test_a_deadline_ends_a_running_sequence(engine, now, generated):
    subject = engine()
    asked = sequence(deadline=10.0)
    subject.submit(asked)
    subject.turn(0.0)
    published = subject.turn(now)
    assert len(asked.generated) == generated
    assert ((asked, Delta(None, "deadline")) in published) is (now >= 10)


def test_a_deadline_that_passes_in_the_queue_costs_no_work(engine):
    subject = engine(slots=1)
    running, late = sequence(max_tokens=2), sequence(deadline=1.0)
    subject.submit(running)
    subject.submit(late)
    assert [delta.finish for each, delta in subject.turn(1.0) if each is late] == ["deadline"]
    assert late.computed == 0
    assert subject.load().waiting == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_everything_is_given_back_whatever_happens(engine, overlap):
    """Many sequences with every kind of end, in a drawn order, in a cache that is too small for them."""
    rng = Random(8)
    subject = engine(slots=3, cache_tokens=70, end_tokens=[3, 4], overlap=overlap)
    alive = []
    for turn in range(300):
        if rng.random() < 0.5:
            deadline = turn + rng.randrange(9) if rng.random() < 0.3 else None
            prompt = [rng.randrange(64) for _ in range(rng.randrange(1, 40))]
            each = sequence(prompt, max_tokens=rng.randrange(1, 20), temperature=1.0, deadline=deadline)
            subject.submit(each)
            alive.append(each)
        if alive and rng.random() < 0.2:
            subject.abort(rng.choice(alive))
        subject.turn(float(turn))
        assert faults(subject.scheduler) == []
    run(subject)
    assert subject.scheduler.preemptions > 0


def test_scores_that_are_no_numbers_end_one_sequence_and_leave_nothing_behind(engine):
    """A token whose embedding is broken: whoever has it in the prompt fails, everybody else goes on as ever."""
    prompts = [[5, 9, 2, 8], *([n, 1, 2] for n in range(4))]
    expected = [greedy_reference(MODEL, prompt, 30) for prompt in prompts]
    bad = min(set(range(64)).difference(*prompts, *expected))
    broken = load_model(GOLDEN / "llama", torch.device("cpu"))
    embedding = broken.operations.rows(broken._embedding, torch.arange(64))
    embedding[bad] = torch.nan
    broken._embedding = broken.operations.kept(embedding)
    subject = engine(model=broken, slots=2, cache_tokens=64)
    fine, *later = [sequence(prompt, max_tokens=30) for prompt in prompts]
    poisoned, again = (sequence([5, 9, 2, bad, bad, 1, 1, 1, 1]) for _ in range(2))
    published = run(subject, poisoned, fine)
    assert [delta for each, delta in published if each is poisoned] == [Delta(None, "failed")]
    run(subject, again)
    assert again.cached_tokens == 0
    for each in later:  # through all blocks
        run(subject, each)
    assert texts([fine, *later]) == expected
