import json
import re
from random import Random
from types import SimpleNamespace

import msgspec
import pytest

from discovery.source import SyncState
from gateway.upstream.fleet import Fleet
from gateway.views import as_glob, views
from observability.recent import Recent
from policies.cross_check import glob
from policies.policy import Allow, Match, Policy, Route, Target
from tests.support.upstream import endpoint

ROUTE = Route(
    "chat",
    Match(path=re.compile("/v1/.*"), headers=(("x-team", "blue"),)),
    (Target("tiny", "1", 95), Target("tiny", "2", 5)),
    allow=Allow(frozenset({"b", "a"}), frozenset({"ci"}), frozenset({"s"}), (re.compile("tiny.*"),)),
)


def shown(name: str, *endpoints, error=None, seconds_since_contact: float | None = 0.12345):
    fleet = Fleet(lambda: 0.0, Random(1), lambda backend, state: None)
    fleet.replace({one.key: one for one in endpoints})
    fleet.note_health("tiny/a", True)
    watch = SimpleNamespace(state=SyncState.WATCHING, revision=7, seconds_since_contact=seconds_since_contact)
    policy = SimpleNamespace(policy=Policy("v1", routes=(ROUTE,)), last_error=error, loaded_at=5.0, name="policy.yaml")
    view = views(fleet, SimpleNamespace(watch=watch), policy, Recent())[name]
    return json.loads(msgspec.json.encode(view()))


def test_backends_in_the_order_of_their_names() -> None:
    document = shown(
        "backends", endpoint("tiny/b", draining=True, host="::1", address="::1"), endpoint("tiny/a", base_path="/llm")
    )
    first, second = document["backends"]
    assert first == {
        "service": "tiny", "id": "a", "url": "http://127.0.0.1:9000/llm", "models": [{"name": "tiny", "version": "1"}],
        "grpc_port": None, "state": "serving", "healthy": True, "grpc_healthy": None, "breaker": "closed", "inflight": 0, "weight": 1, "zone": "",
        "reported_load": 0.0,
    }  # fmt: skip
    assert (second["id"], second["state"], second["healthy"], second["url"]) == (
        "b",
        "draining",
        False,
        "http://[::1]:9000",
    )
    assert document["discovery"] == {"state": "watching", "revision": 7, "stale_seconds": 0.123}


def test_before_the_first_contact_nothing_is_stale() -> None:
    assert shown("backends", seconds_since_contact=None)["discovery"]["stale_seconds"] is None


def test_routes_as_they_are_in_force() -> None:
    (route,) = shown("routes")["routes"]
    assert route["match"] == {"path": "/v1/*", "model": None, "header": {"x-team": "blue"}}
    assert route["allow"] == ["group:a", "group:b", "consumer:ci", "scope:s", "model:tiny*"]
    assert [(to["service"], to["version"], to["weight"]) for to in route["to"]] == [("tiny", "1", 95), ("tiny", "2", 5)]
    assert (route["name"], route["balance"]) == ("chat", "least_load")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, None),
        (SimpleNamespace(errors=("policy.yaml:1:1 x",), at=6.0), {"errors": ["policy.yaml:1:1 x"], "at": 6.0}),
    ],
)
def test_the_policy_and_why_a_newer_one_was_refused(error, told) -> None:
    assert shown("policy", error=error) == {
        "version": "v1",
        "loaded_at": 5.0,
        "source": "policy.yaml",
        "last_error": told,
    }


def test_requests_of_late() -> None:
    assert shown("requests") == {"requests": []}


@pytest.mark.parametrize(
    "text", ["*", "/v1/*", "/v1/chat/completions", "tiny-*-v2*", "a.b+c", "m(1)", "[x]", "what?", "a\\b", "*a*b*c*", ""]
)
def test_a_pattern_is_shown_as_the_glob_that_was_written(text) -> None:
    assert as_glob(glob(text)) == text
