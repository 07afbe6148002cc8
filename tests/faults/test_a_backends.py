"""Rows A of the fault matrix: backends and their streams. Timeouts are shortened by the policy of each row."""

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path

import openai
import pytest

from discovery.probe import Pace, Prober
from policies.breaker import State
from tests.support.admin_client import api, scrape
from tests.support.fault_proxy import FaultProxy
from tests.support.raw_client import CHAT, RawClient, chat_request
from tests.support.running_gateway import policy_with, until
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend, answer_ok
from tests.support.serving import serving
from tests.support.traffic import Traffic

pytestmark = pytest.mark.integration

STREAM = {**CHAT, "stream": True}
IN_TURN = policy_with(balance="round_robin")


def event(content: str, finish: str | None = None, **more) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}], **more})


def backend_at(gateway, place):
    """The gateway's backend whose address is that of a proxy or of a ScriptedBackend."""
    (found,) = [each for each in gateway.fleet.backends.values() if each.endpoint.port == place.port]
    return found


def breaker_at(gateway, place):
    (breaker,) = backend_at(gateway, place)._breakers.values()
    return breaker


def failures_at(gateway, place) -> int:
    return breaker_at(gateway, place)._failed.count(gateway.clock())


def told(answer) -> tuple[int, str]:
    return answer.status, answer.json["error"]["code"]


def breaker(**changes: str) -> str:
    rule = {
        "failures": "50%",
        "of_at_least": "3",
        "window": "10s",
        "open": "30s",
        "probes": "1",
        "eject_at_most": "100%",
    }
    return "{" + ", ".join(f"{key}: {value}" for key, value in {**rule, **changes}.items()) + "}"


async def ask(gateway, document=None, *lines: str):
    async with RawClient(gateway.data_address) as client:
        return await client.ask(document, *lines)


# Connections that are not made


async def test_A01_a_backend_that_refuses_connections(row):
    async with ScriptedBackend() as backend, FaultProxy(backend.port) as one, FaultProxy(backend.port) as other:
        async with row.gateway(one.url, other.url, policy=IN_TURN) as gateway:
            await one.refuse()
            answers = [await ask(gateway) for _ in range(8)]
            assert [answer.status for answer in answers] == [200] * 8
            retried = [answer.headers["x-weir-attempts"] for answer in answers].count("2")
            assert failures_at(gateway, one) == retried > 0
            await other.refuse()
            await other.reset()  # what the pool has kept
            answer = await ask(gateway)
    assert told(answer) == (503, "no_backend")
    assert int(answer.headers["retry-after"]) >= 1
    assert int(answer.headers["retry-after-ms"]) >= 1000
    assert [line["end_reason"] for line in row.lines] == ["ok"] * 8 + ["connect_fail"]


@pytest.mark.parametrize(
    ("timeout", "both", "end"),
    [("{connect: 100ms}", (503, "no_backend"), "connect_fail"), ("{connect: 5s, total: 200ms}", (504, "deadline"), "upstream_timeout")],
)  # fmt: skip
async def test_A02_a_backend_that_answers_no_syn(row, timeout, both, end):
    policy = policy_with(balance="round_robin", timeout=timeout)
    async with ScriptedBackend() as backend, FaultProxy(backend.port) as one, FaultProxy(backend.port) as other:
        async with row.gateway(one.url, other.url, policy=policy) as gateway:
            await one.ignore()
            if end == "connect_fail":  # then there is time for another backend
                assert [(await ask(gateway)).status for _ in range(8)] == [200] * 8
                assert failures_at(gateway, one) > 0
            await other.ignore()
            await other.reset()  # what the pool has kept
            assert told(await ask(gateway)) == both
    assert row.lines[-1]["end_reason"] == end
    assert row.lines[-1]["total_ms"] < 2000


