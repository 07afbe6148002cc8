"""Policies: right ones in many ways of writing, and any text that they can become."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from policies import document, policy
from policies.problems import MAX_PROBLEMS, InvalidDocument
from policies.yaml_tree import compose, to_plain
from tests.support.policy_text import BASE

EXAMPLES = [path.read_text() for path in sorted((Path(__file__).parents[2] / "examples" / "policies").glob("*.yaml"))]

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,7}", fullmatch=True) | st.sampled_from(
    ["no", "null", "1e3", "0x1", "1.0", "y"]
)
words = names | st.sampled_from(
    ["größe", "a b", "a: b", "#a", "- a", "*", "&a", "'", '"', "!a", "%", "@", "`", "\\", "\u2028", "?", "~"]
)
durations = st.sampled_from([("250ms", 0.25), ("1s", 1.0), ("1.5m", 90.0), ("2h", 7200.0)])
rates = st.sampled_from(
    [("60/minute", policy.Rate(60, 60)), ("40k/hour", policy.Rate(40_000, 3600)), ("0.5/second", policy.Rate(0.5, 1))]
)
counts = st.sampled_from([("1", 1), ("40k", 40_000), ("2M", 2_000_000)])
shares = st.sampled_from([("5%", 0.05), ("0.5", 0.5), ("100%", 1.0)])


@st.composite
def routes(draw, name: str) -> tuple[dict[str, object], dict[str, object]]:
    """A route as it is written, and what of it must be in force."""
    services = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    weights = draw(st.lists(counts, min_size=len(services), max_size=len(services)))
    times = draw(st.dictionaries(st.sampled_from(["connect", "first_byte", "idle", "total"]), durations))
    attempts, budget = draw(counts), draw(shares)
    headers = draw(st.dictionaries(st.sampled_from(["x-team", "X-Tier", "cookie"]), words, max_size=2))
    written = {
        "name": name,
        "match": {"path": f"/{name}/*", "model": draw(words), "header": headers},
        "to": [{"service": service, "weight": text} for service, (text, _) in zip(services, weights, strict=True)],
        "timeout": {key: text for key, (text, _) in times.items()},
        "retry": {"attempts": attempts[0], "budget": budget[0]},
        "allow": [f"group:{draw(words)}", f"consumer:{draw(words)}"],
    }
    meant = {
        "name": name,
        "to": tuple(
            policy.Target(service, None, weight) for service, (_, weight) in zip(services, weights, strict=True)
        ),
        "timeout": policy.Timeouts(**{key: seconds for key, (_, seconds) in times.items()}),
        "retry": policy.RetryRule(attempts=attempts[1], budget=budget[1]),
        "headers": tuple((key.lower(), value) for key, value in headers.items()),
        "allowed": tuple(entry.partition(":")[2] for entry in written["allow"]),
        "model": written["match"]["model"],
    }
    return written, meant


@st.composite
def policies(draw) -> tuple[dict[str, object], list[dict[str, object]], dict[str, policy.Rate]]:
    plans = draw(st.dictionaries(names, rates, max_size=3))
    pairs = [draw(routes(name)) for name in draw(st.lists(names, min_size=1, max_size=3, unique=True))]
    consumers = [{"match": {"group": draw(words)}, "plan": plan} for plan in plans]
    written = {
        "version": "1",
        "anonymous": "true",
        "plans": {name: {"requests": text} for name, (text, _) in plans.items()},
        "consumers": consumers,
        "routes": [route for route, _ in pairs],
    }
    return written, [meant for _, meant in pairs], {name: rate for name, (_, rate) in plans.items()}


styles = st.fixed_dictionaries(
    {
        "default_flow_style": st.sampled_from([True, False, None]),
        "default_style": st.sampled_from([None, None, "'", '"']),
        "width": st.sampled_from([20, 80, 1000]),
        "indent": st.sampled_from([2, 4, 8]),
        "allow_unicode": st.booleans(),
        "sort_keys": st.booleans(),
        "explicit_start": st.booleans(),
        "line_break": st.sampled_from(["\n", "\r\n", "\r"]),
    }
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(policies(), styles)
def test_a_right_policy_means_what_it_says_however_it_is_written(made, style) -> None:
    written, meant, plans = made
    loaded = document.parse(yaml.safe_dump(written, **style), base=BASE)
    assert {name: plan.requests for name, plan in loaded.plans.items()} == plans
    assert len(loaded.routes) == len(meant)
    for route, expected in zip(loaded.routes, meant, strict=True):
        assert (route.name, route.to, route.timeout, route.retry) == (
            expected["name"], expected["to"], expected["timeout"], expected["retry"],
        )  # fmt: skip
        group, consumer = expected["allowed"]
        assert (route.allow.groups, route.allow.consumers) == ({group}, {consumer})
        assert dict(route.match.headers) == dict(expected["headers"])
        assert route.match.model.match(expected["model"].replace("*", "anything"))
        assert route.match.path.match(f"/{route.name}/x")
        assert not route.match.path.match(f"/{route.name}")


PIECES = [
    "version: 1\n", "anonymous: true\n", "routes:\n", "- ", "  ", "\n", "{", "}", "[", "]", ",", ": ", "#", "&a ", "*a", "!!str ",
    "? ", "|\n", ">-\n", "'", '"', "%YAML 1.2\n", "---\n", "...\n", "\t", "\r", "\u2028", "\x00", "\x1b[31m", "\ud800", "\ufeff", "null",
    "~", "<<: ", "name: a", "to: [{service: x}]", "match: {path: /v1/*}", "60/minute", "5%", "é", "\\x", "=", "@", "`",
]  # fmt: skip


@st.composite
def spoilt(draw) -> str:
    """An example of the project in which a few places were lost, doubled, or took something else."""
    text = draw(st.sampled_from(EXAMPLES))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 2, 10, 80])))
        text = text[:start] + draw(st.sampled_from([*PIECES, text[start:end] * 2, text[end : end + 40]])) + text[end:]
    return text


texts = spoilt() | st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@given(texts)
@example("\ufeff" + EXAMPLES[0])
@example("\r\x00")
@example("routes: [\u2028&a a, *a]\x85\n? b")
def test_any_text_is_a_policy_or_told_where_it_is_none(text) -> None:
    try:
        document.parse(text, base=BASE)
    except InvalidDocument as refused:
        problems = refused.problems
    else:
        return
    lines = re.split(r"\r\n|[\n\r\x85\u2028\u2029]", text + "\n")  # libyaml ends the last line where its writer has not
    assert 1 <= len(problems) <= MAX_PROBLEMS
    assert list(problems) == sorted(problems)
    for problem in problems:
        assert 1 <= problem.line <= len(lines)
        assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1
        assert problem.text("policy.yaml").isprintable()
        assert len(problem.text("policy.yaml")) < 1000


@given(texts)
def test_what_is_read_another_reader_reads_the_same_way(text) -> None:
    """PyYAML in Python, with every scalar left as text. What it refuses (it takes fewer tabs) says nothing."""
    try:
        tree = compose(text)
        other = yaml.load(text.lstrip("\ufeff"), yaml.BaseLoader)  # noqa: S506  it makes text, lists and dicts alone
    except (InvalidDocument, yaml.YAMLError):
        return
    assume(not tree.problems)
    assert to_plain(tree.root) == other


HOSTILE = ["[", "{", "- ", "? ", "a: ", "a:\n ", "'", '"', "|\n", "#", "%", "!", "&a ", "*a ", "- - ", "{a: ", "[a, ", "a: b\n", ",", "]", "\n", "\r", "\u2028", "é", "\\"]  # fmt: skip
SECTIONS = {
    "routes": "- {{name: r{0}, match: {{path: /{0}*, model: m{0}}}, to: [{{service: x}}]}}\n",
    "plans": "  p{0}: {{requests: 60/minut, burts: {0}}}\n",
    "consumers": "- {{match: {{group: g}}, plan: q{0}}}\n",
    "issuers": "- {{issuer: i{0}}}\n",
    "unknown": "- {{a{0}: b}}\n",
}


@pytest.mark.timeout(30)  # all of them take seconds; what is quadratic takes minutes
@pytest.mark.parametrize("piece", [*HOSTILE, *SECTIONS], ids=repr)
def test_a_mebibyte_of_anything_is_judged_soon(piece) -> None:
    if piece in SECTIONS:
        text = f"version: 1\n{piece}:\n" + "".join(SECTIONS[piece].format(number) for number in range(8000))
    else:
        text = piece * ((1 << 20) // len(piece.encode()))
    with pytest.raises(InvalidDocument):
        document.parse(text, base=BASE)
