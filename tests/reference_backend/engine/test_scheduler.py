"""Steps planned, one by one; and a state machine that does everything in any order. No model, no torch."""

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from reference_backend.admission import FairQueue
from reference_backend.engine.kv_cache import BlockPool
from reference_backend.engine.request import Priority, Sampling, Sequence
from reference_backend.engine.scheduler import Scheduler

ARRIVALS = iter(range(1 << 30))


def scheduler(*, slots=4, blocks=33, block_size=4, step_tokens=16):
    return Scheduler(BlockPool(blocks, block_size), FairQueue(10.0), slots=slots, step_tokens=step_tokens)


def add(subject, prompt, *, max_tokens=8, priority=Priority.NORMAL, tenant=""):
    prompt = list(range(prompt)) if isinstance(prompt, int) else list(prompt)
    made = Sequence(prompt, Sampling(max_tokens=max_tokens), None, priority, tenant)
    made.arrival = next(ARRIVALS)
    subject.queue.push(made)
    return made


def step(subject, token=7):
    """Plan, and pretend that the device has drawn `token` for everybody. What was planned, without the sequences."""
    plan = subject.schedule(0.0)
    for work in plan:
        if work.samples:
            subject.commit(work.sequence, token)
    assert subject.faults() == []
    return [(work.start, work.tokens, work.samples) for work in plan]


def test_a_prompt_is_read_and_then_a_token_comes_with_each_step():
    subject = scheduler()
    asked = add(subject, 5)
    assert [step(subject) for _ in range(3)] == [[(0, 5, True)], [(5, 1, True)], [(6, 1, True)]]
    assert asked.generated == [7, 7, 7]


def test_a_long_prompt_is_read_in_pieces_beside_those_who_generate():
    subject = scheduler(step_tokens=16)
    add(subject, 3)
    step(subject)
    add(subject, range(100, 140))
    assert step(subject) == [(3, 1, True), (0, 15, False)]
    assert step(subject) == [(4, 1, True), (15, 15, False)]
    assert step(subject) == [(5, 1, True), (30, 10, True)]
    assert step(subject) == [(6, 1, True), (40, 1, True)]


def test_a_slow_machine_reads_less_beside_those_who_generate():
    subject = scheduler(step_tokens=16)
    add(subject, range(100, 120))
    assert [work.tokens for work in subject.schedule(0.0, readable=4)] == [16]  # nobody generates yet
    [work] = subject.schedule(0.0, readable=4)
    subject.commit(work.sequence, 7)
    add(subject, range(200, 220))
    assert [work.tokens for work in subject.schedule(0.0, readable=4)] == [1, 4]


def test_who_generates_goes_before_who_reads_and_readers_in_order():
    subject = scheduler(step_tokens=8)
    add(subject, range(100, 120))
    add(subject, range(200, 206))
    assert step(subject) == [(0, 8, False)]
    assert step(subject) == [(8, 8, False)]
    assert step(subject) == [(16, 4, True), (0, 4, False)]
    assert step(subject) == [(20, 1, True), (4, 2, True)]


def test_slots_bound_who_runs():
    subject = scheduler(slots=2)
    sequences = [add(subject, [n]) for n in range(3)]
    assert len(step(subject)) == 2
    subject.drop(sequences[0])
    step(subject)
    assert subject.running == sequences[1:]
    assert repr(subject) == "<Scheduler 2 running, 0 preempted, 0 waiting>"


def test_nothing_is_computed_past_the_last_token():
    subject = scheduler()
    asked = add(subject, 5, max_tokens=1)
    assert step(subject) == [(0, 5, True)]
    assert step(subject) == []
    subject.drop(asked)
    assert subject.is_idle


def test_a_known_beginning_is_not_computed_again():
    subject = scheduler()
    first = add(subject, 10)
    step(subject)
    second = add(subject, 10)
    assert step(subject)[1] == (8, 2, True)
    assert second.blocks[:2] == first.blocks[:2]
    assert (second.cached_tokens, subject.pool.found_tokens, subject.pool.asked_tokens) == (8, 8, 20)
    subject.drop(first)
    assert subject.faults() == []


def test_generated_text_is_known_too():
    subject = scheduler()
    first = add(subject, 5, max_tokens=8)
    for _ in range(8):
        step(subject)
    subject.drop(first)
    second = add(subject, [*range(5), *[7] * 8])
    step(subject)
    assert second.cached_tokens == 12  # 5 + 7: the last one was never fed back


def test_the_newest_gives_way_when_blocks_run_out_and_comes_back():
    subject = scheduler(slots=2, blocks=8, block_size=4)  # 7 blocks
    first, second = add(subject, range(100, 111), max_tokens=9), add(subject, range(200, 211), max_tokens=9)
    for _ in range(5):
        step(subject)
    assert (subject.running, subject.preempted, subject.preemptions) == ([first], [second], 1)
    assert second.generated == [7] * 2
    for _ in range(4):
        step(subject)
    subject.drop(first)
    # Three of its blocks were full; the last of them had to be given to the other one meanwhile.
    assert step(subject) == [(8, 5, True)]
    assert second.generated == [7] * 3


def test_the_lower_class_gives_way_first_even_if_it_is_planned_already():
    subject = scheduler(slots=2, blocks=8, block_size=4)
    low = add(subject, range(100, 111), max_tokens=9, priority=Priority.LOW)
    step(subject)
    high = add(subject, range(200, 211), max_tokens=9, priority=Priority.HIGH)
    while not subject.preemptions:
        step(subject)
    assert (subject.running, subject.preempted) == ([high], [low])


