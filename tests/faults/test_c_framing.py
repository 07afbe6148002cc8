"""Rows C of the fault matrix: HTTP's framing and headers. What other people have collected is in tests/corpora/."""

import asyncio
import json
import time

import pytest

from policies.identity import generate_signing_key, jwks_of, mint
from tests.support.raw_client import CHAT, Answer, RawClient, chat_request
from tests.support.running_gateway import OPEN_POLICY, policy_with
from tests.support.scripted_backend import BackendConnection, ScriptedBackend

pytestmark = pytest.mark.integration

HIDDEN = b"GET /hidden HTTP/1.1\r\nhost: hidden\r\n\r\n"
IDP = "https://idp.example"


def post(*lines: str, body: bytes = b"", path: str = "/x", version: str = "1.1", host: bool = True) -> bytes:
    head = [f"POST {path} HTTP/{version}", *(["host: a"] if host else []), *lines, "", ""]
    return "\r\n".join(head).encode("latin-1") + body


def chunked(body: bytes) -> bytes:
    return post("transfer-encoding: chunked", body=body)


async def answers_to(gateway, data: bytes, pieces: int = 0) -> list[Answer]:
    """All that a client gets who sends this, in one piece or in many, until the gateway closes its connection."""
    answers = []
    async with RawClient(gateway.data_address) as client:
        for start in range(0, len(data), pieces or len(data)):
            if not client.writer.is_closing():
                client.send(data[start : start + (pieces or len(data))])
                await asyncio.sleep(0)
        try:
            while True:
                answers.append(await asyncio.wait_for(client.answer(), 20))
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return answers


async def assert_refused(gateway, data: bytes, status: int = 400, pieces: int = 0) -> None:
    """One refusal that closes, and nothing of the request in it; what stands behind it is not looked at."""
    (answer,) = await answers_to(gateway, data, pieces)
    assert (answer.status, answer.headers["connection"]) == (status, "close"), data[:100]
    assert answer.json["error"]["code"] == ("too_large" if status in (413, 431) else "bad_request"), data[:100]
    assert b"hidden" not in answer.body
    assert b"x-evil" not in answer.body


async def served(gateway, request: bytes) -> Answer:
    async with RawClient(gateway.data_address) as client:
        client.send(request)
        return await asyncio.wait_for(client.answer(), 20)


def header_of(head: bytes, name: str) -> list[bytes]:
    """The values of a header that reached the backend."""
    lines = [line.partition(b":") for line in head.split(b"\r\n")[1:] if line]
    return [value.strip() for key, _, value in lines if key.lower() == name.encode()]


# Framing


async def test_C01_lengths_that_two_readers_could_differ_on(row):
    rows = [
        ["content-length: 5", "transfer-encoding: chunked"],
        ["transfer-encoding: chunked", "content-length: 5"],
        ["content-length: 5", "content-length: 5"],
        ["content-length: 5", "content-length: 6"],
        *([f"content-length:{value}"] for value in (
            " 5, 5", " 5,6", " +5", " -5", " 0x5", " 5_0", "", " ", " 5 5", " 5;", " five", " 5.0", " 1e1", " \x0b5", " ٥".encode().decode("latin-1"),
            " 18446744073709551616", " 99999999999999999999999999",
        )),
    ]  # fmt: skip
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        for lines in rows:
            await assert_refused(gateway, post(*lines, body=b"0\r\n\r\n" + HIDDEN))
        await assert_refused(gateway, post("content-length: 1" + "0" * 18, body=HIDDEN), 413)
        assert backend.heads == []


async def test_C02_a_length_with_zeros_before_it_is_told_anew(row):
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        body = json.dumps(CHAT).encode()
        for length in (f"00{len(body)}", f"{len(body):010}", f"  {len(body)} \t"):
            request = post(f"content-length: {length}", body=body, path="/v1/chat/completions")
            assert (await served(gateway, request)).status == 200
        assert [header_of(head, "content-length") for head in backend.heads] == [[b"%d" % len(body)]] * 3
        assert backend.bodies == [body] * 3


