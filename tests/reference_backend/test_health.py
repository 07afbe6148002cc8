"""Health, sentence by sentence: what is told in which situation, over HTTP and gRPC, and what leads into and out of it."""

import asyncio
import contextlib

import aiohttp
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from open_inference import SERVICE
from open_inference import inference_pb2 as pb
from reference_backend import served as life
from reference_backend.served import State
from reference_backend.stateless import Stateless
from tests.reference_backend.test_served import living, settle
from tests.support.model_store import ADDER, running_store
from tests.support.tiny_model import running_api
from tests.support.virtual_clock import virtual_time

SERVING, NOT_SERVING = 1, 2


@pytest.mark.parametrize(
    ("situation", "one", "is_alive", "status", "is_ready", "answers_now"),
    [
        ("every version is ready", State.READY, True, "ready", True, True),
        ("one is being loaded, again or for the first time", State.LOADING, True, "loading", False, False),
        ("one could not be loaded", State.FAILED, True, "failed", False, False),
        ("one drains", State.DRAINING, True, "draining", False, False),
        ("one is closed", State.CLOSED, True, "closed", False, False),
        ("one sleeps: nobody requires it, and whoever asks for it wakes it", State.ASLEEP, True, "ready", True, False),
        ("one has given no sign for too long: nothing else is said of it", State.READY, False, "ready", True, True),
    ],
)  # fmt: skip
async def test_what_is_told(tmp_path, monkeypatch, situation, one, is_alive, status, is_ready, answers_now):
    """Of two versions the second one, of which `one` and `is_alive` are true; the first one is well."""
    monkeypatch.setattr(Stateless, "is_alive", is_alive)
    models = {"adder/1": ADDER, "adder/2": ADDER}
    async with (
        running_store(tmp_path, models, "--serve", "adder@all") as store,
        aiohttp.ClientSession(store.url) as session,
        grpc.aio.insecure_channel(store.grpc) as channel,
        asyncio.timeout(20),
    ):
        first, second = store.pool
        second.state = one
        assert await over_http(session) == {
            "/v2/health/live": (code(is_alive), {"live": is_alive}),
            "/v2/health/ready": (code(is_ready), {"ready": is_ready}),
            "/health": (code(is_ready), {"status": status}),
            "/ping": (code(is_ready), {"status": status}),
            "/v2/models/adder/versions/1/ready": (200, {"name": "adder", "ready": True}),
            "/v2/models/adder/versions/2/ready": (code(answers_now), {"name": "adder", "ready": answers_now}),
            "/v2/models/adder/ready": (200, {"name": "adder", "ready": True}),  # the newest that can answer
            "/models/adder/1/health": (200, {"status": "ready"}),
            "/models/adder/2/health": (code(is_ready), {"status": one.value if one is not State.ASLEEP else "asleep"}),
        }, situation
        whole, part = (SERVING if is_ready else NOT_SERVING,) * 2
        expected = {"": whole, SERVICE: whole, "model/adder@1": SERVING, "model/adder@2": part}
        assert await told_to_watchers(channel, expected) == expected, situation
        assert await over_grpc(channel) == {
            "ServerLive": is_alive,
            "ServerReady": is_ready,
            "ModelReady 1": True,
            "ModelReady 2": answers_now,
            **expected,
        }, situation
        second.state = State.READY


def code(is_well):
    return 200 if is_well else 503


async def over_http(session):
    server = ("/v2/health/live", "/v2/health/ready", "/health", "/ping")
    versions = ("/v2/models/adder/versions/1/ready", "/v2/models/adder/versions/2/ready", "/v2/models/adder/ready")
    told = {}
    for path in (*server, *versions, "/models/adder/1/health", "/models/adder/2/health"):
        async with session.get(path) as response:
            told[path] = response.status, await response.json()
    return told


