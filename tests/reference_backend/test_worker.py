"""The server's end: with a socket and no process, then with real processes that are killed and stopped."""

import asyncio
import contextlib
import os
import signal
import socket
import time

import pytest

pytest.importorskip("torch", reason="torch is not installed (pip install 'weir[backend]')")

from reference_backend import link, worker  # noqa: E402
from reference_backend.engine.config import ModelError  # noqa: E402
from reference_backend.engine.frames import (  # noqa: E402
    Abort,
    Ask,
    Ping,
    Ready,
    Refused,
    Start,
    Turn,
    Unframed,
    decode_for_worker,
    framed,
)
from reference_backend.engine.request import Delta, Load, Sampling  # noqa: E402
from reference_backend.refusals import ApiError  # noqa: E402
from reference_backend.tensors import Terms  # noqa: E402
from reference_backend.worker import Worker, patience  # noqa: E402
from tests.support.tiny_model import DIRECTORY  # noqa: E402

START = Start(str(DIRECTORY), [], 2, 64, None)


class Process:
    """What stands at the other end, played by the test."""

    def __init__(self, connection):
        self.connection = connection
        self.unframed = Unframed()
        self.pings = 0

    def say(self, *messages):
        self.connection.sendall(b"".join(map(framed, messages)))

    def heard(self):
        messages = [decode_for_worker(body) for body in self.unframed.feed(self.connection.recv(1 << 16))]
        self.pings += messages.count(Ping())
        return [message for message in messages if message != Ping()]


@contextlib.asynccontextmanager
async def linked(bound=2):
    ours, theirs = socket.socketpair()
    process, worker = Process(theirs), Worker(START, bound, time.monotonic)
    with theirs:
        process.say(Ready(64))
        async with worker.linked(ours):
            yield worker, process
    assert not worker.is_ready


def submit(worker, deliver=None, max_tokens=5, tenant=""):
    return worker.submit([1, 2], Sampling(max_tokens=max_tokens, seed=7), Terms(tenant=tenant), deliver or print)


async def test_what_cannot_be_sent_takes_no_place():
    async with linked(bound=1) as (worker, process):
        with pytest.raises(UnicodeEncodeError):
            submit(worker, tenant="\udcff")
        assert worker.load().waiting == 0
        ticket = submit(worker)
        assert [message.ticket for message in process.heard() if isinstance(message, Ask)] == [ticket]


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


async def test_tokens_come_to_whoever_asked():
    first, second = [], []
    async with linked() as (worker, process):
        assert worker.context == 64
        tickets = submit(worker, first.append), submit(worker, second.append)
        assert [message.ticket for message in process.heard() if isinstance(message, Ask)] == list(tickets)
        assert worker.load() == Load(0, 2, 0.0)
        process.say(
            Turn([(tickets[1], Delta(5, None))], Load(1, 1, 0.25)),
            Turn([(tickets[0], Delta(6, "stop"))], Load(1, 0, 0.5)),
        )
        await until(lambda: first)
        assert (first, second) == ([Delta(6, "stop")], [Delta(5, None)])
        assert worker.load() == Load(1, 0, 0.5)
        assert repr(worker) == "<Worker ready, 1 of 2 in flight>"


async def test_one_too_many_is_refused_without_asking():
    async with linked(bound=2) as (worker, process):
        tickets = submit(worker), submit(worker)
        with pytest.raises(ApiError, match="no room"):
            submit(worker)
        worker.abort(tickets[0])
        submit(worker)
        assert [type(message) for message in process.heard()] == [Start, Ask, Ask, Abort, Ask]


async def test_who_has_less_is_taken_beside_one_that_fills_it_until_it_has_as_much():
    told = []
    async with linked(bound=2) as (worker, process):
        flood = submit(worker, tenant="flood"), submit(worker, told.append, tenant="flood")
        submit(worker, tenant="light")
        for tenant in ("flood", "light", "third"):
            with pytest.raises(ApiError, match="no room"):
                submit(worker, tenant=tenant)
        worker.abort(flood[0])
        with pytest.raises(ApiError, match="no room"):
            submit(worker, tenant="flood")
        process.say(Turn([(flood[1], Delta(6, "stop"))], Load(1, 0, 0.5)))
        await until(lambda: told)
        submit(worker, tenant="flood")


async def test_what_was_given_up_is_not_delivered_any_more():
    arrived, after = [], []
    async with linked() as (worker, process):
        ticket = submit(worker, arrived.append)
        worker.abort(ticket)
        worker.abort(ticket)
        other = submit(worker, after.append)
        process.say(Turn([(ticket, Delta(5, None)), (other, Delta(6, None))], Load(1, 0, 0.0)))
        await until(lambda: after)
    assert arrived == []


async def test_who_is_in_flight_when_it_goes_is_told_and_nobody_comes_in():
    arrived = []
    async with linked() as (worker, process):
        submit(worker, arrived.append)
        process.connection.close()
        await worker.wait_lost()
        assert arrived == [Delta(None, "lost")]
        assert not worker.is_ready
        with pytest.raises(ApiError, match="being loaded"):
            submit(worker)
        assert worker.load() == Load(0, 0, 0.0)


async def test_before_and_after_its_life_nobody_is_taken():
    worker = Worker(START, 2, time.monotonic)
    with pytest.raises(ApiError, match="being loaded"):
        submit(worker)
    assert repr(worker) == "<Worker away, 0 of 2 in flight>"
    worker.abort(7)


