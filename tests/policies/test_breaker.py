from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from policies.breaker import REFUSED, Breaker, Outcome, State, may_eject
from policies.policy import BreakerRule

RULE = BreakerRule(failures=0.5, of_at_least=4, window=10.0, open=5.0, probes=2)
SUCCESS, FAILURE, IGNORED = Outcome.SUCCESS, Outcome.FAILURE, Outcome.IGNORED


class Even(Random):
    """Chance that jitters nothing."""

    def random(self) -> float:
        return 0.5


def breaker_with(rule=RULE, rng=None):
    changes = []
    return Breaker(rule, rng or Even(), changes.append), changes


def send(breaker, outcomes, now=0.0, **kwargs):
    for outcome in outcomes:
        breaker.leave(breaker.enter(now), outcome, now, **kwargs)


def tripped(now=0.0):
    breaker, changes = breaker_with()
    send(breaker, [FAILURE] * 4, now)
    assert breaker.state is State.OPEN
    return breaker, changes


@pytest.mark.parametrize(
    ("outcomes", "opens"),
    [
        ([FAILURE] * 3, False),
        ([FAILURE] * 4, True),
        ([SUCCESS, FAILURE, SUCCESS, FAILURE], True),
        ([SUCCESS, SUCCESS, SUCCESS, FAILURE], False),
        ([FAILURE, FAILURE, FAILURE, SUCCESS], False),
        ([FAILURE, FAILURE, FAILURE, SUCCESS, FAILURE], True),
        ([IGNORED] * 100, False),
        ([FAILURE, FAILURE, FAILURE, IGNORED, IGNORED], False),
        ([FAILURE, FAILURE, FAILURE, IGNORED, FAILURE], True),
        ([SUCCESS] * 100 + [FAILURE] * 3, False),
        ([SUCCESS] * 100 + [FAILURE, FAILURE, IGNORED, FAILURE, FAILURE], True),
        ([SUCCESS] * 100 + [FAILURE, FAILURE, FAILURE, SUCCESS, FAILURE], False),
    ],
)
def test_it_opens_at_the_share_of_enough_requests(outcomes, opens):
    breaker, changes = breaker_with()

    send(breaker, outcomes)

    assert changes == ([State.OPEN] if opens else [])
    assert breaker.is_closed is not opens


def test_old_failures_are_forgotten():
    breaker, _ = breaker_with()
    send(breaker, [FAILURE] * 3, now=0.0)
    send(breaker, [FAILURE], now=10.0)

    assert breaker.is_closed


def test_open_refuses_until_its_time_is_over():
    breaker, _ = tripped(now=100.0)

    assert breaker.enter(104.9) == REFUSED
    assert not breaker.is_available(104.9)
    assert breaker.retry_after(104.0) == pytest.approx(1.0)
    assert breaker.is_available(105.0)
    assert breaker.retry_after(105.0) == 0.0
    assert breaker.state is State.OPEN, "looking does not modify"
    assert breaker.enter(105.0) != REFUSED
    assert breaker.state is State.HALF_OPEN


def test_exactly_the_probes_pass_half_open_however_many_come():
    breaker, changes = tripped()
    tickets = [breaker.enter(5.0) for _ in range(500)]

    assert [ticket != REFUSED for ticket in tickets] == [True] * 2 + [False] * 498
    assert not breaker.is_available(5.0)
    assert breaker.retry_after(5.0) == RULE.open

    breaker.leave(tickets[0], SUCCESS, 6.0)
    assert breaker.enter(6.0) == REFUSED, "a place that was used is used up"
    breaker.leave(tickets[1], SUCCESS, 6.0)

    assert changes == [State.OPEN, State.HALF_OPEN, State.CLOSED]
    assert breaker.is_available(6.0)
    assert breaker.retry_after(6.0) == 0.0


def test_a_probe_that_failed_opens_again_for_twice_as_long_even_if_no_more_may_be_ejected():
    breaker, _ = tripped()
    breaker.leave(breaker.enter(5.0), FAILURE, 6.0, may_open=False)

    assert breaker.state is State.OPEN
    assert breaker.retry_after(6.0) == pytest.approx(10.0)


def test_a_probe_that_was_ignored_gives_its_place_back():
    breaker, _ = tripped()
    first, second = breaker.enter(5.0), breaker.enter(5.0)
    breaker.leave(first, IGNORED, 5.5)
    third = breaker.enter(5.5)
    assert third != REFUSED

    breaker.leave(second, SUCCESS, 6.0)
    assert breaker.state is State.HALF_OPEN
    breaker.leave(third, SUCCESS, 6.0)
    assert breaker.is_closed


