"""Closed-loop load by wrk (https://github.com/wg/wrk): a connection sends its next request when it has its answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from benchmarks.processes import HOST, Failed
from gateway.children import die_with

SCRIPT = Template("""\
wrk.method = "POST"
wrk.body = [==[$body]==]
$headers
$turns
$pause
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\nJSON {"requests": %d, "micros": %d, "refused": %d, "broken": %d, "p50": %f, "p99": %f}\\n',
    summary.requests, summary.duration, e.status, e.connect + e.read + e.write + e.timeout,
    latency:percentile(50), latency:percentile(99)))
end
""")
TURNS = Template("""\
local requests, turn = {}, 0
init = function() for _, body in ipairs({$bodies}) do table.insert(requests, wrk.format(nil, nil, nil, body)) end end
request = function() turn = turn % #requests + 1; return requests[turn] end""")
GRACE_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and what they carry. `headers` may name any consumer's token, `others` are sent in turn."""

    port: int
    path: str
    headers: Mapping[str, str]
    body: bytes
    others: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk counted. `refused` have a status from 400 on; `broken` were never answered."""

    requests: int
    seconds: float
    refused: int
    broken: int
    p50_ms: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def failed(self) -> int:
        return self.refused + self.broken


class Wrk:
    """A wrk that runs; `result` waits for it. `pause_ms` is waited by each connection before each request."""

    def __init__(
        self, target: Target, *, connections: int, seconds: float, folder: Path, pause_ms: int | None = None
    ) -> None:
        wrk = shutil.which("wrk")
        if wrk is None:
            raise Failed("wrk is not there, and it makes the load; apt-get install wrk")
        headers = "\n".join(f"wrk.headers[{lua(name)}] = {lua(value)}" for name, value in target.headers.items())
        script = folder / "request.lua"
        pause = "" if pause_ms is None else f"delay = function() return {pause_ms} end"
        bodies = ", ".join(f"[==[{body.decode()}]==]" for body in (target.body, *target.others))
        turns = TURNS.substitute(bodies=bodies) if target.others else ""  # else wrk's own: made once
        script.write_text(SCRIPT.substitute(body=target.body.decode(), headers=headers, turns=turns, pause=pause))
        # wrk takes whole seconds only.
        command = [
            wrk,
            "-t1",
            f"-c{connections}",
            f"-d{max(1, round(seconds))}s",
            "--timeout",
            "10s",
            "-s",
            str(script),
        ]
        self._deadline = seconds + GRACE_SECONDS
        self._popen = subprocess.Popen(
            [*command, f"http://{HOST}:{target.port}{target.path}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"PATH": os.environ["PATH"]},
            preexec_fn=die_with(os.getpid()),  # noqa: PLW1509  no thread of ours runs while programs are started
        )

    def is_running(self) -> bool:
        return self._popen.poll() is None

    def result(self) -> Load:
        try:
            output, _ = self._popen.communicate(timeout=self._deadline)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            raise Failed("wrk did not end") from None
        return parse(output)


def run(target: Target, *, connections: int, seconds: float, folder: Path, pause_ms: int | None = None) -> Load:
    return Wrk(target, connections=connections, seconds=seconds, folder=folder, pause_ms=pause_ms).result()


def parse(output: str) -> Load:
    """The line that our script writes. Raises Failed with wrk's own last line when there is none."""
    for line in output.splitlines():
        if line.startswith("JSON "):
            told = json.loads(line[5:])
            return Load(
                requests=told["requests"],
                seconds=told["micros"] / 1e6,
                refused=told["refused"],
                broken=told["broken"],
                p50_ms=told["p50"] / 1e3,
                p99_ms=told["p99"] / 1e3,
            )
    raise Failed(f"wrk: {(output.strip().splitlines() or ['no output'])[-1]}")


def lua(text: str) -> str:
    """A Lua string in quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
