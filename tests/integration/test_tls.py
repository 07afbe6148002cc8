"""TLS in and out with real certificates, real clients and real backends, while certificates are renewed beside them."""

import asyncio
import contextlib
import socket
import ssl

import openai
import pytest

from discovery.source import SyncState
from gateway import config as configuration
from gateway.app import Gateway
from tests.support.admin_client import scrape
from tests.support.certificates import Authority, client_tls, serial_at, server_tls
from tests.support.etcd_server import EtcdServer
from tests.support.raw_client import RawClient, chat_request
from tests.support.redis_server import RedisServer
from tests.support.running_gateway import OPEN_POLICY, running_gateway, until
from tests.support.scripted_backend import Hangup, ScriptedBackend

pytestmark = pytest.mark.integration

LOOP = "uvloop"


@pytest.fixture
def authority(tmp_path):
    (tmp_path / "ca").mkdir()
    return Authority(tmp_path / "ca")


@pytest.fixture
def strangers(tmp_path):
    """Another authority, which nobody believes."""
    (tmp_path / "strangers").mkdir()
    return Authority(tmp_path / "strangers")


@pytest.fixture
def pair(authority):
    """What the gateway shows to its clients."""
    return authority.issue("gateway", ["127.0.0.1"])


def listening(pair, *more: str) -> str:
    """The `tls` line of a weir.yaml."""
    return f"tls: {{{', '.join((f'cert: {pair.cert}', f'key: {pair.key}', *more))}}}\n"


class Stream:
    """A backend's script: an event at each `beat`, to the end at `finish`."""

    def __init__(self) -> None:
        self.events = asyncio.Queue()

    async def __call__(self, connection) -> None:
        await connection.begin_events()
        while (event := await self.events.get()) is not None:
            await connection.chunk(b"data: %b\n\n" % event)
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.send(b"0\r\n\r\n")

    def say(self, *events) -> None:
        for event in events:
            self.events.put_nowait(event)


async def reloads(gateway, use, result) -> float:
    return (await scrape(gateway)).value("weir_tls_reload_total", use=use, result=result)


async def wait_reloads(gateway, use, result, count) -> None:
    async with asyncio.timeout(10):
        while await reloads(gateway, use, result) < count:
            await asyncio.sleep(0.05)


async def wait_told(gateway, reason, count) -> None:
    async with asyncio.timeout(10):
        while (await scrape(gateway)).value("weir_tls_handshake_failures_total", reason=reason) < count:
            await asyncio.sleep(0.05)


def blocking_request(address, tls, session=None):
    """One request on a connection of its own; the session that it leaves, whether it was resumed, and the status line.

    Unlike asyncio, Python's blocking sockets tell the other side why a handshake fails.
    """
    with (
        socket.create_connection((address.host, address.port), timeout=10) as plain,
        tls.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as stream,
    ):
        stream.sendall(chat_request())
        status = stream.recv(65536).partition(b"\r\n")[0]
        return stream.session, stream.session_reused, status


# In


async def test_the_openai_client_over_tls(tmp_path, authority, pair):
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, config=listening(pair)) as gateway:
        http = openai.DefaultAsyncHttpxClient(verify=client_tls(authority.cert))
        url = f"https://127.0.0.1:{gateway.data_address.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", http_client=http) as client:
            completion = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hello"}]
            )
        assert completion.usage.completion_tokens == 5
        assert b"x-forwarded-proto: https" in backend.heads[0]


@pytest.mark.parametrize("offered", [["http/1.1"], ["h2", "http/1.1"], ["h2"], []])
async def test_http_1_1_is_what_is_agreed_on(tmp_path, authority, pair, offered):
    tls = client_tls(authority.cert)
    if offered:
        tls.set_alpn_protocols(offered)
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, config=listening(pair)) as gateway:
        async with RawClient(gateway.data_address, tls) as client:
            shaken = client.writer.get_extra_info("ssl_object")
            assert shaken.selected_alpn_protocol() == ("http/1.1" if "http/1.1" in offered else None)
            assert shaken.version() == "TLSv1.3"
            assert (await client.ask()).status == 200


