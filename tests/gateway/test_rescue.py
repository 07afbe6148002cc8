import json
from random import Random

import pytest

from gateway.rescue import error_body, error_event, refusal_bytes, retry_lines
from policies import errors


def every_refusal() -> list[type[errors.Refusal]]:
    found, todo = [], [errors.Refusal]
    while todo:
        kind = todo.pop()
        found.append(kind)
        todo += kind.__subclasses__()
    return found


@pytest.mark.parametrize("kind", every_refusal(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("protocol", ["openai", "anthropic", "oip", "http"])
def test_every_refusal_is_a_whole_http_answer_in_its_protocol(kind, protocol) -> None:
    answer = refusal_bytes(
        protocol, kind("No."), "id-1", b"x-request-id: id-1\r\n", Random(1), close=True, head_only=False
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % kind.status)
    assert b"content-length: %d\r\n" % len(body) in head
    assert head.endswith(b"connection: close")
    assert b"No." in body
    assert json.loads(body)


def test_openai_errors_name_code_rule_and_when_to_come_back() -> None:
    refusal = errors.RateLimited("Slow down.", rule="plans.free.requests", retry_after=3.2)
    assert json.loads(error_body("openai", refusal, "id-1")) == {
        "error": {
            "message": "Slow down.",
            "type": "rate_limit_error",
            "code": "rate_limited",
            "param": None,
            "request_id": "id-1",
            "rule": "plans.free.requests",
            "retry_after": 3.2,
        }
    }


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (errors.RateLimited("x"), "rate_limit_error"),
        (errors.Unauthenticated("x"), "authentication_error"),
        (errors.Overloaded("x"), "overloaded_error"),
        (errors.UpstreamFailed("x"), "api_error"),
    ],
)
def test_anthropic_errors_have_its_types(refusal, kind) -> None:
    assert json.loads(error_body("anthropic", refusal, "id-1"))["error"]["type"] == kind


def test_a_broken_stream_ends_with_one_event_of_its_protocol() -> None:
    refusal = errors.UpstreamFailed("Broke.")
    assert error_event("openai", refusal, "i").startswith(b'data: {"error":')
    assert error_event("openai", refusal, "i").endswith(b"}\n\n")
    assert error_event("anthropic", refusal, "i").startswith(b"event: error\ndata: ")
    assert error_event("http", refusal, "i") == b""


def test_when_to_come_back_is_jittered_and_never_too_early() -> None:
    refusal = errors.RateLimited("x", retry_after=2.0)
    waits = set()
    for seed in range(50):
        lines = dict(line.split(": ") for line in retry_lines(refusal, Random(seed)).decode().split("\r\n") if line)
        waits.add(int(lines["retry-after-ms"]))
        assert int(lines["retry-after"]) == 3
    assert all(2000 <= wait <= 2500 for wait in waits)
    assert len(waits) > 25


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (errors.BadRequest("x"), b""),
        (errors.NoBackend("x"), b"retry-after: "),
        (errors.RateLimited("x", retry_after=7200.0), b"x-should-retry: false"),
    ],
)
def test_who_is_told_to_come_back(refusal, expected) -> None:
    lines = retry_lines(refusal, Random(1))
    assert (expected in lines) if expected else lines == b""


def test_only_an_unauthenticated_caller_is_asked_for_a_token() -> None:
    def head(refusal: errors.Refusal) -> bytes:
        return refusal_bytes("openai", refusal, "i", b"", Random(1), close=False, head_only=True)

    assert b"www-authenticate: Bearer" in head(errors.Unauthenticated("x"))
    assert b"www-authenticate" not in head(errors.Forbidden("x"))
    assert head(errors.Forbidden("x")).endswith(b"\r\n\r\n")
