"""One tree of refusals: everything the gateway may answer instead of forwarding.

Each class is a noun with a fixed HTTP status and code (contract: "Refusals"); an instance adds the
message, the rule that decided, and when to come back. `gateway/rescue.py` alone turns one into bytes.
"""

from __future__ import annotations

from typing import ClassVar


class Refusal(Exception):  # noqa: N818  it is an answer, not an error of the program
    """A request that will not be forwarded, or whose forwarding failed before the first byte.

    `message` is fixed text, safe to show to any client. `rule` is the dotted policy path that decided
    (`plans.free.requests`). `retry_after` is seconds until another try makes sense, without jitter. `check` names the
    check that failed, from a fixed set; the log is told it, the client is not.
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
        check: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.rule = rule
        self.retry_after = retry_after
        self.param = param
        self.check = check


class InternalError(Refusal):
    """A bug of ours: the traceback is in the log under the request id."""


class BadRequest(Refusal):
    status = 400
    code = "bad_request"
    type = "invalid_request_error"


class MethodNotAllowed(BadRequest):
    status = 405


class UnsupportedEncoding(BadRequest):
    """A request body with Content-Encoding: it is never decompressed."""

    status = 415


class ExpectationFailed(BadRequest):
    status = 417


class Unauthenticated(Refusal):
    status = 401
    code = "unauthenticated"
    type = "authentication_error"


class Forbidden(Refusal):
    status = 403
    code = "forbidden"
    type = "permission_error"


class NoRoute(Refusal):
    status = 404
    code = "no_route"
    type = "invalid_request_error"


class ModelNotFound(Refusal):
    status = 404
    code = "model_not_found"
    type = "invalid_request_error"


class ClientTimeout(Refusal):
    status = 408
    code = "client_timeout"
    type = "invalid_request_error"


class BodyTooLarge(Refusal):
    status = 413
    code = "too_large"
    type = "invalid_request_error"


class HeaderTooLarge(BodyTooLarge):
    status = 431


class RateLimited(Refusal):
    status = 429
    code = "rate_limited"
    type = "rate_limit_error"


class ConcurrencyExceeded(RateLimited):
    code = "concurrency"


class BackendsBusy(RateLimited):
    """Every backend tried answered 429: their own queues are full."""

    code = "queue_full"


class UpstreamFailed(Refusal):
    status = 502
    code = "upstream_failed"
    type = "server_error"


class NoBackend(Refusal):
    status = 503
    code = "no_backend"
    type = "server_error"


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


class LoopDetected(Refusal):
    """The request has come through this gateway before: a registration leads back here."""

    status = 508
    code = "loop"


class UpstreamTimeout(Refusal):
    status = 504
    code = "upstream_timeout"
    type = "server_error"


class DeadlineExceeded(UpstreamTimeout):
    code = "deadline"
