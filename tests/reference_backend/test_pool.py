"""Which version a request means; loading, swapping and unloading, with models that the test plays."""

import asyncio
import contextlib

import pytest

from reference_backend.engine.config import ModelError
from reference_backend.pool import Pool
from reference_backend.refusals import ApiError
from reference_backend.repository import Entry
from reference_backend.served import Service, State
from tests.reference_backend.test_served import Played
from tests.support.virtual_clock import virtual_time


@contextlib.asynccontextmanager
async def unannounced(*_args):
    yield None


class Store:
    """Versions by name, as the test puts them there; `slow` is what a model needs to load, `broken` cannot be."""

    def __init__(self, most_awake=None, **versions):
        self.versions = versions
        self.slow, self.broken = 0.0, set()
        self.made = []
        self.told = []
        self.pool = Pool(Service(self.make, unannounced, most_awake=most_awake, grace=0.5), self.wanted, list)

    def wanted(self, name):
        return [Entry(name, version, None) for version in self.versions.get(name, [])]

    def make(self, entry):
        if str(entry) in self.broken:
            raise ModelError(f"{entry} is broken")
        self.made.append(str(entry))
        return Slow(self.told, self.slow)

    def states(self):
        return {str(served.entry): served.state.value for served in self.pool}


class Slow(Played):
    def __init__(self, told, seconds):
        super().__init__(told)
        self.seconds = seconds

    @contextlib.asynccontextmanager
    async def running(self):
        await asyncio.sleep(self.seconds)
        async with super().running():
            yield


@virtual_time
async def test_names_mean_versions():
    store = Store(chat=["1", "2", "10"], embed=[""])
    async with store.pool.running():
        await store.pool.start(("chat", "embed"))
        pool = store.pool
        assert str(pool.find("chat").entry) == "chat@10"
        assert str(pool.find("chat@2").entry) == "chat@2"
        assert str(pool.find("chat", "1").entry) == "chat@1"
        assert str(pool.find("chat@1", "1").entry) == "chat@1"
        assert str(pool.find("embed").entry) == "embed"
        for model, version in [
            ("chat", "3"),
            ("chat@2", "1"),
            ("chat@", None),
            ("Chat", None),
            ("", None),
            ("embed", "1"),
        ]:
            with pytest.raises(ApiError, match="'chat@1', 'chat@2', 'chat@10', 'embed' is") as unknown:
                pool.find(model, version)
            assert (unknown.value.status, unknown.value.param) == (404, "model")
        [newest] = [served for served in pool if str(served.entry) == "chat@10"]
        newest.state = State.LOADING
        assert str(pool.find("chat").entry) == "chat@2"
        assert pool.state is State.LOADING
        newest.state = State.ASLEEP
        assert pool.state is State.READY


@virtual_time
async def test_it_is_loading_until_all_that_is_wanted_from_the_start_is_there():
    store = Store(a=["1"], b=["1"])
    store.broken = {"b@1"}
    async with store.pool.running():
        told = {store.pool.state}
        starting = asyncio.ensure_future(store.pool.start("ab"))
        while not starting.done():
            told.add(store.pool.state)
            await asyncio.sleep(0)
        assert told == {State.LOADING}
        assert [str(served.entry) for served in await starting] == ["a@1", "b@1"]
        assert store.pool.state is State.FAILED
        store.pool.unload("b")
        store.broken.clear()
        await store.pool.load("b")
        assert store.pool.state is State.READY


@virtual_time
async def test_a_new_version_takes_over_when_it_is_ready_and_the_old_one_drains():
    store = Store(chat=["1"])
    async with store.pool.running():
        await store.pool.load("chat")
        with store.pool.find("chat").use(Played):
            store.versions["chat"], store.slow = ["2"], 3.0
            loading = asyncio.ensure_future(store.pool.load("chat"))
            await asyncio.sleep(2.9)
            assert store.states() == {"chat@1": "ready", "chat@2": "loading"}
            assert str(store.pool.find("chat").entry) == "chat@1"
            await loading
            assert str(store.pool.find("chat").entry) == "chat@2"
            await asyncio.sleep(0.4)
            assert store.states() == {"chat@1": "draining", "chat@2": "ready"}
            await asyncio.sleep(0.4)
            assert store.states() == {"chat@1": "closed", "chat@2": "ready"}
        await asyncio.sleep(0.01)
        assert store.states() == {"chat@2": "ready"}


