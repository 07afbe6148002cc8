"""The workloads that every gateway is put to: unary, latency, stream, many, idle. Each gives the figures of a round."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from benchmarks import wrk
from benchmarks.figures import Figure, Round, micros_each, percentile
from benchmarks.processes import HOST, Failed, Usage
from benchmarks.rig import Rig, Running
from benchmarks.streams import Task
from benchmarks.wrk import Load, Target

CONNECTIONS = 64
STREAMS = 100
MANY_STREAMS = 2000
IDLE_CONNECTIONS = 9900
"""With 20,000 open files Weir takes 9,936 clients: each may need a second file for its backend."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of work. `only` names the gateways that can do it; None: all."""

    id: str
    title: str
    figures: tuple[Figure, ...]
    measure: Callable[[Rig, Running, float], Round]
    warm_up: Callable[[Rig, Running, float], object]
    backends: Literal["json", "events", "endless", "brief"] = "json"
    only: frozenset[str] | None = None


def loaded(
    running: Running, target: Target, connections: int, seconds: float, pause_ms: int | None = None
) -> tuple[Load, float]:
    """What wrk counted, and the CPU seconds that the gateway used meanwhile."""
    before = running.usage()
    folder = running.site.folder
    load = wrk.run(target, connections=connections, seconds=seconds, folder=folder, pause_ms=pause_ms)
    return load, running.usage().cpu_seconds - before.cpu_seconds


def unary(_: Rig, running: Running, seconds: float) -> Round:
    load, cpu = loaded(running, running.target(), CONNECTIONS, seconds)
    return {
        "cpu_us": micros_each(cpu, load.requests),
        "per_second": load.per_second,
        "p50_ms": load.p50_ms,
        "p99_ms": load.p99_ms,
        "failed": load.failed,
    }


def latency(_: Rig, running: Running, seconds: float) -> Round:
    load, _cpu = loaded(running, running.target(), 1, seconds)
    return {"p50_ms": load.p50_ms, "p99_ms": load.p99_ms, "failed": load.failed}


def stream(_: Rig, running: Running, seconds: float) -> Round:
    before = running.usage()
    with _client(running, "loop", STREAMS, seconds) as output:
        seen = _line(output)
    cpu = running.usage().cpu_seconds - before.cpu_seconds
    return {
        "cpu_us": micros_each(cpu, seen["events"]),
        "first_p50_ms": percentile(seen["firsts"], 0.5) * 1e3,
        "gap_p99_ms": percentile(seen["gaps"], 0.99) * 1e3,
        "events": seen["events"],
        "failed": seen["cut"],
    }


def many(_: Rig, running: Running, seconds: float) -> Round:
    with _client(running, "hold", MANY_STREAMS, seconds) as output:
        opened = _line(output)
        start = running.usage()
        held = _line(output)
        end = running.usage()
    return {
        "stream_kib": (end.rss_bytes - running.idle.rss_bytes) / max(1, opened["open"]) / 1024,
        "rss_mib": end.rss_bytes / MIB,
        "cpu_us": micros_each(_cpu(start, end), held["events"]),
        "failed": MANY_STREAMS - opened["open"] + held["cut"],
    }


def idle(_: Rig, running: Running, seconds: float) -> Round:
    with _client(running, "park", IDLE_CONNECTIONS, seconds, stream=False) as output:
        opened = _line(output)
        start = running.usage()
        held = _line(output)
        end = running.usage()
    return {
        "connection_kib": (end.rss_bytes - running.idle.rss_bytes) / max(1, opened["open"]) / 1024,
        "rss_mib": end.rss_bytes / MIB,
        "cpu_percent": 100 * _cpu(start, end) / seconds,
        "failed": IDLE_CONNECTIONS - opened["open"] + held["cut"],
    }


def _cpu(start: Usage, end: Usage) -> float:
    return end.cpu_seconds - start.cpu_seconds


@contextlib.contextmanager
def _client(running: Running, mode: str, streams: int, seconds: float, *, stream: bool = True) -> Iterator[IO[str]]:
    """What the client of streams tells, line by line, while it works."""
    task = Task(running.site.port, request_text(running, stream=stream), streams, seconds)
    client = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.streams", mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    try:
        client.stdin.write(msgspec.json.encode(task).decode() + "\n")
        client.stdin.flush()
        yield client.stdout
    finally:
        client.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            client.wait(10)
        client.kill()
        client.wait()


def request_text(running: Running, *, stream: bool = True) -> str:
    """The request as it goes over the wire."""
    target = running.target(stream=stream)
    headers = {"Host": f"{HOST}:{target.port}", **target.headers, "Content-Length": str(len(target.body))}
    lines = [f"POST {target.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines) + target.body.decode()


def _line(output: IO[str]) -> dict[str, Any]:
    line = output.readline()
    if not line:
        raise Failed("the client of streams ended before its time")
    told: dict[str, Any] = json.loads(line)
    return told


def _no_warm_up(_rig: Rig, _running: Running, _seconds: float) -> None:
    """Its rounds begin with opening streams."""


CPU = Figure("cpu_us", "µs", "CPU per request")
FAILED = Figure("failed", "", "failed", 0)

UNARY = Workload(
    "unary",
    f"{CONNECTIONS} connections, closed loop",
    (
        CPU,
        Figure("per_second", "/s", "requests", 0),
        Figure("p50_ms", "ms", "p50", 2),
        Figure("p99_ms", "ms", "p99", 2),
        FAILED,
    ),
    unary,
    unary,
)
LATENCY = Workload(
    "latency",
    "1 connection",
    (Figure("p50_ms", "ms", "p50", 3, added=True), Figure("p99_ms", "ms", "p99", 3, added=True), FAILED),
    latency,
    latency,
)
STREAM = Workload(
    "stream",
    f"{STREAMS} streams, 100 events/s each",
    (
        Figure("cpu_us", "µs", "CPU per event"),
        Figure("first_p50_ms", "ms", "first event p50", 2, added=True),
        Figure("gap_p99_ms", "ms", "gap p99", 2, added=True),
        Figure("events", "", "events", 0),
        FAILED,
    ),
    stream,
    stream,
    "events",
)
MANY = Workload(
    "many",
    f"{MANY_STREAMS} open streams, 1 event/s each",
    (
        Figure("stream_kib", "KiB", "memory per stream"),
        Figure("rss_mib", "MiB", "RSS held"),
        Figure("cpu_us", "µs", "CPU per event"),
        FAILED,
    ),
    many,
    _no_warm_up,
    "endless",
)
IDLE = Workload(
    "idle",
    f"{IDLE_CONNECTIONS} idle connections, after one request each",
    (
        Figure("connection_kib", "KiB", "memory per connection"),
        Figure("rss_mib", "MiB", "RSS held"),
        Figure("cpu_percent", "%", "CPU held"),
        FAILED,
    ),
    idle,
    _no_warm_up,
    only=frozenset({"weir", "weir_python", "nginx", "envoy_router", "envoy_full"}),
)
