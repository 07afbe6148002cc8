"""The data path over real sockets, before a backend that answers with exactly the bytes of each story."""

import asyncio
import json

import pytest

from discovery.endpoint import id_of_place
from tests.support.raw_client import CHAT, RawClient, chat_request
from tests.support.running_gateway import OPEN_POLICY, policy_with, running_gateway, until
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend

pytestmark = pytest.mark.integration

LOOP = "uvloop"
STREAM = {**CHAT, "stream": True}


def event(content: str, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"delta": {"content": content}, "finish_reason": finish}]})


async def last_request(gateway):
    await until(gateway.recent.requests)
    return gateway.recent.requests()[0]


# Answers that go well


async def test_an_answer_passes_with_the_headers_that_the_contract_promises(tmp_path) -> None:
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            answer = await client.ask(None, "x-request-id: mine-1")
    assert (answer.status, answer.json["usage"]["completion_tokens"]) == (200, 5)
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-weir-policy"] == gateway.policy.policy.version
    assert answer.headers["x-weir-backend"] == id_of_place(backend.url)
    assert "127.0.0.1" not in str(answer.headers)  # nobody learns a backend's address
    assert answer.headers["x-weir-attempts"] == "1"
    request = await last_request(gateway)
    assert (request["end_reason"], request["tokens_in"], request["tokens_out"]) == ("ok", 3, 5)


async def test_phases_add_up_to_the_total(tmp_path) -> None:
    async def slow(connection: BackendConnection) -> None:
        await asyncio.sleep(0.1)
        await connection.json({})

    async with ScriptedBackend(slow) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            timing = (await client.ask()).headers["server-timing"]
    phases = {name: float(value) for name, value in (part.split(";dur=") for part in timing.split(", "))}
    total = phases.pop("total")
    assert set(phases) == {"auth", "limit", "body", "queue", "pick", "connect", "upstream"}
    assert sum(phases.values()) == pytest.approx(total, rel=0.05)
    assert total > 99


async def test_the_backend_is_told_how_urgent_the_plan_is_whatever_the_client_says(tmp_path) -> None:
    plans = "plans: {p: {priority: low}}\nconsumers: [{match: {any: true}, plan: p}]\n"
    async with (
        ScriptedBackend() as backend,
        running_gateway(tmp_path, backend.url, policy=OPEN_POLICY + plans) as gateway,
    ):
        async with RawClient(gateway.data_address) as client:
            assert (await client.ask(None, "x-weir-priority: high", "X_Weir_Priority: high")).status == 200
    lines = backend.heads[0].lower().split(b"\r\n")
    assert [line for line in lines if b"priority" in line] == [b"x-weir-priority: low"]
    assert b"x-weir-consumer: anonymous" in lines


async def test_the_backend_sees_who_asks_and_nothing_that_the_client_made_up(tmp_path) -> None:
    spoofed = [
        "x-weir-consumer: root",
        "x-weir-priority: high",
        "x-forwarded-for: 1.2.3.4",
        "x-weir-deadline-ms: 1",
        "authorization: Bearer x.y.z",
    ]
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            assert (await client.ask(None, *spoofed, "x-team: blue")).status == 200
    head = backend.heads[0].lower()
    assert head.count(b"x-weir-consumer: ") == 1
    assert b"x-weir-consumer: anonymous\r\n" in head
    assert b"x-weir-priority" not in head
    assert b"x-forwarded-for: 127.0.0.1\r\n" in head
    assert b"x-forwarded-proto: http\r\n" in head
    assert b"x-forwarded-host: gateway\r\n" in head
    assert b"x-team: blue\r\n" in head
    assert b"authorization" not in head
    assert b"traceparent: 00-" in head
    deadline = int(head.split(b"x-weir-deadline-ms: ")[1].split(b"\r\n")[0])
    assert 99_000 < deadline <= 100_000
    assert backend.bodies[0] == json.dumps(CHAT).encode()


