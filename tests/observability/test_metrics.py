import re

import pytest
import structlog
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from observability import events
from observability.metrics import Metrics
from tests.support.ended import ATTEMPT, ended, refused

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture
def metrics():
    return Metrics()


def samples(metrics):
    """{'name{label="value"}': number} of everything exposed."""
    body, _ = metrics.render()
    return {
        sample.name + "{" + ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items())) + "}": sample.value
        for family in parse_text(body.decode())
        for sample in family.samples
    }  # fmt: skip


def test_a_request_is_counted_once_in_each_family(metrics):
    metrics.request_ended(ended())
    metrics.request_ended(ended())
    found = samples(metrics)
    assert found['weir_requests_total{reason="ok",route="chat",service="tiny",status="200"}'] == 2
    assert found['weir_request_duration_seconds_count{route="chat",service="tiny"}'] == 2
    assert found['weir_request_duration_seconds_sum{route="chat",service="tiny"}'] == pytest.approx(0.2)
    assert found['weir_overhead_seconds_bucket{le="0.0001",route="chat"}'] == 2  # a bound belongs to its bucket
    assert found['weir_overhead_seconds_bucket{le="7.5e-05",route="chat"}'] == 0
    assert found['gen_ai_client_token_usage_sum{model="tiny-1",service="tiny",type="input"}'] == 24
    assert found['gen_ai_client_token_usage_sum{model="tiny-1",service="tiny",type="output"}'] == 60


@pytest.mark.parametrize(
    ("changes", "first_tokens", "per_tokens"),
    [
        ({"stream": True}, 1, 1),
        ({"stream": False}, 0, 0),  # the first byte of a whole answer says nothing of its first token
        ({"stream": True, "tokens_out": 1}, 1, 0),
        ({"stream": True, "tokens_out": -1}, 1, 0),
        ({"stream": True, "end_reason": "stream_truncated"}, 0, 0),
        ({"stream": True, "first_token": -1.0}, 0, 0),
    ],
)
def test_token_times_are_those_of_good_streams(metrics, changes, first_tokens, per_tokens):
    metrics.request_ended(ended(**changes))
    found = samples(metrics)
    labels = '{model="tiny-1",service="tiny"}'
    assert found.get(f"gen_ai_server_time_to_first_token_seconds_count{labels}", 0) == first_tokens
    assert found.get(f"gen_ai_server_time_per_output_token_seconds_count{labels}", 0) == per_tokens


def test_time_per_token_is_that_of_the_tokens_after_the_first(metrics):
    metrics.request_ended(ended(stream=True, total=2.0, first_token=0.5, tokens_out=16))
    name = 'gen_ai_server_time_per_output_token_seconds_sum{model="tiny-1",service="tiny"}'
    assert samples(metrics)[name] == pytest.approx(0.1)


def test_refusals_and_retries(metrics):
    metrics.request_ended(refused(429, "rate_limited", "rate_limited", rule="plans.free.requests"))
    metrics.request_ended(refused(403, "forbidden", "policy", rule="routes.chat.allow"))
    metrics.request_ended(ended(attempts=[ATTEMPT, ATTEMPT, ATTEMPT]))
    found = samples(metrics)
    assert found['weir_limited_total{rule="plans.free.requests"}'] == 1
    assert not [name for name in found if "routes.chat.allow" in name]
    assert found['weir_retries_total{service="tiny"}'] == 2
    assert found['weir_requests_total{reason="policy",route="chat",service="",status="403"}'] == 1


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (events.PolicyReloaded("invalid", "abc", ("x",)), 'weir_policy_reload_total{result="invalid"}'),
        (events.DiscoveryRejected("/k", "bad url: ftp://x"), 'weir_discovery_rejected_total{reason="bad url"}'),
        (events.DiscoveryResynced("compacted", 7, "backends"), 'weir_discovery_resync_total{reason="compacted"}'),
        (events.KeysRefreshed("https://i", "failed"), 'weir_jwks_refresh_total{issuer="https://i",result="failed"}'),
        (events.CertificatesRead("etcd", "ok"), 'weir_tls_reload_total{result="ok",use="etcd"}'),
        (events.CertificatesRead("etcd", "refused", "x"), 'weir_tls_reload_total{result="refused",use="etcd"}'),
        (events.HandshakeFailed("not_tls", "http request"), 'weir_tls_handshake_failures_total{reason="not_tls"}'),
    ],
)
def test_other_events_are_counted(metrics, event, name):
    metrics(event)
    metrics(event)
    assert samples(metrics)[name] == 2


def test_reloads_are_there_before_the_first_one(metrics):
    """Else increase() misses the step from absent to 1, and with it the first bad policy."""
    found = samples(metrics)
    assert [found[f'weir_policy_reload_total{{result="{r}"}}'] for r in ("ok", "invalid", "unreadable")] == [0, 0, 0]
    metrics(events.CertificatesRead("listener", "ok"))
    assert samples(metrics)['weir_tls_reload_total{result="refused",use="listener"}'] == 0


