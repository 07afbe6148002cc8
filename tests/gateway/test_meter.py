from __future__ import annotations

import asyncio
import random

import pytest

from gateway.meter import STORE_SECONDS, UNKNOWN, LeasedMeter, LocalMeter, Unmetered
from policies import errors
from policies.bucket import Bucket
from policies.lease import BELIEVED_SECONDS, KEEP_SECONDS, RESERVED_SECONDS, TELL_SECONDS, Limit
from policies.policy import Plan, Rate, WhenStoreIsDown
from tests.support.lease_ledger import MICRO, Ledger
from tests.support.ledger_store import LedgerStore
from tests.support.virtual_clock import virtual_time

KEY = b"bucket"


def plan(rate: Rate, burst: int, when_down: WhenStoreIsDown = WhenStoreIsDown.SHARE) -> Plan:
    return Plan("free", rate, burst, when_store_is_down=when_down)


def leased(store: LedgerStore, the_plan: Plan, gateways: int = 1) -> LeasedMeter:
    limit = Limit(the_plan.burst, the_plan.requests)
    return LeasedMeter(store, KEY, the_plan, limit, live_gateways=lambda: gateways, now=now)


def now() -> float:
    return asyncio.get_running_loop().time()


async def take(meter: LeasedMeter, n: int = 1) -> float:
    seconds = meter.take_nowait(now(), n)
    return await meter.take(n) if seconds == UNKNOWN else seconds


async def take_many(meter: LeasedMeter, count: int) -> int:
    """How many of `count` requests at once are admitted."""
    return (await asyncio.gather(*(take(meter) for _ in range(count)))).count(0.0)


def level(ledger: Ledger) -> float:
    return ledger.buckets[KEY].level / MICRO


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


MINUTE = plan(Rate(60, 60.0), 10)
FAST = plan(Rate(100, 1.0), 100)


class TestUnmetered:
    @virtual_time
    async def test_admits(self):
        meter = Unmetered()
        assert meter.take_nowait(0.0) == 0.0
        assert await meter.take() == 0.0
        meter.put_back(0.0)
        assert meter.remaining(0.0) == float("inf")
        assert repr(meter) == "<Unmetered>"


class TestLocal:
    @virtual_time
    async def test_is_a_bucket(self):
        meter = LocalMeter(Limit(2, Rate(1, 1.0)), now)
        assert [meter.take_nowait(0.0) for _ in range(3)] == [0.0, 0.0, 1.0]
        meter.put_back(0.0)
        assert await meter.take() == 0.0
        assert await meter.take() == 1.0
        assert meter.remaining(0.0) == 0.0

    @virtual_time
    async def test_keeps_its_fill_level_under_a_new_limit(self):
        meter = LocalMeter(Limit(2, Rate(1, 1.0)), now)
        meter.take_nowait(0.0)
        meter.reconfigure(FAST, Limit(100, Rate(100, 1.0)))
        assert meter.remaining(0.0) == 50.0

    @virtual_time
    async def test_settles_for_less_and_for_more(self):
        meter = LocalMeter(Limit(100, Rate(1, 1.0)), now)
        assert meter.take_nowait(0.0, 60) == 0.0
        assert await meter.take(50) == 10.0
        meter.settle(0.0, 60, 20)
        assert meter.remaining(0.0) == 80.0
        assert await meter.take(80) == 0.0
        meter.settle(0.0, 80, 120)
        assert meter.remaining(0.0) == -40.0
        assert meter.take_nowait(0.0, 1) == 41.0


