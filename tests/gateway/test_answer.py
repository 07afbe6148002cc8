import pytest

from gateway.answer import AnswerHead, Mode, judge
from policies.retry import Failure
from tests.support.call import call_of

JSON = (b"Content-Type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
HTML = (b"content-type", b"text/html")
SIZED = (b"content-length", b"10")
CHUNKED = (b"transfer-encoding", b"chunked")


API, STREAM, PLAIN = call_of(), call_of(stream=True), call_of("/hooks")


@pytest.mark.parametrize(
    ("asked", "status", "headers", "verdict"),
    [
        (API, 200, [JSON, SIZED], Mode.HOLD),
        (API, 200, [JSON, CHUNKED], Mode.HOLD),
        (API, 200, [JSON], Mode.HOLD),
        (API, 200, [JSON, (b"content-length", b"9999999")], Mode.RAW),
        (API, 200, [(b"content-type", b"audio/mpeg"), CHUNKED], Mode.RAW),
        (API, 200, [(b"content-type", b"audio/mpeg")], Failure.PROTOCOL),
        (API, 200, [HTML, SIZED], Failure.PROTOCOL),
        (API, 200, [EVENTS], Mode.EVENTS),
        (API, 200, [EVENTS, (b"content-encoding", b"gzip")], Failure.PROTOCOL),
        (STREAM, 200, [EVENTS, CHUNKED], Mode.EVENTS),
        (STREAM, 200, [(b"content-type", b"text/plain"), CHUNKED], Failure.PROTOCOL),
        (API, 400, [JSON, SIZED], Mode.HOLD),
        (API, 404, [HTML, SIZED], Failure.PROTOCOL),
        (API, 401, [JSON, SIZED], Failure.PROTOCOL),
        (API, 429, [JSON, SIZED], Failure.BUSY),
        (API, 500, [JSON, SIZED], Failure.SERVER_ERROR),
        (API, 503, [SIZED], Failure.SERVER_ERROR),
        (API, 503, [SIZED, (b"X-Backend-Not-Started", b"true")], Failure.NOT_STARTED),
        (API, 101, [], Failure.PROTOCOL),
        (API, 100, [], Failure.PROTOCOL),
        (API, 302, [(b"location", b"http://169.254.169.254/"), SIZED], Failure.PROTOCOL),
        (API, 999, [SIZED], Failure.PROTOCOL),
        (API, 200, [JSON, SIZED, SIZED], Failure.PROTOCOL),
        (API, 200, [JSON, SIZED, CHUNKED], Failure.PROTOCOL),
        (API, 200, [JSON, CHUNKED, CHUNKED], Failure.PROTOCOL),
        (API, 200, [JSON, (b"transfer-encoding", b"gzip, chunked")], Failure.PROTOCOL),
        (API, 200, [JSON, (b"content-length", b"+1")], Failure.PROTOCOL),
        (API, 200, [(b"content-type", b"application/json\x00"), SIZED], Failure.PROTOCOL),
        (API, 200, [JSON, SIZED, (b"openai-note", b"x" * 8000)], Mode.HOLD),
        (API, 200, [JSON, SIZED, (b"openai-note", b"x" * 8001)], Failure.PROTOCOL),
        (API, 200, [JSON, SIZED, (b"x-note", b"x" * 8001)], Mode.HOLD),
        (API, 200, [JSON, (b"content-length", b" \t")], Failure.PROTOCOL),
        (API, 200, [JSON, (b"content-length", b"10 \t")], Mode.HOLD),  # what stands behind a value is no part of it
        (API, 200, [JSON, (b"transfer-encoding", b"chunked ")], Mode.HOLD),
        (API, 204, [], Mode.EMPTY),
        (call_of(method="HEAD"), 200, [SIZED], Mode.EMPTY),
        (PLAIN, 200, [HTML, SIZED], Mode.RAW),
        (PLAIN, 404, [HTML, SIZED], Mode.RAW),
        (PLAIN, 200, [HTML], Failure.PROTOCOL),
        (PLAIN, 200, [EVENTS, CHUNKED], Mode.EVENTS),
        (PLAIN, 500, [HTML, SIZED], Failure.SERVER_ERROR),
        (PLAIN, 304, [(b"etag", b"x")], Mode.EMPTY),
        (PLAIN, 304, [SIZED, SIZED], Failure.PROTOCOL),
        (PLAIN, 307, [SIZED], Failure.PROTOCOL),
        (API, 304, [], Failure.PROTOCOL),
    ],
)
def test_what_a_head_means(asked, status, headers, verdict) -> None:
    assert judge(asked, AnswerHead(status, headers)) is verdict


def test_only_listed_headers_pass() -> None:
    head = AnswerHead(
        200,
        [
            JSON, SIZED, (b"Set-Cookie", b"a=b"), (b"Server", b"torch"), (b"X-Powered-By", b"x"), (b"X-Weir-Backend", b"me"),
            (b"OpenAI-Model", b"tiny"), (b"Content-Length ", b"5"), (b"location", b"http://evil"), (b"connection", b"close"),
        ],
    )  # fmt: skip
    assert head.lines == b"content-type: application/json\r\nopenai-model: tiny\r\n"


def test_a_load_report_and_a_retry_after_are_read_but_do_not_pass() -> None:
    head = AnswerHead(503, [(b"endpoint-load-metrics", b"JSON {}"), (b"Retry-After", b"3")])
    assert (head.load_report, head.retry_after, head.lines) == (b"JSON {}", b"3", b"")