def test_late_news_of_an_older_generation_changes_nothing():
    breaker, changes = breaker_with()
    late = [breaker.enter(0.0) for _ in range(20)]
    send(breaker, [FAILURE] * 4)
    probe = breaker.enter(5.0)

    for ticket in late:
        breaker.leave(ticket, FAILURE, 5.0)
    assert breaker.state is State.HALF_OPEN
    for ticket in late:
        breaker.leave(ticket, SUCCESS, 5.0)
    assert breaker.state is State.HALF_OPEN

    breaker.leave(probe, FAILURE, 6.0)
    breaker.leave(probe, FAILURE, 6.0)
    breaker.leave(REFUSED, FAILURE, 6.0)
    assert changes == [State.OPEN, State.HALF_OPEN, State.OPEN]
    assert breaker.retry_after(6.0) == pytest.approx(10.0), "left twice counts once"


def test_each_trip_in_a_row_lasts_twice_as_long_up_to_a_minute_until_it_stays_closed():
    breaker, _ = tripped()
    now, lasted = 0.0, []
    for _ in range(6):
        lasted.append(breaker.retry_after(now))
        now += lasted[-1]
        breaker.leave(breaker.enter(now), FAILURE, now)
    assert lasted == pytest.approx([5.0, 10.0, 20.0, 40.0, 60.0, 60.0])

    now += 60.0
    send(breaker, [SUCCESS] * 2, now)
    send(breaker, [FAILURE] * 4, now + 59.0)
    assert breaker.retry_after(now + 59.0) == pytest.approx(60.0)

    now += 119.0
    send(breaker, [SUCCESS] * 2, now)
    send(breaker, [FAILURE] * 4, now + 60.0)
    assert breaker.retry_after(now + 60.0) == pytest.approx(5.0)


def test_one_that_flaps_rests_longer_and_longer():
    breaker, _ = tripped()
    now, lasted = 0.0, []
    for _ in range(5):
        lasted.append(breaker.retry_after(now))
        now += lasted[-1]
        send(breaker, [SUCCESS] * 2, now)
        assert breaker.is_closed
        now += 3.0
        send(breaker, [FAILURE] * 4, now)
    assert lasted == pytest.approx([5.0, 10.0, 20.0, 40.0, 60.0])


def test_a_rule_that_asks_for_more_than_a_minute_gets_it():
    breaker, _ = breaker_with(BreakerRule(of_at_least=1, open=300.0))
    send(breaker, [FAILURE])
    assert breaker.retry_after(0.0) == pytest.approx(300.0)

    breaker.leave(breaker.enter(300.0), FAILURE, 300.0)
    assert breaker.retry_after(300.0) == pytest.approx(300.0)


def test_the_time_is_jittered_by_a_fifth():
    lasted = []
    for seed in range(200):
        breaker, _ = breaker_with(rng=Random(seed))
        send(breaker, [FAILURE] * 4)
        lasted.append(breaker.retry_after(0.0))

    assert 4.0 <= min(lasted) < 4.1
    assert 5.9 < max(lasted) <= 6.0


def test_a_trip_waits_until_one_more_may_be_ejected():
    breaker, changes = breaker_with()
    send(breaker, [FAILURE] * 10, may_open=False)
    assert breaker.is_closed

    send(breaker, [SUCCESS])
    assert changes == []
    send(breaker, [FAILURE])
    assert changes == [State.OPEN]


def test_closing_forgets_the_failures_that_opened():
    breaker, _ = tripped()
    send(breaker, [SUCCESS] * 2, now=5.0)
    send(breaker, [FAILURE] * 3, now=5.0)
    assert breaker.is_closed

    breaker, _ = tripped()
    send(breaker, [SUCCESS] * 2, now=5.0)
    send(breaker, [SUCCESS, SUCCESS, SUCCESS, FAILURE], now=5.0)
    assert breaker.is_closed


def test_repr_shows_the_state():
    breaker, _ = breaker_with()
    send(breaker, [SUCCESS, FAILURE])
    assert repr(breaker) == "<Breaker closed: <Window 1 in 10 s> failed of <Window 2 in 10 s>, generation 0>"

    send(breaker, [FAILURE] * 2)
    assert repr(breaker) == "<Breaker open until 5, generation 1>"

    breaker.enter(5.0)
    assert repr(breaker) == "<Breaker half open: 1 probes may start, 2 must succeed, generation 2>"


@pytest.mark.parametrize(
    ("ejected", "total", "at_most", "answer"),
    [
        (0, 0, 1.0, False),
        (0, 1, 1.0, True),
        (0, 1, 0.5, True),
        (0, 2, 0.5, True),
        (1, 2, 0.5, False),
        (1, 2, 1.0, True),
        (0, 3, 0.5, True),
        (1, 3, 0.5, False),
        (1, 4, 0.5, True),
        (2, 4, 0.5, False),
        (2, 4, 1.0, True),
        (3, 4, 1.0, True),
        (0, 4, 0.1, True),
        (1, 4, 0.1, False),
        (0, 10, 0.1, True),
        (28, 100, 0.29, True),
        (29, 100, 0.29, False),
        (0, 10, 0.0, True),
        (1, 10, 0.0, False),
    ],
)
def test_may_eject_keeps_the_share_but_always_allows_one(ejected, total, at_most, answer):
    assert may_eject(ejected, total, at_most) is answer


