from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.admission import bucket_key
from gateway.meter import UNKNOWN, LeasedMeter
from gateway.store import FAILURES, SCRIPT, RedisStore, script_arguments
from observability.events import StoreChanged
from policies import errors
from policies.lease import Ask, Limit
from policies.policy import Plan, Rate, WhenStoreIsDown
from tests.support.fault_proxy import FaultProxy
from tests.support.lease_ledger import MICRO, Ledger
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.integration

LOOP = "uvloop"
KEYS = itertools.count()
EPOCH = 1_800_000_000 * MICRO

SLOW = Plan("slow", Rate(1, 3600.0), 10)
"""What is spent stays spent for as long as a test takes."""

CLOSED = Plan("slow", Rate(1, 3600.0), 10, when_store_is_down=WhenStoreIsDown.CLOSED)


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def fragile(tmp_path):
    """One that the test may kill."""
    with RedisServer(tmp_path) as server:
        yield server


@contextlib.asynccontextmanager
async def running(url: str) -> AsyncIterator[tuple[RedisStore, list[StoreChanged]]]:
    events: list[StoreChanged] = []
    store = RedisStore(url, rng=random.Random(1), observe=events.append)
    task = asyncio.create_task(store.run())
    try:
        await store.wait_probed()
        yield store, events
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def now() -> float:
    return asyncio.get_running_loop().time()


def leased(store: RedisStore, plan: Plan = SLOW, consumer: str | None = None, gateways: int = 1) -> LeasedMeter:
    """A meter of a bucket that nobody used before, or of `consumer`."""
    key = bucket_key(plan.name, consumer if consumer is not None else f"consumer {next(KEYS)}")
    limit = Limit(plan.burst, plan.requests)
    return LeasedMeter(store, key, plan, limit, live_gateways=lambda: gateways, now=now)


async def take(meter: LeasedMeter) -> float:
    seconds = meter.take_nowait(now())
    return await meter.take() if seconds == UNKNOWN else seconds


async def take_many(meter: LeasedMeter, count: int) -> int:
    """How many of `count` requests at once are admitted."""
    return (await asyncio.gather(*(take(meter) for _ in range(count)))).count(0.0)


async def take_in_turn(meter: LeasedMeter, count: int) -> tuple[int, float]:
    """How many of `count` requests, one after the other, are admitted; and the longest that one of them took."""
    admitted, longest = 0, 0.0
    for _ in range(count):
        began = now()
        admitted += await take(meter) == 0.0
        longest = max(longest, now() - began)
    return admitted, longest


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def lose(store: RedisStore) -> None:
    """Ask until the store knows that Redis is away."""
    meter = leased(store, Plan("lose", Rate(1000, 1.0), 1000, when_store_is_down=WhenStoreIsDown.OPEN))
    async with asyncio.timeout(10):
        while store.up:
            await take(meter)


PATIENCE = 0.5
"""Seconds in which a request must be through when it may wait 25 ms: this machine has other things to do, too."""


SCRIPT_ON_A_GIVEN_CLOCK = SCRIPT.replace("redis.call('TIME')", "{KEYS[2], KEYS[3]}")