async def test_events_pass_one_by_one_and_byte_for_byte(tmp_path) -> None:
    seen = asyncio.Event()

    async def stream(connection: BackendConnection) -> None:
        await connection.begin_events()
        await connection.chunk(f"data: {event('one')}\n\n".encode())
        await asyncio.wait_for(seen.wait(), 5)  # the client must have the first before the second is sent
        for byte in f": hi\r\n\r\ndata: {event('two', 'stop')}\n\ndata: [DONE]\n\n".encode():
            await connection.chunk(bytes([byte]))
        await connection.send(b"0\r\n\r\n")

    async with ScriptedBackend(stream) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(chat_request(STREAM))
            await client.reader.readuntil(event("one").encode())
            seen.set()
            rest = await client.reader.readuntil(b"0\r\n\r\n")
            assert b"[DONE]" in rest
    assert gateway.recent.requests()[-1]["end_reason"] == "ok"


async def test_a_missing_done_is_added_when_the_backend_had_finished(tmp_path) -> None:
    async def stream(connection: BackendConnection) -> None:
        await connection.events(event("a"), event("b", "stop"), done=False)

    async with ScriptedBackend(stream) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            answer = await client.ask(STREAM)
    assert answer.whole
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_plain_paths_head_and_http10(tmp_path) -> None:
    async def page(connection: BackendConnection) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 2\r\nset-cookie: a=b\r\n\r\n"
        await connection.send(head if connection.head.startswith(b"HEAD") else head + b"hi")

    async with ScriptedBackend(page) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(b"GET /page?x=1 HTTP/1.1\r\nhost: a\r\n\r\n")
            answer = await client.answer()
            assert (answer.body, "set-cookie" in answer.headers) == (b"hi", False)
            client.send(b"HEAD /page HTTP/1.1\r\nhost: a\r\n\r\n")
            assert (await client.answer("HEAD")).headers["content-length"] == "2"
            client.send(b"GET /page HTTP/1.0\r\n\r\n")
            old = await client.answer()
            assert (old.body, old.headers["connection"]) == (b"hi", "close")
            assert await client.reader.read() == b""
    assert backend.heads[0].startswith(b"GET /page?x=1 HTTP/1.1\r\n")


