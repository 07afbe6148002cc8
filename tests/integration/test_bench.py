"""The whole rig once, briefly: whether it measures, not what it measures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the benchmark needs two CPU cores"),
    pytest.mark.skipif(not shutil.which("wrk"), reason="no wrk: apt-get install wrk"),
    pytest.mark.skipif(
        not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"),
        reason="no nginx: apt-get install nginx-light",
    ),
]


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.timeout(300)
def test_some_workloads_give_a_table_and_a_document(tmp_path):
    place = tmp_path / "result.json"
    words = [
        "--only",
        "unary,stream,overload",
        "--peers",
        "direct,weir_python",
        "--rounds",
        "1",
        "--seconds",
        "1",
        "--json",
        str(place),
    ]
    ran = bench(*words)
    assert ran.returncode == 0, ran.stderr
    assert "unary: 64 connections, closed loop" in ran.stdout
    told = json.loads(place.read_text())
    for workload in ("unary", "stream", "overload"):
        assert told["workloads"][workload]["missing"] == {}
    assert told["workloads"]["overload"]["gateways"]["weir_python"]["failed"]["median"] == 0
    for workload in ("unary", "stream"):
        found = told["workloads"][workload]
        assert found["gateways"]["weir_python"]["cpu_us"]["median"] > 0
        assert found["gateways"]["weir_python"]["failed"]["median"] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--peers", "apache"], 2, "there is no apache; there are direct, nginx"),
        (["--only", "unary,fast"], 2, "there is no fast; there are unary, latency"),
        (["--rounds", "0"], 2, "--rounds"),
        (["markdown", "nowhere.json"], 2, "nowhere.json"),
    ],
)
def test_wrong_use_is_one_line(arguments, code, words):
    ran = bench(*arguments)
    assert ran.returncode == code
    assert ran.stderr.startswith("weir: ")
    assert words in ran.stderr
    assert ran.stderr.count("\n") == 1
