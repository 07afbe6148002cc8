"""`weir bench backend --beside ...`: the reference backend beside other model servers, each with what it does best.

All serve the same weights on the same cores; those of one workload run at the same time, and one is asked while the
others stand still, in turn A B C A B C, so that a noisy minute meets all of them alike. What cannot be started or asked
is named as absent, with the reason, and never as beaten.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop

from benchmarks import report, wrk
from benchmarks.figures import Figure, Round, micros_each, percentile, spreads, told
from benchmarks.model_server import Asker, load, posted, round_of
from benchmarks.processes import HOST, Failed, Process, free_ports

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / "peers"
SCRIPTS = ROOT / "benchmarks" / "peer_servers"
READY_SECONDS = 300.0  # vLLM takes two minutes where other work is going on
WARM_REQUESTS = 3
OURS = "weir"

Say = Callable[[str], None]


class Server(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one is started, and what it is asked at: see model_peers.toml."""

    name: str
    command: str
    path: str
    venv: str = ""
    env: str = ""
    model: str = "model"
    extra: dict[str, object] = {}
    field: str = ""

    @property
    def python(self) -> Path:
        return PEERS / self.venv / "bin" / "python" if self.venv else Path(sys.executable)

    @property
    def places(self) -> Mapping[str, object]:
        return {"python": self.python, "bin": self.python.parent, "scripts": SCRIPTS, "host": HOST}


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of each server, at which points (streams or clients at once), and how that is measured."""

    id: str
    title: str
    points: tuple[int, ...]
    servers: tuple[Server, ...]
    files: Callable[[Path], Mapping[str, Path]]
    body: Callable[[int], dict[str, Any]]
    measure: Callable[[Asked, int, float], Round]
    figures: tuple[Figure, ...]
    tokens: int = 0  # of an answer; 0: it is one JSON document
    places: Mapping[str, object] = field(default_factory=dict)  # more of them for the strings of its servers


@dataclass(frozen=True, slots=True)
class Asked:
    """A server that runs, and what it is asked."""

    workload: Workload
    server: Server
    process: Process
    port: int
    places: Mapping[str, object]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}{self.server.path}"

    def body(self, number: int) -> bytes:
        """The body of a request, in this server's form."""
        server, workload, body = self.server, self.workload, self.workload.body(number)
        if server.model:
            [body["model"]] = filled(server.model, self.places)
        if workload.tokens:
            body |= {"max_tokens": workload.tokens, **server.extra}
        if server.field:
            body = {server.field: [body["inputs"][0]["data"]]}
        return json.dumps(body).encode()


def filled(text: str, places: Mapping[str, object]) -> list[str]:
    """The words of a server's string."""
    return [word.format_map(places) for word in text.split()]


def start(workload: Workload, server: Server, folder: Path, files: Mapping[str, Path]) -> Asked:
    """Raises Failed when it is not installed."""
    if not server.python.exists():
        raise Failed(f"not installed: sh benchmarks/install_peers.sh {server.venv}")
    [port] = free_ports(1)
    places = {"port": port, "folder": folder, **server.places, **workload.places, **files}
    process = Process(
        server.name,
        filled(server.command, places),
        cores=os.sched_getaffinity(0),
        log=folder / f"{server.name}.log",
        env={
            "PYTHONPATH": "" if server.venv else str(ROOT),
            "PYTHONWARNINGS": "ignore",
            **dict(word.split("=", 1) for word in filled(server.env, places)),
        },
    )
    return Asked(workload, server, process, port, places)