class TestTaking:
    @virtual_time
    async def test_admits_the_burst_and_no_more(self, ledger):
        meter = leased(LedgerStore(ledger), MINUTE)
        assert await take_many(meter, 25) == 10

    @virtual_time
    async def test_a_burst_over_several_replicas_is_one_burst(self, ledger):
        meters = [leased(LedgerStore(ledger, name), MINUTE, gateways=3) for name in "abc"]
        assert sum(await asyncio.gather(*(take_many(meter, 8) for meter in meters))) == 10

    @virtual_time
    async def test_one_question_for_all_who_wait(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, MINUTE)
        await take_many(meter, 8)
        assert [ask.need for ask in store.asked] == [8]

    @virtual_time
    async def test_repr_shows_the_state(self, ledger):
        meter = leased(LedgerStore(ledger), MINUTE)
        waiting = asyncio.create_task(take(meter))
        await asyncio.sleep(0)
        assert repr(meter).startswith("<LeasedMeter asking, 1 waiting, <Slice 0 in hand until 0, bucket 10 of 10")
        await waiting

    @virtual_time
    async def test_who_comes_while_asking_is_asked_for_next(self, ledger):
        store = LedgerStore(ledger, round_trip=0.01)
        meter = leased(store, MINUTE)
        first = asyncio.create_task(take(meter))
        await asyncio.sleep(0.005)
        second = asyncio.create_task(take_many(meter, 3))
        assert (await first, await second) == (0.0, 3)
        assert [ask.need for ask in store.asked] == [1, 3]

    @virtual_time
    async def test_a_refusal_tells_when_to_come_back_and_asks_no_more_until_then(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, MINUTE)
        assert await take_many(meter, 11) == 10
        asked = len(store.asked)
        for _ in range(1000):
            assert meter.take_nowait(now()) == pytest.approx(1.0, abs=0.01)
        assert len(store.asked) == asked
        await asyncio.sleep(1.0)
        assert await take(meter) == 0.0

    @virtual_time
    async def test_a_busy_replica_spends_what_it_holds_without_waiting(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, FAST)
        waited = 0
        for _ in range(200):  # 80 % of the rate
            waited += meter.take_nowait(now()) == UNKNOWN and await meter.take() == 0.0
            await asyncio.sleep(0.0125)
        assert waited <= 3
        assert len(store.asked) < 100

    @virtual_time
    async def test_spare_tokens_go_back_when_the_traffic_ends(self, ledger):
        meter = leased(LedgerStore(ledger), FAST)
        await take_many(meter, 10)
        await take_many(meter, 1)  # now some are spare
        taken = level(ledger)
        await asyncio.sleep(KEEP_SECONDS + 0.01)
        assert level(ledger) > taken
        assert all(lease.held == 0 for lease in ledger.buckets[KEY].leases.values())

    @virtual_time
    async def test_remaining(self, ledger):
        meter = leased(LedgerStore(ledger), MINUTE)
        assert meter.remaining(now()) == 10.0
        await take_many(meter, 4)
        assert meter.remaining(now()) == pytest.approx(6.0, abs=0.01)
        await take_many(meter, 7)
        assert meter.remaining(now()) == 0.0

    @virtual_time
    async def test_a_changed_limit_is_in_force_with_the_next_question(self, ledger):
        meter = leased(LedgerStore(ledger), MINUTE)
        assert await take_many(meter, 10) == 10
        meter.reconfigure(FAST, Limit(100, Rate(100, 1.0)))
        await asyncio.sleep(0.5)
        assert await take_many(meter, 100) == 50

    @virtual_time
    async def test_what_another_replica_gives_back_is_found_in_time(self, ledger):
        slow = plan(Rate(1, 3600.0), 40)
        one, other = (leased(LedgerStore(ledger, name), slow, gateways=2) for name in "ab")
        assert await take_many(one, 20) == 20
        assert await take_many(one, 1) == 1  # now five are spare
        assert await take_many(other, 20) == 14
        assert other.take_nowait(now()) == pytest.approx(3600.0, abs=1.0)  # what it is told is the truth
        await asyncio.sleep(BELIEVED_SECONDS + 0.01)
        assert await take_many(other, 20) == 5

    @virtual_time
    async def test_what_was_admitted_while_an_answer_was_late_is_admitted_once(self, ledger):
        store = LedgerStore(ledger, round_trip=0.04)
        meter = leased(store, MINUTE)
        first = asyncio.create_task(take(meter))
        await asyncio.sleep(0.005)
        assert (await take(meter), await first) == (0.0, 0.0)  # alone: the answer comes too late for both
        await asyncio.sleep(0.05)
        store.up = False
        assert await take_many(meter, 20) == 8