async def test_C03_transfer_codings(row):
    values = [
        ",chunked", "chunked,", "chunked, identity", "identity, chunked", "gzip, chunked", "xchunked", "chunkedx", "chunked chunked",
        "chunked;q=1", '"chunked"', "\x0bchunked", "chunked\x00", "\xa0chunked", "chun ked", "gzip", "identity", "",
    ]  # fmt: skip
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        for value in values:
            await assert_refused(gateway, post(f"transfer-encoding: {value}", body=b"0\r\n\r\n" + HIDDEN))
        twice = post("transfer-encoding: chunked", "transfer-encoding: chunked", body=b"0\r\n\r\n" + HIDDEN)
        await assert_refused(gateway, twice)
        await assert_refused(gateway, post("transfer-encoding: chunked", version="1.0", body=b"0\r\n\r\n" + HIDDEN))
        assert backend.heads == []
        for spelling in ("Transfer-Encoding: chunked", "TRANSFER-ENCODING: CHUNKED", "transfer-encoding:\tchunked  "):
            assert (await served(gateway, post(spelling, body=b"2\r\nhi\r\n0\r\n\r\n"))).status == 200
        assert backend.bodies == [b"hi"] * 3
        assert [header_of(head, "transfer-encoding") for head in backend.heads] == [[]] * 3  # framed by a length


GOOD_CHUNKS = [
    b"2\r\nhi\r\n0\r\n\r\n", b"1\r\nh\r\n1\r\ni\r\n0\r\n\r\n", b"02\r\nhi\r\n0\r\n\r\n", b"0002\r\nhi\r\n000\r\n\r\n",
    b"2;a\r\nhi\r\n0\r\n\r\n", b"2;a=b\r\nhi\r\n0;c=d\r\n\r\n", b'2;a="b c"\r\nhi\r\n0\r\n\r\n',
    b"2\r\nhi\r\n0\r\nx-evil: 1\r\n\r\n", b"2\r\nhi\r\n0\r\nauthorization: Bearer x\r\nhost: evil\r\n\r\n",
    b"2\r\nhi\r\n0\r\nx-weir-consumer: root\r\nx-evil: 1\r\n\r\n",
]  # fmt: skip
BAD_CHUNKS = [
    b"0_2\r\nhi\r\n", b"-1\r\nhi\r\n", b"+2\r\nhi\r\n", b"0x2\r\nhi\r\n", b" 2\r\nhi\r\n", b"2 \r\nhi\r\n", b"\t2\r\nhi\r\n",
    b"2\t\r\nhi\r\n", b"g\r\nhi\r\n", b"\r\nhi\r\n", b";a=b\r\nhi\r\n", b"2,2\r\nhi\r\n", b"2.0\r\nhi\r\n", b"2\x00\r\nhi\r\n",
    b"2\x0b\r\nhi\r\n", b"2\xa0\r\nhi\r\n", b"2\nhi\r\n", b"2\rhi\r\n", b"2\n\rhi\r\n", b"2\r\r\nhi\r\n", b"2\r\nhi\n0\r\n\r\n",
    b"2\r\nhi\r0\r\n\r\n", b"2\r\nhi0\r\n\r\n", b"2\r\nhii\r\n0\r\n\r\n", b"1\r\nhi\r\n0\r\n\r\n", b"2;\nhi\r\n", b"2;a\nhi\r\n",
    b"2;a=\x00\r\nhi\r\n", b"2;a=b\rc\r\nhi\r\n", b"2;a=b\nc\r\nhi\r\n", b'2;a="\r\nhi\r\n', b"2; \r\nhi\r\n",
    b"2 ;a\r\nhi\r\n", b"10000000000000000\r\nhi\r\n", b"ffffffffffffffffff\r\nhi\r\n", b"00000000000000000g\r\nhi\r\n",
    b"2\r\nhi\r\n0\r\nx-evil\r\n\r\n", b"2\r\nhi\r\n0\r\nx-evil : 1\r\n\r\n", b"2\r\nhi\r\n0\r\n folded: 1\r\n\r\n",
    b"2\r\nhi\r\n0\r\n: 1\r\n\r\n", b"2\r\nhi\r\n0\r\nx: a\x00b\r\n\r\n", b"2\r\nhi\r\n0\r\nx: a\nb: c\r\n\r\n",
    b"2\r\nhi\r\n0\r\ncontent-length: 9\r\n\r\n",
]  # fmt: skip


