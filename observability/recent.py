"""The last requests, for people who watch: a bounded ring, turned into JSON only when somebody asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from observability.events import Attempt
from observability.request import RequestEnded
from observability.text import printable

KEPT = 200


class Recent:
    """Observer of requests. Holds `KEPT` of them whatever the traffic."""

    __slots__ = ("_kept", "_refresh")

    def __init__(self, refresh: Callable[[], None] = lambda: None) -> None:
        self._refresh = refresh  # brings what has happened but was not told yet
        self._kept: deque[RequestEnded] = deque(maxlen=KEPT)

    def __call__(self, request: RequestEnded) -> None:
        self._kept.append(request)

    def requests(self) -> list[dict[str, Any]]:
        """Newest first, as dicts of JSON values; times in milliseconds, `time` in Unix seconds."""
        self._refresh()
        return [_request(event) for event in reversed(self._kept)]


def _request(event: RequestEnded) -> dict[str, Any]:
    return {
        "time": event.started_at,
        "request_id": printable(event.request_id),
        "trace_id": event.trace_id,
        "consumer": printable(event.consumer),
        "plan": printable(event.plan),
        "method": printable(event.method),
        "path": printable(event.path),
        "route": printable(event.route),
        "service": printable(event.service),
        "model": printable(event.model),
        "policy": printable(event.policy),
        "status": event.status,
        "end_reason": event.end_reason,
        "code": event.code,
        "rule": printable(event.rule),
        "stream": event.stream,
        "tokens_in": event.tokens_in if event.tokens_in >= 0 else None,
        "tokens_out": event.tokens_out if event.tokens_out >= 0 else None,
        "attempts": [_attempt(attempt) for attempt in event.attempts],
        "phases_ms": {
            "auth": _ms(event.auth),
            "limit": _ms(event.limit),
            "body": _ms(event.body),
            "queue": _ms(event.queue),
            "pick": _ms(event.pick),
            "connect": _ms(event.connect),
            "upstream": _ms(event.upstream),
        },
        "first_token_ms": _ms(event.first_token) if event.first_token >= 0 else None,
        "overhead_ms": _ms(event.overhead),
        "total_ms": _ms(event.total),
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    return {
        "backend": printable(attempt.backend),
        "service": printable(attempt.service),
        "status": attempt.status,
        "outcome": attempt.outcome,
        "started_ms": _ms(attempt.started),
        "duration_ms": _ms(attempt.duration),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
