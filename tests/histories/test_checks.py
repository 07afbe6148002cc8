"""The checks catch a history that is broken, each in one way, and let one pass that is not."""

from dataclasses import replace

import pytest

from tests.histories.checks import (
    Allowance,
    attempts_too_late,
    charges_that_differ,
    last_views_that_differ,
    limit_allowances,
    probes_too_many,
    requests_told_twice,
    views_that_go_back,
    windows_over_limit,
)
from tests.histories.history import (
    Answered,
    Attempt,
    BreakerChange,
    Change,
    Ended,
    History,
    Registration,
    Seen,
    Trouble,
    View,
)

A, B = "10.0.0.1:1", "10.0.0.2:1"
KEY = "tiny/a"
BOTH = frozenset({"g1", "g2"})


def at(*moments: float) -> list[tuple[float, float]]:
    return [(moment, moment) for moment in moments]


class TestWindows:
    """5 at once, and 1 a second."""

    @pytest.mark.parametrize(
        "admitted",
        [
            at(0, 0, 0, 0, 0),
            at(0, 0, 0, 0, 0, 1, 2, 3),
            at(0, 0, 0, 0, 0, 5, 5, 5, 5, 5),
            [(0.0, 1.0)] * 6,  # the last one may have been admitted a second after the first
            [],
        ],
    )
    def test_fine(self, admitted):
        assert windows_over_limit(admitted, 5, 1.0) == []

    @pytest.mark.parametrize(
        "admitted",
        [
            at(0, 0, 0, 0, 0, 0),
            at(0, 0, 0, 0, 0, 1, 1.9),
            at(*range(100), 50, 50, 50, 50, 50, 50),
            [(0.0, 0.5)] * 6,
        ],
    )
    def test_broken(self, admitted):
        assert windows_over_limit(admitted, 5, 1.0)

    def test_what_the_loss_of_redis_allows(self):
        lost = [Allowance(2.0, 3.0, 5.0)]
        assert windows_over_limit(at(0, 0, 0, 0, 0, 2, 2, 2, 2, 2), 5, 1.0, lost) == []
        assert windows_over_limit(at(0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2), 5, 1.0, lost)
        assert windows_over_limit(at(5, 5, 5, 5, 5, 5), 5, 1.0, lost)  # it was before, and counts no more

    def test_what_a_gateway_that_is_cut_off_spends_alone(self):
        (alone,) = limit_allowances([Trouble("redis", frozenset({"g1"}), 10.0, 20.0)], 2, 8, 4.0, recovery=1.0)
        assert alone == Allowance(10.0, 21.0, 4.0, 2.0)
        assert alone.within(0.0, 9.0) == 0.0
        assert alone.within(0.0, 15.0) == 4.0 + 2.0 * 5.0
        assert alone.within(12.0, 40.0) == 4.0 + 2.0 * 9.0

    def test_trouble_of_all_gateways_costs_one_burst_and_that_of_etcd_none(self):
        troubles = [Trouble("redis", BOTH, 1.0, 2.0, lost=True), Trouble("etcd", BOTH, 1.0, 2.0)]
        assert limit_allowances(troubles, 2, 8, 4.0, recovery=1.0) == [Allowance(1.0, 3.0, 8)]


def view(
    moment: float, revision: int, number: int | None = 1, *, address: str = A, life: int = 1, gateway="g1"
) -> View:
    backends = {} if number is None else {KEY: Seen(Registration(number, address), life)}
    return View(moment, gateway, revision, backends)


class TestViews:
    @pytest.mark.parametrize(
        "views",
        [
            [view(0, 1), view(1, 2, 2), view(2, 2, 2)],
            [view(0, 1), view(1, 2, None), view(2, 3, 2)],
            [view(0, 5, 3), view(1, 1, 1, gateway="g2")],  # each goes its own way
        ],
    )
    def test_forward(self, views):
        assert views_that_go_back(views) == []

    @pytest.mark.parametrize(
        ("views", "said"),
        [
            ([view(0, 5), view(1, 4)], "went back from revision 5 to 4"),
            ([view(0, 1, 2), view(1, 2, 1)], "as of 1 after 2"),
            ([view(0, 1, 2), view(1, 2, None), view(2, 3, 1)], "as of 1 after 2"),
            ([view(0, 1, 2), view(1, 2, None), view(2, 3, 2)], "again after it was gone"),
        ],
    )
    def test_back(self, views, said):
        (found,) = views_that_go_back(views)
        assert said in found

    def test_the_end(self):
        etcd = {KEY: Registration(3, A)}
        right, wrong = view(0, 9, 3), view(1, 9, 2)
        assert last_views_that_differ([wrong, replace(right, at=2)], ["g1"], etcd) == []
        assert last_views_that_differ([right, wrong], ["g1"], etcd)
        assert last_views_that_differ([right], ["g1"], {})
        assert last_views_that_differ([view(0, 9, None)], ["g1"], etcd)
        assert last_views_that_differ([right], ["g1", "g2"], etcd)  # g2 never had a view


def attempt(began: float, ended: float | None = None, *, request="r", key=KEY, gateway="g1", outcome="ok") -> Attempt:
    return Attempt(request, gateway, key, began, began + 0.1 if ended is None else ended, outcome)


