from random import Random

import pytest

from gateway.call import Ids, accept
from policies import errors
from tests.support.call import MemoryClient
from tests.support.http_message import parse


def accepted(request: bytes, sample: float = 0.0):
    call = parse(request)
    call.connection = MemoryClient()
    Ids(Random(1)).give(call, sample)
    accept(call)
    return call


def head(target: str = "/v1/chat/completions", *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "host: gateway", *lines, "", ""]).encode("latin-1")


def test_a_plain_chat_request_is_accepted() -> None:
    call = accepted(head("/v1/chat/completions?x=1", "content-type: application/json", "Content-Length: 2") + b"{}")
    assert (call.method, call.resource.path, call.resource.protocol) == ("POST", "/v1/chat/completions", "openai")
    assert (call.keep_alive, call.content_length, call.body, call.is_whole) == (True, b"2", b"{}", True)
    assert call.header("content-type") == "application/json"
    assert call.header("absent") is None


@pytest.mark.parametrize(
    ("request_bytes", "refusal"),
    [
        (b"GET /x HTTP/1.1\r\n\r\n", errors.BadRequest),
        (head("/x", "host: again"), errors.BadRequest),
        (head("http://evil/x"), errors.BadRequest),
        (head("//v1/models"), errors.NoRoute),
        (head("/x", "expect: junk"), errors.ExpectationFailed),
        (head("/x", "content-length: 3", method="GET"), errors.BadRequest),
        (head("/x", "transfer-encoding: chunked", method="DELETE"), errors.BadRequest),
        (head("/x", method="TRACE"), errors.MethodNotAllowed),
        (b"PURGE /x HTTP/1.1\r\nhost: a\r\n\r\n", errors.MethodNotAllowed),
        (b"CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n", errors.MethodNotAllowed),
        (b"GET /x\r\n\r\n", errors.BadRequest),
        (b"GET /x HTTP/2.0\r\nhost: a\r\n\r\n", errors.BadRequest),
        (b"POST /x HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n", errors.BadRequest),
    ],
)
def test_what_two_readers_could_understand_differently_is_refused(request_bytes, refusal) -> None:
    with pytest.raises(refusal):
        accepted(request_bytes)


@pytest.mark.parametrize("length", ["0", "00", "0 \t"])
def test_a_length_of_nothing_is_no_body(length) -> None:
    assert accepted(head("/x", f"content-length: {length}", method="GET")).is_whole


def test_what_stands_behind_a_value_is_no_part_of_it() -> None:
    assert accepted(head("/x", "X-Team: blue \t")).header("x-team") == "blue"


def test_an_old_client_is_not_kept() -> None:
    call = accepted(b"POST /x HTTP/1.0\r\nconnection: keep-alive\r\ncontent-length: 1\r\n\r\n")
    assert (call.keep_alive, call.http10) == (False, True)


@pytest.mark.parametrize("line", ["connection: close", "connection: Upgrade, HTTP2-Settings"])
def test_who_wants_no_other_request_or_protocol_is_not_kept(line) -> None:
    assert not accepted(head("/x", line)).keep_alive


def test_a_sane_request_id_is_kept_and_another_is_replaced() -> None:
    call = accepted(head("/x", "x-request-id: abc-1"))
    assert (call.request_id, call.id_line) == ("abc-1", b"x-request-id: abc-1\r\n")
    call = accepted(head("/x", "x-request-id: a b"))
    assert call.id_line == b"x-request-id: %b\r\n" % call.request_id.encode()
    assert len(call.request_id) == 32


def test_a_trace_is_continued_but_its_sampled_flag_is_not_obeyed() -> None:
    call = accepted(head("/x", "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"))
    assert (call.trace_id, call.parent_span_id) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert call.sampled is False
    assert accepted(head("/x"), sample=1.0).sampled is True


def test_ids_are_random_digits_without_end() -> None:
    ids = Ids(Random(1))
    made = [ids.trace() for _ in range(5000)] + [ids.span() for _ in range(5000)]
    assert len(set(made)) == 10_000
    assert {len(one) for one in made[:5000]} == {32}
    assert {len(one) for one in made[5000:]} == {16}
    assert set("".join(made)) == set("0123456789abcdef")