@virtual_time
async def test_the_same_version_loaded_anew_is_another_one_of_it():
    store = Store(chat=["1"])
    async with store.pool.running():
        [first] = await store.pool.load("chat")
        [second] = await store.pool.load("chat")
        assert store.pool.find("chat") is second
        await asyncio.sleep(1.0)
        assert (first.state, second.state, store.states()) == (State.CLOSED, State.READY, {"chat@1": "ready"})


@virtual_time
async def test_what_cannot_be_loaded_leaves_what_is_there_alone():
    store = Store(chat=["1"])
    async with store.pool.running():
        await store.pool.load("chat")
        store.broken = {"chat@1", "chat@2"}
        store.versions["chat"] = ["1", "2"]
        again, new = await store.pool.load("chat")
        assert (again.reason, new.reason) == ("chat@1 is broken", "chat@2 is broken")
        assert store.states() == {"chat@1": "ready", "chat@2": "failed"}
        store.broken.clear()
        await store.pool.load("chat")
        assert store.states() == {"chat@1": "ready", "chat@2": "ready"}


@virtual_time
async def test_many_who_load_at_once_load_once_and_who_leaves_stops_nothing():
    store = Store(chat=["1"])
    store.slow = 2.0
    async with store.pool.running():
        waiting = [asyncio.ensure_future(store.pool.load("chat")) for _ in range(5)]
        await asyncio.sleep(1.0)
        waiting.pop(0).cancel()
        [[one], *others] = await asyncio.gather(*waiting)
        assert all(other == [one] for other in others)
        assert store.made == ["chat@1"]


@virtual_time
async def test_unloading_drains_and_forgets():
    store = Store(chat=["1", "2"])
    async with store.pool.running():
        await store.pool.load("chat")
        store.pool.unload("chat")
        await asyncio.sleep(0.4)
        assert store.states() == {"chat@1": "draining", "chat@2": "draining"}
        await asyncio.sleep(0.2)
        assert store.states() == {}
        for act in (lambda: store.pool.unload("chat"), lambda: store.pool.find("chat")):
            with pytest.raises(ApiError) as unknown:
                act()
            assert unknown.value.status == 404
        with pytest.raises(ApiError, match="'gone' in a wanted version"):
            await store.pool.load("gone")


@virtual_time
async def test_of_more_than_may_be_awake_the_least_recently_used_sleeps():
    store = Store(most_awake=2, a=["1"], b=["1"], c=["1"])
    async with store.pool.running():
        await store.pool.start("abc")
        await asyncio.sleep(0.01)
        assert store.states() == {"a@1": "asleep", "b@1": "ready", "c@1": "ready"}
        with store.pool.find("b").use(Played):
            with pytest.raises(ApiError, match="being loaded"), store.pool.find("a").use(Played):
                pass
            await asyncio.sleep(0.01)
            assert store.states() == {"a@1": "ready", "b@1": "ready", "c@1": "asleep"}
        assert store.pool.state is State.READY


@virtual_time
async def test_at_the_end_all_drain_and_nothing_is_loaded_any_more():
    store = Store(chat=["1"], embed=["1"])
    async with store.pool.running():
        for name in ("chat", "embed"):
            await store.pool.load(name)
        assert repr(store.pool).startswith("<Pool [<Served chat@1 ready")
        ending = asyncio.ensure_future(check_the_end(store))
    await ending
    assert store.told.count("ends") == 2


async def check_the_end(store):
    await asyncio.sleep(0.2)
    assert (store.pool.state, store.pool.is_closed) == (State.DRAINING, False)
    with pytest.raises(ApiError) as refused:
        await store.pool.load("chat")
    assert refused.value.code == "draining"
    await asyncio.sleep(0.4)
    assert (store.pool.state, store.pool.is_closed) == (State.CLOSED, True)
    with pytest.raises(ApiError) as refused:
        store.pool.find("chat")
    assert refused.value.code == "draining"