async def test_C04_chunks(row):
    """53 ways to write two bytes in chunks."""
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        for body in GOOD_CHUNKS:
            assert (await served(gateway, chunked(body))).status == 200, body
        assert backend.bodies == [b"hi"] * len(GOOD_CHUNKS)
        told = b"".join(backend.heads).lower()
        assert b"x-evil" not in told
        assert b"authorization" not in told
        assert b"root" not in told
        for body in BAD_CHUNKS:
            await assert_refused(gateway, chunked(body + HIDDEN))
            await assert_refused(gateway, chunked(body + HIDDEN), pieces=7)
        assert len(backend.heads) == len(GOOD_CHUNKS)
    assert len(GOOD_CHUNKS) + len(BAD_CHUNKS) == 53


@pytest.mark.parametrize("flood", [b"2;" + b"a" * 999, b"2\r\nhi\r\n0\r\nx-evil: ", b"2\r\nhi\r\n0\r\nx-evil: 1"])
async def test_C04_framing_without_an_end(row, flood):
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            answer = asyncio.create_task(client.answer())
            client.send(chunked(flood))
            while not answer.done():
                client.send(b"a" * 1000)
                await asyncio.sleep(0.001)
            answer = await answer
        assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request")
        assert backend.heads == []
    assert row.lines[0]["bytes_in"] <= 2


async def test_C05_head_lines(row):
    lines = [
        b"x: a\r\n b\r\n", b"x: a\r\n\tb\r\n", b" x: a\r\n", b"x : a\r\n", b"x\t: a\r\n", b": a\r\n", b"x\r\n", b"x: a\nb: c\r\n",
        b"x: a\rb: c\r\n", b"x: a\x00\r\n", b"\x00x: a\r\n", b"x\x00: a\r\n", b"x: \x01\r\n", b"x: \x7f\r\n", b"x(y): a\r\n",
        b"x@y: a\r\n", b"x\xe9: a\r\n", b"\xa0x: a\r\n", b"x: a\r\r\n", b"x: a\n", b"\nx: a\r\n", b"\rx: a\r\n",
    ]  # fmt: skip
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        for line in lines:
            request = b"GET /x HTTP/1.1\r\nhost: a\r\n" + line + b"x-evil: 1\r\n\r\n"
            await assert_refused(gateway, request + HIDDEN)
        assert backend.heads == []


@pytest.mark.parametrize("pieces", [0, 1000, 1], ids=["whole", "in pieces", "byte by byte"])
async def test_C06_heads_that_are_too_large(row, pieces):
    """Scale: a limit of 8 KiB (32 KiB by default)."""
    heads = [
        b"GET /x HTTP/1.1\r\nhost: a\r\nx-evil: " + b"a" * 9000 + b"\r\n\r\n",
        b"GET /x HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 200 + b"\r\n",
        b"GET /" + b"a" * (70_000 if pieces != 1 else 9000) + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        b"GET /x HTTP/1.1\r\nhost: a\r\n" + b"a" * 9000 + b": y\r\n\r\n",
    ]
    async with ScriptedBackend() as backend:
        async with row.gateway(backend.url, config="limits: {header: 8KiB}\n") as gateway:
            for head in heads:
                await assert_refused(gateway, head + HIDDEN, 431, pieces)
        assert backend.heads == []
    assert [(line["status"], line["end_reason"]) for line in row.lines] == [(431, "parse_error")] * len(heads)


