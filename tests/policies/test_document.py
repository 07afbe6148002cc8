"""From the text of a policy to the Policy, whole."""

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies import document
from policies.cross_check import glob
from policies.policy import (
    Allow,
    Balance,
    BalanceKind,
    BreakerRule,
    Claims,
    ConsumerRule,
    Issuer,
    Match,
    Plan,
    Policy,
    Rate,
    RetryRule,
    Target,
    Timeouts,
    WhenStoreIsDown,
)  # fmt: skip
from policies.problems import InvalidDocument
from tests.support.policy_text import BASE, OPEN, VALID, parse, refusals, route

SCHEMA = Path(document.__file__).with_name("schema.json")

EVERYTHING = """\
version: 1
issuers:
  - issuer: https://idp.example.com
    audience: [weir, other]
    algorithms: [RS256, ES256, EdDSA]
    jwks: https://idp.example.com/.well-known/jwks.json
    claims: {consumer: azp, groups: roles}
  - {issuer: beside, audience: weir, algorithms: [PS512], jwks: keys/jwks.json}
anonymous: true
plans:
  free: {requests: 60/minute, burst: 10, concurrency: 4}
  gold: {requests: 100/second, concurrency: 64, priority: high, when_store_is_down: open}
consumers:
  - {match: {group: research}, plan: gold}
  - {match: {consumer: ci}, plan: gold}
  - {match: {any: true}, plan: free}
routes:
  - name: chat
    match: {path: /v1/chat/completions, model: "tiny*", header: {X-Team: blue}}
    allow: [group:research, consumer:ci, scope:chat, "model:tiny-*"]
    to:
      - {service: tiny, version: 1, weight: 95}
      - {service: tiny, version: "2", weight: 5}
    stick: consumer
    balance: hash:header:x-session
    timeout: {connect: 250ms, first_byte: 10s, idle: 20s, total: 10m}
    retry: {attempts: 3, budget: 10%, idempotent: true}
    breaker: {failures: 25%, of_at_least: 10, window: 20s, open: 3s, probes: 1, eject_at_most: 100%}
  - name: rest
    to: [{service: small}]
"""


def test_everything_at_once():
    policy = parse(EVERYTHING)
    assert policy.version == hashlib.sha256(EVERYTHING.encode()).hexdigest()[:12]
    assert policy.anonymous
    assert policy.issuers == (
        Issuer(
            "https://idp.example.com", ("weir", "other"), ("RS256", "ES256", "EdDSA"),
            "https://idp.example.com/.well-known/jwks.json", Claims("azp", "roles"),
        ),
        Issuer("beside", ("weir",), ("PS512",), "/etc/weir/keys/jwks.json", Claims()),
    )  # fmt: skip
    assert dict(policy.plans) == {
        "free": Plan("free", Rate(60, 60.0), burst=10, concurrency=4),
        "gold": Plan(
            "gold", Rate(100, 1.0), burst=100, concurrency=64, priority="high", when_store_is_down=WhenStoreIsDown.OPEN
        ),
    }
    assert policy.consumers == (
        ConsumerRule("gold", group="research"), ConsumerRule("gold", consumer="ci"), ConsumerRule("free", any=True),
    )  # fmt: skip
    chat, rest = policy.routes
    assert chat.match == Match(glob("/v1/chat/completions"), glob("tiny*"), (("x-team", "blue"),))
    assert chat.allow == Allow(frozenset({"research"}), frozenset({"ci"}), frozenset({"chat"}), (glob("tiny-*"),))
    assert chat.to == (Target("tiny", "1", 95), Target("tiny", "2", 5))
    assert chat.stick
    assert chat.balance == Balance(BalanceKind.HASH, "x-session")
    assert chat.timeout == Timeouts(0.25, 10.0, 20.0, 600.0)
    assert chat.retry == RetryRule(3, 0.1, idempotent=True)
    assert chat.breaker == BreakerRule(0.25, 10, 20.0, 3.0, 1, 1.0, key=chat.breaker.key)
    assert (rest.name, rest.match, rest.to, rest.allow) == ("rest", Match(), (Target("small"),), Allow())
    assert (rest.stick, rest.balance, rest.timeout, rest.retry) == (False, Balance(), Timeouts(), RetryRule())


def test_yaml_guesses_nothing():
    assert route("match: {model: no, header: {x: 1.10}}").match == Match(None, glob("no"), (("x", "1.10"),))


