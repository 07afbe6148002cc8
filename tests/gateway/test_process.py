"""A gateway as its process runs it: signals, and parts that fail."""

import asyncio
import contextlib
import os
import signal
import socket

import pytest

from gateway import config as configuration
from gateway import process as module
from gateway.app import Gateway
from gateway.config_fields import Address
from gateway.process import serve
from tests.support.raw_client import RawClient, chat_request
from tests.support.running_gateway import OPEN_POLICY, until
from tests.support.scripted_backend import BackendConnection, Hangup, ScriptedBackend

pytestmark = pytest.mark.integration

CONFIG = b"""
listen: 127.0.0.1:0
admin: {listen: 127.0.0.1:0}
policy: policy.yaml
discovery: {static: [{service: tiny, url: "%b", models: [tiny]}]}
"""


class Served:
    """`serve` in a task, with a backend that answers when it is told to."""

    def __init__(self, monkeypatch, tmp_path) -> None:
        self.home = tmp_path
        self.may_answer = asyncio.Event()
        self.asked = asyncio.Event()
        self.gateways = []
        monkeypatch.setattr("gateway.drain.ACCEPT_SECONDS", 0.0)
        monkeypatch.setattr(module, "raise_file_limit", lambda: None)
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
            (self.home / "policy.yaml").write_text(OPEN_POLICY)
            text = CONFIG % backend.url.encode()
            serving = asyncio.ensure_future(serve(configuration.parse(text, {}, base=self.home)))
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