# Where to, and in which protocol


async def test_C07_hosts_and_targets(row):
    hosts = [
        ["host: a", "host: a"], ["host: a", "host: b"], ["host: user@a"], ["host: a/b"], ["host: a:b"], ["host: a:123456"],
        ["host: "], ["host: a b"], ["host: a,b"], ["host: [::1"], ["host: a\\b"], ["host: a?b"], ["host: a#b"], ["host: \xe9"],
    ]  # fmt: skip
    targets = [
        "http://evil/x", "http://a/x", "HTTP://a/x", "//evil/x".replace("//", "://"), "*", "a:443", "x", "?x", "#", "/x#y", "/x?y#z",
        "/\xe9", "/x\x7f", "/x\t",
    ]  # fmt: skip
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        for lines in [[], *hosts]:
            await assert_refused(gateway, post(*lines, "content-length: 0", host=False) + HIDDEN)
        for target in targets:
            await assert_refused(gateway, post("content-length: 0", path=target) + HIDDEN)
        await assert_refused(gateway, b"CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n" + HIDDEN, 405)
        assert backend.heads == []
        # A client's Host is told to the backend as what it is, and routes nothing.
        for host in ("evil.example", "evil.example:0", "[::1]:80"):
            assert (await served(gateway, post(f"host: {host}", "content-length: 0", host=False))).status == 200
            assert header_of(backend.heads[-1], "x-forwarded-host") == [host.encode()]
            assert header_of(backend.heads[-1], "host") == [f"127.0.0.1:{backend.port}".encode()]


async def test_C08_other_protocols(row):
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 512
    firsts = [
        b"GET /x\r\n\r\n", b"GET /x HTTP/0.9\r\nhost: a\r\n\r\n", b"GET /x HTTP/2.0\r\nhost: a\r\n\r\n",
        b"GET /x HTTP/1.2\r\nhost: a\r\n\r\n", b"GET /x HTTP/3\r\nhost: a\r\n\r\n", b"GET /x HTTPS/1.1\r\nhost: a\r\n\r\n",
        b"GET /x http/1.1\r\nhost: a\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", hello,
        b"SSH-2.0-OpenSSH_9.2\r\n", b"\x00" * 64, b"\x05\x01\x00", b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n", b"HTTP/1.1 200 OK\r\n\r\n",
    ]  # fmt: skip
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        for first in firsts:
            await assert_refused(gateway, first + HIDDEN)
        assert backend.heads == []
    assert [record for record in row.log if record["level"] in ("error", "critical")] == []


async def test_C09_bodies_where_none_belong(row):
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        for method in (b"GET", b"HEAD", b"DELETE", b"OPTIONS"):
            for framing in (b"content-length: 40", b"transfer-encoding: chunked"):
                request = b"%b /x HTTP/1.1\r\nhost: a\r\n%b\r\n\r\n" % (method, framing)
                async with RawClient(gateway.data_address) as client:
                    client.send(request + b"0\r\n\r\n" + HIDDEN)
                    answer = await client.answer(method.decode())
                    assert (answer.status, answer.headers["connection"]) == (400, "close")
                    assert await client.reader.read() == b""
        assert backend.heads == []
        for length in (b"0", b"000"):
            request = b"GET /x HTTP/1.1\r\nhost: a\r\ncontent-length: %b\r\n\r\n" % length
            assert (await served(gateway, request)).status == 200
            assert header_of(backend.heads[-1], "content-length") == []


# Headers


