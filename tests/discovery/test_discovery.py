import asyncio
from contextlib import asynccontextmanager
from ipaddress import ip_network
from random import Random

import pytest

from discovery.discovery import Discovery, LiveGateways, list_backends
from discovery.endpoint import Registration, encode
from discovery.probe import Checked
from discovery.source import Health, HealthChanged, Rejected, Unavailable
from tests.support.scripted_source import ScriptedSource
from tests.support.virtual_clock import virtual_time

ALLOWED = [ip_network("10.0.0.0/8")]


async def names(name):
    if name != "known":
        raise OSError("unknown")
    return ["10.9.9.9"]


class World:
    """Discovery over a scripted source and backends that are all well unless a test says otherwise."""

    def __init__(self):
        self.source = ScriptedSource()
        self.ill = set()
        self.events = []
        self.discovery = Discovery(
            self.source,
            probe=self.probe,
            allow_networks=ALLOWED,
            rng=Random(0),
            observe=self.events.append,
            resolve=names,
        )

    async def probe(self, endpoint):
        return Checked(endpoint.key not in self.ill, "asked")

    async def register(self, key, url="http://10.0.0.1", **fields):
        await self.source.put(key, encode(Registration(url=url, **fields)))

    @property
    def keys(self):
        return set(self.discovery.store.snapshot.endpoints)


@asynccontextmanager
async def alive(part):
    task = asyncio.create_task(part.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()


@virtual_time
async def test_from_registration_to_health_and_away():
    world = World()
    await world.register("a/1")
    await world.register("a/2", "http://known:80")
    await world.source.put("a/3", b"poison")
    async with alive(world.discovery):
        await world.discovery.wait_listed()
        assert world.keys == {"a/1", "a/2"}
        assert world.discovery.store.snapshot.endpoints["a/2"].address == "10.9.9.9"
        assert [type(event) for event in world.events if isinstance(event, Rejected)] == [Rejected]
        await asyncio.sleep(1)
        assert world.discovery.prober.is_passing("a/1")
        await asyncio.sleep(2)
        await world.source.delete("a/1")
        await asyncio.sleep(0.11)
        assert world.keys == {"a/2"}
        assert world.discovery.prober.health("a/1") is Health.UNKNOWN
        assert "watching revision=" in repr(world.discovery)


@virtual_time
async def test_who_can_be_told_at_once_is_not_waited_for():
    world = World()
    await world.register("a/1")
    async with alive(world.discovery):
        began = asyncio.get_running_loop().time()
        await world.discovery.wait_listed()
        assert world.keys == {"a/1"}
        assert asyncio.get_running_loop().time() == began


@virtual_time
async def test_an_etcd_that_comes_back_empty_costs_no_backend_that_works():
    world = World()
    for i in range(4):
        await world.register(f"a/{i}")
    async with alive(world.discovery):
        await asyncio.sleep(5)
        before = world.discovery.store.snapshot
        await world.source.wipe()
        await asyncio.sleep(1)
        assert world.keys == {"a/0", "a/1", "a/2", "a/3"}
        for i in range(3):  # the fourth does not come back
            await world.register(f"a/{i}")
        await asyncio.sleep(2)
        assert world.discovery.store.snapshot is before
        await asyncio.sleep(15)
        assert world.keys == {"a/0", "a/1", "a/2"}


@virtual_time
async def test_what_is_held_goes_as_soon_as_its_check_fails():
    world = World()
    for i in range(2):
        await world.register(f"a/{i}")
    async with alive(world.discovery):
        await asyncio.sleep(5)
        await world.source.wipe()
        world.ill.add("a/0")
        await asyncio.sleep(8)
        assert world.keys == {"a/1"}
        assert HealthChanged("a", "0", False, "asked") in world.events


@virtual_time
async def test_a_change_that_came_too_soon_takes_force_by_itself():
    world = World()
    async with alive(world.discovery):
        await world.discovery.wait_listed()
        await world.register("a/1")
        await asyncio.sleep(0.1)
        await world.register("a/1", weight=5)
        await asyncio.sleep(1.8)
        assert world.discovery.store.snapshot.endpoints["a/1"].weight == 1
        await asyncio.sleep(0.2)
        assert world.discovery.store.snapshot.endpoints["a/1"].weight == 5


@virtual_time
async def test_gateways_are_counted_and_a_smaller_number_waits():
    source = ScriptedSource()
    gateways = LiveGateways(source, rng=Random(0), observe=lambda _: None)
    async with alive(gateways):
        await gateways.wait_listed()
        assert gateways.count == 1
        for name in "abc":
            await source.put(name)
        await asyncio.sleep(0.01)
        assert gateways.count == 3
        await source.wipe()
        await source.put("a")
        await asyncio.sleep(5)
        assert gateways.count == 3
        await asyncio.sleep(10.1)
        assert repr(gateways) == "<LiveGateways 1>"


@virtual_time
async def test_a_look_from_outside():
    source = ScriptedSource()
    for key, url in {
        "a/1": "http://10.0.0.1",
        "a/2": "http://known",
        "a/3": "http://8.8.8.8",
        "b/1": "http://x",
    }.items():
        await source.put(key, encode(Registration(url=url)))

    async def probe(endpoint):
        return Checked(endpoint.key == "a/1", "asked")

    seen = await list_backends(source, probe=probe, allow_networks=ALLOWED, resolve=names)
    assert [(each.key, each.endpoint is not None, each.checked.is_passing, each.checked.reason) for each in seen] == [
        ("a/1", True, True, "asked"),
        ("a/2", True, False, "asked"),
        ("a/3", False, False, "url: the address is outside allow_networks"),
        ("b/1", False, False, "url: the host cannot be resolved"),
    ]
    source.is_away = True
    with pytest.raises(Unavailable):
        await list_backends(source, probe=probe, allow_networks=ALLOWED, resolve=names)