def test_who_was_preempted_comes_before_newcomers_of_its_class_only():
    subject = scheduler(slots=2, blocks=8, block_size=4)
    first = add(subject, range(100, 111), max_tokens=9)
    second = add(subject, range(200, 211), max_tokens=9)
    while not subject.preemptions:
        step(subject)
    newcomer, urgent = add(subject, [1]), add(subject, [2], priority=Priority.HIGH)
    step(subject)
    assert subject.running == [first, urgent]
    subject.drop(urgent)
    step(subject)
    assert newcomer in subject.queue
    subject.drop(first)
    step(subject)
    assert subject.running == [second, newcomer]


def test_one_that_does_not_fit_waits_and_nobody_overtakes_it():
    subject = scheduler(slots=3, blocks=8, block_size=4)
    step_one = add(subject, range(100, 116))
    step(subject)
    big, small = add(subject, range(200, 212)), add(subject, [1])
    assert step(subject) == [(16, 1, True)]
    assert list(subject.queue) == [big, small]
    subject.drop(step_one)
    step(subject)
    assert subject.running == [big, small]


def test_a_token_that_is_not_read_yet_does_not_stop_the_next_step():
    """What overlap does: a step is planned before the one before it is committed."""
    subject = scheduler()
    asked = add(subject, 3, max_tokens=3)
    works = [work for _ in range(4) for work in subject.schedule(0.0)]
    assert [(work.start, work.tokens, work.is_decode) for work in works[:2]] == [(0, 3, False), (3, 1, True)]
    assert asked.pending == 3
    for _ in range(3):
        subject.commit(asked, 9)
    assert asked.generated == [9, 9, 9]
    assert subject.faults() == []


def test_faults_are_told():
    subject = scheduler()
    asked = add(subject, 5)
    step(subject)
    asked.computed = 50
    assert subject.faults() == [f"50 tokens in blocks {asked.blocks}"]
    subject._free_slots.pop()
    assert "slots are [0, 1, 3]" in subject.faults()


@pytest.mark.parametrize("lag", [0, 1])
def test_everything_ends_with_the_tokens_that_it_was_to_have(lag):
    """A crowd in a cache that is far too small: preempted over and over, all end, nothing is held."""
    rng = Random(3)
    subject = scheduler(slots=6, blocks=14, block_size=4, step_tokens=10)
    crowd = [
        add(subject, [rng.randrange(3) for _ in range(rng.randrange(1, 20))], max_tokens=rng.randrange(1, 30))
        for _ in range(40)
    ]
    unread, steps = [], 0
    while not subject.is_idle:
        unread.append([work.sequence for work in subject.schedule(0.0) if work.samples])
        for sequence in unread.pop(0) if len(unread) > lag else []:
            subject.commit(sequence, rng.randrange(3))
            if len(sequence.generated) == sequence.sampling.max_tokens:
                subject.drop(sequence)
        assert subject.faults() == []
        steps += 1
        assert steps < 5000
    assert all(len(sequence.generated) == sequence.sampling.max_tokens for sequence in crowd)
    assert subject.preemptions > 5
    assert subject.pool.held == 0


class Everything(RuleBasedStateMachine):
    """Requests come, are aborted, end early; steps are read at once or a step late. Little room, few distinct texts."""

    @initialize(blocks=st.integers(12, 30), slots=st.integers(1, 4), budget=st.integers(1, 24), lag=st.integers(0, 1))
    def begin(self, blocks, slots, budget, lag):
        self.subject = scheduler(slots=slots, blocks=blocks, block_size=4, step_tokens=budget)
        self.lag = lag
        self.unread = []
        self.alive = []

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        max_tokens=st.integers(1, 16),
        priority=st.sampled_from(Priority),
        tenant=st.sampled_from("ab"),
    )
    def ask(self, prompt, max_tokens, priority, tenant):
        self.alive.append(add(self.subject, prompt, max_tokens=max_tokens, priority=priority, tenant=tenant))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data):
        self.end(data.draw(st.sampled_from(self.alive)))

    @rule(token=st.integers(0, 2))
    def step(self, token):
        plan = self.subject.schedule(0.0)
        assert sum(work.tokens for work in plan) <= self.subject.step_tokens
        assert len({work.sequence for work in plan}) == len(plan)
        assert all(work.sequence.slot is not None for work in plan)
        if not plan and not self.unread:
            assert not self.alive, "somebody waits and nothing is done"
        self.unread.append([work.sequence for work in plan if work.samples])
        for sequence in self.unread.pop(0) if len(self.unread) > self.lag else []:
            if sequence in self.alive:
                self.subject.commit(sequence, token)
                if token == 2 or len(sequence.generated) == sequence.sampling.max_tokens:
                    self.end(sequence)

    def end(self, sequence):
        self.subject.drop(sequence)
        self.alive.remove(sequence)

    @invariant()
    def holds(self):
        assert self.subject.faults() == []
        assert sorted(map(id, self.subject.everyone())) == sorted(map(id, self.alive))
        assert all(sequence.drawn <= sequence.sampling.max_tokens for sequence in self.alive)


Everything.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestEverything = Everything.TestCase
