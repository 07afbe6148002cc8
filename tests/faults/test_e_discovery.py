"""E: etcd is away, frozen, split, wiped or full of nonsense, and requests go on all the while.

Scales: what a gateway waits for is shortened, so that a row takes seconds. Silence that makes it look whether etcd still
lives: 0.6 s for 25 s. A change of state that waits for the next: 0.2 s for 2 s. The grace of those that vanished with
most others: 1 s for 15 s. Backends at most: 300 for 10,000.
"""

import asyncio
import contextlib
import itertools
import time
from functools import partial

import pytest
from aetcd import rpc

from discovery.announce import Announcement
from discovery.discovery import backends_in
from discovery.endpoint import ModelEntry, Registration, encode
from discovery.etcd import Credentials, EtcdClient, EtcdSettings
from discovery.source import SourceFailure
from discovery.vetting import Vetting
from discovery.watch import Timing, Watch
from tests.support.admin_client import api, page, scrape
from tests.support.certificates import Authority
from tests.support.etcd_server import EtcdServer, etcd_cluster
from tests.support.etcd_users import enable_users
from tests.support.fault_proxy import FaultProxy
from tests.support.raw_client import CHAT, RawClient, chat_request
from tests.support.running_gateway import announced, etcd_gateway, policy_with, until
from tests.support.scripted_backend import BackendConnection, ScriptedBackend
from tests.support.traffic import Traffic

pytestmark = pytest.mark.integration

STREAM = {**CHAT, "stream": True}
ROUND_ROBIN = policy_with(balance="round_robin")
PREFIXES = (f"/faults{number}" for number in itertools.count())
IMPATIENT = Timing(silence=0.6, ping=0.4, backoff_cap=0.5)
MODELS = (ModelEntry("tiny"),)


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
def impatient(monkeypatch):
    monkeypatch.setattr("discovery.discovery.Watch", partial(Watch, timing=IMPATIENT))


@pytest.fixture
def brisk(monkeypatch):
    monkeypatch.setattr("discovery.store.DAMPING_SECONDS", 0.2)
    monkeypatch.setattr("discovery.store.GRACE_SECONDS", 1.0)


def known(gateway) -> set[str]:
    """Ids of the backends in service, but for the bystander's."""
    return {key.removeprefix("tiny/") for key in gateway.fleet.backends if key != "calm/1"}


def healthy(gateway) -> set[str]:
    return {name for name in known(gateway) if gateway.fleet.backends[f"tiny/{name}"].healthy}


def is_stale(gateway) -> bool:
    return gateway.discovery.watch.state.value == "stale"


def is_watching(gateway) -> bool:
    return gateway.discovery.watch.state.value == "watching"


def answered_by(asked) -> set[str | None]:
    return {each.backend for each in asked}


def value_of(backend: ScriptedBackend) -> bytes:
    return encode(Registration(backend.url, models=MODELS))


@contextlib.asynccontextmanager
async def client_of(*urls: str, **settings):
    async with EtcdClient(EtcdSettings(urls, **settings)) as client:
        yield client


@contextlib.asynccontextmanager
async def backends(*names: str):
    """Scripted backends by these names."""
    async with contextlib.AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(ScriptedBackend()) for name in names}


async def register(client: EtcdClient, prefix: str, scripted: dict[str, ScriptedBackend], lease: int = 0) -> None:
    for name, backend in scripted.items():
        await client.put(f"{prefix}/backends/tiny/{name}", value_of(backend), lease)


async def register_calm(row, client: EtcdClient, prefix: str) -> None:
    value = encode(Registration(row.calm.url, models=(ModelEntry("calm"),)))
    await client.put(f"{prefix}/backends/calm/1", value)


@contextlib.asynccontextmanager
async def discovering(row, url, prefix="/weir/v1", *, writer: EtcdClient, policy=ROUND_ROBIN, **options):
    """A gateway, watched, that finds its backends in etcd; `writer` makes the bystander's known there."""
    async with row.calm:
        await register_calm(row, writer, prefix)
        running = etcd_gateway(row.home, url, prefix, policy=row.policy(policy), **options)
        async with row.around(running) as gateway:
            yield gateway