@dataclass(slots=True)
class Found:
    """What a workload gave: rounds by server and point, and why others have none."""

    workload: Workload
    rounds: dict[tuple[str, int], list[Round]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


class EveryEnd(Asker):
    """For servers that end a stream without `[DONE]`: the last chunk is the end."""

    def send(self) -> None:
        super().send()
        self._is_done = True


def run(workload: Workload, folder: Path, rounds: int, seconds: float, say: Say) -> Found:
    """All rounds of a workload."""
    found = Found(workload)
    try:
        files = workload.files(folder)
    except Failed as failure:
        found.absent = dict.fromkeys((server.name for server in workload.servers), str(failure))
        return found
    with contextlib.ExitStack() as stack:
        running = []
        for server in workload.servers:
            with _dropping_out(server, found, say):
                running.append(start(workload, server, folder, files))
                stack.callback(running[-1].process.end)
        for asked in running:
            with _dropping_out(asked.server, found, say):
                _warm(asked)
                say(f"{workload.id}: {asked.server.name} is ready")
        for _ in range(rounds):
            for point, asked in itertools.product(workload.points, running):
                if asked.server.name not in found.absent:
                    with _dropping_out(asked.server, found, say), contextlib.ExitStack() as others:
                        for other in running:
                            if other is not asked:
                                others.enter_context(other.process.paused())
                        _warm(asked)  # who stood still until now has timers that are overdue
                        measured = workload.measure(asked, point, seconds)
                        found.rounds.setdefault((asked.server.name, point), []).append(measured)
                        say(f"{workload.id} {asked.server.name} at {point}: {told(workload.figures, measured)}")
    return found


@contextlib.contextmanager
def _dropping_out(server: Server, found: Found, say: Say) -> Iterator[None]:
    try:
        yield
    except (Failed, TimeoutError, OSError) as failure:
        found.absent[server.name] = str(failure) or type(failure).__name__
        say(f"{server.name}: {found.absent[server.name]}")


def _warm(asked: Asked) -> None:
    """Ask until it answers, and a few times more. Raises Failed when it never does."""
    deadline, reason, answers = time.monotonic() + READY_SECONDS, "no answer", 0
    while answers < WARM_REQUESTS:
        if asked.process.has_ended() or time.monotonic() > deadline:
            raise Failed(f"it does not serve: {reason}{asked.process.last_words()}")
        try:
            request = urllib.request.Request(asked.url, asked.body(-1 - answers), _JSON)
            with urllib.request.urlopen(request, timeout=60) as response:
                response.read()
            answers += 1
        except OSError as error:  # HTTPError, too
            reason = f"{error}"[:100]
            time.sleep(0.2)


def whole(asked: Asked, clients: int, seconds: float) -> Round:
    """Answers that are one document, by wrk."""
    before = asked.process.usage().cpu_seconds
    body, *others = (asked.body(number) for number in range(16))
    target = wrk.Target(asked.port, asked.server.path, _JSON, body, tuple(others))
    did = wrk.run(target, connections=clients, seconds=seconds, folder=asked.process.log.parent)
    if did.failed > did.requests / 100 or not did.requests:
        raise Failed(f"{did.failed} of {did.requests} requests failed")
    cpu = asked.process.usage().cpu_seconds - before
    measured = {"per_second": did.per_second, "p50_ms": did.p50_ms, "p99_ms": did.p99_ms}
    # No CPU: it works in sessions that are not ours, where nobody counts.
    return measured | ({"cpu_us": micros_each(cpu, did.requests)} if cpu else {})


def streamed(asked: Asked, streams: int, seconds: float) -> Round:
    """Answers that are streams of tokens, each to a question that nobody has asked before."""
    asks = (posted(asked.server.path, asked.body(number)) for number in _numbers)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seen, window = runner.run(load(asked.process, asked.port, streams, seconds, asks, EveryEnd))
    if not seen.whole:
        raise Failed("no answer was whole")
    return round_of(seen, window, asked.workload.tokens)


def light(asked: Asked, flood: int, seconds: float) -> Round:
    """One consumer that asks for 16 tokens at a time, beside another that has so many requests there all the time.

    What the other gets is counted, too: beside that, and before it, by itself.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_light(asked, flood, seconds))


async def _light(asked: Asked, flood: int, seconds: float) -> Round:
    loop, times, answered = asyncio.get_running_loop(), list[float](), 0

    async def ask(session: aiohttp.ClientSession, consumer: str, tokens: int) -> None:
        body = json.loads(asked.body(next(_numbers))) | {"stream": False, "max_tokens": tokens}
        async with session.post(asked.url, json=body, headers={"x-weir-consumer": consumer}) as response:
            await response.read()
            if response.status != 200:
                raise Failed(f"{consumer} was answered {response.status}")

    async def keep_asking(session: aiohttp.ClientSession) -> None:
        nonlocal answered
        while True:
            await ask(session, "flood", asked.workload.tokens)
            answered += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        flooding = [asyncio.ensure_future(keep_asking(session)) for _ in range(flood)]
        if flood:
            await asyncio.sleep(seconds / 2)
        alone, answered, began = answered / (seconds / 2), 0, loop.time()
        while (asked_at := loop.time()) < began + seconds:
            await ask(session, "light", 16)
            times.append(loop.time() - asked_at)
        beside = answered / (loop.time() - began)
        for each in flooding:
            each.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
    told = {"p50_ms": 1000 * percentile(times, 0.5), "p95_ms": 1000 * percentile(times, 0.95)}
    tokens = asked.workload.tokens
    return told | ({"flood": tokens * beside, "flood_alone": tokens * alone} if flood else {})


_JSON = {"content-type": "application/json"}
_numbers = itertools.count()


def document(found: Sequence[Found]) -> dict[str, Any]:
    """The JSON form."""
    return {
        "machine": report.machine(),
        "workloads": {
            one.workload.id: {
                "title": one.workload.title,
                "absent": one.absent,
                "rounds": [
                    {"server": name, "at": point, **{key: asdict(value) for key, value in spreads(rows).items()}}
                    for (name, point), rows in one.rounds.items()
                ],
            }
            for one in found
        },
    }


def page(found: Sequence[Found]) -> str:
    """Tables in Markdown: median (lowest-highest), and ours as a multiple of each, by the first figure."""
    parts = []
    for one in found:
        columns = one.workload.figures
        titles = ["at once", "", *(each.heading for each in columns), "ours / theirs"]
        rows = [titles, ["---:", "---", *["---:"] * (len(columns) + 1)]]
        for (name, point), measured in sorted(one.rounds.items(), key=lambda item: item[0][1]):
            medians = spreads(measured)
            ours = one.rounds.get((OURS, point))
            ratio = ""
            if ours and name != OURS:
                ratio = f"{spreads(ours)[columns[0].name].median / medians[columns[0].name].median:.2f}"
            cells = [report.cell(medians[each.name], each.digits) if each.name in medians else "" for each in columns]
            rows.append([str(point), name, *cells, ratio])
        parts.append(f"**{one.workload.id}**: {one.workload.title}\n")
        parts.append("\n".join(map(report.page_row, rows)))
        parts += [f"\nAbsent: {name} ({reason})." for name, reason in one.absent.items()]
    return "\n".join(parts)