async def test_tls_1_2_is_the_oldest_that_is_spoken(tmp_path, authority, pair):
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, config=listening(pair)) as gateway:
        tls = client_tls(authority.cert)
        tls.set_ciphers("ALL:@SECLEVEL=0")  # or this client would not even offer TLS 1.1
        tls.maximum_version = ssl.TLSVersion.TLSv1_2
        _, _, status = await asyncio.to_thread(blocking_request, gateway.data_address, tls)
        assert status == b"HTTP/1.1 200 OK"
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            await asyncio.to_thread(blocking_request, gateway.data_address, tls)
        await wait_told(gateway, "old_version", 1)


async def test_plain_http_to_the_tls_port_gets_nothing_and_is_told(tmp_path, pair):
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, config=listening(pair)) as gateway:
        async with RawClient(gateway.data_address) as client:
            client.send(chat_request())
            with contextlib.suppress(ConnectionError):
                assert not (await client.reader.read()).startswith(b"HTTP/")
        await wait_told(gateway, "not_tls", 1)
        assert not backend.heads


@pytest.mark.parametrize("names", [["other.example"], ["127.0.0.1"]])
async def test_a_client_that_does_not_accept_our_certificate_is_told(tmp_path, authority, strangers, names):
    """Another name, or an authority that the client does not believe."""
    shown = authority.issue("shown", names)
    believed = authority.cert if names != ["127.0.0.1"] else strangers.cert
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, config=listening(shown)) as gateway:
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.to_thread(blocking_request, gateway.data_address, client_tls(believed))
        await wait_told(gateway, "refused_by_client", 1)


async def test_only_clients_with_a_certificate_of_client_ca_are_let_in(tmp_path, authority, strangers, pair):
    config = listening(pair, f"client_ca: {authority.cert}")
    ours = authority.issue("client", ["client"])
    others = [None, strangers.issue("stranger", ["client"]), authority.issue("old", ["client"], days=-1)]
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, config=config) as gateway:
        async with RawClient(gateway.data_address, client_tls(authority.cert, ours)) as client:
            assert (await client.ask()).status == 200
        for shown in others:
            with contextlib.suppress(OSError):  # with TLS 1.3 a client hears of the refusal after its handshake
                async with RawClient(gateway.data_address, client_tls(authority.cert, shown)) as client:
                    client.send(chat_request())
                    assert await client.reader.read() == b""
        assert len(backend.heads) == 1
        await wait_told(gateway, "no_certificate", 1)
        await wait_told(gateway, "certificate_refused", 2)


async def test_a_stream_that_breaks_says_so_over_tls_too(tmp_path, authority, pair):
    async def script(connection) -> None:
        await connection.begin_events()
        await connection.chunk(b"data: one\n\n")
        connection.reset()
        raise Hangup

    config = listening(pair)
    async with (
        ScriptedBackend(script) as backend,
        running_gateway(tmp_path, backend.url, config=config) as gateway,
        RawClient(gateway.data_address, client_tls(authority.cert)) as client,
    ):
        answer = await client.ask({"model": "tiny", "stream": True, "messages": []})
        assert answer.status == 200
        assert not answer.whole
        assert b"data: one" in answer.body
        assert b'"error"' in answer.body
        assert b"[DONE]" not in answer.body


async def test_a_large_answer_arrives_whole_and_waits_for_a_slow_reader(tmp_path, authority, pair):
    body = bytes(range(256)) * 131_072  # 32 MiB: more than all buffers between

    async def script(connection) -> None:
        await connection.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: %d\r\n\r\n" % len(body)
        )
        for start in range(0, len(body), 65_536):
            await connection.send(body[start : start + 65_536])
            sent.append(start)

    sent: list[int] = []
    policy = OPEN_POLICY.replace('"/*"', '"/files/*"')
    async with (
        ScriptedBackend(script) as backend,
        running_gateway(tmp_path, backend.url, policy=policy, config=listening(pair)) as gateway,
        RawClient(gateway.data_address, client_tls(authority.cert)) as client,
    ):
        client.send(b"GET /files/a HTTP/1.1\r\nhost: a\r\n\r\n")
        await client.reader.readuntil(b"\r\n\r\n")
        before = -1
        while before != len(sent):  # until nothing moves any more
            before = len(sent)
            await asyncio.sleep(0.2)
        assert len(sent) < len(body) // 65_536
        assert await client.reader.readexactly(len(body)) == body