class TestPuttingBack:
    @virtual_time
    async def test_the_store_hears_of_it_though_nobody_asks_again(self, ledger):
        meter = leased(LedgerStore(ledger), MINUTE)
        assert await take_many(meter, 4) == 4
        taken = level(ledger)
        meter.put_back(now())
        await asyncio.sleep(KEEP_SECONDS + 0.01)
        assert level(ledger) >= taken + 1.0

    @virtual_time
    async def test_the_token_can_be_used_again(self, ledger):
        meter = leased(LedgerStore(ledger), MINUTE)
        assert await take_many(meter, 11) == 10
        meter.put_back(now())
        assert await take_many(meter, 2) == 1

    @virtual_time
    async def test_by_another_replica(self, ledger):
        mine, other = (leased(LedgerStore(ledger, name), MINUTE, gateways=3) for name in "ab")
        assert await take_many(mine, 10) == 10
        mine.put_back(now())
        mine.put_back(now())
        assert await take(mine) == 0.0  # and tells of the other one
        assert await take_many(other, 3) == 1


class TestCancelling:
    @pytest.mark.parametrize("after", [0.0, 0.0001, 0.0004, 0.0005, 0.0006])
    @virtual_time
    async def test_at_any_moment_leaves_the_bucket_as_it_was(self, ledger, after):
        meter = leased(LedgerStore(ledger), MINUTE)
        waiting = [asyncio.create_task(take(meter)) for _ in range(5)]
        await asyncio.sleep(after)
        for each in waiting:
            each.cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        admitted = ended.count(0.0)
        await asyncio.sleep(0.01)
        assert admitted + await take_many(meter, 20) == 10

    @virtual_time
    async def test_between_the_answer_and_going_on(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, MINUTE)
        waiting = asyncio.create_task(take(meter))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(store.round_trip, waiting.cancel)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await take_many(meter, 20) == 10

    @virtual_time
    async def test_of_some_leaves_the_others(self, ledger):
        meter = leased(LedgerStore(ledger), MINUTE)
        waiting = [asyncio.create_task(take(meter)) for _ in range(6)]
        await asyncio.sleep(0)
        for each in waiting[::2]:
            each.cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert ended.count(0.0) == 3


