from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from policies.lease import (
    BELIEVED_SECONDS,
    KEEP_SECONDS,
    LEASE_SECONDS,
    MOST_CLOSED_SECONDS,
    RENEW_SECONDS,
    SPENDABLE_SECONDS,
    Ask,
    Grant,
    Limit,
    Slice,
)
from policies.policy import Rate
from tests.support.lease_ledger import MICRO, Lease, Ledger

TEN = Limit(10, Rate(60, 60.0))


def granted(lease: Slice, need: int, tokens: int, *, now: float, wait: float = 0.0) -> int:
    """One whole question and answer at `now`."""
    ask = lease.ask(now, need, 1)
    return lease.answered(ask, Grant(1, tokens, 0.0, wait), now)


def busy_slice(capacity: int = 100, spent: int = 20) -> Slice:
    """A slice at time 0 that has just spent `spent` tokens, so that it asks for as many to spare, and got 20 of them."""
    lease = Slice(Limit(capacity, Rate(100, 1.0)), 0.0)
    granted(lease, spent, spent, now=0.0)
    ask = lease.ask(0.0, 0, 1)
    assert ask.spare == spent
    lease.answered(ask, Grant(2, spent, 50.0, 0.0), 0.0)
    return lease


class TestAsking:
    def test_one_request_alone_takes_one_token_and_holds_none(self):
        lease = Slice(TEN, 0.0)
        ask = lease.ask(0.0, 1, 1)
        assert (ask.need, ask.spare, ask.held, ask.back, ask.debt, ask.ack) == (1, 0, 0, 0, 0, 0)
        assert lease.answered(ask, Grant(7, 1, 9.0, 0.0), 0.001) == 1
        assert lease.tokens == 0
        assert not lease.take(0.002)

    @pytest.mark.parametrize(
        ("capacity", "replicas", "spare"),
        [(100, 1, 20), (100, 2, 12), (100, 4, 6), (40, 1, 10), (8, 1, 2), (8, 4, 0), (1, 1, 0)],
    )
    def test_spares_what_is_soon_needed_but_leaves_most_of_the_bucket_to_others(self, capacity, replicas, spare):
        lease = Slice(Limit(capacity, Rate(100, 1.0)), 0.0)
        granted(lease, 20, 20, now=0.0)
        assert lease.ask(0.0, 0, replicas).spare == spare

    def test_demand_fades(self):
        lease = Slice(Limit(1000, Rate(100, 1.0)), 0.0)
        granted(lease, 20, 20, now=0.0)
        assert lease.ask(0.3, 1, 1).spare == 0

    def test_reports_what_is_left_and_how_long_it_has_been_quiet(self):
        lease = busy_slice()
        assert lease.take(0.01)
        assert lease.take(0.02)
        ask = lease.ask(0.05, 0, 1)
        assert (ask.held, ask.ack) == (18, 2)
        assert ask.quiet == pytest.approx(0.03)

    def test_low_water_is_half_of_what_was_granted(self):
        assert busy_slice().low_water == 10

    def test_after_too_small_a_grant_it_does_not_ask_for_more(self):
        lease = Slice(Limit(100, Rate(100, 1.0)), 0.0)
        granted(lease, 20, 20, now=0.0)
        ask = lease.ask(0.0, 0, 1)
        lease.answered(ask, Grant(2, 3, 0.5, 0.005), 0.0)
        assert (lease.tokens, lease.low_water) == (3, -1)


class TestSpending:
    def test_until_the_lease_ends(self):
        lease = busy_slice()
        assert lease.take(SPENDABLE_SECONDS - 0.001)
        assert not lease.take(SPENDABLE_SECONDS)

    def test_ends_before_the_store_thinks_so(self):
        assert SPENDABLE_SECONDS < LEASE_SECONDS

    def test_the_time_counts_from_before_the_question_was_sent(self):
        lease = busy_slice()
        lease.answered(lease.ask(0.1, 1, 1), Grant(3, 2, 50.0, 0.0), 0.12)
        assert lease.take(0.1 + SPENDABLE_SECONDS - 0.001)
        assert not lease.take(0.1 + SPENDABLE_SECONDS)

    def test_an_answer_that_grants_nothing_renews_nothing(self):
        lease = busy_slice()
        lease.answered(lease.ask(0.1, 1, 1), Grant(3, 0, 0.5, 0.005), 0.1)
        assert not lease.take(SPENDABLE_SECONDS)

    def test_expired_tokens_are_not_reported_as_held(self):
        assert busy_slice().ask(SPENDABLE_SECONDS, 1, 1).held == 0


