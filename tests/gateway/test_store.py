from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections import deque
from collections.abc import AsyncIterator, Callable

import pytest
from redis import exceptions as failures
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster

from gateway.redis_url import RedisUrlError, read_address
from gateway.store import (
    CLOSE_SECONDS,
    Question,
    RedisStore,
    StoreAnswerError,
    open_clients,
    read_reply,
    reason_of,
    within,
)
from observability.events import StoreChanged
from policies.lease import Ask, Grant, Limit
from policies.policy import Rate
from tests.support.virtual_clock import virtual_time

LIMIT = Limit(10, Rate(60, 60.0))


class Waiting:
    """A borrower that asks for one token and keeps the answers."""

    def __init__(self, key: bytes = b"bucket") -> None:
        self.key = key
        self.limit = LIMIT
        self.answers: deque[Grant | None] = deque()
        self.answered = asyncio.Event()

    def ask(self) -> Ask:
        return Ask(need=1, spare=0, held=0, back=0, debt=0, quiet=0.0, ack=0, sent_at=0.0)

    def answer(self, grant: Grant | None) -> None:
        self.answers.append(grant)
        self.answered.set()


async def asked(store: RedisStore) -> Grant | None:
    borrower = Waiting()
    store.submit(borrower)
    async with asyncio.timeout(10):
        await borrower.answered.wait()
    assert len(borrower.answers) == 1
    return borrower.answers[0]


Answer = Callable[[int], bytes | None]


def granting(number: int) -> bytes:
    return b"*4\r\n:%d\r\n:1\r\n$7\r\n9000000\r\n$1\r\n0\r\n" % number


class ScriptedRedis:
    """Speaks just enough of the protocol: `answer(number)` is what a call of the script is answered, None is silence."""

    def __init__(self) -> None:
        self.answer: Answer = granting
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                words = await read_command(reader)
                answer = b"+PONG\r\n" if words[0] == b"PING" else self.answer(int(words[5]))
                writer.write(answer or b"")
        writer.close()


async def read_command(reader: asyncio.StreamReader) -> list[bytes]:
    count = int((await reader.readuntil(b"\r\n"))[1:])
    words = []
    for _ in range(count):
        length = int((await reader.readuntil(b"\r\n"))[1:])
        words.append((await reader.readexactly(length + 2))[:-2])
    return words


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[tuple[ScriptedRedis, RedisStore, list[StoreChanged]]]:
    redis = ScriptedRedis()
    events: list[StoreChanged] = []
    async with await asyncio.start_server(redis.serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        store = RedisStore(f"redis://127.0.0.1:{port}", rng=random.Random(1), observe=events.append)
        task = asyncio.create_task(store.run())
        try:
            await store.wait_probed()
            yield redis, store, events
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


class TestAnswers:
    async def test_are_handed_to_who_asked(self):
        async with running() as (redis, store, events):
            grant = await asked(store)
            assert grant is not None
            assert (grant.tokens, grant.level, grant.wait) == (1, 9.0, 0.0)
            assert redis.connections == 1
            assert events == [StoreChanged(up=True, reason="answered")]

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            pytest.param(lambda number: granting(number - 1), "answered something else", id="to another question"),
            pytest.param(lambda _: b"+OK\r\n", "answered something else", id="not a grant"),
            pytest.param(lambda _: b"*1\r\n:1\r\n", "answered something else", id="too short"),
            pytest.param(lambda _: b"-ERR no such thing\r\n", "refused: ResponseError", id="an error"),
            pytest.param(lambda _: b"-LOADING wait\r\n", "loading", id="loading"),
            pytest.param(lambda _: b"-NOPERM no\r\n", "login refused", id="not allowed"),
            pytest.param(lambda _: None, "timeout", id="none"),
        ],
    )
    async def test_that_are_no_grants_end_the_connection_and_after_five_the_asking(self, answer, reason):
        async with running() as (redis, store, events):
            redis.answer = answer
            assert [await asked(store) for _ in range(4)] == [None] * 4
            assert store.up
            assert await asked(store) is None
            await until(lambda: not store.up)
            assert redis.connections >= 5
            connections = redis.connections
            assert await asked(store) is None  # at once
            assert redis.connections <= connections + 1
            assert events == [StoreChanged(up=True, reason="answered"), StoreChanged(up=False, reason=reason)]

    async def test_one_that_comes_is_enough_to_go_on(self):
        async with running() as (redis, store, events):
            for _ in range(4):
                redis.answer = lambda _: None
                assert [await asked(store) for _ in range(3)] == [None] * 3
                redis.answer = granting
                assert await asked(store) is not None
            assert [event.up for event in events] == [True]

    async def test_a_late_answer_is_nobodys(self):
        async with running() as (redis, store, _):
            redis.answer = lambda _: None
            assert await asked(store) is None
            redis.answer = granting
            grants = [await asked(store) for _ in range(3)]
            numbers = [grant.number for grant in grants if grant is not None]
            assert len(numbers) == 3
            assert numbers == sorted(set(numbers))
            assert redis.connections == 2

    @pytest.mark.usefixtures("patient")
    async def test_who_submits_at_once_is_asked_for_at_once(self):
        async with running() as (_, store, _events):
            borrowers = [Waiting(b"bucket %d" % number) for number in range(200)]
            for each in borrowers:
                store.submit(each)
            async with asyncio.timeout(10):
                await asyncio.gather(*(each.answered.wait() for each in borrowers))
            assert all(len(each.answers) == 1 and each.answers[0] is not None for each in borrowers)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