class TestWithoutTheStore:
    @virtual_time
    async def test_share_is_the_limit_divided_by_the_gateways(self, ledger):
        store = LedgerStore(ledger)
        store.up = False
        meter = leased(store, plan(Rate(60, 60.0), 8), gateways=4)
        assert [meter.take_nowait(0.0) for _ in range(3)] == [0.0, 0.0, pytest.approx(4.0)]
        assert meter.remaining(0.0) == 0.0

    @virtual_time
    async def test_a_share_is_never_less_than_a_token(self, ledger):
        store = LedgerStore(ledger)
        store.up = False
        meter = leased(store, plan(Rate(1, 1.0), 1), gateways=4)
        assert [meter.take_nowait(0.0) for _ in range(2)] == [0.0, pytest.approx(4.0)]

    @virtual_time
    async def test_a_share_follows_the_number_of_gateways(self, ledger):
        store = LedgerStore(ledger)
        store.up = False
        gateways = 1
        meter = LeasedMeter(store, KEY, FAST, Limit(100, Rate(100, 1.0)), live_gateways=lambda: gateways, now=now)
        assert meter.take_nowait(0.0) == 0.0
        gateways = 10
        assert [meter.take_nowait(0.0) for _ in range(12)].count(0.0) == 9

    @virtual_time
    async def test_a_share_begins_at_the_level_that_is_known(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, MINUTE)
        assert await take_many(meter, 9) == 9
        store.up = False
        assert [meter.take_nowait(now()) for _ in range(3)].count(0.0) == 1

    @virtual_time
    async def test_what_was_spent_alone_is_told_when_the_store_is_back(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, MINUTE)
        store.up = False
        assert [meter.take_nowait(0.0) for _ in range(7)].count(0.0) == 7
        meter.put_back(0.0)
        store.up = True
        assert await take_many(meter, 10) == 4

    @virtual_time
    async def test_open_admits(self, ledger):
        store = LedgerStore(ledger)
        store.up = False
        meter = leased(store, plan(Rate(1, 1.0), 1, WhenStoreIsDown.OPEN))
        assert [meter.take_nowait(0.0) for _ in range(100)].count(0.0) == 100
        meter.put_back(0.0)
        store.up = True
        assert await take_many(meter, 2) == 1

    @virtual_time
    async def test_closed_refuses(self, ledger):
        store = LedgerStore(ledger)
        store.up = False
        meter = leased(store, plan(Rate(1, 1.0), 1, WhenStoreIsDown.CLOSED))
        with pytest.raises(errors.StoreUnavailable) as refused:
            meter.take_nowait(0.0)
        assert (refused.value.rule, refused.value.retry_after) == ("plans.free.when_store_is_down", 1.0)

    @virtual_time
    async def test_a_request_waits_no_longer_than_25_ms(self, ledger):
        store = LedgerStore(ledger, round_trip=1.0)
        meter = leased(store, MINUTE)
        assert await take(meter) == 0.0  # from the share
        assert now() == pytest.approx(STORE_SECONDS)

    @virtual_time
    async def test_an_answer_after_everybody_has_left_costs_nothing(self, ledger):
        store = LedgerStore(ledger, round_trip=0.1)
        meter = leased(store, plan(Rate(1, 60.0), 10))
        await take_many(meter, 3)  # from the share
        await asyncio.sleep(0.1)
        store.round_trip = 0.0005
        assert await take_many(meter, 20) == 7

    @virtual_time
    async def test_a_lost_answer_costs_nothing(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, plan(Rate(1, 60.0), 10, WhenStoreIsDown.CLOSED))
        store.silent = True
        with pytest.raises(errors.StoreUnavailable):
            await take(meter)
        assert level(ledger) == 9.0
        store.silent = False
        assert await take_many(meter, 20) == 10

    @virtual_time
    async def test_what_is_in_hand_is_spent_first(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, plan(Rate(100, 1.0), 100, WhenStoreIsDown.CLOSED))
        await take_many(meter, 10)
        await take_many(meter, 1)
        store.up = False
        assert meter.take_nowait(now()) == 0.0


NEVER = plan(Rate(1, 1e9), 1000)
"""What is spent stays spent."""