class TestClosing:
    @pytest.mark.parametrize(
        ("limit", "wait", "closed"),
        [
            pytest.param(Limit(10, Rate(60, 60.0)), 1.0, 1.0, id="until there is a token"),
            pytest.param(
                Limit(10, Rate(1, 3600.0)), 3600.0, BELIEVED_SECONDS, id="not so long as nobody would believe"
            ),
            pytest.param(Limit(1000, Rate(1000, 1.0)), 0.001, MOST_CLOSED_SECONDS, id="not for each of many"),
            pytest.param(Limit(20, Rate(1000, 1.0)), 0.001, 0.005, id="a quarter of the time to full"),
            pytest.param(Limit(1, Rate(1000, 1.0)), 0.001, 0.002, id="never too often"),
        ],
    )
    def test_an_empty_bucket_is_asked_again_later(self, limit, wait, closed):
        lease = Slice(limit, 0.0)
        assert granted(lease, 2, 1, now=5.0, wait=wait) == 1
        assert lease.closed_until == pytest.approx(5.0 + closed)

    def test_a_refused_request_is_told_when_there_will_be_a_token(self):
        lease = Slice(Limit(10, Rate(1, 3600.0)), 0.0)
        granted(lease, 2, 1, now=5.0, wait=3600.0)
        assert lease.refusal(5.5) == 3599.5
        often = Slice(Limit(1000, Rate(1000, 1.0)), 0.0)
        granted(often, 2, 1, now=5.0, wait=0.001)
        assert often.refusal(5.0) == pytest.approx(MOST_CLOSED_SECONDS)  # nobody is heard before

    def test_a_full_grant_opens(self):
        lease = Slice(TEN, 0.0)
        granted(lease, 1, 0, now=0.0, wait=1.0)
        granted(lease, 1, 1, now=0.5)
        assert lease.closed_until <= 0.5

    def test_a_changed_limit_opens(self):
        lease = Slice(TEN, 0.0)
        granted(lease, 1, 0, now=0.0, wait=60.0)
        lease.reconfigure(Limit(20, Rate(100, 1.0)))
        assert lease.closed_until <= 0.0


class TestComingBack:
    def test_a_spare_token_goes_back_into_the_slice(self):
        lease = busy_slice()
        lease.take(0.0)
        lease.put_back(0.1)
        assert lease.tokens == 20
        assert lease.ask(0.1, 0, 1).back == 0

    def test_a_token_that_was_asked_for_goes_back_to_the_store_and_opens(self):
        lease = Slice(TEN, 0.0)
        granted(lease, 2, 1, now=0.0, wait=1.0)
        lease.put_back(0.1)
        assert lease.closed_until <= 0.1
        assert lease.ask(0.1, 1, 1).back == 1
        assert lease.ask(0.2, 1, 1).back == 0  # once

    def test_a_token_of_an_ended_lease_goes_back_to_the_store(self):
        lease = busy_slice()
        lease.take(0.0)
        lease.put_back(1.0)
        assert lease.ask(1.0, 0, 1).back == 1

    def test_a_slice_that_outlasts_the_need_goes_back(self):
        lease = busy_slice()
        assert lease.outlasts_need(0.05) == pytest.approx(KEEP_SECONDS - 0.05)
        assert lease.outlasts_need(KEEP_SECONDS) == 0.0
        ask = lease.give_back(KEEP_SECONDS, 0)
        assert (ask.back, ask.held, ask.spare) == (20, 0, 0)
        assert lease.tokens == 0

    def test_nothing_of_an_ended_lease_goes_back(self):
        assert busy_slice().give_back(1.0, 0).back == 0


