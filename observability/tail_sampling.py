"""Which requests' traces are kept: the sampled share, every error, everything slow.

A refusal in the 4xx is the gateway doing its work and no error: a flood of bad tokens must not become a flood of spans
(metrics and the access log count each of them all the same). Nor is a client that left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from observability.request import RequestEnded

ERRORS: Final = frozenset(
    {
        "no_backend", "breaker_open", "connect_fail", "upstream_reset", "upstream_timeout", "upstream_protocol",
        "upstream_error", "stream_truncated", "drain", "internal",
    }
)  # fmt: skip


class TailSampler:
    """Observer of requests: hands `put` what `spans` makes of those that are kept."""

    __slots__ = ("_put", "_slow_seconds", "_spans")

    def __init__(
        self,
        put: Callable[[Iterable[Any]], None],
        spans: Callable[[RequestEnded], Iterable[Any]],
        slow_seconds: float,
    ) -> None:
        self._put = put
        self._spans = spans
        self._slow_seconds = slow_seconds

    def __call__(self, request: RequestEnded) -> None:
        if is_kept(request, self._slow_seconds):
            self._put(self._spans(request))


def is_kept(request: RequestEnded, slow_seconds: float) -> bool:
    """Whether a request's trace is worth its price: sampled, slow, or an error."""
    return request.sampled or request.total >= slow_seconds or request.status >= 500 or request.end_reason in ERRORS
