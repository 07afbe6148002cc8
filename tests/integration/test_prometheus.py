"""A real Prometheus scrapes the metrics, loads the alert rules, and answers what the dashboard asks."""

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path

import aiohttp
import pytest
import yaml
from aiohttp import web

from observability import events
from observability.metrics import BREAKER_VALUES, Metrics
from observability.request import RequestEnded
from tests.support.ended import ATTEMPT, ended, refused

OBSERVABILITY = Path(__file__).parents[2] / "observability"
RULES = OBSERVABILITY / "alerts" / "weir.yml"
DASHBOARD = OBSERVABILITY / "dashboards" / "weir.json"

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not (PROMETHEUS and PROMTOOL), reason="prometheus and promtool are not installed"),
]

HOSTILE = ("\udc85", 'a"b\\c\nd', "\x00\x1b[2J", "x" * 10_000)  # one of them unescaped, and a scrape is lost whole

# What a busy minute holds: each dashboard question has something to find.
EVENTS = (
    ended(),
    ended(stream=True),
    ended(attempts=[ATTEMPT, ATTEMPT]),
    refused(429, "rate_limited", "rate_limited", rule="plans.free.requests"),
    refused(503, "no_backend", "no_backend"),
    events.PolicyReloaded("ok", "0123456789ab"),
    events.KeysRefreshed("https://idp.example.com", "ok"),
    events.DiscoveryRejected("/weir/v1/backends/tiny/b-9", "bad url: ftp://"),
    events.DiscoveryResynced("periodic", 42, "backends"),
    *(ended(route=text, model=text) for text in HOSTILE),
)

GAUGES = (
    ("weir_inflight", (), [((), 3.0)]),
    ("weir_backends", ("service", "state"), [(("tiny", "healthy"), 2.0), (("tiny", "unhealthy"), 1.0), (("tiny", "draining"), 0.0)]),
    ("weir_breaker_state", ("service", "backend"), [(("tiny", "b-1"), BREAKER_VALUES["closed"]), (("tiny", "b-2"), BREAKER_VALUES["open"])]),
    ("weir_discovery_revision", (), [((), 42.0)]),
    ("weir_discovery_lag_seconds", (), [((), 0.5)]),
    ("weir_policy_info", ("version",), [(("0123456789ab",), 1.0)]),
    ("weir_store_up", (), [((), 1.0)]),
    ("weir_loop_lag_seconds", (), [((), 0.001)]),
    ("weir_overload_state", (), [((), 0.0)]),
    ("weir_memory_used_ratio", (), [((), 0.5)]),
    ("weir_clock_skew_seconds", ("issuer",), [(("https://idp.example.com",), 0.4)]),
)  # fmt: skip


class Scraped:
    """A gateway's /metrics; each scrape finds one more round of events."""

    def __init__(self):
        self.metrics = Metrics()
        self.content_types = set()
        for name, labels, rows in GAUGES:
            self.metrics.gauge(name, "As the gateway has it.", labels, lambda rows=rows: rows)
        for name in ("weir_otlp_export_failures_total", "weir_log_dropped_total"):
            self.metrics.counter(name, "As the gateway has it.", (), lambda: [((), 0.0)])

    async def answer(self, request):
        for event in EVENTS:
            hear = self.metrics.request_ended if isinstance(event, RequestEnded) else self.metrics
            hear(event)
        body, content_type = self.metrics.render(request.headers.get("Accept", ""))
        self.content_types.add(content_type.partition(";")[0])
        return web.Response(body=body, headers={"Content-Type": content_type})


class Prometheus:
    """One that scrapes `target` five times a second. Its answers are the `result` of the HTTP API."""

    def __init__(self, url, session):
        self._url, self._session = url, session

    async def query(self, expr):
        async with self._session.get(f"{self._url}/api/v1/query", params={"query": expr}) as response:
            answer = await response.json()
        assert answer["status"] == "success", (expr, answer)
        return answer["data"]["result"]

    async def get(self, path):
        async with self._session.get(self._url + path) as response:
            return (await response.json())["data"]