async def test_C10_what_connection_may_not_take_away(row):
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        for name in (
            "Authorization", "Content-Length", "Transfer-Encoding", "Host", "Content-Type", "Expect", "X-Forwarded-For",
            "X-Weir-Consumer", "X-Consumer-Id", "close, AUTHORIZATION", "keep-alive ,\tcontent-length",
        ):  # fmt: skip
            await assert_refused(gateway, post(f"connection: {name}", "content-length: 2", body=b"hi" + HIDDEN))
        assert backend.heads == []
        lines = ["connection: keep-alive, X-Hop", "connection: x-other", "x-hop: 1", "X-OTHER: 2", "x-stays: 3"]
        assert (await served(gateway, post(*lines, "content-length: 2", body=b"hi"))).status == 200
        head = backend.heads[0].lower()
        assert b"x-hop" not in head
        assert b"x-other" not in head
        assert header_of(head, "x-stays") == [b"3"]
        assert header_of(head, "x-weir-consumer") == [b"anonymous"]


async def test_C11_headers_of_one_hop(row):
    async def hop(connection: BackendConnection) -> None:
        await connection.json(
            {}, 200, "keep-alive: timeout=5", "te: trailers", "trailer: x", "upgrade: h2c", "proxy-authenticate: Basic",
            "proxy-connection: close", "set-cookie: a=b", "server: torch", "via: 1.1 x",
        )  # fmt: skip

    lines = [
        "keep-alive: timeout=5", "te: trailers", "trailer: x", "upgrade: h2c", "proxy-authorization: Basic x",
        "proxy-authenticate: Basic", "proxy-connection: close", "http2-settings: AAMAAABk",
    ]  # fmt: skip
    async with ScriptedBackend(hop) as backend, row.gateway(backend.url) as gateway:
        answer = await served(gateway, post(*lines, "content-length: 2", body=b"hi"))
        names = {line.partition(b":")[0].lower().decode() for line in backend.heads[0].split(b"\r\n")[1:] if line}
    gone = {line.partition(":")[0] for line in lines} | {"set-cookie", "server", "via", "connection"}
    assert answer.status == 200
    assert not (gone - {"via"}) & names  # ours: by it a request is known that comes back
    assert not gone & set(answer.headers)


async def test_C12_names_that_only_the_gateway_may_say(row):
    spoofed = [
        "x-forwarded-for: 6.6.6.6", "x-forwarded-proto: https", "x-forwarded-host: evil", "x-forwarded-port: 1", "forwarded: for=6.6.6.6",
        "x-real-ip: 6.6.6.6", "x-consumer-id: root", "x-consumer-username: root", "x-weir-consumer: root", "x-weir-deadline-ms: 1",
        "x-envoy-peer-metadata: root", "x-request-id: evil\x7f".replace("\x7f", " evil"), "traceparent: 00-evil-01", "via: 1.1 evil",
    ]  # fmt: skip
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        answer = await served(gateway, post(*spoofed, "content-length: 2", body=b"hi"))
        (head,) = backend.heads
    assert b"6.6.6.6" not in head
    assert b"root" not in head
    assert b"evil" not in head
    for name, value in [
        ("x-forwarded-for", b"127.0.0.1"), ("x-forwarded-proto", b"http"), ("x-forwarded-host", b"a"),
        ("x-weir-consumer", b"anonymous"), ("x-request-id", answer.headers["x-request-id"].encode()),
    ]:  # fmt: skip
        assert header_of(head, name) == [value]
    assert len(header_of(head, "traceparent")) == len(header_of(head, "x-weir-deadline-ms")) == 1
    assert len(answer.headers["x-request-id"]) == 32


async def test_C13_the_same_names_spelled_otherwise(row):
    dropped = ["x_weir_consumer: root", "X_WEIR-Consumer: root", "X-WEIR-CONSUMER: root", "x-Weir-consumer: root", "x_forwarded_for: 6.6.6.6"]  # fmt: skip
    refused = [
        "x-weir-consumer\x85: root",
        "\xa0x-weir-consumer: root",
        "x-weir-consumer\xa0: root",
        "x-weir-consumer : root",
    ]
    alike = ["transfer_encoding: chunked", "Content_Length: 2", "TRANSFER-_ENCODING: chunked", "content.length: 9"]
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        answer = await served(gateway, post(*dropped, *dropped, "content-length: 2", body=b"hi"))
        assert answer.status == 200
        (head,) = backend.heads
        assert b"root" not in head
        assert b"6.6.6.6" not in head
        assert header_of(head, "x-weir-consumer") == [b"anonymous"]
        for line in (*refused, *alike):
            await assert_refused(gateway, post(line, "content-length: 2", body=b"hi" + HIDDEN))
        assert len(backend.heads) == 1