class TestDebt:
    def test_is_told_until_an_answer_comes(self):
        lease = Slice(TEN, 0.0)
        for _ in range(3):
            lease.spend_alone()
        first = lease.ask(0.0, 1, 1)
        lease.lost()
        second = lease.ask(1.0, 1, 1)
        assert (first.debt, second.debt) == (3, 3)
        lease.spend_alone()
        lease.answered(second, Grant(1, 1, 0.0, 0.0), 1.0)
        assert lease.ask(2.0, 1, 1).debt == 1

    def test_is_never_more_than_the_bucket(self):
        lease = Slice(TEN, 0.0)
        for _ in range(50):
            lease.spend_alone()
        assert lease.ask(0.0, 1, 1).debt == 10

    def test_is_forgiven(self):
        lease = Slice(TEN, 0.0)
        assert not lease.forgive()
        lease.spend_alone()
        assert lease.forgive()
        assert lease.ask(0.0, 1, 1).debt == 0


class TestAmounts:
    def test_are_spent_whole_or_not_at_all(self):
        lease = busy_slice()
        assert [lease.take(0.0, n) for n in (15, 6, 5, 1)] == [True, False, True, False]

    def test_a_bucket_that_is_too_empty_for_one_is_closed_for_as_many_and_more(self):
        lease = Slice(Limit(1000, Rate(100, 1.0)), 0.0)
        lease.answered(lease.ask(0.0, 600, 1, 600), Grant(1, 0, 400.5, 2.0), 0.0)
        assert [lease.is_closed(0.1, n) for n in (1, 400, 401, 600)] == [False, False, True, True]
        assert [lease.refusal(0.5, n) for n in (600, 800)] == [1.5, 3.5]
        assert lease.remaining(0.1) == 400.0

    def test_what_is_owed_to_the_bucket_closes_it_for_all(self):
        lease = Slice(Limit(1000, Rate(100, 1.0)), 0.0)
        lease.answered(lease.ask(0.0, 600, 1, 600), Grant(1, 0, -200.0, 8.0), 0.0)
        assert lease.is_closed(0.1, 1)
        assert lease.refusal(0.0, 1) == pytest.approx(2.01)
        assert lease.remaining(0.1) == 0.0

    def test_what_was_used_beyond_comes_out_of_the_hand_and_the_rest_is_owed(self):
        lease = busy_slice()
        lease.charge(0.0, 50)
        assert (lease.tokens, lease.ask(0.0, 0, 1).back) == (0, -30)
        assert lease.ask(0.1, 0, 1).back == 0

    def test_what_is_owed_is_told_until_an_answer_comes(self):
        lease = Slice(TEN, 0.0)
        lease.charge(0.0, 5)
        assert lease.ask(0.0, 1, 1).back == -5
        lease.lost()
        lease.put_back(0.0, 2)
        again = lease.ask(1.0, 1, 1)
        assert again.back == -3
        lease.answered(again, Grant(2, 0, 0.0, 1.0), 1.0)
        lease.lost()
        assert lease.ask(2.0, 1, 1).back == 0

    def test_is_owed_what_the_bucket_holds_at_most(self):
        lease = Slice(TEN, 0.0)
        lease.charge(0.0, 10**9)
        assert lease.ask(0.0, 1, 1).back == -10

    def test_what_is_set_aside_is_told_beside_what_the_store_may_think(self):
        lease = Slice(TEN, 0.0)
        lease.reserved = 6
        first = lease.tell(0.0, 0, 1)
        lease.lost()
        lease.reserved = 4
        second = lease.tell(0.1, 0, 1)
        assert [(ask.reserved, ask.told, ask.spare) for ask in (first, second)] == [(6, 0, 0), (4, 6, 0)]
        lease.answered(second, Grant(2, 0, 0.0, 1.0), 0.1)
        assert lease.tell(0.2, 0, 1).told == 4
        lease.reserved = 0
        assert lease.is_reserved()
        lease.answered(lease.tell(0.3, 0, 1), Grant(3, 0, 0.0, 1.0), 0.3)
        assert not lease.is_reserved()


class TestKnowing:
    def test_remaining_counts_the_slice_and_the_bucket(self):
        lease = busy_slice()
        assert lease.remaining(0.0) == 70.0
        assert lease.remaining(0.1) == pytest.approx(80.0)
        assert lease.remaining(60.0) == 100.0

    def test_nothing_remains_while_closed(self):
        lease = Slice(TEN, 0.0)
        granted(lease, 1, 0, now=0.0, wait=1.0)
        assert lease.remaining(0.9) == 0.0

    def test_repr_shows_the_state(self):
        assert repr(busy_slice()) == "<Slice 20 in hand until 0.49, bucket 50 of 100 at 0, closed until -inf, debt 0>"


