from collections import Counter
from math import exp
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.balance import Candidate, Chooser, PeakEwma, panic
from policies.policy import Balance, BalanceKind

KINDS = list(BalanceKind)
ROUND_ROBIN, LEAST_LOAD, PEAK_EWMA, HASH, _PREFIX = (Balance(kind) for kind in KINDS)
NOW = 1000.0


class Backend(Candidate):
    def __init__(self, key, weight=1, inflight=0, reported=0.0, latency=0.0, since=0.0, max_concurrency=None) -> None:
        super().__init__(key, weight, max_concurrency, since)
        self.inflight, self.reported = inflight, reported
        if latency:
            self.ewma.observe(latency, NOW)


def backends(count, **kwargs):
    return tuple(Backend(f"tiny/{i}", **kwargs) for i in range(count))


def shares(candidates, balance, now=NOW, rounds=1500, keys=None, refused=()):
    chooser, rng = Chooser(candidates), Random(7)
    chosen = Counter(
        chooser.choose(balance, rng, now, keys[i] if keys else f"caller-{i}", refused).key for i in range(rounds)
    )
    return [chosen[candidate.key] / rounds for candidate in candidates]


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_nobody(self, kind):
        assert Chooser(()).choose(Balance(kind), Random(1), NOW) is None

    def test_one(self, kind):
        (only,) = candidates = backends(1)
        chooser = Chooser(candidates)

        assert chooser.choose(Balance(kind), Random(1), NOW) is only
        assert chooser.choose(Balance(kind), Random(1), NOW, refused=(only,)) is None

    def test_one_at_its_limit(self, kind):
        assert Chooser(backends(1, max_concurrency=4, inflight=4)).choose(Balance(kind), Random(1), NOW) is None
        assert Chooser(backends(1, max_concurrency=4, inflight=3)).choose(Balance(kind), Random(1), NOW) is not None

    @pytest.mark.parametrize("count", [2, 3, 10])
    def test_equals_get_equal_shares(self, kind, count):
        even = 1 / count
        assert shares(backends(count), Balance(kind)) == pytest.approx([even] * count, rel=0.25)

    @pytest.mark.parametrize("weights", [(1, 3), (3, 1), (1, 1, 2), (100, 200, 100), (7, 5, 3)])
    def test_weights_are_respected_when_idle(self, kind, weights):
        candidates = tuple(Backend(f"tiny/{i}", weight) for i, weight in enumerate(weights))
        expected = [weight / sum(weights) for weight in weights]

        assert shares(candidates, Balance(kind)) == pytest.approx(expected, abs=0.05)

    def test_weight_0_gets_nothing(self, kind):
        candidates = (Backend("a", 0), Backend("b", 2), Backend("c", 2))

        assert shares(candidates, Balance(kind))[0] == 0.0
        assert Chooser((Backend("a", 0),)).choose(Balance(kind), Random(1), NOW) is None

    def test_the_refused_are_passed_over(self, kind):
        candidates = backends(4)

        assert shares(candidates, Balance(kind), refused=candidates[1:3]) == pytest.approx([0.5, 0, 0, 0.5], abs=0.12)
        assert Chooser(candidates).choose(Balance(kind), Random(1), NOW, refused=candidates) is None

    def test_weights_are_respected_among_those_left(self, kind):
        candidates = (Backend("a"), Backend("b", 8), Backend("c", 2))

        assert shares(candidates, Balance(kind), refused=candidates[:1]) == pytest.approx([0, 0.8, 0.2], abs=0.06)

    def test_the_full_are_passed_over(self, kind):
        candidates = (*backends(2, max_concurrency=1, inflight=1), Backend("free", max_concurrency=1))

        assert shares(candidates, Balance(kind)) == [0, 0, 1]

    def test_all_full(self, kind):
        candidates = backends(5, max_concurrency=2, inflight=2)

        assert Chooser(candidates).choose(Balance(kind), Random(1), NOW) is None

    def test_candidates_are_not_modified(self, kind):
        candidates = backends(3, latency=0.1)
        before = [repr(candidate) for candidate in candidates]
        shares(candidates, Balance(kind), rounds=50)

        assert [repr(candidate) for candidate in candidates] == before


def test_round_robin_takes_everyone_in_turn():
    candidates = backends(3)
    chooser, rng = Chooser(candidates), Random(1)
    first = candidates.index(chooser.choose(ROUND_ROBIN, rng, NOW))

    order = [candidates.index(chooser.choose(ROUND_ROBIN, rng, NOW)) for _ in range(6)]
    assert order == [(first + turn) % 3 for turn in range(1, 7)]


