"""What has happened to a request so far: phase times, names and counts, and the one event made of them at the end.

Phases follow each other without gaps (`lap` ends one and begins the next), so they add up to the total by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.call import Call
from observability.events import Attempt, RequestEnded

if TYPE_CHECKING:
    from gateway.admission import Account


class Trail:
    """Mutable record of one request. All times are seconds of `clock`, a monotonic one."""

    __slots__ = (
        "account", "attempts", "auth", "body", "bytes_out", "call", "clock", "code", "connect", "consumer",
        "end_reason", "first_token", "limit", "mark", "model", "path", "payer", "pick", "plan", "policy", "queue",
        "route", "rule", "service", "start", "started_at", "status", "tokens_in", "tokens_out", "upstream", "waited",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float], started_at: float, policy: str) -> None:
        self.clock = clock
        self.start = self.mark = clock()
        self.started_at = started_at  # Unix seconds
        self.policy = policy
        self.auth = self.limit = self.body = self.queue = self.pick = self.connect = self.upstream = 0.0
        self.waited = 0.0  # of upstream and after it: spent waiting for the backend or the client, not for us
        self.first_token = -1.0
        self.call: Call | None = None
        self.payer: Account | None = None
        self.account = b""  # its rate limit header lines
        self.consumer = self.plan = self.code = self.rule = self.service = ""
        self.route = self.model = self.path = "other"
        self.status = 0
        self.end_reason = "internal"
        self.bytes_out = 0
        self.tokens_in = self.tokens_out = -1
        self.attempts: list[Attempt] = []

    def lap(self) -> float:
        """Seconds since the last lap; the next one begins now."""
        now = self.clock()
        lap = now - self.mark
        self.mark = now
        return lap

    def end_phase(self) -> None:
        """The request is refused: what has passed since the last lap belongs to the phase that was under way."""
        if self.payer is None:
            self.auth += self.lap()
        elif not self.limit:
            self.limit = self.lap()
        elif not self.body:
            self.body = self.lap()
        else:
            self.pick += self.lap()

    def server_timing(self) -> bytes:
        """The `server-timing` header line: phases in milliseconds, and their sum."""
        ms = 1000.0
        return (
            b"server-timing: auth;dur=%.3f, limit;dur=%.3f, body;dur=%.3f, queue;dur=%.3f, pick;dur=%.3f, "
            b"connect;dur=%.3f, upstream;dur=%.3f, total;dur=%.3f\r\n"
        ) % (
            self.auth * ms,
            self.limit * ms,
            self.body * ms,
            self.queue * ms,
            self.pick * ms,
            self.connect * ms,
            self.upstream * ms,
            (self.clock() - self.start) * ms,
        )

    def ended(self, request_id: str) -> RequestEnded:
        """The event of this request."""
        call = self.call
        total = self.clock() - self.start
        outside = self.body + self.queue + self.connect + self.upstream + self.waited
        return RequestEnded(
            request_id=call.request_id if call else request_id,
            trace_id=call.trace_id if call else 0,
            span_id=call.span_id if call else 0,
            parent_span_id=call.parent_span_id if call else 0,
            sampled=call.sampled if call else False,
            started_at=self.started_at,
            method=call.method if call else "",
            path=self.path,
            protocol=call.protocol if call else "http",
            route=self.route,
            service=self.service,
            model=self.model,
            consumer=self.consumer,
            plan=self.plan,
            policy=self.policy,
            status=self.status or 499,
            end_reason=self.end_reason,
            code=self.code,
            rule=self.rule,
            stream=call.stream if call else False,
            bytes_in=len(call.body) if call else 0,
            bytes_out=self.bytes_out,
            tokens_in=self.tokens_in,
            tokens_out=self.tokens_out,
            auth=self.auth,
            limit=self.limit,
            body=self.body,
            queue=self.queue,
            pick=self.pick,
            connect=self.connect,
            upstream=self.upstream,
            total=total,
            first_token=self.first_token,
            overhead=max(0.0, total - outside),
            attempts=tuple(self.attempts),
        )
