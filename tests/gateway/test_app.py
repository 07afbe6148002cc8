"""The composition root: whole gateways in this process, on free ports, with static backends."""

import asyncio
import contextlib
import socket
from types import SimpleNamespace

import aiohttp
import pytest

from discovery.source import SyncState
from gateway import app as module
from gateway import config as configuration
from gateway.app import Gateway
from gateway.children import CannotRun
from tests.support.raw_client import RawClient
from tests.support.running_gateway import OPEN_POLICY, running_gateway, until
from tests.support.scripted_backend import ScriptedBackend

pytestmark = pytest.mark.integration

CONFIG = "listen: 127.0.0.1:0\nadmin: {listen: 127.0.0.1:0}\npolicy: policy.yaml\ndiscovery: {static: []}\n"


def config(home, text: str = CONFIG, policy: str = OPEN_POLICY):
    (home / "policy.yaml").write_text(policy)
    return configuration.parse(text.encode(), {}, base=home)


@contextlib.contextmanager
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


async def start(settings) -> None:
    async with Gateway(settings).running():
        pass


async def test_from_a_config_to_a_gateway_that_is_ready(tmp_path) -> None:
    async with running_gateway(tmp_path) as gateway, aiohttp.ClientSession() as session:
        admin = f"http://{gateway.admin_address}"
        assert (gateway.data_address.port, gateway.admin_address.port) != (0, 0)
        async with session.get(f"{admin}/readyz") as answer:
            assert (answer.status, await answer.text()) == (200, "ok\n")
        async with session.get(f"{admin}/api/policy") as answer:
            assert (await answer.json())["version"] == gateway.policy.policy.version
        async with session.get(f"{admin}/metrics") as answer:
            assert f'weir_policy_info{{version="{gateway.policy.policy.version}"}} 1.0' in await answer.text()
        async with session.get(f"http://{gateway.data_address}/api/policy") as answer:
            assert answer.status == 503  # nothing of the operator's is reachable there: it is a path like any other


def two_backends(one: ScriptedBackend, two: ScriptedBackend) -> str:
    static = ", ".join(f'{{service: tiny, url: "{each.url}", models: [tiny]}}' for each in (one, two))
    return CONFIG.replace("static: []", f"static: [{static}]")


async def is_full(connection) -> None:
    await connection.json({}, 503, "x-backend-not-started: true")


@contextlib.asynccontextmanager
async def starting(settings):
    """A gateway whose start goes on meanwhile, from when it tells of itself; the event says that it has started."""
    gateway, started, enough = Gateway(settings), asyncio.Event(), asyncio.Event()

    async def live() -> None:
        async with gateway.running():
            started.set()
            await enough.wait()

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(live())
        await until(lambda: hasattr(gateway, "admin_address"))
        yield gateway, started
        enough.set()


async def readiness(gateway) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"http://{gateway.admin_address}/readyz") as answer:
        return await answer.text()