class TestScript:
    """The script in Redis and its model in Python give the same answers to the same questions at the same times."""

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        limit=st.sampled_from([Limit(1, Rate(1, 1.0)), Limit(10, Rate(60, 60.0)), Limit(100, Rate(333.3, 1.0))]),
        questions=st.lists(
            st.fixed_dictionaries(
                {
                    "later": st.sampled_from(
                        [-3_600_000_000, 0, 7, 1_000, 90_000, 450_000, 600_000, 3_500_000, 20_000_000]
                    ),
                    "replica": st.sampled_from("ab"),
                    "unseen": st.booleans(),
                    "stray": st.sampled_from([False, False, False, True]),
                    "need": st.integers(0, 12),
                    "spare": st.integers(0, 5),
                    "held": st.integers(0, 5),
                    "back": st.sampled_from([0, 0, 1, 5, -1, -30]),
                    "debt": st.sampled_from([0, 0, 3]),
                    "quiet": st.sampled_from([0.0, 0.002, 0.3, 5.0]),
                    "least": st.sampled_from([1, 1, 2, 7]),
                    "reserved": st.sampled_from([0, 0, 4, 9]),
                    "told": st.sampled_from([0, 0, 4]),
                }
            ),
            min_size=1,
            max_size=25,
        ),
    )
    def test_is_what_the_model_says(self, redis, limit: Limit, questions: list[dict[str, object]]):
        ledger, now, number = Ledger(), EPOCH, 10
        key = b"script:%d" % next(KEYS)
        seen = {"a": 0, "b": 0}
        for question in questions:
            now += question.pop("later")
            replica, stray, unseen = (question.pop(name) for name in ("replica", "stray", "unseen"))
            ask = Ask(**question, ack=seen[replica], sent_at=0.0)
            number += 1
            this = number - 5 if stray else number
            expected = ledger.lease(key, limit, replica, this, ask, now)
            _, _, *arguments = script_arguments(key, replica, this, limit, ask)
            reply = redis.command("EVAL", SCRIPT_ON_A_GIVEN_CLOCK, 3, key, now // MICRO, now % MICRO, *arguments)
            assert [int(part) for part in reply] == [
                this, expected.tokens, round(expected.level * MICRO), round(expected.wait * MICRO)
            ]  # fmt: skip
            if not unseen:
                seen[replica] = max(this, seen[replica])


@pytest.mark.usefixtures("patient")
class TestSharing:
    async def test_one_burst_for_all_replicas(self, redis):
        async with running(redis.url) as (one, events), running(redis.url) as (other, _):
            meters = [leased(store, consumer="alice", gateways=2) for store in (one, other, one, other)]
            assert sum(await asyncio.gather(*(take_many(meter, 8) for meter in meters[:2]))) == 10
        assert events == [StoreChanged(up=True, reason="answered")]

    async def test_steady_pressure_never_gets_more_than_the_bucket(self, redis):
        plan = Plan("steady", Rate(400, 1.0), 40)
        async with contextlib.AsyncExitStack() as stack:
            stores = [(await stack.enter_async_context(running(redis.url)))[0] for _ in range(3)]
            meters = [leased(store, plan, "steady", gateways=3) for store in stores]
            began, admitted = now(), 0
            while now() - began < 1.5:
                admitted += sum(await asyncio.gather(*(take_many(meter, 2) for meter in meters)))
                await asyncio.sleep(0.001)
            allowed = 400 * (now() - began)
        assert 40 < admitted <= 40 + allowed  # how near it comes is shown on a virtual clock, in test_meter.py

    async def test_a_refused_consumer_costs_redis_little(self, redis):
        async with running(redis.url) as (store, _):
            meter = leased(store)
            await take_many(meter, 11)
            before = calls(redis)
            for _ in range(2000):
                assert meter.take_nowait(now()) > 0.0
            assert calls(redis) == before

    async def test_spare_tokens_are_back_in_redis_when_the_traffic_ends(self, redis):
        async with running(redis.url) as (store, _):
            meter = leased(store, Plan("spare", Rate(1, 3600.0), 1000))
            assert await take_many(meter, 100) == 100
            assert await take_many(meter, 1) == 1
            key = meter.key.decode()
            await until(lambda: redis.text("HGET", key, "level").startswith("899"))

    async def test_keys_show_no_names_and_end(self, fragile):
        async with running(fragile.url) as (store, _):
            await take(leased(store, Plan("slow", Rate(1, 1.0), 10), "alice:{secret}\n"))
            keys = sorted(fragile.command("KEYS", "*"))
            assert [key.partition(b"{")[0] for key in keys] == [b"weir:v1:bucket:", b"weir:v1:probe"]
            assert b"secret" not in b"".join(keys)
            assert all(0 < fragile.command("PTTL", key) <= 12_000 for key in keys)


@pytest.mark.usefixtures("patient")
class TestForgetting:
    async def test_flushed_scripts_are_not_noticed(self, redis):
        async with running(redis.url) as (store, events):
            meter = leased(store, CLOSED)
            assert await take_many(meter, 4) == 4
            redis.command("SCRIPT", "FLUSH")
            assert await take_many(meter, 10) == 6
            assert [event.up for event in events] == [True]

    async def test_flushed_buckets_are_full_again(self, fragile):
        async with running(fragile.url) as (store, events):
            meter = leased(store, CLOSED)
            assert await take_many(meter, 10) == 10
            fragile.flush()
            meter.put_back(now())  # asks again at once
            assert await take_many(meter, 20) == 10
            assert [event.up for event in events] == [True]

    @pytest.mark.parametrize(
        "junk",
        [
            ("SET", "{key}", "junk"),
            ("HSET", "{key}", "level", "junk"),
            ("HSET", "{key}", "at", "-1"),
            ("HSET", "{key}", "f00", "1 2 3"),
            ("HDEL", "{key}", "level"),
            ("HSET", "{key}", "level", "nan"),
        ],
        ids=" ".join,
    )
    async def test_junk_in_place_of_a_bucket_is_an_empty_bucket_and_repaired(self, redis, junk):
        plan = Plan("fast", Rate(100, 1.0), 10, when_store_is_down=WhenStoreIsDown.CLOSED)
        async with running(redis.url) as (store, events):
            meter = leased(store, plan)
            assert await take(meter) == 0.0
            if junk[0] == "SET":
                redis.command("DEL", meter.key)
            redis.command(*(word.format(key=meter.key.decode().replace("{", "{").replace("}", "}")) for word in junk))
            assert await take_many(meter, 10) <= 1
            await asyncio.sleep(0.06)
            assert await take(meter) == 0.0
            assert redis.text("TYPE", meter.key) == "hash"
            assert [event.up for event in events] == [True]


class TestAway:
    @pytest.mark.usefixtures("patient")
    async def test_never_there(self, tmp_path):
        async with running(f"redis://:secret@127.0.0.1:{free_port()}") as (store, events):
            assert events == [StoreChanged(up=False, reason="no connection")]
            admitted, longest = await take_in_turn(leased(store, gateways=2), 20)
            assert admitted == 5
            assert longest < PATIENCE
            assert "secret" not in repr(store)

    async def test_one_that_goes_while_nobody_asks_is_missed_all_the_same(self, fragile, monkeypatch):
        monkeypatch.setattr("gateway.store.PROBE_SECONDS", 0.02)
        async with running(fragile.url) as (store, events):
            await asyncio.to_thread(fragile.kill)
            await until(lambda: not store.up)
            await asyncio.to_thread(fragile.start)
            await until(lambda: store.up)
        assert [event.up for event in events] == [True, False, True]

    @pytest.mark.usefixtures("patient")
    async def test_killed_and_started_again(self, fragile):
        async with running(fragile.url) as (store, events):
            meter = leased(store, gateways=2)
            assert await take_many(meter, 4) == 4
            await asyncio.to_thread(fragile.kill)
            admitted, longest = await take_in_turn(meter, 20)
            assert admitted == 3  # half of the six that were left
            assert longest < PATIENCE
            await lose(store)
            assert meter.take_nowait(now()) > 0.0
            await asyncio.to_thread(fragile.start)
            await until(lambda: store.up)
            assert await take_many(meter, 20) == 7  # empty after the restart, less the three
        assert [event.up for event in events] == [True, False, True]

    @pytest.mark.usefixtures("patient")
    async def test_reset_while_nobody_asks(self, fragile):
        """uvloop then says RuntimeError to whoever writes."""
        async with FaultProxy(fragile.port) as line, running(f"redis://127.0.0.1:{line.port}/0") as (store, events):
            meter = leased(store)
            assert await take_many(meter, 4) == 4
            await line.refuse()
            await line.reset()
            await lose(store)
            await line.listen()
            await until(lambda: store.up)
            assert await take_many(meter, 20) == 6
        assert [(event.up, event.reason) for event in events] == [
            (True, "answered"), (False, "no connection"), (True, "answered")
        ]  # fmt: skip

    @pytest.mark.usefixtures("patient")
    async def test_frozen(self, fragile, monkeypatch):
        async with running(fragile.url) as (store, events):
            meter = leased(store)
            assert await take_many(meter, 4) == 4
            fragile.pause()
            for name in ("store.STORE_SECONDS", "meter.STORE_SECONDS", "store.CONNECT_SECONDS"):
                monkeypatch.setattr(f"gateway.{name}", 0.025)
            admitted, longest = await take_in_turn(meter, 20)
            assert admitted == 6
            assert longest < PATIENCE
            await lose(store)
            assert meter.take_nowait(now()) > 0.0
            fragile.resume()
            await until(lambda: store.up)
            assert await take_many(meter, 20) == 0  # what it was asked while it was frozen changed nothing
        assert [(event.up, event.reason) for event in events] == [
            (True, "answered"), (False, "timeout"), (True, "answered")
        ]  # fmt: skip

    async def test_a_short_stop_is_no_outage(self, fragile):
        async with running(fragile.url) as (store, events):
            meter = leased(store)
            fragile.pause()
            assert await take(meter) == 0.0  # from the share
            fragile.resume()
            await until_answered(meter)
            assert FAILURES > 1
            assert [event.up for event in events] == [True]
            assert await take_many(meter, 20) <= 9

    @pytest.mark.usefixtures("patient")
    async def test_closed_plans_are_refused(self, fragile):
        async with running(fragile.url) as (store, _):
            meter = leased(store, CLOSED)
            await asyncio.to_thread(fragile.kill)
            for _ in range(10):
                with pytest.raises(errors.StoreUnavailable):
                    await take(meter)

    @pytest.mark.usefixtures("patient")
    async def test_read_only_after_a_failover(self, fragile):
        async with running(fragile.url) as (store, events):
            meter = leased(store, CLOSED)
            fragile.command("REPLICAOF", "127.0.0.1", free_port())
            with pytest.raises(errors.StoreUnavailable):
                await take(meter)
            await lose(store)
            assert events[-1] == StoreChanged(up=False, reason="read-only")
            fragile.command("REPLICAOF", "NO", "ONE")
            await until(lambda: store.up)
            assert await take_many(meter, 20) == 10

    @pytest.mark.usefixtures("patient")
    async def test_out_of_memory(self, fragile):
        async with running(fragile.url) as (store, events):
            meter = leased(store, CLOSED)
            fragile.command("CONFIG", "SET", "maxmemory", "1")
            await lose(store)
            assert events[-1] == StoreChanged(up=False, reason="out of memory")
            with pytest.raises(errors.StoreUnavailable):
                await take(meter)
            fragile.command("CONFIG", "SET", "maxmemory", "0")
            await until(lambda: store.up)
            assert await take_many(meter, 20) == 10


@pytest.mark.usefixtures("patient")
class TestCancelling:
    async def test_a_storm_mixes_up_no_replies_and_loses_no_token(self, redis):
        rng = random.Random(3)
        plan = Plan("storm", Rate(1, 3600.0), 500, when_store_is_down=WhenStoreIsDown.CLOSED)
        async with running(redis.url) as (store, events):
            meters = [leased(store, plan) for _ in range(4)]
            admitted = dict.fromkeys(meters, 0)

            async def request(meter: LeasedMeter) -> None:
                if await take(meter) == 0.0:
                    admitted[meter] += 1

            clients = connections(redis)
            for _ in range(20):
                requests = [asyncio.create_task(request(rng.choice(meters))) for _ in range(50)]
                await asyncio.sleep(rng.uniform(0.0, 0.002))
                for each in requests:
                    each.cancel()
                await asyncio.gather(*requests, return_exceptions=True)
            assert connections(redis) == clients
            for meter in meters:
                assert admitted[meter] + await take_many(meter, 600) == 500
            assert [event.up for event in events] == [True]

    async def test_ending_tells_everybody_who_waits(self, fragile):
        async with running(fragile.url) as (store, _):
            meter = leased(store, CLOSED)
            fragile.pause()
            waiting = asyncio.create_task(take(meter))
            await asyncio.sleep(0)
        with pytest.raises(errors.StoreUnavailable):
            await waiting
        assert not store.up


@pytest.mark.usefixtures("patient")
class TestKinds:
    async def test_a_password(self, tmp_path):
        with RedisServer(tmp_path, arguments=("--requirepass", "secret")) as server:
            async with running(server.url.replace("//", "//:wrong@")) as (_, events):
                assert events == [StoreChanged(up=False, reason="login refused")]
            async with running(server.url.replace("//", "//:secret@")) as (store, events):
                assert await take_many(leased(store), 20) == 10
                assert "secret" not in repr(store) + repr(events)

    async def test_cluster(self, tmp_path):
        cluster = ("--cluster-enabled", "yes", "--cluster-config-file", str(tmp_path / "nodes.conf"))
        with RedisServer(tmp_path, arguments=cluster) as server:
            server.command("CLUSTER", "ADDSLOTS", *range(16384))
            await until(lambda: b"cluster_state:ok" in server.command("CLUSTER", "INFO"))
            async with running(f"redis+cluster://127.0.0.1:{server.port}") as (store, events):
                assert await take_many(leased(store), 20) == 10
                server.command("SCRIPT", "FLUSH")
                assert await take_many(leased(store), 20) == 10
                assert [event.up for event in events] == [True]

    async def test_sentinel(self, tmp_path):
        (tmp_path / "sentinel").mkdir()
        with RedisServer(tmp_path) as master, sentinel_of(master, tmp_path / "sentinel") as sentinel:
            async with running(f"redis+sentinel://127.0.0.1:{sentinel.port}/main") as (store, events):
                assert await take_many(leased(store), 20) == 10
                assert [event.up for event in events] == [True]

    async def test_sentinel_names_another_master(self, tmp_path):
        directories = [tmp_path / name for name in ("master", "replica", "sentinel")]
        for each in directories:
            each.mkdir()
        with contextlib.ExitStack() as stack:
            master = stack.enter_context(RedisServer(directories[0]))
            following = ("--replicaof", "127.0.0.1", str(master.port))
            replica = stack.enter_context(RedisServer(directories[1], arguments=following))
            await until(lambda: "state=online" in master.text("INFO", "replication"))
            sentinel = stack.enter_context(sentinel_of(master, directories[2]))
            async with running(f"redis+sentinel://127.0.0.1:{sentinel.port}/main") as (store, events):
                assert await take_many(leased(store, consumer="alice"), 4) == 4
                replica.command("REPLICAOF", "NO", "ONE")
                master.command("REPLICAOF", "127.0.0.1", replica.port)
                sentinel.command("SENTINEL", "REMOVE", "main")
                sentinel.command("SENTINEL", "MONITOR", "main", "127.0.0.1", replica.port, 1)
                meter = leased(store, consumer="alice")
                with contextlib.suppress(errors.StoreUnavailable):
                    await take(meter)  # the old connection is of no use any more
                assert await take_many(meter, 20) >= 5
                assert replica.text("HGET", meter.key, "level")
                assert [event.up for event in events] == [True]


def sentinel_of(master: RedisServer, directory: Path) -> RedisServer:
    config = directory / "sentinel.conf"
    config.write_text(f"sentinel monitor main 127.0.0.1 {master.port} 1\n")
    return RedisServer(directory, sentinel_config=config)


async def until_answered(meter: LeasedMeter) -> None:
    """Ask until Redis has answered: then what was spent alone is told."""
    async with asyncio.timeout(10):
        while meter._slice._debt:
            await take(meter)
            await asyncio.sleep(0.01)


def calls(redis: RedisServer) -> list[str]:
    stats = redis.text("INFO", "commandstats")
    return [line for line in stats.splitlines() if line.startswith("cmdstat_evalsha")]


def connections(redis: RedisServer) -> int:
    return redis.text("CLIENT", "LIST").count("\n")
