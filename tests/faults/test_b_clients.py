"""Rows B of the fault matrix: clients and their connections."""

import asyncio
import contextlib
import json
import resource
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from gateway.config_fields import Address
from policies.identity import generate_signing_key, jwks_of, mint
from tests.support.admin_client import scrape
from tests.support.jwks_server import jwks_server, silence
from tests.support.ports import free_ports
from tests.support.raw_client import CHAT, Answer, RawClient, chat_request
from tests.support.running_gateway import OPEN_POLICY, policy_with, until
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend

pytestmark = pytest.mark.integration

STREAM = {**CHAT, "stream": True}
HEAD = chat_request().partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
IDP = "https://idp.example"


def with_plan(plan: str) -> str:
    return OPEN_POLICY + f"plans: {{p: {plan}}}\nconsumers: [{{match: {{any: true}}, plan: p}}]\n"


def with_issuer(home, key: bytes, plan: str = "{}") -> str:
    """A policy that lets nobody in without a token."""
    (home / "keys.json").write_bytes(jwks_of(key))
    issuer = f'issuers: [{{issuer: "{IDP}", audience: weir, algorithms: [ES256], jwks: keys.json}}]'
    return with_plan(plan).replace("anonymous: true", issuer)


def code(answer) -> str:
    return answer.json["error"]["code"]


async def is_closed(client: RawClient) -> bool:
    """Whether the gateway has closed the connection, and has sent nothing more; waits for it."""
    try:
        return await asyncio.wait_for(client.reader.read(), 20) == b""
    except ConnectionResetError:
        return True


async def all_answers(client: RawClient) -> AsyncIterator[Answer]:
    """Until the gateway closes the connection."""
    while True:
        try:
            yield await client.answer()
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return


@contextlib.asynccontextmanager
async def connected(address, count: int) -> AsyncIterator[list[RawClient]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(RawClient(address)) for _ in range(count)]


async def wait_connections(gateway, count: int) -> None:
    """Until the gateway has so many clients, as far as it knows."""
    async with asyncio.timeout(30):
        while (await scrape(gateway)).value("weir_connections") != count:
            await asyncio.sleep(0.02)


class Held:
    """A backend's script that keeps its requests until the test lets go, or until they are given up."""

    def __init__(self, begin: bytes = b"") -> None:
        self.begin = begin
        self.begun = self.given_up = 0
        self.go = asyncio.Event()

    async def __call__(self, connection: BackendConnection) -> None:
        await connection.send(self.begin)
        self.begun += 1
        waiting = [asyncio.create_task(connection.wait_closed()), asyncio.create_task(self.go.wait())]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        if not self.go.is_set():
            self.given_up += 1
            raise Hangup
        await connection.json({})


# Heads and bodies that come too slowly


async def test_B01_two_hundred_heads_that_dribble(row):
    """Scale: 200 sockets, a byte at a time, 300 ms for the head (10 s by default)."""
    async with ScriptedBackend() as backend:
        async with row.gateway(backend.url, config="limits: {head_timeout: 300ms}\n") as gateway:
            async with connected(gateway.data_address, 200) as clients:
                for byte in HEAD[:20]:
                    for client in clients:
                        client.send(bytes([byte]))
                    await asyncio.sleep(0)
                answers = await asyncio.gather(*(client.answer() for client in clients))
                assert {(answer.status, code(answer)) for answer in answers} == {(408, "client_timeout")}
                assert all([await is_closed(client) for client in clients])
        assert backend.heads == []
    assert [line["end_reason"] for line in row.lines] == ["client_slow"] * 200


async def test_B02_a_body_that_does_not_come(row, monkeypatch):
    monkeypatch.setattr("gateway.server.LINGER_SECONDS", 0.1)
    async with ScriptedBackend() as backend:
        config, policy = "limits: {body_timeout: 200ms}\n", with_plan("{requests: 1/month, burst: 1}")
        async with row.gateway(backend.url, policy=policy, config=config) as gateway:
            async with RawClient(gateway.data_address) as client:
                client.send(chat_request()[:-5])
                answer = await client.answer()
                assert (answer.status, code(answer), answer.headers["connection"]) == (408, "client_timeout", "close")
                assert await is_closed(client)
            async with RawClient(gateway.data_address) as client:
                assert (await client.ask()).status == 200  # the one request of this plan is still there
        assert len(backend.heads) == 1
    assert [line["end_reason"] for line in row.lines] == ["client_slow", "ok"]


