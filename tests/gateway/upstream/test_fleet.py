from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from discovery.endpoint import Model
from gateway.upstream.fleet import Fleet
from gateway.upstream.load_report import LoadReport
from policies import errors
from policies.breaker import Outcome, State
from policies.policy import Balance, BalanceKind, BreakerRule, Match, Route, Target
from tests.support.upstream import connected, endpoint

RULE = BreakerRule(failures=0.5, of_at_least=1, window=10.0, open=5.0, probes=1, eject_at_most=0.5, key="k")
ROUTE = Route("chat", Match(), (Target("tiny"),), breaker=RULE, balance=Balance(BalanceKind.ROUND_ROBIN))
TINY = Target("tiny")
GRPC = pytest.mark.parametrize(
    ("ports", "serving", "refusal"),
    [({"a": None, "b": 9001}, ["b"], ""), ({"a": None, "b": None}, [], "none is registered with a `grpc_port`")],
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Story:
    def __init__(self, *keys: str, **fields) -> None:
        self.clock = Clock()
        self.breakers = []
        self.fleet = Fleet(self.clock, Random(1), lambda backend, state: self.breakers.append((backend.key, state)))
        self.show(*(endpoint(key, **fields) for key in keys))

    def show(self, *endpoints) -> None:
        self.fleet.replace({one.key: one for one in endpoints})

    def health(self, **healthy: bool) -> None:
        for name, is_healthy in healthy.items():
            self.fleet.note_health(f"tiny/{name}", is_healthy)

    def usable(self, model: str | None = "tiny") -> set[str]:
        return {backend.endpoint.id for backend in self.fleet.group(TINY, model).usable}

    def lease(self, route: Route = ROUTE, tried=()):
        return self.fleet.lease(self.fleet.group(TINY, "tiny"), route, tried, "")

    def fail(self, name: str, route: Route = ROUTE) -> None:
        others = tuple(backend for backend in self.fleet.backends.values() if backend.endpoint.id != name)
        with self.lease(route, others) as lease:
            lease.outcome = Outcome.FAILURE


# What discovery tells


class Channel:
    closed = False

    def close(self) -> None:
        self.closed = True


def test_channels_end_with_their_backend_its_place_or_its_certificates() -> None:
    story = Story("tiny/a", "tiny/b", "tiny/c", "tiny/d", scheme="https", grpc_port=9001)
    channels = {}
    for key, backend in story.fleet.backends.items():
        backend.channel = channels[key] = Channel()
    story.show(
        endpoint("tiny/a", scheme="https", grpc_port=9001, weight=5),
        endpoint("tiny/b", scheme="https", grpc_port=9002),
        endpoint("tiny/d", scheme="https", grpc_port=9001),
    )
    assert {key: channel.closed for key, channel in channels.items()} == {
        "tiny/a": False, "tiny/b": True, "tiny/c": True, "tiny/d": False,
    }  # fmt: skip
    story.fleet.renew_connections()
    assert channels["tiny/a"].closed
    assert story.fleet.backends["tiny/a"].channel is None


def test_other_certificates_end_the_use_of_tls_connections_and_of_no_others() -> None:
    story = Story("tiny/a")
    story.show(endpoint("tiny/a"), endpoint("tiny/b", scheme="https"))
    before = {key: backend.pool for key, backend in story.fleet.backends.items()}
    breaker = story.fleet.backends["tiny/b"].breaker(RULE)
    story.fleet.renew_connections()
    after = story.fleet.backends
    assert after["tiny/a"].pool is before["tiny/a"]
    assert after["tiny/b"].pool is not before["tiny/b"]
    assert before["tiny/b"].closed
    assert after["tiny/b"].breaker(RULE) is breaker


def test_a_backend_that_did_not_change_keeps_everything() -> None:
    story = Story("tiny/a", "tiny/b")
    before = dict(story.fleet.backends)
    breaker, idle = before["tiny/a"].breaker(RULE), connected(before["tiny/a"].pool)
    before["tiny/a"].pool.put_back(idle)
    with story.lease():
        story.show(endpoint("tiny/a", weight=5), endpoint("tiny/b"), endpoint("tiny/c"))
        assert sum(backend.inflight for backend in story.fleet.backends.values()) == 1
    after = story.fleet.backends
    assert after["tiny/a"] is before["tiny/a"]
    assert after["tiny/b"] is before["tiny/b"]
    assert (after["tiny/a"].weight, after["tiny/a"].breaker(RULE)) == (5, breaker)
    assert after["tiny/a"].pool.take(0.0) is idle


@pytest.mark.parametrize("change", [{"port": 9001}, {"address": "10.0.0.1"}])
def test_one_that_moved_begins_anew(change) -> None:
    story = Story("tiny/a")
    old = story.fleet.backends["tiny/a"]
    story.health(a=True)
    story.show(endpoint("tiny/a", **change))
    new = story.fleet.backends["tiny/a"]
    assert (new is old, old.pool.closed, new.healthy) == (False, True, None)


def test_one_whose_health_is_checked_as_before_stays_healthy() -> None:
    story = Story("tiny/a")  # the prober tells only changes: what is forgotten here is never told again
    story.health(a=True)
    story.show(endpoint("tiny/a", base_path="/llm", models=(Model("tiny"), Model("new")), zone="z"))
    assert story.fleet.backends["tiny/a"].healthy is True


def test_one_that_is_gone_ends_when_its_last_request_does() -> None:
    story = Story("tiny/a")
    with story.lease() as lease:
        story.show()
        assert lease.backend.pool.closed
        assert story.fleet.group(TINY, "tiny") is None
        lease.outcome = Outcome.FAILURE
    assert lease.backend.inflight == 0
    assert repr(story.fleet) == "<Fleet backends=0 open_breakers=0>"


def test_one_that_drains_finishes_what_it_has_and_gets_no_more() -> None:
    story = Story("tiny/a", "tiny/b")
    story.show(endpoint("tiny/a", draining=True), endpoint("tiny/b"))
    assert story.usable() == {"b"}
    assert not story.fleet.backends["tiny/a"].pool.closed
    assert set(story.fleet.offered()) == {("tiny", "tiny", "1")}


# Health


@pytest.mark.parametrize(
    ("health", "usable", "panicking"),
    [
        ({}, "abcd", True),
        ({"a": True}, "a", False),
        ({"a": True, "b": False}, "a", False),
        ({"a": True, "b": False, "c": False}, "abc", True),
        ({"a": True, "b": True, "c": False, "d": False}, "ab", False),
        ({"a": False, "b": False, "c": False, "d": False}, "abcd", True),
        ({"a": False}, "abcd", True),
    ],
)
def test_who_may_be_asked(health, usable, panicking) -> None:
    story = Story("tiny/a", "tiny/b", "tiny/c", "tiny/d")
    story.health(**health)
    assert story.usable() == set(usable)
    assert story.fleet.group(TINY, "tiny").panicking is panicking


def test_who_comes_back_starts_slowly_and_news_of_strangers_is_dropped() -> None:
    story = Story("tiny/a")
    story.clock.now = 200.0
    story.health(a=True, stranger=True)
    assert story.fleet.backends["tiny/a"].since == 200.0
    story.clock.now = 300.0
    story.health(a=True)
    assert story.fleet.backends["tiny/a"].since == 200.0


def test_a_probe_brings_a_load_report() -> None:
    story = Story("tiny/a")
    report = b'JSON {"named_metrics": {"num_requests_running": 5}}'
    story.fleet.hear_header("tiny/a", report)
    story.fleet.hear_header("tiny/stranger", report)
    assert story.fleet.backends["tiny/a"].reported == 5
    story.clock.now += 10
    story.fleet.tidy()
    assert story.fleet.backends["tiny/a"].reported == 0


def test_pushed_load_counts_until_it_is_old() -> None:
    story = Story("tiny/a")
    a = story.fleet.backends["tiny/a"]
    assert story.fleet.hear_load("tiny/a", LoadReport(5, seq=3), 0.2)
    assert not story.fleet.hear_load("tiny/a", LoadReport(1, seq=2), 0.2)
    assert not story.fleet.hear_load("tiny/stranger", LoadReport(1), 0.2)
    story.fleet.forget_load("tiny/a")
    story.fleet.forget_load("tiny/stranger")
    assert a.reported == 5
    story.clock.now += 0.3
    story.fleet.forget_load("tiny/a")
    assert a.reported == 0


def test_a_burst_between_two_reports_does_not_herd_to_who_was_idle_in_the_last() -> None:
    """Four gateways that hear the same report send 30 requests each before the next: spread, not all to the idle one."""
    keys = [f"tiny/{number}" for number in range(4)]
    route = replace(ROUTE, balance=Balance(BalanceKind.LEAST_LOAD))
    received = Counter(dict.fromkeys(keys, 0))
    for seed in range(4):
        story = Story(*keys)
        story.fleet._rng.seed(seed)
        story.clock.now += 60  # nobody is new any more
        for key in keys:
            story.fleet.hear_load(key, LoadReport(0 if key == "tiny/0" else 5, seq=1), 0.2)
        for _ in range(30):
            received[story.lease(route).backend.key] += 1
    assert sum(received.values()) == 120
    assert received["tiny/0"] < 60  # with what it had: no more than a third above the mean
    assert min(received.values()) > 15


# Groups


@pytest.mark.parametrize(
    ("target", "model", "version", "found"),
    [
        (TINY, "tiny", None, {"v1", "v2"}),
        (TINY, None, None, {"v1", "v2", "any"}),
        (TINY, "tiny", "2", {"v2"}),
        (TINY, "tiny", "3", None),
        (TINY, "other", None, {"any"}),
        (Target("tiny", version="1"), "tiny", None, {"v1"}),
        (Target("tiny", version="1"), "tiny", "1", {"v1"}),
        (Target("tiny", version="1"), "tiny", "2", None),
        (Target("huge"), "tiny", None, None),
        (Target("huge"), None, None, None),
    ],
)
def test_who_serves_what(target, model, version, found) -> None:
    story = Story()
    story.show(
        endpoint("tiny/v1"),
        endpoint("tiny/v2", models=(Model("tiny", "2"), Model("second"))),
        endpoint("tiny/any", models=()),
    )
    if model == "tiny":
        found = found and found | ({"any"} if version is None and target.version is None else set())
    group = story.fleet.group(target, model, version)
    assert (group and {backend.endpoint.id for backend in group.serving}) == found


@GRPC
def test_over_grpc_only_those_are_asked_that_speak_it(ports, serving, refusal) -> None:
    story = Story()
    story.show(*(endpoint(f"tiny/{name}", grpc_port=port) for name, port in ports.items()))
    group = story.fleet.group(TINY, "tiny", over_grpc=True)
    assert [backend.endpoint.id for backend in group.serving] == serving if serving else group is None
    assert {backend.endpoint.id for backend in story.fleet.group(TINY, "tiny").serving} == set(ports)
    assert type(story.fleet.missing(ROUTE, "none", None, over_grpc=True)) is errors.ModelNotFound
    if refusal:
        missing = story.fleet.missing(ROUTE, "tiny", None, over_grpc=True)
        assert (type(missing), refusal in missing.message) == (errors.NoBackend, True)


def test_health_over_http_and_over_grpc_are_two_things() -> None:
    story = Story()
    story.show(*(endpoint(f"tiny/{name}", grpc_port=9001) for name in "ab"))
    story.health(a=True, b=False)
    story.fleet.note_grpc_health("tiny/a", False)
    story.fleet.note_grpc_health("tiny/b", True)
    story.fleet.note_grpc_health("tiny/gone", True)
    over_grpc = story.fleet.group(TINY, "tiny", over_grpc=True)
    assert (story.usable(), [backend.endpoint.id for backend in over_grpc.usable]) == ({"a"}, ["b"])
    story.fleet.note_grpc_health("tiny/a", True)
    over_grpc = story.fleet.group(TINY, "tiny", over_grpc=True)
    assert (story.usable(), [backend.endpoint.id for backend in over_grpc.usable]) == ({"a"}, ["a", "b"])


@pytest.mark.parametrize("models", [(), (Model("tiny", "1"),)])
def test_groups_do_not_grow_with_names_that_clients_invent(models) -> None:
    story = Story()
    story.show(endpoint("tiny/a", models=models), endpoint("tiny/b"))
    for number in range(1000):
        story.fleet.group(TINY, f"m{number}")
        story.fleet.group(TINY, "tiny", f"v{number}")
        story.fleet.group(TINY, f"m{number}", "1")
        story.fleet.known_model(f"m{number}")
    assert len(story.fleet._groups) <= 2


def test_only_names_that_backends_serve_are_known() -> None:
    story = Story("tiny/a")
    assert [story.fleet.known_model(name) for name in ("tiny", "huge", None)] == ["tiny", "other", "other"]


@pytest.mark.parametrize(
    ("service", "model", "version", "draining", "refusal"),
    [
        ("tiny", "huge", None, False, errors.ModelNotFound),
        ("tiny", "tiny", "9", False, errors.ModelNotFound),
        ("other", "tiny", None, False, errors.NoBackend),
        ("other", None, None, False, errors.NoBackend),
        ("tiny", "tiny", None, True, errors.NoBackend),
        ("tiny", "huge", None, True, errors.ModelNotFound),
    ],
)
def test_why_nobody_serves_it(service, model, version, draining, refusal) -> None:
    story = Story("tiny/a", draining=draining)
    route = Route("chat", Match(), (Target(service),))
    assert type(story.fleet.missing(route, model, version)) is refusal


# Leases


def test_who_has_been_tried_is_not_asked_again() -> None:
    story = Story("tiny/a", "tiny/b")
    with story.lease() as first, story.lease(tried=(first.backend,)) as second:
        assert first.backend is not second.backend
        with pytest.raises(errors.NoBackend) as caught:
            story.lease(tried=(first.backend, second.backend))
        assert type(caught.value) is errors.NoBackend


def test_no_more_than_max_concurrency_at_a_time() -> None:
    story = Story("tiny/a", max_concurrency=2)
    with story.lease(), story.lease(), pytest.raises(errors.Overloaded):
        story.lease()
    with story.lease():
        pass


def test_what_is_shut_by_breakers_is_told_with_the_time_to_come_back() -> None:
    story = Story("tiny/a")
    story.fail("a")
    assert story.breakers == [("tiny/a", State.OPEN)]
    with pytest.raises(errors.CircuitOpen) as caught:
        story.lease()
    assert 4.0 <= caught.value.retry_after <= 6.0
    assert caught.value.rule == "routes.chat.breaker"
    story.clock.now += 7
    with story.lease() as probe:
        probe.outcome = Outcome.SUCCESS
    assert story.breakers[-1] == ("tiny/a", State.CLOSED)
    assert story.fleet.backends["tiny/a"].since == story.clock.now
    assert "open_breakers=0" in repr(story.fleet)


def test_one_shut_and_one_tried_leave_the_third() -> None:
    story = Story("tiny/a", "tiny/b", "tiny/c")
    story.fail("a")
    tried = story.fleet.backends["tiny/b"]
    with story.lease(tried=(tried,)) as lease:
        assert lease.backend.endpoint.id == "c"


def test_a_full_one_among_shut_ones_that_were_tried_is_overload_and_no_open_circuit() -> None:
    story = Story()
    story.show(endpoint("tiny/a"), endpoint("tiny/b"), endpoint("tiny/c", max_concurrency=1))
    eject_all = Route("chat", Match(), ROUTE.to, breaker=BreakerRule(of_at_least=1, eject_at_most=1.0, key="all"))
    story.fail("a", eject_all)
    story.fail("b", eject_all)
    backends = story.fleet.backends
    with story.lease(eject_all) as lease:
        assert lease.backend is backends["tiny/c"]
        with pytest.raises(errors.Overloaded) as caught:
            story.lease(eject_all, (backends["tiny/a"],))
        assert type(caught.value) is errors.Overloaded


def test_no_more_than_their_share_are_ejected() -> None:
    story = Story("tiny/a", "tiny/b", "tiny/c", "tiny/d")
    for name in "abcd":
        story.fail(name)
    assert [key for key, _ in story.breakers] == ["tiny/a", "tiny/b"]
    story.clock.now += 60
    story.fail("a")
    assert story.fleet.backends["tiny/a"].breaker_state is State.OPEN


def test_a_policy_with_other_rules_leaves_no_breaker_open_for_ever() -> None:
    story = Story("tiny/a")
    story.fail("a")
    story.fleet.keep_breakers([BreakerRule(key="other")])
    assert story.fleet.backends["tiny/a"].breaker_state is State.CLOSED
    assert "open_breakers=0" in repr(story.fleet)


def test_closing_closes_what_idles() -> None:
    story = Story("tiny/a")
    idle = connected(story.fleet.backends["tiny/a"].pool)
    story.fleet.backends["tiny/a"].pool.put_back(idle)
    story.fleet.close()
    assert idle.transport.closed == "abort"
