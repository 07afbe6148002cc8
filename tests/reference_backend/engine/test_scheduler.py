"""Steps planned, one by one; and a state machine that does everything in any order. No model, no torch."""

from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from reference_backend.admission import OUTPUT_WEIGHT, FairQueue
from reference_backend.engine.kv_cache import BlockPool
from reference_backend.engine.pace import Beside, Readable
from reference_backend.engine.request import Priority, Sampling, Sequence
from reference_backend.engine.scheduler import Scheduler
from reference_backend.engine.standing import QUANTUM
from tests.support.integrity import faults

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
    assert faults(subject) == []
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
    assert [work.tokens for work in subject.schedule(0.0, Readable(4, 4))] == [16]  # nobody generates yet
    [work] = subject.schedule(0.0, Readable(4, 4))
    subject.commit(work.sequence, 7)
    add(subject, range(200, 220))
    assert [work.tokens for work in subject.schedule(0.0, Readable(4, 4))] == [1, 4]


def test_prompts_of_a_burst_are_read_one_after_the_other_beside_those_who_generate():
    subject = scheduler(slots=6)
    add(subject, 3)
    step(subject)
    for n in range(1, 5):
        add(subject, range(100 * n, 100 * n + 3))

    def reads(*, enough):
        plan = subject.schedule(0.0, Readable(12, enough))
        for work in plan:
            if work.samples:
                subject.commit(work.sequence, 7)
        return [work.tokens for work in plan if not work.is_decode], len(subject.queue)

    assert reads(enough=3) == ([3], 3)
    assert reads(enough=4) == ([3, 3], 1)  # none is cut short for it
    assert reads(enough=4) == ([3], 0)


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
    assert repr(subject) == "<Scheduler 2 running, 0 waiting>"


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
    assert faults(subject) == []


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
    assert (subject.running, list(subject.queue), subject.preemptions) == ([first], [second], 1)
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
    assert (subject.running, list(subject.queue)) == ([high], [low])


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
    assert faults(subject) == []


def test_faults_are_told():
    subject = scheduler()
    asked = add(subject, 5)
    step(subject)
    asked.computed = 50
    assert faults(subject) == [f"50 tokens in blocks {asked.blocks}"]
    subject._free_slots.pop()
    assert "slots are [0, 1, 3]" in faults(subject)


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
        assert faults(subject) == []
        steps += 1
        assert steps < 5000
    assert all(len(sequence.generated) == sequence.sampling.max_tokens for sequence in crowd)
    assert subject.preemptions > 5
    assert subject.pool.held == 0


LIGHT, FLOOD = "light", "flood"


def flooded(*, slots=8, waiting=16, company=2, **sizes):
    """Tenants that keep asking: in each step, whoever of FLOOD has ended is replaced. Gives the way to take a step."""
    subject = scheduler(**({"slots": slots, "blocks": 400, "step_tokens": 64} | sizes))
    rng = Random(5)

    def ask(tenant, prompt=12, max_tokens=24, **more):
        return add(subject, [rng.randrange(1000) for _ in range(prompt)], tenant=tenant, max_tokens=max_tokens, **more)

    def take_step():
        while sum(each.tenant == FLOOD for each in subject.everyone()) < slots + waiting:
            ask(FLOOD)
        plan = subject.schedule(0.0, None, Beside(company, 0))
        for work in plan:
            if work.samples:
                end_or_go_on(subject, work.sequence)
        assert faults(subject) == []
        return plan

    for _ in range(40):
        take_step()
    return subject, ask, take_step


def end_or_go_on(subject, sequence, token=7):
    subject.commit(sequence, token)
    if len(sequence.generated) == sequence.sampling.max_tokens:
        subject.drop(sequence)


def steps_of(sequence, take_step):
    """Steps until it is over."""
    plans = []
    while len(sequence.generated) < sequence.sampling.max_tokens:
        plans.append(take_step())
        assert len(plans) < 1000
    return plans