async def test_health_and_models_are_answered_here(tmp_path) -> None:
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            for path, expected in [
                ("/healthz", {"live": True}),
                ("/v2/health/live", {"live": True}),
                ("/v2/health/ready", {"ready": True}),
            ]:
                client.send(f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
                answer = await client.answer()
                assert (answer.status, answer.json) == (200, expected)
            client.send(b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n")
            assert [model["id"] for model in (await client.answer()).json["data"]] == ["tiny"]
            client.send(b"GET /v1/models/none HTTP/1.1\r\nhost: a\r\n\r\n")
            assert (await client.answer()).json["error"]["code"] == "model_not_found"
    assert backend.heads == []


async def test_a_hundred_pipelined_requests_are_answered_in_order(tmp_path) -> None:
    async def echo(connection: BackendConnection) -> None:
        await connection.json({"id": json.loads(connection.body)["id"]})

    async with ScriptedBackend(echo) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(b"".join(chat_request({**CHAT, "id": number}) for number in range(100)))
            assert [(await client.answer()).json["id"] for _ in range(100)] == list(range(100))


async def test_connections_to_the_backend_are_kept_and_used_again(tmp_path) -> None:
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url) as gateway:
        probes = backend.connections
        async with RawClient(gateway.data_address) as client:
            for _ in range(20):
                assert (await client.ask()).status == 200
        assert backend.connections <= probes + 2  # one of ours; a health check may have opened another


# Answers that break


@pytest.mark.parametrize(
    ("name", "sends", "status"),
    [
        ("nothing", b"", 502),
        ("half a head", b"HTTP/1.1 200 OK\r\ncontent-ty", 502),
        ("half a body", b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{", 502),
        ("half a body without framing", b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{", 502),
        ("not HTTP", b"SSH-2.0-OpenSSH\r\n\r\n", 502),
        ("unasked upgrade", b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", 502),
        ("a redirect", b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n", 502),
        ("two lengths", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\n{}", 502),
        ("length and chunks", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 502),
        ("NUL in a header", b"HTTP/1.1 200 OK\r\nx: a\x00b\r\ncontent-length: 0\r\n\r\n", 502),
        ("status 999", b"HTTP/1.1 999 X\r\ncontent-length: 0\r\n\r\n", 502),
        ("an error page", b"HTTP/1.1 500 X\r\ncontent-type: text/html\r\ncontent-length: 9\r\n\r\nTraceback", 502),
        ("busy", b"HTTP/1.1 429 X\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n", 429),
        ("overloaded", b"HTTP/1.1 503 X\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n", 503),
        ("JSON to the end of the connection", b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{}", 200),
        ("a bad parameter", b"HTTP/1.1 400 X\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}", 400),
    ],
)  # fmt: skip
async def test_before_the_first_byte_a_broken_answer_becomes_an_error_of_ours(tmp_path, name, sends, status) -> None:
    async def script(connection: BackendConnection) -> None:
        await connection.send(sends)
        raise Hangup

    async with ScriptedBackend(script) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            answer = await client.ask()
            assert answer.status == status, name
            assert b"Traceback" not in answer.body
            assert b":%d" % backend.port not in answer.body
            if status >= 429:
                assert answer.json["error"]["request_id"] == answer.headers["x-request-id"]
            if "retry-after" in answer.headers:
                assert 7 <= int(answer.headers["retry-after"]) <= 9
    assert len(backend.heads) == 1  # a prompt is not run twice silently


@pytest.mark.parametrize("ending", ["fin", "rst", "chunked end"])
async def test_a_stream_that_breaks_ends_with_an_error_event_and_is_cut(tmp_path, ending) -> None:
    async def stream(connection: BackendConnection) -> None:
        await connection.begin_events()
        await connection.chunk(f"data: {event('one')}\n\n".encode())
        await connection.chunk(b'data: {"half')
        await asyncio.sleep(0.05)
        if ending == "rst":
            connection.reset()
        if ending == "chunked end":
            await connection.send(b"0\r\n\r\n")
        raise Hangup

    async with ScriptedBackend(stream) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            answer = await client.ask(STREAM)
    assert not answer.whole
    events = answer.body.decode().strip().split("\n\n")
    assert events[0] == f"data: {event('one')}"
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "upstream_failed"
    assert b"[DONE]" not in answer.body
    assert b"half" not in answer.body
    assert (await last_request(gateway))["end_reason"] == "stream_truncated"


async def test_an_event_stream_without_framing_is_whole_only_with_its_last_event(tmp_path) -> None:
    async def stream(connection: BackendConnection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        await connection.send(f"data: {event('one')}\n\n".encode())
        if json.loads(connection.body).get("finish"):
            await connection.send(b"data: [DONE]\n\n")
        raise Hangup

    async with ScriptedBackend(stream) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            answer = await client.ask({**STREAM, "finish": 1})
            assert answer.whole
            assert not (await client.ask(STREAM)).whole


async def test_junk_behind_an_answer_does_not_reach_the_next_request(tmp_path) -> None:
    async def poison(connection: BackendConnection) -> None:
        await connection.json({"n": connection.requests})
        await connection.send(
            b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 12\r\n\r\n{"evil":true}'
        )

    async with ScriptedBackend(poison) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            for _ in range(10):
                assert "evil" not in (await client.ask()).json


async def test_an_event_larger_than_the_bound_is_cut(tmp_path) -> None:
    async def giant(connection: BackendConnection) -> None:
        await connection.begin_events()
        await connection.chunk(b"data: {}\n\n")
        for _ in range(40):
            await connection.chunk(b"x" * 65536)
        await connection.wait_closed()
        raise Hangup

    async with ScriptedBackend(giant) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            answer = await client.ask(STREAM)
    assert not answer.whole
    assert b"xxxx" not in answer.body
    assert b'"error"' in answer.body


# Time


@pytest.mark.parametrize(
    ("timeout", "sends", "code"),
    [
        ("{first_byte: 100ms}", b"", "upstream_timeout"),
        ("{total: 100ms}", b"", "deadline"),
        ("{idle: 100ms}", b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5\r\n\r\n{", "upstream_timeout"),
    ],
)  # fmt: skip
async def test_each_timeout_ends_in_504_and_lets_the_backend_go(tmp_path, timeout, sends, code) -> None:
    closed = asyncio.Event()

    async def stall(connection: BackendConnection) -> None:
        await connection.send(sends)
        await connection.wait_closed()
        closed.set()
        raise Hangup

    policy = policy_with(timeout=timeout)
    async with ScriptedBackend(stall) as backend, running_gateway(tmp_path, backend.url, policy=policy) as gateway:
        async with RawClient(gateway.data_address) as client:
            answer = await client.ask()
            assert (answer.status, answer.json["error"]["code"]) == (504, code)
        await asyncio.wait_for(closed.wait(), 2)


async def test_a_stream_that_stalls_ends_with_an_error_event(tmp_path) -> None:
    async def stall(connection: BackendConnection) -> None:
        await connection.begin_events()
        await connection.chunk(b"data: {}\n\n")
        await connection.wait_closed()
        raise Hangup

    policy = policy_with(timeout="{idle: 100ms}")
    async with ScriptedBackend(stall) as backend, running_gateway(tmp_path, backend.url, policy=policy) as gateway:
        async with RawClient(gateway.data_address) as client:
            answer = await client.ask(STREAM)
    assert not answer.whole
    assert b'"upstream_timeout"' in answer.body


# Clients that leave or dawdle


@pytest.mark.parametrize("phase", ["before the first byte", "in the middle of a stream", "in the middle of a body"])
@pytest.mark.parametrize("how", ["close", "abort"])
async def test_when_the_client_leaves_the_backend_is_let_go_at_once(tmp_path, phase, how) -> None:
    begun, closed = asyncio.Event(), asyncio.Event()

    async def endless(connection: BackendConnection) -> None:
        if phase == "in the middle of a stream":
            await connection.begin_events()
            await connection.chunk(b"data: {}\n\n")
        elif phase == "in the middle of a body":
            await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
        begun.set()
        await connection.wait_closed()
        closed.set()
        raise Hangup

    async with ScriptedBackend(endless) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(chat_request(STREAM if "stream" in phase else None))
            await asyncio.wait_for(begun.wait(), 5)
            if phase == "in the middle of a stream":
                await client.reader.readuntil(b"data: {}")
            if how == "close":
                client.writer.close()
            else:
                client.writer.transport.abort()
            await asyncio.wait_for(closed.wait(), 0.25)
        assert (await last_request(gateway))["end_reason"] == "client_abort"
        backend_of = next(iter(gateway.fleet.backends.values()))
        assert (backend_of.inflight, gateway.pipeline.inflight, len(gateway.forwarder.relays)) == (0, 0, 0)
        assert backend_of.breaker_state.value == "closed"


async def test_a_slow_reader_stops_the_backend_and_bounds_memory(tmp_path) -> None:
    sent = 0

    async def flood(connection: BackendConnection) -> None:
        nonlocal sent
        await connection.begin_events()
        piece = b"data: " + b"x" * 16_000 + b"\n\n"
        for _ in range(4000):
            await connection.chunk(piece)
            sent += len(piece)

    async with ScriptedBackend(flood) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(chat_request(STREAM))
            await client.reader.readuntil(b"\r\n\r\n")
            client.writer.transport.pause_reading()
            before = -1
            while before != sent:  # until nothing moves any more
                before = sent
                await asyncio.sleep(0.2)
            assert sent < 32_000_000  # what the kernel's socket buffers hold, of 64 MB
            connection = next(iter(gateway.forwarder.relays))._client
            assert connection.transport.get_write_buffer_size() < 1_000_000


async def test_a_slow_reader_leaves_a_connection_that_works(tmp_path) -> None:
    """In the pool it is read again, although reading was paused when the answer ended."""
    size = 8_000_000

    async def large(connection: BackendConnection) -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ncontent-length: {size}\r\n\r\n"
        await connection.send(head.encode() + b"x" * size)

    async with ScriptedBackend(large) as backend, running_gateway(tmp_path, backend.url) as gateway:
        probes = backend.connections
        for _ in range(3):
            async with RawClient(gateway.data_address) as client:
                client.send(chat_request())
                await client.reader.readuntil(b"\r\n\r\n")
                client.writer.transport.pause_reading()
                (relay,) = gateway.forwarder.relays
                await until(lambda relay=relay: relay._stalled_since)
                client.writer.transport.resume_reading()
                assert len(await asyncio.wait_for(client.reader.readexactly(size), 5)) == size
            await until(lambda: not gateway.forwarder.relays)
        assert backend.connections <= probes + 3


async def test_a_body_that_comes_too_slowly_is_408_and_not_charged(tmp_path) -> None:
    policy = OPEN_POLICY + "plans: {p: {requests: 1/hour}}\nconsumers: [{match: {any: true}, plan: p}]\n"
    config = "limits: {body_timeout: 100ms}\n"
    async with (
        ScriptedBackend() as backend,
        running_gateway(tmp_path, backend.url, policy=policy, config=config) as gateway,
    ):
        async with RawClient(gateway.data_address) as client:
            client.send(chat_request()[:-5])
            answer = await client.answer()
            assert (answer.status, answer.json["error"]["code"]) == (408, "client_timeout")
        async with RawClient(gateway.data_address) as client:
            assert (await client.ask()).status == 200  # the one request of this hour is still there
            assert (await client.ask()).status == 429
    assert len(backend.heads) == 1


async def test_a_head_that_comes_too_slowly_is_408(tmp_path) -> None:
    config = "limits: {head_timeout: 100ms}\n"
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, config=config) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(b"POST /v1/chat")
            assert (await client.answer()).status == 408
            assert await client.reader.read() == b""


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "bad_request"),
        (b"GET / HTTP/2.0\r\nhost: a\r\n\r\n", 400, "bad_request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad_request"),
        (b"GET /v1/models HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", 400, "bad_request"),
        (b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: +5\r\n\r\n12345", 400, "bad_request"),
        (b"GET /x HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 40_000 + b"\r\n\r\n", 431, "too_large"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 431, "too_large"),
        (b"GET /x HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 200 + b"\r\n", 431, "too_large"),
        (b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n", 413, "too_large"),
        (b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\nx", 415, "bad_request"),
        (b"POST /x HTTP/1.1\r\nhost: a\r\nexpect: magic\r\ncontent-length: 1\r\n\r\nx", 417, "bad_request"),
        (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", 405, "bad_request"),
    ],
)  # fmt: skip
async def test_malformed_requests_are_refused_in_json_without_an_echo(tmp_path, request_bytes, status, code) -> None:
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(request_bytes)
            answer = await asyncio.wait_for(client.answer(), 3)
            assert (answer.status, answer.json["error"]["code"]) == (status, code)
            assert answer.headers["connection"] == "close"
            assert "server" not in answer.headers
            assert b"aaaa" not in answer.body
    assert backend.heads == []
    assert len(gateway.recent.requests()) == 1


async def test_a_client_that_expects_100_is_asked_for_its_body_only_when_it_may_send(tmp_path) -> None:
    closed = OPEN_POLICY.replace(
        "anonymous: true", 'issuers: [{issuer: "https://i", audience: a, algorithms: [ES256], jwks: k.json}]'
    )
    (tmp_path / "k.json").write_text('{"keys": []}')
    request = chat_request(None, "expect: 100-continue")
    head, _, body = request.partition(b"\r\n\r\n")
    async with ScriptedBackend() as backend:
        async with running_gateway(tmp_path, backend.url, policy=closed) as gateway:
            async with RawClient(gateway.data_address) as client:
                client.send(head + b"\r\n\r\n")
                assert (await client.answer()).status == 401
        async with running_gateway(tmp_path, backend.url) as gateway, RawClient(gateway.data_address) as client:
            client.send(head + b"\r\n\r\n")
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(body)
            assert (await client.answer()).status == 200


# Several backends


async def test_a_dead_backend_costs_nobody_a_request(tmp_path) -> None:
    async with ScriptedBackend() as alive, ScriptedBackend() as dead:
        async with running_gateway(tmp_path, alive.url, dead.url, policy=policy_with(balance="round_robin")) as gateway:
            await dead.stop()
            async with RawClient(gateway.data_address) as client:
                answers = [await client.ask() for _ in range(10)]
    assert [answer.status for answer in answers] == [200] * 10
    assert "2" in {answer.headers["x-weir-attempts"] for answer in answers}


async def test_with_nobody_to_reach_it_is_503(tmp_path) -> None:
    async with ScriptedBackend() as dead, running_gateway(tmp_path, dead.url) as gateway:
        await dead.stop()
        async with RawClient(gateway.data_address) as client:
            answer = await client.ask()
    assert (answer.status, answer.json["error"]["code"]) == (503, "no_backend")
    assert "retry-after" in answer.headers


async def test_a_connection_that_died_while_idle_is_replaced_for_free(tmp_path) -> None:
    async def once(connection: BackendConnection) -> None:
        if connection.requests > 1:
            raise Hangup  # as a server does that had just closed this connection
        await connection.json({})

    async with ScriptedBackend(once) as backend, running_gateway(tmp_path, backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            answers = [await client.ask() for _ in range(6)]
        assert [answer.status for answer in answers] == [200] * 6
        assert {answer.headers["x-weir-attempts"] for answer in answers} == {"1"}
        assert next(iter(gateway.fleet.backends.values())).breaker_state.value == "closed"


async def test_a_breaker_opens_on_failures_and_lets_probes_close_it(tmp_path) -> None:
    failing = True

    async def script(connection: BackendConnection) -> None:
        await connection.json({}, 500 if failing else 200)

    policy = policy_with(
        breaker="{failures: 50%, of_at_least: 5, window: 10s, open: 200ms, probes: 1, eject_at_most: 100%}"
    )
    async with ScriptedBackend(script) as backend, running_gateway(tmp_path, backend.url, policy=policy) as gateway:
        async with RawClient(gateway.data_address) as client:
            assert [(await client.ask()).status for _ in range(5)] == [502] * 5
            refused = await client.ask()
            assert (refused.status, refused.json["error"]["code"]) == (503, "circuit_open")
            assert len(backend.heads) == 5
            failing = False
            only = next(iter(gateway.fleet.backends.values()))
            breaker = next(iter(only._breakers.values()))
            await until(lambda: breaker.is_available(gateway.clock()))
            assert [(await client.ask()).status for _ in range(3)] == [200] * 3


async def test_the_breaker_ignores_bad_requests_and_clients_that_leave(tmp_path) -> None:
    async def script(connection: BackendConnection) -> None:
        await connection.json({"error": {}}, 400)

    policy = policy_with(
        breaker="{failures: 50%, of_at_least: 3, window: 10s, open: 5s, probes: 1, eject_at_most: 100%}"
    )
    async with ScriptedBackend(script) as backend, running_gateway(tmp_path, backend.url, policy=policy) as gateway:
        async with RawClient(gateway.data_address) as client:
            assert [(await client.ask()).status for _ in range(10)] == [400] * 10


async def test_unknown_paths_and_models_are_404(tmp_path) -> None:
    policy = OPEN_POLICY.replace('"/*"', "/v1/*")
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, policy=policy) as gateway:
        async with RawClient(gateway.data_address) as client:
            assert (await client.ask(path="/other")).json["error"]["code"] == "no_route"
            assert (await client.ask({**CHAT, "model": "huge"})).json["error"]["code"] == "model_not_found"
            assert (await client.ask({"messages": []})).json["error"]["param"] == "model"
    assert backend.heads == []


async def test_draining_tells_streams_that_are_left(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.drain.ACCEPT_SECONDS", 0.0)
    monkeypatch.setattr("gateway.drain.DRAIN_SECONDS", 0.2)

    async def endless(connection: BackendConnection) -> None:
        await connection.begin_events()
        await connection.chunk(b"data: {}\n\n")
        await connection.wait_closed()
        raise Hangup

    async with ScriptedBackend(endless) as backend:
        async with running_gateway(tmp_path, backend.url) as gateway:
            client = await RawClient(gateway.data_address).__aenter__()
            client.send(chat_request(STREAM))
            head = await client.reader.readuntil(b"data: {}")
        body = head + await client.reader.read()
        client.writer.close()
    assert b'"code":"draining"' in body
    assert not body.endswith(b"0\r\n\r\n")
    assert (await last_request(gateway))["end_reason"] == "drain"
