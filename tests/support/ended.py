"""A request that went well, to be changed as a test needs it."""

from typing import Any

from observability.events import Attempt
from observability.request import RequestEnded

ATTEMPT = Attempt(
    backend="b-1",
    service="tiny",
    started=0.004,
    connect=0.001,
    duration=0.0955,
    outcome="ok",
    status=200,
    span_id="00000000000000a1",
)

FIELDS: dict[str, Any] = {
    "request_id": "req-1", "trace_id": "0af7651916cd43dd8448eb211c80319c", "span_id": "b7ad6b7169203331", "parent_span_id": "",
    "sampled": False, "started_at": 1_700_000_000.0, "method": "POST", "path": "/v1/chat/completions", "protocol": "openai",
    "route": "chat", "service": "tiny", "model": "tiny-1", "consumer": "alice", "plan": "free", "policy": "0123456789ab", "status": 200,
    "end_reason": "ok", "code": "", "rule": "", "stream": False, "bytes_in": 600, "bytes_out": 812, "tokens_in": 12, "tokens_out": 30,
    "auth": 0.001, "limit": 0.0005, "body": 0.002, "queue": 0.0, "pick": 0.0005, "connect": 0.001, "upstream": 0.09, "total": 0.1,
    "first_token": 0.095, "overhead": 0.0001, "attempts": [ATTEMPT],
}  # fmt: skip


def ended(**changes: Any) -> RequestEnded:
    event = RequestEnded()
    for name, value in (FIELDS | changes).items():
        setattr(event, name, value)
    return event


ENDED = ended()


def refused(status: int, code: str, end_reason: str, **changes: Any) -> RequestEnded:
    """A request that no backend has seen."""
    never = {"service": "", "attempts": [], "tokens_in": -1, "tokens_out": -1, "first_token": -1.0, "upstream": 0.0}
    return ended(status=status, code=code, end_reason=end_reason, **(never | changes))
