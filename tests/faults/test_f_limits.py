"""F: Redis is down, slow, forgetful or full of nonsense; limits hold as well as they can, and no client waits for it.

Scales: 300 clients that abort for 1,000; they wait for Redis 5 s for 25 ms, so that a busy machine is no outage.
"""

import asyncio
import json
import random
import re
import time

import pytest

from gateway.admission import bucket_key
from policies.identity import mint
from tests.faults.conftest import ISSUER
from tests.support.admin_client import scrape
from tests.support.fault_proxy import FaultProxy
from tests.support.ports import free_port
from tests.support.raw_client import RawClient, chat_request
from tests.support.redis_server import RedisServer
from tests.support.running_gateway import OPEN_POLICY, until
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend
from tests.support.serving import serving
from tests.support.traffic import Traffic

pytestmark = pytest.mark.integration

NEVER = "requests: 1/month"  # refills too slowly for a test to see: what was spent can be counted


@pytest.fixture
def redis(tmp_path):
    with RedisServer(tmp_path) as server:
        yield server


def planned(plan: str) -> str:
    """OPEN_POLICY, and everybody is under this plan."""
    return f"{OPEN_POLICY}plans: {{p: {{{plan}}}}}\nconsumers: [{{match: {{any: true}}, plan: p}}]\n"


def limited(row, backend, redis_port: int, plan: str):
    config = f"redis: {{url: redis://127.0.0.1:{redis_port}/0}}\n"
    return row.gateway(backend.url, policy=planned(plan), config=config)


def key_of(consumer: str = "anonymous") -> str:
    return bucket_key("p", consumer).decode()


def statuses(*answers) -> set[int]:
    return {answer.status for answer in answers}


def admitted(answers) -> int:
    return sum(answer.status == 200 for answer in answers)


async def ask(client, count: int) -> list:
    return [await client.ask() for _ in range(count)]


async def wait_store(gateway, *, up: bool) -> None:
    """Until it is known there that Redis is away, or back."""
    async with asyncio.timeout(60):
        while (await scrape(gateway)).value("weir_store_up") != up:
            await asyncio.sleep(0.02)


async def cut(line: FaultProxy) -> None:
    await line.refuse()
    await line.reset()


def commands(redis: RedisServer, name: str) -> int:
    """How often a command was called."""
    found = re.search(rf"cmdstat_{name}:calls=(\d+)", redis.text("INFO", "commandstats"))
    return int(found[1]) if found else 0


