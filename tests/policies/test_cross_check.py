import pytest

from policies.cross_check import glob
from tests.support.policy_text import OPEN, VALID, parse, refusals

ISSUER = "{issuer: %s, audience: weir, algorithms: [ES256], jwks: jwks.json}"


def routes(*matches: str) -> str:
    return OPEN + "routes:\n" + "".join(
        f"- {{name: r{index}, to: [{{service: a}}], match: {match}}}\n" for index, match in enumerate(matches)
    )  # fmt: skip


NOBODY = "1:1 nobody could call: name an issuer under `issuers`, or say `anonymous: true`"


@pytest.mark.parametrize("head", ["", "issuers: []\n", "anonymous: false\n", "issuers: []\nanonymous: false\n"])
def test_somebody_must_be_able_to_call(head):
    assert refusals(f"version: 1\n{head}routes: [{{name: a, to: [{{service: x}}]}}]\n") == [NOBODY]


def test_issuers_and_anonymous_go_together():
    assert parse(f"{VALID}issuers: [{ISSUER % 'a'}]\n").anonymous


@pytest.mark.parametrize(("key", "value"), [("stick", "consumer"), ("balance", "hash:consumer")])
def test_callers_that_nobody_can_tell_apart_are_not_told_apart(key, value):
    text = f"{OPEN}routes: [{{name: a, to: [{{service: x}}], {key}: {value}}}]\n"
    [line] = refusals(text)
    assert line.endswith(
        f"routes[0].{key}: would send everything one way: without `issuers` all callers are the consumer `anonymous`"
    )
    parse(f"{text}issuers: [{ISSUER % 'a'}]\n")


def test_issuers_are_named_once():
    text = f"{VALID}issuers:\n- {ISSUER % 'a'}\n- {ISSUER % 'b'}\n- {ISSUER % 'a'}\n"
    assert refusals(text) == ["8:12 issuers[2].issuer: `a` was already given on line 6"]


def test_routes_are_named_once():
    text = f"{OPEN}routes:\n- {{name: a, to: [{{service: x}}], match: {{path: /a}}}}\n- {{name: a, to: [{{service: x}}]}}\n"
    assert refusals(text) == ["5:10 routes[1].name: `a` was already given on line 4"]


@pytest.mark.parametrize(
    ("plan", "hint"), [("glod", ": did you mean `gold`?"), ("zzz", ""), ("gol", ": did you mean `gold`?")]
)
def test_consumers_name_plans_that_exist(plan, hint):
    text = f"{VALID}plans: {{gold: {{}}}}\nconsumers: [{{match: {{any: true}}, plan: {plan}}}]\n"
    assert refusals(text) == [f"6:40 consumers[0].plan: there is no plan `{plan}`{hint}"]


def test_nobody_comes_after_everybody():
    entry = "- {match: {%s}, plan: a}\n"
    text = f"{VALID}plans: {{a: {{}}}}\nconsumers:\n" + entry % "group: x" + entry % "any: true" + entry % "group: y"
    assert refusals(text) == ["9:3 consumers[2]: is never reached: the entry on line 8 matches everybody"]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("{}", "{}"),
        ("{}", "{path: /v1/*, model: a, header: {x: 1}}"),
        ("{path: '*'}", "{model: a}"),
        ("{path: /v1/*}", "{path: /v1/*}"),
        ("{path: /v1/*}", "{path: /v1/chat}"),
        ("{path: /v1/*}", "{path: /v1/chat*}"),
        ("{path: /v1/*}", "{path: /v1/*/x, model: a*}"),
        ("{model: a*}", "{model: ab}"),
        ("{header: {X: 1}}", "{path: /a, header: {x: 1}}"),
    ],
)
def test_a_route_that_nothing_is_left_for(earlier, later):
    assert refusals(routes("{path: /other}", earlier, later)) == [
        "6:3 routes[2]: is never reached: the route on line 5 matches everything that this one does"
    ]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("{path: /v1/chat}", "{path: /v1/*}"),
        ("{path: /v1/*}", "{path: /v1}"),
        ("{path: /v1/*}", "{}"),
        ("{path: /v1/*, model: a}", "{path: /v1/*, model: b}"),
        ("{model: a}", "{path: /v1/*}"),
        ("{header: {x: 1}}", "{header: {x: 2}}"),
        ("{header: {x: 1}}", "{}"),
        ("{header: {x: 1, y: 1}}", "{header: {x: 1}}"),
    ],
)
def test_a_route_that_something_is_left_for(earlier, later):
    assert len(parse(routes(earlier, later)).routes) == 2


@pytest.mark.timeout(30)  # looking at each of its beginnings would take a quarter of an hour
@pytest.mark.parametrize("key", ["path", "model"])
def test_a_pattern_of_a_whole_file_is_refused_at_once(key):
    [line] = refusals(routes(f"{{{key}: /{'a*' * 500_000}}}"))
    assert line.endswith("must have 1 to 1000 characters")


def test_a_slip_in_one_section_hides_none_in_another():
    text = f"{VALID}plans: [a]\nconsumers: {{}}\nissuers: x\n"
    assert [line.split(" ")[1] for line in refusals(text)] == ["plans:", "consumers:", "issuers:"]


@pytest.mark.parametrize("broken", ["routes: x", "routes: [x, [], {match: x}, {match: {zzz: 1}}, {match: {header: x}}]", "consumers: [x, {match: x}, {plan: []}]", "issuers: [x, {issuer: []}]"])  # fmt: skip
def test_what_has_not_the_expected_shape_is_passed_over(broken):
    assert not any("never reached" in line or "already given" in line for line in refusals(OPEN + broken))


@pytest.mark.parametrize(
    ("pattern", "taken", "left"),
    [
        ("*", ["", "a/b", "a\nb"], []),
        ("/v1/*", ["/v1/", "/v1/a/b"], ["/v1", "/v2/", "x/v1/"]),
        ("tiny*", ["tiny", "tiny-2"], ["a-tiny", "Tiny"]),
        ("a.b", ["a.b"], ["axb", "a.b\n"]),
        ("a[b]?", ["a[b]?"], ["ab", "abx"]),
        ("*a*b", ["ab", "xaxb"], ["ba", "abx"]),
    ],
)
def test_glob(pattern, taken, left):
    matches = glob(pattern).match
    assert all(matches(text) for text in taken)
    assert not any(matches(text) for text in left)


def test_a_hostile_name_costs_a_glob_no_more_than_a_look():
    assert glob("*a" * 30 + "b").match("a" * 2000) is None
