"""The life of one version: a model that the test plays, in virtual time."""

import asyncio
import contextlib

import pytest

from discovery.endpoint import InvalidRegistration
from reference_backend.engine.config import ModelError
from reference_backend.engine.request import Load
from reference_backend.load_report import Reporter
from reference_backend.refusals import ApiError
from reference_backend.repository import Entry
from reference_backend.served import Served, Service, State
from tests.support.virtual_clock import virtual_time


class Played:
    """A model whose lives the test begins and ends; `told` is what happened, in order."""

    kind = "tensor"
    bound = 4
    changes = 0
    is_alive = True

    def __init__(self, told, failures=()):
        self.told = told
        self.failures = list(failures)
        self.lost = asyncio.Event()
        self.reporter = Reporter(self, lambda: 0.0)

    @contextlib.asynccontextmanager
    async def running(self):
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        self.lost.clear()
        self.told.append("begins")
        try:
            yield
        finally:
            self.told.append("ends")

    async def sleep(self):
        self.told.append("sleeps")

    async def wake(self):
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        self.told.append("wakes")

    async def wait_lost(self):
        await self.lost.wait()

    def load(self):
        return Load(0, 0, 0.0)

    async def wait_change(self, seen):
        await asyncio.Event().wait()


class Announced:
    def __init__(self, told, takes):
        self.told = told
        self.takes = takes

    async def drain(self):
        await asyncio.sleep(self.takes)
        self.told.append("drains")


@contextlib.asynccontextmanager
async def living(told, failures=(), sleep_after=None, refusal=None, etcd_takes=0.0, **how):
    """A version in service, from when it is known whether it can be."""
    ids = []

    @contextlib.asynccontextmanager
    async def announce(_entry, id_, _model):
        if refusal is not None:
            raise refusal
        assert subject.state is State.READY  # whoever is told of it may ask it
        ids.append(id_)
        assert len(set(ids)) == 1
        told.append("announced")
        try:
            yield Announced(told, etcd_takes)
        finally:
            told.append("withdrawn")

    model = Played(told, failures)
    subject = Served(Entry("adder", "1", None), Service(lambda _entry: model, announce, sleep_after, **how))
    life = asyncio.ensure_future(subject.run())
    try:
        await subject.wait_settled()
        yield subject, model
        subject.end()
        await life
    finally:
        life.cancel()


async def settle():
    await asyncio.sleep(0)
    await asyncio.sleep(0.001)


@virtual_time
async def test_it_is_announced_when_it_is_loaded_and_drains_before_it_goes():
    told = []
    async with living(told) as (subject, _):
        assert told == ["begins", "announced"]
        assert repr(subject) == "<Served adder@1 ready, 0 in flight>"
        with subject.use(Played):
            assert repr(subject) == "<Served adder@1 ready, 1 in flight>"
    assert subject.state is State.CLOSED
    assert told == ["begins", "announced", "drains", "withdrawn", "ends"]


@virtual_time
async def test_draining_takes_what_comes_then_nothing_and_waits_for_what_is_there():
    told, loop = [], asyncio.get_running_loop()
    async with living(told, grace=0.5, finish_within=60.0) as (subject, model):
        began = loop.time()
        with subject.use(Played):
            subject.end()
            await asyncio.sleep(0.4)
            assert (subject.state, model.reporter.draining) == (State.DRAINING, True)
            with subject.use(Played):
                pass
            await asyncio.sleep(0.2)
            with pytest.raises(ApiError) as refused, subject.use(Played):
                pass
            assert (refused.value.status, refused.value.headers["x-draining"]) == (503, "true")
            await asyncio.sleep(10.0)
            assert "ends" not in told
    assert loop.time() - began == pytest.approx(10.6, abs=0.1)


@virtual_time
async def test_what_does_not_end_in_time_is_aborted():
    told, loop = [], asyncio.get_running_loop()
    async with living(told, grace=0.5, finish_within=60.0) as (subject, _):
        began = loop.time()
        with subject.use(Played):
            subject.end()
            await asyncio.sleep(60.6)
            assert told[-2:] == ["withdrawn", "ends"]
    assert loop.time() - began == pytest.approx(60.6, abs=0.1)


@virtual_time
async def test_a_process_that_is_gone_is_replaced_and_announced_anew():
    told, loop = [], asyncio.get_running_loop()
    broken = ModelError("no memory")
    async with living(told, [None, broken, broken]) as (subject, model):
        began = loop.time()
        model.lost.set()
        await settle()
        assert (subject.state, told) == (State.LOADING, ["begins", "announced", "withdrawn", "ends"])
        with pytest.raises(ApiError, match="is being loaded") as refused, subject.use(Played):
            pass
        assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "1")
        await asyncio.sleep(0.2)
        assert (subject.state, subject.reason) == (State.LOADING, "no memory")
        async with asyncio.timeout(10):
            while subject.state is not State.READY:
                await asyncio.sleep(0.01)
        assert loop.time() - began == pytest.approx(0.7, abs=0.1)  # after 0.1, 0.2 and 0.4 s
        assert (told[4:], subject.reason) == (["begins", "announced"], "")


