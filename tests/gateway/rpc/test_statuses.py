import grpc
import pytest

from gateway.rpc.statuses import Code, code_of, meaning_of
from policies import errors
from policies.retry import Failure


def test_the_numbers_are_those_of_grpc() -> None:
    assert {code.name: code.value for code in Code} == {code.name: code.value[0] for code in grpc.StatusCode}


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (errors.BadRequest, Code.INVALID_ARGUMENT),
        (errors.UnsupportedEncoding, Code.INVALID_ARGUMENT),
        (errors.ExpectationFailed, Code.INVALID_ARGUMENT),
        (errors.Unauthenticated, Code.UNAUTHENTICATED),
        (errors.Forbidden, Code.PERMISSION_DENIED),
        (errors.NoRoute, Code.NOT_FOUND),
        (errors.ModelNotFound, Code.NOT_FOUND),
        (errors.ClientTimeout, Code.DEADLINE_EXCEEDED),
        (errors.BodyTooLarge, Code.RESOURCE_EXHAUSTED),
        (errors.HeaderTooLarge, Code.RESOURCE_EXHAUSTED),
        (errors.RateLimited, Code.RESOURCE_EXHAUSTED),
        (errors.ConcurrencyExceeded, Code.RESOURCE_EXHAUSTED),
        (errors.BackendsBusy, Code.RESOURCE_EXHAUSTED),
        (errors.InternalError, Code.INTERNAL),
        (errors.UpstreamFailed, Code.UNAVAILABLE),
        (errors.NoBackend, Code.UNAVAILABLE),
        (errors.CircuitOpen, Code.UNAVAILABLE),
        (errors.Overloaded, Code.UNAVAILABLE),
        (errors.KeysUnavailable, Code.UNAVAILABLE),
        (errors.Draining, Code.UNAVAILABLE),
        (errors.UpstreamTimeout, Code.DEADLINE_EXCEEDED),
        (errors.DeadlineExceeded, Code.DEADLINE_EXCEEDED),
        (errors.LoopDetected, Code.FAILED_PRECONDITION),
    ],
)
def test_what_a_refusal_is_called(refusal, code) -> None:
    assert code_of(refusal("no")) is code


@pytest.mark.parametrize(
    ("code", "details", "not_started", "meaning"),
    [
        (Code.OK, "", False, (200, None)),
        (Code.INVALID_ARGUMENT, "shape", False, (400, None)),
        (Code.NOT_FOUND, "", False, (404, None)),
        (Code.UNIMPLEMENTED, "", False, (404, None)),
        (Code.FAILED_PRECONDITION, "", False, (400, None)),
        (Code.OUT_OF_RANGE, "", False, (400, None)),
        (Code.ALREADY_EXISTS, "", False, (409, None)),
        (Code.ABORTED, "", False, (409, None)),
        (Code.CANCELLED, "", False, (499, Failure.RESET)),
        (Code.UNKNOWN, "", False, (500, Failure.SERVER_ERROR)),
        (Code.INTERNAL, "", False, (500, Failure.SERVER_ERROR)),
        (Code.DATA_LOSS, "", False, (500, Failure.SERVER_ERROR)),
        (Code.DEADLINE_EXCEEDED, "", False, (504, Failure.SERVER_ERROR)),
        (Code.UNAVAILABLE, "", False, (503, Failure.SERVER_ERROR)),
        (Code.UNAVAILABLE, "", True, (503, Failure.NOT_STARTED)),
        (Code.UNAVAILABLE, "failed to connect to all addresses; last error: x", False, (0, Failure.CONNECT_FAIL)),
        (Code.INTERNAL, "", True, (500, Failure.SERVER_ERROR)),
        (Code.RESOURCE_EXHAUSTED, "queue full", False, (429, Failure.BUSY)),
        (Code.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (9 vs. 4)", False, (502, Failure.PROTOCOL)),
        (Code.UNAUTHENTICATED, "", False, (401, Failure.PROTOCOL)),  # it is us whom it does not know
        (Code.PERMISSION_DENIED, "", False, (403, Failure.PROTOCOL)),
        (77, "", False, (500, Failure.SERVER_ERROR)),
    ],
)
def test_what_a_backends_status_means(code, details, not_started, meaning) -> None:
    assert meaning_of(code, details, not_started=not_started) == meaning