@pytest.mark.parametrize("company", [1, 3])
def test_a_light_request_takes_no_more_steps_beside_a_flood_and_few_ride_along(company):
    """Alone it takes 16: one that reads its prompt and draws the first token, and one for each of the others."""
    subject, ask, take_step = flooded(company=company)
    for _ in range(10):
        plans = steps_of(ask(LIGHT, prompt=40, max_tokens=16), take_step)
        assert len(plans) == 16
        for plan in plans:
            beside = [work for work in plan if work.sequence.tenant == FLOOD]
            assert len(beside) <= company
            assert all(work.is_decode for work in beside)  # nobody reads a prompt beside it
        assert len(take_step()) == 8  # nobody is held for one who is not there
    assert subject.preemptions <= 10  # the newest of the flood, once for each request


def test_it_finds_blocks_too():
    subject, ask, take_step = flooded(blocks=60)
    assert subject.pool.free_without([]) < 12
    assert len(steps_of(ask(LIGHT, prompt=40, max_tokens=16), take_step)) == 16


def test_a_long_stream_shares_after_its_quantum():
    _, ask, take_step = flooded()
    plans = steps_of(ask(LIGHT, max_tokens=4 * QUANTUM), take_step)
    riders = [sum(work.sequence.tenant == FLOOD for work in plan) for plan in plans]
    assert max(riders[:QUANTUM]) == 2
    assert set(riders[QUANTUM:]) == {7}


def test_who_asks_for_more_than_it_leaves_to_others_is_light_no_longer():
    """One request after the other, with prompts so long that they are more than all that the flood gets."""
    subject, ask, take_step = flooded()
    served = subject.queue.served
    for _ in range(60):
        steps_of(ask(LIGHT, prompt=400, max_tokens=4), take_step)
        assert served(LIGHT) - served(FLOOD) <= allowance(subject) + 400 + 4 * OUTPUT_WEIGHT
    assert served(FLOOD) > 10_000


def allowance(subject):
    return subject.slots * QUANTUM * OUTPUT_WEIGHT


def test_equal_backlogs_share_slots_and_nobody_pauses():
    subject, ask, take_step = flooded()
    for _ in range(300):
        while sum(each.tenant == LIGHT for each in subject.everyone()) < 24:
            ask(LIGHT)
        take_step()
    preemptions = subject.preemptions
    for _ in range(300):
        while sum(each.tenant == LIGHT for each in subject.everyone()) < 24:
            ask(LIGHT)
        assert len(take_step()) == 8
    assert subject.preemptions == preemptions <= 4


def test_a_better_class_gives_way_to_nobody():
    subject = scheduler(slots=2)
    urgent = [add(subject, [n], tenant=FLOOD, priority=Priority.HIGH, max_tokens=30) for n in range(2)]
    step(subject)
    waits = add(subject, [9], tenant=LIGHT)
    assert len(step(subject)) == 2
    assert subject.running == urgent
    subject.drop(urgent[0])
    step(subject)
    assert subject.running == [urgent[1], waits]


def test_a_better_class_does_not_pause_for_a_lower_one():
    subject = scheduler()
    for priority, pausing in ((Priority.HIGH, 0), (Priority.NORMAL, 2)):
        flood = [add(subject, [n], tenant=FLOOD, priority=priority, max_tokens=30) for n in range(3)]
        subject.schedule(0.0)
        light = add(subject, [9], tenant=LIGHT)
        subject.schedule(0.0, None, Beside(1, 0))
        assert len(subject.schedule(0.0, None, Beside(1, 0))) == 4 - pausing
        for each in (*flood, light):
            subject.drop(each)


