"""Following a real etcd through everything that happens to one."""

import asyncio
import itertools
import time
from contextlib import asynccontextmanager
from ipaddress import ip_network
from random import Random

import pytest
from aetcd import rpc

from discovery.discovery import Discovery, backends_in
from discovery.endpoint import Registration, encode
from discovery.etcd import Credentials, EtcdClient, EtcdSettings, EtcdSource
from discovery.probe import Checked
from discovery.source import Compacted, KeyValue, Rejected, Resynced, StateChanged, SyncState, Unavailable
from discovery.watch import Timing, Watch
from tests.support.certificates import Authority
from tests.support.cut_line import CutLine
from tests.support.etcd_server import EtcdServer, etcd_cluster
from tests.support.etcd_users import enable_users

pytestmark = pytest.mark.integration

IMPATIENT = Timing(silence=0.6, ping=0.4, backoff_cap=0.5)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def own_server(tmp_path):
    with EtcdServer(tmp_path) as server:
        yield server


prefixes = (f"/test/{i}/" for i in itertools.count())


@pytest.fixture
def prefix():
    return next(prefixes)


class Follower:
    def __init__(self, source, timing):
        self.mirror = {}
        self.events = []
        self.watch = Watch(source, self.apply, self.events.append, Random(0), timing)

    def apply(self, delta):
        for key in delta.deletes:
            del self.mirror[key]
        self.mirror.update((item.key, item.value) for item in delta.puts)

    @property
    def resyncs(self):
        return [event.reason for event in self.events if isinstance(event, Resynced)]

    @property
    def states(self):
        return [event.state.value for event in self.events if isinstance(event, StateChanged)]


@asynccontextmanager
async def following(prefix, *urls, timing=IMPATIENT):
    async with EtcdClient(EtcdSettings(urls)) as client:
        follower = Follower(EtcdSource(client, prefix, 65536), timing)
        async with running(follower.watch):
            await eventually(lambda: follower.watch.state is SyncState.WATCHING)
            yield follower


