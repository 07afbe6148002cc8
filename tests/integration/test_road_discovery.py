"""Backends come, drain, go and lie, and etcd dies, all while requests are under way."""

import asyncio
import contextlib
import itertools
import json
import time

import pytest

from discovery.discovery import backends_in
from discovery.endpoint import Registration, encode
from discovery.etcd import EtcdClient, EtcdSettings
from tests.support.admin_client import api, page, scrape
from tests.support.etcd_server import EtcdServer
from tests.support.raw_client import CHAT, RawClient, chat_request
from tests.support.running_gateway import announced, etcd_gateway, policy_with, until
from tests.support.scripted_backend import BackendConnection, ScriptedBackend
from tests.support.traffic import Traffic

pytestmark = pytest.mark.integration

LOOP = "uvloop"
STREAM = {**CHAT, "stream": True}
ROUND_ROBIN = policy_with(balance="round_robin")
PREFIXES = (f"/road{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def own_etcd(tmp_path):
    with EtcdServer(tmp_path) as server:
        yield server


@pytest.fixture
def prefix():
    return next(PREFIXES)


@pytest.fixture
def brisk(monkeypatch):
    """A change of state waits 0.2 s for the next instead of 2 s: for stories of more than one change."""
    monkeypatch.setattr("discovery.store.DAMPING_SECONDS", 0.2)


def client_of(etcd) -> EtcdClient:
    return EtcdClient(EtcdSettings((etcd.url,)))


def known(gateway) -> set[str]:
    return set(gateway.fleet.backends)


def healthy(gateway) -> set[str]:
    return {key for key, backend in gateway.fleet.backends.items() if backend.healthy}


async def test_a_backend_that_announces_itself_gets_traffic_within_a_second(etcd, prefix, tmp_path) -> None:
    async with (
        ScriptedBackend() as backend,
        etcd_gateway(tmp_path, etcd.url, prefix) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        nobody = await client.ask()
        assert (nobody.status, nobody.json["error"]["code"]) == (503, "no_backend")
        async with announced(etcd.url, "tiny/1", backend.url, prefix):
            begun = time.perf_counter()
            while (answer := await client.ask()).status != 200:
                await asyncio.sleep(0.005)
            assert time.perf_counter() - begun < 1.0
            assert answer.headers["x-weir-backend"] == "1"
            [shown] = (await api(gateway, "backends"))["backends"]
            assert (shown["service"], shown["id"], shown["url"]) == ("tiny", "1", backend.url)


async def test_a_draining_backend_ends_what_it_has_and_gets_nothing_new(etcd, prefix, tmp_path, brisk) -> None:
    end = asyncio.Event()

    async def script(connection: BackendConnection) -> None:
        if not json.loads(connection.body).get("stream"):
            await connection.json({})
            return
        await connection.begin_events()
        await connection.chunk(b"data: {}\n\n")
        await end.wait()
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.send(b"0\r\n\r\n")

    async with (
        ScriptedBackend(script) as leaving,
        ScriptedBackend() as staying,
        etcd_gateway(tmp_path, etcd.url, prefix, policy=ROUND_ROBIN) as gateway,
        RawClient(gateway.data_address) as client,
        contextlib.AsyncExitStack() as stack,
    ):
        announcement = announced(etcd.url, "tiny/leaving", leaving.url, prefix)
        leaves = await announcement.__aenter__()
        await until(lambda: "tiny/leaving" in healthy(gateway))
        client.send(chat_request(STREAM))
        await client.reader.readuntil(b"data: {}")
        await stack.enter_async_context(announced(etcd.url, "tiny/staying", staying.url, prefix))
        async with Traffic(gateway.data_address) as traffic:
            await until(lambda: {each.backend for each in traffic.asked} == {"leaving", "staying"})
            await leaves.drain()
            await until(lambda: gateway.fleet.backends["tiny/leaving"].endpoint.draining)
            assert {each.backend for each in await traffic.more(50)} == {"staying"}
            assert gateway.fleet.backends["tiny/leaving"].inflight == 1
            end.set()
            rest = await client.reader.readuntil(b"0\r\n\r\n")
            await announcement.__aexit__(None, None, None)
            await until(lambda: known(gateway) == {"tiny/staying"})
            await until(lambda: not leaving.open)  # nothing of the gateway is left there
            await traffic.more(20)
    assert traffic.failed == []
    assert b"[DONE]" in rest
    assert b"error" not in rest


async def test_a_backend_that_withdraws_costs_nobody_a_request(etcd, prefix, tmp_path, brisk) -> None:
    async with (
        ScriptedBackend() as one,
        ScriptedBackend() as two,
        etcd_gateway(tmp_path, etcd.url, prefix, policy=ROUND_ROBIN) as gateway,
        announced(etcd.url, "tiny/one", one.url, prefix),
    ):
        async with announced(etcd.url, "tiny/two", two.url, prefix):
            await until(lambda: healthy(gateway) == {"tiny/one", "tiny/two"})
            traffic = Traffic(gateway.data_address)
            await traffic.__aenter__()
            await traffic.more(50)
        await until(lambda: known(gateway) == {"tiny/one"})
        assert {each.backend for each in await traffic.more(50)} == {"one"}
        await traffic.__aexit__()
    assert traffic.failed == []
    assert {each.backend for each in traffic.asked} == {"one", "two"}


async def test_etcd_dies_and_comes_back_and_no_request_feels_it(own_etcd, tmp_path) -> None:
    async with (
        ScriptedBackend() as one,
        ScriptedBackend() as two,
        etcd_gateway(tmp_path, own_etcd.url, policy=ROUND_ROBIN) as gateway,
        announced(own_etcd.url, "tiny/one", one.url),
    ):
        await until(lambda: healthy(gateway) == {"tiny/one"})
        backend = gateway.fleet.backends["tiny/one"]
        async with Traffic(gateway.data_address) as traffic:
            await traffic.more(20)
            own_etcd.kill()
            await until(lambda: gateway.discovery.watch.state.value == "stale")
            await traffic.more(100)
            assert (await api(gateway, "backends"))["discovery"]["state"] == "stale"
            assert (await page(gateway, "/readyz")).status == 200
            assert (await scrape(gateway)).value("weir_discovery_lag_seconds") > 0
            await asyncio.to_thread(own_etcd.start)
            async with announced(own_etcd.url, "tiny/two", two.url):
                await until(lambda: known(gateway) == {"tiny/one", "tiny/two"}, 15)
                await until(lambda: {each.backend for each in traffic.asked} == {"one", "two"})
                assert gateway.fleet.backends["tiny/one"] is backend
    assert traffic.failed == []


async def test_etcd_comes_back_empty_and_the_backends_stay_in_service(own_etcd, tmp_path) -> None:
    async with (
        ScriptedBackend() as one,
        ScriptedBackend() as two,
        etcd_gateway(tmp_path, own_etcd.url, policy=ROUND_ROBIN) as gateway,
        announced(own_etcd.url, "tiny/one", one.url),
        announced(own_etcd.url, "tiny/two", two.url),
    ):
        await until(lambda: healthy(gateway) == {"tiny/one", "tiny/two"})
        backends = dict(gateway.fleet.backends)
        async with Traffic(gateway.data_address, pause=0.02) as traffic:
            await traffic.more(10)
            await asyncio.to_thread(own_etcd.wipe)
            async with client_of(own_etcd) as client:
                await client.put("/weir/v1/backends/tiny/new", encode(Registration("http://127.0.0.1:9")))
                await until(lambda: "tiny/new" in known(gateway), 15)  # it has seen the new cluster
                await until(lambda: not gateway.discovery.store.statistics().held, 15)  # and both registered anew
                await client.delete("/weir/v1/backends/tiny/new")
                keys = {item.key for item in (await backends_in(client).list()).items}
            await traffic.more(20)
            assert keys == set(backends)
            assert {key: gateway.fleet.backends[key] for key in backends} == backends
        assert (await scrape(gateway)).value("weir_discovery_resync_total", reason="cluster_changed") >= 1
    assert traffic.failed == []
    assert {each.backend for each in traffic.asked} == {"one", "two"}


async def test_when_most_vanish_at_once_those_that_work_are_kept(etcd, prefix, tmp_path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(ScriptedBackend()) for _ in range(3)]
        client = await stack.enter_async_context(client_of(etcd))
        gateway = await stack.enter_async_context(etcd_gateway(tmp_path, etcd.url, prefix, policy=ROUND_ROBIN))
        lease = await client.grant(60)
        for number, backend in enumerate(backends):
            await client.put(f"{prefix}/backends/tiny/{number}", encode(Registration(backend.url)), lease)
        await until(lambda: len(healthy(gateway)) == 3)
        async with Traffic(gateway.data_address) as traffic:
            await traffic.more(20)
            await client.revoke(lease)  # as when etcd loses all leases: nobody said goodbye
            await until(lambda: gateway.discovery.store.statistics().held == 3)
            assert {each.backend for each in await traffic.more(50)} == {"0", "1", "2"}
    assert traffic.failed == []


async def test_poisoned_registrations_are_ignored_told_and_stop_nothing(etcd, prefix, tmp_path) -> None:
    poison = {
        "tiny/outside": encode(Registration("http://169.254.169.254/latest")),
        "tiny/file": encode(Registration("file:///etc/passwd")),
        "tiny/json": b"{" * 60_000,
        "tiny/huge": b"x" * 1_000_000,
        "tiny/a b\n": encode(Registration("http://127.0.0.1:9")),
    }
    async with (
        ScriptedBackend() as one,
        ScriptedBackend() as two,
        client_of(etcd) as client,
        etcd_gateway(tmp_path, etcd.url, prefix, policy=ROUND_ROBIN) as gateway,
        announced(etcd.url, "tiny/one", one.url, prefix),
    ):
        await until(lambda: healthy(gateway) == {"tiny/one"})
        async with Traffic(gateway.data_address) as traffic:
            for key, value in poison.items():
                await client.put(f"{prefix}/backends/{key}", value)
            await client.put(f"{prefix}/backends/tiny/two", encode(Registration(two.url)))
            await until(lambda: healthy(gateway) == {"tiny/one", "tiny/two"})
            await until(lambda: "two" in {each.backend for each in traffic.asked})
            await client.put(f"{prefix}/backends/tiny/two", b"{}")  # the last good value is no excuse for a bad one
            await until(lambda: known(gateway) == {"tiny/one"})
            await traffic.more(20)
        told = await scrape(gateway)
        assert told.value("weir_discovery_rejected_total") == len(poison) + 1
        assert told.value("weir_backends", service="tiny") == 1
    assert traffic.failed == []


async def test_churn_of_others_fails_no_request_and_leaves_a_pool_alone(etcd, prefix, tmp_path) -> None:
    async with (
        ScriptedBackend() as steady,
        ScriptedBackend() as restless,
        client_of(etcd) as client,
        etcd_gateway(tmp_path, etcd.url, prefix, policy=ROUND_ROBIN) as gateway,
        announced(etcd.url, "tiny/steady", steady.url, prefix),
    ):
        await until(lambda: healthy(gateway) == {"tiny/steady"})
        backend = gateway.fleet.backends["tiny/steady"]
        value = encode(Registration(restless.url))

        async def churn() -> None:
            for number in itertools.count():
                await client.put(f"{prefix}/backends/tiny/r{number}", value)
                await client.delete(f"{prefix}/backends/tiny/r{number - 5}")
                await asyncio.sleep(0.01)

        async with Traffic(gateway.data_address, clients=8) as traffic:
            await traffic.more(50)
            before, begun = steady.connections, time.perf_counter()
            churning = asyncio.create_task(churn())
            first = gateway.discovery.store.snapshot.version
            await until(
                lambda: time.perf_counter() - begun > 1.5 and gateway.discovery.store.snapshot.version > first + 10, 15
            )
            churning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await churning
        assert traffic.failed == []
        assert {"steady", "r0"} < {each.backend for each in traffic.asked}
        assert gateway.fleet.backends["tiny/steady"] is backend
        assert not backend.pool.closed
        assert steady.connections <= before + 8 + 3  # at most one for each client, and the health checks' own