async def serve(handler):
    app = web.Application()
    app.router.add_get("/metrics", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner


@pytest.fixture
async def scraped():
    scraped = Scraped()
    scraped.runner = await serve(scraped.answer)
    yield scraped
    await scraped.runner.cleanup()


@pytest.fixture
async def prometheus(scraped, tmp_path):
    config = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "weir",
                "static_configs": [{"targets": [f"127.0.0.1:{scraped.runner.addresses[0][1]}"]}],
            }
        ],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            PROMETHEUS,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            "--log.level=info",
            stderr=stderr,
        )
    try:
        async with asyncio.timeout(30), aiohttp.ClientSession() as session:
            while not (address := re.search(r"msg=\"Listening on\" address=(\S+)", log.read_text())):
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)
            prometheus = Prometheus(f"http://{address[1]}", session)
            while not await is_warm(prometheus):
                await asyncio.sleep(0.05)
            yield prometheus
    finally:
        process.terminate()
        await process.wait()


async def is_warm(prometheus):
    """Whether three scrapes are in: enough for every rate."""
    try:
        result = await prometheus.query("min(count_over_time(weir_requests_total[1m])) >= 3")
    except (aiohttp.ClientError, KeyError):
        return False  # not yet listening, or "Service Unavailable" while it starts
    return bool(result)


def questions():
    dashboard = json.loads(DASHBOARD.read_text())
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "10s"))
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]


async def test_prometheus_takes_all_of_it_and_the_dashboard_has_no_empty_panel(prometheus, scraped):
    assert await prometheus.query('up{job="weir"} == 1')
    assert scraped.content_types == {"application/openmetrics-text"}
    empty = [title for title, expr in questions() if not await prometheus.query(expr)]
    assert empty == []

    [quantile] = await prometheus.query(
        "histogram_quantile(0.5, sum by (le) (gen_ai_server_time_to_first_token_seconds_bucket))"
    )
    assert 0.08 <= float(quantile["value"][1]) <= 0.1
    [ratio] = await prometheus.query(
        'sum(rate(weir_requests_total{route="chat",status="503"}[10s])) / sum(rate(weir_requests_total{route="chat"}[10s]))'
    )
    assert len(await prometheus.query("count by (route) (weir_requests_total)")) == 1 + len(HOSTILE)
    assert float(ratio["value"][1]) == pytest.approx(1 / 5)

    rules = [rule for group in (await prometheus.get("/api/v1/rules"))["groups"] for rule in group["rules"]]
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] == "err"] == []
    assert {rule["name"] for rule in rules} == set(FIRES)


# Alert -> series in promtool's notation (value at 0 + step x minutes) that make it fire within half an hour.
FIRES = {
    "WeirDown": {'up{job="weir"}': "0x30"},
    "WeirErrors": {'weir_requests_total{route="chat",status="500"}': "0+10x30", 'weir_requests_total{route="chat",status="200"}': "0+90x30"},
    "WeirStreamsCut": {'weir_requests_total{service="tiny",reason="stream_truncated"}': "0+2x30", 'weir_requests_total{service="tiny",reason="ok"}': "0+90x30"},
    "WeirFirstTokenSlow": {'gen_ai_server_time_to_first_token_seconds_bucket{model="m",le="5"}': "0+1x30", 'gen_ai_server_time_to_first_token_seconds_bucket{model="m",le="10"}': "0+9x30", 'gen_ai_server_time_to_first_token_seconds_bucket{model="m",le="+Inf"}': "0+9x30"},
    "WeirOverheadHigh": {'weir_overhead_seconds_bucket{route="chat",le="0.01"}': "0+1x30", 'weir_overhead_seconds_bucket{route="chat",le="0.025"}': "0+9x30", 'weir_overhead_seconds_bucket{route="chat",le="+Inf"}': "0+9x30"},
    "WeirServiceWithoutBackend": {'weir_backends{service="tiny",state="healthy"}': "0x30", 'weir_backends{service="tiny",state="unhealthy"}': "2x30"},
    "WeirBreakerOpen": {'weir_breaker_state{service="tiny",backend="b-1"}': "2x30"},
    "WeirRetriesHigh": {'weir_retries_total{service="tiny"}': "0+20x30", 'weir_requests_total{service="tiny"}': "0+90x30"},
    "WeirDiscoveryStale": {"weir_discovery_lag_seconds": "0+60x30"},
    "WeirRegistrationsIgnored": {'weir_discovery_rejected_total{reason="bad url"}': "1x20 2x9"},
    "WeirPolicyRefused": {'weir_policy_reload_total{result="invalid"}': "0x25 1x4"},
    "WeirPolicySkew": {'weir_policy_info{version="a",instance="1"}': "1x30", 'weir_policy_info{version="b",instance="2"}': "1x30"},
    "WeirStoreDown": {"weir_store_up": "0x30"},
    "WeirKeysNotRefreshed": {'weir_jwks_refresh_total{issuer="i",result="failed"}': "0+1x30", 'weir_jwks_refresh_total{issuer="i",result="ok"}': "5x30"},
    "WeirCertificateExpires": {'weir_tls_certificate_expires_timestamp_seconds{use="listener"}': "600000x30"},
    "WeirCertificateRefused": {'weir_tls_reload_total{use="listener",result="refused"}': "0x25 1x4"},
    "WeirLoopBlocked": {"weir_loop_lag_seconds": "0.5x30"},
    "WeirOverloaded": {"weir_overload_state": "1x30"},
    "WeirClockWrong": {'weir_clock_skew_seconds{issuer="a"}': "-60x30", 'weir_clock_skew_seconds{issuer="b"}': "-61x30"},
    "WeirTracesLost": {"weir_otlp_export_failures_total": "0+1x30"},
    "WeirLogLost": {"weir_log_dropped_total": "0x25 1x4"},
}  # fmt: skip

