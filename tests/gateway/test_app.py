"""The composition root: whole gateways in this process, on free ports, with static backends."""

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
from types import SimpleNamespace

import aiohttp
import pytest

from discovery.source import SyncState
from gateway import app as module
from gateway import config as configuration
from gateway.app import Gateway, serve
from gateway.children import CannotRun
from gateway.config_fields import Address
from tests.support.raw_client import RawClient, chat_request
from tests.support.running_gateway import OPEN_POLICY, running_gateway, until
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend

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


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EADDRINUSE, "x"), "127.0.0.1:80 is in use; stop what listens there, or set another `listen`"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "cannot listen on 127.0.0.1:80: Permission denied; set another `listen`",
        ),
        (
            socket.gaierror(-2, "Name or service not known"),
            "cannot listen on 127.0.0.1:80: Name or service not known; set another `listen`",
        ),
        (OSError("odd"), "cannot listen on 127.0.0.1:80: odd; set another `listen`"),
    ],
)
def test_why_it_cannot_listen(error, says) -> None:
    assert str(module._cannot_listen("listen", Address("127.0.0.1", 80), error)) == says


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


class Served:
    """`serve` in a task, with a backend that answers when it is told to."""

    def __init__(self, monkeypatch, tmp_path) -> None:
        self.home = tmp_path
        self.may_answer = asyncio.Event()
        self.asked = asyncio.Event()
        self.gateways = []
        monkeypatch.setattr(module, "ACCEPT_SECONDS", 0.0)
        monkeypatch.setattr(module, "_raise_file_limit", lambda: None)
        made = module.Gateway

        def gateway(*arguments) -> Gateway:
            self.gateways.append(made(*arguments))
            return self.gateways[0]

        monkeypatch.setattr(module, "Gateway", gateway)

    async def script(self, connection: BackendConnection) -> None:
        self.asked.set()
        await self.may_answer.wait()
        await connection.json({})
        raise Hangup

    @contextlib.asynccontextmanager
    async def running(self):
        async with ScriptedBackend(self.script) as backend:
            text = CONFIG.replace("[]", f'[{{service: tiny, url: "{backend.url}", models: [tiny]}}]')
            serving = asyncio.ensure_future(serve(config(self.home, text)))
            await until(lambda: serving.done() or (self.gateways and hasattr(self.gateways[0], "data_address")))
            try:
                yield serving
            finally:
                self.may_answer.set()
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
                loop = asyncio.get_running_loop()
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    loop.remove_signal_handler(number)


async def test_sigterm_lets_requests_end_and_takes_no_new_ones(tmp_path, monkeypatch) -> None:
    served = Served(monkeypatch, tmp_path)
    async with served.running() as serving:
        gateway = served.gateways[0]
        async with RawClient(gateway.data_address) as client:
            client.send(chat_request())
            await asyncio.wait_for(served.asked.wait(), 5)
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: gateway.pipeline.draining)
            assert gateway.not_ready() == ("the gateway is draining",)
            await until(lambda: not reachable(gateway.data_address))
            assert not serving.done()
            served.may_answer.set()
            assert (await client.answer()).status == 200
        await asyncio.wait_for(serving, 5)


async def test_a_second_signal_ends_it_at_once(tmp_path, monkeypatch) -> None:
    served = Served(monkeypatch, tmp_path)
    async with served.running() as serving, RawClient(served.gateways[0].data_address) as client:
        client.send(chat_request())
        await asyncio.wait_for(served.asked.wait(), 5)
        os.kill(os.getpid(), signal.SIGINT)
        await until(lambda: served.gateways[0].pipeline.draining)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(asyncio.shield(serving), 10)
        (request,) = served.gateways[0].recent.requests()  # it is told all the same, and has its record
        assert (request["status"], request["end_reason"]) == (503, "drain")
        assert (await client.answer()).json["error"]["code"] == "draining"


async def test_a_part_that_fails_in_the_background_ends_the_gateway_with_its_error(tmp_path, monkeypatch) -> None:
    fails = asyncio.Event()

    async def tidy(self) -> None:
        await fails.wait()
        raise LookupError("a part has failed")

    monkeypatch.setattr(module.Gateway, "_tidy", tidy)
    served = Served(monkeypatch, tmp_path)
    async with served.running() as serving:
        assert not serving.done()
        fails.set()
        with pytest.raises(LookupError, match="a part has failed"):
            await asyncio.wait_for(serving, 5)


def reachable(address: Address) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address.host, address.port), 1):
        return True
    return False


@pytest.mark.parametrize(
    ("wanted", "files", "most"),
    [
        (20_000, 1_048_576, 20_000),
        (20_000, 1024, 448),
        (20_000, 256, 64),
        (20_000, 20, 16),
        (10, 20, 10),
        (20_000, -1, 20_000),
    ],
)
def test_there_are_no_more_clients_than_files_can_be_opened_for(wanted, files, most) -> None:
    assert module.most_connections(wanted, files) == most


async def test_the_operator_is_told_that_files_allow_fewer_clients(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr("gateway.app.resource.getrlimit", lambda _: (256, 256))
    async with running_gateway(tmp_path):
        pass
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(line["connections"], line["open_files"]) for line in lines if "fewer" in line["event"]] == [(64, 256)]


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