# Answers that break before the first byte


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_A03_a_fresh_connection_that_ends_before_any_byte(row, how):
    async def hang_up(connection: BackendConnection) -> None:
        if how == "rst":
            connection.reset()
        raise Hangup

    async with ScriptedBackend(hang_up) as one, ScriptedBackend(hang_up) as other:
        async with row.gateway(one.url, other.url) as gateway:
            answer = await ask(gateway)
            assert sorted(failures_at(gateway, each) for each in (one, other) if each.heads) == [1]
    assert told(answer) == (502, "upstream_failed")
    assert "x-should-retry" not in answer.headers
    assert len(one.heads + other.heads) == 1  # the prompt is not run twice
    assert [(line["end_reason"], line["attempts"]) for line in row.lines] == [("upstream_reset", 1)]


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_A04_a_pooled_connection_that_turns_out_to_be_dead(row, how):
    async def once(connection: BackendConnection) -> None:
        if connection.requests > 1:  # as a server does that had just closed this connection
            if how == "rst":
                connection.reset()
            raise Hangup
        await connection.json({})

    async with ScriptedBackend(once) as backend, row.gateway(backend.url) as gateway:
        answers = [await ask(gateway) for _ in range(5)]
        assert failures_at(gateway, backend) == 0
        assert {budget._retries.count(gateway.clock()) for budget in gateway.forwarder._budgets.values()} == {0}
    assert [(answer.status, answer.headers["x-weir-attempts"]) for answer in answers] == [(200, "1")] * 5
    assert len(backend.heads) > 5


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_A05_a_backend_that_dies_after_half_a_head(row, how):
    async def answer_with_more(connection: BackendConnection) -> None:
        await connection.json({}, 200, "openai-model: tiny", "cache-control: no-store")

    async with ScriptedBackend(answer_with_more) as backend, FaultProxy(backend.port) as proxy:
        async with row.gateway(proxy.url) as gateway:
            proxy.to_client.cut_after, proxy.to_client.cut_by = 100, how
            answer = await ask(gateway)
            assert failures_at(gateway, proxy) == 1
    assert told(answer) == (502, "upstream_failed")
    assert "openai-model" not in answer.headers
    assert [line["end_reason"] for line in row.lines] == ["upstream_protocol"]


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_A06_a_backend_that_dies_in_the_middle_of_a_json_body(row, how):
    async def document(connection: BackendConnection) -> None:
        await connection.json({"text": "x" * json.loads(connection.body)["size"]})

    async with ScriptedBackend(document) as backend, FaultProxy(backend.port) as proxy:
        async with row.gateway(proxy.url) as gateway:
            proxy.to_client.cut_after, proxy.to_client.cut_by = 50_000, how
            held = await ask(gateway, {**CHAT, "size": 100_000})
            proxy.to_client.cut_after = 1_600_000  # more than is held back
            passing = await ask(gateway, {**CHAT, "size": 3_000_000})
            assert failures_at(gateway, proxy) == 2
    assert told(held) == (502, "upstream_failed")
    assert (passing.status, passing.whole) == (200, False)
    assert int(passing.headers["content-length"]) > 3_000_000 > len(passing.body) > 1_000_000
    assert [line["end_reason"] for line in row.lines] == ["upstream_protocol", "stream_truncated"]


# Streams


async def broken_off(connection: BackendConnection) -> None:
    await connection.begin_events()
    await connection.chunk(f"data: {event('one', usage={'prompt_tokens': 3, 'completion_tokens': 1})}\n\n".encode())
    await connection.chunk(b'data: {"half')
    await asyncio.sleep(0.05)  # what a backend sends and what becomes of it are two events
    if json.loads(connection.body).get("user") == "rst":
        connection.reset()
    raise Hangup


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_A07_a_backend_that_dies_in_the_middle_of_a_stream(row, how):
    async with ScriptedBackend(broken_off) as backend, row.gateway(backend.url) as gateway:
        answer = await ask(gateway, {**STREAM, "user": how})
        assert failures_at(gateway, backend) == 1
        client = openai.AsyncOpenAI(
            base_url=f"http://{gateway.data_address}/v1", api_key=row.token("ann"), max_retries=0
        )
        async with client, await client.chat.completions.create(**STREAM, user=how) as stream:
            assert (await anext(stream)).choices[0].delta.content == "one"
            with pytest.raises(openai.APIError, match="broke off"):
                await anext(stream)
    first, error, rest = answer.body.split(b"\n\n")
    assert (first, rest, answer.whole) == (
        f"data: {event('one', usage={'prompt_tokens': 3, 'completion_tokens': 1})}".encode(),
        b"",
        False,
    )
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "upstream_failed"
    assert [(line["end_reason"], line["tokens_in"], line["tokens_out"]) for line in row.lines] == [
        ("stream_truncated", 3, 1)
    ] * 2


