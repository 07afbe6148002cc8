"""From a refusal to bytes, in the protocol of the path that was called. The only place that knows how errors look."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import msgspec

from gateway.headers import STATUS_LINES
from policies.errors import Refusal, Unauthenticated

JITTER = 0.25  # clients' SDKs come back exactly when told: spread them over a quarter more
LONG_WAIT_SECONDS = 120.0  # SDKs do not wait longer than this by themselves: tell them not to try


def error_body(protocol: str, refusal: Refusal, request_id: str) -> bytes:
    """The JSON body of a refusal."""
    body: dict[str, Any]
    if protocol == "anthropic":
        kind = "overloaded_error" if refusal.status == 503 else _ANTHROPIC_TYPES.get(refusal.type, "api_error")
        body = {"type": "error", "error": {"type": kind, "message": refusal.message}, "request_id": request_id}
    elif protocol == "oip":
        body = {"error": refusal.message, "code": refusal.code, "request_id": request_id}
    else:
        error: dict[str, Any] = {
            "message": refusal.message,
            "type": refusal.type,
            "code": refusal.code,
            "param": refusal.param,
            "request_id": request_id,
        }
        if refusal.rule is not None:
            error["rule"] = refusal.rule
        if refusal.retry_after is not None:
            error["retry_after"] = round(refusal.retry_after, 3)
        body = {"error": error}
    return msgspec.json.encode(body)


_ANTHROPIC_TYPES = {
    "invalid_request_error": "invalid_request_error",
    "authentication_error": "authentication_error",
    "permission_error": "permission_error",
    "rate_limit_error": "rate_limit_error",
}


def error_event(protocol: str, refusal: Refusal, request_id: str) -> bytes:
    """The last event of a stream that broke; empty where the protocol has no form for it."""
    if protocol == "anthropic":
        return b"event: error\ndata: %b\n\n" % error_body(protocol, refusal, request_id)
    if protocol == "openai":
        return b"data: %b\n\n" % error_body(protocol, refusal, request_id)
    return b""


def retry_lines(refusal: Refusal, rng: Random) -> bytes:
    """`retry-after` (whole seconds) and `retry-after-ms` (jittered), where coming back makes sense."""
    after = refusal.retry_after
    if after is None:
        if refusal.status not in (429, 503):
            return b""
        after = 1.0
    after = after * (1.0 + JITTER * rng.random())
    lines = b"retry-after: %d\r\nretry-after-ms: %d\r\n" % (max(1, math.ceil(after)), max(1, round(after * 1000)))
    return lines + b"x-should-retry: false\r\n" if after > LONG_WAIT_SECONDS else lines


def refusal_bytes(
    protocol: str, refusal: Refusal, request_id: str, extra_lines: bytes, rng: Random, *, close: bool, head_only: bool
) -> bytes:
    """The whole answer. `extra_lines` are the headers that every response has."""
    body = error_body(protocol, refusal, request_id)
    return b"".join(
        (
            STATUS_LINES[refusal.status],
            b"content-type: application/json\r\ncache-control: no-store\r\ncontent-length: %d\r\n" % len(body),
            b'www-authenticate: Bearer error="invalid_token"\r\n' if isinstance(refusal, Unauthenticated) else b"",
            retry_lines(refusal, rng),
            extra_lines,
            b"connection: close\r\n\r\n" if close else b"\r\n",
            b"" if head_only else body,
        )
    )