# Clients that do not read, or leave


async def test_B03_a_reader_of_events_who_stops_reading(row, monkeypatch):
    """Scale: given up after 0.5 s (30 s in earnest)."""
    monkeypatch.setattr("gateway.relay.CLIENT_STALL_SECONDS", 0.5)
    sent, cut = 0, asyncio.Event()

    async def flood(connection: BackendConnection) -> None:
        nonlocal sent
        piece = b"data: " + b"x" * 16_000 + b"\n\n"
        await connection.begin_events()
        try:
            while sent < 256_000_000:
                await connection.chunk(piece)
                sent += len(piece)
        finally:
            cut.set()

    async with ScriptedBackend(flood) as backend:
        async with row.gateway(backend.url, policy=policy_with(timeout="{idle: 200ms}")) as gateway:
            async with RawClient(gateway.data_address) as client:
                client.send(chat_request(STREAM))
                await client.reader.readuntil(b"\r\n\r\n")
                client.writer.transport.pause_reading()
                await asyncio.wait_for(cut.wait(), 20)
                assert (await row.last(gateway))["end_reason"] == "client_slow"
        assert sent < 64_000_000  # what the kernel's buffers hold, of 256 MB
    assert [(line["status"], line["end_reason"]) for line in row.lines] == [(200, "client_slow")]


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_B04_a_client_that_leaves_before_the_first_byte(row, how):
    held = Held()
    async with ScriptedBackend(held) as backend, row.gateway(backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(chat_request())
            await until(lambda: held.begun)
            leave(client, how)
            await until(lambda: held.given_up)
        assert (await row.last(gateway))["end_reason"] == "client_abort"
        (tiny,) = (each for each in gateway.fleet.backends.values() if each.endpoint.service == "tiny")
        assert (tiny.inflight, tiny.breaker_state.value) == (0, "closed")
    assert [(line["end_reason"], line["attempts"]) for line in row.lines] == [("client_abort", 1)]


async def test_B05_a_client_that_resets_in_the_middle_of_events(row):
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    held = Held(head + b"%x\r\n%b\r\n" % (len(usage), usage))
    async with ScriptedBackend(held) as backend, row.gateway(backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(chat_request(STREAM))
            await client.reader.readuntil(b'"usage"')
            leave(client, "RST")
            await until(lambda: held.given_up)
    assert [(line["status"], line["end_reason"]) for line in row.lines] == [(200, "client_abort")]


async def test_B06_a_client_that_sends_no_more_is_taken_as_gone(row):
    held = Held()
    async with ScriptedBackend(held) as backend, row.gateway(backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(chat_request())
            await until(lambda: held.begun)
            client.writer.write_eof()
            assert await is_closed(client)
            await until(lambda: held.given_up)
    assert [line["end_reason"] for line in row.lines] == ["client_abort"]


def leave(client: RawClient, how: str) -> None:
    if how == "RST":
        sock = client.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.writer.transport.abort()
    else:
        client.writer.close()


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_B07_a_client_that_leaves_while_it_waits_to_be_let_in(row, how):
    """There is no queue yet. What a request waits for before a backend has heard of it is here its signing key."""
    row.more_tasks = row.more_descriptors = 4  # connections between the gateway and the provider, kept by both
    key, new_key = generate_signing_key(), generate_signing_key()
    token = mint(new_key, sub="ann", issuer=IDP, audience="weir", ttl=60.0, wall=time.time())
    async with jwks_server(jwks_of(key)) as idp, ScriptedBackend() as backend:
        policy = with_issuer(row.home, key).replace("keys.json", f'"{idp.url}"')
        async with row.gateway(backend.url, policy=policy) as gateway:
            idp.answer, before = silence, idp.asked
            async with RawClient(gateway.data_address) as client:
                client.send(chat_request(None, f"authorization: Bearer {token}"))
                await until(lambda: idp.asked > before)
                leave(client, how)
                await until(lambda: row.requests(gateway))
    assert [line["end_reason"] for line in row.lines] == ["client_abort"]
    assert backend.heads == []


# Many connections


async def test_B08_more_connections_than_are_allowed(row):
    """Scale: 200 connections (20,000 by default)."""
    async with ScriptedBackend() as backend:
        async with row.gateway(backend.url, config="limits: {connections: 201}\n") as gateway:
            async with connected(gateway.data_address, 300) as clients:
                await until(lambda: sum(client.reader.at_eof() for client in clients) == 100)  # at once
                numbers = await scrape(gateway)
                assert numbers.value("weir_connections_refused_total") == 100
                assert numbers.value("weir_connections") == 201  # one is the bystander's
    assert row.lines == []


async def test_B08_connections_that_idle(row):
    """Scale: idle for 300 ms (75 s by default)."""
    async with ScriptedBackend() as backend:
        async with row.gateway(backend.url, config="limits: {idle: 300ms}\n") as gateway:
            async with connected(gateway.data_address, 50) as clients:
                assert all([await is_closed(client) for client in clients])
                await wait_connections(gateway, 1)  # the bystander's
    assert row.lines == []


async def test_B09_more_clients_than_files(row):
    """A process with 256 files: 64 connections, 64 files for their backends' side, the rest in reserve."""
    data, admin = free_ports(2)
    weir = SimpleNamespace(data_address=Address("127.0.0.1", data), admin_address=Address("127.0.0.1", admin))
    held = Held()
    async with ScriptedBackend(held) as backend:
        (row.home / "policy.yaml").write_text(OPEN_POLICY)
        (row.home / "weir.yaml").write_text(
            f"listen: 127.0.0.1:{data}\nadmin: {{listen: 127.0.0.1:{admin}}}\npolicy: policy.yaml\n"
            f'discovery: {{static: [{{service: tiny, url: "{backend.url}", models: [tiny]}}]}}\n'
        )
        command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(row.home / "weir.yaml")]
        limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))  # noqa: E731
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, preexec_fn=limit)
        try:
            await until(lambda: listens(data), 30)
            await wait_connections(weir, 0)  # of those that have just looked
            async with connected(weir.data_address, 64) as clients:
                for client in clients:
                    client.send(chat_request())
                await until(lambda: held.begun == 64, 30)
                async with connected(weir.data_address, 300) as refused:
                    assert all([await is_closed(client) for client in refused])
                    await wait_connections(weir, 64)  # who looks after it still gets through
                held.go.set()
                for client in clients:  # what was under way ends well
                    assert (await asyncio.wait_for(client.answer(), 20)).status == 200
            await wait_connections(weir, 0)
            async with RawClient(weir.data_address) as client:  # and there is room again
                assert (await client.ask()).status == 200
            assert cpu_seconds(process.pid) < 30  # 300 refusals were no loop
        finally:
            process.send_signal(signal.SIGTERM)
            log, _ = await process.communicate()
    assert process.returncode == 0
    row.read_log(log.decode())
    assert [(line["status"], line["end_reason"]) for line in row.lines] == [(200, "ok")] * 65
    assert [record["connections"] for record in row.log if "fewer" in record["event"]] == [64]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / 100


