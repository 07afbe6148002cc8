"""Requests as bytes, from what a client may send to what a backend is sent, beside another parser of HTTP (h11).

What is built here is mostly right, and then spoilt in a place or two: that is where two readers come apart.
"""

from random import Random
from typing import NamedTuple

import h11
from hypothesis import example, given, note
from hypothesis import strategies as st

from gateway.call import Call, Ids, accept
from gateway.headers import header_safe, request_head
from gateway.upstream.endpoint import Backend
from policies.errors import Refusal
from tests.support.http_message import heard
from tests.support.upstream import endpoint

NAMES = [
    "host", "Host", "content-length", "Content-Length", "transfer-encoding", "Transfer-Encoding", "connection",
    "authorization", "content-type", "content-encoding", "expect", "x-request-id", "traceparent", "tracestate", "x-team",
    "X-Team", "x-weir-consumer", "X-Forwarded-For", "forwarded", "te", "trailer", "upgrade", "keep-alive", "cookie",
    "x_weir_consumer", "accept-encoding", "transfer_encoding", "via", "x-consumer-id", "proxy-authorization", "",
    "content-length ", " x-folded", "x-té",
]  # fmt: skip
VALUES = [
    "gateway", "a:80", "a, b", "0", "3", "03", "+3", "3, 3", "3 ", "chunked", "Chunked", "identity", "gzip, chunked", "close",
    "keep-alive", "x-team", "host, x-team", "upgrade", "websocket", "h2c", "100-continue", "Bearer a.b.c", "application/json",
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "v=1", "x\ty", " x \t ", "gr\xfc\xdfe", "\x00", "\x0b", "a\x7f", "",
]  # fmt: skip
TARGETS = [
    "/", "/v1/chat/completions", "/v1/models?x=%20", "/v2/models/a%2Fb/infer", "//x", "/a/../b", "/a;b", "/%61", "/a b",
    "http://evil/x", "*", "a:443", "/\xe9", "/x#y", "/?", "", "/%00",
]  # fmt: skip
BODIES = [
    b"", b"abc", b"GET /hidden HTTP/1.1\r\nhost: x\r\n\r\n", b"3\r\nabc\r\n0\r\n\r\n", b"0\r\n\r\n", b"3;x=y\r\nabc\r\n0\r\nx: y\r\n\r\n",
    b"3\nabc\n0\n\n", b"0x3\r\nabc\r\n0\r\n\r\n", b"3 \r\nabc\r\n0\r\n\r\n", b"-1\r\n\r\n", b"3\r\nabcd\r\n0\r\n\r\n",
    b"00003\r\nabc\r\n000\r\n\r\n", b"fffffffffffffffff\r\na\r\n0\r\n\r\n", b"3\r\nabc\r\n",
]  # fmt: skip

header = st.tuples(
    st.sampled_from(NAMES), st.sampled_from([":", ": ", ":", ": ", ":\t", " : ", ""]), st.sampled_from(VALUES)
)
line_ends = st.sampled_from(["\r\n"] * 12 + ["\n", "\r", "\r\n\r\n", "\r\n "])


@st.composite
def messages(draw) -> bytes:
    """One request. Its framing is mostly that of its body."""
    method = draw(
        st.sampled_from(["POST", "POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS", "CONNECT", "PURGE", "post", ""])
    )
    target = draw(st.sampled_from(TARGETS[:3] * 3 + TARGETS))
    version = draw(
        st.sampled_from(["HTTP/1.1"] * 12 + ["HTTP/1.0", "HTTP/2.0", "http/1.1", "HTTP/1.1 ", "HTTP/0.9", ""])
    )
    body = draw(st.sampled_from(BODIES))
    framing = draw(
        st.sampled_from(
            [f"content-length: {len(body)}", f"content-length: {len(body)}", "transfer-encoding: chunked", "x: y"]
        )
    )
    lines = [
        f"{method} {target} {version}",
        "host: gateway",
        framing,
        *("".join(each) for each in draw(st.lists(header, max_size=4))),
    ]
    return "".join(line + draw(line_ends) for line in lines).encode("latin-1") + b"\r\n" + body


@st.composite
def streams(draw) -> bytes:
    """What comes on a connection: a few requests, and a few bytes of them lost, changed or added."""
    stream = bytearray(b"".join(draw(st.lists(messages(), min_size=1, max_size=3))))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(stream) - 1))
        stream[at : at + draw(st.integers(0, 2))] = draw(
            st.sampled_from([b"", b"\r", b"\n", b"\0", b" ", b":", b"\xff", b"a", b"0"])
        )
    return bytes(stream)


FORWARDED = b"x-forwarded-for: 10.0.0.9\r\nx-forwarded-proto: http\r\n"  # of a client's connection