async def test_C14_paths_that_two_readers_could_differ_on(row):
    nowhere = [
        "//v1/models", "/v1//models", "/v1/%2e%2e/admin", "/v1/../admin", "/v1/./models", "/v1/models/..", "/v1;x/models", "/v1/models;x",
        "/v1/%2fadmin", "/v1/%5cadmin", "/v1\\models", "/%61dmin", "/v1/%6dodels", "/v1/%2E%2E/%2E%2E/metrics",
    ]  # fmt: skip
    refused = ["/v1/%00", "/v1/%0d%0ax-evil:1", "/v1/models%0a", "/v1/models?x=%0D%0Ax-evil"]
    operators = ["/metrics", "/livez", "/readyz", "/api/backends", "/api/requests", "/"]
    policy = OPEN_POLICY.replace('"/*"', "/v1/*")
    async with ScriptedBackend() as backend, row.gateway(backend.url, policy=policy) as gateway:
        for path in nowhere:
            answer = await served(gateway, post("content-length: 2", path=path, body=b"hi"))
            assert (answer.status, answer.json["error"]["code"]) == (404, "no_route"), path
        for path in operators:  # 400: a route of any path wants a model
            answer = await served(gateway, f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
            assert answer.status in (400, 404), path
            assert b"weir_" not in answer.body
        for path in refused:
            await assert_refused(gateway, post("content-length: 2", path=path, body=b"hi"))
        assert backend.heads == []


async def test_C15_values_that_would_end_a_header_line(row):
    evil, odd = "tiny\r\nx-evil: 1\r\n\r\n<script>", "zo\u00eb x-evil: 1"
    key = generate_signing_key()
    tokens = [mint(key, sub=sub, issuer=IDP, audience="weir", ttl=300.0, wall=time.time()) for sub in (evil, odd)]
    row.secrets += tokens
    (row.home / "keys.json").write_bytes(jwks_of(key))
    issuer = f'issuers: [{{issuer: "{IDP}", audience: weir, algorithms: [ES256], jwks: keys.json}}]\n'
    async with ScriptedBackend() as backend:
        async with row.gateway(backend.url, policy=OPEN_POLICY + issuer) as gateway:
            for document, lines, status in [
                ({**CHAT, "model": evil}, [], 404),
                ({**CHAT, "user": evil}, [], 200),
                (CHAT, [f"authorization: Bearer {tokens[0]}"], 401),
                (CHAT, [f"authorization: Bearer {tokens[1]}"], 200),
            ]:
                answer = await served(gateway, chat_request(document, *lines))
                assert (answer.status, answer.whole, "x-evil" in answer.headers) == (status, True, False)
        assert [header_of(head, "x-evil") for head in backend.heads] == [[], []]
        assert header_of(backend.heads[1], "x-weir-consumer") == [b"zo%C3%AB x-evil: 1"]


async def test_C16_requests_for_another_protocol(row):
    websocket = (
        b"GET /x HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    h2c = chat_request(None, "connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABk")
    async with ScriptedBackend() as backend, row.gateway(backend.url, policy=policy_with()) as gateway:
        for request in (websocket, h2c):
            (answer,) = await answers_to(gateway, request + HIDDEN)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert "upgrade" not in answer.headers
        assert [header_of(head, "upgrade") + header_of(head, "connection") for head in backend.heads] == [[], []]
        assert backend.bodies == [b"", json.dumps(CHAT).encode()]
