"""Runs that are ended from outside, as processes: nothing that they started is left."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc"),
]

# Has a worker, as many servers do, and notes in its folder that it was asked to end.
SERVER = """
import http.server, os, pathlib, signal, sys, time
port, folder, is_stubborn = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "stubborn"
def asked(*_):
    (folder.parent / "asked-to-end").touch()
    if not is_stubborn:
        os._exit(0)
if not os.fork():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
signal.signal(signal.SIGTERM, asked)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# The command itself, with a workload that measures until it is ended.
BENCH = """
import asyncio, signal, sys, time
import uvloop
from benchmarks import model_peers
from benchmarks.beside import Server, Workload
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has had ignored, where these tests run behind it
server, manner, waiting = sys.argv.pop(), sys.argv.pop(), sys.argv.pop()
def measure(asked, point, seconds):
    print("measuring", flush=True)
    if waiting == "loop":
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(asyncio.sleep(600))
    time.sleep(600)
manners = {"weir": "polite", "other": manner}
servers = tuple(
    Server(name, f"{{python}} -c {{server}} {{port}} {{folder}} {manner}", "/", model="m") for name, manner in manners.items()
)
model_peers.WORKLOADS["made-up"] = Workload(
    "made-up", "", (1,), servers, lambda folder: {}, lambda number: {}, measure, (),
    places={"server": server},
)
from benchmarks.__main__ import main
main()
"""


@contextlib.contextmanager
def running(tmp_path, *argv):
    """A bench, its files below `tmp_path`, so that the command line of each of its programs names it."""
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    bench = subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    try:
        yield bench
    finally:
        bench.kill()
        bench.wait()
        bench.stdout.close()
        for pid in programs(tmp_path):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "waiting"), [(signal.SIGTERM, "loop"), (signal.SIGHUP, "sleep")], ids=["SIGTERM", "SIGHUP"]
)
def test_servers_end_with_a_run_that_is_ended_those_that_stand_still_too(tmp_path, number, waiting):
    with running(tmp_path, "-c", BENCH, "backend", "--beside", "made-up", waiting, "polite", SERVER) as bench:
        wait_line(bench, "measuring")
        states = sorted(state for _, state in programs(tmp_path).values())
        assert len(states) == 4
        assert states.count("T") == 2
        bench.send_signal(number)
        assert bench.wait(60) == 130
        assert programs(tmp_path) == {}


def test_a_second_signal_ends_what_has_not_ended_at_the_first(tmp_path):
    with running(tmp_path, "-c", BENCH, "backend", "--beside", "made-up", "sleep", "stubborn", SERVER) as bench:
        wait_line(bench, "measuring")
        bench.send_signal(signal.SIGTERM)
        wait_until((tmp_path / "asked-to-end").exists)
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(60) == 130
        assert programs(tmp_path) == {}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the benchmark needs two CPU cores")
@pytest.mark.skipif(not shutil.which("wrk"), reason="no wrk: apt-get install wrk")
@pytest.mark.skipif(
    not shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), reason="no nginx: apt-get install nginx-light"
)
def test_what_runs_around_a_gateway_ends_with_a_run_that_is_ended_and_its_load_too(tmp_path):
    words = ["--only", "unary", "--peers", "direct", "--seconds", "600", "--json", str(tmp_path / "result.json")]
    with running(tmp_path, "-m", "benchmarks", *words) as bench:
        wait_until(lambda: any(b"-d600s" in command for command, _ in programs(tmp_path).values()))
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(60) == 130
        wait_until(lambda: not programs(tmp_path))  # wrk is ended by the kernel, which gives no account of when


def wait_line(bench, wanted):
    for line in bench.stdout:
        if wanted in line:
            return
    raise AssertionError(f"it ended with {bench.wait()}")


def programs(tmp_path) -> dict[int, tuple[bytes, str]]:
    """Command line and state of each process that has this folder in its command line."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command, stat = Path("/proc", pid, "cmdline").read_bytes(), Path("/proc", pid, "stat").read_text()
            if str(tmp_path).encode() in command:
                found[int(pid)] = command, stat.rpartition(")")[2].split()[0]
    return found


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