def ended(*attempts: Attempt, request="r", consumer="c", status=200, code="") -> Ended:
    return Ended(request, "g1", consumer, status, code, attempts)


class TestLateness:
    """KEY was at A from 0, at B from 10, and away from 20 on; the gateway learns it all at once."""

    CHANGES = (
        Change(0.0, 1, KEY, Registration(1, A)),
        Change(10.0, 2, KEY, Registration(2, B)),
        Change(20.0, 3, KEY, None),
    )

    def late(self, moment: float, *views: View, troubles=()) -> list[str]:
        history = History(
            changes=list(self.CHANGES), views=list(views), ended=[ended(attempt(moment))], troubles=list(troubles)
        )
        return attempts_too_late(history, grace=2.0, recovery=1.0)

    def test_in_time(self):
        views = (view(0, 1), view(10, 2, 2, address=B))
        for moment in (0.0, 9.0, 11.0, 21.9):
            assert self.late(moment, *views) == []

    def test_late(self):
        assert self.late(12.1, view(0, 1))  # still at A
        assert self.late(22.1, view(0, 1), view(10, 2, 2, address=B))  # gone

    def test_never_there(self):
        assert self.late(1.0, view(0, 1, address="10.0.0.9:1"))

    def test_not_in_view(self):
        assert self.late(1.0)
        assert self.late(1.0, view(0, 1, None))
        assert self.late(5.0, view(0, 1), view(4, 1, None))

    def test_while_it_cannot_know(self):
        cut = Trouble("etcd", frozenset({"g1"}), 9.0, 30.0)
        assert self.late(32.9, view(0, 1), troubles=[cut]) == []
        assert self.late(33.1, view(0, 1), troubles=[cut])
        assert self.late(32.9, view(0, 1), troubles=[replace(cut, gateways=frozenset({"g2"}))])
        assert self.late(32.9, view(0, 1), troubles=[replace(cut, what="redis")])
        assert self.late(32.9, view(0, 1), troubles=[replace(cut, begin=13.0)])  # by then it had to know


def breaker(moment: float, state: str, *, life: int = 1, gateway="g1") -> BreakerChange:
    return BreakerChange(moment, gateway, KEY, life, state)


class TestProbes:
    """Open at 10, half open at 20, closed at 30; two probes."""

    CHANGES = (breaker(10, "open"), breaker(20, "half_open"), breaker(30, "closed"))

    def found(self, *attempts: Attempt, views: tuple[View, ...] = ()) -> list[str]:
        return probes_too_many(
            History(views=list(views or [view(0, 1)]), breakers=list(self.CHANGES), ended=[ended(*attempts)]), probes=2
        )

    def test_fine(self):
        assert self.found(*(attempt(5, 40) for _ in range(9))) == []  # sent before it opened
        assert self.found(attempt(20, 29), attempt(20, 21), attempt(21, 28)) == []  # a place that was given back
        assert self.found(*(attempt(31) for _ in range(9))) == []
        assert self.found(*(attempt(21, 29, gateway="g2") for _ in range(9))) == []
        assert self.found(*(attempt(21, 29, key="tiny/b") for _ in range(9))) == []

    def test_broken(self):
        assert self.found(attempt(15))
        assert self.found(attempt(20, 29), attempt(21, 29), attempt(28, 29))

    def test_a_backend_that_is_replaced_has_no_past(self):
        views = (view(0, 1), view(12, 2, 2, life=2))
        assert self.found(attempt(15), views=views) == []
        assert self.found(attempt(11), views=views)


class TestCharges:
    FREE = ended(attempt(1, outcome="connect_fail"), code="no_backend", status=503)

    def found(self, charged: int, *requests: Ended, **options) -> list[str]:
        return charges_that_differ(History(ended=list(requests), charged={"c": charged}), "c", **options)

    def test_one_for_each_that_did_work(self):
        requests = [ended(attempt(1)), ended(attempt(1), attempt(2)), self.FREE, ended(code="rate_limited", status=429)]
        requests += [ended(code="circuit_open", status=503), ended(attempt(1), consumer="other")]
        assert self.found(2, *requests) == []
        assert self.found(3, *requests)
        assert self.found(1, *requests)
        assert self.found(3, *requests, may_be_more=1) == []
        assert self.found(1, *requests, may_be_more=1)

    def test_a_retry_that_found_nobody_does_not_undo_the_work(self):
        failed = ended(
            attempt(1, outcome="upstream_error"), attempt(2, outcome="connect_fail"), code="no_backend", status=503
        )
        assert self.found(1, failed) == []
        assert self.found(0, failed)

    def test_requests_that_are_told_well(self):
        history = History(ended=[ended(attempt(1), attempt(2))], arrivals={"r": 2})
        history.answered.append(Answered("r", "g1", "c", 0.0, 1.0, 200))
        history.answered.append(Answered("left", "g1", "c", 0.0, 1.0, 0))
        assert requests_told_twice(history) == []

    @pytest.mark.parametrize(
        "history",
        [
            History(ended=[ended(), ended()]),
            History(answered=[Answered("r", "g1", "c", 0.0, 1.0, 200)]),
            History(arrivals={"r": 1}),
            History(ended=[ended(attempt(1))], arrivals={"r": 3}),
        ],
    )
    def test_requests_that_are_not(self, history):
        assert requests_told_twice(history)