async def test_A08_a_stream_that_only_the_end_of_the_connection_ends(row):
    async def unframed(connection: BackendConnection) -> None:
        await connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        await connection.send(f"data: {event('one')}\n\n".encode())
        if json.loads(connection.body).get("user") == "finish":
            await connection.send(f"data: {event('', 'stop')}\n\n".encode())
        raise Hangup

    async with ScriptedBackend(unframed) as backend, row.gateway(backend.url) as gateway:
        broken, finished = await ask(gateway, STREAM), await ask(gateway, {**STREAM, "user": "finish"})
        assert failures_at(gateway, backend) == 1
    assert not broken.whole
    assert b'"upstream_failed"' in broken.body
    assert b"[DONE]" not in broken.body
    assert finished.whole
    assert finished.body.endswith(b"data: [DONE]\n\n")
    assert [line["end_reason"] for line in row.lines] == ["stream_truncated", "ok"]


async def test_A09_a_finished_stream_without_done(row):
    async def undone(connection: BackendConnection) -> None:
        await connection.events(event("one"), event("two", "stop"), done=False)

    async with ScriptedBackend(undone) as backend, row.gateway(backend.url) as gateway:
        answer = await ask(gateway, STREAM)
    assert answer.whole
    assert answer.body == f"data: {event('one')}\n\ndata: {event('two', 'stop')}\n\ndata: [DONE]\n\n".encode()
    assert [line["end_reason"] for line in row.lines] == ["ok"]


# Backends that stall


async def test_A10_a_backend_that_stalls_before_the_first_byte(row):
    gone = asyncio.Event()

    async def stall(connection: BackendConnection) -> None:
        await connection.wait_closed()
        gone.set()
        raise Hangup

    async with ScriptedBackend(stall) as backend:
        async with row.gateway(backend.url, policy=policy_with(timeout="{first_byte: 100ms}")) as gateway:
            answer = await ask(gateway)
            await asyncio.wait_for(gone.wait(), 5)  # its place is free again
            assert failures_at(gateway, backend) == 1
    assert told(answer) == (504, "upstream_timeout")
    assert [(line["end_reason"], line["attempts"]) for line in row.lines] == [("upstream_timeout", 1)]


async def test_A10_an_answer_that_came_while_the_gateway_was_stopped(tmp_path):
    """For longer than the timeout: it lies in the kernel, and it was the gateway who could not read it."""

    async def answer_and_let_go_on_later(connection: BackendConnection) -> None:
        os.kill(weir.process.pid, signal.SIGSTOP)
        await until(lambda: " T " in Path(f"/proc/{weir.process.pid}/stat").read_text())
        await answer_ok(connection)
        await asyncio.sleep(3.5)
        os.kill(weir.process.pid, signal.SIGCONT)

    policy = policy_with(timeout="{connect: 1s, first_byte: 3s, idle: 3s, total: 60s}")
    async with (
        ScriptedBackend(answer_and_let_go_on_later) as backend,
        serving(tmp_path, backend.url, policy=policy) as weir,
        RawClient(weir.data_address) as client,
    ):
        assert (await client.ask()).status == 200