class TestAmounts:
    @virtual_time
    async def test_of_any_size_are_admitted_as_far_as_the_bucket_reaches(self, ledger):
        meter = leased(LedgerStore(ledger), NEVER)
        assert [await take(meter, n) == 0.0 for n in (600, 300, 200, 100, 1)] == [True, True, False, True, False]

    @virtual_time
    async def test_at_once_go_in_the_order_in_which_they_came_and_who_is_too_large_stops_nobody(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, NEVER)
        seconds = await asyncio.gather(*(take(meter, n) for n in (600, 500, 300, 50)))
        assert [each == 0.0 for each in seconds[:2]] == [True, False]
        assert seconds[1] == pytest.approx(1e9 * 100, rel=0.01)
        assert await take(meter, 50) == 0.0

    @virtual_time
    async def test_a_refusal_tells_when_so_many_will_be_there_and_does_not_drain_the_bucket(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, plan(Rate(100, 1.0), 1000))
        assert await take(meter, 900) == 0.0
        assert await take(meter, 600) == pytest.approx(5.0, rel=0.01)
        asked = len(store.asked)
        assert meter.take_nowait(now(), 700) == pytest.approx(6.0, rel=0.01)
        assert len(store.asked) == asked
        assert meter.remaining(now()) == pytest.approx(100, abs=1)
        assert await take(meter, 100) == 0.0
        await asyncio.sleep(6.1)
        assert await take(meter, 600) == 0.0

    @virtual_time
    async def test_over_several_replicas_are_one_bucket(self, ledger):
        meters = [leased(LedgerStore(ledger, name), NEVER, gateways=3) for name in "abc"]
        sizes = [70, 130, 40, 210, 90, 160] * 4
        admitted = await asyncio.gather(*(take(meters[i % 3], n) for i, n in enumerate(sizes)))
        granted = sum(n for n, seconds in zip(sizes, admitted, strict=True) if seconds == 0.0)
        await asyncio.sleep(BELIEVED_SECONDS + 0.5)
        assert await take(meters[0], 1001 - granted) > 0.0
        assert await take(meters[0], 1000 - granted) == 0.0

    @pytest.mark.parametrize("after", [0.0, 0.0001, 0.0004, 0.0005, 0.0006])
    @virtual_time
    async def test_cancelled_at_any_moment_leave_the_bucket_as_it_was(self, ledger, after):
        meter = leased(LedgerStore(ledger), NEVER)
        waiting = [asyncio.create_task(take(meter, 150)) for _ in range(5)]
        await asyncio.sleep(after)
        for each in waiting:
            each.cancel()
        admitted = (await asyncio.gather(*waiting, return_exceptions=True)).count(0.0)
        await asyncio.sleep(0.01)
        assert await take(meter, 1000 - 150 * admitted) == 0.0

    @virtual_time
    async def test_larger_than_the_share_take_all_of_it_and_the_rest_in_advance(self, ledger):
        store = LedgerStore(ledger)
        store.up = False
        meter = leased(store, plan(Rate(100, 1.0), 1000), gateways=4)  # 25 a second, 250 at once
        assert meter.take_nowait(0.0, 300) == 0.0
        assert meter.take_nowait(0.0, 100) == pytest.approx(6.0)


async def reserve(meter: LeasedMeter, n: int) -> None:
    assert await take(meter, n) == 0.0
    assert meter.hold(n)


class TestSettling:
    @pytest.mark.parametrize("used", [0, 300, 600])
    @virtual_time
    async def test_what_was_not_used_can_be_used_by_all(self, ledger, used):
        one, other = (leased(LedgerStore(ledger, name), NEVER, gateways=2) for name in "ab")
        await reserve(one, 600)
        one.settle(now(), 600, used)
        await asyncio.sleep(KEEP_SECONDS + 0.01)
        assert await take(other, 1001 - used) > 0.0
        assert await take(other, 1000 - used) == 0.0

    @virtual_time
    async def test_what_was_used_beyond_is_owed_by_all(self, ledger):
        one, other = (leased(LedgerStore(ledger, name), plan(Rate(1000, 60.0), 1000), gateways=2) for name in "ab")
        await reserve(one, 600)
        one.settle(now(), 600, 1300)
        assert one.take_nowait(now(), 10) == UNKNOWN
        await asyncio.sleep(KEEP_SECONDS + 0.01)
        assert level(ledger) == pytest.approx(-297, abs=1)
        assert await take(other, 10) == pytest.approx(307 * 0.06, rel=0.02)

    @virtual_time
    async def test_what_is_owed_is_told_again_when_the_answer_was_lost(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, NEVER)
        await reserve(meter, 600)
        store.up = False
        meter.settle(now(), 600, 900)
        await asyncio.sleep(1.0)
        store.up = True
        assert await take(meter, 101) > 0.0
        assert await take(meter, 100) == 0.0

    @virtual_time
    async def test_alone_it_is_the_share_that_gets_back_or_owes(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, NEVER)
        store.up = False
        await reserve(meter, 600)
        meter.settle(now(), 600, 100)
        assert meter.remaining(now()) == pytest.approx(900)
        await reserve(meter, 600)
        meter.settle(now(), 600, 1000)
        assert meter.remaining(now()) == pytest.approx(-100)
        store.up = True
        assert await take(meter, 1) > 0.0
        assert level(ledger) == pytest.approx(-100, abs=1)

    @virtual_time
    async def test_what_nobody_counted_is_not_settled(self, ledger):
        store = LedgerStore(ledger)
        store.up = False
        meter = leased(store, plan(Rate(1, 1.0), 10, WhenStoreIsDown.OPEN))
        assert await take(meter, 10_000) == 0.0
        assert not meter.hold(10_000)