class Read(NamedTuple):
    """What a request says, to whoever reads it."""

    method: bytes
    target: bytes
    lines: list[tuple[bytes, bytes]]
    body: bytes
    is_whole: bool


def read_by_us(stream: bytes) -> list[Call]:
    """The requests that would be served: whole, accepted, and none behind the first that costs the connection."""
    calls: list[Call] = []
    for call in heard(stream):
        if isinstance(call, Refusal) or not call.is_whole:
            break
        call.connection.forwarded_lines = FORWARDED
        Ids(Random(1)).give(call, 0.0)
        try:
            accept(call)
        except Refusal:
            break
        calls.append(call)
        if not call.keep_alive:
            break
    return calls


def told(call: Call) -> Read:
    lines = [(name.lower(), value.rstrip(b" \t")) for name, value in call.lines]
    if call.content_length:
        lines.append((b"content-length", call.content_length.rstrip(b" \t")))
    return Read(call.method.encode(), call.resource.encoded, sorted(lines), call.body, call.is_whole)


def read_by_h11(stream: bytes, count: int) -> list[Read]:
    """The first requests of a stream. Raises RemoteProtocolError where h11 takes none."""
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    server.receive_data(stream)
    found: list[Read] = []
    while len(found) < count:
        request = server.next_event()
        assert isinstance(request, h11.Request), request
        body, is_whole = b"", False
        while isinstance(event := server.next_event(), h11.Data):
            body += event.data
        is_whole = isinstance(event, h11.EndOfMessage)
        found.append(Read(request.method, request.target, sorted(map(tuple, request.headers)), body, is_whole))
        if len(found) < count:
            server.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            server.send(h11.EndOfMessage())
            server.start_next_cycle()
    return found


@given(streams(), st.sets(st.integers(1, 400), max_size=12))
def test_no_cut_changes_what_is_heard(stream, places) -> None:
    bounds = [0, *sorted(place for place in places if place < len(stream)), len(stream)]
    pieces = [stream[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    assert summary(heard(*pieces)) == summary(heard(stream))


def summary(calls: list[Call | Refusal]) -> list[object]:
    return [call.code if isinstance(call, Refusal) else (told(call), call.version, call.is_broken) for call in calls]


@given(streams())
def test_what_is_taken_another_reader_takes_the_same_way(stream) -> None:
    ours = [told(call) for call in read_by_us(stream)]
    note(repr(ours))
    assert read_by_h11(stream, len(ours)) == ours


@given(streams(), st.text(max_size=20))
@example(b"CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\ntransfer-encoding: websocket\r\n\r\nabc", "")
def test_what_goes_on_says_only_what_the_client_and_the_gateway_said(stream, consumer) -> None:
    """One request and no byte behind it, to two parsers, with the framing and the names that are the gateway's alone."""
    backend = Backend(endpoint(base_path="/base"), 0.0, Random(1), lambda backend, state: None)
    for call in read_by_us(stream):
        sent = request_head(call, backend, header_safe(consumer), "00000000000000ab", 5000) + call.body
        note(repr(sent))
        [seen] = read_by_h11(sent, 1)
        assert (seen.method, seen.target, seen.body, seen.is_whole) == (
            call.method.encode(),
            b"/base" + call.resource.encoded,
            call.body,
            True,
        )
        [again] = heard(sent)
        assert told(again) == seen
        assert again.is_whole
        check_lines(seen.lines, call, header_safe(consumer))


OURS = {
    b"endpoint-load-metrics-format": b"json",
    b"host": b"127.0.0.1:9000",
    b"traceparent": None,
    b"x-forwarded-for": b"10.0.0.9",
    b"x-forwarded-proto": b"http",
    b"x-request-id": None,
    b"x-weir-deadline-ms": b"5000",
}
STOPPED = {
    b"transfer-encoding", b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"forwarded", b"via", b"authorization",
    b"proxy-authorization", b"expect", b"accept-encoding", b"x-consumer-id", b"x_weir_consumer", b"transfer_encoding",
}  # fmt: skip


def check_lines(lines: list[tuple[bytes, bytes]], call: Call, consumer: bytes) -> None:
    names = [name for name, _ in lines]
    values = dict(lines)
    for name, value in OURS.items():
        assert names.count(name) == 1
        assert value is None or values[name] == value
    assert values[b"x-weir-consumer"] == consumer.strip()
    assert names.count(b"x-weir-consumer") == 1
    assert values.get(b"content-length") == (
        b"%d" % len(call.body) if call.body or call.method in ("POST", "PUT") else None
    )
    assert not STOPPED & set(names)
    sent = {(name.lower(), value.rstrip(b" \t")) for name, value in call.lines}
    others = [
        line for line in lines if line[0] not in (*OURS, b"x-weir-consumer", b"content-length", b"x-forwarded-host")
    ]
    assert set(others) <= sent