@asynccontextmanager
async def running(part):
    task = asyncio.create_task(part.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()


async def eventually(holds, seconds=10.0):
    """Waits for a condition, with a limit."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.005)


async def compact(client):
    revision = await client.put("/elsewhere", b"")
    await client.call(lambda channel: rpc.KVStub(channel).Compact, rpc.CompactionRequest(revision=revision))


async def test_puts_and_deletes_are_seen_at_once(server, prefix):
    async with following(prefix, server.url) as follower, EtcdClient(EtcdSettings((server.url,))) as client:
        await client.put(prefix + "a", b"1")
        await client.put(prefix[:-1] + "x/a", b"a neighbour's")
        await eventually(lambda: follower.mirror == {"a": b"1"}, 1)
        await client.put(prefix + "a", b"2")
        await client.put(prefix + "b", b"1")
        await client.delete(prefix + "b")
        await eventually(lambda: follower.mirror == {"a": b"2"}, 1)
        await client.delete(prefix + "a")
        await eventually(lambda: follower.mirror == {}, 1)
        assert (follower.resyncs, follower.states) == (["start"], ["watching"])


async def test_a_source_tells_what_etcd_says(server, prefix):
    async with EtcdClient(EtcdSettings((server.url,))) as client:
        source = EtcdSource(client, prefix, 10)
        assert await source.ping() == 0
        revision = await client.put(prefix + "a", b"x" * 100)
        listing = await source.list()
        assert listing.items == (KeyValue("a", b"x" * 11, revision),)
        assert listing.revision == revision
        assert await source.ping() == revision
        watch = source.watch(revision)
        assert (await anext(watch)).events == ()
        assert (await anext(watch)).events == listing.items
        await watch.aclose()
        await compact(client)
        watch = source.watch(revision)
        with pytest.raises(Compacted, match="is gone"):
            [changes async for changes in watch]


async def test_compaction_past_our_revision_while_the_line_is_cut(server, prefix):
    async with CutLine(server.port) as line, EtcdClient(EtcdSettings((server.url,))) as client:
        for key in "abc":
            await client.put(prefix + key, b"1")
        async with following(prefix, f"http://127.0.0.1:{line.port}") as follower:
            await line.cut()
            await eventually(lambda: follower.watch.state is SyncState.STALE)
            assert set(follower.mirror) == {"a", "b", "c"}
            await client.delete(prefix + "a")
            await client.put(prefix + "b", b"2")
            await client.put(prefix + "d", b"1")
            await compact(client)
            await line.mend()
            await eventually(lambda: follower.mirror == {"b": b"2", "c": b"1", "d": b"1"})
            await client.put(prefix + "e", b"1")
            await eventually(lambda: "e" in follower.mirror)
            assert follower.resyncs == ["start", "lost"]


async def test_killed_and_back_again(own_server, prefix):
    async with EtcdClient(EtcdSettings((own_server.url,))) as client:
        await client.put(prefix + "a", b"1")
        async with following(prefix, own_server.url) as follower:
            own_server.kill()
            await eventually(lambda: follower.watch.state is SyncState.STALE)
            await asyncio.sleep(0.3)
            assert follower.mirror == {"a": b"1"}
            await asyncio.to_thread(own_server.start)
            await eventually(lambda: follower.watch.state is SyncState.WATCHING)
            await client.close()  # or the first call may find its old connection broken
            await client.put(prefix + "b", b"1")
            await eventually(lambda: "b" in follower.mirror)
            assert follower.states == ["watching", "stale", "watching"]


async def test_a_frozen_server_is_noticed_and_found_again(own_server, prefix):
    async with EtcdClient(EtcdSettings((own_server.url,))) as client:
        await client.put(prefix + "a", b"1")
        async with following(prefix, own_server.url) as follower:
            own_server.pause()
            await eventually(lambda: follower.watch.state is SyncState.STALE, 3)
            assert follower.mirror == {"a": b"1"}
            own_server.resume()
            await client.put(prefix + "a", b"2")
            await eventually(lambda: follower.mirror == {"a": b"2"}, 15)
            assert follower.resyncs[:2] == ["start", "frozen"]


async def test_a_lease_that_ends_takes_its_keys(server, prefix):
    async with EtcdClient(EtcdSettings((server.url,))) as client, following(prefix, server.url) as follower:
        lease = await client.grant(1)
        await client.put(prefix + "a", b"1", lease)
        await eventually(lambda: "a" in follower.mirror)
        await eventually(lambda: "a" not in follower.mirror)


async def test_a_wiped_etcd_is_another_cluster(own_server, prefix):
    async with EtcdClient(EtcdSettings((own_server.url,))) as client:
        for key in "abc":
            await client.put(prefix + key, b"1")
        await client.close()
        async with following(prefix, own_server.url) as follower:
            await asyncio.to_thread(own_server.wipe)
            await client.put(prefix + "b", b"1")
            await eventually(lambda: follower.mirror == {"b": b"1"})
            assert "cluster_changed" in follower.resyncs


async def test_starting_other_programs_disturbs_no_watch(server, prefix, capfd):
    async with following(prefix, server.url) as follower, EtcdClient(EtcdSettings((server.url,))) as client:
        for i in range(5):
            process = await asyncio.create_subprocess_exec("true", preexec_fn=lambda: None)  # forks for real
            await process.wait()
            await client.put(prefix + "a", b"%d" % i)
            await eventually(lambda i=i: follower.mirror == {"a": b"%d" % i})
        assert follower.resyncs == ["start"]
    assert capfd.readouterr().err == ""


async def test_a_dead_endpoint_is_passed_over(server, prefix):
    async with following(prefix, "http://127.0.0.1:1", server.url) as follower:
        assert follower.resyncs == ["start"]


async def test_a_member_that_lost_its_cluster_is_left(tmp_path, prefix):
    with etcd_cluster(tmp_path) as (one, two, three):
        async with EtcdClient(EtcdSettings((two.url,))) as client:
            await client.put(prefix + "a", b"1")
        async with following(prefix, one.url, timing=Timing(backoff_cap=0.5)) as follower:
            two.pause()
            three.pause()
            await eventually(lambda: follower.watch.state is SyncState.STALE)
            assert follower.resyncs == ["start"]  # and what it alone still knows is not asked for
            assert follower.mirror == {"a": b"1"}
            two.resume()
            three.resume()
            await eventually(lambda: follower.watch.state is SyncState.WATCHING, 20)


async def test_two_members_of_three_are_enough(tmp_path, prefix):
    with etcd_cluster(tmp_path) as (one, two, three):
        async with (
            EtcdClient(EtcdSettings((two.url, three.url))) as client,
            following(prefix, one.url, two.url, three.url) as follower,
        ):
            await client.put(prefix + "a", b"1")
            await eventually(lambda: "a" in follower.mirror)
            one.kill()
            await eventually(lambda: "lost" in follower.resyncs)
            await client.put(prefix + "b", b"1")
            await eventually(lambda: "b" in follower.mirror)


async def test_ten_thousand_keys(server, prefix):
    async with EtcdClient(EtcdSettings((server.url,))) as client:
        value = encode(Registration(url="http://10.0.0.1:9000"))
        for start in range(0, 10_000, 100):
            puts = [
                rpc.RequestOp(request_put=rpc.PutRequest(key=f"{prefix}a/{i}".encode(), value=value))
                for i in range(start, start + 100)
            ]
            await client.call(lambda channel: rpc.KVStub(channel).Txn, rpc.TxnRequest(success=puts))
        source = EtcdSource(client, prefix, 65536)

        async def probe(_):
            return Checked(True, "asked")

        discovery = Discovery(
            source,
            probe=probe,
            allow_networks=[ip_network("10.0.0.0/8")],
            rng=Random(0),
            observe=lambda _: None,
        )
        async with running(discovery), EtcdClient(EtcdSettings((server.url,))) as other:
            started = time.perf_counter()
            await discovery.wait_listed()
            assert time.perf_counter() - started < 5
            assert len(discovery.store.snapshot.services["a"]) == 10_000
            kept = discovery.store.snapshot.endpoints["a/5"]
            revision = discovery.watch.revision
            await other.put(prefix + "a/new", value)
            await eventually(lambda: discovery.watch.revision > revision)
            await other.delete(prefix + "a/7")
            await eventually(lambda: "a/7" not in discovery.store.snapshot.endpoints, 5)
            assert discovery.store.snapshot.endpoints["a/5"] is kept


async def test_poison_stops_nothing(server):
    base = "/poison"
    prefix = f"{base}/backends/"
    events = []

    async def probe(_):
        return Checked(True, "asked")

    async with EtcdClient(EtcdSettings((server.url,))) as client, EtcdClient(EtcdSettings((server.url,))) as writer:
        good = encode(Registration(url="http://10.0.0.1:9000"))

        async def poison(name):
            await writer.put(prefix + f"a/{name}-huge", b"x" * 1_500_000)
            await writer.put(prefix + f"a/{name}-json", b"{")
            await writer.put(prefix + f"a/{name}-deep", b"[" * 60_000)
            await writer.put(prefix + f"a/{name}-ssrf", encode(Registration(url="http://169.254.169.254/latest")))
            await writer.put(prefix + f"{name}\n", good)
            binary = rpc.PutRequest(key=prefix.encode() + b"a/\xff\xfe" + name.encode(), value=good)
            await writer.call(lambda channel: rpc.KVStub(channel).Put, binary)

        await poison("before")
        await writer.put(prefix + "a/1", good)
        discovery = Discovery(
            backends_in(client, base),
            probe=probe,
            allow_networks=[ip_network("10.0.0.0/8")],
            rng=Random(0),
            observe=events.append,
        )
        async with running(discovery):
            await discovery.wait_listed()
            assert set(discovery.store.snapshot.endpoints) == {"a/1"}
            await poison("after")
            await writer.put(prefix + "a/2", good)
            await eventually(lambda: set(discovery.store.snapshot.endpoints) == {"a/1", "a/2"})
            rejected = [event for event in events if isinstance(event, Rejected)]
            assert len(rejected) == 12
            assert all(f"{each.key}{each.reason}".isprintable() for each in rejected)
            assert discovery.watch.state is SyncState.WATCHING


async def test_more_than_a_message_may_hold_is_listed_in_smaller_pages(server, prefix):
    async with EtcdClient(EtcdSettings((server.url,))) as client:
        for i in range(12):
            await client.put(f"{prefix}{i:02}", b"x" * 1_500_000)
        listing = await EtcdSource(client, prefix, 65536).list()
        assert [item.key for item in listing.items] == [f"{i:02}" for i in range(12)]
        assert {len(item.value) for item in listing.items} == {65537}


async def test_tls_with_client_certificates(tmp_path, prefix):
    authority = Authority(tmp_path)
    its, ours = authority.issue("etcd", ["127.0.0.1"]), authority.issue("weir", ["weir"])
    (tmp_path / "other").mkdir()
    strangers = Authority(tmp_path / "other").issue("stranger", ["weir"])
    arguments = (
        f"--cert-file={its.cert}",
        f"--key-file={its.key}",
        f"--trusted-ca-file={authority.cert}",
        "--client-cert-auth",
    )
    with EtcdServer(tmp_path, arguments=arguments, scheme="https") as server:

        async def put(**files):
            credentials = Credentials(**{name: path.read_bytes() for name, path in files.items()})
            async with EtcdClient(EtcdSettings((server.url,), tls=lambda: credentials)) as client:
                return await client.put(prefix + "a", b"1")

        assert await put(ca=authority.cert, cert=ours.cert, key=ours.key) > 1
        for files in (
            {"cert": ours.cert, "key": ours.key},
            {"ca": authority.cert},
            {"ca": authority.cert, "cert": strangers.cert, "key": strangers.key},
        ):
            with pytest.raises(Unavailable):
                await put(**files)


async def test_user_and_password_and_a_token_that_is_forgotten(own_server, tmp_path):
    async with EtcdClient(EtcdSettings((own_server.url,))) as client:
        await enable_users(client, "weir", "s3cret", "/weir/")
    password = tmp_path / "password"
    password.write_text("s3cret\n")

    def user(file):
        return EtcdClient(EtcdSettings((own_server.url,), username="weir", password_file=file))

    async with user(password) as client:
        source = EtcdSource(client, "/weir/", 65536)
        await client.put("/weir/a", b"1")
        assert len((await source.list()).items) == 1
        lease = await client.grant(10)
        with pytest.raises(Unavailable, match="permission denied"):
            await client.put("/other", b"1")
        await client.put("/weir/a", b"1", lease)
        client._token = "forgotten.1"  # what a token is to etcd after five idle minutes or a restart
        await client.put("/weir/b", b"1")
        assert client._token != "forgotten.1"
        client._token = "forgotten.1"
        watch = source.watch(1)
        with pytest.raises(Unavailable):
            [changes async for changes in watch]
        follower = Follower(source, IMPATIENT)
        async with running(follower.watch):
            await eventually(lambda: follower.states == ["watching"])  # the listing alone fills the mirror
            assert follower.mirror == {"a": b"1", "b": b"1"}
            await asyncio.to_thread(own_server.restart)
            await eventually(lambda: follower.states == ["watching", "stale", "watching"])
    wrong = tmp_path / "wrong"
    wrong.write_text("guess")
    async with user(wrong) as client:
        with pytest.raises(Unavailable, match="invalid user ID or password") as refused:
            await client.put("/weir/a", b"2")
        assert "guess" not in str(refused.value)
