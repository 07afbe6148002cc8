"""`weir bench backend`: how fast the reference backend answers, by the number of streams at once.

Each stream asks, reads its answer to the end and asks again, with a prompt that nobody has asked before (but for its
beginning, which is the chat template's). Answers have a fixed number of tokens. What is counted lies in a window
after a warm-up; the time to the first token and the gaps are over the whole run.

The backend has all cores, and the load shares them: with two cores the worker has nearly one to itself, and the
server process and the load share the other.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import report
from benchmarks.figures import Figure, Round, micros_each, percentile, spreads
from benchmarks.processes import HOST, Process, free_ports, wait_healthy
from benchmarks.streams import LATE_SECONDS, Seen, Stream, Task

STREAMS = (1, 8, 32)
TOKENS = 128
WARM_UP_SECONDS = 1.0
READY_SECONDS = 120.0
TEXT = re.compile(rb'"(?:content|text)": ?"[^"]')
FIGURES = (
    Figure("tokens_per_second", "tok/s", "tokens", 0),
    Figure("first_p50_ms", "ms", "first token p50"),
    Figure("first_p99_ms", "ms", "p99"),
    Figure("gap_p99_ms", "ms", "gap p99"),
    Figure("cpu_us", "µs", "CPU per token", 0),
    Figure("cut", "", "cut", 0),
)


def requests(model: str) -> Iterator[bytes]:
    """Prompts that are all different, as requests."""
    for number in itertools.count():
        question = f"Question {number}: what is a circuit breaker, and when does it let requests through again?"
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "stream": True,
            "temperature": 0,
            "ignore_eos": True,
            "max_tokens": TOKENS,
        }
        yield posted("/v1/chat/completions", json.dumps(asked).encode())


def posted(path: str, body: bytes) -> bytes:
    """A request as it is sent."""
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Asker(Stream):
    """A connection that asks something new each time, and has its first token with the first text.

    Some servers name a role at once, before they have computed anything.
    """

    def __init__(self, task: Task, seen: Seen, ended, asks: Iterator[bytes]):
        super().__init__(task, seen, ended)
        self._asks = asks

    def send(self) -> None:
        self._request = next(self._asks)
        super().send()

    def begins(self, events: bytes) -> bool:
        return TEXT.search(events) is not None


@dataclass(slots=True)
class Window:
    """What came between two moments."""

    events: int
    cpu_seconds: float
    seconds: float


async def load(
    server: Process, port: int, streams: int, seconds: float, asks: Iterator[bytes], kind: type[Asker] = Asker
) -> tuple[Seen, Window]:
    """Keep so many streams going, and look twice at how far they are."""
    loop = asyncio.get_running_loop()
    seen, idle, is_over, left = Seen(), asyncio.Event(), False, streams

    def ended(stream: Stream) -> None:
        nonlocal left
        if not is_over and not stream.transport.is_closing():
            stream.send()
            return
        stream.transport.close()
        left -= 1
        if not left:
            idle.set()

    task = Task(port, "", streams, seconds)
    for _ in range(streams):
        await loop.create_connection(lambda: kind(task, seen, ended, asks), HOST, port)
    await asyncio.sleep(WARM_UP_SECONDS)
    before, events, usage = loop.time(), seen.events, server.usage()
    await asyncio.sleep(seconds)
    cpu = server.usage().cpu_seconds - usage.cpu_seconds
    window = Window(seen.events - events, cpu, loop.time() - before)
    is_over = True
    async with asyncio.timeout(LATE_SECONDS + 60):
        await idle.wait()
    return seen, window


def round_of(seen: Seen, window: Window, each: int = TOKENS) -> Round:
    """The figures of a round. A whole answer has as many events whatever it says, so events are told as tokens."""
    tokens_per_event = each * seen.whole / seen.events if seen.events else 0.0
    tokens = window.events * tokens_per_event
    return {
        "tokens_per_second": tokens / window.seconds,
        "first_p50_ms": 1000 * percentile(seen.firsts, 0.5),
        "first_p99_ms": 1000 * percentile(seen.firsts, 0.99),
        "gap_p99_ms": 1000 * percentile(seen.gaps, 0.99),
        "cpu_us": micros_each(window.cpu_seconds, tokens),
        "cut": float(seen.cut),
    }


def measure(
    model: str, folder: Path, streams: tuple[int, ...], rounds: int, seconds: float
) -> Iterator[tuple[int, Round]]:
    """Each round as soon as it is over: how many streams, and its figures. Raises Failed."""
    with serving(model, folder, max(streams)) as (server, port):
        asks = requests(Path(model).resolve().name if Path(model).is_dir() else model)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            for _ in range(rounds):
                for count in streams:
                    yield count, round_of(*runner.run(load(server, port, count, seconds, asks)))


@contextmanager
def serving(
    model: str, folder: Path, running: int, *, ready_seconds: float = READY_SECONDS
) -> Iterator[tuple[Process, int]]:
    """The backend, ready, and its port. Raises Failed."""
    [port] = free_ports(1)
    options = ["--model", model, "--port", str(port), "--max-running", str(running), "--max-waiting", "8"]
    root = Path(__file__).parent.parent
    server = Process(
        "the backend",
        [sys.executable, "-m", "reference_backend", *options],
        cores=os.sched_getaffinity(0),
        log=folder / "backend.log",
        env={"PYTHONPATH": str(root)},
    )
    try:
        wait_healthy(f"http://{HOST}:{port}/health", ready_seconds)
        yield server, port
    finally:
        server.end()


def document(model: str, rounds: Mapping[int, Sequence[Round]]) -> dict[str, Any]:
    """The JSON form: each figure by number of streams, with median, low, high and all values."""
    found = {
        str(count): {name: asdict(spread) for name, spread in spreads(rows).items()} for count, rows in rounds.items()
    }
    return {"machine": report.machine(), "model": model, "tokens_per_answer": TOKENS, "streams": found}


def page(rounds: Mapping[int, Sequence[Round]]) -> str:
    """A table in Markdown, a row for each number of streams."""
    titles = ["streams", *(figure.heading for figure in FIGURES)]
    rows = [titles, ["---:"] * len(titles)]
    for count, measured in rounds.items():
        found = spreads(measured)
        rows.append([str(count), *(report.cell(found[figure.name], figure.digits) for figure in FIGURES)])
    return "\n".join(map(report.page_row, rows))