async def over_grpc(channel):
    async def call(method, message, answer):
        encode, decode = type(message).SerializeToString, answer.FromString
        return await channel.unary_unary(f"/{SERVICE}/{method}", encode, decode)(message)

    told = {
        "ServerLive": (await call("ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)).live,
        "ServerReady": (await call("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)).ready,
    }
    for version in ("1", "2"):
        asked = pb.ModelReadyRequest(name="adder", version=version)
        told[f"ModelReady {version}"] = (await call("ModelReady", asked, pb.ModelReadyResponse)).ready
    for name in ("", SERVICE, "model/adder@1", "model/adder@2"):
        request = health_pb2.HealthCheckRequest(service=name)
        told[name] = (await health_pb2_grpc.HealthStub(channel).Check(request)).status
    return told


async def told_to_watchers(channel, expected):
    """What Watch ends up with, once it is as expected: it tells the state of before, if it comes first."""
    told = {}
    for name, status in expected.items():
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=name))
        told[name] = (await watching.read()).status
        while told[name] != status:
            told[name] = (await watching.read()).status
        watching.cancel()
    return told


# What leads there. That loading ends with a real token is held by engine/test_service.py, test_language.py.


@virtual_time
async def test_it_is_unready_while_it_loads_is_started_again_and_wakes():
    told = []
    async with living(told, sleep_after=5.0) as (subject, model):
        changes = []
        subject._changed = lambda: changes.append(subject.state)
        model.lost.set()
        await asyncio.sleep(1.0)
        assert changes == [State.LOADING, State.READY]
        await asyncio.sleep(5.0)
        with contextlib.suppress(life.ApiError), subject.use(type(model)):
            raise AssertionError("it sleeps")
        await settle()
        assert changes[2:] == [State.ASLEEP, State.LOADING, State.READY]


@virtual_time
async def test_drain_goes_in_this_order():
    """etcd knows => not ready, still taking => refusing, finishing => withdrawn => aborted => gone."""
    told, loop = [], asyncio.get_running_loop()
    began = loop.time()

    def tell(what):
        told.append((round(loop.time() - began, 1), what))

    class Told(list):
        def append(self, what):
            tell(what)

    async with living(Told(), grace=0.5, finish_within=60.0, etcd_takes=1.0) as (subject, model):
        subject._changed = lambda: tell(subject.state.value)
        with subject.use(type(model)):
            subject.end()
            await asyncio.sleep(100.0)
    assert told == [
        (0.0, "begins"),
        (0.0, "announced"),
        (1.0, "drains"),
        (1.0, "draining"),
        (1.5, "closed"),
        (61.5, "withdrawn"),
        (61.5, "ends"),
        (61.5, "closed"),
    ]


async def test_a_language_model_that_sleeps_refuses_wakes_and_says_the_same():
    body = {"model": "tiny", "prompt": "A canary is", "max_tokens": 20, "seed": 3}
    async with running_api() as backend, aiohttp.ClientSession(backend.url) as session, asyncio.timeout(30):

        async def ask():
            async with session.post("/v1/completions", json=body) as answer:
                return answer.status, answer.headers, await answer.json()

        async def status(path):
            async with session.get(path) as answer:
                return answer.status

        _, _, before = await ask()
        size = backend.engine.runner.cache_bytes
        backend.served.rest()
        while backend.engine.runner.cache_bytes:
            await asyncio.sleep(0.002)
        assert (await status("/v2/models/tiny/ready"), await status("/health")) == (503, 200)
        refused, headers, told = await ask()
        assert (refused, told["error"]["code"]) == (503, "loading")
        assert (headers["retry-after"], headers["x-backend-not-started"]) == ("1", "true")
        while await status("/v2/models/tiny/ready") != 200:
            await asyncio.sleep(0.002)
        assert backend.engine.runner.cache_bytes == size
        _, _, after = await ask()
        assert (after["choices"], after["usage"]["completion_tokens"]) == (before["choices"], 20)


async def test_one_that_is_full_says_429_with_its_load_and_stays_ready():
    body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
    headers = {"endpoint-load-metrics-format": "text"}
    async with (
        running_api(start=False, slots=1, max_waiting=0) as backend,
        aiohttp.ClientSession(backend.url) as session,
    ):
        waiting = asyncio.ensure_future(session.post("/v1/completions", json=body))
        await backend.wait_load(lambda load: load.waiting)
        async with session.post("/v1/completions", json=body, headers=headers) as refused:
            assert refused.status == 429
            assert "named_metrics.num_requests_waiting=1" in refused.headers["endpoint-load-metrics"]
        for path in ("/health", "/v2/health/ready", "/v2/models/tiny/ready"):
            async with session.get(path) as response:
                assert response.status == 200
        waiting.cancel()
