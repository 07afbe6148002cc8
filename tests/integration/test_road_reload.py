"""Policies change while requests run: put there in every way that files are, broken, deleted, and through etcd."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from discovery.etcd import EtcdClient, EtcdSettings
from gateway.config_fields import Address
from tests.support.admin_client import api, scrape
from tests.support.etcd_server import EtcdServer
from tests.support.raw_client import CHAT, RawClient, chat_request
from tests.support.running_gateway import OPEN_POLICY, announced, etcd_gateway, running_gateway, until
from tests.support.scripted_backend import BackendConnection, ScriptedBackend
from tests.support.traffic import Traffic

pytestmark = pytest.mark.integration

LOOP = "uvloop"
CLOSED_POLICY = OPEN_POLICY.replace('"/*"', "/nothing")


class Serving(NamedTuple):
    """Where a gateway in a process of its own is."""

    data_address: Address
    admin_address: Address


def numbered(number: int) -> str:
    """OPEN_POLICY with a route name of its own."""
    return OPEN_POLICY.replace("name: chat", f"name: chat-{number}")


def version(gateway) -> str:
    return gateway.policy.policy.version


def rename_over(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def write_in_place(path: Path, text: str) -> None:
    with path.open("r+") as file:
        file.write(text)
        file.truncate()


def swap_link(path: Path, text: str) -> None:
    """As Kubernetes mounts a ConfigMap: policy.yaml -> ..data/policy.yaml, and ..data -> a directory, swapped whole."""
    mount = path.parent
    directory = mount / f"..{time.time_ns()}"
    directory.mkdir()
    (directory / path.name).write_text(text)
    (mount / "..data_tmp").symlink_to(directory.name)
    (mount / "..data_tmp").rename(mount / "..data")
    if not path.is_symlink():
        path.unlink()
        path.symlink_to(Path("..data") / path.name)


async def wait_version(gateway, other_than: str) -> float:
    """Until another policy is in force; returns how long that took."""
    begun = time.perf_counter()
    await until(lambda: version(gateway) != other_than)
    return time.perf_counter() - begun


@pytest.mark.parametrize("put", [rename_over, write_in_place, swap_link])
async def test_a_new_file_is_in_force_within_a_second_and_fails_nobody(tmp_path, put) -> None:
    path, delays = tmp_path / "policy.yaml", []
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url, policy=numbered(0)) as gateway:
        async with Traffic(gateway.data_address) as traffic:
            await traffic.more(20)
            for number in (1, 2):
                old = version(gateway)
                put(path, numbered(number))
                delays.append(await wait_version(gateway, old))
                new = version(gateway)
                assert {each.policy for each in await traffic.more(20)} == {new}
                assert [route["name"] for route in (await api(gateway, "routes"))["routes"]] == [f"chat-{number}"]
        shown = await api(gateway, "policy")
        assert (shown["version"], shown["last_error"]) == (new, None)
        told = await scrape(gateway)
        assert told.series("weir_policy_info") == [{"version": new}]
        assert told.value("weir_policy_reload_total", result="ok") == 3
        assert told.value("weir_policy_reload_total", result="invalid") == 0  # half of a file is not judged
    assert traffic.failed == []
    assert len({each.policy for each in traffic.asked}) == 3
    assert min(delays) < 1.0  # a machine that is busy elsewhere may delay one of them


async def test_what_is_in_flight_ends_under_the_policy_it_began_with(tmp_path) -> None:
    go_on = asyncio.Event()

    async def slow(connection: BackendConnection) -> None:
        if json.loads(connection.body).get("stream"):
            await connection.begin_events()
            await connection.chunk(b"data: {}\n\n")
            await go_on.wait()
            await connection.chunk(b"data: [DONE]\n\n")
            await connection.send(b"0\r\n\r\n")
        else:
            await go_on.wait()
            await connection.json({})

    async with (
        ScriptedBackend(slow) as backend,
        running_gateway(tmp_path, backend.url) as gateway,
        RawClient(gateway.data_address) as waiting,
        RawClient(gateway.data_address) as streaming,
        RawClient(gateway.data_address) as new,
    ):
        old = version(gateway)
        waiting.send(chat_request())
        streaming.send(chat_request({**CHAT, "stream": True}))
        await until(lambda: len(backend.heads) == 2)
        rename_over(tmp_path / "policy.yaml", CLOSED_POLICY)
        await wait_version(gateway, old)
        refused = await new.ask()
        assert (refused.status, refused.json["error"]["code"]) == (404, "no_route")
        assert refused.headers["x-weir-policy"] == version(gateway) != old
        go_on.set()
        for client in (waiting, streaming):
            answer = await client.answer()
            assert (answer.status, answer.whole, answer.headers["x-weir-policy"]) == (200, True, old)
        assert (await waiting.ask()).status == 404  # the same connection, its next request
        await until(lambda: len(gateway.recent.requests()) == 4)
        assert [request["policy"] == old for request in gateway.recent.requests() if request["status"] == 200] == [
            True
        ] * 2


async def test_a_broken_file_changes_nothing_and_says_where_it_is_broken(tmp_path, capfd) -> None:
    path = tmp_path / "policy.yaml"
    broken = OPEN_POLICY.replace("first_byte: 60s", "first_bite: 60s") + "plans: {p: {requests: many}}\n"
    line = next(number for number, text in enumerate(broken.split("\n"), 1) if "first_bite" in text)
    column = broken.split("\n")[line - 1].index("first_bite") + 1
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url) as gateway:
        good = version(gateway)
        async with Traffic(gateway.data_address) as traffic:
            rename_over(path, broken)
            await until(lambda: gateway.policy.last_error)
            first, second = (await api(gateway, "policy"))["last_error"]["errors"]
            assert first.startswith(f"{path}:{line}:{column} routes[0].timeout.first_bite: ")
            assert "first_byte" in first  # the nearest right one
            assert second.startswith(f"{path}:{line + 1}:")
            assert (await scrape(gateway)).value("weir_policy_reload_total", result="invalid") == 1

            path.unlink()
            await until(lambda: "cannot be read" in gateway.policy.last_error.errors[0])
            assert (await scrape(gateway)).value("weir_policy_reload_total", result="unreadable") == 1
            await traffic.more(20)
            assert {each.policy for each in traffic.asked} == {good}

            rename_over(path, numbered(1))
            await wait_version(gateway, good)
            assert (await api(gateway, "policy"))["last_error"] is None
        assert traffic.failed == []
    logged = [json.loads(text) for text in capfd.readouterr().out.splitlines() if "policy refused" in text]
    assert [line["result"] for line in logged] == ["invalid", "unreadable"]
    assert logged[0]["errors"] == [first, second]


async def test_a_process_that_hears_sighup_judges_its_file_anew_and_ends_well_on_sigterm(tmp_path) -> None:
    weir = [sys.executable, "-c", "from gateway.cli import main; main()", "serve", "--config", tmp_path / "weir.yaml"]
    async with ScriptedBackend() as backend:
        (tmp_path / "policy.yaml").write_text(OPEN_POLICY)
        (tmp_path / "weir.yaml").write_text(
            "listen: 127.0.0.1:0\nadmin: {listen: 127.0.0.1:0}\npolicy: policy.yaml\n"
            f"discovery: {{static: [{{service: tiny, url: {backend.url}, models: [tiny]}}]}}\n"
        )
        process = await asyncio.create_subprocess_exec(*weir, stdout=subprocess.PIPE)
        try:
            async with asyncio.timeout(30):
                serving = await line_of(process, "serving")
                gateway = Serving(
                    *(Address("127.0.0.1", int(serving[name].rsplit(":")[-1])) for name in ("data", "admin"))
                )
                async with Traffic(gateway.data_address, clients=2) as traffic:
                    await traffic.more(10)
                    process.send_signal(signal.SIGHUP)
                    assert (await line_of(process, "policy in force"))["version"] == traffic.asked[0].policy
                    assert (await scrape(gateway)).value("weir_policy_reload_total", result="ok") == 2
                    await traffic.more(10)
                process.send_signal(signal.SIGTERM)
                await process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    assert process.returncode == 0
    assert traffic.failed == []


async def line_of(process, event: str) -> dict:
    """The next line of the log that tells this."""
    while True:
        line = json.loads(await process.stdout.readline())
        if line.get("event") == event:
            return line


async def test_a_storm_of_versions_fails_no_request_and_ends_with_the_last(tmp_path) -> None:
    path = tmp_path / "policy.yaml"
    async with ScriptedBackend() as backend, running_gateway(tmp_path, backend.url) as gateway:
        only = next(iter(gateway.fleet.backends.values()))
        async with Traffic(gateway.data_address, clients=8) as traffic:
            begun = time.perf_counter()
            for number in itertools.count():
                rename_over(path, numbered(number) if number % 3 else "routes: [")
                await asyncio.sleep(0.01)
                if time.perf_counter() - begun > 1.0:
                    break
            rename_over(path, numbered(-1))
            await until(lambda: gateway.policy.policy.routes[0].name == "chat--1")
            assert {each.policy for each in await traffic.more(20)} == {version(gateway)}
        assert gateway.policy.last_error is None
        assert next(iter(gateway.fleet.backends.values())) is only
    assert traffic.failed == []


async def test_a_policy_in_etcd_is_followed_kept_and_found_again(tmp_path) -> None:
    key = "/weir/v1/policies/default"
    with EtcdServer(tmp_path) as etcd:
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(EtcdClient(EtcdSettings((etcd.url,))))
            await client.put(key, numbered(0).encode())
            backend = await stack.enter_async_context(ScriptedBackend())
            await stack.enter_async_context(announced(etcd.url, "tiny/1", backend.url))
            gateway = await stack.enter_async_context(
                etcd_gateway(tmp_path, etcd.url, policy=None, place="{etcd: default}")
            )
            await until(lambda: gateway.fleet.backends)
            async with Traffic(gateway.data_address) as traffic:
                old = version(gateway)
                await client.put(key, numbered(1).encode())
                assert await wait_version(gateway, old) < 1.0
                new = version(gateway)
                assert {each.policy for each in await traffic.more(20)} == {new}

                await client.put(key, b"version: 1\nroutes: [{nmae: x}]\n")
                await until(lambda: gateway.policy.last_error)
                errors = (await api(gateway, "policy"))["last_error"]["errors"]
                assert any(error.startswith("etcd:policies/default:2:11 ") and "nmae" in error for error in errors)

                await client.delete(key)
                await until(lambda: "no such key" in gateway.policy.last_error.errors[0])
                etcd.kill()
                await traffic.more(20)
                assert version(gateway) == new
                await asyncio.to_thread(etcd.start)
                await client.close()  # its old connection is dead
                await client.put(key, numbered(2).encode())
                await wait_version(gateway, new)
                await traffic.more(20)
            assert traffic.failed == []


def test_links_are_swapped_as_kubernetes_does(tmp_path) -> None:
    """The way of this file to do so is right: there is a whole text at any moment."""
    path = tmp_path / "policy.yaml"
    path.write_text("0")
    for text in "12":
        swap_link(path, text)
        assert (os.readlink(path), path.read_text()) == ("..data/policy.yaml", text)