def test_events_without_a_family_change_nothing(metrics):
    before = metrics.render()[0].count(b"\nweir_")
    metrics(events.StoreChanged(up=True, reason=""))
    metrics(events.BreakerChanged("tiny", "b-1", "open"))
    assert metrics.render()[0].count(b"\nweir_") == before


def test_gauges_are_read_when_scraped(metrics):
    inflight = {("tiny",): 3.0}
    metrics.gauge("weir_inflight", "Requests on their way.", ("service",), inflight.items)
    metrics.counter("weir_log_dropped_total", "Lines lost.", (), lambda: [((), 7.0)])
    assert samples(metrics)['weir_inflight{service="tiny"}'] == 3
    inflight[("tiny",)] = 5.0
    found = samples(metrics)
    assert found['weir_inflight{service="tiny"}'] == 5
    assert found["weir_log_dropped_total{}"] == 7


def test_a_gauge_that_fails_takes_no_other_with_it(metrics):
    def read():
        raise KeyError("gone")

    metrics.gauge("weir_broken", "Broken.", (), read)
    metrics.gauge("weir_store_up", "1: Redis answers.", (), lambda: [((), 1.0)])
    with structlog.testing.capture_logs() as logs:
        found = samples(metrics)
    assert found["weir_store_up{}"] == 1
    assert [line["metric"] for line in logs] == ["weir_broken"]


def test_a_snapshot_is_of_its_moment(metrics):
    inflight = {("tiny",): 3.0}
    metrics.gauge("weir_inflight", "x", ("service",), inflight.items)
    metrics.request_ended(ended())
    snapshot = metrics.snapshot()
    metrics.request_ended(ended())
    metrics.request_ended(ended(route="new"))
    inflight[("tiny",)] = 5.0
    text, _ = snapshot.render()
    assert b'weir_inflight{service="tiny"} 3.0' in text
    assert b'weir_overhead_seconds_count{route="chat"} 1.0' in text
    assert b'route="new"' not in text


def test_a_gauge_tells_a_label_set_once(metrics):
    """A second one makes Prometheus refuse the whole scrape."""
    metrics.gauge("weir_inflight", "x", ("service",), lambda: [(("a",), 1.0), (("a",), 2.0)])
    assert metrics.render()[0].count(b'weir_inflight{service="a"}') == 1


def test_a_thousand_names_are_a_bounded_number_of_series(monkeypatch):
    monkeypatch.setattr("observability.metrics.MOST_SERIES", 50)
    metrics = Metrics()
    for number in range(1000):
        metrics.request_ended(ended(route=f"r{number}", model=f"m{number}", stream=True))
    metrics.gauge("weir_inflight", "x", ("service",), lambda: [((f"s{number}",), 1.0) for number in range(1000)])
    found = samples(metrics)
    assert found['weir_requests_total{reason="other",route="other",service="other",status="other"}'] == 950
    for family, most in (
        ("weir_requests_total", 51),
        ("weir_overhead_seconds_count", 51),
        ("gen_ai_client_token_usage_count", 51),
        ("weir_inflight", 50),
    ):
        assert len([name for name in found if name.startswith(family + "{")]) == most


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_hostile_names_leave_the_scrape_readable(metrics, accept):
    for text in ("\udc85", 'a"b\\c\nd', "\x00\x1b[2J", "x" * 100_000, "\u2028"):
        metrics.request_ended(ended(route=text, model=text))
    metrics.gauge("weir_inflight", "x", ("service",), lambda: [(("\udc85",), 1.0)])
    parse = parse_openmetrics if accept else parse_text
    routes = {
        sample.labels["route"]
        for family in parse(metrics.render(accept)[0].decode())
        for sample in family.samples
        if "route" in sample.labels
    }
    assert len(routes) == 5
    assert max(map(len, routes)) == 256


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5", "application/openmetrics-text"),
        ("application/openmetrics-text;version=what", "text/plain"),
        ("text/plain;version=\udc85", "text/plain"),
    ],
)
def test_the_format_is_what_was_asked_for(metrics, accept, kind):
    body, content_type = metrics.render(accept)
    assert content_type.startswith(kind)
    assert body.endswith(b"# EOF\n") == (kind == "application/openmetrics-text")


def test_every_name_is_of_the_contract_and_has_a_help_text(metrics):
    body = metrics.render()[0].decode()
    helps = dict(re.findall(r"# HELP (\S+) (.+)", body))
    names = {name for name in helps if not name.startswith(("process_", "python_"))}
    assert all(name.startswith(("weir_", "gen_ai_")) for name in names)
    assert {"process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"} <= helps.keys()
