"""What a round's counts come to, how they are told, and the whole of it once."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks.model_server import FIGURES, TOKENS, Asker, Window, document, page, requests, round_of
from benchmarks.streams import Seen, Task

ROOT = Path(__file__).parent.parent.parent


def test_a_round_counts_tokens_by_events():
    """Answers of 128 tokens that come in 130 events; 1300 of those in 2 s are 640 tokens/s."""
    seen = Seen(events=2600, whole=20, firsts=[0.01, 0.02, 0.03], gaps=[0.001, 0.002])
    assert round_of(seen, Window(events=1300, cpu_seconds=1.28, seconds=2.0)) == {
        "tokens_per_second": pytest.approx(640),
        "first_p50_ms": pytest.approx(20),
        "first_p99_ms": pytest.approx(30),
        "gap_p99_ms": pytest.approx(2),
        "cpu_us": pytest.approx(1000),
        "cut": 0.0,
    }


@pytest.mark.parametrize(
    ("events", "has_begun"),
    [
        (b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n', False),
        (b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n', False),
        (
            b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\ndata: {"choices":[{"delta":{"content":"A"}}]}\n\n',
            True,
        ),
        (b'data: {"choices": [{"delta": {"content": "\\n"}}]}\n\n', True),
        (b'data: {"choices":[{"text":"A"}]}\n\n', True),
    ],
)
def test_the_first_token_is_the_first_text(events, has_begun):
    seen = Seen()
    stream = Asker(Task(0, "", 1, 1.0), seen, lambda _: None, iter([b"ask"]))
    stream.connection_made(Mock())
    stream.data_received(events)
    assert (len(seen.firsts), seen.events > 0) == (has_begun, True)


def test_a_round_without_answers_is_zero():
    assert set(round_of(Seen(cut=3), Window(0, 1.0, 2.0)).values()) == {0.0, 3.0}


def test_prompts_are_all_different():
    asks = requests("tiny")
    first, second = next(asks), next(asks)
    head, _, body = first.partition(b"\r\n\r\n")
    assert int(re.search(rb"Content-Length: (\d+)", head)[1]) == len(body)
    assert json.loads(body)["max_tokens"] == TOKENS
    assert first != second


def test_figures_are_told_by_number_of_streams():
    rounds = {1: [dict.fromkeys((figure.name for figure in FIGURES), value) for value in (1.0, 3.0)]}
    told = document("tiny", rounds)
    assert told["streams"]["1"]["tokens_per_second"]["median"] == 2.0
    header, _, row = page(rounds).splitlines()
    assert header.startswith("| streams | tokens tok/s | first token p50 ms |")
    assert row.startswith("| 1 | 2 (1-3) | 2.0 (1.0-3.0) |")


def bench(*arguments):
    command = [sys.executable, "-m", "benchmarks", "backend", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.integration
def test_the_backend_is_measured(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")
    place = tmp_path / "result.json"
    ran = bench("--streams", "1,3", "--rounds", "1", "--seconds", "1", "--json", str(place))
    assert ran.returncode == 0, ran.stderr
    assert "| 3 | " in ran.stdout
    for found in json.loads(place.read_text())["streams"].values():
        assert found["tokens_per_second"]["median"] > 0
        assert found["cut"]["median"] == 0


@pytest.mark.parametrize("streams", ["0", "1,x", ""])
def test_wrong_use_is_one_line(streams):
    ran = bench("--streams", streams)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
