from random import Random

import pytest

from policies.policy import RetryRule
from policies.retry import Failure, RetryBudget, delay_before, may_retry

ALWAYS = {Failure.CONNECT_FAIL, Failure.CONNECT_TIMEOUT, Failure.NOT_STARTED, Failure.BUSY}
IF_IDEMPOTENT = {Failure.STALE, Failure.RESET, Failure.PROTOCOL, Failure.SERVER_ERROR}


class Highest(Random):
    def random(self) -> float:
        return 1.0


@pytest.mark.parametrize("failure", Failure)
@pytest.mark.parametrize("idempotent", [False, True])
def test_what_may_have_been_started_is_retried_only_where_the_route_says_so(failure, idempotent):
    rule = RetryRule(attempts=2, idempotent=idempotent)

    answer = may_retry(failure, rule, 1, RetryBudget(0.2), now=0.0)

    assert answer is (failure in ALWAYS or (idempotent and failure in IF_IDEMPOTENT))


@pytest.mark.parametrize(
    ("attempts", "made", "answer"), [(1, 1, False), (2, 1, True), (2, 2, False), (3, 2, True), (3, 3, False)]
)
def test_attempts_count_the_first_one(attempts, made, answer):
    assert may_retry(Failure.CONNECT_FAIL, RetryRule(attempts=attempts), made, RetryBudget(0.2), now=0.0) is answer


def test_a_retry_is_taken_out_of_the_budget_and_a_refusal_is_not():
    rule, budget = RetryRule(attempts=2), RetryBudget(0.0, floor=1)

    assert not may_retry(Failure.RESET, rule, 1, budget, now=0.0)
    assert not may_retry(Failure.BUSY, rule, 2, budget, now=0.0)
    assert may_retry(Failure.BUSY, rule, 1, budget, now=0.0)
    assert not may_retry(Failure.BUSY, rule, 1, budget, now=0.0)


@pytest.mark.parametrize(("requests", "allowed"), [(0, 10), (4, 10), (5, 11), (100, 30), (1000, 210)])
def test_the_budget_is_a_floor_and_a_fifth_of_the_requests(requests, allowed):
    budget = RetryBudget(0.2)
    for _ in range(requests):
        budget.deposit(0.0)

    assert sum(budget.withdraw(1.0) for _ in range(2000)) == allowed


def test_the_budget_comes_back_as_the_window_moves_on():
    budget = RetryBudget(0.5, floor=1, window=10.0)
    for now in range(4):
        budget.deposit(float(now))
    assert [budget.withdraw(4.0) for _ in range(4)] == [True, True, True, False]

    assert not budget.withdraw(13.0), "three were taken, one is allowed"
    assert budget.withdraw(14.0)
    assert not budget.withdraw(14.0)


def test_in_a_storm_the_backends_bear_a_fifth_more():
    """Every attempt fails: 100 requests a second for a minute, each with a client that never gives up here."""
    budget, rule, sent = RetryBudget(0.2), RetryRule(attempts=5), 0
    for i in range(6000):
        now, attempts = i / 100, 1
        budget.deposit(now)
        while may_retry(Failure.BUSY, rule, attempts, budget, now):
            attempts += 1
        sent += attempts

    assert sent <= 1.2 * 6000 + 10 * 7


@pytest.mark.parametrize("failure", Failure)
def test_only_a_backend_that_said_it_is_full_is_a_reason_to_wait(failure):
    longest = [delay_before(failure, retries, Highest()) for retries in range(6)]

    if failure in {Failure.BUSY, Failure.NOT_STARTED}:
        assert longest == pytest.approx([0.025, 0.05, 0.1, 0.2, 0.25, 0.25])
    else:
        assert longest == [0.0] * 6


def test_repr_shows_the_state():
    budget = RetryBudget(0.2)
    budget.deposit(0.0)

    assert repr(budget) == "<RetryBudget <Window 0 in 10 s> of 10 + 20% of <Window 1 in 10 s>>"