async def insist(act) -> None:
    """Until etcd has done it."""
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(SourceFailure):
                await act()
                return
            await asyncio.sleep(0.05)


async def cut(proxy: FaultProxy) -> None:
    await proxy.refuse()
    await proxy.reset()


async def test_E01_etcd_is_away_at_the_start(row, own_etcd, impatient, monkeypatch) -> None:
    monkeypatch.setattr("gateway.sources.FIRST_LIST_SECONDS", 0.2)
    own_etcd.kill()
    row.more_tasks, row.more_descriptors = 6, 6  # at the end two watches stand
    async with (
        ScriptedBackend() as backend,
        row.around(etcd_gateway(row.home, own_etcd.url), bystander=False) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        assert (await page(gateway, "/livez")).status == 200
        ready = await page(gateway, "/readyz")
        assert (ready.status, "discovery has not listed the backends yet" in ready.text) == (503, True)
        assert (await api(gateway, "backends"))["discovery"]["state"] == "cold"
        refused = await client.ask()
        assert (refused.status, refused.json["error"]["code"]) == (503, "no_backend")
        assert "retry-after" in refused.headers
        await asyncio.to_thread(own_etcd.start)
        async with announced(own_etcd.url, "tiny/one", backend.url):
            await until(lambda: healthy(gateway) == {"one"}, 15)
            assert (await client.ask()).status == 200
            assert (await page(gateway, "/readyz")).status == 200


async def test_E02_etcd_dies_while_all_is_well(row, own_etcd) -> None:
    async with (
        FaultProxy(own_etcd.port) as line,
        backends("one", "two") as scripted,
        client_of(own_etcd.url) as client,
        discovering(row, line.url, writer=client) as gateway,
    ):
        await register(client, "/weir/v1", scripted)
        await until(lambda: healthy(gateway) == {"one", "two"})
        async with Traffic(gateway.data_address) as traffic:
            await traffic.more(20)
            own_etcd.kill()
            await until(lambda: is_stale(gateway))
            before = line.accepted
            await traffic.more(400)
            tried = line.accepted - before
            assert (await api(gateway, "backends"))["discovery"]["state"] == "stale"
            assert (await page(gateway, "/readyz")).status == 200
            assert (await scrape(gateway)).value("weir_discovery_lag_seconds") > 0
            await asyncio.to_thread(own_etcd.start)
            await until(lambda: is_watching(gateway), 15)
            assert answered_by(await traffic.more(20)) == {"one", "two"}
    assert traffic.failed == []
    assert tried < 100  # three users of etcd, each with a delay that grows: no loop that spins


@pytest.mark.parametrize("how", ["stopped", "black hole"])
async def test_E03_etcd_freezes(row, own_etcd, impatient, how) -> None:
    async with (
        FaultProxy(own_etcd.port) as line,
        backends("one", "two") as scripted,
        client_of(own_etcd.url) as client,
        discovering(row, line.url, writer=client) as gateway,
    ):
        await register(client, "/weir/v1", {"one": scripted["one"]})
        await until(lambda: healthy(gateway) == {"one"})
        async with Traffic(gateway.data_address) as traffic:
            await traffic.more(20)
            if how == "stopped":
                own_etcd.pause()  # the kernel still accepts and acknowledges
            else:
                line.to_server.swallows = line.to_client.swallows = line.black_hole = True
            await until(lambda: is_stale(gateway), 5)  # by our own question, long before any connection breaks
            await traffic.more(50)
            assert known(gateway) == {"one"}
            if how == "stopped":
                own_etcd.resume()
            else:
                await line.heal()
            await register(client, "/weir/v1", {"two": scripted["two"]})
            await until(lambda: healthy(gateway) == {"one", "two"}, 20)
            assert (await scrape(gateway)).value("weir_discovery_resync_total", reason="frozen") >= 1
    assert traffic.failed == []


async def test_E04_a_member_without_its_cluster_is_not_believed(row, impatient) -> None:
    with etcd_cluster(row.home) as (one, two, three):
        urls = (one.url, two.url, three.url)
        async with (
            backends("one", "two") as scripted,
            client_of(two.url, three.url) as client,
            discovering(row, urls, writer=client) as gateway,
        ):
            await register(client, "/weir/v1", scripted)
            await until(lambda: healthy(gateway) == {"one", "two"})
            async with Traffic(gateway.data_address) as traffic:
                await traffic.more(20)
                two.pause()
                three.pause()
                await until(lambda: is_stale(gateway))
                listed = (await scrape(gateway)).value("weir_discovery_resync_total")
                await traffic.more(100)
                assert known(gateway) == {"one", "two"}
                # What the lonely member still knows was not asked for.
                assert (await scrape(gateway)).value("weir_discovery_resync_total") == listed
                two.resume()
                three.resume()
                await until(lambda: is_watching(gateway), 20)
                one.kill()  # and of three two are enough
                await insist(lambda: client.delete("/weir/v1/backends/tiny/two"))  # perhaps after an election
                await until(lambda: known(gateway) == {"one"}, 20)
                await traffic.more(20)
        assert traffic.failed == []


async def test_E05_history_is_compacted_while_the_line_is_cut(row, etcd, prefix, impatient) -> None:
    async with (
        FaultProxy(etcd.port) as line,
        backends("stays", "goes", "comes") as scripted,
        client_of(etcd.url) as client,
        discovering(row, line.url, prefix, writer=client) as gateway,
    ):
        comes = {"comes": scripted.pop("comes")}
        await register(client, prefix, scripted)
        await until(lambda: healthy(gateway) == {"stays", "goes"})
        async with Traffic(gateway.data_address) as traffic:
            await traffic.more(20)
            await cut(line)
            await until(lambda: is_stale(gateway))
            await client.delete(f"{prefix}/backends/tiny/goes")
            await register(client, prefix, comes)
            revision = await client.put("/elsewhere", b"")
            await client.call(lambda channel: rpc.KVStub(channel).Compact, rpc.CompactionRequest(revision=revision))
            assert answered_by(await traffic.more(50)) == {"stays", "goes"}
            await line.listen()
            await until(lambda: healthy(gateway) == {"stays", "comes"})  # the delete was never told, only compared
            assert "goes" not in answered_by(await traffic.more(50))
            assert (await scrape(gateway)).value("weir_discovery_resync_total", reason="lost") >= 1
    assert traffic.failed == []


async def test_E06_etcd_comes_back_empty(row, own_etcd, impatient, brisk, monkeypatch) -> None:
    monkeypatch.setattr("discovery.store.GRACE_SECONDS", 3.0)  # what is looked at meanwhile takes 0.2 s, or a second
    async with (
        backends("one", "two") as scripted,
        client_of(own_etcd.url) as client,
        discovering(row, own_etcd.url, writer=client) as gateway,
        RawClient(gateway.data_address) as caller,
    ):
        await register(client, "/weir/v1", scripted)
        await until(lambda: healthy(gateway) == {"one", "two"})
        async with Traffic(gateway.data_address) as traffic:
            await traffic.more(20)
            await asyncio.to_thread(own_etcd.wipe)
            await client.close()
            await register_calm(row, client, "/weir/v1")
            await until(lambda: gateway.discovery.store.statistics().held == 2, 15)
            told = await scrape(gateway)
            assert told.value("weir_discovery_held") == 2
            assert told.value("weir_discovery_resync_total", reason="cluster_changed") >= 1
            assert answered_by(await traffic.more(20)) == {"one", "two"}
            await register(client, "/weir/v1", {"one": scripted["one"]})  # one of them has noticed
            await until(lambda: known(gateway) == {"one"}, 15)  # and who did not is let go after its grace
            assert answered_by(await traffic.more(20)) == {"one"}
        assert traffic.failed == []
        monkeypatch.setattr("discovery.store.GRACE_SECONDS", 0.2)
        await client.delete("/weir/v1/backends/tiny/one")  # nor is the last one kept for ever
        await until(lambda: not known(gateway), 15)
        assert (await caller.ask()).json["error"]["code"] == "no_backend"


async def test_E07_one_lease_ends(row, etcd, prefix, brisk) -> None:
    end = asyncio.Event()

    async def stream(connection: BackendConnection) -> None:
        await connection.begin_events()
        await connection.chunk(b"data: {}\n\n")
        await end.wait()
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.send(b"0\r\n\r\n")

    async with (
        backends("orphan", "kept") as scripted,
        client_of(etcd.url) as client,
        discovering(row, etcd.url, prefix, writer=client) as gateway,
        RawClient(gateway.data_address) as streaming,
    ):
        lease = await client.grant(1)  # and nobody will renew it
        orphan = {"orphan": scripted.pop("orphan")}
        orphan["orphan"].script = stream
        await register(client, prefix, orphan, lease)
        await until(lambda: healthy(gateway) == {"orphan"})
        streaming.send(chat_request(STREAM))
        await streaming.reader.readuntil(b"data: {}")
        await register(client, prefix, scripted)
        await until(lambda: known(gateway) == {"kept"})
        async with Traffic(gateway.data_address) as traffic:
            assert answered_by(await traffic.more(20)) == {"kept"}
        end.set()
        rest = await streaming.reader.readuntil(b"0\r\n\r\n")
    assert traffic.failed == []
    assert b"[DONE]" in rest
    assert b"error" not in rest


async def test_E08_all_leases_end_together(row, own_etcd, impatient, brisk, monkeypatch) -> None:
    monkeypatch.setattr("discovery.store.GRACE_SECONDS", 15.0)  # as shipped: they must be back within it
    names = ("one", "two", "three", "four")
    async with (
        backends(*names) as scripted,
        client_of(own_etcd.url) as client,
        discovering(row, own_etcd.url, writer=client) as gateway,
    ):
        for name, backend in scripted.items():
            await register(client, "/weir/v1", {name: backend}, await client.grant(1))
        await until(lambda: known(gateway) == set(names))
        await asyncio.to_thread(own_etcd.restart)  # each lease gets its whole time again, and then all end
        await until(lambda: len(healthy(gateway)) >= 2, 15)
        fewest = len(names)

        def count(snapshot) -> None:
            nonlocal fewest
            fewest = min(fewest, len(snapshot.endpoints))

        with contextlib.ExitStack() as stack:
            async with Traffic(gateway.data_address) as traffic:
                await until(lambda: gateway.discovery.store.statistics().held, 15)
                stack.callback(gateway.discovery.store.subscribe(count))
                assert (await scrape(gateway)).value("weir_discovery_held") >= 1
                await client.close()
                await register(client, "/weir/v1", scripted)  # their registrars are back
                await until(lambda: healthy(gateway) == set(names), 15)
                await until(lambda: not gateway.discovery.store.statistics().held)
                assert answered_by(await traffic.more(40)) == set(names)
    assert traffic.failed == []
    assert fewest >= 2  # half of them


async def test_E09_a_registration_flaps(row, etcd, prefix, brisk) -> None:
    async with (
        backends("steady", "restless") as scripted,
        client_of(etcd.url) as client,
        discovering(row, etcd.url, prefix, writer=client) as gateway,
    ):
        await register(client, prefix, scripted)
        await until(lambda: healthy(gateway) == {"steady", "restless"})
        seen: list[bool] = [True]

        def note(snapshot) -> None:
            is_there = "tiny/restless" in snapshot.endpoints
            if is_there is not seen[-1]:
                seen.append(is_there)

        gateway.discovery.store.subscribe(note)
        async with Traffic(gateway.data_address) as traffic:
            begun = time.perf_counter()
            puts = 0
            async with asyncio.timeout(30):
                while time.perf_counter() - begun < 2.0 or puts <= 2 * len(seen) + 2:  # etcd may be slow, too
                    await client.delete(f"{prefix}/backends/tiny/restless")
                    await register(client, prefix, {"restless": scripted["restless"]})
                    puts += 1
            took = time.perf_counter() - begun
            await client.delete(f"{prefix}/backends/tiny/restless")
            await until(lambda: known(gateway) == {"steady"})  # the newest state wins
            await traffic.more(20)
    assert traffic.failed == []
    assert puts > 2 * (len(seen) - 1)
    assert len(seen) - 1 <= took / 0.2 + 2


async def test_E10_registrations_are_poison(row, etcd, prefix) -> None:
    async with (
        ScriptedBackend() as target,  # what an attacker would like us to call
        backends("one", "two") as scripted,
        client_of(etcd.url) as client,
        discovering(row, etcd.url, prefix, writer=client, networks=["127.0.0.0/8"]) as gateway,
    ):
        poison = {
            "metadata": encode(Registration("http://169.254.169.254/latest")),
            "number": encode(Registration(f"http://2130706433:{target.port}")),
            "mapped": encode(Registration(f"http://[::ffff:169.254.169.254]:{target.port}")),
            "user": encode(Registration(f"http://a@127.0.0.1:{target.port}")),
            "file": encode(Registration("file:///etc/passwd")),
            "everywhere": encode(Registration(f"http://0.0.0.0:{target.port}")),
            "json": b"{" * 60_000,
            "deep": b"[" * 60_000,
            "huge": b"x" * 1_400_000,
            "a b\n": encode(Registration(target.url)),
        }
        await register(client, prefix, {"one": scripted["one"]})
        await until(lambda: healthy(gateway) == {"one"})
        async with Traffic(gateway.data_address) as traffic:
            for name, value in poison.items():
                await client.put(f"{prefix}/backends/tiny/{name}", value)
            await register(client, prefix, {"two": scripted["two"]})
            await until(lambda: healthy(gateway) == {"one", "two"})
            assert answered_by(await traffic.more(50)) == {"one", "two"}
            assert (await scrape(gateway)).value("weir_discovery_rejected_total") == len(poison)
        assert is_watching(gateway)
    assert traffic.failed == []
    assert target.connections == 0


async def test_E11_more_keys_than_anybody_has_backends(row, etcd, prefix, monkeypatch) -> None:
    most = 300
    monkeypatch.setattr("discovery.discovery.Vetting", partial(Vetting, max_backends=most))
    async with (
        ScriptedBackend() as backend,
        client_of(etcd.url) as client,
        discovering(row, etcd.url, prefix, writer=client) as gateway,
    ):
        async with announced(etcd.url, "tiny/a", backend.url, prefix):
            await until(lambda: healthy(gateway) == {"a"})
            async with Traffic(gateway.data_address) as traffic:
                for start in range(0, 2 * most, 100):
                    puts = [
                        rpc.PutRequest(key=f"{prefix}/backends/more/{i}".encode(), value=value_of(backend))
                        for i in range(start, start + 100)
                    ]
                    request = rpc.TxnRequest(success=[rpc.RequestOp(request_put=put) for put in puts])
                    await client.call(lambda channel: rpc.KVStub(channel).Txn, request)
                await until(lambda: len(gateway.fleet.backends) == most)
                told = await scrape(gateway)
                assert told.value("weir_discovery_rejected_total", reason=f"there are {most} backends already") == (
                    2 * most + 2 - most
                )
                await until(lambda: all(each.healthy for each in gateway.fleet.backends.values()))
                await traffic.more(20)
    assert traffic.failed == []


async def test_E12_the_gateway_loses_its_own_lease(row, etcd, prefix, monkeypatch) -> None:
    monkeypatch.setattr("gateway.sources.Announcement", partial(Announcement, ttl=2))
    monkeypatch.setattr("discovery.announce.RETRY_CAP_SECONDS", 0.5)
    async with (
        FaultProxy(etcd.port) as line,
        client_of(etcd.url) as client,
        discovering(row, line.url, prefix, writer=client) as gateway,
    ):
        key = f"{prefix}/gateways/{gateway.id}".encode()

        async def lease() -> int:
            found = await client.call(lambda channel: rpc.KVStub(channel).Range, rpc.RangeRequest(key=key))
            return found.kvs[0].lease if found.kvs else 0

        async def wait_other_than(*leases: int) -> int:
            async with asyncio.timeout(15):
                while (now := await lease()) in leases:
                    await asyncio.sleep(0.02)
            return now

        first = await wait_other_than(0)
        await client.revoke(first)
        second = await wait_other_than(0, first)
        line.to_server.swallows = line.to_client.swallows = line.black_hole = True  # nobody says that it is lost
        await wait_other_than(second)
        await line.heal()
        assert await wait_other_than(0) not in {first, second}


async def test_E13_news_never_goes_backwards_over_a_line_that_breaks(row, etcd, prefix, impatient, brisk) -> None:
    async with (
        FaultProxy(etcd.port) as line,
        ScriptedBackend() as backend,
        client_of(etcd.url) as client,
        discovering(row, line.url, prefix, writer=client) as gateway,
    ):
        seen: list[int] = []
        gateway.discovery.store.subscribe(
            lambda snapshot: seen.extend(endpoint.weight for endpoint in snapshot.services.get("tiny", ()))
        )
        last = 0
        for number in range(8):
            for _ in range(5):
                last += 1
                value = encode(Registration(backend.url, models=MODELS, weight=last))
                await client.put(f"{prefix}/backends/tiny/one", value)
            if number % 2:
                await line.reset()
            elif number % 4:
                line.to_client.cut_after = 400
            else:
                line.to_client.cut_after = None
            await until(lambda: seen)
        await line.heal()
        await until(lambda: seen[-1] == last, 15)
        newest = max(item.revision for item in (await backends_in(client, prefix).list()).items)
        assert gateway.discovery.watch.revision >= newest
    assert seen == sorted(seen)


async def test_E14_a_token_is_forgotten_by_etcd(row, own_etcd, impatient) -> None:
    row.secrets.append("s3cret-of-etcd")
    (row.home / "password").write_text("s3cret-of-etcd\n")
    (row.home / "root").write_text("root\n")
    login = {"username": "weir", "password_file": "password"}
    async with client_of(own_etcd.url) as client:
        await enable_users(client, "weir", "s3cret-of-etcd", "/weir/")
    async with (
        backends("one", "two") as scripted,
        client_of(own_etcd.url, username="root", password_file=row.home / "root") as client,
        discovering(row, own_etcd.url, writer=client, etcd_keys=login) as gateway,
    ):
        await register(client, "/weir/v1", {"one": scripted["one"]})
        await until(lambda: healthy(gateway) == {"one"})
        async with Traffic(gateway.data_address) as traffic:
            await traffic.more(20)
            await asyncio.to_thread(own_etcd.restart)  # tokens live in its memory
            await client.close()
            await register(client, "/weir/v1", {"two": scripted["two"]})
            await until(lambda: healthy(gateway) == {"one", "two"}, 15)
            await traffic.more(20)
    assert traffic.failed == []


async def test_E14_certificates_run_out_and_are_renewed(row, impatient) -> None:
    authority = Authority(row.home)
    its, ours = authority.issue("etcd", ["127.0.0.1"]), authority.issue("weir", ["weir"])
    files = (f"--cert-file={its.cert}", f"--key-file={its.key}", f"--trusted-ca-file={authority.cert}")
    tls = {"ca": str(authority.cert), "cert": str(ours.cert), "key": str(ours.key)}
    with EtcdServer(row.home, arguments=(*files, "--client-cert-auth"), scheme="https") as server:
        async with (
            backends("one", "two") as scripted,
            client_of(
                server.url,
                tls=lambda: Credentials(*(path.read_bytes() for path in (authority.cert, ours.cert, ours.key))),
            ) as client,
            discovering(row, server.url, writer=client, etcd_keys=tls) as gateway,
        ):
            await register(client, "/weir/v1", {"one": scripted["one"]})
            await until(lambda: healthy(gateway) == {"one"})
            async with Traffic(gateway.data_address) as traffic:
                authority.issue("etcd", ["127.0.0.1"], days=-1)  # ran out yesterday
                await asyncio.to_thread(server.restart)
                await until(lambda: is_stale(gateway))
                await traffic.more(20)
                authority.issue("etcd", ["127.0.0.1"])
                await until(lambda: is_watching(gateway), 15)

                authority.issue("weir", ["weir"], days=-1)
                await until(lambda: b'{result="refused",use="etcd"} 1.0' in gateway.metrics.render()[0])
                await asyncio.to_thread(server.restart)  # and is met again with the certificate before it
                await until(lambda: is_watching(gateway), 15)
                await traffic.more(20)
                authority.issue("weir", ["weir"])
                await until(lambda: b'{result="ok",use="etcd"} 2.0' in gateway.metrics.render()[0])
                await client.close()
                await register(client, "/weir/v1", {"two": scripted["two"]})
                await until(lambda: healthy(gateway) == {"one", "two"}, 15)
                await traffic.more(20)
    assert traffic.failed == []
