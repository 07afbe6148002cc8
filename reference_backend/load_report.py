"""What a backend tells of its load: one report, told in three ways.

- In an answer, to whoever asks for it: the `endpoint-load-metrics` header (ORCA, envoyproxy/envoy#6614), and beside
  `usage` in the last chunk of a stream. Over gRPC in the trailers of each call, as ORCA's message.
- Pushed, to whoever listens at `/load/stream`: server-sent events, one for each change, APART_SECONDS apart at least;
  while there is work SIGN_SECONDS apart at most, else HEARTBEAT_SECONDS. A busy one that is silent longer is not well.
- Scraped, at `/metrics`, under vLLM's names (what knows vLLM, such as the inference extension of the Kubernetes Gateway
  API, then knows this) and with the whole report under ours.

`seq` grows with each change of the load, so that who hears of it in several ways knows which news is the newest.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Protocol

import msgspec
from aiohttp import web

from reference_backend.engine.request import Load
from reference_backend.refusals import ApiError

PATH = "/load/stream"
APART_SECONDS = 0.02
SIGN_SECONDS = 0.1
HEARTBEAT_SECONDS = 1.0
MOST_LISTENERS = 64
RECENT = 64  # answers of which the medians are


class LoadReport(msgspec.Struct, frozen=True):
    """The state of one model in one backend. `t` is Unix seconds, `_ms` are averages of late, rates are tokens/s."""

    seq: int
    t: float
    waiting: int
    waiting_tokens: int  # of their prompts
    running: int
    max_running: int
    free_slots: int  # requests that would not be refused
    kv_used: int  # blocks that somebody holds
    kv_blocks: int
    block_size: int  # tokens
    cached_blocks: int  # that may be found again, held or not
    prefill_backlog_tokens: int  # of running requests' prompts, not read yet
    step_ms_ewma: float  # a step in which nothing is read
    prefill_tok_s: float
    decode_tok_s: float  # of all who generate together
    queue_ms_ewma: float
    ttft_ms_p50: float
    tpot_ms_p50: float
    hit_rate: float  # of prompts' tokens since the start: found in the cache
    preemptions: int
    rejects: int
    draining: bool

    @property
    def is_busy(self) -> bool:
        return bool(self.running or self.waiting)


SHARED = [name for name in Load.__struct_fields__ if name in LoadReport.__struct_fields__]


class Source(Protocol):
    """What has a load: the server's end of a worker."""

    bound: int  # requests at a time
    changes: int
    rejects: int

    def load(self) -> Load: ...

    async def wait_change(self, seen: int) -> None: ...