@pytest.mark.parametrize("how", ["refused", "reset"])
@pytest.mark.usefixtures("patient")
async def test_F01_redis_is_down(row, redis, how) -> None:
    async with (
        FaultProxy(redis.port) as line,
        ScriptedBackend() as backend,
        limited(row, backend, line.port, f"{NEVER}, burst: 40") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        answers = await ask(client, 3)
        if how == "refused":
            await cut(line)
        else:
            line.to_server.cut_after, line.to_server.cut_by = 0, "rst"
            await line.reset()
        answers += await ask(client, 7)
        await wait_store(gateway, up=False)
        tried, begun = line.accepted, time.perf_counter()
        alone = await ask(client, 100)
        assert statuses(*alone) == {200, 429}
        assert line.accepted - tried <= (time.perf_counter() - begun) / 0.75 + 1  # a probe each second, no more
        await line.heal()
        await wait_store(gateway, up=True)
        answers += alone + await ask(client, 60)
    assert statuses(*answers) == {200, 429}
    assert admitted(answers) <= 40  # what was admitted alone is told to Redis when it is back


@pytest.mark.usefixtures("patient")
async def test_F01_a_strict_plan_is_refused_without_redis(row, redis) -> None:
    async with (
        FaultProxy(redis.port) as line,
        ScriptedBackend() as backend,
        limited(row, backend, line.port, f"{NEVER}, burst: 40, when_store_is_down: closed") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        assert (await client.ask()).status == 200
        await cut(line)
        await wait_store(gateway, up=False)
        refused = await client.ask()
        assert (refused.status, refused.json["error"]["code"]) == (503, "overloaded")
        assert refused.json["error"]["rule"] == "plans.p.when_store_is_down"
        assert "retry-after" in refused.headers
        await line.listen()
        await wait_store(gateway, up=True)
        assert (await client.ask()).status == 200
    assert len(backend.heads) == 2


@pytest.mark.usefixtures("patient")
async def test_F01_a_connection_that_was_reset_while_idle_is_replaced(row, redis) -> None:
    async with (
        FaultProxy(redis.port) as line,
        ScriptedBackend() as backend,
        limited(row, backend, line.port, f"{NEVER}, burst: 40") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        answers = []
        for end in (line.reset, line.finish) * 3:
            answers += await ask(client, 2)
            await end()
        answers += await ask(client, 60)
        await wait_store(gateway, up=True)
    assert statuses(*answers) == {200, 429}
    assert admitted(answers) <= 40


async def test_F02_redis_is_slow(row, redis) -> None:
    async with (
        FaultProxy(redis.port) as line,
        ScriptedBackend() as backend,
        limited(row, backend, line.port, f"{NEVER}, burst: 40") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        answers = await ask(client, 3)
        line.to_client.latency = 60.0  # who waits for an answer does not see the end of this test
        answers += await ask(client, 100)
        await wait_store(gateway, up=False)
        await line.heal()
        await wait_store(gateway, up=True)
        answers += await ask(client, 60)
    assert statuses(*answers) == {200, 429}
    assert 3 < admitted(answers) <= 40


@pytest.mark.usefixtures("patient")
async def test_F03_redis_forgets_everything(row, redis) -> None:
    async with (
        ScriptedBackend() as backend,
        limited(row, backend, redis.port, f"{NEVER}, burst: 10") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        answers = await ask(client, 20)
        assert admitted(answers) == 10
        evals = commands(redis, "eval")
        redis.flush()
        redis.command("SCRIPT", "FLUSH")
        async with asyncio.timeout(10):
            while admitted(answers) < 20:  # one more burst, and nothing but 200 and 429 on the way
                answers += await ask(client, 5)
        answers += await ask(client, 20)
        assert commands(redis, "eval") - evals <= 3  # one exchange: of the caller, the bystander, a probe
        assert (await scrape(gateway)).value("weir_store_up") == 1
    assert statuses(*answers) == {200, 429}
    assert admitted(answers) == 20


@pytest.mark.parametrize("how", ["restart", "failover"])
@pytest.mark.usefixtures("patient")
async def test_F04_writes_are_lost(row, redis, how) -> None:
    async with (
        ScriptedBackend() as backend,
        limited(row, backend, redis.port, f"{NEVER}, burst: 10") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        answers = await ask(client, 5)
        if how == "restart":
            await asyncio.to_thread(redis.restart)
        else:
            redis.command("REPLICAOF", "127.0.0.1", free_port())  # from now on it is read-only
            await wait_store(gateway, up=False)
            answers += await ask(client, 5)
            redis.command("REPLICAOF", "NO", "ONE")
            redis.flush()  # the new master has not heard of the last writes
        await wait_store(gateway, up=True)
        async with asyncio.timeout(10):
            while 429 not in statuses(*answers[-5:]):
                answers += await ask(client, 5)
        answers += await ask(client, 30)
        assert (await scrape(gateway)).value("weir_store_up") == 1
    assert statuses(*answers) == {200, 429}
    assert 10 <= admitted(answers) <= 20


JUNK = [
    ("SET", "{key}", "junk"),
    ("HSET", "{key}", "level", "1e9"),
    ("HSET", "{key}", "0123456789abcdef", "1 999999 999999 1"),
]


@pytest.mark.parametrize("words", JUNK, ids=" ".join)
@pytest.mark.usefixtures("patient")
async def test_F05_something_else_stands_where_the_bucket_was(row, redis, words) -> None:
    rate, burst = 20, 10
    async with (
        ScriptedBackend() as backend,
        limited(row, backend, redis.port, f"requests: {rate}/second, burst: {burst}") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        begun = time.perf_counter()
        answers = await ask(client, 15)
        key = key_of()
        if words[0] != "HSET":
            redis.command("DEL", key)
        redis.command(*(word.replace("{key}", key) for word in words))
        async with asyncio.timeout(10):
            while admitted(answers) < 2 * burst:  # it was repaired, and fills again
                answers += await ask(client, 5)
        took = time.perf_counter() - begun
        assert redis.text("TYPE", key) == "hash"
        assert (await scrape(gateway)).value("weir_store_up") == 1
    assert statuses(*answers) == {200, 429}
    assert admitted(answers) <= burst + rate * took  # an empty bucket: junk opens nothing


@pytest.mark.usefixtures("patient")
async def test_F06_redis_is_full(row, redis) -> None:
    async with (
        ScriptedBackend() as backend,
        limited(row, backend, redis.port, f"{NEVER}, burst: 20") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        answers = await ask(client, 3)
        redis.command("CONFIG", "SET", "maxmemory", "1")  # and nothing may be evicted
        answers += await ask(client, 60)
        await wait_store(gateway, up=False)
        redis.command("CONFIG", "SET", "maxmemory", "0")
        await wait_store(gateway, up=True)
        answers += await ask(client, 30)
        assert statuses(*answers) == {200, 429}
        assert admitted(answers) <= 20
        keys = redis.command("KEYS", "*")
        assert len(keys) == 3  # the caller's, the bystander's, the probe's
        for key in keys:
            assert redis.command("PTTL", key) > 0
            assert redis.command("MEMORY", "USAGE", key) < 1024
        redis.command("DEL", key_of())  # as eviction does
        async with asyncio.timeout(10):
            while admitted(answers) <= 20:
                answers += await ask(client, 5)
        answers += await ask(client, 60)
    assert admitted(answers) <= 40  # one more burst


@pytest.mark.usefixtures("patient")
async def test_F07_many_clients_leave_while_redis_is_asked(row, redis) -> None:
    burst, rng = 1000, random.Random(7)
    async with (
        FaultProxy(redis.port) as line,
        ScriptedBackend() as backend,
        limited(row, backend, line.port, f"{NEVER}, burst: {burst}") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        assert (await client.ask()).status == 200
        line.to_client.latency = 0.004
        connections = redis.text("CLIENT", "LIST").count("\n")

        async def leave() -> None:
            async with RawClient(gateway.data_address) as leaving:
                leaving.send(chat_request())
                await asyncio.sleep(rng.uniform(0.0, 0.008))
                leaving.writer.transport.abort()

        for _ in range(10):
            await asyncio.gather(*(leave() for _ in range(30)))
        assert redis.text("CLIENT", "LIST").count("\n") == connections
        line.to_client.latency = 0.0
        assert statuses(*await ask(client, 20)) == {200}
        await until(lambda: gateway.pipeline.inflight == 0)
        await wait_returned(redis)
    assert sum(line["end_reason"] == "client_abort" for line in row.lines) > 100
    charged = [line for line in row.lines if line["attempts"]]
    assert float(redis.text("HGET", key_of(), "level")) // 1_000_000 == burst - len(charged)


async def wait_returned(redis) -> None:
    """Until what a gateway does not need is back in Redis."""
    async with asyncio.timeout(10):
        while not re.search(rb"^\d+ 0 ", leases(redis)):
            await asyncio.sleep(0.02)


def leases(redis, key: str | None = None) -> bytes:
    fields = redis.command("HGETALL", key or key_of())
    pairs = dict(zip(fields[::2], fields[1::2], strict=True))
    return b"\n".join(value for name, value in pairs.items() if name not in (b"level", b"at"))


@pytest.mark.parametrize("hours", [1, -1])
@pytest.mark.usefixtures("patient")
async def test_F08_the_clock_of_redis_is_set(row, redis, hours) -> None:
    rate, burst = 20, 20
    async with (
        ScriptedBackend() as backend,
        limited(row, backend, redis.port, f"requests: {rate}/second, burst: {burst}") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        begun = time.perf_counter()
        answers = await ask(client, 40)
        set_clock(redis, key_of(), hours * 3600)
        async with asyncio.timeout(10):  # no refusal for longer than the bucket takes to fill
            while admitted(answers) < 2 * burst:
                answers += await ask(client, 5)
        took = time.perf_counter() - begun
    assert statuses(*answers) == {200, 429}
    assert admitted(answers) <= 2 * burst + rate * took  # forward it is full at once, once


def set_clock(redis: RedisServer, key: str, seconds: int) -> None:
    """As if the clock had been set by so much: what was written is so much older."""
    fields = [field.decode() for field in redis.command("HGETALL", key)]
    for name, value in zip(fields[::2], fields[1::2], strict=True):
        if name != "level":
            *others, moment = value.split()
            redis.command("HSET", key, name, " ".join([*others, str(int(moment) - seconds * 1_000_000)]))


@pytest.mark.usefixtures("patient")
async def test_F09_one_tenant_asks_far_too_often(row, redis) -> None:
    rate, burst = 10, 5
    async with (
        ScriptedBackend() as backend,
        limited(row, backend, redis.port, f"requests: {rate}/second, burst: {burst}") as gateway,
    ):
        asked, begun = commands(redis, "evalsha"), time.perf_counter()
        async with Traffic(gateway.data_address, clients=8, pause=0.0) as traffic:
            await traffic.more(1000)
        took = time.perf_counter() - begun
        # An empty bucket is asked each 50 ms; so is that of the bystander at most; and a probe goes out each second.
        assert commands(redis, "evalsha") - asked <= 45 * took + 30
        told = await scrape(gateway)
        assert told.value("weir_limited_total", rule="plans.p.requests") == len(traffic.asked) - admitted(traffic.asked)
    refused = [each.answer for each in traffic.asked if each.status == 429]
    assert admitted(traffic.asked) + len(refused) == len(traffic.asked)
    assert admitted(traffic.asked) <= burst + rate * took
    for answer in refused:
        assert 0 <= answer.json["error"]["retry_after"] <= 1 / rate + 0.001
        assert int(answer.headers["retry-after-ms"]) > 0


USAGE = {"prompt_tokens": 7, "completion_tokens": 30}


async def test_F10_tokens_are_set_aside_and_settled_once(row) -> None:
    """One whole answer, one stream that states its usage, one that breaks, one whose client leaves, and one 500."""
    left = asyncio.Event()

    async def serve(connection: BackendConnection) -> None:
        how = json.loads(connection.body)["messages"][0]
        if how == "whole":
            await connection.json({"choices": [], "usage": USAGE})
        elif how == "fails":
            await connection.json({}, 500)
        elif how == "stream":
            await connection.events("{}", "{}", json.dumps({"choices": [], "usage": USAGE}))
        else:
            await connection.begin_events()
            for _ in range(5):
                await connection.chunk(b'data: {"choices": []}\n\n')
            if how == "leaves":
                await connection.wait_closed()
                left.set()
            raise Hangup

    def asks(how: str) -> dict:
        return {"model": "tiny", "messages": [how], "max_tokens": 1000}

    def tokens_left() -> float:
        entry = gateway.pipeline._identifier.identify_nowait(None, 0.0)
        return round(
            gateway.pipeline._admission.account(entry.plan, "anonymous").tokens.meter.remaining(gateway.clock())
        )

    async with (
        ScriptedBackend(serve) as backend,
        row.gateway(backend.url, policy=planned("tokens: 10k/month")) as gateway,
        RawClient(gateway.data_address) as client,
    ):
        spent, prompt = 0, len(json.dumps(asks("whole"))) // 4 + 1
        for how, status, tokens in [("whole", 200, 37), ("stream", 200, 37), ("fails", 502, 0), ("breaks", 200, None)]:
            async with RawClient(gateway.data_address) as one:
                answer = await one.ask(asks(how))
            assert answer.status == status
            spent += prompt + 5 if tokens is None else tokens
            assert tokens_left() == 10_000 - spent, how
        async with RawClient(gateway.data_address) as leaving:
            leaving.send(chat_request(asks("leaves")))
            await leaving.reader.readuntil(b"choices")
            assert tokens_left() == 10_000 - spent - prompt - 1000
        await left.wait()
        await until(lambda: gateway.pipeline.inflight == 0)
        assert tokens_left() == 10_000 - spent - prompt - 5
        while (answer := await client.ask({**asks("whole"), "max_tokens": 9700})).status == 200:
            pass
        assert (answer.status, answer.json["error"]["rule"]) == (429, "plans.p.tokens")
        assert (await client.ask({**asks("whole"), "max_tokens": 10_000})).status == 413
        told = await scrape(gateway)
        assert told.value("weir_limited_total", rule="plans.p.tokens") == 2


async def test_F10_what_a_killed_process_had_set_aside_comes_back_once(row, redis) -> None:
    async def serve(connection: BackendConnection) -> None:
        if json.loads(connection.body).get("stream"):
            await connection.begin_events()
            await connection.chunk(b"data: {}\n\n")
            await connection.wait_closed()
            raise Hangup
        await connection.json({"choices": [], "usage": USAGE})

    asks = {"model": "tiny", "messages": [], "max_tokens": 8000}
    key = bucket_key("p", "anonymous", "tokens|").decode()
    options = {
        "policy": planned("tokens: 10k/month"),
        "config": f"redis: {{url: redis://127.0.0.1:{redis.port}/0}}\n",
        "setup": "import gateway.meter as meter, gateway.store as store; meter.STORE_SECONDS = store.STORE_SECONDS = 5.0",
    }
    for name in ("one", "other"):
        (row.home / name).mkdir()
    async with (
        ScriptedBackend(serve) as backend,
        serving(row.home / "one", backend.url, **options) as one,
        serving(row.home / "other", backend.url, **options) as other,
        RawClient(one.data_address) as cut,
        RawClient(other.data_address) as client,
    ):
        cut.send(chat_request({**asks, "stream": True}))
        await cut.reader.readuntil(b"data: {}\n\n\r\n")
        await until(lambda: re.search(rb"^\d+ \d+ \d+ \d+ 80\d\d \d+$", leases(redis, key), re.MULTILINE))  # it is told
        refused = await client.ask(asks)
        assert (refused.status, refused.json["error"]["rule"]) == (429, "plans.p.tokens")
        one.process.kill()
        assert await cut.reader.read() == b""
        async with asyncio.timeout(60):
            while (answer := await client.ask(asks)).status == 429:
                await asyncio.sleep(0.02)
        assert answer.status == 200
        await until(lambda: int(redis.text("HGET", key, "level")) // 1_000_000 == 10_000 - 37)
    row.read_log(other.log)
    assert "Traceback" not in one.errors + other.errors
    backend.heads.pop(0)  # who was killed has written no line about it


NAMES = ["a", "a}", "{a", "a:b", "b", "p|b", "weir:v1:probe", "*", "ü" * 100, "a b", "'; FLUSHALL"]


@pytest.mark.usefixtures("patient")
async def test_F11_names_that_would_be_other_keys(row, redis) -> None:
    async with (
        ScriptedBackend() as backend,
        limited(row, backend, redis.port, f"{NEVER}, burst: 2") as gateway,
        RawClient(gateway.data_address) as client,
    ):
        for name in NAMES:
            answers = [await client.ask(None, bearer(row, name)) for _ in range(4)]
            assert [answer.status for answer in answers] == [200, 200, 429, 429], name
        for name in ("a\nb", "x" * 10_000, "", "a\0"):
            assert (await client.ask(None, bearer(row, name))).status == 401
        keys = {key.decode() for key in redis.command("KEYS", "*")}
    mine = {key for key in keys if key != "weir:v1:probe"}
    assert all(re.fullmatch(r"weir:v1:bucket:\{[0-9a-f]{32}\}", key) for key in mine)
    assert {key_of(name) for name in NAMES} < mine
    assert len(mine) == len(NAMES) + 1  # and the bystander's


def bearer(row, name: str) -> str:
    token = mint(row._key, sub=name, issuer=ISSUER, audience="weir", ttl=300.0, wall=time.time())
    return f"authorization: Bearer {token}"
