from random import Random
from types import SimpleNamespace

import pytest

from gateway.gauges import register_gauges, register_identity, register_load, register_load_streams
from gateway.upstream.fleet import Fleet
from observability.metrics import Metrics
from policies.breaker import Outcome
from policies.policy import BreakerRule, Match, Policy, Route, Target
from tests.support.upstream import endpoint

FAST = BreakerRule(of_at_least=1, key="k")


def scraped(store=None, seconds_since_contact: float | None = 1.5) -> dict[str, float]:
    fleet = Fleet(lambda: 0.0, Random(1), lambda backend, state: None)
    shown = [endpoint(f"tiny/{name}", draining=name == "d") for name in "abcd"] + [endpoint("big/a")]
    fleet.replace({one.key: one for one in shown})
    fleet.note_health("tiny/a", True)
    fleet.note_health("tiny/b", False)
    with fleet.lease(fleet.group(Target("big"), None), Route("r", Match(), (), breaker=FAST), (), "") as lease:
        lease.outcome = Outcome.FAILURE
    metrics = Metrics()
    watch = SimpleNamespace(revision=42, seconds_since_contact=seconds_since_contact)
    register_gauges(
        metrics,
        SimpleNamespace(inflight=3),
        SimpleNamespace(connections=range(7), refused_connections=2),
        fleet,
        SimpleNamespace(watch=watch, store=SimpleNamespace(statistics=lambda: SimpleNamespace(held=4))),
        SimpleNamespace(policy=Policy("0123456789ab")),
        store,
        lambda: 0.25,
        [
            SimpleNamespace(use="listener", in_force=SimpleNamespace(expires_at=1.8e9)),
            SimpleNamespace(use="backends", in_force=SimpleNamespace(expires_at=None)),
        ],
    )
    lines = metrics.render()[0].decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


async def test_what_the_gateways_parts_show() -> None:
    samples = scraped()
    expected = {
        "weir_inflight": 3,
        "weir_connections": 7,
        "weir_connections_refused_total": 2,
        'weir_backends{service="tiny",state="healthy"}': 1,
        'weir_backends{service="tiny",state="unhealthy"}': 1,
        'weir_backends{service="tiny",state="unknown"}': 1,
        'weir_backends{service="tiny",state="draining"}': 1,
        'weir_backends{service="big",state="unknown"}': 1,
        "weir_discovery_held": 4,
        'weir_breaker_state{backend="a",service="tiny"}': 0,
        'weir_breaker_state{backend="a",service="big"}': 2,
        "weir_discovery_revision": 42,
        "weir_discovery_lag_seconds": 1.5,
        'weir_policy_info{version="0123456789ab"}': 1,
        "weir_loop_lag_seconds": 0.25,
        "weir_tasks": 1,
        'weir_tls_certificate_expires_timestamp_seconds{use="listener"}': 1.8e9,
        'weir_tls_certificate_expires_timestamp_seconds{use="backends"}': None,
    }
    assert {name: samples.get(name) for name in expected} == expected


@pytest.mark.parametrize(("store", "up"), [(None, None), (SimpleNamespace(up=True), 1), (SimpleNamespace(up=False), 0)])
async def test_a_store_is_told_of_where_there_is_one(store, up) -> None:
    assert scraped(store).get("weir_store_up") == up


async def test_what_is_not_known_yet_is_not_told() -> None:
    assert "weir_discovery_lag_seconds" not in scraped(seconds_since_contact=None)


@pytest.mark.parametrize(
    ("state", "share", "shown"),
    [
        ("normal", None, {"weir_overload_state": 0}),
        ("no_keep_alive", 0.93, {"weir_overload_state": 1, "weir_memory_used_ratio": 0.93}),
        ("shedding", 0.97, {"weir_overload_state": 2, "weir_memory_used_ratio": 0.97}),
    ],
)
def test_how_much_there_is_to_do(state, share, shown) -> None:
    metrics = Metrics()
    register_load(metrics, SimpleNamespace(state=state), SimpleNamespace(share=lambda: share))
    lines = [line.rpartition(" ") for line in metrics.render()[0].decode().splitlines() if line.startswith("weir_")]
    assert {
        name: float(value) for name, _, value in lines if name in ("weir_overload_state", "weir_memory_used_ratio")
    } == shown


def test_what_is_known_of_issuers_and_callers() -> None:
    metrics = Metrics()
    told = SimpleNamespace(issuer="https://a", age=4.0, skew=-1.5)
    silent = SimpleNamespace(issuer="https://b", age=None, skew=None)
    register_identity(
        metrics,
        SimpleNamespace(statistics=lambda: [told, silent]),
        SimpleNamespace(statistics=lambda: {"verified": 3, "refused": 0}),
    )
    lines = metrics.render()[0].decode().splitlines()
    assert [line for line in lines if line.startswith(("weir_jwks_age", "weir_clock", "weir_tokens"))] == [
        'weir_jwks_age_seconds{issuer="https://a"} 4.0',
        'weir_clock_skew_seconds{issuer="https://a"} -1.5',
        'weir_tokens_remembered{found="verified"} 3.0',
        'weir_tokens_remembered{found="refused"} 0.0',
    ]


def test_how_well_pushed_load_is_heard() -> None:
    metrics = Metrics()
    register_load_streams(metrics, SimpleNamespace(connected=2, counts={"taken": 9, "old": 1, "nonsense": 0}))
    lines = metrics.render()[0].decode().splitlines()
    assert [line for line in lines if line.startswith("weir_load_")] == [
        "weir_load_streams 2.0",
        'weir_load_reports_total{result="taken"} 9.0',
        'weir_load_reports_total{result="old"} 1.0',
        'weir_load_reports_total{result="nonsense"} 0.0',
    ]
