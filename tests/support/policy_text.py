"""Policies as text, for tests that need one, and what is said of those that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from policies import document
from policies.policy import Policy, Route
from policies.problems import InvalidDocument

BASE = Path("/etc/weir")
OPEN = "version: 1\nanonymous: true\n"
ROUTE = "routes:\n- {name: all, to: [{service: tiny}]}\n"
VALID = OPEN + ROUTE


def parse(text: str) -> Policy:
    return document.parse(text, base=BASE)


def route(body: str) -> Route:
    """The route that a flow mapping describes; `name` and `to` are given."""
    return parse(f"{OPEN}routes:\n- {{name: all, to: [{{service: tiny}}], {body}}}\n").routes[0]


def refusals(text: str | bytes) -> list[str]:
    """Each problem as `LINE:COLUMN path: message`."""
    with pytest.raises(InvalidDocument) as caught:
        document.parse(text, base=BASE)
    return [line.removeprefix("f:") for line in caught.value.lines("f")]
