import pytest

from gateway.admission import Account, Admission
from gateway.allowance import used_tokens
from observability.events import Attempt
from policies import errors
from policies.policy import Plan, Rate
from policies.quota import Estimate
from tests.support.call import call_of, trail_of

PLAN = Plan("free", Rate(60, 60.0), 2, tokens=Rate(1000, 60.0), token_burst=1000)
ASKS_100 = call_of(body=b'{"model":"tiny","max_tokens":90}      ')  # and 10 of its prompt


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def account(clock) -> Account:
    return Admission(None, lambda: 1, clock).account(PLAN, "alice")


def left(account: Account) -> float:
    return account.tokens.meter.remaining(account._now())


def ended(clock, outcome: str = "ok", *, status: int = 200, tokens: tuple[int, int] = (-1, -1), events: int = 0):
    """The trail of a request as its attempt left it."""
    trail = trail_of(clock)
    finish(trail, outcome, status=status, tokens=tokens, events=events)
    return trail


def finish(trail, outcome: str = "ok", *, status: int = 200, tokens: tuple[int, int] = (-1, -1), events: int = 0):
    trail.attempts.append(Attempt("a", "tiny", 0.0, 0.0, 0.0, outcome, status, ""))
    trail.end_reason, trail.status, trail.events = outcome, status, events
    trail.tokens_in, trail.tokens_out = tokens


@pytest.mark.parametrize(
    ("how", "tokens"),
    [
        ({"tokens": (7, 30)}, 37),
        ({"events": 33}, 43),
        ({}, 110),
        ({"outcome": "client_abort", "events": 12}, 22),
        ({"outcome": "stream_truncated", "events": 12}, 22),
        ({"outcome": "client_abort", "status": 0}, 10),
        ({"outcome": "connect_fail", "status": 503}, 0),
        ({"outcome": "shed", "status": 0}, 0),
        ({"outcome": "upstream_error", "status": 502}, 0),
        ({"outcome": "upstream_timeout", "status": 504}, 0),
        ({"status": 400}, 0),
        ({"status": 422, "tokens": (7, 30)}, 0),
    ],
    ids=str,
)
def test_what_a_request_has_come_to(clock, how, tokens):
    assert used_tokens(ended(clock, **how), Estimate(10, 100)) == tokens


def test_nothing_where_no_backend_was_asked(clock):
    assert used_tokens(trail_of(clock), Estimate(10, 100)) == 0


async def test_what_it_may_come_to_is_set_aside_until_it_is_known_what_it_came_to(account, clock):
    trail = trail_of(clock)
    reservation = await account.reserve(ASKS_100, trail)
    assert left(account) == 900
    assert b"x-ratelimit-remaining-tokens: 900\r\n" in trail.limit_lines
    assert b"x-ratelimit-remaining-requests: 2\r\n" in trail.limit_lines
    finish(trail, tokens=(7, 30))
    reservation.settle(trail)
    assert left(account) == 963


async def test_more_than_was_set_aside_is_charged_too_and_may_leave_a_debt(account, clock):
    trail = trail_of(clock)
    reservation = await account.reserve(ASKS_100, trail)
    finish(trail, tokens=(700, 600))
    reservation.settle(trail)
    assert left(account) == -300
    with pytest.raises(errors.RateLimited) as refused:
        await account.reserve(ASKS_100, trail)
    assert refused.value.retry_after == pytest.approx(400 / (1000 / 60))


async def test_who_is_over_the_limit_is_told_by_its_rule_and_gets_the_request_back(account, clock):
    for _ in range(10):
        await account.reserve(ASKS_100, trail_of(clock))
    account.take_nowait(0.0)
    with pytest.raises(errors.RateLimited) as refused:
        await account.reserve(ASKS_100, trail_of(clock))
    assert refused.value.rule == "plans.free.tokens"
    assert refused.value.retry_after == pytest.approx(6.0)
    assert refused.value.message == "The token limit of this plan is reached: 1000 per 1m0s."
    assert account.meter.remaining(0.0) == 2.0


async def test_who_asks_for_more_than_the_whole_limit_is_not_told_to_come_back(account, clock):
    account.take_nowait(0.0)
    call = call_of(body=b'{"model":"tiny","max_tokens":5000}')
    with pytest.raises(errors.BodyTooLarge) as refused:
        await account.reserve(call, trail_of(clock))
    assert (refused.value.rule, refused.value.retry_after) == ("plans.free.tokens", None)
    assert refused.value.message == (
        "This request may use 5009 tokens, and its plan allows 1000 per 1m0s: "
        "ask for a shorter answer (`max_tokens`), or send less."
    )
    assert (account.meter.remaining(0.0), left(account)) == (1.0, 1000)  # a mistake costs its request, as others do


async def test_the_whole_limit_may_be_used_by_one_request(account, clock):
    assert await account.reserve(call_of(body=b'{"model":"tiny","max_tokens":991}'), trail_of(clock))
    assert left(account) == 0


async def test_what_has_no_tokens_costs_none(account, clock):
    assert await account.reserve(call_of("/v2/models/m/infer"), trail_of(clock)) is None
    assert left(account) == 1000


async def test_repr_shows_the_state(account):
    assert repr(account.tokens).startswith("<Allowance plans.free.tokens, <LocalMeter <Bucket 1000 of 1000")