def test_round_robin_starts_anywhere():
    candidates = backends(3)

    assert {Chooser(candidates).choose(ROUND_ROBIN, Random(seed), NOW).key for seed in range(20)} == {
        "tiny/0",
        "tiny/1",
        "tiny/2",
    }


def test_round_robin_spreads_the_turns_of_the_heavy():
    chooser, rng = Chooser((Backend("a", 10), Backend("b", 4))), Random(1)
    order = "".join(chooser.choose(ROUND_ROBIN, rng, NOW).key for _ in range(14))

    assert repr(chooser) == "<Chooser of 2, rotation of 7>"
    assert order[:7] == order[7:]
    assert order in "abaaaba" * 4


def test_weights_far_apart_cost_a_rotation_of_bounded_length():
    chooser = Chooser((Backend("a", 10**9), Backend("b", 1)))

    assert repr(chooser) == "<Chooser of 2, rotation of 1025>"


@pytest.mark.parametrize(
    ("a", "b", "winner"),
    [
        ({"inflight": 2}, {"inflight": 3}, "a"),
        ({"inflight": 3}, {"inflight": 2}, "b"),
        ({"inflight": 0, "reported": 9.0}, {"inflight": 3}, "b"),
        ({"inflight": 3, "weight": 4}, {"inflight": 1}, "a"),
        ({"inflight": 5, "weight": 4}, {"inflight": 1}, "b"),
        ({"inflight": 0}, {"inflight": 1, "weight": 99}, "a"),
        ({"inflight": 2, "since": NOW - 1.0}, {"inflight": 10}, "b"),
        ({"inflight": 2, "since": NOW - 5.0}, {"inflight": 10}, "a"),
    ],
)
def test_least_load_of_two(a, b, winner):
    candidates = (Backend("a", **a), Backend("b", **b))

    assert {Chooser(candidates).choose(LEAST_LOAD, Random(seed), NOW).key for seed in range(20)} == {winner}


@pytest.mark.parametrize(
    ("a", "b", "winner"),
    [
        ({"latency": 0.1}, {"latency": 0.2}, "a"),
        ({"latency": 0.1, "inflight": 2}, {"latency": 0.2}, "b"),
        ({"latency": 0.1, "inflight": 2, "weight": 2}, {"latency": 0.2}, "a"),
        ({"latency": 0.001, "reported": 500.0}, {"latency": 0.1}, "b"),
        ({}, {"latency": 0.1}, "a"),
        ({"inflight": 1}, {"latency": 0.1, "inflight": 50}, "b"),
        ({"inflight": 2}, {"inflight": 1}, "b"),
    ],
)
def test_peak_ewma_of_two(a, b, winner):
    candidates = (Backend("a", **a), Backend("b", **b))

    assert {Chooser(candidates).choose(PEAK_EWMA, Random(seed), NOW).key for seed in range(20)} == {winner}


def test_two_choices_leave_the_most_loaded_alone():
    candidates = tuple(Backend(f"tiny/{i}", inflight=i) for i in range(10))
    share = shares(candidates, LEAST_LOAD)

    assert share[9] == 0.0
    assert share == sorted(share, reverse=True)
    assert share[0] == pytest.approx(0.2, abs=0.03)


def test_two_choices_even_out_requests_that_last():
    """1,000 requests on ten backends of weight 1 or 3, each of which holds what it gets."""
    candidates = tuple(Backend(f"tiny/{i}", weight=1 + 2 * (i % 2)) for i in range(10))
    chooser, rng = Chooser(candidates), Random(3)
    for _ in range(1000):
        chooser.choose(LEAST_LOAD, rng, NOW).inflight += 1

    assert all(candidate.inflight == pytest.approx(50 * candidate.weight, abs=8) for candidate in candidates)


def test_when_one_drawn_is_full_the_better_of_two_others_is_taken():
    candidates = (
        *backends(8, max_concurrency=1, inflight=1),
        Backend("light", inflight=1),
        Backend("heavy", inflight=9),
    )
    share = shares(candidates, LEAST_LOAD)

    assert sum(share[:8]) == 0.0
    assert share[8] == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("balance", [ROUND_ROBIN, LEAST_LOAD, PEAK_EWMA], ids=lambda balance: balance.kind.value)
