"""What an operator sees of requests: traces at a real collector, one log line each, metrics, and probes of the process."""

import asyncio
import collections
import contextlib
import json
import random
import socket
import time

import pytest

from discovery.endpoint import id_of_place
from observability.tracing import SpanExporter
from tests.support.admin_client import page, scrape
from tests.support.etcd_server import EtcdServer
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.raw_client import CHAT, RawClient, chat_request
from tests.support.redis_server import RedisServer
from tests.support.running_gateway import OPEN_POLICY, announced, etcd_gateway, policy_with, running_gateway, until
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend
from tests.support.traffic import Traffic

pytestmark = pytest.mark.integration

LOOP = "uvloop"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STREAM = {**CHAT, "stream": True}
USAGE = '{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}'


async def by_path(connection: BackendConnection) -> None:
    """A backend that does what the model's name, or else the path, says."""
    wish = json.loads(connection.body).get("model") if connection.body else connection.path
    if wish == "breaks":
        raise Hangup
    if wish == "slow":
        await asyncio.sleep(0.35)
    if connection.body and json.loads(connection.body).get("stream"):
        if wish == "hangs":
            await connection.begin_events()
            await connection.chunk(b"data: {}\n\n")
            await connection.wait_closed()
            raise Hangup
        await connection.events('{"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}', USAGE)
        return
    await connection.json({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}})


MODELS = "[tiny, slow, breaks, hangs]"


# Traces


async def test_a_trace_goes_through_to_the_backend_and_a_retry_is_in_its_tree(tmp_path) -> None:
    lines = [f"traceparent: 00-{TRACE}-{PARENT}-01", "tracestate: vendor=1"]
    async with OtlpReceiver() as receiver, ScriptedBackend() as alive, ScriptedBackend() as dead:
        config = f"telemetry: {{otlp: {receiver.url}, sample: 100%}}\n"
        policy = policy_with(balance="round_robin")
        async with (
            running_gateway(tmp_path, alive.url, dead.url, policy=policy, config=config) as gateway,
            RawClient(gateway.data_address) as client,
        ):
            await dead.stop()
            while (answer := await client.ask(None, *lines)).headers["x-weir-attempts"] != "2":
                alive.heads.clear()
            request_id = answer.headers["x-request-id"]

            def server_span():
                return next((s for s in receiver.spans if s.attributes.get("weir.request_id") == request_id), None)

            await until(server_span)
            server = server_span()
            children = [span for span in receiver.spans if span.parent_id == server.span_id]
    assert (server.name, server.kind, server.trace_id, server.parent_id) == ("chat tiny", "server", TRACE, PARENT)
    assert server.attributes["gen_ai.operation.name"] == "chat"
    assert server.attributes["gen_ai.request.model"] == "tiny"
    assert server.attributes["gen_ai.usage.output_tokens"] == 5
    assert server.attributes["http.response.status_code"] == 200
    assert server.attributes["weir.policy"] == answer.headers["x-weir-policy"]

    failed, good = sorted((span for span in children if span.name == "weir.attempt"), key=lambda span: span.start)
    assert (failed.attributes["weir.outcome"], failed.is_error) == ("connect_fail", True)
    assert (good.attributes["weir.outcome"], good.is_error) == ("ok", False)
    assert {failed.attributes["weir.backend"], good.attributes["weir.backend"]} == {
        id_of_place(dead.url),
        answer.headers["x-weir-backend"],
    }
    assert {"weir.authenticate", "weir.body", "weir.pick"} <= {span.name for span in children}
    for span in children:
        assert span.trace_id == TRACE
        assert server.start - 1e-4 <= span.start <= span.end <= server.end + 1e-4

    [head] = alive.heads
    assert f"traceparent: 00-{TRACE}-{good.span_id}-01\r\n".encode() in head  # its own span hangs below the attempt
    assert b"tracestate: vendor=1\r\n" in head


