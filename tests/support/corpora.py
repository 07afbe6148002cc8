"""Other people's test cases. They lie beside the project and not in it: ../shared/corpora/NAME, each with a SOURCE.txt
that tells its origin, commit, licence and form. A test that needs one that is not there skips and says so.
"""

import json
from base64 import b64decode
from pathlib import Path

import pytest

CORPORA = Path(__file__).parents[3] / "shared" / "corpora"


def corpus(name: str, *parts: str) -> Path:
    """Where a corpus is, or a file of it. Skips the test, or the module that asks while it is imported, where it is not."""
    where = CORPORA.joinpath(name, *parts)
    if not where.exists():
        pytest.skip(f"the corpus {name} is not on this machine ({where})", allow_module_level=True)
    return where


def rows(name: str) -> list[dict]:
    """The cases of a corpus that has them in one file, a JSON document in each line. Skips as `corpus` does."""
    return [json.loads(line) for line in corpus(name, "cases.jsonl").read_text().splitlines()]


def naughty_strings() -> list[str]:
    """The Big List of Naughty Strings. Skips as `corpus` does."""
    return json.loads(corpus("blns", "blns.json").read_text())


def event_streams() -> dict[str, list[bytes]]:
    """The pieces of each event stream, in the order in which they are sent, by the case's id. Skips as `corpus` does."""
    return {case["id"]: [b64decode(piece) for piece in case["chunks_b64"]] for case in rows("sse")}


def yaml_documents() -> dict[str, bytes]:
    """The documents of the YAML test suite, by id. Skips as `corpus` does."""
    return {case["id"]: b64decode(case["in_b64"]) for case in rows("yaml-test-suite")}
