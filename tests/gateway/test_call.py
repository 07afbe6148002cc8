from random import Random

import pytest
from aiohttp.http_exceptions import HttpProcessingError

from gateway.call import Ids, accept, action_of, begin, peek
from policies import errors
from tests.support.http_message import parse


def call_of(request: bytes):
    message = parse(request)
    call = begin(message, Ids(Random(1)), 0.0)
    accept(call, message)
    return call


def head(target: str = "/v1/chat/completions", *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "host: gateway", *lines, "", ""]).encode("latin-1")


def test_a_plain_chat_request_is_accepted() -> None:
    call = call_of(head("/v1/chat/completions?x=1", "content-type: application/json", "content-length: 2"))
    assert (call.method, call.path, call.target) == ("POST", "/v1/chat/completions", "/v1/chat/completions?x=1")
    assert call.protocol == "openai"
    assert call.keep_alive
    assert call.content_length == b"2"


@pytest.mark.parametrize(
    ("path", "protocol", "model", "version"),
    [
        ("/v1/chat/completions", "openai", None, None),
        ("/v1/messages", "anthropic", None, None),
        ("/v2/models/resnet/infer", "oip", "resnet", None),
        ("/v2/models/resnet/versions/3/infer", "oip", "resnet", "3"),
        ("/v2/models/resnet/ready", "oip", "resnet", None),
        ("/v2/models/resnet/versions/3/generate", "oip", "resnet", "3"),
        ("/v2/models/resnet/infer/", "oip", "resnet", None),
        ("/v2/models/gr%C3%B6%20b/versions/a%2Bb/infer", "oip", "grö b", "a+b"),
        ("/v2/models", "oip", None, None),
        ("/hooks/a", "http", None, None),
    ],
)
def test_protocol_and_model_come_from_the_path(path, protocol, model, version) -> None:
    call = call_of(head(path))
    assert (call.protocol, call.model, call.version) == (protocol, model, version)


@pytest.mark.parametrize(
    ("request_bytes", "refusal"),
    [
        (b"GET /x HTTP/1.1\r\n\r\n", errors.BadRequest),
        (b"GET /x HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", errors.BadRequest),
        (head("/x", "host: again"), errors.BadRequest),
        (b"GET /x HTTP/1.1\r\nhost: user@evil\r\n\r\n", errors.BadRequest),
        (b"GET /x HTTP/1.1\r\nhost: a/b\r\n\r\n", errors.BadRequest),
        (head("http://evil/x"), errors.BadRequest),
        (head("/v1/%00"), errors.BadRequest),
        (head("/v1/a%0d%0ab"), errors.BadRequest),
        (head("//v1/models"), errors.NoRoute),
        (head("/v1/%2e%2e/admin"), errors.NoRoute),
        (head("/v1/../admin"), errors.NoRoute),
        (head("/v1/a;b"), errors.NoRoute),
        (head("/v1/a%5cb"), errors.NoRoute),
        (head("/v1/chat/completion%73"), errors.NoRoute),
        (head("/v2/models/%73ecret/infer"), errors.NoRoute),
        (head("/v2/models/a%5Fb/infer"), errors.NoRoute),
        (head("/x", "expect: junk"), errors.ExpectationFailed),
        (head("/x", "content-encoding: gzip"), errors.UnsupportedEncoding),
        (head("/x", "authorization: Bearer a", "authorization: Bearer b"), errors.BadRequest),
        (head("/x", "connection: authorization"), errors.BadRequest),
        (head("/x", "connection: close, x-weir-consumer"), errors.BadRequest),
        (head("/x", "content-length: 3", method="GET"), errors.BadRequest),
        (head("/x", method="TRACE"), errors.MethodNotAllowed),
        (b"PURGE /x HTTP/1.1\r\nhost: a\r\n\r\n", errors.MethodNotAllowed),
    ],
)
def test_what_two_readers_could_understand_differently_is_refused(request_bytes, refusal) -> None:
    with pytest.raises((refusal, HttpProcessingError)):  # some of it aiohttp's parser refuses already
        call_of(request_bytes)


@pytest.mark.parametrize(
    "line",
    [
        "x-forwarded-for: 1.2.3.4", "X-Forwarded-Host: evil", "forwarded: for=1.2.3.4", "x-real-ip: 1.2.3.4",
        "x-weir-consumer: root", "X-Weir-Deadline-Ms: 1", "x_weir_consumer: root", "traceparent: junk", "te: trailers",
        "keep-alive: 3", "proxy-authorization: Basic x", "upgrade: websocket", "accept-encoding: gzip",
        "x-request-id: mine", "authorization: Bearer secret", "transfer-encoding: chunked", "x-consumer-id: root",
    ],
)  # fmt: skip
def test_what_only_the_gateway_may_say_does_not_go_on(line) -> None:
    name = line.partition(":")[0].lower().encode()
    sent = b"".join(call_of(head("/x", line)).lines).lower()
    assert name not in sent


