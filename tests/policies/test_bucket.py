from fractions import Fraction
from math import inf, isclose

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from policies.bucket import Bucket

# Each story: rate per second, capacity, then rows of (now, n, what take() answers, level after).
STORIES = {
    "a burst, then one a second": (1.0, 3.0, [
        (0.0, 1, 0.0, 2), (0.0, 1, 0.0, 1), (0.0, 1, 0.0, 0), (0.0, 1, 1.0, 0), (0.5, 1, 0.5, 0.5), (1.0, 1, 0.0, 0),
    ]),
    "an idle bucket fills to the brim and no further": (10.0, 5.0, [(0.0, 5, 0.0, 0), (1000.0, 5, 0.0, 0), (1000.0, 1, 0.1, 0)]),
    "a refusal takes nothing": (1.0, 10.0, [(0.0, 8, 0.0, 2), (0.0, 5, 3.0, 2), (0.0, 2, 0.0, 0)]),
    "more than it can hold never comes": (1.0, 10.0, [(0.0, 11, inf, 10), (1e6, 11, inf, 10), (1e6, 10, 0.0, 0)]),
    "nothing is always there": (1.0, 1.0, [(0.0, 1, 0.0, 0), (0.0, 0, 0.0, 0)]),
    "an old reading of the clock takes what is there": (1.0, 2.0, [(10.0, 1, 0.0, 1), (5.0, 1, 0.0, 0)]),
    "an old reading of the clock refills nothing": (1.0, 2.0, [(10.0, 2, 0.0, 0), (5.0, 1, 1.0, 0), (10.0, 1, 1.0, 0), (11.0, 1, 0.0, 0)]),
    "fractions add up": (3.0, 1.0, [(0.0, 1, 0.0, 0), (0.25, 1, 1 / 12, 0.75), (1 / 3, 1, 0.0, 0)]),
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
def test_stories(story):
    per_second, capacity, rows = STORIES[story]
    bucket = Bucket(per_second, capacity, now=0.0)

    for now, n, wait, level in rows:
        assert bucket.take(now, n) == pytest.approx(wait), (now, n)
        assert bucket.tokens_at(now) == pytest.approx(level), (now, n)


def test_looking_does_not_modify():
    bucket = Bucket(1.0, 10.0, now=0.0)
    bucket.take(0.0, 10)

    assert [bucket.tokens_at(now) for now in (5.0, 100.0, 0.0, 5.0)] == [5.0, 10.0, 0.0, 5.0]


def test_what_is_given_back_can_be_taken_again_but_does_not_overflow():
    bucket = Bucket(1.0, 10.0, now=0.0)
    bucket.take(0.0, 4)
    bucket.give(3)
    assert bucket.tokens_at(0.0) == 9.0

    bucket.give(3)
    assert bucket.tokens_at(0.0) == 10.0


def test_what_was_used_already_is_owed_but_never_more_than_the_bucket_holds():
    bucket = Bucket(1.0, 10.0, now=0.0)
    bucket.charge(0.0, 13)
    assert bucket.tokens_at(0.0) == -3.0
    assert bucket.take(1.0) == 3.0
    assert bucket.take(4.0) == 0.0

    bucket.charge(4.0, 1e9)
    assert bucket.tokens_at(4.0) == -10.0


def test_a_charge_is_taken_from_what_is_there_by_then():
    bucket = Bucket(1.0, 10.0, now=0.0)
    bucket.take(0.0, 4)
    bucket.charge(100.0, 4)
    assert bucket.tokens_at(100.0) == 6.0
    bucket.charge(50.0, 1)  # an old reading of the clock
    assert bucket.tokens_at(100.0) == 5.0


@pytest.mark.parametrize(
    ("level", "capacity", "expected"),
    [(10.0, 40.0, 40.0), (5.0, 40.0, 20.0), (0.0, 40.0, 0.0), (10.0, 2.0, 2.0), (5.0, 2.0, 1.0)],
)
def test_a_reload_keeps_the_fill_level(level, capacity, expected):
    bucket = Bucket(1.0, 10.0, now=0.0)
    bucket.take(0.0, 10.0 - level)

    bucket.reconfigure(4.0, capacity, now=0.0)

    assert bucket.tokens_at(0.0) == pytest.approx(expected)
    assert bucket.tokens_at(0.1) == pytest.approx(min(capacity, expected + 0.4))


def test_a_reload_counts_the_time_before_it_at_the_old_rate():
    bucket = Bucket(1.0, 10.0, now=0.0)
    bucket.take(0.0, 10)
    bucket.reconfigure(100.0, 10.0, now=2.0)

    assert bucket.tokens_at(2.0) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("per_second", "capacity"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (inf, 1.0), (float("nan"), 1.0)]
)
def test_a_rate_or_capacity_that_means_nothing_is_refused(per_second, capacity):
    with pytest.raises(ValueError, match="above 0"):
        Bucket(per_second, capacity, now=0.0)
    with pytest.raises(ValueError, match="above 0"):
        Bucket(1.0, 1.0, now=0.0).reconfigure(per_second, capacity, now=0.0)


