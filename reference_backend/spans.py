"""One span per generation or embedding, below the caller's: the backend's end of a trace that began at the gateway."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from observability.traceparent import parse_traceparent
from observability.tracing import SpanExporter
from reference_backend.incoming import SERVED
from reference_backend.openai_api import USAGE

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
LEFT = 499  # the client went away before there was a status


def span_middleware(exporter: SpanExporter, wall: Callable[[], float]) -> Middleware:
    """Emits a span when a generation has ended, however it ended.

    A caller that does not keep its trace gets no span; without a caller's trace, a span begins one of its own.
    """

    @web.middleware
    async def trace(request: web.Request, handler: Handler) -> web.StreamResponse:
        operation = next((name for path, name in OPERATIONS.items() if request.path.endswith(path)), None)
        parent = parse_traceparent(request.headers.get("traceparent", ""))
        if operation is None or (parent is not None and not parent.flags & 1):
            return await handler(request)
        start, status = wall(), LEFT
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            served = request.get(SERVED)
            model = str(served.entry) if served is not None else ""
            exporter.emit(
                f"{operation} {model}".rstrip(),
                trace_id=parent.trace_id if parent else secrets.token_hex(16),
                span_id=secrets.token_hex(8),
                parent_id=parent.parent_id if parent else "",
                start=start,
                end=wall(),
                attributes=_attributes(request, operation, model, status),
            )

    return trace


def _attributes(request: web.Request, operation: str, model: str, status: int) -> dict[str, str | int | float | bool]:
    """Names of the OpenTelemetry GenAI conventions. Nothing in them was written by the client."""
    attributes: dict[str, str | int | float | bool] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "weir",
        "http.response.status_code": status,
    }
    if model:
        attributes |= {"gen_ai.request.model": model, "gen_ai.response.model": model}
    usage = request.get(USAGE)
    if usage is not None:
        attributes["gen_ai.usage.input_tokens"] = usage.prompt_tokens
        attributes["gen_ai.usage.output_tokens"] = usage.completion_tokens
    return attributes