class TestStates:
    async def test_before_it_runs_it_is_away(self):
        store = RedisStore("redis://127.0.0.1:1", rng=random.Random(1), observe=pytest.fail)
        assert await asked(store) is None
        assert repr(store) == "<RedisStore away, 0 waiting>"

    async def test_repr(self):
        async with running() as (_, store, _events):
            assert repr(store) == "<RedisStore up, 0 waiting>"

    def test_a_bad_url_is_refused(self):
        with pytest.raises(RedisUrlError):
            RedisStore("memcached://127.0.0.1", rng=random.Random(1), observe=pytest.fail)


class TestWithin:
    @virtual_time
    async def test_returns_what_came_in_time(self):
        assert await within(1.0, asyncio.sleep(0.9, "done")) == "done"

    @virtual_time
    async def test_raises_and_cancels_what_did_not(self):
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(10)
            finally:
                ended.set()

        with pytest.raises(TimeoutError):
            await within(1.0, work())
        assert ended.is_set()
        assert asyncio.get_running_loop().time() == pytest.approx(1.0)

    @virtual_time
    async def test_passes_errors_on(self):
        async def work() -> None:
            raise KeyError

        with pytest.raises(KeyError):
            await within(1.0, work())

    @virtual_time
    async def test_what_fails_long_after_it_was_given_up_is_seen(self):
        told: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

        async def work() -> None:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                await asyncio.sleep(10 * CLOSE_SECONDS)  # a connection takes its time to end
                raise ConnectionError from None

        with pytest.raises(TimeoutError):
            await within(1.0, work())
        await asyncio.sleep(10)
        gc.collect()
        assert told == []

    @virtual_time
    async def test_cancelled_it_cancels_the_work(self):
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(10)
            finally:
                ended.set()

        task = asyncio.create_task(within(20.0, work()))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()


QUESTION = Question(7, b"bucket", LIMIT, Waiting.ask(None))


@pytest.mark.parametrize("reply", [None, b"OK", 7, [7, 1, b"5"], [7, 1, b"x", b"0"], [8, 1, b"5", b"0"], []])
def test_a_reply_to_something_else_is_noticed(reply):
    with pytest.raises(StoreAnswerError):
        read_reply(QUESTION, reply)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TimeoutError(), "timeout"),
        (failures.TimeoutError("10.0.0.1"), "timeout"),
        (failures.ReadOnlyError("x"), "read-only"),
        (failures.ResponseError("@user_script: 5: -READONLY You can't write"), "read-only"),
        (failures.OutOfMemoryError("x"), "out of memory"),
        (failures.ResponseError("@user_script: 5: -OOM command not allowed"), "out of memory"),
        (failures.AuthenticationError("user bob"), "login refused"),
        (failures.ConnectionError("Error 111 connecting to 10.0.0.1:6379"), "no connection"),
        (ConnectionRefusedError(), "no connection"),
        (failures.ClusterDownError("x"), "refused: ClusterDownError"),
    ],
)
def test_reasons_name_no_host_and_nobody(error, reason):
    assert reason_of(error) == reason


@pytest.mark.parametrize(
    ("url", "kinds"),
    [
        ("redis://:secret@127.0.0.1:1/2", [Redis]),
        ("rediss://127.0.0.1:1?ssl_ca_certs=/nowhere.pem", [Redis]),
        ("redis+sentinel://127.0.0.1:1,127.0.0.1:2/main", [Redis, Redis, Redis]),
        ("redis+cluster://127.0.0.1:1,127.0.0.1:2", [RedisCluster]),
    ],
)
async def test_clients_for_each_kind_of_url(url, kinds):
    clients = open_clients(read_address(url))
    assert [type(client) for client in clients] == kinds
    for client in clients:
        await client.aclose()