def test_repr_shows_the_state():
    bucket = Bucket(0.5, 10.0, now=7.0)
    bucket.take(7.0, 4)

    assert repr(bucket) == "<Bucket 6 of 10 at 7, 0.5/s>"


class BucketMachine(RuleBasedStateMachine):
    """The bucket beside a model that reckons in exact fractions and keeps the whole history."""

    amounts = st.floats(0.0, 50.0)

    @initialize(per_second=st.floats(0.01, 1e4), capacity=st.floats(0.5, 1e4), start=st.floats(0.0, 1e6))
    def begin(self, per_second, capacity, start):
        self.now = start
        self.bucket = Bucket(per_second, capacity, start)
        self.rate, self.capacity = Fraction(per_second), Fraction(capacity)
        self.level = self.capacity
        self.at = Fraction(start)

    def refill(self, now):
        elapsed = max(Fraction(0), Fraction(now) - self.at)
        self.level = min(self.capacity, self.level + elapsed * self.rate)
        self.at += elapsed

    @property
    def slack(self):
        """What rounding may cost: the clock is a float near 1e6, so one step of it is about 1e-10 s of refill."""
        return 1e-9 * (float(self.capacity) + float(self.rate)) + 1e-9

    @rule(elapsed=st.floats(0.0, 100.0))
    def time_passes(self, elapsed):
        self.now += elapsed

    @rule(n=amounts, late=st.sampled_from([0.0, 0.0, 0.001, 5.0, 1e9]))
    def take(self, n, late):
        now = self.now - late
        before = self.bucket.tokens_at(now)
        wait = self.bucket.take(now, n)
        if wait == 0.0:
            self.refill(now)
            self.level -= Fraction(n)
            assert before >= n
        else:
            assert self.bucket.tokens_at(now) == before, "a refusal takes nothing"
            assert before < n
            assert (wait == inf) == (n > self.capacity)

    @rule(n=st.floats(0.1, 50.0))
    def wait_as_told(self, n):
        wait = self.bucket.take(self.now, n)
        if wait == 0.0:
            self.refill(self.now)
            self.level -= Fraction(n)
            return
        if wait == inf:
            return
        assert self.bucket.tokens_at(self.now + wait * 0.999) <= n + self.slack, "not earlier"
        assert self.bucket.tokens_at(self.now + wait) >= n - self.slack, "not later"

    @rule(n=amounts)
    def give(self, n):
        self.bucket.give(n)
        self.level = min(self.capacity, self.level + Fraction(n))

    @rule(n=amounts)
    def charge(self, n):
        self.bucket.charge(self.now, n)
        self.refill(self.now)
        self.level = max(-self.capacity, self.level - Fraction(n))

    @rule(per_second=st.floats(0.01, 1e4), capacity=st.floats(0.5, 1e4))
    def reload(self, per_second, capacity):
        self.refill(self.now)
        self.level = self.level / self.capacity * Fraction(capacity)
        self.rate, self.capacity = Fraction(per_second), Fraction(capacity)
        self.bucket.reconfigure(per_second, capacity, self.now)

    @invariant()
    def level_is_the_models(self):
        level = self.bucket.tokens_at(self.now)
        assert -self.bucket.capacity - self.slack <= level <= self.bucket.capacity
        expected = self.level + max(Fraction(0), Fraction(self.now) - self.at) * self.rate
        assert isclose(level, min(self.capacity, expected), rel_tol=1e-6, abs_tol=self.slack)


BucketMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBucketMachine = BucketMachine.TestCase
