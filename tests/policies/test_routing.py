import re
from collections import Counter
from random import Random
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import errors
from policies.cross_check import glob
from policies.policy import ANONYMOUS, ConsumerRule, Match, Plan, Policy, Principal, Route, Target
from policies.routing import Router, _literally, pick_target, plan_of

TINY = (Target("tiny"),)


def route(name, path=None, model=None, headers=(), to=TINY, **kwargs):
    match = Match(None if path is None else glob(path), None if model is None else glob(model), headers)
    return Route(name, match, to, **kwargs)


def router(*routes):
    return Router(Policy("v1", routes=routes))


def no_headers(name):
    return None


CHAT = "/v1/chat/completions"
ROUTES = (
    route("blue", CHAT, "tiny*", (("x-team", "blue"),)),
    route("tiny", CHAT, "tiny"),
    route("tinies", CHAT, "tiny*"),
    route("v1", "/v1/*", "big"),
    route("any model", "/v1/embeddings"),
    route("huge", None, "huge-*-instruct"),
    route("files", "/files/*.txt"),
    route("late", CHAT, "small"),
)


@pytest.mark.parametrize(
    ("path", "model", "headers", "name"),
    [
        (CHAT, "tiny", {}, "tiny"),
        (CHAT, "tiny-2", {}, "tinies"),
        (CHAT, "tiny", {"x-team": "blue"}, "blue"),
        (CHAT, "tiny", {"x-team": "Blue"}, "tiny"),
        (CHAT, "big", {}, "v1"),
        (CHAT, "small", {}, "late"),
        ("/v1/completions", "big", {}, "v1"),
        ("/v1/embeddings", "big", {}, "v1"),
        ("/v1/embeddings", "other", {}, "any model"),
        ("/v1/embeddings", None, {}, "any model"),
        ("/anything", "huge-1-instruct", {}, "huge"),
        (CHAT, "huge--instruct", {}, "huge"),
        ("/files/a/b.txt", None, {}, "files"),
    ],
)
def test_the_first_route_that_matches_wins(path, model, headers, name):
    assert router(*ROUTES).route(path, model, headers.get).name == name


@pytest.mark.parametrize(
    ("path", "model", "error"),
    [
        (CHAT, "other", errors.ModelNotFound),
        (CHAT, "Tiny", errors.ModelNotFound),
        (CHAT, "huge-instruct", errors.ModelNotFound),
        (CHAT, None, errors.BadRequest),
        ("/V1/embeddings", "other", errors.ModelNotFound),
        ("/v1", "big", errors.ModelNotFound),
        ("/files/a.txt\n", None, errors.BadRequest),
    ],
)
def test_who_matches_no_route_is_told_why(path, model, error):
    with pytest.raises(error) as caught:
        router(*ROUTES).route(path, model, no_headers)

    assert caught.value.param == "model"


@pytest.mark.parametrize("path", ["/", "", "/v1", "/v1/chat", CHAT + "/", "/v1/chat//completions", CHAT.upper()])
def test_a_path_that_no_route_has(path):
    with pytest.raises(errors.NoRoute, match="path"):
        router(route("chat", CHAT), route("files", "/files/*")).route(path, "tiny", no_headers)


def test_no_routes():
    with pytest.raises(errors.NoRoute):
        router().route(CHAT, "tiny", no_headers)


def test_all_named_headers_must_be_there():
    ask = router(route("both", CHAT, None, (("x-team", "blue"), ("x-env", "test")))).route

    assert ask(CHAT, None, {"x-team": "blue", "x-env": "test"}.get).name == "both"
    with pytest.raises(errors.NoRoute, match="headers"):
        ask(CHAT, None, {"x-team": "blue"}.get)


@pytest.mark.parametrize(
    ("text", "beginning", "is_all"),
    [
        ("/v1/chat/completions", "/v1/chat/completions", True),
        ("tiny*", "tiny", False),
        ("*", "", False),
        ("a.b-c_d e+f|g(h)", "a.b-c_d e+f|g(h)", True),
        ("a*|b", "a", False),
        ("a**b*", "a", False),
        ("a?b", "a", False),
        ("a[b", "a", False),
        ("modèle\n", "modèle\n", True),
        ("", "", True),
    ],
)
def test_globs_of_our_make_are_read(text, beginning, is_all):
    found, rest = _literally(glob(text))

    assert (found, rest == "") == (beginning, is_all)


@pytest.mark.parametrize(
    "expression", ["tiny", r"^tiny$", r"(?s:tiny|big)\Z", r"(?s:tiny?)\Z", r"(?s:\d)\Z", r"(?s:a.|b)\Z"]
)
def test_patterns_of_another_make_are_asked_each_time(expression):
    assert _literally(re.compile(expression)) == ("", expression)


def test_a_pattern_of_another_make_works():
    routes = Route("either", Match(None, re.compile("tiny|big")), TINY), route("rest")
    ask = router(*routes).route

    assert [ask("/", model, no_headers).name for model in ("tiny", "big", "bigger")] == ["either", "either", "rest"]


def test_repr_shows_the_size():
    assert repr(router(*ROUTES)) == "<Router by path <_Index of 2 texts and 2 globs>>"