def test_a_tenant_who_is_behind_does_not_pass_a_better_class_that_waits():
    subject = scheduler(slots=2)
    running = [add(subject, [n], tenant=FLOOD, max_tokens=30) for n in range(2)]
    step(subject)
    add(subject, [9], tenant=LIGHT)
    urgent = add(subject, [9], tenant=FLOOD, priority=Priority.HIGH)
    step(subject)
    assert subject.running == running
    subject.drop(running[0])
    step(subject)
    assert subject.running == [running[1], urgent]


def test_among_many_tenants_the_newest_of_who_has_most_gives_way():
    subject = scheduler(slots=6)
    for tenant, count in (("most", 3), ("more", 2), ("one", 1)):
        for number in range(count):
            add(subject, [number], tenant=tenant, max_tokens=30)
    step(subject)
    asked = [add(subject, [9], tenant=f"new {number}") for number in range(4)]
    step(subject)
    assert [each.tenant for each in subject.running] == ["most", "more", "one", "new 0", "new 1", "new 2"]
    *preempted, last = sorted(subject.queue, key=lambda each: each.arrival)
    assert last is asked[3]  # nobody has two more than it by now
    assert [(each.tenant, each.tokens[0]) for each in preempted] == [("most", 1), ("most", 2), ("more", 1)]


def test_who_had_to_give_way_comes_back_first():
    subject, ask, take_step = flooded()
    asked = ask(LIGHT, max_tokens=2)
    take_step()
    [victim] = [each for each in subject.queue if each.is_known]
    steps_of(asked, take_step)
    take_step()
    assert victim in subject.running


@settings(max_examples=25, deadline=None)
@given(
    slots=st.integers(2, 6),
    sizes=st.fixed_dictionaries({t: st.tuples(st.integers(1, 40), st.integers(1, 40)) for t in ("one", "other")}),
    waiting=st.fixed_dictionaries({t: st.integers(1, 8) for t in ("one", "other")}),
    company=st.one_of(st.none(), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
@example(2, {"one": (40, 1), "other": (1, 40)}, {"one": 3, "other": 3}, None, 5)  # equal places are not equal service
def test_the_service_of_two_who_always_wait_differs_by_a_bounded_amount(slots, sizes, waiting, company, seed):
    """VTC's theorem: twice the larger of the longest prompt and all that a batch may generate; here plus the allowance."""
    subject = scheduler(slots=slots, blocks=20 * slots + 2, step_tokens=20)
    rng, count = Random(seed), 0
    for _ in range(300):
        for tenant, (prompt, tokens) in sizes.items():
            while sum(each.tenant == tenant for each in subject.queue) < waiting[tenant]:
                text = [rng.randrange(1000) for _ in range(rng.randint(1, prompt))]
                add(subject, text, tenant=tenant, max_tokens=rng.randint(1, tokens))
        for work in subject.schedule(0.0, None, Beside(company, 0)):
            if work.samples:
                end_or_go_on(subject, work.sequence)
                count += 1
        gap = abs(subject.queue.served("one") - subject.queue.served("other"))
        assert gap <= 2 * max(40, OUTPUT_WEIGHT * slots * 40) + allowance(subject)
    assert count > 100


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
        tenant=st.sampled_from("aaab"),
    )
    def ask(self, prompt, max_tokens, priority, tenant):
        self.alive.append(add(self.subject, prompt, max_tokens=max_tokens, priority=priority, tenant=tenant))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data):
        self.end(data.draw(st.sampled_from(self.alive)))

    @rule(
        token=st.integers(0, 2),
        readable=st.sampled_from([None, Readable(1, 1), Readable(9, 2)]),
        beside=st.builds(Beside, st.sampled_from([None, 1, 2]), st.integers(0, 3)),
    )
    def step(self, token, readable, beside):
        plan = self.subject.schedule(0.0, readable, beside)
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
        assert faults(self.subject) == []
        assert sorted(map(id, self.subject.everyone())) == sorted(map(id, self.alive))
        assert all(sequence.drawn <= sequence.sampling.max_tokens for sequence in self.alive)


Everything.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestEverything = Everything.TestCase