KEY = b"bucket"
EPOCH = 1_800_000_000 * MICRO
"""The store's clock has nothing to do with that of the replicas."""


class Replica:
    def __init__(self, name: str, limit: Limit) -> None:
        self.name = name
        self.slice = Slice(limit, 0.0)
        self.ask: Ask | None = None  # under way
        self.number = 0
        self.grant: Grant | None = None  # answered, but not arrived
        self.credit = 0  # tokens of admitted requests that the store is still to get back
        self.credit_sent: dict[int, int] = {}
        self.awaited: dict[int, int] = {}  # by question: tokens granted to requests that wait for the answer


class Replicas(RuleBasedStateMachine):
    """Several replicas share a bucket; questions and answers take their time, get lost, and arrive after later ones.

    Whatever happens, what they admit fits into one token bucket. A token that nobody used in the end (its request did no
    work, its answer was lost) counts until the store has it back.
    """

    @initialize(
        limit=st.sampled_from([(4, 20.0), (8, 50.0), (20, 100.0), (40, 100.0), (100, 400.0), (2, 1.0)]),
        count=st.integers(1, 3),
        each=st.sampled_from([1, 1, 2, 7]),
    )
    def start(self, limit: tuple[int, float], count: int, each: int) -> None:
        capacity, per_second = limit
        self.each = each  # tokens that a request needs
        self.limit = Limit(capacity, Rate(per_second, 1.0))
        self.ledger = Ledger()
        self.replicas = [Replica(f"r{i}", self.limit) for i in range(count)]
        self.now = 0.0
        self.numbers = 0
        self.admitted: list[tuple[float, int]] = []
        self.strayed: list[tuple[Replica, int, Ask]] = []

    @rule(seconds=st.sampled_from([0.001, 0.05, 0.2, 0.4, 0.48, 0.6]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(who=st.integers(0, 2), share=st.sampled_from([0.1, 0.25, 0.25, 2.0]))
    def burst_comes(self, who: int, share: float) -> None:
        """Requests at one replica, as many as are this share of the bucket; what is spare is asked for afterwards."""
        replica = self._replica(who)
        waiting = self._spend(replica, max(1, round(share * self.limit.capacity / self.each)))
        if replica.ask is None:
            self._send(replica, replica.slice.ask(self.now, waiting, len(self.replicas), self.each))
            self._store_answers(replica)
            self._answer_arrives(replica)
        if replica.ask is None:
            self._send(replica, replica.slice.ask(self.now, 0, len(self.replicas)))
            self._store_answers(replica)
            self._answer_arrives(replica)

    @rule()
    def everything_is_taken(self) -> None:
        for who in range(len(self.replicas)):
            self.burst_comes(who, 2.0)

    @rule(who=st.integers(0, 2), requests=st.integers(0, 30))
    def question_is_sent(self, who: int, requests: int) -> None:
        replica = self._replica(who)
        if replica.ask is None:
            waiting = self._spend(replica, requests)
            self._send(replica, replica.slice.ask(self.now, waiting, len(self.replicas), self.each))

    @rule(who=st.integers(0, 2))
    def store_answers(self, who: int) -> None:
        self._store_answers(self._replica(who))

    @rule(who=st.integers(0, 2), left=st.sampled_from([0, 0, 2]))
    def answer_arrives(self, who: int, left: int) -> None:
        self._answer_arrives(self._replica(who), left)

    @rule(who=st.integers(0, 2))
    def exchange_fails(self, who: int) -> None:
        replica = self._replica(who)
        if replica.ask is None:
            return
        if replica.grant is None:
            self.strayed.append((replica, replica.number, replica.ask))
        replica.slice.lost()
        replica.ask = replica.grant = None

    @precondition(lambda self: self.strayed)
    @rule()
    def stray_question_arrives(self) -> None:
        self._lease(*self.strayed.pop(0))

    @rule(who=st.integers(0, 2))
    def slice_goes_back(self, who: int) -> None:
        replica = self._replica(who)
        if replica.ask is None:
            self._send(replica, replica.slice.give_back(self.now, 0))
            self._store_answers(replica)
            self._answer_arrives(replica)

    @rule(who=st.integers(0, 2))
    def request_did_no_work(self, who: int) -> None:
        if sum(tokens for _, tokens in self.admitted) > sum(replica.credit for replica in self.replicas):
            self._put_back(self._replica(who), 1)

    @invariant()
    def fits_into_one_bucket(self) -> None:
        per_second, capacity = self.limit.rate.per_second, self.limit.capacity
        used, at = 0.0, 0.0
        for when, tokens in sorted(self.admitted, key=lambda each: each[0]):
            used = max(0.0, max(0.0, used - (when - at) * per_second) + tokens)
            at = when
            assert used <= capacity + 1e-6, f"{used} of {capacity} used at {when}: {self.admitted}"

    @invariant()
    def store_stays_within_the_bucket(self) -> None:
        bucket = self.ledger.buckets.get(KEY)
        if bucket is not None:
            now = EPOCH + round(self.now * MICRO)
            held = sum(each.held for each in bucket.leases.values() if each.ends > now)
            assert bucket.level + held * MICRO <= self.limit.capacity * MICRO

    def _replica(self, who: int) -> Replica:
        return self.replicas[who % len(self.replicas)]

    def _spend(self, replica: Replica, requests: int) -> int:
        """Admits what the slice allows; returns how many tokens those need who must wait."""
        while requests and replica.slice.take(self.now, self.each):
            self.admitted.append((self.now, self.each))
            requests -= 1
        return requests * self.each

    def _send(self, replica: Replica, ask: Ask) -> None:
        self.numbers += 1
        replica.ask, replica.number = ask, self.numbers
        replica.credit_sent[self.numbers], replica.credit = replica.credit, 0

    def _store_answers(self, replica: Replica) -> None:
        if replica.ask is not None and replica.grant is None:
            replica.grant = self._lease(replica, replica.number, replica.ask)

    def _answer_arrives(self, replica: Replica, left: int = 0) -> None:
        """`left` of those who waited have gone away."""
        if replica.ask is None or replica.grant is None:
            return
        going = replica.slice.answered(replica.ask, replica.grant, self.now)
        unused = min(left * self.each, going) if going % self.each == 0 else going % self.each
        if unused:
            self._put_back(replica, unused)
        replica.ask = replica.grant = None

    def _put_back(self, replica: Replica, tokens: int) -> None:
        before = replica.slice.tokens
        replica.slice.put_back(self.now, tokens)
        kept = replica.slice.tokens - before
        self.admitted.append((self.now, -kept))
        replica.credit += tokens - kept

    def _lease(self, replica: Replica, number: int, ask: Ask) -> Grant:
        now = EPOCH + round(self.now * MICRO)
        before = self._stored(replica)
        grant = self.ledger.lease(KEY, self.limit, replica.name, number, ask, now)
        after = self._stored(replica)
        if after is not None and after.number == number:
            if before is not None and before.ends > now and ask.ack < before.number:
                self.admitted.append((self.now, -replica.awaited.pop(before.number)))
            self.admitted.append((self.now, -replica.credit_sent.pop(number)))
            replica.awaited[number] = min(ask.need, grant.tokens)
            self.admitted.append((self.now, replica.awaited[number]))
        return grant

    def _stored(self, replica: Replica) -> Lease | None:
        bucket = self.ledger.buckets.get(KEY)
        return bucket.leases.get(replica.name) if bucket is not None else None


Replicas.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestReplicas = Replicas.TestCase


class Reserving:
    """A replica whose requests set tokens aside."""

    def __init__(self, name: str, limit: Limit) -> None:
        self.name = name
        self.slice = Slice(limit, 0.0)
        self.open: list[int] = []  # what each request under way has set aside


class Reservations(RuleBasedStateMachine):
    """Requests set aside what they may need and are settled with what they used; exchanges are lost, replicas die.

    The bucket does not refill, so it holds the whole account: what it lacks is what was used and what is set aside.
    """

    CAPACITY = 1000

    @initialize(count=st.integers(1, 3))
    def start(self, count: int) -> None:
        self.limit = Limit(self.CAPACITY, Rate(1, 1e12))
        self.ledger = Ledger()
        self.names = (f"r{number}" for number in itertools.count())
        self.replicas = [Reserving(next(self.names), self.limit) for _ in range(count)]
        self.now = 0.0
        self.numbers = 0
        self.used = 0
        self.is_exact = True  # nothing was lost so far: what may be lost makes the bucket poorer

    @rule(who=st.integers(0, 2), tokens=st.integers(1, 400))
    def request_comes(self, who: int, tokens: int) -> None:
        replica = self._replica(who)
        if not replica.slice.take(self.now, tokens):
            ask = replica.slice.ask(self.now, tokens, len(self.replicas), tokens)
            going = self._exchange(replica, ask)
            if going < tokens:
                assert not going
                return
        replica.slice.reserved += tokens
        replica.open.append(tokens)

    @rule(who=st.integers(0, 2), share=st.sampled_from([0.0, 0.3, 1.0, 1.5]))
    def request_ends(self, who: int, share: float) -> None:
        replica = self._replica(who)
        if replica.open:
            self._settle(replica, share)

    @rule(who=st.integers(0, 2), how=st.sampled_from(["arrives", "arrives", "is lost", "is not answered"]))
    def news_is_told(self, who: int, how: str) -> None:
        replica = self._replica(who)
        ask = replica.slice.tell(self.now, 0, 1)
        if how == "arrives":
            self._exchange(replica, ask)
            return
        if how == "is not answered":
            self._lease(replica, ask)
        replica.slice.lost()
        self.is_exact &= ask.back == 0

    @rule(who=st.integers(0, 2))
    def slice_goes_back(self, who: int) -> None:
        replica = self._replica(who)
        self._exchange(replica, replica.slice.give_back(self.now, 0))

    @rule()
    def time_passes(self) -> None:
        """Who lives tells of itself three times in the life of a reservation."""
        for _ in range(4):
            for replica in self.replicas:
                self._exchange(replica, replica.slice.give_back(self.now, 0))
            self.now += RENEW_SECONDS

    @rule(who=st.integers(0, 2))
    def replica_dies(self, who: int) -> None:
        """All it had set aside and told comes back in time, also what its requests had used."""
        dead = self._replica(who)
        self._exchange(dead, dead.slice.tell(self.now, 0, 1))
        self.is_exact &= not dead.slice.has_news()
        self.replicas[self.replicas.index(dead)] = Reserving(next(self.names), self.limit)

    @invariant()
    def no_token_is_there_twice(self) -> None:
        bucket = self.ledger.buckets.get(KEY)
        if bucket is None:
            return
        now = EPOCH + round(self.now * MICRO)
        alive = {replica.name for replica in self.replicas}
        dead = sum(each.reserved for name, each in bucket.leases.items() if name not in alive and each.expires > now)
        in_hand = sum(each.slice.to_return() for each in self.replicas if self.now < each.slice._expires_at)
        credit = sum(each.slice._credit for each in self.replicas if self.now >= each.slice._expires_at)
        set_aside = sum(sum(replica.open) for replica in self.replicas)
        assert bucket.level / MICRO + in_hand + credit + dead <= self.CAPACITY - self.used - set_aside

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for replica in self.replicas:
            while replica.open:
                self._settle(replica, 0.3)
        for _ in range(2):  # those of the dead come back meanwhile
            self.time_passes()
        bucket = self.ledger.buckets.get(KEY)
        if bucket is not None:
            left = self.CAPACITY - self.used
            assert bucket.level == left * MICRO if self.is_exact else bucket.level <= left * MICRO

    def _replica(self, who: int) -> Reserving:
        return self.replicas[who % len(self.replicas)]

    def _settle(self, replica: Reserving, share: float) -> None:
        reserved = replica.open.pop()
        used = int(share * reserved)
        self.used += used
        replica.slice.reserved -= reserved
        if used > reserved:
            replica.slice.charge(self.now, used - reserved)
        elif used < reserved:
            replica.slice.put_back(self.now, reserved - used)

    def _exchange(self, replica: Reserving, ask: Ask) -> int:
        return replica.slice.answered(ask, self._lease(replica, ask), self.now)

    def _lease(self, replica: Reserving, ask: Ask) -> Grant:
        self.numbers += 1
        now = EPOCH + round(self.now * MICRO)
        return self.ledger.lease(KEY, self.limit, replica.name, self.numbers, ask, now)


Reservations.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestReservations = Reservations.TestCase
