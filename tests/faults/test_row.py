"""The fixture itself: it finds what it is there to find."""

import asyncio
import os
import socket
from dataclasses import replace

import pytest

from tests.support.raw_client import RawClient
from tests.support.scripted_backend import BackendConnection, ScriptedBackend

pytestmark = pytest.mark.integration


async def ask(gateway) -> None:
    async with RawClient(gateway.data_address) as client:
        await client.ask()


async def ask_and(do, row) -> None:
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        await ask(gateway)
        do(gateway)


async def test_a_row_that_holds(row):
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        await ask(gateway)
        assert (await row.last(gateway))["consumer"] == "anonymous"
    assert [(line["status"], line["end_reason"]) for line in row.lines] == [(200, "ok")]
    assert {record["event"] for record in row.log} >= {"policy in force", "backend health"}


async def test_I1_a_request_without_its_line_and_one_with_two(row):
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        await ask(gateway)
    (line,) = [line for line in row._every_line if line["consumer"] == "anonymous"]
    row._every_line.remove(line)
    with pytest.raises(AssertionError):
        row.check()
    row._every_line += [line, line]
    with pytest.raises(AssertionError):
        row.check()
    row._every_line.remove(line)


async def test_I2_a_backend_that_was_asked_too_often(row):
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        await ask(gateway)
    backend.heads += backend.heads * 2
    with pytest.raises(AssertionError):
        row.check()
    del backend.heads[1:]


@pytest.mark.parametrize("how", ["twice", "not at all"])
async def test_I3_a_request_that_is_charged_twice_or_not_at_all(row, how):
    def charge(gateway) -> None:
        account = gateway.pipeline._admission._accounts["row", "anonymous"]
        if how == "twice":
            account.take_nowait(gateway.clock())
        else:
            account.refund()

    with pytest.raises(AssertionError, match="charged of"):
        await ask_and(charge, row)


@pytest.mark.parametrize("where", ["body", "header"])
async def test_I4_a_secret_that_a_client_gets_to_see(row, where):
    async def tell(connection: BackendConnection) -> None:
        if where == "body":
            await connection.json({"tell": "hunter2"})
        else:
            await connection.json({}, 200, "openai-tell: hunter2")

    async with ScriptedBackend(tell) as backend, row.gateway(backend.url) as gateway:
        await ask(gateway)
    row.secrets.append("hunter2")
    with pytest.raises(AssertionError, match="hunter2 is told in an answer"):
        row.check()
    row.secrets.remove("hunter2")


async def test_I4_a_secret_and_an_address_in_the_log(row):
    async with ScriptedBackend() as backend, row.gateway(backend.url) as gateway:
        await ask(gateway)
    for told in ("hunter2", f"127.0.0.1:{backend.port}", "authorization: Bearer aaaaaaaaaaaaaaaaaaaaaaa"):
        row.secrets.append("hunter2")
        row._logs += told
        with pytest.raises(AssertionError, match="is told in the log"):
            row.check()
        row._logs = ""


async def test_I5_a_task_that_is_left(row, monkeypatch):
    tasks = []
    monkeypatch.setattr("tests.faults.conftest.PATIENCE_SECONDS", 0.2)
    with pytest.raises(AssertionError, match="tasks became"):
        # More than a check of health that may be under way at the beginning and is over at the end.
        await ask_and(lambda _: tasks.extend(asyncio.create_task(asyncio.Event().wait()) for _ in range(10)), row)
    for each in tasks:
        each.cancel()


async def test_I5_a_descriptor_that_is_left(row, monkeypatch):
    descriptors = []
    monkeypatch.setattr("tests.faults.conftest.PATIENCE_SECONDS", 0.2)
    with pytest.raises(AssertionError, match="descriptors became more"):
        await ask_and(lambda _: descriptors.extend(each for _ in range(10) for each in os.pipe()), row)
    for each in descriptors:
        os.close(each)


async def test_I5_a_client_that_stays(row, monkeypatch):
    clients = []
    monkeypatch.setattr("tests.faults.conftest.PATIENCE_SECONDS", 0.2)

    def stay(gateway) -> None:
        clients.append(socket.create_connection((gateway.data_address.host, gateway.data_address.port)))

    with pytest.raises(AssertionError, match="weir_connections is 1"):
        await ask_and(stay, row)
    clients[0].close()


async def test_I6_a_bystander_that_is_hurt(row):
    def hurt(gateway) -> None:
        for backend in gateway.fleet.backends.values():
            backend.endpoint = replace(backend.endpoint, draining=True)
        gateway.fleet._changed()

    with pytest.raises(AssertionError, match="the bystander was answered"):
        await ask_and(hurt, row)
