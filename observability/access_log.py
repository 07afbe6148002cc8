"""The access log: one JSON line for each request that has ended."""

from __future__ import annotations

from typing import Final

import msgspec

from observability.line_writer import LineWriter
from observability.millis import THREE_DIGITS, millis
from observability.request import RequestEnded
from observability.text import LONGEST, bounded

_NAMED: Final = (
    "consumer", "plan", "method", "path", "route", "service", "model", "backend", "policy", "status", "end_reason",
    "code", "rule", "attempts", "stream",
)  # fmt: skip
_MOST_NAMED: Final = 4096


class AccessLog:
    """Observer of requests: one line each, made at once so that the queue holds only bytes.

    The names in a line are few and come again and again (callers, routes, backends, ends): they are remembered as they
    stand in a line, up to a bound. A key that has nothing to say is left out.
    """

    __slots__ = ("_named", "_writer")

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer
        self._named: dict[tuple[object, ...], bytes] = {}

    def __call__(self, request: RequestEnded) -> None:
        attempts, request_id = request.attempts, request.request_id
        backend = attempts[-1].backend if attempts else ""
        names = (
            request.consumer, request.plan, request.method, request.path, request.route, request.service, request.model,
            backend, request.policy, request.status, request.end_reason, request.code, request.rule, len(attempts),
            request.stream,
        )  # fmt: skip
        named = self._named.get(names)
        if named is None:
            named = self._name(names)
        is_plain = request_id.isalnum() and request_id.isascii() and len(request_id) <= LONGEST
        time = int(request.started_at * 1e3)
        line = (
            b'{"time":%d.%b,"request_id":%b%b%b"total_ms":%b,"overhead_ms":%b,"auth_ms":%b,"limit_ms":%b,"body_ms":%b,'
            b'"pick_ms":%b,"bytes_in":%d,"bytes_out":%d%b}'
        ) % (
            time // 1000,
            THREE_DIGITS[time % 1000],
            b'"%b"' % request_id.encode() if is_plain else _json(request_id),
            _trace(request),
            named,
            millis(request.total),
            millis(request.overhead),
            millis(request.auth),
            millis(request.limit),
            millis(request.body),
            millis(request.pick),
            request.bytes_in,
            request.bytes_out,
            _forwarded(request) if attempts else b"",
        )
        self._writer.write(line, keep=request.status >= 500)

    def _name(self, names: tuple[object, ...]) -> bytes:
        """The part of a line that these names make."""
        fields = {key: bounded(value) for key, value in zip(_NAMED, names, strict=True)}
        for key in ("code", "rule", "stream"):
            if not fields[key]:
                del fields[key]
        named = b",%b," % _json(fields)[1:-1]
        if len(self._named) >= _MOST_NAMED:
            self._named.clear()
        self._named[names] = named
        return named


def _trace(request: RequestEnded) -> bytes:
    """Whoever looks a trace up needs its id; for the rest 32 random digits are a tenth of the disk."""
    if request.sampled or request.parent_span_id or request.status >= 500:
        return b',"trace_id":"%b"' % request.trace_id.encode()
    return b""


def _forwarded(request: RequestEnded) -> bytes:
    """What only a request that was forwarded has."""
    more = b',"upstream_ms":%b' % millis(request.upstream) if request.upstream else b""
    if request.tokens_in >= 0:
        more += b',"tokens_in":%d' % request.tokens_in
    if request.tokens_out >= 0:
        more += b',"tokens_out":%d' % request.tokens_out
    if request.first_token >= 0:
        more += b',"first_token_ms":%b' % millis(request.first_token)
    if request.connect:
        more += b',"connect_ms":%b' % millis(request.connect)
    if request.queue:
        more += b',"queue_ms":%b' % millis(request.queue)
    return more


def _json(value: object) -> bytes:
    """JSON in which strings are bounded and hold nothing that cannot be encoded."""
    return msgspec.json.encode(bounded(value))