texts = st.text("ab*", max_size=4)


@given(
    st.lists(st.tuples(st.none() | texts, st.none() | texts, st.booleans()), max_size=8),
    st.text("abc", max_size=5),
    st.none() | st.text("abc", max_size=5),
    st.booleans(),
)
def test_the_index_answers_as_trying_all_in_turn_does(specs, path, model, is_blue):
    routes = [
        route(str(number), path, model, (("x-team", "blue"),) if blue else ())
        for number, (path, model, blue) in enumerate(specs)
    ]
    expected = next(
        (
            one
            for one in routes
            if (one.match.path is None or one.match.path.fullmatch(path))
            and (one.match.model is None or (model is not None and one.match.model.fullmatch(model)))
            and (not one.match.headers or is_blue)
        ),
        None,
    )
    header = {"x-team": "blue"}.get if is_blue else no_headers
    try:
        found = router(*routes).route(path, model, header)
    except errors.Refusal:
        found = None

    assert found is expected


PLANS = MappingProxyType({name: Plan(name) for name in ("gold", "silver", "free")})


@pytest.mark.parametrize(
    ("principal", "plan"),
    [
        (Principal("alice", frozenset({"research"})), "gold"),
        (Principal("ci", frozenset({"research"})), "gold"),
        (Principal("ci"), "silver"),
        (Principal("bob", frozenset({"sales"})), "free"),
        (ANONYMOUS, "free"),
    ],
)
def test_the_first_consumer_rule_gives_the_plan(principal, plan):
    rules = (
        ConsumerRule("gold", group="research"),
        ConsumerRule("silver", consumer="ci"),
        ConsumerRule("free", any=True),
    )

    assert plan_of(Policy("v1", plans=PLANS, consumers=rules), principal).name == plan


@pytest.mark.parametrize(
    "rules", [(), (ConsumerRule("gold", group="research"),), (ConsumerRule("gold", consumer="ci"),)]
)
def test_who_is_under_no_rule_has_no_plan(rules):
    assert plan_of(Policy("v1", plans=PLANS, consumers=rules), Principal("bob")) is None


def targets(*weights):
    return tuple(Target("tiny", str(version), weight) for version, weight in enumerate(weights))


def always(target):
    return True


CONSUMERS = [f"consumer-{i}" for i in range(2000)]


def sides(*weights, has_backend=always):
    canary = route("canary", to=targets(*weights), stick=True)
    return {consumer: pick_target(canary, Random(1), consumer, has_backend).version for consumer in CONSUMERS}


@pytest.mark.parametrize("stick", [False, True])
@pytest.mark.parametrize("weights", [(1, 1), (95, 5), (5, 95), (50, 30, 20), (0, 1, 3), (1,)])
def test_targets_get_their_weight(weights, stick):
    canary, rng = route("canary", to=targets(*weights), stick=stick), Random(5)
    counts = Counter(pick_target(canary, rng, consumer, always).version for consumer in CONSUMERS)

    for version, weight in enumerate(weights):
        assert counts[str(version)] / len(CONSUMERS) == pytest.approx(weight / sum(weights), abs=0.025)


@pytest.mark.parametrize("stick", [False, True])
def test_only_targets_with_a_backend_are_picked(stick):
    canary, rng = route("canary", to=targets(98, 1, 1), stick=stick), Random(5)

    def pick(*alive):
        return {
            target and target.version
            for target in (pick_target(canary, rng, one, lambda t: t.version in alive) for one in CONSUMERS[:100])
        }

    assert pick("1", "2") == {"1", "2"}
    assert pick("2") == {"2"}
    assert pick() == {None}


class Highest(Random):
    def random(self) -> float:
        return 1.0


def test_chance_at_its_end_gives_the_last_target():
    assert pick_target(route("canary", to=targets(1, 1)), Highest(), "ci", always).version == "1"


def test_a_consumer_stays_on_its_side():
    assert sides(95, 5) == sides(95, 5)
    assert sides(95, 5) == sides(950, 50)


@pytest.mark.parametrize("before", [(95, 5), (50, 30, 20), (10, 10, 10)])
def test_a_weight_that_grows_draws_consumers_to_its_target_and_moves_no_other(before):
    after = (*before[:-1], before[-1] * 2)
    old, new = sides(*before), sides(*after)
    moved = [consumer for consumer in CONSUMERS if old[consumer] != new[consumer]]

    assert {new[consumer] for consumer in moved} == {str(len(before) - 1)}
    gained = after[-1] / sum(after) - before[-1] / sum(before)
    assert len(moved) / len(CONSUMERS) == pytest.approx(gained, abs=0.02)


def test_consumers_of_a_target_without_backends_move_and_no_others():
    old, new = sides(50, 30, 20), sides(50, 30, 20, has_backend=lambda target: target.version != "1")

    assert {one for one in CONSUMERS if old[one] != new[one]} == {one for one in CONSUMERS if old[one] == "1"}


@given(st.text(st.characters(), max_size=20))
def test_any_name_sticks_somewhere(consumer):
    assert pick_target(route("canary", to=targets(1, 1), stick=True), Random(1), consumer, always) is not None