@virtual_time
async def test_one_that_always_crashes_is_started_less_and_less_often_until_it_has_lived_well():
    told, loop = [], asyncio.get_running_loop()
    waits = []
    async with living(told) as (subject, model):
        for lived in [0.0] * 9 + [59.0, 61.0, 0.0]:
            await asyncio.sleep(lived)
            model.lost.set()
            await settle()
            left = loop.time()
            async with asyncio.timeout(100):
                while subject.state is not State.READY:
                    await asyncio.sleep(0.01)
            waits.append(round(loop.time() - left, 1))
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0, 0.1, 0.2]


@virtual_time
async def test_the_first_failure_is_the_end():
    async with living([], [ModelError("too large")]) as (subject, _):
        assert (subject.state, subject.reason) == (State.FAILED, "too large")
        with pytest.raises(ApiError, match="the index of the repository says why") as refused, subject.use(Played):
            pass
        assert (refused.value.status, refused.value.code) == (503, "unavailable")


@virtual_time
async def test_a_registration_that_cannot_be_is_the_end_too():
    told = []
    async with living(told, refusal=InvalidRegistration("key: service")) as (subject, _):
        assert (subject.state, subject.reason) == (State.FAILED, "key: service")
    assert told == ["begins", "ends"]


@virtual_time
async def test_one_that_nobody_asks_for_sleeps_until_somebody_does():
    told = []
    async with living(told, sleep_after=5.0) as (subject, _):
        with subject.use(Played):
            await asyncio.sleep(20.0)
        await asyncio.sleep(4.0)
        with subject.use(Played):
            pass
        await asyncio.sleep(4.9)
        assert subject.state is State.READY
        await asyncio.sleep(0.2)
        assert (subject.state, told) == (State.ASLEEP, ["begins", "announced", "sleeps"])
        await asyncio.sleep(1000.0)
        with pytest.raises(ApiError, match="is being loaded"), subject.use(Played):
            pass
        await settle()
        assert (subject.state, told[3:]) == (State.READY, ["wakes"])
    assert told[4:] == ["drains", "withdrawn", "ends"]


@virtual_time
async def test_one_that_is_lost_in_its_sleep_or_cannot_wake_is_replaced():
    told = []
    async with living(told, [None, ModelError("gone"), None, ModelError("no room")], sleep_after=5.0) as (
        subject,
        model,
    ):
        for what in (model.lost.set, lambda: wanting(subject)):
            await asyncio.sleep(6.0)
            assert (subject.state, told) == (State.ASLEEP, ["begins", "announced", "sleeps"])
            what()
            await settle()
            assert (subject.state, told[3:]) == (State.LOADING, ["withdrawn", "ends"])
            told.clear()
            await asyncio.sleep(1.0)
            assert subject.state is State.READY


def wanting(subject):
    with pytest.raises(ApiError, match="is being loaded"), subject.use(Played):
        pass


@virtual_time
async def test_one_that_sleeps_can_be_ended():
    told = []
    async with living(told, sleep_after=5.0) as (subject, _):
        await asyncio.sleep(6.0)
        assert subject.state is State.ASLEEP
    assert (subject.state, told) == (State.CLOSED, ["begins", "announced", "sleeps", "withdrawn", "ends"])


@virtual_time
async def test_requests_wake_nobody():
    """Whether it should sleep is looked at when the time is up: to do so at each request took longer than many take."""
    async with living([], sleep_after=5.0) as (subject, _):
        await settle()
        before = asyncio.all_tasks()
        for _ in range(3):
            with subject.use(Played):
                await settle()
            await settle()
            assert asyncio.all_tasks() == before


@virtual_time
async def test_one_that_is_told_to_rest_does_when_nobody_uses_it():
    told = []
    async with living(told) as (subject, _):
        subject.rest()
        await settle()
        assert subject.state is State.ASLEEP
        with pytest.raises(ApiError), subject.use(Played):
            pass
        await settle()
        with subject.use(Played):
            subject.rest()
            await asyncio.sleep(100.0)
        await settle()
        assert subject.state is State.READY


@virtual_time
async def test_one_that_is_ended_while_it_loads_goes_at_once():
    class Slow(Played):
        @contextlib.asynccontextmanager
        async def running(self):
            await asyncio.sleep(1000.0)
            yield

    subject = Served(Entry("adder", "1", None), Service(lambda _entry: Slow([]), None))
    life = asyncio.ensure_future(subject.run())
    await asyncio.sleep(1.0)
    subject.end()
    await life
    await subject.wait_settled()
    assert subject.state is State.CLOSED
    assert asyncio.get_running_loop().time() < 2.0


@virtual_time
async def test_one_that_is_ended_before_it_begins_never_does():
    subject = Served(Entry("adder", "1", None), Service(None, None))
    subject.end()
    await subject.run()
    assert subject.state is State.CLOSED


@virtual_time
async def test_a_path_for_another_kind_is_refused():
    class Other(Played):
        pass

    async with living([]) as (subject, _):
        with pytest.raises(ApiError, match="adder@1 is of the kind 'tensor'") as refused, subject.use(Other):
            pass
        assert (refused.value.status, refused.value.code) == (400, "wrong_kind")
