"""One tree of refusals: everything the gateway may answer instead of forwarding.

Each class is a noun with a fixed HTTP status and code (contract: "Refusals"); an instance adds the
message, the rule that decided, and when to come back. `gateway/rescue.py` alone turns one into bytes.
"""

from __future__ import annotations

from typing import ClassVar


class Refusal(Exception):  # noqa: N818  it is an answer, not an error of the program
    """A request that will not be forwarded, or whose forwarding failed before the first byte.

    `message` is fixed text, safe to show to any client. `rule` is the dotted policy path that decided
    (`plans.free.requests`). `retry_after` is seconds until another try makes sense, without jitter.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str,
        *,
        rule: str | None = None,
        retry_after: float | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.rule = rule
        self.retry_after = retry_after
        self.param = param


class InternalError(Refusal):
    """A bug of ours: the traceback is in the log under the request id."""


class BadRequest(Refusal):
    status, code, type = 400, "bad_request", "invalid_request_error"


class MethodNotAllowed(BadRequest):
    status = 405


class UnsupportedEncoding(BadRequest):
    """A request body with Content-Encoding: it is never decompressed."""

    status = 415


class ExpectationFailed(BadRequest):
    status = 417


class Unauthenticated(Refusal):
    status, code, type = 401, "unauthenticated", "authentication_error"


class Forbidden(Refusal):
    status, code, type = 403, "forbidden", "permission_error"


class NoRoute(Refusal):
    status, code, type = 404, "no_route", "invalid_request_error"


class ModelNotFound(Refusal):
    status, code, type = 404, "model_not_found", "invalid_request_error"


class ClientTimeout(Refusal):
    status, code, type = 408, "client_timeout", "invalid_request_error"


class BodyTooLarge(Refusal):
    status, code, type = 413, "too_large", "invalid_request_error"


class HeaderTooLarge(BodyTooLarge):
    status = 431


class RateLimited(Refusal):
    status, code, type = 429, "rate_limited", "rate_limit_error"


class ConcurrencyExceeded(RateLimited):
    code = "concurrency"


class BackendsBusy(RateLimited):
    """Every backend tried answered 429: their own queues are full."""

    code = "queue_full"


class UpstreamFailed(Refusal):
    status, code, type = 502, "upstream_failed", "server_error"


class NoBackend(Refusal):
    status, code, type = 503, "no_backend", "server_error"


class CircuitOpen(NoBackend):
    code = "circuit_open"


class Overloaded(NoBackend):
    code = "overloaded"


class KeysUnavailable(NoBackend):
    code = "keys_unavailable"


class StoreUnavailable(NoBackend):
    """A plan with `when_store_is_down: closed` while Redis is away."""

    code = "overloaded"


class Draining(NoBackend):
    code = "draining"


class UpstreamTimeout(Refusal):
    status, code, type = 504, "upstream_timeout", "server_error"


class DeadlineExceeded(UpstreamTimeout):
    code = "deadline"
