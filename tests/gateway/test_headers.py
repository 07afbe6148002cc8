from random import Random

import pytest

from gateway import headers
from gateway.head import Head
from gateway.headers import STATUS_LINES, header_safe, is_sane_value, passing_name, request_head
from gateway.upstream.endpoint import Backend
from tests.support.call import call_of
from tests.support.upstream import endpoint


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        (b"Content-Type", b"content-type"),
        (b"DATE", b"date"),
        (b"openai-processing-ms", b"openai-processing-ms"),
        (b"Anthropic-RateLimit-Reset", b"anthropic-ratelimit-reset"),
        (b"openai-evil name", None),
        (b"openai-evil:", None),
        (b"content-type ", None),
        (b"set-cookie", None),
        (b"server", None),
        (b"location", None),
        (b"x-weir-backend", None),
        (b"ratelimit", None),
        (b"content-length", None),
        (b"access-control-allow-origin", None),
        (b"www-authenticate", None),
        (b"\xc3\xa9", None),
    ],
)
def test_which_headers_of_an_answer_pass(name, passes) -> None:
    assert passing_name(name) == passes
    assert passing_name(name) == passes  # remembered


def test_the_memory_of_names_is_bounded() -> None:
    for number in range(3000):
        passing_name(b"openai-%d" % number)
    assert len(headers._passes) <= 1024
    assert passing_name(b"openai-later") == b"openai-later"


@pytest.mark.parametrize(
    ("value", "sane"),
    [(b"text/html; a=b", True), (b"", True), (b"a\tb", True), (b"gr\xc3\xbc\xc3\x9fe", True), (b"a\nb", False), (b"a\rb", False), (b"a\x00b", False), (b"a\x7fb", False), (b"a\n", False)],
)  # fmt: skip
def test_values_cannot_end_their_line(value, sane) -> None:
    assert is_sane_value(value) is sane


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("alice@example.com", b"alice@example.com"),
        ("a b|c", b"a b|c"),
        ("größe", b"gr%C3%B6%C3%9Fe"),
        ("100%", b"100%25"),
        ("a\r\nx-evil: 1", b"a%0D%0Ax-evil: 1"),
    ],
)
def test_names_become_ascii(text, safe) -> None:
    assert header_safe(text) == safe


def test_every_status_that_may_pass_has_its_line() -> None:
    assert STATUS_LINES[200] == b"HTTP/1.1 200 OK\r\n"
    assert STATUS_LINES[599] == b"HTTP/1.1 599 Status\r\n"
    assert set(STATUS_LINES) == set(range(200, 600))


def head_of(call, base_path: str = "") -> list[bytes]:
    backend = Backend(endpoint(base_path=base_path), 0.0, Random(1), lambda backend, state: None)
    head = request_head(call, backend, b"alice", "00000000000000ab", 5000)
    assert head.endswith(b"\r\n\r\n")
    return head[:-4].split(b"\r\n")


def test_the_head_of_a_request_is_the_callers_in_our_frame() -> None:
    call = call_of("/v1/chat/completions?x=%20", "x-team: blue", "tracestate: a=1", "x-request-id: id-1")
    lines = head_of(call, "/llm")
    assert lines[:2] == [b"POST /llm/v1/chat/completions?x=%20 HTTP/1.1", b"host: 127.0.0.1:9000"]
    assert set(lines[2:]) == {
        b"endpoint-load-metrics-format: json",
        b"content-type: application/json",
        b"x-team: blue",
        b"x-forwarded-for: 10.0.0.9",
        b"x-forwarded-proto: http",
        b"x-forwarded-host: gateway",
        b"tracestate: a=1",
        b"traceparent: 00-%b-00000000000000ab-00" % call.trace_id.encode(),
        b"x-request-id: id-1",
        b"x-weir-consumer: alice",
        b"x-weir-deadline-ms: 5000",
        b"content-length: %d" % len(call.body),
    }


@pytest.mark.parametrize(
    ("method", "body", "told"),
    [
        ("POST", b"", [b"content-length: 0"]),
        ("PUT", b"ab", [b"content-length: 2"]),
        ("GET", b"", []),
        ("DELETE", b"", []),
    ],
)
def test_a_length_is_told_where_a_body_belongs(method, body, told) -> None:
    lines = head_of(call_of("/x", method=method, body=body))
    assert [line for line in lines if line.startswith(b"content-length")] == told


def test_an_old_client_without_a_host_has_none_to_forward() -> None:
    call = call_of("/x", method="GET", version="1.0")
    call.head = Head([])
    assert not any(line.startswith(b"x-forwarded-host") for line in head_of(call))