async def test_the_data_port_opens_when_each_backend_was_asked_for_its_health(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.sources.FIRST_CHECKS_SECONDS", 60.0)
    monkeypatch.setattr("discovery.probe.TIMEOUT_SECONDS", 60.0)
    async with ScriptedBackend(is_full) as one, ScriptedBackend() as two:
        two.well = asyncio.Event()
        async with starting(config(tmp_path, two_backends(one, two))) as (gateway, started):
            await until(lambda: [each.healthy for each in gateway.fleet.backends.values()].count(True) == 1)
            assert "the data port is not open yet" in await readiness(gateway)
            two.well.set()
            await started.wait()
            assert await readiness(gateway) == "ok\n"
            async with RawClient(gateway.data_address) as client:
                assert (await client.ask()).status == 200  # the second attempt's, at who answered last


async def test_a_backend_that_says_nothing_is_waited_for_only_so_long(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gateway.sources.FIRST_CHECKS_SECONDS", 0.01)
    monkeypatch.setattr("discovery.probe.TIMEOUT_SECONDS", 60.0)
    async with ScriptedBackend() as one, ScriptedBackend() as two:
        one.well, two.well = asyncio.Event(), asyncio.Event()
        async with starting(config(tmp_path, two_backends(one, two))) as (gateway, started):
            await started.wait()
            assert [each.healthy for each in gateway.fleet.backends.values()] == [None, None]
            async with RawClient(gateway.data_address) as client:
                assert (await client.ask()).status == 200


@pytest.mark.parametrize("key", ["listen", "admin.listen"])
async def test_a_port_in_use_is_told_with_its_key_and_nothing_stays_behind(tmp_path, key) -> None:
    with taken_port() as port:
        other = 0
        text = CONFIG.replace("listen: 127.0.0.1:0\n", f"listen: 127.0.0.1:{port if key == 'listen' else other}\n", 1)
        if key == "admin.listen":
            text = text.replace("{listen: 127.0.0.1:0}", f"{{listen: 127.0.0.1:{port}}}")
        with pytest.raises(CannotRun) as caught:
            await start(config(tmp_path, text))
    assert str(caught.value) == f"127.0.0.1:{port} is in use; stop what listens there, or set another `{key}`"
    assert {task.get_coro().__qualname__ for task in asyncio.all_tasks()} <= {
        asyncio.current_task().get_coro().__qualname__
    }


@pytest.mark.parametrize(
    ("policy", "text", "says"),
    [
        ("version: 1\nroots: []\n", CONFIG, "policy.yaml:2:1 roots"),
        (OPEN_POLICY, CONFIG + "tls: {cert: policy.yaml, key: policy.yaml}\n", "cannot use what `tls` names: "),
        (OPEN_POLICY, CONFIG.replace("[]", "[], tls: {ca: policy.yaml}"), "cannot use what `discovery.tls` names: "),
        (
            OPEN_POLICY,
            CONFIG + "redis: {url: 'rediss://127.0.0.1:1?ssl_ca_certs=/not/there'}\n",
            "cannot use what `redis.url` names: /not/there cannot be read: No such file or directory",
        ),
    ],
)
async def test_what_is_missing_or_wrong_is_told_in_a_line(tmp_path, policy, text, says) -> None:
    with pytest.raises(CannotRun) as caught:
        await start(config(tmp_path, text, policy))
    assert says in str(caught.value)


DRAINING = "the gateway is draining"
NOT_LISTED = "discovery has not listed the backends yet"
NOT_OPEN = "the data port is not open yet"
NO_KEYS = "no issuer's keys could be read yet, so nobody could be let in"


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, ()),
        ({"revision": 0}, ()),
        ({"state": SyncState.STALE}, ()),
        ({"revision": 0, "state": SyncState.COLD}, (NOT_LISTED,)),
        ({"draining": True}, (DRAINING,)),
        ({"draining": True, "revision": 0, "state": SyncState.COLD}, (DRAINING, NOT_LISTED)),
        ({"listening": False}, (NOT_OPEN,)),
        ({"keys": {"a": None, "b": None}}, (NO_KEYS,)),
        ({"keys": {"a": None, "b": "a set"}}, ()),
        ({"keys": {"a": None}, "anonymous": True}, ()),
        ({"keys": {}, "anonymous": True}, ()),
    ],
)
def test_readiness(tmp_path, changes, reasons) -> None:
    normal = {"draining": False, "revision": 7, "state": SyncState.WATCHING, "listening": True, "keys": {"a": "a set"}}
    told = SimpleNamespace(**{**normal, "anonymous": False, **changes})
    gateway = Gateway(config(tmp_path))
    gateway.pipeline = SimpleNamespace(draining=told.draining)
    gateway.discovery = SimpleNamespace(watch=SimpleNamespace(revision=told.revision, state=told.state))
    gateway.is_listening = told.listening
    gateway.policy = SimpleNamespace(policy=SimpleNamespace(anonymous=told.anonymous, issuers=tuple(told.keys)))
    gateway.keys = SimpleNamespace(keys_of=told.keys.get)
    assert gateway.not_ready() == reasons


@pytest.mark.parametrize(
    ("worker", "port", "listens"), [(None, 8081, 8081), (0, 8081, 8081), (2, 8081, 8083), (2, 0, 0)]
)
def test_each_worker_has_an_admin_port_of_its_own(tmp_path, worker, port, listens) -> None:
    settings = config(tmp_path, CONFIG.replace("{listen: 127.0.0.1:0}", f"{{listen: 127.0.0.1:{port}}}"))
    assert Gateway(settings, worker)._admin_listen().port == listens


async def test_two_failures_at_once_are_both_told() -> None:
    async def fail(error: Exception) -> None:
        await asyncio.sleep(0)
        raise error

    async def run() -> None:
        async with module._background() as background:
            background(fail(KeyError()))
            background(fail(ValueError()))
            await asyncio.sleep(5)

    with pytest.raises(BaseExceptionGroup) as caught:
        await run()
    assert {type(error) for error in caught.value.exceptions} == {KeyError, ValueError}


async def test_what_runs_in_the_background_ends_with_the_gateway() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(True)

    async with module._background() as background:
        background(work())
        await asyncio.sleep(0)
    assert ended == [True]