class TestDying:
    """A meter that is not asked any more after `store.up = False` is as good as a dead process."""

    @virtual_time
    async def test_what_a_dead_replica_had_set_aside_comes_back(self, ledger):
        store = LedgerStore(ledger)
        dead, other = leased(store, NEVER, gateways=2), leased(LedgerStore(ledger, "b"), NEVER, gateways=2)
        await reserve(dead, 600)
        await asyncio.sleep(TELL_SECONDS + 0.01)
        store.up = False
        await asyncio.sleep(RESERVED_SECONDS - 1.2)
        assert await take(other, 500) > 0.0
        await asyncio.sleep(1.2)
        assert await take(other, 1000) == 0.0

    @virtual_time
    async def test_while_it_lives_it_stays_set_aside(self, ledger):
        store = LedgerStore(ledger)
        meter = leased(store, NEVER)
        other = leased(LedgerStore(ledger, "b"), NEVER, gateways=2)
        await reserve(meter, 600)
        await asyncio.sleep(60)
        assert await take(other, 401) > 0.0
        assert len(store.asked) < 50
        meter.settle(now(), 600, 200)
        await asyncio.sleep(BELIEVED_SECONDS + 0.01)
        assert await take(other, 801) > 0.0
        assert await take(other, 800) == 0.0
        asked = len(store.asked)
        await asyncio.sleep(60)
        assert len(store.asked) - asked <= 2  # there is nothing to tell any more

    @pytest.mark.parametrize("how", ["cut off", "forgotten"])
    @virtual_time
    async def test_who_was_only_taken_for_dead_takes_it_anew(self, ledger, how):
        store = LedgerStore(ledger)
        meter = leased(store, NEVER)
        other = leased(LedgerStore(ledger, "b"), NEVER, gateways=2)
        await reserve(meter, 600)
        await asyncio.sleep(TELL_SECONDS + 0.01)
        if how == "forgotten":
            ledger.flush()
        else:
            store.up = False
            await asyncio.sleep(RESERVED_SECONDS + 1)
            assert await take(other, 1) == 0.0  # and with it the other's tokens are back
            assert level(ledger) == 999
            store.up = True
        await asyncio.sleep(RESERVED_SECONDS)
        assert await take(other, 500) > 0.0
        meter.settle(now(), 600, 100)
        await asyncio.sleep(RESERVED_SECONDS)
        assert await take(other, 899) == 0.0


STEADY = [
    pytest.param(per_second, burst, gateways, id=f"{per_second}/s, burst {burst}, {gateways} gateways")
    for per_second, burst in [(10, 1), (20, 20), (200, 200), (200, 20)]
    for gateways in (1, 2, 4)
]


@pytest.mark.parametrize(("per_second", "burst", "gateways"), STEADY)
@virtual_time
async def test_steady_pressure_gets_all_of_the_bucket_and_no_more(per_second, burst, gateways):
    """Three times the limit, spread over the gateways by chance, beside one bucket that sees every request itself."""
    rng = random.Random(7)
    the_plan = plan(Rate(per_second, 1.0), burst)
    ledger = Ledger()
    stores = [LedgerStore(ledger, f"r{i}") for i in range(gateways)]
    meters = [leased(store, the_plan, gateways) for store in stores]
    ideal = Bucket(per_second, burst, now())
    ideally_admitted = 0
    requests = []
    while now() < 3.0:
        requests.append(asyncio.create_task(take(rng.choice(meters))))
        ideally_admitted += ideal.take(now()) == 0.0
        await asyncio.sleep(rng.expovariate(3.0 * per_second))
    admitted = (await asyncio.gather(*requests)).count(0.0)
    assert 0.97 * ideally_admitted <= admitted <= burst + per_second * now()
    for store in stores:
        assert len(store.asked) / now() <= 200
