"""The only tables of gRPC's status codes: what a refusal is called, and what a backend's status means. Pure.

The numbers are those of https://grpc.github.io/grpc/core/md_doc_statuscodes.html. Records and metrics speak of statuses
of HTTP, so each code has the one that comes nearest (https://cloud.google.com/apis/design/errors#handling_errors).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from policies.errors import Refusal
from policies.retry import Failure


class Code(IntEnum):
    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_OF_REFUSALS: Final = {
    400: Code.INVALID_ARGUMENT, 401: Code.UNAUTHENTICATED, 403: Code.PERMISSION_DENIED, 404: Code.NOT_FOUND,
    408: Code.DEADLINE_EXCEEDED, 413: Code.RESOURCE_EXHAUSTED, 429: Code.RESOURCE_EXHAUSTED,
    431: Code.RESOURCE_EXHAUSTED, 500: Code.INTERNAL, 502: Code.UNAVAILABLE, 503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED, 508: Code.FAILED_PRECONDITION,
}  # fmt: skip

# What the backend says of the call: it passes to the client, and says nothing about the backend.
_PASSING: Final = {
    Code.INVALID_ARGUMENT: 400, Code.NOT_FOUND: 404, Code.ALREADY_EXISTS: 409, Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409, Code.OUT_OF_RANGE: 400, Code.UNIMPLEMENTED: 404,
}  # fmt: skip

# What it says of itself. UNAUTHENTICATED and PERMISSION_DENIED are among it: it is us whom it does not know.
_FAILING: Final = {
    Code.CANCELLED: (499, Failure.RESET), Code.UNKNOWN: (500, Failure.SERVER_ERROR),
    Code.DEADLINE_EXCEEDED: (504, Failure.SERVER_ERROR), Code.PERMISSION_DENIED: (403, Failure.PROTOCOL),
    Code.RESOURCE_EXHAUSTED: (429, Failure.BUSY), Code.INTERNAL: (500, Failure.SERVER_ERROR),
    Code.UNAVAILABLE: (503, Failure.SERVER_ERROR), Code.DATA_LOSS: (500, Failure.SERVER_ERROR),
    Code.UNAUTHENTICATED: (401, Failure.PROTOCOL),
}  # fmt: skip

# gRPC's own words, which it tells as if the backend had said them.
_TOO_LARGE: Final = "eceived message larger than max"
_NO_CONNECTION: Final = "failed to connect to all addresses"  # it was lost since the call was begun


def code_of(refusal: Refusal) -> Code:
    """405, 415 and 417 do not come up over gRPC; what is not in the table is a bad request."""
    return _OF_REFUSALS.get(refusal.status, Code.INVALID_ARGUMENT)


def meaning_of(code: int, details: str, *, not_started: bool) -> tuple[int, Failure | None]:
    """The status of HTTP that a backend's comes nearest to, and what failed; None: it passes to the client.

    `not_started`: it said that it has done nothing yet (`x-backend-not-started`).
    """
    known = Code(code) if 0 <= code <= Code.UNAUTHENTICATED else Code.UNKNOWN
    if known is Code.OK:
        return 200, None
    if known in _PASSING:
        return _PASSING[known], None
    if known is Code.RESOURCE_EXHAUSTED and _TOO_LARGE in details:
        return 502, Failure.PROTOCOL
    status, failure = _FAILING[known]
    if known is Code.UNAVAILABLE and not_started:
        failure = Failure.NOT_STARTED
    elif known is Code.UNAVAILABLE and _NO_CONNECTION in details:
        return 0, Failure.CONNECT_FAIL
    return status, failure
