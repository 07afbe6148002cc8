"""A registration in a real etcd that restarts, forgets and freezes."""

import asyncio
from contextlib import asynccontextmanager
from random import Random

import pytest

from discovery.announce import Announcement, backend_announcement
from discovery.endpoint import Registration, decode
from discovery.etcd import EtcdClient, EtcdSettings, EtcdSource
from tests.support.etcd_server import EtcdServer

pytestmark = pytest.mark.integration


@pytest.fixture
def server(tmp_path):
    with EtcdServer(tmp_path) as server:
        yield server


@asynccontextmanager
async def client_of(server):
    async with EtcdClient(EtcdSettings((server.url,))) as client:
        yield client


async def listed(client):
    return {item.key: item.value for item in (await EtcdSource(client, "/weir/v1/", 65536).list()).items}


async def eventually(holds, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.02)


async def test_registered_draining_and_withdrawn(server):
    async with client_of(server) as ours, client_of(server) as other:
        registration = Registration(url="http://127.0.0.1:9000")
        async with backend_announcement(ours, "tiny/1", registration, rng=Random(0)) as held:
            await held.wait_held()
            (value,) = (await listed(other)).values()
            assert not decode("tiny/1", value).at("127.0.0.1").draining
            await held.drain()
            (value,) = (await listed(other)).values()
            assert decode("tiny/1", value).at("127.0.0.1").draining
        assert await listed(other) == {}


async def test_it_outlives_its_lease_by_renewal_and_dies_with_its_process(server):
    async with client_of(server) as ours, client_of(server) as other:
        held = Announcement(ours, "/weir/v1/gateways/g", b"{}", rng=Random(0), ttl=1)
        async with held:
            await held.wait_held()
            await asyncio.sleep(2.2)  # more than two lives of the lease
            assert await listed(other) == {"gateways/g": b"{}"}
            held._keeper.cancel()  # killed: nobody renews, nobody revokes
            await eventually(lambda: is_empty(other))


async def is_empty(client):
    return await listed(client) == {}


@pytest.mark.parametrize("fate", ["restart", "wipe"])
async def test_it_is_there_again_after_etcd_was_away(server, fate):
    async with client_of(server) as ours:
        async with Announcement(ours, "/weir/v1/gateways/g", b"{}", rng=Random(0), ttl=2) as held:
            await held.wait_held()
            await asyncio.to_thread(getattr(server, fate))

            async def is_back():
                async with client_of(server) as other:
                    return await listed(other) == {"gateways/g": b"{}"}

            await eventually(is_back)
            await held.wait_held()
        async with client_of(server) as other:
            assert await listed(other) == {}


async def test_a_frozen_etcd_is_loss_by_our_own_clock_and_no_obstacle_to_the_end(server):
    async with client_of(server) as ours:
        async with Announcement(ours, "/weir/v1/gateways/g", b"{}", rng=Random(0), ttl=1) as held:
            await held.wait_held()
            server.pause()
            async with asyncio.timeout(3):
                while held.is_held:
                    await asyncio.sleep(0.02)
            ended = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - ended < 3
