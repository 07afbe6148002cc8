"""What has happened to a request so far: phase times, names and counts. At its end it is the one event of the request.

Phases follow each other without gaps (`lap` ends one and begins the next), so they add up to the total by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from observability.millis import millis
from observability.request import RequestEnded

if TYPE_CHECKING:
    from gateway.admission import Account
    from gateway.allowance import Reservation
    from gateway.call import Call


class Trail(RequestEnded):
    """The record of one request. `start` and `mark` are readings of `clock`, a monotonic one, in seconds."""

    __slots__ = (
        "call", "clock", "events", "limit_lines", "mark", "payer", "policy_line", "reservation", "start",
        "tokens_cached", "waited",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float], started_at: float, policy: str, policy_line: bytes) -> None:
        self.clock = clock
        self.start = self.mark = clock()
        self.started_at = started_at
        self.policy = policy
        self.policy_line = policy_line  # the `x-weir-policy` header line
        self.call: Call | None = None
        self.payer: Account | None = None
        self.limit_lines = b""  # header lines about the payer's limits
        self.reservation: Reservation | None = (
            None  # tokens set aside for it; then the events of its answer are counted
        )
        self.events = 0
        self.auth = self.limit = self.body = self.queue = self.pick = self.connect = self.upstream = 0.0
        self.waited = 0.0  # of upstream and after it: spent waiting for the backend or the client, not for us
        self.first_token = -1.0
        self.consumer = self.plan = self.code = self.rule = self.service = ""
        self.route = self.model = self.path = "other"
        self.status = self.bytes_out = 0
        self.end_reason = "internal"
        self.tokens_in = self.tokens_out = self.tokens_cached = -1
        self.attempts = []

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
        return (
            b"server-timing: auth;dur=%b, limit;dur=%b, body;dur=%b, queue;dur=%b, pick;dur=%b, connect;dur=%b, "
            b"upstream;dur=%b, total;dur=%b\r\n"
        ) % (
            millis(self.auth),
            millis(self.limit),
            millis(self.body),
            millis(self.queue),
            millis(self.pick),
            millis(self.connect),
            millis(self.upstream),
            millis(self.clock() - self.start),
        )

    def end(self, request_id: str = "") -> None:
        """Fill in what is known only now. `request_id` is for what never became a call."""
        call = self.call
        self.total = total = self.clock() - self.start
        self.overhead = max(0.0, total - self.body - self.queue - self.connect - self.upstream - self.waited)
        if not self.status:
            self.status = 499
        if call is None:
            self.request_id, self.trace_id, self.span_id, self.sampled = request_id, "", "", False
            self.parent_span_id, self.method, self.protocol = "", "", "http"
            self.stream, self.bytes_in = False, 0
        else:
            self.request_id, self.trace_id, self.span_id = call.request_id, call.trace_id, call.span_id
            self.sampled, self.stream, self.bytes_in = call.sampled, call.stream, call.size
            self.method, self.protocol, self.parent_span_id = call.method, call.resource.protocol, call.parent_span_id
            self.call = None  # who keeps the record does not keep the body
        self.payer = None
