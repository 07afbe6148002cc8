"""What is written for each gateway says what its docstring promises, and the gateways themselves accept it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.credentials import Credentials
from benchmarks.gateways import ALL, BY_NAME, weir
from benchmarks.gateways.gateway import AT_ONCE, CONSUMER, LIMITED, NARROW, OPEN, REFUSED, Site
from benchmarks.gateways.weir import POLICY, POLICY_WITH_NARROW, backend_key, registration
from discovery.endpoint import decode
from gateway import config
from policies import document
from policies.policy import Principal
from policies.routing import Router, plan_of


@pytest.fixture(scope="module")
def credentials():
    return Credentials.make()


@pytest.fixture
def site(tmp_path, credentials):
    backends = ("http://127.0.0.1:9001", "http://127.0.0.1:9002")
    return Site(
        tmp_path, 8080, 8081, backends, "http://127.0.0.1:9003", credentials, "http://etcd", "redis://127.0.0.1"
    )


def test_names_are_unique():
    assert len(BY_NAME) == len(ALL)


def test_the_signing_key_is_the_rs256_that_everybody_verifies(credentials):
    (key,) = json.loads(credentials.jwks)["keys"]
    assert (key["kty"], key["alg"]) == ("RSA", "RS256")
    assert credentials.token(OPEN) != credentials.token(LIMITED)


@pytest.mark.parametrize("name", ["envoy_router", "envoy_full", "nginx", "haproxy", "litellm", "vllm_router"])
def test_each_is_put_before_both_backends(name, site):
    launch = BY_NAME[name].launch(site)
    told = " ".join(launch.argv) + "".join(path.read_text() for path in site.folder.iterdir())
    assert "8080" in told
    assert "9001" in told
    assert "9002" in told


def test_portkey_is_told_of_its_backends_by_the_request(site):
    targets = json.loads(BY_NAME["portkey"].headers(site, OPEN)["x-portkey-config"])["targets"]
    assert [target["custom_host"] for target in targets] == ["http://127.0.0.1:9001/v1", "http://127.0.0.1:9002/v1"]


def test_direct_starts_nothing(site):
    assert BY_NAME["direct"].launch(site) is None


def test_envoy_full_has_the_filters_in_the_order_that_refuses_before_it_counts(site):
    told = envoy_config("envoy_full", site)
    names = [each["name"].rpartition(".")[2] for each in told["http_filters"]]
    assert names == ["jwt_authn", "local_ratelimit", "router"]
    assert told["tracing"]["random_sampling"] == {"value": 1.0}


def test_envoy_router_has_none_of_them(site):
    told = envoy_config("envoy_router", site)
    assert len(told["http_filters"]) == 1
    assert "tracing" not in told


@pytest.mark.integration
@pytest.mark.parametrize("name", ["envoy_router", "envoy_full"])
def test_envoy_accepts_its_configuration(name, site):
    envoy = BY_NAME[name]
    if envoy.absent():
        pytest.skip(f"envoy: {envoy.absent()}")
    checked = subprocess.run(
        [*envoy.launch(site).argv, "--mode", "validate"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_weirs_policy_knows_the_consumers_of_the_workloads(tmp_path):
    (tmp_path / "jwks.json").write_text("{}")
    policy = document.parse(POLICY.encode(), base=tmp_path)
    plans = [plan_of(policy, Principal(consumer)) for consumer in (OPEN, LIMITED, REFUSED)]
    assert [plan.name for plan in plans] == [OPEN, LIMITED, REFUSED]


def test_the_narrow_consumer_has_backends_of_his_own_in_weir(tmp_path, site):
    (tmp_path / "jwks.json").write_text("{}")
    router = Router(document.parse(POLICY_WITH_NARROW.encode(), base=tmp_path))
    headers = BY_NAME["weir"].headers(site, NARROW)
    assert router.route("/v1/chat/completions", "tiny", headers.get).to[0].service == NARROW
    assert CONSUMER not in BY_NAME["weir"].headers(site, OPEN)
    candidate = decode("narrow/0", registration("http://127.0.0.1:9001", "tiny", max_concurrency=8).encode())
    assert candidate.at("127.0.0.1").max_concurrency == 8


@pytest.mark.parametrize("name", ["envoy_router", "envoy_full"])
def test_the_narrow_consumer_has_a_cluster_of_his_own_in_envoy(name, site):
    told = envoy_config(name, site)
    routes = told["route_config"]["virtual_hosts"][0]["routes"]
    assert [route["route"]["cluster"] for route in routes][-2:] == ["narrow", "backends"]
    document = json.loads((site.folder / "envoy.json").read_text())
    clusters = {each["name"]: each for each in document["static_resources"]["clusters"]}
    assert clusters["narrow"]["circuit_breakers"]["thresholds"][0]["max_requests"] == AT_ONCE
    assert clusters["backends"]["circuit_breakers"]["thresholds"][0]["max_requests"] > AT_ONCE


def test_weirs_configuration_is_one_that_it_reads(site, monkeypatch):
    puts = {}
    monkeypatch.setattr("benchmarks.gateways.weir.Etcd", lambda _: FakeEtcd(puts))
    launch = BY_NAME["weir"].launch(site)
    read = config.load(Path(launch.argv[-1]), {})
    assert str(read.listen) == "127.0.0.1:8080"
    assert read.telemetry.sample == 0.01
    assert sorted(puts) == [backend_key(site, "bench", "b0"), backend_key(site, "bench", "b1")]


@pytest.mark.parametrize(
    ("made_after", "absent"),
    [(None, "not compiled (make compiled)"), (-10, "compiled from older sources (make compiled)"), (10, None)],
)
def test_weir_is_measured_compiled_only_from_the_present_sources(tmp_path, monkeypatch, made_after, absent):
    monkeypatch.setattr(weir, "ROOT", tmp_path)
    monkeypatch.setattr(weir, "COMPILED", tmp_path)
    source = tmp_path / "gateway" / "relay.py"
    source.parent.mkdir()
    source.write_text("")
    if made_after is not None:
        (tmp_path / ".made").write_text("")
        os.utime(tmp_path / ".made", (0, source.stat().st_mtime + made_after))
    assert BY_NAME["weir"].absent() == absent
    assert BY_NAME["weir_python"].absent() is None


def test_a_registration_is_one_that_weir_takes():
    candidate = decode("canary/one", registration("http://127.0.0.1:9001/7", "canary", weight=2).encode())
    assert repr(candidate)


class FakeEtcd:
    def __init__(self, puts):
        self._puts = puts

    def put(self, key, value):
        self._puts[key] = value


def envoy_config(name, site):
    BY_NAME[name].launch(site)
    told = json.loads((site.folder / "envoy.json").read_text())
    (listener,) = told["static_resources"]["listeners"]
    return listener["filter_chains"][0]["filters"][0]["typed_config"]
