"""The heads we write: the request's towards a backend, the answer's towards the client.

Framing and identity headers are always ours. From a backend's answer only the names in ANSWER_HEADERS pass, with their
values checked again: a backend may be hostile.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

if TYPE_CHECKING:
    from gateway.call import Call
    from gateway.upstream.endpoint import Backend

ANSWER_HEADERS: Final = frozenset(
    {
        b"content-type", b"content-language", b"content-disposition", b"content-encoding", b"cache-control", b"etag",
        b"last-modified", b"expires", b"vary", b"date", b"inference-header-content-length", b"deprecation", b"sunset",
    }
)  # fmt: skip
_ANSWER_PREFIXES: Final = (b"openai-", b"anthropic-")

_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*").fullmatch
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch

_passes: dict[bytes, bytes | None] = {}


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Status"
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES: Final = {status: _status_line(status) for status in range(200, 600)}


def passing_name(name: bytes) -> bytes | None:
    """The lower-case name of an answer's header that may pass to the client, else None. Remembers, up to a bound."""
    if name in _passes:
        return _passes[name]
    lower = name.lower()
    allowed = lower in ANSWER_HEADERS or (lower.startswith(_ANSWER_PREFIXES) and _NAME(lower) is not None)
    passes = lower if allowed else None
    if len(_passes) < 1024:
        _passes[name] = passes
    return passes


def is_sane_value(value: bytes) -> bool:
    """No control characters: it cannot end the header line it stands in."""
    return _VALUE(value) is not None


def header_safe(text: str) -> bytes:
    """A name from a token or a registration as a header value: printable ASCII as it is, the rest percent-encoded."""
    return quote(text, safe=" !#$&'()*+,-./:;<=>?@[]^_`{|}~").encode()


def request_head(call: Call, backend: Backend, consumer: bytes, span_id: str, deadline_ms: int) -> bytes:
    """The head of a request to a backend, with the empty line.

    `consumer` is fit to stand in a header line, and may have whole lines about the caller behind it.
    """
    body = call.body
    return (
        b"%b %b%b HTTP/1.1\r\n%b%b%btraceparent: 00-%b-%b-%b\r\n%bx-weir-consumer: %b\r\nx-weir-deadline-ms: %d\r\n%b"
    ) % (
        call.method.encode(),
        backend.base_path,
        call.resource.encoded,
        backend.head_lines,
        call.head.forwarded,
        call.connection.forwarded_lines,
        call.trace_id.encode(),
        span_id.encode(),
        b"01" if call.sampled else b"00",
        call.id_line,
        consumer,
        deadline_ms,
        b"content-length: %d\r\n\r\n" % len(body) if body or call.method in _WITH_BODY else b"\r\n",
    )


_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
