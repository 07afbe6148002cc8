"""The record of one request, which is the event of its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from observability.events import Attempt


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
    end_reason: str  # one of those in docs/reference.md, Metrics
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
