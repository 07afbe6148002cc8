"""Plans that several gateways keep together through Redis, and what is left of them while Redis is away."""

import asyncio
import contextlib
import itertools
import json
import time

import pytest

from discovery.etcd import EtcdClient, EtcdSettings
from gateway.admission import bucket_key
from tests.support.admin_client import scrape
from tests.support.etcd_server import EtcdServer
from tests.support.raw_client import CHAT, RawClient, chat_request
from tests.support.redis_server import RedisServer
from tests.support.running_gateway import OPEN_POLICY, announced, etcd_gateway, running_gateway, until
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend, answer_ok
from tests.support.traffic import Traffic

pytestmark = pytest.mark.integration

LOOP = "uvloop"
PREFIXES = (f"/road{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def redis(tmp_path):
    with RedisServer(tmp_path) as server:
        yield server


def planned(plan: str) -> str:
    """OPEN_POLICY, and everybody is under this plan."""
    return f"{OPEN_POLICY}plans: {{p: {plan}}}\nconsumers: [{{match: {{any: true}}, plan: p}}]\n"


@contextlib.asynccontextmanager
async def gateways(count: int, home, etcd, redis, plan: str, script=answer_ok):
    """This many gateways that share a Redis and know of each other, before one backend."""
    prefix, config = next(PREFIXES), f"redis: {{url: {redis.url}}}\n"
    async with ScriptedBackend(script) as backend, contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(announced(etcd.url, "tiny/1", backend.url, prefix))
        running = [
            await stack.enter_async_context(etcd_gateway(home, etcd.url, prefix, policy=planned(plan), config=config))
            for _ in range(count)
        ]
        for gateway in running:
            await until(lambda gateway=gateway: gateway.fleet.backends and live_gateways(gateway) == count)
        yield running


def live_gateways(gateway) -> int:
    return account(gateway).meter._live_gateways()


def account(gateway):
    """What everybody here pays from."""
    caller = gateway.pipeline._identifier.identify_nowait(None, 0.0)
    return gateway.pipeline._admission.account(caller.plan, caller.principal.consumer)


def admitted(asked) -> int:
    return sum(each.status == 200 for each in asked)


def statuses(*traffics) -> set[int]:
    return {each.status for traffic in traffics for each in traffic.asked}


def waits(asked) -> list[float]:
    """How long each answer took, the slowest last."""
    return sorted(each.answered_at - each.sent_at for each in asked)


def waits_for_the_limit(asked) -> list[float]:
    """How long each waited for its limit, as it was told: the rest of an answer's time is the machine's."""
    timings = [each.answer.headers["server-timing"].split(", ") for each in asked]
    return sorted(
        float(part.removeprefix("limit;dur=")) / 1000 for parts in timings for part in parts if "limit" in part
    )


async def is_up(gateway) -> bool:
    return (await scrape(gateway)).value("weir_store_up") == 1


async def wait_store(up: bool, *running) -> None:
    async with asyncio.timeout(60):
        while [await is_up(gateway) for gateway in running] != [up] * len(running):
            await asyncio.sleep(0.02)


async def used(rate: float, *traffics, seconds: float = 2.0) -> float:
    """What share of that which the bucket is given in the next seconds is admitted in them."""

    def count() -> int:
        return sum(admitted(traffic.asked) for traffic in traffics)

    before, begun = count(), time.perf_counter()
    await asyncio.sleep(seconds)
    return (count() - before) / (rate * (time.perf_counter() - begun))


# A limit that is in force


@pytest.mark.usefixtures("patient")
async def test_two_gateways_admit_what_the_bucket_holds_and_hardly_less(tmp_path, etcd, redis) -> None:
    rate, burst = 100, 50
    async with gateways(2, tmp_path, etcd, redis, f"{{requests: {rate}/second, burst: {burst}}}") as running:
        begun = time.perf_counter()
        async with Traffic(running[0].data_address) as one, Traffic(running[1].data_address) as two:
            await until(lambda: statuses(one, two) == {200, 429})  # the burst is used up
            rounds = [await used(rate, one, two)]
            while (
                rounds[-1] < 0.97 and len(rounds) < 4
            ):  # on a busy machine the pressure may be the one that was not steady
                rounds.append(await used(rate, one, two))
        seconds = time.perf_counter() - begun
        assert [await is_up(gateway) for gateway in running] == [True, True]
    assert admitted(one.asked + two.asked) <= burst + rate * seconds
    assert max(rounds) >= 0.97
    assert statuses(one, two) == {200, 429}
    assert not one.broken + two.broken


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("patient")
async def test_a_limit_is_told_by_every_answer_and_its_advice_is_good(tmp_path, request, shared) -> None:
    redis = request.getfixturevalue("redis") if shared else None
    config = f"redis: {{url: {redis.url}}}\n" if redis else ""
    policy = planned("{requests: 2/second, burst: 3}")
    async with (
        ScriptedBackend() as backend,
        running_gateway(tmp_path, backend.url, policy=policy, config=config) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        answers = [await client.ask() for _ in range(3)]
        assert [answer.status for answer in answers] == [200] * 3
        assert [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers] == [2, 1, 0]
        assert answers[0].headers["ratelimit-policy"] == '"p";q=2;w=1'
        assert answers[0].headers["ratelimit"] == '"p";r=2;t=1'
        assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
        refused = await client.ask()
        error = refused.json["error"]
        assert (refused.status, error["code"], error["type"]) == (429, "rate_limited", "rate_limit_error")
        assert error["rule"] == "plans.p.requests"
        assert 0 < error["retry_after"] <= 0.5
        assert refused.headers["retry-after"] == "1"
        advice = int(refused.headers["retry-after-ms"]) / 1000
        assert error["retry_after"] <= advice + 0.001 <= 1.25 * error["retry_after"] + 0.002
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        await asyncio.sleep(advice)
        assert (await client.ask()).status == 200
        assert (await scrape(gateway)).value("weir_limited_total", rule="plans.p.requests") == 1
    assert len(backend.heads) == 4


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("patient")
async def test_a_new_policy_changes_the_numbers_and_gives_no_second_bucket(tmp_path, request, shared) -> None:
    redis = request.getfixturevalue("redis") if shared else None
    config = f"redis: {{url: {redis.url}}}\n" if redis else ""
    first, same, larger = (
        planned(f"{{requests: {limit}/hour, burst: {limit}, concurrency: {places}}}")
        for limit, places in ((3, 5), (3, 6), (100_000, 5))
    )
    async with (
        ScriptedBackend() as backend,
        running_gateway(tmp_path, backend.url, policy=first, config=config) as gateway,
        RawClient(gateway.data_address) as client,
    ):

        async def under(policy: str) -> None:
            before = gateway.policy.policy
            (tmp_path / "policy.yaml").write_text(policy)
            await until(lambda: gateway.policy.policy is not before)

        assert [(await client.ask()).status for _ in range(4)] == [200, 200, 200, 429]
        await under(same)
        refused = await client.ask()
        assert (refused.status, refused.headers["x-weir-policy"]) == (429, gateway.policy.policy.version)
        await under(larger)  # 28 in a second
        async with asyncio.timeout(10):
            while (answer := await client.ask()).status == 429:
                await asyncio.sleep(0.02)
        assert answer.headers["ratelimit-policy"] == '"p";q=100000;w=3600'


async def test_places_are_counted_to_the_last_byte_and_cost_no_token_when_there_is_none(tmp_path) -> None:
    end = asyncio.Event()

    async def stream(connection: BackendConnection) -> None:
        if not json.loads(connection.body).get("stream"):
            await connection.json({})
            return
        await connection.begin_events()
        await connection.chunk(b"data: {}\n\n")
        await end.wait()
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.send(b"0\r\n\r\n")
        raise Hangup

    policy = planned("{requests: 4/hour, burst: 4, concurrency: 2}")
    async with (
        ScriptedBackend(stream) as backend,
        running_gateway(tmp_path, backend.url, policy=policy) as gateway,
        RawClient(gateway.data_address) as client,
        RawClient(gateway.data_address) as ends,
    ):
        leaves = await RawClient(gateway.data_address).__aenter__()
        for each in (ends, leaves):
            each.send(chat_request({**CHAT, "stream": True}))
            await each.reader.readuntil(b"data: {}")
        for _ in range(5):
            refused = await client.ask()
            assert (refused.status, refused.json["error"]["code"]) == (429, "concurrency")
            assert refused.json["error"]["rule"] == "plans.p.concurrency"
            assert "retry-after" in refused.headers
        await leaves.__aexit__()
        await until(lambda: account(gateway).in_flight == 1)
        assert (await client.ask()).status == 200
        end.set()
        await ends.reader.readuntil(b"0\r\n\r\n")
        await until(lambda: account(gateway).in_flight == 0)
        assert (await client.ask()).status == 200
        assert (await client.ask()).json["error"]["code"] == "rate_limited"  # four of four: the refused cost none


async def test_tokens_are_set_aside_for_both_gateways_and_settled_once_with_what_was_used(
    tmp_path, etcd, redis, monkeypatch
) -> None:
    """Of 20,000 four requests set aside 5,000 each; two of them use 1,000, one is left by its client, one states nothing."""
    for module in ("store", "meter"):  # who counts tokens must not take a machine that is busy for a Redis that is away
        monkeypatch.setattr(f"gateway.{module}.STORE_SECONDS", 5.0)
    end = asyncio.Event()

    async def stream(connection: BackendConnection) -> None:
        asked = json.loads(connection.body)
        await connection.begin_events()
        for _ in range(6):
            await connection.chunk(b'data: {"choices": []}\n\n')
        if asked["user"] == "leaves":
            await connection.wait_closed()
            raise Hangup
        await end.wait()
        if asked["user"] == "states":
            usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 900}})
            await connection.chunk(b"data: %b\n\n" % usage.encode())
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.send(b"0\r\n\r\n")

    def asks(user: str) -> dict:
        return {**CHAT, "user": user, "stream": True, "max_tokens": 4950}

    prompt = {user: -(-len(json.dumps(asks(user))) // 4) for user in ("states", "leaves", "silent")}
    assert all(tokens <= 50 for tokens in prompt.values())

    async with (
        gateways(2, tmp_path, etcd, redis, "{requests: 1000/second, tokens: 20k/month}", stream) as running,
        contextlib.AsyncExitStack() as stack,
    ):
        streams = {}
        for number, user in enumerate(("states", "states", "leaves", "silent")):
            client = await stack.enter_async_context(RawClient(running[number % 2].data_address))
            client.send(chat_request(asks(user)))
            await client.reader.readuntil(b"choices")
            streams[number] = client
        for gateway in running:
            async with RawClient(gateway.data_address) as client:
                refused = await client.ask(asks("states"))
            assert (refused.status, refused.json["error"]["rule"]) == (429, "plans.p.tokens")
            assert int(refused.headers["x-ratelimit-remaining-tokens"]) < 5000
        await streams[2].__aexit__()
        end.set()
        for number in (0, 1, 3):
            await streams[number].reader.readuntil(b"0\r\n\r\n")
        used = 2 * 1000 + prompt["leaves"] + 6 + prompt["silent"] + 7  # and [DONE]
        key = bucket_key("p", "anonymous", "tokens|")
        await until(lambda: int(redis.text("HGET", key, "level")) // 1_000_000 == 20_000 - used)


# Redis dies, freezes, forgets


@pytest.mark.usefixtures("patient")
async def test_without_redis_each_gateway_has_its_share_and_all_is_merged_when_it_is_back(
    tmp_path, etcd, redis, capfd
) -> None:
    rate, burst = 100, 40
    async with gateways(2, tmp_path, etcd, redis, f"{{requests: {rate}/second, burst: {burst}}}") as running:
        begun = time.perf_counter()
        async with Traffic(running[0].data_address) as one, Traffic(running[1].data_address) as two:
            await until(lambda: statuses(one, two) == {200, 429})  # the bucket is empty
            await asyncio.to_thread(redis.kill)
            await wait_store(False, *running)
            away = time.perf_counter()
            await asyncio.sleep(1.0)
            alone = time.perf_counter() - away
            shares = [admitted(each.since(away)) for each in (one, two)]
            await asyncio.to_thread(redis.start)
            await wait_store(True, *running)
            await one.more(50)
        seconds = time.perf_counter() - begun
    assert statuses(one, two) == {200, 429}
    assert not one.broken + two.broken
    for share in shares:
        assert 0.8 * (rate / 2) * alone <= share <= burst / 2 + (rate / 2) * alone + 1
    assert waits(one.asked + two.asked)[-1] < 2.0
    assert admitted(one.asked + two.asked) <= 2 * burst + rate * seconds  # the new Redis begins with a full bucket
    logged = [line for line in capfd.readouterr().out.splitlines() if "store is" in line]
    assert sum("store is away" in line for line in logged) == 2  # one line for each gateway
    assert [json.loads(line)["event"] for line in logged[-2:]] == ["store is back"] * 2


@pytest.mark.usefixtures("patient")
async def test_the_share_follows_the_number_of_gateways_in_etcd(tmp_path, etcd, redis) -> None:
    async with gateways(1, tmp_path, etcd, redis, "{requests: 100/second, burst: 40}") as [gateway]:
        prefix = gateway.config.discovery.etcd.prefix
        async with EtcdClient(EtcdSettings((etcd.url,))) as client:
            for name in ("a", "b", "c"):
                await client.put(f"{prefix}/gateways/{name}", b"{}")
        await until(lambda: live_gateways(gateway) == 4)
        redis.kill()
        async with Traffic(gateway.data_address) as traffic:
            await wait_store(False, gateway)
            await asyncio.sleep(0.3)
            begun = time.perf_counter()
            await asyncio.sleep(1.0)
            took = time.perf_counter() - begun
            share = admitted(traffic.since(begun))
    assert 0.7 * 25 * took <= share <= 10 + 25 * took + 1


async def test_a_frozen_redis_delays_nobody_for_long(tmp_path, etcd, redis) -> None:
    async with gateways(1, tmp_path, etcd, redis, "{requests: 100/second, burst: 20}") as [gateway]:
        async with Traffic(gateway.data_address) as traffic:
            await traffic.more(50)
            redis.pause()
            paused = time.perf_counter()
            await wait_store(False, gateway)
            await traffic.more(50)
            redis.resume()
            await wait_store(True, gateway)
            await traffic.more(20)
        felt = traffic.since(paused)
    assert statuses(traffic) == {200, 429}
    assert admitted(felt) > 0
    assert waits_for_the_limit(felt)[len(felt) * 9 // 10] < 0.1  # 25 ms at most, and what a busy machine adds
    assert waits(felt)[len(felt) * 9 // 10] < 0.1
    assert waits(felt)[-1] < 2.0  # the client library would by itself have waited longer


@pytest.mark.usefixtures("patient")
async def test_what_a_refusal_waited_for_is_told(tmp_path, etcd, redis, monkeypatch) -> None:
    plan = "{requests: 1/hour, burst: 1, when_store_is_down: closed}"
    async with gateways(1, tmp_path, etcd, redis, plan) as [gateway], RawClient(gateway.data_address) as client:
        await wait_store(True, gateway)
        monkeypatch.setattr("gateway.meter.STORE_SECONDS", 0.025)  # that of the request; it does not seem away yet
        redis.pause()
        refused = await client.ask()
        redis.resume()
        assert (refused.status, refused.json["error"]["rule"]) == (503, "plans.p.when_store_is_down")
        timing = refused.headers["server-timing"].split(", ")
        phases = {name: float(value) for name, value in (part.split(";dur=") for part in timing)}
        total = phases.pop("total")
        assert phases["limit"] > 20
        assert sum(phases.values()) == pytest.approx(total, rel=0.05)


@pytest.mark.usefixtures("patient")
async def test_a_redis_that_forgets_is_told_nothing_new_by_clients(tmp_path, etcd, redis) -> None:
    rate, burst = 100, 20
    async with gateways(2, tmp_path, etcd, redis, f"{{requests: {rate}/second, burst: {burst}}}") as running:
        begun = time.perf_counter()
        async with Traffic(running[0].data_address) as one, Traffic(running[1].data_address) as two:
            await one.more(50)
            redis.flush()
            redis.command("SCRIPT", "FLUSH")
            await one.more(100)
            await two.more(100)
        seconds = time.perf_counter() - begun
        assert [await is_up(gateway) for gateway in running] == [True, True]
    assert statuses(one, two) == {200, 429}
    assert admitted(one.asked + two.asked) <= 2 * burst + rate * seconds  # the full bucket, twice


@pytest.mark.parametrize("when", ["open", "closed"])
async def test_a_plan_may_be_open_or_closed_without_redis(tmp_path, etcd, redis, when) -> None:
    plan = f"{{requests: 2/second, burst: 2, when_store_is_down: {when}}}"
    async with gateways(1, tmp_path, etcd, redis, plan) as [gateway], RawClient(gateway.data_address) as client:
        assert 429 in [(await client.ask()).status for _ in range(20)]
        redis.kill()
        async with Traffic(gateway.data_address, clients=1):
            await wait_store(False, gateway)
        answers = [await client.ask() for _ in range(50)]
        if when == "open":
            assert {each.status for each in answers} == {200}
        else:
            assert {(each.status, each.json["error"]["code"]) for each in answers} == {(503, "overloaded")}
            assert answers[0].json["error"]["rule"] == "plans.p.when_store_is_down"
            assert "retry-after" in answers[0].headers
        await asyncio.to_thread(redis.start)
        await wait_store(True, gateway)
        assert 429 in [(await client.ask()).status for _ in range(50)]


async def test_a_gateway_starts_without_redis_and_finds_it_later(tmp_path, etcd, redis) -> None:
    redis.kill()
    async with gateways(1, tmp_path, etcd, redis, "{requests: 3/hour, burst: 3}") as [gateway]:
        assert not await is_up(gateway)
        async with RawClient(gateway.data_address) as client:
            assert (await client.ask()).status == 200
            await asyncio.to_thread(redis.start)
            await wait_store(True, gateway)
            assert [(await client.ask()).status for _ in range(4)] == [200, 200, 429, 429]  # the first one counts