# Many requests


async def test_B10_a_hundred_requests_in_one_piece(row):
    async def echo(connection: BackendConnection) -> None:
        await connection.json({"id": json.loads(connection.body)["id"]})

    async with ScriptedBackend(echo) as backend:
        policy = with_plan("{requests: 1/month, burst: 60}")
        async with row.gateway(backend.url, policy=policy) as gateway, RawClient(gateway.data_address) as client:
            client.send(b"".join(chat_request({**CHAT, "id": number}) for number in range(100)))
            answers = [await client.answer() for _ in range(100)]
        assert [answer.json["id"] for answer in answers[:60]] == list(range(60))
        assert {code(answer) for answer in answers[60:]} == {"rate_limited"}
        assert len(backend.heads) == 60


async def test_B10_more_requests_ahead_than_are_kept(row):
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n" * 5000)
            answers = [answer async for answer in all_answers(client)]
        assert {answer.status for answer in answers} == {200}
        assert 0 < len(answers) <= len(backend.heads) < 5000


async def test_B11_one_token_in_eight_hands(row):
    key = generate_signing_key()
    token = mint(key, sub="ann", issuer=IDP, audience="weir", ttl=300.0, wall=time.time())
    row.secrets.append(token)
    held = Held()
    async with ScriptedBackend(held) as backend:
        async with row.gateway(backend.url, policy=with_issuer(row.home, key, "{concurrency: 4}")) as gateway:
            async with connected(gateway.data_address, 8) as clients:
                for client in clients[:4]:
                    client.send(chat_request(None, f"authorization: Bearer {token}"))
                await until(lambda: held.begun == 4)
                for client in clients[4:]:
                    refused = await client.ask(None, f"authorization: Bearer {token}")
                    assert (refused.status, code(refused)) == (429, "concurrency")
                    assert "retry-after" in refused.headers
                held.go.set()
                assert [(await client.answer()).status for client in clients[:4]] == [200] * 4
        assert len(backend.heads) == 4