class BreakerMachine(RuleBasedStateMachine):
    """The breaker beside a model that remembers every outcome and every ticket."""

    @initialize(
        failures=st.sampled_from([0.1, 0.5, 1.0]),
        of_at_least=st.integers(1, 6),
        open_seconds=st.sampled_from([0.5, 5.0, 100.0]),
        probes=st.integers(1, 3),
        seed=st.integers(0, 99),
    )
    def begin(self, failures, of_at_least, open_seconds, probes, seed):
        self.rule = BreakerRule(failures, of_at_least, 10.0, open_seconds, probes)
        self.changes = []
        self.breaker = Breaker(self.rule, Random(seed), self.changes.append)
        self.now = 1000.0
        self.state = State.CLOSED
        self.seen = []  # (second, failed) since it was last closed
        self.tickets = []  # every ticket out, current or late
        self.trips = 0  # that followed on each other
        self.opened_at = 0.0
        self.closed_at = float("-inf")
        self.succeeded = 0
        self.current = 0  # tickets of this generation that are out

    def become(self, state):
        self.state = state
        self.tickets = [(ticket, False) for ticket, _ in self.tickets]
        self.current = 0
        self.succeeded = 0
        assert self.changes[-1] is state

    def open(self):
        longest = max(60.0, self.rule.open)
        planned = min(self.rule.open * 2**self.trips, longest)
        if self.state is State.CLOSED and self.now - self.closed_at >= planned:
            self.trips, planned = 0, min(self.rule.open, longest)
        self.become(State.OPEN)
        self.opened_at = self.now
        self.trips += 1
        assert 0.8 * planned - 1e-6 <= self.breaker.retry_after(self.now) <= 1.2 * planned + 1e-6

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 3.0, 60.0, 130.0]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule()
    def enter(self):
        available = self.breaker.is_available(self.now)
        wait = self.breaker.retry_after(self.now)
        changes = len(self.changes)
        ticket = self.breaker.enter(self.now)

        assert available == (ticket != REFUSED) == (wait == 0.0)
        if len(self.changes) > changes:
            assert self.state is State.OPEN
            self.become(State.HALF_OPEN)
        if self.state is State.CLOSED:
            assert available
        elif self.state is State.HALF_OPEN:
            assert available == (self.current + self.succeeded < self.rule.probes)
        if ticket != REFUSED:
            self.tickets.append((ticket, True))
            self.current += 1

    @precondition(lambda self: self.tickets)
    @rule(which=st.integers(0, 99), outcome=st.sampled_from(Outcome), may_open=st.booleans())
    def leave(self, which, outcome, may_open):
        ticket, is_current = self.tickets.pop(which % len(self.tickets))
        changes = len(self.changes)
        self.breaker.leave(ticket, outcome, self.now, may_open=may_open)

        if not is_current:
            assert len(self.changes) == changes, "late news changes nothing"
            return
        self.current -= 1
        if self.state is State.CLOSED:
            self.left_closed(outcome, may_open)
        else:
            self.left_half_open(outcome)

    def left_closed(self, outcome, may_open):
        if outcome is not IGNORED:
            self.seen.append((int(self.now), outcome is FAILURE))
        recent = [failed for second, failed in self.seen if second > int(self.now) - 10]
        last = recent[-self.rule.of_at_least :]
        if (
            outcome is FAILURE
            and may_open
            and len(recent) >= self.rule.of_at_least
            and (sum(recent) / len(recent) >= self.rule.failures or all(last))
        ):
            self.open()

    def left_half_open(self, outcome):
        if outcome is FAILURE:
            self.open()
        elif outcome is SUCCESS:
            self.succeeded += 1
            if self.succeeded == self.rule.probes:
                self.become(State.CLOSED)
                self.closed_at = self.now
                self.seen = []

    @rule(outcome=st.sampled_from(Outcome))
    def leave_without_a_ticket(self, outcome):
        self.breaker.leave(REFUSED, outcome, self.now)

    @invariant()
    def states_agree(self):
        assert self.breaker.state is self.state
        assert self.breaker.is_closed == (self.state is State.CLOSED)
        if self.state is State.HALF_OPEN:
            assert self.current + self.succeeded <= self.rule.probes

    def teardown(self):
        following = {
            State.CLOSED: {State.OPEN},
            State.OPEN: {State.HALF_OPEN},
            State.HALF_OPEN: {State.OPEN, State.CLOSED},
        }
        path = [State.CLOSED, *getattr(self, "changes", [])]
        assert all(after in following[before] for before, after in zip(path, path[1:], strict=False))


BreakerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBreakerMachine = BreakerMachine.TestCase