@pytest.mark.parametrize(
    ("age", "part"), [(-1.0, 0.1), (0.0, 0.1), (1.0, 0.1), (2.5, 0.25), (5.0, 0.5), (9.9, 0.99), (10.0, 1.0)]
)
@pytest.mark.parametrize("count", [2, 4])
def test_slow_start_ramps_a_young_backend_up(balance, age, part, count):
    candidates = (*backends(count - 1), Backend("young", since=NOW - age))

    assert shares(candidates, balance, rounds=3000)[-1] == pytest.approx(part / (count - 1 + part), abs=0.04)


@pytest.mark.parametrize("balance", [ROUND_ROBIN, LEAST_LOAD, PEAK_EWMA], ids=lambda balance: balance.kind.value)
def test_where_all_are_young_none_is_held_back(balance):
    assert shares(backends(4, since=NOW), balance, rounds=4000) == pytest.approx([0.25] * 4, abs=0.03)


class Unlucky(Random):
    """Chance that never lets a young backend pass."""

    def random(self) -> float:
        return 0.999


@pytest.mark.parametrize("balance", [ROUND_ROBIN, LEAST_LOAD, PEAK_EWMA], ids=lambda balance: balance.kind.value)
def test_with_the_worst_of_luck_somebody_is_chosen(balance):
    assert Chooser(backends(3, since=NOW)).choose(balance, Unlucky(), NOW) is not None


KEYS = [f"session-{i}" for i in range(2000)]


def owners(candidates, keys=KEYS, refused=()):
    chooser = Chooser(candidates)
    return {key: chooser.choose(HASH, Random(1), NOW, key, refused).key for key in keys}


def test_a_key_has_one_owner_whoever_asks_and_in_whatever_order_the_backends_come():
    candidates = backends(5)

    assert owners(candidates) == owners(candidates) == owners(candidates[::-1])


def test_only_the_keys_of_a_backend_that_leaves_move():
    candidates = backends(10)
    before, after = owners(candidates), owners(candidates[1:])

    assert {key for key in KEYS if before[key] != after[key]} == {key for key in KEYS if before[key] == "tiny/0"}


def test_a_backend_that_comes_takes_its_part_and_moves_no_other_key():
    candidates = backends(10)
    before, after = owners(candidates), owners((*candidates, Backend("tiny/new")))
    moved = [key for key in KEYS if before[key] != after[key]]

    assert {after[key] for key in moved} == {"tiny/new"}
    assert len(moved) / len(KEYS) == pytest.approx(1 / 11, abs=0.03)


def test_the_keys_of_a_refused_backend_spread_over_the_others_as_if_it_had_left():
    candidates = backends(10)

    assert owners(candidates, refused=candidates[:1]) == owners(candidates[1:])


def test_a_thousand_backends_share_a_ring_of_bounded_size():
    candidates = backends(1000)
    counts = Counter(owners(candidates).values())

    assert len(counts) > 700
    assert max(counts.values()) < 20


@given(st.text(st.characters(), max_size=50))
def test_any_text_is_a_key(key):
    assert Chooser(backends(2)).choose(HASH, Random(1), NOW, key) is not None


def test_peak_ewma_jumps_up_and_sinks_slowly():
    ewma = PeakEwma(decay=10.0)
    assert ewma.value(0.0) == 0.0

    ewma.observe(1.0, now=0.0)
    assert ewma.value(0.0) == 1.0
    assert ewma.value(10.0) == pytest.approx(exp(-1))

    ewma.observe(0.2, now=10.0)
    assert ewma.value(10.0) == pytest.approx(exp(-1) + 0.2 * (1 - exp(-1)))

    ewma.observe(3.0, now=11.0)
    assert ewma.value(11.0) == 3.0
    assert repr(ewma) == "<PeakEwma 3 s at 11>"


def test_peak_ewma_takes_an_old_reading_of_the_clock_as_the_newest():
    ewma = PeakEwma()
    ewma.observe(1.0, now=100.0)
    ewma.observe(0.5, now=50.0)

    assert ewma.value(50.0) == ewma.value(100.0) == 1.0


@pytest.mark.parametrize(
    ("healthy", "total", "answer"),
    [
        (0, 0, False),
        (0, 1, True),
        (1, 1, False),
        (1, 2, False),
        (0, 2, True),
        (1, 3, True),
        (2, 4, False),
        (4, 10, True),
    ],
)
def test_panic_is_fewer_than_half(healthy, total, answer):
    assert panic(healthy, total) is answer


def test_round_robin_among_young_candidates_still_takes_turns() -> None:
    young = backends(2, since=0.0)
    chooser = Chooser(young)
    rng = Random(1)
    chosen = Counter(chooser.choose(Balance(BalanceKind.ROUND_ROBIN), rng, 0.1).key for _ in range(1000))
    assert min(chosen.values()) > 350
