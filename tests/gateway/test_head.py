import pytest

from gateway import head as module
from gateway.head import Head, action_of
from observability.traceparent import TraceParent
from policies import errors

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def head_of(*lines: str) -> Head:
    return Head([(name.encode(), value.encode()) for name, _, value in (line.partition(": ") for line in lines)])


@pytest.mark.parametrize(
    "line",
    [
        "x-forwarded-for: 1.2.3.4", "X-Forwarded-Host: evil", "forwarded: for=1.2.3.4", "x-real-ip: 1.2.3.4",
        "x-weir-consumer: root", "X-Weir-Deadline-Ms: 1", "x_weir_consumer: root", "traceparent: junk", "te: trailers",
        "keep-alive: 3", "proxy-authorization: Basic x", "upgrade: websocket", "accept-encoding: gzip",
        "x-request-id: mine", "authorization: Bearer secret", "transfer-encoding: chunked", "x-consumer-id: root",
        "content-length: 3", "expect: 100-continue", "connection: keep-alive",
    ],
)  # fmt: skip
def test_what_only_the_gateway_may_say_does_not_go_on(line) -> None:
    assert head_of("host: gateway", line).forwarded == b"x-forwarded-host: gateway\r\n"


HOP = "1.1 weir-0123456789abcdef"


@pytest.mark.parametrize(
    ("lines", "via"),
    [
        ([], b""),
        (["via: 1.1 evil", "via: 1.0 fred, 1.1 p.example.net"], b""),
        ([f"via: {HOP}"], HOP.encode()),
        ([f"via: 1.1 cdn, {HOP}", f"Via: {HOP} (comment)"], f"{HOP}, {HOP}".encode()),
        (["via: 1.1 weir-0123", "via: 1.1 weir-\t0123456789abcdef"], b""),
    ],
)
def test_of_those_who_handed_a_request_on_only_gateways_are_told(lines, via) -> None:
    head = head_of(*lines)
    assert head.via == via
    assert head.forwarded == (b"via: %b\r\n" % via if via else b"")


def test_other_headers_go_on_less_those_that_connection_names() -> None:
    head = head_of("X-Team: blue", "x-hop: 1", "connection: keep-alive, X-Hop", "Content-Type: a/b", "tracestate: a=1")
    assert head.forwarded == b"X-Team: blue\r\ncontent-type: a/b\r\ntracestate: a=1\r\n"
    assert head.content_type == b"a/b"


@pytest.mark.parametrize(
    ("lines", "refusal"),
    [
        (["host: a", "host: a"], errors.BadRequest),
        (["host: user@evil"], errors.BadRequest),
        (["host: a/b"], errors.BadRequest),
        (["expect: junk"], errors.ExpectationFailed),
        (["content-encoding: gzip"], errors.UnsupportedEncoding),
        (["authorization: Bearer a", "authorization: Bearer b"], errors.BadRequest),
        (["connection: authorization"], errors.BadRequest),
        (["connection: close, x-weir-consumer"], errors.BadRequest),
        (["connection: Content-Length"], errors.BadRequest),
        (["transfer-encoding: gzip, chunked"], errors.BadRequest),
        (["transfer-encoding: ,chunked"], errors.BadRequest),
        (["transfer-encoding: xchunked"], errors.BadRequest),
        (["transfer-encoding: chunked;a=b"], errors.BadRequest),
        (["transfer-encoding: chunked", "transfer-encoding: chunked"], errors.BadRequest),
        (["Transfer_Encoding: chunked"], errors.BadRequest),
        (["transfer---encoding: chunked"], errors.BadRequest),
        (["Content_Length: 3"], errors.BadRequest),
    ],
)
def test_what_two_readers_could_understand_differently_is_refused(lines, refusal) -> None:
    with pytest.raises(refusal):
        head_of(*lines)


@pytest.mark.parametrize(
    ("line", "attribute", "value"),
    [
        ("Host: a:80", "host", b"a:80"),
        ("Authorization: Bearer x", "authorization", b"Bearer x"),
        ("connection: Close", "closes", True),
        ("connection: Upgrade, HTTP2-Settings", "closes", True),  # another protocol may follow
        ("connection: keep-alive", "closes", False),
        ("expect: 100-Continue", "expects_continue", True),
        ("transfer-encoding: chunked", "chunked", True),
        ("Transfer-Encoding: CHUNKED \t", "chunked", True),
        ("Host: a:80 \t", "host", b"a:80"),  # what stands behind a value is no part of it (RFC 9110, 5.5)
        ("x-team: blue ", "forwarded", b"x-team: blue\r\n"),
        ("content-encoding: identity", "chunked", False),
        ("authorization: Bearer x  ", "authorization", b"Bearer x"),
        ("expect: 100-continue ", "expects_continue", True),
        ("x-request-id: abc-1", "request_id", b"abc-1"),
        ("x-request-id: a b", "request_id", b""),
        ("x-request-id: " + "a" * 65, "request_id", b""),
        ("traceparent: " + TRACE, "parent", TraceParent(TRACE[3:35], TRACE[36:52], 1)),
        ("traceparent: junk", "parent", None),
        ("tracestate: " + "a" * 513, "forwarded", b""),
    ],
)
def test_what_a_line_says(line, attribute, value) -> None:
    assert getattr(head_of(line), attribute) == value


def test_the_memory_of_header_names_is_bounded() -> None:
    for number in range(3000):
        action_of(b"x-made-up-%d" % number)
    assert len(module._actions) <= 1024
    assert action_of(b"x_made_up") == action_of(b"forwarded")