# The same families on a good day. None of the alerts may fire.
CALM = {
    'up{job="weir"}': "1x30",
    'weir_requests_total{route="chat",service="tiny",status="500",reason="upstream_error"}': "0+1x30",
    'weir_requests_total{route="chat",service="tiny",status="200",reason="ok"}': "0+99x30",
    'gen_ai_server_time_to_first_token_seconds_bucket{model="m",le="5"}': "0+9x30",
    'gen_ai_server_time_to_first_token_seconds_bucket{model="m",le="+Inf"}': "0+9x30",
    'weir_overhead_seconds_bucket{route="chat",le="0.01"}': "0+9x30",
    'weir_overhead_seconds_bucket{route="chat",le="+Inf"}': "0+9x30",
    'weir_backends{service="tiny",state="healthy"}': "2x30",
    'weir_backends{service="tiny",state="unhealthy"}': "1x30",
    'weir_breaker_state{service="tiny",backend="b-1"}': "0x30",
    'weir_retries_total{service="tiny"}': "0+1x30",
    "weir_discovery_lag_seconds": "1x30",
    'weir_discovery_rejected_total{reason="bad url"}': "4x30",
    'weir_policy_reload_total{result="ok"}': "1+1x30",
    'weir_policy_reload_total{result="invalid"}': "3x30",
    'weir_policy_info{version="a",instance="1"}': "1x30",
    'weir_policy_info{version="a",instance="2"}': "1x30",
    "weir_store_up": "1x30",
    'weir_jwks_refresh_total{issuer="i",result="failed"}': "0+1x30",
    'weir_jwks_refresh_total{issuer="i",result="ok"}': "0+1x30",
    'weir_tls_certificate_expires_timestamp_seconds{use="listener"}': "4e9x30",
    'weir_tls_reload_total{use="listener",result="refused"}': "3x30",
    "weir_loop_lag_seconds": "0.01x30",
    "weir_overload_state": "0x30",
    'weir_clock_skew_seconds{issuer="a"}': "1x30",
    'weir_clock_skew_seconds{issuer="b"}': "-60x30",
    "weir_otlp_export_failures_total": "7x30",
    "weir_log_dropped_total": "7x30",
}


def test_the_rules_are_good():
    checked = subprocess.run([PROMTOOL, "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_configuration_to_deploy_is_good():
    config = OBSERVABILITY.parent / "deploy" / "prometheus.yml"
    subprocess.run([PROMTOOL, "check", "config", str(config)], check=True, capture_output=True, timeout=30)


def test_each_alert_fires_when_it_should_and_on_a_good_day_none(tmp_path):
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in rules} == set(FIRES)
    count = 'count(ALERTS{alertname="%s",alertstate="firing"}) or vector(0)'
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {"expr": count % alert, "eval_time": "29m", "exp_samples": [{"labels": "{}", "value": fires}]}
                for alert, fires in expected.items()
            ],
        }
        for series, expected in [
            *((series, {alert: 1}) for alert, series in FIRES.items()),
            (CALM, dict.fromkeys(FIRES, 0)),
        ]
    ]
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    played = subprocess.run([PROMTOOL, "test", "rules", file], capture_output=True, text=True, check=False)
    assert played.returncode == 0, played.stdout + played.stderr
