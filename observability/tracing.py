"""Traces over OTLP/HTTP: the one door to opentelemetry.

Spans are built after the fact, from the record of a request that has ended, and only for requests that are kept
(tail_sampling.py).

What the request's own thread does is one comparison and one append to a bounded queue. A thread of its own makes the
spans, at most `_BATCH_TRACES` each `_PERIOD_SECONDS`: at 0.2 ms each that is a tenth of a core when every request is
an error, and tracing cannot become the second outage. What finds the queue full, and what the collector does not take
in time, is dropped and counted.

opentelemetry is imported only when there is a collector to send to: it takes a fifth of a second.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import msgspec
import structlog

from observability.background import give_way
from observability.events import Attempt
from observability.request import RequestEnded
from observability.tail_sampling import ERRORS
from observability.text import printable

_QUEUED_TRACES = 2048
_BATCH_TRACES = 512
_PERIOD_SECONDS = 1.0
_EXPORT_TIMEOUT_SECONDS = 2.0
_CLOSE_TIMEOUT_SECONDS = 5.0

# gen_ai.operation.name by path, where the conventions have a name for it
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}

Attributes = Mapping[str, str | int | float | bool]


class FinishedSpan(msgspec.Struct, frozen=True):
    """One span whose end is known. `parent_id` "": none. `kind`: server | client | internal. `error`: "" if none."""

    name: str
    trace_id: str  # 32 and 16 hexadecimal digits
    span_id: str
    parent_id: str
    start: float  # Unix seconds
    end: float
    attributes: Attributes
    kind: str = "internal"
    error: str = ""


Export = Callable[[list[FinishedSpan]], bool]


class SpanExporter:
    """A bounded queue of traces and the thread that sends them. `put` and `emit` never wait and never raise.

    `export` sends one batch and says whether the collector took it; it may wait, and is called by one thread only.
    """

    def __init__(self, export: Export) -> None:
        self._export = export
        self._queue: deque[Iterable[FinishedSpan]] = deque()
        self._closing = threading.Event()
        self._failures = 0
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="weir-traces", daemon=True)
        self._thread.start()

    @property
    def failures(self) -> int:
        """Traces that did not reach the collector since the start."""
        return self._failures

    def put(self, trace: Iterable[FinishedSpan]) -> None:
        """Queue the spans of one trace; a generator runs in the thread."""
        if len(self._queue) >= _QUEUED_TRACES:
            self._failures += 1
            return
        self._queue.append(trace)

    def emit(
        self,
        name: str,
        *,
        trace_id: str,
        span_id: str,
        parent_id: str,
        start: float,
        end: float,
        attributes: Attributes,
        kind: str = "server",
    ) -> None:
        """Queue a single span, for a process that has one for each request."""
        self.put((FinishedSpan(name, trace_id, span_id, parent_id, start, end, attributes, kind),))

    def close(self, timeout: float = _CLOSE_TIMEOUT_SECONDS) -> None:
        """Send what is queued, for at most `timeout` seconds."""
        self._closing.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        give_way()
        while not self._closing.wait(_PERIOD_SECONDS):
            self._send_batch()
        while self._queue and self._send_batch():
            pass
        self._failures += len(self._queue)

    def _send_batch(self) -> bool:
        traces = [self._queue.popleft() for _ in range(min(len(self._queue), _BATCH_TRACES))]
        if not traces:
            return True
        try:
            is_taken = self._export(list(chain.from_iterable(traces)))
        except Exception:  # noqa: BLE001  one bad trace costs its batch, never the thread
            structlog.get_logger().exception("spans could not be made")
            is_taken = False
        if not is_taken:
            self._failures += len(traces)
        self._tell(is_taken)
        return is_taken

    def _tell(self, is_taken: bool) -> None:
        """One line when the collector goes away, one when it is back."""
        if is_taken and self._is_failing:
            structlog.get_logger().info("traces reach the collector again", lost=self._failures)
        if not is_taken and not self._is_failing:
            structlog.get_logger().warning("traces do not reach the collector: they are dropped until it answers")
        self._is_failing = not is_taken


def spans(event: RequestEnded) -> Iterator[FinishedSpan]:
    """The server span of a request, and one below it for each phase that took time and each attempt."""
    operation = _OPERATIONS.get(event.path)
    yield FinishedSpan(
        name=f"{operation} {event.model}" if operation else f"{event.method} {event.path}",
        trace_id=event.trace_id,
        span_id=event.span_id,
        parent_id=event.parent_span_id,
        start=event.started_at,
        end=event.started_at + event.total,
        attributes=_request_attributes(event, operation),
        kind="server",
        error=_error(event),
    )
    yield from _phases(event)
    for attempt in event.attempts:
        yield _attempt(event, attempt)


def _phases(event: RequestEnded) -> Iterator[FinishedSpan]:
    """The phases before the first attempt follow each other, in the order of the pipeline."""
    start = event.started_at
    durations = (
        ("weir.authenticate", event.auth),
        ("weir.limit", event.limit),
        ("weir.body", event.body),
        ("weir.queue", event.queue),
        ("weir.pick", event.pick),
    )
    for name, seconds in durations:
        if seconds > 0:
            yield FinishedSpan(name, event.trace_id, secrets.token_hex(8), event.span_id, start, start + seconds, {})
        start += seconds


def _attempt(event: RequestEnded, attempt: Attempt) -> FinishedSpan:
    """Its id went upstream in `traceparent`: the backend's own span hangs below it."""
    attributes: dict[str, str | int | float | bool] = {
        "weir.backend": attempt.backend,
        "weir.service": attempt.service,
        "weir.outcome": attempt.outcome,
        "weir.connect_seconds": attempt.connect,
    }
    if attempt.status:
        attributes["http.response.status_code"] = attempt.status
    is_error = attempt.outcome != "ok" or attempt.status >= 500
    start = event.started_at + attempt.started
    return FinishedSpan(
        name="weir.attempt",
        trace_id=event.trace_id,
        span_id=attempt.span_id,
        parent_id=event.span_id,
        start=start,
        end=start + attempt.duration,
        attributes=attributes,
        kind="client",
        error=(attempt.outcome if attempt.outcome != "ok" else str(attempt.status)) if is_error else "",
    )


