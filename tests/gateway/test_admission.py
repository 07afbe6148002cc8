from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gateway import admission
from gateway.admission import IDLE_SECONDS, UNLIMITED, Admission, bucket_key
from gateway.meter import UNKNOWN, LeasedMeter, LocalMeter, Unmetered
from policies import errors
from policies.policy import Plan, Rate, WhenStoreIsDown
from tests.support.lease_ledger import Ledger
from tests.support.ledger_store import LedgerStore
from tests.support.virtual_clock import virtual_time

FREE = Plan("free", Rate(60, 60.0), 2, concurrency=2)
BOTH = replace(FREE, tokens=Rate(100, 60.0), token_burst=100)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def alone(clock) -> Admission:
    """Without a store."""
    return Admission(None, lambda: 1, clock)


class TestAccount:
    def test_admits_the_burst_then_refuses(self, alone):
        account = alone.account(FREE, "alice")
        assert [account.take_nowait(0.0) for _ in range(2)] == [0.0, 0.0]
        refusal = account.refusal(account.take_nowait(0.25))
        assert account.refusal_at_once(7.0).__dict__ == {**refusal.__dict__, "retry_after": 7.0}
        assert refusal.rule == "plans.free.requests"
        assert refusal.retry_after == pytest.approx(0.75)
        assert refusal.message == "The request limit of this plan is reached: 60 per 1m0s."
        assert account.take_nowait(1.0) == 0.0

    async def test_who_would_wait_for_the_store_is_decided_as_well(self, alone):
        account = alone.account(FREE, "alice")
        assert [await account.take(0.0) for _ in range(3)] == [0.0, 0.0, 1.0]

    def test_refund(self, alone):
        account = alone.account(FREE, "alice")
        for _ in range(2):
            account.take_nowait(0.0)
        account.refund()
        assert account.take_nowait(0.0) == 0.0

    def test_slots_are_given_back_whatever_happens(self, alone):
        account = alone.account(FREE, "alice")
        with account:
            assert account.in_flight == 1
        with pytest.raises(KeyError), account:
            raise KeyError
        assert account.in_flight == 0

    def test_who_gets_no_slot_gets_the_token_back(self, alone):
        account = alone.account(Plan("free", Rate(60, 60.0), 3, concurrency=2), "alice")
        for _ in range(3):
            account.take_nowait(0.0)
        with account, account:
            with pytest.raises(errors.ConcurrencyExceeded) as refused, account:
                pass
            assert account.in_flight == 2
        assert refused.value.rule == "plans.free.concurrency"
        assert refused.value.code == "concurrency"
        assert refused.value.message == "This plan allows 2 requests at a time."
        assert refused.value.retry_after == 1.0
        assert account.take_nowait(0.0) == 0.0

    def test_headers(self, alone):
        account = alone.account(FREE, "alice")
        account.take_nowait(0.0)
        assert account.headers(0.0).startswith(b'ratelimit: "free";r=1;t=1\r\nratelimit-policy: "free";q=60;w=60\r\n')

    def test_repr_shows_the_state(self, alone):
        account = alone.account(FREE, "alice")
        with account:
            assert repr(account).startswith("<Account plan free, 1 in flight, <LocalMeter")


class TestTokens:
    def test_a_plan_without_them_has_no_allowance(self, alone):
        assert alone.account(FREE, "alice").tokens is None

    def test_headers_tell_both_limits(self, alone):
        lines = alone.account(BOTH, "alice").headers(0.0).decode().splitlines()
        assert lines[0] == 'ratelimit: "free";r=2;t=0'
        assert lines[5] == 'ratelimit: "free.tokens";r=100;t=0'
        assert len(lines) == 10

    @pytest.mark.parametrize(("before", "after"), [(FREE, BOTH), (BOTH, FREE)])
    def test_a_reload_may_add_or_drop_them(self, alone, before, after):
        account = alone.account(before, "alice")
        assert alone.account(after, "alice") is account
        assert (account.tokens is None) == (after.tokens is None)

    def test_a_reload_changes_the_numbers_and_keeps_the_level(self, alone):
        account = alone.account(BOTH, "alice")
        account.tokens.meter.take_nowait(0.0, 50)
        alone.account(replace(BOTH, tokens=Rate(1000, 60.0), token_burst=1000), "alice")
        assert account.headers(0.0).endswith(b"remaining-tokens: 500\r\nx-ratelimit-reset-tokens: 30s\r\n")

    def test_an_account_that_owes_is_not_forgotten_before_it_is_full(self, alone, clock):
        account = alone.account(BOTH, "alice")
        account.tokens.meter.settle(0.0, 0, 1000)
        assert not account.is_idle(119.0)
        assert account.is_idle(120.0)


class TestUnlimited:
    async def test_admits(self):
        assert UNLIMITED.take_nowait(0.0) == await UNLIMITED.take(0.0) == 0.0
        with UNLIMITED:
            UNLIMITED.refund()
        assert UNLIMITED.headers(0.0) == b""

    def test_a_plan_without_a_rate_still_has_slots(self, alone):
        account = alone.account(Plan("free", concurrency=1), "alice")
        assert account.headers(0.0) == b""
        assert account.take_nowait(0.0) == 0.0
        with account, pytest.raises(errors.ConcurrencyExceeded), account:
            pass


