"""Prometheus metrics: the one door to prometheus_client, and off the way of a request.

An event adds to plain lists, its cells. Which of them a request adds to is found by a look-up of its labels. Only a
scrape turns them into Prometheus families. What others know better (in flight, breakers, revision) is read by a
function when scraped: `gauge` and `counter`.

A scrape of thousands of series is half a second of work, which no request may wait for. So it has two halves:
`snapshot` copies the numbers, milliseconds at most, and what it returns is turned into text in another thread.

Names and buckets are those of the OpenTelemetry GenAI conventions where these say something
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/).

No label takes a value that a client chooses: events carry names that the policy or discovery knows. Should that fail,
a family stops at `MOST_SERIES` label sets and counts the rest under "other".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import structlog
from prometheus_client import PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from observability.events import (
    CertificatesRead,
    DiscoveryRejected,
    DiscoveryResynced,
    Event,
    HandshakeFailed,
    KeysRefreshed,
    PolicyReloaded,
)
from observability.request import RequestEnded
from observability.text import printable

MOST_SERIES = 2000  # label sets of one family

Bounds = tuple[float, ...]

BREAKER_VALUES = {"closed": 0.0, "half_open": 1.0, "open": 2.0}  # what weir_breaker_state says

# As the conventions have it: gen_ai.server.request.duration, .time_to_first_token, .time_per_output_token,
# gen_ai.client.token.usage. Of no fixed length: compiled, that would be made anew for each call.
_DURATION: Bounds = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN: Bounds = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN: Bounds = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS: Bounds = tuple(float(4**power) for power in range(14))
# Ours: fine around the 70 us that a request should cost, coarse where it is an incident.
_OVERHEAD: Bounds = (
    25e-6, 5e-5, 75e-6, 1e-4, 15e-5, 25e-5, 5e-4, 1e-3, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0,
)  # fmt: skip

Labels = tuple[str, ...]
Cell = list[float]  # of a counter: [n]; of a histogram: one count per bucket, that of +Inf, and the sum
Cells = tuple[Cell, Cell, Cell, Cell | None]  # requests, duration, overhead, limited
Rows = list[tuple[Labels, Cell]]
Read = Callable[[], Iterable[tuple[Labels, float]]]
MakeFamily = Callable[[], Metric]  # from what was copied: in any thread


class _Counter:
    """A family of counters, a cell for each label set."""

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._cells: dict[Labels, Cell] = {}
        self.cell = lru_cache(MOST_SERIES)(self._find_cell)  # the look-up of the hot path: 0.1 us

    def _find_cell(self, *values: object) -> Cell:
        """The cell of these label values; the one of "other" when the family is full."""
        key = tuple(printable(str(value)) for value in values)
        if key not in self._cells and len(self._cells) >= MOST_SERIES:
            key = ("other",) * len(key)
        return self._cells.setdefault(key, self._new_cell())

    def snapshot(self) -> MakeFamily:
        return partial(self._family, [(values, cell[:]) for values, cell in self._cells.items()])

    def _family(self, rows: Rows) -> Metric:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, cell in rows:
            family.add_metric(values, cell[0])
        return family

    def _new_cell(self) -> Cell:
        return [0.0]


class _Histogram(_Counter):
    """A family of histograms. What is counted is added by `_add`."""

    def __init__(self, name: str, text: str, *labels: str, bounds: Bounds) -> None:
        super().__init__(name, text, *labels)
        self._bounds = bounds

    def _family(self, rows: Rows) -> Metric:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for values, cell in rows:
            family.add_metric(values, list(zip(names, _running(cell[:-1]), strict=True)), cell[-1])
        return family

    def _new_cell(self) -> Cell:
        return [0.0] * (len(self._bounds) + 2)


def _add(cell: Cell, bounds: Bounds, value: float) -> None:
    """Count a value in the cell of a histogram with these bounds."""
    at = 0
    for bound in bounds:  # most values are small: cheaper than bisecting
        if value <= bound:
            break
        at += 1
    cell[at] += 1
    cell[-1] += value


def _running(counts: list[float]) -> Iterator[float]:
    """A bucket counts everything up to its bound."""
    total = 0.0
    for count in counts:
        total += count
        yield total


class _Gauge(NamedTuple):
    """A family that a function fills when scraped."""

    make: type[GaugeMetricFamily | CounterMetricFamily]
    name: str
    text: str
    labels: Labels
    read: Read

    def snapshot(self) -> MakeFamily:
        rows = {tuple(map(printable, values)): value for values, value in self.read()}  # a label set stands once
        return partial(self._family, list(rows.items())[:MOST_SERIES])

    def _family(self, rows: list[tuple[Labels, float]]) -> Metric:
        family = self.make(self.name, self.text, labels=self.labels)
        for values, value in rows:
            family.add_metric(values, value)
        return family


class Snapshot(Collector):
    """The numbers of one moment. May be turned into text by another thread, while the next ones are counted."""

    def __init__(self, families: list[MakeFamily], also: tuple[Collector, ...]) -> None:
        self._families = families
        self._also = also

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            yield family()
        for collector in self._also:
            yield from collector.collect()

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Write all families in the format that the Accept header asks for: (body, content type)."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is no number
            encode, content_type = choose_encoder("")
        return encode(self), content_type


class Metrics:
    """Observer of events, and of requests (`request_ended`), and what `/metrics` answers.

    `refresh` brings what has happened but was not told yet.
    """

    def __init__(self, refresh: Callable[[], None] = lambda: None) -> None:
        self._refresh = refresh
        self._requests = _Counter(
            "weir_requests_total", "Requests, by how they ended.", "route", "service", "status", "reason"
        )
        self._duration = _Histogram(
            "weir_request_duration_seconds", "First byte in to last byte out.", "route", "service", bounds=_DURATION
        )
        self._overhead = _Histogram(
            "weir_overhead_seconds",
            "Time spent in the gateway itself, waiting for neither backend nor client.",
            "route",
            bounds=_OVERHEAD,
        )
        self._first_token = _Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time to the first byte of a stream that ended well.",
            "service",
            "model",
            bounds=_FIRST_TOKEN,
        )
        self._per_token = _Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Time per token after the first, of a stream that ended well.",
            "service",
            "model",
            bounds=_PER_TOKEN,
        )
        self._tokens = _Histogram(
            "gen_ai_client_token_usage", "Tokens of one request.", "service", "model", "type", bounds=_TOKENS
        )
        self._limited = _Counter("weir_limited_total", "Requests refused by a limit.", "rule")
        self._retries = _Counter("weir_retries_total", "Attempts after the first one of a request.", "service")
        self._reloads = _Counter("weir_policy_reload_total", "Policies read, by result.", "result")
        self._rejected = _Counter("weir_discovery_rejected_total", "Registrations that were ignored.", "reason")
        self._resyncs = _Counter("weir_discovery_resync_total", "Full listings of discovery, by cause.", "reason")
        self._keys = _Counter("weir_jwks_refresh_total", "Fetches of signing keys, by result.", "issuer", "result")
        self._certificates = _Counter("weir_tls_reload_total", "Certificates read, by result.", "use", "result")
        self._handshakes = _Counter("weir_tls_handshake_failures_total", "Clients' handshakes that failed.", "reason")
        for result in ("ok", "invalid", "unreadable"):
            self._reloads.cell(result)  # increase() cannot see the step from absent to 1
        self._counted: tuple[_Counter, ...] = (
            self._requests, self._duration, self._overhead, self._first_token, self._per_token, self._tokens,
            self._limited, self._retries, self._reloads, self._rejected, self._resyncs, self._keys,
            self._certificates, self._handshakes,
        )  # fmt: skip
        self._token_cells: dict[tuple[str, str], tuple[Cell, Cell]] = {}
        self._ends: dict[tuple[str, str, int, str, str], Cells] = {}
        self._read: list[_Gauge] = []
        self._of_process: tuple[Collector, ...] = (ProcessCollector(registry=None), PlatformCollector(registry=None))

    def __call__(self, event: Event) -> None:
        match event:
            case PolicyReloaded():
                self._reloads.cell(event.result)[0] += 1
            case DiscoveryRejected():
                self._rejected.cell(event.reason.partition(":")[0])[0] += 1  # the field that is wrong, without how
            case DiscoveryResynced():
                self._resyncs.cell(event.reason)[0] += 1
            case KeysRefreshed():
                self._keys.cell(event.issuer, event.result)[0] += 1
            case CertificatesRead():
                self._certificates.cell(event.use, "refused")  # as above: there before the first one
                self._certificates.cell(event.use, event.result)[0] += 1
            case HandshakeFailed():
                self._handshakes.cell(event.reason)[0] += 1

    def gauge(self, name: str, text: str, labels: Labels, read: Read) -> None:
        """Expose what `read` gives at each scrape: (label values, value) pairs, as many values as `labels`."""
        self._read.append(_Gauge(GaugeMetricFamily, name, text, labels, read))

    def counter(self, name: str, text: str, labels: Labels, read: Read) -> None:
        """As `gauge`, for numbers that only grow and are counted elsewhere."""
        self._read.append(_Gauge(CounterMetricFamily, name, text, labels, read))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Write all families as they are now in the format that the Accept header asks for: (body, content type)."""
        return self.snapshot().render(accept)

    def snapshot(self) -> Snapshot:
        """Copy all numbers as they are now."""
        self._refresh()
        families = [counted.snapshot() for counted in self._counted]
        for gauge in self._read:
            try:
                families.append(gauge.snapshot())
            except Exception:  # noqa: BLE001  one reader's bug must not take all other metrics away
                structlog.get_logger().exception("a metric could not be read", metric=gauge.name)
        return Snapshot(families, self._of_process)

    def request_ended(self, event: RequestEnded) -> None:
        names = (event.route, event.service, event.status, event.end_reason, event.rule)
        cells = self._ends.get(names)
        if cells is None:
            cells = self._find_ends(*names)
        requests, duration, overhead, limited = cells
        requests[0] += 1
        _add(duration, _DURATION, event.total)
        _add(overhead, _OVERHEAD, event.overhead)
        if event.tokens_out >= 0 or event.stream:
            self._generation(event)
        if len(event.attempts) > 1:
            self._retries.cell(event.service)[0] += len(event.attempts) - 1
        if limited is not None:
            limited[0] += 1

    def _find_ends(self, route: str, service: str, status: int, reason: str, rule: str) -> Cells:
        """The cells that every request adds to. Remembers them, up to a bound."""
        cells = (
            self._requests.cell(route, service, status, reason),
            self._duration.cell(route, service),
            self._overhead.cell(route),
            self._limited.cell(rule) if status in (413, 429) and rule else None,
        )
        if len(self._ends) >= MOST_SERIES:
            self._ends.clear()
        self._ends[route, service, status, reason, rule] = cells
        return cells

    def _generation(self, event: RequestEnded) -> None:
        service, model = event.service, event.model
        names = (service, model)
        cells = self._token_cells.get(names)
        if cells is None:
            cells = self._find_token_cells(service, model)
        if event.tokens_in >= 0:
            _add(cells[0], _TOKENS, event.tokens_in)
        if event.tokens_out >= 0:
            _add(cells[1], _TOKENS, event.tokens_out)
        if not event.stream or event.end_reason != "ok" or event.first_token < 0:
            return
        _add(self._first_token.cell(service, model), _FIRST_TOKEN, event.first_token)
        if event.tokens_out > 1:
            after_first = event.total - event.first_token
            _add(self._per_token.cell(service, model), _PER_TOKEN, after_first / (event.tokens_out - 1))

    def _find_token_cells(self, service: str, model: str) -> tuple[Cell, Cell]:
        cells = (self._tokens.cell(service, model, "input"), self._tokens.cell(service, model, "output"))
        if len(self._token_cells) >= MOST_SERIES:
            self._token_cells.clear()
        self._token_cells[service, model] = cells
        return cells