def _request_attributes(event: RequestEnded, operation: str | None) -> Attributes:
    attributes: dict[str, str | int | float | bool] = {
        "http.request.method": event.method,
        "http.response.status_code": event.status,
        "http.request.body.size": event.bytes_in,
        "http.response.body.size": event.bytes_out,
        "url.path": event.path,
        "weir.request_id": event.request_id,
        "weir.route": event.route,
        "weir.service": event.service,
        "weir.consumer": event.consumer,
        "weir.plan": event.plan,
        "weir.policy": event.policy,
        "weir.end_reason": event.end_reason,
        "weir.code": event.code,
        "weir.rule": event.rule,
        "weir.attempts": len(event.attempts),
        "weir.overhead_seconds": event.overhead,
        "error.type": _error(event),
    }
    if operation:
        attributes |= _generation_attributes(event, operation)
    return {name: value for name, value in attributes.items() if value != ""}


def _generation_attributes(event: RequestEnded, operation: str) -> dict[str, str | int | float | bool]:
    attributes: dict[str, str | int | float | bool] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": event.protocol,  # the format's flavour, as the conventions want it of a proxy
        "gen_ai.request.model": event.model,
        "gen_ai.request.stream": event.stream,
    }
    if event.tokens_in >= 0:
        attributes["gen_ai.usage.input_tokens"] = event.tokens_in
    if event.tokens_out >= 0:
        attributes["gen_ai.usage.output_tokens"] = event.tokens_out
    if event.stream and event.first_token >= 0:
        attributes["gen_ai.response.time_to_first_chunk"] = event.first_token
    return attributes


def _error(event: RequestEnded) -> str:
    if event.end_reason in ERRORS:
        return event.end_reason
    return str(event.status) if event.status >= 500 else ""


def otlp_export(url: str, service_name: str, version: str, timeout: float = _EXPORT_TIMEOUT_SECONDS) -> Export:
    """What sends spans to the collector at `url` (its base, or the full path of its traces).

    The usual OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE and OTEL_RESOURCE_ATTRIBUTES are heard.
    """
    # Here and not above: a fifth of a second that only a process with a collector should pay.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import ReadableSpan  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import SpanExportResult  # noqa: PLC0415
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: PLC0415
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags  # noqa: PLC0415

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # SpanExporter tells it once, not for each batch
    endpoint = url if url.endswith("/v1/traces") else f"{url.rstrip('/')}/v1/traces"
    exporter = OTLPSpanExporter(endpoint, timeout=timeout)
    resource = Resource.create({"service.name": service_name, "service.version": version})
    scope = InstrumentationScope("weir", version)
    sampled = TraceFlags(TraceFlags.SAMPLED)

    def readable(span: FinishedSpan) -> ReadableSpan:
        return ReadableSpan(
            name=printable(span.name),
            context=SpanContext(int(span.trace_id, 16), int(span.span_id, 16), is_remote=False, trace_flags=sampled),
            parent=SpanContext(int(span.trace_id, 16), int(span.parent_id, 16), is_remote=True)
            if span.parent_id
            else None,
            resource=resource,
            attributes={
                name: printable(value) if isinstance(value, str) else value for name, value in span.attributes.items()
            },
            kind=SpanKind[span.kind.upper()],
            status=Status(StatusCode.ERROR, printable(span.error)) if span.error else Status(StatusCode.UNSET),
            start_time=int(span.start * 1e9),
            end_time=int(span.end * 1e9),
            instrumentation_scope=scope,
        )

    return lambda spans: exporter.export([readable(span) for span in spans]) is SpanExportResult.SUCCESS
