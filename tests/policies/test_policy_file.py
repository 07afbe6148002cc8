"""What one section of a policy alone may get wrong, and that the descriptions tell the true defaults."""

import pytest

from policies import policy, policy_file, units
from policies.policy_file import BreakerSection, RetrySection, RouteSection, TargetSection, TimeoutSection
from policies.typed_tree import Section
from tests.support.policy_text import OPEN, VALID, refusals

KEYS_IN_FORCE = {
    "PolicyFile": {"version", "issuers", "anonymous", "plans", "consumers", "routes"},
    "IssuerSection": {"issuer", "audience", "algorithms", "jwks", "claims"},
    "ClaimsSection": {"consumer", "groups"},
    "PlanSection": {"requests", "burst", "tokens", "concurrency", "priority", "when_store_is_down"},
    "ConsumerSection": {"match", "plan"},
    "ConsumerMatch": {"group", "consumer", "any"},
    "RouteSection": {"name", "match", "allow", "to", "stick", "balance", "timeout", "retry", "breaker"},
    "MatchSection": {"path", "model", "header"},
    "TargetSection": {"service", "version", "weight"},
    "TimeoutSection": {"connect", "first_byte", "idle", "total"},
    "RetrySection": {"attempts", "budget", "idempotent"},
    "BreakerSection": {"failures", "of_at_least", "window", "open", "probes", "eject_at_most"},
}


def test_keys_in_force():
    sections = [each for each in vars(policy_file).values() if isinstance(each, type) and issubclass(each, Section)]
    assert {each.__name__: set(each.model_fields) for each in sections if each is not Section} == KEYS_IN_FORCE


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("plans: {a: {budget: {tokens: 1/month}}}", "plans.a.budget"),
        ("plans: {a: {weight: 1}}", "plans.a.weight"),
        ("api_keys: {}", "api_keys"),
    ]
    + [(key, f"routes[0].{key}") for key in ("queue", "cache", "hedge", "fallback", "guard")]
    + [("rollback", "routes[0].to[0].rollback")],
)
def test_keys_of_later_versions_are_refused_as_such(text, path):
    if ":" in text:
        document = f"{VALID}{text}\n"
    elif text == "rollback":
        document = OPEN + "routes: [{name: a, to: [{service: x, rollback: {}}]}]\n"
    else:
        document = OPEN + f"routes: [{{name: a, to: [{{service: x}}], {text}: {{}}}}]\n"
    assert [line.split(" ", 1)[1] for line in refusals(document)] == [f"{path}: is not available in this version"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("plans: {a: {burst: 3}}", "5:12 plans.a: `burst` does nothing without `requests`"),
        ("plans: {a: {when_store_is_down: shre}}", "5:33 plans.a.when_store_is_down: unknown value `shre`: did you mean `share`?"),
        ("plans: {a: {priority: hihg}}", "5:23 plans.a.priority: unknown value `hihg`: did you mean `high`?"),
        ("plans: {a: {tokens: 40k}}", "5:21 plans.a.tokens: `40k` is not a rate: expected one such as `60/minute` or `40k/hour`"),
        ("plans: {a: {tokens: 40k/minut}}", "5:21 plans.a.tokens: `40k/minut` has the unknown period `minut`: did you mean `minute`?"),
        ("plans: {a: {tokens: 0/minute}}", "5:21 plans.a.tokens: `0/minute` allows nothing: a rate must be more than 0"),
        ("plans: {a: {tokens: {rate: 40k/minute}}}", "5:21 plans.a.tokens: expected a rate, found a mapping"),
        ("plans: {a: {token: 40k/minute}}", "5:13 plans.a.token: unknown key `token`: did you mean `tokens`?"),
        ("plans: {a: {concurrency: 0}}", "5:26 plans.a.concurrency: must be at least 1"),
        ("plans: {a: {}}\nconsumers: [{match: {}, plan: a}]", "6:21 consumers[0].match: expected exactly one of `group`, `consumer` and `any`"),
        ("plans: {a: {}}\nconsumers: [{match: {group: x, any: true}, plan: a}]", "6:21 consumers[0].match: expected exactly one of `group`, `consumer` and `any`"),
        ("plans: {a: {}}\nconsumers: [{match: {any: false}, plan: a}]", "6:21 consumers[0].match: `any: false` matches nobody: write `any: true`, a `group` or a `consumer`"),
    ],
)  # fmt: skip
def test_plans_and_consumers(section, message):
    assert refusals(f"{VALID}{section}\n") == [message]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("to: []", "routes[0].to: needs at least one target with a weight above 0"),
        ("to: [{service: a, weight: 0}]", "routes[0].to: needs at least one target with a weight above 0"),
        ("to: [{service: a}, {service: a}]", "routes[0].to: names the same service and version twice"),
        ("to: [{service: a}], allow: []", "routes[0].allow: is empty and would let nobody in: remove it to let everybody in"),
        ("to: [{service: a}], match: {header: {X: 1, x: 2}}", "routes[0].match.header: names the same header twice: upper and lower case are the same"),
        ("to: [{service: a}], match: {header: x}", "routes[0].match.header: expected a mapping (`key: value`), found text"),
        ("to: [{service: a}], breaker: {failures: 0%}", "routes[0].breaker.failures: must be more than 0%: at 0% it would be open always"),
        ("to: [{service: a}], retry: {attempts: 0}", "routes[0].retry.attempts: must be at least 1"),
        ("to: [{service: a}], timeout: {total: 0s}", "routes[0].timeout.total: `0s` must be more than 0 and at most a year"),
    ],
)  # fmt: skip
def test_routes(body, message):
    [line] = refusals(f"{OPEN}routes:\n- {{name: all, {body}}}\n")
    assert line.split(" ", 1)[1] == message


def test_there_must_be_a_route():
    assert refusals(f"{OPEN}routes: []\n") == ["3:9 routes: must not be empty"]


@pytest.mark.parametrize(
    ("section", "rule"),
    [(TimeoutSection, policy.Timeouts()), (RetrySection, policy.RetryRule()), (BreakerSection, policy.BreakerRule())],
)
def test_descriptions_tell_the_defaults_that_are_in_force(section, rule):
    readers = {float: lambda text: units.parse_share(text) if "%" in text else units.parse_duration(text),
               int: units.parse_count, bool: units.parse_flag}  # fmt: skip
    for name, field in section.model_fields.items():
        told = field.description.split("(default ")[1].split(")")[0].strip("`")
        assert readers[field.annotation](told) == field.default == getattr(rule, name), name


def test_other_descriptions_tell_the_truth_too():
    assert TargetSection.model_fields["weight"].default == policy.Target("x").weight == 1
    assert RouteSection.model_fields["balance"].default == policy.Balance()