async def test_A11_a_backend_that_stalls_in_the_middle_of_a_stream(row, monkeypatch):
    """Scale: comments after 0.1 s of silence for 15 s, idle 0.5 s for 60 s. What stops is the line to the backend."""
    monkeypatch.setattr("gateway.relay.KEEP_ALIVE_SECONDS", 0.1)
    ending = asyncio.Event()

    async def tick(connection: BackendConnection) -> None:
        await connection.begin_events()
        while not ending.is_set():
            await connection.chunk(f"data: {event('tick')}\n\n".encode())
            await asyncio.sleep(0.03)
        await connection.chunk(f"data: {event('', 'stop')}\n\ndata: [DONE]\n\n".encode())
        await connection.send(b"0\r\n\r\n")

    policy = policy_with(balance="round_robin", timeout="{idle: 500ms}")
    async with ScriptedBackend(tick) as backend, FaultProxy(backend.port) as still, FaultProxy(backend.port) as alive:
        async with row.gateway(still.url, alive.url, policy=policy) as gateway, contextlib.AsyncExitStack() as stack:
            streams = {still.port: [], alive.port: []}
            while not all(streams.values()):
                client = await stack.enter_async_context(RawClient(gateway.data_address))
                before = backend_at(gateway, still).inflight
                client.send(chat_request(STREAM))
                await client.reader.readuntil(b"tick")
                streams[still.port if backend_at(gateway, still).inflight > before else alive.port].append(client)
            still.to_client.stop()
            silent = [await client.reader.read() for client in streams[still.port]]
            ending.set()
            whole = [await client.reader.readuntil(b"\r\n0\r\n\r\n") for client in streams[alive.port]]
            assert failures_at(gateway, still) == len(silent)
            assert failures_at(gateway, alive) == 0
    for body in silent:
        assert body.count(b": still working\n\n") >= 2
        assert b'"upstream_timeout"' in body
        assert not body.endswith(b"0\r\n\r\n")
    assert all(b"data: [DONE]" in body and b'"error"' not in body for body in whole)
    assert sorted(line["end_reason"] for line in row.lines) == ["ok"] * len(whole) + ["upstream_timeout"] * len(silent)


# Answers that are refusals


@pytest.mark.parametrize(
    ("status", "kind", "lines", "seen"),
    [
        (500, "application/json", [], (502, "upstream_failed")),
        (500, "text/html", [], (502, "upstream_failed")),
        (502, "text/html", [], (502, "upstream_failed")),
        (503, "application/json", [], (502, "upstream_failed")),
        (503, "text/html", ["retry-after: 7"], (503, "overloaded")),
        (504, "application/json", [], (502, "upstream_failed")),
    ],
)
async def test_A12_a_backend_that_answers_with_an_error(row, status, kind, lines, seen):
    async def fail(connection: BackendConnection) -> None:
        body = b'{"detail": "Traceback: /opt/torch 2.9 at 10.0.0.7"}'
        told = "".join(line + "\r\n" for line in [f"content-type: {kind}", f"content-length: {len(body)}", *lines])
        await connection.send(f"HTTP/1.1 {status} X\r\n{told}\r\n".encode() + body)

    row.secrets += ["Traceback", "/opt/torch", "10.0.0.7"]
    async with ScriptedBackend(fail) as backend, row.gateway(backend.url) as gateway:
        answer = await ask(gateway)
        assert failures_at(gateway, backend) == 1
        assert (await row.last(gateway))["attempts"][0]["status"] == status
    assert told(answer) == seen
    assert answer.headers["content-type"] == "application/json"
    if lines:
        assert 7 <= int(answer.headers["retry-after"]) <= 9
    assert [(line["end_reason"], line["attempts"]) for line in row.lines] == [("upstream_error", 1)]


async def test_A13_a_backend_that_answers_429(row):
    async def busy(connection: BackendConnection) -> None:
        await connection.json({}, 429, "retry-after: 7")

    policy = policy_with(retry="{attempts: 2, budget: 100%}")
    async with ScriptedBackend(busy) as full, ScriptedBackend() as other:
        async with row.gateway(full.url, other.url, policy=policy) as gateway:
            while not full.heads:
                assert (await ask(gateway)).status == 200
            assert backend_at(gateway, full).reported >= 8  # its fast refusals draw no more requests
            other.script = busy
            answer = await ask(gateway)
            assert (failures_at(gateway, full), failures_at(gateway, other)) == (0, 0)
    assert told(answer) == (429, "queue_full")
    assert 7 <= int(answer.headers["retry-after"]) <= 9
    assert row.lines[-1]["end_reason"] == "shed"


@pytest.mark.parametrize("status", [400, 404, 409, 422])
async def test_A14_a_backend_that_refuses_bad_parameters(row, status):
    async def refuse(connection: BackendConnection) -> None:
        error = {"error": {"message": "temperature must be at most 2", "code": "bad_temperature"}}
        await connection.json(error, status, "server: torch/2.9 (10.0.0.7)")

    row.secrets.append("10.0.0.7")
    async with ScriptedBackend(refuse) as backend, row.gateway(backend.url) as gateway:
        answers = [await ask(gateway) for _ in range(3)]
        breaker = breaker_at(gateway, backend)
        assert (breaker._ended.count(gateway.clock()), breaker.is_closed) == (0, True)
    assert [told(answer) for answer in answers] == [(status, "bad_temperature")] * 3
    assert [line["end_reason"] for line in row.lines] == ["ok"] * 3