def hurried(monkeypatch):
    monkeypatch.setattr(link, "BEAT_SECONDS", 0.01)
    for module in (link, worker):
        monkeypatch.setattr(module, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(worker, "UNKNOWN_SECONDS", 0.05)


@pytest.mark.parametrize(
    ("step", "longest", "seconds"),
    [(0.0, 0.0, 60.0), (0.01, 0.02, 10.0), (0.6, 0.0, 12.0), (0.1, 5.0, 20.0), (2.0, 5.0, 40.0), (0.0, 1.0, 10.0)],
)
def test_how_long_a_sign_is_waited_for_follows_from_its_steps(step, longest, seconds):
    assert patience(Load(1, 0, 0.0, step_seconds=step, longest_step_seconds=longest)) == seconds


@pytest.mark.parametrize("is_asked", [True, False])
async def test_one_that_gives_no_sign_is_not_alive_and_then_cut(monkeypatch, is_asked):
    hurried(monkeypatch)
    arrived = []
    async with linked() as (worker, _):
        if is_asked:
            submit(worker, arrived.append)
        async with asyncio.timeout(20):
            while worker.is_alive:
                await asyncio.sleep(0.001)
            await worker.wait_lost()
    assert arrived == [Delta(None, "lost")] * is_asked
    assert worker.is_alive  # there is none that owes a sign


async def test_one_whose_steps_are_long_is_not_alive_and_waited_for(monkeypatch):
    hurried(monkeypatch)
    async with linked() as (worker, process):
        process.say(Turn([], Load(1, 0, 0.0, step_seconds=60.0)))
        async with asyncio.timeout(20):
            while worker.is_alive or worker.link.silent_seconds < 0.2:
                await asyncio.sleep(0.001)
        assert worker.is_ready
        process.say(Ping())
        await until(lambda: worker.is_alive)


async def test_one_that_gives_a_sign_when_it_is_asked_is_left_alone(monkeypatch):
    monkeypatch.setattr(link, "BEAT_SECONDS", 0.01)
    async with linked() as (worker, process):
        process.connection.setblocking(False)
        while process.pings < 5:
            await asyncio.sleep(0.001)
            with contextlib.suppress(BlockingIOError):
                process.heard()
                process.say(Ping())
        await until(lambda: worker.link.silent_seconds <= link.BEAT_SECONDS)
        assert worker.is_ready


async def test_a_model_that_is_refused_says_why():
    ours, theirs = socket.socketpair()
    with theirs:
        Process(theirs).say(Refused("too large"))
        worker = Worker(START, 2, time.monotonic)
        with pytest.raises(ModelError, match="too large"):
            async with worker.linked(ours):
                raise AssertionError("it was refused")


async def test_a_process_that_ends_while_it_loads_is_told():
    ours, theirs = socket.socketpair()
    theirs.close()
    worker = Worker(START, 2, time.monotonic)
    with pytest.raises(ModelError, match="ended while it loaded"):
        async with worker.linked(ours):
            raise AssertionError("it is gone")


@pytest.mark.integration
async def test_a_real_process_answers_and_its_death_is_noticed(tmp_path):
    arrived = asyncio.Queue()
    worker = Worker(START, 2, time.monotonic)
    async with asyncio.timeout(60):
        async with worker.running():
            children = _children()
            submit(worker, arrived.put_nowait, max_tokens=2)
            assert [(await arrived.get()).finish for _ in range(2)] == [None, "length"]
            submit(worker, arrived.put_nowait, max_tokens=60)
            [child] = children
            os.kill(child, signal.SIGTERM)  # not its to obey: the server decides
            assert (await arrived.get()).finish is None
            os.kill(child, signal.SIGKILL)
            await worker.wait_lost()
            last = await arrived.get()
            while last.finish is None:
                last = await arrived.get()
            assert last.finish in ("lost", "length")
        with pytest.raises(ModelError, match="no such file"):
            async with Worker(Start(str(tmp_path), [], 2, None, None), 2, time.monotonic).running():
                raise AssertionError("there is no model")
    assert _children() == []


@pytest.mark.integration
async def test_a_real_process_gives_its_cache_back_asleep_and_says_the_same_awake():
    tokens = 400_000
    start = Start(str(DIRECTORY), [], 2, 64, tokens)
    cache_kib = tokens * 2 * 4 * 2 * 32 * 4 // 1024  # keys and values of 4 layers with 2 heads of 32 floats
    worker = Worker(start, 2, time.monotonic)

    async def say():
        arrived = asyncio.Queue()
        submit(worker, arrived.put_nowait, max_tokens=20)
        said = []
        while not said or said[-1].finish is None:
            said.append(await arrived.get())
        return [delta.token for delta in said]

    async with asyncio.timeout(60), worker.running():
        [child] = _children()
        before, awake = await say(), _kib(child)
        for _ in range(2):
            await worker.sleep()
            assert awake - _kib(child) > 0.75 * cache_kib  # a thread more or less has room, too
            await worker.wake()
            assert _kib(child) - awake < 0.25 * cache_kib
            assert await say() == before
        os.kill(child, signal.SIGKILL)
        await worker.wait_lost()
        with pytest.raises(ModelError, match="gone"):
            await worker.sleep()


def _kib(pid):
    """The memory that a process has asked for."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmSize:"))


def _children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]