def test_an_old_client_is_not_kept_and_not_asked_for_its_body() -> None:
    call = call_of(b"POST /x HTTP/1.0\r\nconnection: keep-alive\r\nexpect: 100-continue\r\ncontent-length: 1\r\n\r\n")
    assert (call.keep_alive, call.expects_continue, call.http10) == (False, False, True)


def test_other_headers_go_on_less_those_that_connection_names() -> None:
    call = call_of(head("/x", "x-team: blue", "x-hop: 1", "connection: keep-alive, X-Hop"))
    assert call.lines == [b"x-team: blue\r\n"]


def test_a_sane_request_id_is_kept_and_another_is_replaced() -> None:
    assert call_of(head("/x", "x-request-id: abc-1")).request_id == "abc-1"
    assert len(call_of(head("/x", "x-request-id: a b")).request_id) == 32
    assert len(call_of(head("/x", "x-request-id: " + "a" * 65)).request_id) == 32


def test_a_trace_is_continued_but_its_sampled_flag_is_not_obeyed() -> None:
    call = call_of(head("/x", "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"))
    assert call.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert call.parent_span_id == 0xB7AD6B7169203331
    assert call.sampled is False


def test_the_memory_of_header_names_is_bounded() -> None:
    for number in range(3000):
        action_of(b"x-made-up-%d" % number)
    assert action_of(b"x_made_up") == action_of(b"forwarded")


def with_body(body: bytes, path: str = "/v1/chat/completions", content_type: str = "application/json"):
    call = call_of(head(path, f"content-type: {content_type}", f"content-length: {len(body)}"))
    call.body = body
    return call


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        (b'{"model":"tiny"}', ("tiny", False)),
        (b'{"model":"tiny","stream":true}', ("tiny", True)),
        (b'{"model":"tiny","stream":null,"messages":[{"model":1}]}', ("tiny", False)),
        ('{"model":"größe"}'.encode(), ("größe", False)),
    ],
)
def test_the_body_tells_model_and_stream(body, asked) -> None:
    assert peek(with_body(body)) == asked


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"model":1}', b'{"model":null}', b'{"model":""}', b"\xff",
        b'{"model":"a","stream":"yes"}', b'{"model":"a","model":"b"}', b'{"model":"a","mod\\u0065l":"b"}',
        b'{"model":"a","stream":false,"strea\\u006d":true}', b'{"model":"a","x":NaN}', b"[" * 100_000,
        b'{"model":"a"' + b',"x":{"y":' * 50_000, b'{"model":"a"} trailing',
    ],
)  # fmt: skip
def test_a_body_that_names_no_single_model_is_a_bad_request(body) -> None:
    with pytest.raises(errors.BadRequest):
        peek(with_body(body))


def test_a_form_names_its_model_in_a_field() -> None:
    kind = "multipart/form-data; boundary=b"
    field = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n\x00\x01\r\n--b--\r\n'
    assert peek(with_body(field + file, "/v1/audio/transcriptions", kind)).model == "whisper"
    with pytest.raises(errors.BadRequest):
        peek(with_body(field + field + file, "/v1/audio/transcriptions", kind))


@pytest.mark.parametrize(
    "disposition",
    [
        b"form-data; name=model",
        b'form-data;name="model"; filename="x"',
        b'form-data; filename="x"; name="model"',
        b'form-data; name = "model"',
        b"form-data; name*=utf-8''model",
    ],
)
def test_a_form_that_another_reader_could_find_a_model_in_is_refused(disposition) -> None:
    body = b"--b\r\nContent-Disposition: %b\r\n\r\nsecret\r\n--b--\r\n" % disposition
    with pytest.raises(errors.BadRequest):
        peek(with_body(body, "/v1/audio/transcriptions", "multipart/form-data; boundary=b"))


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=b", "text/plain"])
def test_a_path_that_takes_json_takes_nothing_else_for_it(kind) -> None:
    with pytest.raises(errors.BadRequest):
        peek(with_body(b"--b--", "/v1/chat/completions", kind))
    assert peek(with_body(b'{"model":"a"}', "/v1/chat/completions", kind)).model == "a"


def test_the_name_of_a_model_is_bounded() -> None:
    with pytest.raises(errors.BadRequest, match="at most 256"):
        peek(with_body(b'{"model":"%b"}' % (b"a" * 257)))


def test_a_body_with_two_stream_flags_is_a_bad_request() -> None:
    with pytest.raises(errors.BadRequest):
        peek(with_body(b'{"model":"a","stream":true,"stream":false}'))
    assert peek(with_body(b'{"model":"a","stream":true,"stream_options":{"include_usage":true}}')).stream
