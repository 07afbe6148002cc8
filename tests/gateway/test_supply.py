import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from gateway import supply
from gateway.children import CannotRun
from gateway.supply import check_supply, outdated


@pytest.mark.parametrize(
    ("requirement", "installed", "is_outdated"),
    [
        ("aiohttp>=3.14.5", "3.14.4", True),
        ("aiohttp>=3.14.5", "3.9.12", True),
        ("aiohttp>=3.14.5", "3.14", True),
        ("aiohttp>=3.14.5", "3.14.5", False),
        ("aiohttp>=3.14.5", "3.14.5+local", False),
        ("aiohttp>=3.14.5", "4.0.0a1", False),
        ("pydantic>=2", "1.10.18", True),
        ("pydantic>=2", "2.0", False),
        ("redis[hiredis]>=5", "4.6", True),
        ("uvloop", "0.1", False),
        ('numpy>=99; extra == "backend"', "1.0", False),
        ("odd>=1", "unknown", True),
    ],
)
def test_what_is_too_old(requirement, installed, is_outdated) -> None:
    assert bool(list(outdated([requirement], lambda _: installed))) is is_outdated


def test_what_is_installed_here_will_do() -> None:
    check_supply()


def test_all_that_is_wrong_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(supply, "version", lambda name: "1.2.3" if name == "aiohttp" else version(name))
    monkeypatch.setattr(supply, "find_spec", lambda _: None)
    with pytest.raises(CannotRun) as caught:
        check_supply()
    aiohttp, hiredis = str(caught.value).split("; ")
    assert aiohttp.startswith("aiohttp 1.2.3 is older than ")
    assert hiredis.startswith("hiredis is not installed")


def test_a_parser_in_python_is_no_parser() -> None:
    told = subprocess.run(
        [sys.executable, "-c", "from gateway.supply import stand_ins; print(*stand_ins())"],
        env={**os.environ, "AIOHTTP_NO_EXTENSIONS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told.startswith("aiohttp runs without its C parser: unset AIOHTTP_NO_EXTENSIONS")