@pytest.mark.parametrize(
    ("requests", "burst"),
    [("100/second", 100), ("60/minute", 60), ("3600/hour", 60), ("10/hour", 1), ("2M/day", 1388), ("0.5/second", 1)],
)
def test_default_burst_is_a_period_but_no_more_than_a_minute(requests, burst):
    assert parse(f"{VALID}plans: {{a: {{requests: {requests}}}}}\n").plans["a"].burst == burst


@pytest.mark.parametrize(
    ("tokens", "most"),
    [("40k/minute", 40_000), ("2M/day", 2_000_000), ("1.5k/second", 1500), ("2.5/second", 2), ("0.5/second", 1)],
)
def test_all_tokens_of_a_period_may_be_used_at_once(tokens, most):
    plan = parse(f"{VALID}plans: {{a: {{tokens: {tokens}}}}}\n").plans["a"]
    assert (plan.token_burst, plan.requests) == (most, None)
    assert plan.tokens is not None


def test_equal_breakers_have_equal_keys():
    default, same, other = route(""), route("breaker: {window: 10s, failures: 50%}"), route("breaker: {window: 11s}")
    assert default.breaker == same.breaker
    assert default.breaker.key
    assert other.breaker.key != same.breaker.key


def test_text_and_bytes_are_the_same_policy():
    assert document.parse(VALID, base=BASE) == document.parse(VALID.encode(), base=BASE)


def test_a_policy_cannot_be_changed():
    policy = parse(EVERYTHING)
    with pytest.raises(TypeError):
        policy.plans["free"] = policy.plans["gold"]
    with pytest.raises(AttributeError):
        policy.anonymous = False


def test_every_error_at_once_in_the_order_of_the_file():
    text = """\
version: 2
plans:
  free: {requests: 60/minut, burts: 10}
consumers:
  - {match: {any: true}, plan: fre}
routes:
  - name: a b
    match: {pth: /v1/*}
    to: [{service: tiny, weight: 1e3}]
    retry: &r {budget: 20}
  - to: tiny
    retry: *r
root: 1
"""
    assert refusals(text) == [
        "1:1 nobody could call: name an issuer under `issuers`, or say `anonymous: true`",
        "1:10 version: `2` is not a version this Weir reads: expected `1`",
        "3:20 plans.free.requests: `60/minut` has the unknown period `minut`: did you mean `minute`?",
        "3:30 plans.free.burts: unknown key `burts`: did you mean `burst`?",
        "5:32 consumers[0].plan: there is no plan `fre`: did you mean `free`?",
        "7:11 routes[0].name: `a b` is not a name: letters, digits, `.`, `_` and `-`, at most 128",
        "8:13 routes[0].match.pth: unknown key `pth`: did you mean `path`?",
        "9:34 routes[0].to[0].weight: `1e3` is not a number: expected one such as `100`, `40k` or `2M`",
        "10:12 routes[0].retry: anchors (`&name`) are not allowed",
        "10:24 routes[0].retry.budget: `20` is not a share: write `20%` if that is meant",
        "11:5 routes[1].name: is missing",
        "11:9 routes[1].to: expected a list, found `tiny`",
        "12:12 routes[1].retry: aliases (`*name`) are not allowed: write the value out",
        "13:1 root: unknown key `root`: did you mean `routes`?",
    ]


@pytest.mark.parametrize("text", ["", "[]", "x", "{}", "version: 1", "[" * 5000, "\ud800", b"\xff", "a: &a [*a]"])
def test_whatever_is_no_policy_is_refused(text):
    assert refusals(text)


TOKENS = st.sampled_from(
    ["version", "issuers", "anonymous", "plans", "consumers", "routes", "name", "match", "path", "model", "header", "allow", "to", "service", "weight", "stick", "balance", "timeout", "retry", "breaker", "1", "true", "/v1/*", "10s", "5%", "60/minute", "hash:consumer", "group:x", ":", ",", "-", "{", "}", "[", "]", "&", "*", "!", "'", '"', "|", ">", "#", "\n"]
    + ["\n  ", "\n- ", ": ", ", "]
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(TOKENS, max_size=60))
def test_any_text_is_a_policy_or_refused(tokens):
    with contextlib.suppress(InvalidDocument):
        assert isinstance(parse(OPEN + "".join(tokens)), Policy)


def test_the_schema_on_disk_is_current():
    current = json.dumps(document.json_schema(), indent=2) + "\n"
    assert SCHEMA.read_text() == current, "write it anew: weir policy schema > policies/schema.json"


def test_the_schema_is_for_people():
    text = SCHEMA.read_text()
    assert '"default"' not in text
    assert '"null"' not in text
    schema = json.loads(text)
    for section in (schema, *schema["$defs"].values()):
        for name, field in section.get("properties", {}).items():
            assert field["description"].endswith((".", ":")), name