# Answers that are not what they should be


def head(status: str, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1")


JSON, TWO = "content-type: application/json", "content-length: 2"
OWN = head("200 OK", JSON, TWO) + b"{}"


# name -> (what the backend sends, what the client sees)
ODD = {
    "101": (head("101 Switching Protocols", "upgrade: x", "connection: upgrade"), 502),
    "100": (head("100 Continue"), 502),
    "flood of 1xx": (head("103 Early Hints", "link: </x>") * 10_000, 502),
    "999": (head("999 X", TWO) + b"{}", 502),
    "204 with a body": (head("204 No Content", "content-length: 5") + b"hello", 204),
    "length and chunks": (head("200 OK", JSON, TWO, "transfer-encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n", 502),
    "two lengths": (head("200 OK", JSON, TWO, TWO) + b"{}", 502),
    "list of lengths": (head("200 OK", JSON, "content-length: 2, 2") + b"{}", 502),
    "space before the colon": (head("200 OK", JSON, "Content-Length : 2") + b"{}", 502),
    "NUL": (head("200 OK", JSON, TWO, "x: a\0b") + b"{}", 502),
    "folded line": (head("200 OK", JSON, TWO, "x: a", " folded") + b"{}", 502),
    "9 KiB header that passes": (head("200 OK", JSON, TWO, "openai-x: " + "y" * 9000) + b"{}", 502),
    "9 KiB header that does not": (head("200 OK", JSON, TWO, "x: " + "y" * 9000) + b"{}", 200),
    "100 KiB of headers": (head("200 OK", JSON, TWO, *["x: " + "y" * 990] * 100) + b"{}", 502),
    "redirect": (head("302 Found", TWO, "location: http://169.254.169.254/latest/") + b"{}", 502),
    "cookie": (head("200 OK", JSON, TWO, "set-cookie: a=b", "x-weir-backend: me", "server: torch") + b"{}", 200),
    "a second answer": (OWN + head("200 OK", JSON, "content-length: 12") + b'{"evil":true}', 200),
    "junk behind": (OWN + b"junk", 200),
    "TLS": (b"\x15\x03\x01\x00\x02\x02\x46", 502),
}  # fmt: skip


async def test_A15_answers_that_are_not_http_or_say_what_they_should_not(row):
    async def script(connection: BackendConnection) -> None:
        asked = json.loads(connection.body)["user"]
        if asked in ODD:
            await connection.send(ODD[asked][0])
        else:
            await connection.json({"mine": asked})

    allowed = {
        "content-type",
        "content-length",
        "cache-control",
        "retry-after",
        "retry-after-ms",
        "server-timing",
        "connection",
    }
    policy = policy_with(breaker=breaker(of_at_least="1000"))
    async with ScriptedBackend(script) as backend, row.gateway(backend.url, policy=policy) as gateway:
        for name, (_, status) in ODD.items():
            answer = await ask(gateway, {**CHAT, "user": name})
            assert answer.status == status, name
            later = [(await ask(gateway, {**CHAT, "user": f"{number}"})).json for number in range(2)]
            assert later == [{"mine": "0"}, {"mine": "1"}], name
            theirs = {
                each
                for each in answer.headers
                if not each.startswith(("x-request-id", "x-weir-", "x-ratelimit-", "ratelimit"))
            }
            assert theirs <= allowed, name
            assert answer.headers.get("x-weir-backend") != "me"
        assert failures_at(gateway, backend) == sum(status == 502 for _, status in ODD.values())
    reasons = [line["end_reason"] for line in row.lines[::3]]
    assert reasons == ["upstream_protocol" if status == 502 else "ok" for _, status in ODD.values()]


@pytest.mark.parametrize(
    "lines",
    [["content-type: text/plain"], ["content-type: text/event-stream", "content-encoding: gzip"]],
    ids=["another type", "compressed"],
)
async def test_A16_a_stream_that_is_none(row, lines):
    async def script(connection: BackendConnection) -> None:
        await connection.send(head("200 OK", "transfer-encoding: chunked", *lines))
        await connection.chunk(f"data: {event('one')}\n\n".encode())

    async with ScriptedBackend(script) as backend, row.gateway(backend.url) as gateway:
        assert told(await ask(gateway, STREAM)) == (502, "upstream_failed")
    assert [line["end_reason"] for line in row.lines] == ["upstream_protocol"]


async def test_A16_a_giant_event(row):
    """Scale: what is sent ends with the gateway's patience, at 1 MiB of 50 MB."""
    sent = 0

    async def giant(connection: BackendConnection) -> None:
        nonlocal sent
        await connection.begin_events()
        await connection.chunk(f"data: {event('one')}\n\n".encode())
        with contextlib.suppress(ConnectionError):
            for _ in range(800):
                await connection.chunk(b"x" * 65_536)
                sent += 65_536
        raise Hangup

    async with ScriptedBackend(giant) as backend, row.gateway(backend.url) as gateway:
        answer = await ask(gateway, STREAM)
    assert (answer.whole, answer.body.count(b"data: "), b"xxxx" in answer.body) == (False, 2, False)
    assert b'"upstream_failed"' in answer.body
    assert sent < 20_000_000  # of which the kernel's buffers hold most
    assert [line["end_reason"] for line in row.lines] == ["upstream_protocol"]


async def test_A16_bytes_that_are_no_text_and_events_without_data(row):
    """They pass as they are: a stream's bytes are the backend's, and never looked at but for usage and its end."""
    odd = b'data: {"choices":[],"text":"\xff\xfe\xed\xa0\x80"}\n\ndata:\n\n: \x80\n\ndata: [DONE]\n\n'

    async def script(connection: BackendConnection) -> None:
        await connection.begin_events()
        await connection.chunk(odd)
        await connection.send(b"0\r\n\r\n")

    async with ScriptedBackend(script) as backend, row.gateway(backend.url) as gateway:
        answer = await ask(gateway, STREAM)
    assert (answer.whole, answer.body) == (True, odd)


async def test_A17_a_backend_that_drips(row):
    """Scale: 20,000 bytes a second, each on its own, for 10."""
    first_is_there = asyncio.Event()

    async def script(connection: BackendConnection) -> None:
        await connection.begin_events()
        await connection.chunk(f"data: {event('one')}\n\n".encode())
        await asyncio.wait_for(first_is_there.wait(), 10)  # the client has it before there is more
        await connection.chunk(f"data: {event('two', 'stop')}\n\ndata: [DONE]\n\n".encode())
        await connection.send(b"0\r\n\r\n")

    async with ScriptedBackend(script) as backend, FaultProxy(backend.port) as proxy:
        async with row.gateway(proxy.url) as gateway, RawClient(gateway.data_address) as client:
            proxy.to_client.slices, proxy.to_client.bandwidth = 1, 20_000
            client.send(chat_request(STREAM))
            assert (await client.reader.readuntil(b"\n\n\r\n")).endswith(f"data: {event('one')}\n\n\r\n".encode())
            first_is_there.set()
            rest = await client.reader.readuntil(b"\r\n0\r\n\r\n")
            request = await row.last(gateway)
    assert rest.count(b"data: ") == 2  # events go out whole, whatever pieces they come in
    assert 0 < request["first_token_ms"] < request["total_ms"]
    assert [line["end_reason"] for line in row.lines] == ["ok"]


# Backends that do not read


@pytest.mark.parametrize("then", ["closes", "stays", "reads on"])
async def test_A18_a_backend_that_answers_before_it_has_read_the_request(row, then):
    async def too_large(connection: BackendConnection) -> None:
        await connection.json({"error": {"message": "too large", "code": "too_large"}}, 413, "connection: close")
        if then == "reads on":
            await connection.wait_closed()
        elif then == "stays":
            await asked.wait()
        raise Hangup

    asked = asyncio.Event()

    large = {**CHAT, "padding": "x" * 4_000_000}
    async with (
        ScriptedBackend(too_large) as backend,
        FaultProxy(backend.port, buffer=16_384) as proxy,
    ):
        async with row.gateway(proxy.url) as gateway:
            backend.reads_body = False
            answers = [await asyncio.wait_for(ask(gateway, large), 10) for _ in range(3)]
            asked.set()
            assert failures_at(gateway, proxy) == 0
    assert [told(answer) for answer in answers] == [(413, "too_large")] * 3
    assert [(line["status"], line["attempts"]) for line in row.lines] == [(413, 1)] * 3


async def test_A18_a_backend_that_reads_the_request_slowly(row):
    async def answer(connection: BackendConnection) -> None:
        await connection.json({"bytes": len(connection.body)})

    large = {**CHAT, "padding": "x" * 2_000_000}
    async with ScriptedBackend(answer) as backend, FaultProxy(backend.port, buffer=16_384) as proxy:
        async with row.gateway(proxy.url) as gateway:
            proxy.to_server.bandwidth = 10_000_000
            answers = await asyncio.gather(ask(gateway, large), ask(gateway, large), ask(gateway))
    assert [answer.json["bytes"] > 2_000_000 for answer in answers] == [True, True, False]


# Several backends


async def test_A19_one_of_four_that_fails_fast(row):
    failing = False

    async def fail(connection: BackendConnection) -> None:
        await connection.json({}, 500 if failing else 200)

    async with contextlib.AsyncExitStack() as stack:
        bad = await stack.enter_async_context(ScriptedBackend(fail))
        good = [await stack.enter_async_context(ScriptedBackend()) for _ in range(3)]
        urls = [bad.url, *(each.url for each in good)]
        policy = policy_with(breaker=breaker(of_at_least="5"))
        async with row.gateway(*urls, policy=policy) as gateway:
            async with Traffic(gateway.data_address, clients=4, pause=0.0) as traffic:
                await until(lambda: len(bad.heads) >= 50)
                failing = True  # what went well before does not count for it
                well = len(bad.heads)
                await until(lambda: breaker_at(gateway, bad).state is State.OPEN)
                after = await traffic.more(100)
            assert (await scrape(gateway)).value("weir_breaker_state", service="tiny") == 2
    assert {each.status for each in after} == {200}
    assert {each.status for each in traffic.asked} == {200, 502}
    assert 5 <= len(traffic.failed) <= 5 + 4  # the threshold, and who was on the way there when it was reached
    assert len(bad.heads) - well <= len(traffic.failed) + 4


async def test_A20_all_backends_unhealthy(row, monkeypatch):
    """Scale: health checks each 50 ms for 2 s."""
    monkeypatch.setitem(Prober.__init__.__kwdefaults__, "pace", Pace(interval=0.05))
    async with ScriptedBackend() as one, ScriptedBackend() as other:
        async with FaultProxy(one.port) as first, FaultProxy(other.port) as second:
            async with row.gateway(first.url, second.url) as gateway:

                def healths():
                    return [backend_at(gateway, each).healthy for each in (first, second)]

                one.healthy = other.healthy = False
                await until(lambda: healths() == [False, False])
                assert [(await ask(gateway)).status for _ in range(6)] == [
                    200
                ] * 6  # likelier that the checks are wrong
                assert (await scrape(gateway)).value("weir_backends", service="tiny", state="unhealthy") == 2
                for each in (first, second):
                    await each.refuse()
                    await each.reset()
                assert told(await ask(gateway)) == (503, "no_backend")
                one.healthy = other.healthy = True
                for each in (first, second):
                    await each.listen()
                await until(lambda: healths() == [True, True])
                assert (await ask(gateway)).status == 200


async def test_A21_a_breaker_that_half_opens_before_a_crowd(row):
    """Scale: a crowd of 50 for 500."""
    answering = asyncio.Event()
    failing = True

    async def script(connection: BackendConnection) -> None:
        if not failing:
            await answering.wait()
        await connection.json({}, 500 if failing else 200)

    policy = policy_with(breaker=breaker(open="100ms"))
    async with ScriptedBackend(script) as backend, row.gateway(backend.url, policy=policy) as gateway:
        assert [(await ask(gateway)).status for _ in range(3)] == [502] * 3
        rule = breaker_at(gateway, backend)
        assert rule.state is State.OPEN
        failing = False
        await until(lambda: rule.is_available(gateway.clock()))
        crowd = [asyncio.create_task(ask(gateway)) for _ in range(50)]
        await until(lambda: sum(each.done() for each in crowd) == 49)
        assert len(backend.heads) == 3 + 1  # one probe, and nobody else before it has succeeded
        answering.set()
        answers = [await each for each in crowd]
        assert rule.state is State.CLOSED
        assert (
            gateway.clock() - backend_at(gateway, backend).since < 10
        )  # it comes back slowly: see policies/balance.py
    refused = [answer for answer in answers if answer.status != 200]
    assert [told(answer) for answer in refused] == [(503, "circuit_open")] * 49
    assert len({answer.headers["retry-after-ms"] for answer in refused}) > 10  # they do not come back as one
    assert [line["end_reason"] for line in row.lines].count("breaker_open") == 49


async def test_A22_a_backend_that_flaps(row):
    """Scale: it fails and recovers each 50 ms for 3 s, and rests 50 ms for 5 s."""
    answers = {True: 0, False: 0}

    async def flap(connection: BackendConnection) -> None:
        fails = int(asyncio.get_running_loop().time() / 0.05) % 2 == 0
        answers[fails] += 1
        await connection.json({}, 500 if fails else 200)

    policy = policy_with(breaker=breaker(open="50ms"))
    async with ScriptedBackend(flap) as flapping, ScriptedBackend() as one, ScriptedBackend() as other:
        async with row.gateway(flapping.url, one.url, other.url, policy=policy) as gateway:
            async with Traffic(gateway.data_address, clients=3, pause=0.001) as traffic:
                await until(lambda: flapping.heads)
                await until(
                    lambda: breaker_at(gateway, flapping)._open_seconds >= 0.8
                )  # of the next rest, if it goes on
    trips = [record for record in row.log if record["event"] == "breaker changed" and record["state"] == "open"]
    assert 4 <= len(trips) <= len(traffic.failed) <= len(trips) * (3 + 3)
    assert len(traffic.failed) == answers[True]
    assert len(flapping.heads) < len(traffic.asked) / 3


async def test_A23_a_backend_that_is_healthy_and_hangs(row, monkeypatch):
    """Scale: health checks each 50 ms for 2 s."""
    monkeypatch.setitem(Prober.__init__.__kwdefaults__, "pace", Pace(interval=0.05))

    async def hang(connection: BackendConnection) -> None:
        await connection.wait_closed()
        raise Hangup

    policy = policy_with(timeout="{first_byte: 50ms}", breaker=breaker())
    async with ScriptedBackend(hang) as backend, row.gateway(backend.url, policy=policy) as gateway:
        assert [told(await ask(gateway)) for _ in range(3)] == [(504, "upstream_timeout")] * 3
        checks = backend.connections
        await until(lambda: backend.connections >= checks + 5)
        assert told(await ask(gateway)) == (503, "circuit_open")
        assert backend_at(gateway, backend).healthy is True
        (shown,) = [each for each in (await api(gateway, "backends"))["backends"] if each["service"] == "tiny"]
        assert (shown["healthy"], shown["breaker"]) == (True, "open")
    assert len(backend.heads) == 3


async def test_A24_a_storm_of_retries(row):
    """All backends are full, and say so before they start anything: the one failure that is always tried again."""

    async def full(connection: BackendConnection) -> None:
        await connection.json({}, 503, "x-backend-not-started: true")

    policy = policy_with(retry="{attempts: 3, budget: 20%}")
    async with ScriptedBackend(full) as one, ScriptedBackend(full) as two, ScriptedBackend(full) as three:
        async with row.gateway(one.url, two.url, three.url, policy=policy) as gateway:
            answers = await asyncio.gather(*(ask(gateway) for _ in range(150)))
            attempts = sum(len(each.heads) for each in (one, two, three))
            assert all(breaker_at(gateway, each).is_closed for each in (one, two, three))
    assert {told(answer) for answer in answers} == {(503, "overloaded")}
    assert 150 < attempts <= 1.2 * 150 + 10  # ten retries are always allowed: see policies/retry.py
    assert len({answer.headers["retry-after-ms"] for answer in answers}) > 50
    assert {line["end_reason"] for line in row.lines} == {"shed"}
