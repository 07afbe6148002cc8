"""What the documents promise is there: codes, metrics, commands, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gateway import cli, pipeline, relay
from policies import errors

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def refusals(kind=errors.Refusal):
    for each in kind.__subclasses__():
        yield each
        yield from refusals(each)


def section(title):
    return REFERENCE.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("kind", sorted(refusals(), key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_every_refusal_is_in_the_table(kind):
    rows = [line.split("|") for line in section("Refusals").splitlines() if line.startswith("| ")]
    assert any(str(kind.status) in statuses and f"`{kind.code}`" in codes for _, statuses, codes, *_ in rows)


def test_the_metrics_named_are_those_exposed():
    named = set(re.findall(r"`((?:weir|gen_ai)_\w+)", section("Metrics")))
    sources = (ROOT / "observability/metrics.py", ROOT / "gateway/gauges.py", ROOT / "gateway/app.py")
    exposed = set(re.findall(r'"((?:weir|gen_ai)_\w+)"', "".join(path.read_text() for path in sources)))
    assert named == exposed


def test_every_way_in_which_a_request_ends_is_named():
    """All those that the code gives, and no other."""
    sources = "".join(path.read_text() for path in (ROOT / "gateway").rglob("*.py"))
    given = {*pipeline._END_REASONS.values(), *pipeline._END_REASONS_BY_CODE.values(), *relay.FAILURE_REASONS.values()}
    given |= set(re.findall(r'(?:\bend_reason = |Ending\(|_give_up\(|_break\()"(\w+)"', sources))
    named = section("Metrics").split("`reason` is how the request ended")[1].split("\n\n")[0]
    assert set(re.findall(r"`([a-z_]+)`", named)) - {"end_reason"} == given | {"policy", "parse_error"}


def test_every_test_that_security_md_names_is_there():
    named = re.findall(r"`(tests/[^`]+)`", (ROOT / "SECURITY.md").read_text())
    missing = [name for name in named if not list(ROOT.glob(name))]
    assert len(named) > 20
    assert not missing


def test_every_command_is_in_the_table():
    for name in cli.weir.commands:
        assert f"`weir {name}" in section("Commands")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing, f"{document.name} links to what is not there: {missing}"


def test_every_test_that_shows_something_is_there():
    """docs/reliability.md names the test of each row, some with one of its parameters."""
    named = set(re.findall(r"`(test_\w+)(?:\[[^`]*)?`", (ROOT / "docs" / "reliability.md").read_text()))
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert named <= set(re.findall(r"def (test_\w+)", sources))