# Bodies that are not wanted


@pytest.mark.parametrize("how", ["told at once", "chunk by chunk"])
async def test_B12_a_body_without_an_end(row, how, monkeypatch):
    """A limit of 1 MiB, and a body of 10^18 bytes."""
    monkeypatch.setattr("gateway.server.LINGER_SECONDS", 0.5)
    framing = b"content-length: 1%b" % (b"0" * 18) if how == "told at once" else b"transfer-encoding: chunked"
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    async with ScriptedBackend() as backend:
        async with row.gateway(backend.url, config="limits: {body: 1MiB}\n") as gateway:
            async with RawClient(gateway.data_address) as client:
                client.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n%b\r\n\r\n" % framing)
                sent = 0
                answer = asyncio.create_task(client.answer())
                while not client.writer.is_closing() and sent < 1 << 30:
                    client.send(piece)
                    sent += len(piece)
                    try:
                        await asyncio.wait_for(client.writer.drain(), 0.25)
                    except ConnectionError:
                        break
                    except TimeoutError:
                        if sent > 2 << 20:  # else it is a machine that was elsewhere
                            break  # nobody reads it any more
                answer = await answer
                assert (answer.status, code(answer), answer.headers["connection"]) == (413, "too_large", "close")
                assert await is_closed(client)
        assert sent < 32 << 20  # 1 MiB, 64 KiB more, and what the kernel's buffers hold
        assert backend.heads == []
    assert [line["bytes_in"] < 2 << 20 for line in row.lines] == [True]


async def test_B13_a_compressed_body(row):
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        for coding in ("gzip", "deflate", "br", "zstd", "gzip, identity"):
            async with RawClient(gateway.data_address) as client:
                answer = await client.ask(None, f"content-encoding: {coding}")
                assert (answer.status, code(answer), answer.headers["connection"]) == (415, "bad_request", "close")
        assert backend.heads == []


async def test_B14_who_may_not_send_is_not_asked_to(row, monkeypatch):
    monkeypatch.setattr("gateway.server.LINGER_SECONDS", 0.1)
    key = generate_signing_key()
    tokens = [mint(key, sub=sub, issuer=IDP, audience="weir", ttl=300.0, wall=time.time()) for sub in ("ann", "bob")]
    row.secrets += tokens
    ann, bob = (f"authorization: Bearer {token}" for token in tokens)
    policy = with_issuer(row.home, key, "{requests: 1/month, burst: 1}")
    async with ScriptedBackend() as backend:
        async with row.gateway(backend.url, policy=policy, config="limits: {body: 1MiB}\n") as gateway:
            body = chat_request().partition(b"\r\n\r\n")[2]

            def expect(client, *lines: str, length: int = len(body), expects: str = "100-continue") -> None:
                head = ["POST /v1/chat/completions HTTP/1.1", "host: a", f"expect: {expects}", *lines]
                client.send("\r\n".join([*head, f"content-length: {length}", "", ""]).encode())

            async with RawClient(gateway.data_address) as client:
                expect(client, ann)
                assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                client.send(body)
                assert (await client.answer()).status == 200
            for lines, options, status in [
                ([], {}, 401),
                (["authorization: Bearer x.y.z"], {}, 401),
                ([ann], {}, 429),  # the plan's one request was that above
                ([bob], {"length": 2 << 20}, 413),
                ([bob], {"expects": "a pony"}, 417),
            ]:
                async with RawClient(gateway.data_address) as client:
                    expect(client, *lines, **options)
                    answer = await client.answer()
                    assert (answer.status, answer.headers["connection"]) == (status, "close")
                    assert await is_closed(client)
        assert len(backend.heads) == 1
