"""A collector: takes spans over OTLP/HTTP as the published protobufs have it, and can be slow or refuse."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as PbSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

_KINDS = {PbSpan.SPAN_KIND_SERVER: "server", PbSpan.SPAN_KIND_CLIENT: "client", PbSpan.SPAN_KIND_INTERNAL: "internal"}


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as a collector sees it; ids are lower-case hex, "" for none; times in seconds."""

    service_name: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start: float
    end: float
    is_error: bool
    error: str
    attributes: dict[str, Any]


@dataclass
class OtlpReceiver:
    """`async with OtlpReceiver() as receiver`: its `url` is what telemetry.otlp takes."""

    status: int = 200
    delay: float = 0.0
    requests: int = 0
    spans: list[ReceivedSpan] = field(default_factory=list)
    url: str = ""

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/traces", self._traces)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._runner.cleanup()

    async def wait_spans(self, count: int, timeout: float = 60.0) -> list[ReceivedSpan]:
        """Wait until `count` spans are here; raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while len(self.spans) < count:
                await asyncio.sleep(0.01)
        return self.spans

    async def _traces(self, request: web.Request) -> web.Response:
        self.requests += 1
        body = await request.read()
        await asyncio.sleep(self.delay)
        if self.status != 200:
            return web.Response(status=self.status)
        self.spans.extend(_read(ExportTraceServiceRequest.FromString(body)))
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )


def _read(message: ExportTraceServiceRequest) -> list[ReceivedSpan]:
    return [
        _span(_attributes(resource.resource.attributes).get("service.name", ""), span)
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _span(service_name: str, span: PbSpan) -> ReceivedSpan:
    return ReceivedSpan(
        service_name=service_name,
        name=span.name,
        kind=_KINDS.get(span.kind, "other"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        is_error=span.status.code == Status.STATUS_CODE_ERROR,
        error=span.status.message,
        attributes=_attributes(span.attributes),
    )


def _attributes(pairs: list[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind else None