# In, renewed


async def test_a_renewed_certificate_is_shown_to_the_next_while_streams_and_connections_go_on(
    tmp_path, authority, pair
):
    tls, stream = client_tls(authority.cert), Stream()
    async with (
        ScriptedBackend(stream) as backend,
        running_gateway(tmp_path, backend.url, config=listening(pair)) as gateway,
        RawClient(gateway.data_address, tls) as streaming,
        RawClient(gateway.data_address, tls) as kept,
    ):
        before = pair.serial
        stream.say(b"one")
        streaming.send(chat_request({"model": "tiny", "stream": True, "messages": []}))
        assert b"data: one" in await streaming.reader.readuntil(b"one\n\n")

        authority.issue("renewed", ["127.0.0.1"]).put_in_place_of(pair)
        assert pair.serial != before
        async with asyncio.timeout(10):
            while await serial_at(gateway.data_address, tls) != pair.serial:
                await asyncio.sleep(0.02)

        stream.say(b"two", None)
        assert b"data: two" in await streaming.reader.readuntil(b"two\n\n")
        assert b"[DONE]" in await streaming.reader.readuntil(b"0\r\n\r\n")
        stream.say(None)
        assert (await kept.ask()).status == 200
        shown = await scrape(gateway)
        assert shown.value("weir_tls_reload_total", use="listener", result="ok") == 2
        expires = shown.value("weir_tls_certificate_expires_timestamp_seconds", use="listener")
        assert expires == gateway.certificates["listener"].in_force.expires_at


async def test_a_broken_pair_changes_nothing_and_is_told(tmp_path, authority, strangers, pair):
    tls = client_tls(authority.cert)
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, config=listening(pair)) as gateway:
        before, good = pair.serial, pair.key.read_bytes()
        pair.key.write_bytes(strangers.issue("other", ["127.0.0.1"]).key.read_bytes())
        await wait_reloads(gateway, "listener", "refused", 1)
        assert await serial_at(gateway.data_address, tls) == before
        pair.key.write_bytes(good)
        await wait_reloads(gateway, "listener", "ok", 2)
        assert await serial_at(gateway.data_address, tls) == before
        assert await reloads(gateway, "listener", "refused") == 1


async def test_an_authority_taken_away_lets_nobody_in_any_more_not_even_by_a_resumed_session(
    tmp_path, authority, strangers, pair
):
    believed = tmp_path / "clients.pem"
    believed.write_bytes(strangers.cert.read_bytes() + authority.cert.read_bytes())
    config = listening(pair, f"client_ca: {believed}")
    tls = client_tls(authority.cert, strangers.issue("client", ["client"]))
    tls.maximum_version = ssl.TLSVersion.TLSv1_2  # whose client tells in its handshake whether it was resumed
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, config=config) as gateway:

        async def ask(session=None):
            return await asyncio.to_thread(blocking_request, gateway.data_address, tls, session)

        session, _, status = await ask()
        assert status == b"HTTP/1.1 200 OK"
        _, is_resumed, status = await ask(session)
        assert (is_resumed, status) == (True, b"HTTP/1.1 200 OK")

        renewed = tmp_path / "clients.new"
        renewed.write_bytes(authority.cert.read_bytes())
        renewed.rename(believed)
        await wait_reloads(gateway, "listener", "ok", 2)
        with pytest.raises(OSError):
            await ask(session)
        assert len(backend.heads) == 2


# Out


def believing(authority, shown=None) -> str:
    """More of the `discovery` section: how https backends are spoken to."""
    pair = f", cert: {shown.cert}, key: {shown.key}" if shown else ""
    return f"  tls: {{ca: {authority.cert}{pair}}}\n"