class TestFinding:
    def test_one_account_per_plan_and_consumer(self, alone):
        assert alone.account(FREE, "alice") is alone.account(FREE, "alice")
        assert alone.account(FREE, "alice") is not alone.account(FREE, "bob")
        assert alone.account(FREE, "alice") is not alone.account(Plan("gold", Rate(60, 60.0), 2), "alice")

    def test_a_reload_changes_the_numbers_and_keeps_the_level_and_the_slots(self, alone):
        account = alone.account(FREE, "alice")
        account.take_nowait(0.0)
        with account:
            again = alone.account(Plan("free", Rate(100, 1.0), 10, concurrency=1), "alice")
            assert again is account
            assert account.in_flight == 1
            with pytest.raises(errors.ConcurrencyExceeded), account:
                pass
        assert b"remaining-requests: 6\r\n" in account.headers(0.0)  # half, and the token of who got no slot

    @pytest.mark.parametrize(("before", "after"), [(FREE, Plan("free")), (Plan("free"), FREE)])
    def test_a_reload_may_add_or_drop_the_rate(self, alone, before, after):
        account = alone.account(before, "alice")
        assert alone.account(after, "alice") is account
        assert isinstance(account.meter, Unmetered if after.requests is None else LocalMeter)

    def test_idle_accounts_are_forgotten(self, alone, clock):
        alone.account(FREE, "alice")
        clock.now = IDLE_SECONDS
        alone.account(FREE, "bob")
        assert repr(alone) == "<Admission 1 accounts, None>"

    def test_accounts_are_not_idle_while_they_are_not_full_or_in_use(self, alone, clock):
        slow = alone.account(Plan("free", Rate(1, 3600.0), 2), "alice")
        slow.take_nowait(0.0)
        used = alone.account(FREE, "bob")
        with used:
            clock.now = IDLE_SECONDS
            for name in "cdef":
                alone.account(FREE, name)
        assert not alone.account(Plan("free", Rate(1, 3600.0), 2), "alice").is_idle(clock.now)
        assert (
            alone.account(Plan("free", Rate(1, 3600.0), 2), "alice").headers(0.0).startswith(b'ratelimit: "free";r=1;')
        )

    def test_their_number_is_bounded(self, alone, monkeypatch):
        monkeypatch.setattr(admission, "MOST_ACCOUNTS", 10)
        for number in range(100):
            alone.account(FREE, f"consumer {number}")
        assert repr(alone) == "<Admission 10 accounts, None>"

    def test_an_account_with_a_request_under_way_is_never_doubled(self, alone, monkeypatch):
        monkeypatch.setattr(admission, "MOST_ACCOUNTS", 1)
        account = alone.account(FREE, "alice")
        with account:
            alone.account(FREE, "bob")
            assert alone.account(FREE, "alice") is account

    def test_without_a_plan_there_is_no_limit(self, alone):
        assert alone.account(None, "alice") is UNLIMITED

    def test_an_equal_plan_of_a_new_policy_changes_nothing(self, alone, monkeypatch):
        account = alone.account(FREE, "alice")
        monkeypatch.setattr(LocalMeter, "reconfigure", None)
        same = Plan("free", Rate(60, 60.0), 2, concurrency=2)
        assert alone.account(same, "alice") is account
        assert account.plan is same


class TestKey:
    def test_shows_no_name(self):
        key = bucket_key("free", "alice")
        assert key.startswith(b"weir:v1:bucket:{")
        assert len(key) == 49
        assert b"alice" not in key

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (("a", "b|c"), ("a|b", "c")),
            (("a", ""), ("", "a")),
            (("1|a", "b"), ("1", "a|b")),
            (("p", "{x}"), ("p", "x")),
        ],
    )
    def test_different_names_have_different_keys(self, one, other):
        assert bucket_key(*one) != bucket_key(*other)

    @pytest.mark.parametrize("consumer", ["x" * 10_000, "a\nb:{c}", "\ud800", "名前", ""])
    def test_any_name_will_do(self, consumer):
        assert len(bucket_key("free", consumer)) == 49


def shared(store: LedgerStore) -> Admission:
    return Admission(store, lambda: 1, asyncio.get_running_loop().time)


class TestWithAStore:
    @virtual_time
    async def test_asks_then_admits(self):
        account = shared(LedgerStore(Ledger())).account(FREE, "alice")
        assert isinstance(account.meter, LeasedMeter)
        assert account.take_nowait(0.0) == UNKNOWN
        assert await account.take(0.0) == 0.0
        assert account.take_nowait(0.0) == UNKNOWN
        assert await account.take(0.0) == 0.0
        assert await account.take(0.0) > 0.0
        assert account.take_nowait(asyncio.get_running_loop().time()) > 0.0

    @virtual_time
    async def test_consumers_and_plans_have_buckets_of_their_own(self):
        ledger = Ledger()
        everybody = shared(LedgerStore(ledger))
        for plan, consumer in [(FREE, "alice"), (FREE, "bob"), (Plan("gold", Rate(1, 1.0), 2), "alice")]:
            await everybody.account(plan, consumer).take(0.0)
        assert len(ledger.buckets) == 3

    @virtual_time
    async def test_closed_plans_are_refused_while_the_store_is_away(self):
        store = LedgerStore(Ledger())
        store.up = False
        closed = Plan("free", Rate(60, 60.0), 2, when_store_is_down=WhenStoreIsDown.CLOSED)
        account = shared(store).account(closed, "alice")
        with pytest.raises(errors.StoreUnavailable):
            account.take_nowait(0.0)
