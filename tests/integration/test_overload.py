"""Three times as many requests as the backends may have at a time: those they can take are served, the others are told at
once, and the gateway goes on saying how it is."""

import asyncio
import contextlib
import itertools
from collections import Counter
from random import Random

import pytest

from discovery.announce import backend_announcement
from discovery.endpoint import ModelEntry, Registration
from discovery.etcd import EtcdClient, EtcdSettings
from tests.support.admin_client import page, scrape
from tests.support.etcd_server import EtcdServer
from tests.support.raw_client import RawClient
from tests.support.running_gateway import etcd_gateway, until
from tests.support.scripted_backend import BackendConnection, ScriptedBackend, answer_ok

pytestmark = pytest.mark.integration

LOOP = "uvloop"
EACH, BACKENDS = 8, 2
CAPACITY = EACH * BACKENDS
PREFIXES = (f"/overload{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


class Held:
    """Backends that answer when they are let, and know how many requests they had at a time."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()

    def script(self, name: str):
        async def answer(connection: BackendConnection) -> None:
            self.now[name] += 1
            self.most[name] = max(self.most[name], self.now[name])
            await self.let.wait()
            await answer_ok(connection)
            self.now[name] -= 1

        return answer


@contextlib.asynccontextmanager
async def limited(home, etcd, held: Held):
    """A gateway before BACKENDS backends of EACH requests at a time."""
    prefix = next(PREFIXES)
    async with contextlib.AsyncExitStack() as stack:
        for name in map(str, range(BACKENDS)):
            backend = await stack.enter_async_context(ScriptedBackend(held.script(name)))
            client = await stack.enter_async_context(EtcdClient(EtcdSettings((etcd.url,))))
            about = Registration(backend.url, models=(ModelEntry("tiny"),), max_concurrency=EACH)
            announcement = backend_announcement(client, f"tiny/{name}", about, rng=Random(0), prefix=prefix)
            await (await stack.enter_async_context(announcement)).wait_held()
        gateway = await stack.enter_async_context(etcd_gateway(home, etcd.url, prefix))
        await until(lambda: sum(bool(each.healthy) for each in gateway.fleet.backends.values()) == BACKENDS)
        yield gateway


async def asked(gateway):
    async with RawClient(gateway.data_address) as client:
        return await client.ask()


async def test_what_can_be_served_is_and_the_rest_is_refused_at_once(tmp_path, etcd) -> None:
    held = Held()
    async with limited(tmp_path, etcd, held) as gateway, asyncio.TaskGroup() as clients:
        served = [clients.create_task(asked(gateway)) for _ in range(CAPACITY)]
        await until(lambda: sum(held.now.values()) == CAPACITY)

        refused = await asyncio.gather(*(asked(gateway) for _ in range(2 * CAPACITY)))
        assert {(answer.status, answer.json["error"]["code"]) for answer in refused} == {(503, "overloaded")}
        assert all(answer.headers["retry-after"] for answer in refused)
        assert not any(task.done() for task in served)

        async with RawClient(gateway.data_address) as client:
            client.send(b"GET /healthz HTTP/1.1\r\nhost: gateway\r\n\r\n")
            assert (await client.answer("GET")).status == 200
        assert (await page(gateway, "/readyz")).status == 200
        told = await scrape(gateway)
        assert told.value("weir_inflight") == CAPACITY
        assert told.value("weir_requests_total", status="503") == 2 * CAPACITY
        assert {each.breaker_state.value for each in gateway.fleet.backends.values()} == {"closed"}

        held.let.set()
        assert [(await task).status for task in served] == [200] * CAPACITY
        assert (await asked(gateway)).status == 200  # a place that became free is used again
    assert dict(held.most) == {str(name): EACH for name in range(BACKENDS)}