class Reporter:
    """Makes reports of what the worker says and the server sees."""

    def __init__(self, source: Source, wall: Callable[[], float]) -> None:
        self.draining = False
        self.source = source
        self._wall = wall
        self._firsts: deque[float] = deque(maxlen=RECENT)
        self._gaps: deque[float] = deque(maxlen=RECENT)
        self.listeners = 0

    def answered(self, first_seconds: float, seconds: float, tokens: int) -> None:
        """An answer has ended: when its first token came, how long the others took, how many they were in all."""
        self._firsts.append(first_seconds)
        if tokens > 1:
            self._gaps.append((seconds - first_seconds) / (tokens - 1))

    def report(self) -> LoadReport:
        """The load now."""
        source, load = self.source, self.source.load()
        told_as_it_is = {name: getattr(load, name) for name in SHARED}
        return LoadReport(
            seq=source.changes,
            t=self._wall(),
            max_running=load.slots,
            free_slots=max(0, source.bound - load.running - load.waiting),
            prefill_backlog_tokens=load.backlog_tokens,
            step_ms_ewma=_ms(load.step_seconds),
            prefill_tok_s=round(load.prefill_rate, 1),
            decode_tok_s=round(load.decode_rate, 1),
            queue_ms_ewma=_ms(load.queue_seconds),
            ttft_ms_p50=_median_ms(self._firsts),
            tpot_ms_p50=_median_ms(self._gaps),
            hit_rate=round(load.cached_tokens / load.prompt_tokens, 4) if load.prompt_tokens else 0.0,
            rejects=source.rejects,
            draining=self.draining,
            **told_as_it_is,
        )

    async def reports(self) -> AsyncIterator[LoadReport]:
        """A report now and at each change, as often as the head of this file says."""
        while True:
            report = self.report()
            yield report
            await asyncio.sleep(APART_SECONDS)
            longest = SIGN_SECONDS if report.is_busy else HEARTBEAT_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(longest - APART_SECONDS):
                    await self.source.wait_change(report.seq)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The handler of `/load/stream`."""
        if self.listeners >= MOST_LISTENERS:
            raise ApiError(503, "too_many_listeners", f"{MOST_LISTENERS} listen to this backend's load already")
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "cache-control": "no-store"})
        self.listeners += 1
        try:
            await response.prepare(request)
            async for report in self.reports():
                await response.write(b"data: %b\n\n" % msgspec.json.encode(report))
        except ConnectionResetError:
            pass  # whoever listened has left
        finally:
            self.listeners -= 1
        return response

    def beside_usage(self, request: web.Request) -> dict[str, LoadReport]:
        """What is added to the last chunk of a stream, for a request that asks for it."""
        return {"load": self.report()} if form_asked(request.headers) == "json" else {}


def form_asked(headers: Mapping[str, str]) -> str:
    """In which form a load is told in the answer: `json`, `text`, or "" where nobody asks."""
    form = headers.get("endpoint-load-metrics-format", "").strip().lower()
    return form if form in ("json", "text") else ""


def in_band(told: Iterable[Reporter], form: str) -> str:
    """The value of `endpoint-load-metrics` in an answer that is about these: the sums, and the fullest cache."""
    sources = [each.source for each in told]
    loads = [source.load() for source in sources]
    fullest = max((load.kv_usage for load in loads), default=0.0)
    load = Load(sum(each.running for each in loads), sum(each.waiting for each in loads), fullest)
    return orca(named_metrics(load, sum(source.changes for source in sources)), form)


def named_metrics(load: Load, seq: int) -> dict[str, float]:
    """What balancing needs, named as vLLM's metrics are."""
    return {
        "num_requests_running": load.running,
        "num_requests_waiting": load.waiting,
        "kv_cache_usage_perc": round(load.kv_usage, 4),
        "seq": seq,
    }


def orca(metrics: dict[str, float], form: str) -> str:
    """The value of `endpoint-load-metrics`, in `json` or `text`."""
    if form == "json":
        return "JSON " + msgspec.json.encode({"named_metrics": metrics}).decode()
    return "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in metrics.items())


# vLLM's metrics: name, kind, meaning, and where it is in the load.
METRICS = (
    ("num_requests_running", "gauge", "Requests that have a slot", "running"),
    ("num_requests_waiting", "gauge", "Requests that wait for one", "waiting"),
    ("kv_cache_usage_perc", "gauge", "Used share of the key-value cache, 0 to 1", "kv_usage"),
    ("prefix_cache_queries_total", "counter", "Tokens of prompts", "prompt_tokens"),
    ("prefix_cache_hits_total", "counter", "Tokens of prompts that were cached", "cached_tokens"),
    ("prompt_tokens_total", "counter", "Tokens of prompts, under its other name", "prompt_tokens"),
    ("generation_tokens_total", "counter", "Tokens generated", "generated_tokens"),
    ("num_preemptions_total", "counter", "Requests that had to give way and were computed again", "preemptions"),
)


def metrics_page(told: Mapping[str, Reporter]) -> str:
    """Load and report of each model in the text format of Prometheus. Counters begin again with each worker."""
    models = [f'model_name="{_escaped(model)}"' for model in told]
    loads, reports = [each.source.load() for each in told.values()], [each.report() for each in told.values()]

    def family(name: str, kind: str, meaning: str, labels: list[str], values: list[float]) -> str:
        samples = (f"{name}{{{label}}} {value}\n" for label, value in zip(labels, values, strict=True))
        return "".join((f"# HELP {name} {meaning}\n# TYPE {name} {kind}\n", *samples))

    page = ""
    for name, kind, meaning, place in METRICS:
        page += family(f"vllm:{name}", kind, meaning, models, [getattr(load, place) for load in loads])
    sizes = [f'block_size="{load.block_size}",num_gpu_blocks="{load.kv_blocks}"' for load in loads]
    labels = [f"{model},{size}" for model, size in zip(models, sizes, strict=True)]
    page += family("vllm:cache_config_info", "gauge", "The key-value cache", labels, [1] * len(labels))
    for place in LoadReport.__struct_fields__:
        values = [float(getattr(report, place)) for report in reports]
        page += family(f"weir_backend_load_{place}", "gauge", "As in the load report", models, values)
    return page


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _median_ms(seconds: Sequence[float]) -> float:
    return _ms(median(seconds)) if seconds else 0.0