async def test_errors_and_slow_requests_are_kept_and_the_rest_is_not(tmp_path) -> None:
    async with OtlpReceiver() as receiver, ScriptedBackend(by_path) as backend:
        config = f"telemetry: {{otlp: {receiver.url}, sample: 0%, slow: 300ms}}\n"
        async with (
            running_gateway(tmp_path, backend.url, config=config, models=MODELS) as gateway,
            RawClient(gateway.data_address) as client,
        ):
            rows = (("tiny", 200), ("slow", 200), ("breaks", 502), ("nobody's", 404), ("tiny", 200), ("slow", 200))
            asked = {}
            for model, status in rows:
                answer = await client.ask({**CHAT, "model": model})
                assert answer.status == status
                asked[answer.headers["x-request-id"]] = model
                traced = backend.heads[-1].split(b"traceparent: ")[1].split(b"\r\n")[0]
                assert traced.endswith(b"-00")

            def kept() -> list[str]:
                return [asked[span.attributes["weir.request_id"]] for span in receiver.spans if span.kind == "server"]

            await until(lambda: len(kept()) >= 3)  # they come in order: what is not there by now was not kept
            assert kept() == ["slow", "breaks", "slow"]


@pytest.mark.parametrize("collector", ["dead", "silent"])
async def test_a_collector_that_is_away_is_not_felt(tmp_path, monkeypatch, collector) -> None:
    monkeypatch.setattr(SpanExporter.close, "__defaults__", (0.1,))  # how long its end waits is another story
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if collector == "silent":
            port.listen()  # takes connections and never answers
        config = f"telemetry: {{otlp: 'http://127.0.0.1:{port.getsockname()[1]}', sample: 100%}}\n"
        async with (
            ScriptedBackend() as backend,
            running_gateway(tmp_path, backend.url, config=config) as gateway,
            Traffic(gateway.data_address) as traffic,
        ):
            await traffic.more(300)
            if collector == "dead":
                async with asyncio.timeout(10):
                    while not (await scrape(gateway)).value("weir_otlp_export_failures_total"):
                        await asyncio.sleep(0.05)
    assert traffic.failed == []
    durations = sorted(each.answered_at - each.sent_at for each in traffic.asked)
    assert durations[len(durations) // 2] < 0.05


# The access log


async def test_each_request_has_one_line_that_says_how_it_ended(tmp_path, capfd) -> None:
    policy = OPEN_POLICY.replace('"/*"', "/v1/*") + (
        "  - {name: closed, match: {path: /closed}, allow: ['group:none'], to: [{service: tiny}]}\n"
        "  - {name: nobody, match: {path: /nobody}, to: [{service: absent}]}\n"
    )
    async with (
        ScriptedBackend(by_path) as backend,
        running_gateway(tmp_path, backend.url, policy=policy, models=MODELS) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        version = gateway.policy.policy.version
        expected = {}

        async def ask(name: str, end_reason: str, status: int, document=None, **options) -> None:
            answer = await client.ask(document, f"x-request-id: {name}", **options)
            assert answer.status == status, name
            expected[name] = (end_reason, status)
            if answer.headers.get("connection") == "close":
                await client.__aexit__()
                await client.__aenter__()

        await ask("good", "ok", 200)
        await ask("streamed", "ok", 200, STREAM)
        await ask("broken", "upstream_reset", 502, {**CHAT, "model": "breaks"})
        await ask("no-model", "policy", 404, {**CHAT, "model": "none"})
        await ask("no-route", "policy", 404, path="/elsewhere")
        await ask("no-token", "auth", 401, path="/closed")
        await ask("no-backend", "no_backend", 503, path="/nobody")
        await ask("no-json", "parse_error", 400, {"messages": []})
        leaver = await RawClient(gateway.data_address).__aenter__()
        leaver.send(chat_request({**STREAM, "model": "hangs"}, "x-request-id: left"))
        await leaver.reader.readuntil(b"data: {}")
        await leaver.__aexit__()
        expected["left"] = ("client_abort", 200)
        await until(lambda: len(gateway.recent.requests()) == len(expected))
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    lines = [line for line in lines if "request_id" in line]
    assert {line["request_id"]: (line["end_reason"], line["status"]) for line in lines} == expected
    assert len(lines) == len(expected)
    assert {line["policy"] for line in lines} == {version}
    good = next(line for line in lines if line["request_id"] == "good")
    assert (good["route"], good["service"], good["model"], good["consumer"]) == ("chat", "tiny", "tiny", "anonymous")
    assert (good["tokens_in"], good["tokens_out"], good["attempts"]) == (3, 5, 1)
    assert good["backend"] == id_of_place(backend.url)


# Metrics


async def test_the_metrics_of_the_contract_say_what_happened(tmp_path) -> None:
    plan = "plans: {p: {requests: 8/hour, burst: 8}}\nconsumers: [{match: {any: true}, plan: p}]\n"
    with EtcdServer(tmp_path) as etcd, RedisServer(tmp_path) as redis:
        async with (
            ScriptedBackend(by_path) as backend,
            ScriptedBackend() as dead,
            etcd_gateway(
                tmp_path,
                etcd.url,
                policy=policy_with(balance="round_robin") + plan,
                config=f"redis: {{url: {redis.url}}}\n",
            ) as gateway,
            announced(etcd.url, "tiny/alive", backend.url, models=("tiny", "breaks", "hangs")),
            RawClient(gateway.data_address) as client,
        ):
            await until(lambda: [each.healthy for each in gateway.fleet.backends.values()] == [True])
            assert (await client.ask()).status == 200
            assert (await client.ask(STREAM)).status == 200
            assert (await client.ask({**CHAT, "model": "breaks"})).status == 502
            async with announced(etcd.url, "tiny/dead", dead.url):
                await until(lambda: [each.healthy for each in gateway.fleet.backends.values()] == [True, True])
                await dead.stop()
                attempts = [(await client.ask()).headers["x-weir-attempts"] for _ in range(4)]
                hanging = await RawClient(gateway.data_address).__aenter__()
                hanging.send(chat_request({**STREAM, "model": "hangs"}))
                await hanging.reader.readuntil(b"data: {}")
                assert (await client.ask()).status == 429
                told = await scrape(gateway)
                await hanging.__aexit__()

    def requests(**labels: str) -> float:
        return told.value("weir_requests_total", **labels)

    assert requests(route="chat", service="tiny", status="200", reason="ok") == 6
    assert requests(route="chat", service="tiny", status="502", reason="upstream_reset") == 1
    assert requests(status="429", reason="rate_limited") == 1
    assert {frozenset(labels) for labels in told.series("weir_requests_total")} == {
        frozenset({"route", "service", "status", "reason"})
    }
    assert told.value("weir_request_duration_seconds_count") == told.value("weir_overhead_seconds_count") == 8
    assert told.value("gen_ai_server_time_to_first_token_seconds_count", model="tiny") == 1
    assert told.value("gen_ai_server_time_per_output_token_seconds_count", model="tiny") == 1
    assert told.value("gen_ai_client_token_usage_sum", type="output") == 6 * 5
    assert told.value("gen_ai_client_token_usage_sum", type="input") == 6 * 3
    assert told.value("weir_inflight") == 1
    assert told.value("weir_limited_total", rule="plans.p.requests") == 1
    assert told.value("weir_retries_total", service="tiny") == attempts.count("2") > 0
    assert told.value("weir_breaker_state", service="tiny", backend="alive") == 0
    assert told.series("weir_breaker_state") == [
        {"service": "tiny", "backend": backend} for backend in ("alive", "dead")
    ]
    assert told.value("weir_backends", service="tiny") == 2
    assert told.value("weir_discovery_revision") > 1
    assert 0 <= told.value("weir_discovery_lag_seconds") < 60
    assert told.value("weir_policy_info", version=gateway.policy.policy.version) == 1
    assert told.value("weir_policy_reload_total", result="ok") == 1
    assert told.value("weir_store_up") == 1
    assert told.series("weir_loop_lag_seconds") == [{}]


async def test_names_that_clients_invent_make_no_series(tmp_path) -> None:
    rng = random.Random(1)
    names = [f"{rng.getrandbits(64):016x}" for _ in range(1000)]
    policy = (
        policy_with(match='{path: "/v1/*"}') + "  - {name: pages, match: {path: '/pages/*'}, to: [{service: tiny}]}\n"
    )
    async with ScriptedBackend(by_path) as backend, running_gateway(tmp_path, backend.url, policy=policy) as gateway:

        async def ask_for(these: list[str]) -> collections.Counter[int]:
            async with RawClient(gateway.data_address) as client:
                seen: collections.Counter[int] = collections.Counter()
                for number, name in enumerate(these):
                    document, path = {**CHAT, "model": name}, "/v1/chat/completions"
                    if number % 2:
                        document, path = CHAT, f"/pages/{name}?q={name}" if number % 4 == 1 else f"/{name}"
                    answer = await client.ask(document, f"x-request-id: {name}", f"x-{name}: {name}", path=path)
                    seen[answer.status] += 1
                return seen

        await ask_for(names[:8])
        before = await scrape(gateway)
        seen = sum(await asyncio.gather(*(ask_for(names[8 + part :: 4]) for part in range(4))), collections.Counter())
        after = await scrape(gateway)
    assert seen.keys() == {200, 404}
    assert after.value("weir_requests_total") == len(names)
    assert len(after.samples) == len(before.samples)
    assert not [name for name in names if name in after.text]


# The process


async def test_ready_is_who_has_listed_its_backends_and_alive_is_who_answers(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.sources.FIRST_LIST_SECONDS", 0.1)
    etcd = EtcdServer(tmp_path)
    async with etcd_gateway(tmp_path, etcd.url, policy=OPEN_POLICY) as gateway:
        try:
            assert (await page(gateway, "/livez")).status == 200
            not_ready = await page(gateway, "/readyz")
            assert (not_ready.status, "discovery" in not_ready.text) == (503, True)
            async with RawClient(gateway.data_address) as client:
                client.send(b"GET /v2/health/ready HTTP/1.1\r\nhost: a\r\n\r\n")
                assert (await client.answer()).status == 503
            await asyncio.to_thread(etcd.start)
            async with asyncio.timeout(20):
                while (await page(gateway, "/readyz")).status != 200:
                    await asyncio.sleep(0.02)
            etcd.kill()
            await until(lambda: gateway.discovery.watch.state.value == "stale")
            assert (await page(gateway, "/readyz")).status == 200  # what it knows is good enough to serve
        finally:
            etcd.kill()


async def test_a_gateway_that_drains_says_so_and_serves_on_until_it_is_done(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.drain.ACCEPT_SECONDS", 1.0)
    end = asyncio.Event()

    async def slow(connection: BackendConnection) -> None:
        if json.loads(connection.body).get("stream"):
            await connection.begin_events()
            await connection.chunk(b"data: {}\n\n")
            await end.wait()
            await connection.chunk(b"data: [DONE]\n\n")
            await connection.send(b"0\r\n\r\n")
        else:
            await connection.json({})

    async with ScriptedBackend(slow) as backend, contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(running_gateway(tmp_path, backend.url))
        async with RawClient(gateway.data_address) as old, RawClient(gateway.data_address) as new:
            old.send(chat_request(STREAM))
            await old.reader.readuntil(b"data: {}")
            stopping = asyncio.create_task(stack.aclose())
            await until(lambda: gateway.pipeline.draining)
            drained = await page(gateway, "/readyz")
            assert (drained.status, drained.text) == (503, "the gateway is draining\n")
            assert (await page(gateway, "/livez")).status == 200
            late = await new.ask()
            assert (late.status, late.headers["connection"]) == (200, "close")
            end.set()
            assert b"[DONE]" in await old.reader.readuntil(b"0\r\n\r\n")
            begun = time.perf_counter()
            await stopping
            assert time.perf_counter() - begun < 5


async def test_nothing_of_the_operators_is_on_the_data_port(tmp_path) -> None:
    policy = OPEN_POLICY.replace('"/*"', "/v1/*")
    async with (
        ScriptedBackend() as backend,
        running_gateway(tmp_path, backend.url, policy=policy) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        for path in ("/", "/metrics", "/api/policy", "/api/requests", "/livez", "/readyz"):
            client.send(f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
            assert (await client.answer()).status == 404, path
            assert (await page(gateway, path)).status == 200, path
    assert backend.heads == []
