"""What clients are told in the place of an answer."""

from __future__ import annotations

from typing import Any

LONGEST_SHOWN = 200  # characters of a client's own text in a message of ours


class ApiError(Exception):
    """An answer in the error form of the OpenAI API. `headers` go out with it."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error as the client reads it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": self.param}}


def bad(message: str, param: str | None = None, code: str = "bad_request") -> ApiError:
    """A request that is wrong, and in which field."""
    return ApiError(400, code, message, param=param)


def unfit(place: str, reason: str) -> ApiError:
    """A schema that no answer is made to keep to, and where in the request it stands."""
    return bad(f"{place}: {reason}"[:LONGEST_SHOWN], place, "bad_schema")


def not_started(status: int, code: str, message: str) -> ApiError:
    """A refusal before any work: whoever balances over several backends may send the request to another one."""
    return ApiError(status, code, message, headers={"retry-after": "1", "x-backend-not-started": "true"})


def queue_full() -> ApiError:
    return not_started(429, "queue_full", "this backend has no room for another request now")


def loading() -> ApiError:
    return not_started(503, "loading", "this backend's model is being loaded")


def draining() -> ApiError:
    """The connection is closed, too, so that a client's next request finds another backend."""
    refusal = not_started(503, "draining", "this backend is ending and takes no new requests")
    refusal.headers |= {"x-draining": "true", "connection": "close"}
    return refusal


def worker_lost() -> ApiError:
    """No byte has gone out, and whatever was computed is gone: another backend may have the request."""
    return not_started(503, "engine_restarted", "the model's process ended while it worked on this request")


def engine_failed() -> ApiError:
    return ApiError(500, "engine_failed", "the model failed while it worked on this request")


def grammar_failed() -> ApiError:
    message = "the schema led to more work for each token than this server gives to one request; make it simpler"
    return bad(message, code="schema_too_complex")
