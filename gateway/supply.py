"""What the gateway is made of, looked at before it starts: no part older than was asked for, none that is a stand-in.

pip keeps versions right when it installs; somebody's later `pip install` does not. And aiohttp and redis-py fall back
on Python without a word where their compiled half is missing: slower, and in aiohttp's case laxer about what it parses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import requires, version
from importlib.util import find_spec

from aiohttp import http_parser

from gateway.children import CannotRun

_FLOOR = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?>=([0-9.]+)$")


def check_supply() -> None:
    """Raise CannotRun, with all that is wrong in one line."""
    faults = [*outdated(requires("weir") or (), version), *stand_ins()]
    if faults:
        raise CannotRun("; ".join(faults))


def outdated(requirements: Iterable[str], installed: Callable[[str], str]) -> Iterator[str]:
    """What is older than a requirement of the form `name>=version` wants it. Other forms are pip's to check."""
    for requirement in requirements:
        floor = _FLOOR.match(requirement)
        if floor and _numbers(installed(floor[1])) < _numbers(floor[2]):
            yield f"{floor[1]} {installed(floor[1])} is older than {floor[2]}, the oldest that is safe: `make setup`"


def stand_ins() -> Iterator[str]:
    """Which libraries run without their compiled half."""
    if http_parser.HttpRequestParser.__module__ != "aiohttp._http_parser":
        yield "aiohttp runs without its C parser: unset AIOHTTP_NO_EXTENSIONS, or install the wheel of aiohttp"
    if find_spec("hiredis") is None:
        yield "hiredis is not installed, without which redis-py parses in Python: run `make setup`"


def _numbers(text: str) -> tuple[int, ...]:
    """Compare `3.14.5` by these; what follows (`rc1`, `+local`) does not count."""
    found = re.match(r"[0-9]+(?:\.[0-9]+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()
