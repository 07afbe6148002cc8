"""From a refusal to bytes, in the protocol of the path that was called. The only place that knows how errors look."""

from __future__ import annotations

from random import Random
from typing import Any, Final

import msgspec

from gateway.headers import STATUS_LINES
from observability.millis import millis
from policies.errors import Refusal

JITTER = 0.25  # clients' SDKs come back exactly when told: spread them over a quarter more
LONG_WAIT_SECONDS = 120.0  # SDKs do not wait longer than this by themselves: tell them not to try


def error_body(protocol: str, refusal: Refusal, request_id: str) -> bytes:
    """The JSON body of a refusal. `request_id` is of letters, digits and `._-`.

    All but the request's own part is remembered, up to a bound: who is refused is mostly refused again.
    """
    key = (protocol, type(refusal), refusal.message, refusal.rule, refusal.param)
    beginning = _beginnings.get(key)
    if beginning is None:
        beginning = msgspec.json.encode(_document(protocol, refusal))
        beginning = beginning[: beginning.rindex(_ID) + len(_ID) - 1]
        if len(_beginnings) >= _MOST_BEGINNINGS:
            _beginnings.clear()
        _beginnings[key] = beginning
    if protocol in ("anthropic", "oip"):
        return b'%b%b"}' % (beginning, request_id.encode())
    if refusal.retry_after is None:
        return b'%b%b"}}' % (beginning, request_id.encode())
    return b'%b%b","retry_after":%b}}' % (beginning, request_id.encode(), millis(refusal.retry_after / 1e3))


_ID: Final = b'"request_id":""'
_MOST_BEGINNINGS: Final = 1024
_beginnings: dict[tuple[str, type[Refusal], str, str | None, str | None], bytes] = {}


def _document(protocol: str, refusal: Refusal) -> dict[str, Any]:
    """What an error looks like, with the request's id to be filled in at the end."""
    if protocol == "anthropic":
        kind = "overloaded_error" if refusal.status == 503 else _ANTHROPIC_TYPES.get(refusal.type, "api_error")
        return {"type": "error", "error": {"type": kind, "message": refusal.message}, "request_id": ""}
    if protocol == "oip":
        return {"error": refusal.message, "code": refusal.code, "request_id": ""}
    error = {"message": refusal.message, "type": refusal.type, "code": refusal.code, "param": refusal.param}
    rule = {"rule": refusal.rule} if refusal.rule is not None else {}
    return {"error": {**error, **rule, "request_id": ""}}


_ANTHROPIC_TYPES: Final = {
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
    ms = int(after * 1000.0 + 0.999) or 1
    lines = b"retry-after: %d\r\nretry-after-ms: %d\r\n" % ((ms + 999) // 1000, ms)
    return lines + b"x-should-retry: false\r\n" if after > LONG_WAIT_SECONDS else lines


def refusal_bytes(
    protocol: str, refusal: Refusal, request_id: str, extra_lines: bytes, rng: Random, *, close: bool, head_only: bool
) -> bytes:
    """The whole answer. `extra_lines` are the headers that every response has."""
    body = error_body(protocol, refusal, request_id)
    return b"%bcontent-type: application/json\r\ncache-control: no-store\r\ncontent-length: %d\r\n%b%b%b%b%b" % (
        STATUS_LINES[refusal.status],
        len(body),
        b'www-authenticate: Bearer error="invalid_token"\r\n' if refusal.status == 401 else b"",
        retry_lines(refusal, rng),
        extra_lines,
        b"connection: close\r\n\r\n" if close else b"\r\n",
        b"" if head_only else body,
    )