async def test_a_backend_is_believed_by_the_authority_that_is_named(tmp_path, authority):
    tls = server_tls(authority.issue("backend", ["127.0.0.1"]))
    async with (
        ScriptedBackend(tls=tls) as backend,
        running_gateway(tmp_path, backend.url, config=believing(authority)) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        assert backend.url.startswith("https://")
        for _ in range(2):
            assert (await client.ask()).status == 200
        assert len(backend.heads) == 2


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        ("wrong name", "IP address mismatch, certificate is not valid for '127.0.0.1'."),
        ("expired", "certificate has expired"),
        ("stranger", "certificate signature failure"),
        ("stranger to the system", "unable to get local issuer certificate"),
    ],
)
async def test_a_backend_with_another_certificate_gets_no_request_and_it_is_said_why(
    tmp_path, authority, strangers, caplog, shown, reason
):
    pair = {
        "wrong name": lambda: authority.issue("b", ["127.0.0.2"]),
        "expired": lambda: authority.issue("b", ["127.0.0.1"], days=-1),
        "stranger": lambda: strangers.issue("b", ["127.0.0.1"]),
        "stranger to the system": lambda: authority.issue("b", ["127.0.0.1"]),
    }[shown]()
    config = "" if shown == "stranger to the system" else believing(authority)
    async with (
        ScriptedBackend(tls=server_tls(pair)) as backend,
        running_gateway(tmp_path, backend.url, config=config, healthy=False) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        checked = await gateway.discovery.prober._probe(next(iter(gateway.fleet.backends.values())).endpoint)
        assert checked.reason == f"its certificate is not accepted: {reason}"
        answer = await client.ask()
        assert (answer.status, answer.json["error"]["code"]) == (503, "no_backend")
        assert not backend.heads


async def test_a_backend_that_asks_for_our_certificate_gets_it_and_the_renewed_one_next(tmp_path, authority):
    ours = authority.issue("weir", ["weir"])
    seen: list[int] = []
    stream = Stream()

    async def script(connection) -> None:
        der = connection.writer.get_extra_info("ssl_object").getpeercert(True)
        seen.append(hash(der))
        await stream(connection)

    tls = server_tls(authority.issue("backend", ["127.0.0.1"]), believes=authority.cert)
    async with (
        ScriptedBackend(script, tls) as backend,
        running_gateway(tmp_path, backend.url, config=believing(authority, ours)) as gateway,
        RawClient(gateway.data_address) as streaming,
        RawClient(gateway.data_address) as client,
    ):
        streaming.send(chat_request({"model": "tiny", "stream": True, "messages": []}))
        stream.say(b"one")
        await streaming.reader.readuntil(b"one\n\n")

        authority.issue("renewed", ["weir"]).put_in_place_of(ours)
        await wait_reloads(gateway, "backends", "ok", 2)
        client.send(chat_request())
        await until(lambda: len(seen) == 2)
        assert seen[0] != seen[1]
        stream.say(b"two", b"two")
        await streaming.reader.readuntil(b"two\n\n")
        stream.say(None, None)
        assert b"[DONE]" in await streaming.reader.readuntil(b"0\r\n\r\n")
        await client.reader.readuntil(b"0\r\n\r\n")


async def test_a_backend_that_does_not_accept_our_certificate_gets_nothing(tmp_path, authority, strangers):
    tls = server_tls(authority.issue("backend", ["127.0.0.1"]), believes=authority.cert)
    ours = strangers.issue("weir", ["weir"])
    async with (
        ScriptedBackend(tls=tls) as backend,
        running_gateway(tmp_path, backend.url, config=believing(authority, ours), healthy=False) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        endpoint = next(iter(gateway.fleet.backends.values())).endpoint
        assert not (await gateway.discovery.prober._probe(endpoint)).is_passing
        assert (await client.ask()).status in (502, 503)
        assert not backend.heads


async def test_what_was_connected_under_other_authorities_carries_no_new_request(tmp_path, authority, strangers):
    """The backend's authority is no longer believed: its kept connection is not used, and a new one is refused."""
    tls = server_tls(authority.issue("backend", ["127.0.0.1"]))
    believed = tmp_path / "believed.pem"
    believed.write_bytes(authority.cert.read_bytes())
    async with (
        ScriptedBackend(tls=tls) as backend,
        running_gateway(tmp_path, backend.url, config=f"  tls: {{ca: {believed}}}\n") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        assert (await client.ask()).status == 200
        believed.write_bytes(strangers.cert.read_bytes())
        await wait_reloads(gateway, "backends", "ok", 2)
        assert (await client.ask()).status == 503
        assert len(backend.heads) == 1


# etcd and Redis


async def test_etcd_is_met_again_with_the_last_good_certificate_and_then_with_the_renewed_one(tmp_path, authority):
    ours, good = authority.issue("weir", ["weir"]), authority.issue("good", ["weir"])
    its = authority.issue("etcd", ["127.0.0.1"])
    arguments = (
        f"--cert-file={its.cert}", f"--key-file={its.key}", f"--trusted-ca-file={authority.cert}", "--client-cert-auth",
    )  # fmt: skip
    policy = tmp_path / "policy.yaml"
    policy.write_text(OPEN_POLICY)
    with EtcdServer(tmp_path, arguments=arguments, scheme="https") as etcd:
        text = f"""
listen: 127.0.0.1:0
admin: {{listen: 127.0.0.1:0}}
policy: policy.yaml
discovery: {{etcd: {{endpoints: ["{etcd.url}"], ca: {authority.cert}, cert: {ours.cert}, key: {ours.key}}}}}
"""
        async with Gateway(configuration.parse(text.encode(), {}, base=tmp_path)).running() as gateway:
            watch = gateway.discovery.watch
            await until(lambda: watch.state is SyncState.WATCHING)
            ours.key.write_bytes(b"broken")
            await wait_reloads(gateway, "etcd", "refused", 1)
            await asyncio.to_thread(etcd.kill)
            await until(lambda: watch.state is SyncState.STALE)
            await asyncio.to_thread(etcd.start)
            await until(lambda: watch.state is SyncState.WATCHING, 20)
            good.put_in_place_of(ours)
            await wait_reloads(gateway, "etcd", "ok", 2)
            await asyncio.to_thread(etcd.kill)
            await until(lambda: watch.state is SyncState.STALE)
            await asyncio.to_thread(etcd.start)
            await until(lambda: watch.state is SyncState.WATCHING, 20)


async def wait_store(gateway, up) -> None:
    async with asyncio.timeout(60):
        while (await scrape(gateway)).value("weir_store_up") != up:
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def tls_before(port, tls):
    """A port that speaks TLS and hands on to one of this machine that does not; with each connection's certificate."""
    shown, tasks = [], set()

    async def pump(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def serve(reader, writer):
        tasks.add(asyncio.current_task())
        shown.append(writer.get_extra_info("ssl_object").getpeercert(True))
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, behind_writer), pump(behind_reader, writer))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield listener.sockets[0].getsockname()[1], shown
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.usefixtures("patient")
async def test_redis_is_spoken_to_over_tls_and_soon_with_the_renewed_certificate(tmp_path, authority, strangers):
    ours, its = authority.issue("weir", ["weir"]), authority.issue("redis", ["127.0.0.1"])
    tls = server_tls(its, believes=authority.cert)
    with RedisServer(tmp_path) as redis:
        async with tls_before(redis.port, tls) as (port, shown):
            options = f"ssl_ca_certs={authority.cert}&ssl_certfile={ours.cert}&ssl_keyfile={ours.key}"
            config = f"redis: {{url: 'rediss://127.0.0.1:{port}/0?{options}'}}\n"
            async with running_gateway(tmp_path, config=config) as gateway:
                await wait_store(gateway, 1)
                authority.issue("renewed", ["weir"]).put_in_place_of(ours)
                await wait_reloads(gateway, "redis", "ok", 2)
                await until(lambda: len(set(shown)) == 2, 60)
                await wait_store(gateway, 1)
            for host, believed in (("127.0.0.1", strangers.cert), ("localhost", authority.cert)):
                config = f"redis: {{url: 'rediss://{host}:{port}/0?ssl_ca_certs={believed}'}}\n"
                async with running_gateway(tmp_path, config=config) as gateway:
                    await wait_store(gateway, 0)
