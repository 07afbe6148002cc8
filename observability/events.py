"""What happened, as records. The core knows these; metrics, traces and logs subscribe to them.

All durations are seconds. No field may carry a token, a prompt, an answer or a backend's address.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec


class Attempt(msgspec.Struct, frozen=True, gc=False):
    """One try at one backend. `started` is seconds after the request's start."""

    backend: str  # the id in discovery
    service: str
    started: float
    connect: float
    duration: float
    outcome: str  # ok | connect_fail | connect_timeout | upstream_reset | upstream_timeout | upstream_protocol | ...
    status: int  # 0: none came
    span_id: str


class RequestEnded:
    """One per accepted request, whatever became of it. It is filled in while the request runs, and not changed after.

    Names that came from a client are already bounded: `route`, `service` and `model` are names that the policy or
    discovery knows, else "other". Ids of traces and spans are 32 and 16 hexadecimal digits.
    """

    __slots__ = (
        "attempts", "auth", "body", "bytes_in", "bytes_out", "code", "connect", "consumer", "end_reason", "first_token",
        "limit", "method", "model", "overhead", "parent_span_id", "path", "pick", "plan", "policy", "protocol", "queue",
        "request_id", "route", "rule", "sampled", "service", "span_id", "started_at", "status", "stream", "tokens_in",
        "tokens_out", "total", "trace_id", "upstream",
    )  # fmt: skip

    request_id: str
    trace_id: str
    span_id: str
    parent_span_id: str  # "": no parent
    sampled: bool
    started_at: float  # Unix seconds
    method: str
    path: str  # path as matched by the contract's table or the route, else "other"
    protocol: str  # openai | anthropic | oip | http
    route: str
    service: str
    model: str
    consumer: str  # "" before identification
    plan: str
    policy: str  # version
    status: int  # what the client was sent; 499 when it left before any status went out
    end_reason: str  # see END_REASONS
    code: str  # refusal code, "" when forwarded
    rule: str
    stream: bool
    bytes_in: int
    bytes_out: int
    tokens_in: int  # -1: unknown
    tokens_out: int
    auth: float
    limit: float
    body: float
    queue: float
    pick: float
    connect: float
    upstream: float  # request sent -> first byte of the answer
    total: float  # first byte in -> last byte out
    first_token: float  # start -> first body byte out; -1: none went out
    overhead: float  # total less the time spent waiting for the backend and for the client
    attempts: list[Attempt]


END_REASONS = (
    "ok", "client_abort", "client_slow", "parse_error", "auth", "policy", "rate_limited", "shed", "no_backend",
    "breaker_open", "connect_fail", "upstream_reset", "upstream_timeout", "upstream_protocol", "upstream_error",
    "stream_truncated", "drain", "internal",
)  # fmt: skip


class BreakerChanged(msgspec.Struct, frozen=True):
    service: str
    backend: str
    state: str  # closed | open | half_open


class DiscoveryRejected(msgspec.Struct, frozen=True):
    """A registration that was ignored. `key` is truncated to 200 characters of printable ASCII."""

    key: str
    reason: str


class DiscoveryResynced(msgspec.Struct, frozen=True):
    reason: str  # start | compacted | cluster_changed | lost | frozen | periodic
    revision: int


class DiscoveryState(msgspec.Struct, frozen=True):
    """state: cold | watching | stale."""

    state: str


class BackendHealth(msgspec.Struct, frozen=True):
    service: str
    backend: str
    healthy: bool
    reason: str


class PolicyReloaded(msgspec.Struct, frozen=True):
    """result: ok | invalid | unreadable. `errors` are the lines that `weir policy check` would print."""

    result: str
    version: str
    errors: tuple[str, ...] = ()


class StoreChanged(msgspec.Struct, frozen=True):
    """Redis went away or came back."""

    up: bool
    reason: str


class KeysRefreshed(msgspec.Struct, frozen=True):
    """result: ok | failed | rejected."""

    issuer: str
    result: str
    reason: str = ""


Event = (
    RequestEnded | BreakerChanged | DiscoveryRejected | DiscoveryResynced | DiscoveryState | BackendHealth
    | PolicyReloaded | StoreChanged | KeysRefreshed
)  # fmt: skip
Observer = Callable[[Event], None]
